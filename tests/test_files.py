"Files: real servers on this machine (an S3 server, web servers), healthy ones and broken ones; no other network."
import base64, gzip, hashlib, http.client, http.server, io, json, logging, os, re, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path

import pytest
from mdm.data import files as S
from mdm.data.files import (FileInfo, column_names, download, exists, file_info, find_files, find_tars, known_shards, list_files, open_file, read_captions,
                            read_manifest, read_table, redact, resolve_sibling, split_pattern)
from mdm.reference.tables import split_regex

KEY, SECRET = 'AKIAQUITESECRET00001', 'wJalr/XUtnFEMI+K7MDENG'


class Handler(http.server.BaseHTTPRequestHandler):
    "A web server over a folder, or in front of another server, that can be told to misbehave."
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def answer(self):
        s = self.server
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        with s.lock:
            s.requests.append((self.command, self.path, self.headers.get('Range')))
            s.auth.append(self.headers.get('Authorization'))
            what = s.trouble(self.command, self.path, len(s.requests)) or ''
        if isinstance(what, int): return self.send(what, b'<Error><Code>%s</Code></Error>' % (b'AccessDenied' if what == 403 else b'SlowDown'), {})
        if what == 'hang': time.sleep(2)
        if what == 'close':
            self.close_connection = True
            return self.connection.close()
        code, data, headers = self.forward(body) if s.upstream else self.local()
        self.send(code, data, headers, len(data) // 2 if what == 'cut' else None)

    do_GET = do_HEAD = do_PUT = do_POST = answer

    def forward(self, body):
        c = http.client.HTTPConnection('127.0.0.1', self.server.upstream)
        c.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() not in ('connection', 'accept-encoding')})
        r = c.getresponse()
        return r.status, r.read(), {k: v for k, v in r.getheaders() if k.lower() not in ('connection', 'transfer-encoding', 'date', 'server')}

    def local(self):
        s, path = self.server, self.server.folder/self.path.split('?')[0].lstrip('/')
        if not path.is_file(): return 404, b'nothing here', {}
        data, headers = path.read_bytes(), {'ETag': f'"{path.stat().st_mtime_ns}"', 'Last-Modified': 'Sun, 22 Nov 2026 10:00:00 GMT'}
        m = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if not (m and s.ranges): return 200, data, headers
        a, b = int(m[1]), min(int(m[2] or len(data)), len(data) - 1)
        return 206, data[a:b + 1], {**headers, 'Content-Range': f'bytes {a}-{b}/{len(data)}'}

    def send(self, code, data, headers, stop=None):
        self.send_response(code)
        length = headers.pop('Content-Length', headers.pop('content-length', None)) if self.command == 'HEAD' else None
        for k, v in headers.items(): self.send_header(k, v) if k.lower() != 'content-length' else None
        if not (self.server.chunked and self.command == 'GET'): self.send_header('Content-Length', length or str(len(data)))
        else: self.send_header('Connection', 'close')
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(data[:stop])
        if stop is not None or self.server.chunked:
            self.wfile.flush()
            self.close_connection = True
            if stop is not None: self.connection.close()


@contextmanager
def serving(folder=None, upstream=None):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.handle_error = lambda *args: None
    server.daemon_threads = True
    server.folder, server.upstream, server.ranges, server.chunked, server.lock = folder, upstream, True, False, threading.Lock()
    server.requests, server.auth, server.trouble = [], [], lambda command, path, n: None
    server.url = f'http://127.0.0.1:{server.server_address[1]}'
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start()
    try: yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope='session')
