"""Layers shared by the encoders: norms, linear layers, pooling, and the unit-norm head."""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdisc_jax import linalg

# PyTorch's default, U(±1/sqrt(fan_in)), which the published CIFAR net keeps; the ImageNet net draws
# N(0, 2 / fan_out). Under batch norm the scale only matters for the relative size of updates.
TORCH_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
HE_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Encoder(nn.Module, kw_only=True):
  """Base class of the encoders: images [B, H, W, 3] -> unit-norm embeddings [B, D].

  Attributes:
    embedding_dim: D.
    width: channels of the first stage; 64 in the literature.
    dtype: of the computation; parameters are at least float32.
    head: 'linear' or 'mlp', see `embed`.
    batch_norm_axis: mesh axis for synchronized batch norm, or None for per-device statistics.
  """
  embedding_dim: int = 128
  width: int = 64
  dtype: Any = jnp.float32
  head: str = 'linear'
  batch_norm_axis: str | None = None


class BatchNorm(nn.Module):
  """Batch normalization with PyTorch's conventions: the running variance is the unbiased one.

  Attributes:
    train: whether to normalize by the batch's own statistics and update the running ones.
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
  """E[x] and E[x²] per channel, over all other axes of `x` and over the mesh axis."""
  axes = tuple(range(x.ndim - 1))
  moments = jnp.stack([x.mean(axes), (x * x).mean(axes)])
  if axis_name is not None:
    moments = lax.pmean(moments, axis_name)
  return moments[0], moments[1]


def linear(x: Float[Array, '... C'], features: int, dtype: Any,
           **kwargs: Any) -> Float[Array, '... F']:
  """A linear layer with PyTorch's default initialization, U(±1/sqrt(fan_in)) for its bias too.

  Args:
    x: [..., C].
    features: number of outputs.
    dtype: of the computation; parameters are at least float32.
    **kwargs: arguments of `nn.Dense`, e.g. `name`.

  Returns:
    [..., features].
  """
  bound = x.shape[-1] ** -0.5
  bias_init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
  return nn.Dense(features, dtype=dtype, param_dtype=jnp.promote_types(dtype, jnp.float32),
                  kernel_init=TORCH_INIT, bias_init=bias_init, **kwargs)(x)


def dense(x: Float[Array, '... C'], features: int, dtype: Any, kernel_init: Any,
          name: str) -> Float[Array, '... F']:
  """A linear layer of a transformer, whose bias begins at 0; parameters are at least float32."""
  return nn.Dense(features, dtype=dtype, param_dtype=jnp.promote_types(dtype, jnp.float32),
                  kernel_init=kernel_init, name=name)(x)


def layer_norm(x: Float[Array, '... C'], dtype: Any, name: str) -> Float[Array, '... C']:
  """Layer normalization in at least float32, with an output of `dtype`."""
  wide = jnp.promote_types(dtype, jnp.float32)
  return nn.LayerNorm(1e-6, dtype=wide, param_dtype=wide, use_fast_variance=False,
                      name=name)(x).astype(dtype)


class Perceptron(nn.Module):
  """Two linear layers with a GELU between them, four times as wide there."""
  dtype: Any
  kernel_init: Any

  @nn.compact
  def __call__(self, x):
    y = dense(x, 4 * x.shape[-1], self.dtype, self.kernel_init, name='fc1')
    return dense(nn.gelu(y, approximate=False), x.shape[-1], self.dtype, self.kernel_init,
                 name='fc2')


class Scale(nn.Module):
  """A factor for each channel, which begins at `start`."""
  start: float
  dtype: Any

  @nn.compact
  def __call__(self, x):
    return gamma(self, x.shape[-1], self.start, self.dtype) * x


def gamma(module: nn.Module, channels: int, start: float, dtype: Any) -> Float[Array, ' C']:
  """A module's parameter `gamma` [C], which begins at `start`."""
  return module.param('gamma', nn.initializers.constant(start), (channels,),
                      jnp.promote_types(dtype, jnp.float32)).astype(dtype)


def embed(encoder: Encoder, x: Float[Array, 'B C']) -> Float[Array, 'B D']:
  """The head `fc` of every encoder: [B, C] -> unit-norm [B, D], at full precision.

  `encoder.head` is 'linear', as published, or 'mlp': C hidden units with a ReLU (Chen et al.,
  2020), whose layers are `fc.0` and `fc.2` as in MoCo v2.
  """
  wide = jnp.promote_types(encoder.dtype, jnp.float32)
  layer = functools.partial(linear, dtype=wide, precision=lax.Precision.HIGHEST)
  name = 'fc'
  if encoder.head == 'mlp':
    x, name = nn.relu(layer(x, x.shape[-1], name='fc_0')), 'fc_2'
  return linalg.normalize(layer(x, encoder.embedding_dim, name=name))


def show(module: nn.Module, name: str, x: Any) -> None:
  """Adds the output of a stage to the collection 'stages', at no cost unless it is requested."""
  if not module.is_initializing():
    module.sow('stages', f'{name}_output', x, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def average_to(x: Float[Array, 'B H W C'], size: int) -> Float[Array, 'B size size C']:
  """[B, H, W, C] -> [B, size, size, C], by averaging over `size` even parts of each image axis.

  Neighboring parts overlap by a pixel where `size` does not divide the axis (PyTorch's adaptive
  average pooling); a map of that size is returned unchanged.
  """
  if x.shape[1:3] == (size, size):
    return x
  for axis in (1, 2):
    parts = _parts(x.shape[axis], size)
    x = jnp.concatenate([lax.slice_in_dim(x, *part, axis=axis).mean(axis, keepdims=True)
                         for part in parts], axis)
  return x


def _parts(length, size):
  """(start, end) of each part."""
  return [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
