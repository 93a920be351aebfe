'use strict';
// The views: which is open, its rows, and how one gets from image to image.

const STEP = 25;  // rows drawn at a time
const MOST_DRAWN = 200;  // of a group, or of those selected on the map
const list = $('list'), tabs = [...document.querySelectorAll('[role=tab]')];
let tab = 'queries', rows = [], drawn = 0, place = null;  // place: the image clicked last

function near(images) {
  return make('div', {className: 'near'}, ...images);
}

function neighborsRow(query, note) {
  const share = make('div', {className: 'share'}, note ?? sameClass(query));
  if (note === undefined) share.query = query;
  return make('section', {className: 'row'}, make('div', {}, imageButton(query), share), near(
      PAGE.neighbors[query].map((i, n) => imageButton(i, PAGE.similarity[query][n], query))));
}

function groupRow(group) {
  const pick = make('button', {onclick: () => (setLabeling(true), select(group, true))}, 'Select');
  const size = make('div', {className: 'share'}, images(group.length));
  const more = group.length - MOST_DRAWN;
  return make('section', {className: 'row group'}, make(
      'div', {}, size, ...(PAGE.files ? [pick] : [])), near([
    ...group.slice(0, MOST_DRAWN).map((i) => imageButton(i, nearest[i])),
    ...(more > 0 ? [make('div', {className: 'share'}, `and ${format.format(more)} more`)] : [])]));
}

const row = {
  queries: (i) => neighborsRow(i),
  map: (images) => make('section', {className: 'row chosen'}, near(images.map((i) => imageButton(i)))),
  duplicates: groupRow,
  outliers: ([i, similarity]) => neighborsRow(i, `mean of the nearest: ${similarity.toFixed(3)}`),
  leaks: ([i, j, similarity]) => make(
      'section', {className: 'row pair'}, imageButton(i), imageButton(j, similarity, i)),
};

// Rows of the tab with an image of the chosen class and the words typed.
function matching() {
  const fits = filter();
  if (tab === 'map') return selected.size ? [[...selected].slice(0, MOST_DRAWN)] : [];
  if (tab === 'duplicates') return groups().filter((group) => group.some(fits));
  if (tab === 'outliers') return PAGE.outliers.filter(([i]) => fits(i));
  if (tab === 'leaks') return leaks().filter(([i, j]) => fits(i) || fits(j));
  const queries = PAGE.queries.filter(fits);
  if (!$('search').value.trim()) return queries;
  return [...queries, ...all.filter((i) => !isQuery.has(i) && fits(i))];
}

function summary(one) {
  const page = images(PAGE.trained) + ' on this page';
  const total = images(PAGE.rows, PAGE.searched);
  const among = PAGE.trained < PAGE.rows ? `the ${page}, out of ${total}` : total;
  if (one !== undefined) {
    return `${PAGE.names[one]} and its nearest among ${exact && !exact.has(one) ? among : total}`;
  }
  if (tab === 'map') {
    return `${images(PAGE.x.length)}; similar images are close together` +
        (selected.size > MOST_DRAWN ? `; the first ${MOST_DRAWN} selected are below` : '');
  }
  if (!rows.length) return 'nothing found';
  if (tab === 'duplicates') {
    const grouped = rows.reduce((sum, group) => sum + group.length, 0);
    return `${count(rows.length, 'group', 'groups')}, ${images(grouped)}, ` +
        `the largest first, among ${among}`;
  }
  if (tab === 'outliers') return `${images(rows.length)}, most isolated first, among ${among}`;
  if (tab === 'leaks') {
    const appear = rows.length === 1 ? 'appears' : 'appear';
    return `${images(rows.length, PAGE.queried)} that also ${appear} among the ${total}`;
  }
  const queries = rows.filter((i) => isQuery.has(i)).length;
  const kinds = [[queries, PAGE.queried], [rows.length - queries, `other ${PAGE.searched}`]];
  return kinds.filter(([n]) => n).map(([n, kind]) => images(n, kind)).join(' and ') +
      `, each with its nearest among ${total}`;
}

// Draws rows until they reach well below the window, and at least `least` of them.
function fill(least = 0) {
  while (drawn < rows.length && (
      drawn < least || list.getBoundingClientRect().bottom < 2 * innerHeight)) {
    const part = rows.slice(drawn, drawn + STEP);
    list.append(...part.map(row[tab]));
    drawn += part.length;
  }
}

// Draws what the address names: one query (#image=NAME), or the rows of a tab.
function show() {
  const one = addressed(location.hash);
  for (const t of tabs) t.setAttribute('aria-selected', one === undefined && t.dataset.tab === tab);
  list.className = one === undefined ? tab : 'one';
  list.replaceChildren();
  rows = [], drawn = 0;
  $('map').hidden = one !== undefined || tab !== 'map';
  $('similarities').hidden = one !== undefined || !['duplicates', 'leaks'].includes(tab);
  if (one !== undefined) {
    list.append(neighborsRow(one));
    $('status').textContent = summary(one);
    scrollTo(0, 0);
    list.querySelector('.image').focus({preventScroll: true});
    return;
  }
  rows = matching();
  $('status').textContent = summary();
  if (tab === 'map') map.open();
  else scrollTo(0, 0);
  fill(place ? place.row + 1 : 0);
  const line = place && list.children[place.row];
  if (line) {
    const center = () => line.scrollIntoView({block: 'center'});
    center();
    requestAnimationFrame(() => requestAnimationFrame(center));  // once its size is known
    line.querySelectorAll('.image')[place.at]?.focus({preventScroll: true});
  }
}

