"""Pictures in a stable order.

The position of a picture in its source, 0..N-1, is its index and its row in the memory bank.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np
from rich import console as rich_console
from rich import progress as rich_progress

from instdisc_jax import errors
from instdisc_jax.data import decode


@dataclasses.dataclass(frozen=True)
class Pictures:
  """N pictures, read one at a time.

  Attributes:
    files: files[i] is picture i: uint8 [H, W, 3], or the bytes of its file.
    labels: [N] int32, or None.
    fingerprint: of the source; a bank is only ever used with the data it was made of.
    names: what picture i is called, e.g. its path; or None.
    shape: (H, W, 3) where all are known to be of one size, else None.
  """
  files: Any
  labels: np.ndarray | None
  fingerprint: str
  names: Any = None
  shape: tuple[int, int, int] | None = None

  def __len__(self):
    return len(self.files)

  def identity(self):
    """The fingerprint, and of files on disk also where they lie and when they were last changed."""
    return self.fingerprint + (f' {self.files.stamp()}' if hasattr(self.files, 'stamp') else '')

  def name(self, i):
    """What to call picture i in a message."""
    return f'picture {i} (counted from 0)' if self.names is None else f"'{self.names[i]}'"

  def view(self, i, draw_box, side):
    """[side, side, 3] uint8 of picture i, see `decode.view`; raises `errors.UserError`."""
    try:
      return decode.view(self.files[i], draw_box, side)
    except (OSError, decode.UnreadableError) as e:
      raise unreadable(self, i, e) from e

  def centre(self, i, side):
    """The view of picture i that evaluation uses, see `decode.centre_box`."""
    return self.view(i, lambda height, width: decode.centre_box(height, width, side), side)

  def whole(self):
    """All pictures as one array [N, H, W, 3] uint8; raises `errors.UserError`."""
    if isinstance(self.files, np.ndarray):
      return self.files
    images = None
    for i in range(len(self)):
      try:
        picture = decode.decode(self.files[i])
      except (OSError, decode.UnreadableError) as e:
        raise unreadable(self, i, e) from e
      if images is None:
        images = np.empty((len(self), *picture.shape), np.uint8)
      if picture.shape != images.shape[1:]:
        raise errors.UserError(
            f'{self.name(i)} has {picture.shape[0]} x {picture.shape[1]} pixels, must have '
            f'{images.shape[1]} x {images.shape[2]} like the others to be kept on the device: set '
            '--config.dataset.path=stream')
      images[i] = picture
    return images

  def subset(self, chosen, why):
    """The pictures at the positions `chosen`, in that order; `why` joins the fingerprint."""
    return dataclasses.replace(
        self,
        files=self.files[chosen] if isinstance(self.files, np.ndarray) else _At(self.files, chosen),
        labels=None if self.labels is None else self.labels[chosen],
        names=None if self.names is None else [self.names[i] for i in chosen],
        fingerprint=f'{self.fingerprint}/{why}')

  def split(self, share):
    """(pictures to train on, pictures held out): the share with the lowest hashes of their names.

    Which ones are held out does not depend on the seed, and hardly on pictures added later.
    """
    name = (lambda i: str(i)) if self.names is None else (lambda i: self.names[i])
    hashes = [hashlib.sha256(name(i).encode('utf8', 'surrogateescape')).digest()
              for i in range(len(self))]
    order = sorted(range(len(self)), key=hashes.__getitem__)
    count = max(1, round(share * len(self)))
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    return self.subset(rest, f'without {share:g}'), self.subset(held_out, f'{share:g} held out')


def unreadable(pictures, i, error):
  """The `errors.UserError` for a picture that can't be read."""
  reason = error.strerror if isinstance(error, OSError) and error.strerror else error
  return errors.UserError(
      f'{pictures.name(i)} {reason}: remove it, or set --config.dataset.on_unreadable=skip in a '
      'new --workdir, or another --config.dataset.name')


def progress(title):
  """A bar on a terminal, nothing elsewhere."""
  console = rich_console.Console(stderr=True)
  return rich_progress.Progress(
      rich_progress.TextColumn(title), rich_progress.BarColumn(),
      rich_progress.MofNCompleteColumn(), rich_progress.TimeRemainingColumn(), console=console,
      transient=True, disable=not console.is_terminal)


@dataclasses.dataclass(frozen=True)
class _At:
  """A part of a sequence."""
  files: Any
  chosen: np.ndarray

  def __len__(self):
    return len(self.chosen)

  def __getitem__(self, i):
    return self.files[self.chosen[i]]

  def stamp(self):
    return self.files.stamp() if hasattr(self.files, 'stamp') else ''
