"""A rehearsal of what a GPU would run, on a machine without one: fake tensors say 'cuda' and check devices, dtypes and shapes as a GPU would; they hold no numbers.
A tensor of the CPU that meets one of the GPU raises. Only the backward pass needs a real device: `fake_backward` stands in for it.
PyTorch 2.15 crashes now and then when Python's garbage collector frees fake tensors of a training, so the collector is off here, and `test_cuda_rehearsal.py` runs this file in a process of its own."""
import csv, gc, warnings
import pytest, torch
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from fastai.data.core import DataLoaders
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
import mdm.diffusion.sampler
from mdm.checkpoint import Checkpoint, load_checkpoint
from mdm.diffusion.objective import Diffusion
from mdm.diffusion.settings import SampleConfig
from mdm.diffusion.sampler import for_img2img, for_inpaint, for_upscale, sample_steps
from mdm.models.clips import ClipUNetConfig, for_animate
from mdm.models.nested_unet import create_model
from mdm.models.unet import UNetConfig
from mdm.recipe import load_recipe
from mdm.text import create_text_encoder
from mdm.training.callbacks import *
from mdm.training.learner import mdm_learner
from mdm.training.optimizers import _byte_table, byte_levels, optimizer_of

gc.disable()
cuda, cpu = torch.device('cuda'), torch.device('cpu')
tiny = '''data.image_size=16 model.channels=[8,16] model.num_groups=8 model.inner.num_groups=8 model.inner.channels=[8,16] model.inner.num_resnets=[1,1] model.inner.num_attention_layers=[0,1] model.time_dim=16
    model.inner.time_dim=16 text.dim=16 train.batch_size=4 train.warmup_steps=0 train.preview_prompts=[] sample.steps=3 train.lr_schedule=constant'''.split()

class Waits(TorchDispatchMode):
    "Counts what makes Python wait for a GPU: numbers that are read and copies to the CPU. A number that fake tensors do not have is 1."
    def __init__(self): super().__init__(); self.count = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
            if is_fake(args[0]): return True if args[0].dtype == torch.bool else 1. if args[0].is_floating_point() else 1
        elif f is torch.ops.aten._to_copy.default and on_gpu(args[0]) and kwargs.get('device') == cpu: self.count += 1
        elif f is torch.ops.aten.copy_.default and on_gpu(args[0]) != on_gpu(args[1]) and not (args[2] if len(args) > 2 else kwargs.get('non_blocking')): self.count += 1
        elif f is torch.ops.aten._to_copy.default and not on_gpu(args[0]) and kwargs.get('device') and kwargs['device'].type == 'cuda' and not kwargs.get('non_blocking'): self.count += 1
        return f(*args, **kwargs)

def for_real(f):
    "A function that computes with real tensors, on the CPU: it reads files, or makes tensors whose size depends on their numbers."
    def call(*args, **kwargs):
        with _disable_current_modes(): return f(*args, **kwargs)
    return call

def is_fake(t): return isinstance(t, torch._subclasses.FakeTensor)
def on_gpu(t): return t.device.type == 'cuda'

def moved(self, device=None, *args, real=torch.nn.Module.to, **kwargs):
    "`nn.Module.to` for fake tensors, which cannot change their device in place: new parameters. So models move before their optimizer is made."
    if device is None or not all(is_fake(p) for p in self.parameters()): return real(self, *([] if device is None else [device]), *args, **kwargs)
    for m in self.modules():
        for k, p in m._parameters.items():
            if p is not None and p.device.type != torch.device(device).type: m._parameters[k] = torch.nn.Parameter(p.detach().to(device), p.requires_grad)
        for k, b in m._buffers.items():
            if b is not None: m._buffers[k] = b.to(device)
    return self

@pytest.fixture
def gpu(monkeypatch):
    "A GPU of fake tensors; gives the counter of waits."
    for cached in (_byte_table, byte_levels): cached.cache_clear()                                       # fake tensors of another test
    monkeypatch.setattr(torch.nn.Module, 'to', moved)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda device=None: 0)
    monkeypatch.setattr(torch.random, 'fork_rng', lambda devices=(), **kwargs: nullcontext())            # a GPU's generator needs the GPU
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*CUDA is not available')
        with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits: yield waits

