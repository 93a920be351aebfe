"""The pass over the bank as cuDNN's fused attention, on NVIDIA GPUs of compute capability 8 up.

A GPU works on one block of queries and one part of the rows at a time, so the rows are cut into as
many parts as keep it busy: the batch axis of the attention. Each part gives its log-sum-exp and its
mean row, which are combined in float32.

Operands are rounded to the 16-bit dtype of the rows, float32 rows to float16.
"""

import functools
import importlib.util
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdisc_jax.kernels.xla import Sums

MOST_PARTS = 256  # 128 queries at a time and two blocks on each of some 130 multiprocessors
_TILE = 128  # queries of one block
_FEWEST = 8  # queries; for one, XLA does not remove the rounding of the log-sum-exp
_PLUGINS = ('jax_cuda12_plugin', 'jax_cuda13_plugin')
_CAPABILITY = 8.0  # the least
_MOST_DIM = 128  # of cuDNN's attention; up to 256 on some cards only


def obstacle(device: Any, dim: int, dtype: Any) -> str | None:
  """Why cuDNN cannot pass over rows of this size and dtype there, in words; None if it can."""
  if device.platform not in ('cuda', 'gpu'):
    return f'the devices are {device.platform.upper()}s'
  if float(getattr(device, 'compute_capability', _CAPABILITY)) < _CAPABILITY:
    return f'{device.device_kind} is of compute capability {device.compute_capability}, below 8.0'
  if dim > _MOST_DIM or dim % 8:
    return f'cuDNN takes embeddings in multiples of 8 up to {_MOST_DIM}, not {dim}'
  if jnp.dtype(dtype) == jnp.float64:
    return 'cuDNN computes in 16 bits, and the bank is float64'
  return None


def partial_sums(queries: Float[Array, 'B D'], rows: Float[Array, 'n D'],
                 num_local: Int[Array, ''] | int) -> Sums:
  """See `kernels.partial_sums`. The rows are best a multiple of `MOST_PARTS`.

  Elsewhere than on NVIDIA GPUs the same attention runs through XLA, at full precision.
  """
  (batch, dim), n = queries.shape, rows.shape[0]
  queries = jnp.pad(queries, ((0, max(0, _FEWEST - batch)), (0, 0)))
  parts = max(1, MOST_PARTS * _TILE // max(_TILE, queries.shape[0]))
  while n % parts:
    parts -= 1
  size = n // parts
  lengths = jnp.clip(num_local - size * jnp.arange(parts), 0, size).astype(jnp.int32)
  narrow = rows.dtype if rows.dtype.itemsize == 2 else jnp.float16
  attend = lambda implementation, dtype: functools.partial(
      _attend, implementation=implementation, operand_dtype=dtype, result_dtype=queries.dtype)
  bodies = {'default': attend('xla', queries.dtype)}
  if any(map(importlib.util.find_spec, _PLUGINS)):  # JAX refuses to trace it without cuDNN
    bodies['cuda'] = attend('cudnn', narrow)
  # cuDNN has no sums over nothing: a part without rows gets one, and its result is dropped below.
  logsumexp, mean_row = lax.platform_dependent(
      queries, rows.reshape(parts, size, 1, dim), jnp.maximum(lengths, 1), **bodies)
  empty = (lengths == 0)[:, None]
  logsumexp = jnp.where(empty, -jnp.inf, logsumexp)
  mean_row = jnp.where(empty[:, :, None], 0, mean_row)
  peak = logsumexp.max(axis=0)
  weight = jnp.where(empty, 0, jnp.exp(logsumexp - peak))
  weighted = jnp.einsum('pb,pbd->bd', weight, mean_row, precision=lax.Precision.HIGHEST)
  return Sums(peak[:batch], weight.sum(axis=0)[:batch], weighted[:batch])


def _attend(queries, rows, lengths, *, implementation, operand_dtype, result_dtype):
  """Log-sum-exp [parts, B] and mean row [parts, B, D] of every part."""
  queries, rows = queries.astype(operand_dtype), rows.astype(operand_dtype)
  spread = jnp.broadcast_to(queries[None, :, None], (rows.shape[0], queries.shape[0], 1,
                                                     queries.shape[1]))
  mean_row, logsumexp = jax.nn.dot_product_attention(
      spread, rows, rows, scale=1.0, key_value_seq_lengths=lengths, return_residual=True,
      implementation=implementation)
  # JAX rounds the log-sum-exp to the operands' dtype, where 20 has an error of 0.01; XLA removes
  # the rounding, since the next operation widens it again (a test reads the program).
  return logsumexp[:, :, 0].astype(result_dtype), mean_row[:, :, 0].astype(result_dtype)
