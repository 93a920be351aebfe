"""Checkpoints of other projects: import of the encoder and the training state, and export."""

from collections.abc import Mapping
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from instdisc_jax.interop import layouts, safe_pickle
from instdisc_jax.runtime import checkpoint, errors, files
from instdisc_jax.runtime import workdir as workdir_lib

# Settings that a .safetensors file keeps: those of the views, and the encoder's name.
VIEWS = ('augment.size', 'augment.mean', 'augment.std')
_NAME = 'model.name'

__all__ = ['Checkpoint', 'export', 'read', 'read_encoder', 'state_dict']


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """The contents of a file from which training can resume.

  Attributes:
    model_name: the name of the encoder.
    width: channels of its first stage.
    head: 'linear' or 'mlp'.
    embedding_dim: D.
    variables: {'params', 'batch_stats'}, float32.
    has_head: whether the head is from the file; otherwise it is fresh.
    bank: [N, D], or None.
    settings: settings that the weights and the bank were trained with, as far as the file has them,
      e.g. {'loss.temperature': 0.07}.
    normalizer: Z, or 0 if it is not set.
    momentum: SGD's momentum, a tree like the params, or None.
    epochs: epochs completed; 0 without a bank.
  """
  model_name: str
  width: int
  head: str
  embedding_dim: int
  variables: dict[str, Any]
  has_head: bool
  bank: Float[np.ndarray, 'N D'] | None
  settings: dict[str, Any]
  normalizer: float
  momentum: dict[str, Any] | None
  epochs: int


def read(file: str | os.PathLike[str], embedding_dim: int) -> Checkpoint:
  """Reads everything in a file from which training can resume.

  Args:
    file: a checkpoint of the published code, or one with the weights of a known encoder in the
      layout of torchvision, timm, DINO, MoCo, PyContrast, VISSL or MMSelfSup; .pth or .safetensors.
    embedding_dim: D of the fresh head if the file has none.

  Raises:
    errors.UserError: the file holds no known encoder, or its weights or bank do not fit together.
  """
  saved = safe_pickle.read_file(file)
  weights = layouts.find_weights(saved, file)
  bank, settings, normalizer = _find_bank(saved, weights, file)
  encoder = layouts.find_encoder(weights, file, _kept(file).get(_NAME))
  state_dict = _with_head(encoder, embedding_dim)
  variables = _to_variables(state_dict, encoder.name)
  head, embedding_dim = _describe(state_dict)
  if encoder.head is None:
    bank = None  # it was computed with a head that the file lacks
  if bank is not None:
    if bank.ndim != 2 or bank.shape[1] != embedding_dim or len(bank) < 2:
      raise errors.UserError(
          f"the bank in '{file}' has shape {bank.shape}",
          f'(N, {embedding_dim}), like the embedding', 'set <--from> to another file', '--from')
    bank = np.asarray(bank, np.float32)
  momentum = {} if encoder.name.endswith('_cifar') else _find_momentum(saved, weights)
  if encoder.head is None or not momentum.keys() <= state_dict.keys():
    momentum = {}  # it belongs to another head, or to other layers
  return Checkpoint(
      model_name=encoder.name, width=encoder.width, head=head, embedding_dim=embedding_dim,
      variables=variables, has_head=encoder.head is not None, bank=bank,
      settings=settings | {key: x for key, x in _kept(file).items() if key in VIEWS},
      normalizer=normalizer,
      momentum=_to_variables(state_dict | momentum, encoder.name)['params'] if momentum else None,
      # The published CIFAR-10 program, which saves 'net', counts epochs from 0.
      epochs=0 if bank is None else int(saved.get('epoch', 0)) + ('net' in saved))


