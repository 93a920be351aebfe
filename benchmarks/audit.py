"""Time and memory of `instdisc_jax.audit` against the number of images, and what it finds.

    python benchmarks/audit.py [--rows 10000 30000 100000]

Random unit vectors with 128 numbers, of 20 dimensions. About one in a hundred has near-duplicates,
in groups of 2 to 5 at cosines of about 0.99; a tenth as many again are queries, 50 of which repeat
a row. Each size in a process of its own.
"""

import resource
import sys
import time

import common

sys.path.insert(0, str(common.ROOT))
from tests import planted  # noqa: E402

LEAKS = 50


def measure(n):
  """Examines n rows in this process."""
  from instdisc_jax.search import audit
  rows, queries, groups, _ = planted.draw(n, n // 340, LEAKS, inner=20, dim=128)
  memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  before, start = memory(), time.perf_counter()
  found = audit.examine(rows, queries)
  seconds = time.perf_counter() - start
  given = {frozenset(group) for group in found.groups}
  named = {query for query, _, _ in found.leaks}  # of a group, any row may be the nearest
  return {'rows': n, 'seconds': seconds, 'MiB before': before, 'MiB at most': memory(),
          'threshold': found.threshold, 'groups': len(groups), 'found': len(given & groups),
          'false': len(given - groups), 'leaks': LEAKS,
          'leaks found': sum(query < LEAKS for query in named),
          'false leaks': sum(query >= LEAKS for query in named)}


def main():
  rows = common.each_alone(__doc__, 'rows', [10_000, 30_000, 100_000], measure)
  if rows is not None:
    common.report('audit', 'duplicates and leaks among random vectors', rows)


if __name__ == '__main__':
  main()
