"""Kill the pipeline in every stage and resume it: `make drill`.

Runs `kat pipeline --preset smoke` once undisturbed, and once killed (SIGKILL to the pipeline) at a random moment of every stage, resumed each
time with the same command. Both must end with the same metrics and the same weights, to the bit.
"""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kat.recipe.presets import PRESETS


def start(runs: Path, name: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-c', 'from kat.cli import main; main()', 'pipeline', '--preset', 'smoke', '--runs', str(runs),
                             '--name', name], stdout=subprocess.DEVNULL)


def wait_for(run: Path, stage: str, p: subprocess.Popen) -> None:
    "Until the stage is under way (its notebook's kernel has reported), or the pipeline has ended."
    while p.poll() is None:
        if (run / f'{stage}.done.json').exists(): return
        try:
            if json.loads((run / 'progress.json').read_text())['stage'] == stage: return
        except (FileNotFoundError, ValueError):
            pass
        time.sleep(0.05)


def outcome(run: Path) -> dict:
    "What must not depend on interruptions: metrics without times, weights, evaluations."
    lines = [json.loads(l) for l in (run / 'metrics.jsonl').read_text().splitlines()]
    weights = {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(run.glob('*/model/*.safetensors'))}
    evals = {f.name: json.loads(f.read_text()) for f in sorted((run / 'eval').glob('*.json'))}
    return dict(metrics=[{k: v for k, v in l.items() if k != 'wall_s'} for l in lines], weights=weights, evals=evals)


def main() -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as tmp:
        runs = Path(tmp)
        began = time.monotonic()
        p = start(runs, 'whole')
        if p.wait() != 0:
            sys.exit('the undisturbed run failed')
        print(f'undisturbed: {time.monotonic() - began:.0f} s', flush=True)
        for stage in PRESETS['smoke']:
            p = start(runs, 'killed')
            wait_for(runs / 'killed', stage, p)
            time.sleep(rng.random() * 2)
            if p.poll() is None:
                os.kill(p.pid, signal.SIGKILL)
            p.wait()
            print(f'killed in {stage}', flush=True)
        if start(runs, 'killed').wait() != 0:
            sys.exit('the resumed run failed')
        a, b = outcome(runs / 'whole'), outcome(runs / 'killed')
        for k in a:
            if a[k] != b[k]:
                sys.exit(f'{k} differ between the undisturbed and the killed run')
        print(f'same metrics ({len(a["metrics"])} lines), same weights ({len(a["weights"])} checkpoints), same evaluations')


if __name__ == '__main__':
    main()
