import json
import pathlib
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import errors, main, metrics, train
from tests.conftest import small_config

DIGITS = str(pathlib.Path(__file__).parents[1] / 'configs' / 'digits.py')


def _main(capsys, workdir, *overrides, config=DIGITS):
  code = main.main([f'--config={config}', f'--workdir={workdir}', *overrides])
  return code, capsys.readouterr().err


def test_a_run_leaves_what_was_promised(trained):
  workdir, summary, config = trained
  assert json.loads((workdir / 'summary.json').read_text()) == summary
  assert summary.keys() >= {
      'dataset', 'num_rows', 'num_devices', 'steps', 'final_loss', 'knn_top1', 'knn_top1_untrained',
      'knn_top1_pixels', 'images_per_second', 'wall_seconds', 'params_digest', 'bank_digest'}
  assert summary['num_rows'] == 128 and summary['num_devices'] == 1 and summary['steps'] == 12
  assert summary['num_queries'] == 500
  for key in ('knn_top1', 'knn_top1_untrained', 'knn_top1_pixels', 'knn_top1_bank'):
    assert 0.05 < summary[key] <= 1
  for picture in ('curves.png', 'neighbors.png'):
    with Image.open(workdir / picture) as image:
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


def test_a_run_resumed_after_1_of_3_epochs_ends_with_the_same_bits(trained, tmp_path):
  workdir, summary, config = trained
  config = config.copy_and_resolve_references()
  config.epochs = 1
  first = main.run(config, tmp_path, jax.devices()[:1])
  assert first['steps'] == 4 and first['params_digest'] != summary['params_digest']
  config.epochs = 3
  second = main.run(config, tmp_path, jax.devices()[:1])
  for key in ('steps', 'final_loss', 'params_digest', 'bank_digest', 'knn_top1', 'knn_top1_bank'):
    assert second[key] == summary[key], key
  reported = lambda folder: [{k: v for k, v in line.items() if 'second' not in k}
                             for line in metrics.read(folder)]
  assert reported(tmp_path) == reported(workdir)


def test_a_finished_run_shows_its_summary_again(trained, capsys):
  workdir, summary, config = trained
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*.json*')}
  assert main.run(config, workdir, jax.devices()[:1]) == summary
  assert f'{summary["knn_top1"]:.3f}' in capsys.readouterr().out
  after = {path: path.stat().st_mtime_ns for path in workdir.rglob('*.json*')}
  before.pop(workdir / 'config.json'), after.pop(workdir / 'config.json')
  assert after == before


def test_a_run_that_lost_its_summary_makes_it_again(trained, tmp_path):
  workdir, summary, config = trained
  shutil.copytree(workdir, tmp_path / 'run')
  (tmp_path / 'run' / 'summary.json').unlink()
  again = main.run(config, tmp_path / 'run', jax.devices()[:1])
  assert again['images_per_second'] is None  # no step was left to time
  measured = ('images_per_second', 'wall_seconds')
  assert {k: v for k, v in again.items() if k not in measured} == {
      k: v for k, v in summary.items() if k not in measured}


def test_fewer_steps_than_taken_is_an_error(trained):
  workdir, _, config = trained
  config = config.copy_and_resolve_references()
  config.steps = 3
  with pytest.raises(errors.UserError, match='is at step 12, past the 3 steps asked for'):
    main.run(config, workdir, jax.devices()[:1])


def test_unlabelled_arrays_train_on_8_devices_and_show_neighbours(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (37, 12, 16, 3), dtype=np.uint8)
  np.savez(tmp_path / 'a.npz', images=images)
  config = small_config()
  config.dataset.update(name=f'arrays:{tmp_path / "a.npz"}', limit=None)
  config.loss.name = 'nce'
  config.steps = 2
  summary = main.run(config, tmp_path / 'run')
  assert summary['num_devices'] == 8 and summary['num_rows'] == 37
  assert summary['knn_top1'] is summary['knn_top1_pixels'] is summary['knn_top1_untrained'] is None
  assert summary['normalizer'] > 0
  assert (tmp_path / 'run' / 'neighbors.png').exists()


