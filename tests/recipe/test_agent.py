"The agent: what it sends, what it makes of answers, how it ends; on a real socket, against a gateway and a stranger"
import asyncio
import json

import httpx2
import pytest
from plane_world import say, tokenizer

from kat.infer.scripted import ScriptEngine
from kat.plane.gateway import Gateway, running
from kat.plane.store import Store
from kat.envs.base import Env, Observation, ToolCall, ToolResult, tool
from kat.recipe.agent import Refused, calls_of, play, replies


class Echo(Env):
    "Says what it was called with; `end` ends the episode."
    tools = [tool('say', 'repeat', text='string'), tool('end', 'finish')]
    async def reset(self, task):
        return Observation([dict(role='system', content='Repeat.'), dict(role='user', content=task)])
    async def step(self, calls):
        results = [ToolResult(call.id, call.arguments.get('text', 'nothing')) for call in calls]
        return Observation([], results, any(call.name == 'end' for call in calls))


def against(answer, **kw):
    "Play against a server that is a function: request -> (status, JSON)."
    def server(request):
        status, body = answer(json.loads(request.content))
        return httpx2.Response(status, json=body)
    async def go():
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(server)) as client:
            return await play(client, 'http://x/v1', Echo(), 'hello', **kw)
    return asyncio.run(go())


def says(content=None, *calls, **more):
    calls = [dict(id=f'c{i}', type='function', function=dict(name=name, arguments=arguments))
             for i, (name, arguments) in enumerate(calls)]
    message = dict(role='assistant', content=content, **(dict(tool_calls=calls) if calls else {}), **more)
    return 200, dict(choices=[dict(message=message)])


def test_a_dialogue_of_any_openai_server_only_grows():
    asked, answers = [], iter([says(None, ('say', '{"text": "a"}'), ('say', 'no json')),
                               says('hm', refusal=None, reasoning_content='why'),
                               says('', ('end', ''))])
    def server(body):
        asked.append(body)
        return next(answers)
    finish, messages = against(server, seed=5, model='m', temperature=0.5)
    assert finish == 'submit' and [len(body['messages']) for body in asked] == [2, 5, 7] and len(messages) == 8
    for before, after in zip(asked, asked[1:]):
        assert after['messages'][:len(before['messages'])] == before['messages']
    assert asked[1]['messages'][3:] == [dict(role='tool', tool_call_id='c0', content='a'),
                                        dict(role='tool', tool_call_id='c1', content='nothing')]
    assert asked[2]['messages'][5:] == [dict(role='assistant', content='hm', reasoning_content='why'),
                                        dict(role='user', content='no tool call')]
    assert len({body['seed'] for body in asked}) == 3
    assert all((body['model'], body['temperature'], body['tools']) == ('m', 0.5, Echo.tools) for body in asked)


def test_how_it_ends():
    assert against(lambda body: says('hm'))[0] == 'lost'
    finish, messages = against(lambda body: says(None, ('say', '{}')), max_turns=4)
    assert finish == 'cap' and sum(message['role'] == 'assistant' for message in messages) == 4
    with pytest.raises(Refused, match='401.*no such key'):
        against(lambda body: (401, dict(error='no such key')))
    seen = []
    against(lambda body: seen.append(body) or says(None, ('end', '{}')))
    assert 'seed' not in seen[0]


def test_calls_that_cannot_be_read():
    unreadable = ('', '{', '[1]', '"a"', None)
    bad = [dict(id='x', function=dict(name='say', arguments=arguments)) for arguments in unreadable]
    assert calls_of(dict(tool_calls=bad)) == [ToolCall('say', {}, 'x')] * 5
    assert calls_of(dict(content='hm', tool_calls=None)) == []
    heard = replies(dict(malformed_calls=['not closed', 'unknown tool']), [ToolResult('x', 'done')])
    assert heard == [dict(role='tool', tool_call_id='x', content='done'),
                     dict(role='user', content='not closed\nunknown tool')]


def test_every_turn_is_recorded_clean_by_the_gateway(tmp_path):
    "Over a socket: calls in parallel, one that can't be read, one that is no call, an answer cut off by its limit."
    tok = tokenizer()
    lines = iter(['a <tool_call>say x</tool_call> b <tool_call>say y</tool_call>',
                  ' <tool_call>say z</tool_call><tool_call>fly</tool_call>',
                  '',
                  '<tool_call>say w</tool_call>' + 'c' * 99,
                  '<tool_call>end</tool_call>'])
    engine = ScriptEngine(lambda request: say(tok, next(lines)), keep=True)
    async def go():
        store = Store(tmp_path/'s.db')
        gateway = Gateway(engine, tok, store, 8000)
        async with running(gateway) as address, httpx2.AsyncClient() as client:
            url = f'{address}/s/one/v1'
            finish, messages = await play(client, url, Echo(), 'hello', model='kat', max_tokens=60)
        store.close()
        return finish, messages, gateway.manager.get('', 'one')
    finish, messages, session = asyncio.run(go())
    turns = list(session.turns.values())
    assert finish == 'submit'
    assert [(turn.drift, turn.reason) for turn in turns] == [('clean', 'start')] + [('clean', 'append')] * 4
    assert [turn.finish for turn in turns] == ['stop', 'stop', 'stop', 'length', 'stop'] and len(session.leaves) == 1
    for turn, request in zip(turns, engine.asked):
        assert (turn.ids[:len(request.ids)] == request.ids).all()
    heard = [message['content'] for message in messages if message['role'] == 'user']
    assert heard == ['hello', "unknown tool 'fly'; tools: say, end", 'no tool call']
