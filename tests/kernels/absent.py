"""The softmax and its gradient compiled for devices that are not here.

    python -m tests.kernels.absent TOPOLOGY KERNEL B N D DTYPE

prints JSON about the program of one device: 'bytes' through memory, those of the 'bank', of the
'largest' array that is written to memory, of the 'temporary' values, and 'narrow', the 16-bit
arrays in the program.
"""

import json
import re
import sys

from instdisc_jax.runtime import hardware, hlo
from instdisc_jax.runtime import mesh as mesh_lib


def main(topology, kernel, batch, num_rows, dim, dtype):
  """Compiles and prints."""
  mesh = mesh_lib.make(hardware.absent(topology)[0])
  import jax
  import jax.numpy as jnp

  from instdisc_jax import kernels, losses
  axis, spec = mesh_lib.AXIS, jax.P(mesh_lib.AXIS)

  def device(features, bank, index):
    def mean_loss(features):
      loss = losses.softmax_loss(features, bank, index, temperature=0.07, kernel=kernel,
                                 axis_name=axis, num_rows=int(num_rows))
      return jax.lax.pmean(loss.mean(), axis)
    return jax.value_and_grad(mean_loss)(features)

  total = mesh_lib.padded(int(num_rows), mesh.size * kernels.row_multiple(kernel))
  array = lambda shape, dtype: jax.ShapeDtypeStruct(
      shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
  mapped = jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=(jax.P(), spec))
  compiled = jax.jit(mapped).lower(
      array((int(batch), int(dim)), jnp.float32), array((total, int(dim)), jnp.dtype(dtype)),
      array((int(batch),), jnp.int32)).compile()
  text = compiled.as_text()
  found = hlo.kernels(text)
  print(json.dumps({
      'bytes': sum(kernel.bytes for kernel in found),
      'bank': total * int(dim) * jnp.dtype(dtype).itemsize / mesh.size,
      'largest': max(kernel.largest for kernel in found),
      'temporary': compiled.memory_analysis().temp_size_in_bytes,
      'narrow': sorted(set(re.findall(r'b?f16\[[\d,]*\]', text)))}))


if __name__ == '__main__':
  main(*sys.argv[1:])
