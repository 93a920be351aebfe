"""Max pooling whose gradient is fast on GPUs too.

XLA:GPU computes it by a scatter: coordinates of the largest pixels in memory, and an atomic
addition for each, which must be sorted first if the result is to be deterministic. Here it is a
gather: a pixel's gradient is the sum over the windows that it won, always in the same order. Other
platforms use XLA's own gradient. In a tie the first pixel of the window gets it, on all of them.
"""

from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np


def max_pool(x: Float[Array, 'B H W C'], size: int, stride: int,
             padding: int = 0) -> Float[Array, 'B h w C']:
  """Max pooling, [B, H, W, C], over windows of size x size pixels."""
  return _max_pool(x, size, stride, padding)


def _pool(x, size, stride, padding) -> jax.Array:
  pads: Any = ((padding, padding),) * 2
  return nn.max_pool(x, (size, size), (stride, stride), padding=pads)


_max_pool: Any = jax.custom_vjp(_pool, nondiff_argnums=(1, 2, 3))


def _forward(x, size, stride, padding):
  with jax.named_scope('max_pool'):
    pooled = _pool(x, size, stride, padding)
    # Compilers drop what the platform's gradient does not use.
    return pooled, (x, winners(x, pooled, size, stride, padding))


def _backward(size, stride, padding, saved, gradient):
  x, winner = saved
  gather = lambda x, winner, gradient: gathered_gradient(winner, gradient, x.shape, size, stride,
                                                         padding)
  scatter = lambda x, _, gradient: jax.vjp(
      lambda x: _pool(x, size, stride, padding), x)[1](gradient)[0]
  with jax.named_scope('max_pool'):
    return lax.platform_dependent(x, winner, gradient, cuda=gather, default=scatter),


_max_pool.defvjp(_forward, _backward)


def winners(x: Float[Array, 'B H W C'], pooled: Float[Array, 'B h w C'], size: int, stride: int,
            padding: int) -> Int[Array, 'B h w C']:
  """Which pixel of each window is its first maximum, [B, h, w, C] int8: row * size + column."""
  winner = jnp.full(pooled.shape, size * size, jnp.int8)
  edges = (padding, padding)
  filled = jnp.pad(x, ((0, 0), edges, edges, (0, 0)), constant_values=-jnp.inf)
  ends = [stride * (length - 1) + 1 for length in pooled.shape[1:3]]
  for place, (top, left) in reversed(list(enumerate(np.ndindex(size, size)))):
    pixel = lax.slice(filled, (0, top, left, 0),
                      (x.shape[0], top + ends[0], left + ends[1], x.shape[3]),
                      (1, stride, stride, 1))
    winner = jnp.where(pixel == pooled, jnp.int8(place), winner)
  return winner


def gathered_gradient(winner: Int[Array, 'B h w C'], gradient: Float[Array, 'B h w C'],
                      shape: tuple[int, ...], size: int, stride: int,
                      padding: int) -> Float[Array, 'B H W C']:
  """The gradient with respect to the pixels: what the windows that they won have received.

  Args:
    winner: [B, h, w, C], see `winners`.
    gradient: [B, h, w, C], with respect to the pooled values.
    shape: (B, H, W, C).
    size: side of the windows.
    stride: between windows.
    padding: pixels on each side.

  Returns:
    [B, H, W, C], summed in float32 or wider.
  """
  wide = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
  total = jnp.zeros(shape, wide.dtype)
  for place, corner in enumerate(np.ndindex(size, size)):
    # Window (r, c) has this pixel at (stride r + low, stride c + low) of each axis.
    low = [start - padding for start in corner]
    high = [length - first - stride * (count - 1) - 1
            for length, first, count in zip(shape[1:3], low, gradient.shape[1:3])]
    spread = [(first, last, stride - 1) for first, last in zip(low, high)]
    total += lax.pad(jnp.where(winner == place, wide, 0), jnp.zeros((), wide.dtype),
                     ((0, 0, 0), *spread, (0, 0, 0)))
  return total.astype(gradient.dtype)
