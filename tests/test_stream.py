"The stream: what a reader of nbs/2_data/05_stream.ipynb should not have to read."
import json, os, pickle, random, warnings, zlib
from collections import Counter

import numpy as np, pytest
from data_tools import captions, encode, good, load, names, number, picture, quiet, same, stream, tar_bytes, write_shards
from test_files import bucket, here_only, moto_port, web   # fixtures
from mdm.data import files as S, stream as D
from mdm.data.embeddings import embed_shards
from mdm.data.files import find_files
from mdm.data.inspect import inspect_shards, split_shards
from mdm.data.loader import PictureLoader
from mdm.data.samples import BAD_PICTURE, FEWER, MORE_TAR
from mdm.data.stream import DataConfig, PictureStream, find_shards, locate, shuffled
from mdm.recipe import load_recipe
from mdm.utils.configs import violations


# --- shards

def test_find_files(tmp_path):
    write_shards(tmp_path, 1, 1, 1)
    odd = tmp_path/'a{1,2}[x].tar'
    odd.write_bytes((tmp_path/'00000.tar').read_bytes())
    f = lambda *p: [os.path.basename(x) for x in find_files([str(tmp_path/x) for x in p])]
    assert f('{00000..00002}.tar') == f('0*.tar') == f('00000.tar', '0000[12].tar', '*0.tar') == ['00000.tar', '00001.tar', '00002.tar']
    assert f('a{1,2}[x].tar') == ['a{1,2}[x].tar'] and f('**/00001.tar') == ['00001.tar']
    assert find_files(str(tmp_path/'00000.tar')) == [str(tmp_path/'00000.tar')]
    for bad, text in [('nothing*.tar', 'nothing*.tar'), ('{00000..00004}.tar', '2 missing: '), ('00009.tar', '00009.tar'), ('', 'it is a folder')]:
        with pytest.raises(FileNotFoundError) as e: f(bad)
        assert text in str(e.value)
    with pytest.raises(ValueError, match='data.files is empty'): find_files([])
    (tmp_path/'x.zip').write_bytes(b'')
    with pytest.raises(ValueError, match='the name of a shard ends in .tar'): find_shards([str(tmp_path/'x.zip')])


def test_counts_notice_a_changed_file(tmp_path):
    files = write_shards(tmp_path, 3)
    assert find_shards(files)[0].count == 3
    write_shards(tmp_path, 5)
    assert find_shards(files)[0].count == 5


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
    for f in (tmp_path/'cache/mdm/counts-2').iterdir(): f.unlink()
    D._count.cache_clear(), web.requests.clear()
    (web.folder/'manifest.json').write_text('{"format": 1, "shards": {"00000.tar": {"samples": 9, "bytes": 1}, "00001.tar": {"samples": 8, "bytes": %d}}}' % size)
    assert [s.count for s in find_shards(files)] == [5, 8] and gets() == ['/00000.tar']
    D._count.cache_clear()
    (tmp_path/'cache/mdm/counts-2').chmod(0o500)
    [f.write_text('junk') for f in (tmp_path/'cache/mdm/counts-2').iterdir()]
    assert [s.count for s in find_shards(files)] == [5, 8]


def test_a_bucket_out_of_reach_at_the_start_is_an_error(web, here_only):
    here_only.setattr(S, 'TRIES', 2)
    write_shards(web.folder, 3)
    web.trouble = lambda command, path, n: 503 if command == 'GET' and path.endswith('.tar') else None
    with pytest.raises(ConnectionError, match='gave up'): load([f'{web.url}/00000.tar'])


# --- the row

def test_locate_covers_every_place_once():
    rng = random.Random(0)
    counts, orders = [4, 1, 9, 3], {}
    order = lambda p: orders.setdefault(p, rng.sample(range(4), 4))
    row = [(i, j) for p in range(4) for i in order(p) for j in range(counts[i])]
    for _ in range(200):
        a, b = sorted(rng.sample(range(len(row)), 2))
        assert [(i, j) for i, x, y in locate(counts, a, b, order) for j in range(x, y)] == row[a:b]
    assert list(locate(counts, 5, 5, order)) == []


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


def test_shuffled_is_uniform():
    at = Counter(list(shuffled(range(6), 6, random.Random(s))).index(0) for s in range(3000))
    assert max(abs(at[i] - 500) for i in range(6)) < 120
    assert list(shuffled([], 4, random.Random(0))) == []


