"""Release tasks solved by the scripted expert, end to end: agent over HTTP, gateway, recorded tree, sandbox, grader.

    python tests/drills/release_expert.py FOLDER TASK [TASK …]

FOLDER is a task set (`kat tasks fetch`). Prints a line a task; ends with 1 where one isn't resolved."""
import sys
import time
from pathlib import Path

from kat.tasks.swe import Software, plain_task
from kat.learn.training import load_tokenizer
from kat.recipe.pipeline import ROOT
from kat.recipe.rollouts import expert_data

def main(folder, names):
    world, tokenizer, failed = Software(), load_tokenizer(ROOT / 'data/base'), 0
    with world.open(workers=1) as make_env:
        for name in names:
            begun = time.monotonic()
            played, = expert_data(world, tokenizer, [plain_task(Path(folder, name))], make_env, seed=0,
                                  max_len=400_000, max_turns=1000)
            solved = played.reward == 1
            failed += not solved
            turns, tokens = len(played.info['turns']), sum(turn['tokens'] for turn in played.info['turns'])
            print(f'{name:32} {"resolved" if solved else "NOT resolved"}  {turns} turns, {tokens:,} tokens, '
                  f'{time.monotonic() - begun:.0f} s', '' if solved else f'({played.info["finish"]})', flush=True)
    return int(failed > 0)

if __name__ == '__main__':
    sys.exit(main(sys.argv[1], sys.argv[2:]))
