"What the sampler widget does behind its fields: stopped runs, comparisons, modes, settings as files and text, pictures from outside."
import io, json, random, shlex, sys, threading, zipfile, zlib
from dataclasses import replace
import numpy as np, pytest, torch
from PIL import Image, ImageDraw
from mdm.cli.sample import mdm_sample
from mdm.data.shapes import random_shape
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.recipe import load_recipe
from mdm.text import split_words
from mdm.utils import pictures
from mdm.utils.pictures import caption_font, contact_sheet, mp4_bytes, png_bytes
from mdm.widgets import editing, fields
from mdm.widgets.drawing import film, film_pictures, labelled_sheet
from mdm.widgets.editing import EditPanel, SettingsDrop, decode_picture
from mdm.widgets.exchange import as_command, as_python, how_again, read_settings, result_files, results_zip
from mdm.widgets.fields import FileDrop, checked_int
from data_tools import film_seconds, path_seconds
from pytest import approx
from tiny_models import pipe
from mdm.widgets.state import (PipelineShelf, SamplerRun, SamplerSettings, Side, grid_sides, known_words, most_text, packed, path_moments,
    shapes_words, unpacked, walk_together, word_hint)

@pytest.fixture(scope='module')
def shapes(): torch.set_num_threads(1); return MDMPipeline.from_pretrained('shapes', device='cpu')

@pytest.fixture(scope='module')
def red(): return Image.new('RGB', (32, 32), (200, 40, 40))

@pytest.fixture(scope='module')
def half():
    mask = Image.new('L', (32, 32)); mask.paste(255, (0, 0, 16, 32))
    return mask

def settings(*sides, prompt='a red ring', **kwargs):
    return SamplerSettings(prompt, sides=[dict(checkpoint='shapes', recipe='', **o) for o in sides or ({},)], **{'n': 1, 'seed': 3, **kwargs})

def drawn(pipe, ask, stop_at=None):
    "A run; stopped when its first side has taken so many steps."
    sides, stop = [Side(pipe, ask, i) for i in range(len(ask.sides))], threading.Event()
    for _ in walk_together(sides, stop):
        if sides[0].taken == stop_at: stop.set()
    return SamplerRun(ask, sides, 1)

def same(a, b): return np.array_equal(np.asarray(a), np.asarray(b))

# stopped runs

@pytest.mark.parametrize('steps, stop_at', [(100, 18), (900, 7), (6, 5), (6, 1)])
def test_a_stopped_run_keeps_and_marks_its_last_step(pipe, steps, stop_at):
    side = drawn(pipe, settings(dict(steps=steps)), stop_at).sides[0]
    last = side.frames[-1]
    assert (last.index, last.stopped, last.label()) == (stop_at, True, f'step {stop_at}, stopped')
    assert sum(f.stopped for f in side.frames) == 1
    for n in (1, 2, 8): assert side.strip_frames(n)[-1 if n > 1 else 0] == (len(side.frames) - 1 if n > 1 else 0) and len(side.strip_frames(n)) <= n

def test_a_complete_run_has_no_mark(pipe):
    side = drawn(pipe, settings()).sides[0]
    assert not any(f.stopped for f in side.frames) and side.frames[-1].index == 6 and 'stopped' not in side.png_info()

def test_the_file_of_a_stopped_run_says_so(pipe):
    run = drawn(pipe, settings(dict(steps=100)), 18)
    for file in result_files(run):                                   # the sheet too
        text = Image.open(io.BytesIO(file.data)).text
        assert text['steps'] == '100' and text['stopped'].startswith('after 18 of 100 steps')
    assert 'stopped after 18 of 100 steps' in read_settings(file.data)[1]

def test_a_strip_of_a_running_path_leaves_places_free(pipe):
    side = Side(pipe, settings(dict(steps=64)))
    walk = side.walk()                                                # kept, since a walk that is thrown away ends its side
    while next(walk).index < 20: pass
    assert side.last and side.strip_frames(8) == [0, 5, 9]            # of 33 that will be kept

# comparisons

