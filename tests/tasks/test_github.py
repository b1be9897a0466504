"The collector: linked issues, what an answer means, and a server that misbehaves; nothing lost, nothing twice"
import asyncio
import json
import multiprocessing
import random
import signal
import sqlite3
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from github_world import (PRELOAD, Jumping, Server, World, check_pulls, collect_in_child, rows, run_collect, serving,
                          stamp)
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.core.io import UserError
from kat.tasks.cases import case_of
from kat.tasks.github import TRIES, Faulty, GitHub, Gone, PageSize, ask_github, meaning_of, patiently, seconds_to_wait
from kat.tasks.harvest import Harvest, Place, find, place_of, take
from kat.tasks.links import linked_issues, sorted_links, visible
from kat.tasks.pages import read_pages
from kat.tasks.records import Record

FIXTURES = Path(__file__).parents[1]/'fixtures'/'github'
REPO = 'ann/knots'


# linked issues

@pytest.mark.parametrize('text, found', [
    ('Fixes #7', ['ann/knots#7']), ('fix: #7', ['ann/knots#7']), ('CLOSED GH-12', ['ann/knots#12']),
    ('resolves bob/ropes#3, fixes #9 and closes #2', ['ann/knots#2', 'ann/knots#9', 'bob/ropes#3']),
    ('Fixes https://github.com/Ann/Knots/issues/5', ['ann/knots#5']), ('fixes https://evil.org/a/b/issues/5', []),
    ('Fixes #7 and fixes ANN/knots#7', ['ann/knots#7']), ('see #7', []), ('prefixes #7', []), ('bug-fix #7', []),
    ('fixes #7abc', []), ('fixes#7', []), ('fixes\n#7', []), ('<!-- fixes #7 -->', []), ('<!-- fixes #7', []),
    ('a `fixes #7` b', []), ('``fixes ` #7``', []), ('` fixes #7', ['ann/knots#7']),
    ('`a\n\nfixes #7 `', ['ann/knots#7']), ('```\nfixes #7\n```\nfixes #8', ['ann/knots#8']),
    ('~~~py\nfixes #7\n~~~', []), ('```\nfixes #7', []), ('```\r\nfixes #7\r\n```\r\nfixes #8', ['ann/knots#8']),
    ('````\n```\nfixes #7\n```\n````', []), ('fixes \\#7', []), ('fixes ../..#7', []), ('fixes a/..#7', []),
    ('fixes a/.github#7', ['a/.github#7'])])
def test_linked_issues(text, found):
    assert linked_issues(text, REPO) == found


@given(st.lists(st.tuples(st.sampled_from(['ann/knots', 'Ann/Knots', 'bob/ropes', 'Bob/ropes', 'a/b']),
                          st.integers(1, 4))), st.randoms())
def test_the_order_of_links_is_of_no_draw(links, rng):
    mixed = rng.sample(links, len(links))
    assert sorted_links(mixed, REPO) == sorted_links(links, REPO)
    keys = [x.lower() for x in sorted_links(links, REPO)]
    assert sorted(keys) == sorted({f'{name}#{n}'.lower() for name, n in links})


@given(st.text(st.sampled_from('`~<!-> \n#1fixes'), max_size=200))
def test_hidden_text_is_only_ever_removed(text):
    assert len(visible(text)) <= len(text)


def test_a_body_of_backticks_takes_no_time():
    "The largest body that GitHub allows, of the marks that the pattern looks for"
    for text in ('`' * 65536, '` `` ' * 13000, '<!-- ' * 13000, '```\n' * 16000, '`a' * 32000, '~~~ x\n' * 10000):
        visible(text)


# what an answer means

@given(st.integers(100, 599), st.dictionaries(
    st.sampled_from(['retry-after', 'x-ratelimit-remaining', 'x-ratelimit-reset', 'date']),
    st.sampled_from(['0', '1', '60', '-5', 'nan', '', 'soon', '99999999999999', 'Mon, 01 Jan 2024 00:00:09 GMT'])),
    st.sampled_from(['', 'API rate limit exceeded', '<html>']), st.integers(0, 50))
