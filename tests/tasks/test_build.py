"From a clone to tasks: every candidate ends as a task or with a reason, and a build that is killed goes on"

import json
import os
import re
import subprocess
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.envs.base import InfraError
from kat.tasks.build import (
    BUILD_STAGES,
    Dropped,
    Pair,
    Stages,
    Yard,
    build_tasks,
    funnel_text,
    part_of,
    take_apart,
    without_version,
)
from kat.tasks.funnel import short_reason
from kat.tasks.leaks import leak_report
from kat.envs.sandbox import Bubblewrap, features
from kat.strength.sources import commit_sources, commit_tree, find_candidates, load_commit, record_sources
from kat.tasks.statement import describe, differing_calls
from kat.tasks.software import patched, read_task, tree_patch
from kat.tasks.validate import ROUNDS, Outcomes, outcome, sort_tests

walls = pytest.mark.skipif(not features().works, reason='bubblewrap does not work here')
TESTS = """
import datetime, os, pytest
from calc import add
def test_add():
    assert add(1, 2) == 3
def test_zero():
    assert add(4, 0) == 4
def test_chance():
    assert os.urandom(1)[0] < 3
order = []
@pytest.mark.parametrize('number', range(6))
def test_order(number):
    order.append(number)
    assert order == list(range(number + 1))
def test_clock():
    assert datetime.date.today() < datetime.date.fromtimestamp(os.stat(__file__).st_mtime + 9e6)
def test_never():
    assert add(1, 1) == 3
"""


STEADY = re.sub(r'def test_chance.*?(?=order =)', '', TESTS, flags=re.S)


def git(folder, *arguments):
    env = dict(PATH=os.environ['PATH'], HOME=str(folder), GIT_CONFIG_NOSYSTEM='1')
    return subprocess.run(
        ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments],
        cwd=folder,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def commit(folder, **files):
    for path, text in files.items():
        where = folder / path.replace('__', '/').replace('_py', '.py').replace('_md', '.md')
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text)
    git(folder, 'add', '-A')
    git(folder, 'commit', '-qm', 'The fix is in calc.py')
    return git(folder, 'rev-parse', 'HEAD')


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A clone of a fix, documents only, a change that no test sees, and tests that can't be imported before it"
    folder = tmp_path_factory.mktemp('clone')
    git(folder, 'init', '-q')
    commit(
        folder, calc_py='def add(a, b):\n    return a - b\n', test_calc_py=TESTS.replace('3', '-1', 1), README_md='calc'
    )
    commit(folder, calc_py='def add(a, b):\n    return a + b\n', test_calc_py=TESTS, README_md='calc adds')
    commit(folder, README_md='calc adds well')
    commit(folder, calc_py='def add(a, b):\n    return b + a\n', test_calc_py=STEADY)
    commit(
        folder,
        calc_py='def add(a, b):\n    return b + a\ndef twice(a):\n    return 2 * a\n',
        test_calc_py=STEADY + 'from calc import twice\n',
    )
    return folder


def environment(pair, folder):
    "The packages of the interpreter that runs the tests, as a site"
    where = Path(folder) / 'sites'
    where.mkdir(exist_ok=True)
    if not (where / 'here').exists():
        os.symlink(sysconfig.get_path('purelib'), where / 'here')
    return dict(site='here', pins=[])


def yard_of(folder, **changes):
    return replace(Yard(folder, Bubblewrap(), load_commit, environment, describe), **changes)


# ---- a whole build


