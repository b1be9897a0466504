"""The gateway under load, LiteLLM's proxy beside it: `make load`, or `python benchmarks/load.py` (half an hour on
two idle cores)

One scripted upstream serves everybody and answers after a fixed delay: as an OpenAI endpoint to LiteLLM, with token
ids in and out (vLLM's protocol) to our gateway. The server that is measured has a core of its own, client and
upstream share another. Our gateway does all of its work: it checks the request, places it in its session's tree,
renders and encodes what is new, and has every turn on the disk before the answer leaves. LiteLLM's runs as its
documentation recommends for production: one worker, no database, no verbose logs, a master key; it records nothing.

  direct    the client straight at the upstream: what the engine alone takes
  kat       our gateway; the upstream over HTTP, through a bare client of this benchmark's own
  embedded  our gateway; the script in its own process, as `kat serve` has its engine
  vllm      our gateway; the upstream over HTTP, through VLLMEngine (only where asked for)
  litellm   LiteLLM's proxy (`make litellm` installs it into .venv-litellm; left out where absent)

Parts: `arrivals`, 64 sessions at 200 requests/s, their arrivals random, latency counted from when a request was due;
`saturation`, 512 sessions without a pause; `streams`, the same with streamed answers; `memory`, 100,000 turns
through `embedded`, whose manager may keep 128 MiB of sessions. A session is an agent's: a system prompt, four tools,
sixteen turns of a call and its result, the whole history in every request (12 kB on average). Systems alternate
within each repetition; intervals are the smallest and the largest of the repetitions. Overhead is a percentile less
the same percentile of `direct`.

Writes figures/load.json and figures/load.png (with `--quick`, which only checks that everything runs, nothing).
Parts that are not run again stay as they are there, each with the command and the load average of its own run, if
machine and number of sessions are the same.
"""
import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEY, TURNS, PIECES = 'sk-load', 16, 8
PYTHON = ROOT / '.venv-litellm/bin/python'
FILE = ROOT / 'figures/load.json'
SYSTEMS = ('direct', 'kat', 'embedded', 'litellm')

# --- what agents and the model say

WORDS = ('the list of items is read from a file and every item is checked against its price before the total '
         'is returned').split()
ADVICE = 'Read the files that matter, change as little as possible, run the tests, then submit. '
SYSTEM = 'You fix bugs in a repository. ' + ADVICE * 30
ARGUMENTS = dict(type='object', properties=dict(path=dict(type='string'), text=dict(type='string')),
                 required=['path', 'text'])
TOOLS = [dict(type='function', function=dict(
    name=name, description=f'{name} something in the repository', parameters=ARGUMENTS))
    for name in ('view', 'edit', 'run', 'submit')]


def _said(i):
    "Answer `i` of the script: its text, and its call's path and text."
    rng = random.Random(i)
    return ' '.join(rng.choices(WORDS, k=20)) + '.', f'src/part_{i % 10}.py', ' '.join(rng.choices(WORDS, k=12))


SCRIPT = [_said(i) for i in range(64)]
RESULTS = ['\n'.join(' '.join(random.Random(100 * i + j).choices(WORDS, k=10)) for j in range(12)) for i in range(64)]


def script_ids(tokenizer):
    "The script as token ids."
    end = tokenizer.eos_token_id
    return [[*tokenizer.encode(f'{text}<tool_call>view {path} {more}</tool_call>', add_special_tokens=False), end]
            for text, path, more in SCRIPT]


def tokenizer():
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(ROOT / 'data/base')


# --- HTTP, as little of it as is needed: the load must cost less than what it measures

