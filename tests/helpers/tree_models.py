"Small decoders of every supported kind, random branching trees, and the plain truth: one forward per sequence."
import types

import numpy as np
import torch
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3MoeConfig, Qwen3MoeForCausalLM)

SMALL = dict(vocab_size=23, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=256, tie_word_embeddings=False)
THREE_HEADS = dict(tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=1)
HEADS_BY_SIZE = {name: x for name, x in SMALL.items() if name != "head_dim"} | dict(hidden_size=32)
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "smollm2": lambda: LlamaForCausalLM(LlamaConfig(**SMALL | THREE_HEADS)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**HEADS_BY_SIZE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(
        **SMALL | dict(tie_word_embeddings=True), sliding_window=3, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"])),
    "qwen3moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
}


def _norm(self, x):  # the twin of transformers' RMSNorm in x's own dtype
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (self.eps if hasattr(self, "eps") else self.variance_epsilon))
    return x * (1 + self.weight if "Gemma" in type(self).__name__ else self.weight)


def _route(self, x):  # the twin of Qwen3MoE's router
    logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
    value, index = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
    return logits, value / value.sum(-1, keepdim=True) if self.norm_topk_prob else value, index


def make(kind, dtype=torch.float64, seed=0, noise=0.2):
    "A model with random weights; in float64 the parts that transformers computes in float32 are swapped for twins."
    torch.manual_seed(seed)
    model = KINDS[kind]().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * noise)
    if dtype == torch.float64:
        for m in model.modules():
            if type(m).__name__.endswith("RMSNorm"):
                m.forward = types.MethodType(_norm, m)
            if type(m).__name__.endswith("TopKRouter"):
                m.forward = types.MethodType(_route, m)
    model.set_attn_implementation("sdpa")
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the library's grouped kernels know no float64
    return model


@st.composite
def sequences(draw, most=6, vocab=23, longest=12):
    "Branching sequences: each grows from a cut of an earlier one or anew; duplicates and strict prefixes are common."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out = []
    for _ in range(draw(st.integers(1, most))):
        how, tail = rng.random(), rng.integers(0, vocab, rng.integers(1, longest)).astype(np.int32)
        base = out[rng.integers(len(out))] if out else tail
        if not out or how < 0.15:
            out.append(tail)  # a root of its own
        elif how < 0.25:
            out.append(base.copy())  # a duplicate
        elif how < 0.4:
            out.append(base[:rng.integers(1, len(base) + 1)])  # a strict prefix
        else:
            out.append(np.concatenate([base[:rng.integers(1, len(base) + 1)], tail]))  # a branch
    return out


def flat_logprobs_of(model, seq, temperature=1.0):
    "log p and entropy of seq[1:], by one plain forward."
    logits = model(torch.as_tensor(seq, dtype=torch.long)[None], use_cache=False).logits[0, :-1]
    logps = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    y = torch.as_tensor(seq[1:], dtype=torch.long)
    return logps.gather(-1, y[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def gradients(model):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
    model.zero_grad(set_to_none=True)
    return out


def worst(want, have):
    "Largest relative error of a parameter's gradient; a parameter without gradient counts absolutely."
    scale = max(grad.norm() for grad in want.values())
    if not scale > 0: return 0.0
    return max(float((want[name] - have[name]).norm() / max(want[name].norm(), 1e-6 * scale)) for name in want)
