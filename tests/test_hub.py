"Models of the Hugging Face Hub, tested against a server on this machine that speaks its interface."
import errno, json, os
from pathlib import Path
import numpy as np, pytest, torch
from hub_server import FakeHub
from mdm.checkpoint import find_adapter, find_checkpoint, find_model, load_model, load_state, save_checkpoint, verify_files
from mdm.pipeline import MDMPipeline
from mdm.utils.hub import _fetched, model_folder, pinned_name
from tiny_models import model, pipe, recipe, state                                       # noqa: F401

@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A Hub without models, which this process asks in place of the real one; its cache is empty."
    from huggingface_hub import constants
    server = FakeHub()
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', server.url + '/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'cache'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path/'no-token'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    monkeypatch.delenv('HF_TOKEN', raising=False)
    monkeypatch.chdir(tmp_path)
    _fetched.clear()
    yield server
    server.stop()
    _fetched.clear()

@pytest.fixture(scope='module')
def stored(pipe, tmp_path_factory):
    "The files of a small checkpoint by name."
    folder = save_checkpoint(tmp_path_factory.mktemp('stored')/'model', pipe.recipe, pipe.model.state_dict(), step=7)
    return {p.name: p.read_bytes() for p in folder.iterdir()}

def draw(p): return np.asarray(p('a red circle', n=1, steps=2)[0])

def refused(kind, f, *words):
    with pytest.raises(kind) as e: f()
    for o in words: assert o in str(e.value), str(e.value)
    return str(e.value)

# ---- reading

def test_a_name_becomes_a_pipeline(hub, pipe, stored):
    hub.put('me/tiny', {**stored, 'README.md': b'---\n---\n', 'big.pth': b'evil', 'unet/model.safetensors': b'another format', 'loose.safetensors': b'not of this model'})
    loaded = MDMPipeline.from_pretrained('me/tiny', device='cpu')
    assert np.array_equal(draw(loaded), draw(pipe))
    there = {p.relative_to(loaded.source).as_posix() for p in loaded.source.rglob('*') if p.is_file()}
    assert there == {*stored, 'README.md'}, 'only the files of the checkpoint are downloaded'
    before = len(hub.log)                                    # what looks at the model again asks nobody
    assert find_checkpoint('me/tiny') == loaded.source and load_state(Path('me/tiny')).keys() == pipe.model.state_dict().keys()
    verify_files('hf://me/tiny')
    assert len(hub.log) == before

def test_revisions(hub, stored, monkeypatch):
    old, new = ({**stored, 'state.json': stored['state.json'].replace(b'"step": 7', f'"step": {k}'.encode())} for k in (8, 9))
    first, _ = hub.put('me/tiny', old), hub.put('me/tiny', new)
    hub.put('me/tiny', stored, 'v1')
    step = lambda path, **kwargs: json.loads((model_folder(path, anew=True, **kwargs)/'state.json').read_text())['step']
    assert [step('me/tiny'), step('me/tiny@v1'), step('me/tiny', revision='v1'), step(f'me/tiny@{first}'), step('hf://me/tiny@v1')] == [9, 7, 7, 8, 7]
    refused(FileNotFoundError, lambda: find_model('me/tiny@v2'), 'me/tiny has no branch, tag or commit v2', '/me/tiny')
    refused(ValueError, lambda: find_model('me/tiny@v1', revision='v2'), 'was given too')
    pinned = pinned_name(model_folder('me/tiny'))
    hub.put('me/tiny', old)
    assert step(pinned) == 9 and step('me/tiny') == 8, 'a commit stays, the main branch moves'
    hub.stop()                                               # a commit that is in the cache needs no network
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert step(pinned) == 9

def test_what_is_here_comes_first(hub, stored, tmp_path):
    hub.put('me/tiny', {'state.json': b'{}'})
    for name, data in stored.items():
        (tmp_path/'me'/'tiny').mkdir(parents=True, exist_ok=True)
        (tmp_path/'me'/'tiny'/name).write_bytes(data)
    assert find_model('me/tiny') == Path('me/tiny') and find_model('shapes').parent.name == 'bundled'
    refused(ValueError, lambda: MDMPipeline.from_pretrained('me/tiny', revision='v1'), 'on this machine')
    (tmp_path/'runs').mkdir()
    for name in ('runs/none', 'nowhere.pth', 'a/b.pth', 'no/such/run', '/tmp/no-such'):
        refused(FileNotFoundError, lambda: load_model(name), 'neither a checkpoint folder nor a file of weights')
    assert hub.log == [], 'a path is no reason to ask the Hub'

