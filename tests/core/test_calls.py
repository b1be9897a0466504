"Calls in a model's answer: every format, whole or in any pieces, nothing lost, second opinions where there are any."

import json
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from kat.core.calls import CallParser, Decoder, Reply, parse_reply
from kat.core.formats import FORMATS, check_json, loads_strict, write_call
from kat.core.template import parse_calls, train_tokenizer

many = settings(max_examples=200, deadline=None)
few = settings(max_examples=60, deadline=None)


def tool(name, required=None, **props):
    p = {k: {'type': v} if isinstance(v, str) else v for k, v in props.items()}
    return dict(
        type='function',
        function=dict(name=name, parameters=dict(type='object', properties=p, required=required or list(p))),
    )


TOOLS = [
    tool('view', path='string', line='integer'),
    tool('write', path='string', text='string'),
    tool(
        'mix',
        a='integer',
        b='number',
        c='boolean',
        d='array',
        e='object',
        f=dict(anyOf=[{'type': 'integer'}, {'type': 'null'}]),
        g='string',
    ),
    tool('submit'),
]


def functions(reply):
    return [(c['function']['name'], c['function']['arguments']) for c in reply.calls]


def in_pieces(text, cuts, *args, **kw):
    "The reply of the pieces, checked against what was given out on the way."
    p, out, at = CallParser(*args, **kw), [], 0
    for c in sorted({min(c, len(text)) for c in cuts}) + [len(text)]:
        out += p.feed(text[at:c])
        at = c
    out += p.finish()
    assert all(len(x) == 1 and all(x.values()) for x in out)
    joined = {k: [x[k] for x in out if k in x] for k in ('text', 'reasoning', 'calls')}
    r = p.reply
    assert (''.join(joined['text']), ''.join(joined['reasoning']), sum(joined['calls'], [])) == (
        r.content,
        r.reasoning,
        r.calls,
    )
    return r


# --- formats (which one a template writes: test_templates.py)


TAGGED = [f for f, form in FORMATS.items() if form.close and not form.channels]  # calls and text in any order
words = st.text('ab1 é𝄞"\\\n<>/{}', max_size=6)
values = dict(
    a=st.integers(-99, 99), b=st.floats(-9, 9) | st.integers(-9, 9), c=st.booleans(),
    d=st.lists(st.integers(0, 9) | words, max_size=2),
    e=st.dictionaries(words, words, max_size=2), f=st.none() | st.integers(0, 9), g=words,
)  # fmt: skip
mixed = st.fixed_dictionaries(values)


@many
@given(mixed, st.sampled_from(sorted({*FORMATS} - {'kat'})), st.lists(st.integers(0, 400), max_size=8))
def test_what_a_model_writes_is_read_back(args, format, cuts):
    text = write_call('mix', args, format)
    r = in_pieces(text, cuts, TOOLS, format)
    assert functions(r) == [('mix', args)] and (r.content, r.malformed) == ('', [])
    assert [type(v) for v in r.calls[0]['function']['arguments'].values()] == [type(v) for v in args.values()]
    assert r.calls[0] | dict(function=0) == dict(id='call_0', type='function', function=0)


def test_several_calls_text_and_thinking():
    for f in TAGGED:
        a, b = write_call('view', dict(path='a', line=1), f), write_call('view', dict(path='b', line=2), f)
        want = [('view', dict(path='a', line=1)), ('view', dict(path='b', line=2))]
        for text, content, reasoning in [
            (f'{a}{b}', '', ''),
            (f'Look.\n\n{a}\n{b}\n', 'Look.', ''),
            (f'<think>\nhm\n</think>\n\nLook.\n{a}\n{b}', 'Look.', 'hm'),
            (f' <think> </think>{a}then {b} done ', 'then\ndone ', ''),
            (f'  Look  {a} so {b}', '  Look\nso', ''),
        ]:
            r = parse_reply(text, TOOLS, f, prefix='toolu_9_')
            assert (functions(r), r.content, r.reasoning, r.malformed) == (want, content, reasoning, [])
            assert [c['id'] for c in r.calls] == ['toolu_9_0', 'toolu_9_1']
    two = parse_reply(
        '<|python_tag|>{"name": "view", "parameters": {"path": "a"}}; {"name": "submit", "arguments": {}}',
        TOOLS,
        'llama3',
    )
    assert functions(two) == [('view', dict(path='a')), ('submit', {})]
    assert parse_reply('hm\n</think>\nyes', TOOLS, 'hermes', thinking=True) == Reply('yes', 'hm')
    assert parse_reply('<think>never ends ', TOOLS, 'hermes') == Reply('', 'never ends')
    assert parse_reply('a <think>b</think>', TOOLS, 'hermes') == Reply('a <think>b</think>')  # only at the start


