import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

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


def test_fewer_rows_on_a_device_than_neighbors():
  queries, bank, labels = _inputs()
  bank, labels = bank[:11], labels[:11]  # two rows per device, and padding
  search = knn.over_mesh(mesh_lib.make(), 11, 11)
  _, row = search(queries.astype('f4'), mesh_lib.pad_rows(bank.astype('f4'), 8),
                  np.full(Q, -1, np.int32))
  np.testing.assert_array_equal(row, np.argsort(-(queries @ bank.T), axis=1))


@pytest.mark.parametrize('num_devices', [None, 8])
@pytest.mark.parametrize('most_scores', [1, 20_000, 10**6])  # one by one, in chunks, at once
def test_queries_come_in_chunks(most_scores, num_devices):
  queries, bank, _ = _inputs()
  expected = np.argsort(-(queries @ bank.T), axis=1)[:, :20]
  arrays = queries.astype('f4'), bank.astype('f4')
  search = functools.partial(knn.nearest, k=20, most_scores=most_scores)
  if num_devices:
    search = jax.shard_map(functools.partial(search, axis_name=AXIS, num_rows=N),
                           mesh=mesh_lib.make(), in_specs=(P(), P(AXIS)), out_specs=P(),
                           check_vma=False)
    arrays = arrays[0], mesh_lib.pad_rows(arrays[1], 8)
  np.testing.assert_array_equal(jax.jit(search)(*arrays)[1], expected)


@pytest.mark.parametrize('n, k', [(60, 1), (60, 60), (1000, 1), (1000, 5), (4097, 60), (20_001, 60),
                                  (20_001, 1), (250_000, 60)])  # to two levels of groups
@pytest.mark.parametrize('top_k', [knn.top_k, knn.among_slices])
def test_top_k_equals_a_full_sort(top_k, n, k):
  scores = np.random.default_rng(n).standard_normal((3, n)).astype('f4')
  best, place = top_k(jnp.asarray(scores), k)
  expected = np.argsort(-scores, axis=1)[:, :k]
  np.testing.assert_array_equal(place, expected)
  np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, axis=1))


@pytest.mark.parametrize('top_k', [knn.top_k, knn.among_slices])
def test_top_k_of_scores_of_which_many_are_equal_or_masked(top_k):
  scores = np.round(np.random.default_rng(0).standard_normal((4, 9001)), 1).astype('f4')
  scores[:, 40:] = -np.inf
  best, place = top_k(jnp.asarray(scores), 30)
  np.testing.assert_array_equal(best, -np.sort(-scores, axis=1)[:, :30])
  assert all(len(set(row)) == 30 for row in np.asarray(place))


def test_top1_counts_right_votes():
  similarity = np.array([[0.9, 0.8, 0.8], [0.9, 0.1, 0.1]], np.float32)
  row = np.array([[0, 1, 2], [0, 1, 2]])
  labels = np.array([4, 2, 2])  # first query: two of class 2 outvote class 4; second: not
  for truth, share in (([2, 4], 1.0), ([4, 4], 0.5), ([4, 2], 0.0)):
    assert knn.top1(similarity, row, labels, np.array(truth), 0.5) == share


def test_a_grid_of_k_and_temperature_from_one_search_equals_brute_force():
  queries, bank, labels = _inputs()
  query_labels = np.random.default_rng(1).integers(0, C, Q)
  similarity, row = knn.nearest(queries.astype('f4'), bank.astype('f4'), k=200)
  grid = knn.top1_grid(similarity, row, labels, query_labels, [1, 20, 200], [0.07, 0.5])
  assert len(grid) == 6
  for (k, temperature), found in grid.items():
    scores = twins.class_scores(queries, bank, labels, k, temperature, C)
    assert found == pytest.approx((scores.argmax(axis=1) == query_labels).mean())


def test_the_approximate_search_reports_its_recall():
  queries, bank, _ = _inputs()
  arrays = queries.astype('f4'), bank.astype('f4')
  _, exact = knn.nearest(*arrays, k=20)
  _, found = knn.nearest(*arrays, k=20, recall_target=0.9)
  assert knn.recall(found, exact) >= 0.9
  assert knn.recall(np.roll(exact, 1, axis=0), exact) < 0.2
  assert knn.recall(exact[:, ::-1], exact) == 1


def test_memory_is_bounded_for_50000_queries_of_imagenet():
  arrays = (jax.ShapeDtypeStruct((50_000, 128), jnp.float32),
            jax.ShapeDtypeStruct((1_281_167, 128), jnp.float32))
  compiled = jax.jit(functools.partial(knn.nearest, k=200)).lower(*arrays).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**30  # all scores would be 256 GB


def test_devices_exchange_what_does_not_grow_with_their_number():
  """Candidates go to the device that merges the query's, not to all of them."""
  def received(num_devices):
    search = knn.over_mesh(mesh_lib.make(jax.devices()[:num_devices]), 50, 8000)
    compiled = search.lower(jax.ShapeDtypeStruct((640, D), jnp.float32),
                            jax.ShapeDtypeStruct((8000, D), jnp.float32),
                            jax.ShapeDtypeStruct((640,), jnp.int32)).compile()
    return sum(found.bytes for found in hlo.costs(compiled.as_text()).collectives)

  assert received(8) <= received(2) <= 2 * 640 * 50 * 8
