"""The order of the images.

The order is an endless chain of seeded permutations of 0..N-1, cut into batches of B. No batch is
short; a batch may straddle two epochs. The image at a place in the chain is a function of (seed,
place) alone: there is no iterator to save, and any process can compute any step.
"""

import functools

from jaxtyping import Int
import numpy as np


def batch_index(seed: int, step: int, batch_size: int, num_rows: int) -> Int[np.ndarray, ' B']:
  """Image indices of the batch at `step`.

  Args:
    seed: the run's seed.
    step: t >= 0.
    batch_size: B >= 1.
    num_rows: N >= 1.

  Returns:
    [B] int32.
  """
  first = step * batch_size
  last = first + batch_size
  pieces = []
  for epoch in range(first // num_rows, (last - 1) // num_rows + 1):
    start = epoch * num_rows
    pieces.append(_permutation(seed, epoch, num_rows)[max(first - start, 0):last - start])
  return np.concatenate(pieces)


@functools.lru_cache(maxsize=2)
def _permutation(seed, epoch, num_rows):
  # RandomState, not Generator: NumPy promises that its streams never change between versions.
  return np.random.RandomState([seed, epoch]).permutation(num_rows).astype(np.int32)
