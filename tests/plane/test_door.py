"""Who is let in: two kinds of keys, keys for one session, a server without keys and the pages of other sites, the local
operator's file, and owners whose sessions never meet in a group"""
import asyncio
import os
import stat

import httpx2
import pytest
from hypothesis import given, settings, strategies as st
from plane_world import PATH, World, chat_body, messages_body, say

from kat.plane.access import Access, is_here, local_key, read_keys, session_key
from kat.plane.store import Store
from kat.wire.fields import BadRequest

KEYS = dict(keys={'ann-key': 'ann', 'bob-key': 'bob'}, operators={'ann-boss': 'ann', 'bob-boss': 'bob'})
USER = [dict(role='user', content='hello')]
INFERENCE = [(PATH['chat'], chat_body(USER)), (PATH['messages'], messages_body(USER)),
             (PATH['completions'], dict(model='kat', prompt='a'))]
OPERATING = [('/s/s/reward', dict(reward=1, finished=False)), ('/groups', dict(key='k', sessions=['s'])),
             ('/sessions', None), ('/sessions', dict(name='new')), ('/s/s', None), ('/s/s/trajectories', None),
             ('/s/s/blocks', None), ('/live/state', None)]


def run(coro):
    return asyncio.run(asyncio.wait_for(coro, 60))


def world(tmp_path, text='an answer', **more):
    w = World(tmp_path/'store.db', **more)
    w.engine.answer = lambda r: say(w.tok, text)
    return w


def bearer(key):
    return dict(authorization=f'Bearer {key}')


# --- two kinds of keys

@pytest.mark.parametrize('key', ['ann-key', 'ann-key@s', 'ann-key@other', session_key('ann-boss', 's')])
def test_an_agents_key_serves_inference_and_nothing_else(tmp_path, key):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            assert (await w.chat('q', 's', bearer('ann-boss')))['status'] == 200
            before = w.store.load(w.tok, 'ann', 's').trajectories()
            for path, body in OPERATING:
                r = await w.ask(path, body, bearer(key))
                assert (r['status'], r['json']['error']['code']) == (403, 'operator_key_required'), path
                assert "operator's key" in r['json']['error']['message'] and '-boss' not in r['body'].decode()
            assert w.store.load(w.tok, 'ann', 's').trajectories() == before and len(w.store.sessions()) == 1
            for path, body in [*INFERENCE, ('/v1/models', None)]:
                assert (await w.ask(path, body, bearer(key)))['status'] == 200
            assert (await w.ask('/health'))['status'] == (await w.ask('/metrics'))['status'] == 200
    run(go())


