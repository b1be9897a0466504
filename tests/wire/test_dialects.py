"Dialects in and out: what agents send becomes one kind of call, hostile bodies a 400; streams say what answers say."

import copy
import json
import random
import re

import plane_bodies as bodies
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kat.core.calls import CallParser, Decoder, parse_reply
from kat.core.formats import write_call
from kat.core.template import train_tokenizer
from kat.wire.dialects import (
    Answer, Stream, TokenLogprob, call_prefix, canonical_key, core_messages, count_tokens_answer, explain,
    models_answer, parse_call, render_answer, render_error, too_long, tools_key)
from kat.wire.fields import BadRequest, RequestLimits, parse_body
from kat.wire.normalise import (NORMALISATIONS, canonical_json, drop_billing, fold_reminders, mask_dates, merge_turns,
                                order_results)

few = settings(max_examples=50, deadline=None)


def call(id, name='view', **args):
    return dict(id=id, type='function', function=dict(name=name, arguments=args))


def keys(messages):
    return [canonical_key(m) for m in messages]


def rules(c):
    return {n.partition(':')[0] for n in c.notes}


# --- what real agents send


def test_claude_code():
    c = parse_call(
        'messages', bodies.claude_code(2), bodies.BETAS | {'X-Claude-Code-Agent-Id': 'a-7', 'x-api-key': 'secret'}
    )
    assert c.messages == [
        dict(role='system', content='You are an agent that fixes bugs.\n\nBe brief.'),
        dict(
            role='user',
            content='<system-reminder>\nRules of the house.\n</system-reminder>\nFix add.\n'
            '<system-reminder>\n# Environment\nToday is 2026-11-23.\n</system-reminder>',
        ),
        dict(
            role='assistant',
            content='I look at both.',
            tool_calls=[
                call('toolu_1', 'Read', file_path='a.py', limit=10),
                call('toolu_2', 'Bash', command='pytest -q'),
            ],
        ),
        dict(role='tool', tool_call_id='toolu_1', content='def add(a, b): return a - b'),
        dict(role='tool', tool_call_id='toolu_2', content='1 failed', error=True),
        dict(
            role='user',
            content='<system-reminder>\n<total_tokens>899000 tokens left</total_tokens>\n</system-reminder>',
        ),
    ]
    assert [t['function']['name'] for t in c.tools] == ['Read', 'Bash']
    assert [t['function']['name'] for t in c.deferred] == ['WebFetch'] and len(c.callables) == 3
    assert c.tools[1] == dict(
        type='function',
        function=dict(name='Bash', description='Run a command.', parameters=bodies.schema(command='string')),
    )
    assert (c.stream, c.thinking, c.sampling.max_tokens, c.sampling.temperature, c.n) == (
        True,
        'omitted',
        32000,
        1.0,
        1,
    )
    assert c.metadata == dict(
        session_id='11111111-2222', agent_id='a-7', betas=['claude-code-20250219', 'interleaved-thinking-2025-05-14']
    )
    assert 'secret' not in repr(c)
    assert rules(c) == {'blocks', 'cache_control', 'reminders', 'results', 'deferred', 'billing'}
    assert core_messages(c)[4] == dict(role='tool', tool_call_id='toolu_2', content='1 failed', event='error')


def test_every_turn_of_claude_code_extends_the_one_before_though_it_is_written_in_another_way():
    turns = [parse_call('messages', bodies.claude_code(t, cch=f'{t}{t}{t}aa')).messages for t in (1, 2, 3)]
    assert turns[1][:2] == turns[0] and turns[2][:6] == turns[1]
    assert parse_call('messages', bodies.compaction()).messages[:8] == turns[2]
    assert parse_call('messages', bodies.claude_code(1, agent='x')).metadata['subagent'] is True


def test_openai_agents():
    c = parse_call('chat', bodies.mini_swe_agent(), {'User-Agent': 'litellm/1'})
    assert c.messages[2] == dict(
        role='assistant', content='I look.', tool_calls=[call('call_1', 'bash', command='cat calc.py')]
    )
    assert (c.stream, c.sampling.temperature, c.metadata, c.notes) == (False, 0.0, dict(client='litellm/1'), [])
    c = parse_call('chat', bodies.opencode(), {'x-session-id': 's-9'})
    assert [m.get('tool_call_id') for m in c.messages[3:]] == ['c1', 'c2'] and rules(c) == {'results', 'blocks'}
    assert c.usage and c.messages[2]['reasoning'] == 'Both at once.' and c.metadata == dict(session_id='s-9')
    assert core_messages(c)[2]['reasoning_content'] == 'Both at once.'
    c = parse_call('chat', bodies.openai_sdk())
    assert c.messages == [dict(role='system', content='Be brief.'), dict(role='user', content='Hello', name='ann')]
    s = c.sampling
    assert (s.max_tokens, s.logprobs, s.stop, s.seed, c.thinking) == (20, 2, ['\n\n'], 7, 'shown')
    c = parse_call('completions', bodies.completion())
    assert (c.prompt, c.sampling.max_tokens, c.sampling.logprobs, c.messages) == ([1, 2, 3], 4, 1, [])
    assert parse_call('completions', dict(model='k', prompt=['one'])).prompt == 'one'
    assert parse_call('completions', dict(model='k', prompt='one')).sampling.max_tokens == 16


def test_the_same_history_in_two_dialects_has_the_same_keys():
    a = parse_call('messages', bodies.claude_code(2)).messages
    chat = [
        dict(role='system', content=a[0]['content']),
        dict(
            role='user',
            content=[
                dict(type='text', text=t)
                for t in a[1]['content'].split('\n<system-reminder>')[0].split('\n', 3)[:3] + ['Fix add.']
            ],
        ),
        dict(role='system', content='# Environment\nToday is 2026-11-24.'),
        dict(
            role='assistant',
            content='I look at both. ',
            reasoning='hm',
            tool_calls=[
                bodies.fn_call('x', 'Read', '{ "limit": 10.0, "file_path": "a.py" }'),
                bodies.fn_call('y', 'Bash', '{"command":"pytest -q"}'),
            ],
        ),
        dict(role='tool', tool_call_id='x', content='def add(a, b): return a - b'),
        dict(role='tool', tool_call_id='y', content='1 failed'),
        dict(role='system', content='<total_tokens>899000 tokens left</total_tokens>'),
    ]
    b = parse_call('chat', dict(model='k', messages=chat)).messages
    same = [x == y for x, y in zip(keys(a), keys(b))]
    assert same == [True, True, True, True, False, True] and len(a) == len(b)  # chat has no flag for a failed result


