"""What pruning does to the gradient, and to learning: the numbers behind `nbs/study/04_pruning.ipynb`

    python benchmarks/prune_study.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2   # gradients, `tiny` after SFT (about 25 CPU minutes)
    python benchmarks/prune_study.py --smollm2 FOLDER                                     # gradients, SmolLM2-135M-Instruct over the logs in data/trajectories
    python benchmarks/prune_study.py --learn 0.5 0.25 data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2  # RL on budgets (about 9 CPU minutes each)

The runs are those of `make seeds`. What is computed is kept in data/runs/prune_study, so an interrupted command goes on; the results
go to figures/pruning_*.json.

Gradients. While an update is the first on its batch, the ratio is 1 and no clip acts, so the gradient is a sum over edges, and what pruning
keeps is a part of that sum. So each atom (the tokens of a unit that have one keeper) gets one backward, in float32; the gradient of every policy,
budget and draw is then a weighted sum. Gradients are kept as sketches (random signs, folded to 2^17 numbers): inner products are right on average,
with a standard deviation of about 0.3 % of the product of norms. Each batch is checked against the trainer's own backward.
"""
import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kat.agent import ModelPolicy, rollout
from kat.compute.cost import token_flops
from kat.compute.engine import TreeEngine
from kat.compute.logprob import flat_logprobs
from kat.core.chat import to_trajectories
from kat.core.io import atomic, import_log, read_parquet, write_parquet
from kat.core.types import Group
from kat.learn.advantage import group_advantages
from kat.learn.objective import Objective
from kat.learn.rl import graded_rewards, make_row
from kat.pipeline import ROOT
from kat.plane.engines import HFEngine
from kat.stages import load_model, train_task, world
from kat.tree.prune import _bundles, cut_units, kept_with, token_facts, Pruning
from kat.tree.stats import model_shape
from kat.tree.trie import TokenTree

OUT, SKETCH = ROOT / "data/runs/prune_study", 2**17
OBJECTIVE = Objective(normalise="sequence", tis=2.0)  # as in nbs/runs/40_rl.ipynb


def batch_of(run, batch, tasks=16, rollouts=8):
    "Graded rollouts of the model after SFT, as the RL stage makes them, on training tasks that no stage uses."
    path = OUT / f"{run.name}-{batch}.parquet"
    if not path.exists():
        model, tok = load_model(run / "20_sft/model")
        engine = HFEngine(model, max_len=1024, slots=tasks * rollouts, dtype=torch.bfloat16)
        todo = [train_task(0, 9 * 10**5 + 1000 * batch + i) for i in range(tasks)]
        with world() as make_env:
            played = rollout(ModelPolicy(engine, tok.eos_token_id), tok, [t for t in todo for _ in range(rollouts)], make_env, seed=batch, max_turns=14)
        engine.close()
        for t in played: t.info["masked"] = {"length": "truncated", "infra": "infrastructure"}.get(t.info["finish"])
        write_parquet(path, played)
    played = list(read_parquet(path))
    return [Group(played[i].task, played[i:i + rollouts]) for i in range(0, len(played), rollouts)]


def rows_of(groups):
    advantages, live = group_advantages([graded_rewards(g) for g in groups], "dr_grpo")
    rows = [make_row(t, a) for g, adv, ok in zip(groups, advantages, live) if ok for t, a, r in zip(g.trajectories, adv, graded_rewards(g)) if not np.isnan(r)]
    return [r for r in rows if r.mask.any()]


def facts_of(model, rows, objective):
    "What the trainer's pruner is told, the loss on the tree, and its weight at each edge (minus the derivative by the log-prob)."
    tree, masks = TokenTree.from_sequences([r.trajectory.ids for r in rows]), [r.mask for r in rows]
    trained = np.zeros(len(tree), bool)
    trained[tree.paths[np.concatenate(masks)]] = True
    edges = TreeEngine(model, 4096).logprobs(tree, trained)
    at = lambda x: np.float64(torch.zeros(len(tree), dtype=torch.float64).index_copy(0, edges.index, x.double()))
    old, weights = at(edges.logprob), objective.weights(masks)
    engine = [r.trajectory.logprobs for r in rows] if objective.corrected else None
    loss = objective.prepare(tree, masks, [r.advantage for r in rows], old=tree.gather(old), engine=engine, weights=weights)
    facts = token_facts(tree, [r.trajectory for r in rows], [w * r.advantage for w, r in zip(weights, rows)], token_flops(model_shape(model.config), tree.position))
    edges.logprob.requires_grad_()
    weight = at(-torch.autograd.grad(loss(edges), edges.logprob)[0])
    return replace(facts, trainable=trained, entropy=at(edges.entropy), logprob=old), loss, weight, at(edges.squares)


def signs(model):
    for i, p in enumerate(model.parameters()):
        yield torch.randint(0, 2, (p.numel(),), dtype=torch.int8, generator=torch.Generator().manual_seed(i)).mul_(2).sub_(1)


def sketch(grads, flips):
    out = torch.zeros(SKETCH)
    for g, s in zip(grads, flips):
        x = g.flatten() * s
        whole = len(x) // SKETCH * SKETCH
        out += x[:whole].view(-1, SKETCH).sum(0)
        out[:len(x) - whole] += x[whole:]
    return out


def atoms_of(facts):
    "int64[N]: number of each token's atom. Those of a unit differ in their keepers, with a window of one token or none."
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
        print(f"{name}: {len(rows)} rows, {len(facts.tree)} tokens, {facts.scored.sum()} trained, {len(first)} atoms, {spent:.0f} CPU s; trainer's own gradient differs by {distance:.1e}", flush=True)
        with atomic(path) as tmp, open(tmp, "wb") as f: np.savez_compressed(f, G=isometric(G).astype(np.float32), first=first, distance=distance)
    saved = np.load(path)
    return facts, squares, weight, saved["G"].astype(float), saved["first"], float(saved["distance"])


def learn(run, share, policy, n_eval):
    "The RL stage of a finished run once more, from the same weights on the same tasks, with a budget."
    here = OUT / f"{run.name}-{policy}-{share:g}"
    if (here / "eval/rl.json").exists(): return
    stage = json.loads((run / "config.json").read_text())["stages"]["40_rl"]
    if not (here / "30_rft").exists():
        for s in ("base", "mid", "sft", "rft"):
            (here / "eval").mkdir(parents=True, exist_ok=True)
            for f in (run / "eval").glob(f"{s}.*"): shutil.copy(f, here / "eval")
        shutil.copy(run / "config.json", here)
        shutil.copytree(run / "30_rft/model", here / "30_rft.tmp/model")
        (here / "30_rft.tmp").rename(here / "30_rft")
    values = stage | dict(run_dir=here.resolve(), budget=share, prune=policy, n_eval=n_eval)
    subprocess.run([Path(sys.executable).with_name("kat"), "run", ROOT / "nbs/runs/40_rl.ipynb", "-o", here / "40_rl.ipynb",
                    *(x for k, v in values.items() for x in ("-p", f"{k}={v}"))], check=True)
