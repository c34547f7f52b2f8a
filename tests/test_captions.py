"Captions as people bring them: several of one picture, tables that are unclear or damaged, other programs' files; and what training makes of them."
import json, re, shlex
from collections import Counter
from dataclasses import fields

import numpy as np, pytest
from PIL import Image
from data_tools import encode, interrupt, load, picture, quiet, tar_bytes
from mdm.cli.dataset import mdm_dataset
from mdm.data.captions import CaptionConfig, caption_files, choose, edit_caption
from mdm.data.embeddings import embed_shards
from mdm.data.files import MISFIT, find_tars, read_manifest
from mdm.data.inspect import describe_shards, inspect_shards, read_samples, split_shards
from mdm.data.parquet import write_parquet
from mdm.data.samples import BAD_CAPTION, BAD_PICTURE, NO_CAPTION, NO_PICTURE, get_captions
from mdm.data.shards import NOT_THERE, REPORT, write_folder
from mdm.data.stream import DataConfig
from mdm.data.urls import read_urls
from mdm.recipe import load_recipe
from mdm.text import TextConfig, create_text_encoder
from mdm.utils.configs import violations


def put(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names): (folder/name).write_bytes(encode(picture(i)))
    return folder


def made(folder): return {json.loads(s['json']).get('file'): get_captions(s) for *_, s in read_samples(find_tars(folder))}
def report(folder): return [line.split('\t') for line in (folder/REPORT).read_text().splitlines()[1:]]


def tar_of(path, *captions):
    "A tar of pictures with these captions, each a dictionary with weights."
    path.write_bytes(tar_bytes([f for i, c in enumerate(captions) for f in [(f'{i:03d}.png', encode(picture(i))), *[(f'{i:03d}.{ext}', data) for ext, data in caption_files(c).items()]]]))
    return [str(path)]


# --- tables that are unclear, and rows that do not fit

@pytest.mark.parametrize('line, what', [('17\thttps://a.org/1.jpg\ta cat', "1 '17', 2 'https://a.org/1.jpg', 3 'a cat'"), ('https://a.org/1.jpg\ta cat\t0.7', '--url-column 1 --caption-column 2'),
                                        ('https://a.org/1.jpg\thttps://a.org/page', 'not clear which of its 2 columns')])
def test_a_list_without_names_is_refused_when_it_is_unclear(tmp_path, line, what):
    (tmp_path/'a.tsv').write_text(f'{line}\n')
    with pytest.raises(ValueError, match=re.escape(what)): list(read_urls(tmp_path/'a.tsv'))


def test_columns_by_number_and_several_of_them(tmp_path):
    (tmp_path/'a.tsv').write_text('17\thttps://a.org/1.jpg\ta cat\thttps://a.org\t0.7\n')
    assert list(read_urls(tmp_path/'a.tsv', '2', '3')) == [('https://a.org/1.jpg', 'a cat')]
    with pytest.raises(ValueError, match='no column for the caption'): list(read_urls(tmp_path/'a.tsv', '2', '6'))
    (tmp_path/'b.csv').write_text('url,short,long\nhttps://a.org/1.jpg,a cat,"a cat, asleep"\nhttps://a.org/2.jpg,a dog,\n')
    assert list(read_urls(tmp_path/'b.csv', caption='short, long:3')) == [('https://a.org/1.jpg', {'a cat': 1, 'a cat, asleep': 3}), ('https://a.org/2.jpg', 'a dog')]


