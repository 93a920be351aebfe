"""The summary of a run, as summary.json and as a table."""

from collections.abc import Callable
import json
import math
from typing import Any

import jax
import numpy as np
from rich import console as rich_console
from rich import table as rich_table

from instdisc_jax import data
from instdisc_jax.evaluation import figures, two_views
from instdisc_jax.evaluation.evaluator import Evaluator
from instdisc_jax.runtime import digest, distributed, files, metrics
from instdisc_jax.training.state import Setup, TrainState

FILE, START = 'summary.json', 'start.json'


def finish(workdir: files.Place, setup: Setup, dataset: data.Dataset, evaluator: Evaluator,
           states: tuple[Callable[[], TrainState], TrainState], images_per_second: float | None,
           wall_clock: Callable[[], float]) -> dict[str, Any]:
  """Evaluates a trained state and writes summary.json, curves.png and neighbors.png.

  Args:
    workdir: the run's folder.
    setup: the fixed parts of the run.
    dataset: the run's data.
    evaluator: the run's evaluator.
    states: (() -> the encoder that the run started from, the trained state).
    images_per_second: training throughput, or None.
    wall_clock: () -> seconds since the run began.

  Returns:
    The summary.
  """
  config, (untrained, state) = setup.config, states
  lines = metrics.read(workdir)
  steps = [line['step_loss'] for line in lines if 'step_loss' in line]
  top1, similarity, row = evaluator.recomputed(state)
  before = _before(workdir, evaluator, untrained)
  summary = {
      'dataset': dataset.name,
      'num_rows': setup.num_rows,
      'num_queries': len(evaluator.queries),
      'num_devices': setup.mesh.size,
      'steps': int(state.step),
      'final_loss': steps[-1] if steps else None,  # imported weights, no step taken
      'loss': config.loss.name,
      'knn_neighbors': config.knn.neighbors,
      'knn_temperature': config.knn.temperature,
      'knn_recall': evaluator.recall(state),
      'knn_top1': top1,
      'knn_top1_bank': evaluator.from_bank(state),
      'knn_top1_pooled': evaluator.pooled(state) if config.model.head == 'mlp' else None,
      'knn_top1_untrained': before.get('knn_top1_untrained'),
      'knn_top1_pixels': before.get('knn_top1_pixels'),
      'neighbor_agreement': evaluator.agreement(state),
      'neighbor_agreement_untrained': before.get('neighbor_agreement_untrained'),
      'images_per_second': images_per_second,
      'params_digest': digest.of_arrays(
          jax.tree.leaves(jax.device_get((state.params, state.batch_stats)))),
      'bank_digest': digest.of_rows(state.bank, setup.num_rows, setup.mesh),
      'normalizer': float(state.normalizer) or None,
      'wall_seconds': wall_clock(),
  }
  summary['training_helped'] = outcome(summary)[0]
  if jax.process_index() == 0:
    figures.save(figures.curves(lines, summary, config.batch_size), workdir / 'curves.png')
    neighbors = figures.neighbors(dataset, evaluator.queries, similarity, row, evaluator.side)
    figures.save(neighbors, workdir / 'neighbors.png')
    files.write(workdir / FILE, json.dumps(summary, indent=2) + '\n')
  return summary


def read(workdir: files.Place) -> dict[str, Any] | None:
  """The content of summary.json; None if there is none."""
  path = workdir / FILE
  return json.loads(path.read_text()) if path.exists() else None


def nothing_trained(workdir: files.Place) -> bool:
  """Whether no run has left measurements: its checkpoint, if any, is imported, see `convert`."""
  return bool(distributed.agree(np.array(
      jax.process_index() == 0 and not (workdir / START).exists() and not metrics.read(workdir))))


def measure_start(workdir: files.Place, evaluator: Evaluator, state: TrainState) -> str:
  """Measures what training has to improve on, writes start.json, and says it in a line.

  Args:
    workdir: the run's folder.
    evaluator: the run's evaluator.
    state: the state before training.
  """
  before = evaluator.before(state)
  if jax.process_index() == 0:
    files.write(workdir / START, json.dumps(before) + '\n')
  shown = [f'{value:.3f} {title}' for title, key in (
      ('with the encoder as it is', 'knn_top1_untrained'), ('with raw pixels', 'knn_top1_pixels'))
           if (value := before[key]) is not None]
  agreement = before['neighbor_agreement_untrained']
  lines = [f'kNN top-1 is {", ".join(shown)}'] if shown else []
  if agreement is not None:
    lines.append(f'two views of an image share {agreement:.3f} of their {two_views.NEIGHBORS} '
                 'nearest neighbors')
  return 'before training: ' + ('; '.join(lines) or 'too few images to measure anything')


