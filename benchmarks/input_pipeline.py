"""Images a second and core, from JPEG files to a ready uint8 batch at 224, beside plain PIL.

    python benchmarks/input_pipeline.py --images=FOLDER

Both read the same files, draw the same crops (20 to 100% of the area) and give [B, 224, 224, 3]
uint8. PIL: decode, crop, resize (bilinear with antialiasing), as torchvision's RandomResizedCrop
does it, one process. Ours: `stream.load_batch`, in this process, and through Grain with 1 and 2
worker processes. Rates are over processor time where one process is compared with another (other
work on the machine does not disturb them), and over wall time with workers. The last rows are the
share of `configs/folder.py`'s step that waits for its input, on this machine.
"""

import argparse
import functools
import io
import pathlib
import tempfile
import time

import common
import numpy as np
from PIL import Image

from instdisc_jax import augment, metrics
from instdisc_jax import main as main_lib
from instdisc_jax.data import draws, folder, order, pictures, stream

SIDE = 224
CROP = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))


def plain(files, index, drawn):
  """The batch by PIL alone."""
  views = []
  for i, draw in zip(index, drawn):
    image = Image.open(io.BytesIO(files[i])).convert('RGB')
    top, left, height, width = augment.draw_crop(
        draw[None], image.height, image.width, **CROP)[0].tolist()
    view = image.crop((left, top, left + width, top + height))
    views.append(np.asarray(view.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
  return np.stack(views)


def measure_wait(path, workdir):
  """The mean `input_wait` of 12 steps on a narrow ResNet-18 at 224 pixels."""
  argv = [f'--config={common.ROOT}/configs/folder.py', f'--workdir={workdir}',
          f'--config.dataset.name=folder:{path}', '--config.model.width=16',
          '--config.batch_size=32', '--config.steps=12', '--config.log_every_steps=1']
  _, config = main_lib.parse(argv)
  main_lib.run(config, workdir)
  waits = [line.get('input_wait') for line in metrics.read(workdir)]
  return float(np.mean([wait for wait in waits if wait is not None]))


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--images', required=True, metavar='FOLDER', help='JPEG files')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=10,
                      help='of each batch the best of so many is taken')
  parser.add_argument('--output')
  args = parser.parse_args()
  paths = sorted(folder.scan(args.images))
  source = pictures.Pictures(folder.Files(args.images, paths), None, '', names=paths)
  batch_size, steps = args.batch_size, max(2, len(paths) // args.batch_size)
  slots = np.arange(batch_size)
  load = functools.partial(
      stream.load_batch, pictures=source, seed=0, crop_seed=(0, 1), batch_size=batch_size,
      slots=slots, side=SIDE, crop=CROP)
  files = source.files

  def plain_batch(step):
    index = order.batch_index(0, step, batch_size, len(source))
    place = step * batch_size + slots
    return plain(files, index, draws.uniform(0, (1, place, index), augment.DRAWS))

  error = np.mean([np.abs(plain_batch(step).astype(int) - load(step)[0]).mean()
                   for step in range(steps)])
  pipelines = {'plain PIL': plain_batch, 'ours': load}
  seconds = {name: np.full(steps, np.inf) for name in pipelines}
  for _ in range(args.rounds):
    for step in range(steps):  # batch by batch in turns, so that both meet the same machine
      for name, make in pipelines.items():
        start = time.process_time()
        make(step)
        seconds[name][step] = min(seconds[name][step], time.process_time() - start)
  rate = {name: steps * batch_size / s.sum() for name, s in seconds.items()}
  rows = [('plain PIL, images/s and core', rate['plain PIL'], 1.0),
          ('ours, images/s and core', rate['ours'], rate['ours'] / rate['plain PIL'])]
  for workers in (1, 2):
    many = 6 * steps
    batches = stream.in_background(load, 0, many + 1, workers)
    next(batches)  # the processes have started
    start = time.perf_counter()
    for _ in range(many):
      next(batches)
    wall = many * batch_size / (time.perf_counter() - start)
    batches.close()
    rows.append((f'ours, {workers} worker process{"es" * (workers > 1)}, images/s', wall,
                 wall / rate['plain PIL']))
  with tempfile.TemporaryDirectory() as workdir:
    wait = measure_wait(args.images, pathlib.Path(workdir) / 'run')
  common.report('input_pipeline', f'{len(paths)} JPEG files, views of {SIDE}', [
      {'ratio': ratio, 'pipeline': name, 'images/s': value} for name, value, ratio in rows],
                output=args.output, pixel_error=float(error), input_wait=wait)
  print(f'mean absolute difference to PIL: {error:.2f} of 255')
  print(f'share of a training step spent waiting for input (ResNet-18, width 16): {wait:.3f}')


if __name__ == '__main__':
  main()
