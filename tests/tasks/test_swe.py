"The environment of real repositories: tools, walls, a workspace without a future, grading, the scripted engineer"
import asyncio
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.core.template import train_tokenizer
from kat.core.io import UserError
from kat.tasks import hands, swe
from kat.envs.base import InfraError, ToolCall, make_world
from kat.tasks.future import future_in_base, future_in_git, lay_out
from kat.tasks.hands import SHELL, Workspace, fitted
from kat.envs.sandbox import ExecResult, Limits, features
from kat.tasks.swe import (
    SharedBox, SoftwareEnv, SoftwareExpert, bubblewrap, edits_between, held_out, left_tree, untrue)
from kat.tasks.software import SoftwareTask, patched, plain_task, read_task, tree_patch, write_task
from kat.recipe.rollouts import ScriptPolicy, rollout

pytestmark = pytest.mark.skipif(not features().works, reason=f'bubblewrap does not work here: {features().reason}')
BASE = {'calc.py': (b'def add(a, b):\n    return a - b\n', 'file'), 'tests/test_old.py': (b'', 'file'),
        'run.sh': (b'#!/bin/sh\necho run\n', 'program'), 'logo.bin': (b'\x00\xff\x00', 'file'),
        'win.txt': (b'one\r\ntwo\r\n', 'file'), 'latin.txt': (b'caf\xe9\n', 'file'), 'here': (b'calc.py', 'link')}
GOLD = {**BASE, 'calc.py': (b'def add(a, b):\n    return a + b\n', 'file')}
TESTS = {'tests/test_calc.py': (b'from calc import add\n\ndef test_add():\n    assert add(1, 2) == 3\n', 'file')}
TASK = SoftwareTask('calc-1', 'calc', 'add subtracts', ('tests/test_calc.py::test_add',),
                    limits=dict(wall_s=60, cpu_s=20, memory_mb=1024))


def made(folder, base=BASE, gold=GOLD, tests=TESTS, **changed):
    return write_task(replace(TASK, **changed), folder, base, tests, tree_patch(base, gold))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp('tasks')
    small_site(top / 'sites/pytest')
    return made(top, site='pytest')


