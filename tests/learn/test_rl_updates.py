"Several updates a batch, adapters, waves that wait, what doesn't combine, and a trainer that is killed anywhere."
import json
import os
import signal
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rl_world import all_gradients, groups, rows_of, score, tiny, trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kat.core.types import Trajectory
from kat.infer.engines import HFEngine
from kat.infer.requests import Request
from kat.learn.advantage import group_advantages
from kat.learn.objective import Objective
from kat.learn.rft import savings
from kat.learn.rl import RLTrainer, accumulate, prepare, recorded_exactly
from kat.learn.training import has_adapter, lr_factor, make_optimizer, merged, weights_checksum
from kat.recipe.rollouts import turn_facts
from kat.tree.prune import Pruning


def lora(seed=0, **kw):  # a model and its wrapper
    model = tiny(seed)
    torch.manual_seed(5)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], **kw))


def base(model):
    return model.get_base_model() if has_adapter(model) else model


def with_records(model, batch, version=0):  # entropies and versions, as the embedded engine leaves them
    for g in batch:
        for t in g.trajectories:
            with torch.no_grad():
                p = torch.log_softmax(base(model)(torch.from_numpy(np.int64(t.ids))[None]).logits[0].float(), -1)
            entropy, a = np.concatenate([[0], -(p.exp() * p).sum(-1)[:-1].numpy()]).astype(np.float32), 0
            for s in t.segments:
                if s.trainable:
                    s.entropy, s.version = entropy[a:a + len(s)], np.full(len(s), version, np.int32)
                a += len(s)
    return batch


# -- several updates a batch

def by_hand(model, batch, objective, epochs, parts, lr, warmup):  # plain forwards, one sequence at a time
    optimizer, made = make_optimizer(model, lr), 0
    advantages = group_advantages([[t.reward for t in g.trajectories] for g in batch])[0]
    pieces = [[(t, a) for i in part for t, a in zip(batch[i].trajectories, advantages[i])] for part in parts]
    new = lambda t: score(model, t.ids)[torch.from_numpy(t.mask[1:])]
    with torch.no_grad():
        old = {id(t): np.concatenate([[0], score(model, t.ids).numpy()]) for piece in pieces for t, _ in piece}
    for _ in range(epochs):
        for piece in pieces:
            masks, own = [t.mask for t, _ in piece], [advantage for _, advantage in piece]
            loss = objective.prepare_flat(masks, own, old=[old[id(t)] for t, _ in piece])
            optimizer.zero_grad()
            loss([new(t) for t, _ in piece]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for g in optimizer.param_groups:
                g["lr"] = lr * lr_factor(made, 1, warmup, decay=0)
            optimizer.step()
            made += 1


@pytest.mark.parametrize("objective", [Objective("ppo"), Objective("gspo"), Objective("cispo")], ids=lambda o: o.loss)
def test_minibatches_and_epochs_against_the_formula(tmp_path, objective):
    one, two = tiny(), tiny()
    batch = groups(one, 0, 3, (1.0, 0.0, 0.25))
    m = trainer(one, tmp_path, objective=objective, epochs=3, minibatches=2, warmup=2, lr=3e-3).step(batch)
    order = np.random.default_rng(0).permutation(3)
    by_hand(two, batch, objective, 3, np.array_split(order, 2), 3e-3, 2)
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3, msg=name)
    assert not torch.equal(one.model.norm.weight, tiny().model.norm.weight)
    assert (m["version"], m["updates"]) == (1, 6)
    assert m["clipped"] > 0 or objective.loss == "cispo"  # whose ratio is cut at 5 only


def test_the_first_update_of_a_batch_clips_nothing(tmp_path):
    model = tiny()
    t = trainer(model, tmp_path, lr=3e-2)
    assert [t.step(groups(model, i))["clipped"] for i in range(2)] == [0, 0]


def test_a_batch_with_fewer_live_groups_than_minibatches(tmp_path):
    model = tiny()
    batch = groups(model, 0, 1) + groups(model, 1, 2, (1.0, 1.0))
    assert trainer(model, tmp_path, minibatches=3).step(batch)["updates"] == 1


def test_warm_up_counts_updates_and_long_gradients_are_scaled_down(tmp_path):
    model, seen = tiny(), []
    t = trainer(model, tmp_path, epochs=2, warmup=3, lr=1.0, max_grad_norm=1e-3)
    rate = lambda: t.optimizer.param_groups[0]["lr"]
    t.optimizer.step = lambda: seen.append((rate(), all_gradients(model).norm().item()))
    norms = [t.step(groups(model, i))["grad_norm"] for i in range(3)]
    assert [lr for lr, _ in seen] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert min(norms) > 1e-2 and [n for _, n in seen] == pytest.approx([1e-3] * 6, rel=1e-3)


