"""A run's folder: its configuration, and a lock that keeps other runs out."""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import fcntl
import json
import os
import pathlib
import socket
from typing import Any

from instdisc_jax.runtime import distributed, errors, files

CONFIG = 'config.json'
LOCK = 'lock'


@contextlib.contextmanager
def claim(workdir: str | os.PathLike[str], settings: Mapping[str, Any],
          changeable: Collection[str], fingerprint: str) -> Iterator[None]:
  """Creates the run's folder, or checks that it belongs to this run; keeps other runs out.

  The operating system releases the lock when the process ends, in whatever way, so no lock becomes
  stale. If a run has several processes, the first holds the lock. A bucket has no locks: nothing
  keeps two runs apart there.

  Args:
    workdir: the run's folder.
    settings: the run's settings as in config.json, {'loss.temperature': 0.1, ...}.
    changeable: settings that may differ from those the run was started with.
    fingerprint: the fingerprint of the training images.

  Raises:
    errors.UserError: it cannot be written, belongs to another run, or is in use.
  """
  workdir = files.place(workdir)
  with contextlib.ExitStack() as stack:
    def enter():
      try:
        workdir.mkdir(parents=True, exist_ok=True)
        if isinstance(workdir, pathlib.Path):
          stack.enter_context(_locked(workdir))
        if (workdir / CONFIG).exists():
          _check_same_run(workdir, settings, changeable, fingerprint)
        else:
          write(workdir, settings, fingerprint)
      except OSError as e:
        raise errors.cannot_write(workdir, e, '--workdir') from e

    distributed.first_only(enter)
    yield


def update(workdir: files.Place, settings: Mapping[str, Any], fingerprint: str | None) -> None:
  """Stores the settings that have changed since the run began; every process must call it."""
  def store():
    try:
      write(workdir, settings, fingerprint)
    except OSError as e:
      raise errors.cannot_write(workdir, e, '--workdir') from e

  distributed.first_only(store)


def read(workdir: str | os.PathLike[str]) -> tuple[dict[str, Any], str | None]:
  """The content of config.json: ({'loss.temperature': 0.1, ...}, the data's fingerprint or None).

  Raises:
    errors.UserError: the file is missing or is not a configuration.
  """
  file = files.place(workdir) / CONFIG
  try:
    content = json.loads(file.read_text())
    return dict(content['config']), content['data']
  except OSError as e:
    raise errors.UserError(
        f"no file '{file}'" if isinstance(e, FileNotFoundError) else
        f"'{file}' cannot be read ({errors.reason(e)})",
        remedy='set <--workdir> to the folder of a run', setting='--workdir') from e
  except (ValueError, KeyError, TypeError) as e:
    raise errors.UserError(f"'{file}' is not the configuration of a run",
                           remedy='set another <--workdir>', setting='--workdir') from e


def write(workdir: files.Place, settings: Mapping[str, Any], fingerprint: str | None) -> None:
  """Writes config.json: {'loss.temperature': 0.1, ...} and the data's fingerprint, or None."""
  files.write(files.place(workdir) / CONFIG,
              json.dumps({'config': dict(settings), 'data': fingerprint}, indent=2) + '\n')


@contextlib.contextmanager
def _locked(workdir):
  with (workdir / LOCK).open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip() or 'another process'
      raise errors.UserError(
          f"workdir '{workdir}' is in use by {holder}", setting='--workdir',
          remedy='wait for that run, stop it, or set another <--workdir>') from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield


def _check_same_run(workdir, new, changeable, fingerprint):
  old, old_fingerprint = read(workdir)
  # An imported workdir holds only the settings of its checkpoint; its first run adds the others.
  for key in sorted(old.keys() - changeable):
    was, asked = old.get(key), new.get(key)
    if was != asked:
      raise errors.UserError(
          f"workdir '{workdir}' was started with {key} = {was}, not {asked}", setting=key,
          remedy=f'set <{key}>={was}, or another <--workdir>')
  if old_fingerprint not in (None, fingerprint):
    raise errors.UserError(
        f"workdir '{workdir}' was started with other data named {new['dataset.name']} "
        f'({old_fingerprint[:60]}, not {fingerprint[:60]})', setting='dataset.name',
        remedy='set <dataset.name> to the data it was started with, or another <--workdir>')
