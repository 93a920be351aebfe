"""An encoder as a folder in the layout of the Hugging Face hub, which timm loads.

    config.json          timm's name of the encoder, size, mean and deviation of its images
    model.safetensors    the backbone
    README.md            a model card: data, recipe, results
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import numpy as np

from instdisc_jax.interop import safe_pickle
from instdisc_jax.runtime import errors, files

_IN_TIMM = ('resnet10', 'resnet18', 'resnet34', 'resnet50', 'resnet101')
_SHOWN = ('dataset.name', 'epochs', 'steps', 'batch_size', 'loss.name', 'loss.temperature',
          'bank.momentum', 'optimizer.learning_rate', 'optimizer.schedule', 'augment.crop_scale',
          'augment.flip', 'seed')  # settings that the card has
_RESULTS = {'num_rows': 'training images', 'num_queries': 'kNN queries', 'knn_top1': 'kNN top-1',
            'knn_top1_untrained': 'kNN top-1 of the encoder before training',
            'knn_top1_pixels': 'kNN top-1 of raw pixels'}


def check(model_name: str, width: int) -> None:
  """Raises `errors.UserError` if timm has no such encoder."""
  if model_name not in _IN_TIMM or width != 64:
    raise errors.UserError(
        f'timm has no {model_name} of width {width}', f'{", ".join(_IN_TIMM)}, of width 64',
        'set <--to> to a file that ends in .onnx, .pth or .safetensors', '--to')


def write(folder: pathlib.Path, state_dict: Mapping[str, np.ndarray], settings: Mapping[str, Any],
          side: int, summary: Mapping[str, Any]) -> None:
  """Writes the folder, completely or not at all.

  Args:
    folder: a new folder.
    state_dict: the backbone in torchvision's layout.
    settings: those of the run, flat.
    side: side of the views in pixels.
    summary: the content of summary.json, {} if there is none.

  Raises:
    errors.UserError: it exists or cannot be written, or safetensors is not installed.
  """
  save = safe_pickle.import_optional('safetensors.numpy', '--to').save_file
  if folder.exists():
    raise errors.UserError(f"'{folder}' exists", remedy='set <--to> to a new folder',
                           setting='--to')
  with files.whole_folder(folder, '--to') as partial:
    save(dict(state_dict), partial / 'model.safetensors', metadata={'format': 'pt'})
    (partial / 'config.json').write_text(json.dumps(_config(settings, side), indent=2) + '\n')
    (partial / 'README.md').write_text(_card(folder.name, settings, side, summary))


def _config(settings, side) -> dict[str, Any]:
  """timm's description of the encoder."""
  name = settings['model.name']
  wide = name in ('resnet50', 'resnet101')
  return {
      'architecture': 'resnet18' if name == 'resnet10' else name,
      'model_args': {'layers': [1, 1, 1, 1]} if name == 'resnet10' else {},
      'num_classes': 0, 'num_features': 2048 if wide else 512, 'global_pool': 'avg',
      'pretrained_cfg': {
          'input_size': [3, side, side], 'crop_pct': 0.875, 'interpolation': 'bilinear',
          'mean': list(settings['augment.mean']), 'std': list(settings['augment.std']),
          'num_classes': 0, 'pool_size': [-(-side // 32)] * 2, 'first_conv': 'conv1',
          'classifier': 'fc'}}


def _card(name, settings, side, summary):
  rows = lambda pairs: ''.join(f'| {key} | {value} |\n' for key, value in pairs)
  found = [(title, f'{value:.3f}' if isinstance(value, float) else f'{value:,}')
           for key, title in _RESULTS.items() if (value := summary.get(key)) is not None]
  recipe = [(f'`{key}`', settings[key]) for key in _SHOWN if settings.get(key) is not None]
  results = (f'## Results\n\n| | |\n|---|---|\n{rows(found)}\n' if found else '')
  return f'''---
library_name: timm
tags: [image-feature-extraction, self-supervised, instance-discrimination]
---
# {name}

{settings['model.name']}, trained without labels by [instance
discrimination](https://arxiv.org/abs/1805.01978) with instdisc_jax, on views of {side} pixels.

```python
import timm

model = timm.create_model('local-dir:{name}', pretrained=True)  # or 'hf-hub:...', once it is there
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(image)[None])
```

Cosines of these features tell how alike two images are. State a license before you publish them.

{results}## Recipe

| setting | value |
|---|---|
{rows(recipe)}'''