def test_without_tools_or_a_format_everything_is_text():
    text = 'a ' + write_call('view', dict(path='a', line=1))
    assert parse_reply(text, [], 'hermes').content == parse_reply(text, TOOLS, None).content == text
    assert parse_reply('{"name": "view", "parameters": {}}', [], 'llama3').calls == []


@pytest.mark.parametrize(
    'format, text, why',
    [
        ('hermes', '<tool_call>{"name": "view", "arguments": {}</tool_call>', 'not JSON'),
        ('hermes', '<tool_call>{"name": 3}</tool_call>', 'an object with a "name"'),
        ('hermes', '<tool_call></tool_call>', 'not JSON'),
        ('hermes', '<tool_call>{"name": "view", "arguments": [1]}</tool_call>', 'view: arguments must be an object'),
        ('hermes', '<tool_call>{"name": "view", "arguments": "[}"}</tool_call>', 'not JSON'),
        ('hermes', '<tool_call>{"name": "view", "arguments": {"line": NaN}}</tool_call>', 'NaN is not JSON'),
        ('hermes', '<tool_call>{"name": "view", "arguments": {"line": 1e999}}</tool_call>', 'a number too large'),
        ('hermes', '<tool_call>{"name": "view", "arguments": {"path": "\\ud800"}}</tool_call>', 'surrogate'),
        (
            'hermes',
            '<tool_call>{"name": "view", "arguments": {"x": ' + '[' * 101 + ']' * 101 + '}}</tool_call>',
            'nested more than 100',
        ),
        ('hermes', '<tool_call>' + '[' * 100_000 + '</tool_call>', 'not JSON'),
        ('hermes', '<tool_call>{"name": "view"', 'not closed'),
        ('hermes', '<tool_call>{"name": "view"} and more', 'not closed'),
        ('kat', '<tool_call>view a.py 3', 'not closed'),
        ('glm', '<tool_call>view\n<arg_key>path</arg_key><arg_value>a</arg_value>', 'not closed'),
        ('glm', '<tool_call>view\n<arg_key>path</arg_key></tool_call>', '<arg_key>…<arg_value>… expected'),
        ('glm', '<tool_call>{"name": "view"}</tool_call>', 'a name expected'),
        ('minimax', '<minimax:tool_call>view</minimax:tool_call>', '<invoke name='),
        ('kimi', '<|tool_calls_section_begin|>view<|tool_calls_section_end|>', '<|tool_call_begin|>'),
        ('deepseek_v31', '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>view<｜tool▁sep｜>{<｜tool▁call▁end｜>'
         '<｜tool▁calls▁end｜>',
         'not JSON'),
        ('mistral', '[TOOL_CALLS][]', 'a list of calls'),
        ('mistral_args', '[TOOL_CALLS]view[ARGS]{"path": "a"} and more', 'NAME[ARGS]'),
        ('pythonic', '[view("a")]', 'arguments by name'),
        ('pythonic', '[view(path=open("x"))]', 'literal arguments'),
        ('pythonic', '[view(path="a", path="b")]', 'literal arguments'),
        ('pythonic', '[view(**{"path": "a"})]', 'unpacked'),
        ('qwen3_coder', '<tool_call><function=view><parameter=odd>a</function></tool_call>', '</parameter> expected'),
        ('qwen3_coder', '<tool_call><function=view><parameter=path>a<parameter=odd>b</parameter></function>'
         '</tool_call>',
         '</parameter> expected'),
        ('qwen3_coder', '<tool_call><function=view><parameter=path>a</parameter><parameter=path>b</parameter>'
         '</function></tool_call>', 'given twice'),
        ('hermes', 'a <tool_call> b', 'not closed'),
        ('qwen3_coder', '<tool_call>\n<function=view>\n</tool_call>', '<function=NAME>'),
        ('qwen3_coder', '<tool_call><function=view>path</function></tool_call>', "expected at 'path'"),
        ('kat', '<tool_call>open x</tool_call>', "unknown tool 'open'"),
        ('kat', '<tool_call>view a.py two</tool_call>', 'view: line must be a whole number'),
        ('llama3', '<|python_tag|>view.call(path="a")', 'not JSON'),
        ('llama3', '{"name": "view", "parameters": {}} and more', 'not JSON'),
    ],
)
def test_what_cannot_be_read_stays_text_and_is_marked(format, text, why):
    r = parse_reply(text, TOOLS, format)
    assert (r.content, r.calls) == (text, []) and len(r.malformed) == 1 and why in r.malformed[0]
    if FORMATS[format].close:  # and the good one beside it is read
        good, space = write_call('submit', {}, format), ' \n'
        r = parse_reply(f'{good}\nso{space}{text}', TOOLS, format)
        assert (r.content, functions(r)) == (f'so{space}{text}', [('submit', {})])
        if 'not closed' not in why:
            r = parse_reply(f'{good}\n{text}  b', TOOLS, format)
            assert (r.content, functions(r)) == (f'{text}  b', [('submit', {})])
            r = parse_reply(f'{text} {good}', TOOLS, format)
            assert (r.content, functions(r), len(r.malformed)) == (text, [('submit', {})], 1)


