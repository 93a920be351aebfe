"""Images in an .npz file: 'images' and, optionally, 'labels', 'test_images' and 'test_labels'."""

import hashlib
import os
import zipfile

import numpy as np

from instdisc_jax.data import images as images_lib
from instdisc_jax.runtime import errors

_REMEDY = 'set <dataset.name>=arrays:FILE.npz'


def load(path: str | os.PathLike[str]) -> tuple[images_lib.Images, images_lib.Images | None]:
  """(training images, test images or None) of an .npz file.

  Raises:
    errors.UserError: the file is missing or invalid.
  """
  arrays = _read(path)
  if 'images' not in arrays:
    raise _error(f"'{path}' has no array 'images' (uint8 [N, H, W, 3]), only {sorted(arrays)}")
  for key in ('images', 'test_images'):
    array = arrays.get(key)
    if array is not None and (array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3
                              or 0 in array.shape):
      raise _error(_described(key, array, path), 'uint8 [N, H, W, 3]')
  for key, of in (('labels', 'images'), ('test_labels', 'test_images')):
    array, images = arrays.get(key), arrays.get(of)
    if array is None:
      continue
    if images is None or array.shape != images.shape[:1] or array.dtype.kind not in 'iu':
      raise _error(_described(key, array, path), 'one integer per image')
    if array.min() < 0:
      raise _error(f"'{key}' in '{path}' holds {array.min()}", 'class numbers, 0 or above')
  test = None
  if 'test_images' in arrays and arrays['test_images'].shape[1:] != arrays['images'].shape[1:]:
    raise _error(_described('test_images', arrays['test_images'], path),
                 f"of the size of 'images', {list(arrays['images'].shape[1:])}")
  if 'test_images' in arrays:
    test = in_memory(arrays['test_images'], arrays.get('test_labels'))
  return in_memory(arrays['images'], arrays.get('labels')), test


def in_memory(images: np.ndarray, labels: np.ndarray | None) -> images_lib.Images:
  """`Images` from an array [N, H, W, 3] uint8, with labels [N] or None."""
  digest = f'{list(images.shape)} {hashlib.sha256(images.tobytes()).hexdigest()}'
  return images_lib.Images(images, None if labels is None else labels.astype(np.int32), digest,
                           shape=images.shape[1:])


def _read(path):
  try:
    with np.load(path, allow_pickle=False) as file:
      return {key: file[key] for key in file.files}
  except FileNotFoundError:
    raise errors.UserError(f"no file '{path}'", None, _REMEDY, 'dataset.name') from None
  except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as e:
    raise errors.UserError(f"'{path}' is not a readable .npz of plain arrays ({e})", None, _REMEDY,
                           'dataset.name') from e


def _described(key, array, path):
  return f"'{key}' in '{path}' is {array.dtype} {list(array.shape)}"


def _error(found, required=None):
  return errors.UserError(found, required, f'correct the file, or {_REMEDY}', 'dataset.name')
