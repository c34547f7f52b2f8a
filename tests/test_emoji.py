"Emoji: names, drawings, the split of combinations, shards and the presets."
import io, json, random, re, sys
from collections import Counter
import numpy as np
import pytest
from PIL import Image
from mdm.cli.dataset import mdm_dataset
from mdm.data import emoji as module
from mdm.data.configs import EmojiConfig
from mdm.data.emoji import (Emoji, draw_emoji, emoji_captions, emoji_sample, find_emoji_font, list_emoji, place_emoji, tint,
                            tint_colours, tints_of, write_emoji)
from mdm.data.inspect import read_samples
from mdm.data.samples import Skip, get_captions
from mdm.recipe import load_recipe

few = '^(?!(cat|red apple|snowman|pizza|blue heart|bicycle)$)'

@pytest.fixture(scope='module')
def font(): return find_emoji_font()

def samples_in(folder): return [o for _, _, o in read_samples(sorted(folder.glob('*.tar')))]
def facts(sample): return json.loads(sample['json'])

def test_names_are_words():
    "Names are lower case words, each emoji has one, no two have the same first name, and variants of skin colour are left out."
    found = list_emoji(flags=True)
    assert len(found) > 1800 and len(list_emoji()) < len(found) - 200
    assert not any(re.search('[_:A-Z]', name) for o in found for name in o.names)
    assert not any(re.search('[\U0001F3FB-\U0001F3FF]', o.text) for o in found)
    assert max(Counter(o.names[0] for o in found).values()) == 1
    names = {o.text: o.names for o in found}
    assert names['🐱'][:2] == ('cat face', 'cat') and names['🇫🇷'][0] == 'france'

def test_exclude(capsys, tmp_path):
    "An expression leaves emoji out; a wrong one, and one that leaves nothing, are named."
    assert {o.names[0] for o in list_emoji('^(?!cat)')} < {o.names[0] for o in list_emoji()}
    assert mdm_dataset(['emoji', str(tmp_path/'a'), '--exclude', '(']) == 2
    assert "exclude: '(' is no regular expression" in capsys.readouterr().err
    assert mdm_dataset(['emoji', str(tmp_path/'a'), '--exclude', '.']) == 2
    assert 'matches every emoji' in capsys.readouterr().err

def test_missing_package(monkeypatch):
    "Without the package, the error says what to install."
    monkeypatch.setitem(sys.modules, 'emoji', None)
    with pytest.raises(ImportError, match=r'matryoshka-diffusion\[data\]'): list_emoji()

def test_missing_font(monkeypatch, tmp_path, capsys):
    "No font, a file that is not there, and a file that is no such font: each error says what to do."
    monkeypatch.setattr('matplotlib.font_manager.findSystemFonts', lambda: [])
    with pytest.raises(FileNotFoundError, match='install fonts-noto-color-emoji, or name the file'): find_emoji_font()
    assert mdm_dataset(['emoji', str(tmp_path/'a'), '--font', 'absent.ttf']) == 2
    assert 'absent.ttf is not there' in capsys.readouterr().err
    (tmp_path/'text.ttf').write_text('no font')
    assert mdm_dataset(['emoji', str(tmp_path/'a'), '--font', str(tmp_path/'text.ttf')]) == 2
    assert 'text.ttf: not a font with bitmaps' in capsys.readouterr().err

def test_a_font_without_colours():
    "An ordinary font has no coloured pictures: refused, not drawn in black."
    from matplotlib import font_manager
    plain = font_manager.findfont('DejaVu Sans')
    with pytest.raises(ValueError, match='no coloured pictures'): draw_emoji('🐱', plain)

def test_drawings(font):
    "A drawing is square and coloured; unknown characters and several emoji are skipped."
    cat = np.array(draw_emoji('🐱', font))
    assert cat.shape == (136, 136, 4) and (cat[..., 3] > 0).mean() > .3
    assert np.ptp(cat[cat[..., 3] > 200][:, :3].mean(0)) > 50
    for text in ('\U0001FAFF', '🐱🐶🐭', ' '):
        with pytest.raises(Skip): draw_emoji(text, font)

def test_tints_differ(font):
    "Every colour gives another picture, with the drawing's outline, and in its own hue."
    cat = draw_emoji('🐱', font)
    tinted = {c: np.array(tint(cat, c)) for c in tint_colours}
    assert all((o[..., 3] == np.array(cat)[..., 3]).all() for o in tinted.values())
    means = {c: o[o[..., 3] > 200][:, :3].mean(0) for c, o in tinted.items()}
    for c, mean in means.items():
        others = [np.linalg.norm(mean - m) for d, m in means.items() if d != c]
        assert min(others) > 5, c
    for c in ('red', 'green', 'blue'): assert means[c].argmax() == ('red', 'green', 'blue').index(c)