def test_every_answer_means_something(status, headers, text, strikes):
    meaning = meaning_of(status, headers, text)
    assert meaning in ('ok', 'same', 'limit', 'again', 'token', 'gone')
    sure = {429: 'limit', 404: 'gone', 410: 'gone', 422: 'gone', 451: 'gone', 401: 'token', 304: 'same'}
    assert meaning == sure.get(status, meaning) and (meaning == 'ok') == (200 <= status < 300)
    assert meaning in ('again', 'limit') or status < 500
    seconds = seconds_to_wait(headers, 1e9, strikes)
    assert seconds >= 0
    if headers.get('retry-after') in ('0', '1', '60'):
        assert seconds == float(headers['retry-after'])
    assert headers or seconds == min(60 * 2**min(strikes, 6), 3600)


def test_waits_go_by_the_servers_clock():
    "Ours may be an hour off"
    spent = {'x-ratelimit-remaining': '0', 'x-ratelimit-reset': '1704067300', 'date': 'Mon, 01 Jan 2024 00:00:00 GMT'}
    assert seconds_to_wait(spent, 1e9, 0) == seconds_to_wait(spent, 2e9, 0) == 101
    late = {'retry-after': 'Mon, 01 Jan 2024 00:01:00 GMT', 'date': 'Mon, 01 Jan 2024 00:00:00 GMT'}
    assert seconds_to_wait(late, 0, 0) == 60
    assert seconds_to_wait(spent | {'x-ratelimit-reset': '5'}, 0, 1) == 120       # a reset that is over


@given(st.lists(st.booleans(), max_size=300))
def test_pages_shrink_and_grow_within_bounds(faults):
    size = PageSize()
    for fault in faults:
        before = size.size
        if fault:
            assert size.fault() == (before > 1) and size.size == max(before // 2, 1)
        else:
            size.fine()
        assert 1 <= size.size <= size.largest


def test_what_fails_for_ever_ends():
    clock, tries = Jumping(), []
    async def attempt():
        tries.append(1)
        raise Faulty('down')
    for size, most in ((None, TRIES), (PageSize(), TRIES + 5)):
        tries.clear()
        with pytest.raises(Faulty, match='down'):
            asyncio.run(patiently(GitHub('t', clock=clock, tell=lambda line: None), attempt, size))
        assert len(tries) == most


# the store

texts = st.sampled_from(['a', 'b', None])
records = st.lists(st.tuples(st.sampled_from(['1', '2']), st.integers(0, 3), texts, texts), max_size=12)


@given(records, st.randoms())
@settings(max_examples=60, deadline=None)
def test_taking_is_idempotent_and_never_goes_back(drawn, rng):
    "The newest version stays, in whatever order and however often its pages come"
    made = [Record(REPO, 'pull', id, stamp(version), dict(x=x, y=y, v=version)) for id, version, x, y in drawn]
    harvest = Harvest(':memory:')
    for record in made:
        take(harvest, [record])
    for id in ('1', '2'):
        newest = max((r.updated_at for r in made if r.id == id), default=None)
        found = find(harvest, REPO, 'pull', id)
        assert (found and found.updated_at) == newest
        same = [r for r in made if r.id == id and r.updated_at == newest]
        for key in ('x', 'y'):
            known = [r.data[key] for r in same if r.data[key] is not None]
            assert not found or found.data[key] == (known[-1] if known else None)
    before = list(harvest.db.execute('SELECT * FROM records'))
    old = [r for r in made if r.updated_at != find(harvest, REPO, 'pull', r.id).updated_at]
    assert take(harvest, rng.sample(old, len(old))) == 0
    assert list(harvest.db.execute('SELECT * FROM records')) == before
    harvest.close()


def test_a_page_is_taken_whole_or_not_at_all(tmp_path):
    harvest = Harvest(tmp_path/'c.db')
    good = Record(REPO, 'pull', '1', stamp(1), dict(a=1))
    with pytest.raises(TypeError):
        take(harvest, [good, good._replace(id='2', data=dict(a={1}))], REPO, Place('graphql', 'x'))
    assert find(harvest, REPO, 'pull', '1') is None and place_of(harvest, REPO, 'graphql').cursor is None
    assert take(harvest, [good], REPO, Place('graphql', 'x')) == 1
    harvest.close()


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path/'c.db').write_text('not a database, but long enough to be looked at ' * 50)
    with pytest.raises(ValueError, match='c.db: not a store'):
        Harvest(tmp_path/'c.db')
    with sqlite3.connect(tmp_path/'d.db') as db:
        db.execute('PRAGMA user_version=9')
    with pytest.raises(ValueError, match='another version'):
        Harvest(tmp_path/'d.db')