def test_blocks_thinking_and_references_of_the_messages_api():
    deferred = dict(name='Fetch', input_schema=bodies.schema(url='string'), defer_loading=True)
    body = bodies.anthropic_sdk() | dict(
        thinking=dict(type='enabled', budget_tokens=2048),
        tools=[dict(name='Search', type='custom', input_schema=bodies.schema(q='string')), deferred],
        tool_choice=dict(type='none'),
        stop_sequences=['END'],
        messages=[
            dict(role='user', content='a'),
            dict(role='user', content=[bodies.text('b'), bodies.text('')]),
            dict(
                role='assistant',
                content=[
                    dict(type='thinking', thinking='first', signature='s'),
                    dict(type='redacted_thinking', data='xx'),
                    bodies.text('one'),
                    bodies.tool_use('t', 'Search', q='fetch'),
                    bodies.text('two'),
                ],
            ),
            dict(
                role='user',
                content=[
                    dict(type='mid_conv_system', content=[bodies.text('soon')]),
                    bodies.text('well?'),
                    bodies.tool_result('t', [bodies.text('found'), dict(type='tool_reference', tool_name='Fetch')]),
                ],
            ),
        ],
    )
    c = parse_call('messages', body)
    assert c.messages[1:3] == [
        dict(role='user', content='a\nb'),
        dict(role='assistant', content='one\ntwo', reasoning='first', tool_calls=[call('t', 'Search', q='fetch')]),
    ]
    found = c.messages[3]['content'].split('\n')
    assert found[0] == 'found' and json.loads(found[1]) == dict(name='Fetch', parameters=bodies.schema(url='string'))
    assert c.messages[4:] == [dict(role='user', content='<system-reminder>\nsoon\n</system-reminder>\nwell?')]
    assert c.tool_choice == 'none' and c.callables == [] and len(c.tools) == 1 and c.sampling.stop == ['END']
    assert {'redacted', 'deferred', 'results', 'reminders', 'turns'} <= rules(c)
    empty = dict(role='user', content=[bodies.tool_result('t', None)])
    body['messages'][-1] = empty
    assert parse_call('messages', body).messages[-1] == dict(role='tool', tool_call_id='t', content='')


def test_sessions_are_found_wherever_agents_put_them():
    find = lambda headers={}, **body: parse_call('chat', bodies.openai_sdk() | body, headers).metadata.get('session_id')
    assert find({'X-Kat-Session': 'k', 'x-session-id': 'x'}) == 'k'
    assert find({'x-session-affinity': 'a'}, prompt_cache_key='p') == 'a'
    assert find(prompt_cache_key='p') == 'p' and find(metadata=dict(session_id='m')) == 'm' and find() is None
    old = dict(user_id='user_0f_account_1-2_session_3-4')
    assert (
        find(metadata=old) == '3-4'
        and find(metadata=dict(user_id='[')) is None
        and find(metadata=dict(user_id='7')) is None
    )
    assert parse_call('chat', bodies.openai_sdk(), {'user-agent': 'é' * 999}).metadata['client'] == '?' * 256


# --- what is refused


def hi(**more):
    return dict(model='kat', messages=[dict(role='user', content='hi')]) | more


def chat_with(*messages):
    return hi(messages=[dict(role='user', content='hi'), *messages])


def answer_with(*calls):
    return dict(role='assistant', content=None, tool_calls=list(calls))


def msg(**more):
    return hi(max_tokens=9) | more


