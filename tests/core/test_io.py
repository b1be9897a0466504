"Files: the same records back to the bit from both formats, whole or not at all, and damage that is named."

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from core_strategies import few, groups, trajectories
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.core.io import (MissingExtra, append_jsonl, atomic, dumps, loads, need, read_jsonl, read_log, read_parquet,
                         read_records, write_jsonl, write_parquet, write_records)
from kat.core.logs import detect, import_log
from kat.core.types import Group, Segment, Trajectory

LOGS = Path(__file__).parents[2] / 'data' / 'trajectories'
FORMATS = ['jsonl', 'parquet']
NAN = float('nan')


def example(task='t', **kw):
    "A trajectory with everything in it."
    gen = Segment(
        [5, 6],
        'assistant',
        0,
        True,
        np.float32([-0.1, -1e-30]),
        np.float32([0.1, 3]),
        [0, 7],
        extra={'judge': ['a', 1.5]},
    )
    seen = Segment([7], 'tool_result', 0, logprobs=[NAN], event='error')
    return Trajectory(
        task, [Segment([1], 'user'), gen, seen], 0.25, {'temperature': 0.7}, {'n': None}, {'by': {'ann': 1}}, **kw
    )


def same_bits(a, b):
    "Equal, and the float arrays bit for bit."
    assert a == b
    for s, t in zip(a.segments, b.segments):
        for x, y in ((s.logprobs, t.logprobs), (s.entropy, t.entropy)):
            if x is not None:
                assert np.array_equal(x[~np.isnan(x)].view(np.uint32), y[~np.isnan(y)].view(np.uint32))


# --- round trips


@settings(few, max_examples=15)
@given(st.lists(trajectories(), max_size=3))
def test_trajectories_come_back_from_both_formats(tmp_path_factory, ts):
    d = tmp_path_factory.mktemp('rt')
    for f in FORMATS:
        assert write_records(d / f'a.{f}', ts) == len(ts)
        for a, b in zip(ts, read_records(d / f'a.{f}'), strict=True):
            same_bits(a, b)


@settings(few, max_examples=12)
@given(st.lists(groups(), max_size=2))
def test_groups_come_back_from_both_formats(tmp_path_factory, gs):
    d = tmp_path_factory.mktemp('rt')
    for f in FORMATS:
        write_records(d / f'g.{f}', gs)
        assert list(read_records(d / f'g.{f}')) == gs


def test_from_one_format_to_the_other_and_back(tmp_path):
    write_jsonl(tmp_path / 'a.jsonl', [example()])
    write_parquet(tmp_path / 'b.parquet', read_jsonl(tmp_path / 'a.jsonl'))
    write_jsonl(tmp_path / 'c.jsonl', read_parquet(tmp_path / 'b.parquet'))
    assert (tmp_path / 'c.jsonl').read_bytes() == (tmp_path / 'a.jsonl').read_bytes()


def test_every_float32_survives_both_formats(tmp_path):
    bits = np.random.default_rng(1).integers(0, 2**31, 20_000, dtype=np.uint32).view(np.float32)
    a = -np.concatenate([bits[np.isfinite(bits) & (bits < 1e30)], np.float32([0, 1e-45, 1.1754944e-38])])
    t = Trajectory('t', [Segment(np.zeros(len(a), np.int32), 'assistant', 0, True, a)])
    for f in FORMATS:
        write_records(tmp_path / f'a.{f}', [t])
        same_bits(t, next(read_records(tmp_path / f'a.{f}')))


def test_parquet_columns_and_fields_of_others_are_kept(tmp_path):
    write_parquet(tmp_path / 'a.parquet', [example()])
    t = pq.read_table(tmp_path / 'a.parquet')
    t = t.append_column('score', pa.array([[1, 2]])).append_column('who', pa.array(['x']))
    pq.write_table(t, tmp_path / 'b.parquet')
    got = next(read_parquet(tmp_path / 'b.parquet'))
    assert got.extra == {'by': {'ann': 1}, 'score': [1, 2], 'who': 'x'} and got.segments == example().segments
    write_parquet(tmp_path / 'c.parquet', [got])
    assert next(read_parquet(tmp_path / 'c.parquet')) == got


