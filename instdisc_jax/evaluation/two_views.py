"""Embeddings of two random views of each image, which tell how training does without labels."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Float
from ml_collections import config_dict
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import views

MOST = 1024  # images whose views are compared
NEIGHBORS = 10
_CHUNK = 64


def embed(config: config_lib.Config, encoder: nn.Module, variables: dict[str, Any],
          images: data.Images) -> tuple[Float[np.ndarray, 'n D'], Float[np.ndarray, 'n D']]:
  """Embeddings of two views of up to `MOST` images, a seeded sample.

  Images in files are cropped from their central views. Every process that calls it computes them
  all, on its first device.

  Args:
    config: the run's configuration.
    encoder: a Linen module.
    variables: its variables.
    images: N images.

  Returns:
    ([n, D], [n, D]) of the first and the second views, unit-norm.

  Raises:
    errors.UserError: an image cannot be read.
  """
  variables = jax.device_put(jax.device_get(variables), jax.local_devices()[0])
  chosen = np.sort(np.random.RandomState(0).permutation(len(images))[:MOST])
  chunk, frozen = min(_CHUNK, len(chosen)), config_dict.FrozenConfigDict(config)
  found: Any = ([], [])
  for number, start in enumerate(range(0, len(chosen), chunk)):
    part = np.minimum(np.arange(start, start + chunk), len(chosen) - 1)  # one size to compile
    read = views.read(images, chosen[part], config.augment.size)
    for view, embeddings in enumerate(found):
      keys = jax.random.split(jax.random.fold_in(jax.random.key(view), number), chunk)
      embeddings.append(_encode(variables, keys, read, encoder=encoder, config=frozen))
  first, second = (np.concatenate(embeddings)[:len(chosen)] for embeddings in found)
  return first, second


@functools.partial(jax.jit, static_argnames=('encoder', 'config'))
def _encode(variables, keys, images, *, encoder, config):
  return encoder.apply(variables, views.draw(config, keys, images), train=False)


def agreement(first: Float[np.ndarray, 'n D'], second: Float[np.ndarray, 'n D'],
              k: int = NEIGHBORS) -> float:
  """The share of the k nearest images that two views of an image have in common.

  The neighbors of an image's first view are sought among the first views of the others, those of
  its second among the second. By chance it is k / (n - 1).

  Args:
    first: [n, D] unit-norm embeddings of one view of each image.
    second: [n, D] of another.
    k: number of neighbors, or as many as there are.

  Returns:
    A float from 0 to 1, the mean over the images.
  """
  n = len(first)
  k = min(k, n - 1)
  found = []
  for x in (first, second):
    scores = np.asarray(x @ x.T)
    np.fill_diagonal(scores, -np.inf)
    near = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    member = np.zeros((n, n), bool)
    np.put_along_axis(member, near, True, axis=1)
    found.append(member)
  return float((found[0] & found[1]).sum() / (n * k))
