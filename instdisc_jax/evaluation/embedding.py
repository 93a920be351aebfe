"""From images to features, without augmentation, on all devices and in all processes.

The single engine behind the evaluation of a run, `evaluate`, `embed`, `retrieve` and `load()`.
Images are read and decoded, ahead of the encoder, by the process whose devices encode them; each
device encodes its part of a chunk; every process gets the results, in order.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax.data import feeds, views
from instdisc_jax.data.images import Images
from instdisc_jax.models import layers
from instdisc_jax.runtime import distributed, errors
from instdisc_jax.runtime import mesh as mesh_lib

STAGES = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'pooled')
EMBEDDING = 'embedding'
_CHUNK = 256  # maximum number of images per device and call,
_CHUNK_PIXELS = 2**22  # and of pixels
_STAGE_VALUES = 9600  # maximum values per stage, after average pooling (Zhang et al., 2016)
_FEW_CHUNKS = 16  # up to these, threads: worker processes take seconds to start


class Engine:
  """An encoder over a mesh.

  Args:
    config: the run's configuration.
    encoder: a Linen module.
    mesh: the device mesh, over all processes.
    size: (height, width) that the encoder sees; by default `augment.size`, or the images' own.
    check: called between chunks, in every process; an exception that it raises ends the work.
  """

  def __init__(self, config: config_lib.Config, encoder: nn.Module, mesh: jax.sharding.Mesh,
               size: tuple[int, int] | None = None, check: Callable[[], None] = lambda: None):
    if size is None and config.augment.size is not None:
      size = config.augment.size, config.augment.size
    self._config, self._mesh, self._size, self._check = config, mesh, size, check
    self._programs = functools.cache(functools.partial(encode, config, encoder, mesh, size))

  def run(self, variables: dict[str, Any], images: Images,
          names: Sequence[str] = (EMBEDDING,), first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Features of many images; every process must call it with the same arguments.

    Args:
      variables: the encoder's {'params', 'batch_stats'}.
      images: N images.
      names: which features: `EMBEDDING` or any of `STAGES`; stages that the encoder lacks are
        left out.
      first: the image to start with.

    Yields:
      {name: [n, F] float32} for the next n images, in order.

    Raises:
      errors.UserError: an image cannot be read, or differs in size from the others when the run
        does not crop images to one size.
    """
    program, previous = self._programs(tuple(names)), None
    for count, chunk in self._in_order(images, first):
      running = count, program(variables, chunk)
      if previous is not None:  # fetched while the next one computes
        yield _fetch(*previous)
      previous = running
      self._check()
    if previous is not None:
      yield _fetch(*previous)

  def embed(self, variables: dict[str, Any], images: Images) -> Float[np.ndarray, 'N D']:
    """The unit-norm embeddings of all images."""
    if not len(images):
      return np.zeros((0, self._config.model.embedding_dim), np.float32)
    return np.concatenate([part[EMBEDDING] for part in self.run(variables, images)])

  def rows(self, variables: dict[str, Any], images: Images,
           names: Sequence[str] = (EMBEDDING,),
           check: Callable[[], None] | None = None) -> dict[str, jax.Array]:
    """Features of all images as the rows of a bank: {name: [N', F]}, sharded, padded with zeros.

    Each device encodes the images whose rows it holds, so no features leave their device. `check`
    is called between chunks, in place of the engine's own.
    """
    side, shape = self._view(images)
    n = mesh_lib.padded(len(images), self._mesh.size) // self._mesh.size
    chunk_size = per_device(shape, n)
    size = min(chunk_size, n)
    index = functools.partial(by_row, per_device=chunk_size, size=size, n=n)
    program, write = self._programs(tuple(names)), write_rows(self._mesh)
    rows = None
    for number, chunk in enumerate(self._read(images, index, math.ceil(n / size), chunk_size, side,
                                              shape)):
      features = program(variables, chunk)
      if rows is None:
        rows = {name: self._zeros(n, x) for name, x in features.items()}
      first = min(number * size, n - size)
      rows = {name: write(rows[name], x, first, len(images)) for name, x in features.items()}
      (check or self._check)()
    return rows or {}

  def _zeros(self, n, like):
    """[n * devices, F] zeros, sharded."""
    return jax.jit(lambda: jnp.zeros((n * self._mesh.size, like.shape[1]), like.dtype),
                   out_shardings=NamedSharding(self._mesh, P(mesh_lib.AXIS)))()

  def widths(self, variables: dict[str, Any], images: Images,
             names: Sequence[str]) -> dict[str, int]:
    """{name: F} of those features that the encoder has."""
    _, shape = self._view(images)
    views = jax.ShapeDtypeStruct((self._mesh.size, *shape), np.uint8)
    found: Any = jax.eval_shape(self._programs(tuple(names)), variables, views)
    return {name: x.shape[1] for name, x in found.items()}

  def views(self, images: Images, side: int) -> UInt8[np.ndarray, 'N side side 3']:
    """The central views of all images, at the given size, on every process."""
    return np.concatenate([distributed.gather(chunk)[:count]
                           for count, chunk in self._in_order(images, 0, side)])

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """All devices, of all processes."""
    return self._mesh

  @property
  def size(self) -> tuple[int, int] | None:
    """(height, width) that the encoder sees; None for the images' own."""
    return self._size

  def chunks(self, images: Images, most: int) -> Iterator[tuple[int, jax.Array]]:
    """The views of all images, in order, on the devices.

    Args:
      images: `Images`.
      most: images at a time, on all devices.

    Yields:
      (number of images, [n, H, W, 3] uint8, sharded, padded with the last image).
    """
    return self._in_order(images, 0, most=most)

  def _in_order(self, images, first, side=None, most=None):
    """Yields (number of images, their views on the devices, padded with the last image)."""
    side, shape = self._view(images, side)
    wanted = min(len(images) - first, most or len(images))
    chunk_size = per_device(shape, math.ceil(wanted / self._mesh.size))
    total = chunk_size * self._mesh.size
    index = functools.partial(in_order, first=first, total=total)
    count = math.ceil((len(images) - first) / total)
    for number, chunk in enumerate(self._read(images, index, count, chunk_size, side, shape)):
      yield min(total, len(images) - first - number * total), chunk

  def _view(self, images, side=None):
    """(side of the views that the host crops, or None; their shape)."""
    if side is None and not isinstance(images.files, np.ndarray):
      side = self._config.augment.size  # arrays are cropped on the device, files on the host
    height, width = (side, side) if side is not None else _first_shape(images)
    return side, (height, width, 3)

  def _read(self, images, index, count, chunk_size, side, shape):
    """Yields the views of `count` chunks of `chunk_size` images a device, on the devices."""
    total = chunk_size * self._mesh.size
    slots = mesh_lib.local_slots(self._mesh, total)
    load = functools.partial(load_views, images=images, index=functools.partial(index, slots=slots),
                             side=side, shape=shape)
    if isinstance(images.files, np.ndarray) and side is None:
      chunks = map(load, range(count))
    else:
      workers = feeds.num_workers(self._config.dataset.workers) if count > _FEW_CHUNKS else 0
      chunks = feeds.in_background(load, 0, count, workers)
    for chunk in chunks:
      yield mesh_lib.place_local(chunk, self._mesh, slots, total)


