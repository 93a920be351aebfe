"""Few-label classification: the encoder fine-tuned with a small share of the labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from instdisc_jax import augment
from instdisc_jax.evaluation import features

SHARES = (0.01, 0.02, 0.04, 0.1, 0.2)  # of the labels
SEEDS = (0, 1, 2)
_BATCH, _STEPS = 64, 150
_LEARNING_RATE, _HEAD_FACTOR = 0.01, 10  # the fresh classifier learns faster
_WEIGHT_DECAY = 1e-4
_CHUNK = 250  # pictures per call when predicting


def measure(encoder, starts, train_images, train_labels, test_images, test_labels, *, num_classes,
            config):
  """Fine-tunes from each start with each share of the labels, several times.

  Args:
    encoder: a Linen module that shows 'pooled'.
    starts: {name: seed -> (params, batch_stats)}, e.g. trained and random.
    train_images: [N, H, W, 3] uint8.
    train_labels: [N] int.
    test_images: [Q, H, W, 3] uint8.
    test_labels: [Q] int.
    num_classes: C.
    config: of the run, for its augmentation.

  Yields:
    Rows: 'labels' (the share), 'images' (how many), 'start', 'top1' (mean over seeds), 'interval'
    (half its 95% interval, by Student's t).
  """
  fit, predict = _make(encoder, num_classes, config, train_images, train_labels, starts)
  for share in SHARES:
    for name, start in starts.items():
      right = []
      for seed in SEEDS:
        chosen = choose(train_labels, share, seed)
        scores = predict(fit(start(seed), chosen, seed), test_images)
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


def _make(encoder, num_classes, config, images, labels, starts):
  """(fit, predict): (start, chosen, seed) -> weights; (weights, pictures) -> scores [Q, C]."""
  size = config.augment.size
  size = images.shape[1:3] if size is None else (size, size)
  strengths = {name: value for name, value in config.augment.items() if name != 'size'}
  images, labels = jnp.asarray(images), jnp.asarray(labels)

  def scores(weights, batch_stats, x, train):
    _, updated = encoder.apply({'params': weights['encoder'], 'batch_stats': batch_stats}, x,
                               train=train, mutable=['batch_stats', 'stages'])
    head = weights['head']
    return (updated['stages']['pooled_output'] @ head['w'] + head['b'],
            updated.get('batch_stats', {}))

  schedule = optax.cosine_decay_schedule(_LEARNING_RATE, _STEPS)
  sgd = lambda factor: optax.chain(optax.add_decayed_weights(_WEIGHT_DECAY), optax.sgd(
      lambda t: factor * schedule(t), momentum=0.9))
  optimizer = optax.multi_transform({'encoder': sgd(1.0), 'head': sgd(_HEAD_FACTOR)},
                                    {'encoder': 'encoder', 'head': 'head'})

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry, chosen, count, key):
    weights, batch_stats, state = carry
    draw_key, *keys = jax.random.split(key, 1 + _BATCH)
    rows = chosen[jax.random.randint(draw_key, (_BATCH,), 0, count)]
    x = augment.augment(jnp.stack(keys), images[rows], size=size, **strengths)

    def loss(weights):
      logits, updated = scores(weights, batch_stats, x, True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean(), updated

    grads, batch_stats = jax.grad(loss, has_aux=True)(weights)
    updates, state = optimizer.update(grads, state, weights)
    return optax.apply_updates(weights, updates), batch_stats, state

  params, batch_stats = next(iter(starts.values()))(0)
  pooled = jax.eval_shape(
      lambda: encoder.apply({'params': params, 'batch_stats': batch_stats},
                            jnp.zeros((1, *size, 3)), train=False, mutable=['stages'])[1])
  width = pooled['stages']['pooled_output'].shape[1]

  def fit(start, chosen, seed):
    params, batch_stats = jax.tree.map(jnp.array, start)  # a copy: the step donates
    weights = {'encoder': params, 'head': {'w': jnp.zeros((width, num_classes)),
                                           'b': jnp.zeros(num_classes)}}
    carry = weights, batch_stats, optimizer.init(weights)
    padded = np.zeros(len(labels), np.int32)  # of one shape: compiled once
    padded[:len(chosen)] = chosen
    for t in range(_STEPS):
      carry = step(carry, padded, len(chosen), jax.random.fold_in(jax.random.key(seed), t))
    return carry[:2]

  @jax.jit
  def predict_chunk(fitted, part):
    x = features.prepare(part, config.augment.mean, config.augment.std, size)
    return scores(*fitted, x, False)[0]

  def predict(fitted, pictures):
    return np.concatenate([predict_chunk(fitted, pictures[i:i + _CHUNK])
                           for i in range(0, len(pictures), _CHUNK)])

  return fit, predict
