"""A GitHub that misbehaves by a seeded script, on a real socket, for the tests of the collector

`World` holds repositories that can change while they are read; `Server` serves them over REST and GraphQL and decides
for each request what goes wrong with it. It keeps a log of what it was asked and notes who comes back too early."""
import asyncio
import base64
import contextlib
import json
import random
import sys
import threading
from collections import Counter
from datetime import datetime, timezone
from email.utils import formatdate
from functools import partial
from types import SimpleNamespace

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kat.tasks.collector import collect
from kat.tasks.github import Clock, GitHub
from kat.tasks.harvest import Harvest, find_all

START = 1_704_067_200          # 2024-01-01


def stamp(seconds):
    return datetime.fromtimestamp(seconds, timezone.utc).strftime('%Y-%m-%dT%H:%M:%SZ')


class Jumping(Clock):
    "A clock that jumps instead of waiting, and remembers how far."
    def __init__(self, now=START + 10**7):
        self.time, self.slept = float(now), []

    def now(self):
        return self.time

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


DIFF = '''diff --git a/knots/core.py b/knots/core.py
--- a/knots/core.py
+++ b/knots/core.py
@@ -1,2 +1,2 @@
 def tie(x):
-    return x
+    return x + {n}
diff --git a/tests/test_core.py b/tests/test_core.py
--- a/tests/test_core.py
+++ b/tests/test_core.py
@@ -1 +1,2 @@
-def test_0():
+def test_{n}():
+    assert tie(1) == {n} + 1
'''
MORE = r'''diff --git a/docs/more.md b/docs/more.md
--- a/docs/more.md
+++ b/docs/more.md
@@ -1 +1 @@
-A
\ No newline at end of file
+B
'''


class World:
    "Repositories with pull requests and issues; every change makes the changed thing the newest."
    def __init__(self, seed=0, names=('ann/knots',), pulls=60, same_second=0):
        self.rng, self.time = random.Random(seed), START
        self.repos = {name: dict(pulls={}, issues={}, comments={}) for name in names}
        self.stars, self.renamed, self.hidden = 1000, {}, set()
        for name in names:
            for _ in range(pulls):
                self.add(name)
            for number in sorted(self.repos[name]['pulls'])[:same_second]:
                self.repos[name]['pulls'][number]['updated_at'] = stamp(START + 5)

    def tick(self):
        self.time += self.rng.choice([0, 0, 1, 3, 600])
        return stamp(self.time)

    def add(self, name):
        "An issue (sometimes) and a pull request that closes it."
        repo, rng = self.repos[name], self.rng
        number = len(repo['pulls']) + len(repo['issues']) + 1
        links = []
        if rng.random() < .8:
            at = self.tick()
            repo['issues'][number] = dict(number=number, title=f'Issue {number}', body='Words ' * rng.randint(1, 30),
                                          state='closed', created_at=at, updated_at=at, user='ann')
            repo['comments'][number] = [dict(id=number * 100 + k, body=f'comment {k}', created_at=at, updated_at=at)
                                        for k in range(rng.choice([0, 0, 2, 60]))]
            links.append(number)
            number += 1
        at = self.tick()
        merged = rng.random() < .75
        files = rng.choice([2, 2, 3])
        repo['pulls'][number] = dict(
            number=number, title=f'Pull {number}', body=' '.join(f'Fixes #{n}.' for n in links), links=links,
            state='closed' if merged else 'open', merged_at=at if merged else None, created_at=at, updated_at=at,
            base=f'{number:040x}', head=f'{number:039x}f', files=files)
        return number

    def touch(self, name):
        "Something old is commented: it moves to the end of the listing."
        repo = self.repos[name]
        thing = self.rng.choice([*repo['pulls'].values(), *repo['issues'].values()])
        thing['updated_at'] = stamp(self.time)
        thing['title'] += '!'
        self.tick()

    def versions(self, name):
        "What a collector must have of a repository: (kind, number) -> version, pull requests only."
        return {str(n): (x['updated_at'], x['title']) for n, x in self.repos[name]['pulls'].items()
                if n not in self.hidden}

    # the shapes of the API

    def rest_pull(self, name, number, whole=True):
        x = self.repos[name]['pulls'][number]
        shown = dict(number=number, title=x['title'], body=x['body'], state=x['state'], created_at=x['created_at'],
                     updated_at=x['updated_at'], user=dict(login='ann'), labels=[], comments=0,
                     repository_url=f'https://api.github.com/repos/{name}')
        if not whole: return shown | dict(pull_request=dict(merged_at=x['merged_at']))
        return shown | dict(merged_at=x['merged_at'], merge_commit_sha='e' * 40, changed_files=x['files'],
                            base=dict(ref='main', sha=x['base'], repo=dict(full_name=name)), head=dict(sha=x['head']))

    def rest_issue(self, name, number):
        x = self.repos[name]['issues'][number]
        return dict(number=number, title=x['title'], body=x['body'], state=x['state'], created_at=x['created_at'],
                    updated_at=x['updated_at'], user=dict(login=x['user']), labels=[],
                    comments=len(self.repos[name]['comments'][number]),
                    repository_url=f'https://api.github.com/repos/{name}')

    def rest_files(self, name, number):
        names = ['knots/core.py', 'tests/test_core.py', 'docs/more.md'][:self.repos[name]['pulls'][number]['files']]
        return [dict(filename=path, additions=1 + (i == 1), deletions=1, status='modified')
                for i, path in enumerate(names)]

    def diff(self, name, number):
        return DIFF.format(n=number) + (MORE if self.repos[name]['pulls'][number]['files'] == 3 else '')

    def graph_pull(self, name, number):
        x = self.repos[name]['pulls'][number]
        files = [dict(path=y['filename'], additions=y['additions'], deletions=1, changeType='MODIFIED')
                 for y in self.rest_files(name, number)]
        state = 'MERGED' if x['merged_at'] else x['state'].upper()
        return dict(number=number, title=x['title'], body=x['body'], state=state, mergedAt=x['merged_at'],
                    createdAt=x['created_at'], updatedAt=x['updated_at'], changedFiles=x['files'], baseRefName='main',
                    baseRefOid=x['base'], headRefOid=x['head'], author=dict(login='ann'), labels=dict(nodes=[]),
                    mergeCommit=dict(oid='e' * 40), comments=dict(totalCount=0), reviews=dict(totalCount=1),
                    files=dict(nodes=files), closingIssuesReferences=dict(
                        nodes=[self.graph_issue(name, n) for n in x['links']]))

    def graph_issue(self, name, number):
        x, talk = self.repos[name]['issues'][number], self.repos[name]['comments'][number]
        nodes = [dict(author=dict(login='bob'), body=c['body'], createdAt=c['created_at'], lastEditedAt=None)
                 for c in talk[:50]]
        return dict(number=number, title=x['title'], body=x['body'], state=x['state'].upper(), author=None,
                    createdAt=x['created_at'], updatedAt=x['updated_at'], repository=dict(nameWithOwner=name),
                    labels=dict(nodes=[]), comments=dict(totalCount=len(talk), nodes=nodes))

    def listed(self, name):
        "Issues and pull requests in the order of their last change."
        repo = self.repos[name]
        rows = [self.rest_pull(name, n, whole=False) for n in repo['pulls'] if n not in self.hidden]
        rows += [self.rest_issue(name, n) for n in repo['issues']]
        return sorted(rows, key=lambda row: (row['updated_at'], row['number']))


