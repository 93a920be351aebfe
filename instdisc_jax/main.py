"""Trains by instance discrimination; the same command on the same workdir resumes the run."""

import os

from instdisc_jax import cli, experiment
from instdisc_jax.runtime import compilation, distributed, preemption


def main(argv=None) -> int:
  """Runs the command; returns its exit code: 0, 2 (user error), 1 (failed), 75 (stopped)."""
  def command():
    parser = cli.make_parser(
        'main', __doc__, '--config=configs/NAME.py --workdir=DIR [--config.KEY=VALUE ...]',
        cli.describe_settings())
    cli.add_config(parser)
    cli.add_workdir(parser, 'where checkpoints, metrics and the summary are written: a folder, or '
                            'gs://BUCKET/FOLDER')
    cli.add_processes(parser)
    args, overrides = parser.parse_known_args(argv)
    config = cli.as_the_start(cli.read_config(args.config, overrides), overrides)
    cli.join_processes(args)
    if config.get('deterministic') is True:
      compilation.make_gpus_deterministic()
    compilation.keep_programs(os.path.join(args.workdir, 'compiled'))
    with preemption.Watch() as watch:
      experiment.run(config, args.workdir, watch=watch)

  return cli.run(command)


if __name__ == '__main__':
  distributed.leave(main())
