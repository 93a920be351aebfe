import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import bank as bank_lib
from instdisc_jax import checkpoint, errors, train
from instdisc_jax.data import order, pictures, resident
from instdisc_jax.models import resnet
from tests.conftest import small_config

N, B = 45, 16  # no device count divides N
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 12, 12, 3), dtype=np.uint8)
PICTURES = pictures.Pictures(IMAGES, None, '')


def _config(**loss):
  """Mostly the same settings, so that tests load what others compiled."""
  config = small_config()
  config.optimizer.learning_rate = 1e-4
  config.model.sync_batch_norm = True
  config.batch_size = B
  config.epochs = 20
  config.loss.noise_count = 20
  config.loss.update(loss)
  return config


def _set_up(config, num_devices, step_fn=train.train_step):
  """(state, run_steps, images) of a one-block ResNet over so many devices."""
  mesh = train.make_mesh(jax.devices()[:num_devices])
  encoder = resnet.ResNet(
      resnet.BasicBlock, (1,), True, embedding_dim=config.model.embedding_dim, width=4,
      dtype=config.model.dtype,
      batch_norm_axis=train.AXIS if config.model.sync_batch_norm else None)
  optimizer = train.make_optimizer(config, N)
  state = train.make_init(config, encoder, optimizer, N, IMAGES.shape[1:], mesh)()
  run_steps = train.map_over_mesh(mesh, functools.partial(
      step_fn, config=config, encoder=encoder, optimizer=optimizer, num_rows=N))
  return state, run_steps, mesh


def _run(config, num_devices, num_steps, per_dispatch=1):
  """(losses, grad norms, bank [N, D], state) after so many steps."""
  state, run_steps, mesh = _set_up(config, num_devices)
  history = []
  feed = resident.Resident(PICTURES, mesh, config.seed, B, per_dispatch)
  for step in range(0, num_steps, per_dispatch):
    index = feed.at(step)[1]
    count = min(per_dispatch, num_steps - step)
    state, metrics = run_steps(state, IMAGES, index, count)
    history.append(jax.tree.map(lambda x: np.asarray(x)[:count], metrics))
  history = jax.tree.map(lambda *x: np.concatenate(x), *history)
  return history, np.asarray(state.bank)[:N], state


@pytest.fixture(scope='module')
def float64_runs():
  config = _config()
  config.optimizer.learning_rate = small_config().optimizer.learning_rate
  config.model.dtype = config.bank.dtype = 'float64'
  with jax.enable_x64(True):
    return [_run(config, n, 20)[:2] for n in (1, 2, 4, 8)]


@pytest.fixture(scope='module')
def float32_runs():
  config = _config()
  return [_run(config, n, 20)[:2] for n in (1, 2, 4, 8)]


def test_20_steps_are_the_same_on_1_2_4_and_8_devices_in_float64(float64_runs):
  (history, bank), *others = float64_runs
  assert np.ptp(history['loss']) > 0.5  # it does move
  for other_history, other_bank in others:
    np.testing.assert_allclose(other_history['loss'], history['loss'], rtol=1e-8)
    np.testing.assert_allclose(other_bank, bank, atol=1e-7)


@pytest.mark.slow
def test_20_steps_are_the_same_on_1_2_4_and_8_devices_in_float32(float32_runs):
  (history, bank), *others = float32_runs
  for other_history, other_bank in others:
    np.testing.assert_allclose(other_history['loss'], history['loss'], rtol=1e-5)
    np.testing.assert_allclose(other_bank, bank, atol=1e-4)


def test_gradient_scale_does_not_depend_on_the_device_count(float64_runs):
  (history, _), *others = float64_runs
  assert history['grad_norm'].min() > 0.01
  for other, _ in others:
    np.testing.assert_allclose(other['grad_norm'], history['grad_norm'], rtol=1e-7)


@pytest.mark.parametrize('loss', [
    dict(name='nce', normalizer='ema', proximal_weight=3.0),
    pytest.param(dict(name='sampled_softmax'), marks=pytest.mark.slow)])
def test_the_sampled_losses_are_the_same_on_1_and_8_devices(loss):
  config = _config(**loss)
  config.model.dtype = config.bank.dtype = 'float64'
  with jax.enable_x64(True):
    (history, bank, _), (history8, bank8, _) = (_run(config, n, 6) for n in (1, 8))
  for name, values in history.items():
    np.testing.assert_allclose(history8[name], values, rtol=1e-8, atol=1e-12, err_msg=name)
  np.testing.assert_allclose(bank8, bank, atol=1e-7)


