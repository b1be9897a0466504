"Tests in JavaScript: what is found, what is run, what is rewarded"
import asyncio
import os
import random
from dataclasses import replace

import pytest
from node_attacks import ATTACKS, EXPECTED, FIX, REPO, TAPE_ATTACKS, TAPE_EXPECTED, TAPE_REPO, TOY_TAPE, tree

from kat.envs import node
from kat.envs.answers import Verdict
from kat.envs.base import InfraError
from kat.envs.grade import write_tree
from kat.envs.node import detect_node, find_node, has_node, read_scripts
from kat.envs.node_canaries import plant_scripts, script_tests
from kat.envs.node_runner import collect_tests, linked
from kat.envs.node_verdict import NodeSuite, grade_node, merge_agent
from kat.envs.sandbox import Bubblewrap, Limits, features
from kat.tasks.software import SoftwareTask, base_tree, gold_tree, grade_state, tree_patch, write_task

runs = pytest.mark.skipif(not (features().works and has_node()), reason='bubblewrap or node is not here')
LIMITS = Limits(memory_mb=4096, cpu_s=3, wall_s=12, processes=64, output_kb=256, files_mb=64)
WAITS = {'never settles': replace(LIMITS, wall_s=5), 'loops': replace(LIMITS, cpu_s=2)}  # first: others run meanwhile
BY_A_DRAW = 'one assertion does nothing the first time'  # caught where a canary comes before what it is a copy of
GOLD = tree(REPO, {'calc.js': FIX})


@pytest.fixture(scope='module')
def box():
    return Bubblewrap()


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A folder that holds node_modules with the toy"
    folder = tmp_path_factory.mktemp('site')
    toy = {'node_modules/tape/index.js': TOY_TAPE, 'node_modules/tape/package.json': '{"name": "tape"}'}
    write_tree(tree(toy), folder)
    return folder


async def some_at_a_time(work, names):
    free = asyncio.Semaphore((os.cpu_count() or 1) + 1)   # one waits for a limit most of the time
    async def one(name):
        async with free:
            return await work(name)
    return dict(zip(names, await asyncio.gather(*map(one, names))))


@pytest.fixture(scope='module')
def verdicts(tmp_path_factory, box):
    "What the grader says to every attack"
    base = tmp_path_factory.mktemp('base')
    write_tree(tree(REPO), base)
    def graded(name):
        suite = NodeSuite(base, EXPECTED, limits=WAITS.get(name, LIMITS))
        return grade_node(suite, tree(REPO, ATTACKS[name][1]) if name in ATTACKS else GOLD, GOLD, box)
    others = [name for name in ATTACKS if name not in WAITS]
    return asyncio.run(some_at_a_time(graded, [*WAITS, 'gold', *others, 'gold again']))


@runs
@pytest.mark.parametrize('name', [n for n, (kind, _) in ATTACKS.items() if kind == 'harness'])
def test_no_attack_on_the_harness_is_rewarded(name, verdicts):
    assert not verdicts[name].passed, verdicts[name]


@runs
def test_gold_is_rewarded_between_attacks(verdicts):
    for name in ('gold', 'gold again'):
        assert verdicts[name] == Verdict(dict.fromkeys(EXPECTED, True))


@runs
def test_hunters_and_attacks_on_weak_tests(verdicts):
    "What is sure to be caught"
    assert not [n for n, (kind, _) in ATTACKS.items() if kind != 'harness' and n != BY_A_DRAW and verdicts[n].passed]


@runs
def test_claims_are_flagged_and_failures_are_not(verdicts):
    for name in ('assert does nothing', 'one assertion does nothing'):
        assert verdicts[name].tampered, name
    for name in ('nothing', 'early exit', 'tests deleted', 'throws', 'loops', 'never settles'):
        assert not verdicts[name].tampered, name
    assert verdicts['loops'].failed


@runs
def test_what_was_put_back_is_listed(verdicts):
    settings = set(verdicts['scripts and settings'].restored)
    assert {'.npmrc', '.mocharc.json', 'node.config.json', 'package.json'} <= settings
    assert {'test/calc.test.js', 'test/more.test.mjs'} <= set(verdicts['test file rewritten'].restored)
    assert {'node_modules/assert/index.js', 'test/package.json'} <= set(verdicts['packages planted'].restored)
    assert 'evil.js' not in verdicts['scripts and settings'].restored


ONCE = """const calc = require('../calc');
const { test } = require('node:test');
const assert = require('node:assert');
const known = [];
test('is added once', () => { known.push(1); assert.equal(calc.add(1, 2), 3); assert.equal(known.length, 1); });
test('more', () => { assert.equal(calc.add(2, 2), 4); });
"""


@runs
def test_a_test_that_its_copy_disturbs_does_not_cost_the_right_answer_its_reward(tmp_path, box):
    write_tree(tree(REPO), tmp_path)
    names = 'test/once.test.js::is added once', 'test/once.test.js::more'
    suite = NodeSuite(tmp_path, names, tests={'test/once.test.js': ONCE.encode()}, limits=LIMITS)
    assert [asyncio.run(grade_node(suite, GOLD, GOLD, box)).passed for _ in range(4)] == [True] * 4
    assert not asyncio.run(grade_node(suite, tree(REPO), GOLD, box)).passed


