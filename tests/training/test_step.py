import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import bank as bank_lib
from instdisc_jax.data import feeds, order, views
from instdisc_jax.models import resnet
from instdisc_jax.runtime import checkpoint
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import optimizer as optimizer_lib
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import step as step_lib
from tests.conftest import small_config
from tests.training import tiny
from tests.training.tiny import IMAGES, PIXELS, B, N


def _set_up(config, num_devices, per_dispatch=1, step_fn=step_lib.train_step):
  """(state, run_steps, feed) of the tiny run over this many devices."""
  setup = tiny.make_setup(config, num_devices)
  feed = feeds.Resident(IMAGES, setup.mesh, order.Chain(config.seed, B, N), per_dispatch)
  return tiny.fresh_state(setup), step_lib.over_mesh(setup, feed, step_fn), feed


def _run(config, num_devices, num_steps, per_dispatch=1):
  """({metric: [num_steps]}, bank [N, D], state) after this many steps."""
  state, run_steps, feed = _set_up(config, num_devices, per_dispatch)
  history = []
  for step in range(0, num_steps, per_dispatch):
    count = min(per_dispatch, num_steps - step)
    state, metrics = run_steps(state, feed.at(step), count)
    history.append(jax.tree.map(lambda x: np.asarray(x)[:count], metrics))
  history = jax.tree.map(lambda *x: np.concatenate(x), *history)
  return history, np.asarray(state.bank)[:N], state


@functools.cache
def _float64_run(num_devices):
  config = tiny.config()
  config.optimizer.learning_rate = small_config().optimizer.learning_rate
  config.model.dtype = config.bank.dtype = 'float64'
  with jax.enable_x64(True):
    return _run(config, num_devices, 20)[:2]


@pytest.fixture(scope='module')
def float32_runs():
  config = tiny.config()
  return [_run(config, n, 20)[:2] for n in (1, 2, 4, 8)]


