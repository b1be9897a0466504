"The embedded engine against transformers itself, on small random models of several architectures"
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from transformers import (Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GptOssConfig,
                          GptOssForCausalLM, Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM)

from kat.infer import engines
from kat.infer.cache import prefill_groups
from kat.infer.engines import HFEngine
from kat.infer.requests import Request, check_sessions
from kat.infer.sampling import Settings, pick, sample, truncate, uniforms
from kat.infer.slots import Prefixes, SlotTable, common

V = 64
small = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, initializer_range=.3, max_position_embeddings=512,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)
kinds = dict(
    qwen3=lambda: Qwen3ForCausalLM(Qwen3Config(**small, tie_word_embeddings=True)),
    llama=lambda: LlamaForCausalLM(LlamaConfig(**small, attention_bias=True)),
    mistral=lambda: MistralForCausalLM(MistralConfig(**small, sliding_window=7)),
    moe=lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**small, num_experts=4, num_experts_per_tok=2,
                                                   moe_intermediate_size=24)),
    gemma2=lambda: Gemma2ForCausalLM(Gemma2Config(**small, sliding_window=6)),
    gemma3=lambda: Gemma3ForCausalLM(Gemma3TextConfig(**small, sliding_window=5, sliding_window_pattern=2)))

def make(kind='qwen3', seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    m = kinds[kind]().to(dtype).eval()
    m.generation_config.eos_token_id = None
    return m

def prompts(*sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n) for n in sizes]

def reference(model, prompt, ids, temperature=1):
    "log-probs and entropies of `ids` after `prompt`, by one plain forward"
    x = torch.as_tensor(np.concatenate([prompt, ids])).long()[None]
    with torch.no_grad():
        lp = (model(x, use_cache=False).logits[0, len(prompt)-1:-1]/temperature).log_softmax(-1)
    return lp.gather(1, x[0, len(prompt):, None])[:, 0].numpy(), -(lp.exp()*lp).sum(-1).numpy()

def check(model, prompt, c, temperature=1, tol=1e-5):
    lp, ent = reference(model, prompt, c.ids, temperature)
    np.testing.assert_allclose(c.logprobs, lp, atol=tol, rtol=tol)
    np.testing.assert_allclose(c.entropy, ent, atol=tol, rtol=tol)

def tokens(cs):
    return [c.ids.tolist() for c in cs]

@pytest.fixture(scope='module')
def model():
    return make()

@pytest.fixture(scope='module')
def model64():
    return make(dtype=torch.float64)

@pytest.mark.parametrize('kind', kinds)
def test_greedy_is_transformers(kind):
    m = make(kind)
    e = HFEngine(m, max_len=96, slots=4)
    ps = prompts(3, 21, 9, 14, 1, 33)  # two waves
    got = e.generate([Request(p, max_tokens=12 + 3*i, temperature=0) for i, p in enumerate(ps)])
    for p, c in zip(ps, got):
        want = m.generate(torch.tensor(p)[None], attention_mask=torch.ones(1, len(p)), do_sample=False,
                          max_new_tokens=len(c.ids))[0, len(p):]
        assert c.ids.tolist() == want.tolist() and c.finish == 'length'
        check(m, p, c, tol=2e-5)

@pytest.mark.parametrize('kind', ['qwen3', 'gemma3'])
def test_logprobs_at_temperature_over_turns(kind):
    m = make(kind)
    e, ps, n = HFEngine(m, max_len=256, slots=4), prompts(30, 12, 45, 4), 0
    for turn in range(4):  # capacity grows past 64 and 128 on the way
        cs = e.generate([Request(p, 9 + 4*i, temperature=.7, seed=turn, session=f's{i}') for i, p in enumerate(ps)])
        for p, c in zip(ps, cs):
            check(m, p, c, .7)
        n += sum(map(len, ps)) if turn == 0 else 4*(1 + 5)  # the last sampled token and the five new ones
        assert e.stats['prefilled_tokens'] == n
        ps = [np.r_[p, c.ids, o] for p, c, o in zip(ps, cs, prompts(5, 5, 5, 5, seed=turn))]

