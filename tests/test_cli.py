"The commands as people use and misuse them: what they write, what they say, and their exit codes."
import argparse, io, json, os, re, signal, subprocess, sys, tarfile
from pathlib import Path
from typing import get_args
import numpy as np, pytest, torch
from PIL import Image
import mdm.all
from mdm.checkpoint import load_checkpoint
from mdm.cli.dataset import mdm_dataset
from mdm.cli.command import add_config_flags, clip_stages
from mdm.utils.progress import progress_bar
from mdm.cli.convert import mdm_convert
from mdm.cli.demo import mdm_demo
from mdm.cli.evaluate import mdm_evaluate
from mdm.cli.sample import mdm_sample
from mdm.cli.train import mdm_train
from mdm.diffusion.objective import Diffusion
from mdm.data.shapes import Shape, attributes, held_out, shapes_captions, write_shapes
from mdm.pipeline import MDMPipeline
from mdm.diffusion.settings import SampleConfig
from mdm.utils.configs import options
from mdm.utils.files import only_writer
from tiny_models import even_v

commands = [mdm_train, mdm_sample, mdm_dataset, mdm_convert, mdm_demo]
tiny = '''model.channels=[8,16] model.inner.channels=[8,16] model.inner.num_resnets=[1,1] model.inner.num_attention_layers=[0,1] model.time_dim=32 model.inner.time_dim=32 text.dim=16 train.batch_size=4 train.steps=6
    train.warmup_steps=2 train.log_every=2 train.save_every=4 train.preview_prompts=[] data.workers=0 sample.steps=2'''.split() + even_v
prompt = 'a large red cross in the centre on a white background'

@pytest.fixture(scope='module')
def data(tmp_path_factory): return [str(p) for p in write_shapes(tmp_path_factory.mktemp('data'), 32, per_shard=16)]

@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    "The output folder of a tiny training."
    out = tmp_path_factory.mktemp('runs')/'tiny'
    assert mdm_train(['shapes', *tiny, '--data', *data, '--output', str(out)]) == 0
    return out

@pytest.fixture
def call(capsys):
    "Call a command: its exit code, and what it printed to both streams."
    def f(command, *args):
        capsys.readouterr()
        code = command(list(map(str, args)))
        out, err = capsys.readouterr()
        assert 'Traceback' not in out + err
        return code, out, err
    return f

@pytest.fixture
def refused(call):
    "Call a command that must end with a message of its own for a user's mistake, and give that message."
    def f(command, *args):
        code, _, err = call(command, *args)
        assert code == 2
        last = err.split('\r')[-1].strip()
        message = last[last.index(f'{command.__name__}: '):] if f'{command.__name__}: ' in last else last
        assert '\n\n' not in message and len(message) > 20
        return message
    return f

def steps(folder): return sorted(p.name for p in Path(folder).glob('step_*'))
def weights(folder): return load_checkpoint(folder).weights()

# ---- all of them

@pytest.mark.parametrize('command', commands, ids=lambda o: o.__name__)
def test_help(call, command):
    code, out, err = call(command, '--help')
    assert code == 0 and not err
    assert out.startswith(f'usage: {command.__name__} ') and f'examples:\n  {command.__name__}' in out
    assert 'None' not in out and '==SUPPRESS==' not in out

@pytest.mark.parametrize('command', [mdm_train, mdm_sample, mdm_dataset, mdm_convert], ids=lambda o: o.__name__)
def test_arguments_are_required(call, command):
    code, _, err = call(command)
    assert code == 2 and 'the following arguments are required' in err

@pytest.mark.parametrize('command', commands, ids=lambda o: o.__name__)
def test_unknown_options(refused, command):
    args = dict(mdm_train=['shapes'], mdm_sample=['run', 'p'], mdm_dataset=['shapes', 'd'], mdm_convert=['a', 'b'], mdm_demo=[])[command.__name__]
    assert 'unrecognized arguments: --nonsense' in refused(command, *args, '--nonsense')

