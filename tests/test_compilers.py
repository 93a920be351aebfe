"""The programs of runs, compiled by the real compilers of hardware that is not here.

Needs `pip install .[tpu-compiler]` or `.[gpu-compiler]`; without them these tests are skipped.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
_PACKAGES = {'v5e': 'libtpu', 'v6e': 'libtpu', 'h100': 'jax_cuda12_plugin'}
_SMALL = {
    'model.name': 'resnet10_cifar', 'model.width': 4, 'model.embedding_dim': 128,
    'augment.size': 16, 'batch_size': 64, 'loss.noise_count': 64, 'loss.block_rows': 1024,
    'model.sync_batch_norm': True}


def _need(topology):
  package = _PACKAGES[topology.partition(':')[0]]
  if importlib.util.find_spec(package) is None:
    pytest.skip(f'{package} is not installed')


def _compile(tmp_path, config, topology, program='all', **settings):
  """(exit code, the JSON) of the command."""
  _need(topology)
  done = subprocess.run(
      [sys.executable, '-m', 'instdisc_jax.compile', f'--config=configs/{config}',
       f'--topology={topology}', f'--program={program}', f'--output={tmp_path}/c.json',
       *(f'--config.{key}={value}' for key, value in settings.items())],
      check=False, capture_output=True, text=True)
  assert done.returncode in (0, 1) and 'Traceback' not in done.stderr, done.stderr
  return done.returncode, json.loads((tmp_path / 'c.json').read_text())


@pytest.mark.parametrize('config, topology, settings', [
    ('digits.py', 'h100:1', {}),
    ('cifar10.py', 'h100:1', {}),
    ('cifar10_fast.py', 'h100:1', {}),
    ('cifar10_nce.py', 'h100:1', {}),
    ('fake.py', 'h100:1', {}),
    ('folder.py', 'h100:1', {'dataset.name': 'fake:20000'}),
    ('imagenet.py', 'h100:8', {}),
    ('imagenet.py:softmax', 'h100:1', {}),
    ('imagenet_tpu.py', 'v5e:4x8', {})])
def test_every_recipe_fits_the_hardware_it_is_for(tmp_path, config, topology, settings):
  code, found = _compile(tmp_path, config, topology, **settings)
  assert code == 0, found['verdict']
  for program in found['programs']:
    memory = program['memory']
    assert memory['total'] <= memory['capacity']
    assert program['roofline_seconds'] or program['program'] == 'restore'


def test_the_evaluation_of_imagenet_fits_an_h100(tmp_path):
  code, found = _compile(tmp_path, 'imagenet.py', 'h100:1', 'evaluate')
  assert code == 0, found['verdict']
  assert found['num_rows'] == 1_281_167
  assert [program['program'] for program in found['programs']] == [
      'features', 'neighbors', 'linear_online', 'few_label']


def test_the_weights_of_linear_classifiers_stay_on_their_device(tmp_path):
  code, found = _compile(tmp_path, 'imagenet.py', 'v5e:2x4', 'linear_online', **{
      'model.name': 'resnet10', 'model.width': 4, 'augment.size': 32})
  assert code == 0, found['verdict']
  carried, _ = _carried(found, 'linear_online')
  assert 0 < carried['all-reduce'] < 1e6


def _carried(found, program):
  """({kind: bytes} of a program's collectives, its memory)."""
  chosen, = (p for p in found['programs'] if p['program'] == program)
  return {c['kind']: c['bytes'] for c in chosen['collectives']}, chosen['memory']


@pytest.mark.parametrize('loss, bank', [
    ('softmax', 'float32'), ('softmax', 'bfloat16'), ('nce', 'bfloat16'),
    ('sampled_softmax', 'float32'), ('parametric_softmax', 'bfloat16')])
def test_the_step_on_a_slice_sends_no_rows_and_copies_no_bank(tmp_path, loss, bank):
  carried = []
  for num_rows in (100_003, 1_000_003):
    code, found = _compile(tmp_path, 'fake.py', 'v5e:2x4', 'step', **_SMALL, **{
        'loss.name': loss, 'bank.dtype': bank, 'dataset.name': f'fake:{num_rows}'})
    assert code == 0, found['verdict']
    kinds, memory = _carried(found, 'step')
    carried.append(kinds)
  assert carried[0] == carried[1]  # nothing grows with N
  gathered = sum(size for kind, size in carried[1].items() if kind != 'all-reduce')
  assert 0 < gathered <= 8 * 64 * (128 + 4) * 4
  held = 125_001 * 128 * (2 if bank == 'bfloat16' else 4)
  assert memory['aliased'] > held and memory['temporary'] < held * (
      4 if loss == 'parametric_softmax' else 1)  # the gradient of its float32 weights


def test_every_program_is_of_the_size_of_a_shard_where_n_divides_nothing(tmp_path):
  code, found = _compile(tmp_path, 'fake.py', 'v5e:2x4', **_SMALL, **{
      'loss.name': 'softmax', 'bank.dtype': 'bfloat16', 'dataset.name': 'fake:10000019'})
  assert code == 0, found['verdict']
  shard = 1_250_003 * 128 * 2
  for name in ('init', 'check', 'checkpoint', 'rows', 'restore'):
    kinds, memory = _carried(found, name)
    assert sum(kinds.values()) < 1000
    assert memory['temporary'] < shard / 2 or name == 'init'
  kinds, memory = _carried(found, 'digest')
  assert sum(kinds.values()) <= 2**26 and memory['outputs'] <= 2**26


def test_the_softmax_on_a_pod_of_256_chips(tmp_path):
  code, found = _compile(tmp_path, 'fake.py', 'v5e:16x16', 'step,checkpoint', **_SMALL | {
      'batch_size': 256, 'loss.name': 'softmax', 'bank.dtype': 'bfloat16',
      'dataset.name': 'fake:1000000007'})
  assert code == 0, found['verdict']
  kinds, memory = _carried(found, 'step')
  assert sum(kinds.values()) < 10 * 2**20
  assert memory['aliased'] > 10**9 > memory['temporary']
  assert _carried(found, 'checkpoint')[0] == {}


def test_gradients_are_summed_in_float32_unless_asked_otherwise(tmp_path):
  settings = _SMALL | {'loss.name': 'softmax', 'model.dtype': 'bfloat16',
                       'dataset.name': 'fake:100003'}
  wide, narrow = (
      _carried(_compile(tmp_path, 'fake.py', 'v5e:2x4', 'step', **settings,
                        **{'model.reduce_dtype': dtype})[1], 'step')[0]['all-reduce']
      for dtype in ('float32', 'bfloat16'))
  default = _carried(_compile(tmp_path, 'fake.py', 'v5e:2x4', 'step', **settings)[1], 'step')[0]
  assert default['all-reduce'] == wide and narrow < 0.75 * wide


def test_a_bank_too_large_is_refused_with_what_would_help(tmp_path):
  code, found = _compile(tmp_path, 'imagenet_tpu.py', 'v5e:2x2', 'step,checkpoint,restore',
                         **{'dataset.name': 'fake:2000000000'})
  assert code == 1 and not found['fits']
  assert 'GiB too much: choose a --topology with at least ' in found['verdict']


@pytest.mark.parametrize('topology, kernel, batch, dim, dtype', [
    ('v5e:1x1', 'pallas', 1, 128, 'bfloat16'), ('v5e:2x2', 'pallas', 256, 128, 'bfloat16'),
    ('v5e:2x2', 'pallas', 256, 128, 'float32'), ('v5e:2x2', 'pallas', 4096, 128, 'bfloat16'),
    ('v5e:2x2', 'pallas', 4096, 128, 'float32'),
    ('v5e:2x2', 'pallas', 16384, 128, 'bfloat16'),
    ('v6e:2x2', 'pallas', 256, 128, 'bfloat16'),
    ('v5e:2x2', 'pallas', 1000, 256, 'bfloat16'), ('v5e:2x2', 'xla', 256, 128, 'bfloat16'),
    ('h100:1', 'cudnn', 1, 128, 'float16'), ('h100:1', 'cudnn', 256, 128, 'float16'),
    ('h100:8', 'cudnn', 2048, 128, 'bfloat16'), ('h100:1', 'cudnn', 256, 32, 'float16')])
def test_the_softmax_reads_the_bank_once_and_writes_no_score(topology, kernel, batch, dim, dtype):
  _need(topology)
  num_rows = 1_281_167
  done = subprocess.run(
      [sys.executable, '-m', 'tests.kernels.absent', topology, kernel, str(batch), str(num_rows),
       str(dim), dtype], check=True, capture_output=True, text=True)
  found = json.loads(done.stdout.splitlines()[-1])
  reads = -(-batch // 4096)  # of the bank: once for a tile of queries
  assert found['bytes'] <= 1.2 * reads * found['bank'] + 64 * 4 * batch * (dim + 128)
  assert found['largest'] <= max(found['bank'], 4 * 256 * 128 * 2 * dim)
  assert found['temporary'] < 0.2 * found['bank'] + 3 * 256 * 128 * 2 * dim
  if kernel == 'cudnn':  # its log-sum-exp [parts, 1, B] stays float32
    parts = max(1, 256 * 128 // max(128, batch))
    shapes = (f'[{parts},{batch}]', f'[{parts},1,{batch}]', f'[{parts},{batch},1]')
    assert not [array for array in found['narrow'] if array.endswith(shapes)]


def test_a_deterministic_step_of_a_gpu_has_no_sort():
  _need('h100:1')
  code = """if True:
    from instdisc_jax import cli, programs
    from instdisc_jax.runtime import compilation, hardware
    compilation.make_gpus_deterministic()
    config = cli.read_config('configs/imagenet.py:softmax', [
        '--config.dataset.name=fake:100000', '--config.model.dtype=bfloat16',
        '--config.model.name=resnet18'])
    text = programs.Run(config, *hardware.absent('h100:1')).lower('step').compile().as_text()
    print(text.count('convolution') + text.count('__cudnn$conv'), text.count(' sort('))
  """
  done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
  convolutions, sorts = map(int, done.stdout.split()[-2:])
  assert convolutions > 20 and sorts == 0
