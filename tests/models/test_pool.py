import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdisc_jax.models import pool

SHAPES = pytest.mark.parametrize('height, width, size, stride, padding', [
    (17, 19, 3, 2, 1), (16, 16, 3, 2, 1), (13, 15, 3, 2, 0), (8, 8, 2, 2, 0), (9, 7, 2, 2, 0),
    (28, 28, 3, 2, 1), (5, 6, 3, 1, 1)])


def _xla(x, size, stride, padding):
  return nn.max_pool(x, (size, size), (stride, stride), padding=((padding, padding),) * 2)


def _inputs(height, width, dtype):
  """Pixels with many ties."""
  x = jax.random.normal(jax.random.key(0), (3, height, width, 5))
  return (jnp.round(2 * x) / 2).astype(dtype)


@SHAPES
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_gathered_gradient_equals_xla_s(height, width, size, stride, padding, dtype):
  x = _inputs(height, width, dtype)
  pooled, pull = jax.vjp(lambda x: _xla(x, size, stride, padding), x)
  gradient = jnp.round(8 * jax.random.normal(jax.random.key(1), pooled.shape)).astype(dtype)
  winner = pool.winners(x, pooled, size, stride, padding)
  assert winner.max() < size * size
  found = pool.gathered_gradient(winner, gradient, x.shape, size, stride, padding)
  assert found.dtype == gradient.dtype
  np.testing.assert_array_equal(found, pull(gradient)[0])  # sums of small integers are exact


@SHAPES
def test_values_and_gradients_equal_xla_s(height, width, size, stride, padding):
  x = _inputs(height, width, jnp.float32)
  expected, pull = jax.vjp(lambda x: _xla(x, size, stride, padding), x)
  found, our_pull = jax.vjp(lambda x: pool.max_pool(x, size, stride, padding), x)
  gradient = jax.random.normal(jax.random.key(1), found.shape)
  np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(our_pull(gradient)[0], pull(gradient)[0])


def test_a_program_for_gpus_has_no_scatter_and_one_for_cpus_no_winners():
  step = jax.jit(jax.grad(lambda x: (pool.max_pool(x, 3, 2, 1) ** 2).sum()))
  x = jax.ShapeDtypeStruct((2, 16, 16, 4), jnp.bfloat16)
  gpu = step.trace(x).lower(lowering_platforms=('cuda',)).as_text()
  assert 'select_and_scatter' not in gpu and 'xi8>' in gpu
  cpu = step.lower(x)
  assert 'select_and_scatter' in cpu.as_text() and 's8[' not in cpu.compile().as_text()
