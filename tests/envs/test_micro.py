"The micro world: every family is true, splits don't mix, tools and grading behave"
import asyncio
import json
import random
import re
from dataclasses import replace

import pytest
from grade_world import StallingPool

from kat.envs.base import InfraError, ToolCall
from kat.envs.expert import Expert, Style
from kat.envs.micro import TOOLS, MicroEnv, fixed, judge, lacks, rewritten, verify
from kat.envs.micro_tasks import FAMILIES, make_task
from kat.envs.sandbox import WarmPool


@pytest.fixture(scope='module')
def pool():
    with WarmPool(workers=2, trust='generated') as shared:
        yield shared


@pytest.fixture(scope='module')
def env(pool):
    return lambda: MicroEnv(pool)


def steps(env, task, *calls):
    "Reset, run each list of calls as a turn; the observations, the grade and the environment."
    async def episode():
        room = env()
        await room.reset(task)
        turns = [[ToolCall(name, args, str(i)) for i, (name, args) in enumerate(turn)] for turn in calls]
        obs = [await room.step(turn) for turn in turns]
        return obs, await room.grade(), room
    return asyncio.run(episode())


def differing(before, after):
    "(path, number) of the lines that are not the same."
    return {(path, n) for path in before
            for n, (old, new) in enumerate(zip(before[path].splitlines(), after[path].splitlines()), 1) if old != new}


@pytest.mark.parametrize('family', FAMILIES)
def test_family_is_true(family, pool):
    "Tests fail before and pass after the fix; the fix touches only its own lines; the eight kinds are covered."
    tasks = [make_task('train', i, family, level) for level in (1, 2, 3) for i in range(3)]
    assert verify(tasks, pool) == []
    for task in tasks:
        before, after = task.data['files'], fixed(task)
        assert differing(before, after) == {(path, n) for path, n, _ in task.data['edits']}
        assert 2 <= len(before) <= 8


@pytest.mark.parametrize('family', FAMILIES)
def test_believable_wrong_edits_fail(family, env):
    task = make_task('train', 1, family)
    path, n, right = task.data['edits'][0]
    old, tries = task.data['files'][path].splitlines()[n - 1], task.data['tries']
    assert old not in tries and (not tries or tries.count(right) == 1)
    for text in tries:
        _, grade, _ = steps(env, task, [('edit', dict(path=path, line=n, text=text)), ('submit', {})])
        assert grade.reward == (text == right)


def test_kinds_cover_the_grid():
    assert {kind for kind, _, _ in FAMILIES.values()} == {
        'feature_implementation', 'feature_enhancement', 'bug_fixing', 'refactoring', 'performance_optimization',
        'test_generation', 'code_understanding', 'configuration_deployment'}


def test_tasks_are_functions_of_their_number_and_splits_are_disjoint():
    train, heldout = ([make_task(split, i) for i in range(400)] for split in ('train', 'heldout'))
    assert [task.data for task in train[:20]] == [make_task('train', i).data for i in range(20)]
    key = lambda task: (str(sorted(task.data['files'].items())), task.data['issue'])
    assert not {key(task) for task in train} & {key(task) for task in heldout}


@pytest.mark.parametrize('arguments', [
    dict(split='test', i=0), dict(split='train', i=0, family='x'), dict(split='train', i=0, level=4)])
def test_bad_arguments_name_the_value(arguments):
    with pytest.raises(ValueError, match='use'):
        make_task(**arguments)


def test_editing_the_tests_gains_nothing(env):
    task = make_task('train', 0, 'operator')
    lines = len(task.data['files']['tests.py'].splitlines())
    cheat = [('edit', dict(path='tests.py', line=n, text='')) for n in range(1, lines + 1)]
    _, grade, _ = steps(env, task, cheat + [('submit', {})])
    assert grade.reward == 0 and any(name.startswith('tests.py::') for name in grade.tests)


