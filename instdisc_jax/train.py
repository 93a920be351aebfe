"""The training state, the step, and the loop around it.

The step is one per-device program, mapped over a one-axis mesh:

    device k holds   params, batch_stats, opt_state, normalizer, step   (the same on all)
                     bank rows k·n .. (k+1)·n - 1                       (its own)
                     B / devices images of the batch                    (its own)

Random numbers come from (seed, place in the chain of images, image index), never from a device's
position, so the number of devices changes nothing but the speed (with synchronised batch norm).
"""

import contextlib
import dataclasses
import functools
import math
import time
from typing import Any

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from instdisc_jax import augment, errors, losses, profiling
from instdisc_jax import bank as bank_lib
from instdisc_jax.data import resident, stream

AXIS = 'data'
VIEW_SIDE = 224  # of views where images have different sizes and no size is set
_ALIKE = 0.99  # norm of the mean embedding from which on an encoder counts as collapsed
_INIT, AUGMENT, _NOISE = range(3)  # the run's independent streams of random numbers

_LOSSES = {
    'softmax': losses.softmax_loss,
    'nce': losses.nce_loss,
    'sampled_softmax': losses.sampled_softmax_loss,
    'parametric_softmax': losses.softmax_loss,  # of the class weights, not of the bank
}
_SAMPLED = ('nce', 'sampled_softmax')
LOSS_NAMES = tuple(_LOSSES)


class TrainState(flax.struct.PyTreeNode):
  """Everything that changes during training; with the config it is the whole checkpoint.

  Attributes:
    step: int32 scalar, optimiser steps taken.
    params: of the encoder, replicated.
    batch_stats: running batch-norm statistics, replicated.
    opt_state: of the optimiser, replicated.
    bank: [N padded to a multiple of the device count, D], rows sharded over the mesh.
    normalizer: scalar, NCE's Z; 0 until it is first estimated.
    classifier: of the parametric softmax, sharded like the bank: {'weights', 'momentum'}; else
      None.
  """
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  bank: jax.Array
  normalizer: jax.Array
  classifier: Any = None


STATE_SPECS = TrainState(step=P(), params=P(), batch_stats=P(), opt_state=P(), bank=P(AXIS),
                         normalizer=P(), classifier=P(AXIS))


