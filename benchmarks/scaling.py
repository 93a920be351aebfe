"""Communication, memory and time of the step, from compiled programs.

    python benchmarks/scaling.py

First table: the step of a small encoder compiled for 1 to 8 virtual devices; values carried by all
its collectives, less the all-reduce of gradients and batch-norm statistics, against N, B and the
device count. Second table, benchmarks/results/scaling_compiled.json and docs/scale.md: programs
compiled for 1 to 256 v5e chips and 1 to 8 H100s (needs the extras tpu-compiler and gpu-compiler),
beside a model of the time. Nothing is run. Takes about a quarter of an hour on two cores.
"""

import argparse
from concurrent import futures
import json
import os
import pathlib
import subprocess
import tempfile

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'

import sys  # noqa: E402  (after XLA's flags are set)

import common  # noqa: E402
import jax  # noqa: E402

sys.path.insert(0, str(common.ROOT))
from instdisc_jax.runtime import hardware  # noqa: E402
from tests import programs  # noqa: E402

# Peak bfloat16 FLOP/s and bytes/s of the memory.
CHIPS = {name: (chip.flops, chip.bandwidth) for name, chip in hardware.CHIPS.items()}
D, PARAMETERS = 128, 23.8e6
SIZES = (50_000, 1_281_167, 10_000_000, 100_000_000, 1_000_000_000)
MACHINES = {'v5e:1x1': 1, 'v5e:2x2': 4, 'v5e:4x4': 16, 'v5e:8x8': 64, 'v5e:16x16': 256,
            'h100:1': 1, 'h100:8': 8}
PER_DEVICE = 64  # images
RECIPE = 'configs/imagenet_tpu.py'
SMALL = {'model.name': 'resnet10_cifar', 'model.width': 1, 'augment.size': 8}

PAGE = """# Scale

Memory and time of a training step of ResNet-50 at 224 pixels with the exact softmax, a bank in
bfloat16, D = {D} and {PER_DEVICE} images per device, for N from 50,000 to 1,000,000,000. Compiled
for these devices by their real compilers, run on none of them: `python benchmarks/scaling.py`
writes this page, and [counts the communication](results/benchmarks.md#communication).

Each row is the sum of two compiled programs: the step with a tiny encoder for this N and these
devices, and the step with ResNet-50 for few rows ({encoders}).

* **memory**: what the compiler reserves on a device: arguments, results and temporary values;
* **compiled**: the roofline of the program, the larger of its FLOPs over the device's peak and its
  bytes over the memory's bandwidth, from the data sheets; communication is not in it;
* **modeled**: the softmax as the larger of 4·B·D·N/devices FLOP over peak, and two passes over its
  rows, 4·D·N/devices bytes, over bandwidth;
* **sent**: bytes that the collectives of the loss carry per device; gradients come on top
  ({gradients:.0f} MB in float32, `model.reduce_dtype=bfloat16` halves it).

"""

