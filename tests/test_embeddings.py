"Edge cases of mdm.data.embeddings: what is stored, what is refused, and that training does not notice"
import io, json, multiprocessing, os, random, shutil, signal, tarfile, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from mdm.data import embeddings as E
from mdm.data.embeddings import *
from mdm.data.files import find_tars, read_manifest
from mdm.data.inspect import read_samples, split_shards
from mdm.data.stream import DataConfig
from mdm.data.samples import EmbeddedCaption
from mdm.data.loader import create_loader
from mdm.data.shapes import write_shapes
from mdm.data.shards import add_sample
from mdm.recipe import load_recipe
from mdm.text import TextConfig, create_text_encoder

small = TextConfig(dim=8)
def samples(folder): return [s for *_,s in read_samples(find_tars(folder))]
def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}
def stored(s): return np.load(io.BytesIO(s['emb.npy']))

@pytest.fixture
def plain(tmp_path):
    write_shapes(tmp_path/'plain', 24, per_shard=8)
    return tmp_path/'plain'

@pytest.fixture(scope='module')
def t5(tmp_path_factory):
    "A folder with a tiny T5 encoder"
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    folder = tmp_path_factory.mktemp('t5')
    words = ['<pad>', '</s>', '<unk>', *'a red green blue circle cross bar on the in of with and large small'.split()]
    tok = Tokenizer(models.WordLevel({w:i for i,w in enumerate(words)}, '<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>',1)])
    PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', eos_token='</s>', unk_token='<unk>', model_max_length=512).save_pretrained(folder)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).save_pretrained(folder)
    return folder

# ---- what is stored

@pytest.mark.parametrize('which', ['hash','t5'])
def test_embeddings_are_the_encoders(plain, tmp_path, t5, which):
    config = small if which == 'hash' else TextConfig(encoder=str(t5))
    m = embed_shards(plain, tmp_path/'e', config, batch_size=5, command='mdm_dataset embed')
    real = create_text_encoder(config)
    for a,b in zip(samples(plain), samples(tmp_path/'e')):
        emb = stored(b)
        want, mask = real([a['txt'].decode()])
        assert emb.dtype == np.float16 and emb.shape == (int(mask.sum()), real.dim)
        assert np.abs(emb - want[0].numpy()).max() < 3e-3
        assert {k:v for k,v in b.items() if k != 'emb.npy'} == a
    note = m['embeddings']
    assert (note['encoder'], note['dim'], note['max_tokens'], note['max_chars'], note['half'], len(note['weights'])) == (config.encoder, real.dim, 128, 512, False, 64)
    assert m['complete'] and m['command'] == 'mdm_dataset embed' and {k: o['samples'] for k,o in m['shards'].items()} == {f'shapes-{i:06d}.tar': 8 for i in range(3)}
    assert all(o['bytes'] == (tmp_path/'e'/k).stat().st_size for k,o in m['shards'].items()) and read_manifest(tmp_path/'e') == m
    empty, _ = PrecomputedText(note, config)([''])
    torch.testing.assert_close(empty, real([''])[0], atol=3e-3, rtol=0)

def test_samples_without_a_caption_stay_as_they_are(tmp_path):
    (tmp_path/'in').mkdir()
    with tarfile.open(tmp_path/'in'/'a.tar', 'w') as t:
        for k,s in dict(good=dict(txt=b'red'), mute=dict(txt=b' '), latin=dict(txt=b'\xff'), json=dict(json=b'{"caption":"blue"}'), good2=dict(txt=b'red'), old=dict(txt=b'green', **{'emb.npy':b'old'})).items(): add_sample(t, {'__key__':k, 'jpg':b'', **s})
        add_sample(t, {'__key__':'good', 'txt':b'another of the same name'})
    embed_shards(tmp_path/'in', tmp_path/'out', small, batch_size=3)
    got = samples(tmp_path/'out')
    assert [(s['__key__'], stored(s).shape if 'emb.npy' in s else None) for s in got] == [('good',(2,8)), ('mute',None), ('latin',None), ('json',(2,8)), ('good2',(2,8)), ('old',(2,8)), ('good',(6,8))]