def moto_port():
    from moto.server import ThreadedMotoServer
    logging.getLogger('werkzeug').setLevel(logging.ERROR)
    server = ThreadedMotoServer('127.0.0.1', 0)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def here_only(monkeypatch, tmp_path):
    "Short pauses, an own cache, the credentials of a test, no proxies."
    for k in [k for k in os.environ if k.lower().endswith('_proxy') or k.startswith(('AWS_', 'FSSPEC_'))]: monkeypatch.delenv(k)
    for k, v in dict(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION='us-east-1', AWS_EC2_METADATA_DISABLED='true', AWS_ENDPOINT_URL='http://127.0.0.1:9', AWS_CONFIG_FILE=os.devnull,
                     AWS_SHARED_CREDENTIALS_FILE=os.devnull, XDG_CACHE_HOME=str(tmp_path/'cache'), NETRC=os.devnull).items(): monkeypatch.setenv(k, v)
    monkeypatch.setattr(S, 'WAIT', .01)
    S._filesystem.cache_clear()
    yield monkeypatch
    S._filesystem.cache_clear()


@pytest.fixture
def web(here_only, tmp_path):
    (tmp_path/'web').mkdir()
    with serving(tmp_path/'web') as server: yield server


@pytest.fixture
def bucket(here_only, moto_port):
    "A real S3 server; what is asked of it passes a proxy that can be told to fail. `put(key, bytes)` goes around the proxy."
    import boto3
    client = boto3.client('s3', endpoint_url=f'http://127.0.0.1:{moto_port}', aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name='us-east-1')
    client.create_bucket(Bucket='shop.cats')
    with serving(upstream=moto_port) as server:
        here_only.setenv('AWS_ENDPOINT_URL', server.url)
        server.client, server.put = client, lambda key, data=b'x': client.put_object(Bucket='shop.cats', Key=key, Body=data)
        yield server
        for o in client.list_objects_v2(Bucket='shop.cats').get('Contents', []): client.delete_object(Bucket='shop.cats', Key=o['Key'])
        client.delete_bucket(Bucket='shop.cats')


def fails(kind, *args):
    "The message of an error of that kind, in which, and in whose traceback, no secret may be."
    import traceback
    with pytest.raises(kind) as e: args[0](*args[1:])
    text = ''.join(traceback.format_exception(e.value))
    assert not re.search('hunter2|ann:|0123abcd|YW5uOmh1bnRlcjI|' + KEY + '|' + re.escape(SECRET), text), text
    return str(e.value)


# --- words

@pytest.mark.parametrize('text,want', [
    ('https://ann:hunter2@h.org/a.tar', 'https://h.org/a.tar'), ('https://ann:hun/ter2@h.org/a', 'https://h.org/a'), ('https://token@h.org/a', 'https://h.org/a'),
    ('https://h.org:8080/a@b.tar', 'https://h.org:8080/a@b.tar'), ('s3://b/a@b/c', 's3://b/a@b/c'), ("x('https://h/a?X-Amz-Signature=0123abcd&y')", "x('https://h/a?...')"),
    ('https://h/a?b=1 and s3://c/d?e=2', 'https://h/a?... and s3://c/d?...'), ('what? no address', 'what? no address'), (Path('a/b'), 'a/b')])
def test_redact(text, want): assert redact(text) == want


@pytest.mark.parametrize('pattern,want', [
    ('s3://my.bucket/a/b_00.*.tsv', ('s3://my.bucket/a/', 'b_00.*.tsv')), ('/a/b.tar', ('/a/', 'b.tar')), ('b.tar', ('', 'b.tar')),
    ('https://h.org/a?b=c/d', ('https://h.org/', 'a?b=c/d')), ('https://h.org/a/{0..3}.tar?x', ('https://h.org/a/', '{0..3}.tar?x')), ('s3://b/a?/c', ('s3://b/', 'a?/c'))])
def test_split_pattern(pattern, want): assert split_pattern(pattern) == want


@pytest.mark.parametrize('pattern,want', [
    ('s3://my.bucket/a/b_00.*.tsv', ('s3://my.bucket/a/', 'b_00.*.tsv')), ('s3://my.bucket/v1.0/b', ('s3://my.bucket/', 'v1.0/b')), ('../a/./b/(c|d)/e', ('../a/./b/', '(c|d)/e')),
    (r'\d+\.tar', ('', r'\d+\.tar')), ('/x/a/y|b/z', ('/x/a/', 'y|b/z'))])
def test_split_regex(pattern, want): assert split_regex(pattern) == want


