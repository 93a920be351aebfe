"""Features and accuracies are the same on one device, on eight, and in two processes of four."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import soak_kill

pytestmark = pytest.mark.slow
LOCAL = soak_kill.ROOT / 'launch' / 'local.sh'
MACHINES = {'one': (1, 1), 'eight': (1, 8), 'two of four': (2, 4)}  # processes, devices of each


def _run(command, machine, *arguments):
  """A command of the package on so many processes and virtual devices."""
  processes, devices = MACHINES[machine]
  done = subprocess.run(
      [LOCAL, f'--command={command}', f'--processes={processes}', f'--devices={devices}', '--',
       *arguments], cwd=soak_kill.ROOT, check=False, capture_output=True, text=True,
      env=soak_kill.environment() | {'PYTHON': sys.executable})
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_embed_writes_the_features_of_one_device(trained_folder, tmp_path):
  folder, workdir, _ = trained_folder
  written = {}
  for machine in MACHINES:
    output = tmp_path / f'{machine.replace(" ", "-")}.npz'
    said = _run('embed', machine, f'--workdir={workdir}', f'--images={folder}',
                f'--output={output}')
    assert said.count('embeddings') == 1  # from one process
    written[machine] = dict(np.load(output))
  one = written.pop('one')
  assert one['embedding'].shape == (40, 16) and (one['index'] >= 0).sum() == 32
  for machine, other in written.items():
    np.testing.assert_array_equal(other['path'], one['path'])
    np.testing.assert_array_equal(other['index'], one['index'])
    np.testing.assert_allclose(other['embedding'], one['embedding'], atol=1e-6, err_msg=machine)


def test_protocols_measure_the_accuracies_of_one_device(trained, tmp_path):
  top1 = {}
  for machine in MACHINES:
    workdir = tmp_path / machine.replace(' ', '-')
    shutil.copytree(trained[0], workdir)
    _run('evaluate', machine, f'--workdir={workdir}', '--protocol=knn,linear,linear_online')
    lines = map(json.loads, (workdir / 'evaluations.jsonl').read_text().splitlines())
    top1[machine] = {(line['protocol'], line['features'], line.get('neighbors'),
                      line.get('temperature')): line['top1'] for line in lines}
  one = top1.pop('one')
  assert len(one) == 3 * 6 * 4 + 7 + 7  # kinds, K and τ; stages, twice
  for machine, other in top1.items():
    assert other.keys() == one.keys()
    for key, value in one.items():
      allowed = 1 / 500 if key[0] == 'knn' else 0.005
      assert abs(other[key] - value) <= allowed + 1e-9, (machine, key)
