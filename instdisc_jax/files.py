"""The files of a run, in a folder or in a bucket (gs://...): the same calls for both."""

import logging
import os
import pathlib

from etils import epath

from instdisc_jax import errors


def place(path):
  """What a path names: of a folder an absolute `pathlib.Path`, of a bucket an `epath.Path`.

  Raises:
    errors.UserError: it is a str, as a user gives it, of a bucket that can't be reached.
  """
  if not in_bucket(path):
    return pathlib.Path(path).absolute()
  asked, path = path, epath.Path(path)
  if not isinstance(asked, str):
    return path
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # what it logs is raised, too
  try:
    path.exists()
  except ImportError as e:
    raise errors.UserError(f"'{path}' is in a bucket, which needs a package that is not installed "
                           f"({errors.one_line(e)}): install it, or set a folder") from e
  except Exception as e:  # of whatever library the bucket needs: credentials, network, rights
    raise errors.UserError(f"'{path}' can't be reached ({errors.one_line(e)[:200]}): log in with "
                           "'gcloud auth application-default login', or set another place") from e
  return path


def in_bucket(path):
  """Whether a path is a bucket's, and not of a file system here."""
  return '://' in os.fspath(path)


def append(path, text):
  """Adds text to a file, made if it is not there, in one call."""
  if in_bucket(path):
    path.write_text((path.read_text() if path.exists() else '') + text)
    return
  with path.open('a', encoding='utf8', errors='surrogateescape') as file:
    file.write(text)


def write(path, content):
  """Writes a file, str or bytes, whole or not at all; a bucket does so by itself."""
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
