import functools

import jax
import numpy as np
import pytest
from scipy import stats

from instdisc_jax import models
from instdisc_jax.evaluation import few_label
from tests.conftest import small_config


def test_the_chosen_labels_are_balanced_and_seeded():
  labels = np.random.default_rng(0).choice(4, 1000, p=[0.1, 0.2, 0.3, 0.4])
  chosen = few_label.choose(labels, 0.02, seed=0)
  np.testing.assert_array_equal(np.bincount(labels[chosen]), [5, 5, 5, 5])
  assert len(set(chosen.tolist())) == 20
  np.testing.assert_array_equal(few_label.choose(labels, 0.02, seed=0), chosen)
  assert not np.array_equal(few_label.choose(labels, 0.02, seed=1), chosen)
  assert np.bincount(labels[few_label.choose(labels, 0.0001, seed=0)]).tolist() == [1, 1, 1, 1]
  assert len(few_label.choose(np.array([0, 0, 0, 1]), 1.0, seed=0)) == 3  # two of 0, the only 1


def test_the_interval_equals_scipy_s():
  values = [0.41, 0.44, 0.39]
  mean, half = few_label.interval(values)
  low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
  assert (mean - half, mean + half) == pytest.approx((low, high))
  assert few_label.interval([0.3]) == (0.3, None)


@pytest.mark.slow
def test_fine_tuning_learns_the_labels_it_is_given():
  config = small_config()
  config.augment.update(hue=0.0, grayscale=0.0)
  random = np.random.default_rng(0)
  labels = random.integers(0, 2, 80)
  images = random.integers(0, 256, (80, 16, 16, 3), dtype=np.uint8)
  images[np.arange(80), ..., labels * 2] //= 8  # class 0 lacks red, class 1 blue
  encoder = models.create('resnet10_cifar', width=2, embedding_dim=16)
  variables = encoder.init(jax.random.key(0), np.zeros((1, 16, 16, 3)), train=False)
  starts = {'random': lambda _: variables}
  batches = []

  def read_train(rows):
    batches.append(rows)
    return images[rows]

  measure = functools.partial(few_label.measure, encoder, starts, read_train,
                              read_test=images[60:].__getitem__, test_labels=labels[60:],
                              num_classes=2, config=config, recipe=few_label.Recipe(
                                  shares=(0.25,), seeds=(0, 1), epochs=170, least_steps=10))
  result, = measure(train_labels=labels[:60])
  steps = -(-170 * result['images'] // 64)
  drawn = [rows for rows in batches if len(rows) == 64]
  assert len(drawn) == 2 * steps  # for two seeds
  assert [sorted({*np.concatenate(part)}) for part in (drawn[:steps], drawn[steps:])] == [
      few_label.choose(labels[:60], 0.25, seed).tolist() for seed in (0, 1)]
  assert result['labels'] == 0.25 and result['images'] in (14, 16)
  assert result['start'] == 'random' and result['top1'] > 0.85
  shuffled, = measure(train_labels=random.permutation(labels[:60]))
  assert shuffled['top1'] < 0.85
  assert not any(x.is_deleted() for x in jax.tree.leaves(variables))  # the step donates a copy


@pytest.mark.slow
def test_fine_tuning_stops_within_a_step():
  encoder = models.create('resnet10_cifar', width=2, embedding_dim=16)
  variables = encoder.init(jax.random.key(0), np.zeros((1, 16, 16, 3)), train=False)
  images, steps = np.zeros((20, 16, 16, 3), np.uint8), []

  def check():
    steps.append(None)
    if len(steps) == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    next(few_label.measure(encoder, {'random': lambda _: variables}, images.__getitem__,
                           np.arange(20) % 2, images.__getitem__, np.arange(20) % 2, num_classes=2,
                           config=small_config(), check=check))
  assert len(steps) == 3
