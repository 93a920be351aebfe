import functools
import json
import types

import jax
import numpy as np
import pytest

from instdisc_jax import models
from instdisc_jax.data import scenes as scenes_lib
from instdisc_jax.evaluation import detection
from instdisc_jax.interop import faster_rcnn, layouts, safe_pickle
from instdisc_jax.runtime import errors
from tests import scenes
from tests.conftest import small_config

RECIPE = detection.Recipe(seeds=(0,), epochs=0.3, batch_size=2, side=64, regions=16, warmup=2)


@pytest.fixture(scope='module')
def torch():
  """PyTorch, with a torchvision that fits it, and pycocotools."""
  pytest.importorskip('pycocotools', reason='pycocotools is not installed')
  found = pytest.importorskip('torch', reason='PyTorch is not installed')
  ops = pytest.importorskip('torchvision.ops', reason='torchvision is not installed',
                            exc_type=RuntimeError)
  try:
    ops.nms(found.zeros(1, 4), found.zeros(1), 0.5)
  except (RuntimeError, NotImplementedError):
    pytest.skip('torchvision was built for another PyTorch')
  return found


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """(training scenes, test scenes, names of the classes), small."""
  folder = tmp_path_factory.mktemp('scenes')
  scenes.write(folder / 'train', 24)
  scenes.write(folder / 'test', 4, held_out=True)
  return scenes_lib.load(f'coco:{folder}')


def _encoder(name='resnet10', width=4):
  config = small_config()
  config.model.update(name=name, width=width)
  init = jax.jit(lambda seed: models.create(name, width=width, embedding_dim=16).init(
      jax.random.key(seed), np.zeros((1, 64, 64, 3)), train=False))
  weights = lambda seed: {key: x for key, x in layouts.to_torchvision(init(seed), name).items()
                          if not key.startswith('fc.')}
  return detection.Encoder(config, {'trained': weights}, 'weights')


