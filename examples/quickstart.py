"""The demo in Python: trains on the embedded digits, then finds the neighbors of a held-out one.

    python examples/quickstart.py [WORKDIR]        two minutes on two CPU cores
"""

import sys

import instdisc_jax
from instdisc_jax import cli, experiment


def main(workdir='runs/quickstart', overrides=()):
  config = cli.read_config('configs/digits.py', overrides)
  summary = experiment.run(config, workdir)
  print(f'kNN top-1 {summary["knn_top1"]:.3f}, raw pixels {summary["knn_top1_pixels"]:.3f}')

  model = instdisc_jax.load(workdir)
  held_out = model.dataset.test
  similarity, row = model.neighbors(held_out.full(0), k=5)
  labels = model.labels[row[0]]
  print(f'a held-out {held_out.labels[0]}: its nearest training digits are {labels.tolist()}, '
        f'with similarities {similarity[0].round(2)}')
  return summary, labels


if __name__ == '__main__':
  main(*sys.argv[1:2])
