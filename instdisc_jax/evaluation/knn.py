"""Weighted k-nearest-neighbor classification (Section 3.4), exact, on a sharded bank.

The K rows most similar to a query vote for their labels, each with weight exp(s / τ).
"""

from collections.abc import Sequence
import functools
import inspect
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
import numpy as np

from instdisc_jax import bank as bank_lib
from instdisc_jax import linalg
from instdisc_jax.runtime.mesh import AXIS

_AnyArray = Array | np.ndarray
_BLOCK = 16  # rows per block; larger blocks were slower on CPU
MOST_SCORES = 2**25  # maximum number of scores held at once, 128 MiB in float32
# JAX after July 2026: ties may be in any order, which lets GPUs select instead of sort.
_HAS_UNSTABLE = 'is_stable' in inspect.signature(lax.top_k).parameters
_UNSTABLE: dict[str, Any] = {'is_stable': False} if _HAS_UNSTABLE else {}


@functools.partial(jax.jit, static_argnames=('k', 'num_classes', 'axis_name', 'num_rows'))
def class_scores(queries: Float[Array, 'Q D'], bank: Float[Array, 'N D'], labels: Int[Array, ' N'],
                 *, k: int, temperature: float, num_classes: int, axis_name: str | None = None,
                 num_rows: int | None = None) -> Float[Array, 'Q C']:
  """Votes for each class.

  Args:
    queries: [Q, D] unit-norm.
    bank: [N, D] unit-norm rows, or the local shard.
    labels: [N] int, of all rows, on every device.
    k: K <= N.
    temperature: τ > 0.
    num_classes: C.
    axis_name: mesh axis over which the rows are sharded, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.

  Returns:
    [Q, C]: score_c = Σ over the K nearest rows i with label c of exp(s_i / τ).
  """
  similarity, row = nearest(queries, bank, k=k, axis_name=axis_name, num_rows=num_rows)
  return vote(similarity, labels[row], temperature, num_classes)


def vote(similarity: Float[_AnyArray, 'Q K'], label: Int[_AnyArray, 'Q K'], temperature: float,
         num_classes: int) -> Float[Array, 'Q C']:
  """[Q, K] similarities and labels of the neighbors -> [Q, C] scores."""
  weight = jnp.exp(similarity / temperature)
  queries = jnp.arange(label.shape[0])[:, None]
  return jnp.zeros((label.shape[0], num_classes), weight.dtype).at[queries, label].add(weight)


