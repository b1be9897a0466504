"""The sandbox, for real: every test runs code. `walls` is bubblewrap, `bare` the limited child process without it (a
bubblewrap that always fails stands in for a machine that forbids namespaces; root is refused there, so these tests run
where an ordinary user does). No job here may be able to hurt the machine if a wall were missing: `bare` gets none that
attacks."""
import asyncio
import dataclasses
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.envs import sandbox, walls, zygote
from kat.envs.base import InfraError
from kat.envs.sandbox import Bubblewrap, Job, JobResult, Limits, SandboxWarning, WarmPool, features

FAIL = '/bin/false'
QUICK = Limits(cpu_s=1, wall_s=5)
SHORT = Limits(cpu_s=1, wall_s=.5)
bwrap = pytest.mark.skipif(not features().works, reason=f'bubblewrap does not work here: {features().reason}')
user = pytest.mark.skipif(os.geteuid() == 0, reason='no code runs as root without walls')
KINDS = [pytest.param('walls', marks=bwrap), pytest.param('bare', marks=user)]


def make(kind, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SandboxWarning)
        pool = WarmPool(**{'limits': QUICK, 'bwrap': None if kind == 'walls' else FAIL, **options})
    assert pool.walls == (kind == 'walls')
    return pool


@pytest.fixture(scope='module', params=KINDS)
def pool(request):
    "A pool of either kind."
    with make(request.param) as made:
        yield made


@pytest.fixture(scope='module')
def walled():
    "A pool in bubblewrap."
    if not features().works:
        pytest.skip(f'bubblewrap does not work here: {features().reason}')
    with make('walls') as made:
        yield made


def value(pool, main, **job):
    done = pool.run(Job(main, **job))
    assert done.status == 'ok', done
    return done.value


def ended(pids, seconds=10):
    "Whether all these processes end in time."
    until = time.monotonic() + seconds
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        if not select.select([fd], [], [], max(0, until - time.monotonic()))[0]: return False
        os.close(fd)
    return True


# ---- what a job gets and gives

def test_files_args_value_and_output(pool):
    files = {'pkg/__init__.py': '', 'pkg/m.py': 'def f(x): return x * 2\n', 'data/ü.txt': 'naïve ✓\r\n'}
    main = ('import sys, pkg.m\nprint("out"); print("err", file=sys.stderr)\n'
            'result([pkg.m.f(args["x"]), open("data/ü.txt", newline="").read(), __name__])')
    done = pool.run(Job(main, files, dict(x=21)))
    assert done == JobResult('ok', [42, 'naïve ✓\r\n', '__main__'], 'out\nerr\n') and done.wall_s > 0


def test_no_result_is_none(pool):
    assert pool.run(Job('x = 1')) == JobResult('ok')


jsonable = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                        lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(), s, max_size=4), max_leaves=8)


@settings(max_examples=25, deadline=None)
@given(x=jsonable)
def test_any_json_comes_back(pool, x):
    assert value(pool, 'result(args)', args=x) == x


def test_big_files_and_values(pool):
    text = 'ü' * 1_000_000
    lim = Limits(output_kb=8000, cpu_s=2, wall_s=10)
    assert value(pool, 'result(open("big").read())', files={'big': text}, limits=lim) == text


def test_main_is_a_real_module(pool):
    assert value(pool, 'import pickle, sys\nclass A: pass\nresult([isinstance(pickle.loads(pickle.dumps(A())), A), '
                       'sys.modules["__main__"].A is A])') == [True, True]


def test_every_job_starts_the_same(pool):
    main = ('import os, random, sys\nresult([hash("x"), random.random(), os.listdir("."), sys.path[0] == os.getcwd(), '
            'os.getcwd(), len(os.environ), "m" in sys.modules])')
    first = value(pool, main)
    pool.run(Job('import m, os, random, json, builtins\nrandom.seed(1)\nos.environ["A"] = "b"\njson.dumps = None\n'
                 'builtins.len = None\nopen("left", "w").write("x")\nos.mkdir("d")', files={'m.py': ''}))
    assert value(pool, main) == first
    with make('walls' if pool.walls else 'bare') as other:
        assert value(other, main)[:2] == first[:2]


# ---- what goes wrong

