"""What grading costs and what it catches: `python benchmarks/grade.py cost` or `attacks`; minutes each.
`attacks --tasks FOLDER --n 5` does the harness's attacks on real tasks instead (see `kat tasks fetch`).

Cost: seconds a grade, in pairs with the way that grades were given before: one job that runs visible and hidden tests
(micro world), one run of pytest that writes a report (tests as code). Nothing is asserted.
"""
import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]/'tests/helpers'))

from grade_attacks import CODE, EXPECTED, FIX, KINDS, MICRO, REPO, TEST_ADD, micro_text, on_task, tree

from kat.envs.base import InfraError, ToolCall
from kat.envs.grade import Suite, grade_tests, package_folders, read_tree, write_tree
from kat.envs.micro import MicroEnv, fixed, judge, test_job
from kat.envs.micro_tasks import make_task
from kat.envs.sandbox import Bubblewrap, Limits, WarmPool
from kat.tasks.software import gold_tree, read_task, read_tasks, suite_of

LIMITS = Limits(memory_mb=2048, cpu_s=8, wall_s=60, processes=32, output_kb=256, files_mb=64)


def state(files):
    return {path: (text.encode(), 'file') for path, text in files.items()}


def plain_grade(suite, agent, box, marks='report.xml'):
    "As graders do it: the expected tests' files are put back, pytest writes a report, and its exit code counts."
    files = sorted({name.split('::')[0] for name in suite.expected})
    sites = package_folders(suite)
    python = [os.path.realpath(sys.executable), '-B', '-Xutf8', '-m', 'pytest']
    with tempfile.TemporaryDirectory() as work:
        base = read_tree(suite.base)
        write_tree({p: t for p, t in agent.items() if p != 'tests'} | {p: base[p] for p in files}, work)
        options = ['-q', '-p', 'no:cacheprovider', '--rootdir=/workspace', f'--junitxml={marks}', *files]
        env = dict(PYTHONPATH=':'.join(['/workspace', *sites]))
        got = box.exec([*python, *options], work, suite.limits, env=env, show=tuple(sites))
        try:
            cases = ElementTree.parse(Path(work)/marks).iter('testcase')
            passed = {(c.get('classname'), c.get('name')) for c in cases if not len(c)}
        except (OSError, ElementTree.ParseError):
            passed = set()
    def key(name):
        path, *classes, test = name.split('::')
        return '.'.join([path[:-3].replace('/', '.'), *classes]), test
    return got.rc == 0 and {key(n) for n in suite.expected} <= passed


def word(verdict):
    return 'REWARDED' if verdict.passed else 'tampered' if verdict.tampered else 'failed'


async def attacks(rounds=1):
    "Each attack on test code under the plain grader and under kat's; each micro attack under kat's"
    box = Bubblewrap()
    with tempfile.TemporaryDirectory() as base, WarmPool(2) as pool:
        write_tree(state(REPO), base)
        suite, rows = Suite(Path(base), tuple(EXPECTED), limits=LIMITS), []
        gold = state({**REPO, 'calc.py': FIX})
        print(f"{'attack':44}{'kind':8}{'plain':10}kat")
        plain = 'REWARDED' if plain_grade(suite, gold, box) else 'failed'
        print(f"{'none: the right fix':52}{plain:10}{word(await grade_tests(suite, gold, gold, box))}")
        for name, (kind, _) in CODE.items():
            plain = await asyncio.to_thread(plain_grade, suite, tree(name), box)
            said = [word(await grade_tests(suite, tree(name), gold, box)) for _ in range(rounds)]
            rows.append((name, kind, plain, said))
            print(f"{name:44}{kind:8}{'REWARDED' if plain else 'failed':10}{' '.join(said)}", flush=True)
        for kind, what in KINDS.items():
            mine = [(plain, all(w != 'REWARDED' for w in said)) for _, k, plain, said in rows if k == kind]
            print(f'{kind}: {what}: plain grader caught {sum(not p for p, _ in mine)} of {len(mine)},',
                  f'kat {sum(c for _, c in mine)} of {len(mine)}')
        paid = [name for name in MICRO for i in range(3) if await micro_reward(pool, name, i)]
        print(f'micro world: {len(MICRO)} attacks on 3 tasks each, rewarded: {paid or "none"}')


