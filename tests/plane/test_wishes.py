"""What agents demand of an answer, and what they leave out of a history: calls by force, reminders that vanish,
sub-agents with a session of their own"""
import asyncio
import random

import numpy as np
import pytest
from plane_world import BODY, PATH, World, heard, say, tokenizer, until

from kat.core.calls import parse_reply
from kat.core.formats import FORMATS, open_call, write_call
from kat.core.chat import ids_of
from kat.wire.dialects import parse_call, without_reminders
from kat.plane.scenarios import SCENARIO_TOOLS

USER = [dict(role='user', content='hello')]
ARGS = dict(path='a b.py', line=3)
CHOICE = dict(chat={'': 'required', 'view': dict(type='function', function=dict(name='view'))},
              messages={'': dict(type='any'), 'view': dict(type='tool', name='view')})
THINKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"


def run(coro):
    return asyncio.run(asyncio.wait_for(coro, 60))


@pytest.mark.parametrize('format', FORMATS)
def test_an_opened_call_is_the_beginning_of_a_written_one(format):
    for name in ('', 'view'):
        for args in (ARGS, dict(path='', line=0)):
            whole, head = write_call('view', args, format), open_call(format, name)
            assert whole.startswith(head)
            read = parse_reply(whole, SCENARIO_TOOLS[0], format).calls[0]['function']
            assert read == dict(name='view', arguments=args)
            tok = tokenizer()
            encode = lambda x: tok.encode(x, add_special_tokens=False)
            assert encode(head) + encode(whole[len(head):]) == encode(whole)   # the cut lies between tokens


@pytest.mark.parametrize('kind', ['kat', 'hermes', 'thinking'])
@pytest.mark.parametrize('dialect', ['chat', 'messages'])
@pytest.mark.parametrize('stream', [False, True])
@pytest.mark.parametrize('name', ['', 'view'])
def test_a_demanded_call_begins_as_one_and_only_what_was_sampled_trains(tmp_path, kind, dialect, stream, name):
    """The opening tokens are in the prompt of the engine and in the record of the answer, where the loss doesn't see
    them."""
    format = 'kat' if kind == 'kat' else 'hermes'
    async def go():
        async with World(tmp_path/'s.db', format) as w:
            if kind == 'thinking':
                w.g.tokenizer.chat_template = tokenizer('hermes').chat_template.replace(THINKS, THINKS + '<think>\n')
            head = ('\n</think>\n\n' if kind == 'thinking' else '') + open_call(format, name)
            rest = write_call('view', ARGS, format)[len(open_call(format, name)):]
            second = write_call('view', dict(path='b', line=4), format)
            w.engine.answer = lambda r: say(w.tok, rest + second)
            body = BODY[dialect](USER, SCENARIO_TOOLS[0], tool_choice=CHOICE[dialect][name], stream=stream)
            r = await w.ask('/s/s' + PATH[dialect], body)
            assert r['status'] == 200, r
            m = heard(dialect, r)
            assert [c['function']['arguments'] for c in m['tool_calls']] == [ARGS, dict(path='b', line=4)]
            assert not m['content']
            t, = w.session().turns.values()
            given = w.tok.encode(head, add_special_tokens=False)
            assert w.engine.asked[0].ids.tolist() == [*ids_of(t.prompt), *given]
            assert ids_of(t.answer).tolist() == [*given, *say(w.tok, rest + second)]
            own = [s for s in t.answer if s.trainable]
            assert ids_of(own).tolist() == say(w.tok, rest + second) and t.answer[-len(own):] == own
            assert all((s.logprobs == -.5).all() for s in own)
            assert all(s.logprobs is None for s in t.answer if not s.trainable)
            assert {s.kind for s in own} == {'tool_call'}
            assert any(x.startswith('choice: ') for x in t.info['normalised']) and 'malformed' not in t.info

            back = [*USER, m, *(dict(role='tool', tool_call_id=c['id'], content='x') for c in m['tool_calls'])]
            w.engine.answer = lambda r: say(w.tok, 'done')
            assert (await w.ask('/s/s' + PATH[dialect], BODY[dialect](back, SCENARIO_TOOLS[0])))['status'] == 200
            assert [x.drift for x in w.session().turns.values()] == ['clean', 'clean']
            assert np.array_equal(w.engine.asked[1].ids[:len(t.ids)], t.ids)
            got, = w.store.load(w.tok, '', 's').trajectories()
            assert int(got.mask.sum()) == len(say(w.tok, rest + second)) + len(say(w.tok, 'done'))
            assert np.isfinite(got.logprobs[got.mask]).all()
    try:
        run(go())
    finally:
        tokenizer.cache_clear()