# a server that misbehaves

def clean(world, tmp_path, names=(REPO,), tokens=('t1',)):
    "What is collected, and what is asked, when nothing goes wrong."
    with serving(Server(world, largest=100)) as server:
        assert run_collect(server, tmp_path/'clean.db', names, tokens) == {}
    return check_pulls(world, tmp_path/'clean.db', names), server


def faulty(seed, kinds, rate=.25):
    "A script that draws a fault for a share of the requests."
    rng = random.Random(seed)
    return lambda server, number, what: rng.choice(kinds) if rng.random() < rate else None


KINDS = [('limit', 7), ('limit', 60), ('secondary',), ('429',), ('502',), ('cut',), ('drop',), ('html',), ('twice',),
         ('gzip',), ('loop',)]


@pytest.mark.parametrize('seed', range(3))
def test_every_fault_at_once(tmp_path, seed):
    world = World(seed, pulls=50)
    want, calm = clean(world, tmp_path)
    with serving(Server(world, script=faulty(seed, KINDS), largest=20)) as server:
        lines = []
        assert run_collect(server, tmp_path/'c.db', lines=lines) == {}
    assert check_pulls(world, tmp_path/'c.db') == want
    assert server.early == 0                                                    # nobody came back too early
    assert len(set(server.faults)) >= 6, server.faults
    listing = lambda log: sum(what.startswith('graphql') and out in (200, 304) for what, out in log)
    more = listing(server.log) - listing(calm.log)                              # smaller pages are more pages
    assert len(server.log) <= len(calm.log) + sum(server.faults.values()) + more
    assert all(n == 1 for what, n in server.good().items() if 'graphql' not in what)
    assert any('waiting' in line and 'limit' in line for line in lines)


def test_no_page_above_what_the_server_bears_and_then_larger_ones_again(tmp_path):
    world = World(1, pulls=300)
    def script(server, number, what):
        server.largest = 6 if number < 8 else 100
    with serving(Server(world, script=script)) as server:
        assert run_collect(server, tmp_path/'c.db', wanted=lambda case: False) == {}
    check_pulls(world, tmp_path/'c.db')
    sizes = [json.loads(what.partition(' ')[2])['first'] for what, out in server.log if what.startswith('graphql')]
    assert sizes[:4] == [50, 25, 12, 6] and max(sizes[8:]) > 6


@pytest.mark.parametrize('offsets', [False, True])
def test_pages_that_shift_while_pull_requests_arrive(tmp_path, offsets):
    "With cursors that are places in the order, and with cursors that only count and so skip"
    world = World(2, pulls=120)
    world.time += 10**5
    def before(server, number, what):
        if 1 <= number <= 12 and 'graphql' in what:
            for _ in range(3):
                world.touch(REPO)
            world.add(REPO)
    with serving(Server(world, largest=10, offsets=offsets, before=before)) as server:
        assert run_collect(server, tmp_path/'c.db') == {}
    check_pulls(world, tmp_path/'c.db')


def test_the_next_run_asks_for_what_is_new(tmp_path):
    world = World(3, pulls=40)
    with serving(Server(world)) as server:
        run_collect(server, tmp_path/'c.db')
        first = len(server.log)
        run_collect(server, tmp_path/'c.db')
        assert [out for _, out in server.log[first:]] == [304, 200]             # the repository, and an empty page
        world.touch(REPO)
        new, before = world.add(REPO), len(server.log)
        run_collect(server, tmp_path/'c.db')
        check_pulls(world, tmp_path/'c.db')
        assert len(server.log) - before <= 6 and any(f'/pulls/{new}' in what or 'graphql' in what
                                                     for what, _ in server.log[before:])


@pytest.mark.parametrize('tied', [0, 250])
def test_without_a_token_rest_alone_does_it(tmp_path, tied):
    "60 requests an hour; also when hundreds of pull requests were changed in the same second, and while some change"
    world = World(4, pulls=40 if not tied else 260, same_second=tied)
    world.time += 10**5
    def before(server, number, what):
        if '/issues?' in what and number < 6:
            world.touch(REPO)
    with serving(Server(world, budgets=dict(core=60), before=before)) as server:
        lines = []
        few = (lambda case: case.number < 30 and bool(case.links)) if tied else None
        assert run_collect(server, tmp_path/'c.db', tokens=(None,), lines=lines, wanted=few) == {}
    check_pulls(world, tmp_path/'c.db')
    assert server.faults['budget'] == 0                                         # headers tell before a 403 does
    assert 'graphql' not in str(server.log)
    assert tied or any('budget of core is spent' in line for line in lines)


