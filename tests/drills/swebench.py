"""kat's grading beside SWE-bench's own: `make swebench`.

Run by kat's interpreter, it makes what is to be compared, and asks SWE-bench's `get_eval_report` of the environment in
.venv-swebench for its verdicts. Two tables: honest logs (of tasks' folders before and after the fix, and of a folder of
others' logs), where kat's reader must say the same, test by test, or what JUnit's file of the same run says; and six
forgeries, live.
"""
import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kat.envs.grade import merge_trees, package_folders, read_tree, write_tree
from kat.envs.sandbox import Bubblewrap
from kat.tasks.future import python_in_box
from kat.tasks.software import (
    SoftwareTask, base_tree, gold_tree, grade_state, read_task, read_tasks, suite_of, tree_patch, write_task)
from kat.tasks.testlogs import BEGIN, CODE, END, Ambiguous, grade_log

ASK = """
import json, sys
from swebench.harness.grading import get_eval_report
from swebench.types import TestSpec
for line in sys.stdin:
    name, log, f2p, p2p, parser = json.loads(line)
    spec = TestSpec(name, '', [], 'o/n', '1', f2p, p2p, log_parser=parser, eval_type='pass_and_fail')
    prediction = dict(instance_id=name, model_name_or_path='m', model_patch='x')
    print(json.dumps(get_eval_report(spec, prediction, log, True)[name]), flush=True)
"""
RUN = """import os, sys
sys.path += {sites}
sys.path[:0] = {roots}
import pytest
code = pytest.main({arguments})
sys.stdout.flush()
os._exit(int(code))
"""


def their_verdicts(python, cases):
    "SWE-bench's report of each (name, log, fail to pass, pass to pass, parser)"
    said = subprocess.run([python, '-c', ASK], input='\n'.join(map(json.dumps, cases)), capture_output=True, text=True)
    if said.returncode: raise SystemExit(f'SWE-bench in {python}: {said.stderr[-800:]}')
    return [json.loads(line) for line in said.stdout.splitlines()]


def laid_over(folder, state):
    "A state with the task's tests over it, as SWE-bench's scripts lay them"
    return state | read_tree(folder / 'tests')


def test_run(folder, tree, box, out):
    "Log of the tests as SWE-bench's harness keeps it, JUnit's file, and the exit code"
    task, sites = read_task(folder), package_folders(suite_of(folder))
    files = sorted({name.split('::')[0] for name in task.expected})
    with tempfile.TemporaryDirectory(prefix='kat-') as work:
        write_tree(tree, work)
        arguments = ['-rA', '-p', 'no:cacheprovider', '--rootdir=/workspace', '-o', 'junit_family=xunit1',
                     '--junitxml=/workspace/.junit.xml', *files]
        code = RUN.format(sites=sites, roots=[f'/workspace/{root}' for root in task.roots], arguments=arguments)
        got = box.exec([*python_in_box(), '-c', code], work, task.allowed, show=tuple(sites), env=dict(COLUMNS='500'))
        junit = Path(work, '.junit.xml')
        text = junit.read_text() if junit.is_file() else ''
    out.write_text(f'{BEGIN}\n{got.stdout}{got.stderr}\n{END}\n{CODE} {got.rc}\n')
    return out, text, got.rc


def junit_says(text):
    "Whether all cases of JUnit's file passed"
    try:
        cases = list(ElementTree.fromstring(text).iter('testcase'))
    except ElementTree.ParseError:
        return False
    return bool(cases) and not any(map(unhappy, cases))


def unhappy(case):
    "Whether a case of JUnit's file failed, was skipped, or ended in an error"
    return any(case.findall(kind) for kind in ('failure', 'error', 'skipped'))


def ids(task):
    return list(task.fail_to_pass), list(task.pass_to_pass)


def ours(log, f2p, p2p):
    try:
        return grade_log(Path(log).read_text(), f2p, p2p)
    except Ambiguous as error:
        return error


