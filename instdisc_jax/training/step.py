"""The training step: one per-device program, mapped over the mesh.

    device k holds   the replicated state, its rows of the bank, and B / devices images of the batch

Random numbers depend on (seed, place in the chain of images, image index), never on the device, so
with synchronized batch norm the number of devices affects only the speed.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
import optax

from instdisc_jax import bank as bank_lib
from instdisc_jax import config as config_lib
from instdisc_jax import linalg, losses, threefry
from instdisc_jax.data import feeds, views
from instdisc_jax.runtime.mesh import AXIS, on_cpu
from instdisc_jax.training.state import SPECS, Setup, TrainState

Metrics = dict[str, jax.Array]


def train_step(state: TrainState, batch: feeds.Batch, *,
               setup: Setup) -> tuple[TrainState, Metrics]:
  """One device's part of a step: augment -> encode -> loss with bank -> update. Pure.

  Args:
    state: the training state, its bank being this device's rows.
    batch: this device's part: 'index' [B / devices], and 'image' or 'view' [B / devices, H, W, 3]
      uint8, see `data.feeds`.
    setup: the fixed parts of the run.

  Returns:
    (state, metrics): metrics are scalars over the global batch, see `update`.
  """
  config, index, num_rows = setup.config, batch['index'], setup.num_rows
  # Where places wrap around, only the index tells two visits apart.
  place = views.places(state.step, config.batch_size, index.size, AXIS)
  visited = None
  if config.loss.proximal_weight and not setup.inherits_rows:
    visited = _visited(place, index, num_rows) | (state.step > num_rows // config.batch_size)
  with jax.named_scope('augmentation'):
    images = _views(config, place, batch, setup.wide)

  def encode(params, batch_stats, images):
    features, updated = setup.encoder.apply(
        {'params': params, 'batch_stats': batch_stats}, images, train=True, mutable=['batch_stats'])
    batch_stats = updated.get('batch_stats', {})
    if not config.model.sync_batch_norm:  # each device saw only its own part: average them
      batch_stats = lax.pmean(batch_stats, AXIS)
    return features, batch_stats

  noise_index = _draw_noise(setup, state.step, index)
  return update(state, (images, index, noise_index), visited=visited, encode=encode,
                optimizer=setup.optimizer, config=config, num_rows=num_rows, axis_name=AXIS,
                reduce_dtype=setup.reduce_dtype, kernel=setup.kernel.name,
                unroll=on_cpu(setup.mesh))


def _visited(place, index, num_rows):
  """Whether images at these places were in an earlier batch [b], in the first two epochs.

  In the batch in which the first epoch ends, an image's first and second visit may meet.
  """
  first = bank_lib.gather(jnp.where(place < num_rows, index, -1), AXIS)
  return (place >= num_rows) & (index[:, None] != first).all(axis=1)


def _views(config, place, batch, dtype):
  """Random views of a device's images: [b, H, W, 3], or [b, 2, H, W, 3] of two views."""
  key = functools.partial(views.key, config.seed, place, batch['index'])
  draw = functools.partial(views.draw, config, cropped='view' in batch, dtype=dtype)
  if config.loss.views == 1:
    return draw(key(), batch['view' if 'view' in batch else 'image'])
  images = (batch['view'][:, 0], batch['view'][:, 1]) if 'view' in batch else [batch['image']] * 2
  return jnp.stack([draw(key(view), part) for view, part in enumerate(images)], axis=1)


def _draw_noise(setup, step, index):
  """Noise rows of the global batch: [B, M], or [M] if all images share them; None if unused."""
  loss, num_rows = setup.config.loss, setup.num_rows
  if not config_lib.draws_noise(loss):
    return None
  key = threefry.key(setup.config.seed, threefry.NOISE)
  if loss.shared_noise:
    return bank_lib.shared_noise(key, step, loss.noise_count, num_rows)
  return bank_lib.noise(key, step, bank_lib.gather(index, AXIS), loss.noise_count, num_rows)