def test_graphql_spent_goes_on_with_rest(tmp_path):
    world = World(5, pulls=60)
    want, _ = clean(world, tmp_path)
    with serving(Server(world, budgets=dict(graphql=1))) as server:
        lines = []
        assert run_collect(server, tmp_path/'c.db', lines=lines) == {}
    found = check_pulls(world, tmp_path/'c.db')
    assert any('listed by REST' in line for line in lines) and not any('waiting' in line for line in lines)
    pieces = lambda rows: {row[:3] for row in rows if row[1] in ('diff', 'base')}
    assert pieces(found) == pieces(want)
    since = next(what for what, _ in server.log if '/issues?' in what)
    assert 'since=2024' in since                                                # from where GraphQL had come to


def test_a_token_revoked_in_the_middle(tmp_path):
    "Another goes on; without another it says so, keeps what there is, and a new token finishes"
    world = World(6, names=(REPO, 'bob/ropes'), pulls=30)
    names = (REPO, 'bob/ropes')
    want, calm = clean(world, tmp_path, names)
    def before(server, number, what):
        if number == 20:
            server.revoked.add('t1')
    with serving(Server(world, largest=100, before=before)) as server:
        lines = []
        assert run_collect(server, tmp_path/'c.db', names, ('t1', 't2'), lines) == {}
        assert sorted(check_pulls(world, tmp_path/'c.db', names)) == sorted(want)
        assert any('token 1 is refused' in line and '401' in line for line in lines)
        assert not any('t1' in line.split() for line in lines)
    with serving(Server(world, largest=100, before=before)) as server:
        with pytest.raises(UserError, match=r'token 1 is refused at http.*401.*2 repositories.*records are kept'):
            run_collect(server, tmp_path/'d.db', names)
        assert len(server.log) == 21                                            # and it didn't try again
        assert run_collect(server, tmp_path/'d.db', names, ('t3',)) == {}
        assert sorted(check_pulls(world, tmp_path/'d.db', names)) == sorted(want)
        again = Counter(what for what, out in server.log if out == 200)
        assert all(n == 1 for what, n in again.items() if '/pulls/' in what or '/compare/' in what)


def test_what_is_gone_is_asked_once(tmp_path):
    world = World(7, names=(REPO, 'bob/ropes'), pulls=30)
    wanted = [n for n, x in world.repos[REPO]['pulls'].items() if x['merged_at'] and x['links']]
    server = Server(world, largest=100)
    server.gone = {'/repos/bob/ropes': 451, f'/repos/{REPO}/pulls/{wanted[0]}': 404}
    with serving(server):
        for _ in range(2):
            failed = run_collect(server, tmp_path/'c.db', (REPO, 'bob/ropes', 'no/body'))
            assert set(failed) == {'bob/ropes', 'no/body'}
            assert failed['bob/ropes'] == f'HTTP 451 at {server.url}/repos/bob/ropes' and '404' in failed['no/body']
    asked = Counter(what for what, _ in server.log)
    assert asked['/repos/no/body?'] == 2 and asked[f'/repos/{REPO}/pulls/{wanted[0]}? diff'] == 1
    harvest = Harvest(tmp_path/'c.db')
    case = case_of(harvest, REPO, wanted[0])
    assert case.diff is None and case.base and case.gaps['diff', ''].startswith('HTTP 404 at http')
    harvest.close()


def test_a_server_that_is_down_ends_with_its_address(tmp_path):
    world = World(8, pulls=5)
    with serving(Server(world, script=lambda *_: ('502',))) as server:
        failed = run_collect(server, tmp_path/'c.db')
        assert failed[REPO].startswith(f'{server.url}/repos/{REPO}: HTTP 502') and len(server.log) == TRIES
    with serving(Server(world, script=lambda *_: ('429',))) as server:
        with pytest.raises(UserError, match='limited 12 times in a row'):
            run_collect(server, tmp_path/'c.db')
        assert len(server.log) == 13 and server.early == 0
    assert REPO in run_collect(server, tmp_path/'c.db')                         # nobody listens any more


