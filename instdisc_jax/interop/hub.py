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

_RESNET = {'first_conv': 'conv1', 'classifier': 'fc'}
_VIT = {'first_conv': 'patch_embed.proj', 'classifier': 'head'}
_IN_TIMM: dict[str, tuple[str, dict[str, Any], int, dict[str, str]]] = {
    # name here: (timm's, its arguments, number of features, names of the first and last layer)
    'resnet10': ('resnet18', {'layers': [1, 1, 1, 1]}, 512, _RESNET),
    'resnet18': ('resnet18', {}, 512, _RESNET),
    'resnet34': ('resnet34', {}, 512, _RESNET),
    'resnet50': ('resnet50', {}, 2048, _RESNET),
    'resnet101': ('resnet101', {}, 2048, _RESNET),
    'convnext_t': ('convnext_tiny', {}, 768, {'first_conv': 'stem.0', 'classifier': 'head.fc'}),
    'vit_t4': ('vit_tiny_patch16_224', {'img_size': 32, 'patch_size': 4}, 192, _VIT),
    'vit_s16': ('vit_small_patch16_224', {}, 384, _VIT),
    'vit_b16': ('vit_base_patch16_224', {}, 768, _VIT),
    'vit_s14': ('vit_small_patch14_dinov2', {'img_size': 224}, 384, _VIT),
    'vit_b14': ('vit_base_patch14_dinov2', {'img_size': 224}, 768, _VIT),
}
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
  architecture, arguments, features, layers = _IN_TIMM[settings['model.name']]
  if layers is _VIT:  # for images of any size
    arguments = {**arguments, 'dynamic_img_size': True}
  return {
      'architecture': architecture, 'model_args': arguments, 'num_classes': 0,
      'num_features': features, 'global_pool': 'token' if layers is _VIT else 'avg',
      'pretrained_cfg': {
          'input_size': [3, side, side], 'crop_pct': 0.875, 'interpolation': 'bilinear',
          'mean': list(settings['augment.mean']), 'std': list(settings['augment.std']),
          'num_classes': 0, **layers,
          **({} if layers is _VIT else {'pool_size': [-(-side // 32)] * 2})}}


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
