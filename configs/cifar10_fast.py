"""CIFAR-10 with the full softmax, tuned for fast training: larger batch, cosine schedule, flips.

    python -m instdisc_jax.main --config=configs/cifar10_fast.py --workdir=runs/cifar10_fast

Cost: 30 epochs, 2,930 steps of 512 images in bfloat16; intended for one GPU. Not yet run to
completion here, so its result is unknown.
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'tfds:cifar10'
  config.model.dtype = 'bfloat16'
  config.batch_size = 512
  config.epochs = 30
  config.optimizer.learning_rate = 0.12
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 2.0
  config.augment.flip = 0.5
  config.knn.every_epochs = 5
  return config
