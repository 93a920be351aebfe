import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
from sklearn import datasets, linear_model, neighbors, pipeline, preprocessing

from instdisc_jax import errors, evaluate, inference
from instdisc_jax.data import digits
from instdisc_jax.evaluation import geometry, probes, report, stages


@pytest.fixture(scope='module')
def workdir(trained, tmp_path_factory):
  """A copy of the small trained run, whose folder the evaluation writes to."""
  folder = tmp_path_factory.mktemp('evaluated') / 'run'
  shutil.copytree(trained[0], folder)
  return folder


@pytest.fixture(scope='module')
def sets(workdir):
  return evaluate.prepare(inference.load(workdir), workdir / 'features')


def test_every_stage_of_every_picture_is_there(sets):
  # A CIFAR ResNet-10 of width 2 on 32 x 32: each stage has at most 9,600 numbers.
  shapes = {name: x.shape for name, x in sets.train.items()}
  assert shapes == {'conv1': (128, 2 * 32 * 32), 'conv2': (128, 2 * 32 * 32),
                    'conv3': (128, 4 * 16 * 16), 'conv4': (128, 8 * 8 * 8),
                    'conv5': (128, 16 * 4 * 4), 'pooled': (128, 16), 'embedding': (128, 16)}
  assert {name: len(x) for name, x in sets.test.items()} == dict.fromkeys(shapes, 500)
  last = np.asarray(sets.train['conv5']).reshape(128, 4, 4, 16)
  np.testing.assert_allclose(last.mean((1, 2)), sets.train['pooled'], atol=1e-5)
  pictures = digits.load()[1][0][:70]
  np.testing.assert_allclose(sets.model.embed(pictures), sets.test['embedding'][:70], atol=1e-6)


def test_features_are_computed_once(sets, monkeypatch):
  monkeypatch.setattr(inference.Model, 'views_of', None)
  again = evaluate.prepare(inference.load(sets.model.workdir), sets.model.workdir / 'features')
  np.testing.assert_array_equal(again.train['conv3'], sets.train['conv3'])


def test_knn_equals_scikit_learn_s_brute_force(sets):
  results = evaluate.nearest_neighbours(sets)
  assert {r['features'] for r in results} == {'embedding', 'pooled', 'bank rows'}
  checked = 0
  for kind, rows, queries in (
      ('embedding', sets.train['embedding'], sets.test['embedding']),
      ('pooled', sets.train['pooled'], sets.test['pooled']),
      ('bank rows', sets.bank, sets.test['embedding'])):
    for k, temperature in ((1, 0.1), (20, 0.07), (100, 0.2)):
      brute = neighbors.KNeighborsClassifier(
          k, metric='cosine', algorithm='brute',
          weights=lambda distance: np.exp((1 - distance) / temperature))
      expected = brute.fit(rows, sets.train_labels).predict_proba(queries)
      found, = [r for r in results if (r['features'], r['neighbors'], r['temperature'])
                == (kind, k, temperature)]
      top1 = np.mean(brute.classes_[expected.argmax(axis=1)] == sets.test_labels)
      assert abs(found['top1'] - top1) <= 1 / 500  # but for a tie
      best = np.argsort(-expected, axis=1)[:, :5]
      voted = np.take_along_axis(expected, best, axis=1) > 0
      hit = (brute.classes_[best] == sets.test_labels[:, None]) & voted
      assert abs(found['top5'] - np.mean(hit.any(axis=1))) <= 5 / 500
      checked += 1
  assert checked == 9
  own, = [r for r in results if 'per_class' in r]
  config = sets.model.config.knn
  assert (own['features'], own['neighbors'], own['temperature']) == (
      'embedding', config.neighbors, config.temperature)
  count = np.bincount(sets.test_labels)
  right = sum(own['per_class'][str(c)] * count[c] for c in range(10))
  assert right == pytest.approx(own['top1'] * 500, abs=1)  # but for a tie
  assert (sets.model.workdir / 'confusion.png').stat().st_size > 10_000


