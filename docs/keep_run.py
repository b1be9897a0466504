"""Keep what a finished run printed and drew, small, for the site's pages of the recipe: `make pages`

    python docs/keep_run.py data/runs/tiny

Writes `docs/run/run.json` (per stage: its seconds, and what each cell printed) and copies the run's figures beside it.
`docs/bridge.py` puts them under the cells of `nbs/runs`.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT/'docs'/'run'
FIGURES = {'10_midtrain': ['stage_mid'], '20_sft': ['stage_sft'], '30_rft': ['stage_rft'], '40_rl': ['stage_rl'],
           '50_evaluate': ['1_stages', '2_families', '3_learning'], '60_emergence': ['4_emergence']}
_NOISE = re.compile(r'.*(?:\r|Warning:|Loading weights|^\s*from \.autonotebook).*\n?', re.M)


def printed(cell):
    "What a cell printed or showed: [kind, text] each, without progress bars and warnings of others"
    found = []
    for output in cell.get('outputs', []):
        if output['output_type'] == 'error': raise SystemExit(f'cell {cell["id"]} ended in an error')
        data = output.get('data', {})
        kind = 'markdown' if 'text/markdown' in data else 'plain'
        text = output.get('text', '') if output.get('name') == 'stdout' else data.get(f'text/{kind}', '')
        text = _NOISE.sub('', ''.join(text)).strip('\n')
        if not text or text.startswith('PosixPath('): continue
        if found and found[-1][0] == kind == 'plain':
            found[-1][1] += f'\n{text}'
        else:
            found.append([kind, text])
    return found


def read_stage(run, name):
    "Seconds of a stage and the outputs of its cells"
    done, notebook = run/f'{name}.done.json', run/f'{name}.ipynb'
    if not done.exists() or not notebook.exists(): raise SystemExit(f'{run}: stage {name} has not finished')
    cells = json.loads(notebook.read_text())['cells']
    said = {cell['id']: found for cell in cells if cell['cell_type'] == 'code' if (found := printed(cell))}
    return dict(seconds=json.loads(done.read_text())['wall_s'], outputs=said, figures=FIGURES.get(name, []))


def main(run):
    config = json.loads((run/'config.json').read_text())
    stages = {name: read_stage(run, name) for name in config['stages']}
    asked = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir()
    for figure in [figure for stage in stages.values() for figure in stage['figures']]:
        for ending in ('png', 'txt'):
            shutil.copy(run/'figures'/f'{figure}.{ending}', KEPT)
    command = f'kat pipeline --preset {config["preset"]} --seed {config["stages"]["40_rl"]["seed"]}'
    kept = dict(command=command, commit=asked.stdout.strip(), machine=config['machine'], stages=stages)
    (KEPT/'run.json').write_text(json.dumps(kept, indent=1, ensure_ascii=False) + '\n')
    print(f'{KEPT}: {len(stages)} stages')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
