"""What a student and its teacher draw, over the number of network evaluations, by every figure of the judge, at every resolution.

    python tests/bench/distill.py TEACHER STUDENT [--captions 64] [--each 2] [--steps 1 2 4 8] [--full 50] [--solvers ddim dpm++2m unipc] [--output FOLDER]

Captions are held out. A guided step of the teacher is two evaluations. `rmse` is the distance (of pictures in [-1, 1]) to the teacher's --full steps from the same noise; `rmse.median` is its
median over pictures. The other columns are the judge's. Prints a Markdown table; --output also writes it with the figures as JSON, a plot and a sheet of pictures."""
import argparse, json, time
from pathlib import Path
import numpy as np, torch
from mdm.data.shapes import shapes_captions
from mdm.data.shapes_judge import shapes_report
from mdm.pipeline import MDMPipeline
from mdm.utils.pictures import contact_sheet

def tensors(pictures): return torch.stack([torch.from_numpy(np.array(o)).float()/127.5 - 1 for o in pictures])

def measure(pipe, captions, reference=None, **settings):
    "Pictures at every resolution, and for each resolution the figures by name."
    start, evaluations = time.perf_counter(), settings['steps']*(1 if settings.get('guidance', pipe.recipe.sample.guidance) == 1 else 2)
    levels = pipe(captions, n=1, seed=0, batch_size=32, every_resolution=True, **settings)
    seconds, rows = time.perf_counter() - start, []
    for i, level in enumerate(levels):
        row = dict(evaluations=evaluations, pixels=level[0].width, seconds=seconds/len(captions))
        if reference:
            apart = (tensors(level) - tensors(reference[i])).square().mean((1, 2, 3)).sqrt()
            row |= {'rmse': apart.mean().item(), 'rmse.median': apart.median().item()}
        rows.append(row | shapes_report(level, captions))
    return levels, rows

def plot(rows, path):
    "Every figure over evaluations, a panel each, at the highest resolution; a line for every sampler."
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    top = max(r['pixels'] for r in rows)
    names = [k for k in rows[-1] if k not in ('who', 'evaluations', 'pixels')]
    fig, axes = plt.subplots(-(-len(names)//3), 3, figsize=(12, 2.8*-(-len(names)//3)), squeeze=False)
    for ax, name in zip(axes.flat, names):
        for who in dict.fromkeys(r['who'] for r in rows):
            line = [(r['evaluations'], r[name]) for r in rows if r['who'] == who and r['pixels'] == top and name in r]
            if len(line) == 1: ax.axhline(line[0][1], c='.5', ls=':', label=who)
            elif line: ax.plot(*zip(*sorted(line)), marker='.', label=who)
        ax.set(xscale='log', xlabel='evaluations per picture', ylabel=name)
    axes.flat[0].legend(fontsize=7)
    fig.tight_layout(); fig.savefig(path, dpi=110); plt.close(fig)

def table(rows):
    names = list(dict.fromkeys(k for r in rows for k in r))
    show = lambda v: '' if v is None else f'{v:.3f}' if isinstance(v, float) else str(v)
    return '\n'.join('| ' + ' | '.join(o) + ' |' for o in [names, ['---']*len(names), *([show(r.get(k)) for k in names] for r in rows)])

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('teacher'), add('students', nargs='+'), add('--captions', type=int, default=64), add('--each', type=int, default=1), add('--full', type=int, default=50)
    add('--steps', type=int, nargs='+', default=[1, 2, 4, 8]), add('--solvers', nargs='+', default=['ddim', 'dpm++2m', 'unipc']), add('--output', type=Path)
    args = parser.parse_args(argv)
    captions, rows, sheets = [c for c in shapes_captions(args.captions) for _ in range(args.each)], [], []
    def add_rows(who, found): rows.extend(dict(who=who, **r) for r in found)
    teacher = MDMPipeline.from_pretrained(args.teacher)
    reference, found = measure(teacher, captions, steps=args.full)
    add_rows(f'teacher, {args.full} steps', found); sheets.append(reference[0])
    for solver in args.solvers:
        for k in args.steps:
            levels, found = measure(teacher, captions, reference, steps=k, solver=solver, spacing='trailing' if k < 4 else 'logsnr')
            add_rows(f'teacher, {solver}', found)
    for path in args.students:
        student = MDMPipeline.from_pretrained(path)
        for k in args.steps:
            levels, found = measure(student, captions, reference, steps=k)
            add_rows(Path(path).name, found); sheets.append(levels[0])
    print(table(rows))
    if not args.output: return rows
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output/'figures.json').write_text(json.dumps(rows, indent=1)); (args.output/'figures.md').write_text(table(rows) + '\n')
    plot(rows, args.output/'figures.png')
    shown = min(12, len(captions))
    contact_sheet([o for s in sheets for o in s[:shown]], captions[:shown] + ['']*shown*(len(sheets) - 1), columns=shown).save(args.output/'pictures.png')
    return rows

if __name__ == '__main__': main()
