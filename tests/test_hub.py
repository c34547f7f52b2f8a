"Models of the Hugging Face Hub, tested against a server on this machine that speaks its interface."
import errno, json
from pathlib import Path
import numpy as np, pytest, torch
from hub_server import FakeHub
from mdm.checkpoint import find_adapter, find_checkpoint, find_model, load_model, load_state, save_checkpoint, verify_files
from mdm.pipeline import MDMPipeline
from mdm.utils.hub import _fetched, model_folder, pinned_name
from tiny_models import pipe                                       # noqa: F401

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
    for name in ('runs/none', 'nowhere.pth', 'a/b.pth', 'no/such/run', str(tmp_path/'none')):
        refused(FileNotFoundError, lambda: load_model(name), 'neither a checkpoint folder nor a file of weights')
    assert hub.log == [], 'a path is no reason to ask the Hub'

def test_private_models_and_tokens(hub, stored, monkeypatch):
    hub.put('me/secret', stored, private=True)
    hub.put('me/terms', stored, gated=True)
    hub.tokens['hf_good'] = False
    refused(FileNotFoundError, lambda: find_model('me/secret'), 'does not exist or is private', 'no token was sent', 'hf auth login', 'There is neither')
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

# ---- everything that takes a checkpoint takes a name of the Hub

@pytest.fixture(scope='module')
def adapter(pipe, tmp_path_factory):
    "The files of an adapter of me/tiny."
    pytest.importorskip('peft')
    from mdm.models.adapters import adapter_config, adapter_state, add_adapter, choose_layers
    from mdm.recipe import FinetuneConfig
    from copy import deepcopy
    from dataclasses import replace
    tuned, config = deepcopy(pipe.model), adapter_config(choose_layers(pipe.model), 2)
    add_adapter(tuned, config)
    tuned_recipe = replace(pipe.recipe, finetune=FinetuneConfig('hf://me/tiny', rank=2))
    torch.manual_seed(3)
    changed = {k: torch.randn_like(v)/2 for k, v in adapter_state(tuned).items()}
    folder = save_checkpoint(tmp_path_factory.mktemp('adapter')/'model', tuned_recipe, changed, step=5, adapter=config)
    return {p.name: p.read_bytes() for p in folder.iterdir()}

def test_adapters(hub, pipe, stored, adapter):
    hub.put('me/tiny', stored)
    hub.put('me/lora', adapter)
    hub.put('me/peft', {k: adapter[k] for k in ('adapter_config.json', 'adapter_model.safetensors')})
    plain = MDMPipeline.from_pretrained('me/tiny', device='cpu')
    once = draw(plain)
    whole = draw(MDMPipeline.from_pretrained('me/lora', device='cpu'))         # finds the model that it changes on the Hub, too
    for name in ('me/lora', 'me/peft'):
        assert np.abs(draw(plain.add_adapter(name)).astype(int) - whole).max() <= 1 and not np.array_equal(whole, once)
        assert np.array_equal(draw(plain.remove_adapters()), once)

def test_commands_take_names(hub, stored, adapter, tmp_path, capsys):
    from PIL import Image
    from mdm.cli.app import checkpoint_place, named_checkpoints
    from mdm.cli.sample import mdm_sample, read_adapter_wish
    from mdm.reference.checkpoints import convert
    from mdm.training.distill import named_recipe
    from mdm.widgets.parts import example_pictures
    from mdm.widgets.state import PipelineShelf
    commit = hub.put('me/tiny', {**stored, 'example_1.png': b'no picture'})
    lora = hub.put('me/lora', adapter)
    assert mdm_sample(['me/tiny', 'a red circle', '--n', '1', '--steps', '1', '--output', 'one.png', '--verify', '--adapter', 'me/lora:0.5',
                       '--guide', 'me/tiny']) == 0
    texts = Image.open('one.png').text                       # name the commits: the main branches may move on
    assert texts['checkpoint'] == texts['guide'] == f'hf://me/tiny@{commit}' and texts['adapter'] == f'hf://me/lora@{lora}:0.5'
    assert read_adapter_wish(texts['adapter']) == (f'hf://me/lora@{lora}', .5)
    assert mdm_sample(['me/none', 'a red circle', '--output', 'two.png']) == 2 and 'no model me/none' in capsys.readouterr().err
    pinned = f'hf://me/tiny@{commit}'
    assert named_recipe('me/tiny')[0] == pinned and checkpoint_place('me/tiny') == pinned and named_checkpoints(['me/tiny']) == {'tiny': pinned}
    hub.stop()                                               # all of what follows is in the cache
    assert PipelineShelf(pinned, device='cpu')(pinned).recipe.name == 'shapes' and example_pictures('me/tiny') == []
    with pytest.raises(ValueError, match='ends in .pth|end in .pth'): convert('me/tiny', tmp_path/'out')

