import fcntl
import os
import subprocess
import sys

import pytest

from instdisc_jax import config as config_lib
from instdisc_jax.runtime import errors, workdir


def _settings(**changes):
  """(settings, those that may change) of the default configuration with some changed."""
  config = config_lib.default()
  config.update_from_flattened_dict({key.replace('__', '.'): v for key, v in changes.items()})
  settings = config_lib.to_json(config)
  return settings, config_lib.changeable(settings)


def claim(folder, fingerprint='data', **changes):
  """Claims a folder, stores the settings, and leaves it."""
  settings, changeable = _settings(**changes)
  with workdir.claim(folder, settings, changeable, fingerprint):
    workdir.update(folder, settings, fingerprint)


def test_the_same_run_may_be_resumed_and_extended(tmp_path):
  claim(tmp_path / 'run')
  claim(tmp_path / 'run', epochs=300, knn__every_epochs=5)


def test_the_length_of_a_cosine_run_may_not_change(tmp_path):
  claim(tmp_path, optimizer__schedule='cosine')
  with pytest.raises(errors.UserError, match='started with epochs = 200, not 300'):
    claim(tmp_path, optimizer__schedule='cosine', epochs=300)


def test_a_changed_setting_is_named_with_both_values(tmp_path):
  claim(tmp_path)
  before = (tmp_path / 'config.json').read_text()
  with pytest.raises(errors.UserError, match='bank.momentum = 0.5, not 0.25: set --config.bank.'):
    claim(tmp_path, bank__momentum=0.25)
  assert (tmp_path / 'config.json').read_text() == before


def test_other_data_is_refused(tmp_path):
  claim(tmp_path, 'these images')
  with pytest.raises(errors.UserError, match='started with other data .*these images, not those'):
    claim(tmp_path, 'those images')


def test_settings_that_an_imported_checkpoint_leaves_open_are_fixed_by_the_first_run(tmp_path):
  workdir.write(tmp_path, {'model.width': 64, 'loss.temperature': 0.07}, None)
  with pytest.raises(errors.UserError, match='started with loss.temperature = 0.07, not 0.1'):
    claim(tmp_path)
  claim(tmp_path, loss__temperature=0.07, bank__momentum=0.25)
  assert workdir.read(tmp_path)[0]['bank.momentum'] == 0.25
  with pytest.raises(errors.UserError, match='started with other data'):
    claim(tmp_path, 'others', loss__temperature=0.07, bank__momentum=0.25)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match="'.*file/run' cannot be written .*: set --workdir"):
    claim(tmp_path / 'file' / 'run')


def test_a_second_run_in_the_same_folder_is_told_which_one_is_in_it(tmp_path):
  with workdir.claim(tmp_path, *_settings(), 'data'):
    with pytest.raises(errors.UserError, match=rf"in use by process {os.getpid()} on "):
      claim(tmp_path)
  claim(tmp_path)  # the first has left


def test_the_lock_of_a_dead_process_stops_nobody(tmp_path):
  code = ('import fcntl, os, sys; file = open(sys.argv[1], "a"); fcntl.flock(file, fcntl.LOCK_EX); '
          'file.write("process 1 on elsewhere"); file.flush(); os.kill(os.getpid(), 9)')
  done = subprocess.run([sys.executable, '-c', code, tmp_path / 'lock'], check=False)
  assert done.returncode == -9 and (tmp_path / 'lock').read_text() == 'process 1 on elsewhere'
  with workdir.claim(tmp_path, *_settings(), 'data'):
    assert (tmp_path / 'lock').read_text().startswith(f'process {os.getpid()} on ')


def test_the_lock_is_that_of_the_operating_system(tmp_path):
  with workdir.claim(tmp_path, *_settings(), 'data'), (tmp_path / 'lock').open() as file:
    with pytest.raises(BlockingIOError):
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
