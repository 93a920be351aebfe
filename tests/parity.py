"""Deviations from the values of the published implementation: tests/golden and its README.md.

Each function returns `Deviation`s, which the tests compare with the tolerances of that README and
benchmarks/parity.py writes into docs/parity.md. All of them use public functions only.
"""

import contextlib
import functools
import json
import pathlib
from typing import NamedTuple
import zlib

import flax.linen as nn
import jax
from jax import lax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from instdisc_jax import bank as bank_lib
from instdisc_jax import config as config_lib
from instdisc_jax import convert, losses, models, neighbors
from instdisc_jax.evaluation import knn
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import optimizer as optimizer_lib
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import step as step_lib

GOLDEN = pathlib.Path(__file__).parent / 'golden'
EPSILON = 1e-7  # which the published NCE loss adds to its denominators


class Deviation(NamedTuple):
  """How far one quantity is from the published one.

  Attributes:
    file: of the golden values.
    quantity: name of the array there.
    setting: 'float32' or 'float64', the devices, and the kernel.
    largest: the largest deviation found, in the measure.
    tolerance: of the README.
    measure: 'abs', 'rel', 'of the largest', or 'differing entries'.
  """
  file: str
  quantity: str
  setting: str
  largest: float
  tolerance: float
  measure: str


class _Comparison:
  """Collects the deviations of one file."""

  def __init__(self, file, wide, num_devices, kernel='xla'):
    self.data = {key: value for key, value in np.load(GOLDEN / f'{file}.npz').items()}
    self.dtype = jnp.float64 if wide else jnp.float32
    self.deviations = {}
    self._file = file
    self._setting = (self.dtype.__name__ + (f', {num_devices} devices' if num_devices else '')
                     + (f', {kernel}' if kernel != 'xla' else ''))

  def float(self, name):
    """An array of the file in the precision of the comparison."""
    return jnp.asarray(self.data[name], self.dtype)

  def add(self, quantity, found, golden, tolerance, measure='abs'):
    """Keeps the larger deviation of a quantity that is added more than once."""
    found, golden = np.asarray(found, np.float64), np.asarray(golden, np.float64)
    assert found.shape == golden.shape, (quantity, found.shape, golden.shape)
    difference = np.abs(found - golden)
    scale = {'abs': 1, 'rel': np.abs(golden), 'of the largest': np.abs(golden).max()}
    if measure == 'differing entries':
      largest = float(np.sum(found != golden))
    else:
      largest = float(np.max(difference / scale[measure]))
    before = self.deviations.get(quantity)
    if before is None or not largest <= before.largest:
      self.deviations[quantity] = Deviation(self._file, quantity, self._setting, largest, tolerance,
                                            measure)


def _mapped(fn, num_devices, num_rows, batch=(), rows=(), sharded_output=False):
  """`fn` jitted as it is (None), or over devices with batch and bank arguments sharded.

  Args:
    fn: called with the keywords axis_name and num_rows.
    num_devices: of the mesh, or None for no mesh at all.
    num_rows: N.
    batch: names of the arguments whose rows are the batch.
    rows: names of the arguments that are the bank.
    sharded_output: whether the results' rows are sharded too, or the same on all devices.

  Returns:
    A function of keywords.
  """
  if num_devices is None:
    return jax.jit(functools.partial(fn, axis_name=None, num_rows=None))
  mesh = mesh_lib.make(jax.devices()[:num_devices])

  def call(**kwargs):
    for name in rows:
      kwargs[name] = mesh_lib.pad_rows(kwargs[name], num_devices)
    specs = {name: P(mesh_lib.AXIS) if name in (*batch, *rows) else P() for name in kwargs}
    inner = lambda kwargs: fn(**kwargs, axis_name=mesh_lib.AXIS, num_rows=num_rows)
    return jax.shard_map(inner, mesh=mesh, in_specs=(specs,),
                         out_specs=P(mesh_lib.AXIS) if sharded_output else P(),
                         check_vma=sharded_output)(kwargs)

  return jax.jit(call)


