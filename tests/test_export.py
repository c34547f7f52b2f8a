"One call of a network as ONNX and as torch.export: equal to the model, for every kind of network, and described well enough to sample elsewhere."
import json
import numpy as np, onnx, pytest, torch
from safetensors import safe_open
from mdm.checkpoint import save_checkpoint
from mdm.cli.convert import mdm_convert
from mdm.diffusion.objective import Diffusion
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.recipe import load_recipe
from mdm.share.export import check_export, example_inputs, export_network, open_export, write_prompts
from mdm.text import TextConfig, TextEncoder

block = dict(channels=[8, 8], num_resnets=[1, 1], num_attention_layers=[0, 0], num_groups=4, time_dim=16, num_heads=2)
small = block | dict(channels=[8], num_resnets=[1], num_attention_layers=[1])

def make(model, dim=8, size=16, **kwargs):
    "A pipeline of a small network whose weights are all random, the zeros of a fresh one included."
    recipe = load_recipe('shapes', [f'text.dim={dim or 8}', 'train.bf16=false'])
    recipe.data.image_size = size
    recipe.model = type(load_recipe('shapes').model)(**model) if 'inner' in model else type(load_recipe('shapes').model.inner)(**model)
    recipe.diffusion = type(recipe.diffusion)(**kwargs)
    torch.manual_seed(0)
    net = create_model(recipe.model, dim)
    for p in net.parameters(): torch.nn.init.normal_(p, std=.3)
    return MDMPipeline(net, recipe, TextEncoder(TextConfig(dim=dim or 8)), 'cpu', bf16=False)

def nest(**changes):
    "Three networks, one inside the other, with all that a released nest has: micro-conditioning of several defaults, a normalised input, padding that is seen."
    UNet, Nested = (type(o) for o in (load_recipe('shapes').model.inner, load_recipe('shapes').model))
    inner = UNet(**small | dict(num_text_layers=1, text_proj_dim=16, mid_blocks=False, micro_conditioning=dict(scale=64., score=.5), attention_ffn=True) | changes)
    middle = Nested(inner=inner, **block, mid_blocks=False, pooled_text=False, normalize_input=True, micro_conditioning=dict(scale=256.))
    return dict(inner=middle, **block, mid_blocks=False, pooled_text=False, normalize_input=False, inner_input=False, micro_conditioning=dict(scale=1024.))

@pytest.fixture(scope='module')
def deep(): return make(nest(), size=32, shifted=True, prediction='v')

@pytest.fixture(scope='module')
def exported(deep, tmp_path_factory):
    path = tmp_path_factory.mktemp('export')/'deep.onnx'
    return path, export_network(deep, path, batch=3, tokens=5)

def test_a_nest_of_three_equals_its_onnx_file(deep, exported):
    path, found = exported
    assert check_export(deep, path) < 1e-4
    assert [o['name'] for o in found['inputs']] == ['x_32x32', 'x_16x16', 'x_8x8', 't', 'cond', 'mask', 'scale', 'score']
    session = onnx.load(path)
    assert [o.name for o in session.graph.input] == [o['name'] for o in found['inputs']]
    assert [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in session.graph.output] == [o['shape'] for o in found['outputs']]

def test_steps_prompts_masks_and_numbers_reach_the_onnx_file(deep, exported):
    "Every input matters, and as much as in the model; a row without a token among them."
    path, _ = exported
    call, base = open_export(path), example_inputs(deep, 3, 5)
    assert base['mask'][-1].sum() == 0
    change = dict(mask=lambda o: 1 - o, t=lambda o: o.flip(0), scale=lambda o: o*.3, score=lambda o: o*.3)
    for name in base:
        changed = base | {name: change.get(name, lambda o: o.flip(-1))(base[name])}
        x = [changed[k] for k in base if k.startswith('x_')]
        with torch.no_grad(): wanted = deep.model(x, changed['t'], changed['cond'], changed['mask'], {k: changed[k] for k in ('scale', 'score')})
        got = [*call(changed).values()]
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(got, wanted)), name
        assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(got, call(base).values())), name

