"Models that know the answer, tasks in folders, and an agent of a few lines, for the tests of `kat evaluate`"
import sys
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path

from plane_world import say, tokenizer
from rich.console import Console
from testgen_world import small_site

from kat.core.formats import write_call
from kat.tasks.software import SoftwareTask, tree_patch, write_task
from kat.infer.scripted import ScriptEngine
from kat.recipe.benchmark import Evaluation, ModelSource, PlaySettings, run_evaluation

HELPERS = Path(__file__).parent
AGENT = f'{sys.executable} {HELPERS / "benchmark_agent.py"}'


def call(name, **arguments):
    return write_call(name, arguments, 'hermes')


def knows(tasks):
    "Answers for micro tasks: all right edits in one turn, then submit; a text for what is not in `tasks`."
    def answer(text):
        for task in tasks:
            if task.data['issue'] in text and task.data['edits']:
                edits = [call('edit', path=path, line=line, text=new) for path, line, new in task.data['edits']]
                return '\n'.join([*edits, call('submit')])
        return 'I do not know.'
    return answer


def engine(answer, **more):
    "A model that says `answer(whole prompt as text)`."
    tok = tokenizer('hermes')
    return ScriptEngine(lambda request: say(tok, answer(tok.decode(request.ids))), tok, keep=True, **more)


def model_folder(path):
    "Something with a checksum; nobody opens it."
    path.mkdir(parents=True, exist_ok=True)
    (path / 'config.json').write_text('{}')
    return path


def source(path, made, context=10**5):
    "A `ModelSource` on an engine that is there."
    @asynccontextmanager
    async def opened():
        yield made, made.tokenizer, context
    return ModelSource(str(model_folder(path / 'model')), opened)


def evaluate(path, made, tasks='micro:4', agent='builtin', context=10**5, **more):
    "Run it; (run folder, what was printed)."
    names = ('max_turns', 'tokens', 'seconds', 'temperature', 'max_tokens')
    usual = dict(max_tokens=4000) if agent == 'builtin' else {}   # a small tokenizer needs many
    settings = PlaySettings(agent, **usual | {name: more.pop(name) for name in names if name in more})
    told = Console(file=StringIO(), width=200)
    asked = Evaluation(source(path, made, context), tasks, path / 'run', settings, **dict(dict(at_once=2), **more))
    run_evaluation(asked, told)
    return path / 'run', told.file.getvalue()


CALC = 'def add(a, b):\n    return a - b\n\n\ndef sub(a, b):\n    return a - b\n'
TESTS = ('from calc import add, sub\n\n\ndef test_add():\n    assert add(2, 3) == 5\n\n\n'
         'def test_sub():\n    assert sub(3, 2) == 1\n')


def software_task(folder, name='demo__calc-1', gold='return a + b', base=CALC):
    "A repository of one file, in a folder of tasks; its packages are few, so that its tests start faster."
    folder.mkdir(exist_ok=True)
    if not (folder / 'sites').exists():
        (folder / 'sites').symlink_to(small_site())
    tree = lambda text: {'calc.py': (text.encode(), 'file')}
    fixed = CALC.replace('return a - b', gold, 1)
    task = SoftwareTask(name, 'demo/calc', 'add() must add; it subtracts.', ('test_calc.py::test_add',),
                        ('test_calc.py::test_sub',), site='small')
    tests = {'test_calc.py': (TESTS.encode(), 'file')}
    return write_task(task, folder, tree(base), tests, tree_patch(tree(base), tree(fixed)))
