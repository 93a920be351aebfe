"""Makes a search page from a trained encoder: images beside their nearest training images.

The page is a folder that opens from disk and works offline. Click any image to make it the query;
other tabs list near-duplicates, and outliers, which resemble no other image.
"""

from collections.abc import Sequence
import pathlib
import sys

from instdisc_jax import cli, inference
from instdisc_jax.runtime import errors, preemption
from instdisc_jax.search import page

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
    with preemption.Watch() as watch:
      count = page.build(inference.load(args.workdir, args.features), output, watch, queries)
    print(f'{output / "index.html"}: {count} queries')

  return cli.run(command, _FLAGS)


def _parser():
  parser = cli.make_parser(
      'retrieve', __doc__, '--workdir=DIR --output=FOLDER [--images=FOLDER] [--queries=N]')
  cli.add_workdir(parser, 'folder of a run, or a .pth or .safetensors file with weights')
  parser.add_argument('--output', required=True, metavar='FOLDER',
                      help='the folder to make; open its index.html')
  parser.add_argument('--images', metavar='FOLDER',
                      help='query images (default: those held out from training)')
  cli.add_integer(parser, '--queries', default=page.Queries.most, metavar='N',
                  help='maximum number of query images, evenly spread (default: %(default)s)')
  cli.add_features(parser)
  cli.add_on_unreadable(parser)
  return parser


if __name__ == '__main__':
  sys.exit(main())
