"The gradient is that of the loss, whatever draws random numbers or runs layers twice; what can't be so is refused."
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from tree_models import gradients, make, sequences, worst

from kat.compute.engine import TreeEngine
from kat.compute.forward import check_training
from kat.compute.logprob import tree_logprobs
from kat.tree.trie import TokenTree

TREE = TokenTree.from_sequences([[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9], [1, 2, 3, 7, 5], [4, 4, 4]])
FEW = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


class Dropout(torch.nn.Module):
    "After any module."
    def __init__(self, inner, p=0.2):
        super().__init__()
        self.inner, self.dropout = inner, torch.nn.Dropout(p)

    def forward(self, *args, **kwargs):
        return self.dropout(self.inner(*args, **kwargs))


def lora(model):
    from peft import LoraConfig, get_peft_model
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=["k_proj", "v_proj"], lora_dropout=0.1))


def on_embeddings(model):
    drop = torch.nn.Dropout(0.2)
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: drop(out) if module.training else out)
    return model


def in_layers(model):
    for layer in model.model.layers:
        layer.mlp = Dropout(layer.mlp)
    return model


def with_jitter(model):  # noise that isn't dropout
    hook = lambda module, args, out: out * (1 + 0.1 * torch.rand_like(out)) if module.training else out
    model.model.layers[0].mlp.register_forward_hook(hook)
    return model


NOISE = dict(lora=lora, on_embeddings=on_embeddings, in_layers=in_layers, with_jitter=with_jitter)
WAYS = [dict(), dict(max_tokens=3), dict(max_tokens=3, recompute=False), dict(recompute=True), dict(max_tokens=1)]


def slopes(model, tree, whole_paths=False, **how):
    "The gradient's slope along a random direction, and the loss's own by finite differences, at one random state."
    draw = torch.Generator().manual_seed(3)
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    along = [torch.randn(p.shape, generator=draw).double() for p in params]
    engine = TreeEngine(model, **how)
    def loss(edges):
        return -edges.logprob.sum() if not whole_paths else (edges.logprob * 0.1).exp().sum()
    def at(step):
        with torch.no_grad():
            for p, d in zip(params, along):
                p.add_(step * d)
        model.zero_grad()
        torch.manual_seed(5)
        value = float(engine.forward_backward(tree, loss, whole_paths=whole_paths))
        slope = sum(float((p.grad * d).sum()) for p, d in zip(params, along) if p.grad is not None)
        with torch.no_grad():
            for p, d in zip(params, along):
                p.sub_(step * d)
        return value, slope
    return at(0)[1], (at(1e-5)[0] - at(-1e-5)[0]) / 2e-5


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("noise", NOISE)
def test_with_noise_the_gradient_is_that_of_the_loss(noise, how, checkpointed):
    model = NOISE[noise](make("llama")).double().train()
    if checkpointed:
        (model.get_base_model() if noise == "lora" else model).activation_checkpointing_enable()
    have, want = slopes(model, TREE, **how)
    assert have == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_with_noise_and_losses_of_whole_paths(how):
    have, want = slopes(in_layers(make("llama")).train(), TREE, whole_paths=True, **how)
    assert have == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_with_noise_and_a_loss_of_routers(how):
    "The counts of what routers choose are those of the forward whose gradient is taken."
    have, want = slopes(on_embeddings(make("qwen3moe")).train(), TREE, router_coef=0.5, **how)
    assert have == pytest.approx(want, rel=1e-4)


@FEW
@given(seqs=sequences(), size=st.integers(1, 9))
def test_with_noise_on_any_tree(seqs, size):
    tree = TokenTree.from_sequences(seqs)
    have, want = slopes(in_layers(make("llama")).train(), tree, max_tokens=size)
    assert have == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_the_random_state_afterwards_is_as_after_one_forward_of_each_pack():
    model = in_layers(make("llama")).train()
    after = []
    for recompute in (False, True):
        torch.manual_seed(1)
        TreeEngine(model, recompute=recompute).forward_backward(TREE, lambda e: e.logprob.sum())
        after.append(torch.rand(3))
    assert torch.equal(*after)


@pytest.mark.parametrize("size", [None, 3])
def test_pullback_is_the_backward_of_forward_backward(size):
    model = make("qwen3moe")
    weight = torch.randn(len(TREE), generator=torch.Generator().manual_seed(0)).double()
    engine = TreeEngine(model, size, router_coef=0.1)
    engine.forward_backward(TREE, lambda e: (weight[e.index] * (e.logprob + e.entropy)).sum())
    want = gradients(model)
    edges, back = engine.pullback(TREE)
    assert not edges.logprob.requires_grad and len(edges) == len(TREE) - 2
    for _ in range(2):  # as often as one likes
        back(weight[edges.index], weight[edges.index], None)
        assert worst(want, gradients(model)) < 1e-9


