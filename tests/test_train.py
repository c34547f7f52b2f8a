"What the options of a training promise: equal results where they must be equal, and sums, averages and stages that add up."
import csv, json, os, re, shutil, warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest, torch
from fastai.learner import Callback
from fastai.optimizer import OptimWrapper
from fastai.torch_core import find_bs
from torch import nn
from torch.optim import SGD
from mdm.training.callbacks import *
from mdm.checkpoint import load_checkpoint, load_model, save_checkpoint
from mdm.reference.checkpoints import save_released
from mdm.training.run import dry_run, encoder_width, stage_recipes
from mdm.cli.train import mdm_train
from mdm.data.loader import create_dls
from mdm.data.shapes import write_shapes
from mdm.training.learner import build_model, mdm_learner, output_callbacks
from mdm.models.nested_unet import create_model
from mdm.recipe import load_recipe, save_recipe
from mdm.text import TextConfig
from tiny_models import data, even_v, fit, make, small

def plain_sgd(learn):
    "Use SGD, whose steps are in proportion to the gradients; Adam's first steps make much of small differences."
    learn.opt_func = partial(OptimWrapper, opt=SGD)
    return learn

def weights(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
def close(a, b, eps): return max(((v - b[k]).norm()/(b[k].norm() + 1e-12)).item() for k, v in a.items()) <= eps

class Record(Callback):
    "The batches that the network sees."
    order = 3.5
    def __init__(self): self.batches = []
    def before_batch(self): self.batches.append((self.xb, self.yb))

class Replay(Callback):
    "Put recorded batches in place of those that were read."
    order = 3.5
    def __init__(self, batches): self.todo = list(batches)
    def before_batch(self): self.learn.xb, self.learn.yb = self.todo.pop(0)

def join(a, b):
    "Two batches as one; short captions are padded."
    if isinstance(a, torch.Tensor):
        if a.ndim in (2, 3): a, b = (torch.cat([o, o.new_zeros(len(o), max(a.shape[1], b.shape[1]) - o.shape[1], *o.shape[2:])], 1) for o in (a, b))
        return torch.cat([a, b])
    if isinstance(a, dict): return {k: join(a[k], b[k]) for k in a}
    return type(a)(*map(join, a, b)) if hasattr(a, '_fields') else type(a)(map(join, a, b))

# ---- accumulation

def gradients(learn, *cbs):
    "The gradients right before each step, before any clipping."
    seen = []
    class Look(Callback):
        order = 6.3
        def before_step(self): seen.append({k: p.grad.clone() for k, p in self.learn.model.named_parameters() if p.grad is not None})
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Look(), *cbs])
    return seen

def test_accumulation_is_the_big_batch(make):
    "24 pictures in batches of 4: four of them make a step, and the two that are left another one."
    record = Record()
    learn = make(*even_v, 'train.accumulate=4', 'train.lr=1e-12')               # v: gradients are no long sums of one sign, which float32 rounds; the rate: so that the second step's weights are those of the first
    torch.manual_seed(1)
    parts = gradients(learn, record)
    assert len(record.batches) == 6 and len(parts) == 2 and learn.steps == 2
    groups = [record.batches[:4], record.batches[4:]]
    big = []
    for g in groups:
        whole = g[0]
        for o in g[1:]: whole = join(whole, o)
        assert find_bs(whole[1]) == 4*len(g)
        big.append(whole)
    reference = make(*even_v, 'train.lr=1e-12')
    whole = gradients(reference, Replay([*big, *record.batches[:4]]))[:2]
    for a, b in zip(parts, whole):
        norm = torch.stack([v.norm() for v in b.values()]).norm()
        assert a.keys() == b.keys() and torch.stack([(a[k] - v).norm() for k, v in b.items()]).norm()/norm < 1e-6

def test_groups_go_on_over_epochs(make):
    learn = make('train.accumulate=4')                                          # 6 batches per epoch
    record = Record()
    fit(learn, 3, record)
    assert learn.steps == 3 and len(record.batches) == 12

# ---- what is not a number

class Spoil(Callback):
    "Make the loss, or the gradient, of some batches infinite."
    order = 4.5
    def __init__(self, batches, gradient=False): self.batches, self.gradient, self.n = batches, gradient, 0
    def after_loss(self):
        if not self.gradient and self.n in self.batches: self.learn.loss_grad = self.loss_grad*float('inf')
    def after_backward(self):
        if self.gradient and self.n in self.batches: next(self.learn.model.parameters()).grad[0] = float('nan')
    def after_batch(self): self.n += 1

