"kat evaluate: every episode once, whatever kills it; what is lost has no score; nothing is mixed up"
import asyncio
import base64
import json
import shutil
from contextlib import asynccontextmanager
from io import StringIO

import pytest
from benchmark_world import AGENT, call, engine, evaluate, knows, software_task, source
from hypothesis import given
from hypothesis import strategies as st
from plane_world import tokenizer
from rich.console import Console

from kat.core.io import UserError, append_jsonl
from kat.envs.base import Grade, InfraError, find_world
from kat.envs.micro import MicroEnv
from kat.tasks.software import patched
from kat.plane.gateway import Gateway, running
from kat.plane.store import Store
from kat.recipe.benchmark import (Down, Evaluation, ModelSource, Play, PlaySettings, find_tasks, make_jobs, model_hash,
                                  play_all, run_evaluation, run_stages, stage_models, task_hash)
from kat.recipe.rollouts import asyncio_run
from kat.recipe.scores import (CATEGORIES, category_of, compare_runs, load_run, newest, outcomes_of, score, score_lines,
                               share, write_page)

TASKS = find_world('micro').heldout(4)
SOLVABLE = TASKS[:2]


@pytest.fixture(autouse=True)
def few_figures(request, monkeypatch):
    "Drawing is slow, and the same for all: one test looks at it"
    if 'done' not in request.fixturenames:
        monkeypatch.setattr('kat.recipe.scores.draw_figures', lambda *given: 'not drawn here')


def lines(run):
    return [json.loads(line) for line in (run / 'episodes.jsonl').read_text().splitlines()]


def by_task(run):
    return {(one['task'], one['run']): one for one in load_run(run)[1]}


# --- how an episode ends

FINISHES = ['submit', 'cap', 'length', 'tokens', 'lost', 'timeout', 'infra']

@given(st.sampled_from(FINISHES), st.none() | st.builds(
    Grade, st.sampled_from([0., .5, 1.]), st.dictionaries(st.text('ab', min_size=1), st.booleans(), max_size=3),
    st.sampled_from([{}, dict(tampered=''), dict(tampered='twice passed')])))
def test_every_end_is_of_one_category(finish, grade):
    if grade is None and finish not in ('timeout', 'infra'):
        with pytest.raises(ValueError, match='no grade'):
            category_of(finish, grade)
        return
    found = category_of(finish, grade)
    assert found in CATEGORIES
    assert (found == 'infrastructure') == (finish == 'infra') and (found == 'timeout') == (finish == 'timeout')
    if found == 'resolved':
        assert finish == 'submit' and grade.reward > 0 and all(grade.tests.values()) and not grade.info.get('tampered')


LINES = st.lists(st.builds(
    lambda task, run, category,
    turns: dict(task=task, run=run, category=category, turns=turns, calls=turns, tool_turns=turns,
                                            read=3, written=2, seconds=1., findings=[], kind='k', key=f'{task}{run}'),
    st.sampled_from('abc'), st.integers(0, 3), st.sampled_from([*CATEGORIES]), st.integers(0, 9)), max_size=12)

@given(LINES)
def test_scores_add_up(records):
    row = score(records, [1., 2.])
    assert sum(row[name] for name in CATEGORIES) == row['episodes'] == len(records)
    assert row['scored'] == len(records) - row['infrastructure'] == sum(map(len, outcomes_of(records).values()))
    if not row['scored']:
        assert row['rate'] is None and share(row) == 'no score' and not row['pass']     # never 0
    else:
        assert 0 <= row['lo'] <= row['rate'] <= row['hi'] <= 1 and row['cost'] == pytest.approx(7e-6)
        assert list(row['pass'].values()) == sorted(row['pass'].values())
    assert json.dumps(row, allow_nan=False) and all(isinstance(line, str) for line in score_lines(row))


# --- the built-in agent on a model of ours

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "An evaluation of a model that knows two tasks of four, twice."
    path = tmp_path_factory.mktemp('done')
    made = engine(knows(SOLVABLE))
    run, said = evaluate(path, made, runs=2, check=True, price=[1., 10.])
    return path, run, said, made


