import json

import pytest

from instdisc_jax import config as config_lib
from instdisc_jax.evaluation import protocols, transfer_tables
from instdisc_jax.runtime import errors


def _run(output, table, rows, scale='paper', trained=None, measured=None):
  def train(config, workdir):
    workdir.mkdir(parents=True, exist_ok=True)
    if trained is not None:
      trained.append(workdir.name)

  def measure(workdir, entry, data):
    if measured is not None:
      measured.append((workdir.name, entry.protocol, data))
    return rows

  configs = dict.fromkeys(transfer_tables.encoders(table, scale), config_lib.default())
  return list(transfer_tables.run(output, output / 'runs', table, scale, configs=configs,
                                  train=train, measure=measure))


@pytest.mark.parametrize('table', transfer_tables.TABLES)
def test_the_protocols_exist_and_published_values_have_a_row(table):
  entry = transfer_tables.TABLES[table]
  assert entry.protocol in protocols.PROTOCOLS
  for (title, *_), values in entry.paper.items():
    assert title in entry.encoders and {*values} <= {*entry.measures}
    assert all(0 < value < 1 for value in values.values())


def test_published_values_stand_beside_ours_and_nothing_is_done_twice(tmp_path):
  rows = [{'features': 'conv5', 'top1': 0.25, 'top5': 0.5}, {'features': 'pooled', 'top1': 0.125,
                                                            'top5': 0.375}]
  trained, measured = [], []
  for _ in range(2):
    assert _run(tmp_path, 'imagenet_linear', rows, trained=trained, measured=measured) == [
        'ResNet-50']
  assert trained == ['resnet-50'] * 2 and measured == [('resnet-50', 'linear_online', None)]
  table = (tmp_path / 'table.md').read_text()
  assert '| ResNet-50 | conv5 | 0.540 | 0.250 | – | 0.500 |' in table
  assert '| ResNet-50 | pooled | – | 0.125 | – | 0.375 |' in table
  assert json.loads((tmp_path / 'results.json').read_text())['rows']['ResNet-50'] == rows


def test_only_the_published_k_and_temperature_are_rows_of_knn(tmp_path):
  rows = [{'features': 'embedding', 'neighbors': k, 'temperature': t, 'top1': 0.1, 'top5': 0.2}
          for k in (20, 100, 200) for t in (0.04, 0.07, 0.1)]
  _run(tmp_path, 'imagenet_knn', rows)
  table = (tmp_path / 'table.md').read_text()
  assert table.count('| embedding |') == 4  # one for each encoder
  assert '| ResNet-18 | embedding | 200 | 0.07 | 0.410 | 0.100 | – | 0.200 |' in table


def test_starts_and_intervals_are_told(tmp_path):
  rows = [{'labels': 0.01, 'start': start, 'top1': 0.5, 'top5': 0.75, 'interval': 0.0625}
          for start in ('trained', 'random')]
  _run(tmp_path, 'semi_supervised', rows)
  table = (tmp_path / 'table.md').read_text()
  assert '| ResNet-50 | 0.01 | trained | – | 0.500 ± 0.062 | 0.392 | 0.750 |' in table
  assert '| ResNet-50 | 0.01 | random | – | 0.500 ± 0.062 | – | 0.750 |' in table


def test_other_data_are_made_for_the_smoke_test(tmp_path):
  measured = []
  _run(tmp_path, 'places', [{'features': 'pooled', 'top1': 0.5, 'top5': None}], 'smoke',
       measured=measured)
  assert measured == [('resnet-10, width 16', 'linear_online', f'arrays:{tmp_path}/other.npz')]
  assert (tmp_path / 'other.npz').exists()


def test_another_table_is_not_overwritten(tmp_path):
  _run(tmp_path, 'imagenet_linear', [])
  with pytest.raises(errors.UserError, match='holds the table imagenet_linear of the scale paper: '
                                             'set another --output'):
    _run(tmp_path, 'detection', [])
