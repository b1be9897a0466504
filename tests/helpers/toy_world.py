"A world that needs no sandbox: find a value in a store, following one reference. Its expert always can."
import random

from kat.envs.base import Env, Grade, Observation, Task, ToolResult, ToolCall, World, bad_call, register, tool

NAMES = 'total price count area speed level margin offset'.split()


class KeyEnv(Env):
    tools = [tool('get', 'value of a name', name='string'), tool('answer', 'hand in a value', value='string')]
    max_turns, max_len, max_tokens = 4, 400, 24

    async def reset(self, task):
        self.task, self.given = task, None
        return Observation([dict(role='user', content=f"value of {task.data['ask']}")])

    async def step(self, calls):
        return Observation([], [self.one(call) for call in calls], self.given is not None)

    def one(self, call):
        if wrong := bad_call(call, self.tools): return ToolResult(call.id, wrong, False, 'error')
        store = self.task.data['store']
        if call.name == 'get': return ToolResult(call.id, store.get(call.arguments['name'], 'nothing'))
        self.given = call.arguments['value']
        return ToolResult(call.id, 'noted')

    async def grade(self):
        right = self.given == self.task.data['right']
        return Grade(float(right), dict(right=right))


class Follow:
    def __init__(self, ask):
        self.ask = ask

    def act(self, text):
        if text is not None and text.isdigit(): return [ToolCall('answer', dict(value=text))]
        return [ToolCall('get', dict(name=text or self.ask))]


@register('toy-keys')
class Keys(World):
    env, graded = KeyEnv, 'the value itself'

    def task(self, name):
        draw = random.Random(name)
        first, second = draw.sample(NAMES, 2)
        right = str(draw.randrange(100))
        return Task(f'{self.name}/{name}', self.name, 'lookup',
                    dict(ask=first, store={first: second, second: right}, right=right, family='lookup'))

    def train_task(self, seed, i):
        return self.task(f'train/{seed}/{i}')

    def heldout(self, n):
        return [self.task(f'heldout/{i}') for i in range(min(n, 40))]

    def expert(self, task, seed):
        return Follow(task.data['ask'])


@register('toy-mute')
class Mute(Keys):
    "The same, and nobody shows how."
    def expert(self, task, seed):
        return None
