"""Classes for many images from the labels of a few, by their embeddings.

Everything is estimated by leave-one-out: each labeled image is classified by the others. That
chooses K, calibrates the confidence, and gives the accuracy.
"""

from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib
from typing import Any
import zipfile

from jaxtyping import Bool, Float, Int
import numpy as np
from sklearn import cluster, linear_model, model_selection

from instdisc_jax import neighbors
from instdisc_jax.evaluation import knn
from instdisc_jax.runtime import errors

METHODS = ('knn', 'linear')
SHOWN = 3  # nearest labeled images of each prediction
_KS = (1, 3, 5, 10, 20)
_FOLDS = 10  # of what would be slow to leave out one by one
_TYPICAL = 20  # neighbors whose mean similarity makes an image typical
_MOST_CLUSTERED = 20_000  # images among which the next to label are chosen
_MOST_KNOWN = 2_000  # labeled ones among them
_LEAST_CALIBRATED = 100  # labels from which the calibration can be judged
_PER_BIN = 50  # labels in a bin of equal confidence, which keeps its noise below 0.06


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Classes of Q images.

  Attributes:
    label: [Q] class indices.
    confidence: [Q] probability that the label is right, as calibrated on the labeled images.
    nearest: [Q, s] the most similar labeled images, s = 3 or fewer.
    similarity: [Q, s] their cosines.
    unknown: [Q] whether an image is less similar to all labeled images than any of those is to the
      others.
  """
  label: Int[np.ndarray, ' Q']
  confidence: Float[np.ndarray, ' Q']
  nearest: Int[np.ndarray, 'Q s']
  similarity: Float[np.ndarray, 'Q s']
  unknown: Bool[np.ndarray, ' Q']


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A classifier of embeddings.

  Attributes:
    class_names: the C classes.
    embedding: [n, D] unit-norm, of the labeled images.
    label: [n] their class indices.
    names: [n] their names.
    method: one of `METHODS`.
    k: neighbors that vote.
    temperature: τ of the vote.
    calibration: (intercept, weight of the margin, weight of the similarity) of a logistic model.
    least_similarity: of an image that is not unknown.
    accuracy: by leave-one-out, with the best k.
    calibration_error: mean absolute difference of confidence and accuracy, by cross-validation; NaN
      with fewer than 100 labels, too few to tell.
    weights: [D + 1, C] of the linear classifier, the last row its intercepts; else None.
  """
  class_names: tuple[str, ...]
  embedding: Float[np.ndarray, 'n D']
  label: Int[np.ndarray, ' n']
  names: tuple[str, ...]
  method: str
  k: int
  temperature: float
  calibration: tuple[float, float, float]
  least_similarity: float
  accuracy: float
  calibration_error: float
  weights: Float[np.ndarray, 'D1 C'] | None = None

  def predict(self, embedding: Float[np.ndarray, 'Q D']) -> Predictions:
    """Classes of any images, by their unit-norm embeddings."""
    similarity, nearest = _nearest(embedding, self.embedding, max(self.k, SHOWN))
    scores = (_vote(similarity, self.label[nearest], self.k, self.temperature,
                    len(self.class_names)) if self.weights is None
              else _linear_scores(embedding, self.weights))
    label, margin = _decide(scores)
    return Predictions(label, _confidence(self.calibration, margin, similarity[:, 0]),
                       nearest[:, :SHOWN], similarity[:, :SHOWN],
                       similarity[:, 0] < self.least_similarity)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the classifier to an .npz file."""
    fields: Any = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})


def load(path: str | os.PathLike[str]) -> Classifier:
  """Reads a classifier that `Classifier.save` wrote; raises `errors.UserError`."""
  try:
    with np.load(pathlib.Path(path).expanduser(), allow_pickle=False) as file:
      fields: dict[str, Any] = {name: file[name] for name in file}
    for name in ('method', 'k', 'temperature', 'least_similarity', 'accuracy',
                 'calibration_error'):
      fields[name] = fields[name].item()
    for name in ('class_names', 'names', 'calibration'):
      fields[name] = tuple(fields[name].tolist())
    return Classifier(**fields)
  except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
    raise errors.UserError(f"'{path}' is not a classifier ({errors.one_line(e)[:100]})",
                           'a file that Classifier.save wrote') from e


def fit(embedding: Float[np.ndarray, 'n D'], labels: Sequence[str], names: Sequence[str],
        method: str = 'knn', temperature: float = 0.1) -> Classifier:
  """Learns from labeled images.

  Args:
    embedding: [n, D] unit-norm.
    labels: [n] the class of each.
    names: [n] the name of each image.
    method: 'knn', the weighted vote of the nearest; or 'linear', logistic regression.
    temperature: τ of the vote.

  Raises:
    errors.UserError: there are fewer than two classes, or there is no such method.
  """
  if method not in METHODS:
    raise errors.UserError(f"method is '{method}'", f'one of {", ".join(METHODS)}')
  class_names = tuple(sorted(set(labels)))
  if len(class_names) < 2:
    raise errors.UserError(f'the labels name {len(class_names)} class'
                           + ('' if len(class_names) == 1 else 'es'), 'two or more')
  number = {name: i for i, name in enumerate(class_names)}
  label = np.array([number[name] for name in labels], np.int32)
  similarity, nearest = _nearest(embedding, embedding, max(*_KS, SHOWN), without_own=True)
  weights, k = None, 1
  if method == 'linear':
    scores, weights = _linear_left_out(embedding, label, len(class_names)), _linear(
        embedding, label, len(class_names))
  else:
    k, scores = _best_vote(similarity, nearest, label, temperature, len(class_names))
  found, margin = _decide(scores)
  correct = found == label
  calibration = _calibrate(margin, similarity[:, 0], correct)
  return Classifier(class_names, embedding, label, tuple(names), method, k, temperature,
                    calibration, float(similarity[:, 0].min()), float(correct.mean()),
                    _judge_calibration(margin, similarity[:, 0], correct), weights)


def _best_vote(similarity, nearest, label, temperature, classes):
  """(the k by which the most of n images are classified right, [n, C] shares of its votes)."""
  votes = {k: _vote(similarity, label[nearest], k, temperature, classes)
           for k in _KS if k <= similarity.shape[1]}
  k = max(votes, key=lambda k: (np.mean(_decide(votes[k])[0] == label), -k))
  return k, votes[k]


def learning_curve(embedding: Float[np.ndarray, 'n D'], labels: Sequence[str],
                   method: str = 'knn', temperature: float = 0.1,
                   repeats: int = 5) -> list[tuple[int, float]]:
  """[(number of labels, accuracy)] of a method: with halves of the labels, as a forecast of more.

  For fewer labels than all, the mean over random choices, each tested on the labels left out.
  """
  label = np.unique(np.asarray(labels), return_inverse=True)[1].astype(np.int32)
  classes, random, points = int(label.max()) + 1, np.random.RandomState(0), []
  for count in (len(label) // 4, len(label) // 2):
    if count < 2:
      continue
    found = []
    for _ in range(repeats):
      order = random.permutation(len(label))
      few, rest = order[:count], order[count:]
      if method == 'linear':
        scores = _linear_of_some(embedding[few], label[few], embedding[rest], classes)
      else:
        others = _nearest(embedding[few], embedding[few], max(_KS), without_own=True)
        k, _ = _best_vote(*others, label[few], temperature, classes)
        similarity, nearest = _nearest(embedding[rest], embedding[few], k)
        scores = _vote(similarity, label[few][nearest], k, temperature, classes)
      found.append(np.mean(_decide(scores)[0] == label[rest]))
    points.append((count, float(np.mean(found))))
  return points


def suggest(embedding: Float[np.ndarray, 'N D'], labeled: Int[np.ndarray, ' n'],
            confidence: Float[np.ndarray, ' N'], count: int,
            seed: int = 0) -> Int[np.ndarray, ' m']:
  """The images worth labeling next: typical of many, unlike those labeled, and uncertain.

  The images are clustered, into as many clusters as there would be labels. The largest and least
  certain clusters without a label come first; each gives its most typical image, the one with the
  largest mean similarity to its neighbors (TypiClust: Hacohen, Dekel and Weinshall, 2022).

  Args:
    embedding: [N, D] unit-norm.
    labeled: [n] the labeled ones among them.
    confidence: [N] of their predicted labels.
    count: how many.
    seed: of the clustering, and of the choice of 20,000 images, and 2,000 labeled ones, if there
      are more.

  Returns:
    [m] indices of at most `count` images without a label, the most useful first.
  """
  is_labeled = np.zeros(len(embedding), bool)
  is_labeled[labeled] = True
  pool = np.flatnonzero(~is_labeled)
  random = np.random.RandomState(seed)
  if len(pool) > _MOST_CLUSTERED:
    pool = np.sort(random.permutation(pool)[:_MOST_CLUSTERED])
  if len(labeled) > _MOST_KNOWN:
    labeled = np.sort(random.permutation(labeled)[:_MOST_KNOWN])
  count = min(count, len(pool))
  chosen = np.concatenate([pool, labeled]).astype(int)
  clusters = min(count + len(labeled), len(chosen))
  starts: Any = 3
  of = cluster.MiniBatchKMeans(clusters, n_init=starts, random_state=seed,
                               batch_size=4096).fit_predict(embedding[chosen])
  typical = _nearest(embedding[chosen], embedding[chosen], _TYPICAL, without_own=True)[0].mean(1)
  labels_in = np.bincount(of[len(pool):], minlength=clusters)
  doubt = np.bincount(of[:len(pool)], 1 - confidence[pool], clusters)
  found: list[int] = []
  while len(found) < count:
    left = np.setdiff1d(np.arange(len(pool)), found)
    # Fewest labels first, then the most doubt in all.
    present = np.unique(of[left])
    best = present[np.lexsort((-doubt[present], labels_in[present]))[0]]
    members = left[of[left] == best]
    found.append(int(members[np.argmax(typical[members])]))
    labels_in[best] += 1
  return pool[found]


def calibration_error(confidence: Float[np.ndarray, ' n'], correct: Bool[np.ndarray, ' n'],
                      bins: int = 10) -> float:
  """Expected calibration error: |mean confidence - accuracy|, over bins of equally many images."""
  order, total = np.argsort(confidence, kind='stable'), 0.0
  for part in np.array_split(order, min(bins, len(order))):
    total += abs(confidence[part].mean() - correct[part].mean()) * len(part)
  return float(total / len(order))


def _nearest(queries, rows, k, without_own=False):
  """(similarity [Q, k'], row [Q, k']) of the nearest rows, k' = k or fewer."""
  own = np.arange(len(queries), dtype=np.int32) if without_own else None
  found = neighbors.nearest(np.asarray(queries, np.float32), np.asarray(rows, np.float32), own,
                      k=min(k, len(rows) - without_own))
  similarity, row = map(np.asarray, found)
  return similarity, row


