"The command: quick help, one clear line and the right exit code for a mistake"
import subprocess
import sys
from os.path import relpath
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import kat


@pytest.fixture
def notebook(tmp_path):
    declared = new_code_cell('a: int = 1  # first\nflag: bool = True', metadata=dict(tags=['parameters']))
    small = new_notebook(cells=[declared, new_code_cell('assert a < 5, f"a is {a}"\nprint(a, flag)')])
    (tmp_path/'src').mkdir()
    nbformat.write(small, tmp_path/'src'/'small.ipynb')
    return 'src/small.ipynb'

def test_help_is_quick_to_load():
    code = '''
import sys
from kat.cli import main
try: main(['pipeline', '--help'])
except SystemExit as ended:
    print('exit', ended.code, *{'torch', 'numpy', 'papermill', 'kat.recipe.pipeline'} & set(sys.modules))
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == 'exit 0'

def test_help_shows_every_command_and_examples(cli):
    code, out, err = cli('--help')
    assert code == 0 and not err and all(name in out for name in ('pipeline', 'run', 'report', '--version'))
    assert cli() == (0, out, '')                                      # without arguments: the same
    options = '--preset', '--name', '--runs', '--seed', '--model', '-p', '--debug'
    shown = dict(pipeline=(*options, 'kat pipeline --preset smoke'),
                 run=('-p', '--out', 'kat run nbs/runs/20_sft.ipynb -p steps=10'),
                 report=('kat report data/runs/tiny',))
    for command, parts in shown.items():
        code, out, err = cli(command, '--help')
        assert code == 0 and all(part in out for part in parts), command

def test_version(cli):
    assert cli('--version') == (0, f'kat {kat.__version__}\n', '')

@pytest.mark.parametrize('args, parts', [
    ('pipelin', ["'pipelin'", 'pipeline']), ('pipeline', ['--preset', 'kat pipeline --help']),
    ('pipeline --preset tinny', ["unknown preset 'tinny'", 'did you mean tiny', 'smoke']),
    ('pipeline --preset tiny --stage x', ['--stage']), ('pipeline --preset tiny --seed one', ['--seed', 'integer']),
    ('pipeline --preset tiny --name ../x', ['../x', 'folder name']),
    ('pipeline --preset tiny --model nowhere', ['nowhere', 'config.json']),
    ('run', ['NOTEBOOK', 'kat run --help']), ('run none.ipynb', ['no notebook none.ipynb']),
    ('run src/small.ipynb -p b=1', ["'b' of small.ipynb", 'a, flag']), ('run src/small.ipynb -p a=x', ['a=x', 'int']),
    ('run src/small.ipynb -p flag', ['key=value']), ('run src/small.ipynb -o src/copy.ipynb', ['beside']),
    ('run src/small.ipynb -o copy.html', ['.ipynb']), ('report .', ['not a run', 'config.json'])])
def test_mistakes_are_one_line_and_code_2(cli, notebook, tmp_path, args, parts):
    code, out, err = cli(*args.split())
    assert (code, out) == (2, '') and err.startswith('kat: ') and err.count('\n') == 1 and err.endswith('\n')
    assert all(part in err for part in parts), err
    assert 'Traceback' in cli(*args.split(), '--debug')[2]
    assert [path.name for path in tmp_path.iterdir()] == ['src'] and len(list((tmp_path/'src').iterdir())) == 1

def test_run(cli, notebook, tmp_path):
    code, out, err = cli('run', notebook, '-p', 'a=3', '-p', 'flag=false', '-o', 'out/a.ipynb')
    assert (code, err) == (0, '') and out.startswith('out/a.ipynb: finished in ')
    ran = nbformat.read(tmp_path/'out'/'a.ipynb', as_version=4)
    assert ran.cells[-1].outputs[0].text == '3 False\n'
    code, out, err = cli('run', notebook, '-p', 'a=7', '-o', 'out/b.ipynb', '--debug')
    *trace, line = err.splitlines()
    assert (code, out) == (1, '')
    assert line.startswith('kat: small: cell [3]: AssertionError: a is 7 (see out/b.failed.ipynb')
    assert any('print(a, flag)' in words for words in trace)          # the notebook's own traceback, not ours

def test_a_missing_extra_is_named_with_its_command(notebook, tmp_path):
    code = '''
import sys
sys.modules['papermill'] = None                                       # as if it were not installed
from kat.cli import main
main(['run', 'src/small.ipynb', '-o', 'out.ipynb'])
'''
    command = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert command.returncode == 2 and command.stderr.count('\n') == 1
    where = relpath(Path(__file__).resolve().parents[2], tmp_path)    # a command that works: no index has kat
    assert f"pip install -e '{where}[notebooks]'" in command.stderr
