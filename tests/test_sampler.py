"Guidance, given pictures and the sampling loop: what holds for every combination, and the edges."
from itertools import product as combine
from typing import get_args
import pytest, torch
from mdm.diffusion.objective import Diffusion, DiffusionConfig, pyramid
from mdm.models.nested_unet import NestedUNetConfig, create_model
from mdm.diffusion.guidance import push
from mdm.diffusion.sampler import Given, PictureNoise, for_img2img, for_inpaint, for_upscale, sample, sample_steps
from mdm.diffusion.settings import SampleConfig
from mdm.diffusion.schedule import from_x0, schedules
from mdm.diffusion.settings import Solver, Spacing
from mdm.models.unet import UNetConfig

solvers, spacings, predictions = get_args(Solver), get_args(Spacing), get_args(DiffusionConfig.__annotations__['prediction'])
product = lambda *lists: list(combine(*lists))
deterministic = ('ddim', 'dpm++2m', 'unipc')

@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield

@pytest.fixture(scope='module')
def nets():
    "A tiny network for one resolution and one for two, with weights that do something."
    inner = UNetConfig(channels=[8, 8], num_resnets=[1, 1], num_attention_layers=[0, 1], time_dim=16, num_groups=4, num_heads=2)
    outer = NestedUNetConfig(channels=[8, 8], num_resnets=[1, 1], num_attention_layers=[0, 0], time_dim=16, num_groups=4, num_heads=2, mid_blocks=False, pooled_text=False, inner=inner)
    torch.manual_seed(0)
    out = [create_model(c, 6).eval() for c in (inner, outer)]
    for m in out:
        for p in m.parameters(): p.data += .05*torch.randn_like(p)
    return out

prompts = lambda n: (torch.randn(n, 3, 6, generator=torch.Generator().manual_seed(1)), torch.ones(n, 3))

class Gaussian:
    "The perfect network for pictures whose pixels are independent and normal, and the exact end of every path."
    def __init__(self, diffusion, mean=.3, std=.4): self.d, self.mean, self.std, self.calls = diffusion, mean, std, 0
    def var(self, g): return g*self.std**2 + 1 - g
    def __call__(self, x, t, *args):
        self.calls += 1
        x0 = lambda o, g: self.mean + self.std**2*g.sqrt()/self.var(g)*(o - g.sqrt()*self.mean)
        return [from_x0(x0(o.double(), g).float(), o, g, self.d.config.prediction) for o, g in zip(x, (self.d.gamma(t + 1, i) for i in range(len(x))))]
    def end(self, noise, t): return [self.mean + self.std*(e - g[t].sqrt()*self.mean)/self.var(g[t]).sqrt() for e, g in zip(noise, self.d.gammas)]

def distance(a, b): return max((x - y).square().mean().sqrt().item() for x, y in zip(a, b))

flows = {('flow', 'flow'), ('flow', 'deepfloyd'), ('v', 'flow')}           # of prediction and schedule; all of the others

@pytest.mark.parametrize('solver,prediction,schedule,nested', [o for o in product(solvers, predictions, schedules, (False, True)) if 'flow' not in o or o[1:3] in flows])
def test_every_combination_is_finite_and_repeats(nets, solver, prediction, schedule, nested):
    net, (cond, mask) = nets[nested], prompts(2)
    d = Diffusion(DiffusionConfig(prediction=prediction, schedule=schedule, shifted=nested), net.scales)
    for spacing in spacings:
        draw = lambda: sample(net, d, 8*net.scales[0], cond, mask, config=SampleConfig(steps=3, solver=solver, spacing=spacing, guidance=2., guidance_rescale=.3), seeds=[3, 4])
        one, two = draw(), draw()
        assert [o.shape[-1] for o in one] == [8*s for s in net.scales]
        for a, b in zip(one, two): assert a.isfinite().all() and torch.equal(a, b) and a.abs().max() <= 1