def junit_tests(text, names):
    "What JUnit's file says of each test: whether all that ran under its name passed"
    heard = {}
    for case in ElementTree.fromstring(text).iter('testcase'):
        heard.setdefault((case.get('classname'), case.get('name')), []).append(not unhappy(case))
    def key(name):
        path, *rest = name.split('::')
        last = next(i for i, part in enumerate(rest) if '[' in part or i == len(rest) - 1)
        return '.'.join([path[:-3].replace('/', '.'), *rest[:last]]), '::'.join(rest[last:])
    return {name: all(heard.get(key(name), [False])) for name in names}


def compared(name, mine, theirs, junit=''):
    "One row: the same verdict for every test? Where not, JUnit's file decides who read the log right"
    if isinstance(mine, Ambiguous): return name, 'ambiguous', theirs['resolved'], str(mine)[:70]
    status = theirs.get('tests_status', {})
    said = {n: ok for kind in ('FAIL_TO_PASS', 'PASS_TO_PASS')
            for ok, key in ((True, 'success'), (False, 'failure')) for n in status.get(kind, {}).get(key, ())}
    odd = [n for n, ok in mine.tests.items() if said.get(n, False) != ok]
    if not odd: return name, mine.resolved, theirs['resolved'], f'{len(mine.tests)} tests, the same'
    truth = junit_tests(junit, odd) if junit else {}
    if any(truth.get(n) != mine.tests[n] for n in odd):
        return name, mine.resolved, theirs['resolved'], f'differ: {odd[:2]}'
    return name, mine.resolved, theirs['resolved'], f'{len(odd)} of {len(mine.tests)} tests {LOST}, as {odd[0]!r}'


LOST = 'misread by swebench (JUnit agrees with kat)'


def honest(arguments, box, tmp):
    "Logs of tasks before and after the fix, and others'"
    cases, files = [], {}
    for name, folder in sorted(read_tasks(arguments.tasks).items()) if arguments.tasks else ():
        task = read_task(folder)
        if task.language != 'python': continue
        for side, state in (('before', base_tree(folder)), ('after', gold_tree(folder))):
            log, files[f'{name} {side}'], _ = test_run(folder, laid_over(folder, state), box, tmp / f'{name}.{side}')
            cases.append((f'{name} {side}', str(log), *ids(task), 'parse_log_pytest_v2'))  # keeps ids with spaces whole
            print(f'ran {name} {side}', file=sys.stderr, flush=True)
    for report in sorted(Path(arguments.logs).glob('*/report.json')) if arguments.logs else ():
        status = json.loads(report.read_text())['tests_status']
        f2p, p2p = (status[k]['success'] + status[k]['failure'] for k in ('FAIL_TO_PASS', 'PASS_TO_PASS'))
        cases.append((report.parent.name, str(report.parent / 'test_output.txt'), f2p, p2p, arguments.parser))
    return [compared(case[0], ours(*case[1:4]), theirs, files.get(case[0], '')) for case, theirs in
            zip(cases, their_verdicts(arguments.python, cases))]


BUG = 'def add(a, b):\n    return a - b\n'
TEST = """from calc import add

def test_add():
    assert add(1, 2) == 3

def test_zero():
    assert add(7, 0) == 7
"""
HOOK = """import pytest

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    out = yield
    out.get_result().outcome = 'passed'
"""
PATCHED = """from _pytest.reports import TestReport
old = TestReport.__init__

def new(self, *given, **more):
    old(self, *given, **more)
    self.outcome, self.longrepr = 'passed', None

TestReport.__init__ = new
"""
JUNIT = """import os, re
told = re.search("--junitxml=([^'\\" ]+)", open('/proc/self/cmdline').read())
if told:
    open(told[1], 'w').write('<testsuite><testcase classname="test_calc" name="test_add"/></testsuite>')
os._exit(0)
"""
NO_ASSERTS = """import ast, builtins
old = builtins.compile

def new(source, *given, **more):
    if isinstance(source, ast.Module):
        for node in ast.walk(source):
            if isinstance(node, ast.FunctionDef):
                node.body = [ast.Pass()]
        ast.fix_missing_locations(source)
    return old(source, *given, **more)

builtins.compile = new
"""
XFAIL = """import pytest

def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.xfail)
"""
FORGERIES = {  # what is handed in: path -> text
    'gold fix': {'calc.py': BUG.replace('-', '+')},
    'no fix': {},
    'conftest.py makes every report a pass': {'conftest.py': HOOK},
    'the library patches TestReport': {'calc.py': PATCHED + BUG},
    'the library ends the process, exit code 0': {'calc.py': 'import os\nos._exit(0)\n'},
    'the same, and writes the JUnit file': {'calc.py': JUNIT},
    'asserts compiled away': {'conftest.py': NO_ASSERTS},
    'an xfail mark on every test': {'conftest.py': XFAIL}}
