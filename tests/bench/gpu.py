"""Measures and tries on one large NVIDIA GPU what this library does there, in one command and at most 8 minutes.

    python tests/bench/gpu.py [--output gpu_bench] [--minutes 8] [--parts eager-64 compiled-64 ...]
    python tests/bench/gpu.py --rehearse      # all of it on tiny sizes and a CPU, in half a minute

It runs from the working tree; nothing is installed or downloaded. The speed parts need PyTorch, einops, fastcore,
pydantic and PyYAML, the others what `settings.ini` requires; `tests` needs pytest, too. A part that lacks a package is
left out, and the result says which package. Each part is a process of its own with a time budget: an error, a crash or
a part that takes too long costs that part alone, and what it had measured counts.

    tests         the tests that carry the marker `gpu`
    eager-N       training steps of cc12m_NxN at the largest power-of-two batch that fits and at 32, and sampling; in
                  bfloat16 (autocast), without torch.compile
    compiled-N    the same with torch.compile
    training      pictures_64 on drawn shapes of 64 pixels for two minutes, by `run_training`, then a sheet of samples

A training step is what `mdm_train` does with such a recipe: noise, forward and backward pass at all resolutions,
gradient clipping, the check for finite numbers, AdamW and the moving average. Text embeddings are random. Utilisation
is floating-point operations of forward and backward pass, counted, per second, over the card's peak in dense bfloat16.
Waits are the warnings of `torch.cuda.set_sync_debug_mode`.

After each part, the folder of --output has `result.json` and `table.md`; `training` adds `sheet.png`."""
import argparse, datetime, gc, importlib.util, json, os, platform, re, signal, subprocess, sys, tempfile, time
import traceback, warnings
from contextlib import contextmanager
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parents[1]
sys.path[:0] = [str(here), str(root)]

sizes = {64: 'cc12m_64x64', 256: 'cc12m_256x256', 1024: 'cc12m_1024x1024'}
# seconds that each part may take, in the order in which they run
budgets = {'tests': 60, **{f'eager-{n}': 45 for n in sizes}, 'compiled-64': 110, 'training': 165,
           'compiled-256': 110, 'compiled-1024': 110}
# TFLOP/s in dense bfloat16 with float32 sums, from the makers' data sheets; the first name that is in the card's counts
peaks = {'H100 PCIe': 756, 'H100 NVL': 835, 'H100': 989, 'H200': 989, 'GH200': 989, 'B200': 2250, 'A100': 312,
         'L40S': 362, 'L4': 121, 'RTX 4090': 165}
installed_as = dict(pyyaml='yaml', pillow='PIL')

# ---- what is here

def card_peak(name):
    "Peak of a card in TFLOP/s by its name, or None when it is not in the table."
    return next((peak for part, peak in peaks.items() if part.lower() in name.lower()), None)

def missing_packages():
    "Packages that `settings.ini` requires, and pytest, that are not here."
    line = re.search(r'^requirements = (.*)', (root/'settings.ini').read_text(), re.M)[1]
    names = [re.match(r'[\w.-]+', o)[0] for o in line.split()] + ['pytest']
    return [o for o in names if not importlib.util.find_spec(installed_as.get(o, o))]

def machine(rehearsal):
    "Card, versions and date."
    import torch
    found = dict(date=datetime.date.today().isoformat(), torch=torch.__version__, python=platform.python_version(),
                 card='none (rehearsal on a CPU)', memory_gib=None, peak_tflops=None, rehearsal=rehearsal)
    if not rehearsal:
        card = torch.cuda.get_device_properties(0)
        found |= dict(card=card.name, memory_gib=round(card.total_memory/2**30, 1), peak_tflops=card_peak(card.name),
                      cuda=torch.version.cuda)
    return {**found, 'missing_packages': missing_packages()}

# ---- measuring

@contextmanager
def counted_waits(on):
    "Lists where Python waits for the GPU, as 'file:line'; None without a GPU."
    import torch
    if not on:
        yield None
        return
    places = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try: yield places
        finally: torch.cuda.set_sync_debug_mode('default')
    for w in caught:
        if 'called a synchronizing CUDA operation' in str(w.message): places.append(f'{Path(w.filename).name}:{w.lineno}')

def largest_batch(fits, bound, first=8):
    "The largest power of two up to `bound` for which `fits(batch)`, by doubling from `first`; 0 when not even 1 does."
    batch = min(first, bound)
    while batch and not fits(batch): batch //= 2
    if batch < min(first, bound): return batch
    while 2*batch <= bound and fits(2*batch): batch *= 2
    return batch

