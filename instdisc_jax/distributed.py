"""Several processes that train as one, each with its own devices."""

import os
import sys

import jax
from jax.experimental import multihost_utils
import numpy as np

from instdisc_jax import errors


def initialize(coordinator=None, num_processes=None, process_id=None, heartbeat_seconds=100):
  """Joins the other processes; to be called before anything asks for devices.

  Args:
    coordinator: 'HOST:PORT' of process 0. Without it all three are found from Slurm, Open MPI, GKE
      or Cloud TPU.
    num_processes: how many there are.
    process_id: which one this is.
    heartbeat_seconds: after so long without a sign of life of one process the others end, too.

  Raises:
    errors.UserError: nothing was found, or the others could not be reached.
  """
  if (coordinator is None) != (num_processes is None) or (coordinator is None) != (
      process_id is None):
    raise errors.UserError(
        f'coordinator is {coordinator}, num_processes {num_processes} and process_id {process_id}, '
        'must be all three or none: set --coordinator, --num_processes and --process_id')
  if coordinator is not None and not 0 <= process_id < num_processes:
    raise errors.UserError(f'process_id is {process_id}, must be from 0 to {num_processes - 1}: '
                           'set --process_id')
  local = coordinator is not None and coordinator.startswith(('127.0.0.1:', 'localhost:'))
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=heartbeat_seconds,
        coordinator_bind_address=coordinator if local else None)
  except ValueError as e:
    raise errors.UserError(
        f'no other processes found ({errors.one_line(e)}): set --coordinator=HOST:PORT, '
        '--num_processes and --process_id, or leave out --distributed') from e
  except RuntimeError as e:
    raise errors.RunError(f'the other processes were not reached at {coordinator} '
                          f'({errors.one_line(e)})') from e


def first_only(action):
  """Runs `action()` on the first process while the others wait.

  If it fails the first process ends with the reason, and the others with it.
  """
  if jax.process_index() == 0:
    action()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('first_only')


def everywhere(mine):
  """Whether it is so on every process; to be asked by all of them."""
  if jax.process_count() == 1:
    return mine
  return bool(multihost_utils.process_allgather(np.array(mine)).all())


def gather(array):
  """A sharded array as a `np.ndarray` on every process."""
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def interleave(part, total):
  """Process p has the elements p, p + P, p + 2P, ... of [total]: all of them, on every process."""
  num_processes = jax.process_count()
  if num_processes == 1:
    return part
  padded = np.zeros(-(-total // num_processes), part.dtype)
  padded[:len(part)] = part
  return multihost_utils.process_allgather(padded).T.reshape(-1)[:total]


def leave(code):
  """Ends this process.

  One that fails leaves at once. Of several, JAX would first wait for the others, and they for it
  (they end when they find it gone); on a full disk libraries would try to write again, and say so.
  """
  sys.stdout.flush()
  if code == 1 or (jax.distributed.is_initialized() and code not in (0, 75)):
    os._exit(code)
  sys.exit(code)
