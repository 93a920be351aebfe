"""Processes that work as one, each with its own devices."""

from collections.abc import Callable
import hashlib
import os
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from instdisc_jax.runtime import errors


def initialize(coordinator: str | None = None, num_processes: int | None = None,
               process_id: int | None = None, heartbeat_seconds: int = 100) -> None:
  """Joins the other processes; must be called before anything uses devices.

  Args:
    coordinator: 'HOST:PORT' of process 0. Without it, Slurm, Open MPI, GKE or Cloud TPU provide all
      three values.
    num_processes: number of processes.
    process_id: index of this process.
    heartbeat_seconds: how long a process may be silent before the others end.

  Raises:
    errors.UserError: no other processes were found.
    errors.RunError: they could not be reached.
  """
  if (coordinator is None) != (num_processes is None) or (coordinator is None) != (
      process_id is None):
    raise errors.UserError(
        f'--coordinator is {coordinator}, --num_processes {num_processes} and --process_id '
        f'{process_id}', 'all set or all unset', setting='--coordinator',
        remedy='set <--coordinator>, <--num_processes> and <--process_id>')
  if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
    raise errors.UserError(f'--process_id is {process_id}', f'from 0 to {num_processes - 1}',
                           setting='--process_id')
  local = coordinator is not None and coordinator.startswith(('127.0.0.1:', 'localhost:'))
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id, heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=heartbeat_seconds,
        coordinator_bind_address=coordinator if local else None)
  except ValueError as e:
    raise errors.UserError(
        f'no other processes found ({errors.one_line(e)})', setting='--coordinator',
        remedy='set <--coordinator>=HOST:PORT, <--num_processes> and <--process_id>, or leave out '
               '<--distributed>') from e
  except RuntimeError as e:
    raise errors.RunError(f'the other processes could not be reached at {coordinator} '
                          f'({errors.one_line(e)})') from e


def first_only(action: Callable[[], object]) -> None:
  """Runs `action()` on the first process while the others wait.

  If it fails, the first process ends with the reason, and the others end too. If a signal stops it,
  all processes stop.
  """
  stopped = None
  if jax.process_index() == 0:
    try:
      action()
    except errors.Stopped as e:
      stopped = e
  if agree(stopped is not None):
    raise stopped or errors.Stopped('stopped because process 0 was stopped')


def agree(value: Any) -> Any:
  """The first process's value, on every process; all processes must call this."""
  if jax.process_count() == 1:
    return value
  return multihost_utils.broadcast_one_to_all(value)


def smallest(mine: float) -> float:
  """The smallest of all processes' values; all processes must call this."""
  if jax.process_count() == 1:
    return mine
  return float(multihost_utils.process_allgather(np.float32(mine)).min())


def same(text: str) -> bool:
  """Whether all processes have the same text; all processes must call this."""
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  return everywhere(bool(np.array_equal(agree(digest), digest)))


def everywhere(mine: bool) -> bool:
  """Whether `mine` is true on every process; all processes must call this."""
  if jax.process_count() == 1:
    return mine
  return bool(multihost_utils.process_allgather(np.array(mine)).all())


def gather(array: jax.Array) -> np.ndarray:
  """A sharded array as a `np.ndarray` on every process."""
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def interleave(part: np.ndarray, total: int) -> np.ndarray:
  """Merges the elements p, p + P, p + 2P, ... of each process p into [total], on every process."""
  num_processes = jax.process_count()
  if num_processes == 1:
    return part
  padded = np.zeros(-(-total // num_processes), part.dtype)
  padded[:len(part)] = part
  return multihost_utils.process_allgather(padded).T.reshape(-1)[:total]


def leave(code: int) -> None:
  """Ends this process with an exit code.

  A process that fails exits immediately. Otherwise JAX would first wait for the other processes,
  and they for this one (they end when they notice that it is gone), and on a full disk libraries
  would retry their writes, with tracebacks.
  """
  sys.stdout.flush()
  if code == 1 or (jax.distributed.is_initialized() and code not in (0, 75)):
    os._exit(code)
  sys.exit(code)
