"""Is RFT worth its updates? (see `make rft`)

    python benchmarks/rft.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2

For each finished run of a preset, makes the run without the stage (unless it is there): RL straight from the same SFT
model, with the same settings and as many updates as RFT and RL had together; about nine minutes each for `tiny` on one
core. It goes to `--without DIR/NAME` (default: `norft` beside the first run). Writes `figures/rft.json`, which
`nbs/learn/07_rft.ipynb` reads, draws `figures/rft.png`, and prints tables.
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from kat.cluster.launch import read_parameters, run_notebook, set_parameters
from kat.core.figures import save_figure, use_style
from kat.core.io import read_log, read_parquet
from kat.recipe.pipeline import ROOT, read_json, write_json
from kat.study.evaluate import load_eval, wilson
from kat.study.plots import moving_mean

ARMS = {"with": "RFT, then RL", "without": "RL alone"}
MODES = ("sampled", "greedy")
WINDOW, MARGIN = 8, 0.02   # updates in a moving mean; what counts as having reached a rate
# Student's t at 97.5 %, by number of seeds
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def make_without(run, folder):
    "The run without RFT."
    if (folder / "eval/rl.json").exists(): return
    stages = read_json(run / "config.json", "it is no run of the pipeline")["stages"]
    steps = stages["30_rft"]["steps"] + stages["40_rl"]["steps"]
    values = stages["40_rl"] | {"steps": steps, "run_dir": str(folder.resolve())}
    for name in ("30_rft", "eval"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # where the RL stage looks for its start
    shutil.copytree(run / "20_sft/model", folder / "30_rft/model", dirs_exist_ok=True)
    for stage in ("base", "mid", "sft"):
        for path in (run / "eval").glob(f"{stage}.*"):
            shutil.copy(path, folder / "eval")
    shutil.copy(run / "eval/sft.json", folder / "eval/rft.json")
    shutil.copy(run / "config.json", folder)
    notebook = ROOT / "nbs/runs/40_rl.ipynb"
    given = [f"{k}={v}" for k, v in values.items()]
    parameters = set_parameters(read_parameters(notebook), given, notebook.name)
    run_notebook(notebook, folder / "40_rl.ipynb", parameters)


def tokens_of_rft(run, row):
    """Tokens that the policy sampled in an update of RFT: as logged, or what was trained without the teachers' part,
    scaled from live groups to all."""
    if "sampled_tokens" in row: return row["sampled_tokens"]
    truths = read_parquet(run / f"30_rft/ground_truths/{row['step'] - 1:04}.parquet")
    given = sum(int(t.mask.sum()) for t in truths)
    live = row["live_groups"] / row["groups"]
    return (row["trained_tokens"] - given * live) / live


def tokens_of_rl(rows, per_turn):
    """The same for RL: as logged, or turns (logged) times tokens a turn,
    which move in a straight line between the evaluations before and after."""
    rate = np.linspace(*per_turn, len(rows))
    return [row["sampled_tokens"] if "sampled_tokens" in row else row["turns"] * row["trajectories"] * p
            for row, p in zip(rows, rate)]


def curve(run):
    "Per update: share of rollouts solved, and tokens sampled up to then (thousands)."
    rows = [row for row in read_log(run / "metrics.jsonl") if row["stage"] in ("30_rft", "40_rl") and "reward" in row]
    rft, rl = ([row for row in rows if row["stage"] == stage] for stage in ("30_rft", "40_rl"))
    ends = [load_eval(run / f"eval/{stage}.json")["sampled"] for stage in ("rft", "rl")]
    tokens = [tokens_of_rft(run, row) for row in rft] + tokens_of_rl(rl, [end["tokens"] / end["turns"] for end in ends])
    return {"solved": [round(row["solved_share"], 4) for row in rft] + [round(row["solved"], 4) for row in rl],
            "tokens": [round(float(t) / 1000, 2) for t in np.cumsum(tokens)], "rft_updates": len(rft)}


def reached(c, target):
    "First update, and thousands of tokens, at which the moving mean of the last updates is at `target`; None: never."
    mean = np.convolve(c["solved"], np.ones(WINDOW) / WINDOW, "valid")
    if not (mean >= target).any(): return None
    at = int(np.argmax(mean >= target)) + WINDOW
    return [at, c["tokens"][at - 1]]


def ahead(with_it, without):
    "RL after RFT against RL alone at the same RL update, on the same tasks: mean difference in each third of updates."
    rl = np.array(with_it["solved"][with_it["rft_updates"]:])
    return [round(float(third.mean()), 4) for third in np.array_split(rl - without["solved"][:len(rl)], 3)]


def solved(run, stage, mode):  # bool per held-out task
    name = stage if mode == "sampled" else f"{stage}.greedy"
    return np.array([t.reward == 1 for t in read_parquet(run / f"eval/{name}.parquet")])


def gain(a, b, draws=4000):
    "Mean difference b - a over the same held-out tasks, with its 95 % bootstrap interval over tasks."
    gap = b.astype(float) - a
    means = gap[np.random.default_rng(0).integers(len(gap), size=(draws, len(gap)))].mean(1)
    return [round(float(x), 4) for x in (gap.mean(), *np.quantile(means, (0.025, 0.975)))]


def compare(run, other):
    "All numbers of one seed."
    curves = {"with": curve(run), "without": curve(other)}
    target = float(np.mean(curves["with"]["solved"][-WINDOW:])) - MARGIN
    return {"name": run.name, "curves": curves, "target": round(target, 4),
            "reached": {arm: reached(own, target) for arm, own in curves.items()}, "ahead": ahead(*curves.values()),
            "held": {mode: held_out(run, other, mode) for mode in MODES},
            "gains": {mode: gains(run, other, mode) for mode in MODES},
            "monitor": json.loads((run / "30_rft/monitor.json").read_text())}


def held_out(run, other, mode):
    "Solve rates on held-out tasks, by stage and arm."
    stages = {"sft": (run, "sft"), "rft": (run, "rft"), "with": (run, "rl"), "without": (other, "rl")}
    return {name: {x: load_eval(folder / f"eval/{stage}.json")[mode][x] for x in ("n", "solved", "rate", "lo", "hi")}
            for name, (folder, stage) in stages.items()}


def gains(run, other, mode):
    "What each stage added, and what the run with RFT has over the one without."
    last = solved(run, "rl", mode)
    return {"rft over sft": gain(solved(run, "sft", mode), solved(run, "rft", mode)),
            "rl over rft": gain(solved(run, "rft", mode), last),
            "with over without": gain(solved(other, "rl", mode), last)}


def half_width(x):
    return T.get(len(x), 1.96) * x.std(0, ddof=1) / len(x) ** 0.5


def over_seeds(x):
    "Mean with its 95 % interval over seeds (Student's t)."
    x = np.asarray(x, float)
    if len(x) < 2: return [float(x.mean()), None, None]
    half = half_width(x)
    return [round(float(v), 4) for v in (x.mean(), x.mean() - half, x.mean() + half)]


def summary(seeds):
    "What the seeds say together."
    last = {arm: [seed["curves"][arm]["tokens"][-1] for seed in seeds] for arm in ARMS}
    names = seeds[0]["gains"]["sampled"]
    return {"gains": {mode: {name: over_seeds([seed["gains"][mode][name][0] for seed in seeds]) for name in names}
                      for mode in MODES},
            "ahead at the same RL update": [over_seeds(third) for third in zip(*(seed["ahead"] for seed in seeds))],
            "tokens in all": {arm: over_seeds(last[arm]) for arm in ARMS},
            "fewer tokens": over_seeds([1 - x / y for x, y in zip(last["with"], last["without"])]),
            "later without": later(seeds),
            "never reached": {arm: sum(seed["reached"][arm] is None for seed in seeds) for arm in ARMS},
            "stopping": stopping(seeds)}


def later(seeds):
    "How much later the run without RFT reaches the rate, where both do."
    both = [seed["reached"] for seed in seeds if all(seed["reached"].values())]
    return {unit: over_seeds([x["without"][i] - x["with"][i] for x in both]) if both else None
            for i, unit in enumerate(("updates", "tokens"))}


def stopping(seeds):
    "What the monitor stopped, how often it was wrong, and the share of RFT's tokens that it saved."
    monitors = [seed["monitor"] for seed in seeds]
    stopped, finished, wrong = (sum(monitor[k] for monitor in monitors) for k in ("stopped", "finished", "passed"))
    curves = [seed["curves"]["with"] for seed in seeds]
    spent = [own["tokens"][own["rft_updates"] - 1] for own in curves]
    saved = [monitor["tokens"] * monitor["stopped"] / max(1, monitor["finished"]) / 1000 / tokens
             for monitor, tokens in zip(monitors, spent)]
    return {"stopped": stopped, "finished": finished, "wrong": wrong,
            "interval": [round(x, 4) for x in wilson(wrong, finished)], "saved": over_seeds(saved)}


def draw_training(axes, seeds):
    "Rollouts solved over updates and over tokens, both arms."
    for arm, color in zip(ARMS, ("C0", "C1")):
        curves = [seed["curves"][arm] for seed in seeds]
        y = np.array([moving_mean(np.array(own["solved"]), WINDOW) for own in curves])
        x = np.arange(1, y.shape[1] + 1), np.mean([own["tokens"] for own in curves], 0)
        for ax, at in zip(axes, x):
            for one in y:
                ax.plot(at, one, color=color, lw=0.6, alpha=0.5)
            ax.plot(at, y.mean(0), color=color, lw=2, label=ARMS[arm])
            if len(y) > 1:
                low, high = y.mean(0) - half_width(y), np.minimum(1, y.mean(0) + half_width(y))
                ax.fill_between(at, low, high, color=color, alpha=0.15, lw=0)
    axes[0].set(xlabel="updates, RFT's included", ylabel="training rollouts solved", ylim=(0.5, 1))
    axes[1].set(xlabel="tokens sampled (thousands), RFT's included", ylim=(0.5, 1))
    axes[0].legend(loc="lower right", fontsize=8)


def draw_held_out(ax, seeds):
    "Held-out rates after each stage, by seed."
    colors = {"sft": "0.5", "rft": "C2", "with": "C0", "without": "C1"}
    for i, seed in enumerate(seeds):
        for j, mode in enumerate(MODES):
            for k, (name, color) in enumerate(colors.items()):
                held = seed["held"][mode][name]
                error = [[held["rate"] - held["lo"]], [held["hi"] - held["rate"]]]
                ax.errorbar(k + 0.16 * (i - 1) + 5 * j, held["rate"], error, color=color, marker="o", ms=3,
                            capsize=1.5, lw=1)
    ax.set(xticks=[*range(4), *range(5, 9)], ylim=(0.5, 1), title="held out: sampled | greedy")
    ax.set_xticklabels(["SFT", "RFT", "with", "without"] * 2, rotation=60, fontsize=7)


def draw(seeds, command):
    plt, _ = use_style()
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), gridspec_kw={"width_ratios": [3, 3, 2.2]})
    draw_training(axes[:2], seeds)
    draw_held_out(axes[2], seeds)
    caption = (f"RL after RFT and RL straight from SFT, as many updates in all, {len(seeds)} seeds. "
               f"Left, middle: share of training rollouts solved, moving mean over {WINDOW} updates; "
               "thick: mean over seeds, band: its 95 % t-interval. Right: held-out tasks, 95 % Wilson intervals.")
    save_figure(fig, ROOT / "figures/rft.png", caption, command)


def show(seeds, whole):
    rate = lambda held: f"{held['rate']:.3f} [{held['lo']:.3f}, {held['hi']:.3f}]"
    print("| run | mode | SFT | RFT | RL after RFT | RL alone | after RFT over alone, same tasks |\n"
          "|---|---|---|---|---|---|---|")
    for seed in seeds:
        for mode, held in seed["held"].items():
            rates = " | ".join(rate(held[name]) for name in ("sft", "rft", "with", "without"))
            over = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*seed["gains"][mode]["with over without"])
            print(f"| {seed['name']} | {mode} | {rates} | {over} |")
    print("\n| run | target | RL after RFT: update, tokens (k) | RL alone | tokens in all (k): after RFT, alone |\n"
          "|---|---|---|---|---|")
    for seed in seeds:
        at = ["never" if seed["reached"][arm] is None else "{}, {:.0f}".format(*seed["reached"][arm]) for arm in ARMS]
        last = [seed["curves"][arm]["tokens"][-1] for arm in ARMS]
        print(f"| {seed['name']} | {seed['target']:.3f} | {at[0]} | {at[1]} | {last[0]:.0f}, {last[1]:.0f} |")
    print("\n" + json.dumps(whole, indent=1))


def main(runs, folder):
    for run in runs:
        make_without(run, folder / run.name)
    seeds = [compare(run, folder / run.name) for run in runs]
    whole = summary(seeds)
    write_json(ROOT / "figures/rft.json",
               {"command": "make rft", "window": WINDOW, "margin": MARGIN, "seeds": seeds, "all": whole})
    draw(seeds, "make rft")
    show(seeds, whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--without", type=Path, help="folder of the runs without RFT")
    args = parser.parse_args()
    main(args.runs, args.without or args.runs[0].parent / "norft")
