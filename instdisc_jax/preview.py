"""Shows what training sees: 8 images of a folder, with 8 random views of each."""

from collections.abc import Sequence
import io
import pathlib
import sys

import jax
from PIL import Image

from instdisc_jax import cli
from instdisc_jax import config as config_lib
from instdisc_jax.data import folder
from instdisc_jax.data import images as images_lib
from instdisc_jax.evaluation import contact_sheet
from instdisc_jax.runtime import errors, files


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code: 0, or 2 (user error)."""
  def command():
    args, overrides = _parser().parse_known_args(argv)
    output = pathlib.Path(args.output)
    errors.check_output(output, ('.png',))
    config = cli.read_config(args.config, overrides)
    config_lib.validate(config)
    images, _, _ = folder.load(args.images, 'error', setting='--images')
    config = config_lib.fill(config, len(images), jax.default_backend() == 'cpu')
    try:
      sheet = contact_sheet.draw(images, config)
    except images_lib.UnreadableImage as e:
      raise e.with_remedy('remove it, or set <--images>') from e
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, 'PNG')
    try:
      files.write(output, png.getvalue())
    except OSError as e:
      raise errors.cannot_write(output, e, '--output') from e
    print(f'{output}: left as evaluation sees an image, right as training does. Views of an image '
          'should look alike to you: if color tells your images apart, lower the augment settings '
          'hue, saturation and grayscale; if left and right do, set flip to 0')

  return cli.run(command)


def _parser():
  parser = cli.make_parser(
      'preview', __doc__,
      '--images=FOLDER --output=FILE.png [--config=FILE] [--config.KEY=VALUE ...]')
  parser.add_argument('--images', required=True, metavar='FOLDER', help='images of any size')
  parser.add_argument('--output', required=True, metavar='FILE.png', help='the file to write')
  parser.add_argument('--config', metavar='FILE',
                      default='configs/folder.py',
                      help='whose augment settings are used (default: %(default)s)')
  return parser


if __name__ == '__main__':
  sys.exit(main())
