import jax
import numpy as np
import optax
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import convert, experiment, models
from instdisc_jax.evaluation import summary as summary_lib
from instdisc_jax.interop import layouts, safe_pickle
from instdisc_jax.runtime import checkpoint, errors, workdir
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import import_checkpoint as importing
from instdisc_jax.training import state as state_lib
from tests import twins
from tests.conftest import small_config
from tests.interop import weights
from tests.interop.conftest import forget_published_classes

N, D, SIDE = 256, 6, 8


@pytest.fixture
def saved_images(tmp_path):
  random = np.random.default_rng(0)
  labels = np.arange(N + 50) % 3
  images = random.integers(0, 256, (N + 50, SIDE, SIDE, 3)) // 2 + labels[:, None, None, None] * 40
  file = tmp_path / 'images.npz'
  np.savez(file, images=images[:N].astype(np.uint8), labels=labels[:N],
           test_images=images[N:].astype(np.uint8), test_labels=labels[N:])
  return file, images.astype(np.uint8), labels


def _config(saved_images, **loss):
  config = config_lib.default()
  config.dataset.name = f'arrays:{saved_images[0]}'
  config.model.update(name='resnet10_cifar', width=2, embedding_dim=D)
  config.loss.update(loss)
  config.knn.neighbors = 5
  return config


@pytest.mark.slow
@pytest.mark.parametrize('zip_format', [True, False])
@pytest.mark.parametrize('loss', ['nce', 'softmax'])
def test_a_published_cifar_checkpoint_becomes_a_workdir_that_trains_further(
    tmp_path, torch, make_bank, saved_images, capsys, zip_format, loss):
  name = 'resnet10_cifar'  # as resnet18_cifar, with fewer blocks
  variables = weights.variables(name, width=2, embedding_dim=D)
  bank = twins.unit_rows(np.random.default_rng(1), N, D).astype(np.float32)
  params = [64.0, 0.07, 1234.5, 0.5] if loss == 'nce' else [0.07, 0.5]
  saved = {'net': weights.tensors(convert.to_torch(variables, name), torch, 'module.'),
           'lemniscate': make_bank(bank, params), 'acc': 0.1, 'epoch': 0}
  torch.save(saved, tmp_path / 'ckpt.t7', _use_new_zipfile_serialization=zip_format)
  forget_published_classes()
  workdir = tmp_path / 'run'
  assert convert.main([f'--from={tmp_path}/ckpt.t7', f'--workdir={workdir}']) == 0
  output = capsys.readouterr().out
  assert 'resnet10_cifar, width 2, embedding of 6; head from the file' in output
  assert 'bank: 256 rows' in output

  state = checkpoint.read(workdir / 'checkpoints')
  np.testing.assert_array_equal(state['bank'], bank)
  assert state['step'] == 2 and state['normalizer'] == (1234.5 if loss == 'nce' else 0)
  weights.assert_same({key: state[key] for key in variables}, variables)

  config = _config(saved_images, name=loss, temperature=0.07, noise_count=64)
  config.steps = 2  # those of the checkpoint: evaluation alone
  summary = experiment.run(config, workdir, jax.devices()[:2])
  assert summary['final_loss'] is None and summary['steps'] == 2
  _, images, labels = saved_images
  mean, std = (np.float32(config.augment[key]) for key in ('mean', 'std'))
  features = models.create(name, width=2, embedding_dim=D).apply(
      variables, (images[N:] / np.float32(255) - mean) / std, train=False)
  scores = twins.class_scores(np.asarray(features), bank, labels, 5, config.knn.temperature, 3)
  assert summary['knn_top1_bank'] == pytest.approx((scores.argmax(axis=1) == labels[N:]).mean())

  config.steps = 4
  trained = experiment.run(config, workdir, jax.devices()[:2])
  assert trained['steps'] == 4 and np.isfinite(trained['final_loss'])
  assert trained['normalizer'] == (1234.5 if loss == 'nce' else None)
  moved = np.any(checkpoint.read(workdir / 'checkpoints')['bank'] != bank, axis=1)
  assert moved.all()  # an epoch of two batches of 128 has seen each row