def test_many_steps_in_one_dispatch_equal_single_steps():
  config = _config()
  history, bank, state = _run(config, 1, 5)
  together, bank_together, state_together = _run(config, 1, 5, per_dispatch=8)
  np.testing.assert_allclose(together['loss'], history['loss'], rtol=1e-5)
  np.testing.assert_allclose(bank_together, bank, atol=1e-4)
  assert int(state_together.step) == int(state.step) == 5


def test_the_step_is_traced_once_and_donates_its_state():
  step_fn = chex.assert_max_traces(train.train_step, n=1)
  config = _config()
  state, run_steps, mesh = _set_up(config, 2, step_fn)
  feed = resident.Resident(PICTURES, mesh, 0, B, 1)
  for step in range(7):  # past the end of two epochs
    old = state
    state, _ = run_steps(state, *feed.at(step), 1)
    assert old.bank.is_deleted() and jax.tree.leaves(old.params)[0].is_deleted()
  assert int(state.step) == 7


def test_bank_rows_move_to_the_features_of_their_own_images():
  config = _config()
  config.bank.momentum = 0.0  # so that a row is its image's feature
  config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), brightness=0.0, contrast=0.0,
                        saturation=0.0, hue=0.0, grayscale=0.0)
  config.optimizer.learning_rate = 1e-12
  state, run_steps, mesh = _set_up(config, 8)
  before = np.asarray(state.bank)
  index = order.batch_index(0, 0, B, N)
  state, _ = run_steps(state, *resident.Resident(PICTURES, mesh, 0, B, 1).at(0), 1)
  after = np.asarray(state.bank)
  seen = np.isin(np.arange(len(after)), index)
  np.testing.assert_array_equal(after[~seen], before[~seen])
  np.testing.assert_allclose(np.linalg.norm(after[seen], axis=1), 1, rtol=1e-5)
  assert len(after) == 48 and not after[N:].any()  # padded to 8 devices
  # The same picture without augmentation, through the encoder in the same batch, is that row.
  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=16, width=4)
  pictures = (IMAGES[index] / 255 - np.array(config.augment.mean)) / np.array(config.augment.std)
  features, _ = encoder.apply({'params': state.params, 'batch_stats': state.batch_stats},
                              jnp.asarray(pictures, jnp.float32), train=True,
                              mutable=['batch_stats'])
  np.testing.assert_allclose(after[index], features, atol=2e-4)


def test_normalizer_is_frozen_followed_or_given():
  for normalizer in ('first_batch', 'ema', '123.5'):
    loss = dict(name='nce', normalizer=normalizer, normalizer_decay=0.9)
    _, _, history = _linear_updates(loss, 2, 1, num_steps=6, normalizer=0.0)
    z = history['normalizer']
    estimate = z * np.exp(history['normalizer_drift'])
    assert np.ptp(estimate) > 0.1
    if normalizer == 'first_batch':
      np.testing.assert_array_equal(z, z[0])
      np.testing.assert_allclose(estimate[0], z[0], rtol=1e-6)
    elif normalizer == 'ema':
      np.testing.assert_allclose(z[1:], 0.9 * z[:-1] + 0.1 * estimate[1:], rtol=1e-5)
    else:
      np.testing.assert_array_equal(z, 123.5)


def test_the_proximal_term_adds_its_weight_times_the_penalty():
  plain, _, _ = _run(_config(), 2, 1)
  history, _, _ = _run(_config(proximal_weight=7.0), 2, 1)
  assert history['proximal_penalty'][0] > 0.1
  np.testing.assert_allclose(history['loss'], plain['loss'] + 7 * history['proximal_penalty'],
                             rtol=1e-5)


def test_per_device_batch_norm_keeps_one_set_of_statistics():
  config = _config()
  config.model.sync_batch_norm = False
  history, _, state = _run(config, 8, 3)
  assert np.all(np.isfinite(history['loss']))
  for stats in jax.tree.leaves(state.batch_stats):
    copies = [np.asarray(shard.data) for shard in stats.addressable_shards]
    assert all(np.array_equal(copies[0], copy) for copy in copies)
  config.model.sync_batch_norm = True  # statistics of 2 images and of 16 are not the same
  assert abs(_run(config, 8, 3)[0]['loss'][0] - history['loss'][0]) > 1e-4


def test_fresh_states_do_not_depend_on_the_device_count():
  states = [_set_up(_config(), n)[0] for n in (1, 8)]
  for a, b in zip(jax.tree.leaves(states[0].params), jax.tree.leaves(states[1].params)):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(states[0].bank, np.asarray(states[1].bank)[:N])
  assert len(states[1].bank.addressable_shards[0].data) == 6  # 48 rows over 8 devices


