"""Products and norms shared by models, losses and kNN."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np


def normalize(x: Float[Array, '... D'], epsilon: float = 1e-12) -> Float[Array, '... D']:
  """x / max(‖x‖, epsilon) along the last axis: a zero vector stays zero, with a finite gradient."""
  return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon**2))


def unit(rows: Float[np.ndarray, 'N D']) -> Float[np.ndarray, 'N D']:
  """`normalize` on the host."""
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def dot(a: jax.Array, b: jax.Array, dims: tuple) -> jax.Array:
  """`lax.dot_general` with a float32 (or float64) result.

  A bfloat16 `b` rounds `a` to bfloat16; a float16 `b` is widened, for weights such as exp(1/0.07)
  are infinite in float16. Float32 operands are not rounded on CPU; elsewhere they are split into
  two bfloat16 parts each, and three of the four products computed: a relative error of 2^-16.
  """
  result = jnp.promote_types(a.dtype, jnp.float32)
  product = functools.partial(lax.dot_general, dimension_numbers=dims,
                              preferred_element_type=result)
  if b.dtype == jnp.bfloat16:
    return product(a.astype(b.dtype), b)
  if b.dtype == jnp.float16:
    b = b.astype(result)
  if result != jnp.float32:
    return product(a, b, precision=lax.Precision.HIGHEST)
  return lax.platform_dependent(
      a, b, cpu=functools.partial(product, precision=lax.Precision.HIGHEST),
      default=functools.partial(product, precision=lax.DotAlgorithmPreset.BF16_BF16_F32_X3))


def score_rows(queries: Float[Array, 'Q D'], rows: Float[Array, 'n D']) -> Float[Array, 'Q n']:
  """Cosine scores of unit vectors, every query against every row."""
  return dot(queries, rows, (((1,), (1,)), ((), ())))


def in_chunks(fn: Callable, inputs: Any, chunk: int) -> Any:
  """`fn(inputs)`, at most `chunk` entries of the inputs' first axis at a time.

  Args:
    fn: a function of a tree of arrays [b, ...], entry by entry.
    inputs: a tree of arrays [B, ...].
    chunk: the most entries at a time, at least 1.

  Returns:
    A tree of arrays [B, ...].
  """
  total = jax.tree.leaves(inputs)[0].shape[0]
  count = -(-total // chunk)
  if count <= 1:
    return fn(inputs)
  size = -(-total // count)  # even chunks, and less padding
  fill = lambda x: jnp.pad(x, [(0, count * size - total)] + [(0, 0)] * (x.ndim - 1))
  split = lambda x: fill(x).reshape(count, size, *x.shape[1:])
  join = lambda x: x.reshape(count * size, *x.shape[2:])[:total]
  return jax.tree.map(join, lax.map(fn, jax.tree.map(split, inputs)))
