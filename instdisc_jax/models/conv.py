"""Convolution whose weight gradient is fast on CPUs too.

XLA:CPU computes the weight gradient of a full batch as one convolution with a kernel as large as
the image, several times more slowly than other convolutions; as a sum over pieces of the batch, it
is as fast as they are. The result is the same sum in another order. Other platforms use XLA's own
gradient.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

_PIECE = 2**17  # output-gradient values per piece, on CPU: about half a core's cache


class Conv(nn.Module):
  """Convolution, NHWC.

  Attributes:
    features: output channels.
    kernel_size: k, for a k x k kernel.
    stride: stride along both image axes.
    dtype: dtype of the computation.
    kernel_init: initializer of the kernel [k, k, C, features].
    padding: zeros on each side; by default (k - 1) / 2.
    use_bias: whether to add a bias, initialized to zero.
  """
  features: int
  kernel_size: int
  stride: int
  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer
  padding: int | None = None
  use_bias: bool = False

  @nn.compact
  def __call__(self, x):
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    kernel = self.param('kernel', self.kernel_init, shape, wide)
    padding = (self.kernel_size - 1) // 2 if self.padding is None else self.padding
    x = _conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, padding)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,), wide)
      x += bias.astype(self.dtype)
    return x


def _convolve(x, kernel, stride, padding) -> jax.Array:
  return lax.conv_general_dilated(x, kernel, (stride, stride), ((padding, padding),) * 2,
                                  dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


_conv: Any = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3))


def _forward(x, kernel, stride, padding):
  return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, saved, cotangent):
  x, kernel = saved
  conv = functools.partial(_convolve, stride=stride, padding=padding)
  x_grad, = jax.vjp(lambda x: conv(x, kernel), x)[1](cotangent)
  whole = lambda x, g: jax.vjp(lambda k: conv(x, k), kernel)[1](g)[0]

  def in_pieces(x, g):
    images = max(4, _PIECE // g[0].size)
    cuts = list(range(images, x.shape[0], images))
    return sum(whole(*piece) for piece in zip(jnp.split(x, cuts), jnp.split(g, cuts)))

  return x_grad, lax.platform_dependent(x, cotangent, cpu=in_pieces, default=whole)


_conv.defvjp(_forward, _backward)
