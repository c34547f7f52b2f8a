"Clips: videos, animations and numbered frames become tiles; what cannot be used is skipped and counted; training goes on where it stopped."
import builtins, io, json, tracemalloc

import av, numpy as np, pytest, torch
from PIL import Image
from data_tools import encode, load, quiet, same, tar_bytes
from mdm.cli.dataset import mdm_dataset
from mdm.data import clips as clips_module
from mdm.data.clips import BAD_CLIP, HUGE_CLIP, NO_READER, NO_VIDEO, SHORT_CLIP, SLOW_CLIP, STILL, ClipError, choose_frames, open_video
from mdm.data.inspect import find_duplicates, inspect_shards, split_shards
from mdm.data.samples import NO_CAPTION, NO_PICTURE, ClipPlan, Skip, load_clip
from mdm.data.shards import ORPHAN, read_frames, write_folder
from mdm.data.stream import DataConfig
from mdm.models.clips import from_tiles
from mdm.utils.configs import violations


def frame(i, w=48, h=32):
    "A grey picture whose brightness tells its number, with a red bar on the left and a blue one on the right."
    a = np.full((h, w, 3), 8*i + 40, np.uint8)
    a[:, :4], a[:, -4:] = (255, 0, 0), (0, 0, 255)
    return Image.fromarray(a)


def number(tile): return round((float(tile.float().mean()) - 40)/8)
def numbers(tiles, n): return [number(o[:, 4:-4, 4:-4]) for o in from_tiles(tiles, n)]


def video(n=16, rate=8, ext='mp4', codec='libx264', audio=False, **size):
    f = io.BytesIO()
    with av.open(f, 'w', format=ext) as out:
        s = out.add_stream(codec, rate=rate, options=dict(crf='8', g='5'))
        s.width, s.height, s.pix_fmt = *frame(0, **size).size, 'yuv420p'
        for i in range(n): out.mux(s.encode(av.VideoFrame.from_image(frame(i, **size))))
        out.mux(s.encode())
    return f.getvalue()


def sound():
    f = io.BytesIO()
    with av.open(f, 'w', format='mp4') as out:
        s = out.add_stream('aac', rate=8000)
        a = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), 'fltp', 'mono')
        a.sample_rate = 8000
        out.mux(s.encode(a))
        out.mux(s.encode())
    return f.getvalue()


def animation(order, kind='GIF', **kw):
    return encode(frame(order[0]), kind, save_all=True, append_images=[frame(i) for i in order[1:]], **{'duration': 100, **({'lossless': True} if kind == 'WEBP' else {}), **kw})


def shard(folder, *samples, name='x.tar'):
    "A tar of samples, each a dictionary of files by extension; a caption is added."
    folder.mkdir(exist_ok=True)
    files = [(f'{k:03d}.{ext}', data) for k, s in enumerate(samples) for ext, data in {**s, 'txt': f'clip {k}'.encode()}.items()]
    (folder/name).write_bytes(tar_bytes(files))
    return [str(folder/name)]


@pytest.fixture(scope='module')
def mp4(): return video()


@pytest.fixture(scope='module')
def numbered(): return {f'{i:03d}.png': encode(frame(i)) for i in range(16)}


def test_every_kind_of_clip_becomes_the_same_tiles(tmp_path, mp4, numbered):
    kinds = [{'mp4': mp4}, {'webm': video(ext='webm', codec='libvpx-vp9')}, {'mov': video(ext='mov', codec='mpeg4')}, {'mkv': video(ext='matroska')},
             {'gif': animation(range(16))}, {'webp': animation(range(16), 'WEBP')}, {'png': animation(range(16), 'PNG')}, numbered]
    loader = load(shard(tmp_path, *kinds), len(kinds), image_size=16, frames=4)
    (tiles, captions, more), = loader
    assert tiles.shape == (8, 3, 32, 32) and captions == [f'clip {k}' for k in range(8)] and not loader.skipped and (more['scale'] == 32).all()
    for t in tiles: assert numbers(t, 4) == [0, 4, 8, 12]


