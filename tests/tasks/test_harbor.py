"Harbor's folders: out and in without loss, refused by name where odd, and a verifier that isn't fooled by tests"
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.envs.grade import read_tree, write_tree
from kat.tasks.harbor import HarborTask, from_harbor, read_harbor, tar_tree, to_harbor, tree_tar, write_harbor
from kat.tasks.software import SoftwareTask, tree_patch, write_task

BASE = {'calc.py': (b'def add(a, b):\n    return a - b\n', 'file'), 'run.sh': (b'#!/bin/sh\n', 'program'),
        'to': (b'calc.py', 'link'), '.gitignore': (b'*\n', 'file'), 'b\udcffin': (b'\x00\xff', 'file')}
GOLD = {**BASE, 'calc.py': (b'def add(a, b):\n    return a + b\n', 'file')}
TESTS = {'tests/test_calc.py': (b'from calc import add\n\ndef test_add():\n    assert add(1, 2) == 3\n', 'file')}
TASK = SoftwareTask('calc-1', 'o/calc', 'add "subtracts" é\n\n# canary\n', ('tests/test_calc.py::test_add',),
                    origin=dict(pins=[['pytest', '9.2.0', 'ab']]))


@pytest.fixture
def folder(tmp_path):
    return write_task(TASK, tmp_path / 'kat', BASE, TESTS, tree_patch(BASE, GOLD))


def test_out_and_in_changes_nothing(folder, tmp_path):
    out = write_harbor(to_harbor(folder), tmp_path / 'harbor')
    back = from_harbor(read_harbor(out), tmp_path / 'again')
    assert read_tree(back) == read_tree(folder) and read_tree(back / 'base') == BASE
    again = write_harbor(replace(read_harbor(out), name='copy'), tmp_path / 'harbor')
    assert read_tree(again) == read_tree(out)
    with pytest.raises(ValueError, match='is there already'):
        write_harbor(read_harbor(out), tmp_path / 'harbor')


def test_the_agent_sees_neither_tests_nor_fix(folder):
    task = to_harbor(folder)
    seen = b''.join(content for path, (content, _) in task.files.items()
                    if path.startswith('environment/') or path == 'instruction.md')
    assert b'test_add' not in seen and b'a + b' not in seen and b'a - b' in seen
    assert task.separate and task.config['environment']['network_mode'] == 'no-network'
    assert task.instruction == TASK.statement and 'pytest==9.2.0' in task.files['environment/Dockerfile'][0].decode()


@pytest.mark.parametrize('name', ['a"b', 'ü..x', '-', 'a b\n'])
def test_names_are_quoted(name, folder, tmp_path):
    where = write_task(replace(TASK, id=name, repo=name), tmp_path / 'odd', BASE, TESTS, tree_patch(BASE, GOLD))
    config = tomllib.loads(to_harbor(where).files['task.toml'][0].decode())
    assert config['metadata']['repo'] == name and config['task']['name'].startswith('kat/')


def odd(**changes):
    files = {'task.toml': b'[verifier]\n', 'instruction.md': b'x', 'tests/test.sh': b'', 'environment/Dockerfile': b''}
    return {path: (content, 'file') for path, content in {**files, **changes}.items() if content is not None}


@pytest.mark.parametrize('changes, said', [
    ({'task.toml': None}, 'task.toml is missing'), ({'tests/test.sh': None}, 'tests/test.sh is missing'),
    ({'task.toml': b'['}, 'task.toml or instruction.md'), ({'instruction.md': b'\xff'}, 'task.toml or instruction.md'),
    ({'environment/Dockerfile': None}, 'neither environment/ nor')])
def test_odd_folders_are_refused_by_name(changes, said, tmp_path):
    write_tree(odd(**changes), tmp_path)
    with pytest.raises(ValueError, match=said):
        read_harbor(tmp_path)


def test_others_folders_are_kept_but_not_played(tmp_path):
    files = odd(**{'task.toml': b'[verifier]\nenvironment_mode = "shared"\n', 'extra/x.bin': b'\x00'})
    write_tree(files, tmp_path / 'theirs')
    task = read_harbor(tmp_path / 'theirs')
    assert not task.separate and read_tree(write_harbor(task, tmp_path / 'out')) == files
    with pytest.raises(ValueError, match='theirs: environment/base.tar is missing: not written by kat'):
        from_harbor(task, tmp_path / 'kat')


@pytest.mark.parametrize('path', ['/etc/passwd', '../x', 'a/../../x', '.git/hooks/x'])
def test_archives_stay_in_their_folder(path, folder, tmp_path):
    task = to_harbor(folder)
    files = {**task.files, 'environment/base.tar': (tree_tar({path: (b'', 'file')}), 'file')}
    with pytest.raises(ValueError, match='leaves the folder'):
        from_harbor(HarborTask('x', files, {}), tmp_path / 'kat')
    with pytest.raises(ValueError, match='not a tar archive'):
        tar_tree(b'no archive' * 100, 'here')


@given(st.dictionaries(st.lists(st.text(st.characters(exclude_characters='/\0', exclude_categories=['Cs']), min_size=1,
                                        max_size=9).filter(lambda p: p not in ('.', '..', '.git')), min_size=1,
                                max_size=3).map('/'.join),
                       st.tuples(st.binary(max_size=50), st.sampled_from(['file', 'program'])), max_size=5))
@settings(max_examples=60, deadline=None)
def test_trees_survive_archives(tree):
    assert tar_tree(tree_tar(tree), 'here') == tree


def verified(folder, tree, tmp_path, name):
    "What the verifier says of a tree"
    out = to_harbor(folder)
    given, work, logs = tmp_path / f'{name}.given', tmp_path / name, tmp_path / f'{name}.logs'
    write_tree(out.files, given)
    work.mkdir()
    write_tree(tree, work)
    ran = subprocess.run([sys.executable, '-I', given / 'tests/verify.py', work, given / 'tests',
                          given / 'environment/base.tar', logs], capture_output=True, text=True,
                         env=dict(os.environ, PYTEST_DISABLE_PLUGIN_AUTOLOAD='1'))
    return json.loads((logs / 'reward.json').read_text())['reward'] if not ran.returncode else ran.stderr


HOOK = b'import pytest\n@pytest.hookimpl(wrapper=True)\ndef pytest_runtest_makereport(item, call):\n' \
       b'    report = yield\n    report.outcome = "passed"\n    return report\n'


def test_the_verifier_puts_back_what_decides(folder, tmp_path):
    say = lambda name, tree: verified(folder, tree, tmp_path, name)
    assert say('gold', GOLD) == 1 and say('nothing', BASE) == 0
    assert say('hook', {**BASE, 'conftest.py': (HOOK, 'file')}) == 0
    assert say('exit', {**BASE, 'calc.py': (b'import os\nos._exit(0)\n', 'file')}) == 0
