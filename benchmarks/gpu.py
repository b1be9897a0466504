"""Trees on a GPU in one command: `python benchmarks/gpu.py` (an H100; other cards: `--peak`). Not run so far: no GPU
was at hand when it was written (its paths were run on a CPU with `--small`).

Three tables. *Agreement*: output and gradients of every attention backend on a small branching tree, against the dense
reference in float32. *Kernels*: forward and forward + backward of one attention layer over a tree, per backend, beside
SDPA's fused causal kernel on each sequence without sharing, and the FLOP floor (attention FLOPs of the tree over the
card's peak, `--peak` in TFLOP/s). *Model*: a Qwen3 shape of 1.7 billion parameters with random weights in bfloat16,
sequences up to 32 k tokens, per backend, beside the same model on linearly merged sequences packed end to end into
calls of `--max-tokens`: FlashAttention 2's varlen kernel where `flash_attn` is installed, else SDPA's fused kernel
sequence by sequence. A sequence longer than a call goes alone, its layers checkpointed. Trees are cut into packs of
`--max-tokens`, with the engine's default recomputation. Seconds are medians after a warm-up, with their range; memory
is what PyTorch allocated at most, weights and gradients included. What doesn't fit says so."""
import argparse
import statistics
import time

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from kat.compute.engine import TreeEngine
from kat.compute.forward import pack_layout
from kat.compute.score import score_tokens
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
    "Seconds of every repetition after a warm-up; None if the card's memory doesn't suffice."
    sync, out = torch.cuda.synchronize if device == "cuda" else lambda: None, []
    try:
        run(), sync()
        for _ in range(repeat):
            start = time.perf_counter()
            run(), sync()
            out.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return out


def shown(seconds, unit=1.0):
    if seconds is None: return "out of memory"
    return f"{statistics.median(seconds) * unit:.3g} ({min(seconds) * unit:.3g} … {max(seconds) * unit:.3g})"


def table(head):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))


def inputs(tree, shape, device, dtype):  # q, k, v, gradient at the output
    torch.manual_seed(0)
    def make(heads, grad=True):
        return torch.randn(1, heads, len(tree), shape.head_dim, device=device, dtype=dtype, requires_grad=grad)
    return make(shape.heads), make(shape.kv_heads), make(shape.kv_heads), make(shape.heads, False)


def agreement(shape, device, dtype, backends):
    tree = TokenTree.from_sequences(rewrites(600, 3) + group(300, 3, 70))
    layout, (*qkv, up) = pack_layout(tree, partition(tree)[0]), inputs(tree, shape, device, dtype)

    def run(backend, dtype):
        x = [t.detach().to(dtype).requires_grad_() for t in qkv]
        out = tree_attention(*x, layout, shape.head_dim ** -0.5, backend=backend)
        return [t.float() for t in (out, *torch.autograd.grad(out, x, up.to(dtype)))]
    def error(have, want):
        return f"{((have - want).norm() / want.norm()).item():.1e}"
    want = run("reference", torch.float32)
    table(["relative error", "output", "dq", "dk", "dv"])
    for backend in ["reference", *backends]:
        errors = " | ".join(map(error, run(backend, dtype), want))
        print(f"| {backend}, {str(dtype).removeprefix('torch.')} | {errors} |", flush=True)


def attend(x, grad, attention, backward):
    "Attention of q, k, v, and its backward from `grad`, or from ones."
    with torch.set_grad_enabled(backward):
        out = attention(*x)
    if backward:
        torch.autograd.grad(out, x, grad if grad is not None else torch.ones_like(out))


