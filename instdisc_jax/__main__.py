"""`python -m instdisc_jax COMMAND ...` and `instdisc COMMAND ...` run a command."""

import ast
from collections.abc import Sequence
import importlib
import pathlib
import sys

from instdisc_jax import cli
from instdisc_jax.runtime import distributed, errors

COMMANDS = ('main', 'evaluate', 'embed', 'classify', 'audit', 'retrieve', 'preview', 'convert',
            'reproduce', 'compile')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command that is named first, or lists them; returns its exit code."""
  name, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
  if name in ('-h', '--help'):
    print('usage: instdisc COMMAND ..., or python -m instdisc_jax.COMMAND ...\n\ncommands:')
    for command in COMMANDS:
      print(f'  {command:10} {_meaning(command)}')
    print('\ninstdisc COMMAND --help describes its arguments.')
    return 0
  if name not in COMMANDS:
    return errors.exit_code(lambda: _refuse(name))
  return importlib.import_module(f'instdisc_jax.{name}').main(arguments)


def _meaning(command):
  """The first sentence of a command's module, read without importing it."""
  source = pathlib.Path(__file__).with_name(f'{command}.py').read_text()
  return (ast.get_docstring(ast.parse(source)) or '').partition('\n')[0]


def _refuse(name):
  raise errors.UserError(f"unknown command '{name}'" + cli.perhaps(name, COMMANDS),
                         remedy='see --help for all commands')


def leave() -> None:
  """The entry point `instdisc`."""
  distributed.leave(main())


if __name__ == '__main__':
  leave()
