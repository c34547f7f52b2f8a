"Networks of clips: what the notebook does not show."
import copy, pickle, sys
import pytest, torch
from PIL import Image
from torch import nn
from mdm.checkpoint import load_model, save_checkpoint
from mdm.cli.sample import mdm_sample
from mdm.diffusion.objective import Diffusion, DiffusionConfig, pyramid
from mdm.diffusion.sampler import for_inpaint, sample
from mdm.diffusion.settings import SampleConfig
from mdm.models.adapters import adapter_config, add_adapter, choose_layers
from mdm.models.clips import ClipScale, ClipUNet, ClipUNetConfig, TemporalAttention, for_animate, from_tiles, to_tiles
from mdm.models.nested_unet import NestedUNet, NestedUNetConfig, create_model, model_scales
from mdm.models.unet import UNetConfig
from mdm.pipeline import MDMPipeline
from mdm.recipe import RecipeError, build_recipe, load_recipe, recipe_dict, save_recipe
from mdm.training.callbacks import Previews
from mdm.training.learner import build_model, grown_networks, mdm_learner
from mdm.training.optimizers import Muon
from mdm.training.run import random_data
from mdm.utils.configs import ConfigError, violations

shape = dict(num_resnets=[1, 1, 1], time_dim=16, num_groups=4)
picture = UNetConfig([8, 8], [1, 1], [0, 1], time_dim=16, num_groups=4)
four = ClipUNetConfig(channels=[8, 8, 8], num_attention_layers=[0, 1, 0], num_temporal_attention_layers=[1, 0, 1], inner=picture, **shape)
sixteen = ClipUNetConfig(channels=[8, 8, 8], num_attention_layers=[0, 0, 1], num_temporal_attention_layers=[0, 0, 1], temporal_positional_encoding=True, inner=four, **shape)
large = ClipUNetConfig(channels=[8, 8], num_resnets=[1, 1], num_attention_layers=[1, 0], num_temporal_attention_layers=[0, 1], temporal_spatial_ds=True, time_dim=16, num_groups=4, inner=four)

def lively(model):
    "A network whose last layers do not start at zero."
    torch.manual_seed(1)
    for p in model.parameters(): p.data += .1*torch.randn_like(p)
    return model.eval()

@pytest.fixture(scope='module')
def nets(): return {k: lively(create_model(c, 6)) for k, c in dict(sixteen=sixteen, large=large).items()}

def batch(model, side=8, n=2):
    torch.manual_seed(0)
    return [torch.randn(n, 3, side*s, side*s) for s in model.scales], torch.tensor([3, 700])[:n], torch.randn(n, 5, 6), torch.tensor([[1., 1, 1, 1, 1], [1, 1, 0, 0, 0]])[:n]

@pytest.mark.parametrize('name', ['sixteen', 'large'])
def test_text_reaches_every_frame_of_its_own_clip(nets, name):
    "The prompt of one sample changes all frames of its clip, and nothing of another one; padding is not seen."
    model = nets[name]
    x, t, words, mask = batch(model)
    with torch.no_grad():
        before = model(x, t, words, mask)
        other, padding = words.clone(), words.clone()
        other[1, :2] += 1; padding[1, 2:] += 9
        changed, same = model(x, t, other, mask), model(x, t, padding, mask)
    for a, b, c, scale in zip(before, changed, same, model.scales):
        frames = getattr(scale, 'frames', 1)
        differs = (from_tiles(a - b, frames).abs().amax((2, 3, 4)) > 1e-6).tolist()
        assert differs == [[False]*frames, [True]*frames] and torch.allclose(a, c, atol=1e-5)

@pytest.mark.parametrize('name', ['sixteen', 'large'])
def test_frames_know_each_other(nets, name):
    "The first frame of the highest resolution changes with the last one."
    model = nets[name]
    x, t, words, mask = batch(model)
    frames = model.scales[0].frames
    clip = from_tiles(x[0], frames).clone()
    clip[:, -1] += 1
    with torch.no_grad(): a, b = model(x, t, words, mask)[0], model([to_tiles(clip), *x[1:]], t, words, mask)[0]
    assert (from_tiles(a - b, frames)[:, 0].abs() > 1e-6).any()