def make_mesh(devices=None):
  """The one-axis mesh over `devices` (by default all that JAX shows)."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), (AXIS,), devices=devices,
                       axis_types=(jax.sharding.AxisType.Auto,))


def on_cpu(mesh):
  """Whether the devices are CPUs."""
  return mesh.devices.flat[0].platform == 'cpu'


def total_steps(config, num_rows):
  """Steps of the whole run: `config.steps`, or what completes `config.epochs`."""
  if config.steps is not None:
    return config.steps
  return math.ceil(config.epochs * num_rows / config.batch_size)


def learning_rate_schedule(config, num_rows):
  """Step -> learning rate: divided at each milestone, in epochs (epoch of step t = t·B // N).

  With the schedule `cosine` it rises over `warmup_epochs` and falls to 0 at the end of the run.
  """
  if config.optimizer.schedule == 'cosine':
    end = total_steps(config, num_rows)
    warmup = math.ceil(config.optimizer.warmup_epochs * num_rows / config.batch_size)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else config.optimizer.learning_rate, config.optimizer.learning_rate,
        min(warmup, end - 1), end)
  boundaries = {math.ceil(epoch * num_rows / config.batch_size): config.optimizer.milestone_factor
                for epoch in config.optimizer.milestones}
  return optax.piecewise_constant_schedule(config.optimizer.learning_rate, boundaries)


def make_optimizer(config, num_rows):
  """SGD with momentum and weight decay on all parameters, as published (PyTorch's SGD)."""
  return optax.chain(
      optax.add_decayed_weights(config.optimizer.weight_decay),
      optax.sgd(learning_rate_schedule(config, num_rows), momentum=config.optimizer.momentum))


def make_init(config, encoder, optimizer, num_rows, image_shape, mesh):
  """What makes a fresh `TrainState`, born in its shardings; compiled at its first call.

  Args:
    config: the run's configuration.
    encoder: a Linen module.
    optimizer: an optax transformation.
    num_rows: N.
    image_shape: (H, W, 3).
    mesh: the device mesh.

  Returns:
    () -> the state; the same numbers whatever the mesh.
  """
  def init():
    params_key, bank_key = jax.random.split(_stream(config, _INIT))
    variables = encoder.init(params_key, jnp.zeros((2, *image_shape)), train=False)
    bank = bank_lib.init(bank_key, num_rows, config.model.embedding_dim,
                         unit=config.bank.init == 'unit', dtype=config.bank.dtype)
    classifier = None
    if config.loss.name == 'parametric_softmax':
      weights = pad_rows(bank_lib.init(jax.random.fold_in(bank_key, 1), *bank.shape, unit=True,
                                       dtype=_wide(config)), mesh.size)
      classifier = {'weights': weights, 'momentum': jnp.zeros_like(weights)}
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=variables['params'],
        batch_stats=variables.get('batch_stats', {}), opt_state=optimizer.init(variables['params']),
        bank=pad_rows(bank, mesh.size), normalizer=jnp.zeros((), _wide(config)),
        classifier=classifier)

  # XLA:CPU spends seconds on optimising the random numbers of every layer; this runs once.
  options = {'xla_backend_optimization_level': 0} if on_cpu(mesh) else None
  return jax.jit(init, out_shardings=state_shardings(mesh, jax.eval_shape(init)),
                 compiler_options=options)


def view_size(config, image_shape):
  """(height, width) of the views: `augment.size`, or that of the images; see `VIEW_SIDE`."""
  if config.augment.size is not None:
    return (config.augment.size,) * 2
  return (VIEW_SIDE,) * 2 if image_shape is None else tuple(image_shape[:2])


def state_shardings(mesh, state):
  """`STATE_SPECS` spelt out for every array of `state`, on `mesh`."""
  return jax.tree.map(
      lambda spec, part: jax.tree.map(lambda _: NamedSharding(mesh, spec), part),
      STATE_SPECS, state, is_leaf=lambda x: isinstance(x, P))


def pad_rows(bank, num_devices):
  """[N, D] -> [N', D], N' the next multiple of the device count."""
  return jnp.pad(bank, ((0, -bank.shape[0] % num_devices), (0, 0)))


def train_step(state, batch, *, config, encoder, optimizer, num_rows, unroll=True, cropped=False):
  """One device's part of a step: augment -> encode -> loss with bank -> update. Pure.

  Args:
    state: `TrainState`, the bank being this device's rows.
    batch: this device's part: 'image' [B / devices, H, W, 3] uint8 and 'index' [B / devices].
    config: the run's configuration, static.
    encoder: a Linen module.
    optimizer: an optax transformation.
    num_rows: the true N.
    unroll: whether accumulated parts are written out, not looped over; for CPUs.
    cropped: whether the images are views already, cropped and resized by the host.

  Returns:
    (state, metrics): metrics are scalars over the global batch, see `update`.
  """
  index = batch['index']
  # Places in the chain of images; they wrap around at 2^32, where only the index tells them apart.
  first = lax.axis_index(AXIS).astype(jnp.uint32) * index.size
  slot = first + jnp.arange(index.size, dtype=jnp.uint32)
  place = state.step.astype(jnp.uint32) * jnp.uint32(config.batch_size) + slot
  key = jax.vmap(jax.random.fold_in)(
      jax.vmap(jax.random.fold_in, (None, 0))(_stream(config, AUGMENT), place), index)
  size = None if cropped else view_size(config, batch['image'].shape[1:])
  strengths = {name: value for name, value in config.augment.items() if name != 'size'}
  images = augment.augment(key, batch['image'], size=size, dtype=_wide(config), **strengths)

  noise_index, noise_key = None, _stream(config, _NOISE)
  if config.loss.name in _SAMPLED and config.loss.shared_noise:
    noise_index = bank_lib.shared_noise(noise_key, state.step, config.loss.noise_count, num_rows)
  elif config.loss.name in _SAMPLED:
    noise_index = bank_lib.noise(noise_key, state.step, bank_lib.gather(index, AXIS),
                                 config.loss.noise_count, num_rows)

  def encode(params, batch_stats, images):
    features, updated = encoder.apply({'params': params, 'batch_stats': batch_stats}, images,
                                      train=True, mutable=['batch_stats'])
    batch_stats = updated.get('batch_stats', {})
    if not config.model.sync_batch_norm:  # each device has seen its own part: keep their mean
      batch_stats = lax.pmean(batch_stats, AXIS)
    return features, batch_stats

  return update(state, images, index, noise_index, encode=encode, optimizer=optimizer,
                loss=config.loss, bank_momentum=config.bank.momentum, num_rows=num_rows,
                axis_name=AXIS, accumulate_steps=config.accumulate_steps, unroll=unroll)


def update(state, images, index, noise_index, *, encode, optimizer, loss, bank_momentum, num_rows,
           axis_name=None, accumulate_steps=1, unroll=True):
  """The method itself: one step on the parameters, the bank and Z, for any encoder.

  With `accumulate_steps` the batch goes through the encoder in parts; parameters and bank are
  updated once, from all of them. Every part sees the bank as it was before the step; batch-norm
  statistics and Z move from part to part.

  Args:
    state: `TrainState`.
    images: [B, ...], whatever `encode` takes (local part, with `axis_name`).
    index: [B] rows of the images (local part, with `axis_name`).
    noise_index: [B, M] noise rows of the global batch, or [M]; None for a full softmax.
    encode: (params, batch_stats, images) -> (features [B, D] unit-norm, new batch_stats).
    optimizer: an optax transformation.
    loss: name, temperature, normalizer, normalizer_decay, proximal_weight, block_rows.
    bank_momentum: m.
    num_rows: the true N.
    axis_name: mesh axis, or None.
    accumulate_steps: parts of the batch; divides B.
    unroll: whether they are written out, not looped over.

  Returns:
    (state, metrics): 'loss', 'grad_norm', 'feature_mean_norm' (1 where all features are alike), and
    where they apply 'proximal_penalty', 'normalizer', 'normalizer_drift' (log of this batch's
    estimate over the Z in use).
  """
  mean = lambda x: jnp.mean(x) if axis_name is None else lax.pmean(jnp.mean(x), axis_name)
  shared = dict(axis_name=axis_name, num_rows=num_rows)
  parametric = loss.name == 'parametric_softmax'
  rows = state.classifier['weights'] if parametric else state.bank

  def objective(params, batch_stats, normalizer, images, index, noise_index):
    features, batch_stats = encode(params, batch_stats, images)
    metrics, columns = {}, (features, rows, index)
    kwargs = dict(temperature=loss.temperature, **shared)
    if loss.name in _SAMPLED:
      columns += (noise_index,)
    else:
      kwargs['block_rows'] = loss.block_rows
    if loss.name == 'nce':
      estimate = losses.estimate_normalizer(*columns, **kwargs).astype(normalizer.dtype)
      normalizer = _next_normalizer(loss, normalizer, estimate)
      metrics |= {'normalizer': normalizer, 'normalizer_drift': jnp.log(estimate / normalizer)}
      kwargs['normalizer'] = normalizer
    metrics['feature_mean_norm'] = _mean_norm(features, axis_name)
    per_image = _LOSSES[loss.name](*columns, **kwargs)
    value = mean(per_image)
    if loss.proximal_weight:
      penalty = mean(losses.proximal_penalty(features, state.bank, index, **shared))
      value += loss.proximal_weight * penalty
      metrics['proximal_penalty'] = penalty
    return value, (features, per_image, batch_stats, normalizer, metrics | {'loss': value})

  def part(carry, inputs):
    batch_stats, normalizer, total = carry
    # The mean over devices lies inside the objective, so these are gradients of the global loss.
    grads, (features, per_image, batch_stats, normalizer, metrics) = jax.grad(
        objective, has_aux=True)(state.params, batch_stats, normalizer, *inputs)
    total = jax.tree.map(jnp.add, total, grads)
    return (batch_stats, normalizer, total), (features, per_image, metrics)

  inputs = _in_parts((images, index, noise_index), accumulate_steps, axis_name)
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  scan = _written_out_scan if unroll or accumulate_steps == 1 else lax.scan
  (batch_stats, normalizer, grads), (features, per_image, metrics) = scan(
      part, (state.batch_stats, state.normalizer, zeros), inputs)
  grads = jax.tree.map(lambda g: g / accumulate_steps, grads)
  metrics = {name: value.mean() for name, value in metrics.items()}
  metrics['grad_norm'] = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  index, features = _after(index, sum(metrics.values())), features.reshape(index.size, -1)
  classifier = state.classifier
  if parametric:
    gradient = losses.class_weights_gradient(
        features, rows, index, per_image.reshape(-1), temperature=loss.temperature,
        block_rows=loss.block_rows, **shared)
    classifier = _update_classifier(classifier, gradient, optimizer, state.step)
  return TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      batch_stats=batch_stats,
      opt_state=opt_state,
      bank=bank_lib.update(state.bank, index, features, momentum=bank_momentum,
                           axis_name=axis_name),
      normalizer=normalizer, classifier=classifier), metrics


