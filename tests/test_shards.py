"Edge cases of mdm.data.shards and mdm.data.inspect: untidy folders, pictures of every kind, runs that are killed"
import csv, io, json, multiprocessing, os, random, re, shutil, signal, sys, tarfile, threading, time
from collections import Counter
from pathlib import Path
import numpy as np, pytest, webdataset
from PIL import Image
from tqdm import tqdm
from mdm.data.captions import key_fraction
from mdm.data import samples as S_samples, shards as S
from mdm.data.configs import ShardsConfig
from mdm.data.files import find_tars, read_manifest
from mdm.data.inspect import *
from mdm.data.samples import BAD_CAPTION, BAD_PICTURE, BAD_TAR, NO_CAPTION, NO_PICTURE, Skip, load_picture
from mdm.data.stream import DataConfig
from mdm.data.loader import create_loader
from mdm.data.shards import *
from mdm.utils.files import only_writer
from data_tools import P3, SWAPPED

red, blue = Image.new('RGB', (60,40), 'red'), Image.new('RGB', (60,40), 'blue')

def saved(img, format='PNG', **kwargs):
    out = io.BytesIO(); img.save(out, format, **kwargs); return out.getvalue()

def noise(seed, size=(40,30)): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1],3), np.uint8))

def put(folder, name, data, text='a caption'):
    path = Path(folder)/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if text is not None: path.with_suffix('.txt').write_bytes(text if isinstance(text, bytes) else text.encode())

def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}
def samples(folder): return [s for *_,s in read_samples(find_tars(folder))]
def by_file(folder): return {json.loads(s['json'])['file']: s for s in samples(folder)}
def report(folder): return [line.split('\t') for line in (Path(folder)/REPORT).read_text().splitlines()[1:]]
def pictures_of(batch): return batch[0].float()

@pytest.fixture
def many(tmp_path):
    "Sixty small pictures, eight of them unusable"
    for i in range(60): put(tmp_path/'photos', f'{i%7}/p{i}.jpg', saved(noise(i), 'JPEG') if i%15 else b'nothing', '' if i%20 == 7 else f'picture {i}')
    return tmp_path/'photos'

# ---- pictures

def test_ordinary_pictures_are_copied_byte_for_byte():
    for data,ext in ((saved(red, 'JPEG'), 'jpg'), (saved(red), 'png'), (saved(red, 'WEBP'), 'webp')):
        assert prepare_picture(data) == (ext, data)
        assert prepare_picture(data, resize=40) == (ext, data)

@pytest.mark.parametrize('format', ['GIF', 'WEBP', 'PNG'])
def test_of_an_animation_the_first_frame(format):
    data = saved(red, format, save_all=True, append_images=[blue], **({'lossless':True} if format == 'WEBP' else {}))
    ext, one = prepare_picture(data)
    img = Image.open(io.BytesIO(one))
    assert (ext, getattr(img, 'n_frames', 1), img.convert('RGB').getpixel((5,5))) == ('png', 1, (255,0,0))

@pytest.mark.parametrize('format', ['BMP', 'TIFF', 'GIF'])
def test_other_formats_become_png(format):
    ext, data = prepare_picture(saved(red, format))
    assert ext == 'png' and Image.open(io.BytesIO(data)).convert('RGB').tobytes() == red.tobytes()

odd = {
    'cmyk.jpg': (saved(red.convert('CMYK'), 'JPEG', quality=95), (254,0,0)),
    'cmyk.tif': (saved(red.convert('CMYK'), 'TIFF'), (254,0,0)),
    'palette.png': (saved(red.convert('P', palette=Image.Palette.ADAPTIVE)), (255,0,0)),
    'palette, transparent.png': (saved(red.convert('P', palette=Image.Palette.ADAPTIVE), transparency=0), (255,255,255)),
    'grey.png': (saved(Image.new('L', (60,40), 100)), (100,100,100)),
    'sixteen.png': (saved(Image.fromarray(np.full((40,60), 100*257, np.uint16))), (100,100,100)),
    'sixteen.tif': (saved(Image.fromarray(np.full((40,60), 100*257, np.uint16)), 'TIFF'), (100,100,100)),
    'bit.png': (saved(Image.new('1', (60,40), 1)), (255,255,255)),
    'seen through.png': (saved(Image.new('RGBA', (60,40), (255,0,0,0))), (255,255,255)),
    'seen through.webp': (saved(Image.new('RGBA', (60,40), (255,0,0,0)), 'WEBP', lossless=True, exact=True), (255,255,255))}

def test_odd_pictures_reach_training(tmp_path):
    "Whatever the mode, the loader gives the colours that the eye sees"
    for i,(name,(data,_)) in enumerate(odd.items()): put(tmp_path/'in', f'{i} {name}', data, name)
    m = write_folder(tmp_path/'in', tmp_path/'out')
    assert m['skipped'] == {} and sum(o['samples'] for o in m['shards'].values()) == len(odd)
    loader = create_loader(DataConfig(files=[str(tmp_path/'out'/'*.tar')], image_size=16, workers=0), 1, train=False)
    seen = {b[1][0]: b[0][0,:,8,8].tolist() for b in loader}
    assert seen.keys() == odd.keys()
    for k,(_,colour) in odd.items(): assert np.abs(np.subtract(seen[k], colour)).max() <= 3, (k, seen[k])

