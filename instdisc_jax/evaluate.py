"""Measures the features of a trained run: prints tables, and appends to evaluations.jsonl."""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile

import jax
from rich import console as rich_console

from instdisc_jax import cli, inference
from instdisc_jax.evaluation import detection, protocols
from instdisc_jax.runtime import distributed, errors, files, preemption

FILE = 'evaluations.jsonl'


def evaluate(workdir: str, chosen: list[str], dataset: str | None,
             shares: tuple[float, ...] | None = None) -> None:
  """Evaluates a trained run; every process must call it.

  Args:
    workdir: the run's folder.
    chosen: the names of the protocols.
    dataset: a data set other than the run's own, or None.
    shares: of the labels, for few_label; by default those of its recipe.

  Raises:
    errors.UserError: the run or the data are unsuitable.
    errors.Stopped: stopped by a signal.
  """
  with preemption.Watch() as watch, tempfile.TemporaryDirectory() as scratch:
    model = inference.load(workdir, check=watch.check)
    console = rich_console.Console(highlight=False)
    file = model.workdir / FILE
    if isinstance(file, pathlib.Path) and not os.access(model.workdir, os.W_OK):
      raise errors.UserError(f"'{workdir}' cannot be written", setting='--workdir',
                             remedy='set <--workdir> to a copy of it')
    folder = pathlib.Path(scratch) if files.in_bucket(file) else model.workdir / 'features'
    sets = protocols.prepare(model, pathlib.Path(folder), chosen, dataset)
    sets = dataclasses.replace(sets, watch=watch, shares=shares)

    def record(protocol, result):
      line = {'protocol': protocol, 'dataset': sets.name, 'step': model.step} | result
      files.append(file, json.dumps(line) + '\n')
      return result

    def alone(protocol):
      results = []
      for result in protocols.PROTOCOLS[protocol].measure(sets):
        watch.check_here()
        results.append(record(protocol, result))
      protocols.show(protocol, results, console)

    def together(protocol):
      results, first = [], jax.process_index() == 0
      for result in protocols.PROTOCOLS[protocol].measure(sets):
        results.append(record(protocol, result) if first else result)
      if first:
        protocols.show(protocol, results, console)

    for protocol in chosen:
      watch.check()
      if protocols.PROTOCOLS[protocol].on_mesh:
        together(protocol)
      else:
        distributed.first_only(functools.partial(alone, protocol))


def _shares(text):
  """'0.01,0.1' -> (0.01, 0.1); None for None."""
  if text is None:
    return None
  try:
    shares = tuple(float(share) for share in text.split(','))
  except ValueError:
    shares = ()
  if not shares or not all(0 < share <= 1 for share in shares):
    raise errors.UserError(f"--shares is '{text}'", 'numbers above 0, at most 1',
                           'set <--shares>=0.01,0.1', '--shares')
  return shares


def main(argv=None) -> int:
  """Runs the command; returns its exit code: 0, 2 (user error), 1 (failed), 75 (stopped)."""
  def command():
    parser = cli.make_parser('evaluate', __doc__,
                             '--workdir=DIR --protocol=PROTOCOL[,PROTOCOL] [--dataset=NAME] '
                             '[--shares=SHARE[,SHARE]]',
                             protocols.__doc__)
    cli.add_workdir(parser, 'the folder of a run')
    parser.add_argument('--protocol', required=True, metavar='PROTOCOL',
                        help=f'{", ".join(protocols.PROTOCOLS)}; several with commas')
    parser.add_argument('--dataset', metavar='NAME',
                        help='other labeled data, named as in --config.dataset.name')
    parser.add_argument('--shares', metavar='SHARES',
                        help='few_label: shares of the labels, e.g. 0.01,0.1; 1 is all of them')
    cli.add_processes(parser)
    args = parser.parse_args(argv)
    chosen = args.protocol.split(',')
    for protocol in chosen:
      if protocol not in protocols.PROTOCOLS:
        raise errors.UserError(f"--protocol is '{protocol}'",
                               f'one of {", ".join(protocols.PROTOCOLS)}', setting='--protocol')
    if 'detection' in chosen and len(chosen) > 1:
      raise errors.UserError(f"--protocol is '{args.protocol}'", 'detection alone, on its own data',
                             'set <--protocol>=detection', '--protocol')
    if 'detection' in chosen and args.dataset is None:
      raise errors.UserError('detection needs images with boxes', setting='--dataset',
                             remedy='set <--dataset>=coco:FOLDER or tfds:voc/2007')
    if 'detection' in chosen:
      detection.check_installed('--protocol')
      os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch needs the GPU, too
    shares = _shares(args.shares)
    if shares is not None and 'few_label' not in chosen:
      raise errors.UserError(f"--shares is '{args.shares}' without few_label", remedy='remove it',
                             setting='--shares')
    cli.join_processes(args)
    evaluate(args.workdir, chosen, args.dataset, shares)

  return cli.run(command, {'dataset.name': '--dataset'})


if __name__ == '__main__':
  distributed.leave(main())