@pytest.mark.parametrize('header, what', [('url,text,caption', 'may hold the caption: text, caption; name one of them .see --caption-column'), ('url,link,text', 'may hold the address: url, link'), ('url,text,Text', 'text, Text'), ('url,text,text', 'text, text')])
def test_two_possible_columns_are_refused_by_name(tmp_path, header, what):
    (tmp_path/'a.csv').write_text(f'{header}\nhttps://a.org/1.jpg,x,y\n')
    with pytest.raises(ValueError, match=what): list(read_urls(tmp_path/'a.csv'))
    put(tmp_path/'in', 'a.png')
    (tmp_path/'in'/'metadata.csv').write_text(header.replace('url', 'file_name') + '\na.png,x,y\n')
    if 'link' not in header:
        with pytest.raises(ValueError, match=re.escape('metadata.csv has several columns')): write_folder(tmp_path/'in', tmp_path/'out')


def test_captions_in_parquet_are_texts(tmp_path):
    pa = pytest.importorskip('pyarrow'); pq = pytest.importorskip('pyarrow.parquet')
    cells = {'a': [['a cat', 'a tabby'], ['a dog'], [], None], 'b': [b'a cat', 'ein Bär'.encode(), b'\xff', None], 'c': [1, 2, 3, None], 'd': [{'x': 'a cat'}]*4}
    pq.write_table(pa.table({'url': [f'https://a.org/{i}.jpg' for i in range(4)], **cells}), tmp_path/'a.parquet')
    got = lambda c: [o for _, o in read_urls(tmp_path/'a.parquet', caption=c)]
    assert got('a') == [{'a cat': 1, 'a tabby': 1}, 'a dog', '', '']
    assert got('b') == ['a cat', 'ein Bär', '\udcff', ''] and got('c') == got('d') == ['', '', '', '']


def test_rows_that_do_not_fit_are_counted_with_their_lines(tmp_path):
    put(tmp_path/'in', *[f'{i}.png' for i in range(6)])
    (tmp_path/'in'/'metadata.csv').write_text('file_name,text\n0.png,a cat\n1.png,a cat, asleep\n2.png\n3.png,"open\n4.png,"a ""cat"", asleep"\n5.png,a dog,,\n4.png,one, too many\nnone.png,x,y\n')
    m = write_folder(tmp_path/'in', tmp_path/'out')
    assert made(tmp_path/'out') == {'0.png': {'a cat': 1}, '3.png': {'"open': 1}, '4.png': {'a "cat", asleep': 1}, '5.png': {'a dog': 1}}
    assert sorted((o[0], o[2].split(' for')[0]) for o in report(tmp_path/'out')) == [
        ('1.png', 'metadata.csv, line 3: 3 cells'), ('2.png', 'metadata.csv, line 4: 1 cell'), ('metadata.csv, line 8', 'metadata.csv, line 8: 3 cells'), ('metadata.csv, line 9', 'metadata.csv, line 9: 3 cells')]
    assert m['skipped'] == {MISFIT: 4}


def test_a_first_row_that_lacks_a_field(tmp_path):
    put(tmp_path/'in', 'a.png', 'b.png')
    (tmp_path/'in'/'metadata.jsonl').write_text('{"file_name": "a.png"}\n{"file_name": "b.png", "text": "B"}\n{"text": "of no file"}\n')
    write_folder(tmp_path/'in', tmp_path/'out')
    assert made(tmp_path/'out') == {'b.png': {'B': 1}}
    assert sorted(o[:2] for o in report(tmp_path/'out')) == [['a.png', NO_CAPTION], ['metadata.jsonl, line 3', MISFIT]]


# --- several captions

def test_repeated_rows_lists_and_two_tables(tmp_path):
    put(tmp_path/'in', 'a.png', 'b.png', 'c.png', 'd.png')
    (tmp_path/'in'/'metadata.csv').write_text('file_name,text\na.png,A\na.png,also A\nb.png,B\nc.png,C\ngone.png,G\n')
    (tmp_path/'in'/'metadata.jsonl').write_text('\n'.join(map(json.dumps, [dict(file_name='b.png', text=['B', 'once more', '\u200b']), dict(file_name='c.png', text='C'), dict(file_name='d.png', text=['short', 'long'], caption_weights=[1, 3])])))
    m = write_folder(tmp_path/'in', tmp_path/'out')
    assert made(tmp_path/'out') == {'a.png': {'A': 1, 'also A': 1}, 'b.png': {'B': 2, 'once more': 1}, 'c.png': {'C': 1}, 'd.png': {'short': 1, 'long': 3}}
    assert m['skipped'] == {NOT_THERE: 1}
    found = inspect_shards(tmp_path/'out')
    assert found.counts()['captions'] == {2: 3, 1: 1} and '7 in all, 3 pictures have several, up to 2 each' in describe_shards(found)


