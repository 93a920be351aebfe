"""Eight virtual CPU devices for every test, and one small trained run that many tests look at."""

import atexit
import os
import shutil
import tempfile

# What one test or worker has compiled the others load.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='instdisc-tests-')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
# The tests' pictures are tiny: most of their time would go into optimising the programs.
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'

import jax  # noqa: E402  (after the flags are set)
import pytest  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)

from instdisc_jax import config as config_lib  # noqa: E402  (after the number of devices is set)
from instdisc_jax import main  # noqa: E402


def small_config():
  """A run of seconds: 128 digits, a tiny ResNet, 3 epochs of 4 steps."""
  config = config_lib.default()
  config.dataset.limit = 128
  config.model.name = 'resnet10_cifar'
  config.model.width = 2
  config.model.embedding_dim = 16
  config.batch_size = 32
  config.epochs = 3
  config.loss.noise_count = 64
  config.knn.neighbors = 5
  config.checkpoint.every_steps = 5
  return config


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """(workdir, summary, config) of the small run, trained on one device."""
  workdir = tmp_path_factory.mktemp('trained')
  config = small_config()
  return workdir, main.run(config, workdir, jax.devices()[:1]), config