@pytest.mark.slow
def test_a_published_imagenet_checkpoint_keeps_its_momentum_and_epoch(
    tmp_path, torch, make_bank):
  name = 'resnet18'
  model = torch.nn.Module()
  state_dict = convert.to_torch(weights.variables(name, width=2, embedding_dim=D), name)
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
              'state_dict': weights.tensors(state_dict, torch, 'module.'),
              'lemniscate': make_bank(bank, [64.0, 0.07, -1.0, 0.5]),
              'optimizer': optimizer.state_dict()}, tmp_path / 'checkpoint.pth.tar')
  forget_published_classes()
  importing.import_checkpoint(tmp_path / 'checkpoint.pth.tar', tmp_path / 'run')
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


@pytest.mark.slow
@pytest.mark.parametrize('prefix', ['', 'encoder.'])
def test_the_momentum_of_another_head_is_left_out(tmp_path, monkeypatch, prefix):
  name = 'resnet18'  # as a classifier of 1,000 classes, or with PyContrast's names
  state_dict = {prefix + key: value for key, value in convert.to_torch(
      weights.variables(name, width=2, embedding_dim=1000), name).items()}
  trained = [key for key in state_dict if 'running' not in key and 'tracked' not in key]
  optimizer = {'param_groups': [{'params': list(range(len(trained)))}],
               'state': {i: {'momentum_buffer': np.ones_like(state_dict[key])}
                         for i, key in enumerate(trained)}}
  monkeypatch.setattr(safe_pickle, 'read_file',
                      lambda file: {'state_dict': state_dict, 'optimizer': optimizer})
  lines = importing.import_checkpoint('file.pth', tmp_path / 'run')
  assert lines[-1] == 'optimizer: starts anew'
  assert checkpoint.read(tmp_path / 'run' / 'checkpoints')['opt_state'] is None


def _other_layouts(name):
  """Files of other projects -> (content, whether the head is used)."""
  variables = weights.variables(name, embedding_dim=D)
  plain = layouts.to_torchvision(variables, name)
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
def test_layouts_of_other_projects_are_recognized(tmp_path, monkeypatch, name, layout):
  variables, bank, contents = _other_layouts(name)
  content, head = contents[layout]
  monkeypatch.setattr(safe_pickle, 'read_file', lambda file: content)
  lines = importing.import_checkpoint('file.pth', tmp_path / 'run')
  assert lines[0].startswith(f'encoder: {name}, width 4, embedding of {D if head else 128}')
  state = checkpoint.read(tmp_path / 'run' / 'checkpoints')
  if not head:
    assert 'head fresh' in lines[0]
    assert state['params'].pop('fc')['kernel'].shape[1] == 128
    variables['params'].pop('fc')
  weights.assert_same({key: state[key] for key in variables}, variables)
  if layout == 'mmselfsup':
    np.testing.assert_array_equal(state['bank'], bank)
  else:
    assert state['bank'] is None


def test_a_workdir_without_a_bank_resumes_with_a_fresh_one(tmp_path, monkeypatch):
  config = small_config()
  name = config.model.name
  variables = weights.variables(name, config.model.width, config.model.embedding_dim)
  monkeypatch.setattr(safe_pickle, 'read_file', lambda file: convert.to_torch(variables, name))
  importing.import_checkpoint('file.pth', tmp_path / 'run')
  with workdir.claim(tmp_path / 'run', config_lib.to_json(config), (), 'any data'):
    pass
  mesh = mesh_lib.make(jax.devices()[:2])
  fresh = state_lib.make_init(state_lib.Setup.of(config, 129, mesh), (32, 32))()
  checkpoints = checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints', 1, 129)
  state = checkpoints.restore(fresh)
  checkpoints.close()
  assert state.bank.shape == (130, 16)
  np.testing.assert_array_equal(state.bank, fresh.bank)
  weights.assert_same({'params': state.params, 'batch_stats': state.batch_stats}, variables)