def test_stream_can_be_sent_to_a_spawned_worker(tmp_path):
    s = stream(write_shards(tmp_path, 3), train=False)
    assert [c[1] for c in pickle.loads(pickle.dumps(s))] == [c[1] for c in s]


# --- sources by weight

def row(s, start, stop): return [sample['txt'].decode() for _, sample in s._items(start, stop, [])]


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
    ranks = [PictureLoader(PictureStream(find_shards(files), DataConfig(files=files, weights=[1, 3], image_size=8, epoch_size=48), 2, True, 0, r, 3)) for r in range(3)]
    assert [len(quiet(r)) for r in ranks] == [8, 8, 8]
    assert sorted(captions(load(files, 3, False, weights=[1, 3]))) == sorted(names([*range(8), *range(100, 104)]))       # validation: everything once
    for w, text in (([1], '2 entries'), ([1, 0], '2 entries'), ([1, float('nan')], 'finite number')):
        with pytest.raises(ValueError, match=text): load(files, 4, True, weights=w)
    with pytest.raises(ValueError, match='no samples of their own'): load([files[0], files[0]], 4, True, weights=[1, 1])


def test_a_weight_that_is_no_number_breaks_a_rule():
    for w in ([1, float('nan')], [float('nan'), 1], [1, float('inf')]): assert 'weights' in violations(DataConfig(files=['a', 'b'], weights=w))[0]
    assert not violations(DataConfig(files=['a', 'b'], weights=[1, 2.5]))


# --- data in rough hands

def test_a_hole_in_a_range_is_refused_by_all_who_read_shards(tmp_path):
    write_shards(tmp_path, 2, 2, 2)
    (tmp_path/'00001.tar').unlink()
    holed, out = str(tmp_path/'{00000..00002}.tar'), tmp_path/'out'
    readers = find_shards, inspect_shards, lambda p: split_shards(p, out), lambda p: embed_shards(p, out, load_recipe('shapes').text)
    for read in readers:
        with pytest.raises(FileNotFoundError, match=r"1 missing: .*00001\.tar'\).* or leave out what is missing, as in \{\{000"): read([holed])
    assert len(find_shards([str(tmp_path/'{{00000..00000},{00002..00002}}.tar')])) == 2


def test_several_names_of_one_file_count_once(tmp_path, monkeypatch):
    write_shards(tmp_path, 3, 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path/'link.tar').symlink_to('00000.tar')
    spelled = ['00000.tar', './00000.tar', f'{tmp_path}//00000.tar', str(tmp_path/'x/../00000.tar'), 'link.tar', '*.tar']
    (tmp_path/'x').mkdir()
    assert [(s.tar, s.count, s.source) for s in find_shards(spelled)] == [('00000.tar', 3, 0), ('00001.tar', 2, 5)]
    assert inspect_shards(spelled, 0).samples == 5


def test_lost_repeated_and_joined_samples_are_told(tmp_path):
    files = write_shards(tmp_path, 5)
    (tmp_path/'manifest.json').write_text(json.dumps({'format': 1, 'shards': {'00000.tar': {'samples': 9, 'bytes': (tmp_path/'00000.tar').stat().st_size}}}))
    loader = load(files)
    assert captions(loader) == names(range(5)) and loader.skipped == {FEWER: 4}
    twice = [(f'same.{n.split(".")[1]}', data) for i in range(3) for n, data in good(i)]
    (tmp_path/'twice.tar').write_bytes(tar_bytes(twice + good(7)))
    loader = load([str(tmp_path/'twice.tar')])
    assert captions(loader) == names([0, 1, 2, 7]) and not loader.skipped
    found = inspect_shards([tmp_path/'twice.tar'])
    assert (found.usable, found.repeated) == (4, ['same'])
    (tmp_path/'joined.tar').write_bytes(tar_bytes(good(0) + good(1)) + tar_bytes(good(2)))
    loader = load([str(tmp_path/'joined.tar')])
    assert captions(loader) == names([0, 1]) and loader.skipped == {MORE_TAR: 1}
    assert [o[2] for o in inspect_shards([tmp_path/'joined.tar']).bad] == [MORE_TAR]


def bad(i): return [(f'{i:06d}.png', b'junk'), (f'{i:06d}.txt', b'x')]


def sources(folder, broken):
    "Two sources of 60 samples; `broken(i)` says which ones of the second cannot be used."
    for n in 'ab': (folder/n).mkdir()
    write_shards(folder/'a', 30, 30)
    (folder/'b/0.tar').write_bytes(tar_bytes([f for i in range(100, 160) for f in (bad(i) if broken(i) else good(i))]))
    return [str(folder/n/'*.tar') for n in 'ab']