def _value_and_gradients(loss_fn, u, **shared):
  """Loss [B], and the gradients of the batch's mean loss in x = u / ‖u‖ and in u."""
  def mean_loss(x):
    loss = loss_fn(x, **shared)
    axis = shared['axis_name']
    return (loss.mean() if axis is None else lax.pmean(loss.mean(), axis)), loss
  x, to_u = jax.vjp(lambda u: u / jnp.linalg.norm(u, axis=1, keepdims=True), u)
  (_, loss), grad = jax.value_and_grad(mean_loss, has_aux=True)(x)
  return loss, grad, to_u(grad)[0]


def published_epsilon(prob, share):
  """What the 1e-7 adds to the published loss: Σ_k log(1 + 1e-7 / (P_k + M/N)), summed over k."""
  return jnp.sum(jnp.log1p(EPSILON / (prob + share)), axis=-1)


def nce(file, wide=False, num_devices=None):
  """Section 1: Z, P, loss, gradients and bank of two steps."""
  c = _Comparison(file, wide, num_devices)
  bank0 = c.float('memory_0')
  num_rows = len(bank0)
  noise_count = c.data['idx_1'].shape[1] - 1
  estimate = _mapped(losses.estimate_normalizer, num_devices, num_rows, ('features', 'index'),
                     ('bank',))
  loss_of = _mapped(
      lambda u, bank, index, noise_index, axis_name, num_rows, **scalars: _value_and_gradients(
          losses.nce_loss, u, bank=bank, index=index, noise_index=noise_index,
          axis_name=axis_name, num_rows=num_rows, **scalars),
      num_devices, num_rows, ('u', 'index'), ('bank',), True)
  # exp(s/τ) of one column is what a batch of one image without noise estimates as N exp(s/τ).
  one = lambda x, row, bank, temperature: losses.estimate_normalizer(
      x[None], bank, row[None], jnp.zeros((1, 0), jnp.int32), temperature=temperature)
  column = jax.jit(jax.vmap(jax.vmap(one, (None, 0, None, None)), (0, 0, None, None)))

  for t, temperature in enumerate(c.float('T')):
    bank = bank0
    for step in (1, 2):
      u, x, index = c.float(f'u_{step}'), c.float(f'x_{step}'), c.data[f'y_{step}']
      columns = c.data[f'idx_{step}']
      noise_index = columns[:, 1:]
      if step == 1:
        normalizer = estimate(features=x, bank=bank, index=index, noise_index=noise_index,
                              temperature=temperature)
        c.add('Z', normalizer, c.data['Z'][t], 1e-5, 'rel')
      prob = column(x, columns, bank, temperature) / (num_rows * normalizer)
      c.add('prob', prob, c.data[f'prob_{step}'][t], 3e-5, 'rel')
      loss, grad_x, grad_u = loss_of(u=u, bank=bank, index=index, noise_index=noise_index,
                                     temperature=temperature, normalizer=normalizer)
      loss = jnp.mean(loss + published_epsilon(prob, noise_count / num_rows))
      c.add('loss', loss, c.data[f'loss_{step}'][t], 5e-5, 'rel')
      c.add('grad_x', grad_x, c.data[f'grad_x_{step}'][t], 2e-5, 'of the largest')
      c.add('grad_u', grad_u, c.data[f'grad_u_{step}'][t], 2e-5, 'of the largest')
      bank = _add_update(c, step, bank, index, x, num_devices)
  return list(c.deviations.values())


