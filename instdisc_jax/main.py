"""Trains by instance discrimination; run on the same workdir again, it goes on where it stopped."""

import argparse
import contextlib
import difflib
import json
import logging
import os
import sys
import time

from absl import flags
import jax
from ml_collections import config_dict, config_flags

from instdisc_jax import (
  checkpoint,
  data,
  distributed,
  errors,
  files,
  models,
  preemption,
  profiling,
  start,
  train,
)
from instdisc_jax import config as config_lib
from instdisc_jax import metrics as metrics_lib
from instdisc_jax import workdir as workdir_lib
from instdisc_jax.data import folder, resident
from instdisc_jax.evaluation import report


def parse(argv):
  """Command line -> (arguments, config); raises `errors.UserError`."""
  settings = config_lib.flatten(config_lib.default())
  listed = '\n'.join(f'  --config.{key}={value}' for key, value in settings.items())
  parser = argparse.ArgumentParser(
      prog='python -m instdisc_jax.main', description=__doc__, allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
      usage='%(prog)s --config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]',
      epilog=f'settings, with their defaults (a config file sets its own):\n{listed}')
  parser.add_argument('--config', metavar='FILE', required=True,
                      help='a Python file with get_config(), e.g. configs/digits.py; '
                           'configs/imagenet.py:resnet18 calls get_config("resnet18")')
  parser.add_argument('--workdir', metavar='DIR', required=True,
                      help='where checkpoints, metrics and the summary go: a folder, or '
                           'gs://BUCKET/FOLDER')
  several = parser.add_argument_group(
      'several processes', 'Each is started with the same command, on its own machine or devices.')
  several.add_argument('--distributed', action='store_true',
                       help='they are found from Slurm, Open MPI, GKE or Cloud TPU')
  several.add_argument('--coordinator', metavar='HOST:PORT', help='or: the address of process 0,')
  several.add_argument('--num_processes', type=int, metavar='P', help='their number,')
  several.add_argument('--process_id', type=int, metavar='I', help='and the number of this one')
  several.add_argument('--heartbeat_seconds', type=int, metavar='S', default=100,
                       help='one silent for so long has died, and the others end (default: 100)')
  parser.error = lambda message: errors.raise_user_error(f'{message}: see --help')
  known, overrides = parser.parse_known_args(argv)
  for argument in overrides:
    if not argument.startswith(('--config.', '-config.')):
      raise errors.UserError(f"unknown argument '{argument}': see --help")
    key = argument.partition('.')[2].partition('=')[0]
    if key not in settings:
      close = difflib.get_close_matches(key, settings, 1)
      raise errors.UserError(f"unknown setting '{key}'"
                             + (f", perhaps meant as '{close[0]}'" if close else '')
                             + ': see --help for all settings')
  file, colon, presets = known.config.partition(':')
  package = os.path.dirname(os.path.abspath(__file__))
  places = ['']
  if file.startswith('configs/'):  # which are installed in the package, and else lie beside it
    places += [package, os.path.dirname(package)]
  found = [path for path in (os.path.join(place, file) for place in places) if os.path.isfile(path)]
  if found:
    known.config = found[0] + colon + presets
  else:
    raise errors.UserError(f"no file '{known.config}': set --config=configs/NAME.py")
  sys.modules.pop('config_config', None)  # where ml_collections keeps the file it read last
  values = flags.FlagValues()
  command = ['main', f'--config={known.config}', *overrides]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=command)
  try:
    values(command)
    config = values.config
  except (KeyError, flags.Error) as e:
    raise errors.UserError(
        f'{errors.one_line(e)}: see --help for all settings and their form') from e
  except Exception as e:  # whatever the file raises when it is run
    raise errors.UserError(f"'{known.config}' is no configuration ({type(e).__name__}: "
                           f'{errors.one_line(e)}): set --config=configs/NAME.py') from e
  if not isinstance(config, config_dict.ConfigDict):
    raise errors.UserError(f"get_config() of '{known.config}' returns {type(config).__name__}, "
                           'must return a ConfigDict: set --config=configs/NAME.py')
  return known, config


