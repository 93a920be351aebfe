import json
import types

import pytest

from instdisc_jax.evaluation import summary as summary_lib
from instdisc_jax.runtime import metrics


def _summary(top1, start, pixels, queries=500, agreement=None, agreement_before=None):
  return {'knn_top1': top1, 'knn_top1_untrained': start, 'knn_top1_pixels': pixels,
          'num_queries': queries, 'num_rows': 1500, 'neighbor_agreement': agreement,
          'neighbor_agreement_untrained': agreement_before}


@pytest.mark.parametrize('found, helped, words', [
    (_summary(0.82, 0.39, 0.64), True,
     'training helped: kNN top-1 is 0.820, 0.390 before it, 0.640 for raw pixels'),
    (_summary(0.188, 0.32, 0.438), False, 'training did not help: kNN top-1 is 0.188'),
    (_summary(0.30, 0.32, 0.2), None, 'training made no clear difference'),
    (_summary(0.30, 0.32, 0.2, 10_000), False, 'start from trained weights (--config.model.init'),
    (_summary(0.45, 0.32, 0.438, 150), None, 'the standard error of 150 queries is 0.057'),
    (_summary(0.5, 0.3, None), True, 'training helped: kNN top-1 is 0.500, 0.300 before it'),
    (_summary(0.2, 0.3, None, agreement=0.4, agreement_before=0.1), False, 'did not help: kNN'),
    (_summary(None, None, None, agreement=0.36, agreement_before=0.06), True,
     'training helped: two views of an image share 0.360 of their 10 nearest neighbors, 0.060 '
     'before it, which is all that can be told without labels'),
    (_summary(None, None, None, agreement=0.05, agreement_before=0.09), False,
     'training did not help: two views'),
    (_summary(None, None, None, agreement=0.07, agreement_before=0.06), None,
     'the standard error of 1,024 images is 0.011'),
    (_summary(None, None, None), None, '')])
def test_a_run_says_whether_training_helped(found, helped, words):
  verdict, line = summary_lib.outcome(found)
  assert verdict is helped and words in line and (words or not line)


def test_the_start_is_measured_before_training_and_kept(trained, tmp_path):
  workdir, summary, _ = trained
  first = json.loads((workdir / summary_lib.START).read_text())
  assert first == {key: summary[key] for key in (
      'knn_top1_untrained', 'knn_top1_pixels', 'neighbor_agreement_untrained')}
  assert 0 < first['neighbor_agreement_untrained'] < 1
  assert summary['training_helped'] in (True, False, None)
  assert metrics.read(workdir)[0]['step'] > 0  # where the lines are those of steps
  evaluator = types.SimpleNamespace(before=lambda state: first | {'knn_top1_pixels': 0.25})
  said = summary_lib.measure_start(tmp_path, evaluator, None)
  assert said.startswith('before training: kNN top-1 is 0.')
  assert ', 0.250 with raw pixels; two views of an image share 0.' in said
  assert said.endswith(' of their 10 nearest neighbors')
  evaluator.before = lambda state: dict.fromkeys(first)
  said = summary_lib.measure_start(tmp_path, evaluator, None)
  assert said == 'before training: too few images to measure anything'
