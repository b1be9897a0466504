"The live page's numbers, its endpoints, and who may see what; the page itself runs in tests/plane/test_live_page.py"
import asyncio
import re
from importlib.resources import files

import pytest
from hypothesis import given, settings, strategies as st
from plane_world import World, say, until

from kat.core.types import Segment
from kat.plane.live import Pulse, live_page, text_of, tree_blocks
from kat.plane.manager import Session
from kat.plane.turns import Turn
from kat.tree.trie import TokenTree

pytest.importorskip('starlette')
KEYS = dict(operators={'ann-secret': 'ann', 'bob-secret': 'bob'}, keys={})
ANN, BOB = ({'authorization': f'Bearer {k}-secret'} for k in ('ann', 'bob'))


def run(coro):
    return asyncio.run(asyncio.wait_for(coro, 60))

def world(tmp_path, **more):
    w = World(tmp_path/'store.db', **more)
    w.engine.answer = lambda r: say(w.tok, 'an answer')
    return w


# --- numbers

@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 5), st.integers(0, 5)), max_size=40), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_rates_are_what_came_in_each_second(events, seconds):
    now = [1000.]
    pulse, slow = Pulse(seconds, lambda: now[0]), []
    for wait, written, read in events:
        now[0] += wait
        pulse.add('ann', written, read)
        slow.append((int(now[0]), written, read))
    end = int(now[0])
    want = [[sum(e[i] for e in slow if e[0] == s) for s in range(end - seconds, end)] for i in (1, 2)]
    assert list(pulse.rates('ann')) == want and pulse.rates('bob') == ([0]*seconds, [0]*seconds)
    assert len(pulse.counts['ann'] if events else ()) <= seconds + 1


@st.composite
def recorded(draw):
    "Turns over few token ids, so that paths share much; some followers equal, or the beginning of another."
    turns = []
    for i in range(draw(st.integers(1, 14))):
        parent = draw(st.sampled_from([None, *turns]))
        few = st.lists(st.integers(0, 1), min_size=1, max_size=5)
        prompt, answer = draw(few), draw(st.one_of(st.just([]), few))
        event = draw(st.sampled_from([None, 'error', 'memory']))
        turns.append(Turn(str(i), parent, [], [Segment(prompt, 'tool_result', event=event)],
                          [Segment(answer, 'assistant')] if answer else [], dict(content=''), 'stop'))
    return turns

@given(recorded())
@settings(max_examples=150, deadline=None)
def test_blocks_are_the_token_tree(turns):
    blocks, end = tree_blocks(turns)
    followed = {t.parent.id for t in turns if t.parent}
    paths = [t.ids for t in turns if t.id not in followed]
    tree = TokenTree.from_sequences(paths)
    assert sum(b[2]*b[3] for b in blocks) == tree.n_flat and sum(b[3] for b in blocks if b[0] < 0) == len(paths)
    own = lambda t: t.ids[len(t.ids) - t.n_prompt - t.n_answer:].tolist()
    begins = lambda t: any(u is not t and u.parent is t.parent and own(u)[:len(own(t))] == own(t) for u in turns)
    kept = sum(b[2] for b in blocks)
    assert kept >= len(tree) and (kept == len(tree) or any(begins(t) for t in turns if t.id in followed))
    for i, (parent, top, length, count, runs) in enumerate(blocks):
        assert parent < i and length == sum(runs[1::2]) > 0 and count > 0
        assert top == (sum(blocks[parent][1:3]) if parent >= 0 else 0)
        assert all(a != b for a, b in zip(runs[::2], runs[2::2]))
    for t in turns:
        assert sum(blocks[end[t.id]][1:3]) == len(t.ids)


def test_labels_and_text():
    t = Turn('a', None, [],
             [Segment([1, 2], 'user'), Segment([3], 'tool_result'), Segment([4], 'tool_result', event='error')],
             [Segment([5, 6], 'assistant'), Segment([7], 'tool_call')], dict(content=''), 'stop')
    assert tree_blocks([t]) == ([[-1, 0, 7, 1, [0, 2, 2, 1, 4, 1, 1, 3]]], {'a': 0}) and tree_blocks([]) == ([], {})
    assert text_of(dict(content=' a\n b ')) == 'a b'
    assert text_of(dict(content='', tool_calls=[dict(function=dict(name='ls'))])) == 'ls'
    assert len(text_of(dict(content='x'*999))) == 200


# --- endpoints

