import functools
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import bank as bank_lib
from instdisc_jax import kernels, losses
from instdisc_jax.runtime import errors
from instdisc_jax.runtime import mesh as mesh_lib
from tests import twins

interpreted = pytest.mark.usefixtures('interpreted')
D = 16
NARROW = [('xla', 'bfloat16'), ('xla', 'float16'), ('cudnn', 'bfloat16'), ('cudnn', 'float16'),
          ('pallas', 'bfloat16')]
# The largest error of loss and gradient for unit vectors at τ = 0.07: float32, or three products
# of bfloat16 parts.
ERRORS = {'xla': (5e-6, 2e-5), 'cudnn': (5e-6, 2e-5), 'pallas': (2e-4, 2e-4)}


def _unit_inputs(batch, num_rows, seed=0):
  random = np.random.default_rng(seed)
  bank = twins.unit_rows(random, num_rows, D)
  index = random.integers(0, num_rows, batch)
  return twins.unit_rows(random, batch, D), bank, index


def _loss_and_gradient(features, bank, index, **kwargs):
  fn = lambda f: losses.softmax_loss(f, bank, index, **kwargs)
  loss, pull = jax.vjp(fn, jnp.asarray(features, jnp.float32))
  return np.asarray(loss), np.asarray(pull(jnp.ones_like(loss))[0])


def _assert_equals_the_twin(found, features, bank, index, temperature, errors):
  for value, expected, error in zip(found, twins.softmax(features, bank, index, temperature),
                                    errors):
    np.testing.assert_allclose(value, expected, rtol=error, atol=error)


@interpreted
@pytest.mark.parametrize('kernel', kernels.NAMES)
@pytest.mark.parametrize('batch, num_rows', [(1, 1), (1, 2100), (17, 127), (300, 3), (300, 2100)])
def test_any_batch_and_any_number_of_rows(kernel, batch, num_rows):
  features, bank, index = _unit_inputs(batch, num_rows)
  found = _loss_and_gradient(features, jnp.asarray(bank, jnp.float32), index, temperature=0.07,
                             kernel=kernel)
  _assert_equals_the_twin(found, features, bank, index, 0.07, ERRORS[kernel])


@interpreted
def test_a_batch_of_several_tiles():
  features, bank, index = _unit_inputs(9000, 130)
  found = _loss_and_gradient(features, jnp.asarray(bank, jnp.float32), index, temperature=0.07,
                             kernel='pallas')
  _assert_equals_the_twin(found, features, bank, index, 0.07, ERRORS['pallas'])


@interpreted
@pytest.mark.parametrize('kernel', kernels.NAMES)
@pytest.mark.parametrize('num_rows, multiple', [(5, 1), (203, 1), (1030, 256)])
def test_padding_may_hold_anything_and_may_be_all_that_a_device_has(kernel, num_rows, multiple):
  features, bank, index = _unit_inputs(8, num_rows)
  total = mesh_lib.padded(num_rows, 8 * multiple)  # 5 rows on 8 devices; 1,030 on the first 5
  padded = np.full((total, D), np.nan, np.float32)
  padded[:num_rows] = bank
  local = P(mesh_lib.AXIS)

  def device(features, bank, index):
    fn = lambda f: losses.softmax_loss(
        f, bank, index, temperature=0.07, kernel=kernel, axis_name=mesh_lib.AXIS,
        num_rows=num_rows)
    loss, pull = jax.vjp(fn, features)
    return loss, pull(jnp.ones_like(loss))[0]

  found = jax.jit(jax.shard_map(device, mesh=mesh_lib.make(), in_specs=(local,) * 3,
                                out_specs=local))(
                                    features.astype('f4'), padded, index)
  _assert_equals_the_twin(found, features, bank, index, 0.07, ERRORS[kernel])


@pytest.mark.parametrize('num_rows, padding, block_rows', [
    (203, 0, 1), (203, 0, 50), (203, 5, 7), (203, 5, 300), (203, 150, 8), (208, 40, 50),
    (64, 63, 1)])