def test_input_is_normalized_frame_by_frame():
    "A frame of ten times the contrast gives the same first features."
    model = create_model(four, 6).eval()
    tiles = torch.randn(2, 3, 16, 16)
    clip = from_tiles(tiles, 4).clone()
    clip[:, 2] *= 10
    assert torch.allclose(model.stem(to_tiles(clip)), model.stem(tiles), atol=1e-5)

def test_mixed_batches_and_every_kind_of_training(nets):
    "A mixed batch, bfloat16, channels last and activation checkpointing: the same loss and gradients as without, as near as they should be."
    model, found = copy.deepcopy(nets['sixteen']).train(), {}
    d = Diffusion(DiffusionConfig(shifted=True, double_loss=True, mixed_ratio=[1., 0.5, 0.5]), model.scales)
    clips, words, mask = torch.rand(4, 3, 32, 32)*2 - 1, torch.randn(4, 5, 6), torch.ones(4, 5)
    for how in ('plain', 'checkpointing', 'channels_last', 'bf16'):
        model.activation_checkpointing = how == 'checkpointing'
        if how == 'channels_last': model = model.to(memory_format=torch.channels_last)
        model.zero_grad()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=how == 'bf16'):
            loss = d.loss(model, clips, words, mask, generator=torch.Generator().manual_seed(3))
        loss.loss.backward()
        assert [len(o) for o in loss.preds] == [2, 3, 4]
        found[how] = loss.loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for how, (value, grads) in found.items():
        near = .05 if how == 'bf16' else 1e-4
        assert abs(value - found['plain'][0]) < near*value and (grads - found['plain'][1]).norm() < 3*near*grads.norm(), how
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert not unused and sum(isinstance(o, TemporalAttention) for o in model.modules()) > 3

def test_muon_takes_weights_over_frames():
    "Convolutions over frames and attention over frames are matrices for Muon; what positions are rotated by is no parameter."
    wide = ClipUNetConfig(channels=[16, 16, 16], num_attention_layers=[0, 0, 0], num_temporal_attention_layers=[0, 0, 1], temporal_positional_encoding=True,
                          inner=UNetConfig([16, 16], [1, 1], [0, 0], time_dim=16, num_groups=4), **shape)
    model = create_model(wide)
    named = dict(model.named_parameters())
    assert not any('freqs' in name for name in named) and any('freqs' in name for name in model.state_dict())
    matrices = {name for name, p in named.items() if Muon.is_matrix(p)}
    assert {'down_blocks.0.resample.weight', 'down_blocks.2.t_attn.0.attn.qkv.weight', 'down_blocks.2.t_attn.0.down_conv.weight'} <= matrices

def test_adapters_reach_layers_over_frames(nets):
    model = copy.deepcopy(nets['sixteen'])
    layers = choose_layers(model)
    assert 'down_blocks.0.resample' in layers and 'down_blocks.2.t_attn.0.attn.qkv' in layers
    x, t, words, mask = batch(model)
    with torch.no_grad():
        before = model(x, t, words, mask)
        add_adapter(model, adapter_config(layers, 2))
        for a, b in zip(before, model(x, t, words, mask)): assert torch.allclose(a, b, atol=1e-5)

def test_scales_survive_copies():
    top = ClipScale(4, 16)
    for o in (pickle.loads(pickle.dumps(top)), copy.deepcopy([top])[0]): assert o == 4 and o.frames == 16 and o.pixels == 1
    assert [top, 2, 1] == [4, 2, 1] and f'{[top]}' == '[4]'

@pytest.mark.parametrize('config, said', [
    (dict(channels=[8, 8], num_resnets=[1, 1], num_attention_layers=[0, 0]), 'an odd number of levels'),
    (dict(num_temporal_attention_layers=[1]), 'num_temporal_attention_layers: found [1], expected 3 entries'),
    (dict(channels=[40, 40, 40], num_temporal_attention_layers=[0, 0, 1]), 'multiples of 32'),
    (dict(temporal_positional_encoding=True), 'temporal_positional_encoding: found True, expected false'),
    (dict(temporal_mode=False), 'temporal_mode: found False'), (dict(mid_blocks=True), 'the inner network is the middle')])
