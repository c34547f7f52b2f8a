"""Objectives compared at equal steps: each setting trains a recipe with several seeds, then its errors and pictures are measured.

    python tests/bench/objectives.py [--recipe shapes] [--steps 640] [--seeds 0 1 2] [--settings today flow ...] [--output objectives.json] [key=value ...]

A setting is a name from `settings` below, or NAME:key=value,key=value for one of your own. key=value changes the recipe of all settings. Each finished training is written into the JSON
at once, and what is in it already, with the same changes and steps, is not done again. --table only prints the tables. Measured for every training:

- `v_error`: squared error of v on held-out pictures at fixed log-SNRs of the innermost resolution, the same pictures and noise for all, [resolution][level]; whatever the network predicts, and
  in whatever space it was trained, this is its error of the picture over the variance of the noise;
- `judge`: what the judge of shapes says of pictures of held-out captions, for each number of sampling steps (--draw) and each spacing (--spacing); of other pictures (data.files=..., --valid)
  a judge of retrieval says, with the captions of --valid, how often it picks the right one of 32, and how far its vectors are from those of the real pictures (--retrieval, as in ways.py);
- `seconds` of training, and `loss`, the last one of the log (each setting has its own unit)."""
import argparse, csv, json, re, sys, tempfile, time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from mdm.data.shapes import shapes_captions, write_shapes
from mdm.data.shapes_judge import shapes_report
from mdm.diffusion.objective import Diffusion, pyramid
from mdm.diffusion.sampler import PictureNoise
from mdm.evaluation.losses import read_pictures
from mdm.pipeline import MDMPipeline
from mdm.recipe import load_recipe
from mdm.training.run import run_training
from mdm.utils.files import atomic_write
from mdm.utils.pictures import pixel_tensors, pixels_to_signal

flow = 'schedule=flow prediction=flow loss_target=flow'
even = 'schedule=deepfloyd prediction=v loss_target=v time_sampling=uniform logit_mean=0 logit_std=1'      # noise levels drawn evenly, the network predicts v
settings = {                               # changes of the section `diffusion`
    'today': '',                           # of the preset; the others change `even`
    'even': '',
    'eps': 'loss_target=eps',
    'flow': flow,
    'v as flow': 'loss_target=flow',
    'flow schedule, v': 'schedule=flow',
    'flow, logit-normal': f'{flow} time_sampling=logit_normal',
    'logit-normal': 'time_sampling=logit_normal',
    'logit-normal 0.5': 'time_sampling=logit_normal logit_mean=0.5',
    'equal log-SNR': 'time_sampling=logsnr',
    'min-SNR': 'loss_weight=min_snr',
    'sigmoid': 'loss_weight=sigmoid',
    'sigmoid 0': 'loss_weight=sigmoid sigmoid_bias=0',
    'sigmoid, equal log-SNR': 'loss_weight=sigmoid time_sampling=logsnr',
    'x0, v-loss': 'prediction=x0 loss_target=v min_divisor=0.05',
    'x0, flow-loss': 'schedule=flow prediction=x0 loss_target=flow min_divisor=0.05',
    'x0, flow-loss, logit-normal': 'schedule=flow prediction=x0 loss_target=flow min_divisor=0.05 time_sampling=logit_normal logit_mean=0.8 logit_std=0.8'}

levels = [-6., -4., -3., -2., -1., 0., 1., 2., 3., 4., 6.]       # log-SNR at the innermost resolution

@torch.no_grad()
def v_errors(pipe, files, n, seed=0):
    "Squared error of v [resolution][level], and the log-SNRs at which it was measured, as lists."
    d = Diffusion(pipe.diffusion.config, pipe.model.scales)
    d.shares = [1.]*len(d.scales)                                # every resolution of every picture
    own = torch.logit(d.gammas[:, 1:])
    steps = [(own[-1] - o).abs().argmin().item() for o in levels]
    sums, count = torch.zeros(len(d.scales), len(levels), dtype=torch.float64), 0
    for numbers, pictures, captions, micros in read_pictures(files, pipe.recipe.data.image_size, 32, n):
        images = pixels_to_signal(pictures)
        truth, (cond, mask) = pyramid(images, d.scales), pipe.encoder(captions)
        for k, tau in enumerate(steps):
            draw = PictureNoise([seed + 100*i + k for i in numbers])
            noise = [draw(*o.shape[1:]) for o in truth]
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=pipe.bf16):
                found = d.loss(pipe.model, images, cond, mask, micros, tau=torch.full((len(images),), tau), noise=noise)
            for i, (x0, x, s) in enumerate(zip(found.x0, truth, d.signal)):
                sums[i, k] += ((x0 - x)/s).double().square().mean((1, 2, 3)).sum()/(1 - d.gammas[i, tau + 1])
        count += len(images)
    return (sums/count).tolist(), own[:, steps].tolist()

