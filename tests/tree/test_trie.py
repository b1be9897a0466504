"Token trees against the distinct prefixes they stand for, and losses on them against the flat ones"
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from kat.tree.trie import TokenTree, clip_terms, path_units, tree_weights

few = settings(max_examples=60, deadline=None)
LOW, HIGH = .2, .28


def prefix_twin(sequences):
    "Every array from its meaning: the tokens are the distinct prefixes in sorted order."
    prefixes = sorted({tuple(s[:i + 1]) for s in sequences for i in range(len(s))})
    at = {p: t for t, p in enumerate(prefixes)}
    through = [[k for k, s in enumerate(sequences) if tuple(s[:len(p)]) == p] for p in prefixes]
    prev = [at.get(p[:-1], -1) for p in prefixes]
    new = [b < 0 or through[b] != through[t] for t, b in enumerate(prev)]
    return dict(ids=[p[-1] for p in prefixes], position=[len(p) - 1 for p in prefixes], prev=prev,
                end=[t + sum(q[:len(p)] == p for q in prefixes) for t, p in enumerate(prefixes)],
                node=list(np.cumsum(new) - 1), count=list(map(len, through)),
                paths=[at[tuple(s[:i + 1])] for s in sequences for i in range(len(s))],
                offsets=[0, *np.cumsum(list(map(len, sequences)))])


def branching(ids=2, longest=7):
    "Sequences over few ids, so that they share, repeat and end inside one another."
    return st.lists(st.lists(st.integers(0, ids), min_size=1, max_size=longest), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None)
@given(branching())
def test_arrays_equal_the_slow_twin(sequences):
    tree = TokenTree.from_sequences(sequences)
    for name, slow in prefix_twin(sequences).items():
        assert getattr(tree, name).tolist() == slow, name
    assert (tree.n_sequences, tree.n_flat) == (len(sequences), sum(map(len, sequences)))
    assert tree.ids.dtype == tree.position.dtype == np.int32
    assert {getattr(tree, n).dtype.name for n in ('end', 'prev', 'node', 'count', 'paths', 'offsets')} == {'int64'}


@few
@given(branching())
def test_nodes_mask_edges_and_the_way_back(sequences):
    tree = TokenTree.from_sequences(sequences)
    bounds, parent = tree.node_bounds(), tree.node_parent()
    assert tree.n_nodes == len(bounds) - 1 and bounds[0] == 0 and bounds[-1] == len(tree)
    assert tree.node.tolist() == np.repeat(np.arange(tree.n_nodes), np.diff(bounds)).tolist()
    assert (parent < np.arange(tree.n_nodes)).all() and (parent == -1).sum() == len({s[0] for s in sequences})
    q, k = np.arange(len(tree))[:, None], np.arange(len(tree))
    sees = (k <= q) & (q < tree.end)
    for n, s in enumerate(sequences):
        path = tree.path(n)
        assert tree.ids[path].tolist() == s
        for i, t in enumerate(path):
            assert np.flatnonzero(sees[t]).tolist() == path[:i + 1].tolist()
    pairs = set(zip(*(e.tolist() for e in tree.edges())))
    assert pairs == {(int(a), int(b)) for n in range(len(sequences)) for a, b in zip(tree.path(n), tree.path(n)[1:])}


@few
@given(branching(), st.randoms())
def test_order_of_the_sequences_changes_only_the_paths(sequences, random):
    order = list(range(len(sequences)))
    random.shuffle(order)
    a, b = TokenTree.from_sequences(sequences), TokenTree.from_sequences([sequences[k] for k in order])
    for name in ('ids', 'position', 'end', 'prev', 'node', 'count'):
        assert (getattr(a, name) == getattr(b, name)).all()
    for i, k in enumerate(order):
        assert (b.path(i) == a.path(k)).all()


@few
@given(branching())
def test_scatter_is_the_transpose_of_gather(sequences):
    tree, rng = TokenTree.from_sequences(sequences), np.random.default_rng(0)
    v, u = rng.normal(size=len(tree)), [rng.normal(size=len(s)) for s in sequences]
    assert sum(a @ b for a, b in zip(tree.gather(v), u)) == pytest.approx(v @ tree.scatter_sum(u))
    assert tree.scatter_sum([np.ones(len(s)) for s in sequences]).tolist() == tree.count.tolist()
    x = torch.tensor(v, requires_grad=True)
    sum((a * torch.tensor(b)).sum() for a, b in zip(tree.gather(x), u)).backward()
    np.testing.assert_allclose(x.grad, tree.scatter_sum(u), atol=1e-12)
    assert tree.gather(np.zeros((len(tree), 3)))[0].shape == (len(sequences[0]), 3)