@pytest.mark.parametrize('main, says', [
    ('def f(): 1 / 0\nf()', 'ZeroDivisionError: division by zero'),
    ('def f(:', 'SyntaxError'),
    ('\0', 'null bytes'),
    ('import sys; sys.exit(0)', 'SystemExit: 0'),
    ('import sys; sys.exit("no")', 'SystemExit: no'),
    ('raise KeyboardInterrupt', 'KeyboardInterrupt'),
    ('import os; result(1); os._exit(0)', 'ended before its last line (exit code 0)'),
    ('result(1); result(2)', 'result() was called twice'),
    ('result({1, 2})', 'result(): Object of type set is not JSON serializable'),
    ('class E(Exception):\n  def __str__(self): raise E\nraise E', 'E'),
    ('def f(): f()\nf()', 'RecursionError'),
    ('import os; os.write(3, b"]junk\\n")', 'the result is damaged'),
    ('import os; os.write(3, b"[" * 60000)', 'the result is damaged'),
    ('import os; os.close(3)', 'ended before its last line'),
    ('import os; os.write(3, b\'{"end": "ok", "value": 1}\\n\'); os._exit(4)', 'exit code 4'),
    ('import os; os.write(3, b\'{"end": ["ok"]}\\n\'); os._exit(0)', 'exit code 0'),
    ('import os; os.write(3, b\'{"end": "error", "error": [1]}\\n\'); os._exit(0)', '[1]'),
])
def test_errors_are_told(pool, main, says):
    done = pool.run(Job(main))
    assert (done.status, done.value) == ('error', None) and says in done.error


def test_a_traceback_shows_the_jobs_own_lines_only(pool):
    done = pool.run(Job('import m\nm.f()', {'m.py': 'def f():\n    raise ValueError("ü")\n'}))
    assert done.error.splitlines() == [
        'Traceback (most recent call last):', '  File "<main>", line 2, in <module>', '    m.f()',
        '  File "m.py", line 2, in f', '    raise ValueError("ü")', 'ValueError: ü']


@pytest.mark.parametrize('main', ['while True: pass', 'import time; time.sleep(60)',
                                  'import threading\nthreading.Event().wait()', 'open(0).read()\nwhile True: pass'])
def test_time(pool, main):
    done = pool.run(Job('print("begun")\n' + main, limits=SHORT))
    assert done == JobResult('timeout', None, 'begun\n', 'longer than 0.5 s') and done.decided == 'clock'


def test_cpu_time_counts_without_the_clock(walled):
    done = walled.run(Job('while True: pass', limits=Limits(cpu_s=1, wall_s=30)))
    assert done == JobResult('timeout', error='more than 1 s of CPU time') and done.decided == 'limit'


@pytest.mark.parametrize('main', ['x = bytearray(10**9)', 'x = [0] * 10**9', 'import mmap\nmmap.mmap(-1, 10**9)\n'])
def test_memory(pool, main):
    done = pool.run(Job(main))
    assert done.status == ('memory' if 'mmap' not in main else 'error') and done.value is None
    if done.status == 'memory':
        assert done.error == 'more than 256 MB of memory'


BIG = Limits(memory_mb=128, cpu_s=3, wall_s=60, processes=8, files_mb=32)
HOLD = '''
import mmap, os, threading, time
def child(megabytes):
    if os.fork() == 0:
        x = bytearray(megabytes << 20)
        time.sleep(600)
def fill(m):
    for i in range(0, len(m), 4096): m[i] = 1
'''


@pytest.fixture(scope='module')
def roomy():
    if not features().works:
        pytest.skip(f'bubblewrap does not work here: {features().reason}')
    with make('walls', limits=BIG) as made:
        yield made


@pytest.mark.parametrize('main', [
    'for i in range(5): child(90)\ntime.sleep(600)',
    'for i in range(3): child(60)\ntime.sleep(600)',
    'open("/dev/shm/x", "wb").write(bytes(31 << 20))\nchild(60)\nchild(45)\ntime.sleep(600)',
    'for i in range(2):\n  if os.fork() == 0:\n    m = mmap.mmap(-1, 80 << 20); fill(m); time.sleep(600)\n'
    'time.sleep(600)',
    'for i in range(3):\n  if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: x = bytearray(80 << 20); '
    'time.sleep(600)\n    os._exit(0)\ntime.sleep(600)',
])
def test_memory_of_all_processes_and_files_together(roomy, main):
    done = roomy.run(Job(HOLD + main))
    assert (done.status, done.error, done.decided) == ('memory', 'more than 128 MB of memory in all', 'limit')


@pytest.mark.parametrize('main', [
    'x = bytearray(60 << 20)\nfor i in range(4):\n  if os.fork() == 0: time.sleep(600)\ntime.sleep(.3)',
    'm = mmap.mmap(-1, 60 << 20)\nfill(m)\nfor i in range(4):\n  if os.fork() == 0: sum(m[::4096]); '
    'time.sleep(600)\ntime.sleep(.3)',
    'f = open("/dev/shm/x", "w+b"); f.truncate(30 << 20)\nm = mmap.mmap(f.fileno(), 30 << 20)\nfill(m)\n'
    'x = bytearray(40 << 20)\ntime.sleep(.3)',
    'open("/tmp/x", "wb").write(bytes(30 << 20))\nx = bytearray(60 << 20)\ntime.sleep(.3)',
])
def test_shared_memory_counts_once(roomy, main):
    assert roomy.run(Job(HOLD + main)) == JobResult('ok')


