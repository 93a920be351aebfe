"""Duplicates, leaks and outliers among images, by their embeddings.

The search is exact, over all rows and on all devices. Two images count as duplicates if their
cosine reaches a threshold. Unless given, it is chosen from the rows themselves, so that at most
one in a hundred of the pairs above it is expected by chance.
"""

from collections.abc import Callable, Sequence
import csv
import dataclasses
import io
import pathlib

from jaxtyping import Float, Int
import numpy as np
from scipy import sparse, special
from scipy.sparse import csgraph

from instdisc_jax.runtime import errors, files
from instdisc_jax.search import neighbors

NEIGHBORS = 10  # of each row: enough to connect every group
_OUTLIERS = 0.01  # share of the rows that are listed as outliers
_BY_CHANCE = 0.01  # share of the pairs above the threshold
_LEAST = 0.5  # no pair below is ever a duplicate
_ROUNDING = 4e-7  # squared distance within which rows are the same
_CROWDED = 0.05  # share of the rows, besides copies, that may have 10 duplicates and more


@dataclasses.dataclass(frozen=True)
class Findings:
  """What is remarkable in a set of images.

  Attributes:
    threshold: cosine from which two images are duplicates.
    groups: each the indices of images that are duplicates of each other, the one to keep first;
      the largest groups first.
    similarity: [N] cosine of each image and its nearest other image.
    outliers: indices of the images least like their nearest five, the least like first.
    crowd: [N] mean cosine of each image and its nearest five.
    leaks: [(index of a query, index of the image that it repeats, cosine)], most similar first.
  """
  threshold: float
  groups: list[list[int]]
  similarity: Float[np.ndarray, ' N']
  outliers: Int[np.ndarray, ' m']
  crowd: Float[np.ndarray, ' N']
  leaks: list[tuple[int, int, float]]


def examine(rows: Float[np.ndarray, 'N D'], queries: Float[np.ndarray, 'Q D'] | None = None, *,
            threshold: float | None = None, sizes: Sequence[int] | None = None,
            check: Callable[[], None] = lambda: None) -> Findings:
  """Finds duplicates and outliers among rows, and queries that repeat one of them.

  Args:
    rows: [N, D] unit-norm, N at least 2.
    queries: [Q, D] unit-norm, e.g. of a test set, or None.
    threshold: cosine from which two images are duplicates; by default `choose_threshold`.
    sizes: [N] bytes of the images' files: of a group, the largest is kept; by default the first.
    check: called between chunks; an exception that it raises ends the search.
  """
  found = neighbors.search(rows, None, NEIGHBORS, check=check)
  if threshold is None:
    threshold = choose_threshold(found.similarity)
  crowd = found.similarity[:, :neighbors.CROWD].mean(axis=1)
  count = max(1, int(_OUTLIERS * len(rows)))
  leaks = []
  if queries is not None and len(queries):
    nearest = neighbors.search(rows, queries, 1, check=check)
    leaks = [(int(i), int(nearest.row[i, 0]), float(nearest.similarity[i, 0]))
             for i in np.argsort(-nearest.similarity[:, 0], kind='stable')
             if nearest.similarity[i, 0] >= threshold]
  return Findings(threshold, connect(found, threshold, sizes), found.similarity[:, 0],
                  np.argsort(crowd, kind='stable')[:count], crowd, leaks)


