"""From labels of some images of a folder to predictions for all of them."""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import os
import pathlib
from typing import Any

from jaxtyping import Int
import numpy as np

from instdisc_jax import inference, linalg
from instdisc_jax.data import folder
from instdisc_jax.data import images as images_lib
from instdisc_jax.evaluation import classifier
from instdisc_jax.runtime import errors, files
from instdisc_jax.runtime import workdir as workdir_lib

_PIXEL_SIDE = 32  # of the views whose raw pixels are compared
COLUMNS = ('path', 'label', 'confidence', 'given', 'unknown', *(
    f'{name}_{i}' for i in range(1, classifier.SHOWN + 1) for name in ('nearest', 'similarity')))


@dataclasses.dataclass(frozen=True)
class Task:
  """Images, and labels of some of them.

  Attributes:
    images: N images of a folder.
    rows: [n] those with a label, ascending.
    labels: [n] their labels.
  """
  images: images_lib.Images
  rows: Int[np.ndarray, ' n']
  labels: list[str]


@dataclasses.dataclass(frozen=True)
class Result:
  """What `run` has found.

  Attributes:
    classifier: the classifier.
    num_images: how many images were classified.
    num_unknown: how many of them are like no labeled one.
    pixels: the accuracy of raw pixels, by leave-one-out.
    curve: [(number of labels, accuracy)], see `classifier.learning_curve`.
    suggested: names of the images worth labeling next.
  """
  classifier: classifier.Classifier
  num_images: int
  num_unknown: int
  pixels: float
  curve: list[tuple[int, float]]
  suggested: list[str]


def prepare(labels: pathlib.Path, workdir: str, images: str | None = None,
            on_unreadable: str = 'error') -> Task:
  """Reads the names of a folder's images, and the labels.

  Args:
    labels: a CSV file with lines of path,label for some of the images.
    workdir: the folder of a run.
    images: the folder of images; by default the one that the run was trained on.
    on_unreadable: see `folder.load`.

  Raises:
    errors.UserError: there is no run or no image, or the labels are invalid.
  """
  root = images or _own_folder(workdir)
  source, _, _ = folder.load(root, on_unreadable, None, '--images', with_labels=False)
  names: Any = source.names
  rows, given = read(labels, names, os.path.abspath(os.path.expanduser(root)))
  if len(set(given)) < 2:
    raise errors.UserError(f"all labels of '{labels}' are '{given[0]}'", 'two classes or more',
                           'set <--labels> to a file with another class', '--labels')
  return Task(source, rows, given)


def run(model: inference.Model, task: Task, output: pathlib.Path, method: str = 'knn',
        suggest: int = 0) -> Result:
  """Classifies all images and writes predictions.csv, and the suggestions beside it.

  Args:
    model: a trained run.
    task: the images and the labels.
    output: the file to write, see `COLUMNS`; suggestions go to NAME-suggested.csv.
    method: see `classifier.fit`.
    suggest: how many images to suggest for labeling.

  Raises:
    errors.UserError: an image cannot be read, or the file cannot be written.
  """
  source, rows, given = task.images, task.rows, task.labels
  names: Any = source.names
  features = model.fresh(source)
  temperature = model.config.knn.temperature
  fitted = classifier.fit(features[rows], given, [names[i] for i in rows], method, temperature)
  found = fitted.predict(features)
  _write(output, names, fitted, found, dict(zip(rows.tolist(), given)))
  suggested = []
  if suggest:
    chosen = classifier.suggest(features, rows, found.confidence, suggest)
    suggested = [names[i] for i in chosen]
    text = ''.join(f'{_quoted(name)}\n' for name in ['path', *suggested])
    try:
      files.write(suggestions(output), text)
    except OSError as e:
      raise errors.cannot_write(suggestions(output), e, '--output') from e
  views = model.engine.views(source.subset(rows, 'labeled'), _PIXEL_SIDE)
  pixels = views.reshape(len(rows), -1).astype(np.float32)
  alike = classifier.fit(linalg.unit(pixels - pixels.mean(axis=0)), given, [''] * len(rows),
                         temperature=temperature)
  return Result(fitted, len(source), int(found.unknown.sum()), alike.accuracy,
                classifier.learning_curve(features[rows], given, method, temperature), suggested)


def suggestions(output: pathlib.Path) -> pathlib.Path:
  """The file of suggestions that belongs to a file of predictions."""
  return output.with_name(f'{output.stem}-suggested.csv')


