"Samples: what a reader of nbs/2_data/03_samples.ipynb should not have to read."
import gzip, io, json, pickle, struct, sys, tarfile, types, warnings, zlib

import numpy as np, pytest
from PIL import Image, ImageCms, ImageDraw, ImageOps
from data_tools import DARK, P3, SRGB, SWAPPED, captions, encode, good, load, names, picture, quiet, tar_bytes
from mdm.data import samples as samples_module
from mdm.data.samples import (BAD_CAPTION, BAD_EMBEDDING, BAD_PICTURE, BAD_TAR, NO_CAPTION, NO_EMBEDDING, NO_PICTURE, NUL_CAPTION, PICTURES, EmbeddedCaption, Skip,
                              decode_sample, get_caption, load_picture, missing_package, read_tar, tar_samples)
from mdm.utils.pictures import profile_fault, to_rgb


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


@pytest.mark.parametrize('w, h, size', [(400, 300, 64), (640, 427, 128), (100, 300, 128), (97, 61, 61), (33, 35, 32), (500, 40, 39)])
def test_resizing_is_pillows_within_four_levels(w, h, size):
    "PyTorch's resizing of bytes gives what Pillow's does, also for parts that begin between pixels"
    rng = np.random.default_rng(w)
    img = Image.fromarray(rng.integers(0, 256, (h // 6 + 2, w // 6 + 2, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    for place in ((0, 0), (.5, .5), (.3, .8), (1, 1)):
        side = min(w, h)
        x, y = ((n - side) * p for n, p in zip((w, h), place))
        want = img.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side)) if size != side else img.crop((int(x), int(y), int(x) + side, int(y) + side))
        error = np.abs(np.subtract(load_picture(encode(img), size, place)[0], want, dtype=int))
        assert error.max() <= 4 and error.mean() < 1, (place, error.max(), error.mean())


def test_crop_place():
    img = Image.fromarray(np.arange(0, 240, 2, np.uint8)[None].repeat(40, 0))   # 120 wide, 40 high, brighter to the right
    for place, first in [((0, 0), 0), ((.5, .5), 80), ((1, 1), 160)]: assert load_picture(encode(img), 40, place)[0].getpixel((0, 0))[0] == first


@pytest.mark.parametrize('data', [b'', b'GIF89a', b'\x89PNG\r\n\x1a\n' + bytes(50), encode(picture(3))[:60], encode(Image.new('RGB', (99, 99)), 'jpeg')[:-200]])
def test_broken_pictures(data):
    with pytest.raises(Skip, match=BAD_PICTURE): load_picture(data, 8)


@pytest.mark.parametrize('turn', range(1, 9))
def test_every_orientation(turn):
    img = Image.fromarray(np.random.default_rng(turn).integers(0, 256, (3, 3, 3), np.uint8)).resize((48, 24), 0)
    exif = Image.Exif()
    exif[0x0112] = turn
    out = samples_module.decoded(encode(img, exif=exif))
    with out as (got, size):
        marked = Image.open(io.BytesIO(encode(img, exif=exif)))
        want = ImageOps.exif_transpose(marked)
        assert np.array_equal(got, want) and size == want.size


def png_chunk(name, data, crc=None): return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data) if crc is None else crc)


@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('chunk', [png_chunk(b'eXIf', b'garbage'), png_chunk(b'eXIf', b'MM', 7), png_chunk(b'tEXt', b'a\0b', 7), png_chunk(b'iCCP', b'x\0\0garbage'),
                                   png_chunk(b'zTXt', b'x\0\0' + zlib.compress(bytes(9_000_000))), png_chunk(b'iCCP', b'x\0\0' + zlib.compress(bytes(9_000_000)))],
                         ids=['exif', 'exif crc', 'text crc', 'profile', 'text bomb', 'profile bomb'])
def test_damage_beside_a_png_does_no_harm(chunk, after):
    data = encode(picture(5))
    at = data.index(b'IEND') - 4 if after else 33
    out, scale = load_picture(data[:at] + chunk + data[at:], 8)
    assert out.getpixel((0, 0)) == (5, 0, 77) and scale == 16
    cut = data[:data.index(b'IDAT') + 9]
    with pytest.raises(Skip, match=BAD_PICTURE): load_picture(cut[:33] + chunk + cut[33:], 8)


def test_damaged_exif_of_a_jpeg():
    data = encode(picture(5), 'jpeg', quality=95, exif=b'Exif\0\0garbage and more of it')
    assert load_picture(data, 8)[1] == 16


