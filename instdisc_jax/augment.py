"""Augmentation on the device: one random view of each image.

The published CIFAR order: random resized crop, color jitter (brightness, contrast, saturation and
hue in random order), grayscale, optional flip, normalization; for ImageNet, grayscale comes before
the jitter. The definitions are torchvision's on PIL images, in float arithmetic: values are clipped
to [0, 1] after each color operation, as PIL clips its bytes, but not rounded to bytes in between.

Each view uses `DRAWS` random numbers, those of the crop first. If the host has already cropped the
images (`data/feeds.py`), it has drawn the same numbers, and the device skips the crop.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from instdisc_jax import crops

DRAWS = crops.DRAWS + 10  # uniform float32 numbers per view
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, PIL's convert('L')


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """The distribution of views: the `augment` settings of a run, without the view size.

  Attributes:
    crop_scale: (smallest, largest) share of the area that a crop covers.
    crop_ratio: (smallest, largest) width over height of a crop.
    brightness: b; the factor is uniform in [max(0, 1 - b), 1 + b]. Likewise the next two.
    contrast: c.
    saturation: s.
    hue: h in [0, 0.5]; the shift is uniform in [-h, h] turns of the color circle.
    grayscale: probability of dropping color.
    grayscale_first: whether grayscale comes before the jitter instead of after it.
    flip: probability of mirroring left to right.
    mean: mean per channel, of images in [0, 1].
    std: standard deviation per channel, likewise.
  """
  crop_scale: tuple[float, float]
  crop_ratio: tuple[float, float]
  brightness: float
  contrast: float
  saturation: float
  hue: float
  grayscale: float
  grayscale_first: bool
  flip: float
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  @classmethod
  def of(cls, settings: Mapping[str, Any]) -> 'Augmentation':
    """From the `augment` part of a configuration; its view size is left out."""
    return cls(**{name: value for name, value in settings.items() if name != 'size'})


def augment(key: Key[Array, ' B'], images: UInt8[Array, 'B H W 3'], how: Augmentation, *,
            size: tuple[int, int] | None, dtype: Any = jnp.float32) -> Float[Array, 'B h w 3']:
  """Draws one view of each image.

  Args:
    key: [B] `jax.random` keys, one per image.
    images: [B, H, W, 3] uint8.
    how: the distribution of views.
    size: (height, width) of the views, or None if `images` are cropped already.
    dtype: dtype of the arithmetic and the result; the random draws are the same for every dtype.

  Returns:
    [B, *size, 3].
  """
  draw = lambda k: jax.random.uniform(k, (DRAWS,), jnp.float32)
  draws = jax.vmap(draw)(key).astype(dtype)
  if size is None:
    x = images.astype(dtype) / 255
  else:
    box = jnp.asarray(crops.draw_crop(draws, *images.shape[1:3], crop_scale=how.crop_scale,
                                      crop_ratio=how.crop_ratio))
    x = crops.crop_and_resize(images, box, size, dtype)
  draws = draws[:, 2 * crops.ATTEMPTS:]
  spread = jnp.array([how.brightness, how.contrast, how.saturation, how.hue], dtype)
  center = jnp.array([1, 1, 1, 0], dtype)
  low = jnp.maximum(center - spread, jnp.array([0, 0, 0, -0.5], dtype))
  amounts = low + draws[:, 2:6] * (center + spread - low)
  drop_color = lambda x: jnp.where(draws[:, 10, None, None, None] < how.grayscale, _gray(x), x)
  if how.grayscale_first:
    x = drop_color(x)
  x = color_jitter(x, amounts, rank(draws[:, 6:10]))
  if not how.grayscale_first:
    x = drop_color(x)
  x = jnp.where(draws[:, 11, None, None, None] < how.flip, x[:, :, ::-1], x)
  return standardize(x, how.mean, how.std)


def standardize(x: Float[Array, '... 3'], mean: tuple[float, ...],
                std: tuple[float, ...]) -> Float[Array, '... 3']:
  """Images in [0, 1] -> zero mean and unit variance per channel, for the given mean and std."""
  return (x - jnp.array(mean, x.dtype)) / jnp.array(std, x.dtype)


def rank(draws: Float[Array, 'B n']) -> Int[Array, 'B n']:
  """The place of each number in the ascending order of its row, without a sort."""
  number = jnp.arange(draws.shape[1])
  ours, other = draws[:, :, None], draws[:, None, :]
  return ((other < ours) | ((other == ours) & (number < number[:, None]))).sum(axis=2)


def color_jitter(x: Float[Array, 'B h w 3'], amounts: Float[Array, 'B 4'],
                 place: Int[Array, 'B 4']) -> Float[Array, 'B h w 3']:
  """Brightness, contrast, saturation and hue, each once, in each image's own order.

  Args:
    x: [B, H, W, 3] in [0, 1].
    amounts: [B, 4]: factors of brightness, contrast, saturation; hue shift in turns.
    place: [B, 4] a permutation of 0..3 for each image: when each of them is applied.

  Returns:
    [B, H, W, 3] in [0, 1].
  """
  # Every image goes through all of this, with factors of 1 for what is not its turn. Hue, the most
  # work, is applied once, and a mean over the image, which costs a pass over memory, taken twice.
  x = _blend(x, amounts, place, active=place < place[:, 3:])
  x = shift_hue(x, amounts[:, 3])
  return _blend(x, amounts, place, active=place > place[:, 3:])


def _blend(x, amounts, place, active):
  """The active ones of brightness, contrast and saturation: mixed with black, mean gray, gray."""
  early = active & ((place < place[:, 1:2]) | ~active[:, 1:2])
  x = _blend_pixels(x, amounts, place, early)
  mean_gray = jnp.round(_gray(x).mean((1, 2, 3)) * 255) / 255  # PIL's mean is an integer
  x = _mix(x, mean_gray[:, None, None, None], amounts[:, 1], active[:, 1])
  return _blend_pixels(x, amounts, place, active & ~early)


def _blend_pixels(x, amounts, place, active):
  """Brightness and saturation, those that are active, in their order."""
  saturation_first = place[:, 2] < place[:, 0]
  x = _mix(x, 0, amounts[:, 0], active[:, 0] & ~saturation_first)
  x = _mix(x, _gray(x), amounts[:, 2], active[:, 2])
  return _mix(x, 0, amounts[:, 0], active[:, 0] & saturation_first)


def _mix(x, other, factor, active):
  """factor * x + (1 - factor) * other, clipped to [0, 1], where active [B]; else x itself."""
  factor = jnp.where(active, factor, 1)[:, None, None, None]
  return jnp.clip(factor * x + (1 - factor) * other, 0, 1)


def _gray(x):
  """[B, H, W, 3] -> [B, H, W, 1]."""
  return jnp.sum(x * jnp.array(_LUMA, x.dtype), axis=-1, keepdims=True)


def shift_hue(x: Float[Array, 'B h w 3'], turns: Float[Array, ' B']) -> Float[Array, 'B h w 3']:
  """Rotates the hue: RGB -> HSV, h + turns modulo 1, HSV -> RGB.

  Args:
    x: [B, H, W, 3] in [0, 1].
    turns: [B] shift in turns of the color circle.

  Returns:
    [B, H, W, 3].
  """
  r, g, b = x[..., 0], x[..., 1], x[..., 2]
  value = x.max(axis=-1)
  chroma = value - x.min(axis=-1)
  safe = jnp.where(chroma > 0, chroma, 1)
  # Which channel is largest is no question of equality: compilers compute a value more than once,
  # rounded differently. At a tie the cases agree.
  sextant = jnp.where((r >= g) & (r >= b), (g - b) / safe,
                      jnp.where(g >= b, 2 + (b - r) / safe, 4 + (r - g) / safe))
  sextant = sextant + 6 * turns[:, None, None]
  channel = lambda n: value - chroma * jnp.clip(jnp.minimum(k := (n + sextant) % 6, 4 - k), 0, 1)
  return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)
