import dataclasses
import json
import subprocess
import sys

import jax
import pytest

from instdisc_jax import compile as compile_lib
from instdisc_jax import programs
from instdisc_jax.runtime import errors, hardware
from tests.conftest import small_config

CHIP = hardware.Chip('imaginary', 1e12, 1e11, 2**40)


def _run(chip=CHIP, num_rows=10_007, **settings):
  config = small_config()
  config.dataset.update(name=f'fake:{num_rows}', limit=None)
  config.augment.size = 8
  config.update_from_flattened_dict({key.replace('__', '.'): v for key, v in settings.items()})
  return programs.Run(config, jax.devices(), chip, queries=100)


@pytest.fixture(scope='module')
def reports():
  run = _run()
  return {name: run.compile(name) for name in programs.NAMES}


def test_every_program_is_compiled_and_measured(reports):
  assert not reports['restore'].compile_seconds and reports['restore'].costs is None
  state = reports['restore'].memory['outputs']
  assert reports['restore'].needed == 2 * state  # the initial state, and the restored one
  for name, report in reports.items():
    if name == 'restore':
      continue
    assert report.compile_seconds > 0 and report.costs.bytes > 0
    memory = report.memory
    assert memory['total'] == (memory['arguments'] + memory['outputs'] - memory['aliased']
                               + memory['temporary'])
    assert report.needed >= state
    seconds = {'compute': sum(report.costs.flops.values()) / 1e12,
               'memory': report.costs.bytes / 1e11}
    assert report.roofline_seconds == pytest.approx(max(seconds.values()), rel=0.5)
    assert report.bound_by in seconds
  step = reports['step']
  assert step.memory['aliased'] > 0 and {c.kind for c in step.costs.collectives} == {
      'all-reduce', 'all-gather', 'reduce-scatter'}
  assert reports['embed'].costs.collectives == reports['checkpoint'].costs.collectives == ()
  assert reports['checkpoint'].memory['outputs'] == pytest.approx(state, rel=0.1)


def test_the_programs_of_the_evaluation_are_compiled():
  run = _run(num_rows=5_003)
  for name in programs.EVALUATION:
    report = run.compile(name)
    assert report.compile_seconds > 0 and report.costs.bytes > 0 and report.memory['beside'] == 0
    kinds = {c.kind for c in report.costs.collectives}
    assert kinds == {'features': set(), 'neighbors': {'all-gather', 'all-to-all'},
                     'linear_online': {'all-gather', 'all-reduce'},
                     'few_label': {'all-reduce'}}[name]


def test_the_verdict_names_the_largest_program_and_the_setting_that_would_make_it_fit(reports):
  run = _run()
  fits, line = run.verdict(list(reports.values()))
  assert fits and line.startswith('fits: the largest program, ')
  bank = 10_008 / 8 * 16 * 4
  sized = lambda program, needed, temporary=0.0: programs.Report(
      program, memory={'total': float(needed), 'beside': 0.0, 'temporary': float(temporary)})

  def advice(report, capacity, **settings):
    verdict = _run(dataclasses.replace(CHIP, memory=capacity), **settings).verdict([report])
    assert not verdict[0] and 'GiB too much: ' in verdict[1]
    return verdict[1].rpartition(': ')[2]

  large = 2**30
  assert advice(sized('knn', large), large - bank / 4) == 'set --config.bank.dtype=bfloat16'
  assert advice(sized('checkpoint', large), large - bank) == 'set --config.bank.dtype=bfloat16'
  assert advice(sized('step', large, large / 2), large * 0.7,
                batch_size=64) == 'set --config.accumulate_steps=4'
  assert advice(sized('knn', large), large / 3) == 'choose a --topology with at least 32 devices'
  assert advice(sized('knn', large), 1000.0) == (
      'set --config.model.name or --config.model.width to a smaller encoder')


def test_what_cannot_fit_is_not_compiled():
  run = _run(dataclasses.replace(CHIP, memory=1e5))
  report = run.compile('checkpoint')
  assert report.compile_seconds == 0 and report.costs is None and report.needed > 1e5


def test_the_json_has_the_numbers_of_the_table(reports):
  found = programs.to_json(_run(), list(reports.values()), 'v5e:2x4')
  found = json.loads(json.dumps(found))
  assert [program['program'] for program in found['programs']] == list(programs.NAMES)
  for program in found['programs']:
    assert program.keys() == {
        'program', 'topology', 'num_devices', 'compile_seconds', 'flops', 'bytes_accessed',
        'memory', 'collectives', 'roofline_seconds', 'bound_by'}
    assert program['memory'].keys() >= {'arguments', 'outputs', 'aliased', 'temporary', 'total',
                                        'capacity'}
    for collective in program['collectives']:
      assert collective.keys() == {'kind', 'count', 'bytes'}
  assert found['fits'] and found['num_rows'] == 10_007


def test_a_published_set_need_not_be_here():
  config = small_config()
  config.dataset.update(name='tfds:imagenet2012', limit=None, data_dir='nowhere')
  assert programs.Run(config, jax.devices(), CHIP).setup.num_rows == 1_281_167
  config.dataset.limit = 1000
  assert programs.Run(config, jax.devices(), CHIP).setup.num_rows == 1000
  config.dataset.update(limit=None, validation='0.1')
  assert programs.Run(config, jax.devices(), CHIP).setup.num_rows == 1_281_167 - 128_117


def test_too_many_rows_are_refused():
  with pytest.raises(errors.UserError, match='fake:2147483648 has 2147483648 training images, '
                                             'must be at most 2147483640'):
    _run(num_rows=2**31)


@pytest.mark.parametrize('arguments, message', [
    (['--topology=v9:2x2'], "--topology is 'v9:2x2', must be KIND:SHAPE, e.g. v5e:2x4"),
    (['--topology=cpu:8', '--program=stop'],
     "--program is 'stop', must be all, evaluate, or one of init"),
    (['--topology=cpu:8', '--queries=0'], '--queries is 0, must be at least 1'),
    (['--topology=cpu:8', '--output=a.txt'], "--output is 'a.txt', must be a file that ends in"),
    (['--topology=cpu:8', '--config.batch=1'], "unknown setting 'batch'")])
def test_a_mistake_is_one_line(capsys, arguments, message):
  assert compile_lib.main(['--config=configs/digits.py', *arguments]) == 2
  error = capsys.readouterr().err
  assert error.startswith(f'error: {message}') and error.count('\n') == 1


@pytest.mark.slow
def test_the_command_prints_a_table_and_a_verdict(tmp_path):
  done = subprocess.run(
      [sys.executable, '-m', 'instdisc_jax.compile', '--config=configs/digits.py',
       '--topology=cpu:3', '--config.batch_size=129', '--program=rows,checkpoint,restore',
       f'--output={tmp_path}/c.json'], check=False, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert [line.split(':')[0] for line in done.stderr.splitlines()] == [
      'rows', 'checkpoint', 'restore']
  lines = done.stdout.splitlines()
  assert lines[0].startswith('resnet10, softmax, N = 1,297, B = 129, 3 devices')
  assert lines[-1].startswith('fits: the largest program, ')
  assert json.loads((tmp_path / 'c.json').read_text())['verdict'] == lines[-1]
