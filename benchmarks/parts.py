"""Time records, world and training step on this machine: `python benchmarks/parts.py` (about half a minute).

Each line is the median of a few repetitions. Nothing is asserted: speeds belong to machines, not to CI.
"""
import os
import statistics
import tempfile
import time
from pathlib import Path

import httpx2
import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from kat.core.io import read_records, write_records
from kat.core.types import Segment, Trajectory
from kat.compute.attention import use_kat_attention
from kat.envs.base import make_world
from kat.envs.micro import test_job
from kat.envs.micro_tasks import make_task
from kat.envs.sandbox import WarmPool
from kat.recipe import rollouts
from kat.recipe.pipeline import ROOT
from kat.recipe.rollouts import expert_data


def show(what, unit, n, fn, reps=3):
    "Print the rate of `n` units in one call of `fn`, after one call to warm up"
    fn()
    spent = []
    for _ in range(reps):
        start = time.perf_counter()
        fn()
        spent.append(time.perf_counter() - start)
    print(f'{what:44} {n/statistics.median(spent):12,.0f} {unit}/s', flush=True)


def model():
    "As many parameters as the shipped base has, roughly; random"
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
                                        head_dim=64, num_attention_heads=4, num_key_value_heads=2,
                                        tie_word_embeddings=True))


def records(n=500):
    rng = np.random.default_rng(0)
    def segment(t):
        return Segment(rng.integers(0, 2048, 60), ('assistant', 'tool_result')[t % 2], t//2, trainable=t % 2 == 0)
    some = [Trajectory(f'task/{i}', [segment(t) for t in range(10)], 1.0) for i in range(n)]
    with tempfile.TemporaryDirectory() as tmp:
        for suffix in ('jsonl', 'parquet'):
            path = Path(tmp)/f'a.{suffix}'
            show(f'write {suffix}, 10 segments of 60 tokens', 'trajectories', n, lambda: write_records(path, some))
            show(f'read {suffix}', 'trajectories', n, lambda: list(read_records(path)))


def world(n=100):
    show('make a task', 'tasks', n, lambda: [make_task('train', i) for i in range(n)])
    tasks = [make_task('train', i).data['files'] for i in range(n)]
    with WarmPool(workers=os.cpu_count()) as pool:
        show(f"run a repository's tests in the sandbox (x{os.cpu_count()})", 'runs', n,
             lambda: pool.run_many([test_job(f, {'tests.py': f['tests.py']}) for f in tasks]))


def training(rows=16, length=256):
    ids = torch.randint(0, 2048, (rows, length))
    for name in ('sdpa', 'kat'):
        timed = model()
        if name == 'kat':
            use_kat_attention(timed)
        show(f'forward and backward {rows} x {length}, {name} attention', 'tokens', rows*length,
             lambda: timed(input_ids=ids, labels=ids, use_cache=False).loss.backward())


def turns(n=200):
    "Processor time of scripted turns through the embedded gateway: handed over in the process, and by httpx2's client"
    tok, tasks = AutoTokenizer.from_pretrained(ROOT/'data/base'), [make_task('train', i) for i in range(n)]
    local = rollouts.Local
    def over_httpx2(app):
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), timeout=None)
    clients = ('', local), ('Local', local), ('httpx2', over_httpx2)   # the first fills the cache of test outcomes
    micro = make_world('micro')
    with micro.open() as make_env:
        for name, rollouts.Local in clients * 3:
            start = time.process_time()
            played = expert_data(micro, tok, tasks, make_env, seed=1)
            spent = 1e3*(time.process_time() - start)/sum(len(t.info['turns']) for t in played)
            if name:
                print(f'a scripted turn through the gateway, {name:8} {spent:12.2f} ms of processor time', flush=True)
    rollouts.Local = local


if __name__ == '__main__':
    size = sum(p.numel() for p in model().parameters())/1e6
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, {size:.1f} M parameters')
    for part in (records, world, turns, training):
        part()
