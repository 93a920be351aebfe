"""The order of the images.

The order is an endless chain of seeded permutations of 0..N-1, one for each epoch, cut into batches
of B. No batch is short; a batch may straddle two epochs. The image at a place in the chain is a
function of (seed, place) alone: there is no iterator to save, and any process can compute any step.
"""

import dataclasses
import functools

from jaxtyping import Int
import numpy as np

from instdisc_jax import config as config_lib

_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Chain:
  """The order of a run.

  Attributes:
    seed: the run's seed.
    batch_size: B >= 1.
    num_rows: N >= 1.
    kind: how the permutation of an epoch is drawn, see `dataset.order`. 'keyed': place by place,
      with no array of N numbers. 'permutation': as a shuffled array, as in version 0.1.
  """
  seed: int
  batch_size: int
  num_rows: int
  kind: str = 'keyed'

  @classmethod
  def of(cls, config: config_lib.Config, num_rows: int) -> 'Chain':
    """The order that a configuration names."""
    return cls(config.seed, config.batch_size, num_rows, config.dataset.order)

  def batch(self, step: int) -> Int[np.ndarray, ' B']:
    """Indices [B] int32 of the images of the batch at `step` >= 0."""
    first = step * self.batch_size
    last, pieces = first + self.batch_size, []
    for epoch in range(first // self.num_rows, (last - 1) // self.num_rows + 1):
      start = epoch * self.num_rows
      pieces.append(self._images(epoch, max(first - start, 0), min(last - start, self.num_rows)))
    return np.concatenate(pieces)

  def _images(self, epoch, start, stop):
    """The images at the places start..stop-1 of an epoch."""
    if self.kind == 'permutation':
      return _permutation(self.seed, epoch, self.num_rows)[start:stop]
    return keyed(np.arange(start, stop), self.num_rows, self.seed, epoch)


def keyed(place: Int[np.ndarray, ' n'], num_rows: int, seed: int,
          epoch: int) -> Int[np.ndarray, ' n']:
  """The values at some places of a pseudorandom permutation of 0..N-1.

  A Feistel network over pairs (left, right), of which there are at least N, with SplitMix64 as its
  round function (Black and Rogaway, CT-RSA 2002; Steele et al., OOPSLA 2014). A value of N or more
  is permuted again, until it is below N.

  Args:
    place: [n] integers in 0..N-1.
    num_rows: N >= 1.
    seed: the run's seed.
    epoch: each epoch has its own permutation.

  Returns:
    [n] int32.
  """
  keys = _keys(seed, epoch)
  width = np.uint64(max(1, int(np.ceil(np.sqrt(num_rows)))))
  height = np.uint64(-(-num_rows // int(width)))
  value = place.astype(np.uint64)
  outside = np.arange(len(value))
  while len(outside):
    left, right = np.divmod(value[outside], width)
    for i in range(0, _ROUNDS, 2):
      left = (left + _mix(right + keys[i])) % height
      right = (right + _mix(left + keys[i + 1])) % width
    value[outside] = left * width + right
    outside = outside[value[outside] >= num_rows]
  return value.astype(np.int32)


@functools.lru_cache(maxsize=2)
def _keys(seed, epoch):
  # RandomState, not Generator: NumPy promises that its streams never change between versions.
  return np.random.RandomState([seed, epoch]).randint(0, 2**64, _ROUNDS, np.uint64)


def _mix(x):
  """The finalizer of SplitMix64, without its highest bit: sums with it must not wrap around."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, num_rows):
  return np.random.RandomState([seed, epoch]).permutation(num_rows).astype(np.int32)
