"Pruning: the budget, closure, slow twins, and estimators against the enumeration of every outcome."
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from kat.core.types import Segment, Trajectory
from kat.tree.prune import (CORRECTIONS, POLICIES, SCORED, Pruning, _blocks, gradient_fidelity, importance,
                            least_budget, prune, subtree)
from kat.tree.trie import TokenTree
from kat.tree.units import TokenFacts, cut_units, kept_with, token_facts

few, some = settings(max_examples=60, deadline=None), settings(max_examples=150, deadline=None)


@st.composite
def facts(draw, longest=9, most=6):
    "A small tree (several roots, duplicates, strict prefixes) with everything known about its tokens."
    sequences = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=longest), min_size=1, max_size=most))
    tree = TokenTree.from_sequences(sequences)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = len(tree)
    flags = lambda: rng.random(n) < draw(st.sampled_from([0.0, 0.3, 0.7]))
    trainable = rng.random(n) < draw(st.sampled_from([0.4, 0.8, 1.0]))
    weight = rng.normal(size=n) * (rng.random(n) < 0.9)
    cost = draw(st.sampled_from([None, rng.random(n) + 0.01, 1 + 0.5 * tree.position]))
    assume((trainable & (tree.prev >= 0) & (weight != 0)).any())
    entropy, logprob = np.round(rng.exponential(size=n), 1), -rng.exponential(size=n)
    return TokenFacts(tree, trainable, entropy, weight, logprob, cost, cuts=flags(), event=flags())


@st.composite
def options(draw, policies=POLICIES, corrections=("none", "reweight")):
    policy = draw(st.sampled_from(policies))
    values = dict(pool=st.sampled_from(["sum", "mean"]), gamma=st.sampled_from([0.0, 0.5, 1.0]),
                  alpha=st.sampled_from([0.0, 0.5, 1.0]), by_advantage=st.booleans(),
                  event_factor=st.sampled_from([0.5, 1.0, 3.0]))
    read = {k: draw(values[k]) for k in SCORED.get(policy, ())}
    return Pruning(policy, **read, results=draw(st.booleans()), window=draw(st.integers(0, 4)),
                   correction=draw(st.sampled_from(corrections)))


def closed(tree, kept):
    return not (kept & (tree.prev >= 0) & ~kept[tree.prev]).any()


def same(a, b):
    for f in ("ids", "position", "end", "prev", "node", "count", "paths", "offsets"):
        np.testing.assert_array_equal(getattr(a, f), getattr(b, f), err_msg=f)


@some
@given(facts(), options(), st.floats(0, 1), st.integers(0, 9))
def test_budget_closure_and_something_to_train(f, how, x, seed):
    least, total = least_budget(f, how), f.cost.sum()
    cut = prune(f, least + x * (total - least), how, seed)
    assert cut.cost <= cut.budget and cut.cost == pytest.approx(f.cost[cut.kept].sum())
    assert closed(f.tree, cut.kept) and (f.mass[cut.kept] > 0).any()
    assert ((cut.factor > 0) == cut.kept).all()
    if how.correction == "none":
        assert set(cut.factor[cut.kept]) == {1.0}
    else:
        assert np.isclose((cut.factor * f.mass).sum(), f.mass.sum())
        assert len(set(cut.factor[cut.kept])) == 1
    assert all(0 <= v <= 1 for v in cut.metrics.values())
    with pytest.raises(ValueError, match=r"the cheapest unit with a loss term costs"):
        prune(f, least * (1 - 1e-6), how)


@few
@given(facts(), options(), st.floats(0, 1))
def test_the_pruned_tree_is_the_tree_of_the_cut_sequences(f, how, x):
    least = least_budget(f, how)
    cut = prune(f, least + x * (f.cost.sum() - least), how)
    old, new = f.tree, cut.tree
    parts = [old.ids[[t for t in old.path(k) if cut.kept[t]]] for k in range(old.n_sequences)]
    assert [len(p) for p in parts] == np.diff(new.offsets).tolist()
    for k, p in enumerate(parts):
        np.testing.assert_array_equal(new.ids[new.path(k)], p)
        np.testing.assert_array_equal(cut.index[new.path(k)], old.path(k)[:len(p)])
    np.testing.assert_array_equal(new.ids, old.ids[cut.index])
    there = [p for p in parts if len(p)]
    again = TokenTree.from_sequences(there)
    arrays = [getattr(new, name) for name in ("ids", "position", "end", "prev", "node", "count", "paths")]
    same(again, TokenTree(*arrays, again.offsets))


