"""Reproduces a table of the paper: each row trained from scratch, beside the published value.

    cifar10          Table 1: the losses, by kNN and by a linear SVM on pooled features
    noise_count      the kNN column of Table 1: from 1 noise sample per image to all other images
    embedding_size   D from 32 to 256
    train_fraction   a part of the training images, and all of them
    proximal         NCE with M = 4,096: λ of the proximal term against the momentum of the bank
    recipe           the published CIFAR-10 recipe, and what else can be switched on

and what the features are good for, at the scales `smoke` and `paper`:

    imagenet_knn     weighted nearest neighbors, for each encoder
    imagenet_linear  linear classifiers on every stage
    semi_supervised  fine-tuning with 1 and 10% of the labels
    detection        Faster R-CNN; needs the extra 'detection'
    places           linear classifiers on other data

The scale `smoke` takes minutes, on the embedded digits; `small` up to an hour on two CPU cores, on
a part of CIFAR-10 with a narrow network; `paper` is as published, for a GPU. After a stop or a
kill, the same command resumes with the row that was in training.
"""

import dataclasses
import os
import pathlib
import shutil
import sys

from instdisc_jax import cli, experiment, inference
from instdisc_jax.evaluation import detection, protocols, tables, transfer_tables
from instdisc_jax.runtime import compilation, errors, preemption


def reproduce(output: pathlib.Path, table: str, scale: str, seeds: int | None,
              data_dir: str | None) -> None:
  """Trains and measures the runs of a table; see `tables.run`."""
  with preemption.Watch() as watch:
    def measure_svm(workdir):
      watch.check()
      folder = workdir / 'features'
      result = next(protocols.support_vectors(
          protocols.prepare(inference.load(workdir), folder, ['svm'])))
      shutil.rmtree(folder)
      return result

    for name in tables.run(
        output, table, scale, seeds=seeds, data_dir=data_dir, measure_svm=measure_svm,
        train=lambda config, workdir: experiment.run(config, workdir, watch=watch)):
      print(name, flush=True)


def transfer(output: pathlib.Path, runs: pathlib.Path, table: str, scale: str,
             data_dir: str | None) -> None:
  """Trains and measures the encoders of a table; see `transfer_tables.run`."""
  configs = {}
  for title, preset in transfer_tables.encoders(table, scale).items():
    config = (tables.SCALES['smoke']()[0] if preset is None
              else cli.read_config(f'configs/imagenet.py:{preset}', []))
    config.dataset.data_dir = data_dir
    configs[title] = config
  with preemption.Watch() as watch:
    def measure(workdir, entry, data):
      sets = protocols.prepare(inference.load(workdir), workdir / 'features', [entry.protocol],
                               data)
      sets = dataclasses.replace(sets, watch=watch, shares=entry.shares)
      return list(protocols.PROTOCOLS[entry.protocol].measure(sets))

    for name in transfer_tables.run(
        output, runs, table, scale, configs=configs, measure=measure,
        train=lambda config, workdir: experiment.run(config, workdir, watch=watch)):
      print(name, flush=True)


def main(argv=None) -> int:
  """Runs the command; returns its exit code: 0, 2 (user error), 1 (failed), 75 (stopped)."""
  def command():
    parser = cli.make_parser('reproduce', __doc__,
                             '--table=TABLE --scale=SCALE [--output=DIR] [--seeds=N]')
    known = [*tables.TABLES, *transfer_tables.TABLES]
    parser.add_argument('--table', required=True, metavar='TABLE', help=', '.join(known))
    parser.add_argument('--scale', required=True, metavar='SCALE', help=', '.join(tables.SCALES))
    parser.add_argument('--output', metavar='DIR',
                        help='where the runs, table.md, plot.png and results.json are written '
                             '(default: runs/reproduce/TABLE-SCALE)')
    cli.add_integer(parser, '--seeds', metavar='N',
                    help='runs of each row (default: 1 for smoke, else 3)')
    parser.add_argument('--runs', metavar='DIR',
                        help='where the encoders of the last five tables are trained, which they '
                             'can share (default: runs/reproduce/encoders-SCALE, with --output '
                             'a folder in it)')
    parser.add_argument('--data_dir', metavar='DIR', help='where TFDS keeps prepared data')
    args = parser.parse_args(argv)
    transfers = args.table in transfer_tables.TABLES
    scales = transfer_tables.SCALES if transfers else tables.SCALES
    for name, allowed in (('table', known), ('scale', scales)):
      if (value := getattr(args, name)) not in allowed:
        raise errors.UserError(f"--{name} is '{value}'", f'one of {", ".join(allowed)}',
                               setting=f'--{name}')
    if args.seeds is not None and args.seeds < 1:
      raise errors.UserError(f'--seeds is {args.seeds}', 'at least 1', setting='--seeds')
    if args.seeds is not None and transfers:
      raise errors.UserError(f'--seeds does not apply to the table {args.table}',
                             remedy='remove it', setting='--seeds')
    output = pathlib.Path(args.output or f'runs/reproduce/{args.table}-{args.scale}')
    compilation.keep_programs(output / 'compiled')
    if args.table == 'detection':
      detection.check_installed('--table')
      os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # PyTorch needs the GPU, too
    if transfers:
      runs = f'runs/reproduce/encoders-{args.scale}' if args.output is None else output / 'rows'
      transfer(output, pathlib.Path(args.runs or runs), args.table, args.scale, args.data_dir)
    else:
      reproduce(output, args.table, args.scale, args.seeds, args.data_dir)
    print(output / 'table.md')

  return cli.run(command, {'dataset.data_dir': '--data_dir', '--workdir': '--output'})


if __name__ == '__main__':
  sys.exit(main())
