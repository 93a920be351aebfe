"""Linear classifiers on frozen features: a softmax probe and, as in the paper's Table 1, an SVM."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import pipeline, preprocessing, svm

_LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_HELD_OUT = 0.1  # of the training pictures, to choose the learning rate on
_BATCH, _STEPS = 256, 3000
_WEIGHT_DECAY = 1e-4


def linear(train, train_labels, test, test_labels, *, num_classes, seed=0):
  """A softmax classifier by SGD, its learning rate chosen on a part of the training set.

  Args:
    train: [N, F] features.
    train_labels: [N] int.
    test: [Q, F].
    test_labels: [Q] int.
    num_classes: C.
    seed: of the split and of the batches.

  Returns:
    {'top1', 'top5' (None below 6 classes), 'learning_rate'}; the test set is looked at once, after
    the choice.
  """
  mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
  train, test = ((x - mean) / std / np.sqrt(x.shape[1]) for x in (train, test))
  shuffled = np.random.RandomState(seed).permutation(len(train))
  held_out, rest = np.split(shuffled, [max(1, round(_HELD_OUT * len(train)))])
  fit = lambda rows, rates: _fit(jnp.asarray(train[rows], jnp.float32),
                                 jnp.asarray(train_labels[rows]), jnp.asarray(rates, jnp.float32),
                                 seed, num_classes=num_classes)
  weights = fit(rest, _LEARNING_RATES)
  right = [np.mean(np.argmax(train[held_out] @ w + b, axis=1) == train_labels[held_out])
           for w, b in zip(*map(np.asarray, weights))]
  best = _LEARNING_RATES[int(np.argmax(right))]
  (w,), (b,) = map(np.asarray, fit(np.arange(len(train)), [best]))
  scores = test @ w + b
  return {'top1': top_k(scores, test_labels, 1), 'top5': top_k(scores, test_labels, 5),
          'learning_rate': best}


@functools.partial(jax.jit, static_argnames='num_classes')
def _fit(features, labels, rates, seed, *, num_classes):
  """(weights [R, F, C], biases [R, C]) for each of the learning rates, with the same batches."""
  n, dim = features.shape
  schedule = optax.cosine_decay_schedule(1.0, _STEPS)

  def loss(params, x, y):
    # The features have a norm near 1: weights of that scale learn at usual rates.
    scores = x @ params['w'] * jnp.sqrt(dim) + params['b']
    return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

  def train(rate):
    optimizer = optax.chain(optax.add_decayed_weights(_WEIGHT_DECAY),
                            optax.sgd(lambda t: rate * schedule(t), momentum=0.9, nesterov=True))

    def step(carry, t):
      params, state = carry
      rows = jax.random.randint(jax.random.fold_in(jax.random.key(seed), t), (_BATCH,), 0, n)
      updates, state = optimizer.update(jax.grad(loss)(params, features[rows], labels[rows]),
                                        state, params)
      return (optax.apply_updates(params, updates), state), None

    params = {'w': jnp.zeros((dim, num_classes)), 'b': jnp.zeros(num_classes)}
    params = lax.scan(step, (params, optimizer.init(params)), jnp.arange(_STEPS))[0][0]
    return params['w'] * jnp.sqrt(dim), params['b']

  return lax.map(train, rates)


def support_vectors(train, train_labels, test, test_labels, *, seed=0):
  """A linear SVM, one against the rest, on standardised features; C chosen as `linear` chooses.

  Args:
    train: [N, F] features.
    train_labels: [N] int.
    test: [Q, F].
    test_labels: [Q] int.
    seed: of the split.

  Returns:
    {'top1', 'C'}.
  """
  shuffled = np.random.RandomState(seed).permutation(len(train))
  held_out, rest = np.split(shuffled, [max(1, round(_HELD_OUT * len(train)))])

  def fit(rows, c):
    classifier = svm.LinearSVC(C=c, dual='auto', random_state=seed, max_iter=5000)
    return pipeline.make_pipeline(preprocessing.StandardScaler(), classifier).fit(
        train[rows], train_labels[rows])

  choices = (1e-4, 1e-3, 1e-2, 1e-1)
  right = [fit(rest, c).score(train[held_out], train_labels[held_out]) for c in choices]
  best = choices[int(np.argmax(right))]
  return {'top1': float(fit(np.arange(len(train)), best).score(test, test_labels)), 'C': best}


def top_k(scores, labels, k):
  """Share of rows whose label is among the k best scores; None where that is all of them.

  Args:
    scores: [Q, C].
    labels: [Q] int.
    k: how many.
  """
  if k > 1 and scores.shape[1] <= k:
    return None
  best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
  return float(np.mean((best == labels[:, None]).any(axis=1)))
