"Tests that are made: what an answer may hold, what a script can say, differences of every kind, gates, determinism"
import ast
import asyncio
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from testgen_world import make_task

from kat.envs.base import InfraError
from kat.strength.differences import search, unwritten, vary, vary_script
from kat.strength.gates import gates, smallest_cover
from kat.envs.grade import read_tree
from kat.strength.plain_tests import NAME, Written, as_test
from kat.strength.recording import Recorded, scripts_of
from kat.strength.replay import differs, play_script
from kat.strength.rewrites import REWRITES
from kat.envs.sandbox import Bubblewrap, features
from kat.strength.survey import over_tasks, settings_key
from kat.tasks.software import gold_tree, grade_state, read_task, read_tasks
from kat.strength.terms import literal_text, view_of
from kat.strength.testgen import strengthen, with_own, without_own
from kat.strength.variants import bench_of
from kat.strength.writer import ask_writer, written_in

bwrap = pytest.mark.skipif(not features().works, reason=f'bubblewrap does not work here: {features().reason}')
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3)
    | st.sets(st.integers() | st.text(), max_size=3), max_leaves=6)


# ---- values

@given(LITERALS)
def test_literals_are_read_back(value):
    text = literal_text(value)
    again = ast.literal_eval(text)
    assert again == value and type(again) is type(value) and literal_text(again) == text


@pytest.mark.parametrize('value', [float('nan'), float('inf'), [float('nan')], object(), 1j, ..., frozenset(),
                                   bytearray(), {'a': {1: object()}}, [0] * 201])
def test_what_is_no_literal(value):
    assert literal_text(value) is None


def test_a_set_has_one_text_and_an_object_with_an_address_only_a_class():
    class Thing:
        def __repr__(self):
            return f'<Thing at {hex(id(self))}>'
    assert literal_text({'b', 'a', 'c'}) == "{'a', 'b', 'c'}"
    assert view_of(Thing()) == view_of(object())[:1] + ["'Thing'"]
    assert view_of(iter([1])) == ['list(itertools.islice({}, 50))', '[1]']


@given(LITERALS, st.data())
def test_inputs_vary_around_what_was_seen_and_can_be_written(value, data):
    assert literal_text(data.draw(vary(value, st))) is not None


@given(st.data())
def test_a_varied_script_keeps_its_shape(data):
    add = dict(step(None, "'x'"), on=dict(obj=0), name='add', get=False, open={'n': '1'})
    script = [step(['a', 'Bag'], '[1, 2]'), add]
    made = data.draw(vary_script(script, {'add 0': ["'seen'"]}, st))
    assert [len(s['args']) for s in made] == [1, 1] and made[1]['on'] == dict(obj=0) and not any(map(unwritten, made))


def step(call, *texts, **more):
    args = [dict(lit=t) for t in texts]
    return dict(args=args, more={}, open={}, **(dict(call=call) if call else {}), **more)


# ---- scripts

def recorded(test, call=None, lines=(), **fields):
    return dict(step(call), test=test, lines=list(lines), **fields)


def test_a_script_holds_what_made_and_changed_its_objects_and_nothing_else():
    bag, other = ['m', 'Bag'], ['m', 'other']
    add = dict(on=dict(obj=0), name='add', get=False)
    steps = [recorded('t1', bag), recorded('t1', other), recorded('t1', **add), recorded('t2', other, [['m.py', 3]]),
             recorded('t1', **{**add, 'name': 'get'}, lines=[['m.py', 4]])]
    found = {len(script): (script, lines) for script, lines in scripts_of(steps)}
    script, lines = found[3]
    assert [s.get('name') or s['call'][1] for s in script] == ['Bag', 'add', 'get'] and lines == {('m.py', 4)}
    assert sum(1 for s, _ in scripts_of(steps) if s[-1].get('call') == other) == 1   # the same twice


@pytest.mark.parametrize('name', ['obj', 'lit', 'items', 'args', 'more', 'on', 'name'])
def test_a_parameter_may_be_called_what_a_part_of_a_term_is_called(name):
    bag, call = ['m', 'Bag'], ['m', 'put']
    steps = [recorded('t', bag), recorded('t', ['m', 'other']),
             recorded('t', call) | dict(more={name: dict(obj=0)}, open={name: 'None'}),
             recorded('t', call) | dict(more={name: dict(lit='1')})]
    scripts = [script for script, _ in scripts_of(steps) if script[-1].get('call') == call]
    assert sorted([s['call'][1] for s in script] for script in scripts) == [['Bag', 'put'], ['put']]
    longer, = [s for s in scripts if len(s) == 2]
    assert longer[-1]['more'] == {name: dict(obj=0)}
    assert longer[-1]['open'] == {name: 'None'}


