"A checkpoint as a pipeline of diffusers: the same pictures, callbacks and schedulers as its users expect, and the way there and back."
import io, json, shutil, sys
import diffusers, numpy as np, pytest, torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import dynamic_modules_utils
import mdm.share.diffusers as share
from mdm.checkpoint import save_checkpoint
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.recipe import load_recipe
from mdm.share.diffusers import HashTextEncoder, MDMDiffusionPipeline, MDMScheduler, MDMUNet, add_model_index, from_diffusers, to_diffusers
from mdm.utils.configs import ConfigError
from mdm.utils.files import bundled

prompt = 'a large red cross in the centre on a white background'
seeds = lambda n, first=0: [torch.Generator().manual_seed(first + k) for k in range(n)]
pixels = lambda pictures: np.stack([np.asarray(o) for o in pictures]).astype(int)

def random_model(*changes, plain=False):
    recipe = load_recipe('shapes', ['model.channels=[8,8]', 'model.time_dim=32', 'model.num_groups=4', 'model.inner.channels=[8,8]', 'model.inner.num_resnets=[1,1]', 'model.inner.num_attention_layers=[0,1]',
        'model.inner.time_dim=32', 'model.inner.num_groups=4', 'text.dim=16', 'data.image_size=16', 'sample.steps=4', 'train.bf16=false', *changes])
    if plain: recipe.model = recipe.model.inner
    torch.manual_seed(0)
    model = create_model(recipe.model, 16)
    for p in model.parameters(): p.data += .05*torch.randn_like(p)
    return MDMPipeline(model, recipe, device='cpu')

