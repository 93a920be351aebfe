import shutil

import jax
import numpy as np
from PIL import Image
import pytest

import instdisc_jax
from instdisc_jax import data, inference
from instdisc_jax.data import views
from instdisc_jax.evaluation import evaluator as evaluator_lib
from instdisc_jax.runtime import checkpoint, errors, preemption
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.training import state as state_lib


@pytest.fixture(scope='module')
def model(trained):
  return instdisc_jax.load(trained[0])


@pytest.fixture(scope='module')
def digits(trained):
  return data.load(trained[2].dataset, 0)


def _evaluated(config, dataset, workdir):
  """Embeddings of the held-out images as the run's own evaluation computes them."""
  mesh = mesh_lib.make(jax.devices()[:1])
  setup = state_lib.Setup.of(config, len(dataset.train), mesh)
  like = state_lib.make_init(setup, views.size(config, dataset.train.shape))()
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', 3, setup.num_rows)
  state = checkpoints.restore(like)
  checkpoints.close()
  return evaluator_lib.Evaluator(setup, dataset, preemption.Watch()).embed(state, dataset.test)


def test_embeddings_are_those_of_the_evaluation_for_any_batch_size(trained, model, digits):
  workdir, _, config = trained
  config = config.copy_and_resolve_references()
  config.dataset.path = 'resident'
  expected = _evaluated(config, digits, workdir)
  images = digits.test.files
  for size in (500, 70, 3):
    np.testing.assert_allclose(model.embed(images[:size]), expected[:size], atol=1e-6)
  np.testing.assert_allclose(model.embed(images[7]), expected[7:8], atol=1e-6)
  np.testing.assert_allclose(model.embed(list(images[:3])), expected[:3], atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)
  assert len(model.embed(images[:0])) == 0


def test_paths_and_arrays_of_any_size_if_the_run_crops_them_to_one(trained_folder):
  folder, workdir, _ = trained_folder
  model = instdisc_jax.load(workdir)
  expected = _evaluated(model.config, model.dataset, workdir)
  paths = [folder / name for name in model.dataset.test.names]
  found = model.embed(paths)
  np.testing.assert_allclose(found, expected, atol=1e-6)
  np.testing.assert_allclose(model.embed(str(paths[2])), expected[2:3], atol=1e-6)
  pngs = [path for path in paths if path.suffix == '.png']
  arrays = [np.asarray(Image.open(path)) for path in pngs]
  np.testing.assert_allclose(model.embed(arrays), model.embed(pngs), atol=1e-6)
  chosen = model.dataset.test.subset(np.array([3, 1, 3]), 'some')
  np.testing.assert_allclose(np.concatenate(list(model.embed_all(chosen))),
                             expected[[3, 1, 3]], atol=1e-6)
  assert model.class_names == ('greenless', 'redless')
  similarity, row = model.neighbors(paths, 5)
  assert similarity.shape == row.shape == (8, 5)
  assert model.classify(paths).shape == (8,) and set(model.classify(paths).tolist()) <= {0, 1}


def test_neighbors_and_classes_equal_brute_force(model, digits):
  from sklearn import neighbors
  queries = model.embed(digits.test.files[:100])
  similarity, row = model.neighbors(digits.test.files[:100], 5)
  brute = neighbors.NearestNeighbors(n_neighbors=5, metric='cosine', algorithm='brute')
  distance, _ = brute.fit(model.bank).kneighbors(queries)
  np.testing.assert_allclose(1 - similarity, distance, atol=1e-5)
  found = np.einsum('qd,qkd->qk', queries, model.bank[row])
  np.testing.assert_allclose(found, similarity, atol=1e-5)
  scores = np.zeros((100, 10))
  for i, (s, r) in enumerate(zip(similarity, row)):
    for x, label in zip(s, digits.train.labels[r]):
      scores[i, label] += np.exp(x / 0.1)
  np.testing.assert_array_equal(model.classify(digits.test.files[:100]), scores.argmax(axis=1))
  np.testing.assert_array_equal(model.labels, digits.train.labels)