def test_parquet_keeps_arrays_of_its_own_and_row_groups_in_order(tmp_path):
    ts = [Trajectory(f't{i}', [Segment([i] * (i % 3), 'user')]) for i in range(10)]
    write_parquet(tmp_path / 'a.parquet', ts, batch=4)
    assert pq.ParquetFile(tmp_path / 'a.parquet').num_row_groups == 3
    got = list(read_parquet(tmp_path / 'a.parquet', batch=3))
    assert got == ts
    got[1].segments[0].ids[:] = 9  # writable, and nobody else's memory
    assert got[2].ids.tolist() == [2, 2]


def test_readers_are_lazy(tmp_path):
    for f in FORMATS:
        write_records(tmp_path / f'a.{f}', (example(str(i)) for i in range(300)))
        assert [t.task for t in itertools.islice(read_records(tmp_path / f'a.{f}'), 2)] == ['0', '1']
    write_parquet(tmp_path / 'none.parquet', [])
    assert list(read_parquet(tmp_path / 'none.parquet')) == []


def test_text_that_is_not_unicode_comes_back(tmp_path):
    t = Trajectory('t', [], info={'out': 'a\udc80b'})  # bytes of a terminal, decoded with surrogateescape
    for f in FORMATS:
        write_records(tmp_path / f'a.{f}', [t])
        assert list(read_records(tmp_path / f'a.{f}')) == [t]


# --- damage

GOOD = dumps(example().to_dict())


@pytest.mark.parametrize(
    'line, says',
    [
        (GOOD[:-20], 'not JSON at column'),
        ('', 'empty line'),
        ('[1]', 'an object expected, got list'),
        (GOOD.replace('0.25', 'NaN'), 'NaN is not JSON'),
        (GOOD.replace('trajectory/2', 'trajectory/3'), 'upgrade kat'),
        (GOOD.replace('"user"', '"usr"'), r"segments\[0\]: segment kind: 'usr'"),
        (GOOD.replace('-0.1', 'null'), r'segments\[1\]: segment logprobs: nan at index 0 is missing'),
        (GOOD.replace('"ids": [5, 6]', '"ids": [5]'), r'segments\[1\]: segment logprobs: 1 values expected'),
        (GOOD.replace('"reward": 0.25', '"reward": "1"'), 'trajectory reward'),
    ],
)
def test_a_damaged_line_gives_file_line_and_reason(tmp_path, line, says):
    p = tmp_path / 'a.jsonl'
    p.write_text(f'{GOOD}\n{line}\n{GOOD}\n')
    it = read_jsonl(p)
    assert next(it) == example()  # what comes before it is read
    with pytest.raises(ValueError, match=rf'a\.jsonl:2: .*{says}'):
        next(it)


def test_bytes_that_are_not_text_and_a_cut_off_end_are_named(tmp_path):
    p = tmp_path / 'a.jsonl'
    p.write_bytes(GOOD.encode() + b'\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r'a\.jsonl:2: not UTF-8 at byte 7'):
        list(read_jsonl(p))
    p.write_text(GOOD + '\n' + GOOD[:50])
    with pytest.raises(ValueError, match=r'a\.jsonl:2: .*cut off\?'):
        list(read_jsonl(p))


def test_damaged_parquet_names_the_file(tmp_path):
    p = tmp_path / 'a.parquet'
    write_parquet(p, [example()])
    whole = p.read_bytes()
    for n in (0, 3, 20, len(whole) // 2, len(whole) - 1):
        p.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r'a\.parquet: '):
            list(read_parquet(p))
    with pytest.raises(FileNotFoundError):
        list(read_parquet(tmp_path / 'none.parquet'))


def test_a_wrong_row_of_parquet_names_the_row(tmp_path):
    write_parquet(tmp_path / 'a.parquet', [example(), example()])
    t = pq.read_table(tmp_path / 'a.parquet').to_pydict()
    for col, bad, says in (
        ('schema', 'kat.trajectory/3', 'upgrade kat'),
        ('info', '{', 'Expecting'),
        ('task', None, "field 'task'"),
    ):
        rows = {k: [v[0], bad if k == col else v[1]] for k, v in t.items()}
        pq.write_table(pa.table(rows), tmp_path / 'b.parquet')
        with pytest.raises(ValueError, match=rf'b\.parquet: row 1: .*{says}'):
            list(read_parquet(tmp_path / 'b.parquet'))


@pytest.mark.parametrize('form', FORMATS)
def test_sessions_and_owners_are_stored_and_files_without_them_are_read(tmp_path, form):
    one = [Trajectory('t', [], 1.0, session=s, owner='ann', info=dict(session=s)) for s in ('a', 'a', 'b')]
    write_records(tmp_path / f'a.{form}', [Group('t', one)])
    got = next(read_records(tmp_path / f'a.{form}'))
    assert got == Group('t', one) and got.sessions.tolist() == [0, 0, 1]


def test_a_parquet_file_of_version_1(tmp_path):
    "As it was written then: no such columns."
    ts = [Trajectory('t', [], 1.0, info=dict(session=s)) for s in ('a', 'a', 'b')]
    write_parquet(tmp_path / 'a.parquet', ts)
    t = pq.read_table(tmp_path / 'a.parquet').drop_columns(['session', 'owner'])
    t = t.set_column(t.schema.get_field_index('schema'), 'schema', pa.array(['kat.trajectory/1'] * 3))
    pq.write_table(t, tmp_path / 'b.parquet')
    assert [x.session for x in read_parquet(tmp_path / 'b.parquet')] == ['a', 'a', 'b']


def test_wrong_use_is_refused(tmp_path):
    with pytest.raises(TypeError, match='record 1: a Group in a Parquet file of Trajectory'):
        write_parquet(tmp_path / 'a.parquet', [example(), Group('t', [])])
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r'\.jsonl or \.parquet'):
        write_records(tmp_path / 'a.csv', [])


