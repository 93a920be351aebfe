"""Detection: Faster R-CNN on the encoder, fine-tuned on images with boxes (Section 4.4).

PyTorch and torchvision train it (see `interop.faster_rcnn`), on one device; pycocotools measures
it. The encoder and one of random weights get the same schedule, with several seeds each.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import io
import math
import time
from typing import Any

import numpy as np

from instdisc_jax import config as config_lib
from instdisc_jax.data import order, scenes
from instdisc_jax.evaluation import few_label, supervised
from instdisc_jax.interop import faster_rcnn
from instdisc_jax.interop.safe_pickle import import_optional
from instdisc_jax.runtime import errors, files, metrics

_SAVE_MINUTES = 5.0
_SMALL = 300  # pixels: images whose shorter side has fewer are enlarged, to three times their size


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The schedule of each fine-tuning; by default for photographs, as detectron2 trains C4 on VOC.

  Attributes:
    seeds: of the order and of the new layers; the weights of a random start, too.
    epochs: passes over the images: 24,000 steps of 16 on VOC07+12.
    most_steps: at most.
    batch_size: B.
    learning_rate: for 16 images, and in proportion for fewer.
    milestones: shares of the training at which it is divided by 10.
    warmup: steps until it is reached.
    weight_decay: L2.
    side: shorter side of the images.
    regions: regions of an image that the head is trained on.
  """
  seeds: tuple[int, ...] = (0, 1, 2)
  epochs: float = 23.3
  most_steps: int = 24_000
  batch_size: int = 16
  learning_rate: float = 0.02
  milestones: tuple[float, ...] = (0.75, 0.92)
  warmup: int = 100
  weight_decay: float = 1e-4
  side: int = 800
  regions: int = 512

  @classmethod
  def of(cls, train: scenes.Scenes) -> 'Recipe':
    """The recipe for some images: small ones need less of everything."""
    sides = [min(train.images.full(i).shape[:2]) for i in range(min(20, len(train)))]
    side = int(np.median(sides))
    if side >= _SMALL:
      return cls()
    return cls(batch_size=4, side=3 * side, regions=64)

  def steps(self, num_images: int) -> int:
    """Number of steps for so many images."""
    return min(self.most_steps, math.ceil(self.epochs * num_images / self.batch_size))

  def rate(self, step: int, end: int) -> float:
    """The learning rate at a step."""
    passed = sum(step >= share * end for share in self.milestones)
    return (self.learning_rate * self.batch_size / 16 * 0.1**passed
            * min(1.0, (step + 1) / self.warmup))


@dataclasses.dataclass(frozen=True)
class Encoder:
  """The encoder to fine-tune.

  Attributes:
    config: the run's configuration.
    starts: {name: seed -> its weights in torchvision's layout, without the head}.
    digest: identifies the weights of the run.
  """
  config: config_lib.Config
  starts: Mapping[str, Callable[[int], dict[str, np.ndarray]]]
  digest: str


