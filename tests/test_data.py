"Data: what a reader of nbs/09_data.ipynb should not have to read."
import gzip, io, multiprocessing, os, pickle, random, tarfile, threading, time, warnings
from collections import Counter

import numpy as np, psutil, pytest, torch
from PIL import Image, ImageDraw
from mdm.data.loader import loader as D
from mdm.data.loader import BAD_CAPTION, BAD_PICTURE, BAD_TAR, NO_CAPTION, NO_PICTURE, NOT_IN_TAR, DataConfig, PictureStream, create_dls, create_loader, find_shards, get_caption, load_picture, locate, show_pictures, shuffled
from mdm.data.files import find_files


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
    with pytest.raises(D.Skip, match=BAD_PICTURE): load_picture(data, 8)


# --- captions

@pytest.mark.parametrize('sample,want', [
    ({'txt': b'x', 'json': b'broken'}, 'x'), ({'txt': '\ufeffnaïve 猫'.encode()}, 'naïve 猫'), ({'json': b'{"caption": "y"}'}, 'y'),
    ({}, NO_CAPTION), ({'txt': b'', 'json': b'{"caption":"y"}'}, NO_CAPTION), ({'json': b'{"caption": null}'}, NO_CAPTION), ({'json': b'["caption"]'}, NO_CAPTION),
    ({'json': b'{"caption": 3}'}, NO_CAPTION), ({'json': b'{'}, BAD_CAPTION), ({'json': b'{"caption": "\\ud800"}'}, BAD_CAPTION), ({'txt': b'\xff'}, BAD_CAPTION)])
def test_captions(sample, want):
    try: got = get_caption(sample)
    except D.Skip as e: got = str(e)
    assert got == want


# --- files

def test_find_files(tmp_path):
    write_shards(tmp_path, 1, 1, 1)
    odd = tmp_path/'a{1,2}[x].tar'
    odd.write_bytes((tmp_path/'00000.tar').read_bytes())
    f = lambda *p: [os.path.basename(x) for x in find_files([str(tmp_path/x) for x in p])]
    assert f('{00000..00002}.tar') == f('0*.tar') == f('00000.tar', '0000[12].tar', '*0.tar') == ['00000.tar', '00001.tar', '00002.tar']
    assert f('a{1,2}[x].tar') == ['a{1,2}[x].tar'] and f('**/00001.tar') == ['00001.tar']
    assert find_files(str(tmp_path/'00000.tar')) == [str(tmp_path/'00000.tar')]
    for bad, text in [('nothing*.tar', 'nothing*.tar'), ('{00000..00004}.tar', '2 missing'), ('00009.tar', '00009.tar'), ('', 'it is a folder')]:
        with pytest.raises(FileNotFoundError) as e: f(bad)
        assert text in str(e.value)
    with pytest.raises(ValueError, match='data.files is empty'): find_files([])
    (tmp_path/'x.zip').write_bytes(b'')
    with pytest.raises(ValueError, match='neither a tar'): find_shards([str(tmp_path/'x.zip')])


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


# --- the index