def test_long_captions_are_cut_as_the_encoder_cuts_them(tmp_path):
    (tmp_path/'in').mkdir()
    with tarfile.open(tmp_path/'in'/'a.tar', 'w') as t: add_sample(t, {'__key__':'k', 'txt':b'word '*1000})
    embed_shards(tmp_path/'in', tmp_path/'out', TextConfig(dim=8, max_tokens=20))
    assert stored(samples(tmp_path/'out')[0]).shape == (20,8)

def test_numbers_beyond_half_precision():
    with pytest.raises(ValueError, match='half precision'): half_files((torch.full((1,2,3), 1e6), torch.ones(1,2)))

def test_fingerprints(t5, tmp_path):
    a = weights_hash(TextConfig(encoder=str(t5)))
    shutil.copytree(t5, tmp_path/'copy')
    assert weights_hash(TextConfig(encoder=str(tmp_path/'copy'))) == a
    w = tmp_path/'copy'/'model.safetensors'
    w.write_bytes(w.read_bytes()[:-1] + b'\x01')
    assert weights_hash(TextConfig(encoder=str(tmp_path/'copy'))) not in (a, None)
    w.unlink()
    assert weights_hash(TextConfig(encoder=str(tmp_path/'copy'))) is None
    assert weights_hash(small) == weights_hash(TextConfig(dim=8)) != weights_hash(TextConfig(dim=9))

# ---- runs

def test_killed(plain, tmp_path, monkeypatch):
    real = E.add_sample
    def slow(*args):
        time.sleep(.003)
        return real(*args)
    monkeypatch.setattr(E, 'add_sample', slow)
    work = lambda out: embed_shards(plain, out, small, batch_size=3)
    work(tmp_path/'whole')
    rng, kills = random.Random(0), 0
    for k in range(8):
        p = multiprocessing.get_context('fork').Process(target=lambda: work(tmp_path/'out'))
        p.start(); p.join(rng.uniform(.01, .08))
        if p.is_alive(): os.kill(p.pid, signal.SIGKILL); kills += 1
        p.join()
        for o in (tmp_path/'out').glob('*.tar'): assert o.read_bytes()[-1024:] == bytes(1024)
    assert kills
    work(tmp_path/'out')
    assert files(tmp_path/'out') == files(tmp_path/'whole')

def test_only_new_and_changed_shards_are_embedded(plain, tmp_path):
    embed_shards(plain, tmp_path/'e', small)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'e').glob('*.tar')}
    shutil.copy(plain/'shapes-000000.tar', plain/'more.tar')
    with tarfile.open(plain/'shapes-000001.tar', 'w') as t: add_sample(t, {'__key__':'k', 'txt':b'red'})
    m = embed_shards(plain, tmp_path/'e', small)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'e').glob('*.tar')}
    assert sorted(k for k in after if after[k] != before.get(k)) == ['more.tar', 'shapes-000001.tar']
    assert {k: o['samples'] for k,o in m['shards'].items()} == {'more.tar':8, 'shapes-000000.tar':8, 'shapes-000001.tar':1, 'shapes-000002.tar':8}

def test_refused(plain, tmp_path, t5):
    embed_shards(plain, tmp_path/'e', small)
    for config,what in ((TextConfig(dim=16), 'dim 8 and 16'), (TextConfig(dim=8, max_tokens=5), 'max_tokens 128 and 5'), (TextConfig(dim=8, max_chars=5), 'max_chars 512 and 5'), (TextConfig(encoder=str(t5)), "encoder 'hash' and ")):
        with pytest.raises(FileExistsError, match=what): embed_shards(plain, tmp_path/'e', config)
    with pytest.raises(FileExistsError, match='choose another folder'): embed_shards(plain, plain, small)
    with pytest.raises(FileExistsError, match='holds other shards'): embed_shards(tmp_path/'e', plain, small)
    shutil.copytree(plain, tmp_path/'again')
    with pytest.raises(ValueError, match='name of several shards'): embed_shards([plain, tmp_path/'again'], tmp_path/'f', small)
    with pytest.raises(FileNotFoundError, match='no file matches'): embed_shards(tmp_path/'none', tmp_path/'f', small)
    with pytest.raises(ValueError, match='batch_size is 0'): embed_shards(plain, tmp_path/'g', small, batch_size=0)
    assert not (tmp_path/'g').exists()

