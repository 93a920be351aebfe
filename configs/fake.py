"""Noise generated on the devices, at ImageNet resolution, to measure a step without its input.

    python -m instdisc_jax.main --config=configs/fake.py --workdir=runs/fake

`--config.dataset.name=fake:N` sets the number of images, and thus of bank rows. Cost: 100
steps of 256 images, then N embeddings for the evaluation, which reads noise from the host. The
images have no labels, so there is no accuracy.
"""

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'fake:2000'
  config.model.name = 'resnet50'
  config.model.dtype = 'bfloat16'
  config.loss.name = 'softmax'
  config.loss.temperature = 0.07
  config.batch_size = 256
  config.steps = 100
  config.log_every_steps = 10
  config.augment.update(config_lib.PHOTOGRAPHS)
  return config
