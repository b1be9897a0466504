"""Several runs of one preset side by side: `python benchmarks/seeds.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2` (see `make seeds`).

Prints a table of held-out solve rates with 95 % Wilson intervals, whether RL lies above SFT with disjoint intervals, and the weakest family before RL; draws `figures/seeds.png`.
"""
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns

from kat.core.io import read_parquet
from kat.recipe.pipeline import ROOT
from kat.study.evaluate import load_eval
from kat.core.figures import save_figure

STAGES = ["base", "mid", "sft", "rft", "rl"]
NAMES = ["Base", "Mid-training", "SFT", "RFT", "RL"]


def weakest(run, stage):
    "The family with the lowest solve rate, sampled: name, rate."
    by = defaultdict(list)
    for t in read_parquet(run / "eval" / f"{stage}.parquet"):
        by[t.info["family"]].append(t.reward == 1)
    return min(((sum(x) / len(x), f, len(x)) for f, x in by.items()))


def main(runs):
    records = {r: {s: load_eval(r / "eval" / f"{s}.json") for s in STAGES} for r in runs}
    print("| run | mode | " + " | ".join(NAMES) + " | RL above SFT, intervals disjoint | weakest family after RFT |\n|---|---|" + "---|" * (len(STAGES) + 2))
    for run, rs in records.items():
        rate, family, n = weakest(run, "rft")
        for mode in ("sampled", "greedy"):
            cells = [f"{m['rate']:.3f} [{m['lo']:.3f}, {m['hi']:.3f}]" for m in (rs[s][mode] for s in STAGES)]
            above = "yes" if rs["rl"][mode]["lo"] > rs["sft"][mode]["hi"] else "no"
            print(f"| {run.name} | {mode} | " + " | ".join(cells) + f" | {above} | {family} {rate:.2f} of {n} |")
    sns.set_theme(style="whitegrid")
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    for ax, mode in zip(axes, ("sampled", "greedy")):
        for i, (run, rs) in enumerate(records.items()):
            y = [100 * rs[s][mode]["rate"] for s in STAGES]
            err = [[100 * (rs[s][mode]["rate"] - rs[s][mode]["lo"]) for s in STAGES], [100 * (rs[s][mode]["hi"] - rs[s][mode]["rate"]) for s in STAGES]]
            ax.errorbar([x + 0.09 * (i - (len(runs) - 1) / 2) for x in range(len(STAGES))], y, err, marker="o", ms=4, capsize=2, lw=1.2, label=f"run {run.name}")
        ax.set(xticks=range(len(STAGES)), title=f"{mode}" + (", T = 1" if mode == "sampled" else ""), ylim=(-2, 102))
        ax.set_xticklabels(NAMES, rotation=20)
    axes[0].set_ylabel("held-out tasks solved (%)")
    axes[0].legend(loc="lower right", fontsize=8)
    fig.suptitle("Held-out tasks solved after each stage, by seed")
    fig.tight_layout()
    save_figure(fig, ROOT / "figures/seeds.png", f"Share of held-out tasks solved after each stage, {len(runs)} seeds, 95 % Wilson intervals (256 tasks for base and mid-training, 512 after).", "make seeds")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(a) for a in sys.argv[1:]])
