import os
import sys

from instdisc_jax import convert


def test_a_wrong_call_is_one_line(tmp_path, capsys):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'kept').write_text('kept')
  file = tmp_path / 'file.safetensors'
  file.write_bytes(b'nonsense')
  for arguments in (
      ['--workdir=x'], ['--from=a', '--to=b', '--workdir=x'], ['--to=a.pth'],
      [f'--from={tmp_path}/none.pth', f'--workdir={tmp_path}/new'],
      [f'--from={file}', f'--workdir={tmp_path}/full'],
      [f'--workdir={tmp_path}/none', '--to=a.pth'], [f'--workdir={tmp_path}', '--to=a.tflite']):
    assert convert.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1, error
  assert sorted(p.name for p in tmp_path.iterdir()) == ['file.safetensors', 'full']


def test_nothing_needs_pytorch_to_be_imported():
  modules = '; '.join(f'import instdisc_jax.{name}' for name in ('main', 'convert'))
  block = ('import sys, importlib.abc\n'
           'class Block(importlib.abc.MetaPathFinder):\n'
           '  def find_spec(self, name, path, target=None):\n'
           '    if name.split(".")[0] in ("torch", "safetensors"): raise ImportError(name)\n'
           'sys.meta_path.insert(0, Block())\n')
  assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, '-c', block + modules]) == 0
