import json

import pytest
from tensorboardX import proto  # noqa: F401  (without it the installation is broken)

from instdisc_jax.runtime import metrics as metrics_lib


def test_lines_are_written_immediately_and_read_back(tmp_path):
  metrics = metrics_lib.Metrics(tmp_path, 0)
  metrics.write(5, loss=1.5, knn_top1=None)
  assert metrics_lib.read(tmp_path) == [{'step': 5, 'loss': 1.5, 'knn_top1': None}]
  metrics.close()
  assert list(tmp_path.glob('events.out.tfevents.*'))


def test_a_resumed_run_reports_no_step_twice(tmp_path):
  metrics = metrics_lib.Metrics(tmp_path, 0)
  for step in (5, 10, 15):
    metrics.write(step, loss=step / 10, wall_seconds=step * 2.0)
  metrics.close()
  metrics = metrics_lib.Metrics(tmp_path, 10)  # the checkpoint was at 10; 15 was lost
  assert metrics.earlier_seconds == 20
  metrics.write(15, loss=1.0)
  metrics.close()
  assert [line['step'] for line in metrics_lib.read(tmp_path)] == [5, 10, 15]
  assert metrics_lib.read(tmp_path)[-1]['loss'] == 1.0


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
  file = tmp_path / metrics_lib.FILE
  file.write_text(json.dumps({'step': 5, 'loss': 1.0}) + '\n{"step": 10, "lo')
  metrics = metrics_lib.Metrics(tmp_path, 10)
  metrics.write(10, loss=2.0)
  metrics.close()
  assert [json.loads(line)['step'] for line in file.read_text().splitlines()] == [5, 10]


@pytest.mark.parametrize('seconds, words', [
    (0.2, '1 s'), (40, '40 s'), (100, '2 min'), (12 * 60, '12 min'), (110 * 60, '1 h 50 min'),
    (3 * 3600, '3 h'), (3 * 86400, '3 days')])
def test_a_duration_in_words(seconds, words):
  assert metrics_lib.duration(seconds) == words
