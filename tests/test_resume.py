"Trainings that are killed, stopped, starved of disk space and resumed, in real processes: what comes out is what an undisturbed training gives, bit for bit."
import csv, json, os, random, signal, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
import train_child
from mdm.checkpoint import load_checkpoint, load_model
from mdm.cli.train import mdm_train
from mdm.data.shapes import write_shapes
from mdm.recipe import load_recipe
from mdm.training.resume import truncate_log, differences, newest_checkpoint, pack, unpack

tiny = '''data.image_size=16 model.channels=[8,16] model.num_groups=8 model.inner.num_groups=8 model.inner.channels=[8,16] model.inner.num_resnets=[1,1] model.inner.num_attention_layers=[0,1] model.time_dim=16
    model.inner.time_dim=16 text.dim=16 train.batch_size=2 train.warmup_steps=2 train.preview_prompts=[] data.workers=0 data.shuffle=8 sample.steps=1'''.split()
muon = [*tiny, 'train.steps=24', 'train.accumulate=2', 'train.log_every=3', 'train.save_every=2', 'train.keep=2', 'train.ema_decays=[0.5]', 'train.channels_last=true']    # bfloat16, cosine: as in the preset
adamw = [*tiny, 'train.steps=12', 'train.log_every=4', 'train.save_every=5', 'train.optimizer=adamw', 'train.lr_schedule=one_cycle', 'train.warmup_steps=0', 'train.bf16=false', 'data.crop=random', 'data.epoch_size=10']
workers = [*adamw, 'data.workers=1', 'train.preview_prompts=[a red cross]', 'train.preview_every=5']

@pytest.fixture(scope='module')
def data(tmp_path_factory): return [str(p) for p in write_shapes(tmp_path_factory.mktemp('data'), 22, 16, per_shard=8)]

def command(config, out, data, *more): return ['shapes', *config, '--output', out, '--data', *data, *more]

def whole_run(config, data, folder):
    "The output folder of a training that nothing disturbs."
    log = folder/'log.txt'
    assert train_child.finish(train_child.start(command(config, folder/'run', data), log)) == 0, log.read_text()
    return folder/'run'

@pytest.fixture(scope='module')
def muon_run(data, tmp_path_factory): return whole_run(muon, data, tmp_path_factory.mktemp('muon'))

@pytest.fixture(scope='module')
def adamw_run(data, tmp_path_factory): return whole_run(adamw, data, tmp_path_factory.mktemp('adamw'))

@pytest.fixture(scope='module')
def workers_run(data, tmp_path_factory): return whole_run(workers, data, tmp_path_factory.mktemp('workers'))

timings = {'pictures_per_second', 'memory_gb', 'seconds'}
def log(folder): return [{k: v for k, v in row.items() if k not in timings} for row in csv.DictReader(open(folder/'log.csv'))]
def steps(folder): return sorted(p.name for p in folder.glob('step_*'))

def assert_same(a, b):
    "Two trainings ended alike: the log, and every number in the last checkpoint."
    assert log(a) == log(b)
    assert steps(a)[-1] == steps(b)[-1]
    a, b = a/steps(a)[-1], b/steps(b)[-1]
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for f in a.glob('*.safetensors'):
        x, y = load_file(f), load_file(b/f.name)
        assert x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items()), f.name
    x, y = (json.loads((o/'state.json').read_text())['extra']['training'] for o in (a, b))
    assert {k: v for k, v in x.items() if k != 'seconds'} == {k: v for k, v in y.items() if k != 'seconds'}

def alive(p, log, text, seconds=120):
    "Wait until a training has printed something."
    end = time.monotonic() + seconds
    while time.monotonic() < end and p.is_alive() and not (log.exists() and text in log.read_text()): time.sleep(.02)
    assert text in log.read_text(), log.read_text()

# ---- killed

