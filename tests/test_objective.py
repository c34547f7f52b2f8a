"The schedule and the training objective: precision, mixed batches, refusals, a rehearsal of a GPU."
import copy, importlib.util, math, tarfile
from itertools import product
from pathlib import Path
from typing import get_args, get_type_hints
import numpy as np
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from mdm.data.shapes import parse_caption
from mdm.diffusion.objective import Diffusion, DiffusionConfig, flow_velocity, pyramid, read_as
from mdm.diffusion.sampler import sample
from mdm.diffusion.schedule import (LossWeight, Prediction, TimeSampling, add_noise, convert, flow_time, from_x0, make_gammas,
                                    make_target, predictions, schedules, shift_gammas, to_x0)
from mdm.diffusion.settings import SampleConfig, Solver
from mdm.recipe import RecipeError, load_recipe, recipe_dict
from tiny_models import data, fit, make, model, recipe

def zero(x, *args): return [torch.zeros_like(o) for o in x]

def test_names_of_schedules_and_predictions_stand_once():
    hints = get_type_hints(DiffusionConfig)
    assert get_args(hints['schedule']) == schedules and hints['prediction'] == hints['loss_target'] == Prediction

@pytest.mark.parametrize('schedule', schedules)
def test_schedules_keep_their_digits_at_the_clean_end(schedule):
    gammas = make_gammas(schedule)
    assert gammas.dtype == torch.float64
    if schedule == 'deepfloyd':
        a = [math.cos((s/1000 + .008)/1.008*math.pi/2)**2 for s in (0, 1)]
        assert (1 - gammas[1]).item() == pytest.approx(1 - a[1]/a[0], rel=1e-9)
    table = Diffusion(DiffusionConfig(schedule=schedule, shifted=True, shift_power=2.), [16, 4, 1]).gammas
    assert table.dtype == torch.float64 and table.shape == (3, 1001)
    log_snr = torch.logit(table[:, 1:])
    for row, f in zip(log_snr, (16, 4)): torch.testing.assert_close(row, log_snr[-1] - 2*math.log(f), rtol=0, atol=1e-8)

@pytest.mark.parametrize('source,target', [*product(predictions, predictions)])
def test_every_prediction_becomes_every_other(source, target):
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    gamma = torch.tensor([.999, .5, .01]).double().view(3, 1, 1, 1, 1)
    x_t = add_noise(x0, eps, gamma)
    truth = [make_target(x0, eps, gamma, kind).expand_as(x_t) for kind in (source, target)]
    torch.testing.assert_close(convert(truth[0], x_t, gamma, source, target), truth[1], rtol=1e-9, atol=1e-9)

@pytest.mark.parametrize('shifted', [False, True])
def test_v_becomes_eps_without_a_loss_of_digits(shifted):
    "Through x0 the error at the first step would be 2e-5."
    d = Diffusion(DiffusionConfig(shifted=shifted), [1])
    rng = torch.Generator().manual_seed(0)
    images, noise = torch.rand(8, 3, 16, 16, generator=rng)*2 - 1, torch.randn(8, 3, 16, 16, generator=rng)
    noised = d.noised(images, tau=torch.zeros(8, dtype=torch.long), noise=[noise])
    gamma = d.gammas[0, 1]
    v = (gamma.sqrt()*noise.double() - (1 - gamma).sqrt()*images.double()).float()
    found = d.compare([v], noised)
    assert (found.preds[0] - noise).abs().max() < 1e-6 and found.loss < 1e-12
    assert (found.x0[0] - images).abs().max() < 1e-6

@pytest.mark.parametrize('kind', ['V', 'epsilon', ''])
def test_an_unknown_prediction_is_refused(kind):
    x = torch.zeros(1, 3, 4, 4)
    for call in (to_x0, from_x0):
        with pytest.raises(ValueError, match=f"unknown prediction '{kind}': choose one of v, eps, x0"):
            call(x, x, torch.tensor(.5), kind)
    with pytest.raises(ValueError, match='unknown prediction'): make_target(x, x, torch.tensor(.5), kind)

