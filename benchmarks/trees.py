"""Trees against sequences, same model, same run: `python benchmarks/trees.py --out figures` (about 35 CPU minutes on
one core).

Every case computes the log-probs of all tokens (forward), and the gradient of their mean as well (forward + backward),
in these ways:

  packed    plain transformers, the linearly merged sequences end to end in one row: SDPA runs on each sequence by
            itself, as FlashAttention's varlen does on a GPU
  one       plain transformers, one sequence a call (SDPA): never faster, so only its memory is measured
  rows      for the small model, whose sequences are short, instead of both: rows of similar length with `kat_eager`, as
            the trainers here compute them, twice as fast as packed
  trl       TRL's GRPO trainer: rows padded to the longest, eight at a time, its fused head
  trl_tree  the tree packing of TRL's experimental asynchronous GRPO trainer. Its attention is a FlashAttention 3
            kernel; here SDPA does that kernel's work, segment by segment
  prefix    prefix_grouper from PyPI on SDPA, where its one level of sharing applies (`make bench` installs it; left out
            where absent)
  tree      TreeEngine in packs of 4,096 tokens (so that only the small model's trees have more than one) without
            recomputing; rows holds as many tokens a call

The baseline of a case is packed or rows. Seconds are CPU seconds of this process with one thread, so that other work on
the machine counts little. Ways take turns, and so does the one that begins; a speed-up is the median over the
repetitions of baseline / tree in the same repetition, beside it the smallest and the largest. Peak memory is counted in
bytes of live tensors above weights and gradients, in a run of its own; there the mean log-prob and the norm of the
gradient of all ways are compared, and a difference is an error.

Cost ratio: FLOPs of the baseline over FLOPs of the tree, from `kat.tree.stats`. Real logs: the tree of the whole log
with every node cut to its first tokens, by one factor, which keeps every branch, the share of tokens saved, and about
the cost ratio (attention weighs less on shorter paths); the table has the whole log's ratio beside it."""
import argparse
import gc
import json
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kat.recipe.rollouts import rollout, teacher
from kat.compute import attention, score, tree_attention
from kat.compute.attention import use_kat_attention
from kat.compute.engine import TreeEngine
from kat.compute.forward import cast_weights
from kat.compute.logprob import flat_logprobs, length_buckets, pad_rows
from kat.compute.score import score_tokens
from kat.envs.base import make_world
from kat.recipe.pipeline import ROOT
from kat.learn.training import load_model
from kat.tree.stats import flat_profile, log_calls, merge_calls, model_shape, tree_profile
from kat.tree.trie import TokenTree

sys.path.insert(0, str(Path(__file__).parent))
from memory import PeakMemory  # noqa: E402

CALL = 4096  # tokens a call of rows, and of a tree's packs
NAMES = dict(packed="packed", one="one a call", rows="rows, kat_eager", trl="TRL", trl_tree="TRL tree packing",
             prefix="prefix_grouper", tree="kat tree")


# cases: name -> (model, sequences, sequences of the whole log or None)
def shared(rng, k, length, por):
    "k sequences with one common prefix, so that a share `por` of their tokens is saved."
    p = round(por * k / (k - 1) * length)
    prefix = rng.integers(0, 49152, p)
    return [np.concatenate([prefix, rng.integers(0, 49152, length - p)]) for _ in range(k)]


def shortened(tree, factor):
    "The sequences of a tree whose every node is cut to its first tokens."
    keep = np.zeros(len(tree), bool)
    for a, b in zip(tree.node_bounds(), tree.node_bounds()[1:]):
        keep[a:a + max(1, round(factor * (b - a)))] = True
    return [tree.ids[p[keep[p]]] for p in map(tree.path, range(tree.n_sequences))]


def log_part(tok, name, factor):
    whole = [c.ids for c in merge_calls(log_calls(ROOT / "data/trajectories" / name, tok))]
    return shortened(TokenTree.from_sequences(whole), factor), whole


def micro_groups(tok, tasks, rollouts):
    world = make_world('micro')
    with world.open() as make_env:
        todo = [t for t in (world.train_task(0, i) for i in range(tasks)) for _ in range(rollouts)]
        return [t.ids for t in rollout(teacher(world, tok), tok, todo, make_env, seed=1)]


