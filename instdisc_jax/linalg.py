"""Products and norms shared by models, losses and kNN."""

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
  """`lax.dot_general` with a float32 (or float64) result; float32 operands are not rounded."""
  precision = lax.Precision.HIGHEST if b.dtype != jnp.bfloat16 else None
  result = jnp.promote_types(a.dtype, jnp.float32)
  return lax.dot_general(a.astype(b.dtype) if b.dtype == jnp.bfloat16 else a, b, dims,
                         precision=precision, preferred_element_type=result)


def score_rows(queries: Float[Array, 'Q D'], rows: Float[Array, 'n D']) -> Float[Array, 'Q n']:
  """Cosine scores of unit vectors, every query against every row."""
  return dot(queries, rows, (((1,), (1,)), ((), ())))
