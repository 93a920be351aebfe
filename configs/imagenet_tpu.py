"""ImageNet on a slice of a TPU pod: ResNet-50, exact softmax over all images, batches of 4,096.

    python -m instdisc_jax.main --distributed --config=configs/imagenet_tpu.py \\
        --workdir=gs://BUCKET/imagenet --config.dataset.data_dir=DIR

The learning rate scales with the batch (0.03 per 256 images), warms up over 10 epochs and then
follows a cosine decay. Convolutions and the rows of the bank are in bfloat16; sums, parameters and
statistics are in float32. The 1,281,167 rows are sharded over all chips. `launch/tpu_vm.sh` starts
the run on all hosts and mounts a disk with the data there (`--data-disk`); docs/how-to/data.md
describes how to prepare it.

Cost: 200 epochs, 62,557 steps, intended for 32 to 256 chips. Not yet run: no result is known.
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'tfds:imagenet2012'
  config.dataset.workers = 16
  config.model.name = 'resnet50'
  config.model.dtype = 'bfloat16'
  config.bank.dtype = 'bfloat16'
  config.loss.name = 'softmax'
  config.loss.temperature = 0.07
  config.batch_size = 4096
  config.epochs = 200
  config.optimizer.learning_rate = 0.03 * 4096 / 256
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup_epochs = 10.0
  config.optimizer.weight_decay = 1e-4
  config.augment.update(config_lib.PHOTOGRAPHS)
  config.knn.temperature = 0.07
  config.knn.every_epochs = 10
  config.checkpoint.every_steps = 1000
  return config
