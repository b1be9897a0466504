"Objectives on prefix trees against the same on flat batches: values and gradients, on random trees, in packs."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.compute.engine import Edges, TreeEngine
from kat.compute.logprob import flat_logprobs, pad_rows
from kat.learn.objective import CLIPPED, LOSSES, Objective, merge_metrics
from kat.tree.trie import TokenTree

some = settings(max_examples=120, deadline=None)
T = dict(dtype=torch.float64)


def edges(index, logprob, entropy=None):
    return Edges(index, logprob, entropy, None)


@st.composite
def objectives(draw, **fixed):
    loss = fixed.get("loss") or draw(st.sampled_from(sorted(LOSSES)))
    token = LOSSES[loss].unit == "token"
    how = draw(st.sampled_from(["token", "sequence", "turn", "constant"]))
    fix = draw(st.sampled_from([{}, {"tis": 1.2}, {"mis": (0.8, 1.3)}]))
    coarse = draw(st.sampled_from([None, "turn", "sequence"])) if token else None
    kl, entropy = draw(st.sampled_from([0, 0.3])), draw(st.sampled_from([0, 0.2]))
    units = ["token", "turn", "sequence"]
    if draw(st.booleans()):
        fix = fix | {"mask": (0.9, 1.15), "mask_unit": draw(st.sampled_from(units[units.index(LOSSES[loss].unit):]))}
        if fix["mask_unit"] != "token":
            fix["mask_ratio"] = draw(st.sampled_from([None, "mean", "product"]))
    dual = draw(st.sampled_from([None, 1.2])) if loss in CLIPPED else None
    semantics = fixed.get("semantics") or (draw(st.sampled_from(["branch", "node"])) if token else "branch")
    return Objective(loss, normalise=how, length=7 if how == "constant" else None, kl=kl, entropy=entropy, **fix,
                     correct=coarse if "tis" in fix or "mis" in fix else None, dual_clip=dual,
                     clip_low=draw(st.sampled_from([0.1, 1.0])) if loss != "pg" else None,
                     clip_high=0.15 if loss != "pg" else None, semantics=semantics)


@st.composite
def batches(draw):
    "Sequences over three tokens, some of them prefixes or copies of others, with everything an objective wants."
    seqs = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=5))
    for k in draw(st.lists(st.integers(0, len(seqs) - 1), max_size=2)):       # copies and strict prefixes
        seqs.append(seqs[k][:draw(st.integers(1, len(seqs[k])))])
    masks = [[False] + draw(st.lists(st.booleans(), min_size=len(s) - 1, max_size=len(s) - 1)) for s in seqs]
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    tree = TokenTree.from_sequences(seqs)
    agree = draw(st.sampled_from(["all", "versions", "none"]))                 # do the branches' old log-probs agree?
    tables = -1 + 0.3 * rng.standard_normal((2, len(tree)))
    on_tree = lambda k: tables[0 if agree == "all" else rng.integers(2)][tree.path(k)]
    per = lambda f: [f(k) for k in range(len(seqs))]
    old = per(on_tree if agree != "none" else lambda k: -1 + 0.3 * rng.standard_normal(len(seqs[k])))
    return tree, masks, dict(
        advantages=per(lambda k: rng.choice([-1.5, -0.5, 0, 0.7, 2])), old=old,
        engine=[logps + 0.3 * rng.standard_normal(len(logps)) for logps in old],
        reference=per(lambda k: tables[1][tree.path(k)] if agree == "all" else old[k] + 0.1),
        turns=per(lambda k: np.cumsum(rng.random(len(seqs[k])) < 0.4))), rng


def prepared(o, tree, masks, data):
    "The same objective, flat and on the tree."
    data = data | {"engine": data["engine"] if o.corrected else None, "reference": data["reference"] if o.kl else None}
    shared = [tree.count[tree.path(k)] for k in range(tree.n_sequences)] if o.semantics == "node" else None
    return o.prepare_flat(masks, **data, shared=shared), o.prepare(tree, masks, **data)


