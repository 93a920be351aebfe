"""Few-label classification: the encoder fine-tuned with a small share of the labels, on the mesh.

    device k holds   all weights, and its part of the batch
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int
import numpy as np
import optax
from scipy import stats

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import feeds, views
from instdisc_jax.evaluation import supervised
from instdisc_jax.runtime import distributed, files, preemption
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime.mesh import AXIS


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The measurements, and each fine-tuning (Section 4.3 of the paper).

  Attributes:
    shares: shares of the labels.
    seeds: seeds of the choice of labels, of the order and of the views.
    epochs: as in the paper, like the next two.
    milestones: epochs at which the learning rate is divided by 10.
    learning_rate: of the encoder,
    head_factor: and by how much that of the new classifier is higher.
    weight_decay: as in training.
    batch_size: the largest B; few images have batches of their number,
    least_batch: but at least of so many.
    least_steps: minimum number of steps; the milestones keep their places.
  """
  shares: tuple[float, ...] = (0.01, 0.02, 0.04, 0.1, 0.2)
  seeds: tuple[int, ...] = (0, 1, 2)
  epochs: int = 70
  milestones: tuple[int, ...] = (30, 60)
  learning_rate: float = 0.01
  head_factor: float = 10.0
  weight_decay: float = 1e-4
  batch_size: int = 256
  least_batch: int = 64
  least_steps: int = 120

  def batch(self, num_images: int, devices: int) -> int:
    """B for so many images: a multiple of the number of devices."""
    wanted = min(self.batch_size, max(self.least_batch, num_images))
    return max(devices, wanted - wanted % devices)

  def steps(self, num_images: int, devices: int) -> int:
    """Steps of fine-tuning with so many labeled images."""
    passes = self.epochs * num_images / self.batch(num_images, devices)
    return max(self.least_steps, math.ceil(passes))

  def rate(self, step: jax.Array, end: int) -> jax.Array:
    """The encoder's learning rate at a step."""
    return self.learning_rate * supervised.decay(step, end, self.milestones, self.epochs)


def measure(model: Any, starts: Mapping[str, Callable[[int], dict[str, Any]]], train: data.Images,
            test: data.Images, labels: tuple[Any, Any], *, num_classes: int, folder: files.Place,
            watch: preemption.Watch, recipe: Recipe = Recipe()) -> Iterator[dict[str, Any]]:
  """Fine-tunes from each start with each share of the labels, once per seed.

  Every process must call it. What is finished, and the fine-tuning that was stopped, are kept until
  all is measured: the same call resumes.

  Args:
    model: the encoder, which exposes 'pooled' (see `layers.show`); see `protocols.Model`.
    starts: {name: seed -> variables}, e.g. trained and random.
    train: N images.
    test: Q images.
    labels: ([N], [Q]) int.
    num_classes: C.
    folder: where unfinished measurements are kept.
    watch: watches for signals.
    recipe: the measurements.

  Yields:
    Rows of results: 'labels' (the share), 'images' (their number), 'start', 'top1' and 'top5' (None
    below 6 classes; means over seeds), 'interval' (half-width of the 95% confidence interval of
    top-1, by Student's t).

  Raises:
    errors.Stopped: stopped by a signal.
    errors.UserError: an image cannot be read.
  """
  size = supervised.view_size(model.engine, train)
  tuner = Tuner(model.config, model.encoder, model.engine.mesh, size, num_classes, recipe,
                model.engine.size)
  done: list[files.Place] = []
  rows: list[dict[str, Any]] = []  # given when all are done, so that no stop repeats one
  total = len(recipe.shares) * len(starts) * len(recipe.seeds)
  for share in recipe.shares:
    for name, start in starts.items():
      found, chosen = [], np.zeros(0, int)
      for seed in recipe.seeds:
        chosen = choose(labels[0], share, seed)
        images = train.subset(chosen, f'{share:g} of the labels by seed {seed}')
        what = supervised.key(name, seed, recipe, num_classes, images.identity(), chosen,
                              labels[0][chosen], test.identity(), labels[1], model.digest(),
                              model.engine.mesh.size)
        place = folder / f'few_label-{what}'
        job = f'fine-tuning {len(done) + 1} of {total}'
        found.append(supervised.once(place, 2, lambda: _fit_and_count(
            tuner, model, start(seed), images, labels[0][chosen], (test, labels[1]), seed, place,
            job, watch)))
        done.append(place)
      mean, half = interval([top1 for top1, _ in found])
      top5 = float(np.mean([top5 for _, top5 in found])) if num_classes > 5 else None
      rows.append({'labels': share, 'images': len(chosen), 'start': name, 'top1': mean,
                   'top5': top5, 'interval': half})
  yield from rows
  supervised.forget(done)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
  """(mean, half-width of its 95% confidence interval by Student's t, or None for one value)."""
  mean = float(np.mean(values))
  if len(values) < 2:
    return mean, None
  spread = float(np.std(values, ddof=1)) / len(values)**0.5
  return mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread


def choose(labels: Int[np.ndarray, ' N'], share: float, seed: int) -> Int[np.ndarray, ' n']:
  """A class-balanced subset of the labeled images.

  Args:
    labels: [N] int.
    share: share of the labels, from 0 to 1.
    seed: of the choice.

  Returns:
    [n] indices in ascending order: the same number for each class, at least 1; all images of a
    class that has fewer. A share of 1 has all images.
  """
  if share == 1:
    return np.arange(len(labels))
  random, classes = np.random.RandomState(seed), np.unique(labels)
  each = max(1, round(share * len(labels) / len(classes)))
  return np.sort(np.concatenate([
      random.permutation(np.flatnonzero(labels == c))[:each] for c in classes]))


def _fit_and_count(tuner, model, variables, images, labels, tests, seed, place, title, watch):
  """(top-1, top-5) of the test images after fine-tuning with some others."""
  recipe, devices = tuner.recipe, tuner.mesh.size
  config = supervised.configure(model.config, supervised.path_of(images), seed,
                                recipe.batch(len(images), devices), tuner.size)
  end = recipe.steps(len(images), devices)
  feed = feeds.make(config, images, tuner.mesh, end)
  program = tuner.step(config, type(feed))
  known = mesh_lib.replicate(np.asarray(labels, np.int32), tuner.mesh)
  step = lambda state, inputs: program(state, inputs, known, np.uint32(seed), np.int32(end))
  job = supervised.Job(title, place, feed, len(images), end, step, tuner.like(variables))
  state = supervised.fit(job, lambda: tuner.start(variables), tuner.mesh, watch)
  right, first, (test, test_labels) = np.zeros(2), 0, tests
  for count, chunk in model.engine.chunks(test, tuner.recipe.batch_size):
    target = np.zeros(len(chunk), np.int32)
    target[:count] = test_labels[first:first + count]
    placed = jax.make_array_from_callback(target.shape, NamedSharding(tuner.mesh, P(AXIS)),
                                          lambda part, target=target: target[part])
    rank = distributed.gather(tuner.ranks(state.weights, state.statistics, chunk, placed))[:count]
    right += np.sum(rank < 1), np.sum(rank < 5)
    first += count
    watch.check()
  return right / len(test)