@walls
def test_every_candidate_ends_as_a_task_or_with_its_reason_and_a_killed_build_goes_on(clone, tmp_path):
    stages = Stages(tmp_path / '.funnel.db')
    found = commit_sources(clone, repo='me/calc')
    assert len(found) == 3
    gone = ('gone-1', {**found[0][1], 'commit': 'f' * 40})
    needy = ('needy-1', {**found[2][1], 'needs': ['a package']})
    stages.add([*found, gone, needy])

    def killed(*arguments):
        raise KeyboardInterrupt

    def install(pair, folder):
        if len(pair.needs) > 1:
            raise Dropped(f'its packages cannot be installed: {pair.needs[1]}')
        return environment(pair, folder)

    yard = yard_of(tmp_path, install=install, rounds=ROUNDS[::2])
    with pytest.raises(KeyboardInterrupt):
        build_tasks(stages, replace(yard, describe=killed), 1, lambda text: None)
    assert not list(tmp_path.glob('*/task.json'))
    runs = []

    def load(source, name):
        runs.append(name)
        return load_commit(source, name)

    assert build_tasks(stages, replace(yard, load=load), 1, lambda text: None) == []
    rows = {r['id']: (r['stage'], short_reason(r['reason'])) for r in stages.rows()}
    twice, swapped, fix = (name for name, _ in found)
    assert rows == {
        fix: ('gates', ''),
        'gone-1': ('load', 'git ls-tree'),
        swapped: ('once', 'no test fails before the fix'),
        twice: ('once', 'no test fails before the fix, but its file cannot be importe'),
        'needy-1': ('install', 'its packages cannot be installed'),
    }
    assert re.search(r'^load +5 +4 .*\n +-1 +git ls-tree$', funnel_text(stages.rows()), re.M)
    task = read_task(tmp_path / fix)
    others = {
        name.split('_')[-1]: why for why, names in stages.done(fix)['repeat'][1]['others'].items() for name in names
    }
    assert task.fail_to_pass == ('test_calc.py::test_add',) and 'test_calc.py::test_zero' in task.pass_to_pass
    assert others['order[5]'] == 'unstable: order' and others['clock'] == 'unstable: clock'
    assert others['never'] == 'fails with the fix'
    assert re.match('unstable: |fails with the fix', others['chance'])  # by chance the one or the other
    assert '`add(1, 2)` returns `-1`; it should return `3`' in task.statement
    assert task.info['gates'] == dict(gold='passed', empty='passed', tests='passed', comment='passed')
    assert b'a + b' not in b''.join(p.read_bytes() for p in (tmp_path / fix / 'base').rglob('*') if p.is_file())
    assert 'COPY' in (tmp_path / fix / 'Dockerfile').read_text()


def test_an_unexpected_error_is_told_and_not_the_end_of_a_candidate(clone, tmp_path):
    stages = Stages(tmp_path / '.funnel.db')
    stages.add(commit_sources(clone)[:2])

    def broken(source, name):
        raise InfraError('the index answers 503') if name == commit_sources(clone)[0][0] else ZeroDivisionError()

    said = []
    failed = build_tasks(stages, Yard(tmp_path, None, broken, environment, describe), 2, said.append)
    assert len(failed) == len(said) == 2 and any('503' in why for _, why in failed)
    assert all(row['stage'] == '' for row in stages.rows()) and '2 not finished' in funnel_text(stages.rows())


# ---- rows


def test_restart_forgets_a_stage_and_those_after_it(tmp_path):
    stages = Stages(tmp_path / 'funnel.db')
    stages.add([('a', {'x': 1}), ('b', {})])
    for stage in BUILD_STAGES[:4]:
        stages.note('a', stage, 1, {'of': stage})
    stages.note('b', 'load', 1, reason='gone')
    stages.restart('install', ['a'])
    assert list(stages.done('a')) == ['load', 'split'] and stages.done('b')
    stages.add([('a', {'x': 2}), ('b', {})])
    assert not stages.done('a') and stages.done('b')
    with pytest.raises(ValueError, match='no stage'):
        stages.restart('never')


# ---- the parts of a pair


def tree(**files):
    return {name.replace('__', '/').replace('_py', '.py'): (text.encode(), 'file') for name, text in files.items()}


def test_fix_and_tests_are_told_apart():
    old = {
        path: (text.encode(), 'file')
        for path, text in {
            'pkg/a.py': 'x = 1\n', 'pkg/__init__.py': '', 'tests/test_a.py': '', 'setup.py': '1', 'CHANGES.md': '1.0',
            'pkg.egg-info/PKG-INFO': '', 'docs/conf.py': '1'}.items()
    }
    fresh = {
        'pkg/a.py': 'x = 2\n', 'tests/test_a.py': 'import pkg', 'setup.py': '2', 'CHANGES.md': '1.1: x is 2',
        'pkg/data.txt': '2', 'tests/data.bin': '\0', 'docs/conf.py': '2'}
    new = {**old, **{path: (text.encode(), 'file') for path, text in fresh.items()}}
    parts = take_apart(Pair('a-1', 'a', old, new))
    assert sorted(parts.tests) == ['tests/data.bin', 'tests/test_a.py']
    assert patched(parts.base, parts.patch) == parts.gold and parts.gold['pkg/a.py'][0] == b'x = 2\n'
    assert parts.gold['CHANGES.md'][0] == b'1.0' and parts.gold['docs/conf.py'][0] == b'1' == parts.gold['setup.py'][0]
    assert 'pkg/data.txt' in parts.gold and not any('egg-info' in p for p in parts.base)