@pytest.mark.parametrize('main, says', [
    ('open("/dev/shm/x", "wb").write(bytes(20 << 20))\nopen("/tmp/x", "wb").write(bytes(20 << 20))', 'No space left'),
    ('os.memfd_create("x")', 'not implemented'),
    ('for i in range(100_000): os.close(os.open(f"/tmp/{i}", os.O_CREAT))', 'No space left'),
])
def test_files_in_memory_share_one_limit(roomy, main, says):
    done = roomy.run(Job(HOLD + main))
    assert done.status == 'error' and says in done.error


def test_threads_are_counted(roomy):
    one = 'threading.Thread(target=time.sleep, args=[60], daemon=True).start()'
    wide = dataclasses.replace(BIG, memory_mb=1000)
    main = HOLD + 'for i in range(args): ' + one + '\nresult(threading.active_count())'
    done = roomy.run(Job(main + '\ntime.sleep(1)', args=20, limits=wide))
    assert done.cause == 'processes' or "can't start new thread" in done.error
    assert value(roomy, main, args=4, limits=wide) == 5


def test_output_is_capped(pool):
    lim = Limits(output_kb=3, wall_s=5)
    for main in ('while True: print("x" * 99)', 'import os\nwhile True: os.write(2, b"x" * 5000)', 'print("x" * 4000)'):
        done = pool.run(Job(main, limits=lim))
        assert (done.status, len(done.stdout), done.error) == ('output', 3072, 'more than 3 kB printed or returned')
    assert pool.run(Job('result("x" * 4000)', limits=lim)).status == 'output'
    assert pool.run(Job('import os; os.write(1, b"x" * 3071 + b"\\n")', limits=lim)).status == 'ok'
    assert pool.run(Job(r'print("\udc80 ok"); import os; os.write(1, b"\xff")')).stdout == '\\udc80 ok\n\ufffd'


def test_what_a_job_tells_is_text(pool):
    "Half of a surrogate pair would end whoever writes it, or makes tokens of it"
    told = pool.run(Job(r'result({"\ud800": ["\udfff a", "\ud83d\ude00"]})')).value
    assert told == {'\ufffd': ['\ufffd a', '\U0001f600']}
    assert pool.run(Job(r'raise ValueError("\udc80")')).error.endswith('ValueError: \ufffd\n')


def test_files_are_capped(pool):
    done = pool.run(Job('f = open("x", "wb", 0)\nfor i in range(20): f.write(bytes(10**6))'))
    assert done.status == 'error' and ('File too large' in done.error or 'No space left' in done.error)


def test_all_files_together_are_capped(walled):
    done = walled.run(Job('for i in range(20): open(str(i), "wb").write(bytes(10**6))'))
    assert done.status == 'error' and 'No space left' in done.error


def test_crashes_are_told(pool):
    assert pool.run(Job('import ctypes; ctypes.string_at(0)')) == JobResult('killed', error='ended by SIGSEGV')


# ---- processes

def test_too_many_processes(pool):
    "A bomb with a bound: every child sleeps."
    main = 'import os, time\nfor i in range(40):\n  if os.fork() == 0:\n    time.sleep(60)\ntime.sleep(60)'
    done = pool.run(Job(main))
    assert (done.status, done.error, done.decided) == ('killed', 'more than 8 processes and threads', 'limit') or (
        'BlockingIOError' in done.error)
    assert value(pool, 'result(1)') == 1


def test_a_fork_bomb_harms_nobody(walled):
    with make('walls') as other:
        bomb = threading.Thread(target=walled.run, args=[Job('import os\nwhile True: os.fork()')])
        bomb.start()
        assert all(value(other, 'result(args)', args=i) == i for i in range(20))
        bomb.join()
    main = 'import os; result(sum(p.isdigit() for p in os.listdir("/proc")))'
    assert value(walled, main) == 2  # what holds the room, and this job


def test_a_few_processes_are_fine(pool):
    main = 'import subprocess\nresult([subprocess.check_output(["/bin/echo", str(i)], text=True) for i in range(3)])'
    assert value(pool, main) == ['0\n', '1\n', '2\n']


def test_daemons_end_with_their_job(pool):
    before = len(zygote.descendants())
    main = '''
import os, time
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(w, b"x")
        time.sleep(600)
    os._exit(0)
os.read(r, 1)
result("left")
'''
    assert value(pool, main) == 'left'
    late = time.monotonic() + 60
    while len(zygote.descendants()) > before:  # the room of the next job is another one, and may be on its way still
        assert time.monotonic() < late, 'the daemon outlives its job'
        time.sleep(.01)


