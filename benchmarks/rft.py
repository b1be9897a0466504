"""Is RFT worth its updates? `python benchmarks/rft.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2` (see `make rft`).

For each finished run of a preset, makes the run without the stage (unless it is there): RL straight from the same SFT model, with the same settings and as many updates
as RFT and RL had together; about nine minutes each for `tiny` on one core. It goes to `--without DIR/NAME` (default: `norft` beside the first run).
Writes `figures/rft.json`, which `nbs/learn/07_rft.ipynb` reads, draws `figures/rft.png`, and prints tables.
"""
import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from kat.cluster.launch import read_parameters, run_notebook, set_parameters
from kat.core.io import read_log, read_parquet
from kat.recipe.pipeline import ROOT, read_json, write_json
from kat.study.evaluate import load_eval, wilson
from kat.study.plots import moving_mean
from kat.core.figures import save_figure, use_style

ARMS = {"with": "RFT, then RL", "without": "RL alone"}
WINDOW, MARGIN = 8, 0.02   # updates in a moving mean; what counts as having reached a rate
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}   # Student's t at 97.5 %, by number of seeds


def make_without(run, folder):
    "The run without RFT."
    if (folder / "eval/rl.json").exists(): return
    config = read_json(run / "config.json", "it is no run of the pipeline")
    values = config["stages"]["40_rl"] | {"steps": config["stages"]["30_rft"]["steps"] + config["stages"]["40_rl"]["steps"], "run_dir": str(folder.resolve())}
    for d in ("30_rft", "eval"):
        (folder / d).mkdir(parents=True, exist_ok=True)
    shutil.copytree(run / "20_sft/model", folder / "30_rft/model", dirs_exist_ok=True)   # where the RL stage looks for its start
    for f in (f for s in ("base", "mid", "sft") for f in (run / "eval").glob(f"{s}.*")):
        shutil.copy(f, folder / "eval")
    shutil.copy(run / "eval/sft.json", folder / "eval/rft.json")
    shutil.copy(run / "config.json", folder)
    notebook = ROOT / "nbs/runs/40_rl.ipynb"
    run_notebook(notebook, folder / "40_rl.ipynb", set_parameters(read_parameters(notebook), [f"{k}={v}" for k, v in values.items()], notebook.name))


def tokens_of_rft(run, row):
    "Tokens that the policy sampled in an update of RFT: as logged, or what was trained without the teachers' part, scaled from live groups to all."
    if "sampled_tokens" in row: return row["sampled_tokens"]
    given = sum(int(t.mask.sum()) for t in read_parquet(run / f"30_rft/ground_truths/{row['step'] - 1:04}.parquet"))
    live = row["live_groups"] / row["groups"]
    return (row["trained_tokens"] - given * live) / live


def tokens_of_rl(rows, per_turn):
    "The same for RL: as logged, or turns (logged) times tokens a turn, which move in a straight line between the evaluations before and after."
    rate = np.linspace(*per_turn, len(rows))
    return [r["sampled_tokens"] if "sampled_tokens" in r else r["turns"] * r["trajectories"] * p for r, p in zip(rows, rate)]


def curve(run):
    "Per update: share of rollouts solved, and tokens sampled up to then (thousands)."
    rows = [r for r in read_log(run / "metrics.jsonl") if r["stage"] in ("30_rft", "40_rl") and "reward" in r]
    rft, rl = ([r for r in rows if r["stage"] == s] for s in ("30_rft", "40_rl"))
    ends = [load_eval(run / f"eval/{s}.json")["sampled"] for s in ("rft", "rl")]
    tokens = [tokens_of_rft(run, r) for r in rft] + tokens_of_rl(rl, [e["tokens"] / e["turns"] for e in ends])
    return {"solved": [round(r["solved_share"], 4) for r in rft] + [round(r["solved"], 4) for r in rl],
            "tokens": [round(float(t) / 1000, 2) for t in np.cumsum(tokens)], "rft_updates": len(rft)}


