"Several ranks of one notebook: the root cause is named, the others end, nothing is left over"
import os
import signal
import subprocess
import sys
import textwrap
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from kat.cluster.spawn import RankFailed, RankJob, check_gang, failure_of, raise_cause, read_ends, root_cause, run_ranks
from kat.core.io import UserError

RANK = 'import os, time\nfrom pathlib import Path\nrank = int(os.environ["RANK"])'


def job_of(tmp_path, *code, ranks=2, **parameters):
    declared = new_code_cell('there: str = ""', metadata=dict(tags=['parameters']))
    nbformat.write(new_notebook(cells=[declared, *map(new_code_cell, (RANK, *code))]), tmp_path/'two.ipynb')
    return RankJob(str(tmp_path/'two.ipynb'), str(tmp_path/'run'), dict(there=str(tmp_path), **parameters), ranks)


def gone(pid):
    try:
        state = open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0]
    except OSError:
        return True
    return state in 'ZX'


def wait_for(done, seconds=60):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, 'nothing came'
        time.sleep(.05)


def test_the_rank_that_failed_first_is_blamed_and_the_others_end(tmp_path):
    "Rank 1 raises in a function that cell 5 calls (papermill's own cell counts); rank 0 would wait for ever"
    job = job_of(tmp_path, 'def step():\n    (Path(there)/f"pid{rank}").write_text(str(os.getpid()))\n'
                 '    while not (rank == 1 and (Path(there)/"pid0").exists()): time.sleep(.02)\n'
                 '    raise KeyError("lost")', 'x = 1\nstep()')
    with pytest.raises(RankFailed) as caught:
        run_ranks(job, 'torchrun')
    error = caught.value
    assert (error.rank, error.cell, error.line, error.text) == (1, 5, 2, 'step()')
    assert (error.ename, error.code) == ('KeyError', 1)
    assert 'rank 1 of 2' in str(error) and 'cell [5], line 2 (`step()`)' in str(error)
    assert error.saved.name == 'rank-1.failed.ipynb' and error.saved.exists()
    wait_for(lambda: gone((tmp_path/'pid0').read_text()) and gone((tmp_path/'pid1').read_text()))


def test_a_killed_kernel_is_blamed_and_not_the_rank_that_lost_its_peer(tmp_path):
    "Rank 0 raises as soon as rank 1's kernel is gone, which is before rank 1's own process has noticed"
    job = job_of(tmp_path, 'mine = Path(there)/f"pid{rank}"\nmine.write_text(str(os.getpid()))\n'
                 'if rank == 1: os.kill(os.getpid(), 9)',
                 'other = Path(there)/"pid1"\nwhile not other.exists(): time.sleep(.02)\n'
                 'while Path("/proc/"+other.read_text()).exists(): time.sleep(.01)\nraise ConnectionError("peer")')
    with pytest.raises(RankFailed) as caught:
        run_ranks(job)
    assert caught.value.rank == 1 and caught.value.ename == 'dead', caught.value
    assert {rank: said['ename'] for rank, said in read_ends(job).items()}[1] == 'dead'


def test_a_killed_rank_process_is_blamed_with_its_signal(tmp_path):
    job = job_of(tmp_path, 'if rank == 1: os.kill(os.getppid(), 9)\ntime.sleep(600)')
    with pytest.raises(RankFailed, match='rank 1 of 2.*killed by SIGKILL') as caught:
        run_ranks(job)
    assert caught.value.code == 137


def test_ranks_see_each_other_and_an_earlier_attempt_leaves_nothing(tmp_path):
    (tmp_path/'run').mkdir()
    for stale in 'rank-0.failed.ipynb', 'rank-7.ipynb', 'rank-7.end.json':
        (tmp_path/'run'/stale).write_text('{}')
    job = job_of(tmp_path, 'print(rank, os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"])')
    used = run_ranks(job)
    assert [one['rank'] for one in used] == [0, 1] and all(one['wall_s'] > 0 for one in used)
    assert {path.name for path in (tmp_path/'run').iterdir()} == {path.name for path in job.files()}
    for rank in range(2):
        saved = nbformat.read(job.file(rank, 'ipynb'), as_version=4)
        assert saved.cells[-1].outputs[0].text == f'{rank} 2 127.0.0.1\n'
        assert f'rank {rank} of 2' in job.file(rank, 'log').read_text()


def test_a_users_mistake_in_a_rank_is_a_mistake_of_the_user(tmp_path):
    job = RankJob('two.ipynb', str(tmp_path), {})
    with pytest.raises(UserError, match='two: no model there'):
        raise_cause(job, dict(failure_of(UserError('two: no model there')), rank=0, host='here'))


def test_ranks_and_kernels_die_with_a_killed_launcher(tmp_path):
    job = job_of(tmp_path, '(Path(there)/f"pid{rank}").write_text(f"{os.getpid()} {os.getppid()}")\ntime.sleep(600)')
    code = textwrap.dedent(f'''
        from kat.cluster.spawn import RankJob, run_ranks
        run_ranks(RankJob({job.notebook!r}, {job.folder!r}, {job.parameters!r}, 2))''')
    launcher = subprocess.Popen([sys.executable, '-c', code])
    try:
        wait_for(lambda: all((tmp_path/f'pid{r}').exists() and (tmp_path/f'pid{r}').read_text() for r in range(2)))
    finally:
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.wait()
    pids = [pid for r in range(2) for pid in (tmp_path/f'pid{r}').read_text().split()]
    wait_for(lambda: all(map(gone, pids)))


def test_root_cause_among_words(tmp_path):
    "No word before a dead kernel before the earliest exception; what was ended is never to blame"
    from kat.cluster.spawn import _tell_end
    job = RankJob('n.ipynb', str(tmp_path), {}, ranks=4)
    _tell_end(job, 0, dict(code=143, ended=True, at=0.))
    _tell_end(job, 1, dict(code=1, died=False, at=5., ename='E', evalue=''))
    _tell_end(job, 2, dict(code=1, died=False, at=4., ename='E', evalue=''))
    assert root_cause(job, ended={3})['rank'] == 2
    assert root_cause(job, codes={3: -9})['code'] == 137
    _tell_end(job, 3, dict(code=0, died=False, at=1.))
    assert root_cause(job)['rank'] == 2
    _tell_end(job, 1, dict(code=1, died=True, at=9., ename='dead', evalue=''))
    assert root_cause(job)['rank'] == 1


def test_a_gang_must_fit():
    with pytest.raises(UserError, match='--nproc 9: this machine has 8 GPUs'):
        check_gang(9, cores=64, gpus=8)
    with pytest.raises(UserError, match='at least one'):
        check_gang(0)
    check_gang(2, cores=2, gpus=0)
