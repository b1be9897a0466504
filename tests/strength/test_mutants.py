"Mutants: known ones with known fates, coverage to the line, one witness for equivalence, ends that limits decide"
import ast
import asyncio
import random
from dataclasses import replace

import pytest
from testgen_world import make_task

from kat.strength import variants as pages
from kat.envs.base import InfraError
from kat.strength.coverage import covered_lines
from kat.envs.grade import read_tree
from kat.strength.mutants import mutants_of, own_lines, same_code, touched_files, touched_lines, touched_of
from kat.strength.mutation import find_fates, measure_task, mutation_row, variant_of
from kat.strength.operators import OPERATORS
from kat.envs.sandbox import Bubblewrap, features
from kat.tasks.software import grade_state
from kat.strength.variants import Variant, bench_of, run_variants

bwrap = pytest.mark.skipif(not features().works, reason=f'bubblewrap does not work here: {features().reason}')


def made(source, lines=None, operator=None):
    "What stands in the place of what, for each mutant"
    lines = lines or set(range(1, source.count('\n') + 2))
    return [(m.old, m.new) for m in mutants_of('code.py', source, lines) if operator in (None, m.operator)]


# ---- what is touched

@pytest.mark.parametrize('before, after, lines', [
    ('a\nb\n', 'a\nb\n', set()), ('a\n', 'a\nb\n', {2}), ('a\nb\nc\n', 'a\nc\n', {1, 2}), ('a\nb\n', 'b\n', {1}),
    ('a\n', '', set()), ('', 'a\nb\n', {1, 2}), ('a\nb\nc\n', 'x\nb\ny\n', {1, 3})])
def test_touched_lines(before, after, lines):
    assert touched_lines(before, after) == lines


def test_tests_configuration_links_and_what_is_no_python_are_not_touched():
    old, new = (b'a = 1\n', 'file'), (b'a = 2\n', 'file')
    names = ['code.py', 'tests/help.py', 'test_a.py', 'conftest.py', 'data.txt']
    base, gold = {n: old for n in names}, {n: new for n in names}
    gold |= {'broken.py': (b'a = (\n', 'file'), 'link.py': (b'code.py', 'link'), 'null.py': (b'a = 1\0', 'file')}
    gold['latin.py'] = '# coding: latin-1\na = "é"\n'.encode('latin-1'), 'file'
    found = {p: sorted(lines) for p, (_, lines) in touched_files(base, gold).items()}
    assert found == {'code.py': [1], 'latin.py': [1, 2]}


def test_own_lines_of_statements_with_bodies():
    source = '''@wrap
@more(
    1)
def f(a,
      b=2): return a

if (x and
        y):
    pass
elif z:
    pass
try:
    pass
except (A,
        B):
    pass
match x:
    case 1:
        pass
'''
    lines = {type(n).__name__ + str(n.lineno): list(own_lines(n)) for n in ast.walk(ast.parse(source))
             if isinstance(n, (ast.stmt, ast.ExceptHandler)) and not isinstance(n, ast.Pass)}
    assert lines == {'FunctionDef4': [1, 2, 3, 4], 'Return5': [5], 'If7': [7, 8], 'If10': [10], 'Try12': [12],
                     'ExceptHandler14': [14, 15], 'Match17': [17]}


def test_what_no_task_asks_for_is_left_alone():
    source = '''"Words."
import os
__version__ = '1'
def f(a: int = 3) -> 'text':
    "Words."
    global g
    if a:
        raise ValueError(f'{a + 1} no' + str(a))
    log.warning('a %s', a + 1)
    return f'{a + 1}'
'''
    found = mutants_of('code.py', source, set(range(1, 11)))
    assert {(m.line, m.operator) for m in found} == {
        (4, 'default'), (7, 'condition'), (8, 'statement'), (8, 'raised'), (9, 'statement'), (10, 'return')}


# ---- operators