@pytest.mark.parametrize('temperature', [0.07, 0.005])  # without and with a running maximum
def test_blocks_cover_every_row_once(num_rows, padding, block_rows, temperature):
  features, bank, index = _unit_inputs(4, num_rows - padding)
  padded = np.full((num_rows, D), np.nan)
  padded[:num_rows - padding] = bank
  with jax.enable_x64(True):
    loss = losses.softmax_loss(
        jnp.asarray(features), jnp.asarray(padded), index, temperature=temperature,
        num_rows=num_rows - padding, block_rows=block_rows)
    np.testing.assert_allclose(loss, twins.softmax(features, bank, index, temperature)[0],
                               rtol=1e-12, atol=1e-12)


@interpreted
@pytest.mark.parametrize('kernel', kernels.NAMES)
@pytest.mark.parametrize('scale', [1.0, 3**0.5])
def test_the_bound_on_the_scores_holds_to_the_smallest_temperature(kernel, scale):
  """Rows along and against the feature, as long as rows can be: the largest and least scores."""
  features, bank, index = _unit_inputs(2, 6)
  bank[:] = scale * np.array([[1, 1, -1, -1, -1, -1]]).T * features[0]
  features[1] = -features[0]  # of which most scores are the largest
  index = np.array([2, 3])
  limit = scale / 73.5
  for temperature in (limit * 1.01, 0.07):
    found = _loss_and_gradient(features, jnp.asarray(bank, jnp.float32), index, kernel=kernel,
                               temperature=temperature, largest_norm=scale)
    _assert_equals_the_twin(found, features, bank, index, temperature, (3e-4, 3e-3))
  assert kernels.shift(scale / (limit * 1.01)) is not None
  assert kernels.shift(scale / (limit * 0.99)) is None


def test_the_shift_keeps_float32_from_overflow_and_from_zero():
  for bound in (0.1, 14.3, 60.0, 73.4):
    shift = kernels.shift(bound)
    largest, least = np.exp(np.float32([bound - shift, -bound - shift]))
    assert largest * 2.0**31 < np.finfo(np.float32).max
    assert least >= np.finfo(np.float32).tiny


@pytest.mark.parametrize('norm, temperature', [(40.0, 0.1), (0.01, 0.1), (1.0, 0.002)])
def test_rows_of_any_norm_and_any_temperature_have_a_running_maximum(norm, temperature):
  features, bank, index = _unit_inputs(8, 203)
  found = _loss_and_gradient(features, jnp.asarray(norm * bank, jnp.float32), index,
                             temperature=temperature, largest_norm=None, block_rows=50)
  logits = norm / temperature
  _assert_equals_the_twin(found, features, norm * bank, index, temperature,
                          (1e-6 * max(logits, 10), 1e-6 * max(logits, 10) * norm / temperature))


def test_a_traced_temperature_has_a_running_maximum():
  features, bank, index = _unit_inputs(8, 203)
  fn = jax.jit(lambda t: losses.softmax_loss(jnp.asarray(features, jnp.float32),
                                             jnp.asarray(bank, jnp.float32), index, temperature=t))
  np.testing.assert_allclose(fn(0.002), twins.softmax(features, bank, index, 0.002)[0], rtol=1e-3)


@interpreted
@pytest.mark.parametrize('kernel, dtype', NARROW)
def test_an_image_s_own_row_is_scored_like_the_others(kernel, dtype):
  """With one row, the log-sum-exp is that row's logit, to the last bit of the narrow bank."""
  features, bank, _ = _unit_inputs(8, 1)
  loss, gradient = _loss_and_gradient(features, jnp.asarray(bank, dtype), np.zeros(8, int),
                                      temperature=0.07, kernel=kernel)
  np.testing.assert_allclose(loss, 0, atol=1e-5)
  np.testing.assert_allclose(gradient, 0, atol=0.07)  # of rows rounded to 2^-9, over τ


@interpreted
@pytest.mark.parametrize('kernel, dtype', NARROW)
def test_narrow_banks_cost_their_rounding(kernel, dtype):
  error = {'bfloat16': (0.05, 0.05), 'float16': (0.01, 0.01)}[dtype]
  features, bank, index = _unit_inputs(16, 500)
  rows = jnp.asarray(bank, dtype)
  rounded = np.asarray(jnp.asarray(features / 0.07, dtype), np.float64) * 0.07
  found = _loss_and_gradient(features, rows, index, temperature=0.07, kernel=kernel)
  # Scores of rounded operands are exact; what is left is the rounding of the weights.
  _assert_equals_the_twin(found, rounded, np.asarray(rows, np.float64), index, 0.07, error)