def softmax(file, wide=False, num_devices=None, kernel='xla'):
  """Section 2: logits, loss, gradients and bank of two steps."""
  c = _Comparison(file, wide, num_devices, kernel)
  bank0 = c.float('memory_0')
  num_rows = len(bank0)
  # With as many neighbors and classes as rows, the vote for class j is exp(V_j·v / τ).
  votes = _mapped(functools.partial(knn.class_scores, k=num_rows, num_classes=num_rows),
                  num_devices, num_rows, (), ('bank',))
  for t, temperature in enumerate(c.data['T']):
    softmax_loss = functools.partial(losses.softmax_loss, temperature=float(temperature),
                                     kernel=kernel)
    loss_of = _mapped(
        lambda u, bank, index, axis_name, num_rows: _value_and_gradients(
            softmax_loss, u, bank=bank, index=index, axis_name=axis_name, num_rows=num_rows),
        num_devices, num_rows, ('u', 'index'), ('bank',), True)
    bank = bank0
    for step in (1, 2):
      u, x, index = c.float(f'u_{step}'), c.float(f'x_{step}'), c.data[f'y_{step}']
      logits = jnp.log(votes(queries=x, bank=bank, labels=jnp.arange(num_rows),
                             temperature=temperature))
      c.add('logits', logits, c.data[f'logits_{step}'][t], 2e-5)
      loss, grad_x, grad_u = loss_of(u=u, bank=bank, index=index)
      c.add('loss', loss.mean(), c.data[f'loss_{step}'][t], 5e-6, 'rel')
      c.add('grad_x', grad_x, c.data[f'grad_x_{step}'][t], 2e-5, 'of the largest')
      c.add('grad_u', grad_u, c.data[f'grad_u_{step}'][t], 2e-5, 'of the largest')
      bank = _add_update(c, step, bank, index, x, num_devices)
  return list(c.deviations.values())


def _add_update(c, step, bank, index, features, num_devices):
  """The bank after a step, compared with the published one."""
  bank = _update_of(num_devices, len(bank))(
      bank=bank, index=index, features=features, momentum=c.float('momentum'))[:len(bank)]
  c.add('rows', bank[index], c.data[f'rows_{step}'], 1e-6)
  if f'memory_{step}' in c.data:
    c.add('memory', bank, c.data[f'memory_{step}'], 1e-6)
  return bank


@functools.cache
def _update_of(num_devices, num_rows):
  """`bank.update`, jitted once."""
  return _mapped(
      lambda bank, index, features, momentum, axis_name, num_rows: bank_lib.update(
          bank, index, features, momentum=momentum, axis_name=axis_name),
      num_devices, num_rows, ('features', 'index'), ('bank',), True)


def memory_init():
  """Section 3: moments of the initial rows, in standard errors of a sample of that size."""
  c = _Comparison('memory_init', False, None)
  columns = list(c.data['columns'])
  for i, row in enumerate(c.data['stats']):
    golden = dict(zip(columns, row))
    n, d = int(golden['N']), int(golden['D'])
    bank = np.asarray(bank_lib.init(jax.random.key(i), n, d), np.float64)
    norms, count = np.linalg.norm(bank, axis=1), n * d
    bound = (d / 3) ** -0.5
    c.add('entries above the bound', np.sum(np.abs(bank) > bound * (1 + 1e-6)), 0, 0,
          'differing entries')
    moment = lambda k, bound=bound: bound**k / (k + 1)  # of U(-bound, bound), k even
    for name, found, expected, error in (
        ('mean', bank.mean(), 0, moment(2)**.5 / count**.5),
        ('variance', bank.var(), moment(2), (moment(4) - moment(2)**2)**.5 / count**.5),
        ('fourth moment', (bank**4).mean(), moment(4), (moment(8) - moment(4)**2)**.5 / count**.5),
        ('mean squared norm', (norms**2).mean(), 1,
         d**.5 * (moment(4) - moment(2)**2)**.5 / n**.5)):
      c.add(f'{name}, standard errors', (found - expected) / error, 0, 5)
    spread = golden[next(key for key in columns if 'norm' in key and 'std' in key)]
    c.add('deviation of row norms, standard errors',
          (norms.std() - spread) / (spread / n**.5), 0, 5)  # √2 of σ/√(2n): both are samples
  return list(c.deviations.values())


