"""What agents do to their history: the same table against the manager with two templates, and through the gateway in
two dialects"""
import asyncio

import numpy as np
import pytest
from plane_world import World, play_http, tokenizer

from kat.core.types import Trajectory
from kat.plane.manager import Session
from kat.plane.scenarios import SCENARIOS, Scenario, paths_of, play_scenario
from kat.plane.schema import row_turn, turn_row
from kat.plane.turns import CLEAN

SHOWN = {'other tools that the prompt does not show'}  # where it does: below
TOOLS_SHOWN = [
    Scenario('other tools', ['s u1 > start', 's u1 A0 u2 > tools #2', 's u1 A0 u2 A1 u3 > append #2'], '0 x-1-2'),
    Scenario('other tools, and back', ['s u1 > start', 's u1 A0 u2 > tools #2', 's u1 A0 u2 > append'], '0-2 x-1'),
]
CASES = [('kat', sc) for sc in SCENARIOS]
CASES += [('hermes', sc) for sc in [x for x in SCENARIOS if x.name not in SHOWN] + TOOLS_SHOWN]


def test_there_are_enough():
    assert len(SCENARIOS) >= 40 and len({x.name for x in SCENARIOS}) == len(SCENARIOS)


@pytest.mark.parametrize('kind, sc', CASES, ids=[f'{k}-{x.name}' for k, x in CASES])
def test_manager(kind, sc):
    p, steps = play_scenario(sc, tokenizer(kind)), sc.read()
    assert [(p.turns[i].drift, p.turns[i].reason) for i in range(len(steps))] == [(x.drift, x.reason) for x in steps]
    assert paths_of(p.sessions.values(), {t.id: i for i, t in p.turns.items()}) == ' '.join(sorted(sc.paths.split()))
    for i, plan in enumerate(p.plans):
        before = plan.parent.ids if plan.parent else np.zeros(0, np.int32)
        assert np.array_equal(plan.ids[:len(before)], before)                      # the record, to the token
        whole = np.concatenate([plan.ids, *(s.ids for s in p.turns[i].answer)])
        assert np.array_equal(p.turns[i].ids, whole)
    for s in p.sessions.values():
        check_trajectories(s)
        check_restored(s)


def check_trajectories(s: Session):
    "What a trainer gets: whole paths, every answer of the model's trained where it was given, nothing else."
    out = s.trajectories()
    assert [t.info['turns'][-1]['id'] for t in out] == [t.id for t in s.leaves]
    trained = {}
    for leaf, t in zip(s.leaves, out):
        assert isinstance(t, Trajectory) and np.array_equal(t.ids, leaf.ids) and t.task == s.task
        at = 0
        for turn in leaf.path:
            a, b = at + turn.n_prompt, at + turn.n_prompt + turn.n_answer
            model = turn.finish in ('stop', 'length')
            assert not t.mask[at:a].any() and t.mask[a:b].all() == model and t.mask[a:b].any() == model
            if model:
                assert np.allclose(t.logprobs[a:b], -1) and np.allclose(t.entropy[a:b], .5)
            trained[turn.id] = model
            at = b
        assert at == len(t)
    assert {t.id for t in s.turns.values() if t.answer} == set(trained)
    if out:
        tree = s.tree()
        assert len(tree) <= s.n_tokens and tree.n_sequences == len(out)


def check_restored(s: Session):
    "Out of rows comes a session that places every request as this one does."
    new = Session(s.tokenizer, s.name, s.owner, s.task, s.uid)
    for t in s.turns.values():
        new.restore(row_turn(turn_row(s, t), new.turns))
    assert new.trajectories() == s.trajectories() and new.clock == s.clock and new.n_tokens == s.n_tokens
    assert (new.prompts, new.agents, new.openings) == (+s.prompts, +s.agents, +s.openings)
    for t in s.turns.values():
        if not t.answer: continue
        messages = [m for x in t.path for m in (*x.context, x.message)] + [dict(role='user', content='and now?')]
        a, b = (x.plan(messages, None, t.agent) for x in (s, new))
        assert (a.drift, a.reason, a.parent and a.parent.id) == (b.drift, b.reason, b.parent and b.parent.id)
        assert np.array_equal(a.ids, b.ids)


# Anthropic's API has no such request
NOT_SENT = {'messages': {'an answer is asked for after an answer'}, 'chat': set()}


@pytest.mark.parametrize('dialect, stream, step',
                         [('chat', False, 1), ('messages', True, 1), ('chat', True, 3), ('messages', False, 3)])
def test_gateway(dialect, stream, step, tmp_path):
    async def run():
        async with World(tmp_path/'store.db') as w:
            chosen = [x for k, x in enumerate(SCENARIOS) if k % step == 0 or x.name in NOT_SENT['messages']]
            played = [x for x in chosen if x.name not in NOT_SENT[dialect]]
            for n, sc in enumerate(played):
                steps, (turns, names) = sc.read(), await play_http(w, sc, dialect, stream, str(n))
                sessions = [w.store.load(w.tok, '', x) for x in names]   # what is on the disk
                got = {k: t for s in sessions for t in s.turns.values() if (k := turns.get(t.id)) is not None}
                assert [(got[i].drift, got[i].reason)
                        for i in range(len(steps))] == [(x.drift, x.reason) for x in steps], sc.name
                assert paths_of(sessions, turns) == ' '.join(sorted(sc.paths.split())), sc.name
                for s in sessions:
                    assert s.trajectories() == w.session(s.name).trajectories(), sc.name
            assert w.engine.live == 0 and not w.g.lanes.taken and not sum(w.g.access.active.values())
            assert all(s.busy == 0 and not any(v < 0 for v in s.prompts.values())
                       for s in w.g.manager.sessions.values())
            text = w.g.metrics.text({})
            assert sum(len(x.steps) for x in played) == len(w.engine.asked)
            assert 'kat_turns_total{drift="forked",finish="stop",reason="retry"}' in text
    asyncio.run(run())


def test_clean_means_clean():
    "Reasons that leave the record as it is are the only ones not called forks."
    for sc in SCENARIOS:
        for x in sc.read():
            assert (x.drift == 'forked') == (x.reason not in CLEAN)
