"""Read mutated .pth files for a minute, and report what came of them.

    python tests/bench/fuzz_checkpoints.py [--seconds 60] [--seed 0] [--memory 4]     # memory in GiB, beyond what the imports take
    python tests/bench/fuzz_checkpoints.py --rehearse

Pickles of real checkpoints are taken apart into instructions, which are repeated, moved, removed, joined with others and given other arguments; some files get damaged bytes, or another list of parts.
A child process reads each file with `load_released`, under a limit of memory. A file is a finding when it ends in anything but weights or `UnsafeCheckpoint`, takes longer than ten seconds, or needs
more memory. The number of a finding gives its file again: `mutant(number)`."""
import argparse, collections, io, os, pickletools, random, signal, subprocess, sys, tempfile, time, zipfile
from pathlib import Path
import torch
from mdm.reference.checkpoints import UnsafeCheckpoint, load_released

def _saved(content, **kwargs):
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()

def seeds():
    "Files to begin with: a small checkpoint in both forms, and one with all kinds of values."
    torch.manual_seed(0)
    weights = collections.OrderedDict((f'down.{i}.weight', torch.randn(4, 3)) for i in range(3))
    plain = dict(state_dict=weights, batch_num=7, loss=.5, args=argparse.Namespace(lr=1e-4, sizes=[(1, 2), (3, 4)], name='x'*300))
    odd = dict(state_dict=dict(a=torch.ones(5, dtype=torch.bfloat16), b=torch.zeros(2, 2).t(), c=torch.tensor(3)), args={1: (2, (3, (4,))), 'b': b'bytes', 'z': {1, 2}, 'q': complex(1, 2)})
    return [_saved(plain), _saved(odd), _saved(plain, _use_new_zipfile_serialization=False)]

def parts_of(blob):
    "The parts of a zip file by name."
    with zipfile.ZipFile(io.BytesIO(blob)) as z: return {e.filename: z.read(e) for e in z.infolist()}

def pack(parts, rng):
    "A zip file; rarely with what no checkpoint has."
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED if rng.random() < .02 else zipfile.ZIP_STORED) as z:
        for k, v in parts.items(): z.writestr(k, v)
        if rng.random() < .02:
            for i in range(3000): z.writestr(f'archive/more/{i}', b'')
    return file.getvalue()

def instructions(pickle):
    "The instructions of a pickle, as bytes."
    starts = [at for _, _, at in pickletools.genops(pickle)] + [len(pickle)]
    return [pickle[a:b] for a, b in zip(starts, starts[1:])]

spare = [b'2', b'0', b'(', b'1', b'}', b']', b')', b'\x8f', b'\x85', b'\x86', b'\x87', b't', b'a', b'e', b's', b'u', b'b', b'R', b'\x81', b'Q', b'N', b'\x88', b'K\x05', b'J\xff\xff\xff\x7f', b'G\x7f\xf0' + b'\0'*6,
    b'\x8a\x08' + b'\xff'*7 + b'\x7f', b'\x8a\x20' + b'\x7f'*32, b'h\x00', b'h\x01', b'h\x05', b'q\x00', b'q\x01', b'r\xff\xff\xff\x7f', b'X\x04\0\0\0text', b'ccollections\nOrderedDict\n', b'c__builtin__\nset\n',
    b'c_codecs\nencode\n', b'ctorch\nSize\n', b'cargparse\nNamespace\n', b'ctorch._utils\n_rebuild_tensor_v2\n', b'cos\nsystem\n', b'cml_mdm.x\nY\n', b'ctorch\nFloatStorage\n', b'\x80\x03', b'I9999999999\n', b'.']

def mutated(code, rng, others):
    "Instructions, changed in one to six ways."
    code = list(code)
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.randrange(len(code)) for _ in range(2))
        kind = rng.randrange(8)
        if kind == 0: del code[i:min(j, i + 4)]
        elif kind == 1: code[i:i] = code[i:min(j + 1, i + 12)]*rng.choice([1, 2, 60, 2000])
        elif kind == 2: code[i], code[j] = code[j], code[i]
        elif kind == 3: code[i:i] = rng.choices(spare, k=rng.randint(1, 4))*rng.choice([1, 1, 30, 3000])
        elif kind == 4: code[i] = rng.choice(spare)
        elif kind == 5: code[i:i] = rng.choice(others)[:rng.randint(1, 40)]
        elif kind == 6: code[i] = bytes([code[i][0]]) + bytes(rng.randrange(256) for _ in code[i][1:])
        else: code[i:i + 1] = [code[i], b'q\x09', b'0' if rng.random() < .3 else b'', *[b'h\x09h\x09\x86q\x09']*rng.choice([1, 20, 60])]
        code = code[:300_000] or [b'N']
    return b''.join(code)