# --- all or nothing


@pytest.mark.parametrize('f', FORMATS)
def test_a_failing_writer_leaves_the_old_file(tmp_path, f):
    p = tmp_path / f'a.{f}'
    write_records(p, [example('old')])

    def broken():
        yield from (example(str(i)) for i in range(600))
        raise RuntimeError('stop')

    with pytest.raises(RuntimeError):
        write_records(p, broken())
    assert [t.task for t in read_records(p)] == ['old'] and os.listdir(tmp_path) == [p.name]


def child(code, *args):
    "Run code in a fresh process that has `write_records` and `example` at hand."
    head = 'import sys, os, signal, resource\nfrom kat.core.io import *\nfrom kat.core.types import *\n'
    return subprocess.run(
        [sys.executable, '-c', head + code, *map(str, args)], capture_output=True, text=True, timeout=120
    )


def test_killed_or_out_of_space_while_writing_leaves_the_old_file(tmp_path):
    p = tmp_path / 'a.jsonl'
    write_jsonl(p, [example('old')])
    r = child(
        '''def rows():
    for i in range(50): yield Trajectory(str(i), [Segment(range(999), 'user')])
    os.kill(os.getpid(), signal.SIGKILL)
write_jsonl(sys.argv[1], rows())''',
        p,
    )
    assert r.returncode == -signal.SIGKILL and list(read_jsonl(p)) == [example('old')]
    r = child(
        '''resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try: write_jsonl(sys.argv[1], (Trajectory(str(i), [Segment(range(999), 'user')]) for i in range(50)))
except OSError as e: print('OSError', e)''',
        p,
    )
    assert 'OSError' in r.stdout and list(read_jsonl(p)) == [example('old')]
    assert [f for f in os.listdir(tmp_path) if not f.startswith('.')] == [
        'a.jsonl'
    ]  # the killed one leaves a dotted name


def test_atomic_makes_the_folder_and_replaces(tmp_path):
    for text in ('one', 'two'):
        with atomic(tmp_path / 'x' / 'y.txt') as t:
            t.write_text(text)
    assert (tmp_path / 'x' / 'y.txt').read_text() == 'two' and os.listdir(tmp_path / 'x') == ['y.txt']


# --- the log


def test_a_log_keeps_every_number(tmp_path):
    rows = [
        {'loss': NAN, 'g': np.float32(0.1), 'n': np.int64(3)},
        {'a': [float('inf'), -float('inf'), {'b': NAN}], 't': 'é'},
    ]
    for r in rows:
        append_jsonl(tmp_path / 'sub' / 'm.jsonl', r)
    got = read_log(tmp_path / 'sub' / 'm.jsonl')
    assert np.isnan(got[0]['loss']) and got[0]['g'] == float(np.float32(0.1)) and got[0]['n'] == 3
    assert got[1]['a'][:2] == [float('inf'), -float('inf')] and np.isnan(got[1]['a'][2]['b'])
    for s in (tmp_path / 'sub' / 'm.jsonl').read_text().splitlines():
        json.loads(s, parse_constant=lambda c: pytest.fail(c))
    assert read_log(tmp_path / 'none.jsonl') == []
    for bad in ({'x': {1}}, {'$float': 'nan'}, {'a': {2: 3}}):
        with pytest.raises(ValueError):
            append_jsonl(tmp_path / 'sub' / 'm.jsonl', bad)
    assert len(read_log(tmp_path / 'sub' / 'm.jsonl')) == 2


