"""Training with labels on the mesh: the loop behind `linear_online` and `few_label`.

Batches come from the feeds of a run, and are functions of (seed, step) alone: a training that was
stopped resumes with the same bits, from a checkpoint that is a few minutes old at most.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import dataclasses
import hashlib
import json
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import feeds, views
from instdisc_jax.evaluation import embedding
from instdisc_jax.runtime import checkpoint, distributed, errors, files, metrics, preemption
from instdisc_jax.runtime.mesh import AXIS

_EVERY_MINUTES = 5.0  # between checkpoints


class State(flax.struct.PyTreeNode):
  """Everything that changes during training.

  Attributes:
    step: int32 scalar, steps taken.
    weights: what is trained.
    momentum: like the weights.
    statistics: batch-norm statistics of the encoder, or the mean and scale of its features.
  """
  step: Any
  weights: Any
  momentum: Any
  statistics: Any


@dataclasses.dataclass(frozen=True)
class Job:
  """A training.

  Attributes:
    title: what the progress line says.
    folder: where its checkpoints are kept, no others.
    feed: the source of batches.
    num_images: N.
    end: number of steps.
    step: (state, inputs of the feed) -> (state, loss), jitted; donates the state.
    like: the state's shapes and shardings.
  """
  title: str
  folder: files.Place
  feed: feeds.Feed
  num_images: int
  end: int
  step: Callable[[State, Any], tuple[State, Any]]
  like: State


def key(*parts: Any) -> str:
  """A name for what has these parts: strings, numbers, and arrays by their content."""
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part.tobytes() if isinstance(part, np.ndarray) else f'{part}\n'.encode())
  return digest.hexdigest()[:16]


def view_size(engine: embedding.Engine, images: data.Images) -> tuple[int, int]:
  """(height, width) of the views of images, in training as in evaluation.

  Raises:
    errors.UserError: the images are files that are not square, in a run without `augment.size`.
  """
  if engine.size is not None:
    return engine.size
  height, width = (images.shape if images.shape is not None else images.full(0).shape)[:2]
  if height != width and not isinstance(images.files, np.ndarray):
    raise errors.UserError(f'{images.name(0)} has {height} x {width} pixels', 'square images',
                           'use square ones, or a run with <augment.size>', 'augment.size')
  return height, width


def configure(config: config_lib.Config, path: str, seed: int, batch_size: int,
              size: tuple[int, int]) -> config_lib.Config:
  """A run's configuration for training with labels.

  Args:
    config: the run's configuration.
    path: 'resident' or 'stream', see `path_of`.
    seed: of the order and of the views.
    batch_size: B.
    size: (height, width) of the views, see `view_size`.
  """
  config = config.copy_and_resolve_references()
  config.seed, config.batch_size, config.steps_per_dispatch = seed, batch_size, 1
  config.dataset.name = ''  # the images are given
  config.loss.views = 1
  config.dataset.path = path
  if size[0] == size[1]:
    config.augment.size = size[0]
  return config


def decay(step: jax.Array, end: int, milestones: Sequence[int], epochs: int) -> jax.Array:
  """By what a learning rate is multiplied at a step: a tenth at each milestone, in epochs."""
  passed: Any = sum(step >= m * end // epochs for m in milestones)
  return jnp.power(0.1, passed)


def path_of(images: data.Images) -> str:
  """'resident' for images in an array, else 'stream'."""
  return 'resident' if isinstance(images.files, np.ndarray) else 'stream'


def take(config: config_lib.Config, feed: Any, seed: Any, step: jax.Array,
         inputs: Any) -> tuple[Float[Array, 'b h w 3'], Int[Array, ' b']]:
  """(random views, index) of a device's part of a batch, inside the mapped step.

  Args:
    config: see `configure`.
    feed: the source of the batch, or its class.
    seed: that of the feed; it may be traced.
    step: t.
    inputs: what the feed's `at` returned.
  """
  batch = feed.take(inputs, 0)
  index, cropped = batch['index'], 'view' in batch
  key = views.key(seed, views.places(step, config.batch_size, index.size, AXIS), index)
  return views.draw(config, key, batch['view' if cropped else 'image'], cropped=cropped), index


def fit(job: Job, start: Callable[[], State], mesh: jax.sharding.Mesh,
        watch: preemption.Watch) -> State:
  """Trains to the end; every process must call it.

  Args:
    job: the training.
    start: () -> the state to start from; not called for a resume.
    mesh: the device mesh.
    watch: watches for signals.

  Raises:
    errors.Stopped: stopped by a signal; the state is saved.
    errors.UserError: an image cannot be read.
  """
  with contextlib.ExitStack() as stack:
    closing = lambda thing: stack.enter_context(contextlib.closing(thing))
    checkpoints = closing(checkpoint.Checkpoints(job.folder, 1, job.num_images, _EVERY_MINUTES))
    checkpoints.move_damaged_aside()
    state = start() if checkpoints.latest_step() is None else checkpoints.restore(job.like)
    step = int(state.step)
    progress = stack.enter_context(metrics.progress_bar(job.title))
    task = progress.add_task(job.title, total=job.end, completed=step)
    closing(job.feed)
    running = None
    while step < job.end:
      inputs = job.feed.at(step)
      jax.block_until_ready(running)  # while the next batch was read
      state, running = job.step(state, inputs)
      step += 1
      progress.update(task, completed=step)
      asked = int(watch.poll(mesh, checkpoints.is_due()))
      if asked or step == job.end:
        checkpoints.save(state)
      if asked == preemption.STOP:
        raise errors.Stopped(f'stopped by {watch.name()} at step {step} of {job.end} of '
                             f'{job.title}, which is saved: run the same command again to resume')
  return state


def once(place: files.Place, count: int, measure: Callable[[], Any],
         together: bool = True) -> tuple[float, ...]:
  """What `measure()` returns, now or in an earlier call.

  Args:
    place: the folder of this measurement; a file beside it replaces it, with the result.
    count: how many numbers it returns.
    measure: () -> that many numbers.
    together: whether every process calls this; else one of them alone.
  """
  file, known = place.with_name(f'{place.name}.json'), np.full(count, np.nan)
  first = jax.process_index() == 0
  if first and file.exists():
    known = np.array(json.loads(file.read_text()))
  if together:  # as integers, since floats would be rounded to 32 bits
    known = np.asarray(distributed.agree(known.view(np.uint32))).view(np.float64)
  if np.isnan(known).any():
    known = measure()
    if first:
      file.parent.mkdir(parents=True, exist_ok=True)
      files.write(file, json.dumps([float(x) for x in known]))
      files.remove_folder(place)
  return tuple(map(float, known))


def forget(places: Iterable[files.Place]) -> None:
  """Removes what `once` keeps of measurements; the first process does."""
  if jax.process_index() == 0:
    for place in places:
      place.with_name(f'{place.name}.json').unlink(missing_ok=True)