def test_frames_are_cropped_alike(tmp_path, numbered):
    batch = lambda **kw: load(shard(tmp_path, numbered), 1, image_size=32, frames=4, **kw).one_batch()[0][0]
    for clip in (from_tiles(batch(), 4), from_tiles(batch(train=True, crop='random'), 4)):
        edges = [(o[0] > 200).any(1).any(0) for o in clip]                                        # where red is
        assert all(torch.equal(e, edges[0]) for e in edges)
    assert not (from_tiles(batch(), 4)[:, 0] > 200).any()                                           # the middle has no red


@pytest.mark.parametrize('files, reason', [({'mp4': b'junk'}, BAD_CLIP), ({'mp4': b''}, BAD_CLIP), ({'webm': b'\x1a\x45\xdf\xa3'}, BAD_CLIP), ({'gif': b'GIF89a'}, 'picture that cannot be decoded'),
    ({'png': encode(frame(0))}, STILL), ({'gif': animation([0])}, STILL), ({'jpg': encode(frame(0), 'JPEG')}, STILL), ({'000.png': b'junk', '001.png': b''}, BAD_CLIP),
    ({'000.png': encode(frame(0)), '001.png': encode(frame(1))}, SHORT_CLIP), ({'gif': animation(range(3))}, SHORT_CLIP), ({'json': b'{}'}, NO_PICTURE)], ids=range(11))
def test_what_is_no_clip_is_skipped_and_counted(tmp_path, numbered, files, reason):
    loader = load(shard(tmp_path, files, numbered), 1, image_size=16, frames=4)
    assert [b[1] for b in quiet(loader)] == [['clip 1']]
    assert [*loader.skipped] == [reason]