def in_order(chunk: int, *, slots: Int[np.ndarray, ' b'], first: int,
             total: int) -> Int[np.ndarray, ' b']:
  """The images at the places `slots` of a chunk of `total`, from image `first` on."""
  return first + chunk * total + slots


def by_row(chunk: int, *, slots: Int[np.ndarray, ' b'], per_device: int, size: int,
           n: int) -> Int[np.ndarray, ' b']:
  """The images at the places `slots` of a chunk in which each device has images of its own rows.

  Args:
    chunk: the number of the chunk.
    slots: [b] places in the chunk, `per_device` for each device.
    per_device: images per device and chunk, at least `size`, which count.
    size: rows per device and chunk.
    n: rows per device, at least `size`. The last chunk overlaps the one before it.
  """
  device, place = np.divmod(slots, per_device)
  return device * n + np.minimum(chunk * size, n - size) + np.minimum(place, size - 1)


@functools.cache
def write_rows(mesh: jax.sharding.Mesh) -> Any:
  """A jitted (rows, embeddings of a chunk, its first row on each device, N) -> the new rows."""
  def device_part(rows, embeddings, first, num_rows):
    size = min(len(embeddings), len(rows))
    row = lax.axis_index(mesh_lib.AXIS) * len(rows) + first + jnp.arange(size)
    new = jnp.where(row[:, None] < num_rows, embeddings[:size], 0)
    return lax.dynamic_update_slice_in_dim(rows, new, first, 0)

  spec = P(mesh_lib.AXIS)
  return jax.jit(jax.shard_map(device_part, mesh=mesh, in_specs=(spec, spec, P(), P()),
                               out_specs=spec), donate_argnums=0)