def short_turns(rng, tasks, rollouts, turns):
    "Made-up rollouts, each turn one of three actions with its answer, 3 to 7 tokens: thousands of short nodes."
    new, known = (lambda n: rng.integers(0, 1536, n)), {}
    text = lambda key: known.setdefault(key, new(rng.integers(3, 8)))

    def one(task):
        actions = (task, *rng.choice(3, turns, p=(0.5, 0.3, 0.2)))
        return np.concatenate([system, *(text(actions[:i + 1]) for i in range(turns + 1))])
    system = new(16)
    return [one(t) for t in range(tasks) for _ in range(rollouts)]


def cases():
    tok, rng = AutoTokenizer.from_pretrained(ROOT / "data/base"), np.random.default_rng(0)
    made = lambda kind, f, *a: (kind, lambda: (f(*a), None))
    log = lambda *a: ("smollm2", lambda: log_part(tok, *a))
    return {
        **{f"POR {por:g}": made("smollm2", shared, rng, 8, 88, por) for por in (0, 0.1, 0.5, 0.75)},
        "POR 0.95": made("smollm2", shared, rng, 32, 40, 0.95),
        "GRPO, 96 + 8 × 32": made("smollm2", shared, rng, 8, 128, 96 * 7 / 8 / 128),
        "tau-bench airline, 6 episodes, 6 %": log("tau_bench_gpt4o_airline.json", 0.06),
        "SWE-agent, history rewritten, 6 %": log("swe_agent_marshmallow_1867.json", 0.06),
        "SWE-smith, append-only, 30 %": log("swe_smith_pandas_53652.json", 0.3),
        "micro world, RL batch, 16 × 8": made("base", micro_groups, tok, 16, 8),
        "micro world, SFT batch of 20": made("base", micro_groups, tok, 20, 1),
        "short turns, 8 × 128": made("base", short_turns, rng, 8, 128, 8),
    }


def make(kind):  # model, compute dtype of the backbone
    from trl.trainer.utils import add_fused_lm_head
    torch.manual_seed(0)
    if kind == "base":
        model, dtype = load_model(ROOT / "data/base")[0], torch.bfloat16
    else:
        model, dtype = LlamaForCausalLM(LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True)), None
    # as GRPOTrainer does; kat's own ways call the backbone and don't see it
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model, dtype


# ways: (model, sequences, dtype, backward, n) -> sum of log-probs / n
def done(total, backward):
    if backward:
        (-total).backward()
    return float(total.detach())


def padded(seqs):
    return pad_rows([np.asarray(s, np.int64) for s in seqs]), pad_rows([np.ones(len(s), bool) for s in seqs], False)


def run_flat(model, seqs, dtype, backward, n, batches):
    total = 0
    for rows in batches:
        logps = flat_logprobs(model, *padded([seqs[i] for i in rows]), dtype=dtype)[0]
        total += done(logps.sum() / n, backward)
    return total


def run_one(model, seqs, dtype, backward, n):
    model.set_attn_implementation("sdpa")
    return run_flat(model, seqs, dtype, backward, n, [[i] for i in range(len(seqs))])


def run_rows(model, seqs, dtype, backward, n):
    use_kat_attention(model)
    return run_flat(model, seqs, dtype, backward, n, length_buckets([len(s) for s in seqs], CALL))


def packed_layer(module, q, k, v, mask, scaling=None, pack_lengths=None, **kw):
    parts = zip(*(x.split(pack_lengths, 2) for x in (q, k, v)))
    out = [sdpa_attention_forward(module, *part, None, scaling=scaling, is_causal=True)[0] for part in parts]
    return torch.cat(out, 1), None


def run_packed(model, seqs, dtype, backward, n):
    model.set_attn_implementation("bench_packed")
    ids = torch.from_numpy(np.concatenate(seqs).astype(np.int64))
    ends = np.cumsum([len(s) for s in seqs])
    at = torch.cat([torch.arange(len(s)) for s in seqs])
    inputs = dict(input_ids=ids[None], position_ids=at[None], use_cache=False, pack_lengths=[len(s) for s in seqs])
    states = functional_call(model.base_model, cast_weights(model, dtype), (), inputs).last_hidden_state[0]
    sources = torch.from_numpy(np.setdiff1d(np.arange(len(ids)), ends - 1))
    logps = score_tokens(model, states[sources], ids[sources + 1], torch.ones(len(sources)))[0]
    return done(logps.sum() / n, backward)