class Batches:
    "Loader of the batches that a real one delivers: on the CPU."
    bs, dataset = 4, SimpleNamespace(world=1)
    def __init__(self, n, size=16, device=cuda): self.n, self.size, self.device = n, size, device
    def __len__(self): return self.n
    def to(self, device): return self
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
    def __iter__(self):
        for _ in range(self.n): yield torch.zeros(4, 3, self.size, self.size, dtype=torch.uint8), ['a red circle', '', 'a', 'b c'], {'scale': torch.full((4,), 16.)}

@contextmanager
def fake_backward(learn):
    "Gradients without a backward pass, which fake tensors cannot do: zeros, added to those that are there."
    def backward():
        for p in learn.model.parameters(): p.grad = torch.zeros_like(p) + (0 if p.grad is None else p.grad)
    learn._backward = backward
    yield
    del learn._backward

def learner(*changes, n=8, device=cuda, cbs=None):
    recipe = load_recipe('shapes', [*tiny, *changes])
    learn = mdm_learner(DataLoaders(Batches(n, device=device), Batches(0, device=device), device=device), recipe, cbs)
    learn.model.to(device)
    return learn

def fit(learn, *cbs, steps=None):
    with learn.no_bar(), learn.no_logging(), fake_backward(learn): learn.fit_steps(steps, cbs=cbs) if steps else learn.fit(1, cbs=cbs)

def devices(o):
    "Where the tensors in a nest are."
    if isinstance(o, torch.Tensor): return {o.device.type}
    if isinstance(o, dict): o = [*o.values()]
    return set().union(*map(devices, o)) if isinstance(o, (list, tuple)) else set()

# ---- training

@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'adamw8bit'])
@pytest.mark.parametrize('more', [[], ['train.bf16=false', 'train.accumulate=2', 'diffusion.loss_target=eps', 'train.ema_decays=[0.5]', 'diffusion.vdm_weights=true', 'train.ema_dtype=bfloat16', 'train.power_ema=[0.05,0.1]']], ids=['plain', 'more'])
def test_a_training(gpu, optimizer, more, tmp_path):
    "Noise, loss, gradient norm, finiteness, optimizer, averages and log."
    learn = learner(f'train.optimizer={optimizer}', *more)
    log = StepLog(tmp_path/'log.csv', [2, 1], every=2)
    fit(learn, log, steps=4)
    assert learn.steps == 4 and devices([p.detach() for p in learn.model.parameters()]) == {'cuda'}
    kept = [learn.moving_average, *([learn.power_averages] if hasattr(learn, 'power_averages') else [])]
    assert len(kept) == 1 + bool(more) and all(devices([[*a.parameters()] for a in cb.averages.values()]) == {'cuda'} for cb in kept)
    assert [r['step'] for r in csv.DictReader(open(log.path))] == ['2', '4'] and learn.grad_norm.device.type == 'cuda'
    assert all(o.device.type == 'cpu' for o in learn.recorder.losses)

def test_mixed_batches_and_frozen_networks(gpu):
    learn = learner('diffusion.mixed_ratio=[1,1]', 'train.optimizer=muon')
    fit(learn, FreezeNetworks([learn.model.inner_unet], 2), steps=4)
    assert {s['step'] for s in learn.opt.opt.state.values()} == {2, 4}

def test_waits_of_a_training(gpu):
    "One wait per step, however many batches it has, and one per line of the log."
    def waits(steps, *cbs):
        learn = learner('train.accumulate=4', 'train.optimizer=adamw', n=4*steps)
        before = gpu.count
        fit(learn, *cbs, steps=steps)
        return gpu.count - before
    few, many = waits(1), waits(4)
    table = 4*(table_copies() + text_copies())
    assert (many - few)/3 <= 1 + table, (few, many, table)

