'use strict';
// Labels given on this page. The browser keeps them; a labels.csv takes them to `classify`.

const STORE = `instdisc_jax labels ${PAGE.id}`;
const labels = new Map();  // name -> label, of images on this page
const undone = [];  // [[name, its label before], ...] of each change
const present = new Set(PAGE.labels);
// The classes to choose from, in the order of their keys. It only grows: a key keeps its class.
const choices = new Set((PAGE.classes ?? []).filter((_, c) => present.has(c) || PAGE.predicted));
let labeling = false, kept = true;  // kept: whether the browser stores labels

// All that the browser has stored: name -> label, also of images that this page does not show.
function stored() {
  try {
    return new Map(JSON.parse(localStorage.getItem(STORE) ?? '[]'));
  } catch (error) {
    return new Map();
  }
}

function read() {
  labels.clear();
  for (const [name, label] of stored()) {
    if (idOf.get(name) < PAGE.trained) labels.set(name, label), choices.add(label);
  }
}

// Only the images searched can be labeled; another folder may have the same names.
const canLabel = (i) => PAGE.files && i < PAGE.trained;

function labelOf(i) {
  return canLabel(i) ? labels.get(PAGE.names[i]) : undefined;
}

function change(pairs) {
  undone.push(pairs.map(([name]) => [name, labels.get(name)]));
  put(pairs);
}

function put(pairs) {
  const store = stored();  // with what other tabs have stored meanwhile
  for (const [name, label] of pairs) {
    for (const one of [labels, store]) label ? one.set(name, label) : one.delete(name);
    if (label) choices.add(label);
  }
  try {
    localStorage.setItem(STORE, JSON.stringify([...store]));
  } catch (error) {
    kept = false;
  }
  const names = new Set(pairs.map(([name]) => name));
  showChanged(names.size > 1000 ? undefined : new Set([...names].map((name) => idOf.get(name))));
}

function showChanged(changed) {
  renew(changed);
  showLabels();
  showClasses();
  map.renew();
}

function say(text) {
  $('chosen').textContent = kept ? text
      : `${text}; this browser cannot store labels: save labels.csv before you close the page`;
}

// Labels the images selected or, if there are none, the one in focus, and goes on to the next.
// Returns whether there was one.
function assign(label) {
  const here = document.activeElement.closest('#list .image');
  const focused = here ? Number(here.dataset.id) : map.here();
  const ids = (selected.size ? [...selected] : [focused]).filter((i) => i >= 0 && canLabel(i));
  if (!ids.length) {
    say('select an image first');
    return false;
  }
  const advance = here && !selected.size;
  select([...selected], false);
  change(ids.map((i) => [PAGE.names[i], label]));
  if (advance) move('ArrowRight');
  return true;
}

function select(ids, on) {
  for (const i of ids) on ? selected.add(i) : selected.delete(i);
  renew(new Set(ids));
  showLabels();
  map.renew();
}

function showLabels() {
  $('labels').hidden = !labeling;
  $('labeling').setAttribute('aria-pressed', labeling);
  document.body.classList.toggle('labeling', labeling);
  document.querySelector('[data-do=none]').hidden = !selected.size;
  if (!labeling) return;
  const counts = new Map();
  for (const label of labels.values()) counts.set(label, (counts.get(label) ?? 0) + 1);
  say(`${format.format(selected.size)} selected, ${format.format(labels.size)} labeled`);
  $('chips').replaceChildren(...[...choices].map((label, n) => make(
      'button', {onclick: () => assign(label)}, ...(n < 9 ? [make('kbd', {}, n + 1)] : []),
      ` ${label} · ${format.format(counts.get(label) ?? 0)}`)));
}

function setLabeling(on) {
  labeling = on && PAGE.files;
  if (!on) select([...selected], false);
  showLabels();
}

// ---- labels.csv: lines of path,label

const quoted = (text) => /[",\r\n]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
const isText = (name) => !/\p{Surrogate}/u.test(name);

function csv() {
  const lines = [...labels].filter(([name]) => isText(name));
  return ['path,label', ...lines.map((pair) => pair.map(quoted).join(','))].join('\n') + '\n';
}

function parse(text) {
  const rows = [[]];
  for (const [, value, plain, end] of text.replace(/^\ufeff/, '').matchAll(
      /(?:"((?:[^"]|"")*)"|([^,\r\n]*))(,|\r?\n|$)/g)) {
    rows.at(-1).push(value?.replaceAll('""', '"') ?? plain.trim());
    if (end !== ',') rows.push([]);
  }
  return rows.filter((row, n) => row.join() && (n || row.join() !== 'path,label'));
}

function save() {
  const url = URL.createObjectURL(new Blob([csv()], {type: 'text/csv'}));
  make('a', {href: url, download: 'labels.csv'}).click();
  URL.revokeObjectURL(url);
  const lost = [...labels.keys()].filter((name) => !isText(name)).length;
  say(`${count(labels.size - lost, 'label', 'labels')} saved` +
      (lost ? `; ${count(lost, 'name', 'names')} left out, not in UTF-8` : ''));
}

async function load(file) {
  const lines = parse(await file.text());
  const pairs = lines.filter(([, label, more]) => label && more === undefined);
  if (!pairs.length) return say('no labels loaded: the file needs lines of path,label');
  const known = pairs.filter(([name]) => canLabel(idOf.get(name) ?? Infinity));
  if (known.length) change(known);
  const other = pairs.length - known.length, wrong = lines.length - pairs.length;
  say(`${count(known.length, 'label', 'labels')} loaded` +
      (other ? `; ${count(other, 'image is', 'images are')} not on this page` : '') +
      (wrong ? `; ${count(wrong, 'line is', 'lines are')} not path,label` : ''));
}

$('labeling').onclick = () => setLabeling(!labeling);
$('unlabel').onclick = () => assign('');
$('undo').onclick = () => undone.length && put(undone.pop());
$('save').onclick = save;
$('load').onchange = ({target}) => {
  if (target.files[0]) load(target.files[0]);
  target.value = '';  // or the same file could not be chosen again
};
$('new').onkeydown = (event) => {
  const label = event.target.value.trim();
  if (event.key !== 'Enter' || !label) return;
  if (assign(label)) event.target.value = '';
};
onstorage = ({key}) => {  // another tab has stored labels
  if (key !== STORE || !kept) return;
  read();
  showChanged();
};
read();