def measure(encoder: Encoder, train: scenes.Scenes, test: scenes.Scenes, names: tuple[str, ...], *,
            folder: files.Place, check: Callable[[], None] = lambda: None,
            recipe: Recipe | None = None) -> Iterator[dict[str, Any]]:
  """Fine-tunes from each start, once per seed.

  What is finished, and the fine-tuning that was stopped, are kept until all is measured: the same
  call resumes.

  Args:
    encoder: the encoder.
    train: N images with boxes.
    test: Q images with boxes.
    names: of the C classes.
    folder: where unfinished measurements are kept.
    check: called after each step; what it raises ends the measurement.
    recipe: the schedule; by default `Recipe.of(train)`.

  Yields:
    For each start {'start', 'ap', 'ap50', 'ap75' (means over seeds; COCO's average precision, from
    0 to 1), 'interval' (half-width of the 95% confidence interval of 'ap'), 'seeds'}.

  Raises:
    errors.UserError: a package is missing, an image cannot be read, or the encoder is no ResNet.
  """
  check_installed('--protocol')
  recipe, done, rows = recipe or Recipe.of(train), [], []
  total = len(encoder.starts) * len(recipe.seeds)
  for start, weights in encoder.starts.items():
    found = []
    for seed in recipe.seeds:
      what = supervised.key(start, seed, recipe, names, encoder.digest, train.images.identity(),
                            test.images.identity(), *_arrays(train), *_arrays(test))
      place = folder / f'detection-{what}'
      title = f'detection {len(done) + 1} of {total}'
      found.append(supervised.once(place, 3, lambda: _fit_and_measure(
          encoder.config, weights(seed), train, test, names, recipe, seed, place, title, check),
          together=False))
      done.append(place)
    ap, half = few_label.interval([values[0] for values in found])
    _, ap50, ap75 = np.mean(found, axis=0)
    rows.append({'start': start, 'ap': ap, 'ap50': float(ap50), 'ap75': float(ap75),
                 'interval': half, 'seeds': len(found)})
  yield from rows  # all at once, so that a stop repeats none
  supervised.forget(done)


def check_installed(argument: str) -> None:
  """Raises `errors.UserError` unless PyTorch, torchvision and pycocotools are installed.

  Args:
    argument: the argument that asked for detection.
  """
  for module in ('torch', 'torchvision.models.detection', 'pycocotools.coco',
                 'pycocotools.cocoeval'):
    import_optional(module, argument, 'detection')


def _arrays(data):
  """Everything that is known of the objects."""
  return [x for scene in data.objects for x in (scene.boxes, scene.classes, scene.difficult)]


def _fit_and_measure(config, weights, train, test, names, recipe, seed, place, title, check):
  """(AP, AP50, AP75) after one fine-tuning."""
  torch = import_optional('torch', '--protocol', 'detection')
  device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
  if device.type == 'cpu' and recipe.side >= 800:
    errors.warn('PyTorch sees no GPU: this takes weeks on a CPU')
  torch.manual_seed(seed)
  network = faster_rcnn.make(
      config.model.name, config.model.width, weights, len(names), side=recipe.side,
      regions=recipe.regions, mean=config.augment.mean, std=config.augment.std).to(device)
  try:
    _fit(torch, network, train, recipe, seed, config.augment.flip > 0, device, place, title, check)
  except torch.cuda.OutOfMemoryError as e:
    raise errors.RunError(f'the GPU has too little memory to train on {recipe.batch_size} images '
                          f'of {recipe.side} pixels ({errors.one_line(e)[:120]})') from e
  return average_precision(detect(network, test, device, check), test, names)


def _fit(torch, network, train, recipe, seed, flips, device, place, title, check):
  """Trains the network; every step is a function of (seed, step) and the state."""
  optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9,
                              weight_decay=recipe.weight_decay)
  end, chain = recipe.steps(len(train)), order.Chain(seed, recipe.batch_size, len(train))
  step, file, saved = 0, place / 'state.pt', time.monotonic()
  if file.exists():
    state = torch.load(io.BytesIO(file.read_bytes()), map_location=device, weights_only=True)
    network.load_state_dict(state['network'])
    optimizer.load_state_dict(state['optimizer'])
    step = state['step']

  def save():
    content = io.BytesIO()
    torch.save({'network': network.state_dict(), 'optimizer': optimizer.state_dict(),
                'step': step}, content)
    place.mkdir(parents=True, exist_ok=True)
    files.write(file, content.getvalue())

  network.train()
  with metrics.progress_bar(title) as progress:
    task = progress.add_task('', total=end, completed=step)
    while step < end:
      torch.manual_seed((seed << 32) + step)  # of the regions that are sampled
      flipped = np.random.RandomState([seed, step]).rand(recipe.batch_size) < 0.5 * flips
      batch = [_example(torch, train, i, flip, device)
               for i, flip in zip(chain.batch(step), flipped)]
      for group in optimizer.param_groups:
        group['lr'] = recipe.rate(step, end)
      optimizer.zero_grad()
      with torch.autocast('cuda', torch.bfloat16, enabled=device.type == 'cuda'):
        losses: Any = network(*map(list, zip(*batch))).values()
      torch.stack([loss.float() for loss in losses]).sum().backward()
      optimizer.step()
      step += 1
      progress.update(task, completed=step)
      if time.monotonic() - saved > 60 * _SAVE_MINUTES:
        save()
        saved = time.monotonic()
      try:
        check()
      except BaseException:
        save()
        raise
  save()  # it is still to be measured


