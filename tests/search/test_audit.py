import csv
import shutil

import numpy as np
import pytest

from instdisc_jax import audit as command
from instdisc_jax.runtime import errors
from instdisc_jax.search import audit
from tests import planted


@pytest.mark.parametrize('noise, inner', [(0.1, None), (0.02, 10), (0.001, 4)])
def test_planted_groups_and_leaks_are_found_and_nothing_else(noise, inner):
  rows, queries, truth, leaks = planted.draw(noise=noise, inner=inner)
  found = audit.examine(rows, queries)
  assert {frozenset(group) for group in found.groups} == truth
  assert {(i, j) for i, j, _ in found.leaks} >= leaks
  assert all(i < len(leaks) for i, _, _ in found.leaks)
  assert [len(group) for group in found.groups] == sorted(map(len, truth), reverse=True)


@pytest.mark.parametrize('inner', [None, 10, 4])
@pytest.mark.parametrize('seed', range(3))
def test_without_duplicates_there_is_no_group(inner, seed):
  rows, queries, _, _ = planted.draw(groups=0, leaks=0, inner=inner, seed=seed)
  found = audit.examine(rows, queries)
  assert found.groups == [] and found.leaks == [] and found.threshold > found.similarity.max()


@pytest.mark.parametrize('noise', [0.0, 0.02])
@pytest.mark.parametrize('copies', [10, 300, 700, 1000])
def test_duplicates_are_found_however_many_there_are(copies, noise):
  random = np.random.default_rng(copies)
  unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype('f4')
  first = unit(random.normal(size=(1000, 12)) @ random.normal(size=(12, 64)))
  second = unit(first[:copies] + noise / 8 * random.normal(size=(copies, 64)))
  groups = audit.examine(np.concatenate([first, second])).groups
  together = [set(group) for group in groups]
  assert all(any({i, 1000 + i} <= group for group in together) for i in range(copies))
  assert sum(map(len, groups)) <= 2 * copies * 1.02  # by chance, at most one in a hundred


@pytest.mark.parametrize('copies', [8, 52, 100, 900])
def test_copies_of_one_image_hide_no_other_duplicates(copies):
  random = np.random.default_rng(copies)
  unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype('f4')
  rows = unit(random.normal(size=(1000, 32)))
  rows[1:copies] = rows[0]
  near = unit(rows[-10:] + 0.01 * random.normal(size=(10, 32)))
  found = audit.examine(np.concatenate([rows, near]), rows[:1])
  assert {frozenset(group) for group in found.groups} == {
      frozenset(range(copies)), *(frozenset({990 + i, 1000 + i}) for i in range(10))}
  assert [i for i, _, _ in found.leaks] == [0]


def test_among_few_rows_identical_ones_are_duplicates_even_if_nothing_stands_out():
  rows = np.tile(np.eye(4, 32, dtype='f4'), (3, 1))
  assert audit.examine(rows).groups == [[i, i + 4, i + 8] for i in range(4)]


def test_outliers_equal_brute_force():
  rows, _, _, _ = planted.draw(n=203)
  scores = rows.astype('f8') @ rows.T.astype('f8')
  np.fill_diagonal(scores, -np.inf)
  best = np.sort(scores, axis=1)[:, :-6:-1]
  examined = audit.examine(rows)
  np.testing.assert_allclose(examined.crowd, best.mean(axis=1), atol=1e-5)
  np.testing.assert_array_equal(examined.outliers, np.argsort(best.mean(axis=1))[:2])


def test_a_given_threshold_is_used_and_the_largest_file_kept():
  rows, _, truth, _ = planted.draw(n=203, groups=3)
  sizes = np.arange(203)
  for threshold in (0.97, 1.0 + 1e-5):
    found = audit.examine(rows, threshold=threshold, sizes=sizes)
    assert found.threshold == threshold
    assert {frozenset(group) for group in found.groups} == (truth if threshold < 1 else set())
    assert all(group[0] == max(group) for group in found.groups)


def test_a_set_of_copies_is_one_group():
  rows = np.tile(np.eye(1, 32, dtype='f4'), (50, 1))
  assert audit.examine(rows).groups == [list(range(50))]


def test_the_command_finds_copies_in_a_folder(trained_folder, tmp_path, capsys):
  images, workdir, _ = trained_folder
  names = sorted(str(path.relative_to(images)) for path in images.rglob('*.*g'))
  shutil.copytree(images, tmp_path / 'images')
  (tmp_path / 'test').mkdir()
  strange = 'a,"b".png'
  shutil.copy(images / names[4], tmp_path / 'images' / strange)
  shutil.copy(images / names[7], tmp_path / 'test' / 'new.jpg')
  code = command.main([f'--workdir={workdir}', f'--images={tmp_path / "images"}',
                       f'--test={tmp_path / "test"}', f'--output={tmp_path / "out"}',
                       '--threshold=0.999999'])
  assert code == 0
  read = lambda name: list(csv.DictReader((tmp_path / 'out' / name).open()))
  pairs = {frozenset(row['path'] for row in read('duplicates.csv') if row['group'] == group)
           for group in {row['group'] for row in read('duplicates.csv')}}
  assert any({names[4], strange} <= pair for pair in pairs)
  assert [row['keep'] for row in read('duplicates.csv')].count('true') == len(pairs)
  assert read('leaks.csv')[0] | {'similarity': ''} == {
      'path': 'new.jpg', 'repeats': names[7], 'similarity': ''}
  assert read('outliers.csv')[0]['path'] in names
  said = capsys.readouterr().out
  assert 'groups of duplicates' in said
  assert '1 of 1 test images are in the training set, too' in said


def test_the_command_examines_a_run_s_own_images(trained_folder, tmp_path, capsys):
  _, workdir, _ = trained_folder
  assert command.main([f'--workdir={workdir}', f'--output={tmp_path / "out"}']) == 0
  assert 'of 32 images' in (said := capsys.readouterr().out) and 'of 8 test images' in said


def test_a_file_in_the_way_is_a_user_error(tmp_path):
  rows, _, _, _ = planted.draw(n=203, groups=0)
  (tmp_path / 'out').write_text('')
  with pytest.raises(errors.UserError, match='cannot be written'):
    audit.write(tmp_path / 'out', audit.examine(rows), list(map(str, range(203))))
