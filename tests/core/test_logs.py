"logs of every format: recognised by structure, read, refused with their place; exports that come back"
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kat.core.log_exports import EXPORTS, export_log, write_conversations
from kat.core.logs import detect, import_log

LOGS = Path(__file__).parents[2]/'data'/'trajectories'
ASK, DONE = dict(role='user', content='list'), dict(role='assistant', content='One file.')
CALL = dict(id='c', type='function', function=dict(name='sh', arguments=dict(cmd='ls')))
TALK = [ASK, dict(role='assistant', content='', tool_calls=[CALL]),
        dict(role='tool', tool_call_id='c', content='a.py'), DONE]


def text(kind, said):
    return [dict(type=kind, text=said)]


def codex(**payload):
    return dict(timestamp='t', type='response_item', payload=payload)


def use(block):
    return dict(type='assistant', session_id='s', message=dict(role='assistant', **block))


BLOCK = dict(type='tool_use', id='c', name='sh', input=dict(cmd='ls'))
RESULT = dict(type='tool_result', tool_use_id='c', content='a.py')
FORMATS = {
    'openai': [dict(messages=[ASK, dict(role='assistant', content=[BLOCK]),
                              dict(role='user', content=[RESULT]), DONE])],
    'mini-swe-agent': [dict(trajectory_format='mini-swe-agent-1.1', info={}, messages=[
        *TALK, dict(role='exit', content='')])],
    'trl': [dict(prompt=TALK[:1], completion=TALK[1:])],
    'sharegpt': [dict(conversations=[
        {'from': 'human', 'value': 'list'},
        {'from': 'function_call', 'value': '{"name": "sh", "arguments": {"cmd": "ls"}}'},
        {'from': 'observation', 'value': 'a.py'}, {'from': 'gpt', 'value': 'One file.'}])],
    'tau2': [dict(info={}, simulations=[dict(task_id='1', reward_info=dict(reward=1.0), messages=[
        ASK,
        dict(role='user', content=None, tool_calls=[dict(id='u', name='look', arguments={}, requestor='user')]),
        dict(role='tool', id='u', content='x', requestor='user'),
        dict(role='assistant', content=None, tool_calls=[dict(id='c', name='sh', arguments=dict(cmd='ls'))]),
        dict(role='tool', id='c', content='a.py', requestor='assistant'), DONE])])],
    'inspect': [dict(version=2, eval=dict(task='t'), samples=[dict(id=1, scores=dict(a=dict(value='C')), messages=[
        ASK, dict(role='assistant', content='', tool_calls=[dict(id='c', function='sh', arguments=dict(cmd='ls'))]),
        dict(role='tool', tool_call_id='c', function='sh', content='a.py'), DONE])])],
    'atif': [dict(schema_version='ATIF-v1.5', session_id='s', agent=dict(name='a'), steps=[
        dict(step_id=1, source='user', message='list'),
        dict(step_id=2, source='agent', message='', tool_calls=[
            dict(tool_call_id='c', function_name='sh', arguments=dict(cmd='ls'))],
            observation=dict(results=[dict(source_call_id='c', content='a.py')])),
        dict(step_id=3, source='agent', message='One file.')])],
    'codex': [dict(type='session_meta', payload=dict(id='s')), dict(type='event_msg', payload=dict(type='token_count')),
              codex(type='message', role='user', content=text('input_text', 'list')),
              codex(type='function_call', name='sh', arguments='{"cmd": "ls"}', call_id='c'),
              codex(type='function_call_output', call_id='c', output='a.py'),
              codex(type='message', role='assistant', content=text('output_text', 'One file.'))],
    'openhands': [dict(kind='MessageEvent', source='user', llm_message=dict(role='user', content=text('text', 'list'))),
                  dict(kind='ActionEvent', source='agent', thought=[], tool_name='sh', tool_call_id='c',
                       llm_response_id='r', tool_call=dict(id='c', name='sh', arguments='{"cmd": "ls"}')),
                  dict(kind='ObservationEvent', source='environment', tool_call_id='c',
                       observation=dict(content=text('text', 'a.py'))),
                  dict(kind='MessageEvent', source='agent',
                       llm_message=dict(role='assistant', content=text('text', 'One file.')))],
    'stream-json': [dict(type='system', subtype='init', session_id='s'), use(dict(id='m1', content=[BLOCK])),
                    dict(type='user', session_id='s', message=dict(role='user', content=[RESULT])),
                    use(dict(id='m2', content=text('text', 'One file.'))), dict(type='result', session_id='s')],
}


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def spoken(messages):
    "What was said, without ids."
    calls = lambda m: [call['function'] for call in m.get('tool_calls', ())]
    return [(m['role'], m['content'], calls(m)) for m in messages]


