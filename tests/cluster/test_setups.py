"What a setup needs is added up before anything starts, and what can't be is refused in one line"
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from typer.testing import CliRunner

from kat.cli import app
from kat.core.io import UserError
from kat.cluster.memory import engine_bytes, memory_size, training_bytes
from kat.cluster.setups import SETUPS, check_setup, model_size, needed, plan_lines
from kat.cluster.tags import disaggregated


@pytest.mark.parametrize('name', SETUPS)
def test_every_setup_fits_and_names_each_rank_and_engine_once(name):
    setup = SETUPS[name]
    lines = plan_lines(setup)
    assert sum('trainer rank' in line for line in lines) == setup.ranks == len(setup.trainers)
    used = [device.name for group in setup.engines for device in group]
    assert len(set(used)) == len(used) and all(len(group) == setup.split for group in setup.engines)


def test_tiny_is_the_shipped_base():
    assert model_size('tiny') == memory_size(AutoConfig.from_pretrained('data/base'))


def test_published_counts():
    "in billions, as the models' cards have them"
    counts = {name: round(model_size(name).parameters/1e9, 1) for name in ('qwen3-1.7b', 'qwen3-8b', 'qwen3-32b')}
    assert counts == {'qwen3-1.7b': 1.7, 'qwen3-8b': 8.2, 'qwen3-32b': 32.8}


@pytest.mark.parametrize('change, line', [
    (dict(context=131072), r'gpus8: device d0004 needs .* GB and has 72.0 GB .*keys_values'),
    (dict(ranks=5), 'train is a gang of 5 devices, and 4 of 8 can do it'),
    (dict(devices=tuple(disaggregated(8, 4)[:4])), 'rollout asks for the tag rollout, which no device has'),
    (dict(split=5), 'gpus8: an engine of split=5 devices, and 4 can roll out'),
    (dict(model='gpt'), 'model=gpt: one of tiny'),
])
def test_what_cannot_be_is_refused_in_a_line(change, line):
    with pytest.raises(UserError, match=line) as caught:
        check_setup(replace(SETUPS['gpus8'], **change))
    assert '\n' not in str(caught.value)


@given(st.integers(1, 64), st.integers(1, 10**5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_more_ranks_never_need_more_and_more_tokens_never_less(ranks, tokens, again):
    size = SIZE
    held = lambda ranks, tokens: sum(training_bytes(size, tokens, ranks, again).values())
    assert held(2*ranks, tokens) <= held(ranks, tokens) or ranks == 1   # with a second rank, layers are gathered
    assert held(ranks, tokens) < held(ranks, tokens + 1)
    assert sum(training_bytes(size, tokens, ranks, True).values()) <= held(ranks, tokens)
    assert sum(engine_bytes(size, tokens, 2).values()) == 2*sum(engine_bytes(size, tokens, 2, split=2).values())


SIZE = model_size('qwen3-8b')


def test_a_device_with_both_roles_holds_both():
    (_, parts), = needed(SETUPS['laptop'])
    assert {'optimizer', 'keys_values'} <= set(parts)


def test_the_command():
    ask = lambda *args: CliRunner().invoke(app, ['cluster', 'plan', *args])
    assert 'trainer rank 3: node 0 d0003' in ask('gpus8').output
    assert 'node 3 d0031' in ask('slurm4').output
    assert 'one of laptop' in str(ask('huge').exception)
    assert 'gang of 99' in str(ask('gpus8', '--ranks', '99').exception)
    assert 'slots' in str(ask('gpu', '--slots', '0').exception)