@few
@given(facts(), options(corrections=CORRECTIONS[:2]), st.integers(0, 9))
def test_the_whole_budget_keeps_the_whole(f, how, seed):
    cut = prune(f, float(f.cost.sum()), how, seed)
    assert cut.kept.all() and (cut.factor == 1).all()
    same(cut.tree, f.tree)
    assert set(cut.metrics.values()) == {1.0}


@few
@given(facts(), options(tuple(SCORED), ["horvitz_thompson"]))
def test_the_whole_budget_draws_the_whole(f, how):
    cut = prune(f, float(f.cost.sum()), how)
    assert cut.kept.all() and (cut.factor == 1).all() and cut.metrics["relative_variance"] == 0


def slow_keepers(f, units, results, window):
    "For each token, the highest unit that covers it: one look at every unit above."
    tree, of, out = f.tree, units.of, []
    scored = [f.scored[a:b].any() for a, b in zip(units.start, units.stop)]
    def owner(u):  # the unit that an event unit goes with, else itself
        while results and f.event[units.start[u]] and units.parent[u] >= 0:
            u = units.parent[u]
        return u
    for t in range(len(tree)):
        path = [t]
        while tree.prev[path[-1]] >= 0:
            path.append(int(tree.prev[path[-1]]))
        best = owner(of[t])
        for a in {of[p] for p in path} - {of[t]}:
            # the end of the unit and its results on this path
            end = max(tree.position[p] for p in path if a in (of[p], owner(of[p])))
            if scored[a] and tree.position[t] - end <= window:
                best = min(best, a)
        out.append(best)
    return np.array(out)


@some
@given(facts(longest=12), st.booleans(), st.integers(0, 5))
def test_keepers_against_the_slow_twin(f, results, window):
    units = cut_units(f)
    keepers = kept_with(f, units, results, window)
    np.testing.assert_array_equal(keepers, slow_keepers(f, units, results, window))
    prev = f.tree.prev
    assert (keepers <= units.of).all()
    assert (keepers[prev[prev >= 0]] <= keepers[prev >= 0]).all()  # never rising along a path


@few
@given(facts())
def test_units_are_whole_and_of_one_kind(f):
    u = cut_units(f)
    assert u.start[0] == 0 and u.stop[-1] == len(f.tree) and (u.start[1:] == u.stop[:-1]).all()
    for i in range(len(u)):
        t = np.arange(u.start[i], u.stop[i])
        assert (u.of[t] == i).all() and (f.tree.prev[t[1:]] == t[:-1]).all() and not f.cuts[t[1:]].any()
        for x in (f.trainable, f.event, f.tree.node):
            assert len(set(x[t])) == 1
        assert u.parent[i] == (u.of[f.tree.prev[t[0]]] if f.tree.prev[t[0]] >= 0 else -1) and u.parent[i] < i


@few
@given(facts(), options(("entropy", "advantage")))
def test_importance_by_its_formula(f, how):
    tree, u = f.tree, cut_units(f)
    weighted = how.by_advantage or how.policy == "advantage"
    def signal(t):
        visit = abs(f.weight[t]) / tree.count[t] if weighted else 1
        return (f.entropy[t] if how.policy == "entropy" else 1) * visit
    def h(n):
        s = [signal(t) for t in range(u.start[n], u.stop[n]) if f.scored[t]]
        return (sum(s) if how.pool == "sum" else np.mean(s)) if s else 0
    def S(n):
        children = [c for c in range(len(u)) if u.parent[c] == n]
        below = sum(tree.count[u.start[c]] / tree.count[u.start[n]] * S(c) for c in children)
        return h(n) + how.gamma * below
    def reach(n):
        chance, m = 1, n
        while m >= 0:
            t = u.start[m]
            if f.scored[t] and sum(tree.prev == tree.prev[t]) > 1:
                chance *= np.exp(f.logprob[t])
            m = u.parent[m]
        return (tree.count[u.start[n]] / tree.n_sequences) ** (1 - how.alpha) * chance ** how.alpha
    np.testing.assert_allclose(importance(f, u, how), [reach(n) * S(n) for n in range(len(u))], rtol=1e-9, atol=1e-12)


