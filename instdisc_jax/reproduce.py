"""The paper's tables, made anew: each row trained from scratch, beside the paper's value.

    cifar10          Table 1: the losses, by kNN and by a linear SVM on pooled features
    noise_count      Table 1's kNN alone: from 1 noise sample an image to all other images
    embedding_size   D from 32 to 256
    train_fraction   a part of the training pictures, and all of them
    proximal         NCE with M = 4,096: λ of the proximal term against the bank's momentum

At the scale `smoke` on the embedded digits, in minutes; `small` on a part of CIFAR-10 with a narrow
network, within an hour on two CPU cores; `paper` as published, for a GPU. Stopped or killed, the
same command goes on with the row it was at.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import shutil
import sys

import jax
from matplotlib import figure as figure_lib
import numpy as np

from instdisc_jax import __version__, checkpoint, errors, evaluate, files, inference, preemption
from instdisc_jax import config as config_lib
from instdisc_jax import main as main_lib
from instdisc_jax.evaluation import few_label, report

_SVM_FILE = 'svm.json'
_NCE = {'loss.name': 'nce'}
_LOSSES = {
    'parametric softmax': {'loss.name': 'parametric_softmax'},
    'NCE, M = 1': _NCE | {'loss.noise_count': 1},
    'NCE, M = 10': _NCE | {'loss.noise_count': 10},
    'NCE, M = 512': _NCE | {'loss.noise_count': 512},
    'NCE, M = 4,096': _NCE | {'loss.noise_count': 4096},
    'full softmax': {},
}


@dataclasses.dataclass(frozen=True)
class Table:
  """What is compared.

  Attributes:
    rows: {title: settings that differ}; `dataset.limit` as a share of the scale's pictures.
    paper: {measure: {title: the paper's value}}, for `knn` and perhaps `svm`.
    about: of the paper's values, a sentence.
  """
  rows: dict
  paper: dict
  about: str


_KNN = dict(zip(_LOSSES, (0.630, 0.425, 0.634, 0.784, 0.804, 0.808)))
_SVM = dict(zip(_LOSSES, (0.603, 0.443, 0.602, 0.643, 0.702, 0.754)))
_SHARES = (0.1, 0.3, 1.0)
TABLES = {
    'cifar10': Table(_LOSSES, {'knn': _KNN, 'svm': _SVM},
                     'The paper’s values are those of its Table 1: CIFAR-10, ResNet-18.'),
    'noise_count': Table(_LOSSES, {'knn': _KNN},
                         'The paper’s values are those of its Table 1: CIFAR-10, ResNet-18.'),
    'embedding_size': Table(
        {f'D = {dim}': {'model.embedding_dim': dim} for dim in (32, 64, 128, 256)},
        {'knn': dict(zip((f'D = {dim}' for dim in (32, 64, 128, 256)),
                         (0.340, 0.388, 0.410, 0.401)))},
        'The paper’s values are of ImageNet and ResNet-18, quoted from memory: their order can be '
        'compared, not their height.'),
    'train_fraction': Table(
        {f'{share:.0%} of the pictures': {'dataset.limit': share} for share in _SHARES},
        {'knn': {}},
        'The paper has such a table for ImageNet; its values are not at hand.'),
    'proximal': Table(
        {f'λ = {weight}, m = {momentum:g}': _NCE | {'loss.proximal_weight': float(weight),
                                                    'bank.momentum': momentum}
         for momentum in (0.0, 0.5) for weight in (0, 10, 30, 50)}, {'knn': {}},
        'The paper gives no figures for it: it shows a smoother start of training.'),
}


def _smoke():
  """Like configs/digits.py, for fewer epochs."""
  config = config_lib.default()
  config.dataset.name, config.dataset.limit = 'digits', 1297
  config.model.update(name='resnet10', width=16)
  config.loss.update(normalizer='ema', normalizer_decay=0.9)
  config.augment.update(saturation=0.0, hue=0.0, grayscale=0.0, mean=(0.2,) * 3, std=(0.3,) * 3)
  config.epochs = 30
  config.optimizer.milestones = (25,)
  config.knn.neighbors = 20
  return config, 1


def _small():
  config = config_lib.default()
  config.dataset.name, config.dataset.limit = 'tfds:cifar10', 5000
  config.batch_size = 64
  config.model.update(name='resnet10', width=16)
  config.loss.update(normalizer='ema', normalizer_decay=0.9)
  config.epochs = 20
  config.optimizer.update(schedule='cosine', warmup_epochs=1.0)
  return config, 3


def _paper():
  """configs/cifar10.py; Z of NCE is frozen at the first batch, as published."""
  config = config_lib.default()
  config.dataset.name, config.dataset.limit = 'tfds:cifar10', 50_000
  return config, 3


SCALES = {'smoke': _smoke, 'small': _small, 'paper': _paper}


def configure(table, scale, title, seed, data_dir=None):
  """The configuration of one run.

  Args:
    table: of `TABLES`.
    scale: of `SCALES`.
    title: of a row.
    seed: of the run.
    data_dir: of TFDS.

  Returns:
    A `ConfigDict`.
  """
  config, _ = SCALES[scale]()
  settings = dict(TABLES[table].rows[title])
  if 'dataset.limit' in settings:
    settings['dataset.limit'] = round(settings['dataset.limit'] * config.dataset.limit)
  config.update_from_flattened_dict(settings)
  if table == 'proximal' and config.loss.normalizer == 'ema':  # which lets λ collapse the features
    config.loss.normalizer = str(20 * config.dataset.limit)
  config.seed, config.dataset.data_dir = seed, data_dir
  config.knn.every_epochs = 0  # at the end alone
  config.checkpoint.update(every_steps=500, keep=1)
  return config


def run_row(config, workdir, with_svm, watch):
  """Trains one row once, or goes on with it; returns its measures, {name: value}.

  Raises:
    errors.UserError: the data are not there, or the folder holds something else.
    errors.RunError: the run failed.
    errors.Stopped: a signal came.
  """
  try:
    main_lib.run(config, workdir, watch=watch)
  except errors.UserError as e:  # in the settings of this command
    told = str(e).replace('--config.dataset.data_dir', '--data_dir')
    raise errors.UserError(re.sub('set --config.* or another --workdir', 'set another --output',
                                  told).replace('--workdir', '--output')) from e
  if with_svm and not (workdir / _SVM_FILE).exists():
    watch.check()
    sets = evaluate.prepare(inference.load(workdir), workdir / 'features', wanted=('pooled',))
    files.write(workdir / _SVM_FILE, json.dumps(next(evaluate.support_vectors(sets))))
    shutil.rmtree(workdir / 'features')
  return measured(workdir, with_svm)


def measured(workdir, with_svm):
  """The measures of a row, {name: value}; None where it has not ended."""
  files_wanted = [workdir / name for name in (report.SUMMARY, *([_SVM_FILE] * with_svm))]
  if not all(file.exists() for file in files_wanted):
    return None
  summary, *svm = (json.loads(file.read_text()) for file in files_wanted)
  kept = {'knn': summary['knn_top1'], 'loss': summary['final_loss'], 'steps': summary['steps'],
          'seconds': summary['wall_seconds'], 'untrained': summary['knn_top1_untrained'],
          'pixels': summary['knn_top1_pixels']}
  return kept | ({'svm': svm[0]['top1']} if svm else {})


def ended(output, name, scale, with_svm):
  """{title: {seed: measures}} of the rows of a table that have ended, and of no others.

  Raises:
    errors.UserError: the folder holds another table.
  """
  file = output / 'results.json'
  if file.exists():
    table, at = (json.loads(file.read_text())[key] for key in ('table', 'scale'))
    if (table, at) != (name, scale):
      raise errors.UserError(f"'{output}' holds the table {table} of the scale {at}: set another "
                             '--output')
  results = {title: {} for title in TABLES[name].rows}
  for number, by_seed in enumerate(results.values()):
    for workdir in (output / 'rows').glob(f'{number}-seed*'):
      if (row := measured(workdir, with_svm)) is not None:
        by_seed[int(workdir.name.partition('seed')[2])] = row
  return results


def write(output, name, scale, results, failed, about_data):
  """Writes table.md, plot.png and results.json of the rows there are.

  Args:
    output: the folder.
    name: of `TABLES`.
    scale: of `SCALES`.
    results: {title: {seed: measures}}; a row without a run is left out.
    failed: {run: why}.
    about_data: what was trained on and how, a paragraph.
  """
  table = TABLES[name]
  results = {title: dict(sorted(by_seed.items())) for title, by_seed in results.items() if by_seed}
  lines = [f'# {name}, scale {scale}', '', about_data, '', table.about, '']
  measures = list(table.paper)
  head = ['row']
  for measure in measures:
    head += [f'{measure}, paper', f'{measure}, here', '± 95%', 'each seed']
  head += ['raw pixels, kNN', 'untrained, kNN', 'last loss', 'seconds']
  lines += [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  for title, by_seed in results.items():
    cells = [title]
    for measure in measures:
      values = [run[measure] for run in by_seed.values()]
      mean, half = few_label.interval(values)
      known = table.paper[measure].get(title)
      cells += ['–' if known is None else f'{known:.3f}', f'{mean:.3f}',
                '–' if half is None else f'{half:.3f}', ', '.join(f'{v:.3f}' for v in values)]
    for key, digits in (('pixels', 3), ('untrained', 3), ('loss', 3), ('seconds', 0)):
      cells.append(f'{np.mean([run[key] for run in by_seed.values()]):.{digits}f}')
    lines.append(f'| {" | ".join(cells)} |')
  lines += ['', *(f'Failed: {run}: {why}.\n' for run, why in failed.items()),
            '![plot](plot.png)', '']
  (output / 'results.json').write_text(json.dumps(
      {'table': name, 'scale': scale, 'about': about_data, 'rows': results}, indent=2,
      ensure_ascii=False) + '\n')
  report.save_picture(plot(table, results, f'{name}, scale {scale}'), output / 'plot.png')
  (output / 'table.md').write_text('\n'.join(lines))


def plot(table, results, title):
  """A figure: our means with their intervals and seeds, and the paper's values."""
  figure = figure_lib.Figure(layout='constrained', figsize=(
      1.5 + 5.5 * len(table.paper), 1.2 + 0.45 * len(results)))
  grid = figure.subplots(1, len(table.paper), squeeze=False)
  place = np.arange(len(results))
  for axes, (measure, known) in zip(grid[0], table.paper.items()):
    for y, by_seed in enumerate(results.values()):
      values = [run[measure] for run in by_seed.values()]
      mean, half = few_label.interval(values)
      axes.errorbar(mean, y, xerr=half, fmt='o', color='#1f77b4', capsize=4,
                    label='here, 95% interval' if y == 0 else None)
      axes.plot(values, [y] * len(values), '|', color='#1f77b4', ms=12)
      for key, title_of, mark in (('pixels', 'raw pixels', 'x'), ('untrained', 'untrained', '.')):
        if measure == 'knn':
          axes.plot(np.mean([run[key] for run in by_seed.values()]), y, mark, color='gray', ms=6,
                    label=title_of if y == 0 else None)
    given = [(known[row], y) for y, row in enumerate(results) if row in known]
    if given:
      axes.plot(*zip(*given), 'D', color='#d62728', ms=5, label='paper')
    axes.set_yticks(place, results)
    axes.invert_yaxis()
    axes.set(xlabel=f'{measure} top-1', title=title)
    axes.grid(axis='x', alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(fontsize=8)
  return figure


def describe(config):
  """What was trained, a paragraph."""
  return (f'{config.dataset.limit:,} pictures of `{config.dataset.name}`, {config.model.name} of '
          f'width {config.model.width}, {config.epochs} epochs of batches of {config.batch_size}, '
          f'learning rate {config.optimizer.learning_rate:g} ({config.optimizer.schedule}), '
          f'τ = {config.loss.temperature:g}, Z of NCE: {config.loss.normalizer}'
          + (f' with decay {config.loss.normalizer_decay:g}'
             if config.loss.normalizer == 'ema' else '')
          + f'; kNN with K = {config.knn.neighbors}. instdisc_jax {__version__}, '
          f'JAX {jax.__version__}, {jax.devices()[0].device_kind}.')


def main(argv=None):
  """The command; returns its exit code: 0, 2 (a user's mistake), 1 (failed), 75 (stopped)."""
  def command():
    parser = argparse.ArgumentParser(
        prog='python -m instdisc_jax.reproduce', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s --table=TABLE --scale=SCALE [--output=DIR] [--seeds=N]')
    parser.error = lambda message: errors.raise_user_error(f'{message}: see --help')
    parser.add_argument('--table', required=True, metavar='TABLE', help=f'of {", ".join(TABLES)}')
    parser.add_argument('--scale', required=True, metavar='SCALE', help=f'of {", ".join(SCALES)}')
    parser.add_argument('--output', metavar='DIR',
                        help='of the runs, table.md and plot.png (default: '
                             'runs/reproduce/TABLE-SCALE)')
    parser.add_argument('--seeds', type=int, metavar='N', help='of each row (default: 1 of smoke, '
                                                               'else 3)')
    parser.add_argument('--data_dir', metavar='DIR', help='of TFDS')
    args = parser.parse_args(argv)
    for name, known in (('table', TABLES), ('scale', SCALES)):
      if getattr(args, name) not in known:
        raise errors.UserError(f"--{name} is '{getattr(args, name)}', must be one of "
                               f'{", ".join(known)}: set --{name}')
    seeds = SCALES[args.scale]()[1] if args.seeds is None else args.seeds
    if seeds < 1:
      raise errors.UserError(f'--seeds is {seeds}, must be at least 1: set --seeds')
    output = pathlib.Path(args.output or f'runs/reproduce/{args.table}-{args.scale}')
    checkpoint.leave_errors_to_orbax()
    jax.config.update('jax_compilation_cache_dir', str(output / 'compiled'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)
    failed, with_svm = {}, 'svm' in TABLES[args.table].paper
    results = ended(output, args.table, args.scale, with_svm)
    about = describe(configure(args.table, args.scale, list(TABLES[args.table].rows)[-1], 0))
    with preemption.Watch() as watch:
      for seed in range(seeds):  # every row has a value early on
        for number, title in enumerate(TABLES[args.table].rows):
          print(f'seed {seed}, {title}', flush=True)
          config = configure(args.table, args.scale, title, seed, args.data_dir)
          workdir = output / 'rows' / f'{number}-seed{seed}'
          try:
            row = run_row(config, workdir, with_svm, watch)
          except errors.RunError as e:
            failed[f'{title}, seed {seed}'] = errors.one_line(e)
          else:
            results[title][seed] = row
          if any(results.values()):
            write(output, args.table, args.scale, results, failed, about)
    if failed:
      raise errors.RunError('; '.join(f'{run}: {why}' for run, why in failed.items()))
    print(output / 'table.md')

  return errors.exit_code(command)


if __name__ == '__main__':
  sys.exit(main())
