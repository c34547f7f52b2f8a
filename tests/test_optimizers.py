"Every optimizer by name: it learns, and its state survives a trip to disk."
import math
from typing import get_args, get_type_hints
import pytest, torch
from torch import nn
from mdm.training.sharded import full_optimizer_state, load_optimizer_state
from mdm.training.optimizers import Muon, lr_factor, optimizer_of, orthogonalize
from mdm.recipe import TrainConfig, load_recipe

names = get_args(get_type_hints(TrainConfig)['optimizer'])

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
    load_optimizer_state(again, opt2, state)
    assert steps(model, opt, 8, 8) == steps(again, opt2, 8, 8)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))

@pytest.mark.parametrize('name', names)
def test_its_settings_come_from_the_recipe(name):
    model = network(); opt = make(name, model)
    h = opt.hypers[0]
    assert h['lr'] == 3e-3 and h['wd'] == .01 and h['mom'] == .9
    assert h.get('sqr_mom', .99) == .99 and ('sqr_mom' in h) == (name not in ('sgd', 'larc'))
    opt.set_hyper('lr', .5)
    assert opt.hypers[0]['lr'] == .5

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
