"""Whatever ends the server, and whatever its engine: what has begun is in the store, as far as it had come, before the
process ends; and a stream that is cut says so. Most tests have a server in a process of its own, and real signals"""
import asyncio
import json
import signal
import socket
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx2
import pytest
import uvicorn
from plane_server import TOKENS, ids
from plane_world import PATH, World, ask, chat_body, messages_body, say, tokenizer, until
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from kat.plane.exchange import STOPPING
from kat.plane.gateway import running
from kat.plane.store import Store

HERE = Path(__file__).parents[1]/'helpers'
USER = [dict(role='user', content='hello')]
BODIES = dict(chat=chat_body(USER, temperature=0), messages=messages_body(USER, temperature=0),
              completions=dict(model='kat', prompt='a', max_tokens=19_000, temperature=0))
TERM, INT, HUP, QUIT, USR1, XCPU, RT = (
    getattr(signal, f'SIG{x}') for x in ('TERM', 'INT', 'HUP', 'QUIT', 'USR1', 'XCPU', 'RTMIN'))


def run(coro):
    return asyncio.run(asyncio.wait_for(coro, 120))


@asynccontextmanager
async def server(path, engine, grace):
    "A server's process; its address."
    p = await asyncio.create_subprocess_exec(sys.executable, str(HERE/'plane_server.py'), str(path/'store.db'), engine,
                                             str(grace), stdout=asyncio.subprocess.PIPE)
    try:
        p.address = (await p.stdout.readline()).decode().strip()
        yield p
    finally:
        with suppress(ProcessLookupError):
            p.kill()
        await p.wait()


async def events(client, dialect, begun):
    "A streamed answer's events; tells when TOKENS tokens have come."
    out, letters = [], len(tokenizer().decode(ids()[:-1]).rstrip())
    async with client.stream('POST', f'/s/{dialect}{PATH[dialect]}', json=BODIES[dialect] | dict(stream=True)) as r:
        async for line in r.aiter_lines():
            if line.startswith('data: '):
                out.append('DONE' if line == 'data: [DONE]' else json.loads(line[6:]))
            if not begun.done() and len(text_of(out)) >= letters:
                begun.set_result(None)
    return out


def text_of(events):
    texts = [e['choices'][0].get('text') or e['choices'][0].get('delta', {}).get('content') or '' if e.get('choices')
             else e.get('delta', {}).get('text', '') for e in events if e != 'DONE']
    return ''.join(texts)


def ends_with_an_error(dialect, events, message):
    error = events[-1]
    assert error != 'DONE' and 'DONE' not in events and message in error['error']['message'], events[-3:]
    assert (error['type'] == 'error') if dialect == 'messages' else (set(error) == {'error'})


async def said(p, n):
    "Until `n` answers have begun at the engine."
    for _ in range(n):
        assert await p.stdout.readline() == b'said\n'


async def work_and_end(p, kill):
    "Three streams and a whole answer under way, then the signals; the streams' events and the whole answer."
    async with httpx2.AsyncClient(base_url=p.address, timeout=60) as client:
        begun = {d: asyncio.get_running_loop().create_future() for d in BODIES}
        streams = {d: asyncio.ensure_future(events(client, d, begun[d])) for d in BODIES}
        whole = asyncio.ensure_future(client.post(f'/s/whole{PATH["chat"]}', json=BODIES['chat']))
        await asyncio.wait_for(asyncio.gather(*begun.values(), said(p, len(BODIES) + 1)), 60)
        await kill(p)
        return {d: await s for d, s in streams.items()}, await whole


def recorded(path, streams):
    "Every answer is in the store with what its agent saw of it."
    store = Store(path/'store.db')
    for name in (*streams, 'whole'):
        turn, = store.load(tokenizer(), '', name).turns.values()
        assert turn.finish == 'abort' and not any(s.trainable for s in turn.answer)
        if name in streams:
            assert turn.n_answer >= TOKENS and turn.message['content'].startswith(text_of(streams[name]))
    store.close()


@pytest.mark.parametrize('engine, signals, grace', [
    ('quick', [TERM], .2), ('quick', [INT], 0), ('quick', [INT, INT], 60), ('quick', [HUP, TERM], 60),
    ('quick', [QUIT], .1), ('quick', [USR1], .1), ('quick', [RT], .1), ('quick', [XCPU, TERM], 60),
    ('hf', [TERM, INT], 60)])
def test_signals(tmp_path, engine, signals, grace):
    async def kill(p):
        for n, number in enumerate(signals):
            if n:
                await refuses(p)     # the first one has been heard
            p.send_signal(number)
    async def go():
        async with server(tmp_path, engine, grace) as p:
            streams, whole = await work_and_end(p, kill)
            for dialect, got in streams.items():
                ends_with_an_error(dialect, got, STOPPING)
            assert whole.status_code == 503 and whole.headers['retry-after'] == '1'
            assert b'ended' in await asyncio.wait_for(p.stdout.read(), 30) and await p.wait() == 0
            recorded(tmp_path, streams)
    run(go())


