import csv
import json
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from instdisc_jax import embed
from instdisc_jax.runtime import errors
from instdisc_jax.search import formats, projection
from tests import twins


def _embedded(n=60, dim=16):
  random = np.random.default_rng(0)
  return formats.Embedded(
      np.array([f'a,"{i}".jpg' for i in range(n)]), twins.unit_rows(random, n, dim).astype('f4'),
      np.where(np.arange(n) % 3, np.arange(n), -1).astype(np.int32), ['b', 'a'] * (n // 2))


def _rows(file):
  return list(csv.DictReader(file.open()))


def test_numpy_files(tmp_path):
  found = _embedded()
  formats.write(tmp_path / 'e.npz', found, tmp_path)
  formats.write(tmp_path / 'e.npy', found, tmp_path)
  with np.load(tmp_path / 'e.npz', allow_pickle=False) as file:
    for name in ('path', 'embedding', 'index'):
      np.testing.assert_array_equal(file[name], getattr(found, name))
  np.testing.assert_array_equal(np.load(tmp_path / 'e.npy'), found.embedding)
  rows = _rows(tmp_path / 'e.csv')
  assert [row['path'] for row in rows] == found.path.tolist()
  assert [int(row['index']) for row in rows] == found.index.tolist()
  assert [row['label'] for row in rows] == found.label
  assert sorted(path.name for path in tmp_path.iterdir()) == ['e.csv', 'e.npy', 'e.npz']


@pytest.mark.parametrize('suffix', ['.npy', '.faiss'])
def test_a_table_of_something_else_is_not_replaced(tmp_path, suffix):
  if suffix == '.faiss':
    pytest.importorskip('faiss', reason='faiss is not installed')
  (tmp_path / 'a.csv').write_text('path,label\n')
  with pytest.raises(errors.UserError, match="a.csv' exists, and .* would replace it: set --out"):
    formats.check(tmp_path / f'a{suffix}')
  (tmp_path / 'a.csv').write_text(formats._table(_embedded()))
  formats.check(tmp_path / f'a{suffix}')  # its own, of an earlier call


def test_faiss_finds_the_neighbors(tmp_path):
  faiss = pytest.importorskip('faiss', reason='faiss is not installed')
  found = _embedded()
  formats.write(tmp_path / 'e.faiss', found, tmp_path)
  index = faiss.read_index(str(tmp_path / 'e.faiss'))
  similarity, row = index.search(found.embedding[:5], 3)
  scores = found.embedding[:5] @ found.embedding.T
  np.testing.assert_array_equal(row, np.argsort(-scores, axis=1)[:, :3])
  np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-5)
  assert len(_rows(tmp_path / 'e.csv')) == 60


def test_pandas_reads_the_table(tmp_path):
  pytest.importorskip('pyarrow', reason='pyarrow is not installed')
  pandas = pytest.importorskip('pandas', reason='pandas is not installed')
  found = _embedded()
  formats.write(tmp_path / 'e.parquet', found, tmp_path)
  table = pandas.read_parquet(tmp_path / 'e.parquet')
  assert list(table) == ['path', 'index', 'label', 'prediction', 'confidence', 'embedding', 'x',
                         'y', 'neighbors']
  assert table['path'].tolist() == found.path.tolist() and table['label'].tolist() == found.label
  np.testing.assert_array_equal(np.stack(table['embedding']), found.embedding)
  assert np.isfinite(table[['x', 'y']].to_numpy()).all()
  scores = found.embedding @ found.embedding.T
  for i, near in enumerate(table['neighbors']):
    np.testing.assert_array_equal(near['ids'], np.argsort(-scores[i], kind='stable')[:15])
    np.testing.assert_allclose(near['distances'], 1 - scores[i, near['ids']], atol=1e-5)


def test_classes_that_are_not_utf_8_are_escaped_in_the_table(tmp_path):
  parquet = pytest.importorskip('pyarrow.parquet', reason='pyarrow is not installed')
  found, name = _embedded(), 'caf\udce9'
  some = formats.Embedded(found.path, found.embedding, found.index, [name, 'b'] * 30,
                          {found.path[0]: (name, 0.5)})
  formats.write(tmp_path / 'e.parquet', some, tmp_path)
  table = parquet.read_table(tmp_path / 'e.parquet')
  assert table['label'].to_pylist() == ['caf\\xe9', 'b'] * 30
  assert table['prediction'].to_pylist() == ['caf\\xe9'] + [None] * 59


def test_the_table_s_embeddings_have_a_fixed_size(tmp_path):
  parquet = pytest.importorskip('pyarrow.parquet', reason='pyarrow is not installed')
  for n in (1, 2, 60):
    found = _embedded(60)
    some = formats.Embedded(found.path[:n], found.embedding[:n], found.index[:n], None)
    formats.write(tmp_path / 'e.parquet', some, tmp_path)
    schema = parquet.read_schema(tmp_path / 'e.parquet')
    assert str(schema.field('embedding').type).startswith('fixed_size_list<element: float>[16]')
    assert parquet.read_table(tmp_path / 'e.parquet')['label'].null_count == n


@pytest.mark.slow
def test_embedding_atlas_opens_the_table(tmp_path):
  pytest.importorskip('embedding_atlas', reason='embedding-atlas is not installed')
  pandas = pytest.importorskip('pandas', reason='pandas is not installed')
  found = _embedded()
  formats.write(tmp_path / 'e.parquet', found, tmp_path)
  command = ('e.parquet --x x --y y --neighbors neighbors --text path --degree '
             '--export-application app').split()
  done = subprocess.run([sys.executable, '-m', 'embedding_atlas.cli', *command], cwd=tmp_path,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  props = json.loads((tmp_path / 'app' / 'data' / 'metadata.json').read_text())['props']
  assert props['data']['neighbors'] == 'neighbors' and props['data']['text'] == 'path'
  table = pandas.read_parquet(tmp_path / 'app' / 'data' / 'dataset.parquet')
  assert table['path'].tolist() == found.path.tolist()
  assert (table['out_degree'] == 14).all()  # its own reading of the neighbors, without the image
  near = np.argsort(-found.embedding @ found.embedding.T, axis=1)[:, 1:15]
  np.testing.assert_array_equal(table['in_degree'], np.bincount(near.ravel(), minlength=60))


@pytest.mark.slow
def test_fiftyone_opens_the_table(tmp_path):
  fiftyone = pytest.importorskip('fiftyone', reason='FiftyOne is not installed')
  brain = pytest.importorskip('fiftyone.brain', reason='FiftyOne is not installed')
  pandas = pytest.importorskip('pandas', reason='pandas is not installed')
  found = _embedded()
  for path in found.path:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(tmp_path / path)
  formats.write(tmp_path / 'e.parquet', found, tmp_path)
  table = pandas.read_parquet(tmp_path / 'e.parquet')
  try:
    dataset = fiftyone.Dataset.from_images([str(tmp_path / path) for path in table['path']])
  except fiftyone.core.config.FiftyOneConfigError:
    pytest.skip('FiftyOne has no MongoDB: set FIFTYONE_DATABASE_URI')
  brain.compute_visualization(dataset, points=table[['x', 'y']].to_numpy(), brain_key='map')
  brain.compute_similarity(dataset, embeddings=np.stack(table['embedding']), backend='sklearn',
                           brain_key='like')
  places = dataset.load_brain_results('map').points
  np.testing.assert_allclose(places, table[['x', 'y']].to_numpy())
  near = dataset.sort_by_similarity(dataset.first().id, k=5, brain_key='like')
  expected = np.argsort(-found.embedding @ found.embedding[0])[:5]
  assert {sample.filepath for sample in near} == {str(tmp_path / found.path[i]) for i in expected}
  dataset.delete()


def test_the_command_writes_a_table(trained_folder, tmp_path, capsys):
  parquet = pytest.importorskip('pyarrow.parquet', reason='pyarrow is not installed')
  images, workdir, _ = trained_folder
  for name in ('a.npz', 'a.parquet'):
    assert embed.main([f'--workdir={workdir}', f'--images={images}',
                       f'--output={tmp_path / name}']) == 0
  table = parquet.read_table(tmp_path / 'a.parquet').to_pydict()
  with np.load(tmp_path / 'a.npz') as file:
    np.testing.assert_array_equal(np.array(table['embedding'], np.float32), file['embedding'])
    assert table['path'] == file['path'].tolist() and table['index'] == file['index'].tolist()
  assert table['label'] == [path.split('/')[0] for path in table['path']]


def test_predictions_stand_beside_the_embeddings(trained_folder, tmp_path, capsys):
  parquet = pytest.importorskip('pyarrow.parquet', reason='pyarrow is not installed')
  images, workdir, _ = trained_folder
  known = sorted(str(file.relative_to(images)) for file in images.rglob('*.*'))[0]
  predictions = tmp_path / 'predictions.csv'
  predictions.write_text(f'path,label,confidence\n{known},"a, b",0.75\n')
  for name in ('a.npy', 'a.parquet'):
    assert embed.main([f'--workdir={workdir}', f'--images={images}', f'--output={tmp_path / name}',
                       f'--predictions={predictions}']) == 0
  table = parquet.read_table(tmp_path / 'a.parquet').to_pylist()
  for row, line in zip(table, _rows(tmp_path / 'a.csv'), strict=True):
    expected = ('a, b', 0.75) if row['path'] == known else (None, None)
    assert (row['prediction'], row['confidence']) == expected
    assert (line['prediction'], line['confidence']) == tuple(
        '' if value is None else str(value) for value in expected)
  assert [row['path'] for row in table].count(known) == 1


@pytest.mark.parametrize('suffix', ['.parquet', '.faiss'])
def test_a_missing_package_is_a_user_error(tmp_path, monkeypatch, suffix):
  def absent(name):
    raise ImportError(name)
  monkeypatch.setattr(formats.importlib, 'import_module', absent)
  with pytest.raises(errors.UserError, match='needs a package that is not installed: run pip'):
    formats.check(tmp_path / f'e{suffix}')


@pytest.mark.parametrize('n', [1, 2, 5, 40])
def test_a_map_has_a_place_for_every_image(n):
  place = projection.project(_embedded(60).embedding[:n])
  assert place.shape == (n, 2) and np.isfinite(place).all()
  if n > 2:
    assert place.std(axis=0).max() == pytest.approx(1, abs=1e-5)


def test_a_map_is_computed_once(tmp_path, monkeypatch):
  embedding = _embedded().embedding
  first = projection.project_once(embedding, 0, tmp_path / 'maps')
  assert (projection.project(np.eye(1, 32).repeat(40, axis=0)) == 0).all()  # identical images
  np.testing.assert_array_equal(first, projection.project(embedding, 0))
  monkeypatch.setattr(projection, 'project', lambda embedding, seed: np.full((60, 2), seed))
  np.testing.assert_array_equal(projection.project_once(embedding, 0, tmp_path / 'maps'), first)
  assert (projection.project_once(embedding[::-1], 0, tmp_path / 'maps') == 0).all()
  assert (projection.project_once(embedding, 1, tmp_path / 'maps') == 1).all()


def test_a_map_keeps_clusters_together():
  random = np.random.default_rng(0)
  centers = np.repeat(twins.unit_rows(random, 3, 16), 30, axis=0)
  x = centers + 0.02 * random.standard_normal(centers.shape)
  place = projection.project((x / np.linalg.norm(x, axis=1, keepdims=True)).astype('f4'))
  middle = place.reshape(3, 30, 2).mean(axis=1, keepdims=True)
  spread = np.abs(place.reshape(3, 30, 2) - middle).max()
  apart = min(np.linalg.norm(middle[i] - middle[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
  assert spread < apart / 2
