import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import optax
import pytest

from instdisc_jax import checkpoint, train

N, D = 13, 4  # no device count above 1 divides N


def _state(num_devices, seed):
  """A small `TrainState` sharded over so many devices."""
  mesh = train.make_mesh(jax.devices()[:num_devices])
  random = np.random.default_rng(seed)
  params = {'w': jnp.asarray(random.standard_normal((3, 2)), jnp.float32)}
  state = train.TrainState(
      step=jnp.int32(7), params=params, batch_stats={'mean': jnp.arange(3.0) + seed},
      opt_state=optax.sgd(0.1, momentum=0.9).init(params),
      bank=train.pad_rows(jnp.asarray(random.standard_normal((N, D)), jnp.float32), num_devices),
      normalizer=jnp.float32(seed))
  return jax.device_put(state, train.state_shardings(mesh, state)), mesh


@pytest.mark.parametrize('before, after', [(8, 8), (8, 4), (4, 1), (1, 8), (2, 3)])
def test_a_checkpoint_moves_between_device_counts(tmp_path, before, after):
  state, mesh = _state(before, seed=1)
  kept = jax.device_get(state)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2, N, mesh)
  checkpoints.save(state)
  jax.tree.map(lambda x: x.delete(), state)  # as donation does while the save still runs
  checkpoints.close()
  like, mesh = _state(after, seed=2)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2, N, mesh)
  restored = checkpoints.restore(like)
  checkpoints.close()
  assert restored.bank.shape[0] == -(-N // after) * after
  np.testing.assert_array_equal(restored.bank[:N], kept.bank[:N])
  assert not restored.bank[N:].any()
  for a, b in zip(jax.tree.leaves(restored.replace(bank=0)), jax.tree.leaves(kept.replace(bank=0))):
    np.testing.assert_array_equal(a, b)
  assert restored.bank.sharding == NamedSharding(mesh, train.STATE_SPECS.bank)
  assert jax.tree.structure(restored) == jax.tree.structure(like)


def test_the_newest_are_kept(tmp_path):
  state, mesh = _state(2, seed=1)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2, N, mesh)
  for step in (3, 6, 9):
    checkpoints.save(state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding)))
  checkpoints.close()
  assert checkpoint.Checkpoints(tmp_path, 2, N, mesh).latest_step() == 9
  assert sorted(p.name for p in tmp_path.iterdir()) == ['6', '9']