class Trainer:
    "Training steps of one recipe with random inputs."
    def __init__(self, name, device, tiny):
        from bench_models import Bench
        import torch
        self.bench, self.gpu = Bench(name, device, tiny), device == 'cuda'
        self.model, self.parameters = self.bench.model, list(self.bench.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0., fused=self.gpu)
        self.restart()

    def restart(self):
        "Forget averages, which have the memory format of the weights."
        self.optimizer.state.clear()
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, batch):
        import torch
        images, prompts = self.bench.pictures(batch), self.bench.prompts(batch)
        with torch.autocast(self.bench.device.type, torch.bfloat16):
            loss = self.bench.diffusion.loss(self.model, images, *prompts).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 2.)
        if torch.stack([loss.detach(), norm]).isfinite().all(): self.optimizer.step()       # the one wait
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.average, self.parameters, 1e-4)

    def fits(self, batch):
        "Whether two steps of this batch fit into the memory."
        import torch
        try:
            for _ in range(2): self.step(batch)
            self.synchronize()
            return True
        except torch.OutOfMemoryError: return False
        finally: self.free()

    def synchronize(self):
        import torch
        if self.gpu: torch.cuda.synchronize()

    def free(self):
        "Give back what a step held, also one that failed."
        import torch
        self.optimizer.zero_grad()
        gc.collect()
        if self.gpu: torch.cuda.empty_cache()

def timed(call, device, seconds):
    "Seconds of one call: the mean over about `seconds` and at least one call, after one that does not count."
    import torch
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    call()
    wait()
    start, n = time.perf_counter(), 0
    while not n or time.perf_counter() - start < seconds:
        call()
        wait()
        n += 1
    return (time.perf_counter() - start)/n

def measure_training(trainer, batch, flops, write, **labels):
    "Speed, memory, utilisation and waits of training steps; one row."
    import torch
    row = dict(kind='training', recipe=trainer.bench.name, batch=batch, **labels)
    try:
        if trainer.gpu: torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        trainer.step(batch)
        trainer.synchronize()
        row['first_step_s'] = time.perf_counter() - start
        seconds = timed(lambda: trainer.step(batch), trainer.bench.device.type, 4. if trainer.gpu else 0.)
        with counted_waits(trainer.gpu) as waits: trainer.step(batch)
    except torch.OutOfMemoryError: return write({**row, 'error': 'out of memory'})
    finally: trainer.free()
    peak = card_peak(torch.cuda.get_device_name()) if trainer.gpu else None
    row |= dict(seconds=seconds, pictures_per_s=batch/seconds, tflop_per_picture=flops/1e12,
                tflops=flops*batch/seconds/1e12, utilisation=peak and flops*batch/seconds/1e12/peak,
                memory_gib=torch.cuda.max_memory_allocated()/2**30 if trainer.gpu else None)
    write({**row, 'waits': waits if waits is None else len(waits), 'wait_places': waits})

def measure_sampling(bench, batch, tiny, write, **labels):
    "Pictures per second with the default sampler; one row."
    import torch
    from mdm.diffusion.sampler import sample
    from mdm.diffusion.settings import SampleConfig
    config, device = SampleConfig(steps=2) if tiny else SampleConfig(), bench.device.type
    cond, mask = bench.prompts(batch)
    def call():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            sample(bench.model, bench.diffusion, bench.size, cond, mask, torch.zeros_like(cond), mask, config=config,
                   device=bench.device)
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    seconds = timed(call, device, 0. if tiny else 4.)
    row = dict(kind='sampling', recipe=bench.name, batch=batch, **labels, steps=config.steps, solver=config.solver,
               guidance=config.guidance, seconds=seconds, pictures_per_s=batch/seconds, first_call_s=first)
    with counted_waits(device == 'cuda') as waits: call()
    write({**row, 'waits': waits if waits is None else len(waits)})

# ---- the parts

sampled = {64: 16, 256: 8, 1024: 4}                          # pictures per batch when sampling

def start_speed(size, rehearsal):
    "A trainer, the small batch of the table, and how many pictures are sampled at once."
    trainer = Trainer(sizes[size], 'cpu' if rehearsal else 'cuda', rehearsal)
    return (trainer, 2, 2) if rehearsal else (trainer, 32, sampled[size])

