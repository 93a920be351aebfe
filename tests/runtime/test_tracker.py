import sys
import types

import pytest

from instdisc_jax.runtime import errors, metrics, tracker


class Run:
  """A tracker that keeps what it gets."""

  def __init__(self, **how):
    self.how, self.lines, self.finished = how, [], False

  def log(self, values, step):
    self.lines.append((step, values))

  def finish(self):
    self.finished = True


@pytest.fixture(params=tracker.NAMES)
def name(request, monkeypatch):
  """A tracker that is installed, with its package replaced."""
  package = types.SimpleNamespace(init=lambda **how: Run(**how), Settings=lambda **how: how)
  monkeypatch.setitem(sys.modules, request.param, package)
  return request.param


def test_a_tracker_gets_each_line_at_its_step(name, tmp_path):
  run = tracker.start(name, tmp_path, {'seed': 3})
  lines = metrics.Metrics(tmp_path, 0, run)
  lines.write(5, loss=1.5, images_per_second=None)
  lines.write(10, loss=1.0, knn_top1=0.4)
  lines.close()
  assert run.lines == [(5, {'loss': 1.5}), (10, {'loss': 1.0, 'knn_top1': 0.4})]
  assert run.finished and run.how['config'] == {'seed': 3}


def test_a_run_that_resumes_goes_on_under_its_name(name, tmp_path):
  for folder in ('run', 'other/run'):
    (tmp_path / folder).mkdir(parents=True)
  first, second = (tracker.start(name, tmp_path / 'run', {}).how for _ in range(2))
  another = tracker.start(name, tmp_path / 'other' / 'run', {}).how
  assert first['name'] == second['name'] != another['name']
  assert first['name'].startswith('run-') and first['resume'] == 'allow'


def test_a_run_goes_on_without_a_tracker_that_fails(name, tmp_path, monkeypatch, capsys):
  def log(*_, **__):
    raise RuntimeError('the service died')

  run = tracker.start(name, tmp_path, {})
  monkeypatch.setattr(run, 'log', log)
  lines = metrics.Metrics(tmp_path, 0, run)
  lines.write(5, loss=1.5)
  lines.write(10, loss=1.0)
  lines.close()
  assert [line['step'] for line in metrics.read(tmp_path)] == [5, 10] and not run.finished
  assert capsys.readouterr().err.count('the service died') == 1


def test_the_name_of_a_run_has_no_characters_that_a_tracker_refuses(name, tmp_path):
  (tmp_path / 'lr=0.1,a#b').mkdir()
  assert tracker.start(name, tmp_path / 'lr=0.1,a#b', {}).how['name'].startswith('lr=0.1-a-b-')


def test_a_tracker_that_does_not_start_is_one_line(name, tmp_path, monkeypatch):
  def init(**_):
    raise RuntimeError('no API key\nset one, or log in')

  monkeypatch.setattr(sys.modules[name], 'init', init)
  with pytest.raises(errors.UserError, match=f'^{name} does not start: .*no API key.*remove'):
    tracker.start(name, tmp_path, {})


@pytest.mark.parametrize('name', tracker.NAMES)
def test_a_tracker_that_is_not_installed_is_one_line(name, monkeypatch):
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(errors.UserError,
                     match=rf"{name}, which is not installed: .*'instdisc_jax\[{name}\]'"):
    tracker.module(name)


@pytest.mark.slow
def test_trackio_and_weights_and_biases_keep_the_lines_without_a_network(tmp_path, monkeypatch):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
  for name in tracker.NAMES:
    pytest.importorskip(name)
    (tmp_path / name).mkdir()
    for step in (5, 10):  # the second call resumes
      lines = metrics.Metrics(tmp_path / name, step, tracker.start(name, tmp_path / name, {'a': 1}))
      lines.write(step, loss=1.0 / step)
      lines.close()
  assert len(list((tmp_path / 'wandb' / 'wandb').glob('offline-run-*/*.wandb'))) == 2
  assert (tmp_path / 'trackio' / 'instdisc_jax.db').exists()
