"""What a warm job costs: this version of the sandbox beside another one, in turns.

    python benchmarks/sandbox.py --other PATH    # PATH: a checkout of kat at another commit

Prints, for a job that does nothing and for one that computes for some milliseconds, the median time of both and the
median of the ratios of neighbours. Without --other there is only this version, and an interpreter's start to compare.
"""
import argparse
import importlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

JOBS = {'nothing': 'result(1)', 'some milliseconds': 'n = 0\nfor i in range(150_000): n += i\nresult(n)'}


def load(root):
    "The sandbox module below `root`, whatever was imported before."
    for name in [name for name in sys.modules if name == 'kat' or name.startswith('kat.')]:
        del sys.modules[name]
    sys.path.insert(0, str(root))
    module = importlib.import_module('kat.envs.sandbox')
    sys.path.remove(str(root))
    return module


def seconds(run, *args):
    start = time.perf_counter()
    run(*args)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--other', help='root of another checkout')
    parser.add_argument('--pairs', type=int, default=200)
    asked = parser.parse_args()
    here = load(Path(__file__).resolve().parents[1])
    new, old = here.WarmPool(), None
    if asked.other:
        there = load(asked.other)
        old = there.WarmPool()
    print(f'{"job":20}{"this, ms":>10}{"other, ms":>10}{"ratio":>8}')
    for name, text in JOBS.items():
        mine, yours = [], []
        for _ in range(asked.pairs):
            mine.append(seconds(new.run, here.Job(text)))
            if old:
                yours.append(seconds(old.run, there.Job(text)))
            else:
                yours.append(seconds(subprocess.run, [sys.executable, '-S', '-c', '']))
        ratio = statistics.median(a / b for a, b in zip(mine, yours))
        print(f'{name:20}{statistics.median(mine) * 1e3:10.2f}{statistics.median(yours) * 1e3:10.2f}{ratio:8.2f}')
    for pool in filter(None, (new, old)):
        pool.close()


if __name__ == '__main__':
    main()
