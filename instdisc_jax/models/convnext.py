"""ConvNeXt (Liu et al., 2022): from images to unit-norm embeddings.

Modules are named as in timm. Convolutions and products run in `dtype`; parameters, layer norm and
the norm of the embedding are float32 (float64 when `dtype` is float64). No stochastic depth.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from instdisc_jax.models import layers

_INIT = nn.initializers.truncated_normal(0.02)  # as published


class Block(nn.Module):
  """A 7x7 convolution of each channel and a perceptron, beside a shortcut."""
  conv: Any
  dtype: Any

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    scale = layers.gamma(self, channels, 1e-6, self.dtype)
    y = self.conv(channels, (7, 7), padding=3, feature_group_count=channels, name='conv_dw')(x)
    y = layers.layer_norm(y, self.dtype, name='norm')
    return x + scale * layers.Perceptron(self.dtype, _INIT, name='mlp')(y)


class ConvNeXt(layers.Encoder):
  """A ConvNeXt; its first stage has 3/2 `width` channels, 96 in the literature.

  Attributes:
    stage_sizes: blocks per stage; from stage to stage the width doubles and the resolution halves.
  """
  stage_sizes: tuple[int, ...]

  @nn.compact
  def __call__(self, x, train):
    del train  # there is no batch norm
    wide = jnp.promote_types(self.dtype, jnp.float32)
    conv = functools.partial(nn.Conv, dtype=self.dtype, param_dtype=wide, kernel_init=_INIT)
    first = round(self.width * 3 / 2)
    x = conv(first, (4, 4), 4, padding='VALID', name='stem_0')(x)
    x = layers.layer_norm(x, self.dtype, name='stem_1')
    layers.show(self, 'conv1', x)
    for stage, size in enumerate(self.stage_sizes):
      if stage > 0:
        x = layers.layer_norm(x, self.dtype, name=f'stages_{stage}_downsample_0')
        x = conv(first * 2**stage, (2, 2), 2, padding='VALID',
                 name=f'stages_{stage}_downsample_1')(x)
      for i in range(size):
        x = Block(conv, self.dtype, name=f'stages_{stage}_blocks_{i}')(x)
      layers.show(self, f'conv{stage + 2}', x)
    x = layers.layer_norm(x.mean((1, 2), dtype=wide), wide, name='head_norm')
    layers.show(self, 'pooled', x)
    return layers.embed(self, x)
