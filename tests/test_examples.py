"""The scripts in examples/ run as they are, only shorter."""

import importlib.util
import pathlib

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'


def test_the_quickstart_trains_and_finds_neighbors(tmp_path, capsys):
  file = EXAMPLES / 'quickstart.py'
  assert len(file.read_text().splitlines()) <= 30
  spec = importlib.util.spec_from_file_location('quickstart', file)
  quickstart = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(quickstart)
  summary, labels = quickstart.main(str(tmp_path / 'run'), [
      '--config.dataset.limit=128', '--config.batch_size=32', '--config.steps=2',
      '--config.model.width=2', '--config.model.embedding_dim=16',
      '--config.model.name=resnet10_cifar'])
  assert summary['dataset'] == 'digits' and summary['steps'] == 2
  assert labels.shape == (5,) and set(labels) <= set(range(10))
  assert 'kNN top-1' in capsys.readouterr().out
