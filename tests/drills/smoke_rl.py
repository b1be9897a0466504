"""What the RL stage of a smoke run must have done: python tests/drills/smoke_rl.py data/runs/smoke [WORLD]

Rewards that the real grader gave differ within a group, the weights moved, and the better answers of these groups (the
expert's, which passed) became more likely. AssertionError, or SystemExit where the run isn't one.
"""
import sys
from pathlib import Path

import numpy as np
import torch

from kat.core.io import read_log
from kat.envs.base import make_world
from kat.learn.rft import with_logprobs
from kat.learn.training import load_model
from kat.recipe.rollouts import rollout, teacher


def better_answers(tokenizer, name, n):
    "The expert's trajectories of the first update's tasks that passed"
    world = make_world(name)
    tasks = [world.train_task(0, 6 * 10**5 + i) for i in range(n)]
    with world.open() as make_env:
        played = rollout(teacher(world, tokenizer), tokenizer, tasks, make_env, seed=6 * 10**4)
    return [t for t in played if t.reward == 1]


def mean_logprob(model, trajectories):
    "Over the trained tokens, with the model as it is"
    scored = with_logprobs(model, trajectories, dtype=torch.float32)
    return np.concatenate([s.logprobs for t in scored for s in t.segments if s.trainable]).mean()


def main(run, world='micro', n=4):
    rows = [r for r in read_log(run/'metrics.jsonl') if r['stage'] == '40_rl' and 'reward' in r]
    if not rows:
        sys.exit(f'{run}: no update of 40_rl in its metrics.jsonl')
    assert all(r['live_groups'] > 0 for r in rows), f'rewards differ in no group: {rows}'
    (before, tokenizer), (after, _) = (load_model(run/stage/'model') for stage in ('30_rft', '40_rl'))
    moved = sum(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert moved, 'no weight moved'
    better = better_answers(tokenizer, world, n)
    assert better, 'the expert passed no task'
    was, now = mean_logprob(before, better), mean_logprob(after, better)
    assert now > was, f'the better answers did not become more likely: {was:.4f} -> {now:.4f} a token'
    print(f'{len(rows)} updates, live groups {[r["live_groups"] for r in rows]}, {moved} tensors moved, '
          f'log-prob of the better answers {was:.4f} -> {now:.4f} a token')


if __name__ == '__main__':
    main(Path(sys.argv[1]), *sys.argv[2:])
