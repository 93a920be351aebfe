"""How good the features of a trained workdir are: the protocols of the paper.

    knn        weighted nearest neighbours, a grid over K and τ: fresh embeddings, pooled
               features and bank rows; confusion.png
    linear     a softmax probe on each stage of the encoder
    svm        a linear SVM on the pooled features and on the embedding
    few_label  fine-tuning with 1 to 20% of the labels, beside the same encoder from random weights
    geometry   alignment of two views, and of a class; uniformity, effective rank, and how far the
               bank lags behind
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import tempfile

import jax
import numpy as np
from rich import console as rich_console
from rich import table as rich_table
from sklearn import metrics

from instdisc_jax import augment, checkpoint, data, errors, files, inference, preemption, train
from instdisc_jax.evaluation import few_label, geometry, knn, probes, report, stages

FILE = 'evaluations.jsonl'
_KS, _TEMPERATURES = (1, 5, 20, 50, 100, 200), (0.04, 0.07, 0.1, 0.2)
_CLASSES_SHOWN, _CLASSES_DRAWN = 20, 2000
_HELD_OUT = 0.2  # of a set without held-out pictures, for the protocols that train
_LEAST = 10  # labelled pictures to learn from, for those
_ALIGNED = 1024  # pictures whose two views are compared


@dataclasses.dataclass(frozen=True)
class Sets:
  """Features and labels of the pictures to learn from and of those to be asked about.

  Attributes:
    model: `inference.Model`.
    name: of the data set.
    train: {stage: [N, F]}.
    train_labels: [N] int, or None.
    test: {stage: [Q, F]}.
    test_labels: [Q] int, or None.
    class_names: C of them; of classes without names, those that have pictures.
    bank: [N, D] rows of the training pictures, or None of another data set.
    train_pictures: `data.Pictures`, N of them.
    test_pictures: `data.Pictures`, Q of them.
  """
  model: inference.Model
  name: str
  train: dict
  train_labels: np.ndarray | None
  test: dict
  test_labels: np.ndarray | None
  class_names: tuple | None
  bank: np.ndarray | None
  train_pictures: data.Pictures
  test_pictures: data.Pictures

  @property
  def num_classes(self):
    return len(self.class_names)


def prepare(model, folder, name=None, wanted=(*stages.NAMES, stages.EMBEDDING), least=2,
            labelled=True):
  """Collects the features that the protocols need.

  Args:
    model: `inference.Model`.
    folder: where they are kept.
    name: another data set to evaluate the features on, as `dataset.name`; by default the run's own.
    wanted: the stages whose features are needed.
    least: how many pictures to learn from there must be, in 2 classes at least if more than 2.
    labelled: whether labels are needed.

  Returns:
    `Sets`.

  Raises:
    errors.UserError: there are no such data, too few of them, or they have no labels.
  """
  dataset, bank = model.dataset if name is None else None, model.bank
  if name is not None:
    config = model.config.dataset.copy_and_resolve_references()
    config.update(name=name, limit=None, validation=None)
    try:
      dataset, bank = data.load(config, model.config.seed), None
    except errors.UserError as e:
      raise errors.UserError(str(e).replace('--config.dataset.name', '--dataset')) from e
  has_labels = all(pictures.labels is not None for pictures in (dataset.train, dataset.test)
                   if pictures is not None)
  if labelled and not has_labels:
    raise errors.UserError(f'{dataset.name} has no labels to evaluate with: set --dataset to one '
                           'that has')
  rows = np.arange(len(dataset.train))
  if dataset.test is None:
    shuffled = np.random.RandomState(0).permutation(len(rows))
    test_rows, rows = map(np.sort, np.split(shuffled, [max(1, round(_HELD_OUT * len(rows)))]))
  train_labels = test_labels = class_names = None
  if has_labels:
    train_labels = dataset.train.labels[rows]
    test_labels = dataset.train.labels[test_rows] if dataset.test is None else dataset.test.labels
    class_names = dataset.class_names
    if class_names is None:  # the numbers may have gaps
      numbers, both = np.unique(np.concatenate([train_labels, test_labels]), return_inverse=True)
      train_labels, test_labels = np.split(both.astype(np.int32), [len(rows)])
      class_names = tuple(map(str, numbers))
  classes = 0 if train_labels is None else len(np.unique(train_labels))
  if len(rows) < least or (least > 2 and classes < 2):
    raise errors.UserError(
        f'{dataset.name} has {len(rows)} pictures to learn from' + (
            f' in {classes} classes' if least > 2 else '') + f', must have at least {least}' + (
                ' in 2' if least > 2 else '') + ': set --dataset to more')
  known = stages.collect(model, dataset.train, folder, wanted)
  if dataset.test is None:
    test = {k: x[test_rows] for k, x in known.items()}
    known = {k: x[rows] for k, x in known.items()}
  else:
    test = stages.collect(model, dataset.test, folder, wanted)
  return Sets(model, name or model.config.dataset.name, known, train_labels, test, test_labels,
              class_names, None if bank is None else bank[rows],
              dataset.train.subset(rows, 'train'),
              dataset.test or dataset.train.subset(test_rows, 'test'))


def nearest_neighbours(sets):
  """Rows of results: top-1 and top-5 for each kind of feature, K and τ, from one search each.

  A class without a vote is not among the first five. The embedding's row of the run's own K and τ
  also has the top-1 of each class, and its confusion matrix is drawn.
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
        scores = np.where(scores > 0, scores, -np.inf)
        results.append({
            'features': kind, 'neighbors': k, 'temperature': temperature,
            'top1': probes.top_k(scores, sets.test_labels, 1),
            'top5': probes.top_k(scores, sets.test_labels, 5)})
        if (kind, k, temperature) == (stages.EMBEDDING, own_k, own.temperature):
          predicted = scores.argmax(axis=1)
          right = np.bincount(sets.test_labels[predicted == sets.test_labels],
                              minlength=sets.num_classes)
          results[-1]['per_class'] = {
              name: float(right[i] / count) if count else None for i, (name, count) in enumerate(
                  zip(sets.class_names, np.bincount(sets.test_labels, minlength=sets.num_classes)))}
          if sets.num_classes <= _CLASSES_DRAWN:
            counts = metrics.confusion_matrix(sets.test_labels, predicted,
                                              labels=range(sets.num_classes))
            report.save_picture(report.confusion(counts, sets.class_names, sets.name),
                                sets.model.workdir / _confusion_file(sets))
  return results


