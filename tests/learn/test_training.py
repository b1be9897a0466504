"The optimiser against PyTorch's own; checkpoints that are whole, checked and refused when they should be."
import copy
import errno
import json
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from kat.core.io import UserError
from kat.learn.training import (CheckpointError, MuonAdam, check_adapter, checkpoints, latest_checkpoint, load_model,
                                load_tokenizer, lr_factor, make_optimizer, merged, orthogonalise, save_checkpoint,
                                save_finished, save_weights, write_folder)


def tiny(tie=True):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                        tie_word_embeddings=tie))


def run(optimizer, params, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_each_half_is_pytorchs_own(weight_decay):
    for muon, other, tolerance in ((False, torch.optim.AdamW, 1e-6), (True, torch.optim.Muon, 5e-3)):
        torch.manual_seed(0)
        ours = [torch.nn.Parameter(torch.randn(s)) for s in ((8, 12), (12, 8), (8, 12))]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        kw = {} if muon else {"betas": (0.9, 0.95)}
        run(MuonAdam([{"params": ours, "muon": muon}], lr=0.05, weight_decay=weight_decay), ours, 5)
        run(other(theirs, lr=0.05, weight_decay=weight_decay, **kw), theirs, 5)
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=1e-5)


def test_orthogonalise_flattens_singular_values():
    torch.manual_seed(0)
    for shape in ((2, 16, 40), (1, 40, 16), (3, 20, 20)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.max() < 1.3 and values.median() > 0.6


@pytest.mark.parametrize("tie", [True, False])
def test_only_hidden_matrices_go_to_muon(tie):
    model = tiny(tie)
    adam, muon = make_optimizer(model, 1e-3, 0.02).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in muon["params"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(adam["params"]) + len(muon["params"]) == len(list(model.parameters()))
    assert (adam["lr"], muon["lr"]) == (1e-3, 0.02)
    assert len(make_optimizer(model, 1e-3).param_groups) == 1


def test_optimizer_state_comes_back_exactly(tmp_path):
    straight, model = tiny(), tiny()
    one, two = make_optimizer(straight, 1e-2, 0.02), make_optimizer(model, 1e-2, 0.02)
    run(one, list(straight.parameters()), 3)
    run(two, list(model.parameters()), 3)
    torch.save(two.state_dict(), tmp_path / "o.pt")
    resumed = copy.deepcopy(model)
    three = make_optimizer(resumed, 1e-2, 0.02)
    three.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    run(one, list(straight.parameters()), 3, seed=9)
    run(three, list(resumed.parameters()), 3, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_learning_rate_curve():
    curve = [lr_factor(s, 10, warmup=2, decay=0.4) for s in range(10)]
    assert curve == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [lr_factor(s, 3, decay=0) for s in range(3)] == [1.0] * 3


CALL = {"seed": 1}


def write(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(bytes(range(100)))
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize("name, spoil", [
    ("sub/weights", lambda p: p.write_bytes(p.read_bytes()[:50])),                          # cut off
    ("sub/weights", lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x")),                   # one byte flipped
    ("state.json", lambda p: p.unlink()),
    ("checkpoint.json", lambda p: p.write_text("{")),
    ("checkpoint.json", lambda p: p.unlink()),
])
def test_damage_is_named(tmp_path, name, spoil):
    save_checkpoint(tmp_path, 7, write, CALL)
    assert latest_checkpoint(tmp_path, CALL).name == "checkpoint-7"
    spoil(tmp_path / "checkpoint-7" / name)
    with pytest.raises(CheckpointError, match=f"checkpoint-7/{name}"):
        latest_checkpoint(tmp_path, CALL)


def test_another_runs_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path, 7, write, CALL)
    with pytest.raises(CheckpointError, match="seed: 1 there, 2 here"):
        latest_checkpoint(tmp_path, {"seed": 2})


def test_a_failed_write_leaves_the_old_one(tmp_path):
    save_checkpoint(tmp_path, 7, write, CALL)
    def full(folder):
        write(folder)
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"checkpoint-8: not written \(No space left on device\): make room"):
        save_checkpoint(tmp_path, 8, full, CALL)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-7"]
    assert latest_checkpoint(tmp_path, CALL).name == "checkpoint-7"


def test_a_half_written_folder_is_ignored_and_replaced(tmp_path):
    (tmp_path / ".checkpoint-8.new").mkdir()  # what a killed process leaves
    (tmp_path / ".checkpoint-8.new" / "old").write_text("x")
    assert checkpoints(tmp_path) == [] and latest_checkpoint(tmp_path, CALL) is None
    save_checkpoint(tmp_path, 8, write, CALL)
    assert not (tmp_path / "checkpoint-8" / "old").exists()
    manifest = json.loads((tmp_path / "checkpoint-8" / "checkpoint.json").read_text())
    assert set(manifest["files"]) == {"sub/weights", "state.json"}


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, write, CALL)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for text in "ab":
        write_folder(tmp_path / "m", lambda d: (d / text).write_text(text))
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["b"]


@pytest.mark.parametrize("on", [True, False])
def test_what_is_saved_generates_with_a_cache(tmp_path, on):
    model = tiny()
    model.config.use_cache = model.generation_config.use_cache = on   # as gradient checkpointing leaves it
    save_weights(model, tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path/name).read_text())["use_cache"] is True
    assert model.config.use_cache is on and model.generation_config.use_cache is on


def test_the_base_model_generates_with_a_cache():
    for name in ("config.json", "generation_config.json"):
        assert json.loads((Path(__file__).parents[2]/"data/base"/name).read_text())["use_cache"] is True


# -- no room

def write_much(folder, who):
    if who == "torch":
        torch.save(torch.zeros(200_000), folder / "trainer.pt")
    else:
        save_file({"w": torch.zeros(200_000)}, folder / "w.safetensors")


def told_in_a_child(folder, who) -> str:  # what is said where no file may grow beyond 300 kB, as on a full disk
    said, pid = folder.with_name("said"), os.fork()
    if not pid:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
            save_checkpoint(folder, 1, lambda new: write_much(new, who), {})
        except BaseException as error:
            said.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return said.read_text()


@pytest.mark.parametrize("who", ["torch", "safetensors"])
def test_a_full_disk_is_one_line_whoever_writes(tmp_path, who):
    folder = tmp_path / "run"
    folder.mkdir()
    assert told_in_a_child(folder, who) == (f"UserError: {folder}/checkpoint-1: not written (File too large): "
                                            "make room and run again; what was there stays")
    assert list(folder.iterdir()) == []


def test_other_failures_are_not_called_a_full_disk(tmp_path):
    def broken(folder):
        torch.save(lambda: 0, folder / "x.pt")
    with pytest.raises(Exception, match="pickle") as caught:
        save_checkpoint(tmp_path, 1, broken, CALL)
    assert not isinstance(caught.value, UserError) and list(tmp_path.iterdir()) == []


# -- adapters that are no model

NOISE = torch.Generator().manual_seed(3)


def adapted(tie=True, trained=True, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of ties, where we refuse
        model = get_peft_model(tiny(tie), LoraConfig(r=2, **kw))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and trained:
                p += 0.05 * torch.randn(p.shape, generator=NOISE)
    return model


QV = ["q_proj", "v_proj"]


@pytest.mark.parametrize("kw", [
    dict(target_modules=QV), dict(target_modules="all-linear"), dict(target_modules=QV, use_dora=True),
    dict(target_modules=QV, use_rslora=True), dict(target_modules=QV, modules_to_save=["norm"]),
    dict(target_modules=[*QV, "embed_tokens"], tie=False), dict(target_modules=["lm_head"], tie=False),
    dict(target_modules=QV, modules_to_save=["embed_tokens", "lm_head"], tie=False),
    dict(target_modules=QV, trainable_token_indices=[1, 2]), dict(target_modules=QV, bias="none")], ids=str)
def test_adapters_that_merge_exactly(kw):
    for trained in (False, True):
        model = adapted(trained=trained, **kw)
        modes, before = [m.training for m in model.modules()], [p.clone() for p in model.parameters()]
        state = torch.get_rng_state()
        check_adapter(model, switched_off=True)
        plain, ids = merged(model), torch.arange(12)[None]
        assert torch.equal(state, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        with torch.no_grad():
            torch.testing.assert_close(plain.eval()(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kw, at_merge", [
    (dict(target_modules=[*QV, "embed_tokens"]), "merged exactly: logits of the merged model differ by"),
    (dict(target_modules=["lm_head"]), "merged exactly"),
    (dict(target_modules=["embed_tokens"], use_dora=True), "merged exactly"),
    (dict(target_modules=["embed_tokens", "lm_head"]), "merged exactly|failed"),
    (dict(target_modules=["embed_tokens"], ensure_weight_tying=True), "failed"),
    (dict(target_modules=QV, modules_to_save=["lm_head"]), None),   # merges, but into a model that isn't tied
    (dict(target_modules=QV, modules_to_save=["embed_tokens"]), None)], ids=str)
def test_adapters_that_are_no_model_are_refused(tmp_path, kw, at_merge):
    for trained in (False, True):
        with pytest.raises(ValueError, match="can't be merged exactly|failed|unties") as caught:
            check_adapter(adapted(trained=trained, **kw))
        assert len(str(caught.value).splitlines()) == 1
    if at_merge:
        with pytest.raises(ValueError, match=at_merge):
            merged(adapted(**kw))
        with pytest.raises(ValueError, match=at_merge):
            save_finished(adapted(**kw), None, tmp_path / "m", {}, {})
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_other_model(dtype):
    model = adapted(target_modules="all-linear").to(dtype)
    check_adapter(model)
    merged(model)


def test_a_trained_bias_is_no_reference():
    config = Qwen3Config(vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16, attention_bias=True)
    model = get_peft_model(Qwen3ForCausalLM(config), LoraConfig(r=2, target_modules=QV, bias="all"))
    check_adapter(model)
    with pytest.raises(ValueError, match="KL's reference, but training would change it"):
        check_adapter(model, switched_off=True)


# -- a finished stage

BASE = Path(__file__).parents[2] / "data/base"


@pytest.fixture
def stage(tmp_path):
    save_finished(tiny(), AutoTokenizer.from_pretrained(BASE), tmp_path / "model", CALL, {"steps": 3})
    return tmp_path / "model"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name, spoil", [
    ("model.safetensors", flip), ("model.safetensors", lambda p: os.truncate(p, 1000)), ("config.json", flip),
    ("tokenizer.json", flip), ("training.json", Path.unlink), ("checkpoint.json", Path.unlink),
    ("checkpoint.json", lambda p: p.write_text("[]")), ("checkpoint.json", lambda p: p.write_text('{"files": {}}')),
    ("checkpoint.json", lambda p: p.write_text('{"call": {}, "files": {"config.json": 3}}')),
    ("chat_template.jinja", lambda p: (p.parent / "checkpoint.json").write_text('{"call": {}, "files": {}}')),
    ("adapter_config.json", lambda p: p.write_text("{}")), ("pytorch_model.bin", lambda p: p.write_bytes(b"x"))])
def test_a_finished_stage_is_checked_before_its_weights_are_used(stage, name, spoil):
    assert load_model(stage)[0].num_parameters() and load_tokenizer(stage)
    spoil(stage / name)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=f"model/{name}: .*run its stage again") as caught:
            load(stage)
        assert len(str(caught.value).splitlines()) == 1


def test_a_folder_from_elsewhere_has_no_checksums(tmp_path):
    shutil.copytree(BASE, tmp_path / "base")
    load_model(tmp_path / "base")