def test_played_scripts_answer_values_errors_changes_and_states():
    sort = [step(['builtins', 'list'], '[3, 1]'), dict(step(None), on=dict(obj=0), name='sort', get=False)]
    assert play_script(sort) == dict(value=['{}', 'None'], state=['{}', '[1, 3]'])
    assert play_script([step(['heapq', 'heapify'], '[3, 1]')]) == dict(value=['{}', 'None'], after={'0': '[1, 3]'})
    raised = play_script([step(['builtins', 'int'], "'x'")])['raises']
    assert raised[:2] == [['builtins', 'ValueError'], ['builtins', 'Exception']]
    assert 'odd' in play_script([step(['builtins', 'int'], "'x'"), step(['builtins', 'int'])])
    assert play_script([step(['no_such_module', 'f'])])['raises'][0] == ['builtins', 'ModuleNotFoundError']


@pytest.mark.parametrize('script', [
    [step(['builtins', 'sorted'], '[3, 1]')], [step(['builtins', 'int'], "'é'")],
    [step(['heapq', 'heapify'], '[3, 1]')],
    [step(['collections', 'Counter'], "'aab'")], [step(['builtins', 'reversed'], '[1, 2]')],
    [step(['builtins', 'list'], '[3, 1]'), dict(step(None), on=dict(obj=0), name='sort', get=False)],
    [step(['fractions', 'Fraction'], '1', '2'), dict(step(None), on=dict(obj=0), name='numerator', get=True)]])
def test_a_test_says_what_was_played(script):
    gold, space = play_script(script), {}
    exec(as_test(script, gold, NAME), space)
    space[NAME]()
    assert not differs(gold, gold)


def test_two_names_that_are_equal_are_told_apart():
    script = [step(['json', 'loads'], "'[1]'"), dict(step(['marshal', 'loads']), args=[dict(lit="b''")])]
    text = as_test(script, dict(raises=[['builtins', 'EOFError']]), NAME)
    assert 'from json import loads\n' in text and 'from marshal import loads as loads2\n' in text


# ---- rewrites

SOURCE = '''"Words."
from __future__ import annotations
class A:
    def one(self):
        a = 1
        b = 2
        return [c for c in (a, b)]
    def two(self, n=3):
        try:
            return n / 0
        except ZeroDivisionError as error:
            found = str(error)
        return f'{found}'
def outer(x):
    y = x + 1
    def inner(): return y
    return inner()
z = 1; w = 2
'''


@pytest.mark.parametrize('name', REWRITES)
def test_rewrites_change_text_and_nothing_else(name):
    new, seen = REWRITES[name](SOURCE), []
    assert new != SOURCE
    for text in (SOURCE, new):
        space = {}
        exec(text, space)
        seen.append((space['A']().one(), space['A']().two(), space['outer'](1), space['z'], space['w']))
    assert seen[0] == seen[1]


# ---- differences of every kind

KINDS = {  # the old line, the new one; the tests call f('ab'), which says nothing about them
    'errors': ('int(x) if x.isdigit() else x', 'int(x) if x.isdecimal() else x.upper().lower() if x else x[0]'),
    'unicode': ('x.lower()', 'x.casefold()'),
    'order of a set': ('sorted(set(x))', 'list(set(x)) and sorted(set(x)) * (1 + (len(x) > 3))')}


@bwrap
@pytest.mark.parametrize('kind', KINDS)
def test_differences_that_the_tests_do_not_show(tmp_path, kind):
    old, new = (f'def f(x):\n    return {text}\n' for text in KINDS[kind])
    folder = make_task(tmp_path, old, new, 'from code_kat import f\n\ndef test_f():\n    assert f("ab")\n', ['test_f'])
    recorded = Recorded(1, [([step(['code_kat', 'f'], "'ab'")], {('code_kat.py', 2)})], {})
    other = dict(id='before', before=True, files={}, scripts=[0])
    got = [search(bench_of(folder), recorded, [other], Bubblewrap(), seed=3)[0] for _ in range(2)]
    assert got[0] == got[1] and got[0]['script'], 'the same seed finds the same'
    space_old, space_new = {}, {}
    exec(old, space_old)
    exec(new, space_new)
    value = ast.literal_eval(got[0]['script'][0]['args'][0]['lit'])
    assert len(value) <= 4
    answers = []
    for space in (space_old, space_new):
        try:
            answers.append(space['f'](value))
        except IndexError:
            answers.append('IndexError')
    assert answers[0] != answers[1]


