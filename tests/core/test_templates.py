"Templates of every shape: which tokens end an answer, what a trained turn must hold, what an extension must show."

import json
import re
import warnings

import numpy as np
import pytest
from core_strategies import few
from hypothesis import given
from hypothesis import strategies as st
from templates import tokenizer_for, trl_templates
from transformers import AutoTokenizer, GenerationConfig

from kat.core.calls import call_format
from kat.core.chat import encode_prompt, ids_of, render, to_trajectories
from kat.core.endings import end_tokens
from kat.core.extension import extend, tool_ids
from kat.core.template import KAT_TEMPLATE, train_tokenizer
from kat.core.conversation import Conversation

TRL = trl_templates()
real = pytest.mark.skipif(not TRL, reason='trl, whose templates these are, is not installed')

# One template with a slot for each thing that families do in their own way.
ANSWER = (
    "{% if m.reasoning_content %}{{ 'THINK' + m.reasoning_content + '/THINK' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}"
)
HERMES = "{{ '<tool_call>' + {'name': c.function.name, 'arguments': c.function.arguments} | tojson + '</tool_call>' }}"
GLM = (
    "{{ '<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}"
    "{{ '<arg_key>' + k + '</arg_key><arg_value>' }}{{ v if v is string else v | tojson }}{{ '</arg_value>' }}"
    "{% endfor %}{{ '</tool_call>' }}"
)


CLOSE = "{{ '<|im_end|>\n' }}"


def template(answer=ANSWER, close=CLOSE, marks=False, call=HERMES, tool=None, head='<|im_start|>', tail=''):
    answer = answer.replace('CALL', call)
    if marks:
        answer = '{% generation %}' + answer + '{% endgeneration %}' if marks == 'outside' else answer
        answer = '{% generation %}' + answer + close + '{% endgeneration %}' if marks is True else answer + close
    else:
        answer += close
    tool = tool or "{{ '<|im_start|>tool\n' + m.content + '<|im_end|>\n' }}"
    return (
        "{% if tools is not none and tools is defined %}{{ 'TOOLS' + tools | tojson }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{{{{ '{head}assistant\n' }}}}{answer}{{% elif m.role == 'tool' %}}{tool}{{% else %}}"
        f"{{{{ '{head}' + m.role + '\n' + m.content }}}}{close}{{% endif %}}{{% endfor %}}{tail}"
        f"{{% if add_generation_prompt %}}{{{{ '{head}assistant\n' }}}}{{% endif %}}"
    )


PLAIN = template()
# each message begins with a token, and nothing ends one (GLM-4)
OPEN = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}{% else %}"
    "{{ '<|' + m.role + '|>\n' + m.content }}{% for c in m.tool_calls or [] %}" + GLM + "{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    "{# <|user|> <|assistant|> <|system|> #}"
)
# the last answer is closed otherwise than earlier ones, thinking has the closing token of those (gpt-oss)
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|message|>' + "
    "m.tool_calls[0].function.arguments | tojson + '<|call|>' }}{% else %}{{ '<|start|>assistant<|channel|>final"
    "<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + messages[loop.index0 - 1].tool_calls[0].function.name + "
    "'<|message|>' + m.content + '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

TOOLS = [
    dict(
        type='function',
        function=dict(
            name='read',
            description='reads',
            parameters=dict(
                type='object',
                properties=dict(path=dict(type='string', description='p'), limit=dict(type='integer', description='l')),
                required=['path'],
            ),
        ),
    )
]


def user(text='please fix'):
    return dict(role='user', content=text)


def said(text='', reasoning=None, **args):
    calls = [dict(id='call_0', type='function', function=dict(name='read', arguments=args))] if args else []
    out = dict(role='assistant', content=text) | (dict(tool_calls=calls) if calls else {})
    return out | (dict(reasoning_content=reasoning) if reasoning else {})


def result(text='return a', **more):
    return dict(role='tool', content=text, tool_call_id='call_0') | more


def trained(tok, messages, tools=None, **kw):
    return [tok.decode(s.ids) for s in render(tok, messages, tools, **kw) if s.trainable]


def names(tok, ids):
    return set(tok.convert_ids_to_tokens([int(i) for i in ids]))


# --- end tokens