def turned(w=60, h=40):
    "Left half red, right half blue, marked as lying on its side: upright, red is on top"
    img, exif = Image.new('RGB', (w,h), 'blue'), Image.Exif()
    img.paste((255,0,0), (0,0,w//2,h)); exif[0x112] = 6
    return saved(img, 'JPEG', exif=exif, quality=95)

@pytest.mark.parametrize('resize', [None, 20])
def test_turned_pictures_are_upright_in_training(tmp_path, resize):
    put(tmp_path/'in', 'turned.jpg', turned())
    write_folder(tmp_path/'in', tmp_path/'out', resize=resize)
    s, = samples(tmp_path/'out')
    assert (s['jpg'] == turned()) == (resize is None)
    (images,_,micros), = create_loader(DataConfig(files=[str(tmp_path/'out'/'*.tar')], image_size=16, workers=0), 1, train=False)
    top, bottom = images[0,:,2].float().mean(1), images[0,:,-3].float().mean(1)
    assert top[0] > 200 > 50 > top[2] and bottom[2] > 200 > 50 > bottom[0]
    assert micros['scale'].tolist() == [40]              # of the original, even where the picture was made smaller

def test_resize():
    for data,ext in ((saved(noise(0, (300,200)), 'JPEG'), 'jpg'), (saved(noise(0, (300,200))), 'png'), (saved(noise(0, (300,200)), 'WEBP'), 'png'), (saved(noise(0, (300,200)), 'TIFF'), 'png')):
        got, small = prepare_picture(data, 50)
        assert got == ext and Image.open(io.BytesIO(small)).size == (75,50)
        assert np.abs(np.asarray(Image.open(io.BytesIO(small)).convert('RGB')).astype(float).mean() - 127) < 6
    assert Image.open(io.BytesIO(prepare_picture(saved(red, 'GIF'), 500)[1])).size == (60,40)      # never larger

@pytest.mark.parametrize('data', [b'', b'<html>no picture</html>', saved(noise(0), 'JPEG')[:600], saved(noise(0))[:600], saved(noise(0), 'WEBP')[:300], saved(noise(0), 'GIF')[:500]])
@pytest.mark.parametrize('resize', [None, 8])
def test_broken_pictures(data, resize):
    with pytest.raises(Skip, match=BAD_PICTURE): prepare_picture(data, resize)

def test_a_picture_that_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(Skip, match=BAD_PICTURE): prepare_picture(saved(red))

def test_what_is_converted_is_srgb_without_a_profile(tmp_path):
    "Copied pictures keep their profile; converted and scaled ones have none, and in training both look the same"
    img = Image.new('RGB', (60,40), (40,200,60))
    for name, format in (('a.jpg', 'JPEG'), ('b.png', 'PNG'), ('c.webp', 'WEBP'), ('d.tif', 'TIFF')):
        put(tmp_path/'in', name, saved(img, format, icc_profile=P3, **dict(JPEG=dict(quality=100, subsampling=0), WEBP=dict(lossless=True)).get(format, {})))
    put(tmp_path/'in', 'e.jpg', saved(Image.new('CMYK', (60,40), (255,0,0,0)), 'JPEG', icc_profile=SWAPPED))
    for resize in (None, 20):
        write_folder(tmp_path/'in', tmp_path/str(resize), resize=resize)
        for name, s in by_file(tmp_path/str(resize)).items():
            data = next(s[k] for k in ('jpg','png','webp') if k in s)
            kept = resize is None and name != 'd.tif'
            assert bool(Image.open(io.BytesIO(data)).info.get('icc_profile')) == kept, name
            want = (255,0,255) if name == 'e.jpg' else (0,204,12)
            assert np.abs(np.subtract(load_picture(data, 16)[0].getpixel((8,8)), want)).max() <= (9 if name == 'e.jpg' else 3), (name, resize)

def test_profiles_that_cannot_be_used_are_counted(tmp_path):
    put(tmp_path/'in', 'a.jpg', saved(red, 'JPEG', icc_profile=b'nonsense')); put(tmp_path/'in', 'b.jpg', saved(red, 'JPEG'))
    m = write_folder(tmp_path/'in', tmp_path/'out')
    assert m['notes'] == {BAD_PROFILE: 1} and m['skipped'] == {} and len(samples(tmp_path/'out')) == 2
    assert json.loads((tmp_path/'out'/'manifest.json').read_text()) == m

@pytest.mark.parametrize('mode', ['turned', 'plain', 'webp'])
def test_the_size_of_the_original_is_kept(tmp_path, mode):
    data = dict(turned=turned(300, 200), plain=saved(noise(0, (300,200)), 'JPEG'), webp=saved(noise(0, (300,200)), 'WEBP'))[mode]
    put(tmp_path/'in', f'a.{"webp" if mode == "webp" else "jpg"}', data); put(tmp_path/'in', 'small.jpg', saved(noise(1, (30,20)), 'JPEG'))
    write_folder(tmp_path/'in', tmp_path/'out', resize=20)
    about = {k: json.loads(s['json']) for k,s in by_file(tmp_path/'out').items()}
    size = (200,300) if mode == 'turned' else (300,200)
    large = next(o for k,o in about.items() if k[0] == 'a')
    assert (large['original_width'], large['original_height']) == size and about['small.jpg'] == {'file':'small.jpg'}
    loader = create_loader(DataConfig(files=[str(tmp_path/'out'/'*.tar')], image_size=16, workers=0), 2, train=False)
    assert sorted(next(iter(loader))[2]['scale'].tolist()) == [20, 200]

# ---- keys

def test_keys_are_unique_and_safe():
    names = ['a.jpg', 'A.jpg', 'a.png', 'b/a.jpg', 'b_a.jpg', 'ä.jpg', '猫.jpg', '犬.jpg', 'x'*300+'.jpg', 'y'*300+'.jpg', '../a.jpg', 'con.jpg', ' .jpg', 'a b.jpg', 'a.b.jpg', 'a\udcff.jpg', '-.jpg', '😀.jpg']
    keys = [make_key(n) for n in names]
    assert len({k.lower() for k in keys}) == len(names)
    assert all(re.fullmatch(r'[0-9A-Za-z][0-9A-Za-z_-]{0,59}', k) for k in keys), keys
    assert make_key('b/Ärger.jpg') == 'b_Arger-4ae6897444ee0053'        # for ever

# ---- folders

def test_a_folder(tmp_path):
    names = ['a.jpg', 'deep/er/b.PNG', 'Zoë.webp', '猫 & 犬.jpg', 'a.b.c.jpg']
    for n in names: put(tmp_path/'in', n, saved(noise(len(n)), {'webp':'WEBP', 'PNG':'PNG'}.get(n.rsplit('.')[-1], 'JPEG')), f' words of {n}\n')
    for n in ('.hidden.jpg', '.ipynb_checkpoints/a.jpg', '__MACOSX/a.jpg', '._a.jpg', '.DS_Store', 'Thumbs.db'): put(tmp_path/'in', n, b'', None)
    m = write_folder(tmp_path/'in', tmp_path/'out', command='mdm_dataset folder in out')
    assert {k: v['txt'].decode() for k,v in by_file(tmp_path/'out').items()} == {n: f'words of {n}' for n in names}
    for n,s in by_file(tmp_path/'out').items(): assert next(s[k] for k in ('jpg','png','webp') if k in s) == (tmp_path/'in'/n).read_bytes()
    tar = tmp_path/'out'/'pictures-000000.tar'
    assert m['shards'] == {tar.name: {'samples':5, 'bytes':tar.stat().st_size}}
    assert (m['format'], m['complete'], m['command'], m['skipped']) == (1, True, 'mdm_dataset folder in out', {})
    assert json.loads((tmp_path/'out'/'manifest.json').read_text()) == m
    assert sorted(files(tmp_path/'out')) == ['manifest.json', 'packed.json', tar.name, 'skipped.tsv']
    assert {o['__key__'] for o in webdataset.WebDataset(str(tar), shardshuffle=False)} == {make_key(n) for n in names}

def test_size_of_shards(tmp_path, many):
    m = write_folder(many, tmp_path/'a', per_shard=10)
    assert [o['samples'] for o in m['shards'].values()] == [10]*5+[3] and sum(m['skipped'].values()) == 7
    b = write_folder(many, tmp_path/'b', max_mb=.02)
    sizes = [o['bytes'] for o in b['shards'].values()]
    assert len(sizes) > 3 and all(20_000 <= o < 40_000 for o in sizes[:-1])
    assert {s['__key__'] for s in samples(tmp_path/'a')} == {s['__key__'] for s in samples(tmp_path/'b')}

def test_order_is_stable_and_mixed(tmp_path, many):
    for k in (1,5): write_folder(many, tmp_path/str(k), per_shard=10, workers=k)
    assert files(tmp_path/'1') == files(tmp_path/'5')
    shutil.copytree(many, tmp_path/'copy')
    write_folder(tmp_path/'copy', tmp_path/'again', per_shard=10)
    assert {k: v for k,v in files(tmp_path/'again').items() if k.endswith('.tar')} == {k: v for k,v in files(tmp_path/'1').items() if k.endswith('.tar')}
    first = [json.loads(s['json'])['file'] for s in samples(tmp_path/'1')[:10]]
    assert len({f.split('/')[0] for f in first}) > 3 and first != sorted(first)

@pytest.mark.parametrize('text, reason', [(None, NO_CAPTION), ('', NO_CAPTION), (' \n\t', NO_CAPTION), ('forêt'.encode('latin-1'), BAD_CAPTION), ('Wald'.encode('utf-16'), BAD_CAPTION)])
def test_captions_that_cannot_be_used(tmp_path, text, reason):
    put(tmp_path/'in', 'good.jpg', saved(red, 'JPEG'))
    put(tmp_path/'in', 'bad, worse.jpg', saved(red, 'JPEG'), text)
    m = write_folder(tmp_path/'in', tmp_path/'out')
    assert m['skipped'] == {reason:1} and list(by_file(tmp_path/'out')) == ['good.jpg']
    (name, why, _), = report(tmp_path/'out')
    assert (name, why) == ('bad, worse.jpg', reason)

def test_captions_that_can(tmp_path):
    texts = {'long.jpg': 'word '*20_000, 'lines.jpg':'one\ntwo', 'mark.jpg':'\ufeffmarked', 'all.jpg':'日本語 😀 "quoted"\ttab'}
    for n,t in texts.items(): put(tmp_path/'in', n, saved(red, 'JPEG'), t)
    assert write_folder(tmp_path/'in', tmp_path/'out')['skipped'] == {}
    assert {n: s['txt'].decode() for n,s in by_file(tmp_path/'out').items()} == {n: t.strip('\ufeff ') for n,t in texts.items()}

def test_unreadable_pictures_are_reported(tmp_path):
    put(tmp_path/'in', 'good.jpg', saved(noise(0), 'JPEG'))
    for n in ('cut\tshort.jpg', 'cut\nshort.jpg', 'cut "short".jpg', 'cut\udcff.jpg'): put(tmp_path/'in', n, saved(noise(0), 'JPEG')[:700])
    m = write_folder(tmp_path/'in', tmp_path/'out')
    assert m['skipped'] == {BAD_PICTURE:4}
    rows = list(csv.reader(open(tmp_path/'out'/REPORT, newline=''), delimiter='\t'))
    assert {o[0] for o in rows[1:]} == {'cut\tshort.jpg', 'cut\nshort.jpg', 'cut "short".jpg', 'cut\\udcff.jpg'}
    assert all('runcated' in o[2] for o in rows[1:])

def test_nothing_can_be_used(tmp_path):
    put(tmp_path/'in', 'a.jpg', saved(red, 'JPEG'), None)
    for _ in range(2):
        with pytest.raises(ValueError, match=f'1 x {NO_CAPTION}'): write_folder(tmp_path/'in', tmp_path/'out')
    with pytest.raises(FileNotFoundError, match='no pictures'): write_folder(tmp_path/'out', tmp_path/'more')
    with pytest.raises(FileNotFoundError, match='no folder'): write_folder(tmp_path/'none', tmp_path/'more')
    with pytest.raises(ValueError, match='folder.per_shard: found 0'): write_folder(tmp_path/'in', tmp_path/'more', per_shard=0)
    with pytest.raises(ValueError, match='folder.resize: found 0'): write_folder(tmp_path/'in', tmp_path/'more', resize=0)
    assert not (tmp_path/'more').exists()

def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    put(tmp_path/'in', 'a.jpg', saved(red, 'JPEG')); put(tmp_path/'in', 'private/b.jpg', saved(red, 'JPEG'))
    real = os.scandir
    def scandir(path):
        if str(path).endswith('private'): raise PermissionError(13, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(PermissionError, match='private'): write_folder(tmp_path/'in', tmp_path/'out')

kinds = {'b.jp2': ('JPEG2000', {}), 'c.mpo': ('MPO', dict(save_all=True, append_images=[red])), 'd.ppm': ('PPM', {}), 'e.tga': ('TGA', {}), 'f.avif': ('AVIF', {}), 'g.jfif': ('JPEG', {}), 'h.bmp': ('BMP', {})}

def test_every_file_is_used_or_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None); monkeypatch.setitem(sys.modules, 'pillow_jxl', None)
    S_samples._load_packages.cache_clear()
    try:
        for name, (format, kw) in kinds.items(): put(tmp_path/'in', name, saved(noise(1), format, **kw))
        put(tmp_path/'in', 'i.heic', b'\0\0\0\x18ftypheic'); put(tmp_path/'in', 'j.JXL', b'\xff\x0a')
        for name in ('lonely.txt', 'sub/README.md', 'raw.cr2', 'LICENSE', 'x.verylongending'): put(tmp_path/'in', name, b'words', None)
        (tmp_path/'in'/'link.jpg').symlink_to(tmp_path/'in'/'g.jfif'); (tmp_path/'in'/'link.txt').symlink_to('g.txt')
        (tmp_path/'in'/'dead.jpg').symlink_to('nowhere.jpg')
        (tmp_path/'elsewhere').mkdir(); put(tmp_path/'elsewhere', 'private.jpg', saved(red, 'JPEG'))
        (tmp_path/'in'/'folder').symlink_to(tmp_path/'elsewhere')
        (tmp_path/'in'/'loop').symlink_to(tmp_path/'in')
        os.mkfifo(tmp_path/'in'/'pipe.jpg')
        m = write_folder(tmp_path/'in', tmp_path/'in'/'shards')
        assert sorted(by_file(tmp_path/'in'/'shards')) == sorted([*kinds, 'link.jpg'])
        assert {o[0]: o[1] for o in report(tmp_path/'in'/'shards')} == {
            'i.heic': 'picture of a kind (.heic) that needs: pip install pillow-heif', 'j.JXL': 'picture of a kind (.jxl) that needs: pip install pillow-jxl-plugin',
            'lonely.txt': ORPHAN, 'sub/README.md': f'{OTHER_FILE} (.md)', 'raw.cr2': f'{OTHER_FILE} (.cr2)', 'LICENSE': f'{OTHER_FILE} (no usual ending)',
            'x.verylongending': f'{OTHER_FILE} (no usual ending)', 'dead.jpg': DEAD_LINK, 'folder': LINKED_FOLDER, 'loop': LINKED_FOLDER, 'pipe.jpg': OTHER_FILE}
        assert sum(m['skipped'].values()) == 11
        assert write_folder(tmp_path/'in', tmp_path/'in'/'shards') == m                       # what it wrote itself is no news
    finally: S_samples._load_packages.cache_clear()

def test_a_folder_without_pictures_says_what_it_has(tmp_path):
    put(tmp_path/'in', 'a.pdf', b''); put(tmp_path/'in', 'b.cr2', b'')
    with pytest.raises(FileNotFoundError, match=r'no pictures.*it has 4 other files \(.cr2, .pdf, .txt\)'): write_folder(tmp_path/'in', tmp_path/'out')

# ---- pictures that come later

def test_new_pictures_go_into_new_shards(tmp_path, many):
    write_folder(many, tmp_path/'out', per_shard=10)
    before = files(tmp_path/'out')
    for i in range(5): put(many, f'later/{i}.jpg', saved(noise(i), 'JPEG') if i else b'nothing', f'later {i}')
    repaired = many/next(o[0] for o in report(tmp_path/'out') if o[1] == BAD_PICTURE)
    repaired.write_bytes(saved(red, 'JPEG'))                         # it was left out, and can be used now
    (many/'rows').mkdir(); put(many/'rows', 't.jpg', saved(red, 'JPEG'), None); (many/'rows'/'metadata.csv').write_text('file_name,text\nt.jpg,from a table\n')
    m = write_folder(many, tmp_path/'out', per_shard=10)
    after = files(tmp_path/'out')
    assert {k: after[k] for k in before if k.endswith('.tar')} == {k: v for k,v in before.items() if k.endswith('.tar')} and after['skipped.tsv'].startswith(before['skipped.tsv'])
    new = sorted(k for k in after.keys() - before.keys())
    assert new == ['pictures-000006.tar'] and m['shards'][new[0]]['samples'] == 6 and m['complete']
    assert sum(o['samples'] for o in m['shards'].values()) == 59 == len(samples(tmp_path/'out')) and m['skipped'][BAD_PICTURE] == 5
    for _ in range(2): assert write_folder(many, tmp_path/'out', per_shard=10) == m and files(tmp_path/'out') == after
    put(many/'rows', 'u.jpg', saved(blue, 'JPEG'), None); (many/'rows'/'metadata.csv').write_text('file_name,text\nt.jpg,from a table\nu.jpg,a row that was added\n')
    m = write_folder(many, tmp_path/'out', per_shard=10)
    assert m['shards']['pictures-000007.tar']['samples'] == 1
    with pytest.raises(FileExistsError, match='resize was None, now 8'): write_folder(many, tmp_path/'out', per_shard=10, resize=8)
    (many/'rows'/'metadata.csv').write_text('file_name,text\nt.jpg,another caption\nu.jpg,a row that was added\n')
    with pytest.raises(FileExistsError, match="changed or gone since, for instance 'rows/t.jpg'"): write_folder(many, tmp_path/'out', per_shard=10)

def test_adding_is_broken_off_at_every_call(tmp_path, monkeypatch):
    for i in range(6): put(tmp_path/'in', f'{i}.jpg', saved(noise(i, (8,8)), 'JPEG') if i%5 else b'', f'picture {i}')
    work = lambda out: write_folder(tmp_path/'in', out, per_shard=2, workers=1)
    work(tmp_path/'first')
    for i in range(6, 11): put(tmp_path/'in', f'{i}.jpg', saved(noise(i, (8,8)), 'JPEG') if i%5 else b'', f'picture {i}')
    shutil.copytree(tmp_path/'first', tmp_path/'whole'); work(tmp_path/'whole')
    real, n = os.replace, 0
    class Off(BaseException): pass
    while True:
        n, calls, out = n+1, 0, tmp_path/f'out{n}'
        shutil.copytree(tmp_path/'first', out)
        def off(*args):
            nonlocal calls
            calls += 1
            if calls == n: raise Off()
            return real(*args)
        monkeypatch.setattr(os, 'replace', off)
        try: work(out)
        except Off: stopped = True
        else: stopped = False
        monkeypatch.setattr(os, 'replace', real)
        work(out)
        assert files(out) == files(tmp_path/'whole'), n
        if not stopped: break
    assert n > 4

# ---- tables of captions

def test_endings_in_capitals(tmp_path):
    for n, text in (('A.JPG', 'A.TXT'), ('b.Jpeg', 'b.Txt'), ('c.png', 'c.txt')):
        put(tmp_path/'in', n, saved(red, 'PNG' if n[0] == 'c' else 'JPEG'), None); (tmp_path/'in'/text).write_text(n[0])
    assert write_folder(tmp_path/'in', tmp_path/'out')['skipped'] == {} and sorted(s['txt'].decode() for s in by_file(tmp_path/'out').values()) == ['A', 'b', 'c']

def test_metadata_jsonl(tmp_path):
    for n in ('a.jpg', 'sub/b.jpg', 'c.jpg', 'd.jpg', 'e.jpg', 'f.jpg'): put(tmp_path/'in', n, saved(red, 'JPEG'), None)
    put(tmp_path/'in', 'beside.jpg', saved(red, 'JPEG'), 'from the text file')
    lines = [dict(file_name='a.jpg', text='A', more=[1]), dict(file_name='./sub/b.jpg', text='B'), dict(file_name='c.jpg', text=None), dict(file_name='d.jpg', text=5),
        dict(file_name='e.jpg', text='half a character \ud800'), dict(file_name='gone.jpg', text='x'), dict(file_name='f.jpg', text='F'), dict(file_name='f.jpg', text='again')]
    (tmp_path/'in'/'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n\n')
    m = write_folder(tmp_path/'in', tmp_path/'out')
    assert {k: s['txt'].decode() for k,s in by_file(tmp_path/'out').items()} == {'a.jpg':'A', 'sub/b.jpg':'B', 'f.jpg':'F', 'beside.jpg':'from the text file'}
    assert {o[0]: o[1] for o in report(tmp_path/'out')} == {'c.jpg':NO_CAPTION, 'd.jpg':NO_CAPTION, 'e.jpg':BAD_CAPTION, 'gone.jpg':NOT_THERE}
    assert sum(m['skipped'].values()) == 4

@pytest.mark.parametrize('header', ['file_name,text', 'File,Caption', 'filename,prompt', 'id,caption,image'])
def test_metadata_csv_in_folders(tmp_path, header):
    "A table speaks of its own folder and those below; names may be spelt with combined letters or backslashes; text that is not UTF-8 is counted"
    columns = header.split(',')
    cell = lambda c, file, text: file if c.lower() in ('file_name','file','filename','image') else b'7' if c == 'id' else text
    for n in ('x/Zoë.jpg', 'x/y/b.jpg', 'x/c.jpg'): put(tmp_path/'in', n, saved(red, 'JPEG'), None)
    rows = [('Zoe\u0308.jpg'.encode(), '"a, ""b"""'.encode()), (b'y\\b.jpg', 'ü'.encode()), (b'c.jpg', b'\xff')]
    (tmp_path/'in'/'x'/'metadata.csv').write_bytes(b'\xef\xbb\xbf' + header.encode() + b'\r\n' + b''.join(b','.join(cell(c, *r) for c in columns) + b'\r\n' for r in rows))
    write_folder(tmp_path/'in', tmp_path/'out')
    assert {k: s['txt'].decode() for k,s in by_file(tmp_path/'out').items()} == {'x/Zoë.jpg':'a, "b"', 'x/y/b.jpg':'ü'}
    assert [o[:2] for o in report(tmp_path/'out')] == [['x/c.jpg', BAD_CAPTION]]

@pytest.mark.parametrize('name, text, what', [('metadata.jsonl', '{"file_name":"a.jpg","text":"A"}\n{', 'line 2'), ('metadata.jsonl', '[1]', 'expected an object'), ('metadata.jsonl', '{"file_name":"a.jpg"}', 'no column for the caption'),
    ('metadata.csv', 'a,b\n1,2\n', 'no column for the file')])
def test_tables_that_are_none(tmp_path, name, text, what):
    put(tmp_path/'in', 'a.jpg', saved(red, 'JPEG'))
    (tmp_path/'in'/name).write_text(text)
    with pytest.raises(ValueError, match=f'{name}.*{what}'): write_folder(tmp_path/'in', tmp_path/'out')

# ---- interruptions

tqdm.set_lock(threading.RLock())     # tqdm's own lock is shared with forked children; one that is killed while it holds it would stop us for ever

def killed(work, after):
    "Do some work in a process of its own that is killed when `after()` says so; was it?"
    p = multiprocessing.get_context('fork').Process(target=work)
    p.start()
    while p.is_alive() and not after(): time.sleep(.0005)
    if p.is_alive(): os.kill(p.pid, signal.SIGKILL)
    p.join()
    return p.exitcode == -signal.SIGKILL

def check_no_half(folder):
    for p in Path(folder).glob('*.tar'):
        with tarfile.open(p) as t: t.getnames()
        assert p.read_bytes()[-1024:] == bytes(1024)

def test_killed_at_many_moments(tmp_path, many, monkeypatch):
    "SIGKILL at twelve moments, each a little later: no half shard, and in the end the bytes of an undisturbed run"
    real = S.prepare_picture
    def slow(*args):
        time.sleep(.01)
        return real(*args)
    monkeypatch.setattr(S, 'prepare_picture', slow)
    work = lambda out: write_folder(many, out, per_shard=4, workers=2)
    work(tmp_path/'whole')
    out, rng, kills, places = tmp_path/'out', random.Random(0), 0, []
    for k in range(12):
        end = time.monotonic() + rng.uniform(.02, .15)
        kills += killed(lambda: work(out), lambda: time.monotonic() > end)
        if out.exists(): check_no_half(out); places.append((read_manifest(out) or {}).get('position', 0))
    assert kills and places == sorted(places)
    work(out)
    assert files(out) == files(tmp_path/'whole')

@pytest.mark.parametrize('step', ['replace', 'fsync'])
def test_broken_off_at_every_call(tmp_path, step, monkeypatch):
    "Stop at the first, second, third... renaming or flushing; whatever was on the disk then, the next run ends the same"
    for i in range(12): put(tmp_path/'in', f'{i}.jpg', saved(noise(i, (8,8)), 'JPEG') if i%5 else b'', f'picture {i}')
    work = lambda out: write_folder(tmp_path/'in', out, per_shard=3, workers=1)
    work(tmp_path/'whole')
    real, n = getattr(os, step), 0
    class Off(BaseException): pass
    while True:
        n, calls, out = n+1, 0, tmp_path/f'out{n}'
        def off(*args):
            nonlocal calls
            calls += 1
            if calls == n: raise Off()
            return real(*args)
        monkeypatch.setattr(os, step, off)
        try: work(out)
        except Off: stopped = True
        else: stopped = False
        monkeypatch.setattr(os, step, real)
        check_no_half(out)
        work(out)
        assert files(out) == files(tmp_path/'whole'), n
        if not stopped: break
    assert n > 7

def test_a_full_disk(tmp_path, many, monkeypatch):
    real, n = S.add_sample, 0
    def full(*args):
        nonlocal n
        n += 1
        if n > 25: raise OSError(28, 'No space left on device')
        return real(*args)
    monkeypatch.setattr(S, 'add_sample', full)
    with pytest.raises(OSError, match='No space'): write_folder(many, tmp_path/'out', per_shard=10)
    assert sorted(files(tmp_path/'out')) == ['manifest.json', 'pictures-000000.tar', 'pictures-000001.tar', 'skipped.tsv']
    monkeypatch.undo()
    write_folder(many, tmp_path/'out', per_shard=10); write_folder(many, tmp_path/'whole', per_shard=10)
    assert files(tmp_path/'out') == files(tmp_path/'whole')

def test_a_finished_run_is_left_alone(tmp_path, many):
    write_folder(many, tmp_path/'out', per_shard=10)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'out').glob('*.tar')}
    m = write_folder(many, tmp_path/'out', per_shard=10)
    assert m['complete'] and {p: p.stat().st_mtime_ns for p in (tmp_path/'out').glob('*.tar')} == before

