"What trees save: counts against slow ones, FLOPs against PyTorch's counter, real logs, the picture"
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kat.core.logs import import_log
from kat.core.io import write_records
from kat.core.types import Group, Segment, Trajectory
from kat.core.figures import save_picture
from kat.tree.draw import draw_calls, draw_tree, node_columns, pooled_blocks, tree_labels
from kat.tree.stats import (MODEL_FAMILIES, LABELS, ModelCall, attention_pairs, compare_baselines, conversation_calls,
                            flat_profile, log_calls, merge_calls, model_shape, por, record_calls, tree_profile)
from kat.tree.trie import TokenTree

ROOT = Path(__file__).parents[2]
LOGS = ROOT/'data'/'trajectories'
few = settings(max_examples=60, deadline=None)
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8)


@pytest.fixture(scope='module')
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT/'data'/'base')

@pytest.fixture(scope='module')
def logs(tokenizer):
    return {n: log_calls(LOGS/f'{n}.json', tokenizer)
            for n in ('tau_bench_gpt4o_airline', 'swe_agent_marshmallow_1867', 'swe_smith_pandas_53652')}

def calls_of(sequences, episode=lambda k: 0, task=lambda k: 't'):
    return [ModelCall(task(k), episode(k), np.array(ids, np.int32), np.zeros(len(ids), np.uint8))
            for k, ids in enumerate(sequences)]


@few
@given(SEQUENCES, st.none() | st.integers(1, 9))
def test_profiles_and_pairs_are_plain_counts(sequences, window):
    reach = lambda p: p + 1 if window is None else min(p + 1, window)
    flat, tree = flat_profile(list(map(len, sequences))), tree_profile(TokenTree.from_sequences(sequences))
    assert flat.tolist() == [sum(len(s) > p for s in sequences) for p in range(max(map(len, sequences)))]
    prefixes = {tuple(s[:i + 1]) for s in sequences for i in range(len(s))}
    assert attention_pairs(flat, window) == sum(reach(p) for s in sequences for p in range(len(s)))
    assert attention_pairs(tree, window) == sum(reach(len(p) - 1) for p in prefixes)


SMALL = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
             intermediate_size=40, vocab_size=50, max_position_embeddings=64, attn_implementation='eager')
MOE = dict(num_experts_per_tok=3, moe_intermediate_size=16)
SLIDES = ['sliding_attention', 'sliding_attention', 'full_attention', 'sliding_attention']
NONE = dict(head_dim=None)
CASES = [('llama', {}), ('mistral', dict(sliding_window=5)), ('qwen2', NONE), ('qwen3', dict(head_dim=10)),
         ('smollm3', NONE),
         ('gemma3_text', dict(head_dim=8, sliding_window=5, layer_types=SLIDES)),
         ('qwen3_moe', MOE | dict(num_experts=8, mlp_only_layers=[1])),
         ('mixtral', dict(num_local_experts=6, num_experts_per_tok=2)),
         ('qwen2_moe', MOE | NONE | dict(num_experts=8, shared_expert_intermediate_size=20, decoder_sparse_step=2))]

def test_every_family_is_checked():
    assert {n for n, _ in CASES} == set(MODEL_FAMILIES)

@pytest.mark.parametrize('name, more', CASES)
def test_flops_equal_the_counter_of_pytorch(name, more):
    n = 7
    config = AutoConfig.for_model(name, **{k: v for k, v in (SMALL | more).items() if v is not None}, pad_token_id=0)
    config._experts_implementation = 'eager'
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(n)[None], use_cache=False)
    rotary = sum(sum(f.values()) for k, f in counter.flop_counts.items() if k.endswith('.rotary_emb'))
    shape = model_shape(config)
    # eager attention computes the whole square
    square = 4 * shape.heads * shape.head_dim * n * n * len(shape.windows)
    assert counter.get_total_flops() - rotary == shape.per_token * n + square
    pairs = sum(attention_pairs(flat_profile([n]), w) for w in shape.windows)
    assert shape.forward(flat_profile([n])) == shape.per_token * n + 4 * shape.heads * shape.head_dim * pairs
    assert {w for w in shape.windows} == {'mistral': {5}, 'gemma3_text': {5, None}}.get(name, {None})


CHUNKED = AutoConfig.for_model('qwen3', num_hidden_layers=1, layer_types=['chunked_attention'])

@pytest.mark.parametrize('config, says', [
    (AutoConfig.for_model('gpt2'), "model type 'gpt2'.*qwen3"),
    (AutoConfig.for_model('qwen3_next'), "model type 'qwen3_next'"),
    (CHUNKED, 'layers of kind chunked_attention')])
def test_other_models_are_refused_by_name(config, says):
    with pytest.raises(ValueError, match=says):
        model_shape(config)

