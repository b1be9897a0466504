"""Slurm for real: Debian's packages, two slurmd on this host with made-up GPUs; submit, preempt, requeue, resume, die.

`make slurm`. It needs root and Debian's slurmctld, slurmd, slurm-client and munge, which it installs. Where that can't
be, it says so. Everything it starts it ends, by process id.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

PACKAGES = 'slurmctld', 'slurmd', 'slurm-client', 'munge'
CONF = '''
ClusterName=kat
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmctldPort=16817
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
KillWait=5
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=1 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[16821-16822]
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF State=UP
'''
PARAMETERS = "steps: int = 8\npause: float = .5\nrun_dir: str = ''\nwrong: int = -1  # the rank that raises"
TRAIN = '''import json, os, time
from pathlib import Path
from kat.cluster.sweep import report_metrics
rank = int(os.environ['RANK'])
if rank == wrong: raise ArithmeticError('no gradient')
saved = Path(run_dir)/f'checkpoint-{rank}.json'
step, weight = json.loads(saved.read_text()) if saved.exists() else (0, 1.)
began = step
while step < steps:
    step, weight = step + 1, weight*.9 + .01*(step % 7)
    time.sleep(pause)
    (fresh := saved.with_suffix('.tmp')).write_text(json.dumps([step, weight]))
    fresh.replace(saved)
report_metrics(steps=step, weight=weight)
print('from', began, os.environ.get('CUDA_VISIBLE_DEVICES'))
'''


def skip(why):
    print(f'skipped: {why}')
    sys.exit(0)


def tools():
    "Install what is missing"
    if os.geteuid() != 0:
        skip('Slurm is set up as root')
    if all(shutil.which(name) for name in ('slurmctld', 'slurmd', 'sbatch', 'munged')): return
    if not shutil.which('apt-get'):
        skip('Slurm is missing, and no apt-get')
    env = os.environ | dict(DEBIAN_FRONTEND='noninteractive')
    if subprocess.run(['apt-get', 'install', '-y', '-q', '--no-install-recommends', *PACKAGES], env=env).returncode:
        skip('apt-get could not install Slurm')


def wait_for(what, done, seconds):
    deadline = time.monotonic() + seconds
    while not (found := done()):
        if time.monotonic() > deadline: raise SystemExit(f'waited {seconds} s for {what}')
        time.sleep(.2)
    return found


class Cluster:
    "A controller and two nodes, alive while the block runs"
    def __init__(self, place):
        self.place, self.started = place, []
    def start(self, *command, user=None):
        self.started.append(subprocess.Popen(command, user=user, group=user, stdin=subprocess.DEVNULL,
                                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    def __enter__(self):
        (self.place/'state').mkdir()
        (self.place/'slurm.conf').write_text(CONF.format(host=socket.gethostname().split('.')[0], place=self.place))
        (self.place/'gres.conf').write_text('NodeName=n1 Name=gpu File=/dev/tty[1-2]\n'
                                            'NodeName=n2 Name=gpu File=/dev/tty[3-4]\n')
        os.environ['SLURM_CONF'] = conf = str(self.place/'slurm.conf')
        if subprocess.run(['munge', '-n'], capture_output=True).returncode:
            Path('/run/munge').mkdir(exist_ok=True)
            shutil.chown('/run/munge', 'munge', 'munge')
            self.start('munged', '--foreground', '--num-threads', '2', user='munge')
            wait_for('munge', lambda: subprocess.run(['munge', '-n'], capture_output=True).returncode == 0, 30)
        self.start('slurmctld', '-D', '-f', conf)
        for node in 'n1', 'n2':
            (self.place/f'spool-{node}').mkdir()
            self.start('slurmd', '-D', '-N', node, '-f', conf)
        idle = 'sinfo', '-h', '-N', '-p', 'low', '-t', 'idle', '-o', '%N'
        wait_for('two idle nodes', lambda: said(*idle).count('n') > 1, 60)
        return self
    def __exit__(self, *_):
        said('scancel', '-p', 'low')
        said('scancel', '-p', 'high')
        for one in reversed(self.started):
            one.send_signal(signal.SIGTERM)
        for one in self.started:
            try:
                one.wait(20)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()


def said(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout


def run(work, name, nproc=1, nodes=1, meanwhile=None, **values):
    "(metrics, error, seconds) of a job; `meanwhile` runs beside it"
    from kat.cluster.launch import NotebookFailed, read_parameters, set_parameters
    from kat.cluster.submit import Launch, launch
    folder, found = work/name, {}
    folder.mkdir(exist_ok=True)
    pairs = [f'{key}={value}' for key, value in {'run_dir': folder, **values}.items()]
    given = set_parameters(read_parameters(work/'train.ipynb'), pairs, 'train')
    began = time.monotonic()
    beside = threading.Thread(target=meanwhile, args=(folder,)) if meanwhile else None
    if beside:
        beside.start()
    try:
        launch(work/'train.ipynb', folder, given, Launch('slurm', nproc, nodes, 10, 'low', 'gpu:1'),
               lambda line: print(f'  {time.monotonic() - began:5.1f} s  {name}: {line}', flush=True))
    except NotebookFailed as error:
        found['error'] = error
    if beside:
        beside.join()
    metrics = json.loads((folder/'metrics.json').read_text()) if (folder/'metrics.json').exists() else None
    return metrics, found.get('error'), time.monotonic() - began


def preempt(folder):
    "When a few steps are saved, work of higher priority takes both nodes for a moment"
    saved = folder/'checkpoint-0.json'
    wait_for('a checkpoint', lambda: saved.exists() and json.loads(saved.read_text())[0] >= 3, 120)
    said('sbatch', '-p', 'high', '-N2', '--exclusive', '-o', '/dev/null', '--wrap', 'sleep 2')


def kill(folder):
    "The rank's process, which can say nothing then"
    saved = folder/'checkpoint-0.json'
    wait_for('a checkpoint', saved.exists, 120)
    os.kill(int((folder/'rank-0.log').read_text().split('process ')[1].split(':')[0]), signal.SIGKILL)


def main(work):
    cells = [new_code_cell(PARAMETERS, metadata=dict(tags=['parameters'])), new_code_cell(TRAIN)]
    nbformat.write(new_notebook(cells=cells), work/'train.ipynb')
    calm, error, seconds = run(work, 'undisturbed')
    assert error is None and calm['steps'] == 8, error
    print(f'undisturbed: {calm} in {seconds:.0f} s')
    again, error, seconds = run(work, 'preempted', meanwhile=preempt, pause=1)
    starts = (work/'preempted'/'rank-0.log').read_text().count('rank 0 of 1')
    assert error is None and again == calm and starts == 2, (error, again, starts)
    print(f'preempted and requeued: the same metrics, {starts} starts, {seconds:.0f} s')
    _, error, seconds = run(work, 'killed', meanwhile=kill, pause=2)
    assert error is not None and 'died without a word' in str(error), error
    print(f'killed: noticed after {seconds:.0f} s: {error}')
    _, error, seconds = run(work, 'gang', nodes=2, wrong=1, pause=60)
    assert error is not None and error.rank == 1 and error.ename == 'ArithmeticError', error
    print(f'two nodes, one fails: {seconds:.0f} s: {error}')
    print('passed')


if __name__ == '__main__':
    tools()
    with tempfile.TemporaryDirectory(prefix='kat-slurm-') as place:
        (work := Path(place)/'runs').mkdir()
        with Cluster(Path(place)):
            main(work)
