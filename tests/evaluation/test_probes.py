import numpy as np
import pytest
from sklearn import datasets, linear_model, metrics, pipeline, preprocessing, svm

from instdisc_jax.evaluation import probes


def test_the_linear_probe_is_within_a_point_of_scikit_learn_s_logistic_regression():
  data = datasets.load_digits()
  pixels, labels = data.images.reshape(-1, 64).astype(np.float32), data.target
  found = probes.linear(pixels[:1297], labels[:1297], pixels[1297:], labels[1297:],
                        num_classes=10)
  regression = pipeline.make_pipeline(preprocessing.StandardScaler(),
                                      linear_model.LogisticRegression(max_iter=2000))
  expected = regression.fit(pixels[:1297], labels[:1297]).score(pixels[1297:], labels[1297:])
  assert abs(found['top1'] - expected) <= 0.01
  assert found['top1'] < found['top5'] < 1


def test_the_test_set_does_not_choose_the_learning_rate():
  random = np.random.default_rng(0)
  x, y = random.normal(size=(300, 20)).astype(np.float32), random.integers(0, 3, 300)
  one = probes.linear(x[:200], y[:200], x[200:], y[200:], num_classes=3)
  other = probes.linear(x[:200], y[:200], x[200:], (y[200:] + 1) % 3, num_classes=3)
  assert one['learning_rate'] == other['learning_rate'] and one['top5'] is None


def test_a_class_without_a_score_is_not_among_the_best():
  scores = np.full((2, 8), -np.inf)
  scores[:, 0] = 1
  assert probes.top_k(scores, np.array([0, 3]), 5) == 0.5


def test_the_svm_separates_what_is_separable():
  random = np.random.default_rng(0)
  y = random.integers(0, 3, 300)
  x = (np.eye(3)[y] * 4 + random.normal(size=(300, 3))).astype(np.float32)
  found = probes.support_vectors(x[:200], y[:200], x[200:], y[200:])
  assert found['top1'] > 0.95
  shuffled = probes.support_vectors(x[:200], y[:200], x[200:], random.permutation(y[200:]))
  assert shuffled['top1'] < 0.5


def test_an_svm_in_blocks_equals_linear_svc(monkeypatch):
  data = datasets.load_digits()
  pixels, labels = data.images.reshape(-1, 64).astype(np.float32), data.target
  parts = pixels[:1297], labels[:1297], pixels[1297:], labels[1297:]
  whole = probes.support_vectors(*parts)
  monkeypatch.setattr(probes, '_BLOCK', 300)  # five blocks
  in_blocks = probes.support_vectors(*parts, most_bytes=0)
  assert in_blocks['cost'] == whole['cost']
  assert abs(in_blocks['top1'] - whole['top1']) <= 0.005
  weights = lambda fit: fit(pixels, labels, np.arange(1297), 1e-3, 0)
  classifier, found = weights(probes._fit_svm)[-1], weights(probes._fit_svm_in_blocks)
  np.testing.assert_allclose(found.w.T, classifier.coef_, atol=2e-3)
  np.testing.assert_allclose(found.b, classifier.intercept_, atol=2e-3)


def test_several_labels_are_classified_like_linear_svc_class_by_class():
  random = np.random.default_rng(0)
  tags = random.integers(0, 2, (300, 4)).astype(np.int8)
  tags[random.random((300, 4)) < 0.1] = -1
  x = (np.where(tags == 1, 1.0, 0.0) @ random.normal(size=(4, 6))
       + random.normal(size=(300, 6))).astype(np.float32)
  found = probes.average_precision(x[:200], tags[:200], x[200:], tags[200:])
  scaler = preprocessing.StandardScaler().fit(x[:200])
  expected = []
  for known, asked in zip(tags[:200].T, tags[200:].T):
    classifier = svm.LinearSVC(C=found['cost'], max_iter=10_000).fit(
        scaler.transform(x[:200])[known >= 0], known[known >= 0])
    scores = classifier.decision_function(scaler.transform(x[200:])[asked >= 0])
    expected.append(metrics.average_precision_score(asked[asked >= 0], scores))
  assert found['map'] == pytest.approx(np.mean(expected), abs=1e-3)
  assert found['map'] > 0.6
