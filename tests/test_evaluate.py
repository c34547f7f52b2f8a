"Judges: figures against formulas written out, runs that are interrupted or shared, and pages in a real browser."
import argparse, csv, json, os, pickle, shutil, signal, subprocess, sys, tarfile, time
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import get_args
import numpy as np, pytest, torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn
from mdm.cli import evaluate as cli_evaluate
from mdm.evaluation import evaluate as evaluation, losses as losses_module
from mdm.checkpoint import save_checkpoint
from mdm.cli.evaluate import mdm_evaluate
from mdm.data.shapes import Shape, agreeing, attributes, caption, all_shapes, draw, parse_caption, random_shape, shapes_captions, write_shapes
from mdm.data.shapes_judge import prompt_accuracy
from mdm.evaluation.distances import *
from mdm.evaluation.evaluate import *
from mdm.evaluation.evaluate import EvaluateConfig
from mdm.evaluation.features import *
from mdm.evaluation.gallery import *
from mdm.evaluation.judges import *
from mdm.evaluation.losses import *
from mdm.evaluation.runs import *
from mdm.data.files import read_captions
from mdm.models.nested_unet import create_model
from mdm.pipeline import MDMPipeline
from mdm.recipe import load_recipe
from mdm.diffusion.settings import SampleConfig
from mdm.data.shards import add_sample

tiny = '''model.channels=[8,16] model.inner.channels=[8,16] model.inner.num_resnets=[1,1] model.inner.num_attention_layers=[0,1] model.time_dim=32 model.inner.time_dim=32 text.dim=16 sample.steps=2 sample.guidance=2'''.split()
captions = [caption(random_shape(0, i, True)[0]) for i in range(10)]         # all five attributes in each
odd = ['<script>document.title = "broken"</script>', '"quoted" & \'single\'</figcaption></figure>', 'CARDS TITLE HEAD \\1 \\g<0>', 'größer → ☃', captions[0]]

@pytest.fixture(scope='module')
def pipe():
    "A tiny model whose weights are random, but not zero anywhere."
    recipe = load_recipe('shapes', tiny)
    torch.manual_seed(0)
    model = create_model(recipe.model, 16)
    for p in model.parameters(): nn.init.normal_(p, std=.05)
    return MDMPipeline(model, recipe, device='cpu')

@pytest.fixture(scope='module')
def checkpoint(pipe, tmp_path_factory): return str(save_checkpoint(tmp_path_factory.mktemp('model')/'tiny', pipe.recipe, pipe.model.state_dict()))

@pytest.fixture(scope='module')
def shards(tmp_path_factory): return [str(p) for p in write_shapes(tmp_path_factory.mktemp('valid'), 25, per_shard=10, held_out=True)]

class Net(nn.Module):
    def __init__(self):
        super().__init__(); self.conv = nn.Conv2d(3, 6, 5, 4)
    def forward(self, x: Tensor) -> Tensor: return self.conv(x.float()/128 - 1).relu().mean((2, 3))

@pytest.fixture(scope='module')
def net(tmp_path_factory):
    torch.manual_seed(0)
    torch.jit.script(Net()).save(path := str(tmp_path_factory.mktemp('net')/'net.pt'))
    return path

@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    "A CLIP of random weights that reads letters, as a folder."
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    folder = tmp_path_factory.mktemp('clip')
    words = [chr(k) + end for end in ('', '</w>') for k in range(33, 127)] + ['<|startoftext|>', '<|endoftext|>']
    (folder/'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(words)})); (folder/'merges.txt').write_text('#version: 0.2\n')
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(4)
    CLIPModel(CLIPConfig(text_config=dict(small, vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1), vision_config=dict(small, image_size=32, patch_size=8), projection_dim=16)).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=32), CLIPTokenizer(str(folder/'vocab.json'), str(folder/'merges.txt'), unk_token='<|endoftext|>', model_max_length=77)).save_pretrained(folder)
    return str(folder)

def evaluate(pipe, folder, captions=None, data=None, config=None, n=None, embed=400, **wishes):
    return evaluation.evaluate(pipe, folder, captions, data, EvaluateConfig(limit=n, gallery=embed, **wishes), config)
def drawn(folder): return {p.name: p.read_bytes() for p in sorted((Path(folder)/'pictures').iterdir())}
def as_rank(monkeypatch, rank, world): monkeypatch.setenv('RANK', str(rank)); monkeypatch.setenv('WORLD_SIZE', str(world))

# ---- captions

def test_captions_of_every_kind(tmp_path):
    (tmp_path/'a.txt').write_bytes('\ufeffein größerer Kreis\r\n\r\n  a, b \r\n'.encode())
    assert read_captions(tmp_path/'a.txt') == ['ein größerer Kreis', 'a, b']
    with open(tmp_path/'a.csv', 'w', newline='', encoding='utf-8') as f: csv.writer(f).writerows([['id', 'caption'], [1, 'two\nlines, "quoted"'], [2, ''], [3, 'x']])
    assert read_captions(tmp_path/'a.csv') == ['two\nlines, "quoted"', 'x']
    (tmp_path/'a.TSV').write_text('caption\tid\na\t1\nb\n'); assert read_captions(tmp_path/'a.TSV') == ['a', 'b']
    (tmp_path/'a.jsonl').write_text('\n{"caption": "a"}\n\n{"caption": " b "}'); assert read_captions(tmp_path/'a.jsonl') == ['a', 'b']

