"""How good the features of a trained workdir are: the protocols of the paper.

    knn        weighted nearest neighbours, a grid over K and τ: fresh embeddings, pooled
               features and bank rows; confusion.png
    linear     a softmax probe on each stage of the encoder
    svm        a linear SVM on the pooled features and on the embedding
    few_label  fine-tuning with 1 to 20% of the labels, beside the same encoder from random weights
    geometry   uniformity, effective rank, and how far the bank lags behind
"""

import argparse
import dataclasses
import json
import logging
import pathlib
import re
import sys
import tempfile

import jax
import numpy as np
from rich import console as rich_console
from rich import table as rich_table
from sklearn import metrics

from instdisc_jax import checkpoint, data, errors, files, inference, train
from instdisc_jax.evaluation import few_label, geometry, knn, probes, report, stages

FILE = 'evaluations.jsonl'
_KS, _TEMPERATURES = (1, 5, 20, 50, 100, 200), (0.04, 0.07, 0.1, 0.2)
_CLASSES_SHOWN, _CLASSES_DRAWN = 20, 2000
_HELD_OUT = 0.2  # of a set without held-out pictures, for the protocols that train


@dataclasses.dataclass(frozen=True)
class Sets:
  """Features and labels of the pictures to learn from and of those to be asked about.

  Attributes:
    model: `inference.Model`.
    name: of the data set.
    train: {stage: [N, F]}.
    train_labels: [N] int.
    test: {stage: [Q, F]}.
    test_labels: [Q] int.
    class_names: C of them.
    bank: [N, D] rows of the training pictures, or None of another data set.
    train_pictures: `data.Pictures`, N of them.
    test_pictures: `data.Pictures`, Q of them.
  """
  model: inference.Model
  name: str
  train: dict
  train_labels: np.ndarray
  test: dict
  test_labels: np.ndarray
  class_names: tuple
  bank: np.ndarray | None
  train_pictures: data.Pictures
  test_pictures: data.Pictures

  @property
  def num_classes(self):
    return len(self.class_names)


def prepare(model, folder, name=None, wanted=(*stages.NAMES, stages.EMBEDDING)):
  """Collects the features that the protocols need.

  Args:
    model: `inference.Model`.
    folder: where they are kept.
    name: another data set to evaluate the features on, as `dataset.name`; by default the run's own.
    wanted: the stages whose features are needed.

  Returns:
    `Sets`.

  Raises:
    errors.UserError: there are no such data, or they have no labels.
  """
  dataset, bank = model.dataset if name is None else None, model.bank
  if name is not None:
    config = model.config.dataset.copy_and_resolve_references()
    config.update(name=name, limit=None, validation=None)
    dataset, bank = data.load(config, model.config.seed), None
  if dataset.train.labels is None or (dataset.test is not None and dataset.test.labels is None):
    raise errors.UserError(f'{dataset.name} has no labels to evaluate with: set --dataset to one '
                           'that has')
  rows = np.arange(len(dataset.train))
  if dataset.test is None:
    shuffled = np.random.RandomState(0).permutation(len(rows))
    test_rows, rows = map(np.sort, np.split(shuffled, [max(1, round(_HELD_OUT * len(rows)))]))
  known = stages.collect(model, dataset.train, folder, wanted)
  if dataset.test is None:
    test, test_labels = ({k: x[test_rows] for k, x in known.items()},
                         dataset.train.labels[test_rows])
  else:
    test = stages.collect(model, dataset.test, folder, wanted)
    test_labels = dataset.test.labels
  num_classes = int(max(dataset.train.labels.max(), test_labels.max())) + 1
  return Sets(model, name or model.config.dataset.name, {k: x[rows] for k, x in known.items()},
              dataset.train.labels[rows], test, test_labels,
              dataset.class_names or tuple(map(str, range(num_classes))),
              None if bank is None else bank[rows], dataset.train.subset(rows, 'train'),
              dataset.test or dataset.train.subset(test_rows, 'test'))


def nearest_neighbours(sets):
  """Rows of results: top-1 and top-5 for each kind of feature, K and τ, from one search each.

  The embedding's row of the run's own K and τ also has the top-1 of each class, and its confusion
  matrix is drawn.
  """
  own = sets.model.config.knn
  kinds = {'embedding': (sets.train[stages.EMBEDDING], sets.test[stages.EMBEDDING]),
           'pooled': (knn.unit(sets.train['pooled']), knn.unit(sets.test['pooled']))}
  if sets.bank is not None:
    kinds['bank rows'] = sets.bank, sets.test[stages.EMBEDDING]
  own_k = min(own.neighbors, len(sets.train_labels))
  ks = sorted({min(k, len(sets.train_labels)) for k in (*_KS, own_k)})
  temperatures = sorted({*_TEMPERATURES, own.temperature})
  results = []
  for kind, (rows, queries) in kinds.items():
    similarity, row = map(np.asarray, knn.nearest(queries, rows, k=ks[-1]))
    labels = sets.train_labels[row]
    for k in ks:
      for temperature in temperatures:
        scores = np.asarray(knn.vote(similarity[:, :k], labels[:, :k], temperature,
                                     sets.num_classes))
        results.append({
            'features': kind, 'neighbors': k, 'temperature': temperature,
            'top1': probes.top_k(scores, sets.test_labels, 1),
            'top5': probes.top_k(scores, sets.test_labels, 5)})
        if (kind, k, temperature) == (stages.EMBEDDING, own_k, own.temperature):
          counts = metrics.confusion_matrix(sets.test_labels, scores.argmax(axis=1),
                                            labels=range(sets.num_classes))
          results[-1]['per_class'] = {
              name: float(line[i] / line.sum()) if line.sum() else None
              for i, (name, line) in enumerate(zip(sets.class_names, counts))}
          if sets.num_classes <= _CLASSES_DRAWN:
            report.save_picture(report.confusion(counts, sets.class_names, sets.name),
                                sets.model.workdir / _confusion_file(sets))
  return results