@pytest.mark.parametrize('name', ['metadata.tsv', 'metadata.parquet', 'captions.jsonl', 'captions.csv'])
def test_tables_of_other_kinds(tmp_path, name):
    put(tmp_path/'in'/'train', 'a.png', 'b.png')
    rows, path = [dict(file_name='a.png', text='a "cat"', score=1), dict(file_name='b.png', text='a dog, asleep', score=2)], tmp_path/'in'/'train'/name
    if name.endswith('parquet'): pytest.importorskip('pyarrow.parquet').write_table(pytest.importorskip('pyarrow').Table.from_pylist(rows), path)
    elif name.endswith('jsonl'): path.write_text('\n'.join(map(json.dumps, rows)))
    elif name.endswith('tsv'): path.write_text('file_name\ttext\na.png\ta "cat"\nb.png\t"a dog, asleep"\n')
    else: path.write_text('file_name,text\na.png,"a ""cat"""\nb.png,"a dog, asleep"\n')
    write_folder(tmp_path/'in', tmp_path/'out')
    assert made(tmp_path/'out') == {'train/a.png': {'a "cat"': 1}, 'train/b.png': {'a dog, asleep': 1}}


def test_captions_beside_pictures(tmp_path):
    put(tmp_path/'in', *'abcdef')
    for o in 'abcdef': (tmp_path/'in'/o).rename(tmp_path/'in'/f'{o}.png')
    for name, text in {'a.txt': 'A\nB\n\nA', 'b.caption': 'C', 'c.txt': ' ', 'c.caption': 'D', 'd.json': '{"caption": ["E", "F"], "long": "G"}', 'e.txt': 'H', 'e.json': '{"long": "I"}', 'f.txt': '', 'f.json': '{"caption": "J"}'}.items(): (tmp_path/'in'/name).write_text(text)
    usual = {'a.png': {'A\nB\n\nA': 1}, 'b.png': {'C': 1}, 'c.png': {'D': 1}, 'd.png': {'E': 1, 'F': 1}, 'e.png': {'H': 1}, 'f.png': {'J': 1}}
    write_folder(tmp_path/'in', tmp_path/'1')
    assert made(tmp_path/'1') == usual
    write_folder(tmp_path/'in', tmp_path/'2', caption_lines=True)
    assert made(tmp_path/'2') == {**usual, 'a.png': {'A': 2, 'B': 1}}
    write_folder(tmp_path/'in', tmp_path/'3', caption_key='txt, long:3')
    assert made(tmp_path/'3') == {'a.png': usual['a.png'], 'b.png': {'C': 1}, 'c.png': {'D': 1}, 'd.png': {'G': 1}, 'e.png': {'H': 1, 'I': 3}}
    with pytest.raises(FileExistsError, match='caption_key was'): write_folder(tmp_path/'in', tmp_path/'3', caption_key='long')


