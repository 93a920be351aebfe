import csv
import os
import pathlib
import re

import numpy as np
import pytest

from instdisc_jax import classify, inference
from instdisc_jax.runtime import errors
from instdisc_jax.search import labeling
from tests import twins


def _labels(folder, names, label=lambda name: name.split('/')[0]):
  file = folder / 'labels.csv'
  with file.open('w', newline='') as lines:
    csv.writer(lines).writerows([('path', 'label'), *((name, label(name)) for name in names)])
  return file


def _names(images):
  return sorted(str(path.relative_to(images)) for path in images.rglob('*.*g'))


def _run(workdir, labels, tmp_path, *arguments):
  output = tmp_path / 'predictions.csv'
  code = classify.main([f'--workdir={workdir}', f'--labels={labels}', f'--output={output}',
                        *arguments])
  rows = list(csv.DictReader(output.open())) if output.exists() else []
  return code, {row['path']: row for row in rows}


def test_the_command_labels_every_image(trained_folder, tmp_path, capsys):
  images, workdir, _ = trained_folder
  names = _names(images)
  code, rows = _run(workdir, _labels(tmp_path, names[::3]), tmp_path, '--suggest=5')
  assert code == 0 and list(rows) == names
  for name, row in rows.items():
    assert row['given'] == ('true' if name in names[::3] else 'false')
    assert row['label'] in ('greenless', 'redless') and 0 <= float(row['confidence']) <= 1
    assert row['nearest_1'] in names[::3]
    assert float(row['similarity_1']) >= float(row['similarity_3'])
  for name in names[::3]:
    assert rows[name]['label'] == name.split('/')[0] and float(rows[name]['confidence']) == 1
    assert rows[name]['nearest_1'] == name
  suggested = (tmp_path / 'predictions-suggested.csv').read_text().splitlines()
  assert suggested[0] == 'path' and len(set(suggested[1:])) == 5
  assert not set(suggested[1:]) & set(names[::3])
  shown = capsys.readouterr().out
  assert '40 images, 14 of them labeled, 2 classes' in shown
  assert re.search(r'accuracy by leave-one-out: [01]\.\d+ with 14 labels \(raw pixels: [01]\.\d+\)',
                   shown)
  assert '5 images worth labeling next' in shown


def test_labels_added_to_the_suggestions_are_not_overwritten(trained_folder, tmp_path, capsys):
  images, workdir, _ = trained_folder
  names, old = _names(images), tmp_path / 'predictions-suggested.csv'
  labels = _labels(tmp_path, names[::3])
  old.write_text('path\n"a, b.png"\n')  # of an earlier call
  assert _run(workdir, labels, tmp_path, '--suggest=2')[0] == 0
  for text in 'path,label\n1.png,cat\n', 'path\n1.png,cat\n2.png\n', 'name\n1.png\n':
    old.write_text(text)
    assert _run(workdir, labels, tmp_path, '--suggest=2')[0] == 2
    assert "-suggested.csv' exists and holds more than suggestions" in capsys.readouterr().err
    assert old.read_text() == text
  assert _run(workdir, labels, tmp_path)[0] == 0  # which suggests nothing
  assert old.read_text() == text


def test_a_file_beside_the_images_and_other_images(trained_folder, tmp_path):
  images, workdir, _ = trained_folder
  (tmp_path / 'some').mkdir()
  for name in _names(images)[:12]:
    label, file = name.split('/')
    (tmp_path / 'some' / f'{label},"{file}').write_bytes((images / name).read_bytes())
  for i, name in enumerate(_names(images)[-12:]):
    (tmp_path / 'some' / f'{i} {name.split("/")[1]}').write_bytes((images / name).read_bytes())
  names = _names(tmp_path / 'some')
  label = lambda name: 'one, "quoted"' if ',' in name else 'other'
  labels = _labels(tmp_path / 'some', [str(tmp_path / 'some' / n) for n in names[::2]],
                   label=lambda path: label(pathlib.Path(path).name))
  code, rows = _run(workdir, labels, tmp_path, f'--images={tmp_path / "some"}', '--method=linear')
  assert code == 0 and list(rows) == names
  assert all(rows[name]['label'] == label(name) for name in names[::2])


def test_the_same_in_python(trained_folder, tmp_path):
  images, workdir, _ = trained_folder
  names = _names(images)
  _, rows = _run(workdir, _labels(tmp_path, names[::3]), tmp_path)
  model = inference.load(workdir)
  labeled = model.fit_labels({images / name: name.split('/')[0] for name in names[::3]})
  paths = [images / name for name in names if name not in names[::3]]
  found, details = labeled.predict(paths)
  assert found == [rows[str(path.relative_to(images))]['label'] for path in paths]
  labeled.save(tmp_path / 'labels.npz')
  again, restored = model.load_labels(tmp_path / 'labels.npz').predict(paths)
  assert again == found
  np.testing.assert_array_equal(restored.confidence, details.confidence)


def test_raw_pixels_that_are_better_are_told(trained_folder, tmp_path, monkeypatch, capsys):
  images, workdir, _ = trained_folder
  random = np.random.default_rng(0)
  monkeypatch.setattr(inference.Model, 'fresh', lambda *_: (
      twins.unit_rows(random, 40, 16).astype(np.float32)))
  assert _run(workdir, _labels(tmp_path, _names(images)[::2]), tmp_path)[0] == 0
  assert 'warning: raw pixels reach' in capsys.readouterr().err


def test_a_run_on_other_data_needs_a_folder(trained, tmp_path, capsys):
  assert _run(trained[0], _labels(tmp_path, ['a.png']), tmp_path)[0] == 2
  assert 'was not trained on a folder of images: set --images' in capsys.readouterr().err


@pytest.mark.parametrize('text, words', [
    ('', "has no labels, must be lines of path,label"),
    ('path,label\n', "has no labels, must be lines of path,label"),
    ('x.png,a\n', "line 1 of '.*' names 'x.png', must be one of the 2 images"),
    ('path,label\na.png,dog\n\na.png,cat\n', "labels 'a.png' as 'dog' and 'cat'"),
    ('a.png\n', "line 1 of '.*' has 1 value, must be path,label"),
    ('a.png,\n', "line 1 of '.*' has no label")])
def test_wrong_labels_are_user_errors(tmp_path, text, words):
  (tmp_path / 'l.csv').write_text(text)
  with pytest.raises(errors.UserError, match=words):
    labeling.read(tmp_path / 'l.csv', ['a.png', 'b.png'], '/images')


def test_absolute_paths_and_repeated_lines_are_accepted(tmp_path):
  (tmp_path / 'l.csv').write_text('\ufeffpath,label\n/images/b/c.png, dog \nb/c.png,dog\n', 'utf8')
  rows, labels = labeling.read(tmp_path / 'l.csv', ['a.png', 'b/c.png'], '/images')
  assert rows.tolist() == [1] and labels == ['dog']


def test_a_name_may_begin_with_a_space_and_be_no_utf_8(tmp_path):
  names = [' a.png', os.fsdecode(b'x\xe9.png')]
  file = tmp_path / 'labels.csv'
  file.write_text('path,label\n" a.png", cat\n')
  rows, labels = labeling.read(file, names, str(tmp_path))
  assert (rows.tolist(), labels) == ([0], ['cat'])
  file.write_bytes(b'path,label,confidence\nx\xe9.png,dog,0.5\n')
  assert labeling.read_predictions(file) == {names[1]: ('dog', 0.5)}
