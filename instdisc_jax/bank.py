"""The memory bank: one row per training image, and the noise drawn from its rows.

Notation, here and elsewhere: N rows (training images), D embedding size, B images in the global
batch, M noise samples per image. Under `jax.shard_map` each device holds n = ceil(N / devices)
consecutive rows; rows at positions >= N are padding and never correspond to an image.

              device 0        device 1              device k
    bank   [ rows 0..n-1 | rows n..2n-1 | ... | rows .. N-1, padding ]
    batch  [ B/k images  | B/k images   | ... | B/k images           ]   queries move, rows stay

Functions that take `axis_name` work on the full bank (None) or on one device's shard.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from instdisc_jax.linalg import normalize

__all__ = ['LARGEST_NORM', 'count_local_rows', 'count_padding', 'gather', 'init', 'locate', 'move',
           'noise', 'normalize', 'shared_noise', 'update']

LARGEST_NORM = 3**0.5  # of a row: D entries of the uniform start at their bound; 1 once updated


def init(key: Key[Array, ''], num_rows: int, dim: int, *, unit: bool = False,
         dtype: Any = jnp.float32) -> Float[Array, 'N D']:
  """Random initial rows.

  Args:
    key: a `jax.random` key.
    num_rows: N.
    dim: D.
    unit: False for entries uniform in ±1/sqrt(D/3), as published: rows of mean squared norm 1 that
      become unit-norm at their first update. True for uniformly distributed unit vectors.
    dtype: dtype of the rows.

  Returns:
    [N, D].
  """
  if unit:
    return normalize(jax.random.normal(key, (num_rows, dim))).astype(dtype)
  bound = (dim / 3) ** -0.5
  return jax.random.uniform(key, (num_rows, dim), minval=-bound, maxval=bound).astype(dtype)


def update(bank: Float[Array, 'N D'], index: Int[Array, ' B'], features: Float[Array, 'B D'], *,
           momentum: float, axis_name: str | None = None) -> Float[Array, 'N D']:
  """The bank after `move`."""
  return move(bank, index, features, momentum=momentum, axis_name=axis_name)[0]


def move(bank: Float[Array, 'N D'], index: Int[Array, ' B'], features: Float[Array, 'B D'], *,
         momentum: float,
         axis_name: str | None = None) -> tuple[Float[Array, 'N D'], Float[Array, '']]:
  """Moves the batch's rows toward its features: V_i <- normalize(m V_i + (1 - m) v_i).

  Every new row is computed from the bank before the update. If an index occurs more than once in
  the batch, the last occurrence wins, on every device and for any device count.

  Args:
    bank: [N, D], or the local shard [n, D] when `axis_name` is given.
    index: [B] rows of the images; the local part of the batch when `axis_name` is given.
    features: [B, D] unit-norm features, sharded like `index`.
    momentum: m in [0, 1]; 0 replaces the row with the feature.
    axis_name: mesh axis over which rows and batch are sharded.

  Returns:
    (the bank with those rows replaced, in its own dtype; the alignment of the batch, the mean of
    ‖v_i - V_i‖² over the rows before).
  """
  index, features = gather((index, features), axis_name)
  slots = jnp.arange(index.size)
  overwritten = jnp.any((index[:, None] == index) & (slots[:, None] < slots), axis=1)
  local, owned = locate(bank, index, axis_name)
  before = bank[local].astype(features.dtype)
  rows = normalize(momentum * before + (1 - momentum) * features)
  # Rows of other devices, and rows that a later occurrence writes, go to distinct places past the
  # end, where they are dropped.
  target = jnp.where(owned & ~overwritten, local, bank.shape[0] + slots)
  distance = jnp.sum(jnp.where(owned[:, None], (features - before)**2, 0)) / index.size
  if axis_name is not None:
    distance = lax.psum(distance, axis_name)
  return bank.at[target].set(rows.astype(bank.dtype), mode='drop', unique_indices=True), distance


def noise(key: Key[Array, ''], step: Int[Array, ''] | int, index: Int[Array, ' B'],
          noise_count: int, num_rows: int) -> Int[Array, 'B M']:
  """Noise rows for each image: independent, uniform over the N rows, with replacement.

  They depend on (key, step, image index) alone, so they are the same for any device count.

  Args:
    key: a `jax.random` key.
    step: training step, scalar.
    index: [B] image indices.
    noise_count: M >= 1.
    num_rows: the true N, without padding.

  Returns:
    [B, M] int32.
  """
  key = jax.random.fold_in(key, step)
  draw = lambda i: jax.random.randint(
      jax.random.fold_in(key, i), (noise_count,), 0, num_rows, dtype=jnp.int32)
  return jax.vmap(draw)(index)


def shared_noise(key: Key[Array, ''], step: Int[Array, ''] | int, noise_count: int,
                 num_rows: int) -> Int[Array, ' M']:
  """Noise rows that all images of a step share: uniform over the N rows, with replacement.

  Scoring them is one matmul over M rows, where `noise` needs B·M rows or all of them.

  Args:
    key: a `jax.random` key.
    step: training step, scalar.
    noise_count: M >= 1.
    num_rows: the true N, without padding.

  Returns:
    [M] int32.
  """
  return jax.random.randint(jax.random.fold_in(key, step), (noise_count,), 0, num_rows,
                            dtype=jnp.int32)


def gather(tree: Any, axis_name: str | None) -> Any:
  """Local batch arrays [B / devices, ...] -> the global batch [B, ...] on every device."""
  if axis_name is None:
    return tree
  return lax.all_gather(tree, axis_name, tiled=True)


def locate(bank: Float[Array, 'n D'], index: Int[Array, '*shape'],
           axis_name: str | None) -> tuple[Int[Array, '*shape'], Bool[Array, '*shape']]:
  """The positions of rows in this device's shard.

  Args:
    bank: [n, D] local shard (the full bank when `axis_name` is None).
    index: integers of any shape, rows of the full bank.
    axis_name: mesh axis, or None.

  Returns:
    (local, owned), both shaped like `index`: positions clipped to the shard, and whether the row is
    in it.
  """
  n = bank.shape[0]
  local = index - (0 if axis_name is None else lax.axis_index(axis_name) * n)
  return jnp.clip(local, 0, n - 1), (local >= 0) & (local < n)


def count_local_rows(bank: Float[Array, 'n D'], axis_name: str | None,
                     num_rows: int | None) -> Int[Array, ''] | int:
  """Number of this device's rows that belong to images; the rest, at the end, are padding."""
  n = bank.shape[0]
  if axis_name is None:
    return n if num_rows is None else num_rows
  assert num_rows is not None, 'a padded bank needs num_rows'
  return jnp.clip(num_rows - lax.axis_index(axis_name) * n, 0, n)


def count_padding(bank: Float[Array, 'n D'], axis_name: str | None, num_rows: int | None) -> int:
  """Number of rows of all devices that are padding."""
  if num_rows is None:
    return 0
  return bank.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name)) - num_rows
