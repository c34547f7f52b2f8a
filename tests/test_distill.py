"Students: where they jump, what they should learn, and that a training of one is a training like any other."
import shutil
import pytest, torch
from torch import nn
from mdm.checkpoint import load_checkpoint, save_checkpoint
from mdm.cli.train import mdm_train
from mdm.data.loader import create_dls
from mdm.diffusion.objective import Diffusion, DiffusionConfig
from mdm.diffusion.sampler import PictureNoise, sample_steps, step_pairs
from mdm.diffusion.schedule import from_x0
from mdm.diffusion.settings import SampleConfig
from mdm.diffusion.solvers import choose_steps, consistency_steps, ddim_step, jump, jump_target
from mdm.pipeline import MDMPipeline
from mdm.recipe import DistillConfig, RecipeError, load_recipe, recipe_dict, save_recipe
from mdm.training.distill import (DistillLoss, Teacher, named_recipe, distill_learner, distill_recipe, distill_training, draw_starts,
                                  load_teacher)
from mdm.training.learner import mdm_learner
from mdm.training.run import run_training
from tiny_models import data, even_v, fit, same, small

# ---- the solver

class Blur(nn.Module):
    "Predicts x0 as a part of what it sees, at every resolution; notes the steps that it is called with."
    def __init__(self, diffusion): super().__init__(); self.diffusion, self.seen = diffusion, []
    def forward(self, x, t, cond, mask, micros):
        self.seen.append(t[0].item() + 1)
        return [from_x0(.7*o, o, self.diffusion.signal_power(t + 1, i), 'v') for i, o in enumerate(x)]

@pytest.fixture
def two(): return Diffusion(DiffusionConfig(shifted=True, double_loss=True), [2, 1])

@pytest.mark.parametrize('steps, segments', [(1, 2), (2, 2), (4, 2), (3, 1)])
def test_the_solver_by_hand(two, steps, segments):
    config = SampleConfig(steps=steps, segments=segments, solver='consistency', guidance=1., threshold='none')
    net, draw = Blur(two), PictureNoise([5])
    found = [s.x for s in sample_steps(net, two, 8, config=config, seeds=[5])][-1]
    x, at = [draw(3, 8, 8), draw(3, 4, 4)], 1000
    for t, s in consistency_steps(1000, steps, segments):
        for i in range(2):
            if t <= at: continue
            ratio = two.gammas[i][t]/two.gammas[i][at]
            x[i] = ratio.sqrt().float()*x[i] + (1 - ratio).sqrt().float()*draw(3, *x[i].shape[-2:])
        x, at = [ddim_step(o, .7*o, float(two.gammas[i][t]), float(two.gammas[i][s])) for i, o in enumerate(x)], s
    assert net.seen[0] == 1000 and len(net.seen) == steps       # from pure noise on, one call each
    for a, b, signal in zip(found, x, two.signal): torch.testing.assert_close(a, b*signal, rtol=1e-4, atol=1e-4)

