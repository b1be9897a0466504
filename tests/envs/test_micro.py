"The micro world: every family is true, splits don't mix, tools and grading behave"
import asyncio

import pytest

from kat.envs.base import ToolCall
from kat.envs.expert import Expert, Style
from kat.envs.micro import FAMILIES, TOOLS, MicroEnv, fixed, make_task, verify
from kat.envs.sandbox import WarmPool


@pytest.fixture(scope='module')
def pool():
    p = WarmPool(workers=2, trust='generated')
    yield p
    p.close()


@pytest.fixture(scope='module')
def env(pool):
    return lambda: MicroEnv(pool)


def steps(env, task, *calls):
    "Reset, run each list of calls as a turn; the observations and the grade."
    async def go():
        e = env()
        await e.reset(task)
        obs = [await e.step([ToolCall(n, a, str(i)) for i, (n, a) in enumerate(turn)]) for turn in calls]
        return obs, await e.grade(), e
    return asyncio.run(go())


@pytest.mark.parametrize('family', FAMILIES)
def test_family_is_true(family, pool):
    "Tests fail before and pass after the fix; the fix touches only its own lines; the eight kinds are covered."
    tasks = [make_task('train', i, family, level) for level in (1, 2, 3) for i in range(3)]
    assert verify(tasks, pool) == []
    for t in tasks:
        before, after = t.data['files'], fixed(t)
        changed = {(p, i) for p in before for i, (a, b) in enumerate(zip(before[p].splitlines(), after[p].splitlines()), 1) if a != b}
        assert changed == {(p, n) for p, n, _ in t.data['edits']}
        assert 2 <= len(before) <= 8


@pytest.mark.parametrize('family', [f for f in FAMILIES])
def test_believable_wrong_edits_fail(family, env):
    t = make_task('train', 1, family)
    path, n, right = t.data['edits'][0]
    old = t.data['files'][path].splitlines()[n - 1]
    assert old not in t.data['tries'] and (not t.data['tries'] or t.data['tries'].count(right) == 1)
    for text in t.data['tries']:
        _, grade, _ = steps(env, t, [('edit', dict(path=path, line=n, text=text)), ('submit', {})])
        assert grade.reward == (text == right)


def test_kinds_cover_the_grid():
    assert {kind for kind, _, _ in FAMILIES.values()} == {
        'feature_implementation', 'feature_enhancement', 'bug_fixing', 'refactoring', 'performance_optimization',
        'test_generation', 'code_understanding', 'configuration_deployment'}


def test_tasks_are_functions_of_their_number_and_splits_are_disjoint():
    a, b = ([make_task(s, i) for i in range(400)] for s in ('train', 'heldout'))
    assert [t.data for t in a[:20]] == [make_task('train', i).data for i in range(20)]
    key = lambda t: (str(sorted(t.data['files'].items())), t.data['issue'])
    assert not {key(t) for t in a} & {key(t) for t in b}


@pytest.mark.parametrize('kw', [dict(split='test', i=0), dict(split='train', i=0, family='x'), dict(split='train', i=0, level=4)])
def test_bad_arguments_name_the_value(kw):
    with pytest.raises(ValueError, match='use'):
        make_task(**kw)


def test_editing_the_tests_gains_nothing(env):
    t = make_task('train', 0, 'operator')
    n = len(t.data['files']['tests.py'].splitlines())
    cheat = [('edit', dict(path='tests.py', line=i, text='')) for i in range(1, n + 1)]
    _, grade, _ = steps(env, t, cheat + [('submit', {})])
    assert grade.reward == 0 and any(k.startswith('tests.py::') for k in grade.tests)


def test_several_calls_in_a_turn_run_in_order_and_stop_at_submit(env):
    t = make_task('train', 0, 'setting')
    (path, n, line), = t.data['edits']
    obs, grade, e = steps(env, t, [('test', {}), ('edit', dict(path=path, line=n, text=line)), ('test', {}), ('submit', {}), ('list', {})])
    texts = [r.text for r in obs[0].results]
    assert texts[0].startswith('fail') and texts[2] == 'pass' and len(texts) == 4 and obs[0].done and grade.reward == 1


@pytest.mark.parametrize('call', [('edit', dict(path='no.py', line=1, text='')), ('edit', dict(path='tests.py', line=99, text='')),
                                  ('view', dict(path='../x')), ('search', dict(word='')), ('fly', {}), ('edit', dict(path='tests.py'))])
def test_wrong_calls_are_told_and_change_nothing(env, call):
    t = make_task('train', 0)
    obs, _, e = steps(env, t, [call])
    assert not obs[0].results[0].ok and e.files == t.data['files']


def test_an_edit_that_changes_nothing_is_refused(env):
    t = make_task('train', 0, 'operator', 1)
    (path, n, right), = t.data['edits']
    old = t.data['files'][path].splitlines()[n - 1]
    edit = lambda text: ('edit', dict(path=path, line=n, text=text))
    obs, _, e = steps(env, t, [edit(old), edit(right), edit(right), edit(old)])
    assert [(r.ok, r.text) for r in obs[0].results] == [(False, 'nothing changed'), (True, 'done'), (False, 'nothing changed'), (True, 'done')]
    assert e.files == t.data['files']


@pytest.mark.parametrize('text', ['    while True: pass', '    return "x" * 10**10', '    import os; os._exit(0)', '    return ((('])
def test_hostile_edits_fail_their_tests(env, text):
    t = make_task('train', 0, 'operator', 1)
    path, n, _ = t.data['edits'][0]
    _, grade, _ = steps(env, t, [('edit', dict(path=path, line=n, text=text)), ('submit', {})])
    assert grade.reward == 0 and grade.tests and not all(grade.tests.values())


@pytest.mark.parametrize('merge', [0.0, 1.0])
def test_expert_that_knows_solves_everything(env, merge):
    for i, f in enumerate(FAMILIES):
        t = make_task('train', i, f)
        agent = Expert(t, 0, Style(test=1.0, guess=0.0, merge=merge))
        async def go():
            e = env()
            await e.reset(t)
            text = None
            while not e.done:
                text = (await e.step(agent.act(text))).results[-1].text
            return await e.grade()
        assert asyncio.run(go()).reward == 1, (f, t.data['issue'])


@pytest.mark.parametrize('family', ['operator', 'compare'])
def test_expert_recovers_from_slips_and_wrong_guesses(env, family):
    "A guesser goes through the edits in order and tests each until it passes; a slip is refused by the tool; the work gets done."
    for i in range(10):
        t = make_task('train', i, family)
        agent = Expert(t, i, Style(test=0.0, guess=1.0, slip=0.7))
        async def go():
            e = env()
            await e.reset(t)
            text, seen = None, []
            while not e.done:
                calls = agent.act(text)
                obs = await e.step(calls)
                text = obs.results[-1].text
                seen += [(c.name, c.arguments.get('text'), r.ok, r.text) for c, r in zip(calls, obs.results)]
            return seen, await e.grade()
        seen, grade = asyncio.run(go())
        edits = [text for name, text, ok, _ in seen if name == 'edit' and ok]
        assert edits == t.data['tries'][:len(edits)] and edits[-1] == t.data['edits'][0][2] and grade.reward == 1
        assert all(said == 'nothing changed' for name, _, ok, said in seen if name == 'edit' and not ok)
        assert all(after[0] == 'test' for (name, _, ok, _), after in zip(seen, seen[1:]) if name == 'edit' and ok)


def test_tools_are_schemas():
    assert [t['function']['name'] for t in TOOLS] == ['list', 'view', 'search', 'edit', 'test', 'submit']
