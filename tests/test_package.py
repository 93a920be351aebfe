"""What is installed, and what the README says to type; slow."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from tests import soak_kill
from tests.conftest import write_pictures

ROOT = soak_kill.ROOT
pytestmark = pytest.mark.slow


def _run(*command, cwd):
  done = subprocess.run([os.fspath(word) for word in command], cwd=cwd, capture_output=True,
                        text=True, check=False, env=soak_kill.environment())
  assert done.returncode == 0, f'{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}'
  return done.stdout


def test_the_wheel_runs_the_demo_outside_the_checkout(tmp_path):
  pytest.importorskip('build', reason='build is not installed')
  tracked = _run('git', 'ls-files', '-z', cwd=ROOT).split('\0')[:-1]
  for name in tracked:
    (tmp_path / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / name, tmp_path / 'source' / name)
  _run(sys.executable, '-m', 'build', '--wheel', f'--outdir={tmp_path}', cwd=tmp_path / 'source')
  wheel, = tmp_path.glob('instdisc_jax-0.1.0-*.whl')
  _run(sys.executable, '-m', 'venv', tmp_path / 'fresh', cwd=tmp_path)
  # What it depends on is what is installed here already.
  python = tmp_path / 'fresh' / 'bin' / 'python'
  site = _run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=tmp_path)
  pathlib.Path(site.strip(), 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
  _run(python, '-m', 'pip', 'install', '--quiet', '--no-deps', wheel, cwd=tmp_path)
  found = _run(python, '-c', 'import instdisc_jax as i; print(i.__file__, i.__version__)',
               cwd=tmp_path)
  assert found.startswith(f'{tmp_path}/fresh/') and found.split()[1] == '0.1.0'
  _run(python, '-m', 'instdisc_jax.main', '--config=configs/digits.py', '--workdir=run',
       '--config.steps=3', '--config.knn.every_epochs=0', cwd=tmp_path)
  assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['steps'] == 3
  _run(python, '-m', 'instdisc_jax.retrieve', '--workdir=run', '--output=page', '--queries=5',
       cwd=tmp_path)  # whose template is a file of the package


# Those that train are shortened; what takes hours, an installation or a file of the reader's is not
# run: (how it begins, why).
_SHORTER = ['--config.steps=12', '--config.knn.every_epochs=0']
_LEFT_OUT = {
    'make ': 'other tests, and CI',
    'pip install': 'test_the_wheel_runs_the_demo_outside_the_checkout',
    'python -m instdisc_jax.main --config=configs/cifar10.py --workdir=runs/cifar10': 'a download',
    'python -m instdisc_jax.main --config=configs/imagenet.py': 'ImageNet',
    'python -m instdisc_jax.reproduce': 'minutes; test_reproduce.py',
    'python -m instdisc_jax.convert --from': 'a checkpoint; test_convert.py',
    'launch/local.sh': 'test_reliability.py',
}


def _commands(text):
  """The commands of a Markdown file's indented blocks, continued lines joined."""
  block = '\n'.join(re.findall(r'^    (.*)$', text, re.M)).replace('\\\n', ' ')
  starts = re.compile(r'python -m |make |pip install|launch/\w')
  return [' '.join(line.split()) for line in block.splitlines() if starts.match(line)]


def test_the_readme_s_commands_run(tmp_path):
  commands = _commands((ROOT / 'README.md').read_text())
  assert len(commands) > 15
  for name in ('configs', 'launch'):
    (tmp_path / name).symlink_to(ROOT / name)
  write_pictures(tmp_path / 'PICTURES')
  images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
  np.savez(tmp_path / 'mine.npz', images=images)
  (tmp_path / 'runs').mkdir()
  # As the README has it, the demo has been trained.
  _run(sys.executable, '-m', 'instdisc_jax.main', '--config=configs/digits.py',
       '--workdir=runs/demo', *_SHORTER, cwd=tmp_path)
  ran = []
  for command in commands:
    if any(command.startswith(start) for start in _LEFT_OUT):
      continue
    words = shlex.split(command)
    words = [sys.executable if word == 'python' else word for word in words]
    if 'instdisc_jax.main' in words:
      words += [*_SHORTER, '--config.model.width=8']
      if 'configs/folder.py' in command:
        words += ['--config.augment.size=32']
      if '--workdir=runs/demo' in words:
        continue
    if 'instdisc_jax.convert' in words:
      pytest.importorskip('torch', reason='PyTorch is not installed')
      words = [word.replace('runs/published', 'runs/mine') for word in words]
    if words[-1].startswith('--protocol='):
      words[-1] = '--protocol=knn,geometry'  # test_evaluate.py has the others
    _run(*words, cwd=tmp_path)
    ran.append(command)
    if '--output=page' in words:
      shutil.rmtree(tmp_path / 'page')
  for name in ('instdisc_jax.main', 'preview', 'evaluate', 'embed', 'retrieve', 'convert',
               'launch/tpu_vm.sh all --dry-run'):
    assert any(name in command for command in ran), name
