import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

import instdisc_jax
from instdisc_jax import embed
from instdisc_jax.data import folder as folder_lib
from instdisc_jax.evaluation import embedding as embedding_lib
from instdisc_jax.runtime import errors, preemption
from instdisc_jax.search import export
from tests import soak_kill


def _run(workdir, images, output):
  return embed.main([f'--workdir={workdir}', f'--images={images}', f'--output={output}'])


def test_embeddings_paths_and_rows_of_a_folder(trained_folder, tmp_path, capsys):
  folder, workdir, _ = trained_folder
  assert _run(workdir, folder, tmp_path / 'a.npz') == 0
  assert capsys.readouterr().out == f'{tmp_path / "a.npz"}: 40 embeddings\n'
  with np.load(tmp_path / 'a.npz', allow_pickle=False) as file:
    path, embedding, index = file['path'], file['embedding'], file['index']
  assert path.tolist() == sorted(folder_lib.scan(folder))
  model = instdisc_jax.load(workdir)
  np.testing.assert_allclose(
      embedding, model.embed([folder / name for name in path]), atol=1e-6)
  rows = folder_lib.read(workdir)['rows']
  assert [path[i] for i in np.argsort(index) if index[i] >= 0] == rows  # in the bank's order
  assert (index < 0).sum() == 8  # held out
  assert [p.name for p in tmp_path.iterdir()] == ['a.npz']


class _StopAfter(preemption.Watch):
  """As if SIGTERM came just before the n-th check."""

  def __init__(self, checks):
    super().__init__()
    self._left = checks

  def check(self):
    self._left -= 1
    if self._left == 0:
      self.signal = 'SIGTERM'
    super().check()


def test_stopped_halfway_it_resumes_to_the_same_file(trained_folder, tmp_path, monkeypatch):
  folder, workdir, _ = trained_folder
  monkeypatch.setattr(embedding_lib, '_CHUNK', 1)  # 8 images on the 8 devices,
  monkeypatch.setattr(export, 'PART', 7)  # of which no number fills a part
  model = instdisc_jax.load(workdir)
  export.write(model, folder, tmp_path / 'full.npz', preemption.Watch())
  with pytest.raises(errors.Stopped):
    export.write(model, folder, tmp_path / 'a.npz', _StopAfter(checks=3))  # 3 parts and 3 images
  assert not (tmp_path / 'a.npz').exists()
  parts = tmp_path / 'a.npz.partial'
  done = {file.name: file.stat().st_mtime_ns for file in parts.glob('[0-9]*.npy')}
  assert sorted(done) == ['0.npy', '1.npy', '2.npy']
  with pytest.raises(errors.Stopped):
    export.write(model, folder, tmp_path / 'a.npz', _StopAfter(checks=2))
  assert done.items() <= {f.name: f.stat().st_mtime_ns for f in parts.glob('[0-9]*.npy')}.items()
  export.write(model, folder, tmp_path / 'a.npz', preemption.Watch())
  assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'full.npz').read_bytes()
  assert not parts.exists()


def test_parts_of_other_images_are_not_used(trained_folder, tmp_path):
  folder, workdir, _ = trained_folder
  parts = tmp_path / 'a.npz.partial'
  parts.mkdir()
  (parts / 'identity.json').write_text('{"weights": "others"}')
  np.save(parts / '0.npy', np.zeros((1024, 16), np.float32))
  assert _run(workdir, folder, tmp_path / 'a.npz') == 0
  with np.load(tmp_path / 'a.npz') as file:
    np.testing.assert_allclose(np.linalg.norm(file['embedding'], axis=1), 1, atol=1e-5)


def test_a_folder_that_is_not_of_this_command_is_left_alone(trained_folder, tmp_path, capsys):
  folder, workdir, _ = trained_folder
  (tmp_path / 'a.npz.partial').mkdir()
  (tmp_path / 'a.npz.partial' / 'mine.txt').write_text('mine')
  assert _run(workdir, folder, tmp_path / 'a.npz') == 2
  assert "a.npz.partial' is in the way, and not of this command" in capsys.readouterr().err
  assert (tmp_path / 'a.npz.partial' / 'mine.txt').read_text() == 'mine'


def test_a_copy_of_the_run_s_images_has_their_rows_and_others_of_those_names_have_none(
    trained_folder, tmp_path):
  folder, workdir, _ = trained_folder
  def index(images):
    assert _run(workdir, images, tmp_path / 'a.npz') == 0
    with np.load(tmp_path / 'a.npz') as file:
      return file['index']
  own = index(folder)
  shutil.copytree(folder, tmp_path / 'copy')
  np.testing.assert_array_equal(index(tmp_path / 'copy'), own)
  changed = sorted(folder_lib.scan(folder))[np.argmax(own == 3)]
  content = bytearray((tmp_path / 'copy' / changed).read_bytes())
  content[-1] ^= 1  # of the checksum at the end, which nobody reads
  (tmp_path / 'copy' / changed).write_bytes(content)
  np.testing.assert_array_equal(index(tmp_path / 'copy'), np.where(own == 3, -1, own))


