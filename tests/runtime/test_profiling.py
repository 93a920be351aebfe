import gzip
import json
import types

import jax
import jax.numpy as jnp
import pytest

from instdisc_jax import experiment
from instdisc_jax.runtime import metrics, profiling
from tests.conftest import small_config


def test_flops_bytes_and_utilization_of_a_matrix_product():
  a, b = jnp.zeros((64, 256), jnp.float32), jnp.zeros((256, 128), jnp.float32)
  compiled = jax.jit(jnp.dot).lower(a, b).compile()
  costs = profiling.Costs(compiled, 1.5, types.SimpleNamespace(device_kind='TPU v4'))
  assert costs.flops == pytest.approx(2 * 64 * 256 * 128, rel=0.01)
  assert str(costs) == 'compiled in 1.5 s, 0.00 GFLOP per step and device, 0 MiB per device'
  rate = 275e12 / 4 / costs.flops  # steps per second at a quarter of the peak
  assert costs.utilization(rate) == '68.750 TFLOP/s per device, 25.0% of peak'
  unknown = profiling.Costs(compiled, 1.5, jax.devices('cpu')[0])
  assert unknown.utilization(rate) == '68.750 TFLOP/s per device'


def test_a_traced_run_writes_a_trace_and_trains_the_same(trained, tmp_path, capsys):
  _, expected, _ = trained
  config = small_config()
  config.profile_steps = 2
  summary = experiment.run(config, tmp_path, jax.devices()[:1])
  assert summary['params_digest'] == expected['params_digest']
  out = capsys.readouterr().out
  assert out.count('the step: compiled in ') == 1 and out.count('the first steps: ') == 1
  trace, = tmp_path.glob('plugins/profile/*/*.trace.json.gz')
  with gzip.open(trace) as file:
    names = [event.get('name', '') for event in json.load(file)['traceEvents']]
  steps = [name for name in names if 'train_steps' in name]
  assert steps, set(names)
  assert list(tmp_path.glob('plugins/profile/*/*.xplane.pb'))
  assert [line['step'] for line in metrics.read(tmp_path) if 'loss' in line] == [4, 8, 12]
