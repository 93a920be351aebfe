"""Convolution that is fast on CPUs too.

XLA:CPU has two slow cases. It computes the weight gradient of a full batch as one convolution with
a kernel as large as the image, several times more slowly than other convolutions; as a sum over
pieces of the batch, it is as fast as they are. And convolutions of maps of at most 2 x 2 pixels,
where most of the kernel lies outside, run at a hundredth of the speed of a matrix product; here
they are one, with a matrix that holds the kernel's values for every pair of an input pixel and an
output pixel. The result is the same sum in another order. Other platforms use XLA's own
convolutions.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

_FEW = 4  # pixels of a map that is convolved as a matrix product, on CPU
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


def as_product(x, kernel, stride, padding) -> jax.Array:
  """The convolution of small maps [B, H, W, C] with [k, k, C, O] as one matrix product."""
  batch, *sides, _ = x.shape
  size, _, _, out_channels = kernel.shape
  results = [(side + 2 * padding - size) // stride + 1 for side in sides]
  outside = jnp.zeros(kernel.shape[2:], kernel.dtype)

  def block(source, result):
    """[C, O]: the kernel's values from one input pixel to one output pixel."""
    tap = [i - stride * r + padding for i, r in zip(source, result)]
    return kernel[tuple(tap)] if all(0 <= i < size for i in tap) else outside

  matrix = jnp.block([[block(source, result) for result in np.ndindex(*results)]
                      for source in np.ndindex(*sides)])
  return (x.reshape(batch, -1) @ matrix).reshape(batch, *results, out_channels)


def _is_small(x, kernel):
  return x.shape[1] * x.shape[2] <= _FEW and kernel.shape[0] > 1


def _forward_only(x, kernel, stride, padding) -> jax.Array:
  convolve, product = (functools.partial(fn, stride=stride, padding=padding)
                       for fn in (_convolve, as_product))
  if not _is_small(x, kernel):
    return convolve(x, kernel)
  return lax.platform_dependent(x, kernel, cpu=product, default=convolve)


_conv: Any = jax.custom_vjp(_forward_only, nondiff_argnums=(2, 3))


def _forward(x, kernel, stride, padding):
  return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, saved, cotangent):
  x, kernel = saved
  convolve, product = (functools.partial(fn, stride=stride, padding=padding)
                       for fn in (_convolve, as_product))
  to_x = lambda fn: lambda kernel, g: jax.vjp(lambda x: fn(x, kernel), x)[1](g)[0]
  to_kernel = lambda fn: lambda x, g: jax.vjp(lambda kernel: fn(x, kernel), kernel)[1](g)[0]

  def in_pieces(x, g):
    images = max(4, _PIECE // g[0].size)
    cuts = list(range(images, x.shape[0], images))
    return sum(to_kernel(convolve)(*piece) for piece in zip(jnp.split(x, cuts), jnp.split(g, cuts)))

  return (lax.platform_dependent(
              kernel, cotangent, default=to_x(convolve),
              cpu=to_x(product if _is_small(cotangent, kernel) else convolve)),
          lax.platform_dependent(
              x, cotangent, default=to_kernel(convolve),
              cpu=to_kernel(product) if _is_small(x, kernel) else in_pieces))


_conv.defvjp(_forward, _backward)
