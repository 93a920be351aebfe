"""Safe reading of untrusted weight files: nothing in them is executed.

Reading .pth needs PyTorch (`pip install 'instdisc_jax[torch]'`), which is imported only then.
"""

import importlib
import os
import pathlib
import pickle
import re
import types
from typing import Any
import warnings
import zipfile

from instdisc_jax.runtime import errors

__all__ = ['import_optional', 'read_file', 'read_metadata']

_PACKAGES = {'torch': ('PyTorch', '[torch]'), 'safetensors': ('safetensors', '[torch]'),
             'safetensors.numpy': ('safetensors', '[torch]'), 'onnx': ('onnx', '[onnx]'),
             **dict.fromkeys(('torchvision.models.detection', 'torchvision.models.resnet',
                              'torchvision.ops'), ('torchvision', '[detection]')),
             **dict.fromkeys(('pycocotools.coco', 'pycocotools.cocoeval'),
                             ('pycocotools', '[detection]'))}

_STUBS = {'lib.NCEAverage.NCEAverage', 'lib.LinearAverage.LinearAverage',
          'lib.alias_multinomial.AliasMethod',
          'torch.nn.backends.thnn._get_thnn_function_backend'}  # in modules of PyTorch before 1.2
_CONTAINERS = {'collections.OrderedDict', 'builtins.set', '__builtin__.set', 'torch.Size',
               'torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2',
               'torch._utils._rebuild_parameter'}


class _Stub:
  """Stands in for a class of the published code; keeps the attributes, runs no code."""
  dump_patches = False  # read by PyTorch's loader of the legacy format


class _Unpickler(pickle.Unpickler):
  """Admits only tensors, containers and the stub; PyTorch reads all its formats with it.

  (torch.load's own `weights_only` rejects modules that were pickled as objects in the legacy
  format, and the published checkpoints hold such modules.)
  """

  def find_class(self, module, name):
    full_name = f'{module}.{name}'
    if full_name in _STUBS:
      return _Stub
    if full_name in _CONTAINERS or re.fullmatch(r'torch(\.cuda)?\.[A-Za-z]+Storage', full_name):
      return super().find_class(module, name)
    raise errors.UserError(f'it asks for {full_name}, which is not a tensor, a container or the '
                           'published bank; nothing was executed')


_RESTRICTED_PICKLE = types.SimpleNamespace(
    __name__='restricted', Unpickler=_Unpickler, UnpicklingError=pickle.UnpicklingError,
    load=lambda file, **kwargs: _Unpickler(file, **kwargs).load())


def read_file(file: str | os.PathLike[str]) -> Any:
  """Tensors and containers of a .pth (legacy or zip) or .safetensors file; executes nothing.

  Args:
    file: a path.

  Returns:
    The saved object: nested dicts and lists, with NumPy arrays for tensors.

  Raises:
    errors.UserError: there is no such file, it has another format, or it holds anything but
      tensors, containers and the published bank object, which is then named.
  """
  if not os.path.isfile(file):
    raise errors.UserError(f"no file '{file}'", remedy='set <--from> to a checkpoint',
                           setting='--from')
  if pathlib.Path(file).suffix == '.safetensors':
    safetensors = import_optional('safetensors.numpy', '--from')
    try:
      return safetensors.load_file(file)
    except Exception as e:  # the library has its own errors
      raise errors.UserError(f"'{file}' is not a safetensors file ({errors.one_line(e)})",
                             remedy='set <--from> to one', setting='--from') from e
  torch = import_optional('torch', '--from')
  try:
    if zipfile.is_zipfile(file) and any(
        name.endswith('/constants.pkl') for name in zipfile.ZipFile(file).namelist()):
      raise errors.UserError('it is a TorchScript program')
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # the source of the stub differs from that of the class
      return _to_numpy(torch.load(file, map_location='cpu', weights_only=False,
                                  pickle_module=_RESTRICTED_PICKLE), torch)
  except Exception as e:  # whatever a broken or hostile file makes PyTorch raise
    why = errors.one_line(e) or type(e).__name__
    raise errors.UserError(f"'{file}' cannot be read as a checkpoint ({why[:200]})",
                           remedy='set <--from> to a file of weights', setting='--from') from e


def read_metadata(file: str | os.PathLike[str]) -> dict[str, str]:
  """The text that a .safetensors file keeps beside its tensors; {} for other files."""
  if pathlib.Path(file).suffix != '.safetensors':
    return {}
  with import_optional('safetensors', '--from').safe_open(file, 'np') as content:
    return content.metadata() or {}


def import_optional(module: str, argument: str, what: str = 'this file') -> Any:
  """Imports a module that few commands need.

  Args:
    module: one of `_PACKAGES`.
    argument: the argument that asked for it, e.g. '--from'.
    what: what needs it.

  Raises:
    errors.UserError: it is not installed.
  """
  try:
    return importlib.import_module(module)
  except (ImportError, RuntimeError) as e:  # the latter: built for another version of another one
    package, extra = _PACKAGES[module]
    raise errors.UserError(f'{what} needs {package}, which is not installed'
                           + (f', or not for this PyTorch ({errors.one_line(e)[:80]})'
                              if isinstance(e, RuntimeError) else ''),
                           remedy=f"pip install 'instdisc_jax{extra}'", setting=argument) from e


def _to_numpy(tree, torch):
  """The same containers with arrays in place of tensors; a stub becomes its attributes."""
  if isinstance(tree, torch.Tensor):
    tree = tree.detach()
    return (tree.float() if tree.dtype == torch.bfloat16 else tree).numpy()
  if isinstance(tree, _Stub):
    tree = vars(tree)
  if isinstance(tree, dict):
    return {key: _to_numpy(value, torch) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [_to_numpy(value, torch) for value in tree]
  return tree