@pytest.mark.parametrize('solver', solvers)
@pytest.mark.parametrize('schedule', schedules)
def test_every_step_of_every_schedule(solver, schedule):
    "A thousand steps of a thousand: also where neighbours are equally noisy, as at the end of 'sigmoid'."
    d = Diffusion(DiffusionConfig(schedule=schedule, prediction='x0'), [1])
    out, = sample(lambda x, t, *a: [x[0].tanh()*.5], d, 2, config=SampleConfig(steps=1000, guidance=1., solver=solver))
    assert out.isfinite().all()

@pytest.mark.parametrize('solver,spacing', product(solvers, spacings))
def test_one_and_two_steps(nets, solver, spacing):
    for k in (1, 2): assert len(list(sample_steps(nets[0], Diffusion(DiffusionConfig(), [1]), 8, *prompts(1), config=SampleConfig(steps=k, solver=solver, spacing=spacing)))) == k

@pytest.mark.parametrize('prediction,shifted', product(predictions, (True, False)))
def test_solvers_converge_to_the_exact_answer(prediction, shifted):
    d = Diffusion(DiffusionConfig(prediction=prediction, shifted=shifted), [2, 1])
    net, noise = Gaussian(d), [torch.randn(2, 3, s, s, generator=torch.Generator().manual_seed(s)) for s in (8, 4)]
    def error(solver, steps, spacing='trailing'):
        for step in sample_steps(net, d, 8, noise=[o.clone() for o in noise], config=SampleConfig(steps=steps, solver=solver, spacing=spacing, threshold='none', guidance=1.)): pass
        return distance([o/r for o, r in zip(step.x, d.signal)], net.end(noise, 1000))
    slow = error('ddim', 250)
    assert slow < error('ddim', 50)/3
    for solver in ('dpm++2m', 'unipc'):
        for spacing in ('trailing', 'logsnr'): assert error(solver, 250, spacing) < 2e-2
        assert error(solver, 25, 'logsnr') < slow*{'unipc': 1, 'dpm++2m': 2}[solver], solver     # with a tenth of the calls

def test_predictions_agree():
    "The same knowledge, said as v, as eps or as x0, gives the same pictures."
    def draw(prediction, solver):
        d = Diffusion(DiffusionConfig(prediction=prediction, shifted=True), [2, 1])
        return sample(Gaussian(d), d, 8, config=SampleConfig(steps=12, guidance=1., solver=solver), seeds=[5])
    for solver in solvers:
        v, eps, x0 = (draw(p, solver) for p in ('v', 'eps', 'x0'))
        assert distance(v, eps) < 1e-3 and distance(v, x0) < 1e-3

@pytest.mark.parametrize('solver', solvers)
def test_one_call_per_step(nets, solver):
    d = Diffusion(DiffusionConfig(), [1]); net = Gaussian(d)
    list(sample_steps(net, d, 8, config=SampleConfig(steps=9, solver=solver, guidance=1.)))
    assert net.calls == 9

@pytest.mark.parametrize('solver', solvers)
def test_batch_size_changes_nothing(nets, solver):
    cond, mask = prompts(4)
    d = Diffusion(DiffusionConfig(shifted=True), nets[1].scales)
    draw = lambda at: sample(nets[1], d, 16, cond[at], mask[at], config=SampleConfig(steps=5, solver=solver, guidance_rescale=.5, guidance_interval=(.1, .7)), seeds=[10 + k for k in at])
    whole = draw(range(4))
    for at in ([0], [2], [3, 1]):
        for a, b in zip(whole, draw(at)): torch.testing.assert_close(a[at], b, rtol=1e-4, atol=1e-4)

