"""What RFT's monitor would save, and how often it would be wrong, for several settings.

    python benchmarks/monitor.py data/runs/NAME [tasks [rollouts]]

The run's SFT model plays training tasks that it has not seen; nothing is stopped, and monitors of several settings look on
(`kat.learn.rft.shadow`): savings and false stops are exact. Then it plays them once more and a monitor corrects it.
"""
import sys

import torch

from kat.recipe.rollouts import ModelPolicy, rollout
from kat.learn.rft import Attempt, Monitor, shadow
from kat.infer.engines import HFEngine
from kat.recipe.rollouts import expert_data
from kat.learn.training import load_model
from kat.envs.micro import train_task, world
from kat.study.evaluate import wilson


def main(run, n=64, k=4):
    lm, tok = load_model(f'{run}/20_sft/model')
    engine = HFEngine(lm, max_len=1024, slots=128, dtype=torch.bfloat16)
    policy = ModelPolicy(engine)
    tasks, monitors = [train_task(0, 5 * 10**5 + 10**4 + i) for i in range(n)], {}
    with world() as make_env:
        given = expert_data(tok, [t for t in tasks for _ in range(3)], make_env, 77)
        truths = {t.id: [Attempt.of(g) for g in given if g.task == t.id and g.reward == 1] for t in tasks}
        tasks = [t for t in tasks if truths[t.id] for _ in range(k)]
        played = rollout(policy, tok, tasks, make_env, seed=5)

        def watch(e):
            if e.name not in monitors:
                monitors[e.name] = Monitor(truths[e.task.id], .4, 2, corrections=2)
            said = monitors[e.name].observe(e.turns[-1])
            return monitors[e.name].correction if said == 'correct' else said
        corrected = rollout(policy, tok, tasks, make_env, seed=5, watch=watch)
    seen = [t.info if t.info['finish'] == 'submit' else t.info | dict(tests={}) for t in played]
    passed = lambda ts: sum(t.reward == 1 for t in ts)
    print(f'{len(played)} rollouts, {passed(played)} pass')
    print('threshold patience  stopped  would have passed            tokens saved')
    for threshold in (.4, .5, .6, .7):
        for patience in (1, 2, 3):
            r = shadow(seen, [truths[t.task] for t in played], threshold=threshold, patience=patience)
            lo, hi = wilson(r['false_stops'], r['stopped'])
            print(f"{threshold:9} {patience:8} {r['stopped']:8}  {r['false_stops']:3} [{lo:.3f}, {hi:.3f}] {r['tokens_share']:23.1%}")
    touched = [i for i, t in enumerate(corrected) if any(u.get('corrected') for u in t.info['turns'])]
    turns = sum(bool(u.get('corrected')) for t in corrected for u in t.info['turns'])
    print(f'corrected (0.4, 2, at most 2): {turns} turns in {len(touched)} rollouts, {sum(t.info["finish"] == "stopped" for t in corrected)} stopped; '
          f'of these rollouts {passed([corrected[i] for i in touched])} pass, uncorrected {passed([played[i] for i in touched])}; '
          f'of all {passed(corrected)} and {passed(played)}')


if __name__ == '__main__':
    main(sys.argv[1], *map(int, sys.argv[2:]))
