import contextlib
import importlib
import os
import pickle
import shutil
import sys

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instdisc_jax import checkpoint, convert, errors, main, models, train, workdir
from instdisc_jax import config as config_lib
from tests import parity, twins
from tests.conftest import small_config


def _variables(name, width=4, embedding_dim=6, seed=0):
  """Random variables of an encoder, without compiling its initialisation."""
  model = models.create(name, width=width, embedding_dim=embedding_dim)
  side = models.SMALLEST_SIDE.get(name, 32)
  shapes = jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))
  random = np.random.default_rng(seed)
  fill = lambda x: random.standard_normal(x.shape).astype(np.float32) * 0.1
  filled = {'batch_stats': {}} | jax.tree.map(fill, shapes)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: np.abs(x) + 0.5 if path[-1].key == 'var' else x, filled)


def _assert_same(found, expected):
  found, expected = map(traverse_util.flatten_dict, (found, expected))
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_array_equal(found[path], value, err_msg=str(path))


@pytest.mark.parametrize('name', models.NAMES)
def test_jax_to_pytorch_to_jax_is_exact(name):
  variables = _variables(name)
  _assert_same(convert.from_torch(convert.to_torch(variables, name), name), variables)


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
  _assert_same(convert.from_torch(prefixed, name), variables)


@pytest.mark.parametrize('name, change, message', [
    ('resnet18', lambda d: d.pop('layer2.0.bn1.running_var'), "'layer2.0.bn1.running_var' is miss"),
    ('resnet18', lambda d: d.pop('conv1.weight'), "'conv1.weight' is missing"),
    ('vgg16', lambda d: d.pop('fc.weight'), "'fc.weight' is missing"),
    ('resnet18', lambda d: d.update(extra=np.zeros(3)), "'extra' is no weight of resnet18"),
    ('resnet18_cifar', lambda d: d.update({'layer3.0.shortcut.0.weight': np.zeros((16, 8, 3, 3))}),
     r"'layer3.0.shortcut.0.weight' has shape \(16, 8, 3, 3\), must be \(16, 8, 1, 1\)"),
    ('resnet18', lambda d: d.update({'bn1.bias': np.zeros(5)}),
     r"'bn1.bias' has shape \(5,\), must be \(4,\)"),
    ('alexnet', lambda d: d.update({'classifier.0.weight': np.zeros((256, 575))}),
     r"'classifier.0.weight' has shape \(256, 575\), must be \(256, 576\)"),
])
def test_a_missing_extra_or_misshaped_key_is_named(name, change, message):
  state_dict = convert.to_torch(_variables(name), name)
  change(state_dict)
  with pytest.raises(errors.UserError, match=message):
    convert.from_torch(state_dict, name)


def test_a_wrong_call_is_one_line(tmp_path, capsys):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'kept').write_text('kept')
  file = tmp_path / 'file.safetensors'
  file.write_bytes(b'nonsense')
  for arguments in (
      ['--workdir=x'], ['--from=a', '--to=b', '--workdir=x'], ['--to=a.pth'],
      [f'--from={tmp_path}/none.pth', f'--workdir={tmp_path}/new'],
      [f'--from={file}', f'--workdir={tmp_path}/full'],
      [f'--workdir={tmp_path}/none', '--to=a.pth'], [f'--workdir={tmp_path}', '--to=a.onnx']):
    assert convert.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1, error
  assert sorted(p.name for p in tmp_path.iterdir()) == ['file.safetensors', 'full']


def test_nothing_needs_pytorch_to_be_imported():
  modules = '; '.join(f'import instdisc_jax.{name}' for name in ('main', 'convert'))
  block = ('import sys, importlib.abc\n'
           'class Block(importlib.abc.MetaPathFinder):\n'
           '  def find_spec(self, name, path, target=None):\n'
           '    if name.split(".")[0] in ("torch", "safetensors"): raise ImportError(name)\n'
           'sys.meta_path.insert(0, Block())\n')
  assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, '-c', block + modules]) == 0


