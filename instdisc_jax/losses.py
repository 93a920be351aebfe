"""The losses: features of a batch against the memory bank.

Each takes unit-norm `features` [B, D], the `bank` [N, D] and the images' rows `index` [B], and
returns one loss per image, [B]. The bank is data: the gradient is with respect to `features` alone.
It is known in closed form, so the pass over the bank that computes the loss computes the gradient
too, and nothing of size B x N is kept for a backward pass.

Inside `jax.shard_map`, with `axis_name` and `num_rows` given, `features` and `index` are the
device's part of the batch and `bank` its rows. Queries are exchanged, the bank never is: every
device gets all B queries and scores its own rows, and the partial results are summed on the device
that owns the query. Each step exchanges about 2 B (D + 2) values per device, whatever N is.
`noise_index` is then that of the *global* batch, identical on every device (`bank.noise`). It is
[B, M], or [M] if all images share one draw.

Scores and sums are float32 (float64 for float64 features) whatever the bank's dtype. (A bfloat16
bank saves memory on GPU and TPU; XLA:CPU, which has no bfloat16 arithmetic, widens the full bank.)
"""

import functools
import math

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdisc_jax import bank as bank_lib
from instdisc_jax.linalg import dot, score_rows

_jit = functools.partial(jax.jit, static_argnames=('axis_name', 'num_rows'))


@functools.partial(jax.jit, static_argnames=('axis_name', 'num_rows', 'block_rows'))
def softmax_loss(features: Float[Array, 'B D'], bank: Float[Array, 'N D'],
                 index: Int[Array, ' B'], *, temperature: float, axis_name: str | None = None,
                 num_rows: int | None = None,
                 block_rows: int | None = None) -> Float[Array, ' B']:
  """Non-parametric softmax over all N rows (Eq. 2-3), exact.

      loss_i  = logsumexp_j(V_j·v_i / τ) - V_i·v_i / τ
      ∂loss_i = (Σ_j p_ij V_j - V_i) / τ

  The bank is streamed in blocks with a running maximum, sum and weighted mean of rows.

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    temperature: τ > 0.
    axis_name: mesh axis over which batch and rows are sharded, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.
    block_rows: rows scored at once; by default as many as fit a block of scores into 128 MiB.

  Returns:
    [B].
  """
  queries, bank, index = _as_data(features, bank, index, axis_name)
  positive, positive_score = _positive(queries, bank, index, axis_name)
  num_local = bank_lib.count_local_rows(bank, axis_name, num_rows)
  peak, total, weighted = _stream(queries, bank, num_local, temperature, block_rows)
  logsumexp, mean_row = _combine(peak, total, weighted, axis_name)
  mine, gradient = _to_owner(
      (positive_score / temperature, (mean_row - positive) / temperature), axis_name)
  return _with_gradient(_own(logsumexp, features, axis_name) - mine, gradient, features)


def class_weights_gradient(features: Float[Array, 'B D'], weights: Float[Array, 'N D'],
                           index: Int[Array, ' B'], loss: Float[Array, ' B'], *,
                           temperature: float, axis_name: str | None = None,
                           num_rows: int | None = None,
                           block_rows: int | None = None) -> Float[Array, 'N D']:
  """The gradient of the parametric softmax (Eq. 1) with respect to its class weights.

  Its loss is `softmax_loss` with a learned weight vector w_j for every image in place of V_j:

      ∂(mean_i loss_i) / ∂w_j = mean_i (p_ij - [j = i]) v_i / τ

  Args:
    features: [B, D] unit-norm.
    weights: [N, D], or the local shard.
    index: [B] int.
    loss: [B] `softmax_loss` of the same arguments.
    temperature: τ > 0.
    axis_name: mesh axis over which batch and rows are sharded, or None.
    num_rows: the true N where the rows are padded; needed with `axis_name`.
    block_rows: rows scored at once, see `softmax_loss`.

  Returns:
    [N, D], or the local rows; 0 in the padding.
  """
  queries, weights, index = _as_data(features, weights, index, axis_name)
  num_local = bank_lib.count_local_rows(weights, axis_name, num_rows)
  positive_score = _positive(queries, weights, index, axis_name)[1]
  if axis_name is not None:
    positive_score = lax.psum(positive_score, axis_name)
  logsumexp = bank_lib.gather(loss, axis_name) + positive_score / temperature
  n = weights.shape[0]
  block = _block_rows(queries, weights, block_rows)

  def add_block(i, gradient):
    start, chunk, fresh = _block(weights, i, block)
    logits = score_rows(queries, chunk) / temperature - logsumexp[:, None]
    p = jnp.where(fresh & (start + jnp.arange(block) < num_local), jnp.exp(logits), 0)
    part = dot(p, queries, (((0,), (0,)), ((), ())))
    return lax.dynamic_update_slice_in_dim(
        gradient, lax.dynamic_slice_in_dim(gradient, start, block) + part, start, 0)

  local, owned = bank_lib.locate(weights, index, axis_name)
  zeros = jnp.zeros(weights.shape, queries.dtype).at[local].add(
      jnp.where(owned[:, None], -queries, 0))
  gradient = lax.fori_loop(0, math.ceil(n / block), add_block, zeros)
  return gradient / (temperature * queries.shape[0])