def test_an_operators_key_does_it_all_for_its_owner_only(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            for path, body in [*INFERENCE, ('/v1/models', None)]:
                assert (await w.ask(f'/s/s{path}', body, bearer('ann-boss')))['status'] == 200
            for path, body in OPERATING:
                bob = await w.ask(path, body, bearer('bob-boss'))
                ann = await w.ask(path, dict(reward=1) if path == '/s/s/reward' else body, bearer('ann-boss'))
                assert ann['status'] == 200, (path, ann)
                assert bob['status'] in (400, 404) or b'"s"' not in bob['body'], (path, bob)
            assert w.store.load(w.tok, 'bob', 's') is None
    run(go())


def test_without_an_operators_key_it_is_refused_and_said_what_to_do(tmp_path):
    async def go():
        for more, says in ((dict(operators=None), 'add a line OWNER KEY operator'),
                           (dict(keys={'ann-key': 'ann'}, operators=None), 'add a line OWNER KEY operator'),
                           ({}, 'kat serve has written it to a file')):
            async with world(tmp_path, **more) as w:
                for path, body in OPERATING:
                    for headers in (bearer('ann-key'), *([] if w.g.access.owners else [bearer('kat'), bearer('')])):
                        r = await w.ask(path, body, {'x-api-key': ''} | headers)
                        assert r['status'] == 403 and says in r['json']['error']['message'], (path, r)
                assert not w.store.sessions()
    run(go())


# --- keys for one session

def test_a_session_key_is_good_for_its_session_only(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            made = [(await w.ask('/sessions', dict(name=n, task='t'), bearer('ann-boss')))['json'] for n in 'ab']
            assert [m['name'] for m in made] == ['a', 'b'] and {m['task'] for m in made} == {'t'}
            a, b = (m['key'] for m in made)
            hints = {}, {'x-claude-code-session-id': 'b'}, {'x-session-id': 'b'}, {'x-kat-session': 'a'}
            for more in hints:      # what a client calls it by itself is no wish for another session
                assert (await w.ask(PATH['chat'], chat_body(USER), bearer(a) | more))['status'] == 200
            assert (await w.ask('/s/a' + PATH['messages'], messages_body(USER), {'x-api-key': a}))['status'] == 200
            assert len(w.session('a', 'ann').turns) == len(hints) + 1 and not w.session('b', 'ann').turns
            for path, more in (('/s/b', {}), ('', {'x-kat-session': 'b'}), ('/s/b', {'x-kat-session': 'a'})):
                for dialect, body in INFERENCE:
                    r = await w.ask(path + dialect, body, bearer(a) | more)
                    assert r['status'] == 403 and "this key is for session 'a' only" in r['body'].decode()
            secret = a.partition('@')[0]
            for bad in (secret, f'{secret}@b', f'{secret}@', f'{secret[4:]}@a', f'{a}x', f'{secret[:-1]}@a',
                        session_key('ann-key', 'a'), session_key('x', 'a'), secret.upper() + '@a'):
                assert (await w.ask(PATH['chat'], chat_body(USER), bearer(bad)))['status'] == 401, bad
            r = await w.ask(PATH['chat'], chat_body(USER), bearer(a) | {'x-kat-task': 'u'})
            assert r['status'] == 400 and "belongs to task 't'" in r['body'].decode()
            assert (await w.ask(PATH['chat'], chat_body(USER), bearer(b)))['status'] == 200
            other = session_key('bob-boss', 'a')    # the same name, another owner
            assert (await w.ask(PATH['chat'], chat_body(USER), bearer(other)))['status'] == 200
            assert len(w.session('a', 'bob').turns) == 1
        async with world(tmp_path, **KEYS) as w:    # it outlives the server, and the task was written
            r = await w.ask('/s/b' + PATH['chat'], chat_body(USER), bearer(b) | {'x-kat-task': 't'})
            assert r['status'] == 200 and w.session('b', 'ann').task == 't'
        gone = KEYS | dict(operators={'ann-new-boss': 'ann'})
        async with world(tmp_path, **gone) as w:    # and ends with the operator's
            assert (await w.ask(PATH['chat'], chat_body(USER), bearer(b)))['status'] == 401
    run(go())


def test_sessions_are_made_once_and_by_name(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            make = lambda **body: w.ask('/sessions', body, bearer('ann-boss'))
            one, two = await make(name='a'), await make(name='a')
            assert one['json'] == two['json'] and one['json']['task'] == 'a' and len(w.store.sessions()) == 1
            assert (await make(name='a', task='u'))['status'] == 400
            for bad in (dict(), dict(name=''), dict(name=None), dict(name=3), dict(name='a/b'), dict(name='..'),
                        dict(name='é'), dict(name='x' * 257), dict(name='b', task=' '), dict(name='b', tsk='t')):
                assert (await make(**bad))['status'] == 400, bad
            assert len(w.store.sessions()) == 1
    run(go())


def test_a_session_key_also_binds_where_no_key_is_asked_for(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            key = (await w.ask('/sessions', dict(name='a')))['json']['key']
            assert (await w.ask('/s/b' + PATH['chat'], chat_body(USER), {'x-api-key': key}))['status'] == 403
            assert (await w.ask(PATH['chat'], chat_body(USER), {'x-api-key': key}))['status'] == 200
            assert len(w.session('a').turns) == 1
    run(go())


# --- files of keys

def test_keys_from_a_file(tmp_path):
    file = tmp_path/'keys.txt'
    file.write_text('# the lab\nann k1\nann k2 operator\n\nbob k3 agent\n')
    assert read_keys(file) == ({'k1': 'ann', 'k3': 'bob'}, {'k2': 'ann'})
    for text, says in (('ann', ':1: OWNER KEY'), ('ann a b c', ':1: OWNER KEY'), ('ann a@b', ':1: OWNER KEY'),
                       ('ann secret boss', ':1: the third word'), ('a:b secret', ":1: owner 'a:b'"),
                       ('ann secret\nbob secret operator', ':2: a key that is there already'), ('# none', 'no keys')):
        file.write_text(text)
        with pytest.raises(ValueError) as e:
            read_keys(file)
        assert says in str(e.value) and 'secret' not in str(e.value)


def test_the_local_key_is_nobody_elses(tmp_path):
    file = tmp_path/'store.db.key'
    key = local_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and local_key(file) == key and os.listdir(tmp_path) == [file.name]
    assert Access(None, {key: ''}).operator(bearer(key)) == ''
    file.chmod(0o640)
    with pytest.raises(ValueError, match='others can read'):
        local_key(file)
    file.unlink()
    assert local_key(file) != key
    for text in ('', 'short', 'kat-op-' + 'x' * 64):
        file.write_text(text)
        with pytest.raises(ValueError, match='delete the file'):
            local_key(file)
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises((ValueError, OSError)):
        local_key(file)
    file.unlink()
    (tmp_path/'real').write_text('x')
    file.symlink_to(tmp_path/'real')
    with pytest.raises(OSError):
        local_key(file)
    assert (tmp_path/'real').read_text() == 'x'
    file.unlink()
    file.symlink_to(tmp_path/'nowhere')
    with pytest.raises(OSError):
        local_key(file)
    assert not (tmp_path/'nowhere').exists()
    old = os.umask(0)
    try:
        local_key(tmp_path/'open')
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path/'open').stat().st_mode) == 0o600


# --- the pages of other sites

HERE = ['localhost', 'LOCALHOST:8000', '127.0.0.1', '127.0.0.1:8000', '127.9.9.9:1', '[::1]', '[::1]:8000',
        '[0:0:0:0:0:0:0:1]:8000', '[::ffff:127.0.0.1]:8000']
ELSEWHERE = ['evil.example', 'evil.example:8000', '127.0.0.1.evil.example', 'localhost.evil.example:8000',
             '0.0.0.0:8000', '10.0.0.7:8000', '[::]:8000', '[fe80::1]', '169.254.1.1', '127.1', '2130706433',
             '0x7f000001', '', ' ', 'localhost:', 'localhost:x', 'localhost:80:80', 'user@localhost',
             'evil.example,localhost', 'localhost evil.example', '127.0.0.1:999999', '[127.0.0.1', '::1',
             '[localhost]x', 'localhost\t', 'ｌocalhost']


@pytest.mark.parametrize('host', HERE)
def test_names_of_this_machine(host):
    assert is_here(host)


@pytest.mark.parametrize('host', ELSEWHERE)
def test_names_of_others(host):
    assert not is_here(host)


@given(st.text(max_size=12), st.sampled_from(['', '.', ':1', '@', '/', ' ', ',']), st.sampled_from(HERE))
@settings(max_examples=300, deadline=None)
def test_nothing_can_be_put_before_or_behind_a_name(text, joint, host):
    import ipaddress
    for name in (text + joint + host, host + joint + text):
        if is_here(name):
            bare = name.lower().strip('[]').rpartition(']')[0] or name.lower()
            bare = bare.strip('[]') if '[' in name else bare.partition(':')[0]
            assert bare == 'localhost' or 'ffff:127' in bare or ipaddress.ip_address(bare).is_loopback


def test_the_servers_own_address_is_a_name_of_it():
    assert is_here('10.0.0.7:8000', '10.0.0.7') and is_here('kat', 'kat') and not is_here('evil.example', '10.0.0.7')


async def send(w, method, path, headers, body=b'', host='127.0.0.1:8000'):
    "As a socket would bring it; what no header names isn't there."
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(w.g.app), base_url='http://127.0.0.1:8000') as c:
        request = c.build_request(method, path, content=body, headers=[('host', host)])
        for name in ('content-type', 'origin'):
            if name in request.headers:
                del request.headers[name]
        request.headers = httpx2.Headers([*request.headers.multi_items(), *headers])
        return await c.send(request)


GOOD = ('content-type', 'application/json')
FOREIGN = ['http://evil.example', 'null', 'http://localhost:8000', 'http://127.0.0.1:8001', 'file://', '',
           'https://127.0.0.1.evil.example:8000', 'http://127.0.0.1', 'x://127.0.0.1:8000']
CHAT = b'{"model": "kat", "messages": [{"role": "user", "content": "x"}]}'
REWARD = b'{"reward": -9, "finished": true}'


def test_without_keys_no_page_of_another_site_is_served(tmp_path):
    async def go():
        async with world(tmp_path) as w:
            op = ('x-api-key', 'the-operator')
            assert (await send(w, 'POST', '/s/v/v1/chat/completions', [GOOD], CHAT)).status_code == 200
            looks = '/sessions /s/v/trajectories /live /v1/models /metrics /nowhere'.split()
            paths = [('POST', '/s/v/reward', REWARD), ('POST', '/v1/chat/completions', CHAT),
                     ('POST', '/groups', b'{}'), ('POST', '/v1/messages', b'{}'),
                     *[('GET', path, b'') for path in looks]]
            for method, path, body in paths:
                for host in ('evil.example:8000', '127.0.0.1.evil.example', '0.0.0.0:8000', ''):   # rebinding
                    r = await send(w, method, path, [GOOD, op], body, host)
                    assert r.status_code == 403 and 'Host' in r.text and b'private' not in r.content
                for origin in FOREIGN:
                    r = await send(w, method, path, [GOOD, op, ('origin', origin)], body)
                    assert r.status_code == 403 and 'Origin' in r.text, (path, origin)
                two = [GOOD, op, ('origin', 'http://127.0.0.1:8000'), ('origin', 'http://evil.example')]
                assert (await send(w, method, path, two, body)).status_code == 403
                assert (await send(w, method, path, [GOOD, op, ('host', 'evil.example')], body)).status_code == 403
            shown = (await send(w, 'POST', '/v1/messages', [GOOD, ('origin', 'http://e')], b'{}')).json()
            assert shown['type'] == 'error' and shown['error']['type'] == 'permission_error'
            s, = w.store.sessions()
            assert (s['turns'], s['reward'], s['finished'], len(w.engine.asked)) == (1, None, False, 1)
            for origin in ('http://127.0.0.1:8000', 'HTTP://127.0.0.1:8000'):   # our own page
                assert (await send(w, 'GET', '/sessions', [op, ('origin', origin)])).status_code == 200
            assert (await send(w, 'GET', '/metrics', [])).text.count('route="door",status="403"') == 1
    run(go())


@pytest.mark.parametrize('more', [{}, KEYS])
def test_bodies_are_declared_as_json(tmp_path, more):
    async def go():
        async with world(tmp_path, **more) as w:
            op = ('x-api-key', 'ann-boss' if more else 'the-operator')
            simple = ['text/plain', 'text/plain;charset=UTF-8', 'application/x-www-form-urlencoded',
                      'multipart/form-data; boundary=x', 'text/plain; application/json', 'application/jsonp', '',
                      'application/json, text/plain', 'application/problem+json']
            for path, body in (('/s/v/reward', REWARD), ('/v1/chat/completions', CHAT), ('/v1/messages', b'{}')):
                for headers in ([('content-type', kind)] for kind in simple):
                    assert (await send(w, 'POST', path, [op, *headers], body)).status_code == 415, headers
                assert (await send(w, 'POST', path, [op], body)).status_code == 415     # a Blob without a type
                assert (await send(w, 'POST', path, [op, GOOD, GOOD], body)).status_code == 415
            assert not w.engine.asked
            for kind in ('application/json', 'Application/JSON; charset=utf-8', 'application/json ;charset=utf-8'):
                r = await send(w, 'POST', '/v1/chat/completions', [op, ('content-type', kind)], CHAT)
                assert r.status_code == 200
    run(go())


def test_with_keys_the_name_of_the_server_is_its_own_affair(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            key = ('x-api-key', 'ann-key')
            for host in ('kat.lab.example', '10.0.0.7:8000'):
                origin = ('origin', 'http://app.example')
                r = await send(w, 'POST', '/v1/chat/completions', [GOOD, key, origin], CHAT, host)
                assert r.status_code == 200 and not any(h.startswith('access-control') for h in r.headers)
            preflight = [('origin', 'http://app.example'), ('access-control-request-method', 'POST')]
            r = await send(w, 'OPTIONS', '/v1/chat/completions', preflight, host='kat.lab.example')
            assert r.status_code == 405 and not any(h.startswith('access-control') for h in r.headers)
    run(go())


# --- owners

def test_sessions_of_two_owners_are_never_in_one_group(tmp_path):
    async def go():
        async with world(tmp_path, **KEYS) as w:
            for who in ('ann', 'bob'):       # unnamed sessions, and ones of a task of the same name
                for headers in ({}, *({'x-kat-session': name, 'x-kat-task': 't'} for name in 'xy')):
                    body = chat_body([dict(role='user', content=f'of {who}')])
                    assert (await w.ask(PATH['chat'], body, bearer(f'{who}-key') | headers))['status'] == 200
            words = lambda group: {('ann' if 'of ann' in w.tok.decode(t.ids) else 'bob') for t in group.trajectories}
            groups = list(w.store.groups())
            assert sorted((g.task, len(g)) for g in groups) == [('default', 1)] * 2 + [('t', 2)] * 2
            assert all(len(words(g)) == 1 for g in groups)
            assert [g.task for g in w.store.groups(owner='ann')] == ['default', 't']
            for who in ('ann', 'bob'):
                for name in ('default', 'x', 'y'):
                    await w.ask(f'/s/{name}/reward', dict(reward=1), bearer(f'{who}-boss'))
                body = dict(key='k', sessions=['x', 'y'])
                assert (await w.ask('/groups', body, bearer(f'{who}-boss')))['json'] == dict(key='k', new=True)
            assert [words(g) for _, g in w.store.finished_groups(0, 9)] == [{'ann'}, {'bob'}]
    run(go())


def test_a_groups_key_belongs_to_one_owner(tmp_path):
    "A key that a server without keys gave, and that a later one with keys would give to somebody: no group is lost."
    async def go():
        async with world(tmp_path) as w:
            await w.chat('x', 'a')
            await w.ask('/s/a/reward', dict(reward=1))
            assert (await w.ask('/groups', dict(key='ann:k', sessions=['a'])))['json']['new']
        async with world(tmp_path, **KEYS) as w:
            await w.chat('x', 'a', bearer('ann-key'))
            await w.ask('/s/a/reward', dict(reward=1), bearer('ann-boss'))
            r = await w.ask('/groups', dict(key='k', sessions=['a']), bearer('ann-boss'))
            assert r['status'] == 400
            assert "is of owner ''; owner 'ann' needs another key" in r['json']['error']['message']
    run(go())
    with pytest.raises(ValueError, match="is of owner ''; owner 'bob' needs"):
        Store(tmp_path/'store.db').finish('ann:k', ['a'], 'bob')


def test_who_asks():
    access = Access({'a': 'ann'}, {'b': 'ann'})
    assert access.who(bearer('a@s')).session == 's' and not access.who(bearer('a@s')).bound
    assert access.who(bearer('b')).operator and access.operator(bearer('b@whatever')) == 'ann'
    for key in ('', 'x', '@s', 'kat-@s', 'A'):
        with pytest.raises(BadRequest) as e:
            access.operator(bearer(key))
        assert e.value.status == 401
    with pytest.raises(ValueError, match="an agent's and an operator's"):
        Access({'a': 'ann'}, {'a': 'ann'})
