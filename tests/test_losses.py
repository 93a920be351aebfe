import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import losses
from instdisc_jax.runtime import mesh as mesh_lib
from tests import twins

pytestmark = pytest.mark.usefixtures('interpreted')
N, D, B = 203, 16, 16
TEMPERATURE, NORMALIZER = 0.1, 900.0


def _inputs(num_noise, seed=0):
  random = np.random.default_rng(seed)
  features, bank = twins.unit_rows(random, B, D), twins.unit_rows(random, N, D)
  bank *= random.uniform(0.8, 1.2, (N, 1))  # initial rows do not have unit norm
  index = random.integers(0, N, B)
  index[5] = index[2]  # the same image twice
  noise_index = random.integers(0, N, (B, num_noise))
  noise_index[0, :1] = index[0]  # noise that hits the positive
  return features, bank, index, noise_index


def _near(count):
  """[B, K] rows that are not an image's own, none of them for one image and few for another."""
  near = (_inputs(1)[2][:, None] + 1 + 3 * np.arange(count)) % N
  near[3], near[4, 1:] = -1, -1
  return near


def _softmax_with_near(count):
  near = _near(count)
  return (lambda f, b, i, **kwargs: losses.softmax_loss(f, b, i, near=jnp.asarray(near), **kwargs),
          lambda f, b, i, t: twins.positives(f, b, i, near, t), 0, {})


def _triplet(features, bank, index, noise_index, temperature, **kwargs):
  return losses.triplet_loss(features, bank, index, noise_index, margin=0.3, **kwargs)


CASES = {
    'softmax': (losses.softmax_loss, twins.softmax, 0, {}),
    'softmax_by_cudnn': (functools.partial(losses.softmax_loss, kernel='cudnn'), twins.softmax, 0,
                         {}),
    'softmax_by_pallas': (functools.partial(losses.softmax_loss, kernel='pallas'), twins.softmax, 0,
                          {}),
    'nce_by_matmul': (losses.nce_loss, twins.nce, 40, {'normalizer': NORMALIZER}),
    'nce_by_gather': (losses.nce_loss, twins.nce, 1, {'normalizer': NORMALIZER}),
    'sampled_by_matmul': (losses.sampled_softmax_loss, twins.sampled_softmax, 40, {}),
    'sampled_by_gather': (losses.sampled_softmax_loss, twins.sampled_softmax, 1, {}),
    'near_by_matmul': _softmax_with_near(20),
    'near_by_gather': _softmax_with_near(2),
    'triplet_by_matmul': (_triplet, lambda *args: twins.triplet(*args[:4], 0.3), 40, {}),
    'triplet_by_gather': (_triplet, lambda *args: twins.triplet(*args[:4], 0.3), 1, {}),
    'proximal': (losses.proximal_penalty, lambda f, b, i, temperature: twins.proximal(f, b, i), 0,
                 {}),
}


# The sums of the others are float32.
WIDE = [case for case in CASES if case not in ('softmax_by_cudnn', 'softmax_by_pallas')]


def _call(case, num_devices, dtype):
  """Loss, and gradient of its mean: by the twin, and by the package on this many devices."""
  loss_fn, twin, num_noise, extra = CASES[case]
  *arrays, noise_index = _inputs(num_noise or 1)
  arrays += [noise_index] if num_noise else []
  expected = twin(*arrays, TEMPERATURE, *extra.values())
  if case != 'proximal':
    extra = dict(extra, temperature=TEMPERATURE)
  features, bank, index, *noise = (jnp.asarray(a, dtype if a.dtype == float else jnp.int32)
                                   for a in arrays)
  if num_devices is None:
    fn = lambda f: (jnp.mean(loss := loss_fn(f, bank, index, *noise, **extra)), loss)
    (_, loss), grad = jax.value_and_grad(fn, has_aux=True)(features)
    return expected, loss, grad * B
  mesh = mesh_lib.make(jax.devices()[:num_devices])

  def device(features, bank, index, *noise):
    def mean_loss(f):
      loss = loss_fn(f, bank, index, *noise, axis_name=mesh_lib.AXIS, num_rows=N, **extra)
      return jax.lax.pmean(loss.mean(), mesh_lib.AXIS), loss
    (_, loss), grad = jax.value_and_grad(mean_loss, has_aux=True)(features)
    return loss, grad

  local, replicated = P(mesh_lib.AXIS), P()
  mapped = jax.jit(jax.shard_map(device, mesh=mesh, out_specs=(local, local),
                                 in_specs=(local, local, local) + (replicated,) * len(noise)))
  loss, grad = mapped(features, mesh_lib.pad_rows(bank, num_devices), index, *noise)
  return expected, loss, grad * B