def test_json_that_is_no_call_is_text():
    for text in ('{"a": 1}', '{', '  {"name', '{x'):
        r = parse_reply(text, TOOLS, 'llama3')
        assert (r.content, r.calls) == (text, []) and len(r.malformed) == ('"name"' in text)
    assert parse_reply('<think>x</think>\n {"a": 1}', TOOLS, 'llama3') == Reply('{"a": 1}', 'x')


def test_a_tag_inside_a_value_is_data():
    doc = '<tool_call> {"x"} </tool_call> \\" </think> <|python_tag|>'
    for f in sorted({*FORMATS} - {'kat'}):
        one = write_call('write', dict(path='a', text=doc), f)
        r = parse_reply(f'{one} {one}' if f in TAGGED else one, TOOLS, f)
        assert (
            set(json.dumps(x) for x in functions(r)) == {json.dumps(['write', dict(path='a', text=doc)])}
            and r.malformed == []
        )
    # the quote never closes: the first tag is the end after all
    odd = '<tool_call>{"name": "view, "arguments": {}}</tool_call>'
    r = parse_reply(f'{odd} {write_call("submit", {})}', TOOLS, 'hermes')
    assert (r.content, functions(r), len(r.malformed)) == (odd, [('submit', {})], 1)
    lone = '<tool_call>{"name": "view"\n<tool_call>\n{"name": "submit"}</tool_call>'
    r = parse_reply(lone, TOOLS, 'hermes')
    assert (r.content, functions(r), r.malformed) == ('<tool_call>{"name": "view"\n', [('submit', {})], ['not closed'])


