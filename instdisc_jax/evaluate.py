"""Measures the features of a trained run: prints tables, and appends to evaluations.jsonl."""

import dataclasses
import json
import os
import pathlib
import tempfile

from rich import console as rich_console

from instdisc_jax import cli, inference
from instdisc_jax.evaluation import protocols
from instdisc_jax.runtime import distributed, errors, files, preemption

FILE = 'evaluations.jsonl'


def evaluate(workdir: str, chosen: list[str], dataset: str | None) -> None:
  """Evaluates a trained run; every process must call it.

  Args:
    workdir: the run's folder.
    chosen: the names of the protocols.
    dataset: a data set other than the run's own, or None.

  Raises:
    errors.UserError: the run or the data are unsuitable.
    errors.Stopped: stopped by a signal.
  """
  model, console = inference.load(workdir), rich_console.Console(highlight=False)
  file = model.workdir / FILE
  if isinstance(file, pathlib.Path) and not os.access(model.workdir, os.W_OK):
    raise errors.UserError(f"'{workdir}' cannot be written", setting='--workdir',
                           remedy='set <--workdir> to a copy of it')
  with preemption.Watch() as watch, tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch) if files.in_bucket(file) else model.workdir / 'features'
    sets = protocols.prepare(model, pathlib.Path(folder), chosen, dataset)
    sets = dataclasses.replace(sets, check=watch.check_here)

    def measure():
      for protocol in chosen:
        results = []
        for result in protocols.PROTOCOLS[protocol].measure(sets):
          watch.check_here()
          results.append(result)
          line = {'protocol': protocol, 'dataset': sets.name, 'step': model.step} | result
          files.append(file, json.dumps(line) + '\n')
        protocols.show(protocol, results, console)

    distributed.first_only(measure)


def main(argv=None) -> int:
  """Runs the command; returns its exit code: 0, 2 (user error), 1 (failed), 75 (stopped)."""
  def command():
    parser = cli.make_parser('evaluate', __doc__,
                             '--workdir=DIR --protocol=PROTOCOL[,PROTOCOL] [--dataset=NAME]',
                             protocols.__doc__)
    cli.add_workdir(parser, 'the folder of a run')
    parser.add_argument('--protocol', required=True, metavar='PROTOCOL',
                        help=f'{", ".join(protocols.PROTOCOLS)}; several with commas')
    parser.add_argument('--dataset', metavar='NAME',
                        help='other labeled data, named as in --config.dataset.name')
    cli.add_processes(parser)
    args = parser.parse_args(argv)
    chosen = args.protocol.split(',')
    for protocol in chosen:
      if protocol not in protocols.PROTOCOLS:
        raise errors.UserError(f"--protocol is '{protocol}'",
                               f'one of {", ".join(protocols.PROTOCOLS)}', setting='--protocol')
    cli.join_processes(args)
    evaluate(args.workdir, chosen, args.dataset)

  return cli.run(command, {'dataset.name': '--dataset'})


if __name__ == '__main__':
  distributed.leave(main())
