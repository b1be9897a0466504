"""Session trees: the walk against a search through everything, recorded ids never encoded again, rewards where they
belong"""
import gc
import os
import re
import weakref
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from plane_world import say, tokenizer, z

from kat.core.chat import encode_prompt, ids_of
from kat.core.template import train_tokenizer
from kat.wire.dialects import canonical_key, explain
from kat.infer.requests import Completion
from kat.plane.manager import COMPLETED, Manager, Session, _key, plan_text, show
from kat.plane.scenarios import SCENARIOS, SCENARIO_TOOLS, play_scenario
from kat.plane.schema import row_turn, turn_row
from kat.plane.turns import Turn, answer_ids, changes, new_id, split, tool_mark
from kat.wire.normalise import canonical_json


def user(text):
    return dict(role='user', content=text)
def said(text, **more):
    return dict(role='assistant', content=text) | more


def reply(plan, text, finish='stop', ids=None, **more):
    "Record an answer; its message."
    tok = plan.session.tokenizer
    ids = np.array(say(tok, text) if ids is None else ids, np.int32)
    done = Completion(ids, z(len(ids), -1), z(len(ids), 1), finish, 3)
    with plan:
        return plan.session.add(plan.turn(done, said(text) | more)).message


# --- keys

def calls(*ids, **arguments):
    return [dict(id=i, type='function', function=dict(name='f', arguments=arguments)) for i in ids]


def test_a_key_that_is_looked_up_is_the_key():
    """What comes back as it was recorded is found; what Python calls equal and JSON does not (1, 1.0, true; the order
    of arguments) is no hit."""
    s, args = Session(tokenizer(), 's'), dict(a=1, b=dict(c=[0, 2], d=None))
    old = reply(s.plan([user('q')]), 'x', tool_calls=calls('c', **args))
    variants = [dict(args), dict(reversed(args.items())), args | dict(a=True), args | dict(a=1.0),
                args | dict(b=dict(d=None, c=[0, 2])), args | dict(b=dict(c=[False, 2], d=None)), {}]
    back = [said('x', tool_calls=calls('c', **a)) for a in variants]
    back += [said('x', tool_calls=calls('new', **args)), said('x', tool_calls=calls('c', 'd', **args)),
             said('x'), said('x '), old | dict(reasoning='why'), user('x'), user('q'), user('q') | dict(name='ann')]
    for m in back:
        assert _key(s, m) == canonical_key(m)
        assert changes([m], [old]) == set(explain(old, m)) - {'ids renamed'}
    assert _key(s, old) == canonical_key(old) and any(known is old for known, _ in s.known.values())
    new = Session(tokenizer(), 's')
    for t in s.turns.values():
        new.restore(t)
    assert {k for _, k in new.known.values()} == {k for _, k in s.known.values()}


# --- the walk

def search(s, messages):
    "The slow twin: of all recorded turns, the deepest whose whole path begins the request; of equal ones the newest."
    past = [m for run in split(messages)[0] for m in (*run[0], run[1])]
    best = None
    for t in s.turns.values():
        path = [m for x in t.path for m in (*x.context, x.message)]
        if t.answer and list(map(canonical_key, path)) == list(map(canonical_key, past[:len(path)])):
            if best is None or t.number >= best.number:
                best = t
    return best


@st.composite
def moves(draw):
    "What an agent does next: how much of which branch it goes back to, what it changes, what it says."
    return [(draw(st.integers(0, 9)), draw(st.integers(0, 5)),
             draw(st.sampled_from(['keep', 'edit', 'blank', 'elide'])), draw(st.sampled_from('ab')),
             draw(st.sampled_from(['x', 'y', 'long answer\nof two lines'])),
             draw(st.sampled_from(['stop', 'stop', 'length', 'abort'])),
             draw(st.sampled_from(['', '', 'sub']))) for _ in range(draw(st.integers(1, 8)))]