def test_twenty_kills(data, muon_run, tmp_path):
    "By the clock and at changes to the file system, in turns: before, in and after saves."
    rng, kills, within, runs = random.Random(0), 0, 0, 0
    took = float(list(csv.DictReader(open(muon_run/'log.csv')))[-1]['seconds'])
    while kills < 20:
        out, runs = tmp_path/f'run{runs}', runs + 1
        while True:
            clock, said = kills % 2, tmp_path/'log.txt'
            p = train_child.start(command(muon, out, data), said, die_at=None if clock or kills >= 20 else rng.randrange(1, 160))
            if clock and kills < 20: p.join(rng.random()*(1 + took/5)); p.kill()
            code = train_child.finish(p)
            if code == 0: break
            assert code == -signal.SIGKILL, said.read_text()
            kills, within = kills + 1, within + bool(list(out.glob('.step_*')))
        assert_same(muon_run, out)
        assert not list(out.glob('.step_*')) and 'Traceback' not in said.read_text()
    assert within                                           # some saves were cut short

def test_a_log_line_that_was_cut_short(data, muon_run, tmp_path):
    out = tmp_path/'run'
    assert train_child.finish(train_child.start(command(muon, out, data, 'train.steps=8'), tmp_path/'log.txt')) == 0
    with open(out/'log.csv', 'a') as f: f.write('9,0.5,0.')
    train_child.finish(train_child.start(command(muon, out, data), tmp_path/'log.txt'))
    assert [o['step'] for o in log(out)] == [o['step'] for o in log(muon_run)]

# ---- stopped

@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=['SIGTERM', 'Ctrl-C'])
def test_signals_save_first(data, workers_run, tmp_path, number, code):
    "With a process that reads data, and previews in between, which must not matter."
    out, said = tmp_path/'run', tmp_path/'log.txt'
    p = train_child.start(command(workers, out, data), said, slow_after=6)
    alive(p, said, 'slow now')
    os.kill(p.pid, number)
    assert train_child.finish(p) == code
    last = steps(out)[-1]
    assert 'stopping after this step' in said.read_text() and f'mdm_train: stopped; the same command goes on.' in said.read_text() and f'checkpoint {out/last}' in said.read_text()
    assert load_checkpoint(out/last).step == 7 and log(out)[-1]['step'] == '7'
    if number == signal.SIGINT: return                       # the rest is the same
    assert train_child.finish(train_child.start(command(workers, out, data), said)) == 0
    assert_same(workers_run, out)
    assert sorted(p.name for p in (out/'previews').iterdir()) == ['step_00000005.png', 'step_00000010.png']

def test_a_second_ctrl_c_does_not_wait(data, adamw_run, tmp_path):
    out, said = tmp_path/'run', tmp_path/'log.txt'
    p = train_child.start(command(adamw, out, data), said, slow_after=6, nap=600)
    alive(p, said, 'slow now')
    os.kill(p.pid, signal.SIGINT)
    alive(p, said, 'Ctrl-C once more')
    assert p.is_alive()
    os.kill(p.pid, signal.SIGINT)
    assert train_child.finish(p, 60) == -signal.SIGINT
    assert steps(out) == ['step_00000005'] and newest_checkpoint(out).step == 5
    assert train_child.finish(train_child.start(command(adamw, out, data), said)) == 0
    assert_same(adamw_run, out)

def test_minutes_add_up(data, adamw_run, tmp_path):
    out, said = tmp_path/'run', tmp_path/'log.txt'
    for k in range(2): assert train_child.finish(train_child.start(command(adamw, out, data, '--minutes', 1e-6), said)) == 0
    assert steps(out)[-1] == 'step_00000002'                 # one step each
    assert train_child.finish(train_child.start(command(adamw, out, data, '--minutes', 60), said)) == 0
    assert_same(adamw_run, out)