@pytest.mark.parametrize('workers', [0, 2])
def test_weights_are_kept_when_a_source_has_broken_samples(tmp_path, workers):
    files = sources(tmp_path, lambda i: i % 2)
    make = lambda: load(files, 4, True, weights=[1, 1], epoch_size=200, workers=workers, shuffle=9)
    loader, states, whole = make(), [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for b in loader:
            whole.append(b)
            states.append(loader.state_dict())
    of_b = [int(c.split()[1]) >= 100 for b in whole for c in b[1]]
    assert sum(of_b) == 100 and abs(sum(of_b[:100]) - 50) <= 12                    # in the middle of the epoch as well
    assert 'took their place' not in ''.join(str(w.message) for w in caught) and loader.skipped[BAD_PICTURE] >= 90
    for n in (5, 30)[workers > 0:]:
        again = make()
        again.load_state_dict(states[n - 1])
        assert same(quiet(again), whole[n:]) and again.skipped == loader.skipped


def test_a_source_without_a_usable_picture_is_named_and_the_others_fill_in(tmp_path):
    files = sources(tmp_path, lambda i: True)
    loader = load(files, 4, True, weights=[1, 1], epoch_size=80)
    with pytest.warns(UserWarning, match=r"no usable pictures in \['.*b/\*\.tar'\], so pictures of the other"): assert len(list(loader)) == 20


@pytest.mark.parametrize('workers', [0, 3])
def test_a_validation_is_in_order_with_any_number_of_workers(tmp_path, workers):
    shard = lambda a, b: tar_bytes([f for i in range(a, b) for f in (bad(i) if i in (3, *range(8, 13)) else good(i))])
    for n, (a, b) in enumerate([(0, 10), (10, 17), (17, 30)]): (tmp_path/f'{n}.tar').write_bytes(shard(a, b))
    wanted = names(i for i in range(30) if i not in (3, *range(8, 13)))
    make = lambda: load([str(tmp_path/'*.tar')], 4, workers=workers)
    loader, states = make(), []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for b in loader: states.append((loader.state_dict(), b[1]))
    assert [len(c) for _, c in states] == [4]*6 and [c for _, caps in states for c in caps] == wanted and loader.skipped == {BAD_PICTURE: 6}
    for n in (2, 5)[workers > 0:]:
        again = make()
        again.load_state_dict(states[n - 1][0])
        assert captions(again) == wanted[4*n:]


def test_a_bookmark_of_an_earlier_version_goes_on(tmp_path):
    s = stream(write_shards(tmp_path, 20), n=4, shuffle=5, epoch_size=20)
    whole = [c for chunk in s for c in chunk[1]]
    s.bookmarks = [dict(at=0, stop=20, used=8, good=8, barren=0)]
    assert [c for chunk in s for c in chunk[1]] == whole[8:]
    s.bookmarks = [dict(at=0, stop=20, used=8, good=6, barren=0)]                  # two gaps, which it would have filled at the end
    assert len([c for chunk in s for c in chunk[1]]) == 14


ORDERS = dict(once=({}, 3317229106), set_length=(dict(epoch_size=43), 3798624565), weighted=(dict(weights=[2, 1], epoch_size=40), 995600495),
              workers=(dict(epoch_size=50, workers=2), 988808856))


@pytest.mark.parametrize('kind', ORDERS)
def test_the_order_of_sound_data_stays(tmp_path, kind):
    "The checksums are those of the first version that could go on after a stop."
    for n, sizes in (('a', (9, 14, 8)), ('b', (20, 7))):
        (tmp_path/n).mkdir()
        write_shards(tmp_path/n, *sizes)
    kw, wanted = ORDERS[kind]
    loader = load([str(tmp_path/'a/*.tar'), str(tmp_path/'b/*.tar')], 4, True, shuffle=9, crop='random', **kw)
    assert zlib.crc32(repr([captions(loader) for _ in range(2)]).encode()) == wanted


# --- the bound on the shuffle buffer

def test_the_shuffle_buffer_is_bounded_in_bytes(tmp_path):
    noise = lambda i, w: encode(picture(i)) + bytes(w)                             # a PNG with zeros behind its end
    files = [f for i in range(120) for f in ((f'{i}.png', noise(i, 10_000 if i < 40 else 50_000)), (f'{i}.txt', f'picture {i}'.encode()))]
    (tmp_path/'x.tar').write_bytes(tar_bytes(files))
    make = lambda mb: load([str(tmp_path/'x.tar')], 4, True, shuffle=60, shuffle_mb=mb, epoch_size=120)
    held, most, s = 0, 0, make(1).dataset
    items = s._items

    def watched(*args):
        nonlocal held, most
        for item in items(*args):
            held += D._bytes_of(item)
            most = max(most, held)
            yield item
    s._items = watched
    for item in s._stretch('reader 0 of 1', s.bookmark(0, 1), 1e6): held -= D._bytes_of(item)
    assert held == 0 and 0.8e6 < most <= 1.06e6
    whole, states = [], []
    loader = make(1)
    for b in loader:
        whole.append(b)
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert sorted(c for b in whole for c in b[1]) == sorted(names(range(120))) and states[-2]['readers'][0]['shrinks']
    for n in (3, 20, 28):
        again = make(1)
        again.load_state_dict(states[n - 1])
        assert same(list(again), whole[n:]), n
    assert same(list(make(100)), list(make(256))) and not same(list(make(100)), whole)


def test_one_very_large_file_does_not_empty_the_buffer():
    weights, shrinks = [1]*50 + [10**6] + [1]*200, []
    out = list(shuffled(range(251), 50, random.Random(0), weights.__getitem__, 100, shrinks))
    assert sorted(out) == list(range(251)) and not shrinks


# --- filters and flips

def scored(folder, n=24):
    "Pictures of 16 or 48 pixels, with a score in every .json but the last."
    files = []
    for i in range(n):
        facts = dict(caption=f'picture {i}', score=i) if i < n - 1 else dict(caption=f'picture {i}')
        files += [(f'{i:06d}.png', encode(picture(i, *((20, 16), (60, 48))[i%2]))), (f'{i:06d}.json', json.dumps(facts).encode())]
    (folder/'s.tar').write_bytes(tar_bytes(files))
    return [str(folder/'s.tar')]


def test_filters_leave_out_count_and_fill_up(tmp_path):
    files = scored(tmp_path)
    filters = ['side >= 32', 'score >= 10']
    loader = load(files, filters=filters)
    with pytest.warns(UserWarning, match='12 x left out by the filter side >= 32, 5 x left out by the filter score >= 10, 1 x left out: no number'): got = [c for b in loader for c in b[1]]
    assert got == names([11, 13, 15, 17, 19, 21])
    filled = load(files, 4, True, filters=filters, epoch_size=24, workers=2)
    assert [len(b[1]) for b in quiet(filled)] == [4]*6 and {*captions(filled)} == {*names([11, 13, 15, 17, 19, 21])}
    found = inspect_shards(files, 0, filters=filters)
    assert found.left == {'side >= 32': 12, 'score >= 10': 13, 'all of them': 6} and found.counts()['left'] == found.left
    with pytest.raises(ValueError, match="'big' is no condition"): load(files, filters=['big'])
    recipe = load_recipe('shapes', ['data.filters=["side >= 32", "score>=10"]'])
    assert recipe.data.filters == ['side >= 32', 'score>=10'] and not violations(recipe.data)


def test_flips(tmp_path):
    wide = encode(__import__('PIL').Image.fromarray(np.arange(64, dtype=np.uint8)[None].repeat(64, 0)))
    files = [f for i in range(60) for f in ((f'{i:03d}.png', wide), (f'{i:03d}.txt', f'number {i}{" on the left" if i%3 == 0 else ""}'.encode()))]
    (tmp_path/'x.tar').write_bytes(tar_bytes(files))
    make = lambda **kw: load([str(tmp_path/'x.tar')], 10, True, **{'flip': True, 'shuffle': 7, **kw})
    mirrored = lambda b: [bool(i[0, 0, 0] > i[0, 0, -1]) for i in b[0]]
    epoch = lambda loader: {c: m for b in loader for c, m in zip(b[1], mirrored(b))}
    loader = make()
    first, second = epoch(loader), epoch(loader)
    assert not any(m for c, m in (first | second).items() if 'left' in c)
    assert 10 < sum(first.values()) < 30 and 10 < sum(second.values()) < 30 and first != second
    assert epoch(make()) == first == epoch(make(workers=2, shuffle=0))             # whatever the order and the workers
    assert not any(epoch(make(flip=False)).values()) and not any(epoch(load([str(tmp_path/'x.tar')], 10, flip=True)).values())
    assert load([str(tmp_path/'x.tar')], 10, True).dataset.config.flip is False
