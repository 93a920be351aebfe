import dataclasses
import json
import re
import shutil
import types
from urllib import parse

import numpy as np
import pytest
from sklearn import neighbors

import instdisc_jax
from instdisc_jax import convert, data, inference, retrieve
from instdisc_jax.data import images as images_lib
from instdisc_jax.runtime import errors, preemption
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.search import labeling, projection
from instdisc_jax.search import page as page_lib
from tests.conftest import write_images


def _page(folder):
  text = (folder / 'data.js').read_text()
  assert text.startswith('const PAGE = ') and text.endswith(';\n')
  return json.loads(text[len('const PAGE = '):-2])


def _make(*arguments):
  return retrieve.main([f'--{name}={value}' for name, value in arguments])


def test_the_neighbors_are_scikit_learn_s_brute_force(trained, tmp_path):
  workdir, _, config = trained
  assert _make(('workdir', workdir), ('output', tmp_path / 'page'), ('queries', 100)) == 0
  page, model = _page(tmp_path / 'page'), instdisc_jax.load(workdir)
  rows = model.fresh(model.dataset.train)
  assert len(page['queries']) == 100 and page['rows'] == page['trained'] == 128
  assert page['searched'] == 'training images'
  chosen = [int(page['names'][i].removeprefix('test ')) for i in page['queries']]
  assert chosen[0] == 0 and chosen[-1] == 499  # spread over all those held out
  embedding = model.embed(model.dataset.test.files[chosen])
  brute = neighbors.NearestNeighbors(n_neighbors=20, metric='cosine', algorithm='brute')
  distance, row = brute.fit(rows).kneighbors(embedding)
  for i, expected, far in zip(page['queries'], row, distance):
    np.testing.assert_allclose(page['similarity'][i], 1 - far, atol=1e-4)
    assert len({*page['neighbors'][i]} - {*expected.tolist()}) <= 1  # a tie at the end
  distance, row = brute.fit(rows).kneighbors()  # without the own row
  for i in range(128):
    np.testing.assert_allclose(page['similarity'][i], 1 - distance[i], atol=1e-4)
    assert i not in page['neighbors'][i]
  assert page['outliers'][0][0] == np.argmax(distance[:, :5].mean(axis=1))
  assert page['labels'][:128] == model.labels.tolist()
  assert len(list((tmp_path / 'page' / 'images').iterdir())) == 228


def test_images_of_a_folder_are_the_queries(trained_folder, tmp_path):
  _, workdir, _ = trained_folder
  write_images(tmp_path / 'other')
  (tmp_path / 'other' / 'redless').rename(tmp_path / 'other' / 'unknown')
  (tmp_path / 'page').mkdir()  # an empty folder may be used
  (tmp_path / 'page.partial').mkdir()  # and a folder of such a name is not ours
  arguments = (('workdir', workdir), ('images', tmp_path / 'other'), ('output', tmp_path / 'page'))
  assert _make(*arguments) == 0 and _make(*arguments) == 0  # and the page is made again
  page = _page(tmp_path / 'page')
  labels = {page['names'][i]: page['labels'][i] for i in page['queries']}
  assert len(labels) == 40
  for name, label in labels.items():
    assert label == (0 if name.startswith('greenless') else -1)  # the run has no class 'unknown'
  assert {path.name for path in tmp_path.iterdir()} == {'other', 'page', 'page.partial'}


def test_only_what_stands_out_is_a_duplicate(trained_folder, tmp_path, capsys):
  pytest.importorskip('safetensors', reason='safetensors is not installed')
  images, workdir, _ = trained_folder
  shutil.copytree(images, tmp_path / 'images')
  shutil.copy(tmp_path / 'images' / 'redless' / '04.jpg', tmp_path / 'images' / 'copy.jpg')
  weights = tmp_path / 'weights.safetensors'
  assert convert.main([f'--workdir={workdir}', f'--to={weights}']) == 0
  assert _make(('workdir', weights), ('images', tmp_path / 'images'),
               ('output', tmp_path / 'page')) == 0
  page = _page(tmp_path / 'page')
  alike = {page['names'][i]: page['names'][near[0]]
           for i, (near, values) in enumerate(zip(page['neighbors'], page['similarity']))
           if values[0] >= page['threshold']}
  assert alike == {'copy.jpg': 'redless/04.jpg', 'redless/04.jpg': 'copy.jpg'}
  assert len(page['queries']) == page['rows'] == 41  # no run: the folder is searched
  assert (f'{weights}: encoder: resnet10_cifar, width 2, embedding of 128; head fresh' in
          (said := capsys.readouterr().err))
  assert 'represented by pooled, of views of 24 pixels' in said  # as in the run


