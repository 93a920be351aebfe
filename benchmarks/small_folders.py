"""What `configs/folder.py` reaches on small folders, with nothing set but the folder and the seed.

    python benchmarks/small_folders.py --runs=runs/folders --folders clothes=PATH digits=PATH \
        [--seeds 0 1 2]

The sub-folders of each folder are its classes. Every run goes to its end, or is found there: the
command can be stopped and repeated. kNN top-1 of every image among all others, with each kind of
features.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import common
import numpy as np

sys.path.insert(0, str(common.ROOT))
from instdisc_jax import inference  # noqa: E402
from instdisc_jax.evaluation import knn  # noqa: E402
from instdisc_jax.search import neighbors  # noqa: E402

FEATURES = 'embedding', 'pooled', 'conv5', 'conv4', 'conv3'


def top1(workdir, features):
  """kNN top-1 of every training image among the others, from its central view."""
  model = inference.load(workdir, features)
  near = neighbors.search(model.fresh(model.dataset.train), None, model.config.knn.neighbors)
  scores = knn.vote(near.similarity, model.labels[near.row], model.config.knn.temperature,
                    int(model.labels.max()) + 1)
  return float(np.mean(np.argmax(scores, axis=1) == model.labels))


def measure(name, path, seed, runs):
  """Trains on a folder; returns what its run says, and kNN top-1 by features."""
  workdir = runs / f'{name}-{seed}'
  subprocess.run([sys.executable, '-m', 'instdisc_jax.main', '--config=configs/folder.py',
                  f'--workdir={workdir}', f'--config.dataset.name=folder:{path}',
                  f'--config.seed={seed}'], cwd=common.ROOT, check=True)
  summary = json.loads((workdir / 'summary.json').read_text())
  return {'folder': name, 'seed': seed, 'images': summary['num_rows'],
          'pixels': summary['knn_top1_pixels'], 'untrained': summary['knn_top1_untrained'],
          **{features: top1(workdir, features) for features in FEATURES},
          'agreement_untrained': summary['neighbor_agreement_untrained'],
          'agreement': summary['neighbor_agreement'], 'steps': summary['steps'],
          'seconds': summary['wall_seconds']}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--runs', required=True, type=pathlib.Path, help='where the runs are kept')
  parser.add_argument('--folders', nargs='+', required=True, metavar='NAME=PATH')
  parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
  args = parser.parse_args()
  folders = dict(item.split('=', 1) for item in args.folders)
  args.runs.mkdir(parents=True, exist_ok=True)
  rows = []
  for seed in args.seeds:
    for name, path in folders.items():
      rows.append(measure(name, path, seed, args.runs.resolve()))
      common.report('small_folders', 'kNN top-1 by defaults', rows)


if __name__ == '__main__':
  main()