def test_several_calls_in_a_turn_run_in_order_and_stop_at_submit(env):
    task = make_task('train', 0, 'setting')
    (path, n, line), = task.data['edits']
    edit = ('edit', dict(path=path, line=n, text=line))
    (obs,), grade, _ = steps(env, task, [('test', {}), edit, ('test', {}), ('submit', {}), ('list', {})])
    texts = [result.text for result in obs.results]
    assert texts[0].startswith('fail') and texts[2] == 'pass' and len(texts) == 4 and obs.done and grade.reward == 1


@pytest.mark.parametrize('call', [
    ('edit', dict(path='no.py', line=1, text='')),
    ('edit', dict(path='tests.py', line=99, text='')),
    ('view', dict(path='../x')),
    ('search', dict(word='')),
    ('fly', {}),
    ('edit', dict(path='tests.py')),
])
def test_wrong_calls_are_told_and_change_nothing(env, call):
    task = make_task('train', 0)
    (obs,), _, room = steps(env, task, [call])
    assert not obs.results[0].ok and room.files == task.data['files']


def test_an_edit_that_changes_nothing_is_refused(env):
    task = make_task('train', 0, 'operator', 1)
    (path, n, right), = task.data['edits']
    old = task.data['files'][path].splitlines()[n - 1]
    edit = lambda text: ('edit', dict(path=path, line=n, text=text))
    (obs,), _, room = steps(env, task, [edit(old), edit(right), edit(right), edit(old)])
    refused, done = (False, 'nothing changed'), (True, 'done')
    assert [(result.ok, result.text) for result in obs.results] == [refused, done, refused, done]
    assert room.files == task.data['files']


@pytest.mark.parametrize('text', [
    '    while True: pass', '    return "x" * 10**10', '    import os; os._exit(0)', '    return ((('])
def test_hostile_edits_fail_their_tests(env, text):
    task = make_task('train', 0, 'operator', 1)
    path, n, _ = task.data['edits'][0]
    _, grade, _ = steps(env, task, [('edit', dict(path=path, line=n, text=text)), ('submit', {})])
    assert grade.reward == 0 and grade.tests and not all(grade.tests.values())


def work(env, task, agent):
    "An episode of the expert: (tool, text written, ok, result) of every call, and the grade."
    async def episode():
        room = env()
        await room.reset(task)
        text, seen = None, []
        while not room.done:
            calls = agent.act(text)
            obs = await room.step(calls)
            text = obs.results[-1].text
            seen += [(call.name, call.arguments.get('text'), result.ok, result.text)
                     for call, result in zip(calls, obs.results)]
        return seen, await room.grade()
    return asyncio.run(episode())


@pytest.mark.parametrize('merge', [0.0, 1.0])
def test_expert_that_knows_solves_everything(env, merge):
    for i, family in enumerate(FAMILIES):
        task = make_task('train', i, family)
        _, grade = work(env, task, Expert(task, 0, Style(test=1.0, guess=0.0, merge=merge)))
        assert grade.reward == 1, (family, task.data['issue'])


@pytest.mark.parametrize('family', ['operator', 'compare'])
def test_expert_recovers_from_slips_and_wrong_guesses(env, family):
    """A guesser goes through the edits in order and tests each until it passes; a slip is refused by the tool; the work
    gets done."""
    for i in range(10):
        task = make_task('train', i, family)
        seen, grade = work(env, task, Expert(task, i, Style(test=0.0, guess=1.0, slip=0.7)))
        edits = [text for name, text, ok, _ in seen if name == 'edit' and ok]
        assert edits == task.data['tries'][:len(edits)] and edits[-1] == task.data['edits'][0][2] and grade.reward == 1
        assert all(said == 'nothing changed' for name, _, ok, said in seen if name == 'edit' and not ok)
        assert all(after[0] == 'test' for (name, _, ok, _), after in zip(seen, seen[1:]) if name == 'edit' and ok)