def run_trl(model, seqs, dtype, backward, n, size=8):
    model.set_attn_implementation("sdpa")
    total = 0.0
    for i in range(0, len(seqs), size):
        ids, mask = padded(seqs[i:i + size])
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            labels = ids.masked_fill(~mask, -100)
            out = model(input_ids=ids, attention_mask=mask.long(), labels=labels, fused_lm_head=True)
        total += done((out.log_probs * mask[:, 1:]).sum() / n, backward)
    return total


def trl_tree_layer(module, q, k, v, mask, scaling=None, tree_kv_index=None, tree_cu_seqlens_q=None,
                   tree_cu_seqlens_k=None, **kw):
    """What FlashAttention 3 computes of TRL's tree packing: each segment over the gathered keys of its path, causal
    from the lower right."""
    parts, (k, v) = [], (x.index_select(2, tree_kv_index) for x in (k, v))
    for a, b, c, d in zip(tree_cu_seqlens_q, tree_cu_seqlens_q[1:], tree_cu_seqlens_k, tree_cu_seqlens_k[1:]):
        rows, columns = b - a, d - c
        seen = None
        if rows != columns:
            seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)[None, None]
        parts.append(sdpa_attention_forward(module, q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], seen, scaling=scaling,
                                            is_causal=seen is None)[0])
    return torch.cat(parts, 1), None


def run_trl_tree(model, seqs, dtype, backward, n):
    from trl.experimental.async_grpo.packing import TreeRow
    model.set_attn_implementation("bench_trl_tree")
    row = TreeRow()
    for s in seqs:
        trained = torch.ones(len(s)).index_fill(0, torch.tensor(0), 0)
        row.add(dict(input_ids=torch.from_numpy(np.asarray(s, np.int64)), completion_mask=trained,
                     old_log_probs=torch.zeros(len(s)), advantage=1.0, group_id=0))
    packed = row.pack()
    batch = {k: packed[k][None] for k in ("input_ids", "position_ids", "shift_labels")}
    cut = {k: packed[k].tolist() for k in ("tree_cu_seqlens_q", "tree_cu_seqlens_k")}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(**batch, fused_lm_head=True, tree_kv_index=packed["tree_kv_index"], **cut)
    return done(out.log_probs.flatten()[packed["token_index"]].sum() / n, backward)


def prefix_layer(module, q, k, v, mask, prefix_grouper=None, scaling=None, **kw):
    "prefix_grouper's attention on SDPA: its own adapter hands a padding mask to FlashAttention, which no CPU has."
    from prefix_grouper.forward import AttentionForward

    def attend(q, k, v, padding):
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        return sdpa_attention_forward(module, q, k, v, seen & padding[:, None, None].bool(), scaling=scaling)[0]
    return AttentionForward(attend)(prefix_grouper, q, k, v), None


def run_prefix(model, seqs, dtype, backward, n):
    from prefix_grouper import PrefixGrouper
    model.set_attn_implementation("bench_prefix")
    p = int((TokenTree.from_sequences(seqs).count == len(seqs)).sum())
    suffixes = [s[p:] for s in seqs]
    grouper = PrefixGrouper([[p, *map(len, suffixes)]], device="cpu")
    ids = torch.from_numpy(np.concatenate([seqs[0][:p], *suffixes]).astype(np.int64))
    at = torch.from_numpy(np.concatenate([np.arange(p), *(p + np.arange(len(s)) for s in suffixes)]))
    inputs = dict(input_ids=ids[None], position_ids=at[None], use_cache=False, prefix_grouper=grouper)
    states = model.model(**inputs).last_hidden_state
    head, _, tail, _ = grouper.split_output(states)
    parts, weight = [head[0, :p - 1]], [np.full(p - 1, len(seqs))]
    for k, s in enumerate(suffixes):
        parts += [head[0, p - 1:p], tail[k, :len(s) - 1]]
        weight.append(np.ones(len(s)))
    targets = torch.cat([ids[1:p], *(torch.from_numpy(s.astype(np.int64)) for s in suffixes)])
    logps = score_tokens(model, torch.cat(parts), targets, torch.ones(len(targets)))[0]
    return done((logps * torch.from_numpy(np.concatenate(weight)).float()).sum() / n, backward)


