"""Converts PyTorch checkpoints into workdirs, and encoders of workdirs for other programs.

    python -m instdisc_jax.convert --from=FILE --workdir=DIR     imports a checkpoint
    python -m instdisc_jax.convert --workdir=DIR --to=FILE       exports the encoder of a run

FILE.pth and FILE.safetensors have torchvision's layout, FILE.pkl detectron2's. FILE.onnx takes
images of bytes and gives embeddings of unit norm. A name without a suffix is a folder that timm
loads, with a model card.

Reading or writing .pth needs PyTorch (`pip install 'instdisc_jax[torch]'`), writing .onnx `onnx`.
"""

from collections.abc import Sequence
import json
import pathlib
import sys

import jax.numpy as jnp

from instdisc_jax import cli, inference, linalg
from instdisc_jax import config as config_lib
from instdisc_jax.data import views
from instdisc_jax.interop import checkpoints, detectron2, hub, onnx, safe_pickle
from instdisc_jax.interop.layouts import from_torch, to_torch
from instdisc_jax.runtime import errors, files
from instdisc_jax.training import import_checkpoint as importing

__all__ = ['from_torch', 'main', 'to_torch']


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  def command():
    parser = cli.make_parser(
        'convert', __doc__, '--from=FILE --workdir=DIR | --workdir=DIR --to=FILE [--head]')
    parser.add_argument('--from', dest='source', metavar='FILE', help='a .pth or .safetensors file')
    cli.add_workdir(parser, 'with --from: the folder to make; with --to: the folder of a run')
    parser.add_argument('--to', metavar='FILE', help='a .pth, .safetensors, .onnx or .pkl file, or '
                        'a folder for timm and the Hugging Face hub')
    parser.add_argument('--head', action='store_true',
                        help="with --to: keep the linear layer to the embedding, as 'fc'")
    args = parser.parse_args(argv)
    if (args.source is None) == (args.to is None):
      raise errors.UserError('exactly one of --from and --to must be given', remedy='see --help')
    if args.to:
      _export(args.workdir, pathlib.Path(args.to), args.head)
      print(args.to)
    else:
      print('\n'.join(importing.import_checkpoint(args.source, args.workdir)))

  return cli.run(command)


def _export(workdir, to, with_head):
  """Writes the encoder of a run as the suffix says."""
  match to.suffix:
    case '.pth' | '.safetensors':
      checkpoints.export(workdir, to, with_head)
    case '.onnx' | '.pkl':
      model = inference.load(workdir)
      content = _as_onnx(model) if to.suffix == '.onnx' else detectron2.dumps(
          checkpoints.state_dict(workdir, with_head=False), model.config.model.name)
      try:
        files.write(to, content)
      except OSError as e:
        raise errors.cannot_write(to, e, '--to') from e
    case '':
      model = inference.load(workdir)
      hub.check(model.config.model.name, model.config.model.width)
      summary = files.place(workdir) / 'summary.json'
      hub.write(to.absolute(), checkpoints.state_dict(workdir, with_head=False),
                config_lib.to_json(model.config), _side(model),
                json.loads(summary.read_text()) if summary.exists() else {})
    case _:
      raise errors.UserError(f"--to is '{to}'", 'a file that ends in .pth, .safetensors, .onnx '
                             'or .pkl, or a folder', setting='--to')


def _as_onnx(model) -> bytes:
  """[B, side, side, 3] uint8 central views -> embedding [B, D] and pooled [B, F], of unit norm."""
  safe_pickle.import_optional('onnx', '--to')
  side = _side(model)
  wide = jnp.promote_types(model.config.model.dtype, jnp.float32)  # ONNX has no bfloat16 kernels
  encoder = model.encoder.clone(dtype=wide)

  def encode(images):
    x = views.central(model.config, images, None)
    embedding, shown = encoder.apply(model.variables, x, train=False, mutable=['stages'])
    return {'embedding': embedding, 'pooled': linalg.normalize(shown['stages']['pooled_output'])}

  return onnx.export(encode, (side, side, 3), {
      'model': model.config.model.name, 'step': str(model.step),
      'images': f'central views of {side} pixels, RGB, as bytes'})


def _side(model) -> int:
  """Side of the views in pixels."""
  if model.config.augment.size is not None:
    return model.config.augment.size
  height, width = views.size(model.config, model.dataset.train.shape)
  if height != width:
    raise errors.UserError(f"the views of '{model.workdir}' have {height} x {width} pixels",
                           'square ones', 'set <--to> to a .pth or .safetensors file', '--to')
  return height


if __name__ == '__main__':
  sys.exit(main())
