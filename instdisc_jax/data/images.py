"""Images in a stable order.

The position of an image in its source, 0..N-1, is its index and its row in the memory bank.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
from typing import Any

from jaxtyping import Int, Int8, UInt8
import numpy as np

from instdisc_jax import crops
from instdisc_jax.data import decode
from instdisc_jax.runtime import errors


class UnreadableImage(errors.UserError):
  """An image that cannot be read or decoded."""


@dataclasses.dataclass(frozen=True)
class Images:
  """N images, read one at a time.

  Attributes:
    files: files[i] is image i: uint8 [H, W, 3], or the bytes of its file.
    labels: [N] int32, or None.
    fingerprint: identifies the source; a bank is only used with the data it was trained on.
    names: the name of each image, e.g. its path; or None.
    shape: (H, W, 3) if all are known to have the same size, else None.
    tags: [N, C] int8 for images that may show several classes: 1 for those that an image shows, 0
      for others, -1 where this does not count; or None.
    origin: what else tells the source from others with the same fingerprint, see `identity`.
  """
  files: Any
  labels: Int[np.ndarray, ' N'] | None
  fingerprint: str
  names: Sequence[str] | None = None
  shape: tuple[int, ...] | None = None
  tags: Int8[np.ndarray, 'N C'] | None = None
  origin: str = ''

  def __len__(self) -> int:
    return len(self.files)

  def identity(self) -> str:
    """The fingerprint; for files on disk, also their location and modification times."""
    origin = self._origin()
    return f'{self.fingerprint} {origin}' if origin else self.fingerprint

  def _origin(self):
    return (self.files.stamp() if hasattr(self.files, 'stamp') else '') or self.origin

  def name(self, i: int) -> str:
    """The name of image i in messages."""
    return f'image {i} (counted from 0)' if self.names is None else f"'{self.names[i]}'"

  def full(self, i: int) -> UInt8[np.ndarray, 'H W 3']:
    """Image i at its own size; raises `UnreadableImage`."""
    return self._read(i, lambda: decode.decode(self.files[i]))

  def views(self, index: Int[np.ndarray, ' b'], draw_boxes: Callable,
            side: int) -> Iterator[UInt8[np.ndarray, 'side side 3']]:
    """Parts of some images, resized.

    Args:
      index: [b] the images.
      draw_boxes: (H [b], W [b]) -> [b, 4] boxes (top, left, height, width), in pixels.
      side: side of the views in pixels.

    Yields:
      A view of each image.

    Raises:
      UnreadableImage: one of them cannot be read.
    """
    opened = [self._read(i, lambda i=i: decode.open_image(self.files[i])) for i in index]
    boxes = draw_boxes(*np.array([image.size for image in opened], np.int32).T).tolist()
    for i, image, box in zip(index, opened, boxes):
      yield self._read(i, functools.partial(image.view, box, side))

  def central(self, i: int, side: int) -> UInt8[np.ndarray, 'side side 3']:
    """The view of image i that evaluation uses, see `crops.central_box`."""
    def read():
      image = decode.open_image(self.files[i])
      return image.view(crops.central_box(*image.size, side), side)

    return self._read(i, read)

  def _read(self, i, read):
    """`read()`, whose errors name image i."""
    try:
      return read()
    except (OSError, decode.UnreadableError) as e:
      raise UnreadableImage(
          f'{self.name(i)} {_why(e)}', setting='dataset.on_unreadable',
          remedy='remove it, or set <dataset.on_unreadable>=skip in a new <--workdir>, or another '
                 '<dataset.name>') from e

  def in_memory(self) -> 'Images':
    """The same images, decoded into one array [N, H, W, 3] uint8.

    Raises:
      UnreadableImage: see `full`.
      errors.UserError: the images differ in size.
    """
    if isinstance(self.files, np.ndarray):
      return self
    images: Any = None
    for i in range(len(self)):
      image = self.full(i)
      if i == 0:
        images = np.empty((len(self), *image.shape), np.uint8)
      if image.shape != images.shape[1:]:
        raise errors.UserError(
            f'{self.name(i)} has {image.shape[0]} x {image.shape[1]} pixels',
            f'{images.shape[1]} x {images.shape[2]} like the others to be kept on the device',
            setting='dataset.path', remedy='set <dataset.path>=stream')
      images[i] = image
    return dataclasses.replace(self, files=images, shape=images.shape[1:], origin=self._origin())

  def one_by_one(self) -> 'Images':
    """The same images, of which an array is a sequence of images too: they are cropped on the host.

    An array marks images that are kept on the devices, where they are cropped.
    """
    if not isinstance(self.files, np.ndarray):
      return self
    return dataclasses.replace(self, files=list(self.files))

  def subset(self, chosen: Int[np.ndarray, ' n'], why: str) -> 'Images':
    """The images at the positions `chosen`, in that order; `why` is added to the fingerprint."""
    return dataclasses.replace(
        self,
        files=self.files[chosen] if isinstance(self.files, np.ndarray) else _At(self.files, chosen),
        labels=None if self.labels is None else self.labels[chosen],
        tags=None if self.tags is None else self.tags[chosen],
        names=None if self.names is None else [self.names[i] for i in chosen],
        fingerprint=f'{self.fingerprint}/{why}')

  def split(self, share: float) -> tuple['Images', 'Images']:
    """(training images, held-out images); the latter have the lowest hashes of their names.

    The choice does not depend on the seed, and barely changes when images are added later.
    """
    name = (lambda i: str(i)) if self.names is None else self.names.__getitem__
    hashes = [hashlib.sha256(name(i).encode('utf8', 'surrogateescape')).digest()
              for i in range(len(self))]
    order = sorted(range(len(self)), key=hashes.__getitem__)
    count = max(1, round(share * len(self)))
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    return self.subset(rest, f'without {share:g}'), self.subset(held_out, f'{share:g} held out')


def _why(error):
  """Why an image could not be read, as the rest of a sentence."""
  if isinstance(error, OSError):
    return f'cannot be read ({errors.reason(error)})'
  return str(error)


@dataclasses.dataclass(frozen=True)
class _At:
  """A part of a sequence."""
  files: Any
  chosen: np.ndarray

  def __len__(self):
    return len(self.chosen)

  def __getitem__(self, i):
    return self.files[self.chosen[i]]

  def size(self, i):
    return self.files.size(self.chosen[i])

  def stamp(self):
    return self.files.stamp() if hasattr(self.files, 'stamp') else ''
