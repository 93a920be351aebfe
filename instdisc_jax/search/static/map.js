'use strict';
// The map: every image at its place in a projection to two dimensions, on a canvas.

const map = (() => {
  const MOST_PICTURES = 200, MOST_DISCS = 3000;  // in sight; beyond, points are small squares
  const PICTURE = 44, REACH = 14;  // in CSS pixels
  const LIGHT = [0x4477aa, 0xee6677, 0x228833, 0xccbb44, 0x66ccee, 0xaa3377, 0x994455, 0x997700,
                 0x004488, 0x77aadd, 0xee8866, 0x44bb99, 0xbbcc33, 0xaaaa00, 0xffaabb, 0x99ddff];
  const canvas = document.querySelector('#map canvas'), context = canvas.getContext('2d');
  const x = Float32Array.from(PAGE.x), y = Float32Array.from(PAGE.y), n = x.length;
  const pictures = new Map();  // image -> Image, the last used ones
  const pointers = new Map();  // id -> [x, y], those that are down
  let scale = 1, left = 0, top = 0, ratio = 1;  // place -> CSS pixels
  let lasso = null, lassoing = false, moved = 0, cursor = -1, waiting = false, fitted = false;
  let color = new Uint32Array(n), shown = new Uint8Array(n).fill(1);

  const px = (i) => x[i] * scale + left, py = (i) => -y[i] * scale + top;
  const css = (rgb) => `#${rgb.toString(16).padStart(6, '0')}`;
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

  function fit() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < n; i++) {
      x0 = Math.min(x0, x[i]), x1 = Math.max(x1, x[i]);
      y0 = Math.min(y0, y[i]), y1 = Math.max(y1, y[i]);
    }
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    scale = 0.92 * Math.min(width / (x1 - x0 || 1), height / (y1 - y0 || 1));
    left = width / 2 - scale * (x0 + x1) / 2, top = height / 2 + scale * (y0 + y1) / 2;
    draw();
  }

  function zoom(factor, cx = canvas.clientWidth / 2, cy = canvas.clientHeight / 2) {
    left = cx - factor * (cx - left), top = cy - factor * (cy - top), scale *= factor;
    draw();
    if (cursor >= 0) tip(cursor);
  }

  const middle = () => cursor < 0 ? [] : [px(cursor), py(cursor)];

  function resize() {
    ratio = devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio, canvas.height = canvas.clientHeight * ratio;
  }

  // Colors by class or prediction, a legend of them, and which images fit the filter.
  function classify() {
    const of = {class: className, predicted: (i) => named(PAGE.predicted, i)}[$('color').value];
    const counts = new Map(), fits = filter();
    const faint = parseInt(variable('--faint').trim().slice(1), 16);
    for (let i = 0; i < n; i++) {
      shown[i] = fits(i);
      const name = of ? of(i) : '';
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    const order = of ? [...counts.keys()].filter(Boolean).sort((a, b) => counts.get(b) - counts.get(a))
                     : [];
    const known = new Map(order.slice(0, LIGHT.length).map((name, k) => [name, LIGHT[k]]));
    for (let i = 0; i < n; i++) color[i] = known.get(of ? of(i) : '') ?? faint;
    const item = (name, rgb, number) => make('li', {}, make(
        'i', {style: `background:${css(rgb)}`}), `${name} · ${format.format(number)}`);
    const rest = n - order.slice(0, LIGHT.length).reduce((sum, name) => sum + counts.get(name), 0);
    $('legend').replaceChildren(
        ...[...known].map(([name, rgb]) => item(name, rgb, counts.get(name))),
        ...(known.size && rest ? [item(order.length > known.size ? 'others' : 'unknown', faint, rest)]
                               : []));
  }

  function visible() {
    const found = [], [width, height] = [canvas.clientWidth, canvas.clientHeight];
    for (let i = 0; i < n; i++) {
      const a = px(i), b = py(i);
      if (shown[i] && a > -20 && a < width + 20 && b > -20 && b < height + 20) found.push(i);
    }
    return found;
  }

  function draw() {
    if (waiting || $('map').hidden) return;
    waiting = true;
    requestAnimationFrame(paint);
  }

  function paint() {
    waiting = false;
    const found = visible();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (found.length > MOST_DISCS) paintPixels(found);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (found.length <= MOST_PICTURES) found.forEach(paintPicture);
    else if (found.length <= MOST_DISCS) found.forEach((i) => paintDisc(i, 3.5, css(color[i])));
    const ink = variable('--ink');
    context.lineWidth = 2;
    const chosen = found.length > MOST_PICTURES ? found.filter((i) => selected.has(i)) : [];
    if (chosen.length <= MOST_DISCS) chosen.forEach((i) => paintRing(i, ink));
    if (cursor >= 0 && document.activeElement === canvas) paintRing(cursor, variable('--focus'), 9);
    if (lasso) {
      context.strokeStyle = ink;
      context.beginPath();
      lasso.forEach(([a, b]) => context.lineTo(a, b));
      context.closePath();
      context.stroke();
    }
  }

  // Squares of pixels, written into memory: 100,000 of them within a frame. Those selected have the
  // color of text, for there may be too many to draw a ring around each.
  function paintPixels(found) {
    const {width, height} = canvas, image = context.createImageData(width, height);
    const ink = parseInt(variable('--ink').trim().slice(1), 16);
    const pixels = new Uint32Array(image.data.buffer);
    const side = Math.max(1, Math.round((found.length > 30000 ? 2 : 3) * ratio));
    for (const i of found) {
      const rgb = selected.has(i) ? ink : color[i];
      const packed = 0xff000000 | (rgb & 0xff) << 16 | rgb & 0xff00 | rgb >> 16;
      const a = Math.round(px(i) * ratio), b = Math.round(py(i) * ratio);
      if (a < 0 || b < 0 || a + side > width || b + side > height) continue;
      for (let v = b; v < b + side; v++) pixels.fill(packed, v * width + a, v * width + a + side);
    }
    context.putImageData(image, 0, 0);
  }

  function paintDisc(i, radius, style) {
    context.fillStyle = style;
    context.beginPath();
    context.arc(px(i), py(i), radius, 0, 2 * Math.PI);
    context.fill();
  }

  function paintRing(i, style, radius = 6) {
    context.strokeStyle = style;
    context.beginPath();
    context.arc(px(i), py(i), radius, 0, 2 * Math.PI);
    context.stroke();
  }

  function paintPicture(i) {
    const picture = pictureOf(i);
    if (!picture.complete || !picture.naturalWidth) return paintDisc(i, 4, css(color[i]));
    const shrink = PICTURE / Math.max(picture.naturalWidth, picture.naturalHeight);
    const [w, h] = [picture.naturalWidth * shrink, picture.naturalHeight * shrink];
    context.imageSmoothingEnabled = shrink < 1;
    const edge = selected.has(i) ? 5 : 2;
    context.fillStyle = selected.has(i) ? variable('--focus') : css(color[i]);
    context.fillRect(px(i) - w / 2 - edge, py(i) - h / 2 - edge, w + 2 * edge, h + 2 * edge);
    context.drawImage(picture, px(i) - w / 2, py(i) - h / 2, w, h);
  }

  function pictureOf(i) {
    const picture = pictures.get(i) ?? make('img', {src: `images/${i}.webp`, onload: draw});
    pictures.delete(i), pictures.set(i, picture);  // the last used
    if (pictures.size > 3 * MOST_PICTURES) pictures.delete(pictures.keys().next().value);
    return picture;
  }

  // The image nearest to a point in CSS pixels, or -1; `allowed` narrows the search.
  function at(a, b, reach, allowed = () => true) {
    let best = -1, least = reach * reach;
    for (let i = 0; i < n; i++) {
      const d = (px(i) - a) ** 2 + (py(i) - b) ** 2;
      if (d < least && shown[i] && allowed(i)) best = i, least = d;
    }
    return best;
  }

  function inside(polygon) {
    const xs = polygon.map(([a]) => a), ys = polygon.map(([, b]) => b);
    const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    const [y0, y1] = [Math.min(...ys), Math.max(...ys)];
    return visible().filter((i) => {
      const a = px(i), b = py(i);
      if (a < x0 || a > x1 || b < y0 || b > y1) return false;
      let odd = false;
      for (let k = 0, j = xs.length - 1; k < xs.length; j = k++) {
        if ((ys[k] > b) !== (ys[j] > b) &&
            a < (xs[j] - xs[k]) * (b - ys[k]) / (ys[j] - ys[k]) + xs[k]) odd = !odd;
      }
      return odd;
    });
  }

  function tip(i) {
    $('tip').hidden = i < 0;
    if (i < 0) return;
    $('tip').replaceChildren(make('img', {src: `images/${i}.webp`, alt: ''}),
                             ...[PAGE.names[i], className(i), predicted(i)].filter(Boolean)
                                 .map((text) => make('span', {}, text)));
    const width = $('tip').offsetWidth;
    const a = Math.min(px(i) + 16, canvas.clientWidth - width - 4);
    $('tip').style.left = `${canvas.offsetLeft + Math.max(4, a)}px`;
    $('tip').style.top = `${canvas.offsetTop + Math.max(4, py(i) + 16)}px`;
  }

  function point(i) {
    cursor = i;
    tip(i);
    if (i >= 0) $('status').textContent = [PAGE.names[i], className(i), predicted(i)]
        .filter(Boolean).join(', ');
    draw();
  }

  function choose(i) {
    if (labeling) select([i], !selected.has(i));
    else go(address(i));
  }

  // The nearest image in the direction of an arrow key; the one in the middle to begin with.
  function step(key) {
    if (cursor < 0) return point(at(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity));
    const [dx, dy] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[key];
    const from = cursor, ahead = (i) => {
      const [a, b] = [px(i) - px(from), py(i) - py(from)], along = a * dx + b * dy;
      return along > 0 && along >= Math.abs(a * dy + b * dx);
    };
    const next = at(px(from), py(from), Infinity, ahead);
    if (next < 0) return;
    const [a, b] = [px(next), py(next)];
    left += Math.max(20 - a, 0) + Math.min(canvas.clientWidth - 20 - a, 0);
    top += Math.max(20 - b, 0) + Math.min(canvas.clientHeight - 20 - b, 0);
    point(next);
  }

  function setLasso(on) {
    lassoing = on;
    document.querySelector('[data-do=lasso]').setAttribute('aria-pressed', on);
    canvas.classList.toggle('lasso', on);
  }

  canvas.onpointerdown = (event) => {
    if (event.button) return;  // not the primary one
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    moved = pointers.size > 1 ? Infinity : 0;
    lasso = (lassoing || event.shiftKey) && pointers.size === 1 ? [[event.offsetX, event.offsetY]]
                                                               : null;
  };
  canvas.onpointermove = (event) => {
    const here = [event.offsetX, event.offsetY], before = pointers.get(event.pointerId);
    if (!before) return tip(at(...here, REACH));
    const [dx, dy] = [here[0] - before[0], here[1] - before[1]];
    moved += Math.hypot(dx, dy);
    if (lasso) {
      lasso.push(here);
    } else if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const far = ([a, b]) => Math.hypot(a - other[0], b - other[1]) || 1;
      zoom(far(here) / far(before), ...other);
    } else {
      left += dx, top += dy;
    }
    pointers.set(event.pointerId, here);
    draw();
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    const here = pointers.get(event.pointerId);
    pointers.delete(event.pointerId);
    const drawn = lasso;
    lasso = null;
    if (!here || event.type === 'pointercancel') return draw();
    if (drawn && moved > 4) {
      setLabeling(true);
      select(inside(drawn), true);
      show();
    } else if (moved <= 4) {
      const i = at(...here, REACH);
      if (i >= 0) choose(i);
    }
    draw();
  };
  canvas.onpointerleave = () => tip(-1);
  canvas.onwheel = (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
  };
  canvas.onblur = () => point(-1);
  canvas.onkeydown = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key.startsWith('Arrow')) step(event.key);
    else if (event.key === '+' || event.key === '=') zoom(1.4, ...middle());
    else if (event.key === '-') zoom(1 / 1.4, ...middle());
    else if (event.key === 'Enter' && cursor >= 0) go(address(cursor));
    else if (event.key === ' ' && cursor >= 0) setLabeling(true), choose(cursor);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const actions = {
    in: () => zoom(1.4), out: () => zoom(1 / 1.4), fit, lasso: () => setLasso(!lassoing),
    none: () => (select([...selected], false), show())};
  for (const button of document.querySelectorAll('[data-do]')) {
    button.onclick = actions[button.dataset.do];
  }
  $('color').append(...[['class', 'color by class'], ['predicted', 'color by prediction'],
                        ['', 'one color']].filter(([value]) => value !== 'predicted' || PAGE.predicted)
      .map(([value, text]) => make('option', {value}, text)));
  $('color').oninput = () => (classify(), draw());

  return {
    renew: () => $('map').hidden || (classify(), draw()),
    here: () => document.activeElement === canvas ? cursor : -1,
    open: () => {
      resize(), classify();
      if (!fitted) fit();
      fitted = true;
      draw();
    }};
})();