def pictures_of(folder, recipe, n, held_out, seed, plain):
    "Shards of shapes; drawn once."
    done = folder/'done'
    if not done.exists():
        write_shapes(folder, n, recipe.data.image_size, seed, held_out=held_out, plain=plain)
        done.touch()
    return [str(o) for o in sorted(folder.glob('*.tar'))]

def figures_of(recipe, valid, seed, args):
    "Captions to draw, and what says how good pictures of them are, by name."
    if not args.retrieval:
        captions = shapes_captions(args.captions, seed, plain=args.plain)
        return captions, lambda pictures: shapes_report(pictures, captions)
    from mdm.evaluation.retrieval import load_retrieval
    from ways import real_pictures, retrieval_scores
    judge = load_retrieval(args.retrieval)
    captions, real = real_pictures(recipe, valid, judge, args.captions, args.real)
    def figures(pictures):
        picked, fd, kid = retrieval_scores(judge, real, captions, torch.stack(pixel_tensors(pictures)))
        return {'picked': picked['value'], 'FD': fd['value'], 'KID x 1000': 1000*kid['value']}
    return captions, figures

def measure(changes, seed, args, folder):
    "Train one setting with one seed; its figures."
    recipe = load_recipe(args.recipe, [*args.rest, *changes, f'train.steps={args.steps}', f'train.seed={seed}', 'train.preview_prompts=[]',
                                       f'train.warmup_steps={min(args.warmup, args.steps//2)}', f'train.output={folder}'])
    data = Path(args.data)/('plain' if args.plain else 'all')
    if not recipe.data.files:
        most = min(args.pictures, args.steps*recipe.train.batch_size*recipe.train.accumulate)
        recipe.data.files = pictures_of(data/f'train-{seed}-{most}', recipe, most, False, seed, args.plain)
    valid = args.valid or pictures_of(data/f'valid-{args.captions}', recipe, args.captions, True, 10_000, args.plain)
    began = time.perf_counter()
    learn = run_training(recipe, overwrite=True)
    pipe = MDMPipeline.from_pretrained(folder)
    with open(Path(folder)/'log.csv', newline='') as f: rows = list(csv.DictReader(f))
    errors, logsnr = v_errors(pipe, valid, args.captions)
    judge, (captions, figures) = {}, figures_of(recipe, valid, seed, args)
    for steps, spacing in product(args.draw or [recipe.sample.steps], dict.fromkeys(args.spacing or [recipe.sample.spacing])):
        judge[f'{steps} {spacing}'] = figures(pipe(captions, n=1, seed=seed, batch_size=32, steps=steps, spacing=spacing))
    return dict(seconds=round(learn.seconds, 1), all_seconds=round(time.perf_counter() - began, 1), loss=float(rows[-1]['loss']) if rows else None,
                v_error=errors, logsnr=logsnr, judge=judge)

def spread(values):
    "Mean and standard error of some numbers, as a text."
    values = np.array(values)
    return f'{values.mean():.4g}' + (f' ± {values.std(ddof=1)/len(values)**.5:.2g}' if len(values) > 1 else '')

