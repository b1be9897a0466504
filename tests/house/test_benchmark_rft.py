"The numbers of `benchmarks/rft.py`, by hand."
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rft  # noqa: E402


def test_a_rate_is_reached_when_the_last_updates_are_there_on_average():
    c = {"solved": [0.0] * 8 + [1.0] * 8, "tokens": [float(i) for i in range(1, 17)]}
    assert rft.reached(c, 0.5) == [12, 12.0] and rft.reached(c, 1.0) == [16, 16.0] and rft.reached(c, 1.01) is None


def test_runs_are_compared_at_the_same_update_of_rl():
    with_it = {"solved": [0.1, 0.1, 0.5, 0.6, 0.7], "rft_updates": 2}
    assert rft.ahead(with_it, {"solved": [0.4, 0.6, 0.8, 0.9, 0.9]}) == pytest.approx([0.1, 0.0, -0.1])


def test_tokens_as_logged_or_estimated():
    rows = [{"turns": 4.0, "trajectories": 10}, {"turns": 4.0, "trajectories": 10}, {"sampled_tokens": 7}]
    assert rft.tokens_of_rl(rows, (10, 12)) == [400, 440, 7]
    assert rft.tokens_of_rft(None, {"sampled_tokens": 5}) == 5


def test_gains_are_of_the_same_tasks_and_intervals_over_seeds_are_students():
    a, b = np.array([True, False] * 50), np.array([True] * 100)
    mean, low, high = rft.gain(a, b)
    assert mean == 0.5 and low < 0.45 and high > 0.55
    assert rft.over_seeds([1.0, 2.0, 3.0]) == pytest.approx([2.0, 2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5], abs=1e-3)
    assert rft.over_seeds([1.0]) == [1.0, None, None]
