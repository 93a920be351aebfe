"""Properties of the compiled programs: communication, memory, lowering for absent hardware."""

import functools

import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from instdisc_jax import losses
from instdisc_jax.evaluation import embedding, knn
from instdisc_jax.models import resnet
from instdisc_jax.runtime import mesh as mesh_lib
from tests import programs
from tests.conftest import small_config

DEVICES, B, D, SIDE = 8, 64, 16, programs.SIDE
MANY = 200_000  # rows
LOSSES = {
    'softmax': dict(name='softmax', block_rows=1024),
    'nce': dict(name='nce', noise_count=300),
    'nce shared': dict(name='nce', noise_count=300, shared_noise=True, proximal_weight=1.0),
    'sampled_softmax': dict(name='sampled_softmax', noise_count=300),
    'parametric_softmax': dict(name='parametric_softmax', block_rows=1024),
    'two views': dict(name='softmax', block_rows=1024, views=2),
    'neighbors': dict(name='softmax', block_rows=1024, neighbors=3, neighbors_from_epoch=0),
    'triplet': dict(name='triplet'),
    'triplet sampled': dict(name='triplet', mining='sampled', noise_count=300),
}
FAST = 'softmax', 'nce', 'two views'


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
  mesh = mesh_lib.make()
  fn = lambda x: jax.lax.psum(jax.lax.all_gather(x, mesh_lib.AXIS, tiled=True), mesh_lib.AXIS)
  mapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P(mesh_lib.AXIS), out_specs=P()))
  text = mapped.lower(jnp.zeros((DEVICES * 3, 5))).compile().as_text()
  assert programs.collective_values(text) == 2 * DEVICES * 3 * 5


@pytest.mark.parametrize('loss', [
    pytest.param(loss, marks=() if loss in FAST else pytest.mark.slow) for loss in LOSSES])
def test_no_row_of_the_bank_is_communicated(loss):
  small, large = _traffic(loss, 5000), _traffic(loss, MANY)
  assert 0 < small <= DEVICES * B * (D + 4) * LOSSES[loss].get('views', 1)
  assert large == small


@pytest.mark.parametrize('loss', [
    pytest.param(loss, marks=() if loss in [*LOSSES][:5] else pytest.mark.slow) for loss in LOSSES])
def test_the_state_is_donated_and_the_bank_not_copied(loss):
  compiled, state = _compiled(loss, MANY)
  memory = compiled.memory_analysis()
  bank = MANY * D * 4 // DEVICES
  others = jax.tree.leaves(state.replace(bank=(), classifier=()))
  rest = sum(x.size * x.dtype.itemsize for x in others)
  banks = 1 + len(jax.tree.leaves(state.classifier))  # the bank, and what is as large
  assert memory.alias_size_in_bytes >= banks * bank + rest
  scores = 4 * B * LOSSES[loss].get('noise_count', 1024) * D
  gradient = bank if state.classifier else 0
  searched = 4 * 2**22 if loss in ('neighbors', 'triplet') else 0  # scores at once, see `neighbors`
  assert memory.temp_size_in_bytes < gradient + bank / 2 + 3 * scores + searched


def test_the_memory_of_the_softmax_is_that_of_a_block_whatever_n_is():
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


@pytest.mark.parametrize('loss', ['nce', 'sampled_softmax'])
@pytest.mark.parametrize('num_rows', [150_000, 10_000_000])  # all are scored; the noise is gathered
def test_the_memory_of_the_noise_is_bounded_for_large_batches(loss, num_rows):
  batch, dim, noise_count = 1024, 128, 4096
  arrays = (jax.ShapeDtypeStruct((batch, dim), jnp.float32),
            jax.ShapeDtypeStruct((num_rows, dim), jnp.float32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
            jax.ShapeDtypeStruct((batch, noise_count), jnp.int32))
  how = {'nce': (losses.nce_loss, {'normalizer': 1e5}),
         'sampled_softmax': (losses.sampled_softmax_loss, {})}
  fn, extra = how[loss]
  compiled = jax.jit(jax.grad(lambda f, *rest: fn(f, *rest, temperature=0.1, **extra).sum())).lower(
      *arrays).compile()
  # The noise's rows would be 2.1 GB, all scores 0.6 GB or more.
  assert compiled.memory_analysis().temp_size_in_bytes < 2**29


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
@pytest.mark.parametrize('loss', [
    pytest.param(loss, marks=() if loss in [*LOSSES][:5] else pytest.mark.slow) for loss in LOSSES])
def test_the_step_lowers_for_absent_hardware(loss, platform):
  run_steps, arguments, _ = _step(loss, 1000)
  exported = export.export(run_steps, platforms=[platform])(*arguments)
  assert exported.platforms == (platform,) and exported.nr_devices == DEVICES
  assert 'stablehlo.convolution' in exported.mlir_module()


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_search_and_embedding_lower_for_absent_hardware(platform):
  mesh = mesh_lib.make()
  queries = jax.ShapeDtypeStruct((100, D), jnp.float32, sharding=NamedSharding(mesh, P()))
  bank = jax.ShapeDtypeStruct((80_000, D), jnp.float32,
                              sharding=NamedSharding(mesh, P(mesh_lib.AXIS)))
  own_row = jax.ShapeDtypeStruct((100,), jnp.int32, sharding=NamedSharding(mesh, P()))
  for recall_target in (None, 0.95):
    search = knn.over_mesh(mesh, 200, 80_000, recall_target)
    exported = export.export(search, platforms=[platform], disabled_checks=[
        export.DisabledSafetyCheck.custom_call('ApproxTopK')])(queries, bank, own_row)
    assert exported.nr_devices == DEVICES

  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=D, width=4)
  state = _step('softmax', 1000)[2]
  images = jax.ShapeDtypeStruct((DEVICES * 4, SIDE, SIDE, 3), jnp.uint8,
                                sharding=NamedSharding(mesh, P(mesh_lib.AXIS)))
  embed = embedding.encode(small_config(), encoder, mesh, None, (embedding.EMBEDDING,))
  exported = export.export(embed, platforms=[platform])(
      {'params': state.params, 'batch_stats': state.batch_stats}, images)
  assert 'stablehlo.convolution' in exported.mlir_module()


def test_encoding_communicates_nothing():
  mesh = mesh_lib.make()
  state = _step('softmax', 1000)[2]
  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=D, width=4)
  images = jax.ShapeDtypeStruct((DEVICES * 4, SIDE, SIDE, 3), jnp.uint8,
                                sharding=NamedSharding(mesh, P(mesh_lib.AXIS)))
  names = 'conv1', 'pooled', embedding.EMBEDDING
  compiled = embedding.encode(small_config(), encoder, mesh, None, names).lower(
      {'params': state.params, 'batch_stats': state.batch_stats}, images).compile()
  assert programs.collective_values(compiled.as_text()) == 0


@pytest.mark.parametrize('accumulate_steps', [1, 2])
def test_no_convolution_is_in_a_loop_on_a_cpu(accumulate_steps):
  run_steps, arguments, _ = programs.step(
      LOSSES['softmax'], num_rows=5000, num_devices=1, batch_size=B, dim=D,
      accumulate_steps=accumulate_steps)
  convolutions = [line for line in run_steps.lower(*arguments).compile().as_text().splitlines()
                  if ' convolution(' in line]
  assert len(convolutions) >= 3 * accumulate_steps  # forward, and both gradients
  assert not [line for line in convolutions if '/while/' in line]  # there they are 10 times slower