def test_help_as_a_program_is_light():
    script = Path(sys.executable).parent/'mdm_train'
    done = subprocess.run([script, '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith('usage: mdm_train') and not done.stderr
    assert all(k in done.stdout for k in ('shapes', 'pictures_64', 'cc12m_64x64', '--minutes', 'key=value'))
    code = "import sys; from mdm.cli.sample import mdm_sample; from mdm.cli.train import mdm_train; mdm_train(['--help']); mdm_sample(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0

def test_a_mistake_as_a_program(tmp_path):
    done = subprocess.run([Path(sys.executable).parent/'mdm_train', 'shaqes'], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith('mdm_train: ') and done.stderr.count('\n') == 1 and 'did you mean shapes?' in done.stderr

def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError, match='shaqes'): mdm_train(['shaqes', '--debug'])

def test_a_bug_is_not_hidden(monkeypatch, trained):
    def broken(*args, **kwargs): raise KeyError('a bug')
    monkeypatch.setattr(MDMPipeline, '__call__', broken)
    with pytest.raises(KeyError, match='a bug'): mdm_sample([str(trained), prompt])

def test_ctrl_c_while_sampling(monkeypatch, trained, call):
    def stop(*args, **kwargs): raise KeyboardInterrupt()
    monkeypatch.setattr(MDMPipeline, '__call__', stop)
    code, _, err = call(mdm_sample, trained, prompt)
    assert code == 130 and 'mdm_sample: stopped' in err

def test_a_full_gpu(monkeypatch, trained, refused):
    def full(*args, **kwargs): raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(MDMPipeline, '__call__', full)
    assert '--batch-size' in refused(mdm_sample, trained, prompt)

# ---- mdm_train

def test_train_writes_and_tells(data, tmp_path, call):
    code, out, err = call(mdm_train, 'shapes', '--output', tmp_path/'run', *tiny, 'train.preview_prompts=[a red ring]', 'train.preview_every=3', '--data', *data)
    assert code == 0
    first, last = out.splitlines()
    for part in ('shapes: 0.1 million weights', '32 and 16 pixels', '32 pictures in 2 files', 'batches of 4 on c', '6 steps', str(tmp_path/'run')): assert part in first
    assert re.match(r'6 steps in \d+ s, [\d.]+ pictures/s; loss \d\.\d+ \(step 2\) to \d\.\d+ \(step 6\); checkpoint .*step_00000006\. Now try: mdm_sample .*run .a red ring.$', last)
    assert re.search(r'6/6|step \d of 6: loss', err) and re.search(r'loss \d\.\d+ \(2x \d\.\d+, 1x \d\.\d+\), \d+ pictures/s, lr [\d.e-]+, gradient [\d.]+, \d+\.\d GB', err) and 'warning' not in err
    assert steps(tmp_path/'run') == ['step_00000004', 'step_00000006'] and steps(tmp_path/'run'/'previews') == ['step_00000003.png', 'step_00000006.png']
    saved = load_checkpoint(tmp_path/'run')
    assert saved.step == 6 and saved.recipe.train.output == str(tmp_path/'run') and saved.recipe.data.files == data

def test_same_seed_same_weights(data, trained, tmp_path, call):
    assert call(mdm_train, 'shapes', *tiny, '--data', *data, '--output', tmp_path/'again')[0] == 0
    assert call(mdm_train, 'shapes', *tiny, '--data', *data, '--output', tmp_path/'other', 'train.seed=1')[0] == 0
    first, again, other = map(weights, (trained, tmp_path/'again', tmp_path/'other'))
    same, other = ([torch.equal(v, o[k]) for k, v in first.items()] for o in (again, other))
    assert all(same) and not all(other)

def test_overrides_anywhere(data, tmp_path, call):
    code, out, _ = call(mdm_train, '--output', tmp_path/'run', 'shapes', *tiny, '--data', data[0], 'train.steps=3', '--minutes', 60, 'train.lr=1e-4')
    assert code == 0 and '3 steps or 60 minutes' in out and '16 pictures in 1 file;' in out
    assert load_checkpoint(tmp_path/'run').recipe.train.lr == 1e-4

def test_minutes(data, tmp_path, call):
    code, out, _ = call(mdm_train, 'shapes', *tiny, '--data', *data, '--output', tmp_path/'run', '--minutes', 1e-6)
    assert code == 0 and steps(tmp_path/'run') == ['step_00000001'] and out.splitlines()[-1].startswith('1 step in ')
    assert (tmp_path/'run'/'log.csv').read_text().splitlines()[-1].startswith('1,')

def test_ctrl_c_while_training(monkeypatch, data, tmp_path, call):
    class PressCtrlC(mdm.training.resume.Stop):
        name = 'stop'                                                     # as fastai calls it on the learner
        def before_batch(self):
            if self.learn.steps == 2: os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr('mdm.training.run.Stop', PressCtrlC)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    code, out, err = call(mdm_train, 'shapes', *tiny, '--data', *data, '--output', tmp_path/'run')
    assert code == 130 and len(out.splitlines()) == 1 and before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert re.search(r'mdm_train: stopped; the same command goes on\. 3 steps in .* checkpoint .*step_00000003\.', err)
    assert weights(tmp_path/'run') and (tmp_path/'run'/'log.csv').read_text().splitlines()[-1].startswith('3,')
    monkeypatch.undo()
    assert call(mdm_train, 'shapes', *tiny, '--data', *data, '--output', tmp_path/'run')[0] == 0
    assert [o.split(',')[0] for o in (tmp_path/'run'/'log.csv').read_text().splitlines()] == ['step', '2', '4', '6']

def test_validation(data, tmp_path, call):
    write_shapes(tmp_path/'valid', 6, held_out=True)
    code, _, err = call(mdm_train, 'shapes', *tiny, 'train.steps=16', 'train.save_every=100', '--data', *data, '--valid', tmp_path/'valid'/'*.tar', '--output', tmp_path/'run')
    assert code == 0 and re.search(r'step 8: validation loss \d\.\d{4}', err)

def test_a_validation_at_the_end_adds_no_line_to_the_log(data, tmp_path, call):
    write_shapes(tmp_path/'valid', 6, held_out=True)
    code, _, err = call(mdm_train, 'shapes', *tiny, 'train.steps=5', '--data', *data, '--valid', tmp_path/'valid'/'*.tar', '--output', tmp_path/'run')
    assert code == 0 and [o.split(',')[0] for o in (tmp_path/'run'/'log.csv').read_text().splitlines()] == ['step', '2', '4', '5'] and ' 0 pictures/s' not in err

def test_warnings_are_one_line(data, tmp_path, call):
    with tarfile.open(tmp_path/'odd.tar', 'w') as tar:
        for name, content in [('a.png', b'no picture'), ('a.txt', b'caption')]:
            member = tarfile.TarInfo(name); member.size = len(content); tar.addfile(member, io.BytesIO(content))
    code, _, err = call(mdm_train, 'shapes', *tiny, 'train.steps=10', '--data', *data, tmp_path/'odd.tar', '--output', tmp_path/'run')
    lines = [o for o in re.split(r'[\r\n]+', err) if 'warning' in o.lower()]
    assert code == 0 and len(lines) == 1
    assert re.fullmatch(r'mdm_train: warning: epoch 0 of the training data: skipped 1: .*cannot be decoded', lines[0].strip())

def test_divergence(monkeypatch, data, tmp_path, refused):
    "The loss stops being a number after the first save: the training ends with advice, and the checkpoint stays."
    real, calls = Diffusion.compare, []
    def compare(self, *args):
        calls.append(1)
        res = real(self, *args)
        if len(calls) > 5: res.loss = res.loss*float('nan')
        return res
    monkeypatch.setattr(Diffusion, 'compare', compare)
    said = refused(mdm_train, 'shapes', *tiny, 'train.max_nonfinite=3', '--data', *data, '--output', tmp_path/'run')
    assert len(calls) == 8 and 'no finite number 3 times in a row' in said and 'train.lr' in said and 'step 5' in said
    assert steps(tmp_path/'run') == ['step_00000004'] and weights(tmp_path/'run')

@pytest.mark.parametrize('args, said', [
    (['shaqes'], "called 'shaqes'; did you mean shapes?"),
    (['nowhere.yaml'], 'neither a preset nor a file'),
    (['shapes', 'train.batchsize=8'], 'did you mean train.batch_size?'),
    (['shapes', 'train.steps=many'], "train.steps: found 'many', expected"),
    (['shapes', 'train.steps'], 'expected key=value'),
    (['shapes', 'model.channels=[8,16'], "override 'model.channels=[8,16'"),
    (['shapes', 'data.image_size=33'], 'data.image_size: found 33'),
    (['shapes'], 'data.files is empty'),
    (['shapes', '--data', 'nowhere/*.tar'], "no file matches 'nowhere/*.tar'"),
    (['shapes', '--data', 'notes.txt'], 'the name of a shard ends in .tar'),
    (['shapes', '--data', 'notes.tar'], 'usable pictures'),
    (['shapes', '--data', 'empty.tar'], 'hold no samples'),
    (['shapes', '--minutes', '-1'], '--minutes: found -1'),
    (['shapes', '--minutes', 'two'], 'invalid float value'),
    (['shapes', 'text.encoder=nowhere/t5', '--data', 'DATA'], "the text encoder 'nowhere/t5' could not be loaded"),
    (['shapes', 'model.inner_from=nowhere', '--data', 'DATA'], 'model.inner_from: There is neither a checkpoint folder nor a file of weights called nowhere. Name'),
    (['shapes', 'model.inner_from=emoji_32', '--data', 'DATA'], 'called emoji_32; did you mean emoji? Name the checkpoint'),
    (['shapes', 'train.batch_size=64', '--data', 'DATA'], 'lower the batch size'),
    (['shapes', '--data', 'DATA', '--valid', 'nowhere.tar'], "no file matches 'nowhere.tar'"),
    (['shapes', '--data', 'DATA', '--output', 'notes.txt'], 'notes.txt is a file'),
    (['damaged.yaml'], 'damaged.yaml has 1 problem')], ids=lambda o: ' '.join(o)[:40] if isinstance(o, list) else '')
def test_train_mistakes(monkeypatch, tmp_path, data, refused, args, said):
    monkeypatch.chdir(tmp_path)
    Path('notes.txt').write_text('mine'); Path('notes.tar').write_text('mine'); Path('damaged.yaml').write_text('model: [')
    tarfile.open('empty.tar', 'w').close()
    args = [o for a in args for o in (data if a == 'DATA' else [a])]
    assert said in refused(mdm_train, *args, *(['train.batch_size=1', 'data.workers=0'] if 'notes.tar' in args else []))
    assert Path('notes.txt').read_text() == 'mine' and not steps('runs/shapes')

def test_an_earlier_training_is_safe(data, trained, tmp_path, call, refused):
    out = tmp_path/'run'
    start = ['shapes', *tiny, '--data', *data, '--output', str(out)]
    assert call(mdm_train, *start)[0] == 0
    (out/'notes.txt').write_text('mine'); (out/'best').mkdir()
    before, log = weights(out/'step_00000006'), (out/'log.csv').read_text()
    said = refused(mdm_train, *start, 'train.seed=1', 'train.steps=2')
    assert str(out) in said and '--overwrite' in said and '--output' in said
    refused(mdm_train, *start, '--overwrite', 'data.image_size=33')                   # a mistake elsewhere removes nothing
    refused(mdm_train, *start, '--overwrite', '--data', 'nowhere.tar')
    assert steps(out) == ['step_00000004', 'step_00000006'] and (out/'log.csv').read_text() == log
    assert all(torch.equal(v, before[k]) for k, v in weights(out).items())
    assert call(mdm_train, *start, '--overwrite', 'train.seed=1', 'train.steps=2')[0] == 0
    assert steps(out) == ['step_00000002'] and (out/'notes.txt').read_text() == 'mine' and (out/'best').is_dir()
    assert len((out/'log.csv').read_text().splitlines()) == 2

# ---- progress

class Terminal(io.StringIO):
    def isatty(self): return True

def shown_on(monkeypatch, stream, n=2000, **kwargs):
    monkeypatch.setattr(sys, 'stderr', stream)
    with progress_bar('sampling', **kwargs) as show:
        for k in range(1, n + 1): show(k, n)
    return stream.getvalue()

def test_a_log_file_gets_few_lines(monkeypatch):
    "A bar that is redrawn would fill the file."
    (line,) = shown_on(monkeypatch, io.StringIO()).splitlines()
    assert line.startswith('sampling: 2,000 of 2,000 steps, ')
    assert [o.split(',')[0] for o in shown_on(monkeypatch, io.StringIO(), 4, every=0).splitlines()] == [f'sampling: {k} of 4 steps' for k in range(1, 5)]

def test_a_terminal_gets_a_bar(monkeypatch):
    text = shown_on(monkeypatch, Terminal())
    assert '\r' in text and '2000/2000' in text and 'of 2,000 steps' not in text

def test_no_bar_in_the_log_of_a_sampling(trained, tmp_path, call):
    code, _, err = call(mdm_sample, trained, prompt, '--n', 1, '--output', tmp_path)
    assert code == 0 and '\r' not in err and err.splitlines()[-1].startswith('sampling: 2 of 2 steps')

# ---- mdm_sample

def test_sample(trained, tmp_path, call):
    code, out, err = call(mdm_sample, trained, prompt, '--n', 2, '--seed', 5, 'größer', '--every-resolution', '--guidance', 3, '--negative-prompt', 'blue', '--output', tmp_path)
    assert code == 0 and str(tmp_path/'0001.png') in out and '2 of 2 steps' in err
    singles = sorted(p.name for p in (tmp_path/'0001').iterdir())
    assert singles == sorted(f'{k:03d}_seed{5 + k}{low}.png' for k in range(4) for low in ('', '_16px'))
    for k in range(4):
        with Image.open(tmp_path/'0001'/f'{k:03d}_seed{5 + k}_16px.png') as small, Image.open(tmp_path/'0001'/f'{k:03d}_seed{5 + k}.png') as picture:
            assert (picture.size, small.size) == ((32, 32), (16, 16)) and picture.text == small.text
            told = picture.text
            assert (told['prompt'], told['seed'], told['guidance'], told['steps'], told['negative_prompt'], told['checkpoint']) == ((prompt, 'größer')[k//2], str(5 + k), '3.0', '2', 'blue', str(trained))
            again = MDMPipeline.from_pretrained(trained, device='cpu')(told['prompt'], n=1, seed=int(told['seed']), guidance=3., negative_prompt='blue')[0]   # what a picture tells makes it again
            assert max(abs(a - b) for a, b in zip(again.tobytes(), picture.tobytes())) <= 1
    with Image.open(tmp_path/'0001.png') as sheet: assert sheet.width > 8*100 and sheet.text['prompt'] == f'{prompt}\ngrößer'
    first = (tmp_path/'0001.png').read_bytes()
    assert call(mdm_sample, trained, prompt, '--n', 1, '--output', tmp_path)[0] == 0
    assert (tmp_path/'0002.png').is_file() and (tmp_path/'0001.png').read_bytes() == first and len(list((tmp_path/'0002').iterdir())) == 1

def test_sample_options(trained, tmp_path, call):
    (tmp_path/'prompts.txt').write_text('\ufeffa red ring\n\n  a blue ring \r\n', encoding='utf-8')
    out = tmp_path/'deep'/'one.png'
    out.parent.mkdir(); out.write_text('an older one')                               # a file that was named is replaced
    code, printed, err = call(mdm_sample, trained/'step_00000006', '--prompts-file', tmp_path/'prompts.txt', '--n', 1, '--eta', 'ddpm', '--threshold', 'dynamic',
                              '--steps', 3, '--raw', '--device', 'cpu', '--batch-size', 1, '--output', out)
    assert code == 0 and printed == f'{out}\n' and '6 of 6 steps' in err and list(out.parent.iterdir()) == [out]
    with Image.open(out) as sheet: assert sheet.text['prompt'] == 'a red ring\na blue ring' and sheet.text['solver'] == 'ddpm' and sheet.text['weights'] == 'raw'

def test_sample_tells_everything(trained, tmp_path, call):
    config = dict(steps='4', guidance='2.5', solver='dpm++2m', eta='0.0', threshold='dynamic', spacing='logsnr', guidance_interval='(0.1, 0.9)', guidance_rescale='0.5')
    code, _, _ = call(mdm_sample, trained, prompt, '--n', 1, '--steps', 4, '--guidance', 2.5, '--solver', 'dpm++2m', '--spacing', 'logsnr', '--threshold', 'dynamic', '--guidance-interval', .1, .9,
                      '--guidance-rescale', .5, '--output', tmp_path/'one.png')
    with Image.open(tmp_path/'one.png') as sheet: assert code == 0 and {k: sheet.text[k] for k in config} == config

def test_sample_names_what_may_change(trained, tmp_path, call, refused):
    "The newest checkpoints of folders, and the recipe of a file of weights, stand in the picture; flags that do not fit are refused before a model is loaded."
    recipe, weights = trained/'recipe.yaml', tmp_path/'a.pth'
    assert call(mdm_convert, trained, weights)[0] == 0
    assert call(mdm_sample, weights, prompt, '--recipe', recipe, '--guide', trained, '--n', 1, '--output', tmp_path/'one.png')[0] == 0
    with Image.open(tmp_path/'one.png') as sheet: told = sheet.text
    assert {k: told.get(k) for k in ('checkpoint', 'recipe', 'guide', 'guide_step', 'step')} == dict(checkpoint=str(weights), recipe=str(recipe),
        guide=str(trained), guide_step='step_00000006', step=None)
    assert call(mdm_sample, trained, prompt, '--n', 1, '--output', tmp_path/'two.png')[0] == 0
    with Image.open(tmp_path/'two.png') as sheet: assert sheet.text['step'] == 'step_00000006' and 'recipe' not in sheet.text
    assert '--guide-ema needs --guide' in refused(mdm_sample, 'nowhere', prompt, '--guide-ema', .5)
    assert '--mask needs --image' in refused(mdm_sample, 'nowhere', prompt, '--mask', 'm.png')

def test_flags_are_the_fields_of_the_config(call):
    "Every field of SampleConfig is a flag of its own, with the field's comment and choices."
    said = ' '.join(call(mdm_sample, '--help')[1].split())
    for o in options(SampleConfig):
        flag = f"--{o.name.replace('_', '-')}"
        assert flag in said
        if o.choices: assert f"{flag} {{{','.join(o.choices)}}}" in said
        assert ''.join(o.help.split()) in said.replace(' ', ''), o

def test_flags_of_any_config():
    class Group:
        def __init__(self): self.flags = {}
        def add_argument(self, name, **kwargs): self.flags[name] = kwargs
    group = Group()
    add_config_flags(group, SampleConfig, skip=('eta',), own="the page's")
    assert '--eta' not in group.flags and all(o['default'] is None and o['help'].endswith("(the page's)") for o in group.flags.values())
    parser = argparse.ArgumentParser()
    add_config_flags(parser, SampleConfig)
    assert vars(parser.parse_args([])) == dict.fromkeys(o.name for o in options(SampleConfig))

def test_sample_tools(trained, tmp_path, call):
    assert call(mdm_sample, trained, prompt, '--n', 1, '--every-resolution', '--output', tmp_path)[0] == 0
    large, small, mask = tmp_path/'0001'/'000_seed0.png', tmp_path/'0001'/'000_seed0_16px.png', tmp_path/'mask.png'
    half = Image.new('L', (32, 32)); half.paste(255, (16, 0, 32, 32)); half.save(mask)
    pixels = lambda path: np.asarray(Image.open(path)).astype(int)
    def made(*args):
        folder = tmp_path/str(len(list(tmp_path.iterdir())))
        code, _, err = call(mdm_sample, trained, prompt, '--n', 1, '--seed', 7, '--every-resolution', '--output', folder, *args)
        assert code == 0, err
        return folder/'0001'/'000_seed7.png', folder/'0001'/'000_seed7_16px.png'
    up, held = made('--upscale', str(small))
    assert (pixels(held) == pixels(small)).all() and Image.open(up).size == (32, 32) and Image.open(up).text['upscale'] == str(small)
    begun, _ = made('--image', str(large), '--strength', '.5')
    assert (pixels(begun) != pixels(large)).any() and Image.open(begun).text['strength'] == '0.5'
    painted, _ = made('--image', str(large), '--mask', str(mask), '--repeats', '2')
    assert (pixels(painted)[:, :16] == pixels(large)[:, :16]).all() and (pixels(painted)[:, 16:] != pixels(large)[:, 16:]).any()
    assert {k: Image.open(painted).text[k] for k in ('image', 'mask', 'repeats')} == dict(image=str(large), mask=str(mask), repeats='2')

def files_of(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*.png'))}

@pytest.fixture
def stops(monkeypatch):
    "The pipeline raises after so many batches; None: never."
    real = MDMPipeline.__call__
    def f(batches, error):
        calls = []
        def call(self, *args, **kwargs):
            calls.append(1)
            if batches is not None and len(calls) > batches: raise error
            return real(self, *args, **kwargs)
        monkeypatch.setattr(MDMPipeline, '__call__', call)
        return calls
    return f

@pytest.mark.parametrize('single, error, code', [(False, KeyboardInterrupt(), 130), (True, OSError(28, 'No space left on device'), 2)], ids=['folder, Ctrl-C', 'file, full disk'])
def test_an_interrupted_sampling_goes_on(trained, tmp_path, call, stops, single, error, code):
    args = [trained, prompt, 'a blue ring', '--n', 3, '--seed', 4, '--every-resolution', '--batch-size', 2]
    whole, out = tmp_path/'whole', tmp_path/('x/cat.png' if single else 'x')
    assert call(mdm_sample, *args, '--output', whole/out.name if single else whole)[0] == 0
    stops(2, error)
    found, _, err = call(mdm_sample, *args, '--output', out)
    parts = tmp_path/'x'/('.cat.png.parts' if single else '0001')
    assert found == code and len(list(parts.glob('*.png'))) == 8 and not (tmp_path/'x'/('cat.png' if single else '0001.png')).exists()
    assert (f'stopped with 8 of 12 pictures in {parts}; the same command goes on' if code == 130 else 'the disk is full') in err
    calls = stops(None, None)
    found, _, err = call(mdm_sample, *args, '--output', out)
    assert found == 0 and len(calls) == 1 and f'going on in {parts}: 4 of 6' in err
    assert files_of(tmp_path/'x') == files_of(whole)                                 # as if nothing had happened

def test_an_unfinished_folder_of_other_pictures_is_left_alone(trained, tmp_path, call, stops):
    args = [trained, prompt, '--n', 2, '--batch-size', 1, '--output', tmp_path]
    stops(1, KeyboardInterrupt())
    assert call(mdm_sample, *args)[0] == 130
    before, calls = files_of(tmp_path/'0001'), stops(None, None)
    for k, change in enumerate((['--seed', 5], ['--steps', 3], ['--negative-prompt', 'blue'], ['--raw'])): assert call(mdm_sample, *args, *change)[0] == 0 and (tmp_path/f'000{k + 2}.png').exists()
    assert len(calls) == 8 and files_of(tmp_path/'0001') == before
    (tmp_path/'0001'/'000_seed0.png').write_bytes(before['000_seed0.png'][:300])     # damaged: drawn anew, elsewhere
    assert call(mdm_sample, *args)[0] == 0 and (tmp_path/'0006.png').exists()

def test_two_samplings_at_once_use_folders_of_their_own(trained, tmp_path, call):
    with only_writer(tmp_path/'0001'): assert call(mdm_sample, trained, prompt, '--n', 1, '--output', tmp_path)[0] == 0
    assert (tmp_path/'0002.png').exists() and not (tmp_path/'0001.png').exists()

@pytest.mark.parametrize('output, said', [('notes.txt', 'notes.txt is a file'), ('notes.txt/a.png', 'notes.txt is a file'), ('folder.png', 'is a folder'), ('notes.txt/deep/er', 'is a file')])
def test_the_output_is_looked_at_before_the_model(tmp_path, refused, monkeypatch, output, said):
    monkeypatch.chdir(tmp_path)
    Path('notes.txt').write_text('mine'); Path('folder.png').mkdir()
    monkeypatch.setattr(MDMPipeline, 'from_pretrained', None)
    for command, *args in ((mdm_sample, 'shapes', prompt), *([(mdm_evaluate, 'shapes', '--captions', 'notes.txt')] if 'png' not in output else [])): assert said in refused(command, *args, '--output', output)
    assert Path('notes.txt').read_text() == 'mine' and sorted(os.listdir()) == ['folder.png', 'notes.txt']

def test_a_place_that_cannot_be_written(tmp_path, refused, monkeypatch):
    def full(path): return type('usage', (), dict(free=1000))
    with monkeypatch.context() as m:
        m.setattr('mdm.cli.command.shutil.disk_usage', full)
        assert '20 MB are free' in refused(mdm_sample, 'shapes', prompt, '--output', tmp_path/'a')
    def forbidden(dir): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('mdm.cli.command.tempfile.TemporaryFile', forbidden)
    assert 'nothing can be written into' in refused(mdm_sample, 'shapes', prompt, '--output', tmp_path/'a'/'b.png')

def test_a_long_prompt_is_told_once(trained, tmp_path, call):
    _, _, err = call(mdm_sample, trained, prompt + ' and so on'*100, 'short', '--n', 2, '--batch-size', 1, '--output', tmp_path)
    assert err.count('longer than the text encoder reads') == 1 and 'left out' in err
    assert 'longer' not in call(mdm_sample, trained, prompt, '--n', 1, '--output', tmp_path)[2]

@pytest.mark.parametrize('command', commands, ids=lambda o: o.__name__)
def test_version(call, command):
    assert call(command, '--version') == (0, f'{command.__name__} {mdm.__version__}\n', '')

def test_verify(trained, tmp_path, call, refused):
    import shutil
    shutil.copytree(trained/'step_00000006', tmp_path/'copy')
    assert call(mdm_sample, tmp_path/'copy', prompt, '--n', 1, '--verify', '--output', tmp_path/'a.png')[0] == 0
    path = tmp_path/'copy'/'optimizer.safetensors'
    data = bytearray(path.read_bytes()); data[-9] ^= 16; path.write_bytes(data)
    for command, *args in ((mdm_sample, tmp_path/'copy', prompt, '--output', tmp_path/'b.png'), (mdm_convert, tmp_path/'copy', tmp_path/'b.pth')): assert 'optimizer.safetensors is damaged: its checksum' in refused(command, *args, '--verify')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'copy']

def test_convert_on_a_full_disk(trained, tmp_path, refused, monkeypatch):
    from contextlib import contextmanager
    import mdm.reference.checkpoints as R
    real = R.atomic_write
    @contextmanager
    def small(path):
        with real(path) as f:
            class Full:
                def write(self, data):
                    if f.tell() + len(data) > 20_000: raise OSError(28, 'No space left on device')
                    return f.write(data)
                def flush(self): f.flush()
            yield Full()
    monkeypatch.setattr(R, 'atomic_write', small)
    assert 'o space' in refused(mdm_convert, trained, tmp_path/'a.pth') and not list(tmp_path.iterdir())

@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.\nframe #0: c10"), RuntimeError('Storage size calculation overflowed with sizes=[1]'),
    np._core._exceptions._ArrayMemoryError((10**12,), np.dtype('float64'))], ids=lambda o: type(o).__name__)
def test_not_enough_memory(monkeypatch, trained, refused, error):
    def fails(*args, **kwargs): raise error
    monkeypatch.setattr(MDMPipeline, '__call__', fails)
    said = refused(mdm_sample, trained, prompt)
    assert 'not enough memory' in said and 'frame #0' not in said

def test_numbers_beyond_a_computer_are_mistakes(refused, data):
    assert 'train.batch_size: found 1' in refused(mdm_train, 'shapes', 'train.batch_size=' + '1' + '0'*23, '--data', *data)

# ---- several processes

def test_a_mistake_is_told_once_and_left_for_the_launcher(tmp_path, call, monkeypatch):
    waited = []
    monkeypatch.setattr('mdm.cli.command.time.sleep', lambda seconds: waited.append(seconds) or (_ for _ in ()).throw(SystemExit(143)))   # as the launcher's SIGTERM does
    monkeypatch.setenv('WORLD_SIZE', '2'); monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path/'error.json'))
    monkeypatch.setenv('RANK', '0')
    assert call(mdm_train, 'shaqes')[0] == 2 and not waited and 'mdm_train: There is neither' in json.loads((tmp_path/'error.json').read_text())['message']['message']
    assert 'nonsense' in call(mdm_train, '--nonsense')[2]
    (tmp_path/'error.json').unlink()
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(SystemExit): call(mdm_train, 'shaqes')
    assert waited and not (tmp_path/'error.json').exists() and not call(mdm_train, '--nonsense')[2]
    monkeypatch.setattr('mdm.cli.command.time.sleep', lambda seconds: None)                  # nobody stops it: this process alone has failed
    assert 'did you mean shapes?' in call(mdm_train, 'shaqes')[2] and (tmp_path/'error.json').exists()