def nearest_neighbors(file, num_devices=None):
  """Section 4: votes, predictions, accuracies and neighbors."""
  c = _Comparison(file, False, num_devices)
  train_x, test_x = c.float('train_x'), c.float('test_x')
  train_y, test_y = c.data['train_y'].astype(int), c.data['test_y'].astype(int)
  num_rows, num_classes = len(train_x), int(train_y.max()) + 1
  for i, k in enumerate(c.data['K']):
    votes = _mapped(functools.partial(knn.class_scores, k=int(k), num_classes=num_classes),
                    num_devices, num_rows, (), ('bank',))
    certain = c.data['gap'][i] >= 1e-6
    for j, sigma in enumerate(c.float('sigma')):
      scores = np.asarray(votes(queries=test_x, bank=train_x, labels=train_y, temperature=sigma))
      golden = c.data['probs'][i, j]
      largest = golden.max(axis=1, keepdims=True)
      c.add('probs', (scores / largest)[certain], (golden / largest)[certain], 2e-5)
      order = np.argsort(-scores, axis=1, kind='stable')[:, :5]
      voted = np.take_along_axis(scores, order, axis=1) > 0
      hit = order == test_y[:, None]
      c.add('pred_top5', np.where(voted, order, -1)[certain], c.data['pred_top5'][i, j][certain],
            0, 'differing entries')
      for name, correct in (('top1', hit[:, :1]), ('top5_stable', hit),
                            ('top5_votes', hit & voted)):
        c.add(name, correct.any(axis=1).mean(), c.data[name][i, j], 1e-12)
  nearest = _mapped(functools.partial(neighbors.nearest, k=20), num_devices, num_rows, (),
                    ('bank',))
  similarity, row = map(np.asarray, nearest(queries=test_x, bank=train_x))
  c.add('nn_top1', (train_y[row[:, 0]] == test_y).mean(), c.data['nn_top1'], 1e-12)
  c.add('sim_sorted', similarity, c.data['sim_sorted'], 2e-6)
  # Where similarities tie within 1e-6 the order depends on rounding.
  steps = np.diff(c.data['sim_sorted'], axis=1)
  apart = np.ones_like(row, bool)
  apart[:, 1:] &= steps < -1e-6
  apart[:, :-1] &= steps < -1e-6
  c.add('neighbors', row[apart], c.data['neighbors'][apart], 0, 'differing entries')
  return list(c.deviations.values())


def lr_schedule(wide=True):
  """Section 7, the schedule of the optimizer."""
  c = _Comparison('lr_schedule', wide, None)
  steps_per_epoch = 391
  for i, base in enumerate(c.data['base_lr']):
    config = config_lib.default()
    config.optimizer.learning_rate = float(base)
    config.optimizer.milestones = (120, 160)
    schedule = optimizer_lib.learning_rate_schedule(config, steps_per_epoch * config.batch_size)
    found = [schedule(jnp.asarray(epoch * steps_per_epoch)) for epoch in c.data['epoch']]
    for name in ('lr_cifar', 'lr_main'):
      c.add(name, found, c.data[name][i], 1e-12, 'rel')
  return list(c.deviations.values())


