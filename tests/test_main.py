import shutil

import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import main
from instdisc_jax.runtime import workdir as workdir_lib

CONFIG = '''from tests import conftest

def get_config():
  return conftest.small_config()
'''


def test_help_lists_every_setting(capsys):
  with pytest.raises(SystemExit) as stopped:
    main.main(['--help'])
  assert stopped.value.code == 0
  text = capsys.readouterr().out
  assert '--config.loss.temperature=0.1' in text and '--workdir' in text
  for setting in config_lib.SETTINGS:
    assert f'  --config.{setting.key}=' in text


def test_overrides_change_the_configuration_of_a_run(trained, tmp_path, capsys):
  workdir, summary, _ = trained
  shutil.copytree(workdir, tmp_path / 'run')
  (tmp_path / 'small.py').write_text(CONFIG)
  command = [f'--config={tmp_path}/small.py', f'--workdir={tmp_path}/run']
  assert main.main([*command, '--config.checkpoint.keep=1']) == 0
  assert f'{summary["knn_top1"]:.3f}' in capsys.readouterr().out  # it was finished
  assert workdir_lib.read(tmp_path / 'run')[0]['checkpoint.keep'] == 1
  assert main.main([*command, '--config.loss.temperature=0.2']) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: workdir ') and error.count('\n') == 1
  assert 'loss.temperature = 0.1, not 0.2: set --config.loss.temperature=0.1' in error