def test_a_demand_that_is_not_met_is_marked(tmp_path):
    async def go():
        async with World(tmp_path/'s.db') as w:
            w.engine.answer = lambda r: say(w.tok, ' nothing of the kind')
            ask = lambda name, **more: w.ask(f'/s/{name}' + PATH['chat'],
                                             BODY['chat'](USER, SCENARIO_TOOLS[0], tool_choice='required', **more))
            r = await ask('a')
            assert heard('chat', r)['content'] == '<tool_call> nothing of the kind'
            assert r['json']['choices'][0]['finish_reason'] == 'stop'
            assert next(iter(w.session('a').turns.values())).info['malformed'] == ['not closed']
            w.g.format = None   # a model that knows no calls is asked as always
            assert heard('chat', await ask('b'))['content'] == ' nothing of the kind'
            t, = w.session('b').turns.values()
            assert t.info['malformed'] == ['none, though one was demanded'] and t.answer[0].trainable
            assert 'kat_malformed_calls_total 2' in (await w.ask('/metrics'))['body'].decode()
            r = await w.ask(
                PATH['chat'],
                BODY['chat'](USER, SCENARIO_TOOLS[0], tool_choice=dict(type='function', function=dict(name='edit'))))
            assert r['status'] == 400 and r['json']['error']['message'] == "tool_choice: 'edit'; tools: view"
    run(go())


@pytest.mark.parametrize('n', [0, 3])
def test_a_demanded_call_that_is_broken_off(tmp_path, n):
    """Nothing sampled: no answer. Something sampled by an engine that knows no entropies: the opening before it, none
    of it trained, and so out of the store."""
    async def go():
        async with World(tmp_path/'s.db') as w:
            call, gone = w.engine.generate, asyncio.Event()
            unknowing = lambda hear: lambda token, lp, entropy, version: hear(token, lp, float('nan'), version)
            w.engine.generate = lambda r, hear: call(r, unknowing(hear))
            w.engine.answer = lambda r: say(w.tok, ' a b c d e f')
            w.hold[0] = n, asyncio.Event()
            task = asyncio.ensure_future(w.ask(
                '/s/s' + PATH['chat'], BODY['chat'](USER, SCENARIO_TOOLS[0], tool_choice='required', stream=True),
                leave=gone))
            await until(lambda: w.engine.asked and w.hold[0][1]._waiters)
            gone.set()
            await task
            t, = w.session().turns.values()
            opening, own = (w.tok.encode(x, add_special_tokens=False) for x in ('<tool_call>', ' a b c d e f'))
            assert t.finish == 'abort' and ids_of(t.answer).tolist() == ([*opening, *own[:n]] if n else [])
            assert not any(s.trainable for s in t.answer) and all(s.entropy is None for s in t.answer)
            assert w.store.load(w.tok, '', 's').trajectories() == w.session().trajectories()
            assert w.g.pulse.counts[''][-1][1] <= n
            w.hold.clear()
            await w.ask('/s/s' + PATH['chat'], BODY['chat'](USER, SCENARIO_TOOLS[0], tool_choice='required'))
            assert [x.reason for x in w.session().turns.values()] == ['start', 'retry']
    run(go())


# --- one call at most

ONE = dict(chat=dict(parallel_tool_calls=False),
           messages=dict(tool_choice=dict(type='auto', disable_parallel_tool_use=True)))