def test_a_last_line_torn_anywhere_is_cut_off_and_the_log_goes_on(tmp_path):
    p = tmp_path / 'm.jsonl'
    for i in range(3):
        append_jsonl(p, {'step': i, 'é': 'ü'})
    whole = p.read_bytes()
    last = whole.rindex(b'\n', 0, -1) + 1
    for cut in range(last + 1, len(whole)):
        for tail in (b'', b'\x00\x00'):  # a crash may leave zeros behind
            p.write_bytes(whole[:cut] + tail)
            with pytest.raises(ValueError, match='torn last line'):
                append_jsonl(p, {'step': 9})
            with pytest.warns(UserWarning, match='left out'):
                assert [r['step'] for r in read_log(p)] == [0, 1]
            assert p.read_bytes() == whole[:cut] + tail  # reading changes nothing
            with pytest.warns(UserWarning, match='cut off'):
                assert [r['step'] for r in read_log(p, repair=True)] == [0, 1]
            append_jsonl(p, {'step': 2, 'é': 'ü'})
            assert p.read_bytes() == whole


def test_other_damage_in_a_log_is_an_error_and_repairs_nothing(tmp_path):
    p = tmp_path / 'm.jsonl'
    p.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    for repair in (False, True):
        with pytest.raises(ValueError, match=r'm\.jsonl:2: not JSON'):
            read_log(p, repair=repair)
    assert p.read_text() == '{"a": 1}\n{"a": \n{"a": 3}\n'


@few
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
        max_leaves=8,
    )
)
def test_json_with_non_finite_numbers_comes_back(x):
    if '$float' not in repr(x):
        assert repr(loads(dumps(x))) == repr(x)


# --- extras


def test_a_missing_extra_is_one_line_with_the_command(tmp_path, monkeypatch):
    assert need('json', extra='train') is json
    with pytest.raises(MissingExtra, match=r"^no_such is not installed: pip install -e '.*\[train\]'$"):
        need('no_such.sub', 'train')
    (tmp_path / 'halfway.py').write_text('import no_such_dependency')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match='no_such_dependency') as e:
        need('halfway', 'train')
    assert not isinstance(e.value, MissingExtra)


# --- logs of other agents


def test_swe_agent_log_with_rewritten_history():
    f = LOGS / 'swe_agent_marshmallow_1867.json'
    assert detect(f) == 'swe-agent'
    (c,) = import_log(f)
    raw = json.loads(f.read_text())
    assert (c.task, len(c.calls), c.append_only, c.reward) == ('marshmallow-code__marshmallow-1867', 13, False, None)
    for i, (call, step) in enumerate(zip(c.calls, raw['trajectory'])):  # the answer is the step's own
        assert len(call) == 3 + 2 * i and call[-1]['content'] == step['thought']
        assert [m['role'] for m in call] == ['system', 'user', 'assistant'] + ['tool', 'assistant'] * i
    assert all(b[: len(a)] == a for a, b in zip(c.calls[:6], c.calls[1:6]))
    elided = [sum(m['content'].startswith('Old environment output') for m in call) for call in c.calls]
    assert elided == [0] * 6 + list(range(1, 8))
    assert not any(m['content'].startswith('Old environment') for m in c.messages)
    assert c.calls[0][-1]['tool_calls'][0]['function'] == {'name': 'bash', 'arguments': {'command': 'ls -F'}}
    assert (
        c.messages[3]['tool_call_id'] == c.messages[2]['tool_calls'][0]['id'] and c.info['exit_status'] == 'submitted'
    )


def test_swe_smith_log_is_append_only():
    (c,) = import_log(LOGS / 'swe_smith_pandas_53652.json')
    assert (c.task, len(c.calls), c.append_only) == ('pandas-dev__pandas.95280573.pr_53652', 8, True)
    assert c.calls[-1] == c.messages[:-1]


