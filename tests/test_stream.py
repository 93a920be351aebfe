import functools
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from instdisc_jax import augment, errors, main, metrics, train
from instdisc_jax import workdir as workdir_lib
from instdisc_jax.data import folder as folder_lib
from instdisc_jax.data import order, pictures, resident, stream
from instdisc_jax.models import resnet
from tests.conftest import folder_config, small_config
from tests.test_main import SignalAt

N, B, SIDE = 21, 6, 16
CROP = dict(crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))


def _telling_pictures():
  """Pictures whose pixels tell the picture, the row and the column."""
  rows, cols = np.mgrid[:40, :40].astype(np.uint8)
  return [np.stack([np.full_like(rows, 10 * i), rows * 6, cols * 6], -1) for i in range(N)]


TELLING = pictures.Pictures(_telling_pictures(), None, '')


def _load(slots, seed=3):
  return functools.partial(
      stream.load_batch, pictures=TELLING, seed=seed, crop_seed=(seed, 1), batch_size=B,
      slots=np.array(slots), side=SIDE, crop=CROP)


@functools.cache
def _expected(first, last):
  """The chain, one picture at a time: (indices, crops' views)."""
  index, views = [], []
  for place in range(first * B, last * B):
    epoch, within = divmod(place, N)
    i = int(order.batch_index(3, epoch, N, N)[within])
    key = jax.random.key(3)
    for number in (1, place, i):
      key = jax.random.fold_in(key, number)
    drawn = np.asarray(jax.random.uniform(key, (1, augment.DRAWS)))
    top, left, height, width = augment.draw_crop(drawn, 40, 40, **CROP)[0].tolist()
    picture = Image.fromarray(TELLING.files[i][top:top + height, left:left + width])
    views.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
    index.append(i)
  return np.array(index), np.stack(views)