class Server:
    """Serves a world. `script(server, number, what)` is asked before each request and returns None or a fault:
    ('limit', seconds) with `retry-after`, ('secondary',) without, ('429',), ('502',), ('cut',) truncated JSON,
    ('drop',) a connection that ends in the middle, ('twice',) the page of the last cursor once more, ('html',),
    ('gzip',) that is none, ('loop',) of redirections."""
    def __init__(self, world, clock=None, script=None, largest=50, offsets=False, budgets=None, before=None):
        self.world, self.clock, self.script, self.largest = world, clock or Jumping(), script, largest
        self.offsets, self.before = offsets, before  # cursors that count, and so shift; called before each answer
        self.log, self.early, self.faults = [], 0, Counter()
        self.closed_until, self.backoff = 0., 60.
        self.limits = budgets or {}
        self.spent = Counter()
        self.revoked, self.gone = set(), {}  # tokens; path -> status
        self.lock, self.last_page = threading.Lock(), None

    async def answer(self, request: Request):
        body = await request.body()
        with self.lock:
            status, headers, content = self._answer(request, body)
        headers |= {'date': formatdate(self.clock.now(), usegmt=True), 'content-type': 'application/json'}
        return Cut(content, status, headers) if status == 'drop' else Response(content, status, headers)

    def _answer(self, request, body):
        path, budget = request.url.path, 'graphql' if request.method == 'POST' else 'core'
        variables = json.loads(body)['variables'] if body else {}
        what = f'{path}?{request.url.query}' if not body else f'graphql {json.dumps(variables, sort_keys=True)}'
        if 'diff' in request.headers.get('accept', ''):
            what += ' diff'
        number = len(self.log)
        self.log.append([what, None])
        if self.before:
            self.before(self, number, what)
        headers = self._budget(request, budget)
        token = request.headers.get('authorization', '').removeprefix('Bearer ')
        if token in self.revoked or budget == 'graphql' and not token:
            return self._fault('revoked', 401, {}, '{"message": "Bad credentials"}')
        if self.clock.now() < self.closed_until:
            self.early += 1
        if headers['x-ratelimit-remaining'] == '-1':
            headers['x-ratelimit-remaining'] = '0'
            return self._fault('budget', 403, headers, '{"message": "API rate limit exceeded for user ID 1."}')
        fault = self.script and self.script(self, number, what)
        if fault:
            if done := self._misbehave(fault, headers): return done
        self.backoff = 60.
        if path == '/loop': return self._fault('loop', 302, {'location': '/loop'}, '')
        if path in self.gone: return self._fault('gone', self.gone[path], headers, '{"message": "Not Found"}')
        if variables and variables['first'] > self.largest:
            return self._fault('502', 502, {}, '<html>502 Bad Gateway</html>')
        status, content = self._graphql(variables) if body else self._rest(path, request, headers)
        content = json.dumps(content) if not isinstance(content, str) else content
        if fault and fault[0] in ('cut', 'drop'):
            return self._fault(fault[0], 200 if fault[0] == 'cut' else 'drop', headers, content[:len(content)*2//3])
        self.log[-1][1] = status
        return status, headers, content

    def _fault(self, name, status, headers, content):
        self.faults[name] += 1
        self.log[-1][1] = name
        return status, headers, content

    def _budget(self, request, budget):
        "Headers of a budget that is renewed every hour; −1 where it was spent before this request."
        limit, now = self.limits.get(budget, 5000), self.clock.now()
        hour = int(now // 3600)
        key = (request.headers.get('authorization'), budget, hour)
        self.spent[key] += 1
        return {'x-ratelimit-limit': str(limit), 'x-ratelimit-remaining': str(max(limit - self.spent[key], -1)),
                'x-ratelimit-reset': str((hour + 1) * 3600), 'x-ratelimit-resource': budget}

    def _misbehave(self, fault, headers):
        name, now = fault[0], self.clock.now()
        if name == 'limit':
            self.closed_until = now + fault[1]
            return self._fault(name, 403, headers | {'retry-after': str(fault[1])}, '{"message": "secondary limit"}')
        if name in ('secondary', '429'):
            self.closed_until, self.backoff = now + self.backoff, min(self.backoff * 2, 3600)
            text = '{"message": "You have exceeded a secondary rate limit."}'
            return self._fault(name, 403 if name == 'secondary' else 429, headers, text)
        if name == '502': return self._fault(name, 502, {}, '<html>502 Bad Gateway</html>')
        if name == 'gzip': return self._fault(name, 200, {'content-encoding': 'gzip'}, 'not compressed at all')
        if name == 'loop': return self._fault(name, 302, {'location': '/loop'}, '')
        if name == 'html': return self._fault(name, 200, {}, '<html>sign in to the hotel</html>')
        if name == 'twice' and self.last_page: return self._fault(name, 200, headers, self.last_page)

    def _graphql(self, variables):
        name = f"{variables['owner']}/{variables['name']}"
        if name not in self.world.repos: return 200, dict(data=None, errors=[dict(type='NOT_FOUND')])
        pulls, hidden = self.world.repos[name]['pulls'], self.world.hidden
        order = sorted((x['updated_at'], n) for n, x in pulls.items() if n not in hidden)
        after, first, begin = variables['after'], variables['first'], 0
        if after:
            place = json.loads(base64.b64decode(after))
            begin = place if self.offsets else sum(x <= tuple(place) for x in order)
        rows = order[begin:begin + first]
        place = begin + len(rows) if self.offsets else rows[-1] if rows else None
        end = base64.b64encode(json.dumps(place).encode()).decode() if rows else None
        page = dict(totalCount=len(pulls), pageInfo=dict(hasNextPage=begin + first < len(order), endCursor=end),
                    nodes=[self.world.graph_pull(name, n) for _, n in rows])
        self.last_page = json.dumps(dict(data=dict(repository=dict(nameWithOwner=name, pullRequests=page))))
        return 200, self.last_page

    def _rest(self, path, request, headers):
        parts, query = path.strip('/').split('/'), request.query_params
        name, rest = '/'.join(parts[1:3]), parts[3:]
        name = self.world.renamed.get(name, name)
        if parts[0] != 'repos' or name not in self.world.repos: return 404, dict(message='Not Found')
        repo = self.world.repos[name]
        if not rest:
            found = dict(full_name=name, stargazers_count=self.world.stars, license=dict(spdx_id='MIT'), fork=False,
                         updated_at=stamp(START), created_at=stamp(START - 10**6), default_branch='main')
        elif rest == ['issues']:
            since, size, page = query.get('since', ''), int(query['per_page']), int(query.get('page', 1))
            found = [x for x in self.world.listed(name) if x['updated_at'] >= since][(page-1)*size:page*size]
        elif rest[0] == 'compare':
            found = dict(merge_base_commit=dict(sha=rest[1][:40]),
                         commits=[dict(commit=dict(author=dict(date='2024-01-01T00:00:00Z')))])
        elif rest[0] == 'pulls' and int(rest[1]) in repo['pulls']:
            found = (self.world.rest_files if rest[2:] else self.world.rest_pull)(name, int(rest[1]))
            if 'diff' in request.headers['accept']: return 200, self.world.diff(name, int(rest[1]))
        elif rest[0] == 'issues' and int(rest[1]) in repo['issues']:
            found = self.world.rest_issue(name, int(rest[1]))
            if rest[2:]:
                page, talk = int(query.get('page', 1)), repo['comments'][int(rest[1])]
                found = [x | dict(user=dict(login='bob')) for x in talk[(page-1)*40:page*40]]   # so there are links
                if page * 40 < len(talk):
                    headers['link'] = f'<{request.url.replace_query_params(page=page+1)}>; rel="next"'
        else:
            return 404, dict(message='Not Found')
        etag = f'W/"{hash(json.dumps(found)) & 0xffffffff:x}"'
        headers['etag'] = etag
        return (304, '') if request.headers.get('if-none-match') == etag else (200, found)

    def good(self):
        "How often each thing was answered well."
        return Counter(what for what, outcome in self.log if outcome in (200, 304))

    def clients(self, tokens=('t1',), api=None, tell=None, **options):
        api = api or self.url
        return [GitHub(token, api, clock=self.clock, tell=tell or (lambda line: None), name=f'token {i}', **options)
                for i, token in enumerate(tokens, 1)]


class Cut(Response):
    "An answer whose connection ends before it does."
    def __init__(self, content, status, headers):
        super().__init__(content, 200, headers)

    async def __call__(self, scope, receive, send):
        headers = [(k, v) for k, v in self.raw_headers if k != b'content-length']
        headers.append((b'content-length', str(len(self.body) + 1000).encode()))
        await send(dict(type='http.response.start', status=200, headers=headers))
        await send(dict(type='http.response.body', body=self.body, more_body=False))


@contextlib.contextmanager
def serving(server):
    "The server on a port of this machine, in a thread."
    app = Starlette(routes=[Route('/{path:path}', server.answer, methods=['GET', 'POST'])])
    runs = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, log_level='critical', date_header=False,
                                         lifespan='off', timeout_graceful_shutdown=1))
    thread = threading.Thread(target=runs.run, daemon=True)
    thread.start()
    while not runs.started:
        thread.join(.005)
    server.url = f'http://127.0.0.1:{runs.servers[0].sockets[0].getsockname()[1]}'
    try:
        yield server
    finally:
        runs.should_exit = True
        thread.join()


def run_collect(server, path, names=('ann/knots',), tokens=('t1',), lines=None, wanted=None, **options):
    "Collect once; what failed."
    async def whole():
        harvest = Harvest(path)
        try:
            async with contextlib.AsyncExitStack() as stack:
                tell = lines.append if lines is not None else None
                hubs = [await stack.enter_async_context(hub) for hub in server.clients(tokens, tell=tell, **options)]
                server.counts = [hub.counts for hub in hubs]
                return await collect(hubs, harvest, list(names), *([wanted] if wanted else []))
        finally:
            harvest.close()
    return asyncio.run(whole())


PRELOAD = ['kat.tasks.collector', 'httpx2', 'uvicorn', 'starlette.applications', 'starlette.routing']


def collect_in_child(url, path, names):
    "The same collection in a process of its own; exit code 1 when something failed."
    server = SimpleNamespace(url=url, clock=Jumping())
    server.clients = partial(Server.clients, server)
    sys.exit(bool(run_collect(server, path, names)))


def rows(path, kinds=('repo', 'pull', 'files', 'issue', 'comments', 'base', 'diff')):
    "Everything in a store, as a list: a record that is there twice is there twice."
    harvest = Harvest(path)
    try:
        return [(x.repo, x.kind, x.id, x.updated_at, json.dumps(x.data, sort_keys=True))
                for kind in kinds for x in find_all(harvest, kind)]
    finally:
        harvest.close()


def check_pulls(world, path, names=('ann/knots',)):
    "Every pull request of the world in its last version, and nothing twice; all rows."
    found = rows(path)
    assert len({row[:3] for row in found}) == len(found)
    for name in names:
        pulls = {id: (version, json.loads(data)['title']) for repo, kind, id, version, data in found
                 if kind == 'pull' and repo == name}
        assert pulls == world.versions(name)
    return found
