"""Data sets that fit in memory: whole arrays of pictures with a stable order.

The position of a picture in its source, 0..N-1, is its index and its row in the memory bank, so a
fingerprint of the source is stored with every run: a bank is only ever used with its own data.
"""

import dataclasses
import hashlib
import pathlib
import zipfile

import numpy as np

from instdisc_jax import errors
from instdisc_jax.data import digits, tfds


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Pictures to train on, and pictures to evaluate with.

  Attributes:
    name: as configured.
    train_images: [N, H, W, 3] uint8; position is index.
    train_labels: [N] int32, or None.
    test_images: [Q, H, W, 3] uint8, or None.
    test_labels: [Q] int32, or None.
    class_names: one per label value, or None.
    fingerprint: of the training images' source.
  """
  name: str
  train_images: np.ndarray
  train_labels: np.ndarray | None
  test_images: np.ndarray | None
  test_labels: np.ndarray | None
  class_names: tuple[str, ...] | None
  fingerprint: str


def load(config, seed):
  """Reads the data set that `config` names.

  Args:
    config: the `dataset` part of the configuration: name, data_dir, limit.
    seed: of the run; chooses the subset where there is a limit.

  Returns:
    A `Dataset`.

  Raises:
    errors.UserError: no such data, or not in the form it should have.
  """
  kind, _, rest = config.name.partition(':')
  if config.name == 'digits':
    (images, labels), (test_images, test_labels) = digits.load()
    dataset = Dataset(config.name, images, labels, test_images, test_labels,
                      tuple('0123456789'), _digest(images))
  elif kind == 'arrays' and rest:
    dataset = _load_arrays(config.name, pathlib.Path(rest))
  elif kind == 'tfds' and rest:
    train, test, class_names, fingerprint = tfds.load(rest, config.data_dir)
    dataset = Dataset(config.name, *train, *test, class_names, fingerprint)
  else:
    raise errors.UserError(
        f"dataset.name is '{config.name}', must be digits, tfds:NAME or arrays:FILE.npz: "
        'set --config.dataset.name')
  return dataset if config.limit is None else _subset(dataset, config.limit, seed)


def _subset(dataset, limit, seed):
  num_rows = len(dataset.train_images)
  if limit > num_rows:
    raise errors.UserError(
        f'dataset.limit is {limit}, but {dataset.name} has {num_rows} training images: '
        f'set --config.dataset.limit to at most {num_rows}, or leave it out')
  chosen = np.sort(np.random.RandomState(seed).permutation(num_rows)[:limit])
  return dataclasses.replace(
      dataset,
      train_images=dataset.train_images[chosen],
      train_labels=None if dataset.train_labels is None else dataset.train_labels[chosen],
      fingerprint=f'{dataset.fingerprint}/{limit} by seed {seed}')


def _load_arrays(name, path):
  """An .npz with 'images' and, optionally, 'labels', 'test_images' and 'test_labels'."""
  setting = 'set --config.dataset.name=arrays:FILE.npz'
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {key: file[key] for key in file.files}
  except FileNotFoundError:
    raise errors.UserError(f"no file '{path}': {setting}") from None
  except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as e:
    raise errors.UserError(f"'{path}' is no readable .npz of plain arrays ({e}): {setting}") from e
  if 'images' not in arrays:
    raise errors.UserError(f"'{path}' has the arrays {sorted(arrays)}, must have 'images' "
                           f'(uint8 [N, H, W, 3]): {setting} with one that has')
  images, labels = arrays['images'], arrays.get('labels')
  test_images, test_labels = arrays.get('test_images'), arrays.get('test_labels')
  for key in ('images', 'test_images'):
    array = arrays.get(key)
    if array is not None and (array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3
                              or 0 in array.shape):
      raise errors.UserError(f"'{key}' in '{path}' is {array.dtype} {list(array.shape)}, "
                             f'must be uint8 [N, H, W, 3]: {setting} with one that is')
  for key, other in (('labels', images), ('test_labels', test_images)):
    array = arrays.get(key)
    if array is None:
      continue
    if other is None or array.shape != other.shape[:1] or array.dtype.kind not in 'iu':
      raise errors.UserError(
          f"'{key}' in '{path}' is {array.dtype} {list(array.shape)}, must be one integer per "
          f'image: {setting} with one that is')
    if array.min() < 0:
      raise errors.UserError(f"'{key}' in '{path}' has the value {array.min()}, must be 0 or "
                             f'above: {setting} with class numbers')
  as_int = lambda x: None if x is None else x.astype(np.int32)
  return Dataset(name, images, as_int(labels), test_images, as_int(test_labels), None,
                 _digest(images))


def _digest(images):
  return f'{list(images.shape)} {hashlib.sha256(images.tobytes()).hexdigest()}'
