"""Exact search of the K nearest rows, beside PyTorch (mm and topk) and faiss.

    python benchmarks/knn.py [--queries=10000] [--rows=50000] [--k=200]

`ratio` is our time over theirs. The similarities found must agree to 1e-5.
"""

import argparse
import functools

import common
import jax
import numpy as np

from instdisc_jax import bank as bank_lib
from instdisc_jax import neighbors


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--queries', type=int, default=10_000)
  parser.add_argument('--rows', type=int, default=50_000)
  parser.add_argument('--dim', type=int, default=128)
  parser.add_argument('--k', type=int, default=200)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--output')
  args = parser.parse_args()
  keys = jax.random.split(jax.random.key(0))
  queries, bank = (bank_lib.normalize(jax.random.normal(key, (n, args.dim)))
                   for key, n in zip(keys, (args.queries, args.rows)))
  found = {}

  def ours():
    found['ours'] = neighbors.nearest(queries, bank, k=args.k)[0]
    return found['ours']

  others = {}
  try:
    import torch
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    q, b = (torch.from_numpy(np.array(x)).to(device) for x in (queries, bank))
    chunk = max(1, 2**25 // args.rows) if device == 'cpu' else max(1, 2**30 // args.rows)

    def by_torch(chunk):
      parts = [torch.topk(part @ b.T, args.k)[0] for part in q.split(chunk)]
      found['PyTorch'] = torch.cat(parts).cpu().numpy()

    others[f'PyTorch, mm and topk, {chunk} queries at once'] = functools.partial(by_torch, chunk)
  except ImportError:
    pass
  try:
    import faiss
    index = faiss.IndexFlatIP(args.dim)
    index.add(np.array(bank))

    def by_faiss():
      found['faiss'] = index.search(np.array(queries), args.k)[0]

    others['faiss IndexFlatIP'] = by_faiss
  except ImportError:
    pass

  flops_rate, _ = common.limits()
  products = 2 * args.queries * args.rows * args.dim / flops_rate
  taken = common.seconds(ours, args.repeats)
  rows = [{'search': 'ours', 'ratio': 1.0, 's': taken, 'queries/s': args.queries / taken,
           'products alone': products / taken, 'largest difference': 0.0}]
  for name, call in others.items():
    theirs = common.seconds(call, args.repeats)
    difference = float(np.abs(found[name.split(',')[0].split()[0]] - np.array(found['ours'])).max())
    assert difference < 1e-5, (name, difference)
    rows.append({'search': name, 'ratio': taken / theirs, 's': theirs,
                 'queries/s': args.queries / theirs, 'products alone': products / theirs,
                 'largest difference': difference})
  common.report('knn', f'{args.queries:,} queries x {args.rows:,} rows x {args.dim}, K = {args.k}',
                rows, args.output)


if __name__ == '__main__':
  main()
