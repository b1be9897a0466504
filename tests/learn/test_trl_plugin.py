"TRL's trainers on trees: its own inputs, its own losses, the same loss and gradients."
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tree_models import gradients, make
from transformers import AutoTokenizer, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from kat.learn.trl_plugin import TreeGRPOTrainer, TreeSFTTrainer, rows_tree, to_rows, tree_scores
from kat.recipe.pipeline import ROOT

TOK = AutoTokenizer.from_pretrained(ROOT / "data/base")


def model_of(kind="qwen3"):
    from tree_models import SMALL
    before = dict(SMALL)
    SMALL.update(vocab_size=len(TOK))
    try:
        model = make(kind, torch.float32, noise=0.05)
    finally:
        SMALL.clear(), SMALL.update(before)
    model.config.pad_token_id = model.generation_config.pad_token_id = TOK.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = TOK.eos_token_id
    return model


def grpo(cls, tmp_path, model=None, more=None, **config):
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1,
                        num_generations=4, max_completion_length=8, save_strategy="no", disable_tqdm=True,
                        **{"per_device_train_batch_size": 8, **config})
    def reward(completion_ids, **kwargs):
        return [float(sum(i % 7 for i in ids)) for ids in completion_ids]
    data = Dataset.from_dict({"prompt": ["def add(a, b):", "x", "return a + b", "y = 1"]})
    if model is None:  # from a folder: with KL, TRL loads its reference from there
        model_of().save_pretrained(tmp_path / "start")
        model = Qwen3ForCausalLM.from_pretrained(tmp_path / "start")
    return cls(model, reward_funcs=reward, args=config, train_dataset=data, processing_class=TOK, **(more or {}))


LOSSES = [
    dict(loss_type="grpo"), dict(loss_type="dr_grpo"), dict(loss_type="dapo", epsilon_high=0.28),
    dict(loss_type="bnpo"), dict(loss_type="cispo", epsilon_high=5.0),
    dict(loss_type="grpo", importance_sampling_level="sequence"),
    dict(loss_type="dapo", entropy_coef=0.05, temperature=0.7),
    dict(loss_type="grpo", beta=0.1), dict(loss_type="dapo", top_entropy_quantile=0.5)]


@pytest.mark.parametrize("config", LOSSES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_every_loss_of_trl_has_the_same_value_and_gradients(config, tmp_path):
    plain = grpo(GRPOTrainer, tmp_path, **config)
    model = plain.model.train()
    plain.current_gradient_accumulation_steps = 1
    batch = next(iter(plain.get_train_dataloader()))
    inputs = plain._prepare_inputs(batch)
    if "ref_per_token_logps" in inputs:
        inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] - 0.1  # else KL is 0
    noise = torch.randn_like(inputs["completion_ids"], dtype=torch.float32)
    inputs["old_per_token_logps"] = noise * 0.1 - 7.3  # ratios away from 1
    want = plain.compute_loss(model, inputs)
    want.backward()
    truth = gradients(model)
    for size in (None, 12):
        tree = grpo(TreeGRPOTrainer, tmp_path, model, dict(tree_max_tokens=size), **config)
        tree.current_gradient_accumulation_steps = 1
        loss = tree.compute_loss(model, inputs)
        loss.backward()
        torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
        have = gradients(model)
        norm = sum(g.norm() ** 2 for g in truth.values()) ** 0.5
        assert sum((truth[n] - have[n]).norm() ** 2 for n in truth) ** 0.5 < 2e-5 * norm + 1e-7, size


def test_groups_stay_together(tmp_path):
    trainer = grpo(TreeGRPOTrainer, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    trainer.model.train()
    trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    for part in trainer._buffered_inputs:
        assert len({tuple(r.tolist()) for r in part["prompt_ids"]}) == 1 and len(part["prompt_ids"]) == 4


def test_training_with_packs_and_checkpointing(tmp_path):
    trainer = grpo(TreeGRPOTrainer, tmp_path, more=dict(tree_max_tokens=16), gradient_checkpointing=True,
                   learning_rate=1e-2)
    before = [p.clone() for p in trainer.model.parameters()]
    assert np.isfinite(trainer.train().training_loss)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def sft(cls, tmp_path, model, **more):
    texts = ["def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b", "def add(a):", "x = 1"]
    rows = [TOK(t)["input_ids"] for t in texts]
    labels = [[-100 if i % 3 == 0 else token for i, token in enumerate(row)] for row in rows]
    data = Dataset.from_dict({"input_ids": rows, "labels": labels})
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=2,
                       per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no",
                       disable_tqdm=True, learning_rate=1e-2, lr_scheduler_type="constant",
                       gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, optim="sgd")
    trainer = cls(model, args=config, train_dataset=data, processing_class=TOK, **more)
    return trainer.train().training_loss, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("size", [None, 8])
