"""The search page: images beside their nearest training images, near-duplicates and outliers.

It is a folder that opens from disk, without a server, and works offline:

    index.html    the same for all pages
    data.js       the data of this page
    images/       a thumbnail of each image
"""

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

from jaxtyping import Float, Int
import numpy as np
from PIL import Image

from instdisc_jax import inference
from instdisc_jax.data import folder
from instdisc_jax.data import images as images_lib
from instdisc_jax.runtime import errors, metrics, preemption
from instdisc_jax.search import audit, neighbors

TEMPLATE = pathlib.Path(__file__).with_name('page.html')
MARK = '<meta name="generator" content="instdisc_jax.retrieve">'  # identifies our pages
_FILES = {'index.html', 'data.js', 'images', 'pictures'}  # the last is an earlier name
_SIDE = 128  # longer side of a thumbnail, in pixels
_LOSSLESS_SIDE = 64  # thumbnails up to this side are lossless


@dataclasses.dataclass(frozen=True)
class Queries:
  """The choice of query images.

  Attributes:
    folder: a folder of images; by default the run's held-out images or, if there are none, its
      training images.
    most: maximum number of queries, evenly spread.
    on_unreadable: see `folder.load`.
  """
  folder: str | None = None
  most: int = 1000
  on_unreadable: str = 'error'


@dataclasses.dataclass(frozen=True)
class _Searched:
  """The images among which neighbors are searched.

  Attributes:
    title: a description of them.
    images: N images.
    class_names: the names of their classes, or None.
  """
  title: str
  images: images_lib.Images
  class_names: Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class _Asked:
  """The queries of a page.

  Attributes:
    title: a description of them.
    images: [q], or None if they are training images.
    rows: [q] rows of the bank, if they are training images.
  """
  title: str
  images: images_lib.Images | None = None
  rows: Int[np.ndarray, ' q'] = dataclasses.field(default_factory=lambda: np.arange(0))


@dataclasses.dataclass(frozen=True)
class _Found:
  """The search results, as rows of the bank.

  Attributes:
    shown: the training images of the page.
    queries: the nearest rows of queries that are not training images, or None.
    duplicates: [(row, row, similarity)].
    outliers: [(row, mean similarity)].
    scanned: number of rows scanned for duplicates and outliers.
  """
  shown: neighbors.Shown
  queries: neighbors.Nearest | None
  duplicates: list[tuple[int, int, float]]
  outliers: list[tuple[int, float]]
  scanned: int


def check_output(output: pathlib.Path) -> None:
  """Raises `errors.UserError` if a page cannot be written there or would replace other files."""
  errors.check_output(output)
  if output.exists() and not _is_page(output):
    raise errors.UserError(f"'{output}' exists and holds more than a page of this command",
                           remedy='set <--output> to a new folder', setting='--output')


def build(model: inference.Model, output: pathlib.Path, watch: preemption.Watch,
          queries: Queries | None = None, limits: neighbors.Limits | None = None) -> int:
  """Builds the page.

  Similarities are cosines of fresh embeddings of central views, never of the bank's rows, which
  average random views. The images searched are those that the run was trained on; for weights
  without a run, those of the queries' folder.

  Args:
    model: a trained run.
    output: the folder to create; an earlier page there is replaced.
    watch: checked regularly.
    queries: the choice of query images.
    limits: the size limits of the search.

  Returns:
    The number of queries.

  Raises:
    errors.UserError: the training images are gone, there is one image only, or it cannot be read.
    errors.Stopped: stopped by a signal; nothing is left behind.
  """
  queries, limits = queries or Queries(), limits or neighbors.Limits()
  searched, asked = _open(queries, model)
  if len(searched.images) < 2:
    raise errors.UserError(f"'{model.workdir}' was trained on one image, which has no neighbors",
                           remedy='set <--workdir> to another run', setting='--workdir')
  rows = model.fresh(searched.images)
  watch.check()
  embedding = None if asked.images is None else _embed(model, asked.images, watch)
  found = _search(model.config.seed, rows, asked, embedding, limits, watch)
  sources = [_named(searched.images, found.shown.rows, 'train')]
  if asked.images is not None:
    sources.append(asked.images)
  _write(_content(searched, asked, found, sources), sources, output, watch)
  return len(asked.rows if asked.images is None else asked.images)


