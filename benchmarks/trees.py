"""Trees against sequences, same model, same run: `python benchmarks/trees.py` (about half an hour on one core).

Every case computes the log-probs of all tokens (forward) and the gradient of their mean (forward + backward) four ways:

  flat    plain transformers on linearly merged sequences without padding, one a call (SDPA); for the small model also batches of similar length (kat_eager), the faster one counts
  trl     TRL's own path: rows padded to the longest, four at a time, its fused head
  prefix  prefix_grouper from PyPI, where its one level of sharing applies (`pip install prefix_grouper==0.0.1.post1`; left out where absent)
  tree    TreeEngine, one pack

Seconds are CPU seconds of this process with one thread, so that other work on the machine counts little; `--repeat` takes the smallest.
Cost ratio: FLOPs of the flat way over FLOPs of the tree, from `kat.tree.stats`. Cases on real logs are a fixed part (320 tokens of four calls, 1,024 of one)
that fits half an hour; their cost ratios over whole logs are what `kat tree stats` prints.
"""
import argparse
import gc
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kat.rollouts import ScriptPolicy, rollout
from kat.compute.attention import use_kat_attention
from kat.compute.engine import TreeEngine
from kat.compute.logprob import flat_logprobs, length_buckets, pad_rows
from kat.envs.expert import Expert
from kat.pipeline import ROOT
from kat.stages import load_model, train_task, world
from kat.tree.stats import flat_profile, log_calls, merge_calls, model_shape, tree_profile
from kat.tree.trie import TokenTree

sys.path.insert(0, str(Path(__file__).parent))
from memory import PeakMemory  # noqa: E402


def shared(rng, k, length, por, vocab):
    "k sequences with one common prefix, so that a share `por` of their tokens is saved."
    p = round(por * k / (k - 1) * length)
    prefix = rng.integers(0, vocab, p)
    return [np.concatenate([prefix, rng.integers(0, vocab, length - p)]) for _ in range(k)]


def log_part(name, tok, calls, length):
    "The first calls of one task of a log, linearly merged, cut to `length` tokens."
    cs = merge_calls(log_calls(ROOT / "data/trajectories" / name, tok))
    cs = [c for c in cs if c.task == cs[0].task][:calls]
    return [c.ids[:length] for c in cs]


def micro_groups(tok, tasks, rollouts):
    with world() as make_env:
        todo = [t for t in (train_task(0, i) for i in range(tasks)) for _ in range(rollouts)]
        return [t.ids for t in rollout(ScriptPolicy(tok, lambda e: Expert(e.task, e.seed)), tok, todo, make_env, seed=1)]


def cases():
    tok = AutoTokenizer.from_pretrained(ROOT / "data/base")
    rng = np.random.default_rng(0)
    big = lambda por, k=8, n=160: ("smollm2", lambda: shared(rng, k, n, por, 49152))
    return {
        "POR 0": big(0.0), "POR 0.1": big(0.1), "POR 0.25": big(0.25), "POR 0.5": big(0.5), "POR 0.75": big(0.75), "POR 0.95": big(0.95, 32, 40),
        "GRPO 160 + 8×32": ("smollm2", lambda: shared(rng, 8, 192, 160 * 7 / 8 / 192, 49152)),
        "tau-bench, one task": ("smollm2", lambda: log_part("tau_bench_gpt4o_airline.json", tok, 4, 320)),
        "SWE-agent, rewritten history": ("smollm2", lambda: log_part("swe_agent_marshmallow_1867.json", tok, 4, 320)),
        "SWE-smith, append-only": ("smollm2", lambda: log_part("swe_smith_pandas_53652.json", tok, 1, 1024)),
        "micro, 16 tasks × 8": ("base", lambda: micro_groups(tok, 16, 8)),
        "micro, SFT batch of 20": ("base", lambda: micro_groups(tok, 20, 1)),
    }


def make(kind):
    torch.manual_seed(0)
    if kind == "base": return load_model(ROOT / "data/base")[0], torch.bfloat16
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                                        head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True)), None


def padded(seqs): return pad_rows([np.asarray(s, np.int64) for s in seqs]), pad_rows([np.ones(len(s), bool) for s in seqs], False)


def flat_run(model, seqs, dtype, backward, batches, n):
    for rows in batches:
        logps, _ = flat_logprobs(model, *padded([seqs[i] for i in rows]), dtype=dtype)
        if backward: (-logps.sum() / n).backward()


