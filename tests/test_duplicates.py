"Pictures that look the same: found in shards, listed, and kept on one side of a split."
import csv, io
from pathlib import Path

import numpy as np, pytest
from PIL import Image
from data_tools import encode, tar_bytes
from mdm.cli.dataset import mdm_dataset
from mdm.data.duplicates import group_labels, picture_hash
from mdm.data.files import find_tars
from mdm.data.inspect import find_duplicates, read_samples, split_shards


def scene(seed, size=(90, 80)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def write(folder, pictures):
    "Shards of two with these (key, picture, kind, quality); the last one is damaged."
    for part in range(2):
        files = []
        for key, img, kw in pictures[part::2]: files += [(f'{key}.{kw.get("kind", "png")}', encode(img, **kw)), (f'{key}.txt', b'a caption')]
        data = tar_bytes([*files, (f'bad{part}.png', b'junk'), (f'bad{part}.txt', b'x')])
        (folder/f'{part}.tar').write_bytes(data if part else data[:data.rindex(b'bad0.txt') + 100])
    return [str(folder/'*.tar')]


@pytest.fixture
def files(tmp_path):
    "40 pictures, of which ten come again: smaller, as a JPEG, darker."
    (tmp_path/'in').mkdir()
    pictures = [(f'{i:03d}a', scene(i), {}) for i in range(40)]
    for i in range(10):
        pictures += [(f'{i:03d}b', scene(i).resize((60, 53)), {}), (f'{i:03d}c', scene(i).point(lambda v: v*.95), dict(kind='jpeg', quality=50))]
    return write(tmp_path/'in', pictures)


def keys(folder): return {s['__key__'] for *_, s in read_samples(find_tars(folder)) if isinstance(s, dict)}


def test_groups_are_found_whatever_the_file(files):
    tars = find_tars(files)
    found = find_duplicates(tars)
    groups = {}
    for group, tar, key in found.rows(tars): groups.setdefault(group, set()).add(key)
    assert sorted(map(sorted, groups.values())) == [[f'{i:03d}{v}' for v in 'abc'] for i in range(10)]
    assert len(found.labels) == 40 + 20 + 2 + 1                              # with a broken picture in each tar, and the damage


def test_split_keeps_groups_together(files, tmp_path, capsys):
    split_shards(files, tmp_path/'plain', percent=40)
    parted = lambda folder: {k[:3] for k in keys(folder/'train')} & {k[:3] for k in keys(folder/'valid')}
    assert parted(tmp_path/'plain')                                          # by key alone, copies are on both sides
    assert mdm_dataset(['split', *files, '--output', str(tmp_path/'out'), '--percent', '40', '--duplicates']) == 0
    assert not parted(tmp_path/'out')
    train, valid = keys(tmp_path/'out'/'train'), keys(tmp_path/'out'/'valid')
    assert train | valid == keys(tmp_path/'in') and not train & valid and .2 < len(valid)/62 < .6
    assert mdm_dataset(['split', *files, '--output', str(tmp_path/'out'), '--percent', '40', '--duplicates']) == 0     # finished: the same
    assert mdm_dataset(['split', *files, '--output', str(tmp_path/'plain'), '--percent', '40', '--duplicates']) == 2   # other settings
    assert 'duplicates' in capsys.readouterr().err


def test_inspect_lists_them(files, tmp_path, capsys):
    assert mdm_dataset(['inspect', *files, '--output', str(tmp_path/'look'), '--duplicates']) == 0
    assert '30 pictures look like another one, in 10 groups' in capsys.readouterr().out
    rows = list(csv.DictReader(open(tmp_path/'look'/'duplicates.tsv'), delimiter='\t'))
    assert len(rows) == 30 and {r['sample'][:3] for r in rows if r['group'] == '1'} == {rows[0]['sample'][:3]}
    assert mdm_dataset(['inspect', *files, '--output', str(tmp_path/'plain')]) == 0 and not (tmp_path/'plain'/'duplicates.tsv').exists()


def test_plain_pictures_of_other_colours_are_others():
    plain = [Image.new('RGB', (64, 64), c) for c in ('red', 'green', 'blue', 'white', 'black')]
    hashes = np.stack([np.frombuffer(picture_hash(o), np.uint8) for o in plain])
    assert len(set(group_labels(hashes))) == 5


def test_many_hashes_in_bounded_memory():
    "Equal and nearly equal hashes by the thousand do not become pairs by the million in memory."
    import tracemalloc
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (30_000, 28), dtype=np.uint8)
    hashes[:10_000] = hashes[0]
    hashes[np.arange(10_000), rng.integers(0, 16, 10_000)] ^= (1 << rng.integers(0, 8, 10_000)).astype(np.uint8)
    tracemalloc.start()
    labels = group_labels(hashes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (labels[:10_000] == labels[0]).all() and len(set(labels)) == 20_001 and peak < 100e6