def flops_per_picture(trainer, batch):
    "Counted operations of forward and backward pass; the batch shows how the recipe mixes resolutions."
    from bench_models import count_flops
    flops = count_flops(lambda: trainer.step(batch))/batch
    trainer.free()
    return flops

def speed_eager(size, write, rehearsal, known=()):
    "Eager training steps at the largest batch and at 32, in both memory formats, and sampling."
    import torch
    trainer, few, drawn = start_speed(size, rehearsal)
    bound = 512 if not rehearsal else 4 if size == 64 else 2     # the smallest network rehearses two batch sizes
    best = largest_batch(trainer.fits, bound)
    if not best: raise MemoryError(f'{sizes[size]}: not even one picture fits')
    flops = flops_per_picture(trainer, min(best, 6))
    write(dict(kind='fit', recipe=sizes[size], largest_batch=best, bound=bound, tflop_per_picture=flops/1e12))
    labels = dict(mode='eager', layout='contiguous')
    for batch in sorted({best, few}, reverse=True): measure_training(trainer, batch, flops, write, **labels)
    measure_sampling(trainer.bench, drawn, rehearsal, write, **labels)
    trainer.model.to(memory_format=torch.channels_last)
    trainer.restart()
    measure_training(trainer, best, flops, write, mode='eager', layout='channels_last')

def speed_compiled(size, write, rehearsal, known=()):
    "Compiled training steps at the batch that fitted without compilation and at 32, and sampling."
    import torch
    trainer, few, drawn = start_speed(size, rehearsal)
    fit = next((o for o in known if o['kind'] == 'fit' and o['recipe'] == sizes[size]), {})
    best = fit.get('largest_batch', few)
    flops = fit['tflop_per_picture']*1e12 if fit else flops_per_picture(trainer, 3)
    trainer.model.compile(dynamic=False)
    labels = dict(mode='compiled', layout='contiguous')
    # compiling takes a minute per network, and a C++ compiler on a CPU: a rehearsal runs the network as it is
    with torch.compiler.set_stance('force_eager' if rehearsal else 'default'):
        measure_training(trainer, best, flops, write, **labels)
        measure_sampling(trainer.bench, drawn, rehearsal, write, **labels)
        if best != few: measure_training(trainer, few, flops, write, **labels)

def run_tests(write, rehearsal, known=()):
    "The tests with the marker `gpu`, of the files that have it (rehearsal: of the last one)."
    files = [str(o) for o in sorted((root/'tests').glob('test_*.py')) if '@pytest.mark.gpu' in o.read_text()]
    if rehearsal: files = files[-1:]
    command = [sys.executable, '-m', 'pytest', '-m', 'gpu', '-q', '-rs', '-p', 'no:cacheprovider', '--tb=short', *files]
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST')} | {'PYTHONPATH': str(root)}
    done = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, code = done.stdout, done.returncode
    found = re.findall(r'(\d+) (passed|failed|skipped|errors?)\b', ''.join(said.splitlines()[-1:]))
    counts = {what: int(n) for n, what in found}
    write(dict(kind='tests', files=[Path(o).name for o in files], code=code, **counts, tail=said[-3000:]))
    absent = re.search(r"No module named '?([\w.]+)", said)
    if absent: raise ModuleNotFoundError(f"No module named '{absent[1]}'")
    if code: raise RuntimeError(f'pytest ended with code {code}:\n{said[-1500:]}')