@pytest.mark.parametrize('gradient', [False, True])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_nonfinite_is_skipped_and_counted(make, gradient, accumulate, tmp_path):
    learn = make('train.log_every=1', f'train.accumulate={accumulate}')
    with pytest.warns(UserWarning, match='batch skipped'): fit(learn, 4, Spoil({1, 4}, gradient), *output_callbacks(learn))
    rows = list(csv.DictReader(open(tmp_path/'run'/'log.csv')))
    assert [r['step'] for r in rows] == ['1', '2', '3', '4'] and rows[-1]['skipped_batches'] == '2' and all(float(r['loss']) < 9 for r in rows)
    assert all(v.isfinite().all() for v in learn.model.state_dict().values()) and learn.skip_non_finite.count == 2 and learn.skip_non_finite.in_a_row == 0

def test_too_many_in_a_row(make, tmp_path):
    learn = make('train.max_nonfinite=3', 'train.save_every=2')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match='(?s)3 times in a row.*step 2.*train.lr'): fit(learn, 9, Spoil({1, 3, 4, 5, 6}), *output_callbacks(learn))
    assert load_checkpoint(tmp_path/'run').step == 2

# ---- gradient norm, learning rate

def test_gradient_norm_is_before_clipping(make):
    learn = make('train.grad_clip=1e-3')
    seen = gradients(learn)
    norm = torch.stack([v.norm() for v in seen[-1].values()]).norm()
    torch.testing.assert_close(learn.grad_norm, norm)
    assert norm > 1e-3
    clipped = torch.stack([p.grad.norm() for p in learn.model.parameters() if p.grad is not None and p.grad.any()] or [torch.zeros(())]).norm()
    assert clipped <= 1.01e-3

def test_one_cycle(make, tmp_path):
    learn = make('train.lr_schedule=one_cycle', 'train.log_every=1', 'train.steps=8', 'train.lr=1e-3')
    fit(learn, 8, *output_callbacks(learn))
    lr = [float(r['lr']) for r in csv.DictReader(open(tmp_path/'run'/'log.csv'))]
    assert lr[0] < lr[1] < max(lr) == pytest.approx(1e-3) and lr[-1] < lr[-2] < 1e-3

# ---- averages

def test_several_averages(make, tmp_path):
    learn = make('train.ema_decay=0.9', 'train.ema_decays=[0.0,0.99]')
    states = []
    class Look(Callback):
        order = 8
        def after_step(self): states.append(weights(self.learn))
    start = weights(learn)
    fit(learn, 5, Look())
    by_hand = {d: {k: v.clone() for k, v in start.items()} for d in (.9, 0., .99)}
    for n, s in enumerate(states, 1):
        for d, avg in by_hand.items():
            for k in avg: avg[k].lerp_(s[k], 1 - min(d, (1 + n)/(10 + n)))
    folder = learn.save_checkpoint(tmp_path/'ckpt')
    assert {p.name for p in folder.glob('model*')} == {'model.safetensors', 'model_0.0.safetensors', 'model_0.99.safetensors'}
    for d in by_hand:
        assert close(load_model(folder, ema=d)[0].state_dict(), by_hand[d], 1e-6)
    assert same(load_model(folder)[0].state_dict(), load_model(folder, ema=.9)[0].state_dict()) and same(load_model(folder, ema=0.)[0].state_dict(), weights(learn))
    with pytest.raises(FileNotFoundError, match='no moving average with decay 0.5, only 0.9, 0.0, 0.99|only 0.9, 0.99, 0.0'): load_model(folder, ema=.5)

# ---- options that must not change the result

@pytest.mark.parametrize('option, eps', [('train.activation_checkpointing=true', 0.), ('train.fsdp=true', 0.)])   # fsdp: one process has nothing to spread; for two see test_distributed.py
def test_options_change_nothing(make, option, eps):
    a, b = fit(plain_sgd(make()), 3), fit(plain_sgd(make(option)), 3)
    assert b.model.activation_checkpointing == ('activation' in option)
    assert close(weights(b), weights(a), eps)

