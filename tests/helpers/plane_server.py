"""A gateway in a process of its own, as `kat serve` runs it, for the tests of its end: `python plane_server.py STORE
ENGINE GRACE`

ENGINE is the URL of a vLLM, `hf` (the embedded engine with a random model), or a scripted one that writes TOKENS tokens
and then waits for ever: `quick`, `hangs` while it is closed, `deaf` to whoever doesn't want its answer any more,
`flood` (writes on and on), `breaks` after its tokens."""
import asyncio
import sys
import threading

from plane_world import tokenizer

from kat.plane import exchange
from kat.plane.gateway import Gateway, run_server, serve
from kat.plane.store import Store

TOKENS = 20


def ids():
    return (tokenizer().encode('word ') * TOKENS)[:TOKENS]


class Scripted:
    "An embedded engine: a thread tells the tokens."
    version = 0

    def __init__(self, how):
        self.how = how

    async def generate(self, request, on_token=None):
        loop, over = asyncio.get_running_loop(), threading.Event()
        await asyncio.to_thread(self._tell, loop, on_token, over)
        print('said', flush=True)
        if self.how == 'breaks': raise RuntimeError('out of memory')
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if self.how != 'deaf': raise

    def _tell(self, loop, on_token, over):
        for i in ids() * (100_000 if self.how == 'flood' else 1):
            loop.call_soon_threadsafe(on_token, i, -.5, 1., 0)

    async def close(self):
        print('closing', flush=True)
        if self.how == 'hangs':
            await asyncio.Event().wait()


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
    kept, computes = Store(store), await engine(how)
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
