"Intervals that cover, exact tests that are exact, and what a number of tasks can show"
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.study.compare import (KINDS_OF_TASKS, compare_outcomes, comparison_lines, coverage, exact_test,
                               independent_trials, least_difference, paired_interval, power, rate_interval,
                               smallest_difference, smallest_mean_difference, task_rates)
from kat.study.evaluate import wilson

OUTCOMES = st.dictionaries(st.text('abc', min_size=1, max_size=3), st.lists(st.booleans(), max_size=4), max_size=8)


def test_the_exact_test_counts_all_outcomes_of_a_coin():
    for n in range(9):
        tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
        for won in range(n + 1):
            extreme = sum(min(k, n - k) <= min(won, n - won) for k in tosses) / 2**n
            assert exact_test(won, n - won) == pytest.approx(extreme)
    assert exact_test(5, 0) > .05 >= exact_test(6, 0)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30))
def test_one_run_a_task_is_wilson(runs):
    outcomes = {str(i): [bool(x)] for i, x in enumerate(runs)}
    assert rate_interval(outcomes)[1:] == pytest.approx(wilson(sum(runs), len(runs)))


@given(OUTCOMES)
def test_intervals_hold_their_rate_and_stay_in_bounds(outcomes):
    if not any(outcomes.values()):
        with pytest.raises(ValueError, match='no task has a score'):
            rate_interval(outcomes)
        return
    rate, lo, hi = rate_interval(outcomes)
    rates, runs = task_rates(outcomes), sum(map(len, outcomes.values()))
    assert 0 <= lo <= rate <= hi <= 1 and rate == pytest.approx(rates.mean())
    assert len(rates) <= independent_trials(rates, runs) <= runs
    assert hi > lo                                              # a few runs never settle a rate


@settings(deadline=None, max_examples=50)
@given(OUTCOMES, OUTCOMES)
def test_comparing_is_symmetric(before, after):
    common = [t for t in before if before[t] and after.get(t)]
    if not common:
        with pytest.raises(ValueError, match='no task has a score in both'):
            compare_outcomes(before, after, n_boot=50)
        return
    one, other = compare_outcomes(before, after, n_boot=200), compare_outcomes(after, before, n_boot=200)
    assert one['n'] == len(common) and one['p'] == other['p'] and one['won'] == other['lost']
    assert one['only_before'] == other['only_after'] and one['before'] == other['after']
    value, lo, hi = one['difference']
    assert value == -other['difference'][0] and -1 <= lo <= value <= hi <= 1 and lo < hi
    assert all(isinstance(line, str) for line in comparison_lines(one))


def test_no_difference_is_not_a_certain_zero():
    for n in (5, 50, 500):
        value, lo, hi = paired_interval(np.zeros(n))
        assert value == 0 and -lo == pytest.approx(hi, abs=.02) and hi > 1 / n


@pytest.mark.parametrize('kinds', KINDS_OF_TASKS)
@pytest.mark.parametrize('runs', [1, 4])
def test_intervals_cover(kinds, runs):
    "600 evaluations: one standard error is 0.9 points; the full table is benchmarks/coverage.py's"
    found = coverage(KINDS_OF_TASKS[kinds], 60, runs, n_sim=600, n_boot=400)
    assert found['wilson'] > .915 and found['difference'] > .915
    if runs == 4 and kinds != 'even':
        assert found['pooled'] < .9                             # what this page is for


def test_power_is_that_of_the_test():
    "Summed over every table of outcomes"
    n, d, share = 12, .4, .6
    p = (share + d) / 2, (share - d) / 2
    total = 0
    for won in range(n + 1):
        for lost in range(n + 1 - won):
            ways = math.comb(n, won) * math.comb(n - won, lost)
            if won > lost and exact_test(won, lost) <= .05:
                total += ways * p[0]**won * p[1]**lost * (1 - share)**(n - won - lost)
    assert power(n, d, share) == pytest.approx(total)
    with pytest.raises(ValueError, match='difference <= discordant'):
        power(10, .5, .4)


@pytest.mark.parametrize('n, share', [(6, 0.), (6, 1.), (40, .1), (100, .5), (731, .2)])
def test_the_smallest_difference_is_the_smallest(n, share):
    d = smallest_difference(n, share)
    assert power(n, d, max(share, d)) >= .8 > power(n, d - 1e-4, max(share, d - 1e-4))
    assert d >= least_difference(n) * .5


def test_few_tasks_show_nothing():
    assert smallest_difference(5, .5) is None and least_difference(5) is None and least_difference(6) == 1
    assert 'nothing four times in five' in '\n'.join(comparison_lines(compare_outcomes({'a': [True]}, {'a': [False]})))
    assert smallest_mean_difference(np.zeros(9)) is None and smallest_mean_difference(np.ones(1)) is None


def test_the_smallest_mean_difference_is_found_four_times_in_five():
    draw, n = np.random.default_rng(0), 80
    noise = draw.normal(0, .35, (2000, n))
    said = np.mean([smallest_mean_difference(row) for row in noise[:100]])
    found = [abs(m) > 1.96 * s / n**.5 and m > 0 for m, s in zip((noise + said).mean(1), noise.std(1, ddof=1))]
    assert abs(np.mean(found) - .8) < .03 and said == pytest.approx(2.802 * .35 / n**.5, rel=.02)
