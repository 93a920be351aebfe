"""Vision transformers (Dosovitskiy et al., 2021): from images to unit-norm embeddings.

Modules are named as in timm, and as in DINO. The products run in `dtype`; parameters, layer norm,
the softmax of the attention and the norm of the embedding are float32 (float64 when `dtype` is
float64). No dropout.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdisc_jax.models import layers

_INIT = nn.initializers.truncated_normal(0.02)  # as timm's


class Attention(nn.Module):
  """Self-attention with `heads` heads."""
  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    batch, tokens, dim = x.shape
    qkv = layers.dense(x, 3 * dim, self.dtype, _INIT, name='qkv')
    q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, -1), 2, 0)
    wide = jnp.promote_types(self.dtype, jnp.float32)
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=wide)
    weights = nn.softmax(scores * q.shape[-1] ** -0.5).astype(self.dtype)
    y = jnp.einsum('bhqk,bkhd->bqhd', weights, v).reshape(batch, tokens, dim)
    return layers.dense(y, dim, self.dtype, _INIT, name='proj')


class Block(nn.Module):
  """Attention and a perceptron, each behind a layer norm and beside a shortcut."""
  heads: int
  layer_scale: bool
  dtype: Any

  @nn.compact
  def __call__(self, x):
    y = Attention(self.heads, self.dtype, name='attn')(
        layers.layer_norm(x, self.dtype, name='norm1'))
    x += self.scale(y, 'ls1')
    y = layers.Perceptron(self.dtype, _INIT, name='mlp')(
        layers.layer_norm(x, self.dtype, name='norm2'))
    return x + self.scale(y, 'ls2')

  def scale(self, y, name):
    return layers.Scale(1e-5, self.dtype, name=name)(y) if self.layer_scale else y


class ViT(layers.Encoder):
  """A vision transformer; its embedding is computed from the class token.

  Attributes:
    heads: each of `width` channels, 64 in the literature.
    patch: side of a patch, in pixels.
    grid: patches per side that the position embeddings were made for; for others they are
      interpolated.
    layer_scale: whether blocks scale what they add (Touvron et al., 2021), as in DINOv2.
    depth: number of blocks.
  """
  heads: int
  patch: int
  grid: int
  layer_scale: bool = False
  depth: int = 12

  @nn.compact
  def __call__(self, x, train):
    del train  # there is no batch norm
    dim, wide = self.heads * self.width, jnp.promote_types(self.dtype, jnp.float32)
    token = self.param('cls_token', nn.initializers.normal(1e-6), (1, 1, dim), wide)
    position = self.param('pos_embed', _INIT, (1, 1 + self.grid**2, dim), wide)
    x = nn.Conv(dim, (self.patch, self.patch), self.patch, padding='VALID', dtype=self.dtype,
                param_dtype=wide, kernel_init=_INIT, name='patch_embed_proj')(x)
    position = resize_positions(position, (x.shape[1], x.shape[2]))
    x = jnp.pad(x.reshape(x.shape[0], -1, dim), ((0, 0), (1, 0), (0, 0)))  # the class token's place
    x += (position + jnp.pad(token, ((0, 0), (0, x.shape[1] - 1), (0, 0)))).astype(x.dtype)
    for i in range(self.depth):
      x = Block(self.heads, self.layer_scale, self.dtype, name=f'blocks_{i}')(x)
    x = layers.layer_norm(x[:, 0], wide, name='norm')
    layers.show(self, 'pooled', x)
    return layers.embed(self, x)


def resize_positions(position: Float[Array, '1 n D'],
                     grid: tuple[int, int]) -> Float[Array, '1 m D']:
  """The embeddings of the class token and of a square of patches, interpolated for another grid.

  Args:
    position: [1, 1 + s², D].
    grid: (rows, columns) of patches.

  Returns:
    [1, 1 + rows · columns, D], by bicubic interpolation as in timm.
  """
  side = round((position.shape[1] - 1) ** 0.5)
  if grid == (side, side):
    return position
  patches = position[:, 1:].reshape(1, side, side, -1)
  patches = jax.image.resize(patches, (1, *grid, patches.shape[-1]), 'cubic')
  return jnp.concatenate([position[:, :1], patches.reshape(1, -1, patches.shape[-1])], axis=1)
