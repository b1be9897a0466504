"The records: what they accept, what they refuse and how they say it, and that nothing gets lost in a dictionary."

import json

import numpy as np
import pytest
import torch
from core_strategies import few, groups, segments, trajectories
from hypothesis import given

from kat.core.messages import normalise
from kat.core.types import Group, Segment, Trajectory, _json_floats, groups_of, plain

NAN = float('nan')


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(ids=[1], kind='tool'), "segment kind: 'tool'; one of system, user"),
        (dict(ids=[1, -3], kind='user'), 'segment ids: -3 at index 1'),
        (dict(ids=[1.5], kind='user'), 'segment ids: whole numbers expected, got dtype float64'),
        (dict(ids=[True], kind='user'), 'segment ids: whole numbers expected, got dtype bool'),
        (dict(ids=[[1], [2]], kind='user'), r'segment ids: one dimension expected, got shape \(2, 1\)'),
        (dict(ids=[2**31], kind='user'), 'segment ids: 2147483648 at index 0 does not fit in int32'),
        (dict(ids=[1, 2], kind='assistant', logprobs=[-1]), r'segment logprobs: 2 values expected \(one per id\)'),
        (dict(ids=[1, 2], kind='assistant', logprobs=[-1, 2]), 'segment logprobs: 2.0 at index 1 is outside'),
        (dict(ids=[1], kind='assistant', logprobs=[-np.inf]), 'segment logprobs: -inf at index 0 is outside'),
        (
            dict(ids=[1, 2], kind='assistant', trainable=True, logprobs=[-1, NAN]),
            'nan at index 1 is missing on a trainable token',
        ),
        (dict(ids=[1], kind='assistant', trainable=True, entropy=[None]), 'segment entropy: nan at index 0 is missing'),
        (dict(ids=[1], kind='assistant', entropy=[-1.0]), 'segment entropy: -1.0 at index 0 is outside'),
        (dict(ids=[1], kind='assistant', version=[-2]), 'segment version: -2 at index 0'),
        (dict(ids=[1], kind='assistant', version=[1, 1]), 'segment version: 1 values expected, got 2'),
        (dict(ids=[1], kind='user', turn=-1), 'segment turn: -1; a whole number from 0'),
        (dict(ids=[1], kind='user', turn=1.0), 'segment turn: 1.0'),
        (dict(ids=[1], kind='user', trainable=1), 'segment trainable: 1; True or False'),
        (dict(ids=[1], kind='user', event=3), 'segment event: 3'),
        (dict(ids=[1], kind='user', extra={'ids': 1}), r"segment extra: \['ids'\] are fields of their own"),
        (dict(ids=[1], kind='user', extra={'x': object()}), 'segment extra.x: a object cannot be stored'),
    ],
)
def test_a_bad_segment_is_refused_by_field_and_value(kw, says):
    with pytest.raises(ValueError, match=says):
        Segment(**kw)


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(task=3, segments=[]), 'trajectory task: 3'),
        (dict(task='t', segments=[[1]]), r'trajectory segments\[0\]: a Segment expected, got list'),
        (
            dict(task='t', segments=[Segment([1], 'user', 1), Segment([1], 'assistant', 0)]),
            r'segments\[1\]: turn 0 after turn 1',
        ),
        (dict(task='t', segments=[], reward=NAN), 'trajectory reward: nan'),
        (dict(task='t', segments=[], reward='1'), "trajectory reward: '1'"),
        (dict(task='t', segments=[], sampling=[1]), 'trajectory sampling: a dictionary expected'),
        (dict(task='t', segments=[], info={1: 2}), 'trajectory info: key 1 is not a string'),
        (dict(task='t', segments=[], extra={'reward': 2}), 'trajectory extra'),
    ],
)
def test_a_bad_trajectory_is_refused(kw, says):
    with pytest.raises(ValueError, match=says):
        Trajectory(**kw)


def test_a_group_holds_one_task():
    with pytest.raises(ValueError, match=r"group of 'a': trajectories\[1\] is of task 'b'"):
        Group('a', [Trajectory('a', []), Trajectory('b', [])])
    g = groups_of([Trajectory('b', [], 1.0), Trajectory('a', []), Trajectory('b', [])])
    assert [x.task for x in g] == ['b', 'a'] and np.isnan(g[0].rewards).tolist() == [False, True]


def test_a_group_has_one_owner_and_counts_its_sessions():
    of = lambda session, owner=None: Trajectory('t', [], session=session, owner=owner)
    with pytest.raises(ValueError, match=r"trajectories\[1\] is of owner 'bob', trajectories\[0\] of 'ann'"):
        Group('t', [of('a', 'ann'), of('a', 'bob')])
    g = Group('t', [of('b'), of(None), of('a'), of('b'), of(None)])
    assert g.sessions.tolist() == [0, 1, 2, 0, 3] and g.sessions.dtype == np.int64 and 'of 4 sessions' in repr(g)
    assert Group('t', []).sessions.tolist() == []
    gathered = groups_of([of('a', 'ann'), of('a', 'bob'), of('b', 'ann')])
    assert [[(t.session, t.owner) for t in g] for g in gathered] == [[('a', 'ann'), ('b', 'ann')], [('a', 'bob')]]


