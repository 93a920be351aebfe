"""Deviations of all values from those of the published implementation: writes docs/parity.md.

    python benchmarks/parity.py [--quick]

The golden values are those of tests/golden, the comparisons those of the tests (tests/parity.py).
--quick leaves out the slow comparisons: large inputs, and encoders in float64.
"""

import argparse
import os
import pathlib
import sys

import jax

jax.config.update('jax_num_cpu_devices', 8)
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests import parity  # noqa: E402  (after the number of devices is set)

HEAD = """# Parity with the published implementation

Every quantity of `tests/golden` (computed with the published PyTorch code, see its README), the
largest deviation of ours from it, and the tolerance stated in that README. Written by
`python benchmarks/parity.py` with JAX {jax}; `make test` and `make test-all` make the same
comparisons.

The published NCE loss adds 1e-7 to its denominators; ours needs no such term. Its exact effect,
Σ log(1 + 1e-7 / (P + M/N)) and the gradient of that sum, is added to ours before the comparison.
Deviations in float32 include the rounding of both sides. Not compared: PyTorch's
`num_batches_tracked`, a counter that nothing reads and this package does not keep, and `top5`, in
which the published code orders classes without votes arbitrarily (`top5_stable` and `top5_votes`
are compared).

| file | quantity | in | largest deviation | tolerance | measure |
|---|---|---|---|---|---|
"""


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--quick', action='store_true')
  parser.add_argument('--output', default=ROOT / 'docs' / 'parity.md', type=pathlib.Path)
  args = parser.parse_args()
  rows = {}
  for name, (compare, slow) in parity.CASES.items():
    if not (slow and args.quick):
      print(name, flush=True)
      for row in compare():  # a case with gradients repeats the one without
        rows[row.file, row.quantity, row.setting] = row
  lines = [f'| `{r.file}` | {r.quantity} | {r.setting} | {r.largest:.1e} | {r.tolerance:.0e} '
           f'| {r.measure} |' for _, r in sorted(rows.items())]
  args.output.parent.mkdir(parents=True, exist_ok=True)
  partial = args.output.with_suffix('.partial')
  partial.write_text(HEAD.format(jax=jax.__version__) + '\n'.join(lines) + '\n')
  os.replace(partial, args.output)
  too_far = [row for row in rows.values() if not row.largest <= row.tolerance]
  print(f'{len(rows)} quantities, {len(too_far)} beyond their tolerance: {args.output}')
  return 1 if too_far else 0


if __name__ == '__main__':
  sys.exit(main())
