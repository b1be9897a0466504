"Others' task sets and predictions: read into one record, refused by file, row and field, played from clones"
import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.envs.base import InfraError
from kat.tasks.foreign import (
    SCHEMAS, clone_tree, foreign_task, grade_predictions, play_foreign, read_foreign, read_predictions,
    write_predictions)
from kat.envs.sandbox import Bubblewrap, features
from kat.tasks.software import base_tree, gold_tree, read_task, tree_patch

DATA = Path(__file__).parents[1] / 'helpers/swebench'
OWN = dict(instance_id='o__n-1', repo='o/n', base_commit='1' * 40, patch='fix', test_patch='tests',
           problem_statement='bad', FAIL_TO_PASS=['t.py::a'], PASS_TO_PASS=['t.py::b'])
MULTI = dict(org='o', repo='n', number=7, title='PR', body=None, base=dict(label='main', ref='main', sha='1' * 40),
             resolved_issues=[dict(number=3, title='Broken', body='It is.'), dict(number=4, title='Also', body=None)],
             fix_patch='fix', test_patch='tests', f2p_tests={'t.py::a': {}}, n2p_tests={'t.py::n': {}}, s2p_tests={},
             p2p_tests={'t.py::b': {}}, fixed_tests={}, lang='Python')
ROWS = {  # a row as each set publishes it
    'swe-bench': OWN | dict(FAIL_TO_PASS='["t.py::a"]', PASS_TO_PASS='["t.py::b"]', version='1.0', hints_text=None,
                            environment_setup_commit='2' * 40, created_at='x', difficulty='<15 min fix'),
    'swe-gym': OWN | dict(version='1', hints_text='', created_at='x'),
    'swe-rebench': OWN | dict(install_config=dict(python='3.9'), docker_image='img:1', meta={}, language='python'),
    'swe-smith': dict(instance_id='o__n.1234567.func_x', repo='swesmith/o__n.1234567', patch='bug', image_name='img:1',
                      FAIL_TO_PASS=['t.py::a'], PASS_TO_PASS=['t.py::b'], problem_statement='bad'),
    'multi-swe-bench': MULTI}


@pytest.mark.parametrize('name', ROWS)
def test_every_schema_becomes_the_same_record(name):
    task = foreign_task(ROWS[name], 'here')
    assert task.schema == name and task.repo == 'o/n' and task.fail_to_pass[0] == 't.py::a'
    assert task.pass_to_pass == ('t.py::b',) and task.base_commit.startswith('1') and task.language == 'python'
    assert (task.gold, task.bug) == (('', 'bug') if name == 'swe-smith' else ('fix', ''))
    assert set(task.more).isdisjoint({'patch', 'repo', 'FAIL_TO_PASS', 'fix_patch'})
    assert set(ROWS) == set(SCHEMAS)


def test_a_pull_request_tells_its_issues():
    task = foreign_task(MULTI, 'here')
    assert task.statement == 'Broken\n\nIt is.\n\nAlso' and task.fail_to_pass == ('t.py::a', 't.py::n')
    assert task.id == 'o__n-7'
    assert foreign_task(MULTI | dict(resolved_issues=None, body='words'), 'here').statement == 'PR\n\nwords'


@pytest.mark.parametrize('row, said', [
    ([], 'a row must be an object'), (dict(a=1), 'no known schema'), (OWN | dict(FAIL_TO_PASS='x'), 'FAIL_TO_PASS'),
    (OWN | dict(PASS_TO_PASS=[1]), 'PASS_TO_PASS must be a list of texts'),
    (OWN | dict(patch=3), 'patch must be a text'),
    (OWN | dict(instance_id=None), 'instance_id or repo is empty'), (OWN | dict(FAIL_TO_PASS='{}'), 'FAIL_TO_PASS'),
    (MULTI | dict(resolved_issues='x'), 'resolved_issues must be a list')])
def test_odd_rows_are_refused_by_place_and_field(row, said):
    with pytest.raises(ValueError, match=f'^rows:3: .*{said}'):
        foreign_task(row, 'rows:3')


@given(st.sampled_from(sorted(ROWS)), st.data())
@settings(max_examples=150, deadline=None)
def test_no_row_ends_in_anything_but_a_record_or_one_line(name, data):
    row = dict(ROWS[name])
    for key in data.draw(st.sets(st.sampled_from(sorted(row)), max_size=3)):
        row[key] = data.draw(st.one_of(st.none(), st.text(max_size=4), st.integers(),
                                       st.lists(st.integers(), max_size=2),
                                       st.dictionaries(st.text(max_size=2), st.none(), max_size=1)))
    try:
        assert foreign_task(row, 'rows:1').id
    except ValueError as error:
        assert str(error).startswith('rows:1: ') and '\n' not in str(error)