@pytest.mark.parametrize('operator, source, pairs', [
    ('compare', 'a < b <= c', [('a < b <= c', 'a <= b <= c'), ('a < b <= c', 'a < b < c')]),
    ('compare', 'a not in b', [('a not in b', 'a in b')]),
    ('boolean', 'a and b', [('a and b', 'a or b')]),
    ('operand', 'a or b or c', [('a or b or c', 'b or c'), ('a or b or c', 'a or c'), ('a or b or c', 'a or b')]),
    ('arithmetic', 'a + b', [('a + b', 'a - b')]),
    ('arithmetic', 'a += 1', [('a += 1', 'a -= 1')]),
    ('unary', 'x = not -a', [('not -a', '-a'), ('-a', 'a')]),
    ('constant', 'x = [1, "é", "", True, 2.5, b"b", None]',
     [('1', '2'), ('"é"', "''"), ('""', "'kat'"), ('True', 'False'), ('2.5', '3.5'), ('b"b"', "b''")]),
    ('condition', 'x = 1 if a else 2', [('a', 'not a')]),
    ('filter', '[i for i in a if i if j]', [('[i for i in a if i if j]', '[i for i in a if j]'),
                                           ('[i for i in a if i if j]', '[i for i in a if i]')]),
    ('statement', 'del a', [('del a', 'pass')]),
    ('argument', 'f(a, b, c=1)', [('f(a, b, c=1)', 'f(b, a, c=1)'), ('f(a, b, c=1)', 'f(a, b)')]),
    ('argument', 'f(a, b)', [('f(a, b)', 'f(b, a)'), ('f(a, b)', 'f(a)')]),
    ('argument', 'f(*a, b)', []), ('argument', 'f(a)', []),
    ('unwrap', 'a.strip().lower()', [('a.strip().lower()', 'a.strip()'), ('a.strip()', 'a')]),
    ('unwrap', 'x = list(a)', [('list(a)', 'a')]), ('unwrap', 'x = f(*a)', []),
    ('default', 'def f(a, b=1, *, c="", d): pass', [('1', '2'), ('""', "'kat'")]),
    ('raised', 'raise Wrong(1)', [('Wrong', 'ArithmeticError')]),
    ('raised', 'raise ArithmeticError', [('ArithmeticError', 'LookupError')]), ('raised', 'raise error', []),
    ('caught', 'try:\n    a\nexcept (A, B):\n    b', [('(A, B)', '()')]),
    ('slice', 'x = a[1:2:3]', [('a[1:2:3]', 'a[:2:3]'), ('a[1:2:3]', 'a[1::3]'), ('a[1:2:3]', 'a[1:2]')]),
    ('loop', 'for a in b:\n    break', [('break', 'continue')]),
    ('return', 'def f(): return a', [('a', 'None')]), ('return', 'def f(): return None', [])])
def test_operators(operator, source, pairs):
    assert made(source, operator=operator) == pairs


def test_every_operator_has_a_case():
    cases = test_operators.pytestmark[0].args[1]
    assert {name for name, *_ in OPERATORS} == {name for name, *_ in cases}


def test_mutants_are_unique_compile_and_change_the_syntax():
    source = 'def f(a, b=(1, 2)):\n    return {k: v for k, v in a if k != b[0:1]} or (a and not b) or a.get("x", -1)\n'
    found = mutants_of('code.py', source, {1, 2})
    shapes = [ast.dump(ast.parse(m.source)) for m in found]
    assert len(set(shapes)) == len(shapes) > 10 and ast.dump(ast.parse(source)) not in shapes


def test_positions_are_bytes_and_lines_stay():
    source = 'def f(a):\n    return "éé", a < (\n        3)\n'
    for mutant in mutants_of('code.py', source, {2}):
        compile(mutant.source, 'code', 'exec')
    assert ('a < (\n        3)', 'a <= 3') in made(source, {2})


def test_equivalence_has_a_witness_and_nothing_else():
    assert same_code('def f(a):\n    return None\n', 'def f(a):\n    # words\n    pass\n')
    assert not same_code('x = 1\n', 'x = True\n') and not same_code('x = 0.0\n', 'x = -0.0\n')
    assert not same_code('def f(a=1): pass\n', 'def f(a=2): pass\n')
    assert not same_code('lambda: (1, 2)\n', 'lambda: (1, 3)\n')