# What follows reads and writes PyTorch's own files.

BANK_MODULE = """
import torch

class AliasMethod(object):
  def __init__(self, n):
    self.prob, self.alias = torch.ones(n), torch.zeros(n, dtype=torch.long)

class Bank(torch.nn.Module):
  def __init__(self, memory, params):
    super().__init__()
    self.multinomial = AliasMethod(len(memory))
    self.unigrams = torch.ones(len(memory))
    self.register_buffer('params', torch.tensor(params))
    self.register_buffer('memory', torch.as_tensor(memory))
"""


@pytest.fixture
def torch():
  return pytest.importorskip('torch', reason='reads and writes .pth, which needs PyTorch')


@pytest.fixture
def make_bank(tmp_path, monkeypatch, torch):
  """(memory, params) -> an object of the published class, pickled whole with its source."""
  (tmp_path / 'lib').mkdir()
  (tmp_path / 'lib' / '__init__.py').touch()
  for module, name in (('NCEAverage', 'NCEAverage'), ('LinearAverage', 'LinearAverage')):
    source = BANK_MODULE.replace('Bank', name)
    (tmp_path / 'lib' / f'{module}.py').write_text(source.replace(
        'class AliasMethod', 'from lib.alias_multinomial import AliasMethod\nclass Unused'))
  (tmp_path / 'lib' / 'alias_multinomial.py').write_text(BANK_MODULE.split('class Bank')[0])
  monkeypatch.syspath_prepend(str(tmp_path))

  def make(memory, params):
    name = 'NCEAverage' if len(params) == 4 else 'LinearAverage'
    return getattr(importlib.import_module(f'lib.{name}'), name)(memory, params)

  yield make
  for name in [name for name in sys.modules if name.split('.')[0] == 'lib']:
    del sys.modules[name]


def _tensors(state_dict, torch, prefix=''):
  return {prefix + key: torch.from_numpy(value.copy()) for key, value in state_dict.items()}


def _forget_published_classes():
  for name in [name for name in sys.modules if name.split('.')[0] == 'lib']:
    del sys.modules[name]
  shutil.rmtree(sys.path[0] + '/lib')


N, D, SIDE = 256, 6, 8


@pytest.fixture
def pictures(tmp_path):
  random = np.random.default_rng(0)
  labels = np.arange(N + 50) % 3
  images = random.integers(0, 256, (N + 50, SIDE, SIDE, 3)) // 2 + labels[:, None, None, None] * 40
  file = tmp_path / 'pictures.npz'
  np.savez(file, images=images[:N].astype(np.uint8), labels=labels[:N],
           test_images=images[N:].astype(np.uint8), test_labels=labels[N:])
  return file, images.astype(np.uint8), labels


def _config(pictures, **loss):
  config = config_lib.default()
  config.dataset.name = f'arrays:{pictures[0]}'
  config.model.update(name='resnet10_cifar', width=2, embedding_dim=D)
  config.loss.update(loss)
  config.knn.neighbors = 5
  return config