@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_what_is_loaded_goes_to_the_device(data, tmp_path, optimizer):
    "Rehearsed with the device 'meta' for a GPU, whose tensors do not mix with those of the CPU either: the restored state takes the next step, and the next line of the log."
    from functools import partial
    from fastai.optimizer import OptimWrapper
    from mdm.data.loader import create_dls
    from mdm.training.callbacks import StepLog
    from mdm.training.learner import mdm_learner
    from mdm.training.resume import load_training
    recipe = load_recipe('shapes', [*adamw, f'train.optimizer={optimizer}', 'train.ema_decays=[0.5]', f'train.output={tmp_path/"run"}'])
    recipe.data.files = data
    def make():
        learn = mdm_learner(create_dls(recipe.data, 2, seed=0), recipe, [StepLog(tmp_path/'log.csv', [2, 1], 4)])
        if optimizer == 'adamw': learn.opt_func = partial(OptimWrapper, opt=torch.optim.AdamW)      # the fused one refuses 'meta'
        return learn
    learn = make()
    with learn.no_bar(), learn.no_logging(): learn.fit_steps(3)            # between two lines of the log
    checkpoint = load_checkpoint(learn.save_checkpoint(tmp_path/'three'))
    learn = make()
    learn.dls.to(torch.device('meta'))
    load_training(learn, checkpoint)
    rows = learn.step_log.rows
    torch.stack([*rows, torch.zeros_like(rows[0], device='meta')])        # as the next line of the log does
    for p in learn.model.parameters(): p.grad = torch.ones_like(p)
    learn.moving_average.after_step()
    averages = [v for o in learn.opt.opt.state.values() for v in o.values() if isinstance(v, torch.Tensor) and v.ndim]
    restored = [*rows, *averages, *learn.model.parameters(), *(p for a in learn.moving_average.averages.values() for p in a.module.parameters())]
    assert len(rows) == 3 and averages and {o.device.type for o in restored} == {'meta'}

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs an NVIDIA GPU')
def test_a_gpu_goes_on(data, tmp_path):
    "With bfloat16 and fused AdamW: stopped after its first step and resumed, the losses are those of the uninterrupted run."
    half = [o for o in adamw if o != 'train.bf16=false']
    for out, more in (('whole', ()), ('parts', ('--minutes', 1e-6)), ('parts', ())): assert mdm_train(list(map(str, command(half, tmp_path/out, data, *more)))) == 0
    assert [float(r['loss']) for r in log(tmp_path/'parts')] == pytest.approx([float(r['loss']) for r in log(tmp_path/'whole')], rel=1e-2)

# ---- two at once, and validation

def test_one_training_at_a_time(data, workers_run, tmp_path):
    "A second one in the same folder is refused, and the first does not notice; killed, it holds nothing back, though its readers may live a little longer."
    out, said, second = tmp_path/'run', tmp_path/'log.txt', tmp_path/'second.txt'
    p = train_child.start(command(workers, out, data), said, slow_after=6, nap=60)
    alive(p, said, 'slow now')
    for more in ((), ('--overwrite',)):
        assert train_child.finish(train_child.start(command(workers, out, data, *more), second)) == 2
        assert f'another run is writing into {out} at this moment' in second.read_text() and 'Traceback' not in second.read_text()
    p.kill(); p.join()
    assert train_child.finish(train_child.start(command(workers, out, data), said)) == 0, said.read_text()
    assert_same(workers_run, out)

def test_validation(data, adamw_run, tmp_path):
    "Losses are said and written down; a signal in the middle of one is heeded at once; neither changes the training."
    out, said, valid = tmp_path/'run', tmp_path/'log.txt', tmp_path/'run'/'valid.csv'
    p = train_child.start(command(adamw, out, data, '--valid', data[0], 'train.save_every=1000'), said, slow_valid=10)
    alive(p, said, 'slow validation')
    os.kill(p.pid, signal.SIGTERM)
    start = time.monotonic()
    assert train_child.finish(p, 60) == 143 and time.monotonic() - start < 30, said.read_text()        # the whole validation would take longer
    assert steps(out) == ['step_00000005'] and not valid.exists()
    assert train_child.finish(train_child.start(command(adamw, out, data, '--valid', data[0], 'train.save_every=1000'), said)) == 0
    assert_same(adamw_run, out)
    rows = list(csv.DictReader(valid.open()))
    assert [r['step'] for r in rows] == ['10', '12'] and all(0 < float(r['valid_loss']) < 10 for r in rows) and 'step 10: validation loss' in said.read_text()

# ---- no room, and damage

def test_a_full_disk(data, adamw_run, tmp_path):
    "The first save fails, the training goes on; the last save fails, and the same command mends that."
    out, said = tmp_path/'run', tmp_path/'log.txt'
    assert train_child.finish(train_child.start(command(adamw, out, data), said, full_at=0)) == 0
    assert 'step 5: the checkpoint (the last good one: none) could not be written' in said.read_text() and 'the training goes on' in said.read_text()
    assert_same(adamw_run, out)
    assert steps(out) == ['step_00000010', 'step_00000012'] and not list(out.glob('.step*'))
    out = tmp_path/'again'
    assert train_child.finish(train_child.start(command(adamw, out, data), said, full_at=2)) == 2
    assert 'the checkpoint of step 12 could not be saved' in said.read_text() and f'The last good one is {out}/step_00000010' in said.read_text()
    assert train_child.finish(train_child.start(command(adamw, out, data), said)) == 0
    assert_same(adamw_run, out)

