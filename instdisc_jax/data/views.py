"""The views of an image: the single definition of crops and colors.

    training      image i at place p in the chain of images gets a random view, drawn with the key
                  (seed, p, i), and a second one with (seed, p, i, 1) if `loss.views` is 2; the host
                  may crop them, the device does the rest
    evaluation    the central view

The training step, the host's readers, `preview`, fine-tuning and evaluation all use this module.
"""

from concurrent import futures
import dataclasses
import functools
import os
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt, UInt8
import numpy as np

from instdisc_jax import augment, crops, threefry
from instdisc_jax import config as config_lib
from instdisc_jax.data import images as images_lib

DEFAULT_SIDE = 224  # if the images have several sizes and augment.size is not set


def size(config: config_lib.Config, image_shape: tuple[int, ...] | None) -> tuple[int, int]:
  """(height, width) of the views: `augment.size`, else that of the images, else 224."""
  if config.augment.size is not None:
    return config.augment.size, config.augment.size
  if image_shape is None:
    return DEFAULT_SIDE, DEFAULT_SIDE
  return image_shape[0], image_shape[1]


def key(seed: int, place: UInt[Array, ' B'], index: Int[Array, ' B'],
        view: int = 0) -> Key[Array, ' B']:
  """The key of each image's view, 0 or 1: image `index` at `place` in the chain of images."""
  fold = jax.vmap(jax.random.fold_in, (None, 0))(threefry.key(seed, threefry.AUGMENT), place)
  keys = jax.vmap(jax.random.fold_in)(fold, index)
  return jax.vmap(jax.random.fold_in, (0, None))(keys, view) if view else keys


def draw(config: config_lib.Config, key: Key[Array, ' B'], images: UInt8[Array, 'B H W 3'], *,
         cropped: bool = False, dtype: Any = jnp.float32) -> Float[Array, 'B h w 3']:
  """A random view of each image, on the device.

  Args:
    config: the run's configuration.
    key: [B], see `key`.
    images: [B, H, W, 3] uint8.
    cropped: whether the host has already cropped them, see `Crop`.
    dtype: dtype of the result.

  Returns:
    [B, *size, 3].
  """
  return augment.augment(key, images, augment.Augmentation.of(config.augment),
                         size=None if cropped else size(config, images.shape[1:]), dtype=dtype)


def places(step: Int[Array, ''], batch_size: int, count: int, axis_name: str) -> UInt[Array, ' b']:
  """Places in the chain of images of a device's `count` images of a batch; they wrap at 2^32."""
  first = lax.axis_index(axis_name).astype(jnp.uint32) * count
  slot = first + jnp.arange(count, dtype=jnp.uint32)
  return step.astype(jnp.uint32) * jnp.uint32(batch_size) + slot


@dataclasses.dataclass(frozen=True)
class Crop:
  """The part of a random view that the host can compute: the same crop as in `draw`.

  Attributes:
    seed: the run's seed.
    side: side of the views in pixels.
    scale: see `crops.draw_crop`.
    ratio: likewise.
    views: of each image, 1 or 2.
  """
  seed: int
  side: int
  scale: tuple[float, float]
  ratio: tuple[float, float]
  views: int = 1

  @classmethod
  def of(cls, config: config_lib.Config, image_shape: tuple[int, ...] | None) -> 'Crop':
    """The crops of a run whose views are square."""
    return cls(config.seed, size(config, image_shape)[0], tuple(config.augment.crop_scale),
               tuple(config.augment.crop_ratio), config.loss.views)

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the crops of an image."""
    return (self.views, self.side, self.side, 3)[self.views == 1:]

  def __call__(self, images: images_lib.Images, place: Int[np.ndarray, ' b'],
               index: Int[np.ndarray, ' b']) -> UInt8[np.ndarray, 'b ... 3']:
    """The crops of the images `index` at the places `place`; raises `errors.UserError`.

    Returns:
      [b, side, side, 3], or [b, 2, side, side, 3] if there are two views.
    """
    first, *second = (self._view(images, place, index, view) for view in range(self.views))
    return np.stack([first, *second], axis=1) if second else first

  def _view(self, images, place, index, view):
    folded = (threefry.AUGMENT, place, index, view)[:4 if view else 3]
    drawn = threefry.uniform(self.seed, folded, crops.DRAWS)
    boxes = functools.partial(crops.draw_crop, drawn, crop_scale=self.scale, crop_ratio=self.ratio)
    return np.stack(list(images.views(index, boxes, self.side)))


def central(config: config_lib.Config, images: UInt8[Array, 'B H W 3'],
            size: tuple[int, int] | None) -> Float[Array, 'B h w 3']:
  """The view of each image that the encoder sees in evaluation, on the device.

  Args:
    config: the run's configuration.
    images: [B, H, W, 3] uint8, cropped already or not.
    size: (height, width) of the views; None for the images' own.

  Returns:
    [B, *size, 3] float32.
  """
  if size is None or images.shape[1:3] == tuple(size):
    x = images.astype(jnp.float32) / 255
  else:
    box = crops.central_box(images.shape[1], images.shape[2], size[0])
    x = crops.crop_and_resize(images, jnp.tile(jnp.array(box), (len(images), 1)), size)
  return augment.standardize(x, config.augment.mean, config.augment.std)


def read(images: images_lib.Images, rows: Int[np.ndarray, ' n'],
         side: int | None) -> UInt8[np.ndarray, 'n H W 3']:
  """Some images as one array: in full if they are in memory, central views if they are in files.

  Args:
    images: `Images`.
    rows: [n] indices of the images to read.
    side: side of the central views; None for full images from files, all of one size.

  Raises:
    errors.UserError: an image cannot be read.
  """
  if isinstance(images.files, np.ndarray):
    return images.files[rows]
  one = images.full if side is None else lambda i: images.central(i, side)
  return np.stack(list(_readers().map(one, rows)))


@functools.cache
def _readers():
  return futures.ThreadPoolExecutor(os.cpu_count())
