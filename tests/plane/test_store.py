"""The store: durable when it says so, idempotent, the same tree after a restart, clear refusals; on SQLite and on a
real PostgreSQL"""
import asyncio
import multiprocessing
import os
import signal
import threading
from dataclasses import replace

import pytest
from core_strategies import segments
from hypothesis import given, settings, strategies as st
from plane_world import full_store, say, tokenizer, z

from kat.core.io import read_records
from kat.core.types import groups_of
from kat.plane import schema
from kat.infer.requests import Completion
from kat.plane.manager import Session
from kat.plane.scenarios import SCENARIOS, play_scenario
from kat.plane.schema import pack, row_turn, turn_row, unpack
from kat.plane.store import Store, StoreError, export, store_error

import numpy as np

SA = pytest.importorskip('sqlalchemy')


# --- databases

class Opened:
    "A store that is closed at the end."
    def __init__(self, *args, **more):
        self.store = Store(*args, **more)
    def __enter__(self):
        return self.store
    def __exit__(self, *exc):
        self.store.close()


def session_of(name):
    return next(iter(play_scenario(next(x for x in SCENARIOS if x.name == name), tokenizer()).sessions.values()))


def turn(s, text='x', **more):
    p = s.plan([dict(role='user', content=text)])
    ids = np.array(say(s.tokenizer, text), np.int32)
    with p:
        return p.turn(Completion(ids, z(len(ids)), z(len(ids)), 'stop', 1), dict(role='assistant', content=text),
                      **more)


# --- rows

@settings(max_examples=60, deadline=None)
@given(st.lists(segments(0), max_size=3), st.lists(segments(0), max_size=3))
def test_segments_come_back(a, b):
    strip = lambda xs: [replace(s, extra={}) for s in xs]
    assert unpack(pack(strip(a), strip(b))) == (strip(a), strip(b))


def test_a_turn_comes_back():
    s = session_of('left in mid-answer, part of it kept')
    new = {}
    for t in s.turns.values():
        new[t.id] = row_turn(turn_row(s, t), new)
        assert turn_row(s, new[t.id]) | dict(created=0) == turn_row(s, t) | dict(created=0)


# --- the file

def test_a_new_file_is_its_owners_alone(tmp_path):
    old = os.umask(0)
    try:
        with Opened(tmp_path/'s.db') as store:
            store.sessions()
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(old)
    assert modes == dict.fromkeys(['s.db', 's.db-wal', 's.db-shm'], 0o600)
    (tmp_path/'s.db').chmod(0o640)  # shared on purpose
    with Opened(tmp_path/'s.db') as store:
        assert store.sessions() == [] and (tmp_path/'s.db').stat().st_mode & 0o777 == 0o640


# --- writing and reading

@pytest.mark.parametrize('name', ['compaction', 'two sub-agents side by side', 'old results elided, again and again',
                                  'left in mid-answer, part of it kept'])
def test_a_session_is_the_same_after_a_restart(url, name):
    s = session_of(name)
    s.name, s.uid = name, name
    with Opened(url) as store:
        for t in s.turns.values():
            asyncio.run(store.write(s, [t]))
    with Opened(url) as store:
        new = store.load(s.tokenizer, '', name)
        assert new.trajectories() == s.trajectories() and list(new.turns) == list(s.turns)
        for t in s.turns.values():
            assert turn_row(new, new.turns[t.id]) | dict(created=0) == turn_row(s, t) | dict(created=0)
        assert store.load(s.tokenizer, '', 'none') is None and store.load(s.tokenizer, 'else', name) is None


def test_what_is_written_twice_is_there_once(url):
    s = Session(tokenizer(), 's')
    t = turn(s)
    async def run(store):
        await asyncio.gather(*[store.write(s, [t]) for _ in range(20)])
        await store.write(s, [replace(t, message=dict(role='assistant', content='other'))])   # the first one stays
    with Opened(url) as store:
        asyncio.run(run(store))
        assert [x.message['content'] for x in store.load(s.tokenizer, '', 's').turns.values()] == ['x']
        assert [(r['name'], r['turns']) for r in store.sessions()] == [('s', 1)]


def test_many_writers_share_a_commit(url):
    async def run(store):
        all_ = [Session(tokenizer(), f's{i}') for i in range(200)]
        await asyncio.gather(*[store.write(s, [turn(s)]) for s in all_])
    with Opened(url) as store:
        asyncio.run(run(store))
        assert store.stats['turns'] == 200 and store.stats['commits'] < 20 and len(store.sessions()) == 200