def write_index(folder, text, name='x.tsv', encoding='utf-8'):
    (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return [str(folder/name)]


def test_index(tmp_path):
    (tmp_path/'in').mkdir()
    write_shards(tmp_path/'in', 3, 3)
    table = 'tar\tfile\tcaption\n00000.tar\t000000.png\tone\n00000.tar\t./000002.png\t"two ""quoted""\tand a tab"\n00001.tar\t000003.png\tthree\n00000.tar\t000000.png\tone again\n'
    files = write_index(tmp_path/'in', table)
    want = ['one', 'one again', 'two "quoted"\tand a tab', 'three']
    loader = load(files, image_size=16)
    assert captions(loader) == want and not loader.skipped
    assert [number(b[0][0]) for b in loader] == [0, 0, 2, 3]
    assert captions(load(write_index(tmp_path, 'filename\nin/x.tsv\n', 'index.tsv'))) == want
    both = load([*files, str(tmp_path/'in/00001.tar')])
    assert captions(both) == want + names([3, 4, 5])


@pytest.mark.parametrize('workers', [0, 2])
def test_index_with_problems(tmp_path, workers):
    write_shards(tmp_path, 3, 3)
    (tmp_path/'00001.tar').write_bytes((tmp_path/'00001.tar').read_bytes()[:1500])       # within its first picture's neighbour
    rows = [b'00000.tar\t000000.png\tfine', b'00000.tar\t000009.png\tlost', b'00000.tar\t000001.png\t\xff\xfe', b'00000.tar\t000002.png', b'00001.tar\t000005.png\tcut off', b'gone.tar\tx.png\ty']
    loader = load(write_index(tmp_path, b'tar\tfile\tcaption\n' + b'\n'.join(rows)), workers=workers)
    assert captions(loader) == ['fine']
    assert loader.skipped == {NOT_IN_TAR: 2, BAD_CAPTION: 1, NO_CAPTION: 1, BAD_TAR: 2}


def test_wrong_tables(tmp_path):
    for text, error, want in [('a\tb\n1\t2\n', ValueError, 'needs tar, file and caption'), ('filename\nnope.tsv\n', FileNotFoundError, 'nope.tsv'),
                              ('tar\tfile\tcaption\n', ValueError, 'hold no samples'), ('', ValueError, 'hold no samples'), ('tar\tfile\tcaption\na\tb\t' + 'x' * 200000, ValueError, 'tab-separated')]:
        D.read_index.cache_clear()
        with pytest.raises(error) as e: load(write_index(tmp_path, text))
        assert want in str(e.value)


# --- the stream

def test_locate_covers_every_place_once():
    rng = random.Random(0)
    counts, orders = [4, 1, 9, 3], {}
    order = lambda p: orders.setdefault(p, rng.sample(range(4), 4))
    row = [(i, j) for p in range(4) for i in order(p) for j in range(counts[i])]
    for _ in range(200):
        a, b = sorted(rng.sample(range(len(row)), 2))
        assert [(i, j) for i, x, y in locate(counts, a, b, order) for j in range(x, y)] == row[a:b]
    assert list(locate(counts, 5, 5, order)) == []


def stream(files, rank=0, world=1, n=2, train=True, **kw): return PictureStream(find_shards(files), DataConfig(image_size=8, **kw), n, train, 0, rank, world)


@pytest.mark.parametrize('world,workers,sizes', [(1, 1, (7, 5)), (2, 2, (7, 5)), (3, 2, (12,)), (2, 4, (1, 1, 1)), (4, 1, (3, 30))])
def test_each_sample_goes_to_one_reader(tmp_path, world, workers, sizes):
    files, n = write_shards(tmp_path, *sizes), world * workers
    for epoch in range(2):
        got = []
        for k in range(n):
            s = stream(files, rank=k // workers, train=False, world=world)
            s.epoch = epoch
            got += [c for _, c, _ in s._pictures('reader', s.bookmark(k % workers, workers), Counter())]
        assert sorted(got) == sorted(names(range(sum(sizes))))
    shares = [b - a for a, b in (s.share(k, n) for k in range(n))]
    assert max(shares) - min(shares) <= 1


def test_ranks_have_equally_many_whole_batches(tmp_path):
    files = write_shards(tmp_path, 5, 4, 8)
    for kw in (dict(), dict(epoch_size=50)):
        got = []
        for rank in range(3):
            s = stream(files, rank, 3, 2, **kw)
            loader = D.PictureLoader(s)
            batches = list(loader)
            assert len(batches) == len(loader) == (17 if not kw else 50) // 6
            got += [c for b in batches for c in b[1]]
        if not kw: assert len(set(got)) == len(got) == 12


def test_rank_from_the_environment(tmp_path, monkeypatch):
    assert D.rank_and_world() == (0, 1)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert D.rank_and_world() == (1, 2)
    files = write_shards(tmp_path, 8)
    second = captions(load(files))
    monkeypatch.setenv('RANK', '0')
    assert captions(load(files)) + second == names(range(8))


def test_rank_from_torch_distributed(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try: assert D.rank_and_world() == (0, 1)
    finally: torch.distributed.destroy_process_group()


def test_epochs_of_set_length(tmp_path):
    files = write_shards(tmp_path, 6, 4)
    for workers in (0, 2):
        loader = load(files, 4, True, epoch_size=27, workers=workers)               # 6 batches of 4; the stream repeats
        assert len(loader) == 6
        epochs = [captions(loader) for _ in range(5)]
        assert [len(e) for e in epochs] == [24] * 5
        assert Counter(c for e in epochs for c in e) == Counter({c: 12 for c in names(range(10))})
        assert len({tuple(e) for e in epochs}) == 5
    short = load(files, 4, False, epoch_size=7)
    assert captions(short) == names(range(7)) == captions(short) and len(short) == 2
    assert captions(load(files, 4, False, epoch_size=99)) == names(range(10))


def test_last_batch(tmp_path):
    files = write_shards(tmp_path, 6, 4)
    for workers in (0, 2, 3):
        train, valid = load(files, 4, True, workers=workers), load(files, 4, workers=workers)
        assert [len(b[1]) for b in train] == [4, 4] and len(train) == 2
        assert [len(b[1]) for b in valid] == [4, 4, 2] and len(valid) == 3
        assert sorted(captions(valid)) == sorted(names(range(10)))


@pytest.mark.parametrize('workers', [0, 2])
def test_reproducible_and_apart_from_global_randomness(tmp_path, workers):
    files = write_shards(tmp_path, 9, 9, 9)
    make = lambda seed=0: load(files, 5, True, seed, crop='random', workers=workers, shuffle=7)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    a = make()
    first, second = list(a), list(a)
    assert random.getstate() == states[0] and (np.random.get_state()[1] == states[1]).all() and torch.equal(torch.get_rng_state(), states[2])
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    same = lambda x, y: len(x) == len(y) and all(p[1] == q[1] and torch.equal(p[0], q[0]) for p, q in zip(x, y))
    b = make()
    assert same(list(b), first) and same(list(b), second) and not same(first, second)
    b.epoch = 1
    assert same(list(b), second)
    assert not same(list(make(3)), first)


def test_shuffle_zero_keeps_the_order_and_random_crops_move(tmp_path):
    files = write_shards(tmp_path, 4, 4)
    assert captions(load(files, 4, True, shuffle=0)) == names(range(8))
    img = Image.fromarray(np.arange(0, 240, 2, np.uint8)[None].repeat(8, 0))
    (tmp_path/'wide.tar').write_bytes(tar_bytes([f for i in range(20) for f in [(f'{i}.png', encode(img)), (f'{i}.txt', b'x')]]))
    corner = lambda **kw: {int(x) for b in load([str(tmp_path/'wide.tar')], 20, **kw) for x in b[0][:, 0, 0, 0]}
    assert corner(train=True) == corner(crop='random') == {112} and len(corner(train=True, crop='random')) > 10


def test_shuffled_is_uniform():
    at = Counter(list(shuffled(range(6), 6, random.Random(s))).index(0) for s in range(3000))
    assert max(abs(at[i] - 500) for i in range(6)) < 120
    assert list(shuffled([], 4, random.Random(0))) == []


# --- the loader

@pytest.mark.parametrize('workers', [0, 1, 2])
def test_problems_are_skipped_counted_and_reported(tmp_path, workers):
    bad = [('a.png', b'junk'), ('a.txt', b'broken'), ('b.txt', b'no picture'), ('c.png', encode(picture(1))), ('d.png', encode(picture(1))), ('d.txt', b'\xff')]
    (tmp_path/'00009.tar').write_bytes(tar_bytes(bad))
    (tmp_path/'00008.tar').write_bytes(b'not a tar at all')
    files = write_shards(tmp_path, 5, 5)
    loader = load(files, 4, workers=workers)
    want = {BAD_PICTURE: 1, NO_PICTURE: 1, NO_CAPTION: 1, BAD_CAPTION: 1, BAD_TAR: 1}
    for epoch in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('default')
            got = [c for b in loader for c in b[1]]
        assert sorted(got) == sorted(names(range(10))) and loader.skipped == want
        lines = [str(w.message) for w in caught if 'skipped' in str(w.message)]
        assert len(lines) == 1 and f'epoch {epoch} of the validation' in lines[0] and 'skipped 5' in lines[0] and BAD_TAR in lines[0]
    filled = load(files, 5, True, epoch_size=15, workers=workers)
    assert [len(b[1]) for b in quiet(filled)] == [5, 5, 5] and sum(filled.skipped.values()) >= 5


def test_no_warning_when_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert len(list(load(write_shards(tmp_path, 4), 2))) == 2


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kw', [{}, {'epoch_size': 8}])
def test_nothing_left(tmp_path, train, workers, kw):
    (tmp_path/'x.tar').write_bytes(tar_bytes([f for i in range(9) for f in [(f'{i}.png', b'junk'), (f'{i}.txt', b'x')]]))
    with pytest.raises(ValueError) as e: list(load([str(tmp_path/'x.tar')], 4, train, workers=workers, **kw))
    assert 'no usable pictures' in str(e.value) and 'x.tar' in str(e.value) and BAD_PICTURE in str(e.value)


def test_too_few(tmp_path):
    files = write_shards(tmp_path, 3)
    for kw, text in [({}, 'an epoch has 3 pictures'), ({'epoch_size': 2}, 'an epoch has 2 pictures')]:
        with pytest.raises(ValueError, match=text): load(files, 4, True, **kw)
    assert captions(load(files, 4, True, epoch_size=4))[:3] != []
    (tmp_path/'00001.tar').write_bytes(tar_bytes([f for i in range(9) for f in [(f'{i}.png', b'junk'), (f'{i}.txt', b'x')]]))
    with pytest.raises(ValueError, match='3 usable pictures'): quiet(load(files, 4, True))
    (tmp_path/'empty.tar').write_bytes(tar_bytes([]))
    with pytest.raises(ValueError, match='hold no samples'): load([str(tmp_path/'empty.tar')])


@pytest.mark.parametrize('kw,text', [({'image_size': 0}, 'data.image_size is 0'), ({'epoch_size': 0}, 'data.epoch_size is 0'), ({'shuffle': -1}, 'data.shuffle'),
                                     ({'workers': -1}, 'data.workers'), ({'crop': 'top'}, "'center' or 'random'"), ({'n': 0}, 'batch_size is 0')])
def test_impossible_settings(tmp_path, kw, text):
    with pytest.raises(ValueError, match=text): load(write_shards(tmp_path, 3), **kw)


def test_batches(tmp_path):
    files = write_shards(tmp_path, 5)
    imgs, caps, micros = next(iter(load(files, 3, image_size=16)))
    assert isinstance(imgs, torch.Tensor) and imgs.dtype == torch.uint8 and imgs.shape == (3, 3, 16, 16) and imgs.is_contiguous()
    assert caps == names(range(3)) and micros['scale'].dtype == torch.float32 and micros['scale'].tolist() == [16.] * 3
    assert [number(i) for i in imgs] == [0, 1, 2]


def test_leaving_an_epoch_early_and_peeking(tmp_path):
    files, before = write_shards(tmp_path, 8), threading.active_count()
    for workers in (0, 2):
        a, b = (load(files, 2, True, workers=workers) for _ in range(2))
        peek = a.one_batch()
        assert a.epoch == 0 and list(a)[0][1] == peek[1] == list(b)[0][1]
        for _ in a: break
        next(iter(b))
        assert captions(a) == captions(b) and a.epoch == b.epoch == 3
    end = time.monotonic() + 30                              # the threads of torch's queues take a moment to leave
    while threading.active_count() > before + 1 and time.monotonic() < end: time.sleep(.05)
    assert threading.active_count() <= before + 1, threading.enumerate()


def test_stream_can_be_sent_to_a_spawned_worker(tmp_path):
    s = stream(write_shards(tmp_path, 3), train=False)
    assert [c[1] for c in pickle.loads(pickle.dumps(s))] == [c[1] for c in s]


def test_counts_notice_a_changed_file(tmp_path):
    files = write_shards(tmp_path, 3)
    assert find_shards(files)[0].count == 3
    write_shards(tmp_path, 5)
    assert find_shards(files)[0].count == 5


def test_show_pictures(tmp_path):
    import matplotlib
    matplotlib.use('agg')
    imgs = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    assert len(show_pictures(imgs, names(range(5)), ncols=2).axes) == 6
    assert len(show_pictures([picture(1)]).axes) == 1 and len(show_pictures(imgs.numpy()).axes) == 5
    matplotlib.pyplot.close('all')


@pytest.mark.parametrize('with_valid', [False, True])
def test_a_fastai_learner_drives_the_loaders(tmp_path, with_valid):
    import fastai.callback.progress
    from fastai.learner import Learner
    from fastai.callback.core import Callback
    files = write_shards(tmp_path, 12)
    config = DataConfig(files=files, image_size=8, workers=0)
    dls = create_dls(config, 4, valid=config if with_valid else None, device='cpu')
    assert dls.device == torch.device('cpu') and len(dls.train) == 3 and len(dls.valid) == 3 * with_valid and dls.bs == 4
    seen = []

    class Prepare(Callback):
        def before_batch(self):
            imgs, caps = self.learn.xb
            seen.append((self.training, len(caps), self.learn.yb[0]['scale'].tolist()))
            self.learn.xb, self.learn.yb = (imgs.float() / 255,), (imgs.float().mean((1, 2, 3))[:, None] / 255,)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1))
    learn = Learner(dls, model, loss_func=torch.nn.functional.mse_loss, cbs=Prepare())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert [s[0] for s in seen] == ([True] * 3 + [False] * 3 * with_valid) * 2 and all(s[1] == 4 and s[2] == [16.] * 4 for s in seen)
    if with_valid: assert learn.validate()[0] >= 0
    assert dls.one_batch()[1] and len(dls.show_batch(max_n=3).axes) == 3


# --- from afar

from test_storage import bucket, here_only, moto_port, serving, sometimes, web   # noqa: E402 (fixtures)
from mdm.data.loader import files as S


def same(x, y): return len(x) == len(y) and all(a[1] == b[1] and torch.equal(a[0], b[0]) and torch.equal(a[2]['scale'], b[2]['scale']) for a, b in zip(x, y))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bucket_that_fails_some_requests_gives_what_the_folder_gives(tmp_path, bucket, here_only, workers):
    files = write_shards(tmp_path, 9, 12, 7)
    for p in tmp_path.glob('*.tar'): bucket.put(f'd/{p.name}', p.read_bytes())
    bucket.trouble = sometimes
    local, remote = (load(f, 5, True, workers=workers, shuffle=6, crop='random') for f in (files, ['s3://shop.cats/d/*.tar']))
    assert same(list(local), list(remote)) and same(list(local), list(remote)) and not remote.skipped


@pytest.mark.parametrize('ranges', [True, False])
def test_tars_and_tables_on_a_web_server(tmp_path, web, ranges):
    web.ranges = ranges
    (web.folder/'in').mkdir()
    write_shards(web.folder/'in', 3, 3)
    (web.folder/'z.tar.gz').write_bytes(gzip.compress(tar_bytes([f for i in range(6, 9) for f in good(i)])))
    write_index(web.folder/'in', 'tar\tfile\tcaption\n00000.tar\t000002.png\ttwo\n00001.tar\t000003.png\tthree\ngone.tar\tx.png\ty\n')
    write_index(web.folder, 'filename\nin/x.tsv\n', 'all.tsv')
    loader = load([f'{web.url}/all.tsv', f'{web.url}/in/{{00000..00001}}.tar', f'{web.url}/z.tar.gz?sig=1'])
    assert captions(loader) == ['two', 'three'] + names(range(9)) and loader.skipped == {BAD_TAR: 1}
    write_index(web.folder, 'filename\nin/x.tsv\nin/y.tsv\n', 'all.tsv')
    with pytest.raises(FileNotFoundError, match='in/y.tsv'): load([f'{web.url}/all.tsv'])


def test_counting_from_afar_is_done_once_and_a_manifest_spares_it(web, tmp_path):
    write_shards(web.folder, 3, 4)
    files = [f'{web.url}/{{00000..00001}}.tar']
    gets = lambda: [p for c, p, _ in web.requests if c == 'GET' and p.endswith('.tar')]
    assert [s.count for s in find_shards(files)] == [3, 4] and len(gets()) == 2
    D._count.cache_clear()
    assert [s.count for s in find_shards(files)] == [3, 4] and len(gets()) == 2              # another process finds the notes
    write_shards(web.folder, 5)
    assert [s.count for s in find_shards(files)] == [5, 4] and len(gets()) == 3              # a changed file
    size = (web.folder/'00001.tar').stat().st_size
    for f in (tmp_path/'cache/mdm/counts').iterdir(): f.unlink()
    D._count.cache_clear(), web.requests.clear()
    (web.folder/'manifest.json').write_text('{"format": 1, "shards": {"00000.tar": {"samples": 9, "bytes": 1}, "00001.tar": {"samples": 8, "bytes": %d}}}' % size)
    assert [s.count for s in find_shards(files)] == [5, 8] and gets() == ['/00000.tar']
    D._count.cache_clear()
    (tmp_path/'cache/mdm/counts').chmod(0o500)
    [f.write_text('junk') for f in (tmp_path/'cache/mdm/counts').iterdir()]
    assert [s.count for s in find_shards(files)] == [5, 8]


@pytest.mark.parametrize('workers', [0, 2])
def test_a_shard_that_breaks_down_in_mid_epoch_is_skipped(tmp_path, web, here_only, workers):
    here_only.setattr(S, 'TRIES', 2)
    here_only.setattr(S, 'BLOCK', 2048)
    write_shards(web.folder, 6, 6, 6)
    files = [f'{web.url}/{{00000..00002}}.tar']
    loader, filled = load(files, 3, False, workers=workers), load(files, 3, True, workers=workers, epoch_size=12)
    web.trouble = lambda command, path, n: 503 if '00001' in path else None
    got = captions(loader)
    assert sorted(got) == sorted(names([*range(6), *range(12, 18)])) and set(loader.skipped) == {D.UNREACHABLE} and sum(loader.skipped.values()) <= 2
    assert len(quiet(filled)) == len(quiet(filled)) == 4
    web.trouble = lambda command, path, n: None
    assert captions(loader) and not loader.skipped
    web.trouble = lambda command, path, n: 503
    with pytest.raises(ValueError, match='tar that could not be fetched'): quiet(filled)


def test_a_bucket_out_of_reach_at_the_start_is_an_error(web, here_only):
    here_only.setattr(S, 'TRIES', 2)
    write_shards(web.folder, 3)
    web.trouble = lambda command, path, n: 503 if command == 'GET' and path.endswith('.tar') else None
    with pytest.raises(ConnectionError, match='gave up'): load([f'{web.url}/00000.tar'])


def test_messages_keep_secrets(web, here_only):
    (web.folder/'x.tar').write_bytes(tar_bytes([('a.png', b'junk'), ('a.txt', b'x')]))
    (web.folder/'e.tar').write_bytes(tar_bytes([]))
    (web.folder/'x.zip').write_bytes(b'')
    address = web.url.replace('//', '//ann:hunter2@')
    for name, train in (('x.tar', True), ('x.tar', False), ('e.tar', True), ('x.zip', True)):
        with pytest.raises(ValueError) as e: quiet(load([f'{address}/{name}?sig=0123abcd'], 1, train))
        assert name in str(e.value) and 'hunter2' not in str(e.value) and '0123abcd' not in str(e.value)


# --- sources by weight

def row(s, start, stop): return [sample['txt'].decode() for _, sample in s._read(start, stop, [])]


@pytest.mark.parametrize('weights', [[.7, .3], [1, 1], [3, 1], [1 / 3, 2 / 3], [.123, .877]])
def test_shares_are_exact_and_sources_go_round(tmp_path, weights):
    for n, d in (('a', 7), ('b', 5)): (tmp_path/n).mkdir(), write_shards(tmp_path/n, 2, d - 2)
    config = DataConfig(files=[str(tmp_path/'a/*.tar'), str(tmp_path/'b/*.tar')], weights=weights, image_size=8, epoch_size=10)
    s = PictureStream(find_shards(config.files), config, 2)
    of = lambda r: [i.tar.split(os.sep)[-2] for i in r]
    places = s.turn[np.arange(200) % len(s.turn)]
    for n in range(1, 201): assert abs((places[:n] == 0).sum() - n * weights[0] / sum(weights)) <= 1
    whole = row(s, 0, 200)
    assert all(row(s, a, b) == whole[a:b] for a, b in [(0, 1), (7, 31), (99, 200), (150, 151)])        # from anywhere
    for k, n in ((0, 7), (1, 5)):
        own = [c for c, p in zip(whole, places) if p == k]
        assert all(len({*own[i:i + n]}) == n for i in range(0, len(own) - n, n))                       # each once before any twice


def test_weighted_epochs(tmp_path):
    for n in 'ab': (tmp_path/n).mkdir(), write_shards(tmp_path/n, 8)
    (tmp_path/'b/00000.tar').write_bytes(tar_bytes([f for i in range(100, 104) for f in good(i)] + [('x.png', b'junk'), ('x.txt', b'x')]))
    files = [str(tmp_path/n/'*.tar') for n in 'ab']
    for workers in (0, 2):
        loader = load(files, 4, True, weights=[1, 3], epoch_size=40, workers=workers, shuffle=3)
        got = Counter(int(c.split()[1]) >= 100 for e in range(4) for c in captions(loader))
        assert sum(got.values()) == 160 and 100 <= got[True] <= 120 and len(loader) == 10
    ranks = [D.PictureLoader(PictureStream(find_shards(files), DataConfig(files=files, weights=[1, 3], image_size=8, epoch_size=48), 2, True, 0, r, 3)) for r in range(3)]
    assert [len(quiet(r)) for r in ranks] == [8, 8, 8]
    assert sorted(captions(load(files, 3, False, weights=[1, 3]))) == sorted(names([*range(8), *range(100, 104)]))       # validation: everything once
    for w, text in (([1], '2 entries'), ([1, 0], '2 entries'), ([1, float('nan')], '2 entries')):
        with pytest.raises(ValueError, match=text): load(files, 4, True, weights=w)
    with pytest.raises(ValueError, match='no samples of their own'): load([files[0], files[0]], 4, True, weights=[1, 1])


# --- embeddings

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
    assert sorted(got) == names(range(4)) and loader.skipped == {D.NO_EMBEDDING: 1, D.BAD_EMBEDDING: 3}
    for c in got: assert isinstance(c, D.EmbeddedCaption) and c.embedding.dtype == np.float16 and np.array_equal(c.embedding, e(int(c.split()[1])))
    assert type(pickle.loads(pickle.dumps(got[0]))) is D.EmbeddedCaption and pickle.loads(pickle.dumps(got[3])).embedding.shape == got[3].embedding.shape
    plain = load([str(tmp_path/'0.tar')], 2, workers=workers)
    assert len(captions(plain)) == 8 and type(next(iter(plain))[1][0]) is str


# --- going on

def messy(folder):
    "Shards with a broken picture, a missing caption, a damaged tar and a missing one behind an index."
    write_shards(folder, 9, 14, 8)
    (folder/'bad.tar').write_bytes(tar_bytes([f for i in range(50, 60) for f in (good(i) if i % 3 else [(f'{i}.png', b'junk'), (f'{i}.txt', b'x')])]))
    (folder/'cut.tar').write_bytes(tar_bytes([f for i in range(60, 70) for f in good(i)])[:9000])
    write_index(folder, 'tar\tfile\tcaption\n' + ''.join(f'00000.tar\t{i:06d}.png\tindexed {i}\n' for i in range(12)) + ''.join(f'gone.tar\t{i}.png\tx\n' for i in range(4)))
    return [str(folder/'*.tar'), str(folder/'x.tsv')]


KINDS = dict(once={}, set_length=dict(epoch_size=43), weighted=dict(weights=[2, 1], epoch_size=40), in_order=dict(shuffle=0), long=dict(epoch_size=130), valid=dict(train=False))


@pytest.mark.parametrize('kind,workers', [*((k, 0) for k in KINDS), *((k, 2) for k in ('once', 'weighted', 'valid')), ('set_length', 3)])
def test_going_on_gives_the_same_batches_bit_for_bit(tmp_path, workers, kind):
    files, kw = messy(tmp_path), {'shuffle': 9, 'crop': 'random', 'workers': workers, 'train': True, **KINDS[kind]}
    make = lambda: load(files, 4, **kw)
    loader, whole, states, skipped, ends = make(), [], [], [], []
    for epoch in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for b in loader:
                whole.append(b)
                states.append(loader.state_dict())
        skipped.append(dict(loader.skipped))
        ends.append(len(whole))
    assert sum(map(len, skipped)) and [s['batch'] for s in states[:3]] == [1, 2, 3]
    for n in [2, ends[0] - 1, ends[0], ends[0] + 5] if workers else range(1, len(whole)):
        again = make()
        again.load_state_dict(pickle.loads(pickle.dumps(states[n - 1])))
        assert again.state_dict() == states[n - 1]
        rest, end = quiet(again), ends[again.epoch - 1]
        assert same(rest, whole[n:end]) and dict(again.skipped) == skipped[again.epoch - 1], n
        if not workers and n % 5 == 0 and again.epoch == 1: assert same(quiet(again), whole[end:])


def test_places_between_epochs_and_after_peeking(tmp_path):
    files = write_shards(tmp_path, 30)
    a, b = (load(files, 4, True, shuffle=5) for _ in range(2))
    assert a.state_dict()['batch'] == a.state_dict()['epoch'] == 0
    a.one_batch()
    assert a.state_dict()['batch'] == 0
    it = iter(a)
    next(it), next(it)
    place = a.state_dict()
    assert (place['epoch'], place['batch']) == (0, 2) and a.one_batch() is not None and a.state_dict() == place
    third = next(it)
    b.load_state_dict(place)
    assert same([b.one_batch()], [third]) and same([b.one_batch()], [third]) and b.state_dict() == place and len(list(b)) == 5
    assert (b.state_dict()['epoch'], b.state_dict()['batch']) == (1, 0) and len(list(b)) == 7
    a.epoch = 5                                       # somebody jumps ahead
    assert (a.state_dict()['epoch'], a.state_dict()['batch']) == (5, 0)
    b.load_state_dict(place)
    b.epoch = 4
    assert len(list(b)) == 7
    c = load(files, 4, True, shuffle=5)
    c.load_state_dict({'epoch': 0, 'batch': 2})       # all that is needed where nothing was skipped
    assert same(list(c)[:1], [third])
    import json
    c.load_state_dict(json.loads(json.dumps(place)))
    assert same(list(c)[:1], [third])


def test_a_place_of_other_settings_is_about_right_and_says_so(tmp_path):
    files = write_shards(tmp_path, 40)
    a = load(files, 4, True)
    it = iter(a)
    for _ in range(5): next(it)
    for n, kw, left in ((4, dict(workers=2), 5), (2, {}, 10), (4, dict(shuffle=3), 5)):
        b = load(files, n, True, **kw)
        with pytest.warns(UserWarning, match='about the same place'): b.load_state_dict(a.state_dict())
        assert len(list(b)) == left


def test_ranks_go_on_each_from_its_own_place(tmp_path):
    files = messy(tmp_path)
    make = lambda r: D.PictureLoader(stream(files, r, 3, 2, shuffle=7, crop='random'), 0)
    for r in range(3):
        a, b = make(r), make(r)
        whole = quiet(a) + quiet(a)
        a, it = make(r), None
        it = iter(a)
        for _ in range(4): next(it)
        b.load_state_dict(a.state_dict())
        assert same(quiet(b) + quiet(b), whole[4:])


def test_going_on_reads_only_what_is_needed(tmp_path, monkeypatch):
    files, opened = write_shards(tmp_path, *[20] * 10), []
    a = load(files, 4, True, shuffle=10)
    it = iter(a)
    for _ in range(40): next(it)
    b, old = load(files, 4, True, shuffle=10), D.open_file
    b.load_state_dict(a.state_dict())
    monkeypatch.setattr(D, 'open_file', lambda path: opened.append(path) or old(path))
    decoded, load_picture = [], D.load_picture
    monkeypatch.setattr(D, 'load_picture', lambda *args: decoded.append(1) or load_picture(*args))
    assert same(list(b), list(it)) and len(opened) <= 10 and len(set(opened[:5])) <= 5 and len(decoded) == 2 * 40


def read_on(files, pipe):
    it = iter(load(files, 4, True, image_size=256, workers=2, epoch_size=10**6))
    next(it)
    pipe.send([p.pid for p in psutil.Process().children()])
    threading.Event().wait()


def test_workers_end_with_their_parent(tmp_path):
    here, there = multiprocessing.Pipe()
    p = multiprocessing.get_context('fork').Process(target=read_on, args=(write_shards(tmp_path, 400), there))
    p.start()
    children = [psutil.Process(c) for c in here.recv()]
    p.kill()
    p.join()
    assert len(children) == 2 and not psutil.wait_procs(children, timeout=30)[1]