def test_a_key_sees_its_own_and_no_other(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            await w.chat('of ann', 'only-ann', ANN)
            await w.chat('of bob', 'same', BOB)
            await w.chat('more', 'same', ANN)
            for path in ('/live/state', '/s/same/blocks'):
                for headers in ({}, {'x-api-key': 'wrong'}):
                    r = await w.ask(path, headers=headers)
                    assert r['status'] == 401 and b'ann' not in r['body']
            ann, bob = [(await w.ask('/live/state', headers=h))['json'] for h in (ANN, BOB)]
            assert [s['name'] for s in ann['sessions']] == ['same', 'only-ann']
            assert [s['name'] for s in bob['sessions']] == ['same']
            assert ann['active'] == bob['active'] == 0 and not ann['more']
            assert (ann['weights'], ann['engine']) == (0, 'ScriptEngine')
            assert {'uid', 'owner', 'info'}.isdisjoint(ann['sessions'][0])
            # what ann got isn't bob's
            assert sum(c[1] for c in w.g.pulse.counts['bob']) == len(say(w.tok, 'an answer'))
            assert (await w.ask('/s/only-ann/blocks', headers=BOB))['status'] == 404
            view = (await w.ask('/s/same/blocks', headers=BOB))['json']
            assert [t['text'] for t in view['turns']] == ['an answer'] and view['turns'][0]['drift'] == 'clean'
            assert view['flat'] == sum(s['tokens'] for s in bob['sessions'])
    run(go())


def test_what_is_being_answered_shows(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            w.hold[0] = 1, asyncio.Event()
            task = asyncio.ensure_future(w.chat('x', 's'))
            await until(lambda: w.g.pulse.counts.get('') and w.g.pulse.counts[''][-1][1])
            await w.chat('y', 'other')
            state = (await w.ask('/live/state'))['json']
            # s is not in the store yet
            assert state['active'] == 1 and [(s['name'], s['busy']) for s in state['sessions']] == [('other', 0)]
            w.hold[0][1].set()
            await task
            w.g.pulse.clock = lambda: 10**9   # a long time later
            state = (await w.ask('/live/state'))['json']
            assert state['active'] == 0 and len(state['written']) == 300
            assert not any(state['written']) and len(state['sessions']) == 2
    run(go())


def test_a_tree_is_sent_again_only_when_it_changed(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            await w.chat('x', 's')
            r = await w.ask('/s/s/blocks')
            same = dict(headers={'if-none-match': r['headers']['etag']})
            again = await w.ask('/s/s/blocks', **same)
            assert r['status'] == 200 and (again['status'], again['body']) == (304, b'')
            await w.ask('/s/s/reward', dict(reward=.5, finished=False))
            assert (await w.ask('/s/s/blocks', **same))['status'] == 200
            t, tags = next(iter(w.session().turns)), []
            for x in (-1, -2, 0, None):   # hash(-1) is hash(-2)
                await w.ask('/s/s/reward', dict(reward=x, turn=t, finished=False))
                tags.append((await w.ask('/s/s/blocks'))['headers']['etag'])
            assert len(set(tags)) == 4
            await w.chat('y', 's')
            r = await w.ask('/s/s/blocks', **same)
            assert r['status'] == 200 and len(r['json']['turns']) == 2
    run(go())


def test_only_the_latest_sessions_are_listed(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            for i in range(205):
                await w.store.update(Session(w.tok, f's{i}'))
            await w.chat('x', 's7')
            state = (await w.ask('/live/state'))['json']
            assert state['more'] and len(state['sessions']) == 200 and state['sessions'][0]['name'] == 's7'
    run(go())


# --- the page

def test_the_page_is_closed(tmp_path):
    """No key is needed to get it; nothing but its own script may run in it; it is in the package; it makes no HTML of
    strings."""
    async def go():
        async with world(tmp_path, **KEYS) as w:
            return await w.ask('/live')
    r = run(go())
    assert r['status'] == 200 and r['headers']['content-type'] == 'text/html; charset=utf-8'
    policy = dict(x.split(' ', 1) for x in r['headers']['content-security-policy'].split('; '))
    assert policy['default-src'] == "'none'" and policy['connect-src'] == "'self'"
    assert re.fullmatch("'sha256-[^' ]+='", policy['script-src'])
    page = r['body'].decode()
    assert r['body'] == live_page()[0] == files('kat.plane').joinpath('live.html').read_bytes()
    assert len(re.findall('<script', page)) == len(re.findall('<style', page)) == 1 and 'http' not in page
    assert not re.search(
        r'innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|localStorage|style="|\son\w+="', page)
