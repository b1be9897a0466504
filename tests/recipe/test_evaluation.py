"What the stage notebooks share: the shipped base, checkpoints and pairs on disk, expert data, evaluations"
import numpy as np
import pytest
import torch

from kat.core.io import read_parquet
from kat.infer.engines import HFEngine
from kat.learn.rft import with_logprobs
from kat.learn.training import load_model
from kat.envs.base import make_world
from kat.data.corpus import load_pairs, save_pairs
from kat.recipe.evaluation import evaluate
from kat.recipe.pipeline import ROOT, UserError
from kat.recipe.rollouts import ModelPolicy, expert_data, rollout, turn_facts

MICRO = make_world('micro')


@pytest.fixture(scope='module')
def base():
    return load_model(ROOT / 'data/base')


def test_the_shipped_base_is_whole_and_small(base):
    model, tok = base
    assert 2e6 < model.num_parameters() < 4e6 and tok.eos_token == '<|im_end|>'
    assert sum(file.stat().st_size for file in (ROOT / 'data/base').iterdir()) <= 16 * 2**20


def test_pairs_round_trip_and_damage_is_named(tmp_path):
    pairs = [([1, 2, 3], [True, False, True]), ([4], [True])]
    save_pairs(tmp_path / 'a.npz', pairs)
    assert [(list(ids), list(mask)) for ids, mask in load_pairs(tmp_path / 'a.npz')] == pairs
    (tmp_path / 'a.npz').write_bytes(b'junk')
    with pytest.raises(UserError, match="a.npz"):
        load_pairs(tmp_path / 'a.npz')


def test_damaged_checkpoints_are_named(tmp_path, base):
    with pytest.raises(UserError, match="no checkpoint here"):
        load_model(tmp_path)
    model, tok = base
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_model(tmp_path)


def test_ground_truths_get_the_models_own_log_probs(base):
    "The engine's record of a sample and the trainer's log-probs of the same tokens agree."
    model, tok = base
    with MICRO.open(1) as make_env:
        engine = HFEngine(model, max_len=1024, slots=4)
        played = rollout(ModelPolicy(engine), tok, [MICRO.train_task(0, i) for i in range(4)], make_env, max_turns=2)
    recorded = [t.logprobs.copy() for t in played]
    for before, t in zip(recorded, with_logprobs(model, played, torch.float32)):
        assert np.abs(before[t.mask] - t.logprobs[t.mask]).max() < 1e-4 and t.sampling == dict(temperature=1.0)


def test_expert_data_is_repeatable_and_seeds_differ(base):
    _, tok = base
    with MICRO.open(1) as make_env:
        first, again, other = (expert_data(MICRO, tok, [MICRO.train_task(0, i) for i in range(6)], make_env, seed)
                               for seed in (0, 0, 1))
    assert first == again != other
    trained = {MICRO.train_task(seed, i).id for seed in range(3) for i in range(5)}
    assert {t.id for t in MICRO.heldout(5)}.isdisjoint(trained)
    assert set(turn_facts(first)) == {'turns', 'parallel', 'capped', 'stopped', 'sampled_tokens'}


def test_evaluation_is_kept(tmp_path, base):
    model, tok = base
    record = evaluate(model, tok, 'base', tmp_path, MICRO, 4, 0, 3)
    stamp = (tmp_path / 'eval/base.json').stat().st_mtime_ns
    assert evaluate(model, tok, 'base', tmp_path, MICRO, 4, 0, 3) == record
    assert (tmp_path / 'eval/base.json').stat().st_mtime_ns == stamp
    assert record['n'] == 4 and record['sampled']['rate'] == 0
    for name, temperature in (('base', 1.0), ('base.greedy', 0.0)):   # both sets can be read, and say what they are
        kept = list(read_parquet(tmp_path / f'eval/{name}.parquet'))
        assert [t.task for t in kept] == [t.id for t in MICRO.heldout(4)]
        assert {t.sampling['temperature'] for t in kept} == {temperature}