def choose_threshold(similarity: Float[np.ndarray, 'N K']) -> float:
  """The cosine above which at most one pair in a hundred is expected by chance.

  Around a row of a set without duplicates, the number of others within a distance r is Poisson
  with the mean c r^d: d is the dimension of the data, c their density there. d comes from the
  ratio of the 10th neighbor's distance to the 5th's (Levina and Bickel, 2004), c from the 10th's;
  10th neighbors are hardly ever duplicates. Summed over rows, c r^d is the count due to chance.

  Args:
    similarity: [N, K] cosine of each row and its nearest other rows, most similar first; of more
      than 10, the first 10 are used.

  Returns:
    A cosine of at least 0.5; if nothing stands out, 1 - 1e-6 for the identical ones or, without
    any, 1 + 1e-6 (no pairs).
  """
  squared = 2 - 2 * similarity[:, :NEIGHBORS].astype(np.float64)
  distances = np.sqrt(np.maximum(squared, _ROUNDING))
  distance, (n, k) = np.sort(distances[:, 0]), distances.shape
  middle, last = distances[:, (k - 1) // 2], distances[:, -1]
  copied = middle**2 <= 4 * _ROUNDING  # the same as five others: tells nothing of the dimension
  spread = 0.0 if copied.all() else np.log(last / middle)[~copied].mean()
  if spread <= 0:
    return 1.0 - 1e-6  # all are identical, or there are only two
  power = (special.digamma(k) - special.digamma((k + 1) // 2)) / spread
  last = np.maximum(last, np.quantile(last[~copied], _CROWDED))
  by_chance = distance ** power * (max(k - 1, 1) / last ** power).sum()
  observed = np.arange(1, n + 1)
  good = np.flatnonzero((by_chance <= _BY_CHANCE * observed)
                        & (distance <= np.sqrt(2 - 2 * _LEAST)))
  if not len(good):
    return 1.0 - 1e-6 if distance[0]**2 <= 4 * _ROUNDING else 1.0 + 1e-6
  # Halfway, in logarithms, to where one by chance would be enough.
  farthest = distance[good[-1]]
  limit = farthest * (_BY_CHANCE * observed[good[-1]] / by_chance[good[-1]]) ** (1 / power)
  r = np.sqrt(farthest * min(limit, np.sqrt(2 - 2 * _LEAST)))
  return float(1 - r**2 / 2)


def connect(found: neighbors.Nearest, threshold: float,
            sizes: Sequence[int] | None = None) -> list[list[int]]:
  """Groups of rows that are connected by pairs at or above the threshold.

  Args:
    found: the nearest other rows of all rows.
    threshold: a cosine.
    sizes: [N]; the largest of a group comes first, ties and the rest in the order of the rows.
  """
  n = len(found.row)
  i, j = np.nonzero(found.similarity >= threshold)
  graph = sparse.coo_matrix((np.ones(len(i), bool), (i, found.row[i, j])), shape=(n, n))
  _, of = csgraph.connected_components(graph, directed=False)
  order = np.argsort(of, kind='stable')
  parts = np.split(order, np.flatnonzero(np.diff(of[order])) + 1)
  groups = [part.tolist() for part in parts if len(part) > 1]
  if sizes is not None:
    size = np.asarray(sizes)
    groups = [sorted(group, key=lambda row: (-size[row], row)) for group in groups]
  return sorted(groups, key=lambda group: (-len(group), group[0]))


def write(folder: pathlib.Path, findings: Findings, names: Sequence[str],
          query_names: Sequence[str] = ()) -> None:
  """Writes duplicates.csv, outliers.csv and leaks.csv.

  Args:
    folder: created if needed.
    findings: what was found.
    names: [N] the paths of the images.
    query_names: [Q] the paths of the queries.

  Raises:
    errors.UserError: they cannot be written.
  """
  tables = {
      'duplicates.csv': [('group', 'path', 'similarity', 'keep'), *(
          (number, names[i], f'{findings.similarity[i]:.4f}', str(i == group[0]).lower())
          for number, group in enumerate(findings.groups) for i in group)],
      'outliers.csv': [('path', 'similarity'), *(
          (names[i], f'{findings.crowd[i]:.4f}') for i in findings.outliers)],
      'leaks.csv': [('path', 'repeats', 'similarity'), *(
          (query_names[i], names[j], f'{similarity:.4f}') for i, j, similarity in findings.leaks)]}
  try:
    folder.mkdir(exist_ok=True)
    for name, lines in tables.items():
      text = io.StringIO()
      csv.writer(text, lineterminator='\n').writerows(lines)
      files.write(folder / name, text.getvalue())
  except OSError as e:
    raise errors.cannot_write(folder, e, '--output') from e