@runs
def test_tape(tmp_path, box, site):
    write_tree(tree(TAPE_REPO), tmp_path)
    suite, gold = NodeSuite(tmp_path, TAPE_EXPECTED, site=site, limits=LIMITS), tree(TAPE_REPO, {'calc.js': FIX})
    def graded(name):
        return grade_node(suite, tree(TAPE_REPO, TAPE_ATTACKS[name]) if name in TAPE_ATTACKS else gold, gold, box)
    said = asyncio.run(some_at_a_time(graded, ['gold', *TAPE_ATTACKS]))
    assert said.pop('gold') == Verdict(dict.fromkeys(TAPE_EXPECTED, True))
    assert not [name for name, verdict in said.items() if verdict.passed]
    missing = {n for n, ok in said['nothing'].tests.items() if not ok}
    assert missing == {'test/calc.js::add', 'test/calc.js::add > below zero'}
    assert 'package.json' in said['called tape'].restored


@runs
def test_a_task_on_disk_is_graded(tmp_path, box):
    "The tests are hidden from the agent, and laid in at grading"
    tests = tree({k: v for k, v in REPO.items() if 'test' in k})
    base = {k: v for k, v in tree(REPO).items() if k not in tests}
    task = SoftwareTask('calc-1', 'calc', 'add subtracts', EXPECTED[1:3], EXPECTED[:1], language='javascript',
                        limits=dict(cpu_s=6, wall_s=20))
    folder = write_task(task, tmp_path, base, tests, tree_patch(base, base | tree({'calc.js': FIX})))
    assert asyncio.run(grade_state(folder, gold_tree(folder), box)).passed
    assert not asyncio.run(grade_state(folder, base_tree(folder), box)).passed


@runs
def test_a_package_is_understood(box):
    found = detect_node(tree(TAPE_REPO), box)
    assert (found.runner, found.files, found.needs) == ('tape', ('test/calc.js',), {'tape': '^5.0.0'})
    assert detect_node(tree(REPO), box).files == ('test/calc.test.js', 'test/more.test.mjs')
    for over, words in (({'package.json': None}, 'package.json is missing'),
                        ({'package.json': '[]'}, 'must be an object'),
                        ({'package.json': '{'}, 'not JSON'), ({'test/calc.js': 'broken ('}, 'no test file asks for')):
        with pytest.raises(ValueError, match=words):
            detect_node(tree(TAPE_REPO, over), box)


STATES = '''
const { test, describe, it } = require('node:test');
test('twice', () => {}); test('twice', () => { throw 1; });
test.skip('left out', () => {}); test.todo('later');
describe('suite \\u2713 > \\n "odd"', () => { it('x', () => {}); });
test('outer', async (t) => { await t.test('inner', () => { throw new Error(); }); });
test('late', () => new Promise((go) => setTimeout(go, 5)));
'''


@runs
def test_states_and_ids(box):
    states = asyncio.run(collect_tests(tree({'a.test.js': STATES}), ['a.test.js'], None, LIMITS, box, variation=2))
    assert states == {
        'a.test.js::twice': 'passed', 'a.test.js::twice #2': 'failed', 'a.test.js::left out': 'skipped',
        'a.test.js::later': 'todo', 'a.test.js::suite \u2713 > \n "odd" > x': 'passed', 'a.test.js::outer': 'passed',
        'a.test.js::outer > inner': 'failed', 'a.test.js::late': 'passed'}


@runs
def test_a_file_that_cannot_be_loaded_gives_no_tests(box):
    broken = tree({'a.test.js': "require('node:test')('a', () => {}); require('./missing');"})
    states = asyncio.run(collect_tests(broken, ['a.test.js'], None, LIMITS, box))
    assert set(states.values()) <= {'begun', 'failed', 'passed'}
    with pytest.raises(ValueError, match='asks for no runner'):
        asyncio.run(collect_tests(tree({'b.test.js': ''}), ['b.test.js'], None, LIMITS, box))


@runs
def test_canaries_of_many_draws_fail_and_leave_the_rest_alone(box, tmp_path):
    path = 'test/calc.test.js'
    read = read_scripts(GOLD, [path], box)[path]
    fit = script_tests(path, read, set(EXPECTED))
    sources = [plant_scripts(REPO[path], fit, random.Random(i)) for i in range(6)]
    assert len({s for s, _, _ in sources}) == 6
    for source, canaries, moved in sources:
        states = asyncio.run(collect_tests(GOLD | tree({path: source}), [path], None, LIMITS, box))
        assert len(canaries) == 5 and {states[name] for name in canaries} == {'failed'}
        assert {states[moved.get(name, name)] for name in EXPECTED if name.startswith(path)} == {'passed'}


def test_a_task_that_cannot_be_read_is_nobodys_failure(tmp_path, monkeypatch):
    "Not a tree without that file, in which the tests fail"
    write_tree(GOLD, tmp_path)
    monkeypatch.setattr('kat.envs.grade.TREE_MB', 0)
    with pytest.raises(InfraError, match='of the task may not be read, or the task has more than 0 MB'):
        merge_agent(NodeSuite(tmp_path, EXPECTED), GOLD)


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='must be an id'):
        NodeSuite(tmp_path, ('adds',))
    with pytest.raises(ValueError, match='is empty'):
        NodeSuite(tmp_path, ())
    with pytest.raises(ValueError, match='node_modules at its top'):
        linked({'node_modules/a.js': (b'', 'file')}, tmp_path)
    monkeypatch.setattr(node, 'node_candidates', lambda: [])
    find_node.cache_clear()
    try:
        with pytest.raises(InfraError, match='there is none'):
            find_node()
    finally:
        find_node.cache_clear()