def test_other_runs_are_refused(tmp_path, many):
    write_folder(many, tmp_path/'out', per_shard=10)
    before = files(tmp_path/'out')
    with pytest.raises(FileExistsError, match='per_shard was 10, now 20'): write_folder(many, tmp_path/'out', per_shard=20)
    with pytest.raises(FileExistsError, match='resize was None, now 8'): write_folder(many, tmp_path/'out', per_shard=10, resize=8)
    one = next(p for p in sorted(many.rglob('*.jpg')) if p.stat().st_size > 9 and p.with_suffix('.txt').stat().st_size)
    whole = one.read_bytes()
    stat = one.stat()
    one.write_bytes(whole + b' ')
    with pytest.raises(FileExistsError, match=f'1 of the packed pictures have changed or gone since, for instance .*{one.name}'): write_folder(many, tmp_path/'out', per_shard=10)
    assert files(tmp_path/'out') == before
    one.write_bytes(whole)
    os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    m = write_folder(many, tmp_path/'out', per_shard=10)
    assert files(tmp_path/'out') == before and m['complete']
    (tmp_path/'out'/'pictures-000001.tar').write_bytes(b'')
    with pytest.raises(FileExistsError, match='pictures-000001.tar is missing or changed'): write_folder(many, tmp_path/'out', per_shard=10)
    (tmp_path/'out'/'manifest.json').unlink()
    with pytest.raises(FileExistsError, match='earlier run without a manifest'): write_folder(many, tmp_path/'out', per_shard=10)

