import pathlib
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import optax
import pytest

from instdisc_jax.runtime import checkpoint, errors
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import state as state_lib

N, D = 13, 4  # no device count above 1 divides N


def _state(num_devices, seed):
  """A small `TrainState` sharded over this many devices."""
  mesh = mesh_lib.make(jax.devices()[:num_devices])
  random = np.random.default_rng(seed)
  params = {'w': jnp.asarray(random.standard_normal((3, 2)), jnp.float32)}
  state = state_lib.TrainState(
      step=jnp.int32(7), params=params, batch_stats={'mean': jnp.arange(3.0) + seed},
      opt_state=optax.sgd(0.1, momentum=0.9).init(params),
      bank=mesh_lib.pad_rows(jnp.asarray(random.standard_normal((N, D)), jnp.float32), num_devices),
      normalizer=jnp.float32(seed))
  return jax.device_put(state, state_lib.shardings(mesh, state)), mesh


@pytest.mark.parametrize('before, after', [(8, 8), (8, 4), (4, 1), (1, 8), (2, 3)])
def test_a_checkpoint_moves_between_device_counts(tmp_path, before, after):
  state, mesh = _state(before, seed=1)
  kept = jax.device_get(state)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2, N)
  checkpoints.save(state)
  jax.tree.map(lambda x: x.delete(), state)  # as donation does while the save still runs
  checkpoints.close()
  like, mesh = _state(after, seed=2)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2, N)
  restored = checkpoints.restore(like)
  checkpoints.close()
  assert restored.bank.shape[0] == -(-N // after) * after
  np.testing.assert_array_equal(restored.bank[:N], kept.bank[:N])
  assert not restored.bank[N:].any()
  for a, b in zip(jax.tree.leaves(restored.replace(bank=0)), jax.tree.leaves(kept.replace(bank=0))):
    np.testing.assert_array_equal(a, b)
  assert restored.bank.sharding == NamedSharding(mesh, state_lib.SPECS.bank)
  assert jax.tree.structure(restored) == jax.tree.structure(like)


def test_the_newest_are_kept(tmp_path):
  state, mesh = _state(2, seed=1)
  checkpoints = checkpoint.Checkpoints(tmp_path, 2, N)
  for step in (3, 6, 9):
    checkpoints.save(state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding)))
  checkpoints.close()
  assert checkpoint.Checkpoints(tmp_path, 2, N).latest_step() == 9
  assert sorted(p.name for p in tmp_path.iterdir()) == ['6', '9']


def _flip_a_byte(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


_DAMAGES = {
    'a byte flipped': (_flip_a_byte, 'was changed'),
    'cut short': (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'was changed'),
    'missing': (lambda path: path.unlink(), 'no file'),
}


def _saved(folder, steps):
  """Checkpoints of these steps, and a state like them."""
  state, mesh = _state(2, seed=1)
  checkpoints = checkpoint.Checkpoints(folder, 5, N)
  for step in steps:
    checkpoints.save(state.replace(step=jax.device_put(jnp.int32(step), state.step.sharding)),
                     [step / 3])
  checkpoints.close()
  return checkpoint.Checkpoints(folder, 5, N), state


def test_the_losses_since_the_last_line_are_restored(tmp_path):
  checkpoints, _ = _saved(tmp_path / 'c', (3, 7))
  assert checkpoints.pending_losses() == [7 / 3]


@pytest.mark.parametrize('damage', _DAMAGES)
def test_a_damaged_checkpoint_is_moved_aside_and_the_previous_one_used(tmp_path, capsys, damage):
  harm, words = _DAMAGES[damage]
  _saved(tmp_path / 'c', (3, 6, 9))
  newest = tmp_path / 'c' / '9'
  files = [path.relative_to(newest) for path in newest.rglob('*') if path.is_file()]
  files.remove(pathlib.Path('commit_success.txt'))  # says only that the folder has its name
  assert len(files) >= 8
  for number, file in enumerate(files):
    folder = tmp_path / str(number)
    shutil.copytree(tmp_path / 'c', folder)
    if file.name == '_CHECKPOINT_METADATA' and damage != 'missing':
      continue  # Orbax's own dates, which nothing reads
    harm(folder / '9' / file)
    state, mesh = _state(2, seed=1)
    checkpoints = checkpoint.Checkpoints(folder, 5, N)
    checkpoints.move_damaged_aside()
    message = capsys.readouterr().err
    assert message.startswith('warning: checkpoint 9 is damaged (') and message.count('\n') == 1
    assert words in message or file.name == 'manifest.json'
    assert checkpoints.latest_step() == 6 and int(checkpoints.restore(state).step) == 6
    assert (tmp_path / f'{number}-damaged' / '9.0').is_dir()
    if number == 0:
      checkpoints.save(state.replace(step=jax.device_put(jnp.int32(9), state.step.sharding)))
    checkpoints.close()
    assert checkpoint.read(folder)['step'] == (6 if number else 9)


def test_with_every_checkpoint_damaged_nothing_is_changed(tmp_path):
  checkpoints, _ = _saved(tmp_path / 'c', (3, 6))
  for step in (3, 6):
    (tmp_path / 'c' / str(step) / 'manifest.json').write_text('{}')
  before = sorted(tmp_path.rglob('*'))
  for _ in range(2):
    with pytest.raises(errors.RunError, match='every checkpoint in .* is damaged .6: no readable '
                                              'manifest.json, 3: .*nothing was changed'):
      checkpoints.move_damaged_aside()
  assert sorted(tmp_path.rglob('*')) == before
  with pytest.raises(errors.UserError, match='no intact checkpoint in'):
    checkpoint.read(tmp_path / 'c')


def test_reading_skips_a_damaged_checkpoint_with_a_warning(tmp_path, capsys):
  _saved(tmp_path / 'c', (3, 6))
  _flip_a_byte(tmp_path / 'c' / '6' / 'default' / '_METADATA')
  assert checkpoint.read(tmp_path / 'c')['step'] == 3
  assert 'warning: checkpoint 6 in' in capsys.readouterr().err


def test_what_a_kill_leaves_of_a_save_is_removed(tmp_path):
  _saved(tmp_path / 'c', (3,))
  (tmp_path / 'c' / '6.orbax-checkpoint-tmp' / 'default').mkdir(parents=True)
  state, mesh = _state(2, seed=1)
  checkpoints = checkpoint.Checkpoints(tmp_path / 'c', 5, N)
  assert checkpoints.latest_step() == 3
  checkpoints.save(state)
  checkpoints.close()
  assert sorted(p.name for p in (tmp_path / 'c').iterdir()) == ['3', '7']
