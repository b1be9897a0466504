"A probe decides which models trees fit: what is wrong is refused, whatever its name; what is right passes unchanged."
import copy

import numpy as np
import pytest
import torch
from transformers import (BertConfig, BertLMHeadModel, CohereConfig, CohereForCausalLM, DiffLlamaConfig,
                          DiffLlamaForCausalLM, DogeConfig, DogeForCausalLM, Gemma2Config, Gemma2ForCausalLM,
                          GptOssConfig, GptOssForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaConfig,
                          LlamaForCausalLM, MistralConfig, MistralForCausalLM, ModernBertDecoderConfig,
                          ModernBertDecoderForCausalLM, Phi3Config, Phi3ForCausalLM, PhiConfig, PhiForCausalLM,
                          PhimoeConfig, PhimoeForCausalLM, Qwen3Config, Qwen3ForCausalLM, RecurrentGemmaConfig,
                          RecurrentGemmaForCausalLM, SmolLM3Config, SmolLM3ForCausalLM)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from tree_models import KINDS, make

from kat.compute import forward, probe, score
from kat.compute.engine import TreeEngine
from kat.compute.logprob import flat_logprobs, tree_logprobs
from kat.compute.probe import check_exact
from kat.tree.trie import TokenTree

TINY = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256)
GQA = TINY | dict(num_key_value_heads=2)
TREE = TokenTree.from_sequences([[1, 2, 3], [1, 2, 4, 5]])
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=24,
                short_factor=[1.0] * 4, long_factor=[1.0, 2.0, 4.0, 8.0])


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(probe, "_VERDICTS", {})


def gemma2(**more):
    return Gemma2ForCausalLM(Gemma2Config(**GQA | dict(head_dim=8, sliding_window=64, final_logit_softcapping=None)
                                          | more))


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
                                          sliding_window=64))


def phi3(length=256, **rope):
    return Phi3ForCausalLM(Phi3Config(**GQA | dict(max_position_embeddings=length),
                                      original_max_position_embeddings=24, rope_parameters=LONGROPE | rope))


