"""Warm start from weights, or from the weights and the bank of an earlier run (`model.init`)."""

from collections.abc import Callable, Iterable
import functools
import os
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import folder
from instdisc_jax.interop import checkpoints as interop_checkpoints
from instdisc_jax.runtime import checkpoint, errors, files
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.runtime.mesh import AXIS
from instdisc_jax.training.state import TrainState

_ALL = object()  # every image keeps its row
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
    found, variables = _read(place, config.model.embedding_dim, config.model.head)
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


def _read(place, embedding_dim, head):
  """({'model.name', ...}, {'params', 'batch_stats'}), see `checkpoints.read_encoder`."""
  if files.place(place).is_dir():
    settings, _ = workdir_lib.read(place)
    state = checkpoint.read(files.place(place) / 'checkpoints', ('params', 'batch_stats'))
    settings = {'model.head': 'linear'} | settings  # of a run by an earlier version
    kind = 'model.name', 'model.width', 'model.head', 'model.embedding_dim'
    return ({key: settings.get(key) for key in kind},
            {key: state.get(key, {}) for key in ('params', 'batch_stats')})
  if os.path.isfile(place):
    return interop_checkpoints.read_encoder(place, embedding_dim, head)
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
              embed: Callable[[TrainState, data.Images], Iterable[Float[np.ndarray, 'n D']]],
              mesh: jax.sharding.Mesh) -> TrainState:
  """A fresh state that inherits the bank of an earlier run.

  Images known to the earlier run keep their rows; new images get their embeddings as rows. Files
  are matched by path and size and, if the earlier run's folder is another that is still there, by
  content; other data by the fingerprint of the full set. Class weights are inherited too if both
  runs have them. Every process holds the rows of its own devices only.

  Args:
    state: a state that already has its weights, see `with_weights`.
    place: model.init; for a file, only the weights are used.
    dataset: the new run's data.
    embed: (state, images) -> their embeddings in order, in parts.
    mesh: the device mesh.

  Returns:
    The state. Z is estimated again.
  """
  if not files.place(place).is_dir():
    return state
  old = checkpoint.read_rows(files.place(place) / 'checkpoints',
                             NamedSharding(mesh, P(AXIS)), at_least=len(state.bank))
  known = None if old['bank'] is None else _known_rows(place, dataset)
  if known is _ALL:
    take = lambda fresh, before: before.astype(fresh.dtype)
  else:
    row = np.full(len(state.bank), -1, np.int32)
    row[:len(dataset.train)] = -1 if known is None else known
    slots = mesh_lib.local_slots(mesh, len(row))
    wanted = mesh_lib.place_local(row[slots], mesh, slots, len(row))
    unknown = np.flatnonzero(row[:len(dataset.train)] < 0)
    new = _new_rows(state, dataset.train, unknown, slots, embed)
    state = state.replace(bank=mesh_lib.place_local(new, mesh, slots, len(row)))
    take = lambda fresh, before: take_rows(mesh)(fresh, before, wanted)
  if old['bank'] is not None:
    state = state.replace(bank=take(state.bank, old['bank']))
  if state.classifier is not None and old['classifier'] is not None:
    state = state.replace(classifier=jax.tree.map(take, state.classifier, old['classifier']))
  return state


def _new_rows(state, images, new, slots, embed):
  """The embeddings of the images `new` at their places among this process's rows, else zero."""
  rows = np.zeros((len(slots), state.bank.shape[1]), state.bank.dtype)
  first = 0
  for part in embed(state, images.subset(new, 'new')) if len(new) else ():
    index = new[first:first + len(part)]
    mine = np.isin(index, slots)
    rows[np.searchsorted(slots, index[mine])] = part[mine]
    first += len(part)
  return rows


@functools.cache
def take_rows(mesh: jax.sharding.Mesh) -> Any:
  """A jitted (rows, other rows, which) -> rows, of which those with which >= 0 are other[which].

  All are sharded by rows. The shards of the other rows are passed around, so a device holds one of
  them at a time.
  """
  ring = [(i, (i + 1) % mesh.size) for i in range(mesh.size)]

  def device_part(rows, other, which):
    def take(i, carry):
      held, rows = carry
      local = which - (lax.axis_index(AXIS) - i) % mesh.size * len(held)
      inside = (local >= 0) & (local < len(held)) & (which >= 0)
      found = held[jnp.clip(local, 0, len(held) - 1)].astype(rows.dtype)
      return lax.ppermute(held, AXIS, ring), jnp.where(inside[:, None], found, rows)

    return lax.fori_loop(0, mesh.size, take, (other, rows))[1]

  spec = P(AXIS)
  return jax.jit(jax.shard_map(device_part, mesh=mesh, in_specs=(spec, spec, spec),
                               out_specs=spec))


def _known_rows(place: str, dataset: data.Dataset) -> Any:
  """[N] the row that each image had in the earlier run, or -1; `_ALL` if all are the same."""
  old, new = folder.read(place), dataset.listing
  settings, fingerprint = workdir_lib.read(place)
  if old is None or new is None or dataset.train.names is None:
    return _ALL if fingerprint == dataset.train.fingerprint else None
  rows = folder.rows_of(old, dataset.train.names, new['files'])
  before, now = (name.partition(':')[2]
                 for name in (settings.get('dataset.name', ''), dataset.name))
  if not os.path.isdir(os.path.expanduser(before)):
    return rows  # it has been moved
  return folder.only_same(rows, dataset.train.names, now, before)
