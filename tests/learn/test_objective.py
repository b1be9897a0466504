"Advantages and losses against numbers worked out by hand."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from kat.learn.advantage import dr_grpo, group_advantages, grpo, is_live, rloo
from kat.learn.losses import (LIMIT, cispo, importance_weights, k3, mismatch, policy_gradient, ppo_clip, token_weights,
                             unit_clip, unit_mask)
from kat.learn.objective import LOSSES, Objective, merge_metrics

NAN = float("nan")
REWARDS = st.lists(st.one_of(st.just(NAN), st.floats(-3, 3)), min_size=1, max_size=12)


def test_advantages_by_hand():
    assert dr_grpo([1, 0, 0, 1, 1]).tolist() == pytest.approx([0.4, -0.6, -0.6, 0.4, 0.4])
    spread = math.sqrt((3 * 0.16 + 2 * 0.36) / 4)  # the sample's
    assert grpo([1, 0, 0, 1, 1]).tolist() == pytest.approx([x / spread for x in (0.4, -0.6, -0.6, 0.4, 0.4)], rel=1e-5)
    assert rloo([1, 0, 0, 1, 1]).tolist() == pytest.approx([1 - 2 / 4, -3 / 4, -3 / 4, 1 - 2 / 4, 1 - 2 / 4])


def test_a_masked_episode_is_not_a_failed_one():
    assert dr_grpo([1, 0, NAN]).tolist() == [0.5, -0.5, 0.0]
    assert dr_grpo([1, 0, 0]).tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert rloo([1, 0, NAN]).tolist() == [1.0, -1.0, 0.0]
    assert grpo([1, 0, NAN]).tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5), 0.0], rel=1e-5)


def test_groups_that_teach_nothing():
    advantages, live = group_advantages([[1, 0, 1], [1, 1], [0.1 + 0.2] * 3, [NAN, 1], [NAN, NAN], [0]], "grpo")
    assert live.tolist() == [True] + [False] * 5
    assert all((a == 0).all() and a.dtype == np.float32 for a in advantages[1:])
    assert [len(a) for a in advantages] == [3, 2, 3, 2, 2, 1]
    with pytest.raises(ValueError, match="'gae'.*dr_grpo"):
        group_advantages([[1, 0]], "gae")


@settings(max_examples=60, deadline=None)
@given(REWARDS, st.randoms())
def test_advantages_are_centred_ordered_and_blind_to_position(rewards, random):
    r = np.array(rewards)
    order = list(range(len(r)))
    random.shuffle(order)
    for f in (dr_grpo, grpo, rloo):
        a = f(r)
        assert np.isfinite(a).all() and (a[np.isnan(r)] == 0).all()
        assert abs(a.sum()) < 1e-3
        np.testing.assert_allclose(f(r[order]), a[order], atol=1e-5)
        np.testing.assert_allclose(f(r[~np.isnan(r)]), a[~np.isnan(r)], atol=1e-6)
        if is_live(r):
            assert r[np.nanargmax(r)] >= np.nanmean(r) and a[np.nanargmax(r)] >= 0


def test_policy_gradient_by_hand():
    logps = torch.tensor([-0.5, -2.0], requires_grad=True)
    loss = policy_gradient(logps, torch.tensor([2.0, -1.0]))
    assert loss.tolist() == [1.0, -2.0]
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == [-2.0, 1.0]


@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped", [
    (1.0, 2.0, -2.0, -2.0, False),      # on policy: the plain policy gradient
    (1.2, 1.0, -1.2, -1.2, False),      # inside
    (1.5, 1.0, -1.28, 0.0, True),       # far enough towards the good: cut above
    (0.5, 1.0, -0.5, -0.5, False),      # must come back up
    (0.5, -1.0, 0.8, 0.0, True),        # far enough from the bad: cut below
    (1.5, -1.0, 1.5, 1.5, False),       # must come back down
])
def test_ppo_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    old = torch.tensor([-1.5])
    new = (old + math.log(ratio)).requires_grad_()
    value, cut = ppo_clip(new, old, torch.tensor([advantage]))
    assert value.item() == pytest.approx(loss, rel=1e-6) and cut.item() is clipped
    assert torch.autograd.grad(value.sum(), new)[0].item() == pytest.approx(gradient, rel=1e-6)


