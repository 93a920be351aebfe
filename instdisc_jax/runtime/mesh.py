"""The device mesh, and how arrays are laid out on it.

One axis, `data`: the batch and the rows of the memory bank are sharded over it, everything else is
replicated. Rows are padded to a multiple of the device count; N does not count the padding.
"""

from collections.abc import Sequence
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

AXIS = 'data'


def make(devices: Sequence[Any] | None = None) -> Mesh:
  """The one-axis mesh over `devices` (by default all that JAX sees)."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), (AXIS,), devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,))


def on_cpu(mesh: Mesh) -> bool:
  """Whether the devices are CPUs."""
  return mesh.devices.flat[0].platform == 'cpu'


def padded(num_rows: int, multiple: int) -> int:
  """N', the next multiple, e.g. of the device count."""
  return num_rows + -num_rows % multiple


def pad_rows(rows: Any, num_devices: int) -> Any:
  """[N, D] -> [N', D] with N' the next multiple of the device count; NumPy or JAX."""
  xp = np if isinstance(rows, np.ndarray) else jnp
  return xp.pad(rows, ((0, padded(len(rows), num_devices) - len(rows)), (0, 0)))


def replicate(array: np.ndarray, mesh: Mesh) -> jax.Array:
  """An array that every process has, copied to each device."""
  return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P()),
                                      lambda part: array[part])


def shard_rows(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """[N, D] that every process has -> padded, and sharded by rows."""
  padded = pad_rows(rows, mesh.size)
  return jax.make_array_from_callback(padded.shape, NamedSharding(mesh, P(AXIS)),
                                      lambda part: padded[part])


def local_slots(mesh: Mesh, total: int) -> np.ndarray:
  """The places, out of `total` along a sharded axis, on this process's devices, in order."""
  parts: Any = NamedSharding(mesh, P(AXIS)).addressable_devices_indices_map((total,))
  return np.unique(np.concatenate([np.arange(*part.indices(total)) for part, in parts.values()]))


def place_local(local: np.ndarray, mesh: Mesh, slots: np.ndarray, total: int,
                lead: int = 0) -> jax.Array:
  """This process's part of a batch as a global array, sharded over the mesh.

  Args:
    local: [b, ...], the values at `slots`.
    mesh: the device mesh.
    slots: [b], see `local_slots`.
    total: number of places, over all processes.
    lead: number of axes of size 1 to put before the sharded one.

  Returns:
    [1, ..., total, ...].
  """
  shape = (1,) * lead + (total, *local.shape[1:])

  def part(where):
    start, stop, _ = where[lead].indices(total)
    first = np.searchsorted(slots, start)
    mine = local[first:first + stop - start].reshape((1,) * lead + (stop - start, *local.shape[1:]))
    return np.array(mine)  # a copy: a CPU device would keep a worker's shared memory in use

  spec = P(*(None,) * lead, AXIS)
  return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)


def memory(mesh: Mesh) -> float:
  """Bytes of a device's memory; CPU devices share that of the machine."""
  device = mesh.local_devices[0]
  limit = (device.memory_stats() or {}).get('bytes_limit')
  if limit is None:
    return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / len(mesh.local_devices)
  return limit
