"`mdm_dataset` as people use and misuse it: what it writes, what it says, and its exit codes"
import io, json, re, shlex, signal, subprocess, sys, tarfile, threading, time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from PIL import Image
from data_tools import interrupt
from mdm.cli import dataset as cli_dataset
from mdm.cli.dataset import mdm_dataset
from mdm.data import configs, shards
from mdm.data.files import find_tars, read_manifest
from mdm.data.inspect import read_samples
from mdm.data.samples import BAD_PICTURE, NO_CAPTION
from mdm.data.shapes import Shape, attributes, held_out, shapes_captions, write_shapes

@pytest.fixture
def call(capsys, monkeypatch):
    "Call the command; returns exit code, output and errors (without bars)"
    monkeypatch.setenv('TQDM_DISABLE', '1'); monkeypatch.setenv('COLUMNS', '200')
    def call(*args):
        capsys.readouterr()
        code = mdm_dataset([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, '\n'.join(line for line in err.splitlines() if '%|' not in line and '/s]' not in line)
    return call

@pytest.fixture
def refused(call):
    "The one line that a mistake is answered with"
    def refused(*args):
        code, out, err = call(*args)
        assert code == 2 and 'Traceback' not in err, (out, err)
        return err
    return refused

def put(folder, n, bad=()):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        out = io.BytesIO(); Image.new('RGB', (40,30), (5*i%256,9*i%256,0)).save(out, 'JPEG')
        (folder/f'{i}.jpg').write_bytes(b'' if i in bad else out.getvalue()); (folder/f'{i}.txt').write_text(f'picture {i}')
    return folder

def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}
def names(folder): return sorted(p.name for p in Path(folder).iterdir())
kinds = ['folder', 'urls', 'parquet', 'shapes', 'prior', 'split', 'embed', 'inspect', 'download']

@pytest.mark.parametrize('kind', kinds)
def test_help(call, kind):
    code, out, err = call(kind, '--help')
    assert code == 0 and not err and out.startswith(f'usage: mdm_dataset {kind} ') and f'examples:\n  mdm_dataset {kind} ' in out
    assert 'None' not in out and all(o in call('--help')[1] for o in kinds)
    code, _, err = call(kind)
    assert code == 2 and 'the following arguments are required' in err

@pytest.mark.parametrize('kind', kinds)
def test_the_examples_in_the_help_are_understood(kind, monkeypatch, call):
    seen = []
    monkeypatch.setattr(cli_dataset._subcommands[kind], 'work', lambda args: seen.append(args))
    examples = re.findall(rf'^  (mdm_dataset {kind} .*)$', call(kind, '--help')[1], re.M)
    for o in examples: assert call(*shlex.split(o)[1:])[0] == 0, o
    assert len(seen) == len(examples) >= 2

@pytest.mark.parametrize('kind, cls', [('folder', configs.FolderConfig), ('urls', configs.UrlsConfig), ('parquet', configs.ParquetConfig), ('split', configs.SplitConfig)])
def test_flags_are_the_settings(kind, cls, call, monkeypatch):
    "Every setting but the name of the shards and the chunk has a flag with its help text, and what is given arrives"
    from mdm.utils.configs import options
    page = ' '.join(call(kind, '--help')[1].split())
    seen = []
    monkeypatch.setattr(cli_dataset._subcommands[kind], 'work', lambda args: seen.append(cli_dataset._given(args, cls)))
    for o in options(cls):
        if o.name in ('name', 'chunk'): continue
        flag = '--' + o.name.replace('_', '-')
        assert flag in page and ' '.join(o.help.split()) in page, o.name
        value = {int: 7, float: 2.5, str: 'x', bool: False}[o.kind]
        flags = ['--no-' + o.name.replace('_', '-')] if o.kind is bool else [flag, value]
        assert call(kind, *['x']*{'folder': 2, 'urls': 2, 'parquet': 1, 'split': 1}[kind], *['--output', 'y']*(kind in ('parquet', 'split')), *flags)[0] == 0
        assert {k: v for k, v in seen[-1].items() if v is not None} == {o.name: value}

def test_help_is_light():
    code = "import sys; from mdm.cli.dataset import *; mdm_dataset(['folder', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0

# ---- folder

def test_folder(tmp_path, call):
    code, out, err = call('folder', put(tmp_path/'in', 25, bad=[3]), tmp_path/'out', '--per-shard', 10)
    assert code == 0 and not err
    assert re.fullmatch(rf"3 shards with 24 pictures in \S+, 0\.\d MB, \d+\.\d s; 1 left out \(1 x {BAD_PICTURE}\), named in \S+/skipped\.tsv\. Now try: mdm_dataset inspect '?\S+/out/\*\.tar'?\n", out), out
    m = read_manifest(tmp_path/'out')
    assert m['command'] == f"mdm_dataset folder {tmp_path/'in'} {tmp_path/'out'} --per-shard 10" and m['skipped'] == {BAD_PICTURE:1}
    before = files(tmp_path/'out')
    assert call('folder', tmp_path/'in', tmp_path/'out', '--per-shard', 10)[0] == 0 and files(tmp_path/'out') == before

def test_folder_mistakes(tmp_path, refused):
    assert 'is no folder' in refused('folder', tmp_path/'none', tmp_path/'out')
    (tmp_path/'empty').mkdir()
    assert 'holds no pictures' in refused('folder', tmp_path/'empty', tmp_path/'out')
    put(tmp_path/'in', 3)
    assert '--resize: -1 is below 1' in refused('folder', tmp_path/'in', tmp_path/'out', '--resize', -1)
    assert '--per-shard: 0 is below 1' in refused('folder', tmp_path/'in', tmp_path/'out', '--per-shard', 0)
    for flag, v in (('workers', -3), ('max-mb', 'nan')): assert f'--{flag}: ' in refused('folder', tmp_path/'in', tmp_path/'out', f'--{flag}', v)
    (tmp_path/'file').write_text('mine')
    assert 'file' in refused('folder', tmp_path/'in', tmp_path/'file')
    for p in (tmp_path/'in').glob('*.txt'): p.unlink()
    assert f'3 x {NO_CAPTION}' in refused('folder', tmp_path/'in', tmp_path/'out')

def test_ctrl_c(tmp_path, call, monkeypatch):
    "It says how to go on, and goes on"
    interrupt(monkeypatch, 15)
    args = 'folder', put(tmp_path/'in', 25), tmp_path/'out', '--per-shard', 10
    code, _, err = call(*args)
    assert code == 130 and 'run the same command again to go on' in err and names(tmp_path/'out') == ['manifest.json', 'pictures-000000.tar', 'skipped.tsv']
    assert call(*args)[0] == 0 and read_manifest(tmp_path/'out')['complete']

def test_killed_as_a_program(tmp_path, call, monkeypatch):
    "The real command, killed in the middle of its work, and given again"
    put(tmp_path/'in', 400)
    command = [Path(sys.executable).parent/'mdm_dataset', 'folder', 'in', 'out', '--per-shard', '10', '--workers', '1']
    p = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and not (tmp_path/'out'/'pictures-000003.tar').exists(): time.sleep(.001)
    p.kill()
    assert p.wait() == -signal.SIGKILL
    assert not read_manifest(tmp_path/'out')['complete']
    monkeypatch.chdir(tmp_path)
    for out in ('out','whole'): assert call('folder', 'in', out, '--per-shard', 10, '--workers', 1)[0] == 0
    a, b = files(tmp_path/'out'), files(tmp_path/'whole')
    assert {k: v for k,v in a.items() if k != 'manifest.json'} == {k: v for k,v in b.items() if k != 'manifest.json'}
    assert json.loads(a['manifest.json']) | {'command':''} == json.loads(b['manifest.json']) | {'command':''}

# ---- shapes

def test_shapes(tmp_path, call):
    code, out, _ = call('shapes', tmp_path/'d', '--n', 10, '--size', 16, '--seed', 3, '--per-shard', 4, '--held-out')
    assert code == 0 and out.splitlines()[-1].startswith('3 shards') and 'mdm_train shapes --data' in out and out.endswith(' train.steps=3000\n')      # its captions need more steps than the preset takes
    assert names(tmp_path/'d') == ['manifest.json', *(f'shapes-{k:06d}.tar' for k in range(3)), 'skipped.tsv']
    got = [s for *_,s in read_samples(find_tars(tmp_path/'d'))]
    captions = [s['txt'].decode() for s in got]
    facts = [json.loads(s['json']) for s in got]
    assert captions == shapes_captions(10, seed=3) and all(held_out(Shape(**{k: o[k] for k in attributes})) for o in facts)
    assert Image.open(io.BytesIO(got[0]['png'])).size == (16, 16)
    write_shapes(tmp_path/'same', 10, 16, 3, 4, True)
    assert got == [s for *_,s in read_samples(find_tars(tmp_path/'same'))]
    assert [o['samples'] for o in read_manifest(tmp_path/'d')['shards'].values()] == [4,4,2]

def test_shapes_go_on(tmp_path, call, monkeypatch):
    from mdm.data import shapes as datasets
    real, drawn = datasets.shape_sample, []
    def record(i, *args):
        if len(drawn) == 7: drawn.append(None); raise KeyboardInterrupt()
        drawn.append(i)
        return real(i, *args)
    monkeypatch.setattr(datasets, 'shape_sample', record)
    assert [call('shapes', tmp_path/'d', '--n', 10, '--per-shard', 3)[0] for _ in range(2)] == [130, 0]
    assert drawn == [*range(7), None, *range(6,10)]
    assert call('shapes', tmp_path/'e', '--n', 10, '--per-shard', 3)[0] == 0
    assert {k: v for k,v in files(tmp_path/'d').items() if 'man' not in k} == {k: v for k,v in files(tmp_path/'e').items() if 'man' not in k}

def test_shapes_mistakes(tmp_path, refused):
    assert '--size 8' in refused('shapes', tmp_path/'d', '--size', 8)
    assert '--n 0' in refused('shapes', tmp_path/'d', '--n', 0)
    assert 'invalid int value' in refused('shapes', tmp_path/'d', '--n', 'many')
    assert "invalid choice: 'shops'" in refused('shops', tmp_path/'d')
    assert not (tmp_path/'d').exists()
    write_shapes(tmp_path/'d', 4, per_shard=1)
    assert 'earlier run' in refused('shapes', tmp_path/'d', '--n', 2)

# ---- split, embed, inspect

def test_split_embed_inspect(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call('folder', put(tmp_path/'in', 40), 'all')[0] == 0
    code, out, _ = call('split', 'all/*.tar', '--output', 'split', '--percent', 25)
    assert code == 0 and out.splitlines()[-1] == "Now try: mdm_train pictures_64 --data 'split/train/*.tar' --valid 'split/valid/*.tar'"
    count = {o: sum(v['samples'] for v in read_manifest(f'split/{o}')['shards'].values()) for o in ('train','valid')}
    assert sum(count.values()) == 40 and 3 <= count['valid'] <= 18
    code, out, _ = call('embed', 'split/train', '--output', 'embedded', '--recipe', 'shapes', 'text.dim=16', '--batch-size', 7)
    assert code == 0 and out.endswith("Now try: mdm_train shapes --data 'embedded/*.tar' text.dim=16 data.embeddings=true\n")
    m = read_manifest('embedded')
    assert m['embeddings']['dim'] == 16 and sum(v['samples'] for v in m['shards'].values()) == count['train']
    code, out, _ = call('inspect', 'embedded', 'split/valid/*.tar', '--pictures', 5, '--output', 'look')
    assert code == 0 and f"40 samples, of which 40 can be used, {count['train']} with embeddings" in out and 'Now try: mdm_dataset split' in out
    assert names('look') == ['bad.tsv', 'counts.json', 'sheet.png'] and json.loads(Path('look/counts.json').read_text())['short_sides'] == {'30':40}
    assert Image.open('look/sheet.png').width > 300

def test_what_the_closing_line_says_works(tmp_path, call, monkeypatch):
    "Train, for two steps, on stored embeddings, as the line after `embed` says"
    from mdm.cli.train import mdm_train
    monkeypatch.chdir(tmp_path)
    call('shapes', 'shapes', '--n', 16)
    tiny = '''model.channels=[8,16] model.inner.channels=[8,16] model.inner.num_resnets=[1,1] model.inner.num_attention_layers=[0,1] model.time_dim=32 model.inner.time_dim=32
        train.batch_size=4 train.steps=2 train.warmup_steps=0 train.preview_prompts=[] data.workers=0'''.split()
    line = call('embed', 'shapes', '--output', 'embedded', '--recipe', 'shapes', 'text.dim=16')[1].split('Now try: mdm_train ')[1]
    assert mdm_train([*shlex.split(line), *tiny, '--output', 'run']) == 0
    assert (tmp_path/'run'/'step_00000002').is_dir()

def test_inspect_names_what_is_bad(tmp_path, call):
    with tarfile.open(tmp_path/'a.tar', 'w') as t: shards.add_sample(t, {'__key__':'broken', 'jpg':b'', 'txt':b'x'})
    code, out, _ = call('inspect', tmp_path/'a.tar', '--output', tmp_path/'look')
    assert code == 0 and '0 can be used' in out and names(tmp_path/'look') == ['bad.tsv', 'counts.json']
    assert (tmp_path/'look'/'bad.tsv').read_text().splitlines()[1].split('\t')[:3] == [str(tmp_path/'a.tar'), 'broken', BAD_PICTURE]

def test_mistakes_about_shards(tmp_path, refused):
    for kind in (['split'], ['inspect'], ['embed', '--recipe', 'shapes']):
        assert 'no file matches' in refused(*kind, tmp_path/'none', '--output', tmp_path/'out')
        assert 'is no tar' in refused(*kind, __file__, '--output', tmp_path/'out')
    write_shapes(tmp_path/'s', 4)
    assert 'between 0 and 100' in refused('split', tmp_path/'s', '--output', tmp_path/'out', '--percent', 100)
    assert 'did you mean shapes?' in refused('embed', tmp_path/'s', '--output', tmp_path/'out', '--recipe', 'shaqes')
    assert 'text.dims' in refused('embed', tmp_path/'s', '--output', tmp_path/'out', '--recipe', 'shapes', 'text.dims=5')
    assert 'choose another folder' in refused('embed', tmp_path/'s', '--output', tmp_path/'s', '--recipe', 'shapes')
    assert not (tmp_path/'out').exists() or not names(tmp_path/'out')

# ---- from elsewhere

@pytest.fixture
def served(tmp_path):
    "A web server for the folder `web`"
    (tmp_path/'web').mkdir()
    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(tmp_path/'web'))
        def log_message(self, *args): pass
    s = ThreadingHTTPServer(('127.0.0.1', 0), Quiet); s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown(); s.server_close()

def test_urls(tmp_path, call, served):
    put(tmp_path/'web', 6, bad=[2])
    (tmp_path/'list.tsv').write_text(''.join(f'{served}/{i}.jpg\tpicture {i}\n' for i in range(8)))
    code, out, err = call('urls', tmp_path/'list.tsv', tmp_path/'out', '--retries', 0, '--resize', 20)
    assert code == 0 and out.startswith('1 shard with 5 pictures') and f'3 left out (2 x HTTP error 404, 1 x {BAD_PICTURE})' in out and 'Now try: mdm_dataset inspect' in out

def test_urls_mistakes(tmp_path, refused):
    assert 'list.tsv does not exist' in refused('urls', tmp_path/'list.tsv', tmp_path/'out')
    (tmp_path/'list.csv').write_text('a,b\n1,2\n')
    assert 'no column for the address: found a, b' in refused('urls', tmp_path/'list.csv', tmp_path/'out')
    assert 'urls.timeout: found 0' in refused('urls', tmp_path/'list.csv', tmp_path/'out', '--timeout', 0)

def test_download(tmp_path, call, refused, served):
    write_shapes(tmp_path/'web', 9, per_shard=3)
    args = served + '/shapes-00000{0..2}.tar', '--output', tmp_path/'here'
    code, out, _ = call('download', *args, '--part', '1/2')
    assert code == 0 and out.startswith('2 files copied') and 'Now try: mdm_dataset inspect' in out
    code, out, _ = call('download', *args)
    assert code == 0 and out.startswith('1 files copied') and ', 2 were there' in out
    assert files(tmp_path/'here') == files(tmp_path/'web')
    for part in ('0/2', '3/2', 'half'): assert f'--part {part}' in refused('download', *args, '--part', part)
    assert 'shapes-000007.tar' in refused('download', f'{served}/shapes-000007.tar', '--output', tmp_path/'here')

def test_inspect_tells_what_filters_would_leave(tmp_path, call, refused):
    call('folder', put(tmp_path/'in', 8), tmp_path/'s')
    code, out, _ = call('inspect', tmp_path/'s', '--output', tmp_path/'look', '--filter', 'side >= 30', '--filter', 'aspect<1')
    assert code == 0 and 'filters would leave:\n  8 of 8 (100.0%): side >= 30\n  0 of 8 (0.0%): aspect < 1\n  0 of 8 (0.0%): all of them' in out
    assert json.loads((tmp_path/'look/counts.json').read_text())['left'] == {'side >= 30': 8, 'all of them': 0}
    assert "'sharp' is no condition" in refused('inspect', tmp_path/'s', '--filter', 'sharp')

# ---- links to folders, and further columns of tables

def test_links_to_folders_are_told_or_followed(tmp_path, call, refused):
    put(tmp_path/'far', 3); (tmp_path/'in').mkdir(); (tmp_path/'in'/'more').symlink_to(tmp_path/'far')
    said = refused('folder', tmp_path/'in', tmp_path/'a')                             # nothing but a link: say what it is, and what helps
    assert f'more -> {tmp_path}/far' in said and '--follow-links' in said and 'give that folder itself' in said
    put(tmp_path/'in'/'near', 2); (tmp_path/'in'/'near'/'loop').symlink_to(tmp_path/'in'); (tmp_path/'in'/'zz').symlink_to(tmp_path/'far'); (tmp_path/'far'/'back').symlink_to(tmp_path)
    code, out, _ = call('folder', tmp_path/'in', tmp_path/'a')
    assert code == 0 and '2 pictures' in out and '3 x link to a folder, which is not followed: give that folder itself, or --follow-links' in out
    code, out, _ = call('folder', tmp_path/'in', tmp_path/'b', '--follow-links')
    assert code == 0 and '5 pictures' in out and '4 x folder that is reached in another way, too' in out, out
    again = files(tmp_path/'b'); assert call('folder', tmp_path/'in', tmp_path/'b', '--follow-links')[0] == 0 and files(tmp_path/'b') == again
    assert read_manifest(tmp_path/'b')['settings']['follow_links'] is True and 'follow_links' not in read_manifest(tmp_path/'a')['settings']

def facts(folder):
    "Content of the .json of every sample, by its picture."
    found = {}
    for path in Path(folder).glob('*.tar'):
        with tarfile.open(path) as t: found |= {o['file']: o for o in (json.load(t.extractfile(m)) for m in t if m.name.endswith('.json'))}
    return found

def test_columns_of_a_table_reach_the_shards(tmp_path, call):
    "Scores in a table serve filters as those in a .json beside the picture do."
    pictures = put(tmp_path/'in', 4)
    for p in pictures.glob('*.txt'): p.unlink()
    (pictures/'metadata.csv').write_text('file_name,text,aesthetic,note,file\n0.jpg,one,6.5,fine,x\n1.jpg,two,4,,y\n2.jpg,three\n')
    (pictures/'captions.jsonl').write_text(json.dumps(dict(file_name='3.jpg', text='four', aesthetic=7, tags=['a', 'b'], size=dict(w=3))) + '\n')
    (pictures/'0.json').write_text('{"aesthetic": 1, "hand": 2}')
    assert call('folder', pictures, tmp_path/'s')[0] == 0
    found = facts(tmp_path/'s')
    assert found['0.jpg'] == dict(aesthetic='6.5', hand=2, note='fine', file='0.jpg') and found['1.jpg'] == dict(aesthetic='4', file='1.jpg') and found['2.jpg'] == dict(file='2.jpg')
    assert found['3.jpg'] == dict(aesthetic=7, tags=['a', 'b'], size=dict(w=3), file='3.jpg')
    out = call('inspect', tmp_path/'s', '--output', tmp_path/'look', '--filter', 'aesthetic >= 6')[1]
    assert '2 of 4 (50.0%): aesthetic >= 6' in out

def test_shards_from_before_take_new_pictures(tmp_path, call, refused):
    "Folders that were packed when tables had no facts can still grow."
    pictures = put(tmp_path/'in', 3); table = pictures/'metadata.csv'
    table.write_text('file_name,text,score\n0.jpg,one,5\n')
    assert call('folder', pictures, tmp_path/'s')[0] == 0
    packed = json.loads((tmp_path/'s'/'packed.json').read_text()); new = dict(packed['files'])
    items, _, there, _ = shards._listing(pictures); old = shards._states(items, there, {})
    assert {k for k in new if new[k] != old[k]} == {'0.jpg'}
    (tmp_path/'s'/'packed.json').write_text(json.dumps(dict(source=packed['source'], files=old)))
    for kind in ('jpg', 'txt'): (pictures/f'9.{kind}').write_bytes((pictures/f'0.{kind}').read_bytes())
    code, out, err = call('folder', pictures, tmp_path/'s'); assert code == 0 and '4 pictures' in out, err
    table.write_text('file_name,text,score\n0.jpg,one,6\n')
    assert 'changed or gone' in refused('folder', pictures, tmp_path/'s')              # another score is another sample

def test_clips_need_a_square_number_of_frames(tmp_path, capsys):
    assert mdm_dataset(['moving_shapes', str(tmp_path/'a'), '--frames', '15']) == 2
    assert '--frames 15: a square number' in capsys.readouterr().err and not (tmp_path/'a').exists()
