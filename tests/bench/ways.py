"""Ways of sampling side by side: what each costs, and what it draws.

    python tests/bench/ways.py [RECIPE ...]               # FLOPs of late joining and of guidance of the innermost network, released shapes; needs no weights
    python tests/bench/ways.py --model CHECKPOINT         # also what a trained model of shapes draws, by every figure of its judge
    python tests/bench/ways.py --model CHECKPOINT --data 'data/emoji-valid/*.tar' --retrieval JUDGE        # any model: the captions of the data, by a judge of retrieval

A way is a setting of the section `sample`: NAME:key=value,key=value. Two keys more: model=CHECKPOINT samples from another model, a student say, and guide=CHECKPOINT takes a weaker model as the
guide. --ways lists them; the first is the one that the others are compared with. Without --ways they are late joining (--joins), each with guidance of all networks and of the innermost one alone.

FLOPs are those of a whole picture: torch.utils.flop_counter counts one step of every kind (which networks run, guided or not) on fake tensors, and the steps that the settings take are added up.
The same captions and seeds are drawn in every way. RMSE is the root mean square distance of the outer pictures from those of the first way, in [-1, 1] units. With --retrieval, `picked` is the
share of pictures whose caption the judge picks among 32, and `FD` and `KID` compare the judge's vectors of drawn pictures with those of the real ones; their errors are a jackknife's. Make a judge
with `mdm_evaluate --retrieval JUDGE --train-retrieval SHARDS`. --sheet saves the first pictures of every way below each other."""
import argparse, json, re, time
from functools import partial
from pathlib import Path
import torch, yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from mdm.data.shapes import shapes_captions
from mdm.data.shapes_judge import shapes_report
from mdm.diffusion.guidance import Denoiser, Prompt
from mdm.diffusion.objective import Diffusion
from mdm.diffusion.sampler import join_shares, step_pairs
from mdm.evaluation.distances import frechet_score, kid_score, score
from mdm.evaluation.losses import read_pictures
from mdm.evaluation.retrieval import load_retrieval, picked_right
from mdm.models.nested_unet import create_model, model_scales
from mdm.pipeline import MDMPipeline, keep_casts
from mdm.recipe import load_recipe
from mdm.utils.configs import changed
from mdm.utils.pictures import contact_sheet, signal_to_pixels, to_pil

tokens = 32                              # of a prompt; hardly matters

def joining(joins):
    "Late joining, with guidance of all networks and of the innermost one alone; the usual way first."
    return [f"{'all networks' if networks == 'all' else 'innermost network'}, join {join:g}:join={join},guidance_networks={networks}" for networks in ('all', 'inner') for join in joins]

def read_way(text):
    "Name, changes of the section `sample`, and the folders of the model and of the guide or None."
    name, _, own = text.partition(':')
    changes = dict(o.split('=', 1) for o in re.split(r',(?![^\[]*\])', own) if o)            # no comma of a list
    return name, changes, changes.pop('model', None), changes.pop('guide', None)

def settings(recipe, changes):
    "How to sample: the recipe's settings with changes as on a command line."
    return changed(recipe.sample, 'sample', **{k: yaml.safe_load(v) for k, v in changes.items()})

# ---- FLOPs

def width_of(recipe): return recipe.text.dim if recipe.text.encoder == 'hash' else 2048

def step_flops(model, diffusion, config, x, width):
    "FLOPs of one step from x, of one picture."
    prompt = Prompt(torch.zeros(1, tokens, width), torch.ones(1, tokens))
    with FlopCounterMode(display=False) as counter, torch.no_grad(): Denoiser(model, diffusion, config, prompt)(x, 500)
    return counter.get_total_flops()

