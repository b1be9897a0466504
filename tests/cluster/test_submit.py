"Launchers from the command line: one line for a mistake, a dry run without a trace, a sweep's table, Slurm's silence"
import json
import os
import sys
import threading

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kat.cluster.lease import LeaseOwner, take_lease
from kat.cluster.spawn import RankFailed, RankJob, _tell_end
from kat.cluster.submit import Launch, _fresh, check_launch, follow_slurm, launch
from kat.core.io import UserError


@pytest.fixture
def notebook(tmp_path):
    declared = new_code_cell('lr: float = 0.1\nfail: bool = False', metadata=dict(tags=['parameters']))
    code = 'from kat.cluster.sweep import report_metrics\nassert not fail, "it diverged"\nreport_metrics(loss=lr*2)'
    (tmp_path/'src').mkdir()
    nbformat.write(new_notebook(cells=[declared, new_code_cell(code)]), tmp_path/'src'/'study.ipynb')
    return str(tmp_path/'src'/'study.ipynb')


def everything(folder):
    return sorted(os.path.join(base, name) for base, _, names in os.walk(folder) for name in names)


@pytest.mark.parametrize('args, parts', [
    ('--launcher slurn', ["unknown launcher 'slurn'", 'did you mean slurm']), ('--nproc 4000', ['4000', 'or fewer']),
    ('--launcher torchrun --nproc 4000', ['--nproc 4000']), ('--nodes 2', ['--nodes 2', '--launcher slurm']),
    ('--launcher local --gres gpu:1', ['--gres gpu:1']), ('--sweep fails=true', ["'fails' of", 'mean fail']),
    ('--launcher local -o x.ipynb', ['it is a folder']), ('--nproc 0', ['at least 1'])])
def test_mistakes_are_one_line_and_nothing_is_written(cli, notebook, tmp_path, args, parts):
    before = everything(tmp_path)
    code, out, err = cli('run', notebook, *args.split())
    assert (code, out) == (2, '') and err.count('\n') == 1 and all(part in err for part in parts), err
    assert everything(tmp_path) == before


@pytest.mark.parametrize('tool', ['slurm', 'ray'])
def test_a_missing_tool_is_one_line(tool, monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises((UserError, ImportError), match='no sbatch on this machine|ray is not installed: pip install'):
        check_launch(Launch(tool))


@pytest.mark.parametrize('args', ['', '--launcher local --nproc 1', '--launcher torchrun', '--sweep lr=1,2'])
def test_a_dry_run_says_all_and_writes_nothing(cli, notebook, tmp_path, args):
    before = everything(tmp_path)
    out_file = 'out.ipynb' if not args else 'out'
    code, out, err = cli('run', notebook, *args.split(), '--dry-run', '-o', str(tmp_path/out_file))
    assert (code, err) == (0, '') and everything(tmp_path) == before
    assert {line.split()[0] for line in out.splitlines()} == {'run', 'write'} and str(tmp_path/out_file) in out


def test_what_a_dry_run_names_is_what_a_sweep_writes(cli, notebook, tmp_path):
    "Two points, one of which fails"
    args = 'run', notebook, '--sweep', 'fail=false,true', '-o', str(tmp_path/'out')
    planned = {line.split(maxsplit=1)[1] for line in cli(*args, '--dry-run')[1].splitlines() if line[:5] == 'write'}
    code, out, err = cli(*args)
    assert code == 1 and [line.split() for line in out.splitlines()] == [
        ['fail', 'loss', 'failed'], ['False', '0.2'], ['True', '–', 'yes']]
    assert 'fail=True: FAILED: study: rank 0 of 1' in err and 'AssertionError: it diverged' in err
    written = {path for path in everything(tmp_path/'out') if 'fail=False' in path}
    numbered = {path.replace('000001.json', 'NUMBER.json') for path in written}
    assert numbered == {path for path in planned if 'fail=False' in path}
    assert json.loads((tmp_path/'out'/'table.json').read_text())[0]['metrics'] == dict(loss=.2)


def test_a_folder_that_another_host_writes_is_refused(notebook, tmp_path):
    take_lease(tmp_path/'run', LeaseOwner('far', 'other', 1, 1, 'noon'))
    (held := tmp_path/'run'/'owners'/'000001.json').touch()
    stop = threading.Event()
    beats = threading.Thread(target=lambda: [os.utime(held) for _ in iter(lambda: stop.wait(.02), True)])
    beats.start()
    try:
        with pytest.raises(UserError, match='is being written by process 1 on far since noon'):
            launch(notebook, tmp_path/'run', {}, Launch())
    finally:
        stop.set()
        beats.join()
    assert not (tmp_path/'run'/'job.json').exists()


def test_a_slurm_job_that_is_gone_is_judged_by_what_its_ranks_said(tmp_path):
    "Slurm is a list of states here; `make slurm` has the real one"
    def follow(*states, deadline=300.):
        states, lines = iter(states), []
        def state(number, name):
            if isinstance(now := next(states), Exception): raise now
            return now
        follow_slurm(job, '7', lines.append, every=0, deadline=deadline, state=state)
        return lines
    job = RankJob('n.ipynb', str(tmp_path), {}, ranks=2)
    with pytest.raises(UserError, match='no word of Slurm job 7 for 0 s .squeue: down.*follows it again'):
        follow('RUNNING', *[OSError('squeue: down')]*9, deadline=0)
    for rank in range(2):
        _tell_end(job, rank, dict(code=0, died=False, at=1.))
    assert follow('PENDING (Resources)', OSError('busy'), 'RUNNING', 'RUNNING', '') == [
        f'Slurm job 7: {state}' for state in ('PENDING (Resources)', 'RUNNING', 'gone')]
    _tell_end(job, 1, dict(code=1, died=False, at=1., ename='ValueError', evalue='bad', cell=3, line=2, text='x'))
    with pytest.raises(RankFailed, match=r'rank 1 of 2 .* cell \[3\], line 2 \(`x`\): ValueError: bad'):
        follow('')


def test_every_submission_has_a_folder_of_its_own(tmp_path):
    assert [_fresh(tmp_path).name for _ in range(3)] == ['0001', '0002', '0003']


def test_a_job_that_was_cancelled_is_no_success(tmp_path):
    from kat.cluster.spawn import RankJob, _tell_end
    from kat.cluster.submit import _look_at
    job = RankJob('n.ipynb', str(tmp_path), {}, ranks=2)
    for rank in range(2):
        _tell_end(job, rank, dict(code=0, died=False, at=1.))
    assert _look_at(job, '7', 0.) is None
    _tell_end(job, 1, dict(code=143, ended=True, at=2.))
    with pytest.raises(UserError, match='Slurm job 7 was ended from outside .* before rank 1 was done'):
        _look_at(job, '7', 0.)
