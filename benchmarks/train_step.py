"""Images per second of the full training step, beside PyTorch.

    python benchmarks/train_step.py [--model=resnet18_cifar] [--width=64] [--batch=128] [--side=32]

`with augmentation` is the training step itself, from uint8 images on the device; `without` starts
from augmented images, as the PyTorch step (torch_baseline.py) does, and is what `ratio` compares:
our time over theirs. On a GPU both compute in bfloat16. Model FLOPs are XLA's own count for the
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
from instdisc_jax.data import feeds
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import step as step_lib


def set_up(args, **loss):
  """(setup, fresh state) of a run with these settings of its loss."""
  mesh = mesh_lib.make(jax.devices()[:1])
  config = config_lib.default()
  config.batch_size = args.batch
  config.model.update(name=args.model, width=args.width,
                      dtype='float32' if mesh_lib.on_cpu(mesh) else 'bfloat16')
  config.loss.update(loss)
  setup = state_lib.Setup.of(config, args.rows, mesh)
  return setup, state_lib.make_init(setup, (args.side, args.side))()


def resident(args, count):
  """The inputs of `count` steps: (images on the device, rows of each batch), count."""
  held = min(args.rows, 4096)  # the bank has as many rows as asked for
  images = jnp.zeros((held, args.side, args.side, 3), jnp.uint8)
  index = np.random.default_rng(0).integers(0, held, (count, args.batch))
  return (images, jnp.asarray(index, jnp.int32)), count


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
  parser.add_argument('--loss', default='softmax', choices=config_lib.LOSSES)
  parser.add_argument('--steps', type=int, default=0, help='per timing; default: 1 on CPU, else 50')
  parser.add_argument('--output')
  args = parser.parse_args()
  setup, state = set_up(args, name=args.loss, normalizer='ema')
  config, encoder, on_cpu = setup.config, setup.encoder, mesh_lib.on_cpu(setup.mesh)
  steps = args.steps or (1 if on_cpu else 50)
  per_dispatch = 1 if on_cpu else steps

  inputs = resident(args, per_dispatch)
  index = inputs[0][1]
  with_augmentation = rate(step_lib.over_mesh(setup, feeds.Resident),
                           jax.tree.map(jnp.copy, state), inputs, args.batch * per_dispatch,
                           max(1, steps // per_dispatch))

  augmented = jax.random.normal(jax.random.key(0), (args.batch, args.side, args.side, 3))

  def encode(params, batch_stats, images):
    features, updated = encoder.apply({'params': params, 'batch_stats': batch_stats}, images,
                                      train=True, mutable=['batch_stats'])
    return features, jax.lax.pmean(updated.get('batch_stats', {}), mesh_lib.AXIS)

  noise = None
  if config_lib.draws_noise(config.loss):
    noise = jax.random.randint(jax.random.key(1), (args.batch, config.loss.noise_count), 0,
                               args.rows)
  update = lambda state, images, index: step_lib.update(
      state, (images, index, noise), config=config, encode=encode, optimizer=setup.optimizer,
      num_rows=args.rows, axis_name=mesh_lib.AXIS, kernel=setup.kernel.name)
  sharded = P(mesh_lib.AXIS)
  bare = jax.jit(jax.shard_map(
      update, mesh=setup.mesh, in_specs=(state_lib.SPECS, sharded, sharded),
      out_specs=(state_lib.SPECS, P())), donate_argnums=0)
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
           'GFLOP per image': flops / 1e9, 'of the matmul rate': flops * without / matmul_rate}]
  common.report(f'train_step_{args.model}', f'training step, {args.loss}, N = {args.rows:,}', rows,
                args.output, loss=args.loss, dtype=str(config.model.dtype),
                matmul_gflops=matmul_rate / 1e9)


if __name__ == '__main__':
  main()
