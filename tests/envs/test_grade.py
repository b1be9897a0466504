"Tests that are code: trees, canaries, and what is believed"
import ast
import asyncio
import os
import random
import textwrap

from dataclasses import replace
from pathlib import Path

import pytest
from grade_attacks import EXPECTED, FIX, REPO, TEST_ADD
from hypothesis import given
from hypothesis import strategies as st

from kat.envs import answers
from kat.envs.base import InfraError
from kat.envs.grade import (
    PASSED, Suite, Verdict, decides, grade_tests, hides, import_folders, judge_tests, known_modules, merge_trees,
    plant, prepare_tree, read_reports, read_tree, write_tree)
from kat.envs.sandbox import Bubblewrap, Limits, features

bwrap = pytest.mark.skipif(not features().works, reason=f'bubblewrap does not work here: {features().reason}')
CODE_LIMITS = Limits(memory_mb=2048, cpu_s=20, wall_s=120, processes=32, output_kb=256, files_mb=64)


# ---- trees

NAMES = st.sampled_from(['a', 'b.py', 'tests', 'conftest.py', 'json.py', 'x.pth', 'pkg', '__init__.py', 'test_a.py'])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map('/'.join)
TREES = st.dictionaries(PATHS, st.tuples(st.binary(max_size=3), st.sampled_from(['file', 'program', 'link', 'odd'])))


def possible(tree):
    "Without a path below another"
    return {p: t for p, t in tree.items() if not any(str(q) in tree for q in Path(p).parents)}


@given(TREES.map(possible), TREES.map(possible))
def test_what_decides_is_the_tasks_own(base, agent):
    deciding = lambda p: decides(p) or p not in base and hides(p, known_modules([]), ('.',), base)
    kept, restored = merge_trees(base, agent, deciding)
    assert kept == possible(kept) and len(restored) == len(set(restored))
    for path in {*base, *agent, *kept}:
        if decides(path):
            assert kept.get(path) == base.get(path)
        if agent.get(path) != kept.get(path):
            assert path in restored
        assert kept.get(path) in (base.get(path), agent.get(path))
        assert not (path in kept and path not in base and kept[path][1] in ('link', 'odd'))
    assert merge_trees(base, base, deciding) == (base, [])


def test_trees_are_read_and_written(tmp_path):
    tree = {'a/b.bin': (bytes(range(256)), 'file'), 'run.sh': (b'#!/bin/sh\n', 'program'), 'to': (b'a/b.bin', 'link')}
    write_tree(tree, tmp_path)
    (tmp_path/'a/__pycache__').mkdir()
    (tmp_path/'a/__pycache__/b.cpython-311.pyc').write_bytes(b'x')
    (tmp_path/'.git').mkdir()
    os.symlink('/etc', tmp_path/'folder')
    os.mkfifo(tmp_path/'pipe')
    assert read_tree(tmp_path) == tree | {'folder': (b'/etc', 'link'), 'pipe': (b'', 'odd')}


@pytest.mark.parametrize('path, wanted', [
    ('json.py', True), ('src', False), ('json/data.txt', False), ('attr/more/x.py', False),
    ('src/pytest.py', True), ('_pytest/x.py', True), ('pytest.cpython-311-x86_64-linux.so', True),
    ('pkg/json.py', False), ('mine.py', False), ('json.txt', False), ('attr/new.py', False), ('docs/code.py', False)])
def test_new_modules_may_not_hide_known_ones(path, wanted):
    known = known_modules([]) | {'pytest', '_pytest', 'attr'}
    assert hides(path, known, ('.', 'src'), {'attr/__init__.py': (b'', 'file')}) == wanted


