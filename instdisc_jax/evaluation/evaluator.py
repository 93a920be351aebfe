"""kNN accuracy of a state, during training and after it."""

from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Float, Int
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import data, linalg
from instdisc_jax.data import views
from instdisc_jax.evaluation import embedding, figures, geometry, knn, nearest, two_views
from instdisc_jax.runtime import distributed, preemption
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training.state import Setup, TrainState

_PIXEL_SIDE = 32  # the largest side of images for kNN with raw pixels
_MOST_PIXEL_ROWS = 200_000  # at 12 KiB each
_MOST_QUERIES = 50_000  # among training images, if none are held out
FEW_ROWS = 50_000  # images up to which the start is measured before training, not after it


class Evaluator:
  """kNN of a data set's held-out images against its training images.

  Without held-out images the training images themselves are the queries, each with its own row left
  out, or 50,000 of them, evenly spaced. Without labels there is no accuracy, only neighbors.

  Args:
    setup: the fixed parts of the run.
    dataset: the run's data, in memory if the run is resident.
    watch: checked for signals between encoder calls.

  Attributes:
    queries: the query images.
    has_labels: whether accuracy can be measured.
    side: side of the views, in pixels.
  """

  def __init__(self, setup: Setup, dataset: data.Dataset, watch: preemption.Watch):
    self._setup, self._train = setup, dataset.train
    self.queries, self._own_row = _queries(dataset)
    self.has_labels = dataset.train.labels is not None and self.queries.labels is not None
    config, mesh = setup.config, setup.mesh
    size = views.size(config, dataset.train.shape)
    self.side = size[0]
    self._engine = embedding.Engine(config, setup.encoder, mesh, size, watch.check)
    self._k = num_searched(config, setup.num_rows - (self._own_row is not None))
    self._nearest = knn.over_mesh(mesh, self._k, setup.num_rows, config.knn.recall_target)
    self._exact = knn.over_mesh(mesh, self._k, setup.num_rows)
    self._geometry = geometry.of_bank(mesh, setup.num_rows)

  def embed(self, state: TrainState, images: data.Images) -> Float[np.ndarray, 'n D']:
    """Embeddings of any images."""
    return self._engine.embed(_variables(state), images)

  def embed_in_parts(self, state: TrainState,
                     images: data.Images) -> Iterator[Float[np.ndarray, 'n D']]:
    """Yields the embeddings of any images, in order, some at a time."""
    for part in self._engine.run(_variables(state), images):
      yield part[embedding.EMBEDDING]

  def during_training(self, state: TrainState) -> dict[str, float]:
    """What metrics.jsonl has of the bank: its geometry, and 'knn_top1' where there are labels."""
    uniformity, rank = map(float, self._geometry(state.bank))
    found, top1 = {'uniformity': uniformity, 'effective_rank': rank}, self.from_bank(state)
    return found if top1 is None else found | {'knn_top1': top1}

  def from_bank(self, state: TrainState) -> float | None:
    """kNN top-1 of the queries against the bank's current rows, or None without labels."""
    if not self.has_labels:
      return None
    return self._top1(*self._search(self.embed(state, self.queries), state.bank))

  def recomputed(self, state: TrainState) -> tuple[
      float | None, Float[np.ndarray, 'Q K'], Int[np.ndarray, 'Q K']]:
    """kNN against fresh features of all training images: (top-1 or None, similarities, rows)."""
    rows = self._engine.rows(_variables(state), self._train)[embedding.EMBEDDING]
    if len(self.queries) == len(self._train) and self._own_row is not None:
      queries = distributed.gather(rows)[:len(self._train)]
    else:
      queries = self.embed(state, self.queries)
    found = self._search(queries, rows)
    return self._top1(*found), *found

  def pooled(self, state: TrainState) -> float | None:
    """kNN top-1 by the features that the head maps to embeddings; None without labels."""
    if not self.has_labels:
      return None
    parts = self._engine.run(_variables(state), self.queries, ('pooled',))
    queries = {'pooled': np.concatenate([part['pooled'] for part in parts])}
    found = nearest.search(self._engine, _variables(state), self._train, queries, self._k,
                           own_row=self._own_row)
    return self._top1(*found['pooled'])

  def agreement(self, state: TrainState) -> float | None:
    """How far two views of an image agree on its neighbors; None if there are few images."""
    if len(self._train) <= 2 * two_views.NEIGHBORS:
      return None
    return two_views.agreement(*two_views.embed(self._setup.config, self._setup.encoder,
                                                _variables(state), self._train))

  def before(self, state: TrainState) -> dict[str, float | None]:
    """What training has to improve on, as summary.json names it.

    Args:
      state: the state before training; its bank is not used.
    """
    return {'knn_top1_untrained': self.recomputed(state)[0] if self.has_labels else None,
            'knn_top1_pixels': self.pixels(),
            'neighbor_agreement_untrained': self.agreement(state)}

  def pixels(self) -> float | None:
    """kNN top-1 with mean-centered raw pixels as features; None without labels.

    Images in files and larger ones are reduced to 32 x 32 views; None if there are too many.
    """
    if not self.has_labels or len(self._train) > _MOST_PIXEL_ROWS:
      return None
    flat = self._pixels(self._train)
    mean = flat.mean(axis=0)
    queries = self._pixels(self.queries) if self._own_row is None else flat[self._own_row]
    bank = mesh_lib.shard_rows(linalg.unit(flat - mean), self._setup.mesh)
    return self._top1(*self._search(linalg.unit(queries - mean), bank))

  def recall(self, state: TrainState) -> float | None:
    """Share of the exact neighbors that the approximate search finds; None if it is not used."""
    if self._setup.config.knn.recall_target is None:
      return None
    queries = self.embed(state, self.queries)
    found, exact = (self._search(queries, state.bank, search)[1]
                    for search in (self._nearest, self._exact))
    return knn.recall(found, exact)

  def _pixels(self, images):
    as_they_are = (isinstance(images.files, np.ndarray)
                   and max(images.files.shape[1:3]) <= _PIXEL_SIDE)
    pixels = images.files if as_they_are else self._engine.views(images, _PIXEL_SIDE)
    return pixels.reshape(len(images), -1).astype(np.float32)

  def _search(self, queries, bank, search=None) -> tuple[Any, Any]:
    own_row = np.full(len(queries), -1, np.int32) if self._own_row is None else self._own_row
    return jax.device_get((search or self._nearest)(queries, bank, own_row))

  def _top1(self, similarity, row):
    if self._train.labels is None or self.queries.labels is None:
      return None
    k = self._setup.config.knn.neighbors
    return knn.top1(similarity[:, :k], row[:, :k], self._train.labels, self.queries.labels,
                    self._setup.config.knn.temperature)


def _queries(dataset: data.Dataset) -> tuple[data.Images, Int[np.ndarray, ' Q'] | None]:
  """(the query images; their rows in the bank, or None if they are held out)."""
  if dataset.test is not None:
    return dataset.test, None
  num_rows = len(dataset.train)
  if num_rows <= _MOST_QUERIES:
    return dataset.train, np.arange(num_rows, dtype=np.int32)
  rows = (np.arange(_MOST_QUERIES) * num_rows // _MOST_QUERIES).astype(np.int32)
  return dataset.train.subset(rows, f'{_MOST_QUERIES} queries'), rows


def num_searched(config: config_lib.Config, num_rows: int) -> int:
  """How many neighbors are searched: enough for the vote, and for the figure."""
  return min(max(config.knn.neighbors, figures.NEIGHBORS), num_rows)


def _variables(state):
  return {'params': state.params, 'batch_stats': state.batch_stats}