def update(state: TrainState, inputs: tuple[Any, Int[Array, ' B'], Int[Array, '*B M'] | None], *,
           config: config_lib.Config, encode: Callable, optimizer: optax.GradientTransformation,
           num_rows: int, visited: Bool[Array, ' B'] | None = None, axis_name: str | None = None,
           reduce_dtype: Any = None, kernel: str = 'xla',
           unroll: bool = True) -> tuple[TrainState, Metrics]:
  """The method itself: one step on the parameters, the bank and Z, for any encoder.

  With `config.accumulate_steps` the batch goes through the encoder in parts; parameters and bank
  are updated once, from all of them. Every part sees the bank as it was before the step; batch-norm
  statistics and Z are updated from part to part.

  Args:
    state: the state before the step.
    inputs: (images [B, ...], whatever `encode` takes, or [B, 2, ...] for two views; index [B],
      their rows; noise_index [B, M] or [M], noise rows of the global batch, or None). With
      `axis_name`, the first two are local.
    config: uses `loss`, `bank.momentum`, `batch_size` and `accumulate_steps` (a divisor of B).
    encode: (params, batch_stats, images) -> (features [B, D] unit-norm, new batch_stats).
    optimizer: an optax transformation.
    num_rows: the true N.
    visited: [B], local, whether an image's row holds features of it; the proximal term leaves out
      others. None if all do.
    axis_name: mesh axis, or None.
    reduce_dtype: dtype in which gradients are summed over the axis; by default their own.
    kernel: how the softmax passes over the bank, see `kernels`.
    unroll: whether to unroll the loop over the parts; for CPUs.

  Returns:
    (state, metrics): 'loss', 'grad_norm', 'feature_mean_norm' (1 if all features are identical),
    'alignment' (mean squared distance of the features from their rows before the step), and where
    applicable 'proximal_penalty', 'normalizer', 'normalizer_drift' (log of this batch's estimate
    over the Z in use).
  """
  loss, accumulate_steps = config.loss, config.accumulate_steps
  shared: Any = dict(axis_name=axis_name, num_rows=num_rows)
  objective = functools.partial(_objective, state=state, encode=encode, config=config,
                                kernel=kernel, **shared)
  params = state.params
  if axis_name is not None:  # each device differentiates its own copy, and they are summed once
    params = jax.tree.map(lambda x: lax.pcast(x, axis_name, to='varying'), params)

  def part(carry, inputs):
    batch_stats, normalizer, total = carry
    # The mean over devices is inside the objective: summed over them, these are gradients of the
    # global loss.
    grads, (features, per_image, batch_stats, normalizer, metrics) = jax.grad(
        objective, has_aux=True)(params, batch_stats, normalizer, *inputs)
    total = jax.tree.map(jnp.add, total, grads)
    return (batch_stats, normalizer, total), (features, per_image, metrics)

  zeros = jax.tree.map(jnp.zeros_like, params)
  scan = _unrolled_scan if unroll or accumulate_steps == 1 else lax.scan
  (batch_stats, normalizer, grads), (features, per_image, metrics) = scan(
      part, (state.batch_stats, state.normalizer, zeros),
      _in_parts((*inputs, visited), accumulate_steps))
  grads = jax.tree.map(lambda g: _sum(g / accumulate_steps, axis_name, reduce_dtype), grads)
  metrics = {name: value.mean() for name, value in metrics.items()}
  metrics['grad_norm'] = optax.tree.norm(grads)
  index = _after(inputs[1], sum(metrics.values()))
  with jax.named_scope('update'):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    features, classifier = _whole(features), state.classifier
    if classifier is not None:
      gradient = losses.class_weights_gradient(
          features, classifier['weights'], index, _whole(per_image),
          temperature=loss.temperature, block_rows=loss.block_rows, **shared)
      classifier = _update_classifier(classifier, gradient, optimizer, state.step)
    bank, metrics['alignment'] = bank_lib.move(
        state.bank, index, features, momentum=config.bank.momentum, axis_name=axis_name)
    return TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        bank=bank,
        normalizer=normalizer, classifier=classifier), metrics


