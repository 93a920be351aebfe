"""The configuration: every setting with its default, and what values it may have.

A file in `configs/` starts from `default()` and sets what its recipe needs. Anything can be
overridden on the command line: `--config.loss.temperature=0.1`.
"""

import math

import jax
from ml_collections import config_dict

from instdisc_jax import errors, models, train


def default():
  """The published CIFAR-10 settings; returns a `ConfigDict` with every key there is."""
  config = config_dict.ConfigDict()
  config.seed = 0
  config.batch_size = 128  # B, over all devices
  config.accumulate_steps = 1  # parts of the batch whose gradients are summed, to save memory
  config.epochs = 200
  config.steps = config_dict.placeholder(int)  # in place of epochs
  config.steps_per_dispatch = config_dict.placeholder(int)  # None: 1 on CPU, else 100
  config.deterministic = False  # on GPU: the same bits from run to run, at some cost in speed
  config.log_every_steps = 100  # within an epoch; its end is logged anyway
  config.profile_steps = config_dict.placeholder(int)  # how many to trace; None: none

  config.dataset = config_dict.ConfigDict()
  config.dataset.name = 'digits'  # digits, tfds:NAME, folder:PATH, arrays:FILE.npz or fake:N
  config.dataset.data_dir = config_dict.placeholder(str)  # of TFDS; None for its own default
  config.dataset.limit = config_dict.placeholder(int)  # a seeded subset of that many images
  config.dataset.validation = config_dict.placeholder(str)  # a split, a folder, or a share as 0.1
  config.dataset.on_unreadable = 'error'  # of a folder's files; or skip: leave them out
  config.dataset.path = 'auto'  # resident on the device, or stream from the host
  config.dataset.resident_share = 0.25  # of a device's memory, up to which auto is resident
  config.dataset.workers = config_dict.placeholder(int)  # reading processes; None: CPUs - 2

  config.model = config_dict.ConfigDict()
  config.model.name = 'resnet18_cifar'
  config.model.width = 64
  config.model.embedding_dim = 128  # D
  config.model.sync_batch_norm = False
  config.model.init = config_dict.placeholder(str)  # weights to start from: a file or a workdir
  config.model.dtype = 'float32'  # of the computation; parameters are float32

  config.loss = config_dict.ConfigDict()
  config.loss.name = 'softmax'
  config.loss.temperature = 0.1  # τ
  config.loss.noise_count = 4096  # M, of nce and sampled_softmax
  config.loss.shared_noise = False  # one draw of M rows a step for all images
  config.loss.normalizer = 'first_batch'  # Z of nce: first_batch, ema, or a number
  config.loss.normalizer_decay = 0.99  # of ema, per step
  config.loss.proximal_weight = 0.0  # λ
  config.loss.block_rows = config_dict.placeholder(int)  # rows scored at once; None: by memory

  config.bank = config_dict.ConfigDict()
  config.bank.momentum = 0.5  # m
  config.bank.dtype = 'float32'
  config.bank.init = 'uniform'  # as published, or 'unit' for random unit vectors

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.learning_rate = 0.03
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 5e-4
  config.optimizer.schedule = 'milestones'  # or cosine: a linear rise, then half a cosine to 0
  config.optimizer.warmup_epochs = 0.0  # of cosine
  config.optimizer.milestones = (120, 160)  # epochs
  config.optimizer.milestone_factor = 0.1

  config.augment = config_dict.ConfigDict()
  config.augment.size = config_dict.placeholder(int)  # side of views; None: the images', or 224
  config.augment.crop_scale = (0.2, 1.0)  # share of the area
  config.augment.crop_ratio = (3 / 4, 4 / 3)  # width over height
  config.augment.brightness = 0.4
  config.augment.contrast = 0.4
  config.augment.saturation = 0.4
  config.augment.hue = 0.4
  config.augment.grayscale = 0.2  # probability
  config.augment.grayscale_first = False  # before brightness to hue, as for ImageNet
  config.augment.flip = 0.0  # probability
  config.augment.mean = (0.4914, 0.4822, 0.4465)
  config.augment.std = (0.2023, 0.1994, 0.2010)

  config.knn = config_dict.ConfigDict()
  config.knn.neighbors = 200  # K
  config.knn.temperature = 0.1
  config.knn.every_epochs = 1  # 0: only at the end
  config.knn.recall_target = config_dict.placeholder(float)  # of a TPU's search; None: exact

  config.checkpoint = config_dict.ConfigDict()
  config.checkpoint.every_steps = 1000
  config.checkpoint.keep = 3
  return config


# For photographs, in the published ImageNet order: augment settings.
PHOTOGRAPHS = dict(size=224, grayscale_first=True, flip=0.5, mean=(0.485, 0.456, 0.406),
                   std=(0.229, 0.224, 0.225))