@pytest.mark.parametrize("how", [dict(preserve_rng_state=False), dict(checkpoint_impl=CheckpointImpl.REENTRANT)])
def test_checkpoint_wrappers_that_draw_anew_are_refused_too(how):
    model = make("llama").train()
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1], **how)
    with pytest.raises(ValueError, match="activation checkpointing with"):
        check_training(model)
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1]._checkpoint_wrapped_module)
    check_training(model)
    check_training(model.eval())


@pytest.mark.parametrize("how", [dict(use_reentrant=True), dict(use_reentrant=False, preserve_rng_state=False)],
                         ids=str)
def test_checkpointing_that_would_lose_gradients_or_masks_is_refused(how):
    model = make("llama").train()
    model.activation_checkpointing_enable(how)
    for size in (None, 3):
        with pytest.raises(ValueError, match="activation checkpointing with"):
            TreeEngine(model, size).forward_backward(TREE, lambda e: e.logprob.sum())
    model.eval()  # nothing is checkpointed
    TreeEngine(model, 3).forward_backward(TREE, lambda e: e.logprob.sum())


def test_reentrant_checkpointing_by_hand_is_refused():
    from torch.utils.checkpoint import checkpoint
    model = make("llama").train()
    for layer in model.model.layers:
        whole = layer.forward
        layer.forward = lambda x, whole=whole, **more: checkpoint(
            lambda x: whole(x, **more), x, use_reentrant=True)
    with pytest.raises(ValueError, match="reentrant checkpointing"):
        TreeEngine(model, 3).forward_backward(TREE, lambda e: e.logprob.sum())


def test_neftune_and_attention_dropout_are_refused():
    from transformers.integrations.neftune import activate_neftune
    model = make("llama").train()
    hook = activate_neftune(model, 5.0)
    for call in (lambda: TreeEngine(model).logprobs(TREE), lambda: tree_logprobs(model, TREE)):
        with pytest.raises(ValueError, match="neftune_noise_alpha"):
            call()
    hook.remove()
    model = make("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        TreeEngine(model).forward_backward(TREE, lambda e: e.logprob.sum())


# --- losses and settings

BAD_LOSSES = {
    "detached": (lambda e: e.logprob.detach().sum(), ValueError, "doesn't depend on the edges"),
    "a constant": (lambda e: torch.zeros(()), ValueError, "doesn't depend on the edges"),
    "NaN": (lambda e: e.logprob.sum() * float("nan"), FloatingPointError, "the loss is nan"),
    "infinite": (lambda e: -e.logprob.sum() / 0, FloatingPointError, "the loss is inf"),
    "a vector": (lambda e: e.logprob, ValueError, "must return a scalar"),
    "a number": (lambda e: float(e.logprob.sum()), ValueError, "must return a scalar"),
    "nothing": (lambda e: None, ValueError, "must return a scalar"),
}


@pytest.mark.parametrize("whole_paths", [False, True])
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("kind", BAD_LOSSES)
def test_a_loss_that_would_train_nothing_or_nonsense_is_an_error(kind, size, whole_paths):
    loss, error, said = BAD_LOSSES[kind]
    model = make("llama")
    with pytest.raises(error, match=said):
        TreeEngine(model, size).forward_backward(TREE, loss, whole_paths=whole_paths)


def test_a_frozen_model_is_an_error():
    model = make("llama").requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        TreeEngine(model).forward_backward(TREE, lambda e: e.logprob.sum())


@pytest.mark.parametrize("score", [np.ones(len(TREE), int), np.ones(len(TREE)), [1] * len(TREE), torch.ones(len(TREE)),
                                   np.arange(3), ["x"] * len(TREE), np.ones((len(TREE), 1), bool), [], True])
def test_only_a_mask_is_a_score(score):
    model = make("llama")
    for call in (lambda: TreeEngine(model).forward_backward(TREE, lambda e: e.logprob.sum(), score),
                 lambda: TreeEngine(model).logprobs(TREE, score), lambda: tree_logprobs(model, TREE, score=score)):
        with pytest.raises(ValueError, match="score"):
            call()


@pytest.mark.parametrize("size", [2.5, 3.0, True, "8", 0, -1, float("nan"), [4]])
def test_only_a_whole_number_is_a_size_of_packs(size):
    model = make("llama")
    for call in (lambda: TreeEngine(model, max_tokens=size), lambda: tree_logprobs(model, TREE, max_tokens=size)):
        with pytest.raises(ValueError, match="max_tokens"):
            call()


def test_masks_and_sizes_of_any_library_are_taken():
    model, some = make("llama"), np.arange(len(TREE)) % 2 == 0
    for mask in (some, some.tolist(), torch.from_numpy(some)):
        for size in (np.int64(4), 4):
            assert len(TreeEngine(model, size).logprobs(TREE, mask)) == (some & (TREE.prev >= 0)).sum()
