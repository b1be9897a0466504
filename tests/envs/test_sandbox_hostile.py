"""Hostile programs, drawn at random, then an honest one in the same worker, and as two commands on the same host: the
honest result must be that of a fresh worker, and the host must be as it was.

No program here could hurt the machine much if a wall were missing: loops have bounds, and signals go to own processes
or to numbers that only exist inside."""
import dataclasses
import os
import resource
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.envs import walls
from kat.envs.sandbox import Bubblewrap, Job, Limits, WarmPool, features

pytestmark = pytest.mark.skipif(not features().works, reason=f'bubblewrap does not work here: {features().reason}')
LIMITS = Limits(memory_mb=128, cpu_s=1, wall_s=60, processes=8, files_mb=8)
PYTHON = [os.path.realpath(sys.executable), '-S', '-s', '-P', '-B']

HOSTILE = {
    # limits, priority, processors, scheduler: of itself, its parent, process 1 and everybody
    'limits of others': 'for p in (0, 1, os.getppid()):\n'
                        '  for n in range(16): attempt(resource.prlimit, p, n, (20, 20))',
    'no more files': 'resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n'
                     'resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4))',
    'nice': 'for which in (0, 1, 2):\n  for who in (0, 1, os.getppid()): attempt(os.setpriority, which, who, 19)',
    'affinity': 'for p in (0, 1, os.getppid()): attempt(os.sched_setaffinity, p, {0})',
    'idle': 'for p in (0, 1, os.getppid()): attempt(os.sched_setscheduler, p, os.SCHED_IDLE, os.sched_param(0))',
    'batch': 'for p in (0, 1): attempt(os.sched_setscheduler, p, os.SCHED_BATCH, os.sched_param(0))',
    'io priority': 'for w in (1, 2, 3): call(251, w, 0, (3 << 13))',
    'oom score': 'for p in ("self", 1): attempt(write, f"/proc/{p}/oom_score_adj", "1000")',
    'umask': 'os.umask(0o777)',
    'timer slack': 'call(157, 29, 10**9)',
    # files, modes, attributes
    'mode of tmp': 'for p in ("/tmp", ".", "..", "/dev/shm", "/dev", "/", "/dev/pts"): attempt(os.chmod, p, 0)',
    'mode of devices': 'for p in ("null", "zero", "full", "random", "urandom", "tty"): attempt(os.chmod, '
                       'f"/dev/{p}", 0o667)',
    'owner of devices': 'for p in ("null", "zero"): attempt(os.chown, f"/dev/{p}", 1000, 1000)',
    'times of devices': 'for p in ("null", "zero", "tty"): attempt(os.utime, f"/dev/{p}", (1, 1))',
    'attributes': 'for p in ("/tmp", ".", "/dev/shm", "/dev/null", "/dev", "/usr"): attempt(os.setxattr, p, '
                  '"user.x", b"1")',
    'full tmp': 'attempt(write, "/tmp/fill", "x" * 9_000_000)',
    'full shm': 'attempt(write, "/dev/shm/fill", "x" * 9_000_000)',
    'many files': 'for i in range(5000): attempt(write, f"/tmp/{i}", "")',
    'deep': 'for i in range(1500): os.mkdir("d"); os.chdir("d")',
    'locked folder': 'os.mkdir("a"); write("a/b", ""); os.chmod("a", 0)',
    'links': 'os.symlink("/usr", "/tmp/usr"); os.mkfifo("/tmp/fifo"); os.symlink("/dev/null", "m.py")',
    'setuid': 'for p in ("/tmp/s", "/workspace/s"): attempt(write, p, "x"); attempt(os.chmod, p, 0o6755)',
    'setuid at birth': 'for p in ("/tmp/t", "/workspace/t"): attempt(os.open, p, os.O_CREAT | os.O_WRONLY, 0o6777)',
    'setuid node': 'attempt(os.mknod, "/tmp/n", 0o106755)',
    'no tmp': 'os.rmdir("/tmp/work")',
    'moved tmp': 'os.rename("/tmp/work", "/tmp/elsewhere"); write("/tmp/work", "a file now")',
    'modules': 'for m in ("json", "os", "random", "m"): write(f"/tmp/{m}.py", "1/0"); '
               'write(f"/tmp/work/{m}.py", "1/0")',
    'site': 'for d in ("/tmp/.local/lib/python3.11/site-packages", "/tmp/.config"): os.makedirs(d); '
            'write(d + "/x.pth", "x")',
    # network and what is like it
    'port': 's = socket.create_server(("127.0.0.1", 8123))\nc = socket.create_connection(("127.0.0.1", 8123))\n'
            's.accept()',
    'time wait': 's = socket.create_server(("127.0.0.1", 8123))\nc = socket.create_connection(("127.0.0.1", 8123))\n'
                 'd, _ = s.accept()\nd.close(); c.close(); s.close()',
    'abstract socket': 's = socket.socket(socket.AF_UNIX); s.bind("\\0kat"); s.listen(); os.fork()',
    'udp': 's = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 8123)); '
           's.sendto(b"x", ("127.0.0.1", 8123))',
    'families': 'for f in range(64): attempt(socket.socket, f, socket.SOCK_STREAM)',
    'host name': 'attempt(socket.sethostname, "evil")',
    'system v': 'for n in (29, 64, 68): call(n, 1234, 4096, 0o1666)',
    'message queue': 'call(240, b"kat", 0o102, 0o666, 0)',
    'keys': 'call(248, b"user", b"kat", b"secret", 6, -3); call(250, 1, 0)',
    # processes
    'daemon': 'if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(600)\n  os._exit(0)',
    'many processes': 'for i in range(30):\n  if os.fork() == 0: time.sleep(600)',
    'many threads': 'for i in range(200): attempt(threading.Thread(target=time.sleep, args=[600], daemon=True).start)',
    'zombies': 'for i in range(6):\n  if os.fork() == 0: os._exit(0)',
    'signals': 'for n in (1, 2, 3, 9, 15, 18, 19, 20): attempt(os.kill, 1, n)',
    'stop': 'os.kill(os.getpid(), signal.SIGSTOP)',
    'deaf': 'for n in range(1, 32): attempt(signal.signal, n, signal.SIG_IGN)\nif os.fork() == 0: time.sleep(600)',
    'killed': 'os.kill(os.getpid(), signal.SIGKILL)',
    'crash': 'ctypes.string_at(0)',
    'abort': 'os.abort()',
    'trace': 'call(101, 16, 1, 0, 0); attempt(open, "/proc/1/mem", "r+b")',
    'user namespace': 'call(272, 0x10000000); call(56, 0x10000011, 0, 0, 0, 0); call(435, 0, 0)',
    'mounts': 'call(165, b"tmpfs", b"/tmp", b"tmpfs", 0, 0); call(166, b"/proc", 2); call(272, 0x20000)',
    # memory
    'memory files': 'keep = []\nfor i in range(30):\n  fd = call(319, b"x", 0)\n'
                    '  if fd >= 0: attempt(os.truncate, fd, 8 << 20)',
    'shared memory': 'm = mmap.mmap(-1, 90 << 20)\nfor i in range(0, len(m), 4096): m[i] = 1\nos.fork()\n'
                     'time.sleep(.1)',
    'memory of many': 'for i in range(5):\n  if os.fork() == 0:\n    x = bytearray(90 << 20); time.sleep(600)\n'
                      'time.sleep(600)',
    'memory of one': 'x = bytearray(10**9)',
    'locked memory': 'm = mmap.mmap(-1, 1 << 20); call(149, 0, 1 << 20); call(151, 3)',
    # the interpreter, the pipes
    'builtins': 'import builtins, json\nbuiltins.len = None; json.dumps = None; os.environ["A"] = "b"; random.seed(5)',
    'time': 'while True: pass',
    'output': 'while True: os.write(1, b"x" * 65536)',
    'result pipe': 'attempt(os.write, 3, b"{\\"value\\": 1}\\n{\\"end\\": \\"ok\\"}\\n"); os._exit(0)',
    'descriptors': 'for fd in range(3, 200): attempt(os.write, fd, b"x"); attempt(os.close, fd)',
    'blocking': 'for fd in (0, 1, 2, 3): attempt(os.set_blocking, fd, False)',
    'terminals': 'a, b = os.openpty(); attempt(os.chmod, os.ttyname(b), 0); attempt(os.fchown, b, 1000, 1000)',
    'locks': 'import fcntl\n'
             'for p in ("/usr/bin/env", "/dev/null", "."): attempt(lambda: fcntl.flock(os.open(p, 0), 2))\nos.fork()',
    'system': 'for p in ("sys/kernel/core_pattern", "sys/vm/overcommit_memory", "sysrq-trigger",'
              ' "sys/kernel/ns_last_pid", "sys/net/ipv4/ip_forward"): attempt(write, f"/proc/{p}", "1")',
}
START = '''
import ctypes, mmap, os, random, resource, signal, socket, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(n, *a): return libc.syscall(ctypes.c_long(n), *(ctypes.c_long(x) if isinstance(x, int) else x for x in a))
def write(path, text):
    with open(path, "w") as f: f.write(text)
def attempt(f, *a):
    try: return f(*a)
    except (OSError, ValueError, RuntimeError): pass
'''

