"""Rollouts through the gateway: what is recorded is what was sampled, prompts only grow, waves are repeatable,
and all of it is the same as a loop without HTTP"""
import asyncio
import gc
import weakref

import httpx2
import numpy as np
import pytest
import torch

from kat.core.chat import generation_segments, render
from kat.core.extension import extend_segments
from kat.core.template import parse_calls, train_tokenizer
from kat.core.types import Segment, Trajectory
from kat.infer.engines import HFEngine
from kat.infer.requests import Completion, Request
from kat.plane.gateway import running
from kat.plane.manager import Session
from kat.learn.training import load_model
from kat.envs.base import Env, Grade, InfraError, Observation, ToolCall, ToolResult
from kat.envs.expert import Expert
from kat.envs.micro import SYSTEM, MicroEnv
from kat.envs.micro_tasks import make_task
from kat.envs.sandbox import WarmPool
from kat.recipe.pipeline import ROOT
from kat.recipe.rollouts import Episode, ModelPolicy, ScriptPolicy, Waves, ended, finished, play_episode, rollout

LIST = '<tool_call>list</tool_call><|im_end|>'


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(['def total(a, b):\n    return a + b\n'] * 3, 320)


@pytest.fixture(scope='module')
def pool():
    p = WarmPool(workers=1, trust='generated')
    yield p
    p.close()


class Recorder:
    "A policy around a policy that keeps every prompt."
    def __init__(self, inner):
        self.inner, self.seen, self.sampling = inner, {}, inner.sampling
    def act(self, episodes):
        for episode in episodes:
            self.seen.setdefault(episode.name, []).append(episode.ids)
        return self.inner.act(episodes)


def script(tok):
    return ScriptPolicy(tok, lambda episode: Expert(episode.task, episode.seed))


def test_prompts_extend_the_record(tok, pool):
    policy = Recorder(script(tok))
    out = rollout(policy, tok, [make_task('train', i) for i in range(12)], lambda _: MicroEnv(pool), max_len=10**5)
    for t, prompts in zip(out, policy.seen.values()):
        for prompt in prompts:
            assert np.array_equal(t.ids[:len(prompt)], prompt)
        assert sum(t.mask) == sum(turn['tokens'] for turn in t.info['turns'])
        assert t.info['finish'] == 'submit' and t.reward in (0.0, 1.0)
        assert all(segment.kind in ('assistant', 'tool_call') for segment in t.segments if segment.trainable)


def test_repeatable(tok, pool):
    tasks = [make_task('train', i) for i in range(8)]
    once, again = (rollout(script(tok), tok, tasks, lambda _: MicroEnv(pool), seed=3, max_len=10**5) for _ in range(2))
    assert once == again


class Fixed:
    "Says the same text each turn."
    sampling = dict(temperature=0.5)
    def __init__(self, tok, text, finish='stop'):
        self.ids, self.finish = np.array(tok.encode(text), np.int32), finish
    def act(self, episodes):
        zeros = np.zeros(len(self.ids), np.float32)
        return [Completion(self.ids, zeros, zeros, self.finish, 7) for _ in episodes]


def test_cap_and_versions(tok, pool):
    t, = rollout(Fixed(tok, LIST), tok, [make_task('train', 0)], lambda _: MicroEnv(pool), max_turns=4, max_len=10**5)
    assert t.info['finish'] == 'cap' and t.n_turns == 4 and t.reward == 0 and set(t.version[t.mask]) == {7}


def test_trajectories_say_how_they_were_sampled(tok, pool):
    "The policy's temperature, greedy ones 0; a script has none."
    say = Fixed(tok, LIST)
    greedy = ModelPolicy(None, 0.0)
    greedy.act = say.act
    for policy, want in ((say, dict(temperature=0.5)), (script(tok), {}),
                         (greedy, dict(temperature=0.0, max_tokens=48))):
        t, = rollout(policy, tok, [make_task('train', 0)], lambda _: MicroEnv(pool), max_turns=4, max_len=10**5)
        assert t.sampling == want


@pytest.mark.parametrize('text', ['hello<|im_end|>', '<tool_call>fly away</tool_call><|im_end|>',
                                  '<tool_call>edit a<|im_end|>'])
