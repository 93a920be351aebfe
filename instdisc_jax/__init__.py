"""Instance discrimination in JAX: unsupervised image features, one class per image."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from instdisc_jax.inference import Model

__all__ = ['__version__', 'load']
__version__ = '0.1.0'


def load(workdir: 'str | os.PathLike[str]', features: 'str | None' = None) -> 'Model':
  """Opens a trained run: `instdisc_jax.load(workdir).embed(images)`; see `inference.Model`.

  Args:
    workdir: the folder or bucket of a run, or one made by `convert`, or a file of weights.
    features: what represents an image, see `inference.load`.

  Returns:
    An `inference.Model`.

  Raises:
    errors.UserError: there is no intact checkpoint.
  """
  from instdisc_jax import inference  # slow to import, and not needed by every command

  return inference.load(workdir, features)
