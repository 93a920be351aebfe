import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import experiment, programs
from instdisc_jax.runtime import checkpoint, digest, errors, hardware, metrics, preemption
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import step as step_lib
from tests.conftest import small_config


def test_a_run_writes_all_its_output_files(trained):
  workdir, summary, config = trained
  assert json.loads((workdir / 'summary.json').read_text()) == summary
  assert summary.keys() >= {
      'dataset', 'num_rows', 'num_devices', 'steps', 'final_loss', 'knn_top1', 'knn_top1_untrained',
      'knn_top1_pixels', 'images_per_second', 'wall_seconds', 'params_digest', 'bank_digest'}
  assert summary['num_rows'] == 128 and summary['num_devices'] == 1 and summary['steps'] == 12
  assert summary['num_queries'] == 500
  for key in ('knn_top1', 'knn_top1_untrained', 'knn_top1_pixels', 'knn_top1_bank'):
    assert 0.05 < summary[key] <= 1
  for figure in ('curves.png', 'neighbors.png'):
    with Image.open(workdir / figure) as image:
      assert image.width > 400 and np.asarray(image.convert('L')).std() > 10
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == [5, 10, 12]
  assert list(workdir.glob('events.out.tfevents.*'))


def test_metrics_have_a_line_for_every_epoch(trained):
  workdir, summary, config = trained
  lines = metrics.read(workdir)
  losses = [line for line in lines if 'loss' in line]
  assert [(line['step'], line['epoch']) for line in losses] == [(4, 1), (8, 2), (12, 3)]
  for line in losses:
    assert line['learning_rate'] == pytest.approx(config.optimizer.learning_rate)
    assert line['grad_norm'] > 0 and np.isfinite(line['loss'])
  assert [line['step'] for line in lines if 'knn_top1' in line] == [4, 8, 12]
  assert lines[-1]['knn_top1'] == summary['knn_top1_bank']


class SignalAt(preemption.Watch):
  """As if SIGTERM came just before the n-th call of `check` or `poll`."""

  def __init__(self, checks=None, polls=None):
    super().__init__()
    self._left = {'check': checks, 'poll': polls}

  def check(self):
    self._count('check')
    super().check()

  def poll(self, mesh, save=False):
    self._count('poll')
    return super().poll(mesh, save)

  def _count(self, kind):
    if self._left[kind] is not None:
      self._left[kind] -= 1
      if self._left[kind] == 0:
        self.signal = 'SIGTERM'


def test_a_run_finished_extended_stopped_and_resumed_ends_with_the_same_bits(trained, tmp_path):
  workdir, summary, config = trained
  config = config.copy_and_resolve_references()
  device = jax.devices()[:1]
  config.epochs = 1
  first = experiment.run(config, tmp_path, device)
  assert first['steps'] == 4 and first['params_digest'] != summary['params_digest']
  config.epochs = 3
  with pytest.raises(errors.Stopped, match='stopped by SIGTERM at step 7 of 12, which is saved: '):
    experiment.run(config, tmp_path, device, watch=SignalAt(polls=2))  # in the middle of an epoch
  with pytest.raises(errors.Stopped, match='stopped by SIGTERM at step 8 of 12, which is saved: '):
    experiment.run(config, tmp_path, device, watch=SignalAt(checks=2))  # in the evaluation
  assert 8 not in [line['step'] for line in metrics.read(tmp_path) if 'knn_top1' in line]
  last = experiment.run(config, tmp_path, device)
  for key in ('steps', 'final_loss', 'params_digest', 'bank_digest', 'knn_top1', 'knn_top1_bank'):
    assert last[key] == summary[key], key
  timed = lambda key: 'second' in key or key == 'input_wait'
  reported = lambda folder: [{k: v for k, v in line.items() if not timed(k)}
                             for line in metrics.read(folder)]
  assert reported(tmp_path) == reported(workdir)


def test_a_finished_run_shows_its_summary_again(trained, capsys):
  workdir, summary, config = trained
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*.json*')}
  assert experiment.run(config, workdir, jax.devices()[:1]) == summary
  assert f'{summary["knn_top1"]:.3f}' in capsys.readouterr().out
  after = {path: path.stat().st_mtime_ns for path in workdir.rglob('*.json*')}
  before.pop(workdir / 'config.json'), after.pop(workdir / 'config.json')
  assert after == before


def test_the_summary_of_a_shorter_run_is_not_shown_for_a_longer_one(trained, tmp_path):
  workdir, summary, config = trained
  shutil.copytree(workdir, tmp_path / 'run')
  shorter = json.dumps(summary | {'steps': 4, 'knn_top1': 0.0})
  (tmp_path / 'run' / 'summary.json').write_text(shorter)  # as if the end had been stopped
  again = experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  assert (again['steps'], again['knn_top1']) == (12, summary['knn_top1'])


