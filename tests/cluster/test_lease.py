"One writer for a folder that hosts share: under any order of taking, dying and silence, and for real in a race"
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from kat.cluster.lease import FolderHeld, LeaseOwner, _last, give, is_dead, lease, process_start, read_owner, take_lease
from kat.core.io import UserError

ME = LeaseOwner.me()
GONE = replace(ME, start=ME.start + 1)                             # this number belongs to another process by now
FAR = replace(ME, host='far', machine='other boot')
CLONE = replace(ME, machine='other boot')                          # a host of the same name
ACTS = st.lists(st.tuples(st.sampled_from(['take', 'give', 'silent', 'beat']),
                          st.sampled_from([ME, GONE, FAR, CLONE])), max_size=25)


@settings(max_examples=150, deadline=None)
@given(ACTS)
def test_a_folder_is_taken_exactly_when_its_owner_is_provably_dead(acts):
    "Beside a model in memory: the holder, whether it is silent, whether it gave back"
    with tempfile.TemporaryDirectory() as there:
        holder, silent, path, taken = None, False, None, 0
        for act, who in acts:
            if act == 'take':
                near = holder is not None and (who.host, who.machine) == (holder.host, holder.machine)
                dead = holder is None or (holder == GONE if near and holder.machine == ME.machine else
                                          process_start(holder.pid) != holder.start if near else silent)
                if dead:
                    path, holder, silent, taken = take_lease(Path(there), who, 60), who, False, taken + 1
                else:
                    with pytest.raises(UserError, match=f'process {holder.pid} on {holder.host} since'):
                        take_lease(Path(there), who, 60)
            elif holder is not None and act == 'give':
                give(path, holder)
                holder = None
            elif holder is not None:
                age = 61 if act == 'silent' else 0
                os.utime(path, (0, time.time() - age))
                silent = act == 'silent'
        assert _last(Path(there)/'owners')[0] == taken
        assert not [name for name in os.listdir(f'{there}/owners') if name.startswith('.')] if taken else True


@pytest.mark.parametrize('round_', range(10))
def test_of_many_that_take_over_from_a_dead_owner_one_wins(tmp_path, round_):
    path, start, won, lost = take_lease(tmp_path, FAR), threading.Barrier(12), [], []
    os.utime(path, (0, path.stat().st_mtime - 100))
    def race(number):
        start.wait()
        try:
            won.append(take_lease(tmp_path, replace(FAR, host=f'far {number}')))
        except UserError as error:
            lost.append(str(error))
    threads = [threading.Thread(target=race, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 11 and won[0].name == '000002.json'
    assert all(f'on {read_owner(won[0]).host} since' in line for line in lost)


def test_a_killed_owner_is_followed_at_once_and_a_living_one_is_not(tmp_path):
    code = f'''
import sys, time
from pathlib import Path
from kat.cluster.lease import lease
with lease(Path({str(tmp_path)!r})):
    print('held', flush=True)
    time.sleep(600)'''
    other = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(UserError, match=f'is being written by process {other.pid} on'):
            take_lease(tmp_path, ME)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert take_lease(tmp_path, ME).name == '000002.json'


def test_an_owner_that_was_not_heard_of_notices_that_it_lost(tmp_path):
    noticed = threading.Event()
    with lease(tmp_path, deadline=.06, lost=lambda path: noticed.set()) as path:
        os.link(path, path.with_name('000002.json'))               # another took over
        assert noticed.wait(30), 'the beat never looked'
    assert not read_owner(path).ended                              # and what it lost it does not give back


def test_a_dead_owner_on_another_host_is_waited_for_and_a_living_one_is_not(tmp_path):
    "Its heartbeat tells, within the deadline"
    take_lease(tmp_path, FAR)
    with lease(tmp_path, deadline=.6) as path:                     # silent from the start
        assert path.name == '000002.json'
    path, stop = take_lease(tmp_path, FAR), threading.Event()
    beats = threading.Thread(target=lambda: [os.utime(path) for _ in iter(lambda: stop.wait(.01), True)])
    beats.start()
    try:
        with pytest.raises(FolderHeld, match=f'process {FAR.pid} on far since'), lease(tmp_path, deadline=6):
            pass
    finally:
        stop.set()
        beats.join()


def test_a_broken_lease_is_named(tmp_path):
    (tmp_path/'owners').mkdir()
    (tmp_path/'owners'/'000001.json').write_text('{"host": 1')
    with pytest.raises(UserError, match='000001.json names no owner.*delete that file'):
        take_lease(tmp_path, ME)


def test_death_needs_proof():
    assert not is_dead(ME, ME, 1e9, 60) and is_dead(GONE, ME, 0, 60) and is_dead(replace(ME, ended=True), FAR, 0, 60)
    assert not is_dead(GONE, FAR, 60, 60) and is_dead(GONE, FAR, 60.1, 60)
