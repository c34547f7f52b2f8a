"The edges of `mdm.checkpoint`: damaged folders, crashes in the middle, and pickles of all intents."
import argparse, collections, io, json, os, pickle, struct, subprocess, sys, types, zipfile
from pathlib import Path
import numpy as np, pytest, torch, yaml
from mdm.checkpoint import Inert, find_checkpoint, load_checkpoint, load_inner, load_model, load_weights, read_pickle, save_checkpoint, text_width
from mdm.reference.checkpoints import UnsafeCheckpoint, convert, load_released, save_released
from mdm.utils.files import atomic_folder, bundled, readable
from mdm.models.nested_unet import create_model
from mdm.recipe import load_recipe
from mdm.reference.recipes import to_reference

tiny = ['model.channels=[8,8]', 'model.inner.channels=[8,8]', 'model.num_resnets=[1,1]', 'model.inner.num_resnets=[1,1]', 'model.inner.num_attention_layers=[0,1]', 'model.num_groups=8', 'model.inner.num_groups=8',
        'model.time_dim=16', 'model.inner.time_dim=16', 'text.dim=8']

@pytest.fixture(scope='module')
def recipe(): return load_recipe('shapes', tiny)

@pytest.fixture(scope='module')
def model(recipe): torch.manual_seed(0); return create_model(recipe.model, 8)

@pytest.fixture
def state(model): return {k: v.clone() for k, v in model.state_dict().items()}

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)

# ---- our format

def test_round_trip(recipe, state, tmp_path):
    raw = {k: v + 1 for k, v in state.items()}
    save_checkpoint(tmp_path/'a'/'b', recipe, state, raw, 7, loss=1.5, note='x')
    c = load_checkpoint(tmp_path/'a'/'b')
    assert (c.step, c.recipe, c.extra) == (7, recipe, {'loss': 1.5, 'note': 'x'}) and same(c.weights(), state) and same(c.weights(raw=True), raw)
    assert sorted(p.name for p in (tmp_path/'a'/'b').iterdir()) == ['model.safetensors', 'raw.safetensors', 'recipe.yaml', 'state.json'] and [p.name for p in (tmp_path/'a').iterdir()] == ['b']

def test_raw_weights_are_optional(recipe, state, tmp_path):
    c = load_checkpoint(save_checkpoint(tmp_path/'a', recipe, state))
    with pytest.raises(FileNotFoundError, match='no raw weights'): c.weights(raw=True)

def test_strided_and_half_weights(recipe, tmp_path):
    odd = {'a': torch.arange(6.).view(2, 3).t(), 'b': torch.ones(3, dtype=torch.bfloat16), 'c': torch.arange(10)[::3]}
    assert same(load_checkpoint(save_checkpoint(tmp_path/'a', recipe, odd)).weights(), odd)

@pytest.mark.parametrize('name', ['model.safetensors', 'raw.safetensors', 'state.json', 'recipe.yaml'])
def test_missing_and_cut_short(name, recipe, state, tmp_path):
    folder = save_checkpoint(tmp_path/'a', recipe, state, state, 1)
    whole = (folder/name).read_bytes()
    if name != 'recipe.yaml':
        for cut in (len(whole) - 1, 10, 0):
            (folder/name).write_bytes(whole[:cut])
            with pytest.raises(ValueError, match='cut short|damaged'): load_checkpoint(folder)
    (folder/name).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=name): load_checkpoint(folder)

def test_damaged_in_place(recipe, state, tmp_path):
    folder = save_checkpoint(tmp_path/'a', recipe, state, None, 1)
    blob = bytearray((folder/'model.safetensors').read_bytes()); blob[:9] = b'\xff'*9
    (folder/'model.safetensors').write_bytes(blob)
    with pytest.raises(ValueError, match='damaged'): load_checkpoint(folder).weights()

def test_future_format(recipe, state, tmp_path):
    folder = save_checkpoint(tmp_path/'a', recipe, state)
    about = json.loads((folder/'state.json').read_text())
    (folder/'state.json').write_text(json.dumps(about | {'format': 99}))
    with pytest.raises(ValueError, match='format 99'): load_checkpoint(folder)
    for bad in ({}, about | {'step': 'x'}, [], about | {'files': 3}):
        (folder/'state.json').write_text(json.dumps(bad))
        with pytest.raises(ValueError, match='damaged'): load_checkpoint(folder)

