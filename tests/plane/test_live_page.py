"The live page in headless Chromium: `make page` installs what it takes and runs this; without that it is skipped"
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote
from urllib.request import Request, urlopen

import pytest
from page_demo import agent_session, answer, browser, chromium, served
from plane_world import OPERATOR, chat_body, tokenizer

from kat.plane.manager import Session

pytest.importorskip('playwright', reason="no playwright: run `make page`")
pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium: apt install chromium, or name one in KAT_CHROMIUM; then `make page`")

IMG, SVG = "<img/src=x/onerror=window.pwned=1>", "<svg/onload=window.pwned=1>"
TEXT = "<script>window.pwned=1</script><img src=x onerror=window.pwned=1> {{7*7}} \u202e"


@pytest.fixture(scope='module')
def chrome():
    with browser('--host-resolver-rules=MAP evil.example 127.0.0.1') as b:
        yield b


@pytest.fixture
def open_page(chrome):
    "Opens an address; at the end nobody may have run what agents said, and nothing may have gone wrong in the page."
    pages, wrong = [], []
    def open_(url, expected='403', key=OPERATOR, **more):
        page = chrome.new_page(**dict(viewport=dict(width=1200, height=900)) | more)
        page.on('pageerror', lambda e: wrong.append(str(e)))
        page.on('console', lambda m: wrong.append(m.text) if m.type == 'error' and expected not in m.text else None)
        page.asked = []
        page.on('request', lambda r: page.asked.append(r.url))
        page.add_init_script(f"if (!sessionStorage.length) sessionStorage.setItem('kat-key', '{key}')" if key else '')
        page.goto(url)
        pages.append(page)
        return page
    yield open_
    for page in pages:
        assert page.evaluate('window.pwned') is None and page.locator('main img, main script, main svg').count() == 0
        page.context.close()
    assert not wrong


def post(address, session, text, **headers):
    body = json.dumps(chat_body([dict(role='user', content=text)])).encode()
    return urlopen(Request(f'{address}/s/{session}/v1/chat/completions', body,
                           {'content-type': 'application/json', **headers})).read()


def test_empty_then_alive(open_page, tmp_path):
    "Nothing there; a first session appears by itself, is opened, and grows."
    with served(tmp_path) as (address, g):
        page = open_page(address + '/live')
        page.wait_for_selector('text=No session yet')
        post(address, 'first', 'hello', **{'x-kat-task': 'a/task'})
        page.click('tr.go')
        page.wait_for_selector('#rows tr')
        assert 'task a/task · 1 turn · 1 path' in page.inner_text('#sizes')
        assert page.inner_text('#rows tr td:last-child') == 'done'
        post(address, 'first', 'hello')
        page.wait_for_selector('#rows tr:nth-child(2)')
        assert '1 clean 1 forked' in page.inner_text('#sessions tr') and '2 turns' in page.inner_text('#sizes')
        page.wait_for_selector('#written:not(:text-is("0"))')
        g.engine.version = 12
        page.wait_for_selector('text=version 12')
        page.reload()   # the chosen session is in the address
        page.wait_for_selector('#rows tr')


def test_hostile_strings_are_text(open_page, tmp_path):
    s = Session(tokenizer(), SVG.replace('/', '_') + '&amp;"\'', task=IMG)
    messages = [dict(role='user', content=TEXT)]
    answer(s, messages, TEXT, n=3, agent=IMG)
    messages.append(dict(role='user', content='and'))
    answer(s, messages, '', IMG, 3, agent=SVG)
    with served(tmp_path, [s]) as (address, g):
        page = open_page(address + '/live', expected='Content Security Policy')   # of the last line's script
        page.click('tr.go')
        page.wait_for_selector('#rows tr')
        page.hover('#tree', position=dict(x=50, y=50))
        assert page.inner_text('#title') == s.name and IMG in page.inner_text('#sizes')
        assert IMG in page.inner_text('#sessions')
        rows = page.inner_text('#rows')
        assert IMG in rows and SVG in rows and '<script>window.pwned=1</script>' in rows
        assert unquote(page.url.split('#')[1]) == s.name
        page.wait_for_selector('#tip:visible')
        injected = ("(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; "
                    "document.body.append(s); return window.ran })()")
        assert page.evaluate(injected) is None