@bwrap
def test_a_module_beside_a_test_may_not_hide_a_known_one_either(tmp_path):
    "pytest puts the folder of a test file before all others"
    test = 'import statistics\nfrom calc import add\ndef test_a():\n    assert statistics.mean([add(1, 2), 3]) == 3\n'
    repo = {'lib/calc.py': 'def add(a, b): return a - b\n', 'lib/test_calc.py': test,
            'pkg/__init__.py': '', 'pkg/sub/__init__.py': '', 'pkg/sub/test_b.py': ''}
    files = lambda **more: {p: (x.encode(), 'file') for p, x in {**repo, **more}.items()}
    write_tree(files(), tmp_path)
    suite = Suite(tmp_path, ('lib/test_calc.py::test_a',), limits=CODE_LIMITS)
    gold = files(**{'lib/calc.py': 'def add(a, b): return a + b\n', 'pkg/sub/statistics.py': ''})
    forged = files(**{'lib/statistics.py': 'mean = lambda x: 3\n'})
    right, wrong = (asyncio.run(grade_tests(suite, tree, gold, Bubblewrap())) for tree in (gold, forged))
    assert right.passed and not right.restored
    assert not wrong.passed and wrong.restored == ('lib/statistics.py',)
    shape = {p: t for p, t in files().items() if p != 'pkg/sub/__init__.py'}
    assert import_folders(shape, ['pkg/sub/test_b.py']) == {'pkg/sub'}
    assert import_folders(files(), ['pkg/sub/test_b.py']) == {'.'}


def test_what_cannot_be_read_does_not_cross(tmp_path, monkeypatch):
    "Files without end, files that nobody may read, names that are no text"
    (tmp_path/'base').mkdir()
    (tmp_path/'agent').mkdir()
    tree = {'a.py': (b'1', 'file'), 'test_a.py': (b'def test_a():\n    assert 1 == 1\n', 'file')}
    write_tree(tree, tmp_path/'base')
    write_tree(tree, tmp_path/'agent')
    with open(tmp_path/'agent/a.py', 'wb') as file:
        file.truncate(1 << 40)
    (tmp_path/'agent/closed').write_text('x')
    (tmp_path/'agent/closed').chmod(0)
    Path(os.fsdecode(os.fsencode(tmp_path/'agent') + b'/\xff_conftest.py')).write_text('')
    left = read_tree(tmp_path/'agent')
    assert left['a.py'] == (b'', 'unread') and left['closed'][1] == ('file' if os.geteuid() == 0 else 'unread')
    suite = Suite(tmp_path/'base', ('test_a.py::test_a',))
    done = prepare_tree(suite, left, [], random.Random(0))
    assert done.tree['a.py'] == (b'1', 'file') and 'a.py' in done.restored
    monkeypatch.setattr('kat.envs.grade.TREE_MB', 0)
    with pytest.raises(InfraError, match='a.py of the task may not be read, or the task has more than 0 MB'):
        prepare_tree(suite, left, [], random.Random(0))


# ---- canaries

KINDS_OF_ASSERTION = '''
import unittest
import pytest

def three(): return 3
def fail(): raise ValueError('no')

def test_equal():
    assert three() == 3
def test_left():
    assert 3 == three(), "message"
def test_words():
    assert 'a' 'b' == "ab"
def test_truth():
    assert three()
def test_not():
    assert not (three() ==
                4)
def test_none():
    assert None is None
def test_bool():
    assert (three() == 3) is True
def test_dots():
    assert ... is Ellipsis and ... == ...
def test_plain_raises():
    from pytest import raises
    with raises(ValueError):
        fail()
def test_float():
    assert three() / 2 == 1.5
def test_list():
    assert [three()] == [3]
def test_empty():
    assert {} == {} and () == ()
def test_dict():
    assert {'a': three()} == {'a': 3}
def test_set():
    assert {three()} == {3}
def test_chain():
    assert 1 < three() < 4
def test_in():
    assert three() in (1, 2, 3)
def test_raises():
    with pytest.raises(ValueError):
        fail()
def test_raises_match():
    with pytest.raises(ValueError, match='no') as seen:
        fail()
    assert 'no' in str(seen.value)
def test_nothing():
    three()
def test_one_line(): assert three() == 3
def test_umlaut():
    assert 'äöü' == 'äöü'; assert three() == 3  # ü
def test_nested():
    def inner():
        return 4
    for i in range(2):
        assert inner() == 4
    assert inner() == 4
class TestOld(unittest.TestCase):
    def test_equal(self):
        self.assertEqual(three(), 3)
    def test_names(self):
        self.assertEqual(three(), three())
        self.assertTrue(three())
    def test_in(self):
        self.assertIn(3, [three()])
    def test_raises(self):
        with self.assertRaises(ValueError):
            fail()
    def test_is(self):
        self.assertIsNone(None)
        self.assertIsInstance(3, int)
        self.assertNotAlmostEqual(3, 4)
        self.assertGreater(4, three())
    class Inner(unittest.TestCase):
        def test_deep(self):
            self.assertNotEqual(three(), 4)
async def test_async():
    assert three() == 3
'''
ALL = [n.name for n in ast.parse(KINDS_OF_ASSERTION).body if getattr(n, 'name', '').startswith('test')]
ALL += [f'TestOld::{n}' for n in ('test_equal', 'test_names', 'test_in', 'test_raises', 'test_is', 'Inner::test_deep')]