def _vote(similarity, label, k, temperature, classes):
  """[Q, C] shares of the vote of the k nearest."""
  scores = np.asarray(knn.vote(similarity[:, :k], label[:, :k], temperature, classes))
  return scores / scores.sum(axis=1, keepdims=True)


def _decide(scores):
  """([Q] the best class, [Q] its lead over the second as log odds, within ±5)."""
  second, first = np.sort(scores, axis=1)[:, -2:].T
  return scores.argmax(axis=1), np.log((first + 0.0067) / (second + 0.0067))


def _calibrate(margin, similarity, correct):
  """(intercept, weights) of the probability that a prediction is right."""
  if correct.all() or not correct.any():  # the rule of succession
    p = (correct.sum() + 1) / (len(correct) + 2)
    return float(np.log(p / (1 - p))), 0.0, 0.0
  model = linear_model.LogisticRegression().fit(np.stack([margin, similarity], axis=1), correct)
  of_margin, of_similarity = model.coef_[0]
  return float(model.intercept_[0]), float(of_margin), float(of_similarity)


def _judge_calibration(margin, similarity, correct):
  """The calibration error of labels that the calibration has not seen; NaN if there are few."""
  if len(correct) < _LEAST_CALIBRATED:
    return math.nan
  confidence = np.zeros(len(correct))
  folds = model_selection.KFold(_FOLDS, shuffle=True, random_state=0)
  for rest, left_out in folds.split(confidence):
    fitted = _calibrate(margin[rest], similarity[rest], correct[rest])
    confidence[left_out] = _confidence(fitted, margin[left_out], similarity[left_out])
  return calibration_error(confidence, correct, min(10, len(correct) // _PER_BIN))


def _confidence(calibration, margin, similarity):
  intercept, of_margin, of_similarity = calibration
  return 1 / (1 + np.exp(-(intercept + of_margin * margin + of_similarity * similarity)))


def _regression():
  return linear_model.LogisticRegression(C=10.0, max_iter=1000)


def _linear(embedding, label, classes):
  """[D + 1, C] weights; with two classes scikit-learn keeps those of the second alone."""
  model = _regression().fit(embedding, label)
  weights = np.concatenate([model.coef_, model.intercept_[:, None]], axis=1).T
  return np.concatenate([np.zeros_like(weights), weights], axis=1) if classes == 2 else weights


def _linear_scores(embedding, weights):
  logits = embedding @ weights[:-1] + weights[-1]
  exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
  return exponents / exponents.sum(axis=1, keepdims=True)


def _linear_left_out(embedding, label, classes):
  """[n, C] scores of each image by a classifier that has not seen it."""
  scores = np.zeros((len(label), classes))
  folds = model_selection.KFold(min(_FOLDS, len(label)), shuffle=True, random_state=0)
  for rest, left_out in folds.split(embedding):
    scores[left_out] = _linear_of_some(embedding[rest], label[rest], embedding[left_out], classes)
  return scores


def _linear_of_some(embedding, label, asked, classes):
  """[Q, C] scores by a classifier of images that may lack some of the classes."""
  scores, present = np.zeros((len(asked), classes)), np.unique(label)
  if len(present) == 1:
    scores[:, present] = 1
  else:
    weights = _linear(embedding, np.searchsorted(present, label), len(present))
    scores[:, present] = _linear_scores(asked, weights)
  return scores
