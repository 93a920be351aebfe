"""Programs compiled for GPUs and TPUs that are not here: what each of their parts costs, modeled.

    python benchmarks/accelerator_model.py [--checkout=DIR --name=before] [--machines h100:1 ...]

Compiles the training step of the configs, the search of 200 neighbors for 50,000 queries, and, each
for itself, the loss behind a tiny encoder, max pooling and augmentation, by the real compilers (the
extras tpu-compiler and gpu-compiler); reads the programs' kernels, and writes for each part
(convolutions, batch norm, loss, pooling, augmentation, collectives, the rest) its FLOPs, bytes
through memory, time and share.

The time of a kernel is the compiler's own estimate where there is one (cycles, v5e only), else the
larger of its FLOPs at 60% of the peak and its bytes at 88% of the bandwidth. Collectives count by
the bytes that they move through memory, not by the links. **Compiled for, run on none of them.**

`--checkout` compiles another version of the package, for a comparison; `--name` is that of the file
in benchmarks/results. A step of ResNet-50 takes up to six minutes for TPUs, all others one or less.
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

ROWS = 1_281_167
_HALF = {'model.dtype': 'bfloat16', 'bank.dtype': 'bfloat16'}
_SINGLE = {'model.dtype': 'bfloat16', 'bank.dtype': 'float32'}
_TINY = {'model.name': 'resnet10_cifar', 'model.width': 1, 'augment.size': 8}
SOFTMAX, NCE = 'imagenet.py:softmax', 'imagenet.py'
CASES = (  # machine, program, config, settings
    ('h100:1', 'step', SOFTMAX, _SINGLE),
    ('h100:1', 'step', NCE, _SINGLE),
    ('h100:1', 'pooling', SOFTMAX, {}),
    ('h100:1', 'augmentation', SOFTMAX, {}),
    ('h100:1', 'knn', SOFTMAX, {}),
    ('h100:8', 'step', SOFTMAX, {'model.dtype': 'bfloat16', 'batch_size': 2048}),
    ('v5e:1x1', 'loss', SOFTMAX, _TINY | _HALF),
    ('v5e:1x1', 'loss', SOFTMAX, _TINY | _SINGLE),
    ('v5e:2x2', 'loss', SOFTMAX, _TINY | _HALF),
    ('v5e:2x2', 'loss', SOFTMAX, _TINY | _HALF | {'batch_size': 4096}),
    ('v5e:2x2', 'loss', NCE, _TINY | _HALF),
    ('v5e:2x2', 'knn', SOFTMAX, {}),
    ('v5e:1x1', 'step', SOFTMAX, _HALF),
    ('v5e:2x4', 'step', SOFTMAX, _HALF | {'batch_size': 2048}),
    ('v6e:2x4', 'step', SOFTMAX, _HALF | {'batch_size': 2048}),
)
GHZ = {'v5e': 1.5}
COMPUTE, MEMORY = 0.6, 0.88  # shares of peak and bandwidth that kernels reach

# Run by the other version's package, too: lowers one program and writes what is compiled.
COMPILE = """
import sys
name, config, topology, output, *overrides = sys.argv[1:]
from instdisc_jax import augment, cli, programs
from instdisc_jax.runtime import hardware
import jax
import jax.numpy as jnp
try:
  from instdisc_jax.models.pool import max_pool
except ImportError:
  from instdisc_jax.models.layers import max_pool
config = cli.read_config(config, [f'--config.{override}' for override in overrides])
devices, chip = hardware.absent(topology)
one = jax.sharding.SingleDeviceSharding(devices[0])
array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
batch, side = config.batch_size, config.augment.size
match name:
  case 'pooling':
    pool = jax.grad(lambda x, up: jnp.sum(max_pool(x, 3, 2, 1) * up, dtype=jnp.float32))
    shapes = (batch, side // 2, side // 2, 64), (batch, side // 4, side // 4, 64)
    lowered = jax.jit(pool).lower(*(array(*shape, dtype=jnp.bfloat16) for shape in shapes))
  case 'augmentation':
    view = lambda seed, images: augment.augment(
        jax.random.split(jax.random.key(seed), batch), images,
        augment.Augmentation.of(config.augment), size=None, dtype=jnp.bfloat16)
    lowered = jax.jit(view).lower(array(dtype=jnp.int32),
                                  array(batch, side, side, 3, dtype=jnp.uint8))
  case _:
    function, arguments = programs.Run(config, devices, chip)._make[name]()
    lowered = function.lower(*arguments)
open(output, 'w').write(lowered.compile().as_text())
"""


def part(kernel, program):
  """The part of the program that a kernel belongs to, by the code that it comes from."""
  source = kernel.source
  if re.search(r'all-reduce|all-gather|reduce-scatter|all-to-all|collective', kernel.opcode):
    return 'collectives'
  if program in ('pooling', 'augmentation'):
    return program
  if program == 'knn':
    return 'scores' if kernel.flops else 'selection'
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


def measure(checkout, machine, program, config, settings):
  """Rows, one a part."""
  from instdisc_jax.runtime import hardware, hlo
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / 'hlo.txt'
    path = os.pathsep.join([str(checkout), os.environ.get('PYTHONPATH', '')])
    subprocess.run(
        [sys.executable, '-c', COMPILE, 'step' if program == 'loss' else program,
         f'configs/{config}', machine, str(output), f'dataset.name=fake:{ROWS}',
         *(f'{key}={value}' for key, value in settings.items())],
        check=True, cwd=checkout, env=os.environ | {'PYTHONPATH': path})
    kernels = hlo.kernels(output.read_text())
  name = machine.partition(':')[0]
  chip = hardware.CHIPS[name]
  rows = {}
  for kernel in kernels:
    row = rows.setdefault(part(kernel, program), {'GFLOP': 0.0, 'GB': 0.0, 'ms': 0.0})
    row['GFLOP'] += sum(kernel.flops.values()) / 1e9
    row['GB'] += kernel.bytes / 1e9
    row['ms'] += seconds(kernel, chip, name) * 1e3
  if program == 'loss':  # of a step, whose encoder is nobody's
    rows = {'loss': rows['loss']}
  total = sum(row['ms'] for row in rows.values())
  head = {'machine': machine, 'program': program, 'config': config, 'settings': ' '.join(
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
  parser.add_argument('--machines', nargs='+', default=sorted({case[0] for case in CASES}))
  args = parser.parse_args()
  sys.path.insert(0, str(common.ROOT))
  git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=args.checkout, capture_output=True,
                       text=True, check=True)
  rows = []
  for machine, *case in CASES:
    if machine in args.machines:
      rows += measure(args.checkout, machine, *case)
      print(json.dumps(rows[-1]), flush=True)
  common.report(f'accelerator_model_{args.name}', 'compiled for, not run on', rows,
                compiled_commit=git.stdout.strip())


if __name__ == '__main__':
  main()