def run_one(model, seqs, dtype, backward, n):
    model.set_attn_implementation("sdpa")
    flat_run(model, seqs, dtype, backward, [[i] for i in range(len(seqs))], n)


def run_buckets(model, seqs, dtype, backward, n):
    use_kat_attention(model)
    flat_run(model, seqs, dtype, backward, length_buckets([len(s) for s in seqs], max(4096, max(map(len, seqs)))), n)


def run_tree(model, seqs, dtype, backward, n):
    tree = TokenTree.from_sequences(seqs)
    weight = torch.from_numpy(tree.count / n).float()
    engine = TreeEngine(model, dtype=dtype)
    if backward: engine.forward_backward(tree, lambda e: -(weight[e.index] * e.logprob).sum())
    else: engine.logprobs(tree)


def run_trl(model, seqs, dtype, backward, n):
    model.set_attn_implementation("sdpa")
    for i in range(0, len(seqs), 4):
        ids, mask = padded(seqs[i:i + 4])
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = model(input_ids=ids, attention_mask=mask.long(), labels=ids.masked_fill(~mask, -100), fused_lm_head=True, use_cache=False)
        if backward: (-(out.log_probs * mask[:, 1:] if out.log_probs.shape[1] < ids.shape[1] else out.log_probs * mask).sum() / n).backward()


def register_prefix_grouper():
    "prefix_grouper's attention on SDPA: its own adapter hands a padding mask to FlashAttention, which a CPU doesn't have."
    from prefix_grouper.forward import AttentionForward
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(q, k, v, padding, module, **kw):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        return sdpa_attention_forward(module, q, k, v, seen & padding[:, None, None].bool(), **kw)[0]
    def layer(module, q, k, v, mask, prefix_grouper=None, **kw): return AttentionForward(attend)(prefix_grouper, q, k, v, module, **kw), None
    AttentionInterface.register("prefix_grouper_sdpa", layer)


def run_prefix(model, seqs, dtype, backward, n):
    from prefix_grouper import PrefixGrouper
    tree = TokenTree.from_sequences(seqs)
    p, suffixes = int((tree.count == len(seqs)).sum()), None
    suffixes = [s[p:] for s in seqs]
    grouper = PrefixGrouper([[p, *map(len, suffixes)]], device="cpu")
    ids = torch.from_numpy(np.concatenate([seqs[0][:p], *suffixes]).astype(np.int64))[None]
    at = torch.from_numpy(np.concatenate([np.arange(p), *(p + np.arange(len(s)) for s in suffixes)]))[None]
    model.set_attn_implementation("prefix_grouper_sdpa")
    states = model.model(input_ids=ids, position_ids=at, use_cache=False, prefix_grouper=grouper).last_hidden_state
    out, _, suffix, mask = grouper.split_output(states)
    head = lambda h, y: torch.log_softmax(h.float() @ model.lm_head.weight.float().T, -1).gather(-1, y[:, None]).sum()
    total = len(seqs) * head(out[0, :p - 1], ids[0, 1:p])
    for k, s in enumerate(suffixes): total = total + head(torch.cat([out[0, p - 1:p], suffix[k, :len(s) - 1]]), torch.from_numpy(s.astype(np.int64)))
    if backward: (-total / n).backward()


def seconds(run, model, seqs, dtype, backward, repeat):
    n, best = sum(len(s) - 1 for s in seqs), float("inf")
    for _ in range(repeat):
        model.zero_grad(set_to_none=True)
        gc.collect()
        with torch.set_grad_enabled(backward):
            start = time.process_time()
            run(model, seqs, dtype, backward, n)
            best = min(best, time.process_time() - start)
    return best


def peak(run, model, seqs, dtype):
    sum(p.sum() for p in model.parameters()).backward()  # gradients exist already
    with PeakMemory() as m: run(model, seqs, dtype, True, sum(len(s) - 1 for s in seqs))
    return m.peak