def test_captions_from_file_names(tmp_path, capsys):
    "A name is a caption only where asked for, and where nothing else says what the picture shows; a damaged text is no missing one."
    put(tmp_path/'in', 'red_apple-02.png', 'old-red_apple (3).png', 'IMG_0412.png', 'told.png', 'row_1.png', 'damaged.png', 'scored_pear.png')
    for name, data in {'told.txt': b'a pear', 'damaged.txt': b'\xff\xfe', 'scored_pear.json': b'{"aesthetic": 6}', 'metadata.csv': b'file_name,text\nrow_1.png,a row\n'}.items(): (tmp_path/'in'/name).write_bytes(data)
    told = {'told.png': {'a pear': 1}, 'row_1.png': {'a row': 1}}
    write_folder(tmp_path/'in', tmp_path/'plain')
    assert made(tmp_path/'plain') == told
    assert mdm_dataset(['folder', str(tmp_path/'in'), str(tmp_path/'named'), '--caption-names']) == 0
    assert made(tmp_path/'named') == {**told, 'red_apple-02.png': {'red apple': 1}, 'old-red_apple (3).png': {'old red apple': 1}, 'scored_pear.png': {'scored pear': 1}}
    assert read_manifest(tmp_path/'named')['skipped'] == {NO_CAPTION: 1, BAD_CAPTION: 1}
    with pytest.raises(FileExistsError, match='caption_names'): write_folder(tmp_path/'in', tmp_path/'named')


def test_a_folder_without_several_captions_gives_the_shards_that_it_gave(tmp_path):
    "Bytes of the files of a sample as they were before there were several captions."
    put(tmp_path/'in', 'a.png')
    (tmp_path/'in'/'a.txt').write_text(' a cat\n')
    write_folder(tmp_path/'in', tmp_path/'out')
    (_, _, s), = read_samples(find_tars(tmp_path/'out'))
    assert {k: v for k, v in s.items() if k != '__key__'} == {'png': encode(picture(0)), 'txt': b'a cat', 'json': b'{"file": "a.png"}'}
    assert read_manifest(tmp_path/'out')['settings'].keys() == {'kind', 'source', 'resize', 'name', 'per_shard', 'max_bytes'}


# --- the choice in training

def per_epoch(loader, epochs):
    "caption of each picture in each epoch"
    seen = []
    for _ in range(epochs): seen.append({int(img[0, 0, 0]): c for b in quiet(loader) for img, c in zip(b[0], b[1])})
    return seen


def test_each_caption_in_its_turn(tmp_path):
    files = tar_of(tmp_path/'a.tar', {'a': 1, 'b': 1}, {'c': 1}, {'d': 3, 'e': 1}, {'f': 1, 'g': 1, 'h': 1})
    seen = per_epoch(load(files, train=True, seed=3), 24)
    used = [Counter(e[i] for e in seen) for i in range(4)]
    for got, weights in zip(used, [{'a': 1, 'b': 1}, {'c': 1}, {'d': 3, 'e': 1}, {'f': 1, 'g': 1, 'h': 1}]):
        assert all(abs(got[c] - 24*w/sum(weights.values())) <= 2 for c, w in weights.items()), (got, weights)
    assert per_epoch(load(files, train=True, seed=3, workers=2), 6) == seen[:6]                # whatever the number of workers
    assert per_epoch(load(files, train=True, seed=4), 24) != seen
    assert per_epoch(load(files), 3) == [{0: 'a', 1: 'c', 2: 'd', 3: 'f'}]*3                   # validation: always the first
    assert per_epoch(load(files, train=True, caption_choice='first'), 3) == [{0: 'a', 1: 'c', 2: 'd', 3: 'f'}]*3


def test_an_epoch_of_many_passes_uses_all_captions(tmp_path):
    "The turn counts passes over the pictures, not epochs, also in a mixture."
    a, b = tar_of(tmp_path/'a.tar', {'a': 1, 'b': 1}), tar_of(tmp_path/'b.tar', {'c': 1, 'd': 1})
    loader = load([*a, *b], train=True, epoch_size=60, weights=[2, 1])
    used = Counter(c for batch in quiet(loader) for c in batch[1])
    assert all(abs(used[c] - n) <= 2 for c, n in dict(a=20, b=20, c=10, d=10).items()), used


