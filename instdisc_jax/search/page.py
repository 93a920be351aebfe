"""The search page: images beside their nearest, a map of them, duplicates, outliers and leaks.

It is a folder that opens from disk, without a server, and works offline:

    index.html, *.js, page.css    the same for all pages
    data.js                       the data of this page
    images/                       a thumbnail of each image
"""

from collections.abc import Mapping, Sequence
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
from typing import Any

from jaxtyping import Float, Int
import numpy as np
from PIL import Image

from instdisc_jax import inference
from instdisc_jax.data import folder
from instdisc_jax.data import images as images_lib
from instdisc_jax.runtime import errors, files, metrics, preemption
from instdisc_jax.search import audit, labeling, neighbors, projection

STATIC = pathlib.Path(__file__).with_name('static')
MARK = '<meta name="generator" content="instdisc_jax.retrieve">'  # identifies our pages
_FILES = {'data.js', 'images', 'pictures', *(file.name for file in STATIC.iterdir())}  # or had
_OF_SYSTEMS = {'.DS_Store', 'Thumbs.db', 'desktop.ini'}  # what operating systems add to folders
_MOST_CLASSES = 1_000_000  # the page names each
_SIDE = 128  # longer side of a thumbnail, in pixels
_LOSSLESS_SIDE = 64  # thumbnails up to this side are lossless


@dataclasses.dataclass(frozen=True)
class Queries:
  """The choice of query images.

  Attributes:
    folder: a folder of images; by default the run's held-out images or, if there are none, its
      training images.
    most: maximum number of queries, evenly spread; those that repeat a training image come on top,
      at most as many again.
    on_unreadable: see `folder.load`.
  """
  folder: str | None = None
  most: int = 1000
  on_unreadable: str = 'error'


@dataclasses.dataclass(frozen=True)
class Limits:
  """Size limits of a page.

  Attributes:
    neighbors: neighbors per image.
    shown: images on the page, of those searched; besides, there are the neighbors of the queries.
    outliers: maximum number of outliers to list.
  """
  neighbors: int = 20
  shown: int = 100_000
  outliers: int = 200


@dataclasses.dataclass(frozen=True)
class Built:
  """What a page holds.

  Attributes:
    queries: number of queries.
    shown: number of images on the page, of those searched.
    searched: number of images searched.
  """
  queries: int
  shown: int
  searched: int


@dataclasses.dataclass(frozen=True)
class _Searched:
  """The images among which neighbors are searched.

  Attributes:
    title: a description of them.
    noun: what they are called in the plural.
    place: where they lie; labels given on a page are kept under it.
    images: N images.
    class_names: the names of their classes, or None.
  """
  title: str
  noun: str
  place: str
  images: images_lib.Images
  class_names: Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class _Asked:
  """The images to choose queries from.

  Attributes:
    title: a description of them.
    images: n images, or None if they are those searched.
  """
  title: str
  images: images_lib.Images | None = None


@dataclasses.dataclass(frozen=True)
class _Found:
  """The search results. Images of the page have numbers: those searched first, then the queries.

  Attributes:
    shown: [n] the images searched that the page shows, as rows of `_Searched.images`.
    chosen: [q] the queries, as rows of `_Asked.images`; empty if they are images searched.
    queries: numbers of the queries.
    nearest: for every image, the numbers of its nearest.
    similarity: their cosines.
    exact: numbers of the images whose nearest are searched among all, or None: all of them.
    threshold: cosine from which two images are duplicates.
    outliers: [(number, mean similarity)].
  """
  shown: Int[np.ndarray, ' n']
  chosen: Int[np.ndarray, ' q']
  queries: list[int]
  nearest: list[list[int]]
  similarity: list[list[float]]
  exact: list[int] | None
  threshold: float
  outliers: list[tuple[int, float]]


def check_output(output: pathlib.Path) -> None:
  """Raises `errors.UserError` if a page cannot be written there or would replace other files."""
  errors.check_output(output)
  if output.exists() and not _is_page(output):
    raise errors.UserError(f"'{output}' exists and holds more than a page of this command",
                           remedy='set <--output> to a new folder', setting='--output')