@bwrap
def test_what_depends_on_hashes_clocks_or_addresses_is_no_difference(tmp_path):
    old = 'def f(x):\n    return 0\n'
    unsteady = ['list({x, "b", "c", "d", "e", "f", "g"})', '__import__("time").time() // 86400', 'id(x)',
                'float("nan")', '__import__("random").random()', '__import__("datetime").date.today().year',
                '__import__("os").getcwd()']
    new = 'def f(x):\n    return ' + '[' + ', '.join(unsteady) + '][len(x)]\n'
    folder = make_task(tmp_path, old, new, 'from code_kat import f\n\ndef test_f():\n    assert f("")\n', ['test_f'])
    scripts = [([step(['code_kat', 'f'], repr('a' * n))], {('code_kat.py', 2)}) for n in (0, 1, 2, 4, 5, 6)]
    others = [dict(id=i, before=True, files={}, scripts=[i]) for i in range(6)]
    bench = bench_of(folder)
    found = search(bench, Recorded(6, scripts, {}), others, Bubblewrap())
    sizes = [len(ast.literal_eval(one['script'][0]['args'][0]['lit'])) for one in found if one['script']]
    assert all(n == 3 or n > 6 for n in sizes)   # the words of NaN, and IndexError, are steady


# ---- a whole task

BASE = 'def clip(x, low=0, high=10):\n    return min(x, high)\n\ndef put(items, x):\n    items.append(x)\n'
GOLD = '''def clip(x, low=0, high=10):
    if x < low:
        return low
    return min(x, high)

def put(items, x):
    if x in items:
        raise ValueError(x)
    items.append(x)
'''
TESTS = '''from code_kat import clip, put

def test_low():
    assert clip(-1) == 0

def test_high():
    assert clip(12) == 10

def test_put():
    items = [1]
    put(items, 2)
    try:
        put(items, 2)
    except ValueError:
        return
    assert False
'''


@pytest.fixture(scope='module')
def strong(tmp_path_factory):
    folder = make_task(tmp_path_factory.mktemp('set'), BASE, GOLD, TESTS, ['test_low', 'test_put'], ['test_high'])
    return folder, strengthen(folder, Bubblewrap())


@bwrap
def test_a_task_becomes_stronger_and_the_grader_agrees(strong):
    folder, found = strong
    text, = found['tests'].values()
    assert found['before']['score'] < found['after']['score'] == 1 and not found['after']['survivors']
    assert 'clip(' in text and len(found['fail_to_pass']) + len(found['pass_to_pass']) == text.count(f'def {NAME}_')
    assert found['funnel']['kept'] <= found['funnel']['pass on rewrites'] <= found['funnel']['differences found']
    before = read_task(folder)
    key = settings_key(folder, {})
    with_own(folder, found)
    task = read_task(folder)
    assert set(before.expected) < set(task.expected) and without_own(folder)[0] == before
    assert settings_key(folder, {}) == key   # a stronger task begins again from its own tests
    assert GOLD.split('\n')[1] not in json.dumps(task.info)   # no code is shipped
    assert asyncio.run(grade_state(folder, gold_tree(folder), Bubblewrap())).passed
    wrong = read_tree(folder/'base') | {'code_kat.py': (GOLD.replace('x < low', 'x <= low').encode(), 'file')}
    assert not asyncio.run(grade_state(folder, wrong, Bubblewrap())).passed


@bwrap
def test_a_table_that_is_read_at_import_is_aimed_at_through_what_uses_it(tmp_path):
    old, new = 'NAMES = {"a": 1}\n', 'NAMES = {"a": 1, "b": 2}\n'
    use = '\ndef f(x):\n    return NAMES.get(x, 0)\n'
    tests = 'from code_kat import f\n\ndef test_f():\n    assert f("a") == 1 and f("b")\n'
    found = strengthen(make_task(tmp_path, old + use, new + use, tests, ['test_f']), Bubblewrap())
    assert [s['new'] for s in found['before']['survivors']] and found['after']['survived'] < found['before']['survived']


