"The agent loop: what is recorded is what was sampled, prompts only grow, waves are repeatable"
import numpy as np
import pytest

from kat.rollouts import ModelPolicy, ScriptPolicy, rollout
from kat.core.chat import render, train_tokenizer
from kat.envs.base import InfraError
from kat.envs.expert import Expert
from kat.envs.micro import MicroEnv, make_task
from kat.envs.sandbox import WarmPool
from kat.plane.engines import Completion


@pytest.fixture(scope='module')
def tok(): return train_tokenizer(['def total(a, b):\n    return a + b\n'] * 3, 320)


@pytest.fixture(scope='module')
def pool():
    p = WarmPool(workers=1, trust='generated')
    yield p
    p.close()


class Recorder:
    "A policy around a policy that keeps every prompt."
    def __init__(self, inner): self.inner, self.seen, self.sampling = inner, {}, inner.sampling
    def act(self, episodes):
        for e in episodes: self.seen.setdefault(e.name, []).append(e.ids)
        return self.inner.act(episodes)


def script(tok): return ScriptPolicy(tok, lambda e: Expert(e.task, e.seed))


def test_prompts_extend_the_record(tok, pool):
    policy = Recorder(script(tok))
    out = rollout(policy, tok, [make_task('train', i) for i in range(12)], lambda: MicroEnv(pool), max_len=10**5)
    for t, prompts in zip(out, policy.seen.values()):
        for p in prompts: assert np.array_equal(t.ids[:len(p)], p)
        assert sum(t.mask) == sum(u['tokens'] for u in t.info['turns'])
        assert t.info['finish'] == 'submit' and t.reward in (0.0, 1.0)
        assert [s.trainable for s in t.segments] == [s.kind in ('assistant', 'tool_call') and s.trainable for s in t.segments]


def test_repeatable(tok, pool):
    tasks = [make_task('train', i) for i in range(8)]
    a, b = (rollout(script(tok), tok, tasks, lambda: MicroEnv(pool), seed=3, max_len=10**5) for _ in range(2))
    assert a == b


class Fixed:
    "Says the same text each turn."
    sampling = dict(temperature=0.5)
    def __init__(self, tok, text, finish='stop'): self.ids, self.finish = np.array(tok.encode(text), np.int32), finish
    def act(self, episodes):
        z = np.zeros(len(self.ids), np.float32)
        return [Completion(self.ids, z, z, self.finish, 7) for _ in episodes]


def test_cap_and_versions(tok, pool):
    t, = rollout(Fixed(tok, '<tool_call>list</tool_call><|im_end|>'), tok, [make_task('train', 0)], lambda: MicroEnv(pool), max_turns=4, max_len=10**5)
    assert t.info['finish'] == 'cap' and t.n_turns == 4 and t.reward == 0 and set(t.version[t.mask]) == {7}


def test_trajectories_say_how_they_were_sampled(tok, pool):
    "The policy's temperature, greedy ones 0; a script has none."
    say = Fixed(tok, '<tool_call>list</tool_call><|im_end|>')
    for policy, want in ((say, dict(temperature=0.5)), (script(tok), {}), (ModelPolicy(None, 0, 0.0), dict(temperature=0.0))):
        if isinstance(policy, ModelPolicy): policy.act = say.act
        t, = rollout(policy, tok, [make_task('train', 0)], lambda: MicroEnv(pool), max_turns=4, max_len=10**5)
        assert t.sampling == want


@pytest.mark.parametrize('text', ['hello<|im_end|>', '<tool_call>fly away</tool_call><|im_end|>', '<tool_call>edit a<|im_end|>'])
def test_turns_without_a_readable_call_are_told_and_end_as_lost(tok, pool, text):
    t, = rollout(Fixed(tok, text), tok, [make_task('train', 0)], lambda: MicroEnv(pool), max_len=10**5)
    assert t.info['finish'] == 'lost' and t.n_turns == 3 and t.reward == 0
    assert [s.event for s in t.segments if s.kind == 'tool_result'] == ['error'] * 3


def test_cut_turns_are_closed_before_the_results(tok, pool):
    t, = rollout(Fixed(tok, '<tool_call>list</tool_call>', 'length'), tok, [make_task('train', 0)], lambda: MicroEnv(pool), max_turns=2, max_len=10**5)
    text = tok.decode(t.ids)
    assert '</tool_call><|im_end|>\n<|im_start|>tool\n' in text


def test_context_limit(tok, pool):
    t, = rollout(Fixed(tok, '<tool_call>list</tool_call><|im_end|>'), tok, [make_task('train', 0)], lambda: MicroEnv(pool), max_turns=99, max_len=600)
    assert t.info['finish'] == 'length' and len(t.ids) <= 600 + 200


def test_watch_stops(tok, pool):
    t, = rollout(Fixed(tok, '<tool_call>list</tool_call><|im_end|>'), tok, [make_task('train', 0)], lambda: MicroEnv(pool), max_len=10**5, watch=lambda e: 'stop' if len(e.turns) == 2 else None)
    assert t.info['finish'] == 'stopped' and t.n_turns == 2


class Broken(MicroEnv):
    async def _run(self, tests): raise InfraError('sandbox gone')


def test_infrastructure_failure_is_no_reward(tok, pool):
    out = rollout(script(tok), tok, [make_task('train', i) for i in range(4)], lambda: Broken(pool), max_len=10**5)
    assert all(t.reward is None and t.info['finish'] == 'infra' for t in out)


def test_recorded_text_equals_rendering(tok, pool):
    "What the record holds is what the chat template would write for the same dialogue."
    task = make_task('train', 2)
    t, = rollout(Fixed(tok, '<tool_call>list</tool_call><|im_end|>'), tok, [task], lambda: MicroEnv(pool), max_turns=2, max_len=10**5)
    call = dict(role='assistant', content='', tool_calls=[dict(type='function', function=dict(name='list', arguments={}))])
    result = dict(role='tool', content=' '.join(sorted(task.data['files'])))
    from kat.envs.micro import SYSTEM
    full = render(tok, [dict(role='system', content=SYSTEM), dict(role='user', content=task.data['issue']), call, result, call, result], add_generation_prompt=True)
    assert np.array_equal(np.concatenate([s.ids for s in full]), t.ids)