def test_newest_complete(recipe, state, tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder'): find_checkpoint(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='no complete checkpoint'): find_checkpoint(tmp_path)
    for step in (9, 10, 100): save_checkpoint(tmp_path/f's{step}', recipe, state, None, step)
    (tmp_path/'previews').mkdir(); (tmp_path/'log.csv').write_text('x'); (tmp_path/'.s200.new').mkdir()
    assert find_checkpoint(tmp_path).name == 's100' and find_checkpoint(tmp_path/'s9').name == 's9'
    (tmp_path/'s100'/'model.safetensors').write_bytes(b'')
    assert find_checkpoint(tmp_path).name == 's10'
    os.rename(tmp_path/'s10', tmp_path/'.s10.old')                    # the instant of a replacement
    assert find_checkpoint(tmp_path).name == '.s10.old' and load_checkpoint(tmp_path/'s10').step == 10
    for step in (9,): (tmp_path/f's{step}'/'recipe.yaml').unlink()
    os.rename(tmp_path/'.s10.old', tmp_path/'gone'); (tmp_path/'gone'/'state.json').unlink()
    with pytest.raises(FileNotFoundError, match='recipe.yaml'): find_checkpoint(tmp_path)

def test_a_folder_with_the_name_of_a_bundled_model(recipe, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint('shapes').parent == bundled
    Path('shapes').mkdir(); Path('shapes/shapes-000000.tar').write_bytes(b'')
    assert find_checkpoint('shapes').parent == bundled
    with pytest.raises(FileNotFoundError, match='no complete checkpoint'): find_checkpoint(tmp_path/'shapes')
    for o in ('.', '..'):
        with pytest.raises(FileNotFoundError, match='no complete checkpoint'): find_checkpoint(o)
    Path('shapes/recipe.yaml').write_text('')                         # of a training before its first save
    with pytest.raises(FileNotFoundError, match='no complete checkpoint'): find_checkpoint('shapes')
    save_checkpoint('shapes/s1', recipe, state, None, 1)
    assert find_checkpoint('shapes') == Path('shapes/s1')

crash = '''
import os, sys
from pathlib import Path
from mdm.checkpoint import atomic_folder
folder, n = Path(sys.argv[1]), int(sys.argv[2])
def trip(f):
    def g(*a, **k):
        global n
        n -= 1
        if n == 0: os._exit(9)
        return f(*a, **k)
    return g
import shutil
for module, name in ((os, 'rename'), (os, 'fsync'), (os, 'mkdir'), (os, 'unlink'), (os, 'rmdir')): setattr(module, name, trip(getattr(module, name)))
with atomic_folder(folder) as new:
    for i in range(2): (new/str(i)).write_text('new')
'''

def test_a_crash_leaves_the_old_or_the_new(tmp_path):
    "Kill the process before its n-th step, for every n; the folder is always whole."
    seen = set()
    for n in range(1, 40):
        folder = tmp_path/f'{n}'/'ckpt'
        with atomic_folder(folder) as new:
            for i in range(2): (new/str(i)).write_text('old')
        pid = os.fork()
        if pid == 0:
            try: sys.argv = ['x', str(folder), str(n)]; exec(crash, {'__name__': 'crash'})
            except BaseException: os._exit(3)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        found = {p.name: p.read_text() for p in readable(folder).iterdir()}
        assert found in ({'0': 'old', '1': 'old'}, {'0': 'new', '1': 'new'}), (n, found)
        seen.add(found['0'])
        with atomic_folder(folder) as new: (new/'again').write_text('x')              # and the next one works
        assert [p.name for p in folder.iterdir()] == ['again'] and [p.name for p in folder.parent.iterdir()] == ['ckpt']
        if code == 0: break
    assert code == 0 and seen == {'old', 'new'}

@pytest.mark.parametrize('fails', ['rename', 'fsync'])
def test_an_error_leaves_the_old(fails, tmp_path, monkeypatch):
    folder = tmp_path/'a'
    with atomic_folder(folder) as new: (new/'x').write_text('old')
    real, calls = getattr(os, fails), []
    def fail(*a):
        calls.append(a)
        if len(calls) == 2: raise OSError('disk full')
        return real(*a)
    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match='disk full'):
        with atomic_folder(folder) as new: (new/'x').write_text('new'); (new/'y').write_text('new')
    assert (folder/'x').read_text() == 'old' and [p.name for p in tmp_path.iterdir()] == ['a']

# ---- weights into a model

def test_load_weights_says_what_does_not_fit(model, state):
    bad = {('renamed' if k == 'conv_in.bias' else k): v for k, v in state.items()}
    bad['conv_out.bias'] = torch.zeros(4); bad['conv_in.weight'] = torch.full_like(state['conv_in.weight'], float('inf'))
    with pytest.raises(ValueError) as e: load_weights(model, bad, 'x.pth')
    for line in ('x.pth', '1 missing: conv_in.bias', '1 not in the model: renamed', '1 of another shape: conv_out.bias [4] where the model has [3]', '1 not finite: conv_in.weight'): assert line in str(e.value)
    with pytest.raises(ValueError, match=f'{len(state)} missing: .*, \\.\\.\\.'): load_weights(model, {})
    assert same(model.state_dict(), state)                        # left alone

def test_load_weights_fills(recipe, model, state):
    other = create_model(recipe.model, 8)
    load_weights(other, {f'module.{k}': v for k, v in state.items()})
    assert same(other.state_dict(), state)

@pytest.mark.parametrize('changes', [[], ['model.inner.num_text_layers=0'], ['model.inner.text_proj_dim=24'], ['model.inner.num_text_layers=0', 'model.inner.pooled_text=false']])
def test_text_width(changes):
    config = load_recipe('shapes', [*tiny, *changes]).model
    assert text_width(config, create_model(config, 16).state_dict()) == 16
    assert text_width(config, create_model(config, 0).state_dict()) == 0

# ---- the reference's files: benign

@pytest.fixture
def foreign():
    "Modules that exist while a file is written and are gone when it is read."
    made = []
    def make(name, source):
        parts = name.split('.')
        for i in range(1, len(parts) + 1):
            n = '.'.join(parts[:i])
            if n not in sys.modules: sys.modules[n] = types.ModuleType(n); made.append(n)
        module = sys.modules[name]
        exec(source, module.__dict__)
        return module
    def forget():
        for n in made: sys.modules.pop(n, None)
    make.forget = forget
    yield make
    forget()

classes = '''
import enum
from dataclasses import dataclass, field
class Kind(enum.Enum): DDPM = 1; V = 2
class Level(enum.IntEnum): LOW = 3
@dataclass
class Config: lr: float = 5e-5; kind: Kind = Kind.V; name: str = 'x'; nested: dict = field(default_factory=dict)
class Slotted:
    __slots__ = ('a',)
class Listy(list): pass
class Mapped(dict): pass
class Stateful:
    def __getstate__(self): return ('odd', 1)
    def __setstate__(self, s): raise RuntimeError('ran')
class Reduced:
    def __reduce__(self): return Reduced, (1, 2), {'k': 3}, iter([4, 5]), iter([('m', 6)])
    def __init__(self, *a): raise RuntimeError('ran')
class Quiet(Reduced):
    def __init__(self, *a): pass
    def __reduce__(self): return Quiet, (1, 2), {'k': 3}
'''

def released(state, **args): return dict(state_dict=collections.OrderedDict((f'module.{k}', v) for k, v in state.items()), batch_num=1234, loss=np.float64(.25), best_avg_loss=torch.tensor(.5),
                                         exp_avg_loss=.1, exp_avg_loss_var=np.float32(2), args=argparse.Namespace(**args))

@pytest.mark.parametrize('module', ['ml_mdm.config', 'ml_mdm.models.nested_unet', 'config', 'samplers', 'reader', 'diffusion', 'models.unet', 'language_models.factory'])
@pytest.mark.parametrize('kwargs', [{}, dict(_use_new_zipfile_serialization=False), dict(pickle_protocol=4)])
def test_foreign_classes_become_inert(module, kwargs, foreign, state, tmp_path):
    m = foreign(module, classes)
    slotted, mapped = m.Slotted(), m.Mapped(p=1); slotted.a = 1
    torch.save(released(state, lr=1e-4, config=m.Config(nested={'k': [m.Kind.DDPM]}), kind=m.Kind.V, level=m.Level.LOW, slotted=slotted, listy=m.Listy([1, 2]), mapped=mapped, stateful=m.Stateful(),
                        quiet=m.Quiet(), cls=m.Config, path=Path('a/b'), size=torch.Size([2]), dtype=torch.float16, device=torch.device('cpu'), some={1, 2}, raw=b'\xff\x00', z=1j, array=np.arange(3)), tmp_path/'x.pth', **kwargs)
    foreign.forget()
    r = load_released(tmp_path/'x.pth')
    assert same(r.state_dict, state) and r.step == 1234 and r.stats == dict(loss=.25, best_avg_loss=.5, exp_avg_loss=.1, exp_avg_loss_var=2.)
    a = r.args
    assert a.lr == 1e-4 and a['lr'] == 1e-4 and 'lr' in a and a.get('none', 3) == 3 and a._path == 'argparse.Namespace'
    assert isinstance(a.config, Inert) and a.config._path == f'{module}.Config' and a.config.name == 'x' and a.config.kind._args == (2,) and a.config.nested['k'][0]._args == (1,)
    assert a.slotted.a == 1 and list(a.mapped.keys()) == ['p'] and a.quiet.k == 3 and a.quiet._args == (1, 2)
    assert module not in sys.modules and isinstance(a.cls, type) and issubclass(a.cls, Inert)
    with pytest.raises(AttributeError, match='has no batch'): a.batch
    assert 'lr' in repr(a)

def test_tensors_of_all_kinds(tmp_path):
    base = torch.arange(24.)
    tensors = dict(f=base, view=base[3:9].view(2, 3), strided=base.view(4, 6).t(), half=base.half(), bf=base.bfloat16(), double=base.double(), long=torch.arange(3), int=torch.arange(3).int(), short=torch.arange(3).short(),
                   char=torch.arange(3).char(), byte=torch.arange(3).byte(), flag=torch.tensor([True, False]), scalar=torch.tensor(3.5), empty=torch.empty(0, 3), parameter=torch.nn.Parameter(torch.ones(2, 2)))
    for kwargs in ({}, dict(_use_new_zipfile_serialization=False)):
        torch.save(dict(state_dict=tensors), tmp_path/'x.pth', **kwargs)
        assert same(load_released(tmp_path/'x.pth').state_dict, {k: v.detach() for k, v in tensors.items()})
    torch.save(tensors, tmp_path/'bare.pth')                            # nothing around the weights
    r = load_released(tmp_path/'bare.pth')
    assert same(r.state_dict, {k: v.detach() for k, v in tensors.items()}) and r.step is None and r.args is None
    torch.save(create_model(load_recipe('shapes', tiny).model, 8).state_dict(), tmp_path/'metadata.pth')    # an OrderedDict with an attribute
    assert len(load_released(tmp_path/'metadata.pth').state_dict) > 10

def test_changing_what_was_loaded_leaves_the_file(state, tmp_path):
    save_released(tmp_path/'x.pth', state)
    before = (tmp_path/'x.pth').read_bytes()
    r = load_released(tmp_path/'x.pth')
    for v in r.state_dict.values(): v.add_(1)
    assert (tmp_path/'x.pth').read_bytes() == before and same(load_released(tmp_path/'x.pth').state_dict, state)

def test_save_released_has_the_references_layout(recipe, state, tmp_path):
    save_released(tmp_path/'sub'/'x.pth', state, 5, to_reference(recipe))
    d = torch.load(tmp_path/'sub'/'x.pth', weights_only=False)
    assert set(d) == {'state_dict', 'batch_num', 'loss', 'best_avg_loss', 'exp_avg_loss', 'exp_avg_loss_var', 'args'} and same(d['state_dict'], state)
    assert d['args'].unet_config == to_reference(recipe)['unet_config'] and [p.name for p in (tmp_path/'sub').iterdir()] == ['x.pth']

# ---- the reference's files: hostile

class Call:
    "Asks to be rebuilt by calling anything."
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def refuse(path, match='asks for', sentinel=None):
    with pytest.raises(UnsafeCheckpoint, match=match) as e: load_released(path)
    assert str(path) in str(e.value)
    if sentinel is not None: assert not sentinel.exists(), 'the file was executed'

def callables(s):
    "Calls that would each create the file `s`."
    code, cmd = f'open({str(s)!r}, "w").close()', f'touch {s}'
    return {'os.system': Call(os.system, cmd), 'eval': Call(eval, code), 'exec': Call(exec, code), 'popen': Call(subprocess.Popen, ['touch', str(s)]), 'check_output': Call(subprocess.check_output, ['touch', str(s)]),
            'open': Call(open, str(s), 'w'), 'getattr': Call(getattr, 'x', 'upper'), 'import': Call(__import__, 'antigravity'), 'import_module': Call(__import__('importlib').import_module, 'this'),
            'loads': Call(pickle.loads, pickle.dumps(Call(os.system, cmd))), 'torch.load': Call(torch.load, str(s)), 'partial': Call(__import__('functools').partial, os.system, cmd),
            'attrgetter': Call(__import__('operator').attrgetter, 'system'), 'runpy': Call(__import__('runpy').run_path, str(s)), 'Path.touch': Call(Path.touch, s), 'np.load': Call(np.load, str(s)),
            'torch storage': Call(torch.storage._load_from_bytes, b'x'), 'module': torch.nn.Linear(2, 2), 'map': Call(map, os.system, [cmd]), 'type': Call(type, 'x', (), {}), 'setattr': Call(setattr, collections.UserDict(), 'x', 1)}

@pytest.mark.parametrize('kind', list(callables(Path('x'))))
@pytest.mark.parametrize('place', ['args', 'state_dict', 'inside', 'legacy', 'key', 'plain'])
def test_hostile_calls(kind, place, state, tmp_path):
    s = tmp_path/'sentinel'
    evil, path = callables(s)[kind], tmp_path/'x.pth'
    if place == 'args': torch.save(released(state) | dict(args=evil), path)
    if place == 'state_dict': torch.save(dict(state_dict=evil), path)
    if place == 'inside': torch.save(released(state | {'w': [evil]}), path)
    if place == 'legacy': torch.save(released(state, x=evil), path, _use_new_zipfile_serialization=False)
    if place == 'key': torch.save({'state_dict': state, ('a', evil): 1}, path)
    if place == 'plain': path.write_bytes(pickle.dumps({'state_dict': evil}))
    refuse(path, sentinel=s)
    assert 'antigravity' not in sys.modules

def pth(path, main, storages={}, compress=zipfile.ZIP_STORED, extra={}):
    "A zip file like torch.save's around hand-made instructions."
    with zipfile.ZipFile(path, 'w', compress) as z:
        z.writestr('archive/data.pkl', main)
        for k, v in (storages | extra).items(): z.writestr(f'archive/data/{k}' if k in storages else k, v)
    return path

g = lambda module, name: f'c{module}\n{name}\n'.encode()             # GLOBAL, protocol 0
u = lambda s: b'X' + struct.pack('<I', len(s.encode())) + s.encode() # BINUNICODE
entry = lambda value: b'\x80\x02}' + u('state_dict') + value + b's.'

@pytest.mark.parametrize('code,match', [
    (g('os', 'system') + u('touch {s}') + b'\x85R', 'os.system'),
    (b'(' + u('touch {s}') + b'ios\nsystem\n', 'os.system'),                                                   # INST
    (b'(' + g('os', 'system') + u('touch {s}') + b'o', 'os.system'),                                           # OBJ
    (g('subprocess', 'Popen') + u('touch {s}') + b'\x85\x81', 'subprocess.Popen'),                             # NEWOBJ
    (u('os') + u('system') + b'\x93' + u('touch {s}') + b'\x85R', 'os.system'),                                # STACK_GLOBAL
    (u('builtins') + u('str.__class__') + b'\x93', 'str.__class__'), (g('torch._utils', '_rebuild_tensor_v2.__globals__'), '__globals__'),
    (g('collections', 'OrderedDict.__init__'), '__init__'), (g('mdm.checkpoint', 'Inert'), 'mdm.checkpoint.Inert'), (g('ml_mdm_evil', 'x'), 'ml_mdm_evil'), (g('', 'eval'), 'eval|make sense'), (g('__main__', 'x'), '__main__'),
    (b'\x82\x01', 'EXT1'), (b'\x83\x01\x01', 'EXT2'), (b'\x84\x01\x01\x01\x01', 'EXT4'),
    (b'Nr\xff\xff\xff\x7f', 'LONG_BINPUT'), (b'Np4000000000\n', 'PUT'),
    (b'\x97', 'not make sense'), (b'Pstorage\n', 'storage of an unknown kind'), (u('storage') + b'Q', 'storage of an unknown kind'),
    (u('storage') + b'N' + u('0') + u('cpu') + b'K\x01tQ', 'not make sense|damaged'), (b'}' + b'q\x00' + b'h\x05', 'not make sense|damaged'), (b'0'*5, 'not make sense|damaged'), (b')'*10 + b'bb', 'not make sense|not a'),
    (b')' + b'\x85'*200_000, 'far larger'), (b'I' + b'9'*6000 + b'\n', 'damaged|make sense'), (b'\x8a\xff' + b'\xff'*10, 'damaged'), (b'B\xff\xff\xff\xff', 'damaged'),
    (b'\x95\xff\xff\xff\xff\xff\xff\xff\x7f', 'damaged|make sense'), (b'N', 'state_dict is empty or not'), (b'}', 'state_dict is empty'), (b'}K\x01K\x02s', 'not text'), (b'}' + u('w') + b'K\x02s', 'entry w is not a tensor')])
def test_hostile_instructions(code, match, tmp_path):
    s = tmp_path/'sentinel'
    refuse(pth(tmp_path/'x.pth', entry(code.replace(u('touch {s}'), u(f'touch {s}')))), match, s)

def test_states_are_only_noted(tmp_path):
    "BUILD with every attribute that could matter, on instances and on classes."
    names = ['__class__', '__setstate__', '__dict__', '__reduce__', '_path', '_args', '_state', '__getattr__', 'append', 'extend', 'keys', 'get', '__call__', '__init_subclass__', '__new__']
    state = b'}' + b''.join(u(n) + g('ml_mdm.x', 'Evil') + b's' for n in names)
    for target in (g('ml_mdm.x', 'C') + b')\x81', g('ml_mdm.x', 'C') + b')R', g('argparse', 'Namespace') + b')\x81', g('collections', 'OrderedDict') + b')R'):
        for build in (state + b'b', b'N' + state + b'\x86b', state + b'b' + state + b'b', state + b'b' + u('k') + b'K\x01s', state + b'b]K\x01a' + b'0'):
            main = pth(tmp_path/'x.pth', b'\x80\x02}' + u('args') + target + build + b's.')
            value, _ = read_pickle(io.BytesIO(zipfile.ZipFile(main).read('archive/data.pkl')))
            x = value['args']
            assert type(x).__mro__[1] is Inert and x._path != 'ml_mdm.x.Evil' and x._args == ()
            if x._path != 'collections.OrderedDict': assert x['__class__']._path == 'ml_mdm.x.Evil'
            refuse(main, 'not a tensor|not a dictionary|not text|state_dict')
    for target in (g('ml_mdm.x', 'C'), g('torch._utils', '_rebuild_tensor_v2'), g('collections', 'OrderedDict')):     # on the class itself
        refuse(pth(tmp_path/'x.pth', entry(target + state + b'b')), 'not make sense')
        refuse(pth(tmp_path/'x.pth', entry(target + b'N' + state + b'\x86b')), 'not make sense')
    assert Inert._path == '' and read_pickle(io.BytesIO(b'\x80\x02' + g('ml_mdm.x', 'C') + b')\x81.'))[0]._state == {}

def tensor(key='0', dtype='FloatStorage', numel=b'K\x04', offset=b'K\x00', size=b'K\x04\x85', stride=b'K\x01\x85'):
    pid = b'(' + u('storage') + g('torch', dtype) + u(key) + u('cpu') + numel + b'tQ'
    return b'}' + u('w') + g('torch._utils', '_rebuild_tensor_v2') + b'(' + pid + offset + size + stride + b'\x89' + g('collections', 'OrderedDict') + b')RtRs'

def test_hand_made_tensor(tmp_path):
    "The base of the next test is sound."
    numbers = struct.pack('<4f', 1, 2, 3, 4)
    assert load_released(pth(tmp_path/'x.pth', entry(tensor()), {'0': numbers})).state_dict['w'].tolist() == [1, 2, 3, 4]
    assert load_released(pth(tmp_path/'x.pth', entry(tensor(offset=b'K\x01', size=b'K\x02\x85')), {'0': numbers})).state_dict['w'].tolist() == [2, 3]

@pytest.mark.parametrize('kwargs', [
    dict(offset=b'K\x01'), dict(offset=b'J\xff\xff\xff\xff'), dict(offset=b'\x88'), dict(offset=b'N'), dict(offset=b'G' + struct.pack('>d', 1.)), dict(size=b'K\x05\x85'), dict(stride=b'K\x02\x85'), dict(stride=b'J\xff\xff\xff\xff\x85'),
    dict(size=b'J\xff\xff\xff\xff\x85'), dict(size=b'K\x02K\x02\x86'), dict(size=b'K\x04'), dict(size=b'\x8a\x08' + b'\xff'*7 + b'\x7f\x85', stride=b'K\x00\x85'), dict(size=b'\x8a\x05\x00\x00\x00\x00\x01\x85', stride=b'K\x00\x85'),
    dict(size=b'(' + b'K\x01'*40 + b't', stride=b'(' + b'K\x01'*40 + b't'), dict(numel=b'K\x05'), dict(numel=b'J\xff\xff\xff\x7f'), dict(numel=b'J\xff\xff\xff\xff'), dict(numel=b'\x88'), dict(key='1'), dict(key='../0'), dict(dtype='DoubleStorage'),
    dict(dtype='OddStorage'), dict(dtype='load')])
def test_tensors_stay_within_their_file(kwargs, tmp_path):
    refuse(pth(tmp_path/'x.pth', entry(tensor(**kwargs)), {'0': struct.pack('<4f', 1, 2, 3, 4)}), 'storage|shape|asks for')

def test_zip_tricks(state, tmp_path):
    numbers = {'0': struct.pack('<4f', 1, 2, 3, 4)}
    refuse(pth(tmp_path/'x.pth', entry(tensor()), numbers, zipfile.ZIP_DEFLATED), 'compressed')
    refuse(pth(tmp_path/'x.pth', entry(tensor()), numbers, extra={'archive/byteorder': 'big'}), 'little-endian')
    refuse(pth(tmp_path/'x.pth', entry(tensor()), numbers, extra={'other/data.pkl': b'x'}), 'not one of torch.save')
    blob = bytearray(pth(tmp_path/'x.pth', entry(tensor()), numbers).read_bytes())
    at = blob.rindex(b'PK\1\2')                                        # directory entry of the storage
    for field, value in ((42, 2**31), (42, 3), (20, 2**31), (24, 2**31)):
        bad = bytearray(blob); bad[at + field:at + field + 4] = struct.pack('<I', value)
        if field in (20, 24): bad[at + 20:at + 28] = struct.pack('<II', value, value)
        (tmp_path/'x.pth').write_bytes(bad)
        refuse(tmp_path/'x.pth', 'damaged|should be|outside')

@pytest.mark.parametrize('legacy', [False, True])
def test_cut_short_everywhere(legacy, state, tmp_path):
    torch.save(released(state), tmp_path/'x.pth', _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path/'x.pth').read_bytes()
    for cut in {0, 1, 3, 4, 30, len(whole)//3, len(whole)//2, len(whole) - 30, len(whole) - 1}:
        (tmp_path/'cut.pth').write_bytes(whole[:cut])
        refuse(tmp_path/'cut.pth', 'was not loaded')

def test_random_damage_never_escapes(state, tmp_path):
    "Flipped bytes in the pickle give weights, perhaps wrong ones, or an UnsafeCheckpoint; nothing else."
    torch.save(released({k: state[k] for k in list(state)[:4]}, a=1), tmp_path/'x.pth')
    main = zipfile.ZipFile(tmp_path/'x.pth').read(next(n for n in zipfile.ZipFile(tmp_path/'x.pth').namelist() if n.endswith('data.pkl')))
    rng, refused = np.random.default_rng(0), 0
    for _ in range(500):
        bad = bytearray(main)
        for i in rng.integers(0, len(bad), rng.integers(1, 4)): bad[i] = rng.integers(0, 256)
        pth(tmp_path/'y.pth', bytes(bad), {str(i): b'\0'*10000 for i in range(4)})
        try: load_released(tmp_path/'y.pth')
        except UnsafeCheckpoint: refused += 1
    assert refused > 100

@pytest.mark.parametrize('legacy', [False, True])
def test_random_damage_anywhere(legacy, tmp_path):
    torch.save(released({f'w{i}': torch.ones(2, 3) for i in range(3)}, a=1), tmp_path/'x.pth', _use_new_zipfile_serialization=not legacy)
    whole, rng, refused = (tmp_path/'x.pth').read_bytes(), np.random.default_rng(1), 0
    for _ in range(400):
        bad = bytearray(whole)
        for i in rng.integers(0, len(bad), rng.integers(1, 6)): bad[i] = rng.integers(0, 256)
        (tmp_path/'y.pth').write_bytes(bad)
        try: load_released(tmp_path/'y.pth')
        except UnsafeCheckpoint: refused += 1
    assert refused > 20

def test_other_files_are_named(recipe, state, tmp_path):
    with pytest.raises(FileNotFoundError, match='no file'): load_released(tmp_path/'none.pth')
    save_checkpoint(tmp_path/'a', recipe, state)
    refuse(tmp_path/'a'/'model.safetensors', 'damaged|not a file')
    (tmp_path/'text').write_text('hello world'); refuse(tmp_path/'text', 'damaged|not a file')
    (tmp_path/'p').write_bytes(pickle.dumps({'state_dict': {}})); refuse(tmp_path/'p', 'not a file of torch.save')
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z: z.writestr('a.txt', 'x')
    refuse(tmp_path/'z.zip', 'not one of torch.save')

def test_nothing_is_imported(tmp_path):
    "A name from an allowed family is noted, its module is not looked for."
    (tmp_path/'config.py').write_text(f"open({str(tmp_path/'sentinel')!r}, 'w').close()")
    sys.path.insert(0, str(tmp_path))
    try: refuse(pth(tmp_path/'x.pth', entry(g('config', 'run') + b')R')), 'not a dictionary', tmp_path/'sentinel')
    finally: sys.path.remove(str(tmp_path))
    assert 'config' not in sys.modules

# ---- models and conversion

def test_load_model_from_everything(recipe, state, tmp_path):
    raw = {k: v + 1 for k, v in state.items()}
    save_checkpoint(tmp_path/'run'/'000010', recipe, state, raw, 10)
    for path in (tmp_path/'run', tmp_path/'run'/'000010'):
        model, r = load_model(path)
        assert same(model.state_dict(), state) and r == recipe and not model.training
    assert same(load_model(tmp_path/'run', raw=True)[0].state_dict(), raw)
    pth = convert(tmp_path/'run', tmp_path/'vis_model_000010.pth')
    assert pth.with_suffix('.yaml').exists() and same(load_model(pth)[0].state_dict(), state) and load_model(pth)[1].model == recipe.model
    os.rename(pth.with_suffix('.yaml'), tmp_path/'other.yaml')
    with pytest.raises(FileNotFoundError, match='cc12m_64x64, cc12m_256x256 or cc12m_1024x1024.*vis_model_000010.yaml'): load_model(pth)
    assert same(load_model(pth, tmp_path/'other.yaml')[0].state_dict(), state) and same(load_model(pth, recipe)[0].state_dict(), state)
    with pytest.raises(ValueError, match='does not fit the model'): load_model(pth, load_recipe('shapes'))
    with pytest.raises(FileNotFoundError, match='neither a checkpoint folder nor'): load_model(tmp_path/'nope')

def test_convert_both_ways(recipe, state, tmp_path):
    save_checkpoint(tmp_path/'a', recipe, state, state, 42)
    convert(tmp_path/'a', tmp_path/'b.pth')
    assert yaml.safe_load((tmp_path/'b.yaml').read_text()) == to_reference(recipe)
    convert(tmp_path/'b.pth', tmp_path/'c'); convert(tmp_path/'b.pth', tmp_path/'d', recipe)
    for name in 'cd': assert (c := load_checkpoint(tmp_path/name)).step == 42 and same(c.weights(), state) and c.recipe.model == recipe.model
    assert load_checkpoint(tmp_path/'d').recipe == recipe
    for src, dst, says in ((tmp_path/'a', tmp_path/'x', 'ends in .pth'), (tmp_path/'b.pth', tmp_path/'x.pth', 'name of a file')):
        with pytest.raises(ValueError, match=says): convert(src, dst)
    with pytest.raises(FileNotFoundError, match='neither'): convert(tmp_path/'none.pth', tmp_path/'x')
    with pytest.raises(ValueError, match='does not fit'): convert(tmp_path/'b.pth', tmp_path/'x', 'shapes')
    assert not (tmp_path/'x').exists()

def test_load_inner(recipe, model, state, tmp_path):
    inner = load_recipe('shapes', tiny); inner.model = recipe.model.inner
    weights = {k: torch.randn_like(v) for k, v in create_model(inner.model, 8).state_dict().items()}
    save_checkpoint(tmp_path/'in', inner, weights, None, 1); save_released(tmp_path/'in.pth', weights)
    for path in (tmp_path/'in', tmp_path/'in.pth'):
        nest = create_model(recipe.model, 8)
        outer = {k: v.clone() for k, v in nest.state_dict().items() if not k.startswith('inner_unet.')}
        load_inner(nest, path)
        assert same(nest.inner_unet.state_dict(), weights) and all(torch.equal(nest.state_dict()[k], v) for k, v in outer.items())
    save_checkpoint(tmp_path/'whole', recipe, state, None, 1)
    with pytest.raises(ValueError, match='does not fit'): load_inner(nest, tmp_path/'whole')
