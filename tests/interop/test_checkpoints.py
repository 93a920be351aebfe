import contextlib

import jax
import numpy as np
import pytest

from instdisc_jax import convert, models
from instdisc_jax.interop import checkpoints, safe_pickle
from instdisc_jax.runtime import checkpoint, errors, workdir
from tests.interop import weights

D = 6


def _allow_torchvision_without_operators(torch):
  """torchvision's wheel for GPUs lacks its own operators beside a CPU build of torch."""
  for op in ('nms', 'qnms'):
    with contextlib.suppress(RuntimeError):
      torch.library.define(f'torchvision::{op}', '(Tensor a, Tensor b, float c) -> Tensor')


def _torch_encoder(name, torch):
  """The same architecture in PyTorch: torchvision's, or written out."""
  _allow_torchvision_without_operators(torch)
  nn, vision = torch.nn, pytest.importorskip('torchvision').models
  if name == 'alexnet':
    conv = lambda i, o, k, s, p: [nn.Conv2d(i, o, k, s, p, bias=False), nn.BatchNorm2d(o),
                                  nn.ReLU()]
    pool = [nn.MaxPool2d(3, 2)]
    net = nn.Module()
    net.features = nn.Sequential(
        *conv(3, 6, 11, 4, 2), *pool, *conv(6, 16, 5, 1, 2), *pool, *conv(16, 24, 3, 1, 1),
        *conv(24, 24, 3, 1, 1), *conv(24, 16, 3, 1, 1), *pool, nn.AdaptiveAvgPool2d(6))
    dense = lambda i: [nn.Linear(i, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()]
    net.classifier = nn.Sequential(*dense(16 * 36), *dense(256))
    net.fc = nn.Linear(256, D)
    net.forward = lambda x: net.fc(net.classifier(net.features(x).flatten(1)))
    return net
  if name.startswith('vgg'):
    net = getattr(vision, name)()
    net.fc = nn.Linear(4096, D)
    net.forward = lambda x: net.fc(net.classifier[:5](net.avgpool(net.features(x)).flatten(1)))
    net.classifier[6] = nn.Identity()
    return net
  return getattr(vision, name)(num_classes=D)


@pytest.mark.slow
@pytest.mark.parametrize('name, width, side, suffix', [
    ('resnet18', 64, 64, '.pth'), ('resnet18', 64, 64, '.safetensors'),
    ('resnet34', 64, 64, '.pth'), ('resnet50', 64, 64, '.pth'), ('resnet101', 64, 64, '.pth'),
    ('alexnet', 4, 96, '.pth'), ('vgg16', 64, 64, '.pth'), ('vgg16_bn', 64, 64, '.pth')])
def test_an_exported_encoder_loads_in_pytorch_with_the_same_embeddings(
    tmp_path, monkeypatch, torch, name, width, side, suffix):
  variables = weights.variables(name, width, D)
  (tmp_path / 'run').mkdir()
  workdir.write(tmp_path / 'run', {'model.name': name}, None)
  monkeypatch.setattr(checkpoint, 'read', lambda folder, names: variables)
  checkpoints.export(tmp_path / 'run', tmp_path / f'net{suffix}', with_head=True)
  checkpoints.export(tmp_path / 'run', tmp_path / f'backbone{suffix}')
  if suffix == '.pth':
    load = lambda file: torch.load(file, weights_only=True)
  else:
    load = pytest.importorskip('safetensors.torch').load_file
  net = _torch_encoder(name, torch).eval()
  net.load_state_dict(load(tmp_path / f'net{suffix}'))
  images = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
  with torch.no_grad():
    expected = torch.nn.functional.normalize(
        net(torch.from_numpy(images).permute(0, 3, 1, 2))).numpy()
  model = models.create(name, width=width, embedding_dim=D)
  found = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  missing, unexpected = net.load_state_dict(load(tmp_path / f'backbone{suffix}'), strict=False)
  assert sorted(missing) == ['fc.bias', 'fc.weight'] and not unexpected


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_an_exported_encoder_loads_in_timm(tmp_path, monkeypatch, torch, name):
  _allow_torchvision_without_operators(torch)
  timm = pytest.importorskip('timm')
  variables = weights.variables(name, 64, D)
  (tmp_path / 'run').mkdir()
  workdir.write(tmp_path / 'run', {'model.name': name}, None)
  monkeypatch.setattr(checkpoint, 'read', lambda folder, names: variables)
  assert convert.main([f'--workdir={tmp_path}/run', f'--to={tmp_path}/net.pth', '--head']) == 0
  net = timm.create_model(name, num_classes=D).eval()
  net.load_state_dict(torch.load(tmp_path / 'net.pth', weights_only=True))
  images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
  with torch.no_grad():
    expected = torch.nn.functional.normalize(net(torch.from_numpy(images).permute(0, 3, 1, 2)))
  model = models.create(name, width=64, embedding_dim=D)
  found = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
  np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize('name', ['resnet18_cifar', 'alexnet', 'vgg16_bn', 'convnext_t'])
@pytest.mark.parametrize('with_head', [True, False])
def test_what_is_exported_is_read_again(tmp_path, monkeypatch, name, with_head):
  variables = weights.variables(name, embedding_dim=D)
  workdir.write(tmp_path, {'model.name': name}, None)
  monkeypatch.setattr(checkpoint, 'read', lambda folder, names: variables)
  exported = checkpoints.state_dict(tmp_path, with_head)
  monkeypatch.setattr(safe_pickle, 'read_file', lambda file: exported)
  settings, found = checkpoints.read_encoder('a.pth', D, 'linear')
  assert settings['model.name'] in (name, name.removesuffix('_cifar'))
  if not with_head:
    for tree in (found, variables):
      tree['params'].pop('fc')
  weights.assert_same(found, variables)


@pytest.mark.parametrize('name, width', [('vit_s16', 8), ('vit_b16', 4)])
def test_a_file_tells_which_vit_it_holds_where_its_weights_do_not(
    tmp_path, monkeypatch, name, width):
  pytest.importorskip('safetensors', reason='safetensors is not installed')
  workdir.write(tmp_path, {'model.name': name}, None)
  variables = weights.variables(name, width, D)  # both of 48 channels
  monkeypatch.setattr(checkpoint, 'read', lambda folder, names: variables)
  checkpoints.export(tmp_path, tmp_path / 'net.safetensors', with_head=True)
  settings, _ = checkpoints.read_encoder(tmp_path / 'net.safetensors', D, 'linear')
  assert (settings['model.name'], settings['model.width']) == (name, width)


def test_an_error_in_reading_names_the_argument_of_the_command_that_reads(monkeypatch):
  state_dict = convert.to_torch(weights.variables('resnet18'), 'resnet18')
  nothing = {'a.weight': np.zeros((2, 3), np.float32)}
  for content, message in (
      ({}, "'a.pth' holds no weights"), (nothing, "'a.pth' holds no known encoder"),
      ({key: x for key, x in state_dict.items() if key != 'conv1.weight'},
       "'conv1.weight' is missing from the weights"),
      ({key: x for key, x in state_dict.items() if key != 'bn1.bias'},
       "'bn1.bias' is missing from the weights")):
    monkeypatch.setattr(safe_pickle, 'read_file', lambda file: content)
    with pytest.raises(errors.UserError, match=message) as raised:
      checkpoints.read_encoder('a.pth', D, 'linear')
    assert raised.value.setting == '--from'
    worded = raised.value.worded({'--from': '--config.model.init'})
    assert 'set --config.model.init to ' in worded and '--from' not in worded


def test_a_file_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
  pytest.importorskip('safetensors')
  variables = weights.variables('resnet18')
  workdir.write(tmp_path, {'model.name': 'resnet18'}, None)
  monkeypatch.setattr(checkpoint, 'read', lambda folder, names: variables)
  with pytest.raises(errors.UserError, match='none/a.safetensors\' cannot be written .*set --to '):
    checkpoints.export(tmp_path, tmp_path / 'none' / 'a.safetensors')
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']