def test_token_weights_by_hand():
    counts = torch.tensor([1, 3, 0])
    assert token_weights(counts).tolist() == [0.25] * 3
    assert token_weights(counts, "sequence")[:2].tolist() == pytest.approx([1 / 2, 1 / 6])
    assert token_weights(counts, "constant", 10).tolist() == pytest.approx([1 / 30] * 3)
    for how in ("token", "sequence"):
        assert token_weights(torch.tensor([0]), how).isfinite().all()
    with pytest.raises(ValueError, match="'mean'"):
        token_weights(counts, "mean")
    for length in (None, 0):
        with pytest.raises(ValueError, match="length"):
            token_weights(counts, "constant", length)


def test_mismatch_by_hand():
    m = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 - math.log(2), -2.0]))
    assert m["mismatch_mean"] == pytest.approx(math.log(2) / 2)
    assert m["mismatch_max"] == pytest.approx(math.log(2))
    assert m["mismatch_k3"] == pytest.approx((2 - 1 - math.log(2)) / 2, rel=1e-5)
    assert set(mismatch(torch.empty(0), torch.empty(0)).values()) == {0.0}


LOG2 = math.log(2)


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0].tolist()


def test_cispo_by_hand():
    old = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    new = (old + torch.tensor([2.0, 0.5, 8.0]).log()).requires_grad_()
    loss, cut = cispo(new, old, torch.tensor([1.0, -2.0, 1.0]), high=2.0)   # weights 2, 0.5, 3
    assert loss.tolist() == pytest.approx([-2 * (-1 + LOG2), 1 * (-1 - LOG2), -3 * (-1 + 3 * LOG2)], rel=1e-6)
    assert cut.tolist() == [False, False, True]
    assert gradient(loss.sum(), new) == pytest.approx([-2, 1, -3], rel=1e-6)   # never lost


def test_cispo_with_a_lower_limit_by_hand():
    old = torch.full((3,), -1.0, dtype=torch.float64)
    new = (old + torch.tensor([2.0, 0.25, 8.0]).log()).requires_grad_()
    loss, cut = cispo(new, old, torch.tensor([1.0, -2.0, 1.0]), high=2.0, low=0.4)   # weights 2, 0.6, 3
    assert loss.tolist() == pytest.approx([-2 * (-1 + LOG2), 1.2 * (-1 - 2 * LOG2), -3 * (-1 + 3 * LOG2)], rel=1e-6)
    assert cut.tolist() == [False, True, True] and gradient(loss.sum(), new) == pytest.approx([-2, 1.2, -3], rel=1e-6)
    none, plain = cispo(new, old, torch.ones(3), high=2.0, low=1.0), cispo(new, old, torch.ones(3), high=2.0)
    assert torch.equal(none[0], plain[0]) and torch.equal(none[1], plain[1])


@pytest.mark.parametrize("ratio, advantage, loss, slope, clipped", [
    (9.0, -1.0, 3.0, 0, True),       # c A
    (2.0, -1.0, 2.0, 2.0, False),    # below c: as without it
    (0.5, -1.0, 0.8, 0, True),       # the lower limit
    (9.0, 1.0, -1.28, 0, True),      # a positive advantage has the upper one
    (9.0, 0.0, 0.0, 0, False)])
