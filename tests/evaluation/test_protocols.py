import dataclasses

import numpy as np
from PIL import Image
import pytest
from sklearn import neighbors

from instdisc_jax import inference
from instdisc_jax.data import digits
from instdisc_jax.evaluation import embedding, feature_store, protocols
from instdisc_jax.runtime import errors


def test_the_sets_hold_every_stage_of_every_image(sets):
  # A CIFAR ResNet-10 of width 2 on 32 x 32: each stage has at most 9,600 values.
  shapes = {name: x.shape for name, x in sets.train.items()}
  assert shapes == {'conv1': (128, 2 * 32 * 32), 'conv2': (128, 2 * 32 * 32),
                    'conv3': (128, 4 * 16 * 16), 'conv4': (128, 8 * 8 * 8),
                    'conv5': (128, 16 * 4 * 4), 'pooled': (128, 16), 'embedding': (128, 16)}
  assert {name: len(x) for name, x in sets.test.items()} == dict.fromkeys(shapes, 500)
  last = np.asarray(sets.train['conv5']).reshape(128, 4, 4, 16)
  np.testing.assert_allclose(last.mean((1, 2)), sets.train['pooled'], atol=1e-5)
  images = digits.load()[1][0][:70]
  np.testing.assert_allclose(sets.model.embed(images), sets.test['embedding'][:70], atol=1e-6)


def test_the_names_of_the_stages_are_those_that_the_encoders_show(sets):
  assert set(sets.train) == {*embedding.STAGES, embedding.EMBEDDING} == {*feature_store.ALL}


def test_features_are_computed_once(sets, monkeypatch):
  monkeypatch.setattr(embedding.Engine, 'run', None)
  again = protocols.prepare(inference.load(sets.model.workdir), sets.model.workdir / 'features',
                            list(protocols.PROTOCOLS))
  np.testing.assert_array_equal(again.train['conv3'], sets.train['conv3'])


def test_knn_equals_scikit_learn_s_brute_force(sets):
  results = list(protocols.nearest_neighbors(sets))
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
      assert abs(found['top1'] - top1) <= 1 / 500  # except for a tie
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
  assert right == pytest.approx(own['top1'] * 500, abs=1)  # except for a tie
  assert (sets.model.workdir / 'confusion.png').stat().st_size > 10_000


def test_the_geometry_of_a_run(sets):
  result, = protocols.measure_geometry(sets)
  rows, fresh = sets.bank, np.asarray(sets.train['embedding'])
  assert result['staleness'] == pytest.approx(1 - np.mean(np.sum(rows * fresh, axis=1)), abs=1e-6)
  assert result['uniformity'] < 0 and 1 < result['effective_rank'] <= 16
  assert 1e-3 < result['alignment'] < 4 and 0 < result['class_alignment'] < 4
  model = inference.load(sets.model.workdir)
  model.config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), brightness=0.0,
                              contrast=0.0, saturation=0.0, hue=0.0, grayscale=0.0, flip=0.0)
  still, = protocols.measure_geometry(dataclasses.replace(sets, model=model))
  assert still['alignment'] == pytest.approx(0, abs=1e-6)  # both views are the image


def test_another_data_set(workdir, tmp_path):
  random = np.random.default_rng(0)
  labels = random.integers(0, 2, 60)
  images = random.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
  np.savez(tmp_path / 'a.npz', images=images, labels=labels)
  prepare = lambda name, protocol='knn': protocols.prepare(
      inference.load(workdir), tmp_path / 'features', [protocol], f'arrays:{tmp_path / name}')
  sets = prepare('a.npz')
  assert len(sets.train_labels) == 48 and len(sets.test_labels) == 12  # a fifth is held out
  assert sets.bank is None and sets.num_classes == 2
  assert {r['features'] for r in protocols.nearest_neighbors(sets)} == {'embedding', 'pooled'}
  np.savez(tmp_path / 'b.npz', images=images)
  with pytest.raises(errors.UserError, match='has no labels to evaluate with: set --dataset'):
    prepare('b.npz')
  result, = protocols.measure_geometry(prepare('b.npz', 'geometry'))  # which needs no labels
  assert result['class_alignment'] is None and result['alignment'] > 0
  np.savez(tmp_path / 'c.npz', images=images, labels=np.where(labels, 1001, 301001))
  gaps = prepare('c.npz')
  assert gaps.class_names == ('1001', '301001') and gaps.num_classes == 2
  assert max(r['top1'] for r in protocols.nearest_neighbors(gaps)) > 0
  np.savez(tmp_path / 'd.npz', images=images[:1], labels=labels[:1])
  with pytest.raises(errors.UserError, match='0 images to learn from, must be at least 2'):
    prepare('d.npz')


def test_features_of_files_that_were_changed_or_are_elsewhere_are_computed_again(
    workdir, tmp_path):
  random = np.random.default_rng(0)

  def write(folder):
    for i in range(8):
      (tmp_path / folder / f'class{i % 2}').mkdir(parents=True, exist_ok=True)
      Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
          tmp_path / folder / f'class{i % 2}' / f'{i}.bmp')

  def features(folder):
    sets = protocols.prepare(inference.load(workdir), tmp_path / 'features', ['geometry'],
                             f'folder:{tmp_path / folder}')
    return np.array(sets.train['embedding'])

  write('x'), write('y')  # of the same names and sizes
  first, other = features('x'), features('y')
  assert np.abs(first - other).max() > 1e-3
  write('x')
  assert np.abs(features('x') - first).max() > 1e-3


def test_images_with_several_labels_have_an_svm_for_each(sets):
  tags = lambda labels: np.stack([labels % 2, labels // 5], axis=1).astype(np.int8)  # odd, large
  tagged = lambda images: dataclasses.replace(images, labels=None, tags=tags(images.labels))
  model = inference.load(sets.model.workdir)
  model.__dict__['_dataset'] = dataclasses.replace(
      sets.model.dataset, train=tagged(sets.model.dataset.train),
      test=tagged(sets.model.dataset.test))
  prepare = lambda protocol: protocols.prepare(model, model.workdir / 'features', [protocol])
  results = list(protocols.support_vectors(prepare('svm')))
  assert [r['features'] for r in results] == ['pooled', 'embedding']
  assert all(0.4 < r['map'] <= 1 for r in results)  # by chance: about 0.5
  with pytest.raises(errors.UserError, match='digits has images with several labels, must be '
                                             'one label for each image: set --protocol=svm'):
    prepare('knn')


def test_a_probe_whose_features_do_not_fit_is_refused_before_they_are_computed(sets, monkeypatch):
  monkeypatch.setattr(protocols.mesh_lib, 'memory', lambda mesh: 2e6)
  monkeypatch.setattr(embedding.Engine, 'run', None)
  with pytest.raises(errors.UserError, match='conv1 of 128 images takes 0.0 GiB, must be at most '
                                             'a quarter .*set --protocol=linear_online'):
    protocols.prepare(sets.model, sets.model.workdir / 'nowhere', ['linear'])
