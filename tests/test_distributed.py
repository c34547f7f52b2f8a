"Several processes on the CPU, with gloo: they must do what one does, and end together."
import csv, os, signal, subprocess, sys, time, warnings
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from distributed_worker import finish, free_port, mdm_train_here, mdm_train_precisely, run_call, run_cases, start, train
from mdm.data.shapes import write_shapes

cases = dict(
    ddp={}, accumulate=dict(accumulate=2), thaw=dict(thaw=True), unused=dict(unused=True), inner_alone=dict(recipe=['diffusion.double_loss=false']), mixed=dict(recipe=['diffusion.mixed_ratio=[1,1]']),
    uneven=dict(uneven=True), bad=dict(bad=[(1, 1)]), checkpointing=dict(checkpointing=True), compiled=dict(compile=True, batches=2),
    fsdp=dict(fsdp=True), fsdp_accumulate=dict(fsdp=True, accumulate=2), fsdp_thaw=dict(fsdp=True, thaw=True), fsdp_bad=dict(fsdp=True, bad=[(1, 1)]), fsdp_uneven=dict(fsdp=True, uneven=True),
    muon=dict(recipe=['train.optimizer=muon']), fsdp_muon=dict(fsdp=True, recipe=['train.optimizer=muon']), fsdp_checkpointing=dict(fsdp=True, checkpointing=True))

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What two processes made of every case, half of the batch each."
    folder = tmp_path_factory.mktemp('two')
    for _ in range(2):                                       # gloo's own thread has crashed once (a segfault in pt_gloo_runloop)
        codes = finish(start(run_cases, cases, str(folder), log=folder/'log'), 240)
        if min(codes) >= 0: break
        warnings.warn(f'a process ended by a signal ({codes}) and was started once more')
    assert codes == [0, 0], (folder/'log.0').read_text()[-3000:] + (folder/'log.1').read_text()[-3000:]
    return {name: torch.load(folder/f'{name}.pt', weights_only=False) for name in cases}

@pytest.fixture(scope='module')
def one():
    "What one process makes of the same case, with the whole batch; each is computed once."
    torch.set_num_threads(1)
    known = {}
    def get(name):
        case = {k: v for k, v in cases[name].items() if k not in ('fsdp', 'uneven', 'compile')} | ({'bad': [(0, 1)]} if 'bad' in cases[name] else {})
        if repr(case) not in known: known[repr(case)] = train(case)
        return known[repr(case)]
    return get

def distance(a, b):
    "Largest difference, as a share of the largest number."
    return max((a - b).abs().max().item()/(b.abs().max().item() + 1e-8), 0)

@pytest.mark.parametrize('name', cases)
def test_two_processes_do_what_one_does(two, one, name):
    a, b = two[name], one(name)
    assert a['steps'] == b['steps'] and len(a['grads']) == len(b['grads'])
    assert [*a['grads'][0]] == [*b['grads'][0]] and [*a['grads'][-1]] == [*b['grads'][-1]]         # the same weights get a gradient
    assert all(distance(a['grads'][0][k], g) < 1e-5 for k, g in b['grads'][0].items())
    tolerance = .01 if 'muon' in name or 'thaw' in name else 1e-3                                 # Adam's and Muon's first steps make much of small differences
    for what in ('model', 'average'):
        assert [*a[what]] == [*b[what]]
        assert all(distance(a[what][k], v) < tolerance for k, v in b[what].items())
    assert a['losses'] == pytest.approx(b['losses'], rel=1e-3, nan_ok=True)
    if name not in ('uneven', 'bad', 'fsdp_bad', 'compiled'): assert a['valid'] == pytest.approx(b['valid'], rel=1e-3)

def test_a_loss_that_is_no_number_in_one_process_is_skipped_by_both(two):
    for name in ('bad', 'fsdp_bad'): assert two[name]['steps'] == 3 and [l == l for l in two[name]['losses']] == [True, False, True, True]

def test_weights_without_gradient_are_searched_only_where_there_are_some(two):
    assert [two[n]['unused'] for n in ('ddp', 'mixed', 'unused', 'inner_alone')] == [False, False, True, True]

def test_the_network_is_plain_again_after_the_fit(two): assert two['ddp']['plain'] == 'NestedUNet'

def test_states_of_slices_have_the_format_of_one_process(two, one):
    for name in ('fsdp', 'fsdp_muon'):
        a, b = two[name]['opt'], one(name)['opt']
        assert a.keys() == b.keys() and a['state'].keys() == b['state'].keys() and a['param_groups'] == b['param_groups']
        for k, t in b['state'].items():
            s = a['state'][k]
            assert s.keys() == t.keys() and all(type(s[o]) is type(t[o]) and getattr(s[o], 'shape', None) == getattr(t[o], 'shape', None) for o in t)

