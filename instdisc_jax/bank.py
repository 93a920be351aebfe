"""The memory bank: one row per training image, and the noise drawn from its rows.

Letters, here and everywhere: N rows (training images), D embedding size, B images in the global
batch, M noise samples per image. Under `jax.shard_map` each device holds n = ceil(N / devices)
consecutive rows; rows at positions >= N are padding and are never read as images.

              device 0        device 1              device k
    bank   [ rows 0..n-1 | rows n..2n-1 | ... | rows .. N-1, padding ]
    batch  [ B/k images  | B/k images   | ... | B/k images           ]   queries travel, rows stay

Functions that take `axis_name` do the same work on the whole bank (None) or on one device's shard.
"""

import jax
from jax import lax
import jax.numpy as jnp


def init(key, num_rows, dim, *, unit=False, dtype=jnp.float32):
  """Random start rows.

  Args:
    key: a `jax.random` key.
    num_rows: N.
    dim: D.
    unit: False for entries uniform in ±1/sqrt(D/3), as published: rows of mean squared norm 1 that
      are first normalised by their first update. True for uniformly distributed unit vectors.
    dtype: of the rows.

  Returns:
    [N, D].
  """
  if unit:
    return normalize(jax.random.normal(key, (num_rows, dim))).astype(dtype)
  bound = (dim / 3) ** -0.5
  return jax.random.uniform(key, (num_rows, dim), minval=-bound, maxval=bound).astype(dtype)


def update(bank, index, features, *, momentum, axis_name=None):
  """Moves the batch's rows towards its features: V_i <- normalise(m V_i + (1 - m) v_i).

  Every candidate row is computed from the bank before the update. Where an index occurs more than
  once in the batch the last occurrence is kept, on every device and any device count.

  Args:
    bank: [N, D], or the local shard [n, D] when `axis_name` is given.
    index: [B] rows of the images; the local part of the batch when `axis_name` is given.
    features: [B, D] unit-norm features, laid out like `index`.
    momentum: m in [0, 1]; 0 replaces the row by the feature.
    axis_name: mesh axis over which rows and batch are sharded.

  Returns:
    The bank with those rows replaced, in the bank's own dtype.
  """
  index, features = gather((index, features), axis_name)
  slots = jnp.arange(index.size)
  overwritten = jnp.any((index[:, None] == index) & (slots[:, None] < slots), axis=1)
  local, owned = locate(bank, index, axis_name)
  rows = normalize(momentum * bank[local].astype(features.dtype) + (1 - momentum) * features)
  # Rows that are not ours, or that a later occurrence writes, go to distinct places past the end.
  target = jnp.where(owned & ~overwritten, local, bank.shape[0] + slots)
  return bank.at[target].set(rows.astype(bank.dtype), mode='drop', unique_indices=True)


def noise(key, step, index, noise_count, num_rows):
  """Noise rows for each image: independent, uniform over the N rows, with replacement.

  They depend on (key, step, image index) alone, so any device count draws the same.

  Args:
    key: a `jax.random` key.
    step: training step, scalar.
    index: [B] image indices.
    noise_count: M >= 1.
    num_rows: the true N, padding not counted.

  Returns:
    [B, M] int32.
  """
  key = jax.random.fold_in(key, step)
  draw = lambda i: jax.random.randint(
      jax.random.fold_in(key, i), (noise_count,), 0, num_rows, dtype=jnp.int32)
  return jax.vmap(draw)(index)


def shared_noise(key, step, noise_count, num_rows):
  """Noise rows that all images of a step share: uniform over the N rows, with replacement.

  Scored by one matmul of M rows, where `noise` needs B·M or all rows.

  Args:
    key: a `jax.random` key.
    step: training step, scalar.
    noise_count: M >= 1.
    num_rows: the true N, padding not counted.

  Returns:
    [M] int32.
  """
  return jax.random.randint(jax.random.fold_in(key, step), (noise_count,), 0, num_rows,
                            dtype=jnp.int32)


def normalize(x, epsilon=1e-12):
  """x / max(‖x‖, epsilon) along the last axis: a zero vector stays zero, with a finite gradient."""
  return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), epsilon**2))


def gather(tree, axis_name):
  """Local batch arrays [B / devices, ...] -> the global batch [B, ...] on every device."""
  if axis_name is None:
    return tree
  return lax.all_gather(tree, axis_name, tiled=True)


def locate(bank, index, axis_name):
  """Where rows lie in this device's shard.

  Args:
    bank: [n, D] local shard (the whole bank when `axis_name` is None).
    index: integers of any shape, rows of the whole bank.
    axis_name: mesh axis, or None.

  Returns:
    (local, owned), both shaped like `index`: positions clipped into the shard, and whether the row
    really lies there.
  """
  n = bank.shape[0]
  local = index - (0 if axis_name is None else lax.axis_index(axis_name) * n)
  return jnp.clip(local, 0, n - 1), (local >= 0) & (local < n)


def count_local_rows(bank, axis_name, num_rows):
  """How many rows of this device's shard are images; the rest, at its end, is padding."""
  n = bank.shape[0]
  if axis_name is None:
    return n if num_rows is None else num_rows
  return jnp.clip(num_rows - lax.axis_index(axis_name) * n, 0, n)
