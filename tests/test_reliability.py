"""The guarantees of docs/concepts/reliability.md, tested on full runs; all slow."""

import contextlib
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from instdisc_jax import experiment
from instdisc_jax.runtime import checkpoint, metrics
from tests import soak_kill
from tests.conftest import small_config, write_images

pytestmark = pytest.mark.slow
LOCAL = soak_kill.ROOT / 'launch' / 'local.sh'


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """(workdir, outcome) of the small demo without interruption."""
  folder = tmp_path_factory.mktemp('uninterrupted')
  assert soak_kill.start(folder / 'run').wait() == 0
  return folder / 'run', soak_kill.outcome(folder / 'run')


def _wait_for_step(workdir, step, process, seconds=600):
  end = time.monotonic() + seconds
  while soak_kill.last_step(workdir) < step:
    assert process.poll() is None and time.monotonic() < end, f'see {workdir}.log'
    time.sleep(0.005)


def _log(workdir):
  return pathlib.Path(f'{workdir}.log').read_text()


def test_killed_runs_end_with_the_same_bits(tmp_path):
  equal, moments = soak_kill.soak(tmp_path, runs=3, kills=3, seed=1)
  assert equal == 3 and len(moments) >= 3
  assert all(0 < step <= soak_kill.END for step, _ in moments)  # the last one: in the last save
  assert any(step < soak_kill.END for step, _ in moments)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_signal_saves_and_the_next_run_ends_with_the_same_bits(uninterrupted, tmp_path, name):
  _, expected = uninterrupted
  process = soak_kill.start(tmp_path / 'run')
  _wait_for_step(tmp_path / 'run', 17, process)
  process.send_signal(signal.Signals[name])
  assert process.wait(60) == 75
  last = _log(tmp_path / 'run').splitlines()[-1]
  assert last.startswith(f'stopped by {name} at step ') and last.endswith('to resume')
  assert soak_kill.start(tmp_path / 'run').wait() == 0
  assert soak_kill.outcome(tmp_path / 'run') == expected


def _descendants(pid):
  threads = pathlib.Path(f'/proc/{pid}/task').glob('*/children')
  children = [child for thread in threads for child in thread.read_text().split()]
  return [*children, *(p for child in children for p in _descendants(child))]


@pytest.mark.parametrize('end', ['killed', 'its group stopped'])
def test_a_run_whose_images_are_read_by_other_processes_ends_with_them(tmp_path, end):
  write_images(tmp_path / 'images')
  workdir = tmp_path / 'run'
  with open(f'{workdir}.log', 'a') as log:
    process = subprocess.Popen(
        [sys.executable, '-m', 'instdisc_jax.main', '--config=configs/folder.py',
         f'--workdir={workdir}', f'--config.dataset.name=folder:{tmp_path / "images"}',
         '--config.dataset.path=stream', '--config.dataset.workers=1', '--config.batch_size=8',
         '--config.model.width=2', '--config.epochs=1000', '--config.log_every_steps=1'],
        cwd=soak_kill.ROOT, env=soak_kill.environment(), stdout=log, stderr=log,
        start_new_session=True)
  _wait_for_step(workdir, 4, process)
  readers = _descendants(process.pid)
  assert readers
  if end == 'killed':
    process.kill()
    process.wait()
  else:
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75 and 'which is saved' in _log(workdir)
  limit = time.monotonic() + 30
  while any(pathlib.Path(f'/proc/{reader}').exists() for reader in readers):
    assert time.monotonic() < limit
    time.sleep(0.1)


def test_a_second_run_in_the_same_folder_names_the_first(uninterrupted, tmp_path):
  _, expected = uninterrupted
  first = soak_kill.start(tmp_path / 'run')
  _wait_for_step(tmp_path / 'run', 2, first)
  second = subprocess.run(soak_kill.command(tmp_path / 'run'), cwd=soak_kill.ROOT, check=False,
                          capture_output=True, text=True)
  assert second.returncode == 2 and second.stderr.count('\n') == 1
  assert f'in use by process {first.pid} on {os.uname().nodename}' in second.stderr
  assert first.wait() == 0 and soak_kill.outcome(tmp_path / 'run') == expected


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(uninterrupted, tmp_path):
  workdir, expected = uninterrupted
  shutil.copytree(workdir, tmp_path / 'run')
  newest = tmp_path / 'run' / 'checkpoints' / str(soak_kill.END)
  for data in newest.rglob('d/*'):
    data.write_bytes(data.read_bytes()[:-1])
  assert soak_kill.start(tmp_path / 'run').wait() == 0
  assert f'warning: checkpoint {soak_kill.END} is damaged' in _log(tmp_path / 'run')
  assert soak_kill.outcome(tmp_path / 'run') == expected


