"Two processes on a CPU (gloo): gradients equal those of one, sharded (FSDP2) and whole, also where a rank has no work."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from kat.compute.cost import split_ranges
from kat.compute.engine import TreeEngine
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
    dist.destroy_process_group()


def test_two_ranks_give_the_gradients_of_one(tmp_path):
    here = Path(__file__)
    code = f"import sys, {here.stem}; {here.stem}.work(int(sys.argv[1]), sys.argv[2])"
    path = [here.parents[2], here.parent, here.parents[1] / "helpers", os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), tmp_path / "store"], env=env, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]
    try:
        said = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for text in said:
        assert text.count("equal") == 6, text[-3000:]
