"The load-balancing loss of a mixture of experts on trees: transformers' own, on the padded batch of the sequences."
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tree_models import gradients, make, sequences

from kat.compute.engine import TreeEngine
from kat.compute.logprob import pad_rows
from kat.tree.trie import TokenTree

MODEL = make("qwen3moe", torch.float32)
COEF = 0.7


def flat(model, seqs, weigh):
    "Loss and gradients of the batch: minus the weighted log-probs, and COEF times transformers' aux_loss."
    ids, mask = pad_rows([np.asarray(s, np.int64) for s in seqs]), pad_rows([np.ones(len(s), np.int64) for s in seqs])
    out = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    logps = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    loss = COEF * out.aux_loss - weigh * (logps * mask[:, 1:]).sum()
    loss.backward()
    return loss.item(), gradients(model)


def close(want, have):
    norm = sum(g.norm() ** 2 for g in want.values()) ** 0.5
    return sum((want[n] - have[n]).norm() ** 2 for n in want) ** 0.5 <= 2e-5 * norm + 1e-6


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(sequences(most=5), st.sampled_from([None, 1, 3, 8]), st.booleans(), st.booleans())
def test_as_transformers_on_the_batch(seqs, size, recompute, paths):
    tree = TokenTree.from_sequences(seqs)
    count = torch.from_numpy(tree.count).float()
    want_loss, want = flat(MODEL, seqs, 0.1)
    engine = TreeEngine(MODEL, size, recompute=recompute, router_coef=COEF)
    whole = paths and tree.position.max() > 0
    loss = engine.forward_backward(tree, lambda e: -0.1 * (count[e.index] * e.logprob).sum(), whole_paths=whole)
    assert abs(float(loss) - want_loss) < 1e-4 * max(1, abs(want_loss)) and close(want, gradients(MODEL))


@pytest.mark.parametrize("size", [None, 3])
def test_only_the_routers(size):
    "No edge is wanted: packs without any still give their share. With checkpointing layers run twice and count once."
    seqs = [[1, 2, 3, 4], [1, 2, 5], [7, 8, 9]]
    _, want = flat(MODEL, seqs, 0.0)
    assert max(g.norm() for g in want.values()) > 1e-4
    model = make("qwen3moe", torch.float32)
    hooks = lambda: sum(len(m._forward_hooks) for m in model.modules())
    for checkpointing in (False, True):
        if checkpointing:
            model.train().activation_checkpointing_enable()
        before = hooks()
        tree = TokenTree.from_sequences(seqs)
        TreeEngine(model, size, router_coef=COEF).forward_backward(tree, None, score=np.zeros(len(tree), bool))
        assert close(want, gradients(model)) and hooks() == before


def test_refused():
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no routers"):
        TreeEngine(make("qwen3"), router_coef=0.1)
    for x in (-1, float("nan")):
        with pytest.raises(ValueError, match="router_coef"):
            TreeEngine(MODEL, router_coef=x)
