"Text encoders: what a reader of nbs/07_text.ipynb should not have to read."
import hashlib, os, subprocess, sys

os.environ['HF_HUB_OFFLINE'] = '1'
import pytest, torch
from mdm.text import HashEncoder, TextConfig, create_text_encoder, position_codes, split_words, word_vector

WORDS = ['a', 'red', 'blue', 'circle', 'square', 'dog', 'cat', 'on', 'top']


def save_tokenizer(folder, single='$A </s>', pad='<pad>', **kwargs):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocab = {w: i for i, w in enumerate(['<pad>', '</s>', '<s>', '<unk>', *WORDS])}
    tok = Tokenizer(models.WordLevel(vocab, unk_token='<unk>'))
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    if single: tok.post_processor = processors.TemplateProcessing(single=single, special_tokens=[('</s>', 1), ('<s>', 2)])
    PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=pad, eos_token='</s>', unk_token='<unk>', **kwargs).save_pretrained(folder)
    return len(vocab)


def save_t5(folder):
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=save_tokenizer(folder), d_model=32, d_kv=8, d_ff=64, num_layers=2,
                                        num_heads=4, decoder_start_token_id=0)).save_pretrained(folder)


def save_bert(folder):
    from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=save_tokenizer(folder, '<s> $A </s>', model_max_length=16), hidden_size=24, num_hidden_layers=2,
                               num_attention_heads=4, intermediate_size=48, max_position_embeddings=16)).save_pretrained(folder)


def save_gpt2(folder):
    from transformers import GPT2Config, GPT2Model
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=save_tokenizer(folder, single=None, pad=None), n_embd=24, n_layer=1, n_head=4, n_positions=64)).save_pretrained(folder)


def save_bart(folder):
    from transformers import BartConfig, BartModel
    torch.manual_seed(0)
    BartModel(BartConfig(vocab_size=save_tokenizer(folder), d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                         decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64)).save_pretrained(folder)


def save_clip(folder):
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    text = dict(vocab_size=save_tokenizer(folder), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
                max_position_embeddings=64, eos_token_id=1, bos_token_id=2, pad_token_id=0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)


SAVERS = dict(t5=save_t5, bert=save_bert, gpt2=save_gpt2, bart=save_bart, clip=save_clip)
DIMS = dict(hash=40, t5=32, bert=24, gpt2=24, bart=24, clip=24)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    res = {k: tmp_path_factory.mktemp(k) for k in SAVERS}
    for k, save in SAVERS.items(): save(res[k])
    return res


@pytest.fixture(params=['hash', *SAVERS])
def enc(request, folders):
    name = request.param
    return create_text_encoder(name, dim=40) if name == 'hash' else create_text_encoder(folders[name])


def test_contract(enc, request):
    emb, mask = enc(['a red circle', '', 'dog', 'a red circle'])
    assert enc.dim == DIMS[request.node.callspec.params['enc']] == emb.shape[2]
    assert emb.dtype == mask.dtype == torch.float32 and emb.shape[:2] == mask.shape and len(emb) == 4
    assert set(mask.unique().tolist()) <= {0., 1.}
    assert (mask.sum(1) >= 1).all(), 'the empty prompt has a token'
    assert (emb[mask == 0] == 0).all() and (emb[mask == 1].abs().sum(-1) > 0).all()
    assert torch.equal(emb[0], emb[3]) and not torch.allclose(emb[0], emb[2])
    assert not emb.requires_grad


def test_result_does_not_depend_on_company_or_cache(enc):
    long = 'a red circle on top a blue square dog cat'
    alone = enc(['red dog'])
    enc.cache.clear()
    emb, mask = enc([long, 'red dog', ''])
    n = alone[0].shape[1]
    assert torch.allclose(emb[1, :n], alone[0][0], atol=1e-5) and (emb[1, n:] == 0).all() and mask[1].sum() == n
    again, _ = enc([long, 'red dog', ''])
    assert torch.equal(again, emb)


def test_gradients_may_flow_behind_a_frozen_encoder(enc):
    w = torch.nn.Linear(enc.dim, 2)
    w(enc(['a dog'])[0]).sum().backward()
    assert w.weight.grad.abs().sum() > 0
    if hasattr(enc, 'model'): assert not enc.model.training and not any(p.requires_grad for p in enc.model.parameters())


