"""Agents on their own: nobody waits for a slow sandbox, the staleness bound holds, and each group is trained on once,
whoever is killed"""
import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_world import KeyEnv, Keys
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.core.io import UserError
from kat.core.template import train_tokenizer
from kat.infer.engines import HFEngine
from kat.infer.serving import HFAsyncEngine
from kat.plane.loader import Loader
from kat.plane.store import Store
from kat.envs.base import InfraError, find_world
from kat.recipe.async_rl import (Agents, AsyncPlay, Making, RolloutWorker, arriving, as_played, check_mode, make_groups,
                                 unsampled)
from kat.recipe.pipeline import locked
from kat.recipe.rollouts import ModelPolicy, rollout, teacher
from kat.recipe.weights import PulledEngine, WeightsFolder

HELPERS = Path(__file__).parents[1]/'helpers'


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(['value of total is price\n'] * 3, 320)


def small(tok, seed=0):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                        max_position_embeddings=2048))


def play_of(**changes):
    return AsyncPlay(**dict(model='', envs='toy-keys', seed=0, groups=6, groups_per_step=2, rollouts=2,
                            max_staleness=1, max_turns=2, max_len=1500) | changes)


@asynccontextmanager
async def making_of(folder, tok, play, make_env=lambda task: KeyEnv(), life=1):
    "What a worker makes, on this event loop, with a store and weights in `folder`"
    store, weights = Store(folder/'store.db'), WeightsFolder(folder/'weights')
    engine = PulledEngine(HFAsyncEngine(small(tok), max_len=1600, slots=8), weights)
    try:
        yield Making(play, Keys(), Agents(engine, tok, store, 1600, 64), make_env, life), store, weights
    finally:
        await engine.close()
        store.close()


async def train(making, store, weights, tok, updates, start=(0, 0), seen=None, at=lambda version: None):
    "A trainer that only counts: takes groups of a step, publishes; -> loader, [(version, group)]"
    play, (version, groups), out, on = making.play, start, [], True
    weights.publish(small(tok, version), version)
    loader = Loader(store, lambda: version, start=groups, max_staleness=play.max_staleness, wait=lambda: False)
    task = asyncio.ensure_future(make_groups(making, lambda facts: None, lambda: on, beat=.005))
    async with asyncio.timeout(120):
        while version < updates:
            batch = []
            while len(batch) < play.groups_per_step:
                if task.done():
                    task.result()
                if (group := next(iter(loader), None)) is None:
                    await asyncio.sleep(.005)
                else:
                    batch.append(group)
            out += [(version, group) for group in batch]
            version += 1
            weights.publish(small(tok, version), version)
            at(version)
    on = False
    await task
    return loader, out


def check_bound(out, bound):
    for version, group in out:
        versions = np.concatenate([t.version[t.mask] for t in group.trajectories])
        assert versions.min() >= version - bound and versions.max() <= version
    keys = [group.info['key'] for _, group in out]
    assert len(set(keys)) == len(keys)


class Slow(KeyEnv):
    "A sandbox that lets others go first: so many turns of the event loop per step"
    def __init__(self, patience):
        self.patience = patience
    async def step(self, calls):
        for _ in range(self.patience):
            await asyncio.sleep(0)
        return await super().step(calls)


@settings(max_examples=4, deadline=None)
@given(bound=st.integers(0, 2), slots=st.sampled_from([None, 2]), slow=st.lists(st.integers(0, 4000), min_size=1,
                                                                                 max_size=5))
def test_the_staleness_bound_holds(tok, tmp_path_factory, bound, slots, slow):
    order = iter(slow * 100)
    async def main():
        play = play_of(groups=8, max_staleness=bound, slots=slots)
        folder = tmp_path_factory.mktemp('run')
        async with making_of(folder, tok, play, lambda task: Slow(next(order))) as (making, store, weights):
            loader, out = await train(making, store, weights, tok, 4)
            check_bound(out, bound)
            assert len(out) == 8 == loader.given and loader.cursor == 8 + loader.dropped
    asyncio.run(main())


class Stuck(KeyEnv):
    def __init__(self, gate, mine):
        self.gate, self.mine = gate, mine
    async def step(self, calls):
        if self.mine:
            await self.gate.wait()
        return await super().step(calls)


