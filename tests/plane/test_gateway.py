"""The gateway over its real application: who may see what, what is refused and how, what is on the disk when an answer
leaves"""
import asyncio
import json
import logging
import os
import random
import signal
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from plane_world import PATH, World, ask, chat_body, full_store, heard, messages_body, say, tokenizer, until
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat import cli
from kat.core.formats import write_call
from kat.core.io import read_records
from kat.core.types import Trajectory
from kat.wire.fields import BadRequest, RequestLimits
from kat.plane.access import session_name
from kat.plane.gateway import Gateway, running
from kat.plane.manager import Manager
from kat.plane.operations import Metrics
from kat.plane.scenarios import SCENARIO_TOOLS
from kat.infer.scripted import ScriptEngine
from kat.infer.serving import HFAsyncEngine
from kat.plane.store import Store
from kat.plane.writing import StopText

ROOT = Path(__file__).parents[2]
USER = [dict(role='user', content='hello')]


def run(coro):
    return asyncio.run(asyncio.wait_for(coro, 60))
def error_of(r):
    return r['json']['error']['message']


def world(tmp_path, text='an answer', **more):
    w = World(tmp_path/'store.db', **more)
    w.engine.answer = lambda r: say(w.tok, text)
    return w


# --- who

KEYS = dict(keys={'ann-secret': 'ann', 'bob-secret': 'bob'},
            operators={'ann-boss-secret': 'ann', 'bob-boss-secret': 'bob'})


def key(who):
    return {'x-api-key': f'{who}-secret'}