def test_private_models_and_tokens(hub, stored, monkeypatch):
    hub.put('me/secret', stored, private=True)
    hub.put('me/terms', stored, gated=True)
    hub.tokens['hf_good'] = False
    text = refused(FileNotFoundError, lambda: find_model('me/secret'), 'does not exist or is private', 'no token was sent', 'hf auth login', 'There is neither')
    assert find_model('me/secret', token='hf_good').is_dir()
    _fetched.clear()
    text = refused(PermissionError, lambda: find_model('me/other', token='hf_wrong'), 'given as an argument')
    assert 'hf_wrong' not in text
    refused(PermissionError, lambda: find_model('me/terms'), 'consent to its terms', 'me/terms')
    monkeypatch.setenv('HF_TOKEN', 'hf_good')
    refused(FileNotFoundError, lambda: find_model('me/nothing'), 'the variable HF_TOKEN was sent')
    assert MDMPipeline.from_pretrained('me/secret', device='cpu').recipe.name == 'shapes'

def test_only_safetensors_come_from_the_hub(hub, stored):
    hub.put('me/pickle', {'vis_model.pth': b'evil', 'recipe.yaml': b''})
    hub.put('me/lora', {'adapter_config.json': b'{}', 'adapter_model.bin': b'evil'})
    hub.put('me/other', {'config.json': b'{}', 'model.safetensors': b'1234'})
    hub.put('me/empty', {})
    lying = json.loads(stored['state.json'])
    lying['files'] = {'../../model.safetensors': 1, 'code.pth': 4, 'model.safetensors': lying['files']['model.safetensors']}
    hub.put('me/lying', {**stored, 'state.json': json.dumps(lying).encode(), 'code.pth': b'evil'})
    refused(ValueError, lambda: find_model('me/pickle'), 'as pickles (vis_model.pth)', 'only safetensors', 'mdm_convert')
    refused(ValueError, lambda: find_adapter('me/lora'), 'as pickles (adapter_model.bin)')
    refused(ValueError, lambda: find_model('me/other'), 'neither a state.json', 'config.json')
    refused(ValueError, lambda: find_model('me/empty'), 'it is empty')
    refused(ValueError, lambda: find_checkpoint('me/lying'), 'cut short')
    files = [path for method, path in hub.log if '/resolve/' in path]
    assert not [o for o in files if o.endswith(('.pth', '.bin')) or '..' in o or 'me/other' in o], files

def test_without_a_network(hub, stored, tmp_path, monkeypatch):
    from huggingface_hub import constants
    hub.put('me/tiny', stored)
    assert find_model('me/tiny').is_dir()
    hub.put('me/half', stored)
    hub.fail['GET', 'half/resolve'] = 400                    # the small files never arrive
    with pytest.raises(OSError, match='me/half'): find_model('me/half')
    hub.stop()
    assert find_model('me/tiny', anew=True).is_dir(), 'the copy in the cache'
    refused(FileNotFoundError, lambda: find_model('me/new'), 'cannot be reached', 'neither a checkpoint folder', str(tmp_path/'cache'))
    refused(FileNotFoundError, lambda: find_model('me/new', local_files_only=True), 'local_files_only is set')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert find_model('me/tiny', anew=True).is_dir()
    for name in ('me/new', 'me/half', 'me/tiny@v3'): refused(FileNotFoundError, lambda: find_model(name), 'HF_HUB_OFFLINE is set')

def test_a_full_disk_and_a_broken_server(hub, stored, monkeypatch):
    import huggingface_hub
    from mdm.cli.command import explain_error
    hub.put('me/tiny', stored)
    hub.fail['GET', '/api/models/me/tiny'] = 418
    refused(FileNotFoundError, lambda: find_model('me/tiny'), 'me/tiny')
    hub.fail.clear()
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', full)
    with pytest.raises(OSError) as e: find_model('me/tiny')
    assert e.value.errno == errno.ENOSPC and 'the disk is full' in explain_error(e.value) and 'HF_HOME' in str(e.value)