def test_what_a_network_of_clips_cannot_have(config, said):
    with pytest.raises(ConfigError) as e: create_model(ClipUNetConfig(**{**shape, 'channels': [8, 8, 8], 'num_attention_layers': [0, 0, 0], 'inner': picture, **config}))
    assert said in str(e.value)

def test_a_picture_network_around_clips_is_refused():
    with pytest.raises(ConfigError, match='temporal_mode: found False, expected true: the network inside is one of clips'):
        create_model(NestedUNetConfig(channels=[8, 8], num_resnets=[1, 1], num_attention_layers=[0, 0], time_dim=16, num_groups=4, inner=four))

# ---- recipes

tiny = '''model.channels=[8,8,8] model.inner.channels=[8,8,8] model.inner.inner.channels=[8,8] model.inner.inner.num_resnets=[1,1] model.inner.inner.num_attention_layers=[0,1] model.num_groups=4 model.inner.num_groups=4
    model.inner.inner.num_groups=4 model.time_dim=16 model.inner.time_dim=16 model.inner.inner.time_dim=16 model.inner.inner.num_text_layers=0 text.dim=8 data.image_size=8 train.bf16=false sample.steps=2'''.split()

@pytest.fixture(scope='module')
def recipe(): return load_recipe('moving_shapes_16', tiny)

def test_the_preset_is_a_nest_of_clips():
    "Forward, loss and a step of sampling of the preset as it is, on random clips."
    recipe = load_recipe('moving_shapes')
    model = create_model(recipe.model, recipe.text.dim)
    scales = model_scales(recipe.model)
    assert [type(o) for o in (model, model.inner_unet, model.inner_unet.inner_unet)] == [ClipUNet]*3 and scales[0].frames == recipe.data.frames == 16
    d, side, words = Diffusion(recipe.diffusion, model.scales), recipe.data.side, torch.randn(1, 4, recipe.text.dim)
    loss = d.loss(model, torch.rand(1, 3, side, side)*2 - 1, words, torch.ones(1, 4))
    assert loss.loss.isfinite() and [o.shape[-1] for o in loss.preds] == [side*s//scales[0] for s in scales]
    drawn = sample(model, d, side, words, config=SampleConfig(steps=1, guidance=1.))
    assert drawn[0].shape == (1, 3, side, side) and sum(p.numel() for p in model.parameters()) < 12e6

def test_recipes_of_clips_are_read_and_written(recipe, tmp_path):
    assert load_recipe(save_recipe(recipe, tmp_path/'r.yaml') or tmp_path/'r.yaml') == recipe
    assert isinstance(recipe.model, ClipUNetConfig) and isinstance(recipe.model.inner, ClipUNetConfig) and not isinstance(recipe.model.inner.inner, ClipUNetConfig)

@pytest.mark.parametrize('change, said', [
    ('data.frames=4', 'data.frames: found 4, expected 16, as the clips of the model have'),
    ('data.frames=5', 'data.frames: found 5, expected a square number'),
    ('data.image_size=9', 'data.image_size: found 9, expected a multiple of 2 that is at least 8'),
    ('data.buckets=[auto]', 'data.buckets'),
    ('model.inner.temporal_mode=false', 'model.inner.temporal_positional_encoding: found True; only a network of clips'),
    ('model.inner.inner.temporal_mode=true', 'model.inner.inner.temporal_mode: only a nested model')])
def test_recipes_check_clips(change, said):
    with pytest.raises(RecipeError) as e: load_recipe('moving_shapes_16', [*tiny, change])
    assert said in str(e.value)

def test_a_picture_model_takes_no_clips():
    with pytest.raises(RecipeError, match='data.frames: found 16, expected 1: this model draws pictures'): load_recipe('shapes', ['data.frames=16'])
    assert load_recipe('shapes', ['model.temporal_mode=false']) == load_recipe('shapes')

# ---- a trained picture model inside

def test_a_picture_model_becomes_the_innermost_network(recipe, tmp_path):
    "`inner_from` of the network around it; the clip model then draws its pictures."
    values = recipe_dict(recipe)
    values['model'], values['name'] = values['model']['inner']['inner'], 'pictures'
    values['data']['frames'] = 1
    alone = build_recipe(values)
    trained = lively(create_model(alone.model, 8))
    path = save_checkpoint(tmp_path/'pictures', alone, trained.state_dict())
    clips = load_recipe('moving_shapes_16', [*tiny, f'model.inner.inner_from={path}'])
    model = build_model(clips, 8).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    words = torch.randn(2, 4, 8)
    with torch.no_grad():
        wanted = trained([x], t, words)[0]
        found = model([torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16), x], t, words)[-1]
    assert torch.equal(wanted, found) and grown_networks(model) == [model.inner_unet.inner_unet]

