import jax
import numpy as np

from instdisc_jax import augment, threefry


def test_the_host_draws_what_jax_draws_bit_for_bit():
  for seed in (0, 7, 2**32 - 1):
    stream, place, index = 1, np.array([0, 5, 2**32 - 1]), np.array([3, 0, 1_281_166])
    found = threefry.uniform(seed, (stream, place, index), augment.DRAWS)
    for row, p, i in zip(found, place, index):
      key = jax.random.key(seed)
      for number in (stream, p, i):
        key = jax.random.fold_in(key, np.uint32(number))
      np.testing.assert_array_equal(row, jax.random.uniform(key, (augment.DRAWS,)))
