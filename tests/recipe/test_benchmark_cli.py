"kat evaluate, kat compare and kat cheats on the command line: one line for a mistake, and what goes together"
import json

import pytest
from benchmark_world import engine, evaluate, knows

from kat.envs.base import find_world



@pytest.mark.parametrize('args, parts', [
    ('evaluate', ['--tasks']), ('evaluate --tasks micro', ['micro:200']),
    ('evaluate --tasks micros:2', ["'micros'", 'micro']),
    ('evaluate --tasks micro:2 --model nowhere', ['nowhere', 'config.json']),
    ('evaluate --tasks micro:2 --model http://127.0.0.1:9', ['nobody answers']),
    ('evaluate --tasks micro:2 --model ftp://x', ['--model ftp://x']),
    ('evaluate --tasks micro:2 --runs 0', ['--runs']), ('evaluate --tasks micro:2 --seconds 0', ['--seconds']),
    ('evaluate --tasks micro:2 --seconds nan', ['--seconds nan']),
    ('evaluate --tasks micro:2 --price 1', ['--price 1', '0.5,1.5']),
    ('evaluate --tasks micro:2 --price 1,-1', ['--price']),
    ('evaluate --tasks micro:2 --price nan,1', ['--price']),
    ('evaluate --tasks micro:2 --api-key-file x', ['--api-key-file']),
    ('evaluate --tasks micro:2 --model http://127.0.0.1:9 --api-key-file none', ['--api-key-file none']),
    ('evaluate --tasks micro:2 --agent claude-code --temperature 0', ['--temperature', 'claude-code']),
    ('evaluate --tasks micro:2 --agent no-such-program', ['no-such-program', 'claude-code', 'mini-swe-agent']),
    ('evaluate --tasks micro:2 --show .', ['--show']),
    ('evaluate --tasks micro:2 --vllm-url http://x', ['--engine vllm']),
    ('evaluate --tasks micro:2 --model http://127.0.0.1:9 --engine vllm', ['an endpoint computes by itself']),
    ('evaluate --tasks micro:2 --model http://127.0.0.1:9 --agent mini-swe-agent', ['--model FOLDER']),
    ('evaluate --tasks micro:2 --stages here --model there', ['--stages', 'leave out --model']),
    ('evaluate --tasks micro:2 --stages here', ['not a run of kat']), ('compare a b', ['a is no evaluation']),
    ('cheats none.json', ['no file none.json'])])
def test_mistakes_are_one_line_and_code_2(cli, args, parts):
    code, out, err = cli(*args.split())
    assert code == 2 and err.startswith('kat: ') and err.count('\n') == 1, (code, err)
    assert all(part in err for part in parts), err


def test_help(cli):
    for command, parts in dict(evaluate=('--check', '--stages', 'claude-code'), compare=('RUN_A', 'RUN_B'),
                               cheats=('--package',)).items():
        code, out, err = cli(command, '--help')
        assert code == 0 and all(part in out for part in parts), out


def test_compare_and_cheats(cli, tmp_path):
    tasks = find_world('micro').heldout(2)
    runs = [str(evaluate(tmp_path / name, engine(knows(known)), 'micro:2', name=name)[0])
            for name, known in dict(one=tasks[:1], two=tasks).items()]
    code, out, err = cli('compare', *runs)
    assert code == 0 and f'only two, or more often (1): {tasks[1].id}' in out and 'p = 1' in out
    said = dict(role='assistant', content='', tool_calls=[dict(id='1', type='function', function=dict(
        name='bash', arguments=json.dumps(dict(command='git log --all'))))])
    (tmp_path / 'log.json').write_text(json.dumps(dict(task_id='t', messages=[dict(role='user', content='x'), said])))
    code, out, err = cli('cheats', 'log.json')
    assert code == 0 and out == 't: turn 0, call 0: history: git log --all\nlog.json: episodes 1, worth a look 1\n'
    (tmp_path / 'log.json').write_text('[]')
    assert cli('cheats', 'log.json')[0] == 2