@pytest.mark.parametrize(
    'text, ends',
    [
        (PLAIN, {'<|im_end|>'}),
        (template(marks=True), {'<|im_end|>'}),
        (template(tail="{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"), {'<|im_end|>'}),
        (template(close="{{ '<|eot|> ' }}"), {'<|eot|>'}),
        (template(answer=ANSWER.replace('CALL', '<|call|>CALL<|call_end|>')), {'<|im_end|>'}),
        (OPEN, {'<|user|>', '<|observation|>'}),
        (HARMONY, {'<|return|>', '<|call|>'}),
        (KAT_TEMPLATE, {'<|im_end|>'}),
        (None, set()),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", set()),
        ("{{ raise_exception('no') }}", set()),
    ],
)
def test_every_end_token_of_a_template_counts(text, ends):
    tok = tokenizer_for(text or '')
    tok.chat_template = text
    assert names(tok, end_tokens(tok)) == {'<|endoftext|>'} | ends and end_tokens(tok)[0] == tok.eos_token_id


@real
@pytest.mark.parametrize(
    'name, ends',
    [
        ('gptoss', {'<|return|>', '<|call|>'}),
        ('glm4moe', {'<|user|>', '<|observation|>'}),
        ('glm4moe_training', {'<|user|>', '<|observation|>'}),
        ('gemma4', {'<turn|>', '<|tool_response>'}),
        ('gemma3', {'<end_of_turn>'}),
        ('deepseekv3', {'<｜end▁of▁sentence｜>'}),
        ('deepseekv3_training', {'<｜end▁of▁sentence｜>'}),
        ('phi3', {'<|end|>'}),
        ('llama3_1', {'<|eot_id|>'}),
        ('qwen3', {'<|im_end|>'}),
        ('qwen3_6', {'<|im_end|>'}),
        ('nemotron_3_nano', {'<|im_end|>'}),
        ('lfm2_v2', {'<|im_end|>'}),
        ('cohere2', {'<|END_OF_TURN_TOKEN|>'}),
    ],
)
def test_end_tokens_of_real_templates(name, ends):
    tok = tokenizer_for(TRL[name])
    assert names(tok, end_tokens(tok)) == {'<|endoftext|>'} | ends


def test_the_models_files_name_end_tokens_too(tmp_path):
    tok = tokenizer_for(PLAIN)
    own = end_tokens(tok)
    tok.save_pretrained(tmp_path)
    for i, (name, stored) in enumerate([('config.json', 5), ('generation_config.json', [5, 6])]):
        folder = tmp_path / str(i)
        tok.save_pretrained(folder)
        (folder / name).write_text(json.dumps(dict(eos_token_id=stored)))
        ends = end_tokens(AutoTokenizer.from_pretrained(folder))
        assert set(ends) == {*own, *np.atleast_1d(stored).tolist()} and ends[0] == tok.eos_token_id
    for given_ in (dict(eos_token_id=7), GenerationConfig(eos_token_id=[7]), dict(eos_token_id=None)):
        assert set(end_tokens(tok, given_)) - {7} == set(own)
    tok.eos_token, tok.chat_template = None, None
    assert end_tokens(tok, dict(eos_token_id=[3])) == (3,)
    with pytest.raises(ValueError, match='no end token'):
        end_tokens(tok)


def test_a_template_that_is_exchanged_is_asked_again():
    tok = tokenizer_for(PLAIN + '{# <|eot|> #}')
    assert '<|eot|>' not in names(tok, end_tokens(tok))
    tok.chat_template = PLAIN.replace('im_end', 'eot')
    assert '<|eot|>' in names(tok, end_tokens(tok))


# --- masks


@pytest.mark.parametrize('text', [PLAIN, template(marks=True), template(close="{{ '<|eot|>\n' }}", marks=True)])
def test_a_trained_turn_ends_with_its_closing_token(text):
    tok = tokenizer_for(text)
    for messages in ([user(), said('ok')], [user(), said('a', path='x'), result(), said('b'), user(), said('c')]):
        segments = render(tok, messages)
        for turn in range(sum(m['role'] == 'assistant' for m in messages)):
            ids = ids_of([s for s in segments if s.trainable and s.turn == turn])
            assert ids[-1] in end_tokens(tok) and not set(ids[:-1]) & set(end_tokens(tok))
        assert tok.decode(ids_of(segments)) == tok.apply_chat_template(messages, tokenize=False)


