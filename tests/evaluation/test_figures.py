import subprocess
import sys

import numpy as np
import pytest

from instdisc_jax import data
from instdisc_jax.data import images as images_lib
from instdisc_jax.evaluation import figures


def test_a_class_name_that_looks_like_a_formula_or_is_not_text_is_drawn(tmp_path):
  names = ('$5_$10', 'caf\udcff')
  figures.save(figures.confusion(np.array([[3, 1], [0, 2]]), names, 'folder:$x_$y'),
               tmp_path / 'confusion.png')
  assert (tmp_path / 'confusion.png').stat().st_size > 5_000
  figure = figures.confusion(np.array([[3, 1], [0, 2]]), names, 'folder:$x_$y')
  names_drawn = [text.get_text() for text in figure.axes[0].get_xticklabels()]
  assert names_drawn == [r'\$5_\$10', 'caf?']


def _dataset(labels):
  images = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), np.uint8)
  return data.Dataset('some', images_lib.Images(images, labels, 'some'))


def test_neighbors_tell_their_cosines_and_the_query_is_set_apart(tmp_path):
  dataset = _dataset(np.array([0, 1, 0, 1, 0, 1]))
  row, similarity = np.array([[2, 1]] * 6), np.array([[0.875, 0.5]] * 6)
  figure = figures.neighbors(dataset, dataset.train, similarity, row, 8)
  texts = [text.get_text() for text in figure.axes[0].texts]
  assert texts[:3] == ['0', '✓ 0.88 0', '✗ 0.50 1'] and len(texts) == 18
  left = [image.get_extent()[0] for image in figure.axes[0].images[:3]]
  assert left[1] - left[0] > left[2] - left[1] + 0.2
  figures.save(figure, tmp_path / 'neighbors.png')
  unlabeled = _dataset(None)
  figure = figures.neighbors(unlabeled, unlabeled.train, similarity, row, 8)
  assert [text.get_text() for text in figure.axes[0].texts][:3] == ['', '0.88', '0.50']


@pytest.mark.parametrize('top1, plots', [(0.5, 2), (None, 1)])
def test_without_labels_the_curves_have_no_empty_plot(top1, plots):
  summary = {'num_rows': 10, 'num_queries': 10, 'loss': 'softmax', 'dataset': 'some',
             'knn_top1': top1, 'knn_top1_pixels': None, 'knn_top1_untrained': top1}
  figure = figures.curves([{'step': 1, 'loss': 2.0, 'knn_top1': top1}], summary, 5)
  assert len(figure.axes) == plots


def test_matplotlib_is_left_as_a_notebook_has_set_it():
  code = ('import sys, matplotlib; before = dict(matplotlib.rcParams); '
          'from instdisc_jax import inference, reproduce; '
          'sys.exit(dict(matplotlib.rcParams) != before)')
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
