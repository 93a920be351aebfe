"""CIFAR-10 with what was found to help: two views of each image, flips, a cosine schedule.

    python -m instdisc_jax.main --config=configs/cifar10_plus.py --workdir=runs/cifar10_plus

Cost: 200 epochs, 78,125 steps of 128 images in two views each, twice that of configs/cifar10.py;
intended for one GPU.
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'tfds:cifar10'
  config.augment.flip = 0.5
  config.loss.views = 2
  config.optimizer.schedule = 'cosine'
  return config