def test_defaults_of_micro_conditioning_are_those_of_the_model(deep, exported):
    path, found = exported
    base = example_inputs(deep, 3, 5)
    assert {o['name']: o.get('default') for o in found['inputs'] if 'default' in o} == dict(scale=1024, score=.5)
    with torch.no_grad(): wanted = deep.model([base[k] for k in base if k.startswith('x_')], base['t'], base['cond'], base['mask'])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(open_export(path)(base).values(), wanted))

def test_the_json_file_has_the_schedule_of_every_resolution(deep, exported):
    path, found = exported
    assert json.loads(path.with_suffix('.json').read_text()) == found
    diffusion = Diffusion(deep.recipe.diffusion, deep.model.scales)
    for i, level in enumerate(found['resolutions']):
        assert level['gammas'] == diffusion.gammas[i].tolist() and level['signal'] == diffusion.signal[i]
    assert (found['num_steps'], found['prediction'], found['files']) == (1000, 'v', ['deep.onnx'])

def test_half_weights_equal_the_rounded_model_and_a_mask_may_be_ignored(tmp_path):
    "A network that uses no mask takes one all the same, so that callers need not know."
    pipe = make(small | dict(time_dim=128, masked_cross_attention=False, pooled_text=False, mid_blocks=False))
    found = export_network(pipe, tmp_path/'a.onnx', batch=1, tokens=4, size='16x8', half=True)
    assert [o['name'] for o in found['inputs']] == ['x_16x8', 't', 'cond', 'mask']
    assert check_export(pipe, tmp_path/'a.onnx') < 1e-4
    held = {onnx.TensorProto.DataType.Name(o.data_type) for o in onnx.load(tmp_path/'a.onnx').graph.initializer if np.prod(o.dims) > 8192}
    assert held == {'FLOAT16'} and next(pipe.model.parameters()).dtype == torch.float32

@pytest.mark.parametrize('half', [False, True])
def test_torch_export_without_text_equals_the_model(half, tmp_path):
    pipe = make(small, dim=0)
    found = export_network(pipe, tmp_path/'a.pt2', half=half)
    assert [o['name'] for o in found['inputs']] == ['x_16x16', 't']
    assert check_export(pipe, tmp_path/'a.pt2') < 1e-4

def test_a_difference_is_found(deep, exported, tmp_path):
    path, _ = exported
    other = make(nest(), size=32, shifted=True, prediction='v')
    with torch.no_grad(): other.model.conv_out.bias += .01
    with pytest.raises(ValueError, match='another model'): check_export(other, path)

def test_a_failed_export_leaves_nothing(deep, tmp_path, monkeypatch):
    monkeypatch.setattr('mdm.share.export._write_onnx', lambda program, inputs, outputs, path: (path.write_bytes(b'half'), 1/0))
    with pytest.raises(ZeroDivisionError): export_network(make(small, dim=0), tmp_path/'a.onnx')
    assert not list(tmp_path.iterdir())
    for wrong in (dict(path=tmp_path/'a.bin'), dict(path=tmp_path/'a.pt2', size='17x16')):
        with pytest.raises(ValueError): export_network(deep, **wrong)
    assert not list(tmp_path.iterdir())

def test_the_command_exports(tmp_path, capsys):
    pipe = make(small, dim=16)
    save_checkpoint(tmp_path/'model', pipe.recipe, pipe.model.state_dict())
    assert mdm_convert([str(tmp_path/'model'), str(tmp_path/'a.pt2'), '--batch', '1', '--tokens', '6', '--prompt', 'red', '--prompt', 'a blue cross']) == 0
    out = capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.json', 'a.pt2', 'a.safetensors', 'model'] and 'largest difference from the model: ' in out
    with safe_open(tmp_path/'a.safetensors', 'pt') as f:
        assert json.loads(f.metadata()['prompts']) == ['', 'red', 'a blue cross']
        assert f.get_tensor('cond').shape == (3, 6, 16) and f.get_tensor('mask').sum(1).tolist() == [1, 2, 4]
    for args, said in ((['a.pt2'], 'exists already'), (['folder', '--half'], '--half is for exported networks'), (['b.pt2', '--size', '4x8'], 'nearest size')):
        assert mdm_convert([str(tmp_path/'model'), str(tmp_path/args[0]), *args[1:]]) == 2
        assert said in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.json', 'a.pt2', 'a.safetensors', 'model']