def test_weights_without_a_run_search_a_folder_of_more_than_one_image(trained_folder, tmp_path):
  model = types.SimpleNamespace(was_trained=False)
  searched, asked = page_lib._open(page_lib.Queries(str(trained_folder[0])), model)
  assert (searched.noun, asked.title, asked.images) == ('images', 'images', None)
  (tmp_path / 'one').mkdir()
  shutil.copy(trained_folder[0] / 'redless' / '04.jpg', tmp_path / 'one')
  with pytest.raises(errors.UserError, match='/one. holds one image, which has no') as raised:
    page_lib._open(page_lib.Queries(str(tmp_path / 'one')), model)
  assert raised.value.setting == '--images'


def test_labels_are_kept_for_a_folder_wherever_it_is_named_from(trained_folder, tmp_path,
                                                                monkeypatch):
  dataset, places = inference.load(trained_folder[1]).dataset, []
  for project in tmp_path / 'one', tmp_path / 'two':
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv('HOME', str(project))
    for name in project / 'images', 'images', '~/images':
      model = types.SimpleNamespace(was_trained=True, step=1, class_names=['a', 'b'],
                                    dataset=dataclasses.replace(dataset, name=f'folder:{name}'))
      places.append(page_lib._open(page_lib.Queries(), model)[0].place)
  assert [len({*places[:3]}), len({*places[3:]}), len({*places})] == [1, 1, 2]


def _row(page, i):
  return int(page['names'][i].removeprefix('train '))


def test_a_page_of_many_images_has_some_and_the_nearest_of_its_queries_among_all(trained, tmp_path):
  model = instdisc_jax.load(trained[0])
  built = page_lib.build(model, tmp_path / 'page', preemption.Watch(), page_lib.Queries(most=2),
                         page_lib.Limits(shown=50, outliers=3))
  page, rows = _page(tmp_path / 'page'), model.fresh(model.dataset.train)
  assert built == page_lib.Built(2, page['trained'], 128) and 50 < page['trained'] < 128
  assert [_row(page, i) for i in range(50)] == np.linspace(0, 127, 50).round().tolist()
  assert page['exact'] == page['queries']
  for i in page['queries']:
    embedding = model.embed(model.dataset.test.files[int(page['names'][i].removeprefix('test '))])
    expected = np.sort((embedding @ rows.T)[0])[::-1][:20]
    np.testing.assert_allclose(page['similarity'][i], expected, atol=1e-4)
    np.testing.assert_allclose(
        [rows[_row(page, j)] @ embedding[0] for j in page['neighbors'][i]], expected, atol=1e-4)
  on_page = rows[[_row(page, j) for j in range(page['trained'])]]
  for i in range(page['trained']):  # among the evenly spread, or all on the page
    among = np.delete(on_page if i >= 50 else on_page[:50], i, axis=0)
    expected = np.sort(among @ on_page[i])[::-1][:20]
    np.testing.assert_allclose(page['similarity'][i], expected, atol=1e-4)
  assert len(page['outliers']) == 3 and len(page['x']) == page['trained'] + 2


def test_a_page_that_is_cut_says_so(trained, tmp_path, monkeypatch, capsys):
  limits, build = page_lib.Limits(shown=50), page_lib.build
  monkeypatch.setattr(page_lib, 'build', lambda *args, **kwargs: build(
      *args, limits=limits, **kwargs))
  assert _make(('workdir', trained[0]), ('output', tmp_path / 'page'), ('queries', 2)) == 0
  shown = _page(tmp_path / 'page')['trained']
  assert (f'the page shows {shown} of 128 images, evenly spread; its queries have their nearest '
          'among all of them, and audit examines them all') in capsys.readouterr().err


def test_without_held_out_images_the_queries_are_training_images(trained, tmp_path, monkeypatch):
  model = instdisc_jax.load(trained[0])
  monkeypatch.setattr(inference.Model, 'dataset', dataclasses.replace(model.dataset, test=None))
  page_lib.build(model, tmp_path / 'page', preemption.Watch(), page_lib.Queries(most=4),
                 page_lib.Limits(shown=50))
  page, rows = _page(tmp_path / 'page'), model.fresh(model.dataset.train)
  assert len(page['queries']) == 4 and page['trained'] < 128 and page['exact'] == page['queries']
  for i in page['queries']:
    others = np.delete(rows @ rows[_row(page, i)], _row(page, i))
    np.testing.assert_allclose(page['similarity'][i], np.sort(others)[::-1][:20], atol=1e-4)


