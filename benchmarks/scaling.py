"""Communication between devices, counted in the compiled step, and what it means for a pod.

    python benchmarks/scaling.py [--chip=v5e]

First table: the step of a small encoder compiled for 1 to 8 virtual devices; values carried by all
its collectives, less the all-reduce of gradients and batch-norm statistics, against N, B and the
device count. Second table, benchmarks/results/scaling.png and docs/scale.md: a model, not a
measurement, of the time per step of ResNet-50 at 224 pixels, for 1 to 4,096 chips.
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

# Peak bfloat16 FLOP/s, HBM bytes/s, bytes/s of all links of a chip, bytes of HBM; from the public
# data sheets.
CHIPS = {'v4': (275e12, 1.2e12, 300e9, 32e9), 'v5e': (197e12, 0.82e12, 200e9, 16e9),
         'v6e': (918e12, 1.64e12, 448e9, 32e9), 'h100': (989e12, 3.35e12, 450e9, 80e9)}
D, M, GFLOP, PARAMETERS = 128, 4096, 24.5, 25.6e6
SIZES = (50_000, 1_281_167, 10_000_000, 100_000_000, 1_000_000_000)
COUNTS = (1, 4, 16, 64, 256, 1024, 4096)
LOSSES = ('softmax', 'NCE', 'NCE, shared noise')

PAGE = """# Scale