def run_tree(model, seqs, dtype, backward, n, size=CALL):
    tree, engine = TokenTree.from_sequences(seqs), TreeEngine(model, max_tokens=size, recompute=False, dtype=dtype)
    weight = torch.from_numpy(tree.count / n).float()
    if backward: return -float(engine.forward_backward(tree, lambda e: -(weight[e.index] * e.logprob).sum()))
    e = engine.logprobs(tree)
    return float((weight[e.index] * e.logprob).sum())


def ways(kind, tree, seqs):
    out = dict(packed=run_packed, one=run_one, rows=run_rows, trl=run_trl, trl_tree=run_trl_tree, prefix=run_prefix,
               tree=run_tree)
    one_level = (kind == "smollm2" and len(seqs) > 1 and tree.n_nodes == len(seqs) + 1
                 and 1 < (tree.count == len(seqs)).sum() < min(map(len, seqs)))
    try:
        import prefix_grouper  # noqa: F401
    except ImportError:
        one_level = False
    if not one_level:
        del out["prefix"]
    for w in ("rows",) if kind == "smollm2" else ("packed", "one"):
        del out[w]
    if len(seqs) > 500:
        del out["trl"], out["trl_tree"]  # minutes a call, and gigabytes
    return out


# measuring
def once(run, model, seqs, dtype, backward):  # CPU seconds
    n = sum(len(s) - 1 for s in seqs)
    model.zero_grad(set_to_none=False)
    gc.collect()
    with torch.set_grad_enabled(backward):
        start = time.process_time()
        run(model, seqs, dtype, backward, n)
        return time.process_time() - start


def peaks(runs, model, seqs, dtype):  # name -> bytes; all ways must agree
    n, out, seen = sum(len(s) - 1 for s in seqs), {}, {}
    for way, run in runs.items():
        model.zero_grad(set_to_none=False)
        gc.collect()
        with PeakMemory() as m:
            mean = run(model, seqs, dtype, True, n)
        out[way] = m.peak
        seen[way] = mean, float(sum(p.grad.double().square().sum() for p in model.parameters()).sqrt())
    ref, rtol = next(iter(seen.values())), 1e-3 if dtype is None else 5e-2
    if bad := [w for w, x in seen.items() if not np.allclose(x, ref, rtol=rtol)]:
        raise AssertionError(f"{', '.join(bad)}: mean log-prob and gradient norm differ from the plain model's: {seen}")
    return out


def ratio(shape, seqs):
    tree = TokenTree.from_sequences(seqs)
    return shape.forward(flat_profile([len(s) for s in seqs])) / shape.forward(tree_profile(tree))


def measure(name, kind, model, dtype, seqs, whole, repeat):
    tree, shape = TokenTree.from_sequences(seqs), model_shape(model.config)
    row = dict(case=name, model=kind, sequences=len(seqs), flat_tokens=tree.n_flat, tree_tokens=len(tree),
               nodes=tree.n_nodes, por=1 - len(tree) / tree.n_flat, cost_ratio=ratio(shape, seqs),
               whole_cost_ratio=whole and ratio(shape, whole), seconds=dict(forward={}, both={}))
    runs = ways(kind, tree, seqs)
    row["peak"] = peaks(runs, model, seqs, dtype)  # also the warm-up
    order = [w for w in runs if w != "one"]
    for r in range(repeat):
        for way in order[r % len(order):] + order[:r % len(order)]:
            for what in ("forward", "both"):
                row["seconds"][what].setdefault(way, []).append(once(runs[way], model, seqs, dtype, what == "both"))
    for what, s in row["seconds"].items():
        base = "packed" if "packed" in s else "rows"
        ups = [a / b for a, b in zip(s[base], s["tree"])]
        row[what] = dict(baseline=base, speedup=statistics.median(ups), low=min(ups), high=max(ups))
    return row


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def parts(model, dtype, seqs, repeat):
    """Where the seconds of forward + backward go: attention, head, everything else; and page faults, the trace of large
    tensors."""
    spent = Counter()

    def watch(cls, name):
        for f in ("forward", "backward"):
            def timed(*a, inner=getattr(cls, f)):
                start = time.process_time()
                out = inner(*a)
                spent[name] += time.process_time() - start
                return out
            setattr(cls, f, staticmethod(timed))
    watch(tree_attention._Segments, "attention")
    watch(attention._Causal, "attention")
    watch(score._Score, "head")
    runs = {"rows of 4,096 tokens a call": run_rows,
            **{f"tree, packs of {size:,}": partial(run_tree, size=size) for size in (1024, 2048, CALL)},
            "tree, one pack": partial(run_tree, size=None)}
    rows = {name: [] for name in runs}
    for _ in range(repeat):
        for name, run in runs.items():
            spent.clear()
            before, t = faults(), once(run, model, seqs, dtype, True)
            rows[name].append((t, spent["attention"], spent["head"], t - spent.total(), faults() - before))
    body = []
    for name, got in rows.items():
        *seconds, faulted = zip(*got)
        spans = [f"{np.median(each):.2f} ({min(each):.2f} … {max(each):.2f})" for each in seconds]
        body.append([name, *spans, f"{np.median(faulted) / 1e3:.0f} k"])
    return markdown(["way", "CPU seconds (range)", "attention", "head", "everything else", "page faults"], body) + "\n"