@pytest.mark.slow
@pytest.mark.parametrize('zip_format', [True, False])
@pytest.mark.parametrize('loss', ['nce', 'softmax'])
def test_a_published_cifar_checkpoint_becomes_a_workdir_that_trains_on(
    tmp_path, torch, make_bank, pictures, capsys, zip_format, loss):
  name = 'resnet10_cifar'  # as resnet18_cifar, with fewer blocks
  variables = _variables(name, width=2, embedding_dim=D)
  bank = twins.unit_rows(np.random.default_rng(1), N, D).astype(np.float32)
  params = [64.0, 0.07, 1234.5, 0.5] if loss == 'nce' else [0.07, 0.5]
  saved = {'net': _tensors(convert.to_torch(variables, name), torch, 'module.'),
           'lemniscate': make_bank(bank, params), 'acc': 0.1, 'epoch': 0}
  torch.save(saved, tmp_path / 'ckpt.t7', _use_new_zipfile_serialization=zip_format)
  _forget_published_classes()
  workdir = tmp_path / 'run'
  assert convert.main([f'--from={tmp_path}/ckpt.t7', f'--workdir={workdir}']) == 0
  output = capsys.readouterr().out
  assert 'resnet10_cifar, width 2, embedding of 6; head from the file' in output
  assert 'bank: 256 rows' in output

  state = checkpoint.read(workdir / 'checkpoints')
  np.testing.assert_array_equal(state['bank'], bank)
  assert state['step'] == 2 and state['normalizer'] == (1234.5 if loss == 'nce' else 0)
  _assert_same({key: state[key] for key in variables}, variables)

  config = _config(pictures, name=loss, temperature=0.07, noise_count=64)
  config.steps = 2  # where it stands: evaluation alone
  summary = main.run(config, workdir, jax.devices()[:2])
  assert summary['final_loss'] is None and summary['steps'] == 2
  _, images, labels = pictures
  mean, std = (np.float32(config.augment[key]) for key in ('mean', 'std'))
  features = models.create(name, width=2, embedding_dim=D).apply(
      variables, (images[N:] / np.float32(255) - mean) / std, train=False)
  scores = twins.class_scores(np.asarray(features), bank, labels, 5, config.knn.temperature, 3)
  assert summary['knn_top1_bank'] == pytest.approx((scores.argmax(axis=1) == labels[N:]).mean())

  config.steps = 4
  trained = main.run(config, workdir, jax.devices()[:2])
  assert trained['steps'] == 4 and np.isfinite(trained['final_loss'])
  assert trained['normalizer'] == (1234.5 if loss == 'nce' else None)
  moved = np.any(checkpoint.read(workdir / 'checkpoints')['bank'] != bank, axis=1)
  assert moved.all()  # an epoch of two batches of 128 has seen each row


@pytest.mark.slow
def test_a_published_imagenet_checkpoint_brings_its_momentum_and_epoch(
    tmp_path, torch, make_bank):
  name = 'resnet18'
  model = torch.nn.Module()
  state_dict = convert.to_torch(_variables(name, width=2, embedding_dim=D), name)
  trained = [key for key in state_dict if 'running' not in key and 'tracked' not in key]
  model = torch.nn.ParameterList(torch.from_numpy(state_dict[key].copy()) for key in trained)
  optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
  momentum = {}
  for key, parameter in zip(trained, model.parameters()):
    parameter.grad = torch.randn(parameter.shape, generator=torch.manual_seed(1))
    momentum[key] = parameter.grad.numpy()
  optimizer.step()
  bank = twins.unit_rows(np.random.default_rng(1), 1000, D).astype(np.float32)
  torch.save({'epoch': 3, 'arch': name, 'best_prec1': torch.tensor(1.5),
              'state_dict': _tensors(state_dict, torch, 'module.'),
              'lemniscate': make_bank(bank, [64.0, 0.07, -1.0, 0.5]),
              'optimizer': optimizer.state_dict()}, tmp_path / 'checkpoint.pth.tar')
  _forget_published_classes()
  convert.import_checkpoint(tmp_path / 'checkpoint.pth.tar', tmp_path / 'run')
  state = checkpoint.read(tmp_path / 'run' / 'checkpoints')
  assert state['step'] == 12 and state['normalizer'] == 0  # 3 · 1000 / 256; Z not yet set
  trace = optax.tree.get(state['opt_state'], 'trace')
  assert optax.tree.get(state['opt_state'], 'count') == 12
  zeros = {'batch_stats': state['batch_stats']}
  for key, value in convert.to_torch(zeros | {'params': trace}, name).items():
    if key in momentum:
      np.testing.assert_array_equal(value, momentum[key], err_msg=key)
  settings, _ = workdir.read(tmp_path / 'run')
  assert settings['loss.name'] == 'nce' and settings['loss.temperature'] == 0.07
  assert settings['batch_size'] == 256 and settings['augment.mean'] == [0.485, 0.456, 0.406]


