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

Sums are float32 (float64 for float64 features) whatever the bank's dtype. With 16-bit rows the
queries v_i / τ are rounded to the same dtype, once, so that an image's own row and the others are
scored alike. (Such a bank saves memory and time on GPU and TPU; XLA:CPU, which has no arithmetic
for it, widens the rows.)
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import chex
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdisc_jax import bank as bank_lib
from instdisc_jax import kernels, neighbors
from instdisc_jax.linalg import dot, in_chunks, score_rows

_MOST_HELD = 2**25  # scores or values of noise rows held at once, 128 MiB in float32
_jit = functools.partial(jax.jit, static_argnames=('axis_name', 'num_rows', 'most_held'))


def softmax_loss(features: Float[Array, 'B D'], bank: Float[Array, 'N D'],
                 index: Int[Array, ' B'], *, temperature: float,
                 near: Int[Array, 'B K'] | None = None, axis_name: str | None = None,
                 num_rows: int | None = None, kernel: str = 'xla', block_rows: int | None = None,
                 largest_norm: float | None = bank_lib.LARGEST_NORM) -> Float[Array, ' B']:
  """Non-parametric softmax over all N rows (Eq. 2-3), exact.

      loss_i  = logsumexp_j(V_j·v_i / τ) - V_i·v_i / τ
      ∂loss_i = (Σ_j p_ij V_j - V_i) / τ

  One pass over the bank gives both sums. They need no running maximum while |V_j·v_i| / τ stays
  below about 73, which is known if τ is a Python number and the norms of the rows are bounded:
  down to τ = 0.0137 for unit vectors, and 0.0237 for any bank from `bank.init`.

  Rows that are `near` an image are positives too, P_i of them with its own:

      loss_i  = -log Σ_{j in P_i} p_ij

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    temperature: τ > 0.
    near: [B, K] int, of the global batch when `axis_name` is given, see `nearest`; -1 for no row.
    axis_name: mesh axis over which batch and rows are sharded, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.
    kernel: 'xla', 'cudnn' or 'pallas', see `kernels`.
    block_rows: rows that 'xla' scores at once; by default what is fastest on the platform.
    largest_norm: a bound on the norms of the rows; None if none is known.

  Returns:
    [B].
  """
  largest_logit = None
  if largest_norm is not None and isinstance(temperature, (int, float)):
    largest_logit = largest_norm / temperature
  return _softmax_loss(features, bank, index, near, temperature, axis_name=axis_name,
                       num_rows=num_rows, kernel=kernel, block_rows=block_rows,
                       largest_logit=largest_logit)


@functools.partial(jax.jit, static_argnames=('axis_name', 'num_rows', 'kernel', 'block_rows',
                                             'largest_logit'))
def _softmax_loss(features, bank, index, near, temperature, *, axis_name, num_rows, kernel,
                  block_rows, largest_logit):
  queries, bank, index = _as_queries(features, bank, index, temperature, axis_name)
  positive, positive_logit = _positive(queries, bank, index, axis_name)
  num_local = bank_lib.count_local_rows(bank, axis_name, num_rows)
  sums = kernels.partial_sums(
      kernel, queries, bank, num_local, padding=bank_lib.count_padding(bank, axis_name, num_rows),
      largest_logit=largest_logit, block_rows=block_rows)
  logsumexp, mean_row = _combine(*sums, axis_name)
  if near is None:
    mine, gradient = _to_owner((positive_logit, (mean_row - positive) / temperature), axis_name)
    return _with_gradient(_own(logsumexp, features, axis_name) - mine, gradient, features)

  # On every device: scalars of the global batch, and its own share of each weighted sum of rows.
  if axis_name is not None:
    positive_logit = lax.psum(positive_logit, axis_name)
  near_logit, near_row = _log_sum(queries, bank, near, axis_name)
  positives = jnp.logaddexp(positive_logit, near_logit)
  share = jnp.exp(positive_logit - positives)[:, None]
  weighted = mean_row - share * positive - (1 - share) * near_row
  loss = _own(logsumexp - positives, features, axis_name)
  return _with_gradient(loss, _to_owners(weighted, axis_name) / temperature, features)


