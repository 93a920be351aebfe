import numpy as np
import pytest

from instdisc_jax.evaluation import embedding, nearest
from instdisc_jax.runtime import mesh as mesh_lib

NAMES = embedding.EMBEDDING, 'pooled'


def _check(found, rows, queries, k):
  """Those found are K different rows, with the K highest cosines in order, up to ties."""
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosine = unit(queries.astype(np.float64)) @ unit(rows.astype(np.float64)).T
  highest = -np.sort(-cosine, axis=1)[:, :k]
  similarity, row = found
  np.testing.assert_allclose(similarity, highest, atol=1e-6)
  np.testing.assert_allclose(np.take_along_axis(cosine, row, axis=1), highest, atol=1e-6)
  assert all(len(set(one)) == min(k, len(rows)) for one in row.tolist())


@pytest.mark.parametrize('rows_per_device', [1000, 5, 1])  # blocks of 128, 32 and 8 of 128 rows
def test_blocks_find_what_one_search_of_all_finds(sets, rows_per_device):
  engine, variables = sets.model.engine, sets.model.variables
  features = lambda images: {name: np.concatenate(parts) for name, parts in zip(NAMES, zip(*(
      [part[name] for name in NAMES] for part in engine.run(variables, images, NAMES))))}
  queries, train = features(sets.test_images), features(sets.train_images)
  width = sum(x.shape[1] for x in queries.values())
  found = nearest.search(engine, variables, sets.train_images, queries, 20,
                         most_bytes=4 * width * rows_per_device)
  for name in NAMES:
    _check(found[name], train[name], queries[name], 20)


def test_queries_in_parts_find_the_same(sets, monkeypatch):
  mesh = sets.model.engine.mesh
  random = np.random.RandomState(0)
  rows = random.standard_normal((50, 8)).astype(np.float32)
  rows /= np.linalg.norm(rows, axis=1, keepdims=True)
  queries = random.standard_normal((21, 8)).astype(np.float32)
  monkeypatch.setattr(nearest, '_QUERIES', 40)  # five queries at a time
  _check(nearest.among(mesh, mesh_lib.shard_rows(rows, mesh), queries, 60, 50), rows, queries, 60)


def test_a_query_among_the_training_images_is_not_its_own_neighbor(sets):
  engine, variables, images = sets.model.engine, sets.model.variables, sets.train_images
  rows = np.concatenate([part['pooled'] for part in engine.run(variables, images, ['pooled'])])
  own_row = np.arange(0, len(rows), 3)
  similarity, row = nearest.search(engine, variables, images, {'pooled': rows[own_row]}, 7,
                                   most_bytes=4 * rows.shape[1] * 5, own_row=own_row)['pooled']
  unit = rows.astype(np.float64) / np.linalg.norm(rows, axis=1, keepdims=True)
  cosine = unit[own_row] @ unit.T
  cosine[np.arange(len(own_row)), own_row] = -np.inf
  np.testing.assert_allclose(similarity, -np.sort(-cosine, axis=1)[:, :7], atol=1e-6)
  assert not (row == own_row[:, None]).any()
