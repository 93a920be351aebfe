"""Instance discrimination in JAX: unsupervised image features, one class per image."""

__version__ = '0.0.1'
