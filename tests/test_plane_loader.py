"Exactly once, whoever is killed when; the staleness bound; capacity"
import asyncio
import os
import signal
import subprocess
import sys
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.core.types import Group, Segment, Trajectory
from kat.learn.rl import RLTrainer
from kat.plane.loader import Gate, Loader, SQLiteGroups, capacity, staleness

def make_group(i, version=0, versions=None, mask=True):
    v = versions or [version]*3
    t = Trajectory(f't{i}', [Segment([9, 9], 'user'), Segment(range(len(v)), 'assistant', trainable=mask, version=v)], reward=1.)
    return Group(f't{i}', [t])

@pytest.fixture
def path(tmp_path): return tmp_path/'some'/'groups.sqlite'

def fill(store, n, version=0):
    for i in range(n): store.add(str(i), make_group(i, version))

def tasks(groups): return [g.task for g in groups]

def none(): return False

def test_order_and_round_trip(path):
    store = SQLiteGroups(path)
    groups = [make_group(i, versions=[i, -1 if i % 2 else i]) for i in range(40)]
    assert all(store.add(str(i), g) for i, g in enumerate(groups)) and not store.add('7', make_group(99))
    assert list(Loader(store, lambda: 0, wait=none, ahead=7)) == groups
    store.close()
    again = SQLiteGroups(path)
    assert tasks(Loader(again, lambda: 0, start=38, wait=none)) == ['t38', 't39']
    assert tasks(Loader(again, lambda: 0, consumer='other', wait=none)) == tasks(groups)

def test_waits_for_more(path):
    store, i = SQLiteGroups(path), iter(range(5))
    def wait():
        n = next(i, None)
        if n is not None and n != 2: store.add(str(n), make_group(n))
        return n is not None
    assert tasks(Loader(store, lambda: 0, wait=wait)) == ['t0', 't1', 't3', 't4']

