"The edges of `mdm.reference`: YAML files of many years, and pickles of all intents."
import argparse, collections, json, os, pickle, struct, subprocess, sys, time, types, warnings, zipfile
from pathlib import Path
import numpy as np, pytest, torch, yaml
from mdm.checkpoint import load_checkpoint, load_inner, load_model, save_checkpoint
from mdm.models.nested_unet import create_model, model_scales
from mdm.pipeline import MDMPipeline
from mdm.recipe import RecipeError, build_recipe, load_recipe
from mdm.reference.checkpoints import StandIn, UnsafeCheckpoint, convert, load_released, save_released
from mdm.reference.recipes import from_reference, is_reference, to_reference, translate
from mdm.utils.files import bundled, presets
from tiny_models import even_v, model, recipe, same, state, tiny

here = Path(__file__).parent

# ---- the reference's files

@pytest.mark.parametrize('size,ignored', [(64, ['dataset_config', 'sample_dir', 'device', 'num_epochs', 'prediction_length', 'predict_variances', 'rescale_schedule', 'warmup_steps=10000']),
    (256, ['sample_dir', 'no_use_residual', 'smaller_side_size=300', 'padding_token', 'pretrained_vision_file']), (1024, ["initialize_inner_with_pretrained='a1b2c3d4'"])])
def test_messy_files_give_the_presets_models(size, ignored):
    with pytest.warns(UserWarning) as caught: theirs = load_recipe(here/'data'/f'released_{size}.yaml')
    ours = load_recipe(f'cc12m_{size}x{size}')
    assert (theirs.model, theirs.diffusion, theirs.sample, theirs.text) == (ours.model, ours.diffusion, ours.sample, ours.text)
    assert theirs.name == ours.name and theirs.data.image_size == size and theirs.train.lr == 5e-5 and theirs.train.grad_clip == 2
    assert len(caught) == 1 and all(k in str(caught[0].message) for k in ignored)
    assert str(caught[0].message).count('=') == len(ignored) + ('beyond' in str(caught[0].message))

def test_messy_training_options():
    with pytest.warns(UserWarning): r = load_recipe(here/'data'/'released_64.yaml', ['train.output=here'])
    assert (r.train.batch_size, r.train.steps, r.train.warmup_steps, r.train.optimizer, r.train.seed, r.data.workers, r.train.output) == (32, 5000, 5000, 'adamw', 0, 3, 'here')
    with pytest.warns(UserWarning): assert load_recipe(here/'data'/'released_1024.yaml').train.bf16

@pytest.mark.parametrize('sampler,changed', [({}, {}), (dict(threshold_function='DYNAMIC'), dict(threshold='dynamic')), (dict(num_diffusion_steps=20), dict(steps=20))])
def test_translated_recipes_sample_as_the_reference_does(sampler, changed):
    "Whatever the defaults of SampleConfig are, and whatever the file leaves out."
    theirs = dict(unet_config={}, diffusion_config=dict(sampler_config=dict(prediction_type='v', **sampler)))
    for values in (theirs, theirs | dict(diffusion_config=None) if not sampler else theirs):
        assert translate(values)[0]['sample'] == dict(solver='ddim', eta=0., spacing='uniform', steps=50, threshold='clip') | changed

@pytest.mark.parametrize('size', ['64x64', '256x256', '1024x1024'])
def test_presets_of_released_models_sample_as_the_reference_does(size):
    written = yaml.safe_load((bundled.parent/'presets'/f'cc12m_{size}.yaml').read_text())['sample']
    assert {k: written[k] for k in ('solver', 'eta', 'spacing', 'steps', 'threshold')} == dict(solver='ddim', eta=0., spacing='uniform', steps=50, threshold='clip')

