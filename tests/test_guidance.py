"Guidance and late joining: what is equal to what, what is refused, and how often the networks are called."
from itertools import product as combine
from typing import get_args
import pytest, torch
from mdm.diffusion.guidance import Denoiser, Guide, Prompt
from mdm.diffusion.objective import Diffusion, DiffusionConfig
from mdm.diffusion.sampler import for_img2img, for_inpaint, for_upscale, join_shares, sample, sample_steps
from mdm.diffusion.settings import SampleConfig, Solver
from mdm.models.nested_unet import NestedUNetConfig, create_model
from mdm.models.unet import UNetConfig
from mdm.utils.configs import violations

solvers = [o for o in get_args(Solver) if o != 'consistency']          # which has few steps of its own
shape = dict(channels=[8, 8], num_resnets=[1, 1], num_attention_layers=[0, 0], time_dim=16, num_groups=4, micro_conditioning=dict(scale=8.))
mixed = lambda n=2, **kw: Diffusion(DiffusionConfig(shifted=True, double_loss=True, mixed_ratio=[1.]*n, **kw), [2**k for k in reversed(range(n))])

@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield

@pytest.fixture(scope='module')
def nets():
    "Networks of one, two and three resolutions, with weights that do something."
    config = UNetConfig(**{**shape, 'num_attention_layers': [0, 1]}, num_heads=2)
    torch.manual_seed(0)
    out = []
    for _ in range(3):
        net = create_model(config, 6).eval()
        for p in net.parameters(): p.data += .05*torch.randn_like(p)
        out.append(net)
        config = NestedUNetConfig(**shape, inner=config)
    return out

@pytest.fixture
def calls(nets):
    "(resolutions, samples) of every evaluation, by the highest network that runs; and all calls of the outermost networks' first layers."
    seen, handles = [], []
    for net in nets: handles.append(net.register_forward_pre_hook(lambda m, args: seen.append((len(args[0]), len(args[0][0])))))
    for net in (nets[1], nets[2]):
        while hasattr(net, 'inner_unet'):
            net = net.inner_unet
            handles.append(net.register_forward_pre_hook(lambda m, args: seen.append((len(args[0]), len(args[0][0])))))
    yield seen
    for o in handles: o.remove()

def prompts(n, length=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, length, 6, generator=g), torch.ones(n, length)

def draw(net, d, given=None, seeds=(3, 4), guide=None, other=None, **kw):
    config = SampleConfig(**{**dict(steps=6, guidance=2., spacing='trailing'), **kw})
    cond, mask = prompts(len(seeds))
    uncond, uncond_mask = other or (None, None)
    return sample(net, d, 8*d.scales[0], cond, mask, uncond, uncond_mask, config=config, seeds=list(seeds), given=given, guide=guide)

def equal(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))
def close(a, b, tol=1e-4): return all(torch.allclose(x, y, atol=tol, rtol=tol) for x, y in zip(a, b))

# ---- outer networks that join late

@pytest.mark.parametrize('solver,guidance', list(combine(solvers, (1., 2.))))
def test_joining_at_the_first_step_changes_nothing(nets, solver, guidance):
    "Nothing is drawn, computed or remembered otherwise: the same bits as from the denoiser alone, step by step."
    from mdm.diffusion.sampler import Given, PictureNoise, Sampling, step_pairs
    from mdm.diffusion.solvers import advance, threshold
    d, config = mixed(), SampleConfig(steps=6, solver=solver, guidance=guidance)
    (cond, mask), source = prompts(2), PictureNoise([3, 4])
    x, past = [source(3, 16, 16), source(3, 8, 8)], [()]*2
    denoiser, powers = Denoiser(nets[1], d, config, Prompt(cond, mask)), d.gammas.tolist()
    for t, s in step_pairs(config, d):                                  # the loop as it was before networks could join
        for i, clean in enumerate(denoiser(x, t)):
            z = source(*x[i].shape[1:]) if solver == 'ddpm' and s else 0.
            x[i], past[i] = advance(solver, x[i], threshold(clean*d.signal[i])/d.signal[i], powers[i][t], powers[i][s], past[i], z)
    assert equal(draw(nets[1], d, solver=solver, guidance=guidance, spacing='logsnr', join=1.), [o.clamp(-1, 1) for o in x])

