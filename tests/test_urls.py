"Edge cases of mdm.data.urls, with a web server on this machine that behaves as badly as the web"
import builtins, gzip, io, json, os, socket, sys, tarfile, threading, time, urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from PIL import Image
from test_shards import killed
from mdm.data import urls as U
from mdm.data.files import MISFIT, find_tars, read_manifest
from mdm.data.inspect import read_samples
from mdm.data.samples import BAD_CAPTION, BAD_PICTURE, NO_CAPTION
from mdm.data.shards import REPORT
from mdm.data.urls import *

def saved(img, format='JPEG', **kwargs):
    out = io.BytesIO(); img.save(out, format, **kwargs); return out.getvalue()

def noise(seed, size=(40,30)): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1],3), np.uint8))

gif = saved(Image.new('RGB', (20,20), 'red'), 'GIF', save_all=True, append_images=[Image.new('RGB', (20,20), 'blue')])

class Web(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def head(self, code=200, **headers):
        self.send_response(code)
        for k,v in headers.items(): self.send_header(k.replace('_', '-'), v)
        self.end_headers()
    def do_GET(self):
        what, _, number = self.path[1:].partition('/')
        self.server.seen[self.path] += 1
        try: getattr(self, what)(number)
        except OSError: pass
    def good(self, n):
        time.sleep(self.server.pause)
        data = saved(noise(int(n)))
        self.head(Content_Length=len(data)); self.wfile.write(data)
    def turned(self, n):
        exif = Image.Exif(); exif[0x112] = 6
        self.head(); self.wfile.write(saved(noise(0), exif=exif))
    def animated(self, n): self.head(); self.wfile.write(gif)
    def missing(self, n): self.head(404)
    def forbidden(self, n): self.head(403)
    def page(self, n): self.head(Content_Type='image/jpeg'); self.wfile.write(b'<html>moved</html>')
    def empty(self, n): self.head(Content_Length=0)
    def cut(self, n): self.head(Content_Length=5000); self.wfile.write(saved(noise(0))[:700]); self.close_connection = True
    def silent(self, n): self.server.over.wait(60)
    def drip(self, n):
        self.head()
        while not self.server.over.wait(.1): self.wfile.write(b'x')
    def endless(self, n):
        self.head()
        while not self.server.over.is_set(): self.wfile.write(bytes(1 << 16))
    def promises(self, n): self.head(Content_Length=10**12)
    def moved(self, n): self.head(302, Location=f'/good/{n}')
    def round(self, n): self.head(302, Location=f'/round/{n}')
    def to_file(self, n): self.head(302, Location='file:///etc/hostname')
    def noai(self, n): self.head(X_Robots_Tag='noai'); self.wfile.write(saved(noise(0)))
    def second(self, n): self.good(n) if self.server.seen[self.path] > 1 else self.head(503)

@pytest.fixture
def web():
    s = ThreadingHTTPServer(('127.0.0.1', 0), Web)
    s.daemon_threads, s.seen, s.over, s.pause = True, Counter(), threading.Event(), 0
    threading.Thread(target=s.serve_forever, daemon=True).start()
    s.url = f'http://127.0.0.1:{s.server_port}'
    yield s
    s.over.set(); s.shutdown(); s.server_close()

def listed(path, rows):
    path.write_bytes(b''.join(u.encode() + b'\t' + (c if isinstance(c, bytes) else c.encode()) + b'\n' for u,c in rows))
    return path

def samples(folder): return [s for *_,s in read_samples(find_tars(folder))]
def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}

# ---- lists

both = [('https://a.org/1.jpg', 'one, "two"'), ('http://b.org/2.jpg', 'drei')]

@pytest.mark.parametrize('name, text', [
    ('cc12m.tsv', 'https://a.org/1.jpg\tone, "two"\nhttp://b.org/2.jpg\tdrei\n'),
    ('cc3m.tsv', 'one, "two"\thttps://a.org/1.jpg\r\ndrei\thttp://b.org/2.jpg'),
    ('named.tsv', 'id\tCaption\tURL\n1\tone, "two"\thttps://a.org/1.jpg\n2\tdrei\thttp://b.org/2.jpg\n'),
    ('quoted.tsv', 'url\tcaption\nhttps://a.org/1.jpg\t"one, ""two"""\n\nhttp://b.org/2.jpg\t"drei"\n'),
    ('list.txt', '\ufeffurl\ttext\nhttps://a.org/1.jpg\tone, "two"\nhttp://b.org/2.jpg\tdrei\n'),
    ('bare.csv', 'https://a.org/1.jpg,"one, ""two"""\nhttp://b.org/2.jpg,drei\n'),
    ('named.csv', 'image_url,score,alt\nhttps://a.org/1.jpg,1,"one, ""two"""\nhttp://b.org/2.jpg,2,drei\n')])