@few
@given(facts(), st.booleans(), st.integers(0, 3))
def test_gradient_mass_of_what_is_kept_together(f, results, window):
    u, how = cut_units(f), Pruning(results=results, window=window)
    keeper, want = kept_with(f, u, results, window), [0.0] * len(u)
    for t in range(len(f.tree)):
        if f.trainable[t] and f.tree.prev[t] >= 0:
            want[keeper[t]] += abs(f.weight[t]) * (1 - np.exp(f.logprob[t]))
    np.testing.assert_allclose(importance(f, u, how), want, atol=1e-12)


def closed_sets(parent, root=None):
    "All sets of units closed under ancestors; with a root, those inside its subtree that hold it."
    U = len(parent)
    def inside(u):
        while u >= 0:
            if u == root: return True
            u = parent[u]
        return False
    free = [u for u in range(U) if root is None or (inside(u) and u != root)]
    for bits in product([False, True], repeat=len(free)):
        chosen = {u for u, b in zip(free, bits) if b} | ({root} if root is not None else set())
        if all(u == root or parent[u] in chosen or (root is None and parent[u] < 0) for u in chosen):
            yield sorted(chosen)


nodes = st.tuples(st.integers(0, 10), st.integers(0, 5), st.sampled_from([0, 1, 2, 3]))  # parent, value, cost
forests = st.lists(nodes, min_size=1, max_size=8)


def forest(rows):
    "Parents before children, values, costs (a root costs something)."
    parent = np.array([p % (i + 1) - 1 for i, (p, _, _) in enumerate(rows)])
    cost = np.array([float(c) if p >= 0 else max(c, 1.0) for p, (_, _, c) in zip(parent, rows)])
    return parent, np.where(cost > 0, [float(v) for _, v, _ in rows], 0), cost


@few
@given(forests)
def test_density_is_that_of_the_best_subtree(rows):
    parent, value, cost = forest(rows)
    start, final = _blocks(parent, value, cost)
    for u in range(len(parent)):
        if cost[u] == 0:
            assert start[u] == np.inf
            continue
        best = max(value[s].sum() / cost[s].sum() for s in closed_sets(parent, u))
        assert start[u] == pytest.approx(best)
    below = parent >= 0
    assert (final[below] <= final[parent[below]] + 1e-12).all()
    sets = [np.array(c, int) for c in closed_sets(parent)]
    for d in set(final):  # down to any final density: the best closed set for its cost
        mine = final >= d
        assert value[mine].sum() >= max(value[c].sum() for c in sets if cost[c].sum() <= cost[mine].sum()) - 1e-9


@few
@given(facts(longest=6, most=4), options(tuple(SCORED), ["horvitz_thompson"]), st.floats(0, 1), st.integers(0, 99))
def test_inclusion_probabilities_are_the_best_ones(f, how, x, seed):
    least, total = least_budget(f, how), f.cost.sum()
    cut = prune(f, least + x * (total - least), how)
    p, s = cut.probability, cut.bundles
    parent, live = s.units.parent, p > 0
    below = (parent >= 0) & live
    assert (p[below] <= p[parent[below]] + 1e-12).all() and (p[live] >= how.floor - 1e-12).all() and (p <= 1).all()
    assert (s.trained <= live).all()  # a unit with a loss term can always be drawn
    assert s.cost @ p <= cut.budget * (1 + 1e-9)
    v = np.where(live, s.score, 0) ** 2 * (s.cost > 0)
    spread = lambda q: (v[live] / q[live]).sum()
    # another choice of the same cost or less
    other = np.where(live, np.random.default_rng(seed).uniform(how.floor, 1, len(p)), 0)
    for u in range(len(p)):
        if parent[u] >= 0:
            other[u] = min(other[u], other[parent[u]])
    mixed = lambda a: np.where(live, how.floor + a * (other - how.floor), 0)
    low, high = s.cost @ mixed(0), s.cost @ mixed(1)
    part = 1.0 if s.cost @ other <= cut.budget else (cut.budget - low) / (high - low)
    assert spread(p) <= spread(mixed(max(part, 0))) * (1 + 1e-6) + 1e-12


def outcomes(parent, p):
    "Every set of units that can be drawn, with its probability."
    before = np.where(parent >= 0, p[parent], 1.0)
    rho = np.divide(p, before, out=np.zeros(len(p)), where=before > 0)
    for chosen in closed_sets(parent):
        chance = 1.0
        for u in range(len(parent)):
            if u in chosen:
                chance *= rho[u]
            elif parent[u] < 0 or parent[u] in chosen:
                chance *= 1 - rho[u]
        if chance > 0:
            yield chosen, chance


