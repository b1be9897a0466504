"""A gateway in a process of its own, as `kat serve` runs it, for the tests of its end: `python plane_server.py STORE
ENGINE GRACE`

ENGINE is the URL of a vLLM, `hf` (the embedded engine with a random model), or a scripted one that writes TOKENS tokens
and then waits for ever: `quick`, `hangs` while it is closed, `deaf` to whoever doesn't want its answer any more,
`flood` (writes FLOOD tokens), `breaks` after its tokens.

It prints its address; `said` once for each answer, streamed or not and whatever the engine, when the gateway has
TOKENS of its tokens (FLOOD of a flood): whoever read that knows that the request has begun; and `ended`."""
import asyncio
import itertools
import sys

from plane_world import tokenizer

from kat.plane import exchange
from kat.plane.gateway import Gateway, run_server, serve
from kat.plane.store import Store

TOKENS, FLOOD = 20, 2_000_000


def ids():
    return (tokenizer().encode('word ') * TOKENS)[:TOKENS]


class Scripted:
    "An embedded engine: a thread tells the tokens."
    version = 0

    def __init__(self, how):
        self.how = how

    async def generate(self, request, on_token=None):
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._tell, loop, on_token)
        if self.how == 'breaks': raise RuntimeError('out of memory')
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if self.how != 'deaf': raise

    def _tell(self, loop, on_token):
        for i in ids() * (FLOOD // TOKENS if self.how == 'flood' else 1):
            loop.call_soon_threadsafe(on_token, i, -.5, 1., 0)

    async def close(self):
        print('closing', flush=True)
        if self.how == 'hangs':
            await asyncio.Event().wait()


def telling(engine, enough):
    "The engine, which prints `said` when an answer has `enough` tokens."
    generate = engine.generate
    async def told(request, on_token):
        numbers = itertools.count(1)
        def hear(*token):
            on_token(*token)
            if next(numbers) == enough:
                print('said', flush=True)
        return await generate(request, hear)
    engine.generate = told
    return engine


async def engine(how):
    if how.startswith('http'):
        from kat.infer.vllm import VLLMEngine
        return await VLLMEngine.connect(how)
    if how != 'hf': return Scripted(how)
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from kat.infer.serving import HFAsyncEngine
    tok = tokenizer()
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, bos_token_id=None,
                                         eos_token_id=None, pad_token_id=None))
    with torch.no_grad():
        model.lm_head.weight[tok.eos_token_id] = 0      # greedy, it doesn't end
    return HFAsyncEngine(model, max_len=20_000, slots=4, tokenizer=tok)


async def main(store, how, grace):
    kept, computes = Store(store), telling(await engine(how), FLOOD if how == 'flood' else TOKENS)
    try:
        gateway = Gateway(computes, tokenizer(), kept, 20_000)
        await serve(gateway, '127.0.0.1', 0, lambda address: print(address, flush=True), float(grace))
        await computes.close()
    finally:
        kept.close()


if __name__ == '__main__':
    exchange.ENGINE_PATIENCE = .3
    run_server(main(*sys.argv[1:]))
    print('ended', flush=True)
