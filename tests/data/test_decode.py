import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps
import pytest

from instdisc_jax.data import Images, decode

SMOOTH = np.asarray(Image.fromarray(np.random.default_rng(0).integers(
    0, 256, (12, 16, 3), dtype=np.uint8)).resize((400, 300), Image.Resampling.BICUBIC))


def _file(image, kind, **kwargs):
  file = io.BytesIO()
  (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **kwargs)
  return file.getvalue()


def _pil(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


def _error(a, b):
  return np.abs(a.astype(int) - b).mean()


def test_a_jpeg_is_decoded_as_by_pil():
  data = _file(SMOOTH, 'JPEG', quality=90)
  assert _error(decode.decode(data), _pil(data)) < 0.5
  assert decode.open_image(data).size == (300, 400)


@pytest.mark.parametrize('box, side', [
    ((10, 20, 200, 300), 224),  # larger in one direction, smaller in the other
    ((30, 40, 60, 50), 96),  # enlarged
    ((5, 7, 290, 390), 160),  # three taps
    ((1, 3, 297, 395), 64),  # at a half of its size
    ((0, 0, 300, 400), 20),  # at an eighth
    ((40, 50, 64, 64), 64),  # as it is
])
@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_a_view_is_what_pil_crops_and_resizes(box, side, kind):
  data = _file(SMOOTH, kind)
  top, left, height, width = box
  expected = np.asarray(Image.open(io.BytesIO(data)).crop(
      (left, top, left + width, top + height)).resize((side, side), Image.Resampling.BILINEAR))
  found = decode.open_image(data).view(box, side)
  assert found.shape == (side, side, 3) and found.dtype == np.uint8
  assert _error(found, expected) < 1.5
  assert _error(found, expected[:, ::-1]) > 10  # the error does tell images apart
  np.testing.assert_allclose(decode.open_image(_pil(data)).view(box, side), found, atol=12)


def test_boxes_are_drawn_for_the_upright_images():
  asked, files = [], [_file(SMOOTH, 'JPEG', exif=_orientation(6)), _file(SMOOTH, 'PNG')]
  draw = lambda *sizes: asked.append(np.transpose(sizes).tolist()) or np.full((2, 4), 100)
  views = list(Images(files, None, '').views(np.arange(2), draw, 32))
  assert asked == [[[400, 300], [300, 400]]] and [view.shape for view in views] == [(32, 32, 3)] * 2


def _whole_view(data):
  image = decode.open_image(data)
  return image.view((0, 0, *image.size), 8)


def _orientation(value):
  exif = Image.Exif()
  exif[0x0112] = value
  return exif


@pytest.mark.parametrize('value', range(1, 9))
def test_exif_rotation_is_applied(value):
  data = _file(SMOOTH, 'JPEG', exif=_orientation(value))
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  assert _error(decode.decode(data), np.asarray(upright)) < 0.5
  assert decode.open_image(data).size == upright.size[::-1]
  left, top = upright.size[0] // 8, upright.size[1] // 4
  view = upright.crop((left, top, left + 150, top + 150)).resize((64, 64),
                                                                 Image.Resampling.BILINEAR)
  assert _error(decode.open_image(data).view((top, left, 150, 150), 64), np.asarray(view)) < 2


def test_unusual_images_become_rgb():
  image = Image.fromarray(SMOOTH)
  gray = np.asarray(image.convert('L'))
  for kind in ('JPEG', 'PNG'):
    assert _error(decode.decode(_file(gray, kind)), gray[..., None]) < 2
  assert _error(decode.decode(_file(image.convert('P'), 'PNG')),
                np.asarray(image.convert('P').convert('RGB'))) == 0
  cmyk = _file(image.convert('CMYK'), 'JPEG')
  assert _error(decode.decode(cmyk), SMOOTH) < 5
  deep = (gray.astype(np.uint16) << 8) + 77
  assert _error(decode.decode(_file(Image.fromarray(deep), 'PNG')), gray[..., None]) == 0


def test_transparent_parts_become_white():
  rgba = np.dstack([SMOOTH, np.full(SMOOTH.shape[:2], 255, np.uint8)])
  rgba[:100, :, 3] = 0
  found = decode.decode(_file(rgba, 'PNG'))
  assert (found[:100] == 255).all()
  np.testing.assert_array_equal(found[100:], SMOOTH[100:])


def test_the_first_frame_of_an_animation_is_used():
  frames = [Image.fromarray(np.full((20, 30, 3), v, np.uint8)) for v in (50, 200)]
  data = _file(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  assert decode.decode(data).shape == (20, 30, 3)
  np.testing.assert_allclose(decode.decode(data), 50, atol=3)


def _png_head(height, width):
  chunk = lambda kind, body: (struct.pack('>I', len(body)) + kind + body
                              + struct.pack('>I', zlib.crc32(kind + body)))
  head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', b'')


@pytest.mark.filterwarnings('ignore:Image size')
@pytest.mark.parametrize('data, message', [
    (b'', 'is empty'),
    (b'this is a text', 'is not an image'),
    (_file(SMOOTH, 'JPEG')[:3000], "cannot be decoded .*truncated"),
    (_file(SMOOTH, 'PNG')[:3000], "cannot be decoded"),
    (_file(SMOOTH, 'JPEG')[:100], 'is not an image|decoded'),
    (_file(Image.fromarray(np.zeros((4, 4), np.float32)), 'TIFF'), 'has floating-point pixels'),
    (_file(Image.fromarray(np.full((4, 4), 2**20, np.int32)), 'TIFF'), 'more than 16 bits'),
    (_png_head(10_000, 10_000), 'has 10000 x 10000 pixels, more than 89,478,485'),
    (_png_head(30_000, 30_000), 'Image size .* exceeds limit'),
], ids=range(9))
def test_what_is_not_a_usable_image_is_refused(data, message):
  for read in (decode.decode, _whole_view):
    with pytest.raises(decode.UnreadableError, match=message):
      read(data)
