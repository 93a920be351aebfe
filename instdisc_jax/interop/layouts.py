"""Names and layouts of encoder weights, here and in other projects.

Modules of the encoders are named and numbered as in PyTorch, so most names follow by rule:

    params/layer1_0/conv1/kernel [k, k, C, O]     layer1.0.conv1.weight [O, C, k, k]
    params/layer1_0/bn1/scale [C]                 layer1.0.bn1.weight [C]
    batch_stats/layer1_0/bn1/var [C]              layer1.0.bn1.running_var [C]
    params/fc/kernel [C, D]                       fc.weight [D, C]
    params/fc_0/kernel [C, C], of an MLP head     fc.0.weight [C, C]

ResNets, AlexNet and VGG have the names of torchvision, ViT and ConvNeXt those of timm, which DINO's
ViTs share.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import dataclasses
import functools
import math
import re
from typing import Any, TypeAlias

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax import models
from instdisc_jax.models import alexnet, vgg, vit
from instdisc_jax.runtime import errors

__all__ = ['COUNTER', 'Encoder', 'as_file_errors', 'find_encoder', 'find_weights', 'from_torch',
           'head_of', 'to_torch', 'to_torchvision']

COUNTER = 'num_batches_tracked'  # PyTorch's counter of training batches, which nothing reads
_MODULES = {'downsample_conv': 'downsample.0', 'downsample_bn': 'downsample.1',
            'patch_embed_proj': 'patch_embed.proj', 'conv_dw': 'conv_dw'}
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean',
           'var': 'running_var'}  # others are called the same
_POOLED = {'alexnet': alexnet.POOLED, 'vgg16': vgg.POOLED, 'vgg16_bn': vgg.POOLED}
_IGNORED = 'mask_token'  # of DINOv2: stands for patches that are hidden in training
_IMAGENET_CLASSES = 1000
_MLP = {f'{i}.{leaf}' for i in (0, 2) for leaf in ('weight', 'bias')}
_MIN_OVERLAP = 0.8  # minimum overlap of keys and kernel sizes to recognize an encoder

# Encoders by the beginning of their names, and of the names of their blocks.
_FAMILIES = {'resnet': 'layer', 'alexnet': 'features.', 'vgg': 'features.', 'vit': 'blocks.',
             'convnext': 'stages.'}

# Location of the encoder in the files of other projects: the prefixes of its backbone and its head,
# and the layer of the head that computes the embedding, provided that it is the only layer.
_PREFIXES = (
    ('encoder_q.', 'encoder_q.fc.', ''),  # MoCo
    ('encoder.', 'head.', '0.'),  # PyContrast
    ('_feature_blocks.', '0.clf.', '0.'),  # VISSL
    ('backbone.', 'neck.', 'fc.'),  # MMSelfSup
    ('', 'head.fc.', ''),  # timm's ConvNeXt
    ('', 'head.', ''),  # timm's ViT
    ('', 'fc.', ''),  # the published code, torchvision; DINO has none
)
_NORM = 'head.norm.'  # of timm's ConvNeXt: a part of the backbone all the same

_Path: TypeAlias = tuple[str, ...]  # of a leaf in the variables
_Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Encoder:
  """The encoder in a flat state dict.

  Attributes:
    name: one of `models.NAMES`.
    width: channels of the first stage.
    features: C, inputs of the head.
    backbone: torchvision's key -> array, without the head.
    head: {'weight' [D, C], 'bias' [D]}, or {'0.weight' [C, C], ..., '2.weight' [D, C], ...}; None
      unless it is a linear layer to an embedding, or two with a ReLU.
  """
  name: str
  width: int
  features: int
  backbone: dict[str, np.ndarray]
  head: dict[str, np.ndarray] | None


def from_torch(state_dict: Mapping[str, np.ndarray], model_name: str) -> dict[str, Any]:
  """PyTorch's state dict of an encoder -> its variables here.

  Args:
    state_dict: key -> array, with or without the prefix 'module.' and the `num_batches_tracked`
      entries; shortcuts are called 'downsample' or 'shortcut', the head 'fc' or 'linear'. Kernels
      are [O, C, k, k], linear layers [O, C].
    model_name: one of `models.NAMES`. Width and embedding size are read from the weights.

  Returns:
    {'params', 'batch_stats'}, NumPy arrays of the given dtypes; kernels are [k, k, C, O], linear
    layers [C, O].

  Raises:
    errors.UserError: a key is missing, unexpected, or has the wrong shape; the message names it.
  """
  given = {_canonical(key): (key, np.asarray(value)) for key, value in state_dict.items()
           if not key.endswith(COUNTER)}
  width = _width(model_name, given)
  head = head_of(given)
  last = 'fc.2.weight' if head == 'mlp' else 'fc.weight'
  layout = _layout(model_name, _require(given, last, 2).shape[0], width, head)
  for key in given:
    if key not in layout:
      raise errors.UserError(f"'{given[key][0]}' is not a weight of {model_name}",
                             remedy='remove it, or give the name of another model')
  flat = {}
  for key, (path, shape) in layout.items():
    value = _require(given, key, len(shape))
    if key == 'pos_embed' and value.shape != shape and value.shape[-1] == shape[-1]:
      side = math.isqrt(shape[1] - 1)
      value = np.asarray(vit.resize_positions(jnp.asarray(value), (side, side)))
    linen = _to_linen(path, value, model_name) if value.size == np.prod(shape) else value.T
    if linen.shape != shape:
      wanted = _to_torch(path, np.broadcast_to(np.float32(0), shape), model_name).shape
      raise errors.UserError(f"'{given[key][0]}' has shape {value.shape}",
                             f'{wanted} in {model_name} of width {width}')
    flat[path] = np.ascontiguousarray(linen)
  return {'params': {}, 'batch_stats': {}} | traverse_util.unflatten_dict(flat)


def to_torch(variables: Mapping[str, Any], model_name: str) -> dict[str, np.ndarray]:
  """Variables of an encoder -> PyTorch's state dict in the published layout, in its order.

  Args:
    variables: {'params', 'batch_stats'}; kernels are [k, k, C, O], linear layers [C, O].
    model_name: one of `models.NAMES`.

  Returns:
    key -> array; kernels are [O, C, k, k], linear layers [O, C]. CIFAR nets call their shortcuts
    'shortcut' and their head 'linear', as published; every `num_batches_tracked` is 0.
  """
  renamed = lambda key: key
  if model_name.endswith('_cifar'):
    renamed = lambda key: key.replace('downsample.', 'shortcut.').replace('fc.', 'linear.')
  return {renamed(key): value for key, value in to_torchvision(variables, model_name).items()}


def to_torchvision(variables: Mapping[str, Any], model_name: str) -> dict[str, np.ndarray]:
  """The same as `to_torch`, with torchvision's names for every encoder."""
  flat = {path: np.asarray(value)
          for path, value in traverse_util.flatten_dict(variables).items()}
  _, stem, _ = _stem(model_name)
  width = _width_of_channels(model_name, flat[stem].shape[-1])
  state_dict = {}
  head = 'mlp' if ('params', 'fc_2', 'bias') in flat else 'linear'
  dim = flat['params', 'fc_2' if head == 'mlp' else 'fc', 'bias'].size
  for key, (path, _) in _layout(model_name, dim, width, head).items():
    state_dict[key] = np.ascontiguousarray(_to_torch(path, flat[path], model_name))
    if path[-1] == 'var':
      state_dict[key.replace('running_var', COUNTER)] = np.zeros((), np.int64)
  return state_dict