@pytest.mark.parametrize('damage', ['raw.safetensors', 'optimizer.safetensors', 'training.safetensors', 'state.json', 'recipe.yaml', 'gone'])
def test_a_checkpoint_cut_short(data, adamw_run, tmp_path, damage, capfd):
    import shutil
    out = tmp_path/'run'
    shutil.copytree(adamw_run, out)
    last = out/steps(out)[-1]
    if damage == 'gone': (last/'model.safetensors').unlink()
    else: (last/damage).write_bytes((last/damage).read_bytes()[:-10 if damage != 'recipe.yaml' else 5])
    with pytest.warns(UserWarning, match='(?s)step_00000012.*goes on from .*step_00000010'): found = newest_checkpoint(out)
    assert found.step == 10
    if damage == 'optimizer.safetensors':
        assert train_child.finish(train_child.start(command(adamw, out, data), tmp_path/'log.txt')) == 0
        assert 'goes on from' in (tmp_path/'log.txt').read_text()
        assert_same(adamw_run, out)

def test_all_checkpoints_damaged(data, adamw_run, tmp_path, capsys):
    import shutil
    shutil.copytree(adamw_run, tmp_path/'run')
    for p in (tmp_path/'run').glob('step_*/model.safetensors'): p.write_bytes(b'')
    assert mdm_train(list(map(str, command(adamw, tmp_path/'run', data)))) == 2
    err = capsys.readouterr().err
    assert 'is whole; --overwrite begins again' in err and 'cut short' in err and 'Traceback' not in err

# ---- the same command, and others

def call(capsys, *args):
    code = mdm_train(list(map(str, args)))
    out, err = capsys.readouterr()
    assert 'Traceback' not in out + err
    return code, out, err

def test_finished(data, adamw_run, capsys):
    before = {p: p.stat().st_mtime_ns for p in adamw_run.rglob('*')}
    (adamw_run/'.step_00000009.gone').mkdir()                # a kill while the last save was clearing up
    (adamw_run/'.log.csv.7.part').write_text('step')
    for more in ([], ['--resume'], ['train.log_every=7', 'sample.guidance=9', 'train.keep=9']):
        code, out, err = call(capsys, *command(adamw, adamw_run, data, *more))
        assert code == 0 and 'is finished, with 12 steps' in out and not err
    assert {p: p.stat().st_mtime_ns for p in adamw_run.rglob('*')} == before

def test_another_recipe_is_refused(data, adamw_run, capsys):
    before = {p: p.stat().st_mtime_ns for p in adamw_run.rglob('*')}
    code, out, err = call(capsys, *command(adamw, adamw_run, data, 'train.lr=0.5', 'text.dim=32', 'train.steps=99'))
    assert code == 2 and 'train.lr: 0.007 then, 0.5 now' in err and 'text.dim: 16 then, 32 now' in err and 'train.steps' not in err and '--overwrite' in err and '--output' in err
    assert {p: p.stat().st_mtime_ns for p in adamw_run.rglob('*')} == before

def test_more_steps_and_no_recipe(data, tmp_path, capsys):
    out = tmp_path/'run'
    code, said, _ = call(capsys, '--resume', *command(adamw, out, data))
    assert code == 2 and not out.exists()                    # nothing to resume
    assert call(capsys, *command(adamw, out, data, 'train.lr_schedule=constant', 'train.steps=2'))[0] == 0
    code, said, _ = call(capsys, '--resume', '--output', out, 'train.steps=4')
    assert code == 0 and f'going on from {out}/step_00000002' in said and newest_checkpoint(out).step == 4
    assert load_recipe(out/'recipe.yaml').train.steps == 4
    code, _, err = call(capsys, '--output', out, 'train.steps=4')
    assert code == 2 and 'RECIPE' in err

