"""Data sets: pictures to train on and pictures to evaluate with, each in a stable order.

Small sets of pictures of one size lie on the device (`resident.py`); others are read, decoded and
cropped on the host while the device trains (`stream.py`).
"""

import dataclasses
import hashlib
import pathlib
from typing import Any
import zipfile

import numpy as np

from instdisc_jax import errors
from instdisc_jax.data import digits, fake, folder, tfds
from instdisc_jax.data.pictures import Pictures


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Pictures to train on, and pictures to evaluate with.

  Attributes:
    name: as configured.
    train: `Pictures`; position is index.
    test: `Pictures`, or None.
    class_names: one per label value, or None.
    listing: of a folder, for `folder.keep`; None of anything else.
  """
  name: str
  train: Pictures
  test: Pictures | None = None
  class_names: tuple[str, ...] | None = None
  listing: Any = None


def load(config, seed, workdir=None):
  """Opens the data set that `config` names.

  Args:
    config: the `dataset` part of the configuration.
    seed: of the run; chooses the subset where there is a limit.
    workdir: of the run; what an earlier call noted of a folder there must still hold.

  Returns:
    A `Dataset`.

  Raises:
    errors.UserError: no such data, or not in the form it should have.
  """
  kind, _, rest = config.name.partition(':')
  share = _share(config.validation)
  held_out = None if share else config.validation
  if held_out is not None and (kind not in ('tfds', 'folder') or not rest):
    raise errors.UserError(f"dataset.validation is '{held_out}', must be a share above 0 and below "
                           f'1 for {config.name}: set --config.dataset.validation=0.1')
  if config.name == 'digits':
    (images, labels), (test_images, test_labels) = digits.load()
    dataset = Dataset(config.name, _in_memory(images, labels), _in_memory(test_images, test_labels),
                      tuple('0123456789'))
  elif kind == 'arrays' and rest:
    dataset = _load_arrays(config.name, pathlib.Path(rest))
  elif kind == 'tfds' and rest:
    dataset = Dataset(config.name, *tfds.load(rest, config.data_dir, held_out))
  elif kind == 'folder' and rest:
    dataset = _load_folder(config, rest, held_out, workdir)
  elif kind == 'fake' and rest.isdigit() and int(rest):
    dataset = Dataset(config.name, fake.load(int(rest)))
  else:
    raise errors.UserError(
        f"dataset.name is '{config.name}', must be digits, tfds:NAME, folder:PATH, arrays:FILE.npz "
        'or fake:N: set --config.dataset.name')
  if share:
    if len(dataset.train) < 3:
      raise errors.UserError(f'dataset.validation is {share:g}, but there are {len(dataset.train)} '
                             'images, must be at least 3 to hold some out: leave out '
                             '--config.dataset.validation')
    train, test = dataset.train.split(share)
    dataset = dataclasses.replace(dataset, train=train, test=test)
  return dataset if config.limit is None else _subset(dataset, config.limit, seed)


def _share(text):
  """'0.1' -> 0.1; None if it is no share."""
  try:
    return float(text) if text is not None and 0 < float(text) < 1 else None
  except ValueError:
    return None


def _in_memory(images, labels):
  as_int = None if labels is None else labels.astype(np.int32)
  return Pictures(images, as_int, _digest(images), shape=images.shape[1:])


def _load_folder(config, path, held_out, workdir):
  train, class_names, listing = folder.load(path, config.on_unreadable, workdir)
  test = None
  if held_out is not None:
    test, test_names, _ = folder.load(held_out.removeprefix('folder:'), config.on_unreadable,
                                      setting='set --config.dataset.validation')
    if class_names is None or test_names is None:
      test = dataclasses.replace(test, labels=None)
    else:
      unknown = sorted(set(test_names) - set(class_names))
      if unknown:
        raise errors.UserError(
            f"dataset.validation has the class '{unknown[0]}', must have only classes of "
            f'{config.name}: set --config.dataset.validation')
      number = np.array([class_names.index(name) for name in test_names], np.int32)
      test = dataclasses.replace(test, labels=number[test.labels])
  return Dataset(config.name, train, test, class_names, listing)


def _subset(dataset, limit, seed):
  num_rows = len(dataset.train)
  if limit > num_rows:
    raise errors.UserError(
        f'dataset.limit is {limit}, but {dataset.name} has {num_rows} training images: '
        f'set --config.dataset.limit to at most {num_rows}, or leave it out')
  chosen = np.sort(np.random.RandomState(seed).permutation(num_rows)[:limit])
  return dataclasses.replace(dataset, train=dataset.train.subset(chosen, f'{limit} by seed {seed}'))


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
  images, test_images = arrays['images'], arrays.get('test_images')
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
  test = None if test_images is None else _in_memory(test_images, arrays.get('test_labels'))
  return Dataset(name, _in_memory(images, arrays.get('labels')), test)


def _digest(images):
  return f'{list(images.shape)} {hashlib.sha256(images.tobytes()).hexdigest()}'
