"""Import of another project's checkpoint as a workdir."""

import math
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import optax

from instdisc_jax import config as config_lib
from instdisc_jax.interop import checkpoints
from instdisc_jax.runtime import checkpoint, errors, files
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.training import optimizer as optimizer_lib
from instdisc_jax.training import state as state_lib

__all__ = ['import_checkpoint']


def import_checkpoint(file: str | os.PathLike[str], workdir: str | os.PathLike[str]) -> list[str]:
  """Creates a workdir from a PyTorch checkpoint, for training and evaluation.

  The bank, Z, SGD's momentum and the epoch are imported if the file has them. The settings that it
  implies are fixed in config.json; all others are free until the first run. A run of some epochs
  goes on with SGD; weights alone may be trained with any optimizer.

  Args:
    file: a checkpoint of the published code, or one with the weights of a known encoder in the
      layout of torchvision, timm, DINO, MoCo, PyContrast, VISSL or MMSelfSup.
    workdir: a folder that does not exist yet, or an empty one.

  Returns:
    Lines that describe what was found.

  Raises:
    errors.UserError: the file holds no known encoder, or the folder is not new or cannot be
      written. Nothing is left behind.
  """
  workdir = _check_new(workdir)
  default: Any = config_lib.default()
  found = checkpoints.read(file, default.model.embedding_dim)
  settings = _settings(found)
  num_rows, step = 1, 0
  if found.bank is not None:
    num_rows = len(found.bank)
    step = math.ceil(found.epochs * num_rows / settings['batch_size'])
  _write(workdir, settings, _make_state(found, num_rows, step), num_rows)
  return _describe(found, settings, step)


def _check_new(workdir):
  """The absolute path of a workdir that can be created."""
  if files.in_bucket(workdir):
    raise errors.UserError(f"--workdir is '{workdir}'", 'a local folder, which can be copied to a '
                           'bucket afterwards', setting='--workdir')
  workdir = pathlib.Path(workdir).absolute()
  if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
    raise errors.UserError(f"workdir '{workdir}' exists", 'new or empty',
                           'set <--workdir> to another folder', '--workdir')
  return workdir


def _settings(found: checkpoints.Checkpoint) -> dict[str, Any]:
  """The settings that the checkpoint fixes: {'model.name': ..., ...}."""
  cifar = found.model_name.endswith('_cifar')
  config: Any = config_lib.default()
  if not cifar:
    config.augment.update(config_lib.PHOTOGRAPHS)
  settings = {
      'augment.mean': list(config.augment.mean), 'augment.std': list(config.augment.std),
      **found.settings, 'model.name': found.model_name, 'model.width': found.width,
      'model.head': found.head, 'model.embedding_dim': found.embedding_dim}
  if found.bank is not None:
    settings['batch_size'] = 128 if cifar else 256  # as published, to convert epochs to steps
  if _continues(found):
    settings['optimizer.name'] = 'sgd'
  return settings


def _continues(found: checkpoints.Checkpoint) -> bool:
  """Whether the file has a part of the optimizer's state: momentum, or the number of epochs."""
  return found.momentum is not None or found.bank is not None


def _make_state(found: checkpoints.Checkpoint, num_rows: int, step: int) -> state_lib.TrainState:
  opt_state: Any = None
  if _continues(found):
    optimizer = optimizer_lib.make(config_lib.default(), num_rows)
    opt_state = optax.tree.set(optimizer.init(found.variables['params']), count=jnp.int32(step))
  if found.momentum is not None:
    opt_state = optax.tree.set(opt_state, trace=found.momentum)
  bank: Any = None if found.bank is None else jnp.asarray(found.bank)
  return state_lib.TrainState(step=jnp.int32(step), **found.variables, opt_state=opt_state,
                              bank=bank, normalizer=jnp.float32(found.normalizer))


def _write(workdir: pathlib.Path, settings: dict[str, Any], state: state_lib.TrainState,
           num_rows: int) -> None:
  """Writes a workdir completely or not at all."""
  mesh = mesh_lib.make(jax.devices()[:1])
  partial = workdir.with_name(workdir.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
    saved = checkpoint.Checkpoints(partial / 'checkpoints', 1, num_rows)
    saved.save(jax.device_put(state, state_lib.shardings(mesh, state)))
    saved.close()
    workdir_lib.write(partial, settings, None)
    if workdir.exists():
      workdir.rmdir()
    partial.rename(workdir)
  except OSError as e:
    raise errors.cannot_write(workdir, e, '--workdir') from e
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _describe(found: checkpoints.Checkpoint, settings: dict[str, Any], step: int) -> list[str]:
  """Lines for the user that describe what was found."""
  head = ('from the file' if found.has_head
          else 'fresh: the file has no single linear layer to an embedding')
  lines = [f'encoder: {found.model_name}, width {found.width}, embedding of '
           f'{found.embedding_dim}; head {head}']
  if found.bank is None:
    lines += ['bank: none in the file; training starts with a fresh one']
  else:
    lines += [f'bank: {len(found.bank):,} rows'
              + (f', Z = {found.normalizer:.1f}' if found.normalizer else '')
              + f'; step {step:,} at batch size {settings["batch_size"]}',
              'row i must belong to training image i: the order is that of the PyTorch data set '
              "(sorted folders and files; torchvision's CIFAR-10), not that of TFDS"]
  if not _continues(found):
    return lines + ['optimizer: starts anew']
  return lines + ["optimizer: SGD's momentum "
                  + ('starts at zero' if found.momentum is None else 'from the file')]