@pytest.mark.parametrize('workers', [0, 2])
def test_going_on_makes_the_same_choices(tmp_path, workers):
    tags = [{f'{i}, red, green, blue, {o}': 1 for o in 'xyz'} for i in range(12)]
    files, options = tar_of(tmp_path/'a.tar', *tags), dict(train=True, n=2, workers=workers, tag_shuffle=True, tag_dropout=.3, tag_keep=1, epoch_size=24, shuffle=5)
    whole = load(files, **options)
    want = [b[1] for _ in range(2) for b in quiet(whole)]
    for stop in (1, 7, 12, 17):
        one, n = load(files, **options), 0
        while n < stop:
            for _ in one:
                n += 1
                if n == stop:
                    state = one.state_dict()
                    break
        other = load(files, **options)
        other.load_state_dict(json.loads(json.dumps(state)))
        rest = [b[1] for b in quiet(other)]
        if stop < 12: rest += [b[1] for b in quiet(other)]
        assert rest == want[stop:], stop


def test_tags_and_templates(tmp_path):
    files = tar_of(tmp_path/'a.tar', {'girl, red hair, smile, tree': 1}, {'a cat': 1})
    assert per_epoch(load(files, train=True), 1) == [{0: 'girl, red hair, smile, tree', 1: 'a cat'}]       # off by default
    options = dict(tag_shuffle=True, tag_dropout=.4, tag_keep=1, caption_template='a photo of {caption}!')
    seen = per_epoch(load(files, train=True, **options), 30)
    assert len({e[0] for e in seen}) > 8 and {e[1] for e in seen} == {'a photo of a cat!'}
    assert all(e[0].startswith('a photo of girl') and e[0].endswith('!') for e in seen) and seen == per_epoch(load(files, train=True, **options), 30)
    assert per_epoch(load(files, **options), 1) == [{0: 'a photo of girl, red hair, smile, tree!', 1: 'a photo of a cat!'}]
    recipe = load_recipe('shapes', ['data.caption_template=a photo of {caption}', 'data.tag_keep=2'])
    assert (recipe.data.caption_template, recipe.data.tag_keep) == ('a photo of {caption}', 2)
    for k, v in (('caption_template', 'a photo'), ('caption_key', 'a:x'), ('tag_dropout', 1)):
        with pytest.raises(ValueError, match=f'data.{k}'): load_recipe('shapes', [f'data.{k}={v}'])


def test_the_key_of_the_caption(tmp_path, capsys):
    json_of = lambda i: json.dumps({'short': f's{i}', 'long': [f'l{i}', f'm{i}']}).encode()
    (tmp_path/'a.tar').write_bytes(tar_bytes([f for i in range(3) for f in [(f'{i}.png', encode(picture(i))), (f'{i}.json', json_of(i))]]))
    files = [str(tmp_path/'a.tar')]
    assert per_epoch(load(files, caption_key='short'), 1) == [{i: f's{i}' for i in range(3)}]
    used = Counter(c for e in per_epoch(load(files, train=True, caption_key='short, long:3'), 40) for c in e.values())
    assert all(abs(used[f'{o}{i}'] - n) <= 2 for i in range(3) for o, n in dict(s=10, l=15, m=15).items()), used
    assert mdm_dataset(['inspect', *files, '--output', str(tmp_path/'look'), '--caption-key', 'long']) == 0
    assert '3 samples, of which 3 can be used' in capsys.readouterr().out and json.loads((tmp_path/'look'/'counts.json').read_text())['captions'] == {'2': 3}
    assert mdm_dataset(['inspect', *files, '--output', str(tmp_path/'look')]) == 0 and f'3 x {NO_CAPTION}' in capsys.readouterr().out