def test_weights_alone_are_trained_with_any_optimizer(tmp_path, monkeypatch):
  images = np.random.default_rng(0).integers(0, 256, (128, SIDE, SIDE, 3), dtype=np.uint8)
  np.savez(tmp_path / 'images.npz', images=images)  # without labels there is little to evaluate
  config = _config([tmp_path / 'images.npz'])
  variables, measured = weights.variables(config.model.name, 2, D), []
  state_dict = layouts.to_torchvision(variables, config.model.name)
  monkeypatch.setattr(safe_pickle, 'read_file', lambda file: state_dict)
  monkeypatch.setattr(summary_lib, 'measure_start', lambda _, evaluator, state: measured.append(
      jax.device_get({'params': state.params, 'batch_stats': state.batch_stats})))
  lines = importing.import_checkpoint('file.pth', tmp_path / 'run')
  assert lines[-1] == 'optimizer: starts anew'
  config.optimizer.name, config.steps = 'adamw', 1
  config.model.name = workdir.read(tmp_path / 'run')[0]['model.name']
  summary = experiment.run(config, tmp_path / 'run', jax.devices()[:1])
  assert summary['steps'] == 1 and np.isfinite(summary['final_loss'])
  weights.assert_same(*measured, variables)  # what training has to improve on


def test_a_bank_of_other_data_is_refused(tmp_path, monkeypatch):
  config = small_config()
  name = config.model.name
  state_dict = layouts.to_torchvision(weights.variables(name, 2, 16), name)
  content = {('neck.' if key.startswith('fc.') else 'backbone.') + key: value
             for key, value in state_dict.items()}
  content['memory_bank.feature_bank'] = np.ones((50, 16), np.float32)
  monkeypatch.setattr(safe_pickle, 'read_file', lambda file: content)
  importing.import_checkpoint('file.pth', tmp_path / 'run')
  config.batch_size = 128
  with pytest.raises(errors.UserError, match='50 rows, must be one row for each of the 128'):
    experiment.run(config, tmp_path / 'run', jax.devices()[:1])


@pytest.mark.parametrize('content, message', [
    ({}, 'holds no weights'), ([1, 2], 'holds no weights'),
    ({'state_dict': {'a.weight': np.zeros((2, 3), np.float32)}}, 'holds no known encoder'),
    ({'net': convert.to_torch(weights.variables('resnet18_cifar'), 'resnet18_cifar'),
      'lemniscate': {'memory': np.zeros((9, 5)), 'params': np.ones(4)}}, r'must be \(N, 6\)'),
    ({'net': convert.to_torch(weights.variables('resnet18_cifar'), 'resnet18_cifar'),
      'lemniscate': {'other': 1}}, "lacks the published 'memory'")])
def test_a_file_that_is_not_a_checkpoint_is_refused_and_leaves_nothing(
    tmp_path, monkeypatch, content, message):
  monkeypatch.setattr(safe_pickle, 'read_file', lambda file: content)
  with pytest.raises(errors.UserError, match=message):
    importing.import_checkpoint('file.pth', tmp_path / 'run')
  assert not any(tmp_path.iterdir())


def test_a_file_keeps_the_views_of_its_run(trained_folder, tmp_path):
  pytest.importorskip('safetensors', reason='safetensors is not installed')
  settings, _ = workdir.read(trained_folder[1])
  file = tmp_path / 'weights.safetensors'
  assert convert.main([f'--workdir={trained_folder[1]}', f'--to={file}', '--head']) == 0
  assert convert.main([f'--from={file}', f'--workdir={tmp_path / "imported"}']) == 0
  found, _ = workdir.read(tmp_path / 'imported')
  for key in ('augment.size', 'augment.mean', 'augment.std'):
    assert found[key] == settings[key]