def trajectory(file, wide=False, num_devices=None):
  """Section 6: short runs of a linear encoder, by the training step's own `update`."""
  c = _Comparison(file, wide, num_devices)
  data, num_rows = c.data, len(c.data['memory_0'])
  pixels = jnp.asarray(data['pixels'].astype(np.float32) / 16)
  if 'center' in data:
    pixels -= data['center']
  pixels = pixels.astype(c.dtype)
  config = config_lib.default()
  config.optimizer.update(learning_rate=float(data['lr']), momentum=float(data['momentum_sgd']),
                          weight_decay=float(data['weight_decay']), milestones=())
  config.loss.update(name='softmax' if 'softmax' in file else 'nce', normalizer='first_batch',
                     temperature=float(data['T']), proximal_weight=float(data.get('lam', 0)))
  config.bank.momentum = float(data['momentum_bank'])
  batch = data['batch'].astype(np.int32)
  noise = data['noise'][:, :, 1:].astype(np.int32) if 'noise' in data else None
  optimizer = optimizer_lib.make(config, num_rows)
  params = {'W': c.float('W_0')}
  zero = jnp.zeros((), c.dtype)  # what the published epsilon adds to a step's loss
  state = state_lib.TrainState(
      step=jnp.int32(0), params=params, batch_stats=zero, opt_state=optimizer.init(params),
      bank=c.float('memory_0'), normalizer=zero)
  axis = None if num_devices is None else mesh_lib.AXIS

  def step(state, rows):
    index, noise_index = rows

    def encode(params, batch_stats, pixels):
      features = bank_lib.normalize(jnp.matmul(pixels, params['W'].T, precision='highest'))
      if noise_index is not None:
        return _with_published_epsilon(features, state, index, noise_index, config.loss, num_rows,
                                       axis)
      return features, batch_stats

    state, metrics = step_lib.update(
        state, (pixels[index], index, noise_index), config=config, encode=encode,
        optimizer=optimizer, num_rows=num_rows, axis_name=axis)
    return state, (metrics, state.params['W'], state.batch_stats)

  run = lambda state, rows: lax.scan(step, state, rows)
  if num_devices is None:
    state, (metrics, weights, correction) = jax.jit(run)(state, (batch, noise))
  else:
    mesh = mesh_lib.make(jax.devices()[:num_devices])
    state = state.replace(bank=mesh_lib.pad_rows(state.bank, num_devices))
    specs = jax.tree.map(lambda _: P(), state).replace(bank=P(axis))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, (P(None, axis), P())),
                           out_specs=(specs, P()))
    state, (metrics, weights, correction) = jax.jit(mapped)(state, (batch, noise))
  suffix, tolerance = ('_f64', 1e-9) if wide else ('', 1e-4)
  c.add(f'loss{suffix}', metrics['loss'] + correction, data[f'loss{suffix}'], tolerance, 'rel')
  if wide:
    c.add('weights_final_f64', weights[-1], data['weights_final_f64'], 1e-9)
    return list(c.deviations.values())
  every = int(data.get('weights_every', 1))
  c.add('weights', weights[every - 1::every], data['weights'], 3e-5)
  c.add('memory_final', state.bank[:num_rows], data['memory_final'], 2e-5)
  if noise is not None:
    c.add('Z', state.normalizer, data['Z'], 1e-5, 'rel')
  if 'lam' in data:
    proximal = metrics['proximal_penalty']
    c.add('loss_prox', proximal, data['loss_prox'], 1e-4, 'rel')
    c.add('loss_nce', metrics['loss'] + correction - config.loss.proximal_weight * proximal,
          data['loss_nce'], 1e-4, 'rel')
  return list(c.deviations.values())