def table_copies():
    "Waits of `Diffusion.noised` and `compare` per batch: those of the table of gammas, if it is copied to the GPU each time."
    diffusion = Diffusion(load_recipe('shapes', tiny).diffusion, [2, 1])
    with Waits() as waits:
        for _ in range(2):
            before = waits.count
            noised = diffusion.noised(torch.zeros(2, 3, 16, 16, device=cuda))
            diffusion.compare(noised.clean, noised)
    return waits.count - before

def text_copies():
    "Waits of the text encoder per batch."
    encoder = create_text_encoder(load_recipe('shapes', tiny).text).to(cuda)
    with Waits() as waits:
        for _ in range(2):
            before = waits.count
            encoder(['a red circle', ''])
    return waits.count - before

# ---- state that comes from a file meets new values

@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    "Checkpoints of trainings on the CPU, with rows of the log that no line holds yet."
    folders = {}
    for name in ('adamw', 'muon'):
        learn, folder = learner(f'train.optimizer={name}', device=cpu), tmp_path_factory.mktemp(name)
        log = StepLog(folder/'log.csv', [2, 1], every=2)
        learn.add_cb(log)
        with learn.no_bar(), learn.no_logging(): learn.fit_steps(3)
        assert len(log.rows) == 1
        folders[name] = learn.save_checkpoint(folder/'step_00000003')
    return folders

@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_training_that_goes_on(gpu, checkpoints, name, tmp_path, monkeypatch):
    "Optimizer, averages and rows of the log come from the disk to the CPU, and must go on with tensors of the GPU."
    for k in ('weights', 'tensors'): monkeypatch.setattr(Checkpoint, k, for_real(getattr(Checkpoint, k)))
    checkpoint = for_real(load_checkpoint)(checkpoints[name])
    learn = learner(f'train.optimizer={name}')
    log = StepLog(tmp_path/'log.csv', [2, 1], every=2)
    learn.add_cb(log)
    learn.resume(checkpoint)
    assert learn.steps == 3 and len(log.rows) == 1
    fit(learn, steps=5)
    assert learn.steps == 5 and [r['step'] for r in csv.DictReader(open(log.path))] == ['4', '5'] and devices(log.rows) == {'cuda'}
    assert devices([{k: v for k, v in s.items() if k != 'step'} for s in learn.opt.opt.state.values()]) == {'cuda'}

def test_an_average_that_began_on_the_cpu(gpu):
    "A checkpoint before the first fit starts the averages before fastai moves the model."
    learn = learner(device=cpu)
    learn.moving_average.start()
    learn.dls.device = cuda
    learn.model.to(cuda)
    fit(learn, steps=1)
    assert devices([*learn.moving_average.model.parameters()]) == {'cuda'}

@pytest.mark.parametrize('kind', ['adamw', 'adam', 'muon', 'adamw8bit'])
def test_optimizer_state_from_the_cpu(gpu, kind):
    "PyTorch's own way: `load_state_dict`."
    make = lambda ps: optimizer_of(load_recipe('shapes', [f'train.optimizer={kind}']))(ps, lr=.1)
    def step(p, opt): p.grad = torch.zeros_like(p); opt.step()
    a, b = torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64, 64, device=cuda))
    first, second = make([a]), make([b])
    step(a, first)
    second.load_state_dict(first.state_dict())
    step(b, second)

def test_rows_of_two_devices(gpu):
    log = StepLog('log.csv', [1], every=9)
    log.learn = SimpleNamespace(loss=torch.zeros((), device=cuda), yb=(torch.zeros(2),), loss_func=SimpleNamespace(last=SimpleNamespace(per_scale=[torch.zeros(2, device=cuda)])))
    log.rows, log.pictures = [torch.zeros(2)], 0
    log.after_backward()
    assert devices(log.rows) == {'cuda'} and log.means() is not None

# ---- sampling

@pytest.fixture
def net(gpu, monkeypatch):
    recipe = load_recipe('shapes', tiny)
    return create_model(recipe.model, 16).to(cuda), for_real(lambda: Diffusion(recipe.diffusion, [2, 1]))()     # its tables are read on the CPU