def both(o, tree, masks, data, rng):
    "Value and gradients w.r.t. made-up log-probs and entropies of the tokens: flat, and on the tree in random packs."
    flat, on_tree = prepared(o, tree, masks, data)
    table = torch.tensor(-1 + 0.3 * rng.standard_normal(len(tree)), requires_grad=True, **T)
    entropy = torch.tensor(rng.random(len(tree)), requires_grad=True, **T)
    trained = [tree.path(k)[np.array(m)] for k, m in enumerate(masks)]
    a = flat([table[i] for i in trained], [entropy[i] for i in trained])
    order = torch.from_numpy(rng.permutation(len(tree)))
    packs = [order] if on_tree.needs_paths else order.tensor_split(int(rng.integers(1, 4)))
    b = sum(on_tree(edges(i, table[i], entropy[i])) for i in packs)
    for x in (flat, on_tree):
        assert x.metrics == flat.metrics
    assert on_tree.measure(table) == pytest.approx(flat.measure([table[i] for i in trained]))
    nothing = 0 * (table.sum() + entropy.sum())   # so that both always have a gradient
    gradients = lambda total: torch.autograd.grad(total + nothing, (table, entropy), retain_graph=True)
    return (a, *gradients(a)), (b, *gradients(b))


def check(o, batch):
    for x, y in zip(*both(o, *batch)):
        torch.testing.assert_close(x.double(), y.double(), atol=1e-12, rtol=1e-10)


@some
@given(objectives(), batches())
def test_flat_and_tree_agree(o, batch):
    check(o, batch)


@pytest.mark.parametrize("semantics", ["branch", "node"])
@pytest.mark.parametrize("loss", ["pg", "ppo", "cispo"])
@settings(max_examples=15, deadline=None)
@given(batch=batches(), data=st.data())
def test_token_losses_in_both_semantics(loss, semantics, batch, data):
    check(data.draw(objectives(loss=loss, semantics=semantics)), batch)


@pytest.mark.parametrize("loss", ["gspo", "turn_gspo"])
@settings(max_examples=25, deadline=None)
@given(batch=batches(), data=st.data())
def test_losses_over_paths(loss, batch, data):
    check(data.draw(objectives(loss=loss)), batch)


@settings(max_examples=40, deadline=None)
@given(objectives(loss="ppo"), batches())
def test_advantages_may_differ_from_token_to_token(o, batch):
    tree, masks, data, rng = batch
    check(o, (tree, masks, data | {"advantages": [rng.standard_normal(len(m)) for m in masks]}, rng))


@settings(max_examples=40, deadline=None)
@given(objectives(), batches(), batches())
def test_several_trees_with_common_weights_are_one_batch(o, one, two):
    rng = one[3]
    masks, data = one[1] + two[1], {k: [*one[2][k], *two[2][k]] for k in one[2]}
    shared = None
    if o.semantics == "node":
        shared = [t.count[t.path(k)] for t in (one[0], two[0]) for k in range(t.n_sequences)]
    names = ["advantages", "old", "turns"] + ["engine"] * bool(o.corrected) + ["reference"] * bool(o.kl)
    kept = {k: v for k, v in data.items() if k in names}
    flat = o.prepare_flat(masks, **kept, shared=shared)
    weights, rest, total, metrics, new, entropies = o.weights(masks, data["turns"]), 0, 0, [], [], []
    for tree, m, *_ in (one, two):
        part = slice(rest, rest := rest + len(m))
        loss = o.prepare(tree, m, **{k: v[part] for k, v in kept.items()}, weights=weights[part])
        table, h = (torch.tensor(rng.random(len(tree)) - s, **T) for s in (1.5, 0))
        total = total + loss(edges(torch.arange(len(tree)), table, h))
        metrics.append(loss.metrics | loss.measure(table))
        new += [table[tree.path(k)[np.array(x)]] for k, x in enumerate(m)]
        entropies += [h[tree.path(k)[np.array(x)]] for k, x in enumerate(m)]
    torch.testing.assert_close(flat(new, entropies).double(), total, atol=1e-12, rtol=1e-10)
    assert merge_metrics(metrics) == pytest.approx(flat.metrics | flat.measure(new))


# three trajectories: A goes 1 2 3 4, B is a strict prefix of it, C branches off after the second token
SEQUENCES, ADVANTAGES = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 5]], [1.0, -1.0, 2.0]
MASKS = [[0, 1, 1, 1], [0, 0, 1], [0, 1, 1]]
TREE = TokenTree.from_sequences(SEQUENCES)                                     # tokens 1 2 3 4 5
OLD = [[0, -1, -1, -1], [0, -1, -1], [0, -1, -1]]