def test_files_of_every_kind(tmp_path):
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet
    row = ROWS['swe-gym']
    (tmp_path / 'a.json').write_text(json.dumps([row]))
    (tmp_path / 'b.json').write_text(json.dumps({'o__n-1': row}))
    (tmp_path / 'c.jsonl').write_text(json.dumps(row) + '\n\n' + json.dumps(row) + '\n')
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / 'd.parquet')
    tasks = [read_foreign(path) for path in sorted(tmp_path.iterdir())]
    assert all(one == tasks[0] for one in tasks) and len(tasks[0]) == 1
    for name, text, said in (('e.jsonl', '{}\n{', 'e.jsonl:2: not JSON'), ('f.csv', '', 'must be .json'),
                             ('g.parquet', 'x', 'g.parquet: '), ('h.json', '\udcff', 'not UTF-8'),
                             ('i.jsonl', json.dumps(row) + '\n' + json.dumps(row | dict(patch='y')), 'there twice')):
        (tmp_path / name).write_bytes(text.encode(errors='surrogateescape'))
        with pytest.raises(ValueError, match=said):
            read_foreign(tmp_path / name)


@pytest.mark.parametrize('name', ['dev_easy', 'lite_test_sample'])
def test_real_files_are_read(name):
    tasks = read_foreign(DATA / f'{name}.json')
    assert tasks and all(t.schema == 'swe-bench' and t.gold and t.test_patch and t.fail_to_pass for t in tasks)


# ---- played from clones

def git(folder, *words):
    env = dict(PATH=os.environ['PATH'], HOME=str(folder), GIT_AUTHOR_NAME='x', GIT_AUTHOR_EMAIL='x',
               GIT_COMMITTER_NAME='x', GIT_COMMITTER_EMAIL='x')
    return subprocess.run(['git', *words], cwd=folder, env=env, check=True, capture_output=True).stdout.decode().strip()


@pytest.fixture
def clone(tmp_path):
    "A clone with two commits; attributes that would change what an archive of it holds"
    folder = tmp_path / 'clones/o__n'
    (folder / 'pkg').mkdir(parents=True)
    git(folder, 'init', '-q')
    files = {'calc.py': b'def add(a, b):\n    return a - b\n',
             '.gitattributes': b'*.md export-ignore\n* ident text=auto\n',
             'README.md': b'$Id$\n', 'pkg/win.txt': b'a\nb\n', 'test_old.py': b'def test_old():\n    assert True\n'}
    for path, content in files.items():
        (folder / path).write_bytes(content)
    (folder / 'run').write_text('#!/bin/sh\n')
    (folder / 'run').chmod(0o755)
    (folder / 'to').symlink_to('calc.py')
    git(folder, 'add', '-A')
    git(folder, 'commit', '-qm', 'one')
    (folder / 'calc.py').write_text('the future\n')
    git(folder, 'commit', '-qam', 'two')
    return folder


def test_a_commit_is_read_byte_by_byte(clone):
    tree = clone_tree(clone, git(clone, 'rev-parse', 'HEAD~1'))
    assert tree['README.md'] == (b'$Id$\n', 'file') and tree['to'] == (b'calc.py', 'link')
    assert tree['run'][1] == 'program' and tree['calc.py'][0].startswith(b'def add')
    assert not any('.git/' in path for path in tree)


def row_of(clone, **changes):
    commit = git(clone, 'rev-parse', 'HEAD~1')
    code = clone_tree(clone, commit)
    fixed = {**code, 'calc.py': (b'def add(a, b):\n    return a + b\n', 'file')}
    tests = {**code, 'test_new.py': (b'from calc import add\ndef test_add():\n    assert add(1, 2) == 3\n', 'file')}
    row = OWN | dict(base_commit=commit, patch=tree_patch(code, fixed), test_patch=tree_patch(code, tests),
                     FAIL_TO_PASS=['test_new.py::test_add'], PASS_TO_PASS=['test_old.py::test_old'])
    return row | changes, code, fixed


def test_a_row_becomes_a_task(clone, tmp_path):
    row, code, fixed = row_of(clone)
    where = play_foreign(foreign_task(row, 'here'), clone.parent, tmp_path / 'tasks')
    assert base_tree(where) == code and gold_tree(where) == fixed
    assert os.listdir(where / 'tests') == ['test_new.py']
    assert read_task(where).origin['commit'] == row['base_commit']


