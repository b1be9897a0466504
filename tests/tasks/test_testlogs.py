"Others' logs: honest ones are read as their harness reads them, all others are ambiguous"
import ast
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.tasks.testlogs import BEGIN, CODE, END, Ambiguous, grade_log, read_pytest, read_unittest

ROOT = Path(__file__).parents[2]
F2P, P2P = ['t.py::test_a'], ['t.py::test_b', 't.py::test_c[x y]']


def log(listed, tail, code=None, before='', captured=''):
    "A log of pytest as SWE-bench's harness keeps it"
    lines = ['=== test session starts ===', 't.py ..F', captured, '=== short test summary info ===', *listed,
             f'=== {tail} in 0.05s ===']
    told = f'{CODE} {code}\n' if code is not None else ''
    return f'{before}\n{BEGIN}\n' + '\n'.join(lines) + f'\n{END}\n{told}'


ALL = ['PASSED t.py::test_a', 'PASSED t.py::test_b', 'PASSED t.py::test_c[x y]']


def test_an_honest_log_is_read():
    assert grade_log(log(ALL, '3 passed', 0), F2P, P2P).resolved
    said = grade_log(log([*ALL[1:], 'FAILED t.py::test_a - assert 1 - 2 == 3'], '1 failed, 2 passed', 1), F2P, P2P)
    assert not said.resolved and said.tests == {'t.py::test_a': False, 't.py::test_b': True, 't.py::test_c[x y]': True}
    assert grade_log(log(ALL, '3 passed, 2 warnings', 0), F2P, ['t.py::test_c[x']).resolved   # an id cut at a space
    assert not grade_log(log(ALL[1:], '2 passed', 0), F2P).resolved
    assert not grade_log('>>>>> Patch Apply Failed\n', F2P).resolved
    assert grade_log(log(ALL[:1] + ['XFAIL t.py::test_b - known'], '1 passed, 1 xfailed', 0), F2P, P2P[:1]).resolved
    teardown = log(['PASSED t.py::test_a', 'ERROR t.py::test_a - boom'], '1 passed, 1 error', 1)
    assert not grade_log(teardown, F2P).resolved
    skipped = log(['PASSED t.py::test_a', 'SKIPPED [2] t.py:3: no'], '1 passed, 2 skipped', 0)
    assert grade_log(skipped, F2P).resolved and not grade_log(skipped, F2P, P2P).resolved


def test_a_failing_part_of_a_test_fails_it():
    listed = [*ALL, 'SUBFAILED(i=1) t.py::test_a - AssertionError: x', 'SUBFAILED[some words] (i=2) t.py::test_a - y']
    assert grade_log(log(listed, '2 failed, 3 passed', 1), F2P, P2P).tests['t.py::test_a'] is False


GOOD = log(ALL, '3 passed', 0)
SPOILED = {
    'cut at the end': GOOD[:GOOD.index('=== 3 passed')],
    'cut before the end mark': GOOD.split(END)[0],
    'a line is missing': GOOD.replace('PASSED t.py::test_b\n', ''),
    'two runs': GOOD.replace(END, '') + GOOD,
    'two lists': GOOD.replace('t.py ..F', '=== short test summary info ===\nPASSED t.py::test_a'),
    'a printed end': GOOD.replace('t.py ..F', '=== 3 passed in 0.01s ==='),
    'two results': log(['PASSED t.py::test_a', 'FAILED t.py::test_a', 'PASSED t.py::test_b'], '1 failed, 2 passed', 1),
    'mixed lines': GOOD.replace('PASSED t.py::test_a\nPASSED', 'PASSED t.py::test_aPASSED'),
    'another exit code': log(ALL, '3 passed', 1),
    'the patch prints an exit code first': f'{CODE} 0\n' + log(ALL, '3 passed', 1),
    'a test prints an exit code': log(ALL, '3 passed', captured=f'{CODE} 0'),
    'a second begin': GOOD.replace('t.py ..F', BEGIN),
    'an early end mark': GOOD.replace('t.py ..F', END),
    'a test prints a mark of the harness': GOOD.replace('t.py ..F', '>>>>> Tests Errored'),
    'counts of another run': GOOD.replace('3 passed', '4 passed'),
    'an expected failure is no fix': log(['XFAIL t.py::test_a', *ALL[1:]], '2 passed, 1 xfailed', 0),
    'a cut id that could be two': log(['PASSED t.py::test_a', 'PASSED t.py::test_c[x 1]', 'FAILED t.py::test_c[x 2]'],
                                      '1 failed, 2 passed', 1)}


