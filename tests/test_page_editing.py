"mdm_app in a real browser: a picture to begin with, the brush, and settings that come back from a file."
import base64, io
import numpy as np, pytest
from PIL import Image
from mdm.utils.pictures import png_bytes
from mdm.widgets.state import SamplerSettings
from test_app import browser, finish, folder, press
from test_page_look import page, server

@pytest.fixture(autouse=True)
def tall(page):
    page.set_viewport_size(dict(width=1400, height=1500))
    page.set_default_timeout(60_000)

def choose(page, k, name, data): page.locator('.mdm-drop input').nth(k).set_input_files(dict(name=name, mimeType='image/png', buffer=data))

def test_a_part_of_an_uploaded_picture_is_drawn_anew(page):
    "Only what the brush painted changes."
    page.get_by_text('Begin with a picture', exact=True).first.click()
    press(page, 'Fill in')
    photo = np.zeros((300, 400, 3), 'uint8') + np.array([40, 75, 225], 'uint8')
    choose(page, 0, 'blue.png', png_bytes(Image.fromarray(photo)))
    canvas = page.locator('.mdm-canvas')
    page.wait_for_function("document.querySelector('.mdm-canvas').width > 1")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    at = lambda x, y: (box['x'] + x*box['width'], box['y'] + y*box['height'])
    page.mouse.move(*at(.2, .25)); page.mouse.down(); page.mouse.move(*at(.8, .25), steps=6); page.mouse.up()
    page.get_by_text('of the picture will be drawn anew').wait_for()
    page.get_by_label('Prompt', exact=True).fill('a large red bar at the top on a blue background')
    page.get_by_label('Steps', exact=True).first.fill('6'); page.get_by_label('Pictures', exact=True).fill('1'); page.get_by_label('Pictures', exact=True).press('Tab')
    press(page, 'Run'); finish(page)
    page.wait_for_function("document.querySelector('[role=status]').innerText.includes('Done')")
    data = base64.b64decode(page.locator('.mdm-levels img').first.get_attribute('src').split(',')[1])
    changed = np.abs(np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(int) - photo[0, 0]).max(-1) > 3
    assert changed[3:13, 4:28].any() and not changed[16:].any()
    assert page.locator('.mdm-error').all_inner_texts() == []

def test_the_brush_by_keyboard(page):
    share = lambda: int(page.locator('.mdm-note', has_text='drawn anew').inner_text().split('%')[0])
    nothing = page.get_by_text('0% of the picture will be drawn anew.', exact=True)
    press(page, 'Clear'); nothing.wait_for()
    page.locator('.mdm-canvas').focus()
    for key in ('ArrowLeft', 'ArrowUp', ' '): page.keyboard.press(key)
    nothing.wait_for(state='hidden')
    painted = share(); assert 1 < painted < 20
    press(page, 'Invert'); page.get_by_text(f'{100 - painted}% of the picture will').wait_for()
    assert page.get_by_role('button', name='Erase').get_attribute('aria-pressed') == 'false'

def test_large_pictures_are_reduced_and_others_refused(page):
    "A message of the page has at most a megabyte; the browser reduces what is larger."
    noise = png_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), dtype='uint8')))
    assert len(noise) > 2**21
    press(page, 'Change')
    choose(page, 0, 'noise.png', noise)
    page.get_by_text('was resized to 32 × 32').wait_for()
    choose(page, 0, 'x.png', b'nonsense')
    page.get_by_role('alert').get_by_text('x.png: this browser cannot open it').wait_for()
    press(page, 'Draw')

def test_a_dropped_picture_restores_its_settings(page):
    page.get_by_text('Restore settings from a picture', exact=True).first.click()
    ask = SamplerSettings('a small <b>green</b> pillar', seed=41, n=2, sides=[dict(checkpoint='shapes', recipe='', steps=7)])
    data = base64.b64encode(png_bytes(Image.new('RGB', (32, 32)), **ask.png_info())).decode()
    drop = """([data, name]) => { const bytes = Uint8Array.from(atob(data), o => o.charCodeAt(0)), transfer = new DataTransfer();
        transfer.items.add(new File([bytes], name)); document.querySelectorAll('.mdm-drop')[1].dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true})); }"""
    page.evaluate(drop, [data, 'mdm_seed41.png'])
    page.wait_for_function('o => document.querySelector(".mdm-composer textarea").value == o', arg=ask.prompt)
    assert [page.get_by_label(o, exact=True).first.input_value() for o in ('Seed', 'Pictures', 'Steps')] == ['41', '2', '7']
    page.evaluate(drop, [base64.b64encode(png_bytes(Image.new('RGB', (8, 8)))).decode(), 'cat.png'])
    page.get_by_role('alert').get_by_text('cat.png: This is no PNG file that the widget').wait_for()
    assert not [e for e in page.errors if 'favicon' not in e and 'FAST design token' not in e]
