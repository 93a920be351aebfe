"""Augmentation on the device, one random view per image.

The published CIFAR order: random resized crop, colour jitter (brightness, contrast, saturation and
hue in random order), grayscale, optional flip, normalise; for ImageNet grayscale comes before the
jitter. The definitions are torchvision's on PIL images, in float arithmetic: values are clipped to
[0, 1] after each colour operation as PIL clips its bytes, but not rounded to bytes in between.

Each view takes `DRAWS` random numbers, the crop's first. Where the host crops (`data/stream.py`) it
draws the same numbers and the device skips the crop.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_CROP_ATTEMPTS = 10  # torchvision's; then the largest central crop of an allowed shape
DRAWS = 2 * _CROP_ATTEMPTS + 12  # uniform numbers for a view, float32
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, PIL's convert('L')


def augment(key, images, *, size, crop_scale, crop_ratio, brightness, contrast, saturation, hue,
            grayscale, grayscale_first, flip, mean, std, dtype=jnp.float32):
  """Draws one view of each image.

  Args:
    key: [B] `jax.random` keys, one per image.
    images: [B, H, W, 3] uint8.
    size: (height, width) of the views, or None if `images` are cropped already.
    crop_scale: (least, most) share of the area that a crop covers.
    crop_ratio: (least, most) width over height of a crop.
    brightness: b; the factor is uniform in [max(0, 1 - b), 1 + b]. Likewise the next two.
    contrast: c.
    saturation: s.
    hue: h in [0, 0.5]; the shift is uniform in [-h, h] turns of the colour circle.
    grayscale: probability of dropping colour.
    grayscale_first: before the jitter, not after it.
    flip: probability of mirroring left to right.
    mean: per channel, of images in [0, 1].
    std: likewise.
    dtype: of the arithmetic and the result; the random draws are the same for all.

  Returns:
    [B, *size, 3].
  """
  draw = lambda k: jax.random.uniform(k, (DRAWS,), jnp.float32)
  draws = jax.vmap(draw)(key).astype(dtype)
  if size is None:
    x = images.astype(dtype) / 255
  else:
    box = draw_crop(draws, *images.shape[1:3], crop_scale=crop_scale, crop_ratio=crop_ratio)
    x = crop_and_resize(images, box, size, dtype)
  draws = draws[:, 2 * _CROP_ATTEMPTS:]
  spread = jnp.array([brightness, contrast, saturation, hue], dtype)
  centre = jnp.array([1, 1, 1, 0], dtype)
  low = jnp.maximum(centre - spread, jnp.array([0, 0, 0, -0.5], dtype))
  amounts = low + draws[:, 2:6] * (centre + spread - low)
  drop_colour = lambda x: jnp.where(draws[:, 10, None, None, None] < grayscale, _gray(x), x)
  if grayscale_first:
    x = drop_colour(x)
  x = color_jitter(x, amounts, order=jnp.argsort(draws[:, 6:10], axis=1))
  if not grayscale_first:
    x = drop_colour(x)
  x = jnp.where(draws[:, 11, None, None, None] < flip, x[:, :, ::-1], x)
  return normalize(x, mean, std)


def normalize(x, mean, std):
  """Images in [0, 1] -> zero mean and unit variance per channel, as given."""
  return (x - jnp.array(mean, x.dtype)) / jnp.array(std, x.dtype)


def draw_crop(draws, height, width, *, crop_scale, crop_ratio):
  """Boxes of random area, aspect and place, inside the image.

  Args:
    draws: [B, DRAWS] uniform in [0, 1): area and log aspect of each attempt, then the vertical and
      horizontal place. With a `np.ndarray` the work is NumPy's.
    height: H.
    width: W.
    crop_scale: see `augment`.
    crop_ratio: see `augment`.

  Returns:
    [B, 4] int32: top, left, height, width of the first attempt that fits, in pixels.
  """
  xp = np if isinstance(draws, np.ndarray) else jnp
  shape = draws[:, :2 * _CROP_ATTEMPTS].reshape(-1, _CROP_ATTEMPTS, 2)
  place = draws[:, 2 * _CROP_ATTEMPTS:2 * _CROP_ATTEMPTS + 2]
  area = height * width * (crop_scale[0] + shape[..., 0] * (crop_scale[1] - crop_scale[0]))
  log_low, log_high = math.log(crop_ratio[0]), math.log(crop_ratio[1])
  ratio = xp.exp(log_low + shape[..., 1] * (log_high - log_low))
  w = xp.round(xp.sqrt(area * ratio)).astype(xp.int32)
  h = xp.round(xp.sqrt(area / ratio)).astype(xp.int32)
  fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
  first = xp.argmax(fits, axis=1)[:, None]
  pick = lambda x: xp.take_along_axis(x, first, axis=1)[:, 0]
  fallback_w = min(width, round(height * crop_ratio[1]))
  fallback_h = min(height, round(width / crop_ratio[0]))
  any_fits = fits.any(axis=1)
  w = xp.where(any_fits, pick(w), fallback_w)
  h = xp.where(any_fits, pick(h), fallback_h)
  room = xp.stack([height - h, width - w], axis=1)
  corner = xp.floor(place * (room + 1)).astype(xp.int32)
  central = xp.round(room / 2).astype(xp.int32)
  corner = xp.where(any_fits[:, None], xp.minimum(corner, room), central)
  return xp.concatenate([corner, h[:, None], w[:, None]], axis=1)


def crop_and_resize(images, box, size, dtype=jnp.float32):
  """Cuts boxes out and resizes them, bilinear with antialiasing, as PIL does.

  Args:
    images: [B, H, W, 3] uint8.
    box: [B, 4] int32 top, left, height, width.
    size: (height, width) of the result.
    dtype: of the result.

  Returns:
    [B, *size, 3] in [0, 1].
  """
  weights = jax.vmap(_resize_weights, (0, 0, None, None, None))
  rows = weights(box[:, 0], box[:, 2], images.shape[1], size[0], dtype)
  cols = weights(box[:, 1], box[:, 3], images.shape[2], size[1], dtype)
  x = images.astype(dtype) / 255
  x = jnp.einsum('boh,bhwc->bowc', rows, x, precision='highest')
  return jnp.einsum('bpw,bowc->bopc', cols, x, precision='highest')


def _resize_weights(start, length, full, size, dtype):
  """[size, full] triangle-filter weights that read `length` pixels from `start`; rows sum to 1."""
  scale = length.astype(dtype) / size
  centre = start + (jnp.arange(size, dtype=dtype) + 0.5) * scale
  pixel = jnp.arange(full, dtype=dtype)
  distance = jnp.abs(pixel + 0.5 - centre[:, None]) / jnp.maximum(scale, 1)
  inside = (pixel >= start) & (pixel < start + length)
  weight = jnp.where(inside, jnp.maximum(1 - distance, 0), 0)
  return weight / weight.sum(axis=1, keepdims=True)


def color_jitter(x, amounts, order):
  """Brightness, contrast, saturation and hue, each once, in each image's own order.

  Args:
    x: [B, H, W, 3] in [0, 1].
    amounts: [B, 4]: factors of brightness, contrast, saturation; shift of hue in turns.
    order: [B, 4] a permutation of 0..3 per image: the operation done first, second, ...

  Returns:
    [B, H, W, 3] in [0, 1].
  """
  # Hue is the costly one, so it is done once, between the operations before it and those after.
  hue_place = jnp.argmax(order == 3, axis=1)
  for place in (0, 1, 2):
    x = _blend(x, order[:, place], amounts, active=place < hue_place)
  x = shift_hue(x, amounts[:, 3])
  for place in (1, 2, 3):
    x = _blend(x, order[:, place], amounts, active=place > hue_place)
  return x


def _blend(x, operation, amounts, active):
  """One of brightness (0), contrast (1), saturation (2): a blend with black, mean gray or gray."""
  factor = jnp.take_along_axis(amounts, operation[:, None], axis=1)[:, 0]
  factor = jnp.where(active, factor, 1)[:, None, None, None]
  gray = _gray(x)
  mean_gray = jnp.round(gray.mean((1, 2, 3), keepdims=True) * 255) / 255  # PIL's mean is an integer
  operation = operation[:, None, None, None]
  other = jnp.where(operation == 0, 0, jnp.where(operation == 1, mean_gray, gray))
  return jnp.clip(other + factor * (x - other), 0, 1)


def _gray(x):
  """[B, H, W, 3] -> [B, H, W, 1]."""
  return jnp.sum(x * jnp.array(_LUMA, x.dtype), axis=-1, keepdims=True)


def shift_hue(x, turns):
  """Turns the hue: RGB -> HSV, h + turns modulo 1, HSV -> RGB.

  Args:
    x: [B, H, W, 3] in [0, 1].
    turns: [B] shift in turns of the colour circle.

  Returns:
    [B, H, W, 3].
  """
  r, g, b = x[..., 0], x[..., 1], x[..., 2]
  value = x.max(axis=-1)
  chroma = value - x.min(axis=-1)
  safe = jnp.where(chroma > 0, chroma, 1)
  sextant = jnp.where(value == r, (g - b) / safe,
                      jnp.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
  sextant = sextant + 6 * turns[:, None, None]
  channel = lambda n: value - chroma * jnp.clip(jnp.minimum(k := (n + sextant) % 6, 4 - k), 0, 1)
  return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)
