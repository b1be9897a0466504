"""Several runs of one preset side by side (see `make seeds`):

    python benchmarks/seeds.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2

Prints a table of held-out solve rates with 95 % Wilson intervals, whether RL lies above SFT with disjoint intervals,
and the weakest family before RL; draws `figures/seeds.png`.
"""
import sys
from collections import defaultdict
from pathlib import Path


from kat.core.figures import save_figure, use_style
from kat.core.io import read_parquet
from kat.recipe.pipeline import ROOT
from kat.study.evaluate import load_eval

STAGES = ["base", "mid", "sft", "rft", "rl"]
NAMES = ["Base", "Mid-training", "SFT", "RFT", "RL"]


def weakest(run, stage):
    "The family with the lowest solve rate, sampled: rate, name, tasks."
    solved = defaultdict(list)
    for t in read_parquet(run / "eval" / f"{stage}.parquet"):
        solved[t.info["family"]].append(t.reward == 1)
    return min((sum(found) / len(found), family, len(found)) for family, found in solved.items())


def rows(run, stages):
    "Lines of the table: a run's held-out solve rates, sampled and greedy."
    rate, family, n = weakest(run, "rft")
    for mode in ("sampled", "greedy"):
        held = [stages[stage][mode] for stage in STAGES]
        cells = [f"{x['rate']:.3f} [{x['lo']:.3f}, {x['hi']:.3f}]" for x in held]
        above = "yes" if stages["rl"][mode]["lo"] > stages["sft"][mode]["hi"] else "no"
        yield f"| {run.name} | {mode} | " + " | ".join(cells) + f" | {above} | {family} {rate:.2f} of {n} |"


def draw(records):
    plt, _ = use_style()
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    for ax, mode in zip(axes, ("sampled", "greedy")):
        for i, (run, stages) in enumerate(records.items()):
            rate, lo, hi = ([stages[stage][mode][key] for stage in STAGES] for key in ("rate", "lo", "hi"))
            error = [[100 * (y - low) for y, low in zip(rate, lo)], [100 * (high - y) for y, high in zip(rate, hi)]]
            at = [x + 0.09 * (i - (len(records) - 1) / 2) for x in range(len(STAGES))]
            ax.errorbar(at, [100 * y for y in rate], error, marker="o", ms=4, capsize=2, lw=1.2,
                        label=f"run {run.name}")
        ax.set(xticks=range(len(STAGES)), title=f"{mode}" + (", T = 1" if mode == "sampled" else ""), ylim=(-2, 102))
        ax.set_xticklabels(NAMES, rotation=20)
    axes[0].set_ylabel("held-out tasks solved (%)")
    axes[0].legend(loc="lower right", fontsize=8)
    fig.suptitle("Held-out tasks solved after each stage, by seed")
    fig.tight_layout()
    return fig


def main(runs):
    records = {run: {stage: load_eval(run / "eval" / f"{stage}.json") for stage in STAGES} for run in runs}
    print("| run | mode | " + " | ".join(NAMES) + " | RL above SFT, intervals disjoint | weakest family after RFT |")
    print("|---|---|" + "---|" * (len(STAGES) + 2))
    for run, stages in records.items():
        for line in rows(run, stages):
            print(line)
    caption = (f"Share of held-out tasks solved after each stage, {len(runs)} seeds, 95 % Wilson intervals "
               "(256 tasks for base and mid-training, 512 after).")
    save_figure(draw(records), ROOT / "figures/seeds.png", caption, "make seeds")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(path) for path in sys.argv[1:]])