def test_the_key_stays_where_it_belongs(open_page, tmp_path):
    with served(tmp_path, [agent_session('of-ann', 't', 3, owner='ann'), agent_session('of-bob', 't', 3, owner='bob')],
                keys={'ann-agent': 'ann'}, operators={'ann-secret': 'ann'}) as (address, g):
        page = open_page(address + '/live', expected='40', key='')
        page.wait_for_selector('#key:visible')
        page.fill('#secret', 'wrong')
        page.click('text=Show my sessions')
        page.wait_for_selector('text=This key is not known here.')
        page.fill('#secret', 'ann-agent')
        page.click('text=Show my sessions')
        page.wait_for_selector("text=this takes an operator's key; this one is an agent's")
        page.fill('#secret', 'ann-secret')
        page.keyboard.press('Enter')
        page.wait_for_selector('text=of-ann')
        assert 'of-bob' not in page.content() and 'ann-secret' not in page.content()
        assert page.input_value('#secret') == ''
        assert page.evaluate("sessionStorage.getItem('kat-key')") == 'ann-secret'
        assert page.evaluate('localStorage.length + document.cookie.length') == 0
        page.reload()
        page.wait_for_selector('text=of-ann')
        held = []   # an answer on its way while the key is forgotten
        page.route('**/live/state', lambda route: held.append(route))
        with page.expect_request('**/live/state'):
            pass
        page.click('text=Forget the key')
        with page.expect_response('**/live/state') as late:
            held[0].continue_()
        assert late.value.json()['sessions']
        page.unroute('**/live/state')
        for _ in range(3):
            page.evaluate("fetch('live').then(r => r.text())")   # the page has had its turn
        assert page.is_visible('#key') and page.is_hidden('#page')
        assert page.evaluate('sessionStorage.length') == 0 and 'of-ann' not in page.content()
        assert not any('secret' in x or '?' in x for x in page.asked)
        assert {x.split('/')[2] for x in page.asked if x.startswith('http')} == {address.split('/')[2]}


def test_thousands_of_blocks(open_page, tmp_path):
    "A big tree is drawn, a block can be picked and zoomed into, a turn leads to its block."
    s = agent_session('big', 't', 20, 5, agents=400, forks=120)
    assert len(s.turns) > 1500
    with served(tmp_path, [s]) as (address, g):
        page = open_page(address + '/live#big')
        page.wait_for_selector('#rows tr', timeout=120_000)
        colours = ("(() => { const c = document.getElementById('tree'), "
                   "d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, n = new Set();"
                   "for (let i = 0; i < d.length; i += 4) n.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); "
                   "return [n.size, c.toDataURL()] })()")
        n, before = page.evaluate(colours)
        assert n > 20 and page.locator('#rows tr').count() == 200
        page.click('#tree', position=dict(x=20, y=5))
        assert re.fullmatch('[0-9,]+ tokens from [0-9,]+ on, 121 paths', page.inner_text('#picked'))
        page.click('#in')
        assert page.evaluate(colours)[1] != before and page.is_enabled('#out')
        page.click('#out')
        assert page.evaluate(colours)[1] == before
        page.focus('#rows tr:nth-child(3)')
        page.keyboard.press('Enter')
        assert 'tokens from' in page.inner_text('#picked') and page.locator('#rows tr.picked').count() >= 1


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_phone(open_page, tmp_path, scheme):
    "Nothing sticks out to the side, and the ground is dark where the system's is."
    with served(tmp_path, [agent_session('a-session-with-a-name-that-is-long-and-has-no-space-in-it-whatsoever',
                                         'x' * 200, 6, 1, 2, 3)]) as (address, g):
        page = open_page(address + '/live', viewport=dict(width=360, height=740), color_scheme=scheme)
        page.click('tr.go')
        page.wait_for_selector('#rows tr')
        assert page.evaluate('document.documentElement.scrollWidth') == 360
        red = int(page.evaluate("getComputedStyle(document.body).backgroundColor").split('(')[1].split(',')[0])
        assert red < 60 if scheme == 'dark' else red > 200


def test_a_gateway_that_is_gone_is_said(open_page, tmp_path):
    with served(tmp_path, [agent_session('s', 't', 2)]) as (address, g):
        page = open_page(address + '/live#s', expected='ERR_CONNECTION')
        page.wait_for_selector('#rows tr')
    page.wait_for_selector('text=Nothing new for now')
    assert page.locator('#rows tr').count() == 2   # what was there stays


def test_the_address_that_the_server_prints(open_page, tmp_path):
    "Its key is in the fragment, which no browser sends; the page keeps it for the tab and takes it out of the address."
    with served(tmp_path, [agent_session('mine', 't', 2)]) as (address, g):
        page = open_page(address + f'/live#key={OPERATOR}', key='')
        page.wait_for_selector('text=mine')
        assert OPERATOR not in page.url and OPERATOR not in page.content()
        assert not any(OPERATOR in x for x in page.asked if '#' not in x)
        page.reload()
        page.wait_for_selector('text=mine')


# --- pages of other sites, and a server without keys