@pytest.mark.parametrize(
    'old, new, reason',
    [
        (dict(a_py='1', test_a_py='1'), dict(a_py='2', test_a_py='1'), 'no test differs'),
        (dict(a_py='1', test_a_py='1'), dict(a_py='1', test_a_py='2'), 'no code differs'),
        (dict(a_py='1'), dict(a_py='2'), 'no tests in it'),
        (dict(a_py='1', test_a_py='1'), dict(a_py='2\n' * 2000, test_a_py='2'), 'too large'),
        (dict(a_py='1', test_a_py='1', b__a_py='x = 2'), dict(a_py='x = 2', test_a_py='2', b__a_py='x = 2'),
         'b/a.py of the base holds the fix'),
        (dict(a_py='v = "1.0"\n', test_a_py='1'), dict(a_py='v = "1.1"\n', test_a_py='2'), 'no code differs'),
    ],
)
def test_a_pair_that_is_no_task_says_why(old, new, reason):
    with pytest.raises(Dropped, match=reason):
        take_apart(Pair('a-1.1', 'a', tree(**old), tree(**new), versions=('1.0', '1.1')))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(['a = 1', 'b = 2', "v = '1.0'", "v = '1.1'", 'x = (1, 0)', '']), max_size=8),
    st.lists(st.sampled_from(['a = 1', 'b = 3', "v = '1.0'", "v = '1.1'", 'x = (1, 1)', '']), max_size=8),
)
def test_a_file_keeps_every_change_but_that_of_the_version(old, new):
    old, new = ('\n'.join(lines).encode() for lines in (old, new))
    done = without_version(old, new, ('1.0', '1.1'))
    plain = lambda text: text.replace(b'1.1', b'1.0').replace(b'(1, 1)', b'(1, 0)')
    assert (
        plain(done) == plain(new)
        and without_version(old, new, ()) == new
        and without_version(old, old, ('a', 'b')) == old
    )


def test_what_a_file_is():
    assert part_of('pkg/tests/data/x.json', ()) == 'test' and part_of('conftest.py', ()) == 'test'
    assert part_of('pyproject.toml', ()) == 'rest' and part_of('examples/a.py', ()) == 'rest'
    assert part_of('lib/a.js', (), 'javascript') == 'code' and part_of('dist/a.js', (), 'javascript') == 'rest'
    assert part_of('x.dist-info/RECORD', ()) == 'artefact'


# ---- outcomes


def test_only_what_is_the_same_in_all_runs_counts():
    def runs(**outcomes):
        return [Outcomes({f't.py::{n}': o[i] for n, o in outcomes.items() if o[i] != '-'}) for i in range(3)]

    full = dict(p=['passed'] * 3, f=['failed'] * 3, s=['other'] * 3, x=['passed', 'passed', 'failed'], g=['-'] * 3)
    before = runs(a=full['f'], b=full['p'], c=full['x'], d=full['p'], e=full['g'], k=full['s'])
    after = runs(a=full['p'], b=full['p'], c=full['p'], d=full['f'], e=full['p'], k=full['p'])
    found = sort_tests(before, after)
    assert found.fail_to_pass == ('t.py::a',) and found.pass_to_pass == ('t.py::b',)
    assert found.others == {
        'unstable': ['t.py::c'],
        'fails with the fix': ['t.py::d'],
        'not there before the fix': ['t.py::e'],
        'skipped before the fix': ['t.py::k'],
    }
    lost = sort_tests([replace(run, missing=('t.py',)) for run in before], after)
    assert lost.others['its file cannot be imported before the fix'] == ['t.py::a', 't.py::b', 't.py::e', 't.py::k']


def test_words_for_outcomes():
    assert outcome([['setup passed', 'call passed', 'teardown passed']]) == 'passed'
    assert outcome([['setup passed', 'call passed', 'call failed', 'teardown passed']]) == 'failed'  # a subtest
    assert outcome([['setup passed', 'call passed', 'teardown failed']]) == 'failed'
    assert (
        outcome([['setup passed', 'xfail', 'teardown passed']])
        == outcome([['setup skipped', 'teardown passed']])
        == 'other'
    )
    assert len({c.zone for c in ROUNDS}) == len({c.order for c in ROUNDS}) == 3 and any(c.days for c in ROUNDS)