def test_segments():
    for n, k in ((1000, 1), (1000, 3), (12, 4), (7, 7)):
        ends = choose_steps(n, k, 'trailing')
        assert consistency_steps(n, k, k) == [*zip(ends, ends[1:])]
        config = DistillConfig('', segments=k, teacher_steps=max(1, n//k//2), at_start=.3)
        t, end = draw_starts(config, n, 400)
        assert set(end.tolist()) == set(ends[1:])
        low = {hi: lo for hi, lo in zip(ends, ends[1:])}
        for a, b in zip(t.tolist(), end.tolist()): assert a - b >= config.teacher_steps and any(hi >= a and lo == b for hi, lo in low.items())
    assert consistency_steps(1000, 8, 3)[2:4] == [(778, 667), (667, 333)]      # 3, 3 and 2 calls

def test_other_solvers_take_the_steps_that_they_took(two):
    for k, spacing in ((25, 'logsnr'), (8, 'trailing')):
        steps = choose_steps(1000, k, spacing, two.gammas.tolist()[-1])
        assert step_pairs(SampleConfig(steps=k, spacing=spacing, segments=3), two) == [*zip(steps, steps[1:])]
    half = step_pairs(SampleConfig(steps=4, segments=2, solver='consistency'), two, strength=.6, repeats=2)
    assert half == [(500, 0), (250, 0)]
    with pytest.raises(ValueError, match='leaves nothing to do'): step_pairs(SampleConfig(steps=2, solver='consistency'), two, .1)

# ---- the targets

mu, s = .3, .5
class Gaussian(nn.Module):
    "The perfect denoiser of pixels that are independent and normal, at every resolution; predicts v."
    def __init__(self, diffusion): super().__init__(); self.diffusion = diffusion
    def forward(self, x, t, *_):
        out = []
        for i, o in enumerate(x):
            g = self.diffusion.signal_power(t + 1, i)
            x0 = mu + s*s*g.sqrt()/(g*s*s + 1 - g)*(o - g.sqrt()*mu)
            out.append(from_x0(x0.float(), o, g, 'v'))
        return out

class Exact(Gaussian):
    "The student of `Gaussian` that has learnt everything; its segments begin at steps 1000 and 500."
    def forward(self, x, t, *_):
        out = []
        for i, o in enumerate(x):
            g, h = self.diffusion.signal_power(t + 1, i), self.diffusion.signal_power(t//500*500, i)
            end = h.sqrt()*mu + (o - g.sqrt()*mu)*((h*s*s + 1 - h)/(g*s*s + 1 - g)).sqrt()
            out.append(from_x0(jump_target(o, end.float(), g, h), o, g, 'v'))
        return out

def points_of(two, average=None, **changes):
    config = DistillConfig('', guidance=1., **{'points': changes['teacher_steps'], **changes})
    t, end = torch.tensor([1000, 830, 510, 500, 130, 8]), torch.tensor([500, 500, 500, 0, 0, 0])
    x = [torch.randn(6, 3, n, n, generator=torch.Generator().manual_seed(n)) for n in (8, 4)]
    points = Teacher(Gaussian(two), two, config, 'none').walk(x, torch.maximum(t, end + 100), end, average=average)
    return points, DistillLoss(two, config)

@pytest.mark.parametrize('huber', [0., .05])
def test_an_exact_student_has_no_loss(two, huber):
    "At both resolutions, each with its own noise; the teacher itself, which does not jump, has one."
    points, loss = points_of(two, teacher_steps=8, huber=huber)
    def of(net): return loss(net(points.x_t, points.t - 1), points).item()
    fine, exact = points_of(two, teacher_steps=100, huber=0.)
    assert exact(Exact(two)(fine.x_t, fine.t - 1), fine) < 2e-5
    assert of(Exact(two)) < .05*of(Gaussian(two)) and [len(o) for o in loss.last.per_scale] == [48, 48]

def test_the_rest_of_the_way_is_the_averaged_student_s(two):
    whole, part = points_of(two, teacher_steps=100)[0], points_of(two, Exact(two), teacher_steps=20, reach=.2)[0]
    for a, b in zip(whole.x_end, part.x_end): torch.testing.assert_close(a[:4], b[:4], rtol=0, atol=.01)
    assert part.t.view(20, 6)[:, 0].tolist() == list(range(1000, 900, -5))
    wrong = points_of(two, Gaussian(two), teacher_steps=20, reach=.2)[0]
    assert (wrong.x_end[0][0] - whole.x_end[0][0]).abs().max() > .05 and torch.equal(wrong.x_end[0][2], part.x_end[0][2])

def test_jumps_and_their_targets():
    g, h = torch.rand(2, 5, 1, 1, 1, dtype=torch.float64).sort(0).values*.98 + .01
    x, x0 = torch.randn(2, 5, 3, 4, 4)
    there = jump(x, x0, g, h)
    for k in range(5): torch.testing.assert_close(there[k:k + 1], ddim_step(x[k:k + 1], x0[k:k + 1], g[k], h[k]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jump_target(x, there, g, h), x0, rtol=1e-2, atol=1e-2)

# ---- recipes

@pytest.fixture(scope='module')
def taught(data, tmp_path_factory):
    "The checkpoint of a model that has learnt a little."
    recipe = load_recipe('shapes', [*small, *even_v, 'train.lr=3e-3', 'train.ema_decay=0.9', 'train.steps=40'])
    recipe.data.files = data
    learn = fit(mdm_learner(create_dls(recipe.data, 4, seed=0), recipe), 40)
    return learn.save_checkpoint(tmp_path_factory.mktemp('taught')/'step_00000040')

@pytest.fixture
def teacher(taught, tmp_path): return shutil.copytree(taught, tmp_path/'teacher'/taught.name)

def student(path, tmp_path, *changes): return distill_recipe(path, ['train.lr=1e-3', 'train.batch_size=4', f'train.output={tmp_path/"student"}', *changes])

def test_recipe_of_a_student(teacher, tmp_path):
    then, now = load_checkpoint(teacher).recipe, student(teacher.parent, tmp_path, 'distill.segments=4')
    assert 'distill' not in recipe_dict(then) and then.distill is None and now.distill.teacher == str(teacher)
    assert (now.model, now.text, now.data) == (then.model, then.text, then.data) and now.train.caption_dropout == 0 and now.train.steps == 17
    assert (now.sample.solver, now.sample.guidance, now.sample.segments, now.sample.threshold) == ('consistency', 1., 4, 'none')
    assert load_recipe(save_recipe(now, tmp_path/'r.yaml')) == now
    assert distill_recipe(teacher, files=['a.tar']).train.output == 'runs/shapes-distilled' and distill_recipe(teacher, ['data.files=[a.tar]', 'name=few']).train.output == 'runs/few'
    assert named_recipe('shapes')[0] == 'shapes'                # a bundled model keeps its name

def test_recipes_that_cannot_work(teacher, tmp_path):
    with pytest.raises(RecipeError) as e: student(teacher, tmp_path, 'train.caption_dropout=0.1', 'diffusion.mixed_ratio=[2,1]', 'distill.teacher_steps=600')
    for text in ('train.caption_dropout: found 0.1', 'diffusion.mixed_ratio', 'distill.teacher_steps: found 600'): assert text in str(e.value)
    with pytest.raises(RecipeError, match='did you mean distill.segments'): student(teacher, tmp_path, 'distill.segmnts=3')
    with pytest.raises(ValueError, match='names no pictures: name shards with --data'): student(teacher, tmp_path, 'data.files=[]')
    with pytest.raises(FileNotFoundError): distill_recipe(tmp_path/'nowhere')
    with pytest.raises(ValueError, match='has a section distill'): run_training(student(teacher, tmp_path))
    recipe = student(teacher, tmp_path)
    recipe.model = recipe.model.inner
    with pytest.raises(ValueError, match=r'scales \[2, 1\] and the student \[1\]'): load_teacher(recipe)

# ---- training

def learner(recipe, grow=True):
    torch.manual_seed(0)
    return distill_learner(create_dls(recipe.data, recipe.train.batch_size, seed=0), recipe, grow=grow)

@pytest.mark.parametrize('changes', [(), ('distill.reach=0.3', 'distill.teacher_steps=1', 'distill.points=1')], ids=['whole way', 'consistency'])
def test_a_student_learns(teacher, tmp_path, changes):
    learn = learner(student(teacher, tmp_path, 'train.steps=30', *changes))
    before = {k: v.clone() for k, v in learn.distilling.teacher.model.state_dict().items()}
    assert same(before, learn.model.state_dict())                # the student begins where the teacher is
    images, captions, micros = next(iter(learn.dls.train))
    conditions, t, end = (*learn.encoder(list(captions)), micros), torch.tensor([1000, 1000, 1000, 500]), torch.tensor([500, 500, 500, 0])
    long = Teacher(learn.distilling.teacher.model, learn.loss_func.diffusion, DistillConfig('', teacher_steps=8, points=1)).to('cpu', learn.encoder)
    torch.manual_seed(2)
    points = long.walk(long.diffusion.noised(images/127.5 - 1, t - 1).x_t, t, end, conditions)
    def loss(): return learn.loss_func(learn.model(points.x_t, points.t - 1, *conditions), points).item()
    with torch.no_grad(): first = loss()
    fit(learn, 5 if changes else 30)
    with torch.no_grad(): last = loss()
    assert last < .9*first if not changes else last != first        # the targets of the averaged student are better only later
    assert same(before, learn.distilling.teacher.model.state_dict()) and not same(before, learn.model.state_dict())
    assert all(p.grad is None for p in learn.distilling.teacher.model.parameters())

def test_resumption_is_exact(teacher, tmp_path):
    recipe = student(teacher, tmp_path, 'train.steps=4', 'distill.reach=0.3', 'train.bf16=true')
    whole, half = fit(learner(recipe), 4), fit(learner(recipe), 2)
    half.save_checkpoint(tmp_path/'half')
    rest = learner(recipe, grow=False)
    rest.resume(load_checkpoint(tmp_path/'half'))
    with rest.no_bar(), rest.no_logging(): rest.fit_steps(4)
    assert same(whole.model.state_dict(), rest.model.state_dict()) and same(whole.moving_average.model.state_dict(), rest.moving_average.model.state_dict())

def test_a_run_with_all_that_it_writes(teacher, data, tmp_path, capsys):
    out = tmp_path/'student'
    command = ['--distill', str(teacher.parent), '--output', str(out), 'train.batch_size=4', 'train.steps=4', 'train.log_every=2', 'train.preview_every=2', 'train.preview_prompts=[a red circle]', '--valid', data[0]]
    assert mdm_train(command) == 0, capsys.readouterr().err
    assert (out/'log.csv').read_text().startswith('step,loss,loss_2x,loss_1x') and len(list((out/'previews').iterdir())) == 2 and (out/'valid.csv').is_file()
    pipe = MDMPipeline.from_pretrained(out)
    assert pipe.config().solver == 'consistency' and pipe('a red circle', n=1)[0].size == (16, 16)
    assert mdm_train(command) == 0 and 'finished' in capsys.readouterr().out
    assert mdm_train(['--resume', '--output', str(out), 'train.steps=5']) == 0 and load_checkpoint(out).step == 5
    assert mdm_train(['--distill', str(teacher), '--data', data[0], 'train.batch_size=2', '--dry-run-steps', '1']) == 0

def test_mistakes_on_the_command_line(teacher, tmp_path, capsys):
    recipe = student(teacher, tmp_path)
    kept = save_checkpoint(tmp_path/'kept', recipe, load_checkpoint(teacher).weights())
    for args, said in ((['--distill', str(kept)], 'is a student itself'), (['--distill', str(teacher), 'data.files=[]'], 'names no pictures'), (['--distill', str(tmp_path/'no')], 'no'), (['--distill', 'shapes', '--stages', '64,256'], 'give one of them'),
                       (['--distill', str(teacher), 'other'], 'other'), ([], '--distill')):
        assert mdm_train(args) == 2 and said in capsys.readouterr().err, args

def test_a_teacher_that_is_gone(teacher, tmp_path):
    recipe = student(teacher, tmp_path)
    shutil.rmtree(teacher)
    with pytest.raises(FileNotFoundError, match='step_00000040'): load_teacher(recipe)

def test_a_gpu_in_rehearsal(two):
    "Fake CUDA tensors: a tensor that is left on the CPU raises."
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.ones(3, 3, 3, 3, device='cuda')
        class Net(nn.Module):
            def forward(self, x, t, cond, mask, micros):
                assert {o.device.type for o in (*x, t, cond, mask, *micros.values())} == {'cuda'} and len(t) == len(x[0]) == len(cond)
                return [nn.functional.conv2d(o, weight, padding=1) for o in x]
        config = DistillConfig('', segments=2, reach=.5)
        teacher = Teacher(Net(), two, config)
        cond, mask, micros = torch.zeros(4, 3, 6, device='cuda'), torch.ones(4, 3, device='cuda'), dict(scale=torch.ones(4, device='cuda'))
        teacher.empty = torch.zeros(1, 1, 6, device='cuda'), torch.ones(1, 1, device='cuda')
        t, end = draw_starts(config, 1000, 4, 'cuda')
        points = teacher.walk(two.noised(torch.zeros(4, 3, 8, 8, device='cuda'), t - 1).x_t, t, end, (cond, mask, micros), Net())
        loss = DistillLoss(two, config)([o*1 for o in points.x_t], points)
        assert loss.device.type == 'cuda' and [tuple(o.shape) for o in points.x_end] == [(8, 3, 8, 8), (8, 3, 4, 4)]

def test_the_benchmark(teacher, tmp_path, capsys):
    from bench.distill import main
    kept = save_checkpoint(tmp_path/'kept', student(teacher, tmp_path), load_checkpoint(teacher).weights())
    rows = main([str(teacher), str(kept), '--captions', '4', '--steps', '1', '2', '--full', '3', '--solvers', 'ddim', '--output', str(tmp_path/'figures')])
    assert len(rows) == 10 and [r['evaluations'] for r in rows[::2]] == [6, 2, 4, 1, 2] and {'rmse', 'pixels', 'seconds', 'colour'} <= rows[-1].keys()
    assert sorted(p.name for p in (tmp_path/'figures').iterdir()) == ['figures.json', 'figures.md', 'figures.png', 'pictures.png'] and '| kept | 2 | 8 |' in capsys.readouterr().out

def test_a_teacher_that_was_stopped_counts_with_the_steps_it_took(tmp_path):
    import json, shutil
    from mdm.utils.files import bundled
    shutil.copytree(bundled/'shapes', tmp_path/'teacher')
    planned = distill_recipe(tmp_path/'teacher', files=['a.tar']).train.steps
    state = json.loads((tmp_path/'teacher'/'state.json').read_text())
    (tmp_path/'teacher'/'state.json').write_text(json.dumps(state | dict(step=state['step']//10)))
    assert abs(distill_recipe(tmp_path/'teacher', files=['a.tar']).train.steps - planned/10) < 1