@pytest.mark.parametrize('devices', [(8,), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_20_steps_are_the_same_on_1_2_4_and_8_devices_in_float64(devices):
  (history, bank), *others = map(_float64_run, (1, *devices))
  assert np.ptp(history['loss']) > 0.5  # it does change
  for other_history, other_bank in others:
    np.testing.assert_allclose(other_history['loss'], history['loss'], rtol=1e-8)
    np.testing.assert_allclose(other_bank, bank, atol=1e-7)


@pytest.mark.slow
def test_20_steps_are_the_same_on_1_2_4_and_8_devices_in_float32(float32_runs):
  (history, bank), *others = float32_runs
  for other_history, other_bank in others:
    np.testing.assert_allclose(other_history['loss'], history['loss'], rtol=1e-5)
    np.testing.assert_allclose(other_bank, bank, atol=1e-4)


def test_gradient_scale_does_not_depend_on_the_device_count():
  (history, _), *others = map(_float64_run, (1, 8))
  assert history['grad_norm'].min() > 0.01
  for other, _ in others:
    np.testing.assert_allclose(other['grad_norm'], history['grad_norm'], rtol=1e-7)


@pytest.mark.parametrize('devices', [(8,), pytest.param((2, 4), marks=pytest.mark.slow)])
@pytest.mark.parametrize('loss', [
    dict(name='nce', normalizer='ema', proximal_weight=3.0),
    dict(views=2, neighbors=3, neighbors_from_epoch=1, proximal_weight=3.0),
    pytest.param(dict(name='sampled_softmax'), marks=pytest.mark.slow),
    pytest.param(dict(views=2), marks=pytest.mark.slow),
    pytest.param(dict(neighbors=3, neighbors_from_epoch=0), marks=pytest.mark.slow),
    *(pytest.param(dict(name='triplet', mining=mining), marks=pytest.mark.slow)
      for mining in ('semi_hard', 'hardest', 'sampled'))], ids=str)
def test_every_loss_is_the_same_on_1_2_4_and_8_devices(loss, devices):
  config = tiny.config(**loss)
  config.model.dtype = config.bank.dtype = 'float64'
  with jax.enable_x64(True):
    (history, bank, _), *others = (_run(config, n, 6) for n in (1, *devices))
  for other_history, other_bank, _ in others:
    for name, values in history.items():
      np.testing.assert_allclose(other_history[name], values, rtol=1e-8, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(other_bank, bank, atol=1e-7)


def test_neighbors_become_positives_from_their_epoch_on():
  """N / B = 2.8: step 3 is the first of epoch 1."""
  plain, later = (_run(tiny.config(**loss), 1, 5)[0]['loss'] for loss in (
      {}, dict(neighbors=3, neighbors_from_epoch=1)))
  np.testing.assert_allclose(later[:3], plain[:3], rtol=1e-5)
  assert (later[3:] < plain[3:] - 0.1).all()


def test_the_proximal_term_leaves_out_rows_that_were_never_visited(monkeypatch):
  """The 45 images are in steps 0 to 2, of which the last has 3 of the next epoch."""
  config = tiny.config(proximal_weight=3.0)
  penalty = _run(config, 1, 5)[0]['proximal_penalty']
  monkeypatch.setattr(state_lib.Setup, 'inherits_rows', True)
  of_all = _run(config, 1, 5)[0]['proximal_penalty']
  assert (penalty[:2] == 0).all() and (of_all[:2] > 1).all()
  assert 0 < penalty[2] < 0.3 * of_all[2] and (penalty[3:] > 0).all()


@pytest.mark.parametrize('num_devices', [1, 4])
def test_two_visits_in_one_batch_are_no_past(num_devices):
  """Of 5 images: places 0 to 4 are their first visits, and the batch has the places 4 to 7."""
  local = P(mesh_lib.AXIS)
  visited = jax.jit(jax.shard_map(
      functools.partial(step_lib._visited, num_rows=5), mesh=mesh_lib.make(
          jax.devices()[:num_devices]), in_specs=(local, local), out_specs=local))
  place, index = jnp.arange(4, 8, dtype=jnp.uint32), jnp.array([3, 0, 3, 1])
  assert visited(place, index).tolist() == [False, True, False, True]
  assert visited(place + 4, index).tolist() == [True] * 4


def test_the_row_moves_to_the_mean_of_two_views():
  config = tiny.config(views=2)
  config.bank.momentum, config.optimizer.learning_rate = 0.0, 1e-12
  config.model.sync_batch_norm = False  # so that the encoder runs outside the mesh
  state, run_steps, feed = _set_up(config, 1)
  setup, (images, index) = tiny.make_setup(config, 1), feed.at(0)
  place = jnp.arange(B, dtype=jnp.uint32)
  drawn = [views.draw(config, views.key(config.seed, place, index[0], view), images[index[0]])
           for view in (0, 1)]
  variables = {'params': state.params, 'batch_stats': state.batch_stats}
  features, _ = setup.encoder.apply(variables, jnp.concatenate(drawn), train=True,
                                    mutable=['batch_stats'])
  total = np.asarray(features[:B] + features[B:])
  state, _ = run_steps(state, feed.at(0), 1)
  expected = total / np.linalg.norm(total, axis=1, keepdims=True)
  np.testing.assert_allclose(np.asarray(state.bank)[np.asarray(index[0])], expected, atol=1e-4)
  assert np.abs(drawn[0] - drawn[1]).max() > 0.1


def test_many_steps_in_one_dispatch_equal_single_steps():
  config = tiny.config()
  history, bank, state = _run(config, 1, 5)
  together, bank_together, state_together = _run(config, 1, 5, per_dispatch=8)
  np.testing.assert_allclose(together['loss'], history['loss'], rtol=1e-5)
  np.testing.assert_allclose(bank_together, bank, atol=1e-4)
  assert int(state_together.step) == int(state.step) == 5


def test_the_step_is_traced_once_and_donates_its_state():
  step_fn = chex.assert_max_traces(step_lib.train_step, n=1)
  state, run_steps, feed = _set_up(tiny.config(), 2, step_fn=step_fn)
  for step in range(7):  # past the end of two epochs
    old = state
    state, _ = run_steps(state, feed.at(step), 1)
    assert old.bank.is_deleted() and jax.tree.leaves(old.params)[0].is_deleted()
  assert int(state.step) == 7


def test_bank_rows_move_to_the_features_of_their_own_images():
  config = tiny.config()
  config.bank.momentum = 0.0  # so that a row is its image's feature
  config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), brightness=0.0, contrast=0.0,
                        saturation=0.0, hue=0.0, grayscale=0.0)
  config.optimizer.learning_rate = 1e-12
  state, run_steps, feed = _set_up(config, 8)
  before = np.asarray(state.bank)
  index = order.Chain(0, B, N).batch(0)
  state, _ = run_steps(state, feed.at(0), 1)
  after = np.asarray(state.bank)
  seen = np.isin(np.arange(len(after)), index)
  np.testing.assert_array_equal(after[~seen], before[~seen])
  np.testing.assert_allclose(np.linalg.norm(after[seen], axis=1), 1, rtol=1e-5)
  assert len(after) == 48 and not after[N:].any()  # padded to 8 devices
  # The same image without augmentation, through the encoder in the same batch, is that row.
  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=16, width=4)
  images = (PIXELS[index] / 255 - np.array(config.augment.mean)) / np.array(config.augment.std)
  features, _ = encoder.apply({'params': state.params, 'batch_stats': state.batch_stats},
                              jnp.asarray(images, jnp.float32), train=True,
                              mutable=['batch_stats'])
  np.testing.assert_allclose(after[index], features, atol=2e-4)


