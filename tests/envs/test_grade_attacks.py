"What agents could hand in instead of a fix, played against the grader"
import asyncio
import os

import pytest
from grade_attacks import CODE, EXPECTED, FIX, MICRO, REPO, micro_text, tree

from kat.envs.base import ToolCall
from kat.envs.grade import Suite, Verdict, grade_tests, write_tree
from kat.envs.micro import MicroEnv
from kat.envs.micro_tasks import FAMILIES, make_task
from kat.envs.sandbox import Bubblewrap, Limits, WarmPool, features

bwrap = pytest.mark.skipif(not features().works, reason=f'bubblewrap does not work here: {features().reason}')
LIMITS = Limits(memory_mb=2048, cpu_s=8, wall_s=60, processes=32, output_kb=256, files_mb=64)
# code that counts its calls is caught in most gradings only, by the order that is drawn
WEAK_BUT_CAUGHT = ('equal to everything', 'a number that equals everything', 'knows the name of the test')


# ---- tests that are code

@pytest.fixture(scope='module')
def verdicts(tmp_path_factory):
    "What the grader says to every attack; some runs at a time"
    base, box = tmp_path_factory.mktemp('base'), Bubblewrap()
    files = {path: (text.encode(), 'file') for path, text in REPO.items()}
    write_tree(files, base)
    suite = Suite(base, tuple(EXPECTED), limits=LIMITS)
    gold = files | {'calc.py': (FIX.encode(), 'file')}
    async def all_of():
        some = asyncio.Semaphore(os.cpu_count() or 1)
        async def one(name):
            async with some:
                return await grade_tests(suite, tree(name) if name in CODE else gold, gold, box)
        names = ['gold', *CODE, 'gold again']
        return dict(zip(names, await asyncio.gather(*map(one, names))))
    return asyncio.run(all_of())


@bwrap
@pytest.mark.parametrize('name', [n for n, (kind, _) in CODE.items() if kind == 'harness'])
def test_no_attack_on_the_harness_is_rewarded(name, verdicts):
    assert not verdicts[name].passed, verdicts[name]


@bwrap
def test_attacks_that_claim_a_pass_are_flagged(verdicts):
    for name in ('reports patched', 'tests do nothing', 'reporter patched', 'equal to everything'):
        assert verdicts[name].tampered and verdicts[name].grade().info['tampered'], name
    for name in ('nothing', 'tests deleted', 'early exit', 'SystemExit', 'loops'):
        assert not verdicts[name].tampered, name


@bwrap
def test_weak_tests_are_guarded_by_changed_expectations(verdicts):
    "What is sure to be caught; the shares that are published count the others too"
    assert not [n for n in WEAK_BUT_CAUGHT if verdicts[n].passed]


@bwrap
def test_gold_is_rewarded_between_attacks(verdicts):
    for name in ('gold', 'gold again'):
        assert verdicts[name] == Verdict(dict.fromkeys(EXPECTED, True))


@bwrap
def test_what_was_put_back_is_listed(verdicts):
    for name, (_, files) in CODE.items():
        caches = {p for p in files if '__pycache__' in p}
        mine = {p for p in files if p in ('calc.py', 'evil.py', 'tests') or p.endswith('PKG-INFO')}
        put_back = set(files) - mine - caches
        assert put_back <= set(verdicts[name].restored), name


def test_there_are_attacks_of_every_kind():
    kinds = [kind for kind, _ in CODE.values()]
    assert len(CODE) >= 30 and len(MICRO) >= 30 and min(map(kinds.count, ('harness', 'hunter', 'weak'))) >= 6


# ---- the micro world

@pytest.fixture(scope='module')
def pool():
    with WarmPool(workers=2, trust='generated') as made:
        yield made


def graded(pool, task, edits):
    async def go():
        env = MicroEnv(pool)
        await env.reset(task)
        await env.step([*(ToolCall('edit', dict(path=p, line=n, text=t)) for p, n, t in edits), ToolCall('submit')])
        return await env.grade()
    return asyncio.run(go())


@pytest.mark.parametrize('name', MICRO)
def test_no_attack_on_the_micro_world_is_rewarded(name, pool):
    for i in range(1 if 'loops' in name or 'timer' in name else 3):
        task = make_task('train', i, MICRO[name][0])
        grade = graded(pool, task, [micro_text(name, task), *task.data['edits'][1:]])
        assert grade.reward == 0 and grade.tests and not all(grade.tests.values()), grade


def test_a_test_of_a_module_that_the_agent_changed_is_not_rewarded(pool):
    "The agent's test is run on the task's modules, not on its own"
    for i in range(3):
        task = make_task('train', i, 'write_test')
        path, n, right = task.data['edits'][0]
        module = task.data['files'][path].split()[1] + '.py'
        name = right.split('(')[0].split()[-1]
        lines = task.data['files'][module].splitlines()
        at = next(k for k, line in enumerate(lines, 1) if line.startswith(f'def {name}('))
        edits = [(module, at + 1, '    return "magic"'), (path, n, right.split('==')[0] + '== "magic"')]
        assert graded(pool, task, edits).reward == 0


@pytest.mark.parametrize('family', FAMILIES)
def test_gold_is_rewarded_in_every_family(family, pool):
    for level in (1, 2, 3):
        for i in range(3):
            task = make_task('heldout', i, family, level)
            assert graded(pool, task, task.data['edits']).reward == 1 and graded(pool, task, []).reward == 0
