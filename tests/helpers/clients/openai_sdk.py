"The openai SDK as an agent: argument 1 is the address. Prints what it got."
import json
import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] + '/s/openai/v1', api_key='kat', max_retries=0)
TOOLS = [dict(type='function', function=dict(name=name, parameters=dict(
    type='object', required=['path'],
    properties=dict(path=dict(type='string'), line=dict(type='integer'))))) for name in ('view', 'submit')]


def ask(messages, stream, **more):
    "The answer's message, as the SDK would send it back; arguments written in another way, thinking left out."
    if stream:
        with client.chat.completions.stream(model='kat', messages=messages, **more) as s:
            m = s.get_final_completion().choices[0].message
    else:
        m = client.chat.completions.create(model='kat', messages=messages, **more).choices[0].message
    calls = [dict(id=c.id, type='function', function=dict(name=c.function.name, arguments=json.dumps(
        dict(reversed(json.loads(c.function.arguments).items())), indent=1))) for c in m.tool_calls or ()]
    return dict(role='assistant', content=m.content) | (dict(tool_calls=calls) if calls else {})


def results(m):
    return [dict(role='tool', tool_call_id=c['id'], content='RESULT') for c in m['tool_calls']]


messages = [dict(role='system', content='You are an agent. Today is 2026-11-23.'),
            dict(role='user', content='STEP-ONE')]
for stream, more in ((False, {}), (True, {}), (True, dict(tool_choice='required')),
                     (False, dict(tool_choice=dict(type='function', function=dict(name='submit'))))):
    m = ask(messages, stream, tools=TOOLS, **more)
    messages += [m, *results(m)]
    messages[0]['content'] = 'You are an agent. Today is 2026-11-24.'     # midnight
m = ask(messages, False, tools=TOOLS)
assert client.models.list().data[0].id == 'kat'
text = client.completions.create(model='kat', prompt='once', max_tokens=5).choices[0].text
print(json.dumps(dict(last=m['content'],
                      calls=[[c['function']['name'] for c in x['tool_calls']] for x in messages if x.get('tool_calls')],
                      text=text)))