def test_a_bad_row_fails_alone(url):
    good, bad = Session(tokenizer(), 'good'), Session(tokenizer(), 'bad')
    broken = turn(bad)
    broken.drift = None
    async def run(store):
        return await asyncio.gather(store.write(bad, [broken]), store.write(good, [turn(good)]), return_exceptions=True)
    with Opened(url) as store:
        a, b = asyncio.run(run(store))
        assert isinstance(a, SA.exc.IntegrityError) and b is None and store.writer.error is None
        assert [r['name'] for r in store.sessions()] == ['good']


def test_rewards_tasks_and_finish_are_kept(url):
    s = Session(tokenizer(), 's', owner='ann', task='t')
    t = s.add(turn(s))
    s.reward, s.finished, s.info, t.reward = 1.0, True, dict(note='\u0000 ü 𝄞'), 0.5
    with Opened(url) as store:
        asyncio.run(store.write(s, [t]))
        asyncio.run(store.update(s, t))
        new = store.load(s.tokenizer, 'ann', 's')
        assert (new.task, new.reward, new.finished, new.info,
                next(iter(new.turns.values())).reward) == ('t', 1.0, True, s.info, 0.5)
        assert [r['name'] for r in store.sessions(finished=True, owner='ann')] == ['s']
        assert not store.sessions(finished=False)
        early = Session(tokenizer(), 'early', task='t')       # updated before its first turn
        asyncio.run(store.update(early))
        assert store.load(s.tokenizer, '', 'early').task == 't'


@pytest.mark.parametrize('form', ['parquet', 'jsonl'])
def test_export(url, tmp_path, form):
    with Opened(url) as store:
        want = []
        for i, task in enumerate(['a', 'b', 'a']):
            s = Session(tokenizer(), f's{i}', task=task, reward=float(i), finished=i != 1)
            s.add(turn(s, f'text {i}'))
            asyncio.run(store.write(s, list(s.turns.values())))
            want += s.trajectories()
        assert export(store, tmp_path/f'out.{form}') == 2
        assert list(read_records(tmp_path/f'out.{form}')) == groups_of(want)
        assert export(store, tmp_path/f'done.{form}', finished=True) == 1
        other = Session(tokenizer(), 's0', 'ann', task='a', reward=0.)   # the same names, another owner
        asyncio.run(store.write(other, [other.add(turn(other))]))
        assert export(store, tmp_path/f'out.{form}') == 3
        got = [(g.task, [t.owner for t in g]) for g in read_records(tmp_path/f'out.{form}')]
        assert got == [('a', ['', '']), ('b', ['']), ('a', ['ann'])]


def test_the_most_recent_sessions(url):
    with Opened(url) as store:
        all_ = [Session(tokenizer(), f's{i}', owner='ann' if i else 'bob') for i in range(6)]
        for i in (0, 1, 2, 3, 4, 1):
            asyncio.run(store.write(all_[i], [turn(all_[i])]))
        asyncio.run(store.update(all_[5]))   # no turn yet
        names = lambda n, **where: [(r['name'], r['turns']) for r in store.sessions(recent=n, **where)]
        assert names(3, owner='ann') == [('s1', 2), ('s3', 1), ('s4', 1)] and names(9, owner='ann')[-1] == ('s5', 0)
        assert names(9) == [(r['name'], r['turns']) for r in store.sessions()] and names(1, owner='bob') == [('s0', 1)]


# --- finished groups

def finished(store, name, task='t', reward=1., owner='', n=1):
    "A session in the store, graded and finished."
    s = Session(tokenizer(), name, owner, task, reward=reward, finished=True, info=dict(of=name))
    asyncio.run(store.write(s, [s.add(turn(s, f'{name} {i}')) for i in range(n)]))
    return s


def test_a_group_is_what_its_sessions_were(url):
    with Opened(url) as store:
        a, b = finished(store, 'a', reward=0., n=2), finished(store, 'b')
        first = next(iter(a.turns.values()))
        first.reward = .25
        asyncio.run(store.update(a, first))
        want = b.trajectories() + a.trajectories()
        assert store.finish('k', ['b', 'a']) and not store.finish('k', ['b', 'a']) and not store.finish('k', ['a'])
        a.reward, a.info, first.reward = 9., dict(late=True), 9.
        asyncio.run(store.update(a, first))
        asyncio.run(store.write(a, [a.add(turn(a, 'too late'))]))
    with Opened(url) as store:
        (cursor, group), = store.finished_groups(0, 9)
        assert (cursor, group.task, group.trajectories, group.info) == (1, 't', want, dict(key='k'))
        assert not store.finished_groups(1, 9)
        assert len(next(store.groups(task='t'))) == len(want) + 1


