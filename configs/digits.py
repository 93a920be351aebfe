"""The demo: instance discrimination on the embedded digits, in minutes on two CPU cores.

    python -m instdisc_jax.main --config=configs/digits.py --workdir=runs/demo
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'digits'
  config.model.name = 'resnet18_cifar'
  config.model.width = 8
  config.batch_size = 128
  config.epochs = 60
  config.knn.neighbors = 20
  config.knn.every_epochs = 5
  config.augment.update(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, grayscale=0.0,
                        mean=(0.2, 0.2, 0.2), std=(0.3, 0.3, 0.3))
  config.optimizer.milestones = (42, 54)
  return config