# -- adapters

def test_only_the_adapter_is_trained(tmp_path):
    model = lora()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    t = trainer(model, tmp_path)
    for i in range(2):
        t.step(groups(base(model), i))   # the first update moves one factor only: the other's gradient is 0
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora" in n}


def test_adapter_gradients_by_hand():
    model = lora()
    for p in (p for n, p in model.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(p, std=0.2)
    rows = rows_of(groups(base(model), 0, 2, (1.0, 0.0)), (0.5, -0.5))
    accumulate(model, rows, Objective(), 16)
    n, names = sum(r.mask.sum() for r in rows), [k for k, p in model.named_parameters() if p.requires_grad]
    new = lambda row: score(base(model), row.trajectory.ids)[torch.from_numpy(row.mask[1:])]
    loss = -sum(row.advantage / n * new(row).sum() for row in rows)
    own = dict(model.named_parameters())
    for k, want in zip(names, torch.autograd.grad(loss, [own[k] for k in names])):
        torch.testing.assert_close(own[k].grad, want, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for k, p in own.items() if k not in names)


def test_an_engine_takes_the_merged_weights_and_the_trained_ones_stay(tmp_path):
    plain = tiny()
    engine = HFEngine(plain, max_len=64, slots=2)
    model, sums = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])), []
    def publish(m, version):
        assert not has_adapter(m)
        engine.update_weights(m, version)
        sums.append(weights_checksum(model))
    t = trainer(model, tmp_path, publish=publish, lr=0.05)
    before = weights_checksum(model)
    t.step(groups(plain, 0))
    assert engine.version == 1 and sums[0] == before and sums[1] == weights_checksum(model) != before
    done = engine.generate([Request(np.array([1, 2, 3]), 6, seed=0)])[0]
    engine.close()
    with torch.no_grad():
        own = score(base(model), np.concatenate([[1, 2, 3], done.ids]))[2:]
    np.testing.assert_allclose(done.logprobs, own.numpy(), atol=1e-5)
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(score(base(model), np.concatenate([[1, 2, 3], done.ids]))[2:], own, atol=1e-4)


def test_checkpoints_hold_the_adapter_and_the_end_holds_both(tmp_path):
    model = lora()
    t = trainer(model, tmp_path, save_every=1)
    t.step(groups(base(model), 0))
    t.save()
    folder = tmp_path / "checkpoints/checkpoint-1"
    held = {k for f in folder.glob("*.safetensors") for k in load_file(f)}
    assert held and all("lora" in k for k in held)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = torch.load(folder / "trainer.pt", weights_only=True)["optimizer"]["state"]
    assert sum(s["mean"].numel() for s in state.values()) == adapter
    t.train(iter([]), 1)
    assert weights_checksum(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) == weights_checksum(merged(model))
    again = PeftModel.from_pretrained(tiny(), tmp_path / "model/adapter")
    assert weights_checksum(merged(again)) == weights_checksum(merged(model))


def test_a_fresh_adapter_of_another_seed_resumes_and_another_rank_is_refused(tmp_path):
    model = lora()
    t = trainer(model, tmp_path)
    t.step(groups(base(model), 0))
    t.save()
    torch.manual_seed(99)
    other = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert trainer(other, tmp_path).version == 1 and weights_checksum(other) == weights_checksum(model)
    with pytest.raises(ValueError, match="adapter: "):
        trainer(get_peft_model(tiny(), LoraConfig(r=3, target_modules=["q_proj"])), tmp_path)
    with pytest.raises(ValueError, match="start: "):
        trainer(lora(seed=1), tmp_path)


# -- waves that wait, groups too old

def test_a_wave_is_used_up_before_the_next_one_is_asked_for(tmp_path):
    model, asked = tiny(), []
    def waves():
        for i in range(9):
            asked.append(t.version)
            yield groups(model, i, 3)
    t = trainer(model, tmp_path, groups_per_step=2)
    t.train(waves(), 4)
    assert asked == [0, 1, 3] and t.groups_used == 8  # 3, 6 and 9 groups for 2, 4, 6 and 8


def test_what_waits_is_in_the_checkpoint(tmp_path):
    model = tiny()
    t = trainer(model, tmp_path, groups_per_step=2, save_every=1, fill=2)
    class Stop(Exception):
        pass
    def stop(m):
        raise Stop
    with pytest.raises(Stop):
        t.train((groups(model, i, 3) for i in range(9)), 5, stop)
    t.save()
    again = trainer(tiny(), tmp_path, groups_per_step=2, save_every=1, fill=2)
    assert (again.groups_seen, again.groups_used, len(again.waiting)) == (3, 2, 1) and again.waiting == t.waiting


