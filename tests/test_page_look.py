"mdm_app in a real browser: how the page looks and behaves. The server and the browser are those of test_app."
import contextlib
import psutil, pytest
from test_app import Server, browser, finish, folder, press, ready_page, start, status

@pytest.fixture(scope='module')
def server(folder):
    s = Server(folder, 'shapes', '--visitors', '1')
    yield s
    assert s.stop() == 0

@pytest.fixture(scope='module')
def page(server, browser):
    with ready_page(browser, server, 1400, 900) as page: yield page

def place(page, name):
    "x, y, width and height, measured at once: a picture is replaced several times a second."
    return tuple(page.evaluate("name => (r => [r.x, r.y, r.width, r.height].map(Math.round))(document.querySelector(name).getBoundingClientRect())", name))

def brightness(page, name, what='backgroundColor'): return page.locator(name).first.evaluate(f"o => getComputedStyle(o).{what}.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)/3")

def test_the_prompt_is_first_and_largest(page):
    prompt = page.get_by_label('Prompt', exact=True)
    size = lambda o: float(o.evaluate("o => getComputedStyle(o).fontSize").removesuffix('px'))
    assert prompt.bounding_box()['y'] < page.locator('.mdm-fields').bounding_box()['y'] and size(prompt) >= 20 > size(page.get_by_label('Pictures', exact=True))
    filled = page.evaluate("[...document.querySelectorAll('.mdm-sampler button')].filter(o => o.offsetParent && o.matches('.mod-primary')).map(o => o.innerText)")
    assert filled == ['Run']                                                      # one primary button
    assert page.get_by_label('Negative prompt').is_hidden() and page.get_by_label('Steps', exact=True).first.is_visible()

def test_columns_are_aligned(page):
    asked, fields, results, history = (place(page, o) for o in ('.mdm-ask', '.mdm-fields', '.mdm-results', '.mdm-history'))
    assert fields[0] == asked[0] and fields[1] == results[1] == history[1] and fields[0] < results[0] < history[0]
    assert history[0] + history[2] == asked[0] + asked[2] and page.evaluate('document.documentElement.scrollWidth') <= 1400

def test_the_first_screen_shows_pictures(page):
    assert page.locator('.mdm-first img').count() == 8
    for text in ('a small red circle in the centre on a white background',)*2:    # the same one twice
        page.get_by_label('Prompt', exact=True).fill('x')
        page.locator('.mdm-first').get_by_role('button', name=text, exact=True).click()
        page.wait_for_function('o => document.querySelector(".mdm-composer textarea").value == o', arg=text)
    assert page.get_by_label('Seed', exact=True).input_value() == '1' and page.get_by_label('Keep the seed').is_checked()

