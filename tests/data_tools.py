"What the tests of the data share: small pictures that carry a number, tars of them, and loaders over them."
import io, struct, tarfile, warnings

import numpy as np, torch
from PIL import Image, ImageCms
from mdm.data.clips import open_animation
from mdm.data.loader import create_loader
from mdm.data.stream import DataConfig, PictureStream, find_shards


def encode(img, kind='png', **kw):
    f = io.BytesIO()
    img.save(f, kind, **kw)
    return f.getvalue()


def picture(i, w=20, h=16): return Image.new('RGB', (w, h), (i % 256, i // 256, 77))


def number(img): return int(img[0, 0, 0]) + 256 * int(img[1, 0, 0])


def film_seconds(file):
    "How long a film takes. Its frames are no measure: pictures in a row that are equal become one, which is shown longer."
    return open_animation(Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)).end


def path_seconds(n):
    "How long the film of a path takes: 80 ms per picture, and the last one 1.5 seconds."
    return round(0.08*(n - 1) + 1.5, 2)


def tar_bytes(files):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w') as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return f.getvalue()


def interrupt(monkeypatch, n):
    "Make the n-th sample that a run writes end it like Ctrl-C; gives a function that takes this back."
    from mdm.data import shards
    real, written = shards.add_sample, []
    def stop(*args):
        written.append(1)
        if len(written) == n: raise KeyboardInterrupt()
        return real(*args)
    monkeypatch.setattr(shards, 'add_sample', stop)
    return lambda: monkeypatch.setattr(shards, 'add_sample', real)


def good(i): return [(f'{i:06d}.png', encode(picture(i))), (f'{i:06d}.txt', f'picture {i}'.encode())]


def write_shards(folder, *sizes):
    at = 0
    for s, n in enumerate(sizes):
        (folder/f'{s:05d}.tar').write_bytes(tar_bytes([f for i in range(at, at + n) for f in good(i)]))
        at += n
    return [str(folder/'*.tar')]


def quiet(loader):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return list(loader)


def captions(loader): return [c for b in quiet(loader) for c in b[1]]


def names(ids): return [f'picture {i}' for i in ids]


def load(files, n=1, train=False, seed=0, **kw): return create_loader(DataConfig(files=files, **{'image_size': 8, 'workers': 0, **kw}), n, train=train, seed=seed)


def stream(files, rank=0, world=1, n=2, train=True, **kw): return PictureStream(find_shards(files), DataConfig(image_size=8, **kw), n, train, 0, rank, world)


def same(x, y): return len(x) == len(y) and all(a[1] == b[1] and torch.equal(a[0], b[0]) and torch.equal(a[2]['scale'], b[2]['scale']) for a, b in zip(x, y))


def write_index(folder, text, name='x.tsv', encoding='utf-8'):
    (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return [str(folder/name)]


# --- colour profiles

def icc(space, tags, kind=b'mntr', pcs=b'XYZ '):
    table, data, at = struct.pack('>I', len(tags)), b'', 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack('>4sII', name.encode(), at + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    head = struct.pack('>I4sI4s4s4s12x4s', at + len(data), b'', 0x02400000, kind, space, pcs, b'acsp')
    return head + bytes(28) + struct.pack('>3i', 63190, 65536, 54061) + bytes(48) + table + data


def xyz(*v): return b'XYZ \0\0\0\0' + struct.pack('>3i', *(round(o * 65536) for o in v))
def gamma(g): return struct.pack('>4s4xIH', b'curv', 1, round(g * 256))


SRGB_CURVE = struct.pack('>4s4xI1024H', b'curv', 1024, *(round(65535 * (x / 12.92 if x <= .04045 else ((x + .055) / 1.055)**2.4)) for x in np.linspace(0, 1, 1024)))
WHITE = xyz(.9642, 1, .8249)
P3 = icc(b'RGB ', dict(wtpt=WHITE, rXYZ=xyz(.51512, .2412, -.00105), gXYZ=xyz(.29198, .69225, .04189), bXYZ=xyz(.1571, .06657, .78407), rTRC=SRGB_CURVE, gTRC=SRGB_CURVE, bTRC=SRGB_CURVE))
DARK = icc(b'GRAY', dict(wtpt=WHITE, kTRC=gamma(3.5)))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def inks(rgb_of):
    "A CMYK profile of a table with two places along each ink; `rgb_of(c, m, y, k)` in 0..1 says what a corner looks like."
    to_lab = ImageCms.buildTransform(ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'), 'RGB', 'LAB')
    corners = [rgb_of(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    lab = np.asarray(ImageCms.applyTransform(Image.fromarray(np.array([corners]).clip(0, 1).__mul__(255).round().astype(np.uint8)), to_lab)).copy()[0]
    lab[:, 1:] ^= 128                                                # Pillow's a and b are signed, a profile's have 128 for zero
    ramp = bytes(range(256))
    return icc(b'CMYK', dict(wtpt=WHITE, A2B0=struct.pack('>4s4xBBBx9i', b'mft1', 4, 3, 2, *[65536, 0, 0, 0, 65536, 0, 0, 0, 65536]) + ramp * 4 + lab.tobytes() + ramp * 3), b'prtr', b'Lab ')


SWAPPED = inks(lambda c, m, y, k: ((1 - m) * (1 - k), (1 - c) * (1 - k), (1 - y) * (1 - k)))     # cyan ink looks magenta