def test_newer_swe_agent_steps_carry_their_query_and_demonstrations_are_no_answers(tmp_path):
    use = [dict(id='c', function=dict(name='bash', arguments='{"command": "ls"}'))]
    h = [
        dict(role='system', content='s'),
        dict(role='assistant', content='demo', is_demo=True),
        dict(role='user', content='u'),
        dict(role='assistant', content='a0', tool_calls=use),
        dict(role='tool', content='o0', tool_call_ids=['c']),
        dict(role='assistant', content='a1', tool_calls=use),
    ]
    rejected = dict(query=[*h[:5], dict(role='user', content='format!')], response='a1?')
    steps = [dict(query=h[:3], response='a0'), rejected, dict(query=h[:5], response='a1'), dict(query=[], response='')]
    p = tmp_path / 'x.traj'
    p.write_text(json.dumps(dict(trajectory=steps, history=h, environment='e'), indent=1))
    (c,) = import_log(p)
    say = lambda cs: [[m['content'] for m in call] for call in cs]
    first, last = ['s', 'demo', 'u', 'a0'], ['s', 'demo', 'u', 'a0', 'o0', 'a1']
    assert c.task == 'e' and say(c.calls) == [first, [*last[:5], 'format!', 'a1?'], last]
    assert [len(call[-1].get('tool_calls', ())) for call in c.calls] == [1, 0, 1]
    p.write_text(json.dumps(dict(trajectory=[{}, {}], history=h, environment='e')))  # no queries: the history is all
    assert say(next(import_log(p)).calls) == [first, last]


def test_tau_bench_log():
    f = LOGS / 'tau_bench_gpt4o_airline.json'
    cs = list(import_log(f))
    assert detect(f) == 'tau-bench' and [c.reward for c in cs] == [0, 1, 1, 1, 1, 1]
    assert [c.task for c in cs].count('tau-bench/1') == 2 and [c.info['trial'] for c in cs] == [0, 0, 0, 0, 0, 1]
    for c in cs:
        assert c.append_only and len(c.calls) == sum(m['role'] == 'assistant' for m in c.messages)
        ids = [t['id'] for m in c.messages for t in m.get('tool_calls', ())]
        assert ids == [m['tool_call_id'] for m in c.messages if m['role'] == 'tool']


def test_openai_messages(tmp_path):
    ms = [
        dict(role='user', content='q'),
        dict(role='assistant', content='no', weight=0),
        dict(role='user', content='q2'),
        dict(role='assistant', content='yes'),
    ]
    p = tmp_path / 'o.jsonl'
    p.write_text(
        ''.join(
            dumps(d) + '\n' for d in (dict(messages=ms, tools=[{}], id=7, reward=1, split='a'), dict(messages=ms[2:]))
        )
    )
    a, b = import_log(p)
    assert (a.task, a.reward, len(a.calls), a.tools, a.info['split']) == ('7', 1.0, 1, [{}], 'a')
    assert (b.task, b.reward, len(b.calls), b.tools) == ('o.jsonl:2', None, 1, None)
    p.write_text(json.dumps([dict(messages=ms)], indent=2))  # one JSON document
    assert len(list(import_log(p))) == 1


def line(uuid, parent, role, *blocks, session='s', **kw):
    "A line of a Claude Code session (synthetic, of the real shape)."
    ident = {'id': kw.pop('id')} if 'id' in kw else {}
    return dict(
        type=role,
        uuid=uuid,
        parentUuid=parent,
        sessionId=session,
        version='2.1.0',
        cwd='/w',
        **kw,
        message=dict(role=role, content=list(blocks), **ident),
    )


TEXT = lambda t: dict(type='text', text=t)
USE = lambda i, **kw: dict(type='tool_use', id=i, name='Bash', input=kw)
GOT = lambda i, t, **kw: dict(type='tool_result', tool_use_id=i, content=t, **kw)


def write_session(path, lines):
    path.write_text(''.join(json.dumps(d) + '\n' for d in lines))
    return list(import_log(path))


