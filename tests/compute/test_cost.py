"Costs agree with the formulas of whole trees; ranges over ranks add up; the time model finds itself again."
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tree_models import gradients, make, sequences, worst
from transformers import Gemma3TextConfig, LlamaConfig

from kat.compute.cost import TimeModel, flat_cost, predicted_speedup, split_ranges, token_flops, tree_costs
from kat.compute.engine import TreeEngine
from kat.tree.stats import flat_profile, model_shape, tree_profile
from kat.tree.trie import TokenTree

FEW = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
SIZE = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
SHAPES = [model_shape(LlamaConfig(**SIZE, num_hidden_layers=3)),
          model_shape(Gemma3TextConfig(**SIZE, num_hidden_layers=4, head_dim=16, sliding_window=5))]


@FEW
@given(seqs=sequences(), size=st.sampled_from([None, 1, 4, 9]), shape=st.sampled_from(SHAPES))
def test_packs_add_up_to_the_tree(seqs, size, shape):
    tree = TokenTree.from_sequences(seqs)
    forward, lengths = shape.forward(tree_profile(tree)), [len(s) for s in seqs]
    assert token_flops(shape, tree.position).sum() == pytest.approx(forward)
    costs = tree_costs(shape, tree, size, recompute=False)
    assert sum(cost.tokens for cost in costs) == len(tree)
    assert sum(cost.flops for cost in costs) == pytest.approx(3 * forward)
    assert flat_cost(shape, lengths).flops == pytest.approx(3 * shape.forward(flat_profile(lengths)))
    again = sum(cost.flops for cost in tree_costs(shape, tree, size))
    assert 3 * forward <= again * (1 + 1e-12) <= 4 * forward * (1 + 1e-9)


@FEW
@given(seqs=sequences(), ranks=st.integers(1, 5), seed=st.integers(0, 99))
def test_ranks_add_up_to_the_whole(seqs, ranks, seed):
    tree, model = TokenTree.from_sequences(seqs), MODEL
    ranks = min(ranks, len(tree))
    w = torch.from_numpy(np.random.default_rng(seed).normal(size=len(tree)))
    TreeEngine(model).forward_backward(tree, lambda e: (w[e.index] * e.logprob).sum())
    want = gradients(model)
    parts = split_ranges(tree, ranks)
    own = np.concatenate([p.index[p.score] for p in parts])
    assert own.tolist() == list(range(len(tree)))
    for p in parts:
        index = torch.from_numpy(p.index)
        engine = TreeEngine(model, max_tokens=5)
        engine.forward_backward(p.tree, lambda e: (w[index[e.index]] * e.logprob).sum(), p.score)
    assert worst(want, gradients(model)) < 1e-9
    with pytest.raises(ValueError, match="ranks"):
        split_ranges(tree, len(tree) + 1)


MODEL = make("qwen3")


def test_no_sharing_costs_what_the_sequences_cost_and_small_packs_warn():
    alone = TokenTree.from_sequences([[k] * 50 for k in range(5)])
    assert predicted_speedup(SHAPES[0], alone) == 1.0
    with pytest.warns(UserWarning, match="shares too little to pay"):
        predicted_speedup(SHAPES[0], alone, 8)
    with pytest.raises(ValueError, match="at least 3"):
        TimeModel.fit([])
