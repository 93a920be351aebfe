"""The pass over the memory bank: the softmax over all rows as one head of attention.

Queries are features over τ, keys and values are the bank's rows. The log-sum-exp of the scores is
the first half of the loss, and the attention's output Σ_j p_j V_j that of its gradient.

Three kernels compute the same sums over a device's rows:

    xla      blocks of rows through XLA; everywhere, and for any D, dtype and τ
    cudnn    NVIDIA's fused attention; 16-bit operands, no score in memory
    pallas   one TPU kernel; no score in memory
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdisc_jax.kernels import cudnn, xla
from instdisc_jax.kernels.xla import Sums, finite
from instdisc_jax.runtime import errors

__all__ = ['NAMES', 'Choice', 'Sums', 'choose', 'finite', 'partial_sums', 'row_multiple', 'shift']

NAMES = ('xla', 'cudnn', 'pallas')
# exp(logit - shift) is a normal float32 for logits in ±bound, and so are sums of 2^31 of them:
# bound - shift <= _MOST, and -bound - shift >= _LEAST = log(2^-126).
_MOST, _LEAST = 60.0, -87.3
_UNBOUNDED = 'scores over loss.temperature may exceed what float32 sums without a running maximum'


class Choice(NamedTuple):
  """A kernel, and why it is not the one that is usual on the platform; None if it is."""
  name: str
  reason: str | None = None


def choose(wanted: str, device: Any, *, dim: int, bank_dtype: Any, compute_dtype: Any,
           largest_logit: float) -> Choice:
  """The kernel of a run: the setting `loss.kernel`, with 'auto' resolved.

  'auto' is Pallas on a TPU. On a GPU it is cuDNN if the bank or the encoder computes in 16 bits,
  for cuDNN rounds its operands to that.

  Args:
    wanted: 'auto', or one of `NAMES`.
    device: one of the devices.
    dim: D.
    bank_dtype: of the rows.
    compute_dtype: of the encoder.
    largest_logit: the bound on |logit|, see `shift`.

  Raises:
    errors.UserError: the kernel that is asked for cannot run.
  """
  usual = {'cpu': 'xla', 'tpu': 'pallas'}.get(device.platform, 'cudnn')
  obstacle = {
      'xla': lambda: None,
      'cudnn': lambda: cudnn.obstacle(device, dim, bank_dtype),
      'pallas': lambda: (_UNBOUNDED if shift(largest_logit) is None else
                         _pallas().obstacle(device, dim, bank_dtype))}
  if wanted != 'auto':
    if (reason := obstacle[wanted]()) is not None:
      raise errors.UserError(f'loss.kernel is {wanted}, and {reason}', setting='loss.kernel',
                             remedy='set <loss.kernel>=xla')
    return Choice(wanted)
  reason = obstacle[usual]()
  if usual == 'cudnn' and reason is None and all(
      jnp.dtype(dtype).itemsize > 2 for dtype in (bank_dtype, compute_dtype)):
    reason = ('cuDNN would round to 16 bits, and neither bank nor encoder do; '
              'bank.dtype=float16 is faster')
  return Choice(usual) if reason is None else Choice('xla', reason)


def shift(largest_logit: float) -> float | None:
  """The least s >= 0 for which exp(logit - s) neither overflows nor vanishes in float32.

  Args:
    largest_logit: the bound on |logit|: the largest norm of a row over τ.

  Returns:
    s, or None if there is none: then the sums need a running maximum.
  """
  least = max(0.0, largest_logit - _MOST)
  return least if -largest_logit - least >= _LEAST else None


def partial_sums(kernel: str, queries: Float[Array, 'B D'], rows: Float[Array, 'n D'],
                 num_local: Int[Array, ''] | int, *, padding: int, largest_logit: float | None,
                 block_rows: int | None) -> Sums:
  """One pass over a device's rows.

  Args:
    kernel: one of `NAMES`.
    queries: [B, D] features over τ, at full precision; already rounded if the rows are narrower.
    rows: [n, D], the device's rows.
    num_local: how many of them belong to images; the others, at the end, may hold anything.
    padding: the number of rows of all devices that belong to no image.
    largest_logit: the bound on |logit|, or None if it is unknown.
    block_rows: rows that XLA scores at once, or None for the platform's best.

  Returns:
    The partial sums.
  """
  fixed = None if largest_logit is None else shift(largest_logit)
  if kernel == 'cudnn':
    return cudnn.partial_sums(queries, rows, num_local)
  if kernel == 'pallas':
    assert fixed is not None, _UNBOUNDED
    return _pallas().partial_sums(queries, rows, num_local, shift=fixed)
  return xla.partial_sums(queries, rows, num_local, padding=padding, shift=fixed,
                          block_rows=block_rows)


def row_multiple(kernel: str) -> int:
  """What the number of rows on each device must be a multiple of."""
  return cudnn.MOST_PARTS if kernel == 'cudnn' else 1


def _pallas():
  """The module, imported where it is used: it takes most of a second."""
  from instdisc_jax.kernels import pallas
  return pallas