def test_tools_are_schemas():
    assert [schema['function']['name'] for schema in TOOLS] == ['list', 'view', 'search', 'edit', 'test', 'submit']


# ---- grading

def solve(task):
    edits = [('edit', dict(path=path, line=n, text=text)) for path, n, text in task.data['edits']]
    return [*edits, ('test', {}), ('submit', {})]


def test_outcomes_of_a_stalled_machine_are_not_kept(pool):
    "Neither by `test` nor by `grade`; nor is there a reward"
    cache = {}
    for family in ('operator', 'slow', 'write_test'):
        task = make_task('train', 0, family)
        for calls in (solve(task), solve(task)[:-2] + [('submit', {})]):
            with pytest.raises(InfraError, match='honest control job'):
                steps(lambda: MicroEnv(StallingPool(pool, lambda job: True), cache), task, calls)
        assert cache == {}
        obs, grade, _ = steps(lambda: MicroEnv(pool, cache), task, solve(task))
        assert obs[0].results[-2].text == 'pass' and grade.reward == 1 and cache
        cache.clear()


def test_outcomes_that_the_wall_decided_are_not_kept(pool):
    task, cache = make_task('train', 0, 'operator', 1), {}
    path, n, _ = task.data['edits'][0]
    slow = StallingPool(pool, lambda job: 'wait()' in str(job.files))
    wait = ('edit', dict(path=path, line=n, text='    import threading; threading.Event().wait()'))
    obs, grade, _ = steps(lambda: MicroEnv(slow, cache), task, [wait, ('test', {}), ('submit', {})])
    assert obs[0].results[1].text == 'fail: longer than 3 s' and grade.reward == 0 and cache == {}
    assert grade.info['failed'] == 'longer than 3 s'


def test_an_agent_cannot_void_its_episode_by_its_own_tests(pool):
    "The honest job beside a slow one runs the task's tests, not the agent's"
    task = make_task('train', 0, 'operator', 1)
    slow = StallingPool(pool, lambda job: 'wait()' in str(job.files))
    wait = ('edit', dict(path='tests.py', line=1, text='import threading; threading.Event().wait()'))
    obs, grade, _ = steps(lambda: MicroEnv(slow), task, [wait, ('test', {}), *solve(task)[:-2], ('submit', {})])
    assert obs[0].results[1].text == 'fail: longer than 3 s' and grade.reward == 1


def test_outcomes_that_the_code_decided_are_kept(pool):
    task, cache = make_task('train', 0, 'operator', 1), {}
    path, n, right = task.data['edits'][0]
    for text in (right, '    return 1', '    import os; os._exit(3)', '    return bytearray(10**10)'):
        before = len(cache)
        calls = [('edit', dict(path=path, line=n, text=text)), ('test', {}), ('submit', {})]
        first = steps(lambda: MicroEnv(pool, cache), task, calls)
        assert len(cache) == before + 2
        def closed():
            return MicroEnv(None, cache)
        assert steps(closed, task, calls)[:2] == first[:2]


def test_expected_values_never_enter_the_sandbox(pool):
    "Of hidden tests neither values nor questions reach the tool `test`; of no test a value reaches the grade"
    seen = []
    class Listens:
        async def arun(self, job):
            seen.append(json.dumps([job.main, job.files, job.args]))
            return await pool.arun(job)
    for i in range(30):
        task = make_task('train', i)
        seen.clear()
        steps(lambda: MicroEnv(Listens()), task, [('test', {})])
        hidden = [line for line in task.data['hidden'].splitlines() if line.startswith('    ')]
        assert all(line.strip() not in json.loads(job)[1].get('tests.py', '') for job in seen[1:] for line in hidden)
        assert task.data['hidden'] not in str(seen) and all('hidden' not in job for job in seen)
        assert all('tests.py' not in json.loads(job)[1] for job in seen[1:])
        for want in re.findall(r'== (-?\d{3,})', task.data['hidden']):
            assert all(want not in job for job in seen[1:]), (want, task.id)


