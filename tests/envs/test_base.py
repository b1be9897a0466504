"The environment interface: records, schemas, registry, and one whole environment."
import ast
import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kat.envs import base
from kat.core.io import UserError
from kat.envs.base import (
    Env, Grade, InfraError, Observation, Task, ToolCall, ToolResult, World, bad_call, find_world, register, tool)

TOOLS = [tool('view', 'Show a file', path='string', line='integer?'), tool('wait', 'Wait', s='number', loud='boolean?'),
         tool('submit', 'End')]


class Count(Env):
    "Call `add` until the total is right."
    tools = [tool('add', 'Add a number', n='integer')]

    def __init__(self, start=0):
        self.start, self.closed = start, 0

    async def reset(self, task):
        self.goal, self.total = task.data['goal'], self.start
        return Observation(messages=[dict(role='user', content=f'Reach {self.goal}.')])

    async def step(self, calls):
        results = []
        for call in calls:
            wrong = bad_call(call, self.tools)
            if not wrong:
                self.total += call.arguments['n']
            event = 'error' if wrong else None
            results.append(ToolResult(call.id, wrong or str(self.total), ok=not wrong, event=event))
        return Observation(results=results, done=self.total >= self.goal)

    async def grade(self):
        return Grade(float(self.total == self.goal), dict(exact=self.total == self.goal))
    async def close(self):
        self.closed += 1


@register('test-count')
class Counting(World):
    env = Count


def test_an_episode_of_parallel_calls():
    async def episode():
        async with Count(start=1) as env:
            obs = await env.reset(Task('t', 'test-count', data=dict(goal=6)))
            assert obs.messages == [dict(role='user', content='Reach 6.')] and not obs.done
            arguments = dict(a=dict(n=2), b={}, c=dict(n=3))
            obs = await env.step([ToolCall('add', values, name) for name, values in arguments.items()])
            return env, obs, await env.grade()
    env, obs, grade = asyncio.run(episode())
    told = [(result.id, result.ok, result.event) for result in obs.results]
    assert told == [('a', True, None), ('b', False, 'error'), ('c', True, None)]
    assert obs.done and grade == Grade(1.0, dict(exact=True)) and env.closed == 1


def test_the_base_class_says_what_is_missing():
    with pytest.raises(NotImplementedError, match='Env.grade'):
        asyncio.run(Env().grade())
    asyncio.run(Env().close())


@pytest.mark.parametrize('call, says', [
    (ToolCall('view', dict(path='a')), None),
    (ToolCall('view', dict(path='a', line=3)), None),
    (ToolCall('wait', dict(s=1)), None),
    (ToolCall('wait', dict(s=.5, loud=True)), None),
    (ToolCall('submit'), None),
    (ToolCall('open', dict(path='a')), "no tool 'open'"),
    (ToolCall('view', dict(line=3)), "'path' is missing"),
    (ToolCall('view', dict(path='a', x=1)), "no argument 'x'"),
    (ToolCall('view', dict(path='a', line='3')), 'of type integer'),
    (ToolCall('view', dict(path='a', line=True)), 'of type integer'),
    (ToolCall('view', dict(path=None)), 'of type string'),
    (ToolCall('wait', dict(s=True)), 'of type number'),
])
def test_bad_call(call, says):
    got = bad_call(call, TOOLS)
    assert got is None if says is None else says in got


@given(st.text(), st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats() | st.text()))
def test_bad_call_never_raises(name, arguments):
    for n in (name, 'view'):
        got = bad_call(ToolCall(n, arguments), TOOLS)
        assert got is None or isinstance(got, str)


def test_tool_keeps_the_order_and_refuses_unknown_types():
    assert list(TOOLS[1]['function']['parameters']['properties']) == ['s', 'loud']
    assert TOOLS[1]['function']['parameters']['required'] == ['s']
    with pytest.raises(ValueError, match="parameter 'n'.*'int'"):
        tool('f', '', n='int')


@pytest.mark.parametrize('bad', [dict(id=''), dict(id=3), dict(env=''), dict(env=None), dict(data=[1])])
def test_task_is_checked(bad):
    with pytest.raises(ValueError, match=f'Task.{next(iter(bad))}'):
        Task(**{**dict(id='t', env='e'), **bad})


@given(st.text(min_size=1), st.text(min_size=1), st.text(), st.dictionaries(st.text(), st.integers() | st.text()))
def test_task_survives_json(id, env, kind, data):
    t = Task(id, env, kind, data)
    assert Task(**json.loads(json.dumps(asdict(t)))) == t


@pytest.mark.parametrize('x', [float('nan'), float('inf'), -float('inf')])
def test_grade_must_be_finite(x):
    with pytest.raises(ValueError, match='finite'):
        Grade(x)


def test_registry():
    assert find_world('test-count').env is Count and find_world('test-count').name == 'test-count'
    assert register('test-count')(Counting) is Counting  # a module imported twice registers the same class again
    with pytest.raises(ValueError, match='already'):
        register('test-count')(type('Other', (World,), {}))
    with pytest.raises(ValueError, match='derived from World'):
        register('test-env')(Count)
    for name in ('', 'a b', 'a/b', 'a:b', 'a,b', '1a'):
        with pytest.raises(ValueError, match='is no name'):
            register(name)(Counting)
    for name in ('nothing-such', 'nothing_such', 'a.b', ''):
        with pytest.raises(UserError, match='known:.*micro.*test-count'):
            find_world(name)
    assert 'base' not in base.WORLDS
    with pytest.raises(UserError, match="no environment 'base'"):
        find_world('base')  # a module, but no environment
    for method in (lambda world: world.train_task(0, 0), lambda world: world.heldout(1)):
        with pytest.raises(NotImplementedError, match='Counting'):
            method(Counting())


def test_infra_error_is_no_user_error():
    assert issubclass(InfraError, RuntimeError) and not issubclass(InfraError, ValueError)


def test_every_world_of_kats_own_is_found_by_name():
    there = {(call.args[0].value, module) for module, tree in own_modules() for node in tree.body
             if isinstance(node, ast.ClassDef) for call in node.decorator_list
             if isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'register'}
    assert there == set(base.OWN.items())
    assert {find_world(name).name for name in base.OWN} == set(base.OWN)


def own_modules():
    home = Path(base.__file__).parents[2]
    for path in sorted((home/'kat').rglob('*.py')):
        yield '.'.join(path.relative_to(home).with_suffix('').parts), ast.parse(path.read_text())