@_jit
def sampled_softmax_loss(features: Float[Array, 'B D'], bank: Float[Array, 'N D'],
                         index: Int[Array, ' B'], noise_index: Int[Array, '*B M'], *,
                         temperature: float, axis_name: str | None = None,
                         num_rows: int | None = None) -> Float[Array, ' B']:
  """Cross-entropy of the positive among M + 1 columns: itself and M noise rows, as drawn.

  The published "updated" model trains with it at M = 65,536. Noise that happens to hit the
  positive, or the same row twice, counts as drawn.

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    noise_index: [B, M] or [M] int, of the global batch when `axis_name` is given.
    temperature: τ > 0.
    axis_name: mesh axis, or None.
    num_rows: unused; all losses share one signature.

  Returns:
    [B].
  """
  del num_rows
  queries, bank, index = _as_data(features, bank, index, axis_name)
  positive, positive_score = _positive(queries, bank, index, axis_name)
  owned_positive = bank_lib.locate(bank, index, axis_name)[1]
  score, owned = _noise_scores(queries, bank, noise_index, axis_name)
  columns = jnp.concatenate([positive_score[:, None], score], axis=1) / temperature
  columns = jnp.where(jnp.concatenate([owned_positive[:, None], owned], axis=1), columns, -jnp.inf)
  peak = jnp.max(columns, axis=1)
  weight = jnp.exp(columns - _finite(peak)[:, None])
  weighted = weight[:, :1] * positive + _weighted_rows(weight[:, 1:], bank, noise_index, axis_name)
  logsumexp, mean_row = _combine(peak, jnp.sum(weight, axis=1), weighted, axis_name)
  mine, gradient = _to_owner(
      (positive_score / temperature, (mean_row - positive) / temperature), axis_name)
  return _with_gradient(_own(logsumexp, features, axis_name) - mine, gradient, features)


@_jit
def nce_loss(features: Float[Array, 'B D'], bank: Float[Array, 'N D'], index: Int[Array, ' B'],
             noise_index: Int[Array, '*B M'], *, temperature: float,
             normalizer: Float[Array, ''] | float, axis_name: str | None = None,
             num_rows: int | None = None) -> Float[Array, ' B']:
  """Noise-contrastive estimation (Eq. 4-8), in log space.

      logit  = s / τ - log Z - log(M / N)          h = P / (P + M/N) = sigmoid(logit)
      loss_i = softplus(-logit_ii) + Σ_{M noise j} softplus(logit_ij)

  Exact without an epsilon (the published code adds 1e-7 to its denominators). Z is a constant.

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    noise_index: [B, M] or [M] int, of the global batch when `axis_name` is given.
    temperature: τ > 0.
    normalizer: Z > 0, scalar.
    axis_name: mesh axis, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.

  Returns:
    [B].
  """
  queries, bank, index = _as_data(features, bank, index, axis_name)
  num_rows = num_rows or bank.shape[0]
  offset = jnp.log(normalizer).astype(queries.dtype) + math.log(noise_index.shape[-1] / num_rows)
  positive, positive_score = _positive(queries, bank, index, axis_name)
  owned_positive = bank_lib.locate(bank, index, axis_name)[1]
  logit = positive_score / temperature - offset
  score, owned = _noise_scores(queries, bank, noise_index, axis_name)
  noise_logit = score / temperature - offset
  loss = (jnp.where(owned_positive, jax.nn.softplus(-logit), 0)
          + jnp.sum(jnp.where(owned, jax.nn.softplus(noise_logit), 0), axis=1))
  weight = jnp.where(owned, jax.nn.sigmoid(noise_logit), 0)
  gradient = (_weighted_rows(weight, bank, noise_index, axis_name)
              - jax.nn.sigmoid(-logit)[:, None] * positive) / temperature
  loss, gradient = _to_owner((loss, gradient), axis_name)
  return _with_gradient(loss, gradient, features)