def test_dual_clip_by_hand(ratio, advantage, loss, slope, clipped):
    old = torch.tensor([-3.0], dtype=torch.float64)
    new, A = (old + math.log(ratio)).requires_grad_(), torch.tensor([advantage], dtype=torch.float64)
    one, unit = torch.zeros(1, dtype=torch.int64), dict(low=0.2, high=0.28, dual=3.0)
    for value, cut in (ppo_clip(new, old, A, dual=3.0), unit_clip(new, old, A, one, **unit)):
        assert value.item() == pytest.approx(loss) and cut.item() is clipped
        assert gradient(value.sum(), new) == pytest.approx([slope])


def test_masks_of_units_by_hand():
    old, zero = np.log([2, 0.5, 1.2, 1.2, 4]), np.zeros(5)
    unit = np.array([0, 0, 1, 1, 2])       # means 1, 1.2, 4; products 1, 1.44, 4
    assert unit_mask(old, zero, (0.9, 1.3), unit).tolist() == [True, True, True, True, False]
    assert unit_mask(old, zero, (0.9, 1.3), unit, mean=False).tolist() == [True, True, False, False, False]
    assert unit_mask(old, zero, (0.9, 4.1), np.arange(5)).tolist() == [True, False, True, True, True]
    assert unit_mask(zero[:0], zero[:0], (0.9, 1.1), unit[:0]).tolist() == []
    longer = np.full(1000, np.log(1.02))   # a product drifts with the length, a mean doesn't
    one = np.zeros(1000, int)
    assert unit_mask(longer, longer * 0, (0.9, 1.1), one).all()
    assert not unit_mask(longer, longer * 0, (0.9, 1.1), one, mean=False).any()


def test_gspo_by_hand():
    # sequence 0: ratios 4, 1: mean ratio 2; sequence 1: ratios 1/2, 1/8, 1/4: 1/4
    old = torch.full((5,), -3.0, dtype=torch.float64)
    new = (old + torch.tensor([4, 1, 0.5, 0.125, 0.25], dtype=torch.float64).log()).requires_grad_()
    unit, wide = torch.tensor([0, 0, 1, 1, 1]), dict(low=0.9, high=1.5)
    loss, cut = unit_clip(new, old, torch.tensor([1.0, 1, -1, -1, -1], dtype=torch.float64), unit, **wide)
    assert loss.tolist() == pytest.approx([-2, -2, 0.25, 0.25, 0.25]) and not cut.any()
    # 2 tokens × ratio 2 × half of the mean each
    assert gradient(loss.sum(), new) == pytest.approx([-2, -2, 0.25, 0.25, 0.25])
    loss, cut = unit_clip(new, old, torch.tensor([1.0, 1, -1, -1, -1], dtype=torch.float64), unit, low=0.5, high=0.5)
    assert loss.tolist() == pytest.approx([-1.5, -1.5, 0.5, 0.5, 0.5]) and cut.all()
    assert gradient(loss.sum(), new) == [0] * 5
    paper = unit_clip(new, old, torch.ones(5, dtype=torch.float64), unit)[0]
    assert paper.tolist() == pytest.approx([-1.0004] * 2 + [-0.25] * 3)


def test_turn_level_ratios_are_products_by_hand():
    # turn 0: 2 × 2 = 4; turn 1: 1/2
    old = torch.full((3,), -3.0, dtype=torch.float64)
    new = (old + torch.tensor([2, 2, 0.5], dtype=torch.float64).log()).requires_grad_()
    loss, cut = unit_clip(new, old, torch.ones(3, dtype=torch.float64), torch.tensor([0, 0, 1]), 0.2, 9.0, mean=False)
    assert loss.tolist() == pytest.approx([-4, -4, -0.5]) and not cut.any()
    assert gradient(loss.sum(), new) == pytest.approx([-8, -8, -0.5])


def test_ratios_stay_finite():
    new, old = torch.tensor([-1.0, -500.0], requires_grad=True), torch.tensor([-500.0, -1.0])
    losses = (ppo_clip(new, old, -torch.ones(2)), cispo(new, old, torch.ones(2)),
              unit_clip(new, old, -torch.ones(2), torch.tensor([0, 1])))
    for loss, _ in losses:
        assert loss.isfinite().all() and all(map(math.isfinite, gradient(loss.sum(), new)))
    assert ppo_clip(new, old, -torch.ones(2))[0][0].item() == pytest.approx(math.exp(LIMIT), rel=1e-5)