def test_ctrl_enter_runs_and_nothing_moves(page):
    steps = page.get_by_label('Steps', exact=True).first
    steps.fill('40')                                                              # not handed over yet: the field still has the focus
    steps.press('Control+Enter')
    page.wait_for_function("document.querySelector('[role=status]').innerText.startsWith('Step')", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('.mdm-levels img').length == 8", timeout=60_000)
    names = '.mdm-composer', '.mdm-messages', '.mdm-results', '.mdm-levels', '.mdm-levels .mdm-frame', '.mdm-strip', '.mdm-save', '.mdm-history'
    before = {o: place(page, o) for o in names}
    finish(page)
    assert 'step 40 of 40' in status(page)
    page.locator('.mdm-history img').wait_for()
    after = {o: place(page, o) for o in names}
    assert {o: p[:3] for o, p in before.items()} == {o: p[:3] for o, p in after.items()} and before['.mdm-levels'] == after['.mdm-levels']

def test_pixels_are_enlarged_by_whole_numbers(page):
    shown = page.evaluate("[...document.querySelectorAll('.mdm-sampler img')].filter(o => o.offsetParent).map(o => [o.naturalWidth, o.getBoundingClientRect().width, getComputedStyle(o).imageRendering])")
    assert len(shown) > 12 and all(w % n == 0 and r == 'pixelated' for n, w, r in shown), shown
    assert max(w for n, w, r in shown) >= 256

def test_settings_are_within_reach_on_a_telephone(page):
    page.set_viewport_size(dict(width=390, height=844))
    page.locator('.mdm-fields').wait_for(state='hidden')
    press(page, 'Settings')
    page.get_by_label('Steps', exact=True).first.wait_for()
    assert place(page, '.mdm-fields')[1] < 400 and place(page, '.mdm-fields')[1] < place(page, '.mdm-results')[1]
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    press(page, 'Settings')
    page.locator('.mdm-fields').wait_for(state='hidden')
    assert place(page, '.mdm-levels')[1] < 500                                   # the pictures begin on the first screen
    page.set_viewport_size(dict(width=1400, height=900))

def test_a_picture_opens_large(page):
    page.locator('.mdm-open').first.click()
    large = page.locator('.mdm-large:popover-open')
    assert large.locator('img').bounding_box()['width'] >= 512 and large.locator('img').bounding_box()['width'] % 32 == 0
    assert 'Seed 1' in large.inner_text() and 'steps\n40' in large.inner_text() and 'a small red circle' in large.inner_text()
    page.keyboard.press('ArrowRight')
    page.get_by_role('heading', name='Seed 2', exact=True).wait_for()
    page.keyboard.press('ArrowLeft'); page.keyboard.press('ArrowLeft')
    page.get_by_role('heading', name='Seed 4', exact=True).wait_for()
    large.get_by_role('button', name='Next picture').click()                    # a telephone has no arrow keys
    page.get_by_role('heading', name='Seed 1', exact=True).wait_for()
    page.keyboard.press('Enter'); page.get_by_role('heading', name='Seed 2', exact=True).wait_for()      # the focus stays on the button
    large.get_by_role('button', name='Previous picture').click(); page.get_by_role('heading', name='Seed 1', exact=True).wait_for()
    page.keyboard.press('Escape')
    page.wait_for_function("!document.querySelector('.mdm-large:popover-open')")
    page.locator('.mdm-open').nth(1).click()
    page.locator('.mdm-large:popover-open').get_by_role('button', name='Begin with it').click()
    page.get_by_text('The next run begins with the picture of seed 2').wait_for()
    page.locator('.mdm-edit img').first.wait_for()
    page.locator('.mdm-fields').get_by_role('button', name='Draw', exact=True).click()

def test_dark_where_the_system_is(page):
    light = {o: brightness(page, o) for o in ('body', '.mdm-composer', '.mdm-fields input')}
    page.emulate_media(color_scheme='dark')
    dark = {o: brightness(page, o) for o in light}
    assert all(light[o] > 230 and dark[o] < 60 for o in light), (light, dark)
    assert brightness(page, '.mdm-sampler', 'color') > 200 and brightness(page, '.mdm-composer textarea', 'color') > 200
    page.emulate_media(color_scheme='light')
    page.evaluate("document.querySelector('.mdm-sampler').style.colorScheme = ''; document.body.dataset.jpThemeLight = 'false'")        # a dark JupyterLab
    assert brightness(page, '.mdm-composer') < 60
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")

def test_the_end_of_the_process_is_told(server, page):
    "The last test: it ends the process behind the page."
    assert page.locator('.mdm-ended').is_hidden()
    for o in reversed(psutil.Process(server.process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess): o.kill()         # the server ends some of them itself
    told = page.locator('.mdm-ended, #mdm-ended').locator('visible=true').first
    told.wait_for(timeout=60_000)
    assert 'ended' in told.inner_text() and page.get_by_role('status').is_hidden()
    assert page.evaluate("[...document.querySelectorAll('.jupyter-widgets-disconnected')].filter(o => getComputedStyle(o, '::before').display != 'none').length") == 0   # no broken chains
    assert page.locator('.mdm-levels img').first.is_visible()                     # what was drawn stays
