"Exactly once, whoever is killed when; the staleness bound; capacity"
import asyncio
import os
import signal
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from plane_world import tokenizer, z
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.core.types import Group, Segment, Trajectory
from kat.learn.rl import RLTrainer
from kat.infer.requests import Completion
from kat.plane.loader import Gate, Loader, capacity, staleness
from kat.plane.manager import Session
from kat.plane.store import Store, StoreError

SA = pytest.importorskip('sqlalchemy')

def make_group(i, version=0, versions=None, mask=True):
    v = versions or [version]*3
    t = Trajectory(f't{i}', [Segment([9, 9], 'user'), Segment(range(len(v)), 'assistant', trainable=mask, version=v)],
                   reward=1.)
    return Group(f't{i}', [t])

def rollout(i, version=0, ids=(3, 4, 5)):
    "A finished session of task i, and its turn"
    s = Session(tokenizer(), f's{i}', task=f't{i}', reward=1., finished=True)
    done = Completion(np.array(ids, np.int32), z(len(ids)), z(len(ids)), 'stop', version)
    return s, s.plan([dict(role='user', content='do it')]).turn(done, dict(role='assistant', content='done'))

def write(store, rollouts):
    async def all_():
        await asyncio.gather(*[store.write(s, [t]) for s, t in rollouts])
    asyncio.run(all_())

def finish(store, i):
    return store.finish(str(i), [f's{i}'])

@pytest.fixture
def stores(url):
    "Opens the store again and again; closes all."
    out = []
    def again():
        out.append(Store(url))
        return out[-1]
    yield again
    for s in out:
        s.close()

def fill(store, versions):
    write(store, [rollout(i, v) for i, v in enumerate(versions)])
    for i in range(len(versions)):
        assert finish(store, i)

def tasks(groups):
    return [g.task for g in groups]

def none():
    return False

def test_order_and_restart(stores):
    store = stores()
    write(store, [rollout(i, i) for i in range(12)])
    order = [3, 0, 11, 7, 1, 2, 10, 9, 4, 5, 8, 6]
    assert all(finish(store, i) for i in order) and not finish(store, 7)
    got = list(Loader(store, lambda: 0, wait=none, ahead=5))
    assert tasks(got) == [f't{i}' for i in order] and [g.trajectories[0].version[-1] for g in got] == order
    again = stores()
    assert tasks(Loader(again, lambda: 0, start=10, wait=none)) == ['t8', 't6']
    assert tasks(Loader(again, lambda: 0, consumer='other', wait=none)) == tasks(got)

def test_waits_for_more(stores):
    store, i = stores(), iter(range(5))
    write(store, [rollout(k) for k in range(5)])
    def wait():
        n = next(i, None)
        if n is not None and n != 2:
            finish(store, n)
        return n is not None
    assert tasks(Loader(store, lambda: 0, wait=wait)) == ['t0', 't1', 't3', 't4']

def train(store, disk, steps_left, versions, bound, per_step, save_every, over):
    """A life of a trainer that is killed after so many groups; what it leaves on disk.

    `disk`: dict(seen, weights, version, dropped); `over`: no more groups will come, so the last batch may be small."""
    now, life = dict(disk), iter(range(steps_left))
    loader = Loader(store, lambda: now['version'], start=now['seen'], max_staleness=bound, wait=none, ahead=3)
    groups = iter(loader)
    while batch := list(islice(groups, per_step)):
        for _ in batch:
            if next(life, None) is None: return disk
        if len(batch) < per_step and not over: return disk  # the rest is to come
        now = dict(seen=now['seen'] + len(batch), version=now['version'] + 1, weights=now['weights'] + tasks(batch),
                   dropped=loader.dropped)
        if now['version'] % save_every == 0:
            disk = now
    return now | dict(dropped=loader.dropped) if over else disk