def test_compile(make, tmp_path, monkeypatch):
    "Equal results and the same checkpoint; the graph is captured and differentiated, without the minutes that generating code takes on a CPU (backend aot_eager)."
    monkeypatch.setattr(nn.Module, 'compile', lambda self, real=nn.Module.compile: real(self, backend='aot_eager'))
    a, b = fit(plain_sgd(make()), 2), fit(plain_sgd(make('train.compile=true')), 2)
    assert b.model._compiled_call_impl is not None and a.model._compiled_call_impl is None
    assert close(weights(b), weights(a), 1e-4)
    folder = b.save_checkpoint(tmp_path/'ckpt')
    assert load_checkpoint(folder).weights(raw=True).keys() == weights(a).keys()
    again = plain_sgd(make('train.compile=true'))
    again.resume(load_checkpoint(folder))
    assert same(weights(again), weights(b))

@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler on a CPU, and there is no g++ here')
def test_compile_as_users_do(make):
    "The default backend, which writes and compiles C++: the smallest nested network, since each of its kernels takes seconds."
    least = [f'model.{p}{k}' for p, n in (('', 2), ('inner.', 1)) for k in (f'channels={[8]*n}', f'num_resnets={[1]*n}', f'num_attention_layers={[0]*n}')] + ['train.lr=0.1']
    start, a, b = weights(make(*least)), *(weights(fit(plain_sgd(make(*least, *more)), 1)) for more in ((), ('train.compile=true',)))
    farthest = lambda x, y: max((x[k] - y[k]).abs().max().item() for k in x)
    assert farthest(b, a) < 1e-5*farthest(a, start)

# ---- every optimizer goes on exactly

@pytest.mark.parametrize('name', 'adamw adam muon'.split())
@pytest.mark.parametrize('layout', ['false', 'true'])
def test_optimizers_go_on(make, name, layout, tmp_path):
    options = (f'train.optimizer={name}', f'train.channels_last={layout}', 'train.betas=[0.9,0.99]', 'train.weight_decay=0.01', 'train.lr=1e-3')
    a = fit(make(*options), 7)
    folder, noise = a.save_checkpoint(tmp_path/'ckpt'), torch.get_rng_state()
    b = make(*options)
    b.resume(load_checkpoint(folder))
    assert torch.equal(torch.get_rng_state(), noise) and same(weights(a), weights(b))
    for learn in (a, b):
        torch.set_rng_state(noise)
        learn.dls.train.load_state_dict(load_checkpoint(folder).extra['training']['positions'][0])
        with learn.no_bar(), learn.no_logging(): learn.fit_steps(9)
    assert same(weights(a), weights(b)) and same(a.moving_average.model.state_dict(), b.moving_average.model.state_dict())
    assert a.caption_dropout.rng.getstate() == b.caption_dropout.rng.getstate()

# ---- growing

@pytest.fixture
def inner(make, tmp_path):
    "A trained inner model, ours and in the released format."
    recipe = load_recipe('shapes', small)
    torch.manual_seed(5)
    model = create_model(recipe.model.inner, 16)
    save_checkpoint(tmp_path/'inner', replace(recipe, model=recipe.model.inner), model.state_dict(), model.state_dict(), 7)
    save_released(tmp_path/'inner.pth', model.state_dict(), 7)
    return model.state_dict()

@pytest.mark.parametrize('name', ['inner', 'inner.pth'])
def test_inner_from(make, inner, name, tmp_path):
    learn = make(f'model.inner_from={tmp_path/name}')
    assert same(learn.model.inner_unet.state_dict(), inner)
    fit(learn, 1)
    assert not same(learn.model.inner_unet.state_dict(), inner)

def test_frozen_at_first(make, inner, tmp_path):
    learn = make(f'model.inner_from={tmp_path/"inner"}', 'train.freeze_inner_steps=2', 'train.weight_decay=0.1')
    outer = {k: v for k, v in weights(learn).items() if not k.startswith('inner_unet')}
    fit(learn, 2)
    assert same(learn.model.inner_unet.state_dict(), inner) and not same({k: v for k, v in weights(learn).items() if not k.startswith('inner_unet')}, outer)
    fit(learn, 3)
    assert not same(learn.model.inner_unet.state_dict(), inner)

def call(capsys, *args):
    code = mdm_train(list(map(str, args)))
    out, err = capsys.readouterr()
    assert 'Traceback' not in out + err
    return code, out, err

def test_going_on_needs_no_inner_file(inner, data, tmp_path, capsys):
    start = ['shapes', *small, f'model.inner_from={tmp_path/"inner.pth"}', '--output', tmp_path/'grown', '--data', *data, 'train.steps=2']
    assert call(capsys, *start)[0] == 0
    (tmp_path/'inner.pth').unlink()
    code, out, _ = call(capsys, *start, 'train.steps=3')
    assert code == 0 and 'going on from' in out

