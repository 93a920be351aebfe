'use strict';
// Groups of duplicates: images connected by similarities at or above a threshold.

const nearest = PAGE.similarity.slice(0, PAGE.trained).map((line) => line[0]);
const BINS = 200;

const threshold = () => Number($('threshold').value);

// [[image, ...]], the largest groups first.
function groups() {
  const least = threshold(), parent = new Int32Array(PAGE.trained).map((_, i) => i);
  const root = (i) => {
    while (parent[i] !== i) i = parent[i] = parent[parent[i]];
    return i;
  };
  for (let i = 0; i < PAGE.trained; i++) {
    for (let n = 0; PAGE.similarity[i][n] >= least; n++) {
      const a = root(i), b = root(PAGE.neighbors[i][n]);
      parent[Math.max(a, b)] = Math.min(a, b);
    }
  }
  const found = new Map();
  for (let i = 0; i < PAGE.trained; i++) {
    if (nearest[i] < least && root(i) === i) continue;
    if (!found.has(root(i))) found.set(root(i), []);
    found.get(root(i)).push(i);
  }
  return [...found.values()].filter((group) => group.length > 1)
      .sort((a, b) => b.length - a.length || a[0] - b[0]);
}

// Queries that repeat an image of the searched ones: [[query, image, similarity]].
const leaks = () => PAGE.queries.filter((i) => i >= PAGE.trained)
    .map((i) => [i, PAGE.neighbors[i][0], PAGE.similarity[i][0]])
    .filter(([, , similarity]) => similarity >= threshold())
    .sort((a, b) => b[2] - a[2]);

// The histogram of the nearest similarities, on a logarithmic scale.
function drawSimilarities() {
  const low = Number($('threshold').min), high = Number($('threshold').max);
  const bins = new Array(BINS).fill(0);
  for (const s of nearest) bins[Math.min(BINS - 1, Math.floor((s - low) / (high - low) * BINS))]++;
  const top = Math.log1p(Math.max(...bins)) || 1;
  document.querySelector('#similarities path').setAttribute('d', bins.map((n, i) => {
    const y = 24 - 24 * Math.log1p(n) / top;
    return `M${i * 100 / BINS} 24V${y}h${100 / BINS}V24z`;
  }).join(''));
}

function showThreshold() {
  const low = Number($('threshold').min), high = Number($('threshold').max);
  const line = document.querySelector('#similarities line');
  for (const x of ['x1', 'x2']) line.setAttribute(x, 100 * (threshold() - low) / (high - low));
  document.querySelector('#similarities output').textContent = threshold() > 1
      ? 'nothing stands out' : `similarity of at least ${threshold().toFixed(3)}`;
}

const chosen = Math.min(PAGE.threshold, 1.001);
let low = Math.min(chosen, 1);
for (const s of nearest) low = Math.min(low, s);
const steps = Math.ceil((chosen - low) * 1000);  // from the lower end to exactly the one chosen
Object.assign($('threshold'), {
  min: (chosen - steps / 1000).toFixed(6), max: 1.001, value: chosen});
drawSimilarities();
showThreshold();
