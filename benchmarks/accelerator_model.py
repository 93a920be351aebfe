"""The step compiled for GPUs and TPUs that are not here: what each of its parts costs, modeled.

    python benchmarks/accelerator_model.py [--checkout=DIR --name=before] [--machines h100:1 ...]

Compiles the training step of the configs by the real compilers (the extras tpu-compiler and
gpu-compiler), reads the programs' kernels, and writes for each part (convolutions, batch norm,
loss, pooling, augmentation, collectives, the rest) its FLOPs, bytes through memory, time and share.

The time of a kernel is the compiler's own estimate where there is one (cycles, v5e only), else the
larger of its FLOPs at 60% of the peak and its bytes at 88% of the bandwidth. Collectives count by
the bytes that they move through memory, not by the links. **Compiled for, run on none of them.**

`--checkout` compiles another version of the package, for a comparison; `--name` is that of the file
in benchmarks/results. About a minute a program.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import common

CASES = {  # (machine, config): settings
    ('h100:1', 'imagenet.py:softmax'): {'model.dtype': 'bfloat16', 'bank.dtype': 'float32'},
    ('h100:1', 'imagenet.py'): {'model.dtype': 'bfloat16', 'bank.dtype': 'float32'},
    ('h100:8', 'imagenet.py:softmax'): {'model.dtype': 'bfloat16', 'batch_size': 2048},
    ('v5e:1x1', 'imagenet.py:softmax'): {'model.dtype': 'bfloat16', 'bank.dtype': 'bfloat16'},
    ('v5e:2x4', 'imagenet.py:softmax'): {'model.dtype': 'bfloat16', 'bank.dtype': 'bfloat16',
                                         'batch_size': 2048},
    ('v6e:2x4', 'imagenet.py:softmax'): {'model.dtype': 'bfloat16', 'bank.dtype': 'bfloat16',
                                         'batch_size': 2048},
}
GHZ = {'v5e': 1.5}
COMPUTE, MEMORY = 0.6, 0.88  # shares of peak and bandwidth that kernels reach

# Run by the other version's package, too: lowers a config's step and writes the compiled program.
COMPILE = """
import sys
config, topology, output, *overrides = sys.argv[1:]
from instdisc_jax import cli, programs
from instdisc_jax.runtime import hardware
config = cli.read_config(config, [f'--config.{override}' for override in overrides])
run = programs.Run(config, *hardware.absent(topology))
function, arguments = run._make['step']()
open(output, 'w').write(function.lower(*arguments).compile().as_text())
"""


def part(kernel):
  """The part of the step that a kernel belongs to, by the code that it comes from."""
  source = kernel.source
  if re.search(r'all-reduce|all-gather|reduce-scatter|all-to-all|collective', kernel.opcode):
    return 'collectives'
  if re.search(r'softmax_loss|nce_loss|estimate_normalizer|proximal|/loss/', source):
    return 'loss'
  if re.search(r'ResNet|VGG|AlexNet', source):
    if 'pool' in source or re.search(r'select_and_scatter|reduce_window', source):
      return 'max pooling'
    if kernel.flops or 'conv_general_dilated' in source:
      return 'convolutions'
    return 'batch norm, activations'
  if 'augmentation' in source:
    return 'augmentation'
  return 'update' if '/update/' in source else 'the rest'


def seconds(kernel, chip, name):
  """The modeled time of a kernel."""
  if kernel.cycles is not None and name in GHZ:
    return kernel.cycles / GHZ[name] / 1e9
  products = sum(count * chip.products(precision) for precision, count in kernel.flops.items())
  return max(products / chip.flops / COMPUTE, kernel.bytes / chip.bandwidth / MEMORY)


def measure(checkout, machine, config, settings):
  """Rows, one a part."""
  from instdisc_jax.runtime import hardware, hlo
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / 'hlo.txt'
    path = os.pathsep.join([str(checkout), os.environ.get('PYTHONPATH', '')])
    subprocess.run(
        [sys.executable, '-c', COMPILE, f'configs/{config}', machine, str(output),
         'dataset.name=fake:1281167', *(f'{key}={value}' for key, value in settings.items())],
        check=True, cwd=checkout, env=os.environ | {'PYTHONPATH': path})
    kernels = hlo.kernels(output.read_text())
  name = machine.partition(':')[0]
  chip = hardware.CHIPS[name]
  rows = {}
  for kernel in kernels:
    row = rows.setdefault(part(kernel), {'GFLOP': 0.0, 'GB': 0.0, 'ms': 0.0})
    row['GFLOP'] += sum(kernel.flops.values()) / 1e9
    row['GB'] += kernel.bytes / 1e9
    row['ms'] += seconds(kernel, chip, name) * 1e3
  total = sum(row['ms'] for row in rows.values())
  head = {'machine': machine, 'config': config, 'settings': ' '.join(
      f'{key}={value}' for key, value in settings.items())}
  found = [head | {'part': name} | row | {'share': row['ms'] / total}
           for name, row in sorted(rows.items(), key=lambda item: -item[1]['ms'])]
  return [*found, head | {'part': 'all', 'GFLOP': sum(row['GFLOP'] for row in rows.values()),
                          'GB': sum(row['GB'] for row in rows.values()), 'ms': total, 'share': 1.0}]


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkout', default=str(common.ROOT), help='the version to compile')
  parser.add_argument('--name', default='after', help='of the result')
  parser.add_argument('--machines', nargs='+', default=sorted({m for m, _ in CASES}))
  args = parser.parse_args()
  sys.path.insert(0, str(common.ROOT))
  git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=args.checkout, capture_output=True,
                       text=True, check=True)
  rows = []
  for (machine, config), settings in CASES.items():
    if machine in args.machines:
      rows += measure(args.checkout, machine, config, settings)
      print(json.dumps(rows[-1]), flush=True)
  common.report(f'accelerator_model_{args.name}', 'compiled for, not run on', rows,
                compiled_commit=git.stdout.strip())


if __name__ == '__main__':
  main()
