"The pipeline as people use it: any batch size, stopping, pictures of any kind, and what it remembers."
import copy, gc, inspect, weakref
from collections import Counter
from dataclasses import fields
import numpy as np, pytest, torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from mdm.checkpoint import save_checkpoint
from mdm.data.shapes import caption, random_shape, shapes_captions
from mdm.data.shapes_judge import prompt_accuracy
from mdm.diffusion.settings import SampleConfig
from mdm.evaluation.runs import sample_missing
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.utils.pictures import from_pil, to_pil
from mdm.recipe import load_recipe
from mdm.utils.configs import ConfigError
from mdm.text import HashEncoder
from mdm.widgets.sampler import SamplerWidget
from mdm.widgets.state import SamplerRun, SamplerSettings, Side

tiny = '''model.channels=[8,8] model.inner.channels=[8,8] model.inner.num_resnets=[1,1] model.inner.num_attention_layers=[0,1] model.time_dim=16 model.inner.time_dim=16 model.num_groups=4
    model.inner.num_groups=4 text.dim=16 data.image_size=16 sample.steps=4'''.split()
prompt = 'a large red cross in the centre on a white background'
pixels = lambda picture: np.asarray(picture).astype(int)

@pytest.fixture(scope='module')
def pipe():
    recipe = load_recipe('shapes', tiny)
    torch.manual_seed(0)
    model = create_model(recipe.model, recipe.text.dim)
    for p in model.parameters(): p.data += .05*torch.randn_like(p)
    return MDMPipeline(model, recipe, device='cpu', bf16=False)

@pytest.fixture
def calls(pipe):
    "The sizes of the batches that reach the network."
    sizes = []
    handle = pipe.model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[1])))
    yield sizes
    handle.remove()

def same(a, b, by=1): return len(a) == len(b) and all(abs(pixels(x) - pixels(y)).max() <= by for x, y in zip(a, b))

@pytest.mark.parametrize('wishes', [{}, dict(eta=1.), dict(eta='ddpm'), dict(solver='dpm++2m', spacing='trailing'), dict(solver='unipc', guidance_interval=(.1, .8), guidance_rescale=.7), dict(guidance=1.)], ids=str)
def test_batch_size_changes_nothing(pipe, wishes):
    whole = pipe(['a red ring', prompt], n=3, seed=5, **wishes)
    for batch_size in (1, 4, 5): assert same(pipe(['a red ring', prompt], n=3, seed=5, batch_size=batch_size, **wishes), whole)
    assert same(pipe(prompt, n=1, seed=9, **wishes), whole[4:5])                       # what a picture's seed says makes it again

def test_memory_is_that_of_a_batch(pipe, calls):
    pipe(prompt, n=7, batch_size=3)
    assert calls == [6]*4 + [6]*4 + [2]*4

def test_batches_are_let_go(pipe):
    "No tensor of an earlier batch is alive when the next one begins."
    alive, step = [], next(pipe.steps([prompt]))
    def progress(done, total):
        if done%4 == 1: gc.collect(); alive.append(sum(torch.is_tensor(o) and o.shape[-3:] == (3, 16, 16) for o in gc.get_objects()))
    del step
    pipe(prompt, n=3, batch_size=1, progress=progress)
    assert len(alive) == 3 and max(alive[1:]) <= alive[0]

def test_progress_counts_to_the_end(pipe):
    seen = []
    pipe(prompt, n=3, batch_size=2, progress=lambda *a: seen.append(a))
    assert seen == [(k, 8) for k in range(1, 9)]
    seen.clear(); given = pipe(prompt, n=1)[0]
    seen.clear(); pipe.img2img(given, prompt, strength=.5, n=1, progress=lambda *a: seen.append(a))
    assert seen == [(1, 2), (2, 2)]

@pytest.mark.parametrize('stop,batches', [(1, 0), (4, 1), (5, 1), (8, 2), (11, 2), (12, 3)])
def test_stopping(pipe, calls, stop, batches):
    whole = pipe(prompt, n=3, batch_size=1)
    calls.clear()
    hi, lo = pipe(prompt, n=3, batch_size=1, every_resolution=True, progress=lambda done, total: done < stop)
    assert same(hi, whole[:len(hi)]) and len(hi) == len(lo) == batches and len(calls) <= stop + 1