def _measure(encoder, data, folder, **kwargs):
  return list(detection.measure(encoder, *data, folder=folder, recipe=RECIPE, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet10', 'resnet18_cifar', 'resnet50'])
def test_every_resnet_is_fine_tuned(torch, data, tmp_path, name):
  row, = _measure(_encoder(name), data, tmp_path)
  assert row['start'] == 'trained' and row['seeds'] == 1 and row['interval'] is None
  assert all(0 <= row[key] <= 1 for key in ('ap', 'ap50', 'ap75'))
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stopped_fine_tuning_ends_with_the_same_bits(torch, data, tmp_path, monkeypatch):
  networks = []
  monkeypatch.setattr(detection, 'detect', lambda network, *_: networks.append(
      {key: x.clone() for key, x in network.state_dict().items()}) or [])
  _measure(_encoder(), data, tmp_path / 'a')
  steps = []

  def check():
    steps.append(None)
    if len(steps) == 2:
      raise errors.Stopped('stopped')

  with pytest.raises(errors.Stopped):
    _measure(_encoder(), data, tmp_path / 'b', check=check)
  _measure(_encoder(), data, tmp_path / 'b', check=lambda: steps.append(None))
  assert len(steps) == RECIPE.steps(24)
  assert all(torch.equal(x, networks[1][key]) for key, x in networks[0].items())


@pytest.mark.slow
def test_average_precision_agrees_with_torchmetrics(torch, data):
  metrics = pytest.importorskip('torchmetrics.detection', reason='torchmetrics is not installed')
  random, found = np.random.RandomState(0), []
  for scene in data[1].objects:  # the objects, moved, and some of them in a wrong class
    boxes = scene.boxes + random.normal(0, 3, scene.boxes.shape).astype(np.float32)
    labels = np.where(random.rand(len(boxes)) < 0.3, (scene.classes + 1) % 10, scene.classes)
    found.append({'boxes': boxes, 'labels': labels,
                  'scores': random.rand(len(boxes)).astype(np.float32)})
  as_tensors = lambda one: {key: torch.from_numpy(np.asarray(x)) for key, x in one.items()}
  judge = metrics.MeanAveragePrecision(backend='pycocotools')
  judge.update([as_tensors(one) for one in found],
               [as_tensors({'boxes': scene.boxes, 'labels': scene.classes.astype(np.int64)})
                for scene in data[1].objects])
  expected = judge.compute()
  ours = detection.average_precision(found, data[1], data[2])
  assert ours == pytest.approx([float(expected[key]) for key in ('map', 'map_50', 'map_75')])
  assert 0 < ours[0] < ours[1] < 1


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet10', 'resnet18_cifar', 'resnet50'])
def test_backbone_and_head_compute_what_the_encoder_does(torch, name):
  encoder = models.create(name, width=4, embedding_dim=16)
  x = np.random.RandomState(0).standard_normal((2, 64, 96, 3)).astype(np.float32)
  variables = jax.jit(functools.partial(encoder.init, train=False))(jax.random.key(0), x)
  _, shown = encoder.apply(variables, x, train=False, mutable=['stages'])
  weights = {key: v for key, v in layouts.to_torchvision(variables, name).items()
             if not key.startswith('fc.')}
  network = faster_rcnn.make(name, 4, weights, 10, side=64, regions=16, mean=(0,) * 3,
                             std=(1,) * 3).eval()
  with torch.no_grad():
    conv4 = network.backbone(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    conv5 = network.roi_heads.box_head[0](conv4)
  for found, stage in ((conv4, 'conv4'), (conv5, 'conv5')):
    np.testing.assert_allclose(found.numpy().transpose(0, 2, 3, 1),
                               shown['stages'][f'{stage}_output'], rtol=1e-3, atol=1e-4)


def test_difficult_objects_count_neither_as_found_nor_as_missed():
  pytest.importorskip('pycocotools', reason='pycocotools is not installed')
  boxes = np.float32([[0, 0, 20, 20], [30, 30, 60, 60]])
  scene = lambda *difficult: scenes_lib.Scene(boxes, np.zeros(2, int), np.array(difficult))
  as_scenes = lambda one: scenes_lib.Scenes(None, (one,))
  found = lambda *chosen: [{'boxes': boxes[list(chosen)], 'labels': np.zeros(len(chosen), int),
                            'scores': np.linspace(0.9, 0.8, len(chosen))}]
  measure = lambda found, one: detection.average_precision(found, as_scenes(one), ('a',))[0]
  assert measure(found(0), scene(False, True)) == pytest.approx(1)
  assert measure(found(1, 0), scene(False, True)) == pytest.approx(1)
  assert measure(found(0), scene(False, False)) < 0.6
  small = [{'boxes': np.float32([[35, 35, 40, 40], [0, 0, 20, 20]]), 'labels': np.zeros(2, int),
            'scores': np.array([0.9, 0.8])}]  # the first lies inside the difficult one
  assert measure(small, scene(False, True)) == pytest.approx(0.5)


def test_the_learning_rate_warms_up_and_falls():
  recipe = detection.Recipe()
  assert recipe.steps(16_551) == 24_000
  rates = [recipe.rate(step, 24_000) for step in (0, 49, 99, 17_999, 18_000, 22_100)]
  assert rates == pytest.approx([0.0002, 0.01, 0.02, 0.02, 0.002, 0.0002])


def test_small_images_have_a_small_recipe(data):
  recipe = detection.Recipe.of(data[0])
  assert recipe.side == 192 and recipe.batch_size == 4 and recipe.regions == 64


def test_another_encoder_is_refused(torch, data, tmp_path):
  with pytest.raises(errors.UserError, match='the encoder is vgg16, must be a ResNet'):
    _measure(_encoder('vgg16'), data, tmp_path)


@pytest.mark.parametrize('missing, package', [
    ('torch', 'PyTorch'), ('torchvision.models.detection', 'torchvision'),
    ('pycocotools.coco', 'pycocotools')])
def test_what_is_not_installed_is_named(data, tmp_path, monkeypatch, missing, package):
  def find(module):  # the others are as if they were here
    if module == missing:
      raise ModuleNotFoundError(module)
    return types.ModuleType(module)

  monkeypatch.setattr(safe_pickle, 'importlib', types.SimpleNamespace(import_module=find))
  with pytest.raises(errors.UserError, match=f'detection needs {package}, which is not installed: '
                                             r"pip install 'instdisc_jax\[(detection|torch)\]'"):
    _measure(_encoder(), data, tmp_path)


def test_scenes_are_read_as_they_were_written(data, tmp_path):
  train, _, names = data
  assert names == tuple('0123456789')
  made = scenes_lib.generate(24, held_out=False, side=64)
  for i, scene in enumerate(made.objects):
    np.testing.assert_array_equal(train.images.full(i), made.images.files[i])
    np.testing.assert_array_equal(train.objects[i].boxes, scene.boxes)
    np.testing.assert_array_equal(train.objects[i].classes, scene.classes)
    assert 1 <= len(scene.classes) <= 3 and (scene.boxes[:, 2:] > scene.boxes[:, :2]).all()
    assert (scene.boxes >= 0).all() and (scene.boxes <= 64).all()


def test_a_fifth_of_one_folder_is_held_out(tmp_path):
  scenes.write(tmp_path / 'one', 40)
  rest, held_out, _ = scenes_lib.load(f'coco:{tmp_path / "one"}')
  assert (len(rest), len(held_out)) == (32, 8)
  assert not {*rest.images.names} & {*held_out.images.names}


@pytest.mark.parametrize('change, message', [
    (lambda found: found.update(annotations=[]), 'the training images of .* have no boxes'),
    (lambda found: found.pop('images'), "cannot be read as annotations in COCO's form"),
    (lambda found: found['images'][0].update(file_name='gone.png'), "has no 'gone.png'"),
    (lambda found: found['annotations'][0].update(category_id=77), 'cannot be read as annot'),
    (lambda found: found.update(images=found['images'][:1]), 'cannot be read as|names 1 images'),
])
def test_bad_annotations_are_one_line(tmp_path, change, message):
  scenes.write(tmp_path / 'set', 6)
  file = tmp_path / 'set' / 'annotations.json'
  found = json.loads(file.read_text())
  change(found)
  file.write_text(json.dumps(found))
  with pytest.raises(errors.UserError, match=message):
    scenes_lib.load(f'coco:{tmp_path / "set"}')


def test_a_class_that_training_lacks_is_named(tmp_path):
  scenes.write(tmp_path / 'train', 2)
  scenes.write(tmp_path / 'test', 30)
  with pytest.raises(errors.UserError, match="have the class '.', must be only classes of the"):
    scenes_lib.load(f'coco:{tmp_path}')


@pytest.mark.parametrize('name, message', [
    ('coco:nowhere', "no file 'nowhere/annotations.json'"),
    ('digits', "--dataset is 'digits', must be coco:FOLDER or tfds:NAME, with boxes"),
    ('scenes:9', "--dataset is 'scenes:9', must be .* with N of at least 30"),
])
def test_other_data_are_refused(name, message):
  with pytest.raises(errors.UserError, match=message):
    scenes_lib.load(name)