def _confusion_file(sets):
  """confusion.png, or of another data set with its name, and a digest that keeps names apart."""
  if sets.bank is not None or sets.name == sets.model.config.dataset.name:
    return 'confusion.png'
  name = re.sub('[^A-Za-z0-9]+', '-', sets.name).strip('-')[:40]
  digest = hashlib.sha256(sets.name.encode('utf8', 'surrogateescape')).hexdigest()[:8]
  return f'confusion-{name}-{digest}.png'


def linear(sets):
  """A row of results for each stage."""
  for name in (*stages.NAMES, stages.EMBEDDING):
    if name in sets.train:
      yield {'features': name} | probes.linear(
          sets.train[name], sets.train_labels, sets.test[name], sets.test_labels,
          num_classes=sets.num_classes)


def support_vectors(sets):
  """A row of results for the pooled features and one for the embedding, if they are there."""
  for name in ('pooled', stages.EMBEDDING):
    if name in sets.train:
      yield {'features': name} | probes.support_vectors(
          sets.train[name], sets.train_labels, sets.test[name], sets.test_labels)


def fine_tune(sets):
  """A row of results for each share of the labels and start.

  Of streamed pictures the central views are what is cropped from.
  """
  model = sets.model
  read_train, read_test = (functools.partial(model.views_at, source)
                           for source in (sets.train_pictures, sets.test_pictures))
  blank = np.zeros((1, *train.view_size(model.config, read_train([0]).shape[1:]), 3), np.float32)
  init = jax.jit(functools.partial(model.encoder.init, train=False))

  def random(seed):
    variables = init(jax.random.fold_in(jax.random.key(model.config.seed), seed), blank)
    return variables['params'], variables.get('batch_stats', {})

  yield from few_label.measure(
      model.encoder, {'trained': lambda _: model.variables, 'random': random}, read_train,
      sets.train_labels, read_test, sets.test_labels, num_classes=sets.num_classes,
      config=model.config)