@pytest.mark.parametrize('name', SPOILED)
def test_logs_that_can_mean_two_things_are_refused(name):
    with pytest.raises(Ambiguous):
        grade_log(SPOILED[name], F2P, ['t.py::test_c[x'])


def test_captured_lines_are_not_results():
    text = log(['FAILED t.py::test_a'], '1 failed', 1, captured='PASSED t.py::test_a\nPASSED t.py::test_b')
    assert grade_log(text, F2P).tests == {'t.py::test_a': False}


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_cut_and_every_lost_or_doubled_line_is_seen(data):
    "No prefix of a log, and no log with one of its results lost or written twice, says that all passed"
    names = data.draw(st.lists(st.text('abc[]- :', min_size=1, max_size=8).map(lambda n: f't.py::{n.strip() or "x"}'),
                               min_size=1, max_size=6, unique=True))
    listed = [f'PASSED {name}' for name in names]
    text = log(listed, f'{len(names)} passed', 0)
    assert set(read_pytest(text.split(BEGIN)[1].split(END)[0], 0)) == set(names)
    draw = random.Random(data.draw(st.integers(0, 99)))
    line = draw.choice(listed) + '\n'
    inside = text.index(BEGIN) + len(BEGIN)
    cut = text[:draw.randrange(inside, text.index(END))]
    for other in (cut, text.replace(line, '', 1), text.replace(line, line * 2, 1)):
        with pytest.raises(Ambiguous):
            grade_log(other, names)


def test_verbose_lines_are_results_where_there_is_no_list():
    text = ('t.py::test_a PASSED                        [ 50%]\nt.py::test_c[x y] SKIPPED (no reason)      [100%]\n'
            '=== 1 passed, 1 skipped in 2.00s (0:00:02) ===\n')
    assert read_pytest(text) == {'t.py::test_a': 'PASSED', 't.py::test_c[x y]': 'SKIPPED'}
    with pytest.raises(Ambiguous):
        read_pytest(text.replace('test_a PASSED', 'test_a FAILED'))
    both = text.replace('=== 1 passed', '=== short test summary info ===\nPASSED t.py::test_a\nSKIPPED [1] t.py:1: no\n'
                        '=== 1 passed')
    assert read_pytest(both) == read_pytest(text)


def test_unittest():
    text = ('test_a (m.T) ... ok\nA line of words ... ok\ntest_c (m.T) ... skipped "why"\ntest_d (m.T) ... FAIL\n'
            '\nRan 4 tests in 0.1s\n\nFAILED (failures=1, skipped=1)\n')
    assert read_unittest(text, 1) == {'test_a (m.T)': 'PASSED', 'A line of words': 'PASSED', 'test_c (m.T)': 'SKIPPED',
                                      'test_d (m.T)': 'FAILED'}
    for old, new in (('Ran 4', 'Ran 5'), ('FAIL\n', 'ok\n'), ('failures=1', 'failures=2'), ('FAILED (', 'OK (')):
        with pytest.raises(Ambiguous):
            read_unittest(text.replace(old, new))
    with pytest.raises(Ambiguous):
        read_unittest(text, 0)


def test_what_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="no reader for logs of 'tap'"):
        grade_log(GOOD, F2P, runner='tap')
    with pytest.raises(ValueError, match='fail_to_pass is empty'):
        grade_log(GOOD, [], P2P)


def test_no_verdict_of_kat_is_read_from_a_log():
    "Nothing in kat imports this module, so that no environment's grade comes through it"
    users = [path.name for path in (ROOT/'kat').rglob('*.py') for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, (ast.Import, ast.ImportFrom)) and 'testlogs' in ast.unparse(node)]
    assert users == []
