import numpy as np
import pytest

from instdisc_jax.data import order

KINDS = pytest.mark.parametrize('kind', ['keyed', 'permutation'])


def _batch(step, batch_size, num_rows, *, seed=0, kind='keyed'):
  return order.Chain(seed, batch_size, num_rows, kind).batch(step)


@KINDS
def test_every_epoch_is_a_permutation_and_batches_straddle_epochs(kind):
  batches = [_batch(t, 8, 29, kind=kind) for t in range(29)]  # 8 epochs of 29
  assert all(len(batch) == 8 and batch.dtype == np.int32 for batch in batches)
  epochs = np.concatenate(batches).reshape(8, 29)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(29))
  assert len({tuple(epoch) for epoch in epochs}) == 8


@KINDS
def test_a_batch_depends_only_on_seed_and_step(kind):
  later = _batch(1000, 8, 29, seed=3, kind=kind)
  for step in (5, 2000, 0):
    _batch(step, 8, 29, seed=3, kind=kind)
  np.testing.assert_array_equal(_batch(1000, 8, 29, seed=3, kind=kind), later)
  assert not np.array_equal(_batch(1000, 8, 29, seed=4, kind=kind), later)


@KINDS
def test_the_chain_does_not_depend_on_the_batch_size(kind):
  chain = lambda size: np.concatenate([_batch(t, size, 29, kind=kind) for t in range(120 // size)])
  np.testing.assert_array_equal(chain(8), chain(60))


@KINDS
def test_a_batch_may_span_several_epochs(kind):
  np.testing.assert_array_equal(np.bincount(_batch(1, 12, 4, kind=kind)), [3, 3, 3, 3])


def test_the_order_is_the_same_with_every_numpy_version():
  np.testing.assert_array_equal(_batch(0, 8, 100, kind='permutation'),
                                [13, 97, 16, 37, 21, 35, 55, 86])
  np.testing.assert_array_equal(_batch(0, 8, 100), [3, 87, 93, 85, 70, 25, 44, 98])
  np.testing.assert_array_equal(_batch(5, 4, 2**31 - 1, seed=7),
                                [421644961, 132736176, 841595591, 607208038])


@pytest.mark.parametrize('num_rows', [1, 2, 3, 4, 5, 7, 16, 17, 10_007])
def test_the_keyed_order_is_a_permutation_for_any_n(num_rows):
  for epoch in range(3):
    values = order.keyed(np.arange(num_rows), num_rows, 1, epoch)
    np.testing.assert_array_equal(np.sort(values), np.arange(num_rows))


def test_the_keyed_order_is_uniform_over_places_and_over_pairs_of_neighbors():
  n, epochs = 10, 1000
  places, neighbors = np.zeros((n, n)), np.zeros((n, n))
  for epoch in range(epochs):
    values = order.keyed(np.arange(n), n, 1, epoch)
    places[np.arange(n), values] += 1
    neighbors[values[0], values[1]] += 1
  chi2 = lambda counts, expected: float(((counts - expected) ** 2 / expected).sum())
  assert chi2(places, epochs / n) < 81 + 4 * (2 * 81) ** 0.5  # 81 degrees of freedom
  pairs = neighbors[~np.eye(n, dtype=bool)]
  assert chi2(pairs, epochs / 90) < 89 + 4 * (2 * 89) ** 0.5


def test_a_batch_of_billions_of_images_takes_no_array_of_that_size():
  later = _batch(10**6, 4096, 2**31 - 1)
  assert len(set(later.tolist())) == 4096 and 0 <= later.min() and later.max() < 2**31 - 1
