"""RL with agents that run on their own beside RL that plays and trains in turns (see `make modes`)

    python benchmarks/modes.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2

For each run that has got as far as RFT, does the RL stage twice from the same model, with the same settings:
`mode=sync`, then `mode=async` (staleness 1), one after the other on the same machine. They go to `modes/NAME-sync` and
`modes/NAME-async` beside the first run; what is there already is kept. The tasks of an update are drawn anew, so the
share solved in an update is a rate on tasks that were never trained on; 512 held-out tasks end each run.
Writes `figures/modes.json`, draws `figures/modes.png`, prints a table.
"""
import argparse
import shutil
from pathlib import Path

import numpy as np

from kat.cluster.launch import read_parameters, run_notebook, set_parameters
from kat.core.figures import save_figure, use_style
from kat.core.io import read_log
from kat.recipe.pipeline import ROOT, machine, read_json, write_json
from kat.study.evaluate import load_eval
from kat.study.plots import moving_mean
from rft import MODES as SAMPLING
from rft import gain, over_seeds, solved

MODES = {"sync": "in turns", "async": "on their own"}
WINDOW, MARGIN = 8, 0.02   # updates in a moving mean; what counts as having reached a rate
STAGES = "base", "mid", "sft", "rft"


def play(run, folder, mode):
    "The RL stage of a run, from its model after RFT, in one mode."
    if (folder / "eval/rl.json").exists(): return
    stages = read_json(run / "config.json", "it is no run of the pipeline")["stages"]
    for name in ("30_rft", "eval"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copytree(run / "30_rft/model", folder / "30_rft/model", dirs_exist_ok=True)
    for path in (p for stage in STAGES for p in (run / "eval").glob(f"{stage}.*")):
        shutil.copy(path, folder / "eval")
    shutil.copy(run / "config.json", folder)
    values = stages["40_rl"] | {"mode": mode, "run_dir": str(folder.resolve())}
    notebook = ROOT / "nbs/runs/40_rl.ipynb"
    parameters = set_parameters(read_parameters(notebook), [f"{k}={v}" for k, v in values.items()], notebook.name)
    run_notebook(notebook, folder / "40_rl.ipynb", parameters)


def curve(folder):
    "After each update: seconds since the stage began, share of rollouts solved; and what the mode says of its work."
    rows = [row for row in read_log(folder / "metrics.jsonl") if row["stage"] == "40_rl" and "reward" in row]
    ages = [row["age"] for row in rows if "age" in row]
    return {"seconds": [round(row["wall_s"], 1) for row in rows], "solved": [round(row["solved"], 4) for row in rows],
            "sampled_tokens": sum(row["sampled_tokens"] for row in rows), "dropped": rows[-1].get("dropped", 0),
            "age": round(float(np.mean(ages)), 3) if ages else 0.0}


def reached(own, target):
    "Seconds and updates after which the moving mean is at a rate; None: never."
    mean = np.convolve(own["solved"], np.ones(WINDOW) / WINDOW, "valid")
    if not (mean >= target).any(): return None
    at = int(np.argmax(mean >= target)) + WINDOW - 1
    return [own["seconds"][at], at + 1]


def compare(name, folders):
    "All numbers of one seed."
    curves = {mode: curve(folder) for mode, folder in folders.items()}
    target = float(np.mean(curves["sync"]["solved"][-WINDOW:])) - MARGIN
    held = {way: {mode: load_eval(folder / "eval/rl.json")[way] for mode, folder in folders.items()}
            for way in SAMPLING}
    keep = "n", "solved", "rate", "lo", "hi"
    return {"name": name, "curves": curves, "target": round(target, 4),
            "reached": {mode: reached(own, target) for mode, own in curves.items()},
            "held": {way: {mode: {key: record[key] for key in keep} for mode, record in both.items()}
                     for way, both in held.items()},
            "async over sync": {way: gain(solved(folders["sync"], "rl", way), solved(folders["async"], "rl", way))
                                for way in SAMPLING}}


def summary(seeds):
    "What the seeds say together."
    last = lambda mode: np.array([seed["curves"][mode]["seconds"][-1] for seed in seeds])
    both = [seed["reached"] for seed in seeds if all(seed["reached"].values())]
    return {"async over sync": {way: over_seeds([seed["async over sync"][way][0] for seed in seeds])
                                for way in SAMPLING},
            "seconds, sync over async": over_seeds(last("sync") / last("async")),
            "seconds to the rate, sync over async":
                over_seeds([x["sync"][0] / x["async"][0] for x in both]) if both else None,
            "never reached": {mode: sum(seed["reached"][mode] is None for seed in seeds) for mode in MODES}}


def draw(seeds, command):
    plt, _ = use_style()
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), gridspec_kw={"width_ratios": [3, 3, 2.2]})
    for mode, color in zip(MODES, ("C0", "C1")):
        for i, seed in enumerate(seeds):
            own = seed["curves"][mode]
            mean, label = moving_mean(np.array(own["solved"]), WINDOW), None if i else MODES[mode]
            axes[0].plot(np.arange(1, len(mean) + 1), mean, color=color, lw=1.2, label=label)
            axes[1].plot(np.array(own["seconds"]) / 60, mean, color=color, lw=1.2)
            for j, way in enumerate(SAMPLING):
                held = seed["held"][way][mode]
                axes[2].errorbar(3 * j + list(MODES).index(mode) + 0.18 * (i - 1), held["rate"],
                                 [[held["rate"] - held["lo"]], [held["hi"] - held["rate"]]], color=color, marker="o",
                                 ms=3, capsize=1.5, lw=1)
    axes[0].set(xlabel="updates", ylabel="rollouts solved, fresh tasks", ylim=(0.6, 1))
    axes[1].set(xlabel="minutes", ylim=(0.6, 1))
    axes[0].legend(loc="lower right", fontsize=8, title="agents play", title_fontsize=8)
    axes[2].set(xticks=[0, 1, 3, 4], ylim=(0.6, 1), title="held out: sampled | greedy")
    axes[2].set_xticklabels(["in turns", "own"] * 2, rotation=60, fontsize=7)
    caption = (f"RL from the same models, {len(seeds)} seeds, agents and trainer in turns, and agents on their own in "
               f"a second process (staleness 1). Moving mean over {WINDOW} updates; right: 95 % Wilson intervals.")
    save_figure(fig, ROOT / "figures/modes.png", caption, command)