def test_a_mistake_under_torchrun(tmp_path):
    "Both processes fail, one tells, and the launcher's report ends with the same words."
    code = '''import sys
from mdm.cli.command import make_parser, run_command
def work(args): raise FileNotFoundError('there is no shaqes; did you mean shapes?')
sys.exit(run_command(make_parser('mdm_train', 'about', 'mdm_train'), work))'''
    (tmp_path/'go.py').write_text(code)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '0', '--standalone', tmp_path/'go.py'], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': str(Path(mdm.__file__).parents[1])})
    lines = [o for o in done.stderr.splitlines() if 'did you mean shapes?' in o]
    assert done.returncode and [o.startswith('mdm_train: ') for o in lines] == [True, False] and 'traceback :mdm_train: there is no shaqes' in lines[1].replace(' : ', ' :')

@pytest.mark.parametrize('args, said', [
    (['nowhere', prompt], 'nowhere'),
    (['shape', prompt], 'did you mean shapes?'),
    (['RUN', prompt, '--eta', '2'], 'sample.eta'),
    (['EMPTY', prompt], 'no complete checkpoint'),
    (['nowhere.pth', prompt], 'nowhere.pth'),
    (['hostile.pth', prompt, '--recipe', 'shapes'], 'was not loaded'),
    (['unknown.pth', prompt], 'Name its recipe'),
    (['RUN'], 'no prompt'),
    (['RUN', '--prompts-file', 'nowhere.txt'], 'no file nowhere.txt'),
    (['RUN', '--prompts-file', 'blank.txt'], 'no prompt'),
    (['RUN', '--prompts-file', 'picture.txt'], 'not UTF-8'),
    (['RUN', prompt, '--seed', '9'*20], '--seed: '),
    (['RUN', prompt, '--device', 'meta'], '--device meta'),
    (['RUN', prompt, '--output', 'some.jpg'], 'written as PNG'),
    (['RUN', prompt, '--n', '0'], '--n: 0 is below 1'),
    (['RUN', prompt, '--n', 'four'], "--n: 'four' is no whole number"),
    (['RUN', prompt, '--batch-size', '0'], '--batch-size: 0 is below 1'),
    (['RUN', prompt, '--steps', '0'], 'steps: '),
    (['RUN', prompt, '--steps', '5000'], 'sample.steps: found 5000'),
    (['RUN', prompt, '--guidance', '-1'], 'guidance: '),
    (['RUN', prompt, '--eta', 'lots'], "--eta: 'lots' is neither"),
    (['RUN', prompt, '--eta', '-1'], 'sample.eta'),
    (['RUN', prompt, '--eta', '.5', '--solver', 'unipc'], "only sample.solver = 'ddim'"),
    (['RUN', prompt, '--solver', 'euler'], "invalid choice: 'euler'"),
    (['RUN', prompt, '--guidance-interval', '.9', '.1'], 'the smaller one first'),
    (['RUN', prompt, '--guidance-interval', '.9'], 'expected 2 arguments'),
    (['RUN', prompt, '--guidance-rescale', '2'], 'rescale: '),
    (['RUN', prompt, '--ema', '.5'], '0.5'),
    (['RUN', prompt, '--upscale', 'nowhere.png'], 'no picture nowhere.png'),
    (['RUN', prompt, '--upscale', 'picture.txt'], 'picture.txt is not a picture'),
    (['RUN', prompt, '--upscale', 'odd.png'], 'resize it to 16 x 16'),
    (['RUN', prompt, '--image', 'odd.png'], 'odd.png has 20 x 10 pixels, and the model draws 32 x 32'),
    (['RUN', prompt, '--image', 'good.png', '--mask', 'odd.png'], 'the mask odd.png has 20 x 10'),
    (['RUN', prompt, '--image', 'good.png', '--strength', '0'], 'strength: found 0.0'),
    (['RUN', prompt, '--image', 'good.png', '--strength', '.01', '--spacing', 'uniform'], 'strength 0.01 leaves nothing'),
    (['RUN', prompt, '--image', 'good.png', '--mask', 'good.png', '--repeats', '0'], '--repeats: 0 is below 1'),
    (['RUN', prompt, '--image', 'good.png', '--repeats', '2'], '--repeats needs --mask'),
    (['RUN', prompt, '--strength', '.5'], '--strength needs --image'),
    (['RUN', prompt, '--mask', 'good.png'], '--mask needs --image'),
    (['RUN', prompt, '--upscale', 'good.png', '--image', 'good.png'], 'do not go together'),
    (['RUN', prompt, '--threshold', 'hard'], "invalid choice: 'hard'"),
    (['RUN', prompt, '--device', 'gpu'], '--device gpu'),
    (['RUN', prompt, '--device', 'cuda:99'], '--device cuda:99'),
    (['RUN', prompt, '--output', 'blank.txt'], 'blank.txt')], ids=lambda o: ' '.join(o)[:60] if isinstance(o, list) else '')
