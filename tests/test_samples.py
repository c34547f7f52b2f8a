"Samples: what a reader of nbs/2_data/03_samples.ipynb should not have to read."
import gzip, io, pickle, tarfile

import numpy as np, pytest
from PIL import Image, ImageDraw
from data_tools import captions, encode, good, load, names, picture, quiet, tar_bytes
from mdm.data.samples import (BAD_CAPTION, BAD_EMBEDDING, BAD_PICTURE, BAD_TAR, NO_CAPTION, NO_EMBEDDING, NO_PICTURE, NUL_CAPTION, EmbeddedCaption, Skip, get_caption,
                              load_picture)


# --- pictures

def test_modes_become_rgb():
    rgba = Image.new('RGBA', (4, 4), (255, 0, 0, 0))
    white, red = (255, 255, 255), (255, 0, 0)
    palette = Image.new('P', (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    seethrough = palette.copy()
    seethrough.info['transparency'] = 1
    grey16 = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    for img, kind, want in [(rgba, 'png', white), (rgba, 'webp', white), (palette, 'png', red), (seethrough, 'png', white), (Image.new('LA', (4, 4), (0, 0)), 'png', white),
                            (Image.new('1', (4, 4), 1), 'png', white), (Image.new('L', (4, 4), 9), 'png', (9, 9, 9)), (grey16, 'png', (128, 128, 128)),
                            (Image.new('I', (4, 4), 65535), 'tiff', white), (Image.new('CMYK', (4, 4), (0, 255, 255, 0)), 'tiff', red)]:
        out, scale = load_picture(encode(img, kind), 4)
        assert out.mode == 'RGB' and out.size == (4, 4) and scale == 4
        assert np.abs(np.asarray(out).astype(int) - want).max() <= 1, (img.mode, kind, out.getpixel((0, 0)))
    cmyk = load_picture(encode(Image.new('CMYK', (16, 16), (0, 255, 255, 0)), 'jpeg', quality=95), 4)[0]
    assert np.abs(np.asarray(cmyk).astype(int) - red).max() < 12


def test_exif_rotation_is_applied():
    img = Image.new('RGB', (64, 32), 'black')
    ImageDraw.Draw(img).rectangle((0, 0, 31, 31), fill='white')      # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6                                                 # turn clockwise by 90 degrees to see it upright: white is on top
    out, scale = load_picture(encode(img, 'jpeg', exif=exif, quality=95), 32, (1, 0))      # of a lying picture that would be the right half
    assert scale == 32 and np.asarray(out)[4:28].mean() > 250
    assert np.asarray(load_picture(encode(img, 'jpeg', exif=exif, quality=95), 32, (0, 1))[0])[4:28].mean() < 5


def test_animation_gives_its_first_frame():
    frames = [Image.new('RGB', (8, 8), c) for c in ('red', 'blue')]
    f = io.BytesIO()
    frames[0].save(f, 'webp', save_all=True, append_images=frames[1:], lossless=True)
    assert np.abs(np.asarray(load_picture(f.getvalue(), 8)[0]).astype(int) - (255, 0, 0)).max() < 3


def test_big_jpeg_uses_its_own_downscaling_and_looks_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    img = Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).resize((1800, 1200), Image.Resampling.BICUBIC)
    data = encode(img, 'jpeg', quality=95, subsampling=0)
    drafts = []
    from PIL import JpegImagePlugin
    old = JpegImagePlugin.JpegImageFile.draft
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'draft', lambda s, *a: drafts.append(old(s, *a)) or drafts[-1])
    out, scale = load_picture(data, 64)
    assert scale == 1200 and drafts and drafts[0] is not None
    want = img.crop((300, 0, 1500, 1200)).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(out).astype(int) - np.asarray(want)).mean() < 2


@pytest.mark.parametrize('size', [(1, 1), (1, 900), (900, 1), (3, 5), (64, 64)])
def test_odd_shapes(size):
    out, scale = load_picture(encode(Image.new('RGB', size, 'red')), 64)
    assert out.size == (64, 64) and scale == min(size) and np.asarray(out)[..., 0].min() == 255


def test_crop_place():
    img = Image.fromarray(np.arange(0, 240, 2, np.uint8)[None].repeat(40, 0))   # 120 wide, 40 high, brighter to the right
    for place, first in [((0, 0), 0), ((.5, .5), 80), ((1, 1), 160)]: assert load_picture(encode(img), 40, place)[0].getpixel((0, 0))[0] == first


@pytest.mark.parametrize('data', [b'', b'GIF89a', b'\x89PNG\r\n\x1a\n' + bytes(50), encode(picture(3))[:60], encode(Image.new('RGB', (99, 99)), 'jpeg')[:-200]])
def test_broken_pictures(data):
    with pytest.raises(Skip, match=BAD_PICTURE): load_picture(data, 8)


# --- captions

@pytest.mark.parametrize('sample,want', [
    ({'txt': b'x', 'json': b'broken'}, 'x'), ({'txt': '\ufeffnaïve 猫'.encode()}, 'naïve 猫'), ({'json': b'{"caption": "y"}'}, 'y'),
    ({}, NO_CAPTION), ({'txt': b'', 'json': b'{"caption":"y"}'}, 'y'), ({'txt': b'\xff', 'json': b'{"caption":"y"}'}, 'y'), ({'txt': '\u200b \u3164'.encode(), 'json': b'{"file":"y"}'}, NO_CAPTION), ({'txt': 'a cat'.encode('utf-16-le')}, NUL_CAPTION), ({'json': b'{"caption": ["", "y", "z"]}'}, 'y'), ({'json': b'{"caption": null}'}, NO_CAPTION), ({'json': b'["caption"]'}, NO_CAPTION),
    ({'json': b'{"caption": 3}'}, NO_CAPTION), ({'json': b'{'}, BAD_CAPTION), ({'json': b'{"caption": "\\ud800"}'}, BAD_CAPTION), ({'txt': b'\xff'}, BAD_CAPTION)])
