"""kNN of the demo with each loss: the table of docs/results/measured.md.

    python benchmarks/demo_losses.py [--epochs=N] [--seed=S]

Trains configs/digits.py with the full softmax (alone, with two views, further positives and an MLP
head), NCE (alone, with the proximal term, and with other ways to choose Z), the sampled softmax and
the triplet loss, each from scratch; two to four minutes per row on two CPU cores. Writes
benchmarks/results/demo_losses.json.
"""

import argparse
import json
import pathlib
import tempfile

import common
from rich import console as rich_console
from rich import table as rich_table

from instdisc_jax import cli, experiment

ROOT = pathlib.Path(__file__).parents[1]
LOSSES = {
    'full softmax': [],
    'full softmax, two views': ['--config.loss.views=2'],
    'full softmax, 3 neighbors from epoch 50': ['--config.loss.neighbors=3',
                                                '--config.loss.neighbors_from_epoch=50'],
    'full softmax, MLP head': ['--config.model.head=mlp'],
    'full softmax, two views, MLP head': ['--config.loss.views=2', '--config.model.head=mlp'],
    'NCE, M = 512, Z = 30,000': ['--config.loss.name=nce'],
    'the same, proximal λ = 30': ['--config.loss.name=nce', '--config.loss.proximal_weight=30'],
    'sampled softmax, M = 512': ['--config.loss.name=sampled_softmax'],
    'NCE, Z of the first batch': ['--config.loss.name=nce', '--config.loss.normalizer=first_batch'],
    'NCE, Z averaged, decay 0.99': ['--config.loss.name=nce', '--config.loss.normalizer=ema'],
    'NCE, Z averaged, decay 0.9': ['--config.loss.name=nce', '--config.loss.normalizer=ema',
                                   '--config.loss.normalizer_decay=0.9'],
    'triplet, semi-hard': ['--config.loss.name=triplet'],
    'triplet, hardest': ['--config.loss.name=triplet', '--config.loss.mining=hardest'],
    'triplet, M = 512 sampled': ['--config.loss.name=triplet', '--config.loss.mining=sampled'],
}
KEPT = ('knn_top1', 'knn_top1_pooled', 'knn_top1_pixels', 'knn_top1_untrained', 'final_loss',
        'steps', 'images_per_second', 'wall_seconds')


def measure(overrides, epochs, seed):
  """Trains for one row of the table; returns what is kept of its summary."""
  config = cli.read_config(f'{ROOT}/configs/digits.py', [
      f'--config.seed={seed}', *([f'--config.epochs={epochs}'] if epochs else []), *overrides])
  config.loss.neighbors_from_epoch = min(config.loss.neighbors_from_epoch, config.epochs / 2)
  with tempfile.TemporaryDirectory() as folder:
    summary = experiment.run(config, f'{folder}/run')
  return {key: summary[key] for key in KEPT}


def report(rows, seed):
  table = rich_table.Table(title=f'kNN top-1 of the demo, seed {seed}')
  for title in ('loss', 'trained', 'before an MLP head', 'raw pixels', 'untrained', 'seconds'):
    table.add_column(title)
  for name, row in rows.items():
    table.add_row(name, *('–' if row[key] is None else f'{row[key]:.3f}' for key in KEPT[:4]),
                  f'{row["wall_seconds"]:.0f}')
  rich_console.Console().print(table)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--epochs', type=int, help='fewer than in the demo, to try the script')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--output', default=ROOT / 'benchmarks' / 'results' / 'demo_losses.json')
  args = parser.parse_args()
  output, rows = pathlib.Path(args.output), {}
  output.parent.mkdir(parents=True, exist_ok=True)
  for name, overrides in LOSSES.items():
    rows[name] = measure(overrides, args.epochs, args.seed)
    result = {'environment': common.environment(), 'epochs': args.epochs, 'seed': args.seed,
              'rows': rows}
    output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + '\n')
  report(rows, args.seed)
