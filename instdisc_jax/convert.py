"""Weights in from PyTorch checkpoints, and out to them.

    python -m instdisc_jax.convert --from=FILE --workdir=DIR     a checkpoint becomes a workdir
    python -m instdisc_jax.convert --workdir=DIR --to=FILE       a workdir's encoder becomes a file

Modules of the encoders are named and numbered as in PyTorch, so most names follow by rule:

    params/layer1_0/conv1/kernel [k, k, C, O]     layer1.0.conv1.weight [O, C, k, k]
    params/layer1_0/bn1/scale                     layer1.0.bn1.weight
    batch_stats/layer1_0/bn1/var                  layer1.0.bn1.running_var

Reading or writing .pth needs PyTorch (`pip install '.[torch]'`); nothing else does.
"""

import argparse
import contextlib
import functools
import logging
import math
import os
import pathlib
import pickle
import re
import shutil
import sys
import types
import warnings
import zipfile

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from instdisc_jax import checkpoint, errors, files, models, train
from instdisc_jax import config as config_lib
from instdisc_jax import workdir as workdir_lib
from instdisc_jax.models import alexnet, vgg

_MODULES = {'downsample_conv': 'downsample.0', 'downsample_bn': 'downsample.1'}
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean',
           'var': 'running_var'}
_COUNTER = 'num_batches_tracked'  # PyTorch's count of train-mode passes, which nothing reads
_POOLED = {'alexnet': alexnet.POOLED, 'vgg16': vgg.POOLED, 'vgg16_bn': vgg.POOLED}
_IMAGENET_CLASSES = 1000
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def from_torch(state_dict, model_name):
  """PyTorch's state dict of an encoder -> its variables here.

  Args:
    state_dict: key -> array, with or without the prefix 'module.' and the `num_batches_tracked`
      entries; shortcuts may be called 'downsample' or 'shortcut', the head 'fc' or 'linear'.
    model_name: one of `models.NAMES`. Width and embedding size are read from the weights.

  Returns:
    {'params', 'batch_stats'}, NumPy arrays of the given dtypes.

  Raises:
    errors.UserError: a key is missing, left over, or of another shape; it is named.
  """
  given = {_canonical(key): (key, np.asarray(value)) for key, value in state_dict.items()
           if not key.endswith(_COUNTER)}
  stem = next(iter(_layout(model_name, 2, 2)))
  width = _width(model_name, _require(given, stem, 4).shape[0])
  layout = _layout(model_name, _require(given, 'fc.weight', 2).shape[0], width)
  for key in given.keys() - layout.keys():
    raise errors.UserError(f"'{given[key][0]}' is no weight of {model_name}: remove it, or give "
                           'the name of another model')
  flat = {}
  for key, (path, shape) in layout.items():
    value = _require(given, key, len(shape))
    linen = _to_linen(path, value, model_name) if value.size == np.prod(shape) else value.T
    if linen.shape != shape:
      wanted = _to_torch(path, np.broadcast_to(np.float32(0), shape), model_name).shape
      raise errors.UserError(f"'{given[key][0]}' has shape {value.shape}, must be {wanted} in "
                             f'{model_name} of width {width}')
    flat[path] = np.ascontiguousarray(linen)
  return {'params': {}, 'batch_stats': {}} | traverse_util.unflatten_dict(flat)


def to_torch(variables, model_name):
  """Variables of an encoder -> PyTorch's state dict in the published layout, in its order.

  Args:
    variables: {'params', 'batch_stats'}.
    model_name: one of `models.NAMES`.

  Returns:
    key -> NumPy array. CIFAR nets call their shortcuts 'shortcut' and their head 'linear', as
    published; `num_batches_tracked` is 0 throughout.
  """
  renamed = lambda key: key
  if model_name.endswith('_cifar'):
    renamed = lambda key: key.replace('downsample.', 'shortcut.').replace('fc.', 'linear.')
  return {renamed(key): value for key, value in to_torchvision(variables, model_name).items()}


