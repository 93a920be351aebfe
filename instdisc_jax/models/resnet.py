"""ResNet encoders (He et al., 2016): images in, unit-norm embeddings out.

Two families, as the paper uses them: `*_cifar` with a 3x3 stem and no pooling before the stages,
and the ImageNet nets with a 7x7 stride-2 stem and max pooling. Bottlenecks carry their stride in
the 3x3 convolution. Convolutions and products run in `dtype`; parameters, batch-norm statistics
and the embedding's norm are float32 (float64 when `dtype` is float64).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from instdisc_jax import bank as bank_lib
from instdisc_jax.models.conv import Conv

# The published CIFAR net keeps PyTorch's default, U(±1/sqrt(fan_in)); its ImageNet net draws
# N(0, 2 / fan_out). Under batch norm the scale matters only through the size of relative updates.
_CIFAR_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
_IMAGENET_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class BatchNorm(nn.Module):
  """Batch normalisation with PyTorch's conventions: the running variance is the unbiased one.

  Attributes:
    train: normalise by the batch's own statistics and update the running ones.
    axis_name: mesh axis over which statistics are averaged; None for each device's own batch.
    dtype: of the output.
    momentum: running = momentum * running + (1 - momentum) * batch.
    epsilon: added to the variance.
  """
  train: bool
  axis_name: str | None = None
  dtype: Any = jnp.float32
  momentum: float = 0.9
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x):
    channels = (x.shape[-1],)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    scale = self.param('scale', nn.initializers.ones, channels, wide)
    bias = self.param('bias', nn.initializers.zeros, channels, wide)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, channels, wide)
    running_var = self.variable('batch_stats', 'var', jnp.ones, channels, wide)
    if self.train:
      mean, square = _moments(x.astype(wide), self.axis_name)
      var = jnp.maximum(square - mean**2, 0)
      if not self.is_initializing():
        count = x.size // x.shape[-1] * (lax.axis_size(self.axis_name) if self.axis_name else 1)
        unbiased = var * (count / max(count - 1, 1))
        running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
        running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
    else:
      mean, var = running_mean.value, running_var.value
    multiplier = scale * lax.rsqrt(var + self.epsilon)
    return (x * multiplier + (bias - mean * multiplier)).astype(self.dtype)


def _moments(x, axis_name):
  """E[x] and E[x²] per channel, over the batch, the picture and the mesh axis."""
  moments = jnp.stack([x.mean((0, 1, 2)), (x * x).mean((0, 1, 2))])
  if axis_name is not None:
    moments = lax.pmean(moments, axis_name)
  return moments[0], moments[1]


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


class ResNet(nn.Module):
  """Images [B, H, W, 3], already normalised -> unit-norm embeddings [B, D].

  Attributes:
    block: `BasicBlock` or `Bottleneck`.
    stage_sizes: blocks per stage; the width doubles and the picture halves from stage to stage.
    cifar: 3x3 stem without pooling, for small pictures.
    embedding_dim: D.
    width: channels of the first stage.
    dtype: of the computation.
    batch_norm_axis: mesh axis for synchronised batch norm, or None for per-device statistics.
  """
  block: Any
  stage_sizes: tuple[int, ...]
  cifar: bool
  embedding_dim: int = 128
  width: int = 64
  dtype: Any = jnp.float32
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, x, train):
    wide = jnp.promote_types(self.dtype, jnp.float32)
    conv = functools.partial(Conv, dtype=self.dtype,
                             kernel_init=_CIFAR_INIT if self.cifar else _IMAGENET_INIT)
    norm = functools.partial(BatchNorm, train, self.batch_norm_axis, self.dtype)
    x = x.astype(self.dtype)
    if self.cifar:
      x = conv(self.width, 3, 1, name='conv1')(x)
    else:
      x = conv(self.width, 7, 2, name='conv1')(x)
    x = nn.relu(norm(name='bn1')(x))
    if not self.cifar:
      x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage, size in enumerate(self.stage_sizes):
      for i in range(size):
        stride = 2 if stage > 0 and i == 0 else 1
        x = self.block(self.width * 2**stage, stride, conv, norm,
                       name=f'layer{stage + 1}_{i}')(x)
    x = x.astype(wide).mean((1, 2))
    # PyTorch's default for a linear layer: weights and bias U(±1/sqrt(fan_in)).
    bound = x.shape[-1] ** -0.5
    x = nn.Dense(self.embedding_dim, dtype=wide, param_dtype=wide, kernel_init=_CIFAR_INIT,
                 bias_init=functools.partial(_uniform, bound), precision=lax.Precision.HIGHEST,
                 name='fc')(x)
    return bank_lib.normalize(x)


def _uniform(bound, key, shape, dtype):
  return jax.random.uniform(key, shape, dtype, -bound, bound)
