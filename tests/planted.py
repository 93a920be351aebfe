"""Random vectors with near-duplicates planted among them; for tests and benchmarks."""

import numpy as np

from tests import twins


def draw(n=1000, groups=20, leaks=5, *, noise=0.1, inner=None, dim=32, seed=0):
  """Rows with groups of near-duplicates, and queries of which some repeat a row.

  Args:
    n: number of rows; a tenth as many are queries.
    groups: number of groups, of 2 to 5 rows each.
    leaks: number of queries that repeat a row.
    noise: of the copies, whose cosine is about 1 - noise^2 / 2.
    inner: dimensions that the vectors fill; by default all.
    dim: numbers in a vector.
    seed: of the random numbers.

  Returns:
    (rows [n, dim], queries [n / 10, dim], {groups}, {(query, row)}).
  """
  random = np.random.default_rng(seed)
  turn = random.standard_normal((inner, dim)) if inner else np.eye(dim)
  some = lambda count: twins.unit_rows(random, count, inner or dim) @ turn
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  near = lambda x: unit(x + noise * twins.unit_rows(random, *x.shape))
  rows, place, truth = unit(some(n)), 0, set()
  order = random.permutation(n)
  for size in random.integers(2, 6, groups):
    group = order[place:place + size]
    rows[group] = near(np.repeat(rows[group[:1]], size, axis=0))
    truth.add(frozenset(group.tolist()))
    place += size
  queries, of = unit(some(n // 10)), random.permutation(n)[:leaks]
  queries[:leaks] = near(rows[of])
  return rows.astype('f4'), queries.astype('f4'), truth, set(zip(range(leaks), of.tolist()))
