import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdisc_jax.runtime import errors, metrics, profiling
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import monitor as monitor_lib
from instdisc_jax.training import plan as plan_lib
from instdisc_jax.training import state as state_lib
from tests.conftest import small_config


@pytest.mark.parametrize('spoil, words', [
    (lambda state: state.replace(bank=state.bank.at[5, 2].set(np.inf)), 'bank row 5 is'),
    (lambda state: state.replace(params={'w': state.params['w'] * np.nan}), 'params is'),
    (lambda state: state.replace(normalizer=state.normalizer / 0), 'normalizer is')])
def test_a_state_that_is_not_finite_is_never_saved(spoil, words):
  mesh = mesh_lib.make()
  state = state_lib.TrainState(
      step=jnp.int32(9), params={'w': jnp.ones((2, 3))}, batch_stats={}, opt_state=(),
      bank=jnp.ones((8, 4)), normalizer=jnp.float32(1))
  monitor_lib.check_finite(state, mesh, saved=6)
  with pytest.raises(errors.RunError, match=f'{words}.* at step 9, .*checkpoint of step 6 is kept'):
    monitor_lib.check_finite(spoil(state), mesh, saved=6)


@pytest.fixture
def make_monitor(tmp_path):
  """(pending losses) -> the monitor of a run of 12 steps, 4 an epoch, a line every 2."""
  config = small_config()
  config.log_every_steps = 2
  setup = state_lib.Setup.of(config, 128, mesh_lib.make())
  lines, progress = metrics.Metrics(tmp_path, 0), metrics.Progress(0, 12)

  def make(pending_losses=()):
    return monitor_lib.Monitor(
        setup, plan_lib.Plan.of(config, 128), lines=lines, progress=progress,
        pending_losses=pending_losses, wall_clock=lambda: 7.0, last_saved=lambda: None)

  yield make
  progress.close()
  lines.close()


def _dispatch(step, losses, asked=0, **history):
  defaults = {name: np.full(len(losses), 0.5) for name in ('feature_mean_norm', 'grad_norm')}
  history = defaults | {'loss': np.array(losses)} | {k: np.array(v) for k, v in history.items()}
  padded = {name: np.append(value, np.nan) for name, value in history.items()}
  return monitor_lib.Dispatch(step, len(losses), padded, asked)


def test_a_line_has_the_mean_loss_since_the_line_before_it(make_monitor, tmp_path):
  monitor = make_monitor(pending_losses=[9.0])
  assert not monitor.settle(_dispatch(1, [3.0]))
  assert metrics.read(tmp_path) == [] and monitor.losses == [9.0, 3.0]
  assert monitor.settle(_dispatch(2, [6.0], asked=2)) == 2
  line, = metrics.read(tmp_path)
  assert (line['step'], line['epoch'], line['loss'], line['step_loss']) == (2, 0, 6.0, 6.0)
  assert line['wall_seconds'] == 7 and line['learning_rate'] == pytest.approx(0.03)
  assert monitor.losses == [] and monitor.final_loss == 6.0
  monitor.settle(_dispatch(4, [1.0, 2.0], grad_norm=[0.1, 0.2]))
  line = metrics.read(tmp_path)[-1]
  assert (line['step'], line['epoch'], line['loss'], line['step_loss']) == (4, 1, 1.5, 2.0)
  assert line['grad_norm'] == 0.2 and line['images_per_second'] > 0
  monitor.evaluated(4, {'knn_top1': 0.25})
  assert metrics.read(tmp_path)[-1] == {'step': 4, 'epoch': 1, 'knn_top1': 0.25}
  assert not monitor.has_evaluated(4)  # not before this run was resumed


@pytest.mark.parametrize('name', ['loss', 'grad_norm', 'feature_mean_norm'])
def test_the_first_step_that_is_not_finite_is_named(make_monitor, name):
  values = {'loss': [1.0, 2.0, 3.0]} | {name: [1.0, np.inf, np.nan]}
  with pytest.raises(errors.RunError, match=f'{name} is inf at step 5, must be finite; no '
                                            'checkpoint was written: try a smaller'):
    make_monitor().settle(_dispatch(7, values.pop('loss'), **values))


def test_a_collapse_is_warned_about_once_and_not_before_embeddings_can_part(make_monitor, capsys):
  monitor = make_monitor()
  for step in (2, 4, 6, 8):  # of 12
    monitor.settle(_dispatch(step, [1.0, 1.0], feature_mean_norm=[0.5, 0.995]))
    warned = capsys.readouterr().err
    assert ('the embeddings of step 6 are nearly identical' in warned) == (step == 6), warned
    assert step == 6 or not warned


def test_the_timer_leaves_out_pauses_and_counts_waiting(monkeypatch):
  now = types.SimpleNamespace(seconds=100.0)
  monkeypatch.setattr(time, 'monotonic', lambda: now.seconds)
  timer = monitor_lib.Timer()
  assert timer.rate() is timer.mean() is timer.waiting_share() is None
  timer.count(10)  # the first dispatch includes the compilation
  assert timer.rate() is None
  with timer.waiting():
    now.seconds += 1
  now.seconds += 3
  timer.count(10)
  assert timer.rate() == timer.mean() == 2.5 and timer.waiting_share() == 0.25
  now.seconds += 50  # an evaluation
  timer.restart()
  now.seconds += 1
  timer.count(10)
  assert timer.rate() == 10 and timer.mean() == 4 and timer.waiting_share() == 0


def test_the_time_left_is_told_after_the_first_steps(make_monitor, capsys, monkeypatch):
  now = types.SimpleNamespace(seconds=0.0)
  monkeypatch.setattr(time, 'monotonic', lambda: now.seconds)
  monitor = make_monitor()
  compiled = jax.jit(jnp.matmul).lower(jnp.ones((8, 8)), jnp.ones((8, 8))).compile()
  monitor.compiled(profiling.Costs(compiled, 1.0, jax.devices()[0]))
  monitor.settle(_dispatch(1, [1.0]))
  now.seconds += 86_400.0
  monitor.settle(_dispatch(2, [1.0]))
  said = capsys.readouterr().out
  assert '10 days left for 10 steps' in said
  assert 'a GPU would take about 1 s for them, if images are read as fast (modeled: ' in said
  assert 'that is long for a CPU: use a GPU, or set --config.minutes' in said
