"""The training loop."""

from collections.abc import Callable
from typing import Any

from instdisc_jax.data import feeds
from instdisc_jax.runtime import checkpoint, compilation, errors, preemption, profiling
from instdisc_jax.training import monitor as monitor_lib
from instdisc_jax.training import step as step_lib
from instdisc_jax.training.plan import Plan
from instdisc_jax.training.state import Setup, TrainState


def fit(state: TrainState, setup: Setup, feed: feeds.Feed, *, plan: Plan,
        checkpoints: checkpoint.Checkpoints, monitor: monitor_lib.Monitor, trace: profiling.Trace,
        watch: preemption.Watch, evaluate: Callable[[TrainState], dict[str, float]]) -> TrainState:
  """Trains from `state.step` to the end of the run.

  Each iteration dispatches steps and settles the previous dispatch; after some steps it evaluates,
  saves, or stops. Nothing is fetched from the devices between steps except the metrics of the
  previous dispatch. A checkpoint is written at its steps, and when the last one is some minutes
  old, but only if all its values are finite.

  Args:
    state: the state to start from; donated.
    setup: the fixed parts of the run.
    feed: the source of batches.
    plan: the schedule of events.
    checkpoints: the run's checkpoints.
    monitor: checks and logs the metrics.
    trace: the profiler's trace.
    watch: watches for signals.
    evaluate: state -> what is measured of it, e.g. kNN top-1.

  Returns:
    The trained state.

  Raises:
    errors.RunError: a value is not finite.
    errors.Stopped: stopped by a signal; the state is saved.
  """
  run_steps: Any = step_lib.over_mesh(setup, feed)
  step, running, compiled = int(state.step), None, False
  watch.check()
  if plan.evaluates(step) and not monitor.has_evaluated(step):  # a signal interrupted it
    monitor.evaluated(step, evaluate(state))
  while step < plan.end:
    count = plan.steps_to_next_event(step, feed.per_dispatch)
    with monitor.timer.waiting():
      inputs = feed.at(step)
    if not compiled:
      run_steps, costs = compilation.ahead_of_time(run_steps, (state, inputs, count),
                                                   setup.mesh.devices.flat[0])
      monitor.compiled(costs)
      compiled = True
    trace.before(step, state)
    state, history = run_steps(state, inputs, count)
    step += count
    asked = monitor.settle(running) if running is not None else 0  # while this dispatch computes
    running = monitor_lib.Dispatch(step, count, history,
                                   watch.poll(setup.mesh, checkpoints.is_due()))
    if not (asked or plan.evaluates(step) or plan.saves(step)):
      continue
    asked = max(asked, monitor.settle(running))
    running, stop = None, asked == preemption.STOP
    if plan.evaluates(step) and not stop:
      stop = not _evaluate(state, step, monitor, evaluate)
    if asked or stop or plan.saves(step):
      monitor_lib.check_finite(state, setup.mesh, checkpoints.latest_step())
      checkpoints.save(state, monitor.losses)
    if stop:
      raise errors.Stopped(f'stopped by {watch.name()} at step {step} of {plan.end}, which is '
                           'saved: run the same command again to resume')
    monitor.timer.restart()
  return state


def _evaluate(state, step, monitor, evaluate):
  """Whether the evaluation was completed; a signal interrupts it."""
  try:
    monitor.evaluated(step, evaluate(state))
  except errors.Stopped:
    return False
  return True
