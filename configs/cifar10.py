"""CIFAR-10 with the full softmax, as published.

    python -m instdisc_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

Cost: 200 epochs, 78,125 steps of 128 images; intended for one GPU. Published result of this recipe:
80.8% kNN (paper, Table 1). Not yet run to completion here.
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'tfds:cifar10'
  config.model.name = 'resnet18_cifar'
  config.loss.name = 'softmax'
  config.loss.temperature = 0.1
  config.batch_size = 128
  config.epochs = 200
  config.optimizer.learning_rate = 0.03
  config.optimizer.milestones = (120, 160)
  config.knn.neighbors = 200
  config.knn.temperature = 0.1
  return config
