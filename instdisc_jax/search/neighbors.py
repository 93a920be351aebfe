"""Nearest neighbors among embeddings, searched exactly and on all devices.

Similarities are cosines. A row is never its own neighbor.
"""

from collections.abc import Callable
import dataclasses

import jax
from jaxtyping import Float, Int
import numpy as np

from instdisc_jax.evaluation import knn
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import metrics

CROWD = 5  # number of nearest rows that decide whether a row is an outlier
_CHUNK = 4096  # queries searched at once


@dataclasses.dataclass(frozen=True)
class Nearest:
  """The k nearest rows of each of n vectors, most similar first.

  Attributes:
    similarity: [n, k].
    row: [n, k] int.
  """
  similarity: Float[np.ndarray, 'n k']
  row: Int[np.ndarray, 'n k']


def search(rows: Float[np.ndarray, 'N D'], queries: Float[np.ndarray, 'Q D'] | None, k: int,
           own_row: Int[np.ndarray, ' Q'] | None = None,
           check: Callable[[], None] = lambda: None) -> Nearest:
  """The nearest rows of each query, k or as many as there are, by this process's devices.

  Args:
    rows: [N, D] unit-norm.
    queries: [Q, D] unit-norm, at least one; None: each row, among the others.
    k: number of neighbors.
    own_row: [Q] the row that each query is, which is left out; None: none of them is one.
    check: called between chunks; an exception that it raises ends the search.
  """
  mesh = mesh_lib.make(jax.local_devices())  # one process may search alone
  if queries is None:
    queries, own_row = rows, np.arange(len(rows))
  leave_out = np.full(len(queries), -1) if own_row is None else own_row
  find = knn.over_mesh(mesh, min(k, len(rows) - (own_row is not None)), len(rows))
  bank = mesh_lib.shard_rows(np.asarray(rows, np.float32), mesh)
  asked = np.asarray(queries, np.float32)
  chunk, parts = min(_CHUNK, len(asked)), []
  with metrics.progress_bar('searching') as progress:
    for start in progress.track(range(0, len(asked), chunk)):
      chosen = np.minimum(np.arange(start, start + chunk), len(asked) - 1)  # one size to compile
      parts.append(jax.device_get(find(asked[chosen], bank, leave_out[chosen].astype(np.int32))))
      check()
  similarity, row = (np.concatenate(part)[:len(asked)] for part in zip(*parts))
  return Nearest(similarity, row)


def spread(n: int, most: int) -> Int[np.ndarray, ' m']:
  """Up to `most` indices from 0..n-1, evenly spread."""
  return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))
