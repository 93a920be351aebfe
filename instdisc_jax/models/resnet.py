"""ResNet encoders (He et al., 2016): from images to unit-norm embeddings.

Two families, as in the paper: `*_cifar` with a 3x3 stem and no pooling before the stages, and the
ImageNet nets with a 7x7 stride-2 stem and max pooling. Bottlenecks have their stride in the 3x3
convolution. Convolutions and products run in `dtype`; parameters, batch-norm statistics and the
norm of the embedding are float32 (float64 when `dtype` is float64).
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from instdisc_jax.models import layers
from instdisc_jax.models.conv import Conv
from instdisc_jax.models.pool import max_pool


class BasicBlock(nn.Module):
  """Two 3x3 convolutions and a shortcut; `features` output channels."""
  features: int
  stride: int
  conv: Any
  norm: Any
  expansion = 1

  @nn.compact
  def __call__(self, x):
    out = self.features * self.expansion
    y = nn.relu(self.norm(name='bn1')(self.conv(self.features, 3, self.stride, name='conv1')(x)))
    y = self.norm(name='bn2')(self.conv(out, 3, 1, name='conv2')(y))
    return nn.relu(y + self.shortcut(x, out))

  def shortcut(self, x, out):
    if x.shape[-1] == out and self.stride == 1:
      return x
    x = self.conv(out, 1, self.stride, name='downsample_conv')(x)
    return self.norm(name='downsample_bn')(x)


class Bottleneck(BasicBlock):
  """1x1, 3x3 and 1x1 convolutions and a shortcut; 4 x `features` output channels."""
  expansion = 4

  @nn.compact
  def __call__(self, x):
    out = self.features * self.expansion
    y = nn.relu(self.norm(name='bn1')(self.conv(self.features, 1, 1, name='conv1')(x)))
    y = nn.relu(self.norm(name='bn2')(self.conv(self.features, 3, self.stride, name='conv2')(y)))
    y = self.norm(name='bn3')(self.conv(out, 1, 1, name='conv3')(y))
    return nn.relu(y + self.shortcut(x, out))


class ResNet(layers.Encoder):
  """A ResNet for images of any size.

  Attributes:
    block: `BasicBlock` or `Bottleneck`.
    stage_sizes: blocks per stage; from stage to stage the width doubles and the resolution halves.
    cifar: whether the stem is 3x3 without pooling, for small images.
  """
  block: Any
  stage_sizes: tuple[int, ...]
  cifar: bool

  @nn.compact
  def __call__(self, x, train):
    wide = jnp.promote_types(self.dtype, jnp.float32)
    conv = functools.partial(Conv, dtype=self.dtype,
                             kernel_init=layers.TORCH_INIT if self.cifar else layers.HE_INIT)
    norm = functools.partial(layers.BatchNorm, train, self.batch_norm_axis, self.dtype)
    x = x.astype(self.dtype)
    if self.cifar:
      x = conv(self.width, 3, 1, name='conv1')(x)
    else:
      x = conv(self.width, 7, 2, name='conv1')(x)
    x = nn.relu(norm(name='bn1')(x))
    layers.show(self, 'conv1', x)
    if not self.cifar:
      x = max_pool(x, 3, 2, padding=1)
    for stage, size in enumerate(self.stage_sizes):
      for i in range(size):
        stride = 2 if stage > 0 and i == 0 else 1
        x = self.block(self.width * 2**stage, stride, conv, norm,
                       name=f'layer{stage + 1}_{i}')(x)
      layers.show(self, f'conv{stage + 2}', x)
    x = x.mean((1, 2), dtype=wide)
    layers.show(self, 'pooled', x)
    return layers.embed(self, x)