def test_a_lost_summary_is_written_again(trained, tmp_path):
  workdir, summary, config = trained
  shutil.copytree(workdir, tmp_path / 'run')
  (tmp_path / 'run' / 'summary.json').unlink()
  again = experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  assert again['images_per_second'] is None  # there was no step to time
  measured = ('images_per_second', 'wall_seconds')
  assert {k: v for k, v in again.items() if k not in measured} == {
      k: v for k, v in summary.items() if k not in measured}


def test_fewer_steps_than_taken_is_an_error_and_changes_no_file(trained):
  workdir, _, config = trained
  config, before = config.copy_and_resolve_references(), (workdir / 'config.json').read_text()
  config.steps = 3
  with pytest.raises(errors.UserError, match='is at step 12, past the 3 steps asked for'):
    experiment.run(config, workdir, jax.devices()[:1])
  assert (workdir / 'config.json').read_text() == before


@pytest.mark.slow
def test_unlabeled_arrays_train_on_8_devices_and_show_neighbors(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (37, 12, 16, 3), dtype=np.uint8)
  np.savez(tmp_path / 'a.npz', images=images)
  config = small_config()
  config.dataset.update(name=f'arrays:{tmp_path / "a.npz"}', limit=None)
  config.loss.name = 'nce'
  config.steps = 2
  summary = experiment.run(config, tmp_path / 'run')
  assert summary['num_devices'] == 8 and summary['num_rows'] == 37
  assert summary['knn_top1'] is summary['knn_top1_pixels'] is summary['knn_top1_untrained'] is None
  assert summary['normalizer'] > 0
  assert (tmp_path / 'run' / 'neighbors.png').exists()


def test_labeled_arrays_without_test_images_leave_out_each_query_s_own_row(tmp_path):
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (128, 32, 32, 3), dtype=np.uint8)
  np.savez(tmp_path / 'a.npz', images=images, labels=np.arange(128))  # no two of a class
  config = small_config()
  config.dataset.update(name=f'arrays:{tmp_path / "a.npz"}', limit=None)
  config.steps, config.knn.neighbors = 1, 3
  summary = experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  assert summary['knn_top1'] == summary['knn_top1_pixels'] == 0  # its own row would have been right
  assert summary['num_queries'] == 128


def test_a_collapse_is_warned_about_and_a_loss_that_is_not_finite_stops_the_run(
    trained, tmp_path, monkeypatch, capsys):
  workdir, _, config = trained
  shutil.copytree(workdir, tmp_path / 'run')
  config = config.copy_and_resolve_references()
  config.epochs = 5
  original = step_lib.update
  config.log_every_steps = 1
  def spoiled(*args, **kwargs):
    state, measured = original(*args, **kwargs)
    bad = state.step > 15
    return state, measured | {'loss': jax.numpy.where(bad, jax.numpy.nan, measured['loss']),
                              'feature_mean_norm': jax.numpy.float32(0.995)}
  monkeypatch.setattr(step_lib, 'update', spoiled)
  with pytest.raises(errors.RunError, match='loss is nan at step 15, must be finite; the '
                                            'checkpoint of step 15 is kept: try a smaller'):
    experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  assert max(int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir()) == 15
  warning = ('warning: the embeddings of step 13 are nearly identical: the norm of their mean is '
             '0.9950, well below 1 for a working encoder')
  warned = capsys.readouterr().err
  assert warning in warned and warned.count('nearly identical') == 1


def _as_version_0_1_left_it(workdir):
  """Removes what later versions added to a run's folder."""
  settings, fingerprint = workdir_lib.read(workdir)
  for key in ('dataset.order', 'model.reduce_dtype'):
    settings.pop(key)
  workdir_lib.write(workdir, settings, fingerprint)
  for file in workdir.glob('checkpoints/*/manifest.json'):
    manifest = json.loads(file.read_text())
    manifest.pop('num_rows')
    file.write_text(json.dumps(manifest))


@pytest.mark.slow
def test_a_run_of_version_0_1_keeps_its_order_of_images(tmp_path):
  config, device = small_config(), jax.devices()[:1]
  config.dataset.order, config.steps, config.knn.every_epochs = 'permutation', 6, 0
  whole = experiment.run(config, tmp_path / 'whole', device)
  config.steps = 3
  experiment.run(config, tmp_path / 'resumed', device)
  _as_version_0_1_left_it(tmp_path / 'resumed')
  config = small_config()  # whose order is that of new runs
  config.knn.every_epochs = 0
  for steps in (4, 6):
    config.steps = steps
    resumed = experiment.run(config, tmp_path / 'resumed', device)
  assert workdir_lib.read(tmp_path / 'resumed')[0]['dataset.order'] == 'permutation'
  assert resumed['bank_digest'] == whole['bank_digest']


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """(a folder with 3 of 6 steps on 8 devices, the same with all 6, config), N = 10,007."""
  folder = tmp_path_factory.mktemp('large')
  images = np.random.default_rng(0).integers(0, 256, (10_007, 8, 8, 3), dtype=np.uint8)
  np.savez(folder / 'a.npz', images=images)
  config = small_config()
  config.dataset.update(name=f'arrays:{folder / "a.npz"}', limit=None)
  config.model.sync_batch_norm = True
  config.optimizer.learning_rate = 1e-4
  config.batch_size, config.log_every_steps = 48, 1
  for steps in (3, 6):
    config.steps = steps
    experiment.run(config, folder / str(steps))
  return folder / '3', folder / '6', config


