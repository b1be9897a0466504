"Worlds by name and mixed; many episodes at once, whose infrastructure fails"
import asyncio
import re
import tempfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from left_behind import descriptors, offspring
from toy_world import Follow, KeyEnv, Keys

from kat.core.io import UserError
from kat.envs.base import (
    InfraError, Mixture, Observation, Task, ToolResult, World, episodes, find_world, make_world, register, scripted)


@pytest.mark.parametrize('said, words', [
    ('', 'is missing'), ('toy-keys,', 'is missing'), (',', 'is missing'), ('toy-kyes', 'known:.*toy-keys'),
    ('toy-keys:0,micro:1', "'0' is no weight of toy-keys"), ('toy-keys:-1,micro:1', "'-1' is no weight"),
    ('toy-keys:nan,micro:1', "'nan' is no weight"), ('toy-keys:inf,micro:1', "'inf' is no weight"),
    ('toy-keys:much,micro:1', "'much' is no weight"), ('toy-keys:,micro:1', "'' is no weight"),
    (':1', 'is no weight of an environment'), ('toy-keys:1,micro', 'a weight, or none'),
    ('toy-keys:1,toy-keys:2', 'toy-keys is there twice'), ('toy_world:Keys,toy-keys', 'toy-keys is there twice'),
    ('no_such_module:Keys', 'no_such_module.*PYTHONPATH'), ('toy_world:Follow', "no registered world 'Follow'"),
    ('toy_world:Gone', "no registered world 'Gone'"), ('..:Keys', 'PYTHONPATH'),
    ('kat.envs.base:World', 'no registered'),
])
def test_what_is_no_world_is_refused_in_one_line(said, words):
    with pytest.raises(UserError, match=words) as caught:
        make_world(said)
    assert '\n' not in str(caught.value)


def test_a_world_by_name_by_class_and_mixed():
    assert type(make_world('toy-keys')) is type(make_world('toy_world:Keys')) is type(make_world('toy-keys:3')) is Keys
    mixed = make_world(' micro:0.6 , toy_world:Keys:0.4')
    assert mixed.name == make_world('toy-keys:2,micro:3').name == 'micro:0.6,toy-keys:0.4'
    assert list(mixed.domains) == ['micro', 'toy-keys'] and list(make_world('toy-keys').domains) == ['toy-keys']
    assert make_world('micro,toy-keys').name == 'micro:0.5,toy-keys:0.5'


class Named(World):
    "Only its tasks' ids matter."
    def __init__(self, name):
        self.name = name
    def train_task(self, seed, i):
        return Task(f'{self.name}/{seed}/{i}', self.name)
    def heldout(self, n):
        return [self.train_task('held', i) for i in range(min(n, 30))]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(.01, 1), min_size=2, max_size=4), st.integers(0, 10**6), st.integers(0, 2 * 10**6))
def test_every_stretch_of_tasks_is_close_to_the_weights(weights, seed, start):
    parts = [(Named(f'w{i}'), weight) for i, weight in enumerate(weights)]
    mixed, other = Mixture(parts), Mixture(parts[::-1])
    tasks = [mixed.train_task(seed, start + i) for i in range(60)]
    assert tasks == [other.train_task(seed, start + i) for i in range(60)]   # whatever the order they are named in
    drawn = Counter(task.env for task in tasks)
    for world, weight in parts:
        assert abs(drawn[world.name] - 60 * weight / sum(weights)) < 4
    assert all(task.data['info']['domain'] == task.env for task in tasks)


def test_held_out_tasks_are_a_prefix_and_may_run_out():
    mixed = Mixture([(Named('a'), .7), (Named('b'), .3)])
    assert mixed.heldout(20) == mixed.heldout(40)[:20] and len({task.id for task in mixed.heldout(40)}) == 40
    assert len(mixed.heldout(90)) < 90   # `a` has thirty