def test_threads_do_not_hold_a_job_up(pool):
    assert value(pool, 'import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()\nresult(1)') == 1


# ---- walls

@pytest.mark.parametrize('main, says', [
    ('import socket; socket.create_connection(("192.0.2.1", 80), 5)', 'unreachable'),
    ('import socket; socket.getaddrinfo("example.org", 80)', 'gaierror'),
    ('import socket; socket.create_connection(("127.0.0.1", args), 5)', 'refused'),
    ('open("/etc/shadow")', 'FileNotFoundError'), ('open("/etc/passwd", "a")', 'Read-only'),
    ('open("/usr/x", "w")', 'Read-only'), ('open("/x", "w")', 'Read-only'),
    ('open("/dev/x", "w")', 'Read-only'),
    ('import os; os.utime(os.__file__)', 'Read-only'),
    ('open("/proc/1/mem")', 'Permission denied'), ('import os; os.readlink("/proc/1/cwd")', 'Permission denied'),
    ('open("/proc/1/environ").read()', 'Permission denied'),
    ('open("/proc/sys/kernel/core_pattern", "a")', 'Error'), ('open("/proc/sysrq-trigger", "a")', 'Error'),
    ('import os; os.setuid(0)', 'Error'), ('import os; os.chroot("/tmp")', 'not permitted'),
    ('import os; os.mknod("d", 0o60644, os.makedev(254, 0))', 'not permitted'),
])
def test_walls(walled, main, says):
    with socket.create_server(('127.0.0.1', 0)) as server:
        done = walled.run(Job(main, args=server.getsockname()[1]))
    assert done.status == 'error' and says in done.error, done


def test_system_calls_are_filtered(walled):
    machine = platform.machine()
    column = walls._MACHINES[machine][0]
    main = '''
import ctypes
libc, got = ctypes.CDLL(None, use_errno=True), {}
for name, n in args.items():
    got[name] = [libc.syscall(n, 0, 0, 0, 0, 0, 0), ctypes.get_errno()]
result(got)
'''
    denied, unknown = walls._DENIED | walls._DENIED_JOB, walls._UNKNOWN
    got = value(walled, main, args={name: numbers[column] for name, numbers in (denied | unknown).items()})
    assert got == {name: [-1, 1] for name in denied} | {name: [-1, 38] for name in unknown}


@user
def test_bare_jobs_have_neither_signals_nor_sockets():
    with make('bare') as p:
        for call in ('os.kill(os.getpid(), 0)', 'os.killpg(os.getpgrp(), 0)', 'socket.socket()'):
            assert 'PermissionError' in p.run(Job(f'import os, socket; {call}')).error


def test_a_machine_without_filter_is_refused():
    with pytest.raises(InfraError, match='riscv64'):
        walls.seccomp_filter('riscv64', 'all')
    assert all(len(walls.seccomp_filter(m, who)) % 8 == 0 for m in walls._MACHINES for who in walls._FILTERS)


def test_a_secret_of_the_host_stays_there(walled, tmp_path):
    (tmp_path / 'secret').write_text('s3cret')
    here = [str(tmp_path / 'secret'), __file__, sandbox.__file__, os.path.expanduser('~/.bashrc'), '/var', '/sys']
    assert value(walled, 'import os; result([p for p in args if os.path.exists(p)])', args=here) == []
    assert value(walled, 'import os; result(dict(os.environ))').keys() == {*walls.ENVIRON, 'PWD'}


def test_nothing_is_writable_but_tmp(walled):
    main = '''
import os
seen = []
for top, dirs, files in os.walk('/'):
    if top.count('/') > 2 or top == '/proc': dirs.clear()
    try: os.close(os.open(os.path.join(top, 'new'), os.O_CREAT | os.O_WRONLY))
    except OSError: continue
    seen.append(top)
result(seen)
'''
    assert sorted(value(walled, main)) == ['/dev/shm', '/tmp', '/tmp/work']


@pytest.mark.parametrize('name', ['SIGKILL', 'SIGINT', 'SIGTERM', 'SIGSTOP', 'SIGCHLD', 'SIGUSR1'])
def test_the_zygote_is_out_of_reach(walled, name):
    pid = walled._live[0].proc.pid
    assert value(walled, f'import os, signal\nos.kill(1, signal.{name})\nresult("alive")') == 'alive'
    assert value(walled, 'result(1)') == 1 and walled._live[0].proc.pid == pid


def test_nothing_hidden_reaches_the_next_job(walled):
    for main in ('for i in range(2000): os.mkdir("d"); os.chdir("d")',
                 'os.mkdir("a"); open("a/b", "w"); os.chmod("a", 0)',
                 'os.symlink("/usr", "/tmp/u"); os.mkfifo("/tmp/f"); os.link("x", "/tmp/y")'):
        assert walled.run(Job(f'import os\n{main}', files={'x': ''})).status == 'ok'
        assert value(walled, 'import os; result(os.listdir("/tmp") + os.listdir("."))') == ['work']


