import functools

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import crops, threefry
from instdisc_jax.data import Images, arrays, views
from tests.conftest import smooth_images

PLACE = np.array([0, 5, 2**32 - 1, 77], np.uint32)
INDEX = np.array([3, 0, 2, 1], np.int32)


def _config(**augment):
  config = config_lib.default()
  config.seed = 7
  config.augment.update(size=32, flip=0.5, **augment)
  return config


@functools.partial(jax.jit, static_argnames=('config', 'cropped'))
def _draw(config, key, images, cropped):
  return views.draw(config, key, images, cropped=cropped)


def _drawn_by(config, images, view=0):
  """(views drawn on the device alone, views cropped on the host and colored on the device)."""
  config = config_dict.FrozenConfigDict(config)
  key = views.key(config.seed, jnp.asarray(PLACE), jnp.asarray(INDEX), view)
  host = views.Crop.of(config, images.shape)(images, PLACE, INDEX)
  host = host[:, view] if config.loss.views == 2 else host
  return (np.asarray(_draw(config, key, images.files[INDEX], False)),
          np.asarray(_draw(config, key, host, True)))


@pytest.mark.parametrize('count', [crops.DRAWS, crops.DRAWS + 10])
@pytest.mark.parametrize('seed', [0, 7, 2**32 - 1])
def test_the_host_draws_from_the_keys_of_the_device(seed, count):
  keys = views.key(seed, jnp.asarray(PLACE), jnp.asarray(INDEX))
  host = threefry.uniform(seed, (threefry.AUGMENT, PLACE, INDEX), count)
  np.testing.assert_array_equal(
      host, np.stack([jax.random.uniform(key, (count,)) for key in keys]))


def test_the_host_s_crop_with_colors_is_the_device_s_view_where_nothing_is_cropped():
  images = arrays.in_memory(smooth_images(), None)
  device, host = _drawn_by(_config(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0)), images)
  np.testing.assert_allclose(host, device, atol=1e-5)  # the device's crop is a matrix product
  plain = views.central(_config(), images.files[INDEX], (32, 32))
  assert np.abs(device - plain).max() > 0.1  # the colors were drawn


def test_the_host_s_crop_with_colors_is_the_device_s_view():
  images = arrays.in_memory(smooth_images(height=64, width=48), None)
  config = _config(std=(1.0, 1.0, 1.0))
  device, host = _drawn_by(config, images)
  error = np.abs(device - host)
  assert error.mean() < 0.01 and error.max() < 0.15  # bytes, and three taps, on the host
  config.seed += 1
  assert np.abs(device - _drawn_by(config, images)[0]).mean() > 0.1


def test_both_views_that_the_host_crops_are_the_device_s_and_the_first_is_the_only_one_s():
  images = arrays.in_memory(smooth_images(height=64, width=48), None)
  config = _config(std=(1.0, 1.0, 1.0))
  alone = _drawn_by(config, images)
  config.loss.views = 2
  first, second = (_drawn_by(config, images, view) for view in (0, 1))
  for found, expected in zip(first, alone):
    np.testing.assert_array_equal(found, expected)
  error = np.abs(second[0] - second[1])
  assert error.mean() < 0.01 and error.max() < 0.15
  assert np.abs(second[0] - first[0]).mean() > 0.1


def test_a_view_depends_on_the_place_in_the_chain_and_on_the_image():
  images = arrays.in_memory(smooth_images(), None)
  crop = views.Crop.of(_config(), images.shape)
  first = crop(images, PLACE, INDEX)
  np.testing.assert_array_equal(crop(images, PLACE[::-1], INDEX[::-1]), first[::-1])
  assert not np.array_equal(crop(images, PLACE + np.uint32(1), INDEX), first)


def test_evaluation_takes_the_central_square():
  assert crops.central_box(256, 400, 224) == (16, 88, 224, 224)
  assert crops.central_box(32, 32, 32) == (0, 0, 32, 32)
  assert crops.central_box(1, 3, 224) == (0, 1, 1, 1)


def test_the_device_s_central_view_is_pil_s():
  images = smooth_images(height=40, width=60)
  config = _config(mean=(0.0,) * 3, std=(1.0,) * 3)
  found = views.central(config, images, (32, 32)) * 255
  top, left, edge, _ = crops.central_box(40, 60, 32)
  expected = [Image.fromarray(image).crop((left, top, left + edge, top + edge)).resize(
      (32, 32), Image.Resampling.BILINEAR) for image in images]
  np.testing.assert_allclose(found, np.stack(expected), atol=1.01)


def test_images_are_read_as_they_are_in_memory_and_as_central_views_from_files():
  array = smooth_images(height=40, width=60)
  rows = np.array([2, 0])
  np.testing.assert_array_equal(views.read(arrays.in_memory(array, None), rows, 32), array[rows])
  files = Images(list(array), None, '')
  np.testing.assert_array_equal(views.read(files, rows, None), array[rows])
  np.testing.assert_array_equal(views.read(files, rows, 32),
                                np.stack([files.central(i, 32) for i in rows]))


def test_the_size_of_a_view_is_the_setting_or_that_of_the_images():
  config = config_lib.default()
  assert views.size(config, (20, 30, 3)) == (20, 30)
  assert views.size(config, None) == (224, 224)
  config.augment.size = 48
  assert views.size(config, (20, 30, 3)) == (48, 48)
