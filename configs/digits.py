"""The demo: instance discrimination on the embedded digits, in two minutes on two CPU cores.

    python -m instdisc_jax.main --config=configs/digits.py --workdir=runs/demo

Cost: 100 epochs, 1,014 steps; 2 minutes. Result, kNN top-1 for seed 0: 0.836, against 0.636 for raw
pixels and 0.392 untrained.

A narrow ResNet-10 with the ImageNet stem: the digits are enlarged 8x8 drawings, so its early
pooling loses little, and at equal cost it trains faster and to higher accuracy than the CIFAR stem.
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'digits'
  config.dataset.order = 'permutation'  # as when the figures of the documents were measured
  config.model.name = 'resnet10'
  config.model.width = 16
  # Used only by the losses that draw noise samples. A Z estimated on the initial, random bank is
  # far too small for a short run; one that tracks the batch lets a proximal term collapse the
  # features.
  config.loss.noise_count = 512
  config.loss.normalizer = '30000'
  config.batch_size = 128
  config.epochs = 100
  config.optimizer.milestones = (70, 90)
  config.augment.update(brightness=0.4, contrast=0.4, saturation=0.0, hue=0.0, grayscale=0.0,
                        mean=(0.2, 0.2, 0.2), std=(0.3, 0.3, 0.3))  # gray images
  config.knn.neighbors = 20
  config.knn.every_epochs = 5
  config.checkpoint.every_steps = 200
  return config