def test_five_thousand_nodes_deep():
    ids = np.random.default_rng(0).integers(0, 9, 5000)
    tree = TokenTree.from_sequences([ids[:i + 1] for i in range(5000)])
    assert (len(tree), tree.n_nodes) == (5000, 5000) and (tree.ids == ids).all() and (tree.end == 5000).all()
    assert tree.count.tolist() == list(range(5000, 0, -1)) and tree.node_parent().tolist() == list(range(-1, 4999))


def test_a_million_tokens():
    rng = np.random.default_rng(0)
    trunk = rng.integers(0, 2**31 - 1, 16_000)
    cut = np.sort(rng.choice(np.arange(1, 16_000), 64, replace=False))
    tree = TokenTree.from_sequences([np.concatenate([trunk[:c], rng.integers(0, 2**31 - 1, 16_000)]) for c in cut])
    assert len(tree) == 64 * 16_000 + cut[-1] and tree.n_nodes == 64 + 63
    through = 64 - np.searchsorted(cut, np.arange(cut[-1]), 'right')
    assert tree.count[tree.path(63)[:cut[-1]]].tolist() == through.tolist()


@pytest.mark.parametrize('sequences, says', [
    ([], 'no sequences'), ([[1], []], 'sequence 1: empty'), ([[1], [2, -3]], 'sequence 1: token id -3 at 1'),
    ([[2**31]], 'sequence 0: token id 2147483648 at 0'), ([[1.5]], 'sequence 0: whole numbers'),
    ([[[1]]], 'sequence 0: one dimension'), ([[1], [True]], 'sequence 1: whole numbers'),
    ([['a']], 'sequence 0: whole numbers')])
def test_bad_sequences_are_named(sequences, says):
    with pytest.raises(ValueError, match=says):
        TokenTree.from_sequences(sequences)


@st.composite
def problems(draw):
    "Sequences with weights (0 at the first token), advantages (a number or one a token) and a random generator."
    sequences = draw(branching())
    weight = st.sampled_from([0, 0, .5, 1., 2.])
    w = [[0, *draw(st.lists(weight, min_size=len(s) - 1, max_size=len(s) - 1))] for s in sequences]
    number = st.floats(-2, 2)
    a = [draw(number | st.lists(number, min_size=len(s), max_size=len(s))) for s in sequences]
    return sequences, w, a, np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def flat_loss(kind, tree, new, old, w, a, semantics, entropy):
    "Each sequence by itself; `old` per sequence."
    total = new.sum() * 0
    for lp, h, lo, w_k, a_k, g in zip(tree.gather(new), tree.gather(entropy), old, w, a, tree.gather(tree.count)):
        w_k = torch.tensor(w_k, dtype=torch.float64) / (torch.tensor(g) if semantics == 'node' else 1)
        a_k, d = torch.tensor(a_k, dtype=torch.float64), lp - torch.as_tensor(lo)
        r = d.exp()
        if kind == 'pg':
            term = -a_k * lp
        else:
            term = -torch.minimum(r * a_k, r.clamp(1 - LOW, 1 + HIGH) * a_k) + .1 * ((-d).exp() - 1 + d) - .01 * h
        total = total + (w_k * term).sum()
    return total


def clipped(terms, ratio):
    "A⁺ min(r, 1 + ε) + A⁻ max(r, 1 − ε)"
    positive, negative = torch.tensor(terms.positive), torch.tensor(terms.negative)
    return positive * ratio.clamp(max=1 + HIGH) + negative * ratio.clamp(min=1 - LOW)


