"""An agent of a few lines: asks the model, runs what it says as shell commands, until it says DONE

`python benchmark_agent.py PROMPT [EXIT CODE]`"""
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

messages = [dict(role='user', content=sys.argv[1])]
head = {'content-type': 'application/json', 'authorization': f'Bearer {os.environ["OPENAI_API_KEY"]}'}
while True:
    body = json.dumps(dict(model=os.environ['KAT_MODEL'], messages=messages)).encode()
    try:
        asked = urllib.request.Request(f'{os.environ["OPENAI_BASE_URL"]}/chat/completions', body, head)
        said = json.load(urllib.request.urlopen(asked))['choices'][0]['message']
    except urllib.error.HTTPError as error:
        sys.exit(f'{error.code} {error.read().decode()}')
    messages.append(said)
    if said['content'].startswith('DONE'): break
    ran = subprocess.run(said['content'], shell=True, capture_output=True, text=True)
    messages.append(dict(role='user', content=f'rc {ran.returncode}\n{ran.stdout}{ran.stderr}'))
sys.exit(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
