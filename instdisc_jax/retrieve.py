"""A web page of what an encoder finds alike: queries beside their nearest training pictures.

One folder, opened from disk, without a server. A click on any picture makes it the query; other
tabs show the pairs that are nearly the same picture, and the pictures that are like no other.
"""

import argparse
import concurrent.futures
import json
import logging
import os
import pathlib
import shutil
import sys
import tempfile

import numpy as np
from PIL import Image

from instdisc_jax import checkpoint, errors, inference, preemption
from instdisc_jax.data import decode, folder, pictures
from instdisc_jax.evaluation import knn

NEIGHBORS = 20  # of each picture
_QUERIES = 1000
_WHOLE = 5000  # up to so many training pictures all are on the page, else those that it shows
_SCANNED = 50_000  # training pictures that are looked at for duplicates and outliers
_LISTED = 200  # of either
_CROWD = 5  # an outlier is far from its so many nearest
_SIDE = 128  # of a picture on the page, in pixels, the longer one
_TEMPLATE = pathlib.Path(__file__).with_suffix('.html')
_MARK = '<meta name="generator" content="instdisc_jax.retrieve">'  # what shows a folder to be ours


def build(model, output, watch, images=None, num_queries=_QUERIES, on_unreadable='error'):
  """Makes the page.

  Similarities are cosines between a query's fresh embedding and rows of the memory bank; of a
  training picture, between its own row and the others.

  Args:
    model: `inference.Model`.
    output: the folder to make: index.html, data.js and pictures/.
    watch: a `preemption.Watch`, asked now and then.
    images: a folder of pictures to ask about; by default the held-out pictures of the run's data,
      or, where there are none, the training pictures.
    num_queries: most of them, evenly spread.
    on_unreadable: see `folder.load`, for `images`.

  Returns:
    How many queries there are.

  Raises:
    errors.UserError: there is no bank, the data are gone, or a picture can't be read.
    errors.Stopped: a signal came; nothing is left behind.
  """
  trained, bank = model.dataset.train, model.bank
  if bank is None:
    raise errors.UserError(f"'{model.workdir}' has weights but no bank: train on it first")
  if len(trained) < 2:
    raise errors.UserError(f"'{model.workdir}' was trained on one picture, which has no neighbours")
  queries, titles = model.dataset.test, 'held-out pictures'
  class_names = _class_names(model)
  if images is not None:
    queries, names, _ = folder.load(images, on_unreadable, setting='set --images=FOLDER')
    queries, titles = _relabelled(queries, names, class_names), f'pictures of {images}'

  closest, scanned = _scan(bank, model.config.seed)
  watch.check()
  pairs, alone = _duplicates(*closest, scanned), _outliers(closest[0], scanned)
  exact = np.array([i for i, _ in alone])  # training pictures searched for in the whole bank
  rows = [exact, [i for pair in pairs for i in pair[:2]]]  # those that the page shows
  if queries is None:
    asked, titles = _spread(len(trained), num_queries), 'training pictures'
    exact = np.union1d(exact, asked)
  else:
    asked = _spread(len(queries), num_queries)
    query_names, queries = _names(queries, asked, 'test'), queries.subset(asked, 'queries')
    embedding = _embed(model, queries, watch)
    similarity, row = map(np.asarray, knn.nearest(embedding, bank, k=min(NEIGHBORS, len(bank))))
    rows.append(row.ravel())
  if len(trained) <= _WHOLE:
    exact = np.arange(len(trained))
  own_similarity, own_row = map(np.asarray, knn.nearest(
      bank[exact], bank, exact, k=min(NEIGHBORS, len(bank) - 1)))
  shown = np.unique(np.concatenate([exact, own_row.ravel(), *rows]).astype(int))
  others = np.setdiff1d(shown, exact)  # their neighbours are found among those shown
  other_similarity, other_row = (np.zeros((0, 1)),) * 2
  if len(others):
    other_similarity, other_row = map(np.asarray, knn.nearest(
        bank[others], bank[shown], np.searchsorted(shown, others),
        k=min(NEIGHBORS, len(shown) - 1)))

  # On the page the training pictures come first, then the queries that are none of them.
  place = {int(row): i for i, row in enumerate(shown)}
  found = {int(i): ([place[int(j)] for j in line], values.tolist())
           for i, line, values in zip(exact, own_row, own_similarity)}
  found |= {int(i): (line.tolist(), values.tolist())
            for i, line, values in zip(others, other_row, other_similarity)}
  neighbors, similarities = map(list, zip(*(found[int(i)] for i in shown)))
  sources, names = [trained.subset(shown, 'page')], _names(trained, shown, 'train')
  if queries is None:
    ids = [place[int(i)] for i in asked]
  else:
    ids = list(range(len(shown), len(shown) + len(queries)))
    neighbors += [[place[int(i)] for i in line] for line in row]
    similarities += similarity.tolist()
    sources.append(queries)
    names += query_names
  page = {
      'title': f'{model.dataset.name}, step {model.step:,}', 'queried': titles,
      'rows': len(trained), 'trained': len(shown), 'scanned': len(scanned),
      'restricted': [place[int(i)] for i in others], 'classes': class_names, 'names': names,
      'labels': np.concatenate([np.full(len(source), -1) if source.labels is None
                                else source.labels for source in sources]).tolist(),
      'queries': ids, 'neighbors': neighbors,
      'similarity': [[round(s, 4) for s in line] for line in similarities],
      'duplicates': [[place[i], place[j], round(s, 4)] for i, j, s in pairs],
      'outliers': [[place[i], round(s, 4)] for i, s in alone]}
  _write(page, sources, pathlib.Path(output), watch)
  return len(ids)


