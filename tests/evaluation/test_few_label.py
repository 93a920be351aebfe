import dataclasses
import functools
import types

import chex
import jax
import numpy as np
import pytest
from scipy import stats

from instdisc_jax import models
from instdisc_jax.data import arrays
from instdisc_jax.evaluation import embedding, few_label, supervised
from instdisc_jax.runtime import errors, preemption
from instdisc_jax.runtime import mesh as mesh_lib
from tests.conftest import small_config
from tests.test_experiment import SignalAt


def test_the_chosen_labels_are_balanced_and_seeded():
  labels = np.random.default_rng(0).choice(4, 1000, p=[0.1, 0.2, 0.3, 0.4])
  chosen = few_label.choose(labels, 0.02, seed=0)
  np.testing.assert_array_equal(np.bincount(labels[chosen]), [5, 5, 5, 5])
  assert len(set(chosen.tolist())) == 20
  np.testing.assert_array_equal(few_label.choose(labels, 0.02, seed=0), chosen)
  assert not np.array_equal(few_label.choose(labels, 0.02, seed=1), chosen)
  assert np.bincount(labels[few_label.choose(labels, 0.0001, seed=0)]).tolist() == [1, 1, 1, 1]
  uneven = np.array([0, 0, 0, 1])
  assert len(few_label.choose(uneven, 0.9, seed=0)) == 3  # two of 0, the only 1
  assert len(few_label.choose(uneven, 1.0, seed=0)) == 4


def test_the_interval_equals_scipy_s():
  values = [0.41, 0.44, 0.39]
  mean, half = few_label.interval(values)
  low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
  assert (mean - half, mean + half) == pytest.approx((low, high))
  assert few_label.interval([0.3]) == (0.3, None)


RECIPE = few_label.Recipe(shares=(0.25,), seeds=(0, 1), epochs=24, milestones=(16, 22),
                          least_batch=16, least_steps=24, learning_rate=0.03)
SHORT = dataclasses.replace(RECIPE, epochs=4, milestones=(3,), least_steps=4)


@functools.cache
def _model(num_devices=8):
  """An encoder of random weights, and the engine that runs it."""
  config = small_config()
  config.augment.update(hue=0.0, grayscale=0.0)
  encoder = models.create('resnet10_cifar', width=2, embedding_dim=16)
  mesh = mesh_lib.make(jax.devices()[:num_devices])
  init = jax.jit(functools.partial(encoder.init, train=False))
  variables = jax.device_get(init(jax.random.key(0), np.zeros((1, 16, 16, 3))))
  return types.SimpleNamespace(
      config=config, encoder=encoder, engine=embedding.Engine(config, encoder, mesh),
      variables=jax.tree.map(lambda x: mesh_lib.replicate(x, mesh), variables),
      digest=lambda: 'weights')


def _pictures():
  """(training images, test images) of two classes: 0 lacks red, 1 blue."""
  random = np.random.default_rng(0)
  labels = random.integers(0, 2, 80)
  pixels = random.integers(0, 256, (80, 16, 16, 3), dtype=np.uint8)
  pixels[np.arange(80), ..., labels * 2] //= 8
  return (arrays.in_memory(pixels[:60], labels[:60]), arrays.in_memory(pixels[60:], labels[60:]))


def _measure(model, folder, labels=None, watch=None, recipe=RECIPE):
  train, test = _pictures()
  return list(few_label.measure(
      model, {'random': lambda _: model.variables}, train, test,
      (train.labels if labels is None else labels, test.labels), num_classes=2, folder=folder,
      watch=watch or preemption.Watch(), recipe=recipe))


@pytest.mark.slow
def test_fine_tuning_learns_the_labels_it_is_given(tmp_path):
  model = _model()
  result, = _measure(model, tmp_path)
  assert result['labels'] == 0.25 and result['images'] in (14, 16) and result['top5'] is None
  assert result['start'] == 'random' and result['top1'] > 0.85
  assert not any(x.is_deleted() for x in jax.tree.leaves(model.variables))  # a copy is donated
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fine_tuning_with_other_labels_learns_those(tmp_path):
  result, = _measure(_model(), tmp_path, 1 - _pictures()[0].labels)
  assert result['top1'] < 0.15


def test_a_stopped_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
  model = _model()
  expected = _measure(model, tmp_path / 'a', recipe=SHORT)
  with pytest.raises(errors.Stopped, match='at step 2 of 4 of fine-tuning 2 of 2'):
    _measure(model, tmp_path / 'b', watch=SignalAt(polls=6), recipe=SHORT)
  trained, fit = [], supervised.fit
  monkeypatch.setattr(supervised, 'fit', lambda job, start, *rest: trained.append(job) or fit(
      job, None, *rest))  # it does not begin again
  assert _measure(model, tmp_path / 'b', recipe=SHORT) == expected
  assert [job.title for job in trained] == ['fine-tuning 2 of 2']


def test_results_are_kept_until_they_have_been_recorded(tmp_path):
  one = dataclasses.replace(SHORT, shares=(0.25, 0.5), seeds=(0,))
  measure = lambda: few_label.measure(
      model, {'random': lambda _: model.variables}, train, test, (train.labels, test.labels),
      num_classes=2, folder=tmp_path, watch=preemption.Watch(), recipe=one)
  model, (train, test) = _model(), _pictures()
  first = next(measure())  # and the process dies
  assert len(list(tmp_path.iterdir())) == 2
  assert [row['top1'] for row in measure()][0] == first['top1'] and not list(tmp_path.iterdir())


def test_the_number_of_devices_changes_nothing(tmp_path, monkeypatch):
  states, fit = [], supervised.fit
  monkeypatch.setattr(supervised, 'fit', lambda *args: states.append(fit(*args)) or states[-1])
  one = dataclasses.replace(SHORT, seeds=(0,))
  for count in (1, 8):
    _measure(_model(count), tmp_path, recipe=one)
  first, second = (jax.device_get((state.weights, state.statistics)) for state in states)
  chex.assert_trees_all_close(first, second, rtol=2e-3, atol=2e-4)


def test_the_learning_rate_falls_as_in_the_paper():
  assert few_label.Recipe().rate(np.arange(0, 700, 100), 700).tolist() == pytest.approx(
      [0.01] * 3 + [0.001] * 3 + [0.0001])