def test_a_split_keeps_the_captions_of_a_picture_together(tmp_path):
    tar_of(tmp_path/'a.tar', *[{f'a{i}': 1, f'b{i}': 2} for i in range(40)])
    split_shards(tmp_path/'a.tar', tmp_path/'s', percent=30)
    sides = [[get_captions(s) for *_, s in read_samples(find_tars(tmp_path/'s'/o))] for o in ('train', 'valid')]
    assert len(sides[0]) + len(sides[1]) == 40 and all(len(c) == 2 and [*c.values()] == [1, 2] for o in sides for c in o)


# --- embeddings

def test_every_caption_has_its_embedding(tmp_path):
    files, config = tar_of(tmp_path/'a.tar', {'a cat': 1, 'a cat asleep': 1, 'tabby': 1}, {'a dog': 1}), TextConfig(dim=8)
    embed_shards(files, tmp_path/'e', config, batch_size=2)
    encoder, loader, seen = create_text_encoder(config), load([str(tmp_path/'e'/'*.tar')], train=True, embeddings=True), set()
    for _ in range(5):
        for c in (c for b in quiet(loader) for c in b[1]):
            emb, mask = encoder([str(c)])
            assert np.abs(c.embedding - emb[0][mask[0].bool()].numpy()).max() < 2e-3, c
            seen.add(str(c))
    assert seen == {'a cat', 'a cat asleep', 'tabby', 'a dog'}
    for k, v in dict(tag_shuffle=True, caption_template='x {caption}', caption_key='long').items():
        assert violations(DataConfig(embeddings=True, **{k: v}))[0].startswith('embeddings: found True, expected false where')
    assert not violations(DataConfig(embeddings=True))


def test_embeddings_of_captions_under_another_key(tmp_path):
    (tmp_path/'a.tar').write_bytes(tar_bytes([('0.png', encode(picture(0))), ('0.txt', b'file 17'), ('0.json', b'{"long": ["a cat", "a tabby"], "w": 3}')]))
    embed_shards([str(tmp_path/'a.tar')], tmp_path/'e', TextConfig(dim=8), caption_key='long')
    (_, _, s), = read_samples(find_tars(tmp_path/'e'))
    assert get_captions(s) == {'a cat': 1, 'a tabby': 1} and json.loads(s['json'])['w'] == 3 and {'emb.npy', 'embs.npz'} <= s.keys()
    with pytest.raises(FileExistsError, match="caption key 'long' and None"): embed_shards([str(tmp_path/'a.tar')], tmp_path/'e', TextConfig(dim=8))


# --- Hugging Face

def test_parquet_files_with_pictures(tmp_path, capsys):
    pa = pytest.importorskip('pyarrow'); pq = pytest.importorskip('pyarrow.parquet')
    (tmp_path/'data').mkdir()
    for k in range(2):
        rows = [dict(image={'bytes': encode(picture(10*k + i)), 'path': f'{i}.png'}, text=f'picture {10*k + i}', score=.5) for i in range(10)]
        rows[3]['image'], rows[4]['text'], rows[5]['image'] = None, None, {'bytes': b'no picture', 'path': 'x'}
        pq.write_table(pa.Table.from_pylist(rows), tmp_path/'data'/f'train-{k}.parquet', row_group_size=4)
    assert mdm_dataset(['parquet', str(tmp_path/'data'), '--output', str(tmp_path/'out'), '--per-shard', '6']) == 0
    assert '14 pictures' in (out := capsys.readouterr().out) and '6 left out' in out
    m = read_manifest(tmp_path/'out')
    assert m['skipped'] == {BAD_PICTURE: 2, NO_CAPTION: 2, NO_PICTURE: 2} and [o['samples'] for o in m['shards'].values()] == [6, 6, 2]
    got = [s for *_, s in read_samples(find_tars(tmp_path/'out'))]
    assert [s['txt'].decode() for s in got] == [f'picture {i}' for i in range(20) if i % 10 not in (3, 4, 5)] and got[0]['png'] == encode(picture(0)) and len({s['__key__'] for s in got}) == 14
    before = {p.name: p.read_bytes() for p in (tmp_path/'out').iterdir()}
    write_parquet(tmp_path/'data', tmp_path/'again', per_shard=6)
    for name in ('pictures-000000.tar', 'pictures-000002.tar'): assert (tmp_path/'again'/name).read_bytes() == before[name]
    table = pq.read_table(tmp_path/'data'/'train-0.parquet')
    pq.write_table(table.append_column('mask', table['image']), tmp_path/'two.parquet')
    with pytest.raises(ValueError, match='may hold the picture: image, mask.*--picture-column'): write_parquet(tmp_path/'two.parquet', tmp_path/'other')
    assert sum(o['samples'] for o in write_parquet(tmp_path/'two.parquet', tmp_path/'other', picture_column='mask')['shards'].values()) == 7


