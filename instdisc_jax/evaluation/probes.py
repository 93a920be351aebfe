"""Linear classifiers on frozen features: a softmax probe and, as in the paper, SVMs."""

import dataclasses
import functools
import math
import os
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Float, Int, Int8
import numpy as np
import optax
from scipy import optimize
from sklearn import metrics, pipeline, preprocessing, svm

_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # learning rates, for features with a norm near 1
_COSTS = (1e-4, 1e-3, 1e-2, 1e-1)  # C of the SVM
_HELD_OUT = 0.1  # share of the training images held out to choose hyperparameters
_BATCH = 256
_EPOCHS, _LEAST_STEPS = 30, 600
_WEIGHT_DECAY = 1e-5
_BLOCK, _MOST_STEPS = 8192, 300  # of an SVM in blocks: rows read at once, steps of L-BFGS


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
                    seed: int = 0, most_bytes: float | None = None) -> dict[str, Any]:
  """A one-vs-rest linear SVM on standardized features; C is chosen as in `linear`.

  LinearSVC, of which the features are a copy in float64; features that are larger than `most_bytes`
  as such are read in blocks, once for every step of L-BFGS, to the same minimum.

  Args:
    train: [N, F] features.
    train_labels: [N] int.
    test: [Q, F] features.
    test_labels: [Q] int.
    seed: of the split.
    most_bytes: by default a quarter of the machine's memory.

  Returns:
    {'top1', 'cost'}, where the cost is C.
  """
  if most_bytes is None:
    most_bytes = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 4
  fit = _fit_svm if 8 * train.size <= most_bytes else _fit_svm_in_blocks
  held_out, rest = _split(len(train), seed)
  right = [0.0]
  if len(np.unique(train_labels[rest])) > 1:  # few images may leave only one class
    right = [_score(fit(train, train_labels, rest, cost, seed), train, train_labels, held_out)
             for cost in _COSTS]
  best = _COSTS[int(np.argmax(right))]
  final = fit(train, train_labels, np.arange(len(train)), best, seed)
  return {'top1': _score(final, test, test_labels, np.arange(len(test))), 'cost': best}


def _fit_svm(features, labels, rows, cost, seed):
  """An SVM on the features and labels of `rows`."""
  classifier = svm.LinearSVC(C=cost, dual='auto', random_state=seed, max_iter=5000)
  return pipeline.make_pipeline(preprocessing.StandardScaler(), classifier).fit(
      features[rows], labels[rows])


def _fit_svm_in_blocks(features, labels, rows, cost, seed):
  """The minimum of the same function, see `_minimize`."""
  classes = np.unique(labels[rows])
  own = lambda block: (labels[block][:, None] == classes).astype(np.int8)
  return _Linear(*_minimize(features, own, rows, cost, len(classes)), classes)


def average_precision(train: Float[np.ndarray, 'N F'], train_tags: Int8[np.ndarray, 'N C'],
                      test: Float[np.ndarray, 'Q F'], test_tags: Int8[np.ndarray, 'Q C'], *,
                      seed: int = 0) -> dict[str, Any]:
  """A linear SVM for each of C classes that an image may show together, as PASCAL VOC has them.

  Squared hinge loss on standardized features, which are read in blocks; C of the SVM is chosen on
  held-out training images.

  Args:
    train: [N, F] features.
    train_tags: [N, C] 1 for a class that an image shows, 0 for one that it does not, -1 where this
      does not count (VOC: there are only objects that are difficult to see).
    test: [Q, F] features.
    test_tags: [Q, C], likewise.
    seed: of the split.

  Returns:
    {'map': the mean over classes of the average precision, which is the area below the curve of
    precision and recall, without interpolation; 'cost': C}.
  """
  fit = lambda rows, cost: _Linear(
      *_minimize(train, train_tags.__getitem__, rows, cost, train_tags.shape[1]), None)
  held_out, rest = _split(len(train), seed)
  found = [_mean_average_precision(fit(rest, cost), train, train_tags, held_out)
           for cost in _COSTS]
  best = _COSTS[int(np.argmax(found))]
  final = fit(np.arange(len(train)), best)
  return {'map': _mean_average_precision(final, test, test_tags, np.arange(len(test))),
          'cost': best}


def _mean_average_precision(classifier, features, tags, rows):
  """Over the classes that some of the images show; 0 if there are none."""
  scores = np.concatenate([classifier.scores(features[block]) for block in _blocks(np.sort(rows))])
  tags = tags[np.sort(rows)]
  found = [metrics.average_precision_score(own[own >= 0], scores[own >= 0, c])
           for c, own in enumerate(tags.T) if (own == 1).any()]
  return float(np.mean(found)) if found else 0.0


def _minimize(features, own, rows, cost, num_classes):
  """(scaler, weights [F, C], biases [C]) of one-vs-rest SVMs, by L-BFGS.

  The function is LinearSVC's, ½ ‖w‖² + ½ b² + C Σ max(0, 1 - y s)² for each class; each evaluation
  reads the features once.

  Args:
    features: [N, F].
    own: rows -> [n, C] int8: 1 for images of the class, 0 for others, -1 for those left out.
    rows: the images to fit.
    cost: C of the SVM.
    num_classes: C.
  """
  scaler, blocks = preprocessing.StandardScaler(), _blocks(np.sort(rows))
  for block in blocks:
    scaler.partial_fit(features[block])
  shape = features.shape[1] + 1, num_classes

  def objective(weights):
    weights = weights.reshape(shape)
    value, gradient = 0.5 * np.sum(weights**2), weights.copy()
    for block in blocks:
      loss, slope = _squared_hinge(weights, scaler.transform(features[block]), own(block))
      value += cost * float(loss)
      gradient += cost * np.asarray(slope, np.float64)
    return value, gradient.ravel()

  found = optimize.minimize(objective, np.zeros(math.prod(shape)), jac=True, method='L-BFGS-B',
                            options={'maxiter': _MOST_STEPS})
  weights = found.x.reshape(shape)
  return scaler, weights[:-1], weights[-1]


@jax.jit
@jax.value_and_grad
def _squared_hinge(weights, x, own):
  """Σ max(0, 1 - y s)² over images and classes, where y is 1 for an image's own class, else -1."""
  scores = jnp.dot(x, weights[:-1], precision=lax.Precision.HIGHEST) + weights[-1]
  loss = jnp.maximum(0, 1 - jnp.where(own == 1, scores, -scores))**2
  return jnp.sum(jnp.where(own < 0, 0, loss))


@dataclasses.dataclass(frozen=True)
class _Linear:
  """Linear classifiers of standardized features."""
  scaler: preprocessing.StandardScaler
  w: Float[np.ndarray, 'F C']
  b: Float[np.ndarray, ' C']
  classes: Int[np.ndarray, ' C'] | None

  def scores(self, features):
    """[n, C]."""
    return self.scaler.transform(features) @ self.w + self.b

  def predict(self, features):
    """The class of each row, where it has one."""
    assert self.classes is not None
    return self.classes[np.argmax(self.scores(features), axis=1)]


def _score(classifier, features, labels, rows):
  """Share of `rows` that are classified correctly."""
  return float(np.mean(np.concatenate([
      classifier.predict(features[block]) == labels[block] for block in _blocks(np.sort(rows))])))


def _blocks(rows):
  """Parts of at most `_BLOCK` rows."""
  return np.array_split(rows, -(-len(rows) // _BLOCK))


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
