"""One image, from the bytes of its file to the view that a step needs, on the host.

JPEGs are decoded by libjpeg-turbo (simplejpeg), at 1/2, 1/4 or 1/8 of their size if the view is
that much smaller; everything else, and whatever that decoder rejects, is decoded by PIL. Views are
resized as in PIL, bilinear with antialiasing, to within the error that
`benchmarks/input_pipeline.py` prints.

Unusual files: gray, palette and CMYK images become RGB; transparent parts become white; 16-bit
images keep their upper 8 bits; EXIF rotation is applied; the first frame of an animation is used.
Truncated files, files that are not images, floating-point images and images of more than 89 million
pixels are rejected.
"""

from collections.abc import Callable
import contextlib
import io
from typing import Any
import warnings

from jaxtyping import UInt8
import numpy as np
from PIL import Image

MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 89_478_485  # PIL's own limit, beyond which it only warns
_ORIENTATION = 0x0112  # EXIF
_LEAST_BY_TAPS, _MOST_BY_TAPS = 1.1, 2.25  # between these scales, three taps replace PIL's filter
# Functions that turn the stored image upright, by EXIF orientation.
_UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 3),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}

warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # rejected, see above


class UnreadableError(Exception):
  """A file that is not a usable image; the message says why, as the rest of a sentence."""


def decode(data: Any) -> UInt8[np.ndarray, 'H W 3']:
  """A full image.

  Args:
    data: the bytes of its file, or the image itself as an array.

  Returns:
    [H, W, 3] uint8.

  Raises:
    UnreadableError: it cannot be decoded, or is rejected.
  """
  if isinstance(data, np.ndarray):
    return data
  _, turn, plain = _open(data)
  return np.ascontiguousarray(turn(_pixels(data, plain, 1)))


def size(data: Any) -> tuple[int, int]:
  """(H, W) of an image, from the header of its file; raises `UnreadableError`."""
  return data.shape[:2] if isinstance(data, np.ndarray) else _open(data)[0]


def view(data: Any, draw_box: Callable, side: int) -> UInt8[np.ndarray, 'side side 3']:
  """A part of an image, resized; decodes no more than is needed.

  Args:
    data: the bytes of its file, or the image itself as an array.
    draw_box: (H, W) -> (top, left, height, width), in pixels.
    side: side of the view in pixels.

  Returns:
    [side, side, 3] uint8.

  Raises:
    UnreadableError: it cannot be decoded, or is rejected.
  """
  if isinstance(data, np.ndarray):
    return _cut(data, draw_box(*data.shape[:2]), side)
  (height, width), turn, plain = _open(data)
  box = draw_box(height, width)
  shrink = 1
  while shrink < 8 and min(box[2:]) >= 2 * shrink * side:
    shrink *= 2
  pixels = turn(_pixels(data, plain, shrink))
  shrunk = round(height / pixels.shape[0])  # not every format can be decoded at reduced size
  if shrunk > 1:
    box = tuple(x / shrunk for x in box)  # now fractional; the last pixels may be half outside
  return _cut(pixels, box, side)


def _open(data) -> tuple[tuple[int, int], Callable, bool]:
  """(upright (H, W), function that turns pixels upright, whether it is a gray or color JPEG)."""
  import simplejpeg  # not needed for images in memory

  height = width = 0
  try:
    header: Any = simplejpeg.decode_jpeg_header(data)
    height, width, colors, _ = header
    plain = colors in ('YCbCr', 'RGB', 'Gray')
  except ValueError:
    plain = False
  orientation = 1
  if not plain or _has_exif(data):
    image = _pil(data)
    width, height = image.size
    if image.format != 'PNG' or 'exif' in image.info:  # for a PNG, PIL would decode it to find EXIF
      with contextlib.suppress(Exception):  # a broken EXIF segment says nothing about the image
        orientation = image.getexif().get(_ORIENTATION, 1)
  if height * width > MOST_PIXELS:
    raise UnreadableError(f'has {height} x {width} pixels, more than {MOST_PIXELS:,}')
  if orientation in (5, 6, 7, 8):
    height, width = width, height
  return (height, width), _UPRIGHT.get(orientation, lambda x: x), plain