def test_a_run_over_parquet_files_goes_on_after_a_stop(tmp_path, monkeypatch):
    pa = pytest.importorskip('pyarrow'); pq = pytest.importorskip('pyarrow.parquet')
    for k in range(3): pq.write_table(pa.table({'image': [encode(picture(5*k + i)) for i in range(5)], 'text': [f'picture {5*k + i}' for i in range(5)]}), tmp_path/f'{k}.parquet')
    write_parquet(tmp_path/'*.parquet', tmp_path/'whole', per_shard=3)
    go_on = interrupt(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt): write_parquet(tmp_path/'*.parquet', tmp_path/'out', per_shard=3)
    go_on()
    write_parquet(tmp_path/'*.parquet', tmp_path/'out', per_shard=3)
    for p in (tmp_path/'whole').iterdir(): assert (tmp_path/'out'/p.name).read_bytes() == p.read_bytes(), p.name


# --- folders with odd names

@pytest.mark.parametrize('name', ['a[1]', 'b{x,y}', 'c{0..3}', 'd [x] {y}', 'e*', "f'?"])
def test_the_printed_next_command_works_whatever_the_folder_is_called(tmp_path, name, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path/'in', 'a.png', 'b.png')
    for o in 'ab': (tmp_path/'in'/f'{o}.txt').write_text(o)
    assert mdm_dataset(['folder', 'in', name]) == 0
    command = shlex.split(capsys.readouterr().out.split('Now try: ')[1])
    assert command[:2] == ['mdm_dataset', 'inspect'] and mdm_dataset(command[1:]) == 0
    assert '2 samples, of which 2 can be used' in capsys.readouterr().out
    assert mdm_dataset(['inspect', name]) == 0 and sorted(c for e in per_epoch(load([f'{name}/*.tar']), 1) for c in e.values()) == ['a', 'b']


def test_choices_and_edits_depend_on_nothing_else():
    assert [choose([1, 2], 'k', t, 0) for t in range(9)] == [choose([1, 2], 'k', t, 0) for t in range(9)]
    assert CaptionConfig().edits is False and edit_caption('a,b', CaptionConfig()) == 'a,b'
    assert {f.name for f in fields(CaptionConfig)} <= {f.name for f in fields(DataConfig)}

def test_numbers_beside_a_picture_reach_the_filters(tmp_path):
    (tmp_path/'photos').mkdir()
    for k, score in enumerate((3, 7)):
        Image.new('RGB', (40, 40), 'red').save(tmp_path/'photos'/f'{k}.png')
        (tmp_path/'photos'/f'{k}.json').write_text(json.dumps(dict(caption='a red square', aesthetic=score)))
    (tmp_path/'photos'/'2.png').write_bytes((tmp_path/'photos'/'1.png').read_bytes())
    (tmp_path/'photos'/'2.txt').write_text('a red square')
    (tmp_path/'photos'/'2.json').write_text('{ damaged')
    write_folder(tmp_path/'photos', tmp_path/'shards')
    found = inspect_shards([str(tmp_path/'shards'/'*.tar')], 0, filters=['aesthetic > 5'])
    assert (found.samples, found.left['aesthetic > 5']) == (3, 1)