def call(source, name):
    "Run one test of a source; whether it passes"
    space = {'__name__': 'tests'}
    exec(compile(source, 'tests.py', 'exec'), space)
    *classes, func = name.split('::')
    try:
        if not classes:
            got = space[func]()
            return asyncio.run(got) is None if asyncio.iscoroutine(got) else True
        kind = space[classes[0]]
        for part in classes[1:]:
            kind = getattr(kind, part)
        getattr(kind(func), func)()
        return True
    except (AssertionError, ValueError):
        return False


@pytest.mark.parametrize('name', ALL)
def test_canaries_fail_where_their_originals_pass(name):
    assert call(KINDS_OF_ASSERTION, name)
    for seed in range(20):
        new, canaries, moved = plant(KINDS_OF_ASSERTION, {name}, random.Random(seed))
        assert len(canaries) == 1 + len(moved) and len(set(canaries)) == len(canaries)
        assert not any(call(new, c) for c in canaries), new
        assert call(new, moved.get(name, name))
        rest = [n for n in ALL if n != name]
        assert all(call(new, n) for n in random.Random(seed).sample(rest, 3))
        assert moved or name.count('::') or name == 'test_async' or KINDS_OF_ASSERTION.count(name) > 1


@pytest.mark.parametrize('source', [
    'def test_a():\n    yield 1\n', 'def test_a():\n    if x: return\n    assert f() == 1\n', 'x = 1\n', '',
    'class A:\n    test_a = 3\n', 'if x: \n    def test_a(): pass\n'])
def test_files_without_a_fit_test_stay_as_they_are(source):
    assert plant(source, {'test_a'}, random.Random(0)) == (source, [], {})


def test_tests_of_other_shapes_get_canaries_too():
    source = textwrap.dedent('''
        import pytest
        @pytest.mark.parametrize('x', [1,
                                       2])
        def test_a(x):
            assert x
        class TestB:

            @staticmethod
            def test_c():
                assert 1 == 1   # comment
        ''')
    for seed in range(20):
        new, canaries, moved = plant(source, {'test_a', 'TestB::test_c'}, random.Random(seed))
        ast.parse(new)
        assert len(canaries) == 1 and not moved and new.count('parametrize') + new.count('staticmethod') == 3


def test_a_test_that_other_classes_inherit_keeps_its_name():
    source = 'class TestA:\n    def test_b(self):\n        assert 1 == 1\n\nclass TestC(TestA):\n    pass\n'
    for seed in range(20):
        for taken, wanted in (((), {'TestA::test_b', 'TestC::test_b'}), (('test_b',), {'TestA::test_b'})):
            new, canaries, moved = plant(source, wanted, random.Random(seed), taken)
            assert canaries and not moved and new.count('def test_b(') == 1
    assert plant(source, {'TestA::test_b'}, random.Random(0))[2]


def test_names_that_are_drawn_differ_in_a_file_of_few_words():
    source = 'def test_a():\n    assert 1\n'
    for seed in range(50):
        new, canaries, moved = plant(source, {'test_a'}, random.Random(seed))
        assert len({*canaries, *moved.values()}) == 3 == new.count('def test_a')


# ---- what is believed

def message(name, *seen):
    return ['test', name, list(seen) or PASSED]


def judged(messages, code=1):
    expected = {'t.py::a': 't.py::a_moved', 't.py::b[1]': 't.py::b[1]'}
    return judge_tests(messages, code, expected, ['t.py::a', 't.py::c'], {'t.py'})


