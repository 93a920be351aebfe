import inspect
import json
import pathlib
import re
import runpy

import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import models
from instdisc_jax.runtime import errors
from instdisc_jax.training import step as step_lib
from tests import programs

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_state_their_command(path):
  module = runpy.run_path(str(path))
  config = module['get_config']()
  config_lib.validate(config)
  assert f'--config=configs/{path.name}' in module['__doc__']


def test_cifar10_is_the_published_recipe():
  config = runpy.run_path(str(CONFIGS[0].parent / 'cifar10.py'))['get_config']()
  flat = config_lib.flatten(config)
  published = {
      'batch_size': 128, 'epochs': 200, 'loss.name': 'softmax', 'loss.temperature': 0.1,
      'bank.momentum': 0.5, 'model.embedding_dim': 128, 'model.width': 64,
      'optimizer.learning_rate': 0.03, 'optimizer.momentum': 0.9, 'optimizer.weight_decay': 5e-4,
      'optimizer.milestones': (120, 160), 'augment.crop_scale': (0.2, 1.0), 'augment.flip': 0.0,
      'augment.hue': 0.4, 'augment.grayscale': 0.2, 'knn.neighbors': 200, 'knn.temperature': 0.1}
  assert {key: flat[key] for key in published} == published


def test_the_models_and_losses_that_can_be_set_are_those_that_exist():
  assert config_lib.MODELS == models.NAMES
  assert config_lib.SMALLEST_SIDE == models.SMALLEST_SIDE
  assert config_lib.SMALLEST_SIDE.keys() <= set(config_lib.MODELS)
  computed = re.findall(r"case '(\w+)':", inspect.getsource(step_lib))
  assert sorted(computed) == sorted(config_lib.LOSSES)
  assert set(config_lib.SAMPLED_LOSSES) < set(config_lib.LOSSES)


@pytest.mark.parametrize('loss', config_lib.LOSSES)
def test_every_loss_that_can_be_set_is_computed_by_the_step(loss):
  run_steps, arguments, state = programs.step(
      dict(name=loss, noise_count=5), num_rows=20, num_devices=2, batch_size=4, dim=8)
  new_state, metrics = run_steps.eval_shape(*arguments)
  assert 'loss' in metrics and new_state.bank.shape == state.bank.shape
  with pytest.raises(ValueError, match='unknown loss another'):
    programs.step(dict(name='another'), num_rows=20, num_devices=2, batch_size=4,
                  dim=8)[0].eval_shape(*arguments)


def test_every_default_is_within_its_limit():
  for setting in config_lib.SETTINGS:
    if setting.default is not None and setting.limit is not None:
      assert setting.limit.holds(setting.default), setting.key
      assert setting.requirement
    assert setting.meaning and (setting.default is not None or setting.kind is not None)
  settings = config_lib.flatten(config_lib.default())
  assert settings == {setting.key: setting.default for setting in config_lib.SETTINGS}
  config_lib.validate(config_lib.default())


def test_the_length_of_a_cosine_run_is_fixed():
  settings = config_lib.flatten(config_lib.default())
  may_change = config_lib.changeable(settings)
  assert may_change == {setting.key for setting in config_lib.SETTINGS if setting.changeable}
  assert {'epochs', 'steps', 'checkpoint.keep'} <= may_change
  settings['optimizer.schedule'] = 'cosine'
  assert config_lib.changeable(settings) == may_change - {'epochs', 'steps'}


def test_settings_survive_json():
  config = config_lib.default()
  config.optimizer.milestones, config.loss.temperature, config.steps = (3, 5), 0.2, 7
  kept = json.loads(json.dumps(config_lib.to_json(config)))
  assert config_lib.flatten(config_lib.from_json(kept)) == config_lib.flatten(config)
  del kept['bank.momentum']  # written before there was such a setting
  assert config_lib.from_json(kept | {'another': 1}).bank.momentum == 0.5


