"""SIGTERM, SIGINT and SIGHUP are requests to stop: the run saves, and exits with code 75.

    first signal     recorded; `poll` and `check` tell the run, in every process
    second signal    the process exits immediately, whatever it is doing

SIGHUP is what a terminal sends when it is closed; it stays ignored under `nohup`.
"""

import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax.runtime import errors

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAVE, STOP = 1, 2  # what `Watch.poll` finds


class Watch:
  """Records signals while it is entered; a context manager for the main thread.

  Until it is entered it records nothing, but other processes of the run may still request a stop.

  Attributes:
    signal: name of the signal that this process received, or None.
  """

  def __init__(self):
    self.signal: str | None = None

  def __enter__(self) -> 'Watch':
    # A thread reads what the interpreter writes on every signal, so it notices one even while the
    # main thread waits for a device or a compiler.
    self._pipe = os.pipe()
    for end in self._pipe:
      os.set_blocking(end, end == self._pipe[0])
    self._handlers = {s: signal.signal(s, lambda *_: None) for s in _SIGNALS
                      if signal.getsignal(s) != signal.SIG_IGN or s != signal.SIGHUP}
    self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    signal.set_wakeup_fd(self._wakeup)
    for s, handler in self._handlers.items():
      signal.signal(s, handler)
    os.close(self._pipe[1])  # ends the thread
    self._thread.join()
    os.close(self._pipe[0])

  def _listen(self):
    while byte := os.read(self._pipe[0], 1):
      if byte[0] not in _SIGNALS:
        continue
      if self.signal is not None:
        if byte[0] == signal.SIGHUP:  # a terminal that closes sends two
          continue
        os._exit(128 + byte[0])
      self.signal = signal.Signals(byte[0]).name
      print(f'{self.signal}: saving and stopping; a second signal exits immediately',
            file=sys.stderr, flush=True)

  def poll(self, mesh: jax.sharding.Mesh, save: bool = False) -> int | jax.Array:
    """Finds out, without waiting, what any process asks for.

    Every process must call this at the same points.

    Args:
      mesh: the device mesh of the run.
      save: whether this process asks for a checkpoint.

    Returns:
      `STOP` if any process has been asked to stop, else `SAVE` if any asks for a checkpoint, else
      0: an int, or a scalar that the devices will fill in.
    """
    asked = STOP if self.signal is not None else SAVE if save else 0
    if jax.process_count() == 1:
      return asked
    flags = NamedSharding(mesh, P(mesh.axis_names))
    mine = np.full(mesh.size, asked, np.int32)
    return _largest(jax.make_array_from_callback(mine.shape, flags, lambda part: mine[part]))

  def check(self) -> None:
    """Like `poll`, but waits for all processes.

    Raises:
      errors.Stopped: a process has been asked to stop.
    """
    wanted = self.signal is not None
    if jax.process_count() > 1:
      wanted = multihost_utils.process_allgather(np.array(wanted)).any()
    if wanted:
      raise errors.Stopped(f'stopped by {self.name()}: run the same command again to resume')

  def check_here(self) -> None:
    """Like `check`, but for this process alone, without asking the others."""
    if self.signal is not None:
      raise errors.Stopped(f'stopped by {self.name()}: run the same command again to resume')

  def name(self) -> str:
    """The signal, in words."""
    return self.signal or 'a signal in another process'


_largest = jax.jit(jnp.max)