def test_an_error_in_progress_comes_through(pipe, calls):
    def progress(done, total): raise RuntimeError('mine')
    with pytest.raises(RuntimeError, match='mine'): pipe(prompt, progress=progress)
    assert len(calls) == 1 and not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()

def test_leaving_the_generator(pipe, calls):
    steps = pipe.steps([prompt]); next(steps); steps.close()
    assert len(calls) == 1 and torch.is_grad_enabled()
    for step in pipe.steps([prompt]): assert torch.is_grad_enabled()                   # while the caller has its turn
    ref = weakref.ref(step.x[0]); del step, steps; gc.collect()
    assert ref() is None

def test_prompts_are_encoded_once(monkeypatch, pipe):
    asked, encode = [], HashEncoder._encode
    monkeypatch.setattr(HashEncoder, '_encode', lambda self, prompts: asked.extend(prompts) or encode(self, prompts))
    for _ in range(2): pipe(['a new prompt', 'another new one', 'a new prompt'], n=3, batch_size=2, negative_prompt='not this')
    assert sorted(o for o in asked if o) == ['a new prompt', 'another new one', 'not this']

def test_moving(pipe):
    assert pipe.to('cpu') is pipe and pipe.device == torch.device('cpu') and same(pipe(prompt, n=1), pipe.to(torch.device('cpu'))(prompt, n=1), 0)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
def test_moving_to_a_gpu_and_back(pipe):
    before = pipe(prompt, n=2, solver='unipc')
    try: assert same(pipe.to('cuda')(prompt, n=2, solver='unipc'), before, 3)          # other arithmetic, the same noise
    finally: pipe.to('cpu')
    assert same(pipe(prompt, n=2, solver='unipc'), before, 0)

def test_config(pipe):
    c = pipe.config(steps=7, guidance=2., threshold='none', solver='unipc', spacing='logsnr', guidance_interval=(.1, .9), guidance_rescale=.5)
    assert (c.steps, c.guidance, c.threshold, c.solver, c.spacing, c.guidance_interval, c.guidance_rescale, c.eta) == (7, 2., 'none', 'unipc', 'logsnr', (.1, .9), .5, 0.)
    assert pipe.config() == pipe.recipe.sample
    with pytest.raises(TypeError, match="no option 'stepz'; did you mean steps"): pipe(prompt, stepz=3)
    for wrong, said in ((dict(guidance_interval=(.9, .1)), 'sample.guidance_interval: found .* the smaller one first'), (dict(guidance_interval=(0., 2.)), r'sample.guidance_interval\[1\]: found 2.0'),
                        (dict(steps=0), 'sample.steps: found 0'), (dict(eta=-1.), 'sample.eta: found -1.0'), (dict(guidance=-1.), 'sample.guidance: found -1.0'), (dict(guidance_rescale=1.1), 'sample.guidance_rescale: found 1.1')):
        with pytest.raises(ConfigError, match=said): pipe(prompt, **wrong)

def test_eta_and_solver(pipe):
    stochastic = MDMPipeline(pipe.model, load_recipe('shapes', tiny + ['sample.solver=ddim', 'sample.eta=0.5']), device='cpu')
    assert (stochastic.config().eta, stochastic.config(solver='unipc').eta, stochastic.config(eta='ddpm').solver, stochastic.config(eta='ddpm').eta) == (.5, 0., 'ddpm', 0.)
    fast = MDMPipeline(pipe.model, load_recipe('shapes', tiny + ['sample.solver=unipc']), device='cpu')
    assert (fast.config(eta=.5).solver, fast.config(eta=0.).solver, fast.config(eta='ddpm').solver) == ('ddim', 'unipc', 'ddpm')

@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'RGBA', 'CMYK', '1', 'I;16'])
def test_pictures_of_any_kind(pipe, tmp_path, mode):
    picture = Image.new('I;16', (16, 16), 40000) if mode == 'I;16' else Image.new('RGB', (16, 16), (200, 30, 90)).convert(mode)
    assert len(pipe.img2img(picture, prompt, n=2)) == 2
    if mode in ('RGB', 'L', 'P', 'RGBA'):
        picture.save(tmp_path/'a.png')
        assert same(pipe.img2img(tmp_path/'a.png', prompt, n=1), pipe.img2img(picture, prompt, n=1)) and same(pipe.img2img(str(tmp_path/'a.png'), prompt, n=1), pipe.img2img(picture, prompt, n=1))

