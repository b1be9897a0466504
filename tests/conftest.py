"""Triton's kernels run in its interpreter where there is no GPU; that is chosen before anything imports triton.

Also databases for the tests of the store: SQLite files, and a PostgreSQL server of our own where there is one; and the
command `kat`."""
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# a run in the background may have been told to ignore these, and every process that a test starts would inherit that
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL),
                      (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


def initdb() -> Path:
    "The newest PostgreSQL's program that makes a database; skips where there is none."
    pytest.importorskip('psycopg', reason="psycopg isn't installed: pip install 'psycopg[binary]'")
    debian = Path('/usr/lib/postgresql')
    found = list(debian.glob('*/bin/initdb')) if debian.exists() else []
    if found: return max(found, key=lambda path: int(path.parts[-3]))
    if on_path := shutil.which('initdb'): return Path(on_path)
    pytest.skip('no PostgreSQL on this machine (initdb)')


def unprivileged(data: Path) -> dict:
    "Hand `data` to whom the server may run as, since it refuses root; what Popen needs to be told."
    if os.geteuid() != 0: return {}
    try:
        shutil.chown(data, 'postgres')
    except LookupError:
        shutil.rmtree(data)
        pytest.skip('PostgreSQL will not run as root, and there is no user postgres')
    return dict(user='postgres', group='postgres')


@pytest.fixture(scope='session')
def postgres(tmp_path_factory):
    "The address of a PostgreSQL server of our own; skips where there is none."
    make = initdb()
    data = Path('/tmp')/f'kat-postgres-{os.getpid()}'
    data.mkdir(mode=0o700)
    who = unprivileged(data)
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd='/')
    server = None
    try:
        subprocess.run([make, '-D', data/'db', '-U', 'kat', '-A', 'trust', '-E', 'UTF8', '--no-sync'], check=True,
                       **quiet, **who)
        server = subprocess.Popen([make.with_name('postgres'), '-D', data/'db', '-p', str(port), '-k', data,
                                   '-h', '127.0.0.1', '-c', 'fsync=off'], **quiet, **who)
        import psycopg
        for _ in range(100):
            try:
                psycopg.connect(host='127.0.0.1', port=port, user='kat', dbname='postgres').close()
                break
            except psycopg.OperationalError:
                time.sleep(.1)
        yield f'postgresql://kat@127.0.0.1:{port}/postgres'
    finally:
        if server:
            server.send_signal(signal.SIGQUIT)
            server.wait()
        shutil.rmtree(data)


@pytest.fixture(params=['sqlite', 'postgres'])
def url(request, tmp_path):
    "An empty database of either kind."
    if request.param == 'sqlite': return str(tmp_path/'store.db')
    base, name = request.getfixturevalue('postgres'), f'd{time.monotonic_ns()}'
    import psycopg
    with psycopg.connect(base, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE {name}')
    return base.rpartition('/')[0] + '/' + name


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    "Runs `kat` with these arguments in an empty folder; (exit code, what it printed, what it complained)."
    from kat.cli import main
    monkeypatch.chdir(tmp_path)
    def run(*args):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, args)])
        return ended.value.code, *capsys.readouterr()
    return run