def show(seeds, whole):
    rate = lambda held: f"{held['rate']:.3f} [{held['lo']:.3f}, {held['hi']:.3f}]"
    print("| run | held out | in turns | on their own | difference, same tasks |\n|---|---|---|---|---|")
    for seed in seeds:
        for way, held in seed["held"].items():
            over = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*seed["async over sync"][way])
            print(f"| {seed['name']} | {way} | {rate(held['sync'])} | {rate(held['async'])} | {over} |")
    print("\n| run | rate | seconds, updates in turns | on their own | seconds in all | mean age | dropped |\n"
          "|---|---|---|---|---|---|---|")
    for seed in seeds:
        at = [f"{each[0]:.0f}, {each[1]}" if each else "never" for each in seed["reached"].values()]
        own = seed["curves"]
        print(f"| {seed['name']} | {seed['target']:.3f} | {at[0]} | {at[1]} | {own['sync']['seconds'][-1]:.0f}, "
              f"{own['async']['seconds'][-1]:.0f} | {own['async']['age']} | {own['async']['dropped']} |")
    for name, value in whole.items():
        print(f"{name}: {value}")


def main(runs, folder):
    folders = {run.name: {mode: folder / f"{run.name}-{mode}" for mode in MODES} for run in runs}
    for run in runs:
        for mode, where in folders[run.name].items():
            play(run, where, mode)
    seeds = [compare(name, both) for name, both in folders.items()]
    whole = summary(seeds)
    write_json(ROOT / "figures/modes.json", {"command": "make modes", "machine": machine(), "window": WINDOW,
                                             "margin": MARGIN, "seeds": seeds, "all": whole})
    draw(seeds, "make modes")
    show(seeds, whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    args = parser.parse_args()
    main(args.runs, args.runs[0].parent / "modes")