@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), max_size=8), st.integers(1, 4), st.integers(1, 3),
       st.lists(st.integers(0, 4), min_size=1, max_size=25), st.sampled_from([None, 0, 2]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_once(tmp_path_factory, kills, per_step, save_every, versions, bound):
    """trainer and loader killed anywhere, groups finished in between: in the surviving weights every group is once, but
    for those too old"""
    store = Store(tmp_path_factory.mktemp('s')/'g.db')
    # nobody pulls the plug here
    SA.event.listen(store.engine, 'connect', lambda raw, _: raw.execute('PRAGMA synchronous=OFF'))
    store.engine.dispose()
    write(store, [rollout(i, v) for i, v in enumerate(versions)])
    disk, arrived = dict(seen=0, weights=[], version=0, dropped=0), 0
    more = dict(versions=versions, bound=bound, per_step=per_step, save_every=save_every)
    for n, life in kills:
        for arrived in range(arrived, min(arrived + n, len(versions))):
            finish(store, arrived)
        arrived = sum(1 for _ in store.finished_groups(0, 99))
        disk = train(store, disk, life, over=False, **more)
    for i in range(arrived, len(versions)):
        finish(store, i)
    disk = train(store, disk, 10**9, over=True, **more)
    store.close()
    seen = disk['weights']
    assert len(seen) == len(set(seen)) == disk['seen'] and len(seen) + disk['dropped'] == len(versions)
    assert seen == sorted(seen, key=lambda t: int(t[1:])) and (bound is not None or disk['dropped'] == 0)

def test_a_checkpoint_of_another_run(stores):
    store = stores()
    fill(store, [0]*3)
    list(Loader(store, lambda: 0, wait=none))
    with pytest.raises(ValueError, match="'trainer' was never given 9 groups"):
        Loader(store, lambda: 0, start=9)
    with pytest.raises(ValueError, match="'x' was never given 2"):
        Loader(store, lambda: 0, start=2, consumer='x')
    with pytest.raises(ValueError, match='max_staleness'):
        Loader(store, lambda: 0, max_staleness=-1)

def test_going_back_forgets_what_came_after(stores):
    store = stores()
    fill(store, [i % 2 for i in range(6)])
    assert tasks(Loader(store, lambda: 0, wait=none)) == [f't{i}' for i in range(6)]
    # back to the first; now every other one is too old
    stricter = Loader(store, lambda: 1, start=1, max_staleness=0, wait=none)
    assert tasks(stricter) == ['t1', 't3', 't5'] and stricter.dropped == 2
    assert store.given('trainer', 4) == (6, 2)
    with pytest.raises(ValueError):
        store.given('trainer', 5)

def test_what_could_not_be_written_down_is_not_handed_out(tmp_path):
    path = tmp_path/'s.db'
    store, groups = Store(path), []
    fill(store, [0]*3)
    loader = iter(Loader(store, lambda: 0, wait=none))
    groups.append(next(loader))
    read_only = lambda raw, _: raw.execute('PRAGMA query_only=1')
    SA.event.listen(store.engine, 'connect', read_only)
    store.engine.dispose()
    with pytest.raises(StoreError, match='read-only'):
        next(loader)
    store.close()
    store = Store(path)
    assert tasks(groups + list(Loader(store, lambda: 0, start=1, wait=none))) == ['t0', 't1', 't2']
    store.close()

def test_staleness():
    assert staleness(make_group(0, versions=[3, 5, 4]), 7) == 4
    assert staleness(make_group(0, versions=[1], mask=False), 7) == 0
    with pytest.raises(ValueError, match='task t0: trajectory 0 .* without a weight version'):
        staleness(make_group(0, versions=[3, -1]), 7)
    bare = Group('t', [Trajectory('t', [Segment([1], 'assistant', trainable=True)])])
    with pytest.raises(ValueError, match='without a weight version'):
        staleness(bare, 1)

def test_killed_for_real(tmp_path):
    "a process with SIGKILL in the middle of handing out"
    store = Store(tmp_path/'s.db')
    fill(store, [0]*20)
    code = ("import sys\nfrom kat.plane.loader import Loader\nfrom kat.plane.store import Store\n"
            "for g in Loader(Store(sys.argv[1]), lambda: 0, wait=lambda: False): print(g.task, flush=True)\n")
    p = subprocess.Popen([sys.executable, '-c', code, tmp_path/'s.db'], stdout=subprocess.PIPE, text=True)
    got = [p.stdout.readline().strip() for _ in range(5)]
    os.kill(p.pid, signal.SIGKILL)
    p.communicate()
    assert got == [f't{i}' for i in range(5)]
    assert tasks(Loader(store, lambda: 0, start=4, wait=none)) == [f't{i}' for i in range(4, 20)]
    store.close()

def test_the_real_trainer_killed_and_resumed(tmp_path):
    "RLTrainer over a loader, stopped in the middle of a step: the same weights as undisturbed, to the bit"
    rng, store = np.random.default_rng(0), Store(tmp_path/'s.db')
    for i in range(8):
        two = [rollout(f'{i}-{k}', ids=rng.integers(0, 64, 6)) for k in range(2)]
        for k, (x, t) in enumerate(two):
            x.task, x.reward = f't{i}', float(k)
            for part in t.prompt:
                part.ids = part.ids % 64   # the model's vocabulary is small
        write(store, two)
        assert store.finish(str(i), [x.name for x, _ in two])
    def train(out, consumer, die_at=None):
        torch.manual_seed(0)
        m = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1, head_dim=8))
        t = RLTrainer(m, tmp_path/out, groups_per_step=2, save_every=1, dtype=None)
        def take():
            for n, g in enumerate(Loader(store, lambda: t.version, start=t.groups_seen, consumer=consumer, wait=none)):
                if die_at is not None and t.groups_seen + n % 2 >= die_at: raise KeyboardInterrupt
                yield g
        t.train(take(), max_steps=4)
        return m
    want = train('a', 'a')
    for die_at in (1, 3, 5):
        with pytest.raises(KeyboardInterrupt):
            train('b', 'b', die_at)
    got = train('b', 'b')
    store.close()
    assert all(torch.equal(x, y) for x, y in zip(want.parameters(), got.parameters()))

def test_capacity():
    assert capacity(0, 0, 4, 0, 0) == 4 and capacity(0, 0, 4, 0, 4) == 0  # on policy: one batch
    assert capacity(3, 2, 4, 20, 2) == 2

@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_in_order_nothing_gets_too_old(per_step, bound, makers):
    "groups that finish in the order of their start are never older than the bound, however many makers there are"
    async def go():
        gate, queue, version, ages = Gate(per_step, bound), asyncio.Queue(), 0, []
        async def make():
            while True:
                await gate.enter()
                await queue.put(gate.version)
                await gate.leave(True)
        tasks = [asyncio.create_task(make()) for _ in range(makers)]
        while version < 12:
            ages += [version - await queue.get() for _ in range(per_step)]
            version += 1
            await gate.advance(version)
        for t in tasks:
            t.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return ages
    assert max(asyncio.run(go())) <= bound

def test_gate_counts_what_is_lost():
    async def go():
        gate = Gate(2, 0)
        await gate.enter()
        await gate.enter()
        third = asyncio.create_task(gate.enter())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not third.done() and gate.room == 0
        await gate.leave(False)  # lost: another may be made
        await third
        await gate.leave(True)
        await gate.leave(True)
        assert gate.room == 0
        await gate.advance(0, dropped=1)
        assert gate.room == 1
        await gate.advance(1)
        assert gate.room == 3
    asyncio.run(go())