def test_broken_videos_are_skipped_and_counted(tmp_path, mp4, numbered):
    short, cut = video(3), mp4[:len(mp4)//2]
    hurt = bytearray(mp4)
    at = mp4.index(b'mdat') + 8
    hurt[at:at + len(mp4)//3] = bytes(len(mp4)//3)                                                # the index is whole, the pictures are not
    loader = load(shard(tmp_path, {'mp4': short}, {'mp4': sound()}, {'mp4': cut}, {'mp4': bytes(hurt)}, numbered), 1, image_size=16, frames=4)
    assert [b[1] for b in quiet(loader)] == [['clip 4']]
    assert loader.skipped == {SHORT_CLIP: 1, NO_VIDEO: 1, BAD_CLIP: 2}


def test_huge_frames_are_refused_before_they_are_decoded(monkeypatch, mp4):
    monkeypatch.setattr(clips_module, 'MOST_PIXELS', 48*32 - 1)
    for sample in ({'mp4': mp4}, {'gif': animation(range(4))}, {f'{i:03d}.png': encode(frame(i)) for i in range(4)}):
        with pytest.raises(Skip, match=HUGE_CLIP): load_clip(sample, 16, ClipPlan(4))


def test_memory_does_not_grow_with_the_length(numbered):
    "Frames are decoded one after another, and only those that are wanted."
    used = []
    for n in (16, 64):
        sample = {f'{i:03d}.png': encode(frame(i % 16, 240, 160)) for i in range(n)}
        tracemalloc.start()
        load_clip(sample, 16, ClipPlan(16))
        used.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert used[1] < 1.5*used[0] + 2e5


def test_only_the_frames_that_are_wanted_are_decoded(monkeypatch, mp4):
    shown, real = [], clips_module._upright
    monkeypatch.setattr(clips_module, '_upright', lambda f: shown.append(f.pts) or real(f))
    assert numbers(torch.from_numpy(load_clip({'mp4': mp4}, 16, ClipPlan(4, 8., 1.))[0]).permute(2, 0, 1), 4) == [12, 13, 14, 15]
    assert len(shown) == 4


def test_frames_at_a_rate_from_a_random_place(tmp_path, mp4, numbered):
    "The rate holds for videos, animations and numbered frames; the place differs from pass to pass and from seed to seed, and a validation takes the middle."
    files = shard(tmp_path, {'mp4': mp4}, {'webp': animation(range(16), 'WEBP', duration=125)}, {**numbered, 'json': b'{"frame_rate": 8}'})
    def taken(n=2, **kw): return [numbers(o, 4) for b in [*zip(range(n), loader(**kw))] for o in b[1][0]]
    def loader(**kw):
        dl = load(files, 3, image_size=16, frames=4, frame_rate=4, **kw)
        while True: yield from dl
    found = taken(4, train=True)
    assert {b - a for o in found for a, b in zip(o, o[1:])} == {2} and len({o[0] for o in found}) > 3
    assert found == taken(4, train=True) != taken(4, train=True, seed=1)
    assert taken(1) == [[4, 6, 8, 10]]*3                                                            # 16 frames, of which 8 are covered


def test_slow_clips_are_skipped(tmp_path, mp4, numbered):
    loader = load(shard(tmp_path, {'mp4': mp4}, {**numbered, 'json': b'{"frame_rate": 24}'}, numbered), 1, image_size=16, frames=4, frame_rate=20)
    assert len(quiet(loader)) == 2 and loader.skipped == {SLOW_CLIP: 1}                            # numbered frames without a rate follow each other


def test_training_goes_on_at_the_same_frame(tmp_path, numbered):
    files = shard(tmp_path, *[{**{k: encode(frame(int(k[:3]) + j)) for k in numbered}, 'json': b'{"frame_rate": 8}'} for j in range(7)])
    make = lambda: load(files, 2, train=True, image_size=16, frames=4, frame_rate=4, crop='random', shuffle=3)
    whole = make()
    batches = quiet(whole) + quiet(whole)
    for stop in (1, 4):
        first, again = make(), make()
        rows = (b for _ in range(2) for b in first)
        for _ in range(stop): next(rows)
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert same(quiet(again) + (quiet(again) if stop < 3 else []), batches[stop:])


def test_a_clip_without_frames_is_its_first_picture(tmp_path, mp4, numbered):
    "With data.frames = 1, pictures are as they were, and a video stands for its first frame."
    files = shard(tmp_path, {'png': encode(frame(3))}, {'gif': animation([5, 6, 7])}, {'mp4': mp4}, numbered, {'jpg': encode(frame(9), 'JPEG'), 'mp4': mp4})
    loader = load(files, 5, image_size=16)
    (pictures, captions, _), = loader
    found = dict(zip(captions, [number(o[:, 4:-4, 4:-4]) for o in pictures]))
    assert found == {'clip 0': 3, 'clip 1': 5, 'clip 2': 0, 'clip 3': 0, 'clip 4': 9} and not loader.skipped


def test_a_joined_animation_is_taken_by_its_time():
    "Programs store equal frames once; a clip that stands still in the middle is still 16 frames long."
    order = [0, 1, 2, 3] + [3]*8 + [4, 5, 6, 7]
    for kind in ('GIF', 'WEBP', 'PNG'):
        tiles, _ = load_clip({kind.lower(): animation(order, kind)}, 16, ClipPlan(16))
        assert numbers(torch.from_numpy(tiles).permute(2, 0, 1), 16) == order, kind


def test_without_pyav_videos_name_the_extra(monkeypatch, tmp_path, mp4, numbered):
    real = builtins.__import__
    def no_av(name, *args, **kw):
        if name == 'av': raise ImportError('no av')
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, '__import__', no_av)
    loader = load(shard(tmp_path, {'mp4': mp4}, numbered), 1, image_size=16, frames=4)
    assert len(quiet(loader)) == 1 and loader.skipped == {NO_READER: 1} and 'matryoshka-diffusion[video]' in NO_READER


def test_settings_that_cannot_work_are_refused():
    wrong = lambda **kw: [o.split(':')[0] for o in violations(DataConfig(**kw))]
    assert wrong(frames=4, flip=True) == ['flip'] and wrong(frame_rate=8.) == ['frame_rate'] and wrong(frames=4, frame_rate=0.) == ['frame_rate']
    assert wrong(frames=16, frame_rate=8.) == [] and wrong(frames=4, buckets=['16x16']) == ['buckets'] and wrong(frames=5) == ['frames']


def test_choice_of_frames():
    times = [k/24 for k in range(48)]
    assert choose_frames(times, 2, 1/24, 16) == [3*k for k in range(16)]
    assert choose_frames(times, 2, 1/24, 16, 12., 0) == [2*k for k in range(16)]
    assert choose_frames(times, 2, 1/24, 16, 12., 1) == [2*k + 16 for k in range(16)]
    for args, why in (((49,), SHORT_CLIP), ((16, 6.), SHORT_CLIP), ((4, 30.), SLOW_CLIP)):
        with pytest.raises(ClipError, match=why): choose_frames(times, 2, 1/24, *args)


def test_filters_know_the_size_of_a_clip(tmp_path, mp4, numbered):
    loader = load(shard(tmp_path, {'mp4': mp4}, {'mp4': video(4, w=96, h=64)}, numbered), 1, image_size=16, frames=4, filters=['side >= 64'])
    assert [b[1] for b in quiet(loader)] == [['clip 1']] and loader.skipped == {'left out by the filter side >= 64': 2}


def test_folder_of_clips(tmp_path, mp4, capsys):
    "A folder of videos and animations becomes shards; stills and broken files are named; inspect shows strips; splitting works."
    src = tmp_path/'in'
    (src/'deep').mkdir(parents=True)
    for name, data in {'a.mp4': mp4, 'deep/b.GIF': animation(range(8)), 'c.webm': video(ext='webm', codec='libvpx-vp9'), 'still.gif': animation([1]), 'photo.jpg': encode(frame(0), 'JPEG'), 'broken.mp4': mp4[:900]}.items():
        (src/name).write_bytes(data)
        (src/name).with_suffix('.txt').write_text(f'this is {name}')
    with pytest.raises(ValueError, match='resize'): write_folder(src, tmp_path/'none', clips=True, resize=16)
    assert mdm_dataset(['folder', str(src), str(tmp_path/'out'), '--clips']) == 0
    assert '3 clips' in capsys.readouterr().out
    skipped = (tmp_path/'out'/'skipped.tsv').read_text()
    assert all(o in skipped for o in ('still.gif', STILL, 'photo.jpg', 'broken.mp4', BAD_CLIP))
    assert sorted(b[1][0] for b in load([str(tmp_path/'out'/'*.tar')], 1, image_size=16, frames=4)) == ['this is a.mp4', 'this is c.webm', 'this is deep/b.GIF']
    found = inspect_shards([tmp_path/'out'])
    assert found.usable == 3 and found.frames == {16: 2, 8: 1} and set(found.kinds) == {'mp4', 'webm', 'gif'}
    assert all(o.size == (4*128 + 3, 128) for o, _ in found.shown)
    assert len(find_duplicates([str(o) for o in (tmp_path/'out').glob('*.tar')]).labels) == 3
    train, valid = split_shards([tmp_path/'out'], tmp_path/'split', percent=34)
    assert [sum(o['samples'] for o in m['shards'].values()) for m in (train, valid)] == [2, 1]


def put_frames(folder, *names):
    folder.mkdir(parents=True)
    for i, name in enumerate(names): Image.new('RGB', (16, 16), (40*i, 0, 0)).save(folder/name)

def test_folders_of_numbered_frames_are_clips(tmp_path):
    "By number and not by name; with a caption beside the folder or in a table; trained on like any clip."
    videos = tmp_path/'videos'
    put_frames(videos/'a.b', 'f_9.png', 'f_10.png', 'f_11.png', 'f_100.png')
    put_frames(videos/'deep'/'c', '1.jpg', '2.jpg', '3.jpg', '4.jpg')
    (videos/'a.b.txt').write_text('it grows red')
    (videos/'a.b'/'._f_9.png').write_bytes(b'left by another system')
    (videos/'deep'/'metadata.csv').write_text('file_name,text\nc,it grows red as well\n')
    manifest = write_folder(videos, tmp_path/'out', clips=True)
    assert (manifest['skipped'], sum(o['samples'] for o in manifest['shards'].values())) == ({}, 2)
    batches = quiet(load([str(tmp_path/'out'/'*.tar')], 1, image_size=16, frames=4))
    assert sorted(b[1][0] for b in batches) == ['it grows red', 'it grows red as well']
    for x, *_ in batches:
        red = from_tiles(x[0], 4)[:, 0].float().mean((-1, -2))
        assert (red - torch.arange(4)*40).abs().max() < 3
    (videos/'empty').mkdir()
    with pytest.raises(Skip, match='cannot be read'): read_frames(videos/'empty')
    (videos/'a.b'/'f_10.png').write_bytes(b'broken')
    with pytest.raises(FileExistsError, match='changed or gone'): write_folder(videos, tmp_path/'out', clips=True)

@pytest.mark.parametrize('beside, skipped', [
    ('walk/w_1.txt', {STILL: 1, NO_CAPTION: 1}), ('other.txt', {NO_CAPTION: 2, ORPHAN: 1}), ('walk.txt', {BAD_CLIP: 1})])
def test_what_is_no_folder_of_frames(tmp_path, mp4, beside, skipped):
    "A picture with a caption of its own is no frame; numbered pictures without any caption are none either; a broken frame is counted."
    put_frames(tmp_path/'v'/'walk', 'w_1.png', 'w_2.png')
    (tmp_path/'v'/beside).write_text('somebody walks')
    if beside == 'walk.txt': (tmp_path/'v'/'walk'/'w_1.png').write_bytes(b'broken')
    (tmp_path/'v'/'good.mp4').write_bytes(mp4)
    (tmp_path/'v'/'good.txt').write_text('good')
    found = dict(write_folder(tmp_path/'v', tmp_path/'out', clips=True)['skipped'])
    assert found == skipped

def test_a_folder_of_videos_names_the_flag(tmp_path, mp4):
    (tmp_path/'in').mkdir()
    (tmp_path/'in'/'a.mp4').write_bytes(mp4)
    with pytest.raises(FileNotFoundError, match='--clips'): write_folder(tmp_path/'in', tmp_path/'out')


def test_moving_shapes_command(tmp_path, capsys):
    out = str(tmp_path/'out')
    assert mdm_dataset(['moving_shapes', out, '--n', '5', '--frames', '4']) == 0
    assert '5 clips' in capsys.readouterr().out
    assert mdm_dataset(['inspect', out, '--output', str(tmp_path/'look')]) == 0
    assert 'clips: 5, of 4 frames' in capsys.readouterr().out and json.loads((tmp_path/'look'/'counts.json').read_text())['frames'] == {'4': 5}
    (tiles, *_), = load([f'{out}/*.tar'], 5, image_size=16, frames=4)
    assert tiles.shape == (5, 3, 32, 32)


def test_a_batch_is_shown_as_strips(tmp_path, numbered):
    sheet = load(shard(tmp_path, numbered), 1, image_size=16, frames=16).show_batch()
    assert sheet.width > 250 and sheet.height < 100                                                 # eight frames side by side


def test_a_shard_of_clips_is_read_in_order_without_waiting(tmp_path, mp4, numbered):
    "Samples of videos and of numbered frames come in the order of the tar."
    files = shard(tmp_path, {'mp4': mp4}, {'gif': animation(range(4))}, numbered, {'mp4': mp4})
    assert [b[1][0] for b in load(files, 1, image_size=16, frames=4)] == [f'clip {k}' for k in range(4)]


def test_workers_read_clips(tmp_path, mp4):
    files = shard(tmp_path, *[{'mp4': mp4}]*4)
    a, b = (load(files, 2, image_size=16, frames=4, workers=w) for w in (0, 2))
    assert same(quiet(a), sorted(quiet(b), key=lambda o: o[1]))
