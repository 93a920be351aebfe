"""The rows of the memory bank that are most similar to a query: exact, on a sharded bank."""

from collections.abc import Callable
import functools
import inspect
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from instdisc_jax import bank as bank_lib
from instdisc_jax import linalg

_AnyArray = Array | np.ndarray
# Scores held at once. Those of a CPU stay near its caches; on an accelerator 2^28, 1 GiB, keep the
# bank from being read for every few queries.
_SCORES = {'cpu': 2**22, 'default': 2**28}
_GROUP = 16  # scores that share a maximum
_LANES = 128  # groups start at multiples of it, as the vectors of accelerators do
# JAX after July 2026: ties may be in any order, which lets GPUs select instead of sort.
_HAS_UNSTABLE = 'is_stable' in inspect.signature(lax.top_k).parameters
_UNSTABLE: dict[str, Any] = {'is_stable': False} if _HAS_UNSTABLE else {}


@functools.partial(jax.jit, static_argnames=('k', 'axis_name', 'num_rows', 'recall_target',
                                             'most_scores'))
def nearest(queries: Float[Array, 'Q D'], bank: Float[Array, 'N D'],
            own_row: Int[Array, ' Q'] | None = None, below: Float[Array, ' Q'] | None = None, *,
            k: int, axis_name: str | None = None,
            num_rows: int | None = None, recall_target: float | None = None,
            most_scores: int | None = None
            ) -> tuple[Float[_AnyArray, 'Q K'], Int[_AnyArray, 'Q K']]:
  """The K most similar rows for each query, exact up to ties, most similar first.

  Queries are processed in chunks: every chunk reads the bank once. With `axis_name`, each device
  finds the K best of its rows for all queries, sends them to the device that merges the query's,
  and receives what the others merged: about 16 Q K bytes, whatever the number of devices.

  Args:
    queries: [Q, D].
    bank: [N, D], or the local shard.
    own_row: [Q] rows to leave out, one per query, or None.
    below: [Q] similarities; rows that are as similar or more are left out. None for any.
    k: K, at most N (N - 1 with `own_row`).
    axis_name: mesh axis over which the rows are sharded, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.
    recall_target: None for the exact search; else the share of the K best that an approximate
      search should find, in less time on a TPU (elsewhere it is exact, and slower).
    most_scores: scores held at once; by default what suits the platform.

  Returns:
    (similarity [Q, K], row [Q, K] int32); a similarity is -inf where no row is left.
  """
  n = bank.shape[0]
  first = 0 if axis_name is None else lax.axis_index(axis_name) * n
  excluded = None if own_row is None else own_row - first
  if axis_name is not None or num_rows not in (None, n):
    num_local = bank_lib.count_local_rows(bank, axis_name, num_rows)
  else:
    num_local = None
  search = lambda scores: functools.partial(_search, k=min(k, n), recall_target=recall_target,
                                            chunk=max(1, scores // n))
  operands = queries, bank, excluded, below, num_local
  if most_scores is not None:
    similarity, row = search(most_scores)(*operands)
  else:
    similarity, row = lax.platform_dependent(
        *operands, **{platform: search(scores) for platform, scores in _SCORES.items()})
  row = (first + row).astype(jnp.int32)
  return (similarity, row) if axis_name is None else _merge(similarity, row, k, axis_name)


def _search(queries, bank, excluded, below, num_local, *, k, recall_target, chunk):
  """The k best of the local rows: ([Q, k], [Q, k])."""
  position = jnp.arange(bank.shape[0])

  def search(inputs):
    query, excluded, below = inputs
    score = linalg.score_rows(query, bank)
    if num_local is not None:
      score = jnp.where(position < num_local, score, -jnp.inf)
    if excluded is not None:
      score = jnp.where(position == excluded[:, None], -jnp.inf, score)
    if below is not None:
      score = jnp.where(score < below[:, None], score, -jnp.inf)
    if recall_target is None:
      return top_k(score, k)
    return _pair(lax.approx_max_k(score, k, recall_target=recall_target))

  return linalg.in_chunks(search, (queries, excluded, below), chunk)


def _merge(similarity, row, k, axis_name):
  """The k best of all devices' candidates [Q, k']; each device merges those of Q / devices."""
  total, devices = similarity.shape[0], lax.axis_size(axis_name)
  spread = lambda x: lax.all_to_all(jnp.pad(x, ((0, -total % devices), (0, 0))), axis_name, 0, 1,
                                    tiled=True)
  similarity, row = spread(similarity), spread(row)
  similarity, best = lax.top_k(similarity, k)
  merged = similarity, jnp.take_along_axis(row, best, axis=1)
  similarity, row = lax.all_gather(merged, axis_name, tiled=True)
  return similarity[:total], row[:total]


def top_k(scores: Float[Array, 'Q n'], k: int) -> tuple[Float[Array, 'Q k'], Int[Array, 'Q k']]:
  """The k largest of each row and their positions, without sorting all of them.

  Groups of 16 scores share a maximum. The k largest scores are in the k groups with the largest
  maxima, which are found in the same way. On a CPU a group is 16 neighbors, one cache line; on a
  TPU it is {g, g + G, g + 2G, ...}, whose maxima are those of 16 slices, vector by vector. GPUs use
  a selection of their own.
  """
  selections: dict[str, Callable] = {'cpu': functools.partial(among_neighbors, k=k),
                                     'default': functools.partial(among_slices, k=k)}
  if _UNSTABLE:
    selections['cuda'] = lambda x: _pair(lax.top_k(x, k, **_UNSTABLE))
  return lax.platform_dependent(scores, **selections)


def among_neighbors(scores, k):
  """`top_k` with groups of neighbors."""
  total, n = scores.shape
  if n < 4 * _GROUP * k:  # too few groups to be worth it
    return _pair(lax.top_k(scores, k))
  filled = jnp.pad(scores, ((0, 0), (0, -n % _GROUP)), constant_values=-jnp.inf)
  members = filled.reshape(total, -1, _GROUP)
  chosen = among_neighbors(members.max(axis=2), k)[1]
  candidates = jnp.take_along_axis(members, chosen[:, :, None], axis=1).reshape(total, -1)
  best, index = lax.top_k(candidates, k)
  group = jnp.take_along_axis(chosen, index // _GROUP, axis=1)
  return best, group * _GROUP + index % _GROUP


def among_slices(scores, k):
  """`top_k` with a group's members in different slices."""
  n = scores.shape[1]
  if n < max(4 * _GROUP * k, 2 * _GROUP * _LANES):
    return _pair(lax.top_k(scores, k))
  groups = -(-n // (_GROUP * _LANES)) * _LANES
  starts = range(0, n, groups)
  slices = [scores[:, start:start + groups] for start in starts]
  slices[-1] = jnp.pad(slices[-1], ((0, 0), (0, len(starts) * groups - n)),
                       constant_values=-jnp.inf)
  chosen = among_slices(functools.reduce(jnp.maximum, slices), k)[1]
  place = (chosen[:, None] + jnp.array(starts)[:, None]).reshape(len(scores), -1)
  candidates = jnp.take_along_axis(scores, jnp.minimum(place, n - 1), axis=1)
  best, index = lax.top_k(jnp.where(place < n, candidates, -jnp.inf), k)
  return best, jnp.take_along_axis(place, index, axis=1)


def _pair(values) -> tuple[Any, Any]:
  best, place = values
  return best, place