def test_domains_are_told_apart():
    same = Named('a')
    same.train_task = lambda seed, i: Task(f'b/{seed}/{i}', 'a')
    mixed = Mixture([(same, 1), (Named('b'), 1)])
    mixed.parts[0][0].heldout = lambda n: [Task('b/held/0', 'a')] * n
    with pytest.raises(UserError, match="both have a task 'b/held/0'"):
        mixed.heldout(20)
    liar = Named('c')
    liar.train_task = lambda seed, i: Task('c', 'b')
    with pytest.raises(UserError, match="world c: task c says env 'b'"):
        [Mixture([(liar, 1), (Named('b'), 1)]).train_task(0, i) for i in range(9)]


def test_a_mixture_asks_the_world_that_a_task_is_of():
    mixed = make_world('micro,toy-keys')
    tasks = {task.env: task for task in mixed.heldout(6)}
    assert {name: type(mixed.expert(task, 0)).__name__ for name, task in tasks.items()} == {
        'micro': 'Expert', 'toy-keys': 'Follow'}
    assert mixed.walker(tasks['micro'], 0) and mixed.walker(tasks['toy-keys'], 0) is None
    assert mixed.solution(tasks['micro']) and mixed.solution(tasks['toy-keys']) is None
    assert mixed.untrue(mixed.heldout(4)) == []
    with mixed.open(1) as make_env:
        assert {name: type(make_env(task)).__name__ for name, task in tasks.items()} == {
            'micro': 'MicroEnv', 'toy-keys': 'KeyEnv'}


# --- many episodes

def run(tasks, make_env, play=None, **kw):
    world = find_world('toy-keys')
    expert = lambda env, task: scripted(env, task, world.expert(task, 0))
    return asyncio.run(episodes(tasks, make_env, play or expert, **kw))


class Counted(KeyEnv):
    "Knows how many are open."
    open = most = made = 0
    def __init__(self):
        type(self).made += 1
        self.shut = False
    async def reset(self, task):
        type(self).open += 1
        type(self).most = max(self.most, self.open)
        return await super().reset(task)
    async def step(self, calls):
        await asyncio.sleep(0)
        return await super().step(calls)
    async def close(self):
        if not self.shut:
            type(self).open -= 1
        self.shut = True


def fresh(**more):
    return type('Fresh', (Counted,), dict(open=0, most=0, made=0, **more))


def test_no_more_than_so_many_at_once_and_in_order():
    env, told, tasks = fresh(), [], find_world('toy-keys').heldout(30)
    ended = run(tasks, lambda task: env(), at_once=7, told=lambda *counts: told.append(counts))
    assert [o.task for o in ended] == tasks and all(o.reward == 1 and o.faults == () for o in ended)
    assert env.most == 7 and env.open == 0 and env.made == 30 and told == [(i, 30) for i in range(1, 31)]
    assert run([], None) == []


@pytest.mark.parametrize('where', ['reset', 'step', 'grade', 'close', 'make'])
def test_infrastructure_faults_are_tried_again_and_never_scored(where):
    lost = Counter()
    def faulty(task):
        async def fail(self, *given):
            lost[task.id] += 1
            if where == 'close':
                await Counted.close(self)
            if lost[task.id] <= limit[task.id]: raise InfraError(f'{where}\nis gone')
            return await getattr(Counted, where)(self, *given)
        if where != 'make': return type('Faulty', (Counted,), {where: fail})()
        lost[task.id] += 1
        if lost[task.id] <= limit[task.id]: raise InfraError('make\nis gone')
        return Counted()
    tasks = find_world('toy-keys').heldout(4)
    limit = dict(zip((task.id for task in tasks), (0, 1, 2, 99)))
    ended = run(tasks, faulty, retries=2, at_once=2)
    assert [(o.finish, o.reward, len(o.faults)) for o in ended] == [
        ('submit', 1, 0), ('submit', 1, 1), ('submit', 1, 2), ('infra', None, 3)]
    assert ended[3].grade is None and set(ended[3].faults) == {f'{where} is gone'}


def test_what_the_agent_does_wrong_is_never_tried_again():
    env = fresh()
    class Wrong:
        def act(self, text):
            return Follow('nobody').act(None)
    ended = run(find_world('toy-keys').heldout(5), lambda task: env(),
                lambda env, task: scripted(env, task, Wrong()), retries=9)
    assert env.made == 5 and [(o.finish, o.reward, len(o.said)) for o in ended] == [('cap', 0, 4)] * 5