def test_reuse_equals_fresh(model64):
    "turns in one engine, in another order and company, rewritten and shortened histories: as in fresh engines"
    m = model64
    e = HFEngine(m, max_len=200, slots=6)
    rng = np.random.default_rng(1)
    hist = {f's{i}': p for i, p in enumerate(prompts(20, 31, 8, 25, 60, 17))}
    for turn in range(5):
        who = rng.permutation(list(hist))[:rng.integers(1, 7)]
        rs = [Request(hist[s], int(rng.integers(1, 25)), seed=int(rng.integers(99)), session=s) for s in who]
        for r, c in zip(rs, e.generate(rs)):
            alone, = HFEngine(m, max_len=200, slots=1).generate([r])
            assert c.ids.tolist() == alone.ids.tolist()
            np.testing.assert_allclose(c.logprobs, alone.logprobs, atol=1e-6)
            h = np.r_[hist[r.session], c.ids]
            h[-rng.integers(1, len(h)):] = rng.integers(0, V)  # rewrite the end
            hist[r.session] = h[:rng.integers(5, 80)]
    assert e.stats['prefilled_tokens'] < e.stats['prompt_tokens']

def test_company_does_not_matter(model64):
    rs = [Request(p, 20, seed=i, top_p=.9 if i % 2 else 1, stop=(3, 5))
          for i, p in enumerate(prompts(*range(4, 34, 3)))]
    alone = [HFEngine(model64, max_len=64, slots=1).generate([r])[0] for r in rs]
    for slots in (3, 16):
        e = HFEngine(model64, max_len=64, slots=slots)
        assert tokens(e.generate(rs[::-1])[::-1]) == tokens(alone)

def test_seeds(model):
    e, (p,) = HFEngine(model, max_len=64, slots=8), prompts(10)
    go = lambda seed: e.generate([Request(p, 15, seed=seed)])[0].ids.tolist()
    assert go(1) == go(1) != go(2)
    assert go(None) != go(None)
    a, b = e.generate([Request(p, 15, seed=7), Request(p, 15, seed=7)])
    assert a.ids.tolist() == b.ids.tolist()

def test_shared_prefixes_are_computed_once(model):
    system, a, b = prompts(40, 20, 30)
    ps = [np.r_[system, x] for x in (a, b, a, a, b)]
    e = HFEngine(model, max_len=128, slots=8)
    cs = e.generate([Request(p, 6, seed=i) for i, p in enumerate(ps)])
    assert e.stats['prefilled_tokens'] == 40 + 20 + 30 + 3  # and one token for each copy
    for p, c in zip(ps, cs):
        check(model, p, c)

def test_rewritten_history(model):
    e, (p, q) = HFEngine(model, max_len=128, slots=2), prompts(30, 40)
    e.generate([Request(p, 8, session='a')])
    n = e.stats['prefilled_tokens']
    r = np.r_[p[:11], q]
    c, = e.generate([Request(r, 8, session='a')])
    assert e.stats['prefilled_tokens'] - n == len(r) - common(p, r)
    check(model, r, c)
    n = e.stats['prefilled_tokens']
    c, = e.generate([Request(r, 8, session='a')])  # the very same again
    assert e.stats['prefilled_tokens'] - n == 1
    check(model, r, c)

def test_eviction_and_release(model):
    e, ps = HFEngine(model, max_len=64, slots=2), prompts(20, 21, 22)
    ask = lambda i: e.generate([Request(ps[i], 4, session=f's{i}')])[0]
    def cost(i):
        n = e.stats['prefilled_tokens']
        check(model, ps[i], ask(i))
        return e.stats['prefilled_tokens'] - n
    assert [cost(0), cost(1), cost(0), cost(2)] == [20, 21, 1, 22]  # the third conversation evicts s1
    assert [cost(0), cost(1), cost(0)] == [1, 21, 1]
    e.release('s1')
    e.release('never seen')
    assert cost(2) == 22 and cost(0) == 1  # s2 took the released slot

def test_stop_and_length(model):
    e, (p, q) = HFEngine(model, max_len=40, slots=4), prompts(10, 38)
    free, = e.generate([Request(p, 20, temperature=0)])
    stop = int(free.ids[7])
    n = free.ids.tolist().index(stop) + 1
    c, = e.generate([Request(p, 20, temperature=0, stop=(stop, 999))])
    assert c.finish == 'stop' and c.ids.tolist() == free.ids[:n].tolist()
    c, d, full = e.generate([Request(p, 20, temperature=0, stop=[stop]), Request(q, 20, session='q'),
                             Request(np.r_[q, q[:2]], 5, session='full')])
    assert (c.finish, d.finish, len(d.ids)) == ('stop', 'length', 2)
    check(model, q, d)
    assert full.finish == 'length' and len(full.ids) == len(full.logprobs) == len(full.entropy) == 0
    one, = e.generate([Request(p, 1, temperature=0)])
    assert one.ids.tolist() == free.ids[:1].tolist() and one.finish == 'length'
    assert c.ids.dtype == np.int32 and c.logprobs.dtype == c.entropy.dtype == np.float32