def test_claude_code_session(tmp_path):
    main, sub = write_session(
        tmp_path / 's.jsonl',
        [
            dict(type='summary', summary='x', leafUuid='g'),
            dict(type='file-history-snapshot', messageId='a', snapshot={}),
            line('a', None, 'user', TEXT('tidy up')) | dict(message=dict(role='user', content='tidy up')),
            line('b', 'a', 'assistant', dict(type='thinking', thinking='hm'), id='m1'),
            line('b2', 'b', 'assistant', TEXT('Looking.'), id='m1'),
            line('c', 'b2', 'assistant', USE('t1', command='ls'), id='m1'),
            line('d', 'c', 'assistant', USE('t2', command='x'), id='m1'),
            line('e', 'c', 'user', GOT('t1', [TEXT('a.py')])),
            line('f', 'd', 'user', GOT('t2', 'no x', is_error=True)),
            dict(type='system', uuid='n', parentUuid='f', sessionId='s', content='notice'),
            line('g', 'n', 'assistant', TEXT('Done.'), id='m2'),
            line('x', None, 'user', TEXT('sub task'), isSidechain=True, agentId='q'),
            line('y', 'x', 'assistant', TEXT('sub answer'), isSidechain=True, agentId='q', id='m9'),
            line('h', 'b2', 'user', TEXT('rather: stop')),
            line('i', 'h', 'assistant', TEXT('Stopped.'), id='m3'),
        ],
    )
    say = lambda call: [(m['role'], m['content']) for m in call]
    first = [('user', 'tidy up'), ('assistant', 'Looking.')]
    assert [say(c) for c in main.calls] == [
        first,
        first + [('tool', 'a.py'), ('tool', 'no x'), ('assistant', 'Done.')],
        first + [('tool', 'a.py'), ('tool', 'no x'), ('user', 'rather: stop'), ('assistant', 'Stopped.')],
    ]
    assert [c['function']['arguments'] for c in main.calls[0][-1]['tool_calls']] == [
        {'command': 'ls'},
        {'command': 'x'},
    ]
    assert [m.get('event') for m in main.calls[1][2:4]] == [None, 'error'] and not main.append_only
    assert main.info == dict(
        source='claude-code',
        skipped={'summary': 1, 'file-history-snapshot': 1, 'system': 1, 'thinking': 1},
        parents_not_in_file=0,
    )
    assert sub.task == 's/q' and say(sub.messages) == [('user', 'sub task'), ('assistant', 'sub answer')]


def test_claude_code_compaction_starts_a_new_branch_and_a_lost_parent_is_counted(tmp_path):
    (c,) = write_session(
        tmp_path / 's.jsonl',
        [
            line('a', 'gone', 'user', TEXT('go')),
            line('b', 'a', 'assistant', TEXT('one'), id='m1'),
            dict(
                type='system',
                subtype='compact_boundary',
                uuid='k',
                parentUuid=None,
                logicalParentUuid='b',
                sessionId='s',
            ),
            line('c', 'k', 'user', TEXT('summary so far'), isCompactSummary=True),
            line('d', 'c', 'assistant', TEXT('two'), id='m2'),
        ],
    )
    assert [[m['content'] for m in x] for x in c.calls] == [['go', 'one'], ['summary so far', 'two']]
    assert c.info['parents_not_in_file'] == 1


