import pickle
import re

import jax
import numpy as np
import pytest

from instdisc_jax import models
from instdisc_jax.interop import detectron2, layouts
from instdisc_jax.runtime import errors


def _weights(name, width=64):
  variables = jax.eval_shape(lambda: models.create(name, width=width, embedding_dim=8).init(
      jax.random.key(0), np.zeros((1, 64, 64, 3)), train=False))
  random = np.random.RandomState(0)
  filled = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), variables)
  return {key: x for key, x in layouts.to_torchvision(filled, name).items()
          if not key.startswith('fc.')}


def _as_torchvision(key):
  """detectron2's name -> torchvision's, written independently of the export."""
  stage, *rest = key.split('.')
  if stage == 'stem':
    return 'bn1.' + rest[-1] if 'norm' in rest else 'conv1.' + rest[-1]
  block, layer, *leaf = rest
  prefix = f'layer{int(stage[3:]) - 1}.{block}.'
  if layer == 'shortcut':
    return f'{prefix}downsample.{int(leaf[0] == "norm")}.{leaf[-1]}'
  number = re.sub(r'\D', '', layer)
  return prefix + (f'bn{number}.{leaf[-1]}' if leaf[0] == 'norm' else f'conv{number}.{leaf[-1]}')


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_every_tensor_is_read_back(name):
  weights = _weights(name)
  found = pickle.loads(detectron2.dumps(weights, name))
  assert found['matching_heuristics'] is True
  back = {_as_torchvision(key): x for key, x in found['model'].items()}
  kept = {key: x for key, x in weights.items() if not key.endswith('num_batches_tracked')}
  assert back.keys() == kept.keys() and len(back) == len(found['model'])
  for key, x in kept.items():
    np.testing.assert_array_equal(back[key], x)


def test_the_names_are_detectron2_s():
  found = pickle.loads(detectron2.dumps(_weights('resnet50'), 'resnet50'))['model']
  assert {'stem.conv1.weight', 'stem.conv1.norm.running_var', 'res2.0.shortcut.weight',
          'res2.0.shortcut.norm.bias', 'res3.3.conv3.norm.weight',
          'res5.2.conv1.weight'} <= found.keys()


@pytest.mark.parametrize('name, width', [('resnet10', 64), ('resnet18', 32)])
def test_other_encoders_are_refused(name, width):
  with pytest.raises(errors.UserError,
                     match=f'the encoder is {name} of width {width}, must be one that detectron2'):
    detectron2.dumps(_weights(name, width), name)
  with pytest.raises(errors.UserError, match='the encoder is alexnet, must be one that detectron2'):
    detectron2.dumps({'features.0.weight': np.zeros((64, 3, 11, 11))}, 'alexnet')
