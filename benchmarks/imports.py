"""How long the tree engine takes to import, against its foundations: `python benchmarks/imports.py` (two minutes)

`import kat.compute.engine` beside `import torch, transformers.modeling_utils`, each in a Python of its own, in turns.
Prints the median of ten pairs' ratios; CPU seconds of the process, so that other work on the machine counts little. To
see where they go: `python -X importtime -c "import kat.compute.engine"`."""
import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

OURS, FOUNDATIONS = "import kat.compute.engine", "import torch, transformers.modeling_utils"


def seconds(code):
    "CPU seconds of a fresh Python that runs `code`."
    root = str(Path(__file__).parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    script = f"{code}\nimport time\nprint(time.process_time())"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    pairs = parser.parse_args().pairs
    for code in (OURS, FOUNDATIONS):  # compiled to bytecode, read from the disk once
        seconds(code)
    times = [(seconds(OURS), seconds(FOUNDATIONS)) for _ in range(pairs)]
    ours, theirs = (statistics.median(each) for each in zip(*times))
    ratios = [a / b for a, b in times]
    print(f"{OURS}: {ours:.2f} CPU seconds\n{FOUNDATIONS}: {theirs:.2f}\n"
          f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f}), median of {pairs} pairs")


if __name__ == "__main__":
    main()
