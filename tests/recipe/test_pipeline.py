"The pipeline: kill it in mid-stage, resume it, get the same; one writer; nothing finished is lost"
import io
import json
import os
import select
import signal
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from rich.console import Console

from kat.recipe.pipeline import ROOT, Bars, Lines, Progress, UserError, locked, make_plan, run_pipeline
from kat.recipe.presets import PRESETS

COUNT = '''
import os, pathlib, signal
from kat.recipe.pipeline import Progress, write_json
from kat.recipe.report import read_json
run = pathlib.Path(run_dir)
here, saved = run.parent/'here', run/'count.json'
state = read_json(saved, 'delete it') or dict(step=0, sum=seed)
p = Progress(run_dir, '00_count', steps, resume_step=state['step'])
for n in range(state['step'] + 1, steps + 1):
    state = dict(step=n, sum=state['sum'] + n*n)
    p.step(n, sum=state['sum'])
    if n % 2 == 0: write_json(saved, state)
    if n == 3 and here.exists():   # tell the test that step 3 is logged and not saved, and wait to be ended
        with here.open('w') as f: f.write(str(os.getpid()))
        signal.pause()
'''
SUM = '''
import json, pathlib
run = pathlib.Path(run_dir)
if (run.parent/'break').exists(): raise ValueError('first line\\nsecond line')
(run/'sum.txt').write_text(str(sum(json.loads(l)['sum'] for l in (run/'metrics.jsonl').open())))
'''
SUMS = [2, 6, 15, 31, 56]                                             # what COUNT logs with this preset
PRESET = {'00_count': dict(seed=1, steps=5), '10_sum': dict(seed=1)}
# the command itself, in a repository of two small stages
KAT = f'''
import sys
from pathlib import Path
import kat.recipe.pipeline as kp
kp.ROOT, kp.PRESETS['toy'] = Path(sys.argv.pop(1)), {PRESET}
from kat.cli import main
main()
'''

def stage(path, parameters, code):
    nb = new_notebook(cells=[new_code_cell(parameters, metadata=dict(tags=['parameters'])), new_code_cell(code)])
    nbformat.write(nb, path)

@pytest.fixture
def repo(tmp_path):
    (tmp_path/'nbs'/'runs').mkdir(parents=True)
    stage(tmp_path/'nbs/runs/00_count.ipynb', 'run_dir: str = ""\nseed: int = 0\nsteps: int = 2  # how far', COUNT)
    stage(tmp_path/'nbs/runs/10_sum.ipynb', 'run_dir: str = ""\nseed: int = 0', SUM)
    return tmp_path