def picture_flops(recipe, configs, guide=None):
    "FLOPs of a picture for each way of sampling; `guide` is the recipe of a weaker model."
    width = width_of(recipe)
    diffusion, size, known = Diffusion(recipe.diffusion, model_scales(recipe.model)), recipe.data.image_size, {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = create_model(recipe.model, width).eval()
        weaker = guide and (create_model(guide.model, width_of(guide)).eval(), width_of(guide))
        sides = [size*s//model.scales[0] for s in model.scales]
        totals = []
        for config in configs:
            total, shares, once = 0, join_shares(config.join, len(sides)), changed(config, 'sample', guidance=1., guidance_networks='all')
            for t, _ in step_pairs(config, diffusion):
                first = next(i for i, share in enumerate(shares) if t/diffusion.config.num_steps <= share)
                low, high = config.guidance_interval
                guided = config.guidance != 1 and low <= t/diffusion.config.num_steps <= high
                kind = first, config.guidance_networks, guided
                if kind not in known:
                    x = [torch.zeros(1, 3, s, s) for s in sides[first:]]
                    known[kind] = step_flops(model, diffusion, config if guided and not weaker else once, x, width)
                    if guided and weaker: known[kind] += step_flops(weaker[0], diffusion, once, x, weaker[1])
                total += known[kind]
            totals.append(total)
    return totals

# ---- pictures and what they show

def draw(pipe, captions, config, batch=16, guide=None):
    "Pictures at the highest resolution [B,3,S,S]; picture k has seed k."
    out = []
    for i in range(0, len(captions), batch):
        part = captions[i:i + batch]
        with keep_casts():
            for step in pipe.steps(part, seeds=list(range(i, i + len(part))), config=config, guide=guide): pass
        out.append(step.x[0].clamp(-1, 1))
    return torch.cat(out)

def shapes_figures(captions, pictures):
    "Figures by name, each a text, of pictures [B,3,S,S] in [-1,1] of shapes."
    found = shapes_report(to_pil(pictures), captions)
    share = lambda p: f'{p:.1%} ± {(p*(1 - p)/len(captions))**.5:.1%}'
    return {'right and clean': share(found['all']), 'outline': f"{found['outline']:.3f}", 'crisp': f"{found['crisp']:.3f}", 'left open': f"{found['open']:.3f}"}

@torch.no_grad()
def vectors(judge, pictures):
    "The judge's vectors of pictures, uint8 [B,3,S,S]."
    return torch.cat([judge.embed_pictures(o) for o in pictures.split(64)])

def retrieval_scores(judge, real, captions, pictures):
    "How often the judge picks the right caption, FD and KID, of pictures uint8 [B,3,S,S]; `real` are vectors of real pictures."
    drawn = vectors(judge, pictures)
    return score(picked_right(judge, pictures, captions), share=True), frechet_score(real, drawn), kid_score(real, drawn)

def retrieval_figures(judge, real, captions, pictures):
    "`retrieval_scores` by name, each a text, of pictures [B,3,S,S] in [-1,1]."
    picked, fd, kid = retrieval_scores(judge, real, captions, signal_to_pixels(pictures))
    return {'picked': f"{picked['value']:.1%} ± {picked['se']:.1%}", 'FD': f"{fd['value']:.4f} ± {fd['se']:.4f}", 'KID x 1000': f"{1000*kid['value']:.2f} ± {1000*kid['se']:.2f}"}

def judged(ways, first, captions, figures):
    "A row of cells by name for each way: its cost, its figures, and how far its pictures are from those of the first way; and the pictures."
    rows, drawn, pipes = [], [], {None: first}               # pipelines by folder
    load = lambda path: pipes[path] if path in pipes else pipes.setdefault(path, MDMPipeline.from_pretrained(path, device=first.device))
    for name, changes, model, guide in map(read_way, ways):
        pipe, weaker = load(model), guide and load(guide)
        config = settings(pipe.recipe, changes)
        began = time.perf_counter()
        drawn.append(draw(pipe, captions, config, guide=weaker))
        seconds = time.perf_counter() - began
        flops = picture_flops(pipe.recipe, [config], weaker and weaker.recipe)[0]
        rows.append({'way': name, 'GFLOP per picture': f'{flops/1e9:.3g}', 's per picture': f'{seconds/len(captions):.2f}', **figures(captions, drawn[-1]),
                     'RMSE': f'{(drawn[-1] - drawn[0]).square().mean().sqrt().item():.3f}'})
        print(rows[-1], flush=True)
    return rows, drawn

def real_pictures(recipe, data, judge, n, real):
    "Captions of n real pictures, and the judge's vectors of these and of more, `real` in all."
    captions, found = [], []
    for _, pictures, texts, _ in read_pictures(data, recipe.data.image_size, 64, max(n, real), data=recipe.data):
        captions += texts
        found.append(vectors(judge, pictures))
    return captions[:n], torch.cat(found)

def table(rows):
    "Lines of a Markdown table."
    return ['| ' + ' | '.join(rows[0]) + ' |', '|' + '---|'*len(rows[0]), *('| ' + ' | '.join(o.values()) + ' |' for o in rows)]

def flops_table(recipe, ways):
    "Lines of a Markdown table of what ways of sampling cost."
    configs = [settings(recipe, changes) for _, changes, _, _ in map(read_way, ways)]
    flops, c = picture_flops(recipe, configs), configs[0]
    rows = [{'way': read_way(way)[0], 'TFLOP per picture': f'{total/1e12:.3g}', 'saved': f'{1 - total/flops[0]:.0%}'} for way, total in zip(ways, flops)]
    return [f'{recipe.name}, {recipe.data.image_size} px: {c.steps} steps, {c.spacing}, guidance {c.guidance:g}\n', *table(rows)]

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('recipes', nargs='*', default=['cc12m_256x256', 'cc12m_1024x1024'])
    add('--model', help='checkpoint; for late joining its inner network must have been trained alone')
    add('--ways', nargs='+', help='NAME:key=value,...; the first one is what the others are compared with')
    add('--joins', type=float, nargs='+', default=[1., .9, .8, .7, .6, .5, .4, .3, .2], help='without --ways: values of sample.join, the first one 1')
    add('--captions', type=int, default=128, help='held-out captions of shapes, or pictures of the data (%(default)s)')
    add('--plain', action='store_true', help='captions of shapes that say everything, as in mdm_demo')
    add('--each', type=int, default=1, help='pictures of each caption of shapes (%(default)s)')
    add('--data', nargs='+', help='shards of real pictures'), add('--retrieval', help='folder of the judge')
    add('--real', type=int, default=4000, help='real pictures for FD and KID, at most (%(default)s)')
    add('--output', type=Path, help='JSON with the rows'), add('--sheet', type=Path, help='PNG with the first 12 pictures of every way')
    args = parser.parse_args(argv)
    if bool(args.data) != bool(args.retrieval): parser.error('--data and --retrieval go together: real pictures with captions, and the judge of them')
    ways = args.ways or joining(args.joins)
    if not args.model:
        for name in args.recipes: print('\n'.join(flops_table(load_recipe(name), ways)) + '\n', flush=True)
        return
    pipe = MDMPipeline.from_pretrained(args.model, device='cpu')
    if args.retrieval:
        judge = load_retrieval(args.retrieval)
        captions, real = real_pictures(pipe.recipe, args.data, judge, args.captions, args.real)
        figures = partial(retrieval_figures, judge, real)
    else: captions, figures = [o for o in shapes_captions(args.captions, seed=7, plain=args.plain) for _ in range(args.each)], shapes_figures
    rows, drawn = judged(ways, pipe, captions, figures)
    print('\n'.join(table(rows)))
    if args.output: args.output.write_text(json.dumps(rows, indent=1))
    if args.sheet: contact_sheet([p for o in drawn for p in to_pil(o[:12])], captions[:12] + ['']*12*(len(drawn) - 1), columns=12).save(args.sheet)

if __name__ == '__main__': main()