def _choose(wanted, platform, **changes):
  device = types.SimpleNamespace(platform=platform, device_kind='a device',
                                 compute_capability=changes.pop('capability', '9.0'))
  settings = dict(dim=128, bank_dtype='float32', compute_dtype='bfloat16',
                  largest_logit=bank_lib.LARGEST_NORM / 0.07)
  return kernels.choose(wanted, device, **settings | changes)


@pytest.mark.parametrize('platform, changes, name, reason', [
    ('cpu', {}, 'xla', None),
    ('tpu', {}, 'pallas', None),
    ('tpu', {'largest_logit': 200.0}, 'xla', 'running maximum'),
    ('tpu', {'bank_dtype': 'float16'}, 'xla', 'float16'),
    ('tpu', {'dim': 64}, 'xla', 'not 64'),
    ('gpu', {}, 'cudnn', None),
    ('cuda', {'bank_dtype': 'float16', 'compute_dtype': 'float32'}, 'cudnn', None),
    ('cuda', {'compute_dtype': 'float32'}, 'xla', 'bank.dtype=float16 is faster'),
    ('cuda', {'bank_dtype': 'float64'}, 'xla', 'float64'),
    ('cuda', {'dim': 100}, 'xla', 'not 100'),
    ('cuda', {'dim': 256}, 'xla', 'not 256'),
    ('cuda', {'capability': '7.5'}, 'xla', 'compute capability 7.5'),
])
def test_auto_is_the_kernel_of_the_platform_or_says_why_not(platform, changes, name, reason):
  choice = _choose('auto', platform, **changes)
  assert choice.name == name
  assert (choice.reason is None) if reason is None else (reason in choice.reason)


@pytest.mark.parametrize('wanted, platform, changes, why', [
    ('pallas', 'cpu', {}, 'the devices are CPUs'),
    ('cudnn', 'tpu', {}, 'the devices are TPUs'),
    ('pallas', 'tpu', {'largest_logit': 200.0}, 'running maximum'),
    ('cudnn', 'cuda', {'dim': 100}, 'not 100'),
])
def test_a_kernel_that_cannot_run_is_a_user_error(wanted, platform, changes, why):
  with pytest.raises(errors.UserError, match=f'loss.kernel is {wanted}.*{why}'):
    _choose(wanted, platform, **changes)
  assert _choose('xla', platform).name == 'xla'


@interpreted
def test_a_kernel_s_result_is_the_same_on_eight_devices():
  features, bank, index = _unit_inputs(16, 203)
  local = P(mesh_lib.AXIS)
  for kernel in kernels.NAMES:
    single = losses.softmax_loss(jnp.asarray(features, jnp.float32),
                                 jnp.asarray(bank, jnp.float32), index, temperature=0.07,
                                 kernel=kernel)
    fn = functools.partial(losses.softmax_loss, temperature=0.07, kernel=kernel,
                           axis_name=mesh_lib.AXIS, num_rows=203)
    sharded = jax.jit(jax.shard_map(fn, mesh=mesh_lib.make(), in_specs=(local,) * 3,
                                    out_specs=local))(
        features.astype('f4'), mesh_lib.pad_rows(bank.astype('f4'), 8), index)
    np.testing.assert_allclose(sharded, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('num_devices', [None, 8])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_tpu_kernel_lowers_for_tpus_with_no_score_in_its_program(dtype, num_devices):
  kwargs = dict(temperature=0.07, kernel='pallas')
  array = jax.ShapeDtypeStruct
  arrays = array((64, 128), jnp.float32), array((4000, 128), dtype), array((64,), jnp.int32)
  fn = functools.partial(losses.softmax_loss, **kwargs)
  if num_devices:
    fn = jax.shard_map(functools.partial(fn, axis_name=mesh_lib.AXIS, num_rows=3999),
                       mesh=mesh_lib.make(), in_specs=P(mesh_lib.AXIS), out_specs=P(mesh_lib.AXIS))
  text = jax.jit(fn).trace(*arrays).lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('tpu_custom_call') == 1 and 'x4000xf32>' not in text