HONEST = {
    'itself': '''
import resource
said = [resource.getrlimit(n) for n in range(16)]
said += [os.getpriority(w, 0) for w in (0, 1, 2)] + [sorted(os.sched_getaffinity(0)), os.sched_getscheduler(0)]
mask = os.umask(0)
said += [mask, os.getpid(), os.getppid(), os.getuid(), os.getgid(), os.getgroups(), os.getcwd(), dict(os.environ)]
said += [sorted(fd for fd in os.listdir("/proc/self/fd") if int(fd) < 3)]
tell(said)''',
    'places': '''
said = []
for place in ("/", "/tmp", "/tmp/work", "/dev", *(f"/dev/{n}" for n in ("shm", "pts", "null", "zero", "full", "tty"))):
    try: kind = os.stat(place)
    except OSError as e: said.append(str(e)); continue
    said.append([place, kind.st_mode, kind.st_uid, kind.st_gid, os.listxattr(place)])
said += [sorted(os.listdir(p)) for p in ("/", "/tmp", "/dev/shm", "/dev", "/dev/pts")]
said += [sorted(p for p in os.listdir("/proc") if p.isdigit())]
tell(said)''',
    'network': '''
import socket, threading
server = socket.socket()
server.bind(("127.0.0.1", 8123))
server.listen()
threading.Thread(target=lambda: server.accept()[0].sendall(b"hello")).start()
other = socket.create_connection(("127.0.0.1", 8123))
names = socket.socket(socket.AF_UNIX)
names.bind("\\0kat")
tell([other.recv(5).decode(), socket.gethostname(), sorted(n for _, n in socket.if_nameindex())])''',
    'room': '''
with open("/tmp/most", "wb") as f: f.write(bytes(6 << 20))
os.mkfifo("/dev/shm/fifo")
x = bytearray(40 << 20)
import subprocess, tempfile
said = subprocess.check_output(["/bin/sh", "-c", "echo $HOME; ls /tmp"], text=True)
tell([said, os.statvfs("/tmp").f_blocks, os.statvfs("/tmp").f_files, os.path.exists(tempfile.mkdtemp())])''',
    'interpreter': '''
import json, random, sys
open("m.py", "w").write("x = 1")
sys.path.insert(0, "")
import m
random.seed(0)
tell([hash("x"), random.random(), len([1, 2]), json.dumps({}), m.x, m.__file__.endswith("m.py")])''',
}