def read(file: pathlib.Path, names: Sequence[str],
         root: str) -> tuple[Int[np.ndarray, ' n'], list[str]]:
  """Reads labels of some images.

  Args:
    file: lines of path,label in UTF-8; a first line 'path,label' is a heading.
    names: the paths of all images, relative to the root.
    root: the folder; absolute paths below it are accepted.

  Returns:
    ([n] indices into `names`, ascending; their labels).

  Raises:
    errors.UserError: the file cannot be read or is empty, names an image that is not there, or
      gives one image two labels.
  """
  index, label = {name: i for i, name in enumerate(names)}, {}
  for line, (path, text) in _lines(file):
    name = next((name for name in (path, path.strip()) if name in index), path.strip())
    if os.path.isabs(name):
      name = os.path.relpath(name, root).replace(os.sep, '/')
    if name not in index:
      raise errors.UserError(f"line {line} of '{file}' names '{path}'",
                             f"one of the {len(names)} images in '{root}'", setting='--labels',
                             remedy='correct it, or set <--images>')
    if not text:
      raise errors.UserError(f"line {line} of '{file}' has no label", 'path,label',
                             'correct or remove it', '--labels')
    if label.setdefault(index[name], text) != text:
      raise errors.UserError(f"'{file}' labels '{path}' as '{label[index[name]]}' and '{text}'",
                             'one label for each image', 'remove one of the lines', '--labels')
  if not label:
    raise errors.UserError(f"'{file}' has no labels", 'lines of path,label', setting='--labels',
                           remedy='set <--labels> to a file with some')
  rows = sorted(label)
  return np.array(rows, np.int32), [label[i] for i in rows]


def is_predictions(file: pathlib.Path) -> bool:
  """Whether `classify` wrote a file, which it may then replace."""
  return files.is_table(file, COLUMNS)


def is_suggestions(file: pathlib.Path) -> bool:
  """Whether `classify --suggest` wrote a file to which nobody has added labels."""
  try:
    with file.open(newline='', encoding='utf-8', errors='replace') as lines:
      return next(lines, '').strip() == 'path' and all(len(row) == 1 for row in csv.reader(lines))
  except (OSError, csv.Error):
    return False


def read_predictions(file: pathlib.Path) -> dict[str, tuple[str, float]]:
  """{path: (label, confidence)}, as `classify` wrote it.

  Raises:
    errors.UserError: the file cannot be read, or lacks a column.
  """
  remedy, setting = 'set <--predictions> to a file that classify wrote', '--predictions'
  try:
    with open(file, newline='', encoding='utf-8-sig', errors='surrogateescape') as lines:
      reader = csv.DictReader(lines)
      missing = {'path', 'label', 'confidence'}.difference(reader.fieldnames or ())
      found = {} if missing else {row['path']: (row['label'], float(row['confidence']))
                                  for row in reader}
  except (OSError, TypeError, ValueError, csv.Error) as e:
    raise errors.UserError(f"'{file}' cannot be read ({errors.reason(e)})", None, remedy,
                           setting) from e
  if missing:
    raise errors.UserError(f"'{file}' has no column '{min(missing)}'",
                           'a table with columns path, label and confidence', remedy, setting)
  return found


def check_names(predictions: Mapping[str, Any], names: Sequence[str] | None) -> None:
  """Raises `errors.UserError` if predictions are of none of the images with these names."""
  if predictions.keys().isdisjoint(names or ()):
    raise errors.UserError(f'--predictions names none of the {len(names or ())} images',
                           remedy='set <--predictions> to what classify wrote for them',
                           setting='--predictions')


def _lines(file):
  """Yields (line number, (path, label))."""
  try:
    with open(file, newline='', encoding='utf-8-sig') as lines:
      reader = csv.reader(lines)
      rows = [(reader.line_num, [*row[:1], *(value.strip() for value in row[1:])])
              for row in reader if row]
  except (OSError, ValueError, csv.Error) as e:
    raise errors.UserError(f"'{file}' cannot be read ({errors.reason(e)})", None,
                           'set <--labels> to a CSV file of path,label in UTF-8',
                           '--labels') from e
  for number, row in rows:
    if len(row) != 2:
      raise errors.UserError(f"line {number} of '{file}' has {len(row)} value"
                             + ('' if len(row) == 1 else 's'), 'path,label',
                             'correct or remove it', '--labels')
    if (number, row[0].strip(), row[1]) != (1, 'path', 'label'):
      yield number, row


def _own_folder(workdir):
  settings = {} if os.path.isfile(workdir) else workdir_lib.read(workdir)[0]
  kind, _, path = settings.get('dataset.name', '').partition(':')
  if kind != 'folder':
    raise errors.UserError(f"'{workdir}' was not trained on a folder of images",
                           remedy='set <--images> to the folder to classify', setting='--images')
  return path


def _write(output, names, fitted, found, given):
  lines: list[tuple[str, ...]] = [COLUMNS]
  for i, name in enumerate(names):
    label = given.get(i, fitted.class_names[found.label[i]])
    nearest = [value for j, similarity in zip(found.nearest[i], found.similarity[i])
               for value in (fitted.names[j], f'{similarity:.4f}')]
    nearest += [''] * (2 * classifier.SHOWN - len(nearest))
    lines.append((name, label, f'{1 if i in given else found.confidence[i]:.4f}',
                  str(i in given).lower(), str(bool(found.unknown[i])).lower(), *nearest))
  try:
    files.write(output, ''.join(','.join(map(_quoted, line)) + '\n' for line in lines))
  except OSError as e:
    raise errors.cannot_write(output, e, '--output') from e


def _quoted(value: str) -> str:
  return f'"{value.replace(chr(34), chr(34) * 2)}"' if any(c in value for c in ',"\r\n') else value