@few
@given(facts(longest=5, most=3), options(tuple(SCORED), ["horvitz_thompson"]), st.floats(0, 1), st.integers(0, 99))
def test_horvitz_thompson_over_every_outcome(f, how, x, seed):
    least, total = least_budget(f, how), f.cost.sum()
    cut = prune(f, least + x * (total - least), how)
    p, s = cut.probability, cut.bundles
    assume(len(p) <= 9)
    terms = np.random.default_rng(seed).normal(size=(len(f.tree), 2)) * (f.mass > 0)[:, None]
    chance, mean, square, cost, cost2 = 0.0, 0.0, 0.0, 0.0, 0.0
    for chosen, q in outcomes(s.units.parent, p):
        kept = s.mask(chosen)
        assert closed(f.tree, kept)
        got = (terms[kept] / p[s.keeper[kept], None]).sum(0)
        chance, mean, square = chance + q, mean + q * got, square + q * ((got - terms.sum(0)) ** 2).sum()
        cost, cost2 = cost + q * f.cost[kept].sum(), cost2 + q * f.cost[kept].sum() ** 2
    assert chance == pytest.approx(1)
    np.testing.assert_allclose(mean, terms.sum(0), atol=1e-9)  # unbiased
    assert cut.variance(terms) == pytest.approx(square, abs=1e-9)
    assert cut.metrics["expected_cost"] == pytest.approx(cost) and cost <= cut.budget * (1 + 1e-9)
    assert cut.metrics["cost_std"] == pytest.approx(max(cost2 - cost**2, 0) ** 0.5, abs=1e-6)


def agent_tree(K=6, turns=4):
    "Prompt, then calls of three tokens with results of two; rollouts part ways one after the other."
    rng = np.random.default_rng(1)
    common = rng.integers(0, 9, 4 + 5 * turns)
    own = lambda k: 10 + rng.integers(0, 9, 5 * max(turns - k, 0))
    rows = [np.concatenate([common[:4 + 5 * min(k, turns)], own(k)]) for k in range(K)]
    tree = TokenTree.from_sequences(rows)
    inside = (tree.position - 4) % 5
    later = tree.position >= 4
    entropy, weight = rng.exponential(size=len(tree)), rng.normal(size=len(tree))
    return TokenFacts(tree, later & (inside < 3), entropy, weight, cuts=later & (inside % 3 == 0),
                      event=later & (inside >= 3))


