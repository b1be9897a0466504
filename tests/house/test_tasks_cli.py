"kat tasks: collected, killed, gone on, sifted; one line for a mistake"
import json
import os
import subprocess
import sys
from functools import partial

import pytest
from github_world import Server, World, check_pulls, serving


@pytest.fixture
def cli(cli, monkeypatch):
    "Runs `kat tasks` with these arguments in an empty folder; (exit code, what it printed, and complained)."
    monkeypatch.setenv('GITHUB_TOKEN', 'hidden-word')
    return partial(cli, 'tasks')


def test_killed_it_goes_on_with_the_same_command(tmp_path, cli):
    world, left = World(40, pulls=20), [2]
    def before(server, number, what):
        if left[0] and number % 9 == 5:
            left[0] -= 1
            child.kill()
    server = Server(world, largest=100, before=before)
    with serving(server):
        command = ['collect', 'ann/knots', '--out', 'out', '--api', server.url, '-p', 'text=1', '-p', 'english=0']
        whole = [sys.executable, '-c', 'from kat.cli import main; main()', 'tasks', *command]
        ends = []
        while left[0]:
            child = subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                                     env=os.environ | dict(GITHUB_TOKEN='hidden-word'))
            out, err = child.communicate(timeout=600)
            ends.append(child.returncode)
            assert 'hidden-word' not in out + err
        assert ends == [-9] * 2
        code, out, err = cli(*command)
        assert code == 0 and 'pull 20' in out and 'requests' in out and 'pull requests 20 of 20' in err
        assert cli(*command)[1].splitlines()[0] == out.splitlines()[0]
    check_pulls(world, tmp_path/'out'/'collect.db')
    code, table, err = cli('funnel', 'out', '-p', 'text=1', '-p', 'english=0', '--draw', 'f.png')
    assert code == 0 and table.splitlines()[-1].startswith('out/mined.jsonl: ') and (tmp_path/'f.png').is_file()
    tasks = [json.loads(line) for line in (tmp_path/'out'/'mined.jsonl').read_text().splitlines()]
    assert table.splitlines()[-1] == f'out/mined.jsonl: {len(tasks)}' and len(tasks) >= 3
    again = cli('funnel', 'out', '-p', 'text=1', '-p', 'english=0', '--from', 'files')
    assert again[0] == 0 and again[1].splitlines()[-1] == table.splitlines()[-1]


def test_what_could_not_be_read_is_said(tmp_path, cli):
    server = Server(World(41, pulls=6), largest=100)
    with serving(server):
        code, out, err = cli('collect', 'ann/knots', 'no/body', '--out', 'out', '--api', server.url)
        assert code == 2 and out == ''
        assert err.splitlines()[-1] == ('kat: 1 of 2 repositories were not read to the end: no/body: HTTP 404 at '
                                        f'{server.url}/repos/no/body')
        assert 'pull 6' in err
        server.revoked.add('hidden-word')
        code, out, err = cli('collect', 'ann/knots', '--out', 'out', '--api', server.url)
        assert code == 2 and 'token 1 is refused' in err.splitlines()[-1] and 'hidden' not in err


@pytest.mark.parametrize('args, said', [
    ('collect a/b', "'--out'"), ('collect --out x', 'either repositories'), ('collect knots --out x', 'OWNER/NAME'),
    ('collect a/b --out x -p star=1', 'one of stars'), ('collect a/b --out x --token-file none', 'no such file'),
    ('collect --pages none --out x', 'no such folder'), ('funnel x', 'nothing collected there'),
    ('funnel', "'FOLDER'"), ('collect a/b --out x --patience -1', '--patience'),
    ('collect a/b --out x --api ftp://x', 'an address')])
def test_mistakes_are_one_line_and_code_2(cli, tmp_path, args, said):
    code, out, err = cli(*args.split())
    assert (code, out) == (2, '') and err.startswith('kat: ') and err.count('\n') == 1 and said in err
    assert not list(tmp_path.iterdir())


def test_mistakes_of_the_funnel(cli, tmp_path):
    (tmp_path/'saved').mkdir()
    (tmp_path/'saved'/'a.json').write_text('[]')
    code, out, err = cli('collect', '--pages', 'saved', '--out', 'out')
    assert code == 0 and out == 'out/collect.db: \n'
    for args, said in (('--from nowhere', "stage 'nowhere': one of repository"), ('--draw f.jpg', '.png, .svg or')):
        code, out, err = cli('funnel', 'out', *args.split())
        assert (code, out) == (2, '') and said in err and err.count('\n') == 1
    code, out, err = cli('funnel', 'out')
    assert code == 0 and 'repository      0     0' in out and (tmp_path/'out'/'mined.jsonl').read_text() == ''
    (tmp_path/'out'/'collect.db').write_bytes(b'x' * 5000)
    assert 'not a store of kat tasks collect' in cli('funnel', 'out')[2]
