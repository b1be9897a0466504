"What importing the tree engine brings along: PyTorch and this project. Nothing is timed: see benchmarks/imports.py."
import os
import subprocess
import sys

import pytest
import torch

ENGINE = "import kat.compute.engine"
ALL = "from kat.compute import cost, engine, layout, logprob, router, tree_attention, triton_kernels"
ATTEND = """
import torch
from kat.compute.tree_attention import Layout, tree_attention
x = torch.ones(1, 1, 3, 4, requires_grad=True)
tree_attention(x, x, x, Layout([3, 3, 3], [0, 1, 2], 0), 0.5).sum().backward()
"""
TRAIN = """
from tree_models import make
from kat.compute.engine import TreeEngine
from kat.tree.trie import TokenTree
TreeEngine(make("llama")).forward_backward(TokenTree.from_sequences([[1, 2, 3], [1, 4]]), lambda e: -e.logprob.sum())
"""
HEAVY = ("triton", "transformers", "torch._inductor", "torch._dynamo", "torch.nn.attention.flex_attention", "sympy",
         "accelerate", "sklearn", "scipy", "pandas", "pyarrow", "matplotlib", "datasets", "peft", "trl")


def brought(code, before="import torch"):
    "Of `HEAVY`, what is loaded by `code` in a fresh Python, and was not by what stands before it."
    script = f"import sys\n{before}\nknown = set(sys.modules)\n{code}\nprint(*set(sys.modules) - known)"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & set(HEAVY)


@pytest.mark.parametrize("code", [ENGINE, ALL, ATTEND], ids=["engine", "all pages", "attention"])
def test_imports_are_light(code):
    "No triton, no transformers and no compiler, not even when the CPU's attention has been chosen and has run."
    assert not brought(code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU FlexAttention is compiled, and triton is its compiler")
def test_training_on_a_cpu_loads_nothing_more():
    "Beside what transformers' own models bring."
    assert not brought(TRAIN, before="from tree_models import make\nimport transformers.modeling_utils\nmake('llama')")