def test_what_is_no_group(url):
    with Opened(url) as store:
        for name, more in (('a', {}), ('b', dict(task='u')), ('c', {}), ('d', dict(owner='ann')), ('empty', dict(n=0))):
            finished(store, name, **more)
        asyncio.run(store.update(Session(tokenizer(), 'open', task='t')))
        store.finish('first', ['c'])
        for names, why in (([], 'different sessions expected'), (['a', 'a'], 'different sessions expected'),
                           (['a', 'x'], "no session 'x'"), (['a', 'd'], "no session 'd'"),
                           (['a', 'open'], "'open' is not finished"), (['a', 'b'], "'b' is of task 'u', 'a' of 't'"),
                           (['a', 'c'], "'c' is in another group"), (['empty'], 'no turn')):
            with pytest.raises(ValueError, match=f"group 'k': .*{why}"):
                store.finish('k', names)
        assert [g.info['key'] for _, g in store.finished_groups(0, 9)] == ['first']
        assert store.finish('k', ['a', 'empty']) and store.finish('l', ['d'], owner='ann')
        assert [len(g) for _, g in store.finished_groups(1, 9)] == [1, 1]


def test_a_group_that_is_committed_later_has_a_later_cursor(url):
    """one finisher is between its insert and its commit while another one comes: nobody may see the second one's group
    first"""
    with Opened(url) as one, Opened(url) as two:
        for name in 'ab':
            finished(one, name)
        with one.writing() as conn:
            assert one._finish(conn, 'slow', ['a'], '')
            other = threading.Thread(target=two.finish, args=('quick', ['b']))
            other.start()
            assert not two.finished_groups(0, 9)
        other.join()
        assert [(c, g.info['key']) for c, g in two.finished_groups(0, 9)] == [(1, 'slow'), (2, 'quick')]


def test_a_reader_beside_many_finishers_skips_nothing(url):
    stores, n = [Store(url) for _ in range(3)], 12
    for i in range(3):
        for k in range(n):
            finished(stores[0], f'{i}-{k}', f'{i}-{k}')
    def work(i):
        for k in range(n):
            assert stores[i].finish(f'{i}-{k}', [f'{i}-{k}'])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    seen, at = [], 0
    with Opened(url) as reader:
        while len(seen) < 3*n and (any(t.is_alive() for t in threads) or reader.finished_groups(at, 1)):
            for at, g in reader.finished_groups(at, 5):
                seen.append((at, g.task))
    for t in threads:
        t.join()
    for s in stores:
        s.close()
    assert [c for c, _ in seen] == list(range(1, 3*n + 1)) and len({t for _, t in seen}) == 3*n


# --- the schema

def test_an_older_store_is_brought_up_and_a_newer_one_refused(url, monkeypatch):
    s = Session(tokenizer(), 's')
    with Opened(url) as store:
        asyncio.run(store.write(s, [turn(s)]))
    def add_column(conn):
        conn.exec_driver_sql("ALTER TABLE sessions ADD COLUMN colour TEXT DEFAULT 'red'")
    with monkeypatch.context() as m:
        m.setattr(schema, 'MIGRATIONS', [*schema.MIGRATIONS, add_column])
        for _ in range(2):   # the second time there is nothing to do
            with Opened(url) as store:
                with store.engine.begin() as c:
                    assert c.exec_driver_sql('SELECT colour FROM sessions').scalar() == 'red'
    with pytest.raises(ValueError, match='store has schema version 3, this kat knows 2: upgrade kat'):
        Store(url)


def test_a_store_of_the_first_version_gets_groups(url, monkeypatch):
    s = Session(tokenizer(), 's', finished=True)
    with monkeypatch.context() as m:
        m.setattr(schema, 'MIGRATIONS', schema.MIGRATIONS[:1])
        with Opened(url) as store:
            asyncio.run(store.write(s, [s.add(turn(s))]))
            assert not SA.inspect(store.engine).has_table('finished_groups')
    with Opened(url) as store:
        assert store.finish('k', ['s']) and [c for c, _ in store.finished_groups(0, 9)] == [1]


