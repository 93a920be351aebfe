"""The paper's tables: each row trained from scratch, beside the paper's value.

    cifar10          Table 1: the losses, by kNN and by a linear SVM on pooled features
    noise_count      the kNN column of Table 1: from 1 noise sample per image to all other images
    embedding_size   D from 32 to 256
    train_fraction   a part of the training images, and all of them
    proximal         NCE with M = 4,096: λ of the proximal term against the momentum of the bank
    recipe           the published CIFAR-10 recipe, and what else can be switched on
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any, TypeAlias

import jax
from matplotlib import colormaps
from matplotlib import figure as figure_lib
import numpy as np

from instdisc_jax import __version__
from instdisc_jax import config as config_lib
from instdisc_jax.evaluation import few_label, figures, summary
from instdisc_jax.runtime import errors, files, metrics
from instdisc_jax.runtime import workdir as workdir_lib

RESULTS = 'results.json'
_SVM_FILE = 'svm.json'
_FREE = 'dataset.data_dir', '--workdir'  # what a user may set; the table fixes the rest
_COMPARED = 'model', 'loss', 'bank', 'optimizer'  # parts of the configuration that rows differ in
_NCE = {'loss.name': 'nce'}
_LOSSES = {
    'parametric softmax': {'loss.name': 'parametric_softmax'},
    'NCE, M = 1': _NCE | {'loss.noise_count': 1},
    'NCE, M = 10': _NCE | {'loss.noise_count': 10},
    'NCE, M = 512': _NCE | {'loss.noise_count': 512},
    'NCE, M = 4,096': _NCE | {'loss.noise_count': 4096},
    'full softmax': {},
}
Measures: TypeAlias = dict[str, Any]  # {'knn': top-1, 'loss': ..., 'seconds': ..., ...}
Results: TypeAlias = dict[str, dict[int, Measures]]  # {title of a row: {seed: measures}}
Train: TypeAlias = Callable[[config_lib.Config, pathlib.Path], object]
MeasureSVM: TypeAlias = Callable[[pathlib.Path], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Table:
  """A comparison of settings.

  Attributes:
    rows: {title: the settings that differ}; `dataset.limit` as a share of the scale's images, and
      numbers of epochs as shares of its epochs.
    paper: {measure: {title: the paper's value}}, for 'knn' and perhaps 'svm'.
    about: a sentence on the paper's values.
    curves: whether the loss is shown epoch by epoch.
    costs: whether steps and views are shown.
  """
  rows: Mapping[str, Mapping[str, Any]]
  paper: Mapping[str, Mapping[str, float]]
  about: str
  curves: bool = False
  costs: bool = False

  @property
  def with_svm(self) -> bool:
    """Whether the linear SVM is one of the measures."""
    return 'svm' in self.paper


_KNN = dict(zip(_LOSSES, (0.630, 0.425, 0.634, 0.784, 0.804, 0.808)))
_SVM = dict(zip(_LOSSES, (0.603, 0.443, 0.602, 0.643, 0.702, 0.754)))
_DIMS, _SHARES = (32, 64, 128, 256), (0.1, 0.3, 1.0)
_TABLE_1 = 'The paper’s values are those of its Table 1: CIFAR-10, ResNet-18.'


def _recipe():
  """{title: settings} of the table `recipe`: the published ones, then further switches."""
  flips, cosine = {'augment.flip': 0.5}, {'optimizer.schedule': 'cosine'}
  more = {
      'two views': {'loss.views': 2},
      'two views, half the epochs': {'loss.views': 2, 'epochs': 0.5},
      'MLP head': {'model.head': 'mlp'},
      'two views, MLP head': {'loss.views': 2, 'model.head': 'mlp'},
      'τ = 0.2': {'loss.temperature': 0.2},
      '3 neighbors': {'loss.neighbors': 3, 'loss.neighbors_from_epoch': 0.5},
      'crops of at least 0.4': {'augment.crop_scale': (0.4, 1.0)},
  }
  return {'published': {}, 'flips': flips, 'cosine': cosine, 'flips and cosine': flips | cosine} | {
      f'the same, {title}': flips | cosine | settings for title, settings in more.items()}


TABLES: dict[str, Table] = {
    'cifar10': Table(_LOSSES, {'knn': _KNN, 'svm': _SVM}, _TABLE_1),
    'noise_count': Table(_LOSSES, {'knn': _KNN}, _TABLE_1),
    'embedding_size': Table(
        {f'D = {dim}': {'model.embedding_dim': dim} for dim in _DIMS},
        {'knn': dict(zip((f'D = {dim}' for dim in _DIMS), (0.340, 0.388, 0.410, 0.401)))},
        'The paper’s values are for ImageNet and ResNet-18, quoted from memory: compare their '
        'order, not their size.'),
    'train_fraction': Table(
        {f'{share:.0%} of the images': {'dataset.limit': share} for share in _SHARES},
        {'knn': {}},
        'The paper has such a table for ImageNet; its values are not included here.'),
    'proximal': Table(
        {f'λ = {weight}, m = {momentum:g}': _NCE | {'loss.proximal_weight': float(weight),
                                                    'bank.momentum': momentum}
         for momentum in (0.0, 0.5) for weight in (0, 0.1, 1, 10, 50)}, {'knn': {}},
        'The paper gives no values for this: it shows a smoother start of training. Roughness is '
        'the mean absolute second difference of the loss without the proximal term, from epoch to '
        'epoch.', curves=True),
    'recipe': Table(
        _recipe(), {'knn': {'published': 0.808}},
        'Each row changes what its title says. The paper’s value is that of its Table 1: '
        'CIFAR-10, ResNet-18, 200 epochs. With an MLP head kNN on the pooled features is shown '
        'too. A step of two views costs twice as much.', costs=True),
}


def _smoke():
  """Like configs/digits.py, with fewer epochs."""
  config: Any = config_lib.default()
  config.dataset.name, config.dataset.limit = 'digits', 1297
  config.model.update(name='resnet10', width=16)
  config.loss.update(normalizer='ema', normalizer_decay=0.9)
  config.augment.update(saturation=0.0, hue=0.0, grayscale=0.0, mean=(0.2,) * 3, std=(0.3,) * 3)
  config.epochs = 30
  config.optimizer.milestones = (25,)
  config.knn.neighbors = 20
  return config, 1


def _small():
  config: Any = config_lib.default()
  config.dataset.name, config.dataset.limit = 'tfds:cifar10', 5000
  config.batch_size = 64
  config.model.update(name='resnet10', width=16)
  config.loss.update(normalizer='ema', normalizer_decay=0.9)
  config.epochs = 20
  config.optimizer.update(schedule='cosine', warmup_epochs=1.0)
  return config, 3


def _paper():
  """configs/cifar10.py; Z of NCE is frozen at the first batch, as published."""
  config: Any = config_lib.default()
  config.dataset.name, config.dataset.limit = 'tfds:cifar10', 50_000
  return config, 3


# {scale: () -> (configuration, number of seeds per row)}
SCALES: dict[str, Callable[[], tuple[config_lib.Config, int]]] = {
    'smoke': _smoke, 'small': _small, 'paper': _paper}


def configure(table: str, scale: str, title: str | None, seed: int,
              data_dir: str | None = None) -> config_lib.Config:
  """The configuration of one run.

  Args:
    table: one of `TABLES`.
    scale: one of `SCALES`.
    title: the title of a row; None for what the rows have in common.
    seed: the seed of the run.
    data_dir: the folder of prepared TFDS data.

  Returns:
    A `ConfigDict`.
  """
  config, _ = SCALES[scale]()
  if table == 'recipe':  # as published, 120 and 160 of 200 epochs
    milestones = tuple(round(share * config.epochs) for share in (0.6, 0.8))
    config.optimizer.update(schedule='milestones', milestones=milestones, warmup_epochs=0.0)
  settings = {} if title is None else dict(TABLES[table].rows[title])
  for key, whole in (('dataset.limit', config.dataset.limit), ('epochs', config.epochs),
                     ('loss.neighbors_from_epoch', config.epochs)):
    if key in settings:
      settings[key] = round(settings[key] * whole)
  config.update_from_flattened_dict(settings)
  if table == 'proximal' and config.loss.normalizer == 'ema':  # which lets λ collapse the features
    config.loss.normalizer = str(20 * config.dataset.limit)
  config.seed, config.dataset.data_dir = seed, data_dir
  config.knn.every_epochs = 0  # only at the end
  config.log_every_steps = 1 if TABLES[table].curves else 10
  config.checkpoint.update(every_steps=500, keep=1)
  return config


def run(output: pathlib.Path, table: str, scale: str, *, seeds: int | None = None,
        data_dir: str | None = None, train: Train, measure_svm: MeasureSVM) -> Iterator[str]:
  """Trains the missing rows of a table; the files of `write` are updated after each run.

  Args:
    output: the folder; each run has its workdir below it.
    table: one of `TABLES`.
    scale: one of `SCALES`.
    seeds: runs per row; by default as many as the scale has.
    data_dir: the folder of prepared TFDS data.
    train: called with (config, workdir); trains or resumes a run, and skips a finished one.
    measure_svm: workdir -> {'top1': of a linear SVM on the pooled features, ...}.

  Yields:
    The name of each run before it starts.

  Raises:
    errors.UserError: the data are missing, or the folder holds something else.
    errors.RunError: some runs failed; the others are in the table.
    errors.Stopped: stopped by a signal.
  """
  entry, failed = TABLES[table], {}
  results = ended(output, table, scale)
  about = describe(configure(table, scale, None, 0))
  for seed in range(SCALES[scale]()[1] if seeds is None else seeds):  # all rows get values soon
    for number, title in enumerate(entry.rows):
      yield f'seed {seed}, {title}'
      config = configure(table, scale, title, seed, data_dir)
      workdir = output / 'rows' / f'{number}-seed{seed}'
      try:
        row = _run_row(config, workdir, train, measure_svm if entry.with_svm else None)
        if row is not None:
          results[title][seed] = row
      except errors.RunError as e:
        failed[f'{title}, seed {seed}'] = errors.one_line(e)
      if any(results.values()):
        write(output, table, scale, results, failed, about)
  if failed:
    raise errors.RunError('; '.join(f'{name}: {why}' for name, why in failed.items()))


def _run_row(config, workdir, train, measure_svm):
  """The measures of one run, trained if needed; without the SVM if `measure_svm` is None."""
  try:
    train(config, workdir)
  except errors.UserError as e:
    if e.setting is None or e.setting in _FREE:
      raise
    raise e.with_remedy('set another <--workdir>') from e
  if measure_svm is not None and not (workdir / _SVM_FILE).exists():
    files.write(workdir / _SVM_FILE, json.dumps(measure_svm(workdir)))
  return measured(workdir, measure_svm is not None)


def measured(workdir: pathlib.Path, with_svm: bool) -> Measures | None:
  """The measures of a run; None if it has not finished."""
  wanted = [workdir / name for name in (summary.FILE, *([_SVM_FILE] * with_svm))]
  if not all(file.exists() for file in wanted):
    return None
  found, *svm = (json.loads(file.read_text()) for file in wanted)
  settings = config_lib.flatten(config_lib.from_json(workdir_lib.read(workdir)[0]))
  kept = {'knn': found['knn_top1'], 'loss': found['final_loss'], 'steps': found['steps'],
          'seconds': found['wall_seconds'], 'untrained': found['knn_top1_untrained'],
          'pixels': found['knn_top1_pixels'], 'pooled': found.get('knn_top1_pooled'),
          'views': found['steps'] * settings['batch_size'] * settings['loss.views'],
          'curve': curve(metrics.read(workdir), settings, found['num_rows'])}
  return kept | ({'svm': svm[0]['top1']} if svm else {})


def curve(lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any],
          num_rows: int) -> list[float]:
  """The mean loss of each epoch, without the proximal term.

  Args:
    lines: those of metrics.jsonl.
    settings: {'batch_size': ..., 'loss.proximal_weight': ...}.
    num_rows: N.
  """
  epochs: dict[int, list[float]] = {}
  for line in lines:
    if 'step_loss' in line:
      penalty = settings['loss.proximal_weight'] * line.get('proximal_penalty', 0)
      epochs.setdefault((line['step'] - 1) * settings['batch_size'] // num_rows, []).append(
          line['step_loss'] - penalty)
  return [float(np.mean(epochs[epoch])) for epoch in sorted(epochs)]


def roughness(curve: Sequence[float]) -> float:
  """Mean absolute second difference: how far a point is from the line through its neighbors."""
  return float(np.abs(np.diff(curve, 2)).mean()) if len(curve) > 2 else 0.0


def check_output(output: pathlib.Path, table: str, scale: str) -> None:
  """Raises `errors.UserError` if the folder holds another table."""
  file = output / RESULTS
  if file.exists():
    found = json.loads(file.read_text())
    if (found['table'], found['scale']) != (table, scale):
      raise errors.UserError(
          f"'{output}' holds the table {found['table']} of the scale {found['scale']}",
          remedy='set another <--output>', setting='--output')


def ended(output: pathlib.Path, table: str, scale: str) -> Results:
  """The finished runs of a table.

  Raises:
    errors.UserError: the folder holds another table.
  """
  check_output(output, table, scale)
  results: Results = {title: {} for title in TABLES[table].rows}
  for number, (title, by_seed) in enumerate(results.items()):
    for workdir in (output / 'rows').glob(f'{number}-seed*'):
      seed = int(workdir.name.partition('seed')[2])
      row = measured(workdir, TABLES[table].with_svm)
      if row is not None and _is_of(workdir, configure(table, scale, title, seed)):
        by_seed[seed] = row
  return results


def _is_of(workdir, config):
  """Whether a finished run has its row's settings, which another version may have changed."""
  found = config_lib.from_json(workdir_lib.read(workdir)[0])
  compared = lambda config: {
      key: value for key, value in config_lib.flatten(config).items()
      if key in ('epochs', 'dataset.limit') or key.partition('.')[0] in _COMPARED}
  return compared(found) == compared(config)


def write(output: pathlib.Path, table: str, scale: str, results: Results,
          failed: Mapping[str, str], about_data: str) -> None:
  """Writes table.md, plot.png and results.json.

  Args:
    output: the folder.
    table: one of `TABLES`.
    scale: one of `SCALES`.
    results: the results of the finished runs; rows without any are left out.
    failed: {run: reason}.
    about_data: a paragraph on the data and the training.
  """
  entry = TABLES[table]
  results = {title: dict(sorted(by_seed.items())) for title, by_seed in results.items() if by_seed}
  files.write(output / RESULTS, json.dumps(
      {'table': table, 'scale': scale, 'about': about_data, 'rows': results}, indent=2,
      ensure_ascii=False) + '\n')
  figures.save(plot(entry, results, f'{table}, scale {scale}'), output / 'plot.png')
  lines = [f'# {table}, scale {scale}', '', about_data, '', entry.about, '',
           *_format(entry, results), '',
           *(f'Failed: {name}: {why}.\n' for name, why in failed.items()),
           '![plot](plot.png)', '']
  files.write(output / 'table.md', '\n'.join(lines))


def _format(table, results):
  """The lines of a Markdown table."""
  head = ['row']
  for measure in table.paper:
    head += [f'{measure}, paper', f'{measure}, here', '± 95%', 'each seed']
  others = {'raw pixels, kNN': ('pixels', 3), 'untrained, kNN': ('untrained', 3),
            'last loss': ('loss', 3)}
  if table.costs:
    others |= {'pooled, kNN': ('pooled', 3), 'steps': ('steps', 0), 'views': ('views', 0)}
  if table.curves:
    others['roughness'] = ('roughness', 3)
  others['seconds'] = ('seconds', 0)
  head += others
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  for title, by_seed in results.items():
    cells = [title]
    for measure, paper in table.paper.items():
      values = [run[measure] for run in by_seed.values()]
      mean, half = few_label.interval(values)
      known = paper.get(title)
      cells += ['–' if known is None else f'{known:.3f}', f'{mean:.3f}',
                '–' if half is None else f'{half:.3f}', ', '.join(f'{v:.3f}' for v in values)]
    for key, digits in others.values():
      values = [roughness(run['curve']) if key == 'roughness' else run[key]
                for run in by_seed.values()]
      cells.append('–' if None in values else f'{np.mean(values):,.{digits}f}')
    lines.append(f'| {" | ".join(cells)} |')
  return lines


def plot(table: Table, results: Results, title: str) -> figure_lib.Figure:
  """A figure of our means, with intervals and single seeds, beside the paper's values."""
  columns = len(table.paper) + table.curves
  figure = figure_lib.Figure(layout='constrained', figsize=(
      1.5 + 5.5 * columns, 1.2 + 0.45 * len(results)))
  grid = figure.subplots(1, columns, squeeze=False)
  place = np.arange(len(results))
  for axes, (measure, known) in zip(grid[0], table.paper.items()):
    for y, by_seed in enumerate(results.values()):
      values = [run[measure] for run in by_seed.values()]
      mean, half = few_label.interval(values)
      axes.errorbar(mean, y, xerr=half, fmt='o', color='#1f77b4', capsize=4,
                    label='here, 95% interval' if y == 0 else None)
      axes.plot(values, [y] * len(values), '|', color='#1f77b4', ms=12)
      for key, name, mark in (('pixels', 'raw pixels', 'x'), ('untrained', 'untrained', '.')):
        if measure == 'knn':
          axes.plot(np.mean([run[key] for run in by_seed.values()]), y, mark, color='gray', ms=6,
                    label=name if y == 0 else None)
    given = [(known[row], y) for y, row in enumerate(results) if row in known]
    if given:
      axes.plot(*zip(*given), 'D', color='#d62728', ms=5, label='paper')
    axes.set_yticks(place, results)
    axes.invert_yaxis()
    axes.set(xlabel=f'{measure} top-1', title=title)
    axes.grid(axis='x', alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8)
  if table.curves:
    _draw_curves(grid[0, -1], results)
  return figure


def _draw_curves(axes, results):
  """The loss of each row epoch by epoch, the mean of its seeds."""
  colors = np.linspace(0, 1, len(results))
  for color, (title, by_seed) in zip(colors, results.items()):
    mean = np.mean([run['curve'] for run in by_seed.values()], axis=0)
    axes.plot(np.arange(1, len(mean) + 1), mean, color=colormaps['viridis'](color), label=title)
  axes.set(xlabel='epoch', title='loss without the proximal term')
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))


def describe(config: config_lib.Config) -> str:
  """A paragraph that describes the data and the training."""
  return (f'{config.dataset.limit:,} images of `{config.dataset.name}`, {config.model.name} of '
          f'width {config.model.width}, {config.epochs} epochs of batches of {config.batch_size}, '
          f'learning rate {config.optimizer.learning_rate:g} ({config.optimizer.schedule}), '
          f'τ = {config.loss.temperature:g}, Z of NCE: {config.loss.normalizer}'
          + (f' with decay {config.loss.normalizer_decay:g}'
             if config.loss.normalizer == 'ema' else '')
          + f'; kNN with K = {config.knn.neighbors}. instdisc_jax {__version__}, '
          f'JAX {jax.__version__}, {jax.devices()[0].device_kind}.')
