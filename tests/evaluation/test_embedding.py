import functools

import jax
import numpy as np
import pytest

from instdisc_jax import data
from instdisc_jax.data import Images, arrays
from instdisc_jax.evaluation import embedding
from instdisc_jax.runtime import errors
from instdisc_jax.runtime import mesh as mesh_lib
from instdisc_jax.training import state as state_lib
from tests import programs
from tests.conftest import small_config, smooth_images

N = 37  # no device count divides it
NAMES = 'conv2', 'pooled', embedding.EMBEDDING


def _config(size):
  config = small_config()
  config.augment.size = size
  config.dataset.workers = 0
  return config


@functools.cache
def _variables():
  encoder = state_lib.create_encoder(_config(None))
  return encoder.init(jax.random.key(0), np.zeros((1, 16, 16, 3)), train=False)


def _engine(num_devices, size=16, **kwargs):
  config, mesh = _config(size), mesh_lib.make(jax.devices()[:num_devices])
  return embedding.Engine(config, state_lib.create_encoder(config), mesh, **kwargs)


def _files(images):
  """Like files on disk: one image after the other, of any sizes."""
  return Images(list(images), None, '', names=[f'{i}.png' for i in range(len(images))])


MEMORY = arrays.in_memory(smooth_images(N, 24, 20), None)
MIXED = _files([smooth_images(i + 1, 20 + i, 30)[i] for i in range(N)])
# {kind: (images, augment.size)}
KINDS = {'in memory': (MEMORY, 16), 'cropped on the host': (MIXED, 16),
         'files as they are': (_files(MEMORY.files), None), 'in memory as they are': (MEMORY, None)}


def _all(engine, images, first=0):
  parts = list(engine.run(_variables(), images, NAMES, first=first))
  return {name: np.concatenate([part[name] for part in parts]) for name in NAMES}


@functools.cache
def _on_one_device(kind):
  images, size = KINDS[kind]
  return _all(_engine(1, size), images)


@pytest.mark.parametrize('num_devices', [3, 8])
@pytest.mark.parametrize('kind', KINDS)
def test_features_are_those_of_one_device(kind, num_devices):
  images, size = KINDS[kind]
  expected, found = _on_one_device(kind), _all(_engine(num_devices, size), images)
  for name in NAMES:
    assert len(expected[name]) == N and np.std(expected[name], axis=0).max() > 1e-3
    np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(found['embedding'], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_features_are_those_of_each_image_alone(kind):
  images, size = KINDS[kind]
  engine = _engine(1, size)
  for i in (0, 17, N - 1):
    alone = engine.embed(_variables(), images.subset(np.array([i]), 'one'))
    np.testing.assert_allclose(alone, _on_one_device(kind)['embedding'][i:i + 1], atol=1e-6)


@pytest.mark.parametrize('kind', ['in memory', 'cropped on the host'])
def test_the_engine_resumes_at_any_image(kind):
  images, size = KINDS[kind]
  engine = _engine(2, size)
  for first in (1, 16, N - 1):
    found = _all(engine, images, first)
    for name in NAMES:
      np.testing.assert_allclose(found[name], _on_one_device(kind)[name][first:], atol=1e-6)
  assert not list(engine.run(_variables(), images, first=N))


def test_results_come_in_order_in_several_chunks():
  images = Images(_Repeated(MIXED.files, 900), None, '')
  parts = [part['embedding'] for part in _engine(2).run(_variables(), images)]
  assert [len(part) for part in parts] == [512, 388]
  expected = _on_one_device('cropped on the host')['embedding'][np.arange(900) % N]
  np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-6)


class _Repeated:
  """The same files again and again."""

  def __init__(self, files, count):
    self._files, self._count = files, count

  def __len__(self):
    return self._count

  def __getitem__(self, i):
    return self._files[i % len(self._files)]


def test_central_views_of_all_images_come_in_order():
  images = _files([np.full((20 + i, 30, 3), 5 * i, np.uint8) for i in range(21)])
  views = _engine(2).views(images, 16)
  assert views.shape == (21, 16, 16, 3) and views.dtype == np.uint8
  np.testing.assert_array_equal(views[:, 8, 8, 0], 5 * np.arange(21))


class _Traced:
  """An encoder that counts how often it is traced, and so compiled."""

  def __init__(self, encoder):
    self._encoder, self.traces = encoder, 0

  def apply(self, *args, **kwargs):
    self.traces += 1
    return self._encoder.apply(*args, **kwargs)


