"""Your own images: a folder of 200 to 1,000,000 files, with or without classes.

    python -m instdisc_jax.main --config=configs/folder.py --workdir=runs/mine \\
        --config.dataset.name=folder:PATH

Settings left at None are derived from the number of images N (see `config.fill`): the batch size is
the largest power of two up to min(256, N); the epochs cover 40 million images, but are at least 30
and at most 200; the learning rate is 0.03 per 256 images of the batch; K = √N, at most 200. Any of
them can also be set.

Few folders are large enough to train from scratch: `--config.model.init=FILE` starts from weights
in any layout that `instdisc_jax.convert` reads, `--config.model.init=WORKDIR` from an earlier run,
e.g. before images were added.

Cost: intended for a GPU; on a CPU, `--config.augment.size=64` is 12 times cheaper than 224 pixels.
The result depends on the images.
"""

from ml_collections import config_dict

from instdisc_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.dataset.name = 'folder:PATH'
  config.model.name = 'resnet18'
  config.loss.name = 'softmax'
  config.loss.temperature = 0.07
  config.augment.update(config_lib.PHOTOGRAPHS)
  config.optimizer.weight_decay = 1e-4
  config.knn.temperature = 0.07
  config.knn.every_epochs = 10
  config.checkpoint.every_steps = 500
  for part, key in ((config, 'batch_size'), (config, 'epochs'), (config.knn, 'neighbors'),
                    (config.optimizer, 'learning_rate'), (config.optimizer, 'milestones')):
    kind = type(part[key])
    del part[key]
    part[key] = config_dict.placeholder(kind)
  return config