def test_deadlines():
    env, hangs = fresh(), fresh(patience_s=.001)
    async def never(self):
        await asyncio.Event().wait()
    async def sleeper(env, task):
        await env.reset(task)
        await asyncio.Event().wait()
    slow = run(find_world('toy-keys').heldout(3), lambda task: env(), sleeper, deadline_s=.001, retries=5)
    assert [(o.finish, o.reward, o.grade) for o in slow] == [('timeout', 0, None)] * 3
    assert env.made == 3 and env.open == 0
    hangs.grade = never
    stuck, = run(find_world('toy-keys').heldout(1), lambda task: hangs(), retries=1)
    assert (stuck.finish, stuck.reward, hangs.made) == ('infra', None, 2) and 'grade took longer' in stuck.faults[0]
    async def own(env, task):
        raise TimeoutError('of the player')
    with pytest.raises(TimeoutError, match='of the player'):
        run(find_world('toy-keys').heldout(1), lambda task: env(), own)
    for bad in (dict(at_once=0), dict(retries=-1), dict(deadline_s=0), dict(deadline_s=float('nan'))):
        with pytest.raises(ValueError, match=next(iter(bad))):
            run([], None, **bad)


def test_a_bug_ends_all_and_every_environment_is_closed():
    env = fresh()
    async def buggy(env, task):
        await env.reset(task)
        if task.id.endswith('/3'): raise KeyError('a bug')
        await asyncio.Event().wait()
    with pytest.raises(KeyError, match='a bug'):
        run(find_world('toy-keys').heldout(9), lambda task: env(), buggy, at_once=5)
    assert env.open == 0 and env.made == 5


def test_micro_episodes_leave_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    micro, before, running = find_world('micro'), descriptors(), offspring()
    with micro.open(2) as make_env:
        ended = run([micro.train_task(0, i) for i in range(60)], make_env,
                    lambda env, task: scripted(env, task, micro.expert(task, 0)), at_once=60)
    assert {o.finish for o in ended} == {'submit'} and sum(o.reward for o in ended) > 40
    assert descriptors() == before and offspring() <= running and not list(tmp_path.iterdir())


# --- environments and agents under work

@pytest.mark.parametrize('name, answer, words', [
    ('step', lambda calls: Observation([], []), 'Slip.step: one result for each call'),
    ('step', lambda calls: Observation([], [ToolResult('x', 'a'), ToolResult('y', 'b')]), "results for ['x', 'y']"),
    ('step', lambda calls: Observation([], [ToolResult(call.id, 7) for call in calls]), 'with a text expected'),
    ('step', lambda calls: None, 'Slip.step: an Observation expected, got None'),
    ('grade', lambda: 1.0, 'Slip.grade: a Grade expected, got 1.0')])
def test_an_environments_own_mistakes_are_named(name, answer, words):
    async def slip(self, *given):
        return answer(*given)
    with pytest.raises(TypeError, match=re.escape(words)):
        run(find_world('toy-keys').heldout(1), lambda task: type('Slip', (KeyEnv,), {name: slip})())


def test_an_agent_that_has_no_more_calls_is_named():
    class Short:
        def __init__(self):
            self.turns = iter([Follow('total').act(None)])
        def act(self, text):
            return next(self.turns)
    with pytest.raises(RuntimeError, match='toy-keys/heldout/0: Short has no more calls'):
        run(find_world('toy-keys').heldout(1), lambda task: KeyEnv(), lambda env, task: scripted(env, task, Short()))


def test_a_class_has_one_name_and_is_made_without_arguments():
    class Needy(Keys):
        def __init__(self, path):
            self.path = path
    register('test-needy')(Needy)
    with pytest.raises(ValueError, match="is environment 'test-needy' already"):
        register('test-other')(Needy)
    with pytest.raises(UserError, match='test-needy cannot be made: TypeError: .*path'):
        make_world('test-needy')
    assert make_world('micro:1e308,toy-keys:1e308').name == 'micro:0.5,toy-keys:0.5'