def _update_classifier(classifier, gradient, optimizer, step):
  """The class weights after a step of the encoder's optimiser; what it keeps of them is sharded."""
  weights = classifier['weights']
  opt_state = optax.tree.set(optimizer.init(weights), trace=classifier['momentum'], count=step)
  updates, opt_state = optimizer.update(gradient.astype(weights.dtype), opt_state, weights)
  return {'weights': optax.apply_updates(weights, updates),
          'momentum': optax.tree.get(opt_state, 'trace')}


def _mean_norm(features, axis_name):
  """‖mean of the unit vectors v_i over the global batch‖: 1 if they are alike, near 0 if spread."""
  mean = lax.stop_gradient(features).mean(axis=0)
  return jnp.linalg.norm(mean if axis_name is None else lax.pmean(mean, axis_name))


def _after(index, metric):
  """`index`, but not before `metric` is known.

  All that reads the bank goes into the metrics; if it is known to come before the rows are written
  they are written in place, else XLA copies the bank. (It ignores an `optimization_barrier` here.)
  """
  never = (metric > 1) & (metric < -1)
  return index + never.astype(index.dtype)


def _written_out_scan(body, carry, inputs):
  """`lax.scan` without a loop.

  Not `lax.scan(..., unroll=True)`: that leaves a loop of one round, and XLA:CPU prepares the
  convolutions in it for its fast kernels only if they are outside from the start.
  """
  outputs = []
  for i in range(len(jax.tree.leaves(inputs)[0])):
    carry, output = body(carry, jax.tree.map(lambda x: x[i], inputs))
    outputs.append(output)
  return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)


