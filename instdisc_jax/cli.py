"""Common parts of the commands: the parser, shared arguments, and the wrapper that runs them."""

import argparse
import ast
from collections.abc import Callable, Mapping, Sequence
import difflib
import io
import logging
import os
import re
import runpy
import sys
import textwrap
from typing import Any, NoReturn

from absl import flags as absl_flags
from ml_collections import config_dict, config_flags

from instdisc_jax import config as config_lib
from instdisc_jax.runtime import checkpoint, distributed, errors, files, workdir

# {type of a setting: (parser of a value, required form)}
_FORMS = {int: (int, 'an integer'), float: (float, 'a number'),
          bool: (absl_flags.BooleanParser().parse, 'true or false'),
          tuple: (ast.literal_eval, 'numbers in parentheses')}


class _Parser(argparse.ArgumentParser):
  """Reports a usage error like any other mistake: one line, exit code 2. Expands ~ in paths."""

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
    args = [_expand(argument) for argument in (sys.argv[1:] if args is None else args)]
    return super().parse_known_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    raise errors.UserError(message, remedy='see --help')


def _expand(argument: str) -> str:
  """An argument with its ~ expanded, which shells do not do in --workdir=~/runs."""
  found = re.fullmatch(r'(-[^=]*=(?:[a-z]+:)?)?(~.*)', argument, re.DOTALL)
  return (found[1] or '') + os.path.expanduser(found[2]) if found else argument


def perhaps(word: str, known: Sequence[str]) -> str:
  """The rest of a message about an unknown word: the known one that is closest, if any is."""
  close = difflib.get_close_matches(word, known, 1)
  return f", perhaps meant as '{close[0]}'" if close else ''


def make_parser(name: str, description: str | None, usage: str,
                epilog: str | None = None) -> argparse.ArgumentParser:
  """The parser of `python -m instdisc_jax.NAME`.

  Args:
    name: the command's name.
    description: what the command does, usually its module docstring.
    usage: the command's arguments.
    epilog: text after the arguments.
  """
  return _Parser(prog=f'python -m instdisc_jax.{name}', description=description, epilog=epilog,
                 usage=f'%(prog)s {usage}', allow_abbrev=False,
                 formatter_class=argparse.RawDescriptionHelpFormatter)


def add_integer(parser: Any, name: str, **kwargs: Any) -> None:
  """Adds an integer argument whose errors are worded like all others."""
  def parse(text: str) -> int:
    try:
      return int(text)
    except ValueError:
      raise errors.UserError(f"{name} is '{text}'", 'an integer', setting=name) from None
  parser.add_argument(name, type=parse, **kwargs)


def add_config(parser: argparse.ArgumentParser) -> None:
  """Adds --config; its overrides are left to `read_config`."""
  parser.add_argument('--config', metavar='FILE', required=True,
                      help='a Python file with get_config(), e.g. configs/digits.py; '
                           'configs/imagenet.py:resnet18 calls get_config("resnet18")')


def add_workdir(parser: argparse.ArgumentParser, meaning: str) -> None:
  """Adds --workdir."""
  parser.add_argument('--workdir', metavar='DIR', required=True, help=meaning)


def add_features(parser: argparse.ArgumentParser) -> None:
  """Adds --features."""
  parser.add_argument('--features', metavar='NAME',
                      help='what represents an image: embedding, pooled, or conv1 to conv5 '
                           '(default: embedding; pooled for weights that were never trained here)')


def add_on_unreadable(parser: argparse.ArgumentParser) -> None:
  """Adds --on_unreadable."""
  parser.add_argument('--on_unreadable', choices=('error', 'skip'), default='error',
                      help='what to do with files that cannot be read as images: stop (default), '
                           'or skip them')


def add_processes(parser: argparse.ArgumentParser) -> None:
  """Adds the arguments with which several processes find each other; see `join_processes`."""
  group = parser.add_argument_group(
      'several processes',
      'Start the same command in each process, each on its own machine or devices.')
  group.add_argument('--distributed', action='store_true',
                     help='find the other processes through Slurm, Open MPI, GKE or Cloud TPU')
  group.add_argument('--coordinator', metavar='HOST:PORT',
                     help='address of process 0, to find the other processes; requires the next '
                          'two')
  add_integer(group, '--num_processes', metavar='P', help='number of processes')
  add_integer(group, '--process_id', metavar='I', help='index of this process, from 0')
  add_integer(group, '--heartbeat_seconds', metavar='S', default=100,
                     help='seconds without a heartbeat after which the others exit (default: 100)')


def join_processes(args: argparse.Namespace) -> None:
  """Joins the other processes, if there are any; raises `errors.UserError` or `RunError`."""
  if args.distributed or args.coordinator is not None:
    distributed.initialize(args.coordinator, args.num_processes, args.process_id,
                           args.heartbeat_seconds)


