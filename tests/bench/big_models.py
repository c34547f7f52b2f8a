"""Time and memory of true training steps of the three large recipes, as a table.

    python tests/bench/big_models.py [--steps 3] [--checkpointing] [RECIPE ...]

Each line is one process of its own: mdm_train RECIPE --dry-run-steps N train.batch_size=1 diffusion.mixed_ratio=null, that is,
forward and backward pass at all resolutions, clipping, AdamW and the moving average, on noise and random text embeddings of width 2048. Time is the median of all steps but
the first; memory is the most that the process held at any time (torch and its libraries included)."""
import argparse, os, re, subprocess, sys
from pathlib import Path

def measure(recipe, bf16, checkpointing, steps):
    "Seconds per step and GiB of one configuration."
    flag = lambda v: str(v).lower()
    command = [Path(sys.executable).parent/'mdm_train', recipe, '--dry-run-steps', str(steps), 'train.batch_size=1', 'diffusion.mixed_ratio=null', f'train.bf16={flag(bf16)}', f'train.activation_checkpointing={flag(checkpointing)}']
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'HF_HUB_OFFLINE': '1'})
    found = re.search(r'([\d.]+) s per step.*at most ([\d.]+) GiB', done.stdout)
    if not found: raise SystemExit(f'{recipe}: {done.stderr[-2000:]}')
    return float(found[1]), float(found[2])

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipes', nargs='*', default=['cc12m_64x64', 'cc12m_256x256', 'cc12m_1024x1024'])
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--checkpointing', action='store_true', help='with activation checkpointing, too')
    args = parser.parse_args()
    print('| recipe | precision | activation checkpointing | s per step | GiB |\n|---|---|---|---|---|')
    for recipe in args.recipes:
        for bf16 in (False, True):
            for checkpointing in ((False, True) if args.checkpointing else (False,)):
                seconds, memory = measure(recipe, bf16, checkpointing, args.steps)
                print(f"| {recipe} | {'bfloat16' if bf16 else 'float32'} | {'yes' if checkpointing else 'no'} | {seconds:.1f} | {memory:.1f} |", flush=True)
