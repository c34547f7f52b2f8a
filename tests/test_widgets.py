"The sampler widget without a browser: settings, the thread, Stop, errors, history, downloads."
import base64, json, re, shlex, shutil, subprocess, sys, threading, time, zipfile
from copy import deepcopy
from dataclasses import replace
from html import unescape
from io import BytesIO
from pathlib import Path
import ipywidgets, numpy as np, pytest, torch
from PIL import Image
from mdm.checkpoint import save_checkpoint
from mdm.cli.sample import mdm_sample
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.recipe import DistillConfig, load_recipe
from mdm.diffusion.settings import SampleConfig
from mdm.widgets.drawing import logsnr_svg
from mdm.widgets.sampler import SamplerWidget, sampling_controls
from mdm.widgets.parts import example_pictures
from mdm.widgets.state import SamplerSettings, Side, avoided, path_bytes, styles, unpacked, walk_together
from mdm.utils.files import bundled, demo_models
from mdm.utils.pictures import png_bytes
from mdm.utils.configs import options
from mdm.widgets.exchange import read_settings
from data_tools import film_seconds, path_seconds
from pytest import approx
from tiny_models import pipe, tiny, write_adapter

evil = '<script>alert(1)</script><img src=x onerror=alert(2)>'

@pytest.fixture(autouse=True)
def made_in_the_main_thread(monkeypatch):
    "A page that connects while a thread makes widgets finds none of them: ipywidgets cannot list them while they become more."
    made, open_widget = [], ipywidgets.Widget.open
    def opened(widget):
        if threading.current_thread() is not threading.main_thread(): made.append(widget)
        open_widget(widget)
    monkeypatch.setattr(ipywidgets.Widget, 'open', opened)
    yield
    assert not made, made

def ready(pipe, **kwargs):
    w = SamplerWidget(pipe, every=0., **kwargs); w.wait(60)
    assert not w.error.value, w.error.value
    w.keep_seed.value = True
    return w

def run(w, **fields):
    for k, v in fields.items(): getattr(w, k).value = v
    w.run(); w.wait(120)
    assert not w.busy
    return w

def links(w): return {unescape(n): base64.b64decode(d) for n, d in re.findall(r'download="([^"]+)" href="data:image/\w+;base64,([^"]+)"', w.downloads.value + ''.join(v.levels[0].value for v in w.views.children) + w.made.value)}

def test_fields_follow_the_recipe_and_the_sampler(pipe):
    w = ready(pipe)
    assert set(w.side_a.sampling) == set(SampleConfig.__dataclass_fields__)          # a control for every field of the sampler
    assert w.side_a.sampling['steps'].value == 6 and w.side_a.sampling['guidance'].value == pipe.recipe.sample.guidance
    assert w.prompt.value and len(w.examples.children) > 3
    for text in ('', 'something else'):                                              # the same example twice, too
        w.prompt.value = text; w.examples.children[3].click()
        assert w.prompt.value == w.examples.children[3].description
    w.side_a.sampling['eta'].value = .5; w.side_a.sampling['solver'].value = 'unipc'
    assert w.side_a.sampling['eta'].disabled and w.settings.sides[0]['eta'] == 0     # which only DDIM knows

def test_controls_follow_the_fields():
    "A control's values, bounds and tip come from the field of SampleConfig."
    controls = sampling_controls()
    for o in options(SampleConfig):
        c = controls[o.name]
        assert c.tooltip == o.help and c.value == o.default
        if o.choices: assert c.options == o.choices
        elif o.high is not None: assert c.max == o.high

def test_settings_that_the_model_cannot_use_are_hidden(pipe):
    w = ready(pipe); w.compare.value = True
    for side in (w.side_a, w.side_b):
        assert {k for k, o in side.sampling.items() if o.layout.display == 'none'} == {'segments', 'join'}
    recipe = replace(pipe.recipe, distill=DistillConfig('shapes'), diffusion=replace(pipe.recipe.diffusion, mixed_ratio=[2, 1]))
    w.side_b.fit(MDMPipeline(pipe.model, recipe, device='cpu'))
    assert not any(o.layout.display == 'none' for o in w.side_b.sampling.values())

def test_every_control_has_a_label(pipe):
    w = ready(pipe)
    controls = [w.prompt, *w.examples.children, w.negative, w.style_, w.avoid, w.n, w.seed, w.compare, w.run_button, w.stop_button, w.kind, w.live, w.inner, w.scrub, *w.makers, w.keep_seed, w.several, w.vary, w.values_, w.settings_button, *w.side_a.sampling.values(), w.side_a.checkpoint, w.side_a.recipe]
    assert all(o.description and not o.description_allow_html for o in controls if hasattr(o, 'description_allow_html')) and all(o.description for o in controls)

def test_the_same_pictures_as_the_pipeline(pipe):
    w = run(ready(pipe), n=2, seed=5, prompt='a red ring', negative='fog')
    files, run_ = links(w), w.runs[0]
    assert list(files) == ['mdm_seed5_sheet.png', 'mdm_seed5.png', 'mdm_seed6.png']
    expected = pipe('a red ring', n=2, seed=5, negative_prompt='fog')
    for name, picture in zip(list(files)[1:], expected): assert np.array_equal(np.asarray(Image.open(BytesIO(files[name]))), np.asarray(picture))
    text = Image.open(BytesIO(files['mdm_seed6.png'])).text
    assert (text['prompt'], text['seed'], text['steps'], text['negative_prompt']) == ('a red ring', '6', '6', 'fog')
    assert SamplerSettings(**json.loads(text['settings'])).n == 2                   # from which the run can be set up again
    assert [f.index for f in run_.sides[0].frames] == [1, 2, 3, 4, 5, 6] and w.scrub.max == 5
    assert 'Done: step 6 of 6' in w.status.value and not w.run_button.disabled and w.stop_button.disabled