def _in_parts(inputs, num_parts, axis_name):
  """(images, index, noise_index) with a leading axis of parts; noise for that part of the batch."""
  images, index, noise_index = inputs
  split = lambda x: x.reshape(num_parts, -1, *x.shape[1:])
  if noise_index is not None and noise_index.ndim == 1:
    noise_index = jnp.broadcast_to(noise_index, (num_parts, noise_index.size))
  elif noise_index is not None:
    # The global batch lies device by device; a part has the same piece of every device's.
    num_devices = 1 if axis_name is None else lax.axis_size(axis_name)
    pieces = noise_index.reshape(num_devices, num_parts, -1, noise_index.shape[1])
    noise_index = pieces.swapaxes(0, 1).reshape(num_parts, -1, noise_index.shape[1])
  return split(images), split(index), noise_index


def _next_normalizer(loss, normalizer, estimate):
  """Z for this step; the state holds 0 before the first."""
  if loss.normalizer == 'first_batch':
    return jnp.where(normalizer > 0, normalizer, estimate)
  if loss.normalizer == 'ema':
    decay = loss.normalizer_decay
    return jnp.where(normalizer > 0, decay * normalizer + (1 - decay) * estimate, estimate)
  return jnp.full_like(normalizer, float(loss.normalizer))


def train_steps(state, images, index, num_steps, *, step_fn, resident=True):
  """Several steps in one dispatch, on images that lie on the device, or one on a batch.

  Args:
    state: `TrainState`.
    images: [N, H, W, 3] uint8, the whole data set; or, not `resident`, this device's part of the
      one batch there is then.
    index: [S, B / devices] this device's part of up to S batches.
    num_steps: scalar, how many of them to take, 1..S.
    step_fn: (state, batch) -> (state, metrics).
    resident: whether the images are the whole data set.

  Returns:
    (state, metrics): each metric [S], of which the first `num_steps` are filled.
  """
  pick = (lambda index: images[index]) if resident else lambda index: images
  step = lambda state, index: step_fn(state, {'image': pick(index), 'index': index})
  if index.shape[0] == 1:  # no loop: XLA:CPU differentiates convolutions far slower inside one
    state, metrics = step(state, index[0])
    return state, jax.tree.map(lambda x: x[None], metrics)

  def body(i, carry):
    state, history = carry
    state, metrics = step(state, index[i])
    return state, jax.tree.map(lambda h, m: h.at[i].set(m), history, metrics)

  shapes = jax.eval_shape(lambda: step(state, index[0])[1])
  history = jax.tree.map(lambda s: jnp.zeros(index.shape[:1], s.dtype), shapes)
  return lax.fori_loop(0, num_steps, body, (state, history))


