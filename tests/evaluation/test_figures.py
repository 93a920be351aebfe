import subprocess
import sys

import numpy as np

from instdisc_jax.evaluation import figures


def test_a_class_name_that_looks_like_a_formula_or_is_not_text_is_drawn(tmp_path):
  names = ('$5_$10', 'caf\udcff')
  figures.save(figures.confusion(np.array([[3, 1], [0, 2]]), names, 'folder:$x_$y'),
               tmp_path / 'confusion.png')
  assert (tmp_path / 'confusion.png').stat().st_size > 5_000
  figure = figures.confusion(np.array([[3, 1], [0, 2]]), names, 'folder:$x_$y')
  names_drawn = [text.get_text() for text in figure.axes[0].get_xticklabels()]
  assert names_drawn == [r'\$5_\$10', 'caf?']


def test_matplotlib_is_left_as_a_notebook_has_set_it():
  code = ('import sys, matplotlib; before = dict(matplotlib.rcParams); '
          'from instdisc_jax import inference, reproduce; '
          'sys.exit(dict(matplotlib.rcParams) != before)')
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
