import json
import shutil

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
