"""Random weights for the tests of this folder."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import models


def variables(name, width=4, embedding_dim=6, seed=0):
  """Random variables of an encoder, without compiling its initialization."""
  model = models.create(name, width=width, embedding_dim=embedding_dim)
  side = config_lib.SMALLEST_SIDE.get(name, 32)
  shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))
  random = np.random.default_rng(seed)
  fill = lambda x: random.standard_normal(x.shape).astype(np.float32) * 0.1
  filled = {'batch_stats': {}} | jax.tree.map(fill, shapes)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: np.abs(x) + 0.5 if path[-1].key == 'var' else x, filled)


def assert_same(found, expected):
  found, expected = map(traverse_util.flatten_dict, (found, expected))
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=str(path))


def tensors(state_dict, torch, prefix=''):
  return {prefix + key: torch.from_numpy(value.copy()) for key, value in state_dict.items()}
