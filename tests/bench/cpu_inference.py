"""Speed of inference on this CPU: one evaluation of the large networks, and a sample of the bundled model by its parts.

    python tests/bench/cpu_inference.py [--recipes cc12m_64x64 ...] [--batches 1 4] [--rounds 5] [--threads N] [--rehearse]

The variants of a line take turns within each round, so that a machine that is busy with other things slows all of them
alike: compare ratios of one run. In bfloat16 networks sample in the memory format channels last; the same network is also
timed in the usual format. Weights are converted to bfloat16 once for all steps of a sample, so that is not counted; the
same network is also timed with a conversion in each evaluation. `limit` is the rate of one large 3 x 3 convolution in
bfloat16 (256 channels, 64 x 64 pixels), measured in the same rounds; the share of it is what the whole network reaches of
that rate. --rehearse runs everything once on tiny sizes; its times mean nothing. --cpu-time counts processor time with
one thread instead, which other programs on the machine disturb less."""
import argparse, sys, time
from collections import defaultdict
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from bench_models import Bench, count_flops, large
from mdm.pipeline import keep_casts

clock = time.perf_counter

def take_turns(calls, rounds):
    "Median seconds of each of several calls by name, which take turns; a first call of each does not count."
    took = defaultdict(list)
    for call in calls.values(): call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            took[name].append(clock() - start)
    return {name: median(o) for name, o in took.items()}

def limit_of(batch, tiny):
    "A large convolution in bfloat16: a call, and its operations."
    width, side = (8, 8) if tiny else (256, 64)
    x = torch.randn(batch, width, side, side, dtype=torch.bfloat16)
    w = torch.randn(width, width, 3, 3, dtype=torch.bfloat16)
    return lambda: F.conv2d(x, w, padding=1), 2*batch*side**2*width**2*9

def evaluation(bench, batch, bf16, usual=False):
    "A call of the network as the pipeline makes it; `usual`: in the usual memory format, not in channels last."
    x, t, cond, mask = bench.inputs(batch)
    def call():
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            if usual: return bench.model.denoise(x, t, bench.model.encode_text(cond, mask), {})
            return bench.model(x, t, cond, mask)
    return call

def measure(name, batch, rounds, tiny):
    "A row of the table of networks."
    bench = Bench(name, tiny=tiny)
    bench.model.eval()
    limit, operations = limit_of(batch, tiny)
    half = evaluation(bench, batch, True)
    def anew():
        torch.clear_autocast_cache()
        half()
    calls = {'limit': limit, 'full': evaluation(bench, batch, False), 'anew': anew, 'half': half,
             'usual': evaluation(bench, batch, True, usual=True)}
    with keep_casts(): flops, took = count_flops(calls['full']), take_turns(calls, rounds)
    rate = operations/took['limit']
    return (name, batch, f'{flops/1e9:.1f}', f"{took['full']:.3f}", f"{took['half']:.3f}",
            f"{took['full']/took['half']:.2f}", f"{took['anew']/took['half']:.2f}", f"{took['usual']/took['half']:.2f}", f'{rate/1e9:.0f}',
            f"{flops/took['half']/rate:.0%}")

# ---- the bundled model

class Stopwatch:
    "Adds up the seconds spent in functions of objects."
    def __init__(self): self.seconds, self.calls = defaultdict(float), defaultdict(int)

    def watch(self, owner, attribute, name):
        f = getattr(owner, attribute)
        def timed(*args, **kwargs):
            start = clock()
            try: return f(*args, **kwargs)
            finally:
                self.seconds[name] += clock() - start
                self.calls[name] += 1
        setattr(owner, attribute, timed)

def sample_by_parts(pictures, steps, bf16, rounds):
    "Median seconds of a sample of the bundled model, by part."
    import mdm.pipeline
    from mdm.pipeline import MDMPipeline
    pipe = MDMPipeline.from_pretrained('shapes', device='cpu', bf16=bf16)
    watch, totals, parts = Stopwatch(), [], defaultdict(list)
    pipe.encoder = Timed(pipe.encoder, watch, 'text encoder')
    watch.watch(pipe.model, 'forward', 'network')
    to_pil = mdm.pipeline.to_pil
    watch.watch(mdm.pipeline, 'to_pil', 'to pictures')
    for i in range(rounds + 1):
        watch.seconds.clear()
        watch.calls.clear()
        start = clock()
        pipe(f'a red circle {i}', n=pictures, steps=steps)      # another prompt each time: the encoder keeps known ones
        if not i: continue
        totals.append(clock() - start)
        for name, seconds in watch.seconds.items(): parts[name].append(seconds)
    mdm.pipeline.to_pil = to_pil
    found = {name: median(o) for name, o in parts.items()}
    calls = watch.calls['network']
    return {**found, 'everything else': median(totals) - sum(found.values()), 'in all': median(totals),
            f'one of {calls} evaluations of {2*pictures}': found['network']/calls}

class Timed:
    "Stands in for an object whose calls are timed."
    def __init__(self, wrapped, watch, name):
        self.wrapped = wrapped
        self.call = wrapped.__call__
        watch.watch(self, 'call', name)
    def __call__(self, *args): return self.call(*args)
    def __getattr__(self, name): return getattr(self.__dict__['wrapped'], name)

def table(head, rows):
    line = lambda cells: '| ' + ' | '.join(map(str, cells)) + ' |'
    return '\n'.join([line(head), '|---'*len(head) + '|', *map(line, rows)])

def main(args=None):
    global clock
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipes', nargs='*', default=large, choices=large)
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 4])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, help='of PyTorch; as many as it takes by itself without this')
    parser.add_argument('--cpu-time', action='store_true', help='processor time with one thread')
    parser.add_argument('--rehearse', action='store_true', help='once, on tiny sizes')
    args = parser.parse_args(args)
    if args.cpu_time: clock, args.threads = time.process_time, 1
    if args.threads: torch.set_num_threads(args.threads)
    if args.rehearse: args.rounds = 1
    what = 'processor time' if args.cpu_time else 'time'
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds, {what}', flush=True)
    rows = [measure(name, b, args.rounds, args.rehearse) for name in args.recipes for b in args.batches]
    head = ['network', 'batch', 'GFLOP', 'float32, s', 'bfloat16, s', 'bfloat16 faster by',
            'kept weights faster by', 'channels last faster by', 'limit, GFLOP/s', 'share of it in bfloat16']
    if rows: print(table(head, rows), '\n', flush=True)
    for steps in ((1,) if args.rehearse else (4, 25)):
        samples = [sample_by_parts(4, steps, bf16, args.rounds) for bf16 in (False, True)]
        head = [f'shapes, 4 pictures, {steps} steps', 'float32, ms', 'bfloat16, ms']
        print(table(head, [(k, *(f'{1000*o[k]:.1f}' for o in samples)) for k in samples[0]]), '\n', flush=True)

if __name__ == '__main__': main()