WRONG = {
    "two attentions a layer": lambda: DiffLlamaForCausalLM(DiffLlamaConfig(**GQA)),
    "a mask with learned bias": lambda: DogeForCausalLM(DogeConfig(**GQA)),
    "a transform before the head": lambda: ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**TINY)),
    "a transform, both directions": lambda: BertLMHeadModel(BertConfig(**TINY)),
    "a transform, one direction": lambda: BertLMHeadModel(BertConfig(**TINY, is_decoder=True)),
    "a recurrence": lambda: RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**GQA, lru_width=32)),
    "a cap on scores": gemma2,
    "a cap on logits": lambda: gemma2(attn_logit_softcapping=None, final_logit_softcapping=30.0),
    "sinks": gpt_oss,
    "a scale after the head": lambda: CohereForCausalLM(CohereConfig(**GQA)),
    "another scale after the head": lambda: GraniteForCausalLM(GraniteConfig(**GQA, logits_scaling=8.0)),
    "a window that only the mask knows": lambda: PhimoeForCausalLM(PhimoeConfig(
        **GQA, num_local_experts=2, sliding_window=6)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_trees_would_get_wrong_is_refused_at_first_use(what):
    model = WRONG[what]()
    for call in (lambda: TreeEngine(model), lambda: tree_logprobs(model, TREE)):
        with pytest.raises(ValueError, match=type(model).__name__.removesuffix("ForCausalLM")):
            call()


def test_heads_are_tried_for_flat_sequences_too():
    ids = torch.tensor([[1, 2, 3]])
    for what in ("a scale after the head", "a cap on logits", "a transform, both directions"):
        with pytest.raises(ValueError, match="its logits aren't a linear map of its final states"):
            flat_logprobs(WRONG[what](), ids, ids > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_supported_kinds_pass_at_any_length(kind, dtype):
    assert check_exact(make(kind, dtype), dtype=dtype) == {}


class ShiftingLayer(LlamaDecoderLayer):
    "Mixes in the token before, by a share that is this layer's own"
    def __init__(self, config, number):
        super().__init__(config, number)
        self.share = config.shares[number]
    def forward(self, hidden, *args, **kwargs):
        out = super().forward(hidden, *args, **kwargs)
        return out + self.share * torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :-1]


class ShiftingModel(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers = torch.nn.ModuleList(ShiftingLayer(config, i) for i in range(config.num_hidden_layers))


class CappedModel(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.config.cap * torch.tanh(out.logits / self.config.cap)
        return out


@pytest.mark.parametrize("shares", [[0.0, 0.3], [0.0, 0.0, 0.0, 0.3], [0.3, 0.0]])
def test_layers_that_differ_by_a_number_are_of_two_kinds(shares):
    "The copy had the first of them only"
    config = LlamaConfig(**GQA | dict(num_hidden_layers=len(shares)), shares=shares)
    with pytest.raises(ValueError, match="something besides attention looks along the sequence"):
        check_exact(ShiftingModel(config))


@pytest.mark.parametrize("cap", [30.0, 1000.0, 5000.0])
def test_a_cap_that_small_logits_hardly_touch_is_seen(cap):
    with pytest.raises(ValueError, match="its logits aren't a linear map of its final states"):
        check_exact(CappedModel(LlamaConfig(**GQA, cap=cap)))


# --- kat's side, one piece less each

def ignoring(monkeypatch, *names):
    "Tree attention without its look at what a layer asks for."
    monkeypatch.setattr(forward, "_check_call", lambda *args: None)


def attention(change):
    "Tree attention whose arguments q, k, v, layout, scaling, window, backend are changed first."
    def patch(monkeypatch):
        whole = forward.tree_attention
        monkeypatch.setattr(forward, "tree_attention", lambda *args: whole(*change(*args)))
    return patch


def no_head_bias(monkeypatch):
    whole = score._logps
    monkeypatch.setattr(score, "_logps", lambda hidden, weight, bias, tau: whole(hidden, weight, None, tau))


def no_gradient_to_boundary(monkeypatch):
    whole = forward._join
    monkeypatch.setattr(forward, "_join", lambda *args: {
        layer: [x.detach() for x in pair] for layer, pair in whole(*args).items()})


def counted_positions(monkeypatch):
    whole = forward.run_pack
    def run_pack(model, tree, pack, *rest):
        tree = copy.copy(tree)
        object.__setattr__(tree, "position", np.arange(len(tree)))
        return whole(model, tree, pack, *rest)
    monkeypatch.setattr(forward, "run_pack", run_pack)


def branches_see_each_other(monkeypatch):
    whole = forward.pack_layout
    def pack_layout(tree, pack):
        layout = whole(tree, pack)
        return forward.Layout(np.full_like(layout.end, len(layout.end)), np.arange(len(layout.end)), layout.m)
    monkeypatch.setattr(forward, "pack_layout", pack_layout)


def boundary_of_layer_1(monkeypatch):
    whole = forward._join
    monkeypatch.setattr(forward, "_join", lambda *args: {
        layer: [0.9 * x for x in pair] if layer == 1 else pair for layer, pair in whole(*args).items()})


LESS = {
    "softcap of 50": (gemma2, ignoring),
    "softcap of 30": (lambda: gemma2(attn_logit_softcapping=30.0), ignoring),
    "sinks": (gpt_oss, ignoring),
    "bias in the mask": (WRONG["a mask with learned bias"], ignoring),
    "bias of the head": (lambda: PhiForCausalLM(PhiConfig(**TINY)), no_head_bias),
    "scaling": (lambda: make("qwen3", torch.float32),
                attention(lambda q, k, v, x, s, *rest: (q, k, v, x, 0.9 * s, *rest))),
    "window": (lambda: make("mistral", torch.float32), attention(lambda q, k, v, x, s, w, b: (q, k, v, x, s, None, b))),
    "window off by one": (lambda: make("gemma3", torch.float32),
                          attention(lambda q, k, v, x, s, w, b: (q, k, v, x, s, w and w + 1, b))),
    "boundary of one layer": (lambda: make("llama", torch.float32), boundary_of_layer_1),
    "gradient to the boundary": (lambda: make("llama", torch.float32), no_gradient_to_boundary),
    "positions": (lambda: make("llama", torch.float32), counted_positions),
    "paths": (lambda: make("llama", torch.float32), branches_see_each_other),
}


@pytest.mark.parametrize("what", LESS)
def test_without_a_piece_of_kats_side_the_probe_refuses(what, monkeypatch):
    make_model, take_away = LESS[what]
    model = make_model()
    take_away(monkeypatch)
    with pytest.raises(ValueError, match=r"trees aren't exact for it: .*(differ by up to|nats)") as said:
        TreeEngine(model)
    print(said.value)


def test_a_wide_window_taken_away_limits_the_length(monkeypatch):
    model = MistralForCausalLM(MistralConfig(**GQA | dict(max_position_embeddings=4096), sliding_window=100))
    assert check_exact(model) == {}
    probe._VERDICTS.clear()
    attention(lambda q, k, v, x, s, w, b: (q, k, v, x, s, None, b))(monkeypatch)
    assert check_exact(model) == {"sliding_window": 100}
    TreeEngine(model).forward_backward(TokenTree.from_sequences([[3] * 100]), lambda e: e.logprob.sum())
    for call in (TreeEngine(model).logprobs, lambda tree: tree_logprobs(model, tree)):
        with pytest.raises(ValueError, match="sequence 1: 101 tokens, but beyond sliding_window = 100"):
            call(TokenTree.from_sequences([[2], [3] * 101]))


# --- length

def test_longrope_is_exact_up_to_where_it_switches():
    model = phi3().double()
    engine = TreeEngine(model)
    assert engine.longest == {"original_max_position_embeddings": 24}
    seq = np.arange(24) % 30 + 3
    with torch.no_grad():
        have = tree_logprobs(model, TokenTree.from_sequences([seq, seq[:5]]), max_tokens=7).logprob[1:]
        ids = torch.as_tensor(seq)[None]
        want = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(have, want, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="25 tokens, but beyond original_max_position_embeddings = 24"):
        engine.forward_backward(TokenTree.from_sequences([np.append(seq, 1)]), lambda e: e.logprob.sum())


def test_dynamic_scaling_is_exact_up_to_what_it_was_made_for():
    model = LlamaForCausalLM(LlamaConfig(**GQA | dict(max_position_embeddings=32), rope_parameters=dict(
        rope_type="dynamic", rope_theta=1e4, factor=4.0)))
    model.config.max_position_embeddings = 128  # as the message of `check_tree` proposes
    with pytest.raises(ValueError, match="33 tokens, but beyond"):
        TreeEngine(model).logprobs(TokenTree.from_sequences([[3] * 33]))


@pytest.mark.parametrize("rope", [dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
                                  dict(rope_type="linear", factor=4.0), dict(rope_type="default"),
                                  dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                       original_max_position_embeddings=64)], ids=lambda x: x["rope_type"])
def test_fixed_scaling_has_no_limit(rope):
    model = LlamaForCausalLM(LlamaConfig(**GQA, rope_parameters=rope | dict(rope_theta=1e4)))
    assert check_exact(model) == {}


# --- the copy

BIG = dict(vocab_size=150_000, hidden_size=4096, intermediate_size=12_288, num_attention_heads=32, head_dim=128,
           num_key_value_heads=8, max_position_embeddings=40_960)


@pytest.mark.parametrize("make_model", [
    lambda: Qwen3ForCausalLM(Qwen3Config(**BIG, num_hidden_layers=36)),
    lambda: SmolLM3ForCausalLM(SmolLM3Config(**BIG, num_hidden_layers=36, pad_token_id=128_004))],
    ids=["one kind of layer", "two, by number"])
def test_a_large_model_is_probed_by_a_small_copy(make_model):
    with torch.device("meta"):  # none of its weights exists
        model = make_model()
    assert check_exact(model) == {}
    built = probe._maker(model)[0]([]).causal
    assert sum(p.numel() for p in built.parameters()) < 3e6
    assert set(probe._layers(built)) == set(probe._layers(model)) and built.config.num_hidden_layers <= 4


def test_a_model_that_no_configuration_gives_is_copied():
    model = make("llama", torch.float32)
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Tanh())  # token by token: trees don't mind
    assert check_exact(model) == {}
    class Mean(torch.nn.Module):  # the mean of what came before: along the sequence
        def forward(self, x):
            return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
    model.model.norm = torch.nn.Sequential(model.model.norm[0], Mean())
    with pytest.raises(ValueError, match="where sequences branch, so something besides attention"):
        check_exact(model)


def test_nothing_outside_notices():
    model, state = make("gemma3", torch.float32).train(), torch.get_rng_state()
    model.model.norm.requires_grad_(False)
    before = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    buffers = [x.clone() for x in model.buffers()]
    numpy_state = np.random.get_state()[1].copy()
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        probe._VERDICTS.clear()
        with context:
            check_exact(model)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before[0].items())
    assert [p.requires_grad for p in model.parameters()] == before[1]
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers()))
    assert model.config._attn_implementation == "sdpa" and torch.get_default_dtype() == torch.float32