# tables and figures
def cases_table(rows):
    head = ["case", "model", "sequences", "tokens flat → tree", "nodes", "POR", "cost ratio", "of the whole log"]
    body = [[r["case"], r["model"], str(r["sequences"]), f"{r['flat_tokens']:,} → {r['tree_tokens']:,}",
             f"{r['nodes']:,}", f"{r['por']:.2f}", f"{r['cost_ratio']:.2f}",
             f"{r['whole_cost_ratio']:.2f}" if r["whole_cost_ratio"] else "–"] for r in rows]
    return markdown(head, body)


def speed_table(rows, what):
    timed = [w for w in NAMES if w != "one"]
    head = ["case", *(NAMES[w] for w in timed), "speed-up (range)", "÷ cost ratio"]
    def rate(row, way):
        if way not in row["seconds"][what]: return "–"
        tokens = f"{row['flat_tokens'] / statistics.median(row['seconds'][what][way]):,.0f}"
        return f"**{tokens}**" if way == row[what]["baseline"] else tokens
    body = [[r["case"], *(rate(r, way) for way in timed),
             f"{r[what]['speedup']:.2f} ({r[what]['low']:.2f} … {r[what]['high']:.2f})",
             f"{r[what]['speedup'] / r['cost_ratio']:.2f}"] for r in rows]
    return markdown(head, body)


def memory_table(rows):
    body = [[r["case"], *(f"{r['peak'][way] / 1e6:,.0f}" if way in r["peak"] else "–" for way in NAMES)] for r in rows]
    return markdown(["case", *NAMES.values()], body)


def markdown(head, body):
    return "\n".join("| " + " | ".join(x) + " |" for x in [head, ["---"] * len(head), *body])


def report(rows):
    sections = {"**Cases**": cases_table(rows),
                "**Forward + backward: sequences' tokens a second** (baseline in bold)": speed_table(rows, "both"),
                "**Forward only**": speed_table(rows, "forward"),
                "**Peak memory of forward + backward, MB**": memory_table(rows)}
    return "\n\n".join(part for section in sections.items() for part in section) + "\n"


def figures(rows, folder, command):
    from kat.core.figures import save_figure, use_style
    plt, sns = use_style()
    color = dict(zip(NAMES, sns.color_palette("colorblind", len(NAMES)))) | dict(tree="black")
    at, names = np.arange(len(rows))[::-1], [r["case"] for r in rows]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4), gridspec_kw=dict(width_ratios=(1, 1.1)))
    top = max(max(r["cost_ratio"], r["both"]["high"]) for r in rows) * 1.15
    left.plot([0.9, top], [0.9, top], color="0.6", lw=1, zorder=0, label="speed-up = cost ratio")
    for what, mark, label, shift in (("forward", "o", "forward", 0.13), ("both", "s", "forward + backward", -0.13)):
        mid, low, high = (np.array([r[what][k] for r in rows]) for k in ("speedup", "low", "high"))
        cost = np.array([r["cost_ratio"] for r in rows])
        left.errorbar(cost, mid, [mid - low, high - mid], fmt=mark, ms=5, lw=1, alpha=0.8, label=label)
        right.errorbar(mid / cost, at + shift, xerr=[(mid - low) / cost, (high - mid) / cost], fmt=mark, ms=5, lw=1,
                       label=label)
    left.set(xscale="log", yscale="log", xlabel="cost ratio (FLOPs of merged sequences / tree)",
             ylabel="measured speed-up (CPU seconds)")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(plt.FixedLocator([1, 2, 3, 5, 10, 20]))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(plt.NullFormatter())
    left.legend()
    right.axvline(1, color="0.6", lw=1, zorder=0)
    right.set(yticks=at, yticklabels=names, xlabel="speed-up ÷ cost ratio", xlim=(0, None))
    right.yaxis.tick_right()
    fig.suptitle("Trees against the fastest way without them, one core")
    fig.tight_layout()
    repeated = len(rows[0]["seconds"]["both"]["tree"])
    save_figure(fig, folder / "trees_speed.png",
                "Measured speed-up of a tree against the ratio of costs, one core; "
                f"median and range of {repeated} repetitions; each point is a case of the table.", command)
    memory_figure(rows, folder, command, color)