def read_encoder(file: str | os.PathLike[str],
                 embedding_dim: int, head: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """The encoder of a file in any known layout.

  Args:
    file: a .pth or .safetensors file, see `read`.
    embedding_dim: D of the fresh head if the file has none.
    head: 'linear' or 'mlp', the kind of that head.

  Returns:
    ({'model.name', 'model.width', 'model.head', 'model.embedding_dim'}, {'params', 'batch_stats'}
    float32).

  Raises:
    errors.UserError: the file holds no known encoder, or its weights do not fit together.
  """
  encoder = layouts.find_encoder(layouts.find_weights(safe_pickle.read_file(file), file), file,
                                 _kept(file).get(_NAME))
  state_dict = _with_head(encoder, embedding_dim, head)
  head, embedding_dim = _describe(state_dict)
  return ({'model.name': encoder.name, 'model.width': encoder.width, 'model.head': head,
           'model.embedding_dim': embedding_dim}, _to_variables(state_dict, encoder.name))


def _describe(state_dict):
  """(kind of the head, D) of complete weights."""
  head = layouts.head_of(state_dict)
  return head, len(state_dict['fc.2.bias' if head == 'mlp' else 'fc.bias'])


def export(workdir: str | os.PathLike[str], file: str | os.PathLike[str],
           with_head: bool = False) -> None:
  """Writes the encoder of a workdir's newest checkpoint in torchvision's layout.

  Args:
    workdir: the folder of a run, or one made from a checkpoint.
    file: NAME.pth or NAME.safetensors; the latter keeps the encoder's name, and size, mean and
      deviation of the views, and a workdir made from it has them.
    with_head: whether to keep the head, as 'fc', rather than write the backbone alone.

  Raises:
    errors.UserError: there is no checkpoint, or the file cannot be written.
  """
  file = pathlib.Path(file)
  settings, _ = workdir_lib.read(workdir)
  kept = {key: json.dumps(settings[key]) for key in (*VIEWS, _NAME)
          if settings.get(key) is not None}
  content = _serialize(state_dict(workdir, with_head), file.suffix, kept)
  try:
    files.write(file, content)
  except OSError as e:
    raise errors.cannot_write(file, e, '--to') from e


def state_dict(workdir: str | os.PathLike[str], with_head: bool) -> dict[str, np.ndarray]:
  """The encoder of a workdir's newest checkpoint in torchvision's layout, see `export`."""
  settings, _ = workdir_lib.read(workdir)
  variables = checkpoint.read(files.place(workdir) / 'checkpoints', ('params', 'batch_stats'))
  found = layouts.to_torchvision(variables, settings['model.name'])
  return {key: x for key, x in found.items() if with_head or not key.startswith('fc.')}


def _serialize(weights: Mapping[str, np.ndarray], suffix: str, kept: dict[str, str]) -> bytes:
  if suffix == '.safetensors':
    return safe_pickle.import_optional('safetensors.numpy', '--to').save(dict(weights), kept)
  torch = safe_pickle.import_optional('torch', '--to')
  buffer = io.BytesIO()
  torch.save({key: torch.tensor(x) for key, x in weights.items()}, buffer)
  return buffer.getvalue()


def _to_variables(state_dict, model_name):
  """Complete weights of an encoder -> {'params', 'batch_stats'} float32."""
  with layouts.as_file_errors(model_name):
    variables = layouts.from_torch(state_dict, model_name)
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)


def _with_head(encoder, embedding_dim, kind='linear'):
  """State dict of an encoder, with a fresh head if it has none of its own."""
  head = encoder.head
  if head is None:
    random = np.random.default_rng(0)
    if kind == 'mlp':
      head = (_fresh_layer(random, '0.', encoder.features, encoder.features)
              | _fresh_layer(random, '2.', encoder.features, embedding_dim))
    else:
      head = _fresh_layer(random, '', encoder.features, embedding_dim)
  return encoder.backbone | {f'fc.{leaf}': value for leaf, value in head.items()}


def _fresh_layer(random, name, inputs, outputs):
  """Initial values of a layer of the head, distributed as in the encoders here: U(±1/sqrt(C))."""
  bound = inputs ** -0.5
  draw = lambda shape: random.uniform(-bound, bound, shape).astype(np.float32)
  return {f'{name}weight': draw((outputs, inputs)), f'{name}bias': draw(outputs)}


def _kept(file):
  """The settings in a file that `export` wrote; else {}."""
  found = {}
  for key, text in safe_pickle.read_metadata(file).items():
    with contextlib.suppress(ValueError):
      if key in (*VIEWS, _NAME):
        found[key] = json.loads(text)
  return found


def _find_bank(saved, weights, file):
  """(bank rows [N, D] or None, settings that the bank was trained with, Z or 0)."""
  if 'memory_bank.feature_bank' in weights:  # MMSelfSup
    return weights['memory_bank.feature_bank'], {}, 0.0
  bank = saved.get('lemniscate')
  if bank is None:
    return None, {}, 0.0
  buffers = bank.get('_buffers', bank) if isinstance(bank, dict) else {}
  params = buffers.get('params', ())
  if 'memory' not in buffers or len(params) not in (2, 4):
    raise errors.UserError(
        f"the bank 'lemniscate' in '{file}' lacks the published 'memory' and 'params'",
        remedy='set <--from> to another file', setting='--from')
  shortest = [float(str(np.float32(x))) for x in params]  # 0.07, not 0.07000000029802322
  settings, normalizer = {'loss.name': 'softmax'}, 0.0
  if len(params) == 4:
    noise_count, shortest[0], normalizer, shortest[1] = shortest
    settings = {'loss.name': 'nce', 'loss.noise_count': int(noise_count)}
  return (buffers['memory'], settings | {'loss.temperature': shortest[0],
                                         'bank.momentum': shortest[1]}, max(normalizer, 0.0))


def _find_momentum(saved, weights):
  """{key: SGD's momentum buffer} of a published checkpoint, empty if it has none."""
  optimizer = saved.get('optimizer')
  if not isinstance(optimizer, dict) or not {'param_groups', 'state'} <= optimizer.keys():
    return {}
  trained = [key for key in weights
             if not re.search(f'{layouts.COUNTER}$|running_(mean|var)$', key)]
  numbers = [number for group in optimizer['param_groups'] for number in group['params']]
  buffers = [optimizer['state'].get(number, {}).get('momentum_buffer') for number in numbers]
  if len(buffers) != len(trained) or any(buffer is None for buffer in buffers):
    return {}
  return dict(zip(trained, buffers))
