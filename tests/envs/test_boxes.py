"""One behaviour for both boxes: bubblewrap, and a container.

Containers are tried where the environment names an image with a shell and Python that the engine has: KAT_IMAGE, see
`make images`.
"""
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from kat.envs.base import InfraError
from kat.envs.images import LABEL, DockerApi, Images, _ended, find_engine, recipe
from kat.envs.sandbox import Bubblewrap, Limits, features

IMAGE = os.environ.get('KAT_IMAGE')
no_bubblewrap = pytest.mark.skipif(not features().works, reason='bubblewrap does not work here')
no_image = pytest.mark.skipif(not IMAGE, reason='KAT_IMAGE is not set')
LIMITS = Limits(memory_mb=256, cpu_s=20, wall_s=60, processes=16, output_kb=64, files_mb=8)
BOXES = [pytest.param(Bubblewrap, id='bubblewrap', marks=no_bubblewrap),
         pytest.param(lambda: Images(IMAGE), id='image', marks=no_image)]


@pytest.fixture(scope='module', params=BOXES)
def box(request):
    return request.param()


@pytest.fixture
def sh(box, tmp_path):
    "Run a line of shell in a box, with other limits or settings"
    def run(line, show=(), env=None, writable=True, overlay=False, **limits):
        asked = Limits(**{**vars(LIMITS), **limits})
        return box.exec(['/bin/sh', '-c', line], tmp_path, asked, writable, overlay, env, show)
    return run


def test_streams_and_exit_code(sh):
    got = sh('echo out; echo err >&2; exit 3')
    assert (got.rc, got.stdout, got.stderr) == (3, 'out\n', 'err\n')
    assert (got.cause, got.timed_out, got.decided) == (None, False, 'code')
    assert sh('cat').rc == 0  # nothing to read


def test_a_bare_environment(sh, monkeypatch):
    monkeypatch.setenv('KAT_SECRET', 'secret')
    got = sh('echo $HOME $TMPDIR $ONE $(pwd); env', env=dict(ONE='ein Wort'))
    assert got.stdout.startswith('/tmp /tmp ein Wort /workspace\n') and 'secret' not in got.stdout


def test_changes_reach_the_workspace(sh, tmp_path):
    (tmp_path / 'old').write_text('text')
    assert sh('cat old > new; rm old; mkdir folder').rc == 0
    assert (tmp_path / 'new').read_text() == 'text' and sorted(os.listdir(tmp_path)) == ['folder', 'new']
    assert (tmp_path / 'new').stat().st_uid == os.geteuid()


def test_a_workspace_that_cannot_be_written(sh, tmp_path):
    assert sh('touch new', writable=False).rc != 0
    assert sh('touch /new /usr/new /etc/new 2>/dev/null').rc != 0
    assert not os.listdir(tmp_path)


def test_a_workspace_whose_changes_are_forgotten(sh, tmp_path):
    (tmp_path / 'old').write_text('text')
    (tmp_path / 'link').symlink_to('old')
    got = sh('cat link; rm old link; echo new > new; ls', overlay=True)
    assert got.stdout == 'textnew\n' and sorted(os.listdir(tmp_path)) == ['link', 'old']


def test_what_is_shown_can_be_read_only(sh, tmp_path_factory):
    shown = tmp_path_factory.mktemp('shown')
    (shown / 'file').write_text('text')
    got = sh(f'cat {shown}/file; echo more >> {shown}/file', show=(str(shown),))
    assert got.stdout == 'text' and got.rc != 0 and (shown / 'file').read_text() == 'text'


def test_no_network_and_no_rights(sh):
    got = sh('tail -n +3 /proc/net/dev | grep -vc lo:; grep -E "CapEff|NoNewPrivs" /proc/self/status')
    assert got.stdout.split() == ['0', 'CapEff:', '0' * 16, 'NoNewPrivs:', '1']


def test_the_wall_limit(sh):
    got = sh('echo begun; sleep 600', wall_s=2)
    assert (got.rc, got.cause, got.timed_out, got.stdout) == (-9, 'wall', True, 'begun\n') and got.wall_s < 60


def test_the_cpu_limit(sh):
    got = sh('while :; do :; done', cpu_s=1)
    assert got.cause == 'cpu' and got.rc < 0 and got.decided == 'limit'


def test_the_memory_limit(sh):
    got = sh('head -c 400m /dev/zero | tail -c 400m > /dev/null; exit $?', memory_mb=64)
    assert got.rc != 0 and not got.timed_out


def test_memory_taken_through_tmp(sh):
    assert sh('head -c 20m /dev/zero > /tmp/file').rc != 0
    assert sh('for i in 1 2 3; do head -c 4m /dev/zero > /tmp/$i || exit 7; done').rc != 0


