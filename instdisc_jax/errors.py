"""The ways a command ends early, each with one line for the reader and no traceback."""

import errno
import sys

import jax

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_TEXTS = ('No space left', 'File too large', 'Disk quota exceeded')


class UserError(Exception):
  """A mistake in what was asked for: names the value found, the value required and the setting."""


class RunError(Exception):
  """The run itself failed, e.g. a non-finite loss or a full disk."""


class Stopped(Exception):
  """A signal stopped the run; it has saved what it had to save."""


def exit_code(command):
  """Runs `command()`: 0, or after a line on stderr 2 (user's mistake), 1 (failed), 75 (stopped)."""
  try:
    command()
    return 0
  except UserError as e:
    return _tell(2, f'error: {one_line(e)}')
  except RunError as e:
    return _tell(1, f'failed: {one_line(e)}')
  except Stopped as e:
    return _tell(75, one_line(e))
  except OSError as e:
    if not is_no_space(e):
      raise
    return _tell(1, f'failed: no space left to write {e.filename or "a file"} ({e.strerror}): make '
                    'space and run the same command again')
  except jax.errors.JaxRuntimeError as e:
    if jax.process_count() == 1:
      raise
    return _tell(1, 'failed: another process of the run has ended, or can no longer be reached '
                    f'({one_line(e)[:200]}): run the same command again on all of them')


def is_no_space(error):
  """Whether a full disk, a quota or a size limit is behind an exception of any library."""
  return (getattr(error, 'errno', None) in _NO_SPACE
          or any(text in str(error) for text in _NO_SPACE_TEXTS))


def check_place(output, suffix=''):
  """Raises `UserError` unless a file of that suffix, or a folder, could be made at `output`."""
  if suffix and output.suffix != suffix:
    raise UserError(f"--output is '{output}', must end in {suffix}: set --output")
  if not output.absolute().parent.is_dir():
    raise UserError(f"no folder '{output.parent}' for --output: make it, or set --output")


def warn(text):
  """A line on stderr, from the first process."""
  if jax.process_index() == 0:
    print(f'warning: {text}', file=sys.stderr, flush=True)


def raise_user_error(message):
  """`raise` as an expression."""
  raise UserError(message)


def one_line(error):
  """The message of an exception without line breaks; of a nested traceback, its last line."""
  text = str(error.args[0] if isinstance(error, KeyError) else error)
  if 'Traceback' in text:
    text = text.strip().splitlines()[-1]
  return ' '.join(text.split())


def _tell(code, line):
  print(line, file=sys.stderr)
  return code