@pytest.mark.parametrize('format', ['kat', 'hermes', 'qwen3_coder'])
@pytest.mark.parametrize('dialect', ['chat', 'messages'])
@pytest.mark.parametrize('stream', [False, True])
def test_where_one_call_is_wanted_the_answer_ends_with_its_first(tmp_path, format, dialect, stream):
    async def go():
        async with World(tmp_path/'s.db', 'kat' if format == 'kat' else 'hermes') as w:
            w.g.format = format
            first, second = (write_call('view', dict(path=p, line=1), format) for p in 'ab')
            w.engine.answer = lambda r: say(w.tok, f'Look.\n{first}{second}')
            r = await w.ask('/s/s' + PATH[dialect],
                            BODY[dialect](USER, SCENARIO_TOOLS[0], stream=stream, **ONE[dialect]))
            m = heard(dialect, r)
            assert m['content'] == 'Look.' and [c['function']['arguments']['path'] for c in m['tool_calls']] == ['a']
            t, = w.session().turns.values()
            assert w.tok.decode(ids_of(t.answer)) == f'Look.\n{first}' and all(s.trainable for s in t.answer)
            assert t.finish == 'stop' and any(x.startswith('parallel: ') for x in t.info['normalised'])

            back = [*USER, m, dict(role='tool', tool_call_id=m['tool_calls'][0]['id'], content='x')]
            for more, calls in ((ONE[dialect], 1), ({}, 2)):
                r = await w.ask('/s/s' + PATH[dialect], BODY[dialect](back, SCENARIO_TOOLS[0], **more))
                assert len(heard(dialect, r)['tool_calls']) == calls
                assert np.array_equal(w.engine.asked[-1].ids[:len(t.ids)], t.ids)
            assert [x.reason for x in w.session().turns.values()] == ['start', 'append', 'retry']
    try:
        run(go())
    finally:
        tokenizer.cache_clear()


def test_one_call_of_a_model_that_ends_its_answer_with_its_calls_is_refused(tmp_path):
    async def go():
        async with World(tmp_path/'s.db', 'hermes') as w:
            w.g.format = 'llama3'
            w.engine.answer = lambda r: say(w.tok, 'hi')
            r = await w.ask(PATH['chat'], BODY['chat'](USER, SCENARIO_TOOLS[0], **ONE['chat']))
            assert (r['status'], r['json']['error']['param']) == (400, 'parallel_tool_calls') and not w.engine.asked
            # without tools there is nothing to limit
            assert (await w.ask(PATH['chat'], BODY['chat'](USER, **ONE['chat'])))['status'] == 200
    try:
        run(go())
    finally:
        tokenizer.cache_clear()


# --- reminders

def reminded(text, *notes):
    return dict(role='user', content=''.join(f'<system-reminder>\n{n}\n</system-reminder>\n' for n in notes) + text)
ANSWER = dict(role='assistant', content='an answer')


@pytest.mark.parametrize('dialect', ['chat', 'messages'])
@pytest.mark.parametrize('sent, reason', [
    (reminded('hello'), 'append'),
    (reminded('hello', 'one'), 'append'),
    (reminded('hello', 'two'), 'append'),
    (reminded('hello', 'two', 'one'), 'edited_answer'),
    (reminded('hello', 'other'), 'edited'),
    (reminded('hello', 'one', 'two', 'three'), 'edited'),
    (reminded('hello!'), 'edited')])
def test_only_what_the_model_was_shown_may_vanish(tmp_path, dialect, sent, reason):
    """Some of a message's reminders are gone: the record stands and the turn is realigned. Anything else new in it: a
    fork."""
    async def go():
        for again in (False, True):    # the second time after a restart
            async with World(tmp_path/f'{again}.db') as w:
                w.engine.answer = lambda r: say(w.tok, 'an answer')
                path = '/s/s' + PATH[dialect]
                await w.ask(path, BODY[dialect]([reminded('hello', 'one', 'two', 'today is 2026-11-23')]))
                first, = w.session().turns.values()
                if again:
                    w.g.manager.sessions.clear()
                r = await w.ask(path, BODY[dialect]([sent, ANSWER, *USER]))
                assert r['status'] == 200
                t = list(w.session().turns.values())[-1]
                shown = reason == 'append' or reason == 'edited_answer'
                assert (t.drift, t.notes) == (('realigned', ['reminder dropped']) if shown else ('forked', []))
                assert np.array_equal(w.engine.asked[1].ids[:len(first.ids)], first.ids) is shown
                assert ('why="reminder dropped"' in (await w.ask('/metrics'))['body'].decode()) is shown
    run(go())