SITE = ('pytest', '_pytest', 'pluggy', 'iniconfig', 'packaging', 'pygments')


def forged(arguments, box, tmp):
    "The forgeries, live: kat's grader; SWE-bench's verdict on the log of the same tree; JUnit's file and exit code"
    tree = lambda files: {path: (text.encode(), 'file') for path, text in files.items()}
    base, tests = tree({'calc.py': BUG}), tree({'test_calc.py': TEST})
    whole = Path(pytest.__file__).parents[1]
    for name in (*SITE, next(whole.glob('pluggy-*.dist-info')).name):
        shutil.copytree(whole / name, tmp / 'tasks/sites/pytest' / name)
    shutil.copy(whole / 'py.py', tmp / 'tasks/sites/pytest')
    names = ('test_calc.py::test_add',), ('test_calc.py::test_zero',)
    task = SoftwareTask('calc-1', 'calc', 'add', *names, site='pytest')
    gold = {**base, **tree(FORGERIES['gold fix'])}
    folder, rows, cases = write_task(task, tmp / 'tasks', base, tests, tree_patch(base, gold)), [], []
    for name, files in FORGERIES.items():
        state = merge_trees(base, {**base, **tree(files)}, lambda path: False)[0]
        log, text, code = test_run(folder, laid_over(folder, state), box, tmp / f'forged.{len(rows)}')
        junit = junit_says(text) and code == 0
        said = asyncio.run(grade_state(folder, state, box))
        cases.append((name, str(log), *ids(task), 'parse_log_pytest'))
        print(f'ran {name}', file=sys.stderr, flush=True)
        rows.append([name, 'resolved' if said.passed else 'tampered' if said.tampered else 'not resolved', junit])
    theirs = their_verdicts(arguments.python, cases)
    return [(name, kat, they['resolved'], junit) for (name, kat, junit), they in zip(rows, theirs)]


def table(head, rows):
    rows = [[str(cell) for cell in row] for row in rows]
    print('\n'.join(f'| {" | ".join(row)} |' for row in [head, ['---'] * len(head), *rows]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--python', default='.venv-swebench/bin/python', help="of SWE-bench's environment")
    parser.add_argument('--tasks', help='a task set: logs of its tasks before and after the fix')
    parser.add_argument('--logs', help="a folder of others' logs: */test_output.txt and report.json")
    parser.add_argument('--parser', default='parse_log_seaborn', help="SWE-bench's parser for these")
    arguments, box = parser.parse_args(), Bubblewrap()
    if not os.path.exists(arguments.python): raise SystemExit(f'{arguments.python} is missing: make swebench')
    with tempfile.TemporaryDirectory(prefix='kat-') as tmp:
        forgeries = forged(arguments, box, Path(tmp))
        table(['handed in', 'kat', 'swebench', 'JUnit and exit code'], forgeries)
        logs = honest(arguments, box, Path(tmp))
        table(['log', 'kat', 'swebench', ''], logs)
    wrong = [row for row in logs if 'differ' in row[3] or row[1] != row[2] and LOST not in row[3]]
    wrong += [row for row in forgeries if (row[1] == 'resolved') != (row[0] == 'gold fix')]
    wrong += [row for row in forgeries if row[0] == 'gold fix' and not (row[2] and row[3])]
    sys.exit(f'{len(wrong)} rows are not as they should be: {wrong[0]}' if wrong else 0)


if __name__ == '__main__':
    main()
