"""Trees on a GPU in one command: `python benchmarks/gpu.py`. Not run so far: no GPU was at hand when it was written (its paths were run on a CPU with `--small`).

Two tables. *Kernels*: forward and forward + backward of one attention layer over a tree, per backend, beside SDPA over the same sequences without sharing, and the FLOP floor
(attention FLOPs of the tree over the card's peak, `--peak` in TFLOP/s). *Model*: forward + backward of a Qwen3 shape of 1.7 billion parameters with random weights in bfloat16, per
backend, beside the same model on merged sequences, one after the other, through FlashAttention 2 where `flash_attn` is installed and SDPA elsewhere; sequences up to 32 k tokens.
"""
import argparse
import statistics
import time

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils import is_flash_attn_2_available

from kat.compute.engine import TreeEngine
from kat.compute.forward import pack_layout
from kat.compute.logprob import flat_logprobs
from kat.compute.tree_attention import tree_attention
from kat.tree.partition import partition
from kat.tree.stats import flat_profile, model_shape, tree_profile
from kat.tree.trie import TokenTree


def group(prompt, branches, length, seed=0):
    "A shared prompt and its completions."
    rng = np.random.default_rng(seed)
    head = rng.integers(0, 1000, prompt)
    return [np.concatenate([head, rng.integers(0, 1000, length)]) for _ in range(branches)]


def rewrites(total, steps, seed=0):
    "An agent that rewrites its history: each sequence branches off the one before at a random depth."
    rng, seqs = np.random.default_rng(seed), [np.random.default_rng(seed).integers(0, 1000, total)]
    for _ in range(steps):
        cut = int(rng.integers(total // 4, total))
        seqs.append(np.concatenate([seqs[-1][:cut], rng.integers(0, 1000, total - cut)]))
    return seqs


def timed(run, device, repeat):
    "Median seconds after a warm-up."
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    run(), sync()
    out = []
    for _ in range(repeat):
        start = time.perf_counter()
        run(), sync()
        out.append(time.perf_counter() - start)
    return statistics.median(out)


def kernels(cases, shape, device, dtype, backends, repeat, peak):
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    print("| case | tokens | pass | " + " | ".join(f"{b}, ms" for b in backends) + " | SDPA, no sharing, ms | FLOP floor, ms |\n|---|---|---|" + "---|" * (len(backends) + 2))
    for name, seqs in cases.items():
        tree = TokenTree.from_sequences(seqs)
        layout, n = pack_layout(tree, partition(tree)[0]), len(tree)
        make = lambda h, m: torch.randn(1, h, m, dim, device=device, dtype=dtype, requires_grad=True)
        q, k, v, g = make(heads, n), make(kv, n), make(kv, n), torch.randn(1, heads, n, dim, device=device, dtype=dtype)
        flat = [(make(heads, len(s)), make(kv, len(s)), make(kv, len(s))) for s in seqs]
        floor = 4 * heads * dim * int((tree.position + 1).sum()) / (peak * 1e12) * 1e3
        for what, backward in (("forward", False), ("both", True)):
            def tree_run(b):
                with torch.set_grad_enabled(backward): out = tree_attention(q, k, v, layout, dim ** -0.5, backend=b)
                if backward: out.backward(g)
            def flat_run():
                for a, b, c in flat:
                    with torch.set_grad_enabled(backward): out = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True)
                    if backward: out.backward(torch.ones_like(out))
            row = [f"{timed(lambda: tree_run(b), device, repeat) * 1e3:.2f}" for b in backends]
            print(f"| {name} | {tree.n_flat:,} → {n:,} | {what} | " + " | ".join(row) + f" | {timed(flat_run, device, repeat) * 1e3:.2f} | {floor * (3.5 if backward else 1):.2f} |", flush=True)


def models(cases, config, device, dtype, backends, repeat, max_tokens):
    torch.manual_seed(0)
    with torch.device(device): model = Qwen3ForCausalLM(config).to(dtype)
    shape, packed = model_shape(config), "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"
    print(f"\n{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters; sequences through {packed}\n")
    print("| case | tokens | cost ratio | sequences, s | " + " | ".join(f"{b}, s (speed-up, ÷ cost ratio)" for b in backends) + " |\n|---|---|---|---|" + "---|" * len(backends))
    for name, seqs in cases.items():
        tree, n = TokenTree.from_sequences(seqs), sum(len(s) - 1 for s in seqs)
        weight = torch.from_numpy(tree.count / n).to(device, torch.float32)
        ratio = shape.forward(flat_profile([len(s) for s in seqs])) / shape.forward(tree_profile(tree))
        def flat_run():
            for s in seqs:
                ids = torch.from_numpy(s.astype(np.int64))[None].to(device)
                (-flat_logprobs(model, ids, torch.ones_like(ids, dtype=torch.bool))[0].sum() / n).backward()
        def tree_run(b): TreeEngine(model, max_tokens, b).forward_backward(tree, lambda e: -(weight[e.index] * e.logprob).sum())
        model.set_attn_implementation(packed)
        base = timed(flat_run, device, repeat)
        cells = []
        for b in backends:
            t = timed(lambda: tree_run(b), device, repeat)
            cells.append(f"{t:.3f} ({base / t:.2f}, {base / t / ratio:.2f})")
        print(f"| {name} | {tree.n_flat:,} → {len(tree):,} | {ratio:.2f} | {base:.3f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989, help="dense bfloat16 TFLOP/s of the card (H100 SXM: 989)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--small", action="store_true", help="a few hundred tokens on a CPU, to see that the script runs")
    args = parser.parse_args()
    if args.small:
        cases, backends, device, dtype = {"group": group(100, 3, 30), "rewrites": rewrites(100, 3)}, ["segments", "reference"], "cpu", torch.float32
        config = Qwen3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        args.max_tokens, args.repeat = 100, 1
    else:
        if not torch.cuda.is_available(): raise SystemExit("no GPU here: --small runs the script on a CPU")
        device, dtype, backends = "cuda", torch.bfloat16, ["flex", "triton"]
        cases = {"group 2 k + 8 × 1 k": group(2048, 8, 1024), "group 8 k + 8 × 2 k": group(8192, 8, 2048), "group 28 k + 8 × 4 k": group(28672, 8, 4096),
                 "rewrites, 8 of 16 k": rewrites(16384, 7), "no sharing, 4 × 8 k": group(0, 4, 8192), "one of 32 k": group(0, 1, 32768)}
        config = Qwen3Config(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                             max_position_embeddings=40960, tie_word_embeddings=True)
        print(torch.cuda.get_device_name(), end=", ")
    print(f"torch {torch.__version__}, {device}, {dtype}\n")
    kernels(cases, model_shape(config), device, dtype, backends, args.repeat, args.peak)
    models(cases, config, device, dtype, backends, args.repeat, args.max_tokens)
