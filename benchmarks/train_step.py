"""Images per second of the whole training step, beside PyTorch's.

    python benchmarks/train_step.py [--model=resnet18_cifar] [--width=64] [--batch=128] [--side=32]

`with augmentation` is the step as it trains, from uint8 images on the device; `without` takes
augmented images, as the PyTorch step (torch_baseline.py) does, and is what `ratio` compares: our
time over theirs. On a GPU both compute in bfloat16. Model FLOPs are XLA's own count for the
encoder, forward and backward; their rate is a share of the matmul rate measured in the same run.
"""

import argparse
import functools

import common
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import models, train


def set_up(args):
  """(config, encoder, optimizer, state, mesh)."""
  mesh = train.make_mesh(jax.devices()[:1])
  config = config_lib.default()
  config.batch_size = args.batch
  config.model.update(name=args.model, width=args.width,
                      dtype='float32' if train.on_cpu(mesh) else 'bfloat16')
  config.loss.update(name=args.loss, normalizer='ema')
  encoder = models.create(args.model, width=args.width, dtype=config.model.dtype)
  optimizer = train.make_optimizer(config, args.rows)
  state = train.make_init(config, encoder, optimizer, args.rows, (args.side, args.side, 3), mesh)()
  return config, encoder, optimizer, state, mesh


def rate(step, state, arguments, batch, steps):
  """Images per second of `step`, whose state is donated."""
  for _ in range(2):
    state, _ = step(state, *arguments)
  jax.block_until_ready(state)
  taken = common.seconds(functools.partial(_several, step, [state], arguments, steps), 3, 0)
  return steps * batch / taken


def _several(step, holder, arguments, steps):
  for _ in range(steps):
    holder[0], _ = step(holder[0], *arguments)
  return holder[0].step


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='resnet18_cifar')
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--side', type=int, default=32)
  parser.add_argument('--rows', type=int, default=50_000)
  parser.add_argument('--loss', default='softmax', choices=train.LOSS_NAMES)
  parser.add_argument('--steps', type=int, default=0, help='per timing; by default 1 on CPU, 50')
  parser.add_argument('--output')
  args = parser.parse_args()
  config, encoder, optimizer, state, mesh = set_up(args)
  steps = args.steps or (1 if train.on_cpu(mesh) else 50)
  per_dispatch = 1 if train.on_cpu(mesh) else steps
  kwargs = dict(config=config, encoder=encoder, optimizer=optimizer, num_rows=args.rows)

  held = min(args.rows, 4096)  # images on the device; rows of the bank are as many as asked for
  images = jnp.zeros((held, args.side, args.side, 3), jnp.uint8)
  index = jnp.asarray(np.random.default_rng(0).integers(0, held, (per_dispatch, args.batch)),
                      jnp.int32)
  whole_step = train.map_over_mesh(mesh, functools.partial(train.train_step, **kwargs))
  with_augmentation = rate(whole_step, jax.tree.map(jnp.copy, state),
                           (images, index, per_dispatch), args.batch * per_dispatch,
                           max(1, steps // per_dispatch))

  augmented = jax.random.normal(jax.random.key(0), (args.batch, args.side, args.side, 3))

  def encode(params, batch_stats, images):
    features, updated = encoder.apply({'params': params, 'batch_stats': batch_stats}, images,
                                      train=True, mutable=['batch_stats'])
    return features, jax.lax.pmean(updated['batch_stats'], train.AXIS)

  update = functools.partial(
      train.update, noise_index=None, encode=encode, optimizer=optimizer, loss=config.loss,
      bank_momentum=0.5, num_rows=args.rows, axis_name=train.AXIS)
  if args.loss != 'softmax':
    noise = jax.random.randint(jax.random.key(1), (args.batch, config.loss.noise_count), 0,
                               args.rows)
    update = functools.partial(update, noise_index=noise)
  bare = jax.jit(jax.shard_map(
      lambda state, images, index: update(state, images, index), mesh=mesh,
      in_specs=(train.STATE_SPECS, P(train.AXIS), P(train.AXIS)),
      out_specs=(train.STATE_SPECS, P())), donate_argnums=0)
  without = rate(bare, jax.tree.map(jnp.copy, state), (augmented, index[0]), args.batch, steps)

  encoder_step = jax.jit(jax.grad(lambda params: encoder.apply(
      {'params': params, 'batch_stats': state.batch_stats}, augmented, train=True,
      mutable=['batch_stats'])[0].sum()))
  cost = encoder_step.lower(state.params).compile().cost_analysis()
  flops = (cost[0] if isinstance(cost, list) else cost)['flops'] / args.batch
  matmul_rate, _ = common.limits()
  try:
    import torch_baseline
    theirs = torch_baseline.images_per_second(args.model, args.width, args.batch, args.side,
                                              args.rows, steps) if args.loss == 'softmax' else None
  except ImportError:
    theirs = None
  rows = [{'step': f'{args.model}, width {args.width}, B = {args.batch}, {args.side} px',
           'ratio': theirs and theirs / without, 'with augmentation, images/s': with_augmentation,
           'without, images/s': without, 'PyTorch, images/s': theirs,
           'GFLOP an image': flops / 1e9, 'of the matmul rate': flops * without / matmul_rate}]
  common.report(f'train_step_{args.model}', f'training step, {args.loss}, N = {args.rows:,}', rows,
                args.output, loss=args.loss, dtype=str(config.model.dtype),
                matmul_gflops=matmul_rate / 1e9)


if __name__ == '__main__':
  main()
