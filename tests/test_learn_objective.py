"Advantages and losses against numbers worked out by hand."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from kat.learn.advantage import dr_grpo, group_advantages, grpo, is_live, rloo
from kat.learn.objective import mismatch, policy_gradient, ppo_clip, token_weights

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
    with pytest.raises(ValueError, match="'gae'.*dr_grpo"): group_advantages([[1, 0]], "gae")


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
        if is_live(r): assert r[np.nanargmax(r)] >= np.nanmean(r) and a[np.nanargmax(r)] >= 0


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
    for how in ("token", "sequence"): assert token_weights(torch.tensor([0]), how).isfinite().all()
    with pytest.raises(ValueError, match="'mean'"): token_weights(counts, "mean")
    for length in (None, 0):
        with pytest.raises(ValueError, match="length"): token_weights(counts, "constant", length)


def test_mismatch_by_hand():
    m = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0 - math.log(2), -2.0]))
    assert m["mismatch_mean"] == pytest.approx(math.log(2) / 2)
    assert m["mismatch_max"] == pytest.approx(math.log(2))
    assert m["mismatch_k3"] == pytest.approx((2 - 1 - math.log(2)) / 2, rel=1e-5)
    assert set(mismatch(torch.empty(0), torch.empty(0)).values()) == {0.0}