def test_a_test_image_that_is_among_the_training_images_is_a_query(trained_folder, tmp_path):
  images, workdir, _ = trained_folder
  write_images(tmp_path / 'test', seed=7)
  known = instdisc_jax.load(workdir).dataset.train.names[5]
  shutil.copy(images / known, tmp_path / 'test' / f'copy-of-{known[-6:]}')
  assert _make(('workdir', workdir), ('images', tmp_path / 'test'), ('queries', 1),
               ('output', tmp_path / 'page')) == 0
  page = _page(tmp_path / 'page')
  leaks = [i for i in page['queries'] if page['similarity'][i][0] >= page['threshold']]
  assert [page['names'][i] for i in leaks] == [f'copy-of-{known[-6:]}']
  assert page['names'][page['neighbors'][leaks[0]][0]] == known


def test_predictions_are_shown(trained_folder, tmp_path, capsys):
  _, workdir, _ = trained_folder
  table = tmp_path / 'predictions.csv'
  known = instdisc_jax.load(workdir).dataset.train.names[5]
  table.write_text(f'path,label,confidence,given\n{known},odd,0.75,false\nheld-out.jpg,odd,1,true\n')
  arguments = (('workdir', workdir), ('output', tmp_path / 'page'), ('predictions', table))
  assert _make(*arguments) == 0
  page = _page(tmp_path / 'page')
  (i,), = np.nonzero(np.array(page['predicted']) >= 0)
  assert page['names'][i] == known and page['confidence'][i] == 0.75
  assert page['classes'] == ['greenless', 'redless', 'odd'] and page['predicted'][i] == 2
  for text in ('path,label,confidence\nother.jpg,odd,0.5\n', f'path,label\n{known},odd\n',
               f'path,label,confidence\n{known},odd,high\n'):
    table.write_text(text)
    assert _make(*arguments) == 2
    assert 'set --predictions to ' in capsys.readouterr().err


def test_a_workdir_that_does_not_know_its_images_is_named(trained, tmp_path):
  shutil.copytree(trained[0], tmp_path / 'run')
  settings, _ = workdir_lib.read(trained[0])
  of_model = {key: value for key, value in settings.items() if key.startswith('model.')}
  workdir_lib.write(tmp_path / 'run', of_model, None)
  model = instdisc_jax.load(tmp_path / 'run')
  with pytest.raises(errors.UserError,
                     match='holds weights without the images they were trained on: '):
    page_lib.build(model, tmp_path / 'page', preemption.Watch())


def test_a_bank_whose_images_are_gone_is_named(trained_folder, tmp_path, capsys):
  shutil.copytree(trained_folder[1], tmp_path / 'run')
  settings, fingerprint = workdir_lib.read(tmp_path / 'run')
  gone = {'dataset.name': f'folder:{tmp_path / "gone"}'}
  workdir_lib.write(tmp_path / 'run', settings | gone, fingerprint)
  assert _make(('workdir', tmp_path / 'run'), ('output', tmp_path / 'page')) == 2
  assert capsys.readouterr().err == (
      f"error: no folder '{tmp_path / 'gone'}': restore the images that the run was trained on\n")


def test_other_files_in_a_page_s_folder_are_kept(trained, tmp_path, capsys):
  page = tmp_path / 'page'
  assert _make(('workdir', trained[0]), ('output', page), ('queries', 2)) == 0
  (page / '.DS_Store').write_text('')  # those of operating systems do not matter
  assert _make(('workdir', trained[0]), ('output', page), ('queries', 2)) == 0
  (page / 'notes.txt').write_text('mine')
  assert _make(('workdir', trained[0]), ('output', page), ('queries', 2)) == 2
  assert 'holds more than a page of this command' in capsys.readouterr().err
  assert (page / 'notes.txt').read_text() == 'mine'


def test_an_unreadable_image_is_named_with_what_to_do(trained_folder, tmp_path, capsys):
  write_images(tmp_path / 'other')
  (tmp_path / 'other' / 'redless' / 'bad.jpg').write_text('text')
  arguments = (('workdir', trained_folder[1]), ('images', tmp_path / 'other'),
               ('output', tmp_path / 'page'))
  assert _make(*arguments) == 2
  error = capsys.readouterr().err
  assert 'bad.jpg' in error and 'set --on_unreadable=skip' in error and error.count('\n') == 1
  assert [path.name for path in tmp_path.iterdir()] == ['other']


