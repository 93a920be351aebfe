"""Nearest rows of a memory bank, near-duplicates among them, and outliers.

Similarities are cosines. A row is never its own neighbor.
"""

import dataclasses

from jaxtyping import Float, Int
import numpy as np

from instdisc_jax.evaluation import knn

CROWD = 5  # number of nearest rows that decide whether a row is an outlier


@dataclasses.dataclass(frozen=True)
class Limits:
  """Size limits of a search.

  Attributes:
    neighbors: neighbors per image.
    full: size of the largest bank whose rows are all shown.
    scanned: maximum number of rows scanned for near-duplicates and outliers.
    listed: maximum number of near-duplicates, and of outliers, to list.
  """
  neighbors: int = 20
  full: int = 5000
  scanned: int = 50_000
  listed: int = 200


@dataclasses.dataclass(frozen=True)
class Nearest:
  """The k nearest rows of each of n vectors, most similar first.

  Attributes:
    similarity: [n, k].
    row: [n, k] int.
  """
  similarity: Float[np.ndarray, 'n k']
  row: Int[np.ndarray, 'n k']


@dataclasses.dataclass(frozen=True)
class Shown:
  """The rows shown, and the nearest rows of each.

  Attributes:
    rows: [n] int, ascending.
    nearest: the nearest rows of each.
    restricted: [m] int, rows whose neighbors were searched among `rows`, not in the full bank.
  """
  rows: Int[np.ndarray, ' n']
  nearest: Nearest
  restricted: Int[np.ndarray, ' m']


def spread(n: int, most: int) -> Int[np.ndarray, ' m']:
  """Up to `most` indices from 0..n-1, evenly spread."""
  return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def of_queries(queries: Float[np.ndarray, 'q D'], bank: Float[np.ndarray, 'N D'],
               k: int) -> Nearest:
  """The nearest rows of the bank, at most k, for vectors that are not in it."""
  return _nearest(queries, bank, None, min(k, len(bank)))


def of_rows(rows: Int[np.ndarray, ' n'], bank: Float[np.ndarray, 'N D'], k: int) -> Nearest:
  """The nearest other rows of the bank, at most k, for each of its `rows`."""
  return _nearest(bank[rows], bank, rows, min(k, len(bank) - 1))


def of_shown(exact: Int[np.ndarray, ' e'], others: Int[np.ndarray, ' o'],
             bank: Float[np.ndarray, 'N D'], k: int) -> Shown:
  """The nearest rows of every row shown.

  Args:
    exact: [e] rows, at least one; their neighbors are searched in the full bank, and shown too.
    others: [o] further rows to show; their neighbors are searched among all rows shown.
    bank: [N, D] unit-norm.
    k: neighbors per row, at most N - 1.
  """
  exact = np.unique(exact)
  found = of_rows(exact, bank, k)
  rows = np.unique(np.concatenate([exact, found.row.ravel(), others]))
  similarity = np.empty((len(rows), found.row.shape[1]), np.float32)
  row = np.empty(similarity.shape, int)
  place = np.searchsorted(rows, exact)
  similarity[place], row[place] = found.similarity, found.row
  restricted = np.setdiff1d(rows, exact)
  if len(restricted):
    place = np.searchsorted(rows, restricted)
    found = of_rows(place, bank[rows], k)
    similarity[place], row[place] = found.similarity, rows[found.row]
  return Shown(rows, Nearest(similarity, row), restricted)


def scan(bank: Float[np.ndarray, 'N D'], seed: int,
         most: int) -> tuple[Int[np.ndarray, ' n'], Nearest]:
  """The few nearest rows of every row, or of a seeded sample of `most` rows.

  Returns:
    (rows [n], ascending; their nearest rows in the full bank).
  """
  rows = np.arange(len(bank))
  if len(rows) > most:
    rows = np.sort(np.random.RandomState(seed).permutation(len(bank))[:most])
  return rows, of_rows(rows, bank, CROWD)


def duplicates(rows: Int[np.ndarray, ' n'], nearest: Nearest,
               most: int) -> list[tuple[int, int, float]]:
  """The most similar pairs of a scan, each once: [(row, row, similarity)]."""
  best: dict[tuple[int, int], float] = {}
  for i, others, values in zip(rows, nearest.row, nearest.similarity):
    for j, value in zip(others, values):
      best[min(int(i), int(j)), max(int(i), int(j))] = float(value)
  return [(*pair, best[pair]) for pair in sorted(best, key=best.__getitem__, reverse=True)[:most]]


def outliers(rows: Int[np.ndarray, ' n'], nearest: Nearest, most: int) -> list[tuple[int, float]]:
  """The rows of a scan that are least similar to the others: [(row, mean similarity)]."""
  mean = nearest.similarity.mean(axis=1)
  return [(int(rows[i]), float(mean[i])) for i in np.argsort(mean, kind='stable')[:most]]


def _nearest(queries, bank, own_row, k):
  return Nearest(*map(np.asarray, knn.nearest(queries, bank, own_row, k=k)))
