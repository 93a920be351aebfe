import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import neighbors
from instdisc_jax.evaluation import knn
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.runtime.mesh import AXIS
from tests import twins

Q, N, D = 53, 4001, 12  # primes: nothing divides them


def _inputs():
  random = np.random.default_rng(0)
  return twins.unit_rows(random, Q, D), twins.unit_rows(random, N, D)


def test_fewer_rows_on_a_device_than_neighbors():
  queries, bank = _inputs()
  bank = bank[:11]  # two rows per device, and padding
  search = knn.over_mesh(mesh_lib.make(), 11, 11)
  _, row = search(queries.astype('f4'), mesh_lib.pad_rows(bank.astype('f4'), 8),
                  np.full(Q, -1, np.int32))
  np.testing.assert_array_equal(row, np.argsort(-(queries @ bank.T), axis=1))


@pytest.mark.parametrize('num_devices', [None, 8])
@pytest.mark.parametrize('most_scores', [1, 20_000, 10**6])  # one by one, in chunks, at once
def test_queries_come_in_chunks(most_scores, num_devices):
  queries, bank = _inputs()
  expected = np.argsort(-(queries @ bank.T), axis=1)[:, :20]
  arrays = queries.astype('f4'), bank.astype('f4')
  search = functools.partial(neighbors.nearest, k=20, most_scores=most_scores)
  if num_devices:
    search = jax.shard_map(functools.partial(search, axis_name=AXIS, num_rows=N),
                           mesh=mesh_lib.make(), in_specs=(P(), P(AXIS)), out_specs=P(),
                           check_vma=False)
    arrays = arrays[0], mesh_lib.pad_rows(arrays[1], 8)
  np.testing.assert_array_equal(jax.jit(search)(*arrays)[1], expected)


@pytest.mark.parametrize('n, k', [(60, 1), (60, 60), (1000, 1), (1000, 5), (4097, 60), (20_001, 60),
                                  (20_001, 1), (250_000, 60)])  # to two levels of groups
@pytest.mark.parametrize('top_k', [neighbors.top_k, neighbors.among_slices])
def test_top_k_equals_a_full_sort(top_k, n, k):
  scores = np.random.default_rng(n).standard_normal((3, n)).astype('f4')
  best, place = top_k(jnp.asarray(scores), k)
  expected = np.argsort(-scores, axis=1)[:, :k]
  np.testing.assert_array_equal(place, expected)
  np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, axis=1))


@pytest.mark.parametrize('top_k', [neighbors.top_k, neighbors.among_slices])
def test_top_k_of_scores_of_which_many_are_equal_or_masked(top_k):
  scores = np.round(np.random.default_rng(0).standard_normal((4, 9001)), 1).astype('f4')
  scores[:, 40:] = -np.inf
  best, place = top_k(jnp.asarray(scores), 30)
  np.testing.assert_array_equal(best, -np.sort(-scores, axis=1)[:, :30])
  assert all(len(set(row)) == 30 for row in np.asarray(place))


def test_memory_is_bounded_for_50000_queries_of_imagenet():
  arrays = (jax.ShapeDtypeStruct((50_000, 128), jnp.float32),
            jax.ShapeDtypeStruct((1_281_167, 128), jnp.float32))
  compiled = jax.jit(functools.partial(neighbors.nearest, k=200)).lower(*arrays).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**30  # all scores would be 256 GB