@pytest.mark.parametrize('name, content, said', [
    ('a.txt', b'\n \n', 'holds none'), ('a.txt', b'\xff\xfe\x00', 'not UTF-8'), ('a.csv', b'text\na\n', 'line 2: it has text, but none that is called caption'),
    ('a.jsonl', b'{"caption": "a"}\n{"caption": 3}\n', 'line 2'), ('a.jsonl', b'["a"]', 'line 1'), ('a.jsonl', b'{"caption": "a"', 'line 1'), ('a.csv', b'caption\n', 'holds none')])
def test_captions_that_are_none(tmp_path, name, content, said):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(ValueError, match=said): read_captions(tmp_path/name)

# ---- sampling

def test_every_caption_once():
    for n, size, world in ((1, 4, 3), (10, 3, 2), (10, 3, 5), (64, 8, 3), (7, 100, 2)):
        blocks = [b for rank in range(world) for b in own_blocks(n, size, rank, world)]
        assert sorted(i for b in blocks for i in b) == list(range(n)) and max(map(len, blocks)) <= size

def test_pictures_are_the_pipelines(pipe, tmp_path):
    folder = claim_run(tmp_path/'run', run_settings(pipe, captions, seed=5), captions)
    sample_missing(pipe, folder, captions, seed=5, batch_size=4)
    wanted = [p for i in (0, 4, 8) for p in pipe(captions[i:i + 4], n=1, seed=5 + i)]
    assert np.array_equal(load_pictures(folder, range(10)), np.stack([np.array(p).transpose(2, 0, 1) for p in wanted]))
    assert Image.open(picture_path(folder, 7)).text == dict(caption=captions[7], seed='12')

def test_interrupted_and_continued(pipe, tmp_path, monkeypatch):
    whole, calls, real = tmp_path/'whole', [], MDMPipeline.steps
    evaluate(pipe, whole, captions, batch_size=3)
    def steps(self, prompts, *args):
        if len(calls) == 2: raise KeyboardInterrupt()
        calls.append(prompts); yield from real(self, prompts, *args)
    monkeypatch.setattr(MDMPipeline, 'steps', steps)
    with pytest.raises(KeyboardInterrupt): evaluate(pipe, tmp_path/'run', captions, batch_size=3)
    assert len(drawn(tmp_path/'run')) == 6 and not (tmp_path/'run'/'results.json').exists()
    calls.clear()
    evaluate(pipe, tmp_path/'run', captions, batch_size=3)
    assert calls == [captions[6:9], captions[9:]] and drawn(tmp_path/'run') == drawn(whole)
    first, second = (json.loads((tmp_path/o/'results.json').read_text()) | dict(name='') for o in ('whole', 'run'))
    assert first == second

def test_two_ranks_give_what_one_gives(pipe, shards, net, clip, tmp_path, monkeypatch):
    judge = lambda folder: evaluate(pipe, tmp_path/folder, None, shards, batch_size=4, fid=net, clip=clip, loss_pictures=20, levels=3, name='run')
    alone = judge('one')
    for rank in (1, 0): as_rank(monkeypatch, rank, 2); both = judge('two')
    assert drawn(tmp_path/'one') == drawn(tmp_path/'two') and len(both['captions']) == 25
    assert alone == both and json.dumps(alone, allow_nan=False)
    assert sorted(o.name for o in (tmp_path/'two').iterdir()) == ['gallery.html', 'loss.png', 'pictures', 'results.json', 'run.json']

def test_more_ranks_than_work(pipe, shards, net, tmp_path, monkeypatch):
    for rank in (2, 1, 0): as_rank(monkeypatch, rank, 3); found = evaluate(pipe, tmp_path/'run', None, shards, batch_size=25, fid=net, loss_pictures=5)
    assert found['scores']['fid']['n'] == 25 and found['loss']['n'] == 5