def test_mistakes_in_a_reference_file_are_reported_together():
    with pytest.raises(RecipeError) as e: load_recipe(here/'data'/'released_broken.yaml')
    for line in ('unet_config.resolution_chanels: unknown key', 'did you mean resolution_channels?', 'model.temporal_mode: only a nested model', "schedule_type: found 'LINEAR', expected one of deepfloyd",
                 'prediction_typ: unknown key', 'did you mean prediction_type?', "model: found 'nested_unet', expected 'unet'", 'use_lm_mask', "train.lr: found 'fast'", 'batchsize: unknown key',
                 'did you mean batch_size?', 'model.channels: missing'): assert line in str(e.value), line

@pytest.mark.parametrize('name', ['unet', 'nested', 'nested2', 'video4', 'video16', 'video_space'])
def test_golden_model_configs(name):
    golden = json.loads((here/'golden'/f'{name}.json').read_text())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        config = from_reference(golden['config'])
    with torch.device('meta'): model = create_model(config, 48)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == golden['parameters']
    assert [golden['sizes'][-1]*s for s in model_scales(config)] == golden['sizes']

def test_from_reference_details():
    base = dict(resolution_channels=[32, 64], num_resnets_per_resolution=[1, 1], attention_levels=[1], num_attention_layers=[2, 2])
    assert from_reference(base).num_attention_layers == [0, 2]
    assert from_reference(base | dict(attention_levels=None)).num_attention_layers == [0, 0]
    for none in (-1, 0, None, 'None', '-1'): assert from_reference(base | dict(conditioning_feature_proj_dim=none, temporal_dim=none)) == from_reference(base)
    assert from_reference(base | dict(micro_conditioning='scale:64, age:0.5')).micro_conditioning == {'scale': 64., 'age': .5}
    for none in ('', None, 'None'): assert from_reference(base | dict(micro_conditioning=none)).micro_conditioning == {}
    flipped = from_reference(base | dict(skip_cond_emb=1, skip_mid_blocks='true'))
    assert not flipped.pooled_text and not flipped.mid_blocks
    assert from_reference({k.replace('_', '-'): v for k, v in base.items()}) == from_reference(base)
    for bad in (dict(micro_conditioning='scale'), dict(resolution_channels='a,b'), dict(num_attention_layers=5), dict(resnet_config=3), dict(inner_config=[]), dict(num_temporal_attention_layers=2)):
        with pytest.raises(RecipeError): from_reference(base | bad)
    assert base['attention_levels'] == [1]                      # the argument is left as it was

def known_there(recipe): return recipe.text.encoder != 'classes' and recipe.diffusion.min_divisor == 0 and recipe.diffusion.schedule != 'flow'

@pytest.mark.parametrize('name', [o for o in presets() if known_there(load_recipe(o))])
def test_to_reference_is_understood(name):
    recipe = load_recipe(name)
    theirs = yaml.safe_load(yaml.safe_dump(to_reference(recipe)))
    assert is_reference(theirs)
    values, bad, ignored = translate(theirs)
    again = build_recipe(values, strict=False)
    assert bad == ignored == [] and (again.model, again.diffusion, again.name) == (recipe.model, recipe.diffusion, recipe.name)
    for k in ('lr', 'batch_size', 'steps', 'warmup_steps', 'grad_clip', 'bf16', 'accumulate', 'log_every', 'save_every', 'output', 'seed'): assert getattr(again.train, k) == getattr(recipe.train, k)
    assert again.train.optimizer == {'muon': 'adamw'}.get(recipe.train.optimizer, recipe.train.optimizer)     # Muon is unknown there
    assert (again.data.image_size, again.data.crop, again.data.shuffle, again.text.encoder) == (recipe.data.image_size, recipe.data.crop, recipe.data.shuffle, recipe.text.encoder)

@pytest.mark.parametrize('change', ['schedule=flow', 'prediction=flow', 'loss_target=flow', 'time_sampling=logsnr', 'loss_weight=min_snr', 'min_divisor=0.1'])
def test_to_reference_refuses_objectives_of_ours(change):
    key, found = change.split('=')
    with pytest.raises(RecipeError, match=f"diffusion.{key}: found '?{found}'?, expected .* the reference knows no other"):
        to_reference(load_recipe('shapes', [f'diffusion.{change}']))