FAILED = ('setup passed', 'call failed', 'teardown passed')
SKIPPED = ('setup skipped', 'teardown passed')
GOOD = [['ready'], message('t.py::a_moved'), message('t.py::b[1]'), message('t.py::a', *FAILED),
        message('t.py::c[1]', *FAILED), message('t.py::other', 'setup failed'), ['exit', 1]]


def test_a_pass_is_believed_when_all_agrees():
    assert judged(GOOD) == Verdict({'t.py::a': True, 't.py::b[1]': True})


@pytest.mark.parametrize('n', [1, 2])
@pytest.mark.parametrize('other', [None, message('t.py::a_moved', 'setup passed'), message('t.py::b[1]', *SKIPPED),
                                   message('t.py::b[1]', 'setup passed', 'xfail', 'teardown passed')])
def test_without_every_expected_test_nothing_is_claimed(n, other):
    said = judged([*GOOD[:n], *([other] if other else []), *GOOD[n + 1:]])
    assert not said.passed and not said.tampered


@pytest.mark.parametrize('change, code', [
    (lambda m: m[:3] + m[4:], 1), (lambda m: m[:4] + m[5:], 1), (lambda m: m[:-1], 1), (lambda m: m, 0),
    (lambda m: m, -11),
    (lambda m: m[:-1] + [['exit', 0]], 0), (lambda m: m + [['exit', 1]], 1), (lambda m: m + [['disorder']], 1),
    (lambda m: m + [message('elsewhere.py::x')], 1), (lambda m: m + [message('t.py::c[2]')], 1),
    (lambda m: m + [message('t.py::a')], 1), (lambda m: m[:3] + [message('t.py::a', *SKIPPED)] + m[4:], 1)])
def test_a_claim_that_something_contradicts_is_tampered(change, code):
    said = judged(change(list(GOOD)), code)
    assert said.tampered and not said.passed and all(said.tests.values())


def test_only_signed_messages_in_order_count():
    import hashlib
    import hmac
    def signed(key, text):
        return f'{hmac.new(key, text.encode(), hashlib.sha256).hexdigest()} {text}'
    lines = [signed(b'k', '[0, "ready"]'), signed(b'x', '[1, "exit", 1]'), 'noise', '',
             signed(b'k', '[1, "exit", 1]'), signed(b'k', '[1, "exit", 0]')]
    assert read_reports('\n'.join(lines), b'k') == [['ready'], ['exit', 1], ['disorder']]


# ---- whole runs

def state(files):
    return {path: (text.encode(), 'file') for path, text in files.items()}


@pytest.fixture
def suite(tmp_path):
    write_tree(state(REPO), tmp_path)
    return Suite(tmp_path, tuple(EXPECTED), limits=CODE_LIMITS)


GOLD = state({**REPO, 'calc.py': FIX})


def run(suite, files, right=GOLD):
    return asyncio.run(grade_tests(suite, state(files), right, Bubblewrap()))


@bwrap
def test_gold_is_rewarded_and_the_bug_is_not(suite):
    for _ in range(3):
        said = run(suite, {**REPO, 'calc.py': FIX})
        assert said == Verdict(dict.fromkeys(EXPECTED, True))
    said = run(suite, REPO)
    assert not said.passed and not said.tampered and said.certain and sum(said.tests.values()) == 5


@bwrap
def test_hidden_tests_are_laid_over_and_not_listed(suite, tmp_path):
    more = 'from calc import add\ndef test_x():\n    assert add(4, 4) == 8\n'
    hidden = replace(suite, tests={'tests/test_add.py': TEST_ADD, 'checks.py': more},
                     expected=(*EXPECTED, 'checks.py::test_x'))
    (tmp_path/'tests/test_add.py').write_text('')
    agent = {**REPO, 'tests/test_add.py': '', 'calc.py': FIX}
    assert run(hidden, agent) == Verdict(dict.fromkeys(hidden.expected, True))
    said = run(hidden, {**agent, 'checks.py': 'def test_x(): pass\n', 'calc.py': REPO['calc.py'], 'src/re.py': ''})
    assert said.restored == ('checks.py', 'src/re.py') and not said.passed


