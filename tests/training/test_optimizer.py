import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax.training import optimizer as optimizer_lib
from tests.training import tiny
from tests.training.tiny import B, N


def test_learning_rate_falls_at_the_milestones():
  config = tiny.config()
  config.optimizer.milestones = (2, 3)
  config.optimizer.learning_rate = 0.5
  schedule = optimizer_lib.learning_rate_schedule(config, N)
  rates = [float(schedule(t)) for t in range(12)]
  epochs = [t * B // N for t in range(12)]
  np.testing.assert_allclose(rates, [0.5 * 0.1 ** ((e >= 2) + (e >= 3)) for e in epochs], rtol=1e-6)


def test_the_cosine_rises_falls_and_ends_with_the_run():
  config = tiny.config()
  config.optimizer.update(schedule='cosine', warmup_epochs=2.0, learning_rate=0.4)
  schedule = optimizer_lib.learning_rate_schedule(config, N)  # 20 epochs of 45 by 16: 57 steps
  rates = np.array([schedule(step) for step in range(58)])
  np.testing.assert_allclose(rates[[0, 6, 57]], [0, 0.4, 0], atol=1e-7)
  assert (np.diff(rates[:7]) > 0).all() and (np.diff(rates[6:]) < 0).all()
  config.steps = 3  # shorter than the warm-up
  schedule = optimizer_lib.learning_rate_schedule(config, N)
  assert np.isfinite([schedule(step) for step in range(3)]).all()


@pytest.mark.parametrize('settings, end', [
    ({'epochs': 100}, '100, and optimizer.milestones is (120, 160); (60, 80) would be in '
                      'proportion'),
    ({'epochs': 121}, None), ({'epochs': 100, 'steps': 9}, None),
    ({'epochs': 100, 'optimizer.schedule': 'cosine'}, None),
    ({'epochs': 100, 'optimizer.milestones': ()}, None)])
def test_a_learning_rate_that_never_decays_is_pointed_out(settings, end):
  config = config_lib.default()
  config.update_from_flattened_dict(settings)
  assert optimizer_lib.remarks(config) == ([] if end is None else [
      f'the learning rate never decays: the run ends after epoch {end}'])


def test_epochs_end_with_the_step_that_completes_them():
  config = tiny.config()
  config.epochs = 3
  assert optimizer_lib.total_steps(config, N) == 9  # 135 images in batches of 16
  config.steps = 4
  assert optimizer_lib.total_steps(config, N) == 4


def test_optimizer_is_pytorch_sgd():
  config = tiny.config()
  config.optimizer.update(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
  optimizer = optimizer_lib.make(config, N)
  w, velocity = 2.0, 0.0
  params, state = jnp.array(w), optimizer.init(jnp.array(w))
  for grad in (1.0, -0.5, 0.25):
    updates, state = optimizer.update(jnp.array(grad), state, params)
    params = params + updates
    velocity = 0.9 * velocity + grad + 0.01 * w
    w -= 0.1 * velocity
    np.testing.assert_allclose(params, w, rtol=1e-6)


def test_adamw_decays_kernels_alone():
  config = tiny.config()
  config.optimizer.update(name='adamw', learning_rate=0.1, weight_decay=0.5)
  params = {'block': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
            'norm': {'scale': jnp.ones(2)}, 'pos_embed': jnp.ones((1, 3))}
  optimizer = optimizer_lib.make(config, N)
  still = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(still, optimizer.init(params), params)
  assert jax.tree.map(lambda x: float(x.min()), updates) == {
      'block': {'kernel': pytest.approx(-0.05), 'bias': 0}, 'pos_embed': 0, 'norm': {'scale': 0}}
