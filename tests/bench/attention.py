"""Attention on the CPU in training: the fused kernel of PyTorch next to the plain formula, forward and backward, in one run.

    python tests/bench/attention.py [--batch 32] [--heads 8]

Milliseconds of this process (`time.process_time`), the least of five. `mdm.models.layers.attend` takes the plain formula in bfloat16 training for at most 128 x 128 pairs of queries and keys."""
import argparse, sys, time
from pathlib import Path
import torch
import torch.nn.functional as F
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mdm.models.layers import _attend_plainly

def fused(q, k, v, mask): return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

def least_ms(attend, q, k, v, mask, rounds=5):
    "Least time of a forward and of a backward pass."
    best = [float('inf')]*2
    for _ in range(rounds):
        inputs = [o.detach().requires_grad_() for o in (q, k, v)]
        start = time.process_time()
        out = attend(*inputs, mask)
        between = time.process_time()
        out.sum().backward()
        best = [min(a, b) for a, b in zip(best, (between - start, time.process_time() - between))]
    return [1e3*o for o in best]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--heads', type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print('| queries x keys | channels of a head | precision | fused, ms | plain, ms | fused / plain |\n|---|---|---|---|---|---|')
    for queries, keys, dim in [(4, 4, 32), (16, 16, 20), (64, 16, 18), (64, 64, 18), (128, 128, 16), (256, 16, 16), (1024, 16, 16), (256, 128, 16), (256, 256, 16)]:
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v = (torch.randn(args.batch, args.heads, n, dim, dtype=dtype) for n in (queries, keys, keys))
            mask = torch.arange(keys).view(1, 1, 1, -1) <= keys//2
            a, b = (least_ms(o, q, k, v, mask.expand(args.batch, 1, 1, -1)) for o in (fused, _attend_plainly))
            print(f'| {queries} x {keys} | {dim} | {str(dtype)[6:]} | {a[0]:.1f} + {a[1]:.1f} | {b[0]:.1f} + {b[1]:.1f} | {sum(a)/sum(b):.1f} |', flush=True)