def test_captions(sample, want):
    try: got = get_caption(sample)
    except Skip as e: got = str(e)
    assert got == want


def npy(a):
    f = io.BytesIO()
    np.save(f, a)
    return f.getvalue()


@pytest.mark.parametrize('workers', [0, 2])
def test_captions_bring_their_embeddings(tmp_path, workers):
    e = lambda i: np.full((i + 1, 4), i, np.float16)
    bad = [('x.png', encode(picture(9))), ('x.txt', b'none'), ('y.png', encode(picture(9))), ('y.txt', b'bad'), ('y.emb.npy', npy(e(1))[:-1]), ('z.png', encode(picture(9))), ('z.txt', b'flat'), ('z.emb.npy', npy(e(1)[0])),
           ('w.png', encode(picture(9))), ('w.txt', b'objects'), ('w.emb.npy', npy(np.array([[None]], object)))]
    (tmp_path/'0.tar').write_bytes(tar_bytes([f for i in range(4) for f in [*good(i), (f'{i:06d}.emb.npy', npy(e(i).astype(np.float32 if i == 2 else np.float16)))]] + bad))
    loader = load([str(tmp_path/'0.tar')], 2, workers=workers, embeddings=True).to('cpu')
    got = [c for b in quiet(loader) for c in b[1]]
    assert sorted(got) == names(range(4)) and loader.skipped == {NO_EMBEDDING: 1, BAD_EMBEDDING: 3}
    for c in got: assert isinstance(c, EmbeddedCaption) and c.embedding.dtype == np.float16 and np.array_equal(c.embedding, e(int(c.split()[1])))
    assert type(pickle.loads(pickle.dumps(got[0]))) is EmbeddedCaption and pickle.loads(pickle.dumps(got[3])).embedding.shape == got[3].embedding.shape
    plain = load([str(tmp_path/'0.tar')], 2, workers=workers)
    assert len(captions(plain)) == 8 and type(next(iter(plain))[1][0]) is str


# --- tars

def test_extensions_and_strange_members(tmp_path):
    img = picture(1)
    files = [('__meta__/x.json', b'{}'), ('d/a.jpg', encode(img, 'jpeg')), ('d/a.txt', b'jpg'), ('d/b.JPEG', encode(img, 'jpeg')), ('d/b.TXT', b'jpeg'), ('._c.png', b'mac'),
             ('c.webp', encode(img, 'webp')), ('c.json', b'{"caption":"webp"}'), ('e.png', encode(img)), ('e.npy', bytes(99)), ('e.txt', b'png'),
             ('README.md', b'hello'), ('f.gif', encode(img, 'gif')), ('f.txt', b'gif'), ('g.tar.png', encode(img)), ('g.txt', b'no png here')]
    path = tmp_path/'x.tar'
    path.write_bytes(tar_bytes(files))
    with tarfile.open(path, 'a') as t:
        folder = tarfile.TarInfo('h.png')
        folder.type = tarfile.DIRTYPE
        t.addfile(folder)
    loader = load([str(path)])
    assert captions(loader) == ['jpg', 'jpeg', 'webp', 'png']
    assert loader.skipped == {NO_CAPTION: 1, NO_PICTURE: 2}


def test_gzipped_tar(tmp_path):
    (tmp_path/'x.tar.gz').write_bytes(gzip.compress(tar_bytes([f for i in range(5) for f in good(i)])))
    assert captions(load([str(tmp_path/'x.tar.gz')])) == names(range(5))
    whole = (tmp_path/'x.tar.gz').read_bytes()
    (tmp_path/'y.tar.gz').write_bytes(whole[:-40])
    loader = load([str(tmp_path/'*.gz')])
    got = captions(loader)
    assert got[:5] == names(range(5)) and set(got) == set(names(range(5))) and loader.skipped[BAD_TAR] == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_a_tar_cut_anywhere_gives_what_came_before(tmp_path, workers):
    whole = tar_bytes([f for i in range(4) for f in good(i)])
    with tarfile.open(fileobj=io.BytesIO(whole)) as t: ends = [m.offset_data + m.size for m in t.getmembers()]
    for cut in ([*range(300, ends[-1] + 500, 333), *ends, *[e + 1 for e in ends], ends[4] + 512] if not workers else [ends[2] + 600, ends[4] + 600]):
        (tmp_path/'x.tar').write_bytes(whole[:cut])
        loader, complete = load([str(tmp_path/'x.tar')], workers=workers), sum(e <= cut for e in ends) // 2
        if complete: assert captions(loader) == names(range(complete)), cut
        else:
            with pytest.raises(ValueError, match='no usable pictures'): captions(loader)
        assert loader.skipped[BAD_TAR] == 1 and set(loader.skipped) <= {BAD_TAR, NO_CAPTION}, (cut, loader.skipped)


def test_a_header_damaged_in_the_middle(tmp_path):
    raw = bytearray(tar_bytes([f for i in range(6) for f in good(i)]))
    with tarfile.open(fileobj=io.BytesIO(bytes(raw))) as t: at = t.getmembers()[6].offset
    raw[at:at + 512] = b'\x55' * 512
    (tmp_path/'x.tar').write_bytes(bytes(raw))
    loader = load([str(tmp_path/'x.tar')])
    assert captions(loader) == names(range(3)) and loader.skipped == {BAD_TAR: 1}