def test_the_newest_reminder_is_always_shown(tmp_path):
    """An agent that keeps one reminder, beside the newest message: all its turns are on one path, and the prompt has
    each where it was."""
    async def go():
        async with World(tmp_path/'s.db') as w:
            w.engine.answer = lambda r: say(w.tok, 'an answer')
            m = []
            for i in range(4):
                await w.ask('/s/s' + PATH['chat'], BODY['chat']([*m, reminded(f'question {i}', f'{9 - i} left')]))
                m += [dict(role='user', content=f'question {i}'), ANSWER]
            text = w.tok.decode(w.engine.asked[-1].ids)
            assert [text.count(f'{9 - i} left') for i in range(4)] == [1] * 4
            assert [t.drift for t in w.session().turns.values()] == ['clean'] + ['realigned'] * 3
            assert len(w.session().leaves) == 1
    run(go())


def test_reminders_are_taken_out_in_linear_time_and_only_where_they_are_closed():
    rng, parts = random.Random(0), ['<system-reminder>', '</system-reminder>', 'a', ' ', '\n']
    for _ in range(300):
        text = ''.join(rng.choice(parts) for _ in range(8))
        (m, *_), left = without_reminders([dict(role='user', content=text), ANSWER])
        assert left or m == dict(role='user', content=text.strip()), text
    for s in ('<system-reminder>', '</system-reminder>', '\n', '<system-reminder></system-reminder>'):
        without_reminders([dict(role='user', content=s * 200_000)])
    result = dict(role='tool', tool_call_id='a', content='<system-reminder>y</system-reminder>')
    assert without_reminders([reminded('', 'x'), result]) == ([dict(result, content='')], dict(x=1, y=1))


def test_an_answer_that_the_agent_throws_away(tmp_path):
    "It goes on as if it had never asked: a branch of its own, called what it is, at the start and later."
    async def go():
        async with World(tmp_path/'s.db') as w:
            w.engine.answer = lambda r: say(w.tok, 'an answer')
            wrong = dict(role='user', content='no call in your answer')
            first, later = [*USER], [*USER, ANSWER, *USER]
            for m in (first, [*first, wrong], [*first, wrong, wrong], later, [*later, wrong],
                      [*first, dict(role='user', content='else')]):
                assert (await w.ask('/s/s' + PATH['chat'], BODY['chat'](m)))['status'] == 200
            assert [t.reason for t in w.session().turns.values()] == ['start', 'discarded', 'discarded', 'append',
                                                                      'discarded', 'discarded']
            assert [t.info['status'] for t in w.session().trajectories()] == ['superseded'] * 4 + ['final']
            await w.ask('/s/s' + PATH['chat'], BODY['chat']([*first, wrong]))   # the same again, later
            t, *_, last = w.session().trajectories()
            assert last.info['turns'][0]['reason'] == 'retry' and last.info['status'] == 'final'
            assert t.info['status'] == 'superseded'
            await w.ask('/s/s' + PATH['chat'], BODY['chat']([dict(role='user', content='else')]))
            assert list(w.session().turns.values())[-1].reason == 'conversation'
    run(go())


# --- sessions

def test_a_sub_agents_session_is_a_branch_of_its_parents():
    meta = lambda **h: {k: v for k, v in parse_call('chat', BODY['chat'](USER), h).metadata.items()}
    assert meta(**{'x-session-id': 'sub', 'x-parent-session-id': 'top'}) == dict(session_id='top', agent_id='sub')
    assert meta(**{'x-session-id': 'sub', 'x-parent-session-id': 'top', 'x-kat-session': 'mine'}) == dict(
        session_id='mine', agent_id='sub')
    assert meta(**{'x-session-id': 'top'}) == dict(session_id='top')