def test_the_interval_saves_calls(nets):
    cond, mask = prompts(2)
    d, sizes = Diffusion(DiffusionConfig(), [1]), []
    def net(x, t, c, m, micros): sizes.append((int(t[0]) + 1, len(t), len(c))); return nets[0](x, t, c, m, micros)
    draw = lambda **kw: sample(net, d, 8, cond, mask, config=SampleConfig(steps=10, spacing='trailing', **kw), seeds=[0, 1])[0]
    draw(guidance_interval=(.25, .75))
    assert sizes == [(t, *([4, 4] if 250 <= t <= 750 else [2, 2])) for t in range(1000, 0, -100)]
    sizes.clear(); draw(guidance=1.)
    assert {n for _, n, _ in sizes} == {2}
    assert torch.equal(draw(guidance_interval=(.996, .999)), draw(guidance=1.))                            # nowhere: no guidance
    assert not torch.equal(draw(), draw(guidance=1.))

def test_what_may_be_left_out(nets):
    "No mask means that every word is real, no seeds that they count from 0."
    cond, mask = prompts(2)
    d, config = Diffusion(DiffusionConfig(), [1]), SampleConfig(steps=3, guidance=2.)
    whole = sample(nets[0], d, 8, cond, mask, config=config, seeds=[0, 1])[0]
    assert torch.equal(sample(nets[0], d, 8, cond, config=config)[0], whole)
    assert torch.equal(sample(nets[0], d, 8, cond, uncond=torch.zeros(2, 3, 6), config=config)[0], whole)

def test_micro_conditioning_is_doubled_only_where_guided(nets):
    sizes, (cond, mask) = [], prompts(2)
    def net(x, t, c, m, micros): sizes.append((len(t), len(micros['scale']))); return [o*0 for o in x]
    sample(net, Diffusion(DiffusionConfig(), [1]), 8, cond, mask, micros=dict(scale=torch.ones(2)), config=SampleConfig(steps=4, guidance_interval=(0., .5)), seeds=[0, 1])
    assert sizes == [(2, 2), (2, 2), (4, 4), (4, 4)]

def test_leaving_stops_the_network(nets):
    d = Diffusion(DiffusionConfig(), [1]); net = Gaussian(d)
    steps = sample_steps(net, d, 8, config=SampleConfig(steps=50, guidance=1.))
    next(steps); next(steps); steps.close()
    assert net.calls == 2 and next(steps, None) is None

@pytest.mark.parametrize('solver,shifted,rescale', product(solvers, (True, False), (1., 3.)))
def test_what_is_given_is_kept(nets, solver, shifted, rescale):
    d, (cond, mask) = Diffusion(DiffusionConfig(shifted=shifted, rescale_signal=rescale), [2, 1]), prompts(2)
    g = torch.Generator().manual_seed(7)
    picture, hole, config = torch.rand(1, 3, 16, 16, generator=g)*2 - 1, torch.zeros(1, 1, 16, 16), SampleConfig(steps=4, solver=solver)
    hole[..., 5:12, 6:] = 1
    draw = lambda given: sample(nets[1], d, 16, cond, mask, config=config, seeds=[0, 1], given=given)
    for repeats in (1, 2):
        for x, y, free in zip(draw(for_inpaint(picture, hole, [2, 1], repeats=repeats)), pyramid(picture, [2, 1]), (hole > 0, torch.nn.functional.max_pool2d(hole, 2) > 0)):
            kept = ~free.expand_as(x)
            torch.testing.assert_close(x[kept], y.expand_as(x)[kept], rtol=0, atol=1e-6)
            assert (x - y)[~kept].abs().min() > 0
    small = picture[..., ::2, ::2]
    hi, lo = draw(for_upscale(small, 16, [2, 1]))
    torch.testing.assert_close(lo, small.expand_as(lo), rtol=0, atol=1e-6)
    assert hi.shape == (2, 3, 16, 16) and hi.isfinite().all()

def test_upscale_in_the_middle():
    "Of three dolls, holding the middle one holds the innermost too, as its average."
    small = torch.rand(1, 3, 8, 8)*2 - 1
    given = for_upscale(small, 16, [4, 2, 1])
    assert given.pictures[0] is None and torch.equal(given.pictures[1], small) and torch.allclose(given.pictures[2], torch.nn.functional.avg_pool2d(small, 2))
    given = for_upscale(small[..., :4, :4], 16, [4, 2, 1])
    assert given.pictures[:2] == [None, None]