def test_turns_without_a_readable_call_are_told_and_end_as_lost(tok, pool, text):
    t, = rollout(Fixed(tok, text), tok, [make_task('train', 0)], lambda _: MicroEnv(pool), max_len=10**5)
    assert t.info['finish'] == 'lost' and t.n_turns == 3 and t.reward == 0
    heard = [(segment.event, segment.turn) for segment in t.segments if segment.kind == 'user']
    assert heard[1:] == [('error', 0), ('error', 1)]


def test_cut_turns_are_closed_before_the_results(tok, pool):
    cut = Fixed(tok, '<tool_call>list</tool_call>', 'length')
    t, = rollout(cut, tok, [make_task('train', 0)], lambda _: MicroEnv(pool), max_turns=2, max_len=10**5)
    text = tok.decode(t.ids)
    assert '</tool_call><|im_end|>\n<|im_start|>tool\n' in text


def test_context_limit(tok, pool):
    t, = rollout(Fixed(tok, LIST), tok, [make_task('train', 0)], lambda _: MicroEnv(pool), max_turns=99, max_len=600)
    assert t.info['finish'] == 'length' and len(t.ids) <= 600 + 200


class Wordy(Env):
    "Results longer than any context."
    tools = MicroEnv.tools
    async def reset(self, task):
        return Observation([dict(role='user', content='a')])
    async def step(self, calls):
        return Observation([], [ToolResult(call.id, 'word ' * 3000, True) for call in calls])
    async def grade(self):
        return Grade(1.0, {})


def test_a_result_longer_than_the_context_ends_its_episode_and_no_other(tok, pool):
    say, envs = Fixed(tok, LIST), iter([Wordy(), MicroEnv(pool)])
    full, other = rollout(say, tok, [make_task('train', 0)] * 2, lambda _: next(envs), max_turns=3, max_len=1000)
    assert (full.info['finish'], full.n_turns, full.reward) == ('length', 1, 0)
    assert (other.info['finish'], other.n_turns) == ('cap', 3)


def test_sessions_of_any_size_stay_while_they_are_played(tok):
    episodes = [Episode(None, None, 0, f'0-{i}', Session(tok, f'0-{i}'), lambda episode: None) for i in range(3)]
    gateway = Waves(script(tok), tok, 1000, episodes)
    for episode in episodes:
        episode.session.n_bytes = 2**40
        gateway.manager.note(episode.session)
    assert all(gateway.manager.get('', episode.name) is episode.session for episode in episodes)


def test_watch_stops(tok, pool):
    t, = rollout(Fixed(tok, LIST), tok, [make_task('train', 0)], lambda _: MicroEnv(pool), max_len=10**5,
                 watch=lambda episode: 'stop' if len(episode.turns) == 2 else None)
    assert t.info['finish'] == 'stopped' and t.n_turns == 2


class Broken(MicroEnv):
    async def _run(self, tests):
        raise InfraError('sandbox gone')


def test_infrastructure_failure_is_no_reward(tok, pool):
    out = rollout(script(tok), tok, [make_task('train', i) for i in range(4)], lambda _: Broken(pool), max_len=10**5)
    assert all(t.reward is None and t.info['finish'] == 'infra' for t in out)


def test_recorded_text_equals_rendering(tok, pool):
    "What the record holds is what the chat template would write for the same dialogue."
    task = make_task('train', 2)
    t, = rollout(Fixed(tok, LIST), tok, [task], lambda _: MicroEnv(pool), max_turns=2, max_len=10**5)
    function = dict(name='list', arguments={})
    call = dict(role='assistant', content='', tool_calls=[dict(type='function', function=function)])
    result = dict(role='tool', content=' '.join(sorted(task.data['files'])))
    asked = [dict(role='system', content=SYSTEM), dict(role='user', content=task.data['issue'])]
    full = np.concatenate([segment.ids for segment in render(tok, [*asked, call, result, call])])
    assert np.array_equal(full[:-1], t.ids)   # a newline comes after each answer


# --- the same as a loop without HTTP

