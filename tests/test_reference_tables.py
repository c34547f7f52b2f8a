"Index tables and regular expressions, as the reference has them."
import gzip, pickle, subprocess, sys

import pytest
from data_tools import captions, good, load, names, number, tar_bytes, write_index, write_shards
from test_files import bucket, here_only, moto_port, web   # fixtures
from mdm.data import stream
from mdm.data.samples import BAD_CAPTION, BAD_TAR
from mdm.data.stream import find_shards
from mdm.reference.tables import NOT_IN_TAR


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
    with pytest.warns(UserWarning, match='1 x row of a table.*line 5: 2 cells for 3 columns'): loader = load(write_index(tmp_path, b'tar\tfile\tcaption\n' + b'\n'.join(rows)), workers=workers)
    assert captions(loader) == ['fine']
    assert loader.skipped == {NOT_IN_TAR: 2, BAD_CAPTION: 1, BAD_TAR: 2}


def test_rows_that_do_not_fit_and_quotation_marks(tmp_path):
    "A mark that opens no cell swallows nothing, a tab too many is named with its line, and an endless cell stops nothing."
    write_shards(tmp_path, 9)
    rows = ['"The Thinker" by Rodin', '"open', 'a tab\ttoo many', '6\'2"', '"in a ""quoted"" cell,\nover two lines"', 'x' * 200_000, '"', '"a\tb"', 'last']
    text = 'tar\tfile\tcaption\n' + ''.join(f'00000.tar\t{i:06d}.png\t{c}\n' for i, c in enumerate(rows))
    with pytest.warns(UserWarning, match='2 x row of a table that does not fit.*line 4: 4 cells for 3 columns.*line 8: a cell has 200,000'): loader = load(write_index(tmp_path, text))
    assert captions(loader) == ['"The Thinker" by Rodin', '"open', '6\'2"', 'in a "quoted" cell,\nover two lines', '"', 'a\tb', 'last'] and not loader.skipped


def test_a_table_that_is_rewritten_is_read_anew(tmp_path):
    write_shards(tmp_path, 3)
    for text, want in (('one', ['one']), ('two', ['two']), ('three\n00000.tar\t000002.png\tmore', ['three', 'more'])):
        files = write_index(tmp_path, f'tar\tfile\tcaption\n00000.tar\t000001.png\t{text}\n')
        assert captions(load(files)) == want
        write_index(tmp_path, 'filename\nx.tsv\n', 'all.tsv')
        assert captions(load([str(tmp_path/'all.tsv')])) == want


def test_wrong_tables(tmp_path):
    for text, error, want in [('a\tb\n1\t2\n', ValueError, 'needs tar, file and caption'), ('filename\nnope.tsv\n', FileNotFoundError, 'nope.tsv'),
                              ('tar\tfile\tcaption\n', ValueError, 'hold no samples'), ('', ValueError, 'hold no samples'), ('tar\tfile\tcaption\na\tb\t' + 'x' * 200000, ValueError, 'hold no samples')]:
        with pytest.raises(error) as e: load(write_index(tmp_path, text))
        assert want in str(e.value)


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


def test_the_core_reads_tables_through_the_plug_in_only(tmp_path):
    "Nothing of `mdm.reference` is imported before a table is met; the plug-in is found through its entry point."
    write_shards(tmp_path, 3)
    write_index(tmp_path, 'tar\tfile\tcaption\n00000.tar\t000001.png\tone\n')
    code = f'''import sys
from mdm.data.loader import create_loader
from mdm.data.stream import DataConfig
loader = create_loader(DataConfig(files=[{str(tmp_path/'00000.tar')!r}], image_size=8, workers=0), 1, train=False)
before = [m for m in sys.modules if m.startswith('mdm.reference')]
for files in ([{str(tmp_path/'x.tsv')!r}], ['re:{tmp_path}/x.t..']):
    print(before, [c for b in create_loader(DataConfig(files=files, image_size=8, workers=0), 1, train=False) for c in b[1]])'''
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.stdout == "[] ['one']\n"*2, out.stderr


def test_a_worker_that_is_spawned_finds_the_reader_of_its_shards(tmp_path):
    "Such a worker has imported the stream only, not the plug-in."
    write_shards(tmp_path, 3)
    shard, = find_shards(write_index(tmp_path, 'tar\tfile\tcaption\n00000.tar\t000001.png\tone\n'))
    code = f'import pickle\nshard = pickle.loads({pickle.dumps(shard)!r})\nfrom mdm.data.stream import read_shard\nprint([s["txt"] for s in read_shard(shard, 0, 1, None)])'
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.stdout == "[b'one']\n", out.stderr


def test_without_the_plug_in_a_table_is_refused_in_words(tmp_path, monkeypatch):
    files = write_index(tmp_path, 'tar\tfile\tcaption\n')
    monkeypatch.delitem(stream.shard_formats, '.tsv')
    monkeypatch.setattr(stream, 'load_formats', lambda: [])
    with pytest.raises(ValueError, match='x.tsv.*the name of a shard ends in .tar'): find_shards(files)
