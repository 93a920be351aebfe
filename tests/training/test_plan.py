"""The plan of a run against a simulation that counts images one by one."""

import itertools

import numpy as np
import pytest

from instdisc_jax.training import plan as plan_lib
from tests.conftest import small_config

SHAPES = [(32, 128), (16, 45), (7, 7), (7, 10), (5, 100), (64, 65), (1, 3), (45, 45)]  # (B, N)
STEPS = 60


def _plan(batch_size, num_rows, log=3, evaluate=1, save=4, end=STEPS):
  return plan_lib.Plan(batch_size, num_rows, end, log, evaluate, save)


def _simulate(plan):
  """[events of step 0, 1, ...]: sets of 'epoch', 'log', 'evaluate', 'save', by counting."""
  events, seen, into_epoch = [{'save'}], 0, 0
  epochs = [0]
  for step in range(1, plan.end + 1):
    done = set()
    into_epoch += 1
    before = seen // plan.num_rows
    for _ in range(plan.batch_size):
      seen += 1
      if seen % plan.num_rows == 0:
        done.add('epoch')
    epoch = seen // plan.num_rows
    if 'epoch' in done:
      into_epoch = 0
      every = plan.evaluate_every_epochs
      if every and any(e % every == 0 for e in range(before + 1, epoch + 1)):
        done.add('evaluate')
    if into_epoch % plan.log_every_steps == 0 or step == plan.end:
      done.add('log')
    if step % plan.save_every_steps == 0 or step == plan.end:
      done.add('save')
    events.append(done)
    epochs.append(epoch)
  return events, epochs


@pytest.mark.parametrize('log, evaluate, save', [(3, 1, 4), (1, 2, 7), (100, 3, 1), (2, 0, 60)])
@pytest.mark.parametrize('batch_size, num_rows', SHAPES)
def test_events_are_those_of_a_simulation(batch_size, num_rows, log, evaluate, save):
  plan = _plan(batch_size, num_rows, log, evaluate, save)
  events, epochs = _simulate(plan)
  assert not plan.ends_epoch(0) and not plan.evaluates(0)
  for step in range(1, STEPS + 1):
    assert plan.epoch(step) == epochs[step], step
    assert plan.ends_epoch(step) == ('epoch' in events[step]), step
    assert plan.logs(step) == ('log' in events[step]), step
    assert plan.evaluates(step) == ('evaluate' in events[step]), step
    assert plan.saves(step) == ('save' in events[step]), step


@pytest.mark.parametrize('most', [1, 2, 5, 100])
@pytest.mark.parametrize('batch_size, num_rows', SHAPES)
def test_steps_go_together_up_to_the_next_event_and_no_further(batch_size, num_rows, most):
  plan = _plan(batch_size, num_rows, log=5, save=11)
  events, _ = _simulate(plan)
  for step in range(STEPS):
    count = plan.steps_to_next_event(step, most)
    following = [step + i for i in range(1, STEPS - step + 1) if events[step + i] - {'epoch'}]
    assert count == min(most, following[0] - step)


@pytest.mark.parametrize('batch_size, num_rows', SHAPES)
def test_no_event_is_missed_and_the_run_ends(batch_size, num_rows):
  plan = _plan(batch_size, num_rows, log=4, evaluate=2, save=9)
  events, _ = _simulate(plan)
  for most in (1, 7, 100):
    step, visited = 0, set()
    while step < plan.end:
      step += plan.steps_to_next_event(step, most)
      visited.add(step)
    assert step == plan.end
    assert visited >= {i for i in range(1, STEPS + 1) if events[i]}


def test_every_end_of_an_epoch_has_a_line_so_evaluations_end_a_dispatch():
  for (batch_size, num_rows), every in itertools.product(SHAPES, (1, 2, 3)):
    plan = _plan(batch_size, num_rows, evaluate=every)
    steps = np.arange(1, STEPS + 1)
    assert all(plan.logs(step) for step in steps if plan.ends_epoch(step))
    assert all(plan.ends_epoch(step) for step in steps if plan.evaluates(step))


def test_a_plan_has_the_intervals_of_its_configuration():
  config = small_config()
  config.update_from_flattened_dict({
      'log_every_steps': 6, 'knn.every_epochs': 2, 'checkpoint.every_steps': 9})
  plan = plan_lib.Plan.of(config, 100)
  assert plan == plan_lib.Plan(32, 100, 10, 6, 2, 9)  # 3 epochs: 300 images in batches of 32
  config.steps = 4
  assert plan_lib.Plan.of(config, 100).end == 4
