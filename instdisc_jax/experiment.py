"""A run, from its configuration to its summary. This file only wires the parts together."""

import contextlib
import math
import os
import time
from typing import Any

import jax

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import feeds, folder, views
from instdisc_jax.evaluation import summary as summary_lib
from instdisc_jax.evaluation.evaluator import FEW_ROWS, Evaluator
from instdisc_jax.runtime import (
  checkpoint,
  distributed,
  errors,
  files,
  metrics,
  preemption,
  profiling,
  tracker,
)
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.training import budget, loop, optimizer, warm_start
from instdisc_jax.training.monitor import Monitor
from instdisc_jax.training.plan import Plan
from instdisc_jax.training.state import Setup, make_init


def run(config: config_lib.Config, workdir: str | os.PathLike[str], devices: Any = None,
        watch: preemption.Watch | None = None) -> dict[str, Any]:
  """Trains to the end, evaluates, and returns the summary; resumes a run that was interrupted.

  Args:
    config: a `ConfigDict` with the keys of `config.default()`.
    workdir: the run's folder or bucket; created if needed.
    devices: the devices to train on; by default all that JAX sees.
    watch: an entered `preemption.Watch`; by default signals are not handled.

  Returns:
    The content of summary.json.

  Raises:
    errors.UserError: a setting, the data or the workdir is invalid.
    errors.RunError: the run failed.
    errors.Stopped: stopped by a signal; the progress is saved.
  """
  started = time.monotonic()
  watch, workdir = watch or preemption.Watch(), files.place(workdir)
  setup, dataset = _prepare(config, workdir, mesh_lib.make(devices))
  config, plan = setup.config, Plan.of(setup.config, setup.num_rows)
  weights = None if config.model.init is None else warm_start.read_weights(config)

  with contextlib.ExitStack() as stack:
    settings = config_lib.to_json(config)
    closing = lambda thing: stack.enter_context(contextlib.closing(thing))
    feed = feeds.make(config, dataset.train, setup.mesh, plan.end)
    stack.enter_context(workdir_lib.claim(workdir, settings, config_lib.changeable(settings),
                                          dataset.train.fingerprint))
    if dataset.listing is not None:
      distributed.first_only(lambda: folder.keep(dataset.listing, dataset.train.names or (),
                                                 workdir))
    checkpoints = closing(checkpoint.Checkpoints(workdir / 'checkpoints', config.checkpoint.keep,
                                                 setup.num_rows,
                                                 config.checkpoint.every_minutes))
    checkpoints.move_damaged_aside()
    saved = checkpoints.latest_step()
    _check_end(workdir, saved, plan.end)
    workdir_lib.update(workdir, settings, dataset.train.fingerprint)
    progress = closing(metrics.Progress(saved or 0, plan.end))
    summary = summary_lib.read(workdir)
    if saved == plan.end and summary is not None and summary['steps'] == saved:
      summary_lib.show(summary, workdir, progress.console)
      return summary

    for line in setup.remarks() + optimizer.remarks(setup.config):
      progress.print(line)
    evaluator = Evaluator(setup, dataset, watch)
    init = make_init(setup, views.size(config, dataset.train.shape))
    start = lambda: warm_start.with_weights(init(), weights)
    state, pending_losses = start(), []
    if saved is not None:
      state, pending_losses = checkpoints.restore(state), checkpoints.pending_losses()
      progress.print(f'resuming {workdir} at step {saved} of {plan.end}')
    elif config.model.init is not None:
      state = warm_start.with_rows(state, config.model.init, dataset, evaluator.embed_in_parts,
                                   setup.mesh)
    lines = closing(metrics.Metrics(workdir, saved or 0,
                                    tracker.start(config.tracker, workdir, settings)))
    imported = saved is not None and summary_lib.nothing_trained(workdir)
    if setup.num_rows <= FEW_ROWS and (saved is None or imported):
      progress.print(summary_lib.measure_start(workdir, evaluator, state))
    wall_clock = lambda: lines.earlier_seconds + time.monotonic() - started
    monitor = Monitor(setup, plan, lines=lines, progress=progress, pending_losses=pending_losses,
                      wall_clock=wall_clock, last_saved=checkpoints.latest_step)
    trace = closing(profiling.Trace(workdir, config.profile_steps))
    with contextlib.closing(feed):
      state = loop.fit(state, setup, feed, plan=plan, checkpoints=checkpoints, monitor=monitor,
                       trace=trace, watch=watch, evaluate=evaluator.during_training)
    untrained = lambda: start().replace(bank=None, classifier=None, opt_state=None)
    summary = summary_lib.finish(workdir, setup, dataset, evaluator, (untrained, state),
                                 monitor.timer.mean(), wall_clock)
    progress.close()
    summary_lib.show(summary, workdir, progress.console)
    return summary


def _prepare(config: config_lib.Config, workdir: files.Place,
             mesh: jax.sharding.Mesh) -> tuple[Setup, data.Dataset]:
  """The run's setup and its data; raises `errors.UserError` if they do not fit together."""
  config_lib.validate(config)
  tracker.module(config.tracker)
  dataset = data.load(config.dataset, config.seed, workdir)
  for images in (dataset.train, dataset.test):
    if not distributed.same('' if images is None else images.fingerprint):
      raise errors.UserError(f'{dataset.name} does not hold the same images for all processes',
                             remedy='set <dataset.name> to data that they share, or equal copies',
                             setting='dataset.name')
  num_rows = len(dataset.train)
  stored = workdir_lib.read(workdir)[0] if (workdir / workdir_lib.CONFIG).exists() else {}
  timed = config.minutes is not None  # by the user
  config = config_lib.fill(config, num_rows, mesh_lib.on_cpu(mesh), stored)
  config = config_lib.resume(config, stored)
  measured = config.minutes is not None and stored.get('minutes') == config.minutes
  if measured:
    config = config_lib.with_schedule(config, stored)
  if config.dataset.path == 'auto':
    config.dataset.path = stored.get('dataset.path') or feeds.choose_path(
        config, num_rows, dataset.train.shape, distributed.smallest(mesh_lib.memory(mesh)))
  setup = Setup.for_data(config, num_rows, dataset.train.shape, mesh)
  dataset = dataset.kept(setup.config.dataset.path)
  if config.minutes is not None and not measured:
    config = _timed(setup.config, dataset, mesh, within_epochs=not timed)
    setup = Setup.for_data(config, num_rows, dataset.train.shape, mesh)
  return setup, dataset


def _timed(config, dataset, mesh, within_epochs):
  """The configuration with the steps that `config.minutes` allow.

  `within_epochs`: at most those of its epochs.
  """
  num_rows = len(dataset.train)
  steps = budget.steps(config, dataset.train, mesh)
  if within_epochs:
    steps = min(steps, config.epochs * num_rows // config.batch_size)
  epochs = steps * config.batch_size / num_rows
  ratio = epochs / config.epochs
  config.update(steps=steps, epochs=max(1, math.ceil(epochs)))
  config.optimizer.milestones = tuple(m * ratio for m in config.optimizer.milestones)
  config.optimizer.warmup_epochs *= ratio
  config.loss.neighbors_from_epoch *= ratio
  return config


def _check_end(workdir, saved, end):
  if saved is not None and saved > end:
    raise errors.UserError(
        f"'{workdir}' is at step {saved}, past the {end} steps asked for", setting='epochs',
        remedy='increase <epochs> (or <steps>), or set another <--workdir>')
