import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdisc_jax import convert, models
from instdisc_jax.interop import layouts
from instdisc_jax.models import convnext, vit
from instdisc_jax.runtime import errors
from tests.interop import weights

NETWORKS = [('vit_t4', 'vit_tiny_patch16_224', {'patch_size': 4, 'img_size': 32}, 32),
            ('vit_s16', 'vit_small_patch16_224', {}, 224),
            ('vit_s16', 'vit_small_patch16_224', {'dynamic_img_size': True}, 160),
            ('vit_b16', 'vit_base_patch16_224', {}, 224),
            ('vit_s14', 'vit_small_patch14_dinov2', {'img_size': 224}, 224),
            ('convnext_t', 'convnext_tiny', {}, 96)]


def _random_network(torch, name, kwargs):
  """timm's network with random weights everywhere, norms and scales too."""
  timm = pytest.importorskip('timm')
  network = timm.create_model(name, num_classes=0, **kwargs).eval()
  random = torch.Generator().manual_seed(1)
  for key, x in network.state_dict().items():
    about = 1.0 if x.ndim == 1 and key.endswith(('weight', 'gamma')) else 0.0
    x.copy_(about + 0.05 * torch.randn(x.shape, generator=random))
  return network


def _with_head(network):
  """(timm's weights, these with a head of ours)."""
  found = {key: x.numpy() for key, x in network.state_dict().items() if key != 'mask_token'}
  random = np.random.default_rng(0)
  head = {'fc.weight': random.standard_normal((6, network.num_features)).astype(np.float32),
          'fc.bias': np.zeros(6, np.float32)}
  return found, found | head


@pytest.mark.slow
@pytest.mark.parametrize('name, timm_name, kwargs, side', NETWORKS)
def test_the_encoder_computes_what_timm_does(torch, name, timm_name, kwargs, side):
  network = _random_network(torch, timm_name, kwargs)
  backbone, state_dict = _with_head(network)
  assert layouts.find_encoder(network.state_dict(), 'a.pth').name == name
  variables = convert.from_torch(state_dict, name)
  back = convert.to_torch(variables, name)
  assert list(back) == list(state_dict)
  for key, value in state_dict.items():
    np.testing.assert_array_equal(back[key], value)
  images = np.random.default_rng(1).standard_normal((2, side, side, 3)).astype(np.float32)
  for dtype, tolerance in ((jnp.float32, 5e-6), (jnp.float64, 1e-7 if kwargs else 1e-13)):
    # timm interpolates positions in float32, whatever the weights are
    with jax.enable_x64(dtype == jnp.float64):
      encoder = models.create(name, embedding_dim=6, dtype=dtype)
      cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), variables)
      _, shown = jax.jit(lambda v, x: encoder.apply(v, x, train=False, mutable=['stages']))(
          cast, jnp.asarray(images, dtype))
      found = np.asarray(shown['stages']['pooled_output'])
    wide = torch.float64 if dtype == jnp.float64 else torch.float32
    with torch.no_grad():
      expected = network.to(wide)(torch.from_numpy(images).permute(0, 3, 1, 2).to(wide)).numpy()
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize('wrap', [
    lambda w: {'teacher': {f'backbone.{key}': x for key, x in w.items()}
               | {'head.mlp.0.weight': np.zeros((4, 4), np.float32)}},
    lambda w: {'model': w | {'head.weight': np.zeros((1000, 192), np.float32),
                             'head.bias': np.zeros(1000, np.float32)}},
    lambda w: w | {'mask_token': np.zeros((1, 192), np.float32)}], ids=['DINO', 'timm', 'DINOv2'])
def test_weights_of_a_vit_are_recognized_without_their_head(wrap):
  state_dict = convert.to_torch(weights.variables('vit_t4', width=64), 'vit_t4')
  backbone = {key: x for key, x in state_dict.items() if not key.startswith('fc.')}
  found = layouts.find_encoder(layouts.find_weights(wrap(backbone), 'a.pth'), 'a.pth')
  assert (found.name, found.width, found.features, found.head) == ('vit_t4', 64, 192, None)
  assert found.backbone.keys() == backbone.keys()


@pytest.mark.parametrize('channels, name', [(384, 'vit_s16'), (768, 'vit_b16'), (192, None)])
def test_a_vit_is_told_by_its_channels(channels, name):
  shapes = jax.eval_shape(lambda: models.create('vit_s16', width=channels // 6).init(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False))
  state_dict = convert.to_torch(jax.tree.map(
      lambda x: np.broadcast_to(np.float32(0), x.shape), shapes), 'vit_s16')
  backbone = {key: x for key, x in state_dict.items() if not key.startswith('fc.')}
  if name is None:
    with pytest.raises(errors.UserError, match='a ViT of 192 channels, whose number of heads'):
      layouts.find_encoder(backbone, 'a.pth')
  else:
    assert layouts.find_encoder(backbone, 'a.pth').name == name


def test_position_embeddings_of_another_view_size_are_resized():
  variables = weights.variables('vit_t4', width=4)
  state_dict = convert.to_torch(variables, 'vit_t4')
  patches = np.random.default_rng(0).standard_normal((1, 1 + 4 * 4, 12)).astype(np.float32)
  found = convert.from_torch(state_dict | {'pos_embed': patches}, 'vit_t4')['params']['pos_embed']
  assert found.shape == (1, 1 + 8 * 8, 12)
  np.testing.assert_array_equal(found[:, 0], patches[:, 0])
  constant = np.full((1, 1 + 4 * 4, 12), 0.5, np.float32)
  np.testing.assert_allclose(vit.resize_positions(jnp.asarray(constant), (3, 7)), 0.5, rtol=1e-6)
  assert vit.resize_positions(jnp.asarray(patches), (3, 7)).shape == (1, 1 + 21, 12)


def test_bfloat16_keeps_parameters_and_layer_norm_wide():
  for make, side in ((functools.partial(vit.ViT, 2, 4, 4, True, depth=2), 16),
                     (functools.partial(convnext.ConvNeXt, (1, 1, 1, 1)), 32)):
    encoder, exact = make(width=8, dtype=jnp.bfloat16), make(width=8)
    images = jax.random.normal(jax.random.key(0), (3, side, side, 3))
    variables = jax.jit(functools.partial(exact.init, train=False))(jax.random.key(1), images)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    features = jax.jit(functools.partial(encoder.apply, train=False))(variables, images)
    assert features.dtype == jnp.float32
    expected = exact.apply(variables, images, train=False)
    assert np.sum(features * expected, axis=1).min() > 0.99
