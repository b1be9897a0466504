"""The embedded engine against transformers' own generate, on this machine: `python benchmarks/engine.py --help`

A random Qwen3 of the demo's size. `decode`: one more token for every row, all at the same context; the fastest step, as
other processes can only slow one down. `rollout`: groups of conversations with tools, ragged prompts and turns, as in a
step of RL; transformers computes each turn's history anew, left-padded, as one must without an engine. `--serving`:
agents that wait for nobody, continuous batching against waves. `--agreement`: the log-probs an engine reports, against
kat.compute's of the same text, on the shipped base model."""
import argparse
import asyncio
import resource
import time

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, StoppingCriteria
from transformers.utils import logging

from kat.infer import engines
from kat.infer.engines import HFEngine
from kat.infer.requests import Request
from kat.infer.serving import HFAsyncEngine

V = 1536
STOP = list(range(V//16))  # a random model takes each token about equally often: turns of 16 tokens on average

def make_model(hidden, layers, heads, kv_heads, head_dim):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=V, hidden_size=hidden, intermediate_size=hidden*8//3, num_hidden_layers=layers, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None)).eval()

class Kat:
    "The engine, a session for each row."
    def __init__(self, model, dtype, rows):
        self.e = HFEngine(model, max_len=1024, slots=rows, dtype=dtype)

    def turn(self, prompts, n, stop=()):
        "the new tokens of each row"
        rs = [Request(p, n, stop=stop, session=str(i)) for i, p in enumerate(prompts)]
        return [c.ids for c in self.e.generate(rs)]

    def step(self, prompts, n):
        "seconds from one sampling to the next, all rows"
        sample, times = engines.sample, []
        def clocked(*args):
            times.append(time.perf_counter())
            return sample(*args)
        engines.sample = clocked
        self.turn(prompts, n)
        engines.sample = sample
        return np.diff(times).min()

class Clock(StoppingCriteria):
    "Notes the time of every step, and stops nothing."
    def __init__(self):
        self.times = []
    def __call__(self, ids, scores, **kw):
        self.times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)

class Transformers:
    "model.generate on one left-padded batch."
    def __init__(self, model, dtype, rows):
        self.model = model.to(dtype)

    def turn(self, prompts, n, stop=(), **kw):
        "the new tokens of each row"
        width = max(map(len, prompts))
        ids, on = torch.zeros(2, len(prompts), width, dtype=torch.long)
        for i, p in enumerate(prompts):
            ids[i, width-len(p):], on[i, width-len(p):] = torch.as_tensor(p), 1
        out = self.model.generate(ids, attention_mask=on, do_sample=True, top_k=0, max_new_tokens=n, pad_token_id=0,
                                  eos_token_id=list(stop) or None, **kw)
        return [r[:np.isin(r, stop).argmax()+1] if np.isin(r, stop).any() else r for r in out[:, width:].numpy()]

    def step(self, prompts, n):
        "seconds from one sampling to the next, all rows"
        clock = Clock()
        self.turn(prompts, n, stopping_criteria=[clock])
        return np.diff(clock.times).min()

def rollout(way, groups, size, turns=5):
    "a step of RL: seconds, tokens sampled"
    rng, begin = np.random.default_rng(0), time.perf_counter()
    more = lambda lo, hi: rng.integers(len(STOP), V, rng.integers(lo, hi))
    system, sampled = more(80, 81), 0
    history = [t for t in [np.r_[system, more(20, 120)] for _ in range(groups)] for _ in range(size)]
    for _ in range(turns):
        got = way.turn(history, 40, STOP)
        sampled += sum(map(len, got))
        history = [np.r_[h, g, more(5, 50)] for h, g in zip(history, got)]
    return time.perf_counter() - begin, sampled

def serving(model, dtype, groups, size, slots, turns=5):
    """the same work for agents that wait for nobody: process seconds and tokens sampled, all at once and one turn of
    all after the other"""
    rng = np.random.default_rng(0)
    more = lambda lo, hi: rng.integers(len(STOP), V, rng.integers(lo, hi))
    system = more(80, 81)
    starts = [t for t in [np.r_[system, more(20, 120)] for _ in range(groups)] for _ in range(size)]
    tools = [[more(5, 50) for _ in range(turns)] for _ in starts]
    async def agent(e, i, h):
        n = 0
        for k in range(turns):
            c = await e.generate(Request(h, 40, stop=STOP, seed=turns*i + k, session=str(i)))
            h, n = np.r_[h, c.ids, tools[i][k]], n + len(c.ids)
        return n
    async def free(e):
        try:
            tokens = await asyncio.gather(*[agent(e, i, h) for i, h in enumerate(starts)])
            return sum(tokens), e.engine.stats['decode_steps']
        finally:
            await e.close()
    def waves(e):
        h, n = starts, 0
        for k in range(turns):
            rs = [Request(x, 40, stop=STOP, seed=turns*i + k, session=str(i)) for i, x in enumerate(h)]
            cs = [c for a in range(0, len(rs), slots) for c in e.generate(rs[a:a+slots])]
            n, h = n + sum(len(c.ids) for c in cs), [np.r_[x, c.ids, t[k]] for x, c, t in zip(h, cs, tools)]
        return n, e.stats['decode_steps']
    for name, run in (('in waves', lambda: waves(HFEngine(model, 1024, slots, dtype))),
                      ('continuous', lambda: asyncio.run(free(HFAsyncEngine(model, 1024, slots, dtype))))):
        begin = time.process_time()
        n, steps = run()
        t = time.process_time() - begin
        print(f"{name:12}{len(starts)} agents, {turns} turns, {slots} slots, {str(dtype)[6:]}: "
              f"{t:.2f} process seconds, {n} tokens, {n/t:.0f} tok/s, {steps} steps", flush=True)

def agreement(turns=64, n=64):
    "how far the sampled log-probs are from flat_logprobs"
    from pathlib import Path
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from kat.compute.logprob import flat_logprobs
    base = Path(__file__).parents[1]/'data'/'base'
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tok = AutoTokenizer.from_pretrained(base)
    prompt = np.array(tok.encode('def solve(xs):\n    """Return the sum of the even numbers in xs."""\n'))
    for ours in (torch.float32, torch.bfloat16):
        engine = HFEngine(model, max_len=256, slots=turns, dtype=ours)
        cs = engine.generate([Request(prompt, n, seed=i) for i in range(turns)])
        ids = torch.tensor(np.array([np.r_[prompt, c.ids] for c in cs])).long()
        mask = torch.arange(ids.shape[1]).expand_as(ids) >= len(prompt)
        for theirs in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                lp = flat_logprobs(model, ids, mask, dtype=theirs)[0].numpy()
            d = lp - np.concatenate([c.logprobs for c in cs])
            off, k3 = np.abs(d), (np.expm1(d) - d).mean()
            print(f"engine {str(ours)[6:]:9} flat_logprobs {str(theirs)[6:]:9} {d.size} tokens: "
                  f"mean |d| {off.mean():.1e}, 99 % below {np.quantile(off, .99):.1e}, max {off.max():.1e}, "
                  f"k3 KL {k3:.1e}")

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--model', type=int, nargs=5, default=[192, 4, 3, 1, 64], metavar='N',
                   help='hidden size, layers, heads, key heads, head size')
    a.add_argument('--rows', type=int, nargs='+', default=[16, 128])
    a.add_argument('--ctx', type=int, default=300)
    a.add_argument('--threads', type=int, default=torch.get_num_threads())
    a.add_argument('--quick', action='store_true', help='without transformers')
    a.add_argument('--serving', action='store_true', help='agents that come and go, with few slots')
    a.add_argument('--agreement', action='store_true', help='log-probs instead of times')
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    logging.set_verbosity_error()
    if a.agreement: return agreement()
    if a.serving: return serving(make_model(*a.model), torch.float32, 8, 8, 16)
    print(f"{sum(p.numel() for p in make_model(*a.model).parameters())/1e6:.2f} M parameters, {a.threads} threads, "
          f"decode at context {a.ctx}, torch {torch.__version__}")
    print(f"{'':24}{'rows':>6}{'decode ms/step':>16}{'tok/s':>8}{'rollout s':>11}{'sampled tok/s':>15}{'peak MB':>9}")
    for rows in a.rows:
        prompts = list(np.random.default_rng(0).integers(0, V, (rows, a.ctx)))
        for way in (Kat,) if a.quick else (Kat, Transformers):
            for dtype in (torch.float32, torch.bfloat16):
                w = way(make_model(*a.model), dtype, rows)
                s, (t, n) = w.step(prompts, 24), rollout(w, rows//8, 8)
                mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
                name = f"{way.__name__.lower()} {str(dtype)[6:]}"
                print(f"{name:24}{rows:6}{s*1e3:16.1f}{rows/s:8.0f}{t:11.2f}{n/t:15.0f}{mb:9.0f}", flush=True)

if __name__ == '__main__':
    main()
