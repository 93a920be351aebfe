import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdisc_jax.runtime import digest
from instdisc_jax.runtime import mesh as mesh_lib


@pytest.mark.parametrize('num_devices', [1, 3, 8])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_digest_of_sharded_rows_is_that_of_their_bytes(monkeypatch, num_devices, dtype):
  rows = np.random.default_rng(0).standard_normal((101, 4)).astype(dtype)
  rows[:3] = np.array([[-0.0], [0.0], [np.inf]], dtype)  # sums would lose the first one's sign
  mesh = mesh_lib.make(jax.devices()[:num_devices])
  sharded = mesh_lib.shard_rows(rows, mesh)
  expected = hashlib.sha256(rows.tobytes()).hexdigest()
  assert digest.of_arrays([rows]) == expected
  for most_bytes in (2**26, 7 * 4 * rows.itemsize, 1):  # a shard, 7 rows, a row at a time
    monkeypatch.setattr(digest, '_MOST_BYTES', most_bytes)
    assert digest.of_rows(sharded, 101, mesh) == expected


def test_no_device_receives_more_than_a_piece():
  mesh = mesh_lib.make()
  rows = jax.ShapeDtypeStruct((8 * 10_000, 16), jnp.float32,
                              sharding=jax.NamedSharding(mesh, jax.P(mesh_lib.AXIS)))
  compiled = digest.piece(mesh, 50).lower(rows, 0).compile()
  memory = compiled.memory_analysis()
  assert memory.output_size_in_bytes == 50 * 16 * 4
  assert memory.temp_size_in_bytes < 10 * 50 * 16 * 4