def test_a_page_of_an_earlier_version_is_replaced(trained, tmp_path):
  old = tmp_path / 'page'
  (old / 'pictures').mkdir(parents=True)
  (old / 'index.html').write_text(f'<!DOCTYPE html>{page_lib.MARK}')
  (old / 'data.js').write_text('')
  assert _make(('workdir', trained[0]), ('output', old), ('queries', 2)) == 0
  assert {path.name for path in old.iterdir()} == {
      'data.js', 'images', *(file.name for file in page_lib.STATIC.iterdir())}


def test_another_folder_is_not_replaced(trained, tmp_path, capsys):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'index.html').write_text('<html>')
  assert _make(('workdir', trained[0]), ('output', tmp_path / 'mine')) == 2
  assert 'exists and holds more than a page of this command' in capsys.readouterr().err
  assert (tmp_path / 'mine' / 'index.html').read_text() == '<html>'


def test_the_page_works_offline():
  texts = {file.name: file.read_text() for file in page_lib.STATIC.iterdir()}
  for text in texts.values():
    assert not re.search(r'https?:|//[a-z]|@import|fetch\(|XMLHttp', text)
  index = texts.pop('index.html')
  loaded = re.findall(r'<script src="(.*?)"|rel="stylesheet" href="(.*?)"', index)
  assert {name for pair in loaded for name in pair if name} == {'data.js', *texts}
  assert page_lib.MARK in index


QUERY = '.row > div:not(.near) > .image'
ODD = ['<img src=x onerror=alert(1)>.png', '"\'`;&amp;.png', 'a#b?c%20d.png', '日本.png',
       '\udcff.png', '</script><script>alert(2)</script>.png']


@pytest.fixture(scope='module')
def big_page(tmp_path_factory):
  """1,000 queries to 3,000 random vectors of 10 classes, some with odd names."""
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (4000, 12, 12, 3), dtype=np.uint8)
  labels = random.integers(0, 10, 4000)
  vectors = random.standard_normal((4000, 16)).astype(np.float32) + np.eye(16)[labels] * 4
  vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
  names = [f'kind{label}/{i}.png' for i, label in enumerate(labels)]
  names[3000:3000 + len(ODD)] = ODD
  part = lambda a, b: images_lib.Images(images[a:b], labels[a:b], str(a), names=names[a:b])
  dataset = data.Dataset('random', part(0, 3000), part(3000, 4000),
                         tuple(f'kind {i}' for i in range(10)))
  vectors[11:14], vectors[3017] = vectors[10], vectors[40]  # duplicates, and a leak
  model = types.SimpleNamespace(
      dataset=dataset, labels=labels[:3000], class_names=dataset.class_names, was_trained=True,
      config=types.SimpleNamespace(seed=0), workdir='w', maps=None, step=1234,
      fresh=lambda source: vectors[:3000] if source is dataset.train else vectors[3000:])
  folder = tmp_path_factory.mktemp('big') / 'page'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(projection, '_MOST_TSNE', 1000)  # it would take most of the time
    assert page_lib.build(model, folder, preemption.Watch()) == page_lib.Built(1000, 3000, 3000)
  return folder


@pytest.fixture(scope='module')
def browser():
  sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
  chromium = shutil.which('chromium')
  if chromium is None:
    pytest.skip('chromium is not installed: apt-get install chromium')
  with sync_api.sync_playwright() as playwright:
    # root, as in a container, has no sandbox
    browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
    yield browser
    browser.close()


@pytest.fixture
def visit(browser, big_page):
  """(width, color scheme) -> the page; at the end, nothing was reported or requested elsewhere."""
  contexts, reported, requested = [], [], []

  def open_page(width=1600, scheme='light'):
    contexts.append(browser.new_context(viewport={'width': width, 'height': 900},
                                        color_scheme=scheme))
    page = contexts[-1].new_page()
    page.on('console', lambda message: reported.append(message.text))
    page.on('pageerror', lambda error: reported.append(str(error)))
    page.on('dialog', lambda dialog: reported.append(dialog.message) or dialog.dismiss())
    page.on('request', lambda request: requested.append(request.url))
    page.goto((big_page / 'index.html').as_uri())
    return page

  yield open_page
  for context in contexts:
    context.close()
  assert not reported
  assert requested
  assert all(url.startswith((big_page.as_uri(), 'data:,')) for url in requested)


