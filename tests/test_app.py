"mdm_app: the page in a real browser, and what a stranger could send to its server."
import http.client, json, os, shutil, signal, socket, subprocess, sys, time, uuid
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
import psutil, pytest, torch
from PIL import Image
import browser as browser_setup
from browser import advice, find_browser
from mdm.cli.app import free_port, is_local, mdm_app, named_checkpoints, offered_adapters, write_page
from mdm.widgets.forks import _try_adapter
from data_tools import film_seconds, path_seconds
from pytest import approx
from tiny_models import pipe, write_adapter

evil = '<script>document.title="owned"</script><img src=x onerror="document.title=1">a red circle'
ready = 90_000   # ms: the page starts a Python process that loads PyTorch

class Server:
    def __init__(self, folder, *args):
        self.port = free_port('127.0.0.1', 0)
        self.log = folder/f'log_{self.port}.txt'
        self.process = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', 'import sys; sys.path.pop(0); from mdm.cli.app import mdm_app; sys.exit(mdm_app(sys.argv[1:]))', *args, '--port', str(self.port)],
            stdout=self.log.open('w'), stderr=subprocess.STDOUT, cwd=folder, env={**os.environ, 'TMPDIR': str(folder)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # a job in the background (nohup make test &) would hand on that Ctrl-C is ignored
        self.url, start = f'http://127.0.0.1:{self.port}/', time.time()
        while f'mdm_app: {self.url}' not in self.log.read_text() or socket.socket().connect_ex(('127.0.0.1', self.port)):
            assert self.process.poll() is None and time.time() - start < 120, self.log.read_text()
            time.sleep(.1)

    def ask(self, path, method='GET', body=None, **headers):
        "The answer to a request exactly as written: no client tidies the path."
        c = http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        c.putrequest(method, path, skip_host='Host' in headers)
        for k, v in {**headers, 'Content-Length': str(len(body or ''))}.items(): c.putheader(k, v)
        c.endheaders(body.encode() if body else None)
        r = c.getresponse(); return r.status, r.read(200_000), r

    def kernels(self):
        "The processes of the visitors; where they are forked, the one that they are copied from is left out."
        forked, server = sys.platform == 'linux' and not torch.cuda.is_available(), psutil.Process(self.process.pid)
        first = server.children() if forked else []          # asking each for its parent would fail for one that ends meanwhile
        return [o for o in server.children(recursive=True) if o not in first]

    def stop(self, sig=signal.SIGTERM): self.process.send_signal(sig); return self.process.wait(60)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('app')
    (d/'secret.png').write_bytes(b'secret'); (d/'secret.txt').write_text('secret')
    (d/'voila.py').write_text('raise SystemExit("a configuration file of the working folder was run")')
    return d

@pytest.fixture(scope='module')
def server(folder):
    s = Server(folder, 'shapes', '--visitors', '3')
    yield s
    processes = psutil.Process(s.process.pid).children(recursive=True)
    assert s.stop() == 0
    assert not psutil.wait_procs(processes, timeout=20)[1], 'the server left processes behind'
    assert s.log.read_text() == f'mdm_app: {s.url} (Ctrl-C ends it)\n', s.log.read_text()[-5000:]      # after all that these tests ask and send
    assert not list(folder.glob('mdm_app_*')) and not list(folder.glob('voila_*')), 'the server left files behind'

@pytest.fixture(scope='module')
def browser():
    chromium = find_browser()
    assert chromium, advice
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()

def opened(browser, url, **kwargs):
    page = browser.new_context(accept_downloads=True, **kwargs).new_page()
    page.requests, page.errors, page.sent = [], [], []
    page.set_default_timeout(20_000)
    page.on('request', lambda r: page.requests.append(r.url))
    page.on('websocket', lambda w: page.requests.append(w.url))
    page.on('websocket', lambda w: w.on('framesent', lambda o: page.sent.append(o if isinstance(o, str) else o.decode('latin1'))))
    page.on('pageerror', lambda e: page.errors.append(str(e)))
    page.on('console', lambda m: m.type == 'error' and page.errors.append(m.text))
    page.policy = page.goto(url, timeout=ready).headers['content-security-policy']
    return page

@contextmanager
def ready_page(browser, server, width, height):
    "The page of a visitor, when it can be used."
    page = opened(browser, server.url, viewport=dict(width=width, height=height))
    page.get_by_text('Ready').wait_for(timeout=ready)
    yield page
    page.context.close()

@pytest.fixture(scope='module')
def page(server, browser):
    with ready_page(browser, server, 1280, 1400) as page: yield page

def kernel_of(page): return next(u for u in page.requests if u.startswith('ws') and '/channels' in u).split('/api/kernels/')[1].split('/')[0]
def press(page, name): page.get_by_role('button', name=name, exact=True).click()
def picture(page, k=0): return page.locator('.mdm-levels img').nth(k).get_attribute('src')
def status(page): return page.get_by_role('status').inner_text()

def finish(page):
    page.wait_for_function("document.querySelector('[role=status]').innerText.match(/Done|Stopped/)", timeout=60_000)

def start(page, **fields):
    for label, text in fields.items(): page.get_by_label(label, exact=True).first.fill(text); page.get_by_label(label, exact=True).first.press('Tab')
    press(page, 'Run')
    page.wait_for_function("document.querySelector('[role=status]').innerText.startsWith('Step')", timeout=60_000)

def test_it_starts_without_the_network(page):
    assert {u.split('/')[2] for u in page.requests if u.startswith(('http', 'ws'))} == {page.url.split('/')[2]}
    assert not [e for e in page.errors if 'favicon' not in e], page.errors
    assert "default-src 'self'" in page.policy and 'http' not in page.policy
    assert page.title() == 'Matryoshka Diffusion' and page.get_by_role('heading', name='Matryoshka Diffusion').is_visible()
    assert 'SamplerWidget' not in page.content()                     # the source stays on the server

def test_the_page_asks_once_for_all_widgets(page):
    "Asking for each takes seconds, and where a widget is made meanwhile, the page finds none."
    count = lambda word: sum(f'"{word}"' in o for o in page.sent)
    assert (count('request_states'), count('request_state')) == (1, 0)

def test_run_pictures_change_and_end(page):
    start(page, Prompt='a large red cross in the centre on a white background', Steps='60', Pictures='4')
    seen = set()
    for _ in range(200):
        if page.locator('.mdm-levels img').count(): seen.add(picture(page))
        if 'Done' in status(page): break
        page.wait_for_timeout(50)
    finish(page)
    assert len(seen) > 3 and 'step 60 of 60' in status(page)
    assert page.locator('.mdm-levels .mdm-open img').count() == 8 and page.locator('.mdm-levels img').first.evaluate("o => o.naturalWidth == 32 && o.width >= 192 && o.width%32 == 0 && getComputedStyle(o).imageRendering == 'pixelated'")
    assert page.locator('svg .mdm-now').count() == 1 and not page.errors

def test_stop_from_the_page(page):
    start(page, Steps='900', Seed='3')
    press(page, 'Stop'); finish(page)
    steps = int(status(page).split('step ')[1].split()[0])
    assert 'Stopped at' in status(page) and 0 < steps < 900 and page.get_by_role('button', name='Run', exact=True).is_enabled()

def test_scrub(page):
    start(page, Steps='12', Seed='4'); finish(page)
    last = picture(page)
    press(page, 'step 1')
    page.get_by_text('Path: step 1 of 12').wait_for()
    assert picture(page) != last
    handle = page.locator('.mdm-results .noUi-handle')
    handle.focus(); handle.press('ArrowRight')                       # by keyboard too
    page.get_by_text('Path: step 2 of 12').wait_for()
    press(page, 'step 12'); page.get_by_text('Path: step 12 of 12').wait_for()
    page.wait_for_function('o => document.querySelector(".mdm-levels img").src == o', arg=last)
    page.get_by_role('button', name='noisy xₜ').click(); press(page, 'step 1')
    page.wait_for_function('o => document.querySelector(".mdm-levels img").src != o', arg=last)
    page.get_by_role('button', name='clean x₀').click()
    page.get_by_label('Inner resolutions too').uncheck()
    page.get_by_text('16 × 16 pixels', exact=True).wait_for(state='hidden')
    page.get_by_label('Inner resolutions too').check()

def test_history_restores(page):
    start(page, Prompt='a small blue bar', Steps='5', Seed='21', Pictures='1'); finish(page)
    one = picture(page)
    start(page, Prompt='a large green ring', Steps='6', Seed='22', Pictures='2'); finish(page)
    page.locator('.mdm-history').get_by_role('button', name='seed 21').click()
    page.get_by_text('Brought back').wait_for()
    assert [page.get_by_label(o, exact=True).first.input_value() for o in ('Prompt', 'Steps', 'Seed', 'Pictures')] == ['a small blue bar', '5', '21', '1']
    assert picture(page) == one

def test_downloads(page):
    page.get_by_role('button', name='seed 21', exact=False).and_(page.locator('.mdm-open')).first.click()
    with page.expect_download() as d: page.get_by_role('link', name='Save PNG').click()
    page.keyboard.press('Escape')
    data = Path(d.value.path()).read_bytes()
    picture = Image.open(BytesIO(data))
    assert d.value.suggested_filename == 'mdm_seed21.png' and picture.size == (32, 32)
    assert picture.text['prompt'] == 'a small blue bar' and picture.text['seed'] == '21' and json.loads(picture.text['settings'])['sides'][0]['steps'] == 5
    with page.expect_download() as d: press(page, 'GIF')            # one press: the page saves it by itself
    gif = Image.open(d.value.path())
    assert d.value.suggested_filename.endswith('.gif') and gif.format == 'GIF' and film_seconds(d.value.path()) == approx(path_seconds(5))

def test_compare_side_by_side(page):
    page.get_by_label('Solver', exact=True).first.select_option('ddim')
    page.get_by_role('button', name='Compare').click()
    page.get_by_label('Compare with').check()
    page.get_by_label('Steps', exact=True).nth(1).fill('4'); page.get_by_label('Solver', exact=True).nth(1).select_option('unipc')
    start(page, Seed='2'); finish(page)
    a, b = (page.locator('.mdm-sides > .widget-box').nth(k) for k in range(2))
    assert 'A: shapes, steps 5, solver ddim' in a.inner_text() and 'B: shapes, steps 4, solver unipc' in b.inner_text()
    assert a.bounding_box()['y'] == b.bounding_box()['y'] and a.bounding_box()['x'] < b.bounding_box()['x']
    page.get_by_label('Compare with').uncheck()

def test_prompts_are_text(page):
    page.get_by_role('button', name='Wording').click()
    start(page, Prompt=evil, **{'Negative prompt': evil}); finish(page)
    page.locator('.mdm-caption', has_text='seed 2').first.wait_for()
    assert page.title() == 'Matryoshka Diffusion' and page.locator('img[src=x]').count() == 0 and page.locator('.mdm-sampler script').count() == 0
    assert page.get_by_label('Prompt', exact=True).input_value() == evil

def test_errors_are_told(page):
    start_errors = len(page.errors)
    page.get_by_label('Prompt', exact=True).fill('x'*2500 + evil); press(page, 'Run')
    page.get_by_role('alert').wait_for()
    assert 'characters: 2,000 are the most' in page.get_by_role('alert').inner_text()
    page.get_by_label('Prompt', exact=True).fill('a red circle'); start(page); finish(page)
    assert page.get_by_role('alert').count() == 0 and len(page.errors) == start_errors

def test_controls_have_names(page):
    assert page.evaluate("""() => [...document.querySelectorAll('.mdm-sampler input, .mdm-sampler select, .mdm-sampler textarea, .mdm-sampler button')]
        .filter(o => o.offsetParent && !(o.labels && o.labels.length && o.labels[0].innerText || o.innerText || o.title)).map(o => o.outerHTML)""") == []
    assert page.evaluate("() => [...document.querySelectorAll('.mdm-sampler img')].every(o => o.hasAttribute('alt'))")

def test_on_a_telephone(server, browser):
    page = opened(browser, server.url, viewport=dict(width=390, height=844), is_mobile=True, has_touch=True)
    page.get_by_text('Ready').wait_for(timeout=ready)
    start(page); finish(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    out = "() => [...document.querySelectorAll('.mdm-sampler *:not(.noUi-origin)')].filter(o => o.offsetParent && !o.closest('.mdm-examples > *, .mdm-strip > *') && (o.getBoundingClientRect().right > innerWidth + 1 || o.getBoundingClientRect().left < -1)).map(o => o.className)"
    assert page.evaluate(out) == []
    press(page, 'Settings'); page.get_by_text('More about sampling').first.tap()
    for name in ('Run', 'GIF', 'step 1'): page.get_by_role('button', name=name, exact=True).scroll_into_view_if_needed(); assert page.get_by_role('button', name=name, exact=True).is_visible()
    assert page.locator('.mdm-ask').bounding_box()['y'] < page.locator('.mdm-fields').bounding_box()['y'] < page.locator('.mdm-results').bounding_box()['y']
    press(page, 'Settings'); page.locator('.mdm-fields').wait_for(state='hidden')       # folded, the pictures follow the prompt
    page.get_by_role('button', name='step 1', exact=True).tap(); page.get_by_text('Path: step 1 of').wait_for()
    assert page.evaluate(out) == []
    page.context.close()

@pytest.mark.parametrize('path', ['/voila/files/secret.png', '/voila/files/secret.txt', '/voila/files/../secret.png', '/voila/files/%2e%2e/secret.png', '/secret.png', '/../secret.txt', '/etc/passwd', '/voila/files//etc/passwd',
    '/voila/static/../../../../../../../../etc/passwd', '/voila/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd', '/voila/templates/lab/static/../../../../../../../../../etc/passwd', '/voila/templates/../static/passwd', '/voila/labextensions/../../../../../../../../etc/passwd',
    '/api/contents', '/api/contents/secret.txt', '/api/kernels', '/api/sessions', '/api/terminals', '/tree', '/lab', '/notebooks', '/voila/tree', '/voila/render/x.ipynb', '/voila/api/contents/', '/files/secret.txt', '/Matryoshka%20Diffusion.ipynb', '/voila/files/Matryoshka%20Diffusion.ipynb'])
def test_no_way_to_files(server, path):
    status, body, r = server.ask(path)
    if status == 302: status, body, r = server.ask(r.headers['Location'].replace(' ', '%20'))
    assert status >= 400 and b'secret' not in body.replace(path.encode(), b'') and b'root:' not in body and b'SamplerWidget' not in body, (path, status, body[:300])

@pytest.mark.parametrize('method, path', [('POST', '/api/kernels'), ('POST', '/api/sessions'), ('POST', '/api/terminals'), ('PUT', '/api/contents/x.txt'), ('POST', '/'), ('POST', '/voila/api/shutdown/x')])
def test_no_way_to_write(server, method, path):
    assert server.ask(path, method, json.dumps(dict(name='python3', type='file', content='x')))[0] >= 400

def test_bodies_are_bounded(server):
    try: assert server.ask('/', 'POST', 'x'*2**21)[0] in (400, 413)
    except (ConnectionResetError, BrokenPipeError): pass              # hung up on
    assert server.ask('/voila/static/voila.js')[0] == 200

def test_foreign_names_are_refused(server):
    assert server.ask('/', Host='evil.example')[0] == 403            # a page elsewhere that points its name to this machine

def test_a_message_cannot_run_code(server, page, folder):
    "What the page's own connection lets through: widgets' messages, not code."
    import websocket
    mark = folder/'ran'
    kernel = kernel_of(page)
    ws = websocket.create_connection(f'ws://127.0.0.1:{server.port}/api/kernels/{kernel}/channels', timeout=20)
    def send(kind, channel='shell', **content):
        id = uuid.uuid4().hex
        ws.send(json.dumps(dict(header=dict(msg_id=id, msg_type=kind, username='', session='x', version='5.3', date=''), parent_header={}, metadata={}, content=content, channel=channel, buffers=[])))
        return id
    code = f'open({str(mark)!r}, "w").write("x")'
    for kind, content in (('execute_request', dict(code=code, silent=False, store_history=False, user_expressions={'a': code}, allow_stdin=False, stop_on_error=True)), ('inspect_request', dict(code='mdm', cursor_pos=3)),
                          ('complete_request', dict(code='import o', cursor_pos=8)), ('history_request', dict(hist_access_type='tail', n=5)), ('create_subshell_request', {}), ('debug_request', dict(type='request', command='evaluate', arguments=dict(expression=code)))):
        for channel in ('shell', 'control'): send(kind, channel, **content)
    send('comm_open', comm_id='c1', target_name='os.system', data=dict(command='touch x'))        # only the names that were registered for widgets exist
    asked, replies = send('kernel_info_request'), []
    while not replies or replies[-1]['parent_header'].get('msg_id') != asked or replies[-1]['msg_type'] != 'kernel_info_reply': replies.append(json.loads(ws.recv()))
    assert not mark.exists() and not {r['msg_type'] for r in replies} & {'execute_reply', 'execute_result', 'inspect_reply', 'complete_reply', 'history_reply', 'create_subshell_reply', 'debug_reply'}
    ws.close()
    with pytest.raises(Exception): websocket.create_connection(f'ws://127.0.0.1:{server.port}/api/kernels/{kernel}/channels', timeout=20, origin='http://evil.example')
    start(page); finish(page)                                          # and the page goes on

def test_wrong_requests_are_answered_shortly(server, page):
    "Nothing of this may print a traceback; the fixture looks at the log when the server ends."
    for path in ('/favicon.ico', '/apple-touch-icon.png', '/voila/templates/x', '/voila/templates/lab/notstatic/x', '/voila/static/%00', '/voila/labextensions/x', '/voila/api/themes/%00', '/api/kernels/a-b-c-d-e', '/api/kernels/a-b-c-d-e/channels',
                 '/%ff', '/%00', '/a%0d%0ab:c', '/login', '/logout', '/' + 'x'*9000, '//', '/voila/query/a-b-c-d-e'):
        for method in ('GET', 'POST', 'DELETE', 'NONSENSE'):
            status, body, _ = server.ask(path, method)
            assert 400 <= status < 500 and len(body) < 200, (method, path, status, body[:300])
    for raw in (b'garbage\r\n\r\n', b'GET / HTTP/1.1\r\nHost: [::\r\n\r\n', b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 5\r\n\r\nabcde', b'\x16\x03\x01\x02\x00'):
        with socket.create_connection(('127.0.0.1', server.port)) as c: c.sendall(raw)

def test_wrong_messages_are_dropped(server, page):
    "Not JSON, no message, no channel; a head that announces 2^64 parts, for which a list would fill the memory."
    import websocket
    head = lambda kind: dict(msg_id='a', msg_type=kind, username='', session='x', version='5.3', date='')
    messages = ['x', '{}', '[]', 'null', '{"channel":"shell"}', json.dumps(dict(header=head('comm_msg'), channel='nowhere')), b'', b'abc', b'\xff'*64, b'\x7f\xff\xff\xff',
                json.dumps(dict(header=head('comm_msg'), parent_header={}, metadata={}, content={}, channel='shell')), json.dumps(dict(header=head('comm_open'), parent_header={}, metadata={}, content=dict(comm_id='x', target_name='jupyter.widget', data=3), channel='shell'))]
    for message in messages:
        for protocol in (None, ['v1.kernel.websocket.jupyter.org']):
            ws = websocket.create_connection(f'ws://127.0.0.1:{server.port}/api/kernels/{kernel_of(page)}/channels', timeout=20, subprotocols=protocol)
            ws.send(message) if isinstance(message, str) else ws.send_binary(message)
            ws.close()
    assert psutil.Process(server.process.pid).memory_info().rss < 2e9
    start(page); finish(page)                                          # and the page goes on

# ---- places

def eventually(test, seconds=20):
    end = time.time() + seconds
    while not test():
        assert time.time() < end, 'it did not come about'
        time.sleep(.1)

def test_a_visitor_is_a_copy(server, page):
    "Visitors share libraries and weights: what one adds is a fraction of what a process needs by itself (some 700 MB)."
    start(page); finish(page)
    if sys.platform != 'linux' or torch.cuda.is_available(): pytest.skip('visitors are not forked here')
    kernel, = server.kernels()
    assert kernel.memory_full_info().uss < 250e6

def test_reloading_frees_the_place(server, page, browser):
    visitor = opened(browser, server.url)
    visitor.get_by_text('Ready').wait_for(timeout=ready)
    for _ in range(4):                                                 # three places, one is taken by the other page
        before = set(server.kernels())
        visitor.reload(timeout=ready)
        visitor.get_by_text('Ready').wait_for(timeout=ready)
        eventually(lambda: len(server.kernels()) == 2)
        assert len(set(server.kernels()) - before) == 1                # the other visitor keeps theirs
    start(visitor, Steps='1000')                                       # a run that would take minutes
    running = set(server.kernels())
    visitor.reload(timeout=ready)
    eventually(lambda: len(running & set(server.kernels())) == 1)      # it does not compute on
    visitor.context.close()
    eventually(lambda: len(server.kernels()) == 1)

def test_leaving_while_it_loads_frees_the_place(server, page):
    c = http.client.HTTPConnection('127.0.0.1', server.port, timeout=90)
    c.request('GET', '/')
    eventually(lambda: len(server.kernels()) == 2)
    c.close()
    eventually(lambda: len(server.kernels()) == 1)

def test_a_page_that_falls_silent_frees_the_place(server, page):
    "A browser that is ended while it loads the page says no goodbye."
    status, body, _ = server.ask('/')
    assert status == 200 and len(server.kernels()) == 2
    kernel = body.decode().split('"kernelId": "')[1].split('"')[0]
    for _ in range(5):
        time.sleep(3)
        assert server.ask(f'/api/kernels/{kernel}')[0] == 200          # what its script asks keeps the place
    eventually(lambda: len(server.kernels()) == 1)

def test_a_process_that_ended_is_told(server, page, browser):
    before = set(server.kernels())
    visitor = opened(browser, server.url)
    visitor.get_by_text('Ready').wait_for(timeout=ready)
    own, = set(server.kernels()) - before
    own.kill()
    visitor.get_by_role('alert').filter(has_text='This page has ended on the server').wait_for()
    press(visitor, 'Start again')
    visitor.get_by_text('Ready').wait_for(timeout=ready)
    visitor.context.close()
    eventually(lambda: len(server.kernels()) == 1)

def test_who_finds_no_place_waits(server, page, browser):
    guests = [opened(browser, server.url) for _ in range(2)]
    late = browser.new_context().new_page()
    answer = late.goto(server.url, timeout=ready)
    assert answer.status == 503 and answer.headers['retry-after'] == '3' and "default-src 'self'" in answer.headers['content-security-policy']
    assert late.get_by_role('status').inner_text() == 'All 3 places are taken. This page waits for a place and opens by itself.'
    guests[0].context.close()
    late.get_by_text('Ready').wait_for(timeout=ready)
    for o in (guests[1], late): o.context.close()
    eventually(lambda: len(server.kernels()) == 1)

def test_without_anything_to_fork_from(tmp_path):
    "The process that visitors are copied from was killed: theirs are started in the ordinary way."
    import asyncio
    from concurrent.futures import ThreadPoolExecutor
    from jupyter_client.manager import AsyncKernelManager
    from mdm.widgets.forks import fork_provisioner
    class Ended:
        def start(self, *args): raise BrokenPipeError
    async def start_one():
        km = AsyncKernelManager(kernel_name='python3', connection_file=str(tmp_path/'kernel.json'))
        km.provisioner = fork_provisioner(Ended())(kernel_id='1', kernel_spec=km.kernel_spec, parent=km)
        await km.start_kernel()
        assert await km.is_alive() and isinstance(km.provisioner.process, subprocess.Popen)
        await km.shutdown_kernel(now=True)
    ThreadPoolExecutor().submit(asyncio.run, start_one()).result()     # Playwright's loop runs in this thread

def test_first_screen_without_a_checkpoint(folder, browser):
    s = Server(folder)
    try:
        page = opened(browser, s.url)
        page.get_by_role('button', name='Try a bundled model').wait_for(timeout=ready)
        assert 'mdm_train' in page.locator('.mdm-sampler').inner_text()
        press(page, 'Try a bundled model'); page.get_by_text('Ready').wait_for(timeout=ready)
        start(page); finish(page)
        page.context.close()
    finally: assert s.stop(signal.SIGINT) in (0, 130)

def test_what_the_command_says(capsys, monkeypatch, tmp_path):
    assert mdm_app(['no/such/run']) == 2 and 'no/such/run' in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0)); taken.listen()
        assert mdm_app(['--port', str(taken.getsockname()[1])]) == 2 and '--port' in capsys.readouterr().err
    for flag, v in (('--port', '99999'), ('--port', '-1'), ('--visitors', '0')): assert mdm_app([flag, v]) == 2 and f'{flag}: ' in capsys.readouterr().err
    (tmp_path/'notes.txt').write_text('a cat')
    assert mdm_app([str(tmp_path/'notes.txt')]) == 2 and 'notes.txt is no model' in capsys.readouterr().err
    for flag in ('--recipe', '--device'): assert mdm_app(['--port', '0', flag, 'nonsense']) == 2 and 'nonsense' in capsys.readouterr().err
    (tmp_path/'weights.pth').write_bytes(b'PK')
    assert mdm_app(['--port', '0', str(tmp_path/'weights.pth')]) == 2 and 'Name its recipe' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'voila.app', None)
    assert mdm_app(['--port', '0']) == 2 and "pip install 'matryoshka-diffusion[app]'" in capsys.readouterr().err