# ---- fates, worked by hand

BASE = 'def rate(n, top=10):\n    return 0\n\ndef unused(n):\n    return n\n'
GOLD = '''def rate(n, top=10):
    if n < 0:
        return 0
    while n > top:
        n -= top
    return n

def unused(n):
    return n + 1
'''
TESTS = '''from code_kat import rate

def test_low():
    assert rate(-5) == 0

def test_wraps():
    assert rate(13) == 3
'''


@pytest.fixture(scope='module')
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp('set'), BASE, GOLD, TESTS, ['test_wraps'], ['test_low'])


@bwrap
def test_fates_score_and_coverage(task):
    found = measure_task(bench_of(task), touched_of(task), Bubblewrap())
    word = {'wall': 'cpu'}   # a busy machine may see the clock's limit first
    shown = [found.fates[i].split('::')[-1] for i in range(len(found.mutants))]
    fates = {(m.line, m.operator): word.get(by, by) for m, by in zip(found.mutants, shown)}
    assert fates == {
        (2, 'condition'): 'test_low', (2, 'compare'): '', (2, 'constant'): '',   # nobody asks for 0
        (3, 'constant'): 'test_low', (3, 'return'): 'test_low',
        (4, 'condition'): 'test_wraps', (4, 'compare'): '',   # nobody asks for 10
        (5, 'arithmetic'): 'cpu', (5, 'statement'): 'cpu',    # never ends
        (6, 'return'): 'test_wraps'}
    out = len(made(GOLD, {9}))
    assert found.counts == dict(made=10 + out, uncovered=out, covered=10, drawn=10)
    assert found.score == .7 and [found.mutants[i].line for i in found.survivors] == [2, 2, 4]
    row = mutation_row(found)
    assert (row['killed'], row['survived'], row['score'], row['equivalent']) == (7, 3, .7, [])
    assert row['accepted_of_made'] == pytest.approx((3 + row['uncovered']) / row['made'])
    assert '-    if n < 0:\n+    if (n <= 0):\n' in row['survivors'][0]['diff']


@bwrap
def test_the_grader_says_the_same(task):
    "A survivor is a wrong patch that is paid; a killed one isn't"
    bench, box = bench_of(task), Bubblewrap()
    for mutant in [m for m in mutants_of('code_kat.py', GOLD, {2, 6})][:4]:
        one, = run_variants(bench, [variant_of(mutant, bench, bench.wanted)], box, 5)
        agent = read_tree(task / 'base') | {'code_kat.py': (mutant.source.encode(), 'file')}
        assert asyncio.run(grade_state(task, agent, box)).passed == (not one.bad(bench.wanted))


@bwrap
def test_coverage_is_exact_by_test(task):
    covered = covered_lines(bench_of(task), ['code_kat.py'], Bubblewrap(), 10)
    by_line = {line: [t.split('::')[-1] for t in tests] for (_, line), tests in covered.items()}
    both = ['test_wraps', 'test_low']
    one = ['test_wraps']
    assert by_line == {1: both, 8: both, 2: both, 3: ['test_low'], 4: one, 5: one, 6: one}


@bwrap
def test_a_run_whose_answer_is_cut_says_so(task, monkeypatch):
    monkeypatch.setattr(pages, 'OUTPUT_KB', 0)
    bench = bench_of(task)
    tight = replace(bench, limits=replace(bench.limits, output_kb=.05))
    with pytest.raises(InfraError, match='traced run: it printed more than there is room for'):
        covered_lines(tight, ['code_kat.py'], Bubblewrap(), 10)


@bwrap
def test_shared_fixtures_count_for_all_and_a_draw_is_the_seeds(tmp_path):
    tests = '''import pytest
from code_kat import rate

@pytest.fixture(scope='module')
def shared():
    return rate(13)

def test_one(shared):
    assert shared

def test_two(shared):
    assert shared == 3
'''
    folder = make_task(tmp_path, BASE, GOLD, tests, ['test_two'], ['test_one'])
    bench, box = bench_of(folder), Bubblewrap()
    assert len(covered_lines(bench, ['code_kat.py'], box, 10)['code_kat.py', 4]) == 2


