"""A contact sheet of training views: some images, with random views of each."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import UInt8
from ml_collections import config_dict
import numpy as np
from PIL import Image, ImageDraw

from instdisc_jax.data import Images, views

_IMAGES = _VIEWS = 8
_GAP = 4  # pixels between views; twice that after the first column
_HEADING = 20  # pixels above them
_LEAST = 96  # pixels of a side to look at; smaller views are shown larger, by a whole factor


def draw(images: Images, config: config_dict.ConfigDict) -> UInt8[np.ndarray, 'H W 3']:
  """Draws the contact sheet.

  Args:
    images: images in files, of any size.
    config: the configuration whose `augment` settings and seed are used.

  Returns:
    [H, W, 3]: headings, then a row for each of up to 8 images, evenly spread: the image as
    evaluation sees it, then 8 views, all in the size of training or a multiple of it.

  Raises:
    UnreadableImage: see `Images`.
  """
  chosen = np.unique(np.linspace(0, len(images) - 1, _IMAGES).astype(int))
  view_side = views.size(config, None)[0]
  factor = -(-_LEAST // view_side)
  side = factor * view_side
  step = side + _GAP
  drawn = _draw_views(images, chosen, config)
  sheet = np.full((_HEADING + len(chosen) * step - _GAP, (_VIEWS + 1) * step + _GAP, 3), 255,
                  np.uint8)
  sheet[:_HEADING] = _headings(sheet.shape[1], {'evaluation': 0, 'training': step + _GAP})
  for row, i in enumerate(chosen):
    top = _HEADING + row * step
    sheet[top:top + side, :side] = _enlarged(images.central(i, view_side), factor)
    for col in range(_VIEWS):
      left = (col + 1) * step + _GAP
      sheet[top:top + side, left:left + side] = _enlarged(drawn[row, col], factor)
  return sheet


def _enlarged(image, factor) -> UInt8[np.ndarray, 'H W 3']:
  return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _headings(width, places) -> UInt8[np.ndarray, 'heading W 3']:
  """{text: its left edge} on white."""
  strip = Image.new('RGB', (width, _HEADING), 'white')
  pen = ImageDraw.Draw(strip)
  for text, left in places.items():
    pen.text((left + 2, 3), text, fill='black')
  return np.asarray(strip)


def _draw_views(images, chosen, config) -> UInt8[np.ndarray, 'n views side side 3']:
  """Views of each image as training draws them at the first 8 places of the chain of images."""
  index, place = np.repeat(chosen, _VIEWS), np.tile(np.arange(_VIEWS), len(chosen))
  cropped = dataclasses.replace(views.Crop.of(config, None), views=1)(images, place, index)
  shown = copy.deepcopy(config)  # colors as they are, not normalized
  shown.augment.update(mean=(0.0,) * 3, std=(1.0,) * 3)
  key = views.key(config.seed, jnp.asarray(place, jnp.uint32), jnp.asarray(index, jnp.int32))
  drawn = jax.jit(lambda key, x: views.draw(shown, key, x, cropped=True))(key, cropped)
  drawn = np.round(np.asarray(drawn) * 255).astype(np.uint8)
  return drawn.reshape(len(chosen), _VIEWS, *drawn.shape[1:])