def test_vdm_weights_by_either_name():
    for change in ('vdm_weights=true', 'loss_weight=vdm'): assert to_reference(load_recipe('shapes', [*even_v, f'diffusion.{change}']))['diffusion_config']['use_vdm_loss_weights']

def test_to_reference_refuses_what_it_cannot_say():
    with pytest.raises(RecipeError, match='model.inner.num_heads: found 4, expected 8'): to_reference(load_recipe('shapes', ['model.inner.num_heads=4']))

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
@pytest.mark.parametrize('kwargs', [{}, dict(_use_new_zipfile_serialization=False)])
def test_foreign_classes_become_stand_ins(module, kwargs, foreign, state, tmp_path):
    m = foreign(module, classes)
    slotted = m.Slotted(); slotted.a = 1
    torch.save(released(state, lr=1e-4, config=m.Config(nested={'k': [m.Kind.DDPM]}), kind=m.Kind.V, level=m.Level.LOW, slotted=slotted, stateful=m.Stateful(), stable=frozenset([1]), kind_of=int,
                        quiet=m.Quiet(), cls=m.Config, path=Path('a/b'), size=torch.Size([2]), dtype=torch.float16, device=torch.device('cpu'), some={1, 2}, raw=b'\xff\x00', z=1j, array=np.arange(3)), tmp_path/'x.pth', **kwargs)
    foreign.forget()
    r = load_released(tmp_path/'x.pth')
    assert same(r.state_dict, state) and r.step == 1234 and r.stats == dict(loss=.25, best_avg_loss=.5, exp_avg_loss=.1, exp_avg_loss_var=2.)
    a = r.args
    assert a.lr == 1e-4 and a['lr'] == 1e-4 and 'lr' in a and a.get('none', 3) == 3 and a._path == 'argparse.Namespace'
    assert isinstance(a.config, StandIn) and a.config._path == f'{module}.Config' and a.config.name == 'x' and a.config.kind._args == (2,) and a.config.nested['k'][0]._args == (1,)
    assert a.slotted.a == 1 and a.some == {1, 2} and a.raw == b'\xff\x00' and a.z == 1j and a.dtype == torch.float16 and a.quiet.k == 3 and a.quiet._args == (1, 2)
    assert module not in sys.modules and isinstance(a.cls, type) and issubclass(a.cls, StandIn)
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
    if place == 'plain': path.write_bytes(pickle.dumps({'state_dict': evil}, protocol=2))
    refuse(path, sentinel=s)
    assert 'antigravity' not in sys.modules

def pth(path, main, storages={}, compress=zipfile.ZIP_STORED, extra={}):
    "A zip file like torch.save's around hand-made instructions."
    with zipfile.ZipFile(path, 'w', compress) as z:
        z.writestr('archive/data.pkl', main)
        z.writestr('archive/version', '3\n')
        for k, v in (storages | extra).items(): z.writestr(f'archive/data/{k}' if k in storages else k, v)
    return path

g = lambda module, name: f'c{module}\n{name}\n'.encode()             # GLOBAL, protocol 0
u = lambda s: b'X' + struct.pack('<I', len(s.encode())) + s.encode() # BINUNICODE
entry = lambda value: b'\x80\x02}' + u('state_dict') + value + b's.'

