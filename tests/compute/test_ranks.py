"Several processes on a CPU (gloo) against one, sharded (FSDP2) and whole: gradients and updates."
import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kat.compute.cost import split_ranges
from kat.compute.engine import TreeEngine
from kat.recipe.presets import PRESETS
from kat.tree.trie import TokenTree


def trees():
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 23, (3, 12))
    return [TokenTree.from_sequences([np.r_[prompt, rng.integers(0, 23, n)] for n in (5, 9, 7)]) for prompt in prompts]


def items(tree, part=None):
    "One piece of work: a loss that looks its weights up in the whole tree."
    weight = torch.from_numpy(np.random.default_rng(len(tree)).normal(size=len(tree)))
    if part is None: return tree, lambda e: (weight[e.index] * e.logprob).sum(), None
    index = torch.from_numpy(part.index)
    return part.tree, lambda e: (weight[index[e.index]] * e.logprob).sum(), part.score


def cases():
    "name -> work of rank 0, work of rank 1, work of one process"
    a, b, c = trees()
    left, right = split_ranges(a, 2)
    return {"trees": ([items(a), items(b)], [items(c)], [items(a), items(b), items(c)]),
            "nothing": ([items(a)], [], [items(a)]),
            "ranges": ([items(a, left)], [items(a, right), items(c)], [items(a), items(c)])}


def gradients_of(model):
    from torch.distributed.tensor import DTensor
    return {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            for name, p in model.named_parameters()}


def work(rank, store):
    import torch.distributed as dist
    from tree_models import make, worst
    from torch.distributed.tensor import DTensor
    from kat.compute.ranks import rank_gradients, shard_layers
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for shard in (True, False):
        model, alone = make("qwen3"), make("qwen3")
        if shard:
            shard_layers(model, dist.device_mesh.init_device_mesh("cpu", (2,)))
        assert any(isinstance(p, DTensor) for p in model.parameters()) == shard
        for name, (*parts, whole) in cases().items():
            total = rank_gradients(TreeEngine(model, max_tokens=6 + 5 * rank), parts[rank])  # other packs on each rank
            truth = sum(TreeEngine(alone).forward_backward(*x) for x in whole)
            assert abs(total - truth) < 1e-9, (name, total, truth)
            have, want = gradients_of(model), gradients_of(alone)
            assert worst(want, have) < 1e-9, (shard, name)
            model.zero_grad()
            alone.zero_grad()
            print("equal", shard, name, rank, flush=True)
        spoilt = (trees()[0], lambda e: e.logprob.sum() * float("nan"), None)
        try:
            rank_gradients(TreeEngine(model, max_tokens=9), [spoilt] if rank else [items(trees()[1])])
        except (FloatingPointError, RuntimeError) as e:  # nobody waits for the other
            print("said", "the loss is nan" in str(e) if rank else "failed on 1 other rank" in str(e), flush=True)
        model.zero_grad()
    dist.destroy_process_group()


LR = PRESETS["tiny"]["40_rl"]["lr"]  # a preset's


def losses(k):
    "Work of update k: the trees and their weights are the same in every run."
    draw = np.random.default_rng(k % 3)
    out = []
    for _ in range(4):
        prompt = draw.integers(0, 23, 8)
        tree = TokenTree.from_sequences([np.r_[prompt, draw.integers(0, 23, n)] for n in (3, 6, 4)])
        weight = torch.from_numpy(draw.normal(size=len(tree))).float()
        out.append((tree, lambda e, weight=weight: (weight[e.index] * e.logprob).sum() / 20, None))
    return out


def trained(model, dtype, rank, world):
    "The weights after ten updates by AdamW, clipped; world 0: one process, no collectives."
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for k in range(10):
        optimizer.zero_grad()
        if world:
            from kat.compute.ranks import clip_gradients, rank_gradients
            rank_gradients(TreeEngine(model, max_tokens=7 + rank, dtype=dtype), losses(k)[rank::world])
            norm = clip_gradients(model, 0.5)
        else:
            for item in losses(k):
                TreeEngine(model, dtype=dtype).forward_backward(*item)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5  # clipping acts
        optimizer.step()
    whole = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return torch.cat([p.detach().double().flatten() for p in whole])


def ten_updates(rank, world, store):
    import torch.distributed as dist
    from tree_models import make
    from kat.compute.ranks import shard_layers
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    start = make("qwen3", torch.float32, noise=0.1)
    truth = trained(copy.deepcopy(start), None, 0, 0) if rank == 0 else None
    for weights, compute, ways in ((torch.float32, None, (True, False)), (torch.bfloat16, None, (True, False)),
                                   (torch.float32, torch.bfloat16, (True,))):
        low = torch.bfloat16 in (weights, compute)
        alone = trained(copy.deepcopy(start).to(weights), compute, 0, 0) if rank == 0 and low else truth
        for shard in ways:
            model = copy.deepcopy(start).to(weights)
            if shard:
                shard_layers(model, mesh, compute)
            have = trained(model, None if shard else compute, rank, world)
            if rank: continue
            off, own = (float((x - truth).norm() / truth.norm()) for x in (have, alone))
            assert off <= (1.1 * own if low else 1e-6), (weights, compute, shard, off, own)
            print("equal", weights, compute, shard, f"{off:.2e} {own:.2e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def ranks(tmp_path, call, world):
    "What `call` prints in each of so many processes."
    here = Path(__file__)
    path = [here.parents[2], here.parent, here.parents[1] / "helpers", os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    code = f"import sys, {here.stem}; {here.stem}.{call}"
    started = [subprocess.Popen([sys.executable, "-c", code, str(rank), tmp_path / "store"], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(world)]
    try:
        return [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()


def test_two_ranks_give_the_gradients_of_one(tmp_path):
    for text in ranks(tmp_path, "work(int(sys.argv[1]), sys.argv[2])", 2):
        assert text.count("equal") == 6 and text.count("said True") == 2, text[-3000:]


@pytest.mark.parametrize("world", [2, 4])
def test_ten_updates_are_those_of_one_process(world, tmp_path):
    "FSDP2 and whole, clipped: float32 to 1e-6 of the weights, bf16 no worse than one process in bf16."
    first, *others = ranks(tmp_path, f"ten_updates(int(sys.argv[1]), {world}, sys.argv[2])", world)
    assert first.count("equal") == 5, first[-3000:] + "".join(others)[-3000:]


def test_norms_over_meshes_of_two_dimensions(tmp_path):
    "Pieces on one dimension, copies on the other; what is still to be summed has no norm"
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from kat.compute.ranks import clip_gradients
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "pieces"))
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        whole = sum(p.numel() for p in model.parameters()) ** .5
        def place(*places):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            weight = torch.nn.Parameter(DTensor.from_local(model[0].weight.detach(), mesh, places))
            weight.grad = DTensor.from_local(torch.ones_like(model[0].weight.detach()), mesh, places)
            model[0].weight = weight
        place(Replicate(), Shard(0))
        assert clip_gradients(model, .5).item() == pytest.approx(whole)
        assert model[0].weight.grad.to_local().flatten()[0].item() == pytest.approx(.5 / whole, rel=1e-5)
        model[0].weight = torch.nn.Parameter(torch.zeros(2, 3))
        place(Replicate(), Partial())
        with pytest.raises(ValueError, match="isn't summed over ranks yet"):
            clip_gradients(model, .5)
    finally:
        dist.destroy_process_group()