def find_weights(saved: Any, file: object) -> dict[str, np.ndarray]:
  """The flat state dict in a checkpoint.

  Args:
    saved: nested containers of arrays, as a checkpoint holds them.
    file: the file they come from, for messages.

  Returns:
    key -> array, with torchvision's names for shortcuts and heads, without 'module.'.

  Raises:
    errors.UserError: there are no weights.
  """
  saved = saved if isinstance(saved, dict) else {}
  for key in ('classy_state_dict', 'state_dict', 'net', 'model', 'teacher'):
    if isinstance(saved.get(key), dict):
      saved = saved[key]
      if key == 'classy_state_dict':
        parts = saved.get('base_model', {}).get('model', {})
        saved = {**parts.get('trunk', {}), **parts.get('heads', {})}
      break
  weights = {key: value for key, value in saved.items() if isinstance(value, np.ndarray)}
  if not weights:
    raise errors.UserError(
        f"'{file}' holds no weights", "a state dict, or hold one as 'state_dict', 'net', "
        "'model', 'teacher' or 'classy_state_dict'", 'set <--from> to such a file', '--from')
  return {_canonical(key): value for key, value in weights.items()}


def find_encoder(weights: Mapping[str, np.ndarray], file: object,
                 name: str | None = None) -> Encoder:
  """The encoder in a flat state dict of any known layout, recognized by its keys.

  Args:
    weights: what `find_weights` returns.
    file: the file they come from, for messages.
    name: what the file calls the encoder, if it does; decides where several have such weights.

  Raises:
    errors.UserError: there is no encoder, or its first layer is missing.
  """
  begins = lambda key, prefix: key.startswith(prefix) and not key.startswith(_NORM)
  backbone_prefix, head_prefix, head_layer = next(
      entry for entry in _PREFIXES
      if any(begins(key, entry[0] or entry[1]) for key in weights) or entry == _PREFIXES[-1])
  head = {key.removeprefix(head_prefix): value for key, value in weights.items()
          if begins(key, head_prefix)}
  backbone = {key.removeprefix(backbone_prefix): value for key, value in weights.items()
              if key.startswith(backbone_prefix) and not begins(key, head_prefix)
              and not key.endswith(COUNTER) and key != _IGNORED}
  overlap: dict[str, float] = {}
  for known in _of_its_family(backbone):
    overlap[known] = _overlap(known, backbone)
    if overlap[known] == 1 and not known.startswith('vit'):
      break
  most = max(overlap.values(), default=0)
  if most < _MIN_OVERLAP:  # above it, `from_torch` names the keys that differ
    raise errors.UserError(
        f"'{file}' holds no known encoder (its first weights are {', '.join(list(weights)[:3])})",
        f'weights of one of {", ".join(models.NAMES)}', 'set <--from> to such a file', '--from')
  given = {key: (key, value) for key, value in backbone.items()}
  names = [name for name, value in overlap.items() if value == most]
  if name not in names:
    name = names[0]
    if name.startswith('vit') and len(names) > 1:
      name = _vit_of_its_channels(names, given, file)
  with as_file_errors(name):
    width = _width(name, given)
  _, (features, _) = _layout(name, 2, width)['fc.weight']
  layer = {leaf: head[f'{head_layer}{leaf}'] for leaf in ('weight', 'bias')
           if f'{head_layer}{leaf}' in head}
  if set(head) == _MLP and head['0.weight'].shape == (features, features):
    layer = head
  last = layer.get('2.weight', layer.get('weight', np.zeros(0)))
  usable = len(head) == len(layer) > 0 and last.ndim == 2 and len(last) != _IMAGENET_CLASSES
  return Encoder(name, width, features, backbone, layer if usable else None)