WRONG = [
    ('chat', [], None, 'body: an object expected, got a list'),
    ('chat', dict(model='k'), 'messages', 'a list is required'),
    ('chat', hi(model=7), 'model', 'a string expected, got a whole number'),
    ('chat', hi(messages=[]), 'messages', '0; 1 to 10000'),
    ('chat', hi(messages={}), 'messages', 'a list expected, got an object'),
    ('chat', hi(messages=['x']), 'messages[0]', 'an object expected'),
    ('chat', hi(messages=[dict(role='robot', content='')]), 'messages[0].role', "'robot'; system, developer"),
    ('chat', hi(messages=[dict(role='function', content='')]), 'messages[0].role', 'function'),
    ('chat', hi(messages=[dict(role='user')]), 'messages[0].content', 'required'),
    ('chat', hi(messages=[dict(role='user', content=7)]), 'messages[0].content', 'a list expected, got a whole number'),
    ('chat', hi(messages=[dict(role='user', content=[dict(type='text')])]), 'messages[0].content[0].text', 'required'),
    (
        'chat',
        chat_with(dict(role='user', content=[dict(type='image_url')])),
        'messages[1].content[0]',
        'images, sound and files',
    ),
    (
        'chat',
        chat_with(dict(role='user', content=[dict(type='blob')])),
        'messages[1].content[0]',
        "'blob' is not supported",
    ),
    ('chat', chat_with(dict(role='tool', content='x')), 'messages[1].tool_call_id', 'required'),
    ('chat', chat_with(dict(role='tool', tool_call_id='a', content='x')), 'messages', 'before any assistant'),
    ('chat', chat_with(answer_with(bodies.fn_call('a'))), 'messages', "'a' has no result"),
    (
        'chat',
        chat_with(answer_with(bodies.fn_call('a')), dict(role='tool', tool_call_id='b', content='')),
        'messages',
        "'b': the assistant",
    ),
    ('chat', chat_with(answer_with(bodies.fn_call('a'), bodies.fn_call('a'))), 'messages[1]', 'same id'),
    (
        'chat',
        chat_with(answer_with(bodies.fn_call('a', arguments='{'))),
        'messages[1].tool_calls[0].function.arguments',
        'not JSON',
    ),
    ('chat', chat_with(answer_with(bodies.fn_call('a', arguments='{"x": NaN}'))), None, 'NaN'),
    ('chat', chat_with(answer_with(bodies.fn_call('a', arguments='[1]'))), None, 'an object expected, got a list'),
    (
        'chat',
        chat_with(answer_with(dict(id='a', type='custom', custom={}))),
        'messages[1].tool_calls[0].function',
        'required',
    ),
    (
        'chat',
        chat_with(dict(role='assistant', function_call=dict(name='f'))),
        'messages[1].function_call',
        'tool_calls',
    ),
    ('chat', hi(temperature=True), 'temperature', 'a number expected, got true or false'),
    ('chat', hi(temperature=2.5), 'temperature', '2.5 is outside 0..2'),
    ('chat', hi(max_tokens=0), 'max_tokens', 'outside'),
    ('chat', hi(max_tokens=1.5), 'max_tokens', 'a whole number expected, got a number'),
    ('chat', hi(max_tokens=1, max_completion_tokens=2), 'max_tokens', 'send one'),
    ('chat', hi(top_logprobs=2), 'top_logprobs', 'needs logprobs'),
    ('chat', hi(logprobs=True, top_logprobs=21), 'top_logprobs', 'outside 0..20'),
    ('chat', hi(stop=['a'] * 17), 'stop', '17 strings'),
    ('chat', hi(stop=['']), 'stop[0]', 'empty'),
    ('chat', hi(n=2), 'n', 'only 1'),
    ('chat', hi(n=True), 'n', 'only 1'),
    ('chat', hi(logit_bias={'5': -100}), 'logit_bias', 'log-probs'),
    ('chat', hi(parallel_tool_calls=1), 'parallel_tool_calls', 'true or false expected'),
    ('chat', hi(response_format=dict(type='json_object')), 'response_format', 'grammar'),
    ('chat', hi(tool_choice='required'), 'tool_choice', 'tools: none'),
    ('chat', hi(tool_choice='often'), 'tool_choice', 'auto, none, any, required or one tool'),
    ('chat', hi(tool_choice=dict(type='function', function=dict(name='f'))), 'tool_choice', "'f'; tools: none"),
    ('chat', hi(tool_choice=dict(type='function', name='f')), 'tool_choice.function', 'an object is required'),
    ('chat', hi(tool_choice=dict(type='function', function={})), 'tool_choice.function.name', 'a string is required'),
    ('messages', msg(tool_choice=dict(type='tool')), 'tool_choice.name', 'a string is required'),
    ('chat', hi(temprature=0), 'temprature', 'unknown field'),
    ('chat', hi(tools=[dict(type='web_search')]), 'tools[0].type', 'runs itself'),
    ('chat', hi(tools=[bodies.function('a b')]), 'tools[0].name', 'letters'),
    ('chat', hi(tools=[bodies.function('f'), bodies.function('f')]), 'tools', 'twice'),
    (
        'chat',
        hi(tools=[dict(type='function', function=dict(name='f', parameters=dict(properties=dict(x=True))))]),
        'tools[0].parameters.properties.x',
        'object',
    ),
    (
        'chat',
        hi(tools=[dict(type='function', function=dict(name='f', parameters=dict(properties=dict(x=dict(type=7)))))]),
        None,
        'type',
    ),
    ('chat', hi(stream_options=dict(include_usage='yes')), 'stream_options.include_usage', 'true or false'),
    ('chat', hi(user='half \ud800'), None, 'surrogate'),
    ('chat', hi(user=float('nan')), None, 'too large'),
    ('chat', hi(metadata=dict(session_id='a\nb')), 'session_id', 'printable'),
    ('completions', dict(model='k'), 'prompt', 'a string or a list of token ids'),
    ('completions', dict(model='k', prompt=''), 'prompt', 'empty'),
    ('completions', dict(model='k', prompt=['a', 'b']), 'prompt', '2 prompts'),
    ('completions', dict(model='k', prompt=[1, -1]), 'prompt[1]', 'no token id'),
    ('completions', dict(model='k', prompt=[1, True]), 'prompt[1]', 'a whole number'),
    ('completions', dict(model='k', prompt='a', echo=True), 'echo', 'only false'),
    ('completions', dict(model='k', prompt='a', suffix='b'), 'suffix', 'fills in'),
    ('completions', dict(model='k', prompt='a', best_of=3), 'best_of', 'only 1'),
    ('messages', hi(), 'max_tokens', 'required'),
    ('messages', msg(messages=[dict(role='tool', content='')]), 'messages[0].role', 'user, assistant or system'),
    ('messages', msg(messages=[dict(role='user')]), 'messages[0].content', 'required'),
    ('messages', msg(messages=[dict(role='assistant', content='The answer is (')]), 'messages', 'cannot be continued'),
    (
        'messages',
        msg(messages=[dict(role='user', content=[dict(type='image', source={})])]),
        'messages[0].content[0][0]',
        'images',
    ),
    (
        'messages',
        msg(messages=[dict(role='user', content=[bodies.tool_use('a')])]),
        None,
        "'tool_use' is not supported",
    ),
    (
        'messages',
        msg(messages=[dict(role='user', content=[bodies.tool_result('a', 'x')])]),
        'messages',
        'before any assistant',
    ),
    ('messages', msg(system=[dict(type='image')]), 'system[0]', 'images'),
    ('messages', msg(tools=[dict(name='f')]), 'tools[0].input_schema', 'required'),
    ('messages', msg(tools=[dict(name='bash', type='bash_20250124')]), 'tools[0].type', 'runs itself'),
    ('messages', msg(tool_choice=dict(type='any')), 'tool_choice', 'tools: none'),
    (
        'messages',
        msg(tool_choice=dict(type='auto', disable_parallel_tool_use='yes')),
        'tool_choice.disable_parallel_tool_use',
        'true or false expected',
    ),
    ('messages', msg(thinking=dict(type='much')), 'thinking.type', 'adaptive'),
    ('messages', msg(output_config=dict(format=dict(type='json_schema'))), 'output_config.format', 'grammar'),
    ('messages', msg(mcp_servers=[{}]), 'mcp_servers', 'connect'),
    ('messages', msg(fallbacks=[]), 'fallbacks', 'unknown field'),
]


@pytest.mark.parametrize('dialect, body, param, words', WRONG, ids=[f'{d}-{i}' for i, (d, *_) in enumerate(WRONG)])
def test_what_is_wrong_is_named(dialect, body, param, words):
    with pytest.raises(BadRequest) as e:
        parse_call(dialect, body)
    assert e.value.status == 400 and words in e.value.message
    assert param is None or e.value.param == param


def test_unknown_fields_pass_under_a_beta_header_and_inside_messages_and_are_noted():
    c = parse_call('messages', msg(fallbacks=[1], zeta=0), bodies.BETAS)
    assert c.notes == [f'unknown: {NORMALISATIONS["unknown"]} (fallbacks, zeta)']
    c = parse_call(
        'chat', hi(messages=[dict(role='user', content='', mood='glad'), dict(role='user', content='', tone='x')])
    )
    assert c.notes[-1].endswith('(mood, tone)')
    with pytest.raises(BadRequest, match='unknown'):
        parse_call('chat', hi(fallbacks=[]), bodies.BETAS)
    assert parse_call('chat', hi(foo=None, n=None, tools=None, logit_bias={}, n_=None)).n == 1  # null is absent
    with pytest.raises(ValueError, match='dialect'):
        parse_call('responses', hi())


def test_counting_needs_no_max_tokens():
    body = bodies.claude_code(2)
    del body['max_tokens'], body['stream']
    assert (
        parse_call('messages', body, counting=True).messages == parse_call('messages', bodies.claude_code(2)).messages
    )


def test_bodies_must_be_strict_json_of_a_reasonable_size():
    for raw, words in [
        (b'', 'not JSON'),
        (b'[1]', 'an object expected'),
        (b'{"a": NaN}', 'NaN'),
        (b'{"a": 1e999}', 'too large'),
        (b'{"a": "\\ud800"}', 'surrogate'),
        (b'\xff\xfe\xfa', 'not JSON'),
        (b'{"a": ' + b'9' * 5000 + b'}', 'not JSON'),
        (b'{"a":' + b'[' * 200 + b']' * 200 + b'}', 'nested more than 100'),
        (b'{"a":' + b'[' * 200_000, 'not JSON'),
    ]:
        with pytest.raises(BadRequest, match=words) as e:
            parse_call('chat', parse_body(raw))
        assert e.value.status == 400
    with pytest.raises(BadRequest) as e:
        parse_body(b'{}' + b' ' * 99, RequestLimits(bytes=100))
    assert e.value.status == 413
    assert parse_body(json.dumps(bodies.opencode()).encode()) == bodies.opencode()
    for limits, words in ((dict(messages=1), 'messages'), (dict(tools=1), 'tools'), (dict(depth=2), 'nested')):
        with pytest.raises(BadRequest, match=words):
            parse_call('chat', bodies.opencode(), limits=RequestLimits(**limits))