def build(model: inference.Model, output: pathlib.Path, watch: preemption.Watch,
          queries: Queries | None = None, limits: Limits | None = None,
          predictions: Mapping[str, tuple[str, float]] | None = None) -> Built:
  """Builds the page.

  Similarities are cosines of fresh embeddings of central views, never of the bank's rows, which
  average random views. The images searched are those that the run was trained on; for weights
  without a run, those of the queries' folder.

  Args:
    model: a trained run.
    output: the folder to create; an earlier page there is replaced.
    watch: checked regularly.
    queries: the choice of query images.
    limits: the size limits of the page.
    predictions: {path: (label, confidence)} of the images searched, see
      `labeling.read_predictions`.

  Returns:
    What the page holds.

  Raises:
    errors.UserError: the training images are gone, there is one image only, or it cannot be read;
      or the predictions are of other images.
    errors.Stopped: stopped by a signal; nothing is left behind.
  """
  queries, limits = queries or Queries(), limits or Limits()
  searched, asked = _open(queries, model)
  if len(searched.images) < 2:
    raise errors.UserError(f"'{model.workdir}' was trained on one image, which has no neighbors",
                           remedy='set <--workdir> to another run', setting='--workdir')
  if predictions is not None:
    labeling.check_names(predictions, searched.images.names)
  rows, given = _embed(model, searched.images), None
  watch.check()
  if asked.images is not None:
    given = _embed(model, asked.images)
  found = _search(rows, given, queries.most, limits, watch.check)
  mapped = rows[found.shown] if given is None else np.concatenate([rows[found.shown],
                                                                   given[found.chosen]])
  place = projection.project_once(mapped, model.config.seed, model.maps)
  sources = [_named(searched.images, found.shown, 'train')]
  if asked.images is not None:
    sources.append(_named(asked.images, found.chosen, 'test'))
  content = _content(searched, asked, found, place, sources)
  if predictions is not None:
    content |= _predictions(content, predictions)
  _write(content, sources, output, watch)
  return Built(len(found.queries), len(found.shown), len(rows))


def _open(queries, model) -> tuple[_Searched, _Asked]:
  """The images to search, and the queries."""
  if not model.was_trained and queries.folder is not None:
    images, names, _ = folder.load(queries.folder, queries.on_unreadable, setting='--images')
    if len(images) < 2:
      raise errors.UserError(f"'{queries.folder}' holds one image, which has no neighbors",
                             remedy='set <--images> to a folder of more', setting='--images')
    searched = _Searched(f'images in {queries.folder}', 'images', _absolute(queries.folder), images,
                         names)
    return searched, _Asked('images')
  try:
    dataset = model.dataset
  except errors.UserError as e:
    if e.setting != 'dataset.name':
      raise
    raise e.with_remedy('restore the images that the run was trained on') from e
  searched = _Searched(f'{dataset.name}, step {model.step:,}', 'training images',
                       _absolute(dataset.name.partition(':')[2]), dataset.train,
                       _class_names(model))
  if queries.folder is not None:
    given, names, _ = folder.load(queries.folder, queries.on_unreadable, setting='--images')
    given = dataclasses.replace(given, labels=_run_labels(given.labels, names, searched.class_names,
                                                          len(given)))
    title = f'images in {queries.folder}'
  elif dataset.test is not None:
    given, title = dataset.test, 'held-out images'
  else:
    return searched, _Asked('training images')
  return searched, _Asked(title, given)


def _absolute(path):
  return os.path.abspath(os.path.expanduser(path))


def _run_labels(labels, names, class_names, n):
  """[n] labels of a folder's images as classes of the run; -1 where the run has no such class."""
  if labels is None or class_names is None:
    return np.full(n, -1, np.int32)
  number = {name: i for i, name in enumerate(class_names)}
  return np.array([number.get(name, -1) for name in names], np.int32)[labels]


def _class_names(model):
  """The names of the run's classes, or None if it has no labels."""
  if model.class_names is not None:
    return list(model.class_names)
  if model.labels is None:
    return None
  labels = [source.labels.max() for source in (model.dataset.train, model.dataset.test)
            if source is not None and source.labels is not None]
  if max(labels) >= _MOST_CLASSES:
    raise errors.UserError(f'{model.dataset.name} has the class number {max(labels)}',
                           f'numbers below {_MOST_CLASSES:,} on a page', setting='dataset.name',
                           remedy='set other numbers in the data, from 0 on')
  return [str(c) for c in range(int(max(labels)) + 1)]


def _named(source, chosen, kind):
  """Some of the images, each with a name."""
  part = source.subset(chosen, 'page')
  if part.names is None:
    part = dataclasses.replace(part, names=[f'{kind} {i}' for i in chosen])
  return part


def _embed(model, images) -> Float[np.ndarray, 'n D']:
  try:
    return model.fresh(images)
  except images_lib.UnreadableImage as e:
    raise e.with_remedy('remove it, or set <--on_unreadable>=skip, or <--images>') from e


