"""Hostile requests through the whole application: 10,000 generated bodies over all dialects and endpoints, seeds
fixed, and Hypothesis beside them.

Each is answered, within a deadline, with 200 or 4xx in the dialect's own shape; nobody sees anything of another
key's; nothing is logged."""
import asyncio
import json
import logging
import random

import plane_bodies
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plane_world import PATH, SCENARIO_TOOLS, ask, chat_body, messages_body, say, tokenizer

from kat.wire.fields import RequestLimits
from kat.plane.gateway import Gateway
from kat.infer.scripted import ScriptEngine
from kat.plane.store import Store

KEYS = {'ann-secret': 'ann', 'bob-secret': 'bob'}
DEADLINE = 60  # seconds for 25 requests, which take some hundredths
ODD = ['', 'user', 'assistant', 'tool', 'a' * 1000, '\u0000', '<|im_end|>', '<tool_call>', '</tool_call>', '<think>',
       '\ud800', '\u202e', '𝄞', '{', '[]', 'null', 'x-anthropic-billing-header: a', '<system-reminder>', '__proto__',
       '../..', "'; DROP TABLE turns; --", '{{ 7*7 }}', '{% raise %}', '%s%n', '\r\n\r\nHTTP/1.1 200 OK', -1, 0, 1,
       2**31, 2**63, 2**64, 10**400, .5, -0.0, 1e308, 5e-324, True, False, None]
NAMES = ['role', 'content', 'type', 'text', 'tool_calls', 'tool_call_id', 'id', 'function', 'name', 'arguments',
         'input', 'tool_use_id', 'is_error', 'reward', 'turn', 'sessions', 'x']


