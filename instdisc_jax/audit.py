"""Finds duplicates, outliers, and images of the test set that are in the training set, too.

Writes duplicates.csv, outliers.csv and leaks.csv. Images are compared by the embeddings of their
central views.
"""

from collections.abc import Sequence
import pathlib
import sys
from typing import Any

import numpy as np

from instdisc_jax import cli, inference
from instdisc_jax.data import folder
from instdisc_jax.runtime import errors, preemption
from instdisc_jax.search import audit

_FLAGS = {'dataset.on_unreadable': '--on_unreadable', 'dataset.name': '--images'}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code: 0, 2 (user error), 1 (failed), 75 (stopped)."""
  def command():
    args = _parser().parse_args(argv)
    output = pathlib.Path(args.output)
    errors.check_output(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
      raise errors.UserError(f"'{output}' exists and is not an empty folder",
                             remedy='set <--output> to a new folder', setting='--output')
    threshold = args.threshold
    if threshold is not None and not 0 < threshold <= 1:
      raise errors.UserError(f'--threshold is {threshold}', 'above 0, at most 1',
                             setting='--threshold')
    if args.test is not None and args.images is None:
      raise errors.UserError('--test needs --images', remedy='set <--images> to the folder to '
                             'compare with', setting='--images')
    with preemption.Watch() as watch:
      model = inference.load(args.workdir, args.features, watch.check)
      images, test = _images(model, args)
      if len(images) < 2:
        raise errors.UserError(f'there is {len(images)} image to compare', 'two or more',
                               'set <--images> to another folder', '--images')
      findings = audit.examine(model.fresh(images), None if test is None else model.fresh(test),
                               threshold=threshold, sizes=_sizes(images), check=watch.check)
    names = _names(images)
    audit.write(output, findings, names, [] if test is None else _names(test))
    _show(findings, output, names, test)

  return cli.run(command, _FLAGS)


def _parser():
  parser = cli.make_parser(
      'audit', __doc__, '--workdir=DIR --output=FOLDER [--images=FOLDER [--test=FOLDER]] '
      '[--threshold=S]')
  cli.add_workdir(parser, 'folder of a run, or a .pth or .safetensors file with weights')
  parser.add_argument('--output', required=True, metavar='FOLDER', help='the folder to make')
  parser.add_argument('--images', metavar='FOLDER',
                      help='the images to examine (default: the training images of the run, and '
                           'those held out as the test set)')
  parser.add_argument('--test', metavar='FOLDER',
                      help='images that should not be among the others: a test set, or new images')
  parser.add_argument('--threshold', type=_number, metavar='S',
                      help='cosine from which two images are duplicates (default: chosen from the '
                           'images, so that at most 1%% of the pairs are there by chance)')
  cli.add_features(parser)
  cli.add_on_unreadable(parser)
  return parser


def _number(text):
  try:
    return float(text)
  except ValueError:
    raise errors.UserError(f"--threshold is '{text}'", 'a number', setting='--threshold') from None


def _images(model, args):
  """(the images, those of the test set or None)."""
  if args.images is None:
    return model.dataset.train, model.dataset.test
  load = lambda path, flag: folder.load(path, args.on_unreadable, None, flag, with_labels=False)[0]
  return load(args.images, '--images'), None if args.test is None else load(args.test, '--test')


def _names(images) -> list[str]:
  return [str(i) for i in range(len(images))] if images.names is None else list(images.names)


def _sizes(images) -> list[int] | None:
  """Bytes of the files, or None if the images are arrays."""
  source: Any = images.files
  if images.names is None or isinstance(source, (np.ndarray, list)):
    return None
  return [source.size(i) for i in range(len(images))]


def _show(findings, output, names, test):
  images = sum(map(len, findings.groups))
  print(f'{output}: {len(findings.groups):,} groups of duplicates, {images:,} of {len(names):,} '
        f'images, at a cosine of {findings.threshold:.4f} and above')
  if findings.groups:
    print(f"the largest: {', '.join(repr(names[i]) for i in findings.groups[0][:4])}"
          + (', ...' if len(findings.groups[0]) > 4 else ''))
  if test is not None:
    print(f'{len(findings.leaks):,} of {len(test):,} test images are in the training set, too')
  print(f"least like all others: '{names[findings.outliers[0]]}'")


if __name__ == '__main__':
  sys.exit(main())