_files = []

def mutant(number):
    "File of a number: always the same bytes."
    rng = random.Random(number)
    if not _files: _files.extend(seeds())
    blob = rng.choice(_files)
    if rng.random() < .15:                                   # damage anywhere
        blob = bytearray(blob)
        for _ in range(rng.randint(1, 6)): blob[rng.randrange(len(blob))] = rng.randrange(256)
        return bytes(blob)
    if blob[:2] != b'PK':
        head, rest = blob[:15], blob[15:]
        return head + mutated([rest[i:i + 1] for i in range(min(len(rest), 3000))], rng, [spare]) + rest[3000:]
    parts = parts_of(blob)
    name = next(k for k in parts if k.endswith('data.pkl'))
    others = [instructions(next(v for k, v in parts_of(o).items() if k.endswith('data.pkl'))) for o in _files[:2]]
    return pack({**parts, name: mutated(instructions(parts[name]), rng, others)}, rng)

def outcome(blob, path):
    "What comes of reading a file: 'read', or the words of the refusal. Anything else is raised."
    Path(path).write_bytes(blob)
    try: load_released(path)
    except UnsafeCheckpoint as e: return str(e).partition(' was not loaded: ')[2][:40]
    return 'read'

def child(first, count, memory):
    "Read `count` files from a number on; a line for each before and after."
    import resource
    used = int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE') if Path('/proc/self/statm').exists() else 8 << 30
    resource.setrlimit(resource.RLIMIT_AS, (used + int(memory*2**30),)*2)
    with tempfile.TemporaryDirectory() as tmp:
        for n in range(first, first + count):
            print('begin', n, flush=True)
            start = time.perf_counter()
            try: said = outcome(mutant(n), f'{tmp}/x.pth')
            except BaseException as e: said = f'FINDING {type(e).__name__}: {e}'[:200]
            said = ' '.join(said.split())
            print('end', n, f'{time.perf_counter() - start:.3f}', said, flush=True)

def read_many(seconds, seed, memory, count=2000):
    "Read files until the time is up. Gives the outcomes with their counts, the findings, and the longest time."
    outcomes, findings, longest, n, end = collections.Counter(), [], 0., seed, time.monotonic() + seconds
    while time.monotonic() < end:
        script = [sys.executable, __file__, '--child', str(n), str(count), '--memory', str(memory)]
        run, at = subprocess.Popen(script, stdout=subprocess.PIPE, text=True), n
        def stop(*_): run.kill()
        signal.signal(signal.SIGALRM, stop)
        for line in run.stdout:
            what, number, *rest = line.split(maxsplit=3)
            if what == 'begin':
                at = int(number)
                signal.alarm(60 if at == n else 10)          # the first one waits for the imports
                continue
            signal.alarm(0)
            n, longest = at + 1, max(longest, float(rest[0]))
            outcomes['FINDING' if 'FINDING' in rest[1] else rest[1].strip()] += 1
            if 'FINDING' in rest[1]: findings.append(f'{number}: {rest[1].strip()}')
            if time.monotonic() > end: break
        else:
            signal.alarm(0)
            if run.wait():
                findings.append(f'{at}: the process ended with {run.returncode} (killed after 10 s, or crashed)')
                n = at + 1
        run.kill()
        run.wait()
    return outcomes, findings, longest

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=60)
    parser.add_argument('--seed', type=int, default=0, help='number of the first file')
    parser.add_argument('--memory', type=float, default=4)
    parser.add_argument('--child', type=int, nargs=2)
    parser.add_argument('--rehearse', action='store_true')
    args = parser.parse_args()
    if args.child: return child(*args.child, args.memory)
    outcomes, findings, longest = read_many(1 if args.rehearse else args.seconds, args.seed, args.memory, 20 if args.rehearse else 2000)
    for what, n in outcomes.most_common(30): print(f'{n:7,}  {what}')
    print(f'{sum(outcomes.values()):,} files, the slowest took {longest:.2f} s, {len(findings)} findings', *findings, sep='\n')
    return len(findings) > 0

if __name__ == '__main__': sys.exit(main())