@pytest.mark.parametrize('path,name,want', [
    ('a/b.tsv', 'c.tar', 'a/c.tar'), ('a/b.tsv', '/c.tar', '/c.tar'), ('a/b.tsv', 's3://x/c.tar', 's3://x/c.tar'), ('s3://x/a/b.tsv', '../c.tar', 's3://x/c.tar'),
    ('s3://x/a/b.tsv', '/etc/c.tar', 's3://x/a/etc/c.tar'), ('https://h/a/b.tsv?sig=1', 'c d.tar', 'https://h/a/c d.tar')])
def test_resolve_sibling(path, name, want): assert resolve_sibling(path, name) == want


def test_importing_loads_no_driver_and_reaches_for_nothing():
    code = '''import socket, sys
def no(*a, **k): raise SystemExit('the network was used')
socket.socket.connect = socket.getaddrinfo = no
import mdm.data.files
print([m for m in ('aiohttp','s3fs','botocore','aiobotocore') if m in sys.modules])'''
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True).stdout == '[]\n'


@pytest.mark.parametrize('address,module', [('s3://shop.cats/a.tar', 's3fs'), ('https://h.org/a.tar', 'aiohttp')])
def test_a_missing_extra_is_named(here_only, address, module):
    here_only.setitem(sys.modules, module, None)
    here_only.delitem(sys.modules['fsspec.registry']._registry, 's3', raising=False)    # another test may have loaded it
    assert "pip install 'matryoshka-diffusion[data]'" in fails(ImportError, find_files, address)
    assert 'gopher' in fails(ValueError, find_files, 'gopher://x/y')


# --- this machine

def test_regular_expressions_over_a_folder(tmp_path, monkeypatch):
    for n in ('a/1.tar', 'a/12.tar', 'a/b/3.tar', 'a/1.tsv', 'c.tar'):
        (tmp_path/n).parent.mkdir(exist_ok=True)
        (tmp_path/n).write_bytes(b'')
    monkeypatch.chdir(tmp_path)
    assert find_files(r're:a/\d+\.tar') == ['a/1.tar', 'a/12.tar'] and find_files(rf're:{tmp_path}/a/.*\.tar') == [f'{tmp_path}/a/{n}' for n in ('1.tar', '12.tar', 'b/3.tar')]
    assert [f.removeprefix('./') for f in find_files(r're:(c|a/b/\d)\.tar')] == ['a/b/3.tar', 'c.tar']
    assert 'no file under' in fails(FileNotFoundError, find_files, r're:a/x+')
    assert 'not a regular expression' in fails(ValueError, find_files, r're:a/(x')
    assert "write 're:a/" in fails(FileNotFoundError, find_files, r'a/\d+.tar')


def test_download_copies_local_files_too(tmp_path):
    for n in range(3): (tmp_path/f'{n}.tar').write_bytes(b'%d' % n)
    assert download(str(tmp_path/'*.tar'), tmp_path/'to')['fetched'] == 3 and (tmp_path/'to/2.tar').read_bytes() == b'2'
    for kw in (dict(part=2, parts=2), dict(part=-1)): assert 'part is' in fails(ValueError, lambda: download(str(tmp_path/'*.tar'), tmp_path/'to', **kw))
    assert 'data.files is empty' in fails(ValueError, download, [], tmp_path)


# --- tables

TABLES = {'csv': 'a,b\n1,"x,\ny"\n\n2\n', 'tsv': 'a\tb\n1\t"x,\ny"\n\n2\n', 'jsonl': '{"a": "1", "b": "x,\\ny"}\n\n{"a": "2", "b": ""}\n'}


@pytest.mark.parametrize('kind', [*TABLES, 'csv.gz', 'tsv.gz', 'parquet'])
def test_tables_of_every_kind(tmp_path, kind):
    path, want = tmp_path/f't.{kind}', [{'a': '1', 'b': 'x,\ny'}, {'a': '2', 'b': ''}]
    text = TABLES.get(kind.removesuffix('.gz'), '').encode()
    if kind == 'parquet':
        pa = pytest.importorskip('pyarrow')
        pytest.importorskip('pyarrow.parquet').write_table(pa.table({'a': ['1', '2'], 'b': ['x,\ny', None], 'c': [0, 0]}), path)
    else: path.write_bytes(gzip.compress(text) if kind.endswith('gz') else text)
    assert [r for _, r in read_table(path, keep=['a', 'b'])] == want
    assert [r for _, r in read_table(path, keep=['a'])] == [{'a': '1'}, {'a': '2'}]
    if kind != 'jsonl': assert column_names(path)[:2] == ['a', 'b']


