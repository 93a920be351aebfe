"""Time and memory of `instdisc_jax.audit` against the number of images, and what it finds.

    python benchmarks/audit.py [--rows 10000 30000 100000]

Random unit vectors with 128 numbers, of 20 dimensions. One in a hundred has near-duplicates, in
groups of 2 to 5 at cosines of about 0.99; a tenth as many again are queries, 50 of which repeat a
row. Each size in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))

DIM, INNER, NOISE, LEAKS = 128, 20, 0.1, 50


def planted(n, seed=0):
  """(rows, queries, {groups}, {(query, row)})."""
  random = np.random.default_rng(seed)
  unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
  turn = random.standard_normal((INNER, DIM))
  draw = lambda count: unit(random.standard_normal((count, INNER)) @ turn)
  near = lambda x: unit(x + NOISE * unit(random.standard_normal(x.shape)))
  rows, order, groups, place = draw(n), random.permutation(n), set(), 0
  while place < n // 100:
    group = order[place:place + random.integers(2, 6)]
    rows[group] = near(np.repeat(rows[group[:1]], len(group), axis=0))
    groups.add(frozenset(group.tolist()))
    place += len(group)
  queries, of = draw(n // 10), random.permutation(n)[:LEAKS]
  queries[:LEAKS] = near(rows[of])
  return rows, queries, groups, set(zip(range(LEAKS), of.tolist()))


def measure(n):
  """Examines n rows in this process."""
  from instdisc_jax.search import audit
  rows, queries, groups, leaks = planted(n)
  memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  before, start = memory(), time.perf_counter()
  found = audit.examine(rows, queries)
  seconds = time.perf_counter() - start
  named = {(query, row) for query, row, _ in found.leaks}
  given = {frozenset(group) for group in found.groups}
  # A copy of a copy is as near as the planted one: of a leaked group, any image may be named.
  return {'rows': n, 'seconds': seconds, 'MiB before': before, 'MiB at most': memory(),
          'threshold': found.threshold, 'groups': len(groups), 'found': len(given & groups),
          'false': len(given - groups), 'leaks': len(leaks),
          'leaks found': len({query for query, _ in named} & {query for query, _ in leaks}),
          'false leaks': sum(query >= LEAKS for query, _ in named)}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rows', nargs='+', type=int, default=[10_000, 30_000, 100_000])
  parser.add_argument('--alone', type=int, help='measure one size in this process')
  args = parser.parse_args()
  if args.alone:
    print(json.dumps(measure(args.alone)))
    return
  rows = []
  for n in args.rows:
    done = subprocess.run([sys.executable, __file__, f'--alone={n}'], check=True,
                          capture_output=True, text=True)
    rows.append(json.loads(done.stdout.splitlines()[-1]))
  common.report('audit', 'duplicates and leaks among random vectors', rows)


if __name__ == '__main__':
  main()