Memory and time per step for N from 50,000 to 1,000,000,000 images on 1 to 4,096 {chip} chips,
ResNet-50 at 224 pixels. A model, not a measurement: `python benchmarks/scaling.py` writes this
page. The same script [counts the communication](results/benchmarks.md#communication) in compiled
programs.

Per step and chip, with D = {D}, M = {M:,}, {memory:.0f} GB/s of HBM bandwidth, a peak of
{peak:.0f} TFLOP/s and a bank in bfloat16 (float32 takes twice the memory):

| part | time |
|---|---|
| encoder | B / chips · {GFLOP} GFLOP / (0.4 · peak) |
| softmax | the larger of 4·B·D·N/chips FLOP / (0.6 · peak), and 4·D·N/chips bytes / HBM |
| NCE, sampled softmax | as the softmax if N / chips is below B·M, else 4·B·M·D bytes / HBM |
| the same with `loss.shared_noise` | as a softmax over M rows |
| communication | {communication} |

64 images per chip, but at most 16,384 in the batch. The shares 0.4 and 0.6 are assumptions. The
communication does not depend on N: rows of the bank are never sent.
"""

WHERE = f"""## Limits of each loss

* **The exact softmax** costs B·N / chips, the encoder B / chips: its share of the step depends only
  on N, not on the number of chips (on one chip it is bound by memory, and its share is larger).
* **NCE and the sampled softmax with separate noise for each image** cost as much as the softmax
  unless the B·M rows drawn are fewer than the rows on a chip: on many chips the softmax is as fast,
  and exact. They also hold B·N/chips scores, or B·M·D gathered values, at once, which does not fit
  for large batches.
* **With shared noise** they cost next to nothing at any N, but their gradient varies more.
* **Memory** limits all of them: a row takes {2 * D} bytes.
"""


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
                   'values carried': carried, 'over B (D + 4)': carried / (batch * (D + 4))})
  return rows


def bank_seconds(loss, n, chips, batch, chip):
  """Time of a loss and its gradient on a chip's rows, of bfloat16.

  The softmax multiplies all its N / chips rows by all queries, twice. So does NCE, unless those are
  more than the B·M rows drawn, which are then gathered, twice. Shared noise is M rows altogether.
  """
  peak, memory, *_ = CHIPS[chip]
  rows = n / chips
  product = lambda rows: max(4 * batch * D * rows / (peak * 0.6), 2 * rows * D * 2 / memory)
  if loss == 'softmax' or (loss == 'NCE' and batch * M > rows):
    return product(rows)
  return 2 * batch * M * D * 2 / memory if loss == 'NCE' else product(M)


def modeled(chip):
  """Rows of the second table, times in ms."""
  peak, _, link, capacity = CHIPS[chip]
  rows = []
  for n in SIZES:
    for chips in COUNTS:
      batch = min(64 * chips, 16_384)
      encoder = batch / chips * GFLOP * 1e9 / (peak * 0.4)
      communication = 0.0
      if chips > 1:
        communication = (2 * batch * (D + 2) + 2 * PARAMETERS) * 4 / link + 1e-5 * math.log2(chips)
      held = n / chips * D * 2
      row = {'N': n, 'chips': chips, 'B': batch, 'bank GB per chip': held / 1e9,
             'fits': held < capacity / 2, 'encoder ms': encoder * 1e3,
             'communication ms': communication * 1e3}
      row |= {f'{loss} ms': bank_seconds(loss, n, chips, batch, chip) * 1e3 for loss in LOSSES}
      rows.append(row | {'softmax share': row['softmax ms'] / (
          row['softmax ms'] + row['encoder ms'] + row['communication ms'])})
  return rows


def limits(chip):
  """For each number of chips, the N at which each loss reaches its limit."""
  peak, memory, _, capacity = CHIPS[chip]
  rows = []
  for chips in COUNTS:
    batch = min(64 * chips, 16_384)
    encoder = batch / chips * GFLOP * 1e9 / (peak * 0.4)
    row_seconds = max(4 * batch * D / (peak * 0.6), 4 * D / memory) / chips  # of the softmax
    gather = bank_seconds('NCE', math.inf, chips, batch, chip)
    rows.append({'chips': chips, 'B': batch, 'tenth': 0.1 * encoder / row_seconds,
                 'equal': encoder / row_seconds,
                 'NCE cheaper': max(gather / row_seconds, batch * M * chips),
                 'full': capacity / 2 / (2 * D) * chips})
  return rows


def page(chip, rows, ends):
  """The text of docs/scale.md."""
  peak, memory, link, _ = CHIPS[chip]
  short = lambda n: f'{n:.1e}'.replace('e+0', 'e').replace('e+', 'e')
  communication = (f'(2·B·(D + 2) + 2 · 25.6e6 gradients) · 4 bytes / {link / 1e9:.0f} GB/s + '
                   '10 µs · log2(chips)')
  head = PAGE.format(chip=chip, peak=peak / 1e12, memory=memory / 1e9, communication=communication,
                     D=D, M=M, GFLOP=GFLOP)
  lines = ['| N | chips | B | bank, GB per chip | encoder, ms | communication, ms | '
           + ' | '.join(f'{loss}, ms' for loss in LOSSES) + ' | softmax, share of its step |',
           '|---' * (7 + len(LOSSES)) + '|']
  for row in rows:
    held = f'{row["bank GB per chip"]:.3g}' + ('' if row['fits'] else ' (too large)')
    lines.append(
        f'| {row["N"]:,} | {row["chips"]:,} | {row["B"]:,} | {held} | {row["encoder ms"]:.1f} | '
        f'{row["communication ms"]:.2f} | '
        + ' | '.join(f'{row[f"{loss} ms"]:.3g}' for loss in LOSSES)
        + f' | {row["softmax share"]:.1%} |')
  table = ['| chips | B | softmax: a tenth of the encoder at N = | equal to the encoder at N = | '
           'NCE is cheaper from N = | the bank fills half of the memory at N = |', '|---' * 6 + '|']
  table += [f'| {row["chips"]:,} | {row["B"]:,} | '
            + ' | '.join(short(row[key]) for key in ('tenth', 'equal', 'NCE cheaper', 'full'))
            + ' |' for row in ends]
  return f'{head}\n' + '\n'.join(lines) + '\n\n' + WHERE + '\n' + '\n'.join(table) + '\n'


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--chip', choices=CHIPS, default='v5e')
  args = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', 8)
  common.report('scaling_traffic', 'values communicated per step', counted())
  rows = modeled(args.chip)
  common.report('scaling_model', f'modeled, {args.chip}', rows, chip=args.chip)
  figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
  for n, style in ((1_281_167, '-'), (100_000_000, '--'), (1_000_000_000, ':')):
    chosen = [row for row in rows if row['N'] == n and row['chips'] > 1]
    for part, color in (('encoder ms', '#1f77b4'), ('softmax ms', '#d62728'),
                        ('communication ms', '#7f7f7f')):
      axes.plot([row['chips'] for row in chosen], [row[part] for row in chosen], style, color=color,
                label=f'{part[:-3]}, N = {n:.3g}' if part == 'softmax ms' or n < 2e6 else None)
  axes.set(xscale='log', yscale='log', xlabel='chips', ylabel='ms per step',
           title=f'modeled step, ResNet-50, {args.chip}')
  axes.legend(fontsize=7)
  axes.grid(alpha=0.3)
  figure.savefig(common.ROOT / 'benchmarks' / 'results' / 'scaling.png', dpi=110)
  (common.ROOT / 'docs' / 'scale.md').write_text(page(args.chip, rows, limits(args.chip)))


if __name__ == '__main__':
  main()