class Wire(asyncio.Protocol):
    "One connection; messages are (first line and headers, body) with their length told, or chunked."
    def __init__(self):
        self.buf, self.waiter, self.transport = bytearray(), None, None
    def connection_made(self, transport):
        self.transport = transport
    def connection_lost(self, exc):
        if self.waiter and not self.waiter.done():
            self.waiter.set_exception(ConnectionError(f'connection lost: {exc}'))

    def data_received(self, data):
        self.buf += data
        if (m := self.message()) is not None:
            self.on_message(*m)

    def message(self):
        "A whole message off the buffer, or None."
        at = self.buf.find(b'\r\n\r\n')
        if at < 0: return None
        head = bytes(self.buf[:at]).lower()
        if b'transfer-encoding: chunked' in head:
            if not self.buf.endswith(b'0\r\n\r\n', at + 4): return None
            body = _chunks(self.buf, at + 4)
            self.buf.clear()
            return head, body
        i = head.find(b'content-length:')
        n = at + 4 + (int(head[i + 15:].split(b'\r\n', 1)[0]) if i >= 0 else 0)
        if len(self.buf) < n: return None
        body = bytes(self.buf[at + 4:n])
        del self.buf[:n]
        return head, body

    def on_message(self, head, body):
        self.waiter.set_result((head, body))

    async def ask(self, data):
        self.waiter = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return await self.waiter


def _chunks(buf, at):
    "A chunked body from `at` on, whole."
    out = []
    while True:
        end = buf.index(b'\r\n', at)
        if (n := int(buf[at:end], 16)) == 0: return b''.join(out)
        out.append(buf[end + 2:end + 2 + n])
        at = end + 4 + n


