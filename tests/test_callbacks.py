"The callbacks one by one: their order, autocast, finiteness and its price in waits, the log where numbers are missing."
import csv, json, math, re, warnings
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Callback, CancelBatchException, CancelFitException, Learner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from mdm.diffusion.objective import Diffusion, DiffusionConfig
from mdm.training import callbacks, distributed, learner, resume
from mdm.training.callbacks import *

notebook = Path(__file__).parent.parent/'nbs'/'3_training'/'05_callbacks.ipynb'

class Sum(nn.Module):
    "A model of one weight that takes and gives a list."
    scales = [1]
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.tensor(.5))
    def forward(self, x): return x*self.w

class MeanLoss:
    "A loss with the details that the log reads."
    def __call__(self, pred, y):
        per_sample = (pred - y).square().flatten(1).mean(1)
        self.last = SimpleNamespace(per_scale=[per_sample.detach()])
        return per_sample.mean()

def train(*cbs, batches=8, epochs=1, bad=(), lr=.1):
    "A small training in batches of 2; those in `bad` hold what is not a number."
    rows = [(torch.full((3,), float('nan') if i//2 in bad else 1.), torch.full((3,), 2.)) for i in range(2*batches)]
    learn = Learner(DataLoaders(DataLoader(rows, bs=2), DataLoader([], bs=2), device=torch.device('cpu')), Sum(), MeanLoss(), lr=lr, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn

# ---- order

def test_the_table_of_orders():
    "The numbers in the notebook's table, in `callback_order` and in the classes, here and in other modules, are the same."
    text = next(''.join(c['source']) for c in json.loads(notebook.read_text())['cells'] if '| order | callback |' in ''.join(c['source']))
    rows = [[o.strip() for o in line.strip('|').split('|')] for line in text.splitlines() if re.match(r'\| *-?[\d.]+ *\|', line)]
    assert [float(r[0]) for r in rows] == sorted(float(r[0]) for r in rows)
    table = {name: float(r[0]) for r in rows for name in re.findall(r'`(\w+)`', r[1])}
    assert {k: v for k, v in table.items() if k in callback_order} == callback_order
    found = {k: o.order for m in (callbacks, distributed, learner, resume) for k, o in vars(m).items() if isinstance(o, type) and k in callback_order}
    assert found == {k: callback_order[k] for k in found} and len(found) >= 16

# ---- half precision

class Raise(Callback):
    def __init__(self, event, error, order=90): self.event, self.error, self.order = event, error, order
    def __call__(self, name):
        if name == self.event and self.training: raise self.error

@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_batch'])
@pytest.mark.parametrize('error', [RuntimeError('x'), KeyboardInterrupt(), CancelBatchException(), CancelFitException()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('order', [0, 90])
def test_autocast_ends_with_every_training(event, error, order):
    learn = None
    try: learn = train(BFloat16(), Raise(event, error, order))
    except (RuntimeError, KeyboardInterrupt, CancelBatchException): pass
    assert not torch.is_autocast_enabled('cpu')
    if learn: assert type(learn.model) is Sum and type(learn.loss_func) is MeanLoss

@pytest.mark.parametrize('where', ['model', 'loss'])
def test_autocast_ends_with_an_error_in_model_or_loss(where):
    seen = []
    def fail(*args): seen.append(torch.is_autocast_enabled('cpu')); raise RuntimeError('x')
    rows = [(torch.ones(3), torch.ones(3))]*4
    model, loss = Sum(), MeanLoss()
    if where == 'model': model.forward = fail
    learn = Learner(DataLoaders(DataLoader(rows, bs=2), DataLoader([], bs=2), device=torch.device('cpu')), model, fail if where == 'loss' else loss, cbs=BFloat16())
    with pytest.raises(RuntimeError), learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert seen == [True] and not torch.is_autocast_enabled('cpu') and learn.model is model

def test_autocast_is_on_in_model_and_loss_only():
    seen = {}
    class Look(Callback):
        order = 90
        def __call__(self, event): seen.setdefault(event, set()).add(torch.is_autocast_enabled('cpu'))
    class Loss(MeanLoss):
        def __call__(self, *args): seen.setdefault('loss', set()).add(torch.is_autocast_enabled('cpu')); return super().__call__(*args)
    rows = [(torch.ones(3), torch.ones(3))]*4
    model = Sum(); model.register_forward_pre_hook(lambda *args: seen.setdefault('model', set()).add(torch.is_autocast_enabled('cpu')))
    learn = Learner(DataLoaders(DataLoader(rows, bs=2), DataLoader(rows, bs=2), device=torch.device('cpu')), model, Loss(), cbs=[BFloat16(), Look()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.validate()
    assert seen.pop('model') == {True} and seen.pop('loss') == {True} and set().union(*seen.values()) == {False}

# ---- what is not a number

class Waits(TorchDispatchMode):
    "Counts the numbers that Python reads from tensors; on a GPU each is a wait."
    count = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.count += f is torch.ops.aten._local_scalar_dense.default
        return f(*args, **(kwargs or {}))

@pytest.mark.parametrize('cbs', [lambda: [], lambda: [GradientNorm(1.), BFloat16(), MovingAverage(.9), CountSteps()]], ids=['alone', 'all'])
def test_one_wait_per_step(cbs):
    "Whatever is checked, and however many batches make a step; fused optimizers read nothing either."
    from mdm.recipe import load_recipe
    from mdm.training.optimizers import optimizer_of
    rows = [(torch.ones(3), torch.ones(3)*2)]*48
    class Count(Callback):
        order = 102
        def after_step(self): counts.append(waits.count)
    counts = []
    learn = Learner(DataLoaders(DataLoader(rows, bs=2), DataLoader([], bs=2), device=torch.device('cpu')), Sum(), MeanLoss(), opt_func=optimizer_of(load_recipe('shapes', ['train.optimizer=adamw'])), cbs=[Accumulate(8), SkipNonFinite(), Count(), *cbs()])
    with learn.no_bar(), learn.no_logging(), Waits() as waits: learn.fit(1)
    assert len(counts) == 6 and [b - a for a, b in zip(counts, counts[1:])] == [1]*5

def test_a_bad_batch_spoils_its_group_only():
    skip, norm, ema = SkipNonFinite(), GradientNorm(), MovingAverage(.9)
    with pytest.warns(UserWarning, match='the loss is nan: batch skipped .1 so far.'): learn = train(Accumulate(4), skip, norm, ema, CountSteps(), bad={3}, batches=8)
    assert learn.steps == 3 and (skip.count, skip.in_a_row) == (1, 0) and learn.model.w.isfinite()
    assert 0 < learn.model.w - .5 and ema.updates == 3 and not skip.losses

def test_good_groups_are_as_without_bad_ones():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        spoilt = train(Accumulate(4), SkipNonFinite(), CountSteps(), bad={2}, batches=8)
    assert torch.equal(spoilt.model.w, train(Accumulate(4), SkipNonFinite(), CountSteps(), batches=6).model.w)

def test_too_many_in_a_row_end_it():
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='(?s)2 times in a row.*stopped at step 1.*train.lr'): train(SkipNonFinite(2), CountSteps(), bad={1, 2})

# ---- the loss keeps little

def test_the_loss_keeps_no_pictures_and_no_graph():
    d = Diffusion(DiffusionConfig(), [2, 1])
    noised, loss = d.noised(torch.zeros(3, 3, 8, 8)), DiffusionLoss(d)
    preds = [torch.zeros_like(o, requires_grad=True) for o in noised.x_t]
    assert loss(preds, tuple(noised)).requires_grad
    assert vars(loss.last).keys() == {'per_scale'} and [o.shape for o in loss.last.per_scale] == [(3,), (3,)] and not any(o.requires_grad for o in loss.last.per_scale)

# ---- the log

def test_a_scale_without_samples_has_an_empty_cell(tmp_path):
    "A batch of 1 at ratio 1:1 has no picture at the higher resolution."
    class None2(MeanLoss):
        def __call__(self, *args): loss = super().__call__(*args); self.last.per_scale.insert(0, torch.zeros(0)); return loss
    log = StepLog(tmp_path/'log.csv', [2, 1], every=2)
    learn = Learner(DataLoaders(DataLoader([(torch.ones(3), torch.ones(3))]*8, bs=2), DataLoader([], bs=2), device=torch.device('cpu')), Sum(), None2(), cbs=[log, CountSteps()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    rows = list(csv.DictReader(open(tmp_path/'log.csv')))
    assert len(rows) == 2 and all(r['loss_2x'] == '' and float(r['loss_1x']) > 0 and 'nan' not in r.values() and None not in r.values() for r in rows)
    assert 'loss_2x' not in log.last and 'nan' not in log.summary()

def test_skipped_batches_do_not_spoil_a_line(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        train(GradientNorm(), SkipNonFinite(), CountSteps(), StepLog(tmp_path/'log.csv', [1], every=3), bad={1, 7})
    rows = list(csv.DictReader(open(tmp_path/'log.csv')))
    assert [r['step'] for r in rows] == ['3', '6'] and all(math.isfinite(float(r['loss'])) for r in rows) and rows[-1]['skipped_batches'] in '12'

@pytest.mark.parametrize('pause, lines', [(0., 4), (1000., 1)])
def test_no_flood_in_a_file(tmp_path, capsys, monkeypatch, pause, lines):
    "Where the output is no terminal, there is a line now and then, and no bar."
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    train(CountSteps(), StepLog(tmp_path/'log.csv', [1], every=2, total=8, pause=pause))
    out, err = capsys.readouterr()
    assert not out and '\r' not in err and err.count('\n') == lines and err.startswith('step 2 of 8: loss ')

def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(callbacks, 'shows_bars', lambda: True)
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr(callbacks, 'tqdm', __import__('tqdm').std.tqdm)
    train(CountSteps(), StepLog(tmp_path/'log.csv', [1], every=2, total=8))
    err = capsys.readouterr().err
    assert '8/8' in err and 'of 8: loss' not in err

def test_lr_find_writes_no_line(tmp_path):
    import fastai.callback.schedule
    log = StepLog(tmp_path/'log.csv', [1], every=2)
    learn = train(CountSteps(), log)
    before, learn.path = log.path.read_text(), tmp_path
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False, suggest_funcs=())
    assert log.path.read_text() == before
