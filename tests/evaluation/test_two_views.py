import numpy as np
import pytest

import instdisc_jax
from instdisc_jax.evaluation import two_views
from tests import twins


def _slow(first, second, k):
  """Set by set."""
  shares = []
  for i in range(len(first)):
    sets = []
    for x in (first, second):
      order = [j for j in np.argsort(-(x @ x[i])) if j != i]
      sets.append(set(order[:k]))
    shares.append(len(sets[0] & sets[1]) / len(sets[0]))
  return np.mean(shares)


@pytest.mark.parametrize('k', [1, 4, 100])
def test_agreement_is_the_share_of_common_neighbors(k):
  random = np.random.default_rng(0)
  first = twins.unit_rows(random, 30, 8)
  second = first + 0.3 * twins.unit_rows(random, 30, 8)
  assert two_views.agreement(first, second, k) == pytest.approx(_slow(first, second, k))


def test_identical_views_agree_and_unrelated_ones_do_by_chance():
  random = np.random.default_rng(0)
  first, second = (twins.unit_rows(random, 1000, 16) for _ in range(2))
  assert two_views.agreement(first, first) == 1
  assert two_views.agreement(first, second) == pytest.approx(10 / 999, abs=0.004)


def test_the_two_views_of_a_run_differ_and_are_the_same_each_time(trained):
  model = instdisc_jax.load(trained[0])
  embed = lambda: two_views.embed(model.config, model.encoder, model.variables,
                                  model.dataset.train)
  (first, second), again = embed(), embed()
  assert first.shape == second.shape == (128, model.config.model.embedding_dim)
  np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
  assert np.abs(first - second).max() > 0.01
  np.testing.assert_array_equal(first, again[0])
  np.testing.assert_array_equal(second, again[1])