def test_a_fine_tuning_starts_from_a_commit_of_the_hub(hub, stored):
    from mdm.training.finetune import finetune_recipe
    commit = hub.put('me/tiny', stored)
    made = finetune_recipe('me/tiny', overrides=['train.steps=2'], files=['new.tar'])
    hub.put('me/tiny', {'state.json': b'{}'})                # the main branch moves on
    assert made.finetune.checkpoint == f'hf://me/tiny@{commit}' and load_state(made.finetune.checkpoint)

# ---- sharing

card = dict(license='apache-2.0', prompts=['a red circle', 'a "blue" $cross'], pictures=3, trained_on='Shapes.')

def test_push_and_back(hub, pipe):
    hub.tokens['hf_write'] = True
    page = pipe.push_to_hub('me/new', token='hf_write', message='first', private=True, **card)
    assert page.startswith(f'{hub.url}/me/new/commit/') and hub.repos['me/new'].private and hub.repos['me/new'].messages[-1] == 'first'
    assert hub.objects, 'weights go up as large files'
    again = MDMPipeline.from_pretrained('me/new', device='cpu', token='hf_write')
    assert np.array_equal(draw(again), draw(pipe)) and again.recipe.model == pipe.recipe.model
    _, files = hub.repos['me/new'].files('main')
    assert {'model.safetensors', 'recipe.yaml', 'state.json', 'README.md', 'LICENSE', 'samples.png', 'example_3.png'} <= files.keys()
    assert b"from_pretrained('me/new')" in files['README.md'] and b'Apache' not in files['LICENSE'] and b'apache-2.0' in files['LICENSE']
    from mdm.widgets.parts import example_pictures
    assert [o[1:] for o in example_pictures('me/new')] == [('a red circle', 0), ('a "blue" $cross', 1), ('a red circle', 2)]

def test_a_push_replaces_what_was_there(hub, pipe, adapter):
    hub.tokens['hf_write'] = True
    hub.put('me/old', {**adapter, 'notes.md': b'keep', 'example_9.png': b''})
    before = len(hub.repos['me/old'].messages)
    pipe.push_to_hub('me/old', token='hf_write', **card)
    _, files = hub.repos['me/old'].files('main')
    assert len(hub.repos['me/old'].messages) == before + 1, 'one commit'
    assert 'notes.md' in files and not {'adapter_config.json', 'adapter_model.safetensors', 'example_9.png'} & files.keys()
    assert load_model(find_model('me/old'))
    pipe.push_to_hub('me/old', token='hf_write', revision='v2', half=True, pictures=0)
    pages = pipe.push_to_hub('me/old', token='hf_write', create_pr=True, pictures=0, about='Better.')
    assert pages.endswith('/discussions/1') and b'Better.' in hub.repos['me/old'].files('refs/pr/1')[1]['README.md']
    small, large = (len(hub.repos['me/old'].files(o)[1]['model.safetensors']) for o in ('v2', 'main'))
    assert small < .6*large and b'Better.' not in hub.repos['me/old'].files('main')[1]['README.md']

def test_a_push_that_is_refused(hub, pipe, monkeypatch):
    from huggingface_hub import constants
    hub.tokens |= {'hf_read': False, 'hf_write': True}
    push = lambda **kwargs: pipe.push_to_hub('me/new', pictures=0, **kwargs)
    refused(PermissionError, lambda: push(), 'writing to me/new', 'no token was sent')
    text = refused(PermissionError, lambda: push(token='hf_read'), 'does not allow writing to me/new', 'given as an argument')
    assert 'hf_read' not in text
    hub.put('me/new', {})
    refused(PermissionError, lambda: push(token='hf_write', private=True), 'already and public')
    assert hub.repos['me/new'].files('main')[1] == {}
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    refused(FileNotFoundError, lambda: push(token='hf_write'), 'HF_HUB_OFFLINE is set for writing to me/new')