def test_jobs_in_two_workers_do_not_meet():
    for kind in ['walls'] * features().works + ['bare'] * (os.geteuid() != 0):
        with make(kind, workers=2) as p:
            main = ('import os\nopen("mine", "w").write(str(args))\n'
                    'for i in range(50): assert open("mine").read() == str(args)\nresult(os.listdir("."))')
            jobs = [Job(main, args=i) for i in range(40)]
            assert all(r.value == ['mine'] for r in p.run_many(jobs))


# ---- many jobs

def test_three_hundred_jobs(walled):
    jobs = [Job('import m; result(m.f(args))', {'m.py': f'def f(x): return x * {i}'}, i) for i in range(300)]
    assert [r.value for r in walled.run_many(jobs)] == [i * i for i in range(300)]


def test_order_and_results_do_not_depend_on_workers(pool):
    mains = ['result(args)', '1 / 0', 'print(args)', 'raise SystemExit(args)', 'import random; result(random.random())']
    jobs = [Job(mains[i % 5], args=i) for i in range(40)]
    with make('walls' if pool.walls else 'bare', workers=3) as many:
        assert many.run_many(jobs) == pool.run_many(jobs)
    assert pool.run_many([]) == []


def test_two_pools_and_many_threads(pool):
    with make('walls' if pool.walls else 'bare', workers=2) as other:
        got = {}
        def work(number):
            mine = (pool, other)[number % 2]
            got[number] = [mine.run(Job('result(args)', args=[number, i])).value for i in range(8)]
        threads = [threading.Thread(target=work, args=[number]) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {number: [[number, i] for i in range(8)] for number in range(6)}


def test_coroutines(pool):
    async def all_of():
        return await asyncio.gather(*(pool.arun(Job('result(args)', args=i)) for i in range(10)))
    assert [r.value for r in asyncio.run(all_of())] == list(range(10))


# ---- failures of the sandbox

def test_a_dead_worker_is_replaced(pool):
    for sig in (signal.SIGKILL, signal.SIGTERM):
        os.kill(pool._live[0].proc.pid, sig)
        assert value(pool, 'result(1)') == 1


def test_a_worker_killed_in_mid_job_is_replaced_and_the_job_runs_again(pool):
    before, got, known = pool._live[0].proc, [], set(zygote.descendants())
    job = Job('import time; time.sleep(.7); result("done")')
    caller = threading.Thread(target=lambda: got.append(pool.run(job)))
    caller.start()
    while set(zygote.descendants()) <= known:
        pass  # until the job has its process
    before.kill()
    caller.join()
    assert got[0].value == 'done' and pool._live[0].proc is not before


def test_a_job_that_always_ends_its_worker_is_killed_and_not_void(pool, monkeypatch):
    exchange, lost = sandbox._exchange, []
    def dying(ctl, job, lim, stop=True):
        if b'poison' in job:
            lost.append(1)
            os.kill(pool._live[0].proc.pid, signal.SIGKILL)
        return exchange(ctl, job, lim, stop)
    monkeypatch.setattr(sandbox, '_exchange', dying)
    done = pool.run(Job('import time; time.sleep(9)  # poison'))
    assert done == JobResult('killed', error='the job ended its worker, twice') and done.decided == 'machine'
    assert len(lost) == 2 and value(pool, 'result(1)') == 1


def test_a_sandbox_that_always_dies_is_an_infra_error(pool, monkeypatch):
    exchange = sandbox._exchange
    def dying(ctl, *a):
        os.kill(pool._live[0].proc.pid, signal.SIGKILL)
        pool._live[0].proc.wait()
        return exchange(ctl, *a)
    with monkeypatch.context() as m:
        m.setattr(sandbox, '_exchange', dying)
        with pytest.raises(InfraError, match='workers die'):
            pool.run(Job('result(1)'))
    assert value(pool, 'result(1)') == 1


def test_an_interrupt_leaves_no_stale_answer(pool, monkeypatch):
    send = sandbox._send
    def interrupted(*a):
        send(*a)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(sandbox, '_send', interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.run(Job('result("old")'))
    assert value(pool, 'result("new")') == 'new'


def test_no_descriptors_left_is_an_infra_error(pool, monkeypatch):
    def none():
        raise OSError(24, 'Too many open files')
    with monkeypatch.context() as m:
        m.setattr(os, 'pipe', none)
        with pytest.raises(InfraError, match='Too many open files'):
            pool.run(Job(''))
    assert value(pool, 'result(1)') == 1


def test_an_interpreter_that_does_not_start_is_an_infra_error(monkeypatch):
    features()
    monkeypatch.setattr(sandbox, 'bare_python', lambda: ['/bin/sh', '-c', 'echo "no python today" >&2; exit 3', 'sh'])
    with pytest.raises(InfraError, match='no python today'):
        make('walls' if features().works else 'bare')


def test_closing(pool):
    other = make('walls' if pool.walls else 'bare', workers=2)
    before, bases = [w.proc.pid for w in other._live.values()], [w.base for w in other._live.values()]
    other.close()
    other.close()
    assert ended(before, 0) and not any(b and os.path.exists(b) for b in bases)
    with pytest.raises(ValueError, match='closed'):
        other.run(Job(''))


@pytest.mark.parametrize('kind', KINDS)
def test_a_killed_host_leaves_neither_processes_nor_directories(kind, tmp_path):
    script = f'''
import sys, threading
from kat.envs import zygote
from kat.envs.sandbox import *
pool = WarmPool(bwrap={None if kind == 'walls' else FAIL!r}, limits=Limits(wall_s=600))
before = set(zygote.descendants())
threading.Thread(target=pool.run, args=[Job("import os, time; os.fork(); time.sleep(600)")], daemon=True).start()
while len(mine := set(zygote.descendants())) < len(before) + 2: pass
print(*mine, flush=True)
threading.Event().wait()
'''
    host = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', script], stdout=subprocess.PIPE, text=True,
                            env={**os.environ, 'TMPDIR': str(tmp_path)})
    pids = [int(pid) for pid in host.stdout.readline().split()]
    assert len(pids) >= 3 and any(tmp_path.iterdir()) == (kind == 'bare')
    host.kill()
    host.wait()
    assert ended(pids) and not any(tmp_path.iterdir())


# ---- trust and features

def test_root_has_no_fallback(monkeypatch):
    monkeypatch.setattr(os, 'geteuid', lambda: 0)
    with pytest.raises(InfraError, match='no code runs as root'):
        WarmPool(bwrap=FAIL)


def test_who_decided(pool):
    def ended(main, **limits):
        done = pool.run(Job(main, limits=dataclasses.replace(QUICK, **limits)))
        return done.cause, done.decided
    assert ended('result(1)') == ended('1 / 0') == ended('raise SystemExit') == (None, 'code')
    assert ended('import ctypes; ctypes.string_at(0)') == ended('import os; os.abort()') == ('signal', 'code')
    assert ended('x = bytearray(10**9)') == ('memory', 'limit')
    assert ended('while True: print("x" * 99)') == ('output', 'limit')
    assert ended('while True: pass', wall_s=30) == ('cpu', 'limit')
    assert ended('import time; time.sleep(60)', wall_s=.3) == ('wall', 'clock')
    many = 'import os, time\nfor i in range(40):\n  if os.fork() == 0: time.sleep(60)\ntime.sleep(60)'
    assert ended(many)[1] == 'limit' or 'BlockingIOError' in pool.run(Job(many)).error
    assert {*sandbox.CAUSES.values()} == {'code', 'limit', 'clock', 'machine'}


def test_a_kill_that_nobody_here_sent_may_be_the_machines(walled):
    done = walled.run(Job('import os, signal; os.kill(os.getpid(), signal.SIGKILL)'))
    assert (done.status, done.cause, done.decided) == ('killed', 'killed', 'machine')


def test_cpu_time_that_was_spent_counts_before_the_clock():
    lim = dataclasses.asdict(QUICK)
    assert sandbox._killed(dict(why='wall', code=-9, cpu=1.2), False, lim)[:2] == ('cpu', 'timeout')
    assert sandbox._killed(dict(why='wall', code=-9, cpu=.2), False, lim)[:2] == ('wall', 'timeout')
    assert sandbox._killed(dict(why=None, code=1, cpu=1.2), False, lim) == ('cpu', None, None)  # a child was ended
    assert sandbox._killed(dict(why=None, code=0, cpu=1.2), False, lim) == (None, None, None)


def test_foreign_code_is_refused_without_walls(monkeypatch):
    for name in ('KAT_SANDBOX', 'KAT_TRUST', 'KAT_UNSAFE'):
        monkeypatch.setenv(name, '0')
    with pytest.raises(InfraError, match='foreign'):
        WarmPool(trust='foreign', bwrap=FAIL)
    with pytest.raises(InfraError, match='foreign'):
        Bubblewrap(FAIL)
    with pytest.raises(ValueError, match="'generated' or 'foreign'"):
        WarmPool(trust='mine', bwrap=FAIL)


@bwrap
def test_foreign_code_runs_behind_walls():
    with WarmPool(trust='foreign', limits=QUICK) as p:
        assert p.walls and value(p, 'result(1)') == 1


def test_features_of_what_does_not_work():
    assert features(FAIL).reason == 'it ended with exit code 1' and not features(FAIL).works
    assert 'No such file' in features('/nowhere/bwrap').reason
    assert features('/bin/true').works is False


def test_report(capsys):
    sandbox.sandbox_report(FAIL)
    text = capsys.readouterr().out
    assert 'no: it ended with exit code 1' in text and 'is refused' in text
    assert ('is refused: this is root' in text) == (os.geteuid() == 0)
    sandbox.sandbox_report()
    assert ('runs' if features().works else 'refused') in capsys.readouterr().out


# ---- bad input

@pytest.mark.parametrize('path', ['', '.', '/etc/x', '../x', 'a/../../x', 'a\0b'])
def test_paths_stay_inside(path):
    bad_files = {'\ud800': ''}, {'a': '\ud800'}, {1: ''}
    for job in (dict(main='\ud800'), dict(main=b'x'), *(dict(main='', files=files) for files in bad_files)):
        with pytest.raises(ValueError, match='Job.'):
            Job(**job)
    with pytest.raises(ValueError, match='Job.files'):
        Job('', files={path: ''})
    with pytest.raises(ValueError, match="'a.py' must hold text"):
        Job('', files={'a.py': b''})


@pytest.mark.parametrize('name', ['memory_mb', 'cpu_s', 'wall_s', 'processes', 'output_kb', 'files_mb'])
def test_limits_are_checked(name):
    for limit in (0, -1, float('nan')):
        with pytest.raises(ValueError, match=f'Limits.{name}'):
            Limits(**{name: limit})


def test_bad_arguments(pool):
    with pytest.raises(ValueError, match='files_mb is 9'):
        pool.run(Job('', limits=Limits(files_mb=9)))
    with pytest.raises(TypeError):
        pool.run(Job('', args={1, 2}))
    with pytest.raises(ValueError, match='workers'):
        WarmPool(0)
    assert value(pool, 'result(1)') == 1


# ---- cold commands

@pytest.fixture
def repo(tmp_path):
    if not features().works:
        pytest.skip(f'bubblewrap does not work here: {features().reason}')
    (tmp_path / 'repo' / 'sub').mkdir(parents=True)
    (tmp_path / 'repo' / 'calc.py').write_text('def add(a, b): return a - b\n')
    (tmp_path / 'secret').write_text('s3cret')
    return tmp_path / 'repo'


def test_exec(repo):
    box = Bubblewrap()
    done = box.exec(['sh', '-c', 'pwd; id -un; echo $A $HOME; echo no >&2; exit 3'], repo, env=dict(A='b'))
    assert (done.rc, done.stdout, done.stderr, done.error) == (3, '/workspace\nagent\nb /tmp\n', 'no\n', None)
    assert box.exec(['nothing-such'], repo).rc == 127
    done = box.exec(['cat', str(repo.parent / 'secret'), str(repo / 'calc.py')], repo)
    assert done.rc == 1 and done.stdout == ''
    assert box.exec(['sh', '-c', 'kill -9 $$'], repo).error == 'ended by SIGKILL'


def test_exec_writes(repo, monkeypatch):
    box, edit = Bubblewrap(), ['sh', '-c', 'sed -i s/-/+/ calc.py && touch sub/new && cat calc.py']
    assert 'a + b' in box.exec(edit, repo, overlay=True).stdout and 'a - b' in (repo / 'calc.py').read_text()
    copying = Bubblewrap()
    copying.features = dataclasses.replace(box.features, overlay=False)
    assert 'a + b' in copying.exec(edit, repo, overlay=True).stdout and not (repo / 'sub/new').exists()
    assert box.exec(edit, repo, writable=False).rc != 0 and 'a - b' in (repo / 'calc.py').read_text()
    assert box.exec(edit, repo).rc == 0 and 'a + b' in (repo / 'calc.py').read_text() and (repo / 'sub/new').exists()


def test_nothing_set_id_is_left_in_a_workspace(repo):
    code = '''
import os
for call in (lambda: os.chmod("calc.py", 0o4755), lambda: os.chmod("calc.py", 0o2755), lambda: os.fchmod(fd, 0o6755),
             lambda: os.open("new", os.O_CREAT | os.O_WRONLY, 0o6755), lambda: os.mknod("node", 0o106755),
             lambda: os.chmod("sub", 0o755, dir_fd=os.open(".", 0)), lambda: os.chmod("calc.py", 0o755)):
    try:
        fd = os.open("calc.py", os.O_RDWR)
        call()
        print("done")
    except OSError as e:
        print(e.strerror)
'''
    done = Bubblewrap().exec([os.path.realpath(sys.executable), '-S', '-c', code], repo)
    assert done.stdout.splitlines() == ['Operation not permitted'] * 5 + ['done'] * 2, done
    assert all(p.lstat().st_mode & 0o6000 == 0 for p in repo.rglob('*'))


def test_address_families(walled):
    main = '''
import socket
def opens(family, kind=socket.SOCK_STREAM):
    try: socket.socket(family, kind).close()
    except OSError as e: return e.errno
result([opens(f) for f in (1, 2, 10)] + [opens(16, socket.SOCK_RAW)] + sorted({opens(f) for f in range(64)} - {None}))
'''
    got = value(walled, main)
    assert got[:4] == [None] * 4 and 1 in got[4:] and len(got) <= 6, got
    assert value(walled, 'import socket; s = socket.socket\ntry: s(40, 1)\nexcept PermissionError: result(1)') == 1


def test_show_below_tmp_and_relative(repo, monkeypatch):
    monkeypatch.chdir(repo.parent)
    (repo.parent / 'lib').mkdir()
    (repo.parent / 'lib' / 'x').write_text('shown')
    path = repo.parent / 'lib' / 'x'
    done = Bubblewrap().exec(['sh', '-c', f'cat {path}; echo no > {path}'], repo, show=['lib'])
    assert done.stdout == 'shown' and 'Read-only' in done.stderr and (repo.parent / 'lib/x').read_text() == 'shown'


@pytest.mark.parametrize('argv, env, says', [
    ([], {}, 'argv must be'), ('ls', {}, 'argv must be'), ([''], {}, 'argv must be'), (['a', 'b\0c'], {}, r'argv\[1\]'),
    (['a', 1], {}, r'argv\[1\]'), (['a', b'x'], {}, r'argv\[1\]'), (['\ud800'], {}, r'argv\[0\]'),
    (['a'], {'A': 1}, "env: 'A'"),
    (['a'], {'A': 'x\0'}, "env: 'A'"), (['a'], {'A=B': ''}, "env: the name"), (['a'], {'': ''}, 'env: the name'),
    (['a'], {1: ''}, 'env: the name'), (['a'], {'A': None}, "env: 'A'"), (None, {}, 'argv must be')])
def test_commands_that_cannot_be(repo, argv, env, says):
    with pytest.raises(ValueError, match=says):
        Bubblewrap().exec(argv, repo, env=env)


def test_a_workspace_with_everything_is_copied(repo):
    copying = Bubblewrap()
    copying.features = dataclasses.replace(copying.features, overlay=False)
    os.mkfifo(repo / 'fifo')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(repo / 'socket'))
    (repo / 'dangling').symlink_to('/nowhere')
    done = copying.exec(['sh', '-c', 'test -p fifo && readlink dangling; ls'], repo, overlay=True)
    assert done.stdout.split() == ['/nowhere', 'calc.py', 'dangling', 'fifo', 'sub']


