"Attention by hand and flat log-probs against transformers' own computation."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kat.compute import score as scoring
from kat.compute.attention import FLAT_ATTENTION, causal_attention, kat_attention, masked_attention, register_attention
from kat.compute.logprob import flat_logprobs, length_buckets, pad_rows

FEW = settings(max_examples=15, deadline=None)


def make(attention="sdpa", dtype=torch.float64, **kw):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **kw)
    config._attn_implementation = attention
    return Qwen3ForCausalLM(config).to(dtype).eval()


def gradients(out, inputs, seed=1):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return torch.autograd.grad((out * weight).sum(), inputs)


@FEW
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 300), st.sampled_from([4, 8]))
def test_causal_attention_is_sdpa(rows, kv, groups, length, dim):
    torch.manual_seed(length)
    q, k, v = (torch.randn(rows, heads, length, dim, dtype=torch.float64, requires_grad=True)
               for heads in (kv * groups, kv, kv))
    ours, truth = causal_attention(q, k, v, dim**-0.5), sdpa(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=0)
    for a, b in zip(gradients(ours, (q, k, v)), gradients(truth, (q, k, v))):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_masked_attention_is_sdpa():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64, requires_grad=True) for h, n in ((4, 7), (2, 11), (2, 11)))
    mask = torch.rand(2, 1, 7, 11) < 0.6
    mask[..., 0] = True
    ours, truth = masked_attention(q, k, v, mask, 0.3), sdpa(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=0)
    for a, b in zip(gradients(ours, (q, k, v)), gradients(truth, (q, k, v))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


SLIDING = dict(sliding_window=20, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])


@pytest.mark.parametrize("kw", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("how", ["plain", "left padding", "right padding", "packed"])
def test_whole_model_agrees(kw, how):
    ids = torch.randint(0, 50, (2, 140), generator=torch.Generator().manual_seed(2))
    real, args = torch.ones_like(ids, dtype=torch.bool), {}
    if "padding" in how:
        real[0, slice(0, 30) if "left" in how else slice(110, 140)] = False
        args["attention_mask"] = real.long()
    if how == "packed":
        args["position_ids"] = torch.cat([torch.arange(90), torch.arange(50)]).expand(2, -1)
    logits, grads = [], []
    for name in ("sdpa", register_attention()):
        model = make(name, **kw)
        out = model(ids, **args).logits[real]
        logits.append(out)
        grads.append(gradients(out, list(model.parameters())))
    # the library computes its norms in float32 whatever the dtype
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kw", [{}, SLIDING], ids=["full", "sliding"])
def test_generation_with_a_cache_agrees(kw):
    ids = torch.randint(0, 50, (2, 15), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    said = [make(name, **kw).generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
            for name in ("sdpa", FLAT_ATTENTION)]
    assert torch.equal(*said)


def test_unknown_attention_features_are_refused():
    x = torch.zeros(1, 1, 2, 4)
    for kw in ({"softcap": 30.0}, {"s_aux": torch.zeros(1)}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match="sdpa"):
            kat_attention(None, x, x, x, None, **kw)


@FEW
@given(st.lists(st.integers(1, 60), max_size=40), st.integers(60, 200))
def test_buckets_partition_within_the_budget(lengths, budget):
    batches = length_buckets(lengths, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= budget for b in batches)


def test_too_long_a_sequence_is_named():
    with pytest.raises(ValueError, match="sequence 1 has 90 tokens"):
        length_buckets([5, 90], 80)


def test_flat_logprobs_are_those_of_one_forward_per_sequence():
    model = make(dtype=torch.float32)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 50, n) for n in (3, 31, 17)]
    masks = [rng.random(len(r)) < 0.5 for r in rows]
    masks[1][0] = True  # a first token has no log-prob
    taus = [1.0, 0.7, 1.5]
    got, entropy = flat_logprobs(model, pad_rows(rows), pad_rows(masks, False), torch.tensor(taus))
    want, want_entropy = [], []
    for ids, mask, tau in zip(rows, masks, taus):
        logps = torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0].float() / tau, -1)
        where = np.flatnonzero(mask[1:])
        want.append(logps[where, ids[1:][where]])
        want_entropy.append(-(logps.exp() * logps).sum(-1)[where])
    torch.testing.assert_close(got, torch.cat(want), atol=2e-6, rtol=0)
    torch.testing.assert_close(entropy, torch.cat(want_entropy), atol=1e-5, rtol=0)
    assert entropy.requires_grad


def test_slices_of_the_vocabulary_change_nothing(monkeypatch):
    model = make(dtype=torch.float32)
    ids = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    results = []
    for size, rows in ((2**24, 512), (2**24, 7), (50 * 7, 512)):  # in one piece; in pieces, kept or computed again
        monkeypatch.setattr(scoring, "SLICE", size)
        monkeypatch.setattr(scoring, "HEAD_ROWS", rows)
        logps, _ = flat_logprobs(model, ids, mask)
        results.append((logps, *torch.autograd.grad(logps.sum(), list(model.parameters()))))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rows_do_not_see_each_other_nor_padding():
    model = make(FLAT_ATTENTION, dtype=torch.float32)
    a, b, c = (np.random.default_rng(i).integers(0, 50, n) for i, n in enumerate((30, 20, 30)))
    def score(other):
        return flat_logprobs(model, pad_rows([other, b]), pad_rows([other < 0, b >= 0], False))[0]
    assert torch.equal(score(a), score(c))
    torch.testing.assert_close(score(a), flat_logprobs(model, pad_rows([b]), pad_rows([b >= 0]))[0], atol=1e-6, rtol=0)


def test_bfloat16_compute_keeps_float32_gradients():
    model = make(FLAT_ATTENTION, dtype=torch.float32)
    ids = torch.randint(0, 50, (4, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    grads = []
    for dtype in (None, torch.bfloat16):
        logps, _ = flat_logprobs(model, ids, mask, dtype=dtype)
        grads.append(torch.autograd.grad(-logps.mean(), list(model.parameters())))
    assert all(g.dtype == torch.float32 for g in grads[1]) and logps.dtype == torch.float32
    flat = [torch.cat([g.flatten() for g in gs]) for gs in grads]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.999


def test_what_cannot_be_scored_is_refused():
    model = make(dtype=torch.float32)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="temperature"):
        flat_logprobs(model, ids, ids == 0, 0.0)
    capped = Gemma2ForCausalLM(Gemma2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                            num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    with pytest.raises(ValueError, match="its logits aren't a linear map of its final states"):
        flat_logprobs(capped, ids, ids == 0)