class Upstream(Wire):
    "The scripted engine behind HTTP: an OpenAI endpoint, and vLLM's endpoint for token ids."
    delay, ids, n = 0.05, None, 0

    def on_message(self, head, body):
        path = head.split(b' ', 2)[1]
        if path.startswith(b'/v1/models'): return self.json(dict(data=[dict(id='scripted', max_model_len=2**20)]))
        if path.startswith(b'/server_info'):
            return self.json(dict(vllm_config=dict(model_config=dict(logprobs_mode='raw_logprobs'))))
        Upstream.n += 1
        stream = b'"stream": true' in body or b'"stream":true' in body
        kind = self.tokens if path.startswith(b'/inference') else self.chunks if stream else self.answer
        loop = asyncio.get_running_loop()
        if Upstream.delay:
            loop.call_later(Upstream.delay, kind, Upstream.n % len(SCRIPT))
        else:
            kind(Upstream.n % len(SCRIPT))

    def json(self, x):
        b = json.dumps(x).encode()
        self.send(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b' % (len(b), b))

    def send(self, data):
        if not self.transport.is_closing():
            self.transport.write(data)

    def events(self, events):
        "Server-sent events, each a chunk of its own."
        out = [b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n']
        for e in [*map(json.dumps, events), '[DONE]']:
            b = f'data: {e}\n\n'.encode()
            out.append(b'%x\r\n%b\r\n' % (len(b), b))
        self.send(b''.join(out) + b'0\r\n\r\n')

    def call(self, i):
        return dict(id=f'call_{Upstream.n}', type='function',
                    function=dict(name='view', arguments=json.dumps(dict(path=SCRIPT[i][1], text=SCRIPT[i][2]))))

    def answer(self, i):
        m, n = dict(role='assistant', content=SCRIPT[i][0], tool_calls=[self.call(i)]), len(Upstream.ids[i])
        self.json(dict(id=f'chatcmpl-{Upstream.n}', object='chat.completion', created=1, model='scripted',
                       usage=dict(prompt_tokens=1, completion_tokens=n, total_tokens=n + 1),
                       choices=[dict(index=0, message=m, finish_reason='tool_calls')]))

    def chunks(self, i):
        head = dict(id=f'chatcmpl-{Upstream.n}', object='chat.completion.chunk', created=1, model='scripted')
        chunk = lambda delta, reason=None: head | dict(choices=[dict(index=0, delta=delta, finish_reason=reason)])
        text, step = SCRIPT[i][0], -(-len(SCRIPT[i][0]) // PIECES)
        deltas = [dict(role='assistant', content=''),
                  *(dict(content=text[k:k + step]) for k in range(0, len(text), step)),
                  dict(tool_calls=[self.call(i) | dict(index=0)])]
        self.events([*map(chunk, deltas), chunk({}, 'tool_calls')])

    def tokens(self, i):
        ids = Upstream.ids[i]
        step, out = -(-len(ids) // PIECES), []
        for k in range(0, len(ids), step):
            part = ids[k:k + step]
            last = k + step >= len(ids)
            logprobs = dict(content=[dict(token_id=t, logprob=-.5) for t in part])
            choice = dict(token_ids=part, logprobs=logprobs, finish_reason='stop' if last else None)
            out.append(dict(choices=[choice]))
        self.events(out)


async def serve_upstream(port, delay):
    Upstream.ids, Upstream.delay = script_ids(tokenizer()), delay
    server = await asyncio.get_running_loop().create_server(Upstream, '127.0.0.1', port, backlog=2048)
    await server.serve_forever()


class WireEngine:
    "An engine over HTTP by bare connections, kept for the next request."
    version = 0
    def __init__(self, port):
        self.port, self.free = port, []

    async def generate(self, request, on_token=None):
        from kat.infer.vllm import Chunks, sampling_params
        body = json.dumps(dict(model='scripted', token_ids=request.ids.tolist(),
                               sampling_params=sampling_params(request), stream=True)).encode()
        if self.free:
            wire = self.free.pop()
        else:
            _, wire = await asyncio.get_running_loop().create_connection(Wire, '127.0.0.1', self.port)
        head = b'POST /inference/v1/generate HTTP/1.1\r\nhost: engine\r\ncontent-length: %d\r\n\r\n' % len(body)
        _, events = await wire.ask(head + body)
        self.free.append(wire)
        out = Chunks(self.version)
        for line in events.split(b'\n'):
            if not line.startswith(b'data: {'): continue
            for token, lp in out.take(json.loads(line[6:])):
                on_token(token, lp, float('nan'), self.version)
        return out.completion(int)


async def serve_kat(port, store, upstream, megabytes):
    "Our gateway; `upstream` is vllm=PORT, kat=PORT, or embedded=DELAY for a script in this process."
    from kat.plane.gateway import Gateway, serve
    from kat.plane.manager import Manager
    from kat.infer.scripted import ScriptEngine
    from kat.plane.store import Store
    from kat.infer.vllm import VLLMEngine
    tok = tokenizer()
    ids, count = script_ids(tok), iter(range(2**62))
    kind, _, where = upstream.partition('=')
    if kind == 'vllm':
        engine = await VLLMEngine.connect(f'http://127.0.0.1:{where}')
    elif kind == 'kat':
        engine = WireEngine(int(where))
    else:
        engine = ScriptEngine(lambda r: ids[next(count) % len(ids)], tok, delay=float(where))
    kept = Store(store)
    try:
        await serve(Gateway(engine, tok, kept, 2**20, keys={KEY: 'load'}, manager=Manager(megabytes * 2**20)),
                    '127.0.0.1', port, print)
    finally:
        kept.close()


# --- the agents

class Agent:
    "One session after another, a turn at a time, its history as bytes that grow."
    numbers = iter(range(2**62))

    def __init__(self, port, stream, tag):
        self.port, self.stream, self.tag, self.wire, self.turn = port, stream, tag, None, TURNS

    def request(self):
        "The bytes of the next request."
        if self.turn == TURNS:
            self.turn, self.number = 0, next(Agent.numbers)
            self.name = f'{self.tag}-{self.number}'
            head = dict(model='kat', tools=TOOLS, stream=self.stream, max_tokens=512)
            self.parts = [json.dumps(head).encode()[:-1] + b', "messages": [',
                          json.dumps(dict(role='system', content=SYSTEM)).encode(), b', ',
                          json.dumps(dict(role='user', content=f'Fix issue {self.name}.')).encode()]
        body = b''.join(self.parts) + b']}'
        head = ('POST /v1/chat/completions HTTP/1.1', f'host: 127.0.0.1:{self.port}', f'authorization: Bearer {KEY}',
                f'x-kat-session: {self.name}', 'content-type: application/json', f'content-length: {len(body)}', '', '')
        return '\r\n'.join(head).encode() + body

    async def step(self):
        "Ask, and take the answer into the history. RuntimeError for anything but an answer with its call."
        if self.wire is None:
            _, self.wire = await asyncio.get_running_loop().create_connection(Wire, '127.0.0.1', self.port)
        head, body = await self.wire.ask(self.request())
        if not head.startswith(b'http/1.1 200'): raise RuntimeError(f'{head[:40]!r} {body[:300]!r}')
        m = _from_events(body) if self.stream else json.loads(body)['choices'][0]['message']
        if not m.get('tool_calls'): raise RuntimeError(f'an answer without its call: {body[:300]!r}')
        result = dict(role='tool', tool_call_id=m['tool_calls'][0]['id'],
                      content=RESULTS[(self.number + 7 * self.turn) % len(RESULTS)])
        for x in (dict(role='assistant', content=m['content'], tool_calls=m['tool_calls']), result):
            self.parts += [b', ', json.dumps(x).encode()]
        self.turn += 1

    def close(self):
        if self.wire:
            self.wire.transport.close()


def _from_events(data):
    "The message of a stream."
    if not data.rstrip().endswith(b'data: [DONE]'): raise RuntimeError(f'a stream without its end: {data[-300:]!r}')
    text, calls = [], []
    for line in data.split(b'\n'):
        if not line.startswith(b'data: {'): continue
        for c in json.loads(line[6:])['choices']:
            text.append(c['delta'].get('content') or '')
            calls += c['delta'].get('tool_calls') or ()
    return dict(content=''.join(text), tool_calls=[{k: c[k] for k in ('id', 'type', 'function')} for c in calls])


# --- processes

@contextmanager
def process(cmd, port, core, log, **env):
    "A server, until the block is left; its last words where it does not come up."
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    with open(log, 'wb') as f:
        p = subprocess.Popen([str(c) for c in cmd], stdout=f, stderr=f, preexec_fn=pin, env=os.environ | env)
    try:
        for _ in range(1200):
            if p.poll() is not None: break
            try:
                socket.create_connection(('127.0.0.1', port), 1).close()
                break
            except OSError:
                time.sleep(.1)
        if p.poll() is not None:
            sys.exit(f'{Path(cmd[0]).name} {cmd[1]} ended with {p.returncode}: {Path(log).read_text()[-2000:]}')
        yield p
    finally:
        p.send_signal(signal.SIGTERM)
        try:
            p.wait(20)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()


def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s:
        return s.getsockname()[1]


def cpu_seconds(pid):
    "Of all threads of a process."
    parts = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf('SC_CLK_TCK')


def megabytes(pid):
    return int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


LITELLM = """model_list:
  - model_name: kat
    litellm_params: {{model: openai/scripted, api_key: none, api_base: "http://127.0.0.1:{port}/v1"}}
general_settings: {{master_key: {key}, disable_spend_logs: true, disable_error_logs: true}}
litellm_settings: {{request_timeout: 600, set_verbose: false, json_logs: true}}
"""


class Servers:
    "All that is measured, side by side; each by name with its port and process."
    def __init__(self, stack, tmp, systems, delay, cores):
        self.port, self.pid, me = {}, {}, [sys.executable, __file__]
        core, other = cores if len(cores) > 1 else (None, None)
        up = self.port['direct'] = free_port()
        upstream = process([*me, 'serve-upstream', up, delay], up, other, tmp / 'upstream.log')
        self.pid['direct'] = stack.enter_context(upstream).pid
        for name in systems:
            if name == 'direct': continue
            port = self.port[name] = free_port()
            if name == 'litellm':
                (tmp / 'litellm.yaml').write_text(LITELLM.format(port=up, key=KEY))
                cmd = [PYTHON.parent / 'litellm', '--config', tmp / 'litellm.yaml', '--host', '127.0.0.1', '--port',
                       port, '--num_workers', 1]
                env = dict(LITELLM_MODE='PRODUCTION', LITELLM_LOG='ERROR', LITELLM_LOCAL_MODEL_COST_MAP='True',
                           PYTHONPATH='', PATH=f'{PYTHON.parent}:{os.environ["PATH"]}')
            else:
                cmd, env = [*me, 'serve-kat', port, tmp / f'{name}.db', f'{name}={delay if name == "embedded" else up}',
                            128], {}
            self.pid[name] = stack.enter_context(process(cmd, port, core, tmp / f'{name}.log', **env)).pid


# --- the parts

class Tally:
    "Latencies in seconds, and the server's CPU seconds, over one repetition."
    def __init__(self, pid):
        self.pid, self.taken, self.on, self.cpu = pid, [], False, 0
    def start(self):
        self.on, self.began, self.cpu0 = True, time.perf_counter(), cpu_seconds(self.pid)
    def stop(self):
        self.on, self.seconds, self.cpu = False, time.perf_counter() - self.began, cpu_seconds(self.pid) - self.cpu0
    def add(self, seconds):
        if self.on:
            self.taken.append(seconds)

    def row(self):
        if not (xs := sorted(self.taken)):
            sys.exit(f'no answer within {self.seconds:.0f} s: too busy a machine, or give more --seconds')
        at = lambda q: 1000 * xs[min(len(xs) - 1, int(q * len(xs)))]
        return dict(requests=len(xs), rate=len(xs) / self.seconds, p50=at(.5), p99=at(.99),
                    cpu_ms=1000 * self.cpu / len(xs), megabytes=megabytes(self.pid))


async def saturate(servers, name, seconds, agents=512, stream=False):
    "Every agent asks as soon as it has its answer."
    tally, over, tag = Tally(servers.pid[name]), asyncio.Event(), f'{name}{next(Agent.numbers)}'
    team = [Agent(servers.port[name], stream, tag) for _ in range(agents)]

    async def work(a):
        while not over.is_set():
            t = time.perf_counter()
            await a.step()
            tally.add(time.perf_counter() - t)

    tasks = [asyncio.create_task(work(a)) for a in team]
    await _clock(tally, over, tasks, seconds)
    for a in team:
        a.close()
    return tally.row()


async def _clock(tally, over, tasks, seconds):
    "Half the time to warm up, then the measurement; the first error of any agent ends it."
    async def run():
        await asyncio.sleep(seconds / 2)
        tally.start()
        await asyncio.sleep(seconds)
        tally.stop()
        over.set()
    clock = asyncio.create_task(run())
    await asyncio.wait([clock, *tasks], return_when=asyncio.FIRST_EXCEPTION)
    await asyncio.gather(clock, *tasks)


async def arrive(servers, name, seconds, agents=64, rate=200):
    "Requests come at random times, `rate` a second on average, each to an agent that waits for none."
    tally, over, tag = Tally(servers.pid[name]), asyncio.Event(), f'{name}{next(Agent.numbers)}'
    team, rng, idle = [Agent(servers.port[name], False, tag) for _ in range(agents)], random.Random(0), asyncio.Queue()
    for a in team:
        idle.put_nowait(a)

    async def one(due):
        a = await idle.get()
        await a.step()
        tally.add(time.perf_counter() - due)
        idle.put_nowait(a)

    async def source():
        due, tasks = time.perf_counter(), []
        while not over.is_set():
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
    await _clock(tally, over, [asyncio.create_task(source())], seconds)
    for a in team:
        a.close()
    return tally.row()


async def remember(servers, turns, agents=512):
    "So many turns through `embedded`: its memory, a hundred times on the way."
    pid, left, seen = servers.pid['embedded'], iter(range(turns)), []
    team = [Agent(servers.port['embedded'], False, 'memory') for _ in range(agents)]
    cpu, began = cpu_seconds(pid), time.perf_counter()

    async def work(a):
        for i in left:
            await a.step()
            if i % (turns // 100) == 0:
                seen.append((i, megabytes(pid)))
    await asyncio.gather(*map(work, team))
    for a in team:
        a.close()
    seconds = time.perf_counter() - began
    return dict(turns=turns, seconds=seconds, rate=turns / seconds, cpu_ms=1000 * (cpu_seconds(pid) - cpu) / turns,
                megabytes=sorted(seen))


# --- the report

def interval(rows, key):
    return dict(mid=statistics.median(r[key] for r in rows), low=min(r[key] for r in rows),
                high=max(r[key] for r in rows))


def summary(runs):
    "Of repetitions by system: medians with their smallest and largest, and the overhead against `direct`."
    out = {}
    for name, rows in runs.items():
        out[name] = {k: interval(rows, k) for k in ('rate', 'p50', 'p99', 'cpu_ms', 'megabytes')}
        for k in ('p50', 'p99'):
            if 'direct' in runs:
                out[name][f'over_{k}'] = interval([dict(x=r[k] - d[k]) for r, d in zip(rows, runs['direct'])], 'x')
    return out


def table(part, by):
    "One part as text."
    one = lambda x, digits: f'{x["mid"]:.{digits}f} [{x["low"]:.{digits}f}, {x["high"]:.{digits}f}]'
    head = (f'{part:10} {"requests/s":>22} {"p50 ms":>22} {"p99 ms":>24} {"p50 over direct":>20} {"CPU ms":>18} '
            f'{"MB":>6}')
    def line(name, r):
        over = one(r['over_p50'], 1) if 'over_p50' in r else ''
        return (f'{name:10} {one(r["rate"], 0):>22} {one(r["p50"], 1):>22} {one(r["p99"], 1):>24} {over:>20} '
                f'{one(r["cpu_ms"], 2):>18} {r["megabytes"]["high"]:6.0f}')
    return '\n'.join([head, *(line(name, r) for name, r in by.items())])


def flatness(m):
    "The highest memory of the second half over the highest of the second quarter; 1 is flat."
    seen, n = m['megabytes'], m['turns']
    top = lambda a, b: max(y for i, y in seen if a * n <= i < b * n)
    return top(.5, 1) / top(.25, .5)


def bars(ax, columns, title):
    "Groups of bars by system, one of each column; whiskers are intervals."
    systems = list(dict.fromkeys(n for by in columns.values() for n in by))
    for j, (label, by) in enumerate(columns.items()):
        at, xs = [i + .4 * (j - .5) for i, n in enumerate(systems) if n in by], [by[n] for n in systems if n in by]
        ax.bar(at, [x['mid'] for x in xs], .38,
               yerr=[[x['mid'] - x['low'] for x in xs], [x['high'] - x['mid'] for x in xs]], capsize=3, label=label)
    ax.set(xticks=range(len(systems)), xticklabels=systems, title=title)
    if columns:
        ax.legend(fontsize=8)


def draw(result):
    from kat.core.figures import save_figure, use_style
    plt, _ = use_style()
    fig, axes = plt.subplots(1, 2 + ('memory' in result), figsize=(8 + 4 * ('memory' in result), 3.6))
    bars(axes[0], {p: {n: r['rate'] for n, r in result[p].items() if n != 'direct'}
                   for p in ('saturation', 'streams') if p in result}, f'requests/s, {result["sessions"]} sessions')
    bars(axes[1], {q: {n: r[q] for n, r in result['arrivals'].items()} for q in ('p50', 'p99') if 'arrivals' in result},
         'latency at 200 requests/s (ms)')
    axes[1].set_yscale('log')
    if 'memory' in result:
        axes[2].plot(*zip(*result['memory']['megabytes']))
        axes[2].set(title='resident memory of the gateway (MB)', xlabel='turns', ylim=(0, None))
    fig.tight_layout()
    caption = (f'The gateway under load ({result["machine"]}); bars: medians of the repetitions, whiskers: smallest '
               'and largest; figures/load.json holds the numbers.')
    save_figure(fig, ROOT / 'figures/load.png', caption,
                '; '.join(dict.fromkeys(h['command'] for h in result['how'].values())))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', default='arrivals,saturation,streams,memory')
    parser.add_argument('--systems', default='direct,kat,embedded,litellm')
    parser.add_argument('--sessions', type=int, default=512, help='at a time, in all parts but arrivals')
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--seconds', type=float, default=30,
                        help='of measurement in a repetition, after half of it to warm up')
    parser.add_argument('--turns', type=int, default=100_000, help='of the memory part')
    parser.add_argument('--delay', type=float, default=.05,
                        help='seconds that the upstream takes; none in the memory part')
    parser.add_argument('--quick', action='store_true')
    args = parser.parse_args()
    parts, systems = args.parts.split(','), args.systems.split(',')
    if bad := [*set(parts) - {'arrivals', 'saturation', 'streams', 'memory'}, *set(systems) - {*SYSTEMS, 'vllm'}]:
        parser.error(f'{bad[0]}: no such part or system')
    if 'litellm' in systems and not PYTHON.exists():
        print('LiteLLM is left out: run make litellm')
        systems.remove('litellm')
    if args.quick:
        args.repeat, args.seconds, args.turns, args.sessions = 1, 4, 400, 16
    cores = sorted(os.sched_getaffinity(0))
    result = _kept(dict(machine=f'{_cpu()}, {len(cores)} cores, Python {platform.python_version()}',
                        sessions=args.sessions, delay=args.delay, litellm=_version() if PYTHON.exists() else None))
    how = dict(command='python ' + ' '.join(sys.argv), load=os.getloadavg()[0], repetitions=args.repeat,
               seconds=args.seconds)
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[1]})
    home = ROOT / 'data/runs'
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as tmp:
        for part in parts:
            result[part], result['how'][part] = run_part(part, args, systems, Path(tmp), cores), how
    if args.quick: return
    FILE.write_text(json.dumps(result, indent=1) + '\n')
    draw(result)


def _kept(now):
    "What is to be measured, with the parts of a run of the same kind."
    old = json.loads(FILE.read_text()) if FILE.exists() else {}
    return dict(old, **now) if 'how' in old and all(old[k] == v for k, v in now.items()) else dict(now, how={})


def run_part(part, args, systems, tmp, cores):
    "One part, its servers up for as long; its summary, which is also printed."
    names = ['direct', 'embedded'] if part == 'memory' else systems
    with ExitStack() as stack:
        servers = Servers(stack, tmp, names, 0 if part == 'memory' else args.delay, cores[:2])
        if part == 'memory':
            out = asyncio.run(remember(servers, args.turns, args.sessions))
            out['flatness'] = flatness(out)
            print(f'memory: {out["turns"]} turns in {out["seconds"]:.0f} s, {out["cpu_ms"]:.2f} ms of CPU each; '
                  f'{out["megabytes"][-1][1]:.0f} MB at the end, '
                  f'second half over second quarter: {out["flatness"]:.3f}', flush=True)
            return out
        work = dict(arrivals=lambda n: arrive(servers, n, args.seconds),
                    saturation=lambda n: saturate(servers, n, args.seconds, args.sessions),
                    streams=lambda n: saturate(servers, n, args.seconds, args.sessions, True))[part]
        runs = {n: [] for n in names}
        for _ in range(args.repeat):
            for n in names:
                runs[n].append(asyncio.run(work(n)))
    out = summary(runs)
    print(table(part, out), flush=True)
    for ours in ('kat', 'embedded'):
        if part != 'arrivals' and ours in out and 'litellm' in out:
            ratio = out[ours]['rate']['mid'] / out['litellm']['rate']['mid']
            print(f'{ours}: {ratio:.1f} times the requests/s of LiteLLM')
    return out


def _cpu():
    return next(
        (x.partition(': ')[2] for x in Path('/proc/cpuinfo').read_text().splitlines() if x.startswith('model name')),
        platform.machine())
def _version():
    return subprocess.run([PYTHON, '-c', 'from importlib.metadata import version; print(version("litellm"))'],
                          capture_output=True, text=True, check=True).stdout.strip()


if __name__ == '__main__':
    role, rest = sys.argv[1:2], sys.argv[2:]
    if role == ['serve-upstream']:
        asyncio.run(serve_upstream(int(rest[0]), float(rest[1])))
    elif role == ['serve-kat']:
        from kat.plane.gateway import run_server
        run_server(serve_kat(int(rest[0]), rest[1], rest[2], int(rest[3])))
    else:
        main()
