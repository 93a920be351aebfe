"""The figures of a run: its curves, its nearest neighbors, its confusion matrix."""

from collections.abc import Sequence
import io
from typing import Any
import warnings

from jaxtyping import Float, Int
from matplotlib import figure as figure_lib
from matplotlib import patches
import numpy as np

from instdisc_jax import data
from instdisc_jax.runtime import files

QUERIES = 12  # in neighbors.png,
NEIGHBORS = 8  # and neighbors of each
_NAMED = 30  # maximum number of classes whose names fit beside a confusion matrix


def curves(lines: list[dict], summary: dict, batch_size: int) -> figure_lib.Figure:
  """A figure of loss and kNN top-1 over epochs."""
  has_labels = summary['knn_top1'] is not None
  figure = figure_lib.Figure(figsize=(11 if has_labels else 5, 3.6), layout='constrained')
  left, *others = figure.subplots(1, 2 if has_labels else 1, squeeze=False)[0]
  epochs_per_step = batch_size / summary['num_rows']
  epoch = lambda key: [line['step'] * epochs_per_step for line in lines
                       if line.get(key) is not None]
  value = lambda key: [line[key] for line in lines if line.get(key) is not None]
  left.plot(epoch('loss'), value('loss'), color='#1f77b4')
  left.axhline(np.log(summary['num_rows']), color='gray', ls=':', lw=1)
  left.annotate('log N', (1, np.log(summary['num_rows'])), xycoords=('axes fraction', 'data'),
                ha='right', va='bottom', color='gray')
  left.set(xlabel='epoch', ylabel='loss', title=f'{summary["loss"]} loss')
  for right in others:
    right.plot(epoch('knn_top1'), value('knn_top1'), color='#d62728',
               label='bank rows, during training')
    for key, title, style in (('knn_top1', 'recomputed features, at the end', '-'),
                              ('knn_top1_pixels', 'raw pixels', '--'),
                              ('knn_top1_untrained', 'before training', ':')):
      if summary[key] is not None:
        right.axhline(summary[key], color='black', ls=style, lw=1,
                      label=f'{title}: {summary[key]:.3f}')
    right.set(xlabel='epoch', ylabel='kNN top-1', ylim=(0, 1),
              title=f'kNN, {_escaped(summary["dataset"])}, {summary["num_queries"]:,} queries')
    right.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
  for axes in (left, *others):
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
  return figure


def neighbors(dataset: data.Dataset, query_images: data.Images,
              similarity: Float[np.ndarray, 'Q K'], row: Int[np.ndarray, 'Q K'], side: int,
              num_queries: int = QUERIES) -> figure_lib.Figure:
  """A figure of some queries beside their nearest training images, marked as correct or not.

  Args:
    dataset: the run's data.
    query_images: Q images.
    similarity: [Q, K] cosines of the queries and their nearest training images.
    row: [Q, K] those images.
    side: side in pixels of the central views shown for images in files.
    num_queries: number of queries shown, evenly spaced.
  """
  queries = np.linspace(0, len(row) - 1, min(num_queries, len(row))).astype(int)
  shown = min(NEIGHBORS, row.shape[1])
  names = dataset.class_names
  name = lambda label: str(label) if names is None else _escaped(names[label][:10])
  height, apart = 1.25, 0.25  # of a row of images, each 1 by 1; the query is set apart
  # A single Axes for all images: one per image would cost matplotlib seconds.
  figure = figure_lib.Figure(layout='constrained', figsize=(
      0.85 * (1.08 * (shown + 1) + apart), 0.85 * height * len(queries) + 0.3))
  axes = figure.subplots()
  for line, query in enumerate(queries):
    images = [_to_look_at(query_images, query, side),
              *(_to_look_at(dataset.train, i, side) for i in row[query, :shown])]
    labels: list[Any] = [None] * len(images)
    if query_images.labels is not None and dataset.train.labels is not None:
      labels = [query_images.labels[query], *dataset.train.labels[row[query, :shown]]]
    for i, (image, label) in enumerate(zip(images, labels)):
      x, y = 1.08 * i + (apart if i else 0), height * line
      half = np.array(image.shape[:2]) / max(image.shape[:2]) / 2
      left, right, top, bottom = x - half[1], x + half[1], y - half[0], y + half[0]
      axes.imshow(image, interpolation='nearest', extent=(left, right, bottom, top))
      words = [] if i == 0 else [f'{similarity[query, i - 1]:.2f}']
      color, width = 'black', 1.0
      if label is not None:
        words.append(name(label))
        if i > 0:
          same = label == labels[0]
          words[0] = ('✓ ' if same else '✗ ') + words[0]
          color, width = '#2ca02c' if same else '#d62728', 2.0
      axes.text(x, top - 0.04, ' '.join(words), fontsize=6, color=color, ha='center')
      axes.add_patch(patches.Rectangle((left, top), right - left, bottom - top, fill=False,
                                       color=color, linewidth=width))
  axes.set(xlim=(-0.54, 1.08 * shown + apart + 0.54), ylim=(height * len(queries) - 0.5, -0.8))
  axes.axis('off')
  figure.suptitle('query, and its nearest training images with their cosines', x=0.01, ha='left',
                  fontsize=9)
  return figure


def _to_look_at(images, i, side):
  """The full image i if it is in memory, else its central view."""
  return images.full(i) if isinstance(images.files, np.ndarray) else images.central(i, side)


def confusion(counts: Int[np.ndarray, 'C C'], class_names: Sequence[str],
              dataset: str) -> figure_lib.Figure:
  """A figure of the confusion matrix.

  Args:
    counts: [C, C] int, true class by predicted class.
    class_names: the C names.
    dataset: name of the data set.
  """
  named = len(class_names) <= _NAMED
  figure = figure_lib.Figure(figsize=(8, 7), layout='constrained')
  axes = figure.subplots()
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  drawn = axes.imshow(share, cmap='Blues', vmin=0, vmax=1)
  figure.colorbar(drawn, label='share of the class')
  axes.set(xlabel='predicted', ylabel='true',
           title=f'{_escaped(dataset)}: top-1 {np.trace(counts) / counts.sum():.3f}')
  if named:
    names = [_escaped(name[:12]) for name in class_names]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for i, j in zip(*np.nonzero(counts)):
      axes.text(j, i, str(counts[i, j]), ha='center', va='center', fontsize=7,
                color='white' if share[i, j] > 0.5 else 'black')
  return figure


def printable(name: str) -> str:
  """A name with each undecodable byte replaced by a question mark."""
  return name.encode('utf8', 'replace').decode('utf8')


def _escaped(name):
  """A name for matplotlib, which would typeset text between two dollar signs as math."""
  return printable(name).replace('$', r'\$')


def save(figure: figure_lib.Figure, path: files.Place) -> None:
  """Writes a figure as PNG."""
  png = io.BytesIO()
  with warnings.catch_warnings():  # characters that no font has become boxes
    warnings.filterwarnings('ignore', message='Glyph .* missing')
    figure.savefig(png, dpi=110)
  files.write(path, png.getvalue())