def test_a_bug_that_was_put_in_becomes_a_task(clone, tmp_path):
    _, code, fixed = row_of(clone)
    for path, content in {'calc.py': fixed['calc.py'][0], 'test_new.py': b'from calc import add\n'}.items():
        (clone / path).write_bytes(content)
    git(clone, 'add', '-A')
    git(clone, 'commit', '-qm', 'three')
    right = clone_tree(clone, head := git(clone, 'rev-parse', 'HEAD'))
    broken = {**right, 'calc.py': code['calc.py']}
    row = dict(instance_id='x', repo=f'swesmith/o__n.{head[:8]}', patch=tree_patch(right, broken), image_name='i',
               FAIL_TO_PASS=['test_new.py::test_add'], PASS_TO_PASS=['test_old.py::test_old'], problem_statement='bad')
    where = play_foreign(foreign_task(row, 'here'), clone.parent, tmp_path / 'tasks')
    hidden = {path: one for path, one in right.items() if path != 'test_new.py'}
    assert gold_tree(where) == hidden and base_tree(where) == {**hidden, 'calc.py': code['calc.py']}
    assert sorted(os.listdir(where / 'tests')) == ['test_new.py', 'test_old.py']


@pytest.mark.parametrize('changes, said', [
    (dict(repo='o/other'), 'no clone of o/other'), (dict(repo='../n'), 'no clone of'),
    (dict(base_commit='3' * 40), 'git ls-tree'), (dict(base_commit='--help'), 'is no commit'),
    (dict(base_commit=''), 'names no commit'), (dict(FAIL_TO_PASS=['test_add']), 'no test of pytest'),
    (dict(problem_statement=None), 'statement must be a text'), (dict(patch='nonsense'), 'does not apply'),
    (dict(test_patch='nonsense'), 'does not apply'), (dict(FAIL_TO_PASS=[]), 'fail_to_pass is empty'),
    (dict(instance_id='../x'), 'name for a folder')])
def test_what_cannot_be_played_is_read_and_then_refused_in_one_line(changes, said, clone, tmp_path):
    task = foreign_task(row_of(clone, **changes)[0], 'here')
    with pytest.raises(ValueError, match=f'can not be played: .*{said}') as error:
        play_foreign(task, clone.parent, tmp_path / 'tasks')
    assert '\n' not in str(error.value)
    assert not list(tmp_path.glob('tasks/*/task.json'))


# ---- predictions

def test_predictions_are_written_and_read(tmp_path):
    file = tmp_path / 'p.jsonl'
    patches = {'a': 'diff é \udcff', 'b': ''}
    write_predictions(file, patches, 'm')
    assert read_predictions(file) == patches and os.listdir(tmp_path) == ['p.jsonl']
    assert set(json.loads(file.read_text().split('\n')[0])) == {'instance_id', 'model_name_or_path', 'model_patch'}
    for text, said in (('{"instance_id": "a"}', 'p.jsonl:1: a prediction has'),
                       ('{"instance_id": "a", "model_patch": 3}', 'model_patch must be'),
                       ('{"instance_id": "a", "model_patch": null}\n' * 2, 'p.jsonl:2: a is there twice')):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_predictions(file)


@pytest.mark.skipif(not features().works, reason=f'bubblewrap does not work here: {features().reason}')
def test_predictions_are_graded_and_infrastructure_is_no_failure(clone, tmp_path):
    row, code, fixed = row_of(clone)
    where = play_foreign(foreign_task(row, 'here'), clone.parent, tmp_path / 'tasks')
    patches = dict(gold=row['patch'], none=None, odd='nonsense', gone='x',
                   tests=tree_patch(code, {**code, 'test_new.py': (b'def test_add(): pass\n', 'file')}))
    said = asyncio.run(grade_predictions(patches, dict.fromkeys(('gold', 'none', 'odd', 'tests'), where), Bubblewrap()))
    assert {name: one['resolved'] for name, one in said.items()} == dict(gold=True, none=False, odd=False, gone=None,
                                                                         tests=False)
    assert said['none']['why'] == 'no patch' and 'does not apply' in said['odd']['why']
    assert said['tests']['restored'] == ['test_new.py']
    class Gone:
        python = '/usr/bin/python3'
        def exec(self, *given, **more):
            raise InfraError('sandbox: gone')
    said = asyncio.run(grade_predictions(dict(gold=row['patch']), dict(gold=where), Gone()))
    assert said == dict(gold=dict(resolved=None, why='sandbox: gone'))
