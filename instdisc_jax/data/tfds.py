"""TensorFlow Datasets without TensorFlow: read as ArrayRecord, prepared on first use.

TFDS shuffles when it writes, so an image's position is stable for one prepared copy only; the
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

from instdisc_jax.data import images
from instdisc_jax.runtime import distributed, errors, metrics

# {name: (training images, their shape if all have the same)}, as TFDS documents them.
PUBLISHED: dict[str, tuple[int, tuple[int, ...] | None]] = {
    'cifar10': (50_000, (32, 32, 3)), 'cifar100': (50_000, (32, 32, 3)),
    'mnist': (60_000, (28, 28, 3)), 'fashion_mnist': (60_000, (28, 28, 3)),
    'svhn_cropped': (73_257, (32, 32, 3)), 'stl10': (5_000, (96, 96, 3)),
    'imagenet2012': (1_281_167, None), 'places365_small': (1_803_460, None),
    'food101': (75_750, None),
}
KEPT_BYTES = 2**30  # splits up to this size are kept in memory, encoded


def load(name: str, data_dir: str | None, held_out: str | None = None
         ) -> tuple[images.Images, images.Images | None, tuple[str, ...] | None]:
  """Opens the training and held-out splits of a TFDS image set.

  Images with several labels (as in PASCAL VOC) have tags; their training images are those of
  'train' and 'validation', where there is a 'test'.

  Args:
    name: its name in TFDS, e.g. 'cifar10'.
    data_dir: where prepared data is stored; None for TFDS's own default.
    held_out: the split to evaluate on; by default 'test', else 'validation', else none. A split
      whose labels are all -1, those of a contest, counts as none.

  Returns:
    (train, held_out, class_names): `Images`, `Images` or None, and the names or None.

  Raises:
    errors.UserError: the set is unknown, cannot be prepared, or has no images.
  """
  import tensorflow_datasets as tfds  # slow to import, and only needed here

  builder = _builder(name, data_dir)
  splits = builder.info.splits
  if 'train' not in splits:
    raise errors.UserError(f'tfds:{name} has the splits {sorted(splits)}', "a set with 'train'",
                           setting='dataset.name')
  if held_out is not None and held_out not in splits:
    raise errors.UserError(
        f"dataset.validation is '{held_out}'",
        f'one of the splits {sorted(splits)} of tfds:{name}, or a share such as 0.1',
        setting='dataset.validation')
  candidates = [held_out] if held_out else [s for s in ('test', 'validation') if s in splits]
  features: Any = builder.info.features
  if 'image' not in features or not isinstance(features['image'], tfds.features.Image):
    raise errors.UserError(f'tfds:{name} has the features {sorted(features)}',
                           "a set with 'image'", setting='dataset.name')
  names = getattr(features['label'], 'names', None) if 'label' in features else None
  train = 'train'
  if _has_tags(features):
    names = features['labels'].feature.names
    if candidates[:1] == ['test'] and 'validation' in splits:
      train = 'train+validation'
  test = None
  for split in candidates:
    test = _open(builder, split)
    if test.labels is None or (test.labels >= 0).any():
      break
    if held_out is not None:
      raise errors.UserError(f"the split '{held_out}' of tfds:{name} has no labels",
                             setting='dataset.validation', remedy='set <dataset.validation> to '
                             'another split, or a share such as 0.1')
    test = None  # its labels are kept secret
  return _open(builder, train), test, tuple(names) if names else None


def load_objects(name: str, data_dir: str | None) -> tuple[Any, Any, tuple[str, ...]]:
  """Opens the training and test splits of a TFDS set whose images have boxes, as PASCAL VOC has.

  Args:
    name: its name in TFDS, e.g. 'voc/2007'.
    data_dir: where prepared data is stored; None for TFDS's own default.

  Returns:
    ((`Images`, objects) of 'train' and 'validation', the same of 'test', class names), where the
    objects of an image are {'label': [n], 'bbox': [n, 4] top, left, bottom and right as shares of
    the image, and perhaps 'is_difficult': [n]}.

  Raises:
    errors.UserError: the set is unknown, cannot be prepared, or has no boxes.
  """
  builder = _builder(name, data_dir)
  features: Any = builder.info.features
  splits = builder.info.splits
  objects = getattr(features['objects'], 'feature', {}) if 'objects' in features else {}
  if not {'label', 'bbox'} <= set(objects) or not {'train', 'test'} <= set(splits):
    raise errors.UserError(
        f'tfds:{name} has the features {sorted(features)} and the splits {sorted(splits)}',
        "a set with boxes, in 'objects', and with 'train' and 'test'",
        'set <--dataset>=tfds:voc/2007', '--dataset')
  train = 'train+validation' if 'validation' in splits else 'train'
  known = [(_open(builder, split), [record['objects'] for record in _source(builder, split)])
           for split in (train, 'test')]
  return known[0], known[1], tuple(objects['label'].names)


def _builder(name, data_dir):
  """The TFDS builder of a set, which is prepared if it was not."""
  import tensorflow_datasets as tfds  # slow to import, and only needed here

  where = os.path.expanduser(data_dir or tfds.core.constants.DATA_DIR)  # pyright: ignore
  if data_dir is not None and not os.path.isdir(where):
    raise errors.UserError(f"dataset.data_dir is '{data_dir}'", 'an existing folder',
                           setting='dataset.data_dir')
  try:
    builder = tfds.builder(name, data_dir=where, file_format='array_record')
  except tfds.core.DatasetNotFoundError as e:
    raise errors.UserError(f"'{name}' is not a TFDS data set ({_first_line(e)})", None,
                           'set <dataset.name>=tfds:NAME', 'dataset.name') from e
  prepared = bool(builder.info.splits)
  if not distributed.everywhere(prepared):
    distributed.first_only(lambda: prepared or prepare(builder))
    builder = tfds.builder(name, data_dir=where, file_format='array_record')
    if not builder.info.splits:  # the first process prepared it on its own disk
      raise errors.UserError(
          f"tfds:{name} is not prepared under '{where}' on the machine of process "
          f'{jax.process_index()}', setting='dataset.data_dir',
          remedy='set <dataset.data_dir> to a folder that all machines share, or prepare it on '
                 'each')
  return builder


def prepare(builder: Any) -> None:
  """Downloads a data set and writes it as ArrayRecord.

  TFDS uses TensorFlow to encode images that a builder provides as arrays, but PIL to encode PIL
  images (losslessly, as PNG, unless the builder specifies JPEG); so arrays become PIL images first.

  Args:
    builder: a TFDS builder made with `file_format='array_record'`.

  Raises:
    errors.UserError: the download failed.
  """
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core.download import downloader

  downloader.MAX_RETRIES = 4  # without a network, fail within seconds instead of minutes
  logging.getLogger('urllib3').setLevel(logging.ERROR)
  for feature in builder.info.features.values():
    if isinstance(feature, tfds.features.Image):
      encode = _encode_with_pil(feature.encode_example)
      feature.encode_example = encode  # pyright: ignore[reportAttributeAccessIssue]
  try:
    builder.download_and_prepare(file_format='array_record')
  except Exception as e:  # from any of the network and file libraries that TFDS uses
    raise errors.UserError(
        f"tfds:{builder.name} is not prepared under '{builder._data_dir_root}', and preparing it "
        f'failed ({_first_line(e)})', setting='dataset.data_dir',
        remedy='set <dataset.data_dir> to the folder that holds it, or try again with a network'
        ) from e


def _encode_with_pil(encode_example):
  def encode(image):
    if isinstance(image, np.ndarray):
      image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return encode_example(image)
  return encode


@dataclasses.dataclass(frozen=True)
class Records:
  """files[i] is the encoded image of the i-th record, as bytes."""
  source: Any

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    return self.source[i]['image']


def _source(builder, split):
  """The records of a split, images encoded."""
  import tensorflow_datasets as tfds

  return builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})


def _open(builder, split):
  """The `Images` of a split, in record order."""
  info, features = builder.info.splits[split], builder.info.features
  source = _source(builder, split)
  fingerprint = f'{builder.info.full_name} {split} {list(info.shard_lengths)}'
  files, labels, tags = Records(source), None, None
  with metrics.progress_bar(f'reading {split}') as progress:
    if sum(builder.info.splits[part].num_bytes for part in split.split('+')) <= KEPT_BYTES:
      records = list(progress.track(source, len(source)))
      files = [record['image'] for record in records]
      if 'label' in features:
        labels = np.array([record['label'] for record in records], np.int32)
      elif _has_tags(features):
        tags = _tags(records, features['labels'].feature.num_classes)
    elif 'label' in features:
      labels = _labels(source, pathlib.Path(builder.data_dir), fingerprint, progress)
    elif _has_tags(features):
      tags = _tags(progress.track(source, len(source)), features['labels'].feature.num_classes)
  shape = features['image'].shape
  return images.Images(
      files, labels, fingerprint,
      shape=None if None in shape[:2] else (*shape[:2], 3), tags=tags,
      origin=_sizes(pathlib.Path(builder.data_dir)))


def _sizes(folder):
  """A digest of the sizes of a set's files, which tells two copies in different order apart."""
  sizes = sorted((file.name, file.stat().st_size) for file in folder.glob('*.array_record*'))
  return hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]