def test_checkpoints_of_clips(recipe, tmp_path):
    model = lively(create_model(recipe.model, 8))
    again, read = load_model(save_checkpoint(tmp_path/'c', recipe, model.state_dict()))
    assert read.model == recipe.model and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())

# ---- sampling

class Still(nn.Module):
    "A network that always predicts the same clean clip, at every resolution."
    def __init__(self, clip, scales):
        super().__init__()
        self.scales, self.clips, self.config = scales, pyramid(clip, scales), None
    def forward(self, x, t, *_): return [c.expand_as(o) for o, c in zip(x, self.clips[-len(x):])]

def test_first_frames_are_held_and_the_rest_is_drawn():
    scales = model_scales(large)
    clip, first = torch.rand(1, 3, 32, 32)*2 - 1, torch.rand(1, 3, 16, 16)*2 - 1
    d = Diffusion(DiffusionConfig(shifted=True, prediction='x0'), scales)
    for solver in ('ddim', 'ddpm', 'unipc', 'dpm++2m'):
        drawn = sample(Still(clip, scales), d, 32, given=for_animate(first, scales), config=SampleConfig(steps=4, guidance=1., solver=solver))
        small = nn.functional.avg_pool2d(first, 2)
        for out, wanted, kept, frames in zip(drawn, pyramid(clip, scales), (first, small, small), (4, 4, 1)):
            found, wanted = from_tiles(out, frames), from_tiles(wanted, frames)
            assert torch.allclose(found[:, 0], kept, atol=1e-4), solver
            assert torch.allclose(found[:, 1:], wanted[:, 1:], atol=1e-3), solver