@pytest.mark.parametrize('code,match', [
    (g('os', 'system') + u('touch {s}') + b'\x85R', 'os.system'),
    (b'(' + u('touch {s}') + b'ios\nsystem\n', 'instruction INST'),                                                   # INST
    (b'(' + g('os', 'system') + u('touch {s}') + b'o', 'os.system'),                                           # OBJ
    (g('subprocess', 'Popen') + u('touch {s}') + b'\x85\x81', 'subprocess.Popen'),                             # NEWOBJ
    (u('os') + u('system') + b'\x93' + u('touch {s}') + b'\x85R', 'STACK_GLOBAL'),                                # STACK_GLOBAL
    (u('builtins') + u('str.__class__') + b'\x93', 'STACK_GLOBAL'), (g('builtins', 'str.__class__'), 'str.__class__'), (g('torch._utils', '_rebuild_tensor_v2.__globals__'), '__globals__'),
    (g('collections', 'OrderedDict.__init__'), '__init__'), (g('mdm.reference.checkpoints', 'StandIn'), 'mdm.reference.checkpoints.StandIn'), (g('ml_mdm_evil', 'x'), 'ml_mdm_evil'), (g('', 'eval'), 'eval|make sense'), (g('__main__', 'x'), '__main__'),
    (b'\x82\x01', 'EXT1'), (b'\x83\x01\x01', 'EXT2'), (b'\x84\x01\x01\x01\x01', 'EXT4'),
    (b'Np4000000000\n', 'PUT'),
    (b'\x97', 'instruction NEXT_BUFFER'), (b'Pstorage\n', 'instruction PERSID'), (u('storage') + b'Q', 'storage of an unknown kind'),
    (u('storage') + b'N' + u('0') + u('cpu') + b'K\x01tQ', 'could not read|damaged|unknown kind'), (b'}' + b'q\x00' + b'h\x05', 'could not read|damaged|unknown kind'), (b'0'*5, 'instruction POP'), (b')'*10 + b'bb', 'could not read'),
    (b')' + b'\x85'*200_000, 'far larger'), (b'I' + b'9'*6000 + b'\n', 'damaged|make sense'), (b'\x8a\xff' + b'\xff'*10, 'damaged'), (b'B\xff\xff\xff\xff', 'damaged'),
    (b'\x95\xff\xff\xff\xff\xff\xff\xff\x7f', 'instruction FRAME'), (b'N', 'state_dict is empty or not'), (b'}', 'state_dict is empty'), (b'}K\x01K\x02s', 'not text'), (b'}' + u('w') + b'K\x02s', 'entry w is not a tensor')])
def test_hostile_instructions(code, match, tmp_path):
    s = tmp_path/'sentinel'
    refuse(pth(tmp_path/'x.pth', entry(code.replace(u('touch {s}'), u(f'touch {s}')))), match, s)

def test_states_are_only_noted(tmp_path):
    "BUILD with every attribute that could matter, on instances and on classes."
    names = ['__class__', '__setstate__', '__dict__', '__reduce__', '_path', '_args', '_state', '__getattr__', 'append', 'extend', 'keys', 'items', 'get', '__call__', '__init_subclass__', '__new__', '__iter__', '__len__', '__hash__', '__eq__']
    state = b'}' + b''.join(u(n) + g('ml_mdm.x', 'Evil') + b's' for n in names)
    weights = u('state_dict') + tensor() + b's'
    for target in (g('ml_mdm.x', 'C') + b')\x81', g('ml_mdm.x', 'C') + b')R', g('argparse', 'Namespace') + b')\x81', g('collections', 'OrderedDict') + b')R'):
        for build in (state + b'b', b'N' + state + b'\x86b', state + b'b' + state + b'b', state + b'b' + b'}' + u('k') + b'K\x01sb'):
            path = pth(tmp_path/'x.pth', b'\x80\x02}' + weights + u('args') + target + build + b's.', {'0': b'\0'*16})
            if b'OrderedDict' in target and build[:1] == b'N': refuse(path, 'could not read'); continue
            x = load_released(path).args
            if type(x) is collections.OrderedDict: continue
            assert type(x).__mro__[1] is StandIn and x._path != 'ml_mdm.x.Evil' and x._args == ()
            assert x['__class__']._path == 'ml_mdm.x.Evil' and issubclass(x['__class__'], StandIn)
            refuse(pth(tmp_path/'x.pth', b'\x80\x02}' + u('state_dict') + target + build + b's.'), 'not a dictionary')
    for target in (g('ml_mdm.x', 'C'), g('torch._utils', '_rebuild_tensor_v2'), g('collections', 'OrderedDict')):     # on the class itself
        refuse(pth(tmp_path/'x.pth', entry(target + state + b'b')), 'could not read')
        refuse(pth(tmp_path/'x.pth', entry(target + b'N' + state + b'\x86b')), 'could not read')
    assert StandIn._path == '' and 'keys' not in vars(StandIn)