def measure_geometry(sets):
  """One row of results, of the embeddings of the training pictures."""
  embedding, labels = np.asarray(sets.train[stages.EMBEDDING]), sets.train_labels
  return [{'alignment': geometry.alignment(*_two_views(sets)),
           'class_alignment': None if labels is None else geometry.class_alignment(embedding,
                                                                                   labels),
           'uniformity': geometry.uniformity(embedding),
           'effective_rank': geometry.effective_rank(embedding),
           'staleness': None if sets.bank is None else geometry.staleness(sets.bank, embedding)}]


def _two_views(sets):
  """Embeddings ([n, D], [n, D]) of two random views of a seeded sample of the training pictures.

  Of streamed pictures the central views are what is cropped from.
  """
  model = sets.model
  settings = dict(model.config.augment)
  size = settings.pop('size')
  chosen = np.random.RandomState(0).permutation(len(sets.train_pictures))[:_ALIGNED]

  @jax.jit
  def encode(variables, keys, images):
    views = augment.augment(keys, images, size=images.shape[1:3] if size is None else (size, size),
                            **settings)
    params, batch_stats = variables
    return model.encoder.apply({'params': params, 'batch_stats': batch_stats}, views, train=False)

  found, number = ([], []), 0
  for views in model.views_of(sets.train_pictures.subset(np.sort(chosen), 'two views')):
    for view, embeddings in enumerate(found):
      key = jax.random.fold_in(jax.random.key(view), number)
      embeddings.append(encode(model.variables, jax.random.split(key, len(views)),
                               np.stack(views)))
    number += 1
  return tuple(np.concatenate(embeddings) for embeddings in found)


PROTOCOLS = {'knn': nearest_neighbours, 'linear': linear, 'svm': support_vectors,
             'few_label': fine_tune, 'geometry': measure_geometry}
_STAGES = {'knn': ('pooled', stages.EMBEDDING), 'linear': (*stages.NAMES, stages.EMBEDDING),
           'svm': ('pooled', stages.EMBEDDING), 'few_label': (), 'geometry': (stages.EMBEDDING,)}
_LEARNING = ('linear', 'svm', 'few_label')


def show(protocol, results, console):
  """Prints results as a table; of a kNN grid what the run's own K and τ give, and the best."""
  title = protocol
  if protocol == 'knn':
    title = "knn, at the run's own K and τ"
    own = next(r for r in results if 'per_class' in r)
    if len(own['per_class']) <= _CLASSES_SHOWN:
      console.print('top-1 of each class:', ', '.join(
          f'{report.printable(name)}: {"–" if top1 is None else f"{top1:.3f}"}'
          for name, top1 in own['per_class'].items()), markup=False)
    settings = lambda r: (r['neighbors'], r['temperature'])
    best = {}
    for r in results:
      if r['features'] not in best or r['top1'] > best[r['features']]['top1']:
        best[r['features']] = r
    results = [{k: v for k, v in r.items() if k != 'per_class'} | {
        'best (K, τ)': f'{best[r["features"]]["top1"]:.4g} {settings(best[r["features"]])}'}
               for r in results if settings(r) == settings(own)]
  table = rich_table.Table(title=title)
  for key in results[0]:
    table.add_column(key.replace('_', ' '), justify='left' if key == 'features' else 'right')
  for result in results:
    table.add_row(*('–' if v is None else f'{v:.4g}' if isinstance(v, float) else str(v)
                    for v in result.values()))
  console.print(table)


def main(argv=None):
  """The command; returns its exit code: 0, 2 (a user's mistake), 1 (failed), 75 (stopped)."""
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
    file, dataset = model.workdir / FILE, args.dataset or model.config.dataset.name
    if not files.in_bucket(file) and not os.access(model.workdir, os.W_OK):
      raise errors.UserError(f"'{args.workdir}' can't be written: set --workdir to a copy of it")
    with preemption.Watch() as watch, tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(scratch) if files.in_bucket(file) else model.workdir / 'features'
      sets = prepare(
          model, folder, args.dataset, dict.fromkeys(s for p in chosen for s in _STAGES[p]),
          least=_LEAST if {*chosen} & {*_LEARNING} else 2, labelled={*chosen} != {'geometry'})
      for protocol in chosen:
        results = []
        for result in PROTOCOLS[protocol](sets):
          watch.check()
          results.append(result)
          line = {'protocol': protocol, 'dataset': dataset, 'step': model.step} | result
          files.append(file, json.dumps(line) + '\n')
        show(protocol, results, console)

  return errors.exit_code(command)


if __name__ == '__main__':
  sys.exit(main())
