"""The Colab notebook: executed from top to bottom at small size, which is slow; its messages."""

import base64
import io
import json
import os
import pathlib

import numpy as np
from PIL import Image
import pytest

from instdisc_jax import experiment
from instdisc_jax.runtime import errors

NOTEBOOK = pathlib.Path(__file__).parents[1] / 'examples' / 'colab_demo.ipynb'


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_and_shows_images(tmp_path, monkeypatch):
  nbclient = pytest.importorskip('nbclient', reason='nbclient is not installed')
  nbformat = pytest.importorskip('nbformat', reason='nbformat is not installed')
  pytest.importorskip('ipykernel', reason='ipykernel is not installed')
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  code = [cell for cell in notebook.cells if cell.cell_type == 'code']
  assert not any(cell.outputs or cell.execution_count for cell in code)  # none are committed
  choice, = [cell for cell in code if "size = 'auto'" in cell.source]
  choice.source = choice.source.replace("size = 'auto'", "size = 'small'")
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  nbclient.NotebookClient(notebook, timeout=500, kernel_name='python3',
                          resources={'metadata': {'path': os.fspath(tmp_path)}}).execute()
  nbformat.write(notebook, tmp_path / 'executed.ipynb')

  outputs = [output for cell in code for output in cell.outputs]
  assert not any(output.output_type == 'error' for output in outputs)
  text = ''.join(output.get('text', '') for output in outputs)
  assert 'Nothing was installed.' in text and 'digits, 6 epochs' in text
  assert 'knn_top1_pixels      0.636' in text and 'embeddings: (10, 128)' in text
  shown = [output.data for output in outputs if 'data' in output]
  images = [Image.open(io.BytesIO(base64.b64decode(data['image/png'])))
            for data in shown if 'image/png' in data]
  assert len(images) == 3  # curves, neighbors, the map of the bank
  assert all(image.width > 400 and np.asarray(image.convert('L')).std() > 10 for image in images)
  assert any('page/index.html' in data.get('text/html', '') for data in shown)
  assert (tmp_path / 'instdisc_demo' / 'digits-small' / 'page' / 'index.html').exists()


def test_each_size_has_its_own_run_and_a_mistake_is_one_line(tmp_path, monkeypatch):
  pytest.importorskip('IPython', reason='ipykernel is not installed')
  monkeypatch.chdir(tmp_path)
  code = [''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text())['cells']]
  choose, = [text for text in code if "size = 'auto'" in text]
  train, = [text for text in code if 'experiment.run' in text]
  workdirs = []

  def run(config, workdir, watch):
    workdirs.append(workdir)
    raise errors.UserError('batch_size is 3', 'a multiple of 2', setting='batch_size')

  monkeypatch.setattr(experiment, 'run', run)
  for size in ('small', 'auto'):
    with pytest.raises(SystemExit) as ended:
      exec(choose.replace("size = 'auto'", f"size = '{size}'") + '\n'
           + train.replace('%matplotlib inline', ''), {})
    assert ended.value.code == 'batch_size is 3, must be a multiple of 2: set --config.batch_size'
  assert workdirs == ['instdisc_demo/digits-small', 'instdisc_demo/digits-auto']
