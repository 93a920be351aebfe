import json

import jax
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import convert, models
from instdisc_jax.interop import checkpoints, hub
from instdisc_jax.runtime import checkpoint, errors, workdir
from tests.interop import weights

D = 6
SUMMARY = {'num_rows': 1500, 'num_queries': 1500, 'knn_top1': 0.5, 'knn_top1_pixels': None}


def _settings(**changes):
  config = config_lib.default()
  config.augment.update(config_lib.PHOTOGRAPHS)
  config.update_from_flattened_dict({'model.name': 'resnet18', **changes})
  return config_lib.to_json(config)


@pytest.fixture
def state_dict(tmp_path, monkeypatch):
  """(name) -> a backbone, as `hub.write` takes it."""
  def make(name):
    variables = weights.variables(name, 64, D)
    (tmp_path / 'run').mkdir()
    workdir.write(tmp_path / 'run', {'model.name': name}, None)
    monkeypatch.setattr(checkpoint, 'read', lambda folder, names: variables)
    return variables, checkpoints.state_dict(tmp_path / 'run', with_head=False)
  return make


def test_the_folder_has_what_timm_asks_for_and_a_card(tmp_path, state_dict):
  pytest.importorskip('safetensors', reason='safetensors is not installed')
  _, backbone = state_dict('resnet18')
  hub.write(tmp_path / 'mine', backbone, _settings(), 96, SUMMARY)
  assert {file.name for file in (tmp_path / 'mine').iterdir()} == {
      'config.json', 'model.safetensors', 'README.md'}
  described = json.loads((tmp_path / 'mine' / 'config.json').read_text())
  assert described['architecture'] == 'resnet18' and described['num_features'] == 512
  assert described['pretrained_cfg']['input_size'] == [3, 96, 96]
  assert described['pretrained_cfg']['mean'] == [0.485, 0.456, 0.406]
  card = (tmp_path / 'mine' / 'README.md').read_text()
  for words in ('| kNN top-1 | 0.500 |', '| training images | 1,500 |', '| `epochs` | 200 |',
                "'local-dir:mine'", 'State a license'):
    assert words in card
  assert 'raw pixels' not in card
  with pytest.raises(errors.UserError, match="mine' exists"):
    hub.write(tmp_path / 'mine', backbone, _settings(), 96, SUMMARY)


@pytest.mark.parametrize('name, width', [('resnet18', 16), ('resnet18_cifar', 64), ('vgg16', 64)])
def test_an_encoder_that_timm_lacks_is_named(name, width):
  with pytest.raises(errors.UserError, match=f'timm has no {name} of width {width}'):
    hub.check(name, width)


def test_a_run_of_a_narrow_encoder_is_refused_before_anything_is_written(trained, tmp_path, capsys):
  assert convert.main([f'--workdir={trained[0]}', f'--to={tmp_path}/mine']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: timm has no ') and 'set --to to a file that ends in ' in error
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet10', 'resnet18', 'resnet50', 'convnext_t', 'vit_t4',
                                  'vit_s16', 'vit_s14'])
def test_timm_loads_the_folder_with_the_same_features(tmp_path, state_dict, torch, name):
  timm = pytest.importorskip('timm')
  variables, backbone = state_dict(name)
  side = 56 if name == 'vit_s14' else 64  # a multiple of the patch
  hub.write(tmp_path / 'mine', backbone, _settings(**{'model.name': name}), side, {})
  net = timm.create_model(f'local-dir:{tmp_path}/mine', pretrained=True).eval()
  data = timm.data.resolve_model_data_config(net)
  assert tuple(data['input_size']) == (3, side, side)
  assert tuple(data['std']) == (0.229, 0.224, 0.225)
  view = timm.data.create_transform(**data)(Image.new('RGB', (90, 80)))
  assert view.shape == (3, side, side)
  images = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
  with torch.no_grad():
    expected = net(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
  encoder = models.create(name, width=64, embedding_dim=D)
  _, shown = jax.jit(lambda v, x: encoder.apply(v, x, train=False, mutable=['stages']))(
      variables, images)
  np.testing.assert_allclose(shown['stages']['pooled_output'], expected, rtol=1e-4, atol=2e-5)
