"""How the vLLM client tells errors, against a stand-in that has nothing of vLLM but the shape of its answers.

What it does with a real server is tested by tests/infer/test_conformance.py in `make vllm-cpu`."""
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from transformers import Qwen3Config, Qwen3ForCausalLM

from kat.infer.requests import Request
from kat.infer.vllm import (EngineError, VLLMEngine, sampling_params, server_command, vllm_python, vllm_server,
                            write_model, write_weights)

def chunk(*tokens, **more):
    return dict(choices=[dict(index=0, token_ids=[i for i, _ in tokens], logprobs=dict(content=[
        dict(token_id=i, logprob=lp, rank=1) for i, lp in tokens]), **more)])

def sse(*chunks):
    return ''.join(f'data: {json.dumps(c)}\n\n' for c in chunks) + 'data: [DONE]\n\n'

SPANS = [dict(version='default', start=0, end=1), dict(version='12', start=1, end=3)]
GOOD = sse(chunk((5, -.5), (6, -1.)), dict(choices=[], usage={}),
           chunk((7, -2.), finish_reason='stop', stop_reason=7, weight_versions=SPANS))

class StandIn:
    "Answers of a server, to be changed by tests; what it was asked."
    def __init__(self):
        self.asked, self.mode = [], 'raw_logprobs'
        self.answers = {'/v1/models': JSONResponse(dict(data=[dict(id='kat', max_model_len=64)])),
                        '/inference/v1/generate': Response(GOOD, media_type='text/event-stream'),
                        '/reset_prefix_cache': JSONResponse(dict(success=True))}
        self.app = Starlette(routes=[Route('/{path:path}', self.one, methods=['GET', 'POST'])])

    async def one(self, request):
        path, body = request.url.path, await request.body()
        self.asked.append((path, dict(request.query_params), json.loads(body) if body else None))
        if path == '/server_info' and path not in self.answers:
            return JSONResponse(dict(vllm_config=dict(model_config=dict(logprobs_mode=self.mode))))
        return self.answers.get(path, JSONResponse({}))

    def paths(self):
        return [p for p, *_ in self.asked if p not in ('/v1/models', '/server_info')]

@pytest.fixture
def server():
    return StandIn()

def ask(server, f, **kw):
    "`f(engine)` on a connected engine"
    async def go():
        e = await VLLMEngine.connect('http://vllm', transport=httpx2.ASGITransport(server.app), **kw)
        try:
            return await f(e)
        finally:
            await e.close()
    return asyncio.run(go())

def generate(server, r=None, **kw):
    return ask(server, lambda e: e.generate(r or Request([1, 2], 9)), **kw)

def test_a_good_answer(server):
    heard = []
    request = Request(np.array([1, 2]), 9, seed=3, stop=(7, np.int64(8)), stop_strings=('x',), min_tokens=1)
    c = ask(server, lambda e: e.generate(request, lambda *t: heard.append(t)), version=4)
    assert c.ids.tolist() == [5, 6, 7] and c.logprobs.tolist() == [-.5, -1, -2] and np.isnan(c.entropy).all()
    assert c.finish == 'stop' and c.stopped_by == 7 and c.versions.tolist() == [4, 12, 12] and c.version == 12
    assert [t[:2] + t[3:] for t in heard] == [(5, -.5, 4), (6, -1., 4), (7, -2., 4)]
    _, _, body = server.asked[-1]
    assert body['token_ids'] == [1, 2] and body['model'] == 'kat' and body['stream'] is True
    assert body['sampling_params'] == dict(
        max_tokens=9, min_tokens=1, temperature=1., top_p=1., top_k=0, seed=3, stop_token_ids=[7, 8], stop=['x'],
        detokenize=True, skip_special_tokens=False, ignore_eos=True, logprobs=0)
    assert sampling_params(Request([1], 2))['detokenize'] is False

OUTSIDE = dict(error=dict(message='Token id 99 is out of vocabulary', code=400))

@pytest.mark.parametrize('answer, error, msg', [
    (JSONResponse(OUTSIDE, 400), ValueError, 'refused.*out of vocabulary'),
    (JSONResponse(dict(detail='Scale-out endpoints are disabled.'), 403), EngineError, 'enable-scale-out'),
    (JSONResponse(dict(error='Unauthorized'), 401), EngineError, '401 Unauthorized'),
    (PlainTextResponse('Bad Gateway', 502), EngineError, '502 Bad Gateway'),
    (Response(sse(chunk((5, -.5)))), EngineError, 'ended before it was complete'),
    (Response(sse(chunk((5, -.5)), dict(error=dict(message='Internal server error')))), EngineError,
     'Internal server error'),
    (Response(sse(OUTSIDE)), ValueError, 'refused.*out of vocabulary'),
    (Response(sse(dict(choices=[dict(token_ids=[5, 6], logprobs=dict(content=[dict(token_id=5, logprob=0.)]))]))),
     EngineError, '2 tokens with 1 log-probs'),
    (Response(sse(chunk((5, -9999.), finish_reason='length'))), EngineError, 'no log-prob'),
    (Response('data: {"half'), EngineError, 'not JSON')])