def test_sample_mistakes(monkeypatch, tmp_path, trained, refused, args, said):
    monkeypatch.chdir(tmp_path)
    Path('blank.txt').write_text('\n \n'); Path('picture.txt').write_bytes(b'\x89PNG\xff\xfe'); Path('hostile.pth').write_text('no weights'); Path('unknown.pth').write_text('no weights')
    Image.new('RGB', (20, 10)).save('odd.png'); Image.new('RGB', (32, 32)).save('good.png')
    assert said in refused(mdm_sample, *(dict(RUN=trained, EMPTY=tmp_path).get(a, a) for a in args))
    assert not Path('samples').exists()

# ---- mdm_convert

def test_convert_there_and_back(trained, tmp_path, call):
    assert call(mdm_convert, trained, tmp_path/'theirs'/'tiny.pth')[0] == 0
    assert sorted(p.name for p in (tmp_path/'theirs').iterdir()) == ['tiny.pth', 'tiny.yaml']
    (tmp_path/'ours').mkdir()                                                        # an empty folder is nobody's loss
    assert call(mdm_convert, tmp_path/'theirs'/'tiny.pth', tmp_path/'ours')[0] == 0
    back = weights(tmp_path/'ours')
    assert all(torch.equal(v, back[k]) for k, v in weights(trained).items())
    assert call(mdm_convert, tmp_path/'theirs'/'tiny.pth', tmp_path/'named', '--recipe', tmp_path/'theirs'/'tiny.yaml')[0] == 0