def test_limits(folders):
    for name, width in [('hash', 6), (folders['t5'], 6), (folders['bert'], 6)]:
        enc = create_text_encoder(name, max_tokens=6)
        emb, mask = enc(['dog ' * 50])
        assert emb.shape[1] == width and mask.sum() == width
        assert not torch.allclose(emb[0, -1], enc(['dog dog dog'])[0][0, 2], atol=1e-3), 'the end token survives the cut'
    assert create_text_encoder(folders['bert'])(['dog ' * 50])[0].shape[1] == 16, 'never longer than the model can take'
    assert create_text_encoder(folders['t5'])(['dog ' * 200])[0].shape[1] == 128
    enc = create_text_encoder('hash', max_chars=9)
    assert torch.equal(enc(['red dog on top'])[0], enc(['red dog o'])[0]) and list(enc.cache) == ['red dog o']
    assert create_text_encoder('hash')(['x' * 600])[0].shape[1] == 2


def test_t5_is_the_plain_encoder_of_transformers(folders):
    from transformers import AutoTokenizer, T5ForConditionalGeneration
    tok, full = AutoTokenizer.from_pretrained(folders['t5']), T5ForConditionalGeneration.from_pretrained(folders['t5']).eval()
    prompts = ['a red circle', 'dog', '']
    t = tok(prompts, padding=True, return_tensors='pt')
    with torch.no_grad(): want = full.encoder(**{k: t[k] for k in ('input_ids', 'attention_mask')}).last_hidden_state * t.attention_mask[..., None]
    emb, mask = create_text_encoder(folders['t5'])(prompts)
    assert torch.allclose(emb, want, atol=1e-6) and torch.equal(mask, t.attention_mask.float())
    assert (t.input_ids[range(3), t.attention_mask.sum(1) - 1] == tok.eos_token_id).all()


def test_cache_encodes_once_and_stays_bounded(folders):
    enc = create_text_encoder(folders['t5'], cache_size=3)
    rows = []
    enc.model.register_forward_pre_hook(lambda m, a, kw: rows.append(len(kw['input_ids'])), with_kwargs=True)
    enc(['dog', 'cat', 'dog', 'dog'])
    enc(['cat', 'dog', 'red'])
    assert rows == [2, 1]
    emb, _ = enc(['a', 'blue', 'circle', 'square', 'dog'])      # more than fit: all right, just not all remembered
    assert len(enc.cache) == 3 and list(enc.cache) == ['circle', 'square', 'dog'] and emb.shape[0] == 5
    enc(['cat'])
    assert rows == [2, 1, 4, 1], 'dog was still there, cat was not'
    enc = create_text_encoder('hash', cache_size=2)
    for p in ('dog', 'cat', 'dog', 'red'): enc([p])
    assert list(enc.cache) == ['dog', 'red'], 'what was used last leaves last'
    none = create_text_encoder('hash', cache_size=0)
    assert none(['dog'])[0].shape[0] == 1 and len(none.cache) == 0


def test_callers_cannot_spoil_the_cache(enc):
    emb, _ = enc(['a dog'])
    before = emb.clone()
    emb.zero_()
    assert torch.equal(enc(['a dog'])[0], before)


def test_half_and_autocast(folders):
    full, half = (create_text_encoder(folders['t5'], half=h) for h in (False, True))
    a, b = full(['a red circle'])[0], half(['a red circle'])[0]
    assert b.dtype == torch.float32 and half.model.dtype == torch.bfloat16 and full.model.dtype == torch.float32
    assert 0 < (a - b).abs().max() < .1 * a.abs().max()
    full.cache.clear()
    with torch.autocast('cpu', dtype=torch.bfloat16): c = full(['a red circle'])[0]
    assert torch.equal(a, c)


def test_to_returns_the_encoder(enc):
    assert enc.to('cpu') is enc and enc(['dog'])[1].device.type == 'cpu'


@pytest.mark.parametrize('bad,error,text', [('a dog', TypeError, "write ['a dog']"), (['a', 3], TypeError, 'prompts[1] is 3'), ([None], TypeError, 'prompts[0]'),
                                            ([], ValueError, 'empty list'), (b'dog', TypeError, 'bytes')])
def test_prompts_that_are_not_strings(bad, error, text):
    with pytest.raises(error) as e: create_text_encoder('hash')(bad)
    assert text in str(e.value)


