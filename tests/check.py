"""Everything that CI checks, one step after the other: `make test`, or some of it: `make test STEPS="ruff pytest"`.

Steps that write (export, clean, smoke) do it elsewhere: the tree stays as it was, and uncommitted work counts.
A step that fails doesn't stop the rest; the last table says what failed.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
PY = sys.executable
STEPS = {}


def step(fn):
    STEPS[fn.__name__] = fn
    return fn


def run(*cmd, cwd=ROOT, **env):
    "Run a command; SystemExit with its name if it fails"
    cmd = [str(c) for c in cmd]
    print('$', ' '.join(Path(c).name if c.startswith(str(BIN)) else c for c in cmd), flush=True)
    if rc := subprocess.call(cmd, cwd=cwd, env=os.environ | dict(PYTHONPATH=str(cwd)) | env):
        raise SystemExit(f'{Path(cmd[0]).name} ended with {rc}')


def copy(tmp, *names):
    "The named parts of the working tree"
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for n in names:
        src = ROOT/n
        if src.is_dir():
            shutil.copytree(src, tmp/n, ignore=skip)
        elif src.exists():
            (tmp/n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(src, tmp/n)


def same(want, have, remedy):
    "Two folders with the same content, or SystemExit with the difference (have -, want +) and what to do"
    out = subprocess.run(['diff', '-ruN', '-x', '__pycache__', '-x', '.ipynb_checkpoints', have, want],
                         capture_output=True, text=True)
    if out.returncode: raise SystemExit('\n'.join(out.stdout.splitlines()[:60]) + out.stderr + f'\n-> {remedy}')


@step
def ruff(tmp):
    "lint: ruff"
    run(BIN/'ruff', 'check', '.')


@step
def export(tmp):
    "kat/ is what the notebooks export: no drift, no module without a notebook"
    others = [path for path in (ROOT/'kat').rglob('*') if path.is_file() and path.suffix not in ('.py', '.pyc')]
    copy(tmp, 'nbs', 'settings.ini', 'pyproject.toml', 'kat/__init__.py', *(p.relative_to(ROOT) for p in others))
    run(BIN/'nbdev-export', cwd=tmp)
    same(tmp/'kat', ROOT/'kat', '- is only in kat/, + only in the notebooks: edit notebooks, then nbdev-export')


@step
def clean(tmp):
    "notebooks are clean"
    copy(tmp, 'nbs', 'settings.ini', 'pyproject.toml')
    run(BIN/'nbdev-clean', cwd=tmp)
    same(tmp/'nbs', ROOT/'nbs', 'nbdev-clean would change this: run it')


@step
def readme(tmp):
    "README.md is the index notebook"
    run(PY, 'docs/readme.py', '--check')


def rooms():
    "The folders of tests, the one with the most text first: two workers that take the next in turn end together"
    found = {path.parent for path in (ROOT/'tests').glob('*/test_*.py')}
    return sorted(found, key=lambda folder: -sum(path.stat().st_size for path in folder.glob('test_*.py')))


def told(folder):
    "pytest over a folder, with one thread, its output printed whole; the folder's name if it fails"
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run([PY, '-m', 'pytest', '-q', '--durations=3', folder.relative_to(ROOT)], cwd=ROOT, env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')
    print(f'$ pytest -q {folder.relative_to(ROOT)}\n{done.stdout}', flush=True)
    return folder.name if done.returncode else ''


@step
def pytest(tmp):
    "pytest over kat/, a folder at a time, two beside each other"
    with ThreadPoolExecutor(2) as pool:
        failed = [name for name in pool.map(told, rooms()) if name]
    if failed: raise SystemExit(f'pytest failed in tests/{", tests/".join(failed)}')


@step
def notebooks(tmp):
    "every notebook runs from top to bottom"
    run(BIN/'nbdev-test', '--n-workers', '2', OMP_NUM_THREADS='1', TRITON_INTERPRET='1')   # workers share one triton


@step
def smoke(tmp):
    "every stage of the recipe, a few steps each: kat pipeline --preset smoke; its RL really learns"
    run(BIN/'kat', 'pipeline', '--preset', 'smoke', '--runs', tmp)
    run(PY, 'tests/drills/smoke_rl.py', tmp/'smoke')


@step
def site(tmp):
    "the site builds: no warning, no dead link, no outside request"
    run(PY, 'docs/build.py')


def main(names):
    if unknown := set(names) - set(STEPS):
        sys.exit(f'no step {sorted(unknown)}; there are {", ".join(STEPS)}')
    os.environ |= dict(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', PYTHONDONTWRITEBYTECODE='1')
    rows = []
    for name, fn in STEPS.items():
        if names and name not in names: continue
        print(f'\n== {name}: {fn.__doc__}', flush=True)
        start, verdict = time.time(), 'ok'
        with tempfile.TemporaryDirectory(prefix=f'kat-{name}-') as tmp:
            try:
                fn(Path(tmp))
            except SystemExit as e:
                verdict = 'FAILED'
                print(e)
        rows.append((name, verdict, time.time() - start))
        print(f'-- {name}: {verdict}, {rows[-1][2]:.0f} s', flush=True)
    print('\n' + '\n'.join(f'{n:12}{v:8}{s:6.0f} s' for n, v, s in rows))
    sys.exit(any(v != 'ok' for _, v, _ in rows))


if __name__ == '__main__':
    main(sys.argv[1:])
