"""VGG16 (Simonyan and Zisserman, 2015), with or without batch norm: from images to embeddings.

Modules are numbered as in torchvision's `vgg16` and `vgg16_bn`, so that weights convert by name.
There is no dropout.
"""

import flax.linen as nn
import jax.numpy as jnp

from instdisc_jax.models import layers
from instdisc_jax.models.conv import Conv
from instdisc_jax.models.pool import max_pool

_STAGES = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels in units of the width
POOLED = 7  # side of the feature map before the linear layers


class VGG(layers.Encoder):
  """VGG16 for images of at least 32 pixels per side.

  Attributes:
    batch_norm: whether a batch norm follows every convolution.
  """
  batch_norm: bool

  @nn.compact
  def __call__(self, x, train):
    wide = jnp.promote_types(self.dtype, jnp.float32)
    i = 0
    for stage, multiples in enumerate(_STAGES):
      for multiple in multiples:
        x = Conv(multiple * self.width, 3, 1, self.dtype, layers.HE_INIT, use_bias=True,
                 name=f'features_{i}')(x)
        if self.batch_norm:
          i += 1
          x = layers.BatchNorm(train, self.batch_norm_axis, self.dtype, name=f'features_{i}')(x)
        x = nn.relu(x)
        i += 2
      layers.show(self, f'conv{stage + 1}', x)
      x = max_pool(x, 2, 2)
      i += 1
    x = layers.average_to(x, POOLED)
    x = x.reshape(x.shape[0], -1)
    for i in (0, 3):
      x = nn.relu(layers.linear(x, self.width * 64, self.dtype, name=f'classifier_{i}'))
    layers.show(self, 'pooled', x)
    return layers.embed(self, x.astype(wide))