def test_convert_loses_nothing(trained, tmp_path, refused):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'photo.jpg').write_text('mine'); (tmp_path/'a.pth').write_text('mine'); (tmp_path/'b.yaml').write_text('mine')
    for src, dst in [(tmp_path/'a.pth', 'mine'), (trained, 'a.pth'), (trained, 'b.pth')]: assert 'exists already' in refused(mdm_convert, src, tmp_path/dst)
    assert {p.read_text() for p in (tmp_path/'mine'/'photo.jpg', tmp_path/'a.pth', tmp_path/'b.yaml')} == {'mine'} and not (tmp_path/'b.pth').exists()

def test_convert_mistakes(trained, tmp_path, refused):
    (tmp_path/'a.pth').write_text('no weights')
    assert 'nowhere' in refused(mdm_convert, tmp_path/'nowhere', tmp_path/'new')
    assert '.pth' in refused(mdm_convert, trained, tmp_path/'new')
    assert 'Name its recipe' in refused(mdm_convert, tmp_path/'a.pth', tmp_path/'new')
    assert 'was not loaded' in refused(mdm_convert, tmp_path/'a.pth', tmp_path/'new', '--recipe', 'shapes')
    assert not (tmp_path/'new').exists()

# ---- mdm_demo

def test_demo(tmp_path, call):
    out = tmp_path/'demo'
    code, told, err = call(mdm_demo, '--output', out, *tiny, '--steps', 3, '--seed', 1)
    assert code == 0 and re.search('3/3|step 2 of 3: loss', err)
    results = json.loads((out/'samples'/'accuracy.json').read_text())
    assert results['captions'] == 128 and set(results['accuracy']) == {'colour', 'shape', 'size', 'position', 'background', 'all'}
    for k, v in results['accuracy'].items(): assert re.search(rf"^  {'all, clean' if k == 'all' else k} +{v:.1%}$", told, re.M)
    for path in (out/'samples'/'grid.png', out/'run'/'step_00000003', out/'run'/'log.csv'): assert str(path) in told and path.exists()
    with Image.open(out/'samples'/'grid.png') as grid: assert grid.width >= 8*128 and grid.height >= 6*128
    with tarfile.open(out/'shapes'/'shapes-000000.tar') as tar: seen = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith('.json')]
    assert len(seen) == 12 and not any(held_out(Shape(**{k: o[k] for k in attributes})) for o in seen)
    assert load_checkpoint(out/'run').recipe.train.seed == 1
    student = load_checkpoint(out/'student').recipe                                  # trained at the end, and judged on the same captions
    assert student.distill.teacher == str(out/'run'/'step_00000003') and student.sample.solver == 'consistency' and student.data.files == [str(out/'shapes'/'shapes-000000.tar')]
    judged = json.loads((out/'samples'/'student'/'accuracy.json').read_text())
    assert judged['captions'] == 128 and all(re.search(rf"^  {'all, clean' if k == 'all' else k} +{v:.1%}$", told.split('5. Drawing')[1], re.M) for k, v in judged['accuracy'].items())
    assert 'to draw in 4 calls of the network what its teacher draws in 4' in told and str(out/'samples'/'student'/'grid.png') in told and (out/'samples'/'student'/'grid.png').exists()
    (out/'mine.txt').write_text('mine')                                              # again: only its own is replaced
    code, told, _ = call(mdm_demo, '--output', out, *tiny, '--steps', 2, '--no-student')
    assert code == 0 and steps(out/'run') == ['step_00000002'] and (out/'mine.txt').read_text() == 'mine'
    assert 'student' not in told and not (out/'student').exists()

