"Advantages: masks by reason, the batch's spread, scaling, and a critic, against numbers worked out by hand."
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kat.core.types import Segment, Trajectory
from kat.learn.advantage import (MASK_REASONS, batch_std, dr_grpo, entropy_factors, gae, group_advantages,
                                 masked_rewards, pass_rate_factors, per_token)

NAN = float("nan")
few = settings(max_examples=60, deadline=None)


def episode(reward, n=3, **info):
    return Trajectory("t1", [Segment([1] * n, "assistant", trainable=True)], reward, info=info)


def test_masks_by_reason_and_their_counters():
    episodes = [episode(1.0), episode(0.0, masked="timeout"), episode(None, masked="infrastructure"),
                episode(0.5, masked="truncated"), episode(0.0, masked="truncated"), episode(None),
                episode(1.0, masked=None), episode(0.0, masked="overlong")]
    rewards, counts = masked_rewards(episodes)
    np.testing.assert_array_equal(rewards, [1, NAN, NAN, NAN, NAN, NAN, 1, NAN])
    assert counts == {"truncated": 2, "timeout": 1, "infrastructure": 1, "overlong": 1, "ungraded": 1, "untrained": 0}


def test_the_caller_chooses_what_is_masked():
    episodes = [episode(0.25, masked="timeout"), episode(0.5, masked="infrastructure"),
                episode(None, masked="truncated"), episode(1.0)]
    rewards, counts = masked_rewards(episodes, ["infrastructure"])
    np.testing.assert_array_equal(rewards, [0.25, NAN, NAN, 1.0])
    assert counts == {"infrastructure": 1, "ungraded": 1, "untrained": 0}
    assert masked_rewards(episodes[:1], ())[0].tolist() == [0.25]


def test_overlong_is_the_trainers_own_limit():
    episodes = [episode(1.0, n=5), episode(0.0, n=6), episode(0.0, n=9, masked="timeout")]
    rewards, counts = masked_rewards(episodes, max_tokens=5)
    np.testing.assert_array_equal(rewards, [1.0, NAN, NAN])
    assert (counts["overlong"], counts["timeout"]) == (1, 1)
    with pytest.raises(ValueError, match="max_tokens=5.*'overlong' is not in masks"):
        masked_rewards(episodes, ["timeout"], 5)


def test_unknown_reasons_are_errors():
    with pytest.raises(ValueError, match=r"task t1: info\['masked'\] is 'bored': one of truncated"):
        masked_rewards([episode(1.0, masked="bored")])
    with pytest.raises(ValueError, match="info.*is True"):
        masked_rewards([episode(1.0, masked=True)])
    with pytest.raises(ValueError, match="masks: 'cap': one of"):
        masked_rewards([], [*MASK_REASONS, "cap"])


def test_batch_std_by_hand():
    # rewards 1, 0, 0, 1: mean 0.5, sample variance 4 * 0.25 / 3 = 1/3
    out = batch_std([[1, 0, NAN], [0, 1]], eps=0)
    np.testing.assert_allclose(out[0], [0.5 * math.sqrt(3), -0.5 * math.sqrt(3), 0], rtol=1e-6)
    np.testing.assert_allclose(out[1], [-0.5 * math.sqrt(3), 0.5 * math.sqrt(3)], rtol=1e-6)
    assert [a.tolist() for a in batch_std([[NAN], [1.0]])] == [[0.0], [0.0]]
    # the dead group counts in the spread: 1, 0, 1, 1 has 1/2
    (a, b), live = group_advantages([[1, 0], [1, 1]], "batch_std")
    np.testing.assert_allclose(a, [1, -1], rtol=1e-5)
    assert b.tolist() == [0, 0] and live.tolist() == [True, False]


def test_pass_rate_factors_by_hand():
    # smoothed: 1 of 3 -> 1.5/4, 4p(1-p) = 15/16; 2 of 4 -> 2.5/5, 1; their mean is 31/32
    np.testing.assert_allclose(pass_rate_factors([[1, 0, 0, NAN], [1, 1, 0, 0]]), [30 / 31, 32 / 31])
    np.testing.assert_allclose(pass_rate_factors([[1, 0, 0], [1, 1, 0, 0]], strength=0), [1, 1])
    # nobody passes: p = 1/6, 4p(1-p) = 5/9; half do: 1; their mean is 7/9
    np.testing.assert_allclose(pass_rate_factors([[0.2, 0.7], [1, 0]]), [5 / 7, 9 / 7])
    assert len(pass_rate_factors([])) == 0


def test_entropy_factors_by_hand():
    # mean of 0.2, 0.4, 0.6 is 0.4
    a, b = entropy_factors([[0.2, 0.4], [0.6, NAN]])
    np.testing.assert_allclose(a, [0.5, 1.0])
    np.testing.assert_allclose(b, [1.5, 1.0])
    np.testing.assert_allclose(entropy_factors([[0.0, 0.2, 0.4]], limit=1.5)[0], [1 / 1.5, 1.0, 1.5])
    assert entropy_factors([[0.0, 0.0]])[0].tolist() == [1, 1] and entropy_factors([]) == []
    with pytest.raises(ValueError, match="limit 0.5"):
        entropy_factors([[1.0]], 0.5)
    with pytest.raises(ValueError, match="entropy -1.0"):
        entropy_factors([[-1.0]])