def test_learning_rate_falls_at_the_milestones():
  config = _config()
  config.optimizer.milestones = (2, 3)
  config.optimizer.learning_rate = 0.5
  schedule = train.learning_rate_schedule(config, N)
  rates = [float(schedule(t)) for t in range(12)]
  epochs = [t * B // N for t in range(12)]
  np.testing.assert_allclose(rates, [0.5 * 0.1 ** ((e >= 2) + (e >= 3)) for e in epochs], rtol=1e-6)


def test_epochs_end_with_the_step_that_completes_them():
  config = _config()
  config.epochs = 3
  assert train.total_steps(config, N) == 9  # 135 images in batches of 16
  config.steps = 4
  assert train.total_steps(config, N) == 4


def test_optimizer_is_pytorch_sgd():
  config = _config()
  config.optimizer.update(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
  optimizer = train.make_optimizer(config, N)
  w, velocity = 2.0, 0.0
  params, state = jnp.array(w), optimizer.init(jnp.array(w))
  for grad in (1.0, -0.5, 0.25):
    updates, state = optimizer.update(jnp.array(grad), state, params)
    params = params + updates
    velocity = 0.9 * velocity + grad + 0.01 * w
    w -= 0.1 * velocity
    np.testing.assert_allclose(params, w, rtol=1e-6)


def test_noise_of_the_step_is_the_bank_s_own_draw(monkeypatch):
  seen = []
  original = bank_lib.noise
  def spy(key, step, index, noise_count, num_rows):
    seen.append((index.shape, noise_count, num_rows))
    return original(key, step, index, noise_count, num_rows)
  monkeypatch.setattr(bank_lib, 'noise', spy)
  state, run_steps, mesh = _set_up(_config(name='sampled_softmax'), 4)
  run_steps.trace(state, *resident.Resident(PICTURES, mesh, 0, B, 1).at(0), 1)
  assert seen[0] == ((B,), 20, N)  # for the global batch, over the true rows


def _linear_updates(loss, num_devices, accumulate_steps, num_steps=1, normalizer=80.0):
  """(parameters, bank [N, D], metrics) after steps of a linear encoder: it has no batch norm."""
  random = np.random.default_rng(0)
  config = _config(**loss)
  weights = jnp.asarray(random.standard_normal((5, 8)))
  optimizer = train.make_optimizer(config, N)
  mesh = train.make_mesh(jax.devices()[:num_devices])
  bank = bank_lib.normalize(jnp.asarray(random.standard_normal((N, 8))))
  state = train.TrainState(
      step=jnp.int32(0), params=weights, batch_stats={}, opt_state=optimizer.init(weights),
      bank=train.pad_rows(bank, num_devices), normalizer=jnp.asarray(normalizer, weights.dtype))
  if loss['name'] == 'parametric_softmax':
    rows = train.pad_rows(jnp.asarray(random.standard_normal((N, 8))), num_devices)
    state = state.replace(classifier={'weights': rows, 'momentum': rows / 3})
  images, index = random.standard_normal((B, 5)), random.permutation(N)[:B]
  noise_index = random.integers(0, N, 30 if loss.get('shared_noise') else (B, 30))
  step = functools.partial(
      train.update, encode=lambda w, stats, x: (bank_lib.normalize(x @ w), stats),
      optimizer=optimizer, loss=config.loss, bank_momentum=0.5, num_rows=N, axis_name=train.AXIS,
      accumulate_steps=accumulate_steps)
  split, whole = jax.P(train.AXIS), jax.P()
  run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(train.STATE_SPECS, split, split, whole),
                              out_specs=(train.STATE_SPECS, whole)))
  history = []
  for _ in range(num_steps):
    state, metrics = run(state, images.astype(weights.dtype), index, noise_index)
    history.append(jax.device_get(metrics))
  history = jax.tree.map(lambda *x: np.stack(x), *history) if history else None
  rows = jax.tree.map(lambda x: np.asarray(x)[:N], (state.bank, state.classifier))
  return np.asarray(state.params), rows, history


@pytest.mark.parametrize('num_devices', [1, 4])
@pytest.mark.parametrize('loss', [
    dict(name='softmax'), dict(name='nce', proximal_weight=3.0),
    dict(name='nce', shared_noise=True), dict(name='sampled_softmax'),
    dict(name='parametric_softmax', proximal_weight=2.0)])
def test_accumulated_parts_make_the_same_step_as_the_whole_batch(loss, num_devices):
  with jax.enable_x64(True):
    params, rows, metrics = _linear_updates(loss, 1, 1)
    params_parts, rows_parts, metrics_parts = _linear_updates(loss, num_devices, 4)
  np.testing.assert_allclose(params_parts, params, rtol=1e-10)
  chex.assert_trees_all_close(rows_parts, rows, rtol=1e-10)
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(metrics_parts[name], metrics[name], rtol=1e-10)


