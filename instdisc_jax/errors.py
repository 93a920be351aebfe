"""The two ways a command ends badly, each with one line for the reader and no traceback."""

import sys


class UserError(Exception):
  """A mistake in what was asked for: names the value found, the value required and the setting."""


class RunError(Exception):
  """The run itself failed, e.g. a non-finite loss or a full disk."""


def exit_code(command):
  """Runs `command()`: 0, or 2 for a user's mistake and 1 for a failed run, told on stderr."""
  try:
    command()
    return 0
  except UserError as e:
    print(f'error: {one_line(e)}', file=sys.stderr)
    return 2
  except RunError as e:
    print(f'failed: {one_line(e)}', file=sys.stderr)
    return 1


def raise_user_error(message):
  """`raise` as an expression."""
  raise UserError(message)


def one_line(error):
  """The message of an exception without line breaks; of a nested traceback, its last line."""
  text = str(error.args[0] if isinstance(error, KeyError) else error)
  if 'Traceback' in text:
    text = text.strip().splitlines()[-1]
  return ' '.join(text.split())