def test_sides_are_compared_by_noise_level(pipe):
    run = drawn(pipe, settings(dict(steps=14), dict(steps=4)))
    a, b = run.sides
    for i, j in path_moments(run.sides)[:-1]:
        level, other = a.level(a.frames[i].t), b.level(b.frames[j].t)
        assert other < float('inf') and abs(level - other) <= min(abs(level - b.level(f.t)) for f in b.frames[:-1]) + 1e-6
    assert path_moments(run.sides)[-1] == [len(a.frames) - 1, len(b.frames) - 1]
    assert len(film_pictures(run.sides)) == len(path_moments(run.sides)) >= 14
    assert film_seconds(film(run.sides, inner=False)) == approx(path_seconds(len(path_moments(run.sides))))

def test_while_they_are_drawn_the_noisier_side_goes_next(pipe):
    sides = [Side(pipe, settings(dict(steps=25), dict(steps=6)), i) for i in range(2)]
    level = lambda s: s.level(s.last.t) if s.last else -float('inf')
    before = [level(s) for s in sides]
    for step in walk_together(sides, threading.Event()):
        moved = next(i for i, s in enumerate(sides) if s.last is step or s.done and step.total == s.total and step.index == s.total)
        assert before[moved] <= min(o for o, s in zip(before, sides)) + 1e-9
        before[moved] = sides[moved].level(step.t)

def test_a_grid_over_one_setting(pipe):
    ask = settings(n=2); ask = replace(ask, vary='guidance', sides=grid_sides({**ask.sides[0], 'guidance': 3.}, 'guidance', [1., 3., 6.]))
    run = drawn(pipe, ask)
    for side, g in zip(run.sides, (1., 3., 6.)):
        assert side.differences() == f'guidance {g}' and same(side.pictures()[0][1], pipe('a red ring', n=2, seed=3, guidance=g)[1])
    names = [o.name for o in result_files(run)]
    assert names == ['mdm_seed3_sheet.png', *(f'mdm_seed{s}{k}.png' for k in ('', '_b', '_c') for s in (3, 4))]
    assert labelled_sheet(run.sides).width == 2*136 and labelled_sheet(run.sides).height > 3*128

def test_several_prompts(pipe):
    ask = settings(prompt='a red ring\n\na blue bar', several=True, n=2)
    side = drawn(pipe, ask).sides[0]
    for mine, theirs in zip(side.pictures()[0], pipe(['a red ring', 'a blue bar'], n=2, seed=3), strict=True): assert same(mine, theirs)
    assert [side.png_info(k)['prompt'] for k in range(4)] == ['a red ring']*2 + ['a blue bar']*2
    assert labelled_sheet([side]).size[0] == 2*136

# captions and numbers

def test_captions_have_letters_beyond_ascii():
    pixels = lambda text: np.asarray(contact_sheet([Image.new('RGB', (32, 32), 'red')], [text]))
    box = bytes(caption_font().getmask('\uffff'))
    for letter in 'äßéñłøЖюαΩħŝ€“–→½عש': assert bytes(caption_font().getmask(letter)) != box, letter
    assert not np.array_equal(pixels('größer'), pixels('grö\uffffer'))

def test_long_captions_are_wrapped():
    short, long = (contact_sheet([Image.new('RGB', (32, 32))], [t]) for t in ('a cat', 'a cat on a red sofa in the sun '*4))
    assert long.width == short.width and long.height > short.height + 40
    right = np.asarray(long)[140:, -4:]
    assert (right == 255).all()                                       # no letter reaches the edge

@pytest.mark.parametrize('typed, used', [(99, 16), (0, 1), (-5, 1), (10**30, 16), (7, 7)])
def test_corrected_numbers_are_told(typed, used):
    said = []
    field = checked_int(4, 1, 16, 'Pictures', said.append)
    field.value = typed
    assert field.value == used and len(said) == 1 and (f'{typed:,}' in said[0]) == (typed != used)
    field.value = 5; assert said[-1] == ''

# modes

