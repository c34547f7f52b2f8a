"Distances between sets of pictures, the networks behind them, and the judge that picks captions."
import json, shutil
import numpy as np, pytest, torch
from PIL import Image
from torch import Tensor, nn
from mdm.cli.evaluate import mdm_evaluate
from mdm.data.shapes import all_shapes, caption, draw, write_shapes
from mdm.data.shards import add_sample
from mdm.data.captions import caption_files
from mdm.evaluation import evaluate as evaluation
from mdm.evaluation.distances import *
from mdm.evaluation.evaluate import EvaluateConfig, compare_runs, evaluate, reference_path
from mdm.evaluation.features import *
from mdm.evaluation.retrieval import *
from mdm.evaluation.retrieval import RetrievalConfig
from mdm.utils.files import bundled
from mdm.utils.pictures import pixel_tensors, png_bytes
from tiny_models import pipe

rng = np.random.default_rng(0)
def to_image(o): return Image.fromarray(o.permute(1, 2, 0).numpy())
def cloud(n, d=6, shift=0., scale=1., seed=0): return np.random.default_rng(seed).normal(size=(n, d))*scale + shift

# ---- distances

def test_frechet_of_known_gaussians():
    "Samples whose mean and covariance are exactly those wanted; the distance is then known."
    def exact(n, mean, cov, seed):
        x = cloud(n, len(mean), seed=seed); x -= x.mean(0)
        x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T @ np.linalg.cholesky(cov).T
        return torch.tensor(x + mean)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    a, b = (turn @ np.diag(np.square(s)) @ turn.T for s in ([1, 2, 3], [3, 1, 1.5]))
    found = frechet_distance(exact(50, [0, 0, 0], a, 1), exact(70, [1, -1, 2], b, 2))
    assert found == pytest.approx(6 + 4 + 1 + 2.25, rel=1e-6)

def test_warning_of_the_rank():
    few, enough = frechet_score(cloud(30, 40), cloud(30, 40, seed=1), name='FD-DINOv2'), frechet_score(cloud(60, 4), cloud(60, 4, seed=1))
    assert 'FD-DINOv2 of 30 drawn' in few['warning'] and 'no full rank' in few['warning'] and 'no full rank' not in enough['warning'] and 'biased' in enough['warning']
    with pytest.raises(ValueError, match='use the same network'): kid_score(cloud(30, 4), cloud(30, 5))
    with pytest.raises(ValueError, match='CMMD needs at least 20'): cmmd_score(cloud(19), cloud(30))

def test_kid_is_that_of_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance
    class Given(nn.Module):
        num_features = 6
        def forward(self, x): return x
    x, y = cloud(60), cloud(60, shift=.3, seed=1)
    metric = KernelInceptionDistance(Given(), subsets=1, subset_size=60, normalize=False)
    for o, real in ((x, True), (y, False)): metric.update(torch.tensor(o), real=real)
    assert kid_score(x, y)['value'] == pytest.approx(float(metric.compute()[0]), rel=1e-5)

def test_cmmd_by_hand():
    "As the paper writes it, pair by pair, and as its authors' program computes it."
    x, y = cloud(25), cloud(31, shift=.5, seed=1)
    found = cmmd_score(x, y)
    u, v = (o/np.linalg.norm(o, axis=1, keepdims=True) for o in (x, y))
    k = lambda a, b: np.exp(-((a - b)**2).sum()/(2*10**2))
    pairs = lambda o: np.mean([k(a, b) for i, a in enumerate(o) for j, b in enumerate(o) if i != j])
    cross = np.mean([k(a, b) for a in u for b in v])
    assert found['value'] == pytest.approx(1000*(pairs(u) + pairs(v) - 2*cross), rel=1e-6)
    every = lambda o: np.mean([k(a, b) for a in o for b in o])
    assert found['biased'] == pytest.approx(1000*(every(u) + every(v) - 2*cross), rel=1e-6) and found['biased'] > found['value']
    rest = lambda o, g: o[np.arange(len(o)) % 10 != g]
    assert found['leave_out'][3] == pytest.approx(1000*mmd(*(torch.tensor(rest(o, 3)) for o in (u, v)), gaussian_kernel)[0], rel=1e-6)