def test_what_is_known_is_resolved(done):
    path, run, said, made = done
    found = by_task(run)
    assert {key: one['category'] for key, one in found.items()} == {
        (task.id, i): 'resolved' if task in SOLVABLE else 'failed' for task in TASKS for i in (0, 1)}
    one = found[TASKS[0].id, 0]
    assert (one['turns'], one['tool_turns'], one['finish'], one['tests'][0]) == (1, 1, 'submit', one['tests'][1])
    assert one['calls'] == 1 + len(TASKS[0].data['edits']) and found[TASKS[3].id, 1]['finish'] == 'lost'
    assert 'resolved: 4/8 = 50.0%' in said and 'excluded 0' in said and 'pass@1 50.0%, pass@2 50.0%' in said
    asked = [len(request.ids) for request in made.asked]
    assert sum(one['read'] for one in found.values()) == sum(asked)
    row = json.loads((run / 'score.json').read_text())
    assert row['cost'] == pytest.approx((row['read'] + 10 * row['written']) / 1e6) and row['scored'] == 8


def test_what_a_run_leaves(done, tmp_path):
    path, run, said, made = done
    config, records = load_run(run)
    now = config['versions'][-1]
    assert {'python', 'torch', 'transformers', 'kat-rl', 'system', 'sandbox'} <= set(now) and 'works' in now['sandbox']
    assert config['model']['files'] == model_hash(path / 'model') and len(config['task_set']) == 16
    page = (run / 'report.html').read_text()
    assert TASKS[0].id in page and '<img' in page and 'infrastructure' in page and 'src="http' not in page
    for name in ('predictions.jsonl', 'predictions.2.jsonl'):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert len(rows) == 4 and all(set(row) == {'instance_id', 'model_name_or_path', 'model_patch'} for row in rows)
    row, = [row for row in rows if row['instance_id'] == TASKS[0].id]
    before = {p: (t.encode(), 'file') for p, t in TASKS[0].data['files'].items()}
    after = patched(before, row['model_patch'])
    for place, n, line in TASKS[0].data['edits']:
        assert after[place][0].decode().splitlines()[n - 1] == line
    said = json.loads((run / records[0]['dialogue']).read_text())
    assert said['instance_id'] == TASKS[0].id and said['messages'][-1]['role'] == 'assistant'


def test_sessions_are_graded(done):
    _, run, _, _ = done
    store = Store(run / 'sessions.db')
    rows = {row['name']: row for row in store.sessions()}
    store.close()
    for one in load_run(run)[1]:
        assert rows[one['session']]['finished'] and rows[one['session']]['reward'] == (one['category'] == 'resolved')
        assert rows[one['session']]['task'] == one['task']


def test_the_same_command_does_nothing_twice(done):
    path, run, _, made = done
    before, asked = (run / 'episodes.jsonl').read_bytes(), len(made.asked)
    run, said = evaluate(path, made, runs=2, check=True, price=[1., 10.])
    assert (run / 'episodes.jsonl').read_bytes() == before and len(made.asked) == asked and 'played' not in said
    assert 'resolved: 4/8' in said


def test_other_settings_are_refused(done):
    path, run, _, made = done
    with pytest.raises(UserError, match='settings.max_turns: None there, 3 now'):
        evaluate(path, made, runs=2, max_turns=3)
    before = (run / 'run.json').read_bytes()
    (path / 'model/more.json').write_text('{}')
    with pytest.raises(UserError, match='model.files'):
        evaluate(path, made, runs=2)
    (path / 'model/more.json').unlink()
    assert (run / 'run.json').read_bytes() == before


