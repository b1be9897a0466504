"A part's record outlives it, is never half written, and tells who is dead; what is shown is what was written"
import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from kat.cli import app
from kat.core.io import UserError
from kat.cluster.parts import RunPart, condition, mark_ended, read_parts
from kat.cluster.status import CLUSTER_METRICS, gateway_status, metrics_text, run_status, status_rows

CHILD = """
import sys, threading
from kat.cluster.parts import RunPart
with RunPart(sys.argv[1], 'rollout', every=.05, waits_for='weights', version=3):
    print('up', flush=True)
    threading.Event().wait()
"""


@pytest.fixture
def child(tmp_path):
    process = subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'up\n'
    yield process
    process.kill()
    process.communicate()


def only(folder, **more):
    record, = read_parts(folder, **more)
    return record


def test_a_killed_part_is_dead_with_the_time_since(tmp_path, child):
    assert only(tmp_path)['condition'] == 'waits'
    child.kill()
    child.wait()
    record = only(tmp_path)
    assert record['condition'] == 'dead' and record['pid'] == child.pid
    later = only(tmp_path, now=record['beat'] + 300)
    assert status_rows([later])[0][3] == 'last heard of 5 min ago, when it waited for weights'


def test_a_stopped_part_is_stuck(tmp_path, child):
    os.kill(child.pid, signal.SIGSTOP)
    record = only(tmp_path)
    assert only(tmp_path, now=record['beat'] + 11)['condition'] == 'stuck'
    os.kill(child.pid, signal.SIGCONT)


def test_one_that_was_ended_on_purpose_is_not_dead(tmp_path, child):
    child.terminate()
    child.wait()
    mark_ended(tmp_path, 'rollout', child.pid + 1)   # somebody else's
    assert only(tmp_path)['condition'] == 'dead'
    mark_ended(tmp_path, 'rollout', child.pid)
    assert only(tmp_path)['condition'] == 'ended'
    mark_ended(tmp_path, 'nobody', 1)


def test_a_part_ends_fails_or_is_closed(tmp_path):
    with pytest.raises(ValueError), RunPart(tmp_path, 'a'):
        raise ValueError('two\nlines')
    record = only(tmp_path)
    assert record['condition'] == 'failed' and record['error'] == 'ValueError: two lines'
    def steps():
        with RunPart(tmp_path, 'a') as part:
            yield part
    coming = steps()
    next(coming)
    coming.close()
    assert only(tmp_path)['condition'] == 'ended'


def test_a_wait_keeps_its_beginning_and_loses_its_deadline(tmp_path):
    with RunPart(tmp_path, 'a') as part:
        part.tell(waits_for='x', deadline_s=5)
        since = part.record['since']
        part.tell(waits_for='x', deadline_s=5, version=2)
        assert only(tmp_path)['since'] == since and only(tmp_path)['deadline_s'] == 5
        part.tell(waits_for=None)
        assert only(tmp_path)['deadline_s'] is None and only(tmp_path)['condition'] == 'runs'


def test_readers_never_see_half_a_record(tmp_path):
    with RunPart(tmp_path, 'a', every=.001) as part:
        def write():
            for number in range(100):
                part.tell(version=number, error='x' * (number % 7) * 1000)
        writer = threading.Thread(target=write)
        writer.start()
        while writer.is_alive():
            assert only(tmp_path)['part'] == 'a'
        writer.join()
        assert only(tmp_path)['version'] == 99
    assert [path.name for path in (tmp_path/'parts').iterdir()] == ['a.json']


@pytest.mark.parametrize('silent, expected', [(9, 'runs'), (11, 'dead')])
def test_of_another_host_only_the_heartbeat_tells(silent, expected):
    record = dict(host='elsewhere', pid=os.getpid(), began=1, every=1., state='runs', waits_for=None, beat=100.)
    assert condition(record, 100. + silent) == expected


def test_the_command(tmp_path):
    (tmp_path/'40_rl').mkdir()
    ask = lambda *args: CliRunner().invoke(app, ['cluster', 'status', *args])
    with RunPart(tmp_path/'40_rl', 'trainer', version=4, groups_taken=9):
        shown = ask(str(tmp_path)).output
        assert '40_rl/trainer' in shown and 'v4' in shown and 'taken 9' in shown
        assert json.loads(ask(str(tmp_path), '--json').output)[0]['groups_taken'] == 9
        text = ask(str(tmp_path), '--metrics').output
        assert 'kat_groups_trained_total{stage="40_rl",part="trainer",host=' in text
    assert isinstance(ask(str(tmp_path), '--json', '--metrics').exception, UserError)
    assert 'no such folder' in str(ask(str(tmp_path/'nowhere')).exception)
    assert 'no part of a run' in str(ask(str(tmp_path/'40_rl'/'parts')).exception)
    (tmp_path/'40_rl'/'parts'/'b.json').write_text('{"part"')
    with pytest.raises(UserError, match=r'b.json: not the record of a part .*delete it'):
        run_status(tmp_path)


def test_metrics_are_prometheus_text():
    records = [dict(stage='', part='a"b\\\n', host='h', condition='waits', now=9., since=4., beat=8., version=1234567)]
    lines = metrics_text(records).splitlines()
    assert 'kat_part_weight_version{stage="",part="a\\"b\\\\\\n",host="h"} 1234567' in lines
    assert [line.split()[2] for line in lines if line.startswith('# TYPE')] == [
        'kat_part_weight_version', 'kat_part_up', 'kat_part_waiting_seconds', 'kat_part_heartbeat_age_seconds']
    assert all(name.endswith('_total') == (kind == 'counter') for name, (kind, *_) in CLUSTER_METRICS.items())


class Metered(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == '/metrics' else 404)
        self.end_headers()
        self.wfile.write(b'# TYPE a counter\na{x="1"} 2\nb_bucket{le="1"} 3\n')
    def log_message(self, *_):
        pass


def test_a_gateway_is_asked(tmp_path):
    with HTTPServer(('127.0.0.1', 0), Metered) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        assert gateway_status(address) == {'a{x="1"}': 2.}
        with pytest.raises(UserError, match='no gateway'):
            gateway_status(address + '/else')
        server.shutdown()
    with pytest.raises(UserError, match='no gateway.*within 5 s'):
        gateway_status(address)
