"From a package index to tasks and back: a small index of our own, served on this machine"

import hashlib
import http.server
import io
import os
import sysconfig
import tarfile
import threading
import zipfile
from functools import cache
from pathlib import Path

import pytest

from kat.tasks import archives, indexes
from kat.tasks.archives import archive_tree
from kat.envs.base import InfraError
from kat.tasks.build import Dropped, Pair, Stages, Yard, build_tasks
from kat.tasks.indexes import prefetch, python_releases
from kat.tasks.releases import (
    candidate_sources,
    fetch_tasks,
    grouped,
    load_release,
    neighbours,
    read_plan,
    read_release_rows,
    renew_rows,
    tree_hash,
    ungrouped,
)
from kat.envs.sandbox import Bubblewrap, features
from kat.tasks.sites import install_needs, install_site, resolve_pins, site_key
from kat.strength.sources import write_rows
from kat.strength.testgen import with_own
from kat.tasks.statement import describe
from kat.tasks.software import gold_tree, read_task
from kat.tasks.validate import ROUNDS

walls = pytest.mark.skipif(not features().works, reason='bubblewrap does not work here')
LICENCE = '# All rights in this line are reserved by somebody.\n'


def sdist(version, sign, want, **more):
    "An archive of the toy package's source"
    files = {
        'toy/__init__.py': f'{LICENCE}__version__ = {version!r}\ndef add(a, b):\n    return a {sign} b\n',
        'tests/test_toy.py': f'{LICENCE}from toy import add\ndef test_add():\n    assert add(1, 2) == {want}\n'
        'def test_zero():\n    assert add(1, 0) == 1\n',
        'PKG-INFO': f'Metadata-Version: 2.1\nName: toy\nVersion: {version}\n',
        **more,
    }
    return packed({f'toy-{version}/{path}': text for path, text in files.items()})