async def refuses(p):
    "Until nobody new is let in."
    host, _, port = p.address.removeprefix('http://').partition(':')
    for _ in range(2000):
        try:
            socket.create_connection((host, int(port)), 1).close()
        except OSError:
            return
        await asyncio.sleep(.01)
    raise AssertionError('it still listens')


@pytest.mark.parametrize('engine', ['hangs', 'deaf'])
def test_an_engine_that_hangs_while_it_is_closed(tmp_path, engine):
    "Nothing is lost by killing it then: all is written before, and a signal does what it always does."
    async def go():
        async with server(tmp_path, engine, 0) as p:
            async def kill(p):
                p.send_signal(TERM)
            streams, whole = await work_and_end(p, kill)
            while (line := await asyncio.wait_for(p.stdout.readline(), 30)) != b'closing\n':
                assert line
            recorded(tmp_path, streams)
            p.send_signal(TERM)
            assert await asyncio.wait_for(p.wait(), 30) == -TERM
            for dialect, got in streams.items():
                ends_with_an_error(dialect, got, STOPPING)
    run(go())


@asynccontextmanager
async def vllm():
    "A vLLM that says TOKENS tokens and then nothing more, until `over`."
    over = asyncio.Event()
    async def generate(request):
        async def said():
            for i in ids():
                choice = dict(token_ids=[i], logprobs=dict(content=[dict(token_id=i, logprob=-.5)]))
                yield f'data: {json.dumps(dict(choices=[choice]))}\n\n'
            await over.wait()
        return StreamingResponse(said(), media_type='text/event-stream')
    async def models(request):
        return JSONResponse(dict(data=[dict(id='kat', max_model_len=20_000)]))
    async def info(request):
        return JSONResponse(dict(vllm_config=dict(model_config=dict(logprobs_mode='raw_logprobs'))))
    routes = [Route('/inference/v1/generate', generate, methods=['POST']), Route('/v1/models', models),
              Route('/server_info', info)]
    serving = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_config=None, timeout_graceful_shutdown=1))
    sock = socket.create_server(('127.0.0.1', 0))
    task = asyncio.ensure_future(serving._serve([sock]))
    try:
        yield f'http://127.0.0.1:{sock.getsockname()[1]}', over
    finally:
        over.set()
        serving.should_exit = True
        await task


@pytest.mark.parametrize('signals, grace', [([TERM], .2), ([INT, INT], 60)])
def test_signals_with_an_engine_behind_http(tmp_path, signals, grace):
    async def kill(p):
        for n, number in enumerate(signals):
            if n:
                await refuses(p)
            p.send_signal(number)
    async def go():
        async with vllm() as (url, _), server(tmp_path, url, grace) as p:
            streams, whole = await work_and_end(p, kill)
            for dialect, got in streams.items():
                ends_with_an_error(dialect, got, STOPPING)
            assert whole.status_code == 503 and await asyncio.wait_for(p.wait(), 30) == 0
            recorded(tmp_path, streams)
    run(go())


def test_an_engine_that_breaks_in_mid_answer(tmp_path):
    "Behind HTTP, and in the process: what had come is recorded, and the stream says that it was cut."
    async def nothing(p):
        pass
    async def go():
        async with server(tmp_path, 'breaks', 0) as p:
            streams, whole = await work_and_end(p, nothing)
            for dialect, got in streams.items():
                ends_with_an_error(dialect, got, 'the engine failed')
            assert whole.status_code == 503
            recorded(tmp_path, streams)
        (behind := tmp_path/'http').mkdir()
        async with vllm() as (url, over), server(behind, url, 0) as p:
            async def breaks(p):
                over.set()      # the stream of the engine ends without a finish
            streams, whole = await work_and_end(p, breaks)
            for dialect, got in streams.items():
                ends_with_an_error(dialect, got, 'the engine failed')
            recorded(behind, streams)
    run(go())


def test_a_client_that_takes_nothing_more(tmp_path):
    "The server writes into a connection that nobody reads, and cannot be held up by it."
    async def go():
        async with server(tmp_path, 'flood', 0) as p:
            host, _, port = p.address.removeprefix('http://').partition(':')
            body = json.dumps(BODIES['chat'] | dict(stream=True)).encode()
            head = (f'POST /s/slow{PATH["chat"]} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n'
                    f'content-length: {len(body)}\r\n\r\n').encode()
            with socket.create_connection((host, int(port)), 30) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                s.sendall(head + body)
                assert b'200' in s.recv(1000)
                await asyncio.wait_for(said(p, 1), 60)     # and it is far from sent
                p.send_signal(TERM)
                assert b'ended' in await asyncio.wait_for(p.stdout.read(), 60)
            turn, = Store(tmp_path/'store.db').load(tokenizer(), '', 'slow').turns.values()
            assert turn.finish == 'abort' and turn.n_answer > 1000
    run(go())