def test_long_prompt_in_parts(model, monkeypatch):
    groups = prefill_groups
    monkeypatch.setattr(engines, 'prefill_groups', lambda todo, budget: groups(todo, 16))
    e, ps = HFEngine(model, max_len=256, slots=4), prompts(100, 3, 47, 16)
    for p, c in zip(ps, e.generate([Request(p, 5, seed=0) for p in ps])):
        check(model, p, c)

def frequencies(n=4000, probs=(.4, .3, .2, .1), banned=(), **kw):
    "how often each token is sampled by `n` requests with seeds 0 to n-1, and what is reported"
    r = Request([0], 1, **kw)
    s = Settings([SimpleNamespace(request=r)]*n, 'cpu')
    u = torch.tensor([uniforms(i, 1)[0] for i in range(n)])
    tok, lp, entropy = sample(torch.tensor(probs).log().expand(n, -1), s, u, [(i, x) for i in range(n) for x in banned])
    return np.bincount(tok, minlength=len(probs))/n, SimpleNamespace(ids=tok, logprobs=lp, entropy=entropy)

def near(got, want, n=4000):
    want = np.array(want)
    assert (np.abs(got - want) <= 4*np.sqrt(want*(1-want)/n)).all(), (got, want)

def test_distribution():
    p = np.array([.4, .3, .2, .1])
    got, s = frequencies()
    near(got, p)
    np.testing.assert_allclose(s.logprobs, np.log(p)[s.ids], atol=1e-6)
    np.testing.assert_allclose(s.entropy, -(p*np.log(p)).sum(), atol=1e-6)
    got, s = frequencies(temperature=.5)
    near(got, p**2/(p**2).sum())
    np.testing.assert_allclose(s.logprobs, np.log(p**2/(p**2).sum())[s.ids], atol=1e-6)
    for kw, want in ((dict(top_k=2), [.4, .3, 0, 0]), (dict(top_p=.65), [.4, .3, 0, 0]),
                     (dict(top_p=.75), [.4, .3, .2, 0]), (dict(top_k=3, top_p=.5), [.4, .3, 0, 0]),
                     (dict(top_k=1), [1, 0, 0, 0]), (dict(top_p=1e-9), [1, 0, 0, 0])):
        got, s = frequencies(**kw)
        near(got, np.array(want)/sum(want))
        np.testing.assert_allclose(s.logprobs, np.log(p)[s.ids], atol=1e-6)  # before the cut
        got, s = frequencies(banned=[0], **kw)  # a stop token that would come too early
        assert got[0] == 0 and (got > 0).sum() == min(3, kw.get('top_k') or 3) or 'top_p' in kw
    near(frequencies(banned=[1, 3])[0], [2/3, 0, 1/3, 0])
    assert frequencies(temperature=0)[0].tolist() == [1, 0, 0, 0]
    assert frequencies(temperature=0, banned=[0])[0].tolist() == [0, 1, 0, 0]
    assert frequencies(probs=(.3, .3, .4), top_k=2)[0][1] == 0  # among equals the lower id stays

def test_greedy_reports_temperature_one(model):
    e, (p,) = HFEngine(model, max_len=64, slots=2), prompts(12)
    check(model, p, e.generate([Request(p, 8, temperature=0)])[0])

@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=4),
       st.floats(0, 1, exclude_max=True), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_pick_never_takes_the_impossible(rows, u, one):
    p = torch.tensor(rows)
    p[:, one] = 1  # as the likeliest token has after exp(x - max)
    assert (p.gather(1, pick(p, torch.full((len(p),), u, dtype=torch.float64))[:, None]) > 0).all()

@given(st.lists(st.floats(1e-3, 1), min_size=6, max_size=6), st.integers(0, 7), st.floats(.01, 1))
@settings(max_examples=60, deadline=None)
def test_truncate_keeps_what_it_should(w, k, top_p):
    p = torch.tensor([w])/sum(w)
    kept = truncate(p, torch.tensor([k]), torch.tensor([top_p]))[0]
    want = sorted(range(6), key=lambda i: (-p[0, i], i))[:k or 6]
    total = sum(p[0, i].item() for i in want)
    on = kept > 0
    assert on.any() and (kept[on] == p[0][on]).all() and set(on.nonzero()[:, 0].tolist()) == set(want[:on.sum()])
    assert kept.sum() >= top_p*total - 1e-5
    smallest = kept[on].min() if on.sum() > 1 else 1
    assert on.sum() == 1 or top_p >= 1 or kept.sum() - smallest < top_p*total + 1e-5