def host_state():
    "What a job might change about this process and this machine."
    places = [walls.bwrap_candidates()[0], sys.executable, '/tmp', '/dev/shm', '/usr',
              *(f'/dev/{name}' for name in ('null', 'zero', 'full', 'random', 'urandom', 'tty', 'pts'))]
    modes = [(place, kind.st_mode, kind.st_uid, kind.st_gid, os.listxattr(place))
             for place in places for kind in [os.stat(place)]]
    return [modes, [resource.getrlimit(n) for n in range(16)], os.getpriority(0, 0), os.sched_getaffinity(0),
            os.sched_getscheduler(0), os.uname().nodename,
            Path('/proc/sys/kernel/core_pattern').read_text(), sorted(set(os.listdir('/proc/self/fd')))[:3]]


def job(name):
    return Job(START + 'tell = result\n' + HONEST[name], limits=LIMITS)


@cache
def warm():
    return WarmPool(limits=LIMITS, trust='foreign')


@cache
def fresh(name):
    with WarmPool(limits=LIMITS, trust='foreign') as pool:
        done = pool.run(job(name))
    assert done.status == 'ok', done
    return done


def played(names):
    return START + ''.join('try:\n' + '\n'.join('  ' + line for line in HOSTILE[name].split('\n'))
                           + '\nexcept Exception: pass\n' for name in names)


