"""Encoders by name."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from instdisc_jax.models import alexnet, convnext, resnet, vgg, vit

_RESNETS = {
    'resnet10': (resnet.BasicBlock, (1, 1, 1, 1)),
    'resnet18': (resnet.BasicBlock, (2, 2, 2, 2)),
    'resnet34': (resnet.BasicBlock, (3, 4, 6, 3)),
    'resnet50': (resnet.Bottleneck, (3, 4, 6, 3)),
    'resnet101': (resnet.Bottleneck, (3, 4, 23, 3)),
}
_ENCODERS: dict[str, Any] = {
    'alexnet': alexnet.AlexNet,
    'vgg16': functools.partial(vgg.VGG, False),
    'vgg16_bn': functools.partial(vgg.VGG, True),
    'convnext_t': functools.partial(convnext.ConvNeXt, (3, 3, 9, 3)),
    'vit_t4': functools.partial(vit.ViT, 3, 4, 8),  # for 32 pixels
    'vit_s16': functools.partial(vit.ViT, 6, 16, 14),
    'vit_b16': functools.partial(vit.ViT, 12, 16, 14),
    'vit_s14': functools.partial(vit.ViT, 6, 14, 16, True),  # as DINOv2 has them
    'vit_b14': functools.partial(vit.ViT, 12, 14, 16, True),
}
for _name, (_block, _sizes) in _RESNETS.items():
  _ENCODERS[_name] = functools.partial(resnet.ResNet, _block, _sizes, False)
  _ENCODERS[f'{_name}_cifar'] = functools.partial(resnet.ResNet, _block, _sizes, True)

__all__ = ['NAMES', 'SMALLEST_SIDE', 'create', 'resnet_blocks']
NAMES = tuple(sorted(_ENCODERS))
SMALLEST_SIDE = {'alexnet': 63, 'vgg16': 32, 'vgg16_bn': 32, 'convnext_t': 32, 'vit_t4': 4,
                 'vit_s16': 16, 'vit_b16': 16, 'vit_s14': 14, 'vit_b14': 14}  # in pixels; else any


def create(name: str, *, embedding_dim: int = 128, width: int = 64, dtype: Any = jnp.float32,
           head: str = 'linear', batch_norm_axis: str | None = None) -> nn.Module:
  """The encoder called `name`, a Linen module.

  Args:
    name: one of `models.NAMES`.
    embedding_dim: D.
    width: channels of the first stage (of a head in a ViT); 64 in the literature.
    dtype: of the computation, e.g. `jnp.bfloat16`; parameters stay float32.
    head: 'linear', as published, or 'mlp', with a hidden layer as wide as the pooled features.
    batch_norm_axis: mesh axis for synchronized batch norm, or None for per-device statistics.

  Returns:
    A module with `module.apply(variables, images[B, H, W, 3], train) -> [B, D]`, unit-norm.

  Raises:
    KeyError: the name is unknown; the message lists the known ones.
  """
  if name not in _ENCODERS:
    raise KeyError(f"unknown model '{name}'; known: {', '.join(NAMES)}")
  return _ENCODERS[name](embedding_dim=embedding_dim, width=width, dtype=dtype, head=head,
                         batch_norm_axis=batch_norm_axis)


def resnet_blocks(name: str) -> tuple[str | None, tuple[int, ...]]:
  """('BasicBlock' or 'Bottleneck', blocks in each stage) of a ResNet; (None, ()) of others."""
  block, sizes = _RESNETS.get(name.removesuffix('_cifar'), (None, ()))
  return None if block is None else block.__name__, sizes