def test_a_split_keeps_the_embeddings(plain, tmp_path):
    m = embed_shards(plain, tmp_path/'e', small)
    for o in split_shards(tmp_path/'e', tmp_path/'s', percent=40): assert o['embeddings'] == m['embeddings']
    assert read_embeddings([str(tmp_path/'s'/'*'/'*.tar')]) == m['embeddings']
    assert all('emb.npy' in s for s in samples(tmp_path/'s'/'train'))
    embed_shards(plain, tmp_path/'f', TextConfig(dim=16))
    with pytest.raises(ValueError, match='different encoders'): split_shards([tmp_path/'e', tmp_path/'f'], tmp_path/'t')

# ---- what training refuses

def recipe_for(folder, *overrides): return load_recipe('shapes', [f'data.files=[{folder}/*.tar]', 'data.embeddings=true', 'text.dim=8', 'train.preview_prompts=[]', 'data.workers=0', *overrides])

def test_without_embeddings_the_encoder_is_the_recipes(plain):
    assert type(create_encoder_for(recipe_for(plain, 'data.embeddings=false'))).__name__ == 'HashEncoder'

def test_training_refuses_other_embeddings(plain, tmp_path, t5):
    embed_shards(plain, tmp_path/'e', small)
    assert isinstance(create_encoder_for(recipe_for(tmp_path/'e')), PrecomputedText)
    for o,what in (('text.dim=16', 'dim 8 and 16'), ('text.max_tokens=64', 'max_tokens 128 and 64'), ('text.max_chars=64', 'max_chars 512 and 64'), (f'text.encoder={t5}', f"encoder 'hash' and '{t5}'"), ('text.encoder=google/flan-t5-xl', "recipe wants 'google/flan-t5-xl'")):
        with pytest.raises(ValueError, match=what): create_encoder_for(recipe_for(tmp_path/'e', o))
    with pytest.raises(ValueError, match='no manifest.json in .*plain'): create_encoder_for(recipe_for(plain))

def test_training_refuses_other_weights(plain, tmp_path, t5):
    "The same name and other weights are refused; another name and the same weights are not; without the weights the name decides"
    shutil.copytree(t5, tmp_path/'mine')
    name = f'text.encoder={tmp_path/"mine"}'
    embed_shards(plain, tmp_path/'e', TextConfig(encoder=str(tmp_path/'mine')))
    create_encoder_for(recipe_for(tmp_path/'e', name)); create_encoder_for(recipe_for(tmp_path/'e', f'text.encoder={t5}'))
    w = tmp_path/'mine'/'model.safetensors'
    data = w.read_bytes()
    w.write_bytes(data[:-1] + b'\x01')
    with pytest.raises(ValueError, match='weights .*and '): create_encoder_for(recipe_for(tmp_path/'e', name))
    shutil.rmtree(tmp_path/'mine')
    create_encoder_for(recipe_for(tmp_path/'e', name))
    with pytest.raises(ValueError, match='encoder '): create_encoder_for(recipe_for(tmp_path/'e', 'text.encoder=google/flan-t5-xl'))

def test_embeddings_on_a_server(plain, tmp_path):
    "The manifest is read where the shards are"
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread
    m = embed_shards(plain, tmp_path/'e', small)
    s = ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    Thread(target=s.serve_forever, daemon=True).start()
    web = f'http://127.0.0.1:{s.server_port}'
    assert read_embeddings([f'{web}/e/shapes-00000{{0..2}}.tar']) == m['embeddings']
    with pytest.raises(ValueError, match=f'no manifest.json in {web}/plain'): read_embeddings([f'{web}/plain/shapes-000000.tar'])
    s.shutdown(); s.server_close()

def test_mixtures_of_encoders_are_refused(plain, tmp_path):
    embed_shards(plain, tmp_path/'e', small); embed_shards(plain, tmp_path/'f', TextConfig(dim=8, max_tokens=64))
    recipe = recipe_for(tmp_path/'e')
    recipe.data.files.append(str(tmp_path/'f'/'*.tar'))
    with pytest.raises(ValueError, match='different text encoders'): create_encoder_for(recipe)
    recipe.data.files[1] = str(plain/'*.tar')
    with pytest.raises(ValueError, match='no manifest.json in .*plain'): create_encoder_for(recipe)

