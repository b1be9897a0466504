"The house keeps its order: chapters import upwards only, a name means one thing, code reads line by line"
import ast
import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# from top to bottom
CHAPTERS = 'core tree compute infer wire plane learn envs tasks strength data study cluster recipe'.split()
MODULES = sorted(p for p in (ROOT/'kat').rglob('*.py') if p.name not in ('__init__.py', '_modidx.py'))
CODE = MODULES + [p for d in ('tests', 'benchmarks', 'docs') for p in sorted((ROOT/d).rglob('*.py'))]
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
# symbols of the field, its libraries' usual names, and words that are short
SHORT = set('''q k v n m lr i j x y t p w F G H K D T N U V B np pd nn tl ax fd id ok to by lo hi db st pa plt os io re
               '''.split())


def name_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


@cache
def trees():
    return {name_of(p): ast.parse(p.read_text()) for p in MODULES}


def chapter(module):
    "Its place in the list; what lies directly in kat/ (the command line) comes last"
    part = module.split('.')[1]
    return CHAPTERS.index(part) if part in CHAPTERS else len(CHAPTERS)


def imported(module, node):
    "The modules of kat that an import statement names"
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split('.')[0] == 'kat']
    if not isinstance(node, ast.ImportFrom):
        return []
    base = module.split('.')[:-node.level] if node.level else []
    whole = '.'.join(base + ([node.module] if node.module else []))
    if whole.split('.')[0] != 'kat':
        return []
    return [f'{whole}.{a.name}' for a in node.names] if whole.count('.') < 2 and whole != 'kat.cli' else [whole]


def test_every_folder_is_a_chapter():
    assert {p.parent.name for p in MODULES if p.parent != ROOT/'kat'} == set(CHAPTERS)
    assert [p.stem for p in MODULES if p.parent == ROOT/'kat'] == ['cli']


def test_chapters_import_only_chapters_above_them():
    wrong = [f'{module}:{node.lineno} imports {other}' for module, tree in trees().items() for node in ast.walk(tree)
             for other in imported(module, node) if other.count('.') > 1 and chapter(other) > chapter(module)]
    assert not wrong


def test_no_two_modules_import_each_other():
    needs = {m: {o for node in ast.walk(t) for o in imported(m, node)} & set(trees()) for m, t in trees().items()}
    def reach(start):
        seen, todo = set(), [start]
        while todo:
            for other in needs[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen
    assert not [m for m in needs if m in reach(m)]


def test_a_public_name_is_defined_once():
    where = defaultdict(list)
    for module, tree in trees().items():
        public = next((ast.literal_eval(s.value) for s in tree.body if isinstance(s, ast.Assign)
                       and s.targets[0].id == '__all__'), [])
        defined = {n for s in tree.body for n in names_defined(s)}
        for name in defined:
            if not name.startswith('_') and (name in public or module == 'kat.cli'):
                where[name].append(module)
    assert {n: m for n, m in where.items() if len(m) > 1} == {}


def names_defined(statement):
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = getattr(statement, 'targets', [statement.target] if isinstance(statement, ast.AnnAssign) else [])
    return [x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name) and x.id != '__all__']


def crowded(source):
    "Lines on which a second statement begins, but for guards: `if …: return …`"
    lines, found = [x.encode() for x in source.split('\n')], []
    for node in ast.walk(ast.parse(source)):
        for block in (getattr(node, f, None) for f in ('body', 'orelse', 'finalbody')):
            for x in block if isinstance(block, list) else []:
                if not isinstance(x, ast.stmt) or getattr(x, 'decorator_list', None):
                    continue
                before = lines[x.lineno - 1][:x.col_offset].strip()
                chained = isinstance(x, ast.If) and lines[x.lineno - 1][x.col_offset:].startswith(b'elif')
                if before and not chained and not guards(node, x):
                    found.append(x.lineno)
    return found


def guards(node, x):
    leaves = isinstance(x, (ast.Return, ast.Raise, ast.Continue, ast.Break))
    return isinstance(node, ast.If) and not node.orelse and leaves


def cells(path):
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


def test_crowded_sees_what_it_should():
    assert crowded('a = 1; b = 2') == [1] and crowded('for x in y: z()') == [1] and crowded('def f(): return 1') == [1]
    assert crowded('try: a()\nexcept E: b()') == [1, 2]
    assert not crowded('for x in y:\n    if x: continue\n    if z:\n        a()\n    elif b:\n        c()')
    assert crowded('if a: return_()') == [1]


def test_one_statement_a_line():
    assert {name_of(p): x for p in CODE if (x := crowded(p.read_text()))} == {}
    magic = re.compile(r'^\s*[%!]', re.M)
    assert {(p.name, c['id']): x for p in NOTEBOOKS for c in cells(p)
            if not magic.search(s := ''.join(c['source'])) and (x := crowded(s))} == {}


def test_lines_end_before_column_121():
    "In kat/ too, but for the list of names that nbdev writes over each module"
    listed = re.compile(r'^__all__ = \[.*?\]$', re.M | re.S)
    assert {name_of(p): x for p in CODE
            if (x := [s for s in listed.sub('', p.read_text()).split('\n') if len(s) > 120])} == {}


def test_exported_cells_are_short():
    "About thirty lines; a table that is data may be longer"
    long = {}
    for p in NOTEBOOKS:
        for c in cells(p):
            source = ''.join(c['source'])
            if '#| export' in source and (n := source.count('\n') + 1) > 36 and not is_table(source):
                long[p.name, c['id']] = n
    assert long == {}


def is_table(source):
    return all(isinstance(s, (ast.Assign, ast.AugAssign, ast.Expr)) for s in ast.parse(source).body)


@pytest.mark.parametrize('name', CHAPTERS)
def test_names_are_words(name):
    "Names of one or two letters that are no symbols of the field are rare"
    found = [x for m, tree in trees().items() if m.split('.')[1] == name for node in ast.walk(tree)
             for x in ([node.arg] if isinstance(node, ast.arg) else
                       [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else [])]
    short = sorted(x for x in found if len(x.strip('_')) <= 2 and x not in SHORT)
    assert len(short) <= .05 * len(found), short
