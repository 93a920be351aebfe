"""Images per second and core, from JPEG files to a uint8 batch at 224 pixels, beside plain PIL.

    python benchmarks/input_pipeline.py --images=FOLDER

Both read the same files, draw the same crops (20 to 100% of the area) and return [B, 224, 224, 3]
uint8. PIL: decode, crop, resize (bilinear with antialiasing), as torchvision's RandomResizedCrop
does, in one process. Ours: `feeds.load_batch`, in this process, and through Grain with 1 and 2
worker processes. Single processes are compared by processor time, which other work on the machine
does not disturb; workers by wall time. The last line is the share of a step of `configs/folder.py`
that is spent waiting for input, on this machine.
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

from instdisc_jax import cli, crops, experiment, threefry
from instdisc_jax.data import Images, feeds, folder, order, views
from instdisc_jax.runtime import metrics

SIDE = 224
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def plain(files, index, drawn):
  """The batch by PIL alone."""
  batch = []
  for i, draw in zip(index, drawn):
    image = Image.open(io.BytesIO(files[i])).convert('RGB')
    top, left, height, width = crops.draw_crop(
        draw[None], image.height, image.width, crop_scale=SCALE, crop_ratio=RATIO)[0].tolist()
    view = image.crop((left, top, left + width, top + height))
    batch.append(np.asarray(view.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
  return np.stack(batch)


def measure_wait(path, workdir):
  """The mean `input_wait` of 12 steps on a narrow ResNet-18 at 224 pixels."""
  config = cli.read_config(f'{common.ROOT}/configs/folder.py', [
      f'--config.dataset.name=folder:{path}', '--config.model.width=16', '--config.batch_size=32',
      '--config.steps=12', '--config.log_every_steps=1'])
  experiment.run(config, workdir)
  waits = [line.get('input_wait') for line in metrics.read(workdir)]
  return float(np.mean([wait for wait in waits if wait is not None]))


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--images', required=True, metavar='FOLDER', help='JPEG files')
  parser.add_argument('--batch_size', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=10,
                      help='how often each batch is timed; the best counts')
  parser.add_argument('--output')
  args = parser.parse_args()
  paths = sorted(folder.scan(args.images))
  source = Images(folder.Files(args.images, paths), None, '', names=paths)
  batch_size, steps = args.batch_size, max(2, len(paths) // args.batch_size)
  slots = np.arange(batch_size)
  chain = order.Chain(0, batch_size, len(source))
  load = functools.partial(feeds.load_batch, images=source, chain=chain, slots=slots,
                           crop=views.Crop(0, SIDE, SCALE, RATIO))
  files = source.files

  def plain_batch(step):
    index = chain.batch(step)
    place = step * batch_size + slots
    drawn = threefry.uniform(0, (threefry.AUGMENT, place, index), crops.DRAWS)
    return plain(files, index, drawn)

  error = np.mean([np.abs(plain_batch(step).astype(int) - load(step)[0]).mean()
                   for step in range(steps)])
  pipelines = {'plain PIL': plain_batch, 'ours': load}
  seconds = {name: np.full(steps, np.inf) for name in pipelines}
  for _ in range(args.rounds):
    for step in range(steps):  # batch by batch in turns, so that both see the same machine
      for name, make in pipelines.items():
        start = time.process_time()
        make(step)
        seconds[name][step] = min(seconds[name][step], time.process_time() - start)
  rate = {name: steps * batch_size / s.sum() for name, s in seconds.items()}
  rows = [('plain PIL, images/s and core', rate['plain PIL'], 1.0),
          ('ours, images/s and core', rate['ours'], rate['ours'] / rate['plain PIL'])]
  for workers in (1, 2):
    many = 6 * steps
    batches = feeds.in_background(load, 0, many + 1, workers)
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
  print(f'mean absolute difference from PIL: {error:.2f} of 255')
  print(f'share of a training step spent waiting for input (ResNet-18, width 16): {wait:.3f}')


if __name__ == '__main__':
  main()
