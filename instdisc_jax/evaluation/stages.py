"""Features of every stage of an encoder, for the linear protocols: computed once, kept on disk."""

import hashlib
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from instdisc_jax.evaluation import features
from instdisc_jax.models import layers

NAMES = ('conv1', 'conv2', 'conv3', 'conv4', 'conv5', 'pooled')
EMBEDDING = 'embedding'
_NUMBERS = 9600  # most of a stage, which is averaged down to so many (Zhang et al., 2016)


def collect(model, source, folder, names=(*NAMES, EMBEDDING)):
  """The features of all pictures.

  Args:
    model: `inference.Model`.
    source: `data.Pictures`.
    folder: where they are kept, below a name for weights and pictures; those of other weights are
      removed from there.
    names: the stages that are wanted.

  Returns:
    {stage: [n, F] float32, read from disk as needed}, for those of `names` that the encoder has.

  Raises:
    errors.UserError: a picture can't be read.
  """
  weights, pictures = model.digest()[:16], hashlib.sha256(source.identity().encode()).hexdigest()
  place = folder / f'{weights}-{pictures[:16]}'
  for other in folder.glob('*'):
    if not other.name.startswith(f'{weights}-'):
      shutil.rmtree(other, ignore_errors=True)
  found, missing = {}, []
  for name in names:
    try:
      found[name] = np.load(place / f'{name}.npy', mmap_mode='r')
    except (OSError, ValueError):  # not there, or cut short
      missing.append(name)
  if missing:
    found |= _write(model, source, place, missing)
  return {name: found[name] for name in names if name in found}


def _write(model, source, place, names):
  """Computes and keeps what is missing; several processes may do so at once."""
  place.mkdir(parents=True, exist_ok=True)
  partial = lambda name: place / f'{name}.{os.getpid()}.partial.npy'
  encode, arrays, done = _encode_jitted(model, names), {}, 0
  try:
    for views in model.views_of(source):
      for name, values in jax.device_get(encode(*model.variables, np.stack(views))).items():
        if name not in arrays:
          arrays[name] = np.lib.format.open_memmap(
              partial(name), 'w+', np.float32, (len(source), values.shape[1]))
        arrays[name][done:done + len(values)] = values
      done += len(views)
    for name, array in arrays.items():
      array.flush()
      os.replace(partial(name), place / f'{name}.npy')
  finally:
    for name in arrays:
      partial(name).unlink(missing_ok=True)
  return {name: np.load(place / f'{name}.npy', mmap_mode='r') for name in arrays}


def _encode_jitted(model, names):
  """(params, batch_stats, images [n, H, W, 3] in uint8) -> {stage: [n, F]}."""
  @jax.jit
  def encode(params, batch_stats, images):
    size = model.config.augment.size
    x = features.prepare(images, model.config.augment.mean, model.config.augment.std,
                         None if size is None else (size, size))
    embedding, shown = model.encoder.apply(
        {'params': params, 'batch_stats': batch_stats}, x, train=False, mutable=['stages'])
    flat = {name: _pool(shown['stages'][f'{name}_output']) for name in NAMES
            if name in names and f'{name}_output' in shown['stages']}
    return flat | ({EMBEDDING: embedding} if EMBEDDING in names else {})

  return encode


def _pool(x):
  """[n, H, W, C] -> [n, s·s·C] with the largest s that `_NUMBERS` allows; [n, C] as it is."""
  if x.ndim == 4:
    side = min(x.shape[1], max(1, math.isqrt(_NUMBERS // x.shape[3])))
    x = layers.average_to(x, side)
  return x.reshape(x.shape[0], -1).astype(jnp.float32)