def _open(queries, model) -> tuple[_Searched, _Asked]:
  """The images to search, and the queries."""
  if not model.was_trained and queries.folder is not None:
    images, names, _ = folder.load(queries.folder, queries.on_unreadable, setting='--images')
    return (_Searched(f'images in {queries.folder}', images, names),
            _Asked('all images', rows=neighbors.spread(len(images), queries.most)))
  try:
    dataset = model.dataset
  except errors.UserError as e:
    if e.setting != 'dataset.name':
      raise
    raise e.with_remedy('restore the images that the run was trained on') from e
  searched = _Searched(f'{dataset.name}, step {model.step:,}', dataset.train, _class_names(model))
  if queries.folder is not None:
    given, names, _ = folder.load(queries.folder, queries.on_unreadable, setting='--images')
    given = dataclasses.replace(given, labels=_run_labels(given.labels, names, searched.class_names,
                                                          len(given)))
    title = f'images in {queries.folder}'
  elif dataset.test is not None:
    given, title = dataset.test, 'held-out images'
  else:
    rows = neighbors.spread(len(dataset.train), queries.most)
    return searched, _Asked('training images', rows=rows)
  chosen = neighbors.spread(len(given), queries.most)
  return searched, _Asked(title, _named(given, chosen, 'test'))


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
  return [str(c) for c in range(int(max(labels)) + 1)]


def _named(source, chosen, kind):
  """Some of the images, each with a name."""
  part = source.subset(chosen, 'page')
  if part.names is None:
    part = dataclasses.replace(part, names=[f'{kind} {i}' for i in chosen])
  return part


def _embed(model, images, watch) -> Float[np.ndarray, 'q D']:
  parts = []
  try:
    for part in model.embed_all(images):
      parts.append(part)
      watch.check()
  except images_lib.UnreadableImage as e:
    raise e.with_remedy('remove it, or set <--on_unreadable>=skip, or <--images>') from e
  return np.concatenate(parts)


def _search(seed, bank, asked, embedding, limits, watch):
  """The search results that the page shows."""
  k = limits.neighbors
  rows, nearest = neighbors.scan(bank, seed, limits.scanned)
  watch.check()
  threshold = audit.choose_threshold(nearest.similarity[:, 0])
  duplicates = [pair for pair in neighbors.duplicates(rows, nearest, limits.listed)
                if pair[2] >= threshold]
  outliers = neighbors.outliers(rows, nearest, limits.listed)
  others = np.array([pair[:2] for pair in duplicates], int).ravel()
  of_queries = None
  if embedding is not None:
    of_queries = neighbors.of_queries(embedding, bank, k)
    others = np.concatenate([others, of_queries.row.ravel()])
  if len(bank) <= limits.full:
    exact = np.arange(len(bank))
  else:
    exact = np.union1d([row for row, _ in outliers], asked.rows).astype(int)
  shown = neighbors.of_shown(exact, others, bank, k)
  return _Found(shown, of_queries, duplicates, outliers, len(rows))


def _content(searched, asked, found, sources) -> dict[str, Any]:
  """The content of data.js; images are numbered, training images first, then other queries."""
  shown = found.shown
  number = lambda rows: np.searchsorted(shown.rows, rows).tolist()
  nearest, similarity = number(shown.nearest.row), shown.nearest.similarity.tolist()
  queries = number(asked.rows)
  if asked.images is not None:
    queries = list(range(len(shown.rows), len(shown.rows) + len(asked.images)))
    nearest += number(found.queries.row)
    similarity += found.queries.similarity.tolist()
  labels = [np.full(len(source), -1) if source.labels is None else source.labels
            for source in sources]
  return {
      'title': searched.title, 'queried': asked.title,
      'rows': len(searched.images), 'trained': len(shown.rows), 'scanned': found.scanned,
      'restricted': number(shown.restricted),
      'classes': None if searched.class_names is None else list(searched.class_names),
      'names': [name for source in sources for name in source.names],
      'labels': np.concatenate(labels).tolist(), 'queries': queries, 'neighbors': nearest,
      'similarity': [[round(s, 4) for s in line] for line in similarity],
      'duplicates': [[*number([i, j]), round(s, 4)] for i, j, s in found.duplicates],
      'outliers': [[number(i), round(s, 4)] for i, s in found.outliers]}


def _write(content, sources, output, watch):
  """Writes the folder completely or not at all."""
  partial = None
  try:
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
    partial.chmod(0o755)
    (partial / 'images').mkdir()
    _write_thumbnails(sources, partial / 'images', watch)
    (partial / 'data.js').write_text(f'const PAGE = {json.dumps(content)};\n')
    shutil.copyfile(TEMPLATE, partial / 'index.html')
    if output.exists():
      shutil.rmtree(output)
    os.replace(partial, output)
  except OSError as e:
    raise errors.cannot_write(output, e, '--output') from e
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)


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
  """Whether a folder is empty or contains only a page of ours."""
  if path.is_dir() and not any(path.iterdir()):
    return True
  index = path / 'index.html'
  return (index.is_file() and MARK in index.read_text(errors='replace')[:500]
          and {file.name for file in path.iterdir()} <= _FILES)
