"""CIFAR-10 with a small vision transformer: patches of 4 pixels, AdamW with warm-up, flips.

    python -m instdisc_jax.main --config=configs/cifar10_vit.py --workdir=runs/cifar10_vit

Cost: 200 epochs, 19,532 steps of 512 images in bfloat16; intended for one GPU. Not yet run to
completion here, so its result is unknown.
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'tfds:cifar10'
  config.model.name = 'vit_t4'
  config.model.dtype = 'bfloat16'
  config.batch_size = 512
  config.epochs = 200
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 10.0
  config.augment.flip = 0.5
  config.knn.every_epochs = 5
  return config