def test_the_probe_is_within_a_point_of_scikit_learn_s_logistic_regression():
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


class TestGeometry:

  x = np.random.default_rng(0).normal(size=(50, 6))
  x /= np.linalg.norm(x, axis=1, keepdims=True)

  def test_uniformity(self):
    squared = ((self.x[:, None] - self.x[None])**2).sum(-1)
    pairs = ~np.eye(50, dtype=bool)
    expected = np.log(np.mean(np.exp(-2 * squared[pairs])))
    assert geometry.uniformity(self.x) == pytest.approx(expected, abs=1e-5)
    assert geometry.uniformity(np.tile(self.x[:1], (9, 1))) == pytest.approx(0, abs=1e-5)

  def test_effective_rank(self):
    assert geometry.effective_rank(np.eye(5)) == pytest.approx(5)
    assert geometry.effective_rank(np.outer(np.arange(4), np.ones(3))) == pytest.approx(1)
    values = np.linalg.svd(self.x, compute_uv=False)
    p = values / values.sum()
    assert geometry.effective_rank(self.x) == pytest.approx(np.exp(-(p * np.log(p)).sum()))

  def test_alignment_and_staleness(self):
    assert geometry.alignment(self.x, self.x) == 0
    assert geometry.alignment(self.x, -self.x) == pytest.approx(4)
    assert geometry.staleness(self.x, self.x) == pytest.approx(0)
    assert geometry.staleness(self.x, -self.x) == pytest.approx(2)

  def test_class_alignment(self):
    labels = np.arange(50) % 3 + 10 * (np.arange(50) == 49)  # the last is alone in its class
    squared = ((self.x[:, None] - self.x[None])**2).sum(-1)
    expected = [squared[np.ix_(labels == c, labels == c)][~np.eye(np.sum(labels == c), dtype=bool)]
                .mean() for c in range(3)]
    assert geometry.class_alignment(self.x, labels) == pytest.approx(np.mean(expected))
    order = np.random.default_rng(1).permutation(50)
    assert geometry.class_alignment(self.x[order], labels[order]) == pytest.approx(
        np.mean(expected))
    assert geometry.class_alignment(self.x, np.arange(50)) is None

  def test_of_a_run(self, sets):
    result, = evaluate.measure_geometry(sets)
    rows, fresh = sets.bank, np.asarray(sets.train['embedding'])
    assert result['staleness'] == pytest.approx(1 - np.mean(np.sum(rows * fresh, axis=1)), abs=1e-6)
    assert result['uniformity'] < 0 and 1 < result['effective_rank'] <= 16
    assert 1e-3 < result['alignment'] < 4 and 0 < result['class_alignment'] < 4
    model = inference.load(sets.model.workdir)
    model.config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), brightness=0.0,
                                contrast=0.0, saturation=0.0, hue=0.0, grayscale=0.0, flip=0.0)
    still, = evaluate.measure_geometry(dataclasses.replace(sets, model=model))
    assert still['alignment'] == pytest.approx(0, abs=1e-6)  # both views are the picture


def test_the_command_writes_a_line_for_each_result(workdir, capsys):
  assert evaluate.main([f'--workdir={workdir}', '--protocol=knn,geometry']) == 0
  lines = [json.loads(line) for line in (workdir / 'evaluations.jsonl').read_text().splitlines()]
  assert {line['protocol'] for line in lines} == {'knn', 'geometry'}
  assert all(line['dataset'] == 'digits' and line['step'] == 12 for line in lines)
  out = capsys.readouterr().out
  assert "knn, at the run's own K and τ" in out and 'best (K, τ)' in out
  assert 'effective rank' in out


