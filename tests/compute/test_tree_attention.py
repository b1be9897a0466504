"Every attention backend against the dense mask: outputs and gradients on trees that branch, packs, windows, dtypes."
import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kat.compute import tree_attention as page, triton_kernels
from kat.compute.tree_attention import BACKENDS, choose_backend, tree_attention
from kat.compute.layout import Layout, dense_mask, visible_blocks
from kat.core.io import MissingExtra
from kat.tree.trie import TokenTree

ON_CPU = ["reference", "segments", "flex", "triton"]
SMALL = {(256, size): ((16, 16, 4, 1), (16, 16, 4, 1)) for size in (2, 4)}  # small blocks: small trees have many


@contextlib.contextmanager
def setting(module, **values):
    "The module's constants changed for a while: small blocks, one way or the other forced."
    old = {k: getattr(module, k) for k in values}
    for k, v in values.items():
        setattr(module, k, v)
    try:
        yield
    finally:
        for k, v in old.items():
            setattr(module, k, v)


def pack(tree, a, b):
    "Layout of the tree's tokens a … b-1 after their common ancestors."
    past, t = [], tree.prev[a]
    while t >= 0:
        past.append(t)
        t = tree.prev[t]
    keys = np.concatenate([np.array(past[::-1], np.int64), np.arange(a, b)])
    return Layout(len(past) + np.minimum(tree.end[keys] - a, b - a), tree.position[keys], len(past))