def test_one_run_at_a_time(tmp_path, many):
    "A second run is refused while the first is alive, and only then"
    with ShardWriter(tmp_path/'out', ShardsConfig(), {'kind':'other'}):
        with pytest.raises(FileExistsError, match='another run is writing'): write_folder(many, tmp_path/'out')
    p = multiprocessing.get_context('fork').Process(target=lambda: [ShardWriter(tmp_path/'out2', ShardsConfig(), {}), time.sleep(60)])
    p.start()
    while not (tmp_path/'out2'/'manifest.json').exists(): time.sleep(.01)
    with pytest.raises(FileExistsError, match='another run is writing'): write_folder(many, tmp_path/'out2')
    p.kill(); p.join()
    with pytest.raises(FileExistsError, match='kind was None'): write_folder(many, tmp_path/'out2')

def test_children_do_not_keep_the_folder(tmp_path):
    "Processes that a run has forked may outlive it."
    context = multiprocessing.get_context('fork')
    begun, over = context.Event(), context.Event()
    child = context.Process(target=lambda: [begun.set(), over.wait(60)])
    with only_writer(tmp_path/'out'):
        child.start(); begun.wait(60)
        with pytest.raises(FileExistsError): only_writer(tmp_path/'out').__enter__()
    try:
        with only_writer(tmp_path/'out'): assert child.is_alive()
    finally: over.set(); child.join()

