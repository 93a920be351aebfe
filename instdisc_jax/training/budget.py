"""How many steps fit into a given time, from the time that a few of them take."""

import math
import time
from typing import Any

import jax
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import feeds, views
from instdisc_jax.runtime import distributed
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import step as step_lib

_TIMED = 20  # steps, which are thrown away
_LONG = 1_000_000  # steps of the run that they seem to belong to


def steps(config: config_lib.Config, images: data.Images, mesh: jax.sharding.Mesh) -> int:
  """Steps that take `config.minutes`, compilation included; at least 1, the same in all processes.

  Args:
    config: the run's configuration, filled, with its `dataset.path`.
    images: the images to train on; in memory for a resident run.
    mesh: the device mesh.
  """
  config = config.copy_and_resolve_references()
  config.steps = _LONG
  setup = state_lib.Setup.for_data(config, len(images), images.shape, mesh)
  feed = feeds.make(config, images, mesh, _LONG)
  run_steps: Any = step_lib.over_mesh(setup, feed)
  count = min(feed.per_dispatch, _TIMED)
  start, times = time.monotonic(), []
  try:
    state = state_lib.make_init(setup, views.size(config, images.shape))()
    for step in range(0, _TIMED + count, count):  # the first dispatch compiles
      state, _ = run_steps(state, feed.at(step), count)
      jax.block_until_ready(state.step)
      times.append(time.monotonic())
  finally:
    feed.close()
  compilation = times[0] - start
  per_step = float(np.diff(times).mean()) / count
  left = config.minutes * 60 - compilation  # to compile the real step
  return int(distributed.agree(np.int64(max(1, math.floor(left / per_step)))))