@pytest.mark.parametrize('score', [kid_score, cmmd_score])
def test_error_is_that_of_repetitions(score):
    found = [score(cloud(100, 4, seed=2*i), cloud(100, 4, .4, seed=2*i + 1)) for i in range(30)]
    assert np.mean([o['se'] for o in found]) == pytest.approx(np.std([o['value'] for o in found]), rel=.4)
    assert 'is unbiased, but uncertain' in found[0]['warning'] and score(cloud(1000, 4), cloud(1000, 4, 1., seed=1))['warning'] is None

def test_neighbours_by_hand():
    x, y = cloud(40, 3), cloud(33, 3, shift=.4, scale=.8, seed=1)
    found, d = neighbour_scores(x, y, chunk=7), lambda a, b: np.linalg.norm(a - b)
    radius = lambda o, k: [sorted(d(a, b) for b in o)[k] for a in o]
    r3, r5, s3 = radius(x, 3), radius(x, 5), radius(y, 3)
    assert found['precision']['values'] == [float(any(d(a, b) <= r for a, r in zip(x, r3))) for b in y]
    assert found['recall']['value'] == pytest.approx(np.mean([any(d(a, b) <= s for b, s in zip(y, s3)) for a in x]))
    assert found['density']['value'] == pytest.approx(np.mean([sum(d(a, b) <= r for a, r in zip(x, r5))/5 for b in y]))
    assert found['coverage']['value'] == pytest.approx(np.mean([any(d(a, b) <= r for b in y) for a, r in zip(x, r5)]))

# ---- extractors

class Net(nn.Module):
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 6, 5, 4)
    def forward(self, x: Tensor) -> Tensor: return self.conv(x.float()/128 - 1).relu().mean((2, 3))

@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    "Small random networks as files and folders: TorchScript, CLIP, DINOv2."
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
    base, small = tmp_path_factory.mktemp('networks'), dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    torch.jit.script(Net()).save(str(base/'net.pt'))
    CLIPModel(CLIPConfig(text_config=small, vision_config=dict(small, image_size=32, patch_size=16), projection_dim=12)).save_pretrained(base/'clip')
    Dinov2Model(Dinov2Config(**small, image_size=56, patch_size=56)).save_pretrained(base/'dinov2')
    return {o: str(base/o) for o in ('net.pt', 'clip', 'dinov2')}

def test_extractors_prepare_as_their_papers_do(networks):
    from transformers import CLIPModel, Dinov2Model
    pictures = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = torch.nn.functional.interpolate(pictures/255, size=(32, 32), mode='bicubic')
        mean, std = (torch.tensor(o).view(3, 1, 1) for o in ([.48145466, .4578275, .40821073], [.26862954, .26130258, .27577711]))
        wanted = CLIPModel.from_pretrained(networks['clip']).get_image_features(pixel_values=(x - mean)/std)
        assert torch.allclose(load_extractor(networks['clip'])(pictures), getattr(wanted, 'pooler_output', wanted), atol=1e-5)
        x = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1)/255 for p in (to_image(o).resize((224, 224), Image.Resampling.BICUBIC) for o in pictures)])
        mean, std = (torch.tensor(o).view(3, 1, 1) for o in ([.485, .456, .406], [.229, .224, .225]))
        wanted = Dinov2Model.from_pretrained(networks['dinov2'])(pixel_values=(x - mean)/std).pooler_output
        assert torch.allclose(load_extractor(networks['dinov2'])(pictures), wanted, atol=2e-2)      # Pillow rounds once more

def test_colours_of_the_folder(networks, tmp_path):
    shutil.copytree(networks['dinov2'], tmp_path/'net')
    (tmp_path/'net'/'preprocessor_config.json').write_text(json.dumps(dict(image_mean=[.5]*3, image_std=[.25]*3)))
    assert load_extractor(tmp_path/'net').preprocessing == dict(size=224, antialias=True, mean=[.5]*3, std=[.25]*3, output='class token')

