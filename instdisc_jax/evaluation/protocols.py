"""The paper's protocols for evaluating the features of a trained run.

    knn        weighted nearest neighbors over a grid of K and τ, with fresh embeddings, pooled
               features and bank rows; confusion.png
    linear     a softmax probe on each stage of the encoder, whose features fit in memory
    linear_online  the same for any number of images, on random views, on all devices
    svm        a linear SVM on the pooled features and on the embedding; for images with several
               labels, one for each class, and the mean average precision
    few_label  fine-tuning with 1 to 20% of the labels, compared with the same encoder from random
               weights
    detection  Faster R-CNN on images with boxes, likewise; with --dataset=coco:FOLDER or
               tfds:voc/2007
    geometry   alignment of two views and of a class; uniformity, effective rank, and how far the
               bank lags behind
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import pathlib
import re
from typing import Any, Protocol

import flax.linen as nn
import jax
from jaxtyping import Float
import numpy as np
from rich import console as rich_console
from rich import table as rich_table
from sklearn import metrics

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import scenes as scenes_lib
from instdisc_jax.data import views
from instdisc_jax.evaluation import (
  detection,
  embedding,
  feature_store,
  few_label,
  figures,
  geometry,
  knn,
  linear_online,
  nearest,
  probes,
  two_views,
)
from instdisc_jax.evaluation.embedding import EMBEDDING, STAGES
from instdisc_jax.interop import layouts
from instdisc_jax.runtime import distributed, errors, files, preemption
from instdisc_jax.runtime import mesh as mesh_lib

UNFINISHED = 'unfinished'  # the folder of evaluations that were stopped
_KS, _TEMPERATURES = (1, 5, 20, 50, 100, 200), (0.04, 0.07, 0.1, 0.2)
_CLASSES_SHOWN, _CLASSES_DRAWN = 20, 2000
_HELD_OUT = 0.2  # share held out of a set that has no held-out images
_SHARE = 0.25  # of a device's memory that the features of a stage may take in `linear`
_LEAST = 10  # minimum number of labeled images for the protocols that train


class Model(Protocol):
  """The parts of a trained run that the protocols use, see `inference.Model`."""
  @property
  def workdir(self) -> files.Place: ...
  @property
  def config(self) -> config_lib.Config: ...
  @property
  def encoder(self) -> nn.Module: ...
  @property
  def variables(self) -> dict[str, Any]: ...
  @property
  def engine(self) -> embedding.Engine: ...
  @property
  def dataset(self) -> data.Dataset: ...
  @property
  def has_bank(self) -> bool: ...
  @property
  def bank(self) -> Float[np.ndarray, 'N D']: ...
  def digest(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Sets:
  """Features and labels of the training images and of the test images.

  Attributes:
    model: the trained run.
    name: name of the data set.
    train: {stage: [N, F]}.
    train_labels: [N] int, or None.
    test: {stage: [Q, F]}.
    test_labels: [Q] int, or None.
    class_names: the C names; unnamed classes that have images go by their numbers.
    bank: [N, D] rows of the training images; None for another data set, or if none needs it.
    train_images: N images.
    test_images: Q images.
    watch: watches for signals, which end long protocols.
    shares: of the labels, for few_label; by default as in its recipe.
    scenes: (training, test) images with boxes, for detection.
  """
  model: Model
  name: str
  train: dict[str, np.ndarray]
  train_labels: Any
  test: dict[str, np.ndarray]
  test_labels: Any
  class_names: tuple[str, ...]
  bank: Float[np.ndarray, 'N D'] | None
  train_images: data.Images
  test_images: data.Images
  watch: preemption.Watch = dataclasses.field(default_factory=preemption.Watch)
  shares: tuple[float, ...] | None = None
  scenes: tuple[scenes_lib.Scenes, scenes_lib.Scenes] | None = None

  @property
  def train_tags(self) -> Any:
    """[N, C] int8 for images with several labels, see `data.Images`; or None."""
    return self.train_images.tags

  @property
  def test_tags(self) -> Any:
    """[Q, C] int8, or None."""
    return self.test_images.tags

  @property
  def num_classes(self) -> int:
    """C."""
    return len(self.class_names)


def prepare(model: Model, folder: pathlib.Path, protocols: Sequence[str],
            name: str | None = None) -> Sets:
  """Collects the features that the protocols need; every process must call it.

  Args:
    model: the trained run.
    folder: where the features are stored.
    protocols: names in `PROTOCOLS`.
    name: another data set to evaluate the features on, as `dataset.name`; by default the run's own.

  Returns:
    `Sets`; without features on all processes but the first.

  Raises:
    errors.UserError: the data are missing, too few, or unlabeled.
  """
  if list(protocols) == ['detection']:
    return _with_boxes(model, name)
  with_bank = any(PROTOCOLS[p].with_bank for p in protocols)
  wanted = tuple(dict.fromkeys(stage for p in protocols for stage in PROTOCOLS[p].stages))
  least = _LEAST if any(PROTOCOLS[p].learns for p in protocols) else 2
  dataset = _data(model, name)
  bank = model.bank if name is None and model.has_bank and with_bank else None
  rows, test_rows = np.arange(len(dataset.train)), np.zeros(0, int)
  if dataset.test is None:
    shuffled = np.random.RandomState(0).permutation(len(rows))
    test_rows, rows = map(np.sort, np.split(shuffled, [max(1, round(_HELD_OUT * len(rows)))]))
  train_labels, test_labels, class_names = _labels(dataset, rows, test_rows)
  tagged = dataset.train.tags is not None and (dataset.test or dataset.train).tags is not None
  for part, images in (('training', dataset.train), ('test', dataset.test or dataset.train)):
    if tagged and not (images.tags == 1).any():
      raise errors.UserError(f'the {part} images of {dataset.name} have no labels',
                             setting='--dataset', remedy='set <--dataset> to another set')
  enough = {'geometry', 'svm'} if tagged else {'geometry'}
  if train_labels is None and not enough.issuperset(protocols):
    raise errors.UserError(
        f'{dataset.name} has '
        + ('images with several labels' if tagged else 'no labels to evaluate with'),
        'one label for each image' if tagged else None, setting='--dataset',
        remedy='set <--protocol>=svm, or <--dataset> to another' if tagged
        else 'set <--dataset> to one that has')
  _check_enough(dataset.name, len(rows), train_labels, 2 if tagged else least)
  if 'linear' in protocols:
    _check_fits(model, dataset.train, wanted)
  collect = functools.partial(feature_store.collect, model.engine, model.variables, model.digest(),
                              folder=folder, names=wanted)
  train = collect(dataset.train)
  if dataset.test is None:
    test = {k: x[test_rows] for k, x in train.items()}
    train = {k: x[rows] for k, x in train.items()}
  else:
    test = collect(dataset.test)
  return Sets(model, name or model.config.dataset.name, train, train_labels, test, test_labels,
              class_names, None if bank is None else bank[rows],
              dataset.train.subset(rows, 'train'),
              dataset.test or dataset.train.subset(test_rows, 'test'))


def _with_boxes(model, name):
  """The `Sets` of detection, which is measured alone."""
  if name is None:
    raise errors.UserError('detection needs images with boxes', setting='--dataset',
                           remedy='set <--dataset>=coco:FOLDER or tfds:voc/2007')
  train, test, names = scenes_lib.load(name, model.config.dataset.data_dir)
  return Sets(model, name, {}, None, {}, None, names, None, train.images, test.images,
              scenes=(train, test))


def _data(model, name):
  """The data set to evaluate on."""
  if name is None:
    return model.dataset
  config = model.config.dataset.copy_and_resolve_references()
  config.update(name=name, limit=None, validation=None)
  dataset, path = data.load(config, model.config.seed), model.config.dataset.path
  return dataset if path == 'resident' else dataset.kept(path)


def _labels(dataset, rows, test_rows):
  """(training labels, test labels, class names); (None, None, ()) without labels."""
  if dataset.train.labels is None or (dataset.test is not None and dataset.test.labels is None):
    return None, None, ()
  train = dataset.train.labels[rows]
  test = dataset.train.labels[test_rows] if dataset.test is None else dataset.test.labels
  if dataset.class_names is not None:
    return train, test, dataset.class_names
  numbers, both = np.unique(np.concatenate([train, test]), return_inverse=True)  # may have gaps
  train, test = np.split(both.astype(np.int32), [len(rows)])
  return train, test, tuple(map(str, numbers))


def _check_enough(name, count, labels, least):
  classes = 0 if labels is None else len(np.unique(labels))
  learns = least > 2
  if count < least or (learns and classes < 2):
    raise errors.UserError(
        f'{name} has {count} images to learn from' + (f' in {classes} classes' if learns else ''),
        f'at least {least}' + (' in 2' if learns else ''), 'set <--dataset> to a larger set',
        '--dataset')


def _check_fits(model, images, names):
  """Raises `errors.UserError` if a stage is too large for the probe that keeps its features."""
  widths = model.engine.widths(model.variables, images, names)
  stage = max(widths, key=widths.__getitem__)
  size, memory = 4 * len(images) * widths[stage], distributed.smallest(
      mesh_lib.memory(model.engine.mesh))
  if size > _SHARE * memory:
    raise errors.UserError(
        f'{stage} of {len(images):,} images takes {size / 2**30:.1f} GiB',
        f'at most a quarter of the {memory / 2**30:.1f} GiB of a device', setting='--protocol',
        remedy='set <--protocol>=linear_online')


def nearest_neighbors(sets: Sets) -> Iterator[dict[str, Any]]:
  """Top-1 and top-5 for each kind of feature, K and τ, from one search each.

  A class without a vote is not among the top 5. For the embedding with the run's own K and τ, the
  result also has the top-1 of each class, and the confusion matrix is drawn.
  """
  own, model = sets.model.config.knn, sets.model
  own_k = min(own.neighbors, len(sets.train_labels))
  ks = sorted({min(k, len(sets.train_labels)) for k in (*_KS, own_k)})
  temperatures = sorted({*_TEMPERATURES, own.temperature})
  parts = []
  for part in model.engine.run(model.variables, sets.test_images, (EMBEDDING, 'pooled')):
    parts.append(part)
    sets.watch.check()
  queries = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
  found = nearest.search(model.engine, model.variables, sets.train_images, queries, ks[-1],
                         check=sets.watch.check)
  if sets.bank is not None:
    found['bank rows'] = nearest.among(
        model.engine.mesh, mesh_lib.shard_rows(sets.bank, model.engine.mesh), queries[EMBEDDING],
        ks[-1], len(sets.bank))
  for kind, (similarity, row) in found.items():
    labels = sets.train_labels[row]
    for k in ks:
      for temperature in temperatures:
        scores = np.asarray(knn.vote(similarity[:, :k], labels[:, :k], temperature,
                                     sets.num_classes))
        scores = np.where(scores > 0, scores, -np.inf)
        result = {'features': kind, 'neighbors': k, 'temperature': temperature,
                  'top1': probes.top_k(scores, sets.test_labels, 1),
                  'top5': probes.top_k(scores, sets.test_labels, 5)}
        if (kind, k, temperature) == (EMBEDDING, own_k, own.temperature):
          result['per_class'] = _per_class(sets, scores.argmax(axis=1))
        yield result


def _per_class(sets, predicted):
  """{class: top-1, or None without images}; draws the confusion matrix."""
  correct = np.bincount(sets.test_labels[predicted == sets.test_labels],
                        minlength=sets.num_classes)
  counts = np.bincount(sets.test_labels, minlength=sets.num_classes)
  if sets.num_classes <= _CLASSES_DRAWN and jax.process_index() == 0:
    confusion = metrics.confusion_matrix(sets.test_labels, predicted,
                                         labels=range(sets.num_classes))
    figures.save(figures.confusion(confusion, sets.class_names, sets.name),
                 sets.model.workdir / _confusion_file(sets))
  return {name: float(correct[i] / counts[i]) if counts[i] else None
          for i, name in enumerate(sets.class_names)}


def _confusion_file(sets):
  """confusion.png; for another data set, with its name and a digest that keeps names distinct."""
  if sets.bank is not None or sets.name == sets.model.config.dataset.name:
    return 'confusion.png'
  name = re.sub('[^A-Za-z0-9]+', '-', sets.name).strip('-')[:40]
  digest = hashlib.sha256(sets.name.encode('utf8', 'surrogateescape')).hexdigest()[:8]
  return f'confusion-{name}-{digest}.png'


def linear(sets: Sets) -> Iterator[dict[str, Any]]:
  """A row of results for each stage."""
  for name in feature_store.ALL:
    if name in sets.train:
      yield {'features': name} | probes.linear(
          sets.train[name], sets.train_labels, sets.test[name], sets.test_labels,
          num_classes=sets.num_classes)


def linear_stream(sets: Sets) -> Iterator[dict[str, Any]]:
  """A row of results for each stage; every process must call it."""
  return linear_online.measure(
      sets.model, sets.train_images, sets.test_images, (sets.train_labels, sets.test_labels),
      num_classes=sets.num_classes, folder=sets.model.workdir / UNFINISHED, watch=sets.watch)


def support_vectors(sets: Sets) -> Iterator[dict[str, Any]]:
  """A row of results for the pooled features and one for the embedding, where available."""
  for name in ('pooled', EMBEDDING):
    if name in sets.train and sets.train_labels is not None:
      yield {'features': name} | probes.support_vectors(
          sets.train[name], sets.train_labels, sets.test[name], sets.test_labels)
    elif name in sets.train:
      yield {'features': name} | probes.average_precision(
          sets.train[name], sets.train_tags, sets.test[name], sets.test_tags)


def fine_tune(sets: Sets) -> Iterator[dict[str, Any]]:
  """A row of results for each share of the labels and each start; every process must call it."""
  model = sets.model
  size = views.size(model.config, sets.train_images.shape)
  random = lambda seed: jax.tree.map(
      lambda x: mesh_lib.replicate(np.asarray(x), model.engine.mesh),
      _random_weights(model, size, seed))
  recipe = few_label.Recipe() if sets.shares is None else few_label.Recipe(shares=sets.shares)
  return few_label.measure(
      model, {'trained': lambda _: model.variables, 'random': random}, sets.train_images,
      sets.test_images, (sets.train_labels, sets.test_labels), num_classes=sets.num_classes,
      folder=model.workdir / UNFINISHED, watch=sets.watch, recipe=recipe)


def detect(sets: Sets) -> Iterator[dict[str, Any]]:
  """A row of results for the encoder, and one for the same from random weights."""
  assert sets.scenes is not None
  model, (train, test) = sets.model, sets.scenes
  backbone = lambda variables: {
      key: x for key, x in layouts.to_torchvision(jax.device_get(variables),
                                                  model.config.model.name).items()
      if not key.startswith('fc.')}
  encoder = detection.Encoder(model.config, {
      'trained': lambda seed: backbone(model.variables),
      'random': lambda seed: backbone(_random_weights(model, (64, 64), seed))}, model.digest())
  return detection.measure(encoder, train, test, sets.class_names,
                           folder=model.workdir / UNFINISHED, check=sets.watch.check_here)


def _random_weights(model, size, seed):
  """{'params', 'batch_stats'} before any training."""
  key = jax.random.fold_in(jax.random.key(model.config.seed), seed)
  variables = jax.jit(functools.partial(model.encoder.init, train=False))(
      key, np.zeros((1, *size, 3), np.float32))
  return {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}


def measure_geometry(sets: Sets) -> Iterator[dict[str, Any]]:
  """One row of results, for the embeddings of the training images."""
  embeddings, labels = np.asarray(sets.train[EMBEDDING]), sets.train_labels
  first, second = two_views.embed(sets.model.config, sets.model.encoder, sets.model.variables,
                                  sets.train_images)
  yield {'alignment': geometry.alignment(first, second),
         'neighbor_agreement': two_views.agreement(first, second),
         'class_alignment': None if labels is None else geometry.class_alignment(embeddings,
                                                                                 labels),
         'uniformity': geometry.uniformity(embeddings),
         'effective_rank': geometry.effective_rank(embeddings),
         'staleness': None if sets.bank is None else geometry.staleness(sets.bank, embeddings)}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A protocol.

  Attributes:
    measure: `Sets` -> rows of results.
    stages: the features that it needs.
    learns: whether it trains a classifier.
    on_mesh: whether all processes measure together; else the first does, on its own.
    with_bank: whether it needs the bank's rows.
  """
  measure: Any
  stages: tuple[str, ...]
  learns: bool = False
  on_mesh: bool = False
  with_bank: bool = False