# Settings that may change between two calls on one workdir: they leave what was trained untouched.
CHANGEABLE = ('epochs', 'steps', 'steps_per_dispatch', 'log_every_steps', 'profile_steps',
              'dataset.data_dir', 'dataset.workers', 'dataset.resident_share',
              'knn.neighbors', 'knn.temperature', 'knn.every_epochs', 'knn.recall_target',
              'checkpoint.every_steps', 'checkpoint.keep')


def _one_of(*values):
  return lambda v: v in values, ' or '.join(map(str, values))


def _within(low, high):
  return lambda v: low <= v <= high, f'from {low} to {high}'


def _at_least(low):
  return lambda v: v >= low, f'at least {low}'


_above_zero = lambda v: 0 < v < math.inf, 'above 0'
_non_negative = lambda v: 0 <= v < math.inf, '0 or above'
_pair = lambda v: len(v) == 2 and 0 < v[0] <= v[1], 'two numbers above 0, the smaller first'

_REQUIRED = {
    'seed': _within(0, 2**32 - 1),
    'batch_size': _at_least(1),
    'accumulate_steps': _at_least(1),
    'epochs': _at_least(1),
    'steps': _at_least(1),
    'steps_per_dispatch': _at_least(1),
    'log_every_steps': _at_least(1),
    'profile_steps': _at_least(1),
    'dataset.limit': _at_least(2),
    'dataset.on_unreadable': _one_of('error', 'skip'),
    'dataset.path': _one_of('auto', 'resident', 'stream'),
    'dataset.resident_share': _within(0, 1),
    'dataset.workers': _at_least(0),
    'augment.size': _at_least(8),
    'model.name': _one_of(*models.NAMES),
    'model.width': _at_least(1),
    'model.embedding_dim': _at_least(1),
    'model.dtype': _one_of('float32', 'bfloat16', 'float64'),
    'loss.name': _one_of(*train.LOSS_NAMES),
    'loss.temperature': _above_zero,
    'loss.noise_count': _at_least(1),
    'loss.normalizer_decay': _within(0, 1),
    'loss.proximal_weight': _non_negative,
    'loss.block_rows': _at_least(1),
    'bank.momentum': _within(0, 1),
    'bank.dtype': _one_of('float32', 'bfloat16', 'float64'),
    'bank.init': _one_of('uniform', 'unit'),
    'optimizer.learning_rate': _above_zero,
    'optimizer.momentum': (lambda v: 0 <= v < 1, 'at least 0 and below 1'),
    'optimizer.weight_decay': _non_negative,
    'optimizer.schedule': _one_of('milestones', 'cosine'),
    'optimizer.warmup_epochs': _non_negative,
    'optimizer.milestones': (lambda v: all(a > 0 for a in v), 'epochs above 0'),
    'optimizer.milestone_factor': _above_zero,
    'augment.crop_scale': (lambda v: _pair[0](v) and v[1] <= 1, _pair[1] + ', at most 1'),
    'augment.crop_ratio': _pair,
    'augment.brightness': _non_negative,
    'augment.contrast': _non_negative,
    'augment.saturation': _non_negative,
    'augment.hue': _within(0, 0.5),
    'augment.grayscale': _within(0, 1),
    'augment.flip': _within(0, 1),
    'augment.mean': (lambda v: len(v) == 3, 'three numbers'),
    'augment.std': (lambda v: len(v) == 3 and min(v) > 0, 'three numbers above 0'),
    'knn.neighbors': _at_least(1),
    'knn.temperature': (lambda v: 0.02 <= v < math.inf, 'at least 0.02, where exp(1/τ) is finite'),
    'knn.every_epochs': _at_least(0),
    'knn.recall_target': (lambda v: 0 < v <= 1, 'above 0, at most 1'),
    'checkpoint.every_steps': _at_least(1),
    'checkpoint.keep': _at_least(1),
}


