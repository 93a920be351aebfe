import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance
import pytest

from instdisc_jax import augment
from tests.conftest import smooth_images

CIFAR = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), brightness=0.4, contrast=0.4,
             saturation=0.4, hue=0.4, grayscale=0.2, grayscale_first=False, flip=0.5,
             mean=(0.49, 0.48, 0.45), std=(0.2, 0.2, 0.2))
OFF = CIFAR | dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), brightness=0, contrast=0,
                   saturation=0, hue=0, grayscale=0, flip=0, mean=(0, 0, 0), std=(1, 1, 1))


def _augment(keys, images, settings, size=(32, 32)):
  how = augment.Augmentation(**settings)
  return jax.jit(lambda keys, images: augment.augment(keys, images, how, size=size))(keys, images)


def _keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


ENHANCE = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]


def _pil_hue(image, turns):
  h, s, v = Image.fromarray(image).convert('HSV').split()
  h = Image.fromarray((np.asarray(h).astype(int) + round(turns * 255)).astype(np.uint8))
  return np.asarray(Image.merge('HSV', (h, s, v)).convert('RGB'))


def _pil_jitter(image, amounts, order):
  for operation in order:
    if operation == 3:
      image = _pil_hue(image, amounts[3])
    else:
      enhanced = ENHANCE[operation](Image.fromarray(image)).enhance(amounts[operation])
      image = np.asarray(enhanced)
  return image


@pytest.mark.parametrize('operation', [0, 1, 2])
@pytest.mark.parametrize('factor', [0.0, 0.6, 1.0, 1.4])
def test_brightness_contrast_and_saturation_equal_pil(operation, factor):
  images = smooth_images()
  amounts = np.array([1.0, 1.0, 1.0, 0.0])
  amounts[operation] = factor
  ours = augment.color_jitter(jnp.asarray(images) / 255, jnp.tile(amounts, (4, 1)),
                              jnp.tile(jnp.arange(4), (4, 1)))
  pils = [_pil_jitter(p, amounts, [operation]) for p in images]
  np.testing.assert_allclose(ours * 255, np.stack(pils), atol=1.5)


@pytest.mark.parametrize('turns', [-0.4, -0.1, 0.0, 0.25, 0.4])
def test_hue_equals_colorsys_exactly_and_pil_closely(turns):
  images = smooth_images()
  images[0, :4] = 77  # gray has no hue and must not change
  ours = np.asarray(augment.shift_hue(jnp.asarray(images) / 255, jnp.full(4, turns)))
  def shift(rgb):
    h, s, v = colorsys.rgb_to_hsv(*rgb)
    return colorsys.hsv_to_rgb((h + turns) % 1, s, v)
  np.testing.assert_allclose(ours, np.apply_along_axis(shift, 3, images / 255), atol=2e-6)
  np.testing.assert_allclose(ours[0, :4] * 255, 77, atol=1e-3)
  pils = np.stack([_pil_hue(p, turns) for p in images])
  assert np.abs(ours * 255 - pils).mean() < 2  # PIL keeps hue and saturation in 8 bits
  assert np.abs(ours * 255 - pils).max() < 12


def test_jitter_in_every_order_equals_pil():
  image = smooth_images(1)[0]
  orders = np.array(list(itertools.permutations(range(4))))
  amounts = np.array([1.3, 0.7, 1.35, 0.2])
  ours = augment.color_jitter(jnp.tile(jnp.asarray(image) / 255, (24, 1, 1, 1)),
                              jnp.tile(amounts, (24, 1)), jnp.argsort(orders, axis=1))
  pils = np.stack([_pil_jitter(image, amounts, order) for order in orders])
  assert np.abs(np.asarray(ours) * 255 - pils).mean() < 2
  spread = np.abs(pils[:, None].astype(float) - pils[None]).mean((2, 3, 4))
  assert spread.max() > 5  # the order does matter, so the comparison above tells orders apart


def test_grayscale_equals_pil():
  images = smooth_images()
  ours = _augment(_keys(4), images, OFF | dict(grayscale=1.0))
  pils = np.stack([np.asarray(Image.fromarray(p).convert('L')) for p in images])
  np.testing.assert_allclose(ours * 255, np.repeat(pils[..., None], 3, axis=3), atol=1)


def test_imagenet_drops_color_before_the_jitter_and_cifar_after_it():
  red = np.zeros((1, 8, 8, 3), np.uint8)
  red[..., 0] = 200
  # Hue turns red into other colors of other lightness: only if color is still there.
  turned = OFF | dict(grayscale=1.0, hue=0.5)
  gray = {first: np.asarray(_augment(_keys(16), np.repeat(red, 16, 0), turned | dict(
      grayscale_first=first)))[:, 0, 0, 0] for first in (True, False)}
  np.testing.assert_allclose(gray[True], 0.299 * 200 / 255, atol=1e-3)
  assert np.ptp(gray[False]) > 0.1


def test_views_cropped_by_the_host_get_the_same_colors():
  images = smooth_images(8)
  uncropped = CIFAR | dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
  np.testing.assert_allclose(_augment(_keys(8), images, uncropped, size=None),
                             _augment(_keys(8), images, uncropped), atol=1e-5)


def test_flip_mirrors_and_standardize_scales():
  images = smooth_images()
  flipped = _augment(_keys(4), images, OFF | dict(flip=1.0))
  np.testing.assert_allclose(flipped * 255, images[:, :, ::-1], atol=1e-3)
  scaled = _augment(_keys(4), images, OFF | dict(mean=(0.1, 0.2, 0.3), std=(2, 4, 8)))
  np.testing.assert_allclose(scaled, (images / 255 - [0.1, 0.2, 0.3]) / [2, 4, 8], atol=1e-6)


def test_everything_off_leaves_the_image():
  images = smooth_images(height=20, width=28)
  same = _augment(_keys(4), images, OFF | dict(crop_ratio=(0.1, 10.0)), size=(20, 28))
  np.testing.assert_allclose(same.mean(), images.mean() / 255, atol=0.05)
  same = _augment(_keys(4), smooth_images(), OFF)
  np.testing.assert_allclose(same * 255, smooth_images(), atol=1e-3)


def test_probabilities_and_strengths_have_the_published_spread():
  count = 4000
  white = np.full((count, 2, 2, 3), 100, np.uint8)
  views = _augment(_keys(count), white, OFF | dict(brightness=0.4), size=(2, 2))
  factor = np.asarray(views)[:, 0, 0, 0] * 255 / 100
  assert 0.6 <= factor.min() < 0.61 and 1.39 < factor.max() <= 1.4
  np.testing.assert_allclose(factor.mean(), 1, atol=0.02)
  red = np.zeros((count, 2, 2, 3), np.uint8)
  red[:, :, 0, 0] = 255
  views = np.asarray(_augment(
      _keys(count), red, OFF | dict(grayscale=0.2, flip=0.5), size=(2, 2)))
  np.testing.assert_allclose(np.mean(views[..., 0].max((1, 2)) < 0.5), 0.2, atol=0.03)
  np.testing.assert_allclose(np.mean(views[:, 0, 0, 0] == 0), 0.5, atol=0.04)


def test_a_view_depends_on_its_own_key_alone():
  images = smooth_images(8)
  views = np.asarray(_augment(_keys(8), images, CIFAR))
  few = np.asarray(_augment(_keys(8)[2:5], images[2:5], CIFAR))
  np.testing.assert_allclose(views[2:5], few, atol=1e-5)
  other = np.asarray(_augment(_keys(8, seed=1), images, CIFAR))
  assert np.abs(views - other).mean((1, 2, 3)).min() > 0.05
