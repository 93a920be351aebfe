import colorsys
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance
import pytest

from instdisc_jax import augment

CIFAR = dict(size=(32, 32), crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), brightness=0.4,
             contrast=0.4, saturation=0.4, hue=0.4, grayscale=0.2,
             grayscale_first=False, flip=0.5, mean=(0.49, 0.48, 0.45),
             std=(0.2, 0.2, 0.2))
OFF = CIFAR | dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), brightness=0, contrast=0,
                   saturation=0, hue=0, grayscale=0, flip=0, mean=(0, 0, 0), std=(1, 1, 1))


def _pictures(count=4, height=32, width=32):
  """Smooth coloured pictures with all values from dark to bright, as uint8."""
  random = np.random.default_rng(0)
  coarse = random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
  return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC))
                   for c in coarse])


def _augment(keys, pictures, **kwargs):
  return jax.jit(functools.partial(augment.augment, **kwargs))(keys, pictures)


def _keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize('box', [(0, 0, 32, 32), (3, 5, 14, 20), (10, 0, 22, 9), (31, 31, 1, 1)])
@pytest.mark.parametrize('size', [(32, 32), (12, 20)])  # enlarging, and shrinking with antialiasing
def test_crop_and_resize_equals_pil(box, size):
  pictures = _pictures()
  top, left, height, width = box
  ours = augment.crop_and_resize(pictures, jnp.array([box] * 4), size) * 255
  pils = [Image.fromarray(p).crop((left, top, left + width, top + height)).resize(
      size[::-1], Image.Resampling.BILINEAR) for p in pictures]
  np.testing.assert_allclose(ours, np.stack(pils), atol=1.01)  # PIL rounds to bytes, twice


