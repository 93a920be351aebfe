import jax
import numpy as np
import pytest

from instdisc_jax import kernels
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import state as state_lib
from tests.conftest import small_config
from tests.training import tiny
from tests.training.tiny import N


def test_fresh_states_do_not_depend_on_the_device_count():
  states = [tiny.fresh_state(tiny.make_setup(tiny.config(), n)) for n in (1, 8)]
  for a, b in zip(jax.tree.leaves(states[0].params), jax.tree.leaves(states[1].params)):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(states[0].bank, np.asarray(states[1].bank)[:N])
  assert len(states[1].bank.addressable_shards[0].data) == 6  # 48 rows over 8 devices


@pytest.mark.parametrize('loss', ['softmax', 'parametric_softmax'])
def test_rows_are_sharded_and_the_rest_is_replicated(loss):
  config = tiny.config(name=loss)
  setup = tiny.make_setup(config, 4)
  state = jax.eval_shape(state_lib.make_init(setup, (8, 8)))
  found = state_lib.shardings(setup.mesh, state)
  assert jax.tree.structure(found) == jax.tree.structure(state)
  per_row = jax.tree.leaves((found.bank, found.classifier))
  assert len(per_row) == (1 if loss == 'softmax' else 3)
  assert all(sharding.spec == jax.P(mesh_lib.AXIS) for sharding in per_row)
  rest = jax.tree.leaves(found.replace(bank=(), classifier=()))
  assert all(sharding.spec == jax.P() for sharding in rest)


def test_a_setup_has_the_encoder_and_optimizer_of_its_configuration():
  config = small_config()
  setup = state_lib.Setup.of(config, 128, mesh_lib.make())
  state = jax.eval_shape(state_lib.make_init(setup, (32, 32)))
  assert state.bank.shape == (128, config.model.embedding_dim)
  assert state.params['fc']['kernel'].shape[1] == config.model.embedding_dim
  assert setup.wide == np.float32
  config.model.dtype = 'bfloat16'
  assert state_lib.Setup.of(config, 128, setup.mesh).wide == np.float32


@pytest.mark.parametrize('loss, line', [
    (dict(name='softmax'), None),  # on a CPU, XLA is as good as it gets
    (dict(name='nce', noise_count=20), 'nce scores 320 noise rows per step, one by one or among '
     'all; loss.name=softmax reads the 12 rows of a device once, and is exact'),
    (dict(name='nce', noise_count=5, shared_noise=True), None)])
def test_a_run_says_where_the_exact_softmax_would_be_cheaper(loss, line):
  setup = tiny.make_setup(tiny.config(**loss), 4)
  assert setup.remarks() == ([] if line is None else [line])


def test_a_gpu_s_rows_are_padded_for_its_kernel_and_a_fallback_is_explained():
  setup = tiny.make_setup(tiny.config(name='softmax'), 4)
  for choice, rows, lines in (
      (kernels.Choice('cudnn'), 1024, []),
      (kernels.Choice('xla', 'it is an old card'), 48, ['loss.kernel is xla: it is an old card'])):
    vars(setup)['kernel'] = choice  # as it would be chosen there
    assert (setup.padded_rows, setup.remarks()) == (rows, lines)
    assert jax.eval_shape(state_lib.make_init(setup, (8, 8))).bank.shape[0] == rows