def small_training(write, rehearsal, known=(), folder=None):
    "Train pictures_64 on shapes by `run_training`, and draw a sheet."
    from mdm.data.shapes import shapes_captions, write_shapes
    from mdm.pipeline import MDMPipeline
    from mdm.recipe import load_recipe
    from mdm.training.run import run_training
    from mdm.utils.pictures import contact_sheet
    with tempfile.TemporaryDirectory() as tmp:
        files = [str(o) for o in write_shapes(f'{tmp}/shapes', 24 if rehearsal else 8000, 64)]
        changes = [f'data.files={json.dumps(files)}', f'train.output={tmp}/run', 'train.save_every=1000000']
        changes += tiny_training if rehearsal else ['train.batch_size=128', 'data.workers=8', 'train.steps=1000000']
        recipe = load_recipe('pictures_64', changes)
        with counted_waits(not rehearsal) as waits: learn = run_training(recipe, minutes=2)
        batch, losses = recipe.train.batch_size, learn.recorder.losses[::max(1, learn.steps//10)]
        row = dict(kind='small training', steps=learn.steps, seconds=learn.seconds, batch=batch,
                   pictures_per_s=learn.steps*batch/learn.seconds, losses=[round(float(o), 4) for o in losses])
        if waits is not None:
            common = sorted(set(waits), key=waits.count, reverse=True)[:6]
            row |= dict(waits_per_step=len(waits)/learn.steps, wait_places={o: waits.count(o) for o in common})
        write(row)
        captions = shapes_captions(4 if rehearsal else 32)
        pictures = MDMPipeline.from_pretrained(f'{tmp}/run')(captions, n=1, **(dict(steps=1) if rehearsal else {}))
        contact_sheet(pictures, captions).save(folder/'sheet.png')
        write(dict(kind='sheet', file='sheet.png', captions=captions))

tiny_training = '''train.steps=3 train.batch_size=4 train.warmup_steps=0 data.workers=0 data.shuffle=8 text.dim=16
    model.channels=[32,32] model.time_dim=16 model.inner.channels=[32,32,32] model.inner.num_resnets=[1,1,1]
    model.inner.text_proj_dim=16 model.inner.num_text_layers=1 model.inner.time_dim=16'''.split()

def part_function(name):
    "The function of a part, and its arguments."
    if name == 'tests': return run_tests, ()
    if name == 'training': return small_training, ()
    mode, size = name.split('-')
    return (speed_eager if mode == 'eager' else speed_compiled), (int(size),)

# ---- one part in a process of its own

def child(name, folder, rehearsal):
    "Run a part; its rows go to `NAME.jsonl`, each as soon as it is known."
    known = json.loads((folder/'known.json').read_text())
    f, args = part_function(name)
    more = dict(folder=folder) if f is small_training else {}
    with open(folder/f'{name}.jsonl', 'a') as rows:
        def write(row): print(json.dumps(row), file=rows, flush=True)
        f(*args, write=write, rehearsal=rehearsal, known=known, **more)

def run_part(command, rows, log, seconds):
    "Run a command for at most `seconds`. Gives status, error and the rows that it had written."
    start = time.perf_counter()
    with open(log, 'w') as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try: code = process.wait(seconds)
    except subprocess.TimeoutExpired: code = None
    finally:
        try: os.killpg(process.pid, signal.SIGKILL)          # with what it started
        except ProcessLookupError: pass
        process.wait()
    said = log.read_text(errors='replace')
    part = dict(status='done', seconds=round(time.perf_counter() - start, 1), rows=read_rows(rows))
    if code is None: part |= dict(status='out of time', error=f'it was ended after its budget of {seconds:.0f} s')
    elif code and (absent := re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", said)):
        part |= dict(status='left out', error=f'the package {absent[1]} is not installed')
    elif code: part |= dict(status='failed', error=said[-2000:] or f'exit status {code}')
    return part

def read_rows(path):
    "The whole lines of a file of JSON lines."
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(o) for o in lines if o.endswith('\n')]

def run_all(names, output, minutes, rehearsal):
    "Run parts one after the other; `result.json` and `table.md` are written after each."
    start, result = time.perf_counter(), {**machine(rehearsal), 'parts': {}}
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for name in names:
            known = [row for part in result['parts'].values() for row in part['rows']]
            (folder/'known.json').write_text(json.dumps(known))
            left = 60*minutes - (time.perf_counter() - start)
            limit = min(budgets[name], left)
            if limit < 5:
                error = f'no time was left: run it with --parts {name}'
                part = dict(status='left out', seconds=0., rows=[], error=error)
            elif rehearsal and name != 'tests': part = rehearsed(name, folder)
            else:
                command = [sys.executable, __file__, '--child', name, '--output', str(folder)]
                command += ['--rehearse']*rehearsal
                part = run_part(command, folder/f'{name}.jsonl', folder/f'{name}.log', limit)
            result['parts'][name] = part
            if (folder/'sheet.png').exists(): (folder/'sheet.png').replace(output/'sheet.png')
            result['seconds'] = round(time.perf_counter() - start, 1)
            (output/'result.json').write_text(json.dumps(result, indent=1))
            (output/'table.md').write_text(table(result))
            print(f"{name}: {_outcome(part)}, {part['seconds']:.0f} s", part.get('error', ''), flush=True)
    return result

def rehearsed(name, folder):
    "A part in this process: a rehearsal would spend most of its time on starting Python."
    start, part = time.perf_counter(), dict(status='done')
    try: child(name, folder, True)
    except Exception: part |= dict(status='failed', error=traceback.format_exc()[-2000:])
    return {**part, 'seconds': round(time.perf_counter() - start, 1), 'rows': read_rows(folder/f'{name}.jsonl')}

# ---- the table

def number(x, digits=1, unit=''):
    "A number for the table; a dash for None."
    return '-' if x is None else f'{x:.{digits}f}{unit}'

def lines(head, rows):
    "A Markdown table and an empty line."
    line = lambda cells: '| ' + ' | '.join(map(str, cells)) + ' |'
    return [line(head), '|---'*len(head) + '|', *map(line, rows), '']

def labels_of(r): return r['recipe'], r['mode'], r['layout'], r['batch']

def training_line(r):
    "A row of the table of training steps."
    if 'error' in r: return (*labels_of(r), r['error'], *'-----')
    share = r['utilisation'] and 100*r['utilisation']
    return (*labels_of(r), number(r['pictures_per_s']), number(r['seconds'], 3), number(r['memory_gib']),
            number(r['tflops']), number(share, 0, ' %'), number(r['waits'], 0))

def sampling_line(r):
    "A row of the table of sampling."
    return (*labels_of(r), f"{r['steps']} {r['solver']}", number(r['pictures_per_s'], 2), number(r['seconds'], 2),
            number(r['waits'], 0))

def part_line(name, part):
    "A row of the table of parts."
    error = ' '.join(part.get('error', '').split())[-300:].replace('|', '/')
    return name, _outcome(part), number(part['seconds'], 0), error

def small_training_line(r):
    "A sentence about the small training."
    return (f"pictures_64 on shapes: {r['steps']} steps of {r['batch']} in {r['seconds']:.0f} s, "
            f"{r['pictures_per_s']:.0f} pictures/s, loss {r['losses'][0]} to {r['losses'][-1]}, "
            f"{number(r.get('waits_per_step'), 2)} waits per step")

def table(result):
    "Everything that was measured, as Markdown."
    rows, speed = {}, ['mode', 'layout', 'batch']
    for part in result['parts'].values():
        for row in part['rows']: rows.setdefault(row['kind'], []).append(row)
    missing = ', '.join(result['missing_packages']) or 'none'
    out = [f"{result['card']}, {result['date']}, torch {result['torch']}; missing packages: {missing}", '']
    if result['rehearsal']: out += ['A rehearsal on tiny sizes: these times say nothing.', '']
    head = ['training', *speed, 'pictures/s', 's per step', 'GiB', 'TFLOP/s', 'utilisation', 'waits per step']
    out += lines(head, map(training_line, rows.get('training', [])))
    head = ['sampling', *speed, 'steps', 'pictures/s', 's per batch', 'waits per batch']
    out += lines(head, map(sampling_line, rows.get('sampling', [])))
    for r in rows.get('small training', []): out += [small_training_line(r), '']
    return '\n'.join(out + lines(['part', 'result', 's', 'error'], [part_line(*o) for o in result['parts'].items()]))

def _outcome(part):
    "How a part ended, with the counts of tests."
    tests = next((r for r in part['rows'] if r['kind'] == 'tests'), {})
    counts = [f'{tests[k]} {k}' for k in ('passed', 'failed', 'skipped', 'error', 'errors') if k in tests]
    return ', '.join([part['status'], *counts])

# ---- the command

def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('gpu_bench'), help='folder for the results')
    parser.add_argument('--minutes', type=float, default=8, help='time in all')
    parser.add_argument('--parts', nargs='+', choices=list(budgets), default=list(budgets), help='which of the parts')
    parser.add_argument('--rehearse', action='store_true', help='tiny sizes on the CPU')
    parser.add_argument('--child', choices=list(budgets), help=argparse.SUPPRESS)
    args = parser.parse_args(args)
    if args.child: return child(args.child, args.output, args.rehearse)
    if not importlib.util.find_spec('torch'): parser.error('PyTorch is not installed')
    import torch
    if not args.rehearse and not torch.cuda.is_available():
        parser.error('PyTorch finds no CUDA GPU here. With --rehearse everything runs on a CPU, on tiny sizes')
    names = [o for o in budgets if o in args.parts]
    result = run_all(names, args.output, args.minutes, args.rehearse)
    print(f"\n{table(result)}\nwritten to {args.output}")
    return 0 if all(p['status'] == 'done' for p in result['parts'].values()) else 1

if __name__ == '__main__': sys.exit(main())