def test_killed_processes(checkpoint, pipe, tmp_path):
    "Two processes, both killed at once in the middle, and then started again."
    (tmp_path/'c.txt').write_text('\n'.join(captions*4))
    command = ['-c', 'import sys; from mdm.cli.evaluate import mdm_evaluate; sys.exit(mdm_evaluate(sys.argv[1:]))', checkpoint, '--captions', str(tmp_path/'c.txt'), '--output', str(tmp_path/'run'), '--batch-size', '2', '--device', 'cpu']
    start = lambda more=[]: [subprocess.Popen([sys.executable, *command, *more], env=os.environ | dict(RANK=str(r), WORLD_SIZE='2'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    both = start()
    while len(list((tmp_path/'run').glob('pictures/0*.png'))) < 4 and all(o.poll() is None for o in both): time.sleep(.01)
    for o in both: o.send_signal(signal.SIGKILL)
    for o in both: o.communicate()
    killed = len(drawn(tmp_path/'run'))
    assert 4 <= killed < 40 and not (tmp_path/'run'/'results.json').exists()
    for o in (both := start()): o.out, o.err = o.communicate(timeout=300)
    assert [o.returncode for o in both] == [0, 0], both[0].err + both[1].err
    assert 'all right and clean' in both[0].out and not both[1].out and '2 processes' in both[0].err
    evaluate(pipe, tmp_path/'calm', captions*4, batch_size=2)
    assert drawn(tmp_path/'run') == drawn(tmp_path/'calm')                 # nor is anything half-written left

def test_another_folder_for_other_settings(pipe, tmp_path):
    evaluate(pipe, tmp_path/'run', captions[:2])
    before = drawn(tmp_path/'run')
    for more, said in ((dict(seed=1), 'seed: 0 there, 1 now'), (dict(captions=captions[:3]), 'pictures: 2 there, 3 now'), (dict(negative_prompt='red'), "negative_prompt: '' there, 'red' now"),
                       (dict(config=pipe.config(steps=3)), 'steps: 2 there, 3 now')):
        with pytest.raises(FileExistsError, match=said): evaluate(pipe, tmp_path/'run', **dict(captions=captions[:2]) | more)
    with torch.no_grad(): (w := next(pipe.model.parameters())).add_(1)
    try:
        with pytest.raises(FileExistsError, match='weights: '): evaluate(pipe, tmp_path/'run', captions[:2])
    finally:
        with torch.no_grad(): w.sub_(1)
    assert drawn(tmp_path/'run') == before
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.txt').write_text('x')
    with pytest.raises(FileExistsError, match='thesis.txt'): evaluate(pipe, tmp_path/'mine', captions[:2])
    with pytest.raises(FileExistsError, match='is a file'): evaluate(pipe, tmp_path/'mine'/'thesis.txt', captions[:2])
    (tmp_path/'run'/'run.json').write_text('{')
    with pytest.raises(ValueError, match='run.json is damaged'): evaluate(pipe, tmp_path/'run', captions[:2])

def test_a_process_that_does_not_come(tmp_path):
    with pytest.raises(TimeoutError, match='b and 1 more files'): wait_for([tmp_path, tmp_path/'b', tmp_path/'c'], patience=.1)

def test_impossible_wishes(pipe, shards, net, tmp_path):
    for wish, said in ((dict(), 'nothing to draw'), (dict(captions=captions, fid=net), 'FID compares'), (dict(captions=captions, n=0), 'evaluate.limit: found 0'), (dict(captions=captions, batch_size=0), 'evaluate.batch_size: found 0'),
                       (dict(data=shards, loss_pictures=-1), 'evaluate.loss_pictures: found -1'), (dict(data=shards, levels=0), 'evaluate.levels: found 0'),
                       (dict(data=shards, levels=2000), 'levels is 2000, but the model has 1000'), (dict(data=shards, captions=captions[:3], fid=net), 'FID needs at least 20 drawn pictures')):
        with pytest.raises(ValueError, match=said): evaluate(pipe, tmp_path/'run', **wish)
    assert not (tmp_path/'run').exists()

# ---- prompt accuracy

def test_accuracy(tmp_path):
    world = all_shapes()[::400]
    (tmp_path/'pictures').mkdir()
    for i, s in enumerate(world): draw(world[i - 1] if i % 3 == 0 else s, 32).save(picture_path(tmp_path, i))     # every third one is wrong
    texts = [caption(s) for s in world]
    def judge_pictures(folder, captions): return (found := judge_run(folder, captions)), accuracy_scores(found, captions)
    found, scores = judge_pictures(tmp_path, texts)
    for k, right in prompt_accuracy(load_pictures(tmp_path, range(len(world))), texts).items(): assert scores[f'accuracy.{k}']['value'] == pytest.approx(right)
    assert vars(world[1]).items() <= found[1].items() and vars(world[-1]).items() <= found[0].items()
    mixed = ['a cat', *texts[1:]]
    assert judge_pictures(tmp_path, mixed)[0][0] is None and judge_pictures(tmp_path, mixed)[1]['accuracy.shape']['n'] == len(world) - 1
    assert judge_pictures(tmp_path, ['a cat', 'a dog']) == ([None, None], {})
    assert judge_pictures(tmp_path, ['red circle', 'a cat', 'a dog']) == ([None]*3, {})     # a name among other names, not a caption of shapes

def test_standard_errors():
    v = np.random.default_rng(0).normal(size=50)
    assert score(v)['se'] == pytest.approx(v.std(ddof=1)/50**.5) and score([1.])['se'] is None
    assert 0 < score([1]*30, share=True)['se'] < .05 and score([1]*30, share=True)['value'] == 1

# ---- FID

def by_hand(x, y): return ((x.mean(0) - y.mean(0))**2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2*sqrtm(np.cov(x.T) @ np.cov(y.T)).real)

@pytest.mark.parametrize('n, m, width', [(200, 300, 12), (60, 40, 3), (30, 25, 48)], ids=['plain', 'narrow', 'fewer pictures than features'])
def test_fid_against_the_formula(n, m, width):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, width)) @ rng.normal(size=(width, width)), rng.normal(size=(m, width))*2 + 1
    found = fid_score(x, y)
    from torchmetrics.image.fid import FrechetInceptionDistance
    class Given(nn.Module):
        num_features = width
        def forward(self, x): return x
    metric = FrechetInceptionDistance(Given())
    for features, real in ((x, True), (y, False)): metric.update(torch.tensor(features), real=real)
    assert found['value'] == pytest.approx(float(metric.compute()), rel=1e-4)
    assert found['value'] == pytest.approx(by_hand(x, y), rel=1e-4) and frechet_distance(torch.tensor(x), torch.tensor(y)) == pytest.approx(by_hand(x, y), rel=1e-4)
    parts = np.array([by_hand(x[np.arange(n) % 10 != g], y[np.arange(m) % 10 != g]) for g in range(10)])
    assert found['se'] == pytest.approx((.9*((parts - parts.mean())**2).sum())**.5, rel=1e-2)
    assert (found['n'], found['real']) == (m, n) and f'{m:,} drawn and {n:,} real' in found['warning']
    if width == 3: assert found['infinity'] == pytest.approx(np.polyfit([1, 2, 3], [np.mean([by_hand(x[i::k], y[i::k]) for i in range(k)]) for k in (1, 2, 3)], 1)[1], rel=1e-4)
    else: assert (found['infinity'] is None) == (min(n, m)//3 < 2*width)

def test_fid_of_too_few():
    with pytest.raises(ValueError, match='at least 20 .* there are 30 and 19'): fid_score(np.zeros((30, 2)), np.zeros((19, 2)))

def test_fid_warns_below_ten_thousand():
    x = np.random.default_rng(0).normal(size=(10_000, 2))
    assert fid_score(x, x)['warning'] is None and fid_score(x, x[1:])['warning']

def test_inception_from_its_file(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception
    empty = tmp_path/'empty.pth'; torch.save({}, empty)
    with monkeypatch.context() as m:
        m.setattr(Inception, 'load_state_dict', lambda *args: None)
        torch.manual_seed(0); random = Inception('inception-v3-compat', ['2048'], str(empty))
    torch.save(random.state_dict(), tmp_path/'inception.pth')
    extractor = load_extractor(tmp_path/'inception.pth')
    found = extract_features(extractor, [(range(3, 5), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))])
    assert found['features'].shape == (2, 2048) and found['index'].tolist() == [3, 4] and not extractor.training

def test_extractors_that_are_none(tmp_path, monkeypatch, net):
    class Evil:
        def __reduce__(self): return (Path(tmp_path/'run').touch, ())
    torch.save(Net(), tmp_path/'module.pt'); torch.save(Net().state_dict(), tmp_path/'weights.pt'); (tmp_path/'text.pt').write_text('hello'); (tmp_path/'evil.pt').write_bytes(pickle.dumps(Evil()))
    for name in ('module.pt', 'weights.pt', 'text.pt', 'evil.pt'):
        with pytest.raises(ValueError, match=f'{name} is neither TorchScript nor'): load_extractor(tmp_path/name)
    assert not (tmp_path/'run').exists()
    with pytest.raises(FileNotFoundError, match='there is no file'): load_extractor(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='HF_HUB_OFFLINE'): load_extractor('inception')
    def refuse(*args, **kwargs): raise OSError('no route')
    monkeypatch.delenv('HF_HUB_OFFLINE'); monkeypatch.setattr('torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url', refuse)
    with pytest.raises(OSError, match='could not be fetched .no route.*give its path'): load_extractor('inception')

@pytest.mark.parametrize('wrong', [lambda x: x.float(), lambda x: x.float().mean((1, 2, 3)), lambda x: x[:1].float().mean((2, 3)), lambda x: x.float().mean((2, 3))/0., lambda x: None])
def test_extractors_that_give_no_features(wrong):
    class Wrong(nn.Module):
        def forward(self, x): return wrong(x)
    with pytest.raises(ValueError, match=r'expected finite features \[2,D\]'): extract_features(load_extractor(Wrong()), [(range(2), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))])

def test_without_torchmetrics(pipe, shards, net, clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchmetrics.image.fid', None); monkeypatch.setitem(sys.modules, 'torchmetrics.functional.multimodal', None)
    for wish in (dict(fid=net), dict(clip=clip)):
        with pytest.raises(ImportError, match=r"pip install 'matryoshka-diffusion\[eval\]'"): evaluate(pipe, tmp_path/'run', None, shards, **wish)
    assert not (tmp_path/'run').exists()                    # found out before sampling
    assert evaluate(pipe, tmp_path/'run', None, shards, n=2, loss_pictures=2)['scores']['loss.32']['n'] == 2

# ---- CLIP

def test_clip_score(clip):
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor
    texts, pictures = [*captions[:5], 'word '*200], torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    judge = load_clip(clip)
    found, model, processor = clip_scores(judge, pictures, texts), CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad(): out = model(**processor(text=texts, images=list(pictures), return_tensors='pt', padding=True, truncation=True, max_length=77))
    assert found == pytest.approx((100*(out.text_embeds*out.image_embeds).sum(-1)).clamp(min=0).tolist(), abs=1e-3) and 0 < max(found)
    k = int(np.argmax(found)); metric = CLIPScore(lambda: judge)
    metric.update(pictures[[k, k]], [texts[k]]*2)
    assert float(metric.compute()) == pytest.approx(found[k], abs=1e-3)

def test_clip_that_is_none(tmp_path):
    for source in (tmp_path, 'nobody/nothing'):
        with pytest.raises(OSError, match='CLIP could not be loaded from .*save_pretrained'): load_clip(source)

# ---- loss

def test_losses_do_not_depend_on_blocks(pipe, shards):
    a, b = (level_losses(pipe, read_pictures(shards, 32, size, 20), levels=4) for size in (20, 3))
    assert a['index'].tolist() == b['index'].tolist() == list(range(20)) and a['loss'].shape == (20, 4, 2)
    assert np.allclose(a['loss'], b['loss'], rtol=.05)      # bfloat16
    assert not np.array_equal(a['loss'], level_losses(pipe, read_pictures(shards, 32, 20, 20), levels=4, seed=1)['loss'])

def test_levels_are_where_they_should_be(pipe, shards, monkeypatch):
    seen = []
    monkeypatch.setattr(losses_module.Diffusion, 'loss', lambda self, model, images, cond, mask, micros, tau, noise: seen.append(tau) or argparse.Namespace(per_scale=[torch.ones(len(tau))]*2))
    level_losses(pipe, read_pictures(shards, 32, 8), levels=7)
    for k, tau in enumerate(seen): b = k % 7; assert ((1000*b//7 <= tau) & (tau < 1000*(b + 1)//7)).all()
    assert len(seen) == 7*4 and len({int(t) for t in seen[0]}) > 4

def test_a_perfect_model_has_no_loss(pipe, shards):
    class Perfect(nn.Module):
        scales = [2, 1]
        def forward(self, x, t, cond, mask, micros): return [o.zero_() for o in x]
    class Knowing(losses_module.Diffusion):
        def compare(self, outputs, noised): found = super().compare(outputs, noised); return argparse.Namespace(per_scale=[(t - t).square().mean((1, 2, 3)) + k for k, t in enumerate(found.targets)])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(losses_module, 'Diffusion', Knowing)
        found = summarise_losses(level_losses(pipe, read_pictures(shards, 32, 8, 6), levels=2)['loss'], pipe)
    assert found['mean'] == [[0, 0], [1, 1]] and found['se'] == [[0, 0], [0, 0]] and found['resolutions'] == [32, 16] and found['levels'] == [[0, 500], [500, 1000]] and found['n'] == 6

# ---- two runs

def test_paired_differences():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=200)
    a, b = score(hard), score(hard + .1 + .01*rng.normal(size=200))
    paired, loose = score_difference(a, b, [(i, i) for i in range(200)]), score_difference(a, b)
    assert paired['better'] == 'B' and paired['se'] < .002 and paired['n'] == 200
    assert loose['better'] == '' and loose['se'] == pytest.approx(np.hypot(a['se'], b['se'])) and loose['n'] == 0
    assert score_difference(dict(a, better='low'), dict(b, better='low'), [(i, i) for i in range(200)])['better'] == 'A'
    assert score_difference(a, a, [(0, 0), (1, 1)])['better'] == ''
    assert score_difference(score([None, 1, 2]), score([3, 5, 2]), [(0, 0), (1, 1), (2, 2)])['value'] == 2
    fid = lambda v, parts: dict(value=v, se=1., better='low', leave_out=parts)
    assert score_difference(fid(5, [5, 6]), fid(4, [4, 5]), [(0, 0)])['se'] == 0 and score_difference(fid(5, [5, 6]), fid(4, [4, 5]))['se'] == 2**.5

def test_pairs_of_captions(): assert pair_captions(['a', 'b', 'a', 'c'], ['a', 'a', 'a', 'b']) == [(0, 0), (1, 3), (2, 1)]

def test_what_cannot_be_compared(pipe, shards, net, tmp_path):
    torch.manual_seed(1)
    torch.jit.script(Net()).save(other := str(tmp_path/'other.pt'))
    for name, wish in (('a', dict(fid=net)), ('b', dict(fid=other)), ('c', dict(fid=net, n=22, loss_pictures=4))): evaluate(pipe, tmp_path/name, None, shards, **dict(loss_pictures=3) | wish)
    compared = lambda b: compare_runs(tmp_path/'a', tmp_path/b, tmp_path/'both')
    assert compared('b')['notes'] == ['FID is not compared: it was measured with different networks.'] and compared('b')['scores']['loss.16']['difference']['n'] == 3
    assert compared('c')['notes'] == ['FID is not compared: it was measured on different numbers of pictures.', *(f'loss at {k} pixels is not compared: it was measured on different pictures, noise levels or targets.' for k in (32, 16))]
    assert 'with different networks' in (compared('b') and (tmp_path/'both'/'compare.html').read_text()) and compared('c')['pairs'] == 22
    assert compared('a')['scores']['fid']['difference'] == dict(value=0, se=0, n=25, better='')

def test_earlier_scores_stay(pipe, shards, net, clip, tmp_path):
    "One judge at a time gives what all at once give; other real pictures take away only what was measured against them."
    alone, together = (lambda **wish: evaluate(pipe, tmp_path/'a', captions, loss_pictures=wish.pop('loss_pictures', 0), **wish)), evaluate(pipe, tmp_path/'b', captions, shards, clip=clip, loss_pictures=3)
    alone(clip=clip)
    found = alone(data=shards, loss_pictures=3)
    assert list(found['scores']) == list(together['scores']) and found['judges'] == together['judges'] and found['data'] == together['data'] and found['loss'] == together['loss']
    assert found['scores'] == together['scores'] == read_results(tmp_path/'a')[1]['scores'] == alone()['scores']
    assert (tmp_path/'a'/'loss.png').exists()
    here = [shutil.copy(o, tmp_path) for o in shards]
    assert alone(data=here)['loss'] == together['loss']                                  # the same pictures in another place
    with tarfile.open(here[0], 'a') as t: add_sample(t, {'__key__': 'more', 'txt': b'a cat '*4000})
    other = alone(data=here)
    assert 'clip' in other['scores'] and not other['loss'] and not [k for k in other['scores'] if k.startswith('loss')] and not (tmp_path/'a'/'loss.png').exists()

def test_fid_stays(pipe, shards, net, tmp_path):
    first = evaluate(pipe, tmp_path/'a', captions*2, shards, fid=net, loss_pictures=0)
    later = evaluate(pipe, tmp_path/'a', captions*2, shards, loss_pictures=3)
    assert later['scores']['fid'] == first['scores']['fid'] and later['judges'] == first['judges'] and later['warnings'] == first['warnings'] and later['loss']
    (tmp_path/'a'/'results.json').write_text('[]')
    assert 'fid' not in evaluate(pipe, tmp_path/'a', captions*2, shards, loss_pictures=3)['scores']

def test_damaged_results_and_pictures(pipe, tmp_path):
    evaluate(pipe, tmp_path/'a', captions[:2])
    picture = next(iter((tmp_path/'a'/'pictures').iterdir()))
    for damage in (picture.read_bytes()[:50], b''):
        picture.write_bytes(damage)
        with pytest.raises(ValueError, match=f'{picture.name} is damaged.*remove it'): evaluate(pipe, tmp_path/'a', captions[:2])
    picture.unlink()
    assert evaluate(pipe, tmp_path/'a', captions[:2])['captions'] == captions[:2]
    for text, said in (('{}', 'format None, expected 1'), ('[]', 'expected 1'), ('{', 'is damaged')):
        (tmp_path/'a'/'results.json').write_text(text)
        with pytest.raises(ValueError, match=said): compare_runs(tmp_path/'a', tmp_path/'a', tmp_path/'c')

def test_runs_with_nothing_in_common(pipe, tmp_path):
    for name, texts in (('a', ['a cat']), ('b', ['a dog'])): evaluate(pipe, tmp_path/name, texts)
    with pytest.raises(ValueError, match='neither a caption nor a score in common'): compare_runs(tmp_path/'a', tmp_path/'b', tmp_path/'c')
    with pytest.raises(FileNotFoundError, match='holds no results.json'): compare_runs(tmp_path/'a', tmp_path, tmp_path/'c')

# ---- the gallery, in a browser

@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    path = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield b
        b.close()

@pytest.fixture(scope='module')
def judged(pipe, shards, tmp_path_factory):
    "Two runs whose pictures are known: A draws what is asked but for every third caption; B draws all but the first."
    base, texts = tmp_path_factory.mktemp('judged'), odd + captions[1:]
    for name, wrong in (('a', lambda i: i % 3 == 0), ('b', lambda i: i == 4)):
        folder = claim_run(base/name, run_settings(pipe, texts), texts)
        for i, t in enumerate(texts):
            try: s = agreeing(parse_caption(t))[0]
            except ValueError: s = all_shapes()[7]
            other = next(o for o in all_shapes() if o.shape != s.shape and o.colour == s.colour and o.background == s.background and o.position == s.position and o.size == s.size)
            draw(other if wrong(i) else s, 32).save(picture_path(folder, i))
        evaluate(pipe, folder, texts, shards, loss_pictures=4, name=f'run <{name}> & co')
    compare_runs(base/'a', base/'b', base/'both')
    return base, texts

@pytest.fixture
def visit(browser):
    "Open a page; whatever it asks the network for, and whatever goes wrong in it, is noted."
    pages = []
    def f(path, width=1100):
        page = browser.new_page(viewport=dict(width=width, height=800)); pages.append(page); page.set_default_timeout(10_000)
        page.noted = []
        page.on('request', lambda r: page.noted.append(r.url) if not r.url.startswith(('data:', 'file:')) else None)
        page.on('pageerror', lambda e: page.noted.append(str(e))); page.on('dialog', lambda d: (page.noted.append('dialog'), d.dismiss())); page.on('console', lambda m: page.noted.append(m.text))
        page.goto(Path(path).as_uri())
        return page
    yield f
    for page in pages: assert page.noted == []; page.close()

def shown(page): return page.locator('figure:visible figcaption').all_inner_texts()

def test_gallery(judged, visit):
    from playwright.sync_api import expect
    base, texts = judged
    page = visit(base/'a'/'gallery.html')
    assert page.title() == 'run <a> & co: what it draws' and page.locator('script').count() == 1          # ours
    assert shown(page) == texts and page.inner_text('output') == f'{len(texts)} of {len(texts)} captions'
    assert page.evaluate('[...document.images].every(o => o.complete && o.naturalWidth > 0)') and page.locator('figure img').count() == len(texts)
    assert page.locator('figure img').nth(1).get_attribute('alt') == texts[1]
    page.get_by_label('caption has').fill('<SCRIPT>'); assert shown(page) == texts[:1]
    page.get_by_label('caption has').fill('background RED'.lower())
    assert shown(page) == [t for t in texts if 'red' in t and 'background' in t]
    page.get_by_role('button', name='Show all').click()
    expect(page.locator('figure:visible')).to_have_count(len(texts))      # `wait_for_function` calls eval, which the page's policy forbids
    page.locator('[name=shape]').select_option('wrong')
    wrong = [t for i, t in enumerate(texts) if i >= 4 and i % 3 == 0]
    assert shown(page) == wrong and len(wrong) > 1
    assert page.locator('figure:visible .wrong').all_inner_texts() == [f'wrong: shape ({o["shape"]})' for i, o in enumerate(read_results(base/'a')[1]['found']) if texts[i] in wrong and o]
    page.locator('[name=all]').select_option('right'); assert shown(page) == [] and page.inner_text('output').startswith('0 of')
    assert '± ' in page.inner_text('table') and page.locator('.top img').count() == 1

def test_comparison(judged, visit):
    base, texts = judged
    page = visit(base/'both'/'compare.html')
    assert page.title() == 'A: run <a> & co, B: run <b> & co' and page.locator('figure img').count() == 2*len(texts)
    page.locator('[name=shape]').select_option('only B right')
    assert shown(page) == [t for i, t in enumerate(texts) if i > 4 and i % 3 == 0]
    page.locator('[name=shape]').select_option('only A right'); assert shown(page) == [texts[4]]
    page.locator('[name=shape]').select_option('both wrong'); assert shown(page) == []
    found = json.loads((base/'both'/'compare.json').read_text())
    shape = found['scores']['accuracy.shape']
    assert found['pairs'] == len(texts) and shape['difference']['value'] == pytest.approx(shape['b']['value'] - shape['a']['value']) and shape['difference']['n'] == 10
    assert found['scores']['loss.32']['difference']['value'] == 0
    rows = page.locator('.top tr').all_inner_texts()
    assert rows[0].split('\t') == ['judge', 'A', 'B', 'B - A', 'clear?'] and any(r.startswith('shape right') for r in rows)

@pytest.mark.parametrize('name', ['a/gallery.html', 'both/compare.html'])
def test_on_a_phone(judged, visit, name):
    page = visit(judged[0]/name, 360)
    assert page.evaluate('document.documentElement.scrollWidth') == 360
    assert page.evaluate('[...document.querySelectorAll("figure")].every(o => o.getBoundingClientRect().right <= 360 && o.getBoundingClientRect().width > 120)')
    assert page.evaluate('[...document.querySelectorAll("input, select, button")].every(o => o.getBoundingClientRect().right <= 360)')

def test_pages_hold_no_foreign_markup(judged):
    for p in judged[0].rglob('*.html'):
        text = p.read_text(encoding='utf-8')
        assert 'default-src \'none\'' in text and '<script>document' not in text and text.count('</figure>') == len(judged[1]) and 'größer → ☃' in text and 'CARDS TITLE HEAD \\1 \\g&lt;0&gt;' in text

def test_very_many_pictures(pipe, tmp_path):
    evaluate(pipe, tmp_path/'run', captions, embed=3)
    page = (tmp_path/'run'/'gallery.html').read_text()
    assert page.count('<figure') == page.count('<img') == 3 and 'the first 3 of 10 captions' in page

def test_large_pictures_are_made_small(tmp_path):
    Image.effect_noise((600, 600), 50).save(tmp_path/'a.png')
    assert (uri := picture_uri(tmp_path/'a.png')).startswith('data:image/webp;base64,') and len(uri) < 60_000
    Image.new('RGB', (64, 64)).save(tmp_path/'b.png'); assert picture_uri(tmp_path/'b.png').startswith('data:image/png;base64,')

# ---- the command

@pytest.fixture
def call(capsys):
    def f(*args):
        capsys.readouterr()
        return mdm_evaluate(list(map(str, args))), *capsys.readouterr()
    return f

def test_flags_are_those_of_the_sampler(capsys, monkeypatch):
    parsers = []
    monkeypatch.setattr(cli_evaluate, 'run_command', lambda parser, *args: parsers.append(parser))
    mdm_evaluate([])
    flags = {o.dest: o for o in parsers[0]._actions}
    assert {f.name for f in fields(SampleConfig)} <= set(flags)
    from typing import get_type_hints
    for k, hint in get_type_hints(SampleConfig).items():
        if getattr(hint, '__origin__', None).__class__ is not type and get_args(hint) and all(isinstance(o, str) for o in get_args(hint)): assert tuple(flags[k].choices) == get_args(hint)

def test_command(call, checkpoint, shards, net, clip, tmp_path):
    run = [checkpoint, '--data', *shards, '--batch-size', 25, '--loss-pictures', 5, '--levels', 2]
    code, out, err = call(*run, '--output', tmp_path/'a', '--fid', net, '--clip', clip, '--name', 'first')
    assert code == 0 and 'first: 25 captions' in out and 'of 25 drawn, 25 real' in out and str(tmp_path/'a'/'gallery.html') in out
    assert '2 steps of unipc, guidance 2' in err and 'mdm_evaluate: warning: FID of 25 drawn' in err
    assert call(*run, '--output', tmp_path/'b', '--solver', 'unipc', '--steps', 3, '--limit', 20)[0] == 0
    assert read_results(tmp_path/'b')[1]['settings']['solver'] == 'unipc' and len(drawn(tmp_path/'b')) == 20
    code, out, _ = call('--compare', tmp_path/'a', tmp_path/'b', '--output', tmp_path/'c')
    assert code == 0 and '20 captions that both drew' in out and 'B: ' in out and (tmp_path/'c'/'compare.html').exists()

@pytest.mark.parametrize('args, said', [
    ([], 'no checkpoint'), (['CHECKPOINT'], 'nothing to draw'), (['CHECKPOINT', '--captions', 'c.txt', '--fid', 'inception'], '--data'), (['CHECKPOINT', '--compare', 'a', 'b'], 'no checkpoint, but'),
    (['nowhere', '--captions', 'c.txt'], 'nowhere'), (['CHECKPOINT', '--captions', 'd.txt'], 'there is no file d.txt'), (['CHECKPOINT', '--data', 'no/*.tar'], "no file matches 'no/*.tar'"),
    (['CHECKPOINT', '--captions', 'c.txt', '--steps', '2000'], 'steps'), (['CHECKPOINT', '--captions', 'c.txt', '--solver', 'euler'], "invalid choice: 'euler'"), (['CHECKPOINT', '--captions', 'c.txt', '--device', 'cuda:77'], '--device cuda:77'),
    (['CHECKPOINT', '--captions', 'c.txt', '--clip', 'no'], 'CLIP could not be loaded'), (['--compare', 'a', 'b'], 'a holds no results.json'), (['--nonsense'], 'unrecognized')], ids=lambda o: ' '.join(o)[:40] if isinstance(o, list) else '')
def test_mistakes(call, checkpoint, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    Path('c.txt').write_text('a cat')
    code, out, err = call(*[checkpoint if o == 'CHECKPOINT' else o for o in args])
    assert code == 2 and said in err and 'Traceback' not in err and not Path('evaluation').exists()

def test_ctrl_c(call, checkpoint, tmp_path, monkeypatch):
    (tmp_path/'c.txt').write_text('\n'.join(captions))
    real, blocks = MDMPipeline.steps, []
    def steps(self, prompts, *args):
        if blocks: raise KeyboardInterrupt()
        blocks.append(prompts); yield from real(self, prompts, *args)
    monkeypatch.setattr(MDMPipeline, 'steps', steps)
    code, _, err = call(checkpoint, '--captions', tmp_path/'c.txt', '--output', tmp_path/'run', '--batch-size', 4)
    assert code == 130 and 'stopped with 4 pictures' in err and 'goes on from there' in err

def test_help_is_light():
    code = "import sys; from mdm.cli.evaluate import mdm_evaluate; mdm_evaluate(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and all(o in done.stdout for o in ('examples:\n  mdm_evaluate', '--compare A B', '--fid FILE')) and 'None' not in done.stdout
