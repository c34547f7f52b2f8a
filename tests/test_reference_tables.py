"Index tables and regular expressions, as the reference has them."
import gzip

import pytest
from data_tools import captions, good, load, names, number, tar_bytes, write_index, write_shards
from test_files import bucket, here_only, moto_port, web   # fixtures
from mdm.data.samples import BAD_CAPTION, BAD_TAR, NO_CAPTION
from mdm.reference.tables import NOT_IN_TAR, read_index


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
                              ('tar\tfile\tcaption\n', ValueError, 'hold no samples'), ('', ValueError, 'hold no samples'), ('tar\tfile\tcaption\na\tb\t' + 'x' * 200000, ValueError, 'not a table')]:
        read_index.cache_clear()
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
