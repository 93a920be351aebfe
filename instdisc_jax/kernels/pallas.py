"""The pass over the bank as one TPU kernel: scores and weights never leave the chip's own memory.

The grid goes over tiles of queries and, inside, over blocks of rows, so each row is read once for
every tile of queries. While a block of rows is in the chip's memory, all queries of the tile score
it, some at a time, and its weighted rows are added up in place.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdisc_jax.kernels.xla import Sums

_TILE = 4096  # queries for which a block of rows is read once
_STRIP = 256  # queries scored at once
_BLOCK = 1024  # rows of a block
_LANES = 128
_MOST_DIM = 1024
_MEMORY = 64 * 2**20  # of the chip's 128 MiB


def obstacle(device: Any, dim: int, dtype: Any) -> str | None:
  """Why the kernel cannot pass over rows of this size and dtype there, in words; None if it can."""
  if device.platform != 'tpu':
    return f'the devices are {device.platform.upper()}s'
  if dim % _LANES or dim > _MOST_DIM:  # XLA keeps narrower rows transposed, and would copy them
    return f'the TPU kernel takes embeddings in multiples of {_LANES} up to {_MOST_DIM}, not {dim}'
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    return f'the TPU kernel takes float32 and bfloat16, and the bank is {jnp.dtype(dtype)}'
  return None


def partial_sums(queries: Float[Array, 'B D'], rows: Float[Array, 'n D'],
                 num_local: Int[Array, ''] | int, *, shift: float) -> Sums:
  """See `kernels.partial_sums`; `shift` is the peak.

  On other platforms it runs inside `pltpu.force_tpu_interpret_mode()` alone, slowly.
  """
  batch, dim = queries.shape
  strip = min(_STRIP, -(-batch // 16) * 16)
  strips = -(-batch // strip)
  tile = strip * -(-strips // -(-strips * strip // _TILE))
  queries = jnp.pad(queries, ((0, strips * strip - batch), (0, 0)))
  block = min(_BLOCK, -(-rows.shape[0] // _LANES) * _LANES)
  by_tile = lambda width: pl.BlockSpec((tile, width), lambda tile, block, _: (tile, 0))
  like = lambda width: jax.ShapeDtypeStruct((len(queries), width), jnp.float32,
                                            manual_axis_type=jax.typeof(rows).manual_axis_type)
  grid = pl.cdiv(len(queries), tile), pl.cdiv(rows.shape[0], block)
  products = 2 if rows.dtype == jnp.bfloat16 else 6
  total, weighted = pl.pallas_call(
      functools.partial(_kernel, strip=strip, shift=shift),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=grid, out_specs=[by_tile(_LANES), by_tile(dim)],
          in_specs=[by_tile(dim), pl.BlockSpec((block, dim), lambda tile, block, _: (block, 0))]),
      out_shape=[like(_LANES), like(dim)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=_MEMORY),
      cost_estimate=pl.CostEstimate(
          flops=2 * products * len(queries) * rows.size, transcendentals=len(queries) * len(rows),
          bytes_accessed=(grid[0] * rows.size + queries.size) * rows.dtype.itemsize
          + 4 * len(queries) * (_LANES + dim)),
  )(jnp.asarray(num_local, jnp.int32).reshape(1), queries.astype(rows.dtype), rows)
  return Sums(jnp.float32(shift), total[:batch].sum(axis=1), weighted[:batch])


def _kernel(num_local, queries, rows, total, weighted, *, strip, shift):
  """Adds a block of rows to the sums of a tile of queries; totals stay spread over the lanes."""
  size = rows.shape[0]
  left = num_local[0] - pl.program_id(1) * size

  @pl.when(pl.program_id(1) == 0)
  def _():
    total[...] = jnp.zeros_like(total)
    weighted[...] = jnp.zeros_like(weighted)

  def add(rows, fresh=None):
    rows = _split(rows)

    def add_strip(i, _):
      part = pl.ds(i * strip, strip)
      weight = jnp.exp(_product(_split(queries[part, :]), rows, ((1,), (1,))) - shift)
      if fresh is not None:
        weight = jnp.where(fresh, weight, 0)
      total[part, :] += sum(weight[:, start:start + _LANES] for start in range(0, size, _LANES))
      weighted[part, :] += _product(_split(weight, rows), rows, ((1,), (0,)))

    lax.fori_loop(0, queries.shape[0] // strip, add_strip, None)

  pl.when(left >= size)(lambda: add(rows[...]))

  @pl.when((left > 0) & (left < size))
  def _():
    fresh = lambda shape, axis: lax.broadcasted_iota(jnp.int32, shape, axis) < left
    add(jnp.where(fresh((size, 1), 0), rows[...], 0), fresh((1, size), 1))


def _split(x, like=None):
  """(x,) in bfloat16; a float32 array as the sum of two such, unless the factor `like` is one."""
  high = x.astype(jnp.bfloat16)
  if x.dtype == jnp.bfloat16 or (like is not None and len(like) == 1):
    return (high,)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _product(a, b, contracted):
  """The product of two split arrays in float32: one pass, or three for float32 operands."""
  dot = lambda a, b: lax.dot_general(a, b, (contracted, ((), ())),
                                     preferred_element_type=jnp.float32)
  if len(a) == 1:
    return dot(a[0], b[0])
  return dot(a[0], b[0]) + (dot(a[0], b[1]) + dot(a[1], b[0]))