@pytest.mark.parametrize('key, value', [
    ('seed', -1), ('batch_size', 0), ('epochs', 0), ('model.name', 'resnet19'), ('model.width', 0),
    ('model.dtype', 'float16'), ('model.dtype', 'float64'), ('loss.name', 'contrastive'),
    ('loss.temperature', -0.1), ('loss.temperature', float('nan')), ('loss.noise_count', 0),
    ('loss.normalizer', 'none'), ('loss.normalizer', '-3'), ('loss.proximal_weight', -1.0),
    ('bank.momentum', 1.5), ('bank.init', 'zeros'), ('optimizer.learning_rate', 0.0),
    ('optimizer.momentum', 1.0), ('optimizer.milestones', (-1,)),
    ('augment.crop_scale', (0.5, 2.0)), ('augment.crop_scale', ('a', 'b')),
    ('augment.crop_ratio', (2.0, 1.0)), ('augment.hue', 0.6), ('augment.std', (0.0, 1.0, 1.0)),
    ('knn.neighbors', 0), ('knn.temperature', 0.001), ('checkpoint.keep', 0)])
def test_a_value_out_of_range_is_named_with_what_it_must_be(key, value):
  config = config_lib.default()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError, match=f'{key} is .*, .*: set ') as error:
    config_lib.validate(config)
  assert str(value) in str(error.value) and '\n' not in str(error.value)


def test_unknown_and_missing_settings_are_named():
  config = config_lib.default()
  config.loss.weight = 1
  with pytest.raises(errors.UserError, match="unknown setting 'loss.weight'"):
    config_lib.validate(config)
  config = config_lib.default()
  del config.loss['temperature']
  with pytest.raises(errors.UserError, match="'loss.temperature' is missing"):
    config_lib.validate(config)


@pytest.mark.parametrize('changes, num_rows, num_devices, message', [
    ({}, 100, 1, 'batch_size is 128, must be at most the 100 training images: set .*=100'),
    ({}, 1000, 3, 'batch_size is 128, must be a multiple of the 3 devices: set .*=129'),
    ({'knn.neighbors': 500}, 300, 1, 'knn.neighbors is 500, must be at most the 300'),
    ({'model.name': 'alexnet'}, 1000, 1, 'model.name is alexnet, which needs images of 63 pixels, '
     'must be an encoder for images of 32 pixels'),
    ({}, 1, 1, 'digits has 1 training image, must be a set of at least 2 images'),
    ({}, 2**31, 1, 'digits has 2147483648 training images, must be at most 2147483647')])
def test_settings_are_checked_against_the_data_and_the_machine(
    changes, num_rows, num_devices, message):
  config = config_lib.default()
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=message):
    config_lib.validate_for_data(config, num_rows, (32, 40), num_devices)


def _get_config(name):
  return runpy.run_path(str(CONFIGS[0].parent / name))['get_config']


@pytest.mark.parametrize('num_rows, on_cpu, batch_size, epochs, neighbors', [
    (2, True, 2, 1000, 1), (200, False, 16, 800, 14), (1500, True, 64, 427, 38),
    (1500, False, 64, 427, 38), (5000, False, 256, 512, 70), (20_000, False, 256, 200, 141),
    (20_000, True, 64, 200, 141), (1_000_000, False, 256, 40, 200)])
def test_the_settings_of_a_folder_follow_its_size_and_the_device_unless_given(
    num_rows, on_cpu, batch_size, epochs, neighbors):
  config = _get_config('folder.py')()
  config_lib.validate(config)
  filled = config_lib.fill(config, num_rows, on_cpu)
  assert (filled.batch_size, filled.epochs, filled.knn.neighbors) == (batch_size, epochs, neighbors)
  assert filled.optimizer.learning_rate == pytest.approx(0.03 * min(1, batch_size / 64))
  assert filled.optimizer.milestones == (round(0.6 * epochs), round(0.8 * epochs))
  assert (filled.model.name, filled.model.width, filled.augment.size, filled.minutes) == (
      ('resnet10', 16, 32, 60) if on_cpu else ('resnet18', 64, 224, None))
  assert config.batch_size is None  # a copy was filled
  config.epochs, config.batch_size, config.augment.size = 7, 2, 48
  filled = config_lib.fill(config, num_rows, on_cpu)
  assert (filled.epochs, filled.batch_size, filled.augment.size, filled.minutes) == (7, 2, 48, None)


