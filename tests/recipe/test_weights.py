"Weights as folders: whole or not there, none kept too long; an engine has the newest or writes nothing"
import asyncio
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from rl_world import tiny

from kat.core.io import UserError
from kat.infer.requests import Request
from kat.infer.serving import HFAsyncEngine
from kat.recipe.weights import PulledEngine, PulledEngines, WeightsFolder


def files(weights):
    return {path.relative_to(weights.root).as_posix(): path.read_bytes() for path in weights.root.rglob('*')
            if path.is_file()}


def pulled(weights, **deadlines):
    return PulledEngine(HFAsyncEngine(tiny(99), max_len=64, slots=2), weights, **deadlines)


def damage(weights, version, cut):
    path = weights.root/f'v{version:06}'/'model.safetensors'
    data = path.read_bytes()
    path.write_bytes(data[:-40] if cut else data[:-1] + bytes([data[-1] ^ 1]))


def test_versions_are_written_once_and_the_oldest_go(tmp_path):
    weights = WeightsFolder(tmp_path/'w', keep=2)
    assert weights.newest() is None
    for version in range(4):
        weights.publish(tiny(version), version)
    assert [*weights.versions()] == [2, 3]
    before = {path: path.stat().st_mtime_ns for path in weights.root.rglob('*')}
    weights.publish(tiny(3), 3)
    assert before == {path: path.stat().st_mtime_ns for path in weights.root.rglob('*')}
    weights.publish(tiny(7), 2)   # back from a checkpoint, and on another way
    assert [*weights.versions()] == [2]
    with pytest.raises(ValueError, match='keep=0'):
        WeightsFolder(tmp_path, keep=0)


def test_a_damaged_version_is_written_anew(tmp_path):
    weights = WeightsFolder(tmp_path)
    weights.publish(tiny(0), 0)
    whole = files(weights)
    damage(weights, 0, cut=True)
    weights.publish(tiny(0), 0)
    assert files(weights) == whole