def _log_sum(queries, bank, near, axis_name):
  """(log Σ_k exp(logit) [B] of some rows, -inf of none; a device's share of Σ_k p_k V_k [B, D])."""
  def sums(noise):
    logit = jnp.where(noise.owned, noise.logit, -jnp.inf)
    peak = jnp.max(logit, axis=1)
    weight = jnp.exp(logit - kernels.finite(peak)[:, None])
    return peak, weight.sum(axis=1), noise.weigh(weight)

  device_peak, total, weighted = _over_noise(sums, bank, near, axis_name, _MOST_HELD, (queries,))
  peak = device_peak if axis_name is None else lax.pmax(device_peak, axis_name)
  shrink = jnp.exp(device_peak - kernels.finite(peak))
  total = total * shrink if axis_name is None else lax.psum(total * shrink, axis_name)
  return (kernels.finite(peak) + jnp.log(total),
          weighted * (shrink / jnp.where(total > 0, total, 1))[:, None])


def other_view_loss(features: Float[Array, 'views D'], *, temperature: float,
                    axis_name: str | None = None) -> Float[Array, ' views']:
  """The softmax over the other views of the batch, for two views v, v' of each of its B images:

      loss_i  = logsumexp_j(v'_j·v_i / τ) - v'_i·v_i / τ

  Differentiated with respect to both views. It needs no bank: unlike rows, which lag behind, these
  negatives move with the positive, so that no common drift of all features lowers the loss. (The
  positive is InvaSpread's, Ye et al., 2019; the form that of MoCo v3, Chen et al., 2021.)

  Args:
    features: [2 B, D] unit-norm, all first views before all second ones; local when
      `axis_name` is given, where each device compares its own with the global batch.
    temperature: τ > 0.
    axis_name: mesh axis over which the batch is sharded, or None.

  Returns:
    [2 B].
  """
  return _other_view_loss(features, temperature, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _other_view_loss(features, temperature, axis_name):
  return _compare_views(features, temperature, axis_name)[0]


def _compare_views(features, temperature, axis_name):
  """[2 b, D] -> (loss [2 b], residuals)."""
  pairs, other = _by_view(features), _by_view(features, axis_name)[::-1]
  logits = dot(pairs, other, (((2,), (2,)), ((0,), (0,)))) / temperature  # [2, b, B]
  logsumexp = jax.nn.logsumexp(logits, axis=2)
  pair = jnp.sum(pairs * pairs[::-1], axis=2) / temperature
  return (logsumexp - pair).reshape(-1), (other, logits, logsumexp)


def _other_view_gradient(temperature, axis_name, residuals, cotangent):
  """Of a view as a query of its own, and as a column of the others'."""
  other, logits, logsumexp = residuals
  size = logsumexp.shape[1]
  columns = jnp.stack([logsumexp.reshape(-1), cotangent], axis=1)
  logsumexp_of, cotangent_of = jnp.moveaxis(_by_view(columns, axis_name)[::-1, None], -1, 0)
  cotangent = cotangent.reshape(2, size)
  weight = (jnp.exp(logits - logsumexp[..., None]) * cotangent[..., None]
            + jnp.exp(logits - logsumexp_of) * cotangent_of)
  first = 0 if axis_name is None else lax.axis_index(axis_name) * size
  own = (first + jnp.arange(size))[:, None] == jnp.arange(logits.shape[2])
  weight -= own * (cotangent + cotangent[::-1])[..., None]
  gradient = dot(weight, other, (((2,), (1,)), ((0,), (0,)))) / temperature
  return (gradient.reshape(-1, gradient.shape[-1]),)


def _by_view(x, axis_name=None):
  """Local [2 b, ...], all first views before all second ones -> [2, B, ...] of the global batch."""
  devices = 1 if axis_name is None else lax.axis_size(axis_name)
  shape = x.shape[1:]
  parts = bank_lib.gather(x, axis_name).reshape(devices, 2, -1, *shape)
  return parts.swapaxes(0, 1).reshape(2, -1, *shape)


_other_view_loss.defvjp(_compare_views, _other_view_gradient)


def nearest(features: Float[Array, 'B D'], bank: Float[Array, 'N D'], index: Int[Array, ' B'], *,
            count: int, below_own: bool = False, axis_name: str | None = None,
            num_rows: int | None = None) -> Int[Array, 'B K']:
  """The rows most similar to each feature, but the image's own.

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    count: K, at most N - 1.
    below_own: only rows less similar than the image's own, by more than rounding can account for:
      with K = 1 the semi-hard negative of `triplet_loss` (Schroff et al., 2015); if False, the
      hardest.
    axis_name: mesh axis, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.

  Returns:
    [B, K] int32, of the global batch, on every device; -1 where there is none.
  """
  queries, bank, index = _as_queries(features, bank, index, 1.0, axis_name)
  below = None
  if below_own:  # the sum over D is rounded otherwise in a product with all rows
    below = _positive(queries, bank, index, axis_name)[1]
    below = below if axis_name is None else lax.psum(below, axis_name)
    below -= 16 * jnp.finfo(below.dtype).eps
  similarity, row = neighbors.nearest(queries, bank, index, below, k=count, axis_name=axis_name,
                                      num_rows=num_rows)
  return jnp.where(jnp.isfinite(similarity), row, -1)


@functools.partial(jax.jit, static_argnames=('margin', 'axis_name', 'num_rows', 'most_held'))
def triplet_loss(features: Float[Array, 'B D'], bank: Float[Array, 'N D'], index: Int[Array, ' B'],
                 noise_index: Int[Array, '*B M'], *, margin: float, axis_name: str | None = None,
                 num_rows: int | None = None, most_held: int = _MOST_HELD) -> Float[Array, ' B']:
  """The triplet loss on cosines: an image's own row is to be nearer than others, by a margin.

      loss_i = mean_m max(0, margin + V_m·v_i - V_i·v_i)

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    noise_index: [B, M] or [M] int, the negatives, of the global batch when `axis_name` is given;
      -1 for none, which counts as a loss of 0.
    margin: in cosines.
    axis_name: mesh axis, or None.
    num_rows: unused; all losses share one signature.
    most_held: scores, or values of noise rows, held at once.

  Returns:
    [B].
  """
  del num_rows
  queries, bank, index = _as_queries(features, bank, index, 1.0, axis_name)
  positive, similarity = _positive(queries, bank, index, axis_name)
  if axis_name is not None:
    similarity = lax.psum(similarity, axis_name)

  def sums(noise, similarity):
    excess = margin + noise.logit - similarity[:, None]
    wrong = noise.owned & (excess > 0)
    return (jnp.where(wrong, excess, 0).sum(axis=1), wrong.sum(axis=1, dtype=queries.dtype),
            noise.weigh(wrong.astype(queries.dtype)))

  loss, wrong, weighted = _over_noise(sums, bank, noise_index, axis_name, most_held,
                                      (queries, similarity))
  if axis_name is not None:
    wrong = lax.psum(wrong, axis_name)
  loss, gradient = _to_owner((loss, weighted - wrong[:, None] * positive), axis_name)
  count = noise_index.shape[-1]
  return _with_gradient(loss / count, gradient / count, features)


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
    block_rows: rows scored at once; by default as many as fit 2^25 scores.

  Returns:
    [N, D], or the local rows; 0 in the padding.
  """
  queries, weights, index = _as_queries(features, weights, index, temperature, axis_name)
  num_local = bank_lib.count_local_rows(weights, axis_name, num_rows)
  positive_logit = _positive(queries, weights, index, axis_name)[1]
  if axis_name is not None:
    positive_logit = lax.psum(positive_logit, axis_name)
  logsumexp = bank_lib.gather(loss, axis_name) + positive_logit
  n = weights.shape[0]
  block = min(n, block_rows or max(1024, 2**25 // queries.shape[0]))

  def add_block(i, gradient):
    start = jnp.minimum(i * block, n - block)  # the last block is aligned to the end
    position = start + jnp.arange(block)
    logits = score_rows(queries, lax.dynamic_slice_in_dim(weights, start, block))
    fresh = (position >= i * block) & (position < num_local)
    p = jnp.where(fresh, jnp.exp(logits - logsumexp[:, None]), 0)
    part = dot(p, queries, (((0,), (0,)), ((), ())))
    return lax.dynamic_update_slice_in_dim(
        gradient, lax.dynamic_slice_in_dim(gradient, start, block) + part, start, 0)

  local, owned = bank_lib.locate(weights, index, axis_name)
  zeros = jnp.zeros(weights.shape, queries.dtype).at[local].add(
      jnp.where(owned[:, None], -queries, 0))
  # The queries hold 1/τ already.
  return lax.fori_loop(0, math.ceil(n / block), add_block, zeros) / queries.shape[0]


@_jit
def sampled_softmax_loss(features: Float[Array, 'B D'], bank: Float[Array, 'N D'],
                         index: Int[Array, ' B'], noise_index: Int[Array, '*B M'], *,
                         temperature: float, axis_name: str | None = None,
                         num_rows: int | None = None,
                         most_held: int = _MOST_HELD) -> Float[Array, ' B']:
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
    most_held: scores, or values of noise rows, held at once.

  Returns:
    [B].
  """
  del num_rows
  queries, bank, index = _as_queries(features, bank, index, temperature, axis_name)
  positive, positive_logit = _positive(queries, bank, index, axis_name)
  owned_positive = bank_lib.locate(bank, index, axis_name)[1]

  def sums(noise, positive, positive_logit, owned_positive):
    columns = jnp.concatenate([positive_logit[:, None], noise.logit], axis=1)
    owned = jnp.concatenate([owned_positive[:, None], noise.owned], axis=1)
    columns = jnp.where(owned, columns, -jnp.inf)
    peak = jnp.max(columns, axis=1)
    weight = jnp.exp(columns - kernels.finite(peak)[:, None])
    return peak, weight.sum(axis=1), weight[:, :1] * positive + noise.weigh(weight[:, 1:])

  peak, total, weighted = _over_noise(sums, bank, noise_index, axis_name, most_held,
                                      (queries, positive, positive_logit, owned_positive))
  logsumexp, mean_row = _combine(peak, total, weighted, axis_name)
  mine, gradient = _to_owner((positive_logit, (mean_row - positive) / temperature), axis_name)
  return _with_gradient(_own(logsumexp, features, axis_name) - mine, gradient, features)


@_jit
def nce_loss(features: Float[Array, 'B D'], bank: Float[Array, 'N D'], index: Int[Array, ' B'],
             noise_index: Int[Array, '*B M'], *, temperature: float,
             normalizer: Float[Array, ''] | float, axis_name: str | None = None,
             num_rows: int | None = None, most_held: int = _MOST_HELD) -> Float[Array, ' B']:
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
    most_held: scores, or values of noise rows, held at once.

  Returns:
    [B].
  """
  queries, bank, index = _as_queries(features, bank, index, temperature, axis_name)
  num_rows = num_rows or bank.shape[0]
  offset = jnp.log(normalizer).astype(queries.dtype) + math.log(noise_index.shape[-1] / num_rows)
  positive, positive_logit = _positive(queries, bank, index, axis_name)
  owned_positive = bank_lib.locate(bank, index, axis_name)[1]
  logit = positive_logit - offset

  def sums(noise):
    logit = noise.logit - offset
    loss = jnp.sum(jnp.where(noise.owned, jax.nn.softplus(logit), 0), axis=1)
    return loss, noise.weigh(jnp.where(noise.owned, jax.nn.sigmoid(logit), 0))

  loss, weighted = _over_noise(sums, bank, noise_index, axis_name, most_held, (queries,))
  loss += jnp.where(owned_positive, jax.nn.softplus(-logit), 0)
  gradient = (weighted - jax.nn.sigmoid(-logit)[:, None] * positive) / temperature
  loss, gradient = _to_owner((loss, gradient), axis_name)
  return _with_gradient(loss, gradient, features)


@_jit
def estimate_normalizer(features: Float[Array, 'B D'], bank: Float[Array, 'N D'],
                        index: Int[Array, ' B'], noise_index: Int[Array, '*B M'], *,
                        temperature: float, axis_name: str | None = None,
                        num_rows: int | None = None,
                        most_held: int = _MOST_HELD) -> Float[Array, '']:
  """Z ≈ N · mean(exp(s / τ)) over the batch's B (M + 1) positive and noise columns.

  Args:
    features: [B, D] unit-norm.
    bank: [N, D], or the local shard.
    index: [B] int.
    noise_index: [B, M] or [M] int, of the global batch when `axis_name` is given.
    temperature: τ > 0.
    axis_name: mesh axis, or None.
    num_rows: the true N where the bank is padded; needed with `axis_name`.
    most_held: scores, or values of noise rows, held at once.

  Returns:
    Scalar Z, the same on all devices.
  """
  queries, bank, index = _as_queries(features, bank, index, temperature, axis_name)
  _, positive_logit = _positive(queries, bank, index, axis_name)
  owned_positive = bank_lib.locate(bank, index, axis_name)[1]
  sums = lambda noise: jnp.sum(jnp.where(noise.owned, jnp.exp(noise.logit), 0), axis=1)
  total = jnp.sum(_over_noise(sums, bank, noise_index, axis_name, most_held, (queries,))
                  + jnp.where(owned_positive, jnp.exp(positive_logit), 0))
  if axis_name is not None:
    total = lax.psum(total, axis_name)
  columns = index.size * (noise_index.shape[-1] + 1)
  return (num_rows or bank.shape[0]) * total / columns


@functools.partial(jax.jit, static_argnames=('axis_name', 'num_rows'))
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


def _as_queries(features, bank, index, temperature, axis_name):
  """`_as_data` with the features over τ, whose products with the rows are logits."""
  queries, bank, index = _as_data(features, bank, index, axis_name)
  queries = queries / temperature
  if bank.dtype.itemsize == 2:
    bits = jnp.finfo(bank.dtype)
    queries = lax.reduce_precision(queries, bits.nexp, bits.nmant)
  return queries, bank, index


def _with_gradient(loss, gradient, features):
  """`loss` [B] with derivative `gradient` with respect to `features` [B, D]: adds zero."""
  return loss + jnp.sum((features - lax.stop_gradient(features)) * gradient, axis=1)


def _positive(queries, bank, index, axis_name):
  """The images' own rows [B, D] and logits [B]; zero where another device owns the row."""
  local, owned = bank_lib.locate(bank, index, axis_name)
  positive = jnp.where(owned[:, None], bank[local].astype(queries.dtype), 0)
  return positive, jnp.sum(queries * positive, axis=1)


def _combine(peak, total, weighted, axis_name):
  """Partial sums of all devices -> logsumexp [B], and this device's share of Σ_j p_j V_j."""
  if axis_name is None:
    return peak + jnp.log(total), weighted / total[:, None]
  shrink = 1
  if peak.ndim:  # else it is the same on all devices
    device_peak, peak = peak, lax.pmax(peak, axis_name)
    shrink = jnp.exp(device_peak - peak)
  total = lax.psum(shrink * total, axis_name)
  return peak + jnp.log(total), weighted * (shrink / total)[:, None]


def _to_owner(partials, axis_name):
  """Sums ([B], [B, D]) over devices; each keeps its own part of the batch."""
  if axis_name is None:
    return partials
  scalar, vector = partials
  packed = _to_owners(jnp.concatenate([scalar[:, None], vector], axis=1), axis_name)
  return packed[:, 0], packed[:, 1:]


def _to_owners(partial, axis_name):
  """[B, F] summed over devices; each keeps its own part of the batch."""
  if axis_name is None:
    return partial
  return lax.psum_scatter(partial, axis_name, scatter_dimension=0, tiled=True)


def _own(x, features, axis_name):
  """This device's part of an array [B] that every device holds in full."""
  if axis_name is None:
    return x
  size = features.shape[0]
  return lax.dynamic_slice_in_dim(x, lax.axis_index(axis_name) * size, size)


class _Noise(NamedTuple):
  """The noise rows of b queries, as far as this device owns them.

  Attributes:
    logit: [b, M], of which only those that are owned mean anything.
    owned: [b, M].
    weigh: (weight [b, M], 0 where not owned) -> Σ_m weight_m · row_m, [b, D].
  """
  logit: jax.Array
  owned: jax.Array
  weigh: Callable[[jax.Array], jax.Array]


def _over_noise(fn, bank, noise_index, axis_name, most_held, per_query):
  """`fn(noise, *rest)` [b, ...] of all queries, some at a time, so that its arrays stay small.

  Args:
    fn: (_Noise, arrays [b, ...]) -> a tree of arrays [b, ...].
    bank: the local rows.
    noise_index: [B, M] or [M].
    axis_name: mesh axis, or None.
    most_held: see the losses.
    per_query: (queries [B, D], further arrays [B, ...] for `fn`).
  """
  batch, (n, dim) = per_query[0].shape[0], bank.shape
  shared = noise_index.ndim == 1
  # A gather reads B·M rows; products with all rows of the shard read each of them once.
  dense = not shared and noise_index.size > n
  held = n if dense else noise_index.shape[-1] * (1 if shared else dim)

  def part(arrays):
    index, queries, *rest = arrays
    noise = _noise(queries, bank, noise_index if shared else index, axis_name, dense)
    return fn(noise, *rest)

  arrays = (jnp.arange(batch) if shared else noise_index, *per_query)
  return in_chunks(part, arrays, max(1, most_held // max(1, held)))


def _noise(queries, bank, noise_index, axis_name, dense) -> _Noise:
  """Scores the noise rows of some queries: gathered, or among all rows of the device."""
  local, owned = bank_lib.locate(bank, noise_index, axis_name)
  if noise_index.ndim == 1:
    rows = bank[local]
    logit = score_rows(queries, rows)
    return _Noise(logit, jnp.broadcast_to(owned, logit.shape),
                  lambda weight: dot(weight, rows, (((1,), (0,)), ((), ()))))
  if not dense:
    rows = bank[local]
    return _Noise(dot(queries, rows, (((1,), (2,)), ((0,), (0,)))), owned,
                  lambda weight: dot(weight, rows, (((1,), (1,)), ((0,), (0,)))))

  def weigh(weight):
    slots = jnp.arange(weight.shape[0])[:, None]
    spread = jnp.zeros((weight.shape[0], bank.shape[0]), weight.dtype).at[slots, local].add(weight)
    return dot(spread, bank, (((1,), (0,)), ((), ())))

  return _Noise(jnp.take_along_axis(score_rows(queries, bank), local, axis=1), owned, weigh)