def run(config, workdir, devices=None, watch=None):
  """Trains to the end, evaluates, and returns the summary.

  Args:
    config: a `ConfigDict` with the keys of `config.default()`.
    workdir: the run's folder or bucket, made if need be.
    devices: to train on; all that JAX shows by default.
    watch: a `preemption.Watch` that is entered; by default signals are left alone.

  Returns:
    What summary.json holds.

  Raises:
    errors.UserError: a setting, the data or the workdir is not as it must be.
    errors.RunError: the run failed.
    errors.Stopped: a signal came; what was done is saved.
  """
  started = time.monotonic()
  logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax and TFDS report all they do
  watch, workdir = watch or preemption.Watch(), files.place(workdir)
  config_lib.validate(config)
  dataset = data.load(config.dataset, config.seed, workdir)
  num_rows, mesh = len(dataset.train), train.make_mesh(devices)
  config = config_lib.fill(config, num_rows)
  if config.dataset.path == 'auto':
    config.dataset.path = _data_path(config, dataset.train, workdir, mesh)
  weights = None if config.model.init is None else start.read_weights(config)
  view_size = train.view_size(config, dataset.train.shape)
  if config.dataset.path == 'stream' and view_size[0] == view_size[1]:
    config.augment.size = view_size[0]
  config_lib.validate_for_data(config, num_rows, view_size, mesh.size)

  with contextlib.ExitStack() as stack:
    feed = train.make_feed(config, dataset.train, mesh)
    stack.enter_context(workdir_lib.claim(workdir, config, dataset.train.fingerprint))
    if dataset.listing is not None:
      distributed.first_only(lambda: folder.keep(
          dataset.listing, dataset.train.names, workdir))
    encoder = models.create(
        config.model.name, embedding_dim=config.model.embedding_dim, width=config.model.width,
        dtype=config.model.dtype,
        batch_norm_axis=train.AXIS if config.model.sync_batch_norm else None)
    optimizer = train.make_optimizer(config, num_rows)
    init = train.make_init(config, encoder, optimizer, num_rows, (*view_size, 3), mesh)
    checkpoints = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(
        workdir / 'checkpoints', config.checkpoint.keep, num_rows, mesh)))
    checkpoints.set_damaged_aside()
    saved, end = checkpoints.latest_step(), train.total_steps(config, num_rows)
    if saved is not None and saved > end:
      raise errors.UserError(f"'{workdir}' is at step {saved}, past the {end} steps asked for: set "
                             '--config.epochs (or --config.steps) to more, or another --workdir')
    progress = stack.enter_context(contextlib.closing(metrics_lib.Progress(saved or 0, end)))
    summary_file = workdir / report.SUMMARY
    if saved == end and summary_file.exists():
      summary = json.loads(summary_file.read_text())
      report.show(summary, workdir, progress.console)
      return summary

    evaluator = report.Evaluator(config, dataset, encoder, mesh, feed, watch)
    begin = lambda: start.with_weights(init(), weights)
    state, pending_losses = begin(), []
    if saved is not None:
      state, pending_losses = checkpoints.restore(state), checkpoints.pending_losses()
      progress.print(f'resuming {workdir} at step {saved} of {end}')
    elif config.model.init is not None:
      state = start.with_rows(state, config.model.init, dataset, evaluator, mesh)
    metrics = stack.enter_context(contextlib.closing(metrics_lib.Metrics(workdir, saved or 0)))
    trace = stack.enter_context(contextlib.closing(profiling.Trace(workdir, config.profile_steps)))
    wall_clock = lambda: metrics.earlier_seconds + time.monotonic() - started
    with contextlib.closing(feed):
      state, fitted = train.fit(
          state, feed, config=config, encoder=encoder, optimizer=optimizer, num_rows=num_rows,
          mesh=mesh, checkpoints=checkpoints, pending_losses=pending_losses, metrics=metrics,
          progress=progress, trace=trace, watch=watch, evaluate=evaluator.from_bank,
          wall_clock=wall_clock)
    summary = report.finish(workdir, state, begin(), evaluator, config, dataset, fitted, wall_clock)
    progress.close()
    report.show(summary, workdir, progress.console)
    return summary


def _data_path(config, pictures, workdir, mesh):
  """'resident' or 'stream': as the workdir was begun, or else by what fits on a device."""
  if (workdir / workdir_lib.CONFIG).exists():
    begun = workdir_lib.read(workdir)[0].get('dataset.path')
    if begun is not None:
      return begun
  fake = config.dataset.name.startswith('fake:')
  fits = resident.fits(pictures, config.dataset.resident_share, mesh)
  return 'resident' if fits and not fake else 'stream'


def main(argv=None):
  """The command; returns its exit code: 0, 2 (a user's mistake), 1 (failed), 75 (stopped)."""
  def command():
    args, config = parse(argv)
    if args.distributed or args.coordinator is not None:
      distributed.initialize(args.coordinator, args.num_processes, args.process_id,
                             args.heartbeat_seconds)
    if config.get('deterministic') is True:  # read when JAX first looks for devices
      flags_before = os.environ.get('XLA_FLAGS', '')
      os.environ['XLA_FLAGS'] = f'{flags_before} --xla_gpu_deterministic_ops=true'
    if jax.config.jax_compilation_cache_dir is None:  # a resumed run compiles nothing anew
      jax.config.update('jax_compilation_cache_dir', os.path.join(args.workdir, 'compiled'))
      jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    checkpoint.leave_errors_to_orbax()
    with preemption.Watch() as watch:
      run(config, args.workdir, watch=watch)

  return errors.exit_code(command)


if __name__ == '__main__':
  distributed.leave(main())
