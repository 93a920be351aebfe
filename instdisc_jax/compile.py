"""Compiles a run for a machine that is not here: does it fit, and what limits its speed?"""

import json
import pathlib
import sys

from rich import console as rich_console

from instdisc_jax import cli, programs
from instdisc_jax.runtime import compilation, errors, files, hardware

_KNOWN = (*programs.NAMES, *programs.EVALUATION)


def main(argv=None) -> int:
  """Runs the command; returns its exit code: 0 (fits), 1 (does not), 2 (user error)."""
  def command():
    parser = cli.make_parser(
        'compile', __doc__, '--config=configs/NAME.py --topology=TOPOLOGY [--config.KEY=VALUE ...]',
        programs.__doc__)
    cli.add_config(parser)
    parser.add_argument('--topology', required=True, help=f'the devices: {hardware.KNOWN}')
    parser.add_argument('--program', metavar='PROGRAM', default='all',
                        help=f'all (default), evaluate, or {", ".join(_KNOWN)}; several with '
                             'commas')
    parser.add_argument('--output', metavar='FILE.json', help='where to write the same numbers')
    cli.add_integer(parser, '--queries', metavar='Q', default=programs.QUERIES,
                    help=f'queries of the kNN search (default: {programs.QUERIES:,})')
    args, overrides = parser.parse_known_args(argv)
    groups = {'all': programs.NAMES, 'evaluate': programs.EVALUATION}
    chosen = groups.get(args.program, args.program.split(','))
    for name in chosen:
      if name not in _KNOWN:
        raise errors.UserError(f"--program is '{args.program}'",
                               f'all, evaluate, or one of {", ".join(_KNOWN)}',
                               setting='--program')
    if args.queries < 1:
      raise errors.UserError(f'--queries is {args.queries}', 'at least 1', setting='--queries')
    output = None if args.output is None else pathlib.Path(args.output)
    if output is not None:
      errors.check_output(output, ('.json',))
    config = cli.read_config(args.config, overrides)
    if config.get('deterministic') is True:
      compilation.make_gpus_deterministic()
    run = programs.Run(config, *hardware.absent(args.topology), args.queries)
    reports, progress = [], rich_console.Console(stderr=True)
    for name in chosen:
      with progress.status(f'compiling {name} for {args.topology}'):
        reports.append(run.compile(name))
      progress.print(f'{name}: {reports[-1].compile_seconds:.1f} s', highlight=False)
    programs.show(run, reports)
    fits, line = run.verdict(reports)
    print(line)
    if output is not None:
      content = programs.to_json(run, reports, args.topology)
      files.write(output, json.dumps(content, indent=2) + '\n')
    return 0 if fits else 1

  return cli.run(command)


if __name__ == '__main__':
  sys.exit(main())