def test_the_normalizer_is_frozen_averaged_or_given():
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


def test_the_proximal_term_adds_its_weight_times_the_penalty(monkeypatch):
  monkeypatch.setattr(state_lib.Setup, 'inherits_rows', True)
  plain, _, _ = _run(tiny.config(), 2, 1)
  history, _, _ = _run(tiny.config(proximal_weight=7.0), 2, 1)
  assert history['proximal_penalty'][0] > 0.1
  np.testing.assert_allclose(history['loss'], plain['loss'] + 7 * history['proximal_penalty'],
                             rtol=1e-5)


def test_per_device_batch_norm_keeps_one_set_of_statistics():
  config = tiny.config()
  config.model.sync_batch_norm = False
  history, _, state = _run(config, 8, 3)
  assert np.all(np.isfinite(history['loss']))
  for stats in jax.tree.leaves(state.batch_stats):
    copies = [np.asarray(shard.data) for shard in stats.addressable_shards]
    assert all(np.array_equal(copies[0], copy) for copy in copies)
  config.model.sync_batch_norm = True  # statistics of 2 images and of 16 are not the same
  assert abs(_run(config, 8, 3)[0]['loss'][0] - history['loss'][0]) > 1e-4


def test_the_step_takes_its_noise_from_the_bank(monkeypatch):
  seen = []
  original = bank_lib.noise
  def spy(key, step, index, noise_count, num_rows):
    seen.append((index.shape, noise_count, num_rows))
    return original(key, step, index, noise_count, num_rows)
  monkeypatch.setattr(bank_lib, 'noise', spy)
  state, run_steps, feed = _set_up(tiny.config(name='sampled_softmax'), 4)
  run_steps.trace(state, feed.at(0), 1)
  assert seen[0] == ((B,), 20, N)  # for the global batch, over the true rows


def _linear_updates(loss, num_devices, accumulate_steps, num_steps=1, normalizer=80.0,
                    kernel='xla'):
  """(parameters, bank [N, D], metrics) after steps of a linear encoder: it has no batch norm."""
  random = np.random.default_rng(0)
  config = tiny.config(**loss)
  config.accumulate_steps, config.bank.momentum = accumulate_steps, 0.5
  weights = jnp.asarray(random.standard_normal((5, 8)))
  optimizer = optimizer_lib.make(config, N)
  mesh = mesh_lib.make(jax.devices()[:num_devices])
  bank = bank_lib.normalize(jnp.asarray(random.standard_normal((N, 8))))
  state = state_lib.TrainState(
      step=jnp.int32(0), params=weights, batch_stats={}, opt_state=optimizer.init(weights),
      bank=mesh_lib.pad_rows(bank, num_devices), normalizer=jnp.asarray(normalizer, weights.dtype))
  if loss['name'] == 'parametric_softmax':
    rows = mesh_lib.pad_rows(jnp.asarray(random.standard_normal((N, 8))), num_devices)
    state = state.replace(classifier={'weights': rows, 'momentum': rows / 3})
  shape = (B, 2, 5) if loss.get('views') == 2 else (B, 5)
  images, index = random.standard_normal(shape), random.permutation(N)[:B]
  noise_index = random.integers(0, N, 30 if loss.get('shared_noise') else (B, 30))
  step = functools.partial(
      step_lib.update, encode=lambda w, stats, x: (bank_lib.normalize(x @ w), stats),
      optimizer=optimizer, config=config, num_rows=N, axis_name=mesh_lib.AXIS, kernel=kernel)
  sharded, replicated = P(mesh_lib.AXIS), P()
  inputs = sharded, sharded, replicated
  run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(state_lib.SPECS, inputs),
                              out_specs=(state_lib.SPECS, replicated)))
  history = []
  for _ in range(num_steps):
    state, metrics = run(state, (images.astype(weights.dtype), index, noise_index))
    history.append(jax.device_get(metrics))
  history = jax.tree.map(lambda *x: np.stack(x), *history) if history else None
  rows = jax.tree.map(lambda x: np.asarray(x)[:N], (state.bank, state.classifier))
  return np.asarray(state.params), rows, history


@pytest.mark.parametrize('num_devices', [1, 4])
@pytest.mark.parametrize('loss', [
    dict(name='softmax'), dict(name='nce', proximal_weight=3.0),
    dict(name='nce', shared_noise=True), dict(name='sampled_softmax'),
    dict(name='parametric_softmax', proximal_weight=2.0)])
def test_accumulated_parts_make_the_same_step_as_the_full_batch(loss, num_devices):
  with jax.enable_x64(True):
    params, rows, metrics = _linear_updates(loss, 1, 1)
    params_parts, rows_parts, metrics_parts = _linear_updates(loss, num_devices, 4)
  np.testing.assert_allclose(params_parts, params, rtol=1e-10)
  chex.assert_trees_all_close(rows_parts, rows, rtol=1e-10)
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(metrics_parts[name], metrics[name], rtol=1e-10)