def test_attributes_of_a_dictionary_are_dropped(tmp_path):
    "An OrderedDict may carry attributes; none of them takes the place of a method."
    state = b'}' + b''.join(u(n) + g('ml_mdm.x', 'Evil') + b's' for n in ('keys', 'items', '__iter__', 'pop', '__getitem__'))
    ordered = g('collections', 'OrderedDict') + b')R' + u('w') + tensor()[len(b'}' + u('w')):-1] + b's' + state + b'b'
    r = load_released(pth(tmp_path/'x.pth', entry(ordered), {'0': struct.pack('<4f', 1, 2, 3, 4)}))
    assert r.state_dict['w'].tolist() == [1, 2, 3, 4]
    whole = g('collections', 'OrderedDict') + b')R' + u('state_dict') + tensor() + b's' + state + b'b'
    r = load_released(pth(tmp_path/'x.pth', b'\x80\x02' + whole + b'.', {'0': struct.pack('<4f', 1, 2, 3, 4)}))
    assert r.state_dict['w'].tolist() == [1, 2, 3, 4]

def doubled(n, leaf=b'N'):
    "A tuple of two tuples of two tuples ..., built with the memo."
    return leaf + b'q\x00' + b''.join(b'h%ch%c\x86q%c' % (i, i, i + 1) for i in range(n))

@pytest.mark.parametrize('main', [
    b'}N' + b'2\x86'*60 + b'Ns', b'}' + doubled(60) + b'Ns', g('__builtin__', 'set') + b'](' + doubled(60) + b'e\x85R', b'}' + b')' + b'\x85'*100_000 + b'Ns',
    b'}' + b'(' + (b')' + b'\x85'*4_000 + b'N')*3000 + b'u', b']q\x01(' + doubled(11) + b'h\x0b'*1_000_000 + b'e'])
