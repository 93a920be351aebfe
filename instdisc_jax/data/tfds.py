"""TensorFlow Datasets without TensorFlow: read as ArrayRecord, prepared on first use.

TFDS shuffles when it writes, so a picture's position is stable for one prepared copy only; the
fingerprint holds the name, version, split and shard lengths.
"""

import logging
import os

import numpy as np
from PIL import Image

from instdisc_jax import distributed, errors


def load(name, data_dir):
  """Reads the training and held-out splits of a TFDS image classification set.

  Args:
    name: as TFDS knows it, e.g. 'cifar10'.
    data_dir: where prepared data lies or goes; None for TFDS's own default.

  Returns:
    ((train_images, train_labels), (test_images, test_labels), class_names, fingerprint): images
    uint8 [N, H, W, 3]; the held-out split is 'test' or else 'validation', or None without either.

  Raises:
    errors.UserError: the set is unknown, can't be prepared, or has no pictures of one size.
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
  if not builder.info.splits:
    distributed.first_only(lambda: prepare(builder))
    builder = tfds.builder(name, data_dir=where, file_format='array_record')
  splits = builder.info.splits
  if 'train' not in splits:
    raise errors.UserError(f"tfds:{name} has the splits {sorted(splits)}, must have 'train': set "
                           '--config.dataset.name to a set that has')
  held_out = next((s for s in ('test', 'validation') if s in splits), None)
  features = builder.info.features
  names = getattr(features['label'], 'names', None) if 'label' in features else None
  fingerprint = f'{builder.info.full_name} train {list(splits["train"].shard_lengths)}'
  return (_read(builder, 'train'), _read(builder, held_out) if held_out else (None, None),
          tuple(names) if names else None, fingerprint)


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


def _read(builder, split):
  """(images [N, H, W, 3] uint8, labels [N] int32 or None) of a whole split, in record order."""
  source = builder.as_data_source(split=split)
  first = source[0]
  if 'image' not in first or first['image'].dtype != np.uint8:
    raise errors.UserError(f"tfds:{builder.name} has the features {sorted(first)}, must have a "
                           "uint8 'image': set --config.dataset.name to a set that has")
  images = np.empty((len(source), *first['image'].shape[:2], 3), np.uint8)
  labels = np.empty(len(source), np.int32) if 'label' in first else None
  for i, example in enumerate(source):
    if example['image'].shape[:2] != images.shape[1:3]:
      raise errors.UserError(
          f"tfds:{builder.name} has pictures of sizes {first['image'].shape[:2]} and "
          f"{example['image'].shape[:2]}, must have one size: set --config.dataset.name to a set "
          'that has')
    images[i] = example['image']  # one gray channel spreads over all three
    if labels is not None:
      labels[i] = example['label']
  return images, labels


def _first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
