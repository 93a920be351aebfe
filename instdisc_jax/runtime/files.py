"""The files of a run, in a folder or in a bucket (gs://...): the same calls for both."""

from collections.abc import Iterator, Sequence
import contextlib
import logging
import os
import pathlib
import shutil
import tempfile
from typing import TypeAlias

from etils import epath

from instdisc_jax.runtime import errors

Place: TypeAlias = pathlib.Path | epath.Path


def place(path: str | os.PathLike[str]) -> Place:
  """The path as an object: an absolute `pathlib.Path` for a folder, an `epath.Path` for a bucket.

  Raises:
    errors.UserError: a str, i.e. a user's path, names a bucket that cannot be reached.
  """
  if not in_bucket(path):
    return pathlib.Path(path).expanduser().absolute()
  asked, path = path, epath.Path(path)
  if not isinstance(asked, str):
    return path
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it raises the same errors
  try:
    path.exists()
  except ImportError as e:
    raise errors.UserError(
        f"'{path}' is in a bucket, which needs a package that is not installed "
        f'({errors.one_line(e)})', remedy='install it, or use a folder') from e
  except Exception as e:  # from any library that a bucket needs: credentials, network, permissions
    raise errors.UserError(
        f"'{path}' cannot be reached ({errors.one_line(e)[:200]})",
        remedy="log in with 'gcloud auth application-default login', or use another location"
    ) from e
  return path


def in_bucket(path: str | os.PathLike[str]) -> bool:
  """Whether a path is in a bucket rather than in a local file system."""
  return '://' in os.fspath(path)


def append(path: Place, text: str) -> None:
  """Appends text to a file in one call; creates the file if needed."""
  if in_bucket(path):
    path.write_text((path.read_text() if path.exists() else '') + text)
    return
  with path.open('a', encoding='utf8', errors='surrogateescape') as file:
    file.write(text)


@contextlib.contextmanager
def whole_folder(path: pathlib.Path, argument: str) -> Iterator[pathlib.Path]:
  """A folder that takes the place of `path` once it is complete; if anything fails, nothing does.

  Args:
    path: a folder on the local file system; an earlier one is replaced.
    argument: the argument that named it.

  Yields:
    The folder to fill, beside `path`.

  Raises:
    errors.UserError: it cannot be written.
  """
  partial = None
  try:
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    partial.chmod(0o755)
    yield partial
    if path.exists():
      shutil.rmtree(path)
    os.replace(partial, path)
  except OSError as e:
    raise errors.cannot_write(path, e, argument) from e
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)


def remove_folder(path: Place) -> None:
  """Removes a folder and all that it holds, if it is there."""
  if isinstance(path, epath.Path) and in_bucket(path):
    if path.exists():
      path.rmtree()
  else:
    shutil.rmtree(path, ignore_errors=True)


def write(path: Place, content: str | bytes) -> None:
  """Writes a file completely or not at all, which buckets do by themselves."""
  if isinstance(content, str):
    content = content.encode(errors='surrogateescape')
  if in_bucket(path):
    path.write_bytes(content)
    return
  partial = path.with_name(path.name + '.partial')
  try:
    partial.write_bytes(content)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def is_table(file: pathlib.Path, columns: Sequence[str]) -> bool:
  """Whether a file is a CSV table with exactly these columns, by its first line."""
  try:
    with file.open(encoding='utf-8', errors='replace') as lines:
      return lines.readline().rstrip('\n') == ','.join(columns)
  except OSError:
    return False
