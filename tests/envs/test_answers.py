"Tests that are data: one rule for limits, answers compared outside, and what is believed"
import asyncio
import json
from dataclasses import replace

import pytest
from grade_world import StallingPool
from hypothesis import given
from hypothesis import strategies as st

from kat.envs.answers import (
    DRAWS, SAFE_DRAWS, Check, Verdict, all_of, ask_job, beside_canaries, checks_of, decoded, encoded, fair_run,
    grade_answers, holds, judge_answers, together)
from kat.envs.base import InfraError
from kat.envs.sandbox import CAUSES, JobResult, Limits, WarmPool


@pytest.fixture(scope='module')
def pool():
    with WarmPool(workers=2, trust='generated') as made:
        yield made


# ---- limits

def ended(cause):
    return JobResult('ok' if cause is None else 'killed', cause=cause, error=cause)


@pytest.mark.parametrize('cause', [None, *CAUSES])
@pytest.mark.parametrize('again', [None, *CAUSES])
def test_who_is_to_blame(cause, again):
    for honest in (None, *CAUSES):
        blamed(cause, again, honest)


def blamed(cause, again, honest):
    runs, controls = iter([ended(cause), ended(again)]), []
    async def attempt():
        return next(runs)
    async def control():
        controls.append(1)
        return ended(honest)
    machine = {'wall', 'killed', 'worker'}
    if cause in machine and again in machine and honest:
        with pytest.raises(InfraError, match='honest control job'):
            asyncio.run(fair_run(attempt, control))
    else:
        assert asyncio.run(fair_run(attempt, control)) == ended(again if cause in machine else cause)
    assert len(controls) == (cause in machine)


def test_an_error_waits_for_what_runs_beside_it():
    done = []
    async def fails():
        raise InfraError('first')
    async def slow():
        for _ in range(5):
            await asyncio.sleep(0)
        done.append(1)
    with pytest.raises(InfraError, match='first'):
        asyncio.run(all_of([fails(), slow()]))
    assert done


WALL = Limits(memory_mb=256, cpu_s=1, wall_s=3)


def grade_one(pool, code, limits=WALL, right='def f(x): return x + 1'):
    checks = checks_of('t.py', 'from m import f\ndef test_1():\n    assert f(1) == 2\n')
    return asyncio.run(grade_answers(pool, {'m.py': code}, checks, {'m.py': right}, limits))


@pytest.mark.parametrize('code, cause', [
    ('import threading\ndef f(x): threading.Event().wait()', 'wall'),
    ('def f(x):\n    while True: pass', 'cpu'),
    ('def f(x): return "x" * 10**9', None),
    ('def f(x): print("x" * 10**6)', 'output'),
    ('import os\ndef f(x):\n    while True: os.fork()', None),   # the next fork is refused: an error of its own
    ('import os\ndef f(x): os.kill(os.getpid(), 9)', 'killed'),
    ('import os\ndef f(x): os.abort()', 'signal'),
])
def test_limits_that_the_code_spends_are_its_failure(pool, code, cause):
    limits = replace(WALL, wall_s=20) if cause != 'wall' else WALL
    verdict = grade_one(pool, code, limits)
    assert verdict.tests == {'t.py::test_1': False} and not verdict.passed and not verdict.tampered
    assert verdict.certain == (cause not in ('wall', 'killed')) and bool(verdict.failed) == (cause is not None)


def test_a_machine_that_stalls_gives_no_reward(pool):
    good = 'def f(x): return 1 + x'
    with pytest.raises(InfraError, match='control job'):
        grade_one(StallingPool(pool, lambda job: True), good)
    mine = StallingPool(pool, lambda job: job.files['m.py'] == good)
    assert grade_one(mine, good).failed == 'longer than 3 s' and not grade_one(mine, good).certain
    once = iter([True])
    assert grade_one(StallingPool(pool, lambda job: next(once, False)), good) == Verdict({'t.py::test_1': True})


# ---- tests that are data

@pytest.mark.parametrize('source, says', [
    ('x = 1\ndef test_1(): assert f() == 1', ':1: a test that is data'),
    ('def test_1():\n    x = f()\n    assert x == 1', 'test_1 must be one assertion'),
    ('def test_1(): f()', 'test_1 must be one assertion'),
    ('def test_1(): assert f() == g()', 'one expression with one literal'),
    ('def test_1(): assert 1 < f() < 3', 'one expression with one literal'),
    ('def test_1(): assert not f() == 3', 'one expression with one literal'),
])
def test_tests_that_are_not_data_are_refused(source, says):
    with pytest.raises(ValueError, match=says) as seen:
        checks_of('t.py', source)
    assert 't.py:' in str(seen.value)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                      lambda x: st.lists(x) | st.lists(x).map(tuple) | st.dictionaries(st.text() | st.integers(), x),
                      max_leaves=6)


@given(VALUES, VALUES)
def test_answers_are_equal_in_type_and_value(a, b):
    sent = json.loads(json.dumps(encoded(a)))
    assert decoded(sent) == a
    assert holds(Check('', '', 'x', '==', a), sent)
    same = json.dumps(encoded(a)) == json.dumps(encoded(b))
    assert holds(Check('', '', 'x', '==', b), sent) == same and holds(Check('', '', 'x', '!=', b), sent) != same
    assert not same or a == b