def draw(layout, heads, kv_heads, dim, dtype=torch.float64, seed=0):
    "q, k, v as a model makes them, the heads of a token side by side, and a gradient"
    g = torch.Generator().manual_seed(seed)
    def one(h, n):
        return torch.randn(1, n, h, dim, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
    size = layout.m + layout.n
    q, k, v, up = one(heads, layout.n), one(kv_heads, size), one(kv_heads, size), one(heads, layout.n)
    return [x.requires_grad_() for x in (q, k, v)], up


def run(backend, inputs, up, layout, window=None):
    "output and gradients; of flex on a CPU the output alone"
    if backend == "flex":
        with torch.no_grad():
            return [tree_attention(*inputs, layout, 0.4, window, backend)]
    out = tree_attention(*inputs, layout, 0.4, window, backend)
    return [out.detach(), *torch.autograd.grad(out, inputs, up)]


def close(got, truth, atol, rtol=0):
    for a, b in zip(got, truth):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


letters = st.integers(0, 2)  # so few that most sequences share something
sequences = st.lists(st.lists(letters, min_size=1, max_size=25), min_size=1, max_size=14)
windows = st.sampled_from([None, 1, 2, 5, 12])


@st.composite
def packs(draw_, trees=sequences):
    tree = TokenTree.from_sequences(draw_(trees))
    a = draw_(st.integers(0, len(tree) - 1))
    return pack(tree, a, draw_(st.integers(a + 1, len(tree))))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_reference_is_each_sequence_alone(data):
    tree = TokenTree.from_sequences(data.draw(sequences))
    layout = Layout(tree.end, tree.position, 0)
    (q, k, v), _ = draw(layout, 4, 2, 4)
    out = tree_attention(q, k, v, layout, 0.4, backend="reference")
    for s in range(tree.n_sequences):
        p = torch.as_tensor(tree.path(s))
        alone = sdpa(q[:, :, p], k[:, :, p], v[:, :, p], is_causal=True, scale=0.4, enable_gqa=True)
        torch.testing.assert_close(out[:, :, p], alone, atol=1e-12, rtol=0)


def even_plan(layout, window, rows):
    with setting(page, EVEN_ROWS=(rows, rows + 1), FILL=3, GROUP=40, CALL=6, EDGE=1):
        return page._even_plan(layout, window)


@settings(max_examples=200, deadline=None)
@given(packs(), windows, st.sampled_from([(1, 1), (3, 1), (4, 2)]), st.sampled_from(["short", "even", "long"]),
       st.integers(1, 9))
def test_segments_equal_the_reference(layout, window, heads, way, rows):
    "Small blocks, so that there are many, with the probabilities kept, computed together, and with the fused kernel"
    inputs, up = draw(layout, *heads, 4)
    truth = run("reference", inputs, up, layout, window)
    if way == "even":
        layout._cache["segments", window, False] = way, even_plan(layout, window, rows)
    with setting(page, SHORT=0 if way == "long" else 1e9, SHORT_ROWS=rows, LONG_ROWS=rows, STEP=3, CALL=6, EDGE=1):
        close(run("segments", inputs, up, layout, window), truth, 1e-12)


@settings(max_examples=100, deadline=None)
@given(packs(), windows, st.integers(1, 9))
def test_groups_hold_every_block_once(layout, window, rows):
    "What a query sees by its group's table and bias is what the mask says; columns before `first` are seen by all"
    groups, seen = even_plan(layout, window, rows), dense_mask(layout, window).numpy()
    rows = page._height(groups)
    assert sorted(torch.cat([g.blocks for g in groups]).tolist()) == list(range(-(-layout.n // rows)))
    for g in groups:
        assert g.keys.shape[1] % 3 == 0 and len(g.blocks) <= max(1, 40 // (rows * g.keys.shape[1]))
        for b, keys, bias in zip(g.blocks.tolist(), g.keys.numpy(), g.bias[:, 0, :, 0].numpy()):
            for r in range(b * rows, min((b + 1) * rows, layout.n)):
                shown = np.concatenate([keys[:g.first], keys[g.first:][bias[r - b * rows] == 0]])
                assert np.array_equal(np.sort(shown), np.flatnonzero(seen[r]))


RNG = np.random.default_rng
BIG = TokenTree.from_sequences([np.r_[[1] * 30, RNG(i // 4).integers(0, 3, 60), RNG(i).integers(0, 3, 20 + 10 * i)]
                                for i in range(8)])
MANY = TokenTree.from_sequences([np.r_[[1] * 30, RNG(i // 8).integers(0, 3, 40), RNG(i).integers(0, 3, 60)]
                                 for i in range(48)])
LONG = TokenTree.from_sequences([[1] * 700, [1] * 500 + [2] * 300, [1] * 500 + [2] * 90 + [3] * 40])


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 3e-5), (torch.bfloat16, 0.1),
                                         (torch.float16, 0.02)])
@pytest.mark.parametrize("tree, a, b", [(BIG, 0, len(BIG)), (BIG, 300, 500), (MANY, 0, len(MANY)), (LONG, 0, len(LONG)),
                                        (LONG, 600, 1000)], ids=["short", "short pack", "many", "long", "long pack"])
@pytest.mark.parametrize("window", [None, 70])
def test_segments_as_shipped(tree, a, b, window, dtype, atol):
    layout = pack(tree, a, b)
    inputs, up = draw(layout, 4, 2, 16, dtype)
    truth = run("reference", inputs, up, layout, window)
    got = run("segments", inputs, up, layout, window)
    close(got, truth, atol, 2 ** -7 if dtype.itemsize == 2 else 0)  # large gradients may be off by their last bit
    if dtype.itemsize == 2:  # no worse than rounding: relative to the size of the whole
        assert all((x - y).float().norm() < 0.006 * y.float().norm() for x, y in zip(got, truth))


def test_all_ways_were_shipped():
    "The trees above are what their names say"
    def way(tree, narrow):
        return page._plan(pack(tree, 0, len(tree)), None, narrow)[0]
    assert {way(tree, narrow) for tree in (BIG, MANY, LONG) for narrow in (False, True)} == {"short", "even", "long"}
    assert way(MANY, True) == "even"
    blocks = page._plan(Layout(np.full(5000, 5000), np.arange(5000), 0), None, False)[1]
    assert len(blocks) == 1 and blocks[0][2][0].causal  # a chain is one call of the causal kernel


# shrinking would take minutes
SLOW = settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


@SLOW
@given(packs(), windows)
def test_flex_equals_the_reference(layout, window):
    inputs, up = draw(layout, 4, 2, 8)
    with setting(page, FLEX_BLOCK=8):
        close(run("flex", inputs, up, layout, window), run("reference", inputs, up, layout, window), 1e-12)


small = packs(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=25), min_size=3, max_size=6))

@settings(SLOW, max_examples=15)
@given(small, windows, st.sampled_from([(2, 1, 16), (2, 2, 20)]), st.sampled_from([torch.float32, torch.float16]))
def test_triton_equals_the_reference(layout, window, shape, dtype):
    inputs, up = draw(layout, *shape, dtype)
    with setting(triton_kernels, TABLE=SMALL):
        got, truth = run("triton", inputs, up, layout, window), run("reference", inputs, up, layout, window)
        close(got, truth, 1e-5 if dtype == torch.float32 else 0.01)


def test_triton_as_shipped():
    layout = pack(BIG, 300, 420)
    inputs, up = draw(layout, 2, 1, 24, torch.float32)
    close(run("triton", inputs, up, layout), run("reference", inputs, up, layout), 1e-5)


def test_triton_compiles_for_a_gpu(tmp_path):
    "The real compiler, for a GPU that isn't there: what the interpreter forgives, it doesn't"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(TRITON_CACHE_DIR=str(tmp_path))
    script = Path(__file__).parents[1] / "drills/compile_kernels.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.stdout.count("tensor cores") == 3, done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize("backend", ON_CPU)
def test_siblings_are_invisible_and_ancestors_are_not(backend):
    "Other keys and values at any one token change exactly the outputs of its subtree, bit for bit"
    tree = TokenTree.from_sequences([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 5, 7, 8], [1, 9], [4, 4]])
    layout = Layout(tree.end, tree.position, 0)
    (q, k, v), _ = draw(layout, 2, 1, 16, torch.float32)
    with torch.no_grad(), setting(triton_kernels, TABLE=SMALL):
        before = tree_attention(q, k, v, layout, 0.4, backend=backend)
        for t in range(0, len(tree), 3 if backend == "triton" else 1):
            k2, v2 = k.clone(), v.clone()
            k2[:, :, t] += 1
            v2[:, :, t] += 1
            after = tree_attention(q, k2, v2, layout, 0.4, backend=backend)
            changed = (after != before).any(-1).all(1)[0].numpy()
            assert np.array_equal(changed, (np.arange(len(tree)) >= t) & (np.arange(len(tree)) < tree.end[t]))
            assert np.array_equal((after != before).any(-1).any(1)[0].numpy(), changed)


@pytest.mark.parametrize("backend", ["segments", "triton"])
def test_a_sequence_in_packs(backend):
    "One pack, or several that read their ancestors as boundary: the same outputs, and gradients that add up"
    tree = TokenTree.from_sequences([[1] * 20, [1] * 8 + [2] * 9, [1] * 8 + [2] * 4 + [3] * 5])
    (q, k, v), up = draw(Layout(tree.end, tree.position, 0), 2, 1, 16, torch.float32)
    truth = run("reference", (q, k, v), up, Layout(tree.end, tree.position, 0))
    sums = [torch.zeros_like(x) for x in (q, q, k, v)]
    for a, b in [(0, 6), (6, 21), (21, len(tree))]:
        past, own = np.flatnonzero(tree.end[:a] > a), torch.arange(a, b)
        keys = torch.as_tensor(np.concatenate([past, np.arange(a, b)]))
        part = [x.detach().requires_grad_() for x in (q[:, :, a:b], k[:, :, keys], v[:, :, keys])]
        got = run(backend, part, up[:, :, a:b], pack(tree, a, b))
        for total, x, at in zip(sums, got, (own, own, keys, keys)):
            total.index_add_(2, at, x)
    close(sums, truth, 1e-5)


@settings(max_examples=60, deadline=None)
@given(packs(), windows, st.integers(1, 9), st.integers(1, 9))
def test_visible_blocks(layout, window, rows, columns):
    "No visible pair is skipped, and no hidden one is in a block that needs no mask"
    some, whole = visible_blocks(layout, rows, columns, window)
    seen = dense_mask(layout, window).numpy()
    for i, j in np.ndindex(*some.shape):
        block = seen[i * rows:(i + 1) * rows, j * columns:(j + 1) * columns]
        assert some[i, j] or not block.any()
        assert not whole[i, j] or (block.all() and block.shape[1] == columns)


def test_deep_trees():
    "A comb of 5,000 levels, and a pack at its end"
    n = 5000
    end, position = np.full(2 * n, 2 * n), np.arange(2 * n) // 2
    end[1::2] = np.arange(1, 2 * n, 2) + 1  # every second token is a leaf beside the spine
    position[1::2] += 1
    tree = TokenTree.from_sequences([[1] * (i + 1) + [0] for i in range(300)])
    for layout in (Layout(tree.end, tree.position, 0), pack(tree, 400, len(tree))):
        inputs, up = draw(layout, 2, 1, 8, torch.float32)
        close(run("segments", inputs, up, layout), run("reference", inputs, up, layout), 1e-4)
    _, blocks = page._plan(Layout(end, position, 0), None, False)
    assert blocks[-1][1] == 2 * n and sum(t.width for t in blocks[-1][2]) <= n + page.LONG_ROWS


def test_memory_is_proportional_to_tokens():
    "What the backward keeps: inputs, output and log-sum-exp on long paths, SHORT numbers a query on short ones"
    for tree in (BIG, LONG):
        layout, saved = pack(tree, 0, len(tree)), []
        inputs, _ = draw(layout, 4, 2, 16, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            tree_attention(*inputs, layout, 0.4, backend="segments")
        q, k, v = (x.numel() for x in inputs)
        assert sum(saved) <= q + k + v + max(q + 4 * layout.n, page.SHORT * 4 * layout.n)


def test_plans_are_made_once():
    layout = pack(BIG, 0, 300)
    (q, k, v), _ = draw(layout, 2, 1, 8, torch.float32)
    for _ in range(2):
        for window in (None, 9):
            tree_attention(q, k, v, layout, 0.4, window, "segments")
    assert len(layout._cache) == 2


def test_autocast_changes_nothing():
    layout = pack(LONG, 0, 900)
    inputs, up = draw(layout, 2, 1, 8, torch.float32)
    truth = run("segments", inputs, up, layout)
    with torch.autocast("cpu", torch.bfloat16):
        close(run("segments", inputs, up, layout), truth, 1e-6)


def test_choice_is_logged_once(caplog):
    page._say.cache_clear()
    layout = pack(BIG, 0, 100)
    (q, k, v), _ = draw(layout, 2, 1, 8, torch.float32)
    with caplog.at_level(logging.INFO, logger="kat.compute.tree_attention"):
        for _ in range(3):
            tree_attention(q, k, v, layout, 0.4)
    said = "tree attention: segments (the fastest on a CPU for every tree measured)"
    assert [record.getMessage() for record in caplog.records] == [said]
    elsewhere = torch.empty(1, 2, layout.n, 8, device="meta")  # a device without a kernel
    assert choose_backend(elsewhere, layout, None)[0] == "reference"


def test_bad_input():
    for args, text in [(([3, 2], [0, 1], 0), r"end\[0\] = 3"),
                       (([2, 2], [0, 1], 2), "at least one new token"),
                       (([2, 2], [0], 0), "one length"),
                       (([1, 1], [0, 1], 0), r"end\[1\] = 1"),
                       (([1, 2], [0, 1], 1), r"end\[0\] = 1"),
                       (([3, 3, 3], [1, 1, 2], 2), "one path")]:
        with pytest.raises(ValueError, match=text):
            Layout(*args)
    layout = pack(BIG, 0, 40)
    (q, k, v), _ = draw(layout, 2, 1, 8, torch.float32)
    three_over_two = q[:, :1].expand(-1, 3, -1, -1), k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1)
    for args, text in [((q, k, v[:, :, 1:]), "expected"),
                       (three_over_two, "multiple of K"),
                       ((q, k.double(), v), "one dtype"),
                       ((q[:, :, :5], k, v), "expected")]:
        with pytest.raises(ValueError, match=text):
            tree_attention(*args, layout, 0.4)
    with pytest.raises(ValueError, match="window 0"):
        tree_attention(q, k, v, layout, 0.4, window=0)
    with pytest.raises(ValueError, match="one of auto, reference"):
        tree_attention(q, k, v, layout, 0.4, backend="fast")
    with pytest.raises(ValueError, match="no backward on the CPU"):
        tree_attention(q, k, v, layout, 0.4, backend="flex")
    with pytest.raises(ValueError, match="does not know bfloat16"):
        tree_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout, 0.4, backend="triton")
    with pytest.raises(ValueError, match="head size 8 of torch.float64"):
        tree_attention(q.double(), k.double(), v.double(), layout, 0.4, backend="triton")


def test_triton_missing_or_not_interpreted(monkeypatch):
    triton = pytest.importorskip("triton")
    layout = pack(BIG, 0, 40)
    (q, k, v), _ = draw(layout, 2, 1, 8, torch.float32)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        tree_attention(q, k, v, layout, 0.4, backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtra, match=r"pip install -e '.*\[triton\]'"):
        tree_attention(q, k, v, layout, 0.4, backend="triton")


def test_every_backend_is_tested():
    assert set(BACKENDS) == set(ON_CPU)