def map_over_mesh(mesh, step_fn, resident=True):
  """`train_steps` over the mesh, compiled once, its state donated."""
  return jax.jit(
      jax.shard_map(functools.partial(train_steps, step_fn=step_fn, resident=resident), mesh=mesh,
                    in_specs=(STATE_SPECS, P() if resident else P(AXIS), P(None, AXIS), P()),
                    out_specs=(STATE_SPECS, P())),
      donate_argnums=0)


def _wide(config):
  """Type of what stays precise when `model.dtype` is not: float32, or float64."""
  return jnp.promote_types(config.model.dtype, jnp.float32)


def _stream(config, name):
  return jax.random.fold_in(jax.random.key(config.seed), name)


@dataclasses.dataclass
class Fitted:
  """What `fit` measured.

  Attributes:
    final_loss: of the last step, over the global batch; None if no step was left to take.
    images_per_second: without compilation and evaluation; None if too few steps were taken.
  """
  final_loss: float | None = None
  images_per_second: float | None = None


def make_feed(config, pictures, mesh):
  """Where the loop's batches come from: `resident.Resident`, `stream.Stream` or `stream.Fake`.

  Args:
    config: the run's configuration; `dataset.path` is 'resident' or 'stream'.
    pictures: `data.Pictures` to train on.
    mesh: the device mesh.
  """
  seed, batch_size = config.seed, config.batch_size
  if config.dataset.path == 'resident':
    per_dispatch = config.steps_per_dispatch or (1 if on_cpu(mesh) else 100)
    return resident.Resident(pictures, mesh, seed, batch_size, per_dispatch)
  side, = set(view_size(config, pictures.shape))
  if config.dataset.name.startswith('fake:'):
    return stream.Fake(pictures, mesh, seed=seed, batch_size=batch_size, side=side)
  return stream.Stream(
      pictures, mesh, seed=seed, crop_seed=(seed, AUGMENT), batch_size=batch_size,
      last_step=total_steps(config, len(pictures)), side=side,
      crop_scale=config.augment.crop_scale, crop_ratio=config.augment.crop_ratio,
      workers=stream.workers(config.dataset.workers))


