"""Peak memory of a tree's forward and backward against the tree's size: `python benchmarks/memory.py`.

Live tensor bytes, counted at every operation, above what was there before (weights and gradients included there).
Trees of one path length and 4 to 64 paths' worth of tokens; packs of a quarter path, computed again for their backward.
"""
import argparse
import platform
import weakref

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
            if isinstance(t, torch.Tensor): self._see(t.untyped_storage(), tree_leaves((args, kwargs)))
        return out

    def _see(self, storage, inputs):
        key = storage._cdata
        if key in self.known or any(isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == key for x in inputs): return
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


def peak_of(model, tree, max_tokens) -> int:
    model.zero_grad(set_to_none=False)
    with PeakMemory() as m: TreeEngine(model, max_tokens=max_tokens).forward_backward(tree, lambda e: -e.logprob.sum())
    return m.peak


def small_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=500, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                                         num_key_value_heads=2, head_dim=16, max_position_embeddings=10**5))
    sum(p.sum() for p in model.parameters()).backward()  # gradients exist from now on
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", type=int, default=512)
    path, model = parser.parse_args().path, small_model()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}; path {path} tokens, packs of {path // 4}")
    print("| paths' worth | tokens | packs | peak, MB | without recompute, MB |\n|---|---|---|---|---|")
    for paths in (4, 8, 16, 32, 64):
        tree = paths_tree(path, paths)
        model.zero_grad(set_to_none=False)
        with PeakMemory() as kept: TreeEngine(model, max_tokens=path // 4, recompute=False).forward_backward(tree, lambda e: -e.logprob.sum())
        print(f"| {paths} | {len(tree)} | {-(-len(tree) // (path // 4))}+ | {peak_of(model, tree, path // 4) / 1e6:.1f} | {kept.peak / 1e6:.1f} |", flush=True)
    chain = TokenTree.from_sequences([np.random.default_rng(0).integers(0, 500, 16 * path)])
    print(f"one path of 64 packs, {len(chain)} tokens: {peak_of(model, chain, path // 4) / 1e6:.1f} MB")
