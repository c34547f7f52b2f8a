"""A new shape with a new word from 20 pictures: what an adapter learns, and what the model forgets.

    python tests/bench/finetune.py [--model shapes] [--pictures 20] [--captions 64] [--output FOLDER] [--prior 100] [key=value ...]

The new shape is a diamond, which the model has never seen and whose word no caption had. Its pictures are drawn like those of `shapes`, and the judge gets a template for it. Measured at every
resolution, before and after: how often everything is right that captions of diamonds say (colour, shape, size, position, background), and the same for captions of the old shapes; `clean` also asks for
a sharp outline. --prior N mixes in N pictures that the model draws of old captions before training. key=value changes the recipe, e.g. finetune.rank=16 finetune.networks=[] train.steps=800.

    python tests/bench/finetune.py [key=value ...] --memory [RECIPE] [--batches 1 4] [--rank 8] [--precision float32 bfloat16] [--rehearse]

The most memory that a process holds in two training steps of a recipe (cc12m_64x64) with random weights: full training, and an adapter on all layers, or on those of `finetune.networks` and
`finetune.targets`; each in a process of its own, with and without activation checkpointing, torch and its libraries (0.8 GiB) included. The data are noise, the text encoder is left out. glibc is told not to keep what was freed."""
import argparse, io, json, os, random, subprocess, sys, tempfile, time
from pathlib import Path
from PIL import Image, ImageDraw
from mdm.data import shapes, shapes_judge
from mdm.data.configs import ShardsConfig
from mdm.data.shards import ShardWriter
from mdm.data.shapes import Shape, caption, draw, parse_caption, shapes_captions
from mdm.pipeline import MDMPipeline
from mdm.training.finetune import finetune_recipe, write_prior
from mdm.training.run import run_training
from mdm.utils.pictures import contact_sheet

word, old_glyph = 'diamond', shapes.glyph

