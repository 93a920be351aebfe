"""What the compiled programs promise: traffic, memory, and lowering for hardware that is absent."""

import functools

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
from tests import programs

DEVICES, B, D, SIDE = 8, 64, 16, programs.SIDE
MANY = 200_000  # rows
LOSSES = {
    'softmax': dict(name='softmax', block_rows=1024),
    'nce': dict(name='nce', noise_count=300),
    'nce shared': dict(name='nce', noise_count=300, shared_noise=True, proximal_weight=1.0),
    'sampled_softmax': dict(name='sampled_softmax', noise_count=300),
    'parametric_softmax': dict(name='parametric_softmax', block_rows=1024),
}


def _step(loss, num_rows):
  return programs.step(LOSSES[loss], num_rows=num_rows, num_devices=DEVICES, batch_size=B, dim=D)


@functools.cache
def _compiled(loss, num_rows):
  """(a compiled step, its state)."""
  run_steps, arguments, state = _step(loss, num_rows)
  return run_steps.lower(*arguments).compile(), state


def _traffic(loss, num_rows):
  return programs.traffic(*_compiled(loss, num_rows))


def test_collectives_are_counted():
  mesh = train.make_mesh()
  fn = lambda x: jax.lax.psum(jax.lax.all_gather(x, train.AXIS, tiled=True), train.AXIS)
  mapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P(train.AXIS), out_specs=P()))
  text = mapped.lower(jnp.zeros((DEVICES * 3, 5))).compile().as_text()
  assert programs.collective_numbers(text) == 2 * DEVICES * 3 * 5


@pytest.mark.parametrize('loss', [
    'softmax', 'nce', *(pytest.param(loss, marks=pytest.mark.slow)
                        for loss in ('nce shared', 'sampled_softmax', 'parametric_softmax'))])
def test_the_bank_never_travels(loss):
  small, large = _traffic(loss, 5000), _traffic(loss, MANY)
  assert 0 < small <= DEVICES * B * (D + 4)
  assert large == small


@pytest.mark.parametrize('loss', LOSSES)
def test_the_state_is_donated_and_the_bank_not_copied(loss):
  compiled, state = _compiled(loss, MANY)
  memory = compiled.memory_analysis()
  bank = MANY * D * 4 // DEVICES
  whole = jax.tree.leaves(state.replace(bank=(), classifier=()))
  rest = sum(x.size * x.dtype.itemsize for x in whole)
  of_rows = 1 + len(jax.tree.leaves(state.classifier))  # what is as large as the bank
  assert memory.alias_size_in_bytes >= of_rows * bank + rest
  scores = 4 * B * LOSSES[loss].get('noise_count', 1024) * D
  gradient = bank if state.classifier else 0
  assert memory.temp_size_in_bytes < gradient + bank / 2 + 3 * scores


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
  run_steps, arguments, _ = _step(loss, 1000)
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
  state = _step('softmax', 1000)[2]
  images = jax.ShapeDtypeStruct((50, SIDE, SIDE, 3), jnp.uint8,
                                sharding=NamedSharding(mesh, P()))
  embed = features.map_over_mesh(encoder, mesh, (0.5,) * 3, (0.25,) * 3)
  exported = export.export(embed, platforms=[platform])(
      state.params, state.batch_stats, images, np.int32(0), count=4)
  assert 'stablehlo.convolution' in exported.mlir_module()


@pytest.mark.parametrize('accumulate_steps', [1, 2])
def test_no_convolution_was_ever_in_a_loop_on_a_cpu(accumulate_steps):
  run_steps, arguments, _ = programs.step(
      LOSSES['softmax'], num_rows=5000, num_devices=1, batch_size=B, dim=D,
      accumulate_steps=accumulate_steps)
  convolutions = [line for line in run_steps.lower(*arguments).compile().as_text().splitlines()
                  if ' convolution(' in line]
  assert len(convolutions) >= 3 * accumulate_steps  # forward, and both gradients
  assert not [line for line in convolutions if '/while/' in line]  # there they are 10 times slower
