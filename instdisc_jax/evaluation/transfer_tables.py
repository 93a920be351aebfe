"""The paper's tables of what the features are good for: encoders, each measured by a protocol.

    imagenet_knn      weighted nearest neighbors, for each encoder
    imagenet_linear   linear classifiers on every stage
    semi_supervised   fine-tuning with 1 and 10% of the labels, against random weights
    detection         Faster R-CNN, against random weights
    places            linear classifiers on every stage, on other data

The scale `smoke` trains on the embedded digits and takes minutes, `paper` is as published.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
import pathlib
from typing import Any, TypeAlias

import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax.data import digits
from instdisc_jax.evaluation import tables
from instdisc_jax.runtime import files

SCALES = 'smoke', 'paper'
Rows: TypeAlias = list[dict[str, Any]]  # what a protocol yields


@dataclasses.dataclass(frozen=True)
class Table:
  """What is measured, and the paper's values.

  Attributes:
    protocol: one of `protocols.PROTOCOLS`.
    encoders: {title: preset of configs/imagenet.py}.
    what: the keys of a result that name its row.
    measures: the keys of its values.
    paper: {(title, what names the row ...): {measure: the published value}}.
    about: a sentence on the published values.
    other_data: {scale: name of the data}; by default those of the training.
    shares: of the labels.
    keep: which of the results are rows.
  """
  protocol: str
  encoders: Mapping[str, str]
  what: tuple[str, ...]
  measures: tuple[str, ...]
  paper: Mapping[tuple[Any, ...], Mapping[str, float]]
  about: str
  other_data: Mapping[str, str] = dataclasses.field(default_factory=dict)
  shares: tuple[float, ...] | None = None
  keep: Callable[[dict[str, Any]], bool] = lambda result: True


_RESNET50 = {'ResNet-50': 'resnet50'}
TABLES: dict[str, Table] = {
    'imagenet_knn': Table(
        'knn', {'AlexNet': 'alexnet', 'VGG16': 'vgg16', 'ResNet-18': 'resnet18'} | _RESNET50,
        ('features', 'neighbors', 'temperature'), ('top1', 'top5'),
        {(title, 'embedding', 200, 0.07): {'top1': value} for title, value in (
            ('AlexNet', 0.313), ('VGG16', 0.339), ('ResNet-18', 0.410), ('ResNet-50', 0.468))},
        'Published: the paper and its code, for embeddings with K = 200 and τ = 0.07.',
        keep=lambda result: (result['neighbors'], result['temperature']) == (200, 0.07)),
    'imagenet_linear': Table(
        'linear_online', _RESNET50, ('features',), ('top1', 'top5'),
        {('ResNet-50', 'conv5'): {'top1': 0.540}}, 'Published: the paper, for its best layer.'),
    'semi_supervised': Table(
        'few_label', _RESNET50, ('labels', 'start'), ('top1', 'top5'),
        {('ResNet-50', 0.01, 'trained'): {'top5': 0.392},
         ('ResNet-50', 0.1, 'trained'): {'top5': 0.774}},
        'Published: SimCLR, Table 7.', shares=(0.01, 0.1)),
    'detection': Table(
        'detection', _RESNET50, ('start',), ('ap', 'ap50', 'ap75'),
        {('ResNet-50', 'trained'): {'ap': 0.541, 'ap50': 0.800, 'ap75': 0.595},
         ('ResNet-50', 'random'): {'ap': 0.328, 'ap50': 0.590, 'ap75': 0.316}},
        'Published: MMSelfSup, trained on VOC07+12 and measured by the rules of VOC07, where '
        'supervised features reach 0.542, 0.816 and 0.598. `paper` trains on VOC07 alone: for the '
        'published data use examples/detection.',
        other_data={'smoke': 'scenes:60', 'paper': 'tfds:voc/2007'}),
    'places': Table(
        'linear_online', _RESNET50, ('features',), ('top1', 'top5'), {},
        'The paper has such a table for Places205; its values are not included here.',
        other_data={'smoke': 'arrays:{output}/other.npz', 'paper': 'tfds:places365_small'}),
}
Train: TypeAlias = Callable[[config_lib.Config, pathlib.Path], object]
Measure: TypeAlias = Callable[[pathlib.Path, Table, str | None], Rows]


def run(output: pathlib.Path, runs: pathlib.Path, table: str, scale: str, *,
        configs: Mapping[str, config_lib.Config], train: Train,
        measure: Measure) -> Iterator[str]:
  """Trains the encoders of a table and measures them; what is finished is not done again.

  Args:
    output: where table.md and results.json are written.
    runs: where the encoders have their workdirs; several tables may share them.
    table: one of `TABLES`.
    scale: one of `SCALES`.
    configs: {title of an encoder: its configuration}.
    train: called with (config, workdir); trains or resumes a run, and skips a finished one.
    measure: (workdir, table, name of other data or None) -> what the protocol yields.

  Yields:
    The name of each run before it starts.

  Raises:
    errors.UserError: the data are missing, or the folder holds something else.
    errors.Stopped: stopped by a signal.
  """
  entry = TABLES[table]
  tables.check_output(output, table, scale)
  data = entry.other_data.get(scale)
  if data is not None and '{output}' in data:
    output.mkdir(parents=True, exist_ok=True)
    _write_other_digits(output / 'other.npz')
    data = data.format(output=output)
  results: dict[str, Rows] = {}
  for title, config in configs.items():
    yield title
    workdir = runs / title.lower()
    train(config, workdir)
    measured = workdir / f'{table}.json'
    if not measured.exists():
      files.write(measured, json.dumps(measure(workdir, entry, data)))
    results[title] = json.loads(measured.read_text())
    write(output, table, scale, results)


def encoders(table: str, scale: str) -> dict[str, str | None]:
  """{title: preset of configs/imagenet.py, or None for the network of `smoke`}."""
  return dict(TABLES[table].encoders) if scale == 'paper' else {'ResNet-10, width 16': None}


def write(output: pathlib.Path, table: str, scale: str, results: Mapping[str, Rows]) -> None:
  """Writes table.md and results.json.

  Args:
    output: the folder.
    table: one of `TABLES`.
    scale: one of `SCALES`.
    results: {title of an encoder: its results}.
  """
  entry = TABLES[table]
  files.write(output / tables.RESULTS, json.dumps(
      {'table': table, 'scale': scale, 'rows': results}, indent=2, ensure_ascii=False) + '\n')
  heads = ['encoder', *entry.what]
  heads += [f'{name}, {who}' for name in entry.measures for who in ('published', 'here')]
  lines = [f'# {table}, scale {scale}', '', entry.about, '', f'| {" | ".join(heads)} |',
           '|---' * len(heads) + '|']
  for title, rows in results.items():
    kept = [row for row in rows if entry.keep(row)] or rows
    for row in kept:
      names = [row[key] for key in entry.what]
      cells, published = [title, *map(str, names)], entry.paper.get((title, *names), {})
      for name in entry.measures:
        cells += [_number(published.get(name)), _number(row.get(name), row.get('interval')
                                                        if name == entry.measures[0] else None)]
      lines.append(f'| {" | ".join(cells)} |')
  files.write(output / 'table.md', '\n'.join(lines) + '\n')


def _number(value, interval=None):
  text = '–' if value is None else f'{value:.3f}'
  return text if interval is None else f'{text} ± {interval:.3f}'


def _write_other_digits(file):
  """Other data for `smoke`: the digits, turned by a quarter and inverted."""
  (train, labels), (test, test_labels) = digits.load()
  turn = lambda images: np.ascontiguousarray(255 - np.rot90(images, axes=(1, 2)))
  with file.open('wb') as content:
    np.savez(content, images=turn(train), labels=labels, test_images=turn(test),
             test_labels=test_labels)