def test_one_diff_that_fails_costs_only_itself(tmp_path):
    world = World(9, pulls=20)
    bad = next(n for n, x in world.repos[REPO]['pulls'].items() if x['merged_at'] and x['links'])
    broken = [True]
    script = lambda server, number, what: ('502',) if broken[0] and f'/pulls/{bad}? diff' in what else None
    with serving(Server(world, script=script)) as server:
        failed = run_collect(server, tmp_path/'c.db')
        assert f'failed: [{bad}]' in failed[REPO]
        count = Counter(kind for _, kind, *_ in rows(tmp_path/'c.db'))
        broken[0] = False
        assert run_collect(server, tmp_path/'c.db') == {}
        assert Counter(kind for _, kind, *_ in rows(tmp_path/'c.db'))['diff'] == count['diff'] + 1


def test_patience_ends_a_wait_before_it_begins(tmp_path):
    world = World(10, pulls=5)
    with serving(Server(world, script=lambda *_: ('limit', 5000))) as server:
        with pytest.raises(UserError, match='a limit: HTTP 403.*it goes on at .* in 83 min, and --patience is 10'):
            run_collect(server, tmp_path/'c.db', patience=600.)
        assert len(server.log) == 1 and server.clock.slept == []


def test_renamed_repositories_keep_one_name(tmp_path):
    world = World(11, pulls=8)
    world.renamed['ann/strings'] = REPO
    with serving(Server(world)) as server:
        for name in ('ann/strings', REPO, 'ann/strings'):
            assert run_collect(server, tmp_path/'c.db', (name,)) == {}
    assert {row[0] for row in check_pulls(world, tmp_path/'c.db')} == {REPO}


def test_a_link_to_another_server_gets_no_token():
    hub = GitHub('secret', 'https://api.github.com')
    for url in ('https://evil.org/repos/a/b', 'https://api.github.com.evil.org/x', 'http://api.github.com/x'):
        with pytest.raises(Gone, match='another server'):
            asyncio.run(ask_github(hub, url))


def test_an_enterprise_servers_addresses():
    assert GitHub('t', 'https://git.example.org/api/v3').graphql_url == 'https://git.example.org/api/graphql'


@pytest.mark.parametrize('cursors', ['never valid', 'in a circle'])
def test_listings_that_never_end_are_left_for_rest(tmp_path, cursors):
    world, server = World(13, pulls=30), Server(World(13, pulls=30), largest=100)
    plain = server._graphql
    def odd(variables):
        if cursors == 'never valid': return 200, dict(data=None, errors=[dict(type='INVALID_CURSOR_ARGUMENTS')])
        page = json.loads(plain(variables | dict(after=None, first=5 + len(server.log) % 2))[1])
        page['data']['repository']['pullRequests']['pageInfo']['hasNextPage'] = True
        return 200, json.dumps(page)
    server._graphql = odd
    lines = []
    with serving(server):
        assert run_collect(server, tmp_path/'c.db', lines=lines, wanted=lambda case: False) == {}
    check_pulls(world, tmp_path/'c.db')
    said = dict([('never valid', 'no cursor is valid'), ('in a circle', 'the same pages')])[cursors]
    assert any('listed by REST' in line and said in line for line in lines) and len(server.log) < 60


# killed

@pytest.mark.parametrize('seed', range(3))
def test_killed_anywhere_the_same_command_goes_on(tmp_path, seed):
    "SIGKILL while a request is answered, some six times, among faults; each kill costs one request at most"
    world, rng = World(seed + 20, pulls=40), random.Random(seed)
    want, calm = clean(world, tmp_path)
    children = multiprocessing.get_context('forkserver')
    children.set_forkserver_preload(PRELOAD)
    kills, child = [0], None
    def before(server, number, what):
        one = child                             # its death is seen by the other thread too, which starts the next one
        if one and kills[0] < 8 and rng.random() < .12:
            kills[0] += 1
            one.kill()
            if rng.random() < .5:
                wait([one.sentinel], 60)                                        # before the answer, or about with it
    rates = faulty(seed, [('limit', 1), ('502',), ('cut',), ('drop',), ('html',)], .1)
    server = Server(world, script=rates, largest=100, before=before)
    ends = []
    with serving(server):
        while not ends or ends[-1] != 0:
            child = children.Process(target=collect_in_child, args=(server.url, str(tmp_path/'c.db'), (REPO,)))
            child.start()
            child.join(60)
            ends.append(child.exitcode)
            assert ends[-1] in (0, -signal.SIGKILL), ends
    assert check_pulls(world, tmp_path/'c.db') == want
    assert kills[0] >= 3 and ends.count(-signal.SIGKILL) == kills[0]
    extra = len(ends) * 2                                       # each start asks for the repository and the listing
    assert len(server.log) <= len(calm.log) + sum(server.faults.values()) + kills[0] + extra


