"""Embeddings of many pictures, with the encoder as it would be used: no augmentation."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax import augment, distributed, train

_CHUNK = 256  # images per device and call


def map_over_mesh(encoder, mesh, mean, std):
  """The encoder over the mesh, jitted.

  Args:
    encoder: a Linen module.
    mesh: the device mesh.
    mean: per channel, of pictures in [0, 1].
    std: likewise.

  Returns:
    call(params, batch_stats, images [n, H, W, 3] uint8, start, size) -> [devices · size, D], the
    embeddings of `size` pictures per device from `start` on; parts that would reach past the end
    are moved back.
  """
  def device_part(params, batch_stats, images, start, size):
    start = start + lax.axis_index(train.AXIS) * size
    part = lax.dynamic_slice_in_dim(images, start, size)
    part = augment.normalize(part.astype(jnp.float32) / 255, mean, std)
    return encoder.apply({'params': params, 'batch_stats': batch_stats}, part, train=False)

  @functools.partial(jax.jit, static_argnames='size')
  def call(params, batch_stats, images, start, size):
    return jax.shard_map(functools.partial(device_part, size=size), mesh=mesh,
                         in_specs=(P(), P(), P(), P()), out_specs=P(train.AXIS))(
                             params, batch_stats, images, start)

  return call


def make_embed(encoder, mesh, mean, std, between_calls=lambda: None):
  """`map_over_mesh` for any number of pictures, compiled once per shape of the picture array.

  Args:
    encoder: a Linen module.
    mesh: the device mesh.
    mean: per channel, of pictures in [0, 1].
    std: likewise.
    between_calls: called after each; what it raises ends the embedding.

  Returns:
    embed(state, images [n, H, W, 3] uint8) -> [n, D] unit-norm `np.ndarray`.
  """
  call = map_over_mesh(encoder, mesh, mean, std)

  def embed(state, images):
    n = images.shape[0]
    size = min(_CHUNK, -(-n // mesh.size))
    parts, running = [], None
    for start in range(0, n, size * mesh.size):
      before, running = running, call(state.params, state.batch_stats, images, start, size)
      if before is not None:  # fetched while the next one computes
        parts.append(distributed.gather(before))
      between_calls()
    parts = np.concatenate([*parts, distributed.gather(running)])
    result = np.empty((n, parts.shape[-1]), parts.dtype)
    for i, part in enumerate(parts.reshape(-1, size, parts.shape[-1])):
      start = min(i * size, n - size)
      result[start:start + size] = part
    return result

  return embed