def test_killed_before_the_first_save(data, tmp_path, capsys):
    out = tmp_path/'run'
    assert train_child.finish(train_child.start(command(adamw, out, data, 'train.log_every=1'), tmp_path/'log.txt', die_saving=True)) == -signal.SIGKILL
    assert not steps(out) and (out/'recipe.yaml').exists()
    with open(out/'log.csv', 'a') as f: f.write('1,2,3\n')
    code, _, err = call(capsys, *command(adamw, out, data, 'train.lr=1'))
    assert code == 2 and 'train.lr: 0.007 then, 1.0 now' in err
    assert call(capsys, *command(adamw, out, data, 'train.steps=2', 'train.log_every=1'))[0] == 0
    assert [o['step'] for o in log(out)] == ['1', '2']

def test_another_training_in_between(data, tmp_path, monkeypatch):
    "Nobody was there when this one looked, and somebody is when it wants to write."
    from mdm.training import run
    out, real = tmp_path/'run', run.create_dls
    def slow(*args, **kwargs): (out/'step_00000004').mkdir(parents=True); return real(*args, **kwargs)
    monkeypatch.setattr(run, 'create_dls', slow)
    assert mdm_train(list(map(str, command(adamw, out, data)))) == 2 and (out/'step_00000004').is_dir()

def test_what_is_not_ours_is_left_alone(data, tmp_path, capsys):
    out = tmp_path/'run'; (out/'step_00000009').mkdir(parents=True); (out/'step_00000009'/'mine.txt').write_text('mine')
    code, _, err = call(capsys, *command(adamw, out, data))
    assert code == 2 and (out/'step_00000009'/'mine.txt').read_text() == 'mine'
    for name in ('log.csv', 'valid.csv'):
        out = tmp_path/name.split('.')[0]; out.mkdir(); (out/name).write_bytes(b'file,caption\nmine.jpg,caf\xe9\n')
        code, _, err = call(capsys, *command(adamw, out, data))
        assert code == 2 and name in err and b'mine.jpg' in (out/name).read_bytes()

def test_weights_alone_do_not_train_on(data, tmp_path, capsys):
    from mdm.checkpoint import save_checkpoint
    recipe = load_recipe('shapes', [*adamw, f'train.output={tmp_path/"run"}'])
    recipe.data.files = data
    from mdm.models.nested_unet import create_model
    state = create_model(recipe.model, 16).state_dict()
    save_checkpoint(tmp_path/'run'/'step_00000003', recipe, state, state, 3)
    code, _, err = call(capsys, *command(adamw, tmp_path/'run', data))
    assert code == 2 and 'holds weights, but not what it takes to go on training' in err

def test_differences():
    a = load_recipe('shapes')
    assert not differences(a, load_recipe('shapes', ['train.steps=1000', 'train.save_every=3', 'train.keep_every=3', 'train.output=x', 'data.workers=7', 'sample.steps=2', 'name=other', 'train.preview_prompts=[]', 'train.loggers=[wandb]']))
    found = differences(a, load_recipe('shapes', ['train.seed=1', 'data.image_size=64', 'model.channels=[8,8]', 'train.betas=[0.5,0.5]', 'train.ema_decays=[0.5]']))
    assert [o.split(':')[0] for o in found] == ['model.channels', 'data.image_size', 'train.betas', 'train.ema_decays', 'train.seed'] or len(found) == 5
    assert differences(a, load_recipe('cc12m_64x64'))

def test_truncate_log(tmp_path):
    path = tmp_path/'log.csv'
    truncate_log(path, 5); assert not path.exists()
    for text, left in [('step,a\n1,2\n2,3\n', 'step,a\n1,2\n'), ('step,a\n1,2\n3,', 'step,a\n1,2\n'), ('step,a\n', 'step,a\n'), ('step,a\n1,2\n1', 'step,a\n1,2\n'), ('step,a\nx\n\n1,2\n', 'step,a\n1,2\n')]:
        path.write_text(text); truncate_log(path, 1); assert path.read_text() == left
    path.write_text('st'); truncate_log(path, 1); assert not path.exists()

def test_pack():
    nest = {0: {'a': torch.ones(2), 'n': None}, 'l': [1, (2., True, torch.zeros(()))], 's': 'x', 'e': {}, 'deep': [[], [{}]]}
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(nest, tensors))), tensors)
    assert len(tensors) == 2 and back[0]['a'] is nest[0]['a'] and back['l'][1][2] is nest['l'][1][2]
    back[0].pop('a'); nest[0].pop('a'); back['l'][1] = back['l'][1][:2]; nest['l'][1] = nest['l'][1][:2]
    assert back == nest and type(back['l'][1]) is tuple