def _with_published_epsilon(features, state, index, noise_index, loss, num_rows, axis):
  """(Features whose gradient includes what the 1e-7 adds, what it adds to the mean loss)."""
  bank, noise_count = state.bank, noise_index.shape[1]
  estimate = losses.estimate_normalizer(
      features, bank, index, noise_index, temperature=loss.temperature, axis_name=axis,
      num_rows=num_rows)
  normalizer = lax.stop_gradient(jnp.where(state.normalizer > 0, state.normalizer, estimate))
  mean = jnp.mean
  if axis is not None:
    first = lax.axis_index(axis) * index.size
    noise_index = lax.dynamic_slice_in_dim(noise_index, first, index.size)
    bank = lax.all_gather(bank, axis, tiled=True)
    mean = lambda x: lax.pmean(jnp.mean(x), axis)
  rows = bank[jnp.concatenate([index[:, None], noise_index], axis=1)]

  def addition(features):
    score = jnp.einsum('bd,bkd->bk', features, rows, precision='highest')
    return mean(published_epsilon(jnp.exp(score / loss.temperature) / normalizer,
                                  noise_count / num_rows))

  value, grad = jax.value_and_grad(addition)(lax.stop_gradient(features))

  @jax.custom_vjp
  def carry(features, grad):
    return features

  carry.defvjp(lambda features, grad: (features, grad),
               lambda grad, cotangent: (cotangent + grad, jnp.zeros_like(grad)))
  return carry(features, grad), value


# Golden file -> our name, the name in state_dict_keys.json, whether ResNet-50's tolerances hold.
MODELS = {
    'model_cifar_resnet18': ('resnet18_cifar', 'cifar_resnet18', False),
    'model_imagenet_resnet18': ('resnet18', 'imagenet_resnet18', False),
    'model_imagenet_resnet50': ('resnet50', 'imagenet_resnet50', True),
}


def generate(key, shape, prefix=''):
  """The weight called `key`, by the recipe of section 5, in float64."""
  seed = zlib.crc32((prefix + key).encode())
  return np.random.Generator(np.random.PCG64(seed)).standard_normal(int(np.prod(shape))).reshape(
      shape)


def generated_state_dict(model):
  """The weights of section 5, rounded to float16 and widened to float32."""
  state_dict = {}
  for entry in json.loads((GOLDEN / 'state_dict_keys.json').read_text())[model]:
    key, shape = entry['key'], entry['shape']
    z = generate(key, shape)
    if key.endswith('num_batches_tracked'):
      state_dict[key] = np.zeros((), np.int64)
      continue
    if len(shape) == 4:
      value = z * np.sqrt(2 / np.prod(shape[1:]))
    elif len(shape) == 2:
      value = z * np.sqrt(1 / shape[1])
    elif key.endswith('running_var'):
      value = 0.5 + 0.5 * z**2
    elif key.endswith('weight'):
      value = 0.6 + 0.1 * z
    else:
      value = 0.1 * z
    state_dict[key] = value.astype(np.float16).astype(np.float32)
  return state_dict