def test_nothing_private_is_shared(pipe, tmp_path):
    from copy import copy
    from dataclasses import replace
    from mdm.recipe import DistillConfig, FinetuneConfig, load_recipe
    from mdm.share.card import public_recipe, write_shared
    mine = copy(pipe)
    r = pipe.recipe
    mine.recipe = replace(r, data=replace(r.data, files=['/disk/me/a.tar'], cache='/disk/me/c'), model=replace(r.model, inner_from='/disk/me/64'),
        train=replace(r.train, output='/disk/me/runs', loggers=['wandb']), finetune=FinetuneConfig('/disk/me/start', rank=4))
    folder = write_shared(mine, tmp_path/'shared', pictures=0)
    for p in folder.iterdir(): assert b'/disk' not in p.read_bytes(), p
    assert load_recipe(folder/'recipe.yaml').finetune is None, 'the adapter is part of the weights'
    assert load_recipe(folder/'recipe.yaml').model.inner_from == '64', 'whoever loads it may let the outer network join late'
    assert 'no licence' in (folder/'README.md').read_text() and MDMPipeline.from_pretrained(folder, device='cpu')
    here = tmp_path/'secret'/'inner'                                                    # a folder that exists
    here.mkdir(parents=True)
    mine.recipe = replace(r, model=replace(r.model, inner_from=str(here)), distill=DistillConfig(str(here)))
    found = public_recipe(mine.recipe)
    assert (found.model.inner_from, found.distill.teacher) == ('inner', 'inner')
    assert public_recipe(replace(r, model=replace(r.model, inner_from='me/inner'))).model.inner_from == 'me/inner'      # a model of the Hub
    with pytest.raises(ValueError, match='others cannot load'): public_recipe(replace(r, finetune=FinetuneConfig(str(here), rank=4)), adapter=True)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('mine')
    refused(FileExistsError, lambda: pipe.save_pretrained(tmp_path/'mine', pictures=0), 'choose another folder')

def test_figures_are_of_the_weights_that_are_shared(pipe, tmp_path):
    from mdm.evaluation.runs import fingerprint
    results = dict(format=1, captions=['a']*1200, warnings=['few pictures'], scores={'accuracy.all': dict(value=.5, se=.01, n=1200)},
        settings=dict(weights=fingerprint(pipe.model), steps=9, solver='unipc', guidance=3.))
    (tmp_path/'results.json').write_text(json.dumps(results))
    text = (pipe.save_pretrained(tmp_path/'shared', figures=[str(tmp_path)], pictures=0)/'README.md').read_text()
    for words in ('50.0', '9 steps of unipc, guidance 3, 1,200 captions', 'few pictures'): assert words in text, text
    results['settings']['weights'] = 'other'
    (tmp_path/'results.json').write_text(json.dumps(results))
    refused(ValueError, lambda: pipe.save_pretrained(tmp_path/'again', figures=[str(tmp_path)], pictures=0), 'figures of other weights')
    assert not (tmp_path/'again').exists()

def test_convert_writes_and_pushes_a_card(hub, stored, adapter, tmp_path, capsys, monkeypatch):
    import yaml
    from mdm.cli.convert import mdm_convert
    hub.tokens['hf_write'] = True
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    hub.put('me/tiny', stored)
    for name, files in (('tiny', stored), ('lora', adapter)):
        (tmp_path/'runs'/name).mkdir(parents=True)
        for k, v in files.items(): (tmp_path/'runs'/name/k).write_bytes(v)
    assert mdm_convert(['runs/tiny', 'shared', '--card', '--license', 'CC-BY-4.0', '--datasets', 'me/shapes', '--prompts', 'a red circle', '--pictures', '1']) == 0
    head = yaml.safe_load((tmp_path/'shared'/'README.md').read_text().split('---\n')[1])
    assert head['license'] == 'cc-by-4.0' and head['datasets'] == ['me/shapes'] and head['pipeline_tag'] == 'text-to-image' and head['library_name'] == 'mdm'
    assert json.loads((tmp_path/'shared'/'state.json').read_text())['step'] == 7
    capsys.readouterr()
    assert mdm_convert(['runs/lora', 'shared_lora', '--push', 'me/made', '--pictures', '0', '--message', 'an adapter']) == 0
    assert f'{hub.url}/me/made/commit/' in capsys.readouterr().out
    _, files = hub.repos['me/made'].files('main')
    assert files['adapter_model.safetensors'] == adapter['adapter_model.safetensors'] and 'model.safetensors' not in files
    assert b'base_model: me/tiny' in files['README.md'] and b"add_adapter('me/made')" in files['README.md']
    assert np.array_equal(draw(MDMPipeline.from_pretrained('me/made', device='cpu')), draw(MDMPipeline.from_pretrained('runs/lora', device='cpu')))
    assert mdm_convert(['runs/tiny', 'shared', '--card']) == 2 and 'exists already' in capsys.readouterr().err
    assert mdm_convert(['runs/tiny', 'x', '--card', '--datasets', 'none', '--pictures', '0']) == 2 and 'owner/name' in capsys.readouterr().err
    assert not (tmp_path/'x').exists()