@pytest.mark.parametrize('name,data,want', [
    ('t.csv', b'a,b\n1,' + b'x' * 200_000, 't.csv, line 2: a cell has 200,000 characters'), ('t.csv', b'a,b\n1,2,3\n', 't.csv, line 2: 3 cells for 2 columns'), ('t.jsonl', b'{"a": 1}\n[1]\n', 't.jsonl, line 2'), ('t.jsonl', b'{"a": 1}\n\n{"a"', 't.jsonl, line 3'),
    ('t.csv.gz', b'no gzip', 't.csv.gz, after line 0'), ('t.csv.gz', gzip.compress(b'a\n' + os.urandom(9000).hex().encode())[:-30], 't.csv.gz, after line 0'),
    ('t.parquet', b'no parquet', 'not a parquet file'), ('t.xls', b'', 'is no table')])
def test_tables_that_cannot_be_read_are_named(tmp_path, name, data, want):
    (tmp_path/name).write_bytes(data)
    assert want in fails(ValueError, lambda: list(read_table(tmp_path/name)))


@pytest.mark.parametrize('name,text,want', [
    ('c.txt', '\n \n', 'holds none'), ('c.csv', 'a,b\n1,2\n', 'it has a, b, but none that is called caption'), ('c.jsonl', '{"caption": "x"}\n{"caption": 3}\n', 'line 2'),
    ('c.jsonl', '{"caption": "x"}\n{"text": "y"}\n', 'line 2'), ('c.jsonl', 'x', 'line 1'), ('c.txt', b'caf\xe9', 'not UTF-8')])
