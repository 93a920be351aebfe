"""A small data set that lies on the devices as a whole: nothing is read during training."""

import os

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax.data import order


class Resident:
  """Feeds the loop from pictures on the devices.

  Args:
    pictures: `Pictures` of one size.
    mesh: the device mesh.
    seed: of the run.
    batch_size: B.
    per_dispatch: S, batches given at once.

  Attributes:
    images: [N, H, W, 3] uint8 on every device.
    per_dispatch: S.
    resident: True.
  """
  resident = True

  def __init__(self, pictures, mesh, seed, batch_size, per_dispatch):
    whole = pictures.whole()
    self.images = on_every_device(whole, mesh)
    self.per_dispatch = per_dispatch
    self._chain = seed, batch_size, len(whole)
    self._sharding = NamedSharding(mesh, P(None, *mesh.axis_names))

  def at(self, step):
    """(images, [S, B] indices of the batches from `step` on), for `train.train_steps`."""
    seed, batch_size, num_rows = self._chain
    index = np.stack([order.batch_index(seed, step + i, batch_size, num_rows)
                      for i in range(self.per_dispatch)])
    return self.images, jax.make_array_from_callback(index.shape, self._sharding,
                                                     lambda part: index[part])

  def close(self):
    """Nothing to close."""


def on_every_device(array, mesh):
  """A NumPy array that all processes have, copied to each device."""
  return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P()),
                                      lambda part: array[part])


def fits(pictures, share, mesh):
  """Whether all pictures, decoded, take at most this share of a device's memory.

  Args:
    pictures: `Pictures`; of different sizes they never fit.
    share: of the memory, 0..1.
    mesh: the device mesh.
  """
  if pictures.shape is None:
    return False
  device = mesh.local_devices[0]
  memory = (device.memory_stats() or {}).get('bytes_limit')
  if memory is None:  # a CPU: its devices share the machine's memory, each with a copy
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / len(mesh.local_devices)
  return len(pictures) * int(np.prod(pictures.shape)) <= share * memory
