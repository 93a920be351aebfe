"""Runs on a folder of images, from the configuration to the summary."""

import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import experiment
from instdisc_jax.data import folder as folder_lib
from instdisc_jax.data import order
from instdisc_jax.runtime import checkpoint, errors, metrics, preemption
from instdisc_jax.runtime import workdir as workdir_lib
from tests.conftest import folder_config


def test_a_folder_of_mixed_images_trains_and_is_evaluated(trained_folder):
  _, workdir, summary = trained_folder
  assert summary['num_rows'] == 32 and summary['num_queries'] == 8 and summary['steps'] == 12
  assert summary['knn_top1'] > 0.5  # the classes differ in color
  assert summary['knn_top1_pixels'] > 0.5 and summary['knn_top1_untrained'] is not None
  assert (workdir / 'neighbors.png').exists()
  lines = [line for line in metrics.read(workdir) if 'input_wait' in line]
  assert lines and all(0 <= line['input_wait'] <= 1 for line in lines[1:])


class _SignalAtPoll(preemption.Watch):
  """As if SIGTERM came just before the run polls for the n-th time."""

  def __init__(self, polls):
    super().__init__()
    self._left = polls

  def poll(self, mesh, save=False):
    self._left -= 1
    if self._left == 0:
      self.signal = 'SIGTERM'
    return super().poll(mesh, save)


def test_a_stream_stopped_in_mid_epoch_resumes_to_the_same_bits(trained_folder, tmp_path):
  folder, _, summary = trained_folder
  config = folder_config(folder)
  with pytest.raises(errors.Stopped, match='at step 7 of 12'):
    experiment.run(config, tmp_path / 'run', jax.devices()[:1], watch=_SignalAtPoll(6))
  again = experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  for key in ('steps', 'final_loss', 'params_digest', 'bank_digest', 'knn_top1'):
    assert again[key] == summary[key], key


@pytest.fixture
def one_renamed(trained_folder, tmp_path):
  """(folder, workdir, old name): copies of them, one training image under another name."""
  for source, name in zip(trained_folder[:2], ('images', 'run')):
    shutil.copytree(source, tmp_path / name)
  folder, workdir = tmp_path / 'images', tmp_path / 'run'
  settings, fingerprint = workdir_lib.read(workdir)
  workdir_lib.write(workdir, settings | {'dataset.name': f'folder:{folder}'}, fingerprint)
  first = folder_lib.read(workdir)['rows'][0]
  (folder / first).rename(folder / 'redless' / 'zz.png')
  return folder, workdir, first


def test_a_changed_folder_is_refused(one_renamed):
  folder, workdir, renamed = one_renamed
  before = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
  with pytest.raises(errors.UserError, match=(
      rf"1 added \(first: 'redless/zz.png'\), 1 removed \(first: '{renamed}'\)")):
    experiment.run(folder_config(folder), workdir, jax.devices()[:1])
  assert before == {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


@pytest.mark.slow
def test_a_grown_folder_continues_from_the_rows_of_a_run(one_renamed, tmp_path):
  folder, workdir, _ = one_renamed
  config = folder_config(folder)
  config.model.init, config.steps = str(workdir), 1
  experiment.run(config, tmp_path / 'grown', jax.devices()[:1])
  old, new = (dict(zip(folder_lib.read(run)['rows'],
                       checkpoint.read(run / 'checkpoints')['bank']))
              for run in (workdir, tmp_path / 'grown'))
  assert new.keys() - old.keys() == {'redless/zz.png'}
  moved = {list(new)[i] for i in order.Chain.of(config, 32).batch(0)}
  kept = old.keys() & new.keys() - moved
  assert len(kept) >= 20
  for name in kept:
    np.testing.assert_array_equal(new[name], old[name])
  np.testing.assert_allclose(np.linalg.norm(new['redless/zz.png']), 1, atol=1e-6)
  assert all(np.abs(new['redless/zz.png'] - row).max() > 1e-4 for row in old.values())


def test_another_folder_s_images_of_the_same_names_and_sizes_are_others(tmp_path):
  files = [tmp_path / place / f'{i}.bmp' for place in ('old', 'new') for i in range(3)]
  for n, file in enumerate(files):
    file.parent.mkdir(exist_ok=True)
    Image.new('RGB', (9, 9), (40 * n, 0, 0)).save(file)
  shutil.copy(files[1], files[4])
  names = ['0.bmp', '1.bmp', '2.bmp']
  old, new = str(tmp_path / 'old'), str(tmp_path / 'new')
  only = lambda root, other: folder_lib.only_same(np.array([2, 0, -1]), names, root, other).tolist()
  assert only(old, old) == [2, 0, -1] and only(new, old) == [-1, 0, -1]
  assert only(new, str(tmp_path / 'gone')) == [-1, -1, -1]


def test_features_are_those_of_the_folder_even_if_images_are_kept_in_memory(tmp_path):
  for place, color in (('old', 'red'), ('new', 'blue')):
    (tmp_path / place).mkdir()
    Image.new('RGB', (9, 9), color).save(tmp_path / place / '0.bmp')
  of = [folder_lib.load(tmp_path / place, 'error')[0] for place in ('old', 'new')]
  kept = [images.in_memory() for images in of]
  assert of[0].fingerprint == of[1].fingerprint
  assert kept[0].identity() == of[0].identity() != kept[1].identity() == of[1].identity()
  for images in kept + [kept[0].one_by_one()]:  # and so is a part of them
    part = images.subset(np.arange(1), 'part')
    assert part.identity() == f'{images.fingerprint}/part {images.origin}' and images.origin


def _write_noise(folder, count):
  folder.mkdir()
  for i in range(count):
    pixels = np.random.default_rng(i).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')


def test_one_image_is_too_few(tmp_path):
  _write_noise(tmp_path / 'images', 1)
  config = folder_config(tmp_path / 'images')
  config.dataset.validation = None
  with pytest.raises(errors.UserError,
                     match='has 1 training image, must be a set of at least 2 images'):
    experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_two_images_train(tmp_path):
  _write_noise(tmp_path / 'images', 2)
  config = folder_config(tmp_path / 'images')
  config.dataset.validation = None
  config.update(batch_size=2, steps=1)
  config.knn.neighbors = 1
  summary = experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  assert summary['num_rows'] == 2 and summary['knn_top1'] is None
