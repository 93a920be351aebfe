import json
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import tfds as tfds_lib
from instdisc_jax.runtime import distributed, errors

SHARED_TFDS = pathlib.Path(__file__).parents[3] / 'shared' / 'data' / 'tfds'


def _load(name, data_dir, **kwargs):
  config = config_lib.default().dataset
  config.update(name=name, data_dir=str(data_dir), **kwargs)
  return data.load(config, seed=0)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """(a folder, a tiny builder whose images are arrays), prepared there without TensorFlow."""
  import tensorflow_datasets as tfds

  class Tiny(tfds.core.GeneratorBasedBuilder):
    """Color and gray images given as arrays."""
    VERSION = tfds.core.Version('1.0.0')
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
    channels = 3

    def _info(self):
      return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
          'image': tfds.features.Image(shape=(5, 6, self.channels)),
          'label': tfds.features.ClassLabel(names=['cat', 'dog'])}))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(0, 5), 'test': self._generate_examples(5, 7)}

    def _generate_examples(self, first, last):
      for i in range(first, last):
        yield i, {'image': self.images[i, :, :, :self.channels], 'label': i % 2}

  class TinyGray(Tiny):
    """One channel."""
    VERSION = tfds.core.Version('1.0.0')
    channels = 1

  return tmp_path_factory.mktemp('tfds'), Tiny


@pytest.mark.parametrize('name', ['tiny', 'tiny_gray'])
def test_images_given_as_arrays_are_prepared_and_read_back_exactly(prepared, name):
  data_dir, tiny = prepared
  dataset = _load(f'tfds:{name}', data_dir)
  assert 'tensorflow' not in sys.modules
  assert dataset.class_names == ('cat', 'dog') and len(dataset.test.in_memory().files) == 2
  images = tiny.images[:5] if name == 'tiny' else np.repeat(tiny.images[:5, ..., :1], 3, 3)
  read = dataset.train.in_memory().files, dataset.train.labels
  given = {image.tobytes(): i % 2 for i, image in enumerate(images)}
  assert {image.tobytes(): label for image, label in zip(*read)} == given
  again = _load(f'tfds:{name}', data_dir)
  np.testing.assert_array_equal(again.train.in_memory().files, dataset.train.in_memory().files)
  assert again.train.fingerprint == dataset.train.fingerprint


def test_a_large_split_is_read_record_by_record_and_its_labels_are_kept(prepared, monkeypatch):
  data_dir, _ = prepared
  small = _load('tfds:tiny', data_dir)
  monkeypatch.setattr(tfds_lib, 'KEPT_BYTES', 0)
  large = _load('tfds:tiny', data_dir)
  assert isinstance(large.train.files, tfds_lib.Records)
  np.testing.assert_array_equal(large.train.in_memory().files, small.train.in_memory().files)
  np.testing.assert_array_equal(large.train.labels, small.train.labels)
  assert len(list(data_dir.rglob('labels-*.npy'))) == 2  # of train and test
  monkeypatch.setattr(distributed, 'interleave', None)  # nothing is read again
  np.testing.assert_array_equal(_load('tfds:tiny', data_dir).train.labels, small.train.labels)


@pytest.mark.slow
def test_processes_with_separate_disks_read_the_same_labels(prepared, tmp_path):
  _load('tfds:tiny', prepared[0])  # which prepares it
  program = tmp_path / 'program.py'
  program.write_text(
      'import sys\n'
      'from instdisc_jax import config, data\n'
      'from instdisc_jax.data import tfds\n'
      'from instdisc_jax.runtime import distributed\n'
      'port, process, folder = sys.argv[1:]\n'
      'distributed.initialize(f"127.0.0.1:{port}", 2, int(process))\n'
      'tfds.KEPT_BYTES = 0\n'
      'settings = config.default()\n'
      'settings.dataset.update(name="tfds:tiny", data_dir=folder)\n'
      'print(data.load(settings.dataset, seed=0).train.labels.tolist())\n')
  folders = [tmp_path / 'disk0', tmp_path / 'disk1']
  for folder in folders:
    shutil.copytree(prepared[0], folder)
    for kept in folder.rglob('labels-*.npy'):
      kept.unlink()
  for time in range(3):
    if time == 1:  # only one disk has the labels
      for kept in folders[1].rglob('labels-*.npy'):
        kept.unlink()
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = str(free.getsockname()[1])
    processes = [subprocess.Popen([sys.executable, program, port, str(i), folder], text=True,
                                  stdout=subprocess.PIPE) for i, folder in enumerate(folders)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    labels = [json.loads(text.splitlines()[-1]) for text in printed]  # after the network's lines
    assert labels[0] == labels[1] and sorted(labels[0]) == [0, 0, 0, 1, 1]
    assert all(len(list(folder.rglob('labels-*.npy'))) == 2 for folder in folders)


def test_validation_names_a_split(prepared):
  data_dir, _ = prepared
  assert len(_load('tfds:tiny', data_dir, validation='train').test) == 5
  with pytest.raises(errors.UserError, match="dataset.validation is 'val', must be one of"):
    _load('tfds:tiny', data_dir, validation='val')


def test_a_failed_download_names_the_data_dir(monkeypatch, tmp_path):
  import tensorflow_datasets as tfds
  def no_network(*args, **kwargs):
    raise ConnectionError('Name or service not known')
  monkeypatch.setattr(tfds.download.DownloadManager, 'download', no_network)
  monkeypatch.setattr(tfds.download.DownloadManager, 'download_and_extract', no_network)
  with pytest.raises(errors.UserError, match='tfds:mnist is not prepared.*Name or service.*'
                                             'set --config.dataset.data_dir'):
    tfds_lib.load('mnist', str(tmp_path))


def test_unknown_data_sets_and_folders(tmp_path):
  with pytest.raises(errors.UserError, match="'cifar11' is not a TFDS data set"):
    tfds_lib.load('cifar11', str(tmp_path))
  with pytest.raises(errors.UserError,
                     match="dataset.data_dir is '/nowhere', must be an existing folder"):
    tfds_lib.load('cifar10', '/nowhere')


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_TFDS.exists(), reason='no prepared CIFAR-10 beside the project')
def test_cifar10():
  dataset = _load('tfds:cifar10', SHARED_TFDS)
  train, test = dataset.train.in_memory(), dataset.test.in_memory()
  assert train.files.shape == (50_000, 32, 32, 3)
  assert test.files.shape == (10_000, 32, 32, 3)
  np.testing.assert_array_equal(np.bincount(dataset.train.labels), 5000)
  assert dataset.class_names[3] == 'cat' and len(dataset.class_names) == 10
