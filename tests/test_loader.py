"The loader: what a reader of nbs/2_data/06_loader.ipynb should not have to read."
import json, multiprocessing, pickle, random, threading, time, warnings
from collections import Counter

import numpy as np, psutil, pytest, torch
from PIL import Image
from data_tools import captions, encode, good, load, names, number, picture, quiet, same, stream, tar_bytes, write_index, write_shards
from test_files import bucket, here_only, moto_port, sometimes, web   # fixtures
from mdm.data import files as S, samples
from mdm.data.loader import PictureLoader, create_dls
from mdm.data.samples import BAD_CAPTION, BAD_PICTURE, BAD_TAR, NO_CAPTION, NO_PICTURE, UNREACHABLE
from mdm.data.stream import DataConfig
from mdm.utils.ranks import rank_and_world


def test_ranks_have_equally_many_whole_batches(tmp_path):
    files = write_shards(tmp_path, 5, 4, 8)
    for kw in (dict(), dict(epoch_size=50)):
        got = []
        for rank in range(3):
            s = stream(files, rank, 3, 2, **kw)
            loader = PictureLoader(s)
            batches = list(loader)
            assert len(batches) == len(loader) == (17 if not kw else 50) // 6
            got += [c for b in batches for c in b[1]]
        if not kw: assert len(set(got)) == len(got) == 12


def test_rank_from_the_environment(tmp_path, monkeypatch):
    assert rank_and_world() == (0, 1)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert rank_and_world() == (1, 2)
    files = write_shards(tmp_path, 8)
    second = captions(load(files))
    monkeypatch.setenv('RANK', '0')
    assert captions(load(files)) + second == names(range(8))


def test_rank_from_torch_distributed(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try: assert rank_and_world() == (0, 1)
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


@pytest.mark.parametrize('kw,text', [({'image_size': 0}, 'data.image_size: found 0'), ({'epoch_size': 0}, 'data.epoch_size: found 0'), ({'shuffle': -1}, 'data.shuffle: found -1'),
                                     ({'workers': -1}, 'data.workers: found -1'), ({'crop': 'top'}, "data.crop: found 'top', expected 'center' or 'random'"), ({'n': 0}, 'batch_size is 0')])
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
    assert dls.one_batch()[1] and dls.show_batch(max_n=3, cell=64).size[0] == 3*72


@pytest.mark.parametrize('workers', [0, 2])
def test_a_bucket_that_fails_some_requests_gives_what_the_folder_gives(tmp_path, bucket, here_only, workers):
    files = write_shards(tmp_path, 9, 12, 7)
    for p in tmp_path.glob('*.tar'): bucket.put(f'd/{p.name}', p.read_bytes())
    bucket.trouble = sometimes
    local, remote = (load(f, 5, True, workers=workers, shuffle=6, crop='random') for f in (files, ['s3://shop.cats/d/*.tar']))
    assert same(list(local), list(remote)) and same(list(local), list(remote)) and not remote.skipped


@pytest.mark.parametrize('workers', [0, 2])
def test_a_shard_that_breaks_down_in_mid_epoch_is_skipped(tmp_path, web, here_only, workers):
    here_only.setattr(S, 'TRIES', 2)
    here_only.setattr(S, 'BLOCK', 2048)
    write_shards(web.folder, 6, 6, 6)
    files = [f'{web.url}/{{00000..00002}}.tar']
    loader, filled = load(files, 3, False, workers=workers), load(files, 3, True, workers=workers, epoch_size=12)
    web.trouble = lambda command, path, n: 503 if '00001' in path else None
    got = captions(loader)
    assert sorted(got) == sorted(names([*range(6), *range(12, 18)])) and set(loader.skipped) == {UNREACHABLE} and sum(loader.skipped.values()) <= 2
    assert len(quiet(filled)) == len(quiet(filled)) == 4
    web.trouble = lambda command, path, n: None
    assert captions(loader) and not loader.skipped
    web.trouble = lambda command, path, n: 503
    with pytest.raises(ValueError, match='tar that could not be fetched'): quiet(filled)


def test_messages_keep_secrets(web, here_only):
    (web.folder/'x.tar').write_bytes(tar_bytes([('a.png', b'junk'), ('a.txt', b'x')]))
    (web.folder/'e.tar').write_bytes(tar_bytes([]))
    (web.folder/'x.zip').write_bytes(b'')
    address = web.url.replace('//', '//ann:hunter2@')
    for name, train in (('x.tar', True), ('x.tar', False), ('e.tar', True), ('x.zip', True)):
        with pytest.raises(ValueError) as e: quiet(load([f'{address}/{name}?sig=0123abcd'], 1, train))
        assert name in str(e.value) and 'hunter2' not in str(e.value) and '0123abcd' not in str(e.value)


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
    make = lambda r: PictureLoader(stream(files, r, 3, 2, shuffle=7, crop='random'), 0)
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
    b, old = load(files, 4, True, shuffle=10), samples.open_file
    b.load_state_dict(a.state_dict())
    monkeypatch.setattr(samples, 'open_file', lambda path: opened.append(path) or old(path))
    decoded, load_picture = [], samples.load_picture
    monkeypatch.setattr(samples, 'load_picture', lambda *args: decoded.append(1) or load_picture(*args))
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


def test_batches_for_a_gpu(tmp_path):
    "A rehearsal with fake CUDA tensors: pictures and numbers go to the device, captions stay strings."
    from torch._subclasses.fake_tensor import FakeTensorMode
    loader = load(write_shards(tmp_path, 7), 2, True).to('cuda')
    real = loader._chunks
    chunks = [*real(loader._place(0))]
    loader._chunks = lambda place: iter(chunks)              # the files are read without the fake mode
    with FakeTensorMode(allow_non_fake_inputs=True):
        imgs, caps, micros = next(iter(loader))
    assert imgs.device.type == micros['scale'].device.type == 'cuda' and imgs.shape == (2, 3, 8, 8) and [type(c) for c in caps] == [str, str]