@pytest.mark.parametrize('solver', solvers)
def test_inner_networks_run_alone_until_then(nets, calls, solver):
    d = mixed(3)
    film = list(sample_steps(nets[2], d, 32, *prompts(1), config=SampleConfig(steps=10, spacing='trailing', solver=solver, join=.4)))
    assert join_shares(.4, 3) == [.4, .7, 1.]
    assert calls == [(1, 2)]*3 + [(2, 2)]*3 + [(3, 2)]*4                # t = 1000, 900, 800; 700, 600, 500; 400, ...
    assert all(o.isfinite().all() for o in film[-1].x)
    low, mid, high = film[1].x0[::-1]                                   # the second step: enlarged predictions outside
    assert torch.equal(mid, torch.nn.functional.interpolate(low, (16, 16), mode='bilinear'))
    assert torch.equal(high, torch.nn.functional.interpolate(mid, (32, 32), mode='bilinear'))

def test_what_the_inner_network_does_alone_is_what_it_does_in_a_mixed_batch(nets):
    "The sample of a mixed batch that has no outer picture gets the prediction of the inner network alone, micro-conditioning and text included."
    cond, mask = prompts(2)
    hi, lo, t, micros = torch.randn(1, 3, 16, 16), torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), dict(scale=torch.tensor([8., 4.]))
    inside = nets[1]([hi, lo], t, cond, mask, micros)[1][1:]
    alone = nets[1].inner_unet([lo[1:]], t[1:], cond[1:], mask[1:], {k: v[1:] for k, v in micros.items()})[0]
    torch.testing.assert_close(alone, inside)

@pytest.mark.parametrize('solver', solvers)
def test_inner_pictures_before_joining_are_those_of_the_inner_network(nets, solver):
    "Up to the step at which the outer network joins, the inner picture is what the inner network draws alone from the same noise."
    if solver == 'ddpm': return                                         # its noise is shared with the outer one
    d, alone = mixed(), Diffusion(mixed().config.__class__(shifted=True), [1])
    config = SampleConfig(steps=8, spacing='trailing', solver=solver, guidance=2., join=.5)
    noise = [torch.randn(2, 3, s, s, generator=torch.Generator().manual_seed(s)) for s in (16, 8)]
    films = [sample_steps(net, e, size, *prompts(2), config=c, noise=n) for net, e, size, c, n in (
        (nets[1], d, 16, config, [o.clone() for o in noise]), (nets[1].inner_unet, alone, 8, SampleConfig(steps=8, spacing='trailing', solver=solver, guidance=2.), noise[1:]))]
    for k, (a, b) in enumerate(zip(*films)):
        same = torch.allclose(a.x[-1], b.x[-1], atol=1e-5)
        assert same == (k < 4), k                                       # 1000, 875, 750, 625; at 500 the outer one joins

def test_outer_pictures_before_joining_follow_the_forward_process(nets):
    d, noise = mixed(shift_power=2.), [torch.randn(2, 3, s, s) for s in (16, 8)]
    for step in sample_steps(nets[1], d, 16, *prompts(2), config=SampleConfig(steps=8, spacing='trailing', join=.3), noise=noise):
        if step.t < 375: break                                          # the last step that is not computed outside ends at 250
        g = d.gammas[0, step.t].float()
        torch.testing.assert_close(step.x[0], g.sqrt()*step.x0[0] + (1 - g).sqrt()*noise[0], atol=1e-5, rtol=1e-5)

def test_batch_size_changes_nothing(nets):
    d = mixed()
    for more in (dict(join=.5), dict(guidance_networks='inner'), dict(guidance_parallel=.2, guidance_limit=.1, guidance_momentum=-.5), dict(join=.4, guidance_networks='inner', guidance_parallel=0.)):
        whole = draw(nets[1], d, seeds=(3, 4, 5), **more)
        cond, mask = prompts(3)
        one = sample(nets[1], d, 16, cond[1:2], mask[1:2], config=SampleConfig(steps=6, guidance=2., spacing='trailing', **more), seeds=[4])
        assert close([o[1:2] for o in whole], one), more