PROTOCOLS = {
    'knn': Entry(nearest_neighbors, (), on_mesh=True, with_bank=True),
    'linear': Entry(linear, (*STAGES, EMBEDDING), learns=True),
    'linear_online': Entry(linear_stream, (), learns=True, on_mesh=True),
    'svm': Entry(support_vectors, ('pooled', EMBEDDING), learns=True),
    'few_label': Entry(fine_tune, (), learns=True, on_mesh=True),
    'detection': Entry(detect, ()),
    'geometry': Entry(measure_geometry, (EMBEDDING,), with_bank=True),
}


def show(protocol: str, results: list[dict[str, Any]], console: rich_console.Console) -> None:
  """Prints results as a table; a kNN grid is reduced to the run's own K and τ and the best."""
  title = protocol
  if protocol == 'knn':
    title = "knn, with the run's own K and τ"
    own = next(r for r in results if 'per_class' in r)
    if len(own['per_class']) <= _CLASSES_SHOWN:
      console.print('top-1 of each class:', ', '.join(
          f'{figures.printable(name)}: {"–" if top1 is None else f"{top1:.3f}"}'
          for name, top1 in own['per_class'].items()), markup=False)
    results = _own_and_best(results, own)
  table = rich_table.Table(title=title)
  for key in results[0]:
    table.add_column(key.replace('_', ' '), justify='left' if key == 'features' else 'right')
  for result in results:
    table.add_row(*_cells(result.values()))
  console.print(table)


def _own_and_best(results, own):
  """The rows of the run's own K and τ, with the best of each kind of features beside them."""
  settings = lambda r: (r['neighbors'], r['temperature'])
  best: dict[str, Any] = {}
  for r in results:
    if r['features'] not in best or r['top1'] > best[r['features']]['top1']:
      best[r['features']] = r
  return [{k: v for k, v in r.items() if k != 'per_class'} | {
      'best (K, τ)': f'{best[r["features"]]["top1"]:.4g} {settings(best[r["features"]])}'}
          for r in results if settings(r) == settings(own)]


def _cells(values: Iterable[Any]) -> Iterator[str]:
  for v in values:
    yield '–' if v is None else f'{v:.4g}' if isinstance(v, float) else str(v)