@settings(max_examples=60, deadline=None)
@given(moves())
def test_the_walk_finds_what_a_search_finds(todo):
    s, histories = Session(tokenizer(), 's'), [[dict(role='system', content='be brief')]]
    for which, back, how, question, answer, finish, agent in todo:
        messages = histories[which % len(histories)]
        messages = messages[:max(1, len(messages) - 2*back)]
        if how != 'keep' and len(messages) > 2:
            k = 1 + which % (len(messages) - 1)
            m = messages[k]
            change = dict(edit='other ', blank='',
                          elide='')[how] + ('…' if how == 'elide' else m['content']) + (' ' if how == 'blank' else '')
            messages = [*messages[:k], m | dict(content=change), *messages[k + 1:]]
        messages = [*messages, user(question)]
        want = search(s, messages)
        p = s.plan(messages, None, agent)
        assert want is None or want.id in {t.id for t in (p.parent.path if p.parent else [])}
        found = [t for t in p.parent.path if t.id in s.turns] if p.parent else []
        assert (found[-1] if found else None) is want
        assert len(p.made) == len(split(messages)[0]) - len(found)
        if found:
            assert np.array_equal(p.ids[:len(found[-1].ids)], found[-1].ids)
        known = {t.id: t for t in s.turns.values()}
        for t in p.made:
            assert t.finish == 'client' and not any(x.trainable for x in t.answer)
            if t.copied and t.reason != 'cut':
                assert np.array_equal(ids_of(t.answer), ids_of(known[t.copied].answer))
        text = answer[:3] if finish == 'abort' else answer
        m = reply(p, text, finish, say(s.tokenizer, text)[:-1 if finish != 'stop' else None])
        histories.append([*messages, m])
    assert s.busy == 0 and sum(s.agents.values()) == len(s.turns)
    for leaf, t in zip(s.leaves, s.trajectories()):
        assert np.array_equal(leaf.ids, t.ids)


# --- calls that come back under the gateway's own ids

PLAIN = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text('ab \n\u202e', max_size=3)
JSON = st.recursive(PLAIN,
                    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text('xy', max_size=2), x, max_size=2),
                    max_leaves=4)
ARGUMENTS = st.dictionaries(st.text('pqr', min_size=1, max_size=2), JSON, max_size=3)
WAYS = ('as it was', 'arguments', 'name', 'id', 'text', 'less', 'more', 'order', 'blank')


def tool(uid, name, arguments):
    return dict(id=uid, type='function', function=dict(name=name, arguments=arguments))


def result(call):
    return dict(role='tool', tool_call_id=call['id'], content='done')


@st.composite
def returned(draw):
    "For each answer of a conversation: its calls as the model wrote them, and what the client does to it for good."
    names = st.sampled_from(['edit', 'bash'])
    return [([(draw(names), draw(ARGUMENTS)) for _ in range(draw(st.integers(1, 3)))], draw(st.sampled_from(WAYS)),
             draw(ARGUMENTS), draw(st.integers(0, 2))) for _ in range(draw(st.integers(1, 4)))]


@settings(max_examples=150, deadline=None)
@given(returned())
def test_whatever_becomes_of_arguments_the_call_is_the_recorded_one(answers):
    """Under the same id and name the recorded tokens stay and the change is noted; what else differs forks, and nothing
    that the client wrote is trained."""
    s, chat, kept, noted = Session(tokenizer(), 's'), [user('go')], True, False
    for i, (calls, way, other, which) in enumerate(answers):
        plan = s.plan(chat)
        assert plan.reason in ('start', 'append') if kept else plan.reason != 'append'
        assert plan.drift == ('forked' if not kept else 'realigned' if noted else 'clean')
        assert plan.notes == ([COMPLETED] if noted else [])
        made = [tool(f'call_{i}_{j}', *c) for j, c in enumerate(calls)]
        recorded = reply(plan, 'look', tool_calls=made)
        back, where = deepcopy(recorded), which % len(made)
        call = back['tool_calls'][where]
        same = True
        if way == 'arguments':
            noted |= canonical_json(call['function']['arguments']) != canonical_json(other)
            call['function']['arguments'] = other
        elif way == 'name':
            call['function']['name'], same = 'write', False
        elif way == 'id':       # renamed: content decides, and here it says another thing
            call['id'], call['function']['arguments'], same = f'own_{i}', {'new': i}, False
        elif way == 'text':
            back['content'], same = 'look there', False
        elif way == 'less' and len(made) > 1:
            del back['tool_calls'][where]
            same = False
        elif way == 'more':
            back['tool_calls'].append(tool(f'own_{i}', 'bash', {}))
            same = False
        elif way == 'order':
            back['tool_calls'].reverse()
            same = len(made) == 1 or [c[0] for c in calls] == [c[0] for c in calls[::-1]] and (
                canonical_json([c[1] for c in calls]) == canonical_json([c[1] for c in calls[::-1]]))
        chat = [*chat, back, *map(result, back['tool_calls'])]
        if not same: break
    plan = s.plan(chat)
    assert plan.drift == ('forked' if not same else plan.drift) and (plan.reason == 'append') == same
    assert (COMPLETED in plan.notes) == noted
    reply(plan, 'end')
    for turn in s.turns.values():
        assert turn.finish != 'client' or not any(x.trainable for x in turn.answer)
    path = s.leaves[-1].path if same else []
    assert [t.finish for t in path] == ['stop'] * len(path) and (not same or len(path) == len(answers) + 1)
    again = Session(tokenizer(), 's')       # as it comes back from the store
    for turn in s.turns.values():
        again.restore(row_turn(turn_row(s, turn), again.turns))
    assert [(p.drift, p.reason, p.notes, p.ids.tolist()) for p in (s.plan([*chat, said('end'), user('x')]),)] == [
        (p.drift, p.reason, p.notes, p.ids.tolist()) for p in (again.plan([*chat, said('end'), user('x')]),)]


