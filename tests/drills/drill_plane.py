"""Kill the data plane at random under load: `python tests/drills/drill_plane.py [ROUNDS] [SEED]` (200 rounds, a few
minutes; `make drill`)

Six agents work through a gateway with a store, in front of an engine behind HTTP (`VLLMEngine`; the server is
scripted and speaks vLLM's protocol); they grade their sessions and put them in groups, which a trainer reads through
a `Loader`, writing a checkpoint after each. In every round SIGKILL hits the gateway, the engine or the trainer at a
random moment, and the same process starts again. Agents know nothing of it: they send a request again until it is
answered. In the end: every turn whose answer was completed is in the store with the same words, none twice; all
trees are valid, and every prompt holds the whole conversation to the letter; every agent got through all of its
turns; the trainer saw every group once, in order.
"""
import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import uvicorn
from plane_world import OPERATOR, tokenizer
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from kat.core.chat import ids_of
from kat.plane.gateway import Gateway, run_server, serve
from kat.plane.loader import Loader
from kat.plane.store import Store
from kat.infer.vllm import EngineError, VLLMEngine

TURNS, AGENTS, PATIENCE = 4, 6, 120
FORK = multiprocessing.get_context('fork')  # children find everything imported


# --- the processes

def engine(port):
    "A scripted vLLM: the answer is a function of the prompt's length, a token every few milliseconds."
    logging.disable()
    tok = tokenizer()

    async def generate(request):
        n = len((await request.json())['token_ids'])
        ids = [*tok.encode(f'answer to {n} tokens', add_special_tokens=False), tok.eos_token_id]

        async def events():
            for i, t in enumerate(ids):
                await asyncio.sleep(.002)
                choice = dict(token_ids=[t], logprobs=dict(content=[dict(token_id=t, logprob=-.5)]))
                if i == len(ids) - 1:
                    choice |= dict(finish_reason='stop', stop_reason=t)
                yield f'data: {json.dumps(dict(choices=[choice]))}\n\n'
            yield 'data: [DONE]\n\n'
        return StreamingResponse(events(), media_type='text/event-stream')

    async def models(request):
        return JSONResponse(dict(data=[dict(id='kat', max_model_len=100_000)]))
    async def info(request):
        return JSONResponse(dict(vllm_config=dict(model_config=dict(logprobs_mode='raw_logprobs'))))
    app = Starlette(routes=[Route('/inference/v1/generate', generate, methods=['POST']), Route('/v1/models', models),
                            Route('/server_info', info)])
    uvicorn.run(app, host='127.0.0.1', port=port, log_config=None)


def gateway(port, engine_port, path):
    "Ours, as `kat serve` runs it; that its engine dies is no news here."
    logging.disable()
    async def run():
        while True:
            try:
                e = await VLLMEngine.connect(f'http://127.0.0.1:{engine_port}')
                break
            except EngineError:
                await asyncio.sleep(.02)
        g = Gateway(e, tokenizer(), Store(path), 100_000, operators={OPERATOR: ''})
        await serve(g, '127.0.0.1', port, lambda address: None)
    run_server(run())


def trainer(path, checkpoint, end):
    "Reads groups until the file `end` is there; what it has seen is its checkpoint, replaced at once."
    seen = json.loads(checkpoint.read_text()) if checkpoint.exists() else []

    def wait():
        time.sleep(.01)
        return not end.exists()  # no Event: whoever is killed while looking at one keeps its lock
    loader = Loader(Store(path), lambda: 0, start=len(seen), wait=wait)
    for group in loader:
        seen.append(dict(key=group.info['key'], turns=sorted(t.n_turns for t in group.trajectories)))
        new = checkpoint.with_suffix('.new')
        new.write_text(json.dumps(seen))
        new.rename(checkpoint)


