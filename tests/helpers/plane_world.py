"Tokenizers, and an agent's side of the gateway, for the tests of the data plane"
import asyncio
import json
from functools import cache

import numpy as np

from kat.core.template import train_tokenizer
from kat.plane.gateway import Gateway
from kat.plane.scenarios import SCENARIO_TOOLS, answer_of, cut_off, messages_of, spelled
from kat.infer.scripted import ScriptEngine
from kat.plane.store import Store

# JSON calls, tools shown in the prompt, the reasoning of old turns dropped: a template of Qwen3's kind
HERMES = (
    "{% for m in messages %}{% if loop.first and tools %}"
    "{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% if m.role == 'tool' %}{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% else %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@cache
def tokenizer(kind='kat'):
    tok = train_tokenizer(['def total(items):\n    return sum(items)\n'] * 3, 300)
    if kind == 'hermes':
        tok.chat_template = HERMES
    return tok


def say(tok, text):
    return [*tok.encode(text, add_special_tokens=False), tok.eos_token_id]


# --- the wire: canonical messages as an agent sends them

def chat_body(messages, tools=(), **more):
    out = []
    for m in messages:
        d = {k: v for k, v in m.items() if k not in ('reasoning', 'error', 'tool_calls')}
        if m.get('reasoning'):
            d['reasoning_content'] = m['reasoning']
        if m.get('tool_calls'):
            d['tool_calls'] = [c | dict(function=dict(
                name=c['function']['name'], arguments=json.dumps(c['function']['arguments']))) for c in m['tool_calls']]
        out.append(d)
    return dict(model='kat', messages=out, **(dict(tools=list(tools)) if tools else {})) | more


def messages_body(messages, tools=(), **more):
    out = []
    for m in messages:
        if m['role'] == 'tool':
            block = dict(type='tool_result', tool_use_id=m['tool_call_id'], content=m['content'],
                         is_error=m.get('error', False))
            if out and out[-1]['role'] == 'user' and out[-1]['content'][0]['type'] == 'tool_result':
                out[-1]['content'].append(block)
            else:
                out.append(dict(role='user', content=[block]))
        elif m['role'] == 'user':
            out.append(dict(role='user', content=[dict(type='text', text=m['content'])]))
        elif m['role'] == 'assistant':
            blocks = [dict(type='thinking', thinking=m['reasoning'], signature='x')] if m.get('reasoning') else []
            if m['content']:
                blocks.append(dict(type='text', text=m['content']))
            blocks += [dict(type='tool_use', id=c['id'], name=c['function']['name'], input=c['function']['arguments'])
                       for c in m.get('tool_calls', ())]
            out.append(dict(role='assistant', content=blocks))
    system = [dict(type='text', text=m['content']) for m in messages if m['role'] == 'system']
    spec = [dict(name=t['function']['name'], description=t['function']['description'],
                 input_schema=t['function']['parameters']) for t in tools]
    return dict(model='kat', max_tokens=9999, thinking=dict(type='enabled', budget_tokens=1024), messages=out,
                **(dict(system=system) if system else {}), **(dict(tools=spec) if spec else {})) | more


BODY = dict(chat=chat_body, messages=messages_body)
PATH = dict(chat='/v1/chat/completions', messages='/v1/messages', completions='/v1/completions')


def heard(dialect, response):
    "The canonical answer that an agent keeps of a response."
    if 'events' in response: return heard_stream(dialect, response['events'])
    body = response['json']
    if dialect == 'chat':
        m = body['choices'][0]['message']
        calls = [c | dict(function=dict(name=c['function']['name'], arguments=json.loads(c['function']['arguments'])))
                 for c in m.get('tool_calls', ())]
        text, thought = m['content'] or '', m.get('reasoning_content')
    else:
        get = lambda kind, key: [b[key] for b in body['content'] if b['type'] == kind]
        calls = [dict(id=b['id'], type='function', function=dict(name=b['name'], arguments=b['input']))
                 for b in body['content'] if b['type'] == 'tool_use']
        text, thought = ''.join(get('text', 'text')), ''.join(get('thinking', 'thinking'))
    more = (dict(reasoning=thought) if thought else {}) | (dict(tool_calls=calls) if calls else {})
    return dict(role='assistant', content=text) | more


def heard_stream(dialect, events):
    text, thought, calls = '', '', []
    for e in events:
        if dialect == 'chat':
            for c in e['choices']:
                d = c['delta']
                text, thought = text + (d.get('content') or ''), thought + d.get('reasoning_content', '')
                calls += [dict(id=x['id'], type='function', function=dict(
                    name=x['function']['name'],
                    arguments=json.loads(x['function']['arguments']))) for x in d.get('tool_calls', ())]
        elif e['type'] == 'content_block_start' and e['content_block']['type'] == 'tool_use':
            calls.append(dict(id=e['content_block']['id'], type='function',
                              function=dict(name=e['content_block']['name'], arguments='')))
        elif e['type'] == 'content_block_delta':
            d = e['delta']
            text, thought = text + d.get('text', ''), thought + d.get('thinking', '')
            if 'partial_json' in d:
                calls[-1]['function']['arguments'] = json.loads(d['partial_json'])
    more = (dict(reasoning=thought) if thought else {}) | (dict(tool_calls=calls) if calls else {})
    return dict(role='assistant', content=text) | more


# --- the ASGI application, called as a server calls it

async def ask(app, path, body=None, headers=None, method=None, leave=None, chunks=None):
    """One request. `leave`: an event on which the client goes away. `body`: JSON, or bytes as they are.

    Returns status, headers and bytes; `json` or `events` where they can be read; `last`: the parts of the body as they
    were sent."""
    raw = chunks or [body if isinstance(body, bytes) else b'' if body is None else json.dumps(body).encode()]
    parts = iter([*[dict(type='http.request', body=c, more_body=i + 1 < len(raw)) for i, c in enumerate(raw)]])
    over = asyncio.Event()
    sent = dict(status=None, headers={}, parts=[])

    async def receive():
        if (m := next(parts, None)) is not None: return m
        await (leave or over).wait()
        return dict(type='http.disconnect')

    async def send(m):
        if leave is not None and leave.is_set(): return
        if m['type'] == 'http.response.start':
            sent.update(status=m['status'], headers={k.decode(): v.decode() for k, v in m['headers']})
        else:
            sent['parts'].append(m['body'])
            if not m.get('more_body'):
                over.set()

    headers = {'content-type': 'application/json'} | {k.lower(): v for k, v in (headers or {}).items()}
    scope = dict(type='http', asgi=dict(version='3.0'), http_version='1.1',
                 method=method or ('GET' if body is None and not chunks else 'POST'), path=path, raw_path=path.encode(),
                 root_path='', query_string=b'', scheme='http', server=('kat', 80), client=('agent', 1),
                 headers=[(k.encode(), v.encode()) for k, v in headers.items()])
    await app(scope, receive, send)
    data = b''.join(sent['parts'])
    out = sent | dict(body=data)
    if sent['headers'].get('content-type', '').startswith('text/event-stream'):
        lines = [x.split('data: ', 1)[1] for x in data.decode().split('\n\n') if 'data: ' in x]
        out['events'] = [json.loads(x) for x in lines if x != '[DONE]']
    elif sent['headers'].get('content-type') == 'application/json':
        out['json'] = json.loads(data)
    return out


async def until(what):
    "Let others run until `what()`; fails where it never comes."
    for _ in range(20000):
        if what(): return
        await asyncio.sleep(0)
    for _ in range(200):  # a thread may have to answer
        if what(): return
        await asyncio.sleep(.02)
    raise AssertionError('it never came')


OPERATOR = 'the-operator'


class World:
    "A gateway with a store and a scripted engine, whose next answers lie in `next`."
    def __init__(self, path, kind='kat', answer=None, **more):
        self.tok, self.path = tokenizer(kind), path
        self.next, self.hold = [], {}   # ids; request number -> (tokens before it waits, event)
        self.engine = ScriptEngine(answer or (lambda r: self.next.pop(0)), self.tok, step=self._step, keep=True)
        self.store = Store(path)
        self.g = Gateway(self.engine, self.tok, self.store, **dict(max_len=100_000, operators={OPERATOR: ''}) | more)

    async def _step(self, request, i):
        n = next(k for k, r in enumerate(self.engine.asked) if r is request)
        if n in self.hold and self.hold[n][0] <= i:
            await self.hold[n][1].wait()

    def ask(self, path, body=None, headers=None, **more):
        "Without keys, everybody here is the operator."
        mine = {'x-api-key': OPERATOR} if self.g.access.owners is None else {}
        return ask(self.g.app, path, body, mine | (headers or {}), **more)
    def chat(self, text, session='s', headers=None, **more):
        return self.ask(f'/s/{session}/v1/chat/completions', chat_body([dict(role='user', content=text)], **more),
                        headers)
    def session(self, name='s', owner=''):
        return self.g.manager.get(owner, name) or self.store.load(self.tok, owner, name)

    async def __aenter__(self):
        return self
    async def __aexit__(self, *exc):
        await self.g.close()
        self.store.close()


# --- a scenario through the gateway

async def play_http(w: World, sc, dialect: str, stream: bool, tag: str) -> tuple[dict, list]:
    "Turn ids by step, and the sessions' names."
    answers, turns, names, waiting = {}, {}, [], []
    for i, step in enumerate(sc.read()):
        said = answer_of(i, step)
        ids = spelled(w.tok, said)
        name = f'{tag}-{step.session}'
        names.append(name)
        messages = messages_of(step, answers)
        body = BODY[dialect](messages, SCENARIO_TOOLS[step.tools - 1], stream=stream)
        headers = {'x-claude-code-agent-id': step.agent} if step.agent else {}
        number, leave = len(w.engine.asked), None
        if step.finish == 'length':
            body['max_tokens'] = len(cut_off(ids, step))
        if step.finish == 'abort':
            leave = asyncio.Event()
            w.hold[number] = len(cut_off(ids, step)), asyncio.Event()
        if step.pending:
            w.hold[number] = 0, asyncio.Event()
        w.next.append(ids)
        task = asyncio.ensure_future(w.ask(f'/s/{name}{PATH[dialect]}', body, headers, leave=leave))
        await until(lambda: task.done() or len(w.engine.asked) > number)
        waiting.append((i, number, task, leave))
        if step.pending: continue
        for k, n, t, gone in reversed(waiting):
            if gone:
                await until(lambda: _stands(w, n))
                gone.set()
            elif n in w.hold:
                w.hold[n][1].set()
            r = await t
            assert gone or r['status'] == 200, r
            turn = list(w.session(name if k == i else names[k]).turns.values())[-1]
            turns[turn.id] = k
            answers[k] = turn.message if gone else heard(dialect, r)
        waiting = []
    return turns, sorted(set(names))


def _stands(w, n):
    "Has the engine come to where request `n` is held?"
    waiters = w.hold[n][1]._waiters
    return bool(waiters)


def z(n, x=0.):
    return np.full(n, x, np.float32)


def full_store(store, n):
    "Let a SQLite store grow by no more than `n` pages; None: without bound."
    import sqlalchemy as sa
    with store.engine.connect() as c:
        size = c.exec_driver_sql('PRAGMA page_count').scalar()
    limit = 2**30 if n is None else size + n
    store.engine.dispose()
    sa.event.listen(store.engine, 'connect', lambda raw, _: raw.execute(f'PRAGMA max_page_count={limit}'))
