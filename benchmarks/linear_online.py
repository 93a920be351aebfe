"""Memory and time of the protocol `linear_online` against the number of images.

    JAX_NUM_CPU_DEVICES=8 python benchmarks/linear_online.py [--images 5000 20000]

Generated images of 64 pixels in 100 classes, made when they are read; a ResNet-10 of width 16 with
random weights; one epoch. Each size in a process of its own: the peak of its memory must not grow
with the number of images.
"""

import dataclasses
import pathlib
import resource
import tempfile
import time
import types

import common

CLASSES, SIDE = 100, 64


class Generated:
  """files[i] is a smooth image, a function of i alone."""

  def __init__(self, count):
    self._count = count

  def __len__(self):
    return self._count

  def __getitem__(self, i):
    import numpy as np
    coarse = np.random.RandomState(i).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    return coarse.repeat(SIDE // 8, axis=0).repeat(SIDE // 8, axis=1)


def measure(count):
  """Trains on `count` images in this process."""
  import jax
  import numpy as np

  from instdisc_jax import config as config_lib
  from instdisc_jax import models
  from instdisc_jax.data import images as images_lib
  from instdisc_jax.evaluation import embedding, linear_online
  from instdisc_jax.runtime import mesh as mesh_lib
  from instdisc_jax.runtime import preemption

  config = config_lib.default()
  config.augment.size, config.dataset.workers = SIDE, 0
  config.model.update(name='resnet10', width=16)
  encoder, mesh = models.create('resnet10', width=16), mesh_lib.make()
  init = jax.jit(lambda: encoder.init(jax.random.key(0), np.zeros((1, SIDE, SIDE, 3)), train=False))
  variables = jax.tree.map(lambda x: mesh_lib.replicate(x, mesh), jax.device_get(init()))
  model = types.SimpleNamespace(
      config=config, encoder=encoder, variables=variables, digest=lambda: 'random weights',
      engine=embedding.Engine(config, encoder, mesh))
  make = lambda n: images_lib.Images(Generated(n), None, f'generated {n}', shape=(SIDE, SIDE, 3))
  labels = lambda n: np.arange(n, dtype=np.int32) % CLASSES
  recipe = dataclasses.replace(linear_online.Recipe(), epochs=1, milestones=(), least_steps=1)
  memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  before, start = memory(), time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    rows = list(linear_online.measure(
        model, make(count), make(1000), (labels(count), labels(1000)), num_classes=CLASSES,
        folder=pathlib.Path(folder), watch=preemption.Watch(), recipe=recipe))
  assert len(rows) == 7
  return {'images': count, 'seconds': time.perf_counter() - start, 'GiB before': before,
          'GiB at most': memory()}


def main():
  rows = common.each_alone(__doc__, 'images', [5_000, 20_000], measure)
  if rows is not None:
    common.report('linear_online', 'linear classifiers on a stream of images', rows)


if __name__ == '__main__':
  main()