@pytest.mark.parametrize('name, value', [('session', 1), ('session', ''), ('owner', 0), ('owner', ['a'])])
def test_a_session_and_an_owner_are_names(name, value):
    with pytest.raises(ValueError, match=f'trajectory {name}: '):
        Trajectory('t', [], **{name: value})


def test_the_session_survives_and_version_1_is_read_right():
    t = Trajectory('t', [], 1.0, session='s', owner='')
    assert Trajectory.from_dict(t.to_dict()) == t and 'session' not in Trajectory('t', []).to_dict()
    first = dict(schema='kat.trajectory/1')
    old = lambda **info: Trajectory.from_dict(Trajectory('t', [], info=info).to_dict() | first)
    assert [old(session=x).session for x in ('s', '', None, 3)] == ['s', None, None, None] and old().session is None
    now = Trajectory('t', [], info=dict(session='s'))  # what `info` says is free again
    assert Trajectory.from_dict(now.to_dict()).session is None


def test_ids_may_come_as_lists_arrays_or_tensors():
    want = Segment([3, 4], 'user')
    for ids in ((3, 4), np.array([3, 4]), np.array([3, 4], np.uint8), torch.tensor([3, 4])):
        got = Segment(ids, 'user')
        assert got == want and got.ids.dtype == np.int32
    assert len(Segment([], 'user')) == 0


def test_arrays_over_a_trajectory():
    t = Trajectory(
        't',
        [
            Segment([1, 2], 'user'),
            Segment([3], 'assistant', 0, True, [-1.0], [2.0], [5]),
            Segment([4], 'tool_call', 0, True),
            Segment([6], 'tool_result', 0, event='error'),
            Segment([7], 'assistant', 2, True, version=[6]),
        ],
    )
    assert (t.ids.tolist(), t.ids.dtype) == ([1, 2, 3, 4, 6, 7], np.int32)
    assert (t.mask.tolist(), t.mask.dtype) == ([False, False, True, True, False, True], bool)
    assert (
        np.array_equal(t.logprobs, np.float32([NAN, NAN, -1, NAN, NAN, NAN]), equal_nan=True)
        and t.logprobs.dtype == np.float32
    )
    assert np.array_equal(t.entropy, np.float32([NAN, NAN, 2, NAN, NAN, NAN]), equal_nan=True)
    assert (t.version.tolist(), t.version.dtype) == ([-1, -1, 5, -1, -1, 6], np.int32)
    assert t.turn.tolist() == [0, 0, 0, 0, 0, 2] and (t.n_turns, len(t)) == (2, 6)
    empty = Trajectory('t', [])
    assert [a.dtype for a in (empty.ids, empty.mask, empty.logprobs, empty.version)] == [
        np.int32,
        bool,
        np.float32,
        np.int32,
    ]


def test_equality_is_by_value_and_nan_is_absence():
    s = lambda **kw: Segment(**(dict(ids=[1, 2], kind='assistant', logprobs=[-1, NAN]) | kw))
    assert s() == s() and s().__hash__ is None
    for kw in (
        dict(ids=[1, 3]),
        dict(logprobs=[-1, -1]),
        dict(logprobs=None),
        dict(turn=1),
        dict(trainable=True, logprobs=None),
        dict(event='tool'),
        dict(extra={'a': 1}),
        dict(version=[0, 0]),
        dict(kind='tool_call'),
    ):
        assert s(**kw) != s(), kw
    assert s() != 'something else' and Trajectory('a', [s()]) == Trajectory('a', [s()]) != Trajectory('a', [s(turn=1)])


def test_the_repr_explains_itself():
    s = Segment(range(9), 'tool_call', 3, True, [-0.5] * 9, [1.0] * 9, [2] * 8 + [3], 'error')
    assert (
        repr(s)
        == 'Segment(tool_call, turn 3, 9 tokens [0 1 2 3 4 5 …], trained, logp -0.50, H 1.00, v2–3, event error)'
    )
    t = Trajectory('t1', [s], 0.5)
    assert repr(t) == 'Trajectory(t1: 1 turns, 9 tokens, 9 trained, reward 0.5 | tool_call×9*)'
    assert repr(Group('t1', [t, Trajectory('t1', [])])) == 'Group(t1: 2 trajectories, 9 tokens, rewards 0.5 –)'


@few
@given(segments())
def test_segments_survive_a_dictionary(s):
    assert Segment.from_dict(json.loads(json.dumps(s.to_dict()))) == s


@few
@given(trajectories())
def test_trajectories_survive_a_dictionary(t):
    assert Trajectory.from_dict(json.loads(json.dumps(t.to_dict()))) == t


