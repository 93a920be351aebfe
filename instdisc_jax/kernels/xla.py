"""The pass over the bank as blocks of rows through XLA: on every platform, in any precision."""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdisc_jax.linalg import dot, score_rows


class _Blocks(NamedTuple):
  """How a platform goes through the rows.

  Attributes:
    scores: held at once. Those of a CPU stay in its caches; 2^25, 128 MiB, keep a GPU or TPU busy.
    column: whether the weights are summed by the product that weighs the rows, as the weighted sum
      of a column of ones. Then nothing else leaves a block, and XLA:TPU keeps scores off memory.
  """
  scores: int
  column: bool


_BLOCKS = {'cpu': _Blocks(2**19, False), 'tpu': _Blocks(2**25, True),
           'default': _Blocks(2**25, False)}
_FEWEST_ROWS, _LANES = 1024, 128
_CONTRACT_ROWS = (((1,), (0,)), ((), ()))


class Sums(NamedTuple):
  """Sums over rows j of a device, for each query.

  Attributes:
    peak: [B], the largest logit, -inf without rows; or a scalar, the same on all devices.
    total: [B], Σ_j exp(logit_j - peak).
    weighted: [B, D], Σ_j exp(logit_j - peak) V_j.
  """
  peak: Float[Array, '*B']
  total: Float[Array, ' B']
  weighted: Float[Array, 'B D']


def partial_sums(queries: Float[Array, 'B D'], rows: Float[Array, 'n D'],
                 num_local: Int[Array, ''] | int, *, padding: int, shift: float | None,
                 block_rows: int | None = None) -> Sums:
  """See `kernels.partial_sums`.

  Args:
    queries: [B, D].
    rows: [n, D].
    num_local: how many of them belong to images.
    padding: the number of padding rows on all devices.
    shift: the peak to use, or None to find the largest logit on the way.
    block_rows: rows scored at once.
  """
  def stream(blocks, queries, rows, num_local):
    size = max(_FEWEST_ROWS, blocks.scores // queries.shape[0] // _LANES * _LANES)
    return _stream(queries, rows, num_local, padding, shift, block_rows or size, blocks.column)

  return lax.platform_dependent(
      queries, rows, jnp.asarray(num_local),
      **{platform: functools.partial(stream, blocks) for platform, blocks in _BLOCKS.items()})


def _stream(queries, rows, num_local, padding, shift, block_rows, column) -> Sums:
  """Blocks of rows; all the padding is in the last, which alone needs a mask."""
  n = rows.shape[0]
  size = min(n, block_rows)
  count = max(0, n - max(1, padding)) // size  # whole blocks, before the last
  first = count * size
  fresh = jnp.arange(first, n) < num_local
  add = (functools.partial(_add, queries) if shift is None else
         functools.partial(_add_shifted, queries, shift, column))
  sums = add(None, jnp.where(fresh[:, None], rows[first:], 0), fresh)
  chunk = lambda i: lax.dynamic_slice_in_dim(rows, i * size, size)
  total_sums = lax.fori_loop(0, count, lambda i, sums: add(sums, chunk(i)), sums)
  if shift is None:
    return Sums(*total_sums)
  total, weighted = total_sums
  if column:
    total, weighted = weighted[:, -1], weighted[:, :-1]
  return Sums(jnp.asarray(shift, queries.dtype), total, weighted)


def _add_shifted(queries, shift, column, sums, chunk, fresh=None):
  """(total, weighted) so far, and a block's; with a column, the total is part of the weighted."""
  logits = score_rows(queries, chunk)
  weight = jnp.exp(logits - shift if shift else logits)
  if fresh is not None:
    weight = jnp.where(fresh, weight, 0)
  total = jnp.zeros(weight.shape[0], weight.dtype) if column else jnp.sum(weight, axis=1)
  if column:
    chunk = jnp.concatenate([chunk, jnp.ones((chunk.shape[0], 1), chunk.dtype)], axis=1)
  added = total, dot(weight, chunk, _CONTRACT_ROWS)
  return added if sums is None else jax.tree.map(jnp.add, sums, added)


def _add(queries, sums, chunk, fresh=None):
  """(peak, total, weighted) so far, and a block's: all shrink as the peak grows."""
  logits = score_rows(queries, chunk)
  if fresh is not None:
    logits = jnp.where(fresh, logits, -jnp.inf)
  peak = jnp.max(logits, axis=1)
  if sums is not None:
    peak = jnp.maximum(peak, sums[0])
  weight = jnp.exp(logits - finite(peak)[:, None])
  total = jnp.sum(weight, axis=1)
  weighted = dot(weight, chunk, _CONTRACT_ROWS)
  if sums is not None:
    shrink = jnp.exp(sums[0] - finite(peak))
    total += shrink * sums[1]
    weighted += shrink[:, None] * sums[2]
  return peak, total, weighted


def finite(peak: Any) -> jax.Array:
  """Replaces the peak -inf of a device with only padding: exp(-inf - 0) is 0, -inf + inf is NaN."""
  return jnp.where(jnp.isfinite(peak), peak, 0)
