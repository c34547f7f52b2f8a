"Which steps are taken and how one is taken: orders, spacings, precision."
from itertools import product
from math import log, log1p
from typing import get_args
import pytest, torch
from mdm.diffusion.schedule import make_gammas, schedules, shift_gammas
from mdm.diffusion.solvers import Past, advance, choose_steps, half_logsnr, threshold, timesteps
from mdm.diffusion.settings import Guided, Solver, Spacing, Threshold

deterministic = ('ddim', 'dpm++2m', 'unipc')

def test_orders():
    "Half the step, and the error is 1/2, 1/4 and 1/8."
    var = lambda g: .09*g + 1 - g
    def error(solver, steps):
        gs = torch.sigmoid(2*torch.linspace(-3, 3, steps + 1, dtype=torch.float64))
        past, x = (), torch.tensor([1.5], dtype=torch.float64).view(1, 1, 1, 1)
        exact = gs[-1].sqrt()*.5 + (x - gs[0].sqrt()*.5)*(var(gs[-1])/var(gs[0])).sqrt()
        for g, h in zip(gs, gs[1:]): x, past = advance(solver, x, .5 + .09*g.sqrt()/var(g)*(x - g.sqrt()*.5), g, h, past)
        return (x - exact).abs().item()
    for solver, factor in zip(deterministic, (2, 4, 8)): assert abs(error(solver, 128)/error(solver, 256)/factor - 1) < .1, solver

@pytest.mark.parametrize('schedule,shift', list(product(schedules, (1, 4))))
def test_logsnr_is_even(schedule, shift):
    gammas = shift_gammas(make_gammas(schedule), shift)
    for k in (1, 2, 5, 25, 400, 1000):
        ts = timesteps(1000, k, 'logsnr', gammas)
        assert ts[-1] == 0 and (ts.diff() < 0).all() and 1 <= ts[-2] and ts[0] <= 1000
    gaps = half_logsnr(gammas[timesteps(1000, 12, 'logsnr', gammas)[1:-5]]).diff()
    assert gaps.min() > .8*gaps.max() and timesteps(1000, 12, 'logsnr', gammas)[0] == 1000

@pytest.mark.parametrize('schedule', schedules)
def test_as_many_steps_as_were_wanted(schedule):
    "'logsnr' merged steps once: of 100, 250, 500 and 1000 it took 92, 200, 341 and 555."
    gammas = make_gammas(schedule)
    for k, spacing in product((1, 2, 3, 10, 100, 250, 500, 999, 1000), get_args(Spacing)):
        ts = timesteps(1000, k, spacing, gammas)
        assert len(ts) == k + 1 and (ts.diff() < 0).all() and ts[0] <= 1000 and ts[-1] == 0, (k, spacing)
        assert ts.tolist() == choose_steps(1000, k, spacing, gammas.tolist())
    assert torch.equal(timesteps(1000, 1000, 'logsnr', gammas), torch.arange(1000, -1, -1))

def test_as_many_steps_in_a_short_schedule():
    gammas = make_gammas('deepfloyd', 12).tolist()
    for k in range(1, 13):
        steps = choose_steps(12, k, 'logsnr', gammas)
        assert len(set(steps)) == k + 1 and steps == sorted(steps, reverse=True) and steps[0] == 12 and steps[-1] == 0

def test_few_steps_are_where_they_were():
    "Filling up changes nothing where no step is wanted twice."
    lam = half_logsnr((gammas := make_gammas())[1:])
    for k in (2, 5, 10, 25):
        wanted = torch.linspace(lam[0], -lam[0], k - 1, dtype=torch.float64)
        nearest = (lam[:, None] - wanted).abs().argmin(0) + 1
        assert len(nearest.unique()) == k - 1
        assert choose_steps(1000, k, 'logsnr', gammas.tolist()) == [1000, *nearest.flip(0).tolist(), 0]

@pytest.mark.parametrize('call,said', [
    (lambda: timesteps(1000, 0), '1 to 1000'), (lambda: timesteps(1000, 1001), '1 to 1000'), (lambda: timesteps(1000, 5, 'karras'), "spacing: found 'karras', expected 'uniform'"),
    (lambda: threshold(torch.zeros(1, 3, 2, 2), 'clamp'), "threshold: found 'clamp', expected 'none'"),
    (lambda: advance('euler', *torch.zeros(2, 1, 3, 2, 2), .3, .5), "solver: found 'euler', expected 'ddim'")])
def test_unknown_names_are_refused(call, said):
    with pytest.raises(ValueError, match=said): call()

@pytest.mark.parametrize('solver', get_args(Solver))
def test_coefficients_are_computed_in_double_precision(solver):
    "Near the clean end 1 - gamma has few digits in float32: a step from there lost them."
    g, h = 1 - 3e-6, 1 - 1e-6
    x, x0, z = (torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(k)) for k in range(3))
    past = (Past(x, x0 + .1, 1 - 9e-6), Past(x, x0 - .1, 1 - 2e-5))
    new, _ = advance(solver, x, x0, g, h, past, z)
    exact, _ = advance(solver, x.double(), x0.double(), g, h, tuple(Past(p.x.double(), p.x0.double(), p.g) for p in past), z.double())
    assert new.dtype == torch.float32 and (new - exact).abs().max() < 2e-6

def test_numbers_and_tensors_are_the_same():
    x, x0, z = torch.randn(3, 1, 3, 4, 4)
    as_tensors = lambda *gs: [torch.tensor(g, dtype=torch.float64) for g in gs]
    for solver in get_args(Solver):
        past = (Past(x, x0 + .1, .2),)
        assert torch.equal(advance(solver, x, x0, .3, .5, past, z)[0], advance(solver, x, x0, *as_tensors(.3, .5), past, z)[0])
    assert half_logsnr(.3) == half_logsnr(torch.tensor(.3, dtype=torch.float64)) == (log(.3) - log1p(-.3))/2 and half_logsnr(1.) == float('inf')

@pytest.mark.parametrize('solver', get_args(Solver))
def test_equally_noisy_neighbours(solver):
    "The end of the 'sigmoid' schedule has steps of no length: nothing moves there, and the step after it is finite."
    x, x0, z = torch.randn(3, 1, 3, 4, 4)
    same, past = advance(solver, x, x0, .3, .3, (), z)
    torch.testing.assert_close(same, x)
    new, _ = advance(solver, same, x0, .3, .5, past, z)
    assert new.isfinite().all()

def test_names_stand_once():
    from mdm.diffusion.settings import SampleConfig
    from mdm.utils.configs import options
    choices = {o.name: o.choices for o in options(SampleConfig) if o.choices}
    assert choices == dict(solver=get_args(Solver), spacing=get_args(Spacing), threshold=get_args(Threshold),
                           guidance_networks=get_args(Guided))
