"""Tree attention on a CPU, forward and forward + backward: `python benchmarks/attention.py --help`

Shapes: one chain; a long prompt with 8 answers; an agent that rewrites its history (a deep comb); rollouts of a small
world (hundreds or thousands of short nodes). Ways: this project's `segments` and `reference`; `per node`, the fused
kernel once per node and run of ancestors, merged by log-sum-exp; PyTorch's SDPA under a dense mask, and one sequence
after the other without sharing. Times are the best of a few repetitions (dense masks: one), in CPU seconds of this
process, so that others disturb less; `first` is the first forward + backward of a tree, with plans to make and kernels
to compile. Nothing is asserted."""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kat.compute.attention import causal_attention
from kat.compute.layout import Layout, dense_mask
from kat.compute.tree_attention import tree_attention
from kat.tree.trie import TokenTree

rng = np.random.default_rng(0)
def new(n):
    return rng.integers(0, 1000, n)

def prompt(length, answers, each):
    shared = new(length)
    return [np.r_[shared, new(each)] for _ in range(answers)]

def comb(turns, tail, head=256):
    "every call drops half of its last turn and goes on"
    history, out = new(head), []
    for _ in range(turns):
        out.append(np.r_[history, new(tail)])
        history = np.r_[history, new(tail//2)]
    return out

def micro(tasks, rollouts=300, turns=4):
    "each turn one of three actions and its answer; a system prompt for all"
    system, known = new(80), {}
    def text(key):
        return known.setdefault(key, new(rng.integers(5, 30)))
    def rollout(task):
        key = tuple(np.r_[task, rng.choice(3, turns, p=[.5, .3, .2])])
        return np.concatenate([system] + [text(key[:i+1]) for i in range(turns+1)])
    return [rollout(t) for t in range(tasks) for _ in range(rollouts)]

SHAPES = {'chain 512': lambda: [new(512)],
          'chain 4096': lambda: [new(4096)],
          'prompt 2048 + 8 x 256': lambda: prompt(2048, 8, 256),
          'history rewritten': lambda: comb(32, 96),
          'short turns': lambda: micro(2),
          'short turns, many': lambda: micro(10, 30)}
DENSE = 'reference', 'sdpa, dense mask'  # left out above 8,192 tokens: their scores would take gigabytes

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

class PerNode(torch.autograd.Function):
    "The fused kernel for every node and every run of its ancestors, merged by log-sum-exp; key heads are repeated."
    @staticmethod
    def parts(tree):
        bounds = tree.node_bounds()
        for a, b in zip(bounds, bounds[1:]):
            path = np.flatnonzero(tree.end[:a] > a)
            runs = np.split(path, np.flatnonzero(np.diff(path) > 1) + 1) if len(path) else []
            yield a, b, [(int(r[0]), int(r[-1]) + 1, False) for r in runs] + [(a, b, True)]

    @staticmethod
    def forward(ctx, q, k, v, parts):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for start, stop, runs in parts:
            at = slice(start, stop)
            got = [flash(q[:, :, at], k[:, :, lo:hi], v[:, :, lo:hi], 0.0, causal) for lo, hi, causal in runs]
            each = torch.stack([its for _, its in got])
            lse[:, :, at] = whole = each.logsumexp(0)
            out[:, :, at] = sum((its - whole).exp().unsqueeze(-1)*values for (values, _), its in zip(got, each))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
        for start, stop, runs in ctx.parts:
            at = slice(start, stop)
            for lo, hi, causal in runs:
                keys, values = k[:, :, lo:hi], v[:, :, lo:hi]
                parts = flash_back(grad[:, :, at], q[:, :, at], keys, values, out[:, :, at], lse[:, :, at], 0.0, causal)
                grad_q[:, :, at] += parts[0]
                grad_k[:, :, lo:hi] += parts[1]
                grad_v[:, :, lo:hi] += parts[2]
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None

def ways(tree, args):
    "name -> attention of the tree as fn(q, k, v)"
    scale, group = args.dim**-.5, args.heads//args.kv_heads
    layout = Layout(tree.end, tree.position, 0)
    mask, parts = dense_mask(layout) if len(tree) <= 8192 else None, list(PerNode.parts(tree))
    paths = [torch.as_tensor(tree.path(s)) for s in range(tree.n_sequences)]
    def flat(q, k, v):
        return [sdpa(*(x[:, :, p] for x in (q, k, v)), is_causal=True, enable_gqa=True) for p in paths]
    def per_node(q, k, v):
        return PerNode.apply(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), parts)
    out = {'segments': lambda q, k, v: tree_attention(q, k, v, layout, scale, backend='segments'),
           'per node': per_node,
           'reference': lambda q, k, v: tree_attention(q, k, v, layout, scale, backend='reference'),
           'sdpa, dense mask': lambda q, k, v: sdpa(q, k, v, attn_mask=mask, enable_gqa=True),
           'sdpa, flat': flat}
    if tree.n_sequences == 1:
        out['kat_eager'] = lambda q, k, v: causal_attention(q, k, v, scale)
        del out['per node']  # the same kernel as flat
    return {k: f for k, f in out.items() if mask is not None or k not in DENSE}

def clock(fn, q, k, v, up, reps):
    "seconds of forward, of forward + backward, and of the first forward + backward"
    def both():
        out = fn(q, k, v)
        if not isinstance(out, list):
            torch.autograd.grad(out, (q, k, v), up)
        else:
            torch.autograd.grad(out, (q, k, v), [up[:, :, :x.shape[2]] for x in out])
    def once(f):
        start = time.process_time()
        f()
        return time.process_time() - start
    first = once(both)
    with torch.no_grad():
        forward = min(once(lambda: fn(q, k, v)) for _ in range(reps))
    return forward, first if reps == 1 else min(once(both) for _ in range(reps)), first

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--heads', type=int, default=9)
    parser.add_argument('--kv-heads', type=int, default=3)
    parser.add_argument('--dim', type=int, default=64)
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
    parser.add_argument('--shapes', nargs='+', default=list(SHAPES), choices=list(SHAPES), metavar='NAME',
                        help=', '.join(SHAPES))
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--reps', type=int, default=2)
    return parser.parse_args()

def cpu_name():
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), '?')

def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    print(f'{cpu_name()}, {args.threads} thread(s), torch {torch.__version__}; {args.heads} heads, '
          f'{args.kv_heads} key heads, {args.dim} numbers a head')
    print(f'{"ms: forward, both, both first":36}' + ''.join(f'{dtype:>30}' for dtype in args.dtypes))
    for name in args.shapes:
        rng.bit_generator.state = np.random.default_rng(0).bit_generator.state  # the same tree whatever ran before
        tree = TokenTree.from_sequences(SHAPES[name]())
        print(f'{name}: {len(tree)} tokens in {tree.n_nodes} nodes, {tree.n_flat} flat')
        rows = {}
        for dtype in args.dtypes:
            def make(heads):
                return torch.randn(1, len(tree), heads, args.dim, dtype=getattr(torch, dtype)).transpose(1, 2)
            q, k, v, up = (make(heads) for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads))
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            for way, fn in ways(tree, args).items():
                rows.setdefault(way, []).append(clock(fn, q, k, v, up, 1 if way in DENSE else args.reps))
        for way, times in rows.items():
            print(f'    {way:32}' + ''.join(f'{x*1e3:10.0f}' for each in times for x in each), flush=True)

if __name__ == '__main__':
    main()
