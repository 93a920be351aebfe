import errno
import pickle

import pytest

from instdisc_jax.runtime import errors


def test_a_setting_is_worded_with_the_command_s_own_flag():
  error = errors.UserError('dataset.name is x', 'digits', 'set <dataset.name>=digits, or another '
                           '<--workdir>', 'dataset.name')
  assert str(error) == ('dataset.name is x, must be digits: set --config.dataset.name=digits, or '
                        'another --workdir')
  assert error.worded({'dataset.name': '--dataset', '--workdir': 'DIR'}) == (
      'dataset.name is x, must be digits: set --dataset=digits, or another DIR')


@pytest.mark.parametrize('error, text', [
    (errors.UserError('no model'), 'no model'),
    (errors.UserError('no model', setting='model.name'), 'no model: set --config.model.name'),
    (errors.UserError('no file', setting='--images'), 'no file: set --images'),
    (errors.UserError('seed is -1', 'at least 0', setting='seed'),
     'seed is -1, must be at least 0: set --config.seed'),
    (errors.UserError('a < b > c', remedy='see --help'), 'a < b > c: see --help')])
def test_parts_that_are_unset_are_left_out(error, text):
  assert str(error) == text


def test_an_error_survives_a_worker_process():
  error = errors.UserError('k is 0', 'above 0', 'set <k>=1', 'k')
  assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
  other = error.with_remedy('set <--k>')
  assert str(other) == 'k is 0, must be above 0: set --k' and other.setting == 'k'


@pytest.mark.parametrize('failure, code, line', [
    (None, 0, ''),
    (errors.UserError('seed is\n -1', setting='seed'), 2, 'error: seed is -1: set --s\n'),
    (errors.RunError('loss is nan'), 1, 'failed: loss is nan\n'),
    (errors.Stopped('stopped by SIGTERM'), 75, 'stopped by SIGTERM\n'),
    (OSError(errno.ENOSPC, 'No space left on device', 'a.npz'), 1,
     'failed: no space left to write a.npz (No space left on device): free up space and run the '
     'same command again\n')])
def test_every_way_to_end_has_its_exit_code_and_one_line(capsys, failure, code, line):
  def command():
    if failure is not None:
      raise failure

  assert errors.exit_code(command, {'seed': '--s'}) == code
  assert capsys.readouterr().err == line


def test_a_failure_of_the_program_itself_keeps_its_traceback():
  def command():
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    errors.exit_code(command)


def test_what_cannot_be_written_is_an_error_of_the_argument_unless_the_disk_is_full():
  denied = errors.cannot_write('x/y.npz', OSError(errno.EACCES, 'Permission denied'), '--output')
  assert str(denied) == ("'x/y.npz' cannot be written (Permission denied): set --output to a "
                         'writable place')
  full = OSError(errno.ENOSPC, 'No space left on device')
  assert errors.cannot_write('x/y.npz', full, '--output') is full