def reached(c, target):
    "First update, and thousands of tokens, at which the moving mean of the last updates is at `target`; None: never."
    mean = np.convolve(c["solved"], np.ones(WINDOW) / WINDOW, "valid")
    if not (mean >= target).any(): return None
    at = int(np.argmax(mean >= target)) + WINDOW
    return [at, c["tokens"][at - 1]]


def ahead(with_it, without):
    "RL after RFT against RL alone at the same RL update, on the same tasks: mean difference in each third of RL's updates."
    rl = np.array(with_it["solved"][with_it["rft_updates"]:])
    return [round(float(d.mean()), 4) for d in np.array_split(rl - without["solved"][:len(rl)], 3)]


def solved(run, stage, mode):  # bool per held-out task
    return np.array([t.reward == 1 for t in read_parquet(run / f"eval/{stage}{'' if mode == 'sampled' else '.greedy'}.parquet")])


def gain(a, b, draws=4000):
    "Mean difference b - a over the same held-out tasks, with its 95 % bootstrap interval over tasks."
    d = b.astype(float) - a
    means = d[np.random.default_rng(0).integers(len(d), size=(draws, len(d)))].mean(1)
    return [round(float(x), 4) for x in (d.mean(), *np.quantile(means, (0.025, 0.975)))]


def compare(run, other):
    "All numbers of one seed."
    curves = {"with": curve(run), "without": curve(other)}
    target = float(np.mean(curves["with"]["solved"][-WINDOW:])) - MARGIN
    held = {m: {k: {x: load_eval(r / f"eval/{s}.json")[m][x] for x in ("n", "solved", "rate", "lo", "hi")}
                for k, r, s in (("sft", run, "sft"), ("rft", run, "rft"), ("with", run, "rl"), ("without", other, "rl"))} for m in ("sampled", "greedy")}
    gains = {m: {"rft over sft": gain(solved(run, "sft", m), solved(run, "rft", m)), "rl over rft": gain(solved(run, "rft", m), solved(run, "rl", m)),
                 "with over without": gain(solved(other, "rl", m), solved(run, "rl", m))} for m in ("sampled", "greedy")}
    return {"name": run.name, "curves": curves, "target": round(target, 4), "reached": {k: reached(c, target) for k, c in curves.items()}, "ahead": ahead(*curves.values()),
            "held": held, "gains": gains, "monitor": json.loads((run / "30_rft/monitor.json").read_text())}


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
    stopped, finished, passed = (sum(s["monitor"][k] for s in seeds) for k in ("stopped", "finished", "passed"))
    rft = [s["curves"]["with"]["tokens"][s["curves"]["with"]["rft_updates"] - 1] for s in seeds]
    both = [s for s in seeds if all(s["reached"].values())]
    return {"gains": {m: {k: over_seeds([s["gains"][m][k][0] for s in seeds]) for k in seeds[0]["gains"][m]} for m in ("sampled", "greedy")},
            "ahead at the same RL update": [over_seeds(x) for x in zip(*(s["ahead"] for s in seeds))],
            "tokens in all": {k: over_seeds([s["curves"][k]["tokens"][-1] for s in seeds]) for k in ARMS},
            "fewer tokens": over_seeds([1 - s["curves"]["with"]["tokens"][-1] / s["curves"]["without"]["tokens"][-1] for s in seeds]),
            "later without": {u: over_seeds([s["reached"]["without"][i] - s["reached"]["with"][i] for s in both]) if both else None for i, u in enumerate(("updates", "tokens"))},
            "never reached": {k: sum(s["reached"][k] is None for s in seeds) for k in ARMS},
            "stopping": {"stopped": stopped, "finished": finished, "wrong": passed, "interval": [round(x, 4) for x in wilson(passed, finished)],
                         "saved": over_seeds([s["monitor"]["tokens"] * s["monitor"]["stopped"] / max(1, s["monitor"]["finished"]) / 1000 / t for s, t in zip(seeds, rft)])}}


