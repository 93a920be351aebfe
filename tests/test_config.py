import pathlib
import runpy

import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import errors

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / 'configs').glob('*.py'))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_say_how_they_are_run(path):
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


@pytest.mark.parametrize('key, value', [
    ('seed', -1), ('batch_size', 0), ('epochs', 0), ('model.name', 'resnet19'), ('model.width', 0),
    ('model.dtype', 'float16'), ('model.dtype', 'float64'), ('loss.name', 'triplet'),
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
  config.loss.margin = 1
  with pytest.raises(errors.UserError, match="unknown setting 'loss.margin'"):
    config_lib.validate(config)
  config = config_lib.default()
  del config.loss['temperature']
  with pytest.raises(errors.UserError, match="'loss.temperature' is missing"):
    config_lib.validate(config)


@pytest.mark.parametrize('changes, num_rows, num_devices, message', [
    ({}, 100, 1, 'batch_size is 128, must be at most the 100 training images: set .*=100'),
    ({}, 1000, 3, 'batch_size is 128, must be a multiple of the 3 devices: set .*=129'),
    ({'knn.neighbors': 500}, 300, 1, 'knn.neighbors is 500, must be at most the 300'),
    ({'model.name': 'alexnet'}, 1000, 1, 'model.name is alexnet, .* images of 32 .*needs 63'),
    ({}, 1, 1, 'must have at least 2')])
def test_what_depends_on_data_and_machine(changes, num_rows, num_devices, message):
  config = config_lib.default()
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=message):
    config_lib.validate_for_data(config, num_rows, (32, 40, 3), num_devices)


class TestClaimWorkdir:

  def test_the_same_run_may_come_back_and_go_on_longer(self, tmp_path):
    config = config_lib.default()
    config_lib.claim_workdir(tmp_path / 'run', config, 'data')
    config.epochs, config.knn.every_epochs = 300, 5
    config_lib.claim_workdir(tmp_path / 'run', config, 'data')

  def test_a_cosine_ends_with_the_run_that_was_begun(self, tmp_path):
    config = config_lib.default()
    config.optimizer.schedule = 'cosine'
    config_lib.claim_workdir(tmp_path, config, 'data')
    config.epochs = 300
    with pytest.raises(errors.UserError, match='begun with epochs = 200, not 300'):
      config_lib.claim_workdir(tmp_path, config, 'data')

  def test_another_setting_is_named_with_both_values(self, tmp_path):
    config = config_lib.default()
    config_lib.claim_workdir(tmp_path, config, 'data')
    before = (tmp_path / 'config.json').read_text()
    config.bank.momentum = 0.25
    with pytest.raises(errors.UserError, match='bank.momentum = 0.5, not 0.25: set --config.bank.'):
      config_lib.claim_workdir(tmp_path, config, 'data')
    assert (tmp_path / 'config.json').read_text() == before

  def test_other_data_is_refused(self, tmp_path):
    config_lib.claim_workdir(tmp_path, config_lib.default(), 'these pictures')
    with pytest.raises(errors.UserError, match='begun with other data .*these pictures, not those'):
      config_lib.claim_workdir(tmp_path, config_lib.default(), 'those pictures')

  def test_what_a_checkpoint_from_elsewhere_leaves_open_the_first_run_fixes(self, tmp_path):
    config = config_lib.default()
    config_lib.write(tmp_path, {'model.width': 64, 'loss.temperature': 0.07}, None)
    with pytest.raises(errors.UserError, match='begun with loss.temperature = 0.07, not 0.1'):
      config_lib.claim_workdir(tmp_path, config, 'data')
    config.loss.temperature, config.bank.momentum = 0.07, 0.25
    config_lib.claim_workdir(tmp_path, config, 'data')
    assert config_lib.read(tmp_path)['bank.momentum'] == 0.25
    with pytest.raises(errors.UserError, match='begun with other data'):
      config_lib.claim_workdir(tmp_path, config, 'others')

  def test_a_folder_that_can_t_be_made(self, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(errors.UserError, match="workdir '.*file/run' can't be written"):
      config_lib.claim_workdir(tmp_path / 'file' / 'run', config_lib.default(), 'data')
