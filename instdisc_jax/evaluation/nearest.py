"""The nearest training images of test images, by any features, for any number of both.

The training images are encoded in blocks. The rows of a block are searched on all devices, as a
bank is, and what is found is merged with what the blocks before had. No features are stored.
"""

from collections.abc import Callable, Iterator, Sequence
import math
from typing import Any

import jax
from jaxtyping import Float, Int
import numpy as np

from instdisc_jax import data, linalg
from instdisc_jax.evaluation import embedding, knn
from instdisc_jax.runtime import distributed
from instdisc_jax.runtime import mesh as mesh_lib

SHARE = 0.25  # of the devices' memory that the rows of a block may take
_QUERIES = 2**26  # values of the queries that are searched for at once


def search(engine: embedding.Engine, variables: dict[str, Any], train: data.Images,
           queries: dict[str, Float[np.ndarray, 'Q F']], k: int,
           most_bytes: float | None = None, check: Callable[[], None] = lambda: None,
           own_row: Int[np.ndarray, ' Q'] | None = None
           ) -> dict[str, tuple[Float[np.ndarray, 'Q K'], Int[np.ndarray, 'Q K']]]:
  """The K training images most similar to each test image; every process must call it.

  Args:
    engine: computes the features of the training images.
    variables: the encoder's.
    train: N images.
    queries: {name: [Q, F] features of the test images}, of any norm.
    k: K <= N.
    most_bytes: what the rows of a block may take on a device; by default `SHARE` of its memory.
    check: called between the chunks of images; what it raises ends the search.
    own_row: [Q] the training image that each test image is, which is left out; None if none is.

  Returns:
    {name: (cosine [Q, K], row [Q, K]), the most similar first}, on every process.

  Raises:
    errors.UserError: an image cannot be read.
  """
  if most_bytes is None:
    most_bytes = SHARE * distributed.smallest(mesh_lib.memory(engine.mesh))
  normalize = jax.jit(linalg.normalize, donate_argnums=0)
  width = sum(x.shape[1] for x in queries.values())
  size = block_size(len(train), width, engine.mesh.size, most_bytes)
  bounds = [*range(0, len(train), size), len(train)]
  found: dict[str, list] = {name: [] for name in queries}
  for first, end in zip(bounds, bounds[1:]):
    rows = engine.rows(variables, train.subset(np.arange(first, end), f'{first} to {end}'),
                       tuple(queries), check)
    for name, query in queries.items():
      own = None if own_row is None else np.where(own_row < end, own_row - first, -1)
      similarity, row = among(engine.mesh, normalize(rows.pop(name)), query, k, end - first, own)
      found[name] = [_merged([*found[name], (similarity, first + row)], k)]
  return {name: parts[0] for name, parts in found.items()}


def among(mesh: jax.sharding.Mesh, rows: Float[jax.Array, 'N F'],
          queries: Float[np.ndarray, 'Q F'], k: int, num_rows: int,
          own_row: Int[np.ndarray, ' Q'] | None = None
          ) -> tuple[Float[np.ndarray, 'Q K'], Int[np.ndarray, 'Q K']]:
  """The K most similar of N sharded unit-norm rows (padding not counted), or all if they are fewer.

  With `own_row`, [Q], the row of each query is left out, as if its similarity were -inf; rows
  outside of [0, N) are none.

  Returns:
    (cosine [Q, K], row [Q, K]), on every process.
  """
  program = knn.over_mesh(mesh, min(k, num_rows), num_rows)
  size = queries_at_once(*queries.shape)
  own_row = np.full(len(queries), -1, np.int32) if own_row is None else own_row
  parts = [jax.device_get(program(mesh_lib.replicate(part, mesh), rows, own))
           for part, own in zip(_chunks(linalg.unit(queries), size), _chunks(own_row, size))]
  similarity, row = (np.concatenate(values) for values in zip(*parts))
  return similarity, row


def block_size(num_rows: int, width: int, devices: int, most_bytes: float) -> int:
  """Rows of `width` numbers in a block, of which each device has room for `most_bytes`."""
  blocks = math.ceil(num_rows / (max(1, int(most_bytes / (4 * width))) * devices))
  return math.ceil(num_rows / blocks)


def queries_at_once(count: int, width: int) -> int:
  """How many of the queries are searched for at once."""
  return min(count, max(1, _QUERIES // width))


def _chunks(x, size) -> Iterator[np.ndarray]:
  """Parts of `size` rows; the last one may have fewer."""
  return (x[i:i + size] for i in range(0, len(x), size))


def _merged(parts: Sequence[tuple[np.ndarray, np.ndarray]], k):
  """The k most similar of several searches."""
  similarity, row = (np.concatenate(values, axis=1) for values in zip(*parts))
  best = np.argsort(-similarity, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(similarity, best, axis=1), np.take_along_axis(row, best, axis=1)