@pytest.mark.slow
@pytest.mark.parametrize('width, scheme', [(400, 'dark'), (1600, 'light')])
def test_a_click_on_a_neighbor_makes_it_the_query(visit, big_page, width, scheme):
  page, made = visit(width, scheme), _page(big_page)
  query = made['queries'][0]
  shown = page.locator('.row').first.locator('.near .image')
  assert shown.evaluate_all('x => x.map((b) => Number(b.dataset.id))') == made['neighbors'][query]
  values = shown.locator('.value').all_text_contents()
  for value, similarity, i in zip(values, made['similarity'][query], made['neighbors'][query]):
    agrees = made['labels'][i] == made['labels'][query]
    assert value == f'{"✓" if agrees else "✗"} {similarity:.3f}'
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  target = made['neighbors'][query][3]
  shown.nth(3).click()
  assert page.url.endswith(f'#image={parse.quote(made["names"][target], safe="")}')
  again = page.locator('.row .near .image')
  assert again.evaluate_all('x => x.map((b) => Number(b.dataset.id))') == made['neighbors'][target]
  assert page.locator(QUERY).first.get_attribute('data-id') == str(target)
  assert again.first.locator('img').evaluate('x => x.decode().then(() => x.naturalWidth)') == 12
  page.go_back()
  page.wait_for_function('document.querySelectorAll(".row").length > 1')
  page.keyboard.press('l')
  page.evaluate('scrollTo(0, 0)')
  page.locator('.row .image').first.focus()
  for key in ['ArrowDown'] * 12 + ['1'] * 60 + ['ArrowUp'] * 40:  # the bars cover none of them
    page.keyboard.press(key)
    seen = page.evaluate("""() => {
      const box = document.activeElement.getBoundingClientRect();
      return [box.top + 5, box.bottom - 5].every((y) => document.activeElement.contains(
          document.elementFromPoint(box.left + box.width / 2, y)));
    }""")
    assert seen, key
  page.evaluate('localStorage.clear()')
  dark = page.evaluate('getComputedStyle(document.body).backgroundColor')
  assert (dark == 'rgb(255, 255, 255)') == (scheme == 'light')
  page.get_by_label('light or dark').click()
  assert page.evaluate('getComputedStyle(document.body).backgroundColor') != dark


@pytest.mark.slow
def test_odd_file_names_are_text_and_can_be_found(visit):
  page = visit()
  names = page.locator(f'{QUERY} .name')
  expected = ODD
  assert names.evaluate_all(f'x => x.slice(0, {len(ODD)}).map((s) => s.textContent)') == expected
  assert page.locator('main img[src="x"]').count() == 0
  page.keyboard.press('/')
  page.keyboard.type('onerror')
  assert names.all_text_contents() == [ODD[0]]


@pytest.mark.slow
def test_search_tabs_and_keys(visit, big_page):
  page, made = visit(), _page(big_page)
  page.get_by_label('class', exact=True).select_option('kind 3')
  count = sum(made['labels'][i] == 3 for i in made['queries'])
  assert page.locator('#status').inner_text().startswith(f'{count} held-out images, each')
  page.get_by_label('search by class or file name').fill('kind3')
  named = ['kind3' in name for name in made['names']]
  count = sum(named[i] for i in made['queries'])
  other = sum(named) - count
  start = f'{count} held-out images and {other} other training images, each'
  assert page.locator('#status').inner_text().startswith(start)
  page.get_by_label('search by class or file name').fill('/17.png')  # a training image
  found = page.locator(f'{QUERY} .name').all_text_contents()
  assert found == ([made['names'][17]] if made['labels'][17] == 3 else [])
  page.keyboard.press('Escape')
  page.get_by_label('class', exact=True).select_option('all classes')
  page.evaluate('document.activeElement.blur()')
  page.keyboard.press('2')
  assert page.locator('#map canvas').is_visible()
  page.keyboard.press('4')
  ids = page.locator(QUERY).evaluate_all('x => x.map((b) => Number(b.dataset.id))')
  assert ids[:20] == [i for i, _ in made['outliers'][:20]]
  page.keyboard.press('1')
  for key in ('ArrowRight', 'ArrowRight', 'ArrowRight'):
    page.keyboard.press(key)
  focused = page.evaluate('Number(document.activeElement.dataset.id)')
  assert focused == made['neighbors'][made['queries'][0]][1]
  page.keyboard.press('ArrowDown')
  assert page.evaluate('Number(document.activeElement.dataset.id)') != focused
  page.keyboard.press('Enter')
  assert '#image=' in page.url
  page.keyboard.press('l')
  new = page.get_by_label('another class', exact=True)
  new.fill('odd')
  new.press('Enter')  # nothing is selected
  page.keyboard.press('Escape')
  assert new.input_value() == 'odd'
  assert '#image=' in page.url
  page.keyboard.press('l')
  page.keyboard.press('Escape')
  page.wait_for_function('document.querySelectorAll(".row").length > 1')


