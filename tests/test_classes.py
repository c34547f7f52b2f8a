"Classes: names, shards, the encoder and its table, training, sampling, evaluation."
import io, json, random, tarfile, warnings
import numpy as np
import pytest, torch
from PIL import Image
from mdm.checkpoint import load_checkpoint, load_model
from mdm.cli.dataset import mdm_dataset
from mdm.cli.evaluate import mdm_evaluate
from mdm.cli.sample import mdm_sample
from mdm.cli.train import mdm_train
from mdm.data.classes import read_class_names, with_classes
from mdm.data.embeddings import create_encoder_for, embed_shards
from mdm.data.inspect import inspect_shards, split_shards
from mdm.data.loader import create_loader
from mdm.data.shapes import Shape, draw
from mdm.data.shards import write_folder
from mdm.data.stream import DataConfig
from mdm.evaluation.judges import judge_shapes
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.recipe import RecipeError, load_recipe, recipe_dict, save_recipe
from mdm.reference.checkpoints import convert
from mdm.text import TextConfig, create_text_encoder
from mdm.training.finetune import finetune_recipe, write_prior
from mdm.training.run import run_training
from mdm.training.resume import Checkpoints
from tiny_models import fit, same, small

torch.set_num_threads(1)
classes = ['text.encoder=classes', 'model.inner.text_proj_dim=16', 'train.preview_prompts=[]']
names, folders = ['blue cross', 'red circle', 'yellow bar'], ['blue_cross', 'red_circle', 'yellow_bar']

def picture(): 
    out = io.BytesIO()
    Image.new('RGB', (16, 16), (200, 40, 40)).save(out, 'PNG')
    return out.getvalue()