def test_flat_drawings_take_the_colour():
    "A drawing of one colour, whose lightness has no range, is tinted too."
    flat = Image.new('RGBA', (8, 8), (10, 10, 10, 255))
    assert np.array(tint(flat, 'blue'))[0, 0, :3].argmax() == 2

def test_held_out_combinations():
    "Three of ten combinations are held out; both sides together are all; names with a colour have none."
    found = list_emoji()
    seen, unseen = [{(o.text, c) for o in found for c in tints_of(o, h)} for h in (False, True)]
    assert not seen & unseen
    plain = [o for o in found if tints_of(o) or tints_of(o, True)]
    assert len(seen) + len(unseen) == len(plain)*len(tint_colours)
    assert abs(len(unseen)/len(seen | unseen) - .3) < .01
    assert not tints_of(Emoji('💚', ('green heart',)))

def test_captions():
    "The plain name is first and most frequent; a colour is in every wording."
    cat = Emoji('🐱', ('cat face', 'cat'))
    assert list(emoji_captions(cat))[0] == 'cat face' and 'cat' in emoji_captions(cat)
    assert all('blue' in o for o in emoji_captions(cat, 'blue'))
    assert max(emoji_captions(cat, 'blue').values()) == emoji_captions(cat, 'blue')['blue cat face']

def test_pictures_are_whole(font):
    "Drawings stay inside of the picture, and vary."
    glyph = draw_emoji('🟥', font)
    pictures = [np.array(place_emoji(glyph, 32, random.Random(k))) for k in range(8)]
    for p in pictures: assert (p[[0, -1]] > 200).all() and (p[:, [0, -1]] > 200).all()
    assert len({p.tobytes() for p in pictures}) == 8

def test_samples_depend_on_their_number_alone(font):
    "The same number gives the same bytes; another seed gives others; every caption can be read."
    found, config = list_emoji(few), EmojiConfig(size=32)
    n = len(found)
    assert emoji_sample(1, found, config, font) == emoji_sample(1, found, config, font)
    other = emoji_sample(1, found, EmojiConfig(size=32, seed=1), font)
    assert other['png'] != emoji_sample(1, found, config, font)['png'] and other['txt'] == emoji_sample(1, found, config, font)['txt']
    assert set(get_captions(other)) == set(emoji_captions(found[1]))
    for i in range(n*3): assert facts(emoji_sample(i, found, config, font))['colour'] is None

def test_shards_resume(font, tmp_path):
    "A run that was cut off goes on, and gives the same files; another setting is refused."
    kwargs = dict(size=32, variants=2, tints=1, exclude=few, per_shard=4)
    whole = write_emoji(tmp_path/'whole', **kwargs)
    real, count = module.emoji_sample, Counter()
    def breaks(*args):
        count['calls'] += 1
        if count['calls'] == 8: raise KeyboardInterrupt
        return real(*args)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'emoji_sample', breaks)
        with pytest.raises(KeyboardInterrupt): write_emoji(tmp_path/'cut', **kwargs)
    assert write_emoji(tmp_path/'cut', **kwargs)['shards'] == whole['shards']
    for path in (tmp_path/'whole').glob('*.tar'): assert path.read_bytes() == (tmp_path/'cut'/path.name).read_bytes()
    with pytest.raises((ValueError, FileExistsError)): write_emoji(tmp_path/'whole', **{**kwargs, 'tints': 2})

def test_command(tmp_path, capsys):
    "The command writes a training set and a held-out one without a common combination, and says what comes next."
    assert mdm_dataset(['emoji', str(tmp_path/'train'), '--size', '32', '--exclude', few, '--tints', '3']) == 0
    assert 'mdm_train --stages emoji_32,emoji emoji:train.freeze_inner_steps=850 --data' in capsys.readouterr().out
    assert mdm_dataset(['emoji', str(tmp_path/'test'), '--size', '32', '--exclude', few, '--held-out']) == 0
    train, test = [{(facts(o)['emoji'], facts(o)['colour']) for o in samples_in(tmp_path/k)} for k in ('train', 'test')]
    assert test and not train & test and not any(c is None for _, c in test)
    assert Image.open(io.BytesIO(samples_in(tmp_path/'train')[0]['png'])).size == (32, 32)

def test_presets_fit():
    "The first stage is the inner network of the second, number by number."
    small, large = load_recipe('emoji_32'), load_recipe('emoji')
    assert small.model == large.model.inner
    assert (small.text, small.diffusion.prediction, small.data.image_size*2) == (large.text, large.diffusion.prediction, large.data.image_size)
