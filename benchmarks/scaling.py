"""What travels between devices, counted from the compiled step, and what that means for a pod.

    python benchmarks/scaling.py [--chip=v5e]

First table: the step of a small encoder compiled for 1 to 8 virtual devices; numbers carried by all
its collectives, less the all-reduce of gradients and batch-norm statistics, against N, B and the
device count. Second table and benchmarks/results/scaling.png: a model, not a measurement, of the
time per step of ResNet-50 at 224 pixels with the exact softmax, for 4 to 4,096 chips:

    encoder   images per chip · 24.5 GFLOP / (peak · 0.4)
    bank      max(4·B·D·N/chips / (peak · 0.6),  2·N/chips·D·2 bytes / HBM)      bfloat16 rows
    traffic   (2·B·(D + 2) + 2·25.6e6 gradients) · 4 bytes / link  +  10 µs · log2(chips)

with 64 images per chip but at most 16,384 in the batch. The shares 0.4 and 0.6 are assumptions.
"""

import argparse
import math
import os

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'

import sys  # noqa: E402  (after XLA's flags are set)

import common  # noqa: E402
import jax  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

sys.path.insert(0, str(common.ROOT))
from tests import programs  # noqa: E402

# Peak bfloat16 FLOP/s, HBM bytes/s, link bytes/s of all of a chip's links: public data sheets.
CHIPS = {'v4': (275e12, 1.2e12, 300e9), 'v5e': (197e12, 0.82e12, 200e9),
         'v6e': (918e12, 1.64e12, 448e9), 'h100': (989e12, 3.35e12, 450e9)}
D, GFLOP, PARAMETERS = 128, 24.5, 25.6e6


def counted():
  """Rows of the first table."""
  rows = []
  for loss in ({'name': 'softmax'}, {'name': 'nce', 'noise_count': 512}):
    for devices, n, batch in ((1, 10_000, 64), (2, 10_000, 64), (4, 10_000, 64), (8, 10_000, 64),
                              (8, 100_000, 64), (8, 1_000_000, 64), (8, 10_000, 256)):
      run_steps, arguments, state = programs.step(
          loss, num_rows=n, num_devices=devices, batch_size=batch, dim=D)
      carried = programs.traffic(run_steps.lower(*arguments).compile(), state)
      rows.append({'loss': loss['name'], 'devices': devices, 'N': n, 'B': batch,
                   'numbers carried': carried, 'over B (D + 4)': carried / (batch * (D + 4))})
  return rows


def modelled(chip):
  """Rows of the second table, times in ms."""
  peak, memory, link = CHIPS[chip]
  rows = []
  for n in (1_281_167, 100_000_000, 1_000_000_000):
    for chips in (4, 16, 64, 256, 1024, 4096):
      batch = min(64 * chips, 16_384)
      encoder = batch / chips * GFLOP * 1e9 / (peak * 0.4)
      bank = max(4 * batch * D * n / chips / (peak * 0.6), 4 * n / chips * D / memory)
      traffic = (2 * batch * (D + 2) + 2 * PARAMETERS) * 4 / link + 1e-5 * math.log2(chips)
      total = encoder + bank + traffic
      rows.append({'N': n, 'chips': chips, 'B': batch, 'bank GB a chip': n / chips * D * 2 / 1e9,
                   'encoder ms': encoder * 1e3, 'bank ms': bank * 1e3, 'traffic ms': traffic * 1e3,
                   'step ms': total * 1e3, 'bank share': bank / total})
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--chip', choices=CHIPS, default='v5e')
  args = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', 8)
  common.report('scaling_traffic', 'numbers that travel in a step', counted())
  rows = modelled(args.chip)
  common.report('scaling_model', f'modelled, {args.chip}', rows, chip=args.chip)
  figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
  for n, style in ((1_281_167, '-'), (100_000_000, '--'), (1_000_000_000, ':')):
    chosen = [row for row in rows if row['N'] == n]
    for part, color in (('encoder ms', '#1f77b4'), ('bank ms', '#d62728'),
                        ('traffic ms', '#7f7f7f')):
      axes.plot([row['chips'] for row in chosen], [row[part] for row in chosen], style, color=color,
                label=f'{part[:-3]}, N = {n:.3g}' if part == 'bank ms' or n < 2e6 else None)
  axes.set(xscale='log', yscale='log', xlabel='chips', ylabel='ms a step',
           title=f'modelled step, ResNet-50, {args.chip}')
  axes.legend(fontsize=7)
  axes.grid(alpha=0.3)
  figure.savefig(common.ROOT / 'benchmarks' / 'results' / 'scaling.png', dpi=110)


if __name__ == '__main__':
  main()
