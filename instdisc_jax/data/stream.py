"""Pictures read, decoded and cropped on the host while the devices train.

Grain runs the reading in threads or worker processes. What a step gets is a function of (seed,
step) alone: the chain of `order.py`, and crops drawn from (seed, place in the chain, index) as
`augment` draws them. So any number of processes and workers gives the same batches, and a run goes
on at any step without anything having been saved.
"""

import functools
import os
import signal

from absl import flags
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax import augment
from instdisc_jax.data import draws, order

_AHEAD = 2  # batches that each thread or worker has ready


class Stream:
  """Feeds the loop with batches that the host makes.

  Args:
    pictures: `Pictures`.
    mesh: the device mesh.
    seed: of the run.
    crop_seed: (seed, stream): what `augment`'s keys are derived from.
    batch_size: B.
    last_step: of the run; nothing is read past it.
    side: of the views.
    crop_scale: see `augment.augment`.
    crop_ratio: likewise.
    workers: processes; 0 for threads of this one.

  Attributes:
    per_dispatch: 1.
    resident: False.
  """
  per_dispatch = 1
  resident = False

  def __init__(self, pictures, mesh, *, seed, crop_seed, batch_size, last_step, side, crop_scale,
               crop_ratio, workers):
    self._slots = _local_slots(mesh, batch_size)
    self._load = functools.partial(
        load_batch, pictures=pictures, seed=seed, crop_seed=crop_seed, batch_size=batch_size,
        slots=self._slots, side=side, crop=dict(crop_scale=crop_scale, crop_ratio=crop_ratio))
    self._mesh, self._batch_size = mesh, batch_size
    self._workers, self._last_step = workers, last_step
    self._batches, self._step = None, None

  def at(self, step):
    """(images [B, side, side, 3] uint8, index [1, B]) of the batch at `step`, on the devices."""
    if step != self._step:
      self.close()
      self._batches = in_background(self._load, step, self._last_step, self._workers)
      self._step = step
    images, index = next(self._batches)
    self._step += 1
    place = functools.partial(_place, mesh=self._mesh, slots=self._slots, total=self._batch_size)
    return place(images), place(index, lead=1)

  def close(self):
    """Ends the workers."""
    if self._batches is not None:
      self._batches.close()
    self._batches, self._step = None, None


def load_batch(step, *, pictures, seed, crop_seed, batch_size, slots, side, crop):
  """This process's part of the batch at a step.

  Args:
    step: t.
    pictures: `Pictures`.
    seed: of the run.
    crop_seed: (seed, stream).
    batch_size: B.
    slots: [b] which of the B places are this process's.
    side: of the views.
    crop: crop_scale and crop_ratio.

  Returns:
    (images [b, side, side, 3] uint8, index [b] int32).

  Raises:
    errors.UserError: a picture can't be read.
  """
  index = order.batch_index(seed, step, batch_size, len(pictures))[slots]
  place = (step * batch_size + slots) % 2**32
  base, stream = crop_seed
  drawn = draws.uniform(base, (stream, place, index), augment.DRAWS)
  images = np.empty((len(slots), side, side, 3), np.uint8)
  for i, row in enumerate(index):
    box = lambda height, width: augment.draw_crop(drawn[i:i + 1], height, width, **crop)[0].tolist()
    images[i] = pictures.view(row, box, side)
  return images, index


class Fake:
  """Feeds the loop with one batch of noise made on the devices, and the indices of the chain.

  Args:
    pictures: `Pictures`, for their number.
    mesh: the device mesh.
    seed: of the run.
    batch_size: B.
    side: of the views.

  Attributes:
    per_dispatch: 1.
    resident: False.
  """
  per_dispatch = 1
  resident = False

  def __init__(self, pictures, mesh, *, seed, batch_size, side):
    self._mesh, self._chain = mesh, (batch_size, len(pictures))
    self._seed = seed
    draw = lambda: jax.random.bits(jax.random.key(seed), (batch_size, side, side, 3), 'uint8')
    self._images = jax.jit(draw, out_shardings=NamedSharding(mesh, P(*mesh.axis_names)))()

  def at(self, step):
    """(images [B, side, side, 3] uint8, index [1, B])."""
    batch_size, num_rows = self._chain
    index = order.batch_index(self._seed, step, batch_size, num_rows)
    slots = np.arange(batch_size)
    return self._images, _place(index, mesh=self._mesh, slots=slots, total=batch_size, lead=1)

  def close(self):
    """Nothing to close."""


