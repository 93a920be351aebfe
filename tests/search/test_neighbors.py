import numpy as np
import pytest

from instdisc_jax.search import neighbors


@pytest.fixture(scope='module')
def bank():
  vectors = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _brute_force(bank, row, among):
  """(similarities, rows) of the rows `among` others, most similar first."""
  others = np.array([j for j in among if j != row])
  similarity = bank[others] @ bank[row]
  order = np.argsort(-similarity)
  return similarity[order], others[order]


def test_a_row_is_not_its_own_neighbor_and_there_are_no_more_than_the_others(bank):
  nearest = neighbors.of_rows(np.array([3, 5]), bank, k=100)
  assert nearest.row.shape == (2, 59)
  for i, row in enumerate((3, 5)):
    similarity, others = _brute_force(bank, row, range(60))
    np.testing.assert_array_equal(nearest.row[i], others)
    np.testing.assert_allclose(nearest.similarity[i], similarity, atol=1e-6)
  nearest = neighbors.of_queries(bank[[3, 5]], bank, k=100)
  assert nearest.row.shape == (2, 60) and nearest.row[:, 0].tolist() == [3, 5]


def test_rows_that_are_shown_know_where_their_neighbors_were_searched(bank):
  shown = neighbors.of_shown(np.array([7, 2]), np.array([11, 2, 50]), bank, k=4)
  assert {2, 7, 11, 50} <= set(shown.rows) and 60 > len(shown.rows) >= 5
  assert not {2, 7} & set(shown.restricted) and {11, 50} - set(shown.restricted) <= {
      *shown.nearest.row[np.isin(shown.rows, [2, 7])].ravel()}
  for row, similarity, others in zip(shown.rows, shown.nearest.similarity, shown.nearest.row):
    among = shown.rows if row in shown.restricted else range(60)
    best, expected = _brute_force(bank, row, among)
    np.testing.assert_array_equal(others, expected[:4])
    np.testing.assert_allclose(similarity, best[:4], atol=1e-6)


def test_a_scan_takes_some_rows_and_searches_the_full_bank(bank):
  rows, nearest = neighbors.scan(bank, seed=0, most=100)
  assert rows.tolist() == list(range(60)) and nearest.row.shape == (60, 5)
  some, of_some = neighbors.scan(bank, seed=0, most=20)
  assert len(set(some)) == 20 and (np.diff(some) > 0).all()
  np.testing.assert_array_equal(of_some.row, nearest.row[some])
  assert neighbors.scan(bank, seed=1, most=20)[0].tolist() != some.tolist()


def test_near_duplicates_come_once_and_the_most_similar_first(bank):
  copied = bank.copy()
  copied[40] = copied[9]
  pairs = neighbors.duplicates(*neighbors.scan(copied, 0, 100), most=10)
  assert pairs[0][:2] == (9, 40) and pairs[0][2] == pytest.approx(1, abs=1e-6)
  assert len({pair[:2] for pair in pairs}) == 10 and all(i < j for i, j, _ in pairs)
  values = [value for _, _, value in pairs]
  assert values == sorted(values, reverse=True)
  scores = copied @ copied.T
  best = np.sort(scores[np.triu_indices(60, 1)])[::-1]
  np.testing.assert_allclose(values, best[:10], atol=1e-6)


def test_outliers_are_least_similar_to_their_five_nearest(bank):
  found = neighbors.outliers(*neighbors.scan(bank, 0, 100), most=7)
  mean = np.array([_brute_force(bank, row, range(60))[0][:5].mean() for row in range(60)])
  assert [row for row, _ in found] == np.argsort(mean)[:7].tolist()
  np.testing.assert_allclose([value for _, value in found], np.sort(mean)[:7], atol=1e-6)


@pytest.mark.parametrize('n, most, expected', [
    (10, 4, [0, 3, 6, 9]), (3, 100, [0, 1, 2]), (5, 1, [0]), (1, 1, [0])])
def test_spread_is_even_and_includes_both_ends(n, most, expected):
  assert neighbors.spread(n, most).tolist() == expected
