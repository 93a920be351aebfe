import dataclasses
import json
import re
import shutil
import types

import numpy as np
import pytest
from sklearn import neighbors

import instdisc_jax
from instdisc_jax import convert, data, inference, retrieve
from instdisc_jax.data import images as images_lib
from instdisc_jax.runtime import errors, preemption
from instdisc_jax.runtime import workdir as workdir_lib
from instdisc_jax.search import neighbors as neighbors_lib
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
  (i, j, similarity), = page['duplicates']
  assert {page['names'][i], page['names'][j]} == {'copy.jpg', 'redless/04.jpg'}
  assert similarity == pytest.approx(1, abs=1e-4)
  assert len(page['queries']) == page['rows'] == 41  # no run: the folder is searched
  assert (f'{weights}: encoder: resnet10_cifar, width 2, embedding of 128; head fresh' in
          (said := capsys.readouterr().err))
  assert 'represented by pooled, of views of 32 pixels' in said


def test_a_page_of_many_images_has_those_it_shows(trained, tmp_path):
  page_lib.build(instdisc_jax.load(trained[0]), tmp_path / 'page', preemption.Watch(),
                 page_lib.Queries(most=2), neighbors_lib.Limits(full=50, scanned=60, listed=3))
  page, model = _page(tmp_path / 'page'), instdisc_jax.load(trained[0])
  rows = model.fresh(model.dataset.train)
  assert page['rows'] == 128 and 20 <= page['trained'] < 128 and page['scanned'] == 60
  row = lambda i: int(page['names'][i].removeprefix('train '))
  for i in page['queries']:  # searched in the full bank
    embedding = model.embed(model.dataset.test.files[int(page['names'][i].removeprefix('test '))])
    expected = np.sort((embedding @ rows.T)[0])[::-1][:20]
    np.testing.assert_allclose(page['similarity'][i], expected, atol=1e-4)
    np.testing.assert_allclose(
        [rows[row(j)] @ embedding[0] for j in page['neighbors'][i]], expected, atol=1e-4)
  assert len(page['outliers']) == 3


def test_without_held_out_images_the_queries_are_training_images_in_the_full_bank(
    trained, tmp_path, monkeypatch):
  model = instdisc_jax.load(trained[0])
  monkeypatch.setattr(inference.Model, 'dataset', dataclasses.replace(model.dataset, test=None))
  page_lib.build(model, tmp_path / 'page', preemption.Watch(), page_lib.Queries(most=4),
                 neighbors_lib.Limits(full=50, listed=3))
  page, rows = _page(tmp_path / 'page'), model.fresh(model.dataset.train)
  row = lambda i: int(page['names'][i].removeprefix('train '))
  assert len(page['queries']) == 4 and page['trained'] < 128 and page['restricted']
  for i in {*page['queries'], *(i for i, _ in page['outliers'])}:
    assert i not in page['restricted']
    others = np.delete(rows @ rows[row(i)], row(i))
    np.testing.assert_allclose(page['similarity'][i], np.sort(others)[::-1][:20], atol=1e-4)
  for i in page['restricted']:
    on_page = [j for j in range(page['trained']) if j != i]
    expected = np.sort(rows[[row(j) for j in on_page]] @ rows[row(i)])[::-1][:20]
    np.testing.assert_allclose(page['similarity'][i], expected, atol=1e-4)


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
  assert {path.name for path in old.iterdir()} == {'index.html', 'data.js', 'images'}


def test_another_folder_is_not_replaced(trained, tmp_path, capsys):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'index.html').write_text('<html>')
  assert _make(('workdir', trained[0]), ('output', tmp_path / 'mine')) == 2
  assert 'exists and holds more than a page of this command' in capsys.readouterr().err
  assert (tmp_path / 'mine' / 'index.html').read_text() == '<html>'


def test_the_page_works_offline():
  template = page_lib.TEMPLATE.read_text()
  assert not re.search(r'https?:|//[a-z]|@import|fetch\(|XMLHttp', template)
  assert re.findall(r'<script src="(.*?)"', template) == ['data.js']
  assert page_lib.MARK in template


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
  model = types.SimpleNamespace(
      dataset=dataset, bank=vectors[:3000], labels=labels[:3000], class_names=dataset.class_names,
      config=types.SimpleNamespace(seed=0), workdir='w', step=1234,
      embed_all=lambda source: [vectors[3000:]])
  folder = tmp_path_factory.mktemp('big') / 'page'
  assert page_lib.build(model, folder, preemption.Watch()) == 1000
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
  assert page.url.endswith(f'#image={target}')
  again = page.locator('.row .near .image')
  assert again.evaluate_all('x => x.map((b) => Number(b.dataset.id))') == made['neighbors'][target]
  assert page.locator(QUERY).first.get_attribute('data-id') == str(target)
  assert again.first.locator('img').evaluate('x => x.decode().then(() => x.naturalWidth)') == 12
  page.go_back()
  page.wait_for_function('document.querySelectorAll(".row").length > 1')
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
  first, second, _ = made['duplicates'][0]
  ids = page.locator('.row').first.locator('.image').evaluate_all(
      'x => x.map((b) => Number(b.dataset.id))')
  assert ids == [first, second]
  page.keyboard.press('3')
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
  assert page.url.endswith(f'#image={number}')
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