@pytest.fixture(scope='module', autouse=True)
def modules_in(tmp_path_factory):
    "diffusers copies pipeline.py into a folder of the user: into one of the test."
    with pytest.MonkeyPatch.context() as m:
        m.setattr(dynamic_modules_utils, 'HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
        m.setattr('sys.path', [*sys.path])
        yield

@pytest.fixture(scope='module')
def ours(): return random_model()

@pytest.fixture(scope='module')
def plain(): return random_model(plain=True)

def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe

@pytest.fixture(scope='module')
def made(ours): return quiet(MDMDiffusionPipeline.from_mdm(ours))

@pytest.fixture
def pipe(made):
    scheduler = made.scheduler
    yield quiet(made)
    made.scheduler = scheduler

@pytest.mark.parametrize('wishes', [{}, dict(solver='ddpm'), dict(eta=.7), dict(solver='consistency', segments=2), dict(guidance_parallel=.2, guidance_momentum=-.5), dict(guidance_networks='inner'),
    dict(solver='dpm++2m', threshold='dynamic', guidance_interval=(.2, .8)), dict(guidance=1., spacing='trailing')], ids=str)
def test_same_pictures(pipe, ours, wishes):
    want = ours([prompt, 'a blue circle'], n=2, seed=5, negative_prompt='green', every_resolution=True, **wishes)
    named = {'guidance_scale' if k == 'guidance' else k: v for k, v in wishes.items()}
    found = pipe([prompt, 'a blue circle'], negative_prompt='green', num_images_per_prompt=2, generator=seeds(4, 5), **named)
    for a, b in zip([found.images, *found.inner_images], want): assert (pixels(a) == pixels(b)).all()

def test_outer_networks_join_late():
    ours = random_model('diffusion.mixed_ratio=[2,1]', 'diffusion.double_loss=true')
    found = quiet(MDMDiffusionPipeline.from_mdm(ours))(prompt, generator=seeds(1), join=.6)
    assert (pixels(found.images) == pixels(ours(prompt, n=1, join=.6))).all() and not (pixels(found.images) == pixels(ours(prompt, n=1))).all()

@pytest.fixture(scope='module')
def bundled_folder(tmp_path_factory): return to_diffusers('shapes_fast', tmp_path_factory.mktemp('diffusers')/'shapes_fast')

def test_bundled_model_by_diffusers_and_back(bundled_folder, tmp_path):
    "diffusers itself loads the folder; the weights have our names; both ways the same pictures, in bfloat16 as the recipe says."
    found = quiet(DiffusionPipeline.from_pretrained(bundled_folder, trust_remote_code=True))
    want = MDMPipeline.from_pretrained('shapes_fast', device='cpu')
    assert type(found) is MDMDiffusionPipeline and found.autocasts and list(found.unet.state_dict()) == list(want.model.state_dict())
    again = quiet(DiffusionPipeline.from_pretrained(str(bundled_folder), custom_pipeline=str(bundled_folder/'pipeline.py'), trust_remote_code=True))
    pictures = pixels(want(prompt, n=2))
    assert (pixels(found(prompt, num_images_per_prompt=2, generator=seeds(2)).images) == pictures).all()
    assert all(torch.equal(a, b) for a, b in zip(again.unet.state_dict().values(), want.model.state_dict().values()))
    back = MDMPipeline.from_pretrained(from_diffusers(found, tmp_path/'back'), device='cpu')
    assert back.recipe == want.recipe and (pixels(back(prompt, n=2)) == pictures).all()

def test_code_of_a_folder_runs_only_when_it_is_trusted(bundled_folder, tmp_path):
    with pytest.raises(ValueError, match='trust_remote_code=True'): DiffusionPipeline.from_pretrained(bundled_folder)
    shutil.copytree(bundled_folder, tmp_path/'evil')
    (tmp_path/'evil'/'pipeline.py').write_text('raise SystemExit("ran")')
    assert type(MDMDiffusionPipeline.from_pretrained(tmp_path/'evil')) is MDMDiffusionPipeline          # needs no code from there

def test_our_folder_as_it_is(tmp_path):
    shutil.copytree(bundled/'shapes_fast', tmp_path/'own')
    with pytest.raises(FileNotFoundError, match='add_model_index'): MDMDiffusionPipeline.from_pretrained(tmp_path/'own')
    add_model_index(tmp_path/'own')
    want = MDMPipeline.from_pretrained(tmp_path/'own', device='cpu')(prompt, n=1, steps=1)
    pipe = quiet(DiffusionPipeline.from_pretrained(tmp_path/'own', custom_pipeline='pipeline', trust_remote_code=True))
    assert (pixels(pipe(prompt, num_inference_steps=1, generator=seeds(1)).images) == pixels(want)).all()
    for name in ('recipe.yaml', 'state.json'): (tmp_path/'own'/name).unlink()          # a download from the Hub has only the files that diffusers knows
    alone = quiet(MDMDiffusionPipeline.from_pretrained(tmp_path/'own'))
    assert (pixels(alone(prompt, num_inference_steps=1, generator=seeds(1)).images) == pixels(want)).all()

def test_weights_that_do_not_fit_are_refused(ours, tmp_path):
    add_model_index(save_checkpoint(tmp_path/'own', ours.recipe, ours.model.state_dict()))
    config = json.loads((tmp_path/'own'/'config.json').read_text())
    config['model']['channels'] = [16, 8]
    (tmp_path/'own'/'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='of another shape'): MDMUNet.from_pretrained(tmp_path/'own')

def test_settings_live_in_the_folder(pipe, tmp_path):
    "A changed scheduler is saved with the pipeline, ours or one of diffusers."
    pipe.scheduler = MDMScheduler.from_config(pipe.scheduler.config, sample=dict(steps=3, solver='ddim', guidance=2.))
    want = pixels(pipe(prompt, generator=seeds(1)).images)
    pipe.save_pretrained(tmp_path/'ours')
    assert (pixels(quiet(MDMDiffusionPipeline.from_pretrained(tmp_path/'ours'))(prompt, generator=seeds(1)).images) == want).all()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    want = pixels(pipe(prompt, generator=seeds(1)).images)
    pipe.save_pretrained(tmp_path/'ddim')
    found = quiet(DiffusionPipeline.from_pretrained(tmp_path/'ddim', trust_remote_code=True))
    assert type(found.scheduler) is diffusers.DDIMScheduler and (pixels(found(prompt, generator=seeds(1)).images) == want).all()
    found.scheduler = MDMScheduler.from_config(found.scheduler.config, diffusion=found.unet.config.diffusion, sample={}, scales=found.unet.scales)
    found(prompt)

def test_ddim_of_diffusers_is_ours(pipe, plain):
    "One scheduler for each resolution, with shifted noise or divided pictures, or for one resolution, draws as our solver does."
    models = [pipe, quiet(MDMDiffusionPipeline.from_mdm(plain)), quiet(MDMDiffusionPipeline.from_mdm(random_model('diffusion.shifted=false', 'diffusion.prediction=v')))]
    for pipe in models:
        ours, call = pipe.scheduler, dict(num_inference_steps=5, guidance_scale=2., output_type='np')
        want = pipe(prompt, generator=seeds(1), solver='ddim', spacing='trailing', **call)
        pipe.scheduler = diffusers.DDIMScheduler(timestep_spacing='trailing')
        found = pipe(prompt, generator=seeds(1), **call)
        for a, b in zip([found.images, *found.inner_images], [want.images, *want.inner_images]): assert abs(a - b).max() < 2e-3 and a.std() > .02
        pipe.scheduler = ours

@pytest.mark.filterwarnings('ignore::DeprecationWarning')       # of NumPy, about lines of diffusers
@pytest.mark.parametrize('name', share.fitting_schedulers)
def test_other_schedulers_that_fit(pipe, name):
    pipe.scheduler = getattr(diffusers, name)()
    a, b = (pipe(prompt, num_inference_steps=5, generator=seeds(1), output_type='pt').images for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all() and a.std() > .02

@pytest.mark.parametrize('scheduler, why', [(diffusers.EulerDiscreteScheduler(), 'not rescaled'), (diffusers.HeunDiscreteScheduler(), 'one call a step'), (diffusers.FlowMatchEulerDiscreteScheduler(), 'noise levels'),
    (diffusers.DDIMScheduler(rescale_betas_zero_snr=True), 'rescale_betas_zero_snr=False')], ids=lambda o: type(o).__name__)
def test_schedulers_that_do_not_fit(pipe, scheduler, why):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f'does not fit.*{why}'): pipe(prompt)

def test_scheduler_steps_raw_predictions_as_the_pipeline_does(plain):
    "The loop that users of diffusers write themselves, at one resolution."
    pipe = quiet(MDMDiffusionPipeline.from_mdm(plain))
    (words, mask), scheduler, draw = pipe.encode_prompt(prompt), pipe.scheduler, torch.Generator().manual_seed(0)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 3, 16, 16, generator=draw)*scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad(): pred = pipe.unet(scheduler.scale_model_input(x, t), t, words, mask)
        x = scheduler.step(pred, t, x, generator=draw).prev_sample
    want = pipe(prompt, num_inference_steps=4, guidance_scale=1., generator=seeds(1), output_type='pt').images
    assert torch.allclose((x/2 + .5).clamp(0, 1), want, atol=1e-5)

def test_callbacks_see_change_and_stop(pipe):
    seen = []
    def callback(p, i, t, tensors):
        seen.append((i, int(t), sorted(tensors), [list(o.shape) for o in [tensors['latents'], *tensors['inner_latents'], tensors['prompt_embeds']]]))
        return tensors
    names = ['latents', 'inner_latents', 'prompt_embeds', 'negative_prompt_embeds']
    a = pipe(prompt, num_images_per_prompt=2, generator=seeds(2), callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [o[0] for o in seen] == [0, 1, 2, 3] and [o[1] for o in seen] == pipe.scheduler.timesteps.tolist() and seen[0][2] == sorted(names)
    assert seen[0][3][:2] == [[2, 3, 16, 16], [2, 3, 8, 8]] and (pixels(a.images) == pixels(pipe(prompt, num_images_per_prompt=2, generator=seeds(2)).images)).all()
    black = pipe(prompt, generator=seeds(1), output_type='pt', callback_on_step_end=lambda p, i, t, x: {'latents': x['latents']*0 - 1})
    assert black.images.max() == 0 and black.inner_images[0].max() > 0
    def stop(p, i, t, tensors): p._interrupt = i == 1; count.append(i)
    count = []
    pipe(prompt, callback_on_step_end=stop)
    assert count == [0, 1]
    pipe(prompt, callback_on_step_end=lambda *args: count.append(len(args)))          # the next call is not interrupted
    assert count == [0, 1, 4, 4, 4, 4]
    with pytest.raises(ValueError, match='expected some of latents, inner_latents'): pipe(prompt, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=['noise'])

def test_a_progress_bar_counts_the_steps(pipe):
    pipe.set_progress_bar_config(file=(shown := io.StringIO()), mininterval=0)
    pipe(prompt)
    assert '4/4' in shown.getvalue()

def test_a_callback_of_diffusers_turns_guidance_off(pipe, ours):
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda m, args: calls.append(len(args[0][0])))
    pipe(prompt, guidance_scale=4., callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=.25))
    handle.remove()
    assert calls == [2, 2, 1, 1]

