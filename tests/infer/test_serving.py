"The embedded engine's scheduler: who is in the batch when, company, aborts, errors, and the thread around it"
import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.compute.logprob import flat_logprobs
from kat.infer import engines
from kat.infer.engines import HFEngine
from kat.infer.requests import Completion, Request, StopStrings
from kat.infer.partial import PartialRollout, renew
from kat.infer.serving import EngineClosed, HFAsyncEngine

V = 64

def make(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=.3, max_position_embeddings=512, bos_token_id=None,
        eos_token_id=None, pad_token_id=None)).to(dtype).eval()

@pytest.fixture(scope='module')
def model():
    return make()

@pytest.fixture(scope='module')
def model64():
    return make(dtype=torch.float64)

def prompts(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n) for n in sizes]

def run(coro):
    return asyncio.run(asyncio.wait_for(coro, 120))  # a net

def alone(model, r):
    "the answer of an engine that has nothing else to do and has seen nothing"
    if model not in singles:
        singles[model] = HFEngine(model, max_len=256, slots=1)
    singles[model]._forget()
    return singles[model].generate([r])[0]

singles = {}

# ---------------------------------------------------------------- the scheduler, step by step

def test_join_and_leave_between_tokens(model):
    e, p = HFEngine(model, max_len=64, slots=2), prompts(5, 6, 7)
    a, b = e.submit(Request(p[0], 6)), e.submit(Request(p[1], 3))
    assert e.step() == [a, b] and e.step() == [a, b]
    c = e.submit(Request(p[2], 2))
    assert e.step() == [a, b] and b.finish == 'length' and c.slot is None  # both slots were taken
    assert set(e.step()) == {a, c} and c.slot is not None                  # b's is free now
    assert set(e.step()) == {a, c} and c.finish
    assert e.step() == [a] and a.finish and not e.busy and e.step() == []
    assert [len(t.new) for t in (a, b, c)] == [6, 3, 2]

@given(st.data())
@settings(max_examples=10, deadline=None)
def test_any_schedule_gives_the_same_samples(model64, data):
    "arrivals at random steps, few slots, shared prefixes, sessions, aborts: every answer is that of the request alone"
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    system = rng.integers(0, V, 30)
    e = HFEngine(model64, max_len=256, slots=data.draw(st.integers(1, 4)))
    turns, aborted, rs = [], [], []
    for i in range(data.draw(st.integers(2, 9))):
        ids = np.r_[system[:rng.integers(0, 31)], rng.integers(0, V, rng.integers(1, 90))]
        rs.append(Request(ids, int(rng.integers(1, 12)), seed=i, session=f's{i%3}', stop=(3,),
                          top_p=.9 if i % 2 else 1.))
    patient = data.draw(st.booleans())
    for r in rs:
        turns.append(e.submit(r))
        for _ in range(data.draw(st.integers(0, 5))):
            e.step(patient)
        if data.draw(st.integers(0, 5)) == 0 and not turns[-1].finish:
            e.leave(turns[-1])
            aborted.append(turns[-1])
    while e.busy:
        e.step(patient)
    for r, t in zip(rs, turns):
        want = alone(model64, r)
        n = len(t.new)
        assert t in aborted or (n == len(want.ids) and t.finish == want.finish)
        assert t.new == want.ids[:n].tolist()
        np.testing.assert_allclose(t.logprobs, want.logprobs[:n], atol=1e-9)
    assert not any(e.table.turn) and len(set(map(str, filter(None, e.table.session)))) <= 3

def test_newcomers_wait_for_a_prefix_that_is_being_computed(model):
    "a group that arrives in pieces: the prompt is computed once"
    e, (p,) = HFEngine(model, max_len=256, slots=8), prompts(100)
    e.submit(Request(p, 4, seed=0))
    e.step()
    more = [e.submit(Request(p, 4, seed=i)) for i in range(1, 4)]
    late = e.submit(Request(np.r_[p[:60], prompts(30, seed=5)[0]], 4))
    while e.busy:
        e.step()
    assert e.stats['prefilled_tokens'] == 100 + 3 + 30
    for t in more:
        assert t.new == alone(model, t.request).ids.tolist()
    assert len(late.new) == 4

