"What `mdm_learner` makes: epochs that end, logs that go to other places, bits that do not depend on anything else."
import csv, sys
from types import SimpleNamespace
import pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import AvgSmoothLoss, Callback
from mdm.data.loader import create_dls
from mdm.data.shapes import write_shapes
from mdm.recipe import load_recipe
from mdm.training.callbacks import *
from mdm.training.learner import *
from test_callbacks import Waits
from tiny_models import data, fit, make, small

def test_an_epoch_without_a_batch_is_an_error(make):
    learn = make(dls=DataLoaders(DataLoader([], bs=4), DataLoader([], bs=4), device=torch.device('cpu')))
    with pytest.raises(ValueError, match='gave no batch in a whole epoch, so step 3 cannot be reached .now at step 0.: .*train.batch_size = 4'): fit(learn, 3)

def test_an_epoch_shorter_than_a_step_is_none(make):
    "6 batches per epoch, 8 make a step: groups go on in the next epoch."
    assert fit(make('train.accumulate=8'), 2).steps == 2

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_one_wait_per_step(make, optimizer):
    "Of a whole training with four batches a step, within one epoch."
    learn = make('train.accumulate=4', 'train.bf16=true', 'data.epoch_size=96', f'train.optimizer={optimizer}')
    counts = []
    class Count(Callback):
        order = 102
        def after_step(self): counts.append(waits.count)
    with Waits() as waits: fit(learn, 6, Count())
    assert len(counts) == 6 and all(b - a <= 1 for a, b in zip(counts, counts[1:])), counts

def test_the_smoothed_loss_is_that_of_fastai():
    ours, theirs = SmoothLoss(), AvgSmoothLoss()
    for o in (ours, theirs): o.reset()
    for x in torch.rand(9, generator=torch.Generator().manual_seed(0)):
        for o in (ours, theirs): o.accumulate(SimpleNamespace(loss=x))
        assert torch.equal(ours.value, theirs.value)

def test_growing(make, tmp_path):
    from mdm.checkpoint import save_checkpoint
    from mdm.models.nested_unet import create_model
    recipe = load_recipe('shapes', small)
    inner = create_model(recipe.model.inner, 16)
    save_checkpoint(tmp_path/'inner', recipe, inner.state_dict())
    learn = make(f'model.inner_from={tmp_path/"inner"}', 'train.freeze_inner_steps=2', 'train.optimizer=muon', 'train.weight_decay=0.1')
    assert grown_networks(learn.model) == [learn.model.inner_unet] and learn.freeze_networks.networks == [learn.model.inner_unet]
    fit(learn, 2)
    assert all(torch.equal(v, learn.model.inner_unet.state_dict()[k]) for k, v in inner.state_dict().items())
    fit(learn, 3)
    assert not all(torch.equal(v, learn.model.inner_unet.state_dict()[k]) for k, v in inner.state_dict().items())

def test_tensorboard(make, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn = make('train.log_every=2', 'train.loggers=[tensorboard]')
    fit(learn, 6, *output_callbacks(learn))
    events = EventAccumulator(str(tmp_path/'run'/'tensorboard')); events.Reload()
    assert {'loss', 'loss_2x', 'loss_1x', 'lr', 'grad_norm', 'memory_gb', 'pictures_per_second', 'skipped_batches'} <= {*events.Tags()['scalars']}
    rows = list(csv.DictReader(open(tmp_path/'run'/'log.csv')))
    assert [(o.step, f'{o.value:.4g}') for o in events.Scalars('loss')] == [(int(r['step']), f"{float(r['loss']):.4g}") for r in rows]

def test_a_missing_logger(make, monkeypatch):
    for name, module in (('tensorboard', 'torch.utils.tensorboard'), ('wandb', 'wandb')):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"train.loggers = \['{name}'\].*pip install 'matryoshka-diffusion\[log\]'"): output_callbacks(make(f'train.loggers=[{name}]'))
