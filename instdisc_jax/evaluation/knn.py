"""Weighted k-nearest-neighbor classification (Section 3.4), exact, on a sharded bank.

The K rows most similar to a query vote for their labels, each with weight exp(s / τ).
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
import numpy as np

from instdisc_jax import neighbors
from instdisc_jax.runtime.mesh import AXIS

_AnyArray = Array | np.ndarray


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
  similarity, row = neighbors.nearest(queries, bank, k=k, axis_name=axis_name, num_rows=num_rows)
  return vote(similarity, labels[row], temperature, num_classes)


def vote(similarity: Float[_AnyArray, 'Q K'], label: Int[_AnyArray, 'Q K'], temperature: float,
         num_classes: int) -> Float[Array, 'Q C']:
  """[Q, K] similarities and labels of the neighbors -> [Q, C] scores."""
  weight = jnp.exp(similarity / temperature)
  queries = jnp.arange(label.shape[0])[:, None]
  return jnp.zeros((label.shape[0], num_classes), weight.dtype).at[queries, label].add(weight)


def over_mesh(mesh: jax.sharding.Mesh, k: int, num_rows: int,
              recall_target: float | None = None) -> Any:
  """`neighbors.nearest` over the mesh: (queries, sharded bank, own_row) -> replicated results."""
  return jax.jit(jax.shard_map(
      functools.partial(neighbors.nearest, k=k, axis_name=AXIS, num_rows=num_rows,
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
  classes, number = np.unique(labels, return_inverse=True)  # some numbers may have no images
  neighbor_labels, correct = jnp.asarray(number)[row], {}
  for k in ks:
    for temperature in temperatures:
      scores = vote(similarity[:, :k], neighbor_labels[:, :k], temperature, len(classes))
      correct[k, temperature] = float(np.mean(classes[np.argmax(scores, axis=1)] == query_labels))
  return correct


def recall(row: Int[np.ndarray, 'Q K'], exact_row: Int[np.ndarray, 'Q K']) -> float:
  """Share of the exact neighbors [Q, K] among those found [Q, K]."""
  return float(np.mean([np.isin(exact, found).mean() for exact, found in zip(exact_row, row)]))