def memory_figure(rows, folder, command, color):
    import matplotlib.pyplot as plt
    from kat.core.figures import save_figure
    at, names = np.arange(len(rows))[::-1], [r["case"] for r in rows]
    fig, ax = plt.subplots(figsize=(8, 4.4))
    for w, name in NAMES.items():
        y = [(i, r["peak"][w] / 1e6) for i, r in zip(at, rows) if w in r["peak"]]
        ax.plot([m for _, m in y], [i for i, _ in y], "D" if w == "tree" else "o", ms=6, color=color[w], alpha=0.85,
                label=name, ls="")
    ax.set(yticks=at, yticklabels=names, xscale="log",
           xlabel="peak memory of forward + backward, MB above weights and gradients")
    ax.set_xticks([200, 500, 1000, 2000, 5000], ["200", "500", "1,000", "2,000", "5,000"], minor=False)
    ax.minorticks_off()
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    fig.tight_layout()
    caption = "Most bytes of tensors alive at once in one forward and backward, above weights and gradients."
    save_figure(fig, folder / "trees_memory.png", caption, command)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--parts", action="store_true",
                        help="only: where the seconds of the micro world's RL batch go, by pack size (a CPU minute)")
    parser.add_argument("--out", type=Path,
                        help="folder for trees.json, trees.md, trees_speed.png and trees_memory.png (with --parts: "
                             "trees_parts.md); with --only its other cases are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, layer in dict(packed=packed_layer, trl_tree=trl_tree_layer, prefix=prefix_layer).items():
        AttentionInterface.register(f"bench_{name}", layer)
        AttentionMaskInterface.register(f"bench_{name}", lambda **kwargs: None)
    kept, models, start = {}, {}, time.process_time()
    if args.only and args.out and (args.out / "trees.json").exists():
        kept = {r["case"]: r for r in json.loads((args.out / "trees.json").read_text())}
    todo = cases()
    if args.parts:
        model, dtype = make("base")
        sum(p.sum() for p in model.parameters()).backward()
        table = parts(model, dtype, todo["micro world, RL batch, 16 × 8"][1]()[0], args.repeat)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "trees_parts.md").write_text(table)
        raise SystemExit(print(table))
    for name, (kind, sequences) in todo.items():
        if args.only and args.only not in name: continue
        seqs, whole = sequences()
        if kind not in models:
            models[kind] = make(kind)
            sum(p.sum() for p in models[kind][0].parameters()).backward()  # gradients exist from now on
        kept[name] = row = measure(name, kind, *models[kind], seqs, whole, args.repeat)
        print(f"{name}: cost ratio {row['cost_ratio']:.2f}, speed-up {row['forward']['speedup']:.2f} forward, "
              f"{row['both']['speedup']:.2f} both; {time.process_time() - start:.0f} CPU s so far", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "trees.json").write_text(json.dumps(list(kept.values()), indent=1) + "\n")
    rows = [kept[name] for name in todo if name in kept]
    print(f"\n{report(rows)}\n{platform.machine()}, one thread, torch {torch.__version__}, {args.repeat} repetitions")
    if args.out:
        (args.out / "trees.md").write_text(report(rows))
        figures(rows, args.out, "python benchmarks/trees.py --out figures")