def test_another_data_set(workdir, tmp_path):
  random = np.random.default_rng(0)
  labels = random.integers(0, 2, 60)
  images = random.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
  np.savez(tmp_path / 'a.npz', images=images, labels=labels)
  of = lambda name: evaluate.prepare(inference.load(workdir), tmp_path / 'features',
                                     f'arrays:{tmp_path / name}')
  sets = of('a.npz')
  assert len(sets.train_labels) == 48 and len(sets.test_labels) == 12  # a fifth is held out
  assert sets.bank is None and sets.num_classes == 2
  assert {r['features'] for r in evaluate.nearest_neighbours(sets)} == {'embedding', 'pooled'}
  np.savez(tmp_path / 'b.npz', images=images)
  with pytest.raises(errors.UserError, match='has no labels to evaluate with: set --dataset'):
    of('b.npz')
  unlabelled = evaluate.prepare(inference.load(workdir), tmp_path / 'features',
                                f'arrays:{tmp_path / "b.npz"}', ('embedding',), labelled=False)
  result, = evaluate.measure_geometry(unlabelled)
  assert result['class_alignment'] is None and result['alignment'] > 0
  np.savez(tmp_path / 'c.npz', images=images, labels=np.where(labels, 1001, 301001))
  gaps = of('c.npz')
  assert gaps.class_names == ('1001', '301001') and gaps.num_classes == 2
  assert max(r['top1'] for r in evaluate.nearest_neighbours(gaps)) > 0
  np.savez(tmp_path / 'd.npz', images=images[:1], labels=labels[:1])
  with pytest.raises(errors.UserError, match='0 pictures to learn from, must have at least 2'):
    of('d.npz')


def test_files_that_were_changed_or_lie_elsewhere_are_looked_at_anew(workdir, tmp_path):
  random = np.random.default_rng(0)
  def write(folder):
    for i in range(8):
      (tmp_path / folder / f'class{i % 2}').mkdir(parents=True, exist_ok=True)
      Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
          tmp_path / folder / f'class{i % 2}' / f'{i}.bmp')
  def features(folder):
    sets = evaluate.prepare(inference.load(workdir), tmp_path / 'features',
                            f'folder:{tmp_path / folder}', ('embedding',))
    return np.array(sets.train['embedding'])
  write('x'), write('y')  # of the same names and sizes
  first, other = features('x'), features('y')
  assert np.abs(first - other).max() > 1e-3
  write('x')
  assert np.abs(features('x') - first).max() > 1e-3


def test_a_damaged_cache_is_made_again_and_one_of_other_weights_removed(sets, tmp_path):
  model, test = sets.model, sets.test_pictures
  (tmp_path / '0123456789abcdef-0123456789abcdef').mkdir()
  first = np.array(stages.collect(model, test, tmp_path, ('pooled',))['pooled'])
  folder, = tmp_path.iterdir()
  file, = folder.iterdir()
  file.write_bytes(file.read_bytes()[:1000])
  np.testing.assert_array_equal(stages.collect(model, test, tmp_path, ('pooled',))['pooled'], first)


def test_a_class_name_that_looks_like_a_formula_or_is_no_text_is_drawn(tmp_path):
  names = ('$5_$10', 'caf\udcff')
  report.save_picture(report.confusion(np.array([[3, 1], [0, 2]]), names, 'folder:$x_$y'),
                      tmp_path / 'confusion.png')
  assert (tmp_path / 'confusion.png').stat().st_size > 5_000
  figure = report.confusion(np.array([[3, 1], [0, 2]]), names, 'folder:$x_$y')
  names_drawn = [text.get_text() for text in figure.axes[0].get_xticklabels()]
  assert names_drawn == [r'\$5_\$10', 'caf?']


def test_matplotlib_is_left_as_a_notebook_has_set_it():
  code = ('import sys, matplotlib; before = dict(matplotlib.rcParams); '
          'from instdisc_jax import inference, reproduce; '
          'sys.exit(dict(matplotlib.rcParams) != before)')
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_the_stages_names_are_those_the_encoders_show(sets):
  assert set(sets.train) == {*stages.NAMES, stages.EMBEDDING}
