import contextlib
import json

import jax
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import errors, reproduce
from tests.conftest import small_config


@pytest.mark.parametrize('scale', reproduce.SCALES)
@pytest.mark.parametrize('table', reproduce.TABLES)
def test_every_row_of_every_table_has_valid_settings_of_its_own(table, scale):
  configs = [reproduce.configure(table, scale, title, 3) for title in reproduce.TABLES[table].rows]
  for config in configs:
    config_lib.validate(config)
    config_lib.validate_for_data(config, config.dataset.limit, (32, 32), 1)
    assert config.seed == 3
  assert len({config.to_json() for config in configs}) == len(configs) >= 3


def test_the_paper_scale_is_the_published_recipe():
  config = reproduce.configure('cifar10', 'paper', 'NCE, M = 4,096', 0)
  published = config_lib.default()
  published.dataset.update(name='tfds:cifar10', limit=50_000)
  published.loss.name = 'nce'
  published.knn.every_epochs = config.knn.every_epochs
  published.checkpoint.update(every_steps=500, keep=1)
  assert config.to_dict() == published.to_dict()
  assert reproduce.TABLES['cifar10'].paper['knn']['parametric softmax'] == 0.630
  assert reproduce.TABLES['cifar10'].paper['svm']['full softmax'] == 0.754


def test_the_proximal_table_has_a_constant_normalizer():
  z = lambda table, scale: reproduce.configure(
      table, scale, list(reproduce.TABLES[table].rows)[-1], 0).loss.normalizer
  assert (z('proximal', 'small'), z('proximal', 'paper')) == ('100000', 'first_batch')
  assert z('noise_count', 'small') == 'ema'


def test_the_table_has_the_paper_s_values_beside_ours(tmp_path):
  run = lambda knn: {'knn': knn, 'svm': knn - 0.1, 'loss': 5.0, 'seconds': 60.0, 'steps': 9,
                     'untrained': 0.2, 'pixels': 0.3}
  results = {'full softmax': {0: run(0.5), 1: run(0.6)}, 'NCE, M = 1': {0: run(0.25)}}
  reproduce.write(tmp_path, 'cifar10', 'smoke', results,
                  {'NCE, M = 10, seed 0': 'loss is nan'}, 'about')
  table = (tmp_path / 'table.md').read_text()
  assert '| full softmax | 0.808 | 0.550 | 0.635 | 0.500, 0.600 | 0.754 | 0.450 |' in table
  assert '| NCE, M = 1 | 0.425 | 0.250 | – | 0.250 |' in table
  assert 'Failed: NCE, M = 10, seed 0: loss is nan.' in table
  assert table.count('| 0.300 | 0.200 | 5.000 | 60 |') == 2  # raw pixels, untrained, loss, seconds
  with Image.open(tmp_path / 'plot.png') as image:
    assert image.width > 600 and np.asarray(image.convert('L')).std() > 10


def test_a_row_that_fails_is_told_and_the_others_are_made(tmp_path, monkeypatch, capsys):
  def run_row(config, workdir, with_svm, watch):
    if config.loss.proximal_weight == 50:
      raise errors.RunError('loss is nan at step 3')
    return {'knn': 0.5, 'loss': 5.0, 'seconds': 60.0, 'steps': 9, 'untrained': 0.2, 'pixels': 0.3}
  monkeypatch.setattr(reproduce, 'run_row', run_row)
  tmp_path.joinpath('made').mkdir()
  with cache_left_alone():
    code = reproduce.main(['--table=proximal', '--scale=smoke', f'--output={tmp_path / "made"}'])
  assert code == 1
  assert capsys.readouterr().err.startswith('failed: λ = 50, m = 0, seed 0: loss is nan at step 3')
  table = (tmp_path / 'made' / 'table.md').read_text()
  assert table.count('| 0.500 | – | 0.500 |') == 6 and 'Failed: λ = 50, m = 0.5, seed 0' in table


@contextlib.contextmanager
def cache_left_alone():
  before = jax.config.jax_compilation_cache_dir, (
      jax.config.jax_persistent_cache_min_compile_time_secs)
  yield
  jax.config.update('jax_compilation_cache_dir', before[0])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', before[1])


@pytest.mark.parametrize('arguments, words', [
    (['--scale=small', '--data_dir=/nowhere'], 'set --data_dir'),
    (['--scale=smoke', '--output=file'], 'set --output')])
def test_what_is_wrong_is_said_in_the_settings_of_the_command(tmp_path, monkeypatch, capsys,
                                                              arguments, words):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  with cache_left_alone():
    assert reproduce.main(['--table=cifar10', *arguments]) == 2
  told = capsys.readouterr().err
  assert words in told and '--config' not in told and '--workdir' not in told


def test_rows_that_ended_are_never_lost_from_a_table(tmp_path, monkeypatch, capsys):
  summary = {'knn_top1': 0.5, 'final_loss': 5.0, 'steps': 9, 'wall_seconds': 60.0,
             'knn_top1_untrained': 0.2, 'knn_top1_pixels': 0.3}
  for row in ('0-seed0', '0-seed2', '5-seed1'):
    (tmp_path / 'rows' / row).mkdir(parents=True)
    (tmp_path / 'rows' / row / 'summary.json').write_text(json.dumps(summary))
  (tmp_path / 'rows' / '3-seed0').mkdir()  # not ended

  def run_row(config, workdir, with_svm, watch):
    if workdir.name == '0-seed0':
      return reproduce.measured(workdir, with_svm)
    raise errors.Stopped('stopped')
  monkeypatch.setattr(reproduce, 'run_row', run_row)
  arguments = ['--table=noise_count', '--scale=smoke', f'--output={tmp_path}']
  with cache_left_alone():
    assert reproduce.main(arguments) == 75  # at its second row
  rows = json.loads((tmp_path / 'results.json').read_text())['rows']
  assert {title: list(seeds) for title, seeds in rows.items()} == {
      'parametric softmax': ['0', '2'], 'full softmax': ['1']}
  with cache_left_alone():
    assert reproduce.main(['--table=proximal', *arguments[1:]]) == 2
  assert 'holds the table noise_count of the scale smoke: set another --output' in (
      capsys.readouterr().err)


@pytest.mark.slow
def test_a_table_is_made_row_by_row_and_nothing_is_done_twice(tmp_path, monkeypatch):
  monkeypatch.setitem(reproduce.SCALES, 'smoke', lambda: (small_config(), 1))
  rows = {title: reproduce.TABLES['cifar10'].rows[title] for title in (
      'parametric softmax', 'full softmax')}
  monkeypatch.setitem(reproduce.TABLES, 'cifar10', reproduce.Table(
      rows, reproduce.TABLES['cifar10'].paper, 'about'))
  arguments = ['--table=cifar10', '--scale=smoke', f'--output={tmp_path}']
  with cache_left_alone():
    assert reproduce.main(arguments) == 0
  first = json.loads((tmp_path / 'results.json').read_text())
  made = {path: path.stat().st_mtime_ns for path in tmp_path.glob('rows/*/checkpoints/*')}
  assert len(made) == 2
  with cache_left_alone():
    assert reproduce.main([*arguments, '--seeds=2']) == 0
  second = json.loads((tmp_path / 'results.json').read_text())
  assert all(path.stat().st_mtime_ns == when for path, when in made.items())
  for title in rows:
    assert second['rows'][title]['0'] == first['rows'][title]['0']
    assert 0 < second['rows'][title]['1']['svm'] <= 1
    assert second['rows'][title]['1'] != second['rows'][title]['0']