@pytest.mark.parametrize('mode, kwargs', [('change', {}), ('change', dict(strength=.4)), ('fill in', {}), ('fill in', dict(strength=.7, repeats=2)), ('enlarge', {})])
def test_modes_draw_what_the_pipeline_draws(pipe, red, half, mode, kwargs):
    begin = red.resize((16, 16)) if mode == 'enlarge' else red
    ask = settings(n=2, mode=mode, picture=packed(begin), mask=packed(half) if mode == 'fill in' else '', **kwargs)
    ask.check()
    side = drawn(pipe, ask).sides[0]
    call = dict(change=lambda **k: pipe.img2img(red, 'a red ring', **k), enlarge=lambda **k: pipe.upscale(begin, 'a red ring', **k), **{'fill in': lambda **k: pipe.inpaint(red, half, 'a red ring', **k)})[mode]
    for mine, theirs in zip(side.pictures()[0], call(n=2, seed=3, **kwargs), strict=True): assert same(mine, theirs)
    assert side.total == side.frames[-1].index and side.done

@pytest.mark.parametrize('kwargs, words', [(dict(mode='change'), 'no picture yet'), (dict(mode='paint'), 'no mode called'), (dict(n=9, prompt='a\nb', several=True), '18 pictures'),
    (dict(mode='change', strength=0.), 'strength'), (dict(mode='fill in'), 'no mask yet'), (dict(mode='fill in', mask='!!'), 'damaged'), (dict(repeats=99), 'repeats')])
def test_impossible_requests_are_refused(red, kwargs, words):
    kwargs = {'picture': packed(red) if kwargs.get('mode') in ('fill in', 'change') and 'no picture' not in words else '', **kwargs}
    with pytest.raises(ValueError, match=words): settings(**kwargs).check()

def test_a_picture_of_another_size_is_refused(pipe, red):
    with pytest.raises(ValueError, match='16 x 16'): Side(pipe, settings(mode='change', picture=packed(red.resize((16, 16)))))

# settings as text

@pytest.mark.parametrize('kwargs, side', [
    (dict(n=2, prompt="it's a \"red\" $HOME ring", negative_prompt='-fog'), dict(steps=3, guidance=2., solver='ddim', eta=.5)),
    (dict(n=1, prompt='a red ring\n-a blue bar', several=True, style='pixel art', avoid='blur and noise'), dict(steps=3, guidance_interval=(.1, .9))),
    (dict(mode='change', strength=.5), dict(steps=4)),
    (dict(mode='fill in', repeats=2), dict(steps=3)),
    (dict(mode='enlarge'), dict(steps=3, spacing='trailing'))])
def test_command_and_python_draw_the_same_pictures(shapes, red, half, tmp_path, monkeypatch, kwargs, side):
    begin = dict(picture=packed(red.resize((16, 16)) if kwargs['mode'] == 'enlarge' else red)) if 'mode' in kwargs else {}
    run = drawn(shapes, settings(side, mask=packed(half) if kwargs.get('mode') == 'fill in' else '', **begin, **kwargs))
    monkeypatch.chdir(tmp_path)
    zipfile.ZipFile(io.BytesIO(results_zip(run))).extractall()
    command, code = (tmp_path/'command.txt').read_text(), (tmp_path/'draw_again.py').read_text()
    assert [command, code] == [as_command(run.sides[0]) + '\n', as_python(run.sides[0])]
    program, *argv = shlex.split(command)
    assert program == 'mdm_sample' and mdm_sample(['--output', 'again', *argv]) == 0
    names = {}
    exec(code, names)
    by_command = sorted((tmp_path/'again'/'0001').glob('*.png'))
    for mine, theirs, path in zip(run.sides[0].pictures()[0], names['pictures'], by_command, strict=True): assert same(mine, theirs) and same(mine, Image.open(path))
    back, note = read_settings(by_command[0].read_bytes())            # and the files of the command are read, too
    assert back.prompt == run.sides[0].png_info()['prompt'] and back.seed == 3 and back.sides[0]['steps'] == side['steps']
    assert ('picture that sampling began with' in note) == ('mode' in kwargs)

