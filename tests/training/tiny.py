"""Runs of seconds: 45 images and a ResNet of one block."""

import jax
import numpy as np

from instdisc_jax.data import Images
from instdisc_jax.models import resnet
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import optimizer as optimizer_lib
from instdisc_jax.training import state as state_lib
from tests.conftest import small_config

N, B = 45, 16  # no device count divides N
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 12, 12, 3), dtype=np.uint8)
IMAGES = Images(PIXELS, None, '')


def config(**loss):
  """Mostly the same settings, so that tests load what others compiled."""
  settings = small_config()
  settings.optimizer.learning_rate = 1e-4
  settings.model.sync_batch_norm = True
  settings.batch_size = B
  settings.epochs = 20
  settings.loss.noise_count = 20
  settings.loss.update(loss)
  return settings


def make_setup(settings, num_devices):
  """The `Setup` of a one-block ResNet over this many devices."""
  encoder = resnet.ResNet(
      resnet.BasicBlock, (1,), True, embedding_dim=settings.model.embedding_dim, width=4,
      dtype=settings.model.dtype,
      batch_norm_axis=mesh_lib.AXIS if settings.model.sync_batch_norm else None)
  mesh = mesh_lib.make(jax.devices()[:num_devices])
  return state_lib.Setup(settings, encoder, optimizer_lib.make(settings, N), N, mesh)


def fresh_state(setup):
  return state_lib.make_init(setup, PIXELS.shape[1:3])()