@pytest.mark.parametrize('kind', FORMATS)
def test_each_format_says_the_same(tmp_path, kind):
    file = write(tmp_path/'any.name', FORMATS[kind])
    assert detect(file) == kind
    (conv,) = import_log(file)
    assert spoken(conv.messages) == spoken(TALK[1:] if kind == 'stream-json' else TALK)
    assert len(conv.calls) == 2
    file.write_bytes(b'\xef\xbb\xbf\n' + file.read_bytes().replace(b'\n', b'\r\n\r\n'))  # a mark, blank lines
    again = next(import_log(file))
    assert (again.messages, again.calls, again.info) == (conv.messages, conv.calls, conv.info)


@pytest.mark.parametrize('kind', FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1))
def test_a_cut_file_is_read_or_refused_in_a_line(tmp_path, kind, cut):
    data = write(tmp_path/'whole', FORMATS[kind]).read_bytes()
    file = tmp_path/'cut'
    file.write_bytes(data[:int(len(data)*cut)])
    for bad in (None, []):
        try:
            assert all(conv.calls for conv in import_log(file, bad=bad))
        except ValueError as error:
            assert str(error).startswith(str(file)) and '\n' not in str(error)


KEYS = st.sampled_from(['type', 'text', 'name', 'function', 'arguments', 'id'])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6)
FIELDS = ['role', 'content', 'tool_calls', 'function_call', 'refusal', 'reasoning', 'tool_call_id', 'weight']
ROWS = st.lists(JSON | st.dictionaries(st.sampled_from(FIELDS), JSON | st.sampled_from(
    ['user', 'assistant', 'tool', 'developer']), max_size=5), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, tools=JSON)
def test_any_messages_are_read_or_refused_with_their_line(tmp_path, rows, tools):
    file = write(tmp_path/'x.jsonl', [dict(messages=TALK), dict(messages=rows, tools=tools), dict(messages=TALK)])
    bad = []
    found = list(import_log(file, bad=bad))
    assert len(found) + len(bad) == 3 and all(where == f'{file}:2' and '\n' not in why for where, why in bad)
    if bad:
        with pytest.raises(ValueError, match='x.jsonl:2: '):
            list(import_log(file))


def test_what_could_be_two_formats_is_asked_about(tmp_path):
    file = write(tmp_path/'x', [dict(messages=TALK, conversations=[])])
    with pytest.raises(ValueError, match='can be openai or sharegpt; say which with --format'):
        detect(file)
    assert len(list(import_log(file, 'openai'))) == 1


@pytest.mark.parametrize('form', EXPORTS)
@pytest.mark.parametrize('name', sorted(file.name for file in LOGS.glob('*.json')))
def test_exports_come_back(tmp_path, form, name):
    found = list(import_log(LOGS/name))
    _, lost = export_log(tmp_path/'x', found, form)
    back = [call for conv in import_log(tmp_path/'x') for call in conv.calls]
    drop = {'event'} | ({'name'} if form == 'atif' else set())
    clean = lambda call: [{k: v for k, v in m.items() if k not in drop} for m in call]
    assert [clean(call) for call in back] == [clean(call) for conv in found for call in conv.calls]
    assert set(lost) <= {'event of a message', 'name of a message'}
    write_conversations(tmp_path/'x.parquet', found)
    assert list(import_log(tmp_path/'x.parquet')) == found


def test_commands(tmp_path, cli):
    file = write(tmp_path/'x.jsonl', [dict(messages=TALK), dict(messages=[dict(role='bot')])])
    code, out, err = cli('logs', 'import', file, '--out', 'x.parquet')
    assert code == 2 and 'x.jsonl:2: messages[0]: role' in err and not (tmp_path/'x.parquet').exists()
    code, out, err = cli('logs', 'import', file, '--out', 'x.parquet', '--skip-bad')
    assert code == 0 and 'conversations 1' in out and 'bad records: 1' in out
    code, out, err = cli('logs', 'export', 'x.parquet', '--to', 'atif', '--out', 'x.json')
    assert code == 0 and 'records 1' in out and detect('x.json') == 'atif'
