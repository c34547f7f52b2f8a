"The cache of remote shards: bounded, shared by processes, and read by the loader in place of the network."
import errno, multiprocessing, os, time, warnings
from pathlib import Path

import pytest
from data_tools import captions, load, names, quiet, tar_bytes, write_shards
from mdm.data import files as S
from mdm.utils.cache import FileCache, file_lock
from test_files import bucket, here_only, moto_port, sometimes, web   # fixtures


def urls(web, *sizes):
    write_shards(web.folder, *sizes)
    return [f'{web.url}/{p.name}' for p in sorted(web.folder.glob('*.tar'))]


def gets(web): return [path for command, path, _ in web.requests if command == 'GET']
def cached(folder): return sorted(p.name.partition('-')[2] for p in Path(folder).iterdir() if p.name[0] != '.')


@pytest.mark.parametrize('workers', [0, 2])
def test_the_second_epoch_needs_no_network(web, tmp_path, workers):
    files, kw = urls(web, 6, 5), dict(cache=str(tmp_path/'shards'), workers=workers)
    plain = [captions(load(files, 3, True, shuffle=5, workers=workers)) for _ in range(1)]
    loader = load(files, 3, True, shuffle=5, **kw)
    first, asked = captions(loader), None
    assert first == plain[0] and cached(tmp_path/'shards') == ['00000.tar', '00001.tar']
    web.requests.clear()
    assert sorted(captions(loader)) != [] and not gets(web)                  # only HEAD, which tells size and tag
    assert not [p for p in (tmp_path/'shards').iterdir() if p.name.endswith(('.part', '.reserved'))]


def test_a_changed_shard_is_fetched_again(web, tmp_path):
    files = urls(web, 4)
    loader = load(files, 4, cache=str(tmp_path/'shards'))
    assert captions(loader) == names(range(4))
    path = web.folder/'00000.tar'
    new = tar_bytes([o for i in range(4) for o in [(f'{i}.png', S_png()), (f'{i}.txt', f'new {i}'.encode())]])
    path.write_bytes(new)
    assert captions(loader) == [f'new {i}' for i in range(4)]


def S_png():
    from data_tools import encode, picture
    return encode(picture(1))


def test_damaged_copies_are_replaced(web, tmp_path):
    files, folder = urls(web, 4), tmp_path/'shards'
    loader = load(files, 4, cache=str(folder))
    assert captions(loader) == names(range(4))
    copy = next(p for p in folder.iterdir() if p.name.endswith('.tar'))
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-700])                                           # cut short: its size tells
    assert captions(loader) == names(range(4)) and copy.read_bytes() == whole
    copy.write_bytes(bytes(len(whole)))                                      # as long, but empty: reading it tells
    os.utime(copy, (1e9, 1e9))
    with pytest.raises(ValueError): quiet(loader)
    loader.epoch = 0
    assert captions(loader) == names(range(4)) and copy.read_bytes() == whole


def test_the_cache_stays_within_its_bound(web, tmp_path):
    files, folder = urls(web, 3, 3, 3, 3), tmp_path/'shards'
    size = (web.folder/'00000.tar').stat().st_size
    loader = load(files, 3, cache=str(folder), cache_gb=2.5*size/1e9)
    for _ in range(2):
        assert captions(loader) == names(range(12))
        assert cached(folder) == ['00002.tar', '00003.tar']                  # those read last
        assert sum(p.stat().st_size for p in folder.iterdir()) <= 2.5*size
    small = load(files, 3, cache=str(tmp_path/'small'), cache_gb=.5*size/1e9)
    assert captions(small) == names(range(12)) and cached(tmp_path/'small') == []       # read over the network


