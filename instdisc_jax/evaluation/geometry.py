"""Distribution of the embeddings on the sphere, and staleness of the memory bank."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int
import numpy as np

from instdisc_jax import bank as bank_lib
from instdisc_jax.runtime.mesh import AXIS

_SAMPLE = 1024  # rows of the bank that are looked at during training
_PAIRS = 4096  # maximum number of images for uniformity; beyond it, a seeded sample


def alignment(first: Float[np.ndarray, 'N D'], second: Float[np.ndarray, 'N D']) -> float:
  """Mean squared distance between two views' embeddings (Wang and Isola, 2020, Eq. 1, α = 2).

  Args:
    first: [N, D] unit-norm embeddings of one view of each image.
    second: [N, D] unit-norm embeddings of another view.

  Returns:
    A float from 0 (the embeddings of the views are identical) to 4.
  """
  return float(np.mean(np.sum((first - second)**2, axis=1)))


def class_alignment(embedding: Float[np.ndarray, 'N D'],
                    labels: Int[np.ndarray, ' N']) -> float | None:
  """Mean squared distance over all pairs of images of a class, averaged over the classes.

  Args:
    embedding: [N, D] unit-norm.
    labels: [N] int.

  Returns:
    A float from 0 to 4, or None if no class has two images.
  """
  means = []
  for c in np.unique(labels):
    x = np.asarray(embedding[labels == c], np.float64)
    if len(x) > 1:  # the squared norm of a sum is the sum over all pairs, self-pairs included
      cosine = (np.sum(x.sum(axis=0)**2) - np.sum(x**2)) / (len(x) * (len(x) - 1))
      means.append(2 - 2 * cosine)
  return float(np.mean(means)) if means else None


def uniformity(embedding: Float[np.ndarray, 'N D'], seed: int = 0) -> float:
  """Log of the mean Gaussian potential of all pairs (Wang and Isola, 2020, Eq. 2, t = 2).

  Args:
    embedding: [N, D] unit-norm; if N is above 4,096, a sample is used.
    seed: of the sample.

  Returns:
    A float: 0 if all embeddings are identical, lower the more they spread out.
  """
  if len(embedding) > _PAIRS:
    embedding = embedding[np.random.RandomState(seed).permutation(len(embedding))[:_PAIRS]]
  return float(_uniformity(jnp.asarray(embedding)))


@jax.jit
def _uniformity(x):
  n = x.shape[0]
  squared = jnp.maximum(2 - 2 * jnp.matmul(x, x.T, precision='highest'), 0)
  potential = jnp.where(jnp.eye(n, dtype=bool), 0, jnp.exp(-2 * squared))
  return jnp.log(potential.sum() / (n * (n - 1)))


def effective_rank(embedding: Float[np.ndarray, 'N D']) -> float:
  """exp of the entropy of the normalized singular values (Roy and Vetterli, 2007).

  Args:
    embedding: [N, D].

  Returns:
    A float from 1 to min(N, D).
  """
  share = np.linalg.svd(embedding, compute_uv=False)
  share = share[share > 0] / share.sum()
  return float(np.exp(-np.sum(share * np.log(share))))


def of_bank(mesh: jax.sharding.Mesh, num_rows: int) -> Any:
  """`uniformity` and `effective_rank` of up to 1,024 rows, evenly spaced, on the devices.

  Args:
    mesh: the device mesh.
    num_rows: N.

  Returns:
    A jitted (sharded bank) -> (uniformity, effective rank).
  """
  chosen = np.linspace(0, num_rows - 1, min(_SAMPLE, num_rows)).round().astype(np.int32)

  def device_part(bank):
    local, owned = bank_lib.locate(bank, jnp.asarray(chosen), AXIS)
    rows = jnp.where(owned[:, None], bank[local].astype(jnp.float32), 0)
    rows = bank_lib.normalize(lax.psum(rows, AXIS))
    gram = jnp.matmul(rows.T, rows, precision='highest')
    squared = jnp.linalg.eigvalsh(gram)  # of the singular values; the root would magnify rounding
    rounding = len(squared) * jnp.finfo(squared.dtype).eps * squared.max()
    share = jnp.sqrt(jnp.where(squared > rounding, squared, 0))
    share /= share.sum()
    return _uniformity(rows), jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))

  return jax.jit(jax.shard_map(device_part, mesh=mesh, in_specs=P(AXIS), out_specs=P()))


def staleness(bank: Float[np.ndarray, 'N D'], embedding: Float[np.ndarray, 'N D']) -> float:
  """1 - mean cosine between an image's row in the bank and its fresh embedding.

  Args:
    bank: [N, D] unit-norm rows.
    embedding: [N, D] unit-norm, of the same images.

  Returns:
    A float from 0 (the bank is up to date) to 2.
  """
  return float(1 - np.mean(np.sum(bank * embedding, axis=1)))