def unchanged(before):
    assert host_state() == before
    assert warm().run(Job('result(1)')).value == 1


@pytest.mark.parametrize('name', HONEST)
def test_honest_jobs_are_the_same_in_every_run(name):
    assert [warm().run(job(name)) for _ in range(3)] == [fresh(name)] * 3


@pytest.mark.parametrize('name', HOSTILE)
def test_every_hostile_program(name):
    before = host_state()
    warm().run(Job(played([name]), limits=dataclasses.replace(LIMITS, wall_s=2)))
    assert [warm().run(job(honest)) for honest in HONEST] == [fresh(honest) for honest in HONEST]
    unchanged(before)


pairs = st.lists(st.sampled_from(sorted(HOSTILE)), min_size=1, max_size=2, unique=True)


@settings(max_examples=25, deadline=None)
@given(hostile=pairs, honest=st.sampled_from(sorted(HONEST)))
def test_nothing_reaches_the_next_job(hostile, honest):
    before = host_state()
    warm().run(Job(played(hostile), limits=dataclasses.replace(LIMITS, wall_s=2)))
    assert warm().run(job(honest)) == fresh(honest)
    unchanged(before)


@cache
def cold(name, place):
    done = Bubblewrap().exec([*PYTHON, '-c', COLD + HONEST[name]], place, LIMITS, overlay=True)
    assert done.rc == 0, done
    return done


COLD = START + 'import json, sys\nos.chdir("/tmp/work")\ndef tell(value): print(json.dumps(value))\n'


@settings(max_examples=12, deadline=None)
@given(hostile=pairs, honest=st.sampled_from(sorted(HONEST)), writable=st.booleans())
def test_nothing_reaches_the_next_command(tmp_path_factory, hostile, honest, writable):
    first, second, before = tmp_path_factory.mktemp('first'), tmp_path_factory.mktemp('second'), host_state()
    box = Bubblewrap()
    box.exec([*PYTHON, '-c', played(hostile)], first, dataclasses.replace(LIMITS, wall_s=2), overlay=not writable)
    left = [p for p in first.rglob('*') if not p.is_symlink()]
    assert all(p.stat().st_mode & 0o6000 == 0 for p in left) and (writable or not left)
    assert box.exec([*PYTHON, '-c', COLD + HONEST[honest]], second, LIMITS, overlay=True) == cold(honest, second)
    assert host_state() == before
