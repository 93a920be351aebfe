import numpy as np
import pytest

from instdisc_jax import convert, models
from instdisc_jax.runtime import errors
from tests import parity
from tests.interop import weights


@pytest.mark.parametrize('name', models.NAMES)
def test_jax_to_pytorch_to_jax_is_exact(name):
  variables = weights.variables(name)
  weights.assert_same(convert.from_torch(convert.to_torch(variables, name), name), variables)


@pytest.mark.parametrize('name, published', [
    ('resnet18_cifar', 'cifar_resnet18'), ('resnet18', 'imagenet_resnet18'),
    ('resnet50', 'imagenet_resnet50')])
def test_pytorch_to_jax_to_pytorch_is_exact_in_the_published_order(name, published):
  state_dict = parity.generated_state_dict(published)
  variables = convert.from_torch(state_dict, name)
  back = convert.to_torch(variables, name)
  assert list(back) == list(state_dict)
  for key, value in state_dict.items():
    np.testing.assert_array_equal(back[key], value)
  prefixed = {f'module.{key}': value for key, value in state_dict.items()
              if not key.endswith('num_batches_tracked')}
  weights.assert_same(convert.from_torch(prefixed, name), variables)


@pytest.mark.parametrize('name, change, message', [
    ('resnet18', lambda d: d.pop('layer2.0.bn1.running_var'), "'layer2.0.bn1.running_var' is miss"),
    ('resnet18', lambda d: d.pop('conv1.weight'), "'conv1.weight' is missing"),
    ('vgg16', lambda d: d.pop('fc.weight'), "'fc.weight' is missing"),
    ('resnet18', lambda d: d.update(extra=np.zeros(3)), "'extra' is not a weight of resnet18"),
    ('resnet18_cifar', lambda d: d.update({'layer3.0.shortcut.0.weight': np.zeros((16, 8, 3, 3))}),
     r"'layer3.0.shortcut.0.weight' has shape \(16, 8, 3, 3\), must be \(16, 8, 1, 1\)"),
    ('resnet18', lambda d: d.update({'bn1.bias': np.zeros(5)}),
     r"'bn1.bias' has shape \(5,\), must be \(4,\)"),
    ('alexnet', lambda d: d.update({'classifier.0.weight': np.zeros((256, 575))}),
     r"'classifier.0.weight' has shape \(256, 575\), must be \(256, 576\)"),
])
def test_a_missing_extra_or_misshaped_key_is_named(name, change, message):
  state_dict = convert.to_torch(weights.variables(name), name)
  change(state_dict)
  with pytest.raises(errors.UserError, match=message):
    convert.from_torch(state_dict, name)