def agents(port, diary, over, done):
    "All agents, and what they saw: a line for each answer, session and group."
    async def run():
        file = open(diary, 'a', buffering=1)
        note = lambda **x: file.write(json.dumps(x) + '\n')
        async with httpx2.AsyncClient(base_url=f'http://127.0.0.1:{port}', timeout=PATIENCE) as client:
            await asyncio.gather(*[agent(i, client, note, over, done) for i in range(AGENTS)])
    asyncio.run(run())


async def agent(i, client, note, over, done):
    "Session after session; each pair of them is a group."
    n = 0
    while not over.is_set():
        pair = [f'agent{i}-{n + k}' for k in (0, 1)]
        for name in pair:
            messages, ids = [dict(role='system', content='you are an agent')], []
            for turn in range(TURNS):
                messages.append(dict(role='user', content=f'request {turn} of {name}'))
                uid, text = await insist(lambda: complete(client, name, messages, turn % 2 == 1))
                note(kind='answer', session=name, id=uid, text=text)
                messages.append(dict(role='assistant', content=text))
                ids.append(uid)
                with done.get_lock():
                    done.value += 1
            await insist(lambda: said(client, f'/s/{name}/reward', reward=1))
            note(kind='session', session=name, path=ids)
        await insist(lambda: said(client, '/groups', key=pair[0], sessions=pair))
        note(kind='group', key=pair[0])
        n += 2


async def insist(what):
    "Until it is answered."
    while (out := await what()) is None:
        await asyncio.sleep(.02)
    return out


def body_of(session, messages, stream):
    headers = {'x-kat-session': session, 'x-kat-task': session.partition('-')[0]}
    return dict(model='kat', messages=messages, stream=stream), headers


async def complete(client, session, messages, stream):
    "The id and the text of an answer; None where it was not completed."
    body, headers = body_of(session, messages, stream)
    try:
        r = await client.post('/v1/chat/completions', json=body, headers=headers)
    except httpx2.TransportError:
        return None
    if r.status_code == 503: return None  # the engine is away; whatever else is not 200 is a fault
    assert r.status_code == 200, (r.status_code, r.text)
    if not stream: return r.json()['id'].removeprefix('chatcmpl-'), r.json()['choices'][0]['message']['content']
    lines = [x[6:] for x in r.text.split('\n') if x.startswith('data: ')]
    if lines[-1:] != ['[DONE]']: return None  # an error event
    events = [json.loads(x) for x in lines[:-1]]
    text = ''.join(c['delta'].get('content') or '' for e in events for c in e['choices'])
    return events[0]['id'].removeprefix('chatcmpl-'), text


async def said(client, path, **body):
    "True; None where it was not answered."
    try:
        r = await client.post(path, json=body, headers={'x-api-key': OPERATOR})
    except httpx2.TransportError:
        return None
    assert r.status_code == 200, (r.status_code, r.text)
    return True


# --- the drill

