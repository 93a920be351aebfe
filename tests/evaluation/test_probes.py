import numpy as np
from sklearn import datasets, linear_model, pipeline, preprocessing

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