def test_draws_follow_the_probabilities():
    f, how, n = agent_tree(), Pruning("entropy", correction="horvitz_thompson", window=0), 1500
    cuts = [prune(f, 0.5 * f.cost.sum(), how, seed) for seed in range(n)]
    p = cuts[0].probability[cuts[0].bundles.keeper]
    assert cuts[0].metrics["expected_cost"] == pytest.approx(0.5 * f.cost.sum())
    rate = np.mean([c.kept for c in cuts], axis=0)
    assert (abs(rate - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-12).all()
    for c in cuts[:50]:
        assert closed(f.tree, c.kept)
        np.testing.assert_allclose(c.factor[c.kept], 1 / p[c.kept])
    total = np.array([(c.factor * f.weight).sum() for c in cuts])
    sd = cuts[0].variance(f.weight) ** 0.5
    assert abs(total.mean() - f.weight.sum()) <= 5 * sd / n**0.5 and total.std() == pytest.approx(sd, rel=0.1)


def test_the_same_seed_draws_the_same():
    f = agent_tree()
    for how in (Pruning("random"), Pruning("entropy", correction="horvitz_thompson")):
        a, b = (prune(f, 40, how, 3).kept for _ in range(2))
        assert (a == b).all() and any((prune(f, 40, how, s).kept != a).any() for s in range(9))


def test_the_budget_holds_to_the_last_bit():
    tree = TokenTree.from_sequences([range(6)])
    f = TokenFacts(tree, tree.position > 0, cost=np.full(6, 0.1), cuts=np.ones(6, bool))
    cut = prune(f, 0.3, Pruning("depth_first", window=0))
    assert 0.1 + 0.1 + 0.1 > 0.3 and len(cut.index) == 2 and cut.cost <= 0.3


def tokens(cut):
    return cut.facts.tree.ids[cut.index].tolist()


def test_the_orders_by_hand():
    #   0 ─ 1 ┬ 2 ─ 3 ─ 4
    #         ├ 5
    #         └ 6 ─ 7
    tree = TokenTree.from_sequences([[0, 1, 2, 3, 4], [0, 1, 5], [0, 1, 6, 7]])
    n = len(tree)
    f = TokenFacts(tree, np.ones(n, bool), entropy=[0, 0, 1, 1, 1, 2, 9, 2], weight=[0, 1, 1, 1, 1, 9, 1, 1],
                   cuts=np.ones(n, bool))
    kept = lambda policy, budget, **how: tokens(prune(f, budget, Pruning(policy, window=0, **how)))
    assert kept("depth_first", 4) == [0, 1, 2, 3]
    assert kept("breadth_first", 5) == [0, 1, 2, 5, 6]
    assert kept("longest_path", 5) == [0, 1, 2, 3, 4] and kept("longest_path", 6) == [0, 1, 2, 3, 4, 6]
    assert kept("entropy", 3) == [0, 1, 6] and kept("entropy", 5) == [0, 1, 5, 6, 7]
    assert kept("advantage", 3) == [0, 1, 5]
    assert kept("density", 3) == [0, 1, 6]


def test_gradients_compete_by_their_squares():
    # (1 - p) |weight|: behind 1 two units of 2 (4 for a cost of 3), behind 4 one of 2.5 (for a cost of 2)
    tree = TokenTree.from_sequences([[0, 1, 2, 3], [0, 4, 5, 6]])
    mass = {2: 2.0, 3: 2.0, 5: 2.5}
    p = np.array([0.5 if i in mass else 1.0 for i in tree.ids])
    every, weight = np.ones(7, bool), [2 * mass.get(int(i), 1.0) for i in tree.ids]
    f = TokenFacts(tree, every, weight=weight, logprob=np.log(p), cuts=every)
    assert tokens(prune(f, 3, Pruning(window=0))) == [0, 4, 5]
    sums = TokenFacts(tree, every, entropy=[mass.get(int(i), 0.0) for i in tree.ids], cuts=every)
    assert tokens(prune(sums, 3, Pruning("density", window=0))) == [0, 1, 2]
    # nothing to learn: still within the budget, and something is trained
    sure = TokenFacts(tree, every, logprob=np.zeros(7), cuts=every)
    assert len(prune(sure, 4, Pruning(window=0)).index) == 4


def test_density_looks_behind_what_costs():
    #  a costly, empty unit (5) hides a rich one; a discount of 0 stays with the cheap and poor
    tree = TokenTree.from_sequences([[0, 1, 2], [0, 3, 4], [0, 3, 5]])
    order = {int(i): t for t, i in enumerate(tree.ids)}
    entropy, cost = np.zeros(6), np.ones(6)
    for i, h in {1: 0.5, 2: 0.5, 4: 9, 5: 9}.items():
        entropy[order[i]] = h
    cost[order[3]] = 2
    f = TokenFacts(tree, np.ones(6, bool), entropy, cost=cost, cuts=np.ones(6, bool))
    assert tokens(prune(f, 4, Pruning("entropy", gamma=0.0, window=0))) == [0, 1, 2]
    assert tokens(prune(f, 4, Pruning("density", window=0))) == [0, 3, 4]


def call_tree():
    "A prompt and two calls: 1 is answered by 2 2 and 3 (two results), 4 by nothing."
    tree = TokenTree.from_sequences([[0, 1, 2, 2, 3, 5], [0, 4, 5]])
    ids = tree.ids
    return TokenFacts(tree, np.isin(ids, [1, 4, 5]), np.where(ids == 1, 1.0, 1.5),
                      cuts=(ids == 3) | (ids == 5), event=np.isin(ids, [2, 3]))


def test_results_stay_with_their_call():
    f, how = call_tree(), Pruning("entropy", gamma=0.0, window=0, event_factor=1000.0)
    assert tokens(prune(f, 5, how)) == [0, 1, 2, 2, 3]
    assert tokens(prune(f, 4, how)) == [0, 4, 5]  # the call does not fit with its results
    assert tokens(prune(f, 2, Pruning("depth_first", window=0, results=False))) == [0, 1]
    with pytest.raises(ValueError, match="budget 1: .* costs 2 "):
        prune(f, 1, Pruning("entropy", window=0))


def test_events_gain_priority():
    f = call_tree()
    assert tokens(prune(f, 5, Pruning("entropy", gamma=0.0, window=0))) == [0, 4, 5]
    assert tokens(prune(f, 5, Pruning("entropy", gamma=0.0, window=0, event_factor=100.0))) == [0, 1, 2, 2, 3]


def test_a_window_follows_a_decision_and_its_results():
    f = call_tree()
    assert tokens(prune(f, 6, Pruning("entropy", gamma=0.0, window=1, event_factor=100.0))) == [0, 1, 2, 2, 3, 5]
    assert tokens(prune(f, 3, Pruning("breadth_first", window=1))) == [0, 4, 5]
    with pytest.raises(ValueError, match=r"costs 3 with .* whole tree 8"):
        prune(f, 2, Pruning("entropy", window=1))


def test_something_is_trained_where_a_policy_would_buy_context_only():
    # two contexts of 5 and 3 tokens come first, and then the money is gone
    tree = TokenTree.from_sequences([[0] * 5 + [9] * 6, [1] * 3 + [9] * 3])
    f = TokenFacts(tree, tree.ids == 9)
    how = Pruning("breadth_first")
    assert least_budget(f, how) == 6
    assert tokens(prune(f, 8, how)) == [1, 1, 1, 9, 9, 9]


def test_deep_chains_and_many_nodes():
    n = 5000
    chain = TokenTree.from_sequences([np.arange(k) % 7 for k in range(n, 0, -10)])  # strict prefixes of each other
    rng = np.random.default_rng(0)
    star = TokenTree.from_sequences([[0, i, j] for i in range(3333) for j in range(2)])
    assert len(star) > 10_000 - 2 and star.n_nodes > 9_900
    for tree, cuts in ((chain, np.ones(n, bool)), (star, None)):
        size = len(tree)
        entropy, weight, logprob = rng.exponential(size=size), rng.normal(size=size), -rng.exponential(size=size)
        f = TokenFacts(tree, tree.position > 0, entropy, weight, logprob, cuts=cuts)
        ways = [*map(Pruning, POLICIES), Pruning(correction="horvitz_thompson"), Pruning(window=8),
                Pruning("entropy", alpha=0.5)]
        for how in ways:
            cut = prune(f, 0.4 * len(tree), how)
            assert closed(tree, cut.kept)
            if how.correction == "none":
                assert 0.39 * len(tree) <= cut.cost <= cut.budget


def make(**changes):
    tree = TokenTree.from_sequences([[0, 1, 2], [0, 1, 3]])
    good = dict(trainable=np.array([False, True, True, True]), entropy=[0, 1.0, 1, 1], weight=[0, 1.0, 1, -1])
    return TokenFacts(tree, **(good | changes))


@pytest.mark.parametrize("changes, message", [
    (dict(trainable=np.ones(3, bool)), r"trainable: 4 values expected, one per token of the tree, got shape \(3,\)"),
    (dict(trainable=np.ones(4)), "trainable: True or False expected for each token, got dtype float64"),
    (dict(cuts=[0, 1, 0, 0]), "cuts: True or False"),
    (dict(event=np.zeros((4, 1), bool)), "event: 4 values expected"),
    (dict(entropy=[0, 1, 1]), "entropy: 4 values expected"),
    (dict(entropy=[0, 1, np.nan, 1]), "entropy: nan at token 2; .*record it, or set `trainable` to False there"),
    (dict(entropy=[0, -1, 1, 1]), "entropy: -1.0 at token 1; a finite number from -0.001 expected"),
    (dict(weight=[0, 1, np.inf, 1]), "weight: inf at token 2"),
    (dict(weight=["a"] * 4), "weight: numbers expected"),
    (dict(logprob=[0, 1, -np.inf, 1]), "logprob: -inf at token 2"),
    (dict(cost=[1, 1, 0, 1]), "cost: 0.0 at token 2; .*every token costs something"),
    (dict(trainable=np.zeros(4, bool)), "no token has a loss term"),
    (dict(weight=np.zeros(4)), "no token has a loss term: there is nothing to train, drop the tree"),
])
def test_bad_facts_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_numbers_are_read_at_trained_tokens_only():
    f = make(entropy=[np.nan, 1, 1, 1], weight=[np.nan, 1, 1, 1])
    assert f.entropy[0] == f.weight[0] == 0
    root = make(trainable=np.ones(4, bool), entropy=[np.nan, 1, 1, 1])  # nothing predicts the first token
    assert root.scored.tolist() == [False, True, True, True]


@pytest.mark.parametrize("changes, message", [
    (dict(policy="best"), "policy: 'best'; one of gradient, entropy, density, advantage, random"),
    (dict(correction="ht"), "correction: 'ht'; one of none, reweight, horvitz_thompson"),
    (dict(pool="max"), "pool: 'max'; one of sum, mean"),
    (dict(gamma=1.5), "gamma: 1.5; a number from 0 to 1"),
    (dict(alpha="0"), "alpha: '0'; a number"),
    (dict(by_advantage=1), "by_advantage: 1; True or False"),
    (dict(window=-1), "window: -1; a whole number"),
    (dict(window=1.0), "window: 1.0; a whole number"),
    (dict(event_factor=0), "event_factor: 0; a number"),
    (dict(correction="horvitz_thompson", floor=0), "floor: 0; a number"),
    (dict(policy="random", gamma=0.9), "gamma: not read by policy 'random'"),
    (dict(policy="density", pool="mean"), "pool: not read by policy 'density'"),
    (dict(policy="advantage", by_advantage=True), "by_advantage: not read by policy 'advantage'"),
    (dict(floor=0.1), "floor: not read .* correction 'none'"),
    (dict(policy="longest_path", correction="horvitz_thompson"),
     "needs importances, policy 'longest_path' has none: take one of gradient, entropy"),
])
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**changes)
    with pytest.raises(TypeError):
        Pruning(lookahead=2)