def _other_layouts(name):
  """Files of other projects -> (content, whether the head is used)."""
  variables = _variables(name, embedding_dim=D)
  plain = convert.to_torchvision(variables, name)
  head = {key: value for key, value in plain.items() if key.startswith('fc.')}
  backbone = {key: value for key, value in plain.items() if key not in head}
  put = lambda prefix, tree: {prefix + key: value for key, value in tree.items()}
  fc = {key.removeprefix('fc.'): value for key, value in head.items()}
  classifier = {'fc.weight': np.zeros((1000, fc['weight'].shape[1]), np.float32),
                'fc.bias': np.zeros(1000, np.float32)}
  two_layers = {'0.weight': np.eye(4, dtype=np.float32), '0.bias': np.zeros(4, np.float32),
                '2.weight': fc['weight'], '2.bias': fc['bias']}
  bank = twins.unit_rows(np.random.default_rng(1), 50, D).astype(np.float32)
  return variables, bank, {
      'plain': (plain, True),
      'torchvision': (backbone | classifier, False),
      'moco': ({'epoch': 200, 'state_dict': {
          **put('module.encoder_q.', plain), **put('module.encoder_k.', plain),
          'module.queue': np.zeros((D, 9), np.float32)}}, True),
      'moco v2': ({'state_dict': put('module.encoder_q.', backbone)
                   | put('module.encoder_q.fc.', two_layers)}, False),
      'pycontrast': ({'model': put('module.encoder.', backbone) | put('module.head.0.', fc)}, True),
      'pycontrast mlp': ({'model': put('module.encoder.', backbone)
                          | put('module.head.', two_layers)}, False),
      'vissl': ({'classy_state_dict': {'base_model': {'model': {
          'trunk': put('_feature_blocks.', backbone), 'heads': put('0.clf.0.', fc)}}}}, True),
      'mmselfsup': ({'meta': {}, 'state_dict': {
          **put('backbone.', backbone), **put('neck.fc.', fc),
          'memory_bank.feature_bank': bank}}, True),
  }


@pytest.mark.parametrize('name, layout', [
    (['resnet18', 'resnet50'][i % 2], layout)
    for i, layout in enumerate(_other_layouts('resnet18')[2])])
def test_layouts_of_other_projects_are_recognised(tmp_path, monkeypatch, name, layout):
  variables, bank, layouts = _other_layouts(name)
  content, head = layouts[layout]
  monkeypatch.setattr(convert, 'read_file', lambda file: content)
  lines = convert.import_checkpoint('file.pth', tmp_path / 'run')
  assert lines[0].startswith(f'encoder: {name}, width 4, embedding of {D if head else 128}')
  state = checkpoint.read(tmp_path / 'run' / 'checkpoints')
  if not head:
    assert 'head fresh' in lines[0]
    assert state['params'].pop('fc')['kernel'].shape[1] == 128
    variables['params'].pop('fc')
  _assert_same({key: state[key] for key in variables}, variables)
  if layout == 'mmselfsup':
    np.testing.assert_array_equal(state['bank'], bank)
  else:
    assert state['bank'] is None


def test_a_workdir_without_a_bank_goes_on_with_a_fresh_one(tmp_path, monkeypatch):
  config = small_config()
  name = config.model.name
  variables = _variables(name, config.model.width, config.model.embedding_dim)
  monkeypatch.setattr(convert, 'read_file', lambda file: convert.to_torch(variables, name))
  convert.import_checkpoint('file.pth', tmp_path / 'run')
  with workdir.claim(tmp_path / 'run', config, 'any data'):
    pass
  mesh = train.make_mesh(jax.devices()[:2])
  encoder = models.create(name, width=config.model.width, embedding_dim=config.model.embedding_dim)
  fresh = train.make_init(config, encoder, train.make_optimizer(config, 129), 129, (32, 32, 3),
                          mesh)()
  checkpoints = checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints', 1, 129, mesh)
  state = checkpoints.restore(fresh)
  checkpoints.close()
  assert state.bank.shape == (130, 16)
  np.testing.assert_array_equal(state.bank, fresh.bank)
  _assert_same({'params': state.params, 'batch_stats': state.batch_stats}, variables)