async def lockstep(engine, tok, tasks, make_env, seed, max_turns, max_len, temperature, watch):
    "The slow twin: ids in, ids out, no server; returns trajectories without grades."
    seeds, envs = [hash((seed, i)) % 2**31 for i in range(len(tasks))], [make_env(task) for task in tasks]
    segs = [render(tok, (await env.reset(task)).messages, env.tools, add_generation_prompt=True)
            for env, task in zip(envs, tasks)]
    turns, ends, given = [[[] for _ in tasks] for _ in range(3)]
    ids, live = lambda i: np.concatenate([segment.ids for segment in segs[i]]), list(range(len(tasks)))
    while live:
        free = [i for i in live if not given[i]]
        requests = [Request(ids(i), 48, temperature, stop=(tok.eos_token_id,), session=f'{seed}-{i}',
                            seed=hash((seeds[i], len(turns[i]))) % 2**31) for i in free]
        sampled = dict(zip(free, engine.generate(requests) if free else []))
        for i in live:
            done, event = (sampled[i], None) if i in sampled else (given[i].pop(), 'correction')
            text = tok.decode(done.ids[:-1] if done.finish == 'stop' else done.ids)
            _, calls, wrong = parse_calls(text, envs[i].tools)
            n = len(turns[i])
            for segment in generation_segments(tok, done.ids, n, done.logprobs, done.entropy, done.versions,
                                               event is None):
                segment.event = event
                segs[i].append(segment)
            calls = [ToolCall(call['function']['name'], call['function']['arguments'], call['id']) for call in calls]
            obs = await envs[i].step(calls)
            turns[i].append([(call.name, call.arguments, result.ok) for call, result in zip(calls, obs.results)])
            lost = n >= 2 and not any(turns[i][-3:])
            ends[i] = 'submit' if obs.done else 'lost' if lost else 'cap' if n + 1 == max_turns else None
            if not obs.done and (said := watch(i, n + 1)) is not None:
                if isinstance(said, str):
                    ends[i] = 'stopped'
                else:
                    given[i].append(Completion(said, None, None, 'stop', -1))
            if ends[i]: continue
            wrong = [reason.partition(': ')[2].replace(' with </tool_call>', '') for reason in wrong]
            wrong = wrong or ([] if obs.results else ['no tool call'])
            heard = [dict(role='tool', content=result.text) for result in obs.results]
            if wrong:
                heard.append(dict(role='user', content='\n'.join(wrong)))
            event = 'error' if wrong or not all(result.ok for result in obs.results) else 'tool'
            new = [Segment(segment.ids, segment.kind, n, False, event=event)
                   for segment in extend_segments(tok, ids(i), heard, n)]
            if len(ids(i)) + sum(map(len, new)) > max_len - 64:
                ends[i] = 'length'
            else:
                segs[i] += new
        live = [i for i in live if not ends[i]]
    return list(zip(segs, ends, turns))