def test_values_of_the_xml_format_go_by_the_schema():
    def read(name, value):
        one = f'<tool_call>\n<function=mix>\n<parameter={name}>\n{value}\n</parameter>\n</function>\n</tool_call>'
        return functions(parse_reply(one, TOOLS, 'qwen3_coder'))[0][1][name]

    assert [read('a', v) for v in ('3', '3.0', 'three', ' 3 ')] == [3, 3, 'three', 3]
    assert [read('c', v) for v in ('true', 'True', '1')] == [True, True, '1']
    assert [read('f', v) for v in ('None', 'null', '4', 'x')] == [None, None, 4, 'x']
    assert read('d', '[1, "a"]') == [1, 'a'] and read('e', '{"k": 1}') == {'k': 1} and read('b', '2') == 2
    assert [read('g', v) for v in ('3', 'null', '\n x \n', '')] == ['3', 'null', '\n x \n', '']
    assert read('unknown', '3') == '3'
    no_newlines = (
        '<tool_call><function=view><parameter=path>a</parameter><parameter=line>2</parameter></function></tool_call>'
    )
    assert functions(parse_reply(no_newlines, TOOLS, 'qwen3_coder')) == [('view', dict(path='a', line=2))]
    odd = [tool('view', path=dict(anyOf=7, type=['string', {}], oneOf=[{'type': 'integer'}, 3]))]
    assert functions(parse_reply(write_call('view', dict(path=3), 'qwen3_coder'), odd, 'qwen3_coder')) == [
        ('view', dict(path=3))
    ]


# --- forgiving where nothing is ambiguous


def call(r):
    return functions(r), r.content, r.malformed


def test_a_forgotten_closing_tag_does_no_harm_where_the_body_is_whole():
    want = [('view', dict(path='a', line=1))]
    for f in TAGGED:
        form, one = FORMATS[f], write_call(*GOOD[0], f)
        cut = one[:-len(form.close)]
        assert call(parse_reply(cut, TOOLS, f)) == ((want, '', []) if form.ends else ([], cut, ['not closed'])), f
        if form.ends:  # also where another call follows
            got = call(parse_reply(f'So.\n{cut}\n{one}', TOOLS, f))
            assert got == (want * 2, 'So.', []), f
        end = len(cut.rstrip().removesuffix(form.one or '}'))
        for n in range(len(form.open) + 1, end):  # cut earlier: never a call
            r = parse_reply(one[:n], TOOLS, f)
            assert functions(r) in ([], want) and (r.calls or r.content == one[:n]), (f, n)


def test_every_way_to_cut_a_call_gives_that_call_or_none():
    "Another call than the one that was meant is worse than none."
    meant = dict(path='a b', text='x = 1\ny = 2\n')
    for f in FORMATS:
        one = write_call('write', meant, f)
        for n in range(len(one)):
            assert functions(parse_reply(one[:n], TOOLS, f)) in ([], [('write', meant)])


def test_a_call_without_its_opening_tag():
    bare = '<function=view>\n<parameter=path>\na\n</parameter>\n<parameter=line>\n1\n</parameter>\n</function>'
    for text in (bare, f'{bare}\n</tool_call>', f'{bare}</tool_call>'):
        assert call(parse_reply(f'Look.\n{text} so', TOOLS, 'qwen3_coder')) == ([GOOD[0]], 'Look.\nso', [])
        two = parse_reply(f'{text}\n{write_call(*GOOD[1], "qwen3_coder")}', TOOLS, 'qwen3_coder')
        assert call(two) == (GOOD, '', [])
    unknown = 'write <function=other> and </function>'
    assert parse_reply(unknown, TOOLS, 'qwen3_coder') == Reply(unknown)


def test_a_parameter_without_its_closing_tag():
    def read(inner):
        return parse_reply(f'<tool_call>\n<function=view>\n{inner}</function>\n</tool_call>', TOOLS, 'qwen3_coder')

    assert functions(read('<parameter=path>\na\n<parameter=line>\n1\n</parameter>\n')) == [GOOD[0]]
    assert functions(read('<parameter=line>\n1\n</parameter>\n<parameter=path>\na\n')) == [GOOD[0]]
    about = '<parameter=path>\nsee <parameter=line>3</parameter> there\n</parameter>\n'
    assert functions(read(about)) == [('view', dict(path='see <parameter=line>3</parameter> there'))]
    odd = read('<parameter=path>\na\n<parameter=other>\n1\n</parameter>\n')
    assert odd.calls == [] and len(odd.malformed) == 1
    two = write_call('view', dict(path='a'), 'qwen3_coder').replace('</parameter>\n', '') + '\n' + write_call(
        'write', dict(text='y'), 'qwen3_coder')
    r = parse_reply(two, TOOLS, 'qwen3_coder')
    assert functions(r) in ([], [('view', dict(path='a')), ('write', dict(text='y'))]) and (r.calls or r.content == two)