@bwrap
def test_what_fails_before_the_agents_code_ran_is_no_verdict(suite, tmp_path):
    with pytest.raises(InfraError, match='the runner did not start'):
        run(replace(suite, site=(tmp_path,)), REPO)
    (tmp_path/'pytest.ini').write_text('[pytest\nbroken')
    with pytest.raises(InfraError, match='the runner did not start'):
        run(suite, REPO)
    with pytest.raises(InfraError, match='the task has no tests/gone.py'):
        run(replace(suite, expected=('tests/gone.py::test_x',)), REPO)
    with pytest.raises(InfraError, match='no Python that can be read'):
        run(replace(suite, tests={'tests/test_add.py': 'def ('}), REPO)
    with pytest.raises(InfraError, match='canary'):
        run(replace(suite, tests={'tests/test_add.py': ''}, expected=('tests/test_add.py::test_x',)), REPO)


@pytest.mark.parametrize('expected', [(), ('tests/test_a.py',)])
def test_a_suite_names_its_tests(expected, tmp_path):
    with pytest.raises(ValueError, match='Suite.expected'):
        Suite(tmp_path, expected)


@bwrap
def test_slow_code_is_tried_beside_an_honest_run(suite):
    class Stalls(Bubblewrap):
        "Real runs, but those of chosen code are cut off by the wall limit"
        def __init__(self, *stalls):
            super().__init__()
            self.stalls, self.calls = iter(stalls), 0
        def exec(self, argv, work, *a, **kw):
            self.calls += 1
            got = super().exec(argv, work, *a, **kw)
            cut = dict(rc=-9, error='longer than 120 s', cause='wall')
            return replace(got, **cut) if next(self.stalls) in (True, (Path(work)/'calc.py').read_text()) else got
    def run_in(box):
        return asyncio.run(grade_tests(suite, state({**REPO, 'calc.py': FIX + '# mine'}), GOLD, box)), box.calls
    said, calls = run_in(Stalls(*[FIX + '# mine'] * 3))
    assert said == Verdict(dict.fromkeys(EXPECTED, True), failed='longer than 120 s', certain=False) and calls == 3
    assert not said.passed
    assert run_in(Stalls(True, False, False)) == (Verdict(dict.fromkeys(EXPECTED, True)), 3)
    with pytest.raises(InfraError, match='control job'):
        run_in(Stalls(True, True, True))


ONCE = """from calc import add
KNOWN = []
def test_added_once():
    KNOWN.append(1)
    assert add(1, 2) == 3
    assert len(KNOWN) == 1
def test_more():
    assert add(2, 2) == 4
"""


@bwrap
def test_a_test_that_its_copy_disturbs_does_not_cost_the_right_answer_its_reward(suite):
    names = 'test_once.py::test_added_once', 'test_once.py::test_more'
    once = replace(suite, tests={'test_once.py': ONCE}, expected=names)
    assert [run(once, {**REPO, 'calc.py': FIX}).passed for _ in range(4)] == [True] * 4
    assert not run(once, REPO).passed


@bwrap
def test_a_task_whose_own_fix_fails_has_no_verdict_but_of_the_fix(suite, monkeypatch):
    monkeypatch.setattr(answers, 'DRAWS', 2)
    with pytest.raises(InfraError, match=r'known to be right fails beside 2 draws of canaries: tests/test_add.py::'):
        run(suite, {**REPO, 'calc.py': REPO['calc.py'] + '# mine'}, right=state(REPO))
    assert not run(suite, REPO, right=state(REPO)).passed


def test_other_encodings_and_line_ends(tmp_path):
    text = '# -*- coding: latin-1 -*-\r\ndef test_ü():\r\n    assert "ä" == "ä"\r\n'
    base = {'test_a.py': (text.encode('latin-1'), 'file')}
    write_tree(base, tmp_path)
    done = prepare_tree(Suite(tmp_path, ('test_a.py::test_ü',)), base, [], random.Random(0))
    space = {}
    exec(compile(done.tree['test_a.py'][0], 'test_a.py', 'exec'), space)
    assert len(done.canaries) == 2 and space[done.expected['test_a.py::test_ü'].split('::')[1]]() is None


