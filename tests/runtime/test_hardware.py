import types

import pytest

from instdisc_jax.runtime import errors, hardware


@pytest.mark.parametrize('kind, flops', [
    ('TPU v4', 275e12), ('TPU v5 lite', 197e12), ('TPU v5', 459e12), ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12), ('NVIDIA H100 80GB HBM3', 989e12), ('cpu', None)])
def test_a_device_is_its_own_kind_of_chip(kind, flops):
  assert hardware.of(types.SimpleNamespace(device_kind=kind)).flops == flops


def test_an_unknown_device_is_no_chip():
  assert hardware.of(types.SimpleNamespace(device_kind='Radeon')) is None


@pytest.mark.parametrize('topology', [
    'v9:2x2', 'v5e', 'v5e:', 'v5e:2', 'v5e:2x', 'v5e:0x2', 'v5e:2x2x2x2', 'h100:2x2', 'h100:0',
    'cpu:eight', 'cpu:99999', '16x16'])
def test_an_unknown_topology_lists_the_known(topology):
  with pytest.raises(errors.UserError) as raised:
    hardware.absent(topology)
  assert str(raised.value) == (
      f"--topology is '{topology}', must be KIND:SHAPE, e.g. v5e:2x4, v5e:16x16, v5p:4x4x4, "
      'v6e:8x8, h100:8 or cpu:8: set --topology')


@pytest.mark.parametrize('topology, package, extra', [
    ('v5e:2x2', 'libtpu', 'tpu'), ('h100:8', 'jax_cuda12_plugin', 'cuda12')])
def test_a_compiler_that_is_missing_is_named_with_its_installation(monkeypatch, topology, package,
                                                                   extra):
  monkeypatch.setattr(hardware.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.UserError, match=f"{package}, is not installed: run pip install 'jax"
                                             rf'\[{extra}\]==\d'):
    hardware.absent(topology)


def test_products_of_float32_cost_more_by_precision():
  chip = hardware.CHIPS['v5e']
  assert [chip.products(p) for p in ('bfloat16', 'default', 'high', 'highest')] == [1, 1, 3, 6]
