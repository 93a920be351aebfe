import functools

import jax
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import crops, data
from instdisc_jax.data import Images, feeds, order, views
from instdisc_jax.models import resnet
from instdisc_jax.runtime import errors
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import optimizer as optimizer_lib
from instdisc_jax.training import state as state_lib
from instdisc_jax.training import step as step_lib
from tests.conftest import small_config

N, B, SIDE = 21, 6, 16
CROP = views.Crop(3, SIDE, (0.2, 1.0), (3 / 4, 4 / 3))


def _coordinate_images():
  """Images whose pixels show the number of the image, the row and the column."""
  rows, cols = np.mgrid[:40, :40].astype(np.uint8)
  return [np.stack([np.full_like(rows, 10 * i), rows * 6, cols * 6], -1) for i in range(N)]


IMAGES = Images(_coordinate_images(), None, '')


def _load(slots, images=IMAGES):
  return functools.partial(feeds.load_batch, images=images, crop=CROP, chain=order.Chain(3, B, N),
                           slots=np.array(slots))


@functools.cache
def _expected(first, last):
  """The chain, one image at a time: (indices, views)."""
  index, expected = [], []
  for place in range(first * B, last * B):
    epoch, within = divmod(place, N)
    i = int(order.Chain(3, N, N).batch(epoch)[within])
    key = jax.random.key(3)
    for number in (1, place, i):
      key = jax.random.fold_in(key, number)
    drawn = np.asarray(jax.random.uniform(key, (1, crops.DRAWS)))
    top, left, height, width = crops.draw_crop(
        drawn, 40, 40, crop_scale=CROP.scale, crop_ratio=CROP.ratio)[0].tolist()
    image = Image.fromarray(IMAGES.files[i][top:top + height, left:left + width])
    expected.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    index.append(i)
  return np.array(index), np.stack(expected)


@pytest.mark.parametrize('num_processes', [1, 2, 3])
@pytest.mark.parametrize('num_workers', [
    0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_indices_and_crops_are_the_chain_for_any_processes_and_workers(num_processes, num_workers):
  first, last = 2, 9
  parts = []
  for slots in np.split(np.arange(B), num_processes):
    batches = feeds.in_background(_load(slots), first, last, num_workers)
    parts.append(list(batches))
    batches.close()
  join = lambda k: np.concatenate([np.stack([batch[k] for batch in part]) for part in parts], 1)
  images, index = join(0), join(1)  # [steps, B, ...]
  expected_index, expected_views = _expected(first, last)
  np.testing.assert_array_equal(index.reshape(-1), expected_index)
  error = np.abs(images.reshape(expected_views.shape).astype(int) - expected_views)
  assert error.mean() < 0.5 and error.max() < 12
  assert not np.array_equal(images[0], images[-1])


def test_a_stream_starts_anywhere_and_gives_each_device_its_part():
  mesh = mesh_lib.make(jax.devices()[:2])
  make = lambda: feeds.Stream(IMAGES, mesh, CROP, order.Chain(3, B, N), last_step=9, workers=0)
  straight, later = make(), make()
  batches = [straight.at(step) for step in range(9)]
  for step in (7, 8, 2):
    images, index = later.at(step)
    np.testing.assert_array_equal(images, batches[step][0])
    np.testing.assert_array_equal(index, batches[step][1])
  assert index.shape == (1, B) and images.shape == (B, SIDE, SIDE, 3)
  np.testing.assert_array_equal(index[0], order.Chain(3, B, N).batch(2))
  assert [s.data.shape[0] for s in images.addressable_shards] == [3, 3]
  straight.close(), later.close()


def test_an_unreadable_image_is_named():
  bad = Images([*IMAGES.files[:-1], b'text'], None, '', names=[f'{i}.png' for i in range(N)])
  with pytest.raises(errors.UserError, match="'20.png' is not an image .*on_unreadable=skip"):
    list(feeds.in_background(_load(range(B), bad), 0, 4, 0))


def _one_step(config, path, num_devices=1):
  """(batch images, index, state before, state after) of one step on square images of one size."""
  array = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
  images = Images(array, None, '', shape=array.shape[1:])
  config.dataset.path = path
  mesh = mesh_lib.make(jax.devices()[:num_devices])
  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=16, width=4,
                          dtype=config.model.dtype, batch_norm_axis=mesh_lib.AXIS)
  setup = state_lib.Setup(config, encoder, optimizer_lib.make(config, N), N, mesh)
  state = state_lib.make_init(setup, (SIDE, SIDE))()
  before = jax.device_get(state)
  feed = feeds.make(config, images, mesh, last_step=1)
  inputs = feed.at(0)
  given, index = np.asarray(inputs[0]), np.asarray(inputs[1])[0]
  state, _ = step_lib.over_mesh(setup, feed)(state, inputs, 1)
  feed.close()
  return given if path == 'stream' else given[index], index, before, jax.device_get(state)


def _config(**kwargs):
  config = small_config()
  config.update(dict(batch_size=B) | kwargs)
  config.model.sync_batch_norm = True
  config.dataset.workers = 0
  return config


def test_streamed_and_resident_images_train_identically_where_nothing_is_cropped():
  config = _config()
  config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
  config.model.dtype = config.bank.dtype = 'float64'
  with jax.enable_x64(True):
    streamed = _one_step(config, 'stream', num_devices=2)
    resident = _one_step(config, 'resident', num_devices=1)
  np.testing.assert_array_equal(streamed[0], resident[0])  # the same bytes
  np.testing.assert_array_equal(streamed[1], resident[1])
  weights = lambda run: jax.tree.leaves(run[3].params)
  for a, b, start in zip(weights(streamed), weights(resident), jax.tree.leaves(
      streamed[2].params)):
    np.testing.assert_allclose(a, b, atol=1e-10)
    assert np.abs(a - start).max() > 1e-8  # it was a step
  np.testing.assert_allclose(streamed[3].bank[:N], resident[3].bank[:N], atol=1e-10)


def test_image_i_is_row_i_of_the_bank():
  config = _config(batch_size=1)
  _, index, before, after = _one_step(config, 'stream')
  assert index == order.Chain(config.seed, 1, N).batch(0)
  moved = np.flatnonzero(np.abs(after.bank - before.bank).max(axis=1) > 0)
  np.testing.assert_array_equal(moved, index)


def test_what_fits_is_resident_and_the_rest_is_streamed():
  config = _config()
  choose = lambda memory, shape=(8, 8, 3): feeds.choose_path(config, 10, shape, memory)
  assert choose(4 * 1920) == 'resident'
  assert choose(4 * 1920 - 1) == 'stream'
  assert choose(2**30, None) == 'stream'  # of no known size
  config.dataset.update(name='fake:10')
  assert choose(2**30) == 'stream'


def test_the_fake_feed_trains_on_the_chain_of_indices():
  config = small_config()
  config.dataset.update(name='fake:21', limit=None, path='stream')
  config.augment.size = 16
  config.batch_size = 6
  mesh = mesh_lib.make(jax.devices()[:1])
  source = data.load(config.dataset, 0).train
  feed = feeds.make(config, source, mesh, last_step=3)
  setup = state_lib.Setup.of(config, len(source), mesh)
  state = state_lib.make_init(setup, (16, 16))()
  inputs = feed.at(0)
  np.testing.assert_array_equal(inputs[1][0], order.Chain(config.seed, 6, 21).batch(0))
  state, metrics = step_lib.over_mesh(setup, feed)(state, inputs, 1)
  assert int(state.step) == 1 and np.isfinite(metrics['loss']).all()