@pytest.mark.parametrize('style', styles)
def test_styles_have_a_hole(style): assert styles[style].count('{}') == 1 and SamplerSettings('{x} %s', style=style).texts()[0].count('{x} %s') == 1

def test_styles_reach_the_model(pipe, monkeypatch):
    asked = []
    monkeypatch.setattr(pipe, 'steps', lambda prompts, negative, seeds, config: asked.append((prompts, negative, seeds)) or iter(()))
    run(ready(pipe), prompt='a cat', negative='rain', style_='pixel art', avoid='blur and noise', n=1, seed=3)
    assert asked == [([styles['pixel art'].format('a cat')], ['rain, ' + avoided['blur and noise']], [3])]

def test_stop_within_one_step(pipe):
    w = ready(pipe)
    w.side_a.sampling['steps'].value, original, seen = 900, pipe.steps, []
    def steps(*args):
        gen = original(*args)
        try:
            for step in gen: seen.append(step.index); step.index == 3 and w.stop(); yield step
        finally: seen.append('closed')
    pipe.steps = steps
    try: run(w, n=1)
    finally: del pipe.steps
    assert seen == [1, 2, 3, 'closed']
    assert 'Stopped at step 3 of 900' in w.status.value and w.runs[0].stopped and len(links(w)) == 2   # what there is can be saved
    w.side_a.sampling['steps'].value = 4
    run(w, n=1, seed=1); assert w.runs[0].settings.seed == 1 and not w.runs[0].stopped                                           # and one can go on

def test_a_second_run_is_not_started_beside_the_first(pipe):
    w = ready(pipe); w.side_a.sampling['steps'].value = 900; w.n.value = 1
    w.run(); first = w.thread; w.run()
    assert w.thread is first and w.run_button.disabled and not w.stop_button.disabled
    w.stop(); w.wait(60); assert not first.is_alive()

def test_scrub_and_views(pipe):
    w = run(ready(pipe), n=2)
    view = w.views.children[0]
    last = view.levels[0].value
    w.scrub.value = 0
    assert view.levels[0].value != last and 'step 1 of 6' in w.scrub.description and 'now at step' in w.plot.value
    clean = view.levels[0].value
    w.kind.value = False; assert view.levels[0].value != clean                      # x_t
    w.inner.value = False; assert view.levels[1].layout.display == 'none'
    w.inner.value = True; assert '16 × 16 pixels' in view.levels[1].value
    shown = [c for c in w.cards if c.layout.display is None]
    assert [c.button.description for c in shown] == [f'step {k}' for k in range(1, 7)] and not any(c.button.disabled for c in shown)
    shown[3].button.click(); assert w.scrub.value == 3
    w.gif_button.click()
    data = links(w)['mdm_seed0_path.gif']; gif = Image.open(BytesIO(data)); assert film_seconds(data) == approx(path_seconds(6)) and gif.size[1] > 200 and gif.info['loop'] == 0

def test_live_pictures_can_be_switched_off(pipe):
    seen = []
    w = ready(pipe); w.live.value = False
    w.scrub.observe(lambda c: seen.append(c.new), 'max')
    run(w, n=1); assert seen == [5]
    w.live.value = True
    run(w, n=1); assert seen[1:] == [0, 1, 2, 3, 4, 5]

def test_history_brings_back_settings_and_pictures(pipe):
    w = ready(pipe, history=3)
    for k in range(4): run(w, prompt=f'prompt {k}', seed=k, n=1 + k % 2, style_='watercolour' if k == 2 else 'as written')
    assert [o.settings.seed for o in w.runs] == [3, 2, 1]                           # the oldest is forgotten
    before = links(w)
    w.past[1].button.click()
    assert (w.prompt.value, w.seed.value, w.style_.value, w.n.value) == ('prompt 2', 2, 'watercolour', 1) and list(links(w)) == ['mdm_seed2_sheet.png', 'mdm_seed2.png']
    assert w.scrub.max == 5 and w.shown is w.runs[1]
    w.past[0].button.click(); assert links(w) == before

def test_compare_two_settings_at_one_seed(pipe):
    w = ready(pipe); w.compare.value = True
    assert w.side_b.layout.display is None and w.side_b.values == w.side_a.values
    w.side_b.sampling['steps'].value, w.side_b.sampling['guidance'].value = 3, 1.
    run(w, n=1, seed=4)
    a, b = w.runs[0].sides
    assert (len(a.frames), len(b.frames)) == (6, 3) and 'B: ' in w.views.children[1].title.value and 'steps 3' in w.views.children[1].title.value
    for side, kwargs in ((a, {}), (b, dict(steps=3, guidance=1.))): assert np.array_equal(side.pictures()[0][0], np.asarray(pipe(w.prompt.value, n=1, seed=4, **kwargs)[0]))
    assert [n for n in links(w)] == ['mdm_seed4_sheet.png', 'mdm_seed4.png', 'mdm_seed4_b.png']
    run(w, compare=False); w.past[1].button.click(); assert w.compare.value and w.side_b.sampling['steps'].value == 3