@pytest.mark.parametrize('text', ['', '{', '[]', '{"format":2,"shards":{}}', '{"format":1}'])
def test_damaged_manifests(tmp_path, many, text):
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'manifest.json').write_text(text)
    with pytest.raises(ValueError, match='manifest.json'): write_folder(many, tmp_path/'out')

# ---- training and validation

def keys(folder): return {s['__key__'] for s in samples(folder)}

def test_split_keeps_everything(tmp_path, many):
    write_folder(many, tmp_path/'all', per_shard=10)
    m = split_shards(tmp_path/'all', tmp_path/'s', percent=30, per_shard=7)
    train, valid = keys(tmp_path/'s'/'train'), keys(tmp_path/'s'/'valid')
    assert not train & valid and train | valid == keys(tmp_path/'all')
    assert sum(o['samples'] for o in m[0]['shards'].values()) == len(train) and {o['samples'] for o in [*m[0]['shards'].values()][:-1]} == {7}
    both = {s['__key__']: s for s in samples(tmp_path/'s'/'train') + samples(tmp_path/'s'/'valid')}
    assert both == {s['__key__']: s for s in samples(tmp_path/'all')}
    before = files(tmp_path/'s')
    split_shards(tmp_path/'all', tmp_path/'s', percent=30, per_shard=7)
    assert files(tmp_path/'s') == before

