"""How a run begins that begins with something: with weights, or an earlier run's bank."""

import functools
import os

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax import checkpoint, convert, distributed, errors, files, train
from instdisc_jax import workdir as workdir_lib
from instdisc_jax.data import folder


def read_weights(config):
  """The encoder that `model.init` names.

  Args:
    config: the run's configuration; model.init is a .pth or .safetensors file in any layout that
      `convert` reads, or the workdir of a run.

  Returns:
    {'params', 'batch_stats'}.

  Raises:
    errors.UserError: there is none, or it is of another kind than the run's.
  """
  place = config.model.init
  try:
    found, variables = _read(place, config.model.embedding_dim)
  except errors.UserError as e:  # of commands where the place has another name
    text = str(e).replace('--from', '--config.model.init')
    raise errors.UserError(text.replace('--workdir', '--config.model.init')) from e
  for key, value in found.items():
    wanted = config.model[key.removeprefix('model.')]
    if value != wanted:
      raise errors.UserError(f"the encoder in '{place}' has {key} = {value}, not {wanted}: set "
                             f'--config.{key}={value}, or another --config.model.init')
  return variables


def _read(place, embedding_dim):
  """({'model.name', 'model.width', 'model.embedding_dim'}, {'params', 'batch_stats'})."""
  if files.place(place).is_dir():
    settings, _ = workdir_lib.read(place)
    state = checkpoint.read(files.place(place) / 'checkpoints')
    kind = 'model.name', 'model.width', 'model.embedding_dim'
    return ({key: settings.get(key) for key in kind},
            {key: state[key] for key in ('params', 'batch_stats')})
  if os.path.isfile(place):
    name, width, embedding_dim, variables = convert.read_encoder(place, embedding_dim)
    return {'model.name': name, 'model.width': width,
            'model.embedding_dim': embedding_dim}, variables
  raise errors.UserError(f"model.init is '{place}', which is no file and no folder: set "
                         '--config.model.init to weights or to the workdir of a run')


def with_weights(state, weights):
  """A fresh `TrainState` with other weights, on the same devices; with None as it is."""
  if weights is None:
    return state
  put = lambda new, old: jax.make_array_from_callback(
      old.shape, old.sharding, lambda part: np.asarray(new, old.dtype)[part])
  return state.replace(**{key: jax.tree.map(put, weights[key], getattr(state, key))
                          for key in weights})


def with_rows(state, place, dataset, evaluator, mesh):
  """A fresh `TrainState` whose bank goes on from an earlier run's.

  Pictures that the run knew (a folder's: by path and size; others: by the fingerprint of all) keep
  their rows; new ones get their own features. Class weights, where both runs have them, go on too.

  Args:
    state: with the weights already, see `with_weights`.
    place: model.init; of a file nothing but the weights is taken.
    dataset: a `data.Dataset`.
    evaluator: a `report.Evaluator`.
    mesh: the device mesh.

  Returns:
    The state. Z is estimated anew.
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
  bank[new] = evaluator.embed(state, dataset.train.subset(new, 'new'))
  place_rows = functools.partial(_place_rows, mesh=mesh)
  state = state.replace(bank=place_rows(bank, state.bank))
  if state.classifier is None or old.get('classifier') is None:
    return state

  def known_rows(fresh, before):
    rows = distributed.gather(fresh)[:len(row)].copy()
    rows[row >= 0] = before[row[row >= 0]]
    return place_rows(rows, fresh)

  return state.replace(classifier=jax.tree.map(known_rows, state.classifier, old['classifier']))


def _place_rows(rows, like, mesh):
  """[N, D] on the host -> padded and sharded like `like`."""
  padded = np.asarray(train.pad_rows(rows, mesh.size), like.dtype)
  return jax.make_array_from_callback(
      padded.shape, NamedSharding(mesh, P(train.AXIS)), lambda part: padded[part])


def _known_rows(place, dataset):
  """[N] the row that each picture had in the earlier run, or -1."""
  old, new = folder.read(place), dataset.listing
  if old is None or new is None:
    _, fingerprint = workdir_lib.read(place)
    same = fingerprint == dataset.train.fingerprint
    return np.arange(len(dataset.train)) if same else np.full(len(dataset.train), -1)
  return folder.rows_of(old, dataset.train.names, new['files'])