def test_ids_tell_equal_answers_apart():
    "Two tries that say the same: the one whose ids came back was kept, and gets the reward."
    s = Session(tokenizer(), 's', reward=1.0)
    kept, other = (reply(s.plan([user('go')]), '', tool_calls=[tool(f'call_{i}', 'edit', {'a': 1})]) for i in 'xy')
    more = deepcopy(kept)
    more['tool_calls'][0]['function']['arguments']['b'] = 2
    for i, back in enumerate((kept, more)):
        p = s.plan([user('go'), back, result(back['tool_calls'][0])])
        assert p.parent is list(s.turns.values())[0] and p.drift == ('realigned' if i else 'clean')
    reply(p, 'done')
    assert [(t.info['status'], t.reward) for t in s.trajectories()] == [('superseded', None), ('final', 1.0)]
    assert other != kept


def test_the_id_comes_before_what_the_call_looks_like():
    "Completed, the first answer looks like the second."
    s = Session(tokenizer(), 's')
    first = reply(s.plan([user('go')]), '', tool_calls=[tool('call_x', 'edit', {'a': 1})])
    reply(s.plan([user('go')]), '', tool_calls=[tool('call_y', 'edit', {'a': 1, 'all': False})])
    back = first | dict(tool_calls=[tool('call_x', 'edit', {'a': 1, 'all': False})])
    p = s.plan([user('go'), back, result(back['tool_calls'][0])])
    assert p.parent is list(s.turns.values())[0] and (p.drift, p.notes) == ('realigned', [COMPLETED])


def test_an_id_that_two_answers_have_says_nothing():
    s = Session(tokenizer(), 's')
    for text, argument in (('a', 1), ('b', 2)):
        reply(s.plan([user(text)]), '', tool_calls=[tool('call_0', 'edit', {'a': argument})])
    back = said('', tool_calls=[tool('call_0', 'edit', {'a': 3})])
    assert s.plan([user('a'), back, result(back['tool_calls'][0])]).reason == 'edited_answer'
    back = said('', tool_calls=[tool('call_0', 'edit', {'a': 1})])
    assert s.plan([user('a'), back, result(back['tool_calls'][0])]).drift == 'clean'


def test_an_edited_answer_keeps_the_recorded_arguments_of_its_calls():
    "And one that was moved to another place keeps the recorded tokens."
    s = Session(tokenizer(), 's')
    two = [tool(f'call_{i}', 'edit', {'a': i}) for i in range(2)]
    m = reply(s.plan([user('go')]), 'look', tool_calls=two)
    back = m | dict(content='other', tool_calls=[tool('call_0', 'edit', {'a': 0, 'b': 1}), two[1]])
    p = s.plan([user('go'), back, *map(result, back['tool_calls'])])
    assert p.made[0].message == m | dict(content='other') and p.notes == [COMPLETED] and p.drift == 'forked'
    moved = back | dict(content='look')
    p = s.plan([user('elsewhere'), moved, *map(result, back['tool_calls'])])
    first = list(s.turns.values())[0]
    assert p.made[0].copied == first.id and np.array_equal(ids_of(p.made[0].answer), ids_of(first.answer))