def test_groups_that_are_too_old_are_replaced(tmp_path):
    model = tiny()
    batch = with_records(model, groups(model, 0, 6), version=5)
    for g in batch[:2]:
        with_records(model, [g], version=1)
    t, seen = trainer(model, tmp_path, max_staleness=2, fill=2), []
    t.version = 5
    t.train(iter(batch), 6, seen.append)
    assert [(m["live_groups"], m["stale_groups"], m["groups"]) for m in seen] == [(3, 2, 5)]


def test_overlong_trajectories_are_masked_before_groups_are_judged(tmp_path):
    model = tiny()
    batch = groups(model, 0, 2)
    longest = max(len(x) for x in batch[0].trajectories)
    for x in batch[0].trajectories:
        x.reward = float(len(x) < longest)   # without the longest all are alike
    many = sum(len(x) >= longest for g in batch for x in g.trajectories)
    assert trainer(model, tmp_path / "a").step(batch)["live_groups"] == 2
    m = trainer(model, tmp_path / "b", overlong=longest - 1).step(batch)
    assert m["masked_overlong"] == m["masked"] == many and m["live_groups"] == 1


# -- pruning by the engine's record

def without_entropies(batch):  # as vLLM leaves them
    for g in batch:
        for t in g.trajectories:
            for s in t.segments:
                s.entropy = None
    return batch


@pytest.mark.parametrize("policy", ["gradient", "entropy", "random"])
def test_pruning_by_exact_records_is_pruning_by_computed_numbers(policy):
    model = tiny()
    rows = rows_of(with_records(model, groups(model, 1)), (0.5, -0.5, -0.5, 0.5))
    def run(**options):
        model.zero_grad()
        metrics = accumulate(model, rows, Objective(tis=2.0), 32, budget=0.5, pruning=Pruning(policy), **options)
        return metrics, all_gradients(model)
    (one, computed), (two, recorded) = run(), run(recorded=True)
    torch.testing.assert_close(computed, recorded, atol=1e-7, rtol=1e-4)
    assert (one.pop("by_record"), two.pop("by_record")) == (0, 1) and one == pytest.approx(two, abs=1e-5)


def test_a_record_counts_under_the_same_weights_only(tmp_path):
    model = tiny()
    rows = lambda version: rows_of(with_records(model, groups(model, 0), version), [1.0] * 4)
    assert recorded_exactly(rows(3), 3) and not recorded_exactly(rows(2), 3)
    assert not recorded_exactly(rows_of(groups(model, 0), [1.0] * 4), 0)  # no versions
    t = trainer(model, tmp_path, budget=0.5)
    assert [t.step(with_records(model, groups(model, i), v))["by_record"] for i, v in enumerate((0, 0, 2))] == [1, 0, 1]


@pytest.mark.parametrize("policy, enough", [
    ("gradient", True), ("advantage", True), ("random", True), ("entropy", False), ("density", False)])
def test_an_engine_without_entropies_is_enough_for_policies_that_read_none(tmp_path, policy, enough):
    model = tiny()
    batch = without_entropies(with_records(model, groups(model, 0)))
    assert recorded_exactly(rows_of(batch, [1.0] * 4), 0, Pruning(policy)) == enough
    m = trainer(model, tmp_path, budget=0.5, pruning=Pruning(policy)).step(batch)
    assert m["by_record"] == enough and ("entropy" in m) == ("kept_entropy" in m) == (not enough)


def test_entropies_recorded_for_some_trajectories_only(tmp_path):
    "As where ground truths stand in the groups. What only one of two minibatches knows isn't logged."
    model, other = tiny(), tiny()
    batch = with_records(model, groups(model, 0, 2))
    for t in batch[1].trajectories[:2]:
        for s in t.segments:
            s.entropy = None
    m = trainer(model, tmp_path / "a", budget=0.5, minibatches=2).step(batch)
    assert m["by_record"] == 1 and "entropy" not in m and "kept_entropy" not in m and m["kept_cost"] <= 0.5
    assert trainer(other, tmp_path / "b", budget=0.5, pruning=Pruning("entropy")).step(batch)["by_record"] == 0


