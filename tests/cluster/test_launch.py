"Running one notebook: typed parameters, refusals, and failures told in one line"
import json
import math

import nbformat
import pytest
from hypothesis import given, settings, strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from papermill.translators import PythonTranslator

from kat.core.io import UserError
from kat.cluster.launch import (NotebookFailed, Parameter, check_parameters, fits, full_disk, misfit, parse_value,
                                read_parameters, run_notebook, set_parameters)


def notebook(path, parameters, *code):
    nb = new_notebook(cells=[new_code_cell(parameters, metadata=dict(tags=['parameters'])), *map(new_code_cell, code)])
    nbformat.write(nb, path)
    return path

VALUES = dict(int=st.integers(), bool=st.booleans(), float=st.floats(allow_nan=False))
VALUES |= {'dict': st.dictionaries(st.text(), st.integers()), 'int | None': st.none(),
           'list[str]': st.lists(st.text()), 'list[float]': st.lists(st.integers())}

@given(st.one_of(*(st.tuples(st.just(k), v) for k, v in VALUES.items())))
def test_values_survive_as_json_and_as_python(case):
    kind, value = case
    for text in (json.dumps(value), repr(value)):
        got = parse_value(text, kind)
        assert got == value and fits(got, kind)

@given(st.text())
def test_a_string_parameter_is_the_text_itself(text):
    assert parse_value(text, 'str') == text

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ANYTHING = st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text() | st.integers(), x) | st.tuples(x, x),
                        max_leaves=6)

def same(a, b):
    "Equal, of the same types all the way down, zeros of the same sign"
    if type(a) is not type(b): return False
    if isinstance(a, list): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))

@settings(max_examples=300, deadline=None)
@given(ANYTHING)
def test_a_notebook_gets_a_value_as_given_or_it_is_refused(value):
    if misfit(value): return
    cell = {}
    exec(PythonTranslator.codify({'given': value}), cell)     # what papermill writes into the notebook
    assert same(cell['given'], value)
    assert same(json.loads(json.dumps(value, allow_nan=False).encode()), value)   # and into its metadata

@pytest.mark.parametrize('pair, words', [
    ('lr=nan', 'nan is no number in JSON'), ('lr=1e999', 'inf is no number in JSON'),
    ("cfg={'k': (1, 2)}", 'a tuple would arrive as text: write a list'), ('cfg={1: 2}', "write '1'"),
    ("cfg={'k': [{'x': float}]}", 'is of type dict'), ('cfg={"k": {"j": -Infinity}}', '-inf is no number')])
def test_what_would_not_arrive_is_refused(tmp_path, pair, words):
    path = notebook(tmp_path/'a.ipynb', 'lr: float = 1.0\ncfg: dict = {}')
    with pytest.raises(UserError, match=words):
        set_parameters(read_parameters(path), [pair], 'a')

def test_nothing_is_run_with_what_would_not_arrive(tmp_path):
    path = notebook(tmp_path/'a.ipynb', 'lr: float = 1.0', 'lr')
    for odd in float('nan'), (1, 2), {1: 2}:
        with pytest.raises(UserError, match='a: lr = '):
            run_notebook(path, tmp_path/'out'/'a.ipynb', dict(lr=odd))
        with pytest.raises(UserError):
            check_parameters(read_parameters(path), dict(lr=odd), 'a')
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('text, kind', [
    ('5.5', 'int'), ('1', 'bool'), ('True', 'int'), ('yes', 'bool'), ('', 'int'), ('abc', 'float'), ('{}', 'list'),
    ('["a", 1]', 'list[str]'), ('None', 'int'), ('{[]: 1}', 'dict'), ('('*9999, 'list')])
def test_what_does_not_fit_is_refused(text, kind):
    with pytest.raises(ValueError):
        parse_value(text, kind)

def test_false_is_false_and_none_is_none():
    assert parse_value('false', 'bool') is False and parse_value('False', 'bool') is False
    assert parse_value('None', 'str | None') is None and parse_value('none', 'str | None') == 'none'
    assert parse_value('3', 'float') == 3.0 and type(parse_value('3', 'float')) is float
    assert parse_value('inf', 'float') == float('inf')

