import numpy as np
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.runtime import errors

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)


def _load(file):
  config = config_lib.default().dataset
  config.name = f'arrays:{file}'
  return data.load(config, seed=0)


def _save_and_load(folder, **arrays):
  np.savez(folder / 'a.npz', **arrays)
  return _load(folder / 'a.npz')


def test_images_alone(tmp_path):
  dataset = _save_and_load(tmp_path, images=IMAGES)
  np.testing.assert_array_equal(dataset.train.files, IMAGES)
  assert dataset.train.labels is None and dataset.test is None


def test_labels_and_test_images(tmp_path):
  dataset = _save_and_load(tmp_path, images=IMAGES, labels=np.arange(6), test_images=IMAGES[:2],
                           test_labels=np.array([1, 0]))
  np.testing.assert_array_equal(dataset.train.labels, np.arange(6))
  np.testing.assert_array_equal(dataset.test.labels, [1, 0])


def test_the_fingerprint_depends_on_the_images(tmp_path):
  other = IMAGES.copy()
  other[0, 0, 0, 0] ^= 1
  assert (_save_and_load(tmp_path, images=IMAGES).train.fingerprint
          != _save_and_load(tmp_path, images=other).train.fingerprint)


@pytest.mark.parametrize('arrays, message', [
    (dict(pictures=IMAGES), r"has no array 'images' .*, only \['pictures'\]"),
    (dict(images=IMAGES / 255), r"'images' in .* is float64 \[6, 8, 10, 3\], must be uint8"),
    (dict(images=IMAGES[..., :1]), r'must be uint8 \[N, H, W, 3\]'),
    (dict(images=IMAGES[:0]), r'must be uint8 \[N, H, W, 3\]'),
    (dict(images=IMAGES, labels=np.arange(5)), "'labels' .* one integer per image"),
    (dict(images=IMAGES, labels=np.arange(6) - 1),
     "'labels' .* holds -1, must be class numbers, 0 or above"),
    (dict(images=IMAGES, labels=np.ones(6)), "'labels' .* one integer per image"),
    (dict(images=IMAGES, test_images=IMAGES[:, :5]),
     r"'test_images' .* \[6, 5, 10, 3\], must be of the size of 'images', \[8, 10, 3\]"),
    (dict(images=IMAGES, test_labels=np.arange(6)), "'test_labels' .* one integer per image"),
    (dict(images=np.array([{}], dtype=object)), 'is not a readable .npz of plain arrays'),
])
def test_wrong_contents_are_named(tmp_path, arrays, message):
  with pytest.raises(errors.UserError, match=message):
    _save_and_load(tmp_path, **arrays)


def test_a_missing_file_and_one_that_is_not_an_npz(tmp_path):
  (tmp_path / 'text.npz').write_text('not a zip')
  for name, message in (('none.npz', 'no file'), ('text.npz', 'is not a readable .npz')):
    with pytest.raises(errors.UserError, match=message):
      _load(tmp_path / name)
