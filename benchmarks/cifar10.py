"""CIFAR-10 training from start to finish: kNN top-1 against wall time.

    python benchmarks/cifar10.py --data=tfds:cifar10 [--recipe=published] [--epochs=...]

Recipes: published (full softmax, 200 epochs), nce (4,096 noise samples), plus (flips, a cosine
schedule, two views), fast (configs/cifar10_fast.py). Seconds count from the start of the run,
compilation and evaluation included.
--data may be an arrays:FILE.npz, for machines without TFDS.
"""

import argparse
import tempfile

import common

from instdisc_jax import cli, experiment
from instdisc_jax.runtime import metrics

RECIPES = {'published': 'cifar10', 'nce': 'cifar10_nce', 'plus': 'cifar10_plus',
           'fast': 'cifar10_fast'}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', default='tfds:cifar10')
  parser.add_argument('--data_dir')
  parser.add_argument('--recipe', choices=RECIPES, default='published')
  parser.add_argument('--workdir', help='kept and resumed; default: a temporary folder')
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--epochs', type=int)
  parser.add_argument('--limit', type=int)
  parser.add_argument('--dtype', default=None)
  parser.add_argument('--output')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    workdir = args.workdir or f'{folder}/run'
    given = {'dataset.name': args.data, 'dataset.data_dir': args.data_dir, 'epochs': args.epochs,
             'dataset.limit': args.limit, 'model.dtype': args.dtype, 'model.width': args.width}
    config = cli.read_config(
        f'{common.ROOT}/configs/{RECIPES[args.recipe]}.py',
        [f'--config.{key}={value}' for key, value in given.items() if value is not None])
    summary = experiment.run(config, workdir)
    lines = metrics.read(workdir)
  seconds = {line['epoch']: line['wall_seconds'] for line in lines if 'wall_seconds' in line}
  curve = [{'epoch': line['epoch'], 'seconds': seconds.get(line['epoch']),
            'knn_top1': line['knn_top1']} for line in lines if 'knn_top1' in line]
  reached = next((point['seconds'] for point in curve if point['knn_top1'] >= 0.8), None)
  row = {'recipe': args.recipe, 'epochs': config.epochs, 'rows': summary['num_rows'],
         'kNN top-1': summary['knn_top1'],
         'best, against the bank': max(point['knn_top1'] for point in curve),
         'pixels': summary['knn_top1_pixels'],
         'untrained': summary['knn_top1_untrained'], 'last loss': summary['final_loss'],
         'images/s': summary['images_per_second'], 'seconds': summary['wall_seconds'],
         'seconds to 80%': reached}
  common.report(f'cifar10_{args.recipe}', f'CIFAR-10, {args.data}', [row], args.output, curve=curve)


if __name__ == '__main__':
  main()
