"""The error of the softmax and its gradient by kernel and dtype: writes a table of the docs.

    python benchmarks/loss_error.py [--rows=100000]

Against dense float64 on the same float32 features and rows: τ = 0.07, each image at cosine 0.9 to
its own row, the other rows random. On a CPU: Pallas is interpreted, and cuDNN's attention is
imitated, with operands, weights and results rounded where cuDNN rounds them, so this shows what the
formats cost, not what a GPU's order of summation adds. Writes docs/concepts/exactness.md between
its markers.
"""

import argparse
import functools

import common
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from instdisc_jax import bank as bank_lib
from instdisc_jax import losses
from instdisc_jax.kernels import cudnn

TEMPERATURE, B, D = 0.07, 64, 128
PAGE = common.ROOT / 'docs' / 'concepts' / 'exactness.md'
START, END = '<!-- loss_error.py -->', '<!-- /loss_error.py -->'
CASES = (  # kernel, dtype of the bank, what it stands for
    ('xla', 'float32', '`xla` on a CPU'),
    ('pallas', 'float32', '`pallas`: three products of bfloat16 parts, as `xla` on a GPU or TPU'),
    ('pallas', 'bfloat16', '`pallas`'),
    ('cudnn', 'float16', '`cudnn`'),
    ('cudnn', 'float32', '`cudnn`, which rounds the rows to float16'),
    ('cudnn', 'bfloat16', '`cudnn`'),
    ('xla', 'float16', '`xla` on a CPU, which widens the rows'),
)


def dense(features, bank, index):
  """Loss [B] and its gradient [B, D] in float64."""
  logits = features @ bank.T / TEMPERATURE
  peak = logits.max(axis=1, keepdims=True)
  p = np.exp(logits - peak)
  total = p.sum(axis=1, keepdims=True)
  loss = (peak + np.log(total))[:, 0] - logits[np.arange(B), index]
  return loss, (p / total @ bank - bank[index]) / TEMPERATURE


def attention(queries, rows, lengths, *, operand_dtype, result_dtype, **_):
  """What cuDNN's attention computes, in float32 with its roundings; all rows belong to images."""
  del lengths, operand_dtype
  bits = jnp.finfo(jnp.float16 if rows.dtype == jnp.float32 else rows.dtype)
  narrow = lambda x: jax.lax.reduce_precision(x.astype(jnp.float32), bits.nexp, bits.nmant)
  rows = narrow(rows[:, :, 0])
  logits = jnp.einsum('bd,pnd->pbn', narrow(queries), rows, precision='highest')
  peak = logits.max(axis=2, keepdims=True)
  weight = jnp.exp(logits - peak)
  total = weight.sum(axis=2, keepdims=True)
  mean_row = narrow(jnp.einsum('pbn,pnd->pbd', narrow(weight), rows, precision='highest') / total)
  return (peak + jnp.log(total))[:, :, 0].astype(result_dtype), mean_row.astype(result_dtype)


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rows', type=int, default=100_000)
  args = parser.parse_args()
  keys = jax.random.split(jax.random.key(0), 3)
  bank = bank_lib.init(keys[0], args.rows, D, unit=True)
  index = jax.random.randint(keys[1], (B,), 0, args.rows)
  other = bank_lib.normalize(jax.random.normal(keys[2], (B, D)))
  other = bank_lib.normalize(other - (other * bank[index]).sum(1, keepdims=True) * bank[index])
  features = 0.9 * bank[index] + (1 - 0.9**2) ** 0.5 * other
  loss, gradient = dense(*(np.asarray(x, np.float64) for x in (features, bank)), np.asarray(index))
  cudnn._attend = attention
  rows = []
  for kernel, dtype, meaning in CASES:
    fn = functools.partial(losses.softmax_loss, bank=bank.astype(dtype), index=index,
                           temperature=TEMPERATURE, kernel=kernel)
    with pltpu.force_tpu_interpret_mode():
      found, pull = jax.vjp(fn, features)
      found_gradient = np.asarray(pull(jnp.ones(B))[0], np.float64)
    rows.append({
        'kernel': meaning, 'bank': dtype,
        'loss, largest': float(np.abs(np.asarray(found, np.float64) / loss - 1).max()),
        'gradient, rms': float(np.sqrt(((found_gradient - gradient) ** 2).sum()
                                       / (gradient ** 2).sum()))})
  common.report('loss_error', f'relative errors, N = {args.rows:,}', rows, rows_of_bank=args.rows)
  lines = ['| kernel | bank | loss, largest | gradient, rms |', '|---|---|---|---|']
  lines += [f'| {row["kernel"]} | {row["bank"]} | {row["loss, largest"]:.0e} | '
            f'{row["gradient, rms"]:.0e} |' for row in rows]
  text = PAGE.read_text()
  before, after = text.split(START)[0], text.split(END)[1]
  PAGE.write_text(before + START + '\n' + '\n'.join(lines) + '\n' + END + after)


if __name__ == '__main__':
  main()
