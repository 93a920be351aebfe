"""The sources of a run's batches.

    Resident    a small set, kept on every device: nothing is read during training
    Stream      read, decoded and cropped on the host while the devices train
    Fake        one batch of noise generated on the devices, for benchmarks

A feed's batch is a function of (seed, step) alone: the chain of `order.py`, and the crops of
`views.py`. So any number of processes and workers yields the same batches, and a run can resume at
any step without any saved iterator state. Inside the mapped step, `take` picks a batch from what
`at` has placed on the devices; a batch holds 'index', and either 'image' or, if the host has
already cropped the images, 'view', with an axis of two views where `loss.views` is 2.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import threading
from typing import Any, TypeAlias

from absl import flags
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, UInt8
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax.data import images as images_lib
from instdisc_jax.data import order, views
from instdisc_jax.runtime import errors
from instdisc_jax.runtime import mesh as mesh_lib

_AHEAD = 2  # batches that each thread or worker keeps ready
Feed: TypeAlias = 'Resident | Stream | Fake'
Batch: TypeAlias = dict[str, jax.Array]


def choose_path(config: config_lib.Config, num_rows: int, image_shape: tuple[int, ...] | None,
                memory: float) -> str:
  """'resident' or 'stream' for `dataset.path=auto`.

  Args:
    config: the run's configuration.
    num_rows: N.
    image_shape: (H, W, 3) of all images, or None if they differ.
    memory: bytes of a device's memory.
  """
  if image_shape is None or config.dataset.name.startswith('fake:'):
    return 'stream'
  share = num_rows * math.prod(image_shape) / memory
  return 'resident' if share <= config.dataset.resident_share else 'stream'


def like(config: config_lib.Config, num_rows: int, image_shape: tuple[int, ...] | None,
         mesh: jax.sharding.Mesh) -> tuple[type, tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
  """The feed of a run without its images: (its class, what its `at` returns, without values).

  Args:
    config: the run's configuration; `dataset.path` is 'resident' or 'stream'.
    num_rows: N.
    image_shape: (H, W, 3) of all images, or None if they differ.
    mesh: the device mesh.
  """
  if config.dataset.path == 'resident' and image_shape is not None:
    feed, images, batches = Resident, (num_rows, *image_shape), _per_dispatch(config, mesh)
  else:
    crop = views.Crop.of(config, image_shape)
    feed, images, batches = Stream, (config.batch_size, *crop.shape), 1
  place = lambda shape, dtype, spec: jax.ShapeDtypeStruct(
      shape, dtype, sharding=NamedSharding(mesh, spec))
  return feed, (place(images, np.uint8, feed.specs[0]),
                place((batches, config.batch_size), np.int32, feed.specs[1]))


def _per_dispatch(config, mesh):
  return config.steps_per_dispatch or (1 if mesh_lib.on_cpu(mesh) else 100)


def make(config: config_lib.Config, images: images_lib.Images, mesh: jax.sharding.Mesh,
         last_step: int) -> Feed:
  """The feed of a run.

  Args:
    config: the run's configuration; `dataset.path` is 'resident' or 'stream'.
    images: the images to train on; in memory for a resident run.
    mesh: the device mesh.
    last_step: last step of the run; nothing is read beyond it.
  """
  chain = order.Chain.of(config, len(images))
  if config.dataset.path == 'resident':
    return Resident(images, mesh, chain, _per_dispatch(config, mesh))
  crop = views.Crop.of(config, images.shape)
  if config.dataset.name.startswith('fake:'):
    return Fake(mesh, chain, crop.shape)
  return Stream(images, mesh, crop, chain, last_step, num_workers(config.dataset.workers))


class Resident:
  """Feeds the loop from images on the devices.

  Args:
    images: `Images` in memory.
    mesh: the device mesh.
    chain: the order of the images.
    per_dispatch: S, batches per dispatch.

  Attributes:
    per_dispatch: S.
    specs: the partition specs of the arrays that `at` returns.
  """
  specs = P(), P(None, mesh_lib.AXIS)

  def __init__(self, images: images_lib.Images, mesh: jax.sharding.Mesh, chain: order.Chain,
               per_dispatch: int):
    self.per_dispatch, self._chain = per_dispatch, chain
    self._images = mesh_lib.replicate(images.in_memory().files, mesh)
    self._sharding = NamedSharding(mesh, P(None, mesh_lib.AXIS))

  def at(self, step: int) -> tuple[jax.Array, jax.Array]:
    """(all images, indices [S, B] of the batches from `step` on)."""
    index = np.stack([self._chain.batch(step + i) for i in range(self.per_dispatch)])
    return self._images, jax.make_array_from_callback(index.shape, self._sharding,
                                                      lambda part: index[part])

  @staticmethod
  def take(inputs: tuple[jax.Array, jax.Array], i: Any) -> Batch:
    """This device's part of the i-th batch of `at`."""
    images, index = inputs
    return {'image': images[index[i]], 'index': index[i]}

  def close(self) -> None:
    """Nothing to close."""


