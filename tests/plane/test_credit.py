"A session counts once, whatever became of it on the way: memory, store, loader, files, and stores of before"
import asyncio

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from plane_world import tokenizer
from test_manager import reply, said, user
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.core.io import read_records
from kat.core.types import Group
from kat.learn.advantage import group_advantages, session_rewards, turn_rewards
from kat.learn.objective import Objective
from kat.learn.rl import RLTrainer
from kat.plane.loader import Loader
from kat.plane.manager import Session
from kat.plane.store import Store, export


def solved(name='good', owner='', reward=1.0):
    "Five final leaves: two sub-agents of their own, one that starts from the main agent's path, a compaction."
    s = Session(tokenizer(), name, owner, 't', reward=reward, finished=True)
    a, b = said(one := 'one'), said('two')
    reply(s.plan([user('a')]), one)
    reply(s.plan([user('a'), a, user('b')]), 'two')
    for i in range(2):
        reply(s.plan([user(f'help {i}')], None, f'sub{i}'), f'answer {i}')
    reply(s.plan([user('a'), a, user('look')], None, 'fork'), 'seen')
    reply(s.plan([user('a'), a, user('b'), b, user('c')]), 'three')
    reply(s.plan([user('summary of a, b and c')]), 'four')
    return s


def failed(name='bad', owner='', reward=0.0):
    s = Session(tokenizer(), name, owner, 't', reward=reward, finished=True)
    reply(s.plan([user('a')]), 'no')
    return s


def write(store, *sessions):
    for s in sessions:
        asyncio.run(store.write(s, list(s.turns.values())))


@pytest.fixture
def store(tmp_path):
    out = Store(tmp_path/'s.db')
    yield out
    out.close()


def test_the_solved_session_has_five_leaves_and_one_reward():
    good, bad = solved(), failed()
    paths = good.trajectories() + bad.trajectories()
    assert [t.info['status'] for t in paths] == ['final'] * 6 and [t.reward for t in paths] == [1] * 5 + [0]
    got = session_rewards(paths)
    assert got.rewards.tolist() == [1, 0]
    assert group_advantages([got.rewards], 'grpo')[0][0].tolist() == pytest.approx([.7071, -.7071], abs=1e-4)


@pytest.mark.parametrize('kw', [dict(), dict(advantage='grpo', objective=Objective(normalise='sequence', tis=2.)),
                                dict(objective=Objective(spread='leaves'))], ids=str)
def test_all_ways_train_to_the_same_bits(tmp_path, store, kw):
    good, bad = solved(), failed()
    ways = dict(memory=[Group('t', good.trajectories() + bad.trajectories())])
    write(store, good, bad)
    store.finish('k', ['good', 'bad'])
    ways |= dict(loader=list(Loader(store, lambda: 0, wait=lambda: False)), groups=list(store.groups()))
    for form in ('parquet', 'jsonl'):
        export(store, tmp_path/f'g.{form}')
        ways[form] = list(read_records(tmp_path/f'g.{form}'))
    logs, weights = {}, {}
    for name, batch in ways.items():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8))
        trainer = RLTrainer(model, tmp_path/name, groups_per_step=1, dtype=None, lr=1e-2, **kw)
        logs[name] = {k: v for k, v in trainer.step(batch).items() if k != 'seconds'}
        weights[name] = [p.detach().clone() for p in model.parameters()]
    for name in ways:
        assert logs[name] == logs['memory'] and all(map(torch.equal, weights[name], weights['memory']))
    assert (logs['memory']['sessions'], logs['memory']['trajectories'], logs['memory']['reward']) == (2, 6, .5)


def test_a_turns_reward_is_kept_apart_everywhere(store, tmp_path):
    good, bad = solved(), failed()
    write(store, good, bad)
    first = next(iter(good.turns.values()))
    first.reward = -3.0
    asyncio.run(store.update(good, first))
    store.finish('k', ['good', 'bad'])
    export(store, tmp_path/'g.parquet')
    (_, finished), = store.finished_groups(0, 9)
    for group in (finished, next(store.groups()), next(read_records(tmp_path/'g.parquet'))):
        assert session_rewards(group.trajectories).rewards.tolist() == [1, 0]
        given = [t for t in group if -3.0 in turn_rewards(t)]
        assert len(given) == 2 and all(t.session == good.uid for t in given)   # the main agent's path and the fork


def test_owners_who_name_things_alike_are_not_compared(store):
    write(store, solved(), failed(), failed('good', 'ann'), solved('bad', 'ann'))
    groups = list(store.groups())
    assert [{t.owner for t in g} for g in groups] == [{''}, {'ann'}] and [g.sessions.max() for g in groups] == [1, 1]
    with pytest.raises(ValueError, match="trajectories\\[6\\] is of owner 'ann', trajectories\\[0\\] of ''"):
        Group('t', [t for g in groups for t in g])


def as_before(path, to, **rewards):
    "A Parquet export as kat wrote it before sessions had a field: a name in `info`, a turn's reward as its path's."
    table = pq.read_table(path).to_pylist()
    for group in table:
        for i, t in enumerate(group['trajectories']):
            t['schema'], t['reward'] = 'kat.trajectory/1', rewards.get(f'at{i}', t['reward'])
            del t['session'], t['owner']
    pq.write_table(pa.Table.from_pylist(table), to)


def test_old_parquet_files_are_read_right_or_refused(store, tmp_path):
    write(store, solved(), failed())
    export(store, tmp_path/'new.parquet')
    as_before(tmp_path/'new.parquet', tmp_path/'old.parquet')
    old, new = (next(read_records(tmp_path/f'{x}.parquet')) for x in ('old', 'new'))
    assert old.sessions.tolist() == new.sessions.tolist()
    assert session_rewards(old.trajectories).rewards.tolist() == [1, 0]
    as_before(tmp_path/'new.parquet', tmp_path/'turns.parquet', at0=-3.0)   # a turn's reward, folded in
    with pytest.raises(ValueError, match="task t: session 'good' has rewards -3 and 1: a session was graded once"):
        session_rewards(next(read_records(tmp_path/'turns.parquet')).trajectories)
