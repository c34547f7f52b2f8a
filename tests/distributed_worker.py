"What test_distributed.py does in one process and in two, to compare. Modules are imported once, by a fork server; every process is a fork of it."
import multiprocessing, os, socket, sys, warnings
from pathlib import Path
import torch
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Callback, Learner
from mdm.training.callbacks import DiffusionLoss, MovingAverage, SkipNonFinite
from mdm.diffusion.objective import Diffusion
from mdm.utils.ranks import is_main, rank_and_world
from mdm.training.distributed import *
from mdm.models.nested_unet import create_model
from mdm.training.optimizers import optimizer_of
from mdm.training.resume import Stop
from mdm.training.sharded import full_model_state, full_optimizer_state, load_model_state, load_optimizer_state, shard_model
from mdm.recipe import load_recipe

tiny = ['model.channels=[8,8]', 'model.time_dim=32', 'model.num_groups=4', 'model.inner.channels=[8,16]', 'model.inner.num_resnets=[1,1]', 'model.inner.num_attention_layers=[0,1]', 'model.inner.num_heads=2',
        'model.inner.time_dim=32', 'model.inner.num_groups=4', 'text.dim=16', 'data.image_size=16', 'train.lr=1e-3', 'train.betas=[0.95,0.99]', 'train.warmup_steps=60', 'train.optimizer=adamw', 'train.bf16=false']
B, STEPS = 8, 4                                               # pictures of all processes together, batches

class Batches:
    "Every process's part of the same batches."
    device, bs = torch.device('cpu'), B
    def __init__(self, n, rank=0, world=1): self.n, self.rank, self.world = n, rank, world
    def __len__(self): return self.n
    def to(self, device): return self
    def __iter__(self): return (self.batch(i) for i in range(self.n))
    def batch(self, i):
        g = torch.Generator().manual_seed(i)
        return (torch.rand(B, 3, 16, 16, generator=g)*2 - 1, torch.randn(B, 5, 16, generator=g), torch.ones(B, 5), torch.randint(1000, (B,), generator=g), torch.randn(B, 3, 16, 16, generator=g), torch.randn(B, 3, 8, 8, generator=g))

class FixedNoise(Callback):
    "The same noise however many processes share the batch; one process may be given a loss that is no number."
    order = 3
    def __init__(self, diffusion, bad=()): self.diffusion, self.bad = diffusion, bad
    def before_batch(self):
        images, cond, mask, tau, *noise = (*self.xb, *self.yb)
        rank, world = self.learn.dl.rank, self.learn.dl.world
        whole, part = self.diffusion.noised(images, tau, noise), lambda t: t[rank::world]
        noised = type(whole)(*(part(o) if isinstance(o, torch.Tensor) else [part(t) for t in o] for o in whole))
        if (rank, self.iter) in self.bad: noised.x_t[0].fill_(float('inf'))
        self.learn.xb, self.learn.yb = (noised.x_t, noised.tau, part(cond), part(mask), {}), (noised,)

class Watch(Callback):
    "Notes what the optimizer is given, and who is skipped."
    order = 90
    def before_fit(self): self.learn.seen = dict(grads=[], losses=[], steps=0)
    def before_step(self):
        whole = lambda g: g.full_tensor() if hasattr(g, 'full_tensor') else g.clone()
        self.seen['grads'].append({k: whole(p.grad) for k, p in self.learn.model.named_parameters() if p.grad is not None})
    def after_step(self): self.seen['steps'] += 1
    def after_batch(self):
        if self.training: self.seen['losses'].append(float(self.learn.loss))

class Thaw(Callback):
    "The inner network is trained from the third batch on."
    order = 2
    def before_batch(self): self.learn.model.inner_unet.requires_grad_(self.learn.train_iter >= 2)