@pytest.mark.parametrize('kind', ['a limit on file sizes', 'a full disk'])
def test_without_space_the_run_stops_with_one_line_and_can_be_resumed(
    uninterrupted, tmp_path, kind):
  _, expected = uninterrupted
  disk, prepare = tmp_path / 'disk', None
  disk.mkdir()
  workdir = disk / 'run'
  if kind == 'a full disk':
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', disk], check=False,
                      capture_output=True).returncode != 0:
      pytest.skip('no file system can be mounted here')
  else:
    prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
  try:
    cache = {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache')}  # no truncated file is shared
    done = subprocess.run(
        soak_kill.command(workdir), cwd=soak_kill.ROOT, check=False, capture_output=True, text=True,
        env=soak_kill.environment() | cache, preexec_fn=prepare)
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith('failed: ') and 'free up space and run the same command again' in last
    if kind == 'a full disk':
      subprocess.run(['mount', '-o', 'remount,size=100m', disk], check=True)
    again = subprocess.run(
        soak_kill.command(workdir), cwd=soak_kill.ROOT, check=False, capture_output=True, text=True,
        env=soak_kill.environment())
    assert again.returncode == 0, again.stderr
    assert soak_kill.outcome(workdir) == expected
  finally:
    if kind == 'a full disk':
      subprocess.run(['umount', disk], check=True)


_ELASTIC = {'float64': (0.03, 1e-8, 1e-7), 'float32': (1e-4, 1e-5, 1e-4)}


def _elastic_settings(dtype):
  """131 images, a prime; 20 steps.

  NCE in float32 amplifies a difference of 1e-7 to 6e-3 in these steps, even at this learning rate.
  """
  loss = 'nce' if dtype == 'float64' else 'softmax'
  return {'dataset.limit': 131, 'model.dtype': dtype, 'bank.dtype': dtype, 'batch_size': 32,
          'model.sync_batch_norm': True, 'optimizer.learning_rate': _ELASTIC[dtype][0],
          'knn.every_epochs': 0, 'log_every_steps': 1, 'loss.name': loss, 'loss.normalizer': 'ema'}


def _assert_close(workdir, expected, dtype, num_rows=131):
  """Losses and bank of two runs are equal within the tolerances of another topology."""
  _, loss_tolerance, bank_tolerance = _ELASTIC[dtype]
  losses = lambda folder: [line['step_loss'] for line in metrics.read(folder)]
  assert len(losses(workdir)) == 20
  np.testing.assert_allclose(losses(workdir), losses(expected), rtol=loss_tolerance, atol=0)
  banks = [checkpoint.read(folder / 'checkpoints')['bank'] for folder in (workdir, expected)]
  assert banks[0].shape[0] == num_rows and banks[0].dtype == dtype
  np.testing.assert_allclose(*banks, rtol=0, atol=bank_tolerance)


@pytest.mark.parametrize('dtype', _ELASTIC)
def test_a_run_moves_from_8_to_2_to_1_to_4_devices(tmp_path, dtype):
  with jax.enable_x64(dtype == 'float64'):
    config = small_config()
    config.update_from_flattened_dict(_elastic_settings(dtype))
    config.steps = 20
    experiment.run(config, tmp_path / 'straight', jax.devices()[:8])
    for steps, num_devices in ((5, 8), (10, 2), (15, 1), (20, 4)):
      config.steps = steps
      experiment.run(config, tmp_path / 'moved', jax.devices()[:num_devices])
    _assert_close(tmp_path / 'moved', tmp_path / 'straight', dtype)


@pytest.fixture
def local():
  """(workdir, processes, devices) -> `launch/local.sh` with the small run; nothing survives."""
  launchers = []

  def start(*arguments, **settings):
    launchers.append(_local(*arguments, **settings))
    return launchers[-1]

  yield start
  for launcher in launchers:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(launcher.pid, signal.SIGKILL)


def _local(workdir, processes, devices, dtype='float32', heartbeat=100, steps=20, **changes):
  settings = _elastic_settings(dtype) | {
      'steps': steps, 'model.width': 2, 'model.embedding_dim': 16, 'knn.neighbors': 5,
      'checkpoint.every_steps': 5, 'loss.noise_count': 64} | changes
  environment = soak_kill.environment() | {
      'PYTHON': sys.executable, 'JAX_ENABLE_X64': str(int(dtype == 'float64'))}
  command = [LOCAL, f'--processes={processes}', f'--devices={devices}', f'--heartbeat={heartbeat}',
             '--', '--config=configs/digits.py', f'--workdir={workdir}',
             *(f'--config.{key}={value}' for key, value in settings.items())]
  with open(f'{workdir}.log', 'a') as log:
    return subprocess.Popen(command, cwd=soak_kill.ROOT, env=environment, stdout=log, stderr=log,
                            start_new_session=True)


@pytest.mark.parametrize('dtype', _ELASTIC)
def test_two_processes_of_2_devices_equal_one_of_4(local, tmp_path, dtype):
  for name, processes, devices in (('two', 2, 2), ('one', 1, 4)):
    process = local(tmp_path / name, processes, devices, dtype)
    assert process.wait() == 0, _log(tmp_path / name)
  with jax.enable_x64(dtype == 'float64'):
    _assert_close(tmp_path / 'two', tmp_path / 'one', dtype)
  summary = (tmp_path / 'two' / 'summary.json').read_text()
  assert '"num_devices": 4' in summary


def test_two_processes_train_on_a_stream_like_one(local, tmp_path):
  write_images(tmp_path / 'images')
  changes = {'dataset.name': f'folder:{tmp_path / "images"}', 'dataset.limit': 37,
             'augment.size': 24, 'batch_size': 8}
  for name, processes, devices, workers in (('two', 2, 1, 1), ('one', 1, 2, 0)):
    process = local(tmp_path / name, processes, devices, **changes | {'dataset.workers': workers})
    assert process.wait() == 0, _log(tmp_path / name)
  _assert_close(tmp_path / 'two', tmp_path / 'one', 'float32', num_rows=37)


def test_two_processes_stop_on_a_signal_and_one_resumes(local, tmp_path):
  process = local(tmp_path / 'run', 2, 2, steps=400)
  _wait_for_step(tmp_path / 'run', 3, process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(120) == 75, _log(tmp_path / 'run')
  assert 'stopped by ' in _log(tmp_path / 'run')
  saved = checkpoint.read(tmp_path / 'run' / 'checkpoints')['step']
  assert saved >= 3
  again = local(tmp_path / 'run', 1, 2, steps=int(saved) + 3)
  assert again.wait() == 0, _log(tmp_path / 'run')
  steps = [line['step'] for line in metrics.read(tmp_path / 'run')]
  assert steps == list(range(1, int(saved) + 4))


def _pid(launcher, process_id):
  found = subprocess.run(['pgrep', '-P', str(launcher.pid), '-f', f'process_id={process_id}'],
                         capture_output=True, text=True, check=True).stdout.split()
  return int(found[0])


@pytest.mark.parametrize('dies', [0, 1])
def test_a_process_that_dies_is_named_and_the_others_are_ended(local, tmp_path, dies):
  launcher = local(tmp_path / 'run', 2, 1, steps=100_000)
  _wait_for_step(tmp_path / 'run', 3, launcher)
  os.kill(_pid(launcher, dies), signal.SIGKILL)
  assert launcher.wait(60) == 128 + signal.SIGKILL
  assert f'process {dies} of 2 died first (signal 9): ending the others' in _log(tmp_path / 'run')


def _alive(pid):
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


@pytest.mark.parametrize('dies', [0, 1])
def test_the_others_end_by_themselves_within_the_heartbeat(local, tmp_path, dies):
  launcher = local(tmp_path / 'run', 2, 1, heartbeat=10, steps=100_000)
  _wait_for_step(tmp_path / 'run', 3, launcher)
  pids = [_pid(launcher, i) for i in range(2)]
  launcher.kill()  # nothing is left to end them
  os.kill(pids[dies], signal.SIGKILL)
  end = time.monotonic() + 60
  while _alive(pids[1 - dies]):
    assert time.monotonic() < end, 'it hangs'
    time.sleep(0.1)