@pytest.mark.parametrize('kind', ['in memory', 'cropped on the host'])
def test_one_program_is_compiled_for_many_calls(kind):
  images, size = KINDS[kind]
  config = _config(size)
  encoder = _Traced(state_lib.create_encoder(config))
  engine = embedding.Engine(config, encoder, mesh_lib.make(jax.devices()[:2]))
  first = engine.embed(_variables(), images)
  for _ in range(2):
    np.testing.assert_array_equal(engine.embed(_variables(), images), first)
  fewer = engine.embed(_variables(), images.subset(np.arange(35), 'a chunk of the same size'))
  np.testing.assert_allclose(fewer, first[:35], atol=1e-6)
  assert encoder.traces == 1


def test_the_compiled_program_uses_all_devices():
  config, mesh = _config(16), mesh_lib.make()
  program = embedding.encode(config, state_lib.create_encoder(config), mesh, (16, 16),
                             (embedding.EMBEDDING,))
  images = mesh_lib.place_local(MEMORY.files[:16], mesh, np.arange(16), 16)
  compiled = program.lower(_variables(), images).compile()
  (_, given), _ = compiled.input_shardings
  made = compiled.output_shardings[embedding.EMBEDDING]
  for sharding in (given, made):
    assert sharding.num_devices == mesh.size == 8 and not sharding.is_fully_replicated
  text = compiled.as_text()
  assert 'num_partitions=8' in text
  # Each device encodes its own images, and nothing is exchanged.
  assert not any(f' {kind}' in text for kind in (
      'all-gather', 'all-reduce', 'all-to-all', 'collective-permute'))


def test_the_check_is_called_between_chunks_and_ends_the_work():
  calls = []

  def check():
    calls.append(None)
    if len(calls) == 2:
      raise errors.Stopped('stopped')

  engine, images = _engine(1, check=check), Images(_Repeated(MIXED.files, 700), None, '')
  parts = engine.run(_variables(), images)
  assert len(next(parts)['embedding']) == 256
  with pytest.raises(errors.Stopped):
    list(parts)


def test_images_of_several_sizes_are_refused_where_none_is_cropped():
  images = _files([*MEMORY.files[:5], np.zeros((9, 8, 3), np.uint8)])
  with pytest.raises(errors.UserError,
                     match="'5.png' has 9 x 8 pixels, must be 24 x 20 like '0.png'"):
    _engine(1, None).embed(_variables(), images)


def test_no_images_have_no_embeddings():
  none = arrays.in_memory(MEMORY.files[:0], None)
  assert _engine(1).embed(_variables(), none).shape == (0, 16)


def test_a_streamed_run_sees_the_host_s_central_views_of_an_array():
  streamed = data.Dataset('arrays', MEMORY, MEMORY).kept('stream')
  views = np.stack([MEMORY.central(i, 16) for i in range(N)])
  expected = _all(_engine(1), arrays.in_memory(views, None))
  for images in (streamed.train, streamed.test):
    found = _all(_engine(1), images)
    for name in NAMES:
      np.testing.assert_array_equal(found[name], expected[name])
  on_the_device = _all(_engine(1), data.Dataset('arrays', MEMORY).kept('resident').train)
  assert np.abs(on_the_device['embedding'] - expected['embedding']).max() > 1e-5  # not rounded


@pytest.mark.parametrize('num_devices, kind, chunk', [
    (1, 'in memory', 256), (3, 'in memory', 2), (8, 'cropped on the host', 256),
    pytest.param(8, 'in memory', 2, marks=pytest.mark.slow),
    pytest.param(3, 'cropped on the host', 2, marks=pytest.mark.slow)])
def test_fresh_rows_are_the_embeddings_each_on_its_own_device(monkeypatch, num_devices, kind,
                                                              chunk):
  monkeypatch.setattr(embedding, '_CHUNK', chunk)
  images, size = KINDS[kind]
  rows = _engine(num_devices, size).rows(_variables(), images)[embedding.EMBEDDING]
  expected = _on_one_device(kind)['embedding']
  assert rows.shape[0] == mesh_lib.padded(N, num_devices)
  assert {shard.data.shape[0] for shard in rows.addressable_shards} == {len(rows) // num_devices}
  np.testing.assert_allclose(rows[:N], expected, atol=1e-6)
  assert not np.asarray(rows)[N:].any()


def test_writing_fresh_rows_communicates_nothing_and_copies_nothing():
  mesh = mesh_lib.make()
  rows, chunk = (jax.ShapeDtypeStruct((8 * n, 16), np.float32, sharding=jax.NamedSharding(
      mesh, jax.P(mesh_lib.AXIS))) for n in (10_000, 4))
  compiled = embedding.write_rows(mesh).lower(rows, chunk, 0, 79_999).compile()
  assert programs.collective_values(compiled.as_text()) == 0
  assert compiled.memory_analysis().alias_size_in_bytes == 10_000 * 16 * 4