def test_a_weak_img2img_changes_little():
    d = Diffusion(DiffusionConfig(shifted=True), [2, 1]); net = Gaussian(d)
    picture = torch.full((1, 3, 8, 8), .3)
    calls, far = [], []
    for strength in (.1, .5, 1.):
        net.calls = 0
        far.append((sample(net, d, 8, config=SampleConfig(steps=20, guidance=1.), seeds=[0], given=for_img2img(picture, [2, 1], strength))[0] - picture).abs().mean().item())
        calls.append(net.calls)
    assert far[0] < far[1] < far[2] and calls[0] < calls[1] < calls[2] == 20
    plain = sample(net, d, 8, config=SampleConfig(steps=20, guidance=1.), seeds=[0])
    forgotten = sample(net, d, 8, config=SampleConfig(steps=20, guidance=1.), seeds=[0], given=for_img2img(picture, [2, 1], 1.))
    assert all(torch.equal(a, b) for a, b in zip(plain, forgotten))

def test_every_wanted_step_is_taken():
    d = Diffusion(DiffusionConfig(prediction='x0'), [1])
    for k in (100, 1000): assert len(list(sample_steps(Gaussian(d), d, 2, config=SampleConfig(steps=k, spacing='logsnr', guidance=1.)))) == k

small = torch.zeros(1, 3, 8, 8)
@pytest.mark.parametrize('change,said', [
    (dict(size=17), 'cannot sample pictures of 17 x 17 pixels.*multiples of 2'), (dict(size=(16, 17)), '17 x 16'), (dict(size=0), '0 x 0'),
    (dict(cond=torch.zeros(3, 3, 6), seeds=[1, 2]), '3 prompts, 2 seeds'), (dict(cond=torch.zeros(1, 3, 6), seeds=[1, 2]), '1 prompts, 2 seeds'),
    (dict(cond=torch.zeros(2, 3, 6), mask=torch.ones(3, 3)), '2 prompts, 3 masks'), (dict(cond=torch.zeros(2, 3, 6), uncond=torch.zeros(1, 3, 6)), '2 prompts, 1 negative prompts'),
    (dict(cond=torch.zeros(2, 3, 6), micros=dict(scale=torch.ones(3))), '2 prompts, 3 scale'), (dict(cond=torch.zeros(2, 3, 6), seeds=PictureNoise([1])), '2 prompts, 1 seeds'),
    (dict(noise=[torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 9, 8)]), 'noise: found shapes'), (dict(noise=[torch.zeros(1, 3, 16, 16)]), 'noise: found shapes'),
    (dict(noise=[torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 8, 8)]), 'noise: found shapes'),
    (dict(seeds=[1, 2], noise=[torch.zeros(3, 3, 16, 16), torch.zeros(3, 3, 8, 8)]), '2 seeds, 3 first noises'),
    (dict(given=Given([small])), 'Given.pictures: found 1 resolutions, expected 2'), (dict(given=Given([small, small])), r'Given.pictures: found shape \[1, 3, 8, 8\], expected \[1 or 1, 3, 16, 16\]'),
    (dict(given=Given([None, small], [torch.zeros(1, 1, 8, 8, dtype=bool)]*2)), 'Given.free'), (dict(given=Given([None, small.expand(3, -1, -1, -1)]), seeds=[1, 2]), 'Given.pictures'),
    (dict(config=SampleConfig(steps=0)), 'choose 1 to 1000')], ids=lambda o: '+'.join(o) if isinstance(o, dict) else '')
def test_arguments_that_do_not_fit(nets, change, said):
    "Words, and no call of the network: these were errors of shapes somewhere inside, or other sizes than were wanted."
    calls = []
    def net(x, *args): calls.append(1); return [o*0 for o in x]
    with pytest.raises(ValueError, match=said): sample(net, Diffusion(DiffusionConfig(), [2, 1]), **{**dict(size=16), **change})
    assert not calls