@pytest.mark.slow
def test_a_thousand_queries_are_drawn_as_they_are_scrolled_to(visit):
  page = visit()
  assert page.locator('.row').count() < 200
  page.wait_for_function('''() => {
    scrollTo(0, document.body.scrollHeight);
    return document.querySelectorAll('.row').length === 1000;
  }''', timeout=60_000)
  # From the middle of it to an image and back: the same row, the same image in focus.
  page.evaluate('document.querySelectorAll(".row")[500].scrollIntoView({block: "center"})')
  image = page.locator('.row').nth(500).locator('.near .image').nth(4)
  number = image.get_attribute('data-id')
  image.click()
  assert '#image=' in page.url
  page.keyboard.press('Escape')
  page.wait_for_function('document.querySelectorAll(".row").length > 1')
  page.wait_for_function("""(number) => {
    const line = document.querySelectorAll('.row')[500], box = line?.getBoundingClientRect();
    return line?.contains(document.activeElement) && document.activeElement.dataset.id === number
        && box.top >= 0 && box.bottom <= innerHeight;
  }""", arg=number)
  page.keyboard.press('ArrowDown')
  assert page.evaluate("""() => [...document.querySelectorAll('.row')].indexOf(
      document.activeElement.closest('.row'))""") in (500, 501)


IDS = 'x => x.map((b) => Number(b.dataset.id))'


@pytest.mark.slow
def test_duplicates_are_groups_at_a_threshold_that_can_be_moved(visit, big_page):
  page, made = visit(), _page(big_page)
  page.keyboard.press('3')
  assert page.locator('.row').count() == 1
  assert page.locator('.row .image').evaluate_all(IDS) == [10, 11, 12, 13]
  assert page.locator('#status').inner_text().startswith('1 group, 4 images')
  assert float(page.locator('#threshold').input_value()) == made['threshold'] < 1
  assert page.locator('#similarities output').inner_text() == (
      f'similarity of at least {made["threshold"]:.3f}')
  nearest = np.array([line[0] for line in made['similarity'][:3000]])
  threshold = np.sort(nearest)[-40]
  page.locator('#threshold').evaluate(
      "(x, value) => { x.value = value; x.dispatchEvent(new Event('input')); }",
      float(np.ceil(threshold * 1000) / 1000))
  found = float(page.locator('#threshold').input_value())
  expected = {i for i in range(3000) if nearest[i] >= found}
  shown = page.locator('.row .image').evaluate_all(IDS)
  assert len(shown) == len(set(shown)) and expected <= set(shown) and len(expected) > 10
  page.locator('#threshold').press('Home')
  first = page.locator('.row').first
  assert first.locator('.share').all_text_contents() == ['3,000 images', 'and 2,800 more']
  assert first.locator('.image').count() == 200
  page.keyboard.press('5')  # does not reach the page while the slider has the focus
  page.evaluate('document.activeElement.blur()')


@pytest.mark.slow
def test_a_query_that_is_among_the_images_searched_is_a_leak(visit):
  page = visit()
  page.keyboard.press('5')
  assert page.locator('.row .image').evaluate_all(IDS) == [3017, 40]
  assert page.locator('#status').inner_text() == (
      '1 held-out image that also appears among the 3,000 training images')


@pytest.mark.slow
def test_an_address_names_an_image_or_its_number(visit, big_page):
  page, made = visit(), _page(big_page)
  for i in (17, 3000, 3004):  # the last has a name that is not UTF-8
    page.evaluate('(i) => go(address(i))', i)
    assert page.locator(QUERY).first.get_attribute('data-id') == str(i)
    assert ('#image=' in page.url) == (i != 3004)
  page.goto((big_page / 'index.html').as_uri() + '#image=' + parse.quote(made['names'][40]))
  page.reload()
  assert page.locator(QUERY).first.get_attribute('data-id') == '40'
  page.goto((big_page / 'index.html').as_uri() + '#image=%FF')  # of no image: the list
  page.reload()
  assert page.locator('.row').count() > 1


