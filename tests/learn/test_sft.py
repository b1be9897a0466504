"Supervised training: learns, keeps documents apart, and resumes to the last bit."
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from kat.core.types import Segment, Trajectory
from kat.compute.logprob import flat_logprobs, pad_rows
from kat.learn.sft import _collate, as_sequences, batch_loss, plan_batches, train_sft
from kat.learn.training import CheckpointError

WORDS = {w: i for i, w in enumerate("<pad> a b c d e f g".split())}
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(WORDS, "<pad>")), pad_token="<pad>")


def tiny(seed=0):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=2, num_key_value_heads=1, head_dim=16, 
                                        max_position_embeddings=64, tie_word_embeddings=True))


def counting(seed=0, n=60):
    rng = np.random.default_rng(seed)
    return [((np.arange(k) + rng.integers(7)) % 7 + 1, np.arange(k) > 0) for k in rng.integers(4, 20, n)]


class Stop(Exception):
    pass


def train(folder, stop=None, hit=None, **kw):
    model, seen = tiny(), []
    def progress(report):
        seen.append(report)
        if report["step"] == stop:
            (hit or _raise)()
    args = dict(max_steps=13, batch_tokens=128, save_every=3) | kw
    return model, train_sft(model, counting(), folder, TOKENIZER, progress=progress, **args), seen


def _raise():
    raise Stop


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, *train(folder)


def test_it_learns_and_reports(straight):
    folder, model, result, seen = straight
    assert [r["step"] for r in seen] == list(range(1, 14))
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]
    assert result["loss"] == pytest.approx(seen[-1]["loss"])
    assert (result["tokens"], result["trained_tokens"]) == (seen[-1]["tokens"], seen[-1]["trained_tokens"])
    assert seen[0]["lr"] == 3e-3 and 0 < seen[-1]["lr"] < 1e-3


def test_the_result_is_an_ordinary_checkpoint(straight):
    folder, model, result, seen = straight
    assert [p.name for p in folder.iterdir()] == ["model"]
    assert same(model, AutoModelForCausalLM.from_pretrained(folder / "model"))
    assert AutoTokenizer.from_pretrained(folder / "model").get_vocab() == WORDS
    assert "forward" not in model.__dict__  # TRL's patch is gone
    fresh = tiny(seed=0)
    assert train_sft(fresh, counting(), folder, TOKENIZER, max_steps=13, batch_tokens=128, save_every=99) == result
    assert same(fresh, model)


@pytest.mark.parametrize("stops", [(13,), (1, 4, 8, 11)])
def test_a_stopped_run_ends_with_the_same_bits(straight, tmp_path, stops):
    for stop in stops:
        with pytest.raises(Stop):
            train(tmp_path, stop)
    model, result, seen = train(tmp_path)
    assert same(model, straight[1]) and result == straight[2]
    assert seen == straight[3][len(straight[3]) - len(seen):]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_killed_process_loses_nothing_finished(straight, tmp_path):
    code = "import os, signal, test_sft as t; t.train({!r}, 8, lambda: os.kill(os.getpid(), signal.SIGKILL))"
    done = subprocess.run([sys.executable, "-c", code.format(str(tmp_path))], cwd=os.path.dirname(__file__),
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    model, result, seen = train(tmp_path)
    assert seen[0]["step"] == 7 and same(model, straight[1]) and result == straight[2]


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, 5)
    file = tmp_path / "checkpoints" / "checkpoint-3" / "trainer" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="checkpoint-3/trainer/model.safetensors: damaged"):
        train(tmp_path)


def test_another_call_is_refused(straight, tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, 5)
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        train(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="data: .* there"):
        train_sft(tiny(), counting(seed=5), straight[0], TOKENIZER, max_steps=13, batch_tokens=128)
    with pytest.raises(CheckpointError, match="start: .* there"):
        train_sft(tiny(seed=3), counting(), straight[0], TOKENIZER, max_steps=13, batch_tokens=128)


def test_a_loss_that_is_no_number_stops_before_saving(tmp_path):
    model = tiny()
    model.model.norm.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="step 1"):
        train_sft(model, counting(), tmp_path, TOKENIZER, max_steps=3, batch_tokens=128, save_every=1)
    assert not list(tmp_path.glob("checkpoints/checkpoint-*"))