def test_a_slow_sandbox_stops_nobody_and_its_old_group_is_dropped_and_counted(tok, tmp_path):
    async def main():
        gate, first = asyncio.Event(), iter([True])
        def at(version):
            if version == 3:   # three updates were made without it
                gate.set()
        play = play_of(groups=12)
        make_env = lambda task: Stuck(gate, next(first, False))
        async with making_of(tmp_path, tok, play, make_env) as (making, store, weights):
            loader, out = await train(making, store, weights, tok, 6, at=at)
            check_bound(out, 1)
            assert len(out) == 12 and 'g0' not in [group.info['key'] for _, group in out]
            assert loader.dropped >= 1 and 'g0' in making.stock.keys
    asyncio.run(main())


def test_groups_are_those_of_the_synchronous_rollouts(tok, tmp_path):
    "Same tokens, kinds, events, rewards and facts, where the engine's weights and noise are the same."
    play = play_of(groups=1, groups_per_step=1, rollouts=3)
    engine = HFEngine(small(tok), max_len=1600, slots=8)
    want = rollout(ModelPolicy(engine), tok, [play.task(Keys(), 0)] * 3, lambda task: KeyEnv(), seed=5 * 10**4,
                   max_turns=2, max_len=1500)
    async def main():
        async with making_of(tmp_path, tok, play) as (making, store, weights):
            _, out = await train(making, store, weights, tok, 1)
            return as_played(out[0][1]).trajectories
    got = asyncio.run(main())
    for new, old in zip(got, want, strict=True):
        assert np.array_equal(new.ids, old.ids) and np.array_equal(new.mask, old.mask) and new.reward == old.reward
        np.testing.assert_allclose(new.logprobs[new.mask], old.logprobs[old.mask], atol=1e-4)
        assert [(s.kind, s.event, s.turn) for s in new.segments] == [(s.kind, s.event, s.turn) for s in old.segments]
        def facts(t):
            return [{k: v for k, v in turn.items() if k != 'entropy_first'} for turn in t.info['turns']]
        assert facts(new) == facts(old) and new.info['finish'] == old.info['finish']


def test_an_experts_trajectories_have_no_age(tok):
    tasks = [Keys().train_task(0, 0)]
    played = rollout(teacher(Keys(), tok), tok, tasks, lambda task: KeyEnv())
    assert (played[0].version[played[0].mask] == 0).all()
    assert (unsampled(played)[0].version == -1).all()


class Gone(KeyEnv):
    async def step(self, calls):
        raise InfraError('sandbox gone')


def test_lost_sandboxes_are_no_rewards(tok, tmp_path):
    async def main():
        broken = iter([True, False, False, False, True, True, True, True])
        play = play_of(groups=2, retries=1, rollouts=1)
        async with making_of(tmp_path, tok, play, lambda task: Gone() if next(broken, False) else KeyEnv()) as parts:
            making, store, weights = parts
            _, out = await train(making, store, weights, tok, 1)
            assert len(out) == 2 and making.facts['faults'] >= 1
            rewards = [t.reward for _, group in out for t in group.trajectories if t.info['finish'] == 'infra']
            assert not [reward for reward in rewards if reward is not None]
    asyncio.run(main())


class Wrong(KeyEnv):
    async def step(self, calls):
        raise ZeroDivisionError('a bug of the environment')


def test_an_error_that_is_nobodys_fault_but_the_codes_ends_the_worker(tok, tmp_path):
    async def main():
        async with making_of(tmp_path, tok, play_of(), lambda task: Wrong()) as (making, store, weights):
            with pytest.raises(ZeroDivisionError, match='a bug of the environment'):
                await train(making, store, weights, tok, 1)
    asyncio.run(main())


def test_a_trainer_back_from_a_checkpoint_gets_the_same_groups_again(tok, tmp_path):
    async def life(number, updates, start):
        async with making_of(tmp_path, tok, play_of(groups=8), life=number) as (making, store, weights):
            loader, out = await train(making, store, weights, tok, updates, start)
            return [(version, group.info['key']) for version, group in out]
    first = asyncio.run(life(1, 3, (0, 0)))
    again = asyncio.run(life(2, 4, (1, 2)))   # its checkpoint has one update, of two groups
    assert again[:4] == first[2:] and len({key for _, key in first[:2] + again}) == 8


