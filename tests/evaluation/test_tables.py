import json

import numpy as np
from PIL import Image
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax.evaluation import tables
from instdisc_jax.runtime import errors
from instdisc_jax.runtime import workdir as workdir_lib
from tests.conftest import write_finished


@pytest.mark.parametrize('scale', tables.SCALES)
@pytest.mark.parametrize('table', tables.TABLES)
def test_every_row_of_every_table_has_its_own_valid_settings(table, scale):
  configs = [tables.configure(table, scale, title, 3) for title in tables.TABLES[table].rows]
  for config in configs:
    config_lib.validate(config)
    config_lib.validate_for_data(config, config.dataset.limit, (32, 32), 1)
    assert config.seed == 3
  assert len({config.to_json() for config in configs}) == len(configs) >= 3


def test_the_paper_scale_is_the_published_recipe():
  config = tables.configure('cifar10', 'paper', 'NCE, M = 4,096', 0)
  published = config_lib.default()
  published.dataset.update(name='tfds:cifar10', limit=50_000)
  published.loss.name = 'nce'
  published.knn.every_epochs = config.knn.every_epochs
  published.log_every_steps = config.log_every_steps
  published.checkpoint.update(every_steps=500, keep=1)
  assert config.to_dict() == published.to_dict()
  assert tables.TABLES['cifar10'].paper['knn']['parametric softmax'] == 0.630
  assert tables.TABLES['cifar10'].paper['svm']['full softmax'] == 0.754


def test_the_proximal_table_has_a_constant_normalizer():
  z = lambda table, scale: tables.configure(
      table, scale, list(tables.TABLES[table].rows)[-1], 0).loss.normalizer
  assert (z('proximal', 'small'), z('proximal', 'paper')) == ('100000', 'first_batch')
  assert z('noise_count', 'small') == 'ema'


def test_the_table_has_the_paper_s_values_beside_ours(tmp_path):
  run = lambda knn: {'knn': knn, 'svm': knn - 0.1, 'loss': 5.0, 'seconds': 60.0, 'steps': 9,
                     'untrained': 0.2, 'pixels': 0.3}
  results = {'full softmax': {0: run(0.5), 1: run(0.6)}, 'NCE, M = 1': {0: run(0.25)}}
  tables.write(tmp_path, 'cifar10', 'smoke', results,
               {'NCE, M = 10, seed 0': 'loss is nan'}, 'about')
  table = (tmp_path / 'table.md').read_text()
  assert '| full softmax | 0.808 | 0.550 | 0.635 | 0.500, 0.600 | 0.754 | 0.450 |' in table
  assert '| NCE, M = 1 | 0.425 | 0.250 | – | 0.250 |' in table
  assert 'Failed: NCE, M = 10, seed 0: loss is nan.' in table
  assert table.count('| 0.300 | 0.200 | 5.000 | 60 |') == 2  # raw pixels, untrained, loss, seconds
  with Image.open(tmp_path / 'plot.png') as image:
    assert image.width > 600 and np.asarray(image.convert('L')).std() > 10


def test_the_svm_is_measured_once_per_run_and_in_its_table_only(tmp_path):
  measured = []

  def measure_svm(workdir):
    measured.append(workdir.name)
    return {'features': 'pooled', 'top1': 0.75}

  run = lambda table: list(tables.run(tmp_path / table, table, 'smoke', train=write_finished,
                                      measure_svm=measure_svm))
  names = run('cifar10')
  assert names == [f'seed 0, {title}' for title in tables.TABLES['cifar10'].rows]
  assert run('cifar10') == names and measured == [f'{i}-seed0' for i in range(6)]
  rows = json.loads((tmp_path / 'cifar10' / 'results.json').read_text())['rows']
  assert {row['0']['svm'] for row in rows.values()} == {0.75}
  run('noise_count')
  assert len(measured) == 6