def test_lists(tmp_path, name, text):
    (tmp_path/name).write_text(text, newline='')
    assert list(read_urls(tmp_path/name)) == both
    with gzip.open(tmp_path/f'{name}.gz', 'wt', newline='') as f: f.write(text)
    if not name.endswith('.txt'): assert list(read_urls(tmp_path/f'{name}.gz')) == both

def test_parquet(tmp_path):
    pq.write_table(pa.table({'id':[1,2,3], 'URL':[u for u,_ in both]+[None], 'TEXT':[c for _,c in both]+[None]}), tmp_path/'a.parquet', row_group_size=1)
    assert list(read_urls(tmp_path/'a.parquet')) == [*both, ('','')]
    (tmp_path/'b.parquet').write_bytes(b'no')
    with pytest.raises(ValueError, match='not a parquet file'): list(read_urls(tmp_path/'b.parquet'))

def test_columns_that_are_named(tmp_path):
    (tmp_path/'a.tsv').write_text('address\twords\turl\ttext\nhttps://a.org/1.jpg\tA\tx\ty\n')
    assert list(read_urls(tmp_path/'a.tsv', 'Address', 'words')) == [('https://a.org/1.jpg','A')]
    with pytest.raises(ValueError, match="no column for the address: found address, words, url, text; expected one of where .see --url-column"): list(read_urls(tmp_path/'a.tsv', 'where'))

def test_captions_that_look_like_quotations(tmp_path):
    "An open quotation mark swallows nothing; short and overlong lines are named"
    (tmp_path/'a.tsv').write_bytes('https://a.org/1.jpg\t"open\nhttps://a.org/2.jpg\nhttps://a.org/3.jpg\tc\tmore\nhttps://a.org/4.jpg\tcar\rriage\x0bö\n'.encode() + b'https://a.org/5.jpg\t\xff\n')
    rows = list(read_urls(tmp_path/'a.tsv'))
    assert [c.encode('utf-8','surrogateescape') for _,c in rows if isinstance(c, str)] == [b'"open', 'car\rriage\x0bö'.encode(), b'\xff']
    assert [(n, str(c), str(c.__cause__)[:17]) for n,c in rows if not isinstance(c, str)] == [('line 2', MISFIT, 'line 2: 1 cell fo'), ('line 3', MISFIT, 'line 3: 3 cells f')]

@pytest.mark.parametrize('name, text, what', [('a.json', '{}', 'is a table'), ('a.tsv', 'a\tb\nc\td\n', 'no column for the address'), ('a.tsv', 'https://a.org/1.jpg\n', 'one column only'), ('a.tsv.gz', 'plain', 'damaged')])
def test_lists_that_are_none(tmp_path, name, text, what):
    (tmp_path/name).write_text(text)
    with pytest.raises(ValueError, match=what): list(read_urls(tmp_path/name))

# ---- the web

def test_every_kind_of_answer(tmp_path, web):
    kinds = 'good turned animated missing forbidden page empty cut silent endless promises moved round to_file noai'.split()
    odd = [('http://127.0.0.1:9/x.jpg', 'refused'), ('http://no.such.host.invalid/x.jpg', 'nowhere'), ('file:///etc/hostname', 'file'), ('', 'blank'), ('http://[bad/x.jpg', 'bad'),
        (f'{web.url}/good/100 ', 'space'), (f'{web.url}/good/107', ''), (f'{web.url}/good/108', b'\xff'), (f'{web.url}/good/109', 'good again')]
    rows = [(f'{web.url}/{k}/1', k) for k in kinds] + odd
    m = write_urls(listed(tmp_path/'list.tsv', rows), tmp_path/'out', timeout=8, max_picture_mb=1, retries=0, command='mdm_dataset urls list.tsv out')
    assert [s['txt'].decode() for s in samples(tmp_path/'out')] == ['good', 'turned', 'animated', 'moved', 'space', 'good again']
    why = {(kinds + [c for _,c in odd])[[u for u,_ in rows].index(u)]: reason for u,reason,*_ in (o.split('\t') for o in (tmp_path/'out'/REPORT).read_text().splitlines()[1:])}
    assert why.pop('cut') in ('connection broken off', BAD_PICTURE)
    assert why == {'missing':'HTTP error 404', 'forbidden':'HTTP error 403', 'page':BAD_PICTURE, 'empty':BAD_PICTURE, 'silent':SLOW, 'endless':TOO_LARGE, 'promises':TOO_LARGE, 'round':'HTTP error 302', 'to_file':'HTTP error 302',
        'noai':'its owner does not want it used (X-Robots-Tag)', 'refused':'server refused the connection', 'nowhere':'server not found', 'file':NO_ADDRESS, 'blank':NO_ADDRESS, 'bad':'not fetched for another reason', '':NO_CAPTION, b'\xff':BAD_CAPTION}
    assert m['skipped'][NO_CAPTION] == m['skipped'][BAD_CAPTION] == 1 and m['complete'] and m['command'] == 'mdm_dataset urls list.tsv out'
    assert sum(m['skipped'].values()) + 6 == len(rows)

