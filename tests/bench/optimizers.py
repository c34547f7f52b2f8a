"""What an optimizer costs in a step of the small model, and what two processes gain, as ratios that are measured side by side.

    python tests/bench/optimizers.py [--batch 28] [--steps 6] [--two]

One thread. First the time of the optimizer alone as a share of a whole step (forward, backward, optimizer) of the recipe `shapes` on random pictures, for every optimizer by turns in one run; the
smallest time of each counts. Seconds are those of this process (`time.process_time`), so that other programs on the machine disturb less. With --two, afterwards, pictures per second of two processes
(gloo) over those of one, by the clock: both cores must be free."""
import argparse, os, socket, subprocess, sys, time
from statistics import median

def measure(batch, steps, optimizers):
    "For each optimizer the least seconds of forward and backward pass, and of its own step."
    import torch
    from mdm.diffusion.objective import Diffusion
    from mdm.recipe import load_recipe
    from mdm.training.learner import build_model
    from mdm.training.optimizers import optimizer_of
    torch.set_num_threads(1)
    made = {}
    for name in optimizers:
        recipe = load_recipe('shapes', [f'train.optimizer={name}'])
        model = build_model(recipe, recipe.text.dim)
        made[name] = model, optimizer_of(recipe)([*model.parameters()], lr=1e-4), Diffusion(recipe.diffusion, model.scales)
    least = {name: [float('inf')]*2 for name in optimizers}
    for _ in range(steps):
        for name, (model, opt, diffusion) in made.items():
            pictures, text, mask = torch.rand(batch, 3, 32, 32)*2 - 1, torch.randn(batch, 16, 256), torch.ones(batch, 16)
            start = time.process_time()
            with torch.autocast('cpu', torch.bfloat16): loss = diffusion.loss(model, pictures, text, mask, {}).loss
            loss.backward()
            between = time.process_time()
            opt.step()
            took = between - start, time.process_time() - between
            opt.zero_grad()
            least[name] = [min(a, b) for a, b in zip(least[name], took)]
    return least

def child(batch, steps, optimizers):
    "A process of two (or the only one): pictures per second of a training with DistributedDataParallel, for each optimizer."
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from mdm.diffusion.objective import Diffusion
    from mdm.recipe import load_recipe
    from mdm.training.distributed import barrier, distributed_end, distributed_setup, is_distributed
    from mdm.training.learner import build_model
    from mdm.training.optimizers import optimizer_of
    torch.set_num_threads(1)
    rank, world = distributed_setup()
    for name in optimizers:
        recipe = load_recipe('shapes', [f'train.optimizer={name}'])
        model = build_model(recipe, recipe.text.dim)
        net = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True) if is_distributed() else model
        net.scales = model.scales
        opt, diffusion, took = optimizer_of(recipe)([*model.parameters()], lr=1e-4), Diffusion(recipe.diffusion, model.scales), []
        for _ in range(steps + 1):
            barrier()
            start = time.perf_counter()
            pictures, text, mask = torch.rand(batch, 3, 32, 32)*2 - 1, torch.randn(batch, 16, 256), torch.ones(batch, 16)
            with torch.autocast('cpu', torch.bfloat16): loss = diffusion.loss(net, pictures, text, mask, {}).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            took.append(time.perf_counter() - start)
        if rank == 0: print(name, world*batch/median(took[1:]), flush=True)
    distributed_end()

def pictures_per_second(world, args):
    "By optimizer, of so many processes."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [sys.executable, __file__, '--child', '--batch', str(args.batch), '--steps', str(args.steps), *args.optimizers]
    envs = [os.environ | dict(RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='') for r in range(world)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) for env in envs]
    said = [p.communicate()[0] for p in running]
    return {line.split()[0]: float(line.split()[1]) for line in said[0].splitlines()}

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('optimizers', nargs='*', default=['adamw', 'muon', 'adamw8bit'])
    parser.add_argument('--batch', type=int, default=28, help='pictures per process')
    parser.add_argument('--steps', type=int, default=6)
    parser.add_argument('--two', action='store_true', help='one process and two, by the clock')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: sys.exit(child(args.batch, args.steps, args.optimizers))
    print('| optimizer | forward and backward, s | optimizer, s | share of a step |\n|---|---|---|---|')
    for name, (net, opt) in measure(args.batch, args.steps, args.optimizers).items(): print(f'| {name} | {net:.3f} | {opt:.3f} | {opt/(net + opt):.1%} |', flush=True)
    if args.two:
        rounds = [(pictures_per_second(1, args), pictures_per_second(2, args)) for _ in range(2)]
        print('\n| optimizer | one process, pictures/s | two processes | ratio |\n|---|---|---|---|')
        for name in args.optimizers:
            one, two = (max(o[i][name] for o in rounds) for i in (0, 1))
            print(f'| {name} | {one:.1f} | {two:.1f} | {two/one:.2f} |')