def fit(state, feed, *, config, encoder, optimizer, num_rows, mesh, checkpoints, pending_losses,
        metrics, progress, trace, watch, evaluate, wall_clock):
  """Trains from `state.step` to the end of the run.

  Nothing is fetched from the devices between steps but the metrics of the dispatch before. Before
  a checkpoint is written all its numbers are known to be finite.

  Args:
    state: `TrainState`; donated.
    feed: see `make_feed`.
    config: the run's configuration.
    encoder: a Linen module.
    optimizer: an optax transformation.
    num_rows: N.
    mesh: the device mesh.
    checkpoints: `checkpoint.Checkpoints`.
    pending_losses: of the steps between the last line of metrics.jsonl and `state.step`.
    metrics: `metrics.Metrics`.
    progress: `metrics.Progress`.
    trace: `profiling.Trace`.
    watch: `preemption.Watch`.
    evaluate: state -> kNN top-1 or None, called at the end of epochs.
    wall_clock: () -> seconds since the run began.

  Returns:
    (state, `Fitted`).

  Raises:
    errors.RunError: a number that is not finite.
    errors.Stopped: a signal came; the state is saved.
  """
  run_steps = map_over_mesh(mesh, functools.partial(
      train_step, config=config, encoder=encoder, optimizer=optimizer, num_rows=num_rows,
      unroll=on_cpu(mesh), cropped=not feed.resident), feed.resident)
  schedule = learning_rate_schedule(config, num_rows)
  per_dispatch = feed.per_dispatch
  batch_size, end = config.batch_size, total_steps(config, num_rows)
  epoch_of = lambda step: step * batch_size // num_rows
  fitted = Fitted()
  losses_since_line, timer, alike = list(pending_losses), _Timer(), False
  costs, told = None, False

  def settle(dispatch):
    """Waits for a dispatch, checks and logs what it measured; whether a signal came before it."""
    nonlocal alike, told
    last_step, count, history, stop = dispatch
    history = {name: np.asarray(value)[:count] for name, value in history.items()}
    for name in ('feature_mean_norm', 'loss', 'grad_norm'):
      bad = np.flatnonzero(~np.isfinite(history[name]))
      if bad.size:
        raise errors.RunError(_not_finite(name, history[name][bad[0]],
                                          last_step - count + bad[0], checkpoints.latest_step()))
    timer.count(count * batch_size)
    losses_since_line.extend(history['loss'].tolist())
    fitted.final_loss = float(history['loss'][-1])
    progress.advance(last_step, epoch_of(last_step), fitted.final_loss, timer.rate())
    if costs.flops and timer.rate() is not None and not told:
      told = True
      progress.print(f'the first steps: {costs.utilisation(timer.rate() / batch_size)}')
    if is_logged(last_step):
      line = {name: float(value[-1]) for name, value in history.items()}
      line |= dict(epoch=epoch_of(last_step), loss=float(np.mean(losses_since_line)),
                   step_loss=fitted.final_loss, learning_rate=float(schedule(last_step - 1)),
                   images_per_second=timer.rate(), input_wait=timer.waiting_share(),
                   wall_seconds=wall_clock())
      losses_since_line.clear()
      metrics.write(last_step, **line)
      was_alike, alike = alike, line['feature_mean_norm'] > _ALIKE and epoch_of(last_step) > 0
      if alike and not was_alike:
        errors.warn(f'the embeddings of step {last_step} are nearly all alike: the norm of their '
                    f'mean is {line["feature_mean_norm"]:.4f}, of a working encoder well below 1: '
                    'try a smaller --config.optimizer.learning_rate or --config.loss.temperature')
    return bool(stop)

  ends_epoch = lambda step: step > 0 and epoch_of(step) > epoch_of(step - 1)
  into_epoch = lambda step: step - math.ceil(epoch_of(step) * num_rows / batch_size)
  is_logged = lambda step: (ends_epoch(step) or into_epoch(step) % config.log_every_steps == 0
                            or step == end)
  is_saved = lambda step: step % config.checkpoint.every_steps == 0 or step == end

  def is_evaluated(step):
    every = config.knn.every_epochs
    return every and ends_epoch(step) and epoch_of(step) // every > epoch_of(step - 1) // every

  def evaluate_and_tell(step):
    value = evaluate(state)
    text = f'epoch {epoch_of(step):4d}  step {step:6d}'
    if fitted.final_loss is not None:
      text += f'  loss {fitted.final_loss:.4f}'
    if value is not None:
      metrics.write(step, epoch=epoch_of(step), knn_top1=value)
      text += f'  kNN top-1 {value:.4f}'
    progress.print(text)

  step, running, stop = int(state.step), None, False
  watch.check()
  if is_evaluated(step) and step not in metrics.evaluated:  # a signal came in between
    evaluate_and_tell(step)
  while step < end:
    count = next(i for i in range(1, per_dispatch + 1)
                 if i == per_dispatch or is_logged(step + i) or is_saved(step + i))
    with timer.waiting():
      images, index = feed.at(step)
    if costs is None:
      run_steps, costs = _compile(run_steps, (state, images, index, count), mesh)
      progress.print(f'the step: {costs}')
    trace.before(step, state)
    state, history = run_steps(state, images, index, count)
    step += count
    if running is not None:
      stop = settle(running)  # while this dispatch computes
    running = step, count, history, watch.poll(mesh)
    if stop or is_evaluated(step) or is_saved(step):
      stop = settle(running) or stop
      running = None
      if is_evaluated(step) and not stop:
        try:
          evaluate_and_tell(step)
        except errors.Stopped:
          stop = True
      if stop or is_saved(step):
        _check_finite(state, checkpoints.latest_step())
        checkpoints.save(state, losses_since_line)
      if stop:
        raise errors.Stopped(f'stopped by {watch.name()} at step {step} of {end}, which is saved: '
                             'run the same command again to go on')
      timer.restart()
  fitted.images_per_second = timer.mean()
  return state, fitted


