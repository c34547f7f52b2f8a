"What the tests of the data share: small pictures that carry a number, tars of them, and loaders over them."
import io, tarfile, warnings

import torch
from PIL import Image
from mdm.data.loader import create_loader
from mdm.data.stream import DataConfig, PictureStream, find_shards


def encode(img, kind='png', **kw):
    f = io.BytesIO()
    img.save(f, kind, **kw)
    return f.getvalue()


def picture(i, w=20, h=16): return Image.new('RGB', (w, h), (i % 256, i // 256, 77))


def number(img): return int(img[0, 0, 0]) + 256 * int(img[1, 0, 0])


def tar_bytes(files):
    f = io.BytesIO()
    with tarfile.open(fileobj=f, mode='w') as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return f.getvalue()


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
