"""Saving and restoring the training state; the only file that knows Orbax.

A checkpoint holds the whole `TrainState`, the bank as its N true rows, so that it can be restored
on any number of devices: padding belongs to the machine, not to the data.
"""

import functools

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
        folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            enable_async_checkpointing=True))

  def latest_step(self):
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state):
    """Starts saving; the state may be donated to the next step at once."""
    shardings = jax.tree.map(lambda x: x.sharding, state).replace(bank=self._bank_sharding())
    strip = lambda bank: bank[:self._num_rows]
    copy = jax.jit(lambda s: jax.tree.map(jnp.copy, s.replace(bank=strip(s.bank))),
                   out_shardings=shardings)(state)
    self._manager.save(int(state.step), args=ocp.args.StandardSave(copy), force=True)

  def restore(self, like, step=None):
    """Reads a checkpoint into the shardings and shapes of `like`.

    Args:
      like: a `TrainState` of arrays or `jax.ShapeDtypeStruct`s with shardings.
      step: which one; the newest by default.

    Returns:
      A `TrainState` on this run's mesh.
    """
    padded = like.bank
    stored = like.replace(bank=jax.ShapeDtypeStruct(
        (self._num_rows, padded.shape[1]), padded.dtype,
        sharding=self._bank_sharding()))
    step = self.latest_step() if step is None else step
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
