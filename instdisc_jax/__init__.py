"""Instance discrimination in JAX: unsupervised image features, one class per image."""

__version__ = '0.1.0'


def load(workdir):
  """Opens a trained workdir: `instdisc_jax.load(workdir).embed(images)`; see `inference.Model`."""
  from instdisc_jax import inference  # slow to import, which `python -m instdisc_jax...` need not

  return inference.load(workdir)
