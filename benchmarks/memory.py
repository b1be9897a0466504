"""Peak memory of a tree's forward and backward against the tree's size: `python benchmarks/memory.py --out figures`
(two minutes on one core).

Live tensor bytes, counted at every operation, above what was there before (weights and gradients included there): the
same numbers on every machine. Trees of one path length and 4 to 64 paths' worth of tokens, in packs of a quarter path,
once computed again for their backward (the default) and once not. Beside them one path of 64 packs, and a comb 5,000
nodes deep: a stem with a leaf of one token at every token."""
import argparse
import weakref
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.compute.engine import TreeEngine
from kat.tree.trie import TokenTree


class PeakMemory(TorchDispatchMode):
    "Bytes of tensors made inside that are alive at once."
    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self._see(t.untyped_storage(), tree_leaves((args, kwargs)))
        return out

    def _see(self, storage, inputs):
        key = storage._cdata
        if key in self.known: return
        if any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == key for x in inputs): return
        self.known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self.live -= size
        self.known.discard(key)


def paths_tree(path: int, paths: float, seed: int = 0, vocab: int = 500) -> TokenTree:
    "Sequences of one length that branch off at random depths, until the tree holds so many paths' worth of tokens."
    rng = np.random.default_rng(seed)
    seqs, tokens = [rng.integers(0, vocab, path)], path
    while tokens < paths * path:
        cut = int(rng.integers(path // 8, path))
        base = seqs[rng.integers(len(seqs))]
        seqs.append(np.concatenate([base[:cut], rng.integers(0, vocab, path - cut)]))
        tokens += path - cut
    return TokenTree.from_sequences(seqs)


def peak_of(model, tree, max_tokens, recompute=True) -> int:
    model.zero_grad(set_to_none=False)
    engine = TreeEngine(model, max_tokens=max_tokens, recompute=recompute)   # probes the model, the first time
    with PeakMemory() as memory:
        engine.forward_backward(tree, lambda e: -e.logprob.sum())
    return memory.peak


def small_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=500, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=10**5))
    sum(p.sum() for p in model.parameters()).backward()  # gradients exist from now on
    return model


def comb(depth: int, seed: int = 0, vocab: int = 500) -> TokenTree:
    "A stem of `depth` nodes of one token, each with a leaf beside the next: the deepest branching there is."
    ids = np.random.default_rng(seed).integers(0, vocab, depth)
    return TokenTree.from_sequences([np.append(ids[:i], (ids[i] + 1) % vocab) for i in range(1, depth)] + [ids])


def figure(rows, path, folder):
    from kat.core.figures import save_figure, use_style
    plt, _ = use_style()
    fig, ax = plt.subplots(figsize=(6, 3.4))
    x = [r[0] for r in rows]
    ax.axhspan(0.9 * rows[0][2], 1.1 * rows[0][2], color="0.9", label="±10 % of the first")
    ax.plot(x, [r[3] for r in rows], "s--", label="graphs kept (recompute=False)")
    ax.plot(x, [r[2] for r in rows], "o-", label="packs computed again (default)")
    ax.set(xscale="log", yscale="log", xticks=x, xticklabels=[f"{n}\n{r[1]:,}" for n, r in zip(x, rows)],
           xlabel="paths' worth of tokens, tokens", ylabel="peak memory, MB",
           title=f"Peak above the model's own, paths of {path} tokens")
    ax.minorticks_off()
    ax.set(yticks=(2, 5, 10, 20, 50, 100, 200), yticklabels=(2, 5, 10, 20, 50, 100, 200), ylim=(2, 250))
    ax.legend(fontsize=9)
    fig.tight_layout()
    caption = ("Most bytes of tensors alive at once in a tree's forward and backward, "
               f"paths of {path} tokens, packs of {path // 4}.")
    save_figure(fig, folder / "tree_memory.png", caption, "python benchmarks/memory.py --out figures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=int, default=256, help="tokens of a path")
    parser.add_argument("--out", type=Path, help="folder for tree_memory.png and tree_memory.md")
    args = parser.parse_args()
    path, model, rows = args.path, small_model(), []
    torch.set_num_threads(1)
    for paths in (4, 16, 64):
        tree = paths_tree(path, paths)
        peaks = [peak_of(model, tree, path // 4, again) / 1e6 for again in (True, False)]
        rows.append((paths, len(tree), *peaks))
        print(rows[-1], flush=True)
    lines = ["| tree | tokens | peak, MB | without recompute, MB |", "|---|---|---|---|"]
    lines += [f"| {n} paths' worth, branches at random depths | {tokens:,} | {again:.1f} | {kept:.1f} |"
              for n, tokens, again, kept in rows]
    chain = TokenTree.from_sequences([np.random.default_rng(0).integers(0, 500, 16 * path)])
    others = {f"one path of 64 packs ({16 * path:,} tokens)": chain, "a comb 5,000 nodes deep": comb(5000)}
    for name, tree in others.items():
        lines.append(f"| {name} | {len(tree):,} | {peak_of(model, tree, path // 4) / 1e6:.1f} | – |")
    table = "\n".join(lines) + "\n"
    print(f"\n{table}\ntorch {torch.__version__}; paths of {path} tokens, packs of {path // 4}")
    if args.out:
        figure(rows, path, args.out)
        (args.out / "tree_memory.md").write_text(table)
