"""What a run shows for itself: kNN accuracy during and after it, summary.json, and two pictures."""

import hashlib
import io
import json
import warnings

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib import figure as figure_lib
from matplotlib import patches
import numpy as np
from rich import table as rich_table

from instdisc_jax import distributed, files, train
from instdisc_jax import metrics as metrics_lib
from instdisc_jax.data import decode, resident, stream
from instdisc_jax.evaluation import features, knn

SUMMARY = 'summary.json'
_PICTURED = 12  # queries in neighbors.png
_NAMED = 30  # classes whose names fit beside a confusion matrix
_SHOWN = 8  # neighbours of each
_PIXEL_SIDE, _PIXEL_CHUNK = 32, 256  # of streamed pictures, for the kNN of raw pixels
_MOST_PIXEL_ROWS = 200_000  # which takes 12 KiB for each


class Evaluator:
  """kNN of a data set's held-out pictures against its training pictures.

  Where there are no held-out pictures the training pictures themselves are the queries, each with
  its own row left out. Without labels there is no accuracy, only neighbours.

  Args:
    config: the run's configuration.
    dataset: a `data.Dataset`.
    encoder: a Linen module.
    mesh: the device mesh.
    feed: see `train.make_feed`.
    watch: a `preemption.Watch`, asked between the calls of the encoder.
  """

  def __init__(self, config, dataset, encoder, mesh, feed, watch):
    self._config, self._train, self._mesh = config, dataset.train, mesh
    self.num_rows, self.num_devices = len(dataset.train), mesh.size
    self.own_row, self.queries = None, dataset.test
    if dataset.test is None:
      self.queries = dataset.train
      self.own_row = np.arange(self.num_rows, dtype=np.int32)
    self.has_labels = dataset.train.labels is not None and self.queries.labels is not None
    size = train.view_size(config, dataset.train.shape)
    self._side, self._watch = size[0], watch
    self._workers = stream.workers(config.dataset.workers)
    on_device = lambda pictures: resident.on_every_device(pictures.whole(), mesh)
    if feed.resident:
      self._train_images = feed.images
      self._query_images = feed.images if self.own_row is not None else on_device(self.queries)
    else:
      self._train_images = stream.Views(dataset.train, mesh, self._side, self._workers)
      self._query_images = stream.Views(self.queries, mesh, self._side, self._workers)
    self._embed = features.make_embed(encoder, mesh, config.augment.mean, config.augment.std, size,
                                      between_calls=watch.check)
    k = min(max(config.knn.neighbors, _SHOWN), self.num_rows - (self.own_row is not None))
    self._nearest = knn.map_over_mesh(mesh, k, self.num_rows, config.knn.recall_target)
    self._exact = knn.map_over_mesh(mesh, k, self.num_rows)

  def embed(self, state, pictures):
    """Embeddings [n, D] of any pictures of the kind that the run trains on."""
    if not len(pictures):
      return np.zeros((0, state.bank.shape[1]), np.float32)
    images = (resident.on_every_device(pictures.whole(), self._mesh) if self._in_memory()
              else stream.Views(pictures, self._mesh, self._side, self._workers))
    return self._embed(state, images)

  def from_bank(self, state):
    """kNN top-1 of the queries against the bank as it stands, or None without labels."""
    if not self.has_labels:
      return None
    return self._top1(*self._search(self._embed(state, self._query_images), state.bank))

  def recomputed(self, state):
    """Neighbours against fresh features of all training pictures: (top-1 or None, rows [Q, K])."""
    rows = self._embed(state, self._train_images)
    queries = rows if self.own_row is not None else self._embed(state, self._query_images)
    found = self._search(queries, self._shard(rows))
    return self._top1(*found), found[1]

  def pixels(self):
    """kNN top-1 with mean-centred raw pixels in the place of features; None without labels.

    Of streamed pictures these are the pixels of views of 32 x 32; None for very many of them.
    """
    if not self.has_labels or (not self._in_memory() and self.num_rows > _MOST_PIXEL_ROWS):
      return None
    flat = self._pixels(self._train)
    mean = flat.mean(axis=0)
    queries = flat if self.own_row is not None else self._pixels(self.queries)
    return self._top1(*self._search(knn.unit(queries - mean), self._shard(knn.unit(flat - mean))))

  def picture(self, pictures, i):
    """[H, W, 3] uint8 of a picture, to look at."""
    return decode.decode(pictures.files[i]) if self._in_memory() else pictures.centre(i, self._side)

  def _in_memory(self):
    return not isinstance(self._train_images, stream.Views)

  def _pixels(self, pictures):
    if self._in_memory():
      pixels = pictures.whole()
    else:
      views = stream.Views(pictures, self._mesh, _PIXEL_SIDE, self._workers)
      chunks = []
      for chunk in views.chunks(_PIXEL_CHUNK):
        chunks.append(distributed.gather(chunk))
        self._watch.check()
      pixels = np.concatenate(chunks)[:len(pictures)]
    return pixels.reshape(len(pictures), -1).astype(np.float32)

  def recall(self, state):
    """Share of the exact neighbours that the approximate search finds; None where none is used."""
    if self._config.knn.recall_target is None:
      return None
    queries = self._embed(state, self._query_images)
    found, exact = (self._search(queries, state.bank, search)[1]
                    for search in (self._nearest, self._exact))
    return knn.recall(found, exact)

  def _search(self, queries, bank, search=None):
    own_row = np.full(len(queries), -1, np.int32) if self.own_row is None else self.own_row
    return jax.device_get((search or self._nearest)(queries, bank, own_row))

  def _shard(self, rows):
    padded = np.pad(rows, ((0, -len(rows) % self._mesh.size), (0, 0)))
    return jax.make_array_from_callback(
        padded.shape, NamedSharding(self._mesh, P(train.AXIS)), lambda part: padded[part])

  def _top1(self, similarity, row):
    if not self.has_labels:
      return None
    k = self._config.knn.neighbors
    return knn.top1(similarity[:, :k], row[:, :k], self._train.labels, self.queries.labels,
                    self._config.knn.temperature)