def test_labelled_arrays_without_test_images_leave_out_the_own_row(tmp_path):
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
  np.savez(tmp_path / 'a.npz', images=images, labels=np.arange(30))  # no two alike
  config = small_config()
  config.dataset.update(name=f'arrays:{tmp_path / "a.npz"}', limit=None)
  config.batch_size, config.steps, config.knn.neighbors = 8, 1, 3
  summary = main.run(config, tmp_path / 'run', jax.devices()[:1])
  assert summary['knn_top1'] == summary['knn_top1_pixels'] == 0  # its own row would have been right
  assert summary['num_queries'] == 30


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    trained, tmp_path, monkeypatch):
  workdir, _, config = trained
  shutil.copytree(workdir, tmp_path / 'run')
  config = config.copy_and_resolve_references()
  config.epochs = 5
  original = train.update
  def spoiled(*args, **kwargs):
    state, measured = original(*args, **kwargs)
    bad = state.step > 15
    return state, measured | {'loss': jax.numpy.where(bad, jax.numpy.nan, measured['loss'])}
  monkeypatch.setattr(train, 'update', spoiled)
  with pytest.raises(errors.RunError, match='loss is nan at step 15, must be finite; the '
                                            'checkpoint of step 15 is kept: try a smaller'):
    main.run(config, tmp_path / 'run', jax.devices()[:1])
  assert max(int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir()) == 15


class TestWrongInputs:
  """Each is one line on stderr, without a traceback, with exit code 2."""

  @pytest.mark.parametrize('overrides, words', [
      (['--config.loss.temprature=0.1'], ['temprature']),
      (['--config.loss.temperature=-1'], ['loss.temperature', '-1', 'above 0']),
      (['--config.batch_size=many'], ['batch_size', 'many']),
      (['--config.dataset.name=tfds:cifar10', '--config.dataset.data_dir=/nowhere'],
       ['dataset.data_dir', '/nowhere']),
      (['--config.dataset.name=arrays:/nowhere.npz'], ['/nowhere.npz', 'dataset.name']),
      (['--config.knn.neighbors=1298'], ['knn.neighbors', '1298', '1297']),
      (['--config.batch_size=1304'], ['batch_size', '1304', '1297']),
      (['--config.batch_size=100'], ['batch_size', '100', '8 devices']),
      (['--config.model.name=resnet19'], ['model.name', 'resnet19', 'resnet18_cifar']),
      (['--config.loss.name=triplet'], ['loss.name', 'triplet', 'softmax']),
      (['--config.dataset.name=mnist'], ['dataset.name', 'mnist', 'arrays:FILE.npz']),
      (['--config.dataset.limit=9999'], ['dataset.limit', '9999', '1297']),
      (['--batch=3'], ['--batch=3']),
  ])
  def test_settings(self, capsys, tmp_path, overrides, words):
    code, message = _main(capsys, tmp_path / 'run', *overrides)
    self._check(code, message, words)
    assert not (tmp_path / 'run').exists()

  def test_arrays_without_images(self, capsys, tmp_path):
    np.savez(tmp_path / 'a.npz', pictures=np.zeros((4, 8, 8, 3), np.uint8))
    name = f'arrays:{tmp_path / "a.npz"}'
    code, message = _main(capsys, tmp_path / 'run', f'--config.dataset.name={name}')
    self._check(code, message, ['a.npz', 'pictures', "'images'", 'dataset.name'])

  def test_a_workdir_that_can_t_be_written(self, capsys, tmp_path):
    (tmp_path / 'file').write_text('')
    code, message = _main(capsys, tmp_path / 'file' / 'run')
    self._check(code, message, ['file/run', "can't be written", '--workdir'])

  def test_a_workdir_of_another_config(self, capsys, trained):
    workdir, _, _ = trained
    code, message = _main(capsys, workdir)
    self._check(code, message, [str(workdir), 'was begun with', '--workdir'])

  def test_no_config_file(self, capsys, tmp_path):
    code, message = _main(capsys, tmp_path, config='configs/none.py')
    self._check(code, message, ['configs/none.py', '--config'])

  def test_a_config_file_that_is_no_config(self, capsys, tmp_path):
    for text in ('x = 1', 'def get_config(): return 3', 'def get_config(): oops', 'def ('):
      (tmp_path / 'c.py').write_text(text)
      code, message = _main(capsys, tmp_path / 'run', config=tmp_path / 'c.py')
      self._check(code, message, ['c.py'])

  def test_a_missing_argument(self, capsys):
    assert main.main(['--config=x.py']) == 2
    self._check(2, capsys.readouterr().err, ['--workdir'])

  def _check(self, code, message, words):
    assert code == 2, message
    assert message.startswith('error: ') and message.count('\n') == 1, message
    for word in words:
      assert word in message


def test_help_lists_every_setting(capsys):
  with pytest.raises(SystemExit) as stopped:
    main.main(['--help'])
  assert stopped.value.code == 0
  text = capsys.readouterr().out
  assert '--config.loss.temperature=0.1' in text and '--workdir' in text
