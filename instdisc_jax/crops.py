"""Crops: the choice of the box, and the crop itself.

Boxes are (top, left, height, width) in pixels. The host and the device draw the same random boxes:
NumPy arrays are processed with NumPy, others with JAX.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8
import numpy as np

ATTEMPTS = 10  # as in torchvision; then the largest central crop of an allowed shape
DRAWS = 2 * ATTEMPTS + 2  # random numbers per crop


def central_box(height: int, width: int, side: int) -> tuple[int, int, int, int]:
  """The part of an image that evaluation uses.

  It is the central square of 7/8 of the shorter side (224 of 256 pixels); an image that already has
  the size of the view is used in full.
  """
  if height == width == side:
    return 0, 0, side, side
  edge = max(1, round(min(height, width) * 7 / 8))
  return (height - edge) // 2, (width - edge) // 2, edge, edge


def draw_crop(draws: Float[np.ndarray | Array, 'B draws'], height: int | Int[np.ndarray, ' B'],
              width: int | Int[np.ndarray, ' B'], *,
              crop_scale: tuple[float, float],
              crop_ratio: tuple[float, float]) -> Int[np.ndarray | Array, 'B 4']:
  """Boxes of random area, aspect ratio and position, inside the image.

  Args:
    draws: [B, at least DRAWS] uniform in [0, 1): area and log aspect ratio of each attempt, then
      the vertical and horizontal position.
    height: H, or [B] heights, of the images.
    width: W, or [B].
    crop_scale: (smallest, largest) share of the area that a crop covers.
    crop_ratio: (smallest, largest) width over height of a crop.

  Returns:
    [B, 4] int32 boxes, from the first attempt that fits.
  """
  xp: Any = np if isinstance(draws, np.ndarray) else jnp
  shape = draws[:, :2 * ATTEMPTS].reshape(-1, ATTEMPTS, 2)
  place = draws[:, 2 * ATTEMPTS:2 * ATTEMPTS + 2]
  column = lambda x: np.reshape(x, (-1, 1))
  area = xp.asarray(column(height * width), draws.dtype) * (
      crop_scale[0] + shape[..., 0] * (crop_scale[1] - crop_scale[0]))
  log_low, log_high = math.log(crop_ratio[0]), math.log(crop_ratio[1])
  ratio = xp.exp(log_low + shape[..., 1] * (log_high - log_low))
  w = xp.round(xp.sqrt(area * ratio)).astype(xp.int32)
  h = xp.round(xp.sqrt(area / ratio)).astype(xp.int32)
  fits = (w > 0) & (w <= column(width)) & (h > 0) & (h <= column(height))
  first = xp.argmax(fits, axis=1)[:, None]
  pick = lambda x: xp.take_along_axis(x, first, axis=1)[:, 0]
  fallback_w = np.minimum(width, np.round(np.multiply(height, crop_ratio[1])).astype(np.int32))
  fallback_h = np.minimum(height, np.round(np.divide(width, crop_ratio[0])).astype(np.int32))
  any_fits = fits.any(axis=1)
  w = xp.where(any_fits, pick(w), fallback_w)
  h = xp.where(any_fits, pick(h), fallback_h)
  room = xp.stack([height - h, width - w], axis=1)
  corner = xp.floor(place * (room + 1)).astype(xp.int32)
  central = xp.round(room / 2).astype(xp.int32)
  corner = xp.where(any_fits[:, None], xp.minimum(corner, room), central)
  return xp.concatenate([corner, h[:, None], w[:, None]], axis=1)


def crop_and_resize(images: UInt8[Array, 'B H W 3'], box: Int[Array, 'B 4'],
                    size: tuple[int, int], dtype: Any = jnp.float32) -> Float[Array, 'B h w 3']:
  """Crops boxes and resizes them, bilinear with antialiasing, as PIL does.

  Args:
    images: [B, H, W, 3] uint8.
    box: [B, 4] int32.
    size: (height, width) of the result.
    dtype: dtype of the result.

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
  """[size, full] triangle-filter weights over `length` pixels from `start`; rows sum to 1."""
  scale = length.astype(dtype) / size
  center = start + (jnp.arange(size, dtype=dtype) + 0.5) * scale
  pixel = jnp.arange(full, dtype=dtype)
  distance = jnp.abs(pixel + 0.5 - center[:, None]) / jnp.maximum(scale, 1)
  inside = (pixel >= start) & (pixel < start + length)
  weight = jnp.where(inside, jnp.maximum(1 - distance, 0), 0)
  return weight / weight.sum(axis=1, keepdims=True)