def test_long_prompts_do_not_stop_the_others(model, monkeypatch):
    "impatient steps: at most one forward for newcomers between two tokens of the rest"
    groups = engines.prefill_groups
    monkeypatch.setattr(engines, 'prefill_groups', lambda todo, budget: groups(todo, 16))
    e, (a, b) = HFEngine(model, max_len=256, slots=4), prompts(4, 100)
    one = e.submit(Request(a, 30, seed=0))
    e.step(patient=False)
    two = e.submit(Request(b, 5, seed=1))
    while not two.new:
        assert one in e.step(patient=False)
    assert len(one.new) >= 7  # ceil(99/16)
    while e.busy:
        e.step(patient=False)
    assert two.new == alone(model, two.request).ids.tolist() and one.new == alone(model, one.request).ids.tolist()

def test_aborted_turns_leave_their_keys(model):
    e, (p,) = HFEngine(model, max_len=256, slots=2), prompts(50)
    t = e.submit(Request(p, 100, seed=0, session='s'))
    for _ in range(10):
        e.step()
    e.leave(t)
    e.leave(t)  # twice is no error
    n = e.stats['prefilled_tokens']
    h = np.r_[t.ids, prompts(5)[0]]
    c, = e.generate([Request(h, 3, seed=1, session='s')])
    assert e.stats['prefilled_tokens'] - n == 1 + 5
    assert c.ids.tolist() == alone(model, Request(h, 3, seed=1)).ids.tolist()

def test_two_turns_of_a_session_at_once(model):
    "a parallel branch gets a slot of its own, with the shared text copied"
    e, (p, x, y) = HFEngine(model, max_len=256, slots=4), prompts(60, 5, 6)
    e.generate([Request(p, 2, seed=0, session='s')])
    n = e.stats['prefilled_tokens']
    a = e.submit(Request(np.r_[p, x], 6, seed=1, session='s'))
    b = e.submit(Request(np.r_[p, y], 6, seed=2, session='s'))
    while e.busy:
        e.step()
    assert e.stats['prefilled_tokens'] - n == 5 + 6
    for t in (a, b):
        assert t.new == alone(model, t.request).ids.tolist()
    assert e.table.session.count('s') == 1

def test_release_under_way(model):
    e, (p,) = HFEngine(model, max_len=64, slots=2), prompts(20)
    t = e.submit(Request(p, 5, seed=0, session='s'))
    e.step()
    e.release('s')
    while e.busy:
        e.step()
    assert t.new == alone(model, t.request).ids.tolist() and 's' not in e.table.session

@pytest.mark.parametrize('keep', [False, True])
def test_weights_change_midway(model, keep):
    "tokens before are the old weights', tokens after the new ones'; with keep, nothing is computed twice"
    new, (p, q) = make(1), prompts(40, 30)
    e = HFEngine(model, max_len=256, slots=4)
    a, b = e.submit(Request(p, 20, seed=0, session='a')), e.submit(Request(np.r_[p, q], 20, seed=1))
    for _ in range(8):
        e.step()
    n = e.stats['prefilled_tokens']
    e.update_weights(new, 3, keep)
    c = e.submit(Request(p, 5, seed=2))
    while e.busy:
        e.step()
    assert a.versions == [0]*8 + [3]*12 and b.versions[-1] == 3 and set(c.versions) == {3}
    for t in (a, b):
        ids, mask = torch.tensor(t.ids)[None], torch.zeros(1, t.n, dtype=torch.bool)
        mask[:, len(t.history) + 8:] = True
        want = flat_logprobs(new, ids, mask)[0].detach().numpy()
        assert np.allclose(t.logprobs[8:], want, atol=1e-4) != keep
    # all but the last token each, the prompt once
    assert e.stats['prefilled_tokens'] - n == (40 if keep else 47 + 37 + 1)
    n = e.stats['prefilled_tokens']
    e.generate([Request(a.ids, 2, session='a')])
    assert (e.stats['prefilled_tokens'] - n > 10) == keep  # what was kept is not handed on