@pytest.mark.parametrize('solver', ['ddim', 'ddpm', 'dpm++2m', 'unipc'])
def test_tools_keep_what_is_given(pipe, solver):
    picture, mask = to_pil(torch.rand(1, 3, 16, 16)*2 - 1)[0], Image.new('L', (16, 16))
    mask.paste(255, (4, 4, 11, 16))
    for painted in pipe.inpaint(picture, mask, [prompt, 'a blue ring'], n=2, batch_size=3, solver=solver, repeats=2):
        changed = (pixels(painted) != pixels(picture)).any(2)
        assert not changed[pixels(mask) == 0].any() and changed[pixels(mask) == 255].mean() > .9
    small = picture.resize((8, 8))
    hi, lo = pipe.upscale(small, prompt, n=3, solver=solver, every_resolution=True)
    assert all(same([o], [small], 0) for o in lo) and not same(hi[:1], hi[1:2])

def test_an_empty_mask_changes_nothing(pipe):
    picture = to_pil(torch.rand(1, 3, 16, 16)*2 - 1)[0]
    assert same(pipe.inpaint(picture, Image.new('L', (16, 16)), prompt, n=1), [picture], 0)

@pytest.mark.parametrize('call,error,said', [
    (lambda p, im, d: p.upscale(im, prompt), ValueError, 'cannot upscale a picture of 16 x 16 pixels: resize it to 8 x 8'),
    (lambda p, im, d: p.img2img(im.resize((9, 7)), prompt), ValueError, 'the picture has 9 x 7 pixels, and the model draws 16 x 16'),
    (lambda p, im, d: p.inpaint(im, im.resize((8, 8)), prompt), ValueError, 'the mask has 8 x 8'),
    (lambda p, im, d: p.img2img(im, prompt, strength=1.5), ValueError, 'strength: found 1.5'),
    (lambda p, im, d: p.img2img(im, prompt, strength=.01, spacing='uniform'), ValueError, 'strength 0.01 leaves nothing'),
    (lambda p, im, d: p.inpaint(im, im, prompt, repeats=0), ValueError, 'repeats: found 0'),
    (lambda p, im, d: p.img2img(d/'none.png', prompt), FileNotFoundError, 'none.png'),
    (lambda p, im, d: p.img2img(d/'text.png', prompt), ValueError, 'text.png is not a picture'),
    (lambda p, im, d: p.img2img(d/'cut.png', prompt), ValueError, 'cut.png is not a picture'),
    (lambda p, im, d: p.img2img(d, prompt), FileNotFoundError, 'no picture'),
    (lambda p, im, d: p(prompt, batch_size=0), ValueError, 'batch_size: found 0')])
def test_mistakes(pipe, tmp_path, calls, call, error, said):
    (tmp_path/'text.png').write_text('no picture')
    to_pil(torch.rand(1, 3, 16, 16))[0].save(tmp_path/'cut.png'); (tmp_path/'cut.png').write_bytes((tmp_path/'cut.png').read_bytes()[:200])
    with pytest.raises(error, match=said): call(pipe, to_pil(torch.zeros(1, 3, 16, 16))[0], tmp_path)
    assert not calls                                                                   # nothing was computed before

def test_one_resolution_cannot_upscale(pipe):
    recipe = load_recipe('shapes', tiny)
    recipe.model = recipe.model.inner
    flat = MDMPipeline(create_model(recipe.model, 16), recipe, device='cpu', bf16=False)
    with pytest.raises(ValueError, match='nested model'): flat.upscale(Image.new('RGB', (8, 8)), prompt)
    assert flat.inpaint(Image.new('RGB', (16, 16)), Image.new('L', (16, 16), 255), prompt, n=1, steps=2)[0].size == (16, 16)