def test_strength_needs_pictures_to_begin_with():
    with pytest.raises(ValueError, match='strength: found 0.5, expected 1: .*none at resolution 0'): Given([None, small], strength=.5)
    with pytest.raises(ValueError, match='strength: found 0.5'): Given([torch.zeros(1, 3, 16, 16), None], strength=.5)
    Given([None, small])

def test_a_flat_prediction_is_rescaled_to_something_finite():
    flat = torch.full((2, 3, 4, 4), .5)
    assert push(flat*0, flat, 3., .7).isfinite().all() and push(flat*0, flat*0, 3., .7).isfinite().all()

def test_noise_by_seed_or_by_source(nets):
    (cond, mask), d = prompts(3), Diffusion(DiffusionConfig(), [1])
    for config in (SampleConfig(steps=3), SampleConfig(steps=3, solver='ddpm')):
        draw = lambda seeds: sample(nets[0], d, 8, cond, mask, config=config, seeds=seeds)[0]
        assert torch.equal(draw([4, 5, 6]), draw(PictureNoise([4, 5, 6]))) and torch.equal(draw([4, 5, 6]), draw(PictureNoise([4, 5, 6], 'cpu', on_device=True)))

def test_noise_is_drawn_only_where_it_is_used(monkeypatch):
    d, drawn = Diffusion(DiffusionConfig(prediction='x0'), [1]), []
    call = PictureNoise.__call__
    monkeypatch.setattr(PictureNoise, '__call__', lambda self, *shape: drawn.append(shape) or call(self, *shape))
    for solver, eta, count in (('unipc', 0., 1), ('ddim', 0., 1), ('ddim', .5, 5), ('ddpm', 0., 5)):
        drawn.clear()
        sample(Gaussian(d), d, 8, config=SampleConfig(steps=5, solver=solver, eta=eta, guidance=1.))
        assert len(drawn) == count, solver

@pytest.mark.parametrize('solver,threshold', product(solvers, ('none', 'clip', 'dynamic', 'dynamic_if')))
def test_a_gpu_is_never_waited_for(solver, threshold):
    "Rehearsed with fake CUDA tensors: a step that reads a number back from the GPU, or mixes devices, raises an error."
    from torch._subclasses.fake_tensor import FakeTensorMode
    d = Diffusion(DiffusionConfig(shifted=True), [2, 1])
    config = SampleConfig(steps=4, solver=solver, threshold=threshold, guidance_rescale=.5, guidance_interval=(0., .9))
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.ones(3, 3, 3, 3, device='cuda')
        def net(x, t, cond, mask, micros):
            assert {o.device.type for o in (*x, t, cond, mask)} == {'cuda'}
            return [torch.nn.functional.conv2d(o, weight, padding=1) for o in x]
        cond, mask = torch.zeros(2, 3, 6, device='cuda'), torch.ones(2, 3, device='cuda')
        picture, hole = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
        for given in (None, for_upscale(picture[..., ::2, ::2], 16, [2, 1]), for_img2img(picture, [2, 1]), for_inpaint(picture, hole, [2, 1], repeats=2)):
            out = sample(net, d, 16, cond, mask, config=config, seeds=[0, 1], given=given)
            assert [(o.device.type, o.dtype, tuple(o.shape)) for o in out] == [('cuda', torch.float32, (2, 3, s, s)) for s in (16, 8)]

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
@pytest.mark.parametrize('solver', solvers)
def test_a_real_gpu_is_never_waited_for(nets, solver):
    net, (cond, mask) = nets[0].cuda(), (o.cuda() for o in prompts(2))
    try:
        for on_device in (False, True):
            steps = sample_steps(net, Diffusion(DiffusionConfig(), [1]), 8, cond, mask, config=SampleConfig(steps=4, solver=solver), seeds=PictureNoise([0, 1], 'cuda', on_device))
            next(steps)
            torch.cuda.set_sync_debug_mode('error')
            try: list(steps)
            finally: torch.cuda.set_sync_debug_mode('default')
    finally: net.cpu()
