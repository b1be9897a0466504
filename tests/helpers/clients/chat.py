"""Three turns of a conversation, one of them streamed, as an SDK's user has them: argument 1 is the SDK, argument 2 the
address."""
import sys

_, sdk, address = sys.argv
if sdk == 'openai':
    from openai import OpenAI
    create = OpenAI(base_url=f'{address}/s/chat/v1', api_key='kat', max_retries=0).chat.completions.create
    text, piece = lambda r: r.choices[0].message.content, lambda e: e.choices[0].delta.content
else:
    from anthropic import Anthropic
    create = Anthropic(base_url=f'{address}/s/chat', api_key='kat', max_retries=0).messages.create
    text, piece = lambda r: r.content[0].text, lambda e: e.delta.text if e.type == 'content_block_delta' else ''

messages = []
for question, stream in (('Say hello.', False), ('Say it again.', True), ('And again.', False)):
    messages.append(dict(role='user', content=question))
    r = create(model='kat', max_tokens=24, messages=messages, stream=stream)
    messages.append(dict(role='assistant', content=''.join(piece(e) or '' for e in r) if stream else text(r)))
