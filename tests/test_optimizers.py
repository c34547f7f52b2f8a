"Every optimizer by name: it learns, its state survives a trip to disk, and no parameter depends on the history of another."
import math
from typing import get_args, get_type_hints
import pytest, torch
from torch import nn
from mdm.training.sharded import full_optimizer_state, load_optimizer_state
from mdm.training.optimizers import Muon, lr_factor, optimizer_of, orthogonalize
from mdm.recipe import TrainConfig, load_recipe

names = ['adamw', 'adam', 'muon']

def make(name, model, *more):
    return optimizer_of(load_recipe('shapes', [f'train.optimizer={name}', 'train.betas=[0.9,0.99]', 'train.weight_decay=0.01', *more]))([[*model.parameters()]], lr=3e-3)

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 1))

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
    with pytest.raises(ValueError, match="train.optimizer: found 'lamb', expected one of adamw, adam, muon"): optimizer_of(recipe)

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