def test_images_of_several_sizes_are_refused_by_a_run_of_one_size(trained, tmp_path, monkeypatch,
                                                                  capsys):
  monkeypatch.setattr(embedding_lib, '_CHUNK', 1)  # 8 images on the 8 devices
  (tmp_path / 'new').mkdir()
  for i in range(16):  # of one size within a chunk
    Image.new('RGB', (32, 32) if i < 8 else (50, 20), 'red').save(tmp_path / 'new' / f'{i:02}.png')
  assert _run(trained[0], tmp_path / 'new', tmp_path / 'a.npz') == 2
  assert "'08.png' has 20 x 50 pixels, must be 32 x 32 like '00.png'" in capsys.readouterr().err


def test_images_of_no_run_have_no_row(trained_folder, tmp_path):
  _, workdir, _ = trained_folder
  (tmp_path / 'new').mkdir()
  Image.new('RGB', (50, 40), 'red').save(tmp_path / 'new' / '1.png')
  assert _run(workdir, tmp_path / 'new', tmp_path / 'a.npz') == 0
  with np.load(tmp_path / 'a.npz') as file:
    assert file['index'].tolist() == [-1]


def test_an_unreadable_image_is_named(trained_folder, tmp_path, capsys):
  _, workdir, _ = trained_folder
  (tmp_path / 'new').mkdir()
  (tmp_path / 'new' / '1.jpg').write_text('text')
  assert _run(workdir, tmp_path / 'new', tmp_path / 'a.npz') == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  assert error == ("error: '1.jpg' is not an image (UnidentifiedImageError): remove it, or set "
                   '--on_unreadable=skip, or --images\n')
  assert not (tmp_path / 'a.npz').exists()


def _many_images(tmp_path):
  """A folder of 5,000 images: seconds of work."""
  images = tmp_path / 'images'
  images.mkdir()
  random = np.random.default_rng(0)
  for i in range(5000):
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    coarse.resize((160, 120)).save(images / f'{i:04}.jpg')
  return images


@pytest.mark.slow
def test_killed_halfway_it_ends_with_the_same_file(trained_folder, tmp_path):
  _, workdir, _ = trained_folder
  images = _many_images(tmp_path)
  command = lambda output: [sys.executable, '-m', 'instdisc_jax.embed', f'--workdir={workdir}',
                            f'--images={images}', f'--output={output}']
  subprocess.run(command(tmp_path / 'full.npz'), check=True)
  killed = subprocess.Popen(command(tmp_path / 'a.npz'))
  parts = tmp_path / 'a.npz.partial'
  while not (parts / '1.npy').exists():
    assert killed.poll() is None, 'it ended before it could be killed'
    time.sleep(0.01)
  os.kill(killed.pid, signal.SIGKILL)
  killed.wait()
  assert not (tmp_path / 'a.npz').exists()
  subprocess.run(command(tmp_path / 'a.npz'), check=True)
  assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'full.npz').read_bytes()


@pytest.mark.slow
def test_two_processes_write_what_one_does_and_another_number_of_devices_resumes(
    trained_folder, tmp_path):
  _, workdir, _ = trained_folder
  images, count = _many_images(tmp_path), 5000
  several = lambda output: [
      soak_kill.ROOT / 'launch' / 'local.sh', '--command=embed', '--processes=2', '--devices=2',
      '--', f'--workdir={workdir}', f'--images={images}', f'--output={output}']
  done = subprocess.run(several(tmp_path / 'two.npz'), cwd=soak_kill.ROOT, check=False,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == f'{tmp_path / "two.npz"}: {count} embeddings'
  stopped = subprocess.Popen(several(tmp_path / 'a.npz'), cwd=soak_kill.ROOT)
  part = tmp_path / 'a.npz.partial' / '0.npy'
  while not part.exists():
    assert stopped.poll() is None, 'it ended before it could be stopped'
    time.sleep(0.01)
  stopped.terminate()
  assert stopped.wait(120) == 75
  written = part.stat().st_mtime_ns
  assert np.load(part).shape == (export.PART, 16)
  assert not (tmp_path / 'a.npz').exists()
  model = instdisc_jax.load(workdir)  # on 8 devices
  assert export.write(model, str(images), tmp_path / 'a.npz', _Unchanged(part, written)) == count
  with np.load(tmp_path / 'a.npz') as resumed, np.load(tmp_path / 'two.npz') as two:
    assert resumed['path'].tolist() == two['path'].tolist() == sorted(os.listdir(images))
    np.testing.assert_array_equal(resumed['index'], two['index'])
    np.testing.assert_allclose(resumed['embedding'], two['embedding'], atol=1e-5)
  alone = np.concatenate(list(model.embed_all(folder_lib.load(str(images), 'error')[0])))
  with np.load(tmp_path / 'two.npz') as two:
    np.testing.assert_allclose(two['embedding'], alone, atol=1e-5)


class _Unchanged(preemption.Watch):
  """Sees at every check that a part that was complete is not written again."""

  def __init__(self, part, written):
    super().__init__()
    self._part, self._written = part, written

  def check(self):
    assert self._part.stat().st_mtime_ns == self._written
