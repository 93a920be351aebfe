"""Shows what training would see: 8 pictures of a folder, 8 random views of each."""

import argparse
import functools
import io
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from instdisc_jax import augment, errors, files, train
from instdisc_jax import config as config_lib
from instdisc_jax import main as main_lib
from instdisc_jax.data import draws, folder

_PICTURES = _VIEWS = 8
_GAP = 4  # pixels between views; the first column, the whole picture, has twice that


def draw(images, config):
  """The sheet of pictures and views.

  Args:
    images: a folder.
    config: whose augment settings and seed are used.

  Returns:
    [H, W, 3] uint8: a row for each of up to 8 pictures, spread over the folder; first the picture
    as evaluation sees it, then 8 views.

  Raises:
    errors.UserError: no folder, no pictures, or one that can't be read.
  """
  source, _, _ = folder.load(images, 'error', setting='set --images')
  side, = set(train.view_size(config, None))
  chosen = np.unique(np.linspace(0, len(source) - 1, _PICTURES).astype(int))
  index, place = np.repeat(chosen, _VIEWS), np.tile(np.arange(_VIEWS), len(chosen))
  crop = {key: config.augment[key] for key in ('crop_scale', 'crop_ratio')}
  drawn = draws.uniform(config.seed, (train.AUGMENT, place, index), augment.DRAWS)
  views = np.stack([
      source.view(i, lambda height, width: augment.draw_crop(
          drawn[n:n + 1], height, width, **crop)[0].tolist(), side)
      for n, i in enumerate(index)])
  key = jax.random.fold_in(jax.random.key(config.seed), train.AUGMENT)
  keys = jax.vmap(lambda p, i: jax.random.fold_in(jax.random.fold_in(key, p), i))(
      jnp.asarray(place, jnp.uint32), jnp.asarray(index, jnp.int32))
  strengths = {name: value for name, value in config.augment.items() if name != 'size'}
  strengths |= dict(mean=(0.0,) * 3, std=(1.0,) * 3)  # to be looked at
  views = jax.jit(functools.partial(augment.augment, size=None, **strengths))(keys, views)
  views = np.round(np.asarray(views) * 255).astype(np.uint8)
  views = views.reshape(len(chosen), _VIEWS, side, side, 3)

  step = side + _GAP
  sheet = np.full((len(chosen) * step - _GAP, (_VIEWS + 1) * step + _GAP, 3), 255, np.uint8)
  for row, i in enumerate(chosen):
    top = row * step
    sheet[top:top + side, :side] = source.centre(i, side)
    for col in range(_VIEWS):
      left = (col + 1) * step + _GAP
      sheet[top:top + side, left:left + side] = views[row, col]
  return sheet


def main(argv=None):
  """The command; returns its exit code: 0, or 2 for a user's mistake."""
  def command():
    parser = argparse.ArgumentParser(
        prog='python -m instdisc_jax.preview', description=__doc__, allow_abbrev=False,
        usage='%(prog)s --images=FOLDER --output=FILE.png [--config=FILE] [--config.KEY=VALUE ...]')
    parser.error = lambda message: errors.raise_user_error(f'{message}: see --help')
    parser.add_argument('--images', required=True, metavar='FOLDER', help='pictures of any size')
    parser.add_argument('--output', required=True, metavar='FILE.png', help='what is written')
    parser.add_argument('--config', metavar='FILE',
                        help='whose augment settings are shown (default: those for photographs)')
    args, overrides = parser.parse_known_args(argv)
    output = pathlib.Path(args.output)
    errors.check_place(output, '.png')
    if args.config is None and overrides:
      raise errors.UserError(f"unknown argument '{overrides[0]}': see --help, or set --config, too")
    config = config_lib.default()
    config.augment.update(config_lib.PHOTOGRAPHS)
    if args.config is not None:
      _, config = main_lib.parse([f'--config={args.config}', '--workdir=unused', *overrides])
    config_lib.validate(config)
    try:
      sheet = draw(args.images, config)
    except errors.UserError as e:
      what, broken, _ = str(e).partition(': remove it')
      raise errors.UserError(f'{what}{broken and ": remove it, or set --images"}') from e
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, 'PNG')
    try:
      files.write(output, png.getvalue())
    except OSError as e:
      raise errors.UserError(f"'{output}' can't be written ({e.strerror}): set --output to a place "
                             'that can') from e
    print(output)

  return errors.exit_code(command)


if __name__ == '__main__':
  sys.exit(main())