# --- sections, lists and channels


def test_sections_hold_several_calls_or_none():
    kimi = ('<|tool_calls_section_begin|><|tool_call_begin|>functions.view:0<|tool_call_argument_begin|>{"path": "a"}'
            '<|tool_call_end|>\n<|tool_call_begin|>functions.submit:1<|tool_call_argument_begin|>{}<|tool_call_end|>'
            '<|tool_calls_section_end|>')
    want = [('view', dict(path='a')), ('submit', {})]
    assert call(parse_reply(f'Look.\n{kimi}', TOOLS, 'kimi')) == (want, 'Look.', [])
    broken = kimi.replace('{}', '{')
    r = parse_reply(broken, TOOLS, 'kimi')
    assert (r.calls, r.content, len(r.malformed)) == ([], broken, 1)
    xml = ('<minimax:tool_call>\n<invoke name="view">\n<parameter name="path">a</parameter>\n</invoke>\n'
           '<invoke name="submit">\n</invoke>\n</minimax:tool_call>')
    assert call(parse_reply(xml, TOOLS, 'minimax')) == (want, '', [])
    v3 = ('<｜tool▁calls▁begin｜>' + '\n'.join(
        f'<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json.dumps(args)}\n```<｜tool▁call▁end｜>'
        for name, args in want) + '<｜tool▁calls▁end｜>')
    assert call(parse_reply(v3, TOOLS, 'deepseek_v3')) == (want, '', [])
    listed = ('[TOOL_CALLS][{"name": "view", "arguments": {"path": "a"}, "id": "abc123def"}, '
              '{"name": "submit", "arguments": {}}]')
    assert call(parse_reply(f'Hm {listed}', TOOLS, 'mistral')) == (want, 'Hm', [])
    named = '[TOOL_CALLS]view[CALL_ID]x1y2[ARGS]{"path": "a"}[TOOL_CALLS]submit{}'
    assert call(parse_reply(named, TOOLS, 'mistral_args')) == (want, '', [])
    assert call(parse_reply("[view(path='a'), submit()]", TOOLS, 'pythonic')) == (want, '', [])
    assert parse_reply('[1] see the notes', TOOLS, 'pythonic') == Reply('[1] see the notes')


def test_channels():
    text = ('<|channel|>analysis<|message|>Which file?<|end|><|start|>assistant<|channel|>commentary<|message|>'
            'I look.<|end|><|start|>assistant<|channel|>commentary to=functions.view <|constrain|>json'
            '<|message|>{"path": "<|end|>"}<|call|>')
    r = parse_reply(text, TOOLS, 'harmony')
    assert r == Reply('I look.', 'Which file?', r.calls)
    assert functions(r) == [('view', dict(path='<|end|>'))]
    other = ' to=functions.view<|channel|>commentary json<|message|>{"path": "a"}'  # as the template writes it
    assert call(parse_reply(other, TOOLS, 'harmony')) == ([('view', dict(path='a'))], '', [])
    assert parse_reply('<|channel|>final<|message|>Done.<|return|>', [], 'harmony') == Reply('Done.')
    assert parse_reply('just text', TOOLS, 'harmony') == Reply('just text')
    bad = '<|channel|>commentary to=functions.view<|message|>{"path": '
    assert call(parse_reply(bad, TOOLS, 'harmony'))[:2] == ([], bad)
    assert call(parse_reply(other, [], 'harmony'))[:2] == ([], other)