def test_only_what_is_kept_is_computed_when_the_record_is_exact():
    model = tiny()
    rows = rows_of(with_records(model, groups(model, 1)), (0.5, -0.5, -0.5, 0.5))
    run = []
    def count(module, args, inputs):
        ids = inputs.get("input_ids")
        run.append((inputs["inputs_embeds"] if ids is None else ids).shape[1])
    model.model.register_forward_pre_hook(count, with_kwargs=True)
    tokens = []
    for recorded in (False, True):
        run.clear()
        prepare(model, rows, Objective(tis=2.0), budget=0.3, recorded=recorded)
        tokens.append(sum(run))
    assert 0 < tokens[1] < 0.6 * tokens[0]


def test_equal_rollouts_with_different_rewards_do_not_end_a_run_with_a_budget(tmp_path):
    """A flaky grader: all weights cancel. Alone the tree is trained whole;
    beside another minibatch the run's log lacks what only that one knows."""
    model = tiny()
    batch = with_records(model, groups(model, 0, 2))
    for i, t in enumerate(batch[0].trajectories):
        t.segments, t.reward = batch[0].trajectories[0].segments, float(i % 2)
    m = trainer(model, tmp_path / "a", budget=0.5).step(batch[:1])
    assert m["updates"] == 1 and "kept_cost" not in m and m["grad_norm"] == pytest.approx(0, abs=1e-6)
    m = trainer(tiny(), tmp_path / "b", budget=0.5, minibatches=2).step(batch)
    assert m["updates"] == 2 and "kept_cost" not in m and m["grad_norm"] > 1e-3


# -- advantages and KL

def gradient_of(t, batch):
    seen = []
    t.optimizer.step = lambda: seen.append(all_gradients(t.model))
    t.step(batch)
    return seen[0]


@pytest.mark.parametrize("kw", [dict(pass_rate=1.0), dict(by_entropy=True)], ids=str)
def test_advantages_may_be_scaled(tmp_path, kw):
    model = tiny()
    batch = with_records(model, groups(model, 0, 1, (1.0, 0.0, 0.0, 0.0)) + groups(model, 1, 1))
    got = gradient_of(trainer(model, tmp_path, max_grad_norm=1e9, **kw), batch)
    rewards = [[t.reward for t in group.trajectories] for group in batch]
    mean = [np.array([t.entropy[t.mask].mean() for t in group.trajectories]) for group in batch]
    entropies = mean if "by_entropy" in kw else None
    scaled = group_advantages(rewards, "dr_grpo", kw.get("pass_rate", 0.0), entropies)[0]
    plain = group_advantages(rewards)[0]
    def want(advantages):
        model.zero_grad()
        rows = [row for group, own in zip(batch, advantages) for row in rows_of([group], own)]
        accumulate(model, rows, Objective(tis=2.0))
        return all_gradients(model)
    torch.testing.assert_close(got, want(scaled), atol=1e-7, rtol=1e-4)
    assert not torch.allclose(got, want(plain), atol=1e-5)


def test_without_recorded_entropies_scaling_by_them_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(ValueError, match="has no entropy: record it when sampling"):
        trainer(model, tmp_path, by_entropy=True).step(groups(model, 0))


def test_the_reference_of_an_adapter_is_the_model_without_it(tmp_path):
    logs = []
    for name, reference in (("a", None), ("b", tiny())):
        model = lora()
        t = trainer(model, tmp_path / name, objective=Objective(kl=0.1), reference=reference, lr=0.05)
        logs.append([t.step(groups(tiny(), i)) for i in range(3)])
    assert logs[0][0]["kl"] == pytest.approx(0, abs=1e-9) and logs[0][2]["kl"] > 1e-6
    for a, b in zip(*logs):
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-3, abs=1e-9) and a["loss"] == pytest.approx(b["loss"], abs=1e-6)


# -- what doesn't combine

@pytest.mark.parametrize("kw, message", [
    (dict(epochs=0), "epochs 0: at least 1"),
    (dict(minibatches=4), "minibatches 4: they are whole groups, and a batch has 3"),
    (dict(epochs=2, objective=Objective("pg")), "'pg' with 2 updates a batch"),
    (dict(pruning=Pruning(window=2)), "no budget: it would be ignored"),
    (dict(budget=1.5), "budget 1.5"),
    (dict(budget=0.5, objective=Objective("gspo")), "needs whole paths"),
    (dict(budget=0.5, objective=Objective(tis=2.0, correct="turn")), "needs every token of a turn"),
    (dict(budget=0.5, objective=Objective(mask=(0.9, 1.1))), "mask=.* needs every token of a sequence"),
    (dict(budget=0.5, objective=Objective(mask=(0.9, 1.1), mask_unit="turn")), "needs every token of a turn"),
    (dict(objective=Objective(kl=0.1)), "kl=0.1 needs a reference"),
    (dict(reference=tiny()), "kl is 0: it would be ignored"),
    (dict(warmup=-1), "warmup -1"),
    (dict(overlong=0), "overlong 0"),
    (dict(max_grad_norm=0.0), "max_grad_norm 0.0"),
    (dict(pass_rate=-1.0), "pass_rate -1.0")])