def tiny_stages():
    "Overrides that make the networks of `mdm_demo --clips` small in all four stages."
    nets = ['channels=[8,8] num_attention_layers=[0,1] num_text_layers=0', 'channels=[8,8,8] num_attention_layers=[0,0,1] num_temporal_attention_layers=[1,0,0]', 'channels=[8,8,8]', 'channels=[8,8]']
    for stage, name in enumerate(clip_stages.split(',')):
        for i in range(stage + 1):
            yield from (f"{name}:model{'.inner'*(stage - i)}.{o}" for o in (nets[i] + ' num_groups=4 time_dim=16').split())
    yield from 'text.dim=8 train.batch_size=4 train.bf16=false train.preview_prompts=[] sample.steps=1 sample.guidance=1'.split()

def test_demo_of_clips(tmp_path, call, monkeypatch):
    "With --clips: moving shapes, a model of clips, their judge, a sheet of strips and a film; beside the demo of pictures."
    monkeypatch.chdir(tmp_path)
    (tmp_path/'demo'/'run').mkdir(parents=True)
    code, told, err = call(mdm_demo, '--clips', *tiny_stages(), '--steps', 2, '--seed', 1)
    assert code == 0, err
    out = Path('demo/clips')
    results = json.loads((out/'samples'/'accuracy.json').read_text())
    assert results['captions'] == 64 and set(results['accuracy']) == {'colour', 'shape', 'motion', 'background', 'all'}
    for k, v in results['accuracy'].items(): assert re.search(rf"^  {'all, clean' if k == 'all' else k} +{v:.1%}$", told, re.M)
    for path in (out/'samples'/'grid.png', out/'samples'/'grid.gif', out/'run'/'step_00000002', out/'run'/'log.csv'): assert str(path) in told and path.exists()
    assert 'Drawing 8 clips' in told and '64 clips of 16 x 16 pixels' in told and 'a red cross moves left' in told
    with Image.open(out/'samples'/'grid.png') as sheet, Image.open(out/'samples'/'grid.gif') as film:
        assert sheet.width >= 2*400 and film.n_frames > 8 and film.width >= 8*96
    with tarfile.open(out/'moving_shapes'/'moving_shapes-000000.tar') as tar:
        names = tar.getnames()
        seen = [json.loads(tar.extractfile(o).read()) for o in names if o.endswith('.json')]
    assert len(seen) == 8 and len(names) == 8*18 and not any(held_out(argparse.Namespace(**o)) for o in seen)
    assert load_checkpoint(out/'run').recipe.train.seed == 1 and (tmp_path/'demo'/'run').exists()
    assert 'student' not in told and 'in 4 stages for 2 + 2 + 2 + 2 steps' in told and load_checkpoint(out/'run').recipe.model.inner_from == str(out/'stages'/'moving_shapes_16')

