"""Features of every stage of an encoder, for the linear protocols: computed once, kept on disk."""

import hashlib
import json
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
    folder: where they are kept; weights, pictures and stages decide the names there.
    names: the stages that are wanted.

  Returns:
    {stage: [n, F] float32, read from disk as needed}, for those of `names` that the encoder has.

  Raises:
    errors.UserError: a picture can't be read.
  """
  what = f'{model.digest()} {source.fingerprint} {" ".join(names)}'
  key = hashlib.sha256(what.encode()).hexdigest()[:16]
  place = folder / key
  if not place.exists():
    partial = folder / f'{key}.partial'
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(model, source, partial, names)
    os.replace(partial, place)
  shapes = json.loads((place / 'shapes.json').read_text())
  return {name: np.memmap(place / f'{name}.float32', np.float32, 'r', shape=tuple(shape))
          for name, shape in shapes.items()}


def _write(model, source, place, names):
  files, shapes, encode = {}, {}, _encode_jitted(model, names)
  for views in model.views_of(source):
    for name, values in jax.device_get(encode(*model.variables, np.stack(views))).items():
      if name not in files:
        files[name] = (place / f'{name}.float32').open('wb')
        shapes[name] = [len(source), values.shape[1]]
      files[name].write(np.ascontiguousarray(values, np.float32).tobytes())
  for file in files.values():
    file.close()
  (place / 'shapes.json').write_text(json.dumps(shapes))


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
