import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.runtime import errors


def _config(name, **kwargs):
  config = config_lib.default().dataset
  config.update(name=name, **kwargs)
  return config


class TestLimit:

  def test_a_seeded_subset(self):
    full = data.load(_config('digits'), seed=0)
    few, other = (data.load(_config('digits', limit=50), seed=seed) for seed in (0, 1))
    assert len(few.train.files) == len(few.train.labels) == 50
    images = {x.tobytes() for x in full.train.files}
    assert all(x.tobytes() in images for x in few.train.files)
    assert len({full.train.fingerprint, few.train.fingerprint, other.train.fingerprint}) == 3
    assert len(few.test.files) == 500

  def test_more_images_than_there_are(self):
    with pytest.raises(errors.UserError, match=r'dataset.limit is 5000.*1297.*set --config'):
      data.load(_config('digits', limit=5000), seed=0)


def test_an_unknown_kind_of_data():
  for name in ('mnist', 'folder:', 'tfds:', 'arrays:', 'fake:x', ''):
    with pytest.raises(errors.UserError, match='must be digits, tfds:NAME, folder:PATH, arrays:'):
      data.load(_config(name), seed=0)