def test_numbers_of_many_bits():
    "White is 1, 255 or 65535 in floating-point pictures, whichever fits; and so on for integers."
    for value, dtype, want in [(.5, np.float32, 128), (1.02, np.float32, 255), (128., np.float32, 128), (32768., np.float32, 128), (-3., np.float32, 0), (200, np.int32, 200), (32768, np.int32, 128),
                               (2**30, np.int32, 128), (2**31, np.uint32, 128), (32768, np.uint16, 128)]:
        a = np.full((4, 4), value, dtype)
        a[0, 0] = dict(f=1. if abs(value) < 10 else 0., i=0, u=0)[a.dtype.kind]
        img = Image.fromarray(a.view(np.int32) if dtype == np.uint32 else a)
        data = encode(img, 'tiff')
        signed, unsigned = (struct.pack('<HHII', 339, 3, 1, n) for n in (2, 1))
        if dtype == np.uint32: assert signed in data
        data = data.replace(signed, unsigned) if dtype == np.uint32 else data
        assert abs(load_picture(data, 4)[0].getpixel((3, 3))[0] - want) <= 1, (value, dtype)
    nan = np.full((4, 4), .5, np.float32)
    nan[0] = np.nan, np.inf, -np.inf, 1
    assert load_picture(encode(Image.fromarray(nan), 'tiff'), 4)[0].getpixel((2, 3)) == (128, 128, 128)


# --- colours

def near(got, want, most=2): assert np.abs(np.subtract(got, want)).max() <= most, (got, want)


@pytest.mark.parametrize('mode, kind', [('RGB', 'png'), ('RGB', 'jpeg'), ('RGB', 'webp'), ('RGB', 'tiff'), ('P', 'png'), ('RGBA', 'png'), ('RGBA', 'webp'), ('P', 'gif')])
def test_display_p3_becomes_srgb(mode, kind):
    img = Image.new('RGB', (32, 32), (40, 200, 60)).convert(mode, palette=Image.Palette.ADAPTIVE)
    data = encode(img, kind, icc_profile=P3, **dict(jpeg=dict(quality=100, subsampling=0), webp=dict(lossless=True)).get(kind, {}))
    near(load_picture(data, 8)[0].getpixel((4, 4)), (40, 200, 60) if kind == 'gif' and not Image.open(io.BytesIO(data)).info.get('icc_profile') else (0, 204, 12))
    skin = to_rgb(Image.open(io.BytesIO(encode(Image.new('RGB', (4, 4), (224, 172, 150)), icc_profile=P3))))
    assert np.abs(np.subtract(skin.getpixel((0, 0)), (224, 172, 150))).max() > 5 and not skin.info.get('icc_profile')


def test_white_and_grey_stay_where_they_are():
    grey = np.arange(256, dtype=np.uint8)[None].repeat(3, 0)
    near(np.asarray(to_rgb(Image.open(io.BytesIO(encode(Image.fromarray(np.stack([grey]*3, -1)), icc_profile=P3))))), np.stack([grey]*3, -1), 1)


@pytest.mark.parametrize('mode', ['L', 'LA', 'I;16', '1'])
def test_grey_profiles(mode):
    "A gamma of 3.5 darkens the middle; a profile of three colours in a grey picture is used, too."
    img = Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)) if mode == 'I;16' else Image.new('L', (8, 8), 128).convert(mode)
    middle = load_picture(encode(img, icc_profile=DARK), 8)[0].getpixel((2, 2))
    if mode == '1': return
    near(middle, [round(255 * (1.055 * (128 / 255)**(3.5 / 2.4) - .055))] * 3, 3)
    near(load_picture(encode(img, icc_profile=P3), 8)[0].getpixel((2, 2)), [128] * 3, 1)


def test_inks_go_through_their_own_profile():
    img = Image.new('CMYK', (16, 16), (255, 0, 0, 0))
    near(load_picture(encode(img, 'tiff'), 8)[0].getpixel((3, 3)), (0, 255, 255))
    for kind, most in (('tiff', 6), ('jpeg', 12)): near(load_picture(encode(img, kind, icc_profile=SWAPPED), 8)[0].getpixel((3, 3)), (255, 0, 255), most)
    near(load_picture(encode(Image.new('CMYK', (16, 16)), 'jpeg', icc_profile=SWAPPED), 8)[0].getpixel((3, 3)), (255, 255, 255))