class Views:
  """All pictures in order, each as evaluation sees it.

  Args:
    pictures: `Pictures`.
    mesh: the device mesh.
    side: of the views.
    workers: see `Stream`; threads where it is 0.
  """

  def __init__(self, pictures, mesh, side, workers):
    self.pictures, self.side = pictures, side
    self._mesh, self._workers = mesh, workers

  def __len__(self):
    return len(self.pictures)

  def chunks(self, size):
    """Yields [devices · size, side, side, 3] on the devices; the last picture fills the last."""
    total = size * self._mesh.size
    slots = _local_slots(self._mesh, total)
    load = functools.partial(load_views, pictures=self.pictures, slots=slots, total=total,
                             side=self.side)
    # Processes take seconds to start: threads do for one chunk in each.
    count = -(-len(self) // total)
    batches = in_background(load, 0, count, self._workers if count > 8 else 0)
    try:
      for images in batches:
        yield _place(images, mesh=self._mesh, slots=slots, total=total)
    finally:
      batches.close()


def load_views(chunk, *, pictures, slots, total, side):
  """This process's part of a chunk of views; raises `errors.UserError`."""
  index = np.minimum(chunk * total + slots, len(pictures) - 1)
  return np.stack([pictures.centre(i, side) for i in index])


def workers(configured):
  """The number of worker processes: as configured, or by default one for each CPU but two."""
  if configured is not None:
    return configured
  return max(0, min(16, len(os.sched_getaffinity(0)) - 2))


def in_background(load, first, last, num_workers):
  """Runs a function ahead of whoever asks for its results.

  Args:
    load: picklable; called with first, first + 1, ..., last - 1.
    first: an integer.
    last: likewise, exclusive.
    num_workers: processes; 0 for threads of this one.

  Returns:
    An iterator over the results in order, with `close()`.
  """
  import cv2  # slow to import, and not needed where everything is resident
  import grain

  threads = 1 if num_workers else max(1, len(os.sched_getaffinity(0)))
  dataset = grain.MapDataset.range(first, last).map(load).to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + _AHEAD - 1))
  if num_workers:
    flags.FLAGS.mark_as_parsed()  # Grain's own, which it reads for worker processes
    dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=_AHEAD),
        worker_init_fn=_prepare_worker)
  cv2.setNumThreads(1)  # pictures are decoded side by side, each by one thread
  return iter(dataset)


def _prepare_worker(worker, num_workers):
  import cv2

  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run itself decides what Ctrl-C ends
  cv2.setNumThreads(1)


def _local_slots(mesh, total):
  """Which of `total` places along the first axis lie on this process's devices."""
  parts = NamedSharding(mesh, P(*mesh.axis_names)).addressable_devices_indices_map((total,))
  return np.unique(np.concatenate([np.arange(total)[part] for part in parts.values()]))


def _place(local, *, mesh, slots, total, lead=0):
  """This process's part [b, ...] of [total, ...] as a global array; `lead` axes of 1 before it."""
  shape = (1,) * lead + (total, *local.shape[1:])

  def part(where):
    start, stop, _ = where[lead].indices(total)
    first = np.searchsorted(slots, start)
    mine = local[first:first + stop - start].reshape((1,) * lead + (stop - start, *local.shape[1:]))
    return np.array(mine)  # a copy: a CPU device would keep a worker's shared memory in use

  spec = P(*(None,) * lead, *mesh.axis_names)
  return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)