def small_site(folder):
    "pytest and what it needs, and nothing else: it starts faster than among all packages"
    folder.mkdir(parents=True)
    site = Path(pytest.__file__).parents[1]
    info = next(site.glob('pluggy-*.dist-info')).name
    for name in ('pytest', '_pytest', 'pluggy', 'iniconfig', 'packaging', 'pygments', info):
        shutil.copytree(site / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(site / 'py.py', folder)


@pytest.fixture(scope='module')
def box():
    return SharedBox(bubblewrap())


@pytest.fixture
def room(folder, box):
    room = Workspace(folder, box, replace(SHELL, wall_s=110))
    yield room
    room.close()
    assert not room.home.exists()


def use(room, name, **arguments):
    return room.use(name, arguments)


def played(folder, box, *turns):
    "Reset, turns of (tool, arguments), grade."
    async def episode():
        async with SoftwareEnv(box) as env:
            await env.reset(plain_task(folder))
            seen = [await env.step([ToolCall(name, args, str(i)) for i, (name, args) in enumerate(turn)])
                    for turn in turns]
            return seen, await env.grade()
    return asyncio.run(episode())


# ---- tools

def test_view_shows_files_ranges_and_folders(room):
    assert use(room, 'view', path='calc.py') == (True, '1\tdef add(a, b):\n2\t    return a - b')
    assert use(room, 'view', path='/workspace/calc.py', first=2, last=99) == (
        True, '2\t    return a - b\n[lines 2 to 2 of 2]')
    assert use(room, 'view', path='.')[1].split('\n') == sorted([*(p for p in BASE if '/' not in p), 'tests/'])
    assert use(room, 'view', path='here')[0]
    for path, said in {'no.py': 'No such file', 'logo.bin': 'binary, 3 bytes', 'tests/test_old.py': 'is empty'}.items():
        assert said in use(room, 'view', path=path)[1]
    for first, last in ((0, 1), (3, 4), (2, 1)):
        assert use(room, 'view', path='calc.py', first=first, last=last) == (False, 'calc.py has 2 lines')


def test_search_is_a_regular_expression_that_cannot_hang(room, monkeypatch):
    assert use(room, 'search', pattern=r'a [-+] b') == (True, 'calc.py:2: return a - b')
    assert use(room, 'search', pattern='def', path='tests') == (True, 'nothing found')
    assert not use(room, 'search', pattern='(')[0]
    use(room, 'shell', command='python -c "print(\'a\' * 40)" > long.txt')
    monkeypatch.setattr(hands, 'HAND', replace(hands.HAND, cpu_s=1))
    ok, text = use(room, 'search', pattern='(a+)+$b', path='long.txt')
    assert not ok and 'CPU' in text and room.spent['cpu'] == 1


def test_edit_replaces_what_occurs_once(room):
    edit = lambda **given: use(room, 'edit', **given)
    assert edit(path='calc.py', old='a - b', new='a * b') == (True, 'done')
    assert edit(path='calc.py', old='a * b', new='a * b') == (False, 'nothing changed')
    assert 'more than once' in edit(path='calc.py', old='a', new='c')[1]
    assert 'does not occur' in edit(path='calc.py', old='x', new='c')[1]
    assert edit(path='o.txt', new='x.x.x')[0] and 'more than once' in edit(path='o.txt', old='x.x', new='c')[1]
    assert 'is there' in edit(path='calc.py', new='all')[1] and 'there is no' in edit(path='x', old='a', new='b')[1]
    assert edit(path='new/deep/f.py', new='1\n') == (True, 'created')
    assert edit(path='run.sh', old='echo run', new='echo ran') == (True, 'done')
    assert edit(path='win.txt', old='one\ntwo', new='one\n2') == (True, 'done')
    assert edit(path='here', old='return', new='return 1 +') == (True, 'done')   # a link inside: the file it names
    left = left_tree(room.work, room.base)
    assert left['win.txt'][0] == b'one\r\n2\r\n' and left['run.sh'] == (b'#!/bin/sh\necho ran\n', 'program')
    assert left['here'] == BASE['here'] and left['calc.py'][0].endswith(b'return 1 + a * b\n')


def test_nothing_outside_the_workspace_is_seen_or_changed(room, tmp_path):
    secret = tmp_path / 'secret'
    secret.write_text('of the host')
    use(room, 'shell', command=f'ln -s {secret} link; ln -s {tmp_path} folder; ln -s /etc/passwd passwd; '
                               'ln -s loop loop; mkfifo pipe; mkdir -p d; ln -s ../../../../etc d/up')
    for path in ('link', 'folder', 'folder/secret', 'passwd', '../x', str(secret), 'd/up/passwd', '/proc/self/environ'):
        for name, more in (('view', {}), ('search', dict(pattern='.')), ('edit', dict(new='x'))):
            ok, text = use(room, name, path=path, **more)
            assert not ok and 'leads out of the workspace' in text, (name, path, text)
    assert not use(room, 'view', path='loop')[0] and 'is not a file' in use(room, 'view', path='pipe')[1]
    ok, text = use(room, 'search', pattern='of the host|root:')
    assert ok and text == 'nothing found'
    assert not use(room, 'shell', command=f'cat {secret}')[0] and secret.read_text() == 'of the host'
    for name in ('a\0b', 'x' * 300, '\ud800'):
        assert not use(room, 'view', path=name)[0]


def test_names_and_bytes_that_are_no_text(room):
    use(room, 'shell', command=r'''printf x > "$(printf 'two\nlines')"; printf x > "$(printf 'b\377d')"; '''
                               r'''printf '\033[31mred \377' > odd.txt''')
    ok, text = use(room, 'view', path='.')
    assert ok and r"'two\nlines'" in text and json.dumps(text).encode()
    assert use(room, 'view', path='two\nlines') == (True, '1\tx')
    ok, text = use(room, 'shell', command='cat odd.txt')
    assert ok and '�' in text
    facts = swe.changed_files(room.base, left_tree(room.work, room.base))
    assert facts['diff'].encode() and patched(room.base, facts['diff'])['odd.txt'][0].endswith(b'\xff')


def test_shell_is_bounded_and_leaves_nothing_running(room):
    ok, text = use(room, 'shell', command='echo out; echo err >&2; exit 3')
    assert (ok, text) == (False, 'out\nerr\n[exit code 3]')
    assert use(room, 'shell', command='true') == (True, '[no output]')
    ok, text = use(room, 'shell', command='echo first; yes | head -c 300000; echo last')
    assert ok and text.startswith('first') and text.endswith('last') and len(text) < hands.RESULT_ROOM + 100
    assert 'the rest is lost' in use(room, 'shell', command='yes | head -c 2000000')[1]
    ok, text = use(room, 'shell', command='(while true; do echo x >> ticks; sleep .05; done) & sleep .2; echo done')
    size = os.path.getsize(room.work / 'ticks')
    assert ok and text == 'done' and size and os.path.getsize(room.work / 'ticks') == size
    room.limits = replace(room.limits, wall_s=.5)
    ok, text = use(room, 'shell', command='sleep 9')
    assert not ok and '[ended:' in text and room.spent['wall']
    assert not use(room, 'shell', command='a\0b')[0] and not use(room, 'shell', command='x' * 200_000)[0]


def test_shell_has_python_pytest_git_and_no_network(room):
    ok, text = use(room, 'shell', command='python -c "import calc, pytest; print(calc.add(3, 1))"; git status --short; '
                                          'git commit -q --allow-empty -m mine && git log --oneline | wc -l')
    assert (ok, text) == (True, '2\n2')
    ok, text = use(room, 'shell', command='pytest -q tests; ls -a')
    assert 'no tests ran' in text and '__pycache__' not in text
    code = 'import socket; socket.create_connection(("192.0.2.1", 80), 1)'
    assert 'unreachable' in use(room, 'shell', command=f"python -c '{code}'")[1]


@given(st.text(max_size=60_000))
@settings(max_examples=30, deadline=None)
def test_results_fit(text):
    short = fitted(text, 300)
    assert len(short) <= 380 and (short == text or len(text) > 300)


@given(st.lists(st.sampled_from(['a\n', 'b\n', 'c\n', '\n', 'a', '\x0c\n', 'a\rb\n', '\x85'])).map(''.join),
       st.lists(st.sampled_from(['a\n', 'b\n', 'd\n', '\n', 'b', '\x0c', '\u2028'])).map(''.join))
@settings(max_examples=200, deadline=None)
def test_edits_lead_from_one_text_to_another(old, new):
    if not old and new:
        return
    now = old
    for part, other in edits_between(old, new):
        assert now.find(part) == now.rfind(part) >= 0
        now = now.replace(part, other)
    assert now == new


# ---- nothing of the future

def test_the_workspace_is_the_same_everywhere(tmp_path):
    heads = []
    for name in 'ab':
        lay_out(BASE, tmp_path / name)
        assert future_in_git(tmp_path / name, BASE) == []
        heads.append((tmp_path / name / '.git/refs/heads/main').read_text())
    assert heads[0] == heads[1]


SPOILS = {
    'a second commit': 'git commit -q --allow-empty -m x',
    'a branch': 'git branch fix',
    'a tag': 'git tag v2',
    'a loose object': 'echo fixed | git hash-object -w --stdin',
    'a remote': 'git remote add origin https://example.org/x',
    'an alternate': 'mkdir -p .git/objects/info; echo /tmp > .git/objects/info/alternates',
    'packed references': 'git pack-refs --all',
    'a pack': 'git gc -q',
    'a log': 'mkdir .git/logs; echo x > .git/logs/HEAD',
    'a hook': 'mkdir .git/hooks; echo x > .git/hooks/pre-commit',
    'a submodule': 'mkdir sub; git init -q sub',
    'a link to git': 'mkdir sub; echo gitdir: /tmp > sub/.git',
    'an include': 'git config include.path /tmp/x',
    'a stash': 'echo 1 > calc.py; git stash -q; git stash drop -q',
}


@pytest.mark.parametrize('name', SPOILS)
def test_every_trace_in_git_is_found(name, tmp_path):
    lay_out(BASE, tmp_path / 'w')
    env = dict(PATH=os.environ['PATH'], HOME=str(tmp_path), GIT_AUTHOR_NAME='x', GIT_AUTHOR_EMAIL='x',
               GIT_COMMITTER_NAME='x', GIT_COMMITTER_EMAIL='x')
    subprocess.run(SPOILS[name], shell=True, cwd=tmp_path / 'w', env=env, check=True, capture_output=True)
    assert future_in_git(tmp_path / 'w', BASE)


def test_the_base_must_not_hold_the_fix_or_the_tests():
    check = lambda base, tests=TESTS: future_in_base(TASK, base, GOLD, tests)
    assert check(BASE) == []
    assert 'build/lib/calc.py' in check({**BASE, 'build/lib/calc.py': GOLD['calc.py']})[0]
    assert check({**BASE, 'old/calc.py': BASE['calc.py']}) == []
    assert 'release of calc' in check({**BASE, 'dist/calc-2.0.tar.gz': (b'', 'file')})[0]
    assert check({**BASE, 'dist/other-2.0.tar.gz': (b'', 'file')}) == []
    assert 'tests that decide' in check(BASE | TESTS)[0]
    words = lambda *own: ('\n'.join([*(f'msgid "{n}"' for n in range(30)), *own]).encode(), 'file')
    french, danish = [f'msgstr "{n} ans"' for n in range(30)], [f'msgstr "{n} aar"' for n in range(29)]
    base = {**BASE, 'fr/x.po': words(*french), 'da/x.po': words(*danish, 'msgstr "billion"')}
    gold = {**base, 'fr/x.po': words(*french, 'msgstr "billion"')}
    assert future_in_base(TASK, base, gold, TESTS) == []   # another language, with the same words in one line
    copied = {**base, 'build/x.po': (gold['fr/x.po'][0] + b'\n', 'file')}
    assert 'build/x.po' in future_in_base(TASK, copied, gold, TESTS)[0]
    assert 'hidden.py of the base' in check({**BASE, 'hidden.py': TESTS['tests/test_calc.py']})[0]


@pytest.mark.parametrize('files, said', [
    ({'calc.py': GOLD['calc.py'][0]}, 'calc.py holds the fix'),
    ({'vendor/calc.py': GOLD['calc.py'][0] + b'# later\n'}, 'vendor/calc.py holds the fix'),
    ({'calc-2.0.dist-info/METADATA': b''}, 'calc is installed'),
    ({'wheels/calc-2.0-py3-none-any.whl': b''}, 'is a release of it'),
    ({'calc.py': BASE['calc.py'][0]}, None)])
def test_installed_packages_must_not_hold_the_fix(files, said, tmp_path, box):
    site = tmp_path / 'sites/s'
    for path, content in {'pytest.py': b'', **files}.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
    folder = made(tmp_path, site='s')
    if said is None:
        Workspace(folder, box).close()
    else:
        with pytest.raises(InfraError, match=f'task calc-1 is not played.*{said}'):
            Workspace(folder, box)


def test_a_network_or_an_index_would_be_found(folder, box):
    class Leaky:
        def exec(self, argv, *given, env=None, **more):
            got = box.exec(argv, *given, env={'PIP_INDEX_URL': 'https://example.org'}, **more)
            return replace(got, stdout=got.stdout.replace('"net": ["lo"]', '"net": ["eth0", "lo"]'))
    with pytest.raises(InfraError, match='there is a network: eth0; packages could come from PIP_INDEX_URL'):
        Workspace(folder, Leaky())


# ---- grading

FIX = ('edit', dict(path='calc.py', old='a - b', new='a + b'))


def test_a_fix_is_graded_with_its_patch(folder, box):
    seen, grade = played(folder, box, [('view', dict(path='calc.py')), FIX, ('submit', {}), FIX])
    assert [r.id for r in seen[0].results] == ['0', '1', '2'] and seen[0].done
    assert grade.reward == 1 and patched(BASE, grade.info['diff']) == GOLD and not grade.info['limits']
    assert grade.info['patch'] == {'calc.py': 'def add(a, b):\n    return a + b\n'} and json.dumps(grade.info)
    assert grade.info['future']['network'] == ['lo']


def test_wrong_calls_are_told(folder, box):
    seen, grade = played(folder, box, [('fly', {}), ('view', {}), ('view', dict(path=3)), ('submit', {})])
    assert [r.ok for r in seen[0].results] == [False] * 3 + [True] and grade.reward == 0
    assert grade.info['diff'] == '' and grade.tests == {'tests/test_calc.py::test_add': False}


@pytest.mark.parametrize('command', [
    'rm -rf .git', 'rm -rf .git; ln -s /etc .git', 'rm -rf .git; echo gitdir: /tmp > .git',
    'git config core.hooksPath /tmp; git config core.fsmonitor "touch x"; echo "* filter=x" > .git/info/attributes',
    'git commit -qam done; git reset -q --soft HEAD~1; rm -f .git/index',
    'printf "*.py -diff\\n* filter=evil\\n" > .gitattributes; echo "*" > .gitignore', 'chmod 000 tests; chmod 500 .'])
def test_what_becomes_of_git_does_not_matter(command, folder, box):
    _, grade = played(folder, box, [FIX, ('shell', dict(command=command)), ('submit', {})])
    assert grade.reward == 1 and 'a + b' in grade.info['diff']


def test_links_and_tests_of_the_agent_do_not_decide(folder, box):
    command = ('rm calc.py; ln -s /etc/passwd calc.py; printf "def test_add(): pass\\n" > tests/test_calc.py; '
               'printf "import pytest\\n" > conftest.py')
    _, grade = played(folder, box, [('shell', dict(command=command)), ('submit', {})])
    assert grade.reward == 0 and {'conftest.py', 'tests/test_calc.py'} <= set(grade.info['restored'])


@pytest.mark.parametrize('command, said', [
    ('for i in 1 2 3; do truncate -s 20M big$i; done', 'MB larger'),
    ('python -c "import os\nfor i in range(90): os.mkdir(\'d\'); os.chdir(\'d\')"', 'folders deep'),
    ('mkdir m; cd m; python -c "for i in range(20500): open(str(i), \'w\').close()"', 'files more')])
def test_a_workspace_that_is_too_large_fails_and_is_not_read(command, said, folder, box):
    _, grade = played(folder, box, [FIX, ('shell', dict(command=command)), ('submit', {})])
    assert grade.reward == 0 and said in grade.info['failed']


def test_a_failing_sandbox_is_no_grade(folder, box):
    class Failing:
        broken, python = False, box.python
        def exec(self, argv, *given, **more):
            if Failing.broken: raise InfraError('sandbox: gone')
            return box.exec(argv, *given, **more)
    async def episode():
        async with SoftwareEnv(Failing()) as env:
            await env.reset(plain_task(folder))
            Failing.broken = True
            for work in (env.step([ToolCall('view', dict(path='.'))]), env.grade()):
                with pytest.raises(InfraError, match='gone'):
                    await work
    asyncio.run(episode())


def test_giving_up_an_episode_waits_for_its_command_and_leaves_nothing(folder, box):
    async def episode():
        env = SoftwareEnv(box)
        await env.reset(plain_task(folder))
        home = env.room.home
        work = asyncio.ensure_future(env.step([ToolCall('shell', dict(command='sleep .4; echo > late'))]))
        await asyncio.sleep(.1)
        work.cancel()
        await env.close()
        await env.close()
        return home
    assert not asyncio.run(episode()).exists()


# ---- the engineer, and the world

HARD = {'edits': {**GOLD, 'calc.py': (b'# top\n\ndef add(a, b):\n    return a + b\n\nLIMIT = 3', 'program')},
        'new, gone, moved': {**{p: c for p, c in GOLD.items() if p not in ('logo.bin', 'here')},
                             'pkg/__init__.py': (b'', 'file'), "it's \\0 new.py": ('é = 1\n'.encode(), 'file'),
                             'there': (b'calc.py', 'link'), 'data.bin': (bytes(range(256)), 'program')},
        'bytes': {**GOLD, 'latin.txt': (b'th\xe9\n', 'file'), 'win.txt': (b'one\r\n2\r\n', 'file'),
                  'run.sh': (b'', 'file')}}


@pytest.mark.parametrize('name', HARD)
def test_the_engineer_makes_the_fix_with_the_tools(name, folder, box):
    folder = made(folder.parent, gold=HARD[name], id='hard', site='pytest')
    async def episode():
        async with SoftwareEnv(box) as env:
            task, agent = plain_task(folder), SoftwareExpert(plain_task(folder))
            await env.reset(task)
            while not env.done:
                await env.step(agent.act(None))
            return await env.grade()
    grade = asyncio.run(episode())
    assert patched(BASE, grade.info['diff']) == HARD[name] and grade.reward == 1


def test_the_engineer_solves_a_task_through_gateway_and_agent(folder, box):
    "The same engineer as a model behind the gateway: its calls as text, in a chat template, and back"
    tokenizer = train_tokenizer(['def add(a, b):\n    return a + b\n'] * 9, 300)
    policy = ScriptPolicy(tokenizer, lambda episode: SoftwareExpert(episode.task))
    make = lambda *task: SoftwareEnv(box)
    played, = rollout(policy, tokenizer, [plain_task(folder)], make, max_turns=20, max_len=99_000)
    assert played.reward == 1 and played.info['finish'] == 'submit' and played.info['patch'].keys() == {'calc.py'}


def test_repositories_are_on_one_side(tmp_path, monkeypatch):
    repos = [f'p{i}' for i in range(12)]
    for i, repo in enumerate(repos * 2):
        made(tmp_path, id=f't-{i}', repo=repo)
    monkeypatch.setenv('KAT_TASKS', str(tmp_path))
    world = make_world('swe')
    kinds = [{task.kind for task in side} for side in world.split]
    assert kinds[0] | kinds[1] == set(repos) and not kinds[0] & kinds[1] and all(kinds)
    assert kinds[1] == set(filter(held_out, repos)) and len(world.heldout(99)) == 2 * len(kinds[1])
    n = len(world.split[0])
    first, again = ([world.train_task(5, i).id for i in range(k * n, k * n + n)] for k in (0, 1))
    assert sorted(first) == sorted(again) and len(set(first)) == n
    assert read_task(tmp_path / 't-0').id == 't-0'


def test_a_missing_folder_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv('KAT_TASKS', str(tmp_path / 'none'))
    with pytest.raises(UserError, match='envs=swe: .*none: no such folder'):
        make_world('swe').heldout(1)


def test_a_task_whose_fix_fails_is_told(folder):
    code = lambda op: {**BASE, 'calc.py': (f'def add(a, b):\n    return {op}\n'.encode(), 'file')}
    bad = made(folder.parent, id='bad', gold=code('a * b'), site='pytest')
    easy = made(folder.parent, id='easy', base=code('b + a'), site='pytest')
    said = [asyncio.run(untrue(where, bubblewrap())) for where in (bad, easy)]
    assert 'task bad: its own fix is not resolved' in said[0] and said[1] == 'task easy: its tests pass without the fix'


def test_limits_of_a_run_are_told_apart():
    box = SharedBox(bubblewrap(), 1)
    assert box == SharedBox(bubblewrap(), 2) and box.seconds == 0 and isinstance(SHELL, Limits)
    assert isinstance(box.exec(['/bin/true'], '/'.join([str(Path.cwd())])), ExecResult) and box.seconds > 0
