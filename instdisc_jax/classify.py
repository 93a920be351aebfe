"""Classifies all images of a folder from the labels of a few.

Reads labels of some images and writes for every image its class, how likely that is right, and the
labeled images most like it. The accuracy is estimated by leave-one-out.
"""

from collections.abc import Sequence
import math
import pathlib
import sys

from instdisc_jax import cli, inference
from instdisc_jax.evaluation import classifier
from instdisc_jax.runtime import errors, preemption
from instdisc_jax.search import labeling

_FLAGS = {'dataset.on_unreadable': '--on_unreadable', 'dataset.name': '--images'}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code: 0, 2 (user error), 1 (failed), 75 (stopped)."""
  def command():
    args = _parser().parse_args(argv)
    output = pathlib.Path(args.output)
    errors.check_output(output, ('.csv',))
    if output.exists() and not labeling.is_predictions(output):
      raise errors.UserError(f"'{output}' exists", remedy='set <--output> to a new file',
                             setting='--output')
    if args.suggest < 0:
      raise errors.UserError(f'--suggest is {args.suggest}', 'at least 0', setting='--suggest')
    old = labeling.suggestions(output)
    if args.suggest and old.exists() and not labeling.is_suggestions(old):
      raise errors.UserError(f"'{old}' exists and holds more than suggestions", setting='--output',
                             remedy='rename it, or set <--output> to a new file')
    task = labeling.prepare(pathlib.Path(args.labels), args.workdir, args.images,
                            args.on_unreadable)
    with preemption.Watch() as watch:
      model = inference.load(args.workdir, args.features, watch.check)
      found = labeling.run(model, task, output, args.method, args.suggest)
    _show(found, output)

  return cli.run(command, _FLAGS)


def _parser():
  parser = cli.make_parser(
      'classify', __doc__, '--workdir=DIR --labels=FILE.csv --output=FILE.csv [--images=FOLDER] '
      '[--method=knn|linear] [--suggest=N]')
  cli.add_workdir(parser, 'folder of a run, or a .pth or .safetensors file with weights')
  parser.add_argument('--labels', required=True, metavar='FILE.csv',
                      help='lines of path,label for some of the images; paths are relative to '
                           'their folder')
  parser.add_argument('--output', required=True, metavar='FILE.csv',
                      help='the file to write: path, label, confidence, given, unknown, and the '
                           'three nearest labeled images')
  parser.add_argument('--images', metavar='FOLDER',
                      help='the images to classify (default: the folder of the run)')
  parser.add_argument('--method', choices=classifier.METHODS, default='knn',
                      help='the vote of the nearest labeled images (default), or a linear '
                           'classifier of the embeddings')
  cli.add_integer(parser, '--suggest', metavar='N', default=0,
                  help='also write the N images worth labeling next, to NAME-suggested.csv')
  cli.add_features(parser)
  cli.add_on_unreadable(parser)
  return parser


def _show(found, output):
  fitted = found.classifier
  print(f'{output}: {found.num_images:,} images, {len(fitted.label):,} of them labeled, '
        f'{len(fitted.class_names)} classes; {found.num_unknown:,} are like no labeled one')
  curve = ''.join(f', {accuracy:.3f} with {count}' for count, accuracy in reversed(found.curve))
  print(f'accuracy by leave-one-out: {fitted.accuracy:.3f} with {len(fitted.label)} labels '
        f'(raw pixels: {found.pixels:.3f}){curve}'
        + ('' if math.isnan(fitted.calibration_error) else
           f'; the confidence is off by {fitted.calibration_error:.3f} on average'))
  if found.suggested:
    print(f'{labeling.suggestions(output)}: {len(found.suggested)} images worth labeling next, '
          f"the first '{found.suggested[0]}'")
  if found.pixels > fitted.accuracy:
    errors.warn(f'raw pixels reach {found.pixels:.3f}: the encoder does not suit these images; '
                'train it longer, or start from weights (--config.model.init=FILE)')


if __name__ == '__main__':
  sys.exit(main())