# --- hostile bodies: 10,000 in all, never another exception than BadRequest


def usable(c):
    "What everybody downstream relies on."
    for m in c.messages:
        assert m['role'] in ('system', 'user', 'assistant', 'tool') and isinstance(m['content'], str)
        assert canonical_key(m) == canonical_key(json.loads(json.dumps(m)))
        for t in m.get('tool_calls', ()):
            assert isinstance(t['function']['arguments'], dict) and isinstance(t['id'], str)
    assert [m['role'] for m in c.messages].count('system') <= 1 and all(m['role'] != 'system' for m in c.messages[1:])
    json.dumps([c.tools, c.deferred, c.messages, c.metadata, c.notes, c.sampling.__dict__]).encode()
    assert tools_key(c.callables) and core_messages(c) is not None
    a = Answer('1', 'x', finish='stop', logprobs=[])
    assert json.dumps(render_answer(c, a)) and Stream(c, '1').finish(a)


def attempt(dialect, body, headers=None):
    try:
        c = parse_call(dialect, body, headers)
    except BadRequest as e:
        assert 400 <= e.status < 500 and json.dumps(render_error(dialect, e.status, e.message, param=e.param)).encode()
        return False
    usable(c)
    return True


NASTY = [
    None, True, False, 0, -1, 2**63, 10**400, 1.5, float('nan'), float('inf'), '', ' ', '\ud800', '\x00',
    '💥' * 9, 'a' * 5000, [], {}, [[]], [None], [{}], {'': ''}, {'type': 'text'}, [{'type': 'text', 'text': 7}],
    [{'type': 'tool_result'}], {'type': 'function'}, 'assistant', 'tool', 'system',
    '{"a": [', '<tool_call>', b'bytes', (1,), {1: 2}, {'$ref': '#'}, [{'type': {'type': []}}],
]  # fmt: skip


def spots(x, path=()):
    "Every place in a body."
    yield path
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from spots(v, (*path, k))


def mutate(body, rng):
    "A body with one to four places replaced, dropped, copied or exchanged."
    for _ in range(rng.randint(1, 4)):
        places = [p for p in spots(body) if p]
        if not places:
            return body
        *way, last = rng.choice(places)
        d = body
        for k in way:
            d = d[k]
        act = rng.random()
        if act < 0.6:
            d[last] = copy.deepcopy(rng.choice(NASTY))
        elif act < 0.75:
            del d[last]
        elif act < 0.85 and isinstance(d, list):
            d.insert(last, copy.deepcopy(d[rng.randrange(len(d))]))
        elif isinstance(d, list):
            rng.shuffle(d)
        else:
            d[rng.choice(['x', 'type', 'role', 'content', last])] = d[last]
    return body


@settings(max_examples=98, deadline=None)
@given(st.integers(0, 2**32))
def test_ten_thousand_hostile_bodies_9800_mutants(seed):
    rng = random.Random(seed)
    for _ in range(100):
        dialect, make = bodies.ALL[rng.randrange(len(bodies.ALL))]
        if rng.random() < 0.05:
            dialect = rng.choice(['chat', 'completions', 'messages'])
        attempt(dialect, mutate(make(), rng), bodies.BETAS if rng.random() < 0.5 else None)


words = st.sampled_from(
    'model messages role content tools type text user assistant tool_calls id function name arguments input tool_use '
    'tool_result tool_use_id system prompt max_tokens stop thinking metadata user_id properties'.split()
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=8),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(words | st.text(max_size=4), x, max_size=5),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(['chat', 'completions', 'messages']), st.dictionaries(words, json_values, max_size=6), st.booleans()
)
def test_ten_thousand_hostile_bodies_200_grown(dialect, body, framed):
    if framed:
        body = dict(model='k', messages=[body], max_tokens=9, prompt='x') | (
            {} if dialect == 'completions' else {'messages': [body]}
        )
        body = {
            k: v
            for k, v in body.items()
            if (k == 'prompt') == (dialect == 'completions') or k in ('model', 'max_tokens')
        }
    attempt(dialect, body)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | json_values.map(lambda x: json.dumps(x).encode())
)
def test_hostile_bytes(raw):
    try:
        parse_call('chat', parse_body(raw))
    except BadRequest as e:
        assert e.status == 400


