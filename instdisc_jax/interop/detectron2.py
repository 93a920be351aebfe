"""ResNets in detectron2's format: a pickle of NumPy arrays under its names.

    conv1.weight, bn1.*                        stem.conv1.weight, stem.conv1.norm.*
    layer1.0.conv2.weight, layer1.0.bn2.*      res2.0.conv2.weight, res2.0.conv2.norm.*
    layer1.0.downsample.0.weight, .1.*         res2.0.shortcut.weight, res2.0.shortcut.norm.*
"""

from collections.abc import Mapping
import pickle
import re

import numpy as np

from instdisc_jax.interop.layouts import COUNTER
from instdisc_jax.runtime import errors

_KNOWN = 'resnet18', 'resnet34', 'resnet50', 'resnet101'  # depths that detectron2 builds
_RULES = ((r'^conv1\.', 'stem.conv1.'), (r'^bn1\.', 'stem.conv1.norm.'),
          (r'\.bn(\d)\.', r'.conv\1.norm.'), (r'\.downsample\.0\.', '.shortcut.'),
          (r'\.downsample\.1\.', '.shortcut.norm.'),
          (r'^layer(\d)\.', lambda found: f'res{int(found[1]) + 1}.'))


def dumps(weights: Mapping[str, np.ndarray], model_name: str) -> bytes:
  """The content of a .pkl file for `MODEL.WEIGHTS` of detectron2.

  Args:
    weights: in torchvision's layout, without the head.
    model_name: one of `models.NAMES`.

  Raises:
    errors.UserError: detectron2 does not build this encoder.
  """
  width = len(weights.get('conv1.weight', ()))
  if model_name not in _KNOWN or width != 64:
    raise errors.UserError(f'the encoder is {model_name}' + (f' of width {width}' if width else ''),
                           f'one that detectron2 builds, of width 64: {", ".join(_KNOWN)}',
                           'set <--to> to a .pth or .safetensors file', '--to')
  renamed = {}
  for key, x in weights.items():
    if not key.endswith(COUNTER):
      for pattern, replacement in _RULES:
        key = re.sub(pattern, replacement, key)
      renamed[key] = np.asarray(x, np.float32)
  return pickle.dumps({'model': renamed, '__author__': 'instdisc_jax', 'matching_heuristics': True})
