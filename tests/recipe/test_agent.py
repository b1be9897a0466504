"The agent: what it sends, what it makes of answers, how it ends; over a real socket, against a gateway and against a stranger"
import asyncio
import json

import httpx2
import pytest
from plane_world import say, tokenizer

from kat.recipe.agent import Refused, calls_of, play, replies
from kat.envs.base import Env, Observation, ToolCall, ToolResult, tool
from kat.plane.gateway import Gateway, running
from kat.infer.scripted import ScriptEngine
from kat.plane.store import Store


class Echo(Env):
    "Says what it was called with; `end` ends the episode."
    tools = [tool('say', 'repeat', text='string'), tool('end', 'finish')]
    async def reset(self, task):
        return Observation([dict(role='system', content='Repeat.'), dict(role='user', content=task)])
    async def step(self, calls):
        return Observation([], [ToolResult(c.id, c.arguments.get('text', 'nothing')) for c in calls], any(c.name == 'end' for c in calls))


def against(answer, **kw):
    "Play against a server that is a function: request -> (status, JSON)."
    def server(request):
        return httpx2.Response((r := answer(json.loads(request.content)))[0], json=r[1])
    async def go():
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(server)) as client:
            return await play(client, 'http://x/v1', Echo(), 'hello', **kw)
    return asyncio.run(go())


def says(content=None, *calls, **more):
    calls = [dict(id=f'c{i}', type='function', function=dict(name=n, arguments=a)) for i, (n, a) in enumerate(calls)]
    return 200, dict(choices=[dict(message=dict(role='assistant', content=content, **(dict(tool_calls=calls) if calls else {}), **more))])


def test_a_dialogue_of_any_openai_server_only_grows():
    asked, answers = [], iter([says(None, ('say', '{"text": "a"}'), ('say', 'no json')), says('hm', refusal=None, reasoning_content='why'), says('', ('end', ''))])
    def server(body):
        asked.append(body)
        return next(answers)
    finish, messages = against(server, seed=5, model='m', temperature=0.5)
    assert finish == 'submit' and [len(b['messages']) for b in asked] == [2, 5, 7] and len(messages) == 8
    for a, b in zip(asked, asked[1:]):
        assert b['messages'][:len(a['messages'])] == a['messages']
    assert asked[1]['messages'][3:] == [dict(role='tool', tool_call_id='c0', content='a'), dict(role='tool', tool_call_id='c1', content='nothing')]
    assert asked[2]['messages'][5:] == [dict(role='assistant', content='hm', reasoning_content='why'), dict(role='user', content='no tool call')]
    assert len({b['seed'] for b in asked}) == 3 and all((b['model'], b['temperature'], b['tools']) == ('m', 0.5, Echo.tools) for b in asked)


def test_how_it_ends():
    assert against(lambda b: says('hm'))[0] == 'lost'
    finish, messages = against(lambda b: says(None, ('say', '{}')), max_turns=4)
    assert finish == 'cap' and sum(m['role'] == 'assistant' for m in messages) == 4
    with pytest.raises(Refused, match='401.*no such key'):
        against(lambda b: (401, dict(error='no such key')))
    assert 'seed' not in (seen := [])
    against(lambda b: seen.append(b) or says(None, ('end', '{}')))
    assert 'seed' not in seen[0]


def test_calls_that_cannot_be_read():
    bad = [dict(id='x', function=dict(name='say', arguments=a)) for a in ('', '{', '[1]', '"a"', None)]
    assert calls_of(dict(tool_calls=bad)) == [ToolCall('say', {}, 'x')] * 5 and calls_of(dict(content='hm', tool_calls=None)) == []
    heard = replies(dict(malformed_calls=['not closed', 'unknown tool']), [ToolResult('x', 'done')])
    assert heard == [dict(role='tool', tool_call_id='x', content='done'), dict(role='user', content='not closed\nunknown tool')]


def test_every_turn_is_recorded_clean_by_the_gateway(tmp_path):
    "Over a socket: calls in parallel, one that can't be read, one that is no call, an answer cut off by its limit."
    tok = tokenizer()
    lines = iter(['a <tool_call>say x</tool_call> b <tool_call>say y</tool_call>', ' <tool_call>say z</tool_call><tool_call>fly</tool_call>', '',
                  '<tool_call>say w</tool_call>' + 'c' * 99, '<tool_call>end</tool_call>'])
    engine = ScriptEngine(lambda r: say(tok, next(lines)), keep=True)
    async def go():
        store = Store(tmp_path/'s.db')
        gateway = Gateway(engine, tok, store, 8000)
        async with running(gateway) as address, httpx2.AsyncClient() as client:
            finish, messages = await play(client, f'{address}/s/one/v1', Echo(), 'hello', model='kat', max_tokens=60)
        store.close()
        return finish, messages, gateway.manager.get('', 'one')
    finish, messages, session = asyncio.run(go())
    turns = list(session.turns.values())
    assert finish == 'submit' and [(t.drift, t.reason) for t in turns] == [('clean', 'start')] + [('clean', 'append')] * 4
    assert [t.finish for t in turns] == ['stop', 'stop', 'stop', 'length', 'stop'] and len(session.leaves) == 1
    for t, r in zip(turns, engine.asked):
        assert (t.ids[:len(r.ids)] == r.ids).all()
    assert [m['content'] for m in messages if m['role'] == 'user'] == ['hello', "unknown tool 'fly'; tools: say, end", 'no tool call']