def test_which_weights(pipe, tmp_path):
    average = {k: v.clone() for k, v in pipe.model.state_dict().items()}
    save_checkpoint(tmp_path/'step_1', pipe.recipe, average, {k: v + .01 for k, v in average.items()}, step=1)
    weights = lambda **kw: next(iter(MDMPipeline.from_pretrained(tmp_path, device='cpu', **kw).model.state_dict().values()))
    assert torch.equal(weights(raw=True), weights() + .01)

def test_there_and_back():
    dots = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16).to(torch.uint8)
    picture = Image.fromarray(dots[0].permute(1, 2, 0).numpy())
    assert same(to_pil(from_pil(picture)), [picture], 0)

def test_options_are_the_fields_of_the_settings(pipe):
    "Nothing is copied by hand: a new field of `SampleConfig` is an argument of every call."
    names = [f.name for f in fields(SampleConfig)]
    for call in (pipe.config, pipe.__call__, pipe.upscale, pipe.img2img, pipe.inpaint):
        shown = inspect.signature(call).parameters
        assert [k for k in shown if k in names] == names and all(shown[k].default is None for k in names), call
        assert 'kwargs' not in shown and 'changes' not in shown
    with pytest.raises(TypeError, match='choose from steps, guidance'): pipe.config(zzz=1)

def test_noise_of_the_device(pipe):
    "On the CPU both sources are the same; on a GPU the picture still does not depend on its batch."
    assert same(pipe(prompt, n=2, device_noise=True, solver='ddpm'), pipe(prompt, n=2, solver='ddpm'), 0)

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
def test_noise_of_a_gpu(pipe):
    try:
        whole = pipe.to('cuda')(prompt, n=3, device_noise=True, solver='ddpm')
        assert same(pipe(prompt, n=1, seed=2, device_noise=True, solver='ddpm'), whole[2:], 3)
    finally: pipe.to('cpu')

@pytest.fixture(scope='module')
def shapes(): return MDMPipeline.from_pretrained('shapes', device='cpu', bf16=False)

def test_the_default_is_near_the_exact_answer():
    "ddim with uniform spacing, once the default, is 0.035 away from what very many steps find; the default is below a third of that."
    shapes_v = MDMPipeline.from_pretrained('shapes_v', device='cpu', bf16=False)
    captions = shapes_captions(3, held_out=True, seed=7, plain=True)
    def end(**changes):
        for step in shapes_v.steps(captions, config=shapes_v.config(**changes)): pass
        return step.x[0].clamp(-1, 1)
    answer = end(steps=120, solver='unipc', spacing='logsnr')
    far = lambda **changes: (end(**changes) - answer).square().mean().sqrt().item()
    assert far() < .01 < far(steps=25, solver='ddim', spacing='uniform')
    assert shapes_v.recipe.sample == SampleConfig()                                    # what a recipe gets that does not mention sampling

def test_the_default_draws_what_captions_say(shapes):
    captions = [caption(random_shape(7, i, True)[0]) for i in range(32)]               # the plainest wording
    assert prompt_accuracy(shapes(captions, n=1, batch_size=32), captions)['all'] > .95

@pytest.mark.parametrize('name', ['cc12m_64x64', 'cc12m_256x256', 'cc12m_1024x1024'])
def test_recipes_of_released_models_keep_their_sampling(name):
    assert load_recipe(name).sample == SampleConfig(steps=50, guidance=3., solver='ddim', spacing='uniform', threshold='clip')

def test_a_guide_takes_the_place_of_the_empty_prompt(pipe, calls):
    "Pushed away from another model with its own text encoder; a batch is not doubled, and the pictures do not depend on their batch."
    torch.manual_seed(1)
    weak = create_model(pipe.recipe.model, pipe.recipe.text.dim)
    weak.load_state_dict({k: v + .02*torch.randn_like(v) for k, v in pipe.model.state_dict().items()})
    guide = MDMPipeline(weak, pipe.recipe, device='cpu', bf16=False)
    guided = pipe(prompt, n=3, guide=guide)
    assert calls == [3]*4
    assert not same(guided, pipe(prompt, n=3)) and not same(guided, pipe(prompt, n=3, guidance=1.))
    assert same(pipe(prompt, n=3, batch_size=2, guide=guide), guided)
    assert same(pipe(prompt, n=1, guide=pipe), pipe(prompt, n=1, guidance=1.))                 # its own guide does nothing
    small = guided[0].resize((8, 8))
    assert len(pipe.upscale(small, prompt, n=1, guide=guide)) == 1 and len(pipe.img2img(guided[0], prompt, n=1, guide=guide)) == 1