def test_srgb_is_left_alone_and_profiles_are_read_once(monkeypatch):
    img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    applied = []
    real = ImageCms.applyTransform
    monkeypatch.setattr(ImageCms, 'applyTransform', lambda *a, **k: applied.append(1) or real(*a, **k))
    for profile in (SRGB, SRGB):
        assert np.array_equal(load_picture(encode(img, icc_profile=profile), 9)[0], img)
    assert len(applied) <= 1                                         # the trial on a grid of colours
    for _ in range(3): load_picture(encode(img, icc_profile=P3), 9)
    assert len(applied) <= 5


@pytest.mark.parametrize('profile', [b'', b'garbage', bytes(200), P3[:200], P3[:132], SWAPPED, DARK, P3[:16] + b'Lab ' + P3[20:]], ids=range(8))
def test_profiles_that_cannot_be_used_are_ignored_and_named(profile):
    data = encode(Image.new('RGB', (8, 8), (40, 200, 60)), icc_profile=profile)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert load_picture(data, 8)[0].getpixel((0, 0)) == (40, 200, 60)
    assert bool(said) == bool(profile) == bool(profile_fault(Image.open(io.BytesIO(data))))


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
    assert captions(loader) == ['jpg', 'jpeg', 'webp', 'png', 'gif']
    assert loader.skipped == {f'{NO_CAPTION} (it has .md)': 1, f'{NO_PICTURE} (it has .png)': 1}


def read_all(path):
    "What a loader makes of a tar: captions in order, and reasons."
    loader = load([str(path)])
    return captions(loader), dict(loader.skipped)


def pairs(*names, at=''): return [f for i, n in enumerate(names) for f in ((f'{at}{n}.png', encode(picture(i))), (f'{at}{n}.txt', n.encode()))]


def mac(name): return (('/'.join([*name.split('/')[:-1], '._' + name.split('/')[-1]])), b'\0\5\x16\7' + bytes(90))


@pytest.mark.parametrize('at', ['', 'd/', './', './d/e/'])
def test_files_of_a_mac_belong_to_nobody(tmp_path, at):
    files = [o for f in pairs('a', 'b', at=at) for o in (mac(f[0]), f)] + [(f'__MACOSX/{at}._a.png', b'x'), (f'{at}__MACOSX/a.png', b'x'), (f'{at}.DS_Store', b'x')]
    (tmp_path/'x.tar').write_bytes(tar_bytes(files))
    assert read_all(tmp_path/'x.tar') == (['a', 'b'], {})


def test_keys_with_dots(tmp_path):
    "`v1.0_a` is a key where all names look like that; `x.seg.png` beside `x.png` is no sample of its own"
    for names in (['v1.0_a', 'v1.0_b'], ['img.1', 'img.2', 'img.3'], ['d/a.b.c', 'd/a.b.d'], [f'frame.{i:05d}' for i in range(1203)]):
        (tmp_path/'x.tar').write_bytes(tar_bytes(pairs(*names)))
        if len(names) < 9: assert read_all(tmp_path/'x.tar') == (names, {}), names
        else:
            with tarfile.open(tmp_path/'x.tar') as t: assert [s['__key__'] for s in tar_samples(t)] == names
    files = [f for i in 'ab' for f in [(f'{i}.png', encode(picture(1))), (f'{i}.seg.png', b'x'), (f'{i}.txt', i.encode()), (f'{i}.emb.npy', b'x')]]
    (tmp_path/'x.tar').write_bytes(tar_bytes(files))
    assert read_all(tmp_path/'x.tar') == (['a', 'b'], {})
    with tarfile.open(tmp_path/'x.tar') as t: assert [sorted(s) for s in tar_samples(t)] == [['__key__', 'emb.npy', 'png', 'seg.png', 'txt']]*2


def test_files_of_a_sample_that_lie_apart(tmp_path, monkeypatch):
    files = pairs('a', 'b', 'c')
    for order in (sorted(files, key=lambda f: f[0][-3:]), sorted(files, key=lambda f: f[0][-3:], reverse=True)):
        (tmp_path/'x.tar').write_bytes(tar_bytes(order + [('d.txt', b'no picture'), ('e.cls', b'0'), ('f.png', encode(picture(1)))]))
        assert read_all(tmp_path/'x.tar') == (['a', 'b', 'c'], {NO_PICTURE: 1, f'{NO_CAPTION} (it has .cls)': 1, NO_CAPTION: 1})
    monkeypatch.setattr(samples_module, 'HELD', 1)
    with tarfile.open(tmp_path/'x.tar') as t: assert len(list(tar_samples(t))) > 6


