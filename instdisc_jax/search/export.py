"""Export of a folder's embeddings to a file, written in parts so that a stopped export can resume.

Until the file is complete, its parts are in a folder beside it:

    identity.json      the weights and images that they belong to
    0.npy, 1.npy, ...  [1024, D] each, the last one shorter
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
from jaxtyping import Float
import numpy as np

from instdisc_jax import inference
from instdisc_jax.data import folder
from instdisc_jax.data import images as images_lib
from instdisc_jax.runtime import distributed, errors, metrics, preemption
from instdisc_jax.search import formats, labeling

PART = 1024  # images per part, whatever the number of devices: a resume may use another


def write(model: inference.Model, images: str, output: pathlib.Path, watch: preemption.Watch,
          on_unreadable: str = 'error',
          predictions: Mapping[str, tuple[str, float]] | None = None) -> int:
  """Writes the embeddings of all images of a folder.

  All processes compute embeddings; the first one writes them. Another call with the same weights
  and images computes only the missing parts.

  Args:
    model: a trained run.
    images: the folder.
    output: the file to write, see `formats`; 'index' is the bank row of an image that the run was
      trained on, else -1.
    watch: checked after each chunk, in all processes.
    on_unreadable: see `folder.load`.
    predictions: of some of the images, see `labeling.read_predictions`.

  Returns:
    The number of images.

  Raises:
    errors.UserError: there are no images, one cannot be read, the output cannot be written, or the
      predictions are of other images.
    errors.Stopped: stopped by a signal; completed parts are kept.
  """
  source, class_names, listing = folder.load(images, on_unreadable, setting='--images')
  _check_same(source, images)
  if predictions is not None:
    labeling.check_names(predictions, source.names)
  index = model.rows_of(source, listing['files'])
  parts = _Parts(output, {'weights': model.digest(), 'features': model.features,
                          'images': source.identity(), 'part': PART})
  _on_first(output, parts.open)
  done = parts.count() if jax.process_index() == 0 else 0
  first = min(int(distributed.agree(done)) * PART, len(source))
  if first < len(source):
    _embed(model, source, first, watch,
           lambda part, embedding: _on_first(output, lambda: parts.write(part, embedding)))
  label = (None if source.labels is None or class_names is None
           else [class_names[i] for i in source.labels])

  def combine():
    found = formats.Embedded(np.array(source.names), parts.read(), index, label, predictions or {})
    formats.write(output, found, parts.folder, model.maps)
    parts.remove()

  _on_first(output, combine)
  return len(source)


def _check_same(source, images):
  """All processes must see the same images, or they would wait for each other forever."""
  if not distributed.same(source.fingerprint):
    raise errors.UserError(f"'{images}' does not hold the same images for all processes",
                           remedy='set <--images> to a folder that they share', setting='--images')


def _embed(model, source, first, watch, write_part: Callable[[int, np.ndarray], None]) -> None:
  """Embeds the images from `first` on and passes the embeddings on in parts."""
  waiting, number = None, first // PART
  with metrics.progress_bar('embedding') as progress:
    task = progress.add_task('embedding', total=len(source), completed=first)
    try:
      for chunk in model.embed_all(source, first):
        waiting = chunk if waiting is None else np.concatenate([waiting, chunk])
        while len(waiting) >= PART:
          write_part(number, waiting[:PART])
          waiting, number = waiting[PART:], number + 1
        progress.advance(task, len(chunk))
        watch.check()
    except images_lib.UnreadableImage as e:
      raise e.with_remedy('remove it, or set <--on_unreadable>=skip, or <--images>') from e
  if waiting is not None and len(waiting):
    write_part(number, waiting)


def _on_first(output, action):
  """Runs `action()` on the first process; raises `errors.UserError` if it cannot write."""
  def guarded():
    try:
      action()
    except OSError as e:
      raise errors.cannot_write(output, e, '--output') from e

  distributed.first_only(guarded)


@dataclasses.dataclass(frozen=True)
class _Parts:
  """The parts of a file, in a folder beside it.

  Attributes:
    output: the file.
    identity: the weights and images that the parts belong to.
  """
  output: pathlib.Path
  identity: dict[str, Any]

  @property
  def folder(self) -> pathlib.Path:
    return self.output.with_name(self.output.name + '.partial')

  def open(self) -> None:
    """Creates the folder, or keeps it if its parts belong to the same embeddings."""
    file = self.folder / 'identity.json'
    try:
      same = json.loads(file.read_text()) == self.identity
    except (OSError, ValueError):
      same = False
    if same:
      return
    if self.folder.exists() and any(self.folder.iterdir()) and not file.exists():
      raise errors.UserError(f"'{self.folder}' is in the way, and not of this command",
                             remedy='move it, or set <--output> to another place',
                             setting='--output')
    shutil.rmtree(self.folder, ignore_errors=True)
    self.folder.mkdir()
    file.write_text(json.dumps(self.identity))

  def count(self) -> int:
    """The number of parts up to the first gap."""
    done = 0
    while self._part(done).exists():
      done += 1
    return done

  def write(self, number: int, embedding: Float[np.ndarray, 'n D']) -> None:
    """Writes a part completely or not at all."""
    partial = self.folder / 'part.partial.npy'
    np.save(partial, embedding)
    os.replace(partial, self._part(number))

  def read(self) -> Float[np.ndarray, 'N D']:
    """All embeddings."""
    return np.concatenate([np.load(self._part(i)) for i in range(self.count())])

  def remove(self) -> None:
    """Removes the folder."""
    shutil.rmtree(self.folder)

  def _part(self, number):
    return self.folder / f'{number}.npy'