def encoder(file, wide=False, gradients=True):
  """Section 5: embeddings, statistics and gradients of an encoder."""
  c = _Comparison(file, wide, None)
  data = c.data
  name, keys, deep = MODELS[file]
  f32 = lambda narrow, broad: broad if deep else narrow
  state_dict = generated_state_dict(keys)
  assert list(state_dict) == list(data['state_keys'])
  values = [value.astype(np.float64) for value in state_dict.values()]
  if not wide:
    c.add('state_sum', [v.sum() for v in values], data['state_sum'], 1e-6)
    c.add('state_abs_sum', [np.abs(v).sum() for v in values], data['state_abs_sum'], 1e-6)
    c.add('state_first', [v.flat[0] for v in values], data['state_first'], 1e-6)
    c.add('state_last', [v.flat[-1] for v in values], data['state_last'], 1e-6)

  images = np.moveaxis(data['images_u8'], 1, -1).astype(np.float32)
  images = (images / np.float32(255) - data['mean'].reshape(3)) / data['std'].reshape(3)
  if not wide:
    c.add('input_sum', images.sum(dtype=np.float64), data['input_sum'], 1e-6, 'rel')
    c.add('input_sumsq', (images.astype(np.float64)**2).sum(), data['input_sumsq'], 1e-6, 'rel')
    c.add('input_corner', np.moveaxis(images[:, 0, :4], -1, 1), data['input_corner'], 1e-6)
  model = models.create(name, dtype=c.dtype)
  variables = jax.tree.map(lambda x: jnp.asarray(x, c.dtype), convert.from_torch(state_dict, name))
  images, cotangent = jnp.asarray(images, c.dtype), c.float('cotangent')

  def apply(variables, train_mode):
    """(embedding, pooled, output of fc, new batch_stats)."""
    seen = []

    def listen(call, args, kwargs, context):
      result = call(*args, **kwargs)
      if context.module.name == 'fc':
        seen.extend((args[0], result))
      return result

    with nn.intercept_methods(listen):
      embedding, updated = model.apply(variables, images, train=train_mode,
                                       mutable=['batch_stats'])
    return embedding, *seen, updated['batch_stats']

  def objective(params, batch_stats):
    """(sum of embedding · cotangent, what `apply` returns) in training."""
    trained = apply({'params': params, 'batch_stats': batch_stats}, True)
    return jnp.sum(trained[0] * cotangent), trained

  evaluate = jax.jit(functools.partial(apply, train_mode=False))
  train = jax.jit(lambda *args: objective(*args)[1])
  embedding, pooled, fc, _ = evaluate(variables)
  params, stats_after_n = variables['params'], variables['batch_stats']
  if gradients:
    grads, trained = jax.jit(jax.grad(objective, has_aux=True))(params, stats_after_n)
  for i in range(int(data['n_train_forwards'])):
    forward = train(params, stats_after_n)
    stats_after_n = forward[-1]
    if i == 0 and not gradients:
      trained = forward
  embedding_after = evaluate(variables | {'batch_stats': stats_after_n})[0]
  suffix = '_f64' if wide else ''
  pick = lambda narrow, broad, sharp: sharp if wide else f32(narrow, broad)
  c.add(f'embedding_eval{suffix}', embedding, data[f'embedding_eval{suffix}'],
        pick(3e-6, 3e-6, 1e-10))
  c.add(f'embedding_train{suffix}', trained[0], data[f'embedding_train{suffix}'],
        pick(5e-6, 5e-5, 1e-9))
  c.add(f'pooled_train{suffix}', trained[1], data[f'pooled_train{suffix}'],
        pick(2e-5, 2e-4, 1e-9), 'of the largest')
  c.add(f'objective{suffix}', jnp.sum(trained[0] * cotangent), data[f'objective{suffix}'],
        pick(3e-5, 3e-4, 1e-9))
  c.add(f'embedding_eval_after{suffix}', embedding_after, data[f'embedding_eval_after{suffix}'],
        pick(5e-6, 2e-5, 1e-9))
  statistics = lambda stats: convert.to_torch(
      {'params': variables['params'], 'batch_stats': stats}, name)
  after = statistics(trained[3])
  for kind in ('mean', 'var'):
    c.add(f'bn1_running_{kind}_after{suffix}', after[f'bn1.running_{kind}'],
          data[f'bn1_running_{kind}_after{suffix}'], pick(1e-5, 1e-5, 1e-10), 'of the largest')
  if not wide:
    c.add('pooled_eval', pooled, data['pooled_eval'], 1e-5, 'of the largest')
    c.add('fc_eval', fc, data['fc_eval'], 1e-5, 'of the largest')
    c.add('fc_train', trained[2], data['fc_train'], f32(2e-5, 2e-4), 'of the largest')
    after_n = statistics(stats_after_n)
    norms = list(data['bn_keys'])
    for kind in ('mean', 'var'):
      c.add(f'bn1_running_{kind}_after_n', after_n[f'bn1.running_{kind}'],
            data[f'bn1_running_{kind}_after_n'], 1e-5, 'of the largest')
      c.add(f'bn_running_{kind}_after_sum', [after[f'{key}.running_{kind}'].sum() for key in norms],
            data[f'bn_running_{kind}_after_sum'], f32(1e-4, 1e-3))
      c.add(f'bn_last_running_{kind}_after', after[f'{norms[-1]}.running_{kind}'],
            data[f'bn_last_running_{kind}_after'], f32(5e-6, 5e-5))
  if gradients:
    _add_gradients(c, name, variables, grads, pick, suffix)
  return list(c.deviations.values())