@pytest.mark.parametrize('temperature, max_len', [(1.0, 1024), (0.0, 300)])
def test_the_same_tokens_as_a_loop_without_http(pool, temperature, max_len):
    """To the bit, in bf16: ids, log-probs, entropies, versions, segments, ends; with turns put in, rollouts stopped,
    and a full context."""
    lm, tok = load_model(ROOT / 'data/base')
    tasks, spoken = [make_task('train', i // 2) for i in range(8)], ['list', 'view gone.py', 'search a', 'test']
    def watch(i, n):   # something for each: stopped, left alone, or helped with calls of which some fail
        if i == 7 and n == 2: return 'stop'
        if not i % 2 or n not in (1, 3): return None
        return np.array(tok.encode(f'<tool_call>{spoken[i // 2]}</tool_call>' + LIST), np.int32)
    out = []
    for http in (False, True):
        engine = HFEngine(lm, max_len=1024, slots=8, dtype=torch.bfloat16, version=3)
        if http:
            out.append(rollout(ModelPolicy(engine, temperature), tok, tasks, lambda _: MicroEnv(pool), 7, 6, max_len,
                               watch=lambda episode: watch(int(episode.name.split('-')[1]), len(episode.turns))))
        else:
            out.append(asyncio.run(lockstep(engine, tok, tasks, lambda _: MicroEnv(pool), 7, 6, max_len, temperature,
                                            watch)))
        engine.close()
    for (segments, finish, turns), t in zip(*out):
        assert Trajectory('', segments) == Trajectory('', t.segments) and finish == t.info['finish']
        assert turns == [[(call['name'], call['arguments'], call['ok']) for call in turn['calls']]
                         for turn in t.info['turns']]
    ends = {finish for _, finish, _ in out[0]}
    assert {'lost', 'stopped'} <= ends and ('length' in ends) == (max_len == 300)
    versioned = [segment.version for t in out[1] for segment in t.segments if segment.version is not None]
    assert {3, -1} == {version for versions in versioned for version in versions}


def test_a_socket_makes_no_difference(tok, pool):
    tasks = [make_task('train', i) for i in range(4)]
    async def over_tcp():
        episodes = [Episode(task, MicroEnv(pool), hash((2, i)) % 2**31, f'2-{i}',
                            Session(tok, f'2-{i}', task=task.id), lambda episode: None) for i, task in enumerate(tasks)]
        gateway = Waves(script(tok), tok, 10**5, episodes)
        async with running(gateway) as gateway.address, httpx2.AsyncClient() as client:
            await asyncio.gather(*[play_episode(gateway, episode, client, 14) for episode in episodes])
        return [await finished(episode, gateway.policy.sampling) for episode in episodes]
    assert asyncio.run(over_tcp()) == rollout(script(tok), tok, tasks, lambda _: MicroEnv(pool), seed=2, max_len=10**5)


def test_an_error_of_the_policy_or_of_the_environment_is_raised_as_it_is(tok, pool):
    class Sick(Fixed):
        def act(self, episodes):
            raise FloatingPointError('not finite')
    with pytest.raises(FloatingPointError, match='not finite'):
        rollout(Sick(tok, 'x'), tok, [make_task('train', i) for i in range(3)], lambda _: MicroEnv(pool), max_len=10**5)
    class Bug(MicroEnv):
        async def step(self, calls):
            if self.task.id == make_task('train', 1).id: raise KeyError('a bug')
            return await super().step(calls)
    waves, say = [], Fixed(tok, LIST)
    class Counted:
        sampling = {}
        def act(self, episodes):
            waves.append(len(episodes))
            return say.act(episodes)
    with pytest.raises(KeyError, match='a bug'):
        rollout(Counted(), tok, [make_task('train', i) for i in range(3)], lambda _: Bug(pool), max_len=10**5)
    assert waves == [3]   # the others aren't played on
    with pytest.raises(RuntimeError, match='context_length_exceeded'):   # of the very first prompt
        rollout(Fixed(tok, 'x'), tok, [make_task('train', 0)], lambda _: MicroEnv(pool), max_len=20)


def test_a_session_that_is_not_one_clean_path_is_refused(tok):
    class Liar(Env):
        "Changes, in the dialogue, what it said before."
        tools = []
        async def reset(self, task):
            self.said = [dict(role='user', content='a')]
            return Observation(self.said)
        async def step(self, calls):
            self.said[0]['content'] += 'b'
            return Observation()
        async def grade(self):
            raise InfraError('nothing to grade')
    with pytest.raises(RuntimeError, match='not one clean path'):
        rollout(Fixed(tok, 'x<|im_end|>'), tok, [make_task('train', 0)], lambda _: Liar(), max_len=10**5)


def test_sessions_are_dropped_and_progress_is_told(tok, pool):
    held, told = [], []
    def watch(episode):
        held.append(weakref.ref(episode.session))
    rollout(script(tok), tok, [make_task('train', i) for i in range(4)], lambda _: MicroEnv(pool), max_len=10**5,
            watch=watch, progress=lambda *counts: told.append(counts))
    gc.collect()
    assert held and not any(session() for session in held) and told == [(i, 4) for i in (1, 2, 3, 4)]


def test_a_recorded_turn_ends_with_any_end_token():
    tok = train_tokenizer(['a b'], 270)
    tok.eos_token = '<|endoftext|>'  # the template's is <|im_end|>
    assert [ended(np.array([70, i]), tok) for i in (1, 2, 0, 71)] == ['stop', 'stop', 'length', 'length']
