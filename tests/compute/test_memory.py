"Peak memory doesn't grow with the tree: counted in bytes of live tensors, so the numbers are the same every time."
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from memory import PeakMemory, paths_tree, peak_of, small_model

import torch


def test_peak_is_flat_in_the_size_of_the_tree():
    model = small_model()
    peaks = [peak_of(model, paths_tree(64, paths), 16) for paths in (4, 16, 64)]
    assert max(peaks) <= 1.1 * min(peaks), peaks


def test_the_counter_counts():
    with PeakMemory() as m:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100)
        c += 1
    assert m.peak == 8000 and m.live == 4000
