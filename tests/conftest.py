"""Triton's kernels run in its interpreter where there is no GPU; the choice must be made before anything imports triton.

Also databases for the tests of the store: SQLite files, and a PostgreSQL server of our own where there is one."""
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


@pytest.fixture(scope='session')
def postgres(tmp_path_factory):
    "The address of a PostgreSQL server of our own; skips where there is none."
    pytest.importorskip('psycopg', reason="psycopg isn't installed: pip install 'psycopg[binary]'")
    found = sorted(Path('/usr/lib/postgresql').glob('*/bin/initdb'), key=lambda p: int(p.parts[-3])) if Path('/usr/lib/postgresql').exists() else []
    found = found or ([Path(x)] if (x := shutil.which('initdb')) else [])
    if not found:
        pytest.skip('no PostgreSQL on this machine (initdb)')
    root, who = os.geteuid() == 0, {}
    data = Path('/tmp')/f'kat-postgres-{os.getpid()}'
    data.mkdir(mode=0o700)
    if root:  # the server refuses to run as root
        try:
            shutil.chown(data, 'postgres')
        except LookupError:
            shutil.rmtree(data)
            pytest.skip('PostgreSQL will not run as root, and there is no user postgres')
        who = dict(user='postgres', group='postgres')
    with socket.create_server(('127.0.0.1', 0)) as s:
        port = s.getsockname()[1]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd='/')
    server = None
    try:
        subprocess.run([found[-1], '-D', data/'db', '-U', 'kat', '-A', 'trust', '-E', 'UTF8', '--no-sync'], check=True, **quiet, **who)
        server = subprocess.Popen([found[-1].with_name('postgres'), '-D', data/'db', '-p', str(port), '-k', data, '-h', '127.0.0.1', '-c', 'fsync=off'], **quiet, **who)
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
    with psycopg.connect(base, autocommit=True) as c:
        c.execute(f'CREATE DATABASE {name}')
    return base.rpartition('/')[0] + '/' + name