def test_a_guide_that_does_not_fit(pipe, calls):
    recipe = load_recipe('shapes', tiny)
    recipe.model = recipe.model.inner
    flat = MDMPipeline(create_model(recipe.model, 16), recipe, device='cpu', bf16=False)
    with pytest.raises(ValueError, match='a negative prompt and a guide do not go together'): pipe(prompt, negative_prompt='blur', guide=pipe)
    with pytest.raises(ValueError, match=r'the guide has the resolutions \[1\], and the model \[2, 1\]'): pipe(prompt, guide=flat)
    with pytest.raises(ValueError, match='a guide does nothing'): pipe(prompt, guide=pipe, guidance=1.)
    assert not calls

def test_joining_late_is_for_models_whose_inner_network_was_trained_alone(pipe, calls):
    with pytest.raises(ConfigError, match='sample.join: found 0.5, expected 1: the network model.inner was only trained inside another one'): pipe(prompt, join=.5)
    assert not calls
    mixed = MDMPipeline(pipe.model, load_recipe('shapes', tiny + ['diffusion.mixed_ratio=[2,1]', 'sample.join=0.5', 'sample.spacing=trailing']), device='cpu', bf16=False)
    pictures = mixed(prompt, n=2)
    assert calls == [4, 4] and len(pictures) == 2                                              # t = 1000, 750 inside alone; 500, 250
    assert same(mixed(prompt, n=2, join=1.), pipe(prompt, n=2, spacing='trailing'), 0)
    with pytest.raises(ConfigError, match='sample.join: found 0.5'): load_recipe('shapes', tiny + ['sample.join=0.5'])

def test_emoji_joins_late():
    "Its inner network was trained alone, inside the recipe emoji_32, and its recipe says so."
    emoji = MDMPipeline.from_pretrained('emoji', device='cpu')
    late, usual = (emoji('red apple', n=1, steps=4, join=o) for o in (.5, 1.))
    assert not same(late, usual) and abs(pixels(late[0]) - pixels(usual[0])).mean() < 20

# ---- what stands beside a picture, and masks

@pytest.mark.parametrize('guidance', [1., 3.])
def test_a_picture_in_bf16_does_not_depend_on_the_prompts_beside_it(guidance):
    bundled = MDMPipeline.from_pretrained('shapes', device='cpu', bf16=True)
    alone, = bundled(prompt, n=1, steps=3, guidance=guidance)
    for other in (f'{prompt} '*3, f'{prompt} '*8, ''): assert same(bundled([prompt, other], n=1, steps=3, guidance=guidance)[:1], [alone], 0)

def test_prompts_are_padded_in_bf16_alone(pipe):
    assert pipe.encode(['a b'])[0].shape[1] == 3
    half = MDMPipeline(pipe.model, pipe.recipe, device='cpu', bf16=True)
    assert [o.shape[1] for o in half.encode(['a b', 'c'])] == [32, 32] and half.encode(['a b', 'c'])[1].sum() == 5

def layer(colour, mode='RGBA'):
    "A transparent layer with an opaque spot in one corner."
    image = Image.new('RGBA', (16, 16), (255, 255, 255, 0)); image.paste((*colour, 255), (0, 0, 8, 8))
    return image.convert(mode)

@pytest.mark.parametrize('mask', [layer((0, 0, 0)), layer((255, 255, 255)), layer((255, 0, 0)), layer((0, 0, 0), 'LA'), layer((0, 0, 0)).quantize()], ids=['black', 'white', 'red', 'grey', 'palette'])
def test_the_opacity_of_a_transparent_mask_is_the_mask(pipe, mask, recwarn):
    picture = to_pil(torch.rand(1, 3, 16, 16)*2 - 1)[0]
    changed = (pixels(pipe.inpaint(picture, mask, prompt, n=1)[0]) != pixels(picture)).any(2)
    assert changed[:8, :8].mean() > .9 and not changed[8:].any() and not changed[:, 8:].any() and not recwarn

