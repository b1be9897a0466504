"A session counts once: its reward in the baseline, its weight over its leaves; the same from memory and from files."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rl_world import all_gradients, episode, groups, score, tiny, trainer

from kat.compute.engine import Edges
from kat.core.io import read_records, write_records
from kat.core.types import Group, Segment, Trajectory
from kat.learn.advantage import deviation, group_advantages, session_rewards, turn_rewards
from kat.learn.losses import SPREADS, leaf_counts, leaf_shares
from kat.learn.objective import Objective
from kat.tree.trie import TokenTree

NAN = float("nan")
few = settings(max_examples=60, deadline=None)


def leaf(reward, session=None, ids=(1, 2, 3), trained=True, **info):
    return Trajectory("t", [Segment([9], "user"), Segment(ids, "assistant", trainable=trained)], reward,
                      info=info, session=session)


# -- the baseline

def test_a_session_stands_in_the_mean_once():
    "The audit's example: leaf by leaf it would be +0.41 five times and -2.04."
    got = session_rewards([leaf(1.0, "a") for _ in range(5)] + [leaf(0.0, "b")])
    assert got.rewards.tolist() == [1, 0] and got.session.tolist() == [0, 0, 0, 0, 0, 1] and got.counts.all()
    (advantages,), live = group_advantages([got.rewards], "grpo")
    assert advantages.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-5) and live.all()
    rewards = np.array([1, 1, 1, 1, 1, 0.0])
    assert ((rewards - rewards.mean()) / deviation(rewards))[[0, 5]] == pytest.approx([0.41, -2.04], abs=0.005)


def test_leaves_drop_out_alone_and_a_session_with_its_last_one():
    got = session_rewards([leaf(1.0, "a"), leaf(None, "a"), leaf(0.0, "a", masked="timeout"), leaf(None, "b"),
                           leaf(0.5, "c", trained=False), leaf(0.25), leaf(0.25)])
    np.testing.assert_array_equal(got.rewards, [1, NAN, NAN, 0.25, 0.25])
    assert got.session.tolist() == [0, 0, 0, 1, 2, 3, 4] and np.flatnonzero(got.counts).tolist() == [0, 5, 6]
    assert {k: v for k, v in got.reasons.items() if v} == {"timeout": 1, "ungraded": 2, "untrained": 1}


@pytest.mark.parametrize("other", [leaf(0.5, "a"), leaf(0.5, "a", trained=False), leaf(0.5, "a", ids=range(1, 9))])
def test_a_session_with_two_rewards_is_an_error(other):
    with pytest.raises(ValueError, match="task t: session 'a' has rewards 1 and 0.5"):
        session_rewards([leaf(1.0, "a"), other], max_tokens=6)
    cut = leaf(0.5, "a", masked="timeout")
    assert session_rewards([leaf(1.0, "a"), cut]).rewards.tolist() == [1]  # what was cut says nothing
    with pytest.raises(ValueError, match="rewards 1 and 0.5"):
        session_rewards([leaf(1.0, "a"), cut], ["infrastructure"])         # unless the trainer counts it


def test_a_first_token_alone_is_nothing_to_train():
    one = Trajectory("t", [Segment([1], "assistant", trainable=True), Segment([2, 3], "user")], 1.0)
    assert session_rewards([one]).reasons["untrained"] == 1
    assert session_rewards([]).rewards.tolist() == []


def test_one_convention_for_deviations():
    rewards = [0.0, 1.0, 0.25, NAN]
    assert deviation(rewards) == pytest.approx(torch.tensor(rewards[:3]).std().item())   # the sample's
    assert deviation([1.0]) == deviation([NAN]) == deviation([]) == 0


def test_rewards_of_turns_stay_apart():
    t = leaf(1.0, turns=[dict(id="a"), dict(id="b", reward=-0.5), dict(id="c", reward=None)])
    np.testing.assert_array_equal(turn_rewards(t), [NAN, -0.5, NAN])
    assert session_rewards([t]).rewards.tolist() == [1.0] and turn_rewards(leaf(1.0)).tolist() == []
    for bad in ("x", [1.0], True):
        with pytest.raises(ValueError, match=r"turns'\]\[0\]: reward .*: a finite number expected"):
            turn_rewards(leaf(1.0, turns=[dict(reward=bad)]))