@bwrap
def test_a_draw_is_the_seeds(task):
    found = measure_task(bench_of(task), touched_of(task), Bubblewrap(), 2, 7)
    covered = [m for m in mutants_of('code_kat.py', GOLD, {2, 3, 4, 5, 6})]
    assert found.mutants == [covered[i] for i in sorted(random.Random(7).sample(range(10), 2))]
    assert found.counts['covered'] == 10 and found.counts['drawn'] == 2


@bwrap
def test_ends_that_are_no_failure_of_a_test(task):
    "What ends a run is what shows the mutant; the fixed code after it still passes"
    bench, box = bench_of(task), Bubblewrap()
    kill = 'import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n'
    loud = 'import sys\nsys.stdout.write("x" * 10**6)\n' + GOLD
    sources = ['import os\nos._exit(0)\n', 'raise SystemExit\n', kill, loud]
    variants = [Variant({'code_kat.py': s.encode()}, bench.wanted) for s in sources]
    ended = [one.bad(bench.wanted) for one in run_variants(bench, [*variants, Variant({}, bench.wanted)], box, 5)]
    assert ended == ['exit', bench.wanted[0], 'signal', '', '']


@bwrap
def test_a_limit_of_the_sandbox_below_that_of_a_run_is_one_of_cpu_time_too(task):
    bench = bench_of(task)
    tight = replace(bench, limits=replace(bench.limits, cpu_s=2))
    ended, = run_variants(tight, [Variant({'code_kat.py': b'while True:\n    pass\n'}, bench.wanted)], Bubblewrap(), 60)
    assert (ended.seen, ended.cause) == (None, 'cpu') and ended.cpu_s < 10


@bwrap
def test_a_kill_counts_only_when_the_fixed_code_passes_the_same_selection(tmp_path):
    "test_b leans on test_a; alone it fails with any code, which says nothing about the mutant"
    tests = '''import code_kat
seen = []

def test_a():
    seen.append(1)

def test_b():
    assert seen and code_kat.rate(4) == 4
'''
    folder = make_task(tmp_path, BASE, GOLD, tests, ['test_b'], ['test_a'])
    bench, box = bench_of(folder), Bubblewrap()
    survivor = next(m for m in mutants_of('code_kat.py', GOLD, {2}) if m.operator == 'compare')
    alone = ('test_code.py::test_b',)
    assert run_variants(bench, [Variant({}, alone)], box, 5)[0].bad(alone)
    assert find_fates(bench, [survivor], [alone], box, 5) == ['']


@bwrap
def test_a_task_whose_fix_fails_is_no_score(tmp_path):
    folder = make_task(tmp_path, BASE, GOLD, TESTS.replace('== 3', '== 4'), ['test_wraps'], ['test_low'])
    with pytest.raises(InfraError, match='fails its own tests: test_code.py::test_wraps'):
        measure_task(bench_of(folder), touched_of(folder), Bubblewrap())


@bwrap
def test_same_bytecode_is_set_aside_and_nothing_covered_is_no_score(tmp_path):
    gold = 'def rate(n):\n    if 0:\n        return 5\n    return n\n\ndef other(n):\n    return n < 1\n'
    tests = 'from code_kat import rate\n\ndef test_it():\n    assert rate(2) == 2\n'
    folder = make_task(tmp_path, 'def rate(n):\n    return 1\n', gold, tests, ['test_it'])
    found = measure_task(bench_of(folder), touched_of(folder), Bubblewrap())
    assert all(m.line in (2, 4) for m in found.mutants) and found.score is not None
    none = make_task(tmp_path / 'b', gold.replace('< 1', '<= 1'), gold, tests, ['test_it'])
    found = measure_task(bench_of(none), touched_of(none), Bubblewrap())
    assert found.score is None and found.counts['covered'] == 0 and found.counts['uncovered'] > 0
    assert mutation_row(found)['accepted_of_made'] == 1