def _class_names(model):
  """The classes' names, or None."""
  if model.class_names is not None:
    return list(model.class_names)
  if model.labels is None:
    return None
  labels = [source.labels.max() for source in (model.dataset.train, model.dataset.test)
            if source is not None and source.labels is not None]
  return [str(c) for c in range(int(max(labels)) + 1)]


def _relabelled(queries, names, class_names):
  """`queries` with the labels of the run's classes where the names agree, -1 elsewhere."""
  labels = np.full(len(queries), -1, np.int32)
  if queries.labels is not None and class_names is not None:
    number = {name: i for i, name in enumerate(class_names)}
    labels = np.array([number.get(name, -1) for name in names], np.int32)[queries.labels]
  return pictures.Pictures(queries.files, labels, queries.fingerprint, queries.names)


def _embed(model, queries, watch):
  chunks = []
  try:
    for chunk in model.embed_all(queries):
      chunks.append(chunk)
      watch.check()
  except inference.Unreadable as e:
    raise errors.UserError(f'{e}: remove it, or set --on_unreadable=skip, or --images') from e
  return np.concatenate(chunks)


def _spread(n, most):
  """Up to `most` of 0..n-1, evenly spread."""
  return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _scan(bank, seed):
  """((similarity [n, k], row [n, k]) of the nearest others, the n rows looked at)."""
  order = np.arange(len(bank))
  if len(order) > _SCANNED:
    order = np.sort(np.random.RandomState(seed).permutation(len(bank))[:_SCANNED])
  found = knn.nearest(bank[order], bank, order, k=min(_CROWD, len(bank) - 1))
  return tuple(map(np.asarray, found)), order


def _duplicates(similarity, row, order):
  """[(row, row, similarity)] of the pairs that are most alike, each once."""
  best = {}
  for i, others, values in zip(order, row, similarity):
    for j, value in zip(others, values):
      best[min(int(i), int(j)), max(int(i), int(j))] = float(value)
  return [(*pair, best[pair]) for pair in sorted(best, key=best.get, reverse=True)[:_LISTED]]


