"""Many micro episodes at once: `python benchmarks/episodes.py` (1,000 of them; a minute or two on two cores).

The scripted expert plays them through `kat.envs.base.episodes`, all at the same time, every test in the sandbox; then
what is left of it is looked for: processes, open descriptors, folders. Exit status 1 where something is.
"""
import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]/'tests/helpers'))

from left_behind import descriptors, offspring

from kat.envs.base import episodes, find_world, scripted
from kat.study.evaluate import wilson


def left_behind(folder: str) -> dict:
    return dict(processes=len(offspring()), descriptors=len(descriptors()), folders=len(os.listdir(folder)))


def bar(began: float):
    "Prints progress with the time that is left, every tenth."
    def told(done, n):
        if done % max(1, n // 10) == 0:
            spent = time.monotonic() - began
            rate = done / spent
            print(f'{done:6} of {n}, {rate:6.1f} episodes/s, {(n - done) / rate:4.0f} s left', flush=True)
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--n', type=int, default=1000, help='episodes')
    parser.add_argument('--at-once', type=int, default=None, help='episodes side by side; default: all')
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='sandboxes; default: one for each core')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        world, before = find_world('micro'), left_behind(folder)
        tasks, began = [world.train_task(0, i) for i in range(args.n)], time.monotonic()
        with world.open(args.workers) as make_env:
            play = lambda env, task: scripted(env, task, world.expert(task, 0))
            ended = asyncio.run(episodes(tasks, make_env, play, args.at_once or args.n, told=bar(began)))
            sandbox_s, during = make_env(tasks[0]).sandbox_s, left_behind(folder)
        spent, after = time.monotonic() - began, left_behind(folder)
        tempfile.tempdir = None
    solved = sum(one.reward == 1 for one in ended)
    lo, hi = wilson(solved, sum(one.finish != 'infra' for one in ended))
    print(f'{args.n} episodes, {args.at_once or args.n} at once, {args.workers} sandboxes: {spent:.1f} s, '
          f'{args.n / spent:.1f} episodes/s, {sandbox_s:.0f} s in sandboxes')
    print(f'ended {dict(Counter(one.finish for one in ended))}, solved {solved} [{lo:.3f}, {hi:.3f}], '
          f'infrastructure faults {sum(len(one.faults) for one in ended)}')
    print(f'before {before}, while the pool is open {during}, after {after}')
    sys.exit(after != before)


if __name__ == '__main__':
    main()
