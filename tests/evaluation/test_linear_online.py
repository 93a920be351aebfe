import chex
import jax
import numpy as np
import pytest

from instdisc_jax import inference
from instdisc_jax.data import order
from instdisc_jax.evaluation import linear_online, supervised
from instdisc_jax.runtime import errors, preemption
from tests.test_experiment import SignalAt

RECIPE = linear_online.Recipe(epochs=4, milestones=(1, 2, 3), least_steps=120, batch_size=16,
                              moments=4, learning_rates=(0.1, 1.0), crop_scale=(1.0, 1.0))


@pytest.fixture(scope='module')
def model(trained):
  """A trained run whose random crops are the whole image, so that its features never change."""
  model = inference.load(trained[0])
  model.config.augment.update(crop_ratio=(1.0, 1.0))
  return model


def _measure(model, folder, watch=None):
  """(the rows, the state after training)."""
  data, states, fit = model.dataset, [], supervised.fit
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(supervised, 'fit', lambda *args: states.append(fit(*args)) or states[-1])
    rows = list(linear_online.measure(
        model, data.train, data.test, (data.train.labels, data.test.labels), num_classes=10,
        folder=folder, watch=watch or preemption.Watch(), recipe=RECIPE))
  return rows, jax.device_get(states[0])


@pytest.fixture(scope='module')
def measured(model, tmp_path_factory):
  """`_measure`, undisturbed."""
  return _measure(model, tmp_path_factory.mktemp('measured'))


def _features(model, images):
  parts = list(model.engine.run(model.variables, images, (*linear_online.ALL,)))
  return {stage: np.concatenate([part[stage] for part in parts]) for stage in parts[0]}


def _twin(x, y, mean, scale, chain, end):
  """(weights [F, R, C], biases [R, C]) by NumPy, in float64."""
  x, found = (x.astype(np.float64) - mean) * scale, []
  for rate in RECIPE.learning_rates:
    w, b = np.zeros((x.shape[1], 10)), np.zeros(10)
    moving = np.zeros_like(w), np.zeros_like(b)
    for step in range(end):
      i = chain.batch(step)
      scores = x[i] @ w + b
      p = np.exp(scores - scores.max(axis=1, keepdims=True))
      error = (p / p.sum(axis=1, keepdims=True) - np.eye(10)[y[i]]) / len(i)
      now = rate * 0.1 ** sum(step >= m * end // RECIPE.epochs for m in RECIPE.milestones)
      gradient = (x[i].T @ error + RECIPE.weight_decay * w,
                  error.sum(axis=0) + RECIPE.weight_decay * b)
      moving = [RECIPE.momentum * v + g for v, g in zip(moving, gradient)]
      w, b = (z - now * (g + RECIPE.momentum * v) for z, g, v in zip((w, b), gradient, moving))
    found.append((w, b))
  w, b = zip(*found)
  return np.stack(w, axis=1), np.stack(b)


def test_the_classifiers_equal_a_numpy_twin_s(model, measured):
  train, test = model.dataset.train, model.dataset.test
  held_out, rest = linear_online.split(len(train), RECIPE, 0)
  chain, end = order.Chain(0, 16, len(rest)), RECIPE.steps(len(rest))
  rows = {row['features']: row for row in measured[0]}
  features, asked = _features(model, train), _features(model, test)
  for stage, x in features.items():
    seen = x[rest][np.concatenate([chain.batch(step) for step in range(RECIPE.moments)])]
    mean, deviation = seen.mean(axis=0), seen.std(axis=0)
    deviation = np.maximum(deviation, 1e-3 * np.sqrt(np.square(deviation).mean()) + 1e-6)
    scale = 1 / (deviation * np.sqrt(x.shape[1]))
    w, b = _twin(x[rest], train.labels[rest], mean, scale, chain, end)
    for name, expected in (('w', w), ('b', b)):
      np.testing.assert_allclose(measured[1].weights[stage][name][..., :10], expected,
                                 atol=1e-3 * np.abs(expected).max(), err_msg=stage)
    scores = lambda x: np.einsum('nf,frc->rnc', (x - mean) * scale, w) + b[:, None]
    right = lambda x, y: (scores(x).argmax(axis=2) == y).mean(axis=1)
    best = int(np.argmax(right(x[held_out], train.labels[held_out])))
    row = rows[stage]
    assert row['learning_rate'] == RECIPE.learning_rates[best]
    top5 = np.argsort(-scores(asked[stage])[best], axis=1)[:, :5]
    assert row['top1'] == pytest.approx(right(asked[stage], test.labels)[best], abs=2 / len(test))
    assert row['top5'] == pytest.approx(
        (top5 == test.labels[:, None]).any(axis=1).mean(), abs=2 / len(test))
  assert set(rows) == set(features)
  assert max(row['top1'] for row in rows.values()) > 0.2  # chance: 0.1


def test_stopped_and_resumed_it_ends_with_the_same_bits(model, measured, tmp_path, monkeypatch):
  with pytest.raises(errors.Stopped, match='at step 17 of 120 of linear_online, which is saved'):
    _measure(model, tmp_path, SignalAt(polls=17))
  monkeypatch.setattr(linear_online.Probe, 'start', None)  # it does not begin again
  rows, state = _measure(model, tmp_path)
  assert rows == measured[0]
  chex.assert_trees_all_equal(state, measured[1])
  assert not list(tmp_path.iterdir())


def test_images_held_out_are_seeded_and_few():
  held_out, rest = linear_online.split(1000, RECIPE, 0)
  assert len(held_out) == 100 and sorted([*held_out, *rest]) == list(range(1000))
  assert not np.array_equal(linear_online.split(1000, RECIPE, 1)[0], held_out)
  assert len(linear_online.split(1_281_167, RECIPE, 0)[0]) == 10_000
