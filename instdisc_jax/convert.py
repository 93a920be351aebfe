"""Converts PyTorch checkpoints into workdirs, and encoders of workdirs into files for PyTorch.

    python -m instdisc_jax.convert --from=FILE --workdir=DIR     imports a checkpoint
    python -m instdisc_jax.convert --workdir=DIR --to=FILE       exports the encoder of a run

Reading or writing .pth needs PyTorch (`pip install '.[torch]'`); nothing else does.
"""

from collections.abc import Sequence
import sys

from instdisc_jax import cli
from instdisc_jax.interop import checkpoints
from instdisc_jax.interop.layouts import from_torch, to_torch
from instdisc_jax.runtime import errors
from instdisc_jax.training import import_checkpoint as importing

__all__ = ['from_torch', 'main', 'to_torch']


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  def command():
    parser = cli.make_parser(
        'convert', __doc__, '--from=FILE --workdir=DIR | --workdir=DIR --to=FILE [--head]')
    parser.add_argument('--from', dest='source', metavar='FILE', help='a .pth or .safetensors file')
    cli.add_workdir(parser, 'with --from: the folder to make; with --to: the folder of a run')
    parser.add_argument('--to', metavar='FILE', help='a .pth or .safetensors file to write')
    parser.add_argument('--head', action='store_true',
                        help="with --to: keep the linear layer to the embedding, as 'fc'")
    args = parser.parse_args(argv)
    if (args.source is None) == (args.to is None):
      raise errors.UserError('exactly one of --from and --to must be given', remedy='see --help')
    if args.to:
      checkpoints.export(args.workdir, args.to, args.head)
      print(args.to)
    else:
      print('\n'.join(importing.import_checkpoint(args.source, args.workdir)))

  return cli.run(command)


if __name__ == '__main__':
  sys.exit(main())