def _objective(params, batch_stats, normalizer, images, index, noise_index, visited, *, state,
               encode, config, kernel, **shared):
  """(the global loss, (features, loss per image, batch_stats, Z, metrics)) of a part of a batch.

  Two views of b images go through the encoder together, as [view 1; view 2]: [2 b, ...].
  """
  loss, count = config.loss, len(index)
  mean = functools.partial(_mean, axis_name=shared['axis_name'])
  if loss.views == 2:
    images = images.swapaxes(0, 1).reshape(2 * count, *images.shape[2:])
    index = jnp.concatenate([index, index])
  features, batch_stats = encode(params, batch_stats, images)
  per_image, normalizer, metrics = _loss(features, index, noise_index, normalizer, state=state,
                                         config=config, kernel=kernel, **shared)
  metrics['feature_mean_norm'] = mean_norm(features, shared['axis_name'])
  value = mean(per_image)
  if loss.proximal_weight:
    penalty = losses.proximal_penalty(features, state.bank, index, **shared)
    if visited is not None:
      penalty = jnp.where(jnp.tile(visited, loss.views), penalty, 0)
    penalty = mean(penalty)
    value += loss.proximal_weight * penalty
    metrics['proximal_penalty'] = penalty
  if loss.views == 2:
    features = linalg.normalize(features[:count] + features[count:])
  return value, (features, per_image, batch_stats, normalizer, metrics | {'loss': value})


def _loss(features, index, noise_index, normalizer, *, state, config, kernel, **shared):
  """(loss [B], Z, metrics) of the configured loss."""
  loss, bank = config.loss, state.bank
  tempered = shared | {'temperature': loss.temperature}
  match loss.name:
    case 'softmax':
      near = _near(features, index, bank, state.step, config, **shared)
      value = losses.softmax_loss(features, bank, index, near=near, kernel=kernel,
                                  block_rows=loss.block_rows, **tempered)
      if loss.views == 2:
        value += losses.other_view_loss(features, temperature=loss.temperature,
                                        axis_name=shared['axis_name'])
    case 'parametric_softmax':  # its weights have any norm
      value = losses.softmax_loss(features, state.classifier['weights'], index, largest_norm=None,
                                  block_rows=loss.block_rows, **tempered)
    case 'sampled_softmax':
      value = losses.sampled_softmax_loss(features, bank, index, noise_index, **tempered)
    case 'nce':
      columns = features, bank, index, noise_index
      estimate = losses.estimate_normalizer(*columns, **tempered).astype(normalizer.dtype)
      normalizer = _next_normalizer(loss, normalizer, estimate)
      value = losses.nce_loss(*columns, normalizer=normalizer, **tempered)
      return value, normalizer, {'normalizer': normalizer,
                                 'normalizer_drift': jnp.log(estimate / normalizer)}
    case 'triplet':
      if loss.mining != 'sampled':
        noise_index = losses.nearest(features, bank, index, count=1,
                                     below_own=loss.mining == 'semi_hard', **shared)
      value = losses.triplet_loss(features, bank, index, noise_index, margin=loss.margin, **shared)
    case _:
      raise ValueError(f'unknown loss {loss.name}')
  return value, normalizer, {}


def _near(features, index, bank, step, config, num_rows, axis_name):
  """The rows near each image [B, K]: further positives, from their epoch on; None if unused."""
  count = config.loss.neighbors
  if not count:
    return None
  first = math.ceil(config.loss.neighbors_from_epoch * num_rows / config.batch_size)
  search = lambda: losses.nearest(features, bank, index, count=count, axis_name=axis_name,
                                  num_rows=num_rows)
  none = jnp.full(jax.eval_shape(search).shape, -1, jnp.int32)
  if axis_name is not None:
    none = lax.pcast(none, axis_name, to='varying')
  return lax.cond(step >= first, search, lambda: none)


def _mean(x, axis_name):
  """The mean over the global batch."""
  return jnp.mean(x) if axis_name is None else lax.pmean(jnp.mean(x), axis_name)


def _sum(gradient, axis_name, dtype):
  """A gradient summed over the devices, in `dtype`."""
  if axis_name is None:
    return gradient
  return lax.psum(gradient.astype(dtype or gradient.dtype), axis_name).astype(gradient.dtype)


def _update_classifier(classifier, gradient, optimizer, step):
  """The class weights after an update by the encoder's optimizer; their momentum is sharded."""
  weights = classifier['weights']
  opt_state = optax.tree.set(optimizer.init(weights), trace=classifier['momentum'], count=step)
  updates, opt_state = optimizer.update(gradient.astype(weights.dtype), opt_state, weights)
  return {'weights': optax.apply_updates(weights, updates),
          'momentum': optax.tree.get(opt_state, 'trace')}


def mean_norm(features: Float[Array, 'B D'], axis_name: str | None) -> Float[Array, '']:
  """‖mean of the unit vectors over the global batch‖: 1 if identical, near 0 if spread out."""
  mean = lax.stop_gradient(features).mean(axis=0)
  return jnp.linalg.norm(mean if axis_name is None else lax.pmean(mean, axis_name))