def train(case, world=1):
    "Train a tiny model as a case says; what came of it, in the first process."
    c = {**dict(recipe=[], fsdp=False, accumulate=1, thaw=False, unused=False, bad=(), uneven=False, compile=False, checkpointing=False, batches=STEPS, resume=None), **case}
    torch.manual_seed(0)
    recipe = load_recipe('shapes', tiny + c['recipe'])
    model = create_model(recipe.model, 16)
    for p in model.parameters():                              # so that zero-initialised layers let gradients through
        if not p.any(): torch.nn.init.normal_(p, std=.02)
    if c['unused']: model.spare = torch.nn.Linear(3, 3)
    if c['compile']: model.compile(backend='eager')
    model.activation_checkpointing = c['checkpointing']
    diffusion, rank = Diffusion(recipe.diffusion, model.scales), rank_and_world()[0] if world > 1 else 0
    extra = rank if c['uneven'] else 0
    dls = DataLoaders(Batches(c['batches'] + extra, rank, world), Batches(0 if c['compile'] else 2 + extra, rank, world))
    cbs = [FixedNoise(diffusion, c['bad']), SkipNonFinite(3), average := MovingAverage(.5), GradientClip(1.), Watch(), DistributedTrainer(c['fsdp']),
           *([Thaw()] if c['thaw'] else []), *([GradientAccumulation(c['accumulate']*B//world)] if c['accumulate'] > 1 else [])]
    learn = Learner(dls, model, DiffusionLoss(diffusion), opt_func=optimizer_of(recipe), lr=recipe.train.lr, cbs=cbs)
    with learn.no_bar(), learn.no_logging():
        if c['resume']:
            state = torch.load(c['resume'], weights_only=True)
            load_model_state(learn.model, state['model']); learn.create_opt(); load_optimizer_state(learn.opt, state['opt'])
        learn.fit(1)
    return dict(learn.seen, model=full_model_state(learn.model), average=full_model_state(average.model), opt=full_optimizer_state(learn.model, learn.opt), valid=learn.recorder.values[-1][1],
                unused=getattr(learn.distributed_trainer, 'unused', None), plain=type(learn.model).__name__)

servers = multiprocessing.get_context('forkserver')

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def start(task, *args, log, world=2, gpus=False):
    "Start `task(*args)` in several processes as a launcher would; what each prints goes to `log`.RANK."
    servers.set_forkserver_preload(['mdm.cli.train', 'mdm.training.learner', 'mdm.cli.command', 'mdm.data.shapes', 'train_child', 'distributed_worker'])
    os.environ |= dict(OMP_NUM_THREADS='1', TQDM_DISABLE='1')
    port, processes = free_port(), []
    for r in range(world):
        env = dict(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1', **({} if gpus else {'CUDA_VISIBLE_DEVICES': ''}))
        processes.append(servers.Process(target=child, args=(env, f'{log}.{r}', task, args))); processes[-1].start()
    return processes

def child(env, log, task, args):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1); os.dup2(out, 2)
    os.environ |= env
    torch.set_num_threads(1)
    code = task(*args)
    sys.stdout.flush(); sys.stderr.flush()
    distributed_end()
    os._exit(code or 0)

def finish(processes, seconds=120):
    "Wait; the exit codes, negative for signals."
    for p in processes: p.join(seconds)
    hang = [r for r, p in enumerate(processes) if p.exitcode is None]
    for r in hang: processes[r].kill()
    assert not hang, f'processes {hang} hang'
    return [p.exitcode for p in processes]

def run_cases(cases, folder):
    "Train as the cases say, in order; leave what the first process saw."
    warnings.simplefilter('ignore')
    rank, world = distributed_setup(minutes=1)
    for name, case in cases.items():
        found = train(case, world)
        if is_main(): torch.save(found, Path(folder)/f'{name}.pt')
        barrier()

def run_call(name):
    "Call one of the functions below in a group of processes."
    rank, world = distributed_setup(minutes=1)
    globals()[name](rank, world)
    return 0

def agree(rank, world):
    assert (rank, world) == rank_and_world() and is_main() == (rank == 0)
    assert all_true(True) and not all_true(rank == 0) and any_true(rank == 1) and not any_true(False)
    assert gather_objects(rank*10) == [0, 10] and broadcast_object({'from': rank}) == {'from': 0}
    assert mean_over_ranks(torch.tensor([float(rank)])) == .5 and rank_seed(7) == 7 + 1_000_003*rank
    assert [*RankLoader(range(2 + rank))] == [0, 1]
    for facts, what in (({'train.lr': rank}, 'train.lr is 0 in process 0 and 1 in process 1'), ({'a': 1} if rank else {}, 'a is None in process 0 and 1 in process 1')):
        try: check_same(facts)
        except ValueError as e: assert what in str(e)
        else: raise AssertionError('not noticed')

def different_weights(rank, world):
    torch.manual_seed(rank)
    data = [(torch.randn(2, 3), torch.randn(2, 1))]
    learn = Learner(DataLoaders(data, data), torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, cbs=DistributedTrainer())
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    except ValueError as e: assert 'the sum of weight is' in str(e)
    else: raise AssertionError('not noticed')

class Wish(Callback):
    "In process 1, a signal comes in the third batch."
    order = 50
    def after_batch(self):
        if self.training and self.iter == 2 and rank_and_world()[0] == 1: self.learn.stop.reason = 'SIGTERM'

def one_vote_per_batch(rank, world):
    "Whether there is another batch, and whether to stop, are one message; and all stop after the same batch, for the same reason."
    votes, real = [], torch.distributed.all_reduce
    def counted(x, *args, **kwargs):
        if x.dtype == torch.int64: votes.append(len(x))
        return real(x, *args, **kwargs)
    torch.distributed.all_reduce = counted
    data = [(torch.randn(2, 3), torch.randn(2, 1)) for _ in range(8)]
    for wish, seen in (([], 8), ([Wish()], 4)):
        torch.manual_seed(0); votes.clear()
        learn = Learner(DataLoaders(data, []), torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, cbs=[DistributedTrainer(), Stop(), *wish])
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert learn.train_iter == seen and learn.stop.reason == ('SIGTERM' if wish else None)
        assert votes == [2]*(seen + (not wish)), votes                 # and the end of the epoch

def frozen_weights_in_slices(rank, world):
    "A weight that never took a step has no state, and none is made up when the state is divided."
    torch.manual_seed(0)
    model = create_model(load_recipe('shapes', tiny).model, 16)
    make = lambda: optimizer_of(load_recipe('shapes', tiny))([*model.parameters()], lr=1e-3)
    for k, p in model.named_parameters():
        if not k.startswith('inner_unet'): p.grad = torch.ones_like(p)
    opt = make(); opt.step()
    state = opt.state_dict()
    shard_model(model)
    opt = make(); load_optimizer_state(opt, state)
    full = full_optimizer_state(model, opt)
    if not is_main(): return
    assert full['state'] and not [k for k in full['state'] if k.startswith('inner_unet')]
    assert all(o['step'] == 1 for o in full['state'].values())

def muon_is_shared(rank, world):
    "Each process orthogonalizes its own matrices, in one exchange for all; the weights are those of a process that does all, and the same in both."
    from mdm.training import optimizers
    torch.manual_seed(0)
    shapes = [(24, 40), (40, 24), (32, 16, 3, 3), (64, 64), (17, 33), (8,)]
    grads, real, seen, exchanges = [torch.randn(s) for s in shapes], optimizers._orthogonalize, [], []
    def counted(g): seen.append(len(g)); return real(g)
    def gathered(t, sizes): exchanges.append(sizes); return gather(t, sizes)
    gather, optimizers.gather_flat, optimizers._orthogonalize = optimizers.gather_flat, gathered, counted
    def two_steps():
        ps = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
        opt = optimizers.Muon(ps, lr=.1)
        for i in range(2):
            for p, g in zip(ps, grads): p.grad = g + i
            opt.step()
        return torch.cat([p.detach().flatten() for p in ps])
    shared, mine = two_steps(), sum(seen)
    assert len(exchanges) == 2 and 0 < mine < 10, (exchanges, seen)
    seen.clear()
    joined, torch.distributed.is_initialized = torch.distributed.is_initialized, lambda: False
    alone = two_steps()
    torch.distributed.is_initialized = joined
    assert sum(seen) == 10 and torch.allclose(shared, alone, atol=1e-3)
    first, second = gather_objects(shared)
    assert torch.equal(first, second)

def mdm_train_here(argv):
    from mdm.cli.train import mdm_train
    return mdm_train(argv)

def mdm_train_precisely(argv):
    "Train with Muon in float32: bfloat16 amplifies the rounding differences between FSDP and whole weights."
    from mdm.training import optimizers
    optimizers.fast_dtype = lambda device: torch.float32
    return mdm_train_here(argv)
