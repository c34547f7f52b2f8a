"Averages in bfloat16 and power-function averages: in a training, in its checkpoints, and put together afterwards."
import pytest, torch
from mdm.checkpoint import load_checkpoint
from mdm.pipeline import MDMPipeline
from mdm.recipe import RecipeError, load_recipe
from mdm.training.averages import list_snapshots, reconstruct_average, save_average
from mdm.training.callbacks import MovingAverage, callback_order, PowerAverages, lerp_bfloat16
from mdm.training.learner import output_callbacks
from mdm.training.run import remove_earlier_run, remove_unfinished
from tiny_models import data, make

def fit(learn, n, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit_steps(n, cbs=list(cbs))
    return learn

class Direct(PowerAverages):
    "Averages that are kept only to compare."
    order = callback_order['PowerAverages'] + .1

def states(learn): return [a.module.state_dict() for cb in ('moving_average', 'power_averages') if hasattr(learn, cb) for a in getattr(learn, cb).averages.values()]
def same(a, b): return all(torch.equal(v, y[k]) for x, y in zip(states(a), states(b)) for k, v in x.items())

def test_an_average_in_bfloat16_follows_the_one_in_float32():
    "With a decay of 0.9999 most changes are far below the distance of two neighbours in bfloat16; on average they arrive."
    torch.manual_seed(0)
    start, target = torch.randn(20_000), torch.randn(20_000)
    exact, ours = start.bfloat16().float(), start.bfloat16()
    for i in range(500):
        exact.lerp_(target, 1e-4)
        lerp_bfloat16([ours], [target], 1e-4, i)
    way, moved = exact - start.bfloat16().float(), ours.float() - start.bfloat16().float()
    assert (moved*way).sum()/way.square().sum() == pytest.approx(1, abs=.02)
    assert (ours.float() - exact).norm()/exact.norm() < .025                                   # what the rounding leaves

def test_averages_in_bfloat16_are_saved_loaded_and_drawn_from(make, tmp_path):
    more = ['train.ema_dtype=bfloat16', 'train.ema_decays=[0.9]', 'train.steps=4']
    whole, first = fit(make(*more), 4), fit(make(*more), 2)
    first.save_checkpoint(tmp_path/'two')
    assert load_checkpoint(tmp_path/'two').weights()['conv_out.weight'].dtype == torch.bfloat16
    again = make(*more)
    again.resume(load_checkpoint(tmp_path/'two'))
    assert same(whole, fit(again, 4)) and next(whole.moving_average.model.parameters()).dtype == torch.bfloat16
    assert next(whole.pipe.model.parameters()).dtype == torch.float32
    assert len(whole.pipe(['a red circle'], n=1, steps=1))
    assert len(MDMPipeline.from_pretrained(tmp_path/'two', device='cpu')(['a red circle'], n=1, steps=1))
    plain = fit(make('train.ema_decays=[0.9]', 'train.steps=4'), 4)
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), whole.model.parameters()))       # the training itself is the same
    for a, b in zip(states(plain), states(whole)): assert torch.allclose(a['conv_out.weight'], b['conv_out.weight'].float(), atol=1e-2)

def test_power_averages_go_on_and_any_length_is_made_from_snapshots(make, tmp_path):
    "Interrupted and resumed to the last bit; another width, and an earlier step, within 1e-3 of those kept directly."
    more = ['train.power_ema=[0.05,0.1]', 'train.power_ema_every=2', 'train.save_every=10', 'train.steps=30', f'train.output={tmp_path}', 'train.preview_prompts=[]']
    whole, direct = make(*more), Direct([.07, .15])
    fit(whole, 30, *output_callbacks(whole), direct)
    assert [*list_snapshots(tmp_path)] == [(t, w) for t in range(2, 31, 2) for w in (.05, .1)]
    again = make(*more)
    again.resume(load_checkpoint(tmp_path/'step_00000020'))
    assert same(whole, fit(again, 30))
    flat = lambda s: torch.cat([s[k].flatten() for k in sorted(s)])
    near = lambda a, b: (flat(a) - flat(b)).norm()/flat(b).norm() < 1e-3
    for width, a in direct.averages.items():
        assert near(reconstruct_average(tmp_path, width), a.module.state_dict())
        assert near(load_checkpoint(save_average(tmp_path, tmp_path/'chosen', width)).weights(), a.module.state_dict())
    assert near(reconstruct_average(tmp_path, .05, 20), load_checkpoint(tmp_path/'step_00000020').tensors('power_0.05'))

def test_snapshots_leave_with_their_training_and_other_files_stay(tmp_path):
    "When a training is begun again; a checkpoint that somebody put beside the snapshots is theirs."
    for name in ('a/averages/step_00000002', 'a/averages/.step_00000004.new', 'b/averages/step_00000002', 'b/averages/chosen'): (tmp_path/name).mkdir(parents=True)
    for name in 'ab': remove_earlier_run(tmp_path/name)
    assert not (tmp_path/'a'/'averages').exists() and [p.name for p in (tmp_path/'b'/'averages').iterdir()] == ['chosen']
    (tmp_path/'b'/'averages'/'.step_00000006.new').mkdir()
    remove_unfinished(tmp_path/'b')
    assert [p.name for p in (tmp_path/'b'/'averages').iterdir()] == ['chosen']

def test_neither_is_on_by_default(make):
    learn = make()
    assert learn.moving_average.dtype == torch.float32 and not hasattr(learn, 'power_averages') and type(learn.moving_average) is MovingAverage

@pytest.mark.parametrize('change, line', [('train.power_ema=[0.05,0.05]', 'numbers that differ'), ('train.power_ema=[0.5]', 'train.power_ema'), ('train.ema_dtype=float16', 'train.ema_dtype')])
def test_settings_that_cannot_work_are_refused(change, line):
    with pytest.raises(RecipeError, match=line): load_recipe('shapes', [change])

def test_bytes_and_slices_exclude_each_other():
    with pytest.raises(RecipeError, match='adamw, adam or muon with train.fsdp'): load_recipe('shapes', ['train.optimizer=adamw8bit', 'train.fsdp=true'])