def same_loss_and_gradient(flat, tree, *leaves):
    assert tree.item() == pytest.approx(flat.item(), rel=1e-12, abs=1e-12)
    gradients = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in (flat, tree))
    for want, got in zip(*gradients):
        zero = torch.zeros(1, dtype=torch.float64)
        want = zero.expand_as(got) if want is None else want
        torch.testing.assert_close(zero if got is None else got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('semantics', ['branch', 'node'])
@few
@given(problems())
def test_policy_gradient_on_the_tree_is_the_flat_one(semantics, problem):
    sequences, w, a, rng = problem
    tree = TokenTree.from_sequences(sequences)
    new = torch.tensor(rng.uniform(-3, 0, len(tree)), requires_grad=True)
    m = tree_weights(tree, w, a, semantics)
    assert m.weight.dtype == m.total.dtype == np.float64 and (m.positive >= 0).all() and (m.negative <= 0).all()
    assert (m.weight[tree.prev < 0] == 0).all()
    flat = flat_loss('pg', tree, new, tree.gather(new.detach()), w, a, semantics, new)
    same_loss_and_gradient(flat, -(torch.tensor(m.weight) * new).sum(), new)


@pytest.mark.parametrize('semantics', ['branch', 'node'])
@few
@given(problems())
def test_clipped_loss_with_kl_and_entropy_on_the_tree_is_the_flat_one(semantics, problem):
    sequences, w, a, rng = problem
    tree = TokenTree.from_sequences(sequences)
    new = torch.tensor(rng.uniform(-3, 0, len(tree)), requires_grad=True)
    entropy = torch.tensor(rng.uniform(0, 2, len(tree)), requires_grad=True)
    old = new.detach() + torch.tensor(rng.normal(0, .4, len(tree)))
    m, d = tree_weights(tree, w, a, semantics), new - old
    loss = (-clipped(m, d.exp()) + torch.tensor(m.total) * (.1 * ((-d).exp() - 1 + d) - .01 * entropy)).sum()
    same_loss_and_gradient(flat_loss('ppo', tree, new, tree.gather(old), w, a, semantics, entropy), loss, new, entropy)
    terms = clip_terms(tree, w, a, tree.gather(old.numpy()), semantics)
    assert terms.token.tolist() == np.flatnonzero(m.total > 0).tolist()
    assert (terms.old == old.numpy()[terms.token]).all()
    for name in ('positive', 'negative', 'total', 'weight'):
        np.testing.assert_allclose(getattr(terms, name), getattr(m, name)[terms.token], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('semantics', ['branch', 'node'])
@few
@given(problems(), st.integers(1, 3))
def test_terms_are_kept_apart_where_old_log_probs_differ(semantics, problem, versions):
    sequences, w, a, rng = problem
    tree = TokenTree.from_sequences(sequences)
    new = torch.tensor(rng.uniform(-3, 0, len(tree)), requires_grad=True)
    per_version = new.detach().numpy() + rng.normal(0, .4, (versions, len(tree)))
    version = rng.integers(0, versions, len(sequences))
    old = [per_version[v][tree.path(k)] for k, v in enumerate(version)]
    old = [np.where(np.array(w_k) > 0, o, np.nan) for o, w_k in zip(old, w)]          # unknown where nothing is trained
    terms = clip_terms(tree, w, a, old, semantics)
    distinct = {(t, o) for k in range(len(sequences)) for t, o, x in zip(tree.path(k), old[k], w[k]) if x}
    assert list(zip(terms.token, terms.old)) == sorted(distinct)
    index = torch.tensor(terms.token)
    d = new[index] - torch.tensor(terms.old)
    loss = (-clipped(terms, d.exp()) + torch.tensor(terms.total) * .1 * ((-d).exp() - 1 + d)).sum()
    known = [np.nan_to_num(o, nan=-1.) for o in old]
    same_loss_and_gradient(flat_loss('ppo', tree, new, known, w, a, semantics, 0 * new), loss, new)


@few
@given(problems(), st.floats(.01, 1))
def test_tolerance_moves_no_old_log_prob_by_more_than_half_of_it(problem, tolerance):
    sequences, w, a, rng = problem
    tree = TokenTree.from_sequences(sequences)
    old = [rng.uniform(-2, 0, len(s)) for s in sequences]
    exact, joined = (clip_terms(tree, w, a, old, tolerance=x) for x in (0, tolerance))
    for name in ('positive', 'negative', 'total'):
        sums = (np.bincount(terms.token, getattr(terms, name), len(tree)) for terms in (exact, joined))
        np.testing.assert_allclose(*sums, atol=1e-12)
    for t, o in zip(exact.token, exact.old):
        assert abs(joined.old[joined.token == t] - o).min() <= tolerance / 2 + 1e-12
    wide = clip_terms(tree, w, a, [o - 9 for o in old], tolerance=10.)
    assert len(set(wide.token)) == len(wide.token) == (tree_weights(tree, w, a).total > 0).sum()


@few
@given(problems(), st.booleans())
def test_path_sums_are_those_of_the_sequences(problem, by_turn):
    sequences, w, a, rng = problem
    tree = TokenTree.from_sequences(sequences)
    masks = [np.array(x) > 0 for x in w]
    turns = [np.sort(rng.integers(0, 3, len(s))) for s in sequences]
    x = torch.tensor(rng.normal(size=len(tree)), requires_grad=True)
    units = path_units(tree, masks, turns if by_turn else None)
    want = {}
    for k, (v, m, u) in enumerate(zip(tree.gather(x), masks, turns)):
        for i in np.flatnonzero(m):
            want.setdefault((k, int(u[i]) if by_turn else 0), []).append(v[i])
    assert list(zip(units.sequence, units.turn)) == sorted(want)
    assert units.size.tolist() == [len(want[k]) for k in sorted(want)]
    got, c = units.sum(x), torch.tensor(rng.normal(size=len(want)))
    if not want: return
    flat = torch.stack([torch.stack(want[k]).sum() for k in sorted(want)])
    torch.testing.assert_close(got, flat)
    same_loss_and_gradient((c * flat.exp()).sum(), (c * got.exp()).sum(), x)


TWO = TokenTree.from_sequences([[1, 2, 3], [1, 2]])
W, A, OLD = [[0, 1, 1], [0, 1]], [1, -1], [[0, -1, -1], [0, -1]]
NAN = float('nan')


@pytest.mark.parametrize('call, says', [
    (lambda: TWO.gather(np.zeros(5)), '5 rows for 3 tokens'),
    (lambda: TWO.scatter_sum([[1, 2, 3]]), 'values: 1 given for 2 sequences'),
    (lambda: TWO.scatter_sum([[1, 2, 3], [1]]), r'sequence 1: values of shape \(1,\) for 2 tokens'),
    (lambda: tree_weights(TWO, [[0, 1, 1], [0, 1, 1]], A), 'sequence 1: weights of shape'),
    (lambda: tree_weights(TWO, [[0, 1, 1], [0, NAN]], A), 'sequence 1: weight nan at token 1'),
    (lambda: tree_weights(TWO, [[0, 1, -2], [0, 1]], A), 'sequence 0: weight -2 at token 2'),
    (lambda: tree_weights(TWO, [[0, 1, 1], [1, 1]], A), 'sequence 1: weight 1 at its first token.*set it to 0'),
    (lambda: tree_weights(TWO, W, [1]), 'advantages: 1 given for 2'),
    (lambda: tree_weights(TWO, W, [1, [1]]), 'sequence 1: advantages of shape'),
    (lambda: tree_weights(TWO, W, [1, NAN]), 'sequence 1: advantage nan at token 0: give 0'),
    (lambda: tree_weights(TWO, W, A, 'both'), "semantics 'both': 'branch' or 'node'"),
    (lambda: clip_terms(TWO, W, A, [[0, -1, NAN], [0, -1]]),
     'sequence 0: old log-prob nan at token 2.*set its weight to 0'),
    (lambda: clip_terms(TWO, W, A, [[0, -1, -1], [0]]), 'sequence 1: old log-probs of shape'),
    (lambda: clip_terms(TWO, W, A, OLD, tolerance=NAN), 'tolerance nan'),
    (lambda: clip_terms(TWO, W, A, OLD, tolerance=-1), 'tolerance -1'),
    (lambda: path_units(TWO, [[1, 1, 1], [0, 1]]), 'sequence 0: its first token counts'),
    (lambda: path_units(TWO, [[0, 1, 1], [0, 1]], [[0, 1, 1], [0, -1]]), 'sequence 1: turn -1'),
    (lambda: path_units(TWO, [[0, 1, 1]]), 'masks: 1 given'),
])
def test_what_does_not_fit_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_nothing_trained_is_no_error():
    none = [[0, 0, 0], [0, 0]]
    assert not tree_weights(TWO, none, A).total.any() and len(clip_terms(TWO, none, A, OLD).token) == 0
    assert path_units(TWO, none).sum(torch.zeros(3)).shape == (0,)
