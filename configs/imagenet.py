"""ImageNet as published: ResNet-50, NCE with 4,096 noise samples, 200 epochs.

    python -m instdisc_jax.main --config=configs/imagenet.py --workdir=runs/imagenet \\
        --config.dataset.data_dir=DIR

`--config=configs/imagenet.py:PRESET[,PRESET]` changes the encoder or the loss:

    resnet18, alexnet, vgg16     the other encoders of the paper
    vit_s16, vit_b16             vision transformers, by AdamW with warm-up
    convnext_t                   ConvNeXt-T, likewise
    softmax                      the exact softmax over all 1,281,167 images
    sampled                      cross-entropy with 65,536 noise samples, the published update

docs/how-to/data.md describes how to prepare the data. Cost: 200 epochs, 1,000,912 steps of 256
images; intended for GPUs or TPUs. Published kNN top-1 of this recipe: ResNet-50 46.8%, ResNet-18
41.0%, VGG16 33.9%, AlexNet 31.3%; linear probe, ResNet-50: 54.0%, with `sampled` 58.5%. Not yet run
here.
"""

from instdisc_jax import config as config_lib
from instdisc_jax.runtime import errors


def _modern(name):
  """A preset of an encoder that SGD does not train well."""
  def change(config):
    config.model.name = name
    config.optimizer.update(name='adamw', learning_rate=1e-4, weight_decay=0.05, schedule='cosine',
                            warmup_epochs=10.0)
  return change


_PRESETS = {
    'resnet50': lambda config: config.model.update(name='resnet50'),
    'resnet18': lambda config: config.model.update(name='resnet18'),
    'alexnet': lambda config: config.model.update(name='alexnet'),
    'vgg16': lambda config: config.model.update(name='vgg16'),
    'vit_s16': _modern('vit_s16'),
    'vit_b16': _modern('vit_b16'),
    'convnext_t': _modern('convnext_t'),
    'nce': lambda config: config.loss.update(name='nce', noise_count=4096),
    'softmax': lambda config: config.loss.update(name='softmax'),
    'sampled': lambda config: config.loss.update(name='sampled_softmax', noise_count=65536),
}


def get_config(presets=''):
  config = config_lib.default()
  config.dataset.name = 'tfds:imagenet2012'
  config.model.name = 'resnet50'
  config.loss.name = 'nce'
  config.loss.noise_count = 4096
  config.loss.temperature = 0.07
  config.batch_size = 256
  config.epochs = 200
  config.optimizer.learning_rate = 0.03
  config.optimizer.weight_decay = 1e-4
  config.optimizer.milestones = (120, 160)
  config.augment.update(config_lib.PHOTOGRAPHS)
  config.knn.neighbors = 200
  config.knn.temperature = 0.07
  config.knn.every_epochs = 5
  config.checkpoint.every_steps = 5000
  for preset in filter(None, presets.split(',')):
    if preset not in _PRESETS:
      raise errors.UserError(f"preset '{preset}'", f'one of {", ".join(_PRESETS)}',
                             'set <--config>=configs/imagenet.py:PRESET', '--config')
    _PRESETS[preset](config)
  return config