class Tuner:
  """The programs over the mesh that fine-tune an encoder with a classifier of pooled features.

  The weights are {'encoder', 'head': {'w': [F, C], 'b': [C]}}, replicated.

  Args:
    config: the run's configuration.
    encoder: a Linen module that exposes 'pooled', see `layers.show`; its batch norm is
      synchronized, for a device may have few images of a batch, or only one.
    mesh: the device mesh.
    size: (height, width) of the views.
    num_classes: C.
    recipe: the measurements.
    central_size: (height, width) of the views in evaluation; None for the images' own.
  """

  def __init__(self, config: config_lib.Config, encoder: nn.Module, mesh: jax.sharding.Mesh,
               size: tuple[int, int], num_classes: int, recipe: Recipe = Recipe(),
               central_size: tuple[int, int] | None = None):
    self.mesh, self.recipe = mesh, recipe
    self._config, self._encoder, self.size = config, encoder.clone(batch_norm_axis=AXIS), size
    self._num_classes, self._central_size = num_classes, central_size
    self._steps: dict[Any, Any] = {}
    self.start = jax.jit(self._begin, out_shardings=NamedSharding(mesh, P()))
    spec = P(AXIS)
    self.ranks = jax.jit(jax.shard_map(self._ranks, mesh=mesh, in_specs=(P(), P(), spec, spec),
                                       out_specs=spec))

  def like(self, variables: dict[str, Any]) -> supervised.State:
    """The state to start from, without values."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, P())),
        jax.eval_shape(self._begin, variables))

  def _begin(self, variables):
    """The state to start from."""
    width = jax.eval_shape(
        lambda: self._pooled(variables, jnp.zeros((1, *self.size, 3)))[0]).shape[1]
    head = {'w': jnp.zeros((width, self._num_classes)), 'b': jnp.zeros(self._num_classes)}
    weights = {'encoder': jax.tree.map(jnp.copy, variables['params']), 'head': head}
    return supervised.State(jnp.zeros((), jnp.int32), weights,
                            jax.tree.map(jnp.zeros_like, weights),
                            jax.tree.map(jnp.copy, variables.get('batch_stats', {})))

  def step(self, config: config_lib.Config, feed: Any) -> Any:
    """A jitted (state, inputs, labels [n], seed, last step) -> (state, loss).

    The same for all seeds and starts.

    Args:
      config: see `supervised.configure`.
      feed: the class of the source of the inputs.
    """
    kind = config.batch_size, feed
    if kind not in self._steps:
      self._steps[kind] = jax.jit(
          jax.shard_map(functools.partial(self._step, config, feed), mesh=self.mesh,
                        in_specs=(P(), feed.specs, P(), P(), P()), out_specs=P()), donate_argnums=0)
    return self._steps[kind]

  def _step(self, config, feed, state, inputs, labels, seed, end):
    recipe = self.recipe
    x, index = supervised.take(config, feed, seed, state.step, inputs)

    def loss(weights):
      scores, statistics = self._scores(weights, state.statistics, x, True)
      each = optax.softmax_cross_entropy_with_integer_labels(scores, labels[index])
      return lax.pmean(each.mean(), AXIS), statistics

    mine = jax.tree.map(lambda w: lax.pcast(w, AXIS, to='varying'), state.weights)
    (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(mine)
    gradient = lax.psum(gradient, AXIS)
    momentum = jax.tree.map(lambda v, g, w: 0.9 * v + g + recipe.weight_decay * w, state.momentum,
                            gradient, state.weights)
    rate = recipe.rate(state.step, end)
    rates = {'encoder': rate, 'head': rate * recipe.head_factor}
    weights = {part: jax.tree.map(lambda w, v: w - rates[part] * v, state.weights[part],
                                  momentum[part]) for part in rates}
    return supervised.State(state.step + 1, weights, momentum, statistics), value

  def _ranks(self, weights, statistics, images, target):
    """The rank of each image's own class."""
    x = views.central(self._config, images, self._central_size)
    scores, _ = self._scores(weights, statistics, x, False)
    own = jnp.take_along_axis(scores, target[:, None], axis=1)
    later = jnp.arange(self._num_classes) >= target[:, None]
    behind = (scores < own) | ((scores == own) & later)  # nothing is behind a score of NaN
    return (~behind).sum(axis=1)

  def _scores(self, weights, statistics, x, train):
    pooled, statistics = self._pooled(
        {'params': weights['encoder'], 'batch_stats': statistics}, x, train)
    return pooled @ weights['head']['w'] + weights['head']['b'], statistics

  def _pooled(self, variables, x, train=False):
    """(pooled features, the new batch statistics)."""
    _, updated = self._encoder.apply(variables, x, train=train, mutable=['batch_stats', 'stages'])
    updated: Any = dict(updated)
    return updated['stages']['pooled_output'], updated.get('batch_stats', {})