def test_the_curve_is_the_mean_loss_of_each_epoch_without_the_proximal_term():
  lines = [{'step': step, 'step_loss': loss + 10 * penalty, 'proximal_penalty': penalty}
           for step, loss, penalty in ((2, 9.0, 0.2), (4, 7.0, 0.1), (6, 5.0, 0.3), (10, 6.0, 0.0))]
  settings = {'batch_size': 25, 'loss.proximal_weight': 10.0}
  assert tables.curve([*lines, {'step': 10, 'knn_top1': 0.5}], settings, 100) == [8.0, 5.0, 6.0]
  assert tables.roughness([8.0, 5.0, 6.0, 7.0]) == 2.0  # (|8 - 10 + 6| + 0) / 2
  assert tables.roughness([8.0, 5.0]) == 0


@pytest.mark.parametrize('table, columns', [
    ('proximal', '| last loss | roughness | seconds |'),
    ('recipe', '| last loss | pooled, kNN | steps | views | seconds |')])
def test_a_table_shows_curves_or_costs(table, columns, tmp_path):
  list(tables.run(tmp_path, table, 'smoke', train=write_finished, measure_svm=dict))
  text = (tmp_path / 'table.md').read_text()
  assert columns in text
  if table == 'recipe':  # 9 steps of 128 images
    assert '| flips | – | 0.500 |' in text and '| 5.000 | – | 9 | 1,152 | 60 |' in text
    assert '| the same, two views | – |' in text and '| 5.000 | – | 9 | 2,304 | 60 |' in text
  with Image.open(tmp_path / 'plot.png') as image:
    assert image.width > 600 * (1 + (table == 'proximal'))


def test_a_run_of_another_version_s_table_is_not_taken_for_a_row(tmp_path):
  list(tables.run(tmp_path, 'proximal', 'smoke', train=write_finished, measure_svm=dict))
  folder = tmp_path / 'rows' / '1-seed0'
  assert len(tables.ended(tmp_path, 'proximal', 'smoke')['λ = 0.1, m = 0']) == 1
  config = tables.configure('proximal', 'smoke', 'λ = 0.1, m = 0', 0)
  config.loss.proximal_weight = 10.0
  write_finished(config, folder)
  assert tables.ended(tmp_path, 'proximal', 'smoke')['λ = 0.1, m = 0'] == {}
  settings, _ = workdir_lib.read(folder)
  del settings['loss.views']  # as of a version without that setting
  workdir_lib.write(folder, settings | {'loss.proximal_weight': 0.1}, None)
  assert len(tables.ended(tmp_path, 'proximal', 'smoke')['λ = 0.1, m = 0']) == 1


def test_the_recipe_s_rows_differ_by_one_switch_each():
  title = 'the same, two views, half the epochs'
  half, base = (tables.configure('recipe', 'paper', row, 0)
                for row in (title, 'flips and cosine'))
  assert (half.epochs, base.epochs, half.loss.views) == (100, 200, 2)
  published = tables.configure('recipe', 'paper', 'published', 0)
  assert published.optimizer.milestones == (120, 160) and published.augment.flip == 0
  late = tables.configure('recipe', 'small', 'the same, 3 neighbors', 0)
  assert (late.loss.neighbors_from_epoch, late.epochs) == (10, 20)


@pytest.mark.parametrize('mistake, text', [
    (errors.UserError('no CIFAR-10', setting='dataset.data_dir'),
     'no CIFAR-10: set --data_dir'),
    (errors.UserError('it cannot be written', setting='--workdir'),
     'it cannot be written: set --output'),
    (errors.UserError('it was started with model.width = 32, not 16', setting='model.width',
                      remedy='set <model.width>=32, or another <--workdir>'),
     'it was started with model.width = 32, not 16: set another --output')])
def test_a_mistake_is_worded_without_the_settings_that_the_table_fixes(tmp_path, mistake, text):
  def train(config, workdir):
    raise mistake
  with pytest.raises(errors.UserError) as raised:
    list(tables.run(tmp_path, 'proximal', 'smoke', train=train, measure_svm=dict))
  assert raised.value.worded({'dataset.data_dir': '--data_dir', '--workdir': '--output'}) == text
