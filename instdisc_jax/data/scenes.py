"""Images with boxes around their objects, for detection.

    coco:FOLDER       images/ and annotations.json in COCO's form; or two such folders, train/ and
                      test/
    tfds:voc/2007     and other sets of TFDS with boxes: training has the validation images, too
    scenes:N          N generated images of the embedded digits, and N / 3 to test
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from jaxtyping import Bool, Float, Int
import numpy as np
from PIL import Image

from instdisc_jax.data import arrays, decode, digits, folder, images, tfds
from instdisc_jax.runtime import errors

_REMEDY = 'set <--dataset>=coco:FOLDER or tfds:voc/2007'


@dataclasses.dataclass(frozen=True)
class Scene:
  """The objects of an image.

  Attributes:
    boxes: [n, 4] left, top, right and bottom, in pixels.
    classes: [n] numbers of the classes.
    difficult: [n] whether it counts neither as found nor as missed.
  """
  boxes: Float[np.ndarray, 'n 4']
  classes: Int[np.ndarray, ' n']
  difficult: Bool[np.ndarray, ' n']


@dataclasses.dataclass(frozen=True)
class Scenes:
  """N images with their objects.

  Attributes:
    images: `Images`.
    objects: a `Scene` for each image.
  """
  images: images.Images
  objects: tuple[Scene, ...]

  def __len__(self) -> int:
    return len(self.objects)

  def subset(self, chosen: Int[np.ndarray, ' n'], why: str) -> 'Scenes':
    """Some of the images, in that order; `why` is added to the fingerprint."""
    return Scenes(self.images.subset(chosen, why), tuple(self.objects[i] for i in chosen))


def load(name: str, data_dir: str | None = None) -> tuple[Scenes, Scenes, tuple[str, ...]]:
  """Opens a set of images with boxes.

  Args:
    name: see above.
    data_dir: the folder of prepared TFDS data.

  Returns:
    (training scenes, test scenes, names of the classes).

  Raises:
    errors.UserError: the data are missing or invalid, there are no boxes, or the test images have
      a class that the training images lack.
  """
  kind, _, rest = name.partition(':')
  if kind == 'coco' and rest:
    train, test, names = _coco(pathlib.Path(rest).expanduser())
  elif kind == 'tfds' and rest:
    train, test, names = _tfds(rest, data_dir)
  elif kind == 'scenes' and rest.isdigit() and int(rest) >= 30:
    train, test = (generate(count, held_out) for count, held_out in (
        (int(rest), False), (int(rest) // 3, True)))
    names = tuple('0123456789')
  else:
    raise errors.UserError(f"--dataset is '{name}'", 'coco:FOLDER or tfds:NAME, with boxes, or '
                           'scenes:N with N of at least 30',
                           _REMEDY, '--dataset')
  seen, asked = ({int(c) for scene in part.objects for c in scene.classes}
                 for part in (train, test))
  for part, found in (('training', seen), ('test', asked)):
    if not found:
      raise errors.UserError(f'the {part} images of {name} have no boxes', None, _REMEDY,
                             '--dataset')
  if asked - seen:
    raise errors.UserError(
        f"the test images of {name} have the class '{names[min(asked - seen)]}'",
        'only classes of the training images', _REMEDY, '--dataset')
  return train, test, names


def generate(count: int, held_out: bool, side: int = 96) -> Scenes:
  """Images of one to three of the embedded digits, at random places and in random sizes, on noise.

  Args:
    count: number of images.
    held_out: whether the digits are those that no run is trained on.
    side: of the images, in pixels.
  """
  drawings, labels = digits.load()[int(held_out)]
  random = np.random.RandomState([count, held_out])
  pixels = random.randint(0, 60, (count, side, side, 3)).astype(np.uint8)
  objects = []
  for image in pixels:
    boxes, classes = [], []
    for _ in range(random.randint(1, 4)):
      i, size = random.randint(len(drawings)), random.randint(side // 4, side // 2)
      top, left = random.randint(0, side - size, 2)
      box = left, top, left + size, top + size
      if all(box[0] >= b[2] or b[0] >= box[2] or box[1] >= b[3] or b[1] >= box[3] for b in boxes):
        part = image[top:top + size, left:left + size]
        digit = np.asarray(Image.fromarray(drawings[i]).resize((size, size)))
        part[:] = np.maximum(part, digit)
        boxes.append(box)
        classes.append(labels[i])
    objects.append(_scene(boxes, classes, [False] * len(boxes)))
  return Scenes(arrays.in_memory(pixels, None), tuple(objects))


def _coco(root):
  if (root / 'train').is_dir() and (root / 'test').is_dir():
    train, names = _coco_folder(root / 'train')
    test, test_names = _coco_folder(root / 'test')
    if names != test_names:
      raise errors.UserError(f"'{root / 'test'}' has other categories than '{root / 'train'}'",
                             None, _REMEDY, '--dataset')
    return train, test, names
  scenes, names = _coco_folder(root)
  names_of_images: Any = scenes.images.names
  order = np.argsort([hashlib.sha256(n.encode()).hexdigest() for n in names_of_images])
  count = max(1, round(0.2 * len(scenes)))
  held_out, rest = np.sort(order[:count]), np.sort(order[count:])
  return scenes.subset(rest, 'train'), scenes.subset(held_out, 'held out'), names


def _coco_folder(root):
  """(scenes, names of the classes) of a folder in COCO's form."""
  file = root / 'annotations.json'
  try:
    content = file.read_bytes()
    found = json.loads(content)
    names = {c['id']: c['name'] for c in sorted(found['categories'], key=lambda c: c['id'])}
    numbers = {key: i for i, key in enumerate(names)}
    files = {image['id']: image['file_name'] for image in found['images']}
    of: dict[Any, list] = {key: [] for key in files}
    for a in found['annotations']:
      left, top, width, height = (float(x) for x in a['bbox'])
      if width > 0 and height > 0:
        of[a['image_id']].append(((left, top, left + width, top + height),
                                  numbers[a['category_id']], bool(a.get('iscrowd', 0))))
  except FileNotFoundError:
    raise errors.UserError(f"no file '{file}'", None, _REMEDY, '--dataset') from None
  except (OSError, ValueError, KeyError, TypeError) as e:
    why = errors.reason(e) if isinstance(e, OSError) else errors.one_line(e) or type(e).__name__
    raise errors.UserError(f"'{file}' cannot be read as annotations in COCO's form ({why})", None,
                           _REMEDY, '--dataset') from e
  keys = sorted(files, key=files.__getitem__)
  paths = [files[key] for key in keys]
  missing = next((p for p in paths if not (root / 'images' / p).is_file()), None)
  if missing is not None:
    raise errors.UserError(f"'{root / 'images'}' has no '{missing}', which '{file}' names", None,
                           'restore it, or ' + _REMEDY, '--dataset')
  if len(paths) < 2:
    raise errors.UserError(f"'{file}' names {len(paths)} images", 'at least 2', _REMEDY,
                           '--dataset')
  digest = hashlib.sha256(content).hexdigest()
  listed = images.Images(folder.Files(os.fspath(root / 'images'), paths), None, digest, names=paths)
  return Scenes(listed, tuple(_scene(*zip(*of[key])) if of[key] else _scene((), (), ())
                              for key in keys)), tuple(names.values())


def _scene(boxes, classes, difficult):
  return Scene(np.array(boxes, np.float32).reshape(-1, 4), np.array(classes, np.int32),
               np.array(difficult, bool))


def _tfds(name, data_dir):
  *parts, names = tfds.load_objects(name, data_dir)
  train, test = (Scenes(images, tuple(_in_pixels(images.files[i], record)
                                      for i, record in enumerate(records)))
                 for images, records in parts)
  return train, test, names


def _in_pixels(content, record):
  """The objects of a TFDS image, whose boxes are (top, left, bottom, right) shares of it."""
  height, width = decode.open_image(content).size
  boxes = np.array(record['bbox'], np.float32).reshape(-1, 4)[:, [1, 0, 3, 2]]
  difficult = record.get('is_difficult', np.zeros(len(boxes), bool))
  size = np.array([width, height, width, height], np.float32)
  return _scene(boxes * size, record['label'], difficult)