def test_calls(pipe):
    "Outputs, sizes, embeddings, first noise, and errors."
    a = pipe([prompt, 'dog'], generator=seeds(2), output_type='pt')
    assert a.images.shape == (2, 3, 16, 16) and a.inner_images[0].shape == (2, 3, 8, 8) and 0 <= a.images.min() <= a.images.max() <= 1
    b = pipe([prompt, 'dog'], generator=seeds(2), output_type='np', return_dict=False)
    assert b[0].shape == (2, 16, 16, 3) and np.allclose(b[0].transpose(0, 3, 1, 2), a.images)
    assert pipe(prompt, height=16, width=32).images[0].size == (32, 16)
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 3, o, o, generator=draw) for o in (16, 8)]
    words, mask = pipe.encode_prompt(prompt)
    empty, its_mask = pipe.encode_prompt('')
    c = pipe(prompt_embeds=words, prompt_attention_mask=mask, negative_prompt_embeds=empty, negative_prompt_attention_mask=its_mask, latents=noise, output_type='pt')
    assert torch.equal(c.images, pipe(prompt, generator=torch.manual_seed(0), output_type='pt').images)
    for wrong, why in ((dict(output_type='jpg'), "expected 'pil'"), (dict(generator=seeds(3)), 'one generator for each of the 1 pictures'), (dict(height=17), 'multiples of 4'), (dict(negative_prompt=['a', 'b']), 'one for each of the 1'),
                       (dict(prompt_embeds=words), 'give one of the two'), (dict(latents=noise[0]), 'latents: found shapes'), (dict(num_inference_steps=5000), 'diffusion.num_steps = 1000'), (dict(guidance_networks='outer'), 'guidance_networks')):
        with pytest.raises(ValueError, match=why): pipe(prompt, **wrong)
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match='solver: this is a setting of MDMScheduler'): pipe(prompt, solver='ddpm')