def _outliers(similarity, order):
  """[(row, mean similarity to its nearest)] of the pictures that are farthest from any other."""
  mean = similarity.mean(axis=1)
  return [(int(order[i]), float(mean[i])) for i in np.argsort(mean, kind='stable')[:_LISTED]]


def _names(source, chosen, kind):
  return [f'{kind} {i}' if source.names is None else source.names[i] for i in chosen]


def _write(page, sources, output, watch):
  """The folder, whole or not at all; an earlier page of that name is replaced."""
  partial = None
  try:
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f'.{output.name}.', dir=output.parent))
    partial.chmod(0o755)
    (partial / 'pictures').mkdir()
    _write_pictures(sources, partial / 'pictures', watch)
    (partial / 'data.js').write_text(f'const PAGE = {json.dumps(page)};\n')
    shutil.copyfile(_TEMPLATE, partial / 'index.html')
    if output.exists():
      shutil.rmtree(output)
    os.replace(partial, output)
  except OSError as e:
    if errors.is_no_space(e):
      raise
    raise errors.UserError(f"'{output}' can't be written ({e.strerror or e}): set --output to a "
                           'place that can') from e
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)


def _write_pictures(sources, place, watch):
  """One small picture each, numbered through."""
  todo = [(source, i) for source in sources for i in range(len(source))]

  def write(number):
    source, i = todo[number]
    try:
      picture = Image.fromarray(decode.decode(source.files[i]))
    except (OSError, decode.UnreadableError) as e:
      reason = getattr(e, 'strerror', None) or e
      raise errors.UserError(f'{source.name(i)} {reason}: put it back as it was, or set --images '
                             'to a folder without it') from e
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(place / f'{number}.webp', quality=80, lossless=max(picture.size) <= 64)

  with (concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        pictures.progress('writing pictures') as progress):
    for _ in progress.track(pool.map(write, range(len(todo))), len(todo)):
      watch.check()


def main(argv=None):
  """The command; returns its exit code: 0, 2 (a user's mistake), 75 (stopped)."""
  def command():
    parser = argparse.ArgumentParser(
        prog='python -m instdisc_jax.retrieve', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s --workdir=DIR --output=FOLDER [--images=FOLDER] [--queries=N]')
    parser.error = lambda message: errors.raise_user_error(f'{message}: see --help')
    parser.add_argument('--workdir', required=True, metavar='DIR', help='of a run')
    parser.add_argument('--output', required=True, metavar='FOLDER',
                        help='what is made; open its index.html')
    parser.add_argument('--images', metavar='FOLDER',
                        help='pictures to ask about (default: those held out from training)')
    parser.add_argument('--queries', type=int, default=_QUERIES, metavar='N',
                        help=f'most of them that are shown (default: {_QUERIES})')
    parser.add_argument('--on_unreadable', choices=('error', 'skip'), default='error',
                        help='what becomes of files of --images that give no picture')
    args = parser.parse_args(argv)
    output = pathlib.Path(args.output).resolve()
    errors.check_place(output)
    if output.exists() and not _is_page(output):
      raise errors.UserError(f"'{args.output}' exists and is more than a page of this command: set "
                             '--output to a new folder')
    if args.queries < 1:
      raise errors.UserError(f'--queries is {args.queries}, must be at least 1: set --queries')
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax reports all it does
    checkpoint.leave_errors_to_orbax()
    with preemption.Watch() as watch:
      count = build(inference.load(args.workdir), output, watch, args.images, args.queries,
                    args.on_unreadable)
    print(f'{output / "index.html"}: {count} queries')

  return errors.exit_code(command)


def _is_page(path):
  """Whether a folder is empty, or a page of ours that holds nothing else."""
  if path.is_dir() and not any(path.iterdir()):
    return True
  index = path / 'index.html'
  return (index.is_file() and _MARK in index.read_text(errors='replace')[:500]
          and {file.name for file in path.iterdir()} <= {'index.html', 'data.js', 'pictures'})


if __name__ == '__main__':
  sys.exit(main())
