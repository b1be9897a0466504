"""What RFT's monitor would save, and how often it would be wrong, for several settings.

    python benchmarks/monitor.py data/runs/NAME [tasks [rollouts]]

The run's SFT model plays training tasks that it has not seen; nothing is stopped, and monitors of several settings
look on (`kat.learn.rft.shadow`): savings and false stops are exact. Then it plays them once more and a monitor
corrects it.
"""
import sys

import torch

from kat.envs.base import make_world
from kat.infer.engines import HFEngine
from kat.learn.rft import Attempt, Monitor, shadow
from kat.learn.training import load_model
from kat.recipe.rollouts import ModelPolicy, expert_data, rollout
from kat.study.evaluate import wilson


def watcher(truths):
    "A monitor for each episode, which corrects twice at most."
    monitors = {}

    def watch(episode):
        if episode.name not in monitors:
            monitors[episode.name] = Monitor(truths[episode.task.id], .4, 2, corrections=2)
        monitor = monitors[episode.name]
        said = monitor.observe(episode.turns[-1])
        return monitor.correction if said == 'correct' else said
    return watch


def play(run, n, k):
    "Rollouts of `n` tasks, `k` each: left alone, and corrected; and the ground truths of each task."
    lm, tok = load_model(f'{run}/20_sft/model')
    policy = ModelPolicy(HFEngine(lm, max_len=1024, slots=128, dtype=torch.bfloat16))
    world = make_world('micro')
    tasks = [world.train_task(0, 5 * 10**5 + 10**4 + i) for i in range(n)]
    with world.open() as make_env:
        given = expert_data(world, tok, [task for task in tasks for _ in range(3)], make_env, 77)
        truths = {task.id: [Attempt.of(t) for t in given if t.task == task.id and t.reward == 1] for task in tasks}
        tasks = [task for task in tasks if truths[task.id] for _ in range(k)]
        played = rollout(policy, tok, tasks, make_env, seed=5)
        corrected = rollout(policy, tok, tasks, make_env, seed=5, watch=watcher(truths))
    return played, corrected, truths


def passed(trajectories):
    return sum(t.reward == 1 for t in trajectories)


def show_stops(played, truths):
    seen = [t.info if t.info['finish'] == 'submit' else t.info | dict(tests={}) for t in played]
    print(f'{len(played)} rollouts, {passed(played)} pass')
    print('threshold patience  stopped  would have passed            tokens saved')
    for threshold in (.4, .5, .6, .7):
        for patience in (1, 2, 3):
            found = shadow(seen, [truths[t.task] for t in played], threshold=threshold, patience=patience)
            stopped, wrong = found['stopped'], found['false_stops']
            lo, hi = wilson(wrong, stopped)
            saved = found['tokens_share']
            print(f'{threshold:9} {patience:8} {stopped:8}  {wrong:3} [{lo:.3f}, {hi:.3f}] {saved:23.1%}')


def show_corrections(played, corrected):
    shown = [sum(bool(turn.get('corrected')) for turn in t.info['turns']) for t in corrected]
    touched = [i for i, turns in enumerate(shown) if turns]
    stopped = sum(t.info["finish"] == "stopped" for t in corrected)
    print(f'corrected (0.4, 2, at most 2): {sum(shown)} turns in {len(touched)} rollouts, {stopped} stopped; '
          f'of these rollouts {passed([corrected[i] for i in touched])} pass, '
          f'uncorrected {passed([played[i] for i in touched])}; of all {passed(corrected)} and {passed(played)}')


def main(run, n=64, k=4):
    played, corrected, truths = play(run, n, k)
    show_stops(played, truths)
    show_corrections(played, corrected)


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:]))