def finish(workdir, state, untrained, evaluator, config, dataset, fitted, wall_clock):
  """Evaluates a trained state and writes summary.json, curves.png and neighbors.png.

  Args:
    workdir: the run's folder.
    state: the trained `TrainState`.
    untrained: the state that the run started from.
    evaluator: an `Evaluator`.
    config: the run's configuration.
    dataset: a `data.Dataset`.
    fitted: `train.Fitted`, what the loop measured.
    wall_clock: () -> seconds since the run began.

  Returns:
    The summary, a dict.
  """
  lines = metrics_lib.read(workdir)
  steps = [line['step_loss'] for line in lines if 'step_loss' in line]
  top1, row = evaluator.recomputed(state)
  summary = {
      'dataset': dataset.name,
      'num_rows': evaluator.num_rows,
      'num_queries': len(evaluator.queries),
      'num_devices': evaluator.num_devices,
      'steps': int(state.step),
      'final_loss': steps[-1] if steps else None,  # weights from elsewhere, no step taken
      'loss': config.loss.name,
      'knn_neighbors': config.knn.neighbors,
      'knn_temperature': config.knn.temperature,
      'knn_recall': evaluator.recall(state),
      'knn_top1': top1,
      'knn_top1_bank': evaluator.from_bank(state),
      'knn_top1_untrained': evaluator.recomputed(untrained)[0],
      'knn_top1_pixels': evaluator.pixels(),
      'images_per_second': fitted.images_per_second,
      'params_digest': digest(jax.tree.leaves(jax.device_get((state.params, state.batch_stats)))),
      'bank_digest': digest([distributed.gather(state.bank)[:evaluator.num_rows]]),
      'normalizer': float(state.normalizer) or None,
      'wall_seconds': wall_clock(),
  }
  if jax.process_index() != 0:
    return summary
  workdir = files.place(workdir)
  save_picture(curves(lines, summary, config.batch_size), workdir / 'curves.png')
  save_picture(neighbors(evaluator, dataset, row), workdir / 'neighbors.png')
  files.write(workdir / SUMMARY, json.dumps(summary, indent=2) + '\n')
  return summary


def show(summary, workdir, console):
  """Prints a summary as a table."""
  table = rich_table.Table(
      title=f'{summary["dataset"]}: kNN top-1, K = {summary["knn_neighbors"]}, '
            f'τ = {summary["knn_temperature"]}')
  table.add_column('features')
  table.add_column('top-1', justify='right')
  for title, key in (('raw pixels, mean-centred', 'knn_top1_pixels'),
                     ('untrained encoder', 'knn_top1_untrained'),
                     ('trained encoder', 'knn_top1'),
                     ('trained encoder, against bank rows', 'knn_top1_bank')):
    value = summary[key]
    table.add_row(title, '–' if value is None else f'{value:.3f}')
  if summary['knn_top1'] is not None:
    console.print(table)
  if summary['knn_recall'] is not None:
    console.print(f'approximate search: recall {summary["knn_recall"]:.4f}', markup=False)
  if summary['knn_top1'] is None:
    console.print('no kNN accuracy: the pictures have no labels to compare; neighbors.png shows '
                  'who is near whom', markup=False)
  speed = summary['images_per_second']
  loss = summary['final_loss']
  console.print(f'{summary["steps"]} steps' + ('' if loss is None else f', final loss {loss:.3f}')
                + (f', {speed:,.0f} images/s' if speed else '')
                + f', {summary["wall_seconds"]:.0f} s', markup=False)
  console.print(f'{workdir}: {SUMMARY}, {metrics_lib.FILE}, curves.png, neighbors.png',
                markup=False)