@pytest.mark.parametrize('compare, want, before, answer, good', [
    ('<', 9, False, 8, True), ('<', 9, False, 9, False), ('<', 9, True, 10, True), ('>=', 2, False, 2.5, True),
    ('<', 9, False, True, False), ('<', 9, False, '8', False), ('<', 9, False, None, False),
    ('in', 'a', True, 'cat', True), ('in', 'a', True, 'dog', False), ('in', [1, 2], False, 2, True),
    ('not in', [1, 2], False, 3, True), ('in', 'a', True, 7, False), ('in', 'a', True, {'object': 'str'}, False),
    ('is', None, False, None, True), ('is', True, False, 1, False), ('is not', None, False, {'object': 'E'}, False),
    ('truth', True, False, {'list': [0]}, True), ('truth', False, False, '', True),
    ('truth', True, False, {'object': 'E'}, False),
    ('==', 1, False, {'int': 1}, False), ('==', 1, False, {}, False), ('==', [], False, {'list': 3}, False),
    ('==', 1, False, {'list': [1], 'x': 2}, False), ('!=', 1, False, {'dict': 5}, False),
])
def test_comparisons(compare, want, before, answer, good):
    assert holds(Check('', '', 'x', compare, want, before), answer) is good


def test_deep_answers_do_not_break_the_grader():
    deep = []
    for _ in range(900):
        deep = {'list': [deep]}
    assert not holds(Check('', '', 'x', '==', 1), deep)


def test_expected_values_stay_here():
    tests = "from m import f\ndef test_1():\n    assert f(3) == 918273\ndef test_2():\n    assert f(4) == 'k9q'\n"
    checks = checks_of('t.py', tests)
    job = ask_job({'m.py': ''}, checks, WALL)
    sent = json.dumps([job.main, job.files, job.args])
    assert '918273' not in sent and 'k9q' not in sent and 'f(3)' in sent


def test_answers_that_nobody_asked_for_contradict_a_pass():
    checks = [Check('a', '', 'x', '==', 1), Check('b', '', 'y', '==', 2)]
    ok = lambda value: judge_answers(checks, JobResult('ok', value))
    assert ok({'0': 1, '1': 2}).passed
    assert ok({'0': 1, '1': 2, '2': 3}).tampered and not ok({'0': 1, '1': 2, '2': 3}).passed
    for value in ({'0': 1}, {'0': 1, '1': 3, '7': 1}, {}, None, [1, 2], 'ok', {'a': 1, 'b': 2}):
        assert not ok(value).passed and not ok(value).tampered
    assert not Verdict({}).passed and Verdict({}).grade().reward == 0


def test_verdicts_together():
    good, bad = Verdict({'b': True}), Verdict({'a': False}, failed='slow', certain=False)
    both = together([good, bad])
    assert list(both.tests) == ['a', 'b'] and not both.passed and both.failed == 'slow' and not both.certain
    assert together([good, Verdict({'c': True}, tampered='x')]).grade(patch={}).info == {'patch': {}, 'tampered': 'x'}


# ---- canaries that disturb

class Draws:
    "Gradings beside canaries of which only some draws are harmless"
    def __init__(self, rarity):
        self.rarity, self.seen, self.runs = rarity, [], 0

    def harmless(self, seed):
        "One draw in so many; none for 0"
        if seed not in self.seen:
            self.seen.append(seed)
        return self.rarity and (self.seen.index(seed) + 1) % self.rarity == 0

    async def grade(self, right, seed):
        self.runs += 1
        return Verdict({'test_a': bool(right and self.harmless(seed))})

    def verdict(self, right, safe, honest=True):
        control = (lambda seed: self.grade(honest, seed)) if right is not None else None
        return asyncio.run(beside_canaries(safe, lambda seed: self.grade(right is not False, seed), control))


@given(st.integers(1, DRAWS), st.lists(st.booleans(), max_size=20))
def test_a_verdict_is_of_the_state_and_not_of_the_canaries(rarity, states):
    draws, safe = Draws(rarity), []
    for right in states:
        assert draws.verdict(right, safe).passed == right
    assert all(map(draws.harmless, safe)) and len(safe) <= SAFE_DRAWS
    if len(safe) == SAFE_DRAWS:
        before = draws.runs
        assert not draws.verdict(False, safe).passed and draws.runs == before + 1   # paid for


def test_a_right_state_that_always_fails_is_no_verdict_on_another():
    draws, safe = Draws(0), []
    with pytest.raises(InfraError, match=f'fails beside {DRAWS} draws of canaries: test_a'):
        draws.verdict(False, safe)
    assert not draws.verdict(None, safe).passed and safe == []


def test_a_limit_is_not_asked_about_again():
    async def slow(seed):
        return Verdict({'test_a': False}, failed='slow')
    assert asyncio.run(beside_canaries([], slow, None)).failed == 'slow'
