"""What late joining and guidance of the innermost network save, and what they cost.

    python tests/bench/joining.py [RECIPE ...]                       # FLOPs of the released shapes; needs no weights
    python tests/bench/joining.py --model CHECKPOINT [--captions N]  # FLOPs and figures of a small trained model

FLOPs are those of a whole picture: torch.utils.flop_counter counts one step of every kind (which networks run, guided or not) on fake tensors, and the steps that the settings take are added up.
With a model, the same captions of `shapes` and the same seeds are drawn in every way. The table then has the share of pictures that show what the caption says (`prompt_accuracy`), its standard error,
and the root mean square distance of the outer pictures from those with full guidance and no late joining, in [-1, 1] units."""
import argparse
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from mdm.data.shapes import shapes_captions
from mdm.data.shapes_judge import prompt_accuracy
from mdm.diffusion.guidance import Denoiser, Prompt
from mdm.diffusion.objective import Diffusion
from mdm.diffusion.sampler import join_shares, step_pairs
from mdm.models.nested_unet import create_model, model_scales
from mdm.pipeline import MDMPipeline
from mdm.recipe import load_recipe
from mdm.utils.configs import changed
from mdm.utils.pictures import to_pil

tokens = 32                              # of a prompt; hardly matters

def ways(config, joins):
    "Every way of sampling, the usual one first."
    return [changed(config, 'sample', join=join, guidance_networks=networks) for networks in ('all', 'inner') for join in joins]

def step_flops(model, diffusion, config, x, width):
    "FLOPs of one guided step from x, of one picture."
    prompt = Prompt(torch.zeros(1, tokens, width), torch.ones(1, tokens))
    with FlopCounterMode(display=False) as counter, torch.no_grad(): Denoiser(model, diffusion, config, prompt)(x, 500)
    return counter.get_total_flops()

def picture_flops(recipe, configs):
    "FLOPs of a picture for each way of sampling."
    width = recipe.text.dim if recipe.text.encoder == 'hash' else 2048
    diffusion, size, known = Diffusion(recipe.diffusion, model_scales(recipe.model)), recipe.data.image_size, {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = create_model(recipe.model, width).eval()
        sides = [size*s//model.scales[0] for s in model.scales]
        totals = []
        for config in configs:
            total, shares = 0, join_shares(config.join, len(sides))
            for t, _ in step_pairs(config, diffusion):
                first = next(i for i, share in enumerate(shares) if t/diffusion.config.num_steps <= share)
                kind = first, config.guidance_networks
                if kind not in known: known[kind] = step_flops(model, diffusion, config, [torch.zeros(1, 3, s, s) for s in sides[first:]], width)
                total += known[kind]
            totals.append(total)
    return totals

def draw(pipe, captions, config, batch=16):
    "Pictures at the highest resolution [B,3,S,S]; picture k has seed k."
    out = []
    for i in range(0, len(captions), batch):
        part = captions[i:i + batch]
        for step in pipe.steps(part, seeds=list(range(i, i + len(part))), config=config): pass
        out.append(step.x[0].clamp(-1, 1))
    return torch.cat(out)

def figures(pipe, captions, configs):
    "(share of pictures that show their caption, its standard error, RMSE to the first way) for each way of sampling."
    usual, rows = None, []
    for config in configs:
        pictures = draw(pipe, captions, config)
        usual = pictures if usual is None else usual
        right = prompt_accuracy(to_pil(pictures), captions)['all']
        rows.append((right, (right*(1 - right)/len(captions))**.5, (pictures - usual).square().mean().sqrt().item()))
    return rows

def table(recipe, configs, judged=()):
    "Lines of a Markdown table."
    flops, sides = picture_flops(recipe, configs), recipe.data.image_size
    head = ['without the prompt', 'join', 'TFLOP per picture', 'saved'] + (['caption shown', 'RMSE'] if judged else [])
    c = configs[0]
    lines = [f'{recipe.name}, {sides} px: {c.steps} steps, {c.spacing}, guidance {c.guidance:g}\n', '| ' + ' | '.join(head) + ' |', '|' + '---|'*len(head)]
    for i, (config, total) in enumerate(zip(configs, flops)):
        cells = [f'{config.guidance_networks} networks' if config.guidance_networks == 'all' else 'innermost network', f'{config.join:g}', f'{total/1e12:.3g}', f'{1 - total/flops[0]:.0%}']
        if judged: cells += [f'{judged[i][0]:.1%} ± {judged[i][1]:.1%}', f'{judged[i][2]:.3f}']
        lines.append('| ' + ' | '.join(cells) + ' |')
    return lines

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipes', nargs='*', default=['cc12m_256x256', 'cc12m_1024x1024'])
    parser.add_argument('--model', help='checkpoint of a model of shapes whose inner network was trained alone')
    parser.add_argument('--captions', type=int, default=128, help='held-out captions that --model draws (%(default)s)')
    parser.add_argument('--joins', type=float, nargs='+', default=[1., .9, .8, .7, .6, .5, .4, .3, .2], help='values of sample.join, the first one 1')
    parser.add_argument('--steps', type=int, help="steps of a picture (the recipe's)")
    args = parser.parse_args()
    if args.model:
        pipe = MDMPipeline.from_pretrained(args.model, device='cpu')
        configs = ways(pipe.config(steps=args.steps), args.joins)
        print('\n'.join(table(pipe.recipe, configs, figures(pipe, shapes_captions(args.captions, held_out=True, seed=7), configs))))
    else:
        for name in args.recipes:
            recipe = load_recipe(name)
            print('\n'.join(table(recipe, ways(changed(recipe.sample, 'sample', steps=args.steps), args.joins))) + '\n', flush=True)
