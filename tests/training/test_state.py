import jax
import numpy as np
import pytest

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
