"""Few-label classification: the encoder fine-tuned with a small share of the labels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from instdisc_jax import augment
from instdisc_jax.evaluation import features

SHARES = (0.01, 0.02, 0.04, 0.1, 0.2)  # of the labels
SEEDS = (0, 1, 2)
_BATCH, _EPOCHS = 64, 70
_LEAST_STEPS = 120  # where so many epochs of few pictures would be fewer
_LEARNING_RATE, _HEAD_FACTOR = 0.01, 10  # the fresh classifier learns faster
_WEIGHT_DECAY = 1e-4
_CHUNK = 250  # pictures per call when predicting


def measure(encoder, starts, read_train, train_labels, read_test, test_labels, *, num_classes,
            config):
  """Fine-tunes from each start with each share of the labels, several times.

  For as many epochs as the paper's (Section 4.3), with a cosine in place of its steps. Pictures are
  read a batch at a time.

  Args:
    encoder: a Linen module that shows 'pooled'.
    starts: {name: seed -> (params, batch_stats)}, e.g. trained and random.
    read_train: rows [b] -> [b, H, W, 3] uint8, of N pictures.
    train_labels: [N] int.
    read_test: rows [b] -> [b, H, W, 3] uint8, of Q pictures.
    test_labels: [Q] int.
    num_classes: C.
    config: of the run, for its augmentation.

  Yields:
    Rows: 'labels' (the share), 'images' (how many), 'start', 'top1' (mean over seeds), 'interval'
    (half its 95% interval, by Student's t).
  """
  fit, predict = _make(encoder, num_classes, config, read_train, train_labels, starts)
  for share in SHARES:
    for name, start in starts.items():
      right = []
      for seed in SEEDS:
        chosen = choose(train_labels, share, seed)
        scores = predict(fit(start(seed), chosen, seed), read_test, len(test_labels))
        right.append(float(np.mean(scores.argmax(axis=1) == test_labels)))
      mean, half = interval(right)
      yield {'labels': share, 'images': len(chosen), 'start': name, 'top1': mean, 'interval': half}


def interval(values):
  """(mean, half its 95% interval by Student's t; None for a single value)."""
  mean = float(np.mean(values))
  if len(values) < 2:
    return mean, None
  spread = float(np.std(values, ddof=1)) / len(values)**0.5
  return mean, float(stats.t.ppf(0.975, len(values) - 1)) * spread


def choose(labels, share, seed):
  """A class-balanced part of the labelled pictures.

  Args:
    labels: [N] int.
    share: of the labels, 0..1.
    seed: of the choice.

  Returns:
    [n] indices in order: of each class the same number, at least 1, at most what there is.
  """
  random, classes = np.random.RandomState(seed), np.unique(labels)
  each = max(1, round(share * len(labels) / len(classes)))
  return np.sort(np.concatenate([
      random.permutation(np.flatnonzero(labels == c))[:each] for c in classes]))


def _make(encoder, num_classes, config, read, labels, starts):
  """(fit, predict): (start, chosen, seed) -> weights; (weights, read, Q) -> scores [Q, C]."""
  size = config.augment.size
  size = read([0]).shape[1:3] if size is None else (size, size)
  strengths = {name: value for name, value in config.augment.items() if name != 'size'}

  def scores(weights, batch_stats, x, train):
    _, updated = encoder.apply({'params': weights['encoder'], 'batch_stats': batch_stats}, x,
                               train=train, mutable=['batch_stats', 'stages'])
    head = weights['head']
    return (updated['stages']['pooled_output'] @ head['w'] + head['b'],
            updated.get('batch_stats', {}))

  direction = optax.chain(optax.add_decayed_weights(_WEIGHT_DECAY), optax.trace(0.9))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry, pictures, targets, rate, key):
    weights, batch_stats, state = carry
    x = augment.augment(jax.random.split(key, _BATCH), pictures, size=size, **strengths)

    def loss(weights):
      logits, updated = scores(weights, batch_stats, x, True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), updated

    grads, batch_stats = jax.grad(loss, has_aux=True)(weights)
    steepest, state = direction.update(grads, state, weights)
    rates = {'encoder': rate, 'head': rate * _HEAD_FACTOR}
    weights = {part: jax.tree.map(lambda w, d: w - rates[part] * d, weights[part], steepest[part])
               for part in weights}
    return weights, batch_stats, state

  params, batch_stats = next(iter(starts.values()))(0)
  pooled = jax.eval_shape(
      lambda: encoder.apply({'params': params, 'batch_stats': batch_stats},
                            jnp.zeros((1, *size, 3)), train=False, mutable=['stages'])[1])
  width = pooled['stages']['pooled_output'].shape[1]

  def fit(start, chosen, seed):
    params, batch_stats = jax.tree.map(jnp.array, start)  # a copy: the step donates
    weights = {'encoder': params, 'head': {'w': jnp.zeros((width, num_classes)),
                                           'b': jnp.zeros(num_classes)}}
    carry = weights, batch_stats, direction.init(weights)
    random, keys = np.random.RandomState(seed), jax.random.key(seed)
    steps = max(_LEAST_STEPS, math.ceil(_EPOCHS * len(chosen) / _BATCH))
    for t in range(steps):
      rows = random.choice(chosen, _BATCH)
      rate = _LEARNING_RATE * (1 + math.cos(math.pi * t / steps)) / 2
      carry = step(carry, read(rows), labels[rows], rate, jax.random.fold_in(keys, t))
    return carry[:2]

  @jax.jit
  def predict_chunk(fitted, part):
    x = features.prepare(part, config.augment.mean, config.augment.std, size)
    return scores(*fitted, x, False)[0]

  def predict(fitted, read, count):
    return np.concatenate([predict_chunk(fitted, read(np.arange(i, min(i + _CHUNK, count))))
                           for i in range(0, count, _CHUNK)])

  return fit, predict