def test_what_was_derived_stays_when_a_run_is_resumed_on_another_device():
  config = _get_config('folder.py')()
  stored = config_lib.to_json(config_lib.fill(config, 1500, on_cpu=True))
  assert config_lib.to_json(config_lib.fill(config, 1500, False, stored)) == stored


def test_presets_of_imagenet():
  get_config = _get_config('imagenet.py')
  published = get_config()
  assert (published.model.name, published.loss.name, published.loss.noise_count) == (
      'resnet50', 'nce', 4096)
  other = get_config('alexnet,sampled')
  assert (other.model.name, other.loss.name, other.loss.noise_count) == (
      'alexnet', 'sampled_softmax', 65536)
  for presets in ('', 'resnet18', 'vgg16', 'softmax', 'alexnet,sampled'):
    config_lib.validate(get_config(presets))
  with pytest.raises(errors.UserError, match="preset 'resnet19', must be one of resnet50"):
    get_config('resnet19')


def test_settings_that_an_earlier_version_lacked_keep_what_they_amounted_to():
  config = config_lib.default()
  new = config_lib.to_json(config)
  assert config_lib.to_json(config_lib.resume(config, {})) == new  # a new run
  assert config_lib.to_json(config_lib.resume(config, new)) == new
  imported = {'model.name': 'resnet50'}
  assert config_lib.to_json(config_lib.resume(config, imported)) == new
  old = {key: value for key, value in new.items()
         if key not in ('dataset.order', 'model.reduce_dtype', 'loss.kernel')} | {
             'model.dtype': 'bfloat16'}
  resumed = config_lib.resume(config, old)
  assert (resumed.dataset.order, resumed.model.reduce_dtype) == ('permutation', 'bfloat16')
  assert resumed.loss.kernel == 'xla'
  assert (config_lib.from_json(old).dataset.order, config_lib.from_json(new).dataset.order) == (
      'permutation', 'keyed')
  again = config_lib.resume(config, config_lib.to_json(resumed))  # as the first resume stored them
  assert (again.dataset.order, again.model.reduce_dtype) == ('permutation', 'bfloat16')
  assert again.loss.kernel == 'xla'
  config.loss.kernel = 'pallas'  # may change: it changes no more than the last bits
  assert config_lib.resume(config, old).loss.kernel == 'pallas'
  config.model.reduce_dtype = 'float32'
  with pytest.raises(errors.UserError, match='model.reduce_dtype is float32, must be bfloat16, as '
                                             'when this run was started: set --config.model.red'):
    config_lib.resume(config, old)


@pytest.mark.parametrize('key, value', [
    ('loss.views', 2), ('loss.neighbors', 3), ('model.head', 'mlp'), ('optimizer.name', 'adamw')])
def test_a_run_is_not_resumed_with_a_method_that_its_version_lacked(key, value):
  config = config_lib.default()
  old = config_lib.to_json(config)
  default = old.pop(key)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError, match=f'{key} is {value}, must be {default}, as when'):
    config_lib.resume(config, old)
  config_lib.resume(config, {'model.name': 'resnet50'})  # an import is free


def test_a_start_from_a_run_takes_its_recipe_unless_overridden():
  earlier = config_lib.to_json(config_lib.default()) | {
      'augment.size': 96, 'augment.crop_scale': [0.5, 1.0], 'loss.temperature': 0.2,
      'model.width': 32, 'model.dtype': 'bfloat16', 'batch_size': 7, 'seed': 9}
  config = config_lib.default()
  config.loss.temperature = 0.05
  found, taken = config_lib.inherit(config, earlier, ['loss.temperature'])
  assert taken == {'augment.crop_scale': (0.5, 1.0), 'augment.size': 96, 'model.width': 32}
  assert (found.augment.size, found.augment.crop_scale) == (96, (0.5, 1.0))
  assert (found.loss.temperature, found.batch_size, found.seed) == (0.05, 128, 0)
  assert found.model.dtype == 'float32' and config.augment.size is None
