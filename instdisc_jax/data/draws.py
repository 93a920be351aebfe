"""The random numbers of `jax.random`, on the host and without JAX.

The stream crops pictures on the host, in threads and worker processes that must not touch a device;
the crop must nevertheless be the one that `augment` would draw. This is JAX's default generator,
Threefry-2x32 (Salmon et al., SC 2011), for keys, `fold_in` and `uniform`.
"""

import numpy as np

_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def uniform(seed, folded, count):
  """`uniform(fold_in(... fold_in(key(seed), folded[0]) ...), (count,))` for many keys, to the bit.

  Args:
    seed: below 2^32.
    folded: numbers below 2^32, or [B] arrays of them, folded in one after the other.
    count: how many numbers for each key.

  Returns:
    [B, count] float32 in [0, 1).
  """
  key = np.zeros(1, np.uint32), np.array([seed], np.uint32)
  for data in folded:
    key = _threefry(key, np.zeros(1, np.uint32), np.atleast_1d(data).astype(np.uint32))
  high, low = _threefry([x[:, None] for x in key], np.zeros(count, np.uint32),
                        np.arange(count, dtype=np.uint32))
  one_to_two = ((high ^ low) >> np.uint32(9)) | np.uint32(0x3F800000)
  return one_to_two.view(np.float32) - np.float32(1)


def _threefry(key, x, y):
  keys = *key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)
  x, y = x + keys[0], y + keys[1]
  for i in range(5):
    for rotation in _ROTATIONS[i % 2]:
      x = x + y
      y = ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))) ^ x
    x = x + keys[(i + 1) % 3]
    y = y + keys[(i + 2) % 3] + np.uint32(i + 1)
  return x, y