def test_demo_leaves_others_alone(tmp_path, refused):
    (tmp_path/'samples').mkdir(); (tmp_path/'samples'/'photo.jpg').write_text('mine')
    assert 'not of an earlier demo' in refused(mdm_demo, '--output', tmp_path, *tiny)
    with only_writer(tmp_path/'busy'): assert 'another run is writing' in refused(mdm_demo, '--output', tmp_path/'busy', *tiny)
    assert 'not of an earlier demo' in refused(mdm_demo, '--output', tmp_path/'samples'/'photo.jpg', *tiny)
    assert (tmp_path/'samples'/'photo.jpg').read_text() == 'mine' and not (tmp_path/'run').exists()
    (tmp_path/'class'/'student').mkdir(parents=True)
    assert 'not of an earlier demo' in refused(mdm_demo, '--output', tmp_path/'class', *tiny)

def test_demo_mistakes(tmp_path, refused):
    assert '--steps: 0 is below 1' in refused(mdm_demo, '--output', tmp_path/'demo', '--steps', 0)
    assert 'did you mean train.lr' in refused(mdm_demo, '--output', tmp_path/'demo', 'train.lrs=1')
    assert not (tmp_path/'demo').exists()

# ---- mdm.all

def test_import_star():
    namespace = {}
    exec('from mdm.all import *', namespace)
    contract = '''load_recipe create_model Diffusion sample create_text_encoder save_checkpoint load_checkpoint load_released mdm_learner MDMPipeline create_dls
        mdm_train mdm_sample mdm_dataset mdm_convert mdm_demo'''.split()
    assert not set(contract) - namespace.keys() and len(mdm.all.__all__) == len(set(mdm.all.__all__))
    assert all((getattr(namespace[k], '__module__', None) or 'mdm').startswith('mdm') for k in mdm.all.__all__ if callable(namespace[k]))