# --- in this process: how a stream ends otherwise

@pytest.mark.parametrize('dialect', list(BODIES))
def test_a_request_that_is_cancelled_says_so_and_is_recorded(tmp_path, dialect):
    "Twice in a row, as a server in a hurry does."
    async def go():
        async with World(tmp_path/'store.db') as w:
            w.engine.answer = lambda r: say(w.tok, 'one two three')
            w.hold[0] = 5, asyncio.Event()
            sent = []
            async def app(scope, receive, send):
                async def hear(m):
                    sent.append(m)
                    await send(m)
                await w.g.app(scope, receive, hear)
            task = asyncio.ensure_future(ask(app, f'/s/s{PATH[dialect]}', BODIES[dialect] | dict(stream=True)))
            await until(lambda: w.hold[0][1]._waiters)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await w.g.close()
            turn, = w.store.load(w.tok, '', 's').turns.values()
            assert (turn.finish, turn.n_answer, w.engine.live) == ('abort', 5, 0)
    run(go())


def test_once_cancelled_the_stream_ends_with_an_error(tmp_path):
    async def go():
        async with World(tmp_path/'store.db') as w:
            w.engine.answer = lambda r: say(w.tok, 'one two three')
            for n, dialect in enumerate(BODIES):
                w.hold[n], parts = (5, asyncio.Event()), []
                async def app(scope, receive, send):
                    async def hear(m):
                        parts.append(m.get('body', b''))
                        await send(m)
                    await w.g.app(scope, receive, hear)
                body = BODIES[dialect] | dict(stream=True)
                task = asyncio.ensure_future(ask(app, f'/s/{dialect}{PATH[dialect]}', body))
                await until(lambda: w.hold[n][1]._waiters)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert STOPPING.encode() in parts[-1]
    run(go())


@pytest.mark.parametrize('stream', [False, True])
def test_cancelled_behind_its_last_byte_it_says_nothing_more(tmp_path, stream):
    "The client takes its time with the end of an answer, and the server is given up."
    async def go():
        async with World(tmp_path/'store.db') as w:
            w.engine.answer = lambda r: say(w.tok, 'one two three')
            ended, sent = asyncio.Event(), []
            async def app(scope, receive, send):
                async def slow(m):
                    assert not ended.is_set()
                    sent.append(m)
                    if m['type'] == 'http.response.body' and not m['more_body']:
                        ended.set()
                        await asyncio.Event().wait()
                await w.g.app(scope, receive, slow)
            task = asyncio.ensure_future(ask(app, f'/s/s{PATH["chat"]}', BODIES['chat'] | dict(stream=stream)))
            await ended.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            turn, = w.store.load(w.tok, '', 's').turns.values()
            assert turn.finish == 'stop' and b'error' not in b''.join(m.get('body', b'') for m in sent)
    run(go())


def test_an_answer_that_was_complete_is_kept_whole(tmp_path):
    "The agent goes in the moment in which the engine is done."
    async def go():
        async with World(tmp_path/'store.db') as w:
            w.engine.answer = lambda r: say(w.tok, 'one two three')
            n = len(say(w.tok, 'one two three'))
            w.hold[0] = n - 1, asyncio.Event()
            task = asyncio.ensure_future(w.chat('x', stream=True))
            await until(lambda: w.hold[0][1]._waiters)
            exchange, = w.g.under_way.tasks
            async def broken(data, more=False):
                w.hold[0][1].set()
                await until(lambda: not w.engine.live)
                raise OSError('the connection broke')
            exchange.delivery.out.body = broken
            exchange.writing.bell.ring()
            with suppress(OSError):
                await task
            turn, = w.store.load(w.tok, '', 's').turns.values()
            assert (turn.finish, turn.n_answer) == ('stop', n)
    run(go())


def test_nothing_begins_while_it_stops_and_it_can_run_again(tmp_path):
    async def go():
        async with World(tmp_path/'store.db') as w:
            w.engine.answer = lambda r: say(w.tok, 'one two three')
            w.hold[0] = 5, asyncio.Event()
            first = asyncio.ensure_future(w.chat('x', 'a', stream=True))
            await until(lambda: w.hold[0][1]._waiters)
            closing = asyncio.ensure_future(w.g.close(60))
            await until(lambda: w.g.under_way.stopping)
            r = await w.chat('x', 'b')
            assert (r['status'], r['headers']['retry-after']) == (503, '1')
            assert STOPPING in r['json']['error']['message']
            w.hold[0][1].set()      # within the time of grace
            assert b'[DONE]' in (await first)['body']
            await closing
            async with running(w.g) as address, httpx2.AsyncClient(base_url=address) as client:
                assert (await client.post(PATH['chat'], json=BODIES['chat'])).status_code == 200
            assert [len(w.store.load(w.tok, '', n).turns) for n in ('a', 'default')] == [1, 1]
    run(go())