def test_stop_before_the_second_side_has_begun(pipe):
    w = ready(pipe); w.compare.value = True
    for side in (w.side_a, w.side_b): side.sampling['steps'].value = 200
    original = pipe.steps
    def steps(*args):
        for step in original(*args): w.stop(); yield step
    pipe.steps = steps
    try: run(w, n=1)
    finally: del pipe.steps
    assert not w.error.value and 'Stopped at step 1 of' in w.status.value and len(w.runs) == 1 and len(w.runs[0].sides) == 1 and len(links(w)) == 2
    w.gif_button.click(); assert not w.error.value and any(k.endswith('.gif') for k in links(w))       # the first step of a long path is in it
    w.past[0].button.click(); assert not w.error.value and w.compare.value

def test_errors_are_told_in_words(pipe, tmp_path, caplog):
    w = ready(pipe)
    run(w, prompt='x'*2001); assert 'role="alert"' in w.error.value and '2,001 characters' in w.error.value
    w.prompt.value = 'ok'
    run(w); assert not w.error.value
    w.side_a.checkpoint.value = str(tmp_path/evil.replace('/', '')); w.wait(60)
    assert 'There is neither' in unescape(w.error.value) or 'no folder' in unescape(w.error.value)
    assert '<script' not in w.error.value and '<img' not in w.error.value
    run(w); assert w.error.value and not w.run_button.disabled                      # and the widget goes on
    w.side_a.checkpoint.value = w.side_a.checkpoint.options[0]; w.wait(60); run(w); assert not w.error.value
    bad = ready(pipe); bad.shelf.given[next(iter(bad.shelf.given))] = None
    assert not caplog.records                                                       # mistakes need no traceback
    run(bad); assert 'AttributeError' in bad.error.value                            # a bug is not silent either
    assert [r.levelname for r in caplog.records] == ['ERROR'] and 'Traceback' in caplog.text and 'AttributeError' in caplog.text

def test_nothing_from_outside_becomes_html(pipe):
    w = ready(pipe, checkpoints={evil: f'no/{evil}'})
    run(w, prompt=evil, negative=evil, n=1)
    def texts(o, seen):
        if id(o) in seen: return
        seen.add(id(o))
        if type(o).__name__ == 'HTML': yield o.value
        for c in getattr(o, 'children', ()): yield from texts(c, seen)
    w.compare.value = True; w.side_b.checkpoint.value = evil; w.wait(60); run(w)
    everything = ''.join(texts(w, set()))
    assert evil in unescape(everything)                                             # it is shown, as text
    assert '<script' not in everything and '<img src=x' not in everything

def test_paths_are_refused_where_they_are_not_allowed(pipe):
    w = ready(pipe, any_path=False)
    assert type(w.side_a.checkpoint).__name__ == 'Dropdown'
    with pytest.raises(ValueError, match='no checkpoint called'): w.shelf('/etc')

@pytest.mark.parametrize('field, value, words', [('n', 10**6, 'number of pictures'), ('seed', -5, 'seed')])
def test_values_that_get_past_the_browser_are_checked(pipe, field, value, words):
    w = ready(pipe); getattr(w, field).unobserve_all('value')                        # what a forged message can do
    run(w, **{field: value}); assert words in w.error.value and not w.runs

def test_forged_sampling_is_refused(pipe):
    w = ready(pipe); o = w.side_a.sampling['steps']; o.max = 10**9; o.value = 10**8
    run(w); assert '1000' in w.error.value and not w.runs

def test_two_widgets_live_at_once(pipe):
    alone = run(ready(pipe), n=1, seed=7); two = [ready(pipe), ready(pipe)]
    for k, w in enumerate(two): w.n.value, w.seed.value = 1, 7 + k; w.run()
    for w in two: w.wait(120)
    assert np.array_equal(two[0].runs[0].sides[0].pictures()[0], alone.runs[0].sides[0].pictures()[0])
    assert not np.array_equal(two[0].runs[0].sides[0].pictures()[0], two[1].runs[0].sides[0].pictures()[0])

def test_a_path_fits_into_its_memory(pipe):
    sides = [Side(pipe, SamplerSettings(n=n, sides=[dict(checkpoint='x', steps=steps)])) for n, steps in ((16, 1000), (1, 6), (4, 60))]
    assert all(8*s.settings.n*s.side**2*min(s.config.steps/s.stride, 61) <= 1.1*path_bytes for s in sides)
    short = Side(pipe, SamplerSettings(n=1, sides=[dict(checkpoint='x', steps=150)]))
    for _ in walk_together([short], threading.Event()): pass
    assert len(short.frames) <= 61 and [f.index for f in short.frames[:2]] == [1, 4] and short.frames[-1].index == 150 and short.done

def test_plot_marks_the_step(pipe):
    svg = logsnr_svg(pipe.diffusion, [900, 500], 500, [32, 16])
    assert svg.count('<polyline') == 2 and svg.count('<circle') == 4 and 'class="mdm-now" x1="192.0"' in svg and '32 px' in svg

def test_first_screen_without_a_model():
    w = SamplerWidget()
    words = ''.join(getattr(o, 'value', '') for o in w.children[1].children)
    assert 'mdm_train' in words and 'SamplerWidget' in words
    w.demo_button.click(); w.wait(60)
    assert w.side_a.checkpoint.value == 'emoji_fast' and list(w.shelf.paths) == demo_models and not w.error.value and 'Ready' in w.status.value