def test_scaling_is_off_unless_asked_for():
    rewards = [[1, 0], [1, 1], [1, 0, 0]]
    plain, live = group_advantages(rewards)
    for a, r in zip(plain, rewards):
        np.testing.assert_array_equal(a, dr_grpo(r) if r != [1, 1] else [0, 0])
    scaled, _ = group_advantages(rewards, pass_rate=1.0)
    f = pass_rate_factors([rewards[0], rewards[2]])              # the dead group takes no part
    for a, b, g in zip(scaled, plain, (f[0], 1, f[1])):
        np.testing.assert_allclose(a, b * g, rtol=1e-6)
    hesitant, _ = group_advantages(rewards, entropies=[[0.3, 0.1], [9.0, 9.0], [0.1, 0.1, 0.4]])   # mean of live: 0.2
    np.testing.assert_allclose(hesitant[0], [0.5 * 1.5, -0.5 * 0.5], rtol=1e-6)
    np.testing.assert_allclose(hesitant[2], [2 / 3 * 0.5, -1 / 3 * 0.5, -1 / 3 * 2], rtol=1e-6)
    assert hesitant[0].dtype == scaled[0].dtype == np.float32


def test_entropies_must_fit_the_rewards():
    with pytest.raises(ValueError, match="entropies of 1 groups, rewards of 2"):
        group_advantages([[1, 0], [1, 0]], entropies=[[1, 1]])
    with pytest.raises(ValueError, match="group 1: 1 entropies, 2 rewards"):
        group_advantages([[1, 0], [1, 0]], entropies=[[1, 1], [1]])
    with pytest.raises(ValueError, match="group 0: rollout 1 is graded, but has no entropy"):
        group_advantages([[1, 0]], entropies=[[1, NAN]])
    masked, _ = group_advantages([[1, 0, NAN]], entropies=[[0.2, 0.2, 7.0]])   # what isn't graded has no say
    np.testing.assert_allclose(masked[0], [0.5, -0.5, 0])


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5: delta_1 = 2 - 1 = 1; delta_0 = 1 + 0.5 * 1 - 3 = -1.5; A_0 = -1.5 + 0.25 * 1
    a, returns = gae([1, 2], [3, 1], 0.5, 0.5)
    assert a.tolist() == [-1.25, 1.0] and returns.tolist() == [1.75, 2.0]
    # cut before the end, V of the last state 4: delta_1 = 2 + 0.5 * 4 - 1 = 3; A_0 = -1.5 + 0.25 * 3
    assert gae([1, 2], [3, 1], 0.5, 0.5, last=4)[0].tolist() == [-0.75, 3.0]
    # hindsight forecasts 5 for the second state: A_1 = 1; G_0 = 1 + 0.5 (0.5 * 5 + 0.5 * 2) = 2.75; A_0 = -0.25
    a, returns = gae([1, 2], [3, 1], 0.5, 0.5, hindsight=[9, 5])
    assert a.tolist() == [-0.25, 1.0] and returns.tolist() == [2.75, 2.0]


STEPS = st.integers(0, 7).flatmap(lambda n: st.tuples(*[st.lists(st.floats(-3, 3), min_size=n, max_size=n)] * 3))


@few
@given(STEPS, st.floats(0, 1), st.floats(0, 1), st.floats(-2, 2))
def test_gae_is_the_sum_of_its_definition(steps, gamma, lam, last):
    rewards, values, hindsight = steps
    following = np.append(values, last)
    delta = [r + gamma * following[t + 1] - following[t] for t, r in enumerate(rewards)]
    slow = [sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, len(delta))) for t in range(len(delta))]
    fast, returns = gae(rewards, values, gamma, lam, last)
    np.testing.assert_allclose(fast, slow, atol=1e-4)
    np.testing.assert_allclose(returns, np.add(slow, values), atol=1e-4)
    np.testing.assert_allclose(gae(rewards, values, gamma, lam, last, hindsight=values)[0], fast)
    told, plain = gae(rewards, values, gamma, 1.0, last, hindsight)[0], gae(rewards, values, gamma, 1.0, last)[0]
    np.testing.assert_allclose(told, plain, atol=1e-5)


def test_hindsight_as_forecast_changes_no_expected_advantage():
    # two steps; the second state's value is 0.5, its outcome a coin; hindsight knows the coin
    for lam in (0.0, 0.3, 1.0):
        one = lambda won, knows: gae([0, won], [0.2, 0.5], 1.0, lam, hindsight=[0.2, won] if knows else None)[0]
        plain, told = (np.mean([one(won, knows) for won in (0.0, 1.0)], 0) for knows in (False, True))
        np.testing.assert_allclose(told, plain, atol=1e-6)


@pytest.mark.parametrize("rewards, values, kw, message", [
    ([1, 2], [1], {}, r"values: shape \(1,\), rewards have \(2,\)"),
    ([1], [NAN], {}, "values: nan at step 0"),
    ([1, NAN], [1, 1], {}, "rewards: nan"),
    ([1], [1], dict(hindsight=[1, 2]), "hindsight: shape"),
    ([1, 1], [1, 1], dict(hindsight=[1, math.inf]), "hindsight: inf at step 1")])
def test_gae_names_what_is_wrong(rewards, values, kw, message):
    with pytest.raises(ValueError, match=message):
        gae(rewards, values, **kw)


def test_per_token_by_hand():
    assert per_token([0.5, -1], [0, 0, 0, 1, 3, 3], [0, 1, 1, 0, 0, 1]).tolist() == [0, 0.5, 0.5, 0, 0, -1]
    assert per_token([], [0, 0], [0, 0]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="3 values for 2 trained turns"):
        per_token([1, 2, 3], [0, 1], [1, 1])
    with pytest.raises(ValueError, match="1 turns, but a mask of 2"):
        per_token([1], [0], [1, 1])