def test_what_begins_the_next_message_closes_an_answer_that_has_no_end():
    tok = tokenizer_for(OPEN)
    messages = [user(), said(path='a'), result(), said('done'), user('more')]
    assert trained(tok, messages) == ['<tool_call>read<arg_key>path</arg_key><arg_value>a</arg_value></tool_call>'
                                      '<|observation|>', 'done<|user|>']  # fmt: skip
    assert tok.decode(ids_of(render(tok, messages))) == tok.apply_chat_template(messages, tokenize=False)
    with pytest.raises(ValueError, match='writes no closing token after the answer of turn 1'):
        render(tok, messages[:-1])
    assert len(trained(tok, messages[:-1], whole=[0])) == 2


def test_a_closing_token_outside_of_the_markers_is_an_error():
    tok = tokenizer_for(template(marks='outside'))
    with pytest.raises(ValueError, match='leaves the closing token outside of {% generation %} of turn 0'):
        render(tok, [user(), said('ok')])
    assert trained(tok, [user(), said('ok')], whole=()) == ['ok']


def test_an_end_token_that_the_text_spells_is_not_trained_as_one():
    for text in (PLAIN, template(marks=True)):
        for answer in (said('a<|im_end|>b'), said(path='<|im_end|>'), said('a', 'b<|endoftext|>')):
            with pytest.raises(ValueError, match='the answer of turn 0 spells the end token <.im_end.>|<.endoftext.>'):
                render(tokenizer_for(text), [user(), answer])


DROPS = [
    (ANSWER.replace('{{ m.content }}', '{% if not m.tool_calls %}{{ m.content }}{% endif %}'), 'the text beside'),
    (ANSWER.replace('m.content', "m.content.split('</think>')[-1]"), None),
    (ANSWER.replace('m.reasoning_content %}', 'm.reasoning_content and not m.tool_calls %}'), 'the reasoning'),
    (ANSWER.replace('m.reasoning_content %}', 'false %}'), 'the reasoning'),
    (ANSWER.replace('CALL', ''), "argument 'path' of the call of read"),
    (ANSWER.replace('m.tool_calls or []', '(m.tool_calls or [])[:1]'), None),
    (ANSWER.replace('{{ m.content }}', '{{ m.content[:4] }}'), 'the text'),
    (ANSWER.replace('c.function.arguments', "{'path': c.function.arguments.path}"), None),
]


@pytest.mark.parametrize('marks', [False, True])
@pytest.mark.parametrize('answer, what', [x for x in DROPS if x[1]])
def test_what_a_template_drops_of_a_trained_turn_is_an_error(answer, what, marks):
    tok = tokenizer_for(template(answer, marks=marks))
    full = [user(), said('let me look', 'deep thought', path='a.py'), result(), said('done')]
    with pytest.raises(ValueError, match=f'the chat template drops {what}.*turn 0'):
        render(tok, full)
    assert trained(tok, full, whole=()) and trained(tok, full, whole=[1]) and len(encode_prompt(tok, full[:3]))
    assert trained(tokenizer_for(template(marks=marks)), full)


@pytest.mark.parametrize('marks', [False, True])
def test_parts_that_are_dropped_within_text_or_calls(marks):
    make = lambda i: tokenizer_for(template(DROPS[i][0], marks=marks))
    two = said(path='a')
    two['tool_calls'].append(dict(id='c', type='function', function=dict(name='read', arguments=dict(path='b'))))
    for tok, message, good in [
        (make(1), said('<think>why</think>because'), said('because')),
        (make(5), two, said(path='a')),
        (tokenizer_for(template(call=HERMES.replace('c.function.arguments', "{'path': c.function.arguments.path}"),
                                marks=marks)), said(path='a', note='b'), said(path='a')),
        (tokenizer_for(template(call=HERMES.replace('c.function.name', "'f'"), marks=marks)), said(path='a'),
         said('a')),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match='the chat template drops'):
            render(tok, [user(), message])
        assert trained(tok, [user(), good])