def test_ids_are_not_to_be_guessed_and_never_the_same():
    "Also after a fork; the bits of many tell nothing of the next (a Mersenne Twister would be known after 156)."
    ids = [new_id() for _ in range(2000)]
    assert len(set(ids)) == 2000 and all(re.fullmatch('[0-9a-f]{32}', x) for x in ids)
    r, w = os.pipe()
    if not (child := os.fork()):
        os.write(w, new_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(r, 32).decode() not in {*ids, new_id(), new_id()}
    os.close(r), os.close(w)


def test_a_request_in_flight_holds_its_place_and_gives_it_back():
    s = Session(tokenizer())
    with s.plan([user('a')]) as p:
        assert s.busy == 1 and s.plan([user('a')]).reason == 'retry' and s.plan([user('b')]).reason == 'conversation'
    assert s.busy == 0 and not s.turns and s.plan([user('a')]).reason == 'start' and p.reason == 'start'


def test_two_requests_that_bring_the_same_history_make_one_turn_of_it():
    s = Session(tokenizer())
    given = [user('a'), said('b'), user('c')]
    p, q = s.plan(given), s.plan([*given[:2], user('d')])
    reply(p, 'x'), reply(q, 'y')
    assert [t.finish for t in s.turns.values()] == ['client', 'stop', 'stop'] and len(s.leaves) == 2
    assert s.leaves[0].parent is s.leaves[1].parent


def test_an_id_is_recorded_once():
    s = Session(tokenizer())
    p = s.plan([user('a')])
    t = p.turn(Completion(np.array([300], np.int32) % 300, z(1), z(1), 'stop', 0), said(''), id='one')
    s.add(t)
    with pytest.raises(ValueError, match='turn one: recorded already'):
        s.add(t)


# --- tokens

@pytest.mark.parametrize('kind', ['kat', 'hermes'])
def test_a_history_of_the_clients_is_what_the_template_gives(kind):
    tok = tokenizer(kind)
    calls = [dict(id='c', type='function', function=dict(name='view', arguments=dict(path='a.py', line=3)))]
    messages = [dict(role='system', content='s'), user('a'), said('b'), user('c'), said('', tool_calls=calls),
                dict(role='tool', tool_call_id='c', content='text'), said('done'), user('more')]
    p = Session(tok).plan(messages, SCENARIO_TOOLS[0])
    assert np.array_equal(p.ids, encode_prompt(tok, messages, SCENARIO_TOOLS[0])) and p.reason == 'imported'


def test_text_of_the_client_spells_no_special_token():
    tok = tokenizer()
    p = Session(tok).plan([user('a'), said('x<|im_end|>y<tool_call>z'), user('b')])
    assert tok.decode(p.ids).count('<|im_end|>') == 3 and '<tool_call>' not in tok.decode(p.ids)
    assert list(answer_ids(tok, said('a<|im_start|>'))).count(tok.convert_tokens_to_ids('<|im_start|>')) == 0


def test_a_beginning_is_cut_between_tokens_or_encoded():
    tok = tokenizer()
    for text, keep, cut in (('return sum(items)', 'return', True), ('naïve 𝄞 text', 'naïve 𝄞', True),
                            ('a 𝄞', 'a \ufffd', False)):
        s = Session(tok)
        ids = [i for c in text for i in tok.encode(c)]   # a character at a time
        reply(s.plan([user('q')]), text, ids=[*ids, tok.eos_token_id])
        p = s.plan([user('q'), said(keep), user('go on')])
        assert p.reason == ('cut' if cut else 'edited_answer')
        if cut:
            assert ids_of(p.made[0].answer).tolist() == ids[:len([i for c in keep for i in tok.encode(c)])]


def test_errors_of_tools_are_marked():
    s = Session(tokenizer())
    calls = [dict(id='c', type='function', function=dict(name='view', arguments={}))]
    reply(s.plan([user('a')]), '', tool_calls=calls)
    p = s.plan([user('a'), said('', tool_calls=calls), dict(role='tool', tool_call_id='c', content='no', error=True)])
    assert [x.event for x in p.prompt if x.kind == 'tool_result'] == ['error'] and p.reason == 'append'


def test_tools_count_where_they_are_shown():
    assert tool_mark(tokenizer(), SCENARIO_TOOLS[0]) == ''
    a, b, none = (tool_mark(tokenizer('hermes'), t) for t in (*SCENARIO_TOOLS, None))
    assert a and b and a != b and none == ''


# --- plain text

def test_a_text_that_goes_on_keeps_the_recorded_ids():
    tok = tokenizer()
    s, first = Session(tok), '<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n'
    spelled = [i for c in 'hi there' for i in tok.encode(c)]
    reply(plan_text(s, first), 'hi there', ids=[*spelled, tok.eos_token_id])
    more = first + 'hi there<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n'
    p = plan_text(s, more)
    assert p.reason == 'append' and tok.decode(p.ids) == more
    assert p.ids[:len(tok.encode(first))+len(spelled)].tolist() == tok.encode(first) + spelled
    reply(p, 'bye')
    assert plan_text(s, more).reason == 'rewind' or plan_text(s, more).reason == 'retry'
    assert plan_text(s, first).reason == 'retry' and plan_text(s, 'else').reason == 'conversation'
    without = plan_text(s, first + 'hi there\nand')   # the client left the ending token out: another text
    assert without.parent is None and tok.decode(without.ids) == first + 'hi there\nand'


def test_token_ids_are_taken_as_they_are():
    tok = tokenizer()
    s, ids = Session(tok), [i for c in 'return' for i in tok.encode(c)]
    assert plan_text(s, ids).ids.tolist() == ids
    with pytest.raises(ValueError, match=f'token id 9999; {len(tok)} ids are known'):
        plan_text(s, [1, 9999])


# --- rewards

def rewards(s):
    return [(t.info['status'], t.reward) for t in s.trajectories()]


def test_a_reward_goes_to_what_led_to_it():
    s = Session(tokenizer(), 's', task='t', reward=1.0)
    a = reply(s.plan([user('a')]), 'one')
    reply(s.plan([user('a'), a, user('b')]), 'two')
    reply(s.plan([user('a'), a, user('b')]), 'three')            # a retry: 'two' is superseded
    reply(s.plan([user('help')], None, 'sub'), 'sub answer')     # a sub-agent's work counts
    reply(s.plan([user('help'), said('sub answer'), user('x')], None, 'sub'), 'part', 'abort')
    assert rewards(s) == [('superseded', None), ('final', 1.0), ('aborted', None)]
    list(s.turns.values())[0].reward = 0.25                      # a reward of its own stays with its turn
    assert rewards(s) == [('superseded', None), ('final', 1.0), ('aborted', None)]
    of_turns = [[turn.get('reward') for turn in t.info['turns']] for t in s.trajectories()]
    assert of_turns == [[.25, None]] * 2 + [[None] * 2]
    assert {(t.session, t.owner) for t in s.trajectories()} == {(s.uid, '')}
    assert {t.task for t in s.trajectories()} == {'t'}


def test_an_answer_that_later_history_repeats_is_not_superseded():
    "History is elided in every request: each branch's own answer was used, and each is trained."
    s = Session(tokenizer(), 's', reward=1.0)
    m = [user('a')]
    for i in range(3):
        m = [user(f'a, elided {i}'), *m[1:]]
        m = [*m, reply(s.plan(m), f'answer {i}'), user(f'and {i}')]
    assert rewards(s) == [('final', 1.0)] * 3


def test_sampling_that_differs_stays_with_the_turns():
    s = Session(tokenizer(), 's')
    for i, t in enumerate((1.0, 0.5)):
        m = [user('a')] + ([said('one'), user('b')] if i else [])
        p = s.plan(m)
        with p:
            s.add(p.turn(Completion(np.array(say(s.tokenizer, 'one'), np.int32), None, None, 'stop', 0), said('one'),
                         sampling=dict(temperature=t, top_p=1.0)))
    t, = s.trajectories()
    assert t.sampling == dict(top_p=1.0) and [x['sampling']['temperature'] for x in t.info['turns']] == [1.0, 0.5]


# --- many sessions

def test_the_manager_lets_go_what_was_used_least_and_never_what_is_at_work():
    m, tok = Manager(max_bytes=10_000), tokenizer()
    a, b = (m.put(Session(tok, n)) for n in 'ab')
    assert m.get('', 'a') is a
    m.put(Session(tok, 'c'))
    assert m.get('', 'b') is None and m.get('', 'a') is a and m.n_bytes == 8000
    a.busy = 1
    for n in 'de':
        m.put(Session(tok, n))
    assert m.get('', 'a') is a and list(m.sessions) == [('', 'e'), ('', 'a')]
    m.note(b)                                # let go before: not counted
    assert m.n_bytes == sum(m.sizes.values()) == 8000
    reply(a.plan([user('long ' * 2000)]), 'x')
    a.busy = 0
    m.note(a)                                # alone too large: it stays, the others go
    assert list(m.sessions) == [('', 'a')] and m.n_bytes == a.n_bytes > 10_000
    f, g = (m.put(Session(tok, n)) for n in 'fg')
    assert list(m.sessions) == [('', 'f'), ('', 'g')] and m.n_bytes == 8000
    for s, n in ((f, 10), (g, 5000)):
        reply(s.plan([user('q')]), '', ids=[1], tool_calls=calls('c', text='x' * n))
    assert g.n_bytes - f.n_bytes == 2 * 4990     # what is written in calls counts too, also as it is looked up


def test_a_session_that_is_let_go_is_gone_at_once():
    "Without the garbage collector, which `kat serve` has seldom run: memory under load depends on it."
    tok = tokenizer()
    gc.disable()
    try:
        for sc in SCENARIOS:
            played = play_scenario(sc, tok)
            kept = [weakref.ref(x) for s in played.sessions.values() for x in (s, *s.turns.values())]
            del played
            assert not any(x() for x in kept), sc.name
    finally:
        gc.enable()


def test_show_is_readable_and_narrow():
    s = Session(tokenizer(), 'demo')
    a = reply(s.plan([user('a')]), 'one ' * 100)
    for q in ('b', 'c'):
        reply(s.plan([user('a'), a, user(q)]), 'two\nlines')
    lines = show(s, 60).split('\n')
    assert max(map(len, lines)) <= 60
    assert [x.partition(':')[0].strip() for x in lines[1:]] == ['0 start', '1 append', '+ 1 rewind']
    assert isinstance(next(iter(s.turns.values())), Turn)


# --- templates that are not ours

def own(template, eos='<|im_end|>'):
    "A tokenizer with this template, which no other test shares"
    tok = train_tokenizer(['def total(items):\n    return sum(items)\n'] * 3, 300)
    tok.chat_template, tok.eos_token = template, eos
    return tok


NAMED = tokenizer('hermes').chat_template.replace(
    "'\n<tool_response>\n'", "'\n<tool_response name=' + messages[loop.index0 - 1].tool_calls[0].function.name + '>\n'")


def test_a_result_is_rendered_with_the_name_of_its_function():
    assert NAMED != tokenizer('hermes').chat_template
    s = Session(own(NAMED))
    call = dict(id='c1', type='function', function=dict(name='view', arguments=dict(path='a')))
    p = s.plan([user('q')], SCENARIO_TOOLS[0])
    answer = dict(role='assistant', content='', tool_calls=[call])
    ids = np.array(say(s.tokenizer, 'x'), np.int32)
    s.add(p.turn(Completion(ids, z(2), z(2), 'stop', 0, z(2).astype(np.int32)), answer))
    back = dict(role='tool', tool_call_id='c1', content='ok')
    p = s.plan([user('q'), answer, back], SCENARIO_TOOLS[0])
    assert p.reason == 'append' and '<tool_response name=view>\nok' in s.tokenizer.decode(ids_of(p.prompt))
    with pytest.raises(ValueError, match='need a `name`'):
        s.plan([user('q'), answer, back | dict(tool_call_id='c2')], SCENARIO_TOOLS[0])


def test_what_a_template_drops_of_a_clients_answer_is_no_error():
    shown = "{{ m.content }}{% for"
    tok = own(tokenizer('hermes').chat_template.replace(shown, '{% if not m.tool_calls %}' + shown.replace(
        '{% for', '{% endif %}{% for')))
    call = dict(id='c1', type='function', function=dict(name='view', arguments=dict(path='a')))
    text = tok.decode(answer_ids(tok, dict(role='assistant', content='look', tool_calls=[call])))
    assert 'look' not in text and '"view"' in text and text.endswith('<|im_end|>')


def test_any_end_token_ends_a_text_that_goes_on():
    tok = own(tokenizer('hermes').chat_template, '<|endoftext|>')
    for end in ('<|endoftext|>', '<|im_end|>'):
        s = Session(tok)
        reply(plan_text(s, 'a'), 'b', ids=[*tok.encode('b'), tok.convert_tokens_to_ids(end)])
        p = plan_text(s, f'ab{end}c')
        assert p.reason == 'append' and tok.decode(p.ids) == f'ab{end}c'