@_jit
def estimate_normalizer(features: Float[Array, 'B D'], bank: Float[Array, 'N D'],
                        index: Int[Array, ' B'], noise_index: Int[Array, '*B M'], *,
                        temperature: float, axis_name: str | None = None,
                        num_rows: int | None = None) -> Float[Array, '']:
  """Z ≈ N · mean(exp(s / τ)) over the batch's B (M + 1) positive and noise columns.

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    noise_index: [B, M] or [M] int, of the global batch when `axis_name` is given.
    temperature: τ > 0.
    axis_name: mesh axis, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.

  Returns:
    Scalar Z, the same on all devices.
  """
  queries, bank, index = _as_data(features, bank, index, axis_name)
  _, positive_score = _positive(queries, bank, index, axis_name)
  owned_positive = bank_lib.locate(bank, index, axis_name)[1]
  score, owned = _noise_scores(queries, bank, noise_index, axis_name)
  total = (jnp.sum(jnp.where(owned_positive, jnp.exp(positive_score / temperature), 0))
           + jnp.sum(jnp.where(owned, jnp.exp(score / temperature), 0)))
  if axis_name is not None:
    total = lax.psum(total, axis_name)
  return (num_rows or bank.shape[0]) * total / (score.size + index.size)


@_jit
def proximal_penalty(features: Float[Array, 'B D'], bank: Float[Array, 'N D'],
                     index: Int[Array, ' B'], *, axis_name: str | None = None,
                     num_rows: int | None = None) -> Float[Array, ' B']:
  """‖v_i - V_i‖² (Eq. 10, without λ), V_i the row before this step's update.

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    axis_name: mesh axis, or None.
    num_rows: unused; all losses share one signature.

  Returns:
    [B].
  """
  del num_rows
  queries, bank, index = _as_data(features, bank, index, axis_name)
  local, owned = bank_lib.locate(bank, index, axis_name)
  difference = jnp.where(owned[:, None], queries - bank[local].astype(queries.dtype), 0)
  penalty, gradient = _to_owner((jnp.sum(difference**2, axis=1), 2 * difference), axis_name)
  return _with_gradient(penalty, gradient, features)


def _as_data(features, bank, index, axis_name):
  """The global batch's features, the local rows and the global index, without gradients."""
  chex.assert_rank([features, bank, index], [2, 2, 1])
  chex.assert_equal_shape_prefix([features, index], 1)
  chex.assert_equal(features.shape[1], bank.shape[1])
  queries, index = bank_lib.gather((lax.stop_gradient(features), index), axis_name)
  return queries, lax.stop_gradient(bank), index


def _with_gradient(loss, gradient, features):
  """`loss` [B] with derivative `gradient` with respect to `features` [B, D]: adds zero."""
  return loss + jnp.sum((features - lax.stop_gradient(features)) * gradient, axis=1)


def _positive(queries, bank, index, axis_name):
  """The images' own rows [B, D] and scores [B]; zero where another device owns the row."""
  local, owned = bank_lib.locate(bank, index, axis_name)
  positive = jnp.where(owned[:, None], bank[local].astype(queries.dtype), 0)
  return positive, jnp.sum(queries * positive, axis=1)