def _after(index, metric):
  """`index`, made to depend on `metric`.

  Every read of the bank contributes to the metrics. If XLA knows that all reads precede the update
  of the rows, it updates them in place; otherwise it copies the bank. (It ignores an
  `optimization_barrier` here.)
  """
  never = (metric > 1) & (metric < -1)
  return index + never.astype(index.dtype)


def _unrolled_scan(body, carry, inputs):
  """`lax.scan` without a loop.

  Not `lax.scan(..., unroll=True)`: that leaves a loop of one iteration, and XLA:CPU uses its fast
  kernels only for convolutions that were never inside a loop.
  """
  outputs = []
  for i in range(len(jax.tree.leaves(inputs)[0])):
    carry, output = body(carry, jax.tree.map(lambda x: x[i], inputs))
    outputs.append(output)
  return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def _in_parts(inputs, num_parts):
  """(images, index, noise_index, visited) with a leading axis of parts.

  Part p has the places p, p + num_parts, ... of the batch: the same images whatever the devices.
  """
  images, index, noise_index, visited = inputs
  split = lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1)
  if noise_index is not None:  # of the global batch; a device's images are a multiple of the parts
    noise_index = (split(noise_index) if noise_index.ndim == 2
                   else jnp.broadcast_to(noise_index, (num_parts, noise_index.size)))
  return split(images), split(index), noise_index, None if visited is None else split(visited)


def _whole(parts):
  """[parts, b, ...] -> [parts · b, ...], in the order of the batch, see `_in_parts`."""
  return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def _next_normalizer(loss, normalizer, estimate):
  """Z for this step; the state holds 0 before the first step."""
  if loss.normalizer == 'first_batch':
    return jnp.where(normalizer > 0, normalizer, estimate)
  if loss.normalizer == 'ema':
    decay = loss.normalizer_decay
    return jnp.where(normalizer > 0, decay * normalizer + (1 - decay) * estimate, estimate)
  return jnp.full_like(normalizer, float(loss.normalizer))


def train_steps(state: TrainState, inputs: Any, num_steps: Int[Array, ''], *, step_fn: Callable,
                take: Callable) -> tuple[TrainState, Metrics]:
  """Several steps in one dispatch.

  Args:
    state: the state before them.
    inputs: the feed's inputs on the device: up to S batches.
    num_steps: number of batches to use, 1..S.
    step_fn: (state, batch) -> (state, metrics).
    take: (inputs, i) -> the i-th batch.

  Returns:
    (state, metrics): each metric [S], of which the first `num_steps` are filled.
  """
  most = inputs[1].shape[0]
  if most == 1:  # no loop: XLA:CPU differentiates convolutions far more slowly inside one
    state, metrics = step_fn(state, take(inputs, 0))
    return state, jax.tree.map(lambda x: x[None], metrics)

  def body(i, carry):
    state, history = carry
    state, metrics = step_fn(state, take(inputs, i))
    return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, metrics)

  shapes = jax.eval_shape(lambda: step_fn(state, take(inputs, 0))[1])
  history = jax.tree.map(lambda s: jnp.zeros(most, s.dtype), shapes)
  return lax.fori_loop(0, num_steps, body, (state, history))


def over_mesh(setup: Setup, feed: Any, step_fn: Callable = train_step) -> Any:
  """`train_steps` over the mesh, compiled once, with the state donated.

  Args:
    setup: the fixed parts of the run.
    feed: a feed or its class, see `data.feeds`.
    step_fn: (state, batch, setup) -> (state, metrics).

  Returns:
    A jitted (state, inputs of the feed, num_steps) -> (state, metrics).
  """
  steps = functools.partial(train_steps, step_fn=functools.partial(step_fn, setup=setup),
                            take=feed.take)
  # The log-sum-exp of cuDNN's attention must not be rounded to 16 bits, see `kernels.cudnn`.
  options: Any = {'xla_allow_excess_precision': True} if setup.kernel.name == 'cudnn' else None
  return jax.jit(jax.shard_map(steps, mesh=setup.mesh, in_specs=(SPECS, feed.specs, P()),
                               out_specs=(SPECS, P())), donate_argnums=0, compiler_options=options)