@pytest.mark.parametrize('num_devices', [None, 1, 8])
@pytest.mark.parametrize('case', CASES)
def test_loss_and_gradient_equal_the_float64_twin(case, num_devices):
  (loss64, grad64), loss, grad = _call(case, num_devices, jnp.float32)
  # Pallas multiplies float32 as three products of bfloat16 parts: scores to 2^-16, over τ.
  loss_error, grad_error = (1e-4, 1e-4) if case == 'softmax_by_pallas' else (3e-6, 2e-5)
  np.testing.assert_allclose(loss, loss64, rtol=loss_error, atol=loss_error)
  np.testing.assert_allclose(grad, grad64, rtol=grad_error, atol=grad_error)


@pytest.mark.parametrize('case', WIDE)
def test_float64_is_exact(case):
  with jax.enable_x64(True):
    for num_devices in (None, 8):
      (loss64, grad64), loss, grad = _call(case, num_devices, jnp.float64)
      np.testing.assert_allclose(loss, loss64, rtol=1e-12, atol=1e-12)
      np.testing.assert_allclose(grad, grad64, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('block_rows', [1, 7, 29, 64, 202, 203, 1000])  # 7 and 29 divide 203
def test_streamed_softmax_equals_dense_for_any_block_size(block_rows):
  features, bank, index, _ = _inputs(1)
  with jax.enable_x64(True):
    dense = twins.softmax(features, bank, index, TEMPERATURE)
    fn = lambda f: losses.softmax_loss(f, jnp.asarray(bank), jnp.asarray(index),
                                       temperature=TEMPERATURE, block_rows=block_rows)
    loss, pull = jax.vjp(fn, jnp.asarray(features))
    np.testing.assert_allclose(loss, dense[0], rtol=1e-12)
    np.testing.assert_allclose(pull(jnp.ones(B))[0], dense[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('num_devices, block_rows', [(None, None), (None, 29), (None, 64), (8, 7)])
def test_gradient_of_the_class_weights_equals_the_twin(num_devices, block_rows):
  features, weights, index, _ = _inputs(1)
  expected = twins.class_weights_gradient(features, weights, index, TEMPERATURE)

  def fn(features, weights, index, **kwargs):
    kwargs |= dict(temperature=TEMPERATURE, block_rows=block_rows)
    loss = losses.softmax_loss(features, weights, index, **kwargs)
    return losses.class_weights_gradient(features, weights, index, loss, **kwargs)

  with jax.enable_x64(True):
    arrays = [jnp.asarray(features), jnp.asarray(weights), jnp.asarray(index)]
    if num_devices:
      mesh, local = mesh_lib.make(jax.devices()[:num_devices]), P(mesh_lib.AXIS)
      arrays[1] = mesh_lib.pad_rows(arrays[1], num_devices)
      fn = jax.shard_map(functools.partial(fn, axis_name=mesh_lib.AXIS, num_rows=N), mesh=mesh,
                         in_specs=(local,) * 3, out_specs=local)
    gradient = np.asarray(jax.jit(fn)(*arrays))
    np.testing.assert_allclose(gradient[:N], expected, rtol=1e-10, atol=1e-13)
    assert not gradient[N:].any()
    autodiff = jax.grad(lambda w: jnp.mean(losses_dense(arrays[0], w, arrays[2])))(
        jnp.asarray(weights))
    np.testing.assert_allclose(gradient[:N], autodiff, rtol=1e-10, atol=1e-13)


def losses_dense(features, weights, index):
  logits = features @ weights.T / TEMPERATURE
  return jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(B), index]


@pytest.mark.parametrize('case', WIDE)
def test_gradient_equals_finite_differences(case):
  loss_fn, _, num_noise, extra = CASES[case]
  features, bank, index, noise_index = _inputs(num_noise or 1)
  if case != 'proximal':
    extra = dict(extra, temperature=TEMPERATURE)
  with jax.enable_x64(True):
    columns = [jnp.asarray(x) for x in (bank, index, noise_index)[:2 + bool(num_noise)]]
    fn = lambda f: jnp.sum(loss_fn(f, *columns, **extra) * jnp.arange(1, B + 1))
    direction = np.random.default_rng(1).standard_normal((B, D))
    grad = np.sum(jax.grad(fn)(jnp.asarray(features)) * direction)
    numeric = (fn(features + 1e-5 * direction) - fn(features - 1e-5 * direction)) / 2e-5
  np.testing.assert_allclose(grad, numeric, rtol=1e-7)


@pytest.mark.parametrize('num_devices', [None, 8])
@pytest.mark.parametrize('num_noise', [1, 40])
def test_normalizer_equals_the_twin(num_noise, num_devices):
  features, bank, index, noise_index = _inputs(num_noise)
  expected = twins.normalizer(features, bank, index, noise_index, TEMPERATURE)
  arrays = [jnp.asarray(x, jnp.float32) for x in (features, bank)] + [index, noise_index]
  fn = functools.partial(losses.estimate_normalizer, temperature=TEMPERATURE)
  if num_devices:
    mesh = mesh_lib.make(jax.devices()[:num_devices])
    local = P(mesh_lib.AXIS)
    fn = jax.shard_map(functools.partial(fn, axis_name=mesh_lib.AXIS, num_rows=N), mesh=mesh,
                       in_specs=(local, local, local, P()), out_specs=P())
    arrays[1] = mesh_lib.pad_rows(arrays[1], num_devices)
  np.testing.assert_allclose(fn(*arrays), expected, rtol=1e-5)


@pytest.mark.parametrize('case', ['softmax', 'nce_by_matmul', 'sampled_by_matmul'])
def test_the_bank_is_data(case):
  loss_fn, _, num_noise, extra = CASES[case]
  features, bank, index, noise_index = _inputs(num_noise or 1)
  noise = [noise_index] if num_noise else []
  grad = jax.grad(lambda bank: jnp.sum(loss_fn(
      jnp.asarray(features), bank, index, *noise, temperature=TEMPERATURE, **extra)))
  assert not np.any(grad(jnp.asarray(bank)))


@pytest.mark.parametrize('case', ['softmax', 'nce_by_matmul', 'sampled_by_matmul'])
@pytest.mark.parametrize('temperature', [0.002, 50.0])
def test_extreme_temperatures_stay_finite(case, temperature):
  loss_fn, _, num_noise, extra = CASES[case]
  features, bank, index, noise_index = _inputs(num_noise or 1)
  noise = [noise_index] if num_noise else []
  fn = lambda f: jnp.sum(loss_fn(f, bank.astype('f4'), index, *noise, temperature=temperature,
                                 **extra))
  loss, grad = jax.value_and_grad(fn)(jnp.asarray(features, jnp.float32))
  assert np.isfinite(loss) and np.all(np.isfinite(grad))


def test_softmax_where_some_devices_hold_only_padding():
  random = np.random.default_rng(3)
  features, bank = twins.unit_rows(random, 8, D), twins.unit_rows(random, 5, D)  # 5 rows, 8 devices
  index = np.arange(8) % 5
  local = P(mesh_lib.AXIS)
  fn = jax.shard_map(
      functools.partial(losses.softmax_loss, temperature=TEMPERATURE, axis_name=mesh_lib.AXIS,
                        num_rows=5),
      mesh=mesh_lib.make(), in_specs=(local, local, local), out_specs=local)
  loss = fn(features.astype('f4'), mesh_lib.pad_rows(bank.astype('f4'), 8), index)
  np.testing.assert_allclose(loss, twins.softmax(features, bank, index, TEMPERATURE)[0], rtol=1e-5)


@pytest.mark.parametrize('case', ['softmax', 'nce_by_matmul', 'sampled_by_matmul'])
def test_bfloat16_bank_costs_only_its_rounding(case):
  loss_fn, twin, num_noise, extra = CASES[case]
  features, bank, index, noise_index = _inputs(num_noise or 1)
  noise = [noise_index] if num_noise else []
  rounded = np.asarray(jnp.asarray(bank, jnp.bfloat16), np.float64)
  expected, _ = twin(features, rounded, index, *noise, TEMPERATURE, *extra.values())
  loss = loss_fn(jnp.asarray(features, jnp.float32), jnp.asarray(bank, jnp.bfloat16), index, *noise,
                 temperature=TEMPERATURE, **extra)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, atol=0.15)  # scores to 2^-9, over τ, in M + 1 columns


@pytest.mark.parametrize('num_devices', [None, 8])
@pytest.mark.parametrize('loss_fn, extra', [
    (losses.nce_loss, {'normalizer': NORMALIZER}), (losses.sampled_softmax_loss, {})])
def test_shared_noise_equals_the_same_rows_given_to_each_image(loss_fn, extra, num_devices):
  features, bank, index, noise_index = (jnp.asarray(a) for a in _inputs(40))
  features, bank = features.astype('f4'), bank.astype('f4')

  def call(noise):
    if num_devices is None:
      fn = lambda f: loss_fn(f, bank, index, noise, temperature=TEMPERATURE, **extra)
      return fn(features), jax.grad(lambda f: fn(f).sum())(features)
    kwargs = dict(temperature=TEMPERATURE, axis_name=mesh_lib.AXIS, num_rows=N, **extra)

    def device(f, bank, index):
      fn = lambda f: loss_fn(f, bank, index, noise, **kwargs)
      return fn(f), jax.grad(lambda f: fn(f).sum())(f)

    return jax.jit(jax.shard_map(
        device, mesh=mesh_lib.make(), in_specs=(P(mesh_lib.AXIS),) * 3,
        out_specs=P(mesh_lib.AXIS)))(features, mesh_lib.pad_rows(bank, num_devices), index)

  shared = noise_index[0]
  for found, expected in zip(call(shared), call(jnp.tile(shared, (B, 1)))):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('most_held', [1, 1000])  # queries one by one; some at a time
@pytest.mark.parametrize('num_noise, shared', [(1, False), (40, False), (40, True)])
def test_sampled_losses_hold_little_at_once(num_noise, shared, most_held):
  features, bank, index, noise_index = (jnp.asarray(a) for a in _inputs(num_noise))
  noise_index = noise_index[0] if shared else noise_index
  arrays = features.astype('f4'), bank.astype('f4'), index, noise_index
  for fn, extra in ((losses.nce_loss, {'normalizer': NORMALIZER}),
                    (losses.sampled_softmax_loss, {}), (losses.estimate_normalizer, {})):
    call = functools.partial(fn, temperature=TEMPERATURE, **extra)
    found = jax.value_and_grad(lambda f: call(f, *arrays[1:], most_held=most_held).sum())(arrays[0])
    expected = jax.value_and_grad(lambda f: call(f, *arrays[1:]).sum())(arrays[0])
    for part, whole in zip(found, expected):
      np.testing.assert_allclose(part, whole, rtol=1e-5, atol=1e-5)


def _two_views(num_devices, dtype):
  """(loss [2, B], gradients [2, B, D]): by the twin, and by the package."""
  random = np.random.default_rng(5)
  first = twins.unit_rows(random, B, D)
  second = twins.unit_rows(random, B, D) + 2 * first
  second /= np.linalg.norm(second, axis=1, keepdims=True)
  weight = random.uniform(0.5, 1.5, (2, B))
  expected = twins.other_views(first, second, TEMPERATURE, weight)

  def both(views, weight, axis_name=None):
    loss = lambda x: losses.other_view_loss(x.reshape(-1, D), temperature=TEMPERATURE,
                                            axis_name=axis_name).reshape(2, -1)
    value, pull = jax.vjp(loss, views)
    return value, *pull(weight)

  if num_devices:
    local = P(None, mesh_lib.AXIS)
    both = jax.jit(jax.shard_map(
        functools.partial(both, axis_name=mesh_lib.AXIS), in_specs=local, out_specs=local,
        mesh=mesh_lib.make(jax.devices()[:num_devices])))
  return expected, both(jnp.asarray([first, second], dtype), jnp.asarray(weight, dtype))


@pytest.mark.parametrize('num_devices', [None, 1, 2, 4, 8])
def test_two_views_equal_the_twin_on_any_number_of_devices(num_devices):
  with jax.enable_x64(True):
    for expected, found in zip(*_two_views(num_devices, jnp.float64)):
      np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)
  for expected, found in zip(*_two_views(num_devices, jnp.float32)):
    np.testing.assert_allclose(found, expected, rtol=3e-5, atol=3e-5)