# saved pages

def test_a_real_page(tmp_path):
    harvest = Harvest(tmp_path/'c.db')
    read_pages(harvest, FIXTURES, lambda line: None)
    case = case_of(harvest, 'pvlib/pvlib-python', 1)
    assert (case.pull['state'], case.pull['title'], case.links) == ('merged', 'Update README.md', [])
    assert case.pull['merged_at'] == '2015-02-17T01:02:03Z' and len(case.pull['base']) == 40
    assert read_pages(harvest, FIXTURES, lambda line: None) == 0
    harvest.close()


def test_saved_pages_say_the_same_as_live_ones(tmp_path):
    "Either shape, in pages or line by line"
    world = World(12, pulls=15)
    with serving(Server(world)) as server:
        run_collect(server, tmp_path/'live.db')
        live = [row for row in rows(tmp_path/'live.db') if row[1] in ('pull', 'issue', 'comments', 'files')]
        saved = tmp_path/'graph'
        saved.mkdir()
        (saved/'a.json').write_text(server.last_page)
    pulls = world.repos[REPO]['pulls']
    rest = tmp_path/'rest'
    rest.mkdir()
    (rest/'page.json').write_text(json.dumps([world.rest_pull(REPO, n) for n in pulls]))
    lines = [world.rest_issue(REPO, n) for n in world.repos[REPO]['issues']]
    (rest/'issues.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in lines))
    event = dict(type='PullRequestEvent', payload=dict(action='closed', pull_request=world.rest_pull(REPO, min(pulls))))
    (rest/'archive.jsonl').write_text(json.dumps(event) + '\n')
    (rest/f'ann__knots-{min(pulls)}.diff').write_text('diff --git a/a b/a\n')
    for folder in (saved, rest):
        harvest = Harvest(tmp_path/f'{folder.name}.db')
        read_pages(harvest, folder, lambda line: None)
        for number in pulls:
            case = case_of(harvest, REPO, number)
            assert sorted(case.links) == [f'{REPO}#{n}' for n in pulls[number]['links']]
            assert all(case.issues.values())
        assert (case_of(harvest, REPO, min(pulls)).diff is not None) == (folder is rest)
        harvest.close()
    kept = [row for row in rows(tmp_path/'graph.db') if row[1] != 'repo']
    assert set(kept) <= set(live) and {row[1] for row in kept} == {'pull', 'issue', 'comments', 'files'}


@pytest.mark.parametrize('name, text, said', [
    ('a.json', '[{"number": 1, "title"', 'a.json: not JSON'), ('a.jsonl', '{"number": 1}\n{"num', 'a.jsonl:1: neither'),
    ('a.jsonl', '[1]\n', 'a.jsonl:1: an object expected'), ('a.json', '[3]', 'an object or a list expected, got 3'),
    ('a.json', '{"data": {"repository": null}, "errors": [{"type": "NOT_FOUND"}]}', 'NOT_FOUND'),
    ('a.json', '{"number": 1, "title": "x"}', 'names no repository'), ('a.json', '[' * 100_000, 'not JSON'),
    ('a.json', '{"number": 1, "title": "x", "base": {}, "head": {}}', "not as GitHub writes it: KeyError 'repo'"),
    ('x__y-3.diff', '', 'no page tells of this pull request'), ('a.txt', '', 'no .json, .jsonl or .diff file')])
def test_damaged_pages_are_named(tmp_path, name, text, said):
    (tmp_path/'saved').mkdir()
    (tmp_path/'saved'/name).write_text(text)
    harvest = Harvest(tmp_path/'c.db')
    with pytest.raises(ValueError, match='saved') as refused:
        read_pages(harvest, tmp_path/'saved', lambda line: None)
    assert said in str(refused.value) and '\n' not in str(refused.value)
    harvest.close()
