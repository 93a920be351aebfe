'use strict';
// What all views share: the images of PAGE (see data.js), and images as buttons.

const $ = (id) => document.getElementById(id);
const format = new Intl.NumberFormat('en');
const count = (n, one, many) => `${format.format(n)} ${n === 1 ? one : many}`;
const images = (n, kind = 'images') => count(n, kind.replace('images', 'image'), kind);
const all = PAGE.names.map((_, i) => i);  // every image: those searched first, then other queries
const isQuery = new Set(PAGE.queries);
const exact = PAGE.exact && new Set(PAGE.exact);  // whose neighbors are among all that there are
const selected = new Set();

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const named = (list, i) => list && list[i] >= 0 ? PAGE.classes[list[i]] : '';

// The class of an image: as labeled on this page, or as its folder says; '' if it is not known.
const className = (i) => labelOf(i) ?? named(PAGE.labels, i);

function predicted(i) {
  const name = named(PAGE.predicted, i);
  return name && `${name}? ${PAGE.confidence[i].toFixed(2)}`;
}

// (image) -> whether it has the class chosen and the words typed.
function filter() {
  const words = $('search').value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = $('class').value;  // '' for all, '=NAME' for a class, '=' for none
  if (!words.length && !wanted) return () => true;
  const text = (i) => `${PAGE.names[i]} ${className(i)} ${predicted(i)}`.toLowerCase();
  return (i) => (!wanted || `=${className(i)}` === wanted) &&
      (!words.length || words.every((word) => text(i).includes(word)));
}

// An image as a button; beside a query, also whether the classes agree.
function imageButton(i, similarity, query) {
  const known = query !== undefined && className(i) && className(query);
  const right = known && className(i) === className(query);
  const mark = known ? (right ? '✓ ' : '✗ ') : '';
  const img = make('img', {src: `images/${i}.webp`, loading: 'lazy', alt: ''});
  img.onload = () => img.classList.toggle('small', img.naturalWidth <= 64);
  const value = similarity === undefined ? '' : similarity.toFixed(3);
  const mine = labelOf(i) !== undefined;
  const texts = [['value', mark + value], [mine ? 'class mine' : 'class', className(i)],
                 ['predicted', predicted(i)], ['name', PAGE.names[i]]].filter(([, text]) => text);
  const button = make(
      'button', {className: `image ${known ? (right ? 'right' : 'wrong') : ''}`,
                 title: [PAGE.names[i], className(i), predicted(i), value].filter(Boolean).join('\n')},
      img, ...texts.map(([kind, text]) => make('span', {className: kind}, text)));
  button.dataset.id = i;
  Object.assign(button, {similarity, query});
  button.setAttribute('aria-label', [
    PAGE.names[i], className(i), predicted(i), value && `similarity ${value}`,
    known ? (right ? 'same class' : 'another class') : ''].filter(Boolean).join(', '));
  if (selected.has(i)) button.setAttribute('aria-pressed', true);
  return button;
}

function sameClass(query) {
  const counted = PAGE.neighbors[query].filter((i) => className(i));
  const right = counted.filter((i) => className(i) === className(query)).length;
  return className(query) && counted.length ? `same class: ${right} of ${counted.length}` : '';
}

// Draws the buttons of some images again, or of all, once their labels or the selection changed.
function renew(changed) {
  const shares = new Set();
  for (const old of document.querySelectorAll('#list .image')) {
    if (changed && !changed.has(Number(old.dataset.id)) && !changed.has(old.query)) continue;
    const focused = old === document.activeElement;
    const button = imageButton(Number(old.dataset.id), old.similarity, old.query);
    old.replaceWith(button);
    if (focused) button.focus({preventScroll: true});
    shares.add(button.closest('.row').querySelector('.share'));
  }
  for (const share of shares) {
    if (share?.query !== undefined) share.textContent = sameClass(share.query);
  }
}

// The address of an image: its name, which outlives the page, or its number where that is not one.
const idOf = new Map();
for (const i of all) if (!idOf.has(PAGE.names[i])) idOf.set(PAGE.names[i], i);

function address(i) {
  try {
    if (idOf.get(PAGE.names[i]) === i) return `#image=${encodeURIComponent(PAGE.names[i])}`;
  } catch (URIError) {}  // not UTF-8
  return `#number=${i}`;
}

function addressed(hash) {
  const [, kind, value] = /^#(image|number)=(.*)$/.exec(hash) ?? [];
  try {
    const i = kind === 'image' ? idOf.get(decodeURIComponent(value)) : Number(value);
    return kind && PAGE.names[i] !== undefined ? i : undefined;
  } catch (URIError) {}
}