@pytest.mark.parametrize('ratio,n', [*product([[2., 1.], [1., 1.], [1., 2., 3.]], [1, 2, 3, 4, 5, 7, 32])])
def test_every_scale_of_a_mixed_batch_has_its_weight(ratio, n):
    scales = [4, 2, 1][-len(ratio):]
    weights = [3., 2., 1.][-len(ratio):]
    config = DiffusionConfig(prediction='eps', double_loss=True, mixed_ratio=ratio, multi_res_weights=weights)
    found = Diffusion(config, scales).loss(zero, torch.zeros(n, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    means = [o.mean() for o in found.per_scale]
    torch.testing.assert_close(found.loss, sum(w*m for w, m in zip(config.multi_res_weights, means)))
    assert len(found.per_scale[-1]) == n and len(found.per_sample) == n
    shares = [sum(ratio[:k + 1])/sum(ratio) for k in range(len(ratio))]
    assert [len(o) for o in found.per_scale] == [max(1, int(m*n + 1e-9)) for m in shares]

def test_a_batch_of_one_trains_every_scale_and_logs_no_nan():
    d = Diffusion(DiffusionConfig(prediction='eps', double_loss=True, mixed_ratio=[1., 1.]), [4, 1])
    found = d.loss(zero, torch.zeros(1, 3, 8, 8))
    assert all(o.mean().isfinite() for o in found.per_scale) and found.loss.isfinite()
    torch.testing.assert_close(found.loss, found.per_scale[0].mean() + found.per_scale[1].mean())

@pytest.mark.parametrize('size,scales', [((17, 17), [2, 1]), ((16, 18), [4, 1]), ((20, 16), [8, 4, 1])])
def test_a_size_that_the_scales_do_not_divide_is_refused(size, scales):
    images, words = torch.zeros(1, 3, *size), f'{size[1]} x {size[0]} pixels cannot be averaged down by {scales[0]}'
    with pytest.raises(ValueError, match=words): pyramid(images, scales)
    with pytest.raises(ValueError, match=words): Diffusion(DiffusionConfig(), scales).noised(images)

@pytest.mark.parametrize('name', ['multi_res_weights', 'mixed_ratio'])
def test_weights_of_another_number_than_the_scales_are_refused(name):
    with pytest.raises(ValueError, match=f'{name} is .*: give one number for each of the 2 scales'):
        Diffusion(DiffusionConfig(**{name: [1.]}), [2, 1])

def test_vdm_weights_weigh_the_steps():
    d = Diffusion(DiffusionConfig(prediction='eps', vdm_weights=True), [1])
    tau = torch.tensor([1, 500, 998])
    found, w = d.loss(zero, torch.zeros(3, 3, 8, 8), tau=tau), d.vdm[tau + 1]
    torch.testing.assert_close(found.loss, (w*found.per_sample).sum()/w.sum())

class Copies(TorchDispatchMode):
    "Counts tensors that go from the CPU to a GPU."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        copied = func is torch.ops.aten._to_copy.default and args[0].device.type == 'cpu' and out.device.type == 'cuda'
        self.count += copied
        return out

@pytest.mark.parametrize('more', [{}, dict(vdm_weights=True), dict(time_sampling='logsnr', loss_weight='sigmoid', schedule='flow'),
                                  dict(time_sampling='logit_normal', loss_weight='min_snr', prediction='x0', min_divisor=.05)], ids=str)
def test_a_gpu_would_run_the_loss_without_waiting(more):
    "A fake tensor has no numbers, so anything that would wait for one raises; tables are copied to the device once."
    with FakeTensorMode():
        config = DiffusionConfig(shifted=True, double_loss=True, mixed_ratio=[2., 1.], output_scale=3., **more)
        d = Diffusion(config, [4, 1])
        images, counts = torch.zeros(3, 3, 8, 8, device='cuda'), []
        for _ in range(3):
            with Copies() as copies: found = d.loss(zero, images)
            counts.append(copies.count)
        assert counts[0] > 0 and counts[1:] == [0, 0]
        parts = found.loss, found.per_sample, *found.per_scale, *found.preds, *found.targets, *found.x0
        assert {(o.device.type, o.dtype) for o in parts} == {('cuda', torch.float32)}

def test_shift_gammas_keeps_the_dtype():
    for dtype in (torch.float32, torch.float64):
        assert shift_gammas(torch.tensor([.5], dtype=dtype), 4, 2).dtype == dtype

# ---- objectives

def test_new_settings_are_off_by_default():
    "Loss and draws as they were before there were any: computed here by hand, equal in every bit."
    config = DiffusionConfig(shifted=True, double_loss=True, mixed_ratio=[2., 1.], multi_res_weights=[3., 1.])
    d, rng = Diffusion(config, [4, 1]), lambda: torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 8, 8, generator=rng())*2 - 1
    noised, chance = d.noised(images, generator=rng()), rng()
    assert torch.equal(noised.tau, torch.randint(1000, (6,), generator=chance))
    for o in noised.noise: assert torch.equal(o, torch.randn(o.shape, generator=chance))
    raw = [torch.tanh(o) for o in noised.x_t]
    found, hand = d.compare(raw, noised), 0
    for v, x, e, g, w in zip(raw, noised.x_t, noised.noise, noised.gammas, config.multi_res_weights):
        error = ((1 - g).sqrt().float()*x + g.sqrt().float()*v - e).square().mean((1, 2, 3))
        hand = hand + torch.nn.functional.pad(error*w/(len(error)/6), (0, 6 - len(error)))
    assert torch.equal(found.per_sample, hand) and torch.equal(found.loss, hand.sum()/6)

@pytest.mark.parametrize('source', predictions)
def test_flow_is_exact_at_both_ends(source):
    "With a float64 truth; from x0 near the clean end and from eps near the noisy one, digits are lost in any formula."
    x0, eps = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    gamma = make_gammas('flow')[{'x0': [500, 900, 1000], 'eps': [1, 100, 500]}.get(source, [1, 500, 1000])].view(3, 1, 1, 1)
    x_t, truth = add_noise(x0, eps, gamma), make_target(x0, eps, gamma, source)
    found = convert(truth.float(), x_t.float(), gamma, source, 'flow')
    torch.testing.assert_close(found.double(), eps - x0, rtol=0, atol=2e-6)

@pytest.mark.parametrize('n', [2, 3, 50, 1000])
def test_flow_schedule_is_the_straight_line(n):
    gammas = make_gammas('flow', n)
    times = flow_time(gammas)
    torch.testing.assert_close(times[:-1], torch.arange(n, dtype=torch.float64)/n, rtol=0, atol=1e-12)
    assert (gammas.diff() < 0).all() and gammas[-1] > 0 and times[-1].item() == pytest.approx(1 - .5/n)
    assert torch.equal(Diffusion(DiffusionConfig(schedule='flow', num_steps=n), [1]).gammas[0], gammas)      # not rounded to float32

@pytest.mark.parametrize('source,target', [o for o in product(predictions, predictions) if o[0] != o[1]])
def test_a_limited_divisor_limits_the_loss(source, target):
    "Near both ends an error of 1 is at most 1/limit large, a truth costs nothing, and where no limit is met nothing changes."
    def loss(limit, off, steps):
        config = DiffusionConfig(prediction=source, loss_target=target, schedule='flow', min_divisor=limit)
        d = Diffusion(config, [1])
        def network(x, t, *args): return [make_target(images.double(), noise[0].double(), d.gammas[0, t + 1].view(-1, 1, 1, 1), source).float() + off]
        return d.loss(network, images, tau=torch.tensor(steps), noise=noise).per_sample
    images, noise = torch.rand(4, 3, 4, 4) - .5, [torch.randn(4, 3, 4, 4)]
    ends, inside = [0, 1, 998, 999], [100, 200, 700, 800]
    assert (loss(.05, 0., ends) < 1e-6).all() and (loss(.05, 0., inside) < 1e-6).all()
    assert (loss(.05, 1., ends) <= 1.01/.05**2).all()
    torch.testing.assert_close(loss(.05, 1., inside), loss(0., 1., inside), rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('sampling', get_args(TimeSampling))
@pytest.mark.parametrize('schedule', schedules)
def test_steps_are_drawn_as_their_chances_say(sampling, schedule):
    d = Diffusion(DiffusionConfig(time_sampling=sampling, schedule=schedule, logit_mean=.5, logit_std=.8), [4, 1])
    tau = d.draw_steps(20_000, generator=torch.Generator().manual_seed(0))
    assert tau.dtype == torch.int64 and tau.min() >= 0 and tau.max() <= 999
    seen, wanted = (o.reshape(20, 50).sum(1) for o in (tau.bincount(minlength=1000)/20_000, d.chances.float()))
    assert (seen - wanted).abs().max() < .015
    if sampling == 'logit_normal' and schedule in ('flow', 'deepfloyd'):
        logsnr = torch.logit(d.gammas[-1, 1:])[tau]
        assert abs(logsnr.mean() + 1) < .05 and abs(logsnr.std() - 1.6) < .05

@pytest.mark.parametrize('sampling', ['logit_normal', 'logsnr'])
def test_mixed_batches_and_given_steps_go_with_any_sampling(sampling):
    config = DiffusionConfig(time_sampling=sampling, mixed_ratio=[2., 1.], double_loss=True, loss_weight='sigmoid', loss_target='v')
    d, images = Diffusion(config, [4, 1]), torch.rand(6, 3, 8, 8)
    tau = torch.tensor([0, 1, 500, 998, 999, 3])
    assert torch.equal(d.noised(images, tau=tau).tau, tau)
    found, weights = d.loss(zero, images, tau=tau), d.level_weights()
    assert [len(o) for o in found.per_scale] == [4, 6]
    hand = found.per_scale[1]*weights[1][tau]
    hand[:4] += found.per_scale[0]*weights[0][tau[:4]]*6/4
    torch.testing.assert_close(found.per_sample.double(), hand.double())
    torch.testing.assert_close(found.loss, found.per_sample.mean())
    assert d.loss(zero, images).loss.isfinite()

@pytest.mark.parametrize('weight', ['min_snr', 'sigmoid'])
@pytest.mark.parametrize('shifted', [False, True])
def test_weighted_losses_agree_in_every_space(weight, shifted):
    "A loss of one network, in every space, at every resolution, with pictures that are divided or shifted."
    images, noise, losses = torch.rand(3, 3, 8, 8) - .5, [torch.randn(3, 3, k, k) for k in (8, 2)], []
    for prediction, target in product(predictions, predictions):
        kinds = dict(prediction=prediction, loss_target=target, loss_weight=weight, shifted=shifted, shift_power=2.)
        d = Diffusion(DiffusionConfig(double_loss=True, **kinds), [4, 1])
        def network(x, t, *args): return [from_x0(.5*o, o, d.gammas[i, t + 1].view(-1, 1, 1, 1), prediction) for i, o in enumerate(x)]
        losses.append(d.loss(network, images, tau=torch.tensor([200, 500, 800]), noise=noise).per_sample/d.config.rescale_signal)
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(16, 3), rtol=1e-4, atol=1e-5)

def test_divided_pictures_are_weighted_like_shifted_ones():
    tables = [Diffusion(DiffusionConfig(loss_weight='min_snr', loss_target='eps', shifted=o, shift_power=2.), [16, 4, 1]).level_weights() for o in (False, True)]
    torch.testing.assert_close(*tables, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize('sampling', get_args(TimeSampling))
def test_sigmoid_weights_do_not_depend_on_the_sampling(sampling):
    "The expected loss of a network is the same, but for the few steps at which the ratio is limited."
    d = Diffusion(DiffusionConfig(loss_weight='sigmoid', loss_target='v', schedule='flow', time_sampling=sampling), [1])
    even = Diffusion(DiffusionConfig(loss_weight='sigmoid', loss_target='v', schedule='flow', time_sampling='logsnr'), [1])
    expected = [(o.level_weights()[0]*o.chances).sum().item() for o in (d, even)]
    assert expected[0] == pytest.approx(expected[1], rel=.05)

def test_vdm_is_the_old_flag():
    tau, images = torch.tensor([1, 500, 998]), torch.zeros(3, 3, 8, 8)
    draw = lambda **kw: Diffusion(DiffusionConfig(prediction='eps', **kw), [1]).loss(zero, images, tau=tau, generator=torch.Generator().manual_seed(0)).loss
    assert torch.equal(draw(vdm_weights=True), draw(loss_weight='vdm')) and not torch.equal(draw(), draw(loss_weight='vdm'))

@pytest.mark.parametrize('change,says', [
    ('time_sampling=cosine', "diffusion.time_sampling: found 'cosine', expected 'uniform', 'logit_normal' or 'logsnr'"),
    ('loss_weight=snr', "diffusion.loss_weight: found 'snr', expected 'none', 'vdm', 'min_snr' or 'sigmoid'"),
    ('prediction=velocity', "diffusion.prediction: found 'velocity', expected 'v', 'eps', 'x0' or 'flow'"),
    ('schedule=linear', 'diffusion.schedule: found'), ('logit_std=0', 'diffusion.logit_std: found 0.0, expected a number above 0'),
    ('min_snr_gamma=-1', 'diffusion.min_snr_gamma: found -1.0'), ('min_divisor=1', 'diffusion.min_divisor: found 1.0'),
    ('prediction=x0 loss_target=flow min_divisor=0', 'diffusion.min_divisor: found 0.0, expected above 0, e.g. 0.05: the loss turns x0 into flow'),
    ('vdm_weights=true loss_weight=min_snr', "diffusion.loss_weight: found 'min_snr', expected 'none' or 'vdm', since diffusion.vdm_weights is true")])
def test_impossible_objectives_are_refused(change, says):
    with pytest.raises(RecipeError) as e: load_recipe('shapes', [f'diffusion.{o}' for o in change.split()])
    assert says in str(e.value)

@pytest.mark.parametrize('change', ['schedule=flow prediction=flow loss_target=flow time_sampling=logit_normal',
    'schedule=flow prediction=x0 loss_target=flow min_divisor=0.05 time_sampling=logit_normal logit_mean=0.8 logit_std=0.8',
    'prediction=x0 loss_target=v min_divisor=0.05 loss_weight=min_snr', 'time_sampling=logsnr loss_weight=sigmoid mixed_ratio=[1,1]'])
def test_objectives_train_and_sample(make, change):
    learn = make(*[f'diffusion.{o}' for o in change.split()])
    fit(learn, 2)
    assert learn.steps == 2 and all(p.isfinite().all() for p in learn.model.parameters())
    before = make(*[f'diffusion.{o}' for o in change.split()]).model.state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert len(learn.pipe(['a red circle'], n=1, steps=2)) == 1

# ---- models of one kind, read as another

def draw(net, d, dtype, **kwargs):
    noise = [torch.randn(2, 3, 8*s, 8*s, generator=torch.Generator().manual_seed(s)).to(dtype) for s in d.scales]
    cond = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return sample(net, d, 8*d.scales[0], cond, config=SampleConfig(**kwargs), noise=noise)

def lively(model):
    "A function of a model with weights that do something, which takes any dtype."
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    for p in model.parameters(): p.data += .02*torch.randn_like(p)
    def network(x, t, *conditions):
        with torch.no_grad(): return [o.to(x[0].dtype) for o in model([o.float() for o in x], t, *(c.float() if torch.is_tensor(c) else c for c in conditions))]
    return network

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('solver', get_args(Solver))
def test_a_v_model_read_as_a_flow_model_draws_the_same(model, recipe, dtype, solver):
    d, network = Diffusion(recipe.diffusion, model.scales), lively(model)
    kwargs = dict(steps=5, solver=solver, guidance=2.)
    ours = draw(network, d, dtype, **kwargs)
    for kind in ('flow', 'eps', 'x0'):
        theirs = draw(*read_as(network, d, kind), dtype, **kwargs)
        for a, b in zip(ours, theirs): assert (a - b).abs().max() < (1e-5 if kind != 'eps' else 1e-3) and a.std() > .05

def test_a_flow_model_read_as_a_v_model_draws_the_same(model):
    d, network = Diffusion(DiffusionConfig(prediction='flow', schedule='flow', shifted=True), model.scales), lively(model)
    back, other = read_as(network, d, 'v')
    assert other.config.prediction == 'v' and torch.equal(other.gammas, d.gammas)
    for a, b in zip(draw(network, d, torch.float32, steps=5), draw(back, other, torch.float32, steps=5)): assert (a - b).abs().max() < 1e-5

def test_eulers_method_along_the_velocity_is_ddim(model, recipe):
    d, network = Diffusion(recipe.diffusion, model.scales), lively(model)
    drawn = draw(network, d, torch.float64, steps=5, solver='ddim', spacing='trailing', guidance=1., threshold='none')
    velocity, times = flow_velocity(network, d), flow_time(d.gammas)
    cond = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).double()
    z = [torch.randn(2, 3, 8*s, 8*s, generator=torch.Generator().manual_seed(s)).double()/(g[1000].sqrt() + (1 - g[1000]).sqrt()) for s, g in zip(d.scales, d.gammas)]
    for t, s in zip((1000, 800, 600, 400, 200), (800, 600, 400, 200, 0)):
        z = [o + (u[s] - u[t])*f for o, u, f in zip(z, times, velocity(z, torch.full((2,), t - 1), cond, None, None))]
    for a, b in zip(z, drawn): assert (a.clamp(-1, 1) - b).abs().max() < 1e-5

def test_another_schedule_asks_for_the_same_noise(model, recipe):
    "A network that knows its noise level exactly draws the same with the steps of another schedule, up to the error of its solver."
    d = Diffusion(recipe.diffusion, [2, 1])
    lam = -torch.logit(d.gammas[-1, 1:])
    def network(x, t, *args):                                # normal pixels of deviation 0.4, by the noise level of its time input
        at = torch.from_numpy(np.interp(t.numpy(), np.arange(1000.), lam.numpy()))
        out = []
        for o, s in zip(x, d.scales):
            g = shift_gammas(torch.sigmoid(-at), s, d.config.shift_power).view(-1, 1, 1, 1)
            x0 = .3 + .16*g.sqrt()/(.16*g + 1 - g)*(o.double() - .3*g.sqrt())
            out.append(from_x0(x0, o.double(), g, 'v').to(o.dtype))
        return out
    ours = draw(network, d, torch.float32, steps=100, guidance=1., threshold='none')
    theirs = draw(*read_as(network, d, schedule='flow'), torch.float32, steps=100, guidance=1., threshold='none')
    for a, b in zip(ours, theirs): assert (a - b).abs().max() < 5e-3 and a.std() > .2

# ---- the comparison in tests/bench

@pytest.fixture(scope='module')
def bench():
    spec = importlib.util.spec_from_file_location('objectives', Path(__file__).parent/'bench'/'objectives.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def test_every_setting_of_the_comparison_is_a_recipe(bench):
    recipes = {name: load_recipe('shapes', bench.read_setting(name)[1]) for name in bench.settings}
    assert recipe_dict(recipes.pop('today')) == recipe_dict(load_recipe('shapes'))
    assert len({str(recipe_dict(o)['diffusion']) for o in recipes.values()}) == len(bench.settings) - 1
    assert bench.read_setting('mine:loss_weight=sigmoid,mixed_ratio=[2,1],train.lr=1') == ('mine', ['diffusion.loss_weight=sigmoid', 'diffusion.mixed_ratio=[2,1]', 'train.lr=1'])
    with pytest.raises(SystemExit, match='unknown setting'): bench.read_setting('none')

def test_the_comparison_measures_the_same_error_for_every_prediction(bench, data, make):
    "A model, and the same one read as another kind: the same errors of v; a network that says nothing has the error that is known."
    learn = make()
    pipe = learn.pipe
    one, logsnr = bench.v_errors(pipe, data, 8)
    pipe.model, before = read_as_module(pipe.model, pipe.diffusion), pipe.model
    pipe.diffusion = pipe.model.diffusion
    two, _ = bench.v_errors(pipe, data, 8)
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-3, atol=1e-5)
    assert torch.tensor(logsnr).shape == (2, len(bench.levels)) and abs(logsnr[1][5]) < .05

def texts(path):
    "All captions of a shard."
    with tarfile.open(path) as f: return [f.extractfile(o).read().decode() for o in f if o.name.endswith('.txt')]

@pytest.mark.parametrize('plain', [[], ['--plain']], ids=['all', 'plain'])
def test_a_comparison_from_data_to_table(bench, tmp_path, capsys, plain):
    "Two steps of two settings: each is measured once, and captions and pictures are of the kind that was asked for."
    args = ['--steps', '2', '--seeds', '0', '--settings', 'today', 'even', '--captions', '4', '--draw', '2', *plain,
            '--data', str(tmp_path/'data'), '--output', str(tmp_path/'found.json'), 'train.batch_size=4', 'model.channels=[8,8]', 'model.inner.channels=[8,8,8]']
    runs = bench.main(args)
    assert [o['setting'] for o in runs.values()] == ['today', 'even'] and capsys.readouterr().out.count('| today |') == 3
    said = {len(parse_caption(o)) for path in tmp_path.glob('data/**/*.tar') for o in texts(path)}
    assert said == {5} if plain else min(said) < 5
    assert bench.main(args) == runs and 'seed 0' not in capsys.readouterr().out         # nothing was trained again

def test_a_comparison_on_other_pictures(bench, tmp_path, capsys):
    "A judge of retrieval marks pictures of the validation captions; two spacings, two settings."
    from mdm.data.shapes import write_shapes
    from mdm.evaluation.retrieval import RetrievalConfig, train_retrieval
    write_shapes(tmp_path/'mine', 120, 32, seed=1)
    mine = [str(o) for o in sorted((tmp_path/'mine').glob('*.tar'))]
    train_retrieval(mine, tmp_path/'judge', RetrievalConfig(size=16, width=4, layers=2, dim=8, steps=2, batch_size=16))
    asked = ['--steps', '2', '--seeds', '0', '--captions', '24', '--draw', '2', '--spacing', 'logsnr', 'trailing', '--output', str(tmp_path/'found.json'), f'data.files=[{mine[0]}]',
             'train.batch_size=4', 'model.channels=[8,8]', 'model.inner.channels=[8,8,8]', '--settings', 'today', 'low:logit_mean=0,sample.guidance=1', '--retrieval', str(tmp_path/'judge')]
    runs = bench.main([*asked, '--valid', *mine])
    assert [o['setting'] for o in runs.values()] == ['today', 'low']
    for run in runs.values():
        assert set(run['judge']) == {'2 logsnr', '2 trailing'}
        for found in run['judge'].values(): assert set(found) == {'picked', 'FD', 'KID x 1000'} and 0 <= found['picked'] <= 1 and found['FD'] > 0
    assert '| setting | seeds | picked | FD | KID x 1000 | training, s |' in capsys.readouterr().out
    with pytest.raises(SystemExit): bench.main(asked)
    assert '--valid' in capsys.readouterr().err

class read_as_module(torch.nn.Module):
    "What `read_as` gives, as a module."
    def __init__(self, model, diffusion):
        super().__init__()
        self.scales = model.scales
        self.read, self.diffusion = read_as(model, diffusion)
    def forward(self, *args): return self.read(*args)
