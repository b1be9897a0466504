"The RL trainer: the right gradient whatever the micro-batches, masks, versions, exact resume."
import numpy as np
import pytest
import torch
from rl_world import all_gradients, episode, groups, rows_of, score, tiny, trainer
from transformers import AutoModelForCausalLM

from kat.core.types import Group, Segment, Trajectory
from kat.learn.objective import Objective
from kat.learn.advantage import session_rewards
from kat.learn.rl import accumulate, make_row
from kat.learn.training import CheckpointError


def endless(model, start=0):
    while True:
        yield from groups(model, start)
        start += 1


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("normalise", ["token", "sequence", "constant"])
def test_the_gradient_is_the_formulas(tmp_path, normalise):
    model, seen = tiny(), {}
    batch = groups(model, 0, 2, (1.0, 0.0, 0.25))
    objective = Objective(normalise=normalise, length=10 if normalise == "constant" else None)
    t = trainer(model, tmp_path, objective=objective, max_grad_norm=1e9, max_tokens=32)
    t.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    t.step(batch)
    # by hand: on policy, so the clipped objective's gradient is the policy gradient's
    loss, trajectories = 0.0, [x for g in batch for x in g.trajectories]
    tokens = sum(x.mask.sum() for x in trajectories)
    for x in trajectories:
        weight = {"token": 1 / tokens, "sequence": 1 / (6 * x.mask.sum()), "constant": 1 / (6 * 10)}[normalise]
        loss = loss - weight * (x.reward - 1.25 / 3) * score(model, x.ids)[torch.from_numpy(x.mask[1:])].sum()
    for (name, p), want in zip(model.named_parameters(), torch.autograd.grad(loss, list(model.parameters()))):
        torch.testing.assert_close(seen[name], want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("objective", [
    Objective(tis=2.0), Objective("gspo"), Objective(semantics="node"), Objective("cispo", entropy=0.01)],
    ids=lambda o: f"{o.loss}-{o.semantics}")
def test_packs_change_nothing(objective):
    model = tiny()
    rows = rows_of(groups(model, 1), (0.5, -0.5, -0.5, 0.5))
    grads, metrics = [], []
    for size in (None, 64, 7):
        model.zero_grad()
        metrics.append(accumulate(model, rows, objective, size))
        grads.append(all_gradients(model))
    for g, m in zip(grads[1:], metrics[1:]):
        torch.testing.assert_close(g, grads[0], atol=1e-7, rtol=1e-4)
        assert m == pytest.approx(metrics[0], abs=1e-5)


def test_a_budget_trains_on_less_and_the_whole_budget_on_all():
    model = tiny()
    rows = rows_of(groups(model, 1), (0.5, -0.5, -0.5, 0.5))
    def run(**options):
        model.zero_grad()
        return accumulate(model, rows, Objective(tis=2.0), **options), all_gradients(model)
    _, full = run()
    all_of_it, same_gradient = run(budget=1.0)
    half, gradient = run(budget=0.5)
    torch.testing.assert_close(same_gradient, full, atol=1e-7, rtol=1e-4)
    assert all_of_it["kept_tokens"] == 1 and half["kept_cost"] <= 0.5 and 0 < half["kept_entropy"] < 1
    assert 0 < torch.nn.functional.cosine_similarity(gradient, full, dim=0) < 0.999
    with pytest.raises(ValueError, match="needs whole paths"):
        accumulate(model, rows, Objective("gspo"), budget=0.5)
    least, some = run(budget=1e-6)  # less than a prompt costs: the smallest part that trains anything
    assert 0 < least["kept_cost"] < 0.5 and some.norm() > 0


def test_stale_groups_are_dropped_and_counted(tmp_path):
    model = tiny()
    batch = groups(model, 0, 3)
    for g, version in zip(batch, (0, 3, 5)):
        for x in g.trajectories:
            for seg in x.segments:
                if seg.trainable:
                    seg.version = np.full(len(seg), version, np.int32)
    t = trainer(model, tmp_path, max_staleness=2)
    t.version = 5
    m = t.step(batch)
    assert (m["stale_groups"], m["live_groups"]) == (1, 2)


def test_fill_replaces_groups_that_teach_nothing(tmp_path):
    model = tiny()
    def mixed():
        for i in range(100):
            yield from groups(model, i, 1, (1.0, 1.0) if i % 2 else (1.0, 0.0))
    t = trainer(model, tmp_path, groups_per_step=3, fill=2)
    seen = []
    t.train(mixed(), 2, seen.append)
    assert [(m["live_groups"], m["groups"]) for m in seen] == [(3, 5), (3, 6)] and t.groups_seen == 11


def test_metrics_of_an_on_policy_step(tmp_path):
    model = tiny()
    m = trainer(model, tmp_path).step(groups(model, 0))
    counts = ("step", "version", "groups", "live_groups", "sessions", "trajectories", "masked")
    assert [m[k] for k in counts] == [1, 1, 3, 3, 12, 12, 0]
    assert m["reward"] == m["solved"] == 0.5
    assert m["mismatch_max"] < 1e-5 and m["mismatch_k3"] < 1e-9 and m["tis_capped"] == 0
    assert 2.0 < m["entropy"] < np.log(12) + 1e-6 and m["grad_norm"] > 0
    assert m["trained_tokens"] < m["flat_tokens"] and m["tree_tokens"] <= m["flat_tokens"]


def test_temperature_is_that_of_sampling(tmp_path):
    model, rng = tiny(), np.random.default_rng(0)
    mixed = [Group("t", [episode(model, rng, r, tau=tau) for r, tau in ((1.0, 0.5), (0.0, 2.0))])]
    assert trainer(model, tmp_path).step(mixed)["mismatch_max"] < 1e-5


def test_stale_tokens_are_measured_and_capped(tmp_path):
    model = tiny()
    batch = groups(tiny(seed=1), 0)  # sampled by somebody else
    model.model.norm.weight.data.mul_(30)
    m = trainer(model, tmp_path).step(batch)
    assert m["mismatch_mean"] > 0.1 and m["mismatch_k3"] > 0 and 0 < m["tis_capped"] < 1


def test_masked_trajectories_do_not_count(tmp_path):
    rng, base = np.random.default_rng(0), tiny()
    plain = [episode(base, rng, r) for r in (1.0, 0.0, 0.0)]
    extra = [episode(base, rng, None), episode(base, rng, 0.0, masked="timeout")]
    a, b = tiny(), tiny()
    one = trainer(a, tmp_path / "a").step([Group("t", plain)])
    two = trainer(b, tmp_path / "b").step([Group("t", [extra[0], *plain, extra[1]])])
    assert same(a, b) and (two["masked"], two["reward"]) == (2, one["reward"])
    assert np.isnan(session_rewards(extra).rewards).all()


def test_groups_that_teach_nothing_are_dropped(tmp_path):
    a, b = tiny(), tiny()
    live, dead = groups(a, 0, 2), groups(a, 1, 2, (1.0, 1.0)) + groups(a, 2, 1, (0.0, 0.0))
    one = trainer(a, tmp_path / "a").step(live)
    two = trainer(b, tmp_path / "b").step([dead[0], *live, *dead[1:]])
    assert same(a, b) and (one["live_groups"], two["live_groups"], two["groups"]) == (2, 2, 5)
    assert one["flat_tokens"] == two["flat_tokens"]
    before = tiny()
    three = trainer(before, tmp_path / "c")
    assert "loss" not in three.step(dead) and same(before, tiny()) and (three.version, three.groups_seen) == (1, 3)


def test_weights_are_published_with_their_version(tmp_path):
    model, published = tiny(), []
    t = trainer(model, tmp_path, publish=lambda m, v: published.append((v, m.model.norm.weight.detach().clone())))
    t.train(endless(model), 2)
    assert [v for v, _ in published] == [0, 1, 2]
    assert not torch.equal(published[0][1], published[1][1])


def test_no_more_groups_are_taken_than_needed(tmp_path):
    model, taken = tiny(), []
    def lazy():
        for i, g in enumerate(endless(model)):
            taken.append((i, t.version))
            yield g
    t = trainer(model, tmp_path)
    t.train(lazy(), 3)
    assert taken == [(i, i // 3) for i in range(9)]


@pytest.mark.parametrize("muon", [None, 0.02])
def test_a_stopped_run_ends_with_the_same_bits(tmp_path, muon):
    class Stop(Exception):
        pass
    def run(folder, stop=None):
        model, seen = tiny(), []
        def progress(m):
            seen.append({k: v for k, v in m.items() if k != "seconds"})
            if m["step"] == stop: raise Stop
        t = trainer(model, folder, muon_lr=muon, dtype=torch.bfloat16)
        return model, t.train(endless(model, t.groups_seen // 3), 7, progress), seen
    straight, result, log = run(tmp_path / "a")
    for stop in (1, 2, 5, 7):
        with pytest.raises(Stop):
            run(tmp_path / "b", stop)
    resumed, again, tail = run(tmp_path / "b")
    assert same(straight, resumed) and result == again == {"version": 7, "groups_seen": 21} and tail == log[6:]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["model"]
    assert same(straight, AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model"))
    loaded, _, nothing = run(tmp_path / "b")
    assert same(loaded, straight) and nothing == []
    with pytest.raises(ValueError, match="finished after 7 steps, 9 asked"):
        trainer(tiny(), tmp_path / "b", muon_lr=muon, dtype=torch.bfloat16).train(iter([]), 9)


def test_damage_and_other_runs_are_refused(tmp_path):
    model = tiny()
    t = trainer(model, tmp_path)
    t.step(groups(model, 0))
    t.save()
    with pytest.raises(CheckpointError, match="lr: 0.001 there, 0.002 here"):
        trainer(tiny(), tmp_path, lr=2e-3)
    file = tmp_path / "checkpoints" / "checkpoint-1" / "trainer.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="checkpoint-1/trainer.pt: damaged"):
        trainer(tiny(), tmp_path)


def test_bad_input_is_named(tmp_path):
    model, rng = tiny(), np.random.default_rng(0)
    blind = Trajectory("sum", [Segment([1], "user"), Segment([2, 3], "assistant", trainable=True)], 1.0)
    with pytest.raises(ValueError, match="task sum: 2 of 2 trained tokens have no recorded"):
        make_row(blind, 1.0)
    greedy = episode(model, rng, 1.0)
    greedy.sampling["temperature"] = 0.0
    with pytest.raises(ValueError, match="task t: sampled at temperature 0.0"):
        make_row(greedy, 1.0)
    with pytest.raises(ValueError, match="'gae'"):
        trainer(model, tmp_path, advantage="gae").step(groups(model, 0))
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="finite"):
        trainer(model, tmp_path).step(groups(tiny(), 0))
