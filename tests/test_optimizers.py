"Every optimizer by name: it learns, its state survives a trip to disk, and no parameter depends on the history of another."
import math
from typing import get_args, get_type_hints
import pytest, torch
from torch import nn
from mdm.training.sharded import full_optimizer_state, load_optimizer_state
from mdm.training.optimizers import AdamW8bit, Muon, best_quintics, fast_dtype, lr_factor, optimizer_of, orthogonalize, share_out
from mdm.recipe import TrainConfig, load_recipe

names = ['adamw', 'adam', 'muon', 'adamw8bit']

def make(name, model, *more):
    return optimizer_of(load_recipe('shapes', [f'train.optimizer={name}', 'train.betas=[0.9,0.99]', 'train.weight_decay=0.01', *more]))([[*model.parameters()]], lr=3e-3)

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 1))      # the second has 4,608 weights, enough for bytes

def steps(model, opt, n, first=0):
    losses = []
    for i in range(first, first + n):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i % 4))
        loss = (model(x)[:, 0] - x.mean((1, 2, 3))*10).square().mean()
        loss.backward(); opt.step(); opt.zero_grad(); losses.append(loss.item())
    return losses

@pytest.mark.parametrize('name', names)
def test_it_learns(name):
    model = network(); losses = steps(model, make(name, model), 60)
    assert sum(losses[-4:]) < .97*sum(losses[:4])

@pytest.mark.parametrize('name', names)
def test_its_state_survives_a_trip_to_disk_to_the_last_bit(name, tmp_path):
    model = network(); opt = make(name, model)
    steps(model, opt, 8)
    torch.save((model.state_dict(), full_optimizer_state(model, opt)), tmp_path/'state')
    weights, state = torch.load(tmp_path/'state', weights_only=True)         # plain tensors, numbers, lists and dictionaries
    again = network(); again.load_state_dict(weights); opt2 = make(name, again)
    load_optimizer_state(opt2, state)
    assert steps(model, opt, 8, 8) == steps(again, opt2, 8, 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))

@pytest.mark.parametrize('name', names)
def test_its_settings_come_from_the_recipe(name):
    model = network(); opt = make(name, model)
    h = opt.hypers[0]
    assert h['lr'] == 3e-3 and h['wd'] == .01 and h['mom'] == .9
    assert h['sqr_mom'] == .99
    opt.set_hyper('lr', .5)
    assert opt.hypers[0]['lr'] == .5

def test_other_names_are_refused():
    recipe = load_recipe('shapes')
    recipe.train.optimizer = 'lamb'
    with pytest.raises(ValueError, match="train.optimizer: found 'lamb', expected one of adamw, adam, muon, adamw8bit"): optimizer_of(recipe)

@pytest.mark.parametrize('betas', [(.95, .99), (.9, .999)])
@pytest.mark.parametrize('first', ['inner', 'outer'])
def test_a_thaw_does_not_change_the_steps_of_others(betas, first):
    "An inner network without gradients for 200 steps: at the thaw, and after it, the steps of all vectors are those of AdamW."
    torch.manual_seed(0)
    make = lambda: {k: nn.Parameter(torch.ones(8)) for k in (('inner', 'outer') if first == 'inner' else ('outer', 'inner'))}
    ours, theirs = make(), make()
    a, b = (kind([*ps.values()], lr=1e-3, betas=betas, weight_decay=.1) for kind, ps in ((Muon, ours), (torch.optim.AdamW, theirs)))
    for i in range(206):
        grads = {k: torch.randn(8) for k in ours}
        before = ours['outer'].detach().clone(), theirs['outer'].detach().clone()
        for ps in (ours, theirs):
            for k, p in ps.items(): p.grad = grads[k] if k == 'outer' or i >= 200 else None
        a.step(); b.step()
        if i >= 198: assert torch.allclose(ours['outer'].detach() - before[0], theirs['outer'].detach() - before[1], rtol=1e-3, atol=1e-7), i
    assert all(torch.allclose(p, theirs[k], atol=1e-6) for k, p in ours.items())

