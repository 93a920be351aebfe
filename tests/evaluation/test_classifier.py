import numpy as np
import pytest
from sklearn import neighbors as sklearn_neighbors

from instdisc_jax.evaluation import classifier
from instdisc_jax.runtime import errors
from tests import twins


def _clusters(classes=4, size=30, dim=16, spread=0.35, seed=0):
  """([n, D] unit-norm, [n] class) around as many random centers."""
  random = np.random.default_rng(seed)
  centers = twins.unit_rows(random, classes, dim)
  label = np.repeat(np.arange(classes), size)
  x = centers[label] + spread * random.standard_normal((len(label), dim))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), label


def _fit(x, label, **kwargs):
  return classifier.fit(x, [f'class {c}' for c in label], [f'{i}.jpg' for i in range(len(x))],
                        **kwargs)


def test_the_vote_equals_scikit_learn_s():
  x, label = _clusters(spread=0.6)
  train, test = np.arange(0, len(x), 2), np.arange(1, len(x), 2)
  fitted = _fit(x[train], label[train])
  weights = lambda distance: np.exp((1 - distance**2 / 2) / 0.1)
  twin = sklearn_neighbors.KNeighborsClassifier(fitted.k, weights=weights)
  twin.fit(x[train], label[train])
  found = fitted.predict(x[test])
  np.testing.assert_array_equal(found.label, twin.predict(x[test]))
  distance, nearest = twin.kneighbors(x[test], 3)
  np.testing.assert_array_equal(found.nearest, nearest)
  np.testing.assert_allclose(found.similarity, 1 - distance**2 / 2, atol=1e-5)


def test_the_accuracy_leaves_each_image_out():
  x, label = _clusters(spread=0.6)
  fitted = _fit(x, label)
  right = 0
  for i in range(len(x)):
    others = np.arange(len(x)) != i
    similarity = x[others] @ x[i]
    best = np.argsort(-similarity)[:fitted.k]
    votes = np.bincount(label[others][best], np.exp(similarity[best] / 0.1), 4)
    right += votes.argmax() == label[i]
  assert fitted.accuracy == right / len(x) < 1


@pytest.mark.parametrize('method', classifier.METHODS)
@pytest.mark.parametrize('classes', [2, 4])
def test_confidence_is_about_the_share_that_is_right(method, classes):
  x, label = _clusters(classes=classes, size=200, spread=0.55)
  fitted = _fit(x[::2], label[::2], method=method)
  found = fitted.predict(x[1::2])
  right = found.label == label[1::2]
  assert right.mean() > 1.5 / classes
  assert abs(found.confidence.mean() - right.mean()) < 0.05
  assert classifier.calibration_error(found.confidence, right) < 0.08


@pytest.mark.parametrize('method', classifier.METHODS)
def test_calibration_is_judged_by_labels_that_it_has_not_seen(method):
  errors_of = []
  for seed in range(5):
    x, label = _clusters(classes=2, size=150, spread=0.55)
    label = np.random.default_rng(seed).permutation(label)  # nothing can be learned
    errors_of.append(_fit(x, label, method=method).calibration_error)
  assert np.mean(errors_of) < 0.09 and min(errors_of) > 0
  assert np.isnan(_fit(x[::4], label[::4], method=method).calibration_error)  # too few to tell


def test_an_unknown_method_is_refused():
  x, label = _clusters(classes=2, size=4)
  with pytest.raises(errors.UserError, match="method is 'tree', must be one of knn, linear"):
    _fit(x, label, method='tree')


def test_a_linear_classifier_leaves_images_out_where_a_class_may_vanish():
  x, label = _clusters(classes=3, size=4)
  kept = [*range(9)]  # the last class has one image
  fitted = _fit(x[kept], label[kept], method='linear')
  assert fitted.accuracy < 1 and fitted.weights.shape == (17, 3)


def test_an_image_like_no_labeled_one_is_unknown():
  x, label = _clusters(spread=0.05)
  fitted = _fit(x, label)
  far = -x[:1]
  assert not fitted.predict(x).unknown.any() and fitted.predict(far).unknown.all()


def test_a_saved_classifier_predicts_the_same(tmp_path):
  x, label = _clusters()
  for method in classifier.METHODS:
    fitted = _fit(x[::2], label[::2], method=method)
    fitted.save(tmp_path / 'c.npz')
    restored = classifier.load(tmp_path / 'c.npz')
    for ours, theirs in zip(vars(fitted.predict(x)).values(), vars(restored.predict(x)).values()):
      np.testing.assert_array_equal(ours, theirs)
    assert restored.names == fitted.names and restored.method == method


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 broken'])
def test_a_file_that_is_no_classifier_is_a_user_error(tmp_path, content):
  (tmp_path / 'c.npz').write_bytes(content)
  with pytest.raises(errors.UserError, match='is not a classifier'):
    classifier.load(tmp_path / 'c.npz')
  with pytest.raises(errors.UserError, match='is not a classifier'):
    classifier.load(tmp_path / 'missing.npz')


@pytest.mark.parametrize('labels, found', [([], '0 classes'), (['a', 'a'], '1 class')])
def test_one_class_is_a_user_error(labels, found):
  with pytest.raises(errors.UserError, match=f'the labels name {found}, must be two or more'):
    classifier.fit(_clusters()[0][:len(labels)], labels, labels)


@pytest.mark.parametrize('count', [2, 3, 5])
def test_very_few_labels(count):
  x, label = _clusters(spread=0.05)
  rows = np.linspace(0, len(x) - 1, count).astype(int)
  found = _fit(x[rows], label[rows]).predict(x)
  assert found.nearest.shape == (len(x), min(count, 3))
  assert 0 < found.confidence.min() <= found.confidence.max() < 1


def test_suggestions_are_new_and_reach_every_cluster():
  x, label = _clusters(classes=8, size=40, spread=0.1)
  labeled = np.array([0, 41])
  fitted = _fit(x[labeled], label[labeled])
  chosen = classifier.suggest(x, labeled, fitted.predict(x).confidence, 6)
  assert len(set(chosen)) == 6 and not set(chosen) & set(labeled)
  assert len(set(label[chosen]) | {0, 1}) == 8
  everything = classifier.suggest(x, labeled, fitted.predict(x).confidence, 10_000)
  assert sorted([*everything, *labeled]) == list(range(len(x)))


def test_suggestions_among_many_labels_are_made_of_some(monkeypatch):
  monkeypatch.setattr(classifier, '_MOST_KNOWN', 10)
  x, label = _clusters(classes=8, size=40, spread=0.1)
  labeled = np.flatnonzero((label < 7) & (np.arange(len(x)) % 2 > 0))
  confidence = np.where(label == 7, 0.2, 0.9)
  chosen = classifier.suggest(x, labeled, confidence, 3)
  assert not set(chosen) & set(labeled) and 7 in label[chosen]


def test_few_labels_vote_by_fewer_neighbors():
  x, label = _clusters(classes=8, size=8, spread=0.1)
  (count, accuracy), *_ = classifier.learning_curve(x, [f'class {c}' for c in label])
  assert count == 16 and accuracy > 0.75  # two of a class: five neighbors would outvote them


def test_more_labels_are_better():
  x, label = _clusters(classes=8, size=30, spread=0.45)
  names = [f'class {c}' for c in label]
  curves = [classifier.learning_curve(x, names, method) for method in classifier.METHODS]
  for (few, low), (more, high) in curves:
    assert (few, more) == (60, 120) and low < high < 1
  assert curves[0] != curves[1]