def _has_tags(features):
  """Whether an image may have several labels."""
  labels = features['labels'] if 'labels' in features and 'label' not in features else None
  return hasattr(getattr(labels, 'feature', None), 'num_classes')


def _tags(records, num_classes):
  """[N, C] int8, see `images.Images`; classes of difficult objects alone do not count."""
  tags = []
  for record in records:
    row = np.zeros(num_classes, np.int8)
    row[list(record['labels'])] = -1 if 'labels_no_difficult' in record else 1
    row[list(record.get('labels_no_difficult', ()))] = 1
    tags.append(row)
  return np.array(tags).reshape(-1, num_classes)


def _labels(source, folder, fingerprint, progress):
  """[N] int32; they require reading every record, so they are saved beside the data if possible."""
  file = folder / f'labels-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.npy'
  labels = None
  with contextlib.suppress(OSError, ValueError):
    labels = np.load(file, allow_pickle=False)
    if labels.shape != (len(source),) or labels.dtype != np.int32:
      labels = None
  if distributed.everywhere(labels is not None):  # each machine may have its own disk
    return labels
  mine = range(jax.process_index(), len(source), jax.process_count())  # each process reads its part
  labels = distributed.interleave(
      np.array([source[i]['label'] for i in progress.track(mine)], np.int32), len(source))
  with contextlib.suppress(OSError):
    partial = file.with_suffix(f'.partial-{jax.process_index()}.npy')
    np.save(partial, labels)
    os.replace(partial, file)
  return labels


def _first_line(error):
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
