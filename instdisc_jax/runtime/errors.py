"""The ways a command ends early, each with one line for the user and no traceback.

A `UserError` states what was found, what is required and which setting or argument to change; the
command that reports it names that setting or argument by its own flag.
"""

from collections.abc import Callable, Mapping
import errno
import pathlib
import re
import sys

import jax

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_TEXTS = ('No space left', 'File too large', 'Disk quota exceeded')


class UserError(Exception):
  """A mistake in the user's input.

  In the remedy, settings of the configuration (`<loss.temperature>`) and arguments of a command
  (`<--workdir>`) are in angle brackets.

  Attributes:
    found: what was found, e.g. 'batch_size is 100'.
    required: what it must be, e.g. 'a multiple of the 8 devices', or None.
    remedy: what to do about it, e.g. 'set <batch_size>=104', or None.
    setting: the setting or argument to change, or None.
  """

  def __init__(self, found: str, required: str | None = None, remedy: str | None = None,
               setting: str | None = None):
    super().__init__(found, required, remedy, setting)  # all arguments, so that it can be pickled
    self.found, self.required, self.setting = found, required, setting
    self.remedy = f'set <{setting}>' if remedy is None and setting is not None else remedy

  def __str__(self) -> str:
    return self.worded({})

  def worded(self, flags: Mapping[str, str]) -> str:
    """The message, with the flags of a command.

    Args:
      flags: {setting or argument: the command's own flag for it}; other settings become
        `--config.SETTING`, other arguments stay as they are.
    """
    def flag(match: re.Match[str]) -> str:
      name = match[1]
      return flags.get(name, name if name.startswith('--') else f'--config.{name}')

    remedy = None if self.remedy is None else re.sub(r'<((?:--)?[a-z][a-z_.]*)>', flag, self.remedy)
    return (self.found + ('' if self.required is None else f', must be {self.required}')
            + ('' if remedy is None else f': {remedy}'))

  def with_remedy(self, remedy: str) -> 'UserError':
    """The same error with another remedy."""
    return UserError(self.found, self.required, remedy, self.setting)


class RunError(Exception):
  """The run itself failed, e.g. a non-finite loss or a full disk."""


class Stopped(Exception):
  """A signal stopped the run; its progress is saved."""


def exit_code(command: Callable[[], int | None], flags: Mapping[str, str] | None = None) -> int:
  """Runs `command()`; on failure writes one line to stderr.

  Args:
    command: the function to run.
    flags: see `UserError.worded`.

  Returns:
    What the command returns, if it does, else 0; 2 (user error), 1 (the run failed) or 75 (stopped
    by a signal).
  """
  try:
    return command() or 0
  except UserError as e:
    return _report(2, f'error: {_joined(e.worded(flags or {}))}')
  except RunError as e:
    return _report(1, f'failed: {one_line(e)}')
  except Stopped as e:
    return _report(75, one_line(e))
  except OSError as e:
    if not is_no_space(e):
      raise
    return _report(1, f'failed: no space left to write {e.filename or "a file"} ({e.strerror}): '
                      'free up space and run the same command again')
  except jax.errors.JaxRuntimeError as e:
    if jax.process_count() == 1:
      raise
    return _report(1, 'failed: another process of the run has ended or cannot be reached '
                      f'({one_line(e)[:200]}): run the same command again on all of them')


def is_no_space(error: BaseException) -> bool:
  """Whether a full disk, a quota or a size limit caused an exception of any library."""
  return (getattr(error, 'errno', None) in _NO_SPACE
          or any(text in str(error) for text in _NO_SPACE_TEXTS))


def cannot_write(path: object, error: OSError, argument: str) -> Exception:
  """The exception to raise for an `OSError` in writing `path`: the same if the disk is full.

  Args:
    path: the path that was to be written.
    error: the error that occurred.
    argument: the argument that named the path, e.g. '--output'.
  """
  if is_no_space(error):
    return error
  return UserError(f"'{path}' cannot be written ({error.strerror or one_line(error)})",
                   remedy=f'set <{argument}> to a writable place', setting=argument)


def check_output(output: pathlib.Path, suffixes: tuple[str, ...] = ()) -> None:
  """Raises `UserError` unless `output` has one of the suffixes and its folder exists."""
  if suffixes and output.suffix not in suffixes:
    raise UserError(f"--output is '{output}'", f'a file that ends in {" or ".join(suffixes)}',
                    setting='--output')
  if not output.absolute().parent.is_dir():
    raise UserError(f"--output is in '{output.parent}', which is not a folder",
                    remedy='create it, or set <--output>', setting='--output')


def warn(text: str) -> None:
  """Prints a warning on stderr, from the first process."""
  if jax.process_index() == 0:
    print(f'warning: {text}', file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
  """The message of an exception without line breaks; of a nested traceback, its last line."""
  text = str(error.args[0] if isinstance(error, KeyError) else error)
  if 'Traceback' in text:
    text = text.strip().splitlines()[-1]
  return _joined(text)


def reason(error: BaseException) -> str:
  """Why reading or writing failed, in a few words."""
  return getattr(error, 'strerror', None) or one_line(error)


def _joined(text: str) -> str:
  return ' '.join(text.split())


def _report(code: int, line: str) -> int:
  print(line, file=sys.stderr)
  return code