def test_a_bank_of_other_data_is_refused(tmp_path, monkeypatch):
  config = small_config()
  name = config.model.name
  weights = convert.to_torchvision(_variables(name, 2, 16), name)
  content = {('neck.' if key.startswith('fc.') else 'backbone.') + key: value
             for key, value in weights.items()}
  content['memory_bank.feature_bank'] = np.ones((50, 16), np.float32)
  monkeypatch.setattr(convert, 'read_file', lambda file: content)
  convert.import_checkpoint('file.pth', tmp_path / 'run')
  config.batch_size = 128
  with pytest.raises(errors.UserError, match='50 rows, must have one for each of the 128'):
    main.run(config, tmp_path / 'run', jax.devices()[:1])


@pytest.mark.parametrize('content, message', [
    ({}, 'holds no weights'), ([1, 2], 'holds no weights'),
    ({'state_dict': {'a.weight': np.zeros((2, 3), np.float32)}}, 'no encoder known here'),
    ({'net': convert.to_torch(_variables('resnet18_cifar'), 'resnet18_cifar'),
      'lemniscate': {'memory': np.zeros((9, 5)), 'params': np.ones(4)}}, r'must be \(N, 6\)'),
    ({'net': convert.to_torch(_variables('resnet18_cifar'), 'resnet18_cifar'),
      'lemniscate': {'other': 1}}, "lacks the published 'memory'")])
def test_a_file_that_is_no_checkpoint_is_refused_and_leaves_nothing(
    tmp_path, monkeypatch, content, message):
  monkeypatch.setattr(convert, 'read_file', lambda file: content)
  with pytest.raises(errors.UserError, match=message):
    convert.import_checkpoint('file.pth', tmp_path / 'run')
  assert not any(tmp_path.iterdir())


class _Hostile:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


@pytest.mark.slow
@pytest.mark.parametrize('zip_format', [True, False])
def test_a_hostile_pickle_is_refused_by_name_and_never_executed(
    tmp_path, torch, capsys, zip_format):
  file = tmp_path / 'hostile.pth'
  torch.save({'state_dict': _Hostile(tmp_path / 'created')}, file,
             _use_new_zipfile_serialization=zip_format)
  assert convert.main([f'--from={file}', f'--workdir={tmp_path}/run']) == 2
  assert 'it asks for posix.system' in capsys.readouterr().err
  file.write_bytes(pickle.dumps(_Hostile(tmp_path / 'created'), protocol=2))
  assert convert.main([f'--from={file}', f'--workdir={tmp_path}/run']) == 2
  assert sorted(p.name for p in tmp_path.iterdir()) == ['hostile.pth']


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
  variables = _variables(name, width, D)
  (tmp_path / 'run').mkdir()
  workdir.write(tmp_path / 'run', {'model.name': name}, None)
  monkeypatch.setattr(checkpoint, 'read', lambda folder: variables)
  convert.export(tmp_path / 'run', tmp_path / f'net{suffix}', with_head=True)
  convert.export(tmp_path / 'run', tmp_path / f'backbone{suffix}')
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
  variables = _variables(name, 64, D)
  (tmp_path / 'run').mkdir()
  workdir.write(tmp_path / 'run', {'model.name': name}, None)
  monkeypatch.setattr(checkpoint, 'read', lambda folder: variables)
  assert convert.main([f'--workdir={tmp_path}/run', f'--to={tmp_path}/net.pth', '--head']) == 0
  net = timm.create_model(name, num_classes=D).eval()
  net.load_state_dict(torch.load(tmp_path / 'net.pth', weights_only=True))
  images = np.random.default_rng(0).standard_normal((2, 64, 64, 3)).astype(np.float32)
  with torch.no_grad():
    expected = torch.nn.functional.normalize(net(torch.from_numpy(images).permute(0, 3, 1, 2)))
  model = models.create(name, width=64, embedding_dim=D)
  found = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
  np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)
