import json
import shutil

import pytest

from instdisc_jax import evaluate


def test_the_command_writes_a_line_for_each_result(trained, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '120')  # so that no heading wraps
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  assert evaluate.main([f'--workdir={workdir}', '--protocol=knn,geometry']) == 0
  lines = [json.loads(line) for line in (workdir / 'evaluations.jsonl').read_text().splitlines()]
  assert {line['protocol'] for line in lines} == {'knn', 'geometry'}
  assert all(line['dataset'] == 'digits' and line['step'] == 12 for line in lines)
  out = capsys.readouterr().out
  assert "knn, with the run's own K and τ" in out and 'best (K, τ)' in out
  assert 'effective rank' in out and 'neighbor agreement' in out


@pytest.mark.slow
def test_the_protocols_on_the_mesh_write_their_rows_and_leave_nothing(trained, tmp_path, capsys):
  workdir = tmp_path / 'run'
  shutil.copytree(trained[0], workdir)
  assert evaluate.main([f'--workdir={workdir}', '--protocol=linear_online,few_label',
                        '--shares=0.5']) == 0
  lines = [json.loads(line) for line in (workdir / 'evaluations.jsonl').read_text().splitlines()]
  online = [line for line in lines if line['protocol'] == 'linear_online']
  assert [line['features'] for line in online] == [
      'conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'pooled', 'embedding']
  assert all(0.1 < line['top1'] < line['top5'] < 1 for line in online)
  few = [line for line in lines if line['protocol'] == 'few_label']
  assert [(line['start'], line['labels'], line['images']) for line in few] == [
      ('trained', 0.5, 60), ('random', 0.5, 60)]
  assert all(line['interval'] > 0 and line['top1'] < line['top5'] for line in few)
  assert not list((workdir / 'unfinished').iterdir())


def test_shares_that_are_none_are_refused(capsys):
  assert evaluate.main(['--workdir=run', '--protocol=few_label', '--shares=all']) == 2
  assert "--shares is 'all', must be numbers above 0, at most 1: set --shares=0.01,0.1" in (
      capsys.readouterr().err)
