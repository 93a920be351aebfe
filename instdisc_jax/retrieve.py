"""Makes a search page from a trained encoder: images beside their nearest training images.

The page is a folder that opens from disk and works offline. Click any image to make it the query.
Other tabs hold a map of all images, groups of duplicates, outliers, and queries that also appear
among the training images. Images can be labeled by click and key, and saved as labels.csv for
`classify`.
"""

from collections.abc import Sequence
import pathlib
import sys

from instdisc_jax import cli, inference
from instdisc_jax.runtime import errors, preemption
from instdisc_jax.search import labeling, page

_FLAGS = {'dataset.on_unreadable': '--on_unreadable', 'dataset.name': '--images'}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code: 0, 2 (user error), 1 (failed), 75 (stopped)."""
  def command():
    args = _parser().parse_args(argv)
    if args.queries < 1:
      raise errors.UserError(f'--queries is {args.queries}', 'at least 1', setting='--queries')
    page.check_output(pathlib.Path(args.output))
    output = pathlib.Path(args.output).resolve()
    queries = page.Queries(args.images, args.queries, args.on_unreadable)
    predictions = args.predictions and labeling.read_predictions(pathlib.Path(args.predictions))
    with preemption.Watch() as watch:
      built = page.build(inference.load(args.workdir, args.features, watch.check), output,
                         watch, queries, predictions=predictions)
    print(f'{output / "index.html"}: {built.queries} queries')
    if built.shown < built.searched:
      errors.warn(f'the page shows {built.shown:,} of {built.searched:,} images, evenly spread; '
                  'its queries have their nearest among all of them, and audit examines them all')

  return cli.run(command, _FLAGS)


def _parser():
  parser = cli.make_parser(
      'retrieve', __doc__, '--workdir=DIR --output=FOLDER [--images=FOLDER] [--queries=N] '
      '[--predictions=FILE.csv]')
  cli.add_workdir(parser, 'folder of a run, or a .pth or .safetensors file with weights')
  parser.add_argument('--output', required=True, metavar='FOLDER',
                      help='the folder to make; open its index.html')
  parser.add_argument('--images', metavar='FOLDER',
                      help='query images (default: those held out from training)')
  cli.add_integer(parser, '--queries', default=page.Queries.most, metavar='N',
                  help='maximum number of query images, evenly spread (default: %(default)s)')
  parser.add_argument('--predictions', metavar='FILE.csv',
                      help='what classify wrote, to show beside the images and on the map')
  cli.add_features(parser)
  cli.add_on_unreadable(parser)
  return parser


if __name__ == '__main__':
  sys.exit(main())
