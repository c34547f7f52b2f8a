"Every array that the paper's own package computed (tests/golden), reproduced."
import numpy as np, pytest, torch
from golden_tools import fill, inputs, load_json, load_npz, wave
from mdm.diffusion.objective import Diffusion, DiffusionConfig
from mdm.models.nested_unet import create_model
from mdm.reference.recipes import from_reference
from mdm.recipe import load_recipe
from mdm.diffusion.settings import SampleConfig
from mdm.diffusion.sampler import sample
from mdm.diffusion.solvers import timesteps
from mdm.diffusion.schedule import make_gammas, shift_gammas, vdm_weights

close = lambda a, b, rtol=1e-4, atol=1e-5: np.testing.assert_allclose(np.asarray(a), b, rtol=rtol, atol=atol)

def golden_model(name):
    "The golden network of a name, filled, and its specification."
    spec = load_json(name)
    return fill(create_model(from_reference(spec['config']), 48)), spec

def all_used(name, *keys): assert set(load_npz(name).files) == set(keys)     # a test that leaves an array out is not done

@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield

def test_schedules():
    ref, used = load_npz('schedules'), set()
    for s in ('ddpm', 'deepfloyd', 'cosine'):
        g = make_gammas(s)
        for key, ours, kw in ((s, g, dict(rtol=0, atol=1e-5)), (f'{s}_shift4_power1', shift_gammas(g, 4, 1), dict(rtol=0, atol=1e-5)),
                              (f'{s}_shift16_power2', shift_gammas(g, 16, 2), dict(rtol=0, atol=1e-5)), (f'{s}_vdm_weights', vdm_weights(g), dict(rtol=1e-3, atol=0))):
            close(ours, ref[key], **kw); used.add(key)
    assert used == set(ref.files)

def test_timesteps():
    ref = load_npz('timesteps')
    for k in (10, 50, 250, 1000): np.testing.assert_array_equal(timesteps(1000, k), ref[f'steps{k}'])
    all_used('timesteps', 'steps10', 'steps50', 'steps250', 'steps1000')

@pytest.mark.parametrize('name', ['unet', 'nested', 'nested2', 'video4', 'video16', 'video_space'])
def test_network(name):
    model, spec = golden_model(name)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == spec['parameters']
    outs = model(*inputs(spec))
    for i, o in enumerate(outs):
        ref = load_npz(name)[f'out{i}']
        close(o, ref, atol=1e-4*ref.std() if 'video' in name else 1e-5)   # deeper networks, longer sums
    all_used(name, *(f'out{i}' for i in range(len(outs))))

@pytest.mark.parametrize('name', ['unet', 'nested', 'nested2'])
def test_bfloat16(name):
    model, spec = golden_model(name)
    full = model(*inputs(spec))
    with torch.autocast('cpu', dtype=torch.bfloat16): half = model(*inputs(spec))
    for f, h in zip(full, half): assert (h.float() - f).norm() < 2e-2*f.norm()

@pytest.mark.parametrize('name,source,config', [
    ('loss_unet', 'unet', DiffusionConfig()),
    ('loss_nested', 'nested', DiffusionConfig(shifted=True, double_loss=True)),
    ('loss_video16', 'video16', DiffusionConfig(shifted=True, double_loss=True)),
    ('loss_nested2', 'nested2', DiffusionConfig(shifted=True, shift_power=2., double_loss=True, multi_res_weights=[16., 4., 1.]))])
def test_loss(name, source, config):
    model, spec = golden_model(source)
    _, tau, cond, mask, _ = inputs(spec)
    d, s = Diffusion(config, model.scales), spec['sizes']
    noised = d.noised(wave((2, 3, s[0], s[0]), 2), tau=tau, noise=[wave((2, 3, k, k), 11) for k in s])
    raw, ref = model(noised.x_t, noised.tau, cond, mask), load_npz(name)
    out = d.compare(raw, noised)
    close(out.per_sample, ref['loss']); close(out.loss, ref['reduced'])
    close(noised.x_t[0], ref['x_t0']); close(out.targets[0], ref['target0'])
    pred = raw[0] if name == 'loss_unet' else out.preds[0]                   # the plain model's file holds the raw prediction, v
    close(pred, ref['pred0'], atol=1e-4*ref['pred0'].std() if 'video' in name else 1e-5)
    all_used(name, 'loss', 'reduced', 'x_t0', 'pred0', 'target0')

@pytest.mark.parametrize('name,source,config,cfg', [
    ('ddim10_unet', 'unet', DiffusionConfig(), SampleConfig(steps=10, solver="ddim", spacing="uniform", guidance=1., eta=0., threshold='clip')),
    ('ddim10_video16', 'video16', DiffusionConfig(shifted=True), SampleConfig(steps=10, solver="ddim", spacing="uniform", guidance=1., eta=0., threshold='clip')),
    ('ddim10_nested_cfg3', 'nested', DiffusionConfig(shifted=True), SampleConfig(steps=10, solver="ddim", spacing="uniform", guidance=3., eta=0., threshold='dynamic_if')),
    ('ddim10_nested2_raw', 'nested2', DiffusionConfig(shifted=True, shift_power=2.), SampleConfig(steps=10, solver="ddim", spacing="uniform", guidance=1., eta=0., threshold='none'))])
def test_samples(name, source, config, cfg):
    model, spec = golden_model(source)
    _, _, cond, mask, _ = inputs(spec)
    noise = [wave((2, 3, k, k), 11) for k in spec['sizes']]
    out = sample(model, Diffusion(config, model.scales), spec['sizes'][0], cond, mask, config=cfg, noise=noise)
    ref = load_npz(name)['out']
    if 'video' in name:     # ten steps multiply rounding: noise that is 1e-7 off moves single pixels by 3e-3, and so do more threads
        assert (out[0].numpy() - ref).std() < 1e-3*ref.std() and abs(out[0].numpy() - ref).max() < .02
    else: close(out[0], ref, rtol=0, atol=1e-3)
    all_used(name, 'out')

@pytest.mark.parametrize('name,parameters', [('cc12m_64x64', 461_359_107), ('cc12m_256x256', 476_613_958), ('cc12m_1024x1024', 480_970_057)])
def test_released_models(name, parameters):
    with torch.device('meta'): model = create_model(load_recipe(name).model, 2048)
    ref = load_json(name)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == ref['state']
    assert sum(p.numel() for p in model.parameters()) == ref['parameters'] == parameters