outside = ('/etc/a.jpg', '../a.jpg', 'b/../../a.jpg', '..\\a.jpg', 'C:\\a.jpg', 'a.jpg\\..\\..\\b')

def test_names_that_leave_the_folder_are_not_passed_on(tmp_path, many):
    "A tar with good samples and hostile names: split and embed leave the latter out and count them; all else is written with names that stay inside."
    from mdm.data.embeddings import embed_shards
    from mdm.data.inspect import BAD_NAME, inspect_shards
    from mdm.text import TextConfig
    from mdm.utils.files import stays_inside
    write_folder(many, tmp_path/'all')
    with tarfile.open(tmp_path/'hostile.tar', 'w') as out:
        with tarfile.open(next((tmp_path/'all').glob('*.tar'))) as tar:
            members = [(m, tar.extractfile(m).read()) for m in tar]
        picture, text = (next(data for m, data in members if m.name.endswith(end)) for end in (('png', 'jpg'), 'txt'))
        for name in outside:
            for file, data in ((name, picture), (os.path.splitext(name)[0] + '.txt', text)):
                info = tarfile.TarInfo(file); info.size = len(data)
                out.addfile(info, io.BytesIO(data))
        for m, data in members: out.addfile(m, io.BytesIO(data))
    train, valid = split_shards([str(tmp_path/'hostile.tar')], tmp_path/'s', percent=50)
    embedded = embed_shards([str(tmp_path/'hostile.tar')], tmp_path/'e', TextConfig(dim=8))
    written = [tar for o in ('s/train', 's/valid', 'e') for tar in (tmp_path/o).glob('*.tar')]
    names = [n for tar in written for n in tarfile.open(tar).getnames()]
    assert len(names) > 2*len(members) and all(map(stays_inside, names)) and keys(tmp_path/'s'/'train') | keys(tmp_path/'s'/'valid') == keys(tmp_path/'all')
    assert train['skipped'][BAD_NAME] == embedded['skipped'][BAD_NAME] >= len(outside) - 1
    assert sum(reason == BAD_NAME for _, _, reason, _ in inspect_shards([str(tmp_path/'hostile.tar')]).bad) == train['skipped'][BAD_NAME]