def causal(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def kernels(cases, shape, device, dtype, backends, repeat, peak):
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    print()
    table(["case", "tokens", "pass", *(f"{backend}, ms (range); of the floor" for backend in backends),
           "SDPA, no sharing, ms (range)", "FLOP floor, ms"])
    for name, seqs in cases.items():
        tree = TokenTree.from_sequences(seqs)
        layout, (*qkv, up) = pack_layout(tree, partition(tree)[0]), inputs(tree, shape, device, dtype)
        def make(heads, size):
            return torch.randn(1, heads, size, dim, device=device, dtype=dtype, requires_grad=True)
        flat = [(make(heads, len(s)), make(kv, len(s)), make(kv, len(s))) for s in seqs]
        for what, backward in (("forward", False), ("both", True)):
            floor = 4 * heads * dim * int((tree.position + 1).sum()) / (peak * 1e12) * (3.5 if backward else 1)

            def tree_run(backend):
                attend(qkv, up, lambda *x: tree_attention(*x, layout, dim ** -0.5, backend=backend), backward)
            def flat_run():
                for x in flat:
                    attend(x, None, causal, backward)
            times = [timed(lambda: tree_run(backend), device, repeat) for backend in backends]
            cells = [shown(t, 1e3) + (f"; {floor / statistics.median(t):.0%}" if t else "") for t in times]
            cells += [shown(timed(flat_run, device, repeat), 1e3), f"{floor * 1e3:.3g}"]
            print(f"| {name} | {tree.n_flat:,} → {len(tree):,} | {what} | " + " | ".join(cells) + " |", flush=True)


def packed_layer(module, q, k, v, mask, scaling=None, pack_lengths=None, **kw):
    "SDPA on each sequence of a packed row by itself."
    parts = zip(*(x.split(pack_lengths, 2) for x in (q, k, v)))
    out = [sdpa_attention_forward(module, *part, None, scaling=scaling, is_causal=True)[0] for part in parts]
    return torch.cat(out, 1), None


def calls(seqs, size):
    "Sequences to calls of at most `size` tokens, in order; a longer one alone."
    out = []
    for s in seqs:
        if out and sum(map(len, out[-1])) + len(s) <= size:
            out[-1].append(s)
        else:
            out.append([s])
    return out


def packed_run(model, flash, seqs, size, backward, n):
    for rows in calls(seqs, size):
        ids, lengths = torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(model.device), [len(s) for s in rows]
        if backward and len(ids) > size:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        at = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
        more = {} if flash else dict(pack_lengths=lengths)
        states = model.model(input_ids=ids[None], position_ids=at, use_cache=False, **more).last_hidden_state[0]
        source = torch.from_numpy(np.setdiff1d(np.arange(len(ids)), np.cumsum(lengths) - 1)).to(model.device)
        tau = torch.ones(len(source), device=model.device)
        total = score_tokens(model, states[source], ids[source + 1], tau)[0].sum() / n
        if backward:
            (-total).backward()
    model.gradient_checkpointing_disable()


def models(cases, config, device, dtype, backends, repeat, max_tokens):
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype)
    model.train()  # checkpointing is off otherwise; there is no dropout
    sum(p.sum() for p in model.parameters()).backward()  # gradients exist from now on
    shape, flash = model_shape(config), device == "cuda" and is_flash_attn_2_available()
    AttentionInterface.register("bench_packed", packed_layer)
    AttentionMaskInterface.register("bench_packed", lambda **kwargs: None)
    how = "FlashAttention 2 varlen" if flash else "SDPA sequence by sequence"
    print(f"\n{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters; sequences packed, {how}, "
          f"at most {max_tokens:,} tokens a call\n")
    table(["case", "tokens", "cost ratio", "pass", "packed, s (range); GB",
           *(f"{backend}, s (range); GB; speed-up; ÷ cost ratio" for backend in backends)])
    for name, seqs in cases.items():
        tree, n = TokenTree.from_sequences(seqs), sum(len(s) - 1 for s in seqs)
        weight = torch.from_numpy(tree.count / n).to(device, torch.float32)
        ratio = shape.forward(flat_profile([len(s) for s in seqs])) / shape.forward(tree_profile(tree))
        for what, backward in (("forward", False), ("both", True)):
            def tree_run(b):
                engine = TreeEngine(model, max_tokens, b)
                if backward:
                    engine.forward_backward(tree, lambda e: -(weight[e.index] * e.logprob).sum())
                else:
                    engine.logprobs(tree)
            def measured(run):
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                with torch.set_grad_enabled(backward):
                    t = timed(run, device, repeat)
                peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else "–"
                return t, f"{shown(t)}; {peak}"
            model.set_attn_implementation("flash_attention_2" if flash else "bench_packed")
            base, cell = measured(lambda: packed_run(model, flash, seqs, max_tokens, backward, n))
            cells = [cell]
            for b in backends:
                t, cell = measured(lambda: tree_run(b))
                up = statistics.median(base) / statistics.median(t) if base and t else None
                cells.append(cell + (f"; {up:.2f}; {up / ratio:.2f}" if up else ""))
            print(f"| {name} | {tree.n_flat:,} → {len(tree):,} | {ratio:.2f} | {what} | " + " | ".join(cells) + " |",
                  flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989, help="dense bfloat16 TFLOP/s of the card (H100 SXM: 989)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=16384)
    parser.add_argument("--small", action="store_true",
                        help="a few hundred tokens on a CPU, to see that the script runs")
    args = parser.parse_args()
    if args.small:
        device, dtype, backends = "cpu", torch.float32, ["segments"]
        cases = {"group": group(100, 3, 30), "rewrites": rewrites(100, 3)}
        config = Qwen3Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, head_dim=16)
        args.max_tokens, args.repeat = 120, 2
    else:
        if not torch.cuda.is_available(): raise SystemExit("no GPU here: --small runs the script on a CPU")
        device, dtype, backends = "cuda", torch.bfloat16, ["flex", "triton"]
        cases = {"group 2 k + 8 × 1 k": group(2048, 8, 1024), "group 8 k + 8 × 2 k": group(8192, 8, 2048),
                 "group 28 k + 8 × 4 k": group(28672, 8, 4096), "rewrites, 8 of 16 k": rewrites(16384, 7),
                 "no sharing, 4 × 8 k": group(0, 4, 8192), "one of 32 k": group(0, 1, 32768)}
        config = Qwen3Config(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
                             num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                             max_position_embeddings=40960, tie_word_embeddings=True)
        print(torch.cuda.get_device_name(), end=", ")
    print(f"torch {torch.__version__}, {device}, {dtype}\n")
    shape = model_shape(config)
    agreement(shape, device, dtype, backends)
    kernels(cases, shape, device, dtype, backends, args.repeat, args.peak)
    models(cases, config, device, dtype, backends, args.repeat, args.max_tokens)