# -- the weight

# session 0: 1 | 5 6 7 8 and 1 | 5 6 9, session 1: 2 | 3 4 5; trained is all but the first
IDS = [[1, 5, 6, 7, 8], [1, 5, 6, 9], [2, 3, 4, 5]]
MASKS = [[0, 1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
TURNS = [[0, 0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
SESSIONS = [0, 0, 1]


@pytest.mark.parametrize("options, want", [
    # distinct tokens: 5 and 3
    (dict(), [[1 / 16, 1 / 16, 1 / 8, 1 / 8], [1 / 16, 1 / 16, 1 / 8], [1 / 8] * 3]),
    (dict(normalise="sequence"), [[1 / 20, 1 / 20, 1 / 10, 1 / 10], [1 / 20, 1 / 20, 1 / 10], [1 / 6] * 3]),
    (dict(normalise="constant", length=10), [[1 / 40, 1 / 40, 1 / 20, 1 / 20], [1 / 40, 1 / 40, 1 / 20], [1 / 20] * 3]),
    # turns of session 0: the shared one, and one of each leaf; of session 1: two
    (dict(normalise="turn"), [[1 / 24, 1 / 24, 1 / 12, 1 / 12], [1 / 24, 1 / 24, 1 / 6], [1 / 4, 1 / 8, 1 / 8]]),
    # a leaf has half of the session's 5/8, 1/2, 5/20, 1/2
    (dict(spread="leaves"), [[5 / 64] * 4, [5 / 48] * 3, [1 / 8] * 3]),
    (dict(spread="leaves", normalise="sequence"), [[1 / 16] * 4, [1 / 12] * 3, [1 / 6] * 3]),
    (dict(spread="leaves", normalise="constant", length=10), [[1 / 32] * 4, [1 / 24] * 3, [1 / 20] * 3]),
    (dict(spread="leaves", normalise="turn"), [[1 / 16] * 4, [1 / 16, 1 / 16, 1 / 8], [1 / 4, 1 / 8, 1 / 8]]),
], ids=str)
def test_weights_by_hand(options, want):
    got = Objective(**options).weights(MASKS, TURNS, sessions=SESSIONS, ids=IDS)
    assert [own[1:].tolist() for own in got] == [pytest.approx(own) for own in want] and all(own[0] == 0 for own in got)


def test_a_token_that_one_of_two_leaves_trains_counts_once():
    "As where a leaf was superseded, or a fork edited an answer, whose copy is context."
    masks = [[0, 1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]]
    counts = leaf_counts(IDS, masks, np.array(SESSIONS))
    assert [x.tolist() for x in counts] == [[0, 1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    got = Objective().weights(masks, sessions=SESSIONS, ids=IDS)
    assert [own.tolist() for own in got] == [[0] + [1 / 8] * 4, [0, 0, 0, 1 / 8], [0] + [1 / 8] * 3]


@st.composite
def sessions(draw):
    "Sequences over three tokens, with copies and strict prefixes, in sessions."
    seqs = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6))
    for k in draw(st.lists(st.integers(0, len(seqs) - 1), max_size=2)):
        seqs.append(seqs[k][:draw(st.integers(1, len(seqs[k])))])
    masks = [[False] + draw(st.lists(st.booleans(), min_size=len(s) - 1, max_size=len(s) - 1)) for s in seqs]
    of = draw(st.lists(st.integers(0, 2), min_size=len(seqs), max_size=len(seqs)))
    turns = [np.cumsum(draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s)))) for s in seqs]
    return seqs, masks, of, turns


def objective(data, **fixed):
    how = data.draw(st.sampled_from(["token", "sequence", "turn", "constant"]))
    return Objective(normalise=how, length=7 if how == "constant" else None, spread=data.draw(st.sampled_from(SPREADS)),
                     semantics=data.draw(st.sampled_from(["branch", "node"])), **fixed)


@few
@given(sessions())
def test_every_distinct_token_of_a_session_weighs_the_same(batch):
    seqs, masks, of, _ = batch
    tree = TokenTree.from_sequences(seqs)
    on_tree = [tree.path(k)[np.array(mask)].tolist() for k, mask in enumerate(masks)]
    trained = [{t for path, own in zip(on_tree, of) if own == s for t in path} for s in range(3)]
    for how, length in (("token", None), ("sequence", None), ("constant", 7)):
        weights = Objective(normalise=how, length=length).weights(masks, sessions=of, ids=seqs)
        alive = sum(map(bool, trained))
        for s in set(of):
            own = tree.scatter_sum([w if o == s else np.zeros(len(w)) for w, o in zip(weights, of)])
            want = {"token": 1 / max(1, sum(map(len, trained))), "sequence": 1 / max(1, len(trained[s]) * alive),
                    "constant": 1 / (7 * len(set(of)))}[how]
            np.testing.assert_allclose(own, [want if t in trained[s] else 0 for t in range(len(tree))], atol=1e-12)


@few
@given(sessions(), st.data())
def test_one_more_leaf_over_the_same_tokens_changes_no_weight(batch, data):
    "A client that compacts or retries without anything new must not make a session louder, or another one quieter."
    seqs, masks, of, _ = batch
    k = data.draw(st.integers(0, len(seqs) - 1))
    cut = data.draw(st.integers(1, len(seqs[k])))
    how = data.draw(st.sampled_from(["token", "sequence"]))
    tree = TokenTree.from_sequences(seqs + [seqs[k][:cut]])
    on_tree = lambda n, *more: tree.scatter_sum([*Objective(normalise=how).weights(
        *more[:1], sessions=more[1], ids=more[2]), *[np.zeros(cut)] * (1 - n)])
    before = on_tree(0, masks, of, seqs)
    after = on_tree(1, masks + [masks[k][:cut]], of + [of[k]], seqs + [seqs[k][:cut]])
    np.testing.assert_allclose(before, after, atol=1e-12)


@few
@given(sessions(), st.sampled_from(["token", "sequence", "turn"]))
def test_leaves_of_a_session_weigh_alike(batch, how):
    seqs, masks, of, turns = batch
    weights = Objective(normalise=how, spread="leaves").weights(masks, turns, sessions=of, ids=seqs)
    for s in set(of):
        each = [w.sum() for w, mask, own in zip(weights, masks, of) if own == s and any(mask)]
        np.testing.assert_allclose(each, each[:1] * len(each), rtol=1e-12)
    by_tokens = Objective(normalise=how).weights(masks, turns, sessions=of, ids=seqs)
    total = lambda weights, s: sum(w.sum() for w, own in zip(weights, of) if own == s)
    for s in set(of):
        assert total(weights, s) == pytest.approx(total(by_tokens, s))
    assert sum(w.sum() for w in weights) == pytest.approx(int(any(map(any, masks))))


@few
@given(sessions(), st.data())
def test_flat_and_tree_agree_on_sessions(batch, data):
    seqs, masks, of, turns = batch
    o = objective(data, dual_clip=data.draw(st.sampled_from([None, 1.3])))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tree = TokenTree.from_sequences(seqs)
    old, table = -1 + 0.3 * rng.standard_normal(len(tree)), torch.tensor(-1 + 0.3 * rng.standard_normal(len(tree)),
                                                                         requires_grad=True)
    advantages = rng.choice([-1.5, 0, 2.0], 3)[of]
    on_tree = o.prepare(tree, masks, advantages, old=tree.gather(old), turns=turns, sessions=of)
    shared = None
    if o.semantics == "node":  # sessions through each token, counted the slow way
        through = lambda start: len({own for path, own in zip(seqs, of) if path[:len(start)] == start})
        shared = [np.array([through(s[:i + 1]) for i in range(len(s))]) for s in seqs]
    flat = o.prepare_flat(masks, advantages, old=tree.gather(old), turns=turns, shared=shared,
                          weights=o.weights(masks, turns, sessions=of, ids=seqs))
    a = flat([table[tree.path(k)][np.array(m)] for k, m in enumerate(masks)]).double() + 0 * table.sum()
    b = on_tree(Edges(torch.arange(len(tree)), table, None, None))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(x, table)[0] for x in (a, b)), atol=1e-12, rtol=1e-10)


