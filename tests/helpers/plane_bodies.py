"""Requests of the shape that real agents send (keys, nesting, order, quirks); every word of them is ours.

Shared by the tests of the data plane. Each function returns a fresh body, so tests may change it.
"""

import json

BETAS = {'anthropic-beta': 'claude-code-20250219,interleaved-thinking-2025-05-14'}


def text(s, mark=False):
    return dict(type='text', text=s) | (dict(cache_control=dict(type='ephemeral')) if mark else {})


def schema(**props):
    return dict(type='object', properties={k: dict(type=v) for k, v in props.items()}, required=list(props))


def tool_use(id, name='Read', **args):
    return dict(type='tool_use', id=id, name=name, input=args)


def tool_result(id, content, **more):
    return dict(type='tool_result', tool_use_id=id, content=content, **more)


def claude_code(turn=1, cch='0aaa9', agent=None):
    "Claude Code's request of turn 1, 2 or 3 of a session; each re-serialises what the one before sent."
    billing = f'x-anthropic-billing-header: cc_version=2.1.330.{cch[:3]}; cc_entrypoint=sdk-cli; cch={cch};'
    messages = [
        dict(
            role='user',
            content=[text('<system-reminder>\nRules of the house.\n</system-reminder>'), text('Fix add.', turn == 1)],
        ),
        dict(
            role='system',
            content=[text('# Environment\nToday is 2026-11-23.', turn == 1)]
            if turn == 1
            else '# Environment\nToday is 2026-11-23.',
        ),
    ]
    if turn > 1:
        messages += [
            dict(
                role='assistant',
                content=[
                    dict(type='thinking', thinking='', signature='c2ln'),
                    text('I look at both.'),
                    tool_use('toolu_1', file_path='a.py', limit=10),
                    tool_use('toolu_2', 'Bash', command='pytest -q'),
                ],
            ),
            dict(
                role='user',
                content=[
                    tool_result('toolu_2', '1 failed', is_error=True),
                    tool_result('toolu_1', [text('def add(a, b): return a - b', turn == 2)]),
                ],
            ),
            dict(role='system', content='<total_tokens>899000 tokens left</total_tokens>'),
        ]
    if turn > 2:
        messages += [
            dict(role='assistant', content='The sign is wrong.'),
            dict(role='user', content=[text('Then change it.', True)]),
        ]
    return dict(
        model='kat',
        messages=messages,
        system=[
            text(billing + (' cc_is_subagent=true;' if agent else '')),
            text('You are an agent that fixes bugs.', True),
            text('Be brief.', True),
        ],
        tools=[
            dict(name='Read', description='Read a file.', input_schema=schema(file_path='string', limit='integer')),
            dict(name='Bash', description='Run a command.', input_schema=schema(command='string')),
            dict(name='WebFetch', description='Fetch a page.', input_schema=schema(url='string'), defer_loading=True),
        ],
        metadata=dict(user_id=json.dumps(dict(device_id='d1', account_uuid='', session_id='11111111-2222'))),
        max_tokens=32000,
        thinking=dict(type='adaptive', display='omitted'),
        context_management=dict(edits=[dict(type='clear_thinking_20251015', keep='all')]),
        output_config=dict(effort='high'),
        stream=True,
    )


def compaction():
    "Claude Code's request for a summary: the same prefix, no thinking, one more user message."
    body = claude_code(3) | dict(thinking=dict(type='disabled'))
    body['messages'].append(dict(role='assistant', content=[text('Done.')]))
    body['messages'].append(dict(role='user', content=[text('Text only: sum up what was done.')]))
    return body


def anthropic_sdk():
    "The plainest request of the anthropic library."
    return dict(model='kat', max_tokens=100, messages=[dict(role='user', content='Hello')], system='Be brief.')


def function(name, **props):
    return dict(type='function', function=dict(name=name, description=f'{name}.', parameters=schema(**props)))


def fn_call(id, name='bash', arguments='{}'):
    return dict(id=id, type='function', function=dict(name=name, arguments=arguments))


def mini_swe_agent():
    "mini-swe-agent through litellm: no stream, one tool, its own fields in the answers that it sends back."
    return dict(
        model='kat',
        temperature=0.0,
        parallel_tool_calls=True,
        tools=[function('bash', command='string')],
        messages=[
            dict(role='system', content='You solve tasks in a shell.'),
            dict(role='user', content='Fix add in calc.py.'),
            dict(
                role='assistant',
                content='I look.',
                tool_calls=[fn_call('call_1', arguments='{"command": "cat calc.py"}')],
                function_call=None,
                provider_specific_fields=dict(refusal=None),
            ),
            dict(
                role='tool',
                tool_call_id='call_1',
                content='<returncode>0</returncode>\n<output>\nreturn a - b\n</output>',
            ),
        ],
    )


def opencode():
    "opencode: a stream with counts, parallel calls with empty text, blocks, tool_choice auto."
    return dict(
        model='kat',
        max_tokens=32000,
        top_p=1,
        stream=True,
        stream_options=dict(include_usage=True),
        tool_choice='auto',
        tools=[function('read', path='string'), function('grep', pattern='string')],
        messages=[
            dict(role='system', content='You fix bugs.'),
            dict(role='user', content=[dict(type='text', text='Fix add.')]),
            dict(
                role='assistant',
                content='',
                reasoning_content='Both at once.',
                tool_calls=[fn_call('c1', 'read', '{"path":"a.py"}'), fn_call('c2', 'grep', '{"pattern":"add"}')],
            ),
            dict(role='tool', tool_call_id='c2', content='a.py:1'),
            dict(role='tool', tool_call_id='c1', content='def add'),
        ],
    )


def openai_sdk():
    "The openai library: a developer message, log-probs, a stop string."
    return dict(
        model='kat',
        messages=[dict(role='developer', content='Be brief.'), dict(role='user', content='Hello', name='ann')],
        max_completion_tokens=20,
        logprobs=True,
        top_logprobs=2,
        stop='\n\n',
        seed=7,
        user='u-1',
        store=False,
    )


def completion():
    "The older completions."
    return dict(model='kat', prompt=[1, 2, 3], max_tokens=4, logprobs=1, stream=False, echo=False, n=1)


ALL = [
    ('messages', claude_code),
    ('messages', lambda: claude_code(2)),
    ('messages', lambda: claude_code(3)),
    ('messages', compaction),
    ('messages', anthropic_sdk),
    ('chat', mini_swe_agent),
    ('chat', opencode),
    ('chat', openai_sdk),
    ('completions', completion),
]