@pytest.mark.parametrize('num_processes', [1, 2, 3])
@pytest.mark.parametrize('num_workers', [
    0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_indices_and_crops_are_the_chain_for_any_processes_and_workers(num_processes, num_workers):
  first, last = 2, 9
  parts = []
  for slots in np.split(np.arange(B), num_processes):
    batches = stream.in_background(_load(slots), first, last, num_workers)
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
  mesh = train.make_mesh(jax.devices()[:2])
  make = lambda: stream.Stream(
      TELLING, mesh, seed=3, crop_seed=(3, 1), batch_size=B, last_step=9, side=SIDE, workers=0,
      **CROP)
  straight, later = make(), make()
  batches = [straight.at(step) for step in range(9)]
  for step in (7, 8, 2):
    images, index = later.at(step)
    np.testing.assert_array_equal(images, batches[step][0])
    np.testing.assert_array_equal(index, batches[step][1])
  assert index.shape == (1, B) and images.shape == (B, SIDE, SIDE, 3)
  np.testing.assert_array_equal(index[0], order.batch_index(3, 2, B, N))
  assert [s.data.shape[0] for s in images.addressable_shards] == [3, 3]
  straight.close(), later.close()


def test_views_of_all_pictures_come_in_order():
  views = stream.Views(TELLING, train.make_mesh(jax.devices()[:2]), SIDE, workers=0)
  chunks = [np.asarray(chunk) for chunk in views.chunks(4)]
  assert [len(chunk) for chunk in chunks] == [8, 8, 8]
  found = np.concatenate(chunks)[:, 8, 8, 0]
  np.testing.assert_array_equal(found[:N], 10 * np.arange(N))
  np.testing.assert_array_equal(found[N:], 10 * (N - 1))


def test_a_picture_that_cannot_be_read_is_named():
  bad = pictures.Pictures([*TELLING.files[:-1], b'text'], None, '', names=[f'{i}.png' for i in
                                                                       range(N)])
  load = functools.partial(_load(range(B)).func, **_load(range(B)).keywords | {'pictures': bad})
  with pytest.raises(errors.UserError, match="'20.png' is no picture .*on_unreadable=skip"):
    list(stream.in_background(load, 0, 4, 0))


def _one_step(config, path, num_devices=1):
  """(batch images, index, state before, state after) of one step on square pictures of one size."""
  images = np.random.default_rng(0).integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
  whole = pictures.Pictures(images, None, '', shape=images.shape[1:])
  config.dataset.path = path
  mesh = train.make_mesh(jax.devices()[:num_devices])
  encoder = resnet.ResNet(resnet.BasicBlock, (1,), True, embedding_dim=16, width=4,
                          dtype=config.model.dtype, batch_norm_axis=train.AXIS)
  optimizer = train.make_optimizer(config, N)
  state = train.make_init(config, encoder, optimizer, N, (SIDE, SIDE, 3), mesh)()
  before = jax.device_get(state)
  feed = train.make_feed(config, whole, mesh)
  run_steps = train.map_over_mesh(mesh, functools.partial(
      train.train_step, config=config, encoder=encoder, optimizer=optimizer, num_rows=N,
      cropped=not feed.resident), feed.resident)
  images, index = feed.at(0)
  given = np.asarray(images)[np.asarray(index)[0]] if feed.resident else np.asarray(images)
  state, _ = run_steps(state, images, index, 1)
  feed.close()
  return given, np.asarray(index)[0], before, jax.device_get(state)


def _config(**kwargs):
  config = small_config()
  config.update(dict(batch_size=B) | kwargs)
  config.model.sync_batch_norm = True
  config.dataset.workers = 0
  return config


def test_stream_and_resident_path_train_alike_where_nothing_is_cropped():
  config = _config()
  config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
  config.model.dtype = config.bank.dtype = 'float64'
  with jax.enable_x64(True):
    streamed = _one_step(config, 'stream', num_devices=2)
    resident_ = _one_step(config, 'resident', num_devices=1)
  np.testing.assert_array_equal(streamed[0], resident_[0])  # the same bytes
  np.testing.assert_array_equal(streamed[1], resident_[1])
  weights = lambda run: jax.tree.leaves(run[3].params)
  for a, b, start in zip(weights(streamed), weights(resident_), jax.tree.leaves(
      streamed[2].params)):
    np.testing.assert_allclose(a, b, atol=1e-10)
    assert np.abs(a - start).max() > 1e-8  # it was a step
  np.testing.assert_allclose(streamed[3].bank[:N], resident_[3].bank[:N], atol=1e-10)


def test_picture_i_is_row_i_of_the_bank():
  config = _config(batch_size=1)
  _, index, before, after = _one_step(config, 'stream')
  assert index == order.batch_index(config.seed, 0, 1, N)
  moved = np.flatnonzero(np.abs(after.bank - before.bank).max(axis=1) > 0)
  np.testing.assert_array_equal(moved, index)


def test_a_folder_of_mixed_pictures_trains_and_is_evaluated(trained_folder):
  _, workdir, summary = trained_folder
  assert summary['num_rows'] == 32 and summary['num_queries'] == 8 and summary['steps'] == 12
  assert summary['knn_top1'] > 0.5  # the classes differ in colour
  assert summary['knn_top1_pixels'] > 0.5 and summary['knn_top1_untrained'] is not None
  assert (workdir / 'neighbors.png').exists()
  lines = [line for line in metrics.read(workdir) if 'input_wait' in line]
  assert lines and all(0 <= line['input_wait'] <= 1 for line in lines[1:])


def test_a_stream_stopped_in_mid_epoch_goes_on_to_the_same_bits(trained_folder, tmp_path):
  folder, workdir, summary = trained_folder
  config = folder_config(folder)
  with pytest.raises(errors.Stopped, match='at step 7 of 12'):
    main.run(config, tmp_path / 'run', jax.devices()[:1], watch=SignalAt(polls=6))
  again = main.run(config, tmp_path / 'run', jax.devices()[:1])
  for key in ('steps', 'final_loss', 'params_digest', 'bank_digest', 'knn_top1'):
    assert again[key] == summary[key], key


@pytest.fixture
def one_renamed(trained_folder, tmp_path):
  """A copy of that run and of its folder, one of its training pictures under another name."""
  for source, name in zip(trained_folder[:2], ('pictures', 'run')):
    shutil.copytree(source, tmp_path / name)
  folder, workdir = tmp_path / 'pictures', tmp_path / 'run'
  settings, fingerprint = workdir_lib.read(workdir)
  workdir_lib.write(workdir, settings | {'dataset.name': f'folder:{folder}'}, fingerprint)
  first = folder_lib.read(workdir)['rows'][0]
  (folder / first).rename(folder / 'redless' / 'zz.png')
  return folder, workdir, first


def test_a_changed_folder_is_refused(one_renamed):
  folder, workdir, renamed = one_renamed
  before = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
  with pytest.raises(errors.UserError, match=(
      rf"1 added \(first: 'redless/zz.png'\), 1 removed \(first: '{renamed}'\)")):
    main.run(folder_config(folder), workdir, jax.devices()[:1])
  assert before == {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


@pytest.mark.slow
def test_a_grown_folder_goes_on_from_the_rows_of_a_run(one_renamed, tmp_path):
  folder, workdir, _ = one_renamed
  config = folder_config(folder)
  config.model.init, config.steps = str(workdir), 1
  main.run(config, tmp_path / 'grown', jax.devices()[:1])
  old, new = ({name: row for name, row in zip(
      folder_lib.read(run)['rows'], main.checkpoint.read(run / 'checkpoints')['bank'])}
              for run in (workdir, tmp_path / 'grown'))
  assert new.keys() - old.keys() == {'redless/zz.png'}
  moved = {list(new)[i] for i in order.batch_index(config.seed, 0, config.batch_size, 32)}
  kept = old.keys() & new.keys() - moved
  assert len(kept) >= 20
  for name in kept:
    np.testing.assert_array_equal(new[name], old[name])
  np.testing.assert_allclose(np.linalg.norm(new['redless/zz.png']), 1, atol=1e-6)
  assert all(np.abs(new['redless/zz.png'] - row).max() > 1e-4 for row in old.values())


def _pictures_of_noise(folder, count):
  folder.mkdir()
  for i in range(count):
    pixels = np.random.default_rng(i).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f'{i}.png')


def test_one_picture_is_too_few(tmp_path):
  _pictures_of_noise(tmp_path / 'pictures', 1)
  config = folder_config(tmp_path / 'pictures')
  config.dataset.validation = None
  with pytest.raises(errors.UserError, match='with 1 training image, must have at least 2'):
    main.run(config, tmp_path / 'run', jax.devices()[:1])
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_two_pictures_train(tmp_path):
  _pictures_of_noise(tmp_path / 'pictures', 2)
  config = folder_config(tmp_path / 'pictures')
  config.dataset.validation = None
  config.update(batch_size=2, steps=1)
  config.knn.neighbors = 1
  summary = main.run(config, tmp_path / 'run', jax.devices()[:1])
  assert summary['num_rows'] == 2 and summary['knn_top1'] is None


def test_what_fits_is_resident_and_the_rest_is_streamed():
  mesh = train.make_mesh(jax.devices()[:1])
  whole = pictures.Pictures(np.zeros((10, 8, 8, 3), np.uint8), None, '', shape=(8, 8, 3))
  assert resident.fits(whole, 0.25, mesh)
  assert not resident.fits(whole, 1e-12, mesh)
  assert not resident.fits(TELLING, 0.25, mesh)  # of no known size