def _before(workdir, evaluator, untrained):
  """What start.json holds, {} where another process reads it; measured now if there is none."""
  path = workdir / START
  found = json.loads(path.read_text()) if jax.process_index() == 0 and path.exists() else None
  if distributed.agree(np.array(found is not None)):  # all processes measure, or none
    return found or {}
  return evaluator.before(untrained())


def outcome(summary: dict[str, Any]) -> tuple[bool | None, str]:
  """Whether training helped, and a line that says so.

  By kNN or, without labels, by the neighbors that two views of an image have in common.

  Args:
    summary: the content of summary.json.

  Returns:
    (True or False; None if the difference is within its standard error, or nothing was measured;
     a sentence, '' if nothing was measured).
  """
  top1, pixels, start = (summary[f'knn_top1{name}'] for name in ('', '_pixels', '_untrained'))
  if top1 is not None and start is not None:
    value, best, count = top1, max(start, pixels or 0.0), summary['num_queries']
    against = f'kNN top-1 is {top1:.3f}, {start:.3f} before it' + (
        '' if pixels is None else f', {pixels:.3f} for raw pixels')
    of = f'{count:,} queries'
  else:
    value, best = (summary[f'neighbor_agreement{name}'] for name in ('', '_untrained'))
    if value is None or best is None:
      return None, ''
    count = min(two_views.MOST, summary['num_rows'])
    against = (f'two views of an image share {value:.3f} of their {two_views.NEIGHBORS} nearest '
               f'neighbors, {best:.3f} before it, which is all that can be told without labels')
    of = f'{count:,} images'
  error = math.sqrt((value * (1 - value) + best * (1 - best)) / count)
  if abs(value - best) <= error:
    return None, (f'training made no clear difference: {against}; the standard error of {of} is '
                  f'{error:.3f}')
  if value > best:
    return True, f'training helped: {against}'
  return False, (f'training did not help: {against}; train longer (--config.epochs), or start from '
                 'trained weights (--config.model.init=FILE)')


def show(summary: dict[str, Any], workdir: files.Place, console: rich_console.Console) -> None:
  """Prints a summary as a table."""
  table = rich_table.Table(
      title=f'{summary["dataset"]}: kNN top-1, n = {summary["num_queries"]:,}, '
            f'K = {summary["knn_neighbors"]}, τ = {summary["knn_temperature"]}')
  table.add_column('features')
  table.add_column('top-1', justify='right')
  for title, key in (('raw pixels, mean-centered', 'knn_top1_pixels'),
                     ('untrained encoder', 'knn_top1_untrained'),
                     ('trained encoder', 'knn_top1'),
                     ('trained encoder, against bank rows', 'knn_top1_bank'),
                     ('trained encoder, before the MLP head', 'knn_top1_pooled')):
    value = summary.get(key)
    if value is not None or key != 'knn_top1_pooled':
      table.add_row(title, '–' if value is None else f'{value:.3f}')
  if summary['knn_top1'] is not None:
    console.print(table)
  if line := outcome(summary)[1]:
    console.print(line, markup=False)
  if summary['knn_recall'] is not None:
    console.print(f'approximate search: recall {summary["knn_recall"]:.4f}', markup=False)
  if summary['knn_top1'] is None:
    console.print('no kNN accuracy, because the images have no labels; neighbors.png shows the '
                  'nearest neighbors', markup=False)
  speed = summary['images_per_second']
  loss = summary['final_loss']
  console.print(f'{summary["steps"]} steps' + ('' if loss is None else f', final loss {loss:.3f}')
                + (f', {speed:,.0f} images/s' if speed else '')
                + f', {summary["wall_seconds"]:.0f} s', markup=False)
  console.print(f'{workdir}: {FILE}, {metrics.FILE}, curves.png, neighbors.png',
                markup=False)