def test_sft_trains_the_same_weights(size, tmp_path):
    want_loss, want = sft(SFTTrainer, tmp_path, model_of())
    loss, have = sft(TreeSFTTrainer, tmp_path, model_of(), tree_max_tokens=size)
    assert abs(loss - want_loss) < 1e-5
    for a, b in zip(want, have):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_what_trees_do_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="packing"):
        config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], packing=True,
                           max_length=32)
        data = Dataset.from_dict({"text": ["a b c"] * 4})
        TreeSFTTrainer(model_of(), args=config, train_dataset=data, processing_class=TOK)
    with pytest.raises(ValueError, match="row 1 of the batch is all padding"):
        rows_tree(torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_rows_and_back():
    ids = torch.tensor([[0, 5, 6, 7], [5, 6, 9, 0]])
    tree, at = rows_tree(ids, (ids > 0).long())
    assert torch.equal(to_rows(torch.as_tensor(tree.ids), at), ids.to(torch.int32))


def moe(**more):
    config = Qwen3MoeConfig(vocab_size=len(TOK), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
                            num_experts_per_tok=2, moe_intermediate_size=16, pad_token_id=TOK.pad_token_id,
                            eos_token_id=TOK.eos_token_id)
    return Qwen3MoeForCausalLM(config)


def sft_trainer(cls, tmp_path, model, more=None, **config):
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [5, 6, 9]], "labels": [[-100, 6, 7, 8], [-100, -100, 9]]})
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=1, save_strategy="no",
                     disable_tqdm=True, gradient_checkpointing=False, optim="sgd",
                     dataset_kwargs={"skip_prepare_dataset": True}, **config)
    return cls(model, args=args, train_dataset=data, processing_class=TOK, **(more or {}))


OUTSIDE = {
    "auxiliary loss": lambda: (moe(), {}, {}),  # on by default
    "label_smoothing_factor": lambda: (model_of(), dict(label_smoothing_factor=0.1), {}),
    "neftune_noise_alpha": lambda: (model_of(), dict(neftune_noise_alpha=5.0), {}),
    "compute_loss_func": lambda: (model_of(), {}, dict(compute_loss_func=lambda out, *labels, **more: out.loss)),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_what_trl_adds_outside_the_log_probs_is_refused(what, tmp_path):
    model, config, more = OUTSIDE[what]()
    with pytest.raises(ValueError, match=what):
        sft_trainer(TreeSFTTrainer, tmp_path, model, more, **config)


def test_an_auxiliary_loss_can_be_switched_off(tmp_path):
    "And then the step is TRL's."
    weights = []
    for cls in (SFTTrainer, TreeSFTTrainer):
        torch.manual_seed(0)
        model = moe()
        sft_trainer(cls, tmp_path, model, router_aux_loss_coef=0.0, learning_rate=0.1).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-5)


def test_a_batch_without_labels_trains_nothing(tmp_path):
    trainer = sft_trainer(TreeSFTTrainer, tmp_path, model_of())
    ids = torch.tensor([[5, 6, 7]])
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.full_like(ids, -100))
    assert trainer.compute_loss(trainer.model, batch) == 0
    with pytest.raises(ValueError, match="pixel_values"):
        trainer.compute_loss(trainer.model, batch | dict(pixel_values=ids))


TWO = """
import sys, torch, torch.distributed as dist
import test_trl_plugin as own
kind, folder = sys.argv[1], own.Path(sys.argv[2])
try:
    if kind == "sft":
        own.sft_trainer(own.TreeSFTTrainer, folder, own.model_of())
    else:
        own.grpo(own.TreeGRPOTrainer, folder, own.model_of(), per_device_train_batch_size=4)
except ValueError as e:
    print("said:", e)
"""


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_two_processes_are_refused(kind, tmp_path):
    "Real ones: gradients would go past the wrapper that synchronises them."
    here = Path(__file__)
    path = [here.parents[2], here.parent, here.parents[1] / "helpers", os.environ.get("PYTHONPATH", "")]
    ranks = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in "01":
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, path)), RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
                                ACCELERATE_USE_CPU="true")
        ranks.append(subprocess.Popen([sys.executable, "-c", TWO, kind, tmp_path], env=env, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        said = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all("said: trees don't know several processes" in text for text in said), said[0][-2000:] + said[1][-2000:]


def test_adapters_with_virtual_tokens_are_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model
    model = get_peft_model(model_of(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    trainer = sft_trainer(TreeSFTTrainer, tmp_path, model)
    with pytest.raises(ValueError, match="virtual tokens"):
        trainer.train()


def test_dropout_in_several_packs_has_the_gradient_of_the_loss_it_reports(tmp_path):
    "Both passes draw the same: two runs from one random state differ by the step only, as finite differences say."
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, init_lora_weights=False)
    model = get_peft_model(make("qwen3"), config).double().train()
    tree = rows_tree(torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 4, 3]]), torch.ones(2, 5))[0]
    params = [p for p in model.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(0)
    along = [torch.randn(p.shape, generator=draw).double() for p in params]
    def value(step):
        with torch.no_grad():
            for p, d in zip(params, along):
                p.add_(step * d)
        torch.manual_seed(1)
        out = tree_scores(model, tree, np.ones(len(tree), bool), 1.0, 3)[0].sum()
        with torch.no_grad():
            for p, d in zip(params, along):
                p.sub_(step * d)
        return out
    want = (value(1e-5) - value(-1e-5)).item() / 2e-5
    value(0.0).backward()
    have = sum((p.grad * d).sum() for p, d in zip(params, along)).item()
    assert have == pytest.approx(want, rel=1e-5)
