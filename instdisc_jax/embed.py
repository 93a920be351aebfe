"""Embeds a folder of images with a trained encoder; if it is stopped, the same command resumes."""

from collections.abc import Sequence
import pathlib

import jax

from instdisc_jax import cli, inference
from instdisc_jax.runtime import distributed, preemption
from instdisc_jax.search import export, formats, labeling

_FLAGS = {'dataset.on_unreadable': '--on_unreadable', 'dataset.name': '--images'}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code: 0, 2 (user error), 1 (failed), 75 (stopped)."""
  def command():
    args = _parser().parse_args(argv)
    cli.join_processes(args)
    output = pathlib.Path(args.output)
    distributed.first_only(lambda: formats.check(output))
    predictions = args.predictions and labeling.read_predictions(pathlib.Path(args.predictions))
    with preemption.Watch() as watch:
      count = export.write(inference.load(args.workdir, args.features), args.images, output, watch,
                           args.on_unreadable, predictions)
    if jax.process_index() == 0:
      print(f'{output}: {count} embeddings')

  return cli.run(command, _FLAGS)


def _parser():
  parser = cli.make_parser(
      'embed', __doc__,
      '--workdir=DIR --images=FOLDER --output=FILE [--predictions=FILE.csv]')
  cli.add_workdir(parser, 'folder of a run, or a .pth or .safetensors file with weights')
  parser.add_argument('--images', required=True, metavar='FOLDER', help='images of any size')
  parser.add_argument('--output', required=True, metavar='FILE',
                      help='the file to write: .npz, .npy, .parquet (with a map, neighbors and '
                           'labels, for pandas and embedding-atlas) or .faiss')
  parser.add_argument('--predictions', metavar='FILE.csv',
                      help='what classify wrote for these images, to write beside them')
  cli.add_features(parser)
  cli.add_on_unreadable(parser)
  cli.add_processes(parser)
  return parser


if __name__ == '__main__':
  distributed.leave(main())
