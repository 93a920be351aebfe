"""Generated images with boxes, as a folder in COCO's form."""

import json
import pathlib

from PIL import Image

from instdisc_jax.data import scenes


def write(folder: pathlib.Path, count: int, held_out: bool = False, side: int = 64) -> None:
  """Writes `scenes.generate(count, held_out, side)`."""
  made = scenes.generate(count, held_out, side)
  (folder / 'images').mkdir(parents=True)
  annotations = []
  for i, scene in enumerate(made.objects):
    Image.fromarray(made.images.files[i]).save(folder / 'images' / f'{i:05}.png')
    for (left, top, right, bottom), c in zip(scene.boxes.tolist(), scene.classes.tolist()):
      annotations.append({'id': len(annotations) + 1, 'image_id': i, 'category_id': c,
                          'bbox': [left, top, right - left, bottom - top], 'iscrowd': 0})
  (folder / 'annotations.json').write_text(json.dumps({
      'images': [{'id': i, 'file_name': f'{i:05}.png'} for i in range(count)],
      'annotations': annotations,
      'categories': [{'id': c, 'name': str(c)} for c in range(10)]}))
