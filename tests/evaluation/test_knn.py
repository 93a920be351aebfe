import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import neighbors
from instdisc_jax.evaluation import knn
from instdisc_jax.runtime import hlo
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime.mesh import AXIS
from tests import twins

Q, N, D, C = 53, 4001, 12, 7  # primes: nothing divides them


def _inputs():
  random = np.random.default_rng(0)
  queries, bank = twins.unit_rows(random, Q, D), twins.unit_rows(random, N, D)
  return queries, bank, random.integers(0, C, N)


@pytest.mark.parametrize('num_devices', [None, 8])
@pytest.mark.parametrize('k', [1, 20, 200])
def test_scores_equal_brute_force(k, num_devices):
  queries, bank, labels = _inputs()
  expected = twins.class_scores(queries, bank, labels, k, 0.1, C)
  kwargs = dict(k=k, temperature=0.1, num_classes=C)
  arrays = queries.astype('f4'), bank.astype('f4'), labels
  if num_devices is None:
    scores = knn.class_scores(*arrays, **kwargs)
  else:
    fn = functools.partial(knn.class_scores, axis_name=AXIS, num_rows=N, **kwargs)
    scores = jax.jit(jax.shard_map(fn, mesh=mesh_lib.make(), in_specs=(P(), P(AXIS), P()),
                                   out_specs=P(), check_vma=False))(
                                       arrays[0], mesh_lib.pad_rows(arrays[1], 8), labels)
  np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4 * expected.max())
  np.testing.assert_array_equal(np.argmax(scores, axis=1), np.argmax(expected, axis=1))


@pytest.mark.parametrize('num_devices', [1, 8])
def test_nearest_rows_equal_brute_force_and_leave_out_the_query_itself(num_devices):
  _, bank, _ = _inputs()
  own = np.arange(0, N, 80)[:Q].astype(np.int32)
  similarity = bank[own] @ bank.T
  similarity[np.arange(len(own)), own] = -np.inf
  expected = np.argsort(-similarity, axis=1, kind='stable')[:, :20]
  search = knn.over_mesh(mesh_lib.make(jax.devices()[:num_devices]), 20, N)
  padded = mesh_lib.pad_rows(jnp.asarray(bank, jnp.float32), num_devices)
  found, row = search(bank[own].astype('f4'), padded, own)
  np.testing.assert_array_equal(row, expected)
  np.testing.assert_allclose(found, np.take_along_axis(similarity, expected, axis=1), atol=1e-6)


def test_top1_counts_right_votes():
  similarity = np.array([[0.9, 0.8, 0.8], [0.9, 0.1, 0.1]], np.float32)
  row = np.array([[0, 1, 2], [0, 1, 2]])
  labels = np.array([4, 2, 2])  # first query: two of class 2 outvote class 4; second: not
  for truth, share in (([2, 4], 1.0), ([4, 4], 0.5), ([4, 2], 0.0)):
    assert knn.top1(similarity, row, labels, np.array(truth), 0.5) == share


def test_a_grid_of_k_and_temperature_from_one_search_equals_brute_force():
  queries, bank, labels = _inputs()
  query_labels = np.random.default_rng(1).integers(0, C, Q)
  similarity, row = neighbors.nearest(queries.astype('f4'), bank.astype('f4'), k=200)
  grid = knn.top1_grid(similarity, row, labels, query_labels, [1, 20, 200], [0.07, 0.5])
  assert len(grid) == 6
  for (k, temperature), found in grid.items():
    scores = twins.class_scores(queries, bank, labels, k, temperature, C)
    assert found == pytest.approx((scores.argmax(axis=1) == query_labels).mean())


def test_the_approximate_search_reports_its_recall():
  queries, bank, _ = _inputs()
  arrays = queries.astype('f4'), bank.astype('f4')
  _, exact = neighbors.nearest(*arrays, k=20)
  _, found = neighbors.nearest(*arrays, k=20, recall_target=0.9)
  assert knn.recall(found, exact) >= 0.9
  assert knn.recall(np.roll(exact, 1, axis=0), exact) < 0.2
  assert knn.recall(exact[:, ::-1], exact) == 1


def test_devices_exchange_what_does_not_grow_with_their_number():
  """Candidates go to the device that merges the query's, not to all of them."""
  def received(num_devices):
    search = knn.over_mesh(mesh_lib.make(jax.devices()[:num_devices]), 50, 8000)
    compiled = search.lower(jax.ShapeDtypeStruct((640, D), jnp.float32),
                            jax.ShapeDtypeStruct((8000, D), jnp.float32),
                            jax.ShapeDtypeStruct((640,), jnp.int32)).compile()
    return sum(found.bytes for found in hlo.costs(compiled.as_text()).collectives)

  assert received(8) <= received(2) <= 2 * 640 * 50 * 8


def test_class_numbers_may_have_gaps():
  similarity, row = np.array([[0.9, 0.8, 0.1], [0.7, 0.2, 0.1]]), np.array([[0, 1, 2], [2, 1, 0]])
  labels = np.array([7, 10**9, 10**9 + 5])
  assert knn.top1(similarity, row, labels, np.array([7, 10**9 + 5]), 0.1) == 1
  assert knn.top1(similarity, row, labels, np.array([3, 10**9]), 0.1) == 0
