import json

import pytest

from instdisc_jax import experiment, reproduce
from instdisc_jax.evaluation import tables
from instdisc_jax.runtime import errors
from tests.conftest import small_config, write_finished


def test_a_failed_row_is_named_and_the_others_are_made(tmp_path, monkeypatch, capsys):
  def run(config, workdir, watch):
    if config.loss.proximal_weight == 50:
      raise errors.RunError('loss is nan at step 3')
    write_finished(config, workdir)
  monkeypatch.setattr(experiment, 'run', run)
  code = reproduce.main(['--table=proximal', '--scale=smoke', f'--output={tmp_path / "made"}'])
  assert code == 1
  assert capsys.readouterr().err.startswith('failed: λ = 50, m = 0, seed 0: loss is nan at step 3')
  table = (tmp_path / 'made' / 'table.md').read_text()
  assert table.count('| 0.500 | – | 0.500 |') == 8 and 'Failed: λ = 50, m = 0.5, seed 0' in table


@pytest.mark.parametrize('arguments, words', [
    (['--scale=small', '--data_dir=/nowhere'], 'set --data_dir'),
    (['--scale=smoke', '--output=file'], 'set --output')])
def test_mistakes_are_worded_with_the_command_s_own_arguments(tmp_path, monkeypatch, capsys,
                                                              arguments, words):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  assert reproduce.main(['--table=cifar10', *arguments]) == 2
  error = capsys.readouterr().err
  assert words in error and '--config' not in error and '--workdir' not in error


def test_finished_rows_are_never_lost_from_a_table(tmp_path, monkeypatch, capsys):
  for title, row in (('parametric softmax', '0-seed0'), ('parametric softmax', '0-seed2'),
                     ('full softmax', '5-seed1')):
    config = tables.configure('noise_count', 'smoke', title, int(row[-1]))
    write_finished(config, tmp_path / 'rows' / row)
  (tmp_path / 'rows' / '3-seed0').mkdir()  # not finished

  def run(config, workdir, watch):
    if workdir.name != '0-seed0':
      raise errors.Stopped('stopped')
  monkeypatch.setattr(experiment, 'run', run)
  arguments = ['--table=noise_count', '--scale=smoke', f'--output={tmp_path}']
  assert reproduce.main(arguments) == 75  # at its second row
  rows = json.loads((tmp_path / 'results.json').read_text())['rows']
  assert {title: list(seeds) for title, seeds in rows.items()} == {
      'parametric softmax': ['0', '2'], 'full softmax': ['1']}
  assert reproduce.main(['--table=proximal', *arguments[1:]]) == 2
  assert 'holds the table noise_count of the scale smoke: set another --output' in (
      capsys.readouterr().err)


@pytest.mark.slow
def test_a_table_is_made_row_by_row_and_nothing_is_done_twice(tmp_path, monkeypatch):
  monkeypatch.setitem(tables.SCALES, 'smoke', lambda: (small_config(), 1))
  rows = {title: tables.TABLES['cifar10'].rows[title] for title in (
      'parametric softmax', 'full softmax')}
  monkeypatch.setitem(tables.TABLES, 'cifar10', tables.Table(
      rows, tables.TABLES['cifar10'].paper, 'about'))
  arguments = ['--table=cifar10', '--scale=smoke', f'--output={tmp_path}']
  assert reproduce.main(arguments) == 0
  first = json.loads((tmp_path / 'results.json').read_text())
  made = {path: path.stat().st_mtime_ns for path in tmp_path.glob('rows/*/checkpoints/*')}
  assert len(made) == 2
  assert reproduce.main([*arguments, '--seeds=2']) == 0
  second = json.loads((tmp_path / 'results.json').read_text())
  assert all(path.stat().st_mtime_ns == when for path, when in made.items())
  for title in rows:
    assert second['rows'][title]['0'] == first['rows'][title]['0']
    assert 0 < second['rows'][title]['1']['svm'] <= 1
    assert second['rows'][title]['1'] != second['rows'][title]['0']


@pytest.mark.slow
def test_a_table_of_protocols_is_made_from_nothing(tmp_path, monkeypatch):
  monkeypatch.setitem(tables.SCALES, 'smoke', lambda: (small_config(), 1))
  assert reproduce.main(['--table=imagenet_linear', '--scale=smoke', f'--output={tmp_path}']) == 0
  rows, = json.loads((tmp_path / 'results.json').read_text())['rows'].values()
  assert [row['features'] for row in rows][-2:] == ['pooled', 'embedding']
  assert '| ResNet-10, width 16 | conv5 | – | 0.' in (tmp_path / 'table.md').read_text()