@pytest.mark.slow
def test_a_label_renews_the_share_of_the_same_class(visit, big_page):
  page, made = visit(), _page(big_page)
  query = made['queries'][0]
  share = page.locator('.row .share').first
  labels = made['labels'][query], [made['labels'][i] for i in made['neighbors'][query]]
  right = labels[1].count(labels[0])
  assert share.inner_text() == f'same class: {right} of 20'
  at = labels[1].index(labels[0])
  page.evaluate("(i) => change([[PAGE.names[i], 'odd']])", made['neighbors'][query][at])
  assert share.inner_text() == f'same class: {right - 1} of 20'
  page.evaluate('localStorage.clear()')


@pytest.mark.slow
def test_labels_are_given_kept_saved_and_read_again(visit, big_page, tmp_path):
  page, made = visit(), _page(big_page)
  page.keyboard.press('3')
  page.get_by_role('button', name='Select', exact=True).click()
  assert page.locator('#chosen').inner_text() == '4 selected, 0 labeled'
  page.get_by_label('another class').fill('a "new", class')
  page.get_by_label('another class').press('Enter')
  assert page.locator('#chosen').inner_text() == '0 selected, 4 labeled'
  assert page.locator('.row .class.mine').all_text_contents() == ['a "new", class'] * 4
  page.evaluate('document.activeElement.blur()')
  page.locator('.row .image').nth(1).focus()
  page.keyboard.press('3')  # the third class, for the image in focus
  assert page.locator('.row .class').all_text_contents()[1] == 'kind 2'
  assert page.evaluate('Number(document.activeElement.dataset.id)') == 12  # goes on
  page.keyboard.press('0')
  assert page.locator('#chosen').inner_text() == '0 selected, 3 labeled'
  page.keyboard.press('u')
  assert page.locator('#chosen').inner_text() == '0 selected, 4 labeled'
  page.evaluate("change([[PAGE.names[20], 'rare']]), change([[PAGE.names[20], 'b']])")
  page.get_by_label('class', exact=True).select_option('b')
  page.evaluate('document.activeElement.blur()')
  page.keyboard.press('u')
  page.keyboard.press('u')
  assert page.locator('#chosen').inner_text() == '0 selected, 4 labeled'
  assert page.get_by_label('class', exact=True).input_value() == '=b'
  assert [text.partition(' · ')[0].strip() for text in
          page.locator('#chips button').all_text_contents()[10:]] == ['a "new", class', 'rare', 'b']
  page.keyboard.press('Escape')
  page.reload()  # they are kept
  page.keyboard.press('l')
  assert page.locator('#chosen').inner_text() == '0 selected, 4 labeled'
  with page.expect_download() as download:
    page.get_by_role('button', name='Save labels.csv').click()
  file = tmp_path / 'labels.csv'
  download.value.save_as(file)
  rows, given = labeling.read(file, made['names'], '/')
  assert rows.tolist() == [10, 11, 12, 13]
  assert given == ['a "new", class', 'kind 2', 'a "new", class', 'a "new", class']
  for _ in range(4):
    page.evaluate("select([10, 11, 12, 13], true), assign('')")
  assert page.locator('#chosen').inner_text() == '0 selected, 0 labeled'
  text, given = file.read_text(), page.get_by_label('Load labels.csv')
  for content, said in (
      (text, '4 labels loaded'),
      (f'{text}elsewhere.png,x\n{made["names"][10]},\n',
       '4 labels loaded; 1 image is not on this page; 1 line is not path,label'),
      (text.replace(',', ';'), 'no labels loaded: the file needs lines of path,label')):
    file.write_text(content)
    given.set_input_files(file)
    page.wait_for_function("(said) => $('chosen').textContent === said", arg=said)
    assert given.input_value() == ''  # so that the same file may be chosen again
    assert page.evaluate('labels.size') == 4
  page.get_by_label('class', exact=True).select_option('a "new", class')
  page.evaluate("open('map')")
  page.evaluate("open('outliers')")
  page.evaluate('localStorage.clear()')


