"""Features of every stage of an encoder, computed once and kept on disk."""

from collections.abc import Sequence
import hashlib
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from instdisc_jax.data.images import Images
from instdisc_jax.evaluation import embedding
from instdisc_jax.runtime import distributed

ALL = (*embedding.STAGES, embedding.EMBEDDING)


def collect(engine: embedding.Engine, variables: dict[str, Any], digest: str, images: Images,
            folder: pathlib.Path, names: Sequence[str] = ALL) -> dict[str, np.ndarray]:
  """The features of all images; every process must call it.

  Args:
    engine: the engine that computes them.
    variables: the encoder's variables.
    digest: the digest of the variables.
    images: `Images`.
    folder: where they are stored, in a subfolder named after the weights and images; features of
      other weights are removed.
    names: the features wanted.

  Returns:
    On the first process, {name: [n, F] float32, read from disk on demand} for those of `names` that
    the encoder has; elsewhere {}.

  Raises:
    errors.UserError: an image cannot be read.
  """
  present = engine.widths(variables, images, names)
  names = [name for name in names if name in present]
  weights, source = digest[:16], hashlib.sha256(images.identity().encode()).hexdigest()
  place, first = folder / f'{weights}-{source[:16]}', jax.process_index() == 0
  if first:
    for other in folder.glob('*'):
      if not other.name.startswith(f'{weights}-'):
        shutil.rmtree(other, ignore_errors=True)
  found = {name: _load(place, name) for name in names} if first else {}
  missing = [name for i, name in enumerate(names)
             if distributed.agree(np.array(first and found[name] is None))]
  if missing:
    found |= _write(engine.run(variables, images, missing), len(images), place if first else None)
  return {name: array for name in names if (array := found.get(name)) is not None}


def _load(place, name):
  """An array on disk, or None if it is missing or truncated."""
  try:
    return np.load(place / f'{name}.npy', mmap_mode='r')
  except (OSError, ValueError):
    return None


def _write(parts, count, place):
  """Writes the computed features to a folder and loads them; several runs may do so at once.

  Without a place, it only takes part in the computation.
  """
  if place is None:
    for _ in parts:
      pass
    return {}
  place.mkdir(parents=True, exist_ok=True)
  partial = lambda name: place / f'{name}.{os.getpid()}.partial.npy'
  arrays, done = {}, 0
  try:
    for part in parts:
      for name, values in part.items():
        if name not in arrays:
          arrays[name] = np.lib.format.open_memmap(partial(name), 'w+', np.float32,
                                                   (count, values.shape[1]))
        arrays[name][done:done + len(values)] = values
      done += len(next(iter(part.values()), ()))
    for name, array in arrays.items():
      array.flush()
      os.replace(partial(name), place / f'{name}.npy')
  finally:
    for name in arrays:
      partial(name).unlink(missing_ok=True)
  return {name: np.load(place / f'{name}.npy', mmap_mode='r') for name in arrays}