def test_no_number_is_changed_without_a_word(pipe):
    w = ready(pipe)
    w.n.value = 40; assert w.n.value == 16 and '40' in w.error.value and not '>Ready' in w.status.value
    w.n.value = 2; assert not w.error.value
    w.seed.value = -3; assert w.seed.value == 0 and '-3' in w.error.value

def test_a_mistake_leaves_no_stale_done(pipe):
    w = run(ready(pipe), n=1); assert 'Done' in w.status.value
    run(w, prompt='x'*2001); assert w.error.value and 'Done' not in w.status.value
    run(w, prompt='ok'); assert not w.error.value and 'Done' in w.status.value

def test_every_run_has_another_seed_unless_it_is_kept(pipe):
    w = ready(pipe); w.keep_seed.value = False
    seeds = [run(w, n=1).runs[0].settings.seed for _ in range(2)]
    assert seeds[0] != seeds[1] and not w.keep_seed.value and w.seed.value == seeds[1]
    w.seed.value = 7; assert w.keep_seed.value                                       # typed: kept
    assert run(w).runs[0].settings.seed == 7 == run(w).runs[0].settings.seed
    w.keep_seed.value = False; w.past[2].button.click()
    assert w.keep_seed.value and w.seed.value == seeds[1]                            # brought back: kept

def test_a_stopped_run_is_marked(pipe):
    w = ready(pipe); w.side_a.sampling['steps'].value, original = 90, pipe.steps
    def steps(*args):
        for step in original(*args): step.index == 48 and w.stop(); yield step
    pipe.steps = steps
    try: run(w, n=1)
    finally: del pipe.steps
    shown = [c for c in w.cards if c.layout.display is None]
    assert shown[-1].button.description == 'step 48, stopped' and 'step 48 of 90' in w.scrub.description and 'stopped' in w.scrub.description
    text = Image.open(BytesIO(links(w)['mdm_seed0.png'])).text
    assert '48 of 90' in text['stopped'] and 'stopped' in w.views.children[0].levels[0].value

def test_places_are_kept_while_a_run_goes_on(pipe):
    "Nothing on the page moves: what will come has its place from the first moment."
    w, seen, original = ready(pipe), [], pipe.steps
    def steps(*args):
        for step in original(*args):
            cards = sum(c.layout.display is None for c in w.cards)
            grid = w.views.children[0].levels[0].value
            seen.append((w.after.layout.display, cards, grid.count('mdm-cell'), re.search('--columns[^"]+', grid)[0]))
            yield step
    pipe.steps = steps
    try: run(w, n=3)
    finally: del pipe.steps
    assert len(seen) == 6 and set(seen) == {(None, 6, 3, seen[0][3])} and '--unit:32px' in seen[0][3]

def test_a_picture_opens_large_with_its_settings(pipe):
    w = ready(pipe)
    run(w, n=2, seed=5, prompt='a <b>red</b> ring', negative='fog')
    html = w.views.children[0].levels[0].value
    larges = html.split('<div popover')[1:]
    assert len(larges) == 2 and 'Seed 5' in larges[0] and 'Seed 6' in larges[1] and 'download="mdm_seed6.png"' in larges[1]
    for words in ('a &lt;b&gt;red&lt;/b&gt; ring', 'fog', '<dt>steps</dt><dd>6</dd>', '<dt>seed</dt><dd>6</dd>'): assert words in larges[1]
    assert '<dt>eta</dt>' not in html                                                # the usual value
    keys = re.findall('popovertarget="([^"]+)"', html), re.findall(' id="([^"]+)"', html)
    assert set(keys[0]) == set(keys[1]) and len(keys[1]) == 2
    other = run(ready(pipe), n=2)
    assert not set(keys[1]) & set(re.findall(' id="([^"]+)"', other.views.children[0].levels[0].value))    # two widgets on a page

def test_the_first_screen_shows_what_the_model_drew():
    w = SamplerWidget('shapes'); w.wait(60)
    row = w.views.children[0].children[1]
    assert len(row.children) == 8 and 'Drawn beforehand' in w.views.children[0].children[0].value and w.prompt.value == row.children[0].example[0]
    row.children[2].button.click()
    assert (w.prompt.value, w.seed.value) == row.children[2].example and w.keep_seed.value
    run(w, n=1)
    drawn, (text, seed) = w.runs[0].sides[0].pictures()[0][0].astype(int), row.children[2].example
    assert (drawn == np.asarray(MDMPipeline.from_pretrained('shapes', device='cpu')(text, n=1, seed=seed)[0])).all()
    off = [np.abs(drawn - np.asarray(Image.open(bundled/'shapes'/f'example_{k}.png'))).mean() for k in range(1, 9)]
    assert off[2] < 2 < 10 < min(off[:2] + off[3:])                      # the same picture again; processors round bfloat16 in different ways
    assert sum(o.stat().st_size for o in (bundled/'shapes').glob('example_*.png')) < 60_000

def test_the_first_screen_without_pictures(pipe):
    w = ready(pipe)
    assert '32 px' in w.views.children[0].children[1].value and '16 px' in w.views.children[0].children[1].value

def test_hostile_examples_are_text(tmp_path):
    shutil.copytree(bundled/'shapes', tmp_path/'run')
    for o in (tmp_path/'run').glob('example_*'): o.unlink()
    for k, info in enumerate((dict(prompt=evil, seed='3'), dict(prompt='x'), dict(prompt='x', seed='-1'), {})):
        (tmp_path/'run'/f'example_{k}.png').write_bytes(png_bytes(Image.new('RGB', (8, 8)), **info))
    (tmp_path/'run'/'example_9.png').write_bytes(b'no picture')
    assert [o[1:] for o in example_pictures(str(tmp_path/'run'))] == [(evil, 3)]