ATTACK = """async address => {
  const seen = [], body = JSON.stringify({model: 'kat', messages: [{role: 'user', content: 'evil'}]})
  const grade = JSON.stringify({reward: -9, finished: true})
  const tell = (name, what) => seen.push([name, what])
  const paths = [['/v1/chat/completions', body], ['/s/victim/reward', grade], ['/groups', '{}'],
                 ['/sessions', '{"name": "x"}']]
  for (const [path, text] of paths)
    for (const [mode, type] of [['no-cors', 'text/plain'], ['cors', 'text/plain'], ['no-cors', 'application/json'],
                                ['cors', 'application/json'], ['no-cors', ''],
                                ['cors', 'application/x-www-form-urlencoded']])
      for (const host of [address, address.replace('127.0.0.1', 'localhost')]) {
        const what = type ? text : new Blob([text])
        try {
          const r = await fetch(host + path, {method: 'POST', mode, body: what, credentials: 'include',
                                              headers: type ? {'content-type': type} : {}})
          tell('POST ' + path, r.type === 'opaque' ? 'opaque' : r.status + ' ' + await r.text())
        } catch (e) { tell('POST ' + path, 'blocked') }
      }
  for (const path of ['/sessions', '/s/victim/trajectories', '/live/state', '/live', '/v1/models', '/metrics'])
    for (const mode of ['no-cors', 'cors'])
      try {
        const r = await fetch(address + path, {mode})
        tell('GET ' + path, r.type === 'opaque' ? 'opaque' : r.status + ' ' + await r.text())
      } catch (e) { tell('GET ' + path, 'blocked') }
  navigator.sendBeacon(address + '/s/victim/reward', grade)
  navigator.sendBeacon(address + '/s/victim/reward', new Blob([grade], {type: 'text/plain'}))
  for (const path of ['/s/victim/reward', '/v1/chat/completions'])
    for (const enctype of ['text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data']) {
      const [frame, form, field] = ['iframe', 'form', 'input'].map(tag => document.createElement(tag))
      frame.name = 'f' + Math.random(); document.body.append(frame)
      Object.assign(form, {method: 'POST', action: address + path, enctype, target: frame.name})
      field.name = '{"reward": -9, "x": "'; field.value = '"}'
      form.append(field); document.body.append(form)
      await new Promise(done => { frame.onload = done; form.submit() })
      try { tell('form ' + path, frame.contentDocument ? frame.contentDocument.body.innerText : 'hidden') }
      catch (e) { tell('form ' + path, 'hidden') }
    }
  await new Promise(done => {
    const socket = new WebSocket(address.replace('http', 'ws') + '/s/victim/v1/chat/completions')
    socket.onopen = () => { tell('socket', 'open'); done() }
    socket.onerror = () => { tell('socket', 'blocked'); done() }
  })
  for (const tag of ['script', 'img'])
    await new Promise(done => { const e = document.createElement(tag); e.onload = e.onerror = done
      e.src = address + '/s/victim/trajectories'; document.body.append(e) })
  return seen
}"""


@contextmanager
def site(page=b'<!doctype html><title>evil</title><body>'):
    "The address of a page of another site, on this machine too."
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('content-type', 'text/html')
            self.end_headers()
            self.wfile.write(page)
        def log_message(self, *args):
            pass
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f'http://127.0.0.1:{server.server_port}'
        finally:
            server.shutdown()


def test_a_page_of_another_site_writes_and_reads_nothing(chrome, tmp_path):
    """All that a page can send without asking: fetch in each mode, beacons, forms, sockets, pictures. Nothing is
    sampled, graded, made or read; and our own page on the same server works meanwhile."""
    with served(tmp_path) as (address, g), site() as evil:
        post(address, 'victim', 'private words')
        page = chrome.new_page()
        try:
            page.goto(evil)
            seen = page.evaluate(ATTACK, address)
            assert len(seen) > 60 and not [x for x in seen if x[1] not in ('opaque', 'blocked', 'hidden')], seen
            own = chrome.new_page()
            own.goto(address + f'/live#key={OPERATOR}')
            own.wait_for_selector('text=victim')
            own.context.close()
        finally:
            page.context.close()
        (s,), labels = g.store.sessions(), [dict(labels) for _, labels in g.metrics.counts]
        door = {x['status'] for x in labels if x.get('route') == 'door'}
        assert (s['name'], s['turns'], s['reward'], s['finished']) == ('victim', 1, None, False) and door == {403}


def test_after_dns_rebinding_nothing_is_read(chrome, tmp_path):
    "The page's own name now leads here: it is of the same origin as what it asks for, and may read every answer."
    with served(tmp_path) as (address, g):
        post(address, 'victim', 'private words')
        rebound = address.replace('127.0.0.1', 'evil.example')
        page = chrome.new_page()
        seen = []
        page.on('response', lambda r: seen.append(r.status))
        page.goto(rebound + '/live')
        texts = page.evaluate("""async () => {
          const out = []
          for (const path of ['/sessions', '/s/victim/trajectories', '/v1/models', '/live/state', '/metrics'])
            out.push(await (await fetch(path, {headers: {'x-api-key': 'the-operator'}})).text())
          const json = {'content-type': 'application/json'}
          for (const path of ['/s/victim/reward', '/v1/chat/completions'])
            out.push(await (await fetch(path, {method: 'POST', headers: json, body: '{"reward": -9}'})).text())
          return out
        }""")
        assert set(seen) == {403} and len(texts) == 7 and all('Host' in t and 'private' not in t for t in texts)
        s, = g.store.sessions()
        assert s['turns'] == 1 and s['reward'] is None and not s['finished']
        page.context.close()
