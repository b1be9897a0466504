"TRL's trainers on trees: its own inputs, its own losses, the same loss and gradients."
import numpy as np
import pytest
import torch
from datasets import Dataset
from tree_models import gradients, make
from transformers import AutoTokenizer, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from kat.learn.trl_plugin import TreeGRPOTrainer, TreeSFTTrainer, rows_tree, to_rows
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