def test_only_marked_tokens_are_trained(tmp_path):
    reports = []
    data = [(ids, np.arange(len(ids)) == len(ids) - 1) for ids, _ in counting()]
    kw = dict(max_steps=1, batch_tokens=256, progress=reports.append)
    train_sft(tiny(), data, tmp_path / "a", TOKENIZER, **kw)
    train_sft(tiny(), data, tmp_path / "b", TOKENIZER, all_tokens=True, **kw)
    one, every = reports
    assert one["tokens"] == every["tokens"] and every["trained_tokens"] == every["tokens"] - one["trained_tokens"]
    plan = plan_batches([len(i) for i, _ in data], 256, 1, 0)[0]
    model, rows = tiny(), [data[i][0] for i in plan]
    logps = [torch.log_softmax(model(torch.from_numpy(r)[None]).logits[0, -2].float(), -1)[r[-1]] for r in rows]
    assert one["loss"] == pytest.approx(-torch.stack(logps).mean().item(), abs=0.02)  # bfloat16 against float32
    assert len(plan) == one["trained_tokens"]


def test_trajectories_and_pairs_are_the_same():
    t = Trajectory("t", [Segment([1, 2], "user"), Segment([3, 4], "assistant", trainable=True),
                         Segment([5], "tool_result")])
    (a, m), = as_sequences([t])
    (b, n), = as_sequences([([1, 2, 3, 4, 5], [0, 0, 1, 1, 0])])
    assert a.tolist() == b.tolist() and m.tolist() == n.tolist()
    batch = _collate([(a, m), (b[:2], ~n[:2])], [[0, 1]])([{"step": 0}])
    assert batch["labels"].tolist() == [[False, False, True, True, False], [True, True, False, False, False]]


@pytest.mark.parametrize("data, message", [
    ([([1, 2], [1, 1]), ([1], [1])], "sequence 1: 1 tokens"),
    ([([1, 2, 3], [1, 1])], "sequence 0"),
    ([([1, 2, 3], [1, 0, 0])], "no token to train on"),
])
def test_bad_sequences_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        as_sequences(data)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 50), min_size=1, max_size=80), st.integers(50, 200), st.integers(1, 30),
       st.integers(0, 3))
def test_a_plan_visits_everything_once_an_epoch(lengths, budget, steps, seed):
    plan = plan_batches(lengths, budget, steps, seed)
    assert plan == plan_batches(lengths, budget, steps, seed) and len(plan) == steps
    assert all(len(b) * max(lengths[i] for i in b) <= budget for b in plan)
    longer = plan_batches(lengths, budget, steps + 5, seed)
    assert longer[:steps] == plan
    seen = []
    for batch in longer:
        seen += batch
        if len(seen) >= len(lengths): break
    assert len(set(seen)) == len(seen) or len(seen) > len(lengths)
    if len(seen) == len(lengths):
        assert sorted(seen) == list(range(len(lengths)))


def test_training_json_is_read_back(straight):
    assert json.loads((straight[0] / "model" / "training.json").read_text()) == straight[2]


def test_the_loss_of_rows_that_branch_is_that_of_the_rows():
    from tree_models import make
    model, rng = make("qwen3"), np.random.default_rng(0)
    base = rng.integers(0, 23, 9).astype(np.int32)
    branch = lambda n, more: np.concatenate([base[:n], rng.integers(0, 23, more).astype(np.int32)])
    rows = [branch(9, 4), branch(9, 4), branch(5, 6), branch(3, 2), base[:6]]
    masks = [rng.random(len(row)) < 0.6 for row in rows]
    inputs = dict(input_ids=pad_rows(rows), attention_mask=pad_rows([row >= 0 for row in rows], False),
                  labels=pad_rows(masks, False))
    loss, entropy = batch_loss(model, inputs)
    loss.backward()
    have = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    logps, h = flat_logprobs(model, inputs["input_ids"].long(), inputs["labels"])
    (-logps.mean()).backward()
    torch.testing.assert_close(loss, -logps.mean(), atol=1e-10, rtol=0)
    torch.testing.assert_close(entropy, h.mean(), atol=1e-10, rtol=0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(have[n], p.grad, atol=1e-9, rtol=1e-7)
