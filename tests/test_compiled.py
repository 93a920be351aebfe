"""What the compiled programs promise: traffic, memory, and lowering for hardware that is absent."""

import functools
import math
import re

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import losses, train
from instdisc_jax.evaluation import features, knn
from instdisc_jax.models import resnet
from tests.conftest import small_config

DEVICES, B, D, SIDE = 8, 64, 16, 8
MANY = 200_000  # rows
LOSSES = {
    'softmax': dict(name='softmax', block_rows=1024),
    'nce': dict(name='nce', noise_count=300),
    'nce shared': dict(name='nce', noise_count=300, shared_noise=True, proximal_weight=1.0),
    'sampled_softmax': dict(name='sampled_softmax', noise_count=300),
}


def _step(loss, num_rows, num_devices=DEVICES):
  """(run_steps, its arguments without values, the state) over so many devices."""
  config = small_config()
  config.batch_size = B
  config.model.embedding_dim = D
  config.loss.update(loss)
  mesh = train.make_mesh(jax.devices()[:num_devices])
  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=D, width=4)
  optimizer = train.make_optimizer(config, num_rows)
  bank = jax.ShapeDtypeStruct((-(-num_rows // num_devices) * num_devices, D), jnp.float32)

  def init():
    variables = encoder.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)), train=False)
    return train.TrainState(
        step=jnp.int32(0), params=variables['params'], batch_stats=variables['batch_stats'],
        opt_state=optimizer.init(variables['params']), bank=jnp.zeros(bank.shape),
        normalizer=jnp.float32(0))

  state = jax.eval_shape(init)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.tree.map(place, state, train.state_shardings(mesh, state))
  whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, train.AXIS))
  images = jax.ShapeDtypeStruct((num_rows, SIDE, SIDE, 3), jnp.uint8, sharding=whole)
  index = jax.ShapeDtypeStruct((1, B), jnp.int32, sharding=split)
  run_steps = train.map_over_mesh(mesh, functools.partial(
      train.train_step, config=config, encoder=encoder, optimizer=optimizer, num_rows=num_rows))
  return run_steps, (state, images, index, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)), (
      state)


def _collective_numbers(text):
  """Numbers that the collectives of a compiled program carry, the larger of in and out for each."""
  total = 0
  for line in text.splitlines():
    found = re.search(r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|'
                      r'collective-permute)(?:-start)?\((.*?)\)', line)
    if found:
      count = lambda shapes: sum(math.prod(map(int, dims.split(','))) if dims else 1
                                 for dims in re.findall(r'\w+\[([\d,]*)\]', shapes))
      total += max(count(found[1]), count(found[3]))
  return total


@functools.cache
def _compiled(loss, num_rows):
  """(a compiled step, its state)."""
  run_steps, arguments, state = _step(LOSSES[loss], num_rows)
  return run_steps.lower(*arguments).compile(), state


def _traffic(loss, num_rows):
  """Numbers that all collectives of a step carry, less gradients and batch-norm statistics."""
  compiled, state = _compiled(loss, num_rows)
  synchronised = sum(math.prod(x.shape)
                     for x in jax.tree.leaves((state.params, state.batch_stats)))
  return _collective_numbers(compiled.as_text()) - synchronised


def test_collectives_are_counted():
  mesh = train.make_mesh()
  fn = lambda x: jax.lax.psum(jax.lax.all_gather(x, train.AXIS, tiled=True), train.AXIS)
  mapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P(train.AXIS), out_specs=P()))
  text = mapped.lower(jnp.zeros((DEVICES * 3, 5))).compile().as_text()
  assert _collective_numbers(text) == 2 * DEVICES * 3 * 5


@pytest.mark.parametrize('loss', LOSSES)
def test_the_bank_never_travels(loss):
  small, large = _traffic(loss, 5000), _traffic(loss, MANY)
  assert 0 < small <= DEVICES * B * (D + 4)
  assert large == small


@pytest.mark.parametrize('loss', LOSSES)
def test_the_state_is_donated_and_the_bank_not_copied(loss):
  compiled, state = _compiled(loss, MANY)
  memory = compiled.memory_analysis()
  bank = MANY * D * 4 // DEVICES
  rest = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.replace(bank=())))
  assert memory.alias_size_in_bytes >= bank + rest
  scores = 4 * B * LOSSES[loss].get('noise_count', 1024) * D
  assert memory.temp_size_in_bytes < bank / 2 + 3 * scores


def test_the_softmax_needs_memory_for_a_block_whatever_n_is():
  batch, dim, block = 128, 128, 4096

  def temporary(num_rows):
    arrays = (jax.ShapeDtypeStruct((batch, dim), jnp.float32),
              jax.ShapeDtypeStruct((num_rows, dim), jnp.float32),
              jax.ShapeDtypeStruct((batch,), jnp.int32))
    fn = jax.grad(lambda f, *rest: losses.softmax_loss(
        f, *rest, temperature=0.1, block_rows=block).sum())
    return jax.jit(fn).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

  small, large = temporary(100_000), temporary(10_000_000)
  assert large <= small + 2**16
  assert large <= 8 * 4 * batch * block  # a few blocks of scores; all of them would be 5 GB


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
@pytest.mark.parametrize('loss', LOSSES)
def test_the_step_lowers_for_absent_hardware(loss, platform):
  run_steps, arguments, _ = _step(LOSSES[loss], 1000)
  exported = export.export(run_steps, platforms=[platform])(*arguments)
  assert exported.platforms == (platform,) and exported.nr_devices == DEVICES
  assert 'stablehlo.convolution' in exported.mlir_module()


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_search_and_embedding_lower_for_absent_hardware(platform):
  mesh = train.make_mesh()
  queries = jax.ShapeDtypeStruct((100, D), jnp.float32, sharding=NamedSharding(mesh, P()))
  bank = jax.ShapeDtypeStruct((80_000, D), jnp.float32,
                              sharding=NamedSharding(mesh, P(train.AXIS)))
  own_row = jax.ShapeDtypeStruct((100,), jnp.int32, sharding=NamedSharding(mesh, P()))
  for recall_target in (None, 0.95):
    search = knn.map_over_mesh(mesh, 200, 80_000, recall_target)
    exported = export.export(search, platforms=[platform], disabled_checks=[
        export.DisabledSafetyCheck.custom_call('ApproxTopK')])(queries, bank, own_row)
    assert exported.nr_devices == DEVICES

  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=D, width=4)
  state = _step(LOSSES['softmax'], 1000)[2]
  images = jax.ShapeDtypeStruct((50, SIDE, SIDE, 3), jnp.uint8,
                                sharding=NamedSharding(mesh, P()))
  embed = features.map_over_mesh(encoder, mesh, (0.5,) * 3, (0.25,) * 3)
  exported = export.export(embed, platforms=[platform])(
      state.params, state.batch_stats, images, np.int32(0), size=4)
  assert 'stablehlo.convolution' in exported.mlir_module()