def test_previews_need_the_encoder_at_once(plain, tmp_path, t5):
    shutil.copytree(t5, tmp_path/'mine')
    embed_shards(plain, tmp_path/'e', TextConfig(encoder=str(tmp_path/'mine')))
    recipe = recipe_for(tmp_path/'e', f'text.encoder={tmp_path/"mine"}', 'train.preview_prompts=[a red circle]')
    res, real = create_encoder_for(recipe), create_text_encoder(str(t5))
    shutil.rmtree(tmp_path/'mine')
    torch.testing.assert_close(res(['a red circle'])[0], real(['a red circle'])[0])    # remembered, though the encoder is gone
    with pytest.raises(ValueError, match='could not be loaded'): res(['a blue cross'])
    with pytest.raises(ValueError, match=r'train.preview_prompts=\[\]'): create_encoder_for(recipe)

# ---- in training

def carrying(text, emb):
    c = EmbeddedCaption(text); c.embedding = emb; return c

def test_captions_blanks_and_prompts_in_one_batch():
    real = create_text_encoder(small)
    note = describe_encoder(small, real)
    given = np.full((3,8), 7, np.float16)
    emb, mask = PrecomputedText(note, small)([carrying('one two', given), '', 'three four five six', carrying('', given)])
    assert mask.sum(1).tolist() == [3, 1, 5, 3] and emb.dtype == torch.float32
    assert (emb[0,:3] == 7).all() and (emb[3,:3] == 7).all() and (emb[0,3:] == 0).all()
    torch.testing.assert_close(emb[1,:1], real([''])[0][0], atol=2e-3, rtol=0)
    torch.testing.assert_close(emb[2], real(['three four five six'])[0][0])

def test_wrong_things_are_refused():
    enc = PrecomputedText(describe_encoder(small, create_text_encoder(small)), small)
    for bad in (np.zeros((3,9), np.float16), np.zeros(8, np.float16)):
        with pytest.raises(ValueError, match='8 wide'): enc([carrying('x', bad)])
    with pytest.raises(TypeError): enc('x')
    with pytest.raises(ValueError): enc([])

def test_the_loader_and_the_losses(plain, tmp_path):
    "Batches of the loader, with and without stored embeddings: the same pictures and captions, and losses equal up to half precision"
    from mdm.diffusion.objective import Diffusion
    from mdm.models.nested_unet import create_model, model_scales
    config = TextConfig(dim=32)
    embed_shards(plain, tmp_path/'e', config)
    tiny = ['text.dim=32', 'model.channels=[8,16]', 'model.inner.channels=[8,16]', 'model.inner.num_resnets=[1,1]', 'model.inner.num_attention_layers=[0,1]', 'model.time_dim=32', 'model.inner.time_dim=32', 'model.num_groups=8', 'model.inner.num_groups=8']
    losses, captions, embedded = {}, {}, {}
    for folder,on in ((plain,'false'), (tmp_path/'e','true')):
        recipe = recipe_for(folder, f'data.embeddings={on}', 'train.batch_size=6', *tiny)
        encoder, loader = create_encoder_for(recipe), create_loader(recipe.data, 6, seed=1)
        torch.manual_seed(0)
        model = create_model(recipe.model, encoder.dim)
        for p in model.parameters(): torch.nn.init.normal_(p, std=.1)
        diffusion = Diffusion(recipe.diffusion, model_scales(recipe.model))
        losses[on], captions[on], embedded[on] = [], [], []
        for images,words,micros in loader:
            words = ['' if i == 2 else w for i,w in enumerate(words)]
            embedded[on].append(encoder(words)[0].sum().item())
            captions[on] += map(str, words)
            losses[on].append(diffusion.loss(model, images.float()/128-1, *encoder(words), {}).loss.item())
    assert captions['true'] == captions['false'] and len(losses['true']) == 4
    np.testing.assert_allclose(losses['true'], losses['false'], rtol=2e-3)
    assert embedded['true'] != embedded['false']                           # those on disk are rounded: they were really read
