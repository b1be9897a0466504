"Real agents, each a process of its own, against a gateway in this one"
import asyncio
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

from plane_world import say, tokenizer

from kat.core.formats import write_call
from kat.plane.gateway import Gateway, running
from kat.infer.scripted import ScriptEngine
from kat.plane.store import Store

HOME = Path(os.environ.get('KAT_CLIENTS', '.clients')).resolve()   # where `make clients` has put them
PLAIN = {k: os.environ[k] for k in ('PATH', 'LANG') if k in os.environ}


def call(name, **arguments):
    return write_call(name, arguments, 'hermes')


def script(tok, rules, other):
    """What the model says. `rules`: {word: answer}.

    Of the words, the one that stands last in what came since the model's last answer decides; without any, `other`."""
    def answer(request):
        *past, asked, _ = tok.decode(request.ids).split('<|im_start|>assistant\n')
        new = asked.partition('<|im_end|>')[2] if past else asked
        at, word = max((new.rfind(w), w) for w in rules)
        return say(tok, rules[word] if at >= 0 else other)
    return answer


class Lab:
    "A gateway at `address`, and what it recorded."
    def __init__(self, path, engine, tok, max_len):
        self.path, self.tok, self.engine = path, tok, engine
        self.store = Store(path/'store.db')
        self.g = Gateway(self.engine, self.tok, self.store, max_len)

    async def run(self, *command, cwd, seconds=300, codes=(0,), **env):
        "Output of a client's process, which must end with one of `codes`. Its home is a folder of the test's."
        home = self.path/'home'
        home.mkdir(exist_ok=True)
        env = PLAIN | dict(HOME=str(home), NO_PROXY='127.0.0.1', CI='1') | env
        p = await asyncio.create_subprocess_exec(*map(str, command), cwd=cwd, env=env, stdin=asyncio.subprocess.DEVNULL,
                                                 stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
                                                 start_new_session=True)
        try:
            out, _ = await asyncio.wait_for(p.communicate(), seconds)
        finally:
            if p.returncode is None:
                os.killpg(p.pid, signal.SIGKILL)
        out = out.decode(errors='replace')
        assert p.returncode in codes, out[-3000:]
        return out

    def sessions(self):
        "All sessions, as they are on the disk."
        return [self.store.load(self.tok, r['owner'], r['name']) for r in self.store.sessions()]


@asynccontextmanager
async def lab(path, rules, other='There is nothing more to do.'):
    "A gateway whose model follows a script (`script`) in a context without end."
    tok = tokenizer('hermes')
    async with real_lab(path, ScriptEngine(script(tok, rules, other), tok, keep=True), tok, 10**6) as l:
        yield l


@asynccontextmanager
async def real_lab(path, engine, tok, max_len):
    "A gateway with an engine of its own."
    l = Lab(path, engine, tok, max_len)
    try:
        async with running(l.g) as l.address:
            yield l
    finally:
        await l.g.close()
        l.store.close()
