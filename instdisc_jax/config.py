"""The configuration: one table with every setting, its default, its limits and its meaning.

A file in `configs/` starts from `default()` and sets what its recipe needs. Any setting can be
overridden on the command line: `--config.loss.temperature=0.1`.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import jax
from ml_collections import config_dict

from instdisc_jax.runtime import errors, tracker

Config: TypeAlias = Any  # a `ConfigDict`, whose settings no type checker knows

# A test checks these against the models and losses.
MODELS = ('alexnet', 'convnext_t', 'resnet10', 'resnet101', 'resnet101_cifar', 'resnet10_cifar',
          'resnet18', 'resnet18_cifar', 'resnet34', 'resnet34_cifar', 'resnet50', 'resnet50_cifar',
          'vgg16', 'vgg16_bn', 'vit_b14', 'vit_b16', 'vit_s14', 'vit_s16', 'vit_t4')
SMALLEST_SIDE = {'alexnet': 63, 'vgg16': 32, 'vgg16_bn': 32, 'convnext_t': 32, 'vit_t4': 4,
                 'vit_s16': 16, 'vit_b16': 16, 'vit_s14': 14, 'vit_b14': 14}  # in pixels; else any
LOSSES = ('softmax', 'nce', 'sampled_softmax', 'parametric_softmax', 'triplet')
SAMPLED_LOSSES = ('nce', 'sampled_softmax')
_DTYPES = ('float32', 'bfloat16', 'float64')
MOST_ROWS = 2**31 - 1  # row indices are int32
CPU_SIDE, CPU_MINUTES = 32, 60.0  # of a run on a folder whose view size and length are not set


class Limit(NamedTuple):
  """The values that a setting may take: a predicate, and its wording."""
  holds: Callable[[Any], bool]
  text: str


@dataclasses.dataclass(frozen=True)
class Setting:
  """One setting.

  Attributes:
    key: its name, e.g. 'loss.temperature'.
    default: its value in `default()`; None where it is derived or unused unless set.
    meaning: what it does, for --help and the documentation.
    limit: the values it may take; None for any.
    kind: the type of a setting whose default is None.
    changeable: whether it may differ when a run is resumed, because training does not depend on it.
  """
  key: str
  default: Any
  meaning: str
  limit: Limit | None = None
  kind: type | None = None
  changeable: bool = False

  @property
  def requirement(self) -> str:
    """The values it may take, in words; '' for any."""
    return '' if self.limit is None else self.limit.text

  @property
  def remedy(self) -> str:
    """How to correct an invalid value, see `errors.UserError`."""
    if self.default is None:
      return f'set <{self.key}>, or leave it out'
    example = f"'{self.default}'" if isinstance(self.default, tuple) else self.default
    return f'set <{self.key}>, e.g. <{self.key}>={example}'


def _one_of(*values):
  words = ', '.join(map(str, values[:-1])) + f' or {values[-1]}'
  return Limit(lambda v: v in values, words)


def _within(low, high):
  return Limit(lambda v: low <= v <= high, f'from {low} to {high}')


def _at_least(low):
  return Limit(lambda v: v >= low, f'at least {low}')


_ABOVE_ZERO = Limit(lambda v: 0 < v < math.inf, 'above 0')
_NON_NEGATIVE = Limit(lambda v: 0 <= v < math.inf, '0 or above')
_PAIR = Limit(lambda v: len(v) == 2 and 0 < v[0] <= v[1], 'two numbers above 0, the smaller first')
_SHARES = Limit(lambda v: _PAIR.holds(v) and v[1] <= 1,
                'two numbers above 0 and at most 1, the smaller first')
_NORMALIZER = Limit(lambda v: v in ('first_batch', 'ema') or _is_positive_number(v),
                    'first_batch, ema or a number above 0')

SETTINGS = (
    Setting('seed', 0, 'seed of all random numbers', _within(0, 2**32 - 1)),
    Setting('batch_size', 128, 'batch size B, over all devices', _at_least(1)),
    Setting('accumulate_steps', 1, 'parts of the batch whose gradients are summed, to save memory',
            _at_least(1)),
    Setting('epochs', 200, 'length of the run in epochs', _at_least(1), changeable=True),
    Setting('steps', None, 'length of the run in steps; overrides epochs', _at_least(1), int,
            changeable=True),
    Setting('minutes', None, 'length of the run in minutes; epochs and steps are derived from it, '
            'once, by timing a few steps', _ABOVE_ZERO, float),
    Setting('steps_per_dispatch', None, 'steps per dispatch for resident images; None: 1 on CPU, '
            'else 100', _at_least(1), int, changeable=True),
    Setting('deterministic', False, 'the same bits from run to run on GPU, at some cost in speed'),
    Setting('log_every_steps', 100, 'log interval in steps; the end of an epoch is always logged',
            _at_least(1), changeable=True),
    Setting('tracker', None, 'shows the metrics beside those of other runs; None: only the files '
            'of the workdir', _one_of(*tracker.NAMES), str, changeable=True),
    Setting('profile_steps', None, 'steps to trace for the profiler; None: no trace', _at_least(1),
            int, changeable=True),

    Setting('dataset.name', 'digits', 'the data set: digits, tfds:NAME, folder:PATH, '
            'arrays:FILE.npz or fake:N'),
    Setting('dataset.data_dir', None, 'folder of prepared TFDS data; None: the default of TFDS',
            kind=str, changeable=True),
    Setting('dataset.limit', None, 'train on a seeded subset of this many images', _at_least(2),
            int),
    Setting('dataset.validation', None, 'images to evaluate on: a split, a folder, or a share such '
            'as 0.1', kind=str),
    Setting('dataset.order', 'keyed', 'how an epoch is shuffled: keyed (computed place by place) '
            'or permutation (an array of N numbers in every process, as in version 0.1)',
            _one_of('keyed', 'permutation')),
    Setting('dataset.on_unreadable', 'error', 'what to do with unreadable files in a folder: stop, '
            'or skip them', _one_of('error', 'skip')),
    Setting('dataset.path', 'auto', 'where images are kept during training: resident on the '
            'device, or streamed from the host', _one_of('auto', 'resident', 'stream')),
    Setting('dataset.resident_share', 0.25, 'share of the device memory up to which auto means '
            'resident', _within(0, 1), changeable=True),
    Setting('dataset.workers', None, 'worker processes that read images; None: number of CPUs '
            '- 2, at most 16',
            _at_least(0), int, changeable=True),

    Setting('model.name', 'resnet18_cifar', 'the encoder', _one_of(*MODELS)),
    Setting('model.width', 64, 'channels of the first stage', _at_least(1)),
    Setting('model.embedding_dim', 128, 'D, the size of the embedding', _at_least(1)),
    Setting('model.head', 'linear', 'from pooled features to the embedding: a linear layer, or '
            'two with a ReLU between them', _one_of('linear', 'mlp')),
    Setting('model.sync_batch_norm', False, 'compute batch statistics over all devices instead of '
            'per device'),
    Setting('model.init', None, 'weights to start from: a file or the workdir of a run', kind=str),
    Setting('model.dtype', 'float32', 'dtype of the computation; parameters stay float32',
            _one_of(*_DTYPES)),
    Setting('model.reduce_dtype', None, 'dtype in which devices sum gradients; None: float32, '
            'or float64 if model.dtype is. Batch statistics are never summed in less',
            _one_of(*_DTYPES), str),

    Setting('loss.name', 'softmax', 'the loss', _one_of(*LOSSES)),
    Setting('loss.temperature', 0.1, 'temperature τ', _ABOVE_ZERO),
    Setting('loss.noise_count', 4096, 'M, noise samples per image for nce, sampled_softmax and '
            'a triplet of sampled rows', _at_least(1)),
    Setting('loss.shared_noise', False, 'share one draw of M rows per step among all images'),
    Setting('loss.normalizer', 'first_batch', 'Z of nce: estimated from the first batch, an '
            'exponential moving average, or a number', _NORMALIZER),
    Setting('loss.normalizer_decay', 0.99, 'decay per step of the moving average', _within(0, 1)),
    Setting('loss.proximal_weight', 0.0, 'weight λ of the proximal term', _NON_NEGATIVE),
    Setting('loss.views', 1, 'views of each image per step; of two, each must also '
            'recognize the other', _one_of(1, 2)),
    Setting('loss.neighbors', 0, 'rows nearest to a feature that are positives too, with softmax',
            _at_least(0)),
    Setting('loss.neighbors_from_epoch', 10.0, 'epoch from which neighbors are positives',
            _NON_NEGATIVE),
    Setting('loss.margin', 0.2, 'margin of triplet, in cosines', _within(0, 2)),
    Setting('loss.mining', 'semi_hard', 'negatives of triplet: the most similar row, the most '
            "similar below the image's own, or sampled rows",
            _one_of('hardest', 'semi_hard', 'sampled')),
    Setting('loss.kernel', 'auto', 'how softmax passes over the bank: xla (anywhere), cudnn '
            '(NVIDIA, 16 bits), pallas (TPU), or auto', _one_of('auto', 'xla', 'cudnn', 'pallas'),
            changeable=True),
    Setting('loss.block_rows', None, 'rows of the bank that xla scores at once; None: what is '
            'fastest on the platform', _at_least(1), int),

    Setting('bank.momentum', 0.5, 'momentum m of the moving average of each row', _within(0, 1)),
    Setting('bank.dtype', 'float32', 'dtype of the rows', _one_of('float16', *_DTYPES)),
    Setting('bank.init', 'uniform', 'initial rows: as published, or random unit vectors',
            _one_of('uniform', 'unit')),

    Setting('optimizer.name', 'sgd', 'the optimizer: sgd with momentum, as published, or adamw',
            _one_of('sgd', 'adamw')),
    Setting('optimizer.learning_rate', 0.03, 'learning rate, before any decay', _ABOVE_ZERO),
    Setting('optimizer.momentum', 0.9, 'momentum of sgd, β1 of adamw',
            Limit(lambda v: 0 <= v < 1, 'at least 0 and below 1')),
    Setting('optimizer.weight_decay', 5e-4, 'weight decay: of all parameters with sgd, of kernels '
            'with adamw', _NON_NEGATIVE),
    Setting('optimizer.schedule', 'milestones', 'step decay at the milestones, or linear warm-up '
            'and cosine decay to 0', _one_of('milestones', 'cosine')),
    Setting('optimizer.warmup_epochs', 0.0, 'warm-up of the cosine schedule, in epochs',
            _NON_NEGATIVE),
    Setting('optimizer.milestones', (120, 160), 'epochs at which the learning rate decays',
            Limit(lambda v: all(a > 0 for a in v), 'epochs above 0')),
    Setting('optimizer.milestone_factor', 0.1, 'learning rate factor at each milestone',
            _ABOVE_ZERO),

    Setting('augment.size', None, 'side of the views in pixels; None: the size of the images, '
            'or 224', _at_least(8), int),
    Setting('augment.crop_scale', (0.2, 1.0), 'area of a crop as a share of the image', _SHARES),
    Setting('augment.crop_ratio', (3 / 4, 4 / 3), 'aspect ratio of a crop, width over height',
            _PAIR),
    Setting('augment.brightness', 0.4, 'strength of the brightness jitter', _NON_NEGATIVE),
    Setting('augment.contrast', 0.4, 'strength of the contrast jitter', _NON_NEGATIVE),
    Setting('augment.saturation', 0.4, 'strength of the saturation jitter', _NON_NEGATIVE),
    Setting('augment.hue', 0.4, 'strength of the hue jitter, in turns', _within(0, 0.5)),
    Setting('augment.grayscale', 0.2, 'probability of grayscale', _within(0, 1)),
    Setting('augment.grayscale_first', False, 'apply grayscale before the color jitter, as for '
            'ImageNet'),
    Setting('augment.flip', 0.0, 'probability of a horizontal flip', _within(0, 1)),
    Setting('augment.mean', (0.4914, 0.4822, 0.4465), 'channel means of images in [0, 1]',
            Limit(lambda v: len(v) == 3, 'three numbers')),
    Setting('augment.std', (0.2023, 0.1994, 0.2010), 'channel standard deviations',
            Limit(lambda v: len(v) == 3 and min(v) > 0, 'three numbers above 0')),

    Setting('knn.neighbors', 200, 'number of neighbors K', _at_least(1), changeable=True),
    Setting('knn.temperature', 0.1, 'temperature τ of the vote',
            Limit(lambda v: 0.02 <= v < math.inf, 'at least 0.02, where exp(1/τ) is finite'),
            changeable=True),
    Setting('knn.every_epochs', 1, 'evaluation interval in epochs; 0: only at the end',
            _at_least(0), changeable=True),
    Setting('knn.recall_target', None, 'recall of an approximate search on TPU; None: exact',
            Limit(lambda v: 0 < v <= 1, 'above 0, at most 1'), float, changeable=True),

    Setting('checkpoint.every_steps', 1000, 'checkpoint interval in steps', _at_least(1),
            changeable=True),
    Setting('checkpoint.every_minutes', 5.0, 'minutes since the last checkpoint after which one is '
            'saved even before every_steps; 0: never', _NON_NEGATIVE, changeable=True),
    Setting('checkpoint.keep', 3, 'number of checkpoints to keep', _at_least(1), changeable=True),
)
_BY_KEY = {setting.key: setting for setting in SETTINGS}

# What settings added since version 0.1 amount to in its runs: {key: (settings) -> value}.
_EARLIER: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    'dataset.order': lambda settings: 'permutation',
    'model.reduce_dtype': lambda settings: settings['model.dtype'],
    'loss.kernel': lambda settings: 'xla',
}

# Settings of the model, loss and bank that suit a machine, not a run.
_OF_THE_MACHINE = {'model.init', 'model.dtype', 'model.reduce_dtype', 'loss.kernel',
                   'loss.block_rows', 'bank.dtype'}

# The parts of the configuration that make the method: what a run lacks of them had its default.
_METHOD = 'model', 'loss', 'bank', 'optimizer', 'augment'

# Augment settings for photographs, in the published ImageNet order.
PHOTOGRAPHS = dict(size=224, grayscale_first=True, flip=0.5, mean=(0.485, 0.456, 0.406),
                   std=(0.229, 0.224, 0.225))


def default() -> Config:
  """The published CIFAR-10 settings, a `ConfigDict` with every key."""
  config: Config = config_dict.ConfigDict()
  for setting in SETTINGS:
    part, _, name = setting.key.rpartition('.')
    if part and part not in config:
      config[part] = config_dict.ConfigDict()
    place = config[part] if part else config
    place[name] = (setting.default if setting.kind is None
                   else config_dict.placeholder(setting.kind))
  return config


def draws_noise(loss: Config) -> bool:
  """Whether a loss, given by its settings, draws noise samples."""
  return loss.name in SAMPLED_LOSSES or (loss.name, loss.mining) == ('triplet', 'sampled')


def changeable(settings: Mapping[str, Any]) -> frozenset[str]:
  """The settings that may change when a run with these `settings` (see `flatten`) is resumed."""
  keys = {setting.key for setting in SETTINGS if setting.changeable}
  if settings['optimizer.schedule'] == 'cosine':  # its decay ends with the run
    keys -= {'epochs', 'steps'}
  return frozenset(keys)


def validate(config: Config) -> None:
  """Checks everything that can be checked before any data is read.

  Args:
    config: a `ConfigDict` with the keys of `default()`.

  Raises:
    errors.UserError: names the first invalid setting, its value, and the requirement.
  """
  found = flatten(config)
  for key in found.keys() - _BY_KEY.keys():
    raise errors.UserError(f"unknown setting '{key}'", remedy='remove it from the configuration',
                           setting=key)
  for key in _BY_KEY.keys() - found.keys():
    raise errors.UserError(f"setting '{key}' is missing", setting=key,
                           remedy=f'set <{key}>={_BY_KEY[key].default}')
  for setting in SETTINGS:
    _check(setting, found[setting.key])
  options: Any = jax.config
  for key in ('model.dtype', 'model.reduce_dtype', 'bank.dtype'):
    if found[key] == 'float64' and not options.jax_enable_x64:
      raise errors.UserError(
          f'{key} is float64, which needs JAX_ENABLE_X64=1 in the environment', setting=key,
          remedy=f'set that, or <{key}>=float32')
  for key in ('loss.views', 'loss.neighbors'):
    if found[key] != _BY_KEY[key].default and config.loss.name != 'softmax':
      raise errors.UserError(f'{key} is {found[key]}',
                             f'{_BY_KEY[key].default} for loss.name={config.loss.name}',
                             f'set <{key}>={_BY_KEY[key].default}, or <loss.name>=softmax', key)
  if config.optimizer.name == 'adamw' and config.loss.name == 'parametric_softmax':
    raise errors.UserError('optimizer.name is adamw', 'sgd for loss.name=parametric_softmax',
                           'set <optimizer.name>=sgd', 'optimizer.name')
  if (config.optimizer.schedule == 'cosine' and config.epochs is not None
      and config.optimizer.warmup_epochs >= config.epochs):
    raise errors.UserError(
        f'optimizer.warmup_epochs is {config.optimizer.warmup_epochs}',
        f'below the {config.epochs} epochs', setting='optimizer.warmup_epochs')


def _check(setting: Setting, value: Any) -> None:
  """Raises `errors.UserError` if a setting is out of range."""
  if setting.limit is None or value is None:
    return
  try:
    holds = setting.limit.holds(value)
  except TypeError:  # a tuple of something other than numbers
    holds = False
  if not holds:
    raise errors.UserError(f'{setting.key} is {value}', setting.limit.text, setting.remedy,
                           setting.key)


def fill(config: Config, num_rows: int, on_cpu: bool = False,
         stored: Mapping[str, Any] | None = None) -> Config:
  """A copy of `config` with its None settings derived from the number of images and the device.

  Args:
    config: a valid `ConfigDict`.
    num_rows: N.
    on_cpu: whether it will be trained on CPUs, where a run whose length is not set ends after
      `CPU_MINUTES`, and the images of a folder have views of `CPU_SIDE` pixels.
    stored: the settings of the run that is resumed; what was derived for it stays.

  Returns:
    The copy. batch_size is the largest power of two up to N / 16, at least 16 and at most 256 (on
    CPUs 64); epochs cover 40 million images, but are at least 30 and at most 200, and 10,000 steps
    if that takes at most 1000; optimizer.learning_rate is 0.03, less in proportion for batches
    below 64; the milestones are at 60 and 80% of the epochs; knn.neighbors is √N, at most 200;
    model is resnet10 of width 16 on CPUs, else resnet18 of width 64; augment.size is 32 or 224 for
    a folder whose images are streamed.
  """
  stored, asked = stored or {}, flatten(config)
  config = config.copy_and_resolve_references()

  def derive(key, value):
    if asked[key] is None:
      found = stored.get(key, value)
      config.update_from_flattened_dict({key: tuple(found) if isinstance(found, list) else found})

  if asked['epochs'] is None and asked['steps'] is None:
    derive('minutes', CPU_MINUTES if on_cpu else None)
  largest = min(64 if on_cpu else 256, max(num_rows // 16, min(num_rows, 16)))
  derive('batch_size', 2 ** (largest.bit_length() - 1))
  of_images, of_steps = 40e6 / num_rows, 10_000 * config.batch_size / num_rows
  derive('epochs', round(max(30, min(200, of_images), min(1000, of_steps))))
  derive('optimizer.learning_rate', 0.03 * min(1.0, config.batch_size / 64))
  derive('optimizer.milestones', (round(0.6 * config.epochs), round(0.8 * config.epochs)))
  derive('knn.neighbors', min(200, max(1, math.isqrt(num_rows))))
  derive('model.name', 'resnet10' if on_cpu else 'resnet18')
  derive('model.width', 16 if on_cpu else 64)
  if config.dataset.name.startswith('folder:') and config.dataset.path != 'resident':
    derive('augment.size', CPU_SIDE if on_cpu else 224)
  return config


def validate_for_data(config: Config, num_rows: int, view_size: tuple[int, int],
                      num_devices: int) -> None:
  """Checks the settings that depend on the data set and the machine.

  Args:
    config: a valid `ConfigDict`, filled.
    num_rows: N.
    view_size: (height, width) of the views.
    num_devices: number of devices in the mesh.

  Raises:
    errors.UserError: names the setting, its value, and the requirement.
  """
  if num_rows < 2:
    raise errors.UserError(
        f'{config.dataset.name} has {num_rows} training image' + ('' if num_rows == 1 else 's'),
        'a set of at least 2 images', 'set <dataset.name> to a larger set', 'dataset.name')
  most = MOST_ROWS // num_devices * num_devices  # padded
  if num_rows > most:
    raise errors.UserError(
        f'{config.dataset.name} has {num_rows} training images', f'at most {most}',
        'set <dataset.limit>, or <dataset.name> to a smaller set', 'dataset.name')
  side, smallest = min(view_size), SMALLEST_SIDE.get(config.model.name, 1)
  if side < smallest:
    raise errors.UserError(
        f'model.name is {config.model.name}, which needs images of {smallest} pixels',
        f'an encoder for images of {side} pixels', setting='model.name',
        remedy='set <model.name>=resnet18_cifar, or <augment.size>')
  if config.model.name.startswith('vit') and (view_size[0] % smallest or view_size[1] % smallest):
    raise errors.UserError(
        f'the views have {view_size[0]} x {view_size[1]} pixels',
        f'a multiple of the {smallest} pixels of a patch of {config.model.name}',
        f'set <augment.size>={side // smallest * smallest}', 'augment.size')
  if config.dataset.path == 'stream' and view_size[0] != view_size[1]:
    raise errors.UserError(
        f'augment.size is not set, and the images of {config.dataset.name} have '
        f'{view_size[0]} x {view_size[1]} pixels', 'square to be streamed as they are',
        setting='augment.size')
  if config.batch_size > num_rows:
    largest = num_rows // num_devices * num_devices or num_devices
    raise errors.UserError(
        f'batch_size is {config.batch_size}', f'at most the {num_rows} training images',
        setting='batch_size', remedy=f'set <batch_size>={largest}')
  parts = num_devices * config.accumulate_steps
  if config.batch_size % parts:
    times = '' if config.accumulate_steps == 1 else (
        f' times accumulate_steps = {config.accumulate_steps}')
    raise errors.UserError(
        f'batch_size is {config.batch_size}', f'a multiple of the {num_devices} devices{times}',
        setting='batch_size', remedy=f'set <batch_size>={-(-config.batch_size // parts) * parts}')
  if config.loss.neighbors and config.loss.neighbors_from_epoch >= _epochs(config, num_rows):
    raise errors.UserError(
        f'loss.neighbors_from_epoch is {config.loss.neighbors_from_epoch:g}',
        f'below the {_epochs(config, num_rows):g} epochs of the run',
        setting='loss.neighbors_from_epoch')
  if config.loss.neighbors >= num_rows:
    raise errors.UserError(
        f'loss.neighbors is {config.loss.neighbors}',
        f'fewer than the {num_rows} training images', setting='loss.neighbors',
        remedy=f'set <loss.neighbors>={min(5, num_rows - 1)}')
  if config.knn.neighbors > num_rows:
    raise errors.UserError(
        f'knn.neighbors is {config.knn.neighbors}', f'at most the {num_rows} training images',
        setting='knn.neighbors', remedy=f'set <knn.neighbors>={min(20, num_rows)}')


def _epochs(config, num_rows):
  """The length of the run in epochs."""
  return config.epochs if config.steps is None else config.steps * config.batch_size / num_rows


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """Nested settings -> {'loss.temperature': 0.1, ...}."""
  flat = {}
  for key, value in config.items():
    if hasattr(value, 'items'):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat


def to_json(config: Config) -> dict[str, Any]:
  """`flatten`, with values that JSON can represent, as stored in config.json."""
  return {key: plain(value) for key, value in flatten(config).items()}


def from_json(settings: Mapping[str, Any]) -> Config:
  """The configuration stored in config.json; missing settings take their defaults.

  In a run of an earlier version they keep the meaning that they had then.
  """
  config, settings = default(), {**_earlier(settings), **settings}
  config.update_from_flattened_dict({
      key: tuple(value) if isinstance(value, list) else value
      for key, value in settings.items() if key in _BY_KEY})
  return config


def inherit(config: Config, earlier: Mapping[str, Any],
            given: Collection[str]) -> tuple[Config, dict[str, Any]]:
  """A configuration with the model, views, loss and bank of the run that it starts from.

  Args:
    config: a `ConfigDict`.
    earlier: the settings in that run's config.json.
    given: the settings that the user gave; they stay.

  Returns:
    (the copy, {setting: value} of what has changed).
  """
  config = config.copy_and_resolve_references()
  asked, taken = flatten(config), {}
  for key in asked.keys() & earlier.keys() - set(given) - _OF_THE_MACHINE:
    value = tuple(earlier[key]) if isinstance(earlier[key], list) else earlier[key]
    if key.partition('.')[0] in ('model', 'augment', 'loss', 'bank') and asked[key] != value:
      taken[key] = value
  config.update_from_flattened_dict(taken)
  return config, dict(sorted(taken.items()))


def resume(config: Config, stored: Mapping[str, Any]) -> Config:
  """A copy of `config` that keeps the behavior of a run started with an earlier version.

  Args:
    config: a valid `ConfigDict`.
    stored: the settings in the run's config.json, perhaps by an earlier version.

  Raises:
    errors.UserError: one of them is set to something else.
  """
  config = config.copy_and_resolve_references()
  asked, started = flatten(config), {**_earlier(stored), **stored}
  for key in _EARLIER.keys() & started.keys():  # once resumed, the run has them in its config.json
    value = started[key]
    if asked[key] not in (value, _BY_KEY[key].default):
      if _BY_KEY[key].changeable:
        continue
      raise errors.UserError(
          f'{key} is {asked[key]}', f'{value}, as when this run was started', setting=key,
          remedy=f'set <{key}>={value}, or another <--workdir>')
    config.update_from_flattened_dict({key: value})
  for key in asked.keys() - started.keys() if 'seed' in stored else ():  # an import fixes few
    part, setting = key.partition('.')[0], _BY_KEY[key]
    if part in _METHOD and not setting.changeable and asked[key] != setting.default:
      raise errors.UserError(
          f'{key} is {asked[key]}', f'{setting.default}, as when this run was started', setting=key,
          remedy=f'set <{key}>={setting.default}, or another <--workdir>')
  return config


def with_schedule(config: Config, stored: Mapping[str, Any]) -> Config:
  """A copy of `config` with the length and the schedule that a run of minutes was given."""
  keys = ('steps', 'epochs', 'optimizer.milestones', 'optimizer.warmup_epochs',
          'loss.neighbors_from_epoch')
  taken = from_json(stored)
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict({key: flatten(taken)[key] for key in keys})
  return config


def _earlier(stored: Mapping[str, Any]) -> dict[str, Any]:
  """The settings that a run by an earlier version lacks; {} for an import, which fixes few."""
  if 'seed' not in stored:
    return {}
  return {key: meaning(stored) for key, meaning in _EARLIER.items() if key not in stored}


def plain(value: Any) -> Any:
  """The value of a setting in a form that JSON can represent."""
  return list(value) if isinstance(value, tuple) else value


def _is_positive_number(text):
  try:
    return 0 < float(text) < math.inf
  except ValueError:
    return False
