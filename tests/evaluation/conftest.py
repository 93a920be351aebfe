"""The small run, and its features at every stage of the encoder."""

import shutil

import pytest

from instdisc_jax import inference
from instdisc_jax.evaluation import protocols


@pytest.fixture(scope='session')
def workdir(trained, tmp_path_factory):
  """A copy of the small trained run, since the evaluation writes into its folder."""
  folder = tmp_path_factory.mktemp('evaluated') / 'run'
  shutil.copytree(trained[0], folder)
  return folder


@pytest.fixture(scope='session')
def sets(workdir):
  """What all protocols need of it."""
  return protocols.prepare(inference.load(workdir), workdir / 'features',
                           list(protocols.PROTOCOLS))