@pytest.mark.parametrize("facts, budget, how, message", [
    ({}, 3, {}, "logprob: missing, and policy 'gradient' scores by it"),
    (dict(entropy=None), 3, dict(policy="entropy"), "entropy: missing, and policy 'entropy' scores by it"),
    (dict(weight=None), 3, dict(policy="advantage"), "weight: missing"),
    (dict(weight=None), 3, dict(policy="entropy", by_advantage=True), "weight: missing, and the advantage"),
    ({}, 3, dict(policy="entropy", alpha=0.5), "logprob: missing, and alpha 0.5 needs it"),
    ({}, 0, {}, "budget: 0; a positive number"),
    ({}, True, {}, "budget: True"),
    ({}, np.nan, {}, "budget: nan"),
    ({}, 1, dict(policy="entropy"), "budget 1: .* the whole tree 4: raise the budget"),
    ({}, 0.1, dict(policy="entropy", correction="horvitz_thompson"),
     "budget 0.1: .* raise the budget or lower `floor`"),
])
def test_what_cannot_be_pruned_is_said(facts, budget, how, message):
    with pytest.raises(ValueError, match=message):
        prune(make(**facts), budget, Pruning(**how))


def test_policies_without_scores_need_no_entropy():
    f = make(entropy=None, weight=None)
    for p in POLICIES[len(SCORED):]:
        cut = prune(f, 3, Pruning(p, window=0))
        assert len(cut.index) == 3 and "kept_entropy" not in cut.metrics