def free_ports(n):
    socks = [socket.create_server(('127.0.0.1', 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in socks]
    for s in socks:
        s.close()
    return ports


def drill(rounds, folder, seed=0, tell=lambda *a: None):
    "Kill `rounds` times; what was seen. AssertionError where anything is wrong."
    rng, path = random.Random(seed), folder / 'store.db'
    diary, checkpoint = folder / 'diary.jsonl', folder / 'checkpoint.json'
    over, done, end = FORK.Event(), FORK.Value('l', 0), folder / 'end'
    e, g = free_ports(2)
    work = dict(engine=(engine, (e,)), gateway=(gateway, (g, e, path)), trainer=(trainer, (path, checkpoint, end)),
                agents=(agents, (g, diary, over, done)))

    def start(name):
        f, args = work[name]
        p = FORK.Process(target=f, args=args, daemon=True)
        p.start()
        return p

    def until(what, of):
        end = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < end, f'{of}: not within {PATIENCE} s'
            assert running['agents'].is_alive() or over.is_set(), 'the agents broke'
            time.sleep(.005)

    Store(path).close()
    running, killed = {name: start(name) for name in work}, dict.fromkeys(('engine', 'gateway', 'trainer'), 0)
    try:
        for i in range(rounds):
            n = done.value
            until(lambda: done.value > n, f'round {i}: an answer')   # the load is on again
            time.sleep(rng.random() * .1)
            name = rng.choice(list(killed))
            os.kill(running[name].pid, signal.SIGKILL)
            running[name].join()
            code = running[name].exitcode
            assert code == -signal.SIGKILL, f'round {i}: the {name} had ended by itself ({code})'
            killed[name] += 1
            running[name] = start(name)
            if (i + 1) % 20 == 0:
                tell(f'{i + 1} rounds, {done.value} answers')
        over.set()
        until(lambda: not running['agents'].is_alive(), 'agents at their end')
        assert running['agents'].exitcode == 0, 'the agents broke'
        end.touch()
        until(lambda: not running['trainer'].is_alive(), 'trainer at its end')
        assert running['trainer'].exitcode == 0, 'the trainer broke'
    finally:
        for p in running.values():
            p.kill()
            p.join()
    return killed | check(path, diary, checkpoint)


def check(path, diary, checkpoint):
    "What the agents and the trainer saw against what is in the store."
    lines = [json.loads(x) for x in diary.read_text().splitlines()]
    told = lambda kind: [x for x in lines if x['kind'] == kind]
    answers, paths, groups = told('answer'), told('session'), [x['key'] for x in told('group')]
    tok, store = tokenizer(), Store(path)
    with store.engine.begin() as c:
        assert c.exec_driver_sql('PRAGMA integrity_check').scalar() == 'ok'
        stored = [r[0] for r in c.exec_driver_sql('SELECT id FROM turns')]
    assert len(set(stored)) == len(stored) and len({x['id'] for x in answers}) == len(answers)
    sessions = {r['name']: store.load(tok, '', r['name']) for r in store.sessions()}
    for x in answers:
        assert sessions[x['session']].turns[x['id']].message['content'] == x['text'], x
    for x in paths:
        check_session(tok, sessions[x['session']], x['path'])
    seen = json.loads(checkpoint.read_text())
    assert [x['key'] for x in seen] == [g.info['key'] for _, g in store.finished_groups(0, 10**6)]
    assert set(groups) <= {x['key'] for x in seen}
    assert all(x['turns'].count(TURNS) >= 2 for x in seen)
    store.close()
    return dict(answers=len(answers), turns=len(stored), sessions=len(paths), groups=len(seen))


def check_session(tok, s, path):
    """The agent's turns are one path; each prompt says all that was said before; the rest of the tree is tries that did
    not reach the agent."""
    turns = [s.turns[i] for i in path]
    assert len(path) == TURNS and [t.parent for t in turns] == [None, *turns[:-1]] and s.finished and s.reward == 1
    said = ''.join(f'<|im_start|>{m["role"]}\n{m["content"]}<|im_end|>\n'
                   for t in turns for m in (*t.context, t.message)).rstrip('\n')
    assert tok.decode(turns[-1].ids) == said, (tok.decode(turns[-1].ids), said)
    assert [m['content'] for t in turns
            for m in t.context if m['role'] == 'user'] == [f'request {k} of {s.name}' for k in range(TURNS)]
    assert s.tree().n_sequences == len(s.leaves) == len(s.trajectories())
    for t in s.turns.values():
        assert t.finish in ('stop', 'abort')
        assert (t.parent is None or s.turns[t.parent.id] is t.parent) and len(ids_of(t.prompt))


if __name__ == '__main__':
    args = [int(x) for x in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as tmp:
        began = time.monotonic()
        out = drill(args[0] if args else 200, Path(tmp), args[1] if args[1:] else 0, lambda *a: print(*a, flush=True))
        print(', '.join(f'{k} {v}' for k, v in out.items()),
              f'in {time.monotonic() - began:.0f} s: all there, none twice')