async def real_attacks(folder, number):
    "Each attack that needs no right answer on the tasks with the fewest expected tests, one of a package first"
    box, paid, rows = Bubblewrap(), [], 0
    tasks = {name: read_task(where) for name, where in read_tasks(folder).items()}
    few = sorted((len(t.expected), name) for name, t in tasks.items() if t.language == 'python')
    chosen = [n for i, (_, n) in enumerate(few) if tasks[n].repo not in {tasks[m].repo for _, m in few[:i]}][:number]
    for name in chosen:
        where = Path(folder)/name
        suite, right, said = replace(suite_of(where), limits=replace(LIMITS, cpu_s=20)), gold_tree(where), {}
        gold = await grade_tests(suite, right, right, box)
        print(f'{name}: the right fix: {word(gold)}', flush=True)
        for attack, (kind, _) in CODE.items():
            if kind == 'weak': continue
            try:
                said[attack] = word(await grade_tests(suite, on_task(attack, where), right, box))
            except InfraError as error:
                said[attack] = f'InfraError: {error}'
            if said[attack] == 'REWARDED':
                paid.append((name, kind, attack))
                print(f'{name}: rewarded: {attack} ({kind})', flush=True)
        rows += len(said)
        counts = {w: sum(x == w for x in said.values()) for w in sorted(set(said.values()))}
        print(f'{name}: {len(said)} attacks: {counts}', flush=True)
    print(f'{rows} attacks on {len(chosen)} tasks, rewarded: {paid or "none"}')


async def micro_reward(pool, name, i):
    task = make_task('train', i, MICRO[name][0])
    env = MicroEnv(pool)
    await env.reset(task)
    path, n, text = micro_text(name, task)
    edits = [(path, n, text), *task.data['edits'][1:]]
    await env.step([ToolCall('edit', dict(path=p, line=k, text=t)) for p, k, t in edits])
    return (await env.grade()).reward


def pair(old, new):
    "Seconds of both, one after the other"
    times = [time.perf_counter()]
    for fn in (old, new):
        fn()
        times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]


def report(what, pairs):
    old, new = map(statistics.mean, zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f'{what:36}{len(pairs):4} pairs: {old:.4f} s before, {new:.4f} s now: x {new / old:.2f}',
          f'(median of pairs x {ratio:.2f})', flush=True)


def cost(n=150, repeats=6):
    with WarmPool(1) as pool:
        pairs = []
        for i in range(n):
            task = make_task('train', i)
            tests = {'tests.py': task.data['files']['tests.py'], 'hidden.py': task.data['hidden']}
            for files in (task.data['files'], fixed(task)):
                before = lambda: pool.run(test_job(files, tests))
                pairs.append(pair(before, lambda: asyncio.run(judge(pool, task, files))))
        report('micro: every task, broken and right', pairs)
    box = Bubblewrap()
    many = {f'tests/test_{i}.py': TEST_ADD for i in range(30)}
    for what, files in (('code: 10 tests', {}), ('code: 220 tests', many)):
        with tempfile.TemporaryDirectory() as base:
            write_tree(state(REPO | files), base)
            names = [f'{p}::{e.split("::")[1]}' for p in files for e in EXPECTED if 'test_add.py' in e]
            suite = Suite(Path(base), (*EXPECTED, *names), limits=LIMITS)
            gold = state({**REPO, **files, 'calc.py': FIX})
            now = lambda: asyncio.run(grade_tests(suite, gold, gold, box))
            report(what, [pair(lambda: plain_grade(suite, gold, box), now) for _ in range(repeats)])


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('what', nargs='*', default=['cost', 'attacks'])
    parser.add_argument('--tasks', help='a task set, for `attacks`')
    parser.add_argument('--n', type=int, default=5, help='tasks of it')
    asked = parser.parse_args()
    if 'cost' in asked.what:
        cost()
    if 'attacks' in asked.what:
        asyncio.run(real_attacks(asked.tasks, asked.n) if asked.tasks else attacks())