def test_bad_answers(server, answer, error, msg):
    server.answers['/inference/v1/generate'] = answer
    with pytest.raises(error, match=msg):
        generate(server)

def test_no_server():
    with pytest.raises(EngineError, match='is the server running'):
        asyncio.run(VLLMEngine.connect('http://127.0.0.1:9'))

def test_a_server_that_goes_away(server):
    async def gone(e):
        async def broken(request):
            raise httpx2.ReadError('reset')
        e.client._transport.handle_async_request = broken
        with pytest.raises(EngineError, match='broke: ReadError'):
            await e.generate(Request([1], 2))
        with pytest.raises(EngineError, match='is the server running'):
            await e.pause()
    ask(server, gone)

def test_servers_that_lack_something(server):
    server.answers['/server_info'] = JSONResponse(dict(detail='Not Found'), 404)
    with pytest.raises(EngineError, match='VLLM_SERVER_DEV_MODE'):
        generate(server)
    del server.answers['/server_info']
    server.mode = 'raw_logits'
    with pytest.raises(EngineError, match='raw_logits'):
        generate(server)
    server.answers['/v1/models'] = JSONResponse(dict(error='Unauthorized'), 401)
    with pytest.raises(EngineError, match='401 Unauthorized'):
        generate(server)

@pytest.mark.parametrize('mode, kw, ok', [
    ('raw_logprobs', {}, True), ('raw_logprobs', dict(temperature=0), True),
    ('raw_logprobs', dict(top_p=.5, top_k=3, min_tokens=1), True),
    ('raw_logprobs', dict(temperature=.7), False), ('processed_logprobs', dict(temperature=.7), True),
    ('processed_logprobs', dict(top_p=.5), False), ('processed_logprobs', dict(top_k=5), False),
    ('processed_logprobs', dict(min_tokens=1), False)])
def test_logprobs_of_another_distribution_are_refused(server, mode, kw, ok):
    server.mode, r = mode, Request([1], 4, **kw)
    if ok:
        assert len(generate(server, r).ids) == 3
    else:
        with pytest.raises(ValueError, match='logprobs'):
            generate(server, r)
        assert server.paths() == []

def test_the_context_is_full(server):
    c = generate(server, Request([1]*64, 4))
    assert c.finish == 'length' and len(c.ids) == len(c.versions) == 0 and server.paths() == []

@pytest.fixture
def folder(tmp_path):
    write_model(model(0), SimpleNamespace(save_pretrained=lambda f: None), tmp_path)
    return tmp_path

def test_a_folder_for_generation_says_use_cache(tmp_path):
    trained = model(0)
    trained.config.use_cache = False  # as training leaves it
    write_model(trained, SimpleNamespace(save_pretrained=lambda f: None), tmp_path)
    assert json.loads((tmp_path/'config.json').read_text())['use_cache'] is True and not trained.config.use_cache

def model(seed):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True))

@pytest.mark.parametrize('as_dict', [False, True])
@pytest.mark.parametrize('keep', [False, True])
def test_new_weights(server, folder, as_dict, keep):
    new = model(1)
    async def go(e):
        await e.update_weights(new.state_dict() if as_dict else new, 5)
        assert e.version == 5 and not e.paused
    ask(server, go, folder=folder, keep=keep)
    assert server.paths() == ['/pause', '/collective_rpc', '/reset_prefix_cache', '/update_weight_version', '/resume']
    asked = {p: (q, b) for p, q, b in server.asked}
    assert asked['/pause'][0] == dict(mode='keep') and asked['/collective_rpc'][1] == dict(method='reload_weights')
    assert asked['/reset_prefix_cache'][0] == dict(reset_running_requests=str(not keep).lower())
    assert asked['/update_weight_version'][1] == dict(new_version='5')
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    got = load_file(folder/'model.safetensors')
    assert got.keys() == new.state_dict().keys() and all(torch.equal(v, got[k]) for k, v in new.state_dict().items())
    assert Qwen3ForCausalLM.from_pretrained(folder).lm_head.weight is not new.model.embed_tokens.weight

