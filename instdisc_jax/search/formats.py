"""Files of embeddings that other tools open.

    FILE.npz       NumPy: arrays path, embedding and index
    FILE.npy       NumPy: the embeddings, with a table of the rest in FILE.csv
    FILE.parquet   pandas, embedding-atlas, DuckDB, ...: all of it, the map and the neighbors in one
                   table
    FILE.faiss     FAISS: an exact index of cosines, with a table of the rest in FILE.csv
"""

from collections.abc import Mapping
import csv
import dataclasses
import importlib
import io
import os
import pathlib
from typing import Any

from jaxtyping import Float, Int
import numpy as np

from instdisc_jax.runtime import errors, files
from instdisc_jax.search import neighbors, projection

SUFFIXES = ('.npz', '.npy', '.parquet', '.faiss')
_NEEDS = {'.parquet': ('pyarrow', 'pyarrow'), '.faiss': ('faiss', 'faiss-cpu')}  # module, package
_WITH_TABLE = ('.npy', '.faiss')  # of what such a file does not hold
_COLUMNS = ('path', 'index', 'label', 'prediction', 'confidence')
_NEIGHBORS = 15  # of each image in a table, itself among them, as embedding-atlas has it


@dataclasses.dataclass(frozen=True)
class Embedded:
  """Images and their embeddings.

  Attributes:
    path: [n] relative paths.
    embedding: [n, D] float32 unit-norm.
    index: [n] int32, the bank's row of each, or -1.
    label: [n] the class of each, or None.
    prediction: {path: (label, confidence)} for some, see `labeling.read_predictions`.
  """
  path: np.ndarray
  embedding: Float[np.ndarray, 'n D']
  index: Int[np.ndarray, ' n']
  label: list[str] | None = None
  prediction: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)


def check(output: pathlib.Path) -> None:
  """Raises `errors.UserError` if the file cannot be written in its format."""
  errors.check_output(output, SUFFIXES)
  table = output.with_suffix('.csv')
  if output.suffix in _WITH_TABLE and table.exists() and not files.is_table(table, _COLUMNS):
    raise errors.UserError(
        f"'{table}' exists, and '{output}' would replace it", setting='--output',
        remedy='set <--output> to a file of another name')
  if output.suffix in _NEEDS:
    module, package = _NEEDS[output.suffix]
    try:
      importlib.import_module(module)
    except ImportError as e:
      raise errors.UserError(
          f"--output is '{output}', which needs a package that is not installed", None,
          f'run pip install {package}, or set <--output> to a file that ends in .npz',
          '--output') from e


def write(output: pathlib.Path, found: Embedded, scratch: pathlib.Path,
          maps: pathlib.Path | None = None) -> None:
  """Writes a file, completely or not at all, and the table that belongs to it.

  Args:
    output: the file; its suffix, one of `SUFFIXES`, is the format.
    found: what it holds.
    scratch: a folder on the same file system.
    maps: a folder that keeps the map, see `projection.project_once`.
  """
  partial = scratch / f'all{output.suffix}'
  match output.suffix:
    case '.npz':
      np.savez(partial, path=found.path, embedding=found.embedding, index=found.index)
    case '.npy':
      np.save(partial, found.embedding)
    case '.parquet':
      _write_parquet(partial, found, maps)
    case '.faiss':
      faiss: Any = importlib.import_module('faiss')
      index = faiss.IndexFlatIP(found.embedding.shape[1])
      index.add(np.ascontiguousarray(found.embedding, np.float32))
      faiss.write_index(index, str(partial))
  if output.suffix in _WITH_TABLE:
    files.write(output.with_suffix('.csv'), _table(found))
  os.replace(partial, output)


def _table(found):
  """path, index, label and prediction of every row, as CSV."""
  text = io.StringIO()
  lines = csv.writer(text, lineterminator='\n')
  lines.writerow(_COLUMNS)
  labels = found.label or [''] * len(found.path)
  for path, index, label in zip(found.path.tolist(), found.index.tolist(), labels):
    lines.writerow((path, index, label, *found.prediction.get(path, ('', ''))))
  return text.getvalue()


def _write_parquet(file, found, maps):
  pyarrow: Any = importlib.import_module('pyarrow')
  parquet: Any = importlib.import_module('pyarrow.parquet')
  count, dim = found.embedding.shape
  flat = pyarrow.array(np.ascontiguousarray(found.embedding, np.float32).ravel())
  paths = found.path.tolist()
  text = lambda value: value and os.fsencode(value).decode(errors='backslashreplace')
  predicted = [found.prediction.get(path, (None, None)) for path in paths]
  columns = {'path': [text(path) for path in paths], 'index': found.index,
             'label': pyarrow.array([text(label) for label in found.label or [None] * count],
                                    pyarrow.string()),
             'prediction': pyarrow.array([text(label) for label, _ in predicted], pyarrow.string()),
             'confidence': pyarrow.array([value for _, value in predicted], pyarrow.float32()),
             'embedding': pyarrow.FixedSizeListArray.from_arrays(flat, dim)}
  x, y = projection.project_once(found.embedding, 0, maps).T
  columns |= {'x': x, 'y': y, 'neighbors': _neighbors(pyarrow, found.embedding)}
  parquet.write_table(pyarrow.table(columns), file)


def _neighbors(pyarrow, embedding):
  """A column of {'ids', 'distances'}: each row's nearest, itself first, by 1 - cosine."""
  count = len(embedding)
  near = neighbors.search(embedding, None, _NEIGHBORS - 1) if count > 1 else neighbors.Nearest(
      np.zeros((1, 0), np.float32), np.zeros((1, 0), np.int32))
  own = np.arange(count)[:, None]
  ids = np.concatenate([own, near.row], axis=1).astype(np.int32)
  distances = np.concatenate([np.zeros_like(own), np.maximum(1 - near.similarity, 0)], axis=1)
  lists = lambda values: pyarrow.ListArray.from_arrays(
      np.arange(0, values.size + 1, values.shape[1], dtype=np.int32), values.ravel())
  return pyarrow.StructArray.from_arrays([lists(ids), lists(distances.astype(np.float32))],
                                         ['ids', 'distances'])