def test_joining_with_pictures_given(nets, calls):
    "Known parts stay, a given small picture is enlarged, and a picture to begin with is not replaced by an enlarged one."
    d, picture, hole = mixed(), torch.rand(1, 3, 16, 16)*2 - 1, torch.zeros(1, 1, 16, 16)
    hole[..., 6:] = 1
    for repeats in (1, 2):
        hi, _ = draw(nets[1], d, for_inpaint(picture, hole, [2, 1], repeats=repeats), join=.5)
        torch.testing.assert_close(hi[..., :6], picture[..., :6].expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    _, lo = draw(nets[1], d, for_upscale(picture[..., ::2, ::2], 16, [2, 1]), join=.5)
    torch.testing.assert_close(lo, picture[..., ::2, ::2].expand_as(lo), atol=1e-6, rtol=0)
    calls.clear()
    begun = for_img2img(picture, [2, 1], .7)
    assert equal(draw(nets[1], d, begun, join=.1), draw(nets[1], d, begun))
    assert {n for n, _ in calls} == {2}

def test_join_is_refused_in_words(nets):
    for net, d, said in ((nets[1], Diffusion(DiffusionConfig(double_loss=True), [2, 1]), 'model.inner was only trained inside'), (nets[0], Diffusion(DiffusionConfig(), [1]), 'no inner network'),
                         (nets[1], Diffusion(DiffusionConfig(mixed_ratio=[2, 1]), [2, 1]), 'only trained inside'), (lambda *a: None, mixed(), 'no inner network')):
        with pytest.raises(ValueError, match=f'join: found 0.5, expected 1: .*{said}'): draw(net, d, join=.5)

# ---- guidance

def test_guidance_that_needs_one_evaluation_costs_one(nets, calls):
    d, other = mixed(), prompts(2, 5, seed=2)
    for w, size in ((0., 2), (1., 2), (2., 4)):
        calls.clear()
        draw(nets[1], d, guidance=w)
        assert calls == [(2, size)]*6, w
    plain = Denoiser(nets[1], d, SampleConfig(guidance=1.), Prompt(*other))
    x = [torch.randn(2, 3, s, s) for s in (16, 8)]
    assert close(Denoiser(nets[1], d, SampleConfig(guidance=0.), Prompt(*prompts(2)), Prompt(*other))(x, 500), plain(x, 500))

def test_guidance_0_is_what_two_evaluations_gave(nets):
    "A rescaled prediction needs both, so the two ways can be compared: a share of 1e-9 changes nothing that float32 can see."
    other = prompts(2, 5, seed=2)
    assert close(draw(nets[1], mixed(), guidance=0., other=other), draw(nets[1], mixed(), guidance=0., other=other, guidance_rescale=1e-9))

@pytest.mark.parametrize('w', [0., .5, 3.])
def test_projected_guidance_at_neutral_values_is_guidance(nets, w):
    d = mixed()
    plain = draw(nets[1], d, guidance=w)
    assert equal(draw(nets[1], d, guidance=w, guidance_parallel=1., guidance_limit=0., guidance_momentum=0.), plain)
    assert close(draw(nets[1], d, guidance=w, guidance_limit=1e9), plain)     # projected, and nothing to limit
    for more in (dict(guidance_parallel=0.), dict(guidance_limit=1e-3), dict(guidance_momentum=-.5)): assert not close(draw(nets[1], d, guidance=w, **more), plain), more

@pytest.mark.parametrize('prediction', ['v', 'eps', 'x0'])
def test_projection_acts_on_clean_pictures(nets, prediction):
    "At every resolution, whatever the network predicts: the change is orthogonal to the clean picture, and as long as allowed."
    d, x = mixed(prediction=prediction), [torch.randn(2, 3, s, s) for s in (16, 8)]
    at = lambda **kw: Denoiser(nets[1], d, SampleConfig(**kw), Prompt(*prompts(2)))(x, 500)
    plain = at(guidance=1.)
    for guided, base in zip(at(guidance=3., guidance_parallel=0.), plain):
        change = guided - base
        cosine = (change*base).sum((1, 2, 3))/(change.square().sum((1, 2, 3))*base.square().sum((1, 2, 3))).sqrt()
        assert cosine.abs().max() < 1e-2 and change.abs().max() > 1e-4
    for guided, base in zip(at(guidance=3., guidance_limit=1e-3), plain): assert ((guided - base).square().mean((1, 2, 3)).sqrt() - 2e-3).abs().max() < 1e-4

def test_momentum_remembers_each_resolution(nets):
    "A network that joins late begins without an average; the inner ones keep theirs."
    d, config = mixed(), SampleConfig(guidance=3., guidance_momentum=-.5)
    denoiser, x = Denoiser(nets[1], d, config, Prompt(*prompts(2))), [torch.randn(2, 3, s, s) for s in (16, 8)]
    denoiser(x[1:], 800)
    assert set(denoiser.averages) == {1}
    before = denoiser.averages[1]
    denoiser(x, 600)
    assert set(denoiser.averages) == {1, 2} and denoiser.averages[1] is not before

def test_contrast_is_taken_back_in_one_way_only():
    assert 'guidance_rescale: found 0.5, expected 0' in violations(SampleConfig(guidance_rescale=.5, guidance_limit=.1))[0]
    assert not violations(SampleConfig(guidance_rescale=.5)) and not violations(SampleConfig(guidance_parallel=0., guidance_momentum=-.5, guidance_limit=.2))

# ---- a weaker model as the guide

def test_a_guide(nets, calls):
    d = mixed()
    weak = Guide(nets[1], d, Prompt(*prompts(2)))
    assert close(draw(nets[1], d, guidance=3., guide=weak), draw(nets[1], d, guidance=1.))          # it is its own guide
    empty = Guide(nets[1], d, Prompt(*prompts(2, 5, seed=2)))
    calls.clear()
    guided = draw(nets[1], d, guidance=3., guide=empty)
    assert calls == [(2, 2)]*12                                                                     # two calls of the batch itself
    assert close(guided, draw(nets[1], d, guidance=3., other=prompts(2, 5, seed=2)))                # classifier-free guidance is a special case
    assert not close(guided, draw(nets[1], d, guidance=3.))
    calls.clear()
    late = draw(nets[1], d, guidance=3., guide=empty, join=.5)
    assert calls == [(1, 2)]*6 + [(2, 2)]*6 and all(o.isfinite().all() for o in late)               # both run inside alone

def test_a_guide_of_a_model_without_prompts(nets):
    "There is nothing to leave out where there is no prompt, but there can be a weaker model."
    d, x = mixed(), [torch.randn(2, 3, s, s) for s in (16, 8)]
    weak = create_model(nets[1].config, 0).eval()
    config = SampleConfig(guidance=3.)
    bare = lambda guide=None: Denoiser(weak, d, config, Prompt(), guide=guide)(x, 500)
    assert close(bare(), bare(Guide(weak, d, Prompt())))
    other = create_model(nets[1].config, 0).eval()
    for p in other.parameters(): p.data += .05*torch.randn_like(p)
    assert not close(bare(), bare(Guide(other, d, Prompt())))

@pytest.mark.parametrize('change,config,said', [
    (lambda n: Guide(n[0], Diffusion(DiffusionConfig(), [1]), Prompt()), {}, r'the guide has the resolutions \[1\], and the model \[2, 1\]'),
    (lambda n: Guide(n[1], mixed(prediction='eps'), Prompt()), {}, "diffusion.prediction 'eps', and the model 'v'"),
    (lambda n: Guide(n[1], mixed(shift_power=2.), Prompt()), {}, 'other noise levels'),
    (lambda n: Guide(n[1], mixed(), Prompt(*prompts(2))), dict(guidance=1.), 'a guide does nothing with guidance = 1'),
    (lambda n: Guide(n[1], mixed(), Prompt(*prompts(2))), dict(guidance_networks='inner'), "guidance_networks: found 'inner', expected 'all'")])
def test_a_guide_that_does_not_fit(nets, calls, change, config, said):
    with pytest.raises(ValueError, match=said): draw(nets[1], mixed(), guide=change(nets), **config)
    assert not calls

# ---- guide the innermost network only

def test_the_innermost_network_is_guided_alone(nets):
    "The outer networks run on the prompt's half alone, and every resolution gets the same change, enlarged."
    d, x = mixed(3), [torch.randn(2, 3, s, s) for s in (32, 16, 8)]
    at = lambda **kw: Denoiser(nets[2], d, SampleConfig(**kw), Prompt(*prompts(2)))(x, 500)
    seen, inner = [], nets[2].inner_unet.inner_unet
    layers = [m.conv_out.register_forward_pre_hook(lambda m, args, n=n: seen.append((n, len(args[0])))) for n, m in ((3, nets[2]), (2, nets[2].inner_unet), (1, inner))]
    guided = at(guidance=3., guidance_networks='inner')
    for o in layers: o.remove()
    assert sorted(seen) == [(1, 2), (1, 2), (2, 2), (3, 2)]
    plain = at(guidance=1.)
    changes = [a - b for a, b in zip(guided, plain)]
    assert changes[2].abs().max() > 1e-4
    for o in changes[:2]: torch.testing.assert_close(o, torch.nn.functional.interpolate(changes[2], o.shape[-2:], mode='bilinear'), atol=1e-5, rtol=1e-3)
    assert not nets[2].inner_unet.in_adapter._forward_hooks             # nothing is left behind

def test_features_from_outside_enter_both_predictions(nets):
    "The lowest resolution is guided exactly as by two predictions of the innermost network with the same features."
    d, x, w = mixed(), [torch.randn(2, 3, s, s) for s in (16, 8)], 3.
    (cond, mask), net, t, kept = prompts(2), nets[1], torch.full((2,), 499), []
    handle = net.in_adapter.register_forward_hook(lambda m, i, o: kept.append(o))
    full = net(x, t, cond, mask)[1]; handle.remove()
    inner = net.inner_unet
    without = inner.denoise(x[1:], t, inner.encode_text(torch.zeros_like(cond), torch.ones_like(mask)), {}, kept[0])[0][0]
    denoiser = Denoiser(net, d, SampleConfig(guidance=w, guidance_networks='inner'), Prompt(cond, mask))
    torch.testing.assert_close(denoiser(x, 500)[1], denoiser.clean([without + w*(full - without)], x[1:], 500)[0])

def test_an_error_inside_leaves_no_hook(nets):
    d, x = mixed(), [torch.randn(2, 3, s, s) for s in (16, 9)]         # sizes that do not belong together
    with pytest.raises(RuntimeError): Denoiser(nets[1], d, SampleConfig(guidance_networks='inner'), Prompt(*prompts(2)))(x, 500)
    assert not nets[1].in_adapter._forward_hooks

def test_one_resolution_has_nothing_inside(nets):
    with pytest.raises(ValueError, match="guidance_networks: found 'inner', expected 'all': this model is not nested"): draw(nets[0], Diffusion(DiffusionConfig(), [1]), guidance_networks='inner')

@pytest.mark.parametrize('more', [dict(join=.5), dict(guidance_parallel=0., guidance_limit=.1, guidance_momentum=-.5)], ids=str)
def test_a_gpu_is_never_waited_for(more):
    "Rehearsed with fake CUDA tensors: a step that reads a number back from the GPU, or mixes devices, raises an error."
    from torch._subclasses.fake_tensor import FakeTensorMode
    d = mixed()
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.ones(3, 3, 3, 3, device='cuda')
        class Net:
            config = NestedUNetConfig(**shape, inner=UNetConfig(**shape))
            def __init__(self, scales): self.scales = scales
            def __call__(self, x, t, cond, mask, micros):
                assert {o.device.type for o in (*x, t, cond, mask)} == {'cuda'}
                return [torch.nn.functional.conv2d(o, weight, padding=1) for o in x]
        net = Net([2, 1])
        net.inner_unet = Net([1])
        for solver in solvers:
            out = sample(net, d, 16, torch.zeros(2, 3, 6, device='cuda'), torch.ones(2, 3, device='cuda'), config=SampleConfig(steps=4, solver=solver, **more), seeds=[0, 1])
            assert [(o.device.type, tuple(o.shape)) for o in out] == [('cuda', (2, 3, s, s)) for s in (16, 8)]
