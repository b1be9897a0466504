"The anthropic SDK as an agent: argument 1 is the address. Prints what it got."
import json
import sys

from anthropic import Anthropic

client = Anthropic(base_url=sys.argv[1] + '/s/anthropic', api_key='kat', max_retries=0)
SCHEMA = dict(type='object', required=['path'], properties=dict(path=dict(type='string'), line=dict(type='integer')))
TOOLS = [dict(name=name, input_schema=SCHEMA) for name in ('view', 'submit')]
THINK = dict(thinking=dict(type='enabled', budget_tokens=1024))


def ask(messages, i, stream, **more):
    "The answer's blocks, as they came."
    args = dict(model='kat', max_tokens=4096, tools=TOOLS, messages=messages, system=[
        dict(type='text', text=f'x-anthropic-billing-header: cc_version={i};'),
        dict(type='text', text='You are an agent.')]) | more
    if not stream: return client.messages.create(**args).content
    with client.messages.stream(**args) as s:
        return s.get_final_message().content


messages, calls = [dict(role='user', content=[
    dict(type='text', text='<system-reminder>\none reminder\n</system-reminder>'),
    dict(type='text', text='STEP-ONE')])], []
for i, (stream, more) in enumerate(((False, THINK), (True, THINK), (True, dict(tool_choice=dict(type='any'))),
                                    (False, dict(tool_choice=dict(type='tool', name='submit'))))):
    n = client.messages.count_tokens(model='kat', tools=TOOLS, messages=messages,
                                     system='You are an agent.').input_tokens
    blocks = [b for b in ask(messages, i, stream, **more) if b.type != 'thinking']     # an agent that drops thinking
    calls.append([b.name for b in blocks if b.type == 'tool_use'])
    messages += [dict(role='assistant', content=blocks), dict(role='user', content=[dict(
        type='tool_result', tool_use_id=b.id, content='RESULT') for b in reversed(blocks) if b.type == 'tool_use'])]
    messages[0] = dict(role='user', content='STEP-ONE')     # the reminder vanishes
last, = ask(messages, 9, True)
print(json.dumps(dict(last=last.text, calls=calls, counted=n > 0)))