@functools.partial(jax.jit, static_argnames=('k', 'axis_name', 'num_rows', 'recall_target'))
def nearest(queries: Float[Array, 'Q D'], bank: Float[Array, 'N D'],
            own_row: Int[Array, ' Q'] | None = None, *, k: int, axis_name: str | None = None,
            num_rows: int | None = None, recall_target: float | None = None
            ) -> tuple[Float[_AnyArray, 'Q K'], Int[_AnyArray, 'Q K']]:
  """The K most similar rows for each query, exact up to ties, most similar first.

  Queries are processed in chunks, so that no more than 2^25 scores are held at once. With
  `axis_name`, each device finds the K best of its rows, and only those are exchanged.

  Args:
    queries: [Q, D].
    bank: [N, D], or the local shard.
    own_row: [Q] rows to leave out, one per query, or None.
    k: K, at most N (N - 1 with `own_row`).
    axis_name: mesh axis over which the rows are sharded, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.
    recall_target: None for the exact search; else the share of the K best that an approximate
      search should find, in less time on a TPU (elsewhere it is exact, and slower).

  Returns:
    (similarity [Q, K], row [Q, K] int32).
  """
  chunk = max(1, min(queries.shape[0], MOST_SCORES // bank.shape[0]))
  search = lambda query, own_row: _nearest_in_bank(query, own_row, bank, k, axis_name, num_rows,
                                                   recall_target)
  if own_row is None:
    return lax.map(lambda query: search(query, None), queries, batch_size=chunk)
  return lax.map(lambda pair: search(*pair), (queries, own_row), batch_size=chunk)


def _nearest_in_bank(query, own_row, bank, k, axis_name, num_rows, recall_target):
  """One query's K best: [D] -> ([K], [K]); mapped over queries in chunks."""
  n = bank.shape[0]
  first = 0 if axis_name is None else lax.axis_index(axis_name) * n
  position = jnp.arange(n)
  score = linalg.score_rows(query[None], bank)[0]
  if axis_name is not None or num_rows not in (None, n):
    padding = position >= bank_lib.count_local_rows(bank, axis_name, num_rows)
    score = jnp.where(padding, -jnp.inf, score)
  if own_row is not None:
    score = jnp.where(first + position == own_row, -jnp.inf, score)
  if recall_target is None:
    similarity, row = top_k(score, min(k, n))
  else:
    similarity, row = lax.approx_max_k(score, min(k, n), recall_target=recall_target)
  row = (first + row).astype(jnp.int32)
  if axis_name is not None:
    similarity, row = lax.all_gather((similarity, row), axis_name, tiled=True)
    similarity, best = lax.top_k(similarity, k)
    row = row[best]
  return similarity, row


def top_k(scores: Float[Array, ' n'], k: int) -> tuple[Float[Array, ' k'], Int[Array, ' k']]:
  """The k largest of `scores` and their positions, without sorting all of them.

  They are in the k blocks with the largest maxima, so only those blocks are searched. GPUs use a
  selection of their own.
  """
  num_blocks = -(-scores.shape[0] // _BLOCK)
  if num_blocks <= k:
    return _pair(lax.top_k(scores, k))

  def among_best_blocks(scores):
    blocks = jnp.pad(scores, (0, num_blocks * _BLOCK - scores.shape[0]), constant_values=-jnp.inf)
    blocks = blocks.reshape(num_blocks, _BLOCK)
    chosen = lax.top_k(blocks.max(axis=1), k)[1]
    best, place = lax.top_k(blocks[chosen].reshape(-1), k)
    return best, chosen[place // _BLOCK] * _BLOCK + place % _BLOCK

  if not _UNSTABLE:
    return among_best_blocks(scores)
  return lax.platform_dependent(scores, cuda=lambda x: _pair(lax.top_k(x, k, **_UNSTABLE)),
                                default=among_best_blocks)


def _pair(values) -> tuple[Any, Any]:
  best, place = values
  return best, place


def over_mesh(mesh: jax.sharding.Mesh, k: int, num_rows: int,
              recall_target: float | None = None) -> Any:
  """`nearest` for a bank sharded over the mesh: (queries, bank, own_row) -> replicated results."""
  return jax.jit(jax.shard_map(
      functools.partial(nearest, k=k, axis_name=AXIS, num_rows=num_rows,
                        recall_target=recall_target), mesh=mesh,
      in_specs=(P(), P(AXIS), P()), out_specs=P(),
      check_vma=False))  # the gathered candidates are replicated, which its types do not know


def top1(similarity: Float[_AnyArray, 'Q K'], row: Int[_AnyArray, 'Q K'],
         labels: Int[np.ndarray, ' N'], query_labels: Int[np.ndarray, ' Q'],
         temperature: float) -> float:
  """Share of queries whose neighbors vote for the query's label.

  Args:
    similarity: [Q, K] similarities of the neighbors.
    row: [Q, K] int, their rows.
    labels: [N] int.
    query_labels: [Q] int.
    temperature: τ of the vote.

  Returns:
    A float in [0, 1].
  """
  k = similarity.shape[1]
  return top1_grid(similarity, row, labels, query_labels, [k], [temperature])[k, temperature]


def top1_grid(similarity: Float[_AnyArray, 'Q K'], row: Int[_AnyArray, 'Q K'],
              labels: Int[np.ndarray, ' N'], query_labels: Int[np.ndarray, ' Q'],
              ks: Sequence[int], temperatures: Sequence[float]) -> dict[tuple[int, float], float]:
  """`top1` for every K and τ from one search: the K nearest are the first K found.

  Args:
    similarity: [Q, K'] similarities of the neighbors, most similar first; K' is the largest K.
    row: [Q, K'] int, their rows.
    labels: [N] int.
    query_labels: [Q] int.
    ks: values of K, each at most K'.
    temperatures: values of τ.

  Returns:
    {(K, τ): top-1}.
  """
  neighbor_labels, num_classes = jnp.asarray(labels)[row], int(labels.max()) + 1
  correct = {}
  for k in ks:
    for temperature in temperatures:
      scores = vote(similarity[:, :k], neighbor_labels[:, :k], temperature, num_classes)
      correct[k, temperature] = float(np.mean(np.argmax(scores, axis=1) == query_labels))
  return correct


def recall(row: Int[np.ndarray, 'Q K'], exact_row: Int[np.ndarray, 'Q K']) -> float:
  """Share of the exact neighbors [Q, K] among those found [Q, K]."""
  return float(np.mean([np.isin(exact, found).mean() for exact, found in zip(exact_row, row)]))