def test_cut_at_every_byte_of_the_last_record(done, tmp_path):
    "What is whole is kept to the byte, the torn line is gone, and exactly its episode is to be played"
    _, run, _, _ = done
    whole = (run / 'episodes.jsonl').read_bytes()
    start = whole[:-1].rfind(b'\n') + 1
    keys, last = [one['key'] for one in lines(run)], json.loads(whole[start:])['key']
    from kat.recipe.benchmark import _read_lines
    path = tmp_path / 'episodes.jsonl'
    for cut in range(start, len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = newest(_read_lines(path))
        assert list(found) == (keys if cut == len(whole) else keys[:-1])
        assert path.read_bytes() == (whole if cut == len(whole) else whole[:start])
        if cut % 40 == 0:
            append_jsonl(path, json.loads(whole[start:]))
            assert list(newest(_read_lines(path))) == keys and last == keys[-1]


@pytest.mark.parametrize('cut', [1, 40, 'middle'])
def test_a_torn_run_goes_on(done, tmp_path, cut):
    path, run, _, _ = done
    shutil.copytree(path, tmp_path / 'copy')
    log = tmp_path / 'copy/run/episodes.jsonl'
    whole = log.read_bytes()
    start = whole[:-1].rfind(b'\n') + 1
    log.write_bytes(whole[:start + (len(whole) - start) // 2] if cut == 'middle' else whole[:-cut])
    made = engine(knows(SOLVABLE))
    found, said = evaluate(tmp_path / 'copy', made, runs=2, check=True, price=[1., 10.])
    assert '1 played' in said and log.read_bytes()[:start] == whole[:start]
    same = lambda one: {k: v for k, v in one.items() if k not in ('seconds', 'session')}
    assert [same(one) for one in load_run(found)[1]] == [same(one) for one in load_run(run)[1]]
    assert len(lines(found)) == 8 and len({one['key'] for one in lines(found)}) == 8


def test_killed_anywhere_it_goes_on(tmp_path):
    "A model that breaks off at each answer in turn: each run gets a little further"
    answer, left = knows(SOLVABLE), [0]
    def breaks(text):
        left[0] -= 1
        if left[0] < 0: raise KeyboardInterrupt
        return answer(text)
    for budget in range(1, 9):
        left[0] = budget
        try:
            run, _ = evaluate(tmp_path, engine(breaks), at_once=1)
        except KeyboardInterrupt:
            continue
        break
    else:
        raise AssertionError('never got to its end')
    assert budget > 1 and len(lines(run)) == 4 and len({one['key'] for one in lines(run)}) == 4
    assert {one['task']: one['category'] == 'resolved' for one in lines(run)} == {t.id: t in SOLVABLE for t in TASKS}


def test_more_tasks_and_runs_find_the_old_ones_done(tmp_path):
    made = engine(knows(SOLVABLE))
    evaluate(tmp_path, made, 'micro:2')
    asked = len(made.asked)
    run, said = evaluate(tmp_path, made, 'micro:2', runs=2)
    assert asked == 2 and len(made.asked) == 4 and '2 played' in said
    run, said = evaluate(tmp_path, made, 'micro:1')
    assert len(made.asked) == 4 and '1/1 = 100.0%' in said and len(lines(run)) == 4


@pytest.mark.parametrize('limit, finish', [(dict(max_turns=2), 'cap'), (dict(tokens=1), 'tokens')])
def test_limits_truncate(tmp_path, limit, finish):
    run, said = evaluate(tmp_path, engine(lambda text: call('list')), 'micro:1', **limit)
    one, = lines(run)
    assert (one['category'], one['finish']) == ('truncated', finish) and one['turns'] == limit.get('max_turns', 1)
    assert '0/1 = 0.0%' in said and 'truncated 1' in said


def test_a_full_context_truncates(tmp_path):
    run, _ = evaluate(tmp_path, engine(lambda text: call('list')), 'micro:1', context=1700)
    one, = lines(run)
    assert (one['category'], one['finish']) == ('truncated', 'length') and one['turns'] >= 1 and one['error'] == ''


def test_out_of_time(tmp_path):
    class Never(type(engine(str))):
        async def generate(self, request, on_token=None):
            await asyncio.Event().wait()
    made = Never(None, tokenizer('hermes'))
    run, said = evaluate(tmp_path, made, 'micro:1', seconds=.3)
    one, = lines(run)
    assert one['category'] == 'timeout' and one['patch'] is None and '0/1 = 0.0%' in said and 'timeout 1' in said


# --- what the infrastructure loses

def test_a_broken_environment_has_no_score(tmp_path, monkeypatch):
    "The grader fails for one task; it is tried again, counted, not scored, and played again by the same command"
    honest, bad = MicroEnv.grade, TASKS[0].id
    async def grade(self):
        if self.task.id == bad: raise InfraError('the disk is gone')
        return await honest(self)
    monkeypatch.setattr(MicroEnv, 'grade', grade)
    made = engine(knows(TASKS[:1] + TASKS[1:2]))
    run, said = evaluate(tmp_path, made)
    one = by_task(run)[bad, 0]
    assert one['category'] == 'infrastructure' and one['faults'] == 3 and one['error'] == 'the disk is gone'
    assert 'resolved: 1/3' in said and 'infrastructure 1' in said
    rows = [json.loads(line)['instance_id'] for line in (run / 'predictions.jsonl').read_text().splitlines()]
    assert bad not in rows and len(rows) == 3
    monkeypatch.setattr(MicroEnv, 'grade', honest)
    run, said = evaluate(tmp_path, made)
    assert '1 played' in said and 'resolved: 2/4' in said and len(lines(run)) == 5
    assert by_task(run)[bad, 0]['category'] == 'resolved'


def test_it_stops_when_everything_is_lost(tmp_path):
    class Lost:
        async def play(self, env, task, seed, played):
            raise InfraError('no route to the model')
        async def graded(self, played, line):
            pass
    jobs = make_jobs(find_world('micro').heldout(30), {}, PlaySettings())
    play = Play(tmp_path, Lost(), lambda task: MicroEnv(None), 5., patience=4)
    with pytest.raises(Down, match='4 episodes in a row were lost, none is scored: no route to the model'):
        asyncio_run(play_all(play, jobs, 2))
    assert 4 <= len(lines(tmp_path)) <= 5 and {one['category'] for one in lines(tmp_path)} == {'infrastructure'}


# --- endpoints

@asynccontextmanager
async def _gateway(path, made, **more):
    store = Store(path / 'endpoint.db')
    try:
        gateway = Gateway(made, made.tokenizer, store, 10**5, **more)
        async with running(gateway) as address:
            yield address
    finally:
        store.close()


def at_endpoint(path, made, how=lambda app: app, tasks='micro:4', **more):
    "An evaluation against a server of its own, with something in front of it"
    async def go():
        async with _gateway(path, made, **more.pop('gateway', {})) as address:
            asked = Evaluation(ModelSource(address, key=more.pop('key', ''), wait=0), tasks, path / 'run',
                               PlaySettings(max_tokens=4000), at_once=2, price=[1., 1.], **more)
            told = Console(file=StringIO(), width=200)
            await asyncio.to_thread(run_evaluation, asked, told)
            return told.file.getvalue()
    return asyncio.run(go())


def test_an_endpoint_is_played_like_a_folder(tmp_path):
    made = engine(knows(SOLVABLE))
    said = at_endpoint(tmp_path, made)
    assert 'resolved: 2/4' in said and {one['read'] > 0 and one['written'] > 0
                                        for one in lines(tmp_path / 'run')} == {True}
    assert load_run(tmp_path / 'run')[0]['model']['endpoint'].startswith('http://127.0.0.1')


def test_a_key_that_is_refused_and_an_endpoint_that_is_down(tmp_path):
    made = engine(knows([]))
    with pytest.raises(UserError, match='the key is refused; give one with --api-key-file'):
        at_endpoint(tmp_path, made, gateway=dict(keys={'right': 'me'}), key='wrong')
    with pytest.raises(UserError, match='nobody answers there'):
        run_evaluation(Evaluation(ModelSource('http://127.0.0.1:9'), 'micro:1', tmp_path / 'b'),
                       Console(file=StringIO()))
    assert not (tmp_path / 'b/episodes.jsonl').exists() and not made.asked


class Trouble:
    "In front of a server: `how(n, scope)` says what becomes of the n-th request, None: it is answered"
    def __init__(self, app, how):
        self.app, self.how, self.n = app, how, 0

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http' or scope['method'] != 'POST': return await self.app(scope, receive, send)
        self.n += 1
        what = self.how(self.n)
        if what is None: return await self.app(scope, receive, send)
        status, body, *head = what
        await send(dict(type='http.response.start', status=status,
                        headers=[(b'content-type', b'application/json'), *head]))
        await send(dict(type='http.response.body', body=body))


def troubled(path, made, how, monkeypatch, **more):
    from kat.plane import gateway
    honest = gateway.application
    monkeypatch.setattr(gateway, 'application', lambda g: Trouble(honest(g), how))
    return at_endpoint(path, made, **more)


def test_a_busy_endpoint_is_asked_again(tmp_path, monkeypatch):
    "Every other request is refused for the moment, in several ways; the scores are those of a calm one"
    ways = [(429, b'{}', (b'retry-after', b'0')), (503, b'oh'), (500, b''), (502, b'<html>')]
    said = troubled(tmp_path, engine(knows(SOLVABLE)), lambda n: ways[n // 2 % 4] if n % 2 else None, monkeypatch)
    assert 'resolved: 2/4' in said and 'infrastructure 0' in said
    assert [one['turns'] for one in load_run(tmp_path / 'run')[1]] == [1, 1, 3, 3]


@pytest.mark.parametrize('answer, reason', [
    ((200, b'{}'), 'not an answer in the form of OpenAI'), ((200, b'nonsense'), 'not an answer in the form of OpenAI'),
    ((200, b'{"choices": [{"message": {"role": "assistant", "tool_calls": [{}]}}]}'), 'not an answer'),
    ((404, b'{"error": "no such model"}'), '404 {"error": "no such model"}'), ((401, b'{}'), '401'),
    ((500, b'{}'), 'did not answer in 5 tries: 500'), ((400, b'{"error": "bad field seed"}'), 'bad field seed')])
def test_what_an_endpoint_gets_wrong_is_never_scored(tmp_path, monkeypatch, answer, reason):
    said = troubled(tmp_path, engine(knows([])), lambda n: answer, monkeypatch, tasks='micro:1')
    one, = lines(tmp_path / 'run')
    assert one['category'] == 'infrastructure' and reason in one['error'] and one['faults'] == 3
    assert 'resolved: no score' in said and '0.0%' not in said


def test_a_prompt_that_is_too_long_for_an_endpoint_truncates(tmp_path, monkeypatch):
    answer = 400, b'{"error": {"code": "context_length_exceeded", "message": "too long"}}'
    troubled(tmp_path, engine(lambda text: call('list')), lambda n: answer if n == 3 else None, monkeypatch,
             tasks='micro:1')
    one, = lines(tmp_path / 'run')
    assert (one['category'], one['finish'], one['turns']) == ('truncated', 'length', 2)


# --- agents' programs

needs_sandbox = pytest.mark.skipif(not __import__('kat.envs.sandbox', fromlist=['features']).features().works,
                                   reason='no sandbox here')
FIX = "sed -i '0,/a - b/s//a + b/' calc.py"


def python(code):
    "A shell command that runs it"
    return f'python3 -c "exec(__import__(\'base64\').b64decode(\'{base64.b64encode(code.encode()).decode()}\'))"'


def shell(*commands):
    "A model that says these commands one after the other, then DONE"
    def answer(text):
        n = text.count('<|im_start|>assistant') - 1
        return commands[n] if n < len(commands) else 'DONE'
    return answer


@needs_sandbox
def test_a_program_mends_a_software_task(tmp_path):
    "Two tasks, one with a fix that is none: left out by name; the other is resolved, recorded, and its patch applies"
    software_task(tmp_path / 'tasks')
    software_task(tmp_path / 'tasks', 'demo__calc-2', gold='return b - a')
    made = engine(shell('ls -a', 'git log --all --oneline | cat', FIX))
    run, said = evaluate(tmp_path, made, str(tmp_path / 'tasks'), AGENT + ' {prompt}', check=True)
    assert "excluded by --check (1): demo__calc-2 (its own fix is failed)" in said
    one, = lines(run)
    assert one['category'] == 'resolved', one
    assert (one['task'], one['turns'], one['calls']) == ('demo__calc-1', 4, 0)
    prediction = json.loads((run / 'predictions.jsonl').read_text())
    tree = patched({'calc.py': ((tmp_path / 'tasks/demo__calc-1/base/calc.py').read_bytes(), 'file')},
                   prediction['model_patch'])
    assert b'a + b' in tree['calc.py'][0] and list(tree) == ['calc.py']
    said = [m['content'] for m in json.loads((run / one['dialogue']).read_text())['messages']]
    assert 'add() must add' in said[0] and 'calc.py' in said[2] and len(said[4].splitlines()) == 2   # one commit


@needs_sandbox
def test_a_program_sees_its_workspace_and_the_model_only(tmp_path, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY_OF_THE_USER', 'secret')
    where = software_task(tmp_path / 'tasks')
    asks = """import json, os, urllib.request as u
head = {'content-type': 'application/json', 'authorization': 'Bearer ' + os.environ['OPENAI_API_KEY']}
said = dict(model='kat', messages=[dict(role='user', content='x')])
u.urlopen(u.Request('http://127.0.0.1:8000' + PLACE, DATA, head))"""
    other = asks.replace('PLACE', "'/s/other/v1/chat/completions'").replace('DATA', 'json.dumps(said).encode()')
    tried = [f'cat {where}/gold.patch', 'env', f'ls {tmp_path}',
             python("import socket; socket.create_connection(('1.1.1.1', 53), 3)"), python(other),
             python(asks.replace('PLACE', "'/sessions'").replace('DATA', 'None'))]
    run, _ = evaluate(tmp_path, engine(shell(*tried)), str(tmp_path / 'tasks'), AGENT + ' {prompt}')
    said = [m['content'] for m in json.loads(next((run / 'dialogues').iterdir()).read_text())['messages']]
    gold, env, host, network, other, operator = said[2::2][:6]
    assert 'No such file' in gold and 'No such file' in host and 'secret' not in env and 'kat-op-' not in env
    assert gold.startswith('rc 1') and network.startswith('rc 1')
    assert 'HTTP Error 403' in other and 'HTTP Error 403' in operator
    one, = lines(run)
    assert one['category'] == 'failed' and one['findings'] == []


@needs_sandbox
@pytest.mark.parametrize('agent, more, want', [
    (' {prompt} 3', {}, dict(category='failed', finish='submit', note='exit code 3: ')),
    (' {prompt}', dict(max_turns=2), dict(category='truncated', finish='cap', turns=2)),
    (' {prompt}', dict(seconds=1.), dict(category='timeout', patch=None)),
    (' {prompt}', dict(context=900), dict(category='truncated', finish='length')),
    (' ', {}, dict(category='infrastructure', patch=None))])
def test_how_programs_end(tmp_path, agent, more, want):
    "With an exit code of their own; at the cap; asleep when time is out; out of context; before they asked anything"
    software_task(tmp_path / 'tasks')
    answer = shell('sleep 1000') if 'seconds' in more else shell('seq 100', 'seq 100', 'seq 100')
    run, _ = evaluate(tmp_path, engine(answer), str(tmp_path / 'tasks'), AGENT + agent, **more)
    one, = lines(run)
    assert {name: one[name] for name in want} == want, one
    assert ('before it asked the model anything' in one['error']) == (one['category'] == 'infrastructure')


@needs_sandbox
def test_a_program_plays_micro_tasks_too(tmp_path):
    "Its workspace is the task's files, hidden tests apart; one that edits the tests gains nothing and is pointed at"
    task, = [t for t in TASKS if len(t.data['edits']) == 1][:1]
    (path, n, new), = task.data['edits']
    edit = python(f"x = open('{path}').read().splitlines(); x[{n - 1}] = {new!r}\n"
                  f"open('{path}', 'w').write('\\n'.join(x))")
    made = engine(shell('ls', edit, 'echo pass > tests.py'))
    run, _ = evaluate(tmp_path, made, f'micro:{TASKS.index(task) + 1}', AGENT + ' {prompt}', at_once=1)
    one = by_task(run)[task.id, 0]
    said = [m['content'] for m in json.loads((run / one['dialogue']).read_text())['messages']]
    assert one['category'] == 'resolved' and 'hidden' not in said[2] and 'tests.py' in said[2]


# --- task sets, comparisons, stages

def test_a_task_is_known_by_its_content(tmp_path):
    folder = software_task(tmp_path)
    (task,), world = find_tasks(str(tmp_path))
    first = task_hash(task)
    assert world is None and first == task_hash(find_tasks(str(tmp_path))[0][0])
    hashes = {first}
    for part, text in (('base/calc.py', 'x = 1\n'), ('tests/test_calc.py', 'def test(): pass\n')):
        (folder / part).write_text(text)
        hashes.add(task_hash(task))
    (folder / 'tests/new.py').write_text('')
    hashes.add(task_hash(task))
    (folder / 'gold.patch').write_text((folder / 'gold.patch').read_text() + '\n')
    hashes.add(task_hash(task))
    shutil.copytree(tmp_path, tmp_path.with_name('moved'))
    hashes.add(task_hash(find_tasks(str(tmp_path.with_name('moved')))[0][0]))
    assert len(hashes) == 5                                     # where it lies doesn't matter


@pytest.mark.parametrize('said, reason', [
    ('micro', 'an environment and a number'), ('micro:0', 'an environment and a number'), ('micro:-1', 'and a number'),
    ('nothing:3', "no environment 'nothing'"), (':3', 'and a number'), ('', 'and a number'),
    ('tests:3:4', "no environment 'tests:3'")])
def test_tasks_that_are_none(said, reason):
    with pytest.raises(UserError, match=reason):
        find_tasks(said)


def test_a_damaged_task_folder(tmp_path):
    folder = software_task(tmp_path)
    (folder / 'task.json').write_text('{"schema": "kat.task/9"}')
    with pytest.raises(UserError, match='--tasks .*kat.task/9'):
        find_tasks(str(tmp_path))
    with pytest.raises(UserError, match='a folder of tasks expected'):
        find_tasks(str(folder / 'task.json'))


def test_two_runs(done, tmp_path):
    _, run, _, _ = done
    other, _ = evaluate(tmp_path, engine(knows(TASKS[1:])), runs=2)
    found, said = compare_runs(run, other)
    assert found['n'] == 4 and found['lost'] == [TASKS[0].id] and set(found['won']) == {t.id for t in TASKS[2:]}
    assert found['difference'][0] == pytest.approx(.25) and 'what 4 tasks could show' in '\n'.join(said)
    assert compare_runs(run, run)[0]['p'] == 1
    log = other / 'episodes.jsonl'
    log.write_text(log.read_text().replace(json.loads(log.read_text().splitlines()[0])['hash'], '0' * 16))
    found, said = compare_runs(run, other)
    assert found['n'] == 3 and len(found['changed']) == 1 and 'the same name, another content (1)' in said[-1]


def test_runs_that_are_none(done, tmp_path):
    with pytest.raises(UserError, match='is no evaluation: it has no run.json'):
        load_run(tmp_path)
    (tmp_path / 'run.json').write_text('{"schema": "kat.eval/9"}')
    with pytest.raises(UserError, match="schema 'kat.eval/9', expected 'kat.eval/1'"):
        load_run(tmp_path)
    (tmp_path / 'run.json').write_text('{')
    with pytest.raises(UserError, match='damaged'):
        load_run(tmp_path)
    shutil.copytree(done[1], tmp_path / 'copy')
    log = tmp_path / 'copy/episodes.jsonl'
    log.write_text(log.read_text().replace('{', '', 1))
    with pytest.raises(UserError, match='episodes.jsonl:1.*the same command plays it again'):
        load_run(tmp_path / 'copy')
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/thesis.tex').write_text('x')
    with pytest.raises(UserError, match='is in the way'):
        run_evaluation(Evaluation(source(tmp_path, engine(str)), 'micro:1', tmp_path / 'mine'),
                       Console(file=StringIO()))


def test_all_stages_of_a_pipeline(tmp_path):
    run = tmp_path / 'tiny'
    for stage in ('10_midtrain', '20_sft'):
        (run / stage / 'model').mkdir(parents=True)
        (run / stage / 'model/config.json').write_text(json.dumps(dict(stage=stage)))
    with pytest.raises(UserError, match='not a run of kat'):
        stage_models(run)
    (run / 'config.json').write_text(json.dumps(dict(stages={'10_midtrain': dict(steps=3)})))
    found = stage_models(run)
    assert list(found) == ['mid', 'sft']
    @asynccontextmanager
    async def opened(known):
        made = engine(knows(TASKS[:known]))
        yield made, made.tokenizer, 10**5
    sources = {stage: ModelSource(str(folder), lambda n=n: opened(n)) for n,
               (stage, folder) in enumerate(found.items())}
    more = dict(at_once=2, command='kat evaluate --stages')
    page = run_stages(sources, 'micro:2', tmp_path / 'out', PlaySettings(max_tokens=4000), more,
                      Console(file=StringIO()))
    rows = json.loads((tmp_path / 'out/stages.json').read_text())
    assert [(row['stage'], row['resolved'], row['scored']) for row in rows] == [('mid', 0, 2), ('sft', 1, 2)]
    assert (tmp_path / 'out/figures/stages.png').stat().st_size > 1000 and 'sft/report.html' in page.read_text()


def test_a_page_of_an_unfinished_run_says_so(done, tmp_path):
    shutil.copytree(done[1], tmp_path / 'run')
    log = tmp_path / 'run/episodes.jsonl'
    log.write_text(''.join(log.read_text().splitlines(True)[:3]))
    page = write_page(tmp_path / 'run').read_text()
    assert '5 episodes are still to be played' in page
    log.write_text('')
    assert '8 episodes are still to be played' in write_page(tmp_path / 'run').read_text()
    assert json.loads((tmp_path / 'run/score.json').read_text())['rate'] is None