def _search(rows, given, most, limits, check) -> _Found:
  """The search results that the page shows; see `build`.

  Args:
    rows: [N, D] of the images searched.
    given: [n, D] of the images to choose queries from, or None: those searched.
    most: maximum number of queries.
    limits: the size limits of the page.
    check: called regularly.
  """
  k, total = limits.neighbors, len(rows)
  base = neighbors.spread(total, limits.shown)
  all_shown = len(base) == total
  near = neighbors.search(rows[base], None, k, check=check)
  threshold = audit.choose_threshold(near.similarity)
  chosen, of_queries, own = np.arange(0), None, neighbors.spread(total, most)
  if given is not None:
    first = neighbors.search(rows, given, 1, check=check).similarity[:, 0]
    leaking = np.argsort(-first, kind='stable')[:most]
    chosen = np.union1d(neighbors.spread(len(given), most),
                        leaking[first[leaking] >= threshold]).astype(int)
    own, of_queries = np.arange(0), neighbors.search(rows, given[chosen], k, check=check)
  elif not all_shown:
    of_queries = neighbors.search(rows, rows[own], k, own, check)

  others = own if of_queries is None else np.concatenate([own, of_queries.row.ravel()])
  extra = np.setdiff1d(others, base)
  shown = np.concatenate([base, extra])
  number = np.full(total, -1)
  number[shown] = np.arange(len(shown))
  nearest, similarity = near.row.tolist(), near.similarity.tolist()
  if len(extra):
    near = neighbors.search(rows[shown], rows[extra], k, number[extra], check)
    nearest += near.row.tolist()
    similarity += near.similarity.tolist()
  queries = number[own].tolist() if given is None else list(
      range(len(shown), len(shown) + len(chosen)))
  if of_queries is not None:
    nearest += [[]] * len(chosen)
    similarity += [[]] * len(chosen)
    for i, row, values in zip(queries, of_queries.row, of_queries.similarity):
      nearest[i], similarity[i] = number[row].tolist(), values.tolist()
  crowd = [float(np.mean(values[:neighbors.CROWD])) for values in similarity[:len(base)]]
  outliers = [(int(i), crowd[i]) for i in np.argsort(crowd, kind='stable')[:limits.outliers]]
  return _Found(shown, chosen, queries, nearest, similarity, None if all_shown else queries,
                threshold, outliers)


def _content(searched, asked, found, place, sources) -> dict[str, Any]:
  """The content of data.js."""
  labels = [np.full(len(source), -1) if source.labels is None else source.labels
            for source in sources]
  x, y = place.round(4).T.tolist()
  return {
      'id': hashlib.sha256(os.fsencode(searched.place)).hexdigest()[:16],
      'title': searched.title, 'searched': searched.noun, 'queried': asked.title,
      'rows': len(searched.images), 'trained': len(found.shown), 'exact': found.exact,
      'files': searched.images.names is not None,
      'classes': None if searched.class_names is None else list(searched.class_names),
      'names': [name for source in sources for name in source.names],
      'labels': np.concatenate(labels).tolist(), 'queries': found.queries,
      'neighbors': found.nearest,
      'similarity': [[round(s, 6) for s in line] for line in found.similarity],
      'threshold': math.floor(found.threshold * 1e6) / 1e6,
      'outliers': [[i, round(s, 4)] for i, s in found.outliers], 'x': x, 'y': y}


def _predictions(content, predicted) -> dict[str, Any]:
  """The predictions of data.js: a class and a confidence for each image searched."""
  found = [predicted.get(name, ('', 0.0)) for name in content['names'][:content['trained']]]
  labels = [label for label, _ in found if label]
  classes = list(dict.fromkeys([*(content['classes'] or ()), *labels]))
  number = {name: i for i, name in enumerate(classes)}
  return {'classes': classes, 'predicted': [number.get(label, -1) for label, _ in found],
          'confidence': [round(confidence, 3) for _, confidence in found]}


def _write(content, sources, output, watch):
  """Writes the folder completely or not at all."""
  with files.whole_folder(output, '--output') as partial:
    (partial / 'images').mkdir()
    _write_thumbnails(sources, partial / 'images', watch)
    (partial / 'data.js').write_text(f'const PAGE = {json.dumps(content)};\n')
    for file in STATIC.iterdir():
      shutil.copyfile(file, partial / file.name)


def _write_thumbnails(sources, place, watch):
  """Writes NUMBER.webp for each image."""
  todo = [(source, i) for source in sources for i in range(len(source))]

  def write(number):
    source, i = todo[number]
    try:
      image = Image.fromarray(source.full(i))
    except images_lib.UnreadableImage as e:
      raise e.with_remedy('restore it, or set <--images> to a folder without it') from e
    image.thumbnail((_SIDE, _SIDE))
    image.save(place / f'{number}.webp', quality=80, lossless=max(image.size) <= _LOSSLESS_SIDE)

  with (concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        metrics.progress_bar('writing thumbnails') as progress):
    for _ in progress.track(pool.map(write, range(len(todo))), len(todo)):
      watch.check()


def _is_page(path):
  """Whether a folder is empty or contains only a page of ours, and files of operating systems."""
  if not path.is_dir():
    return False
  index, present = path / 'index.html', {file.name for file in path.iterdir()} - _OF_SYSTEMS
  return not present or (present <= _FILES and index.is_file()
                         and MARK in index.read_text(errors='replace')[:500])