@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30)), max_size=8), st.integers(1, 4), st.integers(1, 3),
       st.lists(st.integers(0, 4), min_size=1, max_size=25), st.sampled_from([None, 0, 2]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exactly_once(tmp_path_factory, kills, per_step, save_every, versions, bound):
    "trainer and loader killed anywhere, groups arriving in between: the surviving weights are those of an undisturbed run"
    def run(kills):
        store = SQLiteGroups(tmp_path_factory.mktemp('s')/'g.sqlite')
        disk, arrived, dropped = dict(seen=0, weights=[], version=0), 0, None
        for more, after in [*kills, (len(versions), 10**9)]:
            for arrived in range(arrived, min(arrived + more, len(versions))): store.add(str(arrived), make_group(arrived, versions[arrived]))
            arrived = min(arrived + (more > 0), len(versions))
            now, life = dict(disk), iter(range(after))
            loader = Loader(store, lambda: now['version'], start=now['seen'], max_staleness=bound, wait=none, ahead=3)
            groups = iter(loader)
            try:
                while batch := list(islice(groups, per_step)):
                    for g in batch:
                        if next(life, None) is None: raise KeyboardInterrupt
                    if len(batch) < per_step and after < 10**9: break  # the rest is to come
                    now = dict(seen=now['seen'] + len(batch), version=now['version'] + 1, weights=now['weights'] + tasks(batch))
                    if now['version'] % save_every == 0: disk = now
                else:
                    if after == 10**9: disk, dropped = now, loader.dropped
            except KeyboardInterrupt: pass
        return disk, dropped
    disk, dropped = run(kills)
    seen = disk['weights']
    assert len(seen) == len(set(seen)) == disk['seen']
    if dropped is not None: assert len(seen) + dropped == len(versions)
    if bound is None: assert seen == [f't{i}' for i in range(len(versions))]
    else: assert seen == sorted(seen, key=lambda t: int(t[1:]))

def test_a_checkpoint_of_another_run(path):
    store = SQLiteGroups(path)
    fill(store, 3)
    list(Loader(store, lambda: 0, wait=none))
    with pytest.raises(ValueError, match="'trainer' was never given 9 groups"): Loader(store, lambda: 0, start=9)
    with pytest.raises(ValueError, match="'x' was never given 2"): Loader(store, lambda: 0, start=2, consumer='x')
    with pytest.raises(ValueError, match='max_staleness'): Loader(store, lambda: 0, max_staleness=-1)

def test_going_back_forgets_what_came_after(path):
    store = SQLiteGroups(path)
    for i in range(6): store.add(str(i), make_group(i, version=i % 2))
    assert tasks(Loader(store, lambda: 0, wait=none)) == [f't{i}' for i in range(6)]
    stricter = Loader(store, lambda: 1, start=1, max_staleness=0, wait=none)  # back to the first; now every other one is too old
    assert tasks(stricter) == ['t1', 't3', 't5'] and stricter.dropped == 2
    assert store.committed('trainer', 4) == (6, 2)
    with pytest.raises(ValueError): store.committed('trainer', 5)

def test_staleness():
    assert staleness(make_group(0, versions=[3, 5, 4]), 7) == 4
    assert staleness(make_group(0, versions=[1], mask=False), 7) == 0
    with pytest.raises(ValueError, match='task t0: trajectory 0 .* without a weight version'): staleness(make_group(0, versions=[3, -1]), 7)
    bare = Group('t', [Trajectory('t', [Segment([1], 'assistant', trainable=True)])])
    with pytest.raises(ValueError, match='without a weight version'): staleness(bare, 1)

def test_killed_for_real(path):
    "a process with SIGKILL in the middle of handing out"
    fill(SQLiteGroups(path), 20)
    code = ("import sys\nfrom kat.plane.loader import Loader, SQLiteGroups\n"
            "for g in Loader(SQLiteGroups(sys.argv[1]), lambda: 0, start=int(sys.argv[2]), wait=lambda: False): print(g.task, flush=True)\n")
    p = subprocess.Popen([sys.executable, '-c', code, str(path), '0'], stdout=subprocess.PIPE, text=True)
    got = [p.stdout.readline().strip() for _ in range(5)]
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert got == [f't{i}' for i in range(5)]
    assert tasks(Loader(SQLiteGroups(path), lambda: 0, start=4, wait=none)) == [f't{i}' for i in range(4, 20)]

def test_many_writers(path):
    "threads with connections of their own: every group once, in one order"
    def write(k):
        s = SQLiteGroups(path)
        for i in range(15): s.add(f'{i}', make_group(i)); s.add(f'{k}-{i}', make_group(100*k + i))
        s.close()
    SQLiteGroups(path).close()
    threads = [threading.Thread(target=write, args=(k,)) for k in (1, 2, 3)]
    for t in threads: t.start()
    for t in threads: t.join()
    got = tasks(Loader(SQLiteGroups(path), lambda: 0, wait=none))
    assert len(got) == len(set(got)) == 60

def test_the_real_trainer_killed_and_resumed(path, tmp_path):
    "RLTrainer over a loader, stopped in the middle of a step: the same weights as undisturbed, to the bit"
    rng = np.random.default_rng(0)
    def group(i):
        return Group(f't{i}', [Trajectory(f't{i}', [Segment(rng.integers(0, 64, 5), 'user'), Segment(
            rng.integers(0, 64, 6), 'assistant', trainable=True, logprobs=-4*np.ones(6), version=[0]*6)], reward=float(k)) for k in range(2)])
    store = SQLiteGroups(path)
    for i in range(8): store.add(str(i), group(i))
    def train(out, consumer, die_at=None):
        torch.manual_seed(0)
        m = Qwen3ForCausalLM(Qwen3Config(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=1, head_dim=8))
        t = RLTrainer(m, tmp_path/out, groups_per_step=2, save_every=1, dtype=None)
        def take():
            for n, g in enumerate(Loader(store, lambda: t.version, start=t.groups_seen, consumer=consumer, wait=none)):
                if die_at is not None and t.groups_seen + n % 2 >= die_at: raise KeyboardInterrupt
                yield g
        t.train(take(), max_steps=4)
        return m
    want = train('a', 'a')
    for die_at in (1, 3, 5):
        with pytest.raises(KeyboardInterrupt): train('b', 'b', die_at)
    got = train('b', 'b')
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
        for t in tasks: t.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return ages
    assert max(asyncio.run(go())) <= bound

def test_gate_counts_what_is_lost():
    async def go():
        gate = Gate(2, 0)
        await gate.enter()
        await gate.enter()
        third = asyncio.create_task(gate.enter())
        for _ in range(5): await asyncio.sleep(0)
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
