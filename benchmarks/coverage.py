"""Do the intervals of an evaluation cover? 2,000 simulated evaluations of judges with known rates, in each row:
`python benchmarks/coverage.py` (half a minute)

Share of evaluations whose 95 % interval holds the truth. `pooled`: Wilson, all runs taken as independent; `wilson`: on
independent trials, what `kat evaluate` prints; `bootstrap`: plain, over tasks; `difference`: of two models, paired,
what `kat compare` prints. Then how often the exact test finds the difference that it says it finds
4 times in 5."""
import argparse

import numpy as np

from kat.study.compare import KINDS_OF_TASKS, coverage, exact_test, power, smallest_difference
from kat.study.evaluate import markdown_table


def found(n, share, n_sim, seed=0):
    "Simulated and exact power at the smallest difference for `n` tasks, `share` of them discordant"
    d = smallest_difference(n, share)
    if d is None: return dict(n=n, discordant=share, smallest=None, simulated=None, exact=None)
    share = max(share, d)
    draw = np.random.default_rng(seed).multinomial(n, [(share + d) / 2, (share - d) / 2, max(0., 1 - share)], n_sim)
    wins = [won > lost and exact_test(int(won), int(lost)) < .05 for won, lost, _ in draw]
    return dict(n=n, discordant=share, smallest=d, simulated=float(np.mean(wins)), exact=power(n, d, share))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--evaluations', type=int, default=2000)
    args = parser.parse_args()
    rows = []
    for name, kinds in KINDS_OF_TASKS.items():
        for n in (20, 40, 100, 500):
            for runs in (1, 4):
                rows.append(dict(kinds=name, tasks=n, runs=runs) | coverage(kinds, n, runs, args.evaluations))
    print(markdown_table(rows), '', sep='\n')
    print(markdown_table([found(n, share, args.evaluations) for n in (6, 40, 100, 500) for share in (.05, .2, .5)]))


if __name__ == '__main__':
    main()