@contextlib.contextmanager
def as_file_errors(model_name: str) -> Iterator[None]:
  """Adds to errors about weights the remedy to use another file."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(e.found, e.required, f'set <--from> to weights of {model_name}',
                           '--from') from e


def _vit_of_its_channels(names, given, file):
  """The one of these ViTs whose width is 64: the names are the same for any number of heads."""
  channels = _require(given, _stem(names[0])[0], 4).shape[0]
  known = {_stem(name)[2]: name for name in names}
  if channels not in known:
    raise errors.UserError(
        f"'{file}' holds a ViT of {channels} channels, whose number of heads is not known",
        f'{" or ".join(map(str, known))} channels', 'set <--from> to such a file', '--from')
  return known[channels]


def _of_its_family(backbone):
  """The encoders whose blocks are called like a state dict's; a layout takes most of a second."""
  return [name for name in models.NAMES for family, layer in _FAMILIES.items()
          if name.startswith(family) and any(key.startswith(layer) for key in backbone)]


def _overlap(model_name, backbone):
  """Intersection over union of a state dict's and an encoder's keys, with the sizes of kernels."""
  found = {(key, value.shape[2:]) for key, value in backbone.items()}
  wanted = {(key, shape[:2] if len(shape) == 4 else ())
            for key, (_, shape) in _layout(model_name, 2, 2).items() if not key.startswith('fc.')}
  return len(found & wanted) / len(found | wanted)