def start(repo, *args):
    # a runner in the background passes an ignored Ctrl-C on to its children: give the command a terminal's default
    return subprocess.Popen([sys.executable, '-c', KAT, str(repo), 'pipeline', '--preset', 'toy', *args], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=repo,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err

def wait_for_kernel(command, fifo):
    "The kernel's process id, when the stage has reached step 3."
    fd = os.open(fifo, os.O_RDONLY|os.O_NONBLOCK)
    try:
        assert fd in select.select([fd, os.pidfd_open(command.pid)], [], [], 300)[0], command.communicate()
        return int(os.read(fd, 20))
    finally:
        os.close(fd)

def ended(pidfd):
    return bool(select.select([pidfd], [], [], 60)[0])

def metrics(run):
    lines = [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]
    return [(line['stage'], line['step'], line['sum']) for line in lines]

def snapshot(folder, but=()):
    files = [path for path in folder.rglob('*') if path.is_file() and not {path.name, path.parent.name} & {*but}]
    return {path: path.read_bytes() for path in files}

def check(run):
    assert metrics(run) == [('00_count', n, logged) for n, logged in enumerate(SUMS, 1)]
    assert (run/'sum.txt').read_text() == str(sum(SUMS))
    assert (run/'report.html').exists() and not list(run.glob('*.running.ipynb')) + list(run.glob('*.failed.ipynb'))


def test_killed_interrupted_and_resumed_is_the_same(repo):
    run, fifo = repo/'data/runs/toy', repo/'data/runs/here'
    run.parent.mkdir(parents=True)
    os.mkfifo(fifo)

    first = start(repo)
    kernel = os.pidfd_open(wait_for_kernel(first, fifo))
    before = snapshot(run)
    code, out, err = finish(start(repo))                              # a second command on the same folder
    assert (code, out) == (2, '') and str(first.pid) in err and err.count('\n') == 1
    assert snapshot(run) == before
    first.kill()                                                      # SIGKILL: nothing of ours can clean up
    assert finish(first)[0] == -signal.SIGKILL and ended(kernel)
    assert len(metrics(run)) == 3 and json.loads((run/'count.json').read_text())['step'] == 2

    second = start(repo)                                              # at once; it comes to step 3 again
    kernel = os.pidfd_open(wait_for_kernel(second, fifo))
    second.send_signal(signal.SIGINT)
    code, out, err = finish(second)
    assert code == 130 and 'same command' in err and err.count('\n') == 1 and ended(kernel)

    fifo.unlink()
    code, out, err = finish(start(repo))
    assert (code, err) == (0, ''), err
    assert out.splitlines()[-1] == 'report: data/runs/toy/report.html'
    check(run)
    done = json.loads((run/'00_count.done.json').read_text())
    assert done['resumed'] and done['wall_s'] > 0 and done['peak_rss_mb'] > 10

    before = snapshot(run, but=('lock', 'owners'))   # other settings are refused and touch nothing
    code, out, err = finish(start(repo, '--seed', '2', '-p', '00_count.steps=9'))
    assert code == 2 and '00_count.steps: 5 there, 9 now' in err and '--name' in err and err.count('\n') == 1
    assert snapshot(run, but=('lock', 'owners')) == before


def test_a_failed_cell_leaves_what_was_finished(repo):
    run, stages, log = repo/'runs'/'r', repo/'nbs'/'runs', io.StringIO()
    run.parent.mkdir()
    (run.parent/'break').touch()
    with pytest.raises(Exception) as caught:
        run_pipeline(PRESET, run, stages, console=Console(file=log))
    assert str(caught.value) == '10_sum: cell [3]: ValueError: first line second line'
    assert caught.value.saved == run/'10_sum.failed.ipynb' and caught.value.saved.exists()
    before = snapshot(run)
    (run.parent/'break').unlink()
    run_pipeline(PRESET, run, stages, console=Console(file=log))      # runs only the second stage
    check(run)
    assert all((run/f'00_count{x}').read_bytes() == before[run/f'00_count{x}'] for x in ('.ipynb', '.done.json'))
    assert not json.loads((run/'00_count.done.json').read_text())['resumed']
    assert 'finished before' in log.getvalue()

    page = (run/'report.html').read_bytes()                           # from here on nothing is executed
    run_pipeline(PRESET, run, stages, console=Console(file=log))
    assert (run/'report.html').read_bytes() == page
    stage(stages/'00_count.ipynb', 'run_dir: str = ""\nseed: int = 0\nsteps: int = 2', COUNT + '\n# edited')
    with pytest.raises(UserError, match='the notebook of 00_count changed'):
        run_pipeline(PRESET, run, stages)
    (run/'00_count.done.json').write_text('{')
    with pytest.raises(UserError, match='00_count.done.json is damaged'):
        run_pipeline(PRESET, run, stages)
    (run/'00_count.done.json').unlink()
    with pytest.raises(UserError, match='10_sum has finished, but 00_count'):
        run_pipeline(PRESET, run, stages)
    (run/'config.json').write_text('')
    with pytest.raises(UserError, match='config.json is damaged'):
        run_pipeline(PRESET, run, stages)


def test_a_lock_held_by_an_orphan_is_respected(tmp_path):
    (tmp_path/'r').mkdir()
    code = f'''
import subprocess
from pathlib import Path
from kat.recipe.pipeline import locked
with locked(Path({str(tmp_path/'r')!r})) as fd:
    print(subprocess.Popen(['cat'], stdin=0, pass_fds=[fd], stdout=2).pid)
'''
    reads, writes = os.pipe()
    command = subprocess.run([sys.executable, '-c', code], stdin=reads, stdout=subprocess.PIPE, text=True, check=True)
    pid = command.stdout.strip()
    os.close(reads)
    orphan = os.pidfd_open(int(pid))
    with pytest.raises(UserError, match=f'left over from a dead command .process {pid}.'):
        with locked(tmp_path/'r', patience=0):
            pass
    os.close(writes)                                                  # `cat` reads its end of file and goes
    with locked(tmp_path/'r', patience=30):
        assert ended(orphan)


def test_a_foreign_folder_is_not_taken_over(repo):
    (repo/'mine').mkdir()
    (repo/'mine'/'thesis.tex').touch()
    for path in repo/'mine', repo/'mine'/'thesis.tex':
        with pytest.raises(UserError, match='in the way'):
            run_pipeline(PRESET, path, repo/'nbs/runs')
    assert [path.name for path in (repo/'mine').iterdir()] == ['thesis.tex']


def test_plans(repo):
    stages = repo/'nbs'/'runs'
    plan = make_plan(PRESET, stages, ['seed=4', '00_count.steps=7'])
    assert plan == {'00_count': dict(seed=4, steps=7), '10_sum': dict(seed=4)}
    assert PRESET['00_count']['steps'] == 5                           # the preset itself stays
    for preset, pairs, parts in [
            ('none', [], ["unknown preset 'none'", 'smoke', 'tiny']),
            (PRESET, ['stpes=3'], ["'stpes'", 'did you mean steps', 'seed']),
            (PRESET, ['10_sum.steps=3'], ["'steps' of 10_sum", 'seed']),
            (PRESET, ['20_sft.steps=3'], ["stage '20_sft'", '10_sum']),
            (PRESET, ['steps=3.5'], ['steps=3.5', 'int']), (PRESET, ['run_dir=x'], ["'run_dir'"]),
            ({'00_count': dict(seed=1)}, [], ['00_count', 'steps']), ({'30_rft': {}}, [], ['30_rft.ipynb'])]:
        with pytest.raises(UserError) as caught:
            make_plan(preset, stages, pairs)
        said = str(caught.value)
        assert all(part in said for part in parts) and '\n' not in said, said
    with pytest.raises(UserError, match='clone of the repository'):
        make_plan('tiny', repo/'elsewhere', [])

@pytest.mark.parametrize('preset', PRESETS)
def test_presets_are_complete_and_name_only_what_exists(preset):
    make_plan(preset, ROOT/'nbs'/'runs', [])


def test_metrics_are_rewound_exactly(tmp_path):
    path = tmp_path/'metrics.jsonl'
    first = Progress(tmp_path, 'a', 3)
    for n in 1, 2, 3:
        first.step(n, x=n)
    of_a = path.read_bytes()
    second = Progress(tmp_path, 'b', 4)
    for n in 1, 2, 3:
        second.step(n, x=float('nan'), y=1)
    two = path.read_bytes().splitlines(keepends=True)[:5]
    path.write_bytes(path.read_bytes() + b'{"stage": "b", "st')        # killed while writing
    Progress(tmp_path, 'b', 4, resume_step=2)
    assert path.read_bytes() == b''.join(two) and json.loads(two[4])['x'] == {'$float': 'nan'}
    Progress(tmp_path, 'b', 4)
    assert path.read_bytes() == of_a
    path.write_bytes(b'oops\n' + of_a)
    with pytest.raises(UserError, match='metrics.jsonl:1: '):
        Progress(tmp_path, 'b', 4)

def test_progress_refuses_steps_out_of_order(tmp_path):
    progress = Progress(tmp_path, 'a', 3, resume_step=1)
    progress.step(2)
    progress.step(2, extra=1)
    for n in 1, 4:
        with pytest.raises(ValueError, match=f'a: step {n} after step 2 of 3'):
            progress.step(n)
    assert json.loads((tmp_path/'progress.json').read_text())['step'] in (1, 2)


def test_bars_and_lines():
    for display, width in (Bars, 120), (Bars, 60), (Lines, 80):
        file = io.StringIO()
        console = Console(file=file, force_terminal=display is Bars, width=width)
        with (Bars(['a', 'b'], console) if display is Bars else Lines(console, every=0)) as shown:
            shown.start('a')
            for n in 1, 2, 3, 3:
                shown.step('a', n, 4, 'loss 0.1')
            shown.done('a', 'finished in 0:02')
            shown.start('b')
        text = file.getvalue()
        assert 'ETA' in text and ('3/4' in text or '4/4' in text)
    assert text.splitlines()[0] == 'a: started' and text.splitlines()[-2:] == ['a: finished in 0:02', 'b: started']
    assert text.count('a: step 3/4, ETA 0:00, loss 0.1\n') == 1      # once, though it was told twice