def test_a_key_that_comes_again(tmp_path):
    (tmp_path/'x.tar').write_bytes(tar_bytes(pairs('a') + [('a.png', encode(picture(3))), ('a.txt', b'again')] + pairs('b')))
    assert read_all(tmp_path/'x.tar') == (['a', 'again', 'b'], {})


def test_captions_that_are_links(tmp_path):
    path = tmp_path/'x.tar'
    path.write_bytes(tar_bytes([('a.png', encode(picture(0))), ('d/words.txt', b'said once'), *pairs('z')]))
    with tarfile.open(path, 'a') as t:
        for name, kind, target in [('b.png', tarfile.LNKTYPE, 'a.png'), ('b.txt', tarfile.LNKTYPE, 'd/words.txt'), ('c.png', tarfile.SYMTYPE, './a.png'), ('c.txt', tarfile.SYMTYPE, 'b.txt'),
                                   ('d/e.png', tarfile.SYMTYPE, '../a.png'), ('d/e.txt', tarfile.SYMTYPE, 'words.txt'), ('f.png', tarfile.SYMTYPE, 'a.png'), ('f.txt', tarfile.SYMTYPE, '/etc/hostname'),
                                   ('g.png', tarfile.SYMTYPE, 'g.txt'), ('g.txt', tarfile.SYMTYPE, 'g.png')]:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            t.addfile(link)
    got, skipped = read_all(path)
    assert got == ['z', 'said once', 'said once', 'said once'] and set(skipped) == {NO_CAPTION, NO_PICTURE}      # a and f have none; words has no picture
    (tmp_path/'x.tar.gz').write_bytes(gzip.compress(path.read_bytes()))
    assert read_all(tmp_path/'x.tar.gz')[0] == got


@pytest.mark.parametrize('ext, kind', [('gif', 'gif'), ('tiff', 'tiff'), ('tif', 'tiff'), ('jfif', 'jpeg'), ('bmp', 'bmp'), ('avif', 'avif'), ('jp2', 'jpeg2000'), ('ppm', 'ppm'), ('tga', 'tga'), ('mpo', 'mpo')])
def test_every_kind_of_picture_in_a_tar(tmp_path, ext, kind):
    img = picture(5, 32, 32)
    data = encode(img, kind, **(dict(save_all=True, append_images=[img]) if kind == 'mpo' else {}))
    (tmp_path/'x.tar').write_bytes(tar_bytes([(f'a.{ext}', data), ('a.txt', b'read'), *good(9)]))
    assert read_all(tmp_path/'x.tar') == (['read', 'picture 9'], {})
    near(load_picture(data, 8)[0].getpixel((3, 3)), (5, 0, 77), 4)


def test_kinds_that_need_a_package(monkeypatch):
    "A package of Pillow is used where it is installed, and named where it is not"
    samples_module._load_packages.cache_clear()
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    try:
        assert missing_package('HEIC') == 'pillow-heif'
        with pytest.raises(Skip, match=r'\.heic.*pip install pillow-heif'): decode_sample({'heic': b'\0\0\0\x18ftypheic' + bytes(90), 'txt': b'x'}, 8)
        samples_module._load_packages.cache_clear()
        called = []
        monkeypatch.setitem(sys.modules, 'pillow_heif', types.SimpleNamespace(register_heif_opener=lambda: called.append(1)))
        assert missing_package('heic') == '' and called == [1]
        with pytest.raises(Skip, match=BAD_PICTURE): decode_sample({'heic': b'nothing', 'txt': b'x'}, 8)
    finally: samples_module._load_packages.cache_clear()
    assert {'heic', 'jxl', 'jp2', 'mpo', 'ppm', 'tga'} <= set(PICTURES)


def test_the_scale_is_that_of_the_original():
    data = encode(picture(1, 40, 30))
    for about, want in [(dict(original_width=4000, original_height=3000), 3000), (dict(original_width=20, original_height=10), 30), (dict(original_width=-5, original_height=3000), 30), (dict(width=9999, height=9999), 30)]:
        assert decode_sample({'png': data, 'txt': b'x', 'json': json.dumps(about).encode()}, 8)[2] == want


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

def test_all_embeddings_of_a_dotted_key_belong_to_it():
    files = [(f'a.{k}.{ext}', b'x') for k in '01' for ext in ('png', 'txt', 'emb.npy', 'embs.npz')]
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(files))) as tar:
        found = {s['__key__']: set(s) - {'__key__'} for s in tar_samples(tar)}
    assert found == {f'a.{k}': {'png', 'txt', 'emb.npy', 'embs.npz'} for k in '01'}