def encode(config: config_lib.Config, encoder: nn.Module, mesh: jax.sharding.Mesh,
           size: tuple[int, int] | None, names: tuple[str, ...]) -> Any:
  """The encoder in evaluation mode over the mesh.

  Args:
    config: the run's configuration.
    encoder: a Linen module.
    mesh: the device mesh.
    size: (height, width) of the views; None for the images' own.
    names: which features, see `Engine.run`.

  Returns:
    A jitted (variables, images [n, H, W, 3] uint8, sharded) -> {name: [n, F], sharded}.
  """
  def device_part(variables, images):
    return features_of(encoder, variables, views.central(config, images, size), names)

  return jax.jit(jax.shard_map(device_part, mesh=mesh, in_specs=(P(), P(mesh_lib.AXIS)),
                               out_specs=P(mesh_lib.AXIS)))


def features_of(encoder: nn.Module, variables: dict[str, Any], x: Float[Array, 'n h w 3'],
                names: Sequence[str]) -> dict[str, Float[Array, 'n F']]:
  """Features of some views, in evaluation mode.

  Args:
    encoder: a Linen module.
    variables: its {'params', 'batch_stats'}.
    x: [n, h, w, 3] views.
    names: which features, see `Engine.run`; a stage is pooled to at most 9,600 values.
  """
  embedding, updated = encoder.apply(variables, x, train=False, mutable=['stages'])
  shown: Any = dict(updated).get('stages', {})
  features = {name: _pool(shown[f'{name}_output']) for name in STAGES
              if name in names and f'{name}_output' in shown}
  return features | ({EMBEDDING: embedding} if EMBEDDING in names else {})


def load_views(chunk: int, *, images: Images, index: Callable[[int], np.ndarray],
               side: int | None, shape: tuple[int, ...]) -> UInt8[np.ndarray, 'b H W 3']:
  """This process's part of a chunk; for threads and worker processes.

  Args:
    chunk: the number of the chunk.
    images: N images.
    index: (the number of a chunk) -> [b] its images that belong to this process; numbers of N or
      more stand for the last image.
    side: side of the central views; None for full images, of the given shape.
    shape: (H, W, 3).

  Returns:
    [b, H, W, 3] uint8.

  Raises:
    errors.UserError: an image cannot be read, or has another shape.
  """
  chosen = np.minimum(index(chunk), len(images) - 1)
  if side is not None:
    return np.stack([images.central(i, side) for i in chosen])
  if isinstance(images.files, np.ndarray):
    return images.files[chosen]
  views = [images.full(i) for i in chosen]
  for i, view in zip(chosen, views):
    if view.shape != shape:
      raise errors.UserError(
          f'{images.name(i)} has {view.shape[0]} x {view.shape[1]} pixels',
          f'{shape[0]} x {shape[1]} like {images.name(0)}', setting='augment.size',
          remedy='use images of one size, or set <augment.size> and <dataset.path>=stream in a new '
                 '<--workdir> to train on crops of one size')
  return np.stack(views)


def per_device(shape: tuple[int, ...], wanted: int) -> int:
  """Images per device and chunk, where `wanted` are to be encoded; few sizes to compile."""
  most = min(_CHUNK, max(1, _CHUNK_PIXELS // (shape[0] * shape[1])))
  return min(most, 1 << (wanted - 1).bit_length())


def _first_shape(images):
  return images.shape[:2] if images.shape is not None else images.full(0).shape[:2]


def _fetch(count, features):
  """The features of a chunk's images, on this host."""
  return {name: distributed.gather(value)[:count] for name, value in features.items()}


def _pool(x):
  """[n, H, W, C] -> [n, s·s·C] with the largest s that `_STAGE_VALUES` allows; [n, C] as it is."""
  if x.ndim == 4:
    side = min(x.shape[1], max(1, math.isqrt(_STAGE_VALUES // x.shape[3])))
    x = layers.average_to(x, side)
  return x.reshape(x.shape[0], -1).astype(jnp.float32)