def test_no_command_for_a_model_in_memory(pipe):
    ask = settings(); ask = replace(ask, sides=[dict(checkpoint='shapes (in memory)')])
    side = drawn(pipe, ask).sides[0]
    with pytest.raises(ValueError, match='in memory'): as_command(side)
    names = dict(pipe=pipe)
    exec(as_python(side), names)
    assert same(names['pictures'][0], side.pictures()[0][0]) and how_again([side])[0].startswith('# The model is in memory')

# settings from files

def test_settings_come_back_from_every_file(pipe, red, half):
    for ask in (settings(dict(steps=4), dict(steps=3)), settings(dict(steps=2), n=2, prompt='ä\nб', several=True, style='watercolour'), settings(dict(steps=2), mode='fill in', picture=packed(red), mask=packed(half), strength=.9)):
        for file in result_files(drawn(pipe, ask)): assert read_settings(file.data) == (ask, '')

def test_a_large_picture_is_not_in_the_file(pipe):
    noise = packed(Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype='uint8')))
    assert len(noise) > most_text
    data = png_bytes(Image.new('RGB', (8, 8)), **settings(dict(steps=2), mode='change', picture=noise).png_info())
    back, note = read_settings(data)
    assert len(data) < 20_000 and back.mode == 'change' and back.picture == '' and 'choose it again' in note

def test_checkpoints_from_elsewhere_are_not_loaded():
    data = png_bytes(Image.new('RGB', (8, 8)), **{**settings(dict(steps=2)).png_info(), 'settings': json.dumps(dict(prompt='a', sides=[dict(checkpoint='//evil/share', recipe='/etc/passwd', steps=2)]))})
    back, note = read_settings(data, ['shapes'])
    assert back.sides == [dict(steps=2)] and '//evil/share' in note
    data = png_bytes(Image.new('RGB', (8, 8)), **{**settings().png_info(), 'settings': json.dumps(dict(prompt='a', sides=[dict(checkpoint='shapes', recipe='/etc/passwd')]))})
    assert read_settings(data, ['shapes'])[0].sides == [{}]

hostile = ['', 'null', '[]', '{', '{"sides": {}}', '{"sides": []}', '{"sides": [3]}', '{"sides": [{}], "n": 1000000}', '{"sides": [{}], "n": NaN}', '{"sides": [{}], "seed": -1}', '{"sides": [{}], "seed": ' + '9'*5000 + '}',
    '['*100_000, '{"a":'*50_000, '{"sides": [{"steps": 1e99}]}', '{"sides": [{"steps": "x"}]}', '{"sides": [{"__class__": 1}]}', '{"sides": [{"guidance_interval": [1, 0]}]}', '{"sides": ' + json.dumps([{}]*50) + '}',
    json.dumps(dict(prompt='x'*5000, sides=[{}])), '{"sides": [{}], "mode": "change", "picture": "????"}', '{"sides": [{}], "style": "x"}', '{"sides": [{}], "mode": "fill in"}', '{"sides": [{}], "picture": 5}',
    '{"sides": [{}], "vary": "evil"}']

@pytest.mark.parametrize('text', hostile, ids=range(len(hostile)))
def test_hostile_settings_are_refused(text):
    data = png_bytes(Image.new('RGB', (8, 8)), prompt='', software='mdm', settings=text)
    with pytest.raises(ValueError) as e: read_settings(data)
    assert 0 < len(str(e.value)) < 600

def test_foreign_files_are_refused():
    for data in (b'', b'PK\x03\x04', png_bytes(Image.new('RGB', (4, 4))), png_bytes(Image.new('RGB', (4, 4)), prompt='a cat', parameters='Steps: 20'), png_bytes(Image.new('RGB', (4, 4)), prompt='a', software='mdm', settings='{}'), b'\x89PNG\r\n\x1a\n'):
        with pytest.raises(ValueError): read_settings(data)

def test_damaged_files_raise_nothing_but_value_errors(red):
    "A few hundred mutations of a good file; a bomb of text; both readers."
    good, rng = png_bytes(red, **settings(dict(steps=2)).png_info()), random.Random(0)
    text = b'settings\0\1\0\0\0' + zlib.compress(b'a'*50_000_000)
    bomb = good[:33] + len(text).to_bytes(4, 'big') + b'iTXt' + text + zlib.crc32(b'iTXt' + text).to_bytes(4, 'big') + good[33:]
    files = [bomb]
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)): data[rng.randrange(8, len(data))] = rng.randrange(256)
        files.append(bytes(data[:rng.randrange(8, len(data))] if rng.random() < .3 else data))
    for data in files:
        for read in (read_settings, decode_picture):
            try: read(data)
            except ValueError: pass

