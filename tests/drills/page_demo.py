"""Gateways with something to look at, for the tests of the live page; and its picture in figures/: python
tests/drills/page_demo.py figures/live.png

The picture shows made-up sessions. It takes Chromium and playwright (`make page`)."""
import asyncio
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from plane_world import OPERATOR, tokenizer

from kat.infer.requests import Completion
from kat.plane.gateway import Gateway, running
from kat.plane.manager import Session
from kat.infer.scripted import ScriptEngine
from kat.plane.store import Store


def chromium():
    "Where a Chromium is, or None."
    return os.environ.get('KAT_CHROMIUM') or next(
        filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


@contextmanager
def served(folder, sessions=(), **more):
    """(address, gateway) of a gateway in a thread of its own, that has these sessions in its store; its engine says
    'done'."""
    tok, loop, said, stop = tokenizer(), asyncio.new_event_loop(), {}, asyncio.Event()
    store = Store(folder/'store.db')
    g = Gateway(ScriptEngine(lambda r: [*tok.encode('done', add_special_tokens=False), tok.eos_token_id]), tok, store,
                100_000, **dict(operators={OPERATOR: ''}) | more)
    up = threading.Event()
    async def run():
        for s in sessions:
            await store.update(s)
            await store.write(s, list(s.turns.values()))
        async with running(g, grace=1) as said['address']:
            up.set()
            await stop.wait()
    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert up.wait(60)
    try:
        yield said['address'], g
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
        store.close()


@contextmanager
def browser(*more):
    "Headless Chromium; `more`: further switches."
    from playwright.sync_api import sync_playwright
    args = ['--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync',
            '--no-first-run']
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=[*args, *more] + ['--no-sandbox'] * (os.geteuid() == 0))
        try:
            yield b
        finally:
            b.close()


# --- made-up sessions

CALLS = ('read_file', 'search', 'run_tests', 'edit_file')


def answer(s, messages, text='', call='', n=0, agent='', finish='stop'):
    """The next turn of a conversation: text and n more random tokens; its answer and, for a call, the result are added
    to `messages`."""
    rng = np.random.default_rng(len(s.turns))
    message = dict(role='assistant', content=text)
    if call:
        message['tool_calls'] = [dict(id=f'c{len(s.turns)}', type='function',
                                      function=dict(name=call, arguments=dict(path=f'src/{len(s.turns)}.py')))]
    ids = np.concatenate([rng.integers(20, 250, n), [s.tokenizer.eos_token_id]]).astype(np.int32)
    z = np.zeros(len(ids), np.float32)
    with s.plan(messages, agent=agent) as p:
        s.add(p.turn(Completion(ids, z, z, finish, 3), message))
    messages.append(message)
    if call:
        messages.append(dict(role='tool', tool_call_id=message['tool_calls'][0]['id'],
                             content=f'{call}: ' + 'x = 1\n' * int(rng.integers(2, 30)),
                             error=bool(rng.random() < .12)))


def agent_session(name, task, turns, seed=0, agents=0, forks=0, **more):
    "An agent that works on a task: calls, sub-agents, rewinds and a compaction."
    s, rng = Session(tokenizer(), name, task=task, **more), np.random.default_rng(seed)
    system = dict(role='system', content='You fix bugs in Python repositories. ' * 8)
    main = [system, dict(role='user', content='The slug of an empty title is wrong. Fix it and run the tests.')]
    for i in range(turns - 1):
        answer(s, main, '' if i % 4 else f'Step {i}: let me look at this.', CALLS[int(rng.integers(4))],
               int(rng.integers(10, 90)))
    answer(s, main, 'All tests pass; the empty title now gives an empty slug.', n=30)
    at = [i for i, m in enumerate(main) if m['role'] == 'assistant']
    for k in range(forks):  # back to an earlier turn and on from there
        back = main[:at[int(rng.integers(1, len(at)))]]
        back[-1] = dict(back[-1], content=back[-1]['content'] + f' (attempt {k})')
        for _ in range(int(rng.integers(1, 5))):
            answer(s, back, 'Another way.', CALLS[int(rng.integers(4))], int(rng.integers(10, 90)))
    for a in range(agents):
        own = [dict(role='system', content='You search code and report. ' * 5),
               dict(role='user', content=f'Where is function {a} used?')]
        for _ in range(int(rng.integers(1, 6))):
            answer(s, own, '', 'search', int(rng.integers(5, 40)), f'agent-{a}')
        answer(s, own, f'It is used in {a} places.', n=12, agent=f'agent-{a}')
    return s


def sessions(n=14, big=False):
    "Sessions of a morning."
    tasks = ('slugify#12', 'sqlparse#8', 'toolz#3')
    out = [agent_session(f'{tasks[i % 3].replace("#", "-")}-{i}', tasks[i % 3], 4 + 5*i % 17, i, i % 3, i % 4,
                         reward=float(i % 2) if i % 5 else None, finished=bool(i % 5))
           for i in range(n)]
    return out + [agent_session('night-run', 'slugify#12', 30, 99, 500 if big else 14, 260 if big else 8)]


def busy(g, owner=''):
    "Some minutes of tokens."
    rng, now = np.random.default_rng(0), int(g.pulse.clock())
    wave = np.clip(np.cumsum(rng.normal(0, 18, 300)) + 240, 0, None).astype(int)
    g.pulse.counts[owner] = deque([[
        now - 300 + i, int(wave[i] + rng.integers(-20, 20)),
        int(rng.integers(0, 4000)) * int(rng.random() < .2)] for i in range(300)], maxlen=301)


def main(out):
    "The picture of the page."
    with (tempfile.TemporaryDirectory() as tmp,
          served(Path(tmp), sessions(), model='made up') as (address, g),
          browser() as b):
        page = b.new_page(viewport=dict(width=1280, height=960))
        busy(g)
        page.goto(address + f'/live#key={OPERATOR}')
        page.goto(address + '/live#night-run')
        page.wait_for_selector('#rows tr')
        page.screenshot(path=out)
    print(out)


if __name__ == '__main__':
    main(sys.argv[1])