def test_an_empty_draw_says_so():
    f, how = make(), Pruning("entropy", correction="horvitz_thompson")
    draws = (prune(f, 1, how, seed) for seed in range(99))
    cut = next(draw for draw in draws if not draw.kept.any())
    assert cut.cost == 0 and not cut.factor.any() and len(cut.index) == 0
    with pytest.raises(ValueError, match="no token is kept"):
        cut.tree
    with pytest.raises(ValueError, match="variance: nothing was drawn"):
        prune(f, 4, Pruning("entropy")).variance(f.weight)
    with pytest.raises(ValueError, match="terms: 4 rows expected"):
        cut.variance(np.ones(3))
    with pytest.raises(ValueError, match="token 2 is kept without token 1"):
        subtree(f.tree, np.array([True, False, True, False]))


def test_zero_entropy_everywhere_is_drawn_at_the_floor():
    f = make(entropy=np.zeros(4))
    cut = prune(f, 3, Pruning("entropy", correction="horvitz_thompson"))
    assert (cut.probability[cut.bundles.keeper] == 0.05).all()
    assert prune(f, 3, Pruning("entropy", window=0)).cost == 3


def trajectories():
    shared = [Segment([1, 2], "user"), Segment([3, 4], "tool_call", 0, True, [-0.1, -0.2], [0.3, 0.4])]
    failed = [Segment([5, 6], "tool_result", 0, event="error"), Segment([7], "assistant", 1, True, [-0.5], [0.6])]
    noted = [Segment([5, 8], "tool_result", 0, event="tool"), Segment([9], "assistant", 1, False, event="memory")]
    return [Trajectory("t", shared + rest) for rest in (failed, noted)]