def test_the_limit_of_processes(sh):
    got = sh('for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 30 & done; echo all; exit 0', processes=6)
    assert 'all' not in got.stdout and (got.rc != 0 or got.cause == 'processes')


def test_the_limit_of_output(sh):
    got = sh('yes | head -c 300000; echo end >&2', output_kb=16)
    assert (got.cause, got.truncated, len(got.stdout), got.stderr) == ('output', True, 16 * 1024, 'end\n')
    assert sh('yes | head -c 16384', output_kb=16).cause is None


def test_all_ends_with_the_command(sh):
    got = sh('sleep 600 & setsid sleep 600 & exit 0')
    assert got.rc == 0 and got.wall_s < 30


def test_how_programs_end(sh, box, tmp_path):
    assert (sh('kill -SEGV $$').rc, sh('kill -SEGV $$').cause) == (-11, 'signal')
    assert (sh('kill -KILL $$').rc, sh('kill -KILL $$').cause) == (-9, 'killed')
    assert box.exec(['no-such-program'], tmp_path, LIMITS).rc == 127


def test_nothing_of_one_run_is_in_the_next(sh):
    sh('echo text > /tmp/file; echo text > /dev/shm/file')
    assert sh('ls /tmp/file /dev/shm/file 2> /dev/null').stdout == ''


def test_many_at_once(sh):
    with ThreadPoolExecutor(4) as some:
        assert [g.stdout for g in some.map(lambda i: sh(f'echo {i}'), range(8))] == [f'{i}\n' for i in range(8)]


def test_python_is_in_the_box(box, tmp_path):
    got = box.exec([box.python, '-I', '-c', 'import json, sys; print(sys.version_info >= (3, 9))'], tmp_path, LIMITS)
    assert got.stdout == 'True\n', got


def test_bad_calls(box, tmp_path):
    for argv, work, more, words in (([], tmp_path, {}, 'begins with a program'), (['a\0'], tmp_path, {}, 'NUL'),
                                    (['true'], tmp_path / 'none', {}, 'not a directory'),
                                    (['true'], tmp_path, dict(show=('/no/where',)), 'there is no'),
                                    (['true'], tmp_path, dict(env={'a=b': ''}), 'env')):
        with pytest.raises(ValueError, match=words):
            box.exec(argv, work, LIMITS, **more)


@no_image
def test_no_container_is_left():
    left = find_engine().ask('GET', '/containers/json', all='1', filters='{"label": ["%s=%d"]}' % (LABEL, os.getpid()))
    assert left == []


@no_image
def test_containers_of_the_dead_are_swept():
    "A process that was killed leaves its container; the next one removes it"
    dead = subprocess.Popen(['true'])
    dead.wait()
    engine = find_engine()
    bounds = [dict(Name=name, Soft=64, Hard=64) for name in ('nofile', 'nproc')]
    asked = dict(Image=IMAGE, Cmd=['true'], Labels={LABEL: str(dead.pid)}, HostConfig=dict(Ulimits=bounds))
    engine.ask('POST', '/containers/create', asked, name='kat-dead')
    Images(IMAGE)
    assert 'kat-dead' not in str(engine.ask('GET', '/containers/json', all='1'))
    with pytest.raises(InfraError, match='no image'):
        Images('kat-no-such:image')


def test_ends_are_told_apart():
    told = lambda code, **more: _ended(dict(ExitCode=code, **more), False, False, LIMITS)[:2]
    assert told(0) == (0, None) and told(1) == (1, None) and told(137, OOMKilled=True) == (-9, 'memory')
    assert told(152) == (-24, 'cpu') and told(139) == (-11, 'signal') and told(137) == (-9, 'killed')
    assert told(255) == (255, None) and _ended(dict(ExitCode=0), False, True, LIMITS)[1] == 'output'


def test_engines_that_are_not_there(monkeypatch, tmp_path):
    with pytest.raises(InfraError, match='none.sock'):
        DockerApi(str(tmp_path / 'none.sock')).ask('GET', '/info')
    monkeypatch.setenv('DOCKER_HOST', 'tcp://127.0.0.1:1')
    with pytest.raises(InfraError, match='unix:// sockets only'):
        find_engine()
    monkeypatch.setenv('DOCKER_HOST', f'unix://{tmp_path}/none.sock')
    with pytest.raises(InfraError, match='no engine'):
        find_engine()


def test_a_recipe(tmp_path):
    text, context = recipe('base:1', tmp_path, '/usr/bin/node')
    assert text.splitlines()[0] == 'FROM base:1' and f'COPY site {tmp_path}' in text
    assert set(context) == {'site', 'node'}
    assert recipe('base:1', None) == ('FROM base:1\nWORKDIR /workspace\n', {})
