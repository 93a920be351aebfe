import dataclasses
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
from instdisc_jax.data import scenes
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

  class TinyVoc(Tiny):
    """Images with several labels, as PASCAL VOC has them."""
    VERSION = tfds.core.Version('1.0.0')
    labels = [[0], [0, 1], [], [1, 2], [2], [0, 2], [1]]
    easy = [[0], [1], [], [1, 2], [], [0, 2], [1]]  # the other labels are of difficult objects

    def _info(self):
      classes = tfds.features.Sequence(tfds.features.ClassLabel(names=['cat', 'dog', 'car']))
      return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
          'image': tfds.features.Image(shape=(5, 6, 3)), 'labels': classes,
          'labels_no_difficult': classes, 'objects': tfds.features.Sequence({
              'label': classes.feature, 'bbox': tfds.features.BBoxFeature(),
              'is_difficult': np.bool_})}))

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(0, 3), 'test': self._generate_examples(5, 7),
              'validation': self._generate_examples(3, 5)}

    def _generate_examples(self, first, last):
      for i in range(first, last):
        objects = [{'label': c, 'bbox': tfds.features.BBox(0.2, 0.5, 1.0, 1.0),  # ymin, xmin, ...
                    'is_difficult': c not in self.easy[i]} for c in self.labels[i]]
        yield i, {'image': self.images[i], 'labels': self.labels[i],
                  'labels_no_difficult': self.easy[i], 'objects': objects}

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


def test_a_split_whose_labels_are_secret_is_passed_over(prepared, monkeypatch):
  data_dir, _ = prepared
  opened = tfds_lib._open

  def open_secret(builder, split):
    images = opened(builder, split)
    return dataclasses.replace(images, labels=images.labels * 0 - 1) if split == 'test' else images

  monkeypatch.setattr(tfds_lib, '_open', open_secret)
  assert _load('tfds:tiny', data_dir).test is None
  with pytest.raises(errors.UserError, match="the split 'test' of tfds:tiny has no labels: set"):
    _load('tfds:tiny', data_dir, validation='test')


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


def test_several_labels_are_tags_and_training_has_the_validation_images(prepared, monkeypatch):
  data_dir, tiny = prepared
  dataset = _load('tfds:tiny_voc', data_dir)
  assert dataset.class_names == ('cat', 'dog', 'car') and dataset.train.labels is None
  rows = {i: image.tobytes() for i, image in enumerate(tiny.images)}
  expected = {rows[i]: row for i, row in enumerate([
      (1, 0, 0), (-1, 1, 0), (0, 0, 0), (0, 1, 1), (0, 0, -1), (1, 0, 1), (0, 1, 0)])}
  for part, count in ((dataset.train, 5), (dataset.test, 2)):
    images = part.in_memory()
    assert part.tags.shape == (count, 3) and part.tags.dtype == np.int8
    assert [expected[image.tobytes()] for image in images.files] == [*map(tuple, part.tags)]
  np.testing.assert_array_equal(dataset.train.subset(np.array([3, 1]), 'two').tags,
                                dataset.train.tags[[3, 1]])
  monkeypatch.setattr(tfds_lib, 'KEPT_BYTES', 0)
  large = _load('tfds:tiny_voc', data_dir).train
  assert isinstance(large.files, tfds_lib.Records)
  np.testing.assert_array_equal(large.tags, dataset.train.tags)


def test_boxes_are_read_in_pixels(prepared):
  data_dir, tiny = prepared
  train, test, names = scenes.load('tfds:tiny_voc', str(data_dir))
  assert names == ('cat', 'dog', 'car') and (len(train), len(test)) == (5, 2)
  place = {image.tobytes(): i for i, image in enumerate(tiny.images)}
  labels = [[0], [0, 1], [], [1, 2], [2], [0, 2], [1]]
  for part in (train, test):
    for i, scene in enumerate(part.objects):
      expected = labels[place[part.images.full(i).tobytes()]]
      assert scene.classes.tolist() == expected
      assert scene.boxes.shape == (len(expected), 4)
      assert all(box == pytest.approx((3, 1, 6, 5)) for box in scene.boxes)  # of 5 x 6 pixels
  assert sum(scene.difficult.sum() for scene in train.objects) == 2
  with pytest.raises(errors.UserError, match="tfds:tiny has the features .* a set with boxes"):
    scenes.load('tfds:tiny', str(data_dir))