def _add_gradients(c, name, variables, grads, pick, suffix):
  data = c.data
  grads = convert.to_torch({'params': grads, 'batch_stats': variables['batch_stats']}, name)
  keys = list(data['grad_keys'])
  grads = {key: grads[key].astype(np.float64) for key in keys}
  norms = data[f'grad_norm{suffix}']
  c.add(f'grad_norm{suffix}', [np.linalg.norm(grads[key]) for key in keys], norms,
        pick(5e-3, 4e-2, 1e-7), 'rel')
  probes = [np.sum(grads[key] * generate(key, grads[key].shape, 'probe/')) for key in keys]
  c.add(f'grad_probe{suffix} / grad_norm', np.array(probes) / norms,
        data[f'grad_probe{suffix}'] / norms, pick(3e-2, 2e-1, 1e-6))
  c.add(f'grad_conv1{suffix}', grads['conv1.weight'], data[f'grad_conv1{suffix}'],
        pick(2e-2, 1e-1, 1e-6), 'of the largest')
  if not c.dtype == jnp.float64:
    bias = grads['linear.bias' if 'linear.bias' in grads else 'fc.bias']
    c.add('grad_fc_bias', bias, data['grad_fc_bias'], 2e-5, 'of the largest')


def _cases():
  """Name of a comparison -> (function without arguments, whether it is slow)."""
  def case(fn, *args, wide=None, slow=False, **kwargs):
    def compare():
      interpreted = (contextlib.nullcontext() if kwargs.get('kernel') != 'pallas' else
                     pltpu.force_tpu_interpret_mode())
      with jax.enable_x64(bool(wide)), interpreted:
        return fn(*args, **({} if wide is None else {'wide': wide}), **kwargs)
    precision = {None: '', False: ' float32', True: ' float64'}[wide]
    devices = f' on {kwargs["num_devices"]}' if kwargs.get('num_devices') else ''
    gradients = ' with gradients' if kwargs.get('gradients') else ''
    kernel = f' by {kwargs["kernel"]}' if 'kernel' in kwargs else ''
    name = (args[0] if args else fn.__name__) + precision + devices + gradients + kernel
    cases[name] = compare, slow

  cases = {}
  for wide in (False, True):
    for devices in (None, 8):
      for file in ('small', 'duplicates', 'large', 'noise_has_positive'):
        case(nce, f'nce_{file}', wide=wide, num_devices=devices,
             slow=file == 'large' and not wide)
      for file in ('small', 'duplicates', 'large'):
        case(softmax, f'softmax_{file}', wide=wide, num_devices=devices,
             slow=file == 'large' and not wide)
      for file in ('softmax', 'nce', 'prox'):
        case(trajectory, f'trajectory_{file}', wide=wide, num_devices=devices)
        case(trajectory, f'trajectory_{file}_centered', wide=wide, num_devices=devices)
  for file in ('small', 'duplicates'):
    for devices in (None, 8):
      case(softmax, f'softmax_{file}', wide=False, num_devices=devices, kernel='cudnn')
      case(softmax, f'softmax_{file}', wide=False, num_devices=devices, kernel='pallas',
           slow=devices is not None)
  case(memory_init)
  for file in ('knn_digits', 'knn_clusters'):
    for devices in (None, 8):
      case(nearest_neighbors, file, num_devices=devices)
  case(lr_schedule, wide=True)
  for file in MODELS:
    large = 'imagenet' in file  # 224 pixels
    case(encoder, file, wide=False, gradients=True, slow=large)
    case(encoder, file, wide=True, gradients=False, slow=True)
    case(encoder, file, wide=True, gradients=True, slow=True)
  return cases


CASES = _cases()
