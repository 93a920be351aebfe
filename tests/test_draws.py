import jax
import numpy as np

from instdisc_jax import augment
from instdisc_jax.data import draws


def test_the_host_draws_what_jax_draws_to_the_bit():
  for seed in (0, 7, 2**32 - 1):
    stream, place, index = 1, np.array([0, 5, 2**32 - 1]), np.array([3, 0, 1_281_166])
    found = draws.uniform(seed, (stream, place, index), augment.DRAWS)
    for row, p, i in zip(found, place, index):
      key = jax.random.key(seed)
      for number in (stream, p, i):
        key = jax.random.fold_in(key, np.uint32(number))
      np.testing.assert_array_equal(row, jax.random.uniform(key, (augment.DRAWS,)))


def test_the_host_draws_the_crops_of_the_device():
  drawn = draws.uniform(0, (1, np.arange(2000), np.arange(2000)), augment.DRAWS)
  crop = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))
  host = augment.draw_crop(drawn, 375, 500, **crop)
  device = np.asarray(augment.draw_crop(jax.numpy.asarray(drawn), 375, 500, **crop))
  assert isinstance(host, np.ndarray) and np.abs(host - device).max() <= 1
  assert np.mean((host == device).all(axis=1)) > 0.99  # but for rounding at a half
