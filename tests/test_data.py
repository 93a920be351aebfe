import json
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import data, errors
from instdisc_jax.data import digits, order
from instdisc_jax.data import tfds as tfds_lib

SHARED_TFDS = pathlib.Path(__file__).parents[2] / 'shared' / 'data' / 'tfds'


def _config(name, **kwargs):
  config = config_lib.default().dataset
  config.update(name=name, **kwargs)
  return config


class TestOrder:

  def test_every_epoch_is_a_permutation_and_batches_straddle_epochs(self):
    chain = np.concatenate([order.batch_index(0, t, 8, 29) for t in range(29)])  # 8 epochs of 29
    epochs = chain.reshape(8, 29)
    for epoch in epochs:
      np.testing.assert_array_equal(np.sort(epoch), np.arange(29))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert all(len(order.batch_index(0, t, 8, 29)) == 8 for t in range(10))

  def test_a_batch_is_a_function_of_seed_and_step_alone(self):
    later = order.batch_index(3, 1000, 8, 29)
    for step in (5, 2000, 0):
      order.batch_index(3, step, 8, 29)
    np.testing.assert_array_equal(order.batch_index(3, 1000, 8, 29), later)
    assert not np.array_equal(order.batch_index(4, 1000, 8, 29), later)

  def test_the_chain_does_not_depend_on_the_batch_size(self):
    chain = lambda size: np.concatenate([order.batch_index(0, t, size, 29)
                                         for t in range(120 // size)])
    np.testing.assert_array_equal(chain(8), chain(60))

  def test_a_batch_may_span_several_epochs(self):
    np.testing.assert_array_equal(np.bincount(order.batch_index(0, 1, 12, 4)), [3, 3, 3, 3])

  def test_the_order_is_the_same_on_every_numpy(self):
    np.testing.assert_array_equal(order.batch_index(0, 0, 8, 100), [13, 97, 16, 37, 21, 35, 55, 86])


class TestDigits:

  def test_real_digits_fill_a_fixed_canvas(self):
    dataset = data.load(_config('digits'), seed=0)
    assert dataset.train.whole().shape == (1297, 32, 32, 3)
    assert dataset.train.whole().dtype == np.uint8
    assert dataset.test.whole().shape == (500, 32, 32, 3)
    np.testing.assert_array_equal(np.unique(dataset.train.labels), np.arange(10))
    assert data.load(_config('digits'), seed=1).train.fingerprint == dataset.train.fingerprint

  def test_no_test_image_comes_from_a_training_original(self):
    from sklearn import datasets
    originals = datasets.load_digits().images.reshape(-1, 64)
    train = {x.tobytes() for x in originals[:digits.NUM_TRAIN]}
    assert not any(x.tobytes() in train for x in originals[digits.NUM_TRAIN:])

  def test_places_and_sizes_vary(self):
    drawn = digits.load()[0][0][..., 0] > 0
    heights = drawn.any(axis=2).sum(axis=1)
    tops = drawn.any(axis=2).argmax(axis=1)
    assert np.unique(heights).size > 5 and np.unique(tops).size > 5


class TestLimit:

  def test_a_seeded_subset(self):
    whole = data.load(_config('digits'), seed=0)
    few, other = (data.load(_config('digits', limit=50), seed=seed) for seed in (0, 1))
    assert len(few.train.whole()) == len(few.train.labels) == 50
    pictures = {x.tobytes() for x in whole.train.whole()}
    assert all(x.tobytes() in pictures for x in few.train.whole())
    assert len({whole.train.fingerprint, few.train.fingerprint, other.train.fingerprint}) == 3
    assert len(few.test.whole()) == 500

  def test_more_than_there_are(self):
    with pytest.raises(errors.UserError, match=r'dataset.limit is 5000.*1297.*set --config'):
      data.load(_config('digits', limit=5000), seed=0)


class TestArrays:

  images = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)

  def _load(self, path, **arrays):
    np.savez(path / 'a.npz', **arrays)
    return data.load(_config(f'arrays:{path / "a.npz"}'), seed=0)

  def test_images_alone(self, tmp_path):
    dataset = self._load(tmp_path, images=self.images)
    np.testing.assert_array_equal(dataset.train.whole(), self.images)
    assert dataset.train.labels is None and dataset.test is None

  def test_labels_and_test_images(self, tmp_path):
    dataset = self._load(tmp_path, images=self.images, labels=np.arange(6),
                         test_images=self.images[:2], test_labels=np.array([1, 0]))
    np.testing.assert_array_equal(dataset.train.labels, np.arange(6))
    np.testing.assert_array_equal(dataset.test.labels, [1, 0])

  def test_the_fingerprint_follows_the_pictures(self, tmp_path):
    other = self.images.copy()
    other[0, 0, 0, 0] ^= 1
    assert (self._load(tmp_path, images=self.images).train.fingerprint
            != self._load(tmp_path, images=other).train.fingerprint)

  @pytest.mark.parametrize('arrays, message', [
      (dict(pictures=images), "must have 'images'"),
      (dict(images=images / 255), r"'images' in .* is float64 \[6, 8, 10, 3\], must be uint8"),
      (dict(images=images[..., :1]), r'must be uint8 \[N, H, W, 3\]'),
      (dict(images=images[:0]), r'must be uint8 \[N, H, W, 3\]'),
      (dict(images=images, labels=np.arange(5)), "'labels' .* one integer per image"),
      (dict(images=images, labels=np.arange(6) - 1), "'labels' .* has the value -1"),
      (dict(images=images, labels=np.ones(6)), "'labels' .* one integer per image"),
      (dict(images=images, test_labels=np.arange(6)), "'test_labels' .* one integer per image"),
      (dict(images=np.array([{}], dtype=object)), 'no readable .npz of plain arrays'),
  ])
  def test_wrong_contents_are_named(self, tmp_path, arrays, message):
    with pytest.raises(errors.UserError, match=message):
      self._load(tmp_path, **arrays)

  def test_no_file_and_no_npz(self, tmp_path):
    (tmp_path / 'text.npz').write_text('not a zip')
    for name, message in (('none.npz', 'no file'), ('text.npz', 'no readable .npz')):
      with pytest.raises(errors.UserError, match=message):
        data.load(_config(f'arrays:{tmp_path / name}'), seed=0)


class TestTfds:

  @pytest.fixture(scope='class')
  def prepared(self, tmp_path_factory):
    """A tiny builder whose pictures are arrays, prepared without TensorFlow."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder):
      """Colour and gray pictures given as arrays."""
      VERSION = tfds.core.Version('1.0.0')
      pictures = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
      channels = 3

      def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=(5, 6, self.channels)),
            'label': tfds.features.ClassLabel(names=['cat', 'dog'])}))

      def _split_generators(self, dl_manager):
        return {'train': self._generate_examples(0, 5), 'test': self._generate_examples(5, 7)}

      def _generate_examples(self, first, last):
        for i in range(first, last):
          yield i, {'image': self.pictures[i, :, :, :self.channels], 'label': i % 2}

    class TinyGray(Tiny):
      """One channel."""
      VERSION = tfds.core.Version('1.0.0')
      channels = 1

    return tmp_path_factory.mktemp('tfds'), Tiny

  @pytest.mark.parametrize('name', ['tiny', 'tiny_gray'])
  def test_array_pictures_are_prepared_and_read_back_exactly(self, prepared, name):
    data_dir, tiny = prepared
    dataset = data.load(_config(f'tfds:{name}', data_dir=str(data_dir)), seed=0)
    assert 'tensorflow' not in sys.modules
    assert dataset.class_names == ('cat', 'dog') and len(dataset.test.whole()) == 2
    pictures = tiny.pictures[:5] if name == 'tiny' else np.repeat(tiny.pictures[:5, ..., :1], 3, 3)
    read = dataset.train.whole(), dataset.train.labels
    given = {p.tobytes(): i % 2 for i, p in enumerate(pictures)}
    assert {p.tobytes(): label for p, label in zip(*read)} == given
    again = data.load(_config(f'tfds:{name}', data_dir=str(data_dir)), seed=0)
    np.testing.assert_array_equal(again.train.whole(), dataset.train.whole())
    assert again.train.fingerprint == dataset.train.fingerprint

  def test_a_large_split_is_read_record_by_record_and_its_labels_kept(self, prepared, monkeypatch):
    data_dir, tiny = prepared
    config = _config('tfds:tiny', data_dir=str(data_dir))
    small = data.load(config, seed=0)
    monkeypatch.setattr(tfds_lib, '_KEPT_BYTES', 0)
    large = data.load(config, seed=0)
    assert isinstance(large.train.files, tfds_lib.Records)
    np.testing.assert_array_equal(large.train.whole(), small.train.whole())
    np.testing.assert_array_equal(large.train.labels, small.train.labels)
    assert len(list(data_dir.rglob('labels-*.npy'))) == 2  # of train and test
    monkeypatch.setattr(tfds_lib.distributed, 'interleave', None)  # nothing is read again
    np.testing.assert_array_equal(data.load(config, seed=0).train.labels, small.train.labels)

  @pytest.mark.slow
  def test_processes_with_disks_of_their_own_agree_on_what_is_read(self, prepared, tmp_path):
    data.load(_config('tfds:tiny', data_dir=str(prepared[0])), seed=0)  # which prepares it
    program = tmp_path / 'program.py'
    program.write_text(
        'import sys\n'
        'from instdisc_jax import config, data, distributed\n'
        'from instdisc_jax.data import tfds\n'
        'port, process, folder = sys.argv[1:]\n'
        'distributed.initialize(f"127.0.0.1:{port}", 2, int(process))\n'
        'tfds._KEPT_BYTES = 0\n'
        'settings = config.default()\n'
        'settings.dataset.update(name="tfds:tiny", data_dir=folder)\n'
        'print(data.load(settings.dataset, seed=0).train.labels.tolist())\n')
    folders = [tmp_path / 'disk0', tmp_path / 'disk1']
    for folder in folders:
      shutil.copytree(prepared[0], folder)
      for kept in folder.rglob('labels-*.npy'):
        kept.unlink()
    for time in range(3):
      if time == 1:  # the labels are on one disk alone
        for kept in folders[1].rglob('labels-*.npy'):
          kept.unlink()
      with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
      processes = [subprocess.Popen([sys.executable, program, port, str(i), folder], text=True,
                                    stdout=subprocess.PIPE) for i, folder in enumerate(folders)]
      told = [process.communicate(timeout=120)[0] for process in processes]
      assert [process.returncode for process in processes] == [0, 0]
      labels = [json.loads(words.splitlines()[-1]) for words in told]  # after what the network says
      assert labels[0] == labels[1] and sorted(labels[0]) == [0, 0, 0, 1, 1]
      assert all(len(list(folder.rglob('labels-*.npy'))) == 2 for folder in folders)

  def test_validation_names_a_split(self, prepared):
    data_dir, _ = prepared
    config = _config('tfds:tiny', data_dir=str(data_dir), validation='train')
    assert len(data.load(config, seed=0).test) == 5
    config.validation = 'val'
    with pytest.raises(errors.UserError, match="dataset.validation is 'val', must be one of"):
      data.load(config, seed=0)

  def test_a_download_that_fails_names_the_data_dir(self, monkeypatch, tmp_path):
    import tensorflow_datasets as tfds
    def no_network(*args, **kwargs):
      raise ConnectionError('Name or service not known')
    monkeypatch.setattr(tfds.download.DownloadManager, 'download', no_network)
    monkeypatch.setattr(tfds.download.DownloadManager, 'download_and_extract', no_network)
    with pytest.raises(errors.UserError, match='tfds:mnist is not prepared.*Name or service.*'
                                               'set --config.dataset.data_dir'):
      tfds_lib.load('mnist', str(tmp_path))

  def test_unknown_sets_and_folders(self, tmp_path):
    with pytest.raises(errors.UserError, match="TFDS knows no data set 'cifar11'"):
      tfds_lib.load('cifar11', str(tmp_path))
    with pytest.raises(errors.UserError, match="dataset.data_dir is '/nowhere', which is no"):
      tfds_lib.load('cifar10', '/nowhere')

  @pytest.mark.slow
  @pytest.mark.skipif(not SHARED_TFDS.exists(), reason='no prepared CIFAR-10 beside the project')
  def test_cifar10(self):
    dataset = data.load(_config('tfds:cifar10', data_dir=str(SHARED_TFDS)), seed=0)
    assert dataset.train.whole().shape == (50_000, 32, 32, 3)
    assert dataset.test.whole().shape == (10_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), 5000)
    assert dataset.class_names[3] == 'cat' and len(dataset.class_names) == 10


def test_an_unknown_kind_of_data():
  for name in ('mnist', 'folder:', 'tfds:', 'arrays:', 'fake:x', ''):
    with pytest.raises(errors.UserError, match='must be digits, tfds:NAME, folder:PATH, arrays:'):
      data.load(_config(name), seed=0)
