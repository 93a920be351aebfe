"""Random pictures, for benchmarks: training reads none of them, see `stream.Fake`."""

import dataclasses

import numpy as np

from instdisc_jax.data import pictures

SIDE = 224


@dataclasses.dataclass(frozen=True)
class _Noise:
  """files[i] is picture i, drawn when asked for."""
  count: int

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    return np.random.RandomState(i).randint(0, 256, (SIDE, SIDE, 3), np.uint8)


def load(count):
  """`pictures.Pictures` of noise, without labels."""
  return pictures.Pictures(_Noise(count), None, f'{count} fake', shape=(SIDE, SIDE, 3))