def draw(net, given=None, **config):
    model, diffusion = net
    cond, mask = torch.zeros(2, 5, 16, device=cuda), torch.ones(2, 5, device=cuda)
    config = SampleConfig(**{'steps': 3, 'guidance': 3., **config})
    with torch.no_grad(): *_, last = sample_steps(model, diffusion, 16, cond, mask, cond, mask, config=config, seeds=[0, 1], device=cuda, given=given)
    assert devices(last.x) == {'cuda'}

@pytest.mark.parametrize('solver', ['ddim', 'ddpm', 'dpm++2m', 'unipc'])
@pytest.mark.parametrize('spacing', ['uniform', 'trailing', 'logsnr'])
def test_solvers(net, solver, spacing): draw(net, solver=solver, spacing=spacing)

@pytest.mark.parametrize('more', [dict(threshold='none'), dict(threshold='clip'), dict(threshold='dynamic'), dict(threshold='dynamic_if'), dict(guidance=1.), dict(guidance_interval=[.2, .8]), dict(guidance_rescale=.5), dict(solver='ddim', eta=.5)],
                         ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()))
def test_options_of_sampling(net, more): draw(net, **more)

@pytest.mark.parametrize('make', [lambda: for_upscale(torch.zeros(2, 3, 8, 8), 16, [2, 1]), lambda: for_img2img(torch.zeros(2, 3, 16, 16), [2, 1], .6),
                                  lambda: for_inpaint(torch.zeros(2, 3, 16, 16), torch.ones(2, 1, 16, 16), [2, 1])], ids=['upscale', 'img2img', 'inpaint'])
@pytest.mark.parametrize('solver', ['ddpm', 'unipc'])
def test_given_pictures(net, make, solver): draw(net, make(), solver=solver)

@pytest.mark.parametrize('more', [dict(), dict(solver='ddpm'), dict(guidance_networks='inner'), dict(join=.5)], ids=lambda o: '-'.join(f'{k}={v}' for k, v in o.items()) or 'plain')
def test_clips(gpu, more):
    "The loss of a nest of four frames around one, and clips whose first frame is given."
    shape = dict(time_dim=16, num_groups=4)
    inner = UNetConfig([8, 8], [1, 1], [0, 1], **shape)
    model = create_model(ClipUNetConfig(channels=[8, 8, 8], num_resnets=[1, 1, 1], num_attention_layers=[0, 1, 0], num_temporal_attention_layers=[1, 0, 0], temporal_positional_encoding=True, inner=inner, **shape), 16).to(cuda)
    diffusion = for_real(lambda: Diffusion(load_recipe('shapes', ['diffusion.mixed_ratio=[1,1]']).diffusion, model.scales))()
    cond, mask = torch.zeros(2, 5, 16, device=cuda), torch.ones(2, 5, device=cuda)
    loss = diffusion.loss(model, torch.zeros(2, 3, 16, 16, device=cuda), cond, mask)
    assert devices([loss.loss, *loss.preds]) == {'cuda'}
    draw((model, diffusion), for_animate(torch.zeros(1, 3, 8, 8), model.scales), **more)

# ---- the model's other inputs

def test_the_text_encoder_moves(gpu):
    encoder = create_text_encoder(load_recipe('shapes', tiny).text)
    encoder(['a red circle'])                                    # kept from the CPU
    assert devices(encoder.to(cuda)(['a red circle', 'a blue cross'])) == {'cuda'}

def test_micro_conditioning(gpu):
    recipe = load_recipe('cc12m_64x64', 'model.channels=[32,32] model.num_resnets=[1,1] model.num_attention_layers=[0,1] data.image_size=16'.split())
    model = create_model(recipe.model, 16).to(cuda)
    names = getattr(recipe.model, 'micro_conditioning', None) or []
    micros = {k: torch.zeros(2, device=cuda) for k in (names if not isinstance(names, str) else [o.split(':')[0] for o in names.split(',') if o])}
    with torch.no_grad(): out = model([torch.zeros(2, 3, 16, 16, device=cuda)], torch.zeros(2, dtype=torch.long, device=cuda), torch.zeros(2, 5, 16, device=cuda), torch.ones(2, 5, device=cuda), micros)
    assert devices(out) == {'cuda'}
