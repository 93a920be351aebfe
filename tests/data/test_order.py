import numpy as np

from instdisc_jax.data import order


def test_every_epoch_is_a_permutation_and_batches_straddle_epochs():
  chain = np.concatenate([order.batch_index(0, t, 8, 29) for t in range(29)])  # 8 epochs of 29
  epochs = chain.reshape(8, 29)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(29))
  assert len({tuple(epoch) for epoch in epochs}) == 8
  assert all(len(order.batch_index(0, t, 8, 29)) == 8 for t in range(10))


def test_a_batch_depends_only_on_seed_and_step():
  later = order.batch_index(3, 1000, 8, 29)
  for step in (5, 2000, 0):
    order.batch_index(3, step, 8, 29)
  np.testing.assert_array_equal(order.batch_index(3, 1000, 8, 29), later)
  assert not np.array_equal(order.batch_index(4, 1000, 8, 29), later)


def test_the_chain_does_not_depend_on_the_batch_size():
  chain = lambda size: np.concatenate([order.batch_index(0, t, size, 29)
                                       for t in range(120 // size)])
  np.testing.assert_array_equal(chain(8), chain(60))


def test_a_batch_may_span_several_epochs():
  np.testing.assert_array_equal(np.bincount(order.batch_index(0, 1, 12, 4)), [3, 3, 3, 3])


def test_the_order_is_the_same_with_every_numpy_version():
  np.testing.assert_array_equal(order.batch_index(0, 0, 8, 100), [13, 97, 16, 37, 21, 35, 55, 86])
