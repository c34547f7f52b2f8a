"The edges of `mdm.checkpoint`: damaged folders, and crashes in the middle. Files of other programs are in test_reference."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from mdm.checkpoint import checkpoint_formats, find_checkpoint, load_checkpoint, load_inner, load_model, load_state, load_weights, save_checkpoint, text_width, verify_files, write_safetensors
from mdm.utils.files import atomic_folder, bundled, readable
from mdm.models.nested_unet import create_model
from mdm.recipe import load_recipe, save_recipe
from tiny_models import model, recipe, same, state, tiny

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
from mdm.utils.files import atomic_folder
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

# ---- models

def test_load_model_from_everything(recipe, state, tmp_path):
    raw = {k: v + 1 for k, v in state.items()}
    save_checkpoint(tmp_path/'run'/'000010', recipe, state, raw, 10)
    for path in (tmp_path/'run', tmp_path/'run'/'000010'):
        model, r = load_model(path)
        assert same(model.state_dict(), state) and r == recipe and not model.training
    assert same(load_model(tmp_path/'run', raw=True)[0].state_dict(), raw)
    with pytest.raises(FileNotFoundError, match='neither a checkpoint folder nor'): load_model(tmp_path/'nope')

def test_files_of_other_programs(recipe, state, tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint_formats, '.weights', load_file)
    path = tmp_path/'a.weights'
    write_safetensors(path, state)
    assert same(load_state(path), state) and same(load_model(path, recipe)[0].state_dict(), state)
    with pytest.raises(FileNotFoundError, match='shapes, or a YAML file .one called a.yaml'): load_model(path)
    save_recipe(recipe, tmp_path/'a.yaml')
    assert load_model(path)[1] == recipe
    with pytest.raises(ValueError, match='does not fit the model'): load_model(path, 'shapes')
    (tmp_path/'notes.txt').write_text('x')
    with pytest.raises(ValueError, match='expected a name that ends in .*weights'): load_state(tmp_path/'notes.txt')
    with pytest.raises(FileNotFoundError, match='neither a checkpoint folder nor'): load_state(tmp_path/'none.weights')

core_alone = """
import sys, mdm.recipe, mdm.checkpoint
mdm.recipe.load_recipe('shapes')
assert not [m for m in sys.modules if m.startswith('mdm.reference')], 'the core imports it'
from mdm.recipe import find_format
assert find_format({'unet_config': {}}) is not None
try: mdm.checkpoint.load_state(sys.argv[1])
except ValueError as e: assert 'was not loaded: it is empty' in str(e), e
"""

def test_formats_are_found_when_they_are_needed(tmp_path):
    "recipe and checkpoint import no format; a file that needs one brings it."
    (tmp_path/'x.pth').write_bytes(b'')
    subprocess.run([sys.executable, '-c', core_alone, str(tmp_path/'x.pth')], check=True)

def test_load_inner(recipe, model, state, tmp_path):
    inner = load_recipe('shapes', tiny); inner.model = recipe.model.inner
    weights = {k: torch.randn_like(v) for k, v in create_model(inner.model, 8).state_dict().items()}
    save_checkpoint(tmp_path/'in', inner, weights, None, 1)
    for path in (tmp_path/'in',):
        nest = create_model(recipe.model, 8)
        outer = {k: v.clone() for k, v in nest.state_dict().items() if not k.startswith('inner_unet.')}
        load_inner(nest, path)
        assert same(nest.inner_unet.state_dict(), weights) and all(torch.equal(nest.state_dict()[k], v) for k, v in outer.items())
    save_checkpoint(tmp_path/'whole', recipe, state, None, 1)
    with pytest.raises(ValueError, match='does not fit'): load_inner(nest, tmp_path/'whole')

# ---- damage and misspelt names

@pytest.mark.parametrize('where', [.3, .6, .999])
@pytest.mark.parametrize('name', ['model', 'raw'])
def test_one_flipped_bit_is_noticed(name, where, recipe, state, tmp_path):
    folder = save_checkpoint(tmp_path/'a', recipe, state, state)
    load_checkpoint(folder).tensors(name); verify_files(tmp_path)
    data = bytearray((folder/f'{name}.safetensors').read_bytes()); data[int(len(data)*where)] ^= 4
    (folder/f'{name}.safetensors').write_bytes(data)
    for read in (lambda: load_checkpoint(folder).tensors(name), lambda: verify_files(tmp_path)):
        with pytest.raises(ValueError, match='checksum'): read()

def test_checkpoints_of_earlier_versions_have_no_checksums(recipe, state, tmp_path):
    folder = save_checkpoint(tmp_path/'a', recipe, state)
    about = json.loads((folder/'state.json').read_text()); del about['checksums']
    (folder/'state.json').write_text(json.dumps(about))
    verify_files(folder)
    assert same(load_checkpoint(folder).weights(), state)

def test_a_deeply_nested_state_is_damage(recipe, state, tmp_path):
    folder = save_checkpoint(tmp_path/'a', recipe, state)
    (folder/'state.json').write_text('['*100_000)
    with pytest.raises(ValueError, match='state.json is damaged'): load_checkpoint(folder)

def test_a_flipped_bit_in_a_pth_file_is_noticed(state, tmp_path):
    torch.save(dict(state_dict=state), tmp_path/'x.pth'); verify_files(tmp_path/'x.pth')
    data = bytearray((tmp_path/'x.pth').read_bytes()); data[len(data)//2] ^= 1
    (tmp_path/'x.pth').write_bytes(data)
    with pytest.raises(ValueError, match='x.pth is damaged'): verify_files(tmp_path/'x.pth')

def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(recipe, state, tmp_path):
    from mdm.training.resume import newest_checkpoint
    for step in (10, 20): save_checkpoint(tmp_path/f'step_{step:08d}', recipe, state, step=step, more=dict(optimizer=state))
    damaged = tmp_path/'step_00000020'/'optimizer.safetensors'
    data = bytearray(damaged.read_bytes()); data[-1] ^= 128; damaged.write_bytes(data)
    with pytest.warns(UserWarning, match='optimizer.safetensors is damaged'): assert newest_checkpoint(tmp_path).step == 10

@pytest.mark.parametrize('path, meant', [('run/flowers', 'runs/flowers'), ('runs/flower', 'runs/flowers'), ('runs/flowers/step_0000010', 'runs/flowers/step_00000010'), ('wieghts.pth', 'weights.pth'), ('shape', 'shapes'), ('quite/different', None), ('note.txt', None)])
def test_misspelt_checkpoints(path, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'runs'/'flowers'/'step_00000010').mkdir(parents=True)
    for name in ('weights.pth', 'notes.txt'): (tmp_path/name).write_text('x')
    for full in (path, *([tmp_path/path] if path != 'shape' else [])):
        with pytest.raises(FileNotFoundError) as e: load_model(full)
        assert 'did you mean' in str(e.value) and f'{meant}?' in str(e.value) if meant else 'did you mean' not in str(e.value)