def validate(config):
  """Checks every value that can be checked before any data is read.

  Args:
    config: a `ConfigDict` with the keys of `default()`.

  Raises:
    errors.UserError: naming the first key out of range, its value, and what it must be.
  """
  fallback = flatten(default())
  found = flatten(config)
  for key in found.keys() - fallback.keys():
    raise errors.UserError(f"unknown setting '{key}': remove it from the configuration")
  for key in fallback.keys() - found.keys():
    raise errors.UserError(f"setting '{key}' is missing: set --config.{key}={fallback[key]}")
  for key, (holds, requirement) in _REQUIRED.items():
    value = found[key]
    if value is not None and not _holds(holds, value):
      raise errors.UserError(f"{key} is {value}, must be {requirement}: set --config.{key}, "
                             f'e.g. --config.{key}={plain(fallback[key])}')
  for key in ('model.dtype', 'bank.dtype'):
    if found[key] == 'float64' and not jax.config.jax_enable_x64:
      raise errors.UserError(f'{key} is float64, which needs JAX_ENABLE_X64=1 in the environment: '
                             f'set that, or --config.{key}=float32')
  if (config.optimizer.schedule == 'cosine' and config.epochs is not None
      and config.optimizer.warmup_epochs >= config.epochs):
    raise errors.UserError(
        f'optimizer.warmup_epochs is {config.optimizer.warmup_epochs}, must be below the '
        f'{config.epochs} epochs: set --config.optimizer.warmup_epochs')
  normalizer = config.loss.normalizer
  if normalizer not in ('first_batch', 'ema') and not _is_positive_number(normalizer):
    raise errors.UserError(f'loss.normalizer is {normalizer}, must be first_batch, ema or a number '
                           'above 0: set --config.loss.normalizer=first_batch')


def fill(config, num_rows):
  """A copy of `config` with the settings that are None derived from the number of images.

  Args:
    config: a valid `ConfigDict`.
    num_rows: N.

  Returns:
    The copy: batch_size the largest power of two up to N and 256; epochs such that 40 million
    images are seen, from 30 to 200; optimizer.learning_rate the published 0.03 for 256 images;
    milestones at 60 and 80% of the epochs; knn.neighbors √N, at most 200.
  """
  config = config.copy_and_resolve_references()
  if config.batch_size is None:
    config.batch_size = min(256, 2 ** (num_rows.bit_length() - 1))
  if config.epochs is None:
    config.epochs = min(200, max(30, round(40e6 / num_rows)))
  if config.optimizer.learning_rate is None:
    config.optimizer.learning_rate = 0.03 * config.batch_size / 256
  if config.optimizer.milestones is None:
    config.optimizer.milestones = (round(0.6 * config.epochs), round(0.8 * config.epochs))
  if config.knn.neighbors is None:
    config.knn.neighbors = min(200, max(1, math.isqrt(num_rows)))
  return config


def validate_for_data(config, num_rows, view_size, num_devices):
  """Checks what depends on the data set and the machine.

  Args:
    config: a valid `ConfigDict`, filled.
    num_rows: N.
    view_size: (height, width) of the views.
    num_devices: of the mesh.

  Raises:
    errors.UserError: naming the key, its value, and what it must be.
  """
  if num_rows < 2:
    raise errors.UserError(f'dataset.name is {config.dataset.name} with {num_rows} training image, '
                           'must have at least 2: set --config.dataset.name to a larger set')
  side = min(view_size)
  if side < models.SMALLEST_SIDE.get(config.model.name, 1):
    raise errors.UserError(
        f'model.name is {config.model.name}, must be one for images of {side} pixels (it needs '
        f'{models.SMALLEST_SIDE[config.model.name]}): set --config.model.name=resnet18_cifar, or '
        '--config.augment.size')
  if config.dataset.path == 'stream' and view_size[0] != view_size[1]:
    raise errors.UserError(f'augment.size is not set, and the images of {config.dataset.name} have '
                           f'{view_size[0]} x {view_size[1]} pixels, must be square to be streamed '
                           'as they are: set --config.augment.size')
  if config.batch_size > num_rows:
    raise errors.UserError(
        f'batch_size is {config.batch_size}, must be at most the {num_rows} training images: '
        f'set --config.batch_size={num_rows // num_devices * num_devices or num_devices}')
  parts = num_devices * config.accumulate_steps
  if config.batch_size % parts:
    times = '' if config.accumulate_steps == 1 else (
        f' times accumulate_steps = {config.accumulate_steps}')
    raise errors.UserError(
        f'batch_size is {config.batch_size}, must be a multiple of the {num_devices} devices{times}'
        f': set --config.batch_size={-(-config.batch_size // parts) * parts}')
  if config.knn.neighbors > num_rows:
    raise errors.UserError(
        f'knn.neighbors is {config.knn.neighbors}, must be at most the {num_rows} training images: '
        f'set --config.knn.neighbors={min(20, num_rows)}')


def flatten(config, prefix=''):
  """Nested settings -> {'loss.temperature': 0.1, ...}."""
  flat = {}
  for key, value in config.items():
    if hasattr(value, 'items'):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def _holds(holds, value):
  try:
    return holds(value)
  except TypeError:  # a tuple of other things than numbers
    return False


def plain(value):
  """A setting as JSON can hold it."""
  return list(value) if isinstance(value, tuple) else value


def _is_positive_number(text):
  try:
    return 0 < float(text) < math.inf
  except ValueError:
    return False
