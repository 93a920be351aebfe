"""Saving and restoring the training state; the only module that uses Orbax.

A checkpoint holds the complete training state as the devices hold it, the bank with its padding,
and N beside it. Every device writes and reads its own rows and no others: restored on another
number of devices, rows past N are cut off or filled up with zeros. A checkpoint appears under its
name only when it is complete, with N and the SHA-256 of each of its files in a manifest. One that
no longer matches its manifest is damaged, and the previous one takes its place.

A state is a flax struct with a field `step`; that of a run is `training.state.TrainState`.
"""

from collections.abc import Collection, Iterator, Sequence
import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import orbax.checkpoint as ocp

from instdisc_jax.runtime import distributed, errors, files
from instdisc_jax.runtime import mesh as mesh_lib

_MANIFEST = 'manifest.json'
_DATES = '_CHECKPOINT_METADATA'  # which Orbax rewrites at the very end
_PER_ROW = ('bank', 'classifier')  # fields with a row for each image
_NOT_IN_IMPORTS = (*_PER_ROW, 'opt_state')  # of weights alone


class Checkpoints:
  """The checkpoints of one run, written in the background.

  Args:
    folder: the folder of the checkpoints.
    keep: number of newest checkpoints to keep.
    num_rows: N.
    every_minutes: age of the last checkpoint, or of this object, at which another is due; 0: never.
  """

  def __init__(self, folder: str | os.PathLike[str], keep: int, num_rows: int,
               every_minutes: float = 0.0):
    self._every_minutes, self._last_save = every_minutes, time.monotonic()
    self._folder, self._num_rows = files.place(folder), num_rows
    self._damaged = self._folder.with_name(f'{self._folder.name}-damaged')
    self._saving: int | None = None
    self._pending_losses: list[float] = []
    self._manager = ocp.CheckpointManager(
        self._folder, item_handlers=ocp.PyTreeCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            enable_async_checkpointing=True, cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest)))

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def move_damaged_aside(self) -> None:
    """Moves checkpoints newer than the newest intact one aside, and warns about each.

    Raises:
      errors.RunError: all are damaged; nothing is moved.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    damage = _damage(self._folder, steps) if jax.process_index() == 0 else {}
    count = int(distributed.agree(np.int32(len(damage))))
    damage = {step: damage.get(step) for step in steps[:count]}
    if steps and len(damage) == len(steps):
      raise errors.RunError(
          f"every checkpoint in '{self._folder}' is damaged ("
          + ', '.join(f'{step}: {fault}' for step, fault in damage.items())
          + '): nothing was changed; restore one, or set another --workdir to start over')
    for step, fault in damage.items():
      if jax.process_index() == 0:
        self._damaged.mkdir(exist_ok=True)
        number = len(list(self._damaged.glob(f'{step}.*')))
        (self._folder / str(step)).rename(self._damaged / f'{step}.{number}')
        errors.warn(f"checkpoint {step} is damaged ({fault}): it was moved to '{self._damaged}', "
                    'and the previous one is used')
    if damage:
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices('damaged checkpoints are moved aside')
      self._manager.reload()

  def save(self, state: Any, pending_losses: Sequence[float] = ()) -> None:
    """Starts saving; the state may be donated to the next step right away.

    Args:
      state: the training state.
      pending_losses: the losses since the last line of metrics.jsonl, to be read back by
        `pending_losses`, so that the next line is the same with and without a stop.

    Raises:
      errors.RunError: this save could not be started, or the previous one failed.
    """
    copied, step = copy(state), int(state.step)
    self._last_save = time.monotonic()
    with self._failing():
      self._manager.wait_until_finished()
      self._saving, self._pending_losses = step, list(pending_losses)
      self._manager.save(step, args=ocp.args.PyTreeSave(_as_dict(copied)), force=True)

  def is_due(self) -> bool:
    """Whether the last checkpoint is old enough for another one."""
    return 0 < self._every_minutes * 60 <= time.monotonic() - self._last_save

  def pending_losses(self) -> list[float]:
    """The pending losses that the newest checkpoint was saved with."""
    return _manifest(self._folder / str(self.latest_step()))['pending_losses']

  def restore(self, like: Any, step: int | None = None) -> Any:
    """Reads a checkpoint into the shardings and shapes of `like`.

    Args:
      like: a training state of arrays with shardings.
      step: the step of the checkpoint; the newest by default.

    Returns:
      A training state like that. A bank, class weights or an optimizer's state that the
      checkpoint lacks (imported weights) are taken from `like`.

    Raises:
      errors.UserError: the number of rows in its bank is not the number of images.
    """
    step = self._manager.latest_step() if step is None else step
    assert step is not None, 'there is no checkpoint to restore'
    metadata: Any = self._manager.item_metadata(step)
    absent = [name for name in _NOT_IN_IMPORTS
              if hasattr(like, name) and metadata.tree.get(name) is None]
    count = _num_rows(self._folder / str(step), metadata) or self._num_rows
    if count != self._num_rows:
      raise errors.UserError(
          f'the bank of the checkpoint has {count} rows',
          f'one row for each of the {self._num_rows} training images', setting='dataset.name',
          remedy='set <dataset.name> to the data it was trained on')
    wanted = like.replace(**dict.fromkeys(absent))
    restored = _restore_like(self._manager, step, _as_dict(wanted))
    return wanted.replace(**restored).replace(**{name: getattr(like, name) for name in absent})

  def close(self) -> None:
    """Waits for the last save.

    Raises:
      errors.RunError: a save failed.
    """
    try:
      with self._failing():
        self._manager.wait_until_finished()
    finally:
      self._manager.close()

  @contextlib.contextmanager
  def _failing(self) -> Iterator[None]:
    """Turns any exception of a save (from Orbax, TensorStore or the system) into a `RunError`."""
    try:
      yield
    except Exception as e:
      kept = [step for step in self._manager.all_steps(read=True) if step != self._saving]
      raise errors.RunError(
          f'the checkpoint of step {self._saving} could not be saved ({errors.one_line(e)[:200]}); '
          + (f'the one of step {max(kept)} is kept' if kept else 'there is no earlier one')
          + (': free up space and run the same command again' if errors.is_no_space(e) else '')
      ) from e

  def _write_manifest(self):
    """Called when all files of the new checkpoint are written, before it gets its name."""
    folder = next(self._folder.glob(f'{self._saving}.orbax-checkpoint-tmp*'),
                  self._folder / str(self._saving))  # in a bucket, a marker file completes it
    manifest = {'sha256': _hashes(folder), 'num_rows': self._num_rows,
                'pending_losses': self._pending_losses}
    (folder / _MANIFEST).write_text(json.dumps(manifest))


@jax.jit
def copy(state: Any) -> Any:
  """A copy of a state, each device's part on the device itself."""
  return jax.tree.map(jnp.copy, state)