def _example(torch, data, i, flip, device):
  """(image [3, H, W] in [0, 1], its boxes and labels from 1 on) of an image, perhaps mirrored."""
  image, scene = data.images.full(i), data.objects[i]
  boxes = scene.boxes[~scene.difficult].copy()
  if flip:
    image = image[:, ::-1]
    boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
  pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).to(device)
  return pixels.float() / 255, {
      'boxes': torch.from_numpy(boxes).to(device),
      'labels': torch.from_numpy(scene.classes[~scene.difficult].astype(np.int64) + 1).to(device)}


def detect(network: Any, data: scenes.Scenes, device: Any,
           check: Callable[[], None] = lambda: None) -> list[dict[str, np.ndarray]]:
  """What a network finds in images.

  Returns:
    For each image {'boxes': [n, 4] in pixels, 'labels': [n] from 0 on, 'scores': [n]}.
  """
  torch = import_optional('torch', '--protocol', 'detection')
  network.eval()
  found = []
  with torch.no_grad():
    for i in range(len(data)):
      image, _ = _example(torch, data, i, False, device)
      result, = network([image])
      found.append({key: value.cpu().numpy() for key, value in result.items()})
      found[-1]['labels'] = found[-1]['labels'] - 1
      check()
  return found


def average_precision(found: list[dict[str, np.ndarray]], data: scenes.Scenes,
                      names: tuple[str, ...]) -> tuple[float, float, float]:
  """(AP, AP50, AP75) as COCO defines them, from 0 to 1.

  Difficult objects count neither as found nor as missed.

  Args:
    found: what `detect` returns.
    data: the images with their objects.
    names: of the classes.
  """
  coco = import_optional('pycocotools.coco', '--protocol', 'detection').COCO()
  evaluation = import_optional('pycocotools.cocoeval', '--protocol', 'detection')
  as_coco = lambda box: [float(box[0]), float(box[1]), float(box[2] - box[0]),
                         float(box[3] - box[1])]
  annotations = [
      {'image_id': i, 'category_id': int(c), 'bbox': as_coco(box), 'iscrowd': 0,
       # an area beyond COCO's ranges leaves an object out
       'area': 1e11 if difficult else float((box[2] - box[0]) * (box[3] - box[1]))}
      for i, scene in enumerate(data.objects)
      for box, c, difficult in zip(scene.boxes, scene.classes, scene.difficult)]
  for number, annotation in enumerate(annotations, 1):
    annotation['id'] = number
  results = [{'image_id': i, 'category_id': int(c), 'bbox': as_coco(box), 'score': float(score)}
             for i, one in enumerate(found)
             for box, c, score in zip(one['boxes'], one['labels'], one['scores'])]
  if not results:
    return 0.0, 0.0, 0.0
  coco.dataset = {'images': [{'id': i} for i in range(len(data))], 'annotations': annotations,
                  'categories': [{'id': c, 'name': name} for c, name in enumerate(names)],
                  'info': {}}
  with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
    coco.createIndex()
    evaluator = evaluation.COCOeval(coco, coco.loadRes(results), 'bbox')
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
  ap, ap50, ap75 = (max(0.0, float(x)) for x in evaluator.stats[:3])
  return ap, ap50, ap75