def test_k3_by_hand():
    new = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    value = k3(new, torch.tensor([-1.0 + LOG2, -1.0], dtype=torch.float64))     # d = log 2: 2 - 1 - log 2
    assert value.tolist() == pytest.approx([1 - LOG2, 0])
    assert gradient(value.sum(), new) == pytest.approx([1 - 2, 0])


def test_importance_by_hand():
    old, engine = np.log([0.4, 0.1, 0.3]), np.log([0.1, 0.4, 0.2])              # ratios 4, 1/4, 3/2
    factor, touched = importance_weights(old, engine, tis=2.0)
    assert factor.tolist() == pytest.approx([2, 0.25, 1.5]) and touched.tolist() == [True, False, False]
    factor, touched = importance_weights(old, engine, mis=(0.5, 2.0))
    assert factor.tolist() == pytest.approx([0, 0, 1.5]) and touched.tolist() == [True, True, False]
    factor, touched = importance_weights(old, engine, tis=2.0, unit=np.array([0, 0, 1]))   # products 1, 3/2
    assert factor.tolist() == pytest.approx([1, 1, 1.5]) and not touched.any()
    for bad in ({}, dict(tis=2.0, mis=(0.5, 2.0))):
        with pytest.raises(ValueError, match="exactly one"):
            importance_weights(old, engine, **bad)


def test_weights_by_hand():
    masks, turns = [[0, 1, 1, 0, 1], [0, 1], [0, 0]], [[0, 0, 0, 0, 1], [0, 0], [0, 0]]
    w = lambda **kw: [x.tolist() for x in Objective(**kw).weights(masks, turns)]
    assert w() == [[0, 0.25, 0.25, 0, 0.25], [0, 0.25], [0, 0]]
    assert w(normalise="sequence") == [pytest.approx([0, 1 / 6, 1 / 6, 0, 1 / 6]), [0, 0.5], [0, 0]]
    assert w(normalise="turn") == [[0, 0.125, 0.125, 0, 0.25], [0, 0.5], [0, 0]]   # two turns: a quarter each
    tenth = [pytest.approx([0, 1 / 30, 1 / 30, 0, 1 / 30]), pytest.approx([0, 1 / 30]), [0, 0]]
    assert w(normalise="constant", length=10) == tenth
    assert [Objective(x).how for x in LOSSES] == ["token", "token", "token", "sequence", "turn"]


MASKS, ADVANTAGES = [[0, 1, 1], [0, 1]], [1.0, -2.0]
OLD, REFERENCE = [[9, -1, -1], [9, -2]], [[9, -1, -1 + LOG2], [9, -2]]
ENGINE = [[9, -1 - LOG2, -1], [9, -2 + LOG2]]      # factors 2, 1, 1/2
TURNS = [[0, 0, 1], [0, 0]]