def test_a_full_disk_leaves_what_was_there(tmp_path):
    weights = WeightsFolder(tmp_path)
    weights.publish(tiny(0), 0)
    before, limits = files(weights), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        with pytest.raises(UserError, match='v000001: not written'):
            weights.publish(tiny(1), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(weights) == before and weights.newest()[0] == 0


def test_a_late_engine_loads_the_newest(tmp_path):
    weights = WeightsFolder(tmp_path)
    for version in range(3):
        weights.publish(tiny(version), version)
    async def main():
        engine = pulled(weights)
        assert engine.version == -1 and await engine.pull() and engine.version == 2 and not await engine.pull()
        done = await engine.generate(Request([1, 2], 5, seed=3))
        other = HFAsyncEngine(tiny(2), max_len=64, slots=2)
        want = await other.generate(Request([1, 2], 5, seed=3))
        assert np.array_equal(done.ids, want.ids) and np.array_equal(done.logprobs, want.logprobs)
        assert done.versions.tolist() == [2] * 5
        weights.publish(tiny(50), 1)   # the trainer came back from an older checkpoint
        assert await engine.pull() and engine.version == 1
        await engine.close()
        await other.close()
    asyncio.run(main())


@pytest.mark.parametrize('cut', [True, False])
def test_an_engine_whose_update_failed_is_fenced_and_keeps_its_answers(tmp_path, cut):
    weights = WeightsFolder(tmp_path)
    weights.publish(tiny(0), 0)
    async def main():
        engine, heard, some = pulled(weights), [], asyncio.Event()
        inner = engine.engine
        def hear(*token):
            heard.append(token)
            if len(heard) == 5:
                some.set()
        await engine.pull()
        await inner.pause()      # so that the answer is under way, however fast the engine
        answer = asyncio.ensure_future(engine.generate(Request([1, 2], 40, seed=3), hear))
        step = inner.engine.step
        def five(patient):
            moved = step(patient)
            inner.paused = inner.engine.stats['sampled_tokens'] >= 5
            return moved
        inner.engine.step = five
        await inner.resume()
        await some.wait()
        weights.publish(tiny(1), 1)
        damage(weights, 1, cut)
        assert not await engine.pull() and 'v1' in engine.why and 'model.safetensors: damaged' in engine.why
        assert engine.fences == 1 and not answer.done() and len(heard) == 5
        await inner.resume()     # even one that goes on by itself is not listened to
        assert not await engine.pull() and engine.fences == 1 and not answer.done() and len(heard) == 5
        inner.engine.step = step
        weights.publish(tiny(2), 2)
        assert await engine.pull() and engine.why is None
        done = await answer
        assert done.versions.tolist() == [0] * 5 + [2] * 35 == [token[3] for token in heard]
        assert done.ids.tolist() == [token[0] for token in heard]
        await engine.close()
    asyncio.run(main())


class Hangs(HFAsyncEngine):
    async def update_weights(self, weights, version):
        await asyncio.Event().wait()


def test_deadlines_speak(tmp_path):
    weights = WeightsFolder(tmp_path)
    async def main():
        engine = pulled(weights, closed_s=.02)
        with pytest.raises(RuntimeError, match='waited 0.02 s .*no weights have been published yet'):
            await engine.generate(Request([1], 2))
        await engine.close()
        weights.publish(tiny(0), 0)
        engine = PulledEngine(Hangs(tiny(0), max_len=64, slots=2), weights, update_s=.5, closed_s=.02)
        assert not await engine.pull()
        with pytest.raises(RuntimeError, match='weights v0: no answer within 0.5 s'):
            await engine.generate(Request([1], 2))
        await engine.close()
    asyncio.run(main())


def test_weights_of_another_shape_fence(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    weights = WeightsFolder(tmp_path)
    weights.publish(Qwen3ForCausalLM(Qwen3Config(vocab_size=10, hidden_size=16, intermediate_size=16, head_dim=8,
                                                 num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)), 0)
    async def main():
        engine = pulled(weights)
        assert not await engine.pull() and 'do not fit' in engine.why
        await engine.close()
    asyncio.run(main())


def test_two_engines_of_a_process_load_at_the_same_time(tmp_path):
    weights, model = WeightsFolder(tmp_path), tiny(0)
    weights.publish(model, 0)
    with ThreadPoolExecutor(2) as pool:
        for loaded in pool.map(weights.load, [0] * 12):
            there = loaded.state_dict()
            assert all(torch.equal(value, there[name]) for name, value in model.state_dict().items())


def hung():
    "an engine's update that never answers"
    async def never(*_):
        await asyncio.Event().wait()
    return never


@pytest.mark.parametrize('way', ['refuses', 'hangs'])
def test_answers_of_a_fenced_engine_go_on_at_another(tmp_path, way):
    async def go():
        weights = WeightsFolder(tmp_path)
        weights.publish(tiny(0), 0)
        pool = PulledEngines({name: pulled(weights, update_s=5.) for name in 'ab'})
        assert await pool.pull() and pool.version == 0
        heard, enough = {seed: [] for seed in range(4)}, asyncio.Event()
        def hear(seed):
            def one(token, *rest):
                heard[seed].append(token)
                if sum(map(len, heard.values())) == 8:
                    enough.set()
            return one
        asked = [asyncio.ensure_future(pool.generate(Request([1, 2], 60, seed=seed), hear(seed))) for seed in heard]
        await enough.wait()
        good = pool.engines['a'].engine.update_weights
        async def refuse(model, version):
            raise ConnectionError('gone')
        pool.engines['a'].update_s = 1.
        pool.engines['a'].engine.update_weights = refuse if way == 'refuses' else hung()
        weights.publish(tiny(1), 1)
        assert await pool.pull()   # one of them did
        done = await asyncio.gather(*asked)
        assert [len(one.ids) for one in done] == [60] * 4 and pool.moved == 2 and pool.fences == 1
        assert [one.ids.tolist() for one in done] == [*heard.values()]
        assert not pool.engines['a'].open.is_set() and pool.engines['a'].engine.paused
        assert ('gone' if way == 'refuses' else 'no answer within 1 s') in pool.engines['a'].why
        late = await pool.generate(Request([1, 2], 5, seed=9))
        assert set(late.versions) == {1} and pool.version == 1 and pool.why is None
        pool.engines['a'].update_s, pool.engines['a'].engine.update_weights = 5., good
        assert await pool.pull() and pool.engines['a'].open.is_set() and pool.engines['a'].version == 1
        await pool.close()
    asyncio.run(go())


def test_no_engine_left_is_said_at_the_deadline(tmp_path):
    async def go():
        pool = PulledEngines({name: pulled(WeightsFolder(tmp_path)) for name in 'ab'}, closed_s=.05)
        assert not await pool.pull()
        with pytest.raises(RuntimeError, match=r'waited 0.05 s for any of 2 engines.*a: no weights.*b: no weights'):
            await pool.generate(Request([1], 4))
        await pool.close()
    asyncio.run(go())
    with pytest.raises(ValueError, match='at least one'):
        PulledEngines({})