# --- in pieces

FRAGMENTS = [
    '<tool_call>', '</tool_call>', '<think>', '</think>', '<|python_tag|>', '<tool', '_call>',
    '</', '<', '{', '}', '"', '\\', ' ', '\n', '\n\n', 'é', '𝄞', ';',
    'Look.', '{"name": "view", "arguments": {"path": "a", "line": 1}}', '{"name": "submit"}',
    'view a.py 3', 'submit', 'open x', '"name"',
    '<function=view>', '<parameter=path>', '</parameter>', '</function>', '<tool_call>submit</tool_call>',
    *(write_call('write', dict(path='p', text='</tool_call>x<tool_call>'), form)
      for form in sorted({*FORMATS} - {'kat'})),
    '<|channel|>', 'analysis', 'final', '<|message|>', '<|end|>', '<|start|>assistant', ' to=functions.view',
    '<|call|>',
    '<arg_key>', '</arg_value>', '[TOOL_CALLS]', '[ARGS]', '[', '<|tool_call_begin|>', '<｜tool▁calls▁begin｜>',
    '<invoke name="view">',
]  # fmt: skip
answers = st.lists(st.sampled_from(FRAGMENTS), max_size=9).map(''.join)


@settings(max_examples=400, deadline=None)
@given(answers, st.sampled_from([*FORMATS, None]), st.booleans(), st.integers(0, 2**32))
@example('<tool_call>{"a</tool_call>', 'hermes', False, 0)
@example(' \n<think> \n', 'llama3', False, 1)
def test_any_cut_gives_the_same_reply_and_nothing_is_lost(text, format, thinking, seed):
    whole = parse_reply(text, TOOLS, format, thinking)
    rng = random.Random(seed)
    for cuts in (range(len(text)), [rng.randrange(len(text) + 1) for _ in range(4)]):
        assert in_pieces(text, cuts, TOOLS, format, thinking) == whole
    starts = thinking or text.lstrip(' \t\r\n').startswith('<think>')
    assert starts or whole.calls or format == 'harmony' or whole.content == text
    if format == 'harmony':  # headers and the marks between messages are all that may go
        words = [word for word in ('Look.', 'é', '𝄞', 'view a.py 3', 'open x') if word in text]
        assert whole.calls or all(word in whole.content + whole.reasoning or _in_header(word, text) for word in words)


def _in_header(word, text):
    "May a word stand in a message's header?"
    heads = re.findall(r'(?:<\|channel\|>|<\|start\|>|to=).*?(?:<\|message\|>|$)', text, re.S)
    return any(word in part for part in heads)


GOOD = [('view', dict(path='a', line=1)), ('submit', {})]
BAD = [
    '<tool_call>open x</tool_call>',
    '<tool_call>{"name": 1}</tool_call>',
    '<tool_call><function=></function></tool_call>',
]


@many
@given(
    st.lists(st.sampled_from(['Look.', 'é', 'a <b', 0, 1, *BAD]), max_size=7),
    st.sampled_from(['kat', 'hermes', 'qwen3_coder', 'glm']),
    st.integers(0, 2**32),
)
def test_text_calls_and_broken_calls_in_any_order(parts, format, seed):
    rng = random.Random(seed)
    text, content, calls, broken, joint = '', '', [], 0, False
    for p in parts:
        if isinstance(p, int):
            text += write_call(*GOOD[p], format) + '\n' * rng.randrange(2)
            calls.append(GOOD[p])
            joint = bool(content)
        else:
            text += p
            content += '\n' * joint + p
            broken, joint = broken + p.startswith('<tool'), False
    r = in_pieces(text, [rng.randrange(len(text) + 1) for _ in range(6)], TOOLS, format)
    assert (r.content, functions(r), len(r.malformed)) == (content, calls, broken)