def test_training_goes_on_with_any_number_of_processes(two, tmp_path):
    "One process and two go on from the state that two slices left."
    state = str(tmp_path/'state.pt')
    torch.save({k: two['fsdp'][k] for k in ('model', 'opt')}, state)
    alone = train(dict(resume=state, batches=2))
    cases = dict(whole=dict(resume=state, batches=2), slices=dict(resume=state, batches=2, fsdp=True))
    codes = finish(start(run_cases, cases, str(tmp_path), log=tmp_path/'log'))
    assert codes == [0, 0], (tmp_path/'log.0').read_text()[-3000:]
    for name in cases:
        found = torch.load(tmp_path/f'{name}.pt', weights_only=False)
        assert found['losses'] == pytest.approx(alone['losses'], rel=1e-4)
        assert all(distance(found['model'][k], v) < 1e-3 for k, v in alone['model'].items())

@pytest.mark.parametrize('name', ['agree', 'different_weights', 'one_vote_per_batch', 'frozen_weights_in_slices', 'muon_is_shared'])
def test_processes_agree(name, tmp_path):
    codes = finish(start(run_call, name, log=tmp_path/'log'))
    assert codes == [0, 0], (tmp_path/'log.0').read_text()[-3000:] + (tmp_path/'log.1').read_text()[-3000:]

# mdm_train in two processes

@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    write_shapes(folder, 41)                                   # one tar for two processes, and an odd number of pictures
    return folder

def arguments(shards, out, *more):
    return [str(o) for o in ('shapes', '--data', shards/'*.tar', '--output', out, 'model.channels=[16,16]', 'model.inner.channels=[16,16]', 'model.inner.num_resnets=[1,1]', 'model.inner.num_attention_layers=[0,1]',
        'model.time_dim=32', 'model.inner.time_dim=32', 'text.dim=32', 'train.batch_size=4', 'train.optimizer=adamw', 'train.bf16=false', 'train.warmup_steps=0', 'train.lr_schedule=constant', 'train.preview_prompts=[]',
        'train.steps=24', 'train.log_every=1', 'train.save_every=1000', *more)]

def losses(out):
    with open(out/'log.csv', newline='') as f: return {int(r['step']): float(r['loss']) for r in csv.DictReader(f)}