@pytest.mark.parametrize(
    'text, says',
    [
        ('', 'empty'),
        ('[]', 'an empty list'),
        ('{"a": 1}', 'not a log of SWE-agent'),
        ('{"messages": [', r'x\.json:1: not JSON'),
        ('[1]', r'x\.json\[0\]: an object expected'),
        ('{"messages": [{"role": "bot"}]}', r"x\.json:1: messages\[0\]: role 'bot'"),
        ('{"traj": [{"role": "user", "content": "x"}]}', "field 'task_id' is missing"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n{"messages": 3', r'x\.json:2: not JSON'),
        ('{"messages": [], "reward": "x"}', 'reward'),
        (
            '{"type": "user", "sessionId": "s", "message": {"role": "user", "content": "x"}}',
            r'x\.json:1: a user line without uuid',
        ),
    ],
)
def test_a_damaged_log_says_where(tmp_path, text, says):
    p = tmp_path / 'x.json'
    p.write_text(text)
    with pytest.raises(ValueError, match=says):
        list(import_log(p))


def test_a_circle_of_parents_is_refused(tmp_path):
    with pytest.raises(ValueError, match='circle'):
        write_session(
            tmp_path / 's.jsonl', [line('a', 'b', 'user', TEXT('x')), line('b', 'a', 'assistant', TEXT('y'), id='m')]
        )
    with pytest.raises(ValueError, match="kind 'x'"):
        list(import_log(LOGS / 'tau_bench_gpt4o_airline.json', kind='x'))


# --- what an importer must not lose, and not invent


def imported(tmp_path, *rows, **kw):
    p = tmp_path / 'log.jsonl'
    p.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return list(import_log(p, **kw))


def use(name, arguments):
    return dict(id='c', type='function', function=dict(name=name, arguments=arguments))


ASK = dict(role='user', content='q')
READ = dict(type='function', function=dict(name='read', parameters=dict(
    type='object', properties=dict(path={'type': 'string'}, mode={'type': ['string', 'null']}))))  # fmt: skip


@pytest.mark.parametrize(
    'answer, content, calls',
    [
        (dict(content=None, refusal='I will not'), 'I will not', []),
        (dict(content='', function_call=dict(name='f', arguments='{"a": 1}')), '', [('f', {'a': 1})]),
        (dict(content=None, tool_calls=None, function_call=dict(name='f', arguments=None)), '', [('f', {})]),
        (dict(content=[dict(type='refusal', refusal='no')]), 'no', []),
        (dict(content=None, tool_calls=json.dumps([use('f', {})])), '', [('f', {})]),
        (dict(content=None, reasoning='hm'), '', []),
    ],
)
def test_an_answer_without_content_says_what_it_says(tmp_path, answer, content, calls):
    (c,) = imported(tmp_path, dict(messages=[ASK, dict(role='assistant', **answer)]))
    said = c.calls[0][-1]
    got = [(x['function']['name'], x['function']['arguments']) for x in said.get('tool_calls', ())]
    assert (said['content'], got) == (content, calls) and 'skipped' not in c.info
    assert said.get('reasoning_content') == answer.get('reasoning')


@pytest.mark.parametrize(
    'answer',
    [
        dict(content=None),
        dict(content=''),
        dict(content=' \n'),
        dict(content=[]),
        dict(),
        dict(content=None, tool_calls=[], audio=dict(id='a')),
        dict(content=None, function_call=None, refusal=None, reasoning_content=''),
    ],
)
def test_an_empty_answer_is_no_call(tmp_path, answer):
    empty = dict(role='assistant', **answer)
    (c,) = imported(tmp_path, dict(messages=[ASK, empty, ASK, dict(role='assistant', content='a'), ASK, empty]))
    assert [call[-1]['content'] for call in c.calls] == ['a'] and len(c.messages) == 6
    assert c.info['skipped'] == {'empty answer': 2}
    with pytest.raises(ValueError, match="tau-bench/1: no answer of the model in it; left out: {'empty answer': 1}"):
        imported(tmp_path, dict(task_id=1, traj=[ASK, empty]), kind='tau-bench')


def test_an_empty_answer_of_the_others_is_no_call(tmp_path):
    step = dict(query=[ASK], response='', thought='')
    (c,) = imported(tmp_path, dict(trajectory=[step, step | dict(response='a')], history=[]))
    assert [call[-1]['content'] for call in c.calls] == ['a'] and c.info['skipped'] == {'empty answer': 1}
    thinks = dict(type='thinking', thinking='hm')
    with pytest.raises(ValueError, match="no answer .* left out: {'thinking': 1, 'empty answer': 1}"):
        claude(tmp_path, [('1', None, 'user', 'go'), ('2', '1', 'assistant', [thinks])])


def test_lists_as_json_text_and_older_names(tmp_path):
    talk = [dict(role='developer', content='d'), ASK, dict(role='assistant', tool_calls=[use('read', '{"path": "p"}')]),
            dict(role='function', name='read', content='text')]  # fmt: skip
    plain = dict(messages=talk, tools=[READ])
    want = imported(tmp_path, plain)
    assert [m['role'] for m in want[0].messages] == ['system', 'user', 'assistant', 'tool']
    for row in (
        dict(messages=json.dumps(talk), tools=json.dumps([READ])),
        dict(messages=talk, tools=[json.dumps(READ)]),
        dict(messages=talk, functions=[READ['function']]),
        dict(messages=talk, tools=None, functions=json.dumps([READ['function']])),
    ):
        assert imported(tmp_path, row) == want
    assert imported(tmp_path, dict(messages=talk, tools='null'))[0].tools is None
    (c,) = imported(tmp_path, dict(trajectory=json.dumps([dict(query=[ASK], response='a')])))
    assert c.calls[0][-1]['content'] == 'a'


@pytest.mark.parametrize(
    'row, says',
    [
        (dict(messages=[ASK], tools='[oops'), "tools: a list expected, got str '\\[oops'"),
        (dict(messages=[ASK], tools={'a': 1}), 'tools: a list expected, got dict'),
        (dict(messages=[ASK], tools=[3]), "tools: an object for each tool expected, got '3'"),
        (dict(messages='[oops'), 'its fields: messages'),
        (dict(trajectory=[dict(role='user', text='a'), dict(role='ai', text='b')]), 'of the first are role, text'),
        (dict(trajectory=[dict(role='user', content='a'), dict(role='assistant', content='b')]), 'role, content'),
        (dict(messages=[dict(role='user', content=3)]), 'content must be text'),
        (dict(messages=[dict(role='assistant', tool_calls=dict(a=1))]), 'tool_calls: a list expected, got dict'),
        (dict(messages=[dict(role='assistant', tool_calls='[{')]), 'tool_calls are not JSON'),
        (dict(messages=[dict(role='assistant', tool_calls=[use('f', {})], function_call=dict(name='f'))]), 'beside'),
        (dict(messages=[dict(role='user', function_call=dict(name='f'))]), 'tool_calls in a user message'),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, row, says):
    with pytest.raises(ValueError, match=says) as e:
        imported(tmp_path, row)
    assert '\n' not in str(e.value) and 'log.jsonl:1' in str(e.value)


def test_nulls_that_a_table_adds_are_no_arguments(tmp_path):
    padded = dict(path='p', command=None, mode=None, opts=dict(a=1, b=None))
    answer = lambda args: dict(role='assistant', content=None, tool_calls=[use('read', args)])
    row = lambda args, **kw: dict(messages=[ASK, answer(args)], **kw)
    got = lambda r: imported(tmp_path, r)[0].calls[0][-1]['tool_calls'][0]['function']['arguments']
    assert got(row(padded)) == dict(path='p', opts=dict(a=1))
    assert got(row(padded, tools=[READ])) == dict(path='p', mode=None, opts=dict(a=1))
    assert got(row(json.dumps(padded))) == padded  # the model's own text
    (c,) = imported(tmp_path, row(padded))
    assert c.info['skipped'] == {'null arguments': 1}
    wide = json.loads(json.dumps(READ)) | dict(strict=None)
    wide['function']['parameters']['properties'] |= dict(command=None)
    wide['function']['parameters']['properties']['mode'] |= dict(enum=None, default=None)
    (c,) = imported(tmp_path, row(padded, tools=[wide]))
    want = json.loads(json.dumps(READ))
    want['function']['parameters']['properties']['mode'] |= dict(default=None)
    assert c.tools == [want]


def claude(tmp_path, rows):
    line = lambda u, up, role, content, **kw: dict(
        type=role, uuid=u, parentUuid=up, sessionId='s', message=dict(role=role, content=content, **kw)
    )
    return imported(tmp_path, *(line(*row[:4], **(row[4] if len(row) > 4 else {})) for row in rows))


def test_text_beside_the_results_of_parallel_calls_is_in_the_history(tmp_path):
    use_ = lambda i: [dict(type='tool_use', id=i, name='T', input={})]
    res = lambda i, *more: [dict(type='tool_result', tool_use_id=i, content=f'R{i}'), *more]
    text = lambda t: [dict(type='text', text=t)]
    rows = [
        ('1', None, 'user', 'go'),
        ('2', '1', 'assistant', use_('a'), dict(id='m1')),
        ('3', '2', 'assistant', use_('b'), dict(id='m1')),
        ('4', '2', 'user', res('a', *text('beside a'))),
        ('4s', '4', 'user', text('SKILL')),
        ('5', '3', 'user', res('b')),
        ('6', '5', 'assistant', text('done'), dict(id='m2')),
    ]
    (c,) = claude(tmp_path, rows)
    want = ['go', '', 'Ra', 'Rb', 'beside a', 'SKILL', 'done']
    assert [m['content'] for m in c.messages] == [m['content'] for m in c.calls[1]] == want and c.info['skipped'] == {}
    assert [m['content'] for m in c.calls[0]] == ['go', '']
    # the other result leads on; words that were taken back, and another branch, are not part of this one
    other = rows[:3] + [('5', '3', 'user', res('b')), *rows[3:5], ('6', '4s', 'assistant', text('done'), dict(id='m2'))]
    (c,) = claude(tmp_path, other)
    assert [m['content'] for m in c.calls[1]] == ['go', '', 'Ra', 'Rb', 'beside a', 'SKILL', 'done']
    (c,) = claude(tmp_path, [*rows[:6], ('x', '5', 'user', text('taken back')), *rows[6:]])
    assert [m['content'] for m in c.calls[1]] == want
    assert c.info['skipped'] == {'text that no call had in its history': 1}
    branch = [('7', '4s', 'assistant', text('elsewhere'), dict(id='m3'))]
    (c,) = claude(tmp_path, [*rows, *branch])
    assert [m['content'] for m in c.calls[1]] == ['go', '', 'Ra', 'Rb', 'done']
    assert [m['content'] for m in c.calls[2]] == ['go', '', 'Ra', 'Rb', 'beside a', 'SKILL', 'elsewhere']