def to_torchvision(variables, model_name):
  """As `to_torch`, with torchvision's names for every encoder."""
  flat = {path: np.asarray(value)
          for path, value in traverse_util.flatten_dict(variables).items()}
  stem, _ = next(iter(_layout(model_name, 2, 2).values()))
  width = _width(model_name, flat[stem].shape[-1])
  state_dict = {}
  for key, (path, _) in _layout(model_name, flat['params', 'fc', 'bias'].size, width).items():
    state_dict[key] = np.ascontiguousarray(_to_torch(path, flat[path], model_name))
    if path[-1] == 'var':
      state_dict[key.replace('running_var', _COUNTER)] = np.zeros((), np.int64)
  return state_dict


def _width(model_name, stem_channels):
  """AlexNet's first layer has 96 channels at width 64, all others have as many as their width."""
  return round(stem_channels * 64 / 96) if model_name == 'alexnet' else stem_channels


@functools.cache
def _layout(model_name, embedding_dim, width):
  """torchvision's keys of an encoder, in its order -> (path in the variables, shape there)."""
  encoder = models.create(model_name, embedding_dim=embedding_dim, width=width)
  side = models.SMALLEST_SIDE.get(model_name, 32)
  paths = []

  def init():
    variables = encoder.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False)
    paths.extend(traverse_util.flatten_dict(variables))  # in the order of creation
    return variables

  shapes = {path: leaf.shape for path, leaf in
            traverse_util.flatten_dict(jax.eval_shape(init)).items()}
  layout = {}
  for collection, *module, leaf in paths:
    if collection != 'params':
      continue
    leaves = [(collection, leaf)]
    if leaf == 'bias' and ('batch_stats', *module, 'mean') in shapes:
      leaves += [('batch_stats', 'mean'), ('batch_stats', 'var')]
    for collection, leaf in leaves:
      path = (collection, *module, leaf)
      name = '.'.join(_MODULES.get(part, part.replace('_', '.')) for part in module)
      layout[f'{name}.{_LEAVES[leaf]}'] = path, shapes[path]
  return layout