def test_names_of_checkpoints(tmp_path, monkeypatch):
    from mdm.checkpoint import find_checkpoint
    here = find_checkpoint('shapes')
    for o in ('a/run', 'b/run'): shutil.copytree(here, tmp_path/o)
    names = named_checkpoints([str(tmp_path/'a'/'run'), str(tmp_path/'b'/'run'), 'shapes'])
    assert names.pop('shapes') == 'shapes' and len(names) == 2
    assert list(named_checkpoints([str(tmp_path/'a'/'run')])) == ['run']               # a page need not tell where things lie
    monkeypatch.chdir(tmp_path); Path('shapes').mkdir()
    assert named_checkpoints(['shapes']) == {'shapes': 'shapes'}                       # a folder of shards, say
    notebook = json.loads(write_page(tmp_path/'page', {evil + "'\"\\": 'x'}).read_text())
    compile(notebook['cells'][1]['source'], 'cell', 'exec')

def test_adapters_on_the_command_line(tmp_path, pipe, capsys):
    write_adapter(tmp_path/'all'/'night', pipe.model, ['conv1']); write_adapter(tmp_path/'all'/'fog', pipe.model, ['conv1'])
    found = offered_adapters([f'{tmp_path}/all/night:0.5', str(tmp_path/'all'/'fog')])
    assert found == dict(night=(str(tmp_path/'all'/'night'), .5), fog=(str(tmp_path/'all'/'fog'), 1.)) and list(offered_adapters([f'{tmp_path}/all:0'])) == ['fog', 'night']
    notebook = json.loads(write_page(tmp_path/'page', dict(shapes='shapes'), adapters=found).read_text())
    made = {}; exec(notebook['cells'][1]['source'].replace('\nSamplerWidget', '\nw = SamplerWidget'), made)      # what runs for a visitor
    w = made['w']; w.wait(60); assert w.side_a.adapters.values == {'adapter night': .5, 'adapter fog': 1.} and str(tmp_path) not in w.side_a.adapters.sliders['fog'].tooltip
    w.n.value = 1; w.run(); w.wait(60); assert 'another model' in w.error.value and str(tmp_path) not in w.error.value
    _try_adapter(str(tmp_path/'all'/'fog'), [pipe]); assert 'none of the models' not in capsys.readouterr().err
    _try_adapter(str(tmp_path/'all'/'fog'), [w.side_a.pipe]); assert f'{tmp_path}/all/fog can be used with none of the models' in capsys.readouterr().err
    for path, words in ((tmp_path/'none', 'no folder'), ('shapes', 'whole model')):
        assert mdm_app(['shapes', '--port', '0', '--adapter', str(path)]) == 2 and words in capsys.readouterr().err