def test_half_precision(bundled_folder, tmp_path):
    "Weights in bfloat16 draw about the same picture, with all precision kept outside of the network."
    half = quiet(MDMDiffusionPipeline.from_pretrained(bundled_folder, dtype=torch.bfloat16))
    full = quiet(MDMDiffusionPipeline.from_pretrained(bundled_folder, bf16=False))
    assert half.unet.dtype == torch.bfloat16 and full.unet.dtype == torch.float32 and not full.autocasts and not half.autocasts
    a, b = (o(prompt, generator=seeds(1), output_type='pt').images for o in (half, full))
    assert a.dtype == torch.float32 and (a - b).abs().mean() < .03
    with pytest.raises(ValueError, match='float32'): half(prompt, guidance_scale=2., guidance_networks='inner')
    half.save_pretrained(tmp_path, variant='bf16')
    again = quiet(DiffusionPipeline.from_pretrained(tmp_path, variant='bf16', dtype=torch.bfloat16, trust_remote_code=True))
    assert (tmp_path/'unet'/'diffusion_pytorch_model.bf16.safetensors').is_file() and torch.equal(again(prompt, generator=seeds(1), output_type='pt').images, a)
    assert half.to(torch.float32).unet.dtype == torch.float32

def test_text_encoder_of_transformers(tmp_path):
    "Tokenizer and text encoder are components of transformers, saved and loaded with the pipeline; the folder they came from is not needed."
    from test_text import save_t5
    save_t5(tmp_path/'t5')
    recipe = load_recipe('shapes', [*(f'model.{k}' for k in ('channels=[8,8]', 'time_dim=32', 'num_groups=4', 'inner.channels=[8,8]', 'inner.num_resnets=[1,1]', 'inner.num_attention_layers=[0,0]', 'inner.time_dim=32',
        'inner.num_groups=4')), f'text.encoder={tmp_path/"t5"}', 'data.image_size=16', 'sample.steps=2', 'train.bf16=false'])
    torch.manual_seed(0)
    ours = MDMPipeline(create_model(recipe.model, 32), recipe, device='cpu')
    for p in ours.model.parameters(): p.data += .05*torch.randn_like(p)
    to_diffusers(ours, tmp_path/'out')
    shutil.rmtree(tmp_path/'t5')
    found = quiet(DiffusionPipeline.from_pretrained(tmp_path/'out', trust_remote_code=True))
    assert type(found.text_encoder).__module__.startswith('transformers') and found.tokenizer is not None
    assert (pixels(found(['a red circle', 'dog'], generator=seeds(2)).images) == pixels(ours(['a red circle', 'dog'], n=1))).all()

def test_moving_components_around(pipe, ours):
    "Components can be taken from one pipeline into another; configurations are checked."
    other = quiet(MDMDiffusionPipeline(**pipe.components, recipe=pipe.config.recipe))
    assert (pixels(other(prompt, generator=seeds(1)).images) == pixels(ours(prompt, n=1))).all()
    bare = quiet(MDMDiffusionPipeline(pipe.unet, pipe.scheduler, HashTextEncoder(dim=16)))
    assert bare(prompt).images[0].size == (16, 16)
    with pytest.raises(ConfigError, match='num_resnets'): MDMUNet({**pipe.unet.config.model, 'num_resnets': [1]})
