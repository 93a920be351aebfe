import fcntl
import os
import subprocess
import sys

import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import errors, workdir


def claim(*args):
  """Claims a folder and leaves it at once."""
  with workdir.claim(*args):
    pass


def test_the_same_run_may_come_back_and_go_on_longer(tmp_path):
  config = config_lib.default()
  claim(tmp_path / 'run', config, 'data')
  config.epochs, config.knn.every_epochs = 300, 5
  claim(tmp_path / 'run', config, 'data')


def test_a_cosine_ends_with_the_run_that_was_begun(tmp_path):
  config = config_lib.default()
  config.optimizer.schedule = 'cosine'
  claim(tmp_path, config, 'data')
  config.epochs = 300
  with pytest.raises(errors.UserError, match='begun with epochs = 200, not 300'):
    claim(tmp_path, config, 'data')


def test_another_setting_is_named_with_both_values(tmp_path):
  config = config_lib.default()
  claim(tmp_path, config, 'data')
  before = (tmp_path / 'config.json').read_text()
  config.bank.momentum = 0.25
  with pytest.raises(errors.UserError, match='bank.momentum = 0.5, not 0.25: set --config.bank.'):
    claim(tmp_path, config, 'data')
  assert (tmp_path / 'config.json').read_text() == before


def test_other_data_is_refused(tmp_path):
  claim(tmp_path, config_lib.default(), 'these pictures')
  with pytest.raises(errors.UserError, match='begun with other data .*these pictures, not those'):
    claim(tmp_path, config_lib.default(), 'those pictures')


def test_what_a_checkpoint_from_elsewhere_leaves_open_the_first_run_fixes(tmp_path):
  config = config_lib.default()
  workdir.write(tmp_path, {'model.width': 64, 'loss.temperature': 0.07}, None)
  with pytest.raises(errors.UserError, match='begun with loss.temperature = 0.07, not 0.1'):
    claim(tmp_path, config, 'data')
  config.loss.temperature, config.bank.momentum = 0.07, 0.25
  claim(tmp_path, config, 'data')
  assert workdir.read(tmp_path)[0]['bank.momentum'] == 0.25
  with pytest.raises(errors.UserError, match='begun with other data'):
    claim(tmp_path, config, 'others')


def test_a_folder_that_can_t_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match="workdir '.*file/run' can't be written"):
    claim(tmp_path / 'file' / 'run', config_lib.default(), 'data')


def test_a_second_run_in_the_same_folder_is_told_who_is_in_it(tmp_path):
  with workdir.claim(tmp_path, config_lib.default(), 'data'):
    with pytest.raises(errors.UserError, match=rf"in use by process {os.getpid()} on "):
      claim(tmp_path, config_lib.default(), 'data')
  claim(tmp_path, config_lib.default(), 'data')  # it has been left


def test_the_lock_of_a_process_that_died_stops_nobody(tmp_path):
  code = ('import fcntl, os, sys; file = open(sys.argv[1], "a"); fcntl.flock(file, fcntl.LOCK_EX); '
          'file.write("process 1 on elsewhere"); file.flush(); os.kill(os.getpid(), 9)')
  done = subprocess.run([sys.executable, '-c', code, tmp_path / 'lock'], check=False)
  assert done.returncode == -9 and (tmp_path / 'lock').read_text() == 'process 1 on elsewhere'
  with workdir.claim(tmp_path, config_lib.default(), 'data'):
    assert (tmp_path / 'lock').read_text().startswith(f'process {os.getpid()} on ')


def test_the_lock_is_the_operating_system_s(tmp_path):
  with workdir.claim(tmp_path, config_lib.default(), 'data'), (tmp_path / 'lock').open() as file:
    with pytest.raises(BlockingIOError):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