def curves(lines, summary, batch_size):
  """A figure of loss and kNN top-1 over epochs."""
  figure = figure_lib.Figure(figsize=(10, 3.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  epochs_per_step = batch_size / summary['num_rows']
  epoch = lambda key: [line['step'] * epochs_per_step for line in lines
                       if line.get(key) is not None]
  value = lambda key: [line[key] for line in lines if line.get(key) is not None]
  left.plot(epoch('loss'), value('loss'), color='#1f77b4')
  left.axhline(np.log(summary['num_rows']), color='gray', ls=':', lw=1)
  left.annotate('log N', (1, np.log(summary['num_rows'])), xycoords=('axes fraction', 'data'),
                ha='right', va='bottom', color='gray')
  left.set(xlabel='epoch', ylabel='loss', title=f'{summary["loss"]} loss')
  right.plot(epoch('knn_top1'), value('knn_top1'), color='#d62728', label='bank rows, in training')
  for key, title, style in (('knn_top1', 'recomputed, at the end', '-'),
                            ('knn_top1_pixels', 'raw pixels', '--'),
                            ('knn_top1_untrained', 'untrained', ':')):
    if summary[key] is not None:
      right.axhline(summary[key], color='black', ls=style, lw=1,
                    label=f'{title}: {summary[key]:.3f}')
  right.set(xlabel='epoch', ylabel='kNN top-1', ylim=(0, 1),
            title=f'kNN, {_drawn(summary["dataset"])}')
  if summary['knn_top1'] is not None:
    right.legend(fontsize=8, loc='lower right')
  else:
    right.text(0.5, 0.5, 'no labels', transform=right.transAxes, ha='center', color='gray')
  for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
  return figure


def neighbors(evaluator, dataset, row):
  """A figure of a dozen queries beside their nearest training pictures, right and wrong marked."""
  queries = np.linspace(0, len(row) - 1, min(_PICTURED, len(row))).astype(int)
  shown = min(_SHOWN, row.shape[1])
  name = lambda label: (_drawn(dataset.class_names[label][:12]) if dataset.class_names
                        else str(label))
  height = 1.25  # of a line, whose pictures are 1 by 1
  # One pair of axes for all: matplotlib needs seconds for one a picture.
  figure = figure_lib.Figure(layout='constrained', figsize=(
      0.85 * 1.08 * (shown + 1), 0.85 * height * len(queries) + 0.3))
  axes = figure.subplots()
  for line, query in enumerate(queries):
    pictures = [evaluator.picture(evaluator.queries, query),
                *(evaluator.picture(dataset.train, i) for i in row[query, :shown])]
    labels = [None] * len(pictures)
    if evaluator.has_labels:
      labels = [evaluator.queries.labels[query], *dataset.train.labels[row[query, :shown]]]
    for i, (picture, label) in enumerate(zip(pictures, labels)):
      x, y = 1.08 * i, height * line
      half = np.array(picture.shape[:2]) / max(picture.shape[:2]) / 2
      left, right, top, bottom = x - half[1], x + half[1], y - half[0], y + half[0]
      axes.imshow(picture, interpolation='nearest', extent=(left, right, bottom, top))
      if label is None:
        continue
      same = label == labels[0]
      color = 'black' if i == 0 else '#2ca02c' if same else '#d62728'
      mark = '' if i == 0 else '✓ ' if same else '✗ '
      axes.text(x, top - 0.04, mark + name(label), fontsize=7, color=color, ha='center')
      axes.add_patch(patches.Rectangle((left, top), right - left, bottom - top, fill=False,
                                       color=color, linewidth=1 if i == 0 else 2))
  axes.set(xlim=(-0.54, 1.08 * shown + 0.54), ylim=(height * len(queries) - 0.5, -0.8))
  axes.axis('off')
  figure.suptitle('query, and its nearest training images', x=0.01, ha='left', fontsize=9)
  return figure


def confusion(counts, class_names, dataset):
  """A figure of how often pictures of each class were taken for which.

  Args:
    counts: [C, C] int, true class by predicted class.
    class_names: C of them.
    dataset: the name of the data set.
  """
  named = len(class_names) <= _NAMED
  figure = figure_lib.Figure(figsize=(8, 7), layout='constrained')
  axes = figure.subplots()
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  drawn = axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
  figure.colorbar(drawn, label='share of the class')
  axes.set(xlabel='predicted', ylabel='true',
           title=f'{_drawn(dataset)}: top-1 {np.trace(counts) / counts.sum():.3f}')
  if named:
    names = [_drawn(name[:12]) for name in class_names]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for i, j in zip(*np.nonzero(counts)):
      axes.text(j, i, counts[i, j], ha='center', va='center', fontsize=7,
                color='white' if share[i, j] > 0.5 else 'black')
  return figure


def printable(name):
  """A name, with a question mark for each byte of it that is no text."""
  return name.encode('utf8', 'replace').decode('utf8')


def _drawn(name):
  """A name for matplotlib, which would read what stands between two dollars as mathematics."""
  return printable(name).replace('$', r'\$')


def save_picture(figure, path):
  """Writes a figure as PNG."""
  png = io.BytesIO()
  with warnings.catch_warnings():  # class names in letters that no font here has: boxes
    warnings.filterwarnings('ignore', message='Glyph .* missing')
    figure.savefig(png, dpi=110)
  files.write(path, png.getvalue())


def digest(arrays):
  """SHA-256 of the bytes of arrays, one after the other, in hexadecimal."""
  result = hashlib.sha256()
  for array in arrays:
    result.update(np.ascontiguousarray(array).tobytes())
  return result.hexdigest()
