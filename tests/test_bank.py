import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import bank as bank_lib
from instdisc_jax.runtime import mesh as mesh_lib
from tests import twins


def test_initial_rows_are_uniform_within_the_published_bound():
  rows = np.asarray(bank_lib.init(jax.random.key(0), 20_000, 128))
  bound = (128 / 3) ** -0.5
  assert np.abs(rows).max() <= bound
  error = 5 / np.sqrt(rows.size)
  np.testing.assert_allclose(rows.mean() / rows.std(), 0, atol=error)
  np.testing.assert_allclose(rows.var() * 128, 1, atol=error)  # variance 1/D
  np.testing.assert_allclose((rows**4).mean() * 128**2, 9 / 5, atol=3 * error)


def test_initial_unit_rows_have_norm_one_and_no_preferred_direction():
  rows = np.asarray(bank_lib.init(jax.random.key(0), 5000, 8, unit=True))
  np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(rows.mean(axis=0), 0, atol=5 / np.sqrt(5000 * 8))


@pytest.mark.parametrize('num_devices', [None, 1, 2, 4, 8])
@pytest.mark.parametrize('momentum', [0.0, 0.5, 1.0])
def test_update_keeps_the_last_of_duplicates(momentum, num_devices):
  random = np.random.default_rng(0)
  bank, features = random.standard_normal((29, 6)), twins.unit_rows(random, 16, 6)
  index = random.integers(0, 29, 16)
  index[[0, 7, 15]] = 28
  index[[3, 4]] = 0
  expected = twins.update(bank, index, features, momentum)
  arrays = bank.astype('f4'), index, features.astype('f4')
  fn = functools.partial(bank_lib.update, momentum=momentum)
  if num_devices is None:
    new = jax.jit(fn)(*arrays)
  else:
    fn = jax.shard_map(functools.partial(fn, axis_name=mesh_lib.AXIS), in_specs=P(mesh_lib.AXIS),
                       out_specs=P(mesh_lib.AXIS), mesh=mesh_lib.make(jax.devices()[:num_devices]))
    new = jax.jit(fn)(mesh_lib.pad_rows(arrays[0], num_devices), *arrays[1:])
    assert not np.any(new[29:])  # padding stays empty
  np.testing.assert_allclose(new[:29], expected, atol=1e-6)
  untouched = np.setdiff1d(np.arange(29), index)
  np.testing.assert_array_equal(new[untouched], arrays[0][untouched])


def test_update_keeps_a_bfloat16_bank_in_bfloat16():
  bank = jnp.ones((4, 2), jnp.bfloat16)
  new = bank_lib.update(bank, jnp.array([1]), jnp.array([[1.0, 0.0]]), momentum=0.5)
  assert new.dtype == jnp.bfloat16
  np.testing.assert_allclose(new[1].astype(float), [0.894, 0.447], atol=4e-3)


def test_a_zero_vector_normalizes_to_zero_with_a_finite_gradient():
  grad = jax.grad(lambda x: bank_lib.normalize(x).sum())(jnp.zeros(3))
  assert np.all(np.isfinite(grad)) and not np.any(bank_lib.normalize(jnp.zeros(3)))


@pytest.mark.parametrize('noise_count', [1, 10, 4096])
def test_noise_is_uniform_over_the_rows(noise_count):
  num_rows = 101  # a prime: no device count divides it
  batch = max(1, 40_000 // noise_count)
  draw = jax.jit(functools.partial(bank_lib.noise, noise_count=noise_count, num_rows=num_rows))
  noise = np.asarray(draw(jax.random.key(1), 3, jnp.arange(batch)))
  assert noise.shape == (batch, noise_count) and noise.dtype == np.int32
  counts = np.bincount(noise.ravel(), minlength=num_rows)
  assert counts.size == num_rows
  expected = noise.size / num_rows
  chi2 = ((counts - expected) ** 2 / expected).sum()
  assert abs(chi2 - (num_rows - 1)) < 5 * np.sqrt(2 * (num_rows - 1))


def test_noise_differs_between_images_steps_and_keys_and_repeats_otherwise():
  draw = lambda key, step, index: np.asarray(
      bank_lib.noise(jax.random.key(key), step, jnp.array([index]), 50, 1000))
  base = draw(0, 5, 7)
  np.testing.assert_array_equal(base, draw(0, 5, 7))
  for other in (draw(1, 5, 7), draw(0, 6, 7), draw(0, 5, 8)):
    assert np.mean(base == other) < 0.1


@pytest.mark.parametrize('noise_count', [1, 10, 4096])
def test_noise_is_the_same_for_any_device_count(noise_count):
  index = jnp.arange(16) * 3
  def device(index):
    index = bank_lib.gather(index, mesh_lib.AXIS)
    return bank_lib.noise(jax.random.key(0), 2, index, noise_count, 101)
  draws = [np.asarray(jax.jit(jax.shard_map(
      device, mesh=mesh_lib.make(jax.devices()[:n]), in_specs=P(mesh_lib.AXIS), out_specs=P(),
      check_vma=False))(index)) for n in (1, 2, 4, 8)]
  expected = bank_lib.noise(jax.random.key(0), 2, index, noise_count, 101)
  for draw in draws:
    np.testing.assert_array_equal(draw, expected)


@pytest.mark.parametrize('num_devices', [None, 8])
def test_the_alignment_is_the_mean_distance_from_the_rows_before(num_devices):
  random = np.random.default_rng(0)
  bank, features = twins.unit_rows(random, 29, 6), twins.unit_rows(random, 16, 6)
  index = random.integers(0, 29, 16)
  arrays = jnp.asarray(bank, 'f4'), index, jnp.asarray(features, 'f4')
  fn = functools.partial(bank_lib.move, momentum=0.5)
  if num_devices:
    local = P(mesh_lib.AXIS)
    fn = jax.jit(jax.shard_map(functools.partial(fn, axis_name=mesh_lib.AXIS), mesh=mesh_lib.make(),
                               in_specs=local, out_specs=(local, P())))
    arrays = mesh_lib.pad_rows(arrays[0], 8), *arrays[1:]
  expected = ((features - bank[index])**2).sum(axis=1).mean()
  np.testing.assert_allclose(fn(*arrays)[1], expected, rtol=1e-5)