# ---- the browser of these tests

class Machine:
    "A machine without a browser; `installer` names the program that can install one, and `asked` keeps the commands."
    def __init__(self, folder): self.folder, self.installer, self.asked = folder, None, []

    def attempt(self, *command):
        self.asked.append(' '.join(command[-3:]))
        works = self.installer in command
        if works and 'chromium' in command:
            (self.folder/'chromium').write_text('#!/bin/sh\n')
            (self.folder/'chromium').chmod(0o755)
        return works

@pytest.fixture
def machine(tmp_path, monkeypatch):
    m = Machine(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setattr(browser_setup, 'playwrights_own', lambda: None)
    monkeypatch.setattr(browser_setup, 'attempt', m.attempt)
    monkeypatch.setattr(browser_setup, 'as_root', lambda: [])
    (tmp_path/'apt-get').write_text('')
    (tmp_path/'apt-get').chmod(0o755)
    return m

def test_playwright_installs_the_browser_once(machine, capsys):
    machine.installer = 'playwright'
    assert browser_setup.find_browser() is None and browser_setup.main() == 0
    assert machine.asked == ['playwright install chromium'] and not capsys.readouterr().err
    assert browser_setup.main() == 0 and len(machine.asked) == 1                       # found now

def test_the_systems_package_comes_second(machine):
    machine.installer = 'apt-get'
    assert browser_setup.main() == 0
    assert machine.asked == ['playwright install chromium', 'apt-get update -qq', '-y -qq chromium']

def test_the_last_line_says_what_to_install(machine, monkeypatch, capsys):
    assert browser_setup.main() == 1 and machine.asked == ['playwright install chromium', 'apt-get update -qq']
    assert capsys.readouterr().err.splitlines()[-1] == advice and 'apt-get install chromium' in advice
    monkeypatch.setattr(browser_setup, 'as_root', lambda: None)                         # a user who may not install packages
    assert browser_setup.main() == 1 and machine.asked[2:] == ['playwright install chromium']

def test_a_browser_that_does_not_start_is_none(machine):
    (machine.folder/'chromium').write_text('#!/bin/sh\nexit 127\n')                    # a library is missing
    (machine.folder/'chromium').chmod(0o755)
    assert browser_setup.find_browser() is None

def test_make_test_and_ci_provide_the_browser():
    root = Path(__file__).parents[1]
    assert '\ntest: browser\n' in (root/'Makefile').read_text() and 'make test' in (root/'.ci'/'run').read_text()
