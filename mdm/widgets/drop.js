// A place for one file: dropped, or chosen with a button. Python gets a message with the bytes.
// kind 'head': the first `head` bytes as they are. kind 'picture': reduced, with at most `side` pixels at its shorter side
// and twice as many at its longer one; what is beyond them is cut off.
const most_message = 900_000;                       // a server may refuse longer ones

async function reduced(file, side) {
  const bitmap = await createImageBitmap(file);
  const edge = Math.min(bitmap.width, bitmap.height), share = Math.min(1, side/edge);
  const [w, h] = [bitmap.width, bitmap.height].map(o => Math.min(o, 2*edge));          // the part that is kept
  const canvas = new OffscreenCanvas(Math.round(w*share), Math.round(h*share)), pen = canvas.getContext('2d');
  pen.fillStyle = 'white';
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(bitmap, (bitmap.width - w)/2, (bitmap.height - h)/2, w, h, 0, 0, canvas.width, canvas.height);
  for (const [type, quality] of [['image/png', 1], ['image/webp', .95], ['image/jpeg', .9]]) {
    const blob = await canvas.convertToBlob({ type, quality });
    if (blob.size <= most_message) return blob;
  }
  throw new Error('too large');
}

function render({ model, el }) {
  const label = document.createElement('label'), text = document.createElement('span');
  const input = document.createElement('input');
  label.className = 'mdm-drop';
  input.type = 'file';
  input.accept = model.get('accept');
  label.append(text, input);
  el.append(label);
  const show = () => { text.textContent = model.get('label'); };
  const take = async file => {
    if (!file) return;
    const fail = problem => model.send({ kind: 'problem', problem: `${file.name}: ${problem}` });
    const most = model.get('most');
    if (file.size > most) return fail(`it has ${(file.size/1e6).toFixed(1)} MB, and ${most/1e6} MB are the most.`);
    let blob;
    try { blob = model.get('kind') === 'head' ? file.slice(0, model.get('head')) : await reduced(file, model.get('side')); }
    catch { return fail('this browser cannot open it as a picture.'); }
    model.send({ kind: 'file', name: file.name }, undefined, [await blob.arrayBuffer()]);
  };
  input.addEventListener('change', () => { take(input.files[0]); input.value = ''; });
  for (const name of ['dragenter', 'dragover', 'dragleave', 'drop']) {
    label.addEventListener(name, e => {
      e.preventDefault();
      e.stopPropagation();
      label.classList.toggle('mdm-over', name === 'dragenter' || name === 'dragover');
      if (name === 'drop') take(e.dataTransfer.files[0]);
    });
  }
  model.on('change:label', show);
  show();
}
export default { render };