def test_a_model_from_its_folder_or_file():
    assert model_shape(ROOT/'data'/'base') == model_shape(str(ROOT/'data'/'base'/'config.json'))
    with pytest.raises(FileNotFoundError, match='nbs/config.json.*a config.json'):
        model_shape(ROOT/'nbs')


@few
@given(SEQUENCES, st.integers(1, 3))
def test_merging_loses_no_token_of_the_tree(sequences, episodes):
    sequences = sorted(sequences, key=len)                                    # so that some extend the one before
    calls = calls_of(sequences, lambda k: k * episodes // len(sequences))
    kept = merge_calls(calls)
    tree = lambda cs: TokenTree.from_sequences([c.ids for c in cs])
    assert (tree(kept).ids == tree(calls).ids).all() and len(tree(kept)) == len(tree(calls))
    gone = [i for i, c in enumerate(calls) if not any(c is k for k in kept)]
    extends = lambda a, b: a.episode == b.episode and b.ids[:len(a.ids)].tolist() == a.ids.tolist()
    assert gone == [i for i, (a, b) in enumerate(zip(calls, calls[1:])) if extends(a, b)]


def test_merging_by_hand():
    a, b, c, d = calls_of([[1, 2], [1, 2, 3], [1, 9], [1, 9]])
    assert merge_calls([a, b, c, d]) == [b, d]                                # c is repeated by d
    assert merge_calls([b, a]) == [b, a]
    other = ModelCall('t', 1, b.ids, b.label)
    assert merge_calls([a, other]) == [a, other]                              # not across episodes
    assert merge_calls([]) == []


def test_compare_by_hand():
    calls = calls_of([[1, 2], [1, 2, 3], [1, 9], [1, 2]], lambda k: k // 2, lambda k: 'ab'[k // 3])
    flat, merged, trees, whole = compare_baselines(calls, model_shape(AutoConfig.for_model('llama', **SMALL)))
    sizes = [(w.sequences, w.tokens, w.pairs) for w in (flat, merged, trees, whole)]
    assert sizes == [(4, 9, 15), (3, 7, 12), (2, 6, 11), (1, 4, 8)]
    assert por(flat, trees) == pytest.approx(1 / 3) and por(merged, whole) == pytest.approx(3 / 7)
    assert flat.forward > merged.forward > trees.forward > whole.forward
    assert [w.forward for w in compare_baselines(calls)] == [None] * 4 and len(compare_baselines(calls[:3])) == 3
    with pytest.raises(ValueError, match='no calls'):
        compare_baselines([])


def test_the_real_logs(logs):
    counts = {n: [(w.sequences, w.tokens) for w in compare_baselines(c)] for n, c in logs.items()}
    assert counts == dict(
        tau_bench_gpt4o_airline=[(43, 144143), (6, 24138), (5, 21658), (1, 11720)],
        swe_agent_marshmallow_1867=[(13, 24322), (8, 18591), (1, 12303)],
        swe_smith_pandas_53652=[(8, 11187), (1, 2245), (1, 2245)])
    seen = {LABELS[i] for c in logs['swe_agent_marshmallow_1867'] for i in np.unique(c.label)}
    assert seen == {'context', 'model', 'tool'}


def foreign(tokenizer, template):
    "The tokenizer with another chat template."
    other = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    other.chat_template = template
    return other

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n%s{{ m.content }}{% for c in m.tool_calls or [] %}\n"
          "{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}")
THINKS = "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"         # old answers are written without their thoughts
REFUSES = "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"

def test_any_chat_template(tokenizer, logs):
    conversations = list(import_log(LOGS/'swe_smith_pandas_53652.json'))
    calls_with = lambda part: list(conversation_calls(conversations, foreign(tokenizer, CHATML.replace('%s', part))))
    plain, dropped = calls_with(''), calls_with(THINKS)
    assert (len(merge_calls(plain)), len(merge_calls(dropped))) == (1, 8)
    flat, merged, tree = compare_baselines(dropped)
    assert flat.tokens == merged.tokens and tree.tokens < 1.5 * compare_baselines(plain)[-1].tokens
    for calls in (plain, dropped):
        last, messages = calls[-1], conversations[0].calls[-1]
        said = lambda name: tokenizer.decode(last.ids[last.label == LABELS.index(name)])
        assert said('tool') == ''.join(m['content'].strip() for m in messages if m['role'] == 'tool')
        written = messages[-1]['content'], messages[-1]['tool_calls'][0]['function']['name']
        assert all(w in said('model') for w in written)
    with pytest.raises(ValueError, match='pandas.*: call 1: no tools here'):
        calls_with(REFUSES)


def trajectory(*segments):
    return Trajectory('t', [Segment(*s) for s in segments])

def test_calls_of_our_own_records(tmp_path):
    failed = [5], 'tool_result', 0, False, None, None, None, 'error'
    one = trajectory(([1, 2], 'user'), ([3], 'assistant', 0, True), ([4], 'tool_call', 0, True), failed,
                     ([6], 'assistant', 1, True), ([7], 'user', 2))
    # in `fork` turn 0 is another's
    fork = trajectory(([1], 'user'), ([3], 'assistant', 0), ([8], 'user', 1), ([9], 'assistant', 1, True))
    masked = trajectory(([1], 'user'), ([3], 'assistant', 0), ([8], 'user', 1), ([9], 'assistant', 1))
    want = [(0, [1, 2, 3, 4]), (0, [1, 2, 3, 4, 5, 6]), (1, [1, 3, 8, 9]), (2, [1, 3]), (2, [1, 3, 8, 9])]
    assert [(c.episode, c.ids.tolist()) for c in record_calls([one, fork, masked])] == want
    last = list(record_calls([one]))[-1]
    assert [LABELS[i] for i in last.label] == ['context'] * 2 + ['model'] * 2 + ['error', 'model']
    for name, records in (('a.parquet', [Group('t', [one, fork, masked])]), ('b.jsonl', [one, fork, masked])):
        write_records(tmp_path/name, records)
        assert [(c.episode, c.ids.tolist()) for c in log_calls(tmp_path/name)] == want
    write_records(tmp_path/'none.jsonl', [trajectory(([1], 'user'))])
    with pytest.raises(ValueError, match='none.jsonl: no model call'):
        log_calls(tmp_path/'none.jsonl')
    with pytest.raises(ValueError, match='tau_bench.*pass the tokenizer'):
        log_calls(LOGS/'tau_bench_gpt4o_airline.json')


@few
@given(SEQUENCES, st.floats(0, 6))
def test_blocks_cover_the_flat_tokens_and_nothing_twice(sequences, narrow):
    tree = TokenTree.from_sequences(sequences)
    left, width = node_columns(tree)
    drawn, pools = pooled_blocks(tree, left, width, narrow)
    assert (drawn == (width >= narrow)).all()
    height = np.diff(tree.node_bounds())
    assert (height * width)[drawn].sum() + (pools[:, 1] * pools[:, 3]).sum() == pytest.approx(tree.n_flat)
    grid = np.zeros((int(tree.position.max()) + 1, len(sequences)), int)
    for n, p in enumerate(tree.position[tree.node_bounds()[:-1]]):
        grid[p:p + height[n], left[n]:left[n] + width[n]] += 1
    assert grid.max() == 1 and grid.sum() == tree.n_flat
    for n, p in enumerate(tree.node_parent()):
        assert p < 0 or left[p] <= left[n] and left[n] + width[n] <= left[p] + width[p]
    for x, wide, top, *_ in pools:
        assert grid[int(top), int(x):int(x + wide)].all()


def test_labels_of_a_tree():
    tree = TokenTree.from_sequences([[1, 2], [1, 3]])
    assert tree_labels(tree, [np.array([0, 1], np.uint8), np.array([4, 2], np.uint8)]).tolist() == [4, 1, 2]
    with pytest.raises(ValueError, match='one for each token'):
        tree_labels(tree, [np.zeros(2, np.uint8), np.zeros(3, np.uint8)])


def test_pictures_of_logs_and_of_thousands_of_nodes(logs, tmp_path):
    fig = draw_calls(logs['swe_agent_marshmallow_1867'], 'a run')
    texts = [t.get_text() for t in fig.axes[0].texts]
    title = 'a run\n18,591 tokens in sequences, 12,303 in a tree of 15 nodes'
    assert '464 × 8' in texts and fig.axes[0].get_title('left').startswith(title)
    assert save_picture(fig, tmp_path/'new'/'a.png').stat().st_size > 10_000
    rng = np.random.default_rng(0)
    grown = [rng.integers(0, 1000, 300)]
    while len(grown) < 2800:
        s = grown[rng.integers(len(grown))]
        grown.append(np.concatenate([s[:rng.integers(1, len(s))], rng.integers(0, 1000, 40)]))
    tree = TokenTree.from_sequences(grown)
    fig = draw_tree(tree)
    blocks, borders, pools = fig.axes[0].collections
    assert tree.n_nodes > 4500 and len(blocks.get_paths()) + len(pools.get_paths()) < 3000   # fewer boxes than nodes
    with pytest.raises(ValueError, match='b.bmp'):
        save_picture(fig, tmp_path/'b.bmp')
    assert sorted(p.name for p in tmp_path.rglob('*.*')) == ['a.png']