def test_reasoning_of_earlier_turns():
    old = ANSWER.replace('m.reasoning_content %}', 'm.reasoning_content and loop.last %}')
    tok = tokenizer_for(template(old, marks=True))
    talk = [user(), said('a', 'why a'), user(), said('b', 'why b')]
    with pytest.raises(ValueError, match='drops the reasoning of earlier turns'):
        render(tok, talk)
    log = Conversation('t', talk, [talk[:2], talk])
    learnt = lambda t: tok.decode(ids_of([s for s in t.segments if s.trainable]))
    apart = to_trajectories(log, tok, merge=False)
    assert list(map(learnt, apart)) == ['THINKwhy a/THINKa<|im_end|>', 'THINKwhy b/THINKb<|im_end|>']
    with pytest.raises(ValueError, match='drops the reasoning of earlier turns'):
        to_trajectories(log, tok)
    with pytest.raises(ValueError, match='drops the reasoning'):
        render(train_tokenizer(['a'], 300), talk)


pieces = st.text('ab1 \n"\\é<>/{}&', min_size=1, max_size=9)


@few
@given(pieces, pieces, st.dictionaries(st.sampled_from(['path', 'x']), pieces | st.integers() | st.none(), max_size=2))
def test_whole_turns_are_never_refused(text, reasoning, args):
    for marks in (False, True):
        for call in (HERMES, GLM):
            tok = tokenizer_for(template(marks=marks, call=call)) if not (marks, call) in KEPT else KEPT[marks, call]
            KEPT[marks, call] = tok
            (answer,) = [''.join(trained(tok, [user(), said(text, reasoning, **args)]))]
            assert text in answer and reasoning in answer and answer.endswith('<|im_end|>')


KEPT = {}


@real
@pytest.mark.parametrize(
    'name, message, says',
    [
        ('llama3_1', said('look', path='a'), 'drops the text beside a tool call'),
        ('phi3', said(path='a'), "drops argument 'path'"),
        ('qwen2_5', said('ok', 'why'), 'drops the reasoning'),
        ('glm4moe', said('ok'), 'writes no closing token after the answer of turn 0'),
        ('diffusion_gemma_training', said(path='a'), 'leaves the closing token outside'),
        ('qwen3', said('ok', 'why', path='a'), None),
        ('qwen3_training', said('ok', 'why', path='a'), None),
        ('glm4moe_training', said('ok', 'why', path='a'), None),
        ('gptoss', said(path='a', limit=3), None),
        ('deepseekv3_training', said('ok', path='a'), None),
        ('nemotron_3_nano_training', said('ok', 'why', path='a b\nc "d"'), None),
        ('qwen3_6_training', said('ok', 'why', path='a b\nc "d"', limit=4), None),
        ('muse_glimmer', said('ok', 'why'), None),
        ('lfm2_v2_training', said('ok', path="it's"), None),
        ('gemma4', said(path='a b'), None),
    ],
)
def test_real_templates_keep_or_refuse(name, message, says):
    tok = tokenizer_for(TRL[name])
    if says:
        with pytest.raises(ValueError, match=says):
            render(tok, [user(), message], TOOLS)
    else:
        ids = ids_of([s for s in render(tok, [user(), message], TOOLS) if s.trainable])
        assert ids[-1] in end_tokens(tok)


EACH = "{% for k, v in c.function.arguments.items() IF %}{{ ' ' + k + '=' }}{{ V }}{% endfor %}"
FULL_CALL = dict(path='a.py', limit=3, flag=False, zero=0, empty='', none=None, share=1.5, more=dict(x=[1, {'y': 7}]))


