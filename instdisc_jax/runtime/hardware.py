"""Accelerators: the figures of their data sheets, and devices to compile for that are not here.

Google's compiler for TPUs is in the package libtpu, NVIDIA's part of XLA in JAX's CUDA plugin. Both
compile on any machine, for any number of devices.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from instdisc_jax.runtime import errors
from instdisc_jax.runtime import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, as JAX counts them.

  Attributes:
    kind: the prefix of its `device_kind` in JAX.
    flops: peak FLOP/s in dense bfloat16, or None if unknown.
    bandwidth: bytes/s of its memory, or None if unknown.
    memory: bytes that programs can use; infinite if unknown.
    float32_products: bfloat16 products that a float32 product costs, by precision.
  """
  kind: str
  flops: float | None
  bandwidth: float | None = None
  memory: float = math.inf
  float32_products: tuple[tuple[str, float], ...] = ()

  def products(self, precision: str) -> float:
    """Bfloat16 products that a float32 product of this precision costs."""
    return dict(self.float32_products).get(precision, 1.0)


_PASSES = (('three', 3.0), ('high', 3.0), ('highest', 6.0))
CHIPS = {
    'v5e': Chip('TPU v5 lite', 197e12, 819e9, 15.75 * 2**30, _PASSES),
    'v5p': Chip('TPU v5', 459e12, 2765e9, 95.74 * 2**30, _PASSES),
    'v6e': Chip('TPU v6 lite', 918e12, 1640e9, 31.25 * 2**30, _PASSES),
    # JAX takes 75% of a GPU's memory unless told otherwise. TF32 at 495 TFLOP/s, float32 at 67.
    'h100': Chip('NVIDIA H100', 989e12, 3352e9, 0.75 * 84929347584,
                 (('three', 3.0), ('default', 2.0), ('high', 2.0), ('highest', 989 / 67),
                  ('float64', 989 / 67))),
    'cpu': Chip('cpu', None),
}
_OTHERS = Chip('TPU v4', 275e12), Chip('NVIDIA A100', 312e12), Chip('NVIDIA H200', 989e12)
KNOWN = 'KIND:SHAPE, e.g. v5e:2x4, v5e:16x16, v5p:4x4x4, v6e:8x8, h100:8 or cpu:8'

# What XLA needs to know of the card; autotuning, which would need one, is off.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def of(device: Any) -> Chip | None:
  """The chip that a device of JAX is, or None if it is unknown."""
  found = [chip for chip in (*CHIPS.values(), *_OTHERS) if device.device_kind.startswith(chip.kind)]
  return max(found, key=lambda chip: len(chip.kind), default=None)


def absent(topology: str) -> tuple[list[Any], Chip]:
  """Devices to compile for; must be called before anything uses devices.

  Args:
    topology: 'v5e:16x16', 'h100:8', 'cpu:8', ...

  Returns:
    (the devices, of all processes; what each of them is).

  Raises:
    errors.UserError: there is no such topology, or no compiler for it is installed.
  """
  name, _, shape = topology.partition(':')
  form = r'[1-9]\d{0,3}' if name in ('h100', 'cpu') else r'[1-9]\d*(x[1-9]\d*){1,2}'
  if name not in CHIPS or not re.fullmatch(form, shape):
    raise _unknown(topology)
  sizes = [int(size) for size in shape.split('x')]
  jax.config.update('jax_platforms', 'cpu')
  if name == 'cpu':
    jax.config.update('jax_num_cpu_devices', sizes[0])
    memory = mesh_lib.memory(mesh_lib.make())
    return jax.devices(), dataclasses.replace(CHIPS['cpu'], memory=memory)
  if name == 'h100':
    _need('jax_cuda12_plugin', 'cuda12')
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_gpu_autotune_level=0'
    found = _describe(topology, dict(platform='cuda', topology=f'1x1x{sizes[0]}',
                                     target_config=_H100))
  else:
    _need('libtpu', 'tpu')
    # libtpu would ask a cloud what this machine is, warn that there is none, and lock itself.
    for variable, value in (('TPU_SKIP_MDS_QUERY', '1'), ('TPU_WORKER_HOSTNAMES', 'localhost'),
                        ('TPU_ACCELERATOR_TYPE', 'v5litepod-4'),
                        ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')):
      os.environ.setdefault(variable, value)
    alone: Any = {'chips_per_host_bounds': (1, 1, 1)} if set(sizes) == {1} else {}
    found = _describe(topology, dict(platform='tpu', topology_name=topology) | alone)
  return found.devices, CHIPS[name]


def _describe(wanted, how):
  try:
    return topologies.get_topology_desc(**how)
  except Exception as e:
    raise errors.UserError(f"--topology is '{wanted}', for which no devices can be described "
                           f'({errors.one_line(e)[:200]})', setting='--topology') from e


def _unknown(topology):
  return errors.UserError(f"--topology is '{topology}'", KNOWN, setting='--topology')


def _need(module, extra):
  if importlib.util.find_spec(module) is None:
    raise errors.UserError(
        f'the compiler for it, {module}, is not installed', setting='--topology',
        remedy=f"run pip install 'jax[{extra}]=={jax.__version__}'")
