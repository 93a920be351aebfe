"""Warm start from weights, or from the weights and the bank of an earlier run (`model.init`)."""

from collections.abc import Callable
import os
from typing import Any

import jax
from jaxtyping import Float, Int
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import folder
from instdisc_jax.interop import checkpoints as interop_checkpoints
from instdisc_jax.runtime import checkpoint, distributed, errors, files
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.training.state import TrainState

_REMEDY = 'set <model.init> to a file of weights or to the workdir of a run'


def read_weights(config: config_lib.Config) -> dict[str, Any]:
  """The encoder that `model.init` names.

  Args:
    config: the run's configuration; model.init is a file in any layout that `convert` reads, or the
      workdir of a run.

  Returns:
    {'params', 'batch_stats'}.

  Raises:
    errors.UserError: it cannot be read, or its encoder differs from the run's.
  """
  place = config.model.init
  try:
    found, variables = _read(place, config.model.embedding_dim)
  except errors.UserError as e:  # worded for other commands: name `model.init` instead
    if e.remedy is not None and '<--' not in e.remedy:
      raise
    raise errors.UserError(e.found, e.required, _REMEDY, 'model.init') from e
  for key, value in found.items():
    wanted = config.model[key.removeprefix('model.')]
    if value != wanted:
      raise errors.UserError(
          f"the encoder in '{place}' has {key} = {value}, not {wanted}", setting=key,
          remedy=f'set <{key}>={value}, or another <model.init>')
  return variables


def _read(place, embedding_dim):
  """({'model.name', 'model.width', 'model.embedding_dim'}, {'params', 'batch_stats'})."""
  if files.place(place).is_dir():
    settings, _ = workdir_lib.read(place)
    state = checkpoint.read(files.place(place) / 'checkpoints', ('params', 'batch_stats'))
    kind = 'model.name', 'model.width', 'model.embedding_dim'
    return ({key: settings.get(key) for key in kind},
            {key: state.get(key, {}) for key in ('params', 'batch_stats')})
  if os.path.isfile(place):
    name, width, embedding_dim, variables = interop_checkpoints.read_encoder(place, embedding_dim)
    return {'model.name': name, 'model.width': width,
            'model.embedding_dim': embedding_dim}, variables
  raise errors.UserError(f"model.init is '{place}', which is neither a file nor a folder")


def with_weights(state: TrainState, weights: dict[str, Any] | None) -> TrainState:
  """A fresh state with other weights, on the same devices; unchanged if they are None."""
  if weights is None:
    return state
  put = lambda new, old: jax.make_array_from_callback(
      old.shape, old.sharding, lambda part: np.asarray(new, old.dtype)[part])
  return state.replace(**{key: jax.tree.map(put, weights[key], getattr(state, key))
                          for key in weights})


def with_rows(state: TrainState, place: str, dataset: data.Dataset,
              embed: Callable[[TrainState, data.Images], Float[np.ndarray, 'n D']],
              mesh: jax.sharding.Mesh) -> TrainState:
  """A fresh state that inherits the bank of an earlier run.

  Images known to the earlier run keep their rows (files are matched by path and size, other data by
  the fingerprint of the full set); new images get their embeddings as rows. Class weights are
  inherited too if both runs have them.

  Args:
    state: a state that already has its weights, see `with_weights`.
    place: model.init; for a file, only the weights are used.
    dataset: the new run's data.
    embed: (state, images [n]) -> their embeddings.
    mesh: the device mesh.

  Returns:
    The state. Z is estimated again.
  """
  if not files.place(place).is_dir():
    return state
  old = checkpoint.read(files.place(place) / 'checkpoints')
  old_bank = old['bank']
  row = _known_rows(place, dataset) if old_bank is not None else np.full(len(dataset.train), -1)
  new = np.flatnonzero(row < 0)
  bank = np.empty((len(dataset.train), state.bank.shape[1]), np.float32)
  if old_bank is not None:
    bank[row >= 0] = np.asarray(old_bank, np.float32)[row[row >= 0]]
  if len(new):
    bank[new] = embed(state, dataset.train.subset(new, 'new'))
  state = state.replace(bank=mesh_lib.shard_rows(np.asarray(bank, state.bank.dtype), mesh))
  if state.classifier is None or old.get('classifier') is None:
    return state

  def known_rows(fresh, before):
    rows = distributed.gather(fresh)[:len(row)].copy()
    rows[row >= 0] = before[row[row >= 0]]
    return mesh_lib.shard_rows(np.asarray(rows, fresh.dtype), mesh)

  return state.replace(classifier=jax.tree.map(known_rows, state.classifier, old['classifier']))


def _known_rows(place: str, dataset: data.Dataset) -> Int[np.ndarray, ' N']:
  """The row that each image had in the earlier run, or -1."""
  old, new = folder.read(place), dataset.listing
  if old is None or new is None or dataset.train.names is None:
    _, fingerprint = workdir_lib.read(place)
    same = fingerprint == dataset.train.fingerprint
    return np.arange(len(dataset.train)) if same else np.full(len(dataset.train), -1)
  return folder.rows_of(old, dataset.train.names, new['files'])