def test_the_gradient_of_two_views_is_that_of_finite_differences():
  with jax.enable_x64(True):
    features = jnp.asarray(twins.unit_rows(np.random.default_rng(6), 2 * B, D))
    fn = functools.partial(losses.other_view_loss, temperature=TEMPERATURE)
    jax.test_util.check_grads(fn, (features,), order=1, modes=['rev'], rtol=1e-6)


@pytest.mark.parametrize('num_devices', [None, 8])
def test_mined_rows_are_the_most_similar_others(num_devices):
  features, bank, index, _ = _inputs(1)
  score = features @ bank.T
  own = score[np.arange(B), index]
  score[np.arange(B), index] = -np.inf
  ranked = np.argsort(-score, axis=1)
  below = np.argmax(np.where(score < own[:, None], score, -np.inf), axis=1)
  below[own <= np.sort(score, axis=1)[:, 1]] = -1  # none is less similar
  arrays = features.astype('f4'), bank.astype('f4'), jnp.asarray(index)
  for fn, expected in (
      (functools.partial(losses.nearest, count=7), ranked[:, :7]),
      (functools.partial(losses.nearest, count=1), ranked[:, :1]),
      (functools.partial(losses.nearest, count=1, below_own=True), below[:, None])):
    if num_devices is None:
      found = fn(*arrays)
    else:
      local = P(mesh_lib.AXIS)
      found = jax.jit(jax.shard_map(
          functools.partial(fn, axis_name=mesh_lib.AXIS, num_rows=N), mesh=mesh_lib.make(),
          in_specs=(local,) * 3, out_specs=P(), check_vma=False))(
              arrays[0], mesh_lib.pad_rows(arrays[1], 8), arrays[2])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_copy_of_the_own_row_is_no_semi_hard_negative(dtype):
  random = np.random.default_rng(7)
  rows = twins.unit_rows(random, 64, 128)
  bank = jnp.asarray(np.concatenate([rows, rows]), dtype)
  features = jnp.asarray(twins.unit_rows(random, 64, 128), jnp.float32)
  found = losses.nearest(features, bank, jnp.arange(64), count=1, below_own=True)[:, 0]
  assert not (np.asarray(found) % 64 == np.arange(64)).any()


def test_without_a_less_similar_row_there_is_no_semi_hard_one():
  bank = np.eye(4, D, dtype=np.float32)
  features = -bank  # the own row is the farthest
  found = losses.nearest(features, bank, jnp.arange(4), count=1, below_own=True)
  assert found.tolist() == [[-1]] * 4