def packed(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as tar:
        for path, text in files.items():
            one = tarfile.TarInfo(path)
            one.size = len(text.encode())
            tar.addfile(one, io.BytesIO(text.encode()))
    return out.getvalue()


@cache
def wheel(name, version, *modules):
    "A wheel; the same bytes each time"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as archive:
        info = f'{name}-{version}.dist-info'
        for module in modules or (name,):
            archive.writestr(f'{module}.py', f'version = {version!r}\n')
        archive.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        archive.writestr(
            f'{info}/WHEEL', 'Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n'
        )
        archive.writestr(f'{info}/RECORD', '')
    return out.getvalue()


class Index(http.server.ThreadingHTTPServer):
    "A package index: files by name; `fails` is what it answers instead"

    fails = None

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.asked = {}, []


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        index, parts = self.server, self.path.strip('/').split('/')
        index.asked.append(self.path)
        if index.fails:
            return self.send_error(index.fails)
        if parts[0] == 'files' and parts[-1] in index.files:
            return self.say(index.files[parts[-1]])
        mine = [f for f in index.files if f.split('-')[0] == parts[-1]]
        if not mine:
            return self.send_error(404)
        links = [f'<a href="/files/{f}#sha256={hashlib.sha256(index.files[f]).hexdigest()}">{f}</a>' for f in mine]
        self.say('<!DOCTYPE html>' + ''.join(links).encode().decode(), 'text/html')

    def say(self, body, kind='application/octet-stream'):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(200)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def index(monkeypatch):
    for name in [n for n in os.environ if n.startswith('PIP_')]:
        monkeypatch.delenv(name)
    with Index() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in dict(
            CONFIG_FILE=os.devnull,
            INDEX_URL=f'http://127.0.0.1:{server.server_port}/simple',
            RETRIES='0',
            NO_CACHE_DIR='1',
            DISABLE_PIP_VERSION_CHECK='1',
        ).items():
            monkeypatch.setenv(f'PIP_{name}', value)
        indexes._files.cache_clear()
        server.files = {
            'toy-1.0.tar.gz': sdist('1.0', '-', -1),
            'toy-1.1.tar.gz': sdist('1.1', '+', 3),
            'toy-2.0rc1.tar.gz': sdist('2.0rc1', '*', 2),
            'toy-1.1-py3-none-any.whl': wheel('toy', '1.1'),
        }
        yield server
        server.shutdown()


def quiet(text):
    pass


def environment(pair, folder):
    "The packages of the interpreter that runs the tests, as a site; its list of packages is one toy"
    pins = [['runner', '1.0', hashlib.sha256(wheel('runner', '1.0')).hexdigest()]]
    where = Path(folder) / 'sites'
    where.mkdir(exist_ok=True, parents=True)
    if not (where / site_key(pins)).exists():
        os.symlink(sysconfig.get_path('purelib'), where / site_key(pins))
    return dict(site=site_key(pins), pins=pins)


# ---- the whole way


@walls
def test_two_releases_become_a_task_a_row_without_their_code_and_the_same_task_again(index, tmp_path):
    plan = tmp_path / 'plan.toml'
    plan.write_text('[python.toy]\n[python.nothing]\n')
    built, said = tmp_path / 'built', []
    sources = candidate_sources(read_plan(plan), said.append)
    assert [name for name, _ in sources] == ['toy-1.1'] and said == [
        'nothing: no two releases with their source on the index'
    ]
    stages = Stages(built / '.funnel.db')
    stages.add(sources)
    yard = Yard(
        built,
        Bubblewrap(),
        lambda one, name: load_release(one, built / '.archives'),
        environment,
        describe,
        rounds=ROUNDS[:1],
    )
    prefetch([source for _, source in sources], built / '.archives', quiet)
    assert build_tasks(stages, yard, 1, quiet) == [] and stages.rows()[0]['reason'] == ''
    task = read_task(built / 'toy-1.1')
    assert task.fail_to_pass == ('tests/test_toy.py::test_add',) and task.pass_to_pass == (
        'tests/test_toy.py::test_zero',
    )
    assert b"__version__ = '1.0'" in gold_tree(built / 'toy-1.1')['toy/__init__.py'][0]  # the fix raises no version
    assert '`add(1, 2)` returns `-1`; it should return `3`' in task.statement

    rows = tmp_path / 'releases.jsonl'
    assert write_rows(built, rows).endswith('1 tasks')
    text = rows.read_text()
    assert 'somebody' not in text and 'def add' not in text and 'return a' not in text and '127.0.0.1' not in text

    index.files['runner-1.0-py3-none-any.whl'] = wheel('runner', '1.0')
    again = tmp_path / 'again'
    assert fetch_tasks(read_release_rows(rows), again, 1, quiet) == {}
    assert read_task(again / 'toy-1.1') == task
    for name in ('gold.patch', 'Dockerfile'):
        assert (again / 'toy-1.1' / name).read_bytes() == (built / 'toy-1.1' / name).read_bytes()
    assert sorted(p.name for p in (again / 'sites').glob('*/*.py')) == ['runner.py']
    asked = len(index.asked)
    assert (
        fetch_tasks(read_release_rows(rows), again, 1, quiet) == {} and len(index.asked) == asked
    )  # nothing is asked for twice

    assert renew_rows(rows, {'toy-1.1': again / 'toy-1.1'}) == 0 and rows.read_text() == text
    own, nothing = 'tests/test_kat_1.py', dict(equivalent=[], survivors=[])
    with_own(again / 'toy-1.1', dict(
        tests={own: 'def test_kat_1():\n    assert True\n'}, fail_to_pass=[], pass_to_pass=[f'{own}::test_kat_1'],
        before=nothing, after=nothing, funnel={}, settings={}))
    assert renew_rows(rows, {'toy-1.1': again / 'toy-1.1'}) == 1
    assert fetch_tasks(read_release_rows(rows), tmp_path / 'third', 1, quiet) == {}
    stronger = read_task(tmp_path / 'third/toy-1.1')
    assert set(stronger.pass_to_pass) == {*task.pass_to_pass, f'{own}::test_kat_1'}
    assert stronger.info == read_task(again / 'toy-1.1').info
    assert (tmp_path / 'third/toy-1.1/tests' / own).read_text().startswith('def test_kat_1')


def row_of(index, **changes):
    "A row for the toy, made without running anything"
    files = {
        side: dict(version=v, file=f'toy-{v}.tar.gz', sha256=hashlib.sha256(index.files[f'toy-{v}.tar.gz']).hexdigest())
        for side, v in (('old', '1.0'), ('new', '1.1'))
    }
    from kat.tasks.build import prepared_base, take_apart

    pair = Pair(
        'toy-1.1', 'toy', *(archive_tree(index.files[files[s]['file']], 'a') for s in files), versions=('1.0', '1.1')
    )
    parts = take_apart(pair)
    base, tests = prepared_base(pair, parts, False)
    hashes = dict(base=tree_hash(base), tests=tree_hash(tests), gold=tree_hash(parts.gold))
    return (
        dict(
            schema='kat.release/1',
            id='toy-1.1',
            language='python',
            package='toy',
            **files,
            pins=[],
            plain_settings=False,
            site='',
            statement='add subtracts',
            fail_to_pass={'tests/test_toy.py': ['test_add']},
            pass_to_pass={},
            hashes=hashes,
            info={},
        )
        | changes
    )


@pytest.mark.parametrize(
    'spoil, reason',
    [
        (
            lambda index, row: index.files.update({'toy-1.1.tar.gz': sdist('1.1', '*', 3)}),
            'another hash: toy-1.1.tar.gz',
        ),
        (lambda index, row: index.files.pop('toy-1.1.tar.gz'), 'not on the index: toy-1.1.tar.gz'),
        (lambda index, row: row['hashes'].update(tests='0'), 'another hash: the tree tests'),
        (lambda index, row: row.update(pins=[['runner', '1.0', '0' * 64]]), 'cannot be installed'),
        (lambda index, row: setattr(index, 'fails', 503), '503'),
    ],
)
def test_what_is_not_what_the_row_says_is_no_task(index, tmp_path, spoil, reason):
    index.files['runner-1.0-py3-none-any.whl'] = wheel('runner', '1.0')
    row = row_of(index)
    spoil(index, row)
    try:
        failed = fetch_tasks([row], tmp_path, 1, quiet)
    except InfraError as error:
        failed = {'toy-1.1': str(error)}
    assert reason in failed['toy-1.1'] and not (tmp_path / 'toy-1.1').exists()


# ---- the index


def test_an_index_that_fails_is_not_one_that_has_nothing(index):
    assert [f['version'] for f in python_releases('toy')] == ['1.0', '1.1']
    assert python_releases('nothing') == []
    indexes._files.cache_clear()
    index.fails = 503
    with pytest.raises(InfraError, match='503'):
        python_releases('toy')


def test_packages_are_resolved_and_installed_by_hash(index, tmp_path):
    index.files['runner-1.0-py3-none-any.whl'] = wheel('runner', '1.0')
    pins = resolve_pins(['runner'])
    assert [p[:2] for p in pins] == [['runner', '1.0']]
    key = install_site(pins, tmp_path)
    assert (tmp_path / 'sites' / key / 'runner.py').exists() and install_site(pins, tmp_path) == key
    assert [p.name for p in (tmp_path / 'sites').iterdir()] == [key]
    with pytest.raises(Dropped, match='cannot be installed'):
        resolve_pins(['missing'])
    with pytest.raises(Dropped, match='cannot be installed'):
        install_site([['runner', '1.0', '0' * 64]], tmp_path)
    assert [p.name for p in (tmp_path / 'sites').iterdir()] == [key]  # what failed leaves nothing


def test_a_package_that_its_own_tests_install_is_no_task(index, tmp_path):
    index.files['helper-1.0-py3-none-any.whl'] = wheel('helper', '1.0', 'helper', 'toy')
    pair = Pair('toy-1.1', 'toy', archive_tree(index.files['toy-1.0.tar.gz'], 'a'), {}, needs=('helper',))
    with pytest.raises(Dropped, match='its own module is among the packages that its tests need: toy'):
        install_needs(pair, tmp_path, None)


# ---- archives


def linked(name, target, kind=tarfile.SYMTYPE):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for path in ('a/x.py', 'a/y.py'):
            tar.addfile(tarfile.TarInfo(path))
        one = tarfile.TarInfo(name)
        one.type, one.linkname = kind, target
        tar.addfile(one)
    return out.getvalue()


@pytest.mark.parametrize(
    'content, reason',
    [
        (b'', 'cannot be unpacked'),
        (packed({'a/x.py': '1'})[:-20], 'cannot be unpacked'),
        (packed({'../x.py': '1'}), 'leaves its'),
        (packed({'a/../../x.py': '1', 'a/y': ''}), 'leaves its'),
        (packed({'/etc/x.py': '1', 'a/y': ''}), 'leaves its'),
        (linked('a/z', 'a/none', tarfile.LNKTYPE), 'cannot be unpacked'),
    ],
)
def test_archives_that_are_odd_are_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        archive_tree(content, 'a.tar.gz')


def test_links_stay_inside_or_go():
    assert archive_tree(linked('a/z.py', 'x.py'), 'a')['z.py'] == (b'x.py', 'link')
    for target in ('/etc/passwd', '../../x', '../x'):
        assert 'z.py' not in archive_tree(linked('a/z.py', target), 'a')
    assert 'z' not in archive_tree(linked('a/z', '', tarfile.FIFOTYPE), 'a')


def test_an_archive_that_holds_too_much_is_refused(monkeypatch):
    monkeypatch.setitem(archives.MOST, 'bytes', 10)
    with pytest.raises(ValueError, match='holds too much'):
        archive_tree(packed({'a/x': 'x' * 11}), 'a.tar.gz')


# ---- files that people write


@pytest.mark.parametrize(
    'text, message',
    [
        ('[ruby.x]', "table 'ruby'"),
        ('[python.x]\npair = 1', 'unknown fields pair'),
        ('', 'names no package'),
        ('[python.x]\npairs = "1"', 'must be of type int'),
        ('[python', 'cannot be read as TOML'),
        ('python.x = 1', 'must be a table'),
    ],
)
def test_a_plan_that_is_odd_is_refused(tmp_path, text, message):
    (tmp_path / 'plan.toml').write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / 'plan.toml')


@pytest.mark.parametrize(
    'line, message',
    [
        ('{', 'not JSON'),
        ('[]', 'schema'),
        ('{"schema": "kat.release/1"}', "'id' is missing"),
        ('{"schema": "x"}', "schema 'x'"),
    ],
)
def test_a_row_that_is_odd_is_refused(tmp_path, line, message):
    (tmp_path / 'rows.jsonl').write_text(line + '\n')
    with pytest.raises(ValueError, match=f'rows.jsonl:1: .*{message}'):
        read_release_rows(tmp_path / 'rows.jsonl')


def test_ids_keep_their_order_and_neighbours_are_the_newest():
    names = ('a.py::test_b[x::y]', 'a.py::C::test_d', 'e.py::test_f')
    assert ungrouped(grouped(names)) == names
    assert [(a['version'], b['version']) for a, b in neighbours([dict(version=v) for v in '123'], 5)] == [
        ('2', '3'),
        ('1', '2'),
    ]