def test_each_parameter_moves_as_if_alone():
    "Whatever others do: parameters that join at different steps, matrices and vectors, in one optimizer or in one each."
    torch.manual_seed(0)
    shapes, joins = [(6,), (20, 16), (6,), (3, 16), (20, 16)], [0, 3, 5, 9, 7]
    together, alone = ([nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    one, many = Muon(together, weight_decay=.1), [Muon([p], weight_decay=.1) for p in alone]
    for i in range(14):
        for p, q, s, join in zip(together, alone, shapes, joins):
            p.grad = torch.randn(s) if i >= join and i % 4 else None
            q.grad = None if p.grad is None else p.grad.clone()
        one.step()
        for o in many: o.step()
    assert all(torch.allclose(p, q, atol=2e-4) for p, q in zip(together, alone))

def test_orthogonalize_takes_tall_wide_and_single_matrices():
    g = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(g, full_matrices=False)
    close = lambda a, b: (a.float()*b.float()).sum()/(a.float().norm()*b.float().norm()) > .97
    assert close(orthogonalize(g), u @ v) and close(orthogonalize(g.mT), (u @ v).mT) and close(orthogonalize(g[1]), (u @ v)[1])
    assert orthogonalize(torch.zeros(4, 5)).abs().max() == 0

def test_muon_leaves_weights_without_gradient_alone():
    p, q = nn.Parameter(torch.ones(20, 20)), nn.Parameter(torch.ones(20, 20)); p.grad = torch.randn(20, 20)
    Muon([p, q], weight_decay=.1).step()
    assert torch.equal(q, torch.ones(20, 20)) and not torch.equal(p, torch.ones(20, 20))

def test_muon_of_one_shape_changes_each_matrix_as_if_alone():
    torch.manual_seed(0)
    grads, ps, alone = torch.randn(3, 24, 16, 3, 3), [nn.Parameter(torch.zeros(24, 16, 3, 3)) for _ in range(3)], []
    for p, g in zip(ps, grads): p.grad = g
    Muon(ps, lr=.1).step()
    for p, g in zip(ps, grads):
        q = nn.Parameter(torch.zeros(24, 16, 3, 3)); q.grad = g; Muon([q], lr=.1).step()
        assert torch.allclose(p, q, atol=2e-3)

@pytest.mark.parametrize('kind', get_args(get_type_hints(TrainConfig)['lr_schedule']))
def test_schedules_stay_within_0_and_1_also_beyond_the_end(kind):
    for warmup in (0, 1, 7):
        f = [lr_factor(s, warmup, 40, kind) for s in range(50)]
        assert all(math.isfinite(x) and 0 <= x <= 1 for x in f) and max(f) == pytest.approx(1, abs=.01)
        assert (f[45] == pytest.approx(f[40], abs=1e-6))

@pytest.mark.parametrize('shape', [(64, 64), (48, 432), (256, 256), (32, 16)])
def test_singular_values_end_in_the_stated_band(shape):
    "From 0.003 of the bound of the largest one, all end within 0.27 of 1, whatever the spectrum, the scale and the precision."
    g = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, *shape, generator=g), full_matrices=False)
    n = min(shape)
    for values in (torch.ones(n), torch.linspace(1, .05, n), torch.logspace(0, -1.3, n), torch.logspace(0, -2, n)):
        for scale in (1e-6, 1., 1e4):
            after = torch.linalg.svdvals(orthogonalize(u @ torch.diag(values*scale) @ v).float())
            assert .73 < after.min() and after.max() < 1.27, (values[:3], scale)

def test_four_best_polynomials_come_nearer_than_five_fixed_ones():
    "Distance from U V^T, against Jordan's coefficients after division by the norm: smaller for random matrices, and for spectra down to 1e-4 of the largest."
    def fixed(g):
        x = g/g.norm()
        for _ in range(5): a = x @ x.mT; x = 3.4445*x + (-4.775*a + 2.0315*a @ a) @ x
        return x
    g = torch.Generator().manual_seed(0)
    turn = lambda m, n: torch.linalg.qr(torch.randn(m, n, generator=g))[0]
    spread = lambda low: turn(128, 128) @ torch.diag(torch.logspace(0, low, 128)) @ turn(256, 128).T
    for m in (torch.randn(128, 256, generator=g), torch.randn(128, 128, generator=g), spread(-2), spread(-3), spread(-4)):
        u, _, v = torch.linalg.svd(m, full_matrices=False)
        near = lambda x: (x.float() - u @ v).norm()
        assert near(orthogonalize(m)) < near(fixed(m))