def test_facts_of_trajectories():
    ts = trajectories()
    tree = TokenTree.from_sequences([t.ids for t in ts])
    f = token_facts(tree, ts, weights=[2.0, np.array([0, 0, -3.0, 1, 0, 0, 5])])
    by = {int(i): t for t, i in enumerate(tree.ids)}
    at = lambda x: {i: x[t].item() for i, t in by.items()}
    assert at(f.trainable) == {1: False, 2: False, 3: True, 4: True, 5: False, 6: False, 7: True, 8: False, 9: False}
    assert {i for i, e in at(f.event).items() if e} == {5, 6, 8, 9}
    assert {i for i, c in at(f.cuts).items() if c} == {1, 3, 5, 7, 9}
    w, h = at(f.weight), at(f.entropy)
    assert (w[3], w[4], w[7], w[9]) == (-1.0, 3.0, 2.0, 0.0)  # signs add up; context carries none
    assert [h[i] for i in (3, 4, 7)] == pytest.approx([0.3, 0.4, 0.6]) and f.logprob[by[7]] == -0.5
    assert token_facts(tree, ts).mass[by[3]] == 2
    bare = [Trajectory("t", [Segment(s.ids, s.kind, s.turn, s.trainable) for s in t.segments]) for t in ts]
    assert token_facts(tree, bare).entropy is None and token_facts(tree, bare).logprob is None
    ts[0].segments[3].entropy = None   # one trained token lacks it
    some = token_facts(tree, ts)
    assert some.entropy is None and some.logprob[by[7]] == -0.5 and prune(some, 9).kept.all()
    with pytest.raises(ValueError, match="entropy: missing, .* every trained token"):
        prune(some, 9, Pruning("entropy"))


def test_facts_of_other_trajectories_are_refused():
    ts = trajectories()
    tree = TokenTree.from_sequences([t.ids for t in ts])
    with pytest.raises(ValueError, match="trajectory 0: its ids are not those of the tree's sequence 0"):
        token_facts(tree, ts[::-1])
    with pytest.raises(ValueError, match="1 trajectories and 2 weights for a tree of 2 sequences"):
        token_facts(tree, ts[:1])
    with pytest.raises(ValueError, match=r"weights\[1\]: a number or 7 of them expected, got shape \(2,\)"):
        token_facts(tree, ts, [1, [1, 2]])


def test_fidelity_with_gradients_per_edge():
    f = agent_tree()
    G = np.random.default_rng(2).normal(size=(len(f.tree), 30)) * f.weight[:, None]
    ways = [Pruning("entropy"), Pruning("random"), Pruning("entropy", correction="horvitz_thompson")]
    rows = gradient_fidelity(f, lambda cut: cut.factor @ G, ways, shares=(0.01, 0.5, 1.0), draws=200)
    assert [(r["how"], r["share"]) for r in rows] == [(h, s) for h in ways for s in (0.01, 0.5, 1.0)]
    assert all(np.isnan(r["cosine"]) for r in rows if r["share"] == 0.01)
    for r in rows[2::3]:
        assert r["cosine"] == pytest.approx(1) and r["norm_ratio"] == pytest.approx(1)
        assert [r["error"], r["bias"]] == pytest.approx([0, 0], abs=1e-12)
    best, chance, drawn = rows[1::3]
    cut = prune(f, 0.5 * f.cost.sum(), ways[0])
    g, whole = cut.factor @ G, G.sum(0)
    assert best["cosine"] == pytest.approx(g @ whole / np.linalg.norm(g) / np.linalg.norm(whole))
    assert best["error"] == pytest.approx(best["bias"])
    assert best["error"] == pytest.approx(np.linalg.norm(g - whole) / np.linalg.norm(whole))
    assert best["cost"] == pytest.approx(cut.metrics["kept_cost"])
    ht = prune(f, 0.5 * f.cost.sum(), ways[2])
    assert drawn["error"] == pytest.approx(ht.variance(G) ** 0.5 / np.linalg.norm(whole), rel=0.15)
    # a random choice leans, a draw with weights does not
    assert drawn["bias"] < 3 * drawn["error"] / 200**0.5 and chance["bias"] > 0.2
    with pytest.raises(ValueError, match="gradient: that of the whole tree is 0"):
        gradient_fidelity(f, lambda cut: np.zeros(3), ways)
