"""AlexNet with batch norm, as used in papers on unsupervised features: from images to embeddings.

Five convolutions of 96, 256, 384, 384 and 256 channels and two linear layers of 4,096, each
followed by batch norm and ReLU; no local response normalization, no groups, no dropout. Modules
are numbered as in a PyTorch `Sequential`, so that weights convert by name.
"""

import flax.linen as nn
import jax.numpy as jnp

from instdisc_jax.models import layers
from instdisc_jax.models.conv import Conv
from instdisc_jax.models.pool import max_pool

# (index in `features`, channels at width 64, kernel, stride, padding, followed by max pooling)
_CONVS = ((0, 96, 11, 4, 2, True), (4, 256, 5, 1, 2, True), (8, 384, 3, 1, 1, False),
          (11, 384, 3, 1, 1, False), (14, 256, 3, 1, 1, True))
POOLED = 6  # side of the feature map before the linear layers


class AlexNet(layers.Encoder):
  """AlexNet for images of at least 63 pixels per side; the channels above are for width 64."""

  @nn.compact
  def __call__(self, x, train):
    wide = jnp.promote_types(self.dtype, jnp.float32)
    norm = lambda name: layers.BatchNorm(train, self.batch_norm_axis, self.dtype, name=name)
    for stage, (i, channels, kernel, stride, padding, pool) in enumerate(_CONVS):
      x = Conv(channels * self.width // 64, kernel, stride, self.dtype, layers.HE_INIT,
               padding=padding, name=f'features_{i}')(x)
      x = nn.relu(norm(f'features_{i + 1}')(x))
      layers.show(self, f'conv{stage + 1}', x)
      if pool:
        x = max_pool(x, 3, 2)
    x = layers.average_to(x, POOLED)
    x = x.reshape(x.shape[0], -1)
    for i in (0, 3):
      x = layers.linear(x, self.width * 64, self.dtype, use_bias=False, name=f'classifier_{i}')
      x = nn.relu(norm(f'classifier_{i + 1}')(x))
    layers.show(self, 'pooled', x)
    return layers.embed(self, x.astype(wide))
