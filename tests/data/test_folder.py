import json
import os

import numpy as np
from PIL import Image
import pytest

from instdisc_jax import config as config_lib
from instdisc_jax import data
from instdisc_jax.data import folder
from instdisc_jax.runtime import errors


def save(path, value=0, size=(12, 10), **kwargs):
  """An image of one gray."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new('RGB', size, (value,) * 3).save(path, **kwargs)


def _load(path, workdir=None, **kwargs):
  config = config_lib.default().dataset
  config.update(name=f'folder:{path}', **kwargs)
  return data.load(config, 0, workdir)


def test_files_are_found_in_sorted_order_whatever_their_names(tmp_path):
  names = ['b/2.png', 'a b/ü 1.JPG', 'a b/日本.webp', 'c/d/e/deep.bmp']
  for i, name in enumerate(names):
    save(tmp_path / name, 50 * i)
  (tmp_path / 'a b' / 'notes.txt').write_text('not an image')
  (tmp_path / '.hidden.jpg').write_text('nor this')
  (tmp_path / 'empty class').mkdir()
  dataset = _load(tmp_path)
  assert dataset.train.names == sorted(names)
  for i, name in enumerate(dataset.train.names):
    image = dataset.train.full(i)
    assert abs(int(image[0, 0, 0]) - 50 * names.index(name)) < 3  # index i is that file
  assert dataset.class_names == ('a b', 'b', 'c')  # the first sub-folders; an empty one is no class
  np.testing.assert_array_equal(dataset.train.labels, [0, 0, 1, 2])


def test_an_image_at_the_root_means_no_labels_unless_there_is_a_list(tmp_path, capsys):
  for name in ('a/1.png', 'b/2.png', '3.png'):
    save(tmp_path / name)
  assert _load(tmp_path).train.labels is None and _load(tmp_path).class_names is None
  (tmp_path / 'labels.csv').write_text('path,label\n3.png,dog\na/1.png,cat\nb/2.png,"dog"\n')
  dataset = _load(tmp_path)
  assert dataset.class_names == ('cat', 'dog')
  assert dict(zip(dataset.train.names, dataset.train.labels)) == {
      '3.png': 1, 'a/1.png': 0, 'b/2.png': 1}
  (tmp_path / 'labels.csv').write_text('3.png,dog\n')
  assert _load(tmp_path).train.labels is None
  assert "no line for 2 of the 3 images (first: 'a/1.png')" in capsys.readouterr().err
  (tmp_path / 'labels.csv').write_text('\ufeffa/1.png,cat\n3.png,dog\nb/2.png,dog\n')
  assert _load(tmp_path).class_names == ('cat', 'dog')
  for more, fault in (('3.png,cat', "labels '3.png' as 'dog' and 'cat', must be one label"),
                      ('3.png,', "has no label for '3.png', must be path,label")):
    (tmp_path / 'labels.csv').write_text(f'a/1.png,cat\n3.png,dog\nb/2.png,dog\n{more}\n')
    with pytest.raises(errors.UserError, match=fault):
      _load(tmp_path)
  (tmp_path / 'labels.csv').write_text('3.png\n')
  with pytest.raises(errors.UserError, match="'3.png' in '.*' has 1 value, must be path,label"):
    _load(tmp_path)


def test_links_are_followed_once_and_loops_end(tmp_path):
  root, outside = tmp_path / 'root', tmp_path / 'outside'
  save(root / 'b' / '1.png')
  save(outside / '2.png')
  (root / 'a_link_within').symlink_to(root / 'b')  # sorts first, but the folder itself wins
  (root / 'b' / 'loop').symlink_to(root)
  (root / 'there').symlink_to(outside)
  (root / 'itself').symlink_to(root / 'itself')
  (outside / 'back').symlink_to(root / 'b')
  assert list(sorted(folder.scan(root))) == ['b/1.png', 'there/2.png']


def test_unreadable_files_are_named_or_left_out(tmp_path):
  images, workdir = tmp_path / 'images', tmp_path / 'run'
  workdir.mkdir()
  for i in range(4):
    save(images / f'{i}.png')
  (images / '0_empty.png').touch()
  (images / '1_text.jpg').write_text('text')
  (images / '2_link.jpg').symlink_to(tmp_path / 'nowhere')
  save(images / '3_cut.jpg', size=(400, 300))
  full = (images / '3_cut.jpg').read_bytes()
  (images / '3_cut.jpg').write_bytes(full[:len(full) // 2])

  found = _load(images).train
  assert len(found) == 8
  for i, message in ((1, "'0_empty.png' is empty: remove it, or set --config.dataset.on_unread"),
                     (3, "'1_text.jpg' is not an image"),
                     (5, "'2_link.jpg' cannot be read .No such file"),
                     (7, "'3_cut.jpg' cannot be decoded .*truncated")):
    with pytest.raises(errors.UserError, match=message):
      found.central(i, 8)

  dataset = _load(images, workdir, on_unreadable='skip')
  assert dataset.train.names == ['0.png', '1.png', '2.png', '3.png']
  folder.keep(dataset.listing, dataset.train.names, workdir)
  assert (workdir / 'unreadable.txt').read_text().splitlines()[0] == '0_empty.png: is empty'
  again = _load(images, workdir, on_unreadable='skip')
  assert again.train.names == dataset.train.names
  assert again.train.fingerprint == dataset.train.fingerprint
  for name in dataset.train.names:
    (images / name).unlink()
  with pytest.raises(errors.UserError, match="none of the images .* can be read .4 found"):
    _load(images, on_unreadable='skip')


def test_a_folder_that_has_changed_is_refused(tmp_path):
  images, workdir = tmp_path / 'images', tmp_path / 'run'
  workdir.mkdir()
  for i in range(4):
    save(images / f'{i}.png')
  dataset = _load(images, workdir)
  folder.keep(dataset.listing, dataset.train.names, workdir)
  before = (workdir / folder.LISTING).read_text()
  save(images / '5.png')
  save(images / '4.png')
  (images / '0.png').unlink()
  save(images / '1.png', 200, (40, 40))
  with pytest.raises(errors.UserError, match=(
      r"2 added \(first: '4.png'\), 1 removed \(first: '0.png'\), 1 changed in size \(first: "
      r"'1.png'\).*--config.model.init=.*run")):
    _load(images, workdir)
  assert (workdir / folder.LISTING).read_text() == before
  (workdir / folder.LISTING).write_text(json.dumps([]))
  with pytest.raises(errors.UserError, match='is not a listing of images'):
    _load(images, workdir)


def test_a_missing_folder_and_one_without_images(tmp_path):
  with pytest.raises(errors.UserError, match="no folder '.*nothing'"):
    _load(tmp_path / 'nothing')
  with pytest.raises(errors.UserError, match='has no images .*set --config.dataset.name=folder:'):
    _load(tmp_path)


def test_a_folder_that_must_not_be_read(tmp_path, monkeypatch):
  save(tmp_path / 'a' / '1.png')

  def denied(path):  # whoever runs the tests may be allowed to read everything
    raise PermissionError(13, 'Permission denied', path)

  monkeypatch.setattr(os, 'scandir', denied)
  with pytest.raises(errors.UserError, match="cannot be read .Permission denied"):
    _load(tmp_path)


class TestValidation:

  def test_the_held_out_share_does_not_depend_on_the_seed(self, tmp_path):
    for i in range(20):
      save(tmp_path / 'images' / f'{i:02}.png')
    dataset = _load(tmp_path / 'images', validation='0.2')
    held_out = set(dataset.test.names)
    assert len(held_out) == 4 and not held_out & set(dataset.train.names)
    assert dataset.train.names == sorted(dataset.train.names) and len(dataset.train) == 16
    save(tmp_path / 'images' / '99.png')
    assert len(held_out & set(_load(tmp_path / 'images', validation='0.2').test.names)) >= 3
    arrays = config_lib.default().dataset
    arrays.update(name='digits', validation='0.1')
    one, other = (data.load(arrays, seed) for seed in (0, 1))
    assert len(one.train) == 1167 and len(one.test) == 130
    np.testing.assert_array_equal(one.test.labels, other.test.labels)

  def test_a_folder_with_the_same_classes(self, tmp_path):
    for name in ('train/cat/1.png', 'train/dog/2.png', 'val/dog/3.png'):
      save(tmp_path / name)
    dataset = _load(tmp_path / 'train', validation=str(tmp_path / 'val'))
    assert dataset.test.names == ['dog/3.png'] and dataset.test.labels.tolist() == [1]
    save(tmp_path / 'val' / 'cow' / '4.png')
    with pytest.raises(errors.UserError, match="dataset.validation is .* the class 'cow'"):
      _load(tmp_path / 'train', validation=str(tmp_path / 'val'))
    save(tmp_path / 'val' / '5.png')
    assert _load(tmp_path / 'train', validation=str(tmp_path / 'val')).test.labels is None

  def test_what_makes_no_sense_is_refused(self, tmp_path):
    config = config_lib.default().dataset
    config.validation = 'val'
    with pytest.raises(errors.UserError, match="dataset.validation is 'val', must be a share"):
      data.load(config, 0)
    save(tmp_path / 'images' / '1.png')
    with pytest.raises(errors.UserError, match='is 0.5 of 1 images, must be a share of at least 3'):
      _load(tmp_path / 'images', validation='0.5')