def value(loss, ratios):  # the loss where every token of the tree has the given ratio to -1
    table = (torch.tensor(ratios, **T).log() - 1).requires_grad_()
    total = loss(edges(torch.arange(5), table, None))
    return total.item(), torch.autograd.grad(total, table)[0].tolist()


def test_the_tree_form_by_hand():
    loss = Objective().prepare(TREE, MASKS, ADVANTAGES, old=OLD)                  # six trained tokens
    t = {k: v.tolist() for k, v in loss.terms.items()}
    assert t["first"] == [0, 0, 1, 2, 3, 4]                                         # the root has no term
    assert t["up"] == pytest.approx([3 / 6, 1 / 6, 1 / 6, 2 / 6]) and t["down"] == pytest.approx([0, -1 / 6, 0, 0])
    assert t["weight"] == pytest.approx([2 / 6, 2 / 6, 1 / 6, 1 / 6])               # B doesn't train token 2
    total, grad = value(loss, [7, 1.1, 1.5, 0.5, 1])
    # token 2: 3 × 1.1; token 3: 1 × 1.28 − 1 × 1.5; token 4: 0.5; token 5: 2 × 1
    assert total == pytest.approx(-(3.3 - 0.22 + 0.5 + 2) / 6)
    assert grad == pytest.approx([0, -3.3 / 6, 1.5 / 6, -0.5 / 6, -2 / 6])       # of token 3 only the bad half is left


def test_node_semantics_by_hand():
    loss = Objective(semantics="node").prepare(TREE, MASKS, ADVANTAGES, old=OLD)  # token 2 is shared by 3, token 3 by 2
    total, grad = value(loss, [7, 1.1, 1.5, 0.5, 1])
    assert total == pytest.approx(-(3.3 / 3 - 0.22 / 2 + 0.5 + 2) / 6)
    assert grad == pytest.approx([0, -1.1 / 6, 0.75 / 6, -0.5 / 6, -2 / 6])


def test_gspo_on_a_tree_by_hand():
    loss = Objective("gspo", clip_low=0.5, clip_high=0.5).prepare(TREE, MASKS, ADVANTAGES, old=OLD)
    assert loss.needs_paths and not loss.terms
    # A: ratios 2, 1, 4: geometric mean 2, clipped at 1.5; B: only token 3: 1; C: 2, 1/2: 1
    total, grad = value(loss, [7, 2, 1, 4, 0.5])
    assert total == pytest.approx(-(1.5 - 1 + 2) / 3)
    # C's two tokens share 2/3, B pushes token 3 down
    assert grad == pytest.approx([0, -1 / 3, 1 / 3, 0, -1 / 3])


def test_branches_written_by_different_versions_are_kept_apart():
    old = [[0, -1, -1, -1], [0, -1, -1 - np.log(2)], [0, -1, -1]]                # B's token 3 was half as likely then
    loss = Objective("ppo").prepare(TREE, MASKS, ADVANTAGES, old=old)
    assert loss.terms["first"].tolist() == [0, 0, 1, 3, 4, 5]
    total, _ = value(loss, [7, 1.1, 1.5, 0.5, 1])                               # its ratio is 3 for B
    assert total == pytest.approx(-(3.3 + 1.28 - 3 + 0.5 + 2) / 6)
    plain = Objective("pg").prepare(TREE, MASKS, ADVANTAGES, old=old)            # knows no ratio: nothing to keep apart
    assert plain.terms["first"].tolist() == [0, 0, 1, 2, 3, 4]


def test_two_numbers_a_token_whatever_the_number_of_trajectories():
    many = TokenTree.from_sequences([[1, 2, 3]] * 500)
    loss = Objective().prepare(many, [[0, 1, 1]] * 500, list(np.linspace(-1, 1, 500)), old=[[0, -1, -1]] * 500)
    assert len(loss.terms["up"]) == 2 and len(loss.edge) == 1000