@few
@given(groups())
def test_groups_survive_a_dictionary(g):
    assert Group.from_dict(json.loads(json.dumps(g.to_dict()))) == g


def test_unknown_fields_are_kept_at_every_level():
    d = Group('t', [Trajectory('t', [Segment([1], 'user')])]).to_dict()
    d['g'], d['trajectories'][0]['t'], d['trajectories'][0]['segments'][0]['s'] = 1, [2], {'x': None}
    assert Group.from_dict(d).to_dict() == d


@pytest.mark.parametrize(
    'd, says',
    [
        ({'task': 't', 'segments': []}, "field 'schema' is missing"),
        ({'schema': 'kat.trajectory/3', 'task': 't', 'segments': []}, 'reads version 2; upgrade kat'),
        ({'schema': 'kat.group/1', 'task': 't', 'segments': []}, "schema 'kat.group/1': 'kat.trajectory/2' expected"),
        ({'schema': 'kat.trajectory/1', 'segments': []}, "trajectory: field 'task' is missing"),
        ({'schema': 'kat.trajectory/1', 'task': 't'}, "field 'segments': a list expected"),
        (
            {'schema': 'kat.trajectory/1', 'task': 't', 'segments': [{'kind': 'user'}]},
            r"segments\[0\]: segment: field 'ids' is missing",
        ),
        (
            {'schema': 'kat.trajectory/1', 'task': 't', 'segments': [{'kind': 'user', 'ids': [1], 'turn': 'x'}]},
            r"segments\[0\]: segment turn",
        ),
        (
            {'schema': 'kat.trajectory/1', 'task': 't', 'segments': [7]},
            r'segments\[0\]: segment: an object expected, got int',
        ),
        ([], 'an object expected'),
    ],
)
def test_a_damaged_record_says_where(d, says):
    with pytest.raises(ValueError, match=says):
        Trajectory.from_dict(d)


def test_the_short_decimal_of_a_float32_gives_its_bits_back():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    a = np.concatenate(
        [bits.view(np.float32), np.float32([0.0, -0.0, 1e-45, -1e-45, 3.4028235e38, 1.1754944e-38, 2**24])]
    )
    a = a[np.isfinite(a)]
    assert np.array_equal(np.array(_json_floats(a), np.float32).view(np.uint32), a.view(np.uint32))


def test_plain_values():
    assert type(plain(np.float64(1))) is float and type(plain(np.str_('x'))) is str
    assert plain({'a': np.float64(1.5), 'b': (np.int8(1), np.array([[True]]))}) == {'a': 1.5, 'b': [1, [[True]]]}
    with pytest.raises(ValueError, match=r'info\.a\[1\]: a set cannot be stored'):
        plain({'a': [1, {2}]}, 'info')


def test_messages_in_one_form():
    wire = [
        {
            'role': 'assistant',
            'content': None,
            'agent': 'x',
            'tool_calls': [{'function': {'name': 'f', 'arguments': ''}}],
        },
        {
            'role': 'tool',
            'content': [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}],
            'tool_call_id': 'c',
            'event': 'error',
        },
    ]
    assert normalise(wire) == [
        {
            'role': 'assistant',
            'content': '',
            'tool_calls': [{'type': 'function', 'function': {'name': 'f', 'arguments': {}}}],
        },
        {'role': 'tool', 'content': 'ab', 'tool_call_id': 'c', 'event': 'error'},
    ]
    assert normalise(normalise(wire)) == normalise(wire)


@pytest.mark.parametrize(
    'm, says',
    [
        ('hi', r'messages\[0\]: a dictionary expected'),
        ({'role': 'bot'}, "role 'bot'"),
        ({'role': 'user', 'content': 3}, 'content must be text'),
        ({'role': 'user', 'content': [{'type': 'image'}]}, 'content must be text'),
        ({'role': 'user', 'tool_calls': [1]}, 'tool_calls in a user'),
        ({'role': 'assistant', 'tool_calls': [{}]}, r'tool_calls\[0\]: no function.name'),
        (
            {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': '[1]'}}]},
            'arguments must be an object',
        ),
        (
            {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': '{'}}]},
            'arguments are not JSON',
        ),
        (
            {'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': '{"a": NaN}'}}]},
            'arguments are not JSON',
        ),
        ({'role': 'assistant', 'tool_calls': [{'function': {'name': 'f', 'arguments': {'a': '\ud800'}}}]}, 'not JSON'),
        ({'role': 'tool', 'content': 'cut \ud83d'}, r"messages\[0\]: half of a surrogate pair after 'cut '"),
        ({'role': 'assistant', 'reasoning': [{'text': '\ude00'}]}, 'half of a surrogate pair'),
    ],
)
def test_a_bad_message_says_where(m, says):
    with pytest.raises(ValueError, match=says):
        normalise([m])