def test_long_bodies_take_no_more_than_their_length():
    n = 5000  # what is quadratic in any of these would take minutes
    attempt('messages', msg(messages=[dict(role='user', content='x' * 1000)] * n))
    attempt(
        'messages', msg(messages=[dict(role='user', content='x'), *[dict(role='system', content='y' * 1000)] * (n - 1)])
    )
    attempt('messages', msg(messages=[dict(role=r, content='z' * 1000) for r in ('user', 'assistant') * (n // 2)][:-1]))
    uses, backs = zip(*[(bodies.tool_use(f't{i}'), bodies.tool_result(f't{i}', 'r')) for i in range(n)])
    assert attempt(
        'messages',
        msg(messages=[dict(role='assistant', content=list(uses)), dict(role='user', content=list(backs)[::-1])]),
    )
    for s in ('jan', 'mon', '1 ', 'may ', '2026-', 'today 2026-11-23 ', 'x-anthropic-a:', '"\\', '<system-reminder>'):
        attempt('chat', hi(messages=[dict(role='user', content='today ' + s * 50_000)]))
    assert attempt(
        'chat', hi(tools=[bodies.function(f'f{i}', **{f'p{j}': 'string' for j in range(20)}) for i in range(1024)])
    )


# --- normalisers


def test_billing_lines():
    line = 'x-anthropic-billing-header: cc_version=2.1.330.a1f; cch=00d5a;'
    assert drop_billing(line) == '' and drop_billing(f'{line}\nx-anthropic-other: 1\nYou.\n') == 'You.\n'
    assert drop_billing(f'See {line}\n') == f'See {line}\n' and drop_billing(f'\n{line}') == f'\n{line}'
    c = parse_call('chat', hi(messages=[dict(role='system', content=f'{line}\nYou.'), dict(role='user', content=line)]))
    assert [m['content'] for m in c.messages] == ['You.', line] and rules(c) == {'billing'}


def test_results_go_to_their_calls():
    ask, answer = dict(role='user', content='q'), dict(role='assistant', content='', tool_calls=[call('a'), call('b')])
    r = {k: dict(role='tool', tool_call_id=k, content=k) for k in 'abc'}
    note, more = dict(role='system', content='n'), dict(role='assistant', content='.')
    done = [ask, answer, r['a'], r['b'], note, more]
    assert order_results([ask, answer, note, r['b'], r['a'], more]) == (done, True)
    assert order_results(done) == (done, False)
    for bad, words in [
        ([r['a'], ask], 'before any assistant'),
        ([ask, answer, r['a']], "'b' has no result"),
        ([ask, answer, r['a'], more, r['b']], "'b' has no result"),
        ([ask, answer, r['a'], r['b'], r['c']], "'c': the assistant"),
        ([ask, answer, r['a'], r['b'], r['a']], "'a' comes twice"),
        ([ask, more, r['a']], "'a': the assistant"),
    ]:
        with pytest.raises(ValueError, match=words):
            order_results(bad)


def test_reminders_stay_in_their_place():
    s, u, a = (lambda t, r=r: dict(role=r, content=t) for r in ('system', 'user', 'assistant'))
    t = dict(role='tool', tool_call_id='x', content='r')
    w = lambda x: f'<system-reminder>\n{x}\n</system-reminder>'
    fold = lambda *m: fold_reminders(list(m))[0]
    assert fold(s('1'), s('2'), u('q')) == [s('1\n\n2'), u('q')] and fold(u('q')) == [u('q')]
    assert fold(u('q'), s('1'), s('2'), a('.')) == [u(f'q\n{w(1)}\n{w(2)}'), a('.')]
    assert fold(a('.'), t, s('1'), u('q')) == [a('.'), t, u(f'{w(1)}\nq')]
    assert fold(t, s('1'), a('.'), s('2')) == [t, u(w(1)), a('.'), u(w(2))]
    assert fold(t, s('1'), u('q'), u('p')) == [t, u(f'{w(1)}\nq'), u('p')]
    assert fold_reminders([s('1'), u('q')])[1] is False and fold_reminders([u('q'), s('1')])[1] is True
    assert merge_turns([u('a'), u('b'), a('c'), u('d')]) == ([u('a\nb'), a('c'), u('d')], True)


entries = st.lists(st.sampled_from(['user', 'system', 'both', 'calls', 'answer']), min_size=1, max_size=8)


def history(kinds, dialect):
    "A well-formed conversation; after an answer always something of the other side."
    out, n = [], 0
    for i, k in enumerate(kinds):
        if k in ('user', 'system'):
            out.append(dict(role=k, content=f'{k} {i}'))
        elif k == 'both':
            out += [dict(role='user', content=f'u {i}'), dict(role='system', content=f's {i}')]
        elif k == 'answer':
            out += [dict(role='user', content='?')] * (not out or out[-1]['role'] != 'user')
            out += [dict(role='assistant', content=f'a {i}'), dict(role='user', content=f'and {i}')]
        else:
            ids = [f'c{n}', f'c{n + 1}']
            n += 2
            if dialect == 'chat':
                out.append(answer_with(*(bodies.fn_call(x) for x in ids)))
                out += [dict(role='tool', tool_call_id=x, content=x) for x in reversed(ids)]
            else:
                out.append(dict(role='assistant', content=[bodies.tool_use(x) for x in ids]))
                out.append(
                    dict(
                        role='user', content=[bodies.text(f't {i}'), *(bodies.tool_result(x, x) for x in reversed(ids))]
                    )
                )
            out.append(dict(role='system', content=f'left {i}'))
    return out


@few
@given(st.sampled_from(['chat', 'messages']), entries, entries)
def test_what_is_appended_never_changes_what_came_before(dialect, before, after):
    a, b = (
        history(before, dialect),
        history(before, dialect) + [dict(role='assistant', content='.')] + history(['user', *after], dialect),
    )
    read = lambda m: parse_call(dialect, msg(messages=m)).messages
    got = read(a)
    assert read(b)[: len(got)] == got


# --- what is equal


def test_keys_do_not_see_what_agents_change():
    base = dict(
        role='assistant', content='I look.', reasoning='hm', tool_calls=[call('1', path='a', n=3, f=0.5, big=2**53)]
    )
    k = canonical_key(base)
    raw = lambda s: dict(id='z', type='function', function=dict(name='view', arguments=s))
    for same in [
        {**base, 'reasoning': 'other'},
        {x: v for x, v in base.items() if x != 'reasoning'},
        {**base, 'content': '\n I look. '},
        {**base, 'tool_calls': [raw('{"big": 9007199254740993, "f": 5e-1, "path": "a", "n": 3.0}')]},
        {**base, 'tool_calls': [raw(dict(n=3, f=0.5, big=2.0**53, path='a'))]},
        {**base, 'name': 'kat'},
    ]:
        assert canonical_key(same) == k and not any(r.startswith('different') for r in explain(base, same))
    for other in [
        {**base, 'content': 'I  look.'},
        {**base, 'tool_calls': []},
        {**base, 'tool_calls': base['tool_calls'] * 2},
        {**base, 'tool_calls': [raw('{"path": "b", "n": 3, "f": 0.5, "big": 9007199254740992}')]},
        {**base, 'tool_calls': [raw('{"path": "a", "n": true, "f": 0.5, "big": 9007199254740992}')]},
        {**base, 'role': 'user'},
    ]:
        assert canonical_key(other) != k and explain(base, other)[0].startswith('different')
    assert canonical_key(dict(role='assistant', content=None)) == canonical_key(
        dict(role='assistant', content='', tool_calls=[])
    )
    assert canonical_key(dict(role='assistant', content='', tool_calls=[raw('')])) == canonical_key(
        dict(role='assistant', content='', tool_calls=[raw(None)])
    )
    u = lambda s: dict(role='user', content=s)
    assert canonical_key(u('a')) != canonical_key(u('a ')) != canonical_key(dict(role='system', content='a '))
    r = dict(role='tool', tool_call_id='1', content='x')
    assert canonical_key(r) == canonical_key({**r, 'tool_call_id': '2'}) != canonical_key({**r, 'error': True})


def test_the_key_is_the_same_in_every_process():
    assert (
        canonical_key(dict(role='assistant', content='hi ☃', tool_calls=[call('1', n=1)]))
        == '5eab25fa454e46da1257e53998e624bc'
    )


def test_explain_names_each_reason():
    a = dict(role='assistant', content='x', reasoning='r', tool_calls=[call('1', a=1, b=2)])
    assert explain(a, a) == []
    assert explain(a, dict(role='assistant', content='x ', tool_calls=[call('2', b=2, a=1)])) == [
        'white space',
        'reasoning dropped',
        'arguments rewritten',
        'ids renamed',
    ]
    assert explain(a, {**a, 'reasoning': 'q'}) == ['reasoning rewritten']
    day = lambda d: dict(role='system', content=f"You.\nToday's date: {d}")
    assert explain(day('2026-11-23'), day('2026-11-24')) == ['date']
    assert explain(day('x'), day('y')) == ['different content'] and explain(a, day('x')) == [
        'different role: assistant, system'
    ]
    assert explain({**a, 'content': 'y'}, {**a, 'tool_calls': []}) == ['different content', 'different calls']


@pytest.mark.parametrize(
    'date',
    ['2026-11-23', '2026/11/23', '11/23/2026', '23.11.2026', 'November 23, 2026', 'Monday, November 23, 2026',
     'Mon Nov 23 2026', '23 Nov 2026', '2026-11-23 14:03', '2026-11-23T14:03:59.123Z', 'Nov 3rd, 2026 9:15 PM UTC'],
)  # fmt: skip
def test_dates_of_today(date):
    for line in (
        f"Today's date: {date}",
        f'Current date is {date}.',
        f'  Date: {date}',
        f'currentDate\nToday is {date}!',
    ):
        assert mask_dates(line) == line.replace(date, '<date>')
    assert mask_dates(f'update: {date}\nreleased {date}') == f'update: {date}\nreleased {date}'


json_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
args = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        json_leaves,
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@few
@given(args, st.randoms(use_true_random=False))
def test_canonical_json_survives_any_rewriting(x, rng):
    def rewrite(v):
        if isinstance(v, dict):
            items = list(v.items())
            rng.shuffle(items)
            return {k: rewrite(w) for k, w in items}
        if isinstance(v, list):
            return [rewrite(w) for w in v]
        whole = isinstance(v, (int, float)) and not isinstance(v, bool) and float(v).is_integer() and abs(v) < 2**53
        return rng.choice([int, float])(v) if whole else v

    again = json.loads(json.dumps(rewrite(x), indent=rng.choice([None, 2])))
    assert canonical_json(again) == canonical_json(x)
    tools = [bodies.function('a', x='string'), bodies.function('b')]
    assert tools_key(tools) == tools_key(tools[::-1]) != tools_key(tools[:1])


# --- answers and streams, against the published types of the openai and anthropic libraries


def optional(spec):
    return ('optional', spec)


USAGE = dict(
    prompt_tokens=int, completion_tokens=int, total_tokens=int, prompt_tokens_details=optional(dict(cached_tokens=int))
)
TOP = dict(token=str, logprob=float, bytes=optional([int]))
LOGPROBS = optional(dict(content=optional([TOP | dict(top_logprobs=[TOP])]), refusal=optional([str])))
TOOL_CALL = dict(id=str, type={'function'}, function=dict(name=str, arguments=str))
REASONS_CHAT = {'stop', 'length', 'tool_calls'}
MESSAGE = dict(
    role={'assistant'}, content=optional(str), refusal=optional(str), tool_calls=optional([TOOL_CALL]),
    reasoning_content=optional(str),  # not OpenAI's: the name that open servers and agents agree on
)  # fmt: skip
CHAT = dict(
    id=str, object={'chat.completion'}, created=int, model=str, usage=USAGE,
    choices=[dict(index=int, message=MESSAGE, logprobs=LOGPROBS, finish_reason=REASONS_CHAT)],
)  # fmt: skip
DELTA = dict(
    role=optional({'assistant'}), content=optional(str), reasoning_content=optional(str),
    tool_calls=optional([TOOL_CALL | dict(index=int)]),
)  # fmt: skip
CHUNK = dict(
    id=str, object={'chat.completion.chunk'}, created=int, model=str, usage=optional(USAGE),
    choices=[dict(index=int, delta=DELTA, logprobs=LOGPROBS, finish_reason=optional(REASONS_CHAT))],
)  # fmt: skip
TEXT_LOGPROBS = optional(dict(tokens=[str], token_logprobs=[float], top_logprobs=optional([dict]), text_offset=[int]))
TEXT = dict(
    id=str, object={'text_completion'}, created=int, model=str, usage=optional(USAGE),
    choices=[dict(text=str, index=int, logprobs=TEXT_LOGPROBS, finish_reason=optional({'stop', 'length'}))],
)  # fmt: skip
COUNTS = dict(input_tokens=int, output_tokens=int, cache_creation_input_tokens=int, cache_read_input_tokens=int)
BLOCKS = dict(
    text=dict(type={'text'}, text=str),  # no citations: null, which the AI SDK refuses
    thinking=dict(type={'thinking'}, thinking=str, signature=str),
    tool_use=dict(type={'tool_use'}, id=str, name=str, input=dict, caller=dict(type={'direct'})),
)
MSG = dict(
    id=str, type={'message'}, role={'assistant'}, model=str, content=[BLOCKS], usage=COUNTS,
    stop_sequence=optional(str), stop_reason=optional({'end_turn', 'max_tokens', 'stop_sequence', 'tool_use'}),
)  # fmt: skip
EVENTS = dict(
    message_start=dict(type=str, message=MSG),
    content_block_start=dict(type=str, index=int, content_block=BLOCKS),
    content_block_delta=dict(type=str, index=int, delta=dict(
        text_delta=dict(type=str, text=str), thinking_delta=dict(type=str, thinking=str),
        signature_delta=dict(type=str, signature=str), input_json_delta=dict(type=str, partial_json=str))),
    content_block_stop=dict(type=str, index=int),
    message_delta=dict(type=str, delta=dict(stop_reason=MSG['stop_reason'], stop_sequence=optional(str)), usage=COUNTS),
    message_stop=dict(type=str), ping=dict(type=str),
)  # fmt: skip


def fits(x, spec, where='answer'):
    "No field is missing, none is of another type, none is unknown. A dictionary of dictionaries by `type` is a union."
    if isinstance(spec, tuple):
        return x is None or fits(x, spec[1], where)
    if isinstance(spec, set):
        assert x in spec, f'{where}: {x!r}'
    elif isinstance(spec, list):
        assert isinstance(x, list), where
        for i, v in enumerate(x):
            fits(v, spec[0], f'{where}[{i}]')
    elif isinstance(spec, type):
        assert isinstance(x, spec) and not (spec is int and isinstance(x, bool)), f'{where}: {x!r}'
    elif isinstance(x, dict) and x.get('type') in spec and 'type' not in spec:
        fits(x, spec[x['type']], f'{where}({x["type"]})')
    else:
        assert isinstance(x, dict) and set(x) <= set(spec), f'{where}: {set(x) - set(spec)}'
        for k, s in spec.items():
            assert k in x or isinstance(s, tuple), f'{where}.{k} is missing'
            fits(x.get(k), s, f'{where}.{k}')
    return True


def events(chunks):
    "Server-sent events as (name, data)."
    out = []
    for raw in b''.join(chunks).decode().split('\n\n'):
        lines = dict(re.findall(r'^(event|data): (.*)$', raw, re.M))
        if lines:
            out.append((lines.get('event'), lines['data'] if lines['data'] == '[DONE]' else json.loads(lines['data'])))
    return out


def assemble(dialect, chunks):
    "The whole answer as a client library puts it together from a stream."
    if dialect == 'messages':
        return assemble_message(events(chunks))
    evs = events(chunks)
    assert evs[-1] == (None, '[DONE]') and all(e is None for e, _ in evs)
    out, usage = None, None
    for _, d in evs[:-1]:
        fits(d, CHUNK if dialect == 'chat' else TEXT)
        usage = d.get('usage') or usage
        if out is None:
            out = {k: d[k] for k in ('id', 'created', 'model')} | dict(
                object=d['object'].removesuffix('.chunk'), text='', message={}
            )
        for c in d['choices']:
            assert c['index'] == 0
            out |= {k: c[k] for k in ('logprobs', 'finish_reason') if c[k] is not None or k not in out}
            for k, v in c.get('delta', dict(text=c.get('text'))).items():
                if k == 'tool_calls':
                    for t in v:
                        assert t.pop('index') == len(out['message'].get('tool_calls', []))
                        out['message'].setdefault('tool_calls', []).append(t)
                elif k == 'text':
                    out['text'] += v
                else:
                    out['message'][k] = out['message'].get(k, '') + v
    if dialect == 'chat' and not out['message']['content'] and out['message'].get('tool_calls'):
        out['message']['content'] = None
    message, text = out.pop('message') | dict(refusal=None), out.pop('text')
    rest = dict(message=message) if dialect == 'chat' else dict(text=text)
    choice = dict(index=0, logprobs=out.pop('logprobs'), finish_reason=out.pop('finish_reason')) | rest
    return out | dict(choices=[choice], usage=usage)


def assemble_message(evs):
    "The same for the Messages API, checking that blocks open, grow and close one at a time."
    out, open, js = None, None, ''
    assert [e for e, _ in evs][-2:] == ['message_delta', 'message_stop']
    for name, d in evs:
        fits(d, EVENTS)
        assert name == d['type']
        if name == 'message_start':
            assert out is None
            out = d['message']
        elif name == 'content_block_start':
            assert open is None and d['index'] == len(out['content'])
            open, js = d['index'], ''
            out['content'].append(d['content_block'])
        elif name == 'content_block_delta':
            assert d['index'] == open
            b, x = out['content'][open], d['delta']
            js += x.get('partial_json', '')
            for k in ('text', 'thinking', 'signature'):
                if k in x:
                    b[k] += x[k]
        elif name == 'content_block_stop':
            assert d['index'] == open
            if out['content'][open]['type'] == 'tool_use':
                out['content'][open]['input'] = json.loads(js)
            open = None
        elif name == 'message_delta':
            assert open is None
            out |= d['delta'] | dict(usage=d['usage'])
    return out


def text_in_one(m):
    "A message with its text in one block before its calls, as a whole answer has it."
    texts, others = [b for b in m['content'] if b['type'] == 'text'], [b for b in m['content'] if b['type'] != 'text']
    at = next((i for i, b in enumerate(others) if b['type'] == 'tool_use'), len(others))
    one = [dict(type='text', text='\n'.join(b['text'] for b in texts))] if texts else []
    return m | dict(content=others[:at] + one + others[at:])


pieces = st.lists(
    st.one_of(
        st.text(max_size=6).map(lambda s: dict(text=s)),
        st.text(max_size=6).map(lambda s: dict(reasoning=s)),
        args.map(lambda a: dict(calls=[call('x', 'f', **{f'k{i}': v for i, v in enumerate(a.values())})])),
    ),
    max_size=6,
).map(lambda ps: sorted(ps, key=lambda p: 'reasoning' not in p))  # reasoning comes first, as models write it


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(['chat', 'completions', 'messages']), pieces, st.integers(0, 6),
    st.sampled_from(['stop', 'length', 'tool_calls']), st.sampled_from(['shown', 'omitted', 'off']),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_a_stream_says_what_the_answer_says(dialect, parts, sent, finish, thinking, usage, logprobs):
    c = parse_call(dialect, dict(model='kat', prompt='p') if dialect == 'completions' else msg())
    c.thinking, c.usage = thinking, usage
    if dialect != 'messages' and logprobs:
        c.sampling.logprobs = 1
    text, seen = '', False
    for p in parts:  # as the parser gives them out: text after a call begins a line
        if 'text' in p:
            if seen and text and p['text'].strip('\n'):
                p['text'], seen = '\n' + p['text'].strip('\n'), False
            elif seen:
                p['text'] = ''
            text += p['text']
        seen = seen or 'calls' in p
    reasoning = ''.join(p.get('reasoning', '') for p in parts)
    calls = [t for p in parts for t in p.get('calls', [])]
    lp = [TokenLogprob('☃', -0.5, [('☃', -0.5), ('x', -1.0)])]
    a = Answer(
        'x1', text, reasoning, calls, finish, 10, 5, 4,
        stop='END' if finish == 'stop' else None, logprobs=lp, created=9,
    )  # fmt: skip
    s = Stream(c, 'x1', created=9)
    out = s.start(10, 4)
    for p in parts[:sent]:
        out += s.delta(**p) + s.ping()
    out += s.finish(a)
    whole = render_answer(c, a)
    fits(whole, dict(chat=CHAT, completions=TEXT, messages=MSG)[dialect])
    got = assemble(dialect, out)
    if dialect == 'messages':
        got = text_in_one(got)
    else:
        got['usage'] = got['usage'] or whole['usage']
        assert usage == any(d != '[DONE]' and d.get('usage') for _, d in events(out))
    assert got == whole


TOKENIZER = train_tokenizer(['I look at both. <think> {"name": "view", "arguments": {"path": "a"}}'] * 8, 330)
PARTS = [
    'I look.',
    ' naïve 𝄞☃ ',
    '\n',
    '<tool',
    '</tool_call>',
    '<think>',
    'GOOD',
    '<tool_call>{"name": </tool_call>',
    '{',
]


@few
@given(
    st.sampled_from(['chat', 'messages']), st.sampled_from(['kat', 'hermes', 'qwen3_coder', 'llama3']), st.booleans(),
    st.lists(st.sampled_from(PARTS), max_size=7), st.integers(1, 3),
)  # fmt: skip
def test_from_tokens_to_events_and_back(dialect, format, think, parts, step):
    "A stream made token by token, whatever the tokens split, is the answer made of the whole text."
    tools = [bodies.function('view', path='string', line='integer')]
    body = msg(
        tools=[dict(name='view', input_schema=bodies.schema(path='string', line='integer'))]
        if dialect == 'messages'
        else tools
    )
    c = parse_call(dialect, body | (dict(thinking=dict(type='adaptive')) if dialect == 'messages' else {}))
    good = write_call('view', dict(path='ä 𝄞.py', line=3) if format != 'kat' else dict(path='ä𝄞.py', line=3), format)
    text = ('<think>hm ☃\n</think>\n' if think else '') + ''.join(good if p == 'GOOD' else p for p in parts)
    ids = TOKENIZER.encode(text)
    d, p, s = Decoder(TOKENIZER), CallParser(c.callables, format, prefix='t_'), Stream(c, 'x', created=1)
    out = s.start()
    for new in [d.feed(ids[i : i + step]) for i in range(0, len(ids), step)] + [d.finish()]:
        for piece in p.feed(new):
            out += s.delta(**piece)
    for piece in p.finish():
        out += s.delta(**piece)
    r = parse_reply(TOKENIZER.decode(ids), c.callables, format, prefix='t_')
    a = Answer('x', r.content, r.reasoning, r.calls, 'stop', created=1)
    out += s.finish(a)
    whole = render_answer(c, a)
    got = assemble(dialect, out)
    if dialect == 'chat':
        assert got | dict(usage=0) == whole | dict(usage=0)
    else:
        assert text_in_one(got) == whole


def test_nothing_is_sent_that_the_record_does_not_have():
    c = parse_call('chat', hi(stream=True))
    for sent, answer in [
        (dict(text='Hello'), Answer('1', 'Help')),
        (dict(reasoning='hm'), Answer('1', 'x')),
        (dict(calls=[call('a')]), Answer('1', tool_calls=[call('b')])),
    ]:
        s = Stream(c, '1')
        s.delta(**sent)
        with pytest.raises(ValueError, match='does not begin with what was sent'):
            s.finish(answer)


def test_failures_in_mid_stream_and_signs_of_life():
    for dialect in ('chat', 'messages'):
        s = Stream(parse_call(dialect, msg(stream=True)), '1')
        out = events(s.start() + s.delta(text='a') + s.finish(Answer('1', 'a', finish='error', error='out of memory')))
        name, data = out[-1]
        assert data == render_error(dialect, 500, 'out of memory') and name == (
            'error' if dialect == 'messages' else None
        )
        assert data['error']['type'] == ('api_error' if dialect == 'messages' else 'server_error')
        with pytest.raises(ValueError, match='render_error'):
            render_answer(s.call, Answer('1', finish='error'))
    assert s.ping() == [b'event: ping\ndata: {"type":"ping"}\n\n']
    assert Stream(parse_call('chat', hi()), '1').ping() == [b': ping\n\n']
    c = parse_call('chat', bodies.openai_sdk())
    with pytest.raises(ValueError, match='logprobs: asked for'):
        render_answer(c, Answer('1', 'x'))


def test_reasons_and_counts():
    chat, msgs, comp = (
        parse_call('chat', hi()),
        parse_call('messages', msg()),
        parse_call('completions', bodies.completion() | dict(logprobs=None)),
    )
    t = [call('a')]
    reason = lambda c, **kw: render_answer(c, Answer('1', **kw))
    assert reason(chat, tool_calls=t, finish='stop')['choices'][0]['finish_reason'] == 'tool_calls'
    assert reason(chat, tool_calls=t, finish='length')['choices'][0]['finish_reason'] == 'length'
    assert reason(chat, finish='tool_calls')['choices'][0]['finish_reason'] == 'stop'
    assert reason(comp, content='x', tool_calls=t, finish='tool_calls')['choices'][0]['finish_reason'] == 'stop'
    ways = (dict(tool_calls=t), dict(finish='length'), dict(stop='E'), {})
    assert [reason(msgs, **kw)['stop_reason'] for kw in ways] == [
        'tool_use', 'max_tokens', 'stop_sequence', 'end_turn']  # fmt: skip
    m = reason(msgs, prompt_tokens=100, cached_tokens=90, completion_tokens=7)
    assert m['usage'] == dict(
        input_tokens=10, cache_read_input_tokens=90, cache_creation_input_tokens=0, output_tokens=7
    )
    assert m['content'] == [] and reason(chat)['choices'][0]['message']['content'] == ''
    comp.sampling.logprobs = 1
    lp = [TokenLogprob('ab', -0.1, [('ab', -0.1), ('c', -3.0)]), TokenLogprob('c', -0.2)]
    assert render_answer(comp, Answer('1', 'abc', logprobs=lp))['choices'][0]['logprobs'] == dict(
        tokens=['ab', 'c'], token_logprobs=[-0.1, -0.2], top_logprobs=[{'ab': -0.1}, {}],
        text_offset=[0, 2])  # fmt: skip
    assert call_prefix('messages', '1') == 'toolu_1_' and call_prefix('chat', '1') == 'call_1_'


def test_what_an_agent_sends_back_has_the_key_of_the_answer():
    "Each dialect's own answer, echoed as a client would, is recognised; also when its thinking is gone."
    a = Answer('1', 'I look.', 'hm', [call('call_1_0', path='ü', n=1.0), call('call_1_1')], 'tool_calls')
    recorded = canonical_key(dict(role='assistant', content=a.content, reasoning=a.reasoning, tool_calls=a.tool_calls))
    results = ['call_1_0', 'call_1_1']
    m = render_answer(parse_call('chat', hi()), a)['choices'][0]['message']
    back = parse_call('chat', chat_with(m, *(dict(role='tool', tool_call_id=i, content='') for i in results))).messages[
        1
    ]
    assert canonical_key(back) == recorded and back['reasoning'] == 'hm'
    for thinking in ('shown', 'omitted', 'off'):
        c = parse_call('messages', msg())
        c.thinking = thinking
        whole = render_answer(c, a)
        s = Stream(c, '1')
        streamed = assemble_message(events(s.start() + s.finish(a)))
        for got in (whole, streamed):
            turn = dict(role='assistant', content=got['content'])
            back = parse_call(
                'messages',
                msg(
                    messages=[
                        dict(role='user', content='hi'),
                        turn,
                        dict(role='user', content=[bodies.tool_result(i, '') for i in results]),
                    ]
                ),
            ).messages[1]
            assert canonical_key(back) == recorded and back.get('reasoning') == ('hm' if thinking == 'shown' else None)


def test_errors_models_and_counts():
    e = render_error('messages', 429, 'slow down')
    assert e == dict(type='error', error=dict(type='rate_limit_error', message='slow down'), request_id=None)
    kinds = {s: render_error('messages', s, '')['error']['type'] for s in (400, 401, 403, 404, 409, 413, 500, 503, 529)}
    assert kinds == {
        400: 'invalid_request_error', 401: 'authentication_error', 403: 'permission_error', 404: 'not_found_error',
        409: 'invalid_request_error', 413: 'request_too_large', 500: 'api_error', 503: 'overloaded_error',
        529: 'overloaded_error'}  # fmt: skip
    assert render_error('chat', 404, 'no', param='model', code='model_not_found') == dict(
        error=dict(message='no', type='invalid_request_error', param='model', code='model_not_found'))  # fmt: skip
    assert render_error('completions', 503, 'x', type='busy')['error']['type'] == 'busy'
    assert re.match(r'prompt is too long: \d+ tokens > \d+ maximum', too_long('messages', 9, 8).message)
    assert too_long('chat', 9, 8).code == 'context_length_exceeded' and too_long('chat', 9, 8).status == 400
    openai = dict(object={'list'}, data=[dict(id=str, object={'model'}, created=int, owned_by=str)])
    both = models_answer(['a', 'b'], created=86400)
    fits(
        dict(object='list', data=[{k: m[k] for k in ('id', 'object', 'created', 'owned_by')} for m in both['data']]),
        openai,
    )
    assert (
        both['data'][0] | dict(type='model', display_name='a', created_at='1970-01-02T00:00:00Z', lifecycle='active')
        == both['data'][0]
    )
    assert (both['first_id'], both['last_id'], both['has_more']) == ('a', 'b', False) and models_answer([])[
        'first_id'
    ] is None
    assert count_tokens_answer(7) == dict(input_tokens=7)