# ---------------------------------------------------------------- stop strings

# the last two are the bytes of an e with an accent
WORDS = ['a', 'b', 'ab', 'ba', '<', '>', '\u0120', '\u00c3', '\u00a9']

@pytest.fixture(scope='module')
def words():
    t = Tokenizer(models.BPE({w: i for i, w in enumerate(WORDS)}, []))
    t.decoder = decoders.ByteLevel()
    return SimpleNamespace(backend_tokenizer=t)

@given(ids=st.lists(st.integers(0, len(WORDS) - 1), max_size=30), least=st.integers(0, 5),
       stops=st.lists(st.text('ab<> \u00e9', min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_strings(words, ids, least, stops):
    "against decoding everything after every token"
    watch, decode = StopStrings(words, tuple(stops), []), words.backend_tokenizer.decode
    before = ''
    for n, i in enumerate(ids, 1):
        text = decode(ids[:n])
        text = before if text.endswith('\ufffd') else text  # a character may be under way
        new = [(text.find(s, max(0, len(before) - len(s) + 1)), s) for s in stops]
        new = [(at, s) for at, s in new if at >= 0]
        got = watch.push(i, n > least)
        if n > least and new:
            assert got == min(new)[1]
            return
        assert got is None
        before = text

# ---------------------------------------------------------------- the thread

def test_closed(model):
    async def go():
        e = HFAsyncEngine(model, max_len=64, slots=2)
        await e.pause()
        waiting = [asyncio.create_task(e.generate(Request([1, 2], 9))) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.gather(e.close(), e.close())
        for t in waiting:
            with pytest.raises(EngineClosed):
                await t
        for again in (e.generate(Request([1], 1)), e.pause(), e.update_weights(model, 1)):
            with pytest.raises(EngineClosed):
                await again
        await e.close()
        assert not e.thread.is_alive() and e.engine.model is None
    run(go())

def test_a_listener_that_raises_fails_alone(model):
    async def go():
        e = HFAsyncEngine(model, max_len=64, slots=4)
        def bad(*t):
            raise KeyError('mine')
        a, b = await asyncio.gather(e.generate(Request([1, 2], 30, seed=0), bad), e.generate(Request([3], 30, seed=1)),
                                    return_exceptions=True)
        assert isinstance(a, KeyError) and b.ids.tolist() == alone(model, Request([3], 30, seed=1)).ids.tolist()
        await e.pause()
        assert not e.engine.busy and not e.callers
        await e.close()
    run(go())

def test_an_error_in_the_model_reaches_those_it_hit(model):
    async def go():
        e = HFAsyncEngine(model, max_len=64, slots=4)
        def broken(engine):
            raise FloatingPointError('not finite')
        e.engine.step = lambda patient: broken(e)
        for x in await asyncio.gather(*[e.generate(Request([i], 9)) for i in range(3)], return_exceptions=True):
            assert isinstance(x, FloatingPointError)
        e.engine._forget()
        del e.engine.step
        c = await e.generate(Request([1, 2, 3], 9, seed=0))
        assert c.ids.tolist() == alone(model, Request([1, 2, 3], 9, seed=0)).ids.tolist()
        await e.close()
    run(go())

def test_damaged_weights_are_noticed(model):
    async def go():
        e = HFAsyncEngine(model, max_len=64, slots=4)
        sd = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match='norm.weight is missing'):
            await e.update_weights({k: v for k, v in sd.items() if k != 'model.norm.weight'}, 1)
        assert e.version == 0
        await e.update_weights(sd | {'model.norm.weight': sd['model.norm.weight']*torch.nan}, 1)
        with pytest.raises(FloatingPointError):
            await e.generate(Request([1, 2], 3))
        await e.update_weights(sd, 2)
        request = Request([1, 2], 3, seed=0)
        assert (await e.generate(request)).ids.tolist() == alone(model, request).ids.tolist()
        await e.close()
    run(go())

def test_event_loops_come_and_go(model):
    "the engine outlives the loop it was made on, and callers of a loop that has ended"
    e = HFAsyncEngine(model, max_len=64, slots=4)
    for seed in range(2):
        c = asyncio.run(e.generate(Request([1, 2], 9, seed=seed)))
        assert c.ids.tolist() == alone(model, Request([1, 2], 9, seed=seed)).ids.tolist()
    async def leave():
        asyncio.ensure_future(e.generate(Request([1, 2], 60)))
    asyncio.run(leave())
    asyncio.run(e.close())
    assert not e.callers

# ---------------------------------------------------------------- partial rollout

def test_an_engine_never_goes_on_with_old_weights(model):
    "what fails leaves it paused, also for those who come later; the next good weights let it go on"
    async def go():
        e, new = HFAsyncEngine(model, max_len=256, slots=2), make(1)
        early = asyncio.create_task(e.generate(Request([1, 2, 3], 80, seed=0)))
        bad = {k: v for k, v in model.state_dict().items() if k != 'model.norm.weight'}
        with pytest.raises(ValueError, match='norm.weight'):
            await renew(e, bad, 1)
        late = asyncio.create_task(e.generate(Request([1, 2, 3], 80, seed=1)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert e.paused and e.version == 0 and not early.done() and not late.done()
        await renew(e, new, 2)
        assert [len(c.ids) for c in await asyncio.gather(early, late)] == [80, 80]
        assert set((await late).versions) == {2} and e.version == 2
        await e.close()
    run(go())

class Cuts:
    "An engine that aborts after as many tokens as it is told; token t of an answer is the number of tokens before it"
    version = 0
    def __init__(self, *cuts):
        self.cuts, self.asked = list(cuts), []
    async def generate(self, r, on_token=None):
        self.asked.append(r)
        n = min(self.cuts.pop(0), r.max_tokens) if self.cuts else r.max_tokens
        finish = 'length' if n == r.max_tokens else 'abort'
        ids, z = np.arange(len(r.ids), len(r.ids) + n, dtype=np.int32), np.zeros(n, np.float32)
        for i in ids:
            on_token(int(i), 0., 0., 0)
        return Completion(ids, z, z, finish, 0)
    async def pause(self):
        pass
    async def resume(self):
        pass

@given(st.lists(st.integers(0, 6), max_size=6), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_cut_answers_go_on(cuts, most, least):
    heard, e = [], Cuts(*cuts)
    def go():
        request = Request([7, 7], most, seed=5, min_tokens=min(least, most))
        return asyncio.run(PartialRollout(e).generate(request, lambda i, *_: heard.append(i)))
    if any(cuts[i:i+3] == [0, 0, 0] and sum(cuts[:i]) < most for i in range(len(cuts))):
        with pytest.raises(RuntimeError, match='three times'):
            go()
        return
    c = go()
    assert c.ids.tolist() == heard == list(range(2, 2 + most)) and c.finish == 'length' and len(c.versions) == most
    assert all(r.min_tokens == max(0, min(least, most) - (len(r.ids) - 2)) for r in e.asked)
    parts = [len(r.ids) for r in e.asked]
    assert len({r.seed for r in e.asked}) == len(set(parts)) and e.asked[0].seed == 5

def test_paused_engines_are_not_asked():
    async def go():
        inner = Cuts(3)
        e = PartialRollout(inner)
        await e.pause()
        t = asyncio.create_task(e.generate(Request([1], 5), lambda *_: None))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not inner.asked and not t.done()
        await e.resume()
        assert len((await t).ids) == 5
    run(go())