# ---- sources


def test_a_clone_is_read_as_it_is(clone):
    sources = dict(commit_sources(clone))
    assert all(s['kind'] == 'commit' for s in sources.values())
    newest = commit_tree(clone, 'HEAD')
    assert newest['README.md'][0] == b'calc adds well' and '.git' not in newest
    with pytest.raises(Dropped, match='no commit'):
        commit_tree(clone, '--output=/tmp/x')
    with pytest.raises(ValueError, match='not a clone'):
        commit_sources(clone.parent / 'none')


def test_records_are_built_from_a_clone(clone, tmp_path):
    ((name, source),) = commit_sources(clone)[-1:]
    pair = load_commit(source, name)
    parts = take_apart(pair)
    tests = patched({}, '')

    row = dict(
        instance_id='me__calc-1',
        repo='me/calc',
        base_commit=source['base'],
        patch=parts.patch,
        test_patch=tree_patch(parts.gold, {**parts.gold, **parts.tests}),
        problem_statement='add subtracts',
    )
    path = tmp_path / 'rows.jsonl'
    path.write_text(json.dumps(row) + '\n')
    ((name, made),) = record_sources(path, clone)
    again = load_commit(made, name)
    assert again.statement == 'add subtracts' and take_apart(again).patch == parts.patch and not tests
    path.write_text(json.dumps({**row, 'patch': None}) + '\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:1: field 'patch' must be a text"):
        record_sources(path, clone)
    with pytest.raises(Dropped, match='patch does not apply'):
        load_commit({**made, 'patch': parts.patch.replace('a - b', 'a / b')}, name)


@pytest.mark.parametrize(
    'source, options, message',
    [
        ('x.jsonl', {}, 'need --clone'),
        ('x.txt', {}, 'expected a plan'),
        ('x.toml', dict(needs=('a',)), '--need is for clones'),
        ('x.toml', dict(clone='y'), '--clone is for records'),
    ],
)
def test_a_source_that_is_none_is_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        find_candidates(source, **options)


# ---- statements


def test_calls_that_differ_and_what_is_left_out():
    old = [['f', '1', 'returns', '2'], ['f', '2', 'returns', '3'], ['g', '', 'returns', '1'], ['g', '', 'returns', '2']]
    new = [
        ['f', '1', 'raises', 'E: x'],
        ['f', '2', 'returns', '3'],
        ['g', '', 'returns', '3'],
        ['h', '', 'returns', '3'],
    ]
    assert differing_calls(old, new) == [('f', '1', ('returns', '2'), ('raises', 'E: x'))]


def test_leaks_are_told():
    gold = (
        'diff --git a/a.py b/a.py\n--- a/a.py\n+++ b/a.py\n@@ -1 +1 @@\n'
        '-    return a - b\n+    return add_up(a, b, start=0)\n'
    )
    leaks = leak_report('Use add_up(a, b, start=0), as test_sum shows.', gold, ['t.py::test_sum[1]'])
    assert leaks['fresh_run'] >= 9 and leaks['names'] == ['add_up', 'start'] and leaks['tests'] == ['test_sum']
    assert leak_report('It returns -1.', gold, ['t.py::test_sum'])['fresh_run'] <= 1


def test_every_patch_between_two_trees_can_be_measured():
    "Also what git writes for binary files, links, modes, odd names and files without a last line's end"
    lines = [b'--- a/x', b'+++ b/x', b'@@ -1 +1 @@', b'diff --git a/x b/x', b'a\rb', b'\x0c', b'', 'é'.encode()]
    odd = {
        'plain.py': (b'\n'.join(lines), 'file'),
        'a "b"\té.py': (b'x = 1\n', 'program'),
        'link': (b'plain.py', 'link'),
        'picture.png': (bytes(range(256)) * 4, 'file'),
        'empty.py': (b'', 'file'),
    }
    other = {p: (c[::-1] if k == 'file' else c, 'program' if k == 'program' else 'file') for p, (c, k) in odd.items()}
    for old, new in (({}, odd), (odd, {}), (odd, other), (other, odd), ({}, {'x.py': (b'\xff\n', 'file')})):
        assert leak_report('knots', tree_patch(old, new))['fresh_run'] == 0