@pytest.mark.parametrize('images, message', [
    (np.zeros((2, 8, 8, 3)), r'image 0 is float64 \[8, 8, 3\], must be uint8 \[H, W, 3\]'),
    (np.zeros((2, 8, 8), np.uint8), r'image 0 is uint8 \[2, 8, 8\], must be uint8 \[H, W, 3\]'),
    ([np.zeros((8, 8, 3), np.uint8), 'nowhere.png'], "'nowhere.png' cannot be read"),
    ([3], r'image 0 is a int, must be a uint8 array \[H, W, 3\] or a path'),
    ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)],
     r'image 1 has 9 x 8 pixels, must be 8 x 8 like image 0: use images of one size'),
    (3, r'image 0 is a int, must be a uint8 array'),
    (None, r'image 0 is a NoneType, must be a uint8 array'),
    (np.float32(3), r'image 0 is float32 \[\], must be uint8 \[H, W, 3\]'),
    ('a\0b.png', r"'a\0b.png' cannot be read"),
])
def test_wrong_images_are_named(model, images, message):
  with pytest.raises(errors.UserError, match=message):
    model.embed(images)


def test_wrong_calls_are_named(model, tmp_path):
  with pytest.raises(errors.UserError, match='k is 129, must be from 1 to the 128 rows'):
    model.neighbors(np.zeros((1, 32, 32, 3), np.uint8), 129)
  for k in (2.5, '5', None):
    with pytest.raises(errors.UserError, match=f'k is {k}, must be from 1 to the 128 rows'):
      model.neighbors(np.zeros((1, 32, 32, 3), np.uint8), k)
  with pytest.raises(errors.UserError, match="no file '.*config.json'"):
    instdisc_jax.load(tmp_path)


def test_a_file_of_weights_is_opened_by_one_process(tmp_path, monkeypatch):
  (tmp_path / 'weights.pth').touch()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(errors.UserError, match='weights.pth. can be opened by one process only: con'):
    instdisc_jax.load(tmp_path / 'weights.pth')


def test_images_that_were_added_since_are_left_out_with_a_warning(trained_folder, tmp_path, capsys):
  images, workdir, _ = trained_folder
  shutil.copytree(images, tmp_path / 'images')
  shutil.copytree(workdir, tmp_path / 'run')
  settings, fingerprint = workdir_lib.read(workdir)
  moved = {'dataset.name': f'folder:{tmp_path / "images"}'}
  workdir_lib.write(tmp_path / 'run', settings | moved, fingerprint)
  shutil.copy(images / 'redless' / '04.jpg', tmp_path / 'images' / 'redless' / 'new.jpg')
  dataset = instdisc_jax.load(tmp_path / 'run').dataset
  assert list(dataset.train.names) == list(instdisc_jax.load(workdir).names)
  assert capsys.readouterr().err == (
      f"warning: '{tmp_path / 'images'}' has images that '{tmp_path / 'run'}' was trained without, "
      "which are left out: 1, the first 'redless/new.jpg'\n")
  (tmp_path / 'images' / 'redless' / '04.jpg').unlink()
  with pytest.raises(errors.UserError, match="has changed since .* 1 removed"):
    assert instdisc_jax.load(tmp_path / 'run').dataset is None


def test_of_no_images_there_is_nothing(trained):
  model = instdisc_jax.load(trained[0])
  similarity, row = model.neighbors([], k=3)
  assert similarity.shape == row.shape == (0, 3) and model.classify([]).shape == (0,)


def test_a_stop_is_noticed_while_images_are_encoded(trained_folder):
  def check():
    raise errors.Stopped('stopped by SIGTERM')

  images, workdir, _ = trained_folder
  model = inference.load(workdir, check=check)
  with pytest.raises(errors.Stopped):
    model.embed(sorted(images.rglob('*.png'))[:3])


def test_features_of_a_folder_that_cannot_be_written_are_not_kept(trained, tmp_path, monkeypatch):
  shutil.copytree(trained[0], tmp_path / 'run', ignore=shutil.ignore_patterns('features'))
  monkeypatch.setattr(inference.os, 'access', lambda *_: False)
  model = inference.load(tmp_path / 'run')
  few = model.dataset.train.subset(np.arange(5), 'five')
  assert model.fresh(few).shape == (5, 16) and model.maps is None
  assert not (tmp_path / 'run' / 'features').exists()
