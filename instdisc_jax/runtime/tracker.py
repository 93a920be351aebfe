"""The metrics of a run in Weights & Biases or Trackio, where runs are seen side by side."""

from collections.abc import Mapping
import importlib
import os
import re
from typing import Any
import uuid

import jax

from instdisc_jax.runtime import errors, files

NAMES = 'wandb', 'trackio'
FILE = 'tracker'  # holds the run's name there, so that a run that resumes goes on with it
_PROJECT = 'instdisc_jax'


def module(name: str | None) -> Any:
  """The package of a tracker, or None.

  Args:
    name: one of `NAMES`, or None.

  Raises:
    errors.UserError: it is not installed.
  """
  if name is None or jax.process_index() != 0:
    return None
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise errors.UserError(
        f'tracker is {name}, which is not installed', setting='tracker',
        remedy=f"run pip install 'instdisc_jax[{name}]', or remove <tracker>") from e


def start(name: str | None, workdir: files.Place, settings: Mapping[str, Any]) -> Any:
  """Starts or resumes the run of a workdir in a tracker.

  Where it is sent is up to the tracker's own environment: WANDB_MODE=offline, WANDB_PROJECT,
  TRACKIO_DIR, TRACKIO_SPACE_ID and so on.

  Args:
    name: one of `NAMES`, or None.
    workdir: the run's folder.
    settings: shown with the run.

  Returns:
    An object with `log(values, step=)` and `finish()`; None without a tracker, and in all
    processes but the first.

  Raises:
    errors.UserError: it is not installed, or does not start.
  """
  package = module(name)
  if package is None:
    return None
  path = workdir / FILE
  if not path.exists():
    name_of_run = re.sub(r'[^\w.=-]', '-', workdir.name)  # wandb allows no more
    files.write(path, f'{name_of_run}-{uuid.uuid4().hex[:8]}\n')
  run = path.read_text().strip()
  extra: dict[str, Any] = {'embed': False}
  if name == 'wandb':
    extra = {'id': run, 'settings': package.Settings(console='off')}
    if not files.in_bucket(workdir):
      extra['dir'] = str(workdir)
  try:
    return package.init(project=os.environ.get('WANDB_PROJECT', _PROJECT), name=run,
                        config=dict(settings), resume='allow', **extra)
  except Exception as e:  # no account, no network, a full disk
    raise errors.UserError(
        f'{name} does not start: {errors.one_line(e)[:200]}', setting='tracker',
        remedy=('set WANDB_MODE=offline in the environment' if name == 'wandb' else
                'set what it asks for') + ', or remove <tracker>') from e
