"""A map of embeddings: a projection to two dimensions that keeps neighbors together.

UMAP if it is installed (`pip install umap-learn`), else scikit-learn's t-SNE, or for many images
the two largest principal components.
"""

import hashlib
import importlib
import importlib.util
import io
import pathlib
from typing import Any

from jaxtyping import Float
import numpy as np
from sklearn import decomposition, manifold
import threadpoolctl

from instdisc_jax.runtime import files

_FEW = 10  # rows up to which principal components are all there is to see
_MOST_TSNE = 10_000  # rows, minutes of work
_DIMENSIONS = 50  # that t-SNE starts from


def project_once(embedding: Float[np.ndarray, 'N D'], seed: int,
                 folder: pathlib.Path | None) -> Float[np.ndarray, 'N 2']:
  """`project`, whose result is kept in a folder for the next call with the same arguments.

  Args:
    embedding: [N, D] unit-norm.
    seed: of the random numbers.
    folder: where it is kept; created if needed. None: nowhere.
  """
  if folder is None:
    return project(embedding, seed)
  identity = hashlib.sha256(f'{seed} {_has_umap()} {embedding.shape}'.encode())
  identity.update(np.asarray(embedding, np.float32).tobytes())
  file = folder / f'{identity.hexdigest()[:16]}.npy'
  try:
    return np.load(file)
  except (OSError, ValueError):
    place = project(embedding, seed)
  folder.mkdir(parents=True, exist_ok=True)
  content = io.BytesIO()
  np.save(content, place)
  files.write(file, content.getvalue())
  return place


def project(embedding: Float[np.ndarray, 'N D'], seed: int = 0) -> Float[np.ndarray, 'N 2']:
  """[N, 2] float32 positions, centered, with a standard deviation of 1 in the wider direction.

  Args:
    embedding: [N, D] unit-norm.
    seed: of the random numbers.
  """
  count = len(embedding)
  if (embedding == embedding[:1]).all():
    return np.zeros((count, 2), np.float32)
  if count <= _FEW:
    place = _components(embedding, 2, seed)
  elif _has_umap():
    umap: Any = importlib.import_module('umap')
    place = umap.UMAP(metric='cosine', random_state=seed, n_jobs=1,
                      n_neighbors=min(15, count - 1)).fit_transform(embedding)
  elif count <= _MOST_TSNE:
    with threadpoolctl.threadpool_limits(1):  # more wait for each other, minutes on a busy machine
      place = manifold.TSNE(perplexity=min(30.0, (count - 1) / 3), random_state=seed,
                            init='pca').fit_transform(_components(embedding, _DIMENSIONS, seed))
  else:
    place = _components(embedding, 2, seed)
  place = np.asarray(place, np.float32)
  place -= place.mean(axis=0)
  return place / max(float(place.std(axis=0).max()), 1e-12)


def _has_umap():
  return importlib.util.find_spec('umap') is not None


def _components(embedding, most, seed):
  """[N, c] principal components, c at most `most`; zeros where there are fewer than two."""
  count = min(most, *embedding.shape)
  found = decomposition.PCA(count, random_state=seed).fit_transform(embedding)
  return np.pad(found, ((0, 0), (0, max(0, 2 - count))))