def test_trying_again(tmp_path, web):
    m = write_urls(listed(tmp_path/'list.tsv', [(f'{web.url}/second/1', 'a'), (f'{web.url}/missing/1', 'b')]), tmp_path/'out', retries=1)
    assert m['skipped'] == {'HTTP error 404':1} and [s['txt'] for s in samples(tmp_path/'out')] == [b'a']
    assert web.seen == {'/second/1':2, '/missing/1':2}

def test_a_byte_now_and_then(tmp_path, web):
    "A server that is never silent for long, and never done, is given up all the same"
    with pytest.raises(ValueError, match=f'2 x {SLOW}'): write_urls(listed(tmp_path/'list.tsv', [(f'{web.url}/drip/{i}', 'x') for i in range(2)]), tmp_path/'out', timeout=.3, retries=0)

def test_pictures_come_as_they_are(tmp_path, web):
    rows = [(f'{web.url}/good/{i}', f'picture {i}') for i in range(30)]
    m = write_urls(listed(tmp_path/'list.tsv', rows), tmp_path/'out', chunk=7, per_shard=12)
    assert [o['samples'] for o in m['shards'].values()] == [12,12,6] and m['skipped'] == {}
    for i,s in enumerate(samples(tmp_path/'out')): assert s == {'__key__':f'{i:09d}', 'jpg':saved(noise(i)), 'txt':b'picture %d'%i, 'json':json.dumps({'url':rows[i][0]}).encode()}

def test_resize(tmp_path, web):
    write_urls(listed(tmp_path/'list.tsv', [(f'{web.url}/turned/1', 'a'), (f'{web.url}/good/1', 'b')]), tmp_path/'out', resize=15)
    assert [Image.open(io.BytesIO(s['jpg'])).size for s in samples(tmp_path/'out')] == [(15,20), (20,15)]      # the turned one upright

def test_killed(tmp_path, web):
    "SIGKILL again and again; what was finished is not fetched again, and the result is that of one run"
    load_img2dataset()
    rows = [(f'{web.url}/{"missing" if i%9 == 4 else "good"}/{i}', f'picture {i}') for i in range(60)]
    listed(tmp_path/'list.tsv', rows)
    work = lambda out: write_urls(tmp_path/'list.tsv', out, chunk=5, per_shard=6, retries=0, threads=8)
    work(tmp_path/'whole')
    web.pause, kills, places = .03, 0, []
    position = lambda: (read_manifest(tmp_path/'out') or {}).get('position', 0)
    for asked in (1, None, 5, None, 12, None):               # killed after so many requests, or (None) as soon as a further shard is safe: alike on a fast and on a slow machine
        web.seen.clear(); was = position()
        kills += killed(lambda: work(tmp_path/'out'), (lambda: position() > was) if asked is None else lambda: sum(web.seen.values()) >= asked)
        places.append(position())
        for p in (tmp_path/'out').glob('*.tar'): assert p.read_bytes()[-1024:] == bytes(1024)
    assert kills >= 3 and places[-1] and places == sorted(places)
    web.seen.clear(); web.pause = 0
    work(tmp_path/'out')
    assert files(tmp_path/'out') == files(tmp_path/'whole')
    assert sum(web.seen.values()) == len(rows) - places[-1]
    web.seen.clear()
    work(tmp_path/'out')
    assert not web.seen                                      # a finished run asks nobody

def test_another_list_is_refused(tmp_path, web):
    rows = [(f'{web.url}/good/{i}', f'picture {i}') for i in range(3)]
    write_urls(listed(tmp_path/'list.tsv', rows), tmp_path/'out')
    with pytest.raises(FileExistsError, match='source was'): write_urls(listed(tmp_path/'list.tsv', rows[1:]), tmp_path/'out')

