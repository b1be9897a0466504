"""Time pruning on this machine: `python benchmarks/prune.py` (a few seconds)

80 rollouts of 80 turns that part ways early: about ten thousand units. Then the two extremes: a chain of units of one
token, and a root with ten thousand children. Each line is the fastest of five; others only slow it down."""
import time

import numpy as np

from kat.tree.prune import POLICIES, Pruning, prune
from kat.tree.trie import TokenTree
from kat.tree.units import TokenFacts, cut_units

rng = np.random.default_rng(0)


def rollouts(K=80, turns=80, call=12, result=20, prompt=100):
    "Rollouts follow a common path up to some turn, then go their own way."
    common, rows = rng.integers(0, 50, (turns, call + result)), []
    for _ in range(K):
        own = rng.integers(0, 50, (turns, call + result))
        part = int(turns * rng.random() / 2)
        own[:part] = common[:part]
        rows.append(np.concatenate([np.arange(prompt), own.ravel()]))
    tree = TokenTree.from_sequences(rows)
    later, inside = tree.position >= prompt, (tree.position - prompt) % (call + result)
    cuts = later & ((inside == 0) | (inside == call))
    return facts(tree, later & (inside < call), cuts, later & (inside >= call))


def facts(tree, trainable, cuts=None, event=None):
    n = len(tree)
    entropy, weight, logprob = rng.exponential(size=n), rng.normal(size=n), -rng.exponential(size=n)
    return TokenFacts(tree, trainable, entropy, weight, logprob, 1 + 1e-3 * tree.position, cuts, event)


def show(f, ways):
    print(f'{f.tree}, {len(cut_units(f))} units')
    for name, how in ways.items():
        spent = []
        for _ in range(5):
            start = time.perf_counter()
            prune(f, 0.4 * f.cost.sum(), how)
            spent.append(time.perf_counter() - start)
        print(f'  {name:20} {min(spent):.3f} s', flush=True)


some = 'gradient', 'entropy', 'density'
extra = {'horvitz_thompson': Pruning(correction='horvitz_thompson'), 'window 64': Pruning(window=64)}
show(rollouts(), {p: Pruning(p) for p in POLICIES} | extra)
chain = TokenTree.from_sequences([np.arange(10_000)])
show(facts(chain, chain.position > 0, np.ones(len(chain), bool)), {p: Pruning(p) for p in some} | extra)
star = TokenTree.from_sequences([[0, i] for i in range(10_000)])
show(facts(star, star.position > 0), {p: Pruning(p) for p in some} | extra)
