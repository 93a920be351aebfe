import numpy as np
from sklearn import datasets

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import digits


def test_real_digits_fill_a_fixed_canvas():
  config = config_lib.default().dataset
  dataset = data.load(config, seed=0)
  assert dataset.train.files.shape == (1297, 32, 32, 3)
  assert dataset.train.files.dtype == np.uint8
  assert dataset.test.files.shape == (500, 32, 32, 3)
  np.testing.assert_array_equal(np.unique(dataset.train.labels), np.arange(10))
  assert data.load(config, seed=1).train.fingerprint == dataset.train.fingerprint


def test_no_test_image_comes_from_a_training_original():
  originals = datasets.load_digits().images.reshape(-1, 64)
  train = {x.tobytes() for x in originals[:digits.NUM_TRAIN]}
  assert not any(x.tobytes() in train for x in originals[digits.NUM_TRAIN:])


def test_positions_and_sizes_vary():
  drawn = digits.load()[0][0][..., 0] > 0
  heights = drawn.any(axis=2).sum(axis=1)
  tops = drawn.any(axis=2).argmax(axis=1)
  assert np.unique(heights).size > 5 and np.unique(tops).size > 5