def test_settings_that_do_not_combine_are_refused(tmp_path, kw, message):
    with pytest.raises(ValueError, match=message):
        trainer(tiny(), tmp_path, **kw)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    from peft import PromptTuningConfig
    with pytest.raises(ValueError, match="muon_lr=0.02 with an adapter"):
        trainer(lora(), tmp_path, muon_lr=0.02)
    with pytest.raises(ValueError, match="dropout of 0.1"):
        trainer(lora(lora_dropout=0.1), tmp_path)
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        trainer(get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), tmp_path)
    embedded = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))  # tied to the head
    with pytest.raises(ValueError, match="the adapter can't be merged exactly: logits of the merged model differ by"):
        trainer(embedded, tmp_path)
    saved = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="the adapter unties embed_tokens and lm_head"):
        trainer(saved, tmp_path)
    assert not list(tmp_path.iterdir())
    two = lora()
    two.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="exactly one"):
        trainer(two, tmp_path)


# -- killed anywhere

def run(folder: Path, make, die_at=0):  # in this process; SIGKILL at the die_at-th event
    events = 0
    def tick():
        nonlocal events
        events += 1
        if events == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    fsync, os.fsync = os.fsync, lambda fd: (tick(), fsync(fd))[1]   # each file of a checkpoint is an event
    try:
        model = make()
        t = RLTrainer(model, folder / "run", groups_per_step=2, fill=2, epochs=2, minibatches=2, lr=3e-3, dtype=None,
                      save_every=1, warmup=3, objective=Objective(tis=2.0), publish=lambda merged, version: tick())
        step = t.optimizer.step
        t.optimizer.step = lambda: (step(), tick())
        def waves():  # sampled by the weights of the moment; of three groups one teaches nothing
            for i in range(t.groups_seen // 3, 99):
                tick()
                yield groups(merged(model), i, 2) + groups(merged(model), 100 + i, 1, (1.0, 1.0))
        def progress(m):
            with (folder / "log").open("a") as f:
                f.write(json.dumps({k: v for k, v in m.items() if k != "seconds"}) + "\n")
            tick()
        t.train(waves(), 4, progress)
    finally:
        os.fsync = fsync
    return model, {json.loads(line)["step"]: line for line in (folder / "log").read_text().splitlines()}, events


def killed(*args) -> bool:  # the same in a child
    pid = os.fork()
    if not pid:
        try:
            run(*args)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("make", [tiny, lora], ids=["full", "lora"])
def test_killed_at_any_point_a_run_ends_with_the_same_bits(tmp_path, make):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)   # a forked child has no pool of threads
    try:
        (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
        straight, log, events = run(tmp_path / "a", make)
        deaths = [3, 9, 14, 17, 8, 12, 11]
        died = [killed(tmp_path / "b", make, n) for n in deaths]
        resumed, again, _ = run(tmp_path / "b", make)
    finally:
        torch.set_num_threads(threads)
    assert sum(died) >= 5 and events > 40
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))
    assert log == again and len(log) == 4


# -- the page of metrics

PAGE = Path(__file__).parents[2] / "nbs/learn/08_rl.ipynb"


def explained() -> list[str]:  # names in the order of their paragraphs
    text = "".join(c.source for c in nbformat.read(PAGE, 4).cells if "## What the metrics say" in c.source)
    heads = [line.split("**")[1] for line in text.splitlines() if line.startswith("**`")]
    return [name.strip("` ") for head in heads for name in head.split(",")]


def test_every_metric_has_its_paragraph_in_the_order_of_the_log(tmp_path):
    names, model = explained(), lora()
    assert len(names) == len(set(names))
    drawn = Pruning(correction="horvitz_thompson")
    runs = (dict(objective=Objective(tis=2.0, kl=0.1), budget=0.5, pruning=drawn, epochs=2),
            dict(objective=Objective(mis=(0.5, 2.0))))
    for i, settings in enumerate(runs):
        m = list(trainer(model, tmp_path / str(i), **settings).step(groups(base(model), i)))
        assert not {*m} - {*names} and [n for n in names if n in m] == m
    said = [{"turns": [{"calls": [1], "tokens": 3}], "finish": "cap"}]
    facts = {**turn_facts([Trajectory("t", [], info=i) for i in said]), **savings(said)}
    assert not {*facts} - {*names, "n"}