# pictures from outside

def test_uploads_are_bounded(tmp_path):
    for data, words in ((b'x'*20_000_001, '20 MB are the most'), (png_bytes(Image.new('1', (9000, 9000))), '50 million'), (b'<svg onload=alert(1)>', 'no picture'), (b'%!PS-Adobe EPSF', 'no picture')):
        with pytest.raises(ValueError, match=words): decode_picture(data)

def test_uploads_are_turned_upright_and_flat():
    file = io.BytesIO(); exif = Image.Exif(); exif[0x112] = 6
    Image.new('RGB', (20, 10), 'red').save(file, 'JPEG', exif=exif)
    assert decode_picture(file.getvalue()).size == (10, 20)
    assert decode_picture(png_bytes(Image.new('RGBA', (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)

@pytest.mark.parametrize('scripts', [True, False])
def test_a_panel_with_and_without_anywidget(shapes, red, half, monkeypatch, scripts):
    if not scripts:
        for module in (editing, fields): monkeypatch.setattr(module, 'has_scripts', lambda: False)
    errors = []
    panel = EditPanel(errors.append); panel.fit(shapes)
    assert (type(panel.drop.inner).__name__ == 'FileUpload') == (not scripts)
    panel.drop.take('a.png', b'nonsense'); assert errors[-1].startswith('a.png: this is no picture')
    panel.drop.take('a.png', png_bytes(Image.new('RGB', (90, 64), 'blue')))
    assert errors[-1] == '' and panel.mode.value == 'change' and unpacked(panel.values['picture']).size == (32, 32)
    panel.mode.value = 'fill in'
    with pytest.raises(ValueError, match='no mask yet'): settings(**panel.values).check()
    if scripts: panel.brush.inner._handle_custom_msg(dict(kind='mask'), [memoryview(png_bytes(half))])
    else: panel.brush.inner.take('mask.png', png_bytes(half.convert('RGBA')))
    ask = settings(dict(steps=2), **panel.values); ask.check()
    kept = np.asarray(drawn(shapes, ask).sides[0].pictures()[0][0])[:, 16:]
    assert abs(kept.astype(int) - (0, 0, 255)).max() <= 2             # what was not painted stays
    other = EditPanel(errors.append); other.fit(shapes); other.values = panel.values
    assert other.values == panel.values

def test_a_bad_mask_is_told(shapes, red):
    errors = []
    panel = EditPanel(errors.append); panel.fit(shapes); panel.use(red); panel.mode.value = 'fill in'
    if fields.has_scripts(): panel.brush.inner._handle_custom_msg(dict(kind='mask'), [memoryview(b'nonsense')])
    assert errors and 'no picture' in errors[-1] and panel.brush.mask is None

def test_a_dropped_picture_restores_its_settings():
    back, errors = [], []
    drop = SettingsDrop(lambda *o: back.append(o), errors.append, lambda: ['shapes'])
    ask = settings(dict(steps=2))
    drop.take('mdm_seed3.png', png_bytes(Image.new('RGB', (8, 8)), **ask.png_info()))
    assert back == [(ask, '')] and errors == ['']
    drop.take('cat.png', png_bytes(Image.new('RGB', (8, 8))))
    assert len(back) == 1 and 'cat.png: This is no PNG file that the widget' in errors[-1]

# films, words

def test_mp4(pipe, monkeypatch):
    import av
    run = drawn(pipe, settings())
    with av.open(io.BytesIO(mp4_bytes(film_pictures(run.sides)))) as video:
        frames = [o.to_ndarray(format='rgb24') for o in video.decode(video=0)]
    assert len(frames) == 6 + 18 and frames[0].shape[0] % 2 == 0
    assert abs(frames[-1][:260, :260].astype(int) - np.asarray(film_pictures(run.sides)[-1])[:260, :260]).mean() < 6
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(ImportError, match=r'matryoshka-diffusion\[video\]'): mp4_bytes(film_pictures(run.sides))

def test_words_that_never_occurred(tmp_path):
    assert word_hint('a large red cross in the centre on a white background', known_words('shapes')) == ''
    assert 'center (near: centre)' in word_hint('a dragon in the center', known_words('shapes')) and 'dragon' in word_hint('a dragon', shapes_words())
    assert known_words(tmp_path/'nothing') is None and word_hint('a dragon', None) == ''
    assert PipelineShelf('shapes').words('shapes') == shapes_words()

def test_a_training_keeps_the_words_of_its_captions(tmp_path):
    "Through a stop and a resumption; a checkpoint from before says nothing."
    from mdm.cli.train import mdm_train
    from mdm.data.shapes import write_shapes
    write_shapes(tmp_path/'data', 24, 16, per_shard=24)
    small = ['model.channels=[8,8]', 'model.time_dim=32', 'model.num_groups=4', 'model.inner.channels=[8,8]', 'model.inner.num_resnets=[1,1]', 'model.inner.num_attention_layers=[0,0]', 'model.inner.time_dim=32', 'model.inner.num_groups=4',
        'model.inner.num_text_layers=0', 'text.dim=16', 'data.image_size=16', 'train.bf16=false', 'train.batch_size=4', 'train.warmup_steps=1', 'train.steps=6', 'train.preview_every=1000', 'data.workers=0']
    command = ['shapes', *small, '--output', str(tmp_path/'run'), '--data', str(tmp_path/'data'/'*.tar')]
    assert mdm_train([*command, '--minutes', '1e-6']) == 0            # one step: four captions
    first = known_words(tmp_path/'run')
    assert mdm_train(command) == 0                                    # six steps: all 24 captions
    known_words.cache_clear()
    every = {w for i in range(24) for w in split_words(random_shape(0, i, False)[1])}
    assert first < every == known_words(tmp_path/'run') and 'dragon' in word_hint('a dragon', known_words(tmp_path/'run'))
    path = next((tmp_path/'run').glob('step_00000006'))/'state.json'
    about = json.loads(path.read_text()); del about['extra']['training']['words']; path.write_text(json.dumps(about))
    known_words.cache_clear()
    assert known_words(tmp_path/'run') is None

def test_letters_that_the_font_of_captions_lacks(monkeypatch):
    "Emoji come from a font of the system; what no font has is written as its number, and never as a box."
    pixels = lambda text: np.asarray(contact_sheet([Image.new('RGB', (64, 64), 'white')], [text]))[132:]
    colourful = lambda a: (a.max(-1).astype(int) - a.min(-1) > 60).any()
    monkeypatch.setattr(pictures, '_system_fonts', lambda: []); pictures.font_with.cache_clear()
    try:
        assert pictures.font_with('猫') is None and np.array_equal(pixels('a 猫'), pixels('a U+732B')) and not np.array_equal(pixels('猫'), pixels('犬'))
        long = pixels('一只红色的猫坐在沙发上'); assert (long < 128).any() and not colourful(pixels('a 🐻'))
        assert pictures.drawable('👍🏽!\u3000x') in ('U+1F44D ! x', '👍🏽! x')                      # a mark of a letter that is written as its number is left out
    finally: monkeypatch.undo(); pictures.font_with.cache_clear()
    emoji = pictures.font_with('🐻')
    if emoji and 'emoji' in emoji.lower(): assert colourful(pixels('a 🐻 on grass')) and not np.array_equal(pixels('👍🏽'), pixels('👍'))
    plain = Image.new('RGB', (128, 60), 'white'); ImageDraw.Draw(plain).multiline_text((4, 4), 'a größer\nring', 'black', caption_font(), spacing=3)
    mine = Image.new('RGB', (128, 60), 'white'); pictures._write_caption(mine, (4, 4), 'a größer\nring', pictures.CaptionFont())
    assert np.array_equal(np.asarray(plain), np.asarray(mine))                                     # all other captions are as before