@pytest.mark.parametrize("o, value", [  # new: ratios 2, 1/2, 2; weights 1/3
    (dict(loss="pg"), -(LOG2 - 1 - LOG2 - 1) / 3 + 2 * (LOG2 - 2) / 3),
    (dict(loss="ppo"), (-1.28 - 0.5 + 4) / 3),
    (dict(loss="ppo", clip_low=0.6, clip_high=0.5), (-1.5 - 0.5 + 4) / 3),
    (dict(loss="cispo", clip_high=0.5), (-1.5 * (LOG2 - 1) - 0.5 * (-LOG2 - 1) + 2 * 1.5 * (LOG2 - 2)) / 3),
    (dict(loss="gspo"), (-1 + 4) / 2),             # mean ratios 1 and 2; two sequences alike
    (dict(loss="gspo", normalise="token"), (-2 + 4) / 3),
    (dict(loss="turn_gspo"), -1.28 / 4 - 0.5 / 4 + 4 / 2),
    (dict(loss="ppo", tis=1.5), (-1.5 * 1.28 - 0.5 + 0.5 * 4) / 3),
    (dict(loss="ppo", mis=(0.6, 2.5)), (-2 * 1.28 - 0.5) / 3),
    (dict(loss="ppo", tis=1.5, correct="sequence"), (-1.5 * 1.28 - 1.5 * 0.5 + 0.5 * 4) / 3),   # products 2 and 1/2
    (dict(loss="gspo", tis=1.5), (-1.5 + 0.5 * 4) / 2),
    (dict(loss="ppo", dual_clip=1.5), (-1.28 - 0.5 + 2 * 1.5) / 3),
    (dict(loss="gspo", dual_clip=1.5), (-1 + 2 * 1.5) / 2),
    (dict(loss="turn_gspo", dual_clip=1.5), -1.28 / 4 - 0.5 / 4 + 3 / 2),
    (dict(loss="cispo", clip_high=0.5, clip_low=0.2),
     (-1.5 * (LOG2 - 1) - 0.8 * (-LOG2 - 1) + 2 * 1.5 * (LOG2 - 2)) / 3),
    (dict(loss="ppo", mask=(0.6, 1.5)), (-1.28 - 0.5) / 3),                                   # means √2 and 1/2
    (dict(loss="ppo", mask=(0.6, 1.5), mask_ratio="product"), 0),                             # products 2 and 1/2
    (dict(loss="ppo", mask=(0.6, 1.5), mask_unit="turn"), -0.5 / 3),                          # 2, 1 and 1/2
    (dict(loss="ppo", mask=(0.6, 1.5), mask_unit="token"), -0.5 / 3),
    (dict(loss="ppo", mask=(0.6, 1.5), tis=1.5), (-1.5 * 1.28 - 0.5) / 3),                    # token TIS, sequence mask
    (dict(loss="ppo", mask=(0.4, 1.3), tis=1.5), 0.5 * 4 / 3),
    (dict(loss="ppo", mask=(0.4, 1.3), mis=(0.4, 2.5)), 0.5 * 4 / 3),
    (dict(loss="ppo", mask=(0.6, 1.5), kl=0.3), (-1.28 - 0.5) / 3 + 0.1 * (0.5 - 1 + LOG2 + 4 - 1 - 2 * LOG2)),
    (dict(loss="gspo", mask=(0.6, 1.5), tis=3.0, correct="sequence"), -2 / 2),
    (dict(loss="ppo", kl=0.3), (-1.28 - 0.5 + 4) / 3 + 0.1 * (0.5 - 1 + LOG2 + 4 - 1 - 2 * LOG2 + 0.5 - 1 + LOG2)),
    (dict(loss="ppo", entropy=0.3), (-1.28 - 0.5 + 4) / 3 - 0.1 * (0.5 + 0.25 + 1)),
    (dict(loss="ppo", semantics="node"), (-1.28 / 2 - 0.5 + 4 / 2) / 3),                       # shared by 2, 1, 2
])
def test_objectives_by_hand(o, value):
    o = Objective(**o)
    kw = dict(old=OLD, turns=TURNS, engine=ENGINE if o.corrected else None, reference=REFERENCE if o.kl else None,
              shared=[[2, 2, 1], [2, 2]] if o.semantics == "node" else None)
    loss = o.prepare_flat(MASKS, ADVANTAGES, **kw)
    t = lambda *x: torch.tensor(x, dtype=torch.float64, requires_grad=True)
    new, entropies = [t(-1 + LOG2, -1 - LOG2), t(-2 + LOG2)], [t(0.5, 0.25), t(1.0)]
    assert loss(new, entropies).item() == pytest.approx(value)
    parts = loss(new[1:], entropies[1:], rows=[1]) + loss(new[:1], entropies[:1], rows=[0])
    assert parts.item() == pytest.approx(value)


