"""Eight virtual CPU devices for every test, and small trained runs that many tests share."""

import atexit
import fcntl
from importlib import metadata
import json
import os
import shutil
import tempfile

# What one test or worker has compiled, the others load.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='instdisc-tests-')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
# The tests' images are tiny: most of their time would go into compiling and optimizing programs.
flags = [os.environ.get('XLA_FLAGS', ''), '--xla_backend_optimization_level=0']
if metadata.version('jax').startswith('0.10.'):  # later versions do not know the flag
  flags.append('--xla_cpu_use_fusion_emitters=false')  # the older emitters compile in half the time
os.environ['XLA_FLAGS'] = ' '.join(flags)

import jax  # noqa: E402  (after the flags are set)
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)

from instdisc_jax import config as config_lib  # noqa: E402  (after the number of devices is set)
from instdisc_jax import experiment  # noqa: E402
from instdisc_jax.evaluation import figures  # noqa: E402
from instdisc_jax.runtime import workdir as workdir_lib  # noqa: E402

figures.QUERIES = 2  # a dozen take a second to draw, in every run


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


def write_finished(config, workdir):
  """What `reproduce` reads of a finished run: one of 9 steps on 100 images, never trained."""
  workdir.mkdir(parents=True, exist_ok=True)
  summary = {'knn_top1': 0.5, 'final_loss': 5.0, 'steps': 9, 'wall_seconds': 60.0, 'num_rows': 100,
             'knn_top1_untrained': 0.2, 'knn_top1_pixels': 0.3, 'knn_top1_pooled': None}
  (workdir / 'summary.json').write_text(json.dumps(summary))
  workdir_lib.write(workdir, config_lib.to_json(config), None)
  lines = [{'step': step, 'step_loss': 5.0 + step % 2, 'proximal_penalty': 0.5}
           for step in range(1, 9)]
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def _once(tmp_path_factory, name, make):
  """`make(folder)` in a folder that all workers share: one makes it, the others wait."""
  shared = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    shared = shared.parent
  with (shared / f'{name}.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (shared / name).exists():
      make(shared / f'{name}.partial')
      (shared / f'{name}.partial').rename(shared / name)
  return shared / name


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """(workdir, summary, config) of the small run, trained on one device."""
  config = small_config()
  make = lambda folder: experiment.run(config, folder, jax.devices()[:1])
  workdir = _once(tmp_path_factory, 'trained', make)
  return workdir, json.loads((workdir / 'summary.json').read_text()), config


@pytest.fixture
def interpreted():
  """TPU kernels run on a CPU, as JAX interprets them."""
  from jax.experimental.pallas import tpu as pltpu  # here, since it takes most of a second
  with pltpu.force_tpu_interpret_mode():
    yield


def smooth_images(count=4, height=32, width=32):
  """Smooth color images with all values from dark to bright, as uint8."""
  random = np.random.default_rng(0)
  coarse = random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
  return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC))
                   for c in coarse])


def write_images(folder, seed=0):
  """40 images of 2 classes, of several sizes and formats."""
  random = np.random.default_rng(seed)
  for i in range(40):
    coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    coarse[..., i % 2] = 0  # each class lacks a color
    size = (40 + i, 60 - i // 2)
    path = folder / ('greenless' if i % 2 else 'redless') / f'{i:02}.{"jpg" if i % 3 else "png"}'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


def folder_config(folder):
  """The small run on a folder of images, a fifth of them held out."""
  config = small_config()
  config.dataset.update(name=f'folder:{folder}', limit=None, validation='0.2', workers=0)
  config.augment.update(size=24, grayscale_first=True, flip=0.5)
  config.batch_size = 8
  config.knn.neighbors = 3
  return config


@pytest.fixture(scope='session')
def trained_folder(tmp_path_factory):
  """(folder, workdir, summary) of a run of 12 steps on 32 images, 8 held out."""
  images = _once(tmp_path_factory, 'images', write_images)
  make = lambda folder: experiment.run(folder_config(images), folder, jax.devices()[:1])
  workdir = _once(tmp_path_factory, 'trained_folder', make)
  return images, workdir, json.loads((workdir / 'summary.json').read_text())