@pytest.mark.parametrize('text, said', [
    ('    return (yield)', 0), ('    return 1 if {a} else 2', 0), ('    exit()', 0), ('    return float({right})', 0),
    ('    return True + {right} - 1', 1), ('    return int({right})', 1), ('    print("loud"); return {right}', 1)])
def test_odd_but_honest_code_is_judged_by_its_values(env, text, said):
    task = make_task('train', 0, 'operator', 1)
    path, n, right = task.data['edits'][0]
    text = text.format(right=f"({right.split('return ')[1]})", a=right.split()[1])
    _, grade, _ = steps(env, task, [('edit', dict(path=path, line=n, text=text)), ('submit', {})])
    assert grade.reward == said


PROVEN = [
    '', 'x = 1', '"text"', 'from page import *', 'import os.path', 'pass',
    'def g(a, b=2, *, c=(1, 2)):\n    return cost']
NOT_PROVEN = [
    'from page import LIMIT as cost', 'import page as cost', 'cost = 1', 'a = cost = 1', 'def cost(): pass',
    'def __getattr__(name): return 1', 'from os import *', 'x = f()', 'f()', 'x: int = f()', 'class cost: pass',
    'if 1:\n    cost = 1', 'for cost in (1,): pass', '(cost := 1)', 'def g(a=f()): pass', '@f\ndef g(): pass',
    'def g(a: f()): pass', 'def g() -> f(): pass', 'x.cost = 1', '[cost for cost in (1,)]',
    'try:\n    pass\nfinally:\n    cost = 1', 'def (', 'del f']


@pytest.mark.parametrize('line', PROVEN + NOT_PROVEN)
def test_a_name_is_gone_only_where_that_is_proven(line):
    files = {'cart.py': f'import page\ndef f():\n    return 1\n{line}\n', 'page.py': 'LIMIT = 3\n', 'notes.md': 'cost'}
    assert lacks(files, 'cart', 'cost') is (line in PROVEN)
    assert not lacks(files | {'page.py': 'import cart\ncart.cost = 1\n'}, 'cart', 'cost')
    if 'import *' in line:
        assert not lacks(files | {'page.py': 'cost = 1\n'}, 'cart', 'cost')


def test_rewritten_code_does_the_same():
    for i in range(60):
        task = make_task('train', i)
        for path, text in fixed(task).items():
            if not path.endswith('.py') or 'import' in text or path == 'tests.py': continue
            old, new, draw = {}, {}, random.Random(i)
            again = rewritten(text, draw)
            exec(text, old)
            exec(again, new)
            for name, func in old.items():
                if not callable(func): continue
                for _ in range(5):
                    given = [draw.randint(-9, 9) for _ in range(func.__code__.co_argcount)]
                    assert func(*given) == new[name](*given) and type(func(*given)) is type(new[name](*given))
            assert again != rewritten(text, random.Random(i + 1000)) or '_table[' not in again


def test_right_code_that_fails_is_no_reward(pool):
    task = make_task('train', 0, 'slow')
    broken = replace(task, data={**task.data, 'edits': [(*task.data['edits'][0][:2], '    return 1 +')]})
    with pytest.raises(InfraError, match='the right code does not answer'):
        asyncio.run(judge(pool, broken, task.data['files']))


@pytest.mark.parametrize('told', ['{"value": {}}', '{"value": null}', '{"value": {"0": NaN}}', '{}'])
def test_tests_that_told_nothing_are_no_pass(env, told):
    task = make_task('train', 0, 'operator', 1)
    path, line, _ = task.data['edits'][0]
    lines = (told + '\n{"end": "ok"}\n').encode()
    forged = f'    import os\n    os.write(3, {lines!r})\n    os._exit(0)'
    obs, grade, _ = steps(env, task, [('edit', dict(path=path, line=line, text=forged))], [('test', {})])
    assert obs[1].results[0].text == 'fail: the tests told nothing' and grade.reward == 0
