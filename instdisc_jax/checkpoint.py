"""Saving and restoring the training state; the only file that knows Orbax.

A checkpoint holds the whole `TrainState`, the bank as its N true rows, so that it can be restored
on any number of devices: padding belongs to the machine, not to the data.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import orbax.checkpoint as ocp

from instdisc_jax import errors, train


class Checkpoints:
  """The checkpoints of one run, written in the background.

  Args:
    folder: where they lie, an absolute path.
    keep: how many of the newest are kept.
    num_rows: N.
    mesh: the device mesh of the run.
  """

  def __init__(self, folder, keep, num_rows, mesh):
    self._num_rows, self._mesh = num_rows, mesh
    self._manager = ocp.CheckpointManager(
        folder, item_handlers=ocp.StandardCheckpointHandler(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            enable_async_checkpointing=True))

  def latest_step(self):
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state):
    """Starts saving; the state may be donated to the next step at once."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    strip = lambda bank: bank
    if state.bank is not None:
      shardings = shardings.replace(bank=self._bank_sharding())
      strip = lambda bank: bank[:self._num_rows]
    copy = jax.jit(lambda s: jax.tree.map(jnp.copy, s.replace(bank=strip(s.bank))),
                   out_shardings=shardings)(state)
    self._manager.save(int(state.step), args=ocp.args.StandardSave(copy), force=True)

  def restore(self, like, step=None):
    """Reads a checkpoint into the shardings and shapes of `like`.

    Args:
      like: a `TrainState` of arrays with shardings.
      step: which one; the newest by default.

    Returns:
      A `TrainState` on this run's mesh; where the checkpoint has no bank (weights from elsewhere),
      with that of `like`.

    Raises:
      errors.UserError: its bank has another number of rows than there are images.
    """
    step = self.latest_step() if step is None else step
    stored_bank = self._manager.item_metadata(step)['bank']
    if stored_bank is None:
      return self._manager.restore(
          step, args=ocp.args.StandardRestore(like.replace(bank=None))).replace(bank=like.bank)
    if stored_bank.shape[0] != self._num_rows:
      raise errors.UserError(
          f'the bank of the checkpoint has {stored_bank.shape[0]} rows, must have one for each of '
          f'the {self._num_rows} training images: set --config.dataset.name to the data it was '
          'made of')
    padded = like.bank
    stored = like.replace(bank=jax.ShapeDtypeStruct(
        (self._num_rows, padded.shape[1]), padded.dtype,
        sharding=self._bank_sharding()))
    state = self._manager.restore(step, args=ocp.args.StandardRestore(stored))
    pad = functools.partial(train.pad_rows, num_devices=self._mesh.size)
    return state.replace(bank=jax.jit(pad, out_shardings=padded.sharding)(state.bank))

  def close(self):
    """Waits for the last save; an error of any save comes up here at the latest."""
    try:
      self._manager.wait_until_finished()
    except OSError as e:
      raise errors.RunError(f'saving a checkpoint failed: {e}') from e
    finally:
      self._manager.close()

  def _bank_sharding(self):
    """By rows where the devices share them evenly, else one copy on each."""
    even = self._num_rows % self._mesh.size == 0
    return NamedSharding(self._mesh, P(train.AXIS) if even else P())


def read(folder):
  """The newest checkpoint as it was stored, on the host.

  Args:
    folder: the checkpoints of a run.

  Returns:
    {'step', 'params', 'batch_stats', 'opt_state', 'bank' (N rows, or None), 'normalizer'}, nested
    dicts of NumPy arrays.

  Raises:
    errors.UserError: there is no checkpoint.
  """
  folder = pathlib.Path(folder).absolute()
  step = None
  if folder.is_dir():
    manager = ocp.CheckpointManager(folder, item_handlers=ocp.StandardCheckpointHandler())
    step = manager.latest_step()
  if step is None:
    raise errors.UserError(f"no checkpoint in '{folder}': set --workdir to the folder of a run")
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                      manager.item_metadata(step).tree)
  state = manager.restore(step, args=ocp.args.StandardRestore(like))
  manager.close()
  return jax.device_get(state)