def _compile(run_steps, arguments, mesh):
  """(the program compiled for these arguments, `profiling.Costs`)."""
  start = time.monotonic()
  compiled = run_steps.lower(*arguments).compile()
  return compiled, profiling.Costs(compiled, time.monotonic() - start, mesh.devices.flat[0])


class _Timer:
  """Images per second and the share of time spent waiting for them, less compilation and pauses."""

  def __init__(self):
    self._mark = None
    self._images = self._seconds = self._waited = 0
    self._recent = None
    self._since_line = [0, 0]  # seconds waited, seconds

  @contextlib.contextmanager
  def waiting(self):
    """Around what waits for the input."""
    start = time.monotonic()
    yield
    if self._mark is not None:
      self._waited += time.monotonic() - start

  def count(self, images):
    """Called when `images` more have been trained on."""
    now = time.monotonic()
    if self._mark is not None:
      seconds = now - self._mark
      self._recent = images / seconds
      self._images += images
      self._seconds += seconds
      self._since_line[0] += self._waited
      self._since_line[1] += seconds
    self._mark, self._waited = now, 0

  def restart(self):
    """What happened since the last `count` is not counted."""
    if self._mark is not None:
      self._mark, self._waited = time.monotonic(), 0

  def rate(self):
    return self.mean() if self._recent is None else self._recent

  def mean(self):
    return self._images / self._seconds if self._seconds else None

  def waiting_share(self):
    """Of the time since this was asked last; None if none was counted."""
    (waited, seconds), self._since_line = self._since_line, [0, 0]
    return waited / seconds if seconds else None


def _check_finite(state, saved):
  """Raises `errors.RunError` if any number of the state is not finite, the bank's rows included."""
  fields = {name: part for name, part in vars(state).items() if name != 'step'}
  for name, row in jax.device_get(_first_bad_rows(fields)).items():
    if row >= 0:
      which = f'bank row {row}' if name == 'bank' else name
      raise errors.RunError(_not_finite(which, 'not a number or infinite', int(state.step), saved))


@jax.jit
def _first_bad_rows(fields):
  """{name: the first row of any of its arrays that holds a non-finite number, or -1}."""
  def first(x):
    bad = ~jnp.isfinite(x).reshape(x.shape[0] if x.ndim else 1, -1).all(axis=1)
    return jnp.where(bad.any(), jnp.argmax(bad), -1)
  rows = {name: [first(x) for x in jax.tree.leaves(part) if jnp.issubdtype(x.dtype, jnp.inexact)]
          for name, part in fields.items()}
  return {name: jnp.stack(found).max() for name, found in rows.items() if found}


def _not_finite(name, value, step, saved):
  kept = 'no checkpoint was written' if saved is None else f'the checkpoint of step {saved} is kept'
  return (f'{name} is {value} at step {step}, must be finite; {kept}: try a smaller '
          '--config.optimizer.learning_rate or a larger --config.loss.temperature')