def test_a_verdict_is_remembered_by_what_it_depends_on(monkeypatch):
    judged, judge = [], probe._judge
    monkeypatch.setattr(probe, "_judge", lambda *args: judged.append(args) or judge(*args))
    for _ in range(2):
        TreeEngine(make("llama", torch.float32))
        tree_logprobs(make("llama", torch.float32, seed=1), TREE)
    assert len(judged) == 1
    TreeEngine(make("llama", torch.float32), backend="reference")
    TreeEngine(make("llama", torch.bfloat16))
    other = make("llama", torch.float32)
    other.config.rope_parameters = dict(rope_type="linear", factor=2.0, rope_theta=1e4)
    TreeEngine(other)
    assert len(judged) == 4
    refused = WRONG["sinks"]()
    for _ in range(2):
        with pytest.raises(ValueError, match="s_aux"):
            TreeEngine(refused)
    assert len(judged) == 5


# --- adapters

def test_adapters_inside_layers_pass_and_prompts_are_refused():
    from peft import (AdaptionPromptConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptEncoderConfig,
                      PromptTuningConfig, get_peft_model)
    lora = dict(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    for config in (LoraConfig(**lora, lora_dropout=0.1), LoraConfig(**lora, use_dora=True),
                   LoraConfig(**lora, layers_to_transform=[1]),
                   IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])):
        assert check_exact(get_peft_model(make("llama", torch.float32), config)) == {}
    few = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
    for config in (PromptTuningConfig(**few), PrefixTuningConfig(**few), PromptEncoderConfig(**few),
                   AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")):
        model = get_peft_model(make("llama", torch.float32), config)
        for call in (lambda: TreeEngine(model), lambda: tree_logprobs(model, TREE)):
            with pytest.raises(ValueError, match="adapter 'default' of type .*: its virtual tokens"):
                call()


def test_adapters_that_act_on_sequences_or_on_the_head_are_refused():
    from peft import LoraConfig, PolyConfig, get_peft_model
    some = dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for config, said in ((LoraConfig(**some, alora_invocation_tokens=[20, 21]), "alora_invocation_tokens"),
                         (PolyConfig(**some, n_tasks=2, n_skills=2, n_splits=2), "task_ids"),
                         (LoraConfig(**some | dict(target_modules=["lm_head"])), "merge it"),
                         (LoraConfig(**some, modules_to_save=["lm_head"]), "merge it")):
        with pytest.raises(ValueError, match=said):
            TreeEngine(get_peft_model(make("llama", torch.float32), config))


@pytest.mark.parametrize("reentrant", [False, True])
def test_wrapped_layers_count_as_what_they_wrap(reentrant):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
    model = make("llama", torch.float32).train()
    how = wrappers.CheckpointImpl.REENTRANT if reentrant else wrappers.CheckpointImpl.NO_REENTRANT
    wrappers.apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=lambda x: wrappers.checkpoint_wrapper(x, checkpoint_impl=how),
        check_fn=lambda x: x in model.model.layers)
    engine = TreeEngine(model, 3)  # the small copy stands for it
    if reentrant:
        with pytest.raises(ValueError, match="reentrant"):
            engine.forward_backward(TREE, lambda e: e.logprob.sum())
    else:
        engine.forward_backward(TREE, lambda e: e.logprob.sum())
