// A brush that paints a mask over a picture. After every stroke Python gets a message with the mask as a PNG file.
function element(tag, properties, ...children) {
  const o = Object.assign(document.createElement(tag), properties);
  o.append(...children);
  return o;
}

const stripes = document.createElement('canvas');   // seen on a picture of any colour
stripes.width = stripes.height = 8;
for (let y = 0; y < 8; y++) {
  for (let x = 0; x < 8; x++) {
    stripes.getContext('2d').fillStyle = (x + y) % 8 < 4 ? '#e03131' : '#ffffff';
    stripes.getContext('2d').fillRect(x, y, 1, 1);
  }
}

function render({ model, el }) {
  let w = 1, h = 1, drawing = false, last = null, cursor = null, picture = null;
  const mask = document.createElement('canvas'), pen = mask.getContext('2d', { willReadFrequently: true });
  const canvas = element('canvas', { className: 'mdm-canvas', tabIndex: 0 }), view = canvas.getContext('2d');
  canvas.setAttribute('role', 'img');
  canvas.setAttribute('aria-label', 'Picture to paint a mask on: arrow keys move the brush, the space bar paints');
  const width = element('input', { type: 'range', min: 1, max: 100, value: 20 });
  width.setAttribute('aria-label', 'Width of the brush');
  const erase = element('button', { type: 'button', textContent: 'Erase' });
  const clear = element('button', { type: 'button', textContent: 'Clear' });
  const invert = element('button', { type: 'button', textContent: 'Invert' });
  erase.setAttribute('aria-pressed', 'false');
  el.append(element('div', { className: 'mdm-brush' }, canvas,
    element('div', { className: 'mdm-brush-tools' }, element('label', {}, 'Brush ', width), erase, clear, invert)));

  const erasing = () => erase.getAttribute('aria-pressed') === 'true';
  const radius = () => Math.max(.5, Math.min(w, h)*width.value/200);
  function show() {
    const ratio = canvas.width/w, tint = document.createElement('canvas'), t = tint.getContext('2d');
    tint.width = canvas.width;
    tint.height = canvas.height;
    t.imageSmoothingEnabled = false;
    t.drawImage(mask, 0, 0, canvas.width, canvas.height);
    t.globalCompositeOperation = 'source-in';
    t.fillStyle = t.createPattern(stripes, 'repeat');
    t.fillRect(0, 0, canvas.width, canvas.height);
    view.clearRect(0, 0, canvas.width, canvas.height);
    view.imageSmoothingEnabled = ratio < 2;
    if (picture) view.drawImage(picture, 0, 0, canvas.width, canvas.height);
    view.globalAlpha = .7;
    view.drawImage(tint, 0, 0);
    view.globalAlpha = 1;
    if (!cursor) return;
    view.beginPath();
    view.arc(cursor[0]*ratio, cursor[1]*ratio, radius()*ratio, 0, 7);
    view.lineWidth = 3; view.strokeStyle = 'white'; view.stroke();
    view.lineWidth = 1; view.strokeStyle = 'black'; view.stroke();
  }
  function stroke(to) {
    pen.globalCompositeOperation = erasing() ? 'destination-out' : 'source-over';
    pen.strokeStyle = 'white';
    pen.lineCap = pen.lineJoin = 'round';
    pen.lineWidth = 2*radius();
    pen.beginPath();
    pen.moveTo(...(last || to));
    pen.lineTo(to[0] + 1e-3, to[1]);
    pen.stroke();
    last = to;
    show();
  }
  function send() {
    const flat = document.createElement('canvas'), f = flat.getContext('2d');
    flat.width = w;
    flat.height = h;
    f.fillStyle = 'black';
    f.fillRect(0, 0, w, h);
    f.drawImage(mask, 0, 0);
    flat.toBlob(async blob => model.send({ kind: 'mask' }, undefined, [await blob.arrayBuffer()]), 'image/png');
  }
  const place = e => {
    const box = canvas.getBoundingClientRect();
    return [(e.clientX - box.left)/box.width*w, (e.clientY - box.top)/box.height*h];
  };
  canvas.addEventListener('pointerdown', e => {
    if (e.button) return;
    e.preventDefault();
    canvas.setPointerCapture(e.pointerId);
    canvas.focus({ preventScroll: true });
    drawing = true; last = null; cursor = place(e);
    stroke(cursor);
  });
  canvas.addEventListener('pointermove', e => {
    cursor = place(e);
    if (drawing) stroke(cursor); else show();
  });
  for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, () => { if (drawing) send(); drawing = false; });
  canvas.addEventListener('pointerleave', () => { if (!drawing) { cursor = null; show(); } });
  canvas.addEventListener('keydown', e => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
    if (!move && e.key !== ' ') return;
    e.preventDefault();
    e.stopPropagation();
    cursor = cursor || [w/2, h/2];
    if (move) cursor = cursor.map((v, k) => Math.min([w, h][k], Math.max(0, v + move[k]*Math.max(1, radius()/2))));
    else { last = null; stroke(cursor); send(); }
    show();
  });
  canvas.addEventListener('blur', () => { cursor = null; show(); });
  width.addEventListener('input', show);
  erase.addEventListener('click', () => erase.setAttribute('aria-pressed', String(!erasing())));
  clear.addEventListener('click', () => { pen.clearRect(0, 0, w, h); show(); send(); });
  invert.addEventListener('click', () => {
    pen.globalCompositeOperation = 'xor';
    pen.fillStyle = 'white';
    pen.fillRect(0, 0, w, h);
    show();
    send();
  });

  const bitmap = data => data && data.byteLength ? createImageBitmap(new Blob([data], { type: 'image/png' })) : null;
  async function restore() {
    const found = await bitmap(model.get('picture')), old = await bitmap(model.get('mask'));
    picture = found;
    [w, h] = [model.get('width'), model.get('height')];
    [mask.width, mask.height] = [w, h];
    const k = Math.max(1, Math.round(320/w));
    [canvas.width, canvas.height] = [w*k, h*k];
    if (old) {
      pen.drawImage(old, 0, 0, w, h);
      const pixels = pen.getImageData(0, 0, w, h);          // white stays, black becomes transparent
      for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
      pen.putImageData(pixels, 0, 0);
    }
    show();
  }
  model.on('change:version', restore);
  restore();
}
export default { render };