@bwrap
def test_gates_say_why(tmp_path):
    folder = make_task(tmp_path, BASE, GOLD, TESTS, ['test_low', 'test_put'], ['test_high'])
    body = [('assert clip(-3) == 0', 'fail_to_pass'), ('assert clip(3) == 3', 'pass_to_pass'),
            ('assert clip(3) == 4', None),   # the fix fails
            ('import time\n    assert (time.time() < 1.8e9) == (clip(1) == 1)', None),   # not with another clock
            ('assert {"a": 1}[min({"a", "b", "c", "d"}, key=hash)]', None),   # not with other hashes
            ('import inspect, code_kat\n    assert inspect.getsource(clip).count("\\n") == 4 + 0 * clip(1)', None)]
    written = [Written(f'def {NAME}():\n    from code_kat import clip\n    {text}\n', '', '') for text, _ in body]
    rewrite = dict(files={'code_kat.py': GOLD.replace('    if x < low', '\n    if x < low').encode()})
    kinds = gates(bench_of(folder), written, Bubblewrap(), 10, [rewrite['files']], Counter())
    assert {n: kinds.get(n) for n in (1, 2, 3, 4, 6)} == {1: body[0][1], 2: body[1][1], 3: None, 4: None, 6: None}


# ---- a writer

class Scripted(BaseHTTPRequestHandler):
    answer = ''

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        body = json.dumps(dict(choices=[dict(message=dict(content=self.answer.format(asked['model'])))])).encode()
        self.send_response(200 if self.path == '/v1/chat/completions' else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = HTTPServer(('127.0.0.1', 0), Scripted)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f'http://127.0.0.1:{made.server_port}/v1'
    made.shutdown()
    made.server_close()
    thread.join()


def test_a_writer_is_asked_and_a_silent_one_is_no_answer(server):
    Scripted.answer = '```python\nfrom a import f\n\ndef test_{}():\n    assert f(1) == 2\n```'
    made, = written_in(ask_writer(server, 'm', 'write'))
    assert made.source == f'def {NAME}():\n    from a import f\n    assert f(1) == 2\n'
    with pytest.raises(InfraError, match='gave no answer: HTTPError'):
        ask_writer(server + '/no', 'm', 'write')
    with pytest.raises(InfraError, match='gave no answer'):
        ask_writer('http://127.0.0.1:9/v1', 'm', 'write')


@pytest.mark.parametrize('text', [
    'def test_a(:', 'x = 1', 'def test_a():\n    pass', 'def test_a(fixture):\n    assert fixture', 'class TestA: pass',
    'import time\ndef test_a():\n    assert time.time()',
    'def test_a():\n    from os import path\n    assert path',
    'def test_a():\n    assert id(1)', '@mark\ndef test_a():\n    assert 1', 'no code', ''])
def test_what_a_writer_may_not_write(text):
    assert written_in(f'```python\n{text}\n```') == [] == written_in(text)


@bwrap
def test_a_writers_tests_pass_the_same_gates(tmp_path, server):
    folder = make_task(tmp_path, BASE, GOLD, TESTS, ['test_low', 'test_put'], ['test_high'])
    Scripted.answer = ('```python\nfrom code_kat import clip\n\n'
                       'def test_bound():\n    assert clip(11, low=11) == 10\n\n'
                       'def test_wrong():\n    assert clip(1) == 5\n```')
    found = strengthen(folder, Bubblewrap(), budget=3, seed=1, writer=(server, 'm'))
    assert found['funnel'].get('by the writer', 2) == 2
    assert '== 5' not in ''.join(found['tests'].values())


# ---- many tasks

def test_results_resume_and_errors_are_tried_again(tmp_path):
    for name in ('a-1', 'b-1'):
        make_task(tmp_path/'set', BASE, GOLD, TESTS, ['test_low'], name=name)
    tasks, calls = read_tasks(tmp_path/'set'), []
    def work(folder):
        calls.append(folder.name)
        if folder.name == 'b-1' and len(calls) < 3: raise InfraError('no room')
        return dict(score=1)
    done, errors = over_tasks(tasks, tmp_path/'out', dict(seed=0), work)
    assert set(done) == {'a-1'} and errors == {'b-1': 'no room'}
    done, errors = over_tasks(tasks, tmp_path/'out', dict(seed=0), work)
    assert set(done) == {'a-1', 'b-1'} and not errors and calls == ['a-1', 'b-1', 'b-1']
    over_tasks(tasks, tmp_path/'out', dict(seed=1), work)
    assert calls[3:] == ['a-1', 'b-1']   # other settings, other results


@given(st.dictionaries(st.integers(0, 9), st.sets(st.integers(0, 5)), max_size=6), st.sets(st.integers(0, 5)))
def test_a_cover_shows_all_that_can_be_shown(table, usable):
    chosen = smallest_cover(table, usable)
    assert set(chosen) <= usable and len(chosen) == len(set(chosen))
    assert all(tests & set(chosen) for tests in table.values() if tests & usable)