def test_broken_off(tmp_path, web, monkeypatch):
    "After Ctrl-C the threads under way soon stop asking, and later fetches are not disturbed"
    web.pause = .05
    rows = listed(tmp_path/'list.tsv', [(f'{web.url}/good/{i}', 'x') for i in range(400)])
    real = U.ShardWriter.add
    def stop(self, *args):
        if self.position == 2: raise KeyboardInterrupt()
        real(self, *args)
    monkeypatch.setattr(U.ShardWriter, 'add', stop)
    with pytest.raises(KeyboardInterrupt): write_urls(rows, tmp_path/'out', chunk=20, threads=8)
    time.sleep(1); asked = sum(web.seen.values()); time.sleep(.5)
    assert sum(web.seen.values()) == asked < 400
    monkeypatch.undo()
    web.pause = 0
    def works():
        with urllib.request.urlopen(f'{web.url}/good/0') as answer: return len(answer.read()) > 100
    assert works()                                           # the same process may go on, a notebook for instance
    assert sum(o['samples'] for o in write_urls(rows, tmp_path/'out', chunk=20)['shards'].values()) == 400
    assert works()

def test_without_a_network(tmp_path, web):
    "Not one of many servers answers: nothing is marked as lost, and the same command goes on later."
    with socket.socket() as s: s.bind(('0.0.0.0', 0)); port = s.getsockname()[1]
    rows = [(f'{web.url}/good/{i}', 'x') for i in range(15)] + [(f'http://127.0.0.{i}:{port}/good/{i}', 'y') for i in range(1, 31)]
    listed(tmp_path/'list.tsv', rows)
    work = lambda: write_urls(tmp_path/'list.tsv', tmp_path/'out', chunk=15, per_shard=10, retries=0, threads=8, timeout=5)
    with pytest.raises(ConnectionError, match='none of the 15 servers in lines 16 to 30 of the list answered .server refused the connection.'): work()
    assert read_manifest(tmp_path/'out')['position'] == 10 and not read_manifest(tmp_path/'out')['skipped']
    assert write_urls(tmp_path/'list.tsv', tmp_path/'gone', chunk=15, retries=0, network_check=False)['skipped'] == {U.REFUSED:30}
    there = ThreadingHTTPServer(('0.0.0.0', port), Web)
    there.daemon_threads, there.seen, there.over, there.pause = True, Counter(), threading.Event(), 0
    threading.Thread(target=there.serve_forever, daemon=True).start()
    try: m = work()
    finally: there.shutdown(); there.server_close()
    assert sum(o['samples'] for o in m['shards'].values()) == 45 and not m['skipped']

def test_one_dead_server_is_no_outage(tmp_path, web):
    rows = [(f'http://127.0.0.1:1/{i}', 'x') for i in range(15)] + [(f'http://img{i}.nowhere.invalid/{i}', 'x') for i in range(15)] + [(f'{web.url}/good/0', 'x')]
    assert sum(write_urls(listed(tmp_path/'list.tsv', rows), tmp_path/'out', chunk=15, retries=0)['skipped'].values()) == 30

def test_nothing_is_final_about_nothing(tmp_path, web):
    "A run without a single picture leaves nothing that a later one would trust."
    path = listed(tmp_path/'list.tsv', [(f'{web.url}/second/{i}', 'x') for i in range(3)])
    with pytest.raises(ValueError, match='3 x HTTP error 503'): write_urls(path, tmp_path/'out', retries=0)
    m = write_urls(path, tmp_path/'out', retries=0)
    assert [o['samples'] for o in m['shards'].values()] == [3] and not m['skipped'] and (tmp_path/'out'/REPORT).read_text().count('\n') == 1

def test_mistakes(tmp_path, web):
    path = listed(tmp_path/'list.tsv', [(f'{web.url}/missing/{i}', 'x') for i in range(3)])
    with pytest.raises(ValueError, match='3 x HTTP error 404'): write_urls(path, tmp_path/'out')
    with pytest.raises(FileNotFoundError, match='none.tsv does not exist'): write_urls(tmp_path/'none.tsv', tmp_path/'out')
    with pytest.raises(ValueError, match='urls.retries: found -1'): write_urls(path, tmp_path/'o2', retries=-1)
    for k in ('timeout', 'threads', 'max_picture_mb', 'resize', 'chunk'):
        with pytest.raises(ValueError, match=f'urls.{k}: found 0'): write_urls(path, tmp_path/'o2', **{k:0})

@pytest.mark.parametrize('cause, mend', [('No module named img2dataset', r'matryoshka-diffusion\[data\]'), ("No module named 'imghdr'", 'standard-imghdr')])
def test_without_img2dataset(tmp_path, monkeypatch, cause, mend):
    real = builtins.__import__
    def without(name, *args, **kwargs):
        if name.startswith('img2dataset'): raise ImportError(cause)
        return real(name, *args, **kwargs)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match=mend): write_urls(listed(tmp_path/'list.tsv', both), tmp_path/'out')
    assert not (tmp_path/'out').exists()
