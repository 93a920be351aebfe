"""Training steps compiled without values, and what their collectives carry."""

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from instdisc_jax.data import feeds
from instdisc_jax.models import resnet
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import optimizer as optimizer_lib
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import step as step_lib
from tests.conftest import small_config

SIDE = 8  # of the images, in pixels


def step(loss, *, num_rows, num_devices, batch_size, dim, accumulate_steps=1):
  """(run_steps, its arguments without values, the state) of a small encoder's step."""
  config = small_config()
  config.batch_size, config.accumulate_steps = batch_size, accumulate_steps
  config.model.embedding_dim = dim
  config.loss.update(loss)
  mesh = mesh_lib.make(jax.devices()[:num_devices])
  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=dim, width=4)
  optimizer = optimizer_lib.make(config, num_rows)
  setup = state_lib.Setup(config, encoder, optimizer, num_rows, mesh)
  bank = jax.ShapeDtypeStruct((-(-num_rows // num_devices) * num_devices, dim), jnp.float32)

  def init():
    variables = encoder.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)), train=False)
    return state_lib.TrainState(
        step=jnp.int32(0), params=variables['params'], batch_stats=variables['batch_stats'],
        opt_state=optimizer.init(variables['params']), bank=jnp.zeros(bank.shape),
        normalizer=jnp.float32(0),
        classifier={name: jnp.zeros(bank.shape) for name in ('weights', 'momentum')}
        if config.loss.name == 'parametric_softmax' else None)

  state = jax.eval_shape(init)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.tree.map(place, state, state_lib.shardings(mesh, state))
  replicated = NamedSharding(mesh, P())
  sharded = NamedSharding(mesh, P(None, mesh_lib.AXIS))
  images = jax.ShapeDtypeStruct((num_rows, SIDE, SIDE, 3), jnp.uint8, sharding=replicated)
  index = jax.ShapeDtypeStruct((1, batch_size), jnp.int32, sharding=sharded)
  num_steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
  run_steps = step_lib.over_mesh(setup, feeds.Resident)
  return run_steps, (state, (images, index), num_steps), state


def traffic(compiled, state):
  """Values that all collectives of a step carry, less gradients and batch-norm statistics."""
  synchronized = sum(math.prod(x.shape)
                     for x in jax.tree.leaves((state.params, state.batch_stats)))
  return collective_values(compiled.as_text()) - synchronized


def collective_values(text):
  """Values that the collectives of a compiled program carry, the larger of in and out for each."""
  total = 0
  for line in text.splitlines():
    found = re.search(r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|'
                      r'collective-permute)(?:-start)?\((.*?)\)', line)
    if found:
      count = lambda shapes: sum(math.prod(map(int, dims.split(','))) if dims else 1
                                 for dims in re.findall(r'\w+\[([\d,]*)\]', shapes))
      total += max(count(found[1]), count(found[3]))
  return total
