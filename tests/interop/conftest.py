"""PyTorch, and objects of the published code as its checkpoints hold them."""

import importlib
import shutil
import sys

import pytest

BANK_MODULE = """
import torch

class AliasMethod(object):
  def __init__(self, n):
    self.prob, self.alias = torch.ones(n), torch.zeros(n, dtype=torch.long)

class Bank(torch.nn.Module):
  def __init__(self, memory, params):
    super().__init__()
    self.multinomial = AliasMethod(len(memory))
    self.unigrams = torch.ones(len(memory))
    self.register_buffer('params', torch.tensor(params))
    self.register_buffer('memory', torch.as_tensor(memory))
"""


@pytest.fixture
def torch():
  return pytest.importorskip('torch', reason='reads and writes .pth, which needs PyTorch')


@pytest.fixture
def make_bank(tmp_path, monkeypatch, torch):
  """(memory, params) -> an object of the published class, pickled as an object, with its source."""
  (tmp_path / 'lib').mkdir()
  (tmp_path / 'lib' / '__init__.py').touch()
  for module, name in (('NCEAverage', 'NCEAverage'), ('LinearAverage', 'LinearAverage')):
    source = BANK_MODULE.replace('Bank', name)
    (tmp_path / 'lib' / f'{module}.py').write_text(source.replace(
        'class AliasMethod', 'from lib.alias_multinomial import AliasMethod\nclass Unused'))
  (tmp_path / 'lib' / 'alias_multinomial.py').write_text(BANK_MODULE.split('class Bank')[0])
  monkeypatch.syspath_prepend(str(tmp_path))

  def make(memory, params):
    name = 'NCEAverage' if len(params) == 4 else 'LinearAverage'
    return getattr(importlib.import_module(f'lib.{name}'), name)(memory, params)

  yield make
  _unload()


def forget_published_classes():
  _unload()
  shutil.rmtree(sys.path[0] + '/lib')


def _unload():
  for name in [name for name in sys.modules if name.split('.')[0] == 'lib']:
    del sys.modules[name]
