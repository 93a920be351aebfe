"""Linear classifiers on frozen features: a softmax probe and, as in the paper's Table 1, an SVM."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np
import optax
from sklearn import pipeline, preprocessing, svm

_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # learning rates, for features with a norm near 1
_COSTS = (1e-4, 1e-3, 1e-2, 1e-1)  # C of the SVM
_HELD_OUT = 0.1  # share of the training images held out to choose hyperparameters
_BATCH = 256
_EPOCHS, _LEAST_STEPS = 30, 600
_WEIGHT_DECAY = 1e-5


def linear(train: Float[np.ndarray, 'N F'], train_labels: Int[np.ndarray, ' N'],
           test: Float[np.ndarray, 'Q F'], test_labels: Int[np.ndarray, ' Q'], *,
           num_classes: int, seed: int = 0) -> dict[str, Any]:
  """A softmax classifier trained by SGD; the learning rate is chosen on held-out training images.

  Features are standardized with the training set's mean and standard deviation. All of them must
  fit on the device.

  Args:
    train: [N, F] features.
    train_labels: [N] int.
    test: [Q, F] features; used once, after the learning rate is chosen.
    test_labels: [Q] int.
    num_classes: C.
    seed: of the split and the batches.

  Returns:
    {'top1', 'top5' (None below 6 classes), 'learning_rate'}.
  """
  mean, scale = train.mean(axis=0), (train.std(axis=0) + 1e-6) * np.sqrt(train.shape[1])
  train, test = ((x - mean) / scale for x in (train, test))
  steps = max(_LEAST_STEPS, _EPOCHS * len(train) // _BATCH)
  fit = lambda rows, rates: jax.device_get(_fit(
      jnp.asarray(train[rows], jnp.float32), jnp.asarray(train_labels[rows]),
      jnp.asarray(rates, jnp.float32), seed, num_classes=num_classes, num_steps=steps))
  held_out, rest = _split(len(train), seed)
  right = [np.mean(np.argmax(train[held_out] @ w + b, axis=1) == train_labels[held_out])
           for w, b in zip(*fit(rest, _RATES))]
  best = _RATES[int(np.argmax(right))]
  (w,), (b,) = fit(np.arange(len(train)), [best])
  scores = test @ w + b
  return {'top1': top_k(scores, test_labels, 1), 'top5': top_k(scores, test_labels, 5),
          'learning_rate': best}


@functools.partial(jax.jit, static_argnames=('num_classes', 'num_steps'))
def _fit(features, labels, rates, seed, *, num_classes, num_steps):
  """(weights [R, F, C], biases [R, C]) for each of R learning rates, on the same batches."""
  n, dim = features.shape
  schedule = optax.cosine_decay_schedule(1.0, num_steps)
  optimizer = optax.chain(optax.add_decayed_weights(_WEIGHT_DECAY), optax.trace(0.9, nesterov=True))

  def loss(params, x, y):
    scores = x @ params['w'] + params['b']
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

  def step(carry, t):
    params, state = carry
    rows = jax.random.randint(jax.random.fold_in(jax.random.key(seed), t), (_BATCH,), 0, n)
    x, y = features[rows], labels[rows]

    def update(params, state, rate):
      updates, state = optimizer.update(jax.grad(loss)(params, x, y), state, params)
      return jax.tree.map(lambda p, u: p - rate * schedule(t) * u, params, updates), state

    return jax.vmap(update)(params, state, rates), None

  def begin(_):
    params = {'w': jnp.zeros((dim, num_classes)), 'b': jnp.zeros(num_classes)}
    return params, optimizer.init(params)

  params = lax.scan(step, jax.vmap(begin)(rates), jnp.arange(num_steps))[0][0]
  return params['w'], params['b']


def support_vectors(train: Float[np.ndarray, 'N F'], train_labels: Int[np.ndarray, ' N'],
                    test: Float[np.ndarray, 'Q F'], test_labels: Int[np.ndarray, ' Q'], *,
                    seed: int = 0) -> dict[str, Any]:
  """A one-vs-rest linear SVM on standardized features; C is chosen as in `linear`.

  Args:
    train: [N, F] features.
    train_labels: [N] int.
    test: [Q, F] features.
    test_labels: [Q] int.
    seed: of the split.

  Returns:
    {'top1', 'cost'}, where the cost is C.
  """
  def fit(rows, cost):
    classifier = svm.LinearSVC(C=cost, dual='auto', random_state=seed, max_iter=5000)
    return pipeline.make_pipeline(preprocessing.StandardScaler(), classifier).fit(
        train[rows], train_labels[rows])

  held_out, rest = _split(len(train), seed)
  right = [0.0]
  if len(np.unique(train_labels[rest])) > 1:  # few images may leave only one class
    right = [fit(rest, cost).score(train[held_out], train_labels[held_out]) for cost in _COSTS]
  best = _COSTS[int(np.argmax(right))]
  final = fit(np.arange(len(train)), best)
  return {'top1': float(final.score(test, test_labels)), 'cost': best}


def _split(n, seed):
  """(held-out rows, the others), seeded."""
  shuffled = np.random.RandomState(seed).permutation(n)
  return np.split(shuffled, [max(1, round(_HELD_OUT * n))])


def top_k(scores: Float[np.ndarray, 'Q C'], labels: Int[np.ndarray, ' Q'],
          k: int) -> float | None:
  """Share of rows whose label has one of the k highest scores; None if there are at most k classes.

  Args:
    scores: [Q, C]; -inf for a class that never counts.
    labels: [Q] int.
    k: number of scores.
  """
  if k > 1 and scores.shape[1] <= k:
    return None
  best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
  named = np.take_along_axis(scores, best, axis=1) > -np.inf
  return float(np.mean(((best == labels[:, None]) & named).any(axis=1)))
