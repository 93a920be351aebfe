import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import crops, threefry
from tests.conftest import smooth_images


@pytest.mark.parametrize('box', [(0, 0, 32, 32), (3, 5, 14, 20), (10, 0, 22, 9), (31, 31, 1, 1)])
@pytest.mark.parametrize('size', [(32, 32), (12, 20)])  # enlarging, and shrinking with antialiasing
def test_crop_and_resize_equals_pil(box, size):
  images = smooth_images()
  top, left, height, width = box
  ours = crops.crop_and_resize(images, jnp.array([box] * 4), size) * 255
  pils = [Image.fromarray(p).crop((left, top, left + width, top + height)).resize(
      size[::-1], Image.Resampling.BILINEAR) for p in images]
  np.testing.assert_allclose(ours, np.stack(pils), atol=1.01)  # PIL rounds to bytes, twice


def test_crops_have_the_published_areas_shapes_and_places():
  draws = np.random.default_rng(0).random((20_000, crops.DRAWS))
  top, left, h, w = np.asarray(crops.draw_crop(
      jnp.asarray(draws), 32, 32, crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))).T
  assert min(top.min(), left.min()) == 0
  assert (top + h).max() == 32 and (left + w).max() == 32
  share, ratio = h * w / 32**2, w / h
  assert 0.17 < share.min() < 0.23 and share.max() == 1
  assert 0.70 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.42  # to whole pixels
  small = share < 0.5  # where every shape fits: area uniform, log ratio uniform
  np.testing.assert_allclose(np.mean(share[small] < 0.35), 0.5, atol=0.03)
  np.testing.assert_allclose(np.mean(ratio[small] < 1), 0.5, atol=0.05)
  room = small & (h < 20)
  np.testing.assert_allclose(np.mean(top[room] / (32 - h[room])), 0.5, atol=0.02)


def test_a_crop_that_never_fits_is_the_largest_central_one():
  draws = jnp.full((1, crops.DRAWS), 0.999).at[:, 20:].set(0)
  box = crops.draw_crop(draws, 20, 60, crop_scale=(1.0, 1.0), crop_ratio=(3 / 4, 4 / 3))
  np.testing.assert_array_equal(box[0], [0, 16, 20, 27])  # torchvision: 27 = round(20 · 4/3)


def test_images_of_several_sizes_have_the_boxes_that_each_has_alone():
  random = np.random.default_rng(0)
  drawn = random.random((500, crops.DRAWS), np.float32)
  sizes = random.integers(1, 600, (500, 2)).astype(np.int32)
  crop = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))
  alone = [crops.draw_crop(draws[None], int(h), int(w), **crop)[0]
           for draws, (h, w) in zip(drawn, sizes)]
  together = crops.draw_crop(drawn, *sizes.T, **crop)
  assert together.dtype == np.int32
  np.testing.assert_array_equal(together, alone)


def test_the_host_draws_the_crops_of_the_device():
  drawn = threefry.uniform(0, (1, np.arange(2000), np.arange(2000)), crops.DRAWS)
  crop = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))
  host = crops.draw_crop(drawn, 375, 500, **crop)
  device = np.asarray(crops.draw_crop(jnp.asarray(drawn), 375, 500, **crop))
  assert isinstance(host, np.ndarray) and np.abs(host - device).max() <= 1
  assert np.mean((host == device).all(axis=1)) > 0.99  # except for rounding at a half
