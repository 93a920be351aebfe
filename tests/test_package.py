"""The installed package, and the commands of the README; slow."""

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
from tests.conftest import write_images

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
  # Its dependencies are those that are installed here already.
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
       cwd=tmp_path)  # its template is a file of the package


# Training is shortened. What takes hours, an installation or a file of the reader's is not run:
# {how it begins: why, or what tests it}.
_SHORTER = ['--config.steps=12', '--config.knn.every_epochs=0']
_LEFT_OUT = {
    'make ': 'other tests, and CI',
    'python3 -m venv': 'test_the_wheel_runs_the_demo_outside_the_checkout',
    'pip install': 'the same',
    'python -m instdisc_jax.main --config=configs/cifar10.py --workdir=runs/cifar10': 'a download',
    'python -m instdisc_jax.main --config=configs/imagenet.py': 'ImageNet',
    'python -m instdisc_jax.reproduce': 'minutes; test_reproduce.py',
    'python -m instdisc_jax.convert --from': 'a checkpoint; interop/test_import_checkpoint.py',
    'launch/local.sh': 'test_reliability.py',
}


def _blocks(text, *languages):
  """The fenced blocks of a Markdown file in one of these languages."""
  return re.findall(rf'^```(?:{"|".join(languages)})\n(.*?)^```', text, re.M | re.S)


def _commands(text):
  """The commands of a Markdown file, continued lines joined, without comments."""
  lines = '\n'.join(_blocks(text, 'sh', 'bash')).replace('\\\n', ' ').splitlines()
  starts = re.compile(r'python -m |make |pip install|launch/\w')
  return [shlex.join(shlex.split(line, comments=True)) for line in lines if starts.match(line)]


def test_the_commands_of_the_readme_run(tmp_path):
  readme = (ROOT / 'README.md').read_text()
  commands = _commands(readme)
  assert len(commands) > 15
  for name in ('configs', 'launch'):
    (tmp_path / name).symlink_to(ROOT / name)
  write_images(tmp_path / 'IMAGES')
  names = sorted(str(path.relative_to(tmp_path / 'IMAGES'))
                 for path in (tmp_path / 'IMAGES').rglob('*.*g'))[::3]
  (tmp_path / 'labels.csv').write_text(''.join(f'{n},{n.split("/")[0]}\n' for n in names))
  images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
  np.savez(tmp_path / 'mine.npz', images=images)
  (tmp_path / 'runs').mkdir()
  # The README takes the demo as trained.
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
    if 'instdisc_jax.compile' in words:  # test_compilers.py has the encoder that it is for
      words += ['--config.model.name=resnet10', '--config.model.width=8']
    if 'instdisc_jax.convert' in words:
      pytest.importorskip('torch', reason='PyTorch is not installed')
      words = [word.replace('runs/published', 'runs/mine') for word in words]
    if words[-1].startswith('--protocol='):
      words[-1] = '--protocol=knn,geometry'  # test_evaluate.py has the others
    _run(*words, cwd=tmp_path)
    ran.append(command)
    if '--output=page' in words:
      shutil.rmtree(tmp_path / 'page')
  for suffix, name in (('jpg', 'a.jpg'), ('png', 'b.png')):  # images of the reader's
    shutil.copy(next((tmp_path / 'IMAGES').rglob(f'*.{suffix}')), tmp_path / name)
  block, = _blocks(readme, 'python')
  found = _run(sys.executable, '-c', block + 'print(embeddings.shape, row.shape, names)',
               cwd=tmp_path)
  assert re.fullmatch(r"\(2, 128\) \(1, 5\) \['(greenless|redless)'\]\n", found)
  for name in ('instdisc_jax.main', 'preview', 'evaluate', 'embed', 'retrieve', 'convert',
               'launch/tpu_vm.sh all --dry-run'):
    assert any(name in command for command in ran), name


def test_the_tutorial_of_a_folder_runs(tmp_path):
  text = (ROOT / 'docs' / 'tutorials' / 'own-images.md').read_text()
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  environment, ran = soak_kill.environment(), ''
  environment['PATH'] = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  for block in _blocks(text, 'bash'):
    if 'instdisc_jax.main' in block and 'runs/mine' in block and 'width=16' not in block:
      continue  # for a GPU
    block = block.replace('--config.epochs=30', '--config.epochs=2').replace(
        '--config.model.init=runs/mine', '--config.model.init=runs/mine --config.epochs=1')
    if 'labels.csv' in block:  # saved from the page, see search/test_page.py
      paths = [f'{c}/{path.name}' for c in range(10)
               for path in sorted((tmp_path / 'IMAGES' / str(c)).iterdir())[:10]]
      (tmp_path / 'labels.csv').write_text(
          'path,label\n' + ''.join(f'{path},{path[0]}\n' for path in paths))
    done = subprocess.run(['bash', '-euo', 'pipefail', '-c', block], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, f'{block}: {done.stdout[-2000:]}{done.stderr[-2000:]}'
    ran += block
  assert {*re.findall(r'instdisc_jax\.(\w+)', ran)} == {
      'audit', 'classify', 'convert', 'embed', 'main', 'preview', 'retrieve'}
  assert len((tmp_path / 'predictions.csv').read_text().splitlines()) == 1798
  assert '"predicted"' in (tmp_path / 'page' / 'data.js').read_text()
