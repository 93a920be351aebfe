"""Embeddings of many pictures, with the encoder as it would be used: no augmentation."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax import augment, distributed, train
from instdisc_jax.data import decode, stream

_CHUNK = 256  # most images per device and call,
_CHUNK_PIXELS = 2**22  # and most pixels


def prepare(images, mean, std, size=None):
  """What the encoder gets of pictures [n, H, W, 3] uint8, without augmentation; see below."""
  if size is None or images.shape[1:3] == tuple(size):
    x = images.astype(jnp.float32) / 255
  else:
    box = decode.centre_box(*images.shape[1:3], size[0])
    x = augment.crop_and_resize(images, jnp.tile(jnp.array(box), (len(images), 1)), size)
  return augment.normalize(x, mean, std)


def map_over_mesh(encoder, mesh, mean, std, size=None, resident=True):
  """The encoder over the mesh, jitted.

  Args:
    encoder: a Linen module.
    mesh: the device mesh.
    mean: per channel, of pictures in [0, 1].
    std: likewise.
    size: (height, width) of the views; pictures of another size are cut, see `decode.centre_box`.
      None: as they are.
    resident: whether the pictures lie on every device; else each device has its part of them.

  Returns:
    call(params, batch_stats, images [n, H, W, 3] uint8, start, count) -> [devices · count, D], the
    embeddings of `count` pictures per device from `start` on; parts that would reach past the end
    are moved back. Not `resident`, `start` is 0 and there are devices · count pictures.
  """
  def encode(params, batch_stats, part):
    return encoder.apply({'params': params, 'batch_stats': batch_stats},
                         prepare(part, mean, std, size), train=False)

  def device_part(params, batch_stats, images, start, count):
    if resident:
      start = start + lax.axis_index(train.AXIS) * count
      images = lax.dynamic_slice_in_dim(images, start, count)
    return encode(params, batch_stats, images)

  @functools.partial(jax.jit, static_argnames='count')
  def call(params, batch_stats, images, start, count):
    images_spec = P() if resident else P(train.AXIS)
    return jax.shard_map(functools.partial(device_part, count=count), mesh=mesh,
                         in_specs=(P(), P(), images_spec, P()), out_specs=P(train.AXIS))(
                             params, batch_stats, images, start)

  return call


def make_embed(encoder, mesh, mean, std, size=None, between_calls=lambda: None):
  """`map_over_mesh` for any number of pictures, compiled once per shape of the picture array.

  Args:
    encoder: a Linen module.
    mesh: the device mesh.
    mean: per channel, of pictures in [0, 1].
    std: likewise.
    size: (height, width) of the views, or None.
    between_calls: called after each; what it raises ends the embedding.

  Returns:
    embed(state, images) -> [n, D] unit-norm `np.ndarray`; images is [n, H, W, 3] uint8 on every
    device, or `stream.Views`.
  """
  calls = {resident: map_over_mesh(encoder, mesh, mean, std, size, resident)
           for resident in (True, False)}

  def embed(state, images):
    n = len(images)
    streamed = isinstance(images, stream.Views)
    pixels = images.side**2 if streamed else images.shape[1] * images.shape[2]
    count = max(1, min(_CHUNK, _CHUNK_PIXELS // pixels, -(-n // mesh.size)))
    starts = range(0, n, count * mesh.size)
    inputs = ((chunk, 0) for chunk in images.chunks(count)) if streamed else (
        (images, start) for start in starts)
    parts, running = [], None
    for chunk, start in inputs:
      before, running = running, calls[not streamed](state.params, state.batch_stats, chunk, start,
                                                     count)
      if before is not None:  # fetched while the next one computes
        parts.append(distributed.gather(before))
      between_calls()
    parts = np.concatenate([*parts, distributed.gather(running)])
    if streamed:
      return parts[:n]
    result = np.empty((n, parts.shape[-1]), parts.dtype)
    for i, part in enumerate(parts.reshape(-1, count, parts.shape[-1])):
      start = min(i * count, n - count)
      result[start:start + count] = part
    return result

  return embed