def test_bad_settings_are_told_in_one_line(tmp_path):
    for mode, bound, words in (('asynch', None, 'mode=asynch: one of sync, async'), ('async', -1, 'max_staleness=-1'),
                               ('sync', 1, 'max_staleness=1 with mode=sync would be ignored')):
        with pytest.raises(UserError, match=words):
            check_mode(mode, bound)
    assert check_mode('async', None) == 1 and check_mode('async', 0) == 0 and check_mode('sync', None) is None
    for changes, words in ((dict(groups=0), 'groups=0'), (dict(slots=0), 'slots=0'), (dict(max_turns=0), 'max_turns=0'),
                           (dict(retries=-1), 'retries=-1')):
        with pytest.raises(UserError, match=words):
            play_of(**changes)
    RolloutWorker(tmp_path, play_of())
    with pytest.raises(UserError, match='other settings .seed: 0 there, 1 now'):
        RolloutWorker(tmp_path, play_of(seed=1))


# --- processes

@contextmanager
def run_folder(tmp_path, tok, monkeypatch, **changes):
    model = small(tok)
    model.save_pretrained(tmp_path/'model')
    tok.save_pretrained(tmp_path/'model')
    monkeypatch.setenv('PYTHONPATH', f'{HELPERS}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    (tmp_path/'run').mkdir()
    WeightsFolder(tmp_path/'run'/'weights').publish(model, 0)
    store = Store(tmp_path/'run'/'store.db')
    yield tmp_path/'run', play_of(model=str(tmp_path/'model'), envs='toy_world:Keys', **changes), store
    store.close()


def test_killed_workers_are_replaced_and_no_group_comes_twice(tok, tmp_path, monkeypatch):
    find_world('toy_world:Keys')
    with run_folder(tmp_path, tok, monkeypatch) as (run, play, store), locked(run) as hold:
        with RolloutWorker(run, play, hold=(hold,), group_s=120) as worker:
            version, numbers = 0, []
            for number, _ in arriving(Loader(store, lambda: version, max_staleness=1, wait=worker.wait), worker):
                numbers.append(number)
                if len(numbers) == 2:   # of the four that version 0 allows; the last two are the next worker's
                    os.kill(worker.process.pid, signal.SIGKILL)
                    version = 1
                    WeightsFolder(run/'weights').publish(small(tok, version), version)
                if len(numbers) == 6:
                    break
            state = worker.state()
        assert sorted(numbers) == list(range(6)) and state['life'] == 2 and worker.process.poll() is not None


def test_a_worker_without_its_trainer_ends_and_holds_the_folder_until_then(tok, tmp_path, monkeypatch):
    with run_folder(tmp_path, tok, monkeypatch) as (run, play, store):
        worker = RolloutWorker(run, play)
        with locked(run) as hold:
            worker.hold = (hold,)
            code = 'from kat.recipe.async_rl import worker; worker()'
            orphan = subprocess.Popen([sys.executable, '-c', code, str(run), '1'], pass_fds=(hold,))
            with pytest.raises(UserError, match='is being written by process'):
                with locked(run, patience=.1):
                    pass
        assert orphan.wait(60) == 0 and store.finished_groups(0, 9) == []
        with locked(run):
            pass


def test_the_workers_error_is_the_trainers(tok, tmp_path, monkeypatch):
    with run_folder(tmp_path, tok, monkeypatch) as (run, play, store):
        (tmp_path/'model'/'config.json').unlink()
        with RolloutWorker(run, play, group_s=60) as worker, pytest.raises(UserError) as caught:
            next(iter(Loader(store, lambda: 0, wait=worker.wait)))
        assert 'the rollout worker failed: ' in str(caught.value) and 'config.json is missing' in str(caught.value)


def test_the_trainers_wait_has_a_deadline_that_speaks(tok, tmp_path, monkeypatch):
    with run_folder(tmp_path, tok, monkeypatch) as (run, play, store):
        with RolloutWorker(run, play, group_s=.01) as worker, pytest.raises(RuntimeError) as caught:
            next(iter(Loader(store, lambda: 0, wait=worker.wait)))
        assert 'no finished group for 0.01 s; the rollout worker waits for' in str(caught.value)
