"""Claude Code and mini-swe-agent through `kat evaluate`, with a scripted model: `make clients` installs and runs them

Each is its maker's program, in the sandbox, with the gateway as its only way out. With KAT_RELEASE=TASK, the folder of
a release task, both mend that too (`make clients RELEASE=TASK`)."""
import base64
import json
import os
import shutil
from pathlib import Path

import pytest
from benchmark_world import call, engine, evaluate, software_task
from clients_world import HOME

from kat.recipe.scores import load_run

pytestmark = pytest.mark.skipif('KAT_CLIENTS' not in os.environ, reason='real agents: run them with `make clients`')
FIX = "sed -i '0,/a - b/s//a + b/' calc.py"


def on_path(monkeypatch, program):
    if not (HOME / program).exists():
        pytest.skip(f'{program} is not in {HOME}: it could not be installed')
    monkeypatch.setenv('PATH', f'{(HOME / program).parent}:{os.environ["PATH"]}')


def script(*steps, about='add() must add'):
    "Says the steps one after the other; a request that isn't about the task gets a word."
    def answer(text):
        if about not in text: return 'calc'
        n = text.count('<|im_start|>assistant') - 1
        return steps[min(n, len(steps) - 1)]
    return answer


def mended(path, agent, *steps):
    software_task(path / 'tasks')
    made = engine(script(*steps))
    run, said = evaluate(path, made, str(path / 'tasks'), agent, context=10**6, seconds=300., max_turns=30)
    (one,) = load_run(run)[1]
    assert one['category'] == 'resolved', (one, said)
    assert one['turns'] >= len(steps) and one['read'] > 0 and one['session']
    assert json.loads((run / 'predictions.jsonl').read_text())['model_patch'].count('+    return a + b') == 1
    return one


def test_claude_code(tmp_path, monkeypatch):
    on_path(monkeypatch, 'npm/node_modules/.bin/claude')
    bash = lambda line: call('Bash', command=line, description='work')
    one = mended(tmp_path, 'claude-code', 'I look.\n' + bash('ls && cat calc.py'),
                 call('Read', file_path='/workspace/calc.py'), bash(FIX), 'It adds now.')
    assert one['calls'] == 3 and one['finish'] == 'submit'


def test_mini_swe_agent(tmp_path, monkeypatch):
    on_path(monkeypatch, 'mini/bin/mini')
    bash = lambda line: call('bash', command=line)
    one = mended(tmp_path, 'mini-swe-agent', 'I look.\n' + bash('ls && cat calc.py'), bash(FIX),
                 bash('echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT'))
    assert one['calls'] == 3 and one['findings'] == []


@pytest.mark.skipif('KAT_RELEASE' not in os.environ, reason='KAT_RELEASE names the folder of a release task')
@pytest.mark.parametrize('agent, program, tool, more, end', [
    ('claude-code', 'npm/node_modules/.bin/claude', 'Bash', dict(description='work'), 'It is mended.'),
    ('mini-swe-agent', 'mini/bin/mini', 'bash', {},
     call('bash', command='echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT'))])
def test_a_release_task(tmp_path, monkeypatch, agent, program, tool, more, end):
    on_path(monkeypatch, program)
    folder = Path(os.environ['KAT_RELEASE'])
    task = json.loads((folder / 'task.json').read_text())
    shutil.copytree(folder, tmp_path / 'tasks' / folder.name)
    (tmp_path / 'tasks/sites').symlink_to((folder.parent / 'sites').resolve())
    fix = base64.b64encode((folder / 'gold.patch').read_bytes()).decode()
    lines = 'ls', f'echo {fix} | base64 -d | git apply', 'git diff --stat'
    steps = [call(tool, command=line, **more) for line in lines]
    about = max(task['statement'].split(), key=len)
    made = engine(script(*steps, end, about=about))
    run, said = evaluate(tmp_path, made, str(tmp_path / 'tasks'), agent, context=10**6, seconds=600., max_turns=30)
    (one,) = load_run(run)[1]
    assert one['category'] == 'resolved', (one, said)
    assert one['turns'] >= 4 and one['session']