@pytest.fixture(scope='module')
def whole(shards, tmp_path_factory):
    "A training of two processes from beginning to end, by the launcher: its folder and what was printed."
    out = tmp_path_factory.mktemp('whole')/'run'
    command = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no',
               '--main_process_port', str(free_port()), Path(sys.executable).with_name('mdm_train'), *arguments(shards, out)]
    done = subprocess.run([str(o) for o in command], capture_output=True, text=True, timeout=240, env=os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', CUDA_VISIBLE_DEVICES=''))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out, done

def test_launched_training_writes_once(whole):
    out, done = whole
    assert [*losses(out)] == [*range(1, 25)] and {p.name for p in out.glob('step_*')} == {'step_00000024'}
    assert done.stdout.count('million weights') == 1 and done.stdout.count('steps in') == 1
    assert not [p for p in out.rglob('*') if p.name.startswith('.')]

def interrupted(shards, out, tmp_path, number, *more):
    "Start a training in two processes, and send rank 1 a signal after some steps."
    processes = start(mdm_train_here, arguments(shards, out, *more), log=tmp_path/'log')
    deadline = time.monotonic() + 120
    while not ((out/'log.csv').exists() and len(losses(out)) >= 3):
        assert time.monotonic() < deadline and processes[1].is_alive(), (tmp_path/'log.0').read_text()[-3000:] + (tmp_path/'log.1').read_text()[-3000:]
        time.sleep(.01)
    os.kill(processes[1].pid, number)
    return finish(processes), (tmp_path/'log.0').read_text()

def test_sigterm_to_one_process_saves_and_ends_both_and_the_resumed_run_repeats_the_losses(shards, whole, tmp_path):
    out = tmp_path/'run'
    codes, text = interrupted(shards, out, tmp_path, signal.SIGTERM)
    step = max(losses(out))
    assert 3 <= step < 24 and 0 not in codes and [p.name for p in out.glob('step_*')] == [f'step_{step:08d}'], text
    codes = finish(start(mdm_train_here, arguments(shards, out), log=tmp_path/'again'))
    assert codes == [0, 0], (tmp_path/'again.0').read_text()[-3000:]
    assert losses(out) == pytest.approx(losses(whole[0]), rel=1e-5)

def test_a_killed_process_ends_the_other_with_a_message(shards, tmp_path):
    codes, text = interrupted(shards, tmp_path/'run', tmp_path, signal.SIGKILL, 'train.steps=100000')
    assert codes[1] == -signal.SIGKILL and codes[0] > 0
    assert 'another process of this training has ended' in text and 'Traceback' not in text, text[-3000:]

def test_slices_train_by_command(shards, whole, tmp_path):
    out = tmp_path/'run'
    codes = finish(start(mdm_train_here, arguments(shards, out, 'train.fsdp=true', 'train.steps=4', 'train.save_every=2'), log=tmp_path/'log'))
    assert codes == [0, 0], (tmp_path/'log.0').read_text()[-3000:] + (tmp_path/'log.1').read_text()[-3000:]
    assert losses(out) == pytest.approx({k: v for k, v in losses(whole[0]).items() if k <= 4}, rel=1e-3)
    codes = finish(start(mdm_train_here, arguments(shards, out, 'train.fsdp=true', 'train.steps=6'), log=tmp_path/'again'))
    assert codes == [0, 0], (tmp_path/'again.0').read_text()[-3000:]
    assert losses(out) == pytest.approx({k: v for k, v in losses(whole[0]).items() if k <= 6}, rel=1e-3)

def test_slices_train_with_muon(shards, tmp_path):
    "Muon needs whole matrices, and gathers them; stopped and resumed in between. In bfloat16 the paths drift apart slowly."
    for worker, steps, rel in ((mdm_train_precisely, 6, 1e-4), (mdm_train_here, 6, 1e-3)):
        def with_muon(out, *more):
            codes = finish(start(worker, arguments(shards, tmp_path/worker.__name__/out, 'train.optimizer=muon', *more), log=tmp_path/'log'))
            assert codes == [0, 0], (tmp_path/'log.0').read_text()[-3000:]
            return losses(tmp_path/worker.__name__/out)
        for n in (3, steps): slices = with_muon('slices', 'train.fsdp=true', f'train.steps={n}')
        assert slices == pytest.approx(with_muon('whole', f'train.steps={steps}'), rel=rel)

def test_no_process_waits_for_its_gpu_after_a_loss(monkeypatch):
    "Fake tensors on a GPU raise when their numbers are read, as a GPU would make the program wait."
    from torch._subclasses.fake_tensor import FakeTensorMode
    from mdm.training import distributed
    monkeypatch.setattr(distributed, 'mean_over_ranks', lambda x: x/2)
    trainer = distributed.DistributedTrainer()
    with FakeTensorMode():
        loss = torch.ones((), device='cuda')
        trainer.learn = SimpleNamespace(training=True, loss=loss, loss_grad=loss, loss_func=SimpleNamespace(last=SimpleNamespace(per_scale=[loss, loss])))
        trainer.after_loss()
    assert trainer.learn.loss_grad.device.type == 'cuda' and len(trainer.learn.loss_func.last.per_scale) == 2

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['SIGTERM', 'Ctrl-C'])
def test_a_signal_to_the_launcher_saves(shards, tmp_path, number):
    "What a cluster, or a terminal, does to torchrun: it passes the signal on, and the training saves."
    out = tmp_path/'run'
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(free_port()), '-m', 'mdm.cli.train', *arguments(shards, out, 'train.steps=100000')]
    with open(tmp_path/'log', 'w') as said:
        p = subprocess.Popen([str(o) for o in command], stdout=said, stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1', CUDA_VISIBLE_DEVICES=''),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        try:
            deadline = time.monotonic() + 120
            while not ((out/'log.csv').exists() and len(losses(out)) >= 3):
                assert time.monotonic() < deadline and p.poll() is None, (tmp_path/'log').read_text()[-3000:]
                time.sleep(.01)
            p.send_signal(number)
            assert p.wait(60) != 0
        finally: p.poll() is None and p.terminate()
    assert [o.name for o in out.glob('step_*')] == [f'step_{max(losses(out)):08d}'], (tmp_path/'log').read_text()[-3000:]

@pytest.mark.gpu
def test_two_gpus_train(shards, tmp_path):
    "A training with nccl; without two GPUs there is nothing to run it on."
    if torch.cuda.device_count() < 2: pytest.skip('needs two NVIDIA GPUs')
    codes = finish(start(mdm_train_here, arguments(shards, tmp_path/'run', 'train.steps=4'), log=tmp_path/'log', gpus=True))
    assert codes == [0, 0], (tmp_path/'log.0').read_text()[-3000:]
    assert {p.name for p in (tmp_path/'run').glob('step_*')} == {'step_00000004'} and len(losses(tmp_path/'run')) == 4