@pytest.mark.parametrize('name', outside)
def test_no_writer_takes_a_name_that_leaves_the_folder(tmp_path, name):
    key, ext = name.rsplit('.', 1) if name.count('.jpg\\') == 0 else name.split('.', 1)
    with tarfile.open(tmp_path/'a.tar', 'w') as tar, pytest.raises(ValueError, match='outside'): add_sample(tar, {'__key__': key, ext: b'x'})

def test_split_is_stable(tmp_path, many):
    "Other pictures come, some go: nobody changes sides. A larger percentage only adds"
    write_folder(many, tmp_path/'a')
    split_shards(tmp_path/'a', tmp_path/'sa', percent=30)
    for i in range(20): put(many, f'new/{i}.jpg', saved(noise(i), 'JPEG'))
    (many/'1'/'p1.jpg').unlink()
    write_folder(many, tmp_path/'b', per_shard=5)
    split_shards(tmp_path/'b', tmp_path/'sb', percent=30)
    old, stays = keys(tmp_path/'a'), keys(tmp_path/'b')
    assert len(stays-old) == 20 and len(old-stays) == 1
    for o in ('train','valid'): assert keys(tmp_path/'sb'/o) & old == keys(tmp_path/'sa'/o) & stays
    split_shards(tmp_path/'b', tmp_path/'more', percent=50)
    assert keys(tmp_path/'sb'/'valid') < keys(tmp_path/'more'/'valid')

@pytest.mark.parametrize('percent', [.1, 1, 5, 50, 90])
@pytest.mark.parametrize('name', ['{:09d}', 'photo {}.jpg', '{}'], ids=['numbered', 'paths', 'plain'])
def test_a_percentage_means_what_it_says(percent, name):
    "Within four standard deviations, for 20,000 keys of every kind, and in each tenth of them"
    hit = np.array([key_fraction(name.format(i)) < percent/100 for i in range(20_000)])
    p = percent/100
    assert abs(hit.mean()-p) < 4*(p*(1-p)/len(hit))**.5
    assert all(abs(o.mean()-p) < 4.5*(p*(1-p)/len(o))**.5 + 1/len(o) for o in hit.reshape(10,-1))

def test_split_mistakes(tmp_path, many):
    write_folder(many, tmp_path/'all')
    for p in (0, 100, -1, float('nan')):
        with pytest.raises(ValueError, match='between 0 and 100|finite number'): split_shards(tmp_path/'all', tmp_path/'s', percent=p)
    with pytest.raises(ValueError, match='0.001 % of 53 samples'): split_shards(tmp_path/'all', tmp_path/'s', percent=.001)
    with pytest.raises(FileExistsError, match='percent was 0.001, now 50'): split_shards(tmp_path/'all', tmp_path/'s', percent=50)
    with pytest.raises(FileNotFoundError, match='no file matches'): split_shards(tmp_path/'none', tmp_path/'t')
    with pytest.raises(ValueError, match='mdm_dataset download'): split_shards('s3://bucket/a.tar', tmp_path/'t')

def test_split_killed(tmp_path, many, monkeypatch):
    write_folder(many, tmp_path/'all', per_shard=10)
    real = S.add_sample
    def slow(*args):
        time.sleep(.004)
        return real(*args)
    monkeypatch.setattr(S, 'add_sample', slow)
    work = lambda out: split_shards(tmp_path/'all', out, percent=30, per_shard=3)
    work(tmp_path/'whole')
    rng, kills = random.Random(1), 0
    for k in range(8):
        end = time.monotonic() + rng.uniform(.02, .12)
        kills += killed(lambda: work(tmp_path/'out'), lambda: time.monotonic() > end)
        for o in ('train','valid'): check_no_half(tmp_path/'out'/o)
    assert kills
    work(tmp_path/'out')
    assert files(tmp_path/'out') == files(tmp_path/'whole')

def test_split_of_a_damaged_tar(tmp_path, many):
    write_folder(many, tmp_path/'all', per_shard=20)
    bad = sorted((tmp_path/'all').glob('*.tar'))[1]
    bad.write_bytes(bad.read_bytes()[:20_000])
    m = split_shards(tmp_path/'all', tmp_path/'s', percent=30)
    assert (m[0]['skipped'], m[1]['skipped']) == ({BAD_TAR:1}, {})
    left = keys(tmp_path/'s'/'train') | keys(tmp_path/'s'/'valid')
    assert 33 < len(left) < 53 and left < {make_key(p.relative_to(many).as_posix()) for p in many.rglob('*.jpg')}

# ---- a look inside