@pytest.mark.parametrize(
    'write, what',
    [
        (EACH.replace('IF', 'if v is string').replace('V', 'v'), "argument 'limit'"),
        (EACH.replace('IF', 'if v').replace('V', 'v | tojson'), "argument 'flag'"),
        (EACH.replace('IF', 'if v is not none').replace('V', 'v | tojson'), "argument 'none'"),
        (EACH.replace('IF', "if v != ''").replace('V', 'v | tojson'), "argument 'empty'"),
        (EACH.replace('IF', 'if v is not mapping').replace('V', 'v | tojson'), "argument 'more'"),
        (EACH.replace('IF', '').replace('V', '(v | int) if v is number else v | tojson'), "argument 'share'"),
        (EACH.replace('IF', '').replace('V', "v | tojson | replace('7', '')"), "argument 'limit'"),
        (EACH.replace('IF', '').replace('V', 'v | tojson'), None),
        ("{{ ' ' + c.function.arguments | tojson }}", None),
        ("{{ ' ' + c.function.arguments | tojson | tojson }}", None),
        ("{{ ' ' + (c.function.arguments | string) }}", None),
        ("{{ c.function.arguments.values() | list | tojson }}", None),  # by place
    ],
)
def test_arguments_that_are_no_text_are_in_the_mask_too(write, what):
    tok = tokenizer_for(template(answer=ANSWER.replace('CALL', '{{ c.function.name }}' + write)))
    messages = [user(), said(**FULL_CALL)]
    if what is None:
        assert trained(tok, messages)
        return
    with pytest.raises(ValueError, match=f'drops {what} of '):
        trained(tok, messages)


CHANGES = ["replace('é', 'e')", "replace('+', '')", "replace('\n', ' ')", "lower", "truncate(9)"]


@pytest.mark.parametrize('change', CHANGES)
def test_a_template_that_changes_a_text_is_not_trained_on_nor_extended_with(change):
    text = 'é = A + 1\nreturn é'
    tok = tokenizer_for(template(answer=ANSWER.replace('m.content', f'm.content | {change}')))
    with pytest.raises(ValueError, match='drops the text'):
        trained(tok, [user(), said(text)])
    odd = tokenizer_for(template(tool=f"{{{{ '<|im_start|>tool\n' + (m.content | {change}) + '<|im_end|>\n' }}}}"))
    with pytest.raises(ValueError, match='is not whole|leaves out'):
        extend(odd, [odd.convert_tokens_to_ids('<|im_end|>')], [result(text)])
    assert trained(tokenizer_for(PLAIN), [user(), said(text)])


# --- no tools


@pytest.mark.parametrize('text', [PLAIN, template(marks=True), KAT_TEMPLATE, *([TRL['llama3_1']] if TRL else [])])
def test_no_tools_are_none(text):
    tok = tokenizer_for(text)
    for messages in ([user()], [user(), said('ok')]):
        assert ids_of(render(tok, messages, [])).tolist() == ids_of(render(tok, messages)).tolist()
        assert encode_prompt(tok, messages, []).tolist() == encode_prompt(tok, messages).tolist()
    assert extend(tok, [tok.eos_token_id], [user()], []).tolist() == extend(tok, [tok.eos_token_id], [user()]).tolist()
    assert 'TOOLS' not in tok.decode(encode_prompt(tok, [user()], []))


# --- extension

LEAVES_OUT = template(tool="{{ '' }}")
AFTER_A_CALL = template(
    tool="{% if messages[loop.index0 - 1].tool_calls or messages[loop.index0 - 1].role == 'tool' %}"
    "{{ '<|im_start|>tool\n' + m.content + '<|im_end|>\n' }}{% endif %}"
)
NAMES = template(
    tool="{{ '<|im_start|>tool ' + messages[loop.index0 - 1].tool_calls[0].function.name + '\n' + m.content + "
    "'<|im_end|>\n' }}"
)
NUMBERS = template(tool="{{ '<|im_start|>tool ' + m.tool_call_id + '\n' + m.content + '<|im_end|>\n' }}")
IDS_BEHIND = template(tool="{{ '<|im_start|>tool\n' + m.content + '|' + m.tool_call_id + '<|im_end|>\n' }}")
NAMES_ONE = template(
    tool="{% for x in messages if x.tool_calls %}{{ '<|im_start|>tool ' + x.tool_calls[0].function.name }}{% endfor %}"
    "{{ '\n' + m.content + '<|im_end|>\n' }}"
)
CUTS = template(tool="{{ '<|im_start|>tool\n' + m.content[:20] + '<|im_end|>\n' }}")
TURNS = template(
    tool="{% if loop.last %}{% for m in messages | reverse if m.role == 'tool' %}{{ m.content }}{% endfor %}{% endif %}"
)
AS_JSON = template(tool="{{ '<|im_start|>tool\n' + (m.content | tojson) + '<|im_end|>\n' }}")