def measure(name, kind, seqs, model, dtype, repeat, memory):
    tree, shape = TokenTree.from_sequences(seqs), model_shape(model.config)
    cost = shape.forward(flat_profile([len(s) for s in seqs])) / shape.forward(tree_profile(tree))
    row = dict(case=name, model=kind, flat_tokens=tree.n_flat, tree_tokens=len(tree), nodes=tree.n_nodes, por=1 - len(tree) / tree.n_flat, cost_ratio=cost)
    runs = dict(one=run_one, tree=run_tree) | (dict(trl=run_trl) if kind == "smollm2" else dict(buckets=run_buckets))
    try:
        import prefix_grouper  # noqa: F401
        if kind == "smollm2" and len(seqs) > 1 and 1 < (tree.count == len(seqs)).sum() < min(map(len, seqs)):
            register_prefix_grouper()
            runs["prefix"] = run_prefix
    except ImportError: pass
    for what, backward in (("forward", False), ("both", True)):
        for way, run in runs.items(): row[f"{what}_{way}"] = seconds(run, model, seqs, dtype, backward, repeat)
        row[f"{what}_flat"] = min(row[f"{what}_{way}"] for way in ("one", "buckets") if way in runs)
        row[f"{what}_speedup"] = row[f"{what}_flat"] / row[f"{what}_tree"]
        row[f"{what}_of_cost_ratio"] = row[f"{what}_speedup"] / cost
    if not memory: return row
    faster = run_one if row["both_one"] == row["both_flat"] else run_buckets
    row |= {"peak_flat": peak(faster, model, seqs, dtype), "peak_tree": peak(run_tree, model, seqs, dtype)}
    return row


def table(rows):
    head = ["case", "model", "tokens flat → tree", "POR", "cost ratio", "forward flat / tree, s", "fwd + bwd flat / tree, s", "trl, s", "prefix_grouper, s", "speed-up fwd, fwd + bwd", "÷ cost ratio", "tree tokens/s", "peak MB flat / tree"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        opt = lambda k: f"{r[k]:.1f}" if k in r else "–"
        lines.append("| " + " | ".join([r["case"], r["model"], f"{r['flat_tokens']:,} → {r['tree_tokens']:,}", f"{r['por']:.2f}", f"{r['cost_ratio']:.2f}",
            f"{r['forward_flat']:.1f} / {r['forward_tree']:.1f}", f"{r['both_flat']:.1f} / {r['both_tree']:.1f}", opt("both_trl"), opt("both_prefix"),
            f"{r['forward_speedup']:.2f}, {r['both_speedup']:.2f}", f"{r['forward_of_cost_ratio']:.2f}, {r['both_of_cost_ratio']:.2f}",
            f"{r['flat_tokens'] / r['both_tree']:.0f}", f"{r['peak_flat'] / 1e6:.0f} / {r['peak_tree'] / 1e6:.0f}" if "peak_tree" in r else "–"]) + " |")
    return "\n".join(lines)


def figure(rows, path, command):
    import matplotlib.pyplot as plt
    import seaborn as sns
    from kat.study.plots import save_figure
    sns.set_theme(style="whitegrid")
    fig, ax = plt.subplots(figsize=(6.4, 4))
    top = max(max(r["cost_ratio"], r["both_speedup"]) for r in rows) * 1.1
    ax.plot([0.9, top], [0.9, top], color="0.6", lw=1, label="speed-up = cost ratio")
    for key, mark, label in (("forward_speedup", "o", "forward"), ("both_speedup", "s", "forward + backward")):
        ax.scatter([r["cost_ratio"] for r in rows], [r[key] for r in rows], marker=mark, label=label, alpha=0.8)
    ax.set(xscale="log", yscale="log", xlabel="cost ratio (FLOPs, merged sequences over tree)", ylabel="measured speed-up (CPU seconds)", title="Trees against merged sequences, one core")
    ax.legend()
    fig.tight_layout()
    save_figure(fig, path, "Measured speed-up against the ratio of costs, one core; each point is a case of the table.", command)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well, in runs of its own")
    parser.add_argument("--out", type=Path, help="folder for trees.json, trees.md and trees_speed.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from trl.trainer.utils import add_fused_lm_head
    rows, models = [], {}
    for name, (kind, sequences) in cases().items():
        if args.only and args.only not in name: continue
        if kind not in models:
            models[kind] = make(kind)
            if kind == "smollm2": add_fused_lm_head(models[kind][0])
            seconds(run_tree, models[kind][0], [np.arange(40), np.arange(50)], models[kind][1], True, 1)  # warm-up
        rows.append(measure(name, kind, sequences(), *models[kind], args.repeat, args.memory))
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "trees.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[-1], flush=True)
    command = "python benchmarks/trees.py" + (f" --repeat {args.repeat}" if args.repeat > 1 else "")
    print(f"\n{platform.machine()}, one thread, torch {torch.__version__}: {command}")
    if args.out:
        (args.out / "trees.md").write_text(table(rows) + f"\n\n`{command}`, one thread, torch {torch.__version__}\n")
        figure(rows, args.out / "trees_speed.png", command)