// Goes to the address of an image, or to '' for the list.
function go(hash) {
  history.pushState({steps: (history.state?.steps ?? 0) + 1}, '', hash || location.pathname);
  show();
}

function open(name) {
  tab = name, place = null;
  if (location.hash) go('');
  else show();
}

function back() {
  if (history.state?.steps) history.back();
  else if (location.hash) go('');
}

// Focuses the image to the left or right, or the nearest one above or below.
function move(key) {
  const here = document.activeElement.closest('#list .image');
  if (!here) return list.querySelector('.image')?.focus();
  const line = here.closest('.row');
  const around = [line.previousElementSibling, line, line.nextElementSibling].flatMap(
      (x) => x ? [...x.querySelectorAll('.image')] : []);
  const by = {ArrowLeft: -1, ArrowRight: 1}[key];
  if (by) return around[around.indexOf(here) + by]?.focus();
  const from = here.getBoundingClientRect(), down = key === 'ArrowDown';
  const far = (to) => 4 * Math.abs(to.top - from.top) + Math.abs(to.left - from.left);
  around.map((image) => [image, image.getBoundingClientRect()])
      .filter(([, to]) => down ? to.top >= from.bottom - 1 : to.bottom <= from.top + 1)
      .sort(([, a], [, b]) => far(a) - far(b))[0]?.[0].focus();
}

function openImage(image) {
  if (!location.hash) {
    const line = image.closest('.row');
    place = {row: [...list.children].indexOf(line),
             at: [...line.querySelectorAll('.image')].indexOf(image)};
  }
  go(address(Number(image.dataset.id)));
}

function dark(on) {
  document.documentElement.classList.toggle('dark', on);
  map.renew();
}

// The classes to choose from; labels add to them.
function showClasses() {
  const names = [...choices], before = $('class').value;
  $('class').replaceChildren(
      make('option', {value: ''}, 'all classes'),
      ...names.map((name) => make('option', {value: `=${name}`}, name)),
      make('option', {value: '='}, 'without a class'));
  $('class').value = before;
  $('class').hidden = !names.length;
}

$('title').textContent = PAGE.title;
document.title = `${PAGE.title}: nearest neighbors`;
tabs.find((t) => t.dataset.tab === 'leaks').hidden = PAGE.queries.every((i) => i < PAGE.trained);
$('labeling').hidden = !PAGE.files;
showClasses();
for (const t of tabs) t.onclick = () => open(t.dataset.tab);
for (const id of ['search', 'class']) $(id).oninput = () => open(tab);
$('threshold').oninput = () => (showThreshold(), open(tab));
$('theme').onclick = () => dark(!document.documentElement.classList.contains('dark'));
const preferred = matchMedia('(prefers-color-scheme: dark)');
preferred.onchange = () => dark(preferred.matches);
dark(preferred.matches);
list.onclick = (event) => {
  const image = event.target.closest('.image');
  if (!image) return;
  const i = Number(image.dataset.id);
  if (labeling && canLabel(i)) select([i], !selected.has(i));
  else openImage(image);
};
onpopstate = show;
onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = ['INPUT', 'SELECT'].includes(event.target.tagName) && event.target.type !== 'range';
  const image = document.activeElement.closest('#list .image');
  if (event.key === 'Escape') {
    if (typing) event.target.blur();
    if (event.target.matches('#search, #class')) event.target.value = '', open(tab);
    else if (typing) return;
    else if (selected.size) select([...selected], false), tab === 'map' && show();
    else if (location.hash) back();
    else if (labeling) setLabeling(false);
  } else if (typing || event.target.type === 'range') {
    return;
  } else if (event.key === '/') {
    $('search').focus();
  } else if (labeling && /^[0-9]$/.test(event.key)) {
    const label = event.key === '0' ? '' : [...choices][Number(event.key) - 1];
    if (label !== undefined) assign(label);
  } else if (labeling && event.key === 'u') {
    $('undo').click();
  } else if (labeling && event.key === 'Enter' && image) {
    openImage(image);
  } else if (/^[1-5]$/.test(event.key) && !tabs[event.key - 1].hidden) {
    open(tabs[Number(event.key) - 1].dataset.tab);
  } else if (event.key === 'd') {
    $('theme').click();
  } else if (event.key === 'l' && PAGE.files) {
    setLabeling(!labeling);
  } else if (event.key.startsWith('Arrow')) {
    move(event.key);
  } else {
    return;
  }
  event.preventDefault();
};
// What the focus moves to is scrolled clear of the bars that stay in sight.
const header = document.querySelector('header');
const bars = new ResizeObserver(() => {
  const above = getComputedStyle(header).position === 'sticky' ? header.offsetHeight : 0;
  document.documentElement.style.scrollPadding = `${above}px 0 ${$('labels').offsetHeight}px`;
});
for (const bar of [header, $('labels')]) bars.observe(bar);
onscroll = () => fill();
onresize = () => {
  fill();
  if (!$('map').hidden) map.open();
};
show();
