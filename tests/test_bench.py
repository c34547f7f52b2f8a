"The scripts of tests/bench: each has a small form that runs here. No test looks at a time."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from bench import gpu

bench = Path(gpu.__file__).parent

def run_script(name, *args):
    "Run a script of tests/bench from another folder, with the working tree alone to import from."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    return subprocess.run([sys.executable, bench/name, *map(str, args)], cwd=bench.parent, env=env, capture_output=True, text=True)

# ---- everything for one GPU

@pytest.fixture(scope='module')
def rehearsal(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpu')
    done = run_script('gpu.py', '--rehearse', '--output', folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return folder, json.loads((folder/'result.json').read_text())

def rows(result, kind): return [r for part in result['parts'].values() for r in part['rows'] if r['kind'] == kind]

def test_every_part_of_the_gpu_benchmark_runs(rehearsal):
    folder, result = rehearsal
    assert list(result['parts']) == list(gpu.budgets) and {p['status'] for p in result['parts'].values()} == {'done'}
    tests, = rows(result, 'tests')
    assert tests['code'] == 0 and tests.get('passed', 0) + tests.get('skipped', 0) > 0 and 'failed' not in tests
    for kind in ('training', 'sampling'):
        assert {(r['recipe'], r['mode']) for r in rows(result, kind)} == {(o, m) for o in gpu.sizes.values() for m in ('eager', 'compiled')}
        assert all(r['pictures_per_s'] > 0 and r['waits'] is None for r in rows(result, kind))
    assert {r['layout'] for r in rows(result, 'training')} == {'contiguous', 'channels_last'}
    assert all(r['tflop_per_picture'] > 0 and r['utilisation'] is None and r['batch'] in (2, 4) for r in rows(result, 'training'))
    assert rows(result, 'small training')[0]['steps'] == 3 and (folder/'sheet.png').stat().st_size > 1000

def test_the_table_of_the_gpu_benchmark(rehearsal):
    folder, result = rehearsal
    text = (folder/'table.md').read_text()
    assert text.startswith(f"none (rehearsal on a CPU), {result['date']}, torch {torch.__version__}") and 'say nothing' in text
    assert text.count('| cc12m_64x64 | compiled |') == len([r for r in rows(result, 'training') + rows(result, 'sampling')
                                                             if (r['recipe'], r['mode']) == ('cc12m_64x64', 'compiled')])
    assert all(f'| {name} | done' in text for name in gpu.budgets)

def test_the_operations_of_a_recipe_are_counted():
    "On a small network, against a count by hand: a convolution of 3 x 3 multiplies and adds, and its backward pass costs twice as much."
    from bench_models import count_flops
    conv, x = torch.nn.Conv2d(4, 8, 3, padding=1), torch.randn(2, 4, 6, 6, requires_grad=True)
    forward = 2*2*36*4*8*9
    assert count_flops(lambda: conv(x)) == forward and count_flops(lambda: conv(x).sum().backward()) == 3*forward

def test_a_machine_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as e: gpu.main([])
    assert e.value.code == 2 and 'no CUDA GPU' in (said := capsys.readouterr().err) and '--rehearse' in said

def part(tmp_path, code, seconds=60):
    "A part that is a line of Python, and writes one row first."
    rows = tmp_path/'part.jsonl'
    before = f'open({str(rows)!r}, "w").write(\'{{"kind": "first"}}\\n{{"kind": "half\'); '
    return gpu.run_part([sys.executable, '-c', before + code], rows, tmp_path/'log', seconds)

@pytest.mark.parametrize('code, status, said', [('1', 'done', None), ('1/0', 'failed', 'ZeroDivisionError'), ('import os; os.abort()', 'failed', 'exit status -6'),
    ('import no_such_package.inner', 'left out', 'the package no_such_package is not installed')])
def test_a_part_that_ends(tmp_path, code, status, said):
    found = part(tmp_path, code)
    assert found['status'] == status and found['rows'] == [{'kind': 'first'}]
    assert said in found['error'] if said else 'error' not in found

def test_a_part_that_takes_too_long(tmp_path):
    found = part(tmp_path, 'import sys, time; print(1, flush=True); time.sleep(600)', 1)
    assert found['status'] == 'out of time' and '1 s' in found['error'] and found['seconds'] < 60

def test_the_other_parts_go_on(tmp_path, monkeypatch):
    "One part fails and no time is left for the last: the files tell of all."
    def fails(*args, **kwargs): raise RuntimeError('a | broken\npart')
    monkeypatch.setattr(gpu, 'speed_eager', fails)
    monkeypatch.setattr(gpu, 'speed_compiled', lambda size, write, rehearsal, known=(): write(dict(kind='fit', recipe='x')))
    monkeypatch.setitem(gpu.budgets, 'compiled-256', 1)
    result = gpu.run_all(['eager-64', 'compiled-64', 'compiled-256'], tmp_path, 8, True)
    assert {k: p['status'] for k, p in result['parts'].items()} == {'eager-64': 'failed', 'compiled-64': 'done', 'compiled-256': 'left out'}
    assert json.loads((tmp_path/'result.json').read_text()) == result and 'a / broken part' in (tmp_path/'table.md').read_text()
    assert '--parts compiled-256' in result['parts']['compiled-256']['error']

@pytest.mark.parametrize('room, bound, best', [(100, 512, 64), (8, 512, 8), (5, 512, 4), (0, 512, 0), (1000, 512, 512), (3, 4, 2), (64, 4, 4)])
def test_the_largest_batch(room, bound, best):
    tried = []
    assert gpu.largest_batch(lambda n: tried.append(n) or n <= room, bound) == best and max(tried) <= bound

def test_peaks_of_cards():
    assert [gpu.card_peak(o) for o in ('NVIDIA H100 80GB HBM3', 'NVIDIA H100 PCIe', 'NVIDIA L40S', 'NVIDIA L4', 'some other card')] == [989, 756, 362, 121, None]

def test_a_batch_that_does_not_fit(monkeypatch):
    "Out of memory is an answer, and a row says so."
    trainer = gpu.Trainer('cc12m_64x64', 'cpu', True)
    def step(batch, real=trainer.step):
        if batch > 2: raise torch.OutOfMemoryError('full')
        real(batch)
    trainer.step, written = step, []
    assert trainer.fits(2) and not trainer.fits(4) and gpu.largest_batch(trainer.fits, 4) == 2
    gpu.measure_training(trainer, 4, 1., written.append, mode='eager', layout='contiguous')
    assert written[0]['error'] == 'out of memory' and written[0]['batch'] == 4

# ---- inference on a CPU

def test_the_benchmark_of_inference_on_a_cpu():
    done = run_script('cpu_inference.py', '--rehearse', '--batches', 1)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    networks = [o.split(' | ') for o in lines if o.startswith('| cc12m')]
    assert [o[0] for o in networks] == ['| cc12m_64x64', '| cc12m_256x256', '| cc12m_1024x1024'] and all(float(o[5]) > 0 for o in networks)
    assert [o.split(' | ')[0] for o in lines[-8:] if o.startswith('| ')][-6:] == ['| text encoder', '| network', '| to pictures', '| everything else', '| in all',
                                                                               '| one of 1 evaluations of 8']

@pytest.mark.parametrize('script', sorted(p.stem for p in bench.glob('*.py')))
def test_every_script_finds_what_it_imports(script):
    import importlib
    assert importlib.import_module(f'bench.{script}').__doc__

@pytest.fixture
def mixed_nest(tmp_path):
    "A checkpoint of a tiny nest that was trained on mixed batches."
    from mdm.models.nested_unet import create_model
    from mdm.pipeline import MDMPipeline
    from mdm.recipe import load_recipe
    from tiny_models import even_v
    recipe = load_recipe('shapes', '''model.channels=[8,16] model.inner.channels=[8,16] model.inner.num_resnets=[1,1] model.inner.num_attention_layers=[0,1]
        model.num_groups=8 model.inner.num_groups=8 model.time_dim=32 model.inner.time_dim=32 text.dim=16 diffusion.mixed_ratio=[1,1] sample.steps=4'''.split() + even_v)
    torch.manual_seed(0)
    model = create_model(recipe.model, 16)
    for p in model.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=.1)     # a new network predicts nothing
    MDMPipeline(model, recipe, device='cpu').save_pretrained(tmp_path/'nest')
    return tmp_path/'nest'

def cells(lines): return [[o.strip() for o in line.strip('|').split('|')] for line in lines]

def test_ways_of_sampling_by_the_judge_of_shapes(mixed_nest, capsys, tmp_path):
    from bench import ways
    ways.main(['--model', str(mixed_nest), '--joins', '1', '.5', '--captions', '24', '--output', str(tmp_path/'rows.json'), '--sheet', str(tmp_path/'sheet.png')])
    rows = json.loads((tmp_path/'rows.json').read_text())
    flops = [float(o['GFLOP per picture']) for o in rows]
    assert len(rows) == 4 and all(o < flops[0] for o in flops[1:])
    assert float(rows[0]['RMSE']) == 0 < float(rows[1]['RMSE']) and '±' in rows[0]['right and clean']
    shown = cells(capsys.readouterr().out.splitlines()[-6:])
    assert shown[0] == list(rows[0]) and shown[2:] == [list(o.values()) for o in rows]
    assert (tmp_path/'sheet.png').stat().st_size > 1000

def test_ways_of_sampling_by_retrieval_with_a_student_and_a_guide(mixed_nest, tmp_path):
    from bench import ways
    from mdm.data.shapes import write_shapes
    from mdm.evaluation.retrieval import RetrievalConfig, train_retrieval
    write_shapes(tmp_path/'data', 120, 32, seed=1)
    data = [str(o) for o in sorted((tmp_path/'data').glob('*.tar'))]
    train_retrieval(data, tmp_path/'judge', RetrievalConfig(size=16, width=4, layers=2, dim=8, steps=2, batch_size=16))
    ways.main(['--model', str(mixed_nest), '--data', *data, '--retrieval', str(tmp_path/'judge'), '--captions', '24', '--output', str(tmp_path/'rows.json'), '--ways',
               'usual:guidance=2', 'none:guidance=1', 'interval:guidance=2,guidance_interval=[0.3,0.6]', f'guided:guidance=2,guide={mixed_nest}', f'other:model={mixed_nest},steps=2'])
    rows = {o['way']: o for o in json.loads((tmp_path/'rows.json').read_text())}
    flops = {k: float(o['GFLOP per picture']) for k, o in rows.items()}
    assert flops['none'] < flops['interval'] < flops['usual'] and flops['usual'] == pytest.approx(2*flops['none'], rel=.1) and flops['guided'] == pytest.approx(flops['usual'], rel=.1)
    assert rows['guided']['RMSE'] == rows['none']['RMSE'] != '0.000'            # a model that guides itself changes nothing
    assert all('±' in rows['other'][k] for k in ('picked', 'FD', 'KID x 1000'))

def test_a_judge_of_retrieval_needs_real_pictures(capsys):
    from bench import ways
    with pytest.raises(SystemExit): ways.main(['--model', 'shapes', '--retrieval', 'judge'])
    assert '--data and --retrieval go together' in capsys.readouterr().err

def test_ways_of_the_released_shapes(capsys):
    from bench import ways
    ways.main(['shapes', '--joins', '1', '.5'])
    saved = [int(o[-1].rstrip('%')) for o in cells(capsys.readouterr().out.splitlines()[4:8])]
    assert saved[0] == 0 and all(o > 0 for o in saved[1:])

# ---- the loader

def test_the_benchmark_of_the_loader_runs():
    done = run_script('loader.py', '--rehearse')
    assert done.returncode == 0, done.stderr[-2000:]
    head, row = done.stdout.splitlines()
    assert head.split()[:4] == ['pictures', 'side', 'ours/s', '/plain'] and row.split()[:4] == ['96', 'x', '64', '16']

# ---- start-up and visitors

def test_the_benchmark_of_visitors_runs():
    done = run_script('visitors.py', '--rehearse')
    assert done.returncode == 0, done.stdout + done.stderr
    assert [o.split(':')[0].split(' ')[0] for o in done.stdout.splitlines()] == ['import', 'forked', 'the']

# ---- fine-tuning

def test_the_benchmark_of_fine_tunings_memory_runs(tmp_path, capsys, monkeypatch):
    from bench import finetune
    monkeypatch.setattr(finetune, 'in_a_process', lambda what, **spec: getattr(finetune, what)(spec))     # each would start a Python of its own
    finetune.main(['finetune.targets=["qkv"]', '--memory', '--rehearse', '--batches', '2', '--precision', 'bfloat16'])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| 2 |')]
    assert [r.split(' | ')[1:3] for r in rows] == [['bfloat16', 'no'], ['bfloat16', 'yes']] and all('%' in r for r in rows)
