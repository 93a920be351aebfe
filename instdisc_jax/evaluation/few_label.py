"""Few-label classification: the encoder fine-tuned with a small share of the labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Int
import numpy as np
import optax
from scipy import stats

from instdisc_jax import config as config_lib
from instdisc_jax.data import views
from instdisc_jax.runtime import metrics

_BATCH = 64
_LEARNING_RATE, _HEAD_FACTOR = 0.01, 10  # the new classifier learns faster
_WEIGHT_DECAY = 1e-4
_CHUNK = 250  # images per call when predicting


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The measurements, and the length of each fine-tuning run.

  Attributes:
    shares: shares of the labels.
    seeds: seeds of the choice of labels.
    epochs: number of epochs, as in the paper.
    least_steps: minimum number of steps, if those epochs have fewer.
  """
  shares: tuple[float, ...] = (0.01, 0.02, 0.04, 0.1, 0.2)
  seeds: tuple[int, ...] = (0, 1, 2)
  epochs: int = 70
  least_steps: int = 120

  def steps(self, num_images: int) -> int:
    """Steps of fine-tuning with so many labeled images."""
    return max(self.least_steps, math.ceil(self.epochs * num_images / _BATCH))


def measure(encoder: nn.Module, starts: Mapping[str, Callable[[int], dict[str, Any]]],
            read_train: Callable, train_labels: Int[np.ndarray, ' N'], read_test: Callable,
            test_labels: Int[np.ndarray, ' Q'], *, num_classes: int,
            config: config_lib.Config, recipe: Recipe = Recipe(),
            check: Callable[[], None] = lambda: None) -> Iterator[dict[str, Any]]:
  """Fine-tunes from each start with each share of the labels, once per seed.

  Trains for as many epochs as the paper (Section 4.3), with a cosine schedule instead of its step
  decay. Images are read one batch at a time.

  Args:
    encoder: a Linen module that exposes 'pooled', see `layers.show`.
    starts: {name: seed -> variables}, e.g. trained and random.
    read_train: rows [b] -> [b, H, W, 3] uint8, from N images.
    train_labels: [N] int.
    read_test: rows [b] -> [b, H, W, 3] uint8, from Q images.
    test_labels: [Q] int.
    num_classes: C.
    config: the run's configuration, for its augmentation.
    recipe: the measurements.
    check: called after each step; an exception that it raises ends the measurement.

  Yields:
    Rows of results: 'labels' (the share), 'images' (their number), 'start', 'top1' (mean over
    seeds), 'interval' (half-width of its 95% confidence interval, by Student's t).
  """
  size = views.size(config, read_train(np.zeros(1, int)).shape[1:])
  tuner = _FineTuner(encoder, num_classes, config, size)
  with metrics.progress_bar('fine-tuning') as progress:
    counts = [len(choose(train_labels, share, 0)) for share in recipe.shares]
    task = progress.add_task('', total=len(starts) * len(recipe.seeds) * sum(
        map(recipe.steps, counts)))

    def advance():
      progress.advance(task)
      check()

    for share in recipe.shares:
      for name, start in starts.items():
        correct, chosen = [], np.zeros(0, int)
        for seed in recipe.seeds:
          chosen = choose(train_labels, share, seed)
          fitted = tuner.fit(start(seed), read_train, train_labels, chosen, seed,
                             recipe.steps(len(chosen)), advance)
          scores = tuner.predict(fitted, read_test, len(test_labels))
          correct.append(float(np.mean(scores.argmax(axis=1) == test_labels)))
        mean, half = interval(correct)
        yield {'labels': share, 'images': len(chosen), 'start': name, 'top1': mean,
               'interval': half}


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
    class that has fewer.
  """
  random, classes = np.random.RandomState(seed), np.unique(labels)
  each = max(1, round(share * len(labels) / len(classes)))
  return np.sort(np.concatenate([
      random.permutation(np.flatnonzero(labels == c))[:each] for c in classes]))


class _FineTuner:
  """Fine-tuning of an encoder with a new classifier on its pooled features.

  The state is (weights {'encoder', 'head'}, batch_stats, optimizer state).
  """

  def __init__(self, encoder, num_classes, config, size):
    self._encoder, self._num_classes = encoder, num_classes
    self._config, self._size = config, size
    self._direction = optax.chain(optax.add_decayed_weights(_WEIGHT_DECAY), optax.trace(0.9))

  def fit(self, variables, read, labels, chosen, seed, steps, advance):
    """(weights, batch_stats) after training on the images `chosen`; `advance()` after each step."""
    width = self._pooled_size(variables)
    params, batch_stats = jax.tree.map(jnp.array, (variables['params'], variables['batch_stats']))
    weights = {'encoder': params, 'head': {'w': jnp.zeros((width, self._num_classes)),
                                           'b': jnp.zeros(self._num_classes)}}
    state = weights, batch_stats, self._direction.init(weights)
    random, keys = np.random.RandomState(seed), jax.random.key(seed)
    for t in range(steps):
      rows = random.choice(chosen, _BATCH)
      rate = _LEARNING_RATE * (1 + math.cos(math.pi * t / steps)) / 2
      state = self._step(state, read(rows), labels[rows], rate, jax.random.fold_in(keys, t))
      advance()
    return state[:2]

  def predict(self, fitted, read, count):
    """Scores [count, C] of images."""
    return np.concatenate([
        self._predict_chunk(fitted, read(np.arange(i, min(i + _CHUNK, count))))
        for i in range(0, count, _CHUNK)])

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def _step(self, state, images, targets, rate, key):
    weights, batch_stats, opt_state = state
    x = views.draw(self._config, jax.random.split(key, _BATCH), images)

    def loss(weights):
      logits, updated = self._scores(weights, batch_stats, x, True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), updated

    grads, batch_stats = jax.grad(loss, has_aux=True)(weights)
    steepest: Any
    steepest, opt_state = self._direction.update(grads, opt_state, weights)
    rates = {'encoder': rate, 'head': rate * _HEAD_FACTOR}
    weights = {part: jax.tree.map(lambda w, d: w - rates[part] * d, weights[part], steepest[part])
               for part in weights}
    return weights, batch_stats, opt_state

  @functools.partial(jax.jit, static_argnums=0)
  def _predict_chunk(self, fitted, images):
    weights, batch_stats = fitted
    return self._scores(weights, batch_stats, views.central(self._config, images, self._size),
                        False)[0]

  def _scores(self, weights, batch_stats, x, train):
    updated: Any
    _, updated = self._encoder.apply({'params': weights['encoder'], 'batch_stats': batch_stats}, x,
                                     train=train, mutable=['batch_stats', 'stages'])
    head = weights['head']
    return (updated['stages']['pooled_output'] @ head['w'] + head['b'],
            updated.get('batch_stats', {}))

  def _pooled_size(self, variables):
    shown: Any = jax.eval_shape(
        lambda: self._encoder.apply(variables, jnp.zeros((1, *self._size, 3)), train=False,
                                    mutable=['stages'])[1])
    return shown['stages']['pooled_output'].shape[1]
