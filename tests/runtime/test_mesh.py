import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdisc_jax.runtime import mesh as mesh_lib


@pytest.mark.parametrize('num_devices', [1, 2, 3, 8])
def test_rows_are_padded_to_a_multiple_of_the_devices_and_sharded(num_devices):
  mesh = mesh_lib.make(jax.devices()[:num_devices])
  rows = np.arange(13.0 * 2, dtype=np.float32).reshape(13, 2)
  for padded in (mesh_lib.pad_rows(rows, num_devices),
                 mesh_lib.pad_rows(jnp.asarray(rows), num_devices),
                 mesh_lib.shard_rows(rows, mesh)):
    assert len(padded) == -(-13 // num_devices) * num_devices
    np.testing.assert_array_equal(padded[:13], rows)
    assert not np.asarray(padded)[13:].any()
  assert [shard.data.shape[0] for shard in padded.addressable_shards] == (
      [len(padded) // num_devices] * num_devices)
  assert isinstance(mesh_lib.pad_rows(rows, num_devices), np.ndarray)


def test_a_batch_of_this_process_becomes_a_global_array():
  mesh = mesh_lib.make(jax.devices()[:4])
  slots = mesh_lib.local_slots(mesh, 8)
  np.testing.assert_array_equal(slots, np.arange(8))  # one process has all places
  local = np.arange(8 * 3).reshape(8, 3)
  for lead in (0, 1):
    placed = mesh_lib.place_local(local, mesh, slots, 8, lead)
    np.testing.assert_array_equal(placed, local[None] if lead else local)
    assert placed.sharding.spec == jax.P(*(None,) * lead, mesh_lib.AXIS)
  copies = mesh_lib.replicate(local, mesh).addressable_shards
  assert len(copies) == 4 and all(np.array_equal(copy.data, local) for copy in copies)
