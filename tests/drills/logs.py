"""Logs that the tools themselves write, with scripted models, read by kat: python tests/drills/logs.py

Makes an environment in a temporary folder with mini-swe-agent and inspect-ai (some 500 MB), lets each run a task with a
tool call, and checks what is read."""
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from kat.core.logs import detect, import_log

PACKAGES = 'mini-swe-agent==2.4.6', 'inspect-ai==0.3.285', 'openai'
MINI = '''
from pathlib import Path
from minisweagent.agents.default import DefaultAgent
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.test_models import (DeterministicModel, DeterministicToolcallModel, make_output,
                                             make_toolcall_output)
last = 'echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && echo ok'
told = dict(system_template='You help.', instance_template='Task: {{task}}')
bash = lambda text: dict(name='bash', arguments='{"command": "%s"}' % text)
call = lambda name, text: [dict(id=name, type='function', function=bash(text))]
does = lambda name, text: [dict(command=text, tool_call_id=name)]
plain = [make_output('I look', [dict(command='echo hi')]), make_output('done', [dict(command=last)])]
tools = [make_toolcall_output('I look', call('c1', 'echo hi'), does('c1', 'echo hi')),
         make_toolcall_output(None, call('c2', last), does('c2', last))]
for name, model in (('text', DeterministicModel(outputs=plain)), ('tools', DeterministicToolcallModel(outputs=tools))):
    DefaultAgent(model, LocalEnvironment(), **told, output_path=Path(f'mini_{name}.traj.json')).run('x')
'''
INSPECT = '''
import inspect_ai.model._providers.mockllm as provider
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ModelOutput, get_model
from inspect_ai.model._model import ModelAPI
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

async def one(self, *args, **kw): return 1  # counting tokens would fetch a tokenizer
for name in ('count_tokens', 'count_text_tokens', 'count_tool_tokens', 'count_media_tokens'):
    for owner in (ModelAPI, provider.MockLLM):
        if hasattr(owner, name): setattr(owner, name, one)

@tool
def add():
    async def execute(x: int, y: int):
        """Add.

        Args:
            x: one
            y: other
        """
        return x + y
    return execute

for form in ('eval', 'json'):
    said = [ModelOutput.for_tool_call('mockllm/model', 'add', dict(x=1, y=2)),
            ModelOutput.from_content('mockllm/model', 'It is 3')]
    task = Task(dataset=[Sample(input='1+2?', target='3')], solver=[use_tools(add()), generate()], scorer=includes())
    model = get_model('mockllm/model', custom_outputs=said)
    eval(task, model=model, log_format=form, log_dir='inspect', display='none')
'''


def main():
    "Install, run, read; fails where a log isn't read as what was said."
    with tempfile.TemporaryDirectory() as folder:
        venv.create(Path(folder)/'venv', with_pip=True)
        python = Path(folder)/'venv'/'bin'/'python'
        subprocess.run([python, '-m', 'pip', 'install', '-q', *PACKAGES], check=True, timeout=900)
        clean = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        env = clean | dict(MSWEA_SILENT_STARTUP='1', MSWEA_GLOBAL_CONFIG_DIR=folder)
        for code in (MINI, INSPECT):
            subprocess.run([python, '-c', code], cwd=folder, env=env, check=True, timeout=300)
        files = sorted([*Path(folder).glob('*.traj.json'), *(Path(folder)/'inspect').iterdir()])
        for file in files:
            (conv,) = import_log(file)
            print(detect(file), file.suffix, conv, conv.info.get('skipped') or '')
            assert len(conv.calls) == 2 and conv.append_only
        if len(files) != 4:
            sys.exit(f'4 logs expected, found {len(files)}')


if __name__ == '__main__':
    main()