def test_an_opaque_mask_counts_by_its_colours(pipe, recwarn):
    mask = Image.new('RGBA', (16, 16), 'black'); mask.paste('white', (0, 0, 8, 8))
    changed = (pixels(pipe.inpaint(picture := to_pil(torch.rand(1, 3, 16, 16)*2 - 1)[0], mask, prompt, n=1)[0]) != pixels(picture)).any(2)
    assert changed[:8, :8].mean() > .9 and not changed[8:].any() and not recwarn

@pytest.mark.parametrize('mask, said', [(Image.new('L', (16, 16)), 'nothing is painted'), (Image.new('L', (16, 16), 100), 'nothing is painted'), (Image.new('RGBA', (16, 16), (255,)*3 + (0,)), 'nothing is painted'),
    (Image.new('RGB', (16, 16), 'white'), 'whole picture')])
def test_a_mask_of_one_value_is_questioned(pipe, mask, said):
    with pytest.warns(UserWarning, match=said): pipe.inpaint(Image.new('RGB', (16, 16)), mask, prompt, n=1, steps=2)

# ---- weights in bfloat16

class Conversions(TorchDispatchMode):
    "Counts how often each weight of a model is converted to bfloat16."
    def __init__(self, model):
        super().__init__()
        self.names, self.counts = {p.data_ptr(): name for name, p in model.named_parameters()}, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get('dtype') == torch.bfloat16 and args[0].data_ptr() in self.names:
            self.counts[self.names[args[0].data_ptr()]] += 1
        return func(*args, **kwargs or {})

@pytest.fixture
def half(pipe): return MDMPipeline(create_model(pipe.recipe.model, 16), pipe.recipe, device='cpu', bf16=True)

def test_each_weight_is_converted_once(half, tmp_path):
    "Not once per step: in a call of the pipeline, in a run of pictures of captions, and in a widget."
    def in_widget():
        settings = SamplerSettings(prompt, n=1, sides=[dict(checkpoint='half', recipe='')])
        widget.live.value = False
        return widget._sample(SamplerRun(settings, [Side(half, settings)]))
    widget = SamplerWidget(half)
    widget.wait(60)
    (tmp_path/'pictures').mkdir()
    for draw in (lambda: half(prompt, n=1), lambda: sample_missing(half, tmp_path, [prompt]), in_widget):
        with Conversions(half.model) as mode: draw()
        assert len(mode.counts) > 50 and set(mode.counts.values()) == {1}, mode.counts
    with Conversions(half.model) as mode: list(half.steps([prompt]))
    assert set(mode.counts.values()) == {4}                  # by itself a generator keeps nothing between its steps
    half.model.requires_grad_(False)
    with Conversions(half.model) as mode: half(prompt, n=1)
    assert set(mode.counts.values()) == {4}                  # nor does PyTorch keep weights that take no gradient

def test_weights_that_were_changed_count(half):
    "Nothing that was converted outlives a call, a stopped or failed one neither."
    before = pixels(half(prompt, n=1)[0])
    def fail(*args): raise RuntimeError('mine')
    half(prompt, n=1, progress=lambda *args: False)
    with pytest.raises(RuntimeError, match='mine'): half(prompt, n=1, progress=fail)
    with torch.no_grad():
        for p in half.model.parameters(): p += .2*torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    fresh = MDMPipeline(copy.deepcopy(half.model), half.recipe, device='cpu', bf16=True)
    after = pixels(half(prompt, n=1)[0])
    assert (after == pixels(fresh(prompt, n=1)[0])).all() and (after != before).any()

def test_the_caller_computes_as_before(half):
    "`progress` and the loop around the steps are under the autocast that they are under outside."
    a, seen = torch.randn(4, 4), []
    half(prompt, n=1, progress=lambda *args: seen.append((a @ a).dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16): half(prompt, n=1, progress=lambda *args: seen.append((a @ a).dtype))
    assert seen == 4*[torch.float32] + 4*[torch.bfloat16] and (a @ a).dtype == torch.float32