def values(rng, depth=0):
    "Any JSON, of the kind that breaks things."
    kind = rng.random()
    if depth > 3 or kind < .55: return rng.choice(ODD)
    if kind < .75: return [values(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(NAMES): values(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutated(rng, x, rate):
    "`x` with a place or two replaced, renamed or lost."
    if rng.random() < rate: return values(rng)
    if isinstance(x, dict):
        return {(k if rng.random() > .02 else rng.choice(['n', 'stop', 'y'])): mutated(rng, v, rate)
                for k, v in x.items() if rng.random() > rate / 4}
    if isinstance(x, list): return [mutated(rng, v, rate) for v in x if rng.random() > rate / 4]
    return x


def broken(rng, raw):
    "Bytes that are hardly JSON any more."
    kind, at = rng.randrange(6), rng.randrange(len(raw) + 1)
    if kind == 0: return raw[:at]
    if kind == 1: return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1:]
    if kind == 2:
        odd = [b'\xff\xfe', b'\xed\xa0\x80', b'\\ud800', b'\x00', b'NaN', b'-Infinity', b'1e999', b'"']
        return raw[:at] + rng.choice(odd) + raw[at:]
    if kind == 3: return b'[' * rng.choice([90, 101, 5000]) + raw
    if kind == 4: return raw + raw
    return b'{"messages":' + b'{"a":' * 2000 + b'1' + b'}' * 2000 + b'}'


def seeds(owner):
    "What is mutated: bodies as agents send them, with a word in them that only `owner` may ever see again."
    calls = [dict(id='c', type='function', function=dict(name='view', arguments=dict(path='a')))]
    ms = [dict(role='system', content='s'), dict(role='user', content=f'words of-{owner}'),
          dict(role='assistant', content='t', tool_calls=calls), dict(role='tool', tool_call_id='c', content='r')]
    count = {k: v for k, v in messages_body(ms, SCENARIO_TOOLS[0]).items() if k != 'max_tokens'}
    ours = [(PATH['chat'], 'chat', chat_body(ms, SCENARIO_TOOLS[0], temperature=.5, stop=['x'], stream=False)),
            (PATH['chat'], 'chat', chat_body(ms[:2], stream=True)),
            (PATH['messages'], 'messages', messages_body(ms, SCENARIO_TOOLS[0], stream=True)),
            (PATH['messages'], 'messages', messages_body(ms[:2])),
            (PATH['messages'] + '/count_tokens', 'messages', count),
            (PATH['completions'], 'completions',
             dict(model='kat', prompt=f'a of-{owner}', stream=False, logprobs=0, max_tokens=4)),
            ('reward', 'chat', dict(reward=1, turn=None, finished=False, info=dict(word=f'of-{owner}'))),
            ('/groups', 'chat', dict(key=f'of-{owner}', sessions=['a', 'b']))]
    return ours + [(PATH[d], d, f()) for d, f in plane_bodies.ALL if d != 'messages' or len(json.dumps(f())) < 2000]


class Gate:
    "A gateway for two owners, whose engine repeats what it is asked by whom."
    def __init__(self, path):
        self.tok = tokenizer()
        self.engine = ScriptEngine(lambda r: say(
            self.tok,
            next((f'of-{o}' for o in KEYS.values() if f'of-{o}' in self.tok.decode(r.ids)), 'well')), self.tok)
        self.store = Store(path)
        self.g = Gateway(self.engine, self.tok, self.store, 4000, keys={}, operators=KEYS,
                         limits=RequestLimits(bytes=50_000))

    async def __aenter__(self):
        return self
    async def __aexit__(self, *exc):
        await self.g.close()
        self.store.close()

    async def try_(self, owner, path, dialect, raw, headers=()):
        "One request; its status after everything that can be said of it was said."
        r = await ask(self.g.app, path, raw, {'x-api-key': f'{owner}-secret', **dict(headers)},
                      method='GET' if raw is None else 'POST')
        assert r['status'] == 200 or 400 <= r['status'] < 500, (r, raw)
        other = dict(ann='bob', bob='ann')[owner]
        assert f'of-{other}'.encode() not in r['body'] and b'-secret' not in r['body'], (path, r)
        if r['status'] == 200:
            assert r.get('events') or 'json' in r or r['headers']['content-type'] == 'application/x-ndjson', r
        elif dialect == 'messages':
            assert r['json']['type'] == 'error' and {
                'type', 'message'} == set(r['json']['error']) and r['json']['error']['message'], r
        else:
            assert set(r['json']) == {'error'} and set(r['json']['error']) == {
                'message', 'type', 'param', 'code'} and r['json']['error']['message'], r
        return r['status']

    def rest(self):
        "Nothing may be left over."
        g = self.g
        assert not self.engine.live and not sum(g.access.active.values()) and not g.lanes.taken
        assert not g.sessions.loading and not g.recorder.tasks
        assert all(s.busy == 0 and min(s.prompts.values(), default=0) >= 0 for s in g.manager.sessions.values())


def requests(rng, n):
    "n requests: owner, path, dialect, body, headers."
    kinds = {o: seeds(o) for o in KEYS.values()}
    for i in range(n):
        owner = rng.choice(list(kinds))
        session = rng.choice(['a', 'b', 'c', f's{i}', '%00', 'x' * 300, 'é', '..', 'a b'])
        if i % 20 == 0:
            yield owner, f'/s/{session}{rng.choice(["", "/trajectories"])}', 'chat', None, {}
            continue
        path, dialect, body = rng.choice(kinds[owner])
        raw = json.dumps(mutated(rng, body, rng.choice([.005, .02, .1]))).encode()
        if i % 9 == 0:
            raw = broken(rng, raw)
        if i % 500 == 1:
            raw = b' ' * 60_000 + raw
        if path == 'reward':
            path = f'/s/{session}/reward'
        elif path != '/groups' and rng.random() < .5:
            path = f'/s/{session}{path}'
        names = ['x-kat-session', 'x-session-id', 'x-kat-task', 'anthropic-beta', 'x-claude-code-agent-id',
                 'content-length', 'content-type', 'user-agent']
        odd = ['a', 'a/b', '\xff', '', 'x' * 300, '-1', '9' * 30, '\u0660']
        yield owner, path, dialect, raw, {rng.choice(names): rng.choice(odd)} if i % 7 == 0 else {}


@pytest.mark.parametrize('seed', range(5))
def test_two_thousand_hostile_requests(tmp_path, caplog, seed):
    rng, seen = random.Random(seed), {}
    async def go():
        async with Gate(tmp_path/'s.db') as w:
            todo = list(requests(rng, 2000))
            for i in range(0, len(todo), 25):   # as many at a time, as from so many clients
                async with asyncio.timeout(DEADLINE):
                    got = await asyncio.gather(*[w.try_(*x) for x in todo[i:i + 25]])
                for x in got:
                    seen[x] = seen.get(x, 0) + 1
            w.rest()
            for owner, other in (('ann', 'bob'), ('bob', 'ann')):
                rows = w.store.sessions(owner=owner)
                texts = [json.dumps([t.context for t in w.store.load(w.tok, owner, r['name']).turns.values()])
                         for r in rows]
                assert rows and any(f'of-{owner}' in x for x in texts) and not any(f'of-{other}' in x for x in texts)
    with caplog.at_level(logging.DEBUG):
        asyncio.run(go())
    assert sum(seen.values()) == 2000 and seen[200] > 200 and seen[400] > 200 and seen.get(413) and seen.get(404)
    ours = [r.getMessage() for r in caplog.records if r.name != 'asyncio']
    assert not [x for x in ours if '-secret' in x or 'of-' in x]
    assert not [r for r in caplog.records if r.name.startswith('kat')]


text = st.text(st.characters(exclude_categories=[]), max_size=30)   # surrogates too
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | text, x, max_size=4), max_leaves=12)
message = st.fixed_dictionaries(
    dict(role=st.sampled_from(['system', 'user', 'assistant', 'tool']) | anything, content=text | anything),
    optional=dict(tool_calls=anything, tool_call_id=text, name=anything))
FIELDS = ['temperature', 'stop', 'stop_sequences', 'tools', 'system', 'prompt', 'stream', 'max_tokens', 'metadata',
          'thinking', 'seed']


def test_hypothesis_finds_nothing_either(tmp_path, caplog):
    loop = asyncio.new_event_loop()
    w = Gate(tmp_path/'s.db')

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(['chat', 'messages', 'completions']), st.lists(message, max_size=4) | anything,
           st.dictionaries(st.sampled_from(FIELDS) | text, anything, max_size=3))
    def fails(dialect, messages, more):
        raw = json.dumps(dict(model='kat', messages=messages, prompt='a', max_tokens=9) | more).encode()
        loop.run_until_complete(asyncio.wait_for(w.try_('ann', PATH[dialect], dialect, raw), DEADLINE))
    try:
        fails()
        w.rest()
    finally:
        loop.run_until_complete(w.__aexit__())
        loop.close()
    assert not [r for r in caplog.records if r.name.startswith('kat')]