def draw(seeds, command):
    plt, _ = use_style()
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.4), gridspec_kw={"width_ratios": [3, 3, 2.2]})
    for k, color in zip(ARMS, ("C0", "C1")):
        y = np.array([moving_mean(np.array(s["curves"][k]["solved"]), WINDOW) for s in seeds])
        x = np.arange(1, y.shape[1] + 1), np.mean([s["curves"][k]["tokens"] for s in seeds], 0)
        for ax, at in zip(axes, x):
            for one in y:
                ax.plot(at, one, color=color, lw=0.6, alpha=0.5)
            ax.plot(at, y.mean(0), color=color, lw=2, label=ARMS[k])
            if len(y) > 1:
                ax.fill_between(at, y.mean(0) - half_width(y), np.minimum(1, y.mean(0) + half_width(y)), color=color, alpha=0.15, lw=0)
    axes[0].set(xlabel="updates, RFT's included", ylabel="training rollouts solved", ylim=(0.5, 1))
    axes[1].set(xlabel="tokens sampled (thousands), RFT's included", ylim=(0.5, 1))
    axes[0].legend(loc="lower right", fontsize=8)
    for i, s in enumerate(seeds):
        for j, m in enumerate(("sampled", "greedy")):
            for k, (key, color) in enumerate((("sft", "0.5"), ("rft", "C2"), ("with", "C0"), ("without", "C1"))):
                h = s["held"][m][key]
                axes[2].errorbar(k + 0.16 * (i - 1) + 5 * j, h["rate"], [[h["rate"] - h["lo"]], [h["hi"] - h["rate"]]], color=color, marker="o", ms=3, capsize=1.5, lw=1)
    axes[2].set(xticks=[*range(4), *range(5, 9)], ylim=(0.5, 1), title="held out: sampled | greedy")
    axes[2].set_xticklabels(["SFT", "RFT", "with", "without"] * 2, rotation=60, fontsize=7)
    save_figure(fig, ROOT / "figures/rft.png", f"RL after RFT and RL straight from SFT, as many updates in all, {len(seeds)} seeds. Left, middle: share of training rollouts solved, moving mean over {WINDOW} updates; "
                "thick: mean over seeds, band: its 95 % t-interval. Right: held-out tasks, 95 % Wilson intervals.", command)


def show(seeds, whole):
    rate = lambda h: f"{h['rate']:.3f} [{h['lo']:.3f}, {h['hi']:.3f}]"
    print("| run | mode | SFT | RFT | RL after RFT | RL alone | after RFT over alone, same tasks |\n|---|---|---|---|---|---|---|")
    for s in seeds:
        for m, h in s["held"].items():
            print(f"| {s['name']} | {m} | " + " | ".join(rate(h[k]) for k in ("sft", "rft", "with", "without")) + " | {:+.3f} [{:+.3f}, {:+.3f}] |".format(*s["gains"][m]["with over without"]))
    print("\n| run | target | RL after RFT: update, tokens (k) | RL alone | tokens in all (k): after RFT, alone |\n|---|---|---|---|---|")
    for s in seeds:
        at = ["never" if s["reached"][k] is None else "{}, {:.0f}".format(*s["reached"][k]) for k in ARMS]
        print(f"| {s['name']} | {s['target']:.3f} | {at[0]} | {at[1]} | {s['curves']['with']['tokens'][-1]:.0f}, {s['curves']['without']['tokens'][-1]:.0f} |")
    print("\n" + json.dumps(whole, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--without", type=Path, help="folder of the runs without RFT")
    args = parser.parse_args()
    where = args.without or args.runs[0].parent / "norft"
    for r in args.runs:
        make_without(r, where / r.name)
    seeds = [compare(r, where / r.name) for r in args.runs]
    whole = summary(seeds)
    write_json(ROOT / "figures/rft.json", {"command": "make rft", "window": WINDOW, "margin": MARGIN, "seeds": seeds, "all": whole})
    draw(seeds, "make rft")
    show(seeds, whole)
