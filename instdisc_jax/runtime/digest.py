"""SHA-256 of arrays, to tell whether two runs computed the same bits."""

from collections.abc import Iterable
import functools
import hashlib
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax.runtime import distributed
from instdisc_jax.runtime.mesh import AXIS

_MOST_BYTES = 2**26  # of rows that are fetched at once


def of_arrays(arrays: Iterable[Any]) -> str:
  """SHA-256 of the bytes of arrays, one after the other, in hexadecimal."""
  result = hashlib.sha256()
  for array in arrays:
    result.update(np.ascontiguousarray(array).tobytes())
  return result.hexdigest()


def of_rows(rows: jax.Array, num_rows: int, mesh: jax.sharding.Mesh) -> str:
  """SHA-256 of the bytes of the first N rows of a sharded array; all processes must call this.

  Process 0 hashes the shards in their order, in pieces of at most 64 MiB, so that no process and no
  device holds more than a piece.

  Args:
    rows: [N', D] sharded by rows, N' >= N.
    num_rows: N.
    mesh: the device mesh.

  Returns:
    The digest in hexadecimal, the same on every process.
  """
  per_device, size = rows.shape[0] // mesh.size, piece_size(rows, mesh)
  read, result = piece(mesh, size), hashlib.sha256()
  for start in range(0, num_rows, per_device):
    stop = min(start + per_device, num_rows)
    for first in range(start, stop, size):
      begin = min(first, start + per_device - size)  # the last piece of a shard overlaps
      bits = jax.block_until_ready(read(rows, begin))  # one piece at a time, in every process
      if jax.process_index() == 0:
        found = np.asarray(bits).astype(f'u{rows.dtype.itemsize}')
        result.update(found[first - begin:stop - begin].tobytes())
  agreed = distributed.agree(np.frombuffer(result.digest(), np.uint8))
  return np.asarray(agreed, np.uint8).tobytes().hex()


def piece_size(rows: Any, mesh: jax.sharding.Mesh) -> int:
  """Rows that are fetched at once."""
  return min(rows.shape[0] // mesh.size,
             max(1, _MOST_BYTES // (rows.shape[1] * max(4, rows.dtype.itemsize))))


@functools.cache
def piece(mesh: jax.sharding.Mesh, size: int) -> Any:
  """A jitted (rows, first) -> the bits of `size` rows of one shard, on every device."""
  def device_part(rows, first):
    n, width = rows.shape[0], rows.dtype.itemsize
    local = first - lax.axis_index(AXIS) * n
    bits = lax.bitcast_convert_type(
        lax.dynamic_slice_in_dim(rows, jnp.clip(local, 0, n - size), size),
        {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[width])
    bits = bits.astype(jnp.promote_types(bits.dtype, jnp.uint32))  # CPUs cannot sum uint16
    return lax.psum(jnp.where((local >= 0) & (local < n), bits, 0), AXIS)

  return jax.jit(jax.shard_map(device_part, mesh=mesh, in_specs=(P(AXIS), P()), out_specs=P()))
