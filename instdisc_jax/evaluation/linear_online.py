"""Linear classifiers on every stage of a frozen encoder, trained from a stream of images.

The protocol of the paper's Table 2 (Zhang et al., ECCV 2016) at any number of images: each stage is
pooled to about 9,000 numbers; its features live for one step only. All stages, and a grid of
learning rates for each, are trained at once, on random crops (mirrored where the run mirrors). The
learning rate is chosen on training images that are held out.

    device k holds   the encoder, its part of the batch, and its C / devices classes of every
                     classifier

In a step the devices exchange the features of the batch, and for the softmax a maximum and a sum
for each image; no weight or gradient leaves its device.
"""

from collections.abc import Iterable, Iterator
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

from instdisc_jax import config as config_lib
from instdisc_jax import data, linalg
from instdisc_jax.data import feeds, views
from instdisc_jax.evaluation import embedding, supervised
from instdisc_jax.evaluation.embedding import EMBEDDING, STAGES
from instdisc_jax.runtime import files, preemption
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime.mesh import AXIS

ALL = (*STAGES, EMBEDDING)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How the classifiers are trained.

  Attributes:
    epochs: as VISSL and MMSelfSup evaluate ImageNet (Goyal et al., ICCV 2019), like the next three.
    milestones: epochs at which the learning rate is divided by 10.
    batch_size: B, or a quarter of the images if that is less.
    momentum: Nesterov's.
    least_steps: minimum number of steps, for small sets; the milestones keep their places.
    learning_rates: the grid, for standardized features with a norm near 1, as in `probes.linear`.
    weight_decay: as in `probes.linear`.
    crop_scale: area of a crop; those of Zhang et al., 227 of 256 pixels, have 0.79 of it.
    held_out: share of the training images that chooses the learning rate,
    most_held_out: and their largest number.
    moments: batches from which the mean and standard deviation of each feature are measured.
  """
  epochs: int = 28
  milestones: tuple[int, ...] = (8, 16, 24)
  batch_size: int = 256
  momentum: float = 0.9
  least_steps: int = 600
  learning_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
  weight_decay: float = 1e-5
  crop_scale: tuple[float, float] = (0.75, 1.0)
  held_out: float = 0.1
  most_held_out: int = 10_000
  moments: int = 50

  def fitted(self, num_images: int) -> 'Recipe':
    """The recipe with the batch size for N images."""
    quarter = 1 << max(0, (num_images // 4).bit_length() - 1)
    return dataclasses.replace(self, batch_size=min(self.batch_size, quarter))

  def steps(self, num_images: int) -> int:
    """Number of steps for N images."""
    return max(self.least_steps, math.ceil(self.epochs * num_images / self.batch_size))

  def factor(self, step: jax.Array, end: int) -> jax.Array:
    """By what the learning rates are multiplied at a step."""
    return supervised.decay(step, end, self.milestones, self.epochs)


def measure(model: Any, train: data.Images, test: data.Images, labels: tuple[Any, Any], *,
            num_classes: int, folder: files.Place, watch: preemption.Watch,
            recipe: Recipe = Recipe(), seed: int = 0) -> Iterator[dict[str, Any]]:
  """Trains the classifiers and measures them; every process must call it.

  Args:
    model: the encoder, see `protocols.Model`.
    train: N images.
    test: Q images; used once, after the learning rates are chosen.
    labels: ([N], [Q]) int.
    num_classes: C.
    folder: where the training is kept until it is measured.
    watch: watches for signals.
    recipe: how the classifiers are trained.
    seed: of the images held out, of their order and of their crops.

  Yields:
    For each stage {'features', 'top1', 'top5' (None below 6 classes), 'learning_rate'}.

  Raises:
    errors.Stopped: stopped by a signal; the training is saved.
    errors.UserError: an image cannot be read.
  """
  recipe = recipe.fitted(len(train))
  held_out, rest = split(len(train), recipe, seed)
  images, held_out_images = (train.subset(rows, f'{name} {seed}') for name, rows in (
      ('probe', rest), ('held out', held_out)))
  what = supervised.key(recipe, seed, num_classes, images.identity(), labels[0], model.digest(),
                        model.engine.mesh.size)
  place = folder / f'linear_online-{what}'
  probe = Probe(model.config, model.encoder, model.engine.mesh, num_classes, recipe)
  state = _fit(probe, model, images, labels[0][rest], place, watch, seed)
  count = functools.partial(_count, probe, model, state, watch=watch)
  chosen, found = count(held_out_images, labels[0][held_out]), count(test, labels[1])
  for stage in (stage for stage in ALL if stage in chosen):
    best = int(np.argmax(chosen[stage][0]))
    top1, top5 = (float(count[best]) / len(test) for count in found[stage])
    yield {'features': stage, 'top1': top1, 'top5': top5 if num_classes > 5 else None,
           'learning_rate': recipe.learning_rates[best]}
  if jax.process_index() == 0:
    files.remove_folder(place)


def split(n: int, recipe: Recipe,
          seed: int) -> tuple[Int[np.ndarray, ' m'], Int[np.ndarray, ' n']]:
  """(held-out rows, the others), ascending, of n; seeded."""
  shuffled = np.random.RandomState(seed).permutation(n)
  count = max(1, min(recipe.most_held_out, round(recipe.held_out * n)))
  held_out, rest = np.split(shuffled, [count])
  return np.sort(held_out), np.sort(rest)


def _fit(probe, model, images, labels, place, watch, seed):
  """The state after training."""
  size = supervised.view_size(model.engine, images)
  config, recipe = probe.configure(supervised.path_of(images), seed, size), probe.recipe
  end = recipe.steps(len(images))
  feed = feeds.make(config, images, probe.mesh, end)
  widths = model.engine.widths(model.variables, images, ALL)
  known = mesh_lib.replicate(np.asarray(labels, np.int32), probe.mesh)
  program = probe.step(config, feed, widths)
  step = lambda state, inputs: program(state, model.variables, inputs, known, np.int32(end))
  job = supervised.Job('linear_online', place, feed, len(images), end, step, probe.shapes(widths))

  def start():
    measure, moments = probe.moments(config, feed), []
    for t in range(min(recipe.moments, end)):
      moments.append(jax.device_get(measure(model.variables, feed.at(t), np.int32(t))))
    return probe.start(moments, widths)

  return supervised.fit(job, start, probe.mesh, watch)


def _count(probe, model, state, images, labels, *, watch):
  """{stage: ([R] images whose class has the highest score, [R] one of the five highest)}."""
  program, parts, first = probe.count(model.engine.size, state.weights), [], 0
  for size, chunk in model.engine.chunks(images, probe.recipe.batch_size):
    target = np.zeros(len(chunk), np.int32)
    target[:size] = labels[first:first + size]
    parts.append(jax.device_get(program(state, model.variables, chunk, target, np.int32(size))))
    first += size
    watch.check()
  return jax.tree.map(lambda *counts: np.sum(counts, axis=0), *parts)


class Probe:
  """The programs over the mesh that train and use the classifiers of an encoder.

  The weights are {stage: {'w': [F, R, C'], 'b': [R, C']}} for R learning rates, where C' >= C is a
  multiple of the number of devices: each has its own classes. The statistics are {stage: {'mean':
  [F], 'scale': [F]}}, replicated.

  Args:
    config: the run's configuration.
    encoder: a Linen module.
    mesh: the device mesh.
    num_classes: C.
    recipe: how the classifiers are trained.
  """

  def __init__(self, config: config_lib.Config, encoder: nn.Module, mesh: jax.sharding.Mesh,
               num_classes: int, recipe: Recipe = Recipe()):
    self.mesh, self.recipe = mesh, recipe
    self._config, self._encoder, self._num_classes = config, encoder, num_classes
    self._padded = mesh_lib.padded(num_classes, mesh.size)

  def configure(self, path: str, seed: int, size: tuple[int, int]) -> config_lib.Config:
    """The configuration of the feed and of the views, see `supervised.configure`."""
    batch_size, devices = self.recipe.batch_size, self.mesh.size
    config = supervised.configure(self._config, path, seed,
                                  max(devices, batch_size - batch_size % devices), size)
    config.augment.update(crop_scale=self.recipe.crop_scale, brightness=0.0, contrast=0.0,
                          saturation=0.0, hue=0.0, grayscale=0.0)
    return config

  def shapes(self, widths: dict[str, int]) -> supervised.State:
    """The state for {stage: F}: shapes and shardings without values."""
    rates = len(self.recipe.learning_rates)
    weights = lambda: {stage: {'w': (width, rates, self._padded), 'b': (rates, self._padded)}
                       for stage, width in widths.items()}
    shapes = supervised.State((), weights(), weights(), {
        stage: {'mean': (width,), 'scale': (width,)} for stage, width in widths.items()})
    return jax.tree.map(
        lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.float32 if shape else jnp.int32,
                                                 sharding=NamedSharding(self.mesh, spec)),
        shapes, self._specs(widths), is_leaf=lambda x: isinstance(x, tuple))

  def moments(self, config: config_lib.Config, feed: Any) -> Any:
    """A jitted (variables, inputs of the feed, step) -> {stage: (mean [F], variance [F])}."""
    def moments(variables, inputs, step):
      x, _ = supervised.take(config, feed, config.seed, step, inputs)
      found = {}
      for stage, f in self._features(variables, x).items():
        mean = lax.pmean(f.mean(axis=0), AXIS)
        found[stage] = mean, lax.pmean(jnp.square(f - mean).mean(axis=0), AXIS)
      return found

    return self._map(moments, (P(), feed.specs, P()), P())

  def start(self, moments: list[Any], widths: dict[str, int]) -> supervised.State:
    """Classifiers of zeros, for the moments of some batches."""
    statistics = {}
    for stage in widths:
      means, variances = (np.stack(values) for values in zip(*(part[stage] for part in moments)))
      deviation = np.sqrt(variances.mean(axis=0) + means.var(axis=0))
      least = 1e-3 * np.sqrt(np.square(deviation).mean()) + 1e-6  # rounding alone is not a feature
      deviation = np.maximum(deviation, least)
      statistics[stage] = {'mean': means.mean(axis=0),
                           'scale': 1 / (deviation * np.float32(math.sqrt(widths[stage])))}
    like = self.shapes(widths)
    zeros = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like),
                    out_shardings=jax.tree.map(lambda x: x.sharding, like))()
    return zeros.replace(statistics=jax.tree.map(
        lambda x: mesh_lib.replicate(x, self.mesh), statistics))

  def step(self, config: config_lib.Config, feed: Any, stages: Iterable[str]) -> Any:
    """A jitted (state, variables, inputs, labels [N], last step) -> (state, losses).

    Args:
      config: see `configure`.
      feed: the source of the inputs, or its class.
      stages: the names of the stages.
    """
    recipe = self.recipe
    rates = np.asarray(recipe.learning_rates, np.float32)[:, None]

    def step(state, variables, inputs, labels, end):
      x, index = supervised.take(config, feed, config.seed, state.step, inputs)
      target = lax.all_gather(labels[index], AXIS, tiled=True)
      rate = rates * recipe.factor(state.step, end)
      weights, momentum, losses = {}, {}, {}
      for stage, f in self._gathered(state, self._features(variables, x)).items():
        old = state.weights[stage]
        losses[stage], error = _cross_entropy(self._scores(old, f), target, self._classes())
        gradient = {'w': linalg.dot(f, error, (((0,), (0,)), ((), ()))), 'b': error.sum(axis=0)}
        weights[stage], momentum[stage] = {}, {}
        for name, g in gradient.items():
          g += recipe.weight_decay * old[name]
          v = momentum[stage][name] = recipe.momentum * state.momentum[stage][name] + g
          weights[stage][name] = old[name] - rate * (g + recipe.momentum * v)
      return state.replace(step=state.step + 1, weights=weights, momentum=momentum), losses

    specs = self._specs(stages)
    return self._map(step, (specs, P(), feed.specs, P(), P()), (specs, P()), donate=0)

  def count(self, size: tuple[int, int] | None, stages: Iterable[str]) -> Any:
    """A jitted (state, variables, images, classes, number of images) -> those that are right.

    Args:
      size: (height, width) of the views; None for the images' own.
      stages: the names of the stages.

    Returns:
      The function, which returns {stage: (top-1 [R], top-5 [R])} as numbers of images.
    """
    def count(state, variables, images, target, number):
      found, x = {}, views.central(self._config, images, size)
      for stage, f in self._gathered(state, self._features(variables, x)).items():
        scores, classes = self._scores(state.weights[stage], f), self._classes()
        own = _own(scores, target, classes)[..., None]
        behind = (scores < own) | ((scores == own) & (classes >= target[:, None, None]))
        rank = lax.psum((~behind).sum(axis=-1), AXIS)  # nothing is behind a score of NaN
        counted = jnp.arange(len(target))[:, None] < number
        found[stage] = tuple(((rank < k) & counted).sum(axis=0) for k in (1, 5))
      return found

    return self._map(count, (self._specs(stages), P(), P(AXIS), P(), P()), P())

  def _features(self, variables, x):
    """{stage: [b, F]} of a device's views."""
    return embedding.features_of(self._encoder, variables, x, ALL)

  def _gathered(self, state, features):
    """{stage: [B, F]} of the whole batch, standardized."""
    found = {}
    for stage, f in features.items():
      part = state.statistics[stage]
      found[stage] = (lax.all_gather(f, AXIS, tiled=True) - part['mean']) * part['scale']
    return found

  def _classes(self):
    """[C' / devices] the classes of this device."""
    count = self._padded // self.mesh.size
    return lax.axis_index(AXIS) * count + jnp.arange(count)

  def _scores(self, weights, f):
    """[B, R, C' / devices] of this device's classes; -inf beyond C."""
    scores = linalg.dot(f, weights['w'], (((1,), (0,)), ((), ()))) + weights['b']
    return jnp.where(self._classes() < self._num_classes, scores, -jnp.inf)

  def _map(self, program, in_specs, out_specs, donate=()):
    return jax.jit(jax.shard_map(program, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs),
                   donate_argnums=donate)

  @staticmethod
  def _specs(stages):
    """The partition specs of a state: classes are sharded."""
    weights = lambda: {stage: {'w': P(None, None, AXIS), 'b': P(None, AXIS)} for stage in stages}
    return supervised.State(P(), weights(), weights(), {
        stage: {'mean': P(), 'scale': P()} for stage in stages})


def _own(scores, target, classes):
  """[B, R] the score of each image's own class, whichever device has it."""
  mine = classes == target[:, None, None]
  return lax.psum(jnp.where(mine, scores, 0).sum(axis=-1), AXIS)


def _cross_entropy(scores, target, classes):
  """([R] the mean loss, [B, R, C' / devices] its gradient by the scores)."""
  largest = lax.pmax(scores.max(axis=-1), AXIS)
  e = jnp.exp(scores - largest[..., None])
  total = lax.psum(e.sum(axis=-1), AXIS)
  loss = jnp.log(total) + largest - _own(scores, target, classes)
  mine = classes == target[:, None, None]
  return loss.mean(axis=0), (e / total[..., None] - mine) / len(target)