def test_no_tokens_no_loss():
    loss = Objective().prepare(TREE, [[0] * len(s) for s in SEQUENCES], ADVANTAGES, old=OLD)
    assert value(loss, [1, 2, 3, 4, 5]) == (0, [0] * 5)
    assert value(replace(loss, objective=Objective("gspo")), [1] * 5) == (0, [0] * 5)
    some = Objective().prepare(TREE, MASKS, ADVANTAGES, old=OLD)
    table = torch.zeros(5, requires_grad=True)
    assert some(edges(torch.tensor([0]), table[[0]], None)).requires_grad        # a pack without a loss has a graph


def test_lower_precision_follows_the_log_probs():
    loss = Objective(kl=0.1, entropy=0.1).prepare(TREE, MASKS, ADVANTAGES, old=OLD, reference=OLD)
    table = torch.full((5,), -1.0, requires_grad=True)
    assert loss(edges(torch.arange(5), table, table * 2)).dtype == torch.float32


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match="2 masks, but the tree has 3"):
        Objective().prepare(TREE, MASKS[:2], ADVANTAGES, old=OLD)
    with pytest.raises(ValueError, match="mask of sequence 1: 4 tokens, in the tree it has 3"):
        Objective().prepare(TREE, [MASKS[0]] * 3, ADVANTAGES, old=OLD)
    loss = Objective().prepare(TREE, MASKS, ADVANTAGES, old=OLD)
    with pytest.raises(ValueError, match="4 log-probs, 5 positions"):
        loss(edges(torch.arange(5), torch.zeros(4)))
    bonus = Objective(entropy=0.1).prepare(TREE, MASKS, ADVANTAGES, old=OLD)
    table = torch.zeros(5, requires_grad=True)
    with pytest.raises(ValueError, match="carry no gradient"):
        bonus(edges(torch.arange(5), table, torch.zeros(5)))
    paths = Objective("gspo").prepare(TREE, MASKS, ADVANTAGES, old=OLD)
    with pytest.raises(ValueError, match="whole paths: 2 of 6 trained tokens"):
        paths(edges(torch.tensor([0, 1, 3, 4]), table[[0, 1, 3, 4]], None))


@pytest.mark.parametrize("o", [
    Objective(tis=1.5, kl=0.1, entropy=0.05),
    Objective("cispo", clip_high=0.1, semantics="node"),
    Objective("pg", normalise="turn"),
    Objective("gspo", clip_low=0.1, clip_high=0.1, entropy=0.05),
    Objective("turn_gspo", mis=(0.5, 2.0), kl=0.1, dual_clip=1.5),
    Objective("cispo", clip_low=0.1, tis=1.5, mask=(0.9, 1.2))], ids=lambda o: o.loss)
def test_a_model_gets_the_same_gradient_from_both(o):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64))
    rng = np.random.default_rng(0)
    seqs = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7], [1, 2, 3], [1, 2, 3, 4, 5, 6], [9, 2]]
    masks = [[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1], [0, 0, 1, 1, 0, 1], [0, 1]]
    near = [-2.5 + 0.2 * rng.standard_normal(len(s)) for s in seqs]
    kw = dict(old=near, turns=[np.arange(len(s)) // 3 for s in seqs],
              engine=[x + 0.1 for x in near] if o.corrected else None,
              reference=[x - 0.1 for x in near] if o.kl else None)
    tree, advantages = TokenTree.from_sequences(seqs), [1.0, -1.0, 0.5, -0.5, 2.0]
    loss = o.prepare(tree, masks, advantages, **kw)
    a = TreeEngine(model, max_tokens=3).forward_backward(tree, loss, loss.score, loss.needs_paths).item()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    shared = [tree.count[tree.path(k)] for k in range(5)] if o.semantics == "node" else None
    flat = o.prepare_flat(masks, advantages, **kw, shared=shared)
    ids, m = (pad_rows([np.array(x, t) for x in xs]) for xs, t in ((seqs, np.int64), (masks, bool)))
    value = flat(*(x.split(flat.counts.tolist()) for x in flat_logprobs(model, ids, m)))
    value.backward()
    assert a == pytest.approx(value.item(), rel=1e-5)
    for p, g in zip(model.parameters(), grads):
        torch.testing.assert_close(g, p.grad, atol=1e-6, rtol=1e-4)
