import types

import jax
import numpy as np
import pytest

from instdisc_jax import data, experiment
from instdisc_jax.runtime import errors
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.training import budget
from tests.conftest import small_config
from tests.test_experiment import SignalAt


@pytest.fixture
def images(tmp_path):
  """128 images without labels: there is little to evaluate."""
  np.savez(tmp_path / 'images.npz', images=np.random.default_rng(0).integers(
      0, 256, (128, 8, 8, 3), dtype=np.uint8))
  return f'arrays:{tmp_path}/images.npz'


def _config(minutes, images, **optimizer):
  config = small_config()
  config.minutes = minutes
  config.dataset.update(name=images, limit=None, path='resident')
  config.knn.every_epochs = 0  # only at the end
  config.optimizer.update(optimizer)
  return config


def test_the_steps_fill_the_time_that_compilation_leaves(images, monkeypatch):
  config = _config(2.0, images)
  now = types.SimpleNamespace(seconds=0.0)

  def run_steps(state, inputs, count):
    now.seconds += 30 if not now.seconds else 0.5 * count  # the first call compiles
    return state, None

  monkeypatch.setattr(budget, 'time', types.SimpleNamespace(monotonic=lambda: now.seconds))
  monkeypatch.setattr(budget.step_lib, 'over_mesh', lambda *_: run_steps)
  train = data.load(config.dataset, 0).train
  assert budget.steps(config, train, mesh_lib.make(jax.devices()[:2])) == (120 - 30) / 0.5
  now.seconds, config.minutes = 0.0, 0.1
  assert budget.steps(config, train, mesh_lib.make(jax.devices()[:2])) == 1


def test_the_schedule_keeps_its_places_in_a_run_of_minutes(images, tmp_path, monkeypatch):
  monkeypatch.setattr(budget, 'steps', lambda *_: 26)
  config = _config(1.0, images, milestones=(1, 2), warmup_epochs=0.3)  # of 3 epochs of 4 steps
  config.loss.update(neighbors=1, neighbors_from_epoch=1.5)
  with pytest.raises(errors.Stopped):
    experiment.run(config, tmp_path / 'run', jax.devices()[:1], SignalAt(polls=1))
  settings, _ = workdir_lib.read(tmp_path / 'run')
  with pytest.raises(errors.Stopped):  # resumed, and stopped again
    experiment.run(config, tmp_path / 'run', jax.devices()[:1], SignalAt(polls=1))
  assert workdir_lib.read(tmp_path / 'run')[0] == settings
  assert (settings['steps'], settings['epochs']) == (26, 7)
  share = 26 * config.batch_size / 128 / 3
  assert settings['optimizer.milestones'] == pytest.approx([share, 2 * share])
  assert settings['optimizer.warmup_epochs'] == pytest.approx(0.3 * share)
  assert settings['loss.neighbors_from_epoch'] == pytest.approx(1.5 * share)


@pytest.mark.parametrize('schedule', ['milestones', 'cosine'])
def test_a_run_of_minutes_is_one_of_its_steps_and_is_resumed(
    images, tmp_path, monkeypatch, schedule):
  monkeypatch.setattr(budget, 'steps', lambda *_: 10)
  devices = jax.devices()[:1]
  config = _config(1.0, images, schedule=schedule, milestones=(1, 2))
  with pytest.raises(errors.Stopped):
    experiment.run(config, tmp_path / 'run', devices, SignalAt(polls=4))
  monkeypatch.setattr(budget, 'steps', lambda *_: pytest.fail('measured again'))
  summary = experiment.run(config, tmp_path / 'run', devices)
  settings, _ = workdir_lib.read(tmp_path / 'run')
  assert (settings['steps'], settings['epochs'], settings['minutes']) == (10, 3, 1.0)
  config.minutes, config.steps = None, 10
  config.optimizer.milestones = tuple(settings['optimizer.milestones'])
  expected = experiment.run(config, tmp_path / 'other', devices)
  assert summary['steps'] == 10
  assert summary['params_digest'] == expected['params_digest']


def test_a_run_whose_length_was_derived_is_resumed(images, tmp_path, monkeypatch):
  monkeypatch.setattr(budget, 'steps', lambda *_: 10)
  config = _config(None, images)
  config.epochs = config.optimizer.milestones = None
  for _ in range(2):
    with pytest.raises(errors.Stopped):
      experiment.run(config, tmp_path / 'run', jax.devices()[:1], SignalAt(polls=1))
    settings, _ = workdir_lib.read(tmp_path / 'run')
    assert (settings['minutes'], settings['steps'], settings['epochs']) == (60.0, 10, 3)