def test_no_key_sees_the_sessions_of_another(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            for who in ('ann', 'bob'):
                assert (await w.chat(f'of {who}', 'same', key(who)))['status'] == 200
            ann, bob = key('ann-boss'), key('bob-boss')
            assert [w.session('same', o).turns[next(iter(w.session('same', o).turns))].context[0]['content']
                    for o in ('ann', 'bob')] == ['of ann', 'of bob']
            await w.chat('more', 'only-ann', ann)
            for path in ('/s/only-ann', '/s/only-ann/trajectories'):
                assert (await w.ask(path, headers=ann))['status'] == 200
                assert (await w.ask(path, headers=bob))['status'] == 404
            assert (await w.ask('/s/only-ann/reward', dict(reward=1), bob))['status'] == 404
            assert [s['name'] for s in (await w.ask('/sessions', headers=bob))['json']['sessions']] == ['same']
            assert 'of ann' not in json.dumps((await w.ask('/s/same', headers=bob))['json'])
    run(go())


@pytest.mark.parametrize('headers', [
    {}, {'x-api-key': 'wrong'}, {'authorization': 'Bearer '}, {'authorization': 'ann-secret'},
    {'x-api-key': '@session'}, {'authorization': 'Bearer ann-secretx'}, {'x-api-key': 'ann-secre\xff'}])
def test_without_a_key_nothing_is_answered(tmp_path, headers):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            for path, body in ((PATH['chat'], chat_body(USER)), (PATH['completions'], {}), ('/v1/models', None),
                               ('/sessions', None), ('/s/x', None), ('/s/x/reward', {}), ('/s/x/trajectories', None)):
                r = await w.ask(path, body, headers)
                assert (r['status'], r['json']['error']['code']) == (401, 'invalid_api_key')
                assert 'secret' not in r['body'].decode()
            r = await w.ask(PATH['messages'], messages_body(USER), headers)
            said = r['status'], r['json']['type'], r['json']['error']['type']
            assert said == (401, 'error', 'authentication_error')
            assert not w.engine.asked
            assert (await w.ask('/health'))['status'] == (await w.ask('/metrics'))['status'] == 200
    run(go())


def test_sessions_are_named_by_path_header_key_or_client():
    assert session_name('path', 'header', 'key', 'hint') == 'path'
    assert session_name('', 'header', 'key', 'hint') == 'header'
    assert session_name('', '', 'key', 'hint') == 'key'
    assert session_name('', '', '', 'hint') == 'hint' and session_name('', '', '', '') == 'default'
    for name in ('.', '..', 'a/b', 'a b', 'é', 'x' * 257):   # a browser makes /s/../x of the second, /x
        with pytest.raises(BadRequest, match='at most 256 printable'):
            session_name('', name, '', '')
    assert session_name('', '...', '', '') == '...'


def test_a_session_named_each_way_is_one_session(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            ann = dict(authorization='Bearer ann-secret')
            ways = [('/s/one' + PATH['chat'], ann), (PATH['chat'], ann | {'x-kat-session': 'one'}),
                    (PATH['chat'], dict(authorization='Bearer ann-secret@one')),
                    (PATH['chat'], ann | {'x-session-id': 'one'}),
                    (PATH['chat'], ann | {'x-claude-code-session-id': 'one'})]
            for path, headers in ways:
                assert (await w.ask(path, chat_body(USER), headers))['status'] == 200
            assert len(w.session('one', 'ann').turns) == len(ways) and len(w.g.manager.sessions) == 1
            for bad in ('/s/a b/v1/messages', '/s/' + 'x'*300 + '/v1/messages', '/s/é/v1/messages'):
                assert (await w.ask(bad, messages_body(USER), ann))['status'] == 400
    run(go())


def test_a_task_gathers_sessions(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            for name in 'ab':
                assert (await w.chat('x', name, {'x-kat-task': 't'}))['status'] == 200
            r = await w.chat('x', 'a', {'x-kat-task': 'other'})
            assert r['status'] == 400 and "belongs to task 't'" in error_of(r)
            assert [len(x) for x in w.store.groups()] == [2]
    run(go())


# --- what is refused, and how

def shape(r, dialect):
    e = r['json']
    if dialect == 'messages':
        assert e['type'] == 'error' and set(e['error']) == {'type', 'message'}
    else:
        assert set(e) == {'error'} and set(e['error']) == {'message', 'type', 'param', 'code'}
    return e['error']['message']


@pytest.mark.parametrize('dialect', ['chat', 'messages', 'completions'])
def test_mistakes_come_back_in_the_dialects_shape(tmp_path, dialect):
    async def go():
        async with world(tmp_path, limits=RequestLimits(bytes=2000), max_len=200) as w:
            path = PATH[dialect]
            good = dict(chat=chat_body(USER), messages=messages_body(USER),
                        completions=dict(model='kat', prompt='a'))[dialect]
            long = json.loads(json.dumps(good).replace('hello', 'word ' * 100).replace('"a"', f'"{"word " * 100}"'))
            for body, status, says in ((b'{', 400, 'not JSON'), (b'[]', 400, 'an object expected'),
                                       (b'\xff', 400, 'not JSON'), (good | dict(model=3), 400, 'model'),
                                       (b' ' * 3000, 413, '3000 bytes; at most 2000'), (long, 400, '200'),
                                       (good | dict(temperature=1e-9), 400, '0 (greedy)')):
                size = {'content-length': str(len(body))} if isinstance(body, bytes) else {}
                r = await w.ask(path, body, size)
                assert r['status'] == status and says in shape(r, dialect), r
            r = await w.ask(path, chunks=[b' ' * 900] * 3)       # no length told
            assert r['status'] == 413 and 'more than 2000' in shape(r, dialect)
            assert (await w.ask(path, method='GET'))['status'] == 405
            for bad in (path + 'x', '/s/a' + path + 'x'):
                shape(r := await w.ask(bad, good), dialect if dialect == 'messages' else 'chat')
                assert r['status'] == 404
            assert not w.engine.asked and not w.store.sessions()
    run(go())


def test_a_body_that_does_not_come_and_a_client_that_leaves_while_sending(tmp_path):
    async def go():
        async with world(tmp_path, patience=.001) as w:
            scope = dict(type='http', http_version='1.1', method='POST', path=PATH['chat'], raw_path=b'', root_path='',
                         query_string=b'', headers=[(b'content-type', b'application/json')])
            sent, left = [], [dict(type='http.request', body=b'{', more_body=True), dict(type='http.disconnect')]
            async def never():
                await asyncio.Event().wait()
            async def leaves():
                return left.pop(0)
            async def send(m):
                sent.append(m)
            await w.g.app(dict(scope), never, send)
            assert sent[0]['status'] == 408 and b'not here after 0.001 seconds' in sent[1]['body']
            await w.g.app(dict(scope), leaves, send)
            assert len(sent) == 2 and not sum(w.g.access.active.values())
            assert 'status="499"} 1' in (await w.ask('/metrics'))['body'].decode()
    run(go())


def test_too_long_is_said_in_the_words_agents_look_for(tmp_path):
    async def go():
        async with world(tmp_path, max_len=30) as w:
            a = await w.ask(PATH['messages'], messages_body([dict(role='user', content='word ' * 50)]))
            assert a['json']['error']['message'].startswith('prompt is too long: ')
            assert '> 30 maximum' in a['json']['error']['message']
            c = await w.ask(PATH['chat'], chat_body([dict(role='user', content='word ' * 50)]))
            assert c['json']['error']['code'] == 'context_length_exceeded'
    run(go())


def test_an_answer_gets_the_room_there_is(tmp_path):
    async def go():
        async with world(tmp_path, max_len=40) as w:
            r = await w.chat('hi', max_tokens=30_000)
            assert w.engine.asked[0].max_tokens == 40 - len(w.engine.asked[0].ids)
            assert r['json']['usage']['total_tokens'] <= 40
            assert (await w.chat('hi', max_tokens=3))['json']['choices'][0]['finish_reason'] == 'length'
            assert w.engine.asked[1].max_tokens == 3
    run(go())


def test_so_many_at_a_time(tmp_path):
    async def go():
        async with world(tmp_path, concurrent=3, per_owner=2, **KEYS) as w:
            hold = asyncio.Event()
            for n in range(3):
                w.hold[n] = 0, hold
            ann, bob = ({'x-api-key': f'{k}-secret'} for k in ('ann', 'bob'))
            first = [asyncio.ensure_future(w.chat('x', f's{i}', ann)) for i in range(2)]
            await until(lambda: w.engine.live == 2)
            r = await w.chat('x', 's2', ann)
            assert (r['status'], r['headers']['retry-after']) == (429, '1')
            assert r['json']['error']['type'] == 'rate_limit_error'
            first.append(asyncio.ensure_future(w.chat('x', 's3', bob)))
            await until(lambda: w.engine.live == 3)
            assert (await w.chat('x', 's4', bob))['status'] == 429
            hold.set()
            assert [r['status'] for r in await asyncio.gather(*first)] == [200] * 3
            assert (await w.chat('x', 's2', ann))['status'] == 200
    run(go())


# --- the record

def test_an_answer_leaves_after_its_turn_is_on_the_disk(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            kinds = [(d, s) for d in ('chat', 'messages', 'completions') for s in (False, True)]
            for n, (dialect, stream) in enumerate(kinds):
                body = dict(chat=chat_body(USER), messages=messages_body(USER),
                            completions=dict(model='kat', prompt='a'))[dialect] | dict(stream=stream)
                on_disk = []
                class Watch:   # what an agent sees, and what another reader of the database sees at that moment
                    def __init__(self, app):
                        self.app = app
                    async def __call__(self, scope, receive, send):
                        async def tell(m):
                            if m['type'] == 'http.response.body':
                                s = w.store.load(w.tok, '', f'n{n}')
                                on_disk.append((m.get('more_body', False), 0 if s is None else len(s.turns)))
                            await send(m)
                        await self.app(scope, receive, tell)
                r = await ask(Watch(w.g.app), f'/s/n{n}{PATH[dialect]}', body)
                assert r['status'] == 200 and on_disk[-1] == (False, 1)
                assert all(k == 0 for more, k in on_disk if more)
                if stream:
                    assert (b'[DONE]' in r['parts'][-1] or b'message_stop' in r['parts'][-1])
                    assert not any(b'[DONE]' in p or b'message_stop' in p for p in r['parts'][:-1])
    run(go())


def test_a_client_that_leaves_stops_the_engine_and_leaves_a_record(tmp_path):
    async def go():
        async with world(tmp_path, 'one two three') as w:
            for n, stream in enumerate((True, False)):
                w.hold[n], leave = (5, asyncio.Event()), asyncio.Event()
                task = asyncio.ensure_future(w.ask(f'/s/s{n}{PATH["chat"]}', chat_body(USER, stream=stream),
                                                   leave=leave))
                await until(lambda: w.hold[n][1]._waiters)
                leave.set()
                await task
                t, = w.store.load(w.tok, '', f's{n}').turns.values()
                assert (t.finish, t.n_answer, w.engine.live, w.engine.aborted) == ('abort', 5, 0, n + 1)
                assert not any(s.trainable for s in t.answer)
                assert t.message['content'] == w.tok.decode(np.concatenate([s.ids for s in t.answer]))
            assert 'status="499"} 2' in (await w.ask('/metrics'))['body'].decode()
    run(go())


def test_a_store_that_cannot_write_refuses_clearly_and_recovers(tmp_path):
    async def go():
        async with world(tmp_path, 'long ' * 2000) as w:
            await w.chat('x', 's')
            full_store(w.store, 3)
            for dialect, stream in (('chat', False), ('messages', True)):
                w.store.writer.error = None     # as before the first failed write
                write = dict(chat=chat_body, messages=messages_body)[dialect]
                body = write([dict(role='user', content='y')], stream=stream)
                r = await w.ask(f'/s/s{PATH[dialect]}', body)
                if not stream:
                    assert r['status'] == 507 and 'no room left' in shape(r, dialect)
                else:
                    assert r['status'] == 200 and r['events'][-1]['type'] == 'error'
                    assert b'message_stop' not in r['body']
            n = len(w.engine.asked)
            for dialect in ('chat', 'messages'):
                r = await w.ask(f'/s/s{PATH[dialect]}',
                                dict(chat=chat_body, messages=messages_body)[dialect](USER, stream=True))
                assert r['status'] == 507 and 'no room left' in shape(r, dialect)
            assert len(w.engine.asked) == n                        # refused before anything is sampled
            assert (await w.ask('/health'))['status'] == 507
            assert (await w.ask('/s/s/reward', dict(reward=1, info=dict(log='x' * 50_000))))['status'] == 507
            assert w.session().reward is None and not w.session().finished
            full_store(w.store, None)
            assert (await w.chat('y', 's'))['status'] == 200 and (await w.ask('/health'))['status'] == 200
            assert len(w.session().turns) == len(w.store.load(w.tok, '', 's').turns) == 2 and w.session().busy == 0
    run(go())


def test_a_read_only_store_refuses_clearly(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            await w.chat('x', 's')
        async with World(f'sqlite:///file:{tmp_path}/store.db?mode=ro&uri=true') as w:
            w.engine.answer = lambda r: say(w.tok, 'an answer')
            for dialect, body in (('chat', chat_body(USER)), ('messages', messages_body(USER)),
                                  ('completions', dict(model='kat', prompt='a'))):
                r = await w.ask(f'/s/s{PATH[dialect]}', body)
                assert r['status'] == 503 and r['headers']['retry-after'] == '1' and 'read-only' in shape(r, dialect)
            assert len(w.engine.asked) == 1     # known from the first failed write on
            assert (await w.ask('/health'))['status'] == (await w.ask('/s/s/reward', dict(reward=1)))['status'] == 503
            assert (await w.ask('/s/s'))['status'] == 200 and len(w.session().turns) == 1 and w.session().reward is None
    run(go())


def test_an_engine_that_fails_is_not_the_agents_fault(tmp_path, caplog):
    async def go():
        async with world(tmp_path) as w:
            def fail(r):
                raise RuntimeError('the secret prompt was: hello')
            w.engine.answer = fail
            r = await w.ask(PATH['messages'], messages_body(USER))
            assert r['status'] == 503 and r['json']['error']['type'] == 'overloaded_error'
            r = await w.ask(PATH['chat'], chat_body(USER, stream=True))
            assert r['status'] == 200 and 'the engine failed' in r['events'][-1]['error']['message']
            def refuse(r):
                raise ValueError('top_k must be smaller')
            w.engine.answer = refuse
            assert (await w.ask(PATH['chat'], chat_body(USER)))['status'] == 400
            w.engine.answer = lambda r: 3     # not what an engine returns
            assert (await w.ask(PATH['chat'], chat_body(USER)))['status'] == 503
            assert not w.store.sessions() and w.engine.live == 0 and not w.g.lanes.taken
    run(go())
    assert 'RuntimeError at' in caplog.text and 'secret' not in caplog.text and 'hello' not in caplog.text


def test_nothing_secret_is_logged(tmp_path, caplog):
    async def go():
        async with world(tmp_path, 'the answer is classified', **KEYS) as w:
            w.g.format = 'nonsense'    # a fault of the gateway itself
            for headers in ({'x-api-key': 'ann-secret'}, {'authorization': 'Bearer wrong-secret'}):
                r = await w.ask(PATH['chat'], chat_body([dict(role='user', content='classified')], SCENARIO_TOOLS[0]),
                                headers)
                assert r['status'] in (401, 500) and 'classified' not in r['body'].decode()
    with caplog.at_level(logging.DEBUG):
        run(go())
    ours = [r.getMessage() for r in caplog.records if r.name.startswith('kat')]
    assert len(ours) == 1 and 'KeyError at' in ours[0] and 'secret' not in caplog.text
    assert 'classified' not in caplog.text


def test_after_a_restart_the_next_turn_is_clean(tmp_path):
    async def go():
        m = list(USER)
        for i in range(3):
            async with world(tmp_path, f'answer {i}') as w:
                r = await w.ask(f'/s/s{PATH["chat"]}', chat_body(m))
                before = [t for t in w.session().turns.values()][-2:-1]
                if before:
                    assert np.array_equal(w.engine.asked[0].ids[:len(before[0].ids)], before[0].ids)
                m += [heard('chat', r), dict(role='user', content=f'and {i}')]
        assert [t.reason for t in w.session().turns.values()] == ['start', 'append', 'append']
    run(go())


def test_sessions_that_left_memory_come_back(tmp_path):
    async def go():
        async with world(tmp_path, manager=Manager(max_bytes=1)) as w:
            for i in range(3):
                for n in 'abc':
                    m = [x for k in range(i)
                         for x in (dict(role='user', content=f'{n}{k}'), dict(role='assistant', content='an answer'))]
                    body = chat_body([*m, dict(role='user', content=f'{n}{i}')])
                    assert (await w.ask(f'/s/{n}{PATH["chat"]}', body))['status'] == 200
                    assert len(w.g.manager.sessions) <= 1
            for n in 'abc':
                assert [t.reason for t in w.store.load(w.tok, '', n).turns.values()] == ['start', 'append', 'append']
    run(go())


def test_requests_that_come_together_load_a_session_once(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            await w.chat('a')
        async with world(tmp_path) as w:
            await asyncio.gather(*[w.chat(f'b{i}') for i in range(5)])
            assert len(w.g.manager.sessions) == 1 and len(w.session().turns) == 6 and not w.g.sessions.loading
    run(go())


# --- what agents get

def test_calls_and_malformed_calls(tmp_path):
    tok = tokenizer()
    good = write_call('view', dict(path='a.py', line=3), 'kat')
    async def go():
        async with world(tmp_path, f'look {good}<tool_call>nothing of the kind</tool_call>') as w:
            r = await w.ask(f'/s/s{PATH["chat"]}', chat_body(USER, SCENARIO_TOOLS[0]))
            m = heard('chat', r)
            assert [c['function'] for c in m['tool_calls']] == [dict(name='view', arguments=dict(path='a.py', line=3))]
            assert '<tool_call>nothing of the kind</tool_call>' in m['content']
            assert r['json']['choices'][0]['finish_reason'] == 'tool_calls'
            t, = w.session().turns.values()
            assert len(t.info['malformed']) == 1 and t.message == m
            assert np.array_equal(np.concatenate([s.ids for s in t.answer]),
                                  say(tok, f'look {good}<tool_call>nothing of the kind</tool_call>'))
            r = await w.ask(f'/s/s{PATH["chat"]}', chat_body(
                [*USER, m, dict(role='tool', tool_call_id=m['tool_calls'][0]['id'], content='x')], SCENARIO_TOOLS[0]))
            assert [t.drift for t in w.session().turns.values()] == ['clean', 'clean']
            assert 'kat_malformed_calls_total 2' in (await w.ask('/metrics'))['body'].decode()
    run(go())


@pytest.mark.parametrize('dialect', ['chat', 'messages'])
def test_arguments_that_the_agent_changed_are_noted_counted_and_shown(tmp_path, dialect):
    "Defaults filled in, other types, trimmed text, all gone: the call's id is the gateway's own, so it is the call."
    edit = write_call('view', dict(path=' a.py ', line=3), 'kat')
    ways = [lambda a: a | dict(all=False), lambda a: a | dict(line='3'), lambda a: a | dict(path='a.py'), lambda a: {}]
    async def go():
        async with world(tmp_path, f'look {edit}') as w:
            path, body = f'/s/s{PATH[dialect]}', dict(chat=chat_body, messages=messages_body)[dialect]
            history = list(USER)
            for n, way in enumerate(ways):
                m = heard(dialect, await w.ask(path, body(history, SCENARIO_TOOLS[0], stream=n % 2 == 1)))
                call, = m['tool_calls']
                call['function']['arguments'] = way(call['function']['arguments'])
                history += [m, dict(role='tool', tool_call_id=call['id'], content='x')]
            await w.ask(path, body(history, SCENARIO_TOOLS[0]))
            await w.ask('/s/s/reward', dict(reward=1))
            t, = w.store.load(w.tok, '', 's').trajectories()
            assert (t.reward, t.n_turns, t.info['status']) == (1.0, len(ways) + 1, 'final')
            notes = [x['notes'] for x in t.info['turns']]
            assert notes == [[], *[['arguments changed']] * len(ways)]
            spoken = say(w.tok, f'look {edit}') * (len(ways) + 1)
            assert t.ids[t.mask].tolist() == spoken         # what the model wrote, and nothing that the agent did
            metrics = (await w.ask('/metrics'))['body'].decode()
            assert f'kat_realigned_total{{why="arguments changed"}} {len(ways)}' in metrics
            shown = (await w.ask('/s/s'))['json']
            assert shown['tree'].count('[arguments changed]') == len(ways)
            assert shown['turns'][1]['notes'] == ['arguments changed']
            view = (await w.ask('/s/s/blocks'))['json']
            assert view['turns'][1]['notes'] == ['arguments changed']
    run(go())


@pytest.mark.parametrize('stream', [False, True])
def test_stop_strings_end_the_text_and_not_the_record(tmp_path, stream):
    async def go():
        async with world(tmp_path, 'first\n\nObservation: invented') as w:
            r = await w.ask(f'/s/s{PATH["chat"]}', chat_body(USER, stop=['\nObservation:', 'zzz'], stream=stream))
            assert heard('chat', r)['content'] == 'first\n'
            t, = w.session().turns.values()
            assert w.tok.decode(np.concatenate([s.ids for s in t.answer])).startswith('first\n\nObservation:')
            assert t.finish == 'stop'
            r = await w.ask(f'/s/s{PATH["messages"]}', messages_body(
                [*USER, dict(role='assistant', content='first'), *USER], stop_sequences=['tion'], stream=stream))
            last = r['events'][-2]['delta'] if stream else r['json']
            assert (last['stop_reason'], last['stop_sequence']) == ('stop_sequence', 'tion')
            assert [t.drift for t in w.session().turns.values()] == ['clean', 'realigned']
    run(go())


def test_stop_text_in_any_cut():
    rng = random.Random(1)
    for _ in range(300):
        text = ''.join(rng.choice('ab') for _ in range(12))
        stops = [''.join(rng.choice('ab') for _ in range(rng.randrange(1, 5))) for _ in range(2)]
        end = min((i for s in stops if (i := text.find(s)) >= 0), default=len(text))
        t, at, out = StopText(stops), 0, ''
        while at < len(text):
            n = rng.randrange(1, 4)
            out, at = out + t.feed(text[at:at + n]), at + n
        out += t.feed('', True)
        # a longer string that ends in the same piece may begin earlier; pieces of one character settle it at once
        assert text.startswith(out) and len(out) >= end - 4 and (t.hit is None) == (end == len(text))
    assert StopText([]).feed('abc') == 'abc'


def test_completions_go_on_token_by_token(tmp_path):
    async def go():
        async with world(tmp_path, 'and so on') as w:
            a = await w.ask(f'/s/s{PATH["completions"]}', dict(model='kat', prompt='once', max_tokens=99, logprobs=0))
            c = a['json']['choices'][0]
            assert c['text'] == 'and so on'
            assert len(c['logprobs']['tokens']) == len(say(w.tok, 'and so on'))
            assert c['logprobs']['token_logprobs'][0] == -.5
            await w.ask(f'/s/s{PATH["completions"]}', dict(model='kat', prompt='onceand so on<|im_end|>more'))
            assert np.array_equal(w.engine.asked[1].ids,
                                  [*w.tok.encode('once'), *say(w.tok, 'and so on'), *w.tok.encode('more')])
            await w.ask(f'/s/t{PATH["completions"]}', dict(model='kat', prompt=[5, 6, 7]))
            assert w.engine.asked[2].ids.tolist() == [5, 6, 7]
            t, = next(x for x in w.store.groups() if x.task == 's').trajectories
            assert t.n_turns == 2 and [x['reason'] for x in t.info['turns']] == ['start', 'append']
            r = await w.ask(f'/s/t{PATH["completions"]}', dict(model='kat', prompt=[5, 10**6]))
            assert r['status'] == 400 and 'token id 1000000' in error_of(r)
            r = await w.ask(PATH['chat'], chat_body(USER, logprobs=True, top_logprobs=3))
            assert r['status'] == 400 and 'alternatives are not recorded' in error_of(r)
    run(go())


def test_count_tokens_is_what_the_prompt_will_have(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            body = messages_body([dict(role='system', content='s'), *USER], SCENARIO_TOOLS[0])
            n = (await w.ask('/s/s/v1/messages/count_tokens',
                             {k: v for k, v in body.items() if k != 'max_tokens'}))['json']['input_tokens']
            r = await w.ask('/s/s/v1/messages', body)
            assert n == r['json']['usage']['input_tokens'] == len(w.engine.asked[0].ids) and len(w.session().turns) == 1
            more = messages_body([dict(role='system', content='s'), *USER, heard('messages', r), *USER],
                                 SCENARIO_TOOLS[0])
            n = (await w.ask('/s/s/v1/messages/count_tokens', more))['json']['input_tokens']
            assert n == (await w.ask('/s/s/v1/messages', more))['json']['usage']['input_tokens']
            assert w.session().busy == 0
    run(go())


def test_what_claude_code_does_to_its_history_stays_clean(tmp_path):
    """A billing line that changes with every request, blocks that become strings, cache marks, hidden thinking: nothing
    of it matters."""
    async def go():
        async with world(tmp_path, '<think>\nhm\n</think>\n\nhello you') as w:
            def body(i, messages):
                system = [dict(type='text', text=f'x-anthropic-billing-header: cc_version=2.1.{i}; cc_entrypoint=cli;'),
                          dict(type='text', text='You are an agent.', cache_control=dict(type='ephemeral'))]
                b = messages_body(messages) | dict(system=system, thinking=dict(type='adaptive', display='omitted'),
                                                   metadata=dict(user_id='{"session_id": "cc"}'))
                note = 'the environment: Linux' if i else [dict(type='text', text='the environment: Linux')]
                b['messages'].insert(1, dict(role='system', content=note))     # a system message in mid-list
                if i:
                    b['messages'][0]['content'] = 'hello'      # now as a plain string
                b['messages'][-1]['content'][0]['cache_control'] = dict(type='ephemeral')
                return b
            m = list(USER)
            for i in range(3):
                r = await w.ask('/v1/messages', body(i, m), {'anthropic-beta': 'claude-code-20250219'})
                assert r['json']['content'][0]['thinking'] == ''
                m += [dict(role='assistant', content='hello you'), dict(role='user', content=f'and {i}')]
            came = [(t.drift, t.reason) for t in w.session('cc').turns.values()]
            assert came == [('clean', 'start'), ('clean', 'append'), ('clean', 'append')]
    run(go())


def test_silence_is_broken_by_signs_of_life(tmp_path):
    async def go():
        async with world(tmp_path, ping=.001) as w:
            w.hold[0], pings = (2, asyncio.Event()), []
            async def app(scope, receive, send):
                async def hear(m):
                    if b'event: ping' in m.get('body', b''):
                        pings.append(m)
                    await send(m)
                await w.g.app(scope, receive, hear)
            task = asyncio.ensure_future(ask(app, PATH['messages'], messages_body(USER, stream=True)))
            await until(lambda: w.hold[0][1]._waiters and len(pings) > 2)
            w.hold[0][1].set()
            assert heard('messages', await task)['content'] == 'an answer'
    run(go())


def test_new_weights_in_mid_answer_are_in_the_record(tmp_path):
    async def go():
        async with world(tmp_path, 'four tokens and more') as w:
            w.hold[0] = 3, asyncio.Event()
            task = asyncio.ensure_future(w.chat('x'))
            await until(lambda: w.hold[0][1]._waiters)
            await w.engine.update_weights(None, 5)
            w.hold[0][1].set()
            await task
            t, = w.store.load(w.tok, '', 's').trajectories()
            assert t.version[t.mask].tolist() == [0]*3 + [5]*(int(t.mask.sum()) - 3)
            assert 'kat_weight_version 5' in (await w.ask('/metrics'))['body'].decode()
    run(go())


# --- sessions over HTTP

def test_grading_finishes_a_session(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            r = await w.chat('x')
            uid = next(iter(w.session().turns))
            assert (await w.ask('/s/s/reward', dict(reward=.25, turn=uid, finished=False)))['json'] == dict(
                name='s', task='s', reward=None, finished=False)
            assert (await w.chat('y'))['status'] == 200
            r = await w.ask('/s/s/reward', dict(reward=1, info=dict(tests='2 of 2')))
            assert r['json']['reward'] == 1 and r['json']['finished']
            r = await w.chat('z')
            assert r['status'] == 409 and 'finished; start another' in error_of(r)
            lines = (await w.ask('/s/s/trajectories'))['body'].decode().splitlines()
            got = [Trajectory.from_dict(json.loads(x)) for x in lines]
            assert [t.reward for t in got] == [1.0, 1.0] and got[0].info['tests'] == '2 of 2'
            assert [t.info['turns'][0].get('reward') for t in got] == [.25, None] and got[0].session == got[1].session
            assert got == w.store.load(w.tok, '', 's').trajectories()
            for bad, says in ((dict(reward='1'), 'reward'), (dict(reward=True), 'reward'), (dict(turn='none'), 'turn'),
                              (dict(finished=1), 'finished'), (dict(info=[]), 'info'),
                              (dict(rewrad=1), 'rewrad: unknown field'), (b'{"reward": NaN}', 'not JSON')):
                r = await w.ask('/s/s/reward', bad)
                assert r['status'] == 400 and says in error_of(r)
            row, = (await w.ask('/sessions'))['json']['sessions']
            assert (row['name'], row['turns'], row['reward'], row['finished']) == ('s', 2, 1.0, True)
            assert 'owner' not in row
            shown = (await w.ask('/s/s'))['json']
            assert shown['tree'].startswith('Session(s: 2 turns')
            assert [t['reason'] for t in shown['turns']] == ['start', 'conversation']
    run(go())


def test_a_group_is_given_to_trainers_once_as_it_is_and_by_its_owner_only(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            ann, bob = key('ann-boss'), key('bob-boss')
            finish = lambda who, **body: w.ask('/groups', body, who)
            for name in 'ab':
                assert (await w.chat('x', name, ann | {'x-kat-task': 't'}))['status'] == 200
            r = await finish(ann, key='k', sessions=['a', 'b'])
            assert r['status'] == 400 and "session 'a' is not finished" in error_of(r)
            for name, value in (('a', 1), ('b', 0)):
                await w.ask(f'/s/{name}/reward', dict(reward=value), ann)
            r = await finish(bob, key='k', sessions=['a', 'b'])
            assert r['status'] == 400 and "there is no session 'a'" in error_of(r)
            for new in (True, False):                                # the second time is a client that heard no answer
                assert (await finish(ann, key='k', sessions=['a', 'b']))['json'] == dict(key='k', new=new)
            await w.chat('x', 'c', bob)
            await w.ask('/s/c/reward', dict(reward=2), bob)
            assert (await finish(bob, key='k', sessions=['c']))['json']['new']   # his key, not hers
            r = await finish(ann, key='other', sessions=['a'])
            assert r['status'] == 400 and 'is in another group' in error_of(r)
            (_, one), (_, two) = w.store.finished_groups(0, 9)
            assert [t.reward for t in one.trajectories] == [1.0, 0.0] and one.task == 't'
            assert [t.reward for t in two.trajectories] == [2.0]
            for bad, says in ((dict(key='', sessions=['a']), 'key'), (dict(key=1, sessions=['a']), 'key'),
                              (dict(key='k', sessions=[]), 'sessions'), (dict(key='k', sessions=['a', 1]), 'sessions'),
                              (dict(key='k', sessions=['\0']), 'sessions'),
                              (dict(key='k', session=['a']), 'session: unknown field')):
                r = await finish(ann, **bad)
                assert r['status'] == 400 and says in error_of(r)
            assert (await w.ask('/groups', dict(key='k', sessions=['a'])))['status'] == 401
            assert (await finish(key('ann'), key='more', sessions=['a']))['status'] == 403
    run(go())


def test_models_and_health(tmp_path):
    async def go():
        async with world(tmp_path, model='kat-dev') as w:
            assert [m['id'] for m in (await w.ask('/v1/models'))['json']['data']] == ['kat-dev']
            assert [m['id'] for m in (await w.ask('/s/x/v1/models'))['json']['data']] == ['kat-dev']
            assert (await w.ask('/v1/models/kat-dev'))['json']['id'] == 'kat-dev'
            assert (await w.ask('/v1/models/org/other'))['status'] == 404
            assert (await w.ask('/health'))['json'] == dict(status='ok', version=0, active=0)
    run(go())


def test_metrics_are_prometheus_text():
    m = Metrics()
    m.add('x_total', 2, a='b')
    m.took(.3)
    lines = m.text(dict(g=1)).splitlines()
    assert 'kat_x_total{a="b"} 2' in lines and 'kat_request_seconds_bucket{le="0.25"} 0' in lines
    assert 'kat_request_seconds_bucket{le="0.5"} 1' in lines
    assert 'kat_request_seconds_bucket{le="+Inf"} 1' in lines and lines[-1] == 'kat_g 1'


# --- over a socket

def test_over_a_real_socket_with_a_real_disconnect(tmp_path):
    async def go():
        async with world(tmp_path,
                         'one two three') as w, running(w.g) as address, httpx2.AsyncClient(base_url=address) as client:
            assert (await client.post(
                '/s/s/v1/chat/completions',
                json=chat_body(USER))).json()['choices'][0]['message']['content'] == 'one two three'
            w.hold[1] = 6, asyncio.Event()
            async with client.stream('POST', '/s/s/v1/messages', json=messages_body(USER, stream=True)) as r:
                async for line in r.aiter_lines():
                    if 'text_delta' in line: break
            await until(lambda: len(w.session().turns) == 2)
            assert [t.finish for t in w.store.load(w.tok, '', 's').turns.values()] == ['stop', 'abort']
            assert w.engine.aborted == 1
            assert [t.reason for t in w.session().turns.values()] == ['start', 'retry']
            assert (await client.get('/nowhere')).status_code == 404
            with pytest.raises(OSError):
                async with running(w.g, port=int(address.rpartition(':')[2])):
                    pass
    run(go())


def test_stopping_the_server_records_what_was_under_way(tmp_path):
    async def go():
        async with world(tmp_path, 'one two three') as w:
            w.hold[0] = 4, asyncio.Event()
            async with running(w.g, grace=0) as address, httpx2.AsyncClient(base_url=address) as client:
                task = asyncio.ensure_future(client.post('/s/s/v1/chat/completions', json=chat_body(USER)))
                await until(lambda: w.hold[0][1]._waiters)
            with pytest.raises(httpx2.HTTPError):
                await task
            await w.g.close()
            assert [(t.finish, t.n_answer) for t in w.store.load(w.tok, '', 's').turns.values()] == [('abort', 4)]
    run(go())


def test_a_real_model_behind_it(tmp_path):
    "A tiny random model: what the agent got, what the engine sampled and what the store has are the same tokens."
    tok = tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=None,
                                         eos_token_id=None, pad_token_id=None))
    async def go():
        engine, store = HFAsyncEngine(model, max_len=512, slots=4, tokenizer=tok), Store(tmp_path/'s.db')
        g = Gateway(engine, tok, store, max_len=512)
        async def agent(name, stream):
            m = []
            for i in range(3):
                m.append(dict(role='user', content=f'turn {i} of {name}'))
                r = await ask(g.app, f'/s/{name}/v1/chat/completions',
                              chat_body(m, max_tokens=12, seed=i, temperature=.8, stream=stream))
                m.append(heard('chat', r))
        await asyncio.gather(agent('a', False), agent('b', True), agent('c', True))
        for name in 'abc':
            t, = store.load(tok, '', name).trajectories()
            assert t.n_turns == 3 and {x['drift'] for x in t.info['turns']} <= {'clean', 'realigned'}
            with torch.no_grad():
                lp = (model.float()(torch.tensor(t.ids[None]).long()).logits[0] / .8).log_softmax(-1)
            at = np.flatnonzero(t.mask)
            np.testing.assert_allclose(t.logprobs[at], lp[at - 1, t.ids[at].astype(int)].numpy(), atol=1e-4)
        await g.close()
        await engine.close()
        store.close()
    run(go())


# --- the command

def keyless_server_writes_its_operators_key(tmp_path, out, printed):
    "To a file for the user alone, used again by the next server; it is shown on a terminal only, which this isn't."
    keys = []
    async def once():
        printed.clear()
        task = asyncio.ensure_future(cli._serve(ROOT/'data'/'base', '127.0.0.1', 0, 'here.db', None, 512, 4))
        while 'OPENAI_BASE_URL' not in out():
            assert not task.done(), task
            await asyncio.sleep(.02)
        address = out().split('OPENAI_BASE_URL=')[1].split('/v1')[0]
        keys.append(Path('here.db.key').read_text().strip())
        assert "in here.db.key, for rewards" in out() and keys[-1] not in out()
        async with httpx2.AsyncClient(base_url=address) as c:
            codes = [(await c.get('/sessions', headers={'x-api-key': k})).status_code for k in ('', 'kat', keys[-1])]
            assert codes == [403, 403, 200]
        os.kill(os.getpid(), signal.SIGINT)
        await task
    run(once())
    run(once())
    assert keys[0] == keys[1] and Path('here.db.key').stat().st_mode & 0o777 == 0o600
    lines = cli._operator_lines('http://h', None, Path('here.db.key'), {'secret-word': ''})
    assert 'secret-word' not in ''.join(lines)


def test_kat_serve_and_kat_sessions(tmp_path, capsys, monkeypatch):
    """The command's own coroutine with the shipped model, told to stop by a signal; then what it left, listed, shown
    and exported."""
    monkeypatch.chdir(tmp_path)
    (tmp_path/'keys.txt').write_text('# of the lab\nann ann-secret\nann ann-boss-secret operator\n')
    printed = []
    def out():
        printed.append(capsys.readouterr().out)
        return ''.join(printed)
    async def go():
        serving = cli._serve(ROOT/'data'/'base', '127.0.0.1', 0, 'here.db', tmp_path/'keys.txt', 512, 4)
        task = asyncio.ensure_future(serving)
        while 'OPENAI_BASE_URL' not in out():
            assert not task.done(), task
            await asyncio.sleep(.02)
        address = out().split('OPENAI_BASE_URL=')[1].split()[0]
        async with httpx2.AsyncClient(headers=dict(authorization='Bearer ann-secret@s')) as c:
            r = await c.post(f'{address}/chat/completions', json=chat_body(USER, max_tokens=8, temperature=0))
            assert r.status_code == 200 and r.json()['usage']['completion_tokens'] <= 8
            assert (await c.get(f'{address}/models', headers={'authorization': ''})).status_code == 401
        os.kill(os.getpid(), signal.SIGTERM)
        await task
    run(go())
    assert "/live  (asks for an operator's key)\n" in ''.join(printed) and 'ANTHROPIC_BASE_URL=' in ''.join(printed)
    assert 'secret' not in ''.join(printed) and not Path('here.db.key').exists()

    def kat(*args):
        with pytest.raises(SystemExit) as e:
            cli.main(list(args))
        return e.value.code, *capsys.readouterr()
    code, text, _ = kat('sessions', 'list', '--store', 'here.db')
    assert code == 0 and [x for x in ('session', 'ann', 'realigned') if x not in text] == []
    code, text, _ = kat('sessions', 'show', 's', '--owner', 'ann', '--store', 'here.db')
    assert code == 0 and text.startswith('Session(s: 1 turns, 1 leaves')
    assert kat('sessions', 'export', 'out.parquet', '--store', 'here.db')[:2] == (0, 'out.parquet: groups 1\n')
    assert len(next(read_records('out.parquet'))) == 1
    keyless_server_writes_its_operators_key(tmp_path, out, printed)
    (tmp_path/'bad.txt').write_text('ann a\nbob a\n')
    for args, says in (
        (('sessions', 'show', 's', '--store', 'here.db'), "no session 's' in here.db"),
        (('sessions', 'export', 'x.csv', '--store', 'here.db'), 'x.csv'),
        (('sessions', 'list'), 'no store kat-sessions.db'), (('serve', '--host', '0.0.0.0'), 'give --keys'),
        (('serve', '--keys', 'bad.txt'), 'bad.txt:2: a key that is there already'),
        (('serve', '--model', 'none'), 'no checkpoint here'),
        (('serve', '--vllm-url', 'http://127.0.0.1:9'), 'only with --engine vllm'),
        (('serve', '--engine', 'x'), "'hf', 'vllm'"),
        (('serve', '--engine', 'vllm', '--vllm-url', 'http://127.0.0.1:9'), 'is the server running?'),
        (('serve', '--engine', 'vllm', '--vllm-url', 'http://127.0.0.1:9', '--slots', '2'), '--slots 2: a server'),
        (('serve', '--engine', 'vllm', '--model', 'none'), 'no checkpoint here'),
        (('serve', '--slots', '0'), "value for '--slots'"), (('serve', '--max-len', '0'), "value for '--max-len'")):
        code, text, err = kat(*args)
        assert code == 2 and not text and says in err and err.count('\n') == 1, err


def test_every_end_token_of_the_model_ends_an_answer(tmp_path):
    from kat.core.endings import end_tokens
    from kat.core.template import train_tokenizer
    tok = train_tokenizer(['def total(items):\n'] * 3, 300)
    tok.eos_token = '<|endoftext|>'     # the template closes with <|im_end|>
    w = World(tmp_path/'s.db')
    for end in ('<|im_end|>', '<|endoftext|>'):
        engine = ScriptEngine(lambda r: [*tok.encode('hi'), tok.convert_tokens_to_ids(end)], tok, keep=True)
        g = Gateway(engine, tok, w.store, 1000)
        assert set(g.stop) == set(end_tokens(tok)) == {tok.eos_token_id, tok.convert_tokens_to_ids('<|im_end|>')}
        out = asyncio.run(ask(g.app, f'/s/{end[2:5]}/v1/chat/completions', chat_body([dict(role='user', content='q')])))
        choice = out['json']['choices'][0]
        assert (choice['finish_reason'], choice['message']['content']) == ('stop', 'hi')
        assert set(engine.asked[0].stop) == set(g.stop)
