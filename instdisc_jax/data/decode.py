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

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
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
  return np.ascontiguousarray(open_image(data).pixels())


@dataclasses.dataclass(frozen=True)
class Opened:
  """An image whose header was read, and whose pixels are decoded when they are needed.

  Attributes:
    size: (H, W), upright.
    data: the bytes of its file, or the image itself as an array.
    turn: turns the stored pixels upright.
    jpeg: (height, width) as stored, if it is a gray or color JPEG; else None.
    image: PIL's image, if PIL has opened it.
  """
  size: tuple[int, int]
  data: Any
  turn: Callable = lambda x: x
  jpeg: tuple[int, int] | None = None
  image: Any = None

  def view(self, box: Sequence[int], side: int) -> UInt8[np.ndarray, 'side side 3']:
    """A part of the image, resized; decodes no more than is needed.

    Args:
      box: (top, left, height, width), in pixels.
      side: side of the view in pixels.

    Returns:
      [side, side, 3] uint8.

    Raises:
      UnreadableError: it cannot be decoded, or is rejected.
    """
    if isinstance(self.data, np.ndarray):
      return _cut(self.data, box, side)
    shrink = 1
    while shrink < 8 and min(box[2:]) >= 2 * shrink * side:
      shrink *= 2
    pixels = self.pixels(shrink)
    shrunk = round(self.size[0] / pixels.shape[0])  # not every format is decoded at reduced size
    if shrunk > 1:
      box = [x / shrunk for x in box]  # now fractional; the last pixels may be half outside
    return _cut(pixels, box, side)

  def pixels(self, shrink: int = 1) -> UInt8[np.ndarray, 'h w 3']:
    """All of it, upright, at 1 / `shrink` of its size if the format allows that."""
    return self.turn(_pixels(self, shrink))


def open_image(data: Any) -> Opened:
  """An image by its header; raises `UnreadableError`.

  Args:
    data: the bytes of its file, or the image itself as an array.
  """
  if isinstance(data, np.ndarray):
    return Opened(data.shape[:2], data)
  import simplejpeg  # not needed for images in memory

  height = width = 0
  jpeg = image = None
  try:
    header: Any = simplejpeg.decode_jpeg_header(data)
    height, width, colors, _ = header
    if colors in ('YCbCr', 'RGB', 'Gray'):
      jpeg = height, width
  except ValueError:
    pass
  orientation = 1
  if jpeg is None or _has_exif(data):
    image = _pil(data)
    width, height = image.size
    if image.format != 'PNG' or 'exif' in image.info:  # for a PNG, PIL would decode it to find EXIF
      with contextlib.suppress(Exception):  # a broken EXIF segment says nothing about the image
        orientation = image.getexif().get(_ORIENTATION, 1)
  if height * width > MOST_PIXELS:
    raise UnreadableError(f'has {height} x {width} pixels, more than {MOST_PIXELS:,}')
  if orientation in (5, 6, 7, 8):
    height, width = width, height
  return Opened((height, width), data, _UPRIGHT.get(orientation, lambda x: x), jpeg, image)


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


def _pixels(opened, shrink):
  """The stored pixels as [H, W, 3] uint8, at 1 / `shrink` of the size if the format allows it."""
  if opened.jpeg is not None:
    import simplejpeg  # as above
    height, width = opened.jpeg
    try:
      return simplejpeg.decode_jpeg(opened.data, min_height=-(-height // shrink),
                                    min_width=-(-width // shrink), min_factor=shrink)
    except ValueError:
      pass  # the fault may be harmless: PIL decides
  image = opened.image or _pil(opened.data)
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
  except (OSError, SyntaxError, ValueError, EOFError, MemoryError, IndexError, TypeError,
          RuntimeError) as e:
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
