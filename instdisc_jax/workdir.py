"""A run's folder: which run it belongs to, and that only one process works in it."""

import contextlib
import fcntl
import json
import os
import socket

from instdisc_jax import config as config_lib
from instdisc_jax import distributed, errors, files

CONFIG = 'config.json'
LOCK = 'lock'


@contextlib.contextmanager
def claim(workdir, config, fingerprint):
  """Makes the run's folder, or checks that it belongs to this run; keeps others out meanwhile.

  The operating system lets go of the lock when the process ends in whatever way, so one that was
  left behind stops nobody. Of several processes of one run the first holds it. A bucket has no
  locks: there nothing keeps two runs apart.

  Args:
    workdir: a path.
    config: the run's configuration.
    fingerprint: of the training images' source.

  Raises:
    errors.UserError: it can't be written, belongs to another run, or is in use.
  """
  workdir = files.place(workdir)
  settings = {key: config_lib.plain(value) for key, value in config_lib.flatten(config).items()}
  with contextlib.ExitStack() as stack:
    def enter():
      try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not files.in_bucket(workdir):
          stack.enter_context(_locked(workdir))
        if (workdir / CONFIG).exists():
          _check_same_run(workdir, settings, fingerprint)
        write(workdir, settings, fingerprint)
      except OSError as e:
        if errors.is_no_space(e):
          raise
        raise errors.UserError(f"workdir '{workdir}' can't be written "
                               f'({e.strerror or errors.one_line(e)}): set --workdir to a folder '
                               'that can') from e

    distributed.first_only(enter)
    yield


def read(workdir):
  """What config.json holds: ({'loss.temperature': 0.1, ...}, the data's fingerprint or None).

  Raises:
    errors.UserError: there is no such file, or it is something else.
  """
  file = files.place(workdir) / CONFIG
  try:
    content = json.loads(file.read_text())
    return dict(content['config']), content['data']
  except OSError as e:
    raise errors.UserError(f"no '{file}' ({e.strerror or 'not there'}): set --workdir to the "
                           'folder of a run') from e
  except (ValueError, KeyError, TypeError) as e:
    raise errors.UserError(f"'{file}' is no configuration of a run: set another --workdir") from e


def write(workdir, settings, fingerprint):
  """Writes config.json: {'loss.temperature': 0.1, ...} and the data's fingerprint, or None."""
  files.write(files.place(workdir) / CONFIG,
              json.dumps({'config': settings, 'data': fingerprint}, indent=2) + '\n')


@contextlib.contextmanager
def _locked(workdir):
  with (workdir / LOCK).open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      holder = file.read().strip() or 'another process'
      raise errors.UserError(f"workdir '{workdir}' is in use by {holder}: wait for that run, or "
                             'stop it, or set another --workdir') from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
    file.flush()
    yield


def _check_same_run(workdir, new, fingerprint):
  old, old_fingerprint = read(workdir)
  # A workdir made from a checkpoint fixes what that fixes; its first run fixes the rest.
  changeable = set(config_lib.CHANGEABLE)
  if new['optimizer.schedule'] == 'cosine':  # whose end is the run's
    changeable -= {'epochs', 'steps'}
  for key in sorted(old.keys() - changeable):
    was, asked = old.get(key), new.get(key)
    if was != asked:
      raise errors.UserError(f"workdir '{workdir}' was begun with {key} = {was}, not {asked}: set "
                             f'--config.{key}={was}, or another --workdir')
  if old_fingerprint not in (None, fingerprint):
    raise errors.UserError(
        f"workdir '{workdir}' was begun with other data of the name {new['dataset.name']} "
        f"({old_fingerprint[:60]}, not {fingerprint[:60]}): set --config.dataset.name to the data "
        'it was begun with, or another --workdir')
