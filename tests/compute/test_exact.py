"""Trees against plain sequences: the same log-probs and the same gradients, to rounding, on inputs that branch."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (AutoModelForCausalLM, FalconH1Config, Lfm2Config, LlamaConfig, LlamaForCausalLM, MambaConfig,
                          Qwen3NextConfig)
from tree_models import KINDS, flat_logprobs_of, gradients, make, sequences, worst

from kat.compute.engine import TreeEngine
from kat.compute.forward import check_model
from kat.compute.logprob import pack_edges, tree_logprobs
from kat.tree.partition import partition
from kat.tree.trie import TokenTree

BACKENDS = ["reference", "segments"]
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
PACKS = st.sampled_from([None, 1, 2, 3, 5, 8])
MODELS = {k: make(k) for k in KINDS}


def weights_of(seqs, rng, node=False):
    "Random signed weights per token of each sequence, many zero; as node semantics divided by the count."
    tree = TokenTree.from_sequences(seqs)
    ws = [rng.normal(size=len(s)) * (rng.random(len(s)) < 0.7) for s in seqs]
    if node:
        ws = [w / tree.count[tree.path(k)] for k, w in enumerate(ws)]
    total = np.zeros(len(tree))
    for k, w in enumerate(ws):
        np.add.at(total, tree.path(k), w)
    return tree, ws, torch.from_numpy(total)


def flat_run(model, seqs, ws, temperature, bonus):
    total = 0.0
    for s, w in zip(seqs, ws):
        if len(s) < 2: continue
        logp, entropy = flat_logprobs_of(model, s, temperature)
        loss = (torch.from_numpy(w[1:]) * (logp + bonus * entropy)).sum()
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def tree_run(model, tree, w, temperature, bonus, **how):
    seen = []
    def loss(e):
        seen.append(e.index)
        return (w[e.index] * (e.logprob + bonus * e.entropy)).sum()
    value = TreeEngine(model, temperature=temperature, **how).forward_backward(tree, loss)
    edges = torch.cat(seen).sort().values if seen else torch.empty(0)
    assert edges.tolist() == np.flatnonzero(tree.prev >= 0).tolist()  # every edge once, in whichever pack
    return float(value), gradients(model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seqs=sequences(), size=PACKS, node=st.booleans(), recompute=st.booleans(),
       temperature=st.sampled_from([1.0, 0.6]), seed=st.integers(0, 99))
def test_gradients_are_the_flat_ones(kind, backend, seqs, size, node, recompute, temperature, seed):
    model = MODELS[kind]
    tree, ws, total = weights_of(seqs, np.random.default_rng(seed), node)
    want_loss, want = flat_run(model, seqs, ws, temperature, 0.1)
    loss, have = tree_run(model, tree, total, temperature, 0.1, backend=backend, max_tokens=size, recompute=recompute)
    assert abs(loss - want_loss) < 1e-9 * max(1, abs(want_loss))
    assert worst(want, have) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seqs=sequences(), size=PACKS, temperature=st.sampled_from([1.0, 0.6]))
def test_logprobs_are_the_flat_ones(kind, backend, seqs, size, temperature):
    model, tree = MODELS[kind], TokenTree.from_sequences(seqs)
    with torch.no_grad():
        got = tree_logprobs(model, tree, temperature, backend, size)
        for k, s in enumerate(seqs):
            logp, entropy = flat_logprobs_of(model, s, temperature)
            at = tree.path(k)
            torch.testing.assert_close(got.logprob[at[1:]], logp, atol=1e-10, rtol=0)
            torch.testing.assert_close(got.entropy[at[1:]], entropy, atol=1e-10, rtol=0)
            assert got.logprob[at[0]] == got.entropy[at[0]] == 0


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3moe"])
@FEW
@given(seqs=sequences(), size=PACKS)
@example(seqs=[np.array([18, 14, 22, 2, 17, 17, 15, 21, 21, 2])], size=1)  # Gemma's own rounding: 6e-7 of the gradient
def test_stock_models_in_float32(kind, seqs, size):
    "Nothing swapped, transformers as it is: the tree is as near to the gradient in float64 as plain sequences are."
    single, double = STOCK[kind]
    tree, ws, total = weights_of(seqs, np.random.default_rng(0))
    _, want = flat_run(double, seqs, ws, 1.0, 0.1)
    _, flat = flat_run(single, seqs, [w.astype(np.float32) for w in ws], 1.0, 0.1)
    _, have = tree_run(single, tree, total.float(), 1.0, 0.1, max_tokens=size)
    norm = sum(g.norm() ** 2 for g in want.values()) ** 0.5
    def off(got):
        return sum((want[n] - got[n].double()).norm() ** 2 for n in want) ** 0.5
    assert off(have) <= 3 * off(flat) + 5e-7 * norm + 1e-7


def single_and_double(kind):
    model = make(kind, torch.float32, noise=0.02)
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")  # the library's grouped kernels know no float64
    return model, double


STOCK = {k: single_and_double(k) for k in ("qwen3", "gemma3", "qwen3moe")}


@FEW
@given(seqs=sequences(), size=PACKS)
@example(seqs=[np.array([18])], size=None)  # no edge at all: still of the model's type
def test_whole_paths_in_two_passes(seqs, size):
    model, tree = MODELS["qwen3"], TokenTree.from_sequences(seqs)
    adv = torch.linspace(-1, 2, len(seqs), dtype=torch.float64)
    def of(logprobs):
        return sum(a * x.mean().exp() for a, x in zip(adv, logprobs) if len(x))
    want_loss = of([flat_logprobs_of(model, s)[0] if len(s) > 1 else torch.empty(0) for s in seqs])
    if isinstance(want_loss, torch.Tensor):
        want_loss.backward()
    want = gradients(model)
    def loss(e):
        at = torch.zeros(len(tree), dtype=torch.float64).index_copy(0, e.index, e.logprob)
        return of([at[torch.from_numpy(tree.path(k)[1:])] for k in range(len(seqs))]) + 0 * e.logprob.sum()
    TreeEngine(model, max_tokens=size).forward_backward(tree, loss, whole_paths=True)
    assert worst(want, gradients(model)) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@FEW
@given(seqs=sequences(most=5), size=PACKS, data=st.data())
def test_only_ancestors_matter(backend, seqs, size, data):
    "Change one token: what stands on other paths keeps its bits; what is below it changes."
    model = MODELS["mistral" if data.draw(st.booleans()) else "qwen3"]
    tree = TokenTree.from_sequences(seqs)
    t = data.draw(st.integers(0, len(tree) - 1))
    other = [s.copy() for s in seqs]
    for k in range(len(seqs)):  # a fresh id, so that the tree's shape stays
        at = np.flatnonzero(tree.path(k) == t)
        other[k][at] = 22 if tree.ids[t] != 22 else 21
    changed = TokenTree.from_sequences(other)
    if len(changed) != len(tree): return  # the new id made two branches one
    with torch.no_grad():
        a, b = (tree_logprobs(model, x, 1.0, backend, size) for x in (tree, changed))
    for k in range(len(seqs)):
        p, q = tree.path(k), changed.path(k)
        where = np.flatnonzero(p == t)
        upto = where[0] if len(where) else len(p)
        torch.testing.assert_close(a.logprob[p[:upto]], b.logprob[q[:upto]], atol=1e-12, rtol=0)
        if len(where) and upto + 1 < len(p):
            assert not torch.allclose(a.logprob[p[upto + 1]], b.logprob[q[upto + 1]], atol=1e-9, rtol=0)


@FEW
@given(seqs=sequences(), size=PACKS, seed=st.integers(0, 99))
def test_order_of_sequences_is_nothing(seqs, size, seed):
    order = np.random.default_rng(seed).permutation(len(seqs))
    a, b = TokenTree.from_sequences(seqs), TokenTree.from_sequences([seqs[i] for i in order])
    with torch.no_grad():
        x, y = (tree_logprobs(MODELS["qwen3"], t, max_tokens=size).logprob for t in (a, b))
    assert torch.equal(x, y)
    for k, i in enumerate(order):
        assert np.array_equal(a.path(i), b.path(k))


@FEW
@given(seqs=sequences(most=8), size=st.integers(1, 12))
def test_packs_hold_every_edge_once(seqs, size):
    tree = TokenTree.from_sequences(seqs)
    packs, every = partition(tree, size), np.ones(len(tree), bool)
    assert all(len(p) <= size for p in packs)
    assert [p.start for p in packs] + [len(tree)] == [0] + [p.stop for p in packs]
    edges = np.concatenate([pack_edges(tree, p, every) for p in packs])
    assert sorted(edges) == np.flatnonzero(tree.prev >= 0).tolist()
    for i, p in enumerate(packs):
        assert np.array_equal(p.past, [t for t in range(p.start) if tree.end[t] > p.start])
        assert p.parent < i and (p.parent == -1) == (len(p.past) == 0)


def test_a_branch_whose_first_token_lies_in_another_pack_is_trained():
    "Two branches off one token, cut so that each branch's first token starts a pack: their edges carry all the weight."
    seqs = [[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 7]]
    model, tree = MODELS["qwen3"], TokenTree.from_sequences(seqs)
    first = [int(tree.path(k)[2]) for k in range(3)]
    ws = [np.array([0, 0, 1.0] + [0.0] * (len(s) - 3)) for s in seqs]
    _, want = flat_run(model, seqs, ws, 1.0, 0.0)
    w = torch.zeros(len(tree), dtype=torch.float64)
    w[first] = 1
    for size in (1, 2):
        _, have = tree_run(model, tree, w, 1.0, 0.0, max_tokens=size)
        assert worst(want, have) < 1e-9 and sum(g.norm() for g in have.values()) > 1e-3


@pytest.mark.parametrize("size", [None, 4])
def test_activation_checkpointing_changes_nothing(size):
    model = make("qwen3")
    seqs = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8], [1, 2, 3, 9, 7, 7]]
    tree, _, w = weights_of(seqs, np.random.default_rng(0))
    _, want = tree_run(model, tree, w, 1.0, 0.1)
    model.train().activation_checkpointing_enable()
    _, have = tree_run(model, tree, w, 1.0, 0.1, max_tokens=size)
    assert worst(want, have) < 1e-9
    with pytest.raises(ValueError, match="activation checkpointing"):
        tree_logprobs(model, tree)
    with torch.no_grad():
        tree_logprobs(model, tree)


@pytest.mark.parametrize("size", [None, 3])
def test_lora(size):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(make("qwen3"), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora" in n:
                p.copy_(torch.randn_like(p) * 0.1)
    model = model.double()
    seqs = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8], [1, 2, 3, 9, 7, 7]]
    tree, ws, w = weights_of(seqs, np.random.default_rng(0))
    _, want = flat_run(model, seqs, ws, 1.0, 0.1)
    _, have = tree_run(model, tree, w, 1.0, 0.1, max_tokens=size)
    assert all("lora" in n for n in want) and worst(want, have) < 1e-9


def test_bfloat16_is_no_worse_than_flat():
    "Against float32: the tree's bf16 gradient error is at most 1.1 times the flat computation's own."
    errors = {"flat": [], "tree": []}
    for seed in range(4):
        full, low = make("qwen3", torch.float32, seed), make("qwen3", torch.bfloat16, seed)
        with torch.no_grad():
            for a, b in zip(full.parameters(), low.parameters()):
                a.copy_(b)
        rng = np.random.default_rng(seed)
        base = rng.integers(0, 23, 30)
        seqs = [np.concatenate([base[:rng.integers(10, 30)], rng.integers(0, 23, 20)]) for _ in range(8)]
        tree, ws, _ = weights_of(seqs, rng)
        ws = [abs(x).astype(np.float32) for x in ws]
        total = np.zeros(len(tree), np.float32)
        for k, x in enumerate(ws):
            np.add.at(total, tree.path(k), x)
        _, truth = flat_run(full, seqs, ws, 1.0, 0.0)
        _, flat = flat_run(low, seqs, ws, 1.0, 0.0)
        _, have = tree_run(low, tree, torch.from_numpy(total), 1.0, 0.0, max_tokens=40)
        size = sum(x.norm() ** 2 for x in truth.values()) ** 0.5
        for name, grads in (("flat", flat), ("tree", have)):
            off = sum((truth[n] - grads[n].float()).norm() ** 2 for n in truth) ** 0.5
            errors[name].append(float(off / size))
    assert np.mean(errors["tree"]) <= 1.1 * np.mean(errors["flat"]), errors


def test_depth_5000_and_a_path_of_64_packs():
    model = make("llama", torch.float32)
    model.config.max_position_embeddings = 6000
    tree = TokenTree.from_sequences([np.arange(5000) % 23])
    assert tree.n_nodes == 1
    with torch.no_grad():
        assert len(tree_logprobs(model, tree, max_tokens=1000).logprob) == 5000
    chain = TokenTree.from_sequences([np.arange(n + 1) % 23 for n in range(128)])  # every prefix a sequence: 128 nodes
    assert chain.n_nodes == 128
    whole, cut = ({}, {})
    for out, size in ((whole, None), (cut, 2)):
        TreeEngine(model, max_tokens=size).forward_backward(chain, lambda e: -e.logprob.sum())
        out.update(gradients(model))
    assert len(partition(chain, 2)) == 64 and worst(whole, cut) < 1e-4


def plain_run(model, ids, loss):  # of one sequence by one plain forward: loss and gradients
    value = loss(model(torch.as_tensor(ids, dtype=torch.long)[None], use_cache=False).logits[0, :-1])
    value.backward()
    return value.item(), gradients(model)


@pytest.fixture
def deep():  # one small layer that takes long sequences
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, head_dim=16, max_position_embeddings=5000)
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model


def test_backward_through_a_chain_of_5000_nodes_in_packs(deep):
    "Every prefix is a sequence of its own. With weights per token, the longest sequence alone says the same."
    ids = np.random.default_rng(0).integers(0, 23, 5000)
    tree, w = TokenTree.from_sequences([ids[:n + 1] for n in range(5000)]), torch.arange(5000) / 5000
    assert tree.n_nodes == len(tree) == 5000 and len(partition(tree, 700)) >= 8
    value = TreeEngine(deep, max_tokens=700).forward_backward(tree, lambda e: -(w[e.index] * e.logprob).sum())
    have = gradients(deep)
    def weighted(logits):
        return (w[1:] * F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none")).sum()
    loss, want = plain_run(deep, ids, weighted)
    assert worst(want, have) < 1e-9 and float(value) == pytest.approx(loss, rel=1e-12)


def test_backward_through_a_comb_of_1500_levels_in_packs(deep):
    "At every level one token leaves the trunk, alone. It is a target only: in one plain sequence, a second one."
    trunk = np.random.default_rng(1).integers(0, 22, 1500)
    tooth = (trunk + 1) % 22
    tree = TokenTree.from_sequences([np.append(trunk[:n], tooth[n]) for n in range(1, 1500)] + [trunk])
    assert len(tree) == 1500 + 1499 and tree.n_nodes > 2900 and len(partition(tree, 200)) >= 15
    value = TreeEngine(deep, max_tokens=200).forward_backward(tree, lambda e: -e.logprob.sum())
    have = gradients(deep)
    def of_both(logits):
        return sum(F.cross_entropy(logits, torch.from_numpy(x[1:]), reduction="sum") for x in (trunk, tooth))
    loss, want = plain_run(deep, trunk, of_both)
    assert worst(want, have) < 1e-9 and float(value) == pytest.approx(loss, rel=1e-12)


TINY = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2)
HEADS = dict(intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
REFUSED = {
    "linear_attention": Qwen3NextConfig(
        **TINY, **HEADS, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]),
    "conv": Lfm2Config(**TINY, **HEADS, layer_types=["conv", "full_attention"]),
    "hybrid": FalconH1Config(**TINY, **HEADS, head_dim=16, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                             mamba_d_state=4),
    "linear_attention (state space)": MambaConfig(**TINY, state_size=4)}


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_with_a_state_are_refused_by_name(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(REFUSED[kind])
    tree = TokenTree.from_sequences([[1, 2, 3], [1, 2, 4]])
    said = (f"{type(model).__name__}: layers of kind {kind.split()[0]} aren't plain attention"
            ".*trees need attention in every layer")
    for call in (lambda: check_model(model), lambda: TreeEngine(model), lambda: tree_logprobs(model, tree)):
        with pytest.raises(ValueError, match=said):
            call()


def test_what_does_not_fit_is_refused():
    model, tree = MODELS["qwen3"], TokenTree.from_sequences([[1, 2], [1, 3]])
    with pytest.raises(ValueError, match="sequence 1: token id 23"):
        tree_logprobs(model, TokenTree.from_sequences([[1], [2, 23]]))
    with pytest.raises(ValueError, match="sequence 0: 300 tokens, the model's limit is 256"):
        TreeEngine(model).forward_backward(TokenTree.from_sequences([np.zeros(300, int)]), lambda e: e.logprob.sum())
    with pytest.raises(ValueError, match="max_tokens"):
        TreeEngine(model, max_tokens=0)
    with pytest.raises(ValueError, match="max_tokens"):
        tree_logprobs(model, tree, max_tokens=0)
    with pytest.raises(ValueError, match="temperature"):
        tree_logprobs(model, tree, 0.0)
    with pytest.raises(ValueError, match="score"):
        TreeEngine(model).forward_backward(tree, lambda e: e.logprob.sum(), score=[True])
    with pytest.raises(ValueError, match="fast"):
        tree_logprobs(model, tree, backend="fast")
    broken = make("qwen3")
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="finite"):
        TreeEngine(broken).forward_backward(tree, lambda e: e.logprob.sum())


def test_the_model_attends_as_before_afterwards():
    model, tree = MODELS["qwen3"], TokenTree.from_sequences([[1, 2], [1, 3]])
    with pytest.raises(RuntimeError, match="stop"):
        def loss(e):
            raise RuntimeError("stop")
        TreeEngine(model).forward_backward(tree, loss)
    assert model.config._attn_implementation == "sdpa"