def test_unknown_encoders(folders, tmp_path):
    with pytest.raises(ValueError) as e: create_text_encoder('nobody/nothing-of-this-name')
    assert 'nobody/nothing-of-this-name' in str(e.value) and 'network' in str(e.value) and "'hash'" in str(e.value)
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError) as e: create_text_encoder(tmp_path/'empty')
    assert str(tmp_path/'empty') in str(e.value) and 'config.json' in str(e.value)
    with pytest.raises(ValueError, match='text.max_tokens is 0'): create_text_encoder('hash', max_tokens=0)


def test_missing_weights_are_an_error(folders, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    folder = tmp_path/'t5'
    shutil.copytree(folders['t5'], folder)
    weights = load_file(folder/'model.safetensors')
    name = next(k for k in weights if k.startswith('encoder.block.0'))
    del weights[name]
    save_file(weights, folder/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError) as e: create_text_encoder(folder)
    assert 'lack' in str(e.value) and name in str(e.value)


def test_hash_is_fixed_for_ever():
    "Independent of the module: SHAKE-256 of the word, bit by bit, most significant first (0x484d for 'red')."
    assert hashlib.shake_256(b'red').hexdigest(2) == '484d'
    assert [int(x) for x in word_vector('red', 16)] == [2 * int(b) - 1 for b in f'{0x484d:016b}']
    for w in ('circle', 'naïve', '猫', ','):
        bits = ''.join(f'{b:08b}' for b in hashlib.shake_256(w.encode()).digest(13))
        assert word_vector(w, 100).tolist() == [2. * int(b) - 1 for b in bits[:100]]
    code = "from mdm.text import *; print(create_text_encoder('hash', dim=33)(['A Red circle!'])[0].double().sum().item())"
    sums = {subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env={**os.environ, 'PYTHONHASHSEED': s}, capture_output=True, text=True, check=True).stdout for s in '12'}
    assert len(sums) == 1


def test_hash_ignores_case_and_the_random_state():
    enc = HashEncoder(TextConfig(dim=24), cache_size=0)
    torch.manual_seed(1)
    a = enc(['Red  Dog'])[0]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(enc(['red dog'])[0], a)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(2).get_state()) and not torch.equal(state, torch.get_rng_state())


def test_hash_knows_order_and_odd_widths():
    enc = create_text_encoder('hash', dim=31)
    assert enc.dim == 31 and not torch.allclose(enc(['dog on cat'])[0], enc(['cat on dog'])[0])
    assert position_codes(4, 31).shape == (4, 31) and create_text_encoder('hash', dim=1)(['x'])[0].shape == (1, 2, 1)


@pytest.mark.parametrize('text', ['\x00', '\ud800 half', '🦊', ' \n\t', '</end>', 'x' * 10000, '_'])
def test_hash_takes_any_string(text):
    emb, mask = create_text_encoder('hash', dim=16)([text])
    assert torch.isfinite(emb).all() and mask.sum() >= 1 and split_words(text)[:-1].count('</end>') == 0


def test_import_is_light():
    code = "import sys, mdm.text as t; t.create_text_encoder('hash')(['dog']); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

# ---- prompts that are cut

@pytest.mark.parametrize('prompt, rest', [('', ''), ('a red circle', ''), (' '.join(['w']*127), ''), (' '.join(['w']*127) + ' ', ''), (' '.join(['a']*127) + ' end here', 'end here'), ('x'*512, ''), ('x'*512 + 'yz', 'yz'),
    (', '*300, None), (' '.join(['Größe']*200), None)])
def test_what_is_cut_is_told(prompt, rest):
    "What is left, encoded alone, gives the same; what is reported is all that is missing."
    encoder = create_text_encoder('hash', dim=8)
    found = encoder.cut(prompt)
    assert found == rest or rest is None and found
    assert prompt.endswith(found)
    kept = prompt[:len(prompt) - len(found)]
    assert torch.equal(encoder([prompt])[0], encoder([kept])[0]) and encoder.cut(kept) == ''

def test_cuts_of_many_prompts():
    encoder = create_text_encoder('hash', dim=8, max_tokens=3)
    assert encoder.describe_cuts(['a b', 'c']) == ''
    assert "the prompt 'a b c d'... is longer" in (one := encoder.describe_cuts(['a b c d', 'a b', 'a b c d'])) and "3 characters are left out, from 'c d'" in one and '\n' not in one
    assert '2 prompts are longer' in encoder.describe_cuts(['a b c', 'a b c d'])