@pytest.fixture
def stages(tmp_path):
    "Recipes of three tiny stages."
    big = load_recipe('shapes', small)
    big.model.inner.channels = [8, 8]
    outer = replace(big.model, channels=[8, 8], inner=big.model)
    for name, model, size in (('low', big.model.inner, 8), ('mid', big.model, 16), ('high', outer, 32)):
        save_recipe(replace(big, model=model, data=replace(big.data, image_size=size), train=replace(big.train, output='runs/x')), tmp_path/f'{name}.yaml')
    return ','.join(str(tmp_path/f'{n}.yaml') for n in ('low', 'mid', 'high'))

def test_the_staircase(stages, data, tmp_path, capsys):
    out, start = tmp_path/'out', ['--stages', stages, '--data', *data, '--output', tmp_path/'out', 'train.steps=2', 'high:train.batch_size=2']
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'high').write_text('in the way')                   # the last stage cannot begin
    code, said, err = call(capsys, *start)
    assert code == 2 and 'high is a file' in err and load_checkpoint(out/'low').step == load_checkpoint(out/'mid').step == 2 and 'going on' not in said
    (tmp_path/'out'/'high').unlink()
    before = (out/'mid'/'step_00000002'/'state.json').stat().st_mtime_ns
    code, said, err = call(capsys, *start)
    assert code == 0 and said.count('is finished, with 2 steps') == 2 and (out/'mid'/'step_00000002'/'state.json').stat().st_mtime_ns == before
    mid, high = load_checkpoint(out/'mid'), load_checkpoint(out/'high')
    assert high.recipe.model.inner_from == str(out/'mid') and mid.recipe.model.inner_from == str(out/'low') and (mid.recipe.train.batch_size, high.recipe.train.batch_size) == (4, 2)
    assert call(capsys, *start)[1].count('is finished') == 3

def test_a_stage_begins_where_the_last_one_ended(stages, data, tmp_path, capsys):
    assert call(capsys, '--stages', stages.rsplit(',', 1)[0], '--data', *data, '--output', tmp_path/'out', 'train.steps=3', 'mid:train.freeze_inner_steps=3')[0] == 0
    low, mid = load_checkpoint(tmp_path/'out'/'low').weights(), load_checkpoint(tmp_path/'out'/'mid').weights(raw=True)
    assert all(torch.equal(v, mid[f'inner_unet.{k}']) for k, v in low.items())

def test_the_clock_stops_the_staircase(stages, data, tmp_path, capsys):
    code, out, _ = call(capsys, '--stages', stages, '--data', *data, '--output', tmp_path/'out', 'train.steps=50', '--minutes', 1e-6)
    assert code == 0 and [p.name for p in (tmp_path/'out').iterdir()] == ['low'] and load_checkpoint(tmp_path/'out'/'low').step == 1

def test_stage_mistakes(stages, data, tmp_path, capsys):
    for args, said in ((['--stages', '64,64'], 'different names'), (['--stages', '64,300'], 'cc12m_300x300'), (['--stages', ' , '], '--stages'), (['--stages', '256,1024,64'], 'does not fit into that of stage 64'),
                       (['--stages', '64,256', '300:train.lr=1'], 'there is no stage 300'), (['--stages', '64,256', '64:train.lrr=1'], 'did you mean train.lr')):
        code, _, err = call(capsys, *args, '--data', *data, '--output', tmp_path/'out')
        assert code == 2 and said in err and not (tmp_path/'out').exists(), err

# ---- a trial on nothing

def test_dry_run(capsys, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    tiny64 = 'model.channels=[32,32] model.num_resnets=[1,1] model.num_attention_layers=[0,1] model.inner_from=null train.batch_size=1 text.max_tokens=4 data.image_size=16'.split()
    code, out, err = call(capsys, 'cc12m_64x64', *[o for o in tiny64 if 'inner' not in o], '--dry-run-steps', 3, 'train.accumulate=2')
    assert code == 0 and re.search(r'16 pixels, 2 pictures per step, (float32|bfloat16) on cpu: [\d.]+ s per step, [\d.]+ pictures/s, at most \d\.\d+ GiB', out) and err.count('loss') == 3
    code, out, err = call(capsys, 'shapes', *small, '--data', *data, '--dry-run-steps', 1)
    assert code == 0 and '4 pictures per step' in out
    assert list(tmp_path.iterdir()) == []                                       # nothing was written
    assert call(capsys, 'shapes', '--dry-run-steps', 0)[0] == 2

def test_the_benchmark_reads_what_the_command_says():
    from bench.big_models import measure
    seconds, memory = measure('shapes', True, True, 2)
    assert 0 < seconds < 100 and .1 < memory < 10

def test_encoder_width(tmp_path):
    assert [encoder_width(TextConfig(encoder=o)) for o in ('google/flan-t5-xl', 'google/t5-v1_1-xxl', 't5-small', 'google/flan-t5-base')] == [2048, 4096, 512, 768]
    assert encoder_width(TextConfig(dim=24)) == 24
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='t5', d_model=40)))
    assert encoder_width(TextConfig(encoder=str(tmp_path))) == 40
    with pytest.raises(ValueError, match="'no/such' cannot be known"): encoder_width(TextConfig(encoder='no/such'))