def test_filling_in_keeps_frames():
    "A mask over half of the frames: the others stay, at every resolution."
    scales = model_scales(sixteen)
    clip, new = torch.rand(1, 3, 32, 32)*2 - 1, torch.rand(1, 3, 32, 32)*2 - 1
    mask = to_tiles((torch.arange(16).view(1, 16, 1, 1, 1) >= 8).expand(1, 16, 1, 8, 8).float())
    d = Diffusion(DiffusionConfig(shifted=True, prediction='x0'), scales)
    drawn = sample(Still(new, scales), d, 32, given=for_inpaint(clip, mask, scales), config=SampleConfig(steps=3, guidance=1.))
    for out, old, other, frames in zip(drawn, pyramid(clip, scales), pyramid(new, scales), (16, 4, 1)):
        out, old, other = (from_tiles(o, frames) for o in (out, old, other))
        later = [k for k in range(frames) if k*16//frames >= 8]
        for k in range(frames): assert torch.allclose(out[:, k], (other if k in later else old)[:, k], atol=1e-3), (frames, k)

@pytest.mark.parametrize('options', [dict(guidance=3.), dict(guidance=3., guidance_networks='inner'), dict(guidance=3., join=.5), dict(solver='ddpm'), dict(guidance=2., guidance_parallel=0.)])
def test_sampling_options_work_on_clips(nets, options):
    model = nets['sixteen']
    d = Diffusion(DiffusionConfig(shifted=True, double_loss=True, mixed_ratio=[1., 1., 1.]), model.scales)
    _, _, words, mask = batch(model)
    drawn = sample(model, d, 32, words, mask, words[:, :2]*0, config=SampleConfig(steps=3, **options))
    assert [o.shape[-1] for o in drawn] == [32, 16, 8] and all(o.isfinite().all() for o in drawn)

# ---- the pipeline, training and commands

@pytest.fixture(scope='module')
def pipe(recipe):
    torch.manual_seed(0)
    return MDMPipeline(create_model(recipe.model, 8), recipe, device='cpu')

def test_training_steps_previews_and_samples(recipe, tmp_path):
    "Two steps on random clips, a sheet of previews that plays, and a checkpoint from which mdm_sample draws."
    r = load_recipe('moving_shapes_16', [*tiny, f'train.output={tmp_path/"run"}', 'train.batch_size=2', 'train.steps=2', 'train.warmup_steps=0', 'train.preview_every=2', 'train.save_every=2', 'train.compile=false'])
    dls, encoder = random_data(r, 2)
    pictures = next(iter(dls.train))[0]
    assert pictures.shape == (2, 3, 32, 32)
    learn = mdm_learner(dls, r, encoder=encoder)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit_steps(2)
    moved = {k for k, v in learn.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {'down_blocks.0.resample.weight', 'down_blocks.2.t_attn.0.up_conv.weight', 'inner_unet.down_blocks.0.t_attn.0.up_conv.weight', 'in_adapter.weight'} <= moved and not any('freqs' in k for k in moved)
    drawn = MDMPipeline(learn.model, r, device='cpu')
    previews = Previews(lambda: drawn, ['a red circle moves', 'a blue ring stays'], tmp_path/'p', 1)
    previews.learn = learn
    previews.act()
    assert sorted(p.suffix for p in (tmp_path/'p').iterdir()) == ['.gif', '.png']
    folder = save_checkpoint(tmp_path/'c', r, learn.model.state_dict())
    assert mdm_sample([str(folder), 'a red circle moves', '--n', '2', '--output', str(tmp_path/'out'), '--steps', '1', '--every-resolution', '--device', 'cpu']) == 0
    names = sorted(p.relative_to(tmp_path/'out').as_posix() for p in (tmp_path/'out').rglob('*.*'))
    assert '0001.png' in names and '0001.gif' in names and '0001/000_seed0.gif' in names and '0001/000_seed0_4x8px.gif' in names and '0001/001_seed1_8px.png' in names
    assert Image.open(tmp_path/'out'/'0001'/'000_seed0.png').text['prompt'] == 'a red circle moves'
    first = tmp_path/'first.png'
    Image.new('RGB', (8, 8), 'red').save(first)
    assert mdm_sample([str(folder), 'a red circle moves', '--n', '1', '--animate', str(first), '--film', 'webp', '--output', str(tmp_path/'one.png'), '--steps', '1', '--device', 'cpu']) == 0
    film = Image.open(tmp_path/'one.webp')
    assert film.n_frames > 1 and (tmp_path/'one.png').exists()

def test_a_film_that_cannot_be_written_is_refused_before_the_work(pipe, tmp_path, monkeypatch, capsys):
    "MP4 without PyAV: said before anything is drawn or any folder is made; a model of pictures does not care."
    monkeypatch.setitem(sys.modules, 'av', None)
    folder = save_checkpoint(tmp_path/'c', pipe.recipe, pipe.model.state_dict())
    ask = 'a red circle moves', '--film', 'mp4', '--n', '1', '--steps', '1', '--device', 'cpu', '--output'
    assert mdm_sample([str(folder), *ask, str(tmp_path/'out')]) == 2 and not (tmp_path/'out').exists()
    assert 'matryoshka-diffusion[video]' in capsys.readouterr().err
    assert mdm_sample(['shapes', *ask, str(tmp_path/'out')]) == 0

def test_pipeline_gives_clips(pipe):
    drawn = pipe('a red circle', n=3, batch_size=2, every_resolution=True, steps=1)
    assert [[type(o).__name__ for o in level] for level in drawn] == [['Clip']*3, ['Clip']*3, ['Image']*3] and [len(drawn[0][0]), len(drawn[1][0])] == [16, 4]
    alone = pipe('a red circle', n=1, seed=2, steps=1)[0]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(alone.frames, drawn[0][2].frames))
    wide = pipe('a red circle', n=1, size='16x8', steps=1)[0]
    assert wide.size == (16, 8)
    with pytest.raises(ValueError, match='the nearest size is 16x8'): pipe('a', size='17x7')

def test_a_given_first_frame_is_drawn(pipe):
    first = Image.new('RGB', (8, 8), (255, 127, 3))
    for options in (dict(steps=2), dict(steps=2, solver='ddpm'), dict(steps=2, guidance=2.)):
        clip = pipe.animate(first, 'it moves', n=1, **options)[0]
        assert clip.frames[0].tobytes() == first.tobytes() != clip.frames[5].tobytes()
