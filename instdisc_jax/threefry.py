"""Random numbers by key, the same on the device and on the host.

Every random number of a run depends on (seed, stream, place or step, image index), never on the
position of a device. `key` returns JAX's keys; `uniform` draws what `jax.random.uniform` would draw
from them, but on the host and without JAX: the host crops images in threads and worker processes
that must not touch a device. Both are JAX's default generator, Threefry-2x32 (Salmon et al., SC
2011).
"""

import jax
from jaxtyping import Array, Float, Key, UInt
import numpy as np

INIT, AUGMENT, NOISE = range(3)  # the independent streams of a run
_ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def key(seed: int, stream: int) -> Key[Array, '']:
  """The key of one of a run's streams."""
  return jax.random.fold_in(jax.random.key(seed), stream)


def uniform(seed: int, folded: tuple, count: int) -> Float[np.ndarray, 'B count']:
  """`uniform(fold_in(... fold_in(key(seed), folded[0]) ...), (count,))` for many keys, bit for bit.

  Args:
    seed: below 2^32.
    folded: integers below 2^32, or [B] arrays of them, folded in one after the other.
    count: number of values to draw for each key.

  Returns:
    [B, count] float32 in [0, 1).
  """
  pair = np.zeros(1, np.uint32), np.array([seed], np.uint32)
  for data in folded:
    pair = _threefry(pair, np.zeros(1, np.uint32), np.atleast_1d(data).astype(np.uint32))
  high, low = _threefry((pair[0][:, None], pair[1][:, None]), np.zeros(count, np.uint32),
                        np.arange(count, dtype=np.uint32))
  one_to_two = ((high ^ low) >> np.uint32(9)) | np.uint32(0x3F800000)
  return one_to_two.view(np.float32) - np.float32(1)


_Words = UInt[np.ndarray, '...']


def _threefry(pair: tuple[_Words, _Words], x: _Words, y: _Words) -> tuple[_Words, _Words]:
  keys = *pair, pair[0] ^ pair[1] ^ np.uint32(0x1BD11BDA)
  x, y = x + keys[0], y + keys[1]
  for i in range(5):
    for rotation in _ROTATIONS[i % 2]:
      x = x + y
      y = ((y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))) ^ x
    x = x + keys[(i + 1) % 3]
    y = y + keys[(i + 2) % 3] + np.uint32(i + 1)
  return x, y