def test_a_dry_run_without_a_step(monkeypatch):
    "An epoch without batches measures nothing, and says so."
    from mdm.training import run
    monkeypatch.setattr(run.MDMLearner, 'fit_steps', lambda self, n: None)
    with pytest.raises(ValueError, match='no step was done'): dry_run(load_recipe('shapes', small), 1)

# ---- where the log goes

def test_tensorboard(make, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make('train.log_every=2', 'train.loggers=[tensorboard]')
    fit(learn, 6, *output_callbacks(learn))
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard')); events.Reload()
    assert {'loss', 'loss_2x', 'loss_1x', 'lr', 'grad_norm', 'memory_gb', 'pictures_per_second', 'skipped_batches'} <= {*events.Tags()['scalars']}
    rows = list(csv.DictReader(open(tmp_path/'run'/'log.csv')))
    assert [(o.step, f'{o.value:.4g}') for o in events.Scalars('loss')] == [(int(r['step']), f"{float(r['loss']):.4g}") for r in rows]

def test_wandb(make, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline'); monkeypatch.setenv('WANDB_SILENT', 'true')
    import wandb
    told, real = [], wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, 'log', lambda self, data, step=None, **kw: (told.append((step, data)), real(self, data, step=step, **kw))[1])
    learn = make('train.log_every=2', 'train.loggers=[wandb]')
    cbs = output_callbacks(learn)
    fit(learn, 4, *cbs)
    assert [s for s, row in told if 'loss' in row] == [2, 4] and {'loss_2x', 'lr', 'grad_norm'} <= next(row for _, row in told if 'loss' in row).keys() and wandb.run is None
    assert list((tmp_path/'run'/'wandb').glob('offline-run-*/*.wandb'))

# ---- the log and the progress bar

def test_log_columns(make, tmp_path):
    learn = make('train.log_every=3')
    fit(learn, 7, *output_callbacks(learn))
    rows = list(csv.DictReader(open(tmp_path/'run'/'log.csv')))
    assert [*rows[0]] == 'step loss loss_2x loss_1x lr grad_norm pictures_per_second memory_gb skipped_batches skipped_pictures seconds'.split()
    assert [r['step'] for r in rows] == ['3', '6', '7'] and all(float(r['grad_norm']) > 0 and float(r['memory_gb']) > .05 for r in rows)
    assert float(rows[-1]['grad_norm']) == pytest.approx(learn.grad_norm.item(), rel=1e-4)

def test_a_log_that_cannot_be_written(make, tmp_path):
    learn = make('train.log_every=1')
    class Take(Callback):
        order = 59
        def after_batch(self):
            path = tmp_path/'run'/'log.csv'
            if self.learn.steps == 2: path.rename(tmp_path/'away'); path.mkdir()
            if self.learn.steps == 3: path.rmdir(); (tmp_path/'away').rename(path)
    with pytest.warns(UserWarning, match='step 2: the line of the log could not be written'): fit(learn, 4, Take(), *output_callbacks(learn))
    assert [r['step'] for r in csv.DictReader(open(tmp_path/'run'/'log.csv'))] == ['1', '3', '4']

# ---- memory

def test_a_save_needs_little_memory(tmp_path):
    "Saving a model of 200 MB three times over (raw, average, optimizer) raises the peak by far less than one copy."
    import subprocess, sys
    code = f'''
import resource, torch
from mdm.checkpoint import save_checkpoint
from mdm.recipe import load_recipe
state = {{str(i): torch.full((1_000_000,), float(i)) for i in range(50)}}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
recipe, before = load_recipe('shapes'), peak()
save_checkpoint({str(tmp_path/'ckpt')!r}, recipe, state, state, 1, more=dict(optimizer=state))
print(peak() - before)
'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 30