def test_parts_have_the_same_views_to_compare_on_any_number_of_devices():
  with jax.enable_x64(True):
    first, second, whole = (_linear_updates(dict(name='softmax', views=2), num_devices, parts)
                            for num_devices, parts in ((1, 4), (4, 4), (1, 1)))
  chex.assert_trees_all_close(second, first, rtol=1e-10)
  assert first[2]['loss'][0] < whole[2]['loss'][0] - 0.1  # fewer views to tell apart


@pytest.mark.usefixtures('interpreted')
@pytest.mark.parametrize('kernel', ['cudnn', 'pallas'])
def test_steps_by_each_kernel_are_those_by_xla_on_1_and_8_devices(kernel):
  params, (bank, _), metrics = _linear_updates(dict(name='softmax'), 1, 1, num_steps=3)
  for num_devices in (1, 8):
    found, (rows, _), history = _linear_updates(dict(name='softmax'), num_devices, 1, num_steps=3,
                                                kernel=kernel)
    np.testing.assert_allclose(found, params, atol=1e-5)
    np.testing.assert_allclose(rows, bank, atol=1e-5)
    for name in ('loss', 'grad_norm'):
      np.testing.assert_allclose(history[name], metrics[name], rtol=2e-4)


def test_accumulation_runs_in_the_full_step_with_one_bank_update():
  config = tiny.config()
  config.accumulate_steps = 4
  history, bank, state = _run(config, 2, 1)
  assert np.isfinite(history['loss']).all() and int(state.step) == 1
  start = np.asarray(_set_up(config, 2)[0].bank)[:N]
  assert (np.abs(bank - start).max(axis=1) > 1e-3).sum() == B


def test_class_weights_are_trained_like_the_encoder_and_the_bank_keeps_its_features():
  loss = dict(name='parametric_softmax')
  with jax.enable_x64(True):
    _, (bank, before), _ = _linear_updates(loss, 1, 1, num_steps=0)
    _, (later_bank, after), _ = _linear_updates(loss, 4, 1)
  sgd = tiny.config().optimizer
  gradient = after['momentum'] - sgd.momentum * before['momentum']
  gradient -= sgd.weight_decay * before['weights']
  assert np.abs(gradient).min() > 0  # in every row: all are in the denominator
  np.testing.assert_allclose(gradient.sum(), 0, atol=1e-8)  # pulling one row pushes the others
  np.testing.assert_allclose(after['weights'],
                             before['weights'] - sgd.learning_rate * after['momentum'], rtol=1e-12)
  assert (np.abs(later_bank - bank).max(axis=1) > 0).sum() == B


@pytest.mark.slow
def test_the_parametric_softmax_is_the_same_on_1_and_8_devices_and_is_restored(tmp_path):
  config = tiny.config(name='parametric_softmax')
  config.model.dtype = 'float64'
  with jax.enable_x64(True):
    (history, _, state), (history8, _, state8) = (_run(config, n, 4) for n in (1, 8))
    np.testing.assert_allclose(history8['loss'], history['loss'], rtol=1e-8)
    chex.assert_trees_all_close(jax.tree.map(lambda x: np.asarray(x)[:N], state8.classifier),
                                jax.device_get(state.classifier), atol=1e-9)
    assert history['loss'][0] == pytest.approx(np.log(N), abs=0.5 / config.loss.temperature)
    checkpoints = checkpoint.Checkpoints(tmp_path / 'c', 1, N)
    checkpoints.save(state8)
    setup = tiny.make_setup(config, 2)
    like = tiny.fresh_state(setup)
    checkpoints.close()
    restored = checkpoint.Checkpoints(tmp_path / 'c', 1, N).restore(like)
  for name in ('weights', 'momentum'):
    np.testing.assert_array_equal(np.asarray(restored.classifier[name])[:N],
                                  np.asarray(state8.classifier[name])[:N])
    assert len(restored.classifier[name].addressable_shards[0].data) == 23


def test_the_mean_norm_tells_collapsed_features_from_spread_ones():
  spread = np.eye(8, dtype=np.float32)
  identical = np.repeat(spread[:1], 8, axis=0)
  for features, norm in ((spread, 8**-0.5), (identical, 1.0)):
    assert float(step_lib.mean_norm(jnp.asarray(features), None)) == pytest.approx(norm)
    mesh = mesh_lib.make(jax.devices()[:4])
    sharded = jax.shard_map(lambda f: step_lib.mean_norm(f, mesh_lib.AXIS), mesh=mesh,
                            in_specs=P(mesh_lib.AXIS), out_specs=P())(features)
    assert float(sharded) == pytest.approx(norm)