def glyph(kind, radius, right=0, down=0, up=8):
    "The soft mask of a shape, that of the new one included."
    if kind != word: return old_glyph(kind, radius, right, down, up)
    r, n = radius*up/4, 2*(-(-radius//4) + 1)
    x, y, im = n*up/2 + right*up/4, n*up/2 + down*up/4, Image.new('L', (n*up, n*up))
    ImageDraw.Draw(im).polygon([(x, y - r), (x + r - 1, y), (x, y + r - 1), (x - r, y)], 255)
    return im.reduce(up)

def learn_word():
    "Give the world and its judge the new shape."
    shapes.shapes.append(word)
    shapes.glyph = shapes_judge.glyph = glyph
    for cached in (shapes.all_shapes, shapes_judge._templates): cached.cache_clear()

def new_shapes(n, seed):
    rng = random.Random(seed)
    return rng.sample([o for o in shapes.all_shapes() if o.shape == word], n)

def write_pictures(folder, pairs):
    "Shards of PIL pictures and captions."
    with ShardWriter(folder, ShardsConfig(), dict(kind='bench')) as writer:
        for i, (picture, text) in enumerate(pairs):
            file = io.BytesIO()
            picture.save(file, 'PNG')
            writer.add(i, {'__key__': f'{i:05d}', 'png': file.getvalue(), 'txt': text.encode()})

def measure(pipe, prompts, wanted):
    "Shares of pictures with everything right, and right and clean, for each resolution."
    levels, rows = pipe(prompts, n=1, seed=7, batch_size=32, every_resolution=True), []
    for level in levels:
        found = shapes_judge.read_shapes(level)
        right = [o.shape == w for o, w in zip(found, wanted)]
        rows.append(dict(pixels=level[0].width, shape=sum(o.shape.shape == w.shape for o, w in zip(found, wanted))/len(found),
                         right=sum(right)/len(found), clean=sum(r and o.clean for r, o in zip(right, found))/len(found)))
    return levels[0], rows

# ---- memory

tiny = 'channels=[32,32] num_resnets=[1,1] num_attention_layers=[0,1] text_proj_dim=32'.split()

def memory_recipe(name, changes, rehearse):
    "The recipe to measure."
    from mdm.recipe import load_recipe
    small = [f'model.{o}' for o in tiny] + ['data.image_size=16', 'text.dim=16', 'text.encoder=hash'] if rehearse else []
    recipe = load_recipe(name, [*small, 'train.warmup_steps=0', *(o for o in changes if not o.startswith('finetune.'))])
    recipe.data.files = []
    return recipe

def write_random(spec):
    "A checkpoint of random weights."
    from mdm.checkpoint import save_checkpoint
    from mdm.training.learner import build_model
    from mdm.training.run import encoder_width
    recipe = memory_recipe(spec['recipe'], spec['changes'], spec['rehearse'])
    save_checkpoint(spec['checkpoint'], recipe, build_model(recipe, encoder_width(recipe.text), grow=False).state_dict())

def two_steps(spec):
    "Seconds of the second step, and GiB held at most."
    from mdm.recipe import FinetuneConfig
    from mdm.training.run import dry_run
    bf16, checkpointing = (str(spec[k]).lower() for k in ('bf16', 'checkpointing'))
    changes = [*spec['changes'], f"train.batch_size={spec['batch']}", f'train.bf16={bf16}', f'train.activation_checkpointing={checkpointing}']
    recipe = memory_recipe(spec['recipe'], changes, spec['rehearse'])
    if spec['adapter']:
        own = dict(o.removeprefix('finetune.').split('=', 1) for o in spec['changes'] if o.startswith('finetune.'))
        recipe.finetune = FinetuneConfig(spec['checkpoint'], rank=spec['rank'], **{k: json.loads(v) for k, v in own.items()})
    return dry_run(recipe, 2)

def in_a_process(what, **spec):
    "Call one of the two functions above in a process of its own."
    code = f'import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import finetune; print(json.dumps(finetune.{what}({spec!r})))'
    env = os.environ | {'MALLOC_MMAP_THRESHOLD_': str(2**18)}        # freed memory goes back at once, so that the peak is what is in use
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, env=env)
    if done.returncode: raise SystemExit(f'{spec}: {done.stderr[-2000:] or done.returncode}')
    return json.loads(done.stdout.splitlines()[-1])

def memory(args):
    "Measure full training and an adapter, and print a table."
    print('| pictures | precision | activation checkpointing | full training, GiB | adapter, GiB | share | s per step |\n|---|---|---|---|---|---|---|', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        spec = dict(recipe=args.memory, changes=args.changes, rehearse=args.rehearse, rank=args.rank, checkpoint=f'{folder}/random')
        in_a_process('write_random', **spec)
        for batch in args.batches:
            for precision in args.precision:
                for checkpointing in (False, True):
                    row = dict(batch=batch, bf16=precision == 'bfloat16', checkpointing=checkpointing)
                    (slow, full), (quick, adapter) = (in_a_process('two_steps', **spec, **row, adapter=o) for o in (False, True))
                    print(f"| {batch} | {precision} | {'yes' if checkpointing else 'no'} | {full:.2f} | {adapter:.2f} | {adapter/full:.0%} | {slow:.1f} and {quick:.1f} |", flush=True)

# ---- a new word

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('changes', nargs='*'), add('--model', default='shapes'), add('--pictures', type=int, default=20), add('--captions', type=int, default=64)
    add('--prior', type=int, default=0), add('--output', type=Path)
    add('--memory', nargs='?', const='cc12m_64x64', metavar='RECIPE'), add('--batches', type=int, nargs='+', default=[1, 4]), add('--rank', type=int, default=8)
    add('--precision', nargs='+', default=['float32', 'bfloat16'], choices=['float32', 'bfloat16']), add('--rehearse', action='store_true', help='on a tiny size, for --memory')
    args = parser.parse_args(argv)
    if args.memory: return memory(args)
    out = args.output or Path(tempfile.mkdtemp())
    old_words = shapes_captions(args.captions, 3, plain=True)
    learn_word()
    chosen = new_shapes(args.pictures + args.captions, 0)
    training, tests = chosen[:args.pictures], chosen[args.pictures:]
    pipe, rng = MDMPipeline.from_pretrained(args.model), random.Random(1)
    size = pipe.recipe.data.image_size
    old = [Shape(**parse_caption(o)) for o in old_words]
    prompts = [caption(o) for o in tests]
    report = dict(before=dict(new=measure(pipe, prompts, tests)[1], old=measure(pipe, old_words, old)[1]))
    files, data = [], out/'data'
    write_pictures(data/'new', [(draw(o, size, rng), caption(o, rng)) for o in training])
    files.append(str(data/'new'/'*.tar'))
    if args.prior:
        words = [caption(o, rng) for o in random.Random(2).sample([o for o in shapes.all_shapes(False) if o.shape != word], args.prior)]
        write_prior(args.model, words, data/'prior', seed=100)
        files.append(str(data/'prior'/'*.tar'))
    recipe = finetune_recipe(args.model, [f'train.output={out/"run"}', 'train.preview_prompts=[]', *args.changes], files)
    if args.prior: recipe.data.weights = [1., 1.]
    start = time.perf_counter()
    run_training(recipe, overwrite=True)
    report['seconds'] = time.perf_counter() - start
    tuned = MDMPipeline.from_pretrained(out/'run')
    pictures, new = measure(tuned, prompts, tests)
    others, kept = measure(tuned, old_words, old)
    report['after'] = dict(new=new, old=kept)
    contact_sheet(pictures[:16] + others[:16], prompts[:16] + old_words[:16], columns=8).save(out/'sheet.png')
    (out/'finetune.json').write_text(json.dumps(report, indent=1))
    print(f"{report['seconds']:.0f} s of training; sheet: {out/'sheet.png'}\n\n| captions | pixels | shape | all right | all right and clean | before |\n|---|---|---|---|---|---|")
    for kind in ('new', 'old'):
        for a, b in zip(report['after'][kind], report['before'][kind]):
            print(f"| {kind} | {a['pixels']} | {a['shape']:.3f} | {a['right']:.3f} | {a['clean']:.3f} | {b['right']:.3f} / {b['clean']:.3f} |")

if __name__ == '__main__': main()