def test_inspect(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        for i,(size,words) in enumerate([((64,64),'one'), ((100,50),'two words'), ((30,400),'é'*600)]): add_sample(t, {'__key__':f'k{i}', 'jpg':saved(noise(i, size), 'JPEG'), 'txt':words.encode(), 'emb.npy':b''})
        add_sample(t, {'__key__':'k0', 'png':saved(red), 'json':b'{"caption":"again"}'})
        for k,s in dict(cut=dict(jpg=saved(noise(0), 'JPEG')[:600], txt=b'x'), mute=dict(jpg=saved(red, 'JPEG')), latin=dict(jpg=saved(red, 'JPEG'), txt=b'\xff'), blind=dict(txt=b'x')).items(): add_sample(t, {'__key__':k, **s})
    (tmp_path/'b.tar').write_bytes((tmp_path/'a.tar').read_bytes()[:3000])
    found = inspect_shards([str(tmp_path/'[ab].tar')], pictures=2)
    assert [(Path(o[0]).name, *o[1:3]) for o in found.bad] == [('a.tar','cut',BAD_PICTURE), ('a.tar','latin',BAD_CAPTION), ('a.tar','mute',NO_CAPTION), ('a.tar','blind',NO_PICTURE), ('b.tar','',BAD_TAR)]
    assert (found.shards, found.samples, found.usable, found.embedded, found.repeated) == (2, 8, 4, 3, ['k0'])
    assert found.kinds == {'jpg':3, 'png':1} and found.short_sides == {64:1, 50:1, 30:1, 40:1} and found.lengths == {3:1, 9:1, 600:1, 5:1}
    assert found.sheet.width < 300
    text = describe_shards(found)
    for o in ('8 samples, of which 4 can be used, 3 with embeddings', '3 jpg, 1 png', '30 to 64 pixels', '3 to 600 characters', f'1 x {BAD_TAR}', 'cut:', '1 keys occur more than once'): assert o in text, text

def test_inspect_nothing_usable(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as t: add_sample(t, {'__key__':'k', 'jpg':b'', 'txt':b'x'})
    found = inspect_shards(tmp_path)
    assert found.usable == 0 and found.sheet is None and '0 can be used' in describe_shards(found)

def test_histogram():
    assert histogram(Counter({0:1, 1:1, 2:4, 3:4, 9:1}), 'things', width=4).splitlines() == [
        ' 1 to 1 things         2 #', ' 2 to 3 things         8 ####', ' 4 to 7 things         0 ', '8 to 15 things         1 #']
    assert histogram({}, 'things') == ''

def test_every_picture_has_the_same_chance_on_the_sheet(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as t:
        for i in range(50): add_sample(t, {'__key__':f'k{i}', 'png':saved(Image.new('RGB', (8,8), (i*5,0,0))), 'txt':b'x'})
    sheet = np.asarray(inspect_shards(tmp_path, pictures=10).sheet)
    shown = {int(v)//5 for v in np.unique(sheet[...,0][sheet[...,2] == 0])}
    assert min(shown) < 25 <= max(shown)

# ---- a row of threads

def test_ordered_map():
    def f(i):
        time.sleep(random.random()/200)
        return i
    assert list(ordered_map(f, range(50), 4)) == list(range(50))
    taken = []
    def endless():
        for i in range(10**9):
            taken.append(i)
            yield i
    g = ordered_map(f, endless(), 2)
    assert [next(g) for _ in range(5)] == list(range(5)) and len(taken) < 15
    g.close()
    def bad(i): raise RuntimeError('broken')
    with pytest.raises(RuntimeError, match='broken'): list(ordered_map(bad, range(3), 2))

def test_results_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(S, 'WAITING', 1000)
    begun = []
    def f(i):
        begun.append(i)
        return {'jpg': bytes(400)}
    g = ordered_map(f, range(100), 8)
    next(g)
    time.sleep(.05)
    assert len(begun) < 9 and len(list(g)) == 99

def test_decoding_is_bounded(monkeypatch):
    "Sixteen threads, each with a picture that fills most of the budget: one is decoded at a time"
    most, real = [0], S_samples.to_rgb
    monkeypatch.setattr(S_samples, 'DECODING', budget := S_samples.ByteBudget(1.5*12*200*150))
    def watched(img):
        most[0] = max(most[0], budget.used)
        time.sleep(.002)
        return real(img)
    monkeypatch.setattr(S_samples, 'to_rgb', watched)
    data = saved(noise(0, (200,150)))
    assert all(o[0] == 'png' for o in ordered_map(prepare_picture, [data]*12, 16))
    assert most[0] == 12*200*150 and budget.used == 0

def test_tars_of_a_folder_whatever_their_ending(tmp_path):
    folder = tmp_path/'a [1] {x}'; folder.mkdir()
    with tarfile.open(folder/'X.TAR', 'w') as t: add_sample(t, {'__key__':'k', 'jpg':saved(red, 'JPEG'), 'txt':b'x'})
    with tarfile.open(folder/'y.tar.gz', 'w:gz') as t: add_sample(t, {'__key__':'l', 'jpg':saved(red, 'JPEG'), 'txt':b'x'})
    (folder/'.z.tar').write_bytes(b''); (folder/'notes.txt').write_bytes(b'')
    assert [Path(o).name for o in find_tars(folder)] == ['X.TAR', 'y.tar.gz'] and inspect_shards(folder).usable == 2
    assert inspect_shards([str(tmp_path/'*'/'X.TAR')]).usable == 1

# ---- a progress bar

class Terminal(io.StringIO):
    def isatty(self): return True

@pytest.mark.parametrize('file, shown', [(io.StringIO, False), (Terminal, True)])
def test_a_log_file_gets_no_progress_bar(tmp_path, monkeypatch, file, shown):
    "A bar on a terminal; where the errors go into a file, nothing"
    put(tmp_path/'in', 'a.jpg', saved(red, 'JPEG'))
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr(sys, 'stderr', err := file())
    write_folder(tmp_path/'in', tmp_path/'out', bar=True)
    assert ('pictures' in err.getvalue()) == shown
    monkeypatch.setattr(sys, 'stderr', err := file())
    write_folder(tmp_path/'in', tmp_path/'out2')
    assert err.getvalue() == ''

@pytest.mark.parametrize('n, percent, valid', [(12, 30, 4), (8, 25, 2), (90, 10, 9), (5, 90, 4)])
def test_few_pictures_are_split_exactly(tmp_path, n, percent, valid):
    with ShardWriter(tmp_path/'all', ShardsConfig(per_shard=5), {}) as w:
        for i in range(n): w.add(i, {'__key__': f'{n}-{i}', 'txt': b'x'})
    m = split_shards(tmp_path/'all', tmp_path/'s', percent=percent)
    assert [sum(o['samples'] for o in side['shards'].values()) for side in m] == [n - valid, valid]