def test_exec_limits(repo):
    box = Bubblewrap()
    done = box.exec(['sh', '-c', 'echo begun; (setsid sleep 600 &) ; sleep 600'], repo, SHORT)
    assert (done.timed_out, done.stdout, done.error, done.decided) == (True, 'begun\n', 'longer than 0.5 s', 'clock')
    done = box.exec(['sh', '-c', 'yes | head -c 9000; echo done >&2'], repo, Limits(output_kb=2))
    assert (done.rc, len(done.stdout), done.stderr, done.truncated, done.decided) == (0, 2048, 'done\n', True, 'limit')
    python = lambda code, *a: box.exec([os.path.realpath(sys.executable), '-S', '-c', code], repo, *a)
    assert 'MemoryError' in python('x = bytearray(10**9)', QUICK).stderr
    assert python('while True: pass', Limits(cpu_s=1, wall_s=30)).error == 'more than 1 s of CPU time'
    assert 'Network is unreachable' in python('import socket; socket.create_connection(("192.0.2.1", 80))').stderr


def test_exec_shows_what_it_is_told(repo):
    box, extra = Bubblewrap(), repo.parent / 'secret'
    assert box.exec(['cat', str(extra)], repo, show=[extra]).stdout == 's3cret'
    with pytest.raises(ValueError, match='show'):
        box.exec(['true'], repo, show=['/nowhere/x'])
    with pytest.raises(ValueError, match='workspace'):
        box.exec(['true'], repo / 'calc.py')


def test_exec_of_real_tests(repo):
    (repo / 'test_calc.py').write_text('import unittest\nfrom calc import add\nclass T(unittest.TestCase):\n'
                                       '    def test_add(self): self.assertEqual(add(1, 2), 3)\n')
    python = [os.path.realpath(sys.executable), '-S', '-B', '-m', 'unittest']
    assert 'AssertionError: -1 != 3' in Bubblewrap().exec(python, repo).stderr
    (repo / 'calc.py').write_text('def add(a, b): return a + b\n')
    assert Bubblewrap().exec(python, repo).rc == 0