def _has_exif(jpeg):
  """Whether one of a JPEG's segments before the image holds EXIF data."""
  at = 2
  while jpeg[at:at + 1] == b'\xff' and jpeg[at + 1] not in (0xC0, 0xC2, 0xDA):
    if jpeg[at + 4:at + 8] == b'Exif':
      return True
    at += 2 + int.from_bytes(jpeg[at + 2:at + 4])
  return False


def _pil(data):
  """A PIL image, its pixels not yet decoded."""
  try:
    return Image.open(io.BytesIO(data))
  except Image.DecompressionBombError as e:
    raise UnreadableError(f'{e}'.split(',')[0]) from None
  except Exception as e:  # PIL's plugins raise all kinds of errors for broken files
    reason = f'is not an image ({type(e).__name__})' if data else 'is empty'
    raise UnreadableError(reason) from None


def _pixels(data, plain, shrink):
  """The stored pixels as [H, W, 3] uint8, at 1 / `shrink` of the size if the format allows it."""
  if plain:
    import simplejpeg  # as above
    header: Any = simplejpeg.decode_jpeg_header(data)
    height, width, _, _ = header
    try:
      return simplejpeg.decode_jpeg(data, min_height=-(-height // shrink),
                                    min_width=-(-width // shrink), min_factor=shrink)
    except ValueError:
      pass  # the fault may be harmless: PIL decides
  image = _pil(data)
  try:
    image.draft('RGB', tuple(-(-side // shrink) for side in image.size))
    image.load()
    if image.mode.startswith('I'):
      return _upper_byte(np.asarray(image))
    if image.mode == 'F':
      raise UnreadableError('has floating-point pixels')
    if image.has_transparency_data:
      image = image.convert('RGBA')
      white = Image.new('RGBA', image.size, 'white')
      image = Image.alpha_composite(white, image)
    return np.asarray(image.convert('RGB'))
  except (OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError, TypeError) as e:
    raise UnreadableError(f'cannot be decoded ({e})') from None


def _upper_byte(gray):
  """[H, W] of 16 bits -> [H, W, 3] uint8."""
  if gray.size and not 0 <= gray.min() <= gray.max() < 2**16:
    raise UnreadableError(f'has pixels from {gray.min()} to {gray.max()}, more than 16 bits')
  return np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=2)


def _cut(pixels, box, side):
  """The box, in pixels, resized to [side, side, 3].

  If that shrinks by a factor s of at most `_MOST_BY_TAPS` and the box is aligned to pixels, PIL's
  triangle filter of half-width s is replaced by three taps and bilinear interpolation, which
  together have the same variance, s² / 6.
  """
  top, left, height, width = box
  scale = height / side, width / side
  if max(scale) > _MOST_BY_TAPS or any(x != round(x) for x in box):
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR,
                                   box=(left, top, left + width, top + height)))
  import cv2  # as above

  top, left, height, width = map(int, box)
  part = pixels[top:top + height, left:left + width]
  if part.shape[:2] == (side, side):
    return part.copy()
  if max(scale) > _LEAST_BY_TAPS:
    part = cv2.sepFilter2D(np.ascontiguousarray(part) if part.strides[1] != 3 else part, -1,
                           _taps(scale[1]), _taps(scale[0]), borderType=cv2.BORDER_REFLECT)
  return cv2.resize(np.ascontiguousarray(part), (side, side), interpolation=cv2.INTER_LINEAR)


def _taps(scale):
  outer = max(scale * scale - 1, 0) / 12
  return np.array([outer, 1 - 2 * outer, outer], np.float32)