def test_float32_is_used_where_bfloat16_is_slow(monkeypatch):
    for name in ('avx512_bf16', 'amx_tile'): monkeypatch.setattr(torch.cpu, f'_is_{name}_supported', lambda: False, raising=False)
    assert fast_dtype(torch.device('cpu')) == torch.float32 and fast_dtype(torch.device('cuda')) == torch.bfloat16
    g = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    assert orthogonalize(g).dtype == torch.float32 and abs(torch.linalg.svdvals(orthogonalize(g)) - 1).max() < .25
    u, _, v = torch.linalg.svd(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.linspace(1, .02, 64); values[-1] = .003*values.pow(8).sum()**(1/8)          # the least that counts
    after = torch.linalg.svdvals(orthogonalize(u @ torch.diag(values) @ v))
    assert abs(after - 1).max() < .22, (after.min(), after.max())

def test_work_is_divided_evenly():
    costs = [float(1 + i % 7)**2 for i in range(60)]
    for world in (1, 2, 5):
        owners = share_out(costs, world)
        loads = [sum(c for c, o in zip(costs, owners) if o == r) for r in range(world)]
        assert set(owners) == set(range(world)) and max(loads) < 1.1*sum(costs)/world

def test_muon_stacks_a_matrix_and_one_that_is_turned_round():
    torch.manual_seed(0)
    g = torch.randn(24, 40)
    p, q = nn.Parameter(torch.zeros(24, 40)), nn.Parameter(torch.zeros(40, 24)); p.grad, q.grad = g, g.mT.clone()
    Muon([p, q], lr=.1).step()
    assert torch.equal(p, q.mT) and p.abs().max() > 0

def train_plain(opt_of, steps, layout=torch.contiguous_format, frozen=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.GELU(), nn.Conv2d(64, 32, 3), nn.GELU(), nn.Flatten(), nn.Linear(512, 1)).to(memory_format=layout)
    opt, losses = opt_of([*model.parameters()]), []
    for i in range(steps):
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i))
        loss = (model(x)[:, 0] - x.mean((1, 2, 3))*10).square().mean()
        loss.backward()
        if i < frozen: model[0].weight.grad = None
        opt.step(); opt.zero_grad(); losses.append(loss.item())
    return model, opt, losses

def test_bytes_learn_as_float32_does():
    "200 steps with each: equal losses within the noise of the batches."
    settings = dict(lr=2e-3, betas=(.9, .99), weight_decay=.01)
    _, _, a = train_plain(lambda ps: torch.optim.AdamW(ps, **settings), 200)
    _, opt, b = train_plain(lambda ps: AdamW8bit(ps, **settings), 200)
    assert sum(b[-50:]) == pytest.approx(sum(a[-50:]), rel=.1) and sum(b[-50:])/50 < .5*sum(b[:10])/10
    assert {v.dtype for s in opt.state.values() for k, v in s.items() if k == 'square'} == {torch.uint8, torch.float32}

def test_bytes_do_not_depend_on_the_memory_format():
    start, grads = torch.randn(64, 32, 3, 3), torch.randn(3, 64, 32, 3, 3)
    ps = [nn.Parameter(start.clone(memory_format=o)) for o in (torch.contiguous_format, torch.channels_last)]
    opts = [AdamW8bit([p], lr=2e-3) for p in ps]
    for g in grads:
        for p, opt in zip(ps, opts): p.grad = g.clone(memory_format=torch.preserve_format); opt.step()
    assert torch.equal(*ps) and ps[1].is_contiguous(memory_format=torch.channels_last) and not torch.equal(ps[0], start)
    assert torch.equal(opts[0].state[ps[0]]['square'], opts[1].state[ps[1]]['square'])

def test_a_weight_without_gradient_has_no_bytes_and_does_not_change():
    model, opt, _ = train_plain(lambda ps: AdamW8bit(ps, lr=2e-3, weight_decay=.1), 3, frozen=3)
    start, _, _ = train_plain(lambda ps: AdamW8bit(ps), 0)
    assert torch.equal(model[0].weight, start[0].weight) and model[0].weight not in opt.state

def test_bytes_stay_bytes_when_they_are_loaded():
    model, opt, _ = train_plain(lambda ps: AdamW8bit(ps, lr=2e-3), 3, frozen=3)
    again = AdamW8bit(model.parameters())
    load_optimizer_state(again, full_optimizer_state(model, opt))
    for p, s in opt.state.items():
        assert again.state[p].keys() == s.keys() and all(torch.equal(again.state[p][k], v) and again.state[p][k].dtype == v.dtype for k, v in s.items() if k != 'step')

def test_muon_goes_on_from_a_checkpoint_of_an_earlier_version():
    "Its keys, written by hand as they have always been: the step, the mean gradient, and for vectors the mean square."
    model = nn.Sequential(nn.Linear(20, 20))
    g = torch.Generator().manual_seed(0)
    state = {'0.weight': dict(step=7, mean=torch.randn(20, 20, generator=g)), '0.bias': dict(step=7, mean=torch.zeros(20), square=torch.ones(20))}
    groups = [dict(params=['0.weight', '0.bias'], lr=.01, betas=(.95, .99), weight_decay=0., eps=1e-8)]
    opt, before = Muon(model.parameters(), lr=.01), model[0].weight.detach().clone()
    load_optimizer_state(opt, dict(state=state, param_groups=groups))
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    opt.step()
    u, _, v = torch.linalg.svd(state['0.weight']['mean'])
    change = before - model[0].weight.detach()
    assert (change*(u @ v)).sum()/(change.norm()*(u @ v).norm()) > .97 and {s['step'] for s in opt.state.values()} == {8}
    assert full_optimizer_state(model, opt)['state'].keys() == state.keys()
    for name, s in full_optimizer_state(model, opt)['state'].items(): assert s.keys() == state[name].keys()