class Stream:
  """Feeds the loop with batches prepared by the host.

  Args:
    images: `Images`.
    mesh: the device mesh.
    crop: the crops.
    chain: the order of the images.
    last_step: last step of the run; nothing is read beyond it.
    workers: worker processes; 0 for threads of this process.

  Attributes:
    per_dispatch: 1.
    specs: the partition specs of the arrays that `at` returns.
  """
  per_dispatch = 1
  specs = P(mesh_lib.AXIS), P(None, mesh_lib.AXIS)

  def __init__(self, images: images_lib.Images, mesh: jax.sharding.Mesh, crop: views.Crop,
               chain: order.Chain, last_step: int, workers: int):
    self._slots = mesh_lib.local_slots(mesh, chain.batch_size)
    self._load = functools.partial(load_batch, images=images, crop=crop, chain=chain,
                                   slots=self._slots)
    self._mesh, self._batch_size = mesh, chain.batch_size
    self._workers, self._last_step = workers, last_step
    self._batches: Iterator | None = None
    self._step = -1

  def at(self, step: int) -> tuple[jax.Array, jax.Array]:
    """(views [B, *crop.shape] uint8, index [1, B]) of the batch at `step`, on the devices."""
    if step != self._step or self._batches is None:
      self.close()
      self._batches = in_background(self._load, step, self._last_step, self._workers)
      self._step = step
    images, index = next(self._batches)
    self._step += 1
    place = functools.partial(mesh_lib.place_local, mesh=self._mesh, slots=self._slots,
                              total=self._batch_size)
    return place(images), place(index, lead=1)

  @staticmethod
  def take(inputs: tuple[jax.Array, jax.Array], i: Any) -> Batch:
    """This device's part of the one batch of `at`."""
    images, index = inputs
    return {'view': images, 'index': index[i]}

  def close(self) -> None:
    """Ends the workers."""
    if self._batches is not None:
      self._batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    self._batches, self._step = None, -1


def load_batch(step: int, *, images: images_lib.Images, crop: views.Crop, chain: order.Chain,
               slots: Int[np.ndarray, ' b']
               ) -> tuple[UInt8[np.ndarray, 'b ... 3'], Int[np.ndarray, ' b']]:
  """This process's part of the batch at a step.

  Args:
    step: t.
    images: `Images`.
    crop: the crops.
    chain: the order of the images.
    slots: [b] places in the batch that belong to this process.

  Returns:
    (views [b, *crop.shape] uint8, index [b] int32).

  Raises:
    errors.UserError: an image cannot be read.
  """
  index = chain.batch(step)[slots]
  place = (step * chain.batch_size + slots) % 2**32
  return crop(images, place, index), index


class Fake:
  """Feeds the loop with one batch of noise generated on the devices, and the indices of the chain.

  Args:
    mesh: the device mesh.
    chain: the order of the images.
    shape: of the views of an image.

  Attributes:
    per_dispatch: 1.
    specs: the partition specs of the arrays that `at` returns.
  """
  per_dispatch = 1
  specs = Stream.specs
  take = staticmethod(Stream.take)

  def __init__(self, mesh: jax.sharding.Mesh, chain: order.Chain, shape: tuple[int, ...]):
    self._mesh, self._chain = mesh, chain
    draw = lambda: jax.random.bits(jax.random.key(chain.seed), (chain.batch_size, *shape), 'uint8')
    self._images = jax.jit(draw, out_shardings=NamedSharding(mesh, P(mesh_lib.AXIS)))()

  def at(self, step: int) -> tuple[jax.Array, jax.Array]:
    """(views [B, *shape] uint8, index [1, B])."""
    index, total = self._chain.batch(step), self._chain.batch_size
    return self._images, mesh_lib.place_local(index, self._mesh, np.arange(total), total, lead=1)

  def close(self) -> None:
    """Nothing to close."""


def num_workers(configured: int | None) -> int:
  """Worker processes: as configured, or by default one per CPU but two, at most 16."""
  if configured is not None:
    return configured
  return max(0, min(16, _num_cpus() - 2))


def _num_cpus():
  """The CPUs that this process may use; macOS does not tell, so all there."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def in_background(load: Callable[[int], Any], first: int, last: int,
                  workers: int) -> Iterator[Any]:
  """Runs a function ahead of the consumer of its results.

  Args:
    load: picklable; called with first, first + 1, ..., last - 1.
    first: the first argument.
    last: the end of the arguments, exclusive.
    workers: worker processes; 0 for threads of this process.

  Yields:
    The results in order.

  Raises:
    errors.UserError: raised by `load`.
  """
  import cv2  # slow to import, and not needed if everything is resident
  import grain

  threads = 1 if workers else _num_cpus()
  dataset: Any = grain.MapDataset.range(first, last).map(_Guarded(load)).to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + _AHEAD - 1))
  if workers:
    flags.FLAGS.mark_as_parsed()  # Grain's own flags, which it reads for worker processes
    dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD),
        worker_init_fn=_prepare_worker)
  cv2.setNumThreads(1)  # images are decoded in parallel, each by a single thread
  results = iter(dataset)
  try:
    for result in results:
      if isinstance(result, errors.UserError):
        raise result
      yield result
  finally:
    results.close()


@dataclasses.dataclass(frozen=True)
class _Guarded:
  """Returns a `UserError` instead of raising it, so that it leaves a worker unchanged."""
  load: Callable[[int], Any]

  def __call__(self, number: int) -> Any:
    try:
      return self.load(number)
    except errors.UserError as e:
      return e


def _prepare_worker(worker, num_workers):
  import cv2

  for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the main process handles them
    signal.signal(ignored, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()
  cv2.setNumThreads(1)


def _end_with_parent():
  """Ends a worker whose main process was killed."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)
