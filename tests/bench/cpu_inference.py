"""Speed of inference on this CPU: one evaluation of the large networks, and a sample of the bundled model by its parts.

    python tests/bench/cpu_inference.py [--recipes cc12m_64x64 ...] [--batches 1 4] [--rounds 5] [--threads N] [--rehearse]

The variants of a line take turns within each round, so that a machine that is busy with other things slows all of them
alike: compare ratios of one run. `limit` is the rate of one large 3 x 3 convolution in bfloat16 (256 channels, 64 x 64
pixels), measured in the same rounds; the share of it is what the whole network reaches of that rate.
--rehearse runs everything once on tiny sizes; its times mean nothing."""
import argparse, sys, time
from collections import defaultdict
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from bench_models import Bench, count_flops, large

def take_turns(calls, rounds):
    "Median seconds of each of several calls by name, which take turns; a first call of each does not count."
    took = defaultdict(list)
    for call in calls.values(): call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            took[name].append(time.perf_counter() - start)
    return {name: median(o) for name, o in took.items()}

def limit_of(batch, tiny):
    "A large convolution in bfloat16: a call, and its operations."
    width, side = (8, 8) if tiny else (256, 64)
    x = torch.randn(batch, width, side, side, dtype=torch.bfloat16)
    w = torch.randn(width, width, 3, 3, dtype=torch.bfloat16)
    return lambda: F.conv2d(x, w, padding=1), 2*batch*side**2*width**2*9

def evaluation(bench, batch, bf16):
    "A call of the network as the pipeline makes it."
    inputs = bench.inputs(batch)
    def call():
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16): return bench.model(*inputs)
    return call

def measure(name, batch, rounds, tiny):
    "A row of the table of networks."
    bench = Bench(name, tiny=tiny)
    bench.model.eval()
    limit, operations = limit_of(batch, tiny)
    calls = {'limit': limit, 'float32': evaluation(bench, batch, False), 'bfloat16': evaluation(bench, batch, True)}
    flops, took = count_flops(calls['float32']), take_turns(calls, rounds)
    rate = operations/took['limit']
    return (name, batch, f'{flops/1e9:.1f}', f"{took['float32']:.3f}", f"{took['bfloat16']:.3f}",
            f"{took['float32']/took['bfloat16']:.2f}", f'{rate/1e9:.0f}', f"{flops/took['bfloat16']/rate:.0%}")

# ---- the bundled model

class Stopwatch:
    "Adds up the seconds spent in functions of objects."
    def __init__(self): self.seconds, self.calls = defaultdict(float), defaultdict(int)

    def watch(self, owner, attribute, name):
        f = getattr(owner, attribute)
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try: return f(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self.calls[name] += 1
        setattr(owner, attribute, timed)

def sample_by_parts(pictures, steps, rounds):
    "Median seconds of a sample of the bundled model, by part."
    import mdm.pipeline
    from mdm.pipeline import MDMPipeline
    pipe = MDMPipeline.from_pretrained('shapes', device='cpu')
    watch, totals, parts = Stopwatch(), [], defaultdict(list)
    pipe.encoder = Timed(pipe.encoder, watch, 'text encoder')
    watch.watch(pipe.model, 'forward', 'network')
    watch.watch(mdm.pipeline, 'to_pil', 'to pictures')
    for i in range(rounds + 1):
        watch.seconds.clear()
        watch.calls.clear()
        start = time.perf_counter()
        pipe(f'a red circle {i}', n=pictures, steps=steps)      # another prompt each time: the encoder keeps known ones
        if not i: continue
        totals.append(time.perf_counter() - start)
        for name, seconds in watch.seconds.items(): parts[name].append(seconds)
    found = {name: median(o) for name, o in parts.items()}
    return {**found, 'everything else': median(totals) - sum(found.values()), 'in all': median(totals)}

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipes', nargs='*', default=large, choices=large)
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 4])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--threads', type=int, help='of PyTorch; as many as it takes by itself without this')
    parser.add_argument('--rehearse', action='store_true')
    args = parser.parse_args(args)
    if args.threads: torch.set_num_threads(args.threads)
    if args.rehearse: args.rounds = 1
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds', flush=True)
    rows = [measure(name, b, args.rounds, args.rehearse) for name in args.recipes for b in args.batches]
    head = ['network', 'batch', 'GFLOP', 'float32, s', 'bfloat16, s', 'faster by', 'limit, GFLOP/s', 'share of it']
    if rows: print(table(head, rows), '\n', flush=True)
    for steps in ((1,) if args.rehearse else (4, 25)):
        found = sample_by_parts(4, steps, args.rounds)
        print(table([f'shapes, 4 pictures, {steps} steps', 'ms'], [(k, f'{1000*v:.1f}') for k, v in found.items()]), '\n')

if __name__ == '__main__': main()
