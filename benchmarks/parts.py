"""The parts of a step that accelerator_model.py models, timed on this device.

    python benchmarks/parts.py [--batch=256 --rows=1281167 --queries=50000 --side=224]

Softmax and gradient by the kernel that a bfloat16 run takes here, NCE with 4,096 noise samples, max
pooling's gradient, augmentation, and the search of 200 neighbors. `modeled` is the time in
results/accelerator_model_after.json for an H100, if the sizes are those.
"""

import argparse
import json

import common
import jax
import jax.numpy as jnp

from instdisc_jax import augment as augment_lib
from instdisc_jax import bank as bank_lib
from instdisc_jax import cli, kernels, losses, neighbors
from instdisc_jax.models import pool

TEMPERATURE, NOISE, DIM = 0.07, 4096, 128


def calls(batch, num_rows, queries, side):
  """{part: (what exactly, () -> result)}."""
  device, keys = jax.devices()[0], jax.random.split(jax.random.key(0), 7)
  kernel = kernels.choose('auto', device, dim=DIM, bank_dtype=jnp.float32,
                          compute_dtype=jnp.bfloat16, largest_logit=bank_lib.LARGEST_NORM /
                          TEMPERATURE).name
  padded = -(-num_rows // kernels.row_multiple(kernel)) * kernels.row_multiple(kernel)
  bank = bank_lib.init(keys[0], padded, DIM, unit=True)
  features = bank_lib.normalize(jax.random.normal(keys[1], (batch, DIM)))
  index = jax.random.randint(keys[2], (batch,), 0, num_rows)
  noise = jax.random.randint(keys[3], (batch, NOISE), 0, num_rows)
  softmax = jax.jit(jax.value_and_grad(lambda f, bank: losses.softmax_loss(
      f, bank, index, temperature=TEMPERATURE, kernel=kernel,
      largest_norm=bank_lib.LARGEST_NORM).mean()))
  nce = jax.jit(jax.value_and_grad(lambda f, bank: losses.nce_loss(
      f, bank, index, noise, temperature=TEMPERATURE, normalizer=1e5).mean()))
  shape = (batch, side // 2, side // 2, 64)
  maps = jax.random.normal(keys[4], shape, jnp.bfloat16)
  gradient = jnp.ones((batch, side // 4, side // 4, 64), jnp.bfloat16)
  pooling = jax.jit(jax.grad(lambda x: jnp.sum(
      pool.max_pool(x, 3, 2, 1) * gradient, dtype=jnp.float32)))
  how = augment_lib.Augmentation.of(cli.read_config('configs/imagenet.py', []).augment)
  images = jax.random.randint(keys[5], (batch, side, side, 3), 0, 256, jnp.uint8)
  augment = jax.jit(lambda images: augment_lib.augment(
      jax.random.split(keys[6], batch), images, how, size=None, dtype=jnp.bfloat16))
  asked = bank_lib.normalize(jax.random.normal(keys[1], (queries, DIM)))
  nearest = lambda: neighbors.nearest(asked, bank, k=min(200, num_rows))
  return {'loss, softmax': (kernel, lambda: softmax(features, bank)),
          'loss, nce': (f'M = {NOISE:,}', lambda: nce(features, bank)),
          'pooling': ('gradient', lambda: pooling(maps)),
          'augmentation': ('without crops', lambda: augment(images)),
          'knn': (f'{queries:,} queries', nearest)}


def modeled():
  """{part: milliseconds} on an H100, as compiled."""
  file = common.ROOT / 'benchmarks' / 'results' / 'accelerator_model_after.json'
  found = {}
  for row in json.loads(file.read_text())['rows'] if file.exists() else ():
    if row['machine'] == 'h100:1' and row['part'] == 'loss':
      found['loss, ' + ('softmax' if row['config'].endswith('softmax') else 'nce')] = row['ms']
    elif row['machine'] == 'h100:1' and row['part'] == 'all' and row.get('program') != 'step':
      found[row.get('program')] = row['ms']
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, size in (('batch', 256), ('rows', 1_281_167), ('queries', 50_000), ('side', 224)):
    parser.add_argument(f'--{name}', type=int, default=size)
  parser.add_argument('--output')
  args = parser.parse_args()
  sizes = args.batch, args.rows, args.queries, args.side
  models = modeled() if sizes == (256, 1_281_167, 50_000, 224) else {}
  rows = [{'part': part, 'what': what, 'ms': common.seconds(call) * 1e3,
           'modeled ms, H100': models.get(part)} for part, (what, call) in calls(*sizes).items()]
  common.report('parts', f'B = {args.batch}, N = {args.rows:,}', rows, args.output,
                sizes=vars(args))


if __name__ == '__main__':
  main()