def test_new_weights_that_do_not_arrive(server, folder):
    async def go(e):
        with pytest.raises(EngineError, match='500 out of memory'):
            await e.update_weights(model(1), 5)
        assert e.version == 0 and not e.paused and server.paths()[-1] == '/resume'
        server.answers['/collective_rpc'] = JSONResponse({})
        server.answers['/reset_prefix_cache'] = JSONResponse(dict(success=False))
        with pytest.raises(EngineError, match="couldn't drop"):
            await e.update_weights(model(1), 5)
        await e.pause()
        server.answers['/reset_prefix_cache'] = JSONResponse(dict(success=True))
        await e.update_weights(model(1), 6)
        assert e.version == 6 and e.paused  # somebody else's pause is theirs to end
    server.answers['/collective_rpc'] = PlainTextResponse('out of memory', 500)
    ask(server, go, folder=folder)
    with pytest.raises(ValueError, match='`folder`'):
        ask(server, lambda e: e.update_weights(model(1), 5))
    with pytest.raises(ValueError, match='config.json'):
        write_weights(model(1), folder.parent)
    sd = model(1).state_dict()
    for bad in ({k: v for k, v in sd.items() if k != 'lm_head.weight'}, sd | {'lm_head.weight': torch.ones(3)}):
        with pytest.raises(ValueError, match='another model: lm_head.weight'):
            write_weights(bad, folder)
    with pytest.raises(ValueError, match='another model: extra'):
        write_weights(sd | {'extra': torch.ones(3)}, folder)
    model(0).save_pretrained(folder)
    with pytest.raises(ValueError, match='write_model'):
        write_weights(model(1), folder)
    server.answers['/pause'] = PlainTextResponse('', 404)
    with pytest.raises(EngineError, match='VLLM_SERVER_DEV_MODE'):
        ask(server, lambda e: e.pause())


# --- a server of our own

SERVER = """
import http.server, os, sys
open(sys.argv[2], 'w').write(str(os.getpid()))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        well = self.path == '/health' and os.environ['VLLM_SERVER_DEV_MODE'] == '1'
        self.send_response(200 if well else 500)
        self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Answer).serve_forever()
"""

def gone(pid):
    "Wait until a process has ended."
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(.05)

def test_the_server_ends_with_the_block(tmp_path):
    async def go():
        command = lambda port: [sys.executable, '-c', SERVER, str(port), str(tmp_path/'pid')]
        async with vllm_server(command, tmp_path/'log') as url:
            async with httpx2.AsyncClient() as c:
                assert (await c.get(url + '/health')).status_code == 200
            return int((tmp_path/'pid').read_text())
    assert gone(asyncio.run(go())) and 'GET /health' in (tmp_path/'log').read_text()

def test_the_server_ends_with_a_kat_that_is_killed(tmp_path):
    code = f"""
import asyncio, sys
from kat.infer.vllm import vllm_server
async def go():
    async with vllm_server(lambda port: [sys.executable, '-c', {SERVER!r}, str(port), sys.argv[1]]):
        print('up', flush=True)
        await asyncio.Event().wait()
asyncio.run(go())
"""
    p = subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'pid')], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'up\n'
    pid = int((tmp_path/'pid').read_text())
    p.kill()
    p.communicate()
    assert gone(pid)

def test_a_server_that_does_not_start_says_why():
    async def go():
        async with vllm_server(lambda port: [sys.executable, '-c', "raise SystemExit('no room')"]):
            pass
    with pytest.raises(EngineError, match='vLLM did not start:\nno room'):
        asyncio.run(go())

def test_where_vllm_is(tmp_path, monkeypatch):
    monkeypatch.delenv('KAT_VLLM_PYTHON', raising=False)
    assert vllm_python(tmp_path) is None
    made = tmp_path/'.venv-vllm'/'bin'/'python'
    made.parent.mkdir(parents=True)
    made.touch()
    assert vllm_python(tmp_path) == str(made)
    monkeypatch.setenv('KAT_VLLM_PYTHON', sys.executable)
    assert vllm_python(tmp_path) == sys.executable
    monkeypatch.setenv('KAT_VLLM_PYTHON', str(tmp_path/'none'))
    with pytest.raises(ValueError, match='KAT_VLLM_PYTHON=.*none: no program there'):
        vllm_python(tmp_path)

def test_the_command_is_what_the_engine_needs():
    c = server_command('python', Path('m'), 80, None, 8, True)
    assert c[c.index('--logprobs-mode') + 1] == 'processed_logprobs' and c[c.index('--host') + 1] == '127.0.0.1'
    assert '--enable-scale-out' in c and not {'--enforce-eager', '--max-model-len'} & set(c)
    assert {'--enforce-eager', '--max-model-len'} < set(server_command('python', Path('m'), 80, 99, 8, False))