@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 400)), min_size=1, max_size=12), st.integers(8, 200))
@example([(0, 326), (0, 329), (0, 329)], 81)
@settings(max_examples=100, deadline=None)
def test_prefill_groups(rows, budget):
    todo = [(s, a, a + n) for s, (a, n) in enumerate(rows)]
    groups = prefill_groups(todo, budget)
    done = {s: a for s, a, _ in todo}
    for g in groups:
        widths = [b - a for _, a, b in g]
        assert len({s for s, _, _ in g}) == len(g) and len(g)*max(widths) <= budget
        assert 5*sum(widths) >= 4*len(g)*max(widths)  # in whole numbers: .8*3*5 is more than 12
        for s, a, b in g:
            assert done[s] == a < b
            done[s] = b
    assert done == {s: b for s, _, b in todo}

@given(st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=8),
       st.lists(st.integers(0, 2), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_prefixes_find_the_longest(rows, ids):
    rows, ids = [np.array(r, np.int64) for r in rows], np.array(ids)
    held = Prefixes([(r, i) for i, r in enumerate(rows[::2])])
    for i, r in enumerate(rows[1::2]):
        held.add(r, 100 + i)
    n, owner = held.best(ids)
    of = dict(enumerate(rows[::2])) | {100 + i: r for i, r in enumerate(rows[1::2])}
    assert n == max([common(r, ids) for r in rows], default=0)
    assert common(of[owner], ids) == n if n else owner == -1

def test_slot_table():
    t = SlotTable(3)
    assert sorted(t.claim(s) for s in 'abc') == [0, 1, 2]
    a, b = t.claim('a'), t.session.index('b')
    assert t.claim('d') == b and t.claim('a') == a and t.evicted == 1
    t.free(a)
    assert t.claim('e') == a and t.evicted == 1
    t.turn[:] = [SimpleNamespace(slot=i) for i in range(3)]
    assert t.claim('f') is None
    t.swap(0, 2)
    assert [x.slot for x in t.turn] == [0, 1, 2]

def test_update_weights(model):
    other, p = make(seed=5), prompts(25)[0]
    e = HFEngine(model, max_len=64, slots=2)
    ask = lambda: e.generate([Request(p, 8, seed=3, session='a')])[0]
    before = ask()
    check(model, p, before)
    e.update_weights(other, version=4)
    after = ask()
    check(other, p, after)  # nothing of the old weights' cache is used
    assert (before.version, after.version, e.version) == (0, 4, 4)
    sd = {k: v for k, v in model.state_dict().items() if k != 'lm_head.weight'}  # tied weights as a checkpoint has them
    e.update_weights(sd, version=5)
    assert ask().ids.tolist() == before.ids.tolist()
    with pytest.raises(ValueError, match='model.norm.weight is missing'):
        e.update_weights({k: v for k, v in sd.items() if k != 'model.norm.weight'}, version=6)
    with pytest.raises(ValueError, match='extra is unknown'):
        e.update_weights({**sd, 'extra': torch.ones(1)}, version=6)
    with pytest.raises(ValueError, match=r'model.norm.weight has shape \(3,\), not \(32,\)'):
        e.update_weights({**sd, 'model.norm.weight': torch.ones(3)}, version=6)
    assert e.version == 5 and ask().ids.tolist() == before.ids.tolist()

def test_training_model_untouched():
    m = make().train()
    m.model.embed_tokens.weight.grad = torch.ones_like(m.model.embed_tokens.weight)
    how, sd = m.config._attn_implementation, {k: v.clone() for k, v in m.state_dict().items()}
    e = HFEngine(m, max_len=64, slots=2, dtype=torch.bfloat16)
    e.generate([Request(prompts(9)[0], 5)])
    e.update_weights(m, 1)
    assert m.training and m.config._attn_implementation == how and m.lm_head.weight is m.model.embed_tokens.weight
    assert all(p.requires_grad and p.dtype == torch.float32 for p in m.parameters())
    assert all(torch.equal(v, sd[k]) for k, v in m.state_dict().items())
    m(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    with torch.no_grad():
        m.model.norm.weight.mul_(2)
    assert torch.equal(e.model.model.norm.weight.float()*2, m.model.norm.weight)  # a copy, not a view

def test_bfloat16_is_close(model):
    e, ps = HFEngine(model, max_len=128, slots=8, dtype=torch.bfloat16), prompts(20, 35, 50)
    for p, c in zip(ps, e.generate([Request(p, 12, seed=1) for p in ps])):
        assert np.abs(c.logprobs - reference(model, p, c.ids)[0]).mean() < .25  # large weights
    assert e.model.lm_head.weight.dtype == torch.float32 and e.model.model.norm.weight.dtype == torch.bfloat16

@pytest.mark.parametrize('bad, msg', [
    (dict(ids=[]), 'non-empty'), (dict(ids=[[1]]), r'shape \(1, 1\)'), (dict(ids=[1., 2.]), 'whole numbers'),
    (dict(ids=[1]*17), '17 tokens, max_len is 16'), (dict(ids=[3, -1]), 'holds -1'),
    (dict(ids=[3, V]), f'holds {V}, .* 0 to {V-1}'),
    (dict(max_tokens=0), 'max_tokens'), (dict(temperature=-.1), 'temperature'),
    (dict(temperature=float('nan')), 'temperature'), (dict(top_p=0), 'top_p'), (dict(top_p=1.1), 'top_p'),
    (dict(top_k=-1), 'top_k'), (dict(seed=-1), 'seed'), (dict(stop=3), 'stop'),
    (dict(min_tokens=9), 'min_tokens'), (dict(min_tokens=1, stop=range(V)), 'every token'),
    (dict(stop_strings='ab'), 'stop_strings'), (dict(stop_strings=('',)), 'stop_strings'),
    (dict(stop_strings=('a',)), 'tokenizer')])
def test_bad_requests(model, bad, msg):
    e = HFEngine(model, max_len=16, slots=2)
    good = Request([1, 2], 3, session='g')
    with pytest.raises(ValueError, match=r"request 1 \(session 'x'\): .*" + msg):
        e.generate([good, Request(**{**dict(ids=[1], max_tokens=2, session='x'), **bad})])
    assert e.stats['prefilled_tokens'] == 0

def test_same_session_twice(model):
    with pytest.raises(ValueError, match='request 1 .*request 0 has the same session'):
        check_sessions([Request([1], 2, session='x'), Request([2], 2, session='x')])

def sinks():
    m = GptOssForCausalLM(GptOssConfig(**small, num_local_experts=4, num_experts_per_tok=2))
    for l in m.model.layers:
        torch.nn.init.constant_(l.self_attn.sinks, 3.)
    return m

def convolutions():
    return Lfm2ForCausalLM(Lfm2Config(**small, layer_types=['conv', 'full_attention']))

@pytest.mark.parametrize('kind', [sinks, convolutions])
@pytest.mark.parametrize('slots', [1, 3])
def test_models_it_cannot_compute_are_refused(kind, slots):
    torch.manual_seed(0)
    m = kind()
    with pytest.raises(ValueError, match=type(m).__name__):
        HFEngine(m, max_len=32, slots=slots)

def test_interrupted_call_leaves_no_half_cache(model, monkeypatch):
    e, ps = HFEngine(model, max_len=64, slots=4), prompts(20, 10)
    rs = [Request(p, 8, seed=1, session=str(i)) for i, p in enumerate(ps)]
    want, sample, calls = tokens(e.generate(rs)), engines.sample, []
    def stop(*args):
        calls.append(0)
        if len(calls) == 4: raise KeyboardInterrupt
        return sample(*args)
    with monkeypatch.context() as mp:
        mp.setattr(engines, 'sample', stop)
        with pytest.raises(KeyboardInterrupt):
            e.generate(rs)
    assert not e.busy and tokens(e.generate(rs)) == want

def test_capacity_follows_the_longest_row(model):
    e, (long, short) = HFEngine(model, max_len=400, slots=3), prompts(300, 20)
    e.generate([Request(long, 3, session='long'), Request(short, 3, session='short')])
    assert e.cache.capacity == 320
    for _ in range(2):
        c, = e.generate([Request(short, 70, session='short')])
    assert e.cache.capacity == 320  # the long conversation waits
    check(model, short, c)
    n = e.stats['prefilled_tokens']
    e.generate([Request(long, 3, session='long')])
    assert e.stats['prefilled_tokens'] - n == 1
    e.release('long')
    c, = e.generate([Request(short, 70, session='short')])
    assert e.cache.capacity == 128
    check(model, short, c)

def test_empty_call_and_close(model):
    e = HFEngine(model, max_len=16, slots=2)
    assert e.generate([]) == []
    e.close()

def test_damaged_weights_are_named(model):
    e, (p,) = HFEngine(model, max_len=32, slots=2), prompts(5)
    e.update_weights({k: v*torch.nan for k, v in model.state_dict().items()}, version=1)
    with pytest.raises(FloatingPointError, match='not finite'):
        e.generate([Request(p, 4)])