def test_extractors_that_cannot_be_had(networks, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(OSError, match="'facebook/none' could not be loaded: it is no folder here.*HF_HUB_OFFLINE is set"): load_extractor('facebook/none')
    shutil.copytree(networks['dinov2'], tmp_path/'net')
    from safetensors.torch import load_file, save_file
    state = load_file(tmp_path/'net'/'model.safetensors')
    save_file(dict([*state.items()][2:]), tmp_path/'net'/'model.safetensors', dict(format='pt'))
    with pytest.raises(OSError, match='its weights lack 2 of the tensors'): load_extractor(tmp_path/'net')
    (tmp_path/'net'/'model.safetensors').unlink()
    with pytest.raises(OSError, match='config.json and model.safetensors'): load_extractor(tmp_path/'net')
    with pytest.raises(FileNotFoundError, match='there is no file .*config.json'): load_extractor(tmp_path)

# ---- an evaluation with them

@pytest.fixture(scope='module')
def shards(tmp_path_factory): return [str(p) for p in write_shapes(tmp_path_factory.mktemp('valid'), 24, 32, per_shard=10, held_out=True, plain=True)]

@pytest.fixture(scope='module')
def judge(shards, tmp_path_factory):
    "A judge that was trained for a moment."
    folder = tmp_path_factory.mktemp('judges')/'judge'
    train_retrieval(shards, folder, RetrievalConfig(size=16, width=8, layers=2, dim=16, steps=2, batch_size=8, word_dim=32), k=8)
    return str(folder)

@pytest.fixture(scope='module')
def whole(pipe, networks, shards, judge, tmp_path_factory):
    "All judges at once, in one process."
    base = tmp_path_factory.mktemp('whole')
    config = EvaluateConfig(**wishes(networks), retrieval=judge, reference=str(base/'kept'), loss_pictures=0, batch_size=10, name='run')
    return base, evaluate(pipe, base/'run', None, shards, config, pipe.config(steps=1))

def wishes(networks): return dict(fid=networks['net.pt'], kid=networks['net.pt'], prdc=networks['net.pt'], cmmd=networks['clip'], fd_dinov2=networks['dinov2'])

def test_every_judge(whole, networks):
    base, found = whole
    new = ['retrieval', 'fid', 'fd_dinov2', 'kid', 'cmmd', 'precision', 'recall', 'density', 'coverage']
    assert [k for k in found['scores'] if k in new] == new and json.dumps(found, allow_nan=False)
    assert found['judges']['cmmd']['source'] == networks['clip'] and found['judges']['cmmd']['preprocessing']['size'] == 32 and len(found['judges']['recall']['weights']) == 16
    assert f"clip ({found['judges']['cmmd']['weights'][:8]})" in (base/'run'/'gallery.html').read_text()
    assert sorted(o.name for o in (base/'kept').iterdir()) == ['clip.safetensors', 'dinov2.safetensors', 'net.pt.safetensors']
    assert [sum(k in w for w in found['warnings']) for k in ('FD-DINOv2 of', 'KID of', 'CMMD of', 'Precision, recall')] == [1]*4
    assert found['scores']['retrieval']['chance'] == 1/8 and len(found['scores']['retrieval']['values']) == 24

def test_real_features_are_computed_once(whole, pipe, networks, shards, judge, monkeypatch):
    "With the reference there, real pictures are not looked at, or need not be there; the figures are the same."
    base, found = whole
    looked = []
    monkeypatch.setattr(evaluation, 'read_pictures', lambda *args, **kwargs: looked.append(args))
    config = EvaluateConfig(**wishes(networks), reference=str(base/'kept'), loss_pictures=0, batch_size=10)
    for data in (shards, None):
        again = evaluate(pipe, base/f'run-{bool(data)}', found['captions'], data, config, pipe.config(steps=1))
        assert {k: o for k, o in again['scores'].items() if k != 'retrieval'} == {k: o for k, o in found['scores'].items() if k != 'retrieval'}
        assert again['files'] == found['files'] and not looked

def test_a_reference_of_something_else(whole, pipe, networks, shards, tmp_path):
    base, found = whole
    torch.manual_seed(1)
    torch.jit.script(Net()).save(str(tmp_path/'net.pt'))
    def attempt(data, source, **more): evaluate(pipe, tmp_path/'run', found['captions'], data, EvaluateConfig(fid=source, reference=str(base/'kept'), **more), pipe.config(steps=1))
    with pytest.raises(ValueError, match='reference: .*net.pt.safetensors holds features of something else .weights: '): attempt(shards, str(tmp_path/'net.pt'))
    with pytest.raises(ValueError, match='something else .files: '): attempt(shards[:1], networks['net.pt'])
    with pytest.raises(FileNotFoundError, match='name real pictures'): evaluate(pipe, tmp_path/'run', found['captions'], None, EvaluateConfig(fid=networks['net.pt'], reference=str(tmp_path)))
    reference_path(tmp_path, networks['net.pt']).write_bytes(b'nothing')
    with pytest.raises(ValueError, match='does not hold features'): evaluate(pipe, tmp_path/'run', found['captions'], None, EvaluateConfig(fid=networks['net.pt'], reference=str(tmp_path)))
    with pytest.raises(ValueError, match='KID, CMMD compares with real pictures'): evaluate(pipe, tmp_path/'run', found['captions'], None, EvaluateConfig(kid='a', cmmd='b'))
    assert not (tmp_path/'run').exists()

def test_two_processes_find_the_same(whole, pipe, networks, shards, judge, tmp_path, monkeypatch):
    base, found = whole
    config = EvaluateConfig(**wishes(networks), retrieval=judge, reference=str(tmp_path/'kept'), loss_pictures=0, batch_size=10, name='run')
    for rank in (1, 0):
        monkeypatch.setenv('RANK', str(rank)); monkeypatch.setenv('WORLD_SIZE', '2')
        both = evaluate(pipe, tmp_path/'run', None, shards, config, pipe.config(steps=1))
    assert both == found
    for o in (base/'kept').iterdir(): assert np.array_equal(read_reference(o)[0], read_reference(tmp_path/'kept'/o.name)[0])

def test_runs_are_compared(whole, pipe, networks, shards, judge, tmp_path):
    base, found = whole
    config = EvaluateConfig(**wishes(networks) | dict(cmmd=networks['dinov2']), retrieval=judge, loss_pictures=0, limit=20, batch_size=10, name='other')
    evaluate(pipe, tmp_path/'run', None, shards, config, pipe.config(steps=1))
    compared = compare_runs(base/'run', tmp_path/'run', tmp_path/'both')
    notes = '\n'.join(compared['notes'])
    assert 'CMMD is not compared: it was measured with different networks' in notes and 'FD-DINOv2 is not compared: it was measured on different numbers' in notes and 'recall is not compared' in notes
    assert compared['judges']['kid']['weights'] == found['judges']['kid']['weights'] and 'cmmd' not in compared['judges']
    assert compared['scores']['retrieval']['difference']['n'] == 20 and 'kid' in compared['scores']

def test_buckets_are_judged_on_squares(pipe, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe.recipe.data, 'buckets', ['32x32', '24x40'])
    found = evaluate(pipe, tmp_path/'run', ['a cat'], None, EvaluateConfig(), pipe.config(steps=1))
    assert 'draws squares' in found['warnings'][0]

# ---- which of 32 captions

def test_captions_of_a_picture_are_no_distractors():
    "A caption of the same picture, or of any picture that shares a caption with it, is never asked against the right one."
    concepts = [[f'thing {i}', f'object {i}', 'thing' if i < 5 else f'Item {i}'] for i in range(40)]
    pool = Distractors(concepts)
    for seed in range(50):
        drawn = pool.draw('object 3', 31, seed)
        assert len({*drawn}) == 31 and not {*drawn} & {'thing 3', 'object 3', 'thing'} and len({o.split()[-1] for o in drawn}) == 31
        assert not any(o in texts for o in pool.draw('thing', 31, seed) for texts in concepts[:5])
        assert len(pool.draw('Never Seen', 31, seed)) == 31 and 'thing 7' not in pool.draw('a drawing of thing 7', 31, seed)
    assert pool.draw('object 3', 31, 1) != pool.draw('object 3', 31, 2)
    with pytest.raises(ValueError, match='31 are needed'): Distractors(concepts[:31]).draw('object 3', 31, 0)

def test_the_loss_leaves_out_related_captions():
    p = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    related = torch.eye(4, dtype=torch.bool); related[0, 1] = related[1, 0] = True
    t = p[[0, 0, 2, 3]]                                      # pictures 0 and 1 have the same caption
    assert contrastive_loss(p, t, torch.tensor(20.), related) < contrastive_loss(p, t, torch.tensor(20.), torch.eye(4, dtype=torch.bool))

def test_a_judge_learns(tmp_path):
    "40 shapes, each rendered three times and each with two captions; the judge picks the right one of 32 for other renderings."
    import random, tarfile
    world = [o for o in all_shapes() if o.size == 'large' and o.position == 'centre'][::5][:40]
    def write(path, seeds):
        with tarfile.open(path, 'w') as tar:
            for i, o in enumerate(world):
                for s in seeds:
                    texts = {f'{o.colour} {o.shape} on {o.background}': 1, f'a {o.shape} that is {o.colour} before {o.background}': 1}
                    add_sample(tar, {'__key__': f'{i:03}-{s}', 'png': png_bytes(draw(o, 24, random.Random(f'{s} {i}'))), **caption_files(texts)})
        return [str(path)]
    assert len(world) == 40
    train, held = write(tmp_path/'train.tar', 'abc'), write(tmp_path/'held.tar', 'x')
    config = RetrievalConfig(size=24, width=16, layers=3, dim=48, steps=120, batch_size=40, word_dim=96)
    judge = train_retrieval(train, tmp_path/'judge', config, held)
    ceiling = judge.facts['ceiling']
    assert len(judge.distractors.concepts) == 40 and judge.facts['held'] == 'other shards' and ceiling['new_captions'] is None
    assert ceiling['all']['value'] > .7 and ceiling['all']['n'] == 40
    x, captions = read_captioned(held, 24)
    again = load_retrieval(tmp_path/'judge')
    wrong = picked_right(again, x.roll(7, 0), [o[0] for o in captions])
    assert again.facts == judge.facts and measure_retrieval(again, x, captions) == ceiling and np.mean(wrong) < .3

def test_a_folder_that_is_no_judge(judge, tmp_path):
    with pytest.raises(FileNotFoundError, match='no file .*retrieval.json'): load_retrieval(tmp_path)
    for name, content in (('retrieval.json', b'{'), ('retrieval.json', b'{"config": {"size": "x"}}'), ('retrieval.safetensors', b'nothing')):
        shutil.copytree(judge, tmp_path/'copy', dirs_exist_ok=True)
        (tmp_path/'copy'/name).write_bytes(content)
        with pytest.raises(ValueError, match='does not hold a judge'): load_retrieval(tmp_path/'copy')
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(FileExistsError, match='choose another folder'): train_retrieval([], tmp_path/'mine')

# ---- the command

def test_command_trains_a_judge(shards, tmp_path, capsys, monkeypatch):
    from mdm.evaluation import retrieval
    monkeypatch.setattr(retrieval, 'fit_retrieval', lambda judge, *args: judge.eval() and [0.])
    monkeypatch.setattr(retrieval, 'Distractors', type('Few', (Distractors,), dict(draw=lambda self, text, k, seed: ['another']*k)))
    assert mdm_evaluate(['--retrieval', str(tmp_path/'judge'), '--train-retrieval', *shards]) == 0
    assert 'a judge of 24 captions and 24 pictures' in capsys.readouterr().out and (tmp_path/'judge'/'retrieval.safetensors').exists()
    for args, said in ((['--train-retrieval', 'x.tar'], 'name it with --retrieval'), (['shapes', '--data', *shards, '--caption-key', 'short'], '--caption-key is for --train-retrieval'), (['shapes', '--captions', 'c.txt', '--kid', 'net.pt'], '--kid compares with real pictures'),
                       (['shapes', '--data', *shards, '--retrieval', str(tmp_path)], 'no file'), (['shapes', '--data', *shards, '--fd-dinov2', 'facebook/dinov2-large'], 'HF_HUB_OFFLINE')):
        assert mdm_evaluate([*args, '--output', str(tmp_path/'run')]) == 2 and said in capsys.readouterr().err

def test_the_judge_reads_captions_where_the_model_does(shards, tmp_path, capsys, monkeypatch):
    "Captions under a key of their own: named on the command line, or by the recipe of the model that is judged."
    import tarfile
    from mdm.evaluation import retrieval
    monkeypatch.setattr(retrieval, 'fit_retrieval', lambda judge, *args: judge.eval() and [0.])
    monkeypatch.setattr(retrieval, 'Distractors', type('Few', (Distractors,), dict(draw=lambda self, text, k, seed: ['another']*k)))
    with tarfile.open(tmp_path/'own.tar', 'w') as tar:
        for i, o in enumerate([*all_shapes()][:6]):
            add_sample(tar, {'__key__': str(i), 'png': png_bytes(draw(o, 32)), 'json': json.dumps({'short': caption(o), 'alt': 'the same'}).encode()})
    own = str(tmp_path/'own.tar')
    train = ['--retrieval', str(tmp_path/'judge'), '--train-retrieval', own]
    assert mdm_evaluate(train) == 2 and 'no captioned picture' in capsys.readouterr().err
    assert mdm_evaluate([*train, '--caption-key', 'short']) == 0 and 'a judge of 6 captions' in capsys.readouterr().out
    shutil.rmtree(tmp_path/'judge')
    shutil.copytree(bundled/'shapes_fast', tmp_path/'model')
    recipe = tmp_path/'model'/'recipe.yaml'
    recipe.write_text(recipe.read_text().replace('caption_key: null', 'caption_key: short'))
    assert mdm_evaluate([str(tmp_path/'model'), *train, '--data', own, '--limit', '2', '--loss-pictures', '0', '--output', str(tmp_path/'run')]) == 0
    assert 'a judge of 6 captions' in capsys.readouterr().out and len(json.loads((tmp_path/'run'/'results.json').read_text())['captions']) == 2

def test_a_judge_is_checked_before_it_is_trained(shards, tmp_path, monkeypatch):
    from mdm.evaluation import retrieval
    def trains(*args): raise AssertionError('the training began')
    monkeypatch.setattr(retrieval, 'fit_retrieval', trains)
    config = RetrievalConfig(size=16, width=8, layers=2, dim=16, steps=2, batch_size=8, word_dim=32)
    with pytest.raises(FileNotFoundError, match='nowhere'): train_retrieval(shards, tmp_path/'judge', config, ['nowhere.tar'], k=4)
    with pytest.raises(ValueError, match='63 are needed'): train_retrieval(shards, tmp_path/'judge', config, shards, k=64)
    assert not (tmp_path/'judge').exists()

def test_a_judge_of_ten_steps(shards, tmp_path):
    "One step of warm-up, which divided by zero."
    config = RetrievalConfig(size=16, width=8, layers=2, dim=16, steps=10, batch_size=8, word_dim=32)
    judge = train_retrieval(shards, tmp_path/'judge', config, k=4, limit=10)
    assert judge.facts['pictures'] == judge.facts['ceiling']['all']['n'] == 10
    with pytest.raises(ValueError, match='k: found 1'): picked_right(judge, torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ['x'], k=1)

def test_flags_that_would_not_be_used(shards, tmp_path, capsys):
    train = ['--retrieval', str(tmp_path/'judge'), '--train-retrieval', *shards]
    for args, said in ((['--compare', 'a', 'b', '--captions', 'c.txt', '--sweep'], '--compare reads two runs and draws nothing: leave out --captions, --sweep'),
                       ([*train, '--fid', 'net.pt', '--steps', '4'], 'without a checkpoint only the judge is trained: leave out --output, --fid, --steps, or name a checkpoint'),
                       (['--compare', 'a', 'b', '--guidance', '2'], 'leave out --guidance'),
                       (['shapes', *train, '--captions', 'nowhere.txt'], 'nowhere.txt'), (['nowhere', *train, '--data', *shards], 'nowhere')):
        assert mdm_evaluate([*args, '--output', str(tmp_path/'run')]) == 2 and said in capsys.readouterr().err
    (tmp_path/'judge').write_text('a file')
    assert mdm_evaluate(train) == 2 and '--retrieval' in capsys.readouterr().err

def test_the_recipe_of_a_model_that_is_not_loaded_yet(tmp_path):
    from mdm.cli.evaluate import own_recipe
    (tmp_path/'a.pth').write_bytes(b'')
    assert own_recipe(str(tmp_path/'a.pth'), 'imagenet_64').text.encoder == 'classes' and own_recipe(str(tmp_path/'a.pth')) is None
    assert own_recipe('shapes').name == 'shapes' and own_recipe('nowhere') is None
