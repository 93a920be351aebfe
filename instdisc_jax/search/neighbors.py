"""Nearest rows of a memory bank, near-duplicates among them, and outliers.

Similarities are cosines. A row is never its own neighbor.
"""

import dataclasses

from jaxtyping import Float, Int
import numpy as np

from instdisc_jax.evaluation import knn

_CROWD = 5  # nearest rows that decide whether a row is an outlier


@dataclasses.dataclass(frozen=True)
class Limits:
  """How much is searched.

  Attributes:
    neighbors: of each image.
    full: the most rows of a bank for which all are shown.
    scanned: the most rows that are scanned for near-duplicates and outliers.
    listed: the most near-duplicates, and the most outliers, that are listed.
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
  """Rows that are shown, and the nearest of each.

  Attributes:
    rows: [n] int, ascending.
    nearest: of each.
    restricted: [m] int, those whose neighbors are the nearest among `rows`, not in the full bank.
  """
  rows: Int[np.ndarray, ' n']
  nearest: Nearest
  restricted: Int[np.ndarray, ' m']


def spread(n: int, most: int) -> Int[np.ndarray, ' m']:
  """Up to `most` of 0..n-1, evenly spread."""
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
  """The nearest rows for all rows that are shown.

  Args:
    exact: [e] rows, at least one, whose nearest are found in the full bank; those are shown, too.
    others: [o] further rows that are shown; their nearest are found among all that are shown.
    bank: [N, D] unit-norm.
    k: neighbors of each, at most N - 1.
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
  """The nearest few of all rows, or of `most` of them, chosen by the seed.

  Returns:
    ([n] rows, ascending; their nearest in the full bank).
  """
  rows = np.arange(len(bank))
  if len(rows) > most:
    rows = np.sort(np.random.RandomState(seed).permutation(len(bank))[:most])
  return rows, of_rows(rows, bank, _CROWD)


def duplicates(rows: Int[np.ndarray, ' n'], nearest: Nearest,
               most: int) -> list[tuple[int, int, float]]:
  """The most similar pairs of a scan, each once: [(row, row, similarity)]."""
  best: dict[tuple[int, int], float] = {}
  for i, others, values in zip(rows, nearest.row, nearest.similarity):
    for j, value in zip(others, values):
      best[min(int(i), int(j)), max(int(i), int(j))] = float(value)
  return [(*pair, best[pair]) for pair in sorted(best, key=best.__getitem__, reverse=True)[:most]]


def outliers(rows: Int[np.ndarray, ' n'], nearest: Nearest, most: int) -> list[tuple[int, float]]:
  """The rows of a scan that are least similar to any other: [(row, mean of its similarities)]."""
  mean = nearest.similarity.mean(axis=1)
  return [(int(rows[i]), float(mean[i])) for i in np.argsort(mean, kind='stable')[:most]]


def _nearest(queries, bank, own_row, k):
  return Nearest(*map(np.asarray, knn.nearest(queries, bank, own_row, k=k)))
