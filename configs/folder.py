"""Your own images: a folder of 200 to 1,000,000 files, with or without classes.

    python -m instdisc_jax.main --config=configs/folder.py --workdir=runs/mine \\
        --config.dataset.name=folder:PATH

Settings left at None are derived from the number of images N and from the device (see
`config.fill`), and any of them can be set:

                        CPU                       GPU, TPU
    model               resnet10, width 16        resnet18, width 64
    views               32 pixels                 224 pixels
    batch size          N / 16, a power of two, at least 16; at most 64 on a CPU, else 256
    epochs              30 to 200, for 40 million images; up to 1,000, for 10,000 steps
    minutes             60 at most                any

Crops cover at least 0.4 of an image, not 0.2 as for ImageNet: few images have no need of more
variation. docs/results/small-folders.md tells what that reaches on four folders.

With good weights at hand, start from them, or use them without training:
`--config.model.init=FILE` reads any layout that `instdisc_jax.convert` does, and
`--config.model.init=WORKDIR` an earlier run, e.g. before images were added.
"""

from ml_collections import config_dict

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'folder:PATH'
  config.loss.name = 'softmax'
  config.loss.temperature = 0.1
  config.augment.update(config_lib.PHOTOGRAPHS)
  config.augment.crop_scale = (0.4, 1.0)
  config.optimizer.schedule = 'cosine'
  config.optimizer.weight_decay = 1e-4
  config.knn.temperature = 0.07
  config.knn.every_epochs = 10
  config.checkpoint.every_steps = 500
  for part, names in ((config, ('batch_size', 'epochs')), (config.knn, ('neighbors',)),
                      (config.model, ('name', 'width')), (config.augment, ('size',)),
                      (config.optimizer, ('learning_rate', 'milestones'))):
    for name in names:
      kind = type(part[name])
      del part[name]
      part[name] = config_dict.placeholder(kind)
  return config