def run(command: Callable[[], int | None], flags: Mapping[str, str] | None = None) -> int:
  """Runs a command with the logs of its libraries silenced.

  Args:
    command: the function to run.
    flags: the command's own flags for settings and arguments, see `errors.UserError.worded`.

  Returns:
    The exit code, see `errors.exit_code`.
  """
  for stream in (sys.stdout, sys.stderr):  # on a terminal that lacks τ, \u03c4 is better than none
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
  logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax and TFDS log everything they do
  checkpoint.quiet_threads()
  return errors.exit_code(command, flags)


def read_config(file: str, overrides: Sequence[str]) -> config_lib.Config:
  """The configuration of a file, in `configs/` or elsewhere, with overrides applied.

  Args:
    file: FILE.py, or FILE.py:PRESETS, which calls get_config('PRESETS').
    overrides: arguments of the form '--config.KEY=VALUE'.

  Returns:
    A `ConfigDict`, not validated yet.

  Raises:
    errors.UserError: the file is missing or not a configuration, or a setting is unknown.
  """
  for argument in overrides:
    if not argument.startswith(('--config.', '-config.')):
      raise errors.UserError(f"unknown argument '{argument}'", remedy='see --help')
    key = argument.partition('.')[2].partition('=')[0]
    if key not in (known := [setting.key for setting in config_lib.SETTINGS]):
      raise errors.UserError(f"unknown setting '{key}'" + perhaps(key, known),
                             remedy='see --help for all settings')
  config, values = _run_config(file), absl_flags.FlagValues()
  command = ['main', *overrides]
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=command)
    values(command)
  except (KeyError, absl_flags.Error) as e:
    _check_forms(overrides)
    raise errors.UserError(errors.one_line(e),
                           remedy='see --help for all settings and their form') from e
  return values.config


def as_the_start(config: config_lib.Config, overrides: Sequence[str]) -> config_lib.Config:
  """A configuration whose `model.init` is a run: with that run's recipe, unless overridden."""
  start = config.model.get('init')
  if not start or not (files.place(start) / workdir.CONFIG).exists():
    return config
  given = [argument.partition('.')[2].partition('=')[0] for argument in overrides]
  config, taken = config_lib.inherit(config, workdir.read(start)[0], given)
  if taken:
    print(f"as in '{start}': " + ', '.join(f'{key}={config_lib.plain(value)}'
                                           for key, value in taken.items()))
  return config


def _run_config(file):
  """The result of a config file's get_config()."""
  remedy = 'set <--config>=configs/NAME.py'
  path, colon, presets = _find_config(file)
  try:
    get_config = runpy.run_path(path).get('get_config')
    if get_config is None:
      raise errors.UserError(f"'{file}' has no function get_config()", None, remedy, '--config')
    config = get_config(*[presets] if colon else [])
  except errors.UserError:
    raise
  except Exception as e:  # anything that the file raises when it runs
    raise errors.UserError(
        f"'{file}' is not a configuration ({type(e).__name__}: {errors.one_line(e)})", None,
        remedy, '--config') from e
  if not isinstance(config, config_dict.ConfigDict):
    raise errors.UserError(f"get_config() of '{file}' returns {type(config).__name__}",
                           'a ConfigDict', remedy, '--config')
  return config


def _check_forms(overrides):
  """Raises `errors.UserError` for a value that does not have the setting's type."""
  settings = {setting.key: setting for setting in config_lib.SETTINGS}
  for argument in overrides:
    key, _, text = argument.partition('.')[2].partition('=')
    kind: Any = settings[key].kind or type(settings[key].default)
    if kind in _FORMS:
      parse, form = _FORMS[kind]
      try:
        parse(text)
      except (ValueError, TypeError, SyntaxError):
        raise errors.UserError(f"{key} is '{text}'", form, settings[key].remedy, key) from None


def describe_settings() -> str:
  """Every setting with its default and its meaning, for --help."""
  lines = ['settings, with their defaults (a config file sets its own):', '']
  for setting in config_lib.SETTINGS:
    text = setting.meaning + (f' ({setting.requirement})' if setting.requirement else '')
    lines += [f'  --config.{setting.key}={config_lib.plain(setting.default)}',
              *textwrap.wrap(text, 90, initial_indent=' ' * 8, subsequent_indent=' ' * 8)]
  return '\n'.join(lines)


def _find_config(file):
  """(path, ':' or '', presets); `configs/` is inside the installed package or next to it."""
  path, colon, presets = file.partition(':')
  package = os.path.dirname(os.path.abspath(__file__))
  places = ['', package, os.path.dirname(package)] if path.startswith('configs/') else ['']
  for place in places:
    if os.path.isfile(os.path.join(place, path)):
      return os.path.join(place, path), colon, presets
  raise errors.UserError(f"no file '{file}'", remedy='set <--config>=configs/NAME.py',
                         setting='--config')
