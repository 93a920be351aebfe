"""The paper's protocols for evaluating the features of a trained run.

    knn        weighted nearest neighbors over a grid of K and τ, with fresh embeddings, pooled
               features and bank rows; confusion.png
    linear     a softmax probe on each stage of the encoder
    svm        a linear SVM on the pooled features and on the embedding
    few_label  fine-tuning with 1 to 20% of the labels, compared with the same encoder from random
               weights
    geometry   alignment of two views and of a class; uniformity, effective rank, and how far the
               bank lags behind
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from instdisc_jax import data, linalg
from instdisc_jax.data import views
from instdisc_jax.evaluation import (
  embedding,
  feature_store,
  few_label,
  figures,
  geometry,
  knn,
  probes,
  two_views,
)
from instdisc_jax.evaluation.embedding import EMBEDDING, STAGES
from instdisc_jax.runtime import errors, files

_KS, _TEMPERATURES = (1, 5, 20, 50, 100, 200), (0.04, 0.07, 0.1, 0.2)
_CLASSES_SHOWN, _CLASSES_DRAWN = 20, 2000
_HELD_OUT = 0.2  # share held out of a set that has no held-out images
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
    bank: [N, D] rows of the training images, or None for another data set.
    train_images: N images.
    test_images: Q images.
    check: called between the steps of long protocols; what it raises ends them.
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
  check: Callable[[], None] = lambda: None

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
  wanted = tuple(dict.fromkeys(stage for p in protocols for stage in PROTOCOLS[p].stages))
  least = _LEAST if any(PROTOCOLS[p].learns for p in protocols) else 2
  dataset, bank = _data(model, name)
  rows, test_rows = np.arange(len(dataset.train)), np.zeros(0, int)
  if dataset.test is None:
    shuffled = np.random.RandomState(0).permutation(len(rows))
    test_rows, rows = map(np.sort, np.split(shuffled, [max(1, round(_HELD_OUT * len(rows)))]))
  train_labels, test_labels, class_names = _labels(dataset, rows, test_rows)
  if train_labels is None and any(p != 'geometry' for p in protocols):
    raise errors.UserError(f'{dataset.name} has no labels to evaluate with', setting='--dataset',
                           remedy='set <--dataset> to one that has')
  _check_enough(dataset.name, len(rows), train_labels, least)
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


def _data(model, name):
  """(the data set, the run's bank or None for other data)."""
  if name is None:
    return model.dataset, model.bank if model.has_bank else None
  config = model.config.dataset.copy_and_resolve_references()
  config.update(name=name, limit=None, validation=None)
  dataset, path = data.load(config, model.config.seed), model.config.dataset.path
  return dataset if path == 'resident' else dataset.kept(path), None


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


def nearest_neighbors(sets: Sets) -> Iterator[dict[str, Any]]:
  """Top-1 and top-5 for each kind of feature, K and τ, from one search each.

  A class without a vote is not among the top 5. For the embedding with the run's own K and τ, the
  result also has the top-1 of each class, and the confusion matrix is drawn.
  """
  own = sets.model.config.knn
  kinds = {EMBEDDING: (sets.train[EMBEDDING], sets.test[EMBEDDING]),
           'pooled': (linalg.unit(sets.train['pooled']), linalg.unit(sets.test['pooled']))}
  if sets.bank is not None:
    kinds['bank rows'] = sets.bank, sets.test[EMBEDDING]
  own_k = min(own.neighbors, len(sets.train_labels))
  ks = sorted({min(k, len(sets.train_labels)) for k in (*_KS, own_k)})
  temperatures = sorted({*_TEMPERATURES, own.temperature})
  for kind, (rows, queries) in kinds.items():
    similarity, row = map(np.asarray, knn.nearest(queries, rows, k=ks[-1]))
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
  if sets.num_classes <= _CLASSES_DRAWN:
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


def support_vectors(sets: Sets) -> Iterator[dict[str, Any]]:
  """A row of results for the pooled features and one for the embedding, where available."""
  for name in ('pooled', EMBEDDING):
    if name in sets.train:
      yield {'features': name} | probes.support_vectors(
          sets.train[name], sets.train_labels, sets.test[name], sets.test_labels)


def fine_tune(sets: Sets) -> Iterator[dict[str, Any]]:
  """A row of results for each share of the labels and each start.

  Images in files are cropped from their central views.
  """
  model = sets.model
  read_train, read_test = (functools.partial(views.read, images, side=model.config.augment.size)
                           for images in (sets.train_images, sets.test_images))
  size = views.size(model.config, read_train(np.zeros(1, int)).shape[1:])
  init = jax.jit(functools.partial(model.encoder.init, train=False))

  def random(seed):
    key = jax.random.fold_in(jax.random.key(model.config.seed), seed)
    variables = init(key, np.zeros((1, *size, 3), np.float32))
    return {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}

  trained = _on_one_device(model.variables)
  yield from few_label.measure(
      model.encoder, {'trained': lambda _: trained, 'random': random}, read_train,
      sets.train_labels, read_test, sets.test_labels, num_classes=sets.num_classes,
      config=model.config, check=sets.check)


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


def _on_one_device(variables):
  """Replicated variables on this process's first device."""
  return jax.device_put(jax.device_get(variables), jax.local_devices()[0])


@dataclasses.dataclass(frozen=True)
class Entry:
  """A protocol.

  Attributes:
    measure: `Sets` -> rows of results.
    stages: the features that it needs.
    learns: whether it trains a classifier.
  """
  measure: Any
  stages: tuple[str, ...]
  learns: bool = False


PROTOCOLS = {
    'knn': Entry(nearest_neighbors, ('pooled', EMBEDDING)),
    'linear': Entry(linear, (*STAGES, EMBEDDING), learns=True),
    'svm': Entry(support_vectors, ('pooled', EMBEDDING), learns=True),
    'few_label': Entry(fine_tune, (), learns=True),
    'geometry': Entry(measure_geometry, (EMBEDDING,)),
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