def test_declarations(tmp_path):
    cell = '# all of it\nn: int = -3  # how many\nname = "x=y"  # who\n'
    cell += 'd: dict = {"a":\n  1}  # more\nx: float | None = None'
    assert list(read_parameters(notebook(tmp_path/'a.ipynb', cell)).values()) == [
        Parameter('n', 'int', -3, 'how many'), Parameter('name', 'str', 'x=y', 'who'),
        Parameter('d', 'dict', {'a': 1}, 'more'), Parameter('x', 'float | None', None, '')]

def test_refusals_name_file_and_parameter(tmp_path):
    declared = read_parameters(notebook(tmp_path/'a.ipynb', 'steps: int = 1\nlr: float = 0.1'))
    for pair, parts in [('step=3', ["'step'", 'did you mean steps', 'a.ipynb', 'lr']), ('steps=x', ['steps=x', 'int']),
                        ('steps', ['key=value'])]:
        with pytest.raises(UserError) as caught:
            set_parameters(declared, [pair], 'a.ipynb')
        assert all(part in str(caught.value) for part in parts) and '\n' not in str(caught.value)
    for values in dict(steps=1), dict(steps=1, lr='0.1'), dict(steps=1., lr=1), dict(steps=1, lr=1, more=1):
        with pytest.raises(UserError):
            check_parameters(declared, values, 'a')
    assert check_parameters(declared, dict(steps=1, lr=1), 'a')
    notebook(tmp_path/'b.ipynb', 'n: int = 1\nm = 2*n')
    (tmp_path/'c.ipynb').write_text('{"cells": [')
    notebook(tmp_path/'d.ipynb', 'n: int = ')
    for name in 'bcde':
        with pytest.raises(UserError, match=f'{name}.ipynb'):
            read_parameters(tmp_path/f'{name}.ipynb')
    with pytest.raises(UserError, match='type Path'):
        fits(1, 'Path')

MODES = '''
if mode == 'good': print([steps, flag, name])
if mode == 'user':
    from kat.core.io import UserError
    raise UserError('model.safetensors is damaged:\\n delete it')
if mode == 'full':
    with open('/dev/full', 'w') as f: f.write('x')
if mode == 'dead':
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
if mode == 'bad': 1/0
'''

@pytest.fixture(scope='module')
def modes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('{braces} and spaces')
    return notebook(folder/'modes.ipynb', 'mode: str = "bad"\nsteps: int = 1\nflag: bool = True\nname: str = ""', MODES)

def test_typed_values_reach_the_notebook(modes, tmp_path):
    out = tmp_path/'new'/'modes.ipynb'
    pairs = ['mode=good', 'steps=7', 'flag=false', 'name=a "b" {c}\\n']
    values = set_parameters(read_parameters(modes), pairs, 'modes')
    used = run_notebook(modes, out, values)
    assert nbformat.read(out, as_version=4).cells[-1].outputs[0].text == str([7, False, 'a "b" {c}\\n']) + '\n'
    assert used['wall_s'] > 0 and used['peak_rss_mb'] > 10
    assert [path.name for path in out.parent.iterdir()] == ['modes.ipynb']

@pytest.mark.parametrize('mode, error, parts', [
    ('user', UserError, ['modes: ', 'model.safetensors is damaged: delete it']),
    ('full', UserError, ['modes: the disk is full', 'make room']),
    ('dead', NotebookFailed, ['modes: its process: dead: killed']),
    ('bad', NotebookFailed, ['modes: cell [3]: ZeroDivisionError: division by zero'])])
def test_failures_are_one_line_and_leave_the_copy(modes, tmp_path, mode, error, parts):
    out = tmp_path/'modes.ipynb'
    with pytest.raises(error) as caught:
        run_notebook(modes, out, dict(mode=mode))
    assert all(part in str(caught.value) for part in parts) and '\n' not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ['modes.failed.ipynb']

def test_the_source_notebook_is_never_overwritten(modes):
    before = modes.read_bytes()
    with pytest.raises(UserError, match='beside'):
        run_notebook(modes, modes, {})
    assert modes.read_bytes() == before

def test_full_disk_is_recognised(tmp_path):
    assert str(tmp_path) in full_disk('[Errno 28] No space left on device', tmp_path)
    assert full_disk('something else', tmp_path) is None
