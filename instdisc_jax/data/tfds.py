"""TensorFlow Datasets without TensorFlow: read as ArrayRecord, prepared on first use.

TFDS shuffles when it writes, so a picture's position is stable for one prepared copy only; the
fingerprint holds the name, version, split and shard lengths.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from instdisc_jax import distributed, errors
from instdisc_jax.data import pictures

_KEPT_BYTES = 2**30  # a split no larger is kept in memory, encoded


def load(name, data_dir, held_out=None):
  """Opens the training and held-out splits of a TFDS image classification set.

  Args:
    name: as TFDS knows it, e.g. 'cifar10'.
    data_dir: where prepared data lies or goes; None for TFDS's own default.
    held_out: the split to evaluate with; by default 'test', or else 'validation', or none.

  Returns:
    (train, held_out, class_names): `pictures.Pictures`, the held-out ones or None, and names or
    None.

  Raises:
    errors.UserError: the set is unknown, can't be prepared, or has no pictures.
  """
  import tensorflow_datasets as tfds  # slow to import, and only needed here

  where = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)
  if data_dir is not None and not os.path.isdir(where):
    raise errors.UserError(f"dataset.data_dir is '{data_dir}', which is no folder: set "
                           '--config.dataset.data_dir to an existing one')
  try:
    builder = tfds.builder(name, data_dir=where, file_format='array_record')
  except tfds.core.DatasetNotFoundError as e:
    raise errors.UserError(f"TFDS knows no data set '{name}' ({_first_line(e)}): set "
                           '--config.dataset.name=tfds:NAME') from e
  prepared = bool(builder.info.splits)
  if not distributed.everywhere(prepared):
    distributed.first_only(lambda: prepared or prepare(builder))
    builder = tfds.builder(name, data_dir=where, file_format='array_record')
    if not builder.info.splits:  # the first process has prepared it on a disk of its own
      raise errors.UserError(f"tfds:{name} is not prepared under '{where}' on the machine of "
                             f'process {jax.process_index()}: set --config.dataset.data_dir to a '
                             'folder that all machines see, or prepare it on each')
  splits = builder.info.splits
  if 'train' not in splits:
    raise errors.UserError(f"tfds:{name} has the splits {sorted(splits)}, must have 'train': set "
                           '--config.dataset.name to a set that has')
  if held_out is not None and held_out not in splits:
    raise errors.UserError(f"dataset.validation is '{held_out}', must be one of the splits "
                           f'{sorted(splits)} of tfds:{name}, or a share as 0.1: set '
                           '--config.dataset.validation')
  held_out = held_out or next((s for s in ('test', 'validation') if s in splits), None)
  features = builder.info.features
  if 'image' not in features or not isinstance(features['image'], tfds.features.Image):
    raise errors.UserError(f"tfds:{name} has the features {sorted(features)}, must have an "
                           "'image': set --config.dataset.name to a set that has")
  names = getattr(features['label'], 'names', None) if 'label' in features else None
  return (_open(builder, 'train'), _open(builder, held_out) if held_out else None,
          tuple(names) if names else None)


def prepare(builder):
  """Downloads and writes a data set in ArrayRecord form.

  TFDS asks TensorFlow to encode pictures that its builders give as arrays; given as PIL images it
  encodes them (losslessly, as PNG unless the builder says JPEG) with PIL.

  Args:
    builder: a TFDS builder made with `file_format='array_record'`.

  Raises:
    errors.UserError: the download failed.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import downloader

  downloader.MAX_RETRIES = 4  # a machine without a network is told so in seconds, not in minutes
  logging.getLogger('urllib3').setLevel(logging.ERROR)
  for feature in builder.info.features.values():
    if isinstance(feature, tfds.features.Image):
      feature.encode_example = _encode_with_pil(feature.encode_example)
  try:
    builder.download_and_prepare(file_format='array_record')
  except Exception as e:  # of any of the network and file libraries below TFDS
    raise errors.UserError(
        f"tfds:{builder.name} is not prepared under '{builder._data_dir_root}' and preparing it "
        f'failed ({_first_line(e)}): set --config.dataset.data_dir to the folder that holds it, '
        'or try again with a network') from e


def _encode_with_pil(encode_example):
  def encode(image):
    if isinstance(image, np.ndarray):
      image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return encode_example(image)
  return encode


@dataclasses.dataclass(frozen=True)
class Records:
  """files[i] is the encoded picture of the i-th record, bytes."""
  source: Any

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    return self.source[i]['image']


def _open(builder, split):
  """The `pictures.Pictures` of a split, in record order."""
  import tensorflow_datasets as tfds

  info, features = builder.info.splits[split], builder.info.features
  source = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
  fingerprint = f'{builder.info.full_name} {split} {list(info.shard_lengths)}'
  files, labels = Records(source), None
  with pictures.progress(f'reading {split}') as progress:
    if info.num_bytes <= _KEPT_BYTES:
      records = list(progress.track(source, len(source)))
      files = [record['image'] for record in records]
      if 'label' in features:
        labels = np.array([record['label'] for record in records], np.int32)
    elif 'label' in features:
      labels = _labels(source, pathlib.Path(builder.data_dir), fingerprint, progress)
  shape = features['image'].shape
  return pictures.Pictures(
      files, labels, fingerprint,
      shape=None if None in shape[:2] else (*shape[:2], 3))


def _labels(source, folder, fingerprint, progress):
  """[N] int32, for which every record must be read; kept beside them if that folder is writable."""
  file = folder / f'labels-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.npy'
  labels = None
  with contextlib.suppress(OSError, ValueError):
    labels = np.load(file, allow_pickle=False)
    if labels.shape != (len(source),) or labels.dtype != np.int32:
      labels = None
  if distributed.everywhere(labels is not None):  # each machine may have a disk of its own
    return labels
  mine = range(jax.process_index(), len(source), jax.process_count())  # each process does its part
  labels = distributed.interleave(
      np.array([source[i]['label'] for i in progress.track(mine)], np.int32), len(source))
  with contextlib.suppress(OSError):
    partial = file.with_suffix(f'.partial-{jax.process_index()}.npy')
    np.save(partial, labels)
    os.replace(partial, file)
  return labels


def _first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