def _stream(queries, rows, num_local, temperature, block_rows):
  """One pass over the local rows.

  Returns:
    Per query, the largest logit [B] (-inf without rows), Σ exp(logit - largest) [B], and the sum of
    the rows with those weights [B, D].
  """
  block = _block_rows(queries, rows, block_rows)

  def scan_block(i, carry):
    start, chunk, fresh = _block(rows, i, block)
    logits = score_rows(queries, chunk) / temperature
    logits = jnp.where(fresh & (start + jnp.arange(block) < num_local), logits, -jnp.inf)
    peak = jnp.max(logits, axis=1)
    if carry is not None:
      peak = jnp.maximum(peak, carry[0])
    weight = jnp.exp(logits - _finite(peak)[:, None])
    total = jnp.sum(weight, axis=1)
    weighted = dot(weight, chunk, (((1,), (0,)), ((), ())))
    if carry is not None:
      shrink = jnp.exp(carry[0] - _finite(peak))
      total += shrink * carry[1]
      weighted += shrink[:, None] * carry[2]
    return peak, total, weighted

  return lax.fori_loop(1, math.ceil(rows.shape[0] / block), scan_block, scan_block(0, None))


def _block_rows(queries, rows, block_rows):
  """Rows scored at once."""
  return min(rows.shape[0], block_rows or max(1024, 2**25 // queries.shape[0]))


def _block(rows, i, block):
  """(start, rows, mask of rows in no earlier block) of block i; the last is aligned to the end."""
  start = jnp.minimum(i * block, rows.shape[0] - block)
  return (start, lax.dynamic_slice_in_dim(rows, start, block),
          start + jnp.arange(block) >= i * block)


def _combine(peak, total, weighted, axis_name):
  """Partial sums of all devices -> logsumexp [B], and this device's share of Σ_j p_j V_j."""
  if axis_name is None:
    return peak + jnp.log(total), weighted / total[:, None]
  global_peak = lax.pmax(peak, axis_name)
  shrink = jnp.exp(peak - global_peak)
  global_total = lax.psum(shrink * total, axis_name)
  return global_peak + jnp.log(global_total), weighted * (shrink / global_total)[:, None]


def _finite(peak):
  """Replaces the peak -inf of a device with only padding: exp(-inf - 0) is 0, -inf + inf is NaN."""
  return jnp.where(jnp.isfinite(peak), peak, 0)


def _to_owner(partials, axis_name):
  """Sums ([B], [B, D]) over devices; each keeps its own part of the batch."""
  if axis_name is None:
    return partials
  scalar, vector = partials
  packed = lax.psum_scatter(jnp.concatenate([scalar[:, None], vector], axis=1), axis_name,
                            scatter_dimension=0, tiled=True)
  return packed[:, 0], packed[:, 1:]


def _own(x, features, axis_name):
  """This device's part of an array [B] that every device holds in full."""
  if axis_name is None:
    return x
  size = features.shape[0]
  return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * size, size)


def _scoring_all_rows_is_cheaper(bank, noise_index):
  """A gather reads B·M rows; a matmul over the shard reads each of its rows once."""
  return noise_index.size > bank.shape[0]


def _noise_scores(queries, bank, noise_index, axis_name):
  """Scores [B, M] of the noise rows, and a mask of the valid ones: rows that this device owns."""
  local, owned = bank_lib.locate(bank, noise_index, axis_name)
  if noise_index.ndim == 1:
    score = score_rows(queries, bank[local])
    return score, jnp.broadcast_to(owned, score.shape)
  if _scoring_all_rows_is_cheaper(bank, noise_index):
    return jnp.take_along_axis(score_rows(queries, bank), local, axis=1), owned
  return dot(queries, bank[local], (((1,), (2,)), ((0,), (0,)))), owned


def _weighted_rows(weight, bank, noise_index, axis_name):
  """Σ_m weight[b, m] · row of noise_index[b, m] -> [B, D]; weights of rows not owned must be 0."""
  local, _ = bank_lib.locate(bank, noise_index, axis_name)
  if noise_index.ndim == 1:
    return dot(weight, bank[local], (((1,), (0,)), ((), ())))
  if _scoring_all_rows_is_cheaper(bank, noise_index):
    slots = jnp.arange(weight.shape[0])[:, None]
    dense = jnp.zeros((weight.shape[0], bank.shape[0]), weight.dtype).at[slots, local].add(weight)
    return dot(dense, bank, (((1,), (0,)), ((), ())))
  return dot(weight, bank[local], (((1,), (1,)), ((0,), (0,))))