def _to_torch(path, x, model_name):
  if path[-2:] == ('classifier_0', 'kernel'):  # its inputs are a picture, channels last here
    side = _POOLED[model_name]
    return x.reshape(side, side, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(x.shape[::-1])
  return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def _to_linen(path, x, model_name):
  if path[-2:] == ('classifier_0', 'kernel'):
    side = _POOLED[model_name]
    return x.reshape(x.shape[0], -1, side, side).transpose(2, 3, 1, 0).reshape(x.shape[::-1])
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _canonical(key):
  """Published key -> torchvision's."""
  key = key.removeprefix('module.').replace('.shortcut.', '.downsample.')
  return re.sub('^linear\\.', 'fc.', key)


def _require(given, key, rank):
  if key not in given:
    raise errors.UserError(f"'{key}' is missing from the weights")
  name, value = given[key]
  if value.ndim != rank:
    raise errors.UserError(f"'{name}' has shape {value.shape}, must have {rank} axes")
  return value


class _Stub:
  """Stands for a class of the published code in a pickle; its attributes are kept, unread."""
  dump_patches = False  # asked for by PyTorch's reader of the legacy format


_STUBS = {'lib.NCEAverage.NCEAverage', 'lib.LinearAverage.LinearAverage',
          'lib.alias_multinomial.AliasMethod',
          'torch.nn.backends.thnn._get_thnn_function_backend'}  # in modules of PyTorch before 1.2
_CONTAINERS = {'collections.OrderedDict', 'builtins.set', '__builtin__.set', 'torch.Size',
               'torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2',
               'torch._utils._rebuild_parameter'}


class _Unpickler(pickle.Unpickler):
  """Knows tensors, containers and the stub; PyTorch's readers of all its formats run on it.

  (torch.load's own `weights_only` refuses modules pickled whole in the legacy format, which is what
  the published checkpoints hold.)
  """

  def find_class(self, module, name):
    full_name = f'{module}.{name}'
    if full_name in _STUBS:
      return _Stub
    if full_name in _CONTAINERS or re.fullmatch(r'torch(\.cuda)?\.[A-Za-z]+Storage', full_name):
      return super().find_class(module, name)
    raise errors.UserError(f'it asks for {full_name}, must hold tensors, containers and the '
                           'published bank alone; nothing of it was executed')


_RESTRICTED_PICKLE = types.SimpleNamespace(
    __name__='restricted', Unpickler=_Unpickler, UnpicklingError=pickle.UnpicklingError,
    load=lambda file, **kwargs: _Unpickler(file, **kwargs).load())


def read_file(file):
  """Tensors and containers of a .pth (legacy or zip) or .safetensors file; executes nothing.

  Args:
    file: a path.

  Returns:
    What was saved, tensors as NumPy arrays.

  Raises:
    errors.UserError: not such a file, or it holds anything but tensors, containers and the
      published bank object; what it is, is named.
  """
  if not os.path.isfile(file):
    raise errors.UserError(f"no file '{file}': set --from to a checkpoint")
  if pathlib.Path(file).suffix == '.safetensors':
    with _needs('safetensors'):
      import safetensors.numpy
    try:
      return safetensors.numpy.load_file(file)
    except Exception as e:
      raise errors.UserError(f"'{file}' is no safetensors file ({e}): set --from to one") from e
  with _needs('PyTorch'):
    import torch
  try:
    if zipfile.is_zipfile(file) and any(
        name.endswith('/constants.pkl') for name in zipfile.ZipFile(file).namelist()):
      raise errors.UserError('it is a TorchScript program, must be a file of weights')
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # the stub's source is not the class's
      return _to_numpy(torch.load(file, map_location='cpu', weights_only=False,
                                  pickle_module=_RESTRICTED_PICKLE), torch)
  except Exception as e:  # whatever a broken or hostile file makes PyTorch raise
    why = errors.one_line(e) or type(e).__name__
    raise errors.UserError(f"'{file}' is no checkpoint that can be read ({why[:200]}): set --from "
                           'to a file of weights') from e


def _to_numpy(tree, torch):
  """The same containers with arrays in the place of tensors; a stub becomes its attributes."""
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


@contextlib.contextmanager
def _needs(name):
  try:
    yield
  except ImportError as e:
    raise errors.UserError(f'this file needs {name}, which is not installed: '
                           "pip install '.[torch]'") from e


# Where the encoder lies in the files of other projects: the prefix of its backbone, that of its
# head, and the layer of the head, if it has one alone, that makes the embedding.
_PREFIXES = (
    ('encoder_q.', 'encoder_q.fc.', ''),  # MoCo
    ('encoder.', 'head.', '0.'),  # PyContrast
    ('_feature_blocks.', '0.clf.', '0.'),  # VISSL
    ('backbone.', 'neck.', 'fc.'),  # MMSelfSup
    ('', 'fc.', ''),  # the published code, torchvision
)


def _find_weights(saved, file):
  """The flat state dict in a checkpoint, whatever lies around it."""
  saved = saved if isinstance(saved, dict) else {}
  for key in ('classy_state_dict', 'state_dict', 'net', 'model'):
    if isinstance(saved.get(key), dict):
      saved = saved[key]
      if key == 'classy_state_dict':
        parts = saved.get('base_model', {}).get('model', {})
        saved = {**parts.get('trunk', {}), **parts.get('heads', {})}
      break
  weights = {key: value for key, value in saved.items() if isinstance(value, np.ndarray)}
  if not weights:
    raise errors.UserError(f"'{file}' holds no weights, must hold a state dict, or one as "
                           "'state_dict', 'net', 'model' or 'classy_state_dict': set --from to "
                           'such a file')
  return {_canonical(key): value for key, value in weights.items()}


def _find_encoder(weights, file):
  """(name of the encoder, its weights, those of its head by 'weight' and 'bias' or None)."""
  backbone_prefix, head_prefix, head_layer = next(
      entry for entry in _PREFIXES if any(key.startswith(entry[0]) for key in weights))
  head = {key.removeprefix(head_prefix): value for key, value in weights.items()
          if key.startswith(head_prefix)}
  backbone = {key.removeprefix(backbone_prefix): value for key, value in weights.items()
              if key.startswith(backbone_prefix) and not key.startswith(head_prefix)
              and not key.endswith(_COUNTER)}
  found = {(key, value.shape[2:]) for key, value in backbone.items()}  # with sizes of kernels
  overlap = {}
  for name in models.NAMES:
    wanted = {(key, shape[:2] if len(shape) == 4 else ())
              for key, (_, shape) in _layout(name, 2, 2).items() if not key.startswith('fc.')}
    overlap[name] = len(found & wanted) / len(found | wanted)
  name = max(overlap, key=overlap.get)
  if overlap[name] < 0.8:  # else the keys that differ are named
    raise errors.UserError(f"'{file}' holds weights of no encoder known here "
                           f'({", ".join(list(weights)[:3])}, ...), must be of one of '
                           f'{", ".join(models.NAMES)}: set --from to such a file')
  layer = {key: head.get(f'{head_layer}{key}') for key in ('weight', 'bias')}
  usable = head.keys() == {f'{head_layer}weight', f'{head_layer}bias'} and (
      layer['weight'].ndim == 2 and len(layer['weight']) != _IMAGENET_CLASSES)
  return name, backbone, layer if usable else None


def _complete(weights, file, embedding_dim):
  """(model name, width, state dict with a head, whether that is the file's own) of an encoder."""
  name, backbone, head = _find_encoder(weights, file)
  has_head = head is not None
  stem = next(iter(_layout(name, 2, 2)))
  width = _width(name, len(backbone[stem]))
  if not has_head:
    features, embedding_dim = _layout(name, embedding_dim, width)['fc.weight'][1]
    head = _fresh_head(features, embedding_dim)
  return name, width, backbone | {f'fc.{leaf}': value for leaf, value in head.items()}, has_head


def read_encoder(file, embedding_dim):
  """The encoder of a file in any layout that is recognised.

  Args:
    file: a .pth or .safetensors file.
    embedding_dim: D of the fresh head where the file has none.

  Returns:
    (model name, width, D, {'params', 'batch_stats'} float32).

  Raises:
    errors.UserError: the file is not as it must be.
  """
  weights = _find_weights(read_file(file), file)
  name, width, state_dict, _ = _complete(weights, file, embedding_dim)
  return name, width, len(state_dict['fc.bias']), _as_float32(from_torch(state_dict, name))


def _as_float32(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def _fresh_head(features, embedding_dim):
  """Start values of the head, as the encoders draw theirs: U(±1/sqrt(features))."""
  draw = np.random.default_rng(0).uniform
  bound = features ** -0.5
  return {'weight': draw(-bound, bound, (embedding_dim, features)).astype(np.float32),
          'bias': draw(-bound, bound, embedding_dim).astype(np.float32)}


def _find_bank(saved, weights, file):
  """(bank rows [N, D] or None, the settings that its file fixes, Z or 0)."""
  if 'memory_bank.feature_bank' in weights:  # MMSelfSup
    return weights['memory_bank.feature_bank'], {}, 0.0
  bank = saved.get('lemniscate')
  if bank is None:
    return None, {}, 0.0
  buffers = bank.get('_buffers', bank) if isinstance(bank, dict) else {}
  params = buffers.get('params', ())
  if 'memory' not in buffers or len(params) not in (2, 4):
    raise errors.UserError(f"the bank 'lemniscate' in '{file}' lacks the published 'memory' and "
                           "'params': set --from to another file")
  shortest = [float(str(np.float32(x))) for x in params]  # 0.07, not 0.07000000029802322
  settings, normalizer = {'loss.name': 'softmax'}, 0.0
  if len(params) == 4:
    noise_count, shortest[0], normalizer, shortest[1] = shortest
    settings = {'loss.name': 'nce', 'loss.noise_count': int(noise_count)}
  return (buffers['memory'], settings | {'loss.temperature': shortest[0],
                                         'bank.momentum': shortest[1]}, max(normalizer, 0.0))


def _find_momentum(saved, weights):
  """{key: SGD's momentum buffer} of a published checkpoint, empty where there is none."""
  optimizer = saved.get('optimizer')
  if not isinstance(optimizer, dict):
    return {}
  trained = [key for key in weights if not re.search(f'{_COUNTER}$|running_(mean|var)$', key)]
  numbers = [number for group in optimizer['param_groups'] for number in group['params']]
  buffers = [optimizer['state'].get(number, {}).get('momentum_buffer') for number in numbers]
  if len(buffers) != len(trained) or any(buffer is None for buffer in buffers):
    return {}
  return dict(zip(trained, buffers))


def import_checkpoint(file, workdir):
  """Makes a workdir of a PyTorch checkpoint, which training and evaluation accept.

  The bank, Z, SGD's momentum and the epoch come along where the file has them; its settings are
  fixed in config.json, all others are free until the first run.

  Args:
    file: a checkpoint of the published code, or with the weights of a known encoder in the layout
      of torchvision, MoCo, PyContrast, VISSL or MMSelfSup.
    workdir: a folder that does not exist yet, or an empty one.

  Returns:
    Lines that say what was found.

  Raises:
    errors.UserError: the file or the folder is not as it must be. Nothing is left behind.
  """
  if files.in_bucket(workdir):
    raise errors.UserError(f"--workdir is '{workdir}', must be a folder here, to be copied to a "
                           'bucket: set --workdir')
  workdir = pathlib.Path(workdir).absolute()
  if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
    raise errors.UserError(f"workdir '{workdir}' exists, must be new or empty: set --workdir to "
                           'another folder')
  saved = read_file(file)
  weights = _find_weights(saved, file)
  bank, settings, normalizer = _find_bank(saved, weights, file)
  default = config_lib.default()
  name, width, state_dict, has_head = _complete(weights, file, default.model.embedding_dim)
  head_line = 'from the file'
  if not has_head:
    bank = None  # it was made by a head that is not here
    head_line = 'fresh: the file has none that is one linear layer to an embedding'
  variables = _as_float32(from_torch(state_dict, name))
  embedding_dim = len(state_dict['fc.bias'])
  if bank is not None and (bank.ndim != 2 or bank.shape[1] != embedding_dim or len(bank) < 2):
    raise errors.UserError(f"the bank in '{file}' has shape {bank.shape}, must be (N, "
                           f'{embedding_dim}) as the embedding: set --from to another file')

  cifar = name.endswith('_cifar')
  settings |= {'model.name': name, 'model.width': width, 'model.embedding_dim': embedding_dim,
               'augment.mean': list(default.augment.mean if cifar else _IMAGENET_MEAN),
               'augment.std': list(default.augment.std if cifar else _IMAGENET_STD)}
  num_rows, step = 1, 0
  if bank is not None:
    num_rows, settings['batch_size'] = len(bank), 128 if cifar else 256
    epochs = int(saved.get('epoch', 0)) + ('net' in saved)  # that program counts from 0
    step = math.ceil(epochs * num_rows / settings['batch_size'])
  optimizer = train.make_optimizer(default, num_rows)
  opt_state = optax.tree.set(optimizer.init(variables['params']), count=jnp.int32(step))
  momentum = _find_momentum(saved, weights) if not cifar else {}
  if momentum:
    momentum = from_torch(state_dict | momentum, name)['params']
    opt_state = optax.tree.set(opt_state, trace=_as_float32(momentum))
  state = train.TrainState(
      step=jnp.int32(step), **variables, opt_state=opt_state,
      bank=None if bank is None else jnp.asarray(bank, jnp.float32),
      normalizer=jnp.float32(normalizer))

  mesh = train.make_mesh(jax.devices()[:1])
  partial = workdir.with_name(workdir.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
    checkpoints = checkpoint.Checkpoints(partial / 'checkpoints', 1, num_rows, mesh)
    checkpoints.save(jax.device_put(state, train.state_shardings(mesh, state)))
    checkpoints.close()
    workdir_lib.write(partial, settings, None)
    if workdir.exists():
      workdir.rmdir()
    partial.rename(workdir)
  except OSError as e:
    raise errors.UserError(f"workdir '{workdir}' can't be written ({e.strerror}): set --workdir to "
                           'a folder that can') from e
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  lines = [f'encoder: {name}, width {width}, embedding of {embedding_dim}; head {head_line}']
  if bank is None:
    lines += ['bank: none in the file; training begins with a fresh one']
  else:
    lines += [f'bank: {num_rows:,} rows' + (f', Z = {normalizer:.1f}' if normalizer else '')
              + f'; step {step:,} of batch {settings["batch_size"]}',
              'row i must be training image i: the order is that of the PyTorch data set (sorted '
              "folders and files; torchvision's CIFAR-10), not TFDS's"]
  lines += ["optimiser: SGD's momentum " + ('from the file' if momentum else 'starts at zero')]
  return lines


def export(workdir, file, with_head=False):
  """Writes the encoder of a workdir's newest checkpoint in torchvision's layout.

  Args:
    workdir: of a run, or made from a checkpoint.
    file: NAME.pth or NAME.safetensors.
    with_head: keep the linear layer to the embedding, as 'fc'; else the backbone alone.

  Raises:
    errors.UserError: no checkpoint there, another suffix, or a file that can't be written.
  """
  file = pathlib.Path(file)
  if file.suffix not in ('.pth', '.safetensors'):
    raise errors.UserError(f"--to is '{file}', must end in .pth or .safetensors: set --to")
  settings, _ = workdir_lib.read(workdir)
  state = checkpoint.read(files.place(workdir) / 'checkpoints')
  state_dict = to_torchvision({key: state[key] for key in ('params', 'batch_stats')},
                              settings['model.name'])
  if not with_head:
    state_dict = {key: x for key, x in state_dict.items() if not key.startswith('fc.')}
  partial = file.with_name(file.name + '.partial')
  try:
    if file.suffix == '.safetensors':
      with _needs('safetensors'):
        import safetensors.numpy
      safetensors.numpy.save_file(state_dict, partial)
    else:
      with _needs('PyTorch'):
        import torch
      torch.save({key: torch.tensor(x) for key, x in state_dict.items()}, partial)
    os.replace(partial, file)
  except (OSError, RuntimeError) as e:
    partial.unlink(missing_ok=True)
    raise errors.UserError(f"'{file}' can't be written ({errors.one_line(e)}): set --to to a place "
                           'that can') from e


def main(argv=None):
  """The command; returns its exit code: 0, or 2 for a user's mistake."""
  def command():
    parser = argparse.ArgumentParser(
        prog='python -m instdisc_jax.convert', description=__doc__, allow_abbrev=False,
        usage='%(prog)s --from=FILE --workdir=DIR | --workdir=DIR --to=FILE [--head]',
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: errors.raise_user_error(f'{message}: see --help')
    parser.add_argument('--from', dest='source', metavar='FILE', help='a .pth or .safetensors file')
    parser.add_argument('--workdir', metavar='DIR', required=True,
                        help='with --from: the folder to make; with --to: the folder of a run')
    parser.add_argument('--to', metavar='FILE', help='a .pth or .safetensors file to write')
    parser.add_argument('--head', action='store_true',
                        help="with --to: keep the layer to the embedding, as 'fc'")
    args = parser.parse_args(argv)
    if (args.source is None) == (args.to is None):
      raise errors.UserError('one of --from and --to must be given: see --help')
    logging.getLogger('absl').setLevel(logging.CRITICAL)  # Orbax reports all it does
    if args.to:
      export(args.workdir, args.to, args.head)
      print(args.to)
    else:
      print('\n'.join(import_checkpoint(args.source, args.workdir)))

  return errors.exit_code(command)


if __name__ == '__main__':
  sys.exit(main())