def test_a_picture_of_the_results_is_taken_for_a_change(pipe):
    w = run(ready(pipe), n=2, seed=3)
    w._use('0-0-1')
    assert w.edit.values['mode'] == 'change' and np.array_equal(np.asarray(unpacked(w.edit.values['picture'])), w.runs[0].sides[0].pictures()[0][1])
    for forged in ('0-0-9', '5-0-0', 'x', '1', '0-0-0-0'): w._use(forged)
    run(w, n=1); assert not w.error.value and w.runs[0].settings.mode == 'change'
    w.past[1].button.click(); assert w.edit.values == dict(mode='draw')
    w.past[0].button.click(); assert w.edit.values['mode'] == 'change'

def test_a_grid_over_one_setting(pipe):
    w = ready(pipe); w.vary.value = 'guidance'; w.values_.value = '1, 4'
    run(w, n=1, seed=2)
    assert [o.config.guidance for o in w.runs[0].sides] == [1, 4] and ['guidance 1.0' in w.views.children[0].title.value, 'guidance 4.0' in w.views.children[1].title.value] == [True, True]
    run(w, values_='1, x'); assert 'commas' in w.error.value and len(w.runs) == 1
    w.vary.value = ''; w.past[0].button.click()
    assert w.vary.value == 'guidance' and w.values_.value == '1.0, 4.0' and not w.compare.value

def test_files_of_a_run(pipe):
    w = run(ready(pipe), n=2, seed=5)
    w.zip_button.click(); data = links(w)['mdm_seed5.zip']
    assert {'mdm_seed5.png', 'mdm_seed6.png', 'mdm_seed5_sheet.png'} <= {Path(o).name for o in zipfile.ZipFile(BytesIO(data)).namelist()}
    w.gif_button.click(); assert 'mdm_seed5_path.gif' in links(w)
    assert 'seed=5' in unescape(w.copy.value)

def test_keys_need_no_anywidget(pipe, monkeypatch):
    monkeypatch.setattr('mdm.widgets.sampler.has_scripts', lambda: False)
    monkeypatch.setattr('mdm.widgets.fields.has_scripts', lambda: False)
    monkeypatch.setattr('mdm.widgets.editing.has_scripts', lambda: False)
    w = run(ready(pipe), n=1); w.gif_button.click()
    assert w.keyboard is None and not w.error.value and 'Done' in w.status.value

def test_the_interpreter_can_leave_while_sampling():
    "A kernel that restarts does not wait for the thread, and leaves nothing behind; no warning of a library greets the user either."
    code = "from mdm.widgets.sampler import SamplerWidget\nw = SamplerWidget('shapes'); w.wait()\nassert not w.error.value, w.error.value\nw.side_a.sampling['steps'].value = 1000\nw.run()\nimport time; time.sleep(.5); assert w.busy; print('leaving')"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and out.stdout.strip() == 'leaving' and not out.stderr, out

# ---- adapters

@pytest.fixture(scope='module')
def checkpoint(pipe, tmp_path_factory):
    for p in pipe.model.parameters(): torch.nn.init.normal_(p, std=.05) if not p.any() else None      # layers that begin at zero hide everything behind them
    return save_checkpoint(tmp_path_factory.mktemp('model')/'model', pipe.recipe, pipe.model.state_dict(), pipe.model.state_dict(), 1)