def test_metrics_by_hand():
    objective = Objective(mis=(0.6, 2.5), kl=1.0)
    loss = objective.prepare_flat(MASKS, ADVANTAGES, old=OLD, engine=ENGINE, reference=REFERENCE)
    assert loss.metrics == pytest.approx({"tokens": 3, "mismatch_mean": 2 / 3 * LOG2, "mismatch_max": LOG2,
                                          "mismatch_k3": (2 - 1 - LOG2 + 0.5 - 1 + LOG2) / 3, "mis_masked": 1 / 3})
    new = [torch.tensor([-1 + LOG2, -1 - LOG2]), torch.tensor([-2 + LOG2])]      # clipped: the first only
    # see k3: the logarithms cancel
    assert loss.measure(new) == pytest.approx({"tokens": 3, "clipped": 1 / 3, "kl": (-0.5 + 3 - 0.5) / 3})
    both = Objective(tis=1.5, mask=(0.6, 1.5)).prepare_flat(MASKS, ADVANTAGES, old=OLD, engine=ENGINE).metrics
    assert (both["tis_capped"], both["mask_dropped"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert Objective("pg").prepare_flat(MASKS, ADVANTAGES).measure(new) == {"tokens": 3}
    a, b = dict(tokens=3, clipped=0.5, mismatch_max=2.0), dict(tokens=1, clipped=0.1, mismatch_max=3.0)
    assert merge_metrics([a, b]) == pytest.approx(dict(tokens=4, clipped=0.4, mismatch_max=3.0))
    assert merge_metrics([]) == {}


@pytest.mark.parametrize("o, message", [
    (dict(loss="dpo"), "loss 'dpo': one of pg, ppo"),
    (dict(loss="pg", clip_high=0.2), "clip_high=0.2: loss 'pg' has no such limit"),
    (dict(clip_low=1.5), "clip_low=1.5"),
    (dict(clip_high=0), "clip_high=0"),
    (dict(clip_high=math.nan), "clip_high=nan"),
    (dict(normalise="mean"), "normalise 'mean': one of token"),
    (dict(length=9), "normalise='token', length=9"),
    (dict(normalise="constant"), "length=None"),
    (dict(normalise="constant", length=0), "length=0"),
    (dict(kl=-1), "kl=-1"),
    (dict(entropy=math.inf), "entropy=inf"),
    (dict(tis=2.0, mis=(0.5, 2)), "choose one"),
    (dict(tis=0.5), "tis=0.5"),
    (dict(mis=(1.1, 2.0)), "mis="),
    (dict(correct="token"), "without tis or mis"),
    (dict(tis=2.0, correct="group"), "correct 'group': one of token, turn, sequence"),
    (dict(loss="gspo", tis=2.0, correct="turn"), "sequence moves as one"),
    (dict(loss="pg", dual_clip=3.0), "dual_clip=3.0: loss 'pg' has no clip"),
    (dict(loss="cispo", dual_clip=3.0), "dual_clip=3.0: loss 'cispo' has no clip"),
    (dict(dual_clip=1.0), "dual_clip=1.0: a number above 1"),
    (dict(dual_clip=math.nan), "dual_clip=nan"),
    (dict(dual_clip=True), "dual_clip=True"),
    (dict(mask=(1.01, 1.1)), "mask="),
    (dict(mask=1.1), "mask=1.1: a limit below and one above 1"),
    (dict(mask=(0.9, math.nan)), "mask="),
    (dict(mask_unit="turn"), "mask_unit='turn' without mask: it would be ignored"),
    (dict(mask_ratio="mean"), "mask_ratio='mean' without mask"),
    (dict(mask=(0.9, 1.1), mask_unit="word"), "mask_unit 'word': one of token, turn, sequence"),
    (dict(mask=(0.9, 1.1), mask_ratio="median"), "mask_ratio 'median': one of mean, product"),
    (dict(mask=(0.9, 1.1), mask_unit="token", mask_ratio="mean"), "a token has one ratio"),
    (dict(loss="gspo", mask=(0.9, 1.1), mask_unit="turn"), "sequence moves as one, parts of it can't be left out"),
    (dict(mask=(0.9, 1.1), correct="token"), "without tis or mis"),
    (dict(spread="even"), "spread 'even': one of tokens, leaves"),
    (dict(semantics="tree"), "semantics 'tree': one of branch, node"),
    (dict(loss="turn_gspo", semantics="node"), "semantics='node' with loss 'turn_gspo'")])
def test_options_that_do_not_combine_are_refused(o, message):
    with pytest.raises(ValueError, match=message):
        Objective(**o)


@pytest.mark.parametrize("o, change, message", [
    ({}, dict(old=None), "old log-probs are missing: loss 'ppo'"),
    (dict(tis=2.0), {}, "engine log-probs are missing"),
    (dict(mask=(0.9, 1.1)), {}, "engine log-probs are missing"),
    (dict(mask=(0.9, 1.1), mask_unit="turn"), dict(turns=None), "turns are missing"),
    (dict(loss="pg"), dict(old=None, engine=ENGINE), "engine log-probs are compared with old ones"),
    (dict(kl=0.1), {}, "reference log-probs are missing"),
    ({}, dict(reference=OLD), "kl is 0"),
    (dict(loss="turn_gspo"), dict(turns=None), "turns are missing"),
    (dict(normalise="turn"), dict(turns=[[0, 1, 0], [0, 0]]), "turns of sequence 0: they fall at token 2"),
    ({}, dict(old=[[0, math.nan, -1], [0, -1]]), "old log-probs of sequence 0: nan at token 1"),
    ({}, dict(old=[[0, -1], [0, -1]]), "old log-probs of sequence 0: shape"),
    ({}, dict(old=OLD[:1]), "old log-probs of 1 sequences, masks of 2"),
    ({}, dict(advantages=[1.0, math.nan]), "advantages of sequence 1: nan at token 1"),
    ({}, dict(masks=[[1, 1, 1], [0, 1]]), "mask of sequence 0: its first token"),
    (dict(loss="gspo"), dict(advantages=[[0, 1, 2], 1.0]), "advantages of sequence 0 differ inside a sequence"),
    (dict(semantics="node"), {}, "semantics='node': shared"),
    ({}, dict(shared=[[1] * 3, [1] * 2]), "semantics='branch': shared"),
    ({}, dict(weights=[[0, 1, math.inf], [0, 1]]), "weights of sequence 0: inf at token 2")])
def test_bad_batches_are_named(o, change, message):
    with pytest.raises(ValueError, match=message):
        Objective(**o).prepare_flat(**(dict(masks=MASKS, advantages=ADVANTAGES, old=OLD, turns=TURNS) | change))


def test_calls_that_would_do_nothing_are_refused():
    new, h = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)], [torch.ones(2), torch.ones(1)]
    loss = Objective(entropy=0.1).prepare_flat(MASKS, ADVANTAGES, old=OLD)
    with pytest.raises(ValueError, match="entropies carry no gradient"):
        loss(new, h)
    with pytest.raises(ValueError, match="entropies are missing"):
        loss(new)
    assert loss([x.detach() for x in new], h).isfinite()      # without gradient there is nothing to lose
    with pytest.raises(ValueError, match="sequence 0: 1 log-probs for 2 trained tokens"):
        loss(new[1:], h)


def test_a_batch_without_trained_tokens():
    loss = Objective(tis=2.0).prepare_flat([[0, 0], []], [1.0, 1.0], old=[[0, 0], []], engine=[[0, 0], []])
    assert loss([torch.zeros(0)] * 2).item() == 0 and loss.metrics["tokens"] == loss.metrics["tis_capped"] == 0
    assert loss.measure([torch.zeros(0)] * 2) == {"tokens": 0, "clipped": 0.0}