def test_captions_that_cannot_be_read_are_named(tmp_path, name, text, want):
    (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = fails(ValueError, read_captions, tmp_path/name)
    assert message.startswith('captions: ') and name in message and want in message
    assert 'no file' in fails(FileNotFoundError, read_captions, tmp_path/'none.txt')


def test_a_folder_stands_for_its_tars(tmp_path, monkeypatch):
    for n in ('1.tar', '0.tar', 'x.txt', '2.tgz'): (tmp_path/n).write_bytes(b'')
    names = lambda p: [os.path.basename(f) for f in find_tars(p)]
    assert names(tmp_path) == ['0.tar', '1.tar', '2.tgz'] and names([tmp_path/'2.tgz', tmp_path]) == ['2.tgz', '0.tar', '1.tar']
    assert 'is no tar' in fails(ValueError, find_tars, tmp_path/'x.txt') and '1 missing' in fails(FileNotFoundError, find_tars, tmp_path/'{0..2}.tar')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert find_tars('~/0.tar') == [str(tmp_path/'0.tar')] and len(find_tars('~')) == 3


# --- web servers

DATA = os.urandom(50_000)


@pytest.mark.parametrize('ranges', [True, False])
@pytest.mark.parametrize('trouble', ['none', 503, 429, 'close', 'cut'])
def test_reading_from_a_web_server(web, here_only, ranges, trouble):
    here_only.setattr(S, 'BLOCK', 8192)
    (web.folder/'a.bin').write_bytes(DATA)
    web.ranges, web.trouble = ranges, lambda command, path, n: trouble if n % 3 == 2 and trouble != 'none' else None
    with open_file(f'{web.url}/a.bin') as f:
        assert f.read(100) == DATA[:100] and f.seek(20_000) and f.read(10_000) == DATA[20_000:30_000]
        f.seek(5)
        assert f.read() == DATA[5:] and f.read() == b'' and f.seek(-10, 2) == 49_990 and f.read() == DATA[-10:]
    assert not ranges or trouble != 'none' or max(len(r or '') for _, _, r in web.requests) > 0


def test_a_server_that_does_not_say_how_long_a_file_is(web):
    (web.folder/'a.bin').write_bytes(DATA)
    web.chunked = True
    with open_file(f'{web.url}/a.bin') as f:
        assert f.read() == DATA
        f.seek(49_000)
        assert f.read(500) == DATA[49_000:49_500]


def test_a_server_that_hangs_is_asked_again(web, here_only):
    here_only.setattr(S, 'TIMEOUT', .3)
    (web.folder/'a.bin').write_bytes(DATA)
    hung = []
    web.trouble = lambda command, path, n: 'hang' if command == 'GET' and len(hung) < 2 and not hung.append(n) else None
    with open_file(f'{web.url}/a.bin') as f: assert f.read() == DATA
    assert len(hung) == 2


def test_jumping_over_much_fetches_little(web, here_only):
    here_only.setattr(S, 'BLOCK', 1000)
    (web.folder/'a.bin').write_bytes(DATA)
    with open_file(f'{web.url}/a.bin') as f:
        for at in range(0, 50_000, 10_000):
            f.seek(at)
            assert f.read(9) == DATA[at:at + 9]
    asked = [re.findall(r'\d+', r) for _, _, r in web.requests if r]
    assert len(asked) == 5 and all(int(b) - int(a) == 999 for a, b in asked)


def test_what_web_servers_refuse(web, here_only):
    here_only.setattr(S, 'TRIES', 3)
    secret = web.url.replace('//', '//ann:hunter2@')
    (web.folder/'0.tar').write_bytes(b'x')
    assert find_files(f'{web.url}/{{0..0}}.tar') == [f'{web.url}/0.tar']
    text = fails(FileNotFoundError, find_files, f'{secret}/{{0..2}}.tar?sig=0123abcd')
    assert '2 missing' in text and '/1.tar?...' in text
    assert 'no such file' in fails(FileNotFoundError, open_file, f'{secret}/none.tar?sig=0123abcd')
    assert 'write the names with braces' in fails(ValueError, find_files, f'{secret}/*.tar?sig=0123abcd')
    assert 'gives no listing' in fails(ValueError, find_files, rf're:{secret}/\d.tar')
    for code, kind, word in ((403, PermissionError, 'access denied'), (401, PermissionError, 'access denied'), (410, FileNotFoundError, 'no such file'), (500, ConnectionError, 'gave up after 3 tries')):
        web.trouble = lambda command, path, n: code
        assert word in fails(kind, open_file, f'{secret}/0.tar?sig=0123abcd')
    for what in ('close', 503):
        web.trouble = lambda command, path, n: what
        assert 'gave up' in fails(ConnectionError, file_info, f'{secret}/0.tar?sig=0123abcd')
    web.trouble = lambda command, path, n: 'close' if command == 'GET' else None
    address = f'{secret}/0.tar?sig=0123abcd'
    assert 'gave up' in fails(ConnectionError, lambda: open_file(address).read())
    web.shutdown(), web.server_close()
    assert 'gave up' in fails(ConnectionError, file_info, f'{secret}/0.tar?sig=0123abcd')


def test_credentials_reach_the_server(web, here_only, tmp_path):
    (web.folder/'0.tar').write_bytes(b'x')
    basic = 'Basic ' + base64.b64encode(b'ann:hunter2').decode()
    open_file(web.url.replace('//', '//ann:hunter2@') + '/0.tar').read()
    assert set(web.auth) == {basic}
    web.auth.clear()
    (tmp_path/'netrc').write_text('machine 127.0.0.1 login ann password hunter2')
    (tmp_path/'netrc').chmod(0o600)
    here_only.setenv('NETRC', str(tmp_path/'netrc'))
    open_file(f'{web.url}/0.tar').read()
    assert set(web.auth) == {basic}


def test_manifests(web, tmp_path):
    path, good = web.folder/'manifest.json', {'format': 1, 'shards': {'a.tar': {'samples': 3, 'bytes': 4}}}
    for text, want in [(json.dumps(good), good['shards']), ('{', {}), ('[]', {}), ('{"shards":{"a":3}}', {}), ('{"shards":[1]}', {}), ('{"shards":{"a":{"samples":"3","bytes":1}}}', {}), ('\udcff', {})]:
        path.write_bytes(text.encode('utf-8', 'surrogateescape'))
        assert known_shards(f'{web.url}/a.tar') == known_shards(str(web.folder/'a.tar')) == want, text
    path.unlink()
    assert known_shards(f'{web.url}/a.tar') == known_shards(str(web.folder/'a.tar')) == {} and not exists(f'{web.url}/a.tar')
    assert read_manifest(web.url) is read_manifest(web.folder) is None


# --- buckets

def keys(patterns): return [f.removeprefix('s3://shop.cats/') for f in find_files(patterns)]


def test_finding_in_a_bucket(bucket):
    for k in ('d/images_0001.tsv', 'd/images_0002.tsv', 'd/images_0103.tsv', 'd/images_00/4.tsv', 'd/other.tsv', 'e/0.tar', 'e/1.tar', 'e/10.tar'): bucket.put(k)
    assert keys('s3://shop.cats/e/*.tar') == ['e/0.tar', 'e/1.tar', 'e/10.tar'] and keys('s3://shop.cats/*/{0,images_0103}.t*') == ['e/0.tar', 'd/images_0103.tsv']
    assert keys('s3://shop.cats/e/{0..1}.tar') == ['e/0.tar', 'e/1.tar'] and keys('s3://shop.cats/e/10.tar') == ['e/10.tar'] and len(keys('s3://shop.cats/**/*.tsv')) == 5
    assert keys('re:s3://shop.cats/d/images_00.*.tsv') == ['d/images_00/4.tsv', 'd/images_0001.tsv', 'd/images_0002.tsv']
    assert keys(r're:s3://shop.cats/(d|e)/\w*[12]\.t..') == ['d/images_0001.tsv', 'd/images_0002.tsv', 'e/1.tar']
    bucket.trouble = lambda command, path, n: 503 if n % 2 else None
    assert len(keys('s3://shop.cats/**/*.tsv')) == 5 and len(keys('s3://shop.cats/e/*')) == 3 and len(keys('re:s3://shop.cats/.*')) == 8     # no file is lost when a listing fails
    assert [f.size for f in list_files(['s3://shop.cats/e/*', 's3://shop.cats/e/0.tar'])] == [1, 1, 1]
    assert file_info('s3://shop.cats/e/0.tar') == list_files('s3://shop.cats/e/?.tar')[0] and file_info('s3://shop.cats/e/0.tar').md5 == hashlib.md5(b'x').hexdigest()


def test_what_buckets_refuse(bucket, here_only):
    here_only.setattr(S, 'TRIES', 3)
    bucket.put('e/0.tar')
    assert '1 missing' in fails(FileNotFoundError, find_files, 's3://shop.cats/e/{0..1}.tar')
    assert 'no file matches' in fails(FileNotFoundError, find_files, 's3://shop.cats/e/*.tsv') and 'no file under' in fails(FileNotFoundError, find_files, 're:s3://shop.cats/e/x.*')
    assert "write 're:s3://shop.cats/e/0.*" in fails(FileNotFoundError, find_files, 's3://shop.cats/e/0.*.tsv')
    assert 'folder' in fails(FileNotFoundError, find_files, 's3://shop.cats/e')
    for p in ('s3://not-there/0.tar', 's3://not-there/*.tar', 're:s3://not-there/.*'): assert 'no such bucket' in fails(FileNotFoundError, find_files, p), p
    bucket.trouble = lambda command, path, n: 403
    for p in ('s3://shop.cats/e/0.tar', 's3://shop.cats/e/*.tar', 're:s3://shop.cats/e/.*'): assert 'access denied' in fails(PermissionError, find_files, p)
    bucket.trouble = lambda command, path, n: 503
    assert 'gave up after 3 tries' in fails(ConnectionError, find_files, 's3://shop.cats/e/*.tar')
    S._filesystem.cache_clear()
    for k in ('AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'): here_only.delenv(k)
    assert 'no credentials found' in fails(PermissionError, find_files, 's3://shop.cats/e/*.tar')


def sometimes(command, path, n): return {0: 503, 4: 'close', 7: 'cut'}.get(n % 10) if command == 'GET' else None


def test_reading_from_a_bucket_that_fails_some_requests(bucket, here_only):
    here_only.setattr(S, 'BLOCK', 4096)
    bucket.put('big', DATA)
    bucket.trouble = sometimes
    with open_file('s3://shop.cats/big') as f: assert f.read() == DATA and f.seek(777) and f.read(9) == DATA[777:786]
    bucket.put('t.tsv', 'a\tb\n1\t"x\ty"\n\xe9\t2\n'.encode('latin-1'))
    assert list(read_table('s3://shop.cats/t.tsv')) == [(2, {'a': '1', 'b': 'x\ty'}), (3, {'a': '\udce9', 'b': '2'})]


def test_a_download_is_shared_resumed_and_checked(bucket, here_only, tmp_path):
    here_only.setattr(S, 'BLOCK', 4096)
    files = {f'd/{k}.tar': os.urandom(9000 + i) for i, k in enumerate('abcdefg')} | {'d/deep/x.tar': DATA}
    for k, v in files.items(): bucket.put(k, v)
    bucket.put('d/manifest.json', b'{}')
    bucket.trouble = sometimes
    want = 's3://shop.cats/d/**/*.tar'
    reports = [download(want, tmp_path, part, 3) for part in range(3)]
    assert sum(r['files'] for r in reports) == sum(r['fetched'] for r in reports) == 9 and min(r['files'] for r in reports) == 3 and not any(r['failed'] for r in reports)
    copies = lambda: {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file() and 'cache' not in p.parts}
    assert copies() == {k.removeprefix('d/'): v for k, v in files.items()} | {'manifest.json': b'{}'}
    bucket.requests.clear()
    assert download(want, tmp_path) == dict(files=9, fetched=0, already=9, bytes=0, failed={})
    assert not [r for r in bucket.requests if r[0] == 'GET' and r[1].endswith('.tar')]
    # a damaged copy, a copy with another date, half a copy
    (tmp_path/'a.tar').write_bytes(bytes(9000))
    os.utime(tmp_path/'b.tar', (1, 1))
    part = tmp_path/'deep'/f'.x.tar.{file_info("s3://shop.cats/d/deep/x.tar").key}.part'
    os.replace(tmp_path/'deep/x.tar', part)
    os.truncate(part, 30_000)
    report = download(want, tmp_path)
    assert (report['fetched'], report['bytes']) == (2, 9000 + 20_000) and copies() == {k.removeprefix('d/'): v for k, v in files.items()} | {'manifest.json': b'{}'}
    # the beginning of what was uploaded before, and half a copy that is wrong
    (tmp_path/'.c.tar.0123456789abcdef.part').write_bytes(b'old')
    bucket.put('d/c.tar', b'new')
    wrong = tmp_path/f'.d.tar.{file_info("s3://shop.cats/d/d.tar").key}.part'
    (tmp_path/'d.tar').unlink()
    wrong.write_bytes(bytes(5000))
    report = download(want, tmp_path)
    assert report['fetched'] == 2 and copies() == {k.removeprefix('d/'): v for k, v in files.items()} | {'manifest.json': b'{}', 'c.tar': b'new'}


def test_a_download_goes_on_where_it_was_interrupted(bucket, here_only, tmp_path):
    here_only.setattr(S, 'BLOCK', 4096)
    here_only.setattr(S, 'TRIES', 2)
    bucket.put('x.tar', DATA)
    bucket.trouble = lambda command, path, n: 503 if n > 6 and path.endswith('.tar') else None
    report = download('s3://shop.cats/x.tar', tmp_path)
    assert report['fetched'] == 0 and 'gave up' in report['failed']['s3://shop.cats/x.tar'] and not (tmp_path/'x.tar').exists()
    have = sum(p.stat().st_size for p in tmp_path.glob('.x.tar.*.part'))
    assert 0 < have < len(DATA)
    bucket.trouble = lambda *args: None
    assert download('s3://shop.cats/x.tar', tmp_path)['bytes'] == len(DATA) - have and (tmp_path/'x.tar').read_bytes() == DATA
    assert not list(tmp_path.glob('.x*'))


def test_a_tag_that_is_no_md5_sum_and_one_that_never_fits(bucket, here_only, tmp_path):
    bucket.put('x.tar', b'good')
    info = S._info
    here_only.setattr(S, '_info', lambda path, d: FileInfo(**{**info(path, d).__dict__, 'md5': '0' * 32}))    # as encrypted buckets do
    assert download('s3://shop.cats/x.tar', tmp_path)['fetched'] == 1 and (tmp_path/'x.tar').read_bytes() == b'good'
    assert download('s3://shop.cats/x.tar', tmp_path)['already'] == 1
    here_only.setattr(S, '_info', lambda path, d: FileInfo(**{**info(path, d).__dict__, 'size': 99}))
    here_only.setattr(S, 'TRIES', 2)
    assert download('s3://shop.cats/x.tar', tmp_path/'b')['failed'] and not (tmp_path/'b/x.tar').exists()


def test_a_download_follows_tables(web, tmp_path):
    for n in ('a/index.tsv', 'a/t/one.tsv', 'a/t/p/1.tar', 'a/2.tar'): (web.folder/n).parent.mkdir(parents=True, exist_ok=True)
    (web.folder/'a/index.tsv').write_text('filename\nt/one.tsv\n')
    (web.folder/'a/t/one.tsv').write_text('tar\tfile\tcaption\np/1.tar\tx\ty\np/1.tar\tz\ty\n../2.tar\tx\ty\np/none.tar\tx\ty\n')
    for n in ('a/t/p/1.tar', 'a/2.tar'): (web.folder/n).write_text(n)
    report = download(f'{web.url}/a/index.tsv', tmp_path/'to')
    assert report['fetched'] == 4 and [*report['failed']] == [f'{web.url}/a/t/p/none.tar']
    assert sorted(str(p.relative_to(tmp_path/'to')) for p in (tmp_path/'to').rglob('*') if p.is_file()) == ['2.tar', 'index.tsv', 't/one.tsv', 't/p/1.tar']
    assert download(f'{web.url}/a/index.tsv', tmp_path/'to')['already'] == 4
    for evil in ('../../evil.tar', '/evil.tar', 's3://b/evil.tar'):
        (web.folder/'a/t/one.tsv').write_text(f'tar\tfile\tcaption\n{evil}\tx\ty\n')
        assert 'outside the folder' in fails(ValueError, download, f'{web.url}/a/t/one.tsv', tmp_path/'in')


@pytest.mark.parametrize('name', ['../x.tar', 'sub/../../x.tar', '/x.tar', r'..\x.tar', r'C:\x.tar', 'sub/..'])
def test_no_name_in_a_listing_leaves_the_folder(name):
    "The objects of a bucket may be called anything."
    with pytest.raises(ValueError, match='outside the folder'): S._Targets().put(name, 's3://shop.cats/' + name)


def test_two_files_of_one_name(web, tmp_path):
    for d in 'ab':
        (web.folder/d).mkdir()
        (web.folder/d/'0.tar').write_text(d)
    assert 'folders of their own' in fails(ValueError, download, [f'{web.url}/a/0.tar', f'{web.url}/b/0.tar'], tmp_path/'to')
    assert download(f'{web.url}/{{a,b}}/0.tar', tmp_path/'to')['fetched'] == 2 and (tmp_path/'to/b/0.tar').read_text() == 'b'


def test_a_full_disk_stops_a_download(web, tmp_path, here_only):
    for n in range(9): (web.folder/f'{n}.tar').write_bytes(DATA)
    def full(*args): raise OSError(28, 'No space left on device')
    here_only.setattr(S.os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'): download(f'{web.url}/{{0..8}}.tar', tmp_path/'to', threads=2)
    assert not list((tmp_path/'to').glob('*.tar'))