@pytest.fixture(scope='module')
def adapters(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('adapters')
    for k, name in enumerate(('fog', 'night')): write_adapter(folder/name, pipe.model, ['cond_emb', 'conv1'], seed=k)
    (folder/'notes').mkdir()
    return folder

def drawn(w): return w.runs[0].sides[0].pictures()[0]
def strengths(w, side='side_a', **values):
    for k, v in values.items(): getattr(w, side).adapters.sliders[k].value = v

def test_pictures_with_adapters_are_those_of_mdm_sample(checkpoint, adapters, tmp_path, capsys, monkeypatch):
    w = ready(str(checkpoint), adapters=adapters, device='cpu')
    assert list(w.side_a.adapters.sliders) == ['fog', 'night'] and list(w.shelf.loaded) == [(str(checkpoint), '')]
    loaded = w.shelf(str(checkpoint)); before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    plain = drawn(run(w, prompt='a red ring', n=2, seed=5))
    strengths(w, night=.8, fog=1.); both = drawn(run(w))
    assert not w.error.value and not np.array_equal(both, plain)
    command, code = [unescape(o) for o in re.findall('<pre[^>]*>(.*?)</pre>', w.copy.value, re.S)]
    assert f'--adapter {adapters/"fog"} --adapter {adapters/"night"}:0.8' in command
    monkeypatch.chdir(tmp_path); import shlex
    assert mdm_sample([*shlex.split(command)[1:], '--output', 'by_command', '--device', 'cpu']) == 0, capsys.readouterr()
    theirs = [np.asarray(Image.open(o)) for o in sorted((tmp_path/'by_command'/'0001').glob('*.png'))]
    assert np.array_equal(both, theirs)
    names = {}; exec(code, names); assert np.array_equal(both, [np.asarray(o) for o in names['pictures']])
    strengths(w, night=0., fog=0.); assert np.array_equal(drawn(run(w)), plain)     # changed between runs
    assert w.shelf(str(checkpoint)) is loaded and all(torch.equal(v, before[k]) for k, v in loaded.model.state_dict().items())      # and nothing was loaded anew
    assert all(o.adapted is None for r in w.runs for o in r.sides)                  # the history holds no weights

def test_adapters_come_back_from_a_picture(checkpoint, adapters, tmp_path, capsys):
    w = run(ready(str(checkpoint), adapters=adapters), n=1, seed=5); strengths(w, fog=.35, night=2.); run(w)
    assert w.side_a.adapters.sliders['night'].value == 1.5; w.side_a.adapters.values = {'adapter fog': .35, 'adapter night': 2.}; run(w)
    data = links(w)['mdm_seed5.png']; text = Image.open(BytesIO(data)).text
    assert text['adapter'] == 'fog:0.35 night:2' and 'adapter fog' not in text
    assert 'fog:0.35 night:2' in w.views.children[0].levels[0].value                # the large view tells it
    fresh = ready(str(checkpoint), adapters=adapters)
    fresh.again.take('a.png', data); assert fresh.side_a.adapters.values == {'adapter fog': .35, 'adapter night': 2.} and not fresh.error.value
    run(fresh); assert np.array_equal(drawn(fresh), drawn(w))
    assert mdm_sample([str(checkpoint), 'a ring', '--n', '1', '--adapter', f'{adapters/"night"}:0.5', '--output', str(tmp_path/'out')]) == 0
    fresh.again.take('b.png', (tmp_path/'out'/'0001'/'000_seed0.png').read_bytes()); assert fresh.side_a.adapters.values == {'adapter night': .5}
    strange = ready(str(checkpoint)); strange.again.take('a.png', data)
    assert "adapter 'fog' is not among those here" in unescape(strange.status.value) and not strange.side_a.adapters.values

def test_sides_with_and_without_an_adapter(checkpoint, adapters):
    w = ready(str(checkpoint), adapters=dict(fog=adapters/'fog'))
    w.compare.value = True; strengths(w, 'side_b', fog=1.); run(w, n=1, seed=3)
    a, b = (o.pictures()[0] for o in w.runs[0].sides)
    assert not np.array_equal(a, b) and 'adapter fog 1.0' in w.views.children[1].title.value
    w.vary.value = 'adapter fog'; run(w, values_='0, .5, 1')
    grid = [o.pictures()[0] for o in w.runs[0].sides]
    assert np.array_equal(grid[0], a) and np.array_equal(grid[2], b) and not np.array_equal(grid[1], a) and 'adapter fog 0.5' in w.views.children[1].title.value
    data = links(w)['mdm_seed3_b.png']; other = ready(str(checkpoint), adapters=adapters/'fog'); other.again.take('a.png', data)
    assert (other.vary.value, other.values_.value) == ('adapter fog', '0.0, 0.5, 1.0') and not other.error.value

def test_adapters_that_are_none_are_refused(pipe, checkpoint, adapters, tmp_path):
    for path, words in ((tmp_path/'nothing', 'no folder'), (checkpoint, 'whole model')):
        with pytest.raises((OSError, ValueError), match=words): SamplerWidget(str(checkpoint), adapters=[path])
    broken = tmp_path/'broken'; shutil.copytree(adapters/'fog', broken); (broken/'adapter_model.safetensors').write_bytes(b'x')
    with pytest.raises(ValueError, match='damaged'): SamplerWidget(str(checkpoint), adapters=[broken])
    other = load_recipe('shapes', [*tiny, 'model.inner.channels=[16,16]'])
    write_adapter(tmp_path/'other', create_model(other.model, 8), ['conv1'])
    for any_path in (True, False):
        w = ready(str(checkpoint), adapters=[(tmp_path/'other', 1.)], any_path=any_path); run(w, n=1)
        told = unescape(w.error.value); assert "adapter 'other'" in told and 'another model' in told and str(tmp_path) not in told and not w.runs
    strengths(w, other=0.); run(w, n=1); assert not w.error.value
    (tmp_path/'other'/'adapter_config.json').unlink(); strengths(w, other=1.); run(w)
    assert 'cannot be opened' in w.error.value and str(tmp_path) not in w.error.value       # visitors learn no path
    forged = ready(str(checkpoint), any_path=False); forged.side_a.adapters.sliders['x'] = type('S', (), dict(value=1.))(); run(forged)
    assert "no adapter called 'x'" in unescape(forged.error.value)
    w = ready(str(checkpoint), adapters=adapters); slider = w.side_a.adapters.sliders['fog']; slider.max = 1e9; slider.value = 1e8; run(w)
    assert 'from -10 to 10' in w.error.value

def test_an_adapter_is_added_in_the_notebook(checkpoint, adapters):
    w = ready(str(checkpoint)); add = w.side_a.adapters
    add.place.value = str(adapters/'nothing'); add.add_button.click(); assert 'no folder' in w.error.value
    add.place.value = str(adapters); add.add_button.click()
    assert not w.error.value and add.values == {'adapter fog': 1., 'adapter night': 1.} and list(w.side_b.adapters.sliders) == ['fog', 'night'] and not w.side_b.adapters.values
    assert 'adapter night' in [v for _, v in w.vary.options]
    visitors = ready(str(checkpoint), adapters=adapters, any_path=False).side_a.adapters
    assert len(visitors.children) == 2 and str(adapters) not in visitors.sliders['fog'].tooltip

# ---- sizes and hints

@pytest.fixture(scope='module')
def wide(pipe):
    "A model that was trained on rectangles."
    recipe = deepcopy(pipe.recipe); recipe.data.buckets = ['32x32', '48x32', '32x64']
    return MDMPipeline(pipe.model, recipe, pipe.encoder, device='cpu')

def test_a_model_of_rectangles_offers_its_sizes(wide, pipe, tmp_path):
    assert ready(pipe).size.layout.display == 'none'
    w = ready(wide); assert w.size.options == (('32 × 32', ''), ('48 × 32', '48x32'), ('32 × 64', '32x64')) and w.size.layout.display is None
    run(w, n=2, seed=4, size='48x32')
    assert [o.shape for o in w.runs[0].sides[0].pictures()] == [(2, 32, 48, 3), (2, 16, 24, 3)] and not w.error.value
    assert '48 × 32 pixels' in w.views.children[0].levels[0].value and '--ratio:1.5' in w.views.children[0].levels[0].value
    theirs = wide('x', n=1, seed=4, size='48x32', negative_prompt=''); w.prompt.value = 'x'; run(w)
    assert np.array_equal(drawn(w)[0], np.asarray(theirs[0])) and "size='48x32'" in unescape(w.copy.value)
    w.scrub.value = 2; w.gif_button.click(); w.zip_button.click(); assert not w.error.value; w.scrub.value = w.scrub.max
    data = links(w)['mdm_seed4.png']; assert Image.open(BytesIO(data)).text['size'] == '48x32'
    w._use('0-0-1'); assert w.edit.picture.size == (48, 32); run(w); assert not w.error.value          # begin with it
    w.edit.mode.value = 'fill in'; mask = Image.new('L', (48, 32)); mask.paste(255, (0, 0, 20, 32)); w.edit.brush.paint(png_bytes(mask)); run(w); assert not w.error.value
    w.edit.mode.value = 'enlarge'; assert w.edit.picture.size == (24, 16); run(w); assert not w.error.value and drawn(w).shape == (2, 32, 48, 3)
    w.size.value = ''; assert w.edit.picture.size == (16, 16)
    again = ready(wide); again.again.take('a.png', data); assert again.size.value == '48x32' and 'not among' not in again.status.value
    square = ready(pipe, any_path=False); square.again.take('a.png', data); assert square.size.value == '' and 'size 48x32 is not among' in square.status.value
    mine = ready(pipe); mine.again.take('a.png', data); assert mine.size.value == '48x32' and mine.size.layout.display is None      # a notebook may draw any
    w.past[len(w.runs) - 1].button.click(); assert w.size.value == '48x32'
    with pytest.raises(ValueError, match='is no size'): replace(w.settings, size='9999999x1').check()

def test_a_prompt_that_is_too_long_is_told_while_it_is_typed(pipe):
    w = ready(pipe); w.prompt.value = 'a red ring'; assert 'longer' not in w.hint.value
    w.prompt.value = 'red ' * 200; assert 'longer than the text encoder reads' in w.hint.value and 'are left out' in w.hint.value
    w.prompt.value = 'a ring'; w.negative.value = 'fog, ' * 120; assert 'longer than' in w.hint.value
    w.negative.value = ''; assert 'longer' not in w.hint.value
    w.prompt.value = '<b>' + 'red '*100 + '\n' + 'blue '*30; w.several.value = True; assert 'longer' not in w.hint.value or '<b>' not in w.hint.value

# ---- clips

@pytest.fixture(scope='module')
def mover():
    "A random model of clips: 16 frames of 8 pixels around 4 around 1."
    nest = [f'model.{"inner."*k}{o}' for k in range(3) for o in ('num_groups=4', 'time_dim=16')]
    recipe = load_recipe('moving_shapes_16', [*nest, *'model.channels=[8,8,8] model.inner.channels=[8,8,8] model.inner.inner.channels=[8,8] model.inner.inner.num_resnets=[1,1] model.inner.inner.num_attention_layers=[0,1]'.split(),
        'model.inner.inner.num_text_layers=0', 'text.dim=8', 'data.image_size=8', 'train.bf16=false', 'sample.steps=3', 'sample.guidance=3', 'diffusion.prediction=eps'])        # x0 would be 0 in every frame
    torch.manual_seed(0)
    return MDMPipeline(create_model(recipe.model, 8), recipe, device='cpu')

@pytest.fixture(scope='module')
def clip_folder(mover, tmp_path_factory): return str(save_checkpoint(tmp_path_factory.mktemp('clips')/'c', mover.recipe, mover.model.state_dict()))

def films(html): return [base64.b64decode(o) for o in re.findall(r'src="data:image/webp;base64,([^"]+)"', html)]
def pixels(frames): return [o.tobytes() for o in frames]

def test_clips_play_and_are_those_of_the_pipeline(mover):
    w = ready(mover)
    assert '16 frames of 8 × 8 and 4 frames of 8 × 8 and 8 × 8 pixels' in w.views.children[0].children[0].value and [o for _, o in w.edit.mode.options][-1] == 'animate'
    w = run(w, n=2, seed=3, prompt='a red circle moves')
    expected = mover('a red circle moves', n=2, seed=3)
    assert [pixels(o.frames) for o in w.runs[0].sides[0].shown()] == [pixels(o.frames) for o in expected]
    top, middle, inner = (o.value for o in w.views.children[0].levels)
    assert [len(films(o)) for o in (top, middle, inner)] == [4, 4, 0] and [film_seconds(o) for o in films(top) + films(middle)] == approx([2.]*8)      # small and large
    assert '16 frames of 8 × 8 pixels' in top and top.count('type="radio"') == 2*17 and 'radio' not in inner
    assert len(films(w.past[0].image.value)) == 1 and '16 frames of 8' in w.plot.value                                                             # history and legend
    w.scrub.value = 0
    assert len(films(w.views.children[0].levels[0].value)) == 4 and w.runs[0].sides[0].frames[0].x[0].shape == (2, 32, 32, 3)                      # the path plays, too
    w.scrub.value = w.scrub.max
    files = links(w)
    assert {'mdm_seed3.png', 'mdm_seed3.gif', 'mdm_seed3.webp', 'mdm_seed4.gif', 'mdm_seed3_sheet.png'} <= files.keys() and Image.open(BytesIO(files['mdm_seed3.png'])).size == (32, 32)
    back, note = read_settings(files['mdm_seed4.png'])
    assert back == w.runs[0].settings and not note

def test_films_of_a_run_of_clips(mover, pipe):
    w = run(ready(mover), n=1, seed=5)
    for button, kind in ((w.gif_button, 'gif'), (w.webp_button, 'webp'), (w.mp4_button, 'mp4')):
        button.click(); assert not w.error.value, w.error.value
        data = links(w)[f'mdm_seed5.{kind}']
        assert data[4:8] == b'ftyp' if kind == 'mp4' else film_seconds(data) == approx({'gif': 1.92, 'webp': 2}[kind])
    w.zip_button.click()
    packed = zipfile.ZipFile(BytesIO(links(w)['mdm_seed5.zip']))
    assert {'mdm_seed5.gif', 'mdm_seed5_sheet.gif', 'mdm_seed5.png', 'command.txt'} <= set(packed.namelist()) and film_seconds(packed.read('mdm_seed5.gif')) == approx(1.92)    # a GIF counts hundredths of a second

def test_clips_beside_pictures(mover, clip_folder):
    "A grid over steps, and a comparison of clips with a model of pictures."
    w = ready(mover)
    w.vary.value = 'steps'; w.values_.value = '1, 2'
    run(w, n=1); w.zip_button.click(); w.gif_button.click()
    assert len(w.views.children) == 2 and not w.error.value and all(len(films(o.levels[0].value)) == 2 for o in w.views.children)
    w = ready(clip_folder, checkpoints=['shapes'])
    w.compare.value = True; w.side_b.checkpoint.value = 'shapes'; w.wait(60)
    for o in (w.side_a, w.side_b): o.sampling['steps'].value = 1
    run(w, n=1); w.webp_button.click()
    assert not w.error.value and [len(films(o.levels[0].value)) for o in w.views.children] == [2, 0] and [len(o.levels) for o in w.views.children] == [3, 2]

def test_a_clip_begins_with_a_picture_or_a_clip(mover, clip_folder, tmp_path, monkeypatch):
    "Animate, change and fill in, from a file and from a result; the command line and the settings in the file give the same clip."
    w = ready(clip_folder)
    run(w, n=1, seed=1, prompt='a ring moves'); w._use('0-0-0')
    first = w.runs[0].sides[0].shown()[0]
    assert w.edit.mode.value == 'change' and w.edit.picture.tobytes() == first.tiles.tobytes()
    changed = run(w).runs[0].sides[0].shown()[0]
    assert pixels(changed.frames) == pixels(mover.img2img(first, 'a ring moves', n=1, seed=1)[0].frames)
    w.edit.mode.value = 'fill in'; half = Image.new('L', (32, 32)); half.paste(255, (0, 16, 32, 32)); w.edit.brush.paint(png_bytes(half))
    filled = run(w).runs[0].sides[0].shown()[0]
    assert pixels(filled.frames[:8]) == pixels(first.frames[:8]) and pixels(filled.frames) == pixels(mover.inpaint(first, half, 'a ring moves', n=1, seed=1)[0].frames)
    w.edit.mode.value = 'animate'; w.edit._taken('a.png', png_bytes(Image.new('RGB', (20, 20), (255, 127, 3))))
    drawn = run(w).runs[0].sides[0].shown()[0]
    assert drawn.frames[0].getpixel((4, 4)) == (255, 127, 3) and pixels(drawn.frames) == pixels(mover.animate(w.edit.picture, 'a ring moves', n=1, seed=1)[0].frames)
    monkeypatch.chdir(tmp_path); w.edit.picture.save('picture.png')
    command = re.search(r'mdm_sample [^<]*', unescape(w.copy.value)).group().split('\n')[0]
    assert '--animate picture.png' in command and '--film gif' in command and 'pipe.animate' in w.copy.value
    assert mdm_sample([*shlex.split(command)[1:], '--output', 'out', '--device', 'cpu']) == 0
    again = Path('out/0001/000_seed1.png')
    assert Image.open(again).tobytes() == drawn.tiles.tobytes() and again.with_suffix('.gif').exists()
    back, _ = read_settings(links(w)['mdm_seed1.png'])
    other = ready(clip_folder); other.settings = back
    assert other.edit.mode.value == 'animate' and other.edit.picture.tobytes() == w.edit.picture.tobytes()
    assert 'choose it again' in read_settings(again.read_bytes())[1]

def test_a_model_of_pictures_animates_nothing(pipe):
    w = ready(pipe)
    w.edit.values = dict(mode='animate', picture=w.edit.values.get('picture') or base64.b64encode(png_bytes(Image.new('RGB', (8, 8)))).decode())
    assert 'choose a model of clips' in run(w).error.value