def _confusion_file(sets):
  """confusion.png, or with the name of another data set in it."""
  if sets.name == sets.model.config.dataset.name:
    return 'confusion.png'
  return f'confusion-{re.sub("[^A-Za-z0-9]+", "-", sets.name).strip("-")}.png'


def linear(sets):
  """A row of results for each stage."""
  return [{'features': name} | probes.linear(
      sets.train[name], sets.train_labels, sets.test[name], sets.test_labels,
      num_classes=sets.num_classes) for name in (*stages.NAMES, stages.EMBEDDING)
          if name in sets.train]


def support_vectors(sets):
  """A row of results for the pooled features and one for the embedding, if they are there."""
  return [{'features': name} | probes.support_vectors(
      sets.train[name], sets.train_labels, sets.test[name], sets.test_labels)
          for name in ('pooled', stages.EMBEDDING) if name in sets.train]


def fine_tune(sets):
  """A row of results for each share of the labels and start.

  Of streamed pictures the central views are what is cropped from.
  """
  model = sets.model
  pictures = [np.concatenate([np.stack(views) for views in model.views_of(source)])
              for source in (sets.train_pictures, sets.test_pictures)]
  random = model.encoder.init(jax.random.key(model.config.seed), np.zeros(
      (1, *train.view_size(model.config, pictures[0].shape[1:]), 3), np.float32), train=False)
  starts = {'trained': model.variables,
            'random': (random['params'], random.get('batch_stats', {}))}
  return few_label.measure(model.encoder, starts, pictures[0], sets.train_labels, pictures[1],
                           sets.test_labels, num_classes=sets.num_classes, config=model.config)


def measure_geometry(sets):
  """One row of results, of the embeddings of the training pictures."""
  embedding = np.asarray(sets.train[stages.EMBEDDING])
  classes = [embedding[sets.train_labels == c] for c in np.unique(sets.train_labels)]
  same = [geometry.alignment(x, np.roll(x, 1, axis=0)) for x in classes if len(x) > 1]
  return [{'uniformity': geometry.uniformity(embedding),
           'effective_rank': geometry.effective_rank(embedding),
           'class_alignment': float(np.mean(same)) if same else None,
           'staleness': None if sets.bank is None else geometry.staleness(sets.bank, embedding)}]


PROTOCOLS = {'knn': nearest_neighbours, 'linear': linear, 'svm': support_vectors,
             'few_label': fine_tune, 'geometry': measure_geometry}


def show(protocol, results, console):
  """Prints results as a table; of a kNN grid, each kind of feature's best, and the classes."""
  if protocol == 'knn':
    per_class = next(r['per_class'] for r in results if 'per_class' in r)
    if len(per_class) <= _CLASSES_SHOWN:
      console.print('top-1 of each class, at the run\'s own K and τ:',
                    ', '.join(f'{name}: {"–" if top1 is None else f"{top1:.3f}"}'
                              for name, top1 in per_class.items()), markup=False)
    results = [{k: v for k, v in r.items() if k != 'per_class'} for r in results]
    kinds = dict.fromkeys(r['features'] for r in results)
    results = [max((r for r in results if r['features'] == kind), key=lambda r: r['top1'])
               for kind in kinds]
  table = rich_table.Table(title=protocol + (', the best of the grid' if protocol == 'knn' else ''))
  for key in results[0]:
    table.add_column(key.replace('_', ' '), justify='left' if key == 'features' else 'right')
  for result in results:
    table.add_row(*('–' if v is None else f'{v:.4g}' if isinstance(v, float) else str(v)
                    for v in result.values()))
  console.print(table)


def main(argv=None):
  """The command; returns its exit code: 0, or 2 for a user's mistake."""
  def command():
    parser = argparse.ArgumentParser(
        prog='python -m instdisc_jax.evaluate', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s --workdir=DIR --protocol=PROTOCOL[,PROTOCOL] [--dataset=NAME]')
    parser.error = lambda message: errors.raise_user_error(f'{message}: see --help')
    parser.add_argument('--workdir', required=True, metavar='DIR', help='of a run')
    parser.add_argument('--protocol', required=True, metavar='PROTOCOL',
                        help=f'of {", ".join(PROTOCOLS)}; several with commas')
    parser.add_argument('--dataset', metavar='NAME',
                        help='other data with labels, as --config.dataset.name takes them')
    args = parser.parse_args(argv)
    chosen = args.protocol.split(',')
    for protocol in chosen:
      if protocol not in PROTOCOLS:
        raise errors.UserError(f"--protocol has '{protocol}', must be of {', '.join(PROTOCOLS)}: "
                               'set --protocol')
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax reports all it does
    checkpoint.leave_errors_to_orbax()
    model, console = inference.load(args.workdir), rich_console.Console(highlight=False)
    file = model.workdir / FILE
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(scratch) if files.in_bucket(file) else model.workdir / 'features'
      sets = prepare(model, folder, args.dataset)
      for protocol in chosen:
        results = PROTOCOLS[protocol](sets)
        origin = {'protocol': protocol, 'dataset': args.dataset or model.config.dataset.name,
                  'step': model.step}
        earlier = file.read_text() if file.exists() else ''
        files.write(file, earlier + ''.join(json.dumps(origin | r) + '\n' for r in results))
        show(protocol, results, console)

  return errors.exit_code(command)


if __name__ == '__main__':
  sys.exit(main())