def test_accumulation_runs_in_the_whole_step_with_one_bank_update():
  config = _config()
  config.accumulate_steps = 4
  history, bank, state = _run(config, 2, 1)
  assert np.isfinite(history['loss']).all() and int(state.step) == 1
  start = np.asarray(_set_up(config, 2)[0].bank)[:N]
  assert (np.abs(bank - start).max(axis=1) > 1e-3).sum() == B


def test_class_weights_take_the_encoder_s_sgd_and_the_bank_its_features():
  loss = dict(name='parametric_softmax')
  with jax.enable_x64(True):
    _, (bank, before), _ = _linear_updates(loss, 1, 1, num_steps=0)
    _, (later_bank, after), _ = _linear_updates(loss, 4, 1)
  sgd = _config().optimizer
  gradient = after['momentum'] - sgd.momentum * before['momentum']
  gradient -= sgd.weight_decay * before['weights']
  assert np.abs(gradient).min() > 0  # of every row: all are in the denominator
  np.testing.assert_allclose(gradient.sum(), 0, atol=1e-8)  # what is pulled is pushed elsewhere
  np.testing.assert_allclose(after['weights'],
                             before['weights'] - sgd.learning_rate * after['momentum'], rtol=1e-12)
  assert (np.abs(later_bank - bank).max(axis=1) > 0).sum() == B


@pytest.mark.slow
def test_the_parametric_softmax_is_the_same_on_1_and_8_devices_and_comes_back(tmp_path):
  config = _config(name='parametric_softmax')
  config.model.dtype = 'float64'
  with jax.enable_x64(True):
    (history, _, state), (history8, _, state8) = (_run(config, n, 4) for n in (1, 8))
    np.testing.assert_allclose(history8['loss'], history['loss'], rtol=1e-8)
    chex.assert_trees_all_close(jax.tree.map(lambda x: np.asarray(x)[:N], state8.classifier),
                                jax.device_get(state.classifier), atol=1e-9)
    assert history['loss'][0] == pytest.approx(np.log(N), abs=0.5 / config.loss.temperature)
    checkpoints = checkpoint.Checkpoints(tmp_path / 'c', 1, N, train.make_mesh())
    checkpoints.save(state8)
    like, _, mesh = _set_up(config, 2)
    checkpoints.close()
    restored = checkpoint.Checkpoints(tmp_path / 'c', 1, N, mesh).restore(like)
  for name in ('weights', 'momentum'):
    np.testing.assert_array_equal(np.asarray(restored.classifier[name])[:N],
                                  np.asarray(state8.classifier[name])[:N])
    assert len(restored.classifier[name].addressable_shards[0].data) == 23


def test_the_cosine_rises_falls_and_ends_with_the_run():
  config = _config()
  config.optimizer.update(schedule='cosine', warmup_epochs=2.0, learning_rate=0.4)
  schedule = train.learning_rate_schedule(config, N)  # 20 epochs of 45 images by 16: 57 steps
  rates = np.array([schedule(step) for step in range(58)])
  np.testing.assert_allclose(rates[[0, 6, 57]], [0, 0.4, 0], atol=1e-7)
  assert (np.diff(rates[:7]) > 0).all() and (np.diff(rates[6:]) < 0).all()
  config.steps = 3  # shorter than the rise
  assert np.isfinite([train.learning_rate_schedule(config, N)(step) for step in range(3)]).all()


@pytest.mark.parametrize('spoil, words', [
    (lambda state: state.replace(bank=state.bank.at[5, 2].set(np.inf)), 'bank row 5 is'),
    (lambda state: state.replace(params={'w': state.params['w'] * np.nan}), 'params is'),
    (lambda state: state.replace(normalizer=state.normalizer / 0), 'normalizer is')])
def test_nothing_that_is_not_finite_is_saved(spoil, words):
  state = train.TrainState(
      step=jnp.int32(9), params={'w': jnp.ones((2, 3))}, batch_stats={}, opt_state=(),
      bank=jnp.ones((8, 4)), normalizer=jnp.float32(1))
  train._check_finite(state, saved=6)
  with pytest.raises(errors.RunError, match=f'{words}.* at step 9, .*checkpoint of step 6 is kept'):
    train._check_finite(spoil(state), saved=6)


def test_the_mean_norm_tells_collapsed_features_from_spread_ones():
  spread = np.eye(8, dtype=np.float32)
  alike = np.repeat(spread[:1], 8, axis=0)
  for features, norm in ((spread, 8**-0.5), (alike, 1.0)):
    assert float(train._mean_norm(jnp.asarray(features), None)) == pytest.approx(norm)
    mesh = train.make_mesh(jax.devices()[:4])
    sharded = jax.shard_map(lambda f: train._mean_norm(f, train.AXIS), mesh=mesh,
                            in_specs=P(train.AXIS), out_specs=P())(features)
    assert float(sharded) == pytest.approx(norm)