def write_tar(path, samples):
    with tarfile.open(path, 'w') as tar:
        for i, files in enumerate(samples):
            for ext, data in files.items():
                info = tarfile.TarInfo(f'{i:04d}.{ext}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)

@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    "Shards of a folder with a folder for each of three classes"
    folder, rng = tmp_path_factory.mktemp('classes'), random.Random(0)
    for name in names:
        (folder/'pictures'/name.replace(' ', '_')).mkdir(parents=True)
        for k in range(16): draw(Shape(*name.split(), 'large', 'centre', 'black'), 16, rng).save(folder/'pictures'/name.replace(' ', '_')/f'{k}.png')
    assert mdm_dataset(['folder', str(folder/'pictures'), str(folder/'shards'), '--classes']) == 0
    return str(folder/'shards'/'*.tar')

training = [*small, *classes, 'train.optimizer=muon', 'train.lr=8e-3', 'train.batch_size=16', 'train.steps=70', 'train.ema_decay=.9', 'train.preview_prompts=[red circle]', 'train.preview_every=70', 'sample.steps=8']

@pytest.fixture(scope='module')
def trained(shards, tmp_path_factory):
    "Output folder of a training on three classes"
    out = tmp_path_factory.mktemp('run')/'three'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run_training(load_recipe('shapes', [*training, f'data.files=[{shards}]', f'train.output={out}']))
    return out

# ---- shards

def test_a_class_that_cannot_be_used_is_skipped_and_counted(tmp_path):
    samples = [{'png': picture(), 'cls': o} for o in (b'0', b'1\n', b'dog', b'2', b'-1')] + [{'png': picture(), 'txt': b'a cat'}]
    config = DataConfig(files=[write_tar(tmp_path/'a.tar', samples)], image_size=16, workers=0)
    loader = create_loader(config, 2, train=False, classes=['cat, tabby', 'dog'])
    with pytest.warns(UserWarning, match='skipped 4'): captions = [c for b in loader for c in b[1]]
    assert captions == ['cat', 'dog']
    assert dict(loader.skipped) == {'class (.cls) that is not a number': 2, 'class (.cls) whose number has no name': 1, 'class (.cls) that is missing': 1}
    with pytest.warns(UserWarning, match='5 x caption that is missing'): assert [c for b in create_loader(config, 2, train=False) for c in b[1]] == ['a cat']
    found = inspect_shards(config.files)
    assert found.usable == 4 and sorted(c for _, c in found.shown) == ['a cat', 'class 0', 'class 1', 'class 2']

def test_a_folder_for_each_class(tmp_path):
    for name in ('b/hen', 'b/Great_White_Shark', 'b/goldfish, carp'): (tmp_path/name).mkdir(parents=True)
    for i, name in enumerate(['hen/1', 'hen/2', 'Great_White_Shark/deep', 'goldfish, carp/1', 'lost']): (tmp_path/'b'/f'{name}.png').write_bytes(picture() + bytes(i))
    assert mdm_dataset(['folder', str(tmp_path/'b'), str(tmp_path/'s'), '--classes']) == 0
    manifest = json.loads((tmp_path/'s'/'manifest.json').read_text())
    own = ['Great_White_Shark', 'goldfish, carp', 'hen']
    assert manifest['classes'] == own and manifest['skipped'] == {'picture that lies in no folder of a class': 1}
    config = DataConfig(files=[str(tmp_path/'s'/'*.tar')], image_size=16, workers=0)
    read = lambda files, **kwargs: sorted(c for b in create_loader(DataConfig(files=files, image_size=16, workers=0), 1, train=False, **kwargs) for c in b[1])
    assert read(config.files, classes=own) == ['Great White Shark', 'goldfish', 'hen', 'hen']
    assert read(config.files) == ['Great White Shark', 'goldfish, carp', 'hen', 'hen']               # captions, for a model of texts
    train, valid = split_shards(config.files, tmp_path/'split', percent=25)
    assert train['classes'] == valid['classes'] == own
    (tmp_path/'b'/'hen'/'3.png').write_bytes(picture() + b'new')
    assert write_folder(tmp_path/'b', tmp_path/'s', classes=True)['shards'].keys() == {'pictures-000000.tar', 'pictures-000001.tar'}
    (tmp_path/'b'/'cat').mkdir()
    (tmp_path/'b'/'cat'/'1.png').write_bytes(picture())
    with pytest.raises(FileExistsError, match='classes was'): write_folder(tmp_path/'b', tmp_path/'s', classes=True)  # numbers would move
    with pytest.raises(ValueError, match='expected at least two'): write_folder(tmp_path/'b'/'hen', tmp_path/'t', classes=True)

# ---- recipes

def test_names_come_from_manifest_file_or_imagenet(shards, tmp_path):
    load = lambda *o: load_recipe('shapes', [*classes, f'data.files=[{shards}]', *o])
    assert with_classes(load()).text.classes == folders
    file = tmp_path/'names.txt'
    file.write_text('\n'.join(f'n{i}' for i in range(3)))
    assert with_classes(load(f'text.classes={file}')).text.classes[2] == 'n2'
    file.write_text('\n'.join(names[::-1]))
    with pytest.raises(ValueError, match="'yellow bar' is class 0 in the recipe and class 2 in the shards"): with_classes(load(f'text.classes={file}'))
    with pytest.raises(ValueError, match='have 3 classes, and the recipe has 1,000'): with_classes(load('text.classes=imagenet'))
    with pytest.raises(FileNotFoundError, match='there is no file'): with_classes(load('text.classes=nowhere.txt'))
    assert len(read_class_names('imagenet')) == 1000
    recipe = load_recipe('shapes')
    assert with_classes(recipe) is recipe

def test_what_does_not_go_with_classes_is_refused(tmp_path):
    for changes, what in ((['text.encoder=classes'], 'model.inner.text_proj_dim'), ([*classes, 'data.embeddings=true'], 'data.embeddings'),
                          ([*classes, 'data.caption_template=a photo of {caption}'], 'data.caption_template'), ([*classes, 'text.classes=[cat]'], 'at least two'),
                          ([*classes, 'text.classes=[cat, Cat]'], 'both called'), (['text.classes=[cat, dog]'], 'unless text.encoder = classes')):
        with pytest.raises(RecipeError, match=what): load_recipe('shapes', changes)
    with pytest.raises(ValueError, match='trained with the model'): embed_shards(['x.tar'], tmp_path, TextConfig('classes', classes=['a', 'b']))

def test_names_survive_a_file(tmp_path):
    odd = ['yes', '1', 'null', 'goldfish, Carassius auratus', '${name}', "crow's nest", 'a: b', 'Zoë']
    recipe = load_recipe('shapes', classes)
    recipe.text.classes = odd
    assert load_recipe(save_recipe(recipe, tmp_path/'r.yaml')).text.classes == odd
    assert recipe_dict(load_recipe('shapes'))['text']['classes'] == []

# ---- the table

def test_a_class_is_a_row_of_a_table():
    recipe = load_recipe('shapes', [*small, *classes, 'text.classes=[hen, cat, dog]'])
    encoder = create_text_encoder(recipe.text)
    torch.manual_seed(0)
    model = create_model(recipe.model, encoder.dim)
    plain = create_model(load_recipe('shapes', [*small, 'model.inner.text_proj_dim=16']).model, 16)
    assert model.state_dict().keys() == plain.state_dict().keys()              # no new names
    layer = model.inner_unet.lm_proj
    emb, mask = encoder(['', 'CAT', 'hen'])
    assert torch.allclose(layer(emb)[:, 0], 2*layer.weight.T[[0, 2, 1]] + layer.bias) and mask.tolist() == [[1]]*3

def test_other_models_have_one_group_of_parameters(make_text):
    learn = make_text('train.optimizer=muon')
    learn.create_opt()
    assert len(learn.opt.opt.param_groups) == 1 and 'matrices' not in learn.opt.opt.param_groups[0]

@pytest.fixture
def make_text(shards, tmp_path):
    from mdm.data.loader import create_dls
    from mdm.training.learner import mdm_learner
    def f(*changes):
        recipe = with_classes(load_recipe('shapes', [*small, 'model.inner.text_proj_dim=16', f'data.files=[{shards}]', f'train.output={tmp_path/"run"}', *changes]))
        torch.manual_seed(0)
        return mdm_learner(create_dls(recipe.data, 4, seed=0, classes=recipe.text.classes), recipe)
    return f

# ---- training

def test_classes_are_learnt(trained):
    checkpoint = load_checkpoint(trained)
    assert checkpoint.recipe.text.classes == folders                           # the names are in the checkpoint
    pipe = MDMPipeline.from_pretrained(trained, device='cpu')
    wanted = [names[i % 3] for i in range(24)]
    drawn = pipe([o.upper().replace(' ', '_') for o in wanted], n=1, guidance=2., steps=8, batch_size=24)
    found = judge_shapes(torch.stack([torch.from_numpy(np.array(o)).permute(2, 0, 1) for o in drawn]))
    right = sum(o['colour'] == w.split()[0] for o, w in zip(found, wanted))
    assert right >= 18, f'{right} of 24, and chance gives 8'
    assert (trained/'previews'/'step_00000070.png').is_file()

def test_the_table_is_averaged_saved_and_trained_by_adamw(trained):
    checkpoint = load_checkpoint(trained)
    name = 'inner_unet.lm_proj.weight'
    raw, average = checkpoint.weights(raw=True)[name], checkpoint.weights()[name]
    assert raw.shape == average.shape == (16, 4) and not torch.equal(raw, average)
    optimizer = checkpoint.tensors('optimizer')
    assert any(k.endswith(f'{name}.square') for k in optimizer)                # AdamW's; Muon keeps a mean alone
    assert not any(k.endswith('inner_unet.temb_layer2.weight.square') for k in optimizer)

def test_a_training_goes_on_bit_for_bit(make_text, tmp_path):
    changes = 'text.encoder=classes', 'train.optimizer=muon', 'train.preview_prompts=[]', 'data.workers=0'
    whole, again = make_text(*changes), make_text(*changes)
    fit(whole, 4, Checkpoints(tmp_path, every=2))
    again.resume(load_checkpoint(tmp_path/'step_00000002'))
    with again.no_bar(), again.no_logging(): again.fit_steps(4)                # `fit` would set the seed anew
    assert same(whole.model.state_dict(), again.model.state_dict())

def test_the_same_command_finds_its_training(trained, shards, capsys):
    assert mdm_train(['shapes', '--data', shards, '--output', str(trained), *training]) == 0
    assert 'this training is finished' in capsys.readouterr().out

def test_adapters_and_students(trained, shards, tmp_path):
    out = tmp_path/'tuned'
    changes = 'finetune.rank=2', 'train.steps=1', 'train.preview_prompts=[]', f'train.output={out}'
    run_training(finetune_recipe(trained, changes, [shards]))
    model, recipe = load_model(out)
    assert recipe.text.classes == folders and len(MDMPipeline(model, recipe, device='cpu')('red circle', n=1, steps=1)) == 1
    run = ['--distill', str(trained), '--output', str(tmp_path/'student'), 'train.steps=1', 'train.preview_prompts=[]', 'distill.teacher_steps=2']
    assert mdm_train(run) == 0
    assert MDMPipeline.from_pretrained(tmp_path/'student', device='cpu').encoder.classes.labels == names
    manifest = write_prior(trained, ['red circle', 'yellow_bar'], tmp_path/'prior')
    config = DataConfig(files=[str(tmp_path/'prior'/'*.tar')], image_size=16, workers=0)
    assert manifest['classes'] == folders and [c for b in create_loader(config, 2, train=False, classes=names) for c in b[1]] == ['red circle', 'yellow bar']

# ---- use

def test_unknown_names_are_refused_with_the_nearest(trained, tmp_path, capsys):
    pipe = MDMPipeline.from_pretrained(trained, device='cpu')
    for bad in (['red circel'], ['red circle', 'red circel']):
        with pytest.raises(ValueError, match="no class called 'red circel'; did you mean 'red circle'"): pipe(bad, n=1)
    with pytest.raises(ValueError, match='did you mean'): pipe('red circle', negative_prompt='blue cros')
    assert mdm_sample([str(trained), 'red circle', 'yellow barr', '--output', str(tmp_path/'s')]) == 2
    assert "did you mean 'yellow bar'" in capsys.readouterr().err and not (tmp_path/'s').exists()
    assert mdm_sample([str(trained), 'RED_circle', '--n', '1', '--steps', '1', '--negative-prompt', 'blue cross', '--output', str(tmp_path/'s.png')]) == 0
    recipe = load_checkpoint(trained).recipe
    recipe.train.preview_prompts = ['a red circle']
    with pytest.raises(ValueError, match='train.preview_prompts: there is no class'): create_encoder_for(recipe)

def test_an_evaluation_draws_all_classes_in_turns(trained, shards, tmp_path):
    run = [str(trained), '--limit', '4', '--steps', '1', '--gallery', '0', '--output']
    assert mdm_evaluate([*run, str(tmp_path/'a')]) == 0
    results = json.loads((tmp_path/'a'/'results.json').read_text())
    assert results['captions'] == [*names, 'blue cross'] and 'accuracy.colour' in results['scores']
    assert mdm_evaluate([*run, str(tmp_path/'b'), '--data', shards, '--loss-pictures', '4', '--levels', '2']) == 0
    assert json.loads((tmp_path/'b'/'results.json').read_text())['loss']['resolutions']
    (tmp_path/'c.txt').write_text('red circle\npink cross\n')
    assert mdm_evaluate([*run, str(tmp_path/'c'), '--captions', str(tmp_path/'c.txt')]) == 2 and not (tmp_path/'c').exists()

def test_the_page_offers_the_classes(trained):
    from mdm.widgets.sampler import SamplerWidget
    w = SamplerWidget(trained)
    w.wait()
    field = w.examples.children[0]
    assert list(field.options) == names and w.style_.disabled and w.avoid.disabled and w.prompt.value == 'red circle'
    field.value = 'yellow bar'
    assert w.prompt.value == 'yellow bar'

def test_a_released_file_has_no_classes(trained, tmp_path):
    with pytest.raises(RecipeError, match='the reference knows no classes'): convert(trained, tmp_path/'x.pth')
    assert not (tmp_path/'x.pth').exists()

def test_imagenet_takes_a_step(capsys):
    tiny = ['model.channels=[8,8]', 'model.num_resnets=[1,1]', 'model.num_attention_layers=[0,1]', 'model.num_groups=8', 'model.text_proj_dim=16', 'train.batch_size=2']
    assert mdm_train(['imagenet_64', '--dry-run-steps', '1', *tiny]) == 0
    assert 'imagenet_64: ' in capsys.readouterr().out
    recipe = with_classes(load_recipe('imagenet_64'))
    with torch.device('meta'): model = create_model(recipe.model, create_text_encoder(recipe.text).dim)
    assert model.lm_proj.weight.shape == (1024, 1001)
