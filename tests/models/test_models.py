import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from instdisc_jax import models
from instdisc_jax.models import conv, layers
from instdisc_jax.runtime import mesh as mesh_lib


def _shapes(name, size, **kwargs):
  model = models.create(name, **kwargs)
  images = jnp.zeros((2, size, size, 3))
  return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


# torchvision's and timm's counts without the head (and with 3x3 stems, and AlexNet's norms).
@pytest.mark.parametrize('name, size, millions', [
    ('resnet18', 224, 11.177), ('resnet34', 224, 21.285), ('resnet50', 224, 23.508),
    ('resnet101', 224, 42.500), ('resnet18_cifar', 32, 11.169), ('resnet34_cifar', 32, 21.277),
    ('resnet50_cifar', 32, 23.501), ('vgg16', 224, 134.2605), ('vgg16_bn', 224, 134.2690),
    ('alexnet', 224, 58.291), ('vit_s16', 224, 21.666), ('vit_b16', 224, 85.799),
    ('convnext_t', 224, 27.820)])
def test_encoders_have_the_known_number_of_parameters(name, size, millions):
  params = dict(_shapes(name, size)['params'])
  head = params.pop('fc')
  assert head['kernel'].shape[1] == 128
  assert sum(np.prod(p.shape) for p in jax.tree.leaves(params)) == pytest.approx(
      millions * 1e6, rel=1e-4)


@pytest.mark.parametrize('name, size', [
    ('resnet10_cifar', 32), ('resnet10', 32), ('alexnet', 63),
    ('vgg16', 32), ('vgg16_bn', 32), ('vit_t4', 32), ('vit_s14', 40), ('convnext_t', 32)])
def test_embeddings_are_unit_vectors(name, size):
  model = models.create(name, embedding_dim=12, width=4)
  images = jax.random.normal(jax.random.key(0), (3, size, size, 3))
  variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), images)
  for train_mode in (False, True):
    features, _ = jax.jit(lambda v, x: model.apply(v, x, train=train_mode, mutable=True))(
        variables, images)
    assert features.shape == (3, 12)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize('size', [3, 4, 5, 7, 13])
def test_pooling_to_a_size_averages_even_parts(size):
  x = np.random.default_rng(0).standard_normal((2, 7, 9, 3)).astype(np.float32)
  expected = np.zeros((2, size, size, 3))
  for p in range(size):
    for q in range(size):
      rows = slice(p * 7 // size, -(-(p + 1) * 7 // size))
      columns = slice(q * 9 // size, -(-(q + 1) * 9 // size))
      expected[:, p, q] = x[:, rows, columns].mean((1, 2))
  np.testing.assert_allclose(layers.average_to(jnp.asarray(x), size), expected, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
  model = models.create('resnet10_cifar', width=4, dtype=jnp.bfloat16)
  images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
  variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(1), images)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  features = jax.jit(functools.partial(model.apply, train=False))(variables, images)
  assert features.dtype == jnp.float32
  text = jax.jit(functools.partial(model.apply, train=False)).lower(variables, images).as_text()
  convolutions = [line for line in text.splitlines() if 'stablehlo.convolution' in line]
  assert convolutions and all('xbf16>' in line.split('->')[-1] for line in convolutions)
  exact = models.create('resnet10_cifar', width=4).apply(variables, images, train=False)
  assert np.sum(features * exact, axis=1).min() > 0.99


def test_an_unknown_name_lists_the_known_ones():
  with pytest.raises(KeyError, match=r"unknown model 'resnet19'; known: .*resnet18_cifar"):
    models.create('resnet19')


def test_the_same_seed_gives_the_same_parameters():
  model = models.create('resnet10_cifar', width=2)
  init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 8, 8, 3)), train=False))
  same = jax.tree.map(np.array_equal, init(jax.random.key(3)), init(jax.random.key(3)))
  assert all(jax.tree.leaves(same))


class TestBatchNorm:
  x = np.random.default_rng(0).normal(3, 2, (16, 4, 5, 6)).astype('f4')

  def _init(self, **kwargs):
    norm = layers.BatchNorm(**kwargs)
    variables = norm.init(jax.random.key(0), self.x)
    params = {'scale': jnp.arange(1.0, 7), 'bias': jnp.arange(6.0)}
    return norm, {'params': params, 'batch_stats': variables['batch_stats']}

  def test_train_mode_normalizes_by_the_batch_and_keeps_the_unbiased_variance(self):
    norm, variables = self._init(train=True)
    y, updated = norm.apply(variables, self.x, mutable=['batch_stats'])
    mean, var = self.x.mean((0, 1, 2)), self.x.var((0, 1, 2))
    expected = (self.x - mean) / np.sqrt(var + 1e-5) * np.arange(1, 7) + np.arange(6)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    running = updated['batch_stats']
    np.testing.assert_allclose(running['mean'], 0.1 * mean, rtol=1e-5)
    unbiased = self.x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(running['var'], 0.9 + 0.1 * unbiased, rtol=1e-5)

  def test_eval_mode_uses_the_running_statistics(self):
    norm, variables = self._init(train=False)
    variables['batch_stats'] = {'mean': jnp.full(6, 2.0), 'var': jnp.full(6, 4.0)}
    y = norm.apply(variables, self.x)
    expected = (self.x - 2) / np.sqrt(4 + 1e-5) * np.arange(1, 7) + np.arange(6)
    np.testing.assert_allclose(y, expected, atol=1e-4)

  def test_synchronized_over_8_devices_equals_one_device(self):
    alone, variables = self._init(train=True)
    sync, _ = layers.BatchNorm(train=True, axis_name=mesh_lib.AXIS), None
    fn = lambda v, x: sync.apply(v, x, mutable=['batch_stats'])
    mapped = jax.shard_map(fn, mesh=mesh_lib.make(), in_specs=(P(), P(mesh_lib.AXIS)),
                           out_specs=(P(mesh_lib.AXIS), P()))
    expected = alone.apply(variables, self.x, mutable=['batch_stats'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
                 mapped(variables, self.x), expected)


@pytest.mark.parametrize('kernel, stride, batch, side', [
    (3, 1, 40, 12), (3, 2, 33, 12), (1, 2, 17, 12), (7, 2, 5, 12),
    (3, 1, 9, 1), (3, 1, 9, 2), (3, 2, 9, 2), (3, 2, 9, 3), (3, 2, 9, 4), (7, 2, 9, 2)])
def test_convolution_and_its_gradients_are_those_of_xla(kernel, stride, batch, side):
  random = np.random.default_rng(0)
  with jax.enable_x64(True):
    x = jnp.asarray(random.standard_normal((batch, side, side, 3)))
    w = jnp.asarray(random.standard_normal((kernel, kernel, 3, 5)))
    pad = (kernel - 1) // 2
    plain = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (stride, stride), ((pad, pad), (pad, pad)),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    y, pull = jax.vjp(plain, x, w)
    module = conv.Conv(5, kernel, stride, jnp.float64, nn.initializers.zeros)
    ours, our_pull = jax.vjp(lambda x, w: module.apply({'params': {'kernel': w}}, x), x, w)
    np.testing.assert_allclose(ours, y, rtol=1e-12, atol=1e-12)
    cotangent = jnp.asarray(random.standard_normal(y.shape))
    for grad, expected in zip(our_pull(cotangent), pull(cotangent)):
      np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-10)
