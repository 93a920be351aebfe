"""Data sets: images to train on and images to evaluate on, each in a stable order."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax.data import arrays, digits, fake, folder, tfds
from instdisc_jax.data.images import Images
from instdisc_jax.runtime import errors

__all__ = ['Dataset', 'Images', 'load']


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Images to train on, and images to evaluate on.

  Attributes:
    name: as configured.
    train: `Images`; the position of an image is its index.
    test: `Images`, or None.
    class_names: one per label value, or None.
    listing: the listing of a folder, for `folder.keep`; None for other data.
  """
  name: str
  train: Images
  test: Images | None = None
  class_names: tuple[str, ...] | None = None
  listing: Any = None

  def kept(self, path: str) -> 'Dataset':
    """As a run with that `dataset.path` keeps it: in arrays if resident, else one by one.

    Raises:
      errors.UserError: see `Images.in_memory`.
    """
    keep = Images.in_memory if path == 'resident' else Images.one_by_one
    return dataclasses.replace(self, train=keep(self.train),
                               test=None if self.test is None else keep(self.test))


def load(config: config_lib.Config, seed: int,
         workdir: str | os.PathLike[str] | None = None, allow_added: bool = False) -> Dataset:
  """Opens the data set that `config` names.

  Args:
    config: the `dataset` part of the configuration.
    seed: the run's seed; selects the subset if there is a limit.
    workdir: the run's workdir; a folder must still match the listing kept there.
    allow_added: whether a folder may have more images than that, which are left out.

  Returns:
    A `Dataset`.

  Raises:
    errors.UserError: the data are missing or invalid.
  """
  kind, _, rest = config.name.partition(':')
  share = _share(config.validation)
  held_out = None if share else config.validation
  if held_out is not None and (kind not in ('tfds', 'folder') or not rest):
    raise errors.UserError(
        f"dataset.validation is '{held_out}'", f'a share above 0 and below 1 for {config.name}',
        'set <dataset.validation>=0.1', 'dataset.validation')
  if config.name == 'digits':
    (images, labels), (test_images, test_labels) = digits.load()
    dataset = Dataset(config.name, arrays.in_memory(images, labels),
                      arrays.in_memory(test_images, test_labels), tuple('0123456789'))
  elif kind == 'arrays' and rest:
    dataset = Dataset(config.name, *arrays.load(pathlib.Path(rest)))
  elif kind == 'tfds' and rest:
    dataset = Dataset(config.name, *tfds.load(rest, config.data_dir, held_out))
  elif kind == 'folder' and rest:
    dataset = _load_folder(config, rest, held_out, workdir, allow_added)
  elif kind == 'fake' and rest.isdigit() and int(rest):
    dataset = Dataset(config.name, fake.load(int(rest)))
  else:
    raise errors.UserError(
        f"dataset.name is '{config.name}'",
        'digits, tfds:NAME, folder:PATH, arrays:FILE.npz or fake:N', setting='dataset.name')
  if share:
    if len(dataset.train) < 3:
      raise errors.UserError(
          f'dataset.validation is {share:g} of {len(dataset.train)} images',
          'a share of at least 3 images', 'leave out <dataset.validation>', 'dataset.validation')
    train, test = dataset.train.split(share)
    dataset = dataclasses.replace(dataset, train=train, test=test)
  return dataset if config.limit is None else _subset(dataset, config.limit, seed)


def describe(config: config_lib.Config, seed: int) -> tuple[int, tuple[int, ...] | None]:
  """The number of training images, and their shape if all have the same, else None.

  Published TFDS sets and fake images need not be here.

  Args:
    config: the `dataset` part of the configuration.
    seed: the run's seed.

  Raises:
    errors.UserError: the data are missing or invalid.
  """
  kind, _, rest = config.name.partition(':')
  share = _share(config.validation)
  if kind == 'fake' and rest.isdigit() and int(rest):
    count, shape = int(rest), (fake.SIDE, fake.SIDE, 3)
  elif kind == 'tfds' and rest in tfds.PUBLISHED:
    count, shape = tfds.PUBLISHED[rest]
  else:
    train = load(config, seed).train
    return len(train), train.shape
  if share:
    count -= max(1, round(share * count))
  return min(count, config.limit or count), shape


def _share(text):
  """'0.1' -> 0.1; None if the text is not a share."""
  try:
    return float(text) if text is not None and 0 < float(text) < 1 else None
  except ValueError:
    return None


def _load_folder(config, path, held_out, workdir, allow_added):
  train, class_names, listing = folder.load(path, config.on_unreadable, workdir,
                                            allow_added=allow_added)
  test = None
  if held_out is not None:
    test, test_names, _ = folder.load(held_out.removeprefix('folder:'), config.on_unreadable,
                                      setting='dataset.validation')
    if class_names is None or test_names is None:
      test = dataclasses.replace(test, labels=None)
    else:
      unknown = sorted(set(test_names) - set(class_names))
      if unknown:
        raise errors.UserError(
            f"dataset.validation is '{held_out}' with the class '{unknown[0]}'",
            f'a folder with only classes of {config.name}', setting='dataset.validation')
      number = np.array([class_names.index(name) for name in test_names], np.int32)
      test = dataclasses.replace(test, labels=number[test.labels])
  return Dataset(config.name, train, test, class_names, listing)


def _subset(dataset, limit, seed):
  num_rows = len(dataset.train)
  if limit > num_rows:
    raise errors.UserError(
        f'dataset.limit is {limit}', f'at most the {num_rows} training images of {dataset.name}',
        f'set <dataset.limit>={num_rows}, or leave it out', 'dataset.limit')
  chosen = np.sort(np.random.RandomState(seed).permutation(num_rows)[:limit])
  return dataclasses.replace(dataset, train=dataset.train.subset(chosen, f'{limit} by seed {seed}'))