def tables(runs):
    "Markdown tables of all that was measured: the judge's figures by setting, and errors of v by setting and level."
    by = {}
    for run in runs.values(): by.setdefault(run['setting'], []).append(run)
    for steps in sorted({k for r in runs.values() for k in r['judge']}, key=lambda o: int(o.split()[0])):
        have = {name: [r['judge'][steps] for r in group if steps in r['judge']] for name, group in by.items()}
        keys = list(dict.fromkeys(k for rows in have.values() for row in rows for k in row))
        print(f'\nJudge, sampling steps and their spacing: {steps}; mean ± standard error over seeds\n')
        print('| setting | seeds | ' + ' | '.join(keys) + ' | training, s |\n' + '|---'*(len(keys) + 3) + '|')
        for name, rows in have.items():
            if not rows: continue
            cells = [spread([row[k] for row in rows if k in row]) for k in keys]
            print(f'| {name} | {len(rows)} | ' + ' | '.join(cells) + f" | {spread([r['seconds'] for r in by[name]])} |")
    for i in range(max(len(r['v_error']) for r in runs.values())):
        print(f'\nSquared error of v on held-out pictures by log-SNR of the innermost resolution; resolution {i} (0: highest)\n')
        print('| setting | ' + ' | '.join(f'{o:g}' for o in levels) + ' | mean |\n' + '|---'*(len(levels) + 2) + '|')
        for name, group in by.items():
            rows = np.array([r['v_error'][i] for r in group if len(r['v_error']) > i])
            print(f'| {name} | ' + ' | '.join(spread(o) for o in [*rows.T, rows.mean(1)]) + ' |')

def read_setting(text):
    "Name and changes, as `load_recipe` takes them, of a setting on the command line."
    name, colon, own = text.partition(':')
    if not colon and name not in settings: raise SystemExit(f'unknown setting {name!r}: choose from {", ".join(settings)}, or give NAME:key=value,key=value')
    changes = re.split(r',(?![^\[]*\])', own) if colon else (f'{even} '*(name != 'today') + settings[name]).split()           # no comma of a list
    return name, [o if o.split('=')[0].count('.') else f'diffusion.{o}' for o in changes if o]

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('rest', metavar='key=value', nargs='*', help='changes of the recipe of all settings')
    add('--recipe', default='shapes')
    add('--steps', type=int, default=640, help='optimizer steps of each training')
    add('--warmup', type=int, default=60, help='warm-up in steps, at most half of --steps')
    add('--seeds', type=int, nargs='+', default=[0, 1, 2])
    add('--settings', nargs='+', default=list(settings))
    add('--draw', type=int, nargs='+', help="numbers of sampling steps to judge (the recipe's)")
    add('--spacing', nargs='+', help="spacings of those steps (the recipe's); log-SNR reaches further with the schedule flow, so compare with trailing, too")
    add('--captions', type=int, default=128, help='held-out captions to judge, and held-out pictures for the error of v')
    add('--pictures', type=int, default=16_000, help='training pictures of shapes at most')
    add('--data', default='objectives_data', help='folder for the pictures, which are drawn once')
    add('--plain', action='store_true', help="captions that say everything, and pictures that vary less, as in mdm_demo")
    add('--valid', nargs='+', help='validation shards of your own; without: shapes')
    add('--retrieval', help='folder of a judge of retrieval, for pictures that are no shapes'), add('--real', type=int, default=4000, help='pictures of --valid for FD and KID, at most')
    add('--output', default='objectives.json')
    add('--table', action='store_true', help='only print what is in --output')
    args = parser.parse_intermixed_args(argv)
    if args.retrieval and not args.valid: parser.error('--retrieval judges pictures of your own: name shards of them with --valid')
    out = Path(args.output)
    runs = json.loads(out.read_text()) if out.exists() else {}
    for seed in () if args.table else args.seeds:                # seed by seed: an early stop leaves a comparison
        for name, changes in map(read_setting, args.settings):
            key = json.dumps([name, seed, args.steps, args.recipe, changes, args.rest, args.draw, args.spacing, args.captions, args.plain, *([args.retrieval, args.valid, args.real] if args.retrieval else [])])
            if key in runs: continue
            with tempfile.TemporaryDirectory() as folder: figures = measure(changes, seed, args, folder)
            runs = json.loads(out.read_text()) if out.exists() else {}       # another process may have added to it
            runs[key] = dict(setting=name, seed=seed, steps=args.steps, changes=changes, **figures)
            with atomic_write(out) as f: f.write(json.dumps(runs, indent=1).encode())
            runs = json.loads(out.read_text())
            print(f"{name}, seed {seed}: {figures['seconds']:.0f} s; {figures['judge']}", flush=True)
    if runs: tables(runs)
    return runs

if __name__ == '__main__': main()