@pytest.mark.slow
def test_n_that_divides_nothing_is_resumed_bit_for_bit_and_on_other_devices(large, tmp_path):
  half, whole, config = large
  stored = checkpoint.read(half / 'checkpoints')
  assert stored['bank'].shape == (10_007, 16)
  for count in (8, 3):
    shutil.copytree(half, tmp_path / str(count))
    mesh = mesh_lib.make(jax.devices()[:count])
    setup = state_lib.Setup.of(config, 10_007, mesh)
    checkpoints = checkpoint.Checkpoints(tmp_path / str(count) / 'checkpoints', 3, 10_007)
    restored = checkpoints.restore(state_lib.make_init(setup, (8, 8))())
    checkpoints.close()
    assert len(restored.bank) == 10_008
    np.testing.assert_array_equal(restored.bank[:10_007], stored['bank'])
    for name in ('params', 'batch_stats', 'opt_state'):
      old, new = (jax.tree.leaves(part) for part in (stored[name], getattr(restored, name)))
      assert len(old) == len(new)
      for a, b in zip(old, new):
        np.testing.assert_array_equal(a, b)
  expected = json.loads((whole / 'summary.json').read_text())
  same = experiment.run(config, tmp_path / '8')
  for key in ('params_digest', 'bank_digest', 'final_loss'):
    assert same[key] == expected[key]
  other = experiment.run(config, tmp_path / '3', jax.devices()[:3])
  assert other['final_loss'] == pytest.approx(expected['final_loss'], rel=1e-5)
  banks = [checkpoint.read(folder / 'checkpoints')['bank'] for folder in (tmp_path / '3', whole)]
  np.testing.assert_allclose(*banks, atol=1e-4)


def test_saving_and_checking_move_nothing_that_grows_with_n(monkeypatch):
  monkeypatch.setattr(digest, '_MOST_BYTES', 2**12)
  carried = {}
  for num_rows in (10_007, 100_003):
    run = programs.Run(_fake(num_rows), jax.devices(), hardware.CHIPS['cpu'])
    for name in ('init', 'checkpoint', 'check', 'digest', 'rows', 'restore'):
      report = run.compile(name)
      carried.setdefault(name, []).append(
          sum(found.bytes for found in report.costs.collectives) if report.costs else 0)
  assert carried.pop('digest') == [2**12, 2**12]  # a piece
  assert carried.pop('check') == [4, 4]
  assert set(map(tuple, carried.values())) == {(0, 0)}, carried


def _fake(num_rows):
  config = small_config()
  config.dataset.update(name=f'fake:{num_rows}', limit=None)
  config.augment.size = 8
  return config


def test_checkpoints_by_time_change_no_bit(trained, tmp_path):
  workdir, summary, config = trained
  config = config.copy_and_resolve_references()
  config.checkpoint.update(every_steps=1000, every_minutes=1e-6, keep=50)
  found = experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  for key in ('params_digest', 'bank_digest'):
    assert found[key] == summary[key]
  saved = {int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()}
  assert len(saved) > 3 and max(saved) == 12  # not only at the end


@pytest.mark.slow
@pytest.mark.parametrize('setting, value', [
    ('loss.views', 2), ('loss.neighbors', 3), ('loss.name', 'triplet'), ('loss.mining', 'hardest'),
    ('model.head', 'mlp'), ('optimizer.name', 'adamw'), ('loss.proximal_weight', 1.0),
    ('augment.flip', 0.5), ('optimizer.schedule', 'cosine')])
def test_a_switch_changes_what_a_run_learns(trained, setting, value, tmp_path):
  config = small_config()
  config.update_from_flattened_dict({setting: value})
  if setting == 'loss.mining':
    config.loss.name = 'triplet'
  config.loss.neighbors_from_epoch = 1
  found = experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  assert found['bank_digest'] != trained[1]['bank_digest']
  assert found['final_loss'] != trained[1]['final_loss']
  assert (found['knn_top1_pooled'] is not None) == (setting == 'model.head')
  if setting == 'model.head':
    assert 0.05 < found['knn_top1_pooled'] <= 1 and found['knn_top1_pooled'] != found['knn_top1']