WHY = """
Where compiled and modeled differ by more than a fifth (marked *): the compiled softmax writes the
scores of a block to memory and reads them back, several times, which the model leaves out. On a TPU
the scores of few rows stay on the chip. Where a bank does not fit, nothing was compiled.

Each device has N / devices rows but all B queries. So with {PER_DEVICE} images per device the
softmax takes the same time on any number of devices, and its share of the step depends on N alone.
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


def compiled(topology, program='step', **settings):
  """A program of the recipe, as `instdisc_jax.compile` reports it; None if it does not fit."""
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / 'c.json'
    done = subprocess.run(
        [sys.executable, '-m', 'instdisc_jax.compile', f'--config={RECIPE}',
         f'--topology={topology}', f'--program={program}', f'--output={output}',
         *(f'--config.{key}={value}' for key, value in settings.items())],
        check=False, capture_output=True, text=True, cwd=common.ROOT,
        env={key: value for key, value in os.environ.items() if key != 'XLA_FLAGS'})
    if done.returncode not in (0, 1) or not output.exists():
      raise SystemExit(done.stderr)
    print(topology, settings, done.stdout.splitlines()[-1], flush=True)
    found = json.loads(output.read_text())
  return found['programs'][0] if found['fits'] else None


def row(topology, n, encoders):
  """A row of the second table."""
  chip, devices = CHIPS[topology.partition(':')[0]], MACHINES[topology]
  batch = PER_DEVICE * devices
  loss = compiled(topology, **SMALL, **{'batch_size': batch, 'dataset.name': f'fake:{n}'})
  rows = n / devices
  found = {'topology': topology, 'N': n, 'B': batch, 'bank GB': rows * D * 2 / 1e9,
           'modeled ms': 1e3 * max(4 * batch * D * rows / chip[0], 4 * D * rows / chip[1])}
  if loss is None:
    return found | dict.fromkeys(('memory GB', 'softmax ms', 'encoder ms', 'sent MB'))
  encoder = encoders[topology.partition(':')[0]]
  sent = sum(c['bytes'] for c in loss['collectives'])
  return found | {
      'memory GB': (loss['memory']['total'] + encoder['memory']['total']) / 1e9,
      'softmax ms': loss['roofline_seconds'] * 1e3,
      'encoder ms': encoder['roofline_seconds'] * 1e3, 'sent MB': sent / 1e6}


def page(rows, encoders):
  """The text of docs/scale.md."""
  text = PAGE.format(
      D=D, PER_DEVICE=PER_DEVICE, gradients=PARAMETERS * 4 / 1e6,
      encoders=', '.join(f'{e["topology"]}: {e["memory"]["total"] / 1e9:.2f} GB, '
                         f'{e["roofline_seconds"] * 1e3:.1f} ms' for e in encoders.values()))
  lines = ['| devices | N | B | bank, GB | memory, GB | encoder, ms | softmax, compiled, ms | '
           'softmax, modeled, ms | softmax, share | sent, MB |', '|---' * 10 + '|']
  for r in rows:
    head = f'| {r["topology"]} | {r["N"]:,} | {r["B"]:,} | {r["bank GB"]:.3g} | '
    if r['memory GB'] is None:
      lines.append(head + f'too large | – | – | {r["modeled ms"]:.3g} | – | – |')
      continue
    mark = '*' if abs(r['softmax ms'] / r['modeled ms'] - 1) > 0.2 else ''
    fits = r['memory GB'] * 1e9 <= hardware.CHIPS[r['topology'].partition(':')[0]].memory
    lines.append(
        head + f'{r["memory GB"]:.2f}{"" if fits else " (too large)"} | '
        f'{r["encoder ms"]:.1f} | {r["softmax ms"]:.3g}{mark} | '
        f'{r["modeled ms"]:.3g} | {r["softmax ms"] / (r["softmax ms"] + r["encoder ms"]):.1%} | '
        f'{r["sent MB"]:.2f} |')
  return text + '\n'.join(lines) + '\n' + WHY.format(PER_DEVICE=PER_DEVICE)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.parse_args()
  jax.config.update('jax_num_cpu_devices', 8)
  common.report('scaling_traffic', 'values communicated per step', counted())
  few = lambda devices: {'batch_size': PER_DEVICE * devices, 'dataset.name': 'fake:50000'}
  encoders = {'v5e': compiled('v5e:2x2', **few(4)), 'h100': compiled('h100:1', **few(1))}
  with futures.ThreadPoolExecutor(2) as pool:  # each compiler keeps one core busy
    rows = list(pool.map(lambda pair: row(*pair, encoders),
                         [(topology, n) for topology in MACHINES for n in SIZES]))
  common.report('scaling_compiled', 'compiled for, not run on', rows, encoders=encoders)
  (common.ROOT / 'docs' / 'scale.md').write_text(page(rows, encoders))


if __name__ == '__main__':
  main()