def _as_dict(state):
  """The stored fields of a state; most losses have no classifier."""
  return {name: part for name, part in vars(state).items()
          if name != 'classifier' or part is not None}


def quiet_threads() -> None:
  """Keeps the threads of a failed save from printing tracebacks: `save` and `close` raise them."""
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)

  def hook(error):
    if str(error.exc_value) != 'Event loop is closed':
      sys.__unraisablehook__(error)

  sys.unraisablehook = hook


def _hashes(folder):
  """{path: SHA-256, or None} of every file of a checkpoint."""
  hashes = {}
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      hashes |= {f'{path.name}/{name}': found for name, found in _hashes(path).items()}
    elif path.name == _DATES or files.in_bucket(path):  # which has its own checksums
      hashes[path.name] = None
    else:
      with path.open('rb') as file:
        hashes[path.name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return hashes


def _damage(folder, steps):
  """{step: fault} of the damaged checkpoints that are newer than the newest intact one."""
  damage = {}
  for step in sorted(steps, reverse=True):
    fault = _fault(folder / str(step))
    if fault is None:
      break
    damage[step] = fault
  return damage


def _manifest(folder):
  """The manifest of a checkpoint."""
  return json.loads((folder / _MANIFEST).read_text())


def _num_rows(folder, metadata):
  """N of a checkpoint, or None without a bank. Those of version 0.1 have no padding."""
  bank = metadata.tree.get('bank')
  return None if bank is None else _manifest(folder).get('num_rows', bank.shape[0])


def _fault(folder):
  """The fault of a checkpoint, in words; None if it is intact."""
  try:
    expected = _manifest(folder)['sha256']
  except (OSError, ValueError, KeyError, TypeError):
    return f'no readable {_MANIFEST}'
  found = _hashes(folder)
  for path in expected:
    if path not in found:
      return f'no file {path}'
    if found[path] != expected[path]:
      return f'{path} was changed'
  return None


def read(folder: str | os.PathLike[str], names: Collection[str] | None = None) -> dict[str, Any]:
  """The newest intact checkpoint, on the host; all processes must call this.

  Args:
    folder: the folder of a run's checkpoints.
    names: the fields to read; by default all.

  Returns:
    {'step', 'params', 'batch_stats', 'opt_state', 'bank' (N rows, or None), 'normalizer'}, nested
    dicts of NumPy arrays; and 'fields', the names of those that the checkpoint has.

  Raises:
    errors.UserError: there is no intact checkpoint.
  """
  with _newest(folder) as (manager, step, metadata):
    like = {name: part for name, part in metadata.tree.items() if names is None or name in names}
    restored: Any = manager.restore(step, args=ocp.args.PyTreeRestore(
        like, jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like),
        partial_restore=True))
    count = _num_rows(files.place(folder) / str(step), metadata)
    fields = {name for name, part in metadata.tree.items() if part is not None}
  return restored | {'fields': fields} | {
      name: jax.tree.map(lambda rows: rows[:count], restored[name])
      for name in _PER_ROW if restored.get(name) is not None}


