"The networks: what is refused in words, what stays finite, and a rehearsal of a GPU with fake tensors."
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from mdm.models.layers import masked_mean, time_features
from mdm.models.nested_unet import NestedUNet, NestedUNetConfig, create_model
from mdm.models.unet import UNet, UNetConfig
from mdm.utils.configs import ConfigError

@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad(): yield

def small(**kw):
    "A plain configuration of two levels."
    default = dict(channels=[16, 32], num_resnets=[1, 1], num_attention_layers=[0, 1], num_groups=8)
    return UNetConfig(**default | kw)

def nest(inner, **kw):
    "A configuration around another."
    default = dict(inner=inner, channels=[16, 16], num_resnets=[1, 1], num_attention_layers=[0, 0], num_groups=8)
    return NestedUNetConfig(**default | kw)

def awake(model):
    "Random parameters everywhere, since a new network predicts zero."
    for p in model.parameters(): p.data = torch.randn_like(p)*.05
    return model

@pytest.mark.parametrize('make', [UNet, create_model])
def test_a_time_dim_that_is_no_multiple_of_8_is_refused_in_words(make):
    with pytest.raises(ConfigError, match='time_dim: found 12, expected a multiple of 8'): make(small(time_dim=12))

@pytest.mark.parametrize('config,place,found', [
    (nest(small(time_dim=64), time_dim=32), 'time_dim', 32),
    (nest(small(time_dim=128)), 'time_dim', None),
    (nest(nest(small(), time_dim=96)), 'inner.time_dim', 96)])
def test_time_dims_of_a_nest_agree_where_pooled_text_is_added(config, place, found):
    with pytest.raises(ConfigError) as e: create_model(config, 8)
    assert [p.split(', as in')[0].rsplit(' ', 1)[0] for p in e.value.problems] == [f'{place}: found {found}, expected']

def test_a_nested_network_made_directly_is_checked_too():
    with pytest.raises(ConfigError, match='time_dim: found 32, expected 64'): NestedUNet(nest(small(), time_dim=32), 8)

def test_every_problem_of_a_nest_is_named_with_its_place():
    with pytest.raises(ConfigError) as e: create_model(nest(small(num_heads=5, dropout=2.), num_resnets=[1]))
    assert [p.split(':')[0] for p in e.value.problems] == ['num_resnets', 'inner.num_heads', 'inner.dropout']

def test_a_cpu_samples_in_channels_last():
    "Inside, every level has that format; what comes out has the usual one, and the values of a network that runs in the usual one."
    model, seen = awake(create_model(nest(nest(small())), 8)), []
    hooks = [m.register_forward_hook(lambda m, i, o: seen.append(o.is_contiguous(memory_format=torch.channels_last))) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    x, t, cond = [torch.randn(2, 3, s, s) for s in (32, 16, 8)], torch.tensor([3, 700]), torch.randn(2, 4, 8)
    with torch.autocast('cpu', torch.bfloat16):
        outs = model(x, t, cond)
        assert all(seen) and len(seen) == len(hooks) and all(o.is_contiguous() for o in outs)
        usual, _ = model.denoise(x, t, model.encode_text(cond, None), {})
    assert not all(seen[len(hooks):])
    for a, b in zip(outs, usual): assert (a.float() - b.float()).abs().max() <= .03*b.abs().max()

def test_training_and_float32_keep_their_memory_format():
    model, seen = awake(create_model(nest(small()), 8)), []
    model.conv_in.register_forward_hook(lambda m, i, o: seen.append(o.is_contiguous()))
    x = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)]
    with torch.enable_grad(), torch.autocast('cpu', torch.bfloat16): model(x, torch.tensor([3, 700]))
    model(x, torch.tensor([3, 700]))
    assert seen == [True, True]

def test_time_dims_may_differ_without_pooled_text():
    model = awake(create_model(nest(small(pooled_text=False), time_dim=32), 8))
    x = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)]
    outs = model(x, torch.tensor([3, 700]), torch.randn(2, 4, 8), torch.ones(2, 4))
    assert [o.shape[-1] for o in outs] == [16, 8]

@pytest.mark.parametrize('dim', [7, 1, 0])
def test_an_odd_number_of_time_features_is_refused(dim):
    with pytest.raises(ValueError, match=f'dim is {dim}; give an even number'): time_features(torch.tensor([3.]), dim)

def test_the_mean_of_no_words_is_zero():
    x, mask = torch.randn(2, 3, 4), torch.tensor([[0., 0, 0], [1, 1, 0]])
    assert masked_mean(x, mask)[0].eq(0).all()
    torch.testing.assert_close(masked_mean(x, mask)[1], x[1, :2].mean(0))

def test_a_prompt_without_words_gives_a_finite_prediction():
    model = awake(create_model(nest(small(num_text_layers=1)), 8))
    x = [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)]
    outs = model(x, torch.tensor([3, 700]), torch.randn(2, 4, 8), torch.tensor([[0., 0, 0, 0], [1, 1, 1, 0]]))
    assert all(o.isfinite().all() for o in outs)

@pytest.mark.parametrize('value', [0., .5])
def test_a_constant_picture_gives_a_finite_prediction(value):
    model = awake(create_model(nest(small())))
    outs = model([torch.full((1, 3, s, s), value) for s in (16, 8)], torch.tensor([3]))
    assert all(o.isfinite().all() for o in outs)

def test_noisy_pictures_are_divided_by_exactly_their_standard_deviation():
    model = awake(create_model(nest(small())))
    x = .01*torch.randn(2, 3, 16, 16)                  # about the smallest that a schedule can give
    torch.testing.assert_close(model.stem(x), model.conv_in(x/x.std((1, 2, 3), keepdim=True)))

def test_parameters_are_numbered_as_files_of_trainings_number_them():
    "An optimizer's saved state names parameters by their position."
    inner = small(micro_conditioning={'scale': 8.}, num_text_layers=1, text_proj_dim=16)
    model = create_model(nest(inner, micro_conditioning={'scale': 16.}), 8)
    first = list(dict.fromkeys(n.split('.')[0] for n, _ in model.inner_unet.named_parameters()))
    outer = list(dict.fromkeys(n.split('.')[0] for n, _ in model.named_parameters()))
    shared, last = ['temb_layer1', 'temb_layer2', 'cond_layers', 'conv_in', 'down_blocks', 'up_blocks'], ['norm_out', 'conv_out']
    assert first == ['lm_proj', 'lm_head', 'cond_emb', *shared, 'mid_blocks', *last]
    assert outer == ['inner_unet', *shared, 'in_adapter', 'out_adapter', *last]

def test_a_gpu_would_run_the_networks():
    with FakeTensorMode(), torch.device('cuda'), torch.no_grad():
        inner = small(num_text_layers=1, text_proj_dim=16, micro_conditioning={'scale': 8.})
        model = create_model(nest(inner, micro_conditioning={'scale': 16.}), 8)
        x = [torch.randn(2, 3, 16, 16), torch.randn(3, 3, 8, 8)]           # a mixed batch
        micros = {'scale': torch.tensor([8., 4., 2.])}
        outs = model(x, torch.tensor([3, 700, 1]), torch.randn(3, 4, 8), torch.ones(3, 4), micros)
        assert [(o.device.type, *o.shape) for o in outs] == [('cuda', 2, 3, 16, 16), ('cuda', 3, 3, 8, 8)]