def _width(model_name, given):
  """Width of an encoder, from the first of the weights {key: (original key, array)}."""
  stem, _, _ = _stem(model_name)
  return _width_of_channels(model_name, _require(given, stem, 4).shape[0])


def _width_of_channels(model_name, stem_channels):
  """Width of an encoder whose first convolution has so many channels."""
  *_, at_64 = _stem(model_name)
  return round(stem_channels * 64 / at_64)


def _stem(model_name):
  """(torchvision's key, path in the variables, channels at width 64) of the first convolution."""
  return next((key, path, shape[-1]) for key, (path, shape) in _layout(model_name, 2, 64).items()
              if len(shape) == 4)


def head_of(state_dict: Collection[str]) -> str:
  """'linear' or 'mlp': the head of a state dict with torchvision's names."""
  return 'mlp' if 'fc.2.weight' in state_dict else 'linear'


@functools.cache
def _layout(model_name: str, embedding_dim: int, width: int,
            head: str = 'linear') -> dict[str, tuple[_Path, _Shape]]:
  """torchvision's keys of an encoder, in its order -> (path in the variables, shape there)."""
  encoder = models.create(model_name, embedding_dim=embedding_dim, width=width, head=head)
  side = config_lib.SMALLEST_SIDE.get(model_name, 32)
  paths: list[_Path] = []

  def init():
    variables = encoder.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False)
    paths.extend(traverse_util.flatten_dict(variables))  # in the order of creation
    return variables

  abstract: dict[_Path, Any] = traverse_util.flatten_dict(jax.eval_shape(init))
  shapes = {path: leaf.shape for path, leaf in abstract.items()}
  layout = {}
  for collection, *module, leaf in paths:
    if collection != 'params':
      continue
    leaves = [(collection, leaf)]
    if leaf == 'bias' and ('batch_stats', *module, 'mean') in shapes:
      leaves += [('batch_stats', 'mean'), ('batch_stats', 'var')]
    for collection, leaf in leaves:
      path = (collection, *module, leaf)
      names = [_MODULES.get(part, part.replace('_', '.')) for part in module]
      layout['.'.join([*names, _LEAVES.get(leaf, leaf)])] = path, shapes[path]
  return layout


def _to_torch(path, x, model_name):
  if path[-2:] == ('classifier_0', 'kernel'):  # its inputs are a flattened map, channels last here
    side = _POOLED[model_name]
    return x.reshape(side, side, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(x.shape[::-1])
  return {4: lambda: x.transpose(3, 2, 0, 1), 3: lambda: x}.get(x.ndim, lambda: x.T)()


def _to_linen(path, x, model_name):
  if path[-2:] == ('classifier_0', 'kernel'):
    side = _POOLED[model_name]
    return x.reshape(x.shape[0], -1, side, side).transpose(2, 3, 1, 0).reshape(x.shape[::-1])
  return {4: lambda: x.transpose(2, 3, 1, 0), 3: lambda: x}.get(x.ndim, lambda: x.T)()


def _canonical(key: str) -> str:
  """Published key -> torchvision's."""
  key = key.removeprefix('module.').replace('.shortcut.', '.downsample.')
  return re.sub('^linear\\.', 'fc.', key)


def _require(given: Mapping[str, tuple[str, np.ndarray]], key: str, rank: int) -> np.ndarray:
  if key not in given:
    raise errors.UserError(f"'{key}' is missing from the weights")
  name, value = given[key]
  if value.ndim != rank:
    raise errors.UserError(f"'{name}' has shape {value.shape}", f'an array with {rank} axes')
  return value