def test_a_migration_that_fails_leaves_the_store_as_it_was(url, monkeypatch):
    Store(url).close()
    def half(conn):
        conn.exec_driver_sql('CREATE TABLE half (x INTEGER)')
        raise RuntimeError('stop')
    with monkeypatch.context() as m:
        m.setattr(schema, 'MIGRATIONS', [*schema.MIGRATIONS, half])
        with pytest.raises(RuntimeError):
            Store(url)
    with Opened(url) as store:
        assert not SA.inspect(store.engine).has_table('half')


def test_addresses():
    with pytest.raises(ValueError, match='in memory would not last'):
        Store('sqlite:///:memory:')
    with pytest.raises(ValueError, match=r'mysql://u:\*\*\*@h/d: sqlite or postgresql expected'):
        Store('mysql://u:secret@h/d')


# --- faults

def test_a_full_disk_is_said_and_gets_over(tmp_path):
    with Opened(tmp_path/'s.db') as store:
        s, big = Session(tokenizer(), 's'), 'text ' * 20000
        async def run():
            await store.write(s, [s.add(turn(s, 'small'))])
            full_store(store, 4)
            with pytest.raises(StoreError, match='no room left') as e:
                await store.write(s, [turn(s, big)])
            assert e.value.status == 507
            with pytest.raises(StoreError, match='no room left'):
                await store.check()
            full_store(store, None)
            await store.check()
            await store.write(s, [turn(s, big)])
            assert store.writer.error is None
        asyncio.run(run())
        assert len(store.load(s.tokenizer, '', 's').turns) == 2


def test_a_read_only_store_is_read_and_says_so_to_writers(tmp_path):
    s = Session(tokenizer(), 's')
    with Opened(tmp_path/'s.db') as store:
        asyncio.run(store.write(s, [s.add(turn(s))]))
    with Opened(f'sqlite:///file:{tmp_path}/s.db?mode=ro&uri=true') as store:
        assert len(store.load(s.tokenizer, '', 's').turns) == 1
        for work in (lambda: store.check(now=True), lambda: store.write(s, [turn(s)]), store.check):
            with pytest.raises(StoreError, match='read-only') as e:
                asyncio.run(work())
            assert e.value.status == 503


def test_damage_and_absence_are_said(tmp_path):
    (tmp_path/'no.db').write_bytes(b'this is not a database' * 200)
    with pytest.raises(StoreError, match='SQLITE_NOTADB'):
        Store(tmp_path/'no.db')
    with pytest.raises(StoreError, match='SQLITE_CANTOPEN'):
        Store(f'sqlite:///{tmp_path}/none/there.db')
    assert store_error(SA.exc.IntegrityError('x', {}, ValueError())) is None


def test_postgres_that_dies_is_said_and_comes_back(postgres):
    import psycopg
    with psycopg.connect(postgres, autocommit=True) as c:
        c.execute('CREATE DATABASE dies')
    with Opened(postgres.rpartition('/')[0] + '/dies') as store:
        s = Session(tokenizer(), 's')
        asyncio.run(store.write(s, [s.add(turn(s))]))
        with psycopg.connect(postgres, autocommit=True) as c:
            c.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'dies'")
        asyncio.run(store.write(s, [s.add(turn(s))]))    # a new connection, and the write goes through
        with psycopg.connect(postgres, autocommit=True) as c:
            c.execute('ALTER DATABASE dies SET default_transaction_read_only = on')
        store.engine.dispose()
        with pytest.raises(StoreError, match='read-only'):
            asyncio.run(store.write(s, [turn(s)]))
        assert len(store.load(s.tokenizer, '', 's').turns) == 2


def _write_until_killed(path, said):
    async def run():
        store = Store(path)
        async def one(i):
            s = Session(tokenizer(), f's{i}')
            while True:
                t = s.add(turn(s, 'text'))
                await store.write(s, [t])
                os.write(said, (t.id + '\n').encode())   # the answer leaves
        await asyncio.gather(*map(one, range(8)))
    asyncio.run(run())


def test_what_left_is_on_the_disk_when_the_process_is_killed(tmp_path):
    read, write = os.pipe()
    p = multiprocessing.get_context('fork').Process(target=_write_until_killed, args=(tmp_path/'s.db', write))
    p.start()
    os.close(write)
    with os.fdopen(read) as f:
        left = [f.readline() for _ in range(300)]
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        left += f.readlines()
    with Opened(tmp_path/'s.db') as store:
        kept = [t for i in range(8) for t in store.load(tokenizer(), '', f's{i}').turns]
    assert {x.strip() for x in left} <= set(kept) and len(kept) == len(set(kept))