def test_crops_have_the_published_areas_shapes_and_places():
  draws = np.random.default_rng(0).random((20_000, augment.DRAWS))
  top, left, h, w = np.asarray(augment.draw_crop(
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
  draws = jnp.full((1, augment.DRAWS), 0.999).at[:, 20:].set(0)
  box = augment.draw_crop(draws, 20, 60, crop_scale=(1.0, 1.0), crop_ratio=(3 / 4, 4 / 3))
  np.testing.assert_array_equal(box[0], [0, 16, 20, 27])  # torchvision: 27 = round(20 · 4/3)


ENHANCE = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]


def _pil_hue(picture, turns):
  h, s, v = Image.fromarray(picture).convert('HSV').split()
  h = Image.fromarray((np.asarray(h).astype(int) + round(turns * 255)).astype(np.uint8))
  return np.asarray(Image.merge('HSV', (h, s, v)).convert('RGB'))


def _pil_jitter(picture, amounts, order):
  for operation in order:
    if operation == 3:
      picture = _pil_hue(picture, amounts[3])
    else:
      enhanced = ENHANCE[operation](Image.fromarray(picture)).enhance(amounts[operation])
      picture = np.asarray(enhanced)
  return picture


@pytest.mark.parametrize('operation', [0, 1, 2])
@pytest.mark.parametrize('factor', [0.0, 0.6, 1.0, 1.4])
def test_brightness_contrast_and_saturation_equal_pil(operation, factor):
  pictures = _pictures()
  amounts = np.array([1.0, 1.0, 1.0, 0.0])
  amounts[operation] = factor
  ours = augment.color_jitter(jnp.asarray(pictures) / 255, jnp.tile(amounts, (4, 1)),
                              jnp.tile(jnp.arange(4), (4, 1)))
  pils = [_pil_jitter(p, amounts, [operation]) for p in pictures]
  np.testing.assert_allclose(ours * 255, np.stack(pils), atol=1.5)


@pytest.mark.parametrize('turns', [-0.4, -0.1, 0.0, 0.25, 0.4])
def test_hue_equals_colorsys_exactly_and_pil_closely(turns):
  pictures = _pictures()
  pictures[0, :4] = 77  # gray has no hue and must not change
  ours = np.asarray(augment.shift_hue(jnp.asarray(pictures) / 255, jnp.full(4, turns)))
  def shift(rgb):
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    return colorsys.hsv_to_rgb((h + turns) % 1, s, v)
  np.testing.assert_allclose(ours, np.apply_along_axis(shift, 3, pictures / 255), atol=2e-6)
  np.testing.assert_allclose(ours[0, :4] * 255, 77, atol=1e-3)
  pils = np.stack([_pil_hue(p, turns) for p in pictures])
  assert np.abs(ours * 255 - pils).mean() < 2  # PIL keeps hue and saturation in 8 bits
  assert np.abs(ours * 255 - pils).max() < 12


def test_jitter_in_every_order_equals_pil():
  picture = _pictures(1)[0]
  orders = np.array(list(itertools.permutations(range(4))))
  amounts = np.array([1.3, 0.7, 1.35, 0.2])
  ours = augment.color_jitter(jnp.tile(jnp.asarray(picture) / 255, (24, 1, 1, 1)),
                              jnp.tile(amounts, (24, 1)), jnp.asarray(orders))
  pils = np.stack([_pil_jitter(picture, amounts, order) for order in orders])
  assert np.abs(np.asarray(ours) * 255 - pils).mean() < 2
  spread = np.abs(pils[:, None].astype(float) - pils[None]).mean((2, 3, 4))
  assert spread.max() > 5  # the order does matter, so the comparison above tells orders apart


def test_grayscale_equals_pil():
  pictures = _pictures()
  ours = _augment(_keys(4), pictures, **OFF | dict(grayscale=1.0))
  pils = np.stack([np.asarray(Image.fromarray(p).convert('L')) for p in pictures])
  np.testing.assert_allclose(ours * 255, np.repeat(pils[..., None], 3, axis=3), atol=1)


def test_imagenet_drops_colour_before_the_jitter_and_cifar_after_it():
  red = np.zeros((1, 8, 8, 3), np.uint8)
  red[..., 0] = 200
  # Hue turns red into other colours of other lightness: only if colour is still there.
  turned = OFF | dict(grayscale=1.0, hue=0.5)
  gray = {first: np.asarray(_augment(_keys(16), np.repeat(red, 16, 0), **turned | dict(
      grayscale_first=first)))[:, 0, 0, 0] for first in (True, False)}
  np.testing.assert_allclose(gray[True], 0.299 * 200 / 255, atol=1e-3)
  assert np.ptp(gray[False]) > 0.1


def test_views_cropped_by_the_host_get_the_same_colours():
  pictures = _pictures(8)
  whole = CIFAR | dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
  np.testing.assert_allclose(_augment(_keys(8), pictures, **whole | dict(size=None)),
                             _augment(_keys(8), pictures, **whole), atol=1e-5)


def test_flip_mirrors_and_normalise_scales():
  pictures = _pictures()
  flipped = _augment(_keys(4), pictures, **OFF | dict(flip=1.0))
  np.testing.assert_allclose(flipped * 255, pictures[:, :, ::-1], atol=1e-3)
  scaled = _augment(_keys(4), pictures, **OFF | dict(mean=(0.1, 0.2, 0.3), std=(2, 4, 8)))
  np.testing.assert_allclose(scaled, (pictures / 255 - [0.1, 0.2, 0.3]) / [2, 4, 8], atol=1e-6)


def test_everything_off_leaves_the_picture():
  pictures = _pictures(height=20, width=28)
  same = _augment(_keys(4), pictures, **OFF | dict(size=(20, 28), crop_ratio=(0.1, 10.0)))
  np.testing.assert_allclose(same.mean(), pictures.mean() / 255, atol=0.05)
  same = _augment(_keys(4), _pictures(), **OFF)
  np.testing.assert_allclose(same * 255, _pictures(), atol=1e-3)


def test_probabilities_and_strengths_have_the_published_spread():
  count = 4000
  white = np.full((count, 2, 2, 3), 100, np.uint8)
  views = _augment(_keys(count), white, **OFF | dict(size=(2, 2), brightness=0.4))
  factor = np.asarray(views)[:, 0, 0, 0] * 255 / 100
  assert 0.6 <= factor.min() < 0.61 and 1.39 < factor.max() <= 1.4
  np.testing.assert_allclose(factor.mean(), 1, atol=0.02)
  red = np.zeros((count, 2, 2, 3), np.uint8)
  red[:, :, 0, 0] = 255
  views = np.asarray(_augment(
      _keys(count), red, **OFF | dict(size=(2, 2), grayscale=0.2, flip=0.5)))
  np.testing.assert_allclose(np.mean(views[..., 0].max((1, 2)) < 0.5), 0.2, atol=0.03)
  np.testing.assert_allclose(np.mean(views[:, 0, 0, 0] == 0), 0.5, atol=0.04)


def test_a_view_depends_on_its_own_key_alone():
  pictures = _pictures(8)
  views = np.asarray(_augment(_keys(8), pictures, **CIFAR))
  few = np.asarray(_augment(_keys(8)[2:5], pictures[2:5], **CIFAR))
  np.testing.assert_allclose(views[2:5], few, atol=1e-5)
  other = np.asarray(_augment(_keys(8, seed=1), pictures, **CIFAR))
  assert np.abs(views - other).mean((1, 2, 3)).min() > 0.05
