"""Kill the pipeline in every stage and resume it: `make drill`.

Runs `kat pipeline --preset smoke` once undisturbed, and once killed (SIGKILL to the pipeline) at a random moment of
every stage, resumed each time with the same command. Both must end with the same metrics and the same weights, to the
bit.
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
    kat = [sys.executable, '-c', 'from kat.cli import main; main()']
    options = ['--preset', 'smoke', '--runs', str(runs), '--name', name]
    return subprocess.Popen([*kat, 'pipeline', *options], stdout=subprocess.DEVNULL)


def wait_for(run: Path, stage: str, command: subprocess.Popen) -> None:
    "Until the stage is under way (its notebook's kernel has reported), or the pipeline has ended."
    while command.poll() is None:
        if (run / f'{stage}.done.json').exists(): return
        try:
            if json.loads((run / 'progress.json').read_text())['stage'] == stage: return
        except (FileNotFoundError, ValueError):
            pass
        time.sleep(0.05)


def outcome(run: Path) -> dict:
    "What must not depend on interruptions: metrics without times, weights, evaluations."
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name != 'wall_s'} for line in lines]
    weights = {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
               for path in sorted(run.glob('*/model/*.safetensors'))}
    evals = {path.name: json.loads(path.read_text()) for path in sorted((run / 'eval').glob('*.json'))}
    return dict(metrics=metrics, weights=weights, evals=evals)


def main() -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as tmp:
        runs = Path(tmp)
        began = time.monotonic()
        if start(runs, 'whole').wait() != 0:
            sys.exit('the undisturbed run failed')
        print(f'undisturbed: {time.monotonic() - began:.0f} s', flush=True)
        for stage in PRESETS['smoke']:
            command = start(runs, 'killed')
            wait_for(runs / 'killed', stage, command)
            time.sleep(rng.random() * 2)
            if command.poll() is None:
                os.kill(command.pid, signal.SIGKILL)
            command.wait()
            print(f'killed in {stage}', flush=True)
        if start(runs, 'killed').wait() != 0:
            sys.exit('the resumed run failed')
        whole, killed = outcome(runs / 'whole'), outcome(runs / 'killed')
        for what in whole:
            if whole[what] != killed[what]:
                sys.exit(f'{what} differ between the undisturbed and the killed run')
        print(f'same metrics ({len(whole["metrics"])} lines), same weights ({len(whole["weights"])} checkpoints), '
              'same evaluations')


if __name__ == '__main__':
    main()