@few
@given(sessions(), st.data())
def test_sessions_of_one_leaf_keep_every_bit(batch, data):
    seqs, masks, _, turns = batch
    o, names = objective(data), np.random.default_rng(0).permutation(len(seqs)) * 3
    for a, b in zip(o.weights(masks, turns), o.weights(masks, turns, sessions=names, ids=seqs)):
        assert np.array_equal(a, b)


def test_shares_add_up_to_the_mass():
    leaf_of, times, session = np.array([0, 0, 1, 1, 2]), np.array([2, 1, 2, 1, 1]), np.array([0, 0, 1])
    for spread in SPREADS:
        shares, mass = leaf_shares(leaf_of, np.arange(5), times, session, spread)
        assert mass.tolist() == [3, 1] and np.bincount(session[leaf_of], shares).tolist() == pytest.approx([3, 1])


def test_sessions_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="sessions without ids"):
        Objective().weights(MASKS, sessions=SESSIONS)
    with pytest.raises(ValueError, match="sessions of 2 sequences, masks of 3"):
        Objective().weights(MASKS, sessions=[0, 0], ids=IDS)
    with pytest.raises(ValueError, match="ids of sequence 1: 3 tokens, its mask has 4"):
        Objective().weights(MASKS, sessions=SESSIONS, ids=[IDS[0], [1, 5, 6], IDS[2]])
    with pytest.raises(ValueError, match="spread 'even': one of tokens, leaves"):
        Objective(spread="even")