@pytest.mark.parametrize(
    'text, messages, says',
    [
        (LEAVES_OUT, [result()], r'leaves out messages\[0\] \(tool\)'),
        (LEAVES_OUT, [result(), user()], r'leaves out messages\[0\] \(tool\)'),
        (LEAVES_OUT, [user()], None),
        (AFTER_A_CALL, [result()], None),
        (AFTER_A_CALL, [result(), result('2')], None),
        (NAMES, [result()], 'names the called function.*need a `name`'),
        (NAMES, [result(name='read')], None),
        (NUMBERS, [result()], None),
        (NUMBERS, [dict(role='tool', content='x')], 'need a `tool_call_id`'),
        (IDS_BEHIND, [dict(role='tool', content='x')], 'need a `tool_call_id`'),
        (IDS_BEHIND, [result('1', name='a'), result('2', name='b')], None),
        (NAMES_ONE, [result('1', name='a'), result('2', name='b')], r'gives messages\[1\] the name of another'),
        (CUTS, [result('short')], None),
        (CUTS, [result('a much longer text than twenty letters')], 'is not whole'),
        (TURNS, [result('1'), result('2')], r'leaves out messages\[1\]'),
        (AS_JSON, [result('a "b"\n\\c é')], None),
        (HARMONY, [result(), ], 'need a `name`'),
        (HARMONY, [result(name='read')], None),
        (template(head='{{ raise_exception("no") if m.role == "tool" }}<|im_start|>'), [user()], None),
    ],
)  # fmt: skip
def test_every_new_message_is_in_an_extension_or_an_error(text, messages, says):
    tok = tokenizer_for(text)
    for _ in range(2):  # asked, and from memory
        if says:
            with pytest.raises(ValueError, match=says):
                extend(tok, [tok.eos_token_id], messages)
            continue
        new = tok.decode(extend(tok, [tok.eos_token_id], messages))
        assert all(m['content'] in new or json.dumps(m['content'], ensure_ascii=False) in new for m in messages)
        assert not re.search('Q[a-z]', new)


def test_an_extension_is_what_rendering_the_whole_gives():
    for text in (PLAIN, AFTER_A_CALL, NAMES, NUMBERS, AS_JSON, OPEN):
        tok = tokenizer_for(text)
        past, new = [user(), said(path='a')], [result('r1', name='read'), user('and?')]
        whole = tok.decode(encode_prompt(tok, past + new))
        end = tok.apply_chat_template(past, tokenize=False).rstrip('\n')
        close = '<|observation|>' if text == OPEN else ''
        ids = tok.encode(end + close, add_special_tokens=False)
        assert tok.decode([*ids, *extend(tok, ids, new)]) == whole
    tok = tokenizer_for(HARMONY)
    end = lambda text: tok.decode(extend(tok, [tok.convert_tokens_to_ids(text)], [user('u')]))
    assert end('<|return|>') == end('<|end|>') == '<|start|>user<|message|>u<|end|><|start|>assistant'
    assert end('<|call|>') == '<|end|>' + end('<|end|>')


@real
@pytest.mark.parametrize('name', sorted(set(TRL) - {'idefics3', 'llava_next', 'smolvlm', 'idefics3_training',
                                                   'llava_next_training', 'smolvlm_training'}))  # fmt: skip
def test_extensions_of_real_templates_invent_nothing(name):
    tok = tokenizer_for(TRL[name])
    for messages in ([user('u1')], [result('r1', name='read')], [result('r1'), result('r2', tool_call_id='c2')],
                     [result('r1', name='read'), user('u1')]):  # fmt: skip
        for tools in (None, TOOLS):
            try:
                new = tok.decode(extend(tok, [tok.eos_token_id], messages, tools))
            except ValueError as e:
                assert str(e).startswith('chat template: ')
                continue
            at = [new.index(m['content']) for m in messages]
            assert at == sorted(at) and not re.search(r'Q[a-z]{3}', new)


