"""Random images, for benchmarks: training reads none of them, see `feeds.Fake`."""

import dataclasses

import numpy as np

from instdisc_jax.data import images

SIDE = 224


@dataclasses.dataclass(frozen=True)
class _Noise:
  """files[i] is image i, generated when it is read."""
  count: int

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    return np.random.RandomState(i).randint(0, 256, (SIDE, SIDE, 3), np.uint8)


def load(count: int) -> images.Images:
  """`Images` of noise, without labels."""
  return images.Images(_Noise(count), None, f'{count} fake', shape=(SIDE, SIDE, 3))