# -- the trainer

def branched(model, rng, reward, name, n=3, task="t"):
    "A session of `n` leaves that share prompt and first answer, as the engine would have recorded it."
    first, out = episode(model, rng, reward, task), []
    for _ in range(n):
        tail = rng.integers(1, 12, 7)
        ids = np.concatenate([*(s.ids for s in first.segments[:2]), tail])
        with torch.no_grad():
            logps = np.concatenate([[0], score(model, ids).numpy()])[-4:]
        segments = first.segments[:2] + [Segment(tail[:3], "tool_result", 0),
                                         Segment(tail[3:], "assistant", 1, True, logps)]
        out.append(Trajectory(task, segments, reward, {"temperature": 1.0}, session=name))
    return out


def mixed(model, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda reward, name, n: branched(model, rng, reward, name, n)
    return [Group("t", make(1.0, "a", 3) + [episode(model, rng, 0.0)] + make(0.25, "b", 2))]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
def test_the_trainers_gradient_is_the_formulas(tmp_path, normalise, spread):
    model = tiny()
    batch = mixed(model)
    o = Objective(normalise=normalise, length=10 if normalise == "constant" else None, spread=spread)
    t, seen = trainer(model, tmp_path, objective=o, max_grad_norm=1e9, max_tokens=16), []
    t.optimizer.step = lambda: seen.append(all_gradients(model))
    m = t.step(batch)
    assert (m["sessions"], m["trajectories"], m["reward"]) == (3, 6, pytest.approx(1.25 / 3))
    trajectories, of = batch[0].trajectories, [0, 0, 0, 1, 2, 2]
    first = [int(trajectories[k].segments[1].ids.size) for k in (0, 3, 4)]            # of each session, shared
    last = [4, int(trajectories[3].mask.sum()) - first[1], 4]                         # of each leaf
    leaves = [3, 1, 2]
    size = [f + n * k for f, n, k in zip(first, last, leaves)]                        # distinct trained tokens
    whole = {"token": [n / sum(size) for n in size], "sequence": [1 / 3] * 3, "constant": [n / 30 for n in size]}
    whole = whole[normalise]
    loss = 0.0
    for x, s in zip(trajectories, of):
        logps = score(model, x.ids)[torch.from_numpy(x.mask[1:])]
        w = torch.full((first[s] + last[s],), whole[s] / size[s])                     # each distinct token alike
        w[:first[s]] /= leaves[s]
        if spread == "leaves":
            w[:] = whole[s] / (leaves[s] * len(w))
        loss = loss - (x.reward - 1.25 / 3) * (w * logps).sum()
    model.zero_grad()
    loss.backward()
    torch.testing.assert_close(seen[0], all_gradients(model), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("settings_", [
    dict(), dict(advantage="grpo", objective=Objective(normalise="sequence", tis=2.0)),
    dict(advantage="batch_std", objective=Objective(spread="leaves")), dict(minibatches=2, budget=0.7)], ids=str)
def test_files_train_as_memory_does(tmp_path, form, settings_):
    a, b = tiny(), tiny()
    batch = mixed(a) + mixed(a, 1) + mixed(a, 2)
    write_records(tmp_path / f"g.{form}", batch)
    one = trainer(a, tmp_path / "a", **settings_).step(batch)
    two = trainer(b, tmp_path / "b", **settings_).step(list(read_records(tmp_path / f"g.{form}")))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}


def test_a_named_session_of_one_leaf_trains_to_the_same_bits(tmp_path):
    models = tiny(), tiny()
    for model, name in zip(models, (None, "s{}")):
        batch = groups(tiny(), 0)
        for group in batch:
            for i, t in enumerate(group.trajectories):
                t.session = name and name.format(i)    # the same names in every group
        trainer(model, tmp_path / str(name), objective=Objective(normalise="sequence", tis=2.0)).step(batch)
    assert all(torch.equal(x, y) for x, y in zip(*(m.parameters() for m in models)))


def test_samples_without_a_trained_token_move_nothing(tmp_path):
    "The audit's case: they stood in the mean, and made a dead group live."
    model, rng = tiny(), np.random.default_rng(0)
    def blind(reward):
        t = episode(model, rng, reward)
        for s in t.segments:
            s.trainable = False
        return t
    make = lambda *rewards: [episode(model, rng, r) for r in rewards]
    plain = make(1.0, 0.0, 0.0)
    a, b = tiny(), tiny()
    one = trainer(a, tmp_path / "a").step([Group("t", plain)])
    two = trainer(b, tmp_path / "b").step([Group("t", [plain[0], blind(1.0), *plain[1:]])])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert (one["reward"], two["reward"], two["masked_untrained"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 1)
    dead = [Group("t", [*make(0.0), blind(100.0)])]
    three = trainer(tiny(), tmp_path / "c", fill=2)
    assert three.step(dead)["live_groups"] == 0 and three.updates == 0


def test_a_contradiction_stops_the_step(tmp_path):
    model = tiny()
    batch = mixed(model)
    batch[0].trajectories[1].reward = 0.5
    with pytest.raises(ValueError, match="task t: session 'a' has rewards 1 and 0.5"):
        trainer(model, tmp_path).step(batch)


def test_a_sessions_entropy_is_over_its_distinct_tokens(tmp_path):
    model = tiny()
    batch = mixed(model)
    for x in batch[0].trajectories:
        for s in x.segments:
            if s.trainable:
                s.entropy = np.full(len(s), 0.5 if s.turn == 0 else 1.0, np.float32)
    from kat.learn.rl import _entropies
    trajectories = batch[0].trajectories
    got = _entropies(trajectories, session_rewards(trajectories))
    n, k = len(trajectories[0].segments[1]), len(trajectories[4].segments[1])
    assert got[[0, 2]] == pytest.approx([(0.5 * n + 12) / (n + 12), (0.5 * k + 8) / (k + 8)])
    trainer(model, tmp_path, by_entropy=True).step(batch)