@real
def test_templates_that_lose_a_result_or_need_its_name():
    for name, message, says in [
        ('phi3', result(), 'leaves out'),
        ('phi3', result(name='read'), 'leaves out'),
        ('gptoss', result(), 'need a `name`'),
        ('diffusion_gemma', result(), 'need a `name`'),
    ]:
        with pytest.raises(ValueError, match=says):
            extend(tokenizer_for(TRL[name]), [1], [message])
    tok = tokenizer_for(TRL['gptoss'])
    with pytest.raises(ValueError, match='need a `name`'):
        tool_ids(tok, ['r'])
    call = [tok.convert_tokens_to_ids('<|call|>')]
    assert tok.decode(extend(tok, call, [result('R', name='read')])) == (
        '<|start|>functions.read to=assistant<|channel|>commentary<|message|>"R"<|end|><|start|>assistant'
    )
    tok = tokenizer_for(TRL['diffusion_gemma'])
    assert 'response:read{' in tok.decode(extend(tok, [1], [result(name='read')]))


def test_words_of_the_stand_in_are_words_like_others_in_a_message():
    for text in (PLAIN, OPEN, AFTER_A_CALL, NAMES):
        tok, message = tokenizer_for(text), result('Qsaid Qgiven0q Qask Qnext0q Qname0q Qnameless Qz1x', name='read')
        assert message['content'] in tok.decode(extend(tok, [1], [message, user('Qsaid')]))
        marked = tokenizer_for(template(marks=True))
        assert 'Qz1x Qz2x' in ''.join(trained(marked, [user('Qz3x'), said('Qz1x Qz2x', path='Qzq1x')]))


# --- the format of calls


def test_a_format_is_what_the_template_writes():
    coder = ("{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}{% for k, v in c.function.arguments.items() %}"
             "{{ '<parameter=' + k + '>\n' }}{{ v }}{{ '\n</parameter>\n' }}{% endfor %}"
             "{{ '</function>\n</tool_call>' }}")
    llama = "{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}"
    kat = "{{ '<tool_call>' + c.function.name }}{% for v in c.function.arguments.values() %}{{ ' ' + v | tojson }}" \
          "{% endfor %}{{ '</tool_call>' }}"  # fmt: skip
    listed = "{{ '[TOOL_CALLS][' + c.function | tojson + ']' }}"
    for call, name in [(HERMES, 'hermes'), (coder, 'qwen3_coder'), (llama, 'llama3'), (kat, 'kat'), (GLM, 'glm'),
                       (listed, 'mistral')]:
        assert call_format(template(call=call)) == name == call_format(template(call=call, marks=True))
    assert (call_format(OPEN), call_format(HARMONY)) == ('glm', 'harmony')
    assert call_format(dict(default=PLAIN, tool_use=template(call=coder))) == 'qwen3_coder'
    assert call_format(KAT_TEMPLATE) == 'kat' and call_format(None) is None and call_format('') is None
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # a template without tools has nothing to say
        assert call_format('{% for m in messages %}{{ m.content }}{% endfor %}') is None


@pytest.mark.parametrize(
    'text',
    [
        template(call="{{ '<tool_call>' + c.function.arguments | tojson + '</tool_call>' }}"),
        template(call="{{ '<tool_call>' + c | string + '</tool_call>' }}"),
        template(call=HERMES.replace('c.function.name', "c.function.name | upper")),
        template(call="{{ '[CALLS][' + c.function | tojson + ']' }}"),
        '{% if tools %}<tool_call>{name}\n<arg_key>k</arg_key>\n</tool_call>{% endif %}',
        '{% if tools %}[AVAILABLE_TOOLS]{% endif %}{# <function= <|python_tag|> #}',
    ],
)
def test_a_template_that_is_not_understood_has_no_format_and_a_line_says_so(text):
    with pytest.warns(UserWarning, match='none of the formats kat, hermes, qwen3_coder, glm'):
        assert call_format(text) is None


@real
def test_formats_of_real_templates():
    want = dict(
        hermes='qwen2_5 qwen3 qwen3_training qwen3_instruct_2507 qwen3_vl',
        qwen3_coder='qwen3_5_think qwen3_5_nothink qwen3_6 qwen3_8 nemotron_3_nano nemotron_3_ultra',
        llama3='llama3_1 llama3_2', glm='glm4moe', harmony='gptoss', deepseek_v3='deepseekv3', lfm2='lfm2_v2',
    )
    for name, templates in want.items():
        assert {t: call_format(TRL[t]) for t in templates.split()} == dict.fromkeys(templates.split(), name)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        none = 'gemma4 phi3 cohere2 muse_glimmer'.split()
        assert {t: call_format(TRL[t]) for t in none} == dict.fromkeys(none)