# --- second opinions


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ['<tool_call>', '</tool_call>', 'view a.py 3', 'submit', 'open', ' ', 'write a b c', '\n', 'x']
        ),
        max_size=9,
    )
)
def test_our_own_format_is_what_parse_calls_reads(parts):
    text = ''.join(parts)
    _, calls, errors = parse_calls(text, TOOLS)
    r = parse_reply(text, TOOLS, 'kat')
    assert [c['function'] for c in r.calls] == [c['function'] for c in calls] and len(r.malformed) == len(errors)


HERMES = dict(
    start_anchor='<|im_start|>assistant\n',
    fields=dict(
        reasoning=dict(open='<think>', close='</think>'),
        calls=dict(open_pattern=r'\s*<tool_call>', close='</tool_call>', repeats=True, content='json'),
        content=dict(close_pattern=r'\s*<\|im_end\|>'),
    ),
)
XML = dict(tag_pattern=r'<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>')
CODER = dict(
    start_anchor='<|im_start|>assistant\n',
    fields=HERMES['fields']
    | dict(
        calls=dict(
            open_pattern=r'\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>',
            close_pattern=r'</function>\s*</tool_call>', repeats=True,
            content='xml-inline', content_args=XML,
            transform=dict(type='function', function=dict(name='{name}', arguments='{content}')),
        )
    ),
)  # fmt: skip
plain = st.text('ab é𝄞.', min_size=1, max_size=6).map(str.strip)


@few
@given(
    st.booleans(),
    plain,
    plain,
    st.lists(st.tuples(st.sampled_from('abc'), st.integers(0, 99)), max_size=3),
    st.booleans(),
)
def test_transformers_reads_well_formed_answers_alike(think, thought, said, paths, coder):
    format = 'qwen3_coder' if coder else 'hermes'
    calls = [('view', dict(path=p, line=n)) for p, n in paths]
    text = '\n'.join(([said] if said else []) + [write_call(k, a, format) for k, a in calls])
    if think:
        text = f'<think>\n{thought}\n</think>\n\n{text}'
    theirs = parse_response(
        text + '<|im_end|>', CODER if coder else HERMES, prefix='<|im_start|>assistant\n', tools=TOOLS
    )
    r = parse_reply(text, TOOLS, format)
    assert (r.content, r.reasoning if think else '') == (theirs.get('content', ''), theirs.get('reasoning', ''))
    them = [c['function'] if coder else c for c in theirs.get('calls', [])]
    assert functions(r) == [(c['name'], c['arguments']) for c in them] == calls


# --- ids and JSON


@few
@given(st.lists(st.integers(7, 299), max_size=30), st.text('aé𝄞\ufffd \n', max_size=8), st.integers(1, 3))
def test_decoding_piece_by_piece_gives_the_whole(ids, text, step):
    tok = TOKENIZER
    ids = ids + tok.encode(text) + ids[:3]
    d = Decoder(tok)
    out = [d.feed(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert ''.join(out) + d.finish() == tok.decode(ids, skip_special_tokens=False)


TOKENIZER = train_tokenizer(['view and edit the file'] * 8, 300)


def test_characters_are_given_out_whole():
    d = Decoder(TOKENIZER)
    assert [d.feed([i]) for i in TOKENIZER.encode('é𝄞')] == ['', 'é', '', '', '', '𝄞'] and d.finish() == ''
    half = TOKENIZER.encode('𝄞')[:2]
    assert d.feed(half) == '' and d.finish() == TOKENIZER.decode(half)


def test_strict_json():
    for bad in ('NaN', '[Infinity]', '{"a": -Infinity}', '{', '[' * 100_000):
        with pytest.raises(ValueError, match='not JSON'):
            loads_strict(bad)
    for bad in (float('nan'), [float('inf')], {'a': '\ud800'}, {'\udfff': 1}, {1: 2}, 10**400, b'x', (1,), [[[]]]):
        with pytest.raises(ValueError):
            check_json(bad, depth=2)
    check_json({'a': [1, 2.5, None, True, 'é', 2**1000]}, depth=2)