@pytest.mark.slow
def test_labels_of_other_tabs_and_other_images_are_kept(visit):
  page = visit()
  page.evaluate("localStorage.setItem(STORE, JSON.stringify([['elsewhere.png', 'x']]))")
  page.reload()
  other = page.context.new_page()
  other.goto(page.url)
  page.evaluate("change([[PAGE.names[1], 'a']])")
  other.wait_for_function('labels.size === 1')  # the other tab shows it
  page.evaluate('onstorage = null')  # this one does not hear of the other, as when both are quick
  other.evaluate("change([[PAGE.names[2], 'b']])")
  page.wait_for_function('stored().size === 3')
  page.evaluate("change([[PAGE.names[3], 'c']])")
  assert page.evaluate('[...stored().values()].join()') == 'x,a,b,c'
  page.evaluate("""() => {
    Storage.prototype.setItem = () => { throw new Error('full'); };
    setLabeling(true), change([[PAGE.names[4], 'd']]);
  }""")
  assert page.locator('#chosen').inner_text().endswith(
      ' labeled; this browser cannot store labels: save labels.csv before you close the page')
  page.evaluate('localStorage.clear()')


@pytest.mark.slow
@pytest.mark.parametrize('width, scheme', [(400, 'dark'), (1600, 'light')])
def test_the_map_is_zoomed_and_images_on_it_selected(visit, big_page, width, scheme):
  page, made = visit(width, scheme), _page(big_page)
  page.keyboard.press('2')
  canvas = page.locator('#map canvas')
  assert page.locator('#status').inner_text().startswith('4,000 images')
  assert page.locator('#legend li').count() == 10
  canvas.focus()
  page.keyboard.press('ArrowRight')  # the image in the middle
  name = page.locator('#status').inner_text().rpartition(', ')[0]
  image = made['names'].index(name)
  assert page.locator('#tip').inner_text().startswith(name)
  before = canvas.evaluate('x => x.toDataURL()')
  for _ in range(4):
    page.keyboard.press('+')
  page.wait_for_function(
      "(before) => document.querySelector('#map canvas').toDataURL() !== before", arg=before)
  tip = page.locator('#tip').bounding_box()
  page.mouse.click(tip['x'] - 16, tip['y'] - 16, button='right')
  assert '#image=' not in page.url
  canvas.focus()
  page.keyboard.press('ArrowRight')
  image = made['names'].index(page.locator('#status').inner_text().rpartition(', ')[0])
  page.keyboard.press('Space')
  assert page.locator('#chosen').inner_text().startswith('1 selected')
  assert page.evaluate('[...selected]') == [image]
  page.keyboard.press('Escape')
  page.get_by_role('button', name='Show all').click()
  box = canvas.bounding_box()
  corners = [(box['x'] + a * box['width'], box['y'] + b * (300 - a * 4))
             for a, b in ((0.01, 0.01), (0.6, 0.01), (0.6, 1), (0.01, 1))]
  page.get_by_role('button', name='Lasso').click()
  page.mouse.move(*corners[0])
  page.mouse.down()
  for corner in (*corners[1:], corners[0]):
    page.mouse.move(*corner, steps=3)
  page.mouse.up()
  chosen = page.evaluate('[...selected]')
  assert page.locator('#chosen').inner_text().startswith(f'{len(chosen):,} selected')
  assert 0 < len(chosen) < 4000
  right = max(made['x'][i] for i in chosen)
  low = min(made['y'][i] for i in chosen)
  inside = [i for i in range(4000) if made['x'][i] < right - 0.05 and made['y'][i] > low + 0.05]
  assert set(inside) <= set(chosen)
  assert page.locator('.chosen .image').count() == min(200, len(chosen))
  page.get_by_role('button', name='Select none').click()
  assert page.locator('.chosen .image').count() == 0
  page.get_by_role('button', name='Lasso').click()
  page.get_by_label('class', exact=True).select_option('kind 3')
  page.evaluate('document.activeElement.blur()')
  page.keyboard.press('l')
  canvas.focus()
  page.keyboard.press('ArrowRight')
  assert page.locator('#status').inner_text().endswith(', kind 3')  # the others are hidden
  page.keyboard.press('Enter')
  assert '#image=kind3' in page.url
  assert page.evaluate('document.documentElement.scrollWidth') <= width


@pytest.mark.slow
def test_images_that_are_not_files_are_not_labeled(visit):
  page = visit()
  page.evaluate('PAGE.files = false, open("duplicates")')
  assert page.get_by_role('button', name='Select', exact=True).count() == 0
  page.keyboard.press('l')
  page.keyboard.press('2')
  page.locator('#map canvas').focus()
  page.keyboard.press('ArrowRight')
  page.keyboard.press('Space')
  assert page.locator('#labels').is_hidden()
