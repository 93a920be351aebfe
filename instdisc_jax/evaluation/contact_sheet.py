"""A contact sheet of training views: some images, with random views of each."""

import copy

import jax
import jax.numpy as jnp
from jaxtyping import UInt8
from ml_collections import config_dict
import numpy as np

from instdisc_jax.data import Images, views

_IMAGES = _VIEWS = 8
_GAP = 4  # pixels between views; twice that after the first column


def draw(images: Images, config: config_dict.ConfigDict) -> UInt8[np.ndarray, 'H W 3']:
  """Draws the contact sheet.

  Args:
    images: images in files, of any size.
    config: the configuration whose `augment` settings and seed are used.

  Returns:
    [H, W, 3]: a row for each of up to 8 images, evenly spread: the image as evaluation sees it,
    then 8 views.

  Raises:
    UnreadableImage: see `Images`.
  """
  chosen = np.unique(np.linspace(0, len(images) - 1, _IMAGES).astype(int))
  side = views.size(config, None)[0]
  drawn = _draw_views(images, chosen, config)
  step = side + _GAP
  sheet = np.full((len(chosen) * step - _GAP, (_VIEWS + 1) * step + _GAP, 3), 255, np.uint8)
  for row, i in enumerate(chosen):
    top = row * step
    sheet[top:top + side, :side] = images.central(i, side)
    for col in range(_VIEWS):
      left = (col + 1) * step + _GAP
      sheet[top:top + side, left:left + side] = drawn[row, col]
  return sheet


def _draw_views(images, chosen, config) -> UInt8[np.ndarray, 'n views side side 3']:
  """Views of each image as training draws them at the first 8 places of the chain of images."""
  index, place = np.repeat(chosen, _VIEWS), np.tile(np.arange(_VIEWS), len(chosen))
  cropped = views.Crop.of(config, None)(images, place, index)
  shown = copy.deepcopy(config)  # colors as they are, not normalized
  shown.augment.update(mean=(0.0,) * 3, std=(1.0,) * 3)
  key = views.key(config.seed, jnp.asarray(place, jnp.uint32), jnp.asarray(index, jnp.int32))
  drawn = jax.jit(lambda key, x: views.draw(shown, key, x, cropped=True))(key, cropped)
  drawn = np.round(np.asarray(drawn) * 255).astype(np.uint8)
  return drawn.reshape(len(chosen), _VIEWS, *drawn.shape[1:])
