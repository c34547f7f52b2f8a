"The stream: what a reader of nbs/2_data/04_stream.ipynb should not have to read."
import os, pickle, random
from collections import Counter

import numpy as np, pytest
from data_tools import load, names, quiet, captions, good, stream, tar_bytes, write_shards
from test_files import bucket, here_only, moto_port, web   # fixtures
from mdm.data import files as S, stream as D
from mdm.data.files import find_files
from mdm.data.loader import PictureLoader
from mdm.data.stream import DataConfig, PictureStream, find_shards, locate, shuffled
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
    for bad, text in [('nothing*.tar', 'nothing*.tar'), ('{00000..00004}.tar', '2 missing'), ('00009.tar', '00009.tar'), ('', 'it is a folder')]:
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
    for f in (tmp_path/'cache/mdm/counts').iterdir(): f.unlink()
    D._count.cache_clear(), web.requests.clear()
    (web.folder/'manifest.json').write_text('{"format": 1, "shards": {"00000.tar": {"samples": 9, "bytes": 1}, "00001.tar": {"samples": 8, "bytes": %d}}}' % size)
    assert [s.count for s in find_shards(files)] == [5, 8] and gets() == ['/00000.tar']
    D._count.cache_clear()
    (tmp_path/'cache/mdm/counts').chmod(0o500)
    [f.write_text('junk') for f in (tmp_path/'cache/mdm/counts').iterdir()]
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
