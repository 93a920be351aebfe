import jax
import numpy as np
import pytest

from instdisc_jax.search import neighbors


@pytest.fixture(scope='module')
def rows():
  vectors = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _brute_force(rows, row):
  """(similarities, rows) of all other rows, most similar first."""
  others = np.array([j for j in range(len(rows)) if j != row])
  similarity = rows[others] @ rows[row]
  order = np.argsort(-similarity)
  return similarity[order], others[order]


@pytest.mark.parametrize('k', [4, 100])
def test_a_row_is_not_its_own_neighbor_and_there_are_no_more_than_the_others(rows, k, monkeypatch):
  monkeypatch.setattr(neighbors, '_CHUNK', 25)  # and the last chunk is a part
  every = neighbors.search(rows, None, k)
  some = neighbors.search(rows, rows[[3, 5]], k, np.array([3, 5]))
  assert every.row.shape == (60, min(k, 59))
  np.testing.assert_array_equal(some.row, every.row[[3, 5]])
  for i in range(60):
    similarity, others = _brute_force(rows, i)
    np.testing.assert_array_equal(every.row[i], others[:k])
    np.testing.assert_allclose(every.similarity[i], similarity[:k], atol=1e-6)


def test_a_query_that_is_no_row_may_find_any(rows):
  nearest = neighbors.search(rows, rows[[3, 5]], 100)
  assert nearest.row.shape == (2, 60) and nearest.row[:, 0].tolist() == [3, 5]


def test_one_process_searches_alone_among_several(rows, monkeypatch):
  alone, mesh, made = neighbors.search(rows, None, 4), neighbors.mesh_lib.make, []
  monkeypatch.setattr(neighbors.mesh_lib, 'make', lambda *of: made.append(mesh(*of)) or made[-1])
  monkeypatch.setattr(jax, 'local_devices', lambda: jax.devices()[:3])  # the others are elsewhere
  np.testing.assert_array_equal(neighbors.search(rows, None, 4).row, alone.row)
  assert [m.devices.tolist() for m in made] == [jax.devices()[:3]]


def test_a_search_is_stopped_between_chunks(rows):
  def check():
    raise KeyboardInterrupt
  with pytest.raises(KeyboardInterrupt):
    neighbors.search(rows, None, 4, check=check)


@pytest.mark.parametrize('n, most, expected', [
    (10, 4, [0, 3, 6, 9]), (3, 100, [0, 1, 2]), (5, 1, [0]), (1, 1, [0])])
def test_spread_is_even_and_includes_both_ends(n, most, expected):
  assert neighbors.spread(n, most).tolist() == expected
