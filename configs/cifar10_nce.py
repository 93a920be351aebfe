"""CIFAR-10 with noise-contrastive estimation, 4,096 noise samples per image.

    python -m instdisc_jax.main --config=configs/cifar10_nce.py --workdir=runs/cifar10_nce

Z is estimated from the first batch and frozen, as published. The bank is still random then,
so Z is too small for the trained bank; `--config.loss.normalizer=ema` tracks it.

Cost: same as configs/cifar10.py. Published result: 80.4% kNN (paper, Table 1). Not yet run to
completion here.
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'tfds:cifar10'
  config.model.name = 'resnet18_cifar'
  config.loss.name = 'nce'
  config.loss.noise_count = 4096
  config.loss.normalizer = 'first_batch'
  config.loss.temperature = 0.1
  config.batch_size = 128
  config.epochs = 200
  config.optimizer.learning_rate = 0.03
  config.optimizer.milestones = (120, 160)
  config.knn.neighbors = 200
  config.knn.temperature = 0.1
  return config