def test_a_full_disk_or_a_folder_that_cannot_be_written_stops_nothing(web, tmp_path, monkeypatch):
    files = urls(web, 4)
    (tmp_path/'file').write_bytes(b'')
    with pytest.warns(UserWarning, match='files are read from where they are instead'):
        loader = load(files, 4, cache=str(tmp_path/'file'/'below'))
        assert [c for b in loader for c in b[1]] == names(range(4))
    def full(info, target):
        Path(target).with_name(f'.{Path(target).name}.x.part').write_bytes(b'the beginning')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    import mdm.data.stream
    monkeypatch.setattr(mdm.data.stream, 'copy_file', full)
    loader = load(files, 4, cache=str(tmp_path/'full'))
    with pytest.warns(UserWarning, match='No space left') as told:
        for _ in range(2): assert [c for b in loader for c in b[1]] == names(range(4))
    assert len([w for w in told if 'No space' in str(w.message)]) == 1
    assert [p.name for p in (tmp_path/'full').iterdir() if not p.name.endswith('lock')] == []


def test_a_server_that_fails_is_counted_as_without_a_cache(web, tmp_path):
    files = urls(web, 4, 4)
    loader = load(files, 4, cache=str(tmp_path/'shards'))
    web.trouble = lambda command, path, n: 503 if '00001' in path else None
    assert captions(loader) == names(range(4)) and 'could not be fetched' in str(dict(loader.skipped))
    web.trouble = sometimes if callable(sometimes) and sometimes.__code__.co_argcount == 3 else lambda command, path, n: 503 if n % 3 == 0 else None
    assert captions(loader) == names(range(8))


def reader(url, folder, size, n, queue):
    S._filesystem.cache_clear()
    cache, seen = FileCache(folder, int(2.5*size)), []
    for k in range(n):
        info = S.file_info(url.format(k % 4))
        with cache.hold(info.key, info.name, info.size, lambda path: S.copy_file(info, path)) as path:
            seen.append(path is None or path.read_bytes() == S.open_file(info.path).read())
            if sum(p.stat().st_size for p in Path(folder).iterdir() if not p.name.endswith('.reserved')) > 2.5*size: seen.append(False)
    queue.put(all(seen))


def test_processes_share_the_folder(web, tmp_path):
    "Three processes read four files through a cache for two and a half: each always gets whole files, and the bound holds."
    urls(web, 3, 3, 3, 3)
    size, queue = (web.folder/'00000.tar').stat().st_size, multiprocessing.get_context('fork').Queue()
    args = web.url + '/0000{}.tar', str(tmp_path/'shards'), size, 10, queue
    processes = [multiprocessing.get_context('fork').Process(target=reader, args=args) for _ in range(3)]
    for p in processes: p.start()
    assert all(queue.get(timeout=60) for _ in processes)
    for p in processes: p.join()


def die_while_fetching(folder):
    def fetch(path):
        (path.parent/f'.{path.name}.abc.part').write_bytes(bytes(60))
        os._exit(1)
    with FileCache(folder, 100).hold('abc', 'abc.tar', 60, fetch): pass


def test_what_a_killed_process_leaves_is_cleared(tmp_path):
    p = multiprocessing.get_context('fork').Process(target=die_while_fetching, args=(tmp_path,))
    p.start(), p.join()
    assert any(o.name.endswith('.reserved') for o in tmp_path.iterdir()) and any(o.name.endswith('.part') for o in tmp_path.iterdir())
    with FileCache(tmp_path, 100).hold('def', 'def.tar', 70, lambda path: path.write_bytes(bytes(70))) as path: assert path.stat().st_size == 70
    assert not [o.name for o in tmp_path.iterdir() if 'abc' in o.name]


def test_two_that_want_the_same_file_fetch_it_once(tmp_path):
    import threading
    fetched = []
    def fetch(path):
        fetched.append(1)
        time.sleep(.2)
        path.write_bytes(bytes(10))
    def use():
        with FileCache(tmp_path, 100).hold('k', 'k.tar', 10, fetch) as path: assert path.stat().st_size == 10
    threads = [threading.Thread(target=use) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert fetched == [1]
