"""Loss and gradient over the full bank, beside PyTorch and the machine's limit.

    python benchmarks/loss_step.py [--rows 50000 200000] [--noise=4096] [--bank=bfloat16]

For each N: the exact softmax, NCE with each image's own noise and with shared noise, and the
sampled softmax. `ratio` is our time over PyTorch's (dense softmax; NCE by gathering B·M rows, as
published) if PyTorch is installed. `of the limit` is the least time that the counted bytes and
FLOPs need at the rates measured in the same run, over the time taken.
"""

import argparse

import common
import jax
import jax.numpy as jnp
import numpy as np

from instdisc_jax import bank as bank_lib
from instdisc_jax import losses

TEMPERATURE = 0.07


def jax_losses(features, bank, index, noise_index):
  """Name -> compiled function that returns (losses, gradient)."""
  shared = noise_index[0]
  arguments = {
      'softmax': (losses.softmax_loss, (), {}),
      'nce': (losses.nce_loss, (noise_index,), {'normalizer': 1e5}),
      'nce, shared noise': (losses.nce_loss, (shared,), {'normalizer': 1e5}),
      'sampled softmax': (losses.sampled_softmax_loss, (noise_index,), {}),
  }
  calls = {}
  for name, (loss, noise, extra) in arguments.items():
    def step(features, bank, *columns, loss=loss, extra=extra):
      return jax.value_and_grad(lambda f: loss(
          f, bank, *columns, temperature=TEMPERATURE, **extra).mean())(features)
    compiled = jax.jit(step).lower(features, bank, index, *noise).compile()
    calls[name] = lambda compiled=compiled, noise=noise: compiled(features, bank, index, *noise)
  return calls


def torch_losses(features, bank, index, noise_index):
  """The same with PyTorch's autograd, dense or by gathering; {} if it is not installed."""
  try:
    import torch
  except ImportError:
    return {}
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  tensor = lambda x: torch.from_numpy(np.array(x)).to(device)
  x, bank = tensor(features).requires_grad_(), tensor(bank)
  index = tensor(index).long()
  columns = torch.cat([index[:, None], tensor(noise_index).long()], 1)
  share = noise_index.shape[1] / len(bank)

  def wait(value):
    if device == 'cuda':
      torch.cuda.synchronize()
    return value

  def gathered():
    rows = bank[columns.view(-1)].view(*columns.shape, -1)
    return torch.bmm(rows, x[:, :, None])[:, :, 0] / TEMPERATURE

  def softmax():
    loss = torch.nn.functional.cross_entropy(x @ bank.T / TEMPERATURE, index)
    return wait(torch.autograd.grad(loss, x)[0])

  def nce():
    prob = gathered().exp() / 1e5
    loss = -torch.log(prob[:, 0] / (prob[:, 0] + share)).sum() - torch.log(
        share / (prob[:, 1:] + share)).sum()
    return wait(torch.autograd.grad(loss / len(x), x)[0])

  def sampled():
    loss = torch.nn.functional.cross_entropy(gathered(), torch.zeros_like(index))
    return wait(torch.autograd.grad(loss, x)[0])

  return {'softmax': softmax, 'nce': nce, 'sampled softmax': sampled}


def counted(name, batch, rows, dim, noise, itemsize):
  """(FLOPs, bytes of the bank) that loss and gradient need: scores, and a weighted sum of rows."""
  if name == 'nce, shared noise':
    scored, read = noise, noise
  elif name != 'softmax' and batch * noise <= rows:
    scored, read = noise, batch * noise
  else:
    scored, read = rows, rows
  return 4 * batch * scored * dim, read * dim * itemsize


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rows', type=int, nargs='+', default=[50_000, 200_000, 1_281_167])
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--dim', type=int, default=128)
  parser.add_argument('--noise', type=int, default=4096)
  parser.add_argument('--bank', choices=['float32', 'bfloat16'], default='float32')
  parser.add_argument('--output')
  args = parser.parse_args()
  flops_rate, copy_rate = common.limits()
  rows = []
  for num_rows in args.rows:
    keys = jax.random.split(jax.random.key(0), 4)
    bank = bank_lib.init(keys[0], num_rows, args.dim, unit=True, dtype=args.bank)
    features = bank_lib.normalize(jax.random.normal(keys[1], (args.batch, args.dim)))
    index = jax.random.randint(keys[2], (args.batch,), 0, num_rows)
    noise_index = jax.random.randint(keys[3], (args.batch, args.noise), 0, num_rows)
    twins = {} if args.bank != 'float32' else torch_losses(features, bank, index, noise_index)
    for name, call in jax_losses(features, bank, index, noise_index).items():
      taken = common.seconds(call)
      theirs = common.seconds(twins[name], 3) if name in twins else None
      flops, read = counted(name, args.batch, num_rows, args.dim, args.noise,
                            jnp.dtype(args.bank).itemsize)
      rows.append({
          'loss': name, 'N': num_rows, 'ratio': theirs and taken / theirs, 'ms': taken * 1e3,
          'PyTorch ms': theirs and theirs * 1e3, 'GFLOP': flops / 1e9, 'MB': read / 1e6,
          'of the limit': max(flops / flops_rate, read / copy_rate) / taken})
      del theirs
  common.report('loss_step' + ('_bfloat16' if args.bank == 'bfloat16' else ''),
                f'B = {args.batch}, D = {args.dim}, M = {args.noise}, bank {args.bank}', rows,
                args.output, batch=args.batch, dim=args.dim, noise=args.noise, bank=args.bank,
                matmul_gflops=flops_rate / 1e9, copy_gb_per_second=copy_rate / 1e9)


if __name__ == '__main__':
  main()