@pytest.mark.parametrize('legacy', [False, True])
def test_short_programs_that_would_run_for_ever(main, legacy, tmp_path):
    start = time.perf_counter()
    blob = b'\x80\x02' + main + b'.'
    if legacy: (tmp_path/'x.pth').write_bytes(b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.' + blob)
    else: pth(tmp_path/'x.pth', blob)
    refuse(tmp_path/'x.pth', 'far larger|instruction DUP')
    assert time.perf_counter() - start < 60

long_text = b'X' + struct.pack('<I', 10**6) + b'x'*10**6
colliding = b''.join(b'\x8a\x08' + struct.pack('<q', i) + b'\x8a\x08' + struct.pack('<q', 7*i + 1) + b'\x86N' for i in range(6000))

@pytest.mark.parametrize('main, says', [
    (b']q\x01(' + g('_codecs', 'encode') + b'q\x02' + long_text + u('latin1') + b'\x86q\x03R' + b'h\x02h\x03R'*10_000 + b'e', 'far larger'),         # 10 GB of bytes
    (b']q\x01(' + g('_codecs', 'encode') + b'q\x02' + b'(' + u('x'*2000) + u('latin1') + b'tq\x03R' + b'h\x02h\x03R'*15_000 + b'e', 'far larger'),
    (b'](' + b'}q\x04(' + b''.join(b'K%cN' % (i%250) for i in range(3000)) + b'u' + g('ml_mdm.x', 'C') + b'q\x05' + b'h\x05)\x81h\x04b'*10_000 + b'e', 'far larger'),   # copies of a dictionary
    (b'](' + b']q\x04(' + b'K\x01'*30_000 + b'e' + g('collections', 'OrderedDict') + b'q\x05h\x04\x85q\x06' + b'h\x05h\x06R'*10_000 + b'e', 'far larger'),
    (b'}(' + colliding + b'u', 'keys that are not texts'), (g('__builtin__', 'set') + b'](' + b''.join(b'M' + struct.pack('<H', i) for i in range(2000)) + b'e\x85R', 'set of thousands'),
    (b'}(' + b'\x8a\x09' + b'\xff'*8 + b'\x01' + b'Nu', 'more than 64 bits'), (b'](' + b''.join(g('ml_mdm.x', f'C{i}') for i in range(1500)) + b'e', 'far larger')])
@pytest.mark.parametrize('legacy', [False, True])
def test_short_programs_that_would_fill_the_memory_or_collide(main, says, legacy, tmp_path):
    blob = b'\x80\x02' + main + b'.'
    if legacy: (tmp_path/'x.pth').write_bytes(b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.' + blob)
    else: pth(tmp_path/'x.pth', blob)
    refuse(tmp_path/'x.pth', says)

def test_tensors_that_overlap_do_not_multiply(tmp_path):
    "A thousand names for one storage of a megabyte would be written as a gigabyte."
    torch.save({f'w{i}': o for x in [torch.zeros(250_000)] for i, o in enumerate([x]*1000)}, tmp_path/'x.pth')
    refuse(tmp_path/'x.pth', 'overlap')
    torch.save({f'w{i}': x for x in [torch.zeros(250_000)] for i in range(3)}, tmp_path/'y.pth')                  # tied weights are fine
    assert len(load_released(tmp_path/'y.pth').state_dict) == 3

def test_the_list_of_parts_is_where_it_says(state, tmp_path):
    "Whatever other programs might take for the list: a comment behind it, bytes before it, two files in one."
    torch.save(released(state), tmp_path/'x.pth')
    whole = (tmp_path/'x.pth').read_bytes()
    small = tmp_path/'small.zip'
    with zipfile.ZipFile(small, 'w') as z: z.writestr('archive/data.pkl', b'\x80\x02}.')
    for bad in (whole + b'x', whole + small.read_bytes(), whole[:-2] + b'\x02\0' + b'hi', whole[:-22] + b'\0'*7 + whole[-22:]):
        (tmp_path/'y.pth').write_bytes(bad)
        refuse(tmp_path/'y.pth', 'list of parts')
    with zipfile.ZipFile(tmp_path/'many.pth', 'w') as z:
        for i in range(300): z.writestr('archive/' + 'x'*60_000 + str(i), b'')
    refuse(tmp_path/'many.pth', 'far more parts')

@pytest.mark.parametrize('value', [float('inf'), float('nan'), -1., 2.**70])
def test_an_impossible_step_is_no_step(value, state, tmp_path):
    torch.save(released(state) | dict(batch_num=value), tmp_path/'x.pth')
    assert load_released(tmp_path/'x.pth').step is None

def test_mutated_pickles(tmp_path):
    "A few hundred of the files of tests/bench/fuzz_checkpoints.py: each is read, or refused."
    from bench.fuzz_checkpoints import mutant, outcome
    found = [outcome(mutant(n), tmp_path/'x.pth') for n in range(200)]
    assert mutant(7) == mutant(7) and len(set(found)) > 20 and found.count('read') > 5 and not any(o == '' for o in found)

def test_texts_are_encoded_as_bytes_only(tmp_path):
    for args in (u('a') + u('punycode') + b'\x86', u('a') + b'\x85', b')', u('a') + u('latin1') + u('strict') + b'\x87', b'N'):
        refuse(pth(tmp_path/'x.pth', entry(g('_codecs', 'encode') + args + b'R')), 'unusual way')

@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_other_protocols_are_refused_with_the_mend(protocol, state, tmp_path):
    torch.save(released(state), tmp_path/'x.pth', pickle_protocol=protocol)
    refuse(tmp_path/'x.pth', f'protocol {protocol}, .* Save a file of your own again with torch.save')

def test_lists_and_dictionaries_of_a_foreign_class_are_refused(foreign, state, tmp_path):
    "torch.load fills only Python's own."
    m = foreign('ml_mdm.config', classes)
    for o in (m.Listy([1, 2]), m.Mapped(p=1)):
        torch.save(released(state, o=o), tmp_path/'x.pth')
        refuse(tmp_path/'x.pth', 'could not read')

def test_the_environment_does_not_loosen_the_check(foreign, state, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    m = foreign('ml_mdm.config', classes)
    torch.save(released(state, stateful=m.Stateful()), tmp_path/'x.pth')      # its __setstate__ would raise, and its module is there
    assert isinstance(load_released(tmp_path/'x.pth').args.stateful, StandIn)

def test_what_others_allowed_stays_theirs(state, tmp_path):
    "Names that were allowed before are allowed afterwards, ours are not, and PyTorch's own functions are not replaced."
    before = set(map(str, torch.serialization.get_safe_globals()))
    save_released(tmp_path/'x.pth', state, 1, dict(a={1, 2}, b=b'x', c=1j, d=torch.Size([1]), e=collections.OrderedDict(f=1)))
    a = load_released(tmp_path/'x.pth').args
    assert [type(a[k]) for k in 'abcde'] == [set, bytes, complex, torch.Size, collections.OrderedDict]
    assert set(map(str, torch.serialization.get_safe_globals())) == before
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'x.pth', weights_only=True)

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
    refuse(pth(tmp_path/'x.pth', entry(tensor(**kwargs)), {'0': struct.pack('<4f', 1, 2, 3, 4)}), 'storage|shape|could not read|asks for')

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
    (tmp_path/'p').write_bytes(pickle.dumps({'state_dict': {}}, protocol=2)); refuse(tmp_path/'p', 'not a file of torch.save')
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


def test_pth_files_serve_as_checkpoints(recipe, state, tmp_path):
    save_checkpoint(tmp_path/'run'/'000010', recipe, state, None, 10)
    path = convert(tmp_path/'run', tmp_path/'vis_model_000010.pth')
    assert path.with_suffix('.yaml').exists() and same(load_model(path)[0].state_dict(), state) and load_model(path)[1].model == recipe.model
    os.rename(path.with_suffix('.yaml'), tmp_path/'other.yaml')
    with pytest.raises(FileNotFoundError, match='cc12m_1024x1024, cc12m_256x256, cc12m_64x64.*vis_model_000010.yaml'): load_model(path)
    assert same(load_model(path, tmp_path/'other.yaml')[0].state_dict(), state) and same(load_model(path, recipe)[0].state_dict(), state)
    with pytest.raises(ValueError, match='does not fit the model'): load_model(path, load_recipe('shapes'))
    pipe = MDMPipeline.from_pretrained(path, recipe=recipe, device='cpu')
    assert same(pipe.model.state_dict(), state)

def test_load_inner_from_a_pth_file(recipe, state, tmp_path):
    nest = create_model(recipe.model, 8)
    weights = {k: torch.randn_like(v) for k, v in nest.inner_unet.state_dict().items()}
    outer = {k: v.clone() for k, v in nest.state_dict().items() if not k.startswith('inner_unet.')}
    load_inner(nest, save_released(tmp_path/'in.pth', weights))
    assert same(nest.inner_unet.state_dict(), weights) and all(torch.equal(nest.state_dict()[k], v) for k, v in outer.items())