def read_rows(folder: str | os.PathLike[str], sharding: NamedSharding,
              at_least: int = 0) -> dict[str, Any]:
  """The bank and class weights of the newest intact checkpoint; all processes must call this.

  Every device reads its own rows.

  Args:
    folder: the folder of a run's checkpoints.
    sharding: how to shard the rows.
    at_least: number of rows to pad them to, if they are fewer.

  Returns:
    {'num_rows': N, 'bank', 'classifier'}, the latter two padded to a multiple of the number of
    devices or to `at_least`; None if the checkpoint lacks them.

  Raises:
    errors.UserError: there is no intact checkpoint.
  """
  with _newest(folder) as (manager, step, metadata):
    count = _num_rows(files.place(folder) / str(step), metadata)
    tree = {name: metadata.tree[name] for name in _PER_ROW if metadata.tree.get(name) is not None}
    total = 0 if count is None else max(at_least, mesh_lib.padded(count, sharding.num_devices))
    padded = lambda rows: jax.ShapeDtypeStruct((total, rows.shape[1]), rows.dtype,
                                               sharding=sharding)
    rows = _restore_like(manager, step, jax.tree.map(padded, tree)) if tree else {}
  return dict.fromkeys(_PER_ROW) | rows | {'num_rows': count}


def _restore_like(manager, step, like):
  """The fields {name: tree} of a checkpoint, in the shapes and shardings of `like`.

  Rows past the end of a stored array are zeros, and its surplus is not read; other arrays must have
  the stored shape.
  """
  wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  how = {name: ocp.checkpoint_utils.construct_restore_args(part, strict=name not in _PER_ROW)
         for name, part in wanted.items()}
  restored: Any = manager.restore(
      step, args=ocp.args.PyTreeRestore(wanted, how, partial_restore=True))
  return restored


@contextlib.contextmanager
def _newest(folder) -> Iterator[tuple[Any, int, Any]]:
  """(manager, step, metadata) of the newest intact checkpoint; warns about damaged ones."""
  folder, manager, intact = files.place(folder), None, None
  if folder.is_dir():
    manager = ocp.CheckpointManager(folder, item_handlers=ocp.PyTreeCheckpointHandler())
    steps = sorted(manager.all_steps(), reverse=True)
    damage = _damage(folder, steps) if jax.process_index() == 0 else {}
    for step, fault in damage.items():
      errors.warn(f"checkpoint {step} in '{folder}' is damaged ({fault})")
    intact = next(iter(steps[int(distributed.agree(np.int32(len(damage)))):]), None)
  if manager is None or intact is None:
    raise errors.UserError(f"no intact checkpoint in '{folder}'", setting='--workdir',
                           remedy='set <--workdir> to the folder of a run')
  with contextlib.closing(manager):
    yield manager, intact, manager.item_metadata(intact)
